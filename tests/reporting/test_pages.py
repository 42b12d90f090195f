"""Whatever text a page shows comes out as it went in, in Markdown and in HTML; commands can be pasted."""

import shlex

import pytest

from reporting import pages
from reporting.pages import HTML, MARKDOWN, Table, command_line
from support.files import ROOT
from tests.reporting.read_pages import NASTY, HtmlPage, markdown_rows, plain


@pytest.mark.parametrize("text", [NASTY, "two\nlines | here", "# 1 \\| 2 `", "***", "macro_f1", "<b>x</b>"])
def test_any_text_comes_out_as_it_went_in(text):
    spaced = " ".join(text.split())
    # What a template inserts is escaped without being asked.
    assert plain(MARKDOWN.from_string("{{ text }}").render(text=text)) == spaced
    table = MARKDOWN.from_string("{{ table | table }}").render(table=Table(["h"], [[text]]))
    assert markdown_rows(table) == [["h"], [spaced]]
    page = HtmlPage(HTML.from_string('<p>{{ text }}</p><img alt="{{ text }}">').render(text=text))
    assert page.text == text and page.tags == ["p", "img"]


def test_code_cannot_be_closed_by_its_text():
    text = "python x.py '```\n\n</pre> | y'"
    shown = MARKDOWN.from_string("{{ text | code }}").render(text=text)
    assert shown == pages.code(text) and all(line.startswith("    ") for line in shown.split("\n"))
    assert HtmlPage(HTML.from_string("<pre>{{ text }}</pre>").render(text=text)).text == text


def test_command_can_be_pasted_in_the_projects_folder():
    for script, shown in {
        "multitask_classifier.py": ["multitask_classifier.py"],
        "/home/someone/code/multitask_classifier.py": ["multitask_classifier.py"],
        # What `python -m` leaves in sys.argv, on this machine and on another.
        str(ROOT / "training" / "pretrain_mlm.py"): ["-m", "training.pretrain_mlm"],
        "/home/someone/new folder ü/benchmarks/speed.py": ["-m", "benchmarks.speed"],
    }.items():
        command = shlex.split(command_line([script, "--data_dir", "my data"]))
        assert command == ["python", *shown, "--data_dir", "my data"]
