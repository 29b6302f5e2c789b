"""What is being written is told from what was left behind."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from longmem.store.files import digest, is_abandoned, new_file, write_bytes


def write_and_wait(path: str, pipe: Connection) -> None:
    with new_file(Path(path)) as file:
        pipe.send(write_bytes(file, b"half"))
        time.sleep(60)


def test_a_file_is_abandoned_when_its_writer_dies(tmp_path: Path) -> None:
    processes = multiprocessing.get_context("spawn")
    mine, theirs = processes.Pipe()
    writer = processes.Process(target=write_and_wait, args=(str(tmp_path / "a.tmp"), theirs))
    writer.start()
    try:
        assert mine.recv() == (hashlib.sha256(b"half").hexdigest(), 4)
        assert not is_abandoned(tmp_path / "a.tmp")
    finally:
        writer.kill()
        writer.join()
    assert is_abandoned(tmp_path / "a.tmp") and digest(tmp_path / "a.tmp") == hashlib.sha256(b"half").hexdigest()


def test_an_empty_file_may_be_about_to_be_written(tmp_path: Path) -> None:
    path = tmp_path / "a.tmp"
    path.write_bytes(b"")
    assert not is_abandoned(path)
    os.utime(path, (0, 0))
    assert is_abandoned(path)
    assert not is_abandoned(tmp_path / "gone.tmp")


def test_a_new_file_replaces_none(tmp_path: Path) -> None:
    (tmp_path / "a.tmp").write_bytes(b"there")
    with pytest.raises(FileExistsError):
        new_file(tmp_path / "a.tmp")
    assert (tmp_path / "a.tmp").read_bytes() == b"there"
