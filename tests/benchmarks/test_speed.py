"""The benchmark compares like with like, says what is missing, and counts as worked by hand; no times here.

Contenders are held against each other, our PCGrad against the textbook, roofline and page against hand-worked
numbers.
"""

import importlib.util
import json
import multiprocessing
import os
import pickle
import re
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks import contenders, speed
from benchmarks import workers as workers_module
from benchmarks.contenders import (
    STEP,
    Ours,
    Setting,
    installed,
    longest_steps,
    make_pool,
    textbook_pcgrad,
    torchjd_pcgrad,
)
from benchmarks.page import (
    BY_HAND,
    SHOW,
    TARGETS,
    Target,
    largest_memory_ratio,
    roofline_share,
    target_row,
    time_ratio,
    write_page,
)
from benchmarks.speed import exact_length, first_step_seconds, get_args, main, optimizer_bytes, step_flops
from benchmarks.workers import (
    Worker,
    changed_environment,
    check_losses,
    race_groups,
    race_pair,
    start_workers,
)
from config import DEFAULT_TASKS, TASKS, BertConfig
from datasets import read_rows, tokenize
from kernels.fused import Kernels
from pcgrad import TaskFacts, draw_orders, gram_matrix, pcgrad
from support.errors import UserError
from tests.tiny import make_config
from tokenizer import BertTokenizer

PEERS = ("transformers", "torchjd")
KERNELS = Kernels()  # the plain ones


class LocalWorker:
    """A worker without a process of its own."""

    def __init__(self, name, build, setting):
        self.name, self.contender = name, build(setting)

    def call(self, method, *args):
        return getattr(self.contender, method)(*args)

    def send(self, method, *args):
        self.answer = self.call(method, *args)

    def receive(self):
        return self.answer

    def close(self):
        pass


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch):
    """Small tensors take the plain way, but getting ready to compile takes seconds."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(contenders, "find_compiler", lambda: "a compiler")
    monkeypatch.setattr(contenders, "compile_kernels", lambda: KERNELS)


@pytest.fixture(scope="module")
def setting(encoder, data_dir):
    tokenizer, tasks = BertTokenizer.from_pretrained(encoder), {task: TASKS[task] for task in DEFAULT_TASKS}
    rows = {task: read_rows(data_dir / spec.files["train"], spec, "train") for task, spec in tasks.items()}
    data = {task: tokenize(rows[task], tokenizer, joint=False, max_length=64) for task in tasks}
    pool = make_pool(tasks, data, tokenizer.pad_token_id, batch_size=4, num_batches=2, seed=1)
    return Setting(pool, str(encoder), "cpu", 1, seed=1)


@pytest.fixture
def no_peers(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name in PEERS else find(name, *args)
    )


def random_grads(num_tasks: int, seed: int) -> torch.Tensor:
    return torch.randn(num_tasks, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- contenders ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tasks", [2, 3, 4])
def test_textbook_pcgrad_is_ours_on_the_vectors(num_tasks):
    changed = 0
    for seed in range(20):
        grads = random_grads(num_tasks, seed)
        first, second = (torch.Generator().manual_seed(seed) for _ in range(2))
        ours = pcgrad(TaskFacts(gram_matrix(grads), draw_orders(len(grads), first))) @ grads
        torch.testing.assert_close(textbook_pcgrad(list(grads), second), ours)
        changed += not torch.allclose(ours, grads.sum(0))
    assert changed > 3  # some gradients were in conflict


def test_torchjd_computes_the_same():
    pytest.importorskip("torchjd")
    for seed in range(20):
        grads = random_grads(2, seed)  # of two tasks, the order of the others does not matter
        torch.testing.assert_close(
            torchjd_pcgrad(list(grads)), pcgrad(TaskFacts(gram_matrix(grads), draw_orders(2))) @ grads
        )


def test_one_row_makes_the_update_of_the_sum(setting):
    updated = []
    for row in ("ours sum", "ours sum, one row"):
        contender = STEP[row](setting, precision="fp32")
        assert contender.kernels is KERNELS
        contender.model.eval()  # they draw their dropout in different ways
        contender.step(0)
        updated.append({name: param.detach().clone() for name, param in contender.model.named_parameters()})
    for name in updated[0]:
        torch.testing.assert_close(updated[0][name], updated[1][name], rtol=0, atol=2e-5, msg=name)


@pytest.mark.slow
def test_contenders_agree_on_the_losses_and_a_worker_has_its_own_process(setting, monkeypatch):
    """In a fork, which need not import torch again."""
    pytest.importorskip("transformers")
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", {"spawn": fork}.get)
    rows = ("ours sum", "ours sum, one row")
    workers = {name: LocalWorker(name, partial(STEP[name], precision="bf16"), setting) for name in rows}
    name = "Hugging Face sum, random batches"
    build = partial(STEP[name], precision="bf16")
    theirs = workers[name] = Worker(name, *pickle.loads(pickle.dumps((build, setting))))
    try:
        losses = check_losses(workers, 1e-4)
        assert set(losses) == set(DEFAULT_TASKS)
        assert theirs.call("losses") != losses  # the last digits of another encoder
        assert theirs.call("run", 0) > 0
        assert 0 < theirs.call("peak_memory") < 2000
        with pytest.raises(UserError, match="the same batch"):  # it has trained, and ours have not
            check_losses(workers, 1e-4)
        with pytest.raises(UserError, match="random batches: .*no_such_method"):
            theirs.call("no_such_method")
        with pytest.raises(UserError, match="random batches: its process ended"):
            theirs.call("losses")
    finally:
        theirs.close()
    assert not theirs.process.is_alive()


class Louder(Ours):
    """Ours, but for a scale that somebody forgot."""

    def forward(self, task, batch):
        pooled, loss = super().forward(task, batch)
        return pooled, loss * (1.01 if task == "sts" else 1)


def test_a_contender_that_computes_something_else_is_refused(setting, monkeypatch):
    monkeypatch.setattr(workers_module, "Worker", LocalWorker)
    options = {"precision": "fp32", "grad_method": "sum"}
    table = {"a": partial(Ours, **options), "b": partial(Louder, **options)}
    with start_workers(table, setting) as workers:
        loss = workers["a"].call("losses")["sts"]
        with pytest.raises(UserError, match="^b: its sts loss is .*, that of a ") as error:
            check_losses(workers, 1e-4)
        found = [float(text) for text in re.findall(r"\d+\.\d{6}", str(error.value))]
        assert found == pytest.approx([1.01 * loss, loss], abs=1e-6)
        workers["b"].contender.forward = lambda task, batch: (None, torch.tensor(torch.nan))
        with pytest.raises(UserError, match="loss is nan"):
            check_losses(workers, 1e-4)


def test_runs_at_once_are_started_together_and_the_mean_counts():
    log = []

    class Logged:
        def __init__(self, name, seconds):
            self.name, self.seconds = name, seconds

        def call(self, method):
            log.append((self.name, method))

        def send(self, method):
            log.append((self.name, method))

        def receive(self):
            log.append((self.name, "received"))
            return self.seconds

    a, b = Logged("a", 1.0), Logged("b", 2.0)
    assert race_groups({"alone": [a], "both": [a, b]}, rounds=2, seed=0) == {
        "alone": [1.0, 1.0],
        "both": [1.5, 1.5],
    }
    assert log[:2] == [("a", "warm_up"), ("b", "warm_up")]
    both = [("a", "run_all"), ("b", "run_all"), ("a", "received"), ("b", "received")]
    assert sum(log[i : i + 4] == both for i in range(len(log))) == 2


def test_pairs_are_taken_step_by_step_in_either_order_and_an_outlier_does_not_count():
    log = []

    class Slowed:
        def __init__(self, name, factor):
            self.name, self.factor = name, factor

        def call(self, method, step=0):
            log.append((self.name, step))
            drift = (len(log) + 1) // 2 if len(log) != 5 else 1000  # two warm-ups, then pairs
            return self.factor * drift

    ratios = race_pair(Slowed("a", 1.02), Slowed("b", 1.0), rounds=2, num_steps=3, seed=0)
    assert ratios == [1.02, 1.02]
    pairs = list(zip(log[2::2], log[3::2], strict=True))
    assert [a[1] for a, _ in pairs] == [b[1] for _, b in pairs] == [0, 1, 2] * (len(pairs) // 3)
    assert {a[0] for a, _ in pairs} == {"a", "b"}


def test_a_changed_environment_is_put_back(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    with changed_environment({"OMP_WAIT_POLICY": None, "GOMP_SPINCOUNT": "7"}):
        assert "OMP_WAIT_POLICY" not in os.environ and os.environ["GOMP_SPINCOUNT"] == "7"
    assert os.environ["OMP_WAIT_POLICY"] == "active" and "GOMP_SPINCOUNT" not in os.environ


def test_rows_without_their_package_are_named(no_peers):
    rows, skipped = installed(STEP)
    assert set(rows) == {name for name in STEP if name.startswith("ours")}
    assert set(skipped) == set(STEP) - set(rows)
    assert skipped["Hugging Face + TorchJD mtl_backward"].startswith("transformers and torchjd not installed")
    assert "torchjd" not in skipped["Hugging Face + textbook PCGrad"]


def test_both_orders_hold_the_same_examples(setting):
    pool = setting.pool
    for task in pool.tasks:
        drawn = [np.concatenate([step[task] for step in pool.orders[order]]) for order in pool.orders]
        assert sorted(drawn[0]) == sorted(drawn[1]) == list(range(8))
    assert pool.num_tokens("bucketed") == pool.num_tokens("random")
    batches = [pool.batches("random", i, "cpu").values() for i in range(pool.num_steps)]
    masks = [batch["attention_mask"] for step in batches for batch in step]
    assert pool.num_tokens("random") == sum(int(mask.sum()) for mask in masks)
    assert pool.num_places("random") == sum(mask.numel() for mask in masks)


def test_the_longest_steps_of_an_epoch(setting):
    tasks, data = setting.pool.tasks, setting.pool.data  # 8 examples of each
    sizes = {"sst": 1, "para": 4, "sts": 8}  # the epoch of sst has eight batches, and the others' go round
    pool = longest_steps(tasks, data, 0, batch_sizes=sizes, num_steps=3, seed=1)
    every = longest_steps(tasks, data, 0, batch_sizes=sizes, num_steps=99, seed=1)
    assert pool.num_steps == 3 and every.num_steps == 8
    places = [
        sum(lengths.size * lengths.max() ** 2 for lengths in every.lengths("longest", i)) for i in range(8)
    ]
    assert places == sorted(places) and places[0] < places[-1]
    for step, expected in zip(pool.orders["longest"], every.orders["longest"][-3:], strict=True):
        assert all(np.array_equal(step[task], expected[task]) for task in tasks)
        assert {task: len(chosen) for task, chosen in step.items()} == sizes


def test_exact_length(setting):
    data = exact_length(setting.pool.data["para"], 7)
    assert data.index.shape == setting.pool.data["para"].index.shape
    batch = data.batch(np.arange(len(data)), pad_token_id=0)
    assert batch["attention_mask"].shape == (2 * len(data), 7) and batch["attention_mask"].all()
    vocab = BertTokenizer.from_pretrained(setting.pretrained).encode("")["input_ids"]
    assert (batch["input_ids"][:, [0, -1]] == torch.tensor(vocab)).all()
    assert not torch.isin(batch["input_ids"][:, 1:-1], torch.tensor(vocab)).any()


# --- arithmetic and page ------------------------------------------------------------------------------------


def test_roofline_worked_by_hand():
    config = BertConfig(hidden_size=2, num_hidden_layers=3, num_attention_heads=1, intermediate_size=5)
    # A layer has 4 * 2 * 2 + 2 * 2 * 5 = 36 weights; word pieces 1 + 4 = 5, their squares 1 + 16 = 17.
    assert step_flops(config, np.array([1, 4])) == 6 * 3 * 36 * 5 + 12 * 3 * 2 * 17
    assert optimizer_bytes(10) == 280
    found = {"precision": "bf16", "limits": {"bf16": 0.5}, "num_steps": 4}
    found["seconds"] = {"ours sum bf16": [4.0, 8.0]}
    assert roofline_share("ours sum {precision}")({"roofline": found}) == [50.0, 25.0]


def test_ratios_are_taken_in_each_round_against_the_fastest_row():
    seconds = {"ours bf16": [1.0, 2.0], "peer bf16": [3.0, 4.0], "peer fp32": [9.0, 9.0]}
    measured = {"step": {"precision": "bf16", "seconds": seconds}}
    assert time_ratio("step", "peer", "ours {precision}")(measured) == [3.0, 2.0]
    assert time_ratio("step", "peer {precision}", "nobody")(measured) is None
    assert time_ratio("evaluate", "peer", "ours")(measured) is None


def test_the_largest_memory_ratio_counts():
    memory = {"ours bf16": [10.0, 30.0, 44.0], "peer bf16": [20.0, 20.0, 40.0]}
    measured = {"memory": {"precision": "bf16", "memory": memory}}
    assert largest_memory_ratio("peer")(measured) == [1.5]
    assert largest_memory_ratio("skipped")(measured) is None
    assert largest_memory_ratio("peer")({}) is None


def test_targets():
    found = [1.1, 1.2, 0.9]
    for values, goal, verdict in (
        ([1.0, 1.1, 0.9], "at most 1", "met"),
        (found, "at most 1", "missed"),
        (found, "at least 1", "met"),
        (found, None, "-"),
        (None, "at most 1", "-"),
    ):
        row = target_row(Target("text", lambda measured, values=values: values, goal), {})
        assert row[-1] == verdict and ("not measured" in row) == (values is None)


def test_the_page_keeps_what_is_written_by_hand(tmp_path):
    path = tmp_path / "speed.md"
    write_page(path, {})
    assert path.read_text(encoding="utf-8").count("not measured") == len(TARGETS)
    path.write_text(f"old numbers\n{BY_HAND}\n\nWhy: an essay.\n", encoding="utf-8")
    write_page(path, {})
    write_page(path, {})
    text = path.read_text(encoding="utf-8")
    assert text.endswith(f"\n{BY_HAND}\n\nWhy: an essay.\n")
    assert text.count(BY_HAND) == 1 and "old numbers" not in text


# --- the command --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_end_to_end_without_peers(tmp_path, encoder, data_dir, monkeypatch, no_peers, capsys):
    monkeypatch.setattr(workers_module, "Worker", LocalWorker)
    monkeypatch.setattr(speed, "first_step_seconds", lambda args, data_dir: 1.5)
    smaller = {"MATRIX_REPEATS": 1, "MEMORY_ELEMENTS": 8, "MEMORY_REPEATS": 1, "LENGTHS": (8, 512)}
    smaller |= {"NUM_TASKS": (4,), "FRACTIONS": (1.0,), "AGREEMENT_EXAMPLES": 5, "PROFILE_STEPS": 1}
    smaller |= {"SPINNING": {"theirs": "9", "ours": "7"}}
    smaller |= {"LONG_BATCHES": {"sst": 2, "para": 3, "sts": 2}, "LONG_STEPS": 2}
    smaller["BASE_CONFIG"] = make_config(1)  # bert-base itself takes gigabytes and minutes
    for name, value in smaller.items():
        monkeypatch.setattr(speed, name, value)
    monkeypatch.setattr(contenders, "WARM_UP_EXAMPLES", 5)
    flags = ["--data_dir", str(data_dir), "--pretrained", str(encoder), "--results_dir", str(tmp_path)]
    flags += ["--repeats", "2", "--num_batches", "1", "--batch_size", "3", "--num_threads", "1"]
    flags += ["--eval_max_examples", "9", "--precision", "fp32"]
    assert main(flags) == 0
    page, measured = (tmp_path / "speed.md").read_text(), json.loads((tmp_path / "speed.json").read_text())
    assert list(measured) == list(speed.SECTIONS) == list(SHOW)
    skipped = "skipped: Hugging Face sum, random batches fp32: transformers not installed"
    assert skipped in capsys.readouterr().out
    assert "Not measured: Hugging Face + TorchJD mtl_backward fp32: transformers and torchjd" in page
    assert len(measured["step"]["seconds"]["ours pcgrad fp32"]) == 2
    memory, sharing = measured["memory"], measured["sharing"]
    assert list(memory["memory"]) == ["ours fp32"] and len(memory["steps"]) == 2
    assert memory["steps"][0]["para"].startswith("3 x ")  # joint pairs: three sequences, not six
    assert [len(ratios) for ratios in sharing["pairs"].values()] == [2, 2]
    assert len(sharing["seconds"]) == 4 and {len(values) for values in sharing["seconds"].values()} == {2}
    scaling = measured["scaling"]
    assert list(scaling["by_tasks"]) == ["4"] and list(scaling["by_length"]) == ["8"]
    assert scaling["by_length"]["8"]["tokens"] == 8 * 1 * 3 * (
        1 + 2 + 2
    )  # length, steps, examples, sentences of the three tasks
    row = "| seconds from start to the first step, not the first time | 1.5 (1.5 to 1.5) | at most 5 | met |"
    assert row in page

    assert main(["start", *flags, "--seed", "7"]) == 0
    again = json.loads((tmp_path / "speed.json").read_text())
    assert again["start"]["command"][3] == "start" and again["step"] == measured["step"]


def test_errors_are_one_line(encoder, data_dir, tmp_path, refused):
    places = ["--data_dir", str(data_dir), "--pretrained", str(encoder), "--results_dir", str(tmp_path)]
    for flags, message in (
        ("nonsense", "section is 'nonsense'; expected some of step, "),
        ("step --num_batches 99999", "--num_batches 99999: sst has"),
        ("step --data_dir nowhere", "nowhere"),
    ):
        assert message in refused(main, [*places, *flags.split()])


def test_files_that_are_not_ours_are_kept(tmp_path, monkeypatch, refused):
    monkeypatch.setattr(speed, "Bench", None)  # nothing is read or measured before
    for name, text in (
        ("speed.md", "My notes.\n"),
        ("speed.json", '{"kmh": 130}'),
        ("speed.json", "my notes"),
    ):
        path = tmp_path / name
        path.write_text(text)
        assert str(path) in refused(main, ["step", "--results_dir", str(tmp_path)])
        assert path.read_text() == text
        path.unlink()


def test_first_step_is_seen_in_the_output_and_a_failure_is_quoted(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "ROOT", tmp_path)
    script = tmp_path / "multitask_classifier.py"
    args = get_args(["--num_threads", "1"])
    script.write_text("import time\nprint('step 1/1  loss')\ntime.sleep(60)\n")
    assert 0 < first_step_seconds(args, "data") < 30
    script.write_text("import sys\nsys.exit('error: no data in ' + sys.argv[2])\n")
    with pytest.raises(UserError, match="before its first step: error: no data in nowhere"):
        first_step_seconds(args, "nowhere")
