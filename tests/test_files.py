"""Files that belong together: killed or failing at any moment, the one that reads the others never reads wrong ones."""

import os
from pathlib import Path

import pytest

from mar_fast.files import may_write, write_whole, write_whole_files, write_whole_folder

OLD, NEW = {"model": "old", "data": "old data"}, {"model": "new", "data": "new data"}
RENAMES = 4  # both out of the way, both in place


def fill(folder):
    for name, text in NEW.items():
        (folder / name).write_text(text)


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("step", range(1, RENAMES + 2))
@pytest.mark.parametrize("how", ["killed", "failing"])
def test_at_every_rename(tmp_path, monkeypatch, how, step):
    for name, text in OLD.items():
        (tmp_path / name).write_text(text)
    paths, done, rename = [tmp_path / "data", tmp_path / "model"], [], Path.rename

    def counted(path, target):
        done.append(target)
        if len(done) == step:
            if how == "killed":
                os._exit(9)
            raise OSError("no more")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", counted)
    if how == "killed":
        child = os.fork()
        if not child:
            write_whole_files(paths, fill)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (9 if step <= RENAMES else 0)
        found = contents(tmp_path)
        assert found == OLD if step == 1 else "model" not in found or found == NEW
    elif step <= RENAMES:
        with pytest.raises(OSError, match="no more"):
            write_whole_files(paths, fill)
        assert contents(tmp_path) == OLD and len(list(tmp_path.iterdir())) == 2
    else:
        write_whole_files(paths, fill)
        assert contents(tmp_path) == NEW and len(list(tmp_path.iterdir())) == 2


def test_new_files_and_an_error(tmp_path):
    paths = [tmp_path / "deeper" / name for name in ("data", "model")]

    def half(folder):
        (folder / "data").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole_files(paths, half)
    assert not list(paths[0].parent.iterdir())
    write_whole_files(paths, fill)
    assert contents(paths[0].parent) == NEW and len(list(paths[0].parent.iterdir())) == 2


def test_modes_are_those_of_new_files(tmp_path):
    """Though safetensors writes files that only their owner may read."""

    def private(path):
        path.write_text("")
        path.chmod(0o600)

    write_whole(tmp_path / "one", private)
    write_whole_files([tmp_path / "data", tmp_path / "model"], lambda folder: [private(folder / n) for n in NEW])
    write_whole_folder(tmp_path / "folder", lambda folder: private(folder / "model"))
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "file").touch()
    modes = {path.stat().st_mode for path in tmp_path.rglob("*")}
    assert modes == {(tmp_path / "plain").stat().st_mode, (tmp_path / "plain" / "file").stat().st_mode}


def test_a_pipe_or_a_device_is_not_replaced(tmp_path):
    """--out /dev/null, as root."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(FileExistsError, match="got a device or a pipe, expected a file name"):
            may_write([path], force=True)
