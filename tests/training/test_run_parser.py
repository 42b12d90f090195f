"""Types and marks of flags: values that a flag can have, told from those that only damage can have caused."""

import pytest

from training.flags import make_parser
from training.run_parser import RunParser, is_valid_value

FLAGS = make_parser().flags


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("seed", (0, 2**32 - 1), (2**32, -1, 1.0, "1", True, None, [1], 10**400)),
        ("lr", (None, 1, 1e-5), (0, float("nan"), float("inf"), "1", False, {}, 10**400)),
        ("tasks", (("sst",), ("sts", "sst")), ("sst", (), ("sst", "sst"), ("nli",), (("sst",),), ({},))),
        ("predict_splits", (("test", "dev"), ()), (("train",), "dev,test")),
        ("task_weights", ({}, {"sst": 2, "sts": 0.5}), ({"sst": -1}, {"nli": 1}, {"sst": True}, ("sst",))),
        ("extra_data", ({}, {"sick": None, "mrpc": 3}), ({"yelp": 1}, {"sick": 0}, {"sick": 2.0}, "sick")),
        ("pooling", ("mean",), ("max", None, {}, ("mean",))),
        ("option", (None, "pretrain"), (True, "")),
        ("rectify", (True, False), (1, None, "True")),
        ("device", ("auto", "cuda:1"), (None, 0, ("cpu",))),
    ],
)
def test_values_that_a_flag_cannot_have_are_told_from_others(name, good, bad):
    assert all(is_valid_value(FLAGS[name], value) for value in good)
    assert not any(is_valid_value(FLAGS[name], value) for value in bad)


def test_a_flag_needs_a_mark():
    parser = RunParser()
    with pytest.raises(ValueError, match="--new has the mark 'none'; expected one of result, mode"):
        parser.adder(parser)("--new", "none")
