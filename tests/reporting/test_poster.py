"""The rows and claims are the poster's: its overalls and the sizes of its claims follow from the rows."""

import pytest

from config import DEFAULT_TASKS
from evaluation import OVERALLS
from reporting.poster import CLAIMS, POSTER_TEST, ROWS, SCORES, difference
from reporting.table_pages import claimed_value, named_scores, poster_scores
from training.flags import get_args
from training.resolve import flags_without_effect

OVERALL = {  # of the poster's rows; it has one more, with sentiment alone, and the test set's
    "baseline": 0.511,
    "cosine": 0.546,
    "diff": 0.615,
    "diff_2_layers": 0.605,
    "diff_extra": 0.582,
    "surgery_diff": 0.648,
    "surgery_diff_extra": 0.638,
}
CLAIMED = {  # from the poster's numbers, to three decimals
    "1": 0.615 - 0.511,
    "2a": 0.655 - 0.529,
    "2b": (0.513 - 0.520 + 0.776 - 0.795) / 2,
    "3a": 0.546 - 0.615,
    "3b": 0.582 - 0.615,
    "3c": 0.638 - 0.648,
    "4": (0.479 - 0.520 + 0.781 - 0.795) / 2,
    "5a": 0.04,
    "5b": 0.04 - (0.655 - 0.274 - 0.04),
    "6": 0.605 - 0.615,
}
CHANGES = {  # the flags in which a row differs from its `versus`
    "minbert": {"tasks", "para_head", "sts_head", "grad_method"},
    "cosine": {"para_head", "sts_head"},
    "diff": {"para_head", "sts_head"},
    "diff_2_layers": {"head_layers"},
    "diff_extra": {"extra_data"},
    "surgery_diff": {"grad_method"},
    "surgery_diff_extra": {"extra_data"},
    "surgery_sts_only": {"surgery_tasks"},
    "sts_weighted": {"task_weights"},
    "similar_data": {"extra_data"},
    "further_pretraining": set(),
    "baseline_untuned": {"lr", "head_lr", "schedule", "warmup_ratio", "weight_decay", "clip_norm"},
}


# --- rows -------------------------------------------------------------------------------------------------


def test_poster_rows_and_their_numbers():
    """Every overall of the poster is the plain mean of its scores: a typing error would show in it."""
    found = {row: poster_scores(row) for row, spec in ROWS.items() if spec.poster}
    assert found.pop("minbert") == {"sst": 0.528}
    assert {row: round(scores["mean"], 3) for row, scores in found.items()} == OVERALL
    assert POSTER_TEST == (0.510, 0.775, 0.634) and round(named_scores(POSTER_TEST)["mean"], 3) == 0.640
    assert set(SCORES) == {*DEFAULT_TASKS, *OVERALLS} and poster_scores("sts_weighted") == {}
    assert found["baseline"]["mean_2024"] == pytest.approx((0.479 + 0.781 + (1 + 0.274) / 2) / 3)
    assert all((spec.poster is not None) == (spec.group == "poster") for spec in ROWS.values())
    assert len({spec.title for spec in ROWS.values()}) == len(ROWS)  # figures go by title


def test_a_row_changes_one_thing_of_the_row_it_is_compared_with_and_no_flag_is_without_effect():
    all_args = {row: get_args(spec.flags.split()) for row, spec in ROWS.items()}
    assert [row for row, args in all_args.items() if flags_without_effect(args)] == []
    assert set(CHANGES) == set(ROWS) - {"baseline"}
    for row, changes in CHANGES.items():
        given, before = all_args[row].given, all_args[ROWS[row].versus].given
        assert {name for name in {*given, *before} if given.get(name) != before.get(name)} == changes
        assert ROWS[row].pretrain == (not changes)
    # And what it changes it to; the baseline itself has concat heads and the plain sum.
    baseline, head_2_layers = all_args["baseline"], all_args["diff_2_layers"].head_layers
    assert (baseline.para_head, baseline.sts_head, baseline.grad_method) == ("concat", "concat", "sum")
    assert (all_args["minbert"].tasks, all_args["surgery_sts_only"].surgery_tasks) == (("sst",), ("sts",))
    assert all_args["sts_weighted"].task_weights == {"sts": 3} and head_2_layers == 2
    for row in ("cosine", "diff"):
        assert all_args[row].para_head == all_args[row].sts_head == row
    for row, args in all_args.items():
        surgery = row.startswith("surgery") or ROWS[row].group == "future"
        assert row == "minbert" or args.grad_method == ("pcgrad" if surgery else "sum")
    assert all_args["diff_extra"].extra_data == all_args["surgery_diff_extra"].extra_data


# --- claims -----------------------------------------------------------------------------------------------


def test_claims_are_about_rows_that_exist_and_hold_on_the_poster():
    assert [claim.number for claim in CLAIMS] == list(CLAIMED)
    # Less than 5 points below diff, less than 5 points gained.
    assert {claim.number: claim.margin for claim in CLAIMS if claim.margin} == {"4": -0.05, "5a": 0.05}
    for claim in CLAIMS:
        for factor, row, score in claim.terms:
            assert row in ROWS and score in SCORES and factor
        assert claim.direction in (1, -1) and claim.text
        assert sum(factor for factor, _, _ in claim.terms) == pytest.approx(0)  # differences
        assert claimed_value(claim) == pytest.approx(CLAIMED[claim.number], abs=1e-3)  # overalls are rounded
        assert (claimed_value(claim) - claim.margin) * claim.direction > 0


def test_terms_of_claims():
    """Claim 5b holds what hyper-parameters give against what diff and surgery do.

    (baseline - untuned) - (surgery - baseline).
    """
    assert difference("a", "b", "sts") == ((1, "a", "sts"), (-1, "b", "sts"))
    plus, minus = (0.5, "a", "sst"), (-0.5, "b", "para")
    assert difference("a", "b", "sst", "para") == (plus, (0.5, "a", "para"), (-0.5, "b", "sst"), minus)
    terms = next(claim.terms for claim in CLAIMS if claim.number == "5b")
    values = {"baseline": 0.5, "baseline_untuned": 0.375, "surgery_diff": 0.75}
    assert sum(factor * values[row] for factor, row, _ in terms) == 0.125 - 0.25
    assert {score for _, _, score in terms} == {"sts"}
