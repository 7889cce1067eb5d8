"""Training images as tensors: decoded once into a cache on disk, and read from there. Notebook 01.

Stands on files, holdings, settings, machine, labels and storage.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lab6.files import DataFiles, read_data, render_into_runs, scene_of, unseen_sets
from lab6.holdings import Holding, open_holding
from lab6.labels import OBJECTS, encode_labels, to_float
from lab6.machine import make_generator, progress
from lab6.settings import Settings
from lab6.storage import runs_folder, write_whole

#: No image may have more pixels than this, in width times height.
LARGEST_IMAGE = 16_000_000


def crowded_scenes(scenes: int, seed: int) -> ICLEVRDataset:
    """Images of one to five objects, which the course's data lacks: five a scene, rendered once into data/runs/.

    seed: evaluators learn from 1 and are tested on 2; 0 stands in for the course's scenes.
    """
    return ICLEVRDataset(read_data(render_into_runs(scenes, 5, seed)), "all")


class ICLEVRDataset(torch.utils.data.Dataset):
    """Images with their labels; item i is (image (3, 64, 64) float32 in [-1, 1], labels (24,) multi-hot).

    All images of train.json are decoded and resized once (antialiased bilinear, 4:3 squeezed to a square)
    into a uint8 file under data/runs/cache/, which is used again as long as the files' sizes and dates are
    the same.

    Args:
        files: from `find_data`.
        split: "train", "held-out" (`files.held_out`) or "all". Data is split by scene, never by image, since the images
            of a scene share most of their pixels.
        limit: keep only the first `limit` images; 0 keeps all.
        runs: where the cache goes; default data/runs or $LAB6_RUNS.
        without: file names to leave out.

    Attributes:
        files: where it comes from; names: file names; pixels: (N, 3, 64, 64) uint8, memory-mapped; labels: (N, 24).
    """

    def __init__(self, files: DataFiles, split: str = "train", limit: int = 0, runs: Path | None = None, without=()):
        if split not in ("train", "held-out", "all"):
            raise ValueError(f"split={split!r}: choose from train, held-out, all")
        names = sorted(files.train)
        held_out = files.held_out
        keep = [i for i, n in enumerate(names) if split == "all" or (scene_of(n) in held_out) == (split == "held-out")]
        keep = [i for i in keep if names[i] not in without][: limit or None]
        pixels = _load_cache(files, names, (runs or runs_folder()) / "cache")
        self.files, self.split, self.source = files, split, files.source
        self.names = [names[i] for i in keep]
        # One contiguous run of scenes stays a view of the file; anything else is gathered once.
        contiguous = bool(keep) and keep == list(range(keep[0], keep[-1] + 1))
        self.pixels = pixels[keep[0] : keep[-1] + 1] if contiguous else pixels[keep]
        self.labels = encode_labels([files.train[n] for n in self.names]) if keep else torch.zeros(0, len(OBJECTS))

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        return to_float(self.pixels[index]), self.labels[index]

    def images_at(self, rows: torch.Tensor) -> torch.Tensor:
        """The images of `rows`, (B, 3, 64, 64) in [-1, 1], on the device of `rows`; all images (0.2 GB) go there the
        first time."""
        there = getattr(self, "_there", self.pixels)
        if there.device != rows.device:
            self._there = there = self.pixels.to(rows.device)
        return to_float(there[rows])


def training_set(settings: Settings, files: DataFiles) -> ICLEVRDataset:
    """The images that a denoiser is trained on: the first `max_images` of those that `leave_out` leaves."""
    out = ()
    if settings.leave_out != "none":
        whole = ICLEVRDataset(files, "train")
        sets = encode_labels([names for kind in unseen_sets().values() for names in kind])
        shows = (whole.labels @ sets.T == sets.sum(1)).any(1)
        if settings.leave_out == "random":
            shows = shows[torch.randperm(len(shows), generator=make_generator(0))]  # from before streams had names
        out = {name for name, left_out in zip(whole.names, shows, strict=True) if left_out}
    return ICLEVRDataset(files, "train", settings.max_images, without=out)


def data_facts(dataset) -> dict:
    """What identifies a data set: source, number of images, and a fingerprint of all pixels and labels."""
    digest = hashlib.sha256(dataset.labels.numpy().tobytes())
    for pixels in dataset.pixels.split(1024):
        digest.update(pixels.contiguous().numpy())
    return {"source": getattr(dataset, "source", "unknown"), "images": len(dataset),
            "fingerprint": digest.hexdigest()[:16]}  # fmt: skip


def _load_cache(files, names, folder):
    """(N, 3, 64, 64) uint8 tensor on a memory-mapped file, made when it is missing or out of date."""
    holding, stamp = _list_images(files, names)
    root = hashlib.sha256(str(files.images).encode()).hexdigest()[:8]
    path = Path(folder) / f"iclevr64-{root}-{stamp}.npy"
    if not path.exists():
        write_whole(path, lambda temporary: _decode_all(holding, names, temporary))
        for old in set(path.parent.glob(f"iclevr64-{root}-*.npy")) - {path}:
            with contextlib.suppress(OSError):  # on Windows, while another notebook reads it
                old.unlink()
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def _list_images(files, names):
    """What holds the images, and a hash of all their sizes and dates. Errors name what is missing."""
    holding = open_holding(files.images)
    missing = [n for n in names if n not in holding.files]
    if missing:
        raise FileNotFoundError(
            f"{files.images}: {len(missing)} of the {len(names)} images that train.json lists are missing, "
            f"the first is {missing[0]}; unpack the course's iclevr.zip again"
        )
    if files.images.is_dir():
        stats = {n: holding.files[n].stat() for n in names}
        facts = [(n, s.st_size, s.st_mtime_ns) for n, s in stats.items()]
    else:
        facts = [(n, holding.files[n].file_size, holding.files[n].CRC) for n in names]
    return holding, hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def open_image(holding: Holding, name: str, archive: zipfile.ZipFile | None = None) -> Image.Image:
    """An image as it was handed out, in RGB; archive: the opened zip, if it is open already.

    Raises:
        ValueError: it cannot be read, or has more pixels than any image of this task.
    """
    data = holding.read(name, archive)
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > LARGEST_IMAGE:
            raise ValueError(f"{image.width} x {image.height} pixels, and the course's have 320 x 240")
        return image.convert("RGB")
    except Exception as error:  # Pillow has many; all of them mean a damaged file
        raise ValueError(f"{holding.where(name)}: not a readable image ({error}); get the file again") from None


def to_pixels(image: Image.Image) -> np.ndarray:
    """(3, 64, 64) uint8 of an image of any size (antialiased bilinear)."""
    from torchvision.transforms.v2.functional import resize

    image = image if image.size == (64, 64) else resize(image, [64, 64])
    return np.asarray(image).transpose(2, 0, 1).copy()


def _decode_all(holding, names, path):
    """Decode, resize and write all images as one .npy; Pillow and zlib leave the GIL, so threads do."""
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(open(path, "wb"))  # not open_memmap: the file name must not gain a suffix
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(names), 3, 64, 64)}
        np.lib.format.write_array_header_1_0(out, header)
        archive = None if holding.path.is_dir() else stack.enter_context(zipfile.ZipFile(holding.path))

        decode = lambda name: to_pixels(open_image(holding, name, archive))
        with ThreadPoolExecutor() as pool:
            for pixels in progress(pool.map(decode, names), "decoding images", len(names)):
                out.write(pixels.tobytes())
