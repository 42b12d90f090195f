"""Checkpoints are whole or not there, and a cut-off replacement never loses the last good one."""

import json
import shutil
from argparse import Namespace

import pytest
import torch

import checkpoint
from bert import BertModel
from checkpoint import Run, copy_tensors, load_model, load_state, load_tensors, recover, save_checkpoint
from compiled import PLAIN, Passes
from config import TASKS, UserError
from multitask_bert import MultitaskBERT
from tests.tiny import make_config, make_encoder
from tokenizer import BertTokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return BertTokenizer.from_pretrained(make_encoder(tmp_path_factory.mktemp("encoder")))


def make_model(tokenizer, seed=0):
    torch.manual_seed(seed)
    return MultitaskBERT(BertModel(make_config(len(tokenizer))), {"sst": TASKS["sst"]}, {"sst": "single"})


def same(a, b):
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def settings(folder, **changes):
    options = {"precision": "fp32", "grad_accum": 1, "compile": "off", "lr": 0.1, "head_lr": 0.1}
    options |= {"weight_decay": 0.0, "rectify": False, "tasks": ("sst",), "output_dir": str(folder)}
    return Namespace(**options | changes)


def test_run_trains_with_the_passes_and_types_that_its_flags_say(tokenizer, tmp_path, monkeypatch):
    passes = Passes(adamw_update=lambda *args: None)
    monkeypatch.setattr(checkpoint, "compile_passes", lambda: passes)
    for compiled, expected in (("on", passes), ("off", PLAIN)):
        run = Run(settings(tmp_path, compile=compiled), make_model(tokenizer), tokenizer)
        assert run.memory.passes is expected and run.optimizer.update is expected.adamw_update
    types = {("fp32", 1): None, ("bf16", 1): torch.bfloat16, ("bf16", 2): torch.bfloat16}
    for (precision, grad_accum), copy in types.items():
        args = settings(tmp_path, precision=precision, grad_accum=grad_accum)
        memory = Run(args, make_model(tokenizer), tokenizer).memory
        assert getattr(memory.weight_copy, "dtype", None) == copy
        # Sums of several batches are kept in float32.
        assert memory.matrix_grads.dtype == (torch.bfloat16 if copy and grad_accum == 1 else torch.float32)


def test_round_trip(tokenizer, tmp_path):
    model, other = make_model(tokenizer), make_model(tokenizer, seed=1)
    state = {"step": 3, "cosine_ema": [[0.1, -1 / 3]], "best_score": None}
    save_checkpoint(tmp_path / "last", model, tokenizer, {"moments": torch.arange(3.0)}, state)
    assert load_state(tmp_path / "last") == state  # JSON keeps every bit of a float
    assert not same(model, other)
    load_model(tmp_path / "last", other)
    assert same(model, other)
    assert load_tensors(tmp_path / "last" / "optimizer.safetensors")["moments"].tolist() == [0, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_checkpoint_is_an_encoder_folder(tokenizer, tmp_path):
    model = make_model(tokenizer)
    save_checkpoint(tmp_path / "best", model, tokenizer, {}, {})
    encoder = BertModel.from_pretrained(tmp_path / "best")
    assert same(model.bert, encoder)
    assert "heads.sst" in encoder.load_report  # named as not used
    assert not (tmp_path / "best" / "optimizer.safetensors").exists()


@pytest.mark.parametrize("failing_call", range(6))
def test_failure_at_any_moment_leaves_a_good_checkpoint(tokenizer, tmp_path, monkeypatch, failing_call):
    """Let the n-th file operation of a second save fail, and find the first or the second checkpoint."""
    folder = tmp_path / "last"
    save_checkpoint(folder, make_model(tokenizer), tokenizer, {}, {"step": 1})
    calls = iter(range(100))

    def failing(real):
        def call(*args, **options):
            if next(calls) == failing_call:
                raise KeyboardInterrupt
            return real(*args, **options)

        return call

    for owner, name in [(checkpoint, "save_file"), (checkpoint.os, "replace"), (shutil, "rmtree")]:
        monkeypatch.setattr(owner, name, failing(getattr(owner, name)))
    try:
        save_checkpoint(folder, make_model(tokenizer, seed=1), tokenizer, {}, {"step": 2})
    except KeyboardInterrupt:
        pass
    monkeypatch.undo()
    step = load_state(folder)["step"]
    model = make_model(tokenizer, seed=2)
    load_model(folder, model)
    assert same(model, make_model(tokenizer, seed=step - 1))  # weights and state belong together
    save_checkpoint(folder, make_model(tokenizer), tokenizer, {}, {"step": 3})
    assert load_state(folder)["step"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["last"]  # nothing is left over


def test_recover_between_the_two_renames(tmp_path):
    (tmp_path / "last.old").mkdir()
    (tmp_path / "last.old" / "state.json").write_text('{"step": 7}')
    recover(tmp_path / "last")
    assert load_state(tmp_path / "last") == {"step": 7}


@pytest.mark.parametrize("damage", ["no folder", "no state", "broken state"])
def test_missing_or_damaged_state(tmp_path, damage):
    folder = tmp_path / "last"
    if damage != "no folder":
        folder.mkdir()
    if damage == "broken state":
        (folder / "state.json").write_text("{")
    with pytest.raises(UserError, match="last"):
        load_state(folder)


def test_damaged_tensors(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_tensors(path)
    with pytest.raises(UserError, match="missing"):
        load_tensors(tmp_path / "nowhere")


@pytest.mark.parametrize("source", [{}, {"a": torch.zeros(3)}, {"a": torch.zeros(2), "b": torch.zeros(1)}])
def test_copy_tensors_refuses_what_does_not_fit(tmp_path, source):
    with pytest.raises(UserError, match="does not fit"):
        copy_tensors(source, {"a": torch.zeros(2)}, tmp_path)


def test_copy_tensors_keeps_views(tmp_path):
    memory = torch.zeros(4)
    copy_tensors({"a": torch.ones(2)}, {"a": memory[1:3]}, tmp_path)
    assert memory.tolist() == [0, 1, 1, 0]


def test_overwrite_removes_the_old_run_and_nothing_else(tmp_path):
    for name in ("best", "last", "mine", "report"):
        (tmp_path / name).mkdir()
    for name in ("args.json", "report.md", "report.html", "report/sst.png"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "predictions").mkdir()
    for name in ("sst-dev-output.csv", "sts-test-out.csv", "mine.csv"):
        (tmp_path / "predictions" / name).write_text("")
    with pytest.raises(UserError, match="holds a run already"):
        checkpoint.prepare_folder(Namespace(output_dir=str(tmp_path), overwrite=False))
    checkpoint.prepare_folder(Namespace(output_dir=str(tmp_path), overwrite=True))
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "notes.txt", "predictions", "report"}
    assert not list((tmp_path / "report").iterdir())
    assert [path.name for path in (tmp_path / "predictions").iterdir()] == ["mine.csv"]


def test_run_that_ended_before_its_first_checkpoint_may_be_started_again(tmp_path):
    for name in ("args.json", "metrics.jsonl"):
        (tmp_path / name).write_text("{}")
    checkpoint.prepare_folder(Namespace(output_dir=str(tmp_path), overwrite=False))
    assert not list(tmp_path.iterdir())  # lines of its log would otherwise stand in the new one


def test_write_args_keeps_every_command(tmp_path, monkeypatch):
    args = Namespace(output_dir=str(tmp_path), seed=5, device="cpu")
    for command in (["start"], ["go on"]):
        monkeypatch.setattr(checkpoint.sys, "argv", command)
        checkpoint.write_args(args, {"data": "facts"})
    stored = json.loads((tmp_path / "args.json").read_text())
    assert stored["commands"] == [["start"], ["go on"]]
    assert stored["args"]["seed"] == 5 and stored["data"] == "facts"
    assert stored["versions"]["torch"] == torch.__version__
    assert stored["machine"]["threads"] == torch.get_num_threads() and stored["machine"]["processor"]
