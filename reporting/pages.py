"""Pages made from jinja2 templates, in Markdown and in HTML.

The templates lie beside this file, in templates/. Whatever they insert is escaped for their format, so a
sentence from a data file can neither break a table nor bring a script along.
"""

import re
import shlex
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from support.files import ROOT


class Table(NamedTuple):
    """A table of a page: the cells are plain text."""

    header: Sequence[str]
    rows: Iterable[Sequence[str]]


# --- pieces of Markdown -----------------------------------------------------------------------------------


def paragraph(text: str) -> str:
    """Text that reads the same in Markdown, whether in a paragraph or in a cell of a table."""
    # An underscore inside a word does not start emphasis.
    return re.sub(r"([\\`*\[\]<>|#~&$]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(map(paragraph, row)) + " |" for row in (header, *rows)]
    return "\n".join([lines[0], "|" + " --- |" * len(header), *lines[1:]])


def code(text: str) -> str:
    # Indented, blank lines included, a block needs no fence that its own text could close.
    return textwrap.indent(text, "    ", lambda line: True)


# --- templates --------------------------------------------------------------------------------------------


def make_environment(**settings) -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **settings,
    )


HTML = make_environment()
# `finalize` escapes for Markdown, and what is marked as safe is left alone by the HTML escaping that follows.
MARKDOWN = make_environment(
    finalize=lambda value: value if isinstance(value, Markup) else Markup(paragraph(value))
)
MARKDOWN.filters["table"] = lambda value: Markup(table(*value))
MARKDOWN.filters["code"] = lambda text: Markup(code(text))


def render_html(name: str, **values) -> str:
    return HTML.get_template(name).render(values) + "\n"


def render_markdown(name: str, **values) -> str:
    """Fill in a template; where parts of it are left out, no more than one blank line stays."""
    return re.sub(r"\n{3,}", "\n\n", MARKDOWN.get_template(name).render(values)).strip("\n") + "\n"


# --- what several pages show ------------------------------------------------------------------------------


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def command_line(argv: Sequence[str]) -> str:
    """A recorded `sys.argv` as a command for a terminal in the project's folder.

    `python -m package.module` leaves the module's path in `argv[0]`, which cannot be started by that path.
    """
    script = Path(argv[0])
    if (ROOT / script.parent.name / "__init__.py").exists():
        return shlex.join(["python", "-m", f"{script.parent.name}.{script.stem}", *argv[1:]])
    return shlex.join(["python", script.name, *argv[1:]])
