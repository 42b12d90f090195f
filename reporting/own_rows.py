"""Rows of a results table from its command line, or from a file: `NAME: FLAGS`, one a line.

mgda: --grad_method mgda --para_head diff
# a comment
cagrad: --grad_method cagrad:c=0.4
"""

import argparse
import re
import shlex
from pathlib import Path

from reporting.poster import REGIMES, ROWS, TableRow
from support.errors import UserError
from support.files import read_bytes
from support.text_files import decode

NAME = re.compile(r"[a-z0-9][a-z0-9_.]*")  # it begins the names of run folders
OWN = "own"  # the group of these rows


def parse_row(text: str) -> tuple[str, str]:
    """A row's name and flags.

    Raises:
        ValueError: saying what is wrong with it.
    """
    name, colon, flags = (part.strip() for part in text.partition(":"))
    if not colon or not NAME.fullmatch(name):
        raise ValueError(f"row is {text[:80]!r}; expected NAME: FLAGS, the name of a-z, 0-9, _ and .")
    if name in ROWS or name.partition(".")[0] in REGIMES:
        raise ValueError(f"row {name} is one of the poster's; expected another name, or --rows {name}")
    try:
        words = shlex.split(flags)
    except ValueError as error:  # an open quotation mark
        raise ValueError(f"row {name}: {error}") from None
    if words and not words[0].startswith("--"):
        raise ValueError(f"row {name} has {words[0][:80]!r}; expected flags of multitask_classifier.py")
    return name, flags


def read_rows_file(path: Path) -> list[tuple[str, str]]:
    """The rows of a file.

    Raises:
        UserError: naming file and line.
    """
    found = []
    for number, line in enumerate(decode(read_bytes(path), path).splitlines(), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                found.append(parse_row(line))
            except ValueError as error:
                raise UserError(f"{path}:{number}: {error}") from None
    if not found:
        raise UserError(f"{path}: holds no row; expected lines NAME: FLAGS")
    return found


def own_rows(args: argparse.Namespace) -> dict[str, TableRow]:
    """The rows of --row and --row_file; each is compared with the first row of the table.

    Raises:
        UserError: if one is not a row, or two have the same name.
    """
    found = []
    for text in args.row:
        try:
            found.append(parse_row(text))
        except ValueError as error:
            raise UserError(f"--row: {error}") from None
    if args.row_file:
        found += read_rows_file(args.row_file)
    rows, first = {}, (args.rows or [name for name, _ in found[:1]] or [None])[0]
    for name, flags in found:
        if name in rows:
            raise UserError(f"row {name} is given twice; expected each name once")
        rows[name] = TableRow(name, flags, versus=None if name == first else first, group=OWN)
    return rows
