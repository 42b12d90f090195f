"""Folders that one process has to itself: refused to others, and free again however their holder ended."""

import errno
import os
import subprocess
import sys

import pytest

from support import files
from support.errors import UserError
from support.files import ROOT, lock_folder

HOLD = """
import sys
from pathlib import Path
from support.files import lock_folder
with lock_folder(Path(sys.argv[1])):
    if sys.argv[2] == "fork":  # a child that outlives it
        import os, time
        if os.fork() == 0:
            time.sleep(60)
    print(os.getpid() if sys.argv[2] == "fork" else "held", flush=True)
    sys.stdin.read()
"""


def hold(folder, mode="alone"):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        text=True,
        start_new_session=True,
    )
    holder.stdout.readline()
    return holder


@pytest.mark.parametrize("mode", ["alone", "fork"])
def test_second_process_is_refused_and_a_dead_one_holds_nothing(tmp_path, mode):
    folder = tmp_path / "run"
    holder = hold(folder, mode)
    try:
        with (
            pytest.raises(UserError, match=f"in use by another run .'process {holder.pid} on "),
            lock_folder(folder),
        ):
            pass
        holder.kill()
        holder.wait()
        assert (folder / ".lock").exists()  # nobody could remove it
        with lock_folder(folder):
            (folder / "file").touch()
        assert [path.name for path in folder.iterdir()] == ["file"]
    finally:
        os.killpg(holder.pid, 9) if mode == "fork" else None


def test_lock_leaves_no_empty_folder(tmp_path):
    with lock_folder(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").exists()
    assert not (tmp_path / "run").exists()


def test_lock_of_a_file(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match="is a file; expected a folder"), lock_folder(tmp_path / "run"):
        pass


def test_file_system_without_locks_is_warned_about(tmp_path, monkeypatch, capsys):
    def acquire(*args, **options):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.FileLock, "acquire", acquire)
    with lock_folder(tmp_path / "run"):
        pass
    assert "cannot be locked (No locks available)" in capsys.readouterr().out


def test_many_processes_take_turns(tmp_path):
    """The file is removed by each holder: nobody may take a lock on a file that is gone."""
    code = """
import sys, time
from pathlib import Path
from support.errors import UserError
from support.files import lock_folder
folder, turns = Path(sys.argv[1]), 0
while turns < 20:
    try:
        with lock_folder(folder):
            (folder / "inside").touch(exist_ok=False)
            (folder / "inside").unlink()
            turns += 1
    except UserError:
        time.sleep(0.0005)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    processes = [subprocess.Popen(command, cwd=ROOT) for _ in range(3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
