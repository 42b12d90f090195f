"""training/captured_step.py against `train_step`: the same steps from static shapes, on the CPU.

What a GPU adds, capturing and replaying, cannot be tried here; that no function looks at a value can.
"""

import json
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

import multitask_classifier
from config import DEFAULT_TASKS, TASKS
from datasets import Phrases, Rows, TaskData, TokenArrays, batch_seed
from evaluation import Objective
from heads import HEADS, PAIR_HEADS
from kernels import static
from kernels.grad_methods import GRAD_METHODS
from multitask_classifier import TaskBatch, main, train_step
from tests.kernels import plain_kernels
from tests.tiny import make_data, make_encoder, make_model, make_training
from training import resolve
from training.captured_step import CapturedStep
from training.settings import StepSettings
from training.teacher import mix_targets

NUM_EXAMPLES = 40
LAYER, GLS, FGM = {"surgery_scope": "layer"}, {"loss_weighting": "gls"}, {"fgm": 0.5}
EMA = {"gram": "ema:b=0.9"}


def make_task_data(task: str, head: str, seed: int, max_length: int = 40) -> TaskData:
    """Random sequences of 3 to 40 word pieces with random labels."""
    rng = np.random.default_rng(seed)
    per_example = HEADS[head].num_inputs if TASKS[task].is_pair else 1
    lengths = rng.integers(3, max_length + 1, NUM_EXAMPLES * per_example)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    segments = np.concatenate([np.arange(n) >= n // 2 for n in lengths]) & HEADS[head].joint  # roughly
    low, high = TASKS[task].label_range
    labels = rng.integers(low, high + 1, NUM_EXAMPLES)
    labels = labels.astype(np.float32 if TASKS[task].kind == "regression" else np.int64)
    rows = Rows(task, [f"{task}{n}" for n in range(NUM_EXAMPLES)], [], labels, "", {})
    sequences = TokenArrays(
        rng.integers(5, 50, offsets[-1]).astype(np.int32), segments.astype(np.int8), offsets
    )
    return TaskData(rows, sequences, np.arange(len(lengths)).reshape(NUM_EXAMPLES, per_example))


class Pair:
    """The same model twice: one makes plain steps, the other steps of static shape, of the same examples."""

    def __init__(
        self,
        head="diff",
        tasks=DEFAULT_TASKS,
        optimizer=None,
        model=None,
        change=dict,
        ops=plain_kernels,
        **settings,
    ):
        heads = {task: head if TASKS[task].is_pair else "single" for task in tasks}
        self.data = change({task: make_task_data(task, heads[task], n) for n, task in enumerate(tasks)})
        self.settings = StepSettings(**{"seed": 3, **settings})
        self.plain, self.static = (make_model(heads, tasks, False, **(model or {})) for _ in range(2))
        # A large eps: Adam would blow rounding up where a gradient is 0, as that of a key's bias always is.
        options = {"eps": 1e-2, **(optimizer or {})}
        self.plain_training, self.static_training = (
            make_training(model, **options) for model in (self.plain, self.static)
        )
        self.captured = CapturedStep(self.static, *self.static_training, self.data, self.settings, ops)
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
                TaskBatch(
                    task,
                    [
                        self.data[task].batch(each, 0, batch_seed(3, step, n, i))
                        for i, each in enumerate(pieces)
                    ],
                )
                for n, (task, pieces) in enumerate(examples)
            ]
            expected = train_step(
                self.plain, *self.plain_training, batches, self.settings, step=step, cosine_ema=self.ema
            )
            self.ema = expected.cosine_ema
            found = self.captured(examples, step)()
            for name in ("losses", "weights", "head_squares", "cosine_ema", "gram", "group_grams"):
                # float32, sums in another order; the gram matrix of tens holds small differences of products
                a, b = getattr(found, name), getattr(expected, name)
                torch.testing.assert_close(
                    a, b, rtol=2e-4, atol=1e-4 * float(b.nan_to_num().abs().sum()), equal_nan=True
                )
            assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
            assert (found.num_tokens, found.applied) == (expected.num_tokens, expected.applied)
        return found

    def compare_parameters(self, tolerance=2e-5):
        for (name, a), b in zip(self.plain.named_parameters(), self.static.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    ("method", "head"),
    [
        *(("pcgrad", head) for head in PAIR_HEADS),
        *((name, "diff") for name, row in GRAD_METHODS.items() if row.on_device and name != "pcgrad"),
    ],
)
def test_steps_equal_plain_ones(method, head):
    pair = Pair(head, grad_method=method, clip_norm=1.0)
    pair.steps(2)
    pair.compare_parameters()


@pytest.mark.parametrize(
    "settings",
    [
        *({"grad_method": name} for name, row in GRAD_METHODS.items() if not row.on_device),
        LAYER,
        GLS,
        FGM,
        EMA,
    ],
)
def test_what_needs_the_host_is_refused_by_name(settings):
    flag, value = list(settings.items())[-1]
    with pytest.raises(ValueError, match=f"--{flag} {value}"):
        Pair(**settings)


OBJECTIVE = Objective({"sst": 0.1, "para": 0.2}, {"sst": 1.0, "para": 2.0, "sts": 0.1}, 2)


def with_phrases(data):
    """Up to five phrases in each sentence, at most three of them in a batch."""
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0], rng.integers(0, 6, NUM_EXAMPLES).cumsum()])
    starts = rng.integers(0, 2, offsets[-1])
    counts_as = rng.random(len(starts)).astype(np.float32)
    arrays = (starts, starts + rng.integers(1, 3, len(starts)), starts % 5, counts_as, offsets)
    return data | {"sst": replace(data["sst"], phrases=Phrases(*arrays, 2.0, 3))}


def in_both_orders(data):
    """The same pairs, each now one with the next one's sequence for the other order."""
    return {
        task: replace(each, index=np.hstack([each.index, each.index ^ 1]), symmetric=True)
        if TASKS[task].is_pair
        else each
        for task, each in data.items()
    }


CASES = {  # settings of the step, model and optimizer; and what is drawn
    "a task drawn twice, another not at all": (
        {"task_weights": {"sts": 2.0}},
        {"tasks": ["sst", "sst", "sts"]},
    ),
    "micro-batches, the last one short": ({"grad_reduction": "mean"}, {"sizes": (4, 4, 1)}),
    "one task": ({"tasks": ("sst",)}, {}),
    "pooling cls": ({"model": {"pooling": "cls"}}, {}),
    "pooling pooler": ({"model": {"pooling": "pooler"}}, {"tasks": ["sst", "para"]}),
    "frozen encoder": ({"model": {"freeze_encoder": True}}, {}),
    "rectified warm-up": ({"optimizer": {"rectify": True}}, {}),
    "two layers in the heads": ({"model": {"head_layers": 2}}, {}),
    "surgery on one task": ({"grad_method": "pcgrad", "surgery_tasks": ("sts",)}, {}),
    "larger batches": ({}, {"sizes": (7,)}),
    "learning rates by layer": ({"optimizer": {"layer_decay": 0.5}}, {}),
    "a task that fades": ({"loss_schedule": {"sts": [[0.0, 2.0], [1.0, 0.5]]}, "total_steps": 3}, {}),
    "more in the losses": ({"model": {"objective": OBJECTIVE}}, {}),
    "phrases in micro-batches": ({"change": with_phrases}, {"sizes": (4, 2)}),
    "phrases by attention": ({"change": with_phrases, "model": {"pooling": "attention"}}, {}),
    "coral": ({"change": with_phrases, "model": {"losses": {"sst": "coral"}}}, {}),
    "oll": ({"model": {"losses": {"sst": "oll"}}}, {}),
    "both orders": ({"head": "cross", "change": in_both_orders}, {"tasks": ["sts", "para", "sts"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_step_equals_a_plain_one(case):
    options, drawn = CASES[case]
    pair = Pair(**options)
    pair.steps(7 if "rectified" in case else 2, **drawn)
    pair.compare_parameters()
    states = [training[1].state_dict()["state"] for training in (pair.plain_training, pair.static_training)]
    assert [{key: each["step"] for key, each in state.items()} for state in states].count(
        {key: each["step"] for key, each in states[0].items()}
    ) == 2


def test_answers_of_a_teacher_take_the_labels_place():
    pair, rng = Pair(), np.random.default_rng(0)
    for task, data in pair.data.items():
        answers = rng.dirichlet(np.ones(5), NUM_EXAMPLES)
        pair.data[task] = replace(
            data, targets=mix_targets(TASKS[task], data.rows.labels.astype(np.float32), answers, 0.5)
        )
    pair.steps(2)
    pair.compare_parameters()


def test_results_do_not_depend_on_spare_rows(monkeypatch):
    """Bit for bit: spare rows have zero gradients, and sums over tasks do not see them."""
    found = []
    for multiple in (256, 1024):
        monkeypatch.setattr(static, "ROW_MULTIPLE", multiple)
        pair = Pair()
        result = pair.captured(pair.examples(0), 0)()
        found.append([result.losses, pair.static_training[0].data.clone()])
    for other in found[1:]:
        torch.testing.assert_close(
            other, found[0], rtol=0, atol=1e-6
        )  # products of other sizes round otherwise


def test_step_that_is_not_finite_changes_nothing():
    pair = Pair(task_weights={"para": 1e30})  # its squares are beyond float32
    before = pair.static_training[0].data.clone()
    result = pair.captured(pair.examples(0), 0)()
    assert not result.applied and not result.gram[1, 1].isfinite() and result.gram[0, 0].isfinite()
    assert torch.equal(pair.static_training[0].data, before) and not pair.static_training[1].state
    assert result.losses.isfinite().all() and not result.cosine_ema.any()


def test_check_compares_both_ways_and_leaves_no_trace():
    # The plain step, made as in evaluation, has no term of R-Drop: both passes must see the same here.
    options = {"head": "cross", "change": in_both_orders, "model": {"objective": OBJECTIVE}}
    pair = Pair(**options)
    model, (memory, optimizer) = pair.static, pair.static_training
    examples = [(task, [np.tile(n[0], 2)]) for task, n in pair.examples(0)]

    def plain_step(settings=pair.settings):
        batches = [
            TaskBatch(task, [pair.data[task].batch(pieces[0], 0, batch_seed(3, 0, n, 0))])
            for n, (task, pieces) in enumerate(examples)
        ]
        return train_step(model, memory, optimizer, batches, settings, step=0)

    before = memory.data.clone()
    pair.captured.check(examples, 0, plain_step)
    assert torch.equal(memory.data, before) and not optimizer.state
    with pytest.raises(ValueError, match="weights of the first step differ by"):
        other = StepSettings(seed=3, grad_method="sum", grad_reduction="mean")
        pair.captured.check(examples, 0, lambda: plain_step(other))
    assert torch.equal(memory.data, before) and model.training
    # Nothing is left behind: what comes next is what comes after a check that was never made.
    fresh = Pair(**options)
    results = [each.captured(each.examples(1), 1)() for each in (pair, fresh)]
    assert torch.equal(results[0].gram, results[1].gram) and torch.equal(
        memory.data, fresh.static_training[0].data
    )


# --- whole runs ---------------------------------------------------------------------------------------------

RUN = "--batch_size 4 --lr 0.003 --head_lr 0.01 --log_every 3 --max_steps 5 --eval_every 3 --precision fp32"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A place for runs that make their steps as on a GPU, but for capturing them."""
    make_inputs(tmp_path)
    monkeypatch.setattr(multitask_classifier, "plot_run", lambda folder: None)
    monkeypatch.setattr(resolve, "is_cuda", lambda args: True)
    monkeypatch.setattr(resolve, "find_spec", lambda name: "found")
    monkeypatch.setattr(multitask_classifier, "triton_kernels", lambda: plain_kernels)
    return tmp_path


@pytest.fixture(scope="module")
def plain_log(tmp_path_factory):
    """The log of a run that makes its steps in the ordinary way."""
    place = tmp_path_factory.mktemp("plain")
    make_inputs(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multitask_classifier, "plot_run", lambda folder: None)
        assert train(place, "plain", "--compile", "off") == 0
    return read_log(place / "plain")


def make_inputs(place):
    make_encoder(place / "encoder")
    make_data(place / "data")


def train(place, name, *flags):
    inputs = ["--pretrained", str(place / "encoder"), "--data_dir", str(place / "data"), "--device", "cpu"]
    return main([*RUN.split(), *inputs, "--output_dir", str(place / name), *flags])


def read_log(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def test_run_is_resumed_with_the_same_bits_and_logs_what_a_plain_one_does(
    place, plain_log, monkeypatch, capsys
):
    assert train(place, "whole") == 0
    assert "steps are captured as CUDA graphs" in capsys.readouterr().out
    real_start = multitask_classifier.Steps.start

    def interrupted_start(steps, examples):
        if steps.run.state.step == 3:
            signal.raise_signal(signal.SIGTERM)
        real_start(steps, examples)

    monkeypatch.setattr(multitask_classifier.Steps, "start", interrupted_start)
    with pytest.raises(SystemExit):
        train(place, "parts")
    monkeypatch.setattr(multitask_classifier.Steps, "start", real_start)
    assert main(["--output_dir", str(place / "parts"), "--resume"]) == 0
    for name in ("last/model.safetensors", "last/optimizer.safetensors"):
        assert (place / "whole" / name).read_bytes() == (place / "parts" / name).read_bytes()
    whole = read_log(place / "whole")
    assert whole == read_log(place / "parts")

    assert [line.keys() for line in whole] == [line.keys() for line in plain_log]
    # Other dropout; the same examples, word pieces, learning rates, and about the same losses at the start.
    for name in ("step", "lr", "head_lr", "tokens"):
        assert [line.get(name) for line in whole] == [line.get(name) for line in plain_log]


def test_long_sequences_take_the_plain_path_in_between(place, monkeypatch, capsys):
    """Without dropout, the numbers are those of a run that is plain throughout."""
    flags = ("--hidden_dropout_prob", "0")
    config = place / "encoder" / "config.json"
    config.write_text(
        config.read_text().replace(
            '"attention_probs_dropout_prob": 0.1', '"attention_probs_dropout_prob": 0.0'
        )
    )
    lengths = []
    real_fits = multitask_classifier.CapturedStep.fits
    monkeypatch.setattr(plain_kernels, "MAX_TILE", 60)
    monkeypatch.setattr(static, "WIDTH_MULTIPLE", 4)

    def fits(captured, examples):
        lengths.append(real_fits(captured, examples))
        return lengths[-1]

    monkeypatch.setattr(multitask_classifier.CapturedStep, "fits", fits)
    assert train(place, "mixed", *flags) == 0
    assert {True, False} == set(lengths)
    assert train(place, "plain", "--compile", "off", *flags) == 0
    for mixed, plain in zip(read_log(place / "mixed"), read_log(place / "plain"), strict=True):
        if "loss" in mixed:
            # float32; Adam's first updates blow rounding up where a gradient is nearly 0
            assert mixed["loss"] == pytest.approx(plain["loss"], rel=1e-2)
            assert mixed["grad_norm"] == pytest.approx(plain["grad_norm"], rel=2e-2)


def test_failure_leads_to_the_plain_path_with_one_line(place, plain_log, monkeypatch, capsys):
    def fail(*arguments):
        raise RuntimeError("out of registers\nand more")

    monkeypatch.setattr(plain_kernels, "sum_by_task", fail)
    assert train(place, "failed") == 0
    out = capsys.readouterr()
    warnings = [line for line in (out.out + out.err).splitlines() if "captured steps" in line]
    assert warnings == ["warning: no captured steps, going on with plain operations (out of registers)"]
    assert read_log(place / "failed") == plain_log


def test_skipped_step_names_its_examples(place, capsys):
    run = train(place, "skipped", "--task_weights", "sts=1e30", "--max_bad_steps", "2")
    assert run == 2
    out = capsys.readouterr()
    assert "warning: step 1 skipped for all tasks: sts gradient is not finite" in out.out + out.err
    assert "2 steps in a row without a finite loss and gradient" in out.err
