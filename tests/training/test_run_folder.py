"""The run folder: its settings, its state, what starting anew removes, and what is gone on from."""

import json
import math
import subprocess
from dataclasses import fields
from itertools import product

import pytest
import torch

from kernels.fused import PLAIN, Kernels
from support.errors import UserError
from support.ranks import Ranks
from tests.tiny import make_sst_model, refusal
from training import run_folder
from training.checkpoint import add_moments, write_checkpoint
from training.loss_scale import LossScale
from training.run_folder import (
    Run,
    RunState,
    begin_run,
    changed_flags,
    check_free,
    describe_code,
    find_last,
    format_changed_circumstances,
    read_args_file,
    write_args,
)
from training.settings import LoopSettings, OptimizerSettings, OutputSettings, RunSettings, StepSettings


def settings(folder, precision="fp32", accumulates=False, compiled=False):
    """Of a run with one task; what a test does not look at is None."""

    def fill(kind, **values):
        return kind(**{each.name: None for each in fields(kind)} | values)

    rates = {"lr": 0.1, "head_lr": 0.1, "weight_decay": 0.0, "rectify": False}
    kinds = {"precision": precision, "accumulates": accumulates, "compiled": compiled}
    optimizer = OptimizerSettings(**rates, **kinds)
    return fill(
        RunSettings,
        step=StepSettings(seed=0),
        optimizer=optimizer,
        loop=fill(LoopSettings, tasks=("sst",)),
        output=fill(OutputSettings, folder=folder, keep_last=1),
        device="cpu",
        flags={"given": {}},
    )


def test_run_trains_with_the_kernels_and_types_that_its_settings_say(tokenizer, tmp_path, monkeypatch):
    kernels = Kernels(adamw_update=lambda *args: None)
    monkeypatch.setattr(run_folder, "compile_kernels", lambda: kernels)
    for compiled, expected in ((True, kernels), (False, PLAIN)):
        run = Run(settings(tmp_path, compiled=compiled), make_sst_model(tokenizer), tokenizer)
        assert run.memory.kernels is expected and run.optimizer.update is expected.adamw_update
    types = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    for precision, accumulates in product(types, (False, True)):
        run = Run(settings(tmp_path, precision, accumulates), make_sst_model(tokenizer), tokenizer)
        copy = types[precision]
        assert getattr(run.memory.weight_copy, "dtype", None) == copy
        # Sums of several batches are kept in float32.
        expected = copy if copy and not accumulates else torch.float32
        assert run.memory.matrix_grads.dtype == expected
        assert run.state.loss_scale == (LossScale() if precision == "fp16" else None)


# --- args.json ------------------------------------------------------------------------------------


def test_write_args_keeps_every_command(tmp_path, monkeypatch):
    before = None
    for command in (["start"], ["go on"]):
        monkeypatch.setattr(run_folder.sys, "argv", command)
        facts = {"data": {"train": "facts"}}
        before = json.loads(write_args(tmp_path, {"seed": 5}, facts, device="cpu", before=before))
    stored = json.loads((tmp_path / "args.json").read_text())
    assert stored == before and stored["earlier"] == []
    assert stored["commands"] == [["start"], ["go on"]]
    assert stored["args"]["seed"] == 5 and stored["data"] == {"train": "facts"}
    assert stored["versions"]["torch"] == torch.__version__
    assert set(stored["versions"]) == {"python", "numpy", "torch", "safetensors", "tokenizers"}
    assert stored["machine"]["threads"] == torch.get_num_threads() and stored["machine"]["processor"]


def test_other_circumstances_are_kept_and_warned_about(tmp_path, monkeypatch):
    first = json.loads(write_args(tmp_path, {}, {"data": {}}, device="cpu"))
    assert format_changed_circumstances(first, "cpu") is None
    monkeypatch.setattr(run_folder.torch, "__version__", "9.9")
    warning = format_changed_circumstances(first, "cpu")
    assert f"torch was {first['versions']['torch']}, is 9.9" in warning
    second = json.loads(write_args(tmp_path, {}, {"data": {}}, device="cpu", before=first))
    assert second["versions"]["torch"] == "9.9" and second["earlier"][0]["versions"] == first["versions"]


def git(folder, *arguments):
    own = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *own, *arguments], check=True, capture_output=True)


def test_state_of_the_code(tmp_path, monkeypatch):
    try:
        git(tmp_path, "init")
    except FileNotFoundError:
        pytest.skip("no git here")
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "b.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    clean = describe_code(tmp_path)
    assert len(clean["commit"]) == 40 and clean["changed"] == []
    (tmp_path / "b.py").write_text("2")
    (tmp_path / "data.csv").write_text("not the code's")
    assert describe_code(tmp_path) == clean | {"changed": ["b.py"]}
    (tmp_path / "inner").mkdir()
    assert describe_code(tmp_path / "inner") is None  # a copy inside another project
    monkeypatch.setenv("PATH", "")
    assert describe_code(tmp_path) is None


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"args": 1}', '{"args": {}, "commands": {}}', '{"args": {}, "commands": [], "data": 1}'],
)
def test_damaged_args_name_the_copy(tmp_path, text):
    (tmp_path / "args.json").write_text(text)
    with pytest.raises(UserError, match=r"args\.json: "):
        read_args_file(tmp_path)
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / "args.json").write_text("{}")
    with pytest.raises(UserError, match=r"last/args\.json is a copy"):
        read_args_file(tmp_path)
    (tmp_path / "args.json").unlink()
    with pytest.raises(UserError, match=r"no run there.*last/args\.json is a copy"):
        read_args_file(tmp_path)


def test_changed_flags_are_named():
    """Flags that only one side knows are from another version; a tuple is a list in JSON."""
    stored = {"seed": 1, "lr": 0.1, "max_steps": 5, "tasks": ["sst"], "given": {}, "old_flag": 1}
    flags = {"seed": 1, "lr": 0.2, "max_steps": 9, "tasks": ("sst",), "given": {"lr": 0.2}, "new_flag": 2}
    assert changed_flags(stored, flags, {"max_steps"}) == ["--lr was 0.1, is 0.2"]


# --- starting anew, going on ----------------------------------------------------------------------


def write_step(folder, step):
    write_checkpoint(folder, lambda new: (new / "state.json").write_text(f'{{"step": {step}}}'))


OUTPUTS = (
    "args.json report.md report.html report/sst.png data_report.json metrics.jsonl scores.json curves.png"
)


def test_overwrite_removes_the_old_run_and_nothing_else(tmp_path):
    """A run that ended before its first checkpoint may be started again without it."""
    for name in ("mine", "report", "predictions"):
        (tmp_path / name).mkdir()
    for name in OUTPUTS.split():
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match="holds args.json, and is no run's folder"):
        check_free(tmp_path, True, "minilm")
    write_args(tmp_path, {"given": {}}, {"data": {}}, device="cpu")
    check_free(tmp_path, False, "minilm")
    for name in ("best", "last", "last.1", ".last.new", "best.1", "last.old"):  # the last is somebody's copy
        (tmp_path / name).mkdir()
    for name in ("sst-dev-output.csv", "sts-test-out.csv", "mine.csv"):
        (tmp_path / "predictions" / name).write_text("")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds a run already"):
        check_free(tmp_path, False, "minilm")
    with pytest.raises(UserError, match="best: is a checkpoint of the run that --overwrite would remove"):
        check_free(tmp_path, True, str(tmp_path / "mine" / ".." / "best"))
    for copy in ("mine", "last.old"):
        check_free(tmp_path, True, str(tmp_path / copy))
    text = begin_run(settings(tmp_path), {"data": {}})
    left = " ".join(sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")))
    assert left == "args.json last.old mine notes.txt predictions predictions/mine.csv report"
    assert (tmp_path / "args.json").read_text() == text and len(json.loads(text)["commands"]) == 1


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "last", "report/mine.png", "predictions/sst-dev-output.csv"]
)
def test_folder_with_files_of_other_origin_in_a_runs_places_is_not_taken(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(UserError, match="is no run's folder; expected a new one"):
        check_free(tmp_path, True, "minilm")


def test_folder_of_another_script_or_with_checkpoints_alone_is_not_taken(tmp_path):
    write_step(tmp_path / "run" / "last", 3)
    with pytest.raises(UserError, match="holds a run already"):
        check_free(tmp_path / "run", False, "minilm")
    write_args(tmp_path, {"seed": 1}, {"data": "of pretrain_mlm.py"}, device="cpu")
    with pytest.raises(UserError, match="another script's"):
        check_free(tmp_path, True, "minilm")


@pytest.mark.parametrize(
    ("checkpoints", "scores", "expected"),
    [
        ({}, False, None),  # killed before its first checkpoint
        ({"best": 5}, False, None),  # killed between its first best/ and its first last/
        ({"best": 10}, False, "no checkpoint"),  # last/ was there once
        ({"best": 5}, True, "no checkpoint"),  # a finished run whose last/ was removed
        ({"last": 5, "best": 5}, True, "last"),
    ],
)
def test_where_a_run_goes_on(tmp_path, checkpoints, scores, expected):
    for name, step in checkpoints.items():
        write_step(tmp_path / name, step)
    if scores:
        (tmp_path / "scores.json").touch()
    if expected == "no checkpoint":
        with pytest.raises(UserError, match="no checkpoint there"):
            find_last(tmp_path, 5)
    else:
        assert find_last(tmp_path, 5) == (expected and tmp_path / expected)


# Name in state.json -> values that it cannot have.
BAD_VALUES = {
    "step": (-1, True, 1.0, 10**30),
    "task_batches": ({"para": 1}, [1], {"sst": "1"}),
    "optimizer_steps": ([1, -1], None),
    "cosine_ema": ([[1.0], [2.0]], "x"),
    "best_score": ("0.5",),
    "best_step": (-3,),
    "window": ([3],),
    "learned": (
        [1],
        {"a": [[1.0], [2.0, 3.0]]},
        {"a": 1.0},
        {"a": [1.0, 2.0]},
        {"a": [math.nan]},
        {"a": ["x"]},
    ),
    "sampler": ({"a": [1.0, 2.0]}, {"a": [[1.0]]}, {"a": 1.0}),
    "log_lines": (None,),
    "loss_scale": ({"scale": 3, "good_steps": 0, "overflow_steps": 0},),
}


NEWER = ("learned", "sampler", "loss_scale")  # older states have none


def test_state_of_another_kind_is_refused():
    fresh = RunState(batches_drawn={"sst": 0}).to_json()
    good = fresh | {"step": 3, "task_batches": {"sst": 4}, "optimizer_steps": [3, 3], "cosine_ema": [[1.0]]}
    good |= {"learned": {"grad_method.weights": [[1.0], [0.5]], "age": [2.0]}, "sampler": {"a": [0.1]}}
    good |= {"best_score": -0.1, "best_step": 2, "window": [{}], "log_lines": 2}
    for values in (fresh, good):
        assert RunState.from_json(values, ["sst"]).to_json() == values
    bad = [(name, good | {name: value}) for name, values in BAD_VALUES.items() for value in values]
    needed = [name for name in good if name not in NEWER]
    bad += [(name, {key: value for key, value in good.items() if key != name}) for name in needed]
    for name, values in bad:
        with pytest.raises(ValueError, match=name):
            RunState.from_json(values, ["sst"])


def test_state_survives_json_to_the_bit():
    """What older runs have in state.json is read by the same names."""
    ema = torch.rand(3, 3, generator=torch.Generator().manual_seed(0))
    state = RunState(batches_drawn={"sst": 1, "para": 2, "sts": 3}, cosine_ema=ema, best_score=0.1)
    state.learned = {"weights": torch.rand(2, 3, dtype=torch.float64) / 3}
    values = json.loads(json.dumps(state.to_json()))
    names = "step evaluated task_batches tokens bad_steps skipped_steps cosine_ema learned sampler best_score"
    names += " best_step evals_without_gain optimizer_steps log_lines window loss_scale"
    assert list(values) == names.split()
    older = {name: value for name, value in values.items() if name not in NEWER}
    found = RunState.from_json(older, ["sst", "para", "sts"])
    assert found.learned == found.sampler == {} and found.loss_scale is None
    state.loss_scale = LossScale(2**13, 1234, 3)
    found = RunState.from_json(json.loads(json.dumps(state.to_json())), ["sst", "para", "sts"])
    assert found.loss_scale == LossScale(2**13, 1234, 3)
    assert torch.equal(found.cosine_ema, ema)
    assert torch.equal(found.learned["weights"], state.learned["weights"])


def test_loss_scale_has_to_fit_the_precision(tokenizer, tmp_path):
    for precision, other in (("fp16", "fp32"), ("fp32", "fp16")):
        folder = tmp_path / precision
        Run(settings(folder, precision), make_sst_model(tokenizer), tokenizer).save_last()
        run = Run(settings(folder, other), make_sst_model(tokenizer), tokenizer)
        assert "'loss_scale' is of another precision" in refusal(run.load_last, folder / "last")


def test_weights_that_are_not_finite_do_not_replace_good_ones(tokenizer, tmp_path):
    run = Run(settings(tmp_path), make_sst_model(tokenizer), tokenizer)
    run.save_last()
    run.state.step = 7
    run.memory.data[3] = float("inf")
    with pytest.raises(UserError, match=r"step 7: the weights are not finite.*--lr.*last still holds step 0"):
        run.save_last()
    assert json.loads((tmp_path / "last" / "state.json").read_text())["step"] == 0


def test_lost_lines_of_the_log_are_warned_about(tokenizer, tmp_path, capsys):
    run = Run(settings(tmp_path), make_sst_model(tokenizer), tokenizer)
    for number in range(3):
        run.log({"step": number})
    run.log_file.write_bytes(run.log_file.read_bytes() + b'{"step": 3}\n{"st')
    run.cut_log()
    assert run.log_file.read_text().count("\n") == 3 and not capsys.readouterr().out
    run.log_file.write_bytes(run.log_file.read_bytes()[:-3])
    run.cut_log()
    assert run.log_file.read_text() == '{"step": 0}\n{"step": 1}\n'
    assert "1 lines have been lost" in capsys.readouterr().out


def test_ranks_go_on_from_the_first_ones_state_in_place(tokenizer, tmp_path):
    """The training loop holds the state, and captured steps the moments."""

    class SecondRank(Ranks):
        def from_first(self, work):
            return first.state.to_json() if work == run.state.to_json else (4, None)

        def copy_first(self, tensor):
            tensor.fill_(7)

    first, run = (Run(settings(tmp_path), make_sst_model(tokenizer), tokenizer) for _ in range(2))
    first.state.step, first.state.optimizer_steps = 5, [3] * len(first.memory.flat_params)
    param = next(iter(run.memory.flat_params.values()))
    add_moments(run.optimizer, param, 2)
    state, moments = run.state, run.optimizer.state[param]
    run.ranks = SecondRank(1, 2)
    run.follow_first()
    assert run.state is state and state.step == 5 and (run.memory.data == 7).all()
    assert run.optimizer.state[param] is moments and moments["step"] == 3 and (moments["exp_avg"] == 7).all()
