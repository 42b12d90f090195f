"""The rows and claims are those of the poster, whose numbers stand here a second time."""

import pytest

from config import DEFAULT_TASKS
from evaluation import OVERALLS
from reporting.poster import CLAIMS, POSTER_TEST, ROWS, SCORES, difference
from reporting.table_pages import claimed_value, named_scores, poster_scores
from training.flags import get_args
from training.resolve import flags_without_effect

POSTER = {  # title: overall, sentiment, paraphrase, similarity
    "minBERT (sentiment alone)": (None, 0.528, None, None),
    "Baseline": (0.511, 0.479, 0.781, 0.274),
    "Cosine similarity": (0.546, 0.503, 0.722, 0.412),
    "Diff": (0.615, 0.520, 0.795, 0.529),
    "Diff + 2 dense layers": (0.605, 0.497, 0.787, 0.531),
    "Diff + additional data": (0.582, 0.462, 0.782, 0.502),
    "Gradient surgery + diff": (0.648, 0.513, 0.776, 0.655),
    "Gradient surgery + diff + additional data": (0.638, 0.498, 0.777, 0.639),
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
UNTUNED = {"lr", "head_lr", "schedule", "warmup_ratio", "weight_decay", "clip_norm"}
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
    "baseline_untuned": UNTUNED,
}


# --- rows -------------------------------------------------------------------------------------------------


def test_poster_rows_and_their_numbers():
    found = {spec.title: spec.poster for spec in ROWS.values() if spec.poster}
    assert list(found.items()) == [(title, numbers[1:]) for title, numbers in POSTER.items()]
    for row, spec in ROWS.items():  # every overall is the plain mean of its scores
        if spec.poster:
            overall = poster_scores(row).get("mean")
            assert (None if overall is None else round(overall, 3)) == POSTER[spec.title][0]
    assert POSTER_TEST == (0.510, 0.775, 0.634) and round(named_scores(POSTER_TEST)["mean"], 3) == 0.640


def test_scores_of_a_row():
    assert set(SCORES) == {*DEFAULT_TASKS, *OVERALLS}
    assert poster_scores("minbert") == {"sst": 0.528}
    assert poster_scores("sts_weighted") == {}
    expected = {"sst": 0.479, "para": 0.781, "sts": 0.274, "mean": (0.479 + 0.781 + 0.274) / 3}
    expected["mean_2024"] = (0.479 + 0.781 + (1 + 0.274) / 2) / 3
    assert poster_scores("baseline") == pytest.approx(expected)


def test_groups():
    """Eight rows of the poster, its four future steps, which it has no numbers for, and our control."""
    groups = [spec.group for spec in ROWS.values()]
    assert {group: groups.count(group) for group in groups} == {"poster": 8, "future": 4, "control": 1}
    assert all((spec.poster is not None) == (spec.group == "poster") for spec in ROWS.values())
    assert [row for row, spec in ROWS.items() if spec.pretrain] == ["further_pretraining"]
    assert len({spec.title for spec in ROWS.values()}) == len(ROWS)  # figures go by title
    assert [row for row, spec in ROWS.items() if spec.versus is None] == ["baseline"]
    assert set(CHANGES) == set(ROWS) - {"baseline"}


@pytest.mark.parametrize("row", ROWS)
def test_flags_are_known_and_have_an_effect(row):
    assert flags_without_effect(get_args(ROWS[row].flags.split())) == []


@pytest.mark.parametrize("row", CHANGES)
def test_a_row_changes_one_thing_of_the_row_it_is_compared_with(row):
    given, before = (get_args(ROWS[name].flags.split()).given for name in (row, ROWS[row].versus))
    assert {name for name in given | before if given.get(name) != before.get(name)} == CHANGES[row]
    assert CHANGES[row] or ROWS[row].pretrain


def test_settings_of_the_recipes():
    given = {row: get_args(spec.flags.split()).given for row, spec in ROWS.items()}
    heads = {
        "minbert": None,
        "baseline": "concat",
        "baseline_untuned": "concat",
        "cosine": "cosine",
    }
    for row, flags in given.items():
        assert flags.get("para_head") == flags.get("sts_head") == heads.get(row, "diff")
        pcgrad = row.startswith("surgery") or ROWS[row].group == "future"
        assert flags.get("grad_method") == (None if row == "minbert" else "pcgrad" if pcgrad else "sum")
    assert given["minbert"]["tasks"] == ("sst",)
    assert given["surgery_sts_only"]["surgery_tasks"] == ("sts",)
    assert given["sts_weighted"]["task_weights"] == {"sts": 3}
    assert given["diff_2_layers"]["head_layers"] == 2
    assert given["diff_extra"]["extra_data"] == given["surgery_diff_extra"]["extra_data"]


# --- claims -----------------------------------------------------------------------------------------------


def test_every_claim_of_the_poster_has_a_line():
    assert [claim.number for claim in CLAIMS] == list(CLAIMED)
    # Less than 5 points below diff, less than 5 points gained.
    assert {claim.number: claim.margin for claim in CLAIMS if claim.margin} == {"4": -0.05, "5a": 0.05}


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.number)
def test_a_claim_is_about_rows_that_exist_and_holds_on_the_poster(claim):
    for factor, row, score in claim.terms:
        assert row in ROWS and score in SCORES and factor
    assert claim.direction in (1, -1) and claim.text
    assert sum(factor for factor, _, _ in claim.terms) == pytest.approx(0)  # differences
    assert claimed_value(claim) == pytest.approx(CLAIMED[claim.number], abs=1e-3)  # overalls are rounded
    assert (claimed_value(claim) - claim.margin) * claim.direction > 0


def test_difference():
    assert difference("a", "b", "sts") == ((1, "a", "sts"), (-1, "b", "sts"))
    plus, minus = (0.5, "a", "sst"), (-0.5, "b", "para")
    assert difference("a", "b", "sst", "para") == (plus, (0.5, "a", "para"), (-0.5, "b", "sst"), minus)


def test_what_hyper_parameters_give_is_held_against_what_diff_and_surgery_give():
    """Claim 5b: (baseline - untuned) - (surgery - baseline)."""
    terms = next(claim.terms for claim in CLAIMS if claim.number == "5b")
    values = {"baseline": 0.5, "baseline_untuned": 0.375, "surgery_diff": 0.75}
    assert sum(factor * values[row] for factor, row, _ in terms) == 0.125 - 0.25
    assert {score for _, _, score in terms} == {"sts"}
