"""Files: read whole and bounded, written whole or not at all, and folders that one process has to itself."""

import errno
import glob
import hashlib
import json
import os
import socket
import stat
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from support.errors import UserError, quote

ROOT = Path(__file__).resolve().parent.parent  # of the project
MAX_TEXT_BYTES = 2**24  # of JSON, a vocabulary, predictions; the largest real one has half of it
MAX_DATA_BYTES = 2**28  # of a file of sentences; Quora has a tenth of it
HEAD_BYTES = 4096
LOCK_FILE = ".lock"
GIT_LFS_START = b"version https://git-lfs"


def is_regular(path: str | Path) -> bool:
    """Whether a path leads to a plain file; opening a pipe would wait for its other end.

    Raises:
        OSError: if there is nothing.
    """
    return stat.S_ISREG(os.stat(path).st_mode)


def read_bytes(path: str | Path, max_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """Read a whole file of moderate size.

    Raises:
        UserError: if it cannot be read, is no regular file or a Git LFS pointer, or has more than
            `max_bytes`.
    """
    try:
        if not is_regular(path):
            raise UserError(f"{path}: cannot be read (not a regular file)")
        with open(path, "rb") as file:
            contents = file.read(max_bytes + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if len(contents) > max_bytes:
        raise UserError(f"{path}: too large; expected at most {max_bytes // 2**20} MiB")
    refuse_pointer(contents, path)
    return contents


def refuse_pointer(start: bytes, path: str | Path) -> None:
    """Refuse the few lines that Git LFS leaves in place of a large file until that is fetched.

    Args:
        start: the file's first bytes.
    """
    if start.startswith(GIT_LFS_START):
        raise UserError(
            f"{path}: a Git LFS pointer, not yet the file itself; fetch that with 'git lfs pull', or download"
            " it by hand"
        )


def unique_keys(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object whose every key stands there once: which of two is meant cannot be known."""
    values = dict(pairs)
    if len(values) < len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {quote(twice)} stands there twice")
    return values


def read_json(path: str | Path) -> dict:
    """Read a JSON object.

    Raises:
        UserError: if it cannot be read, holds something else, or a key twice.
    """
    try:
        values = json.loads(read_bytes(path).decode("utf-8"), object_pairs_hook=unique_keys)
    except UserError:  # a ValueError too
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON file ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def default_mode() -> int:
    """The mode of a new file under this process's umask."""
    umask = os.umask(0o077)  # there is no way to ask for it without setting it
    os.umask(umask)
    return 0o666 & ~umask


def read_head(path: Path) -> bytes:
    """The first bytes of a file: enough to tell what wrote it."""
    with open(path, "rb") as file:
        return file.read(HEAD_BYTES)


def check_replaceable(path: Path, kind: str, is_own: Callable[[Path], bool], flag: str = "") -> None:
    """Make sure that writing to a path replaces nothing but what we have written there before.

    Whatever else lies there is somebody's: an input of this command, perhaps, or a link to one.

    Args:
        kind: of the file to be written, for messages.
        is_own: whether a file that is not empty is one of that kind.
        flag: that has named the path, if one has.

    Raises:
        UserError: if the path is taken by a folder, a dangling link or a file that is not ours, or cannot be
            written.
    """
    place = f"{flag} {path}".strip()
    if path.is_dir():
        raise UserError(f"{place}: is a folder; expected a file")
    if path.is_symlink() and not path.exists():
        raise UserError(f"{place}: is a link to {os.readlink(path)}, which does not exist")
    # Of links only those to our own files: /dev/stdout may be one to a file that is still empty.
    is_empty = path.exists() and not path.is_symlink() and not path.stat().st_size
    if path.exists() and not (is_regular(path) and (is_empty or is_own(path))):
        raise UserError(
            f"{place}: exists and is no {kind}; expected a new name, or an earlier {kind} to replace"
        )
    above = next((each for each in path.parents if os.path.lexists(each)), path.parent)
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{place}: {above} is no folder that can be written to; expected one")


@contextmanager
def naming(path: Path):
    """Name a path in a system's error that names none, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = str(path)
        raise


def is_at_work(process: str) -> bool:
    """Whether a process with this number is there."""
    try:
        os.kill(int(process), 0)
    except PermissionError:
        return True  # somebody else's
    except (OSError, ValueError, OverflowError):
        return False
    return True


@contextmanager
def whole_file(path: Path):
    """Let a file appear whole or not at all: yields another name beside it to write to, then renames.

    Of two processes that write the same file at once, each writes a whole one, and the last one's stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    here = f".{path.name}.{socket.gethostname()}"  # processes of other machines cannot be seen
    temporary = path.with_name(f"{here}.{os.getpid()}.unfinished")
    temporary.unlink(missing_ok=True)  # left by a kill; were it a link, we would write to wherever it points
    for left in path.parent.glob(f"{glob.escape(here)}.*.unfinished"):
        if not is_at_work(left.name.split(".")[-2]):
            with suppress(OSError):  # another user's, in a folder for all
                left.unlink()
    try:
        with naming(path):
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)  # there only if something failed


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with whole_file(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def sync(path: Path) -> None:
    """Ask the system to put a file or folder on disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def lock_folder(folder: Path):
    """Make a folder if need be, and keep other processes that ask for its lock out of it.

    The system gives the lock back when the process ends, however it ends.

    Raises:
        UserError: if another process works there, or the path is taken by a file.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder}: is a file; expected a folder")
    if folder.is_symlink() and not folder.exists():
        raise UserError(f"--output_dir {folder}: is a link to {os.readlink(folder)}, which does not exist")
    path = folder / LOCK_FILE
    lock = FileLock(path, on_acquired=write_holder)
    for tries_left in reversed(range(100)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=False)
            break
        except Timeout:
            raise UserError(
                f"--output_dir {folder}: in use by another run ({read_holder(path)!r}); wait for it, or"
                " give another folder"
            ) from None
        except (FileExistsError, FileNotFoundError):  # another process has just removed the empty folder
            if not tries_left:
                raise
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            print(f"warning: {folder}: cannot be locked ({error.strerror}); start no other run there")
            break
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # before the lock is given back: whoever waits for it then makes a new file
        lock.release()
        with suppress(OSError):
            folder.rmdir()  # goes only if nothing was written


def write_holder(descriptor: int) -> None:
    """Say in a lock file whose it is."""
    os.truncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())


def read_holder(path: Path) -> str:
    with suppress(OSError):
        return path.read_bytes()[:200].decode("utf-8", "replace").strip()
    return "unknown"
