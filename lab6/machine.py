"""What the computer gives: device, precision, random numbers, progress, and how results name it.

Stands on options and storage.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import shutil
import signal
import subprocess
import threading
import time
import warnings
from pathlib import Path

import torch
from tqdm.auto import tqdm

from lab6.options import Run
from lab6.storage import ROOT

# ── Device and precision ───────────────────────────────────────────────────────────────────────────────


def has_cuda() -> bool:
    """Is there an NVIDIA GPU that torch can compute on? Where one is there in vain, a warning says why."""
    if not torch.cuda.is_available():
        if _has_nvidia_gpu() and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
            _warn_once("an NVIDIA GPU is there, but this torch cannot use it (its driver is too old for CUDA "
                       f"{torch.version.cuda}, or torch was built without CUDA). Computing without it")  # fmt: skip
        return False
    card, built = torch.cuda.get_device_capability(), torch.cuda.get_arch_list()
    if not _has_kernels(card, built):
        _warn_once(f"the GPU {torch.cuda.get_device_name()} has compute capability {card[0]}.{card[1]}, for which this "
                   f"torch has no kernels (it has {', '.join(built)}). Computing without it")  # fmt: skip
        return False
    return True


def find_device() -> str:
    """The best device here: cuda, mps or cpu."""
    return "cuda" if has_cuda() else "mps" if torch.backends.mps.is_available() else "cpu"


def _has_kernels(card, built):
    """Do kernels built for these architectures run on a card of this capability (major, minor)? Machine code (sm_) runs
    on cards of the same major number and no lower minor one, PTX (compute_) on all later cards."""
    for name in built:
        kind, _, number = name.partition("_")
        major, minor = divmod(int(re.match(r"\d+", number)[0]), 10)
        same = major == card[0] and minor <= card[1]
        if same if kind == "sm" else kind == "compute" and (major, minor) <= tuple(card):
            return True
    return not built


def _has_nvidia_gpu():
    gpus = Path("/proc/driver/nvidia/gpus")
    return (gpus.is_dir() and any(gpus.iterdir())) or (os.name == "nt" and shutil.which("nvidia-smi") is not None)


@functools.cache
def _warn_once(message):
    warnings.warn(message, stacklevel=3)


def computes_bf16(device: str) -> bool:
    """True where bf16 arithmetic is in hardware; emulated, it is slower than fp32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


@contextlib.contextmanager
def hold_signals(hold: bool = True):
    """Ctrl-C and SIGTERM take effect at the end of the block. In it, the list that it gives tells of them; a second one
    takes effect at once. hold: False, and outside the main thread, leaves them as they are."""
    asked, before = [], {}

    def note(number, frame):
        asked.append(number)
        if len(asked) > 1:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    if hold and threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if (handler := signal.getsignal(number)) != signal.SIG_IGN:  # as in a shell's background
                before[number] = handler or signal.SIG_DFL
                signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        signal.raise_signal(asked[0])


@contextlib.contextmanager
def without_accelerate_choices():
    """Within it, accelerate sees none of its environment variables, of `accelerate launch` or of the user, so that the
    settings alone decide on precision, device and steps. How many processes there are it knows from torch's own."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("ACCELERATE_")}
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextlib.contextmanager
def enough_memory(batch_size: int):
    """Within it, a GPU's memory that is too small raises RuntimeError, which names the setting to lower."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise RuntimeError(
            f"not enough GPU memory to train with batch_size={batch_size}: lower it (batch_size="
            f"{max(1, batch_size // 2)} takes about half as much), or let other programs give theirs back"
        ) from None


def check_finite(what: str, *tensors: torch.Tensor):
    """Raise ValueError where one of these holds a number that is not finite (nan, inf); `what` they are."""
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise ValueError(f"{what} holds numbers that are not finite (nan, inf): it comes from a training or a sampling "
                         "that went wrong; make it again")  # fmt: skip


def autocast(options: Run):
    """Context in which networks compute in `options.precision`; weights and results stay float32."""
    return torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16")


def wait_for(device: str):
    """Let the host wait until the device has done all its work, so that a clock tells the truth."""
    if device == "cuda":
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()


# ── Random numbers ─────────────────────────────────────────────────────────────────────────────────────


def make_generator(seed: int, *stream: int | str, device: str = "cpu") -> torch.Generator:
    """A random generator for one purpose: the same (seed, *stream) always gives the same numbers.

    Seed and stream are hashed together, so that neighbouring seeds and steps share nothing. In lab6/ every
    purpose has a name of its own as the first part of its stream ("noise", "dropout", ...), except sampling: its stream
    is (seed, number of the image), so that images stay what they were in earlier versions.
    """
    digest = hashlib.sha256(repr((seed, *stream)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))


@contextlib.contextmanager
def global_randomness(device: str, seed: int, *stream: int | str):
    """Within it torch's global generators, which layers such as dropout use, begin at (seed, *stream); afterwards they
    are as they were before."""
    gpus = [torch.cuda.current_device()] if device == "cuda" else []
    of_mps = torch.mps.get_rng_state() if device == "mps" else None
    try:
        with torch.random.fork_rng(devices=gpus):
            torch.manual_seed(make_generator(seed, *stream).initial_seed())
            yield
    finally:
        if of_mps is not None:
            torch.mps.set_rng_state(of_mps)


# ── Progress ───────────────────────────────────────────────────────────────────────────────────────────


def headless() -> bool:
    """True when run_notebooks.py runs the notebook: progress is then printed lines, not bars."""
    return os.environ.get("LAB6_HEADLESS") == "1"


def progress(iterable, description: str, total: int | None = None, lines: bool = False):
    """A progress bar in JupyterLab and terminals; headlessly, with `lines`, a printed line every 20 seconds with the
    time left, else nothing: most loops have a caller that prints a line per epoch."""
    total = len(iterable) if total is None else total
    if not headless():
        yield from tqdm(iterable, description, total, leave=False)
        return
    start = said = time.perf_counter()
    for done, item in enumerate(iterable, 1):
        yield item
        if lines and time.perf_counter() - said > 20:
            said = time.perf_counter()
            left = format_seconds(time_left(start, done, total))
            print(f"progress: {description}, {done} of {total}, {left} left", flush=True)


def time_left(start: float, done: int, total: int) -> float:
    """Seconds until `total` is done, when `done` have taken since `start` (of time.perf_counter)."""
    return (time.perf_counter() - start) / done * (total - done)


def format_seconds(seconds: float) -> str:
    """75 -> "1 min 15 s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


# ── Names for results ──────────────────────────────────────────────────────────────────────────────────


@functools.cache
def commit() -> str:
    """The commit of this checkout, with a + where files have changed since; "unknown" outside git."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno", "--", "*.py", "*.ipynb", "data"],
                                 capture_output=True, text=True, check=True)  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def device_name(options: Run) -> str:
    """The device as results name it: the GPU's name, or the number of CPU threads."""
    if options.device == "cuda":
        return torch.cuda.get_device_name()
    return f"{options.device}, {torch.get_num_threads()} threads"
