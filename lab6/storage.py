"""Where things are kept, and how files are written whole: folders, locks, json, hashes.

Needs no torch, so that the command line and the renderer start at once. Stands on no other room.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "data" / "weights"


# ── Folders ────────────────────────────────────────────────────────────────────────────────────────────


def folder_named_by(variable: str) -> Path | None:
    """The folder that an environment variable names, absolute, or None."""
    named = os.environ.get(variable)
    return Path(named).expanduser().resolve() if named else None


def from_project(path: Path | str) -> Path:
    """A path as a user gave it; a relative one starts at the project's folder."""
    return ROOT / Path(path).expanduser()


def runs_folder() -> Path:
    """Folder for what runs leave behind: data/runs, or $LAB6_RUNS."""
    return folder_named_by("LAB6_RUNS") or ROOT / "data" / "runs"


def name_of(preset: str, choices: dict) -> str:
    """A name for a training run, from what was chosen: fit for a folder, the same for the same choices."""
    parts = [preset, *(f"{name}={value}" for name, value in sorted(choices.items()))]
    return re.sub(r"[^\w=.-]+", "_", ",".join(parts)).strip("_")


# ── Whole files ────────────────────────────────────────────────────────────────────────────────────────


def write_whole(path: Path, write, previous: Path | None = None):
    """Call `write(temporary path)`, then rename: `path` is either the old file or the whole new one.

    previous: where the old file is kept; whenever a program stops, one of the two is whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex[:12]}.{path.name}")
    try:
        write(temporary)
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except Exception as error:  # torch, safetensors and the disk each have their own words for a full disk
        full = getattr(error, "errno", None) == errno.ENOSPC
        if full or any(words in str(error) for words in ("unexpected pos", "file write failed", "No space left")):
            raise OSError(errno.ENOSPC, f"no space left to write {path.name} in {path.parent}: free some, or use "
                          "another disk (LAB6_RUNS, LAB6_FIGURES); what was there is kept") from None  # fmt: skip
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str):
    """Write a text file, whole or not at all."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value):
    """Write json, whole or not at all. Raises ValueError where a number is not finite, which json does not know."""
    try:
        text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path}: not written, since a number in it is not finite (nan, inf): {error}") from None
    write_text(path, text + "\n")


def read_json(path: Path, default=None):
    """What a json file holds. Where it is missing or broken: `default`, or without one a ValueError that names it."""
    try:
        return parse_json(Path(path).read_bytes(), path)
    except (OSError, ValueError) as error:
        if default is not None:
            return default
        raise ValueError(f"{path}: not readable as json ({error})" if isinstance(error, OSError) else error) from None


def parse_json(content: bytes, where):
    """What json says, also with the byte order mark of Windows editors. Raises ValueError, which names `where`."""
    try:
        return json.loads(content.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{where}: not readable as json ({error})") from None


def update_json(path: Path, change, default: dict):
    """Replace what a json file holds by change(it); processes that do so at the same time lose nothing.

    default: what `change` is given where there is no file yet.
    """
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        write_json(path, change(read_json(path) if path.exists() else default))


def load_history(folder: Path) -> list[dict]:
    """The records of a run, one per epoch, oldest first; empty where none was trained."""
    file = Path(folder) / "history.json"
    return read_json(file) if file.exists() else []


def sha256_of(file: Path) -> str:
    """First 16 hexadecimal digits of a file's SHA-256."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]


# ── Whole folders, and one process at a time ───────────────────────────────────────────────────────────


@contextlib.contextmanager
def exclusive(file: Path, say: bool = True):
    """Hold a lock file, so that only one process at a time does what follows; with `say`, a process that waits says so.

    The same process may take it again, since an interrupted cell of a notebook can leave it held.
    """
    from filelock import FileLock, Timeout

    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file, is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if say:
            print(f"progress: waiting for another process, which works in {file.parent}", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _previous(folder):
    return folder.with_name(f"{folder.name}.previous")


def _lock(folder):
    return folder.with_name(f"{folder.name}.lock")


def replace_folder(folder: Path, write):
    """Call `write(temporary folder)`, then put that in place of `folder`; one writer at a time.

    No file system renames a folder over another, so the old one steps aside for a moment; `open_folder` waits for that
    moment to pass, and finds the old one where a crash left it aside.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".partial.{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    try:
        write(temporary)
        if not (folder.exists() or _previous(folder).exists()):
            temporary.rename(folder)
            return
        with exclusive(_lock(folder), say=False):
            if folder.exists():
                shutil.rmtree(_previous(folder), ignore_errors=True)
                folder.rename(_previous(folder))
            temporary.rename(folder)
            shutil.rmtree(_previous(folder), ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def open_folder(folder: Path):
    """Read a folder that `replace_folder` may be replacing: it stays the same meanwhile.

    Only folders of runs are ever replaced; elsewhere, such as where weights ship, no lock file is made.
    """
    may_change = _lock(folder).exists() or (folder.parent.is_dir() and folder.is_relative_to(runs_folder()))
    with contextlib.ExitStack() as stack:
        if may_change and os.access(folder.parent, os.W_OK):  # what is read-only is not being replaced
            stack.enter_context(exclusive(_lock(folder), say=False))
        if not folder.exists() and _previous(folder).exists():  # a crash between the two renames
            _previous(folder).rename(folder)
        yield folder


def has_folder(folder: Path) -> bool:
    """Is there such a folder, perhaps put aside by a crash?"""
    with open_folder(folder):
        return folder.is_dir()


def save_with_history(model, folder: Path, history: list[dict]):
    """Save a pipeline or a model, and the history of its training, in place of an earlier one."""

    def write(temporary):
        model.save_pretrained(temporary)
        write_json(temporary / "history.json", history)

    replace_folder(folder, write)
