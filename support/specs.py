"""A row of a table with its parameters, as text: `NAME` or `NAME:PARAM=VALUE,...`, as in `cagrad:c=0.4`.

Tables whose rows take parameters (gradient methods, loss weightings, samplers) have rows with a field
`params`. A flag's value is the text with all parameters spelled out, so that the settings that a run keeps
stay true when a default changes.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from support.command_line import FlagType, nearest, simplify

Row = TypeVar("Row")


@dataclass(frozen=True)
class Param:
    """A parameter of a row.

    Args:
        default: its value where none is given.
        type: what it may be, as `support.command_line.number` makes it.
        help: a few words, for --help.
    """

    default: float
    type: FlagType
    help: str


def parse_spec(text: str, table: Mapping) -> tuple[str, dict[str, float]]:
    """The row's name, and the values of all its parameters.

    Raises:
        ValueError: if there is no such row or parameter, or the value is out of its range; a full sentence.
    """
    name, _, listed = text.strip().partition(":")
    if name not in table:
        near = nearest(name, {simplify(row): row for row in table})
        hint = f"; did you mean {near}?" if near else ""
        raise ValueError(f"value is {text[:60]!r}; expected one of {', '.join(table)}{hint}")
    params = table[name].params
    values = {param: row.default for param, row in params.items()}
    given = [part.partition("=") for part in listed.split(",")] if listed else []
    for param, _, value in ((param.strip(), sign, value.strip()) for param, sign, value in given):
        if param not in params:
            expected = f"; expected {', '.join(params)}" if params else ""
            raise ValueError(f"{name} has no parameter {param[:60]!r}{expected}")
        try:
            values[param] = params[param].type(value)
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"{param} of {name}: {str(error)[:200]}") from None
    if len({param.strip() for param, _, _ in given}) < len(given):
        raise ValueError(f"value is {text[:60]!r}; expected each parameter once")
    return name, values


def find_row(text: str, table: Mapping[str, Row]) -> tuple[Row, dict[str, float]]:
    """The row itself, and the values of all its parameters."""
    name, params = parse_spec(text, table)
    return table[name], params


def format_spec(name: str, values: Mapping[str, float]) -> str:
    """What `parse_spec` reads, with every parameter: `cagrad:c=0.4`."""
    listed = ",".join(f"{param}={value:.12g}" for param, value in values.items())
    return f"{name}:{listed}" if listed else name


def spec_type(table: Mapping) -> FlagType:
    """The type of a flag that names a row of a table; its values are texts with all parameters."""

    def convert(text: str) -> str:
        try:
            return format_spec(*parse_spec(text, table))
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    def is_valid(value) -> bool:
        try:
            return isinstance(value, str) and value == convert(value)
        except argparse.ArgumentTypeError:
            return False

    metavar = "NAME[:PARAM=X,...]" if any(row.params for row in table.values()) else "NAME"
    return FlagType(convert, is_valid, f"one of {', '.join(table)}", metavar)


def describe_specs(table: Mapping) -> str:
    """The rows of a table for --help, with parameters, defaults and ranges."""
    texts = []
    for name, row in table.items():
        params = [f"{param}={each.default:g}: {each.help}" for param, each in row.params.items()]
        texts.append(f"{name} ({'; '.join(params)})" if params else name)
    return ", ".join(texts)
