"""Converted models in the cache: made once, again where damaged, and not at all where there is no room."""

import errno
from pathlib import Path

import pytest
from safetensors import SafetensorError

from pyro_blora.models import converted as module
from pyro_blora.models.converted import converted


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path / "cache")
    path = tmp_path / "source.bin"
    path.write_bytes(b"weights")
    return path


def write(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"converted")


def left(source: Path) -> list[Path]:
    return [*(source.parent / "cache" / "kind").iterdir()]


def test_it_is_made_once_and_again_where_it_is_damaged(source):
    made = []

    def counted(folder):
        made.append(folder)
        write(folder)

    folders = [converted("kind", "1", [source], counted) for _ in range(2)]
    assert folders[0] == folders[1] and len(made) == 1 and left(source) == folders[:1]
    (folders[0] / "model.safetensors").write_bytes(b"half")
    assert converted("kind", "1", [source], counted) == folders[0] and len(made) == 2
    assert (folders[0] / "model.safetensors").read_bytes() == b"converted"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error")])
def test_a_full_disk_is_a_sentence_and_leaves_nothing(source, error):
    def fails(folder):
        write(folder)
        raise error

    with pytest.raises(ValueError, match=r"cannot be kept in .*: name another folder in PYRO_BLORA_CACHE"):
        converted("kind", "1", [source], fails)
    assert left(source) == []


def test_another_process_that_was_faster_is_taken_and_a_failed_rename_is_not(source, monkeypatch):
    def refuse(partial, folder):
        raise OSError(errno.EACCES, "Permission denied")

    def faster(partial, folder):
        folder.mkdir()
        for path in partial.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(module.os, "replace", refuse)
    with pytest.raises(ValueError, match="Permission denied"):
        converted("kind", "1", [source], write)
    monkeypatch.setattr(module.os, "replace", faster)
    assert left(source) == [] and converted("kind", "1", [source], write).is_dir()
