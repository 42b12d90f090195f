"""training/captured_step.py against `train_step`: the same steps from static shapes, on the CPU, without Triton.

What a GPU adds, capturing and replaying, cannot be tried here; that no function looks at a value can.
"""

import numpy as np
import pytest
import torch

from config import DEFAULT_TASKS, TASKS
from datasets import Rows, TaskData, TokenArrays
from heads import HEADS, PAIR_HEADS, POOLINGS
from kernels import static
from multitask_classifier import TaskBatch, train_step
from tests.kernels import plain_kernels
from tests.tiny import make_model, make_training
from training.captured_step import CapturedStep
from training.settings import StepSettings

NUM_EXAMPLES = 40


def make_task_data(task: str, head: str, seed: int, max_length: int = 40) -> TaskData:
    """Random sequences of 3 to 40 word pieces with random labels."""
    rng = np.random.default_rng(seed)
    per_example = 2 if TASKS[task].is_pair and not HEADS[head].joint else 1
    lengths = rng.integers(3, max_length + 1, NUM_EXAMPLES * per_example)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    segments = np.concatenate([np.arange(n) >= n // 2 for n in lengths]) & HEADS[head].joint
    low, high = TASKS[task].label_range
    labels = rng.integers(low, high + 1, NUM_EXAMPLES)
    labels = labels.astype(np.float32 if TASKS[task].kind == "regression" else np.int64)
    rows = Rows(task, [f"{task}{n}" for n in range(NUM_EXAMPLES)], [], labels, "", {})
    sequences = TokenArrays(
        rng.integers(5, 50, offsets[-1]).astype(np.int32), segments.astype(np.int8), offsets
    )
    return TaskData(rows, sequences, np.arange(len(lengths)).reshape(NUM_EXAMPLES, per_example))


class Pair:
    """The same model twice: one makes plain steps, the other steps of static shape, with the same examples."""

    def __init__(self, head="diff", tasks=DEFAULT_TASKS, optimizer=None, model=None, **settings):
        heads = {task: head if TASKS[task].is_pair else "single" for task in tasks}
        self.data = {task: make_task_data(task, heads[task], n) for n, task in enumerate(tasks)}
        self.settings = StepSettings(**{"seed": 3, **settings})
        self.plain, self.static = (make_model(heads, tasks, False, **(model or {})) for _ in range(2))
        self.plain_training = make_training(self.plain, **(optimizer or {}))
        self.static_training = make_training(self.static, **(optimizer or {}))
        self.captured = CapturedStep(
            self.static, *self.static_training, self.data, self.settings, plain_kernels
        )
        self.ema = None

    def examples(self, step, tasks=None, sizes=(4,)):
        """For each draw the examples of its micro-batches, others in each step."""
        rng = np.random.default_rng(step)
        tasks = self.data if tasks is None else tasks
        return [(task, [rng.choice(NUM_EXAMPLES, size, False) for size in sizes]) for task in tasks]

    def steps(self, num_steps, **options):
        """Make the same steps both ways, and compare what they say of themselves."""
        for step in range(num_steps):
            examples = self.examples(step, **options)
            batches = [
                TaskBatch(task, [self.data[task].batch(chosen, 0) for chosen in pieces])
                for task, pieces in examples
            ]
            expected = train_step(
                self.plain, *self.plain_training, batches, self.settings, step=step, cosine_ema=self.ema
            )
            self.ema = expected.cosine_ema
            found = self.captured(examples, step)()
            for name in ("losses", "weights", "head_squares", "cosine_ema", "gram", "group_grams"):
                # float32, sums in another order; the gram matrix of tens holds small differences of products
                a, b = getattr(found, name), getattr(expected, name)
                torch.testing.assert_close(a, b, rtol=2e-4, atol=1e-4 * float(b.nan_to_num().abs().max()), equal_nan=True)
            assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
            assert (found.num_tokens, found.applied) == (expected.num_tokens, expected.applied)
        return found

    def compare_parameters(self, tolerance=2e-4):
        for (name, a), b in zip(self.plain.named_parameters(), self.static.parameters(), strict=True):
            # An update is at most about lr = 0.01 for each step; rounding moves it where a gradient is near 0.
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("method", ["sum", "mean", "pcgrad", "gradvac"])
@pytest.mark.parametrize("head", PAIR_HEADS)
def test_steps_equal_plain_ones(method, head):
    pair = Pair(head, grad_method=method, clip_norm=1.0)
    pair.steps(4)
    pair.compare_parameters()
