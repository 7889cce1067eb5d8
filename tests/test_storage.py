"""lab6/storage.py: files and folders are written whole, also where several processes write."""

import errno
import json
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

import lab6_utils as lab
from lab6 import storage


def enter(path, writer):
    for number in range(40):
        storage.update_json(path, lambda content, name=f"{writer}-{number}": content | {name: writer}, {})


def test_writers_of_one_json_file_lose_nothing(tmp_path):
    path = tmp_path / "status.json"
    with ProcessPoolExecutor(3) as pool:
        list(pool.map(enter, [path] * 3, range(3)))
    assert len(json.loads(path.read_text())) == 120


def save(folder, text):
    def write(temporary):
        temporary.mkdir(parents=True)
        for name in "ab":
            (temporary / name).write_text(text)

    storage.replace_folder(folder, write)


def test_a_folder_is_always_there_and_of_one_piece(tmp_path, monkeypatch):
    """A reader beside a writer never finds nothing, nor half of each."""
    monkeypatch.setenv("LAB6_RUNS", str(tmp_path))
    folder, stop, seen = tmp_path / "run" / "pipeline", threading.Event(), []
    save(folder, "0")

    def read():
        while not stop.is_set():
            with storage.open_folder(folder) as opened:
                seen.append((opened / "a").read_text() == (opened / "b").read_text())

    with ProcessPoolExecutor(1) as pool:  # another process: a lock may be taken twice by the same
        reader = threading.Thread(target=read)
        reader.start()
        for number in range(30):
            pool.submit(save, folder, str(number)).result()
        stop.set()
        reader.join()
    assert len(seen) > 10 and all(seen)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["pipeline", "pipeline.lock"], "nothing else is left"


def test_a_crash_while_a_folder_is_replaced_loses_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "pipeline"
    save(folder, "old")
    rename, done = Path.rename, []

    def crash(path, target):
        done.append(path)
        if len(done) == 2:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", crash)
    with pytest.raises(KeyboardInterrupt):
        save(folder, "new")
    monkeypatch.undo()
    assert not folder.exists(), "the crash came between the two renames"
    with storage.open_folder(folder) as opened:
        assert (opened / "a").read_text() == "old"
    save(folder, "new")
    assert (folder / "a").read_text() == "new" and not (tmp_path / "pipeline.previous").exists()


def test_where_weights_ship_no_lock_file_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB6_RUNS", str(tmp_path / "runs"))
    save(tmp_path / "weights" / "tokens", "shipped")
    with storage.open_folder(tmp_path / "weights" / "tokens"):
        pass
    assert [p.name for p in (tmp_path / "weights").iterdir()] == ["tokens"]


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "deep" / "results.json"
    lab.write_json(file, {"caf\u00e9": 1})
    assert json.loads(file.read_text(encoding="utf-8")) == {"caf\u00e9": 1}
    with pytest.raises(TypeError):
        lab.write_json(file, {"x": object()})

    def half(path):
        path.write_text("{")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="no space left"):
        storage.write_whole(file, half)
    assert json.loads(file.read_text(encoding="utf-8")) == {"caf\u00e9": 1}
    assert [p.name for p in file.parent.iterdir()] == ["results.json"], "nothing temporary is left"


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 470"),
    Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
])  # fmt: skip
def test_a_full_disk_is_called_so(tmp_path, error):
    file = tmp_path / "checkpoint.pt"
    file.write_text("before")

    def write(temporary):
        temporary.write_text("half")
        raise error

    with pytest.raises(OSError, match=r"no space left to write checkpoint\.pt in .*LAB6_RUNS"):
        storage.write_whole(file, write)
    assert file.read_text() == "before" and list(tmp_path.iterdir()) == [file]
