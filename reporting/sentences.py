"""Sentences from a file or pipe of any length, a chunk at a time: lines, tab-separated pairs, or a table."""

from collections.abc import Iterator
from itertools import chain
from typing import BinaryIO

from config import TaskSpec
from datasets import clean_text, table_rows
from support.errors import UserError, one_line, quote
from support.files import refuse_pointer
from support.text_files import decode

CHUNK_EXAMPLES = 4096  # enough of them to sort by length
CHUNK_CHARACTERS = 2**22  # of long texts fewer
MAX_LINE_BYTES = 2**20
DELIMITERS = ("\t", ",")

Example = tuple[int, tuple[str, ...]]  # the line where it begins, and its clean sentences: one, or two


def text_lines(stream: BinaryIO, name: str) -> Iterator[str]:
    """The lines of a stream, with their ends.

    Raises:
        UserError: naming the line, for what is no UTF-8 text, and for a line without an end.
    """
    number = 0
    while raw := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if number == 1:
            refuse_pointer(raw, name)
        line = decode(raw, name, number)  # before its length is looked at: a zip archive may have no line end
        if len(raw) > MAX_LINE_BYTES:
            raise UserError(
                f"{name}:{number}: a line of more than {MAX_LINE_BYTES} bytes; expected a sentence"
            )
        yield line


def find_delimiter(line: str, columns: tuple[str, ...]) -> str | None:
    """What separates the columns of a table, if a file's first line is the header of one; else None."""
    for delimiter in DELIMITERS:
        names = [name.strip().strip('"') for name in line.split(delimiter)]
        if set(columns) <= set(names):
            return delimiter
    return None


def read_examples(
    stream: BinaryIO, name: str, spec: TaskSpec, columns: tuple[str, ...] | None = None
) -> Iterator[Example]:
    """The examples of a stream, in order.

    A first line that names the text columns makes it a table, separated by tabs or commas. Otherwise each
    line is a sentence or, for a task of pairs, two with a tab between them.

    Args:
        name: of the stream, for messages.
        columns: names of the text columns; given, there has to be a header. None: the task's own.

    Raises:
        UserError: naming the line, for a row or line of another form.
    """
    lines = text_lines(stream, name)
    first = next(lines, None)
    if first is None:
        raise UserError(f"{name}: is empty; expected sentences")
    wanted = columns or spec.text_columns
    delimiter = find_delimiter(first, wanted)
    if delimiter:
        yield from read_table(chain([first], lines), name, wanted, delimiter)
        return
    if columns or name.lower().endswith(".csv"):
        raise UserError(
            f"{name}:1: header is {one_line(first, 60)!r}; expected the columns {' and '.join(wanted)},"
            " separated by tabs or commas"
            + (
                ""
                if columns
                else " (--columns takes other names; lines without a header need another ending)"
            )
        )
    for number, line in enumerate(chain([first], lines), start=1):
        sentences = line.rstrip("\r\n").split("\t")
        if len(sentences) != len(wanted):
            expected = "two sentences with a tab between them" if spec.is_pair else "a sentence without a tab"
            raise UserError(f"{name}:{number}: line is {quote(line)}; expected {expected}")
        yield number, tuple(map(clean_text, sentences))


def read_table(
    lines: Iterator[str], name: str, columns: tuple[str, ...], delimiter: str
) -> Iterator[Example]:
    """The rows of a table whose header is its first line; columns are found by name."""
    table = table_rows(lines, name, delimiter)
    _, header = next(table)
    header = [column.strip() for column in header]
    for column in columns:
        if header.count(column) != 1:
            found = "two columns" if column in header else "no column"
            raise UserError(f"{name}:1: {found} {column!r}; expected one")
    places = [header.index(column) for column in columns]
    for number, fields in table:
        if not max(places) < len(fields) <= len(header):
            raise UserError(
                f"{name}:{number}: {len(fields)} fields; expected {len(header)}, as in the header (a sentence"
                " that holds the separator stands in quotation marks)"
            )
        yield number, tuple(clean_text(fields[place]) for place in places)


def in_chunks(examples: Iterator[Example]) -> Iterator[list[Example]]:
    """Examples by the thousand, so that a file of any length takes no more memory than one chunk."""
    chunk, size = [], 0
    for example in examples:
        chunk.append(example)
        size += sum(map(len, example[1]))
        if len(chunk) == CHUNK_EXAMPLES or size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
