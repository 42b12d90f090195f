"""training/task_schedule.py: schedules of tasks over a run, by hand."""

import pytest

from tests.tiny import refusal
from training.settings import StepSettings
from training.task_schedule import DRAW_SCHEDULES, LOSS_SCHEDULES, describe_schedules, draw_shares

FADE = LOSS_SCHEDULES("sst=0.25:1/0.75:0,sts=0.5:0/0.5:2")


def test_schedules_by_hand():
    """Of five steps, at progress 0, 1/4, ... 1."""
    assert FADE == {"sst": [[0.25, 1.0], [0.75, 0.0]], "sts": [[0.5, 0.0], [0.5, 2.0]]}
    settings = StepSettings(0, task_weights={"sst": 3.0}, loss_schedule=FADE, total_steps=5)
    factors = {
        task: [settings.task_weight(task, step) for step in range(6)] for task in ("sst", "para", "sts")
    }
    assert factors == {"sst": [3, 3, 1.5, 0, 0, 0], "para": [1] * 6, "sts": [0, 0, 2, 2, 2, 2]}
    draws = DRAW_SCHEDULES("para=0:0.5")
    shares = draw_shares(("sst", "para", "sts"), FADE, draws, 5)
    assert shares.T.tolist() == [[1, 1, 1, 0, 0], [0.5] * 5, [0, 0, 1, 1, 1]]
    assert draw_shares(("sst",), {}, {}, 5) is None
    assert describe_schedules("loss_schedule", FADE, 401) == [
        "--loss_schedule sst: 1 at step 101, 0 at step 301, straight lines between them",
        "--loss_schedule sts: 0 at step 201, 2 at step 201, straight lines between them",
    ]


def test_a_step_without_any_task_is_refused():
    message = refusal(draw_shares, ("sst", "sts"), FADE, DRAW_SCHEDULES("sts=0:0"), 5)
    assert "leave step 4 of 5 without any task" in message


@pytest.mark.parametrize(
    "text", ["sst", "sst=1", "sst=0:1/2:0", "sst=0.5:1/0.4:0", "sst=0:-1", "x=0:1", "sst=0:nan"]
)
def test_bad_schedules_are_told_from_others(text):
    with pytest.raises(Exception, match="expected TASK=PROGRESS:FACTOR"):
        LOSS_SCHEDULES(text)
    assert not DRAW_SCHEDULES.is_valid({"sst": [[0.0, 1.5]]}) and DRAW_SCHEDULES("none") == {}
