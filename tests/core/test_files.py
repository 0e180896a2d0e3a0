"""Files are replaced whole, follow nothing that was put there, and leave nothing behind where they can't be written."""

import os
import resource
import stat

import pytest
import torch

from thinwire import ThinwireError
from thinwire.core import files
from thinwire.report import results
from thinwire.report.ledger import Ledger, StepRow


def _ledger(path):
    ledger = Ledger("m", 2, "link")
    ledger.add(StepRow(0))
    ledger.write_jsonl(path)


WRITERS = {
    "text": lambda path: files.write_text(path, "x" * 200_000),
    "tensors": lambda path: files.write(path, lambda file: torch.save({"a": torch.ones(50_000)}, file)),
    "page": lambda path: files.write_text(path, "<p>é" * 40_000),
    "results": lambda path: results.write(path, {"m": "x" * 200_000}, [results.Row("a", "b", 1.0)]),
    "ledger": _ledger,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_link_is_replaced_and_not_followed(tmp_path, writer):
    victim, folder = tmp_path / "victim", tmp_path / "out"
    folder.mkdir()
    victim.write_text("precious")
    target = folder / "made"
    for link in (victim, tmp_path / "nothing", tmp_path / "out"):
        target.unlink(missing_ok=True)
        target.symlink_to(link)
        WRITERS[writer](target)
        assert not target.is_symlink()
        assert target.stat().st_size > 0
    assert victim.read_text() == "precious"
    assert os.listdir(tmp_path / "out") == ["made"]
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("writer", ["text", "tensors", "page", "results"])
def test_a_full_disk_leaves_what_was_there_and_nothing_else(tmp_path, writer):
    target = tmp_path / "made"
    for before in (None, b"of before"):
        if before is not None:
            target.write_bytes(before)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            with pytest.raises(ThinwireError, match=rf"can't write {target}: File too large; .* choose another place"):
                WRITERS[writer](target)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert os.listdir(tmp_path) == ([] if before is None else ["made"])
        assert before is None or target.read_bytes() == before
    assert WRITERS[writer](target) is None


def test_a_device_or_a_folder_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to pipe").symlink_to(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, what in (("pipe", "a device or a pipe"), ("to pipe", "a device or a pipe"), ("folder", "a folder")):
        for attempt in (files.check_writable, lambda path: files.write_text(path, "x")):
            with pytest.raises(ThinwireError, match=f"{name}: it is {what}"):
                attempt(tmp_path / name)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ThinwireError, match=r"can't write .*/file/below"):
        files.check_writable(tmp_path / "file" / "below")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "pipe", "to pipe"]


@pytest.mark.parametrize("writer", WRITERS)
def test_a_new_file_has_the_permissions_of_the_one_that_it_replaces(tmp_path, writer):
    target = tmp_path / "made"
    umask = os.umask(0o022)
    try:
        WRITERS[writer](target)
        assert stat.S_IMODE(target.stat().st_mode) == 0o644
        for mode in (0o600, 0o664, 0o400, 0o777):
            target.chmod(mode)
            WRITERS[writer](target)
            assert stat.S_IMODE(target.stat().st_mode) == mode
        target.unlink()
        target.symlink_to("nothing")  # whose own mode is 0777
        WRITERS[writer](target)
        assert stat.S_IMODE(target.stat().st_mode) == 0o644
    finally:
        os.umask(umask)


def test_new_folders_are_removed_where_the_file_can_not_be_written(tmp_path):
    for name in ("a/b/c/" + "é" * 200, "a/b/" + "n" * 300 + "/made", "a/b/../c/" + "n" * 300):
        for attempt in (files.check_writable, lambda path: files.write_text(path, "x")):
            with pytest.raises(ThinwireError, match="File name too long"):
                attempt(tmp_path / name)
            assert os.listdir(tmp_path) == []
    with pytest.raises(ZeroDivisionError):
        files.write(tmp_path / "a" / "b" / "made", lambda file: 1 / 0)
    assert os.listdir(tmp_path) == []
    (tmp_path / "old").mkdir()
    with pytest.raises(ZeroDivisionError):
        files.write(tmp_path / "old" / "new" / "made", lambda file: 1 / 0)
    assert os.listdir(tmp_path) == ["old"]
    assert os.listdir(tmp_path / "old") == []


def test_text_and_names_that_can_not_be_encoded(tmp_path):
    target = tmp_path / "made"
    target.write_text("before")
    for text in ("\ud800", "<p>\udcff</p>", "é" * 100 + "\udfff"):
        with pytest.raises(ThinwireError, match=r"can't write .*made: character \d+ of its text, '\\ud"):
            files.write_text(target, text)
    assert target.read_text() == "before"
    for name in ("a\0b", "\ud800", "new\0folder/a"):
        for attempt in (files.check_writable, lambda path: files.write_text(path, "x")):
            with pytest.raises(ThinwireError, match="no file can have this name"):
                attempt(f"{tmp_path}/{name}")
    assert os.listdir(tmp_path) == ["made"]


def test_what_fills_a_file_may_fail_by_itself(tmp_path):
    with pytest.raises(ZeroDivisionError):
        files.write(tmp_path / "made", lambda file: file.write(b"x") // 0)
    assert os.listdir(tmp_path) == []
    files.check_writable(tmp_path / "new" / ("é" * 120))
    assert os.listdir(tmp_path / "new") == []


def test_what_a_killed_writer_leaves_is_found(tmp_path, monkeypatch):
    target = tmp_path / "made"
    monkeypatch.setattr(os, "unlink", lambda *_, **__: 1 / 0)  # it does not come to that
    with pytest.raises(ZeroDivisionError):
        files.write(target, lambda file: 1 / 0)
    monkeypatch.undo()
    assert [path.parent for path in files.leftovers(target)] == [tmp_path]
    assert not target.exists()
    assert not files.leftovers(tmp_path / "other")
