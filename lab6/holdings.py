"""What a folder holds, however it was handed out: files in folders, in zips, in zips within folders. Notebook 01.

Stands on storage.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import zipfile
from pathlib import Path

from lab6.storage import parse_json

#: No image and no json file of the course is a hundredth of this, in bytes.
LARGEST = 200_000_000
#: Folders in which no data is looked for: what the workbook itself keeps, and what Macs put into zips.
_SKIPPED = {"runs", "weights", "figures", "samples", "__MACOSX"}


@dataclasses.dataclass(frozen=True)
class Holding:
    """A folder or a zip, and the files that lie in it.

    Attributes:
        path: of the folder or the zip.
        files: {file name without folders: path of the file, or the zip's entry}.
        trouble: why a zip could not be opened, else "".
    """

    path: Path
    files: dict[str, Path | zipfile.ZipInfo]
    trouble: str = ""

    def where(self, name: str) -> str:
        """How messages name one of its files."""
        return str(self.path / (name if self.path.is_dir() else self.files[name].filename))

    def read(self, name: str, archive: zipfile.ZipFile | None = None) -> bytes:
        """The content of one of its files; archive: the opened zip, if it is open already.

        Raises:
            ValueError: it cannot be read: damaged, encrypted or far too large.
        """
        entry = self.files[name]
        try:
            if isinstance(entry, Path):
                return entry.read_bytes()
            if entry.file_size > LARGEST:
                raise ValueError(f"{entry.file_size:,} bytes, which no file of the course has")
            if archive:
                return archive.read(entry)
            with zipfile.ZipFile(self.path) as opened:
                return opened.read(entry)
        except Exception as error:  # zipfile, zlib and the disk have many
            raise ValueError(f"{self.where(name)}: not readable ({error}); get the file again") from None

    def json(self, name: str):
        """What one of its json files says. Raises ValueError, naming the file."""
        return parse_json(self.read(name), self.where(name))


def look_into(root: Path, depth: int = 2) -> list[Holding]:
    """What lies in a folder: first the folder, then those in it, `depth` levels down, then all zips, near ones first.
    A zip that cannot be opened holds nothing but its `trouble`, since it may have nothing to do with the data."""
    folders, zips, level = [], [], [Path(root)]
    for _ in range(depth + 1):
        below = []
        for folder in level:
            entries = _list_folder(folder)
            files = {entry.name: Path(entry.path) for entry in entries if entry.is_file()}
            folders.append(Holding(folder, files))
            zips += [path for name, path in files.items() if name.lower().endswith(".zip")]
            below += [Path(entry.path) for entry in entries if entry.is_dir()
                      and entry.name not in _SKIPPED and not entry.name.startswith(".")]  # fmt: skip
        level = below
    return folders + list(map(_open_zip, zips))


def _list_folder(folder):
    """What is in a folder; nothing where it may not be read, such as lost+found."""
    try:
        return sorted(os.scandir(folder), key=lambda entry: entry.name)
    except (PermissionError, NotADirectoryError, FileNotFoundError):
        return []


def _open_zip(path):
    try:
        return open_holding(path)
    except ValueError as error:
        return Holding(path, {}, str(error))


def open_holding(path: Path) -> Holding:
    """The files of one folder, without those in folders below, or of one zip, with those.

    Raises:
        ValueError: the zip is damaged, or points outside itself.
    """
    if path.is_dir():
        return Holding(path, {entry.name: Path(entry.path) for entry in os.scandir(path) if entry.is_file()})
    stat = path.stat()
    return Holding(path, _list_zip(path, stat.st_size, stat.st_mtime_ns))


@functools.lru_cache(maxsize=16)  # the course's zip has 18,000 entries, and each notebook looks several times
def _list_zip(path, size, date):
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path}: not a readable zip file ({error}); download it again") from None
    files = {}
    for entry in entries:
        parts = entry.filename.replace("\\", "/").split("/")  # older Windows tools write backslashes
        if ".." in parts or parts[0] == "" or ":" in parts[0]:
            raise ValueError(f"{path}: {entry.filename!r} points outside the zip; refused")
        if parts[-1] and "__MACOSX" not in parts:
            files.setdefault(parts[-1], entry)
    return files
