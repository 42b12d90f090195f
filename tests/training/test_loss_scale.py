"""The loss scale: what changes it, by how much, and what a file may say of it."""

from dataclasses import asdict

import pytest

from training.loss_scale import FIRST_SCALE, GROWTH_STEPS, MAX_SCALE, LossScale, scale_of


def count(loss_scale, kind, times=1):
    for _ in range(times):
        loss_scale.count(applied=kind == "good", overflow=kind == "overflow")
    return loss_scale.scale


def test_overflow_halves_the_scale_down_to_1():
    loss_scale = LossScale()
    assert [count(loss_scale, "overflow") for _ in range(3)] == [2**15, 2**14, 2**13]
    assert count(loss_scale, "overflow", 20) == 1
    assert loss_scale == LossScale(1, 0, 23)


def test_good_steps_in_a_row_double_the_scale_up_to_its_limit():
    assert (FIRST_SCALE, GROWTH_STEPS, MAX_SCALE) == (65_536, 2000, 16_777_216)
    loss_scale = LossScale()
    assert count(loss_scale, "good", 1999) == 2**16 and count(loss_scale, "good") == 2**17
    assert count(loss_scale, "good", 1999) == 2**17 and count(loss_scale, "good") == 2**18
    assert count(loss_scale, "good", 20_000) == 2**24
    assert loss_scale.overflow_steps == 0


@pytest.mark.parametrize("kind", ["overflow", "fault"])
def test_row_of_good_steps_is_broken(kind):
    loss_scale = LossScale()
    count(loss_scale, "good", 1999)
    before = count(loss_scale, kind)
    assert before == (2**15 if kind == "overflow" else 2**16)
    assert count(loss_scale, "good", 1999) == before and count(loss_scale, "good") == 2 * before


def test_text():
    assert LossScale(512, 3, 7).overflow_text(20) == (
        "7 of 20 steps were skipped because a float16 gradient overflowed; the loss scale, which that"
        " halves, is 512 now"
    )


def test_json():
    for loss_scale in (LossScale(), LossScale(1, 1999, 40), LossScale(MAX_SCALE, 5, 0)):
        assert LossScale.from_json(asdict(loss_scale)) == loss_scale
        assert scale_of(loss_scale) == loss_scale.scale
    assert LossScale.from_json(None) is None and scale_of(None) == 1


@pytest.mark.parametrize(
    "changes",
    [
        *({"scale": scale} for scale in (0, -2, 3, 2.0, True, None, "2", 2**25, 2**70)),
        *({"good_steps": steps} for steps in (-1, 2000, 1.5, None)),
        *({"overflow_steps": steps} for steps in (-1, "1", 10**30)),
        {"more": 1},
    ],
)
def test_json_of_another_kind_is_refused(changes):
    good = asdict(LossScale())
    with pytest.raises(ValueError, match="loss_scale"):
        LossScale.from_json(good | changes)
    for name in good:
        with pytest.raises(ValueError, match="loss_scale"):
            LossScale.from_json({key: value for key, value in good.items() if key != name})
    for other in (5, [], "x"):
        with pytest.raises(ValueError, match="loss_scale"):
            LossScale.from_json(other)
