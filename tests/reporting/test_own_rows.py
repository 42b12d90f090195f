"""reporting/own_rows.py: rows of one's own, from the command line and a file, and how they are refused."""

import re
import shlex

import pytest

from reporting.own_rows import OWN, parse_row, read_rows_file
from reporting.poster import ROWS
from reporting.table import get_args
from support.errors import UserError
from support.files import ROOT
from tests.tiny import refusal
from training.flags import get_args as get_run_args
from training.resolve import flags_without_effect

MGDA = ["--row", "mgda: --grad_method mgda --para_head diff"]


def test_rows_come_from_both_and_are_compared_with_the_first(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("\n# two methods\ncagrad.2: --grad_method cagrad:c=0.2\n  uw:--loss_weighting uw\n")
    args = get_args([*MGDA, "--row_file", str(path), "--", "--lr", "3e-5"])
    assert args.rows == ["mgda", "cagrad.2", "uw"]
    assert [args.specs[row].versus for row in args.rows] == [None, "mgda", "mgda"]
    assert {args.specs[row].group for row in args.rows} == {OWN}
    assert args.specs["cagrad.2"].flags == "--grad_method cagrad:c=0.2"
    args = get_args(["--rows", "diff", "baseline", *MGDA])
    assert args.rows == ["diff", "baseline", "mgda"] and args.specs["mgda"].versus == "diff"
    assert get_args([]).rows == list(ROWS)


def test_rows_of_recipe_best_can_be_read():
    """Each is the recipe, with something else in it."""
    args = get_args(["--row_file", str(ROOT / "docs" / "recipe_rows.txt")])
    flags = {row: spec.flags for row, spec in args.specs.items() if spec.group == OWN}
    assert next(iter(flags)) == "best" and all(each.startswith("--recipe best") for each in flags.values())
    assert len(set(flags.values())) == len(flags)
    runs = {row: get_run_args(shlex.split(each)) for row, each in flags.items()}
    assert {row: found for row, run in runs.items() if (found := flags_without_effect(run))} == {}


def test_flags_for_all_runs_are_those_in_which_rows_do_not_differ(capsys):
    assert get_args([*MGDA, "--", "--sts_head", "cosine"]).shared.run_flags == ["--sts_head", "cosine"]
    for argv, message in (
        ([*MGDA, "--", "--para_head", "cosine"], "rows of the table differ in it"),
        ([*MGDA, "--rows", "diff", "--", "--sts_head", "cosine"], "rows of the table differ in it"),
        (["--row", "a: --seed 3"], "row a has --seed, but the table gives it itself"),
        (["--row", "a: --grad_method nothing"], "--grad_method: value is 'nothing'"),
        ([*MGDA, "--compare", "mgda", "other"], "--compare: value is 'other'"),
    ):
        with pytest.raises(SystemExit) as end:
            get_args(argv)
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.count("\n") == 1 and message in error


BAD_ROWS = {
    "mgda": "row is 'mgda'; expected NAME: FLAGS",
    "a/b: --lr 1": "row is 'a/b: --lr 1'; expected NAME: FLAGS",
    "diff: --lr 1": "row diff is one of the poster's",
    "a: lr 1": "row a has 'lr'; expected flags",
    "a: --lr '1": "row a: No closing quotation",
}


@pytest.mark.parametrize("text", BAD_ROWS)
def test_bad_rows_are_refused_by_name_and_line(text, tmp_path):
    with pytest.raises(ValueError, match=re.escape(BAD_ROWS[text])):
        parse_row(text)
    (tmp_path / "rows").write_text(f"good: --lr 1\n{text}\n")
    assert refusal(read_rows_file, tmp_path / "rows").startswith(f"{tmp_path / 'rows'}:2: row ")
    assert refusal(get_args, ["--row", text]).startswith("--row: row ")


def test_files_without_rows_and_names_given_twice_are_refused(tmp_path):
    (tmp_path / "rows").write_text("# nothing\n")
    assert "holds no row" in refusal(read_rows_file, tmp_path / "rows")
    with pytest.raises(UserError, match="row mgda is given twice"):
        get_args([*MGDA, *MGDA])


def test_the_rows_of_all_methods_are_rows():
    args = get_args(["--row_file", str(ROOT / "docs" / "methods.rows")])
    runs = {row: get_run_args(shlex.split(args.specs[row].flags)) for row in args.rows}
    assert args.rows[0] == "sum" and not any(flags_without_effect(run) for run in runs.values())
