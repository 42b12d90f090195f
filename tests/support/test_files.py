"""support.files: JSON and bytes are read or refused in one line; text is written whole or not at all; and
folders that one process has to itself are refused to others, and free again however their holder ended.
"""

import errno
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from support import files
from support.errors import UserError
from support.files import ROOT, check_replaceable, lock_folder, read_bytes, read_head, read_json, write_text
from support.text_files import read_data_file


def link_to(target):
    return lambda path: path.symlink_to(target)


def message_of(function, *args):
    """What a function tells the user is wrong."""
    with pytest.raises(UserError) as caught:
        function(*args)
    return str(caught.value)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "No such file or directory"),
        (Path.mkdir, "not a regular file"),
        (os.mkfifo, "not a regular file"),
        (link_to("/dev/zero"), "not a regular file"),
        (link_to("file.json"), "Too many levels of symbolic links"),
    ],
)
def test_what_is_no_file_is_refused_at_once(tmp_path, make, reason):
    path = tmp_path / "file.json"
    make(path)
    for read in (read_json, read_bytes):
        assert message_of(read, path) == f"{path}: cannot be read ({reason})"


BAD_JSON = {
    "empty": (b"", "not a JSON file"),
    "cut off": (b'{"a": 24', "not a JSON file"),
    "not UTF-8": (b'\xff{"a": 24}', "not a JSON file"),
    "deeply nested": (b"[" * 100_000, "not a JSON file"),
    "number of 5000 digits": (b'{"a": ' + b"9" * 5000 + b"}", "not a JSON file (Exceeds the limit"),
    "list": (b"[]", "expected a JSON object, found list"),
    "key twice": (b'{"a": 1, "b": 2, "a": 1}', "not a JSON file (the key 'a' stands there twice)"),
    "inner key twice": (b'{"a": [{"b": 1, "b": 1}]}', "not a JSON file (the key 'b' stands there twice)"),
    "huge": (b" " * 2**24 + b"{}", "too large; expected at most 16 MiB"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_bad_json(tmp_path, case):
    contents, expected = BAD_JSON[case]
    path = tmp_path / "file.json"
    path.write_bytes(contents)
    message = message_of(read_json, path)
    assert message.startswith(f"{path}: {expected}") and message.isprintable() and len(message) < 400


def test_git_lfs_pointer_is_called_one(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4f\nsize 438\n")
    for read in (read_bytes, read_json, read_data_file):
        assert f"{path}: a Git LFS pointer, not yet the file itself; fetch that" in message_of(read, path)


def test_write_text_makes_folders_and_keeps_line_ends(tmp_path):
    path = tmp_path / "deep" / "deeper" / "file.csv"
    write_text(path, "a\nna\u00efve\r\n")
    assert path.read_bytes() == b"a\nna\xc3\xafve\r\n"
    assert [file.name for file in path.parent.iterdir()] == ["file.csv"]


def test_write_text_leaves_the_old_file_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "file.csv"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half of the text \ud800")  # a lone surrogate: no UTF-8 can hold it
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]

    def fail(*args):
        raise OSError(errno.ENOSPC, "disk full")  # as `write` does, without a file's name

    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full") as caught:
            patch.setattr(os, function, fail)
            write_text(path, "next")
        assert caught.value.filename == str(path) and path.read_text() == "old"


TAKEN = [
    (lambda path: path.write_text("id\tsentence\n"), "exists and is no page; expected"),
    (Path.mkdir, "is a folder; expected a file"),
    (os.mkfifo, "exists and is no page; expected a new name, or an earlier page to replace"),
    (link_to("data.csv"), "exists and is no page; expected"),
    (link_to("/dev/null"), "exists and is no page; expected"),
    (link_to("absent"), "is a link to absent, which does not exist"),
    (link_to("empty"), "exists and is no page; expected"),  # /dev/stdout may be one
]
FREE = [lambda path: None, Path.touch, lambda path: path.write_text("# Page\n"), link_to("page.md")]


@pytest.mark.parametrize(("make", "message"), [*TAKEN, *((make, None) for make in FREE)])
def test_only_our_own_files_are_replaced(tmp_path, make, message):
    (tmp_path / "data.csv").write_text("id\tsentence\n")
    (tmp_path / "page.md").write_text("# Page\n")
    (tmp_path / "empty").touch()
    path = tmp_path / "output"
    make(path)
    check = partial(check_replaceable, path, "page", lambda path: read_head(path).startswith(b"# Page"))
    if message is None:
        check()
    else:
        assert message_of(check, "--output").startswith(f"--output {path}: {message}")
    assert "page.md is no folder" in message_of(
        check_replaceable, tmp_path / "page.md" / "a" / "b", "page", bool
    )


# --- the lock -------------------------------------------------------------------------------------

HOLD = """
import os, sys, time
from pathlib import Path
from support.files import lock_folder
with lock_folder(Path(sys.argv[1])):
    if sys.argv[2] == "alone" or os.fork() == 0:  # a child outlives the holder
        print("ready", flush=True)  # by the child: only now is all done that a fork does in it
        time.sleep(60)
    os.waitpid(-1, 0)
"""


@pytest.mark.parametrize("mode", ["alone", "fork"])
def test_second_process_is_refused_and_a_dead_one_holds_nothing(tmp_path, mode):
    folder = tmp_path / "run"
    command, options = (
        [sys.executable, "-c", HOLD, str(folder), mode],
        {"cwd": ROOT, "start_new_session": True},
    )
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, **options)
    holder.stdout.readline()
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


def test_lock_of_a_folder_without_files_and_of_a_file(tmp_path):
    with lock_folder(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").exists()
    assert not (tmp_path / "run").exists()
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
