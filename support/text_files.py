"""Text files as users have them: saved in another encoding, packed, damaged, or not a file at all."""

import stat
from pathlib import Path

from support.errors import UserError
from support.files import MAX_DATA_BYTES, read_bytes

UTF_16 = "UTF-16; save it as UTF-8"
# How files begin that are not UTF-8 text.
FILE_STARTS = {
    b"\x1f\x8b": "a gzip archive; unpack it",
    b"PK\x03\x04": "a zip archive or a spreadsheet; unpack it, or export it as tab-separated text",
    b"BZh": "a bzip2 archive; unpack it",
    b"\xfd7zXZ\x00": "an xz archive; unpack it",
    b"\xff\xfe": UTF_16,
    b"\xfe\xff": UTF_16,
}
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_data_file(path: Path) -> bytes:
    """The contents of a file of sentences.

    Raises:
        UserError: for a file that is missing, too large or unreadable; for a folder; and for a pipe or
            device, where `open` or `read` might wait forever.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; 'make data' downloads the course's files into data/, and '--data_dir"
            " data/sample' takes the sample that comes with the project"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(mode):
        kind = "folder" if stat.S_ISDIR(mode) else "pipe or device"
        raise UserError(f"{path}: is a {kind}; expected a file")
    return read_bytes(path, MAX_DATA_BYTES)


def line_at(raw: bytes, offset: int) -> int:
    """The number of the line that a byte is in."""
    before = raw[:offset]
    return 1 + before.count(b"\n") + before.count(b"\r") - before.count(b"\r\n")


def decode(raw: bytes, path: str | Path, line: int = 1) -> str:
    """The text of a file, or of a part of it that begins with a line's beginning.

    Args:
        line: the number of that line.

    Raises:
        UserError: for NUL bytes and for anything but UTF-8, naming the line.
    """
    for start, kind in FILE_STARTS.items():
        if line == 1 and raw.startswith(start):
            raise UserError(f"{path}: looks like {kind}")
    nul = raw.find(b"\0")
    if nul >= 0:
        even, odd = (raw[n:1000:2].count(0) for n in (0, 1))
        if (not even or not odd) and max(even, odd) > len(raw[:1000]) / 4:  # every other byte
            raise UserError(f"{path}: looks like {UTF_16}")
        raise UserError(
            f"{path}:{line - 1 + line_at(raw, nul)}: a NUL byte; expected text, so the file may be damaged"
        )
    try:
        return raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        bad, place = raw[error.start], f"{path}:{line - 1 + line_at(raw, error.start)}"
        raise UserError(f"{place}: not UTF-8 text (byte 0x{bad:02x}); save the file as UTF-8") from None
