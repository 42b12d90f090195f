"""benchmarks.gpu on the CPU: its contenders and checks tell right from wrong, its clock is kept.

What only a GPU has, captured graphs and times that mean something, cannot be tried here.
"""

import importlib.util
import json
import time
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch

from benchmarks import contenders, gpu, gpu_checks
from benchmarks.contenders import GPU_STEP, STEP, OneTaskData, Setting, TorchJDAutogram, make_pool
from benchmarks.gpu import Bench, Job, do_jobs, get_args, kernel_kind, linear_flops, main, plan, take_rows
from benchmarks.gpu_checks import CHECKS, Case, Lab
from benchmarks.gpu_page import TARGETS, make_page
from benchmarks.page import target_row
from config import DEFAULT_TASKS, TASKS, BertConfig
from datasets import read_rows, tokenize
from support.errors import UserError
from support.files import ROOT
from tokenizer import BertTokenizer
from training.captured_step import CapturedStep


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch):
    """Small tensors take the plain way, but getting ready to compile takes seconds."""
    monkeypatch.setattr(contenders, "find_compiler", lambda: None)


@pytest.fixture(scope="module")
def read(encoder, data_dir):
    """From whether pairs are one sequence to a few examples of each task."""
    tokenizer, data = BertTokenizer.from_pretrained(encoder), {False: {}, True: {}}
    for joint, task in product(data, DEFAULT_TASKS):
        spec = TASKS[task]
        rows = take_rows(read_rows(data_dir / spec.files["train"], spec, "train"), 8)
        data[joint][task] = tokenize(rows, tokenizer, joint=joint and spec.is_pair, max_length=40)
    return data.__getitem__


@pytest.fixture(scope="module")
def setting(encoder, read):
    tasks = {task: TASKS[task] for task in DEFAULT_TASKS}
    pool = make_pool(tasks, read(False), 0, batch_size=3, num_batches=2, seed=1)
    return Setting(pool, str(encoder), "cpu", 1, seed=1)


@pytest.fixture
def lab(encoder, read):
    return Lab({"tiny": str(encoder)}, read, 0, "cpu", seed=1, num_steps=4, batch_size=2)


@pytest.fixture
def bench(encoder, data_dir, tmp_path):
    args = get_args(["--data_dir", str(data_dir), "--pretrained", str(encoder), "--device", "cpu"])
    return Bench(args, tmp_path, started=time.monotonic())


# --- contenders ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ["ours pcgrad", "ours sum, one row"])
def test_captured_contenders_make_the_steps_of_plain_ones(setting, row):
    ours, expected = (table[row](setting, precision="fp32") for table in (GPU_STEP, STEP))
    assert ours.losses() == expected.losses()
    for contender in (ours, expected):
        contender.model.eval()
        for i in range(2):
            contender.step(i)
    ours.finish()
    for (name, a), b in zip(ours.model.named_parameters(), expected.model.parameters(), strict=True):
        # two of Adam's updates, which have the size of the learning rate where rounding decides their sign
        tolerance = 2.5e-3 if name.startswith("heads") else 2.5e-4
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance, msg=name)
        assert float((a - b).detach().abs().mean()) < 0.02 * tolerance, name


def test_skipped_step_is_not_timed(setting):
    contender = GPU_STEP["ours sum"](setting, precision="fp32")
    with torch.no_grad():
        next(contender.model.parameters()).fill_(torch.nan)
    contender.step(0)
    with pytest.raises(RuntimeError, match="skipped"):
        contender.finish()


def test_examples_of_all_tasks_as_if_of_one(read):
    joined = OneTaskData(read(False))
    (_, sst), (_, para), _ = read(False).items()
    packed = joined.packed_batch(np.array([1, 4]) + len(sst), 0)
    expected = para.packed_batch(np.array([1, 4]), 0)
    assert np.array_equal(packed.input_ids, expected.input_ids)
    assert np.array_equal(joined.lengths[len(sst) :][: len(para)], para.lengths)


@pytest.mark.slow
def test_autogram_makes_the_steps_of_the_textbook_for_the_encoder(setting):
    """The gradients of the heads differ by the weights, but those are not compared."""
    pytest.importorskip("torchjd")
    pytest.importorskip("transformers")
    updated = []
    for kind in (TorchJDAutogram, GPU_STEP["Hugging Face + textbook PCGrad"].func):
        contender = kind(setting, precision="fp32")
        contender.model.eval()
        two = dict(list(contender.steps[0].items())[:2])  # of two tasks no order has to be drawn
        contender.train(two, 0)
        updated.append(torch.cat([param.detach().flatten() for param in contender.shared]))
    assert float((updated[0] - updated[1]).abs().mean()) < 2e-6


# --- checks -------------------------------------------------------------------------------------------------


def test_bfloat16_and_joint_pairs_pass(lab):
    found = CHECKS["plain float32 on the CPU"](lab, Case("tiny", "cross", "gradvac", "bf16"))
    assert found["ok"] and found["errors"]["updates"] > 1e-5


def test_wrong_steps_fail(lab, monkeypatch):
    """A step that is a little wrong, or NaN, and one that depends on something besides its number.

    That right ones pass is seen in the trial below.
    """
    real = CapturedStep._apply

    def louder(step, drawn, weights, *others):
        real(step, drawn, weights * 1.05, *others)

    monkeypatch.setattr(CapturedStep, "_apply", louder)
    found = CHECKS["plain float32 on the CPU"](lab, Case("tiny"))
    assert not found["ok"] and found["errors"]["updates"] > 0.01 > found["errors"]["losses"]
    calls = []

    def forgetful(step, drawn, weights, *others):
        calls.append(0)
        real(step, drawn, weights * (1 + len(calls) / 100), *others)

    monkeypatch.setattr(CapturedStep, "_apply", forgetful)
    for name in ("replayed = one by one, with dropout", "resumed = not stopped"):
        assert not CHECKS[name](lab, Case("tiny"))["ok"]
    monkeypatch.setattr(gpu_checks, "relative_error", lambda found, expected: float("nan"))
    assert not CHECKS["plain float32 on the CPU"](lab, Case("tiny"))["ok"]


def test_every_method_and_head_is_checked():
    assert len(set(gpu_checks.CASES)) == len(gpu_checks.CASES) == 2 + 4 * 4


# --- jobs and the clock -------------------------------------------------------------------------------------


def test_failures_and_lack_of_time_are_named(bench, capsys):
    def fail(bench):
        raise RuntimeError("no such kernel\nand more")

    saved = []
    jobs = [
        Job("good", 1, lambda bench: bench.note("times", "a", 1)),
        Job("bad", 1, fail),
        Job("long", 1e6, fail),
    ]
    do_jobs(bench, jobs, lambda: saved.append(dict(bench.measured)))
    assert bench.measured["times"] == {"a": 1} and len(saved) == 2
    assert bench.measured["failed"] == {"bad": "no such kernel"} and bench.measured["left_out"] == ["long"]
    out = capsys.readouterr().out
    assert "not measured: no such kernel" in out and "left out: long" in out and "and more" not in out


def test_a_job_is_broken_off_when_the_time_is_over(bench):
    bench.args.seconds = 0.1 + bench.args.seconds - bench.seconds_left
    jobs = [Job("endless", 0, lambda bench: time.sleep(60)), Job("next", 0, lambda bench: None)]
    do_jobs(bench, jobs, lambda: None)
    assert bench.measured["left_out"] == ["endless", "next"] and not bench.measured["failed"]
    assert bench.seconds_left > -30


def test_nothing_is_started_on_a_lost_device(bench, monkeypatch):
    monkeypatch.setattr(gpu, "release", lambda device: False)
    do_jobs(bench, [Job(name, 0, lambda bench: None) for name in "abc"], lambda: None)
    assert bench.measured["left_out"] == ["b", "c"]


def test_most_important_first_and_everything_planned(bench):
    titles = [job.title for job in plan(bench)]
    assert len(set(titles)) == len(titles)
    assert titles[1].startswith("check tiny, diff, pcgrad") and "ours pcgrad" in titles[2]
    for row in GPU_STEP:
        assert any(title.endswith(f": {row}") for title in titles)


def test_contender_that_computes_something_else_is_refused(bench, setting):
    contender = GPU_STEP["ours sum"](setting, precision="fp32")
    gpu.check_losses(bench, "base", 2, contender)
    bench.losses["base", 2]["sts"] += 0.01
    with pytest.raises(UserError, match="its sts loss is"):
        gpu.check_losses(bench, "base", 2, contender)


def test_arithmetic_worked_by_hand():
    config = BertConfig(hidden_size=2, num_hidden_layers=3, num_attention_heads=1, intermediate_size=5)
    assert linear_flops(config, 10) == 6 * 3 * (4 * 4 + 2 * 2 * 5) * 10
    names = {
        "attention_backward_kernel": "attention",
        "nvjet_tst_128x64_h_bz": "matrix products",
        "combine_adamw_kernel": "weighted sum and AdamW",
        "partial_sums_kernel": "sums by task, embedding gradients",
        "Memcpy HtoD (Pinned -> Device)": "copies",
        "what is this": "other",
    }
    assert {name: kernel_kind(name) for name in names} == names


# --- the page and the command -------------------------------------------------------------------------------


def test_targets_are_judged():
    measured = {"times": {}}
    for row, ms in (
        ("ours pcgrad", 2.4),
        ("Hugging Face + textbook PCGrad", 23.0),
        ("ours sum, one row", 2.0),
    ):
        for size in (16, 64):
            measured["times"][f"MiniLM/{size}/{row}"] = {"ms": [ms, ms, ms + 1]}
    measured["waits"] = {"MiniLM/ours pcgrad": 0.0}
    measured["run"] = {"seconds": 26.0, "steps": 1000, "size": 16, "model": "MiniLM"}
    rows = {row[0]: row[1:] for row in (target_row(target, measured) for target in TARGETS)}
    assert rows["MiniLM, 16 a task, pcgrad, ms"][1:] == ["at most 2.5", "met"]
    name = "pcgrad over a sum that keeps one gradient, MiniLM, 64 a task"
    assert rows[name] == ["1.200", "at most 1.08", "missed"]
    assert rows["throughput over Hugging Face + textbook PCGrad, MiniLM, 16 a task"][::2] == ["9.6", "missed"]
    assert rows["waits for the device in a step"] == ["0.0", "at most 0", "met"]
    assert rows["MiniLM, 1,000 steps of 16 a task, from command to predictions, s"][2] == "missed"
    assert rows["bert-base, 256 a task, pcgrad, ms"] == ["not measured", "at most 34", "-"]


CHOSEN = (
    "check tiny, diff, pcgrad, fp32",
    "time base (tiny), 2 examples a task: ours pcgrad",
    "time base (tiny), 2 examples a task: Hugging Face + TorchJD mtl_backward",
    "waits and profile of a plain step",
    "evaluation of all of dev: ours",
)


@pytest.mark.slow
def test_trial_end_to_end(tmp_path, encoder, data_dir, monkeypatch, capsys):
    find, real_plan = importlib.util.find_spec, gpu.plan
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name == "torchjd" else find(name, *args)
    )
    peer = partial(gpu.time_steps, model="base", size=2, row="Hugging Face + TorchJD mtl_backward")

    def plan(bench):
        return [*(job for job in real_plan(bench) if job.title in CHOSEN), Job(CHOSEN[2], 1, peer)]

    monkeypatch.setattr(gpu, "plan", plan)
    flags = ["--data_dir", str(data_dir), "--pretrained", str(encoder), "--device", "cpu"]
    assert main([*flags, "--results_dir", str(tmp_path)]) == 0
    page, measured = (tmp_path / "gpu.md").read_text(), json.loads((tmp_path / "gpu.json").read_text())
    assert measured["failed"] == {CHOSEN[2]: "torchjd not installed (requirements/bench.txt)"} or (
        "transformers" in measured["failed"][CHOSEN[2]]
    )
    assert [found["ok"] for found in measured["checks"].values()] == [True] * len(CHECKS)
    assert "**A trial without a GPU**" in page and "**not ok**" not in page
    parts = ("## Targets", "## Checks", "| ours pcgrad |", "ours pcgrad, plain path: ", "## Evaluation")
    assert all(part in page for part in parts)
    assert make_page(measured) == page

    monkeypatch.setattr(gpu, "plan", lambda bench: [])  # the page is replaced, and nowhere else is written
    assert main(flags) == 0
    assert "# One GPU, measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "cuda"], "--device cuda: not available here"),
        (["--results_dir", str(ROOT / "results")], "numbers without a GPU do not belong there"),
        (["--seconds", "0"], "--seconds"),
        (["--data_dir", "nowhere"], "nowhere"),
    ],
)
def test_errors_are_one_line(flags, message, encoder, data_dir, refused):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("a GPU is there")
    places = ["--data_dir", str(data_dir), "--pretrained", str(encoder), "--device", "cpu"]
    assert message in refused(main, [*places, *flags])


@pytest.mark.parametrize(("name", "text"), [("gpu.md", "My notes.\n"), ("gpu.json", '{"kmh": 130}')])
def test_files_that_are_not_ours_are_kept(tmp_path, refused, name, text):
    (tmp_path / name).write_text(text)
    assert str(tmp_path / name) in refused(main, ["--device", "cpu", "--results_dir", str(tmp_path)])
    assert (tmp_path / name).read_text() == text
