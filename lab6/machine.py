"""What the computer gives: device, precision, random numbers, progress, and the names that results need of it."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import typing

import torch
from tqdm.auto import tqdm

from lab6.storage import ROOT

if typing.TYPE_CHECKING:
    from lab6.settings import Settings


def computes_bf16(device):
    """True where bf16 arithmetic is in hardware; emulated, it is slower than fp32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def autocast(settings: Settings):
    """Context in which networks compute in `settings.precision`; weights and results stay float32."""
    return torch.autocast(settings.device, torch.bfloat16, enabled=settings.precision == "bf16")


def make_generator(seed: int, *stream: int, device: str = "cpu") -> torch.Generator:
    """A random generator for one purpose: the same (seed, *stream) always gives the same numbers.

    The numbers are hashed together, so that neighbouring seeds and steps share nothing.
    """
    digest = hashlib.sha256(repr((seed, *stream)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))


def headless() -> bool:
    """True when run_notebooks.py runs the notebook: progress is then printed lines, not bars."""
    return os.environ.get("LAB6_HEADLESS") == "1"


def progress(iterable, description: str, total: int | None = None):
    """A progress bar in JupyterLab and terminals; nothing headlessly, where callers print lines."""
    return tqdm(iterable, description, total, leave=False, disable=headless())


def format_seconds(seconds: float) -> str:
    """75 -> "1 min 15 s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


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


def device_name(settings: Settings) -> str:
    """The device as results name it: the GPU's name, or the number of CPU threads."""
    if settings.device == "cuda":
        return torch.cuda.get_device_name()
    return f"{settings.device}, {torch.get_num_threads()} threads"
