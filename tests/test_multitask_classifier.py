"""Runs of the command line from end to end: stopped, damaged, resumed with equal bits, and their files."""

import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import multitask_classifier
from bert import BertModel
from config import DEFAULT_TASKS, TASKS
from datasets import TaskData, read_rows
from evaluation import TASK_KINDS, read_predictions, summarise
from heads import PAIR_HEADS, MultitaskBERT
from multitask_classifier import main
from reporting.read_run import read_metrics
from support.files import ROOT, lock_folder
from support.seeds import make_seed
from tests.tiny import make_config, make_data, make_encoder
from training.metrics import average
from training.progress import Progress
from training.run_folder import Run

TINY = "--batch_size 4 --device cpu --lr 0.003 --head_lr 0.01 --log_every 2"


@pytest.fixture
def no_plot(monkeypatch):
    monkeypatch.setattr(multitask_classifier, "plot_run", lambda folder: None)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    make_encoder(folder / "encoder")
    make_data(folder / "data")
    return folder


def test_make_seed_is_stable_and_sensitive():
    assert make_seed(1, 2, 3) == make_seed(1, 2, 3)
    assert (
        len(
            {
                make_seed(*numbers)
                for numbers in [(1, 2, 3), (1, 3, 2), (1, 2), (0, 1, 2), (1, 2, 0), (1, 2, 0, 0)]
            }
        )
        == 6
    )
    assert 0 <= make_seed(5) < 2**63


def test_average_by_hand():
    records = [
        {
            "loss": {"a": 1.0, "b": 2.0},
            "task_grad_norm": {"a": 1.0, "b": 1.0},
            "grad_weight": {"a": 1.0, "b": 1.0},
            "cosine": {"a-b": -0.5},
            "layer_cosine": {"embeddings": {"a-b": -0.5}, "layer.0": {"a-b": 0.25}},
            "grad_norm": 2.0,
        },
        {
            "loss": {"a": 3.0},
            "task_grad_norm": {"a": 3.0},
            "grad_weight": {"a": 1.0},
            "cosine": {},
            "layer_cosine": {"embeddings": {}, "layer.0": {}},
            "grad_norm": 4.0,
        },
        {
            "loss": {"a": 2.0, "b": 2.0},
            "task_grad_norm": {"a": 2.0, "b": 1.0},
            "grad_weight": {"a": 1.0, "b": 1.0},
            "cosine": {"a-b": -0.5},
            "layer_cosine": {"embeddings": {"a-b": 0.0}, "layer.0": {"a-b": -0.75}},
            "grad_norm": 3.0,
        },
    ]
    averaged = average(records)
    assert averaged["loss"] == {"a": 2.0, "b": 2.0}
    assert averaged["grad_norm"] == 3.0
    assert averaged["cosine"] == {"a-b": -0.5} and averaged["conflict"] == {"a-b": 1.0}
    assert averaged["layer_cosine"] == {"embeddings": {"a-b": -0.25}, "layer.0": {"a-b": -0.25}}
    assert averaged["layer_conflict"] == {"embeddings": {"a-b": 0.5}, "layer.0": {"a-b": 0.5}}


def command(place, name, extra=""):
    flags = f"--pretrained {place}/encoder --data_dir {place}/data --output_dir {place}/{name} {TINY} {extra}"
    return flags.split()


def read_run(folder):
    """Everything a run leaves that must be the same bits; speed is not, nor how often it was saved."""
    differ = ("args.json", "SHA256SUMS", "metrics.jsonl", "curves.png")
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in differ and path.parent.name != "last.1"
    }
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in metrics:
        line.pop("tokens_per_second", None)
    return files, metrics


RESUME_SETTINGS = [
    "",
    "--sampler annealed --grad_method gradvac --precision bf16 --schedule cosine",
    "--sampler proportional --grad_accum 2 --sts_head cross --para_head cosine --rectify --patience 9",
    "--precision fp16 --sampler sqrt --task_weights sts=5",  # so large that the first steps overflow
]


@pytest.mark.parametrize("number", range(len(RESUME_SETTINGS)))
def test_resumed_run_has_the_same_bits(place, no_plot, monkeypatch, number, capsys):
    settings = f"--max_steps 9 --eval_every 4 {RESUME_SETTINGS[number]}"
    assert main(command(place, f"whole{number}", settings)) == 0

    real_step = multitask_classifier.train_step

    def interrupted_step(*args, step, **options):
        if step == 5:  # in the sixth step, not at an evaluation, with half a log interval open
            signal.raise_signal(signal.SIGTERM)
        return real_step(*args, step=step, **options)

    monkeypatch.setattr(multitask_classifier, "train_step", interrupted_step)
    with pytest.raises(SystemExit) as end:
        main(command(place, f"parts{number}", settings))
    assert end.value.code == 128 + signal.SIGTERM
    assert "--resume" in capsys.readouterr().out
    monkeypatch.setattr(multitask_classifier, "train_step", real_step)
    with open(place / f"parts{number}" / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "loss": "written after the checkpoint, to be dropped"}\n{"step": 3, "lo')
    assert main(["--output_dir", str(place / f"parts{number}"), "--resume"]) == 0
    assert read_run(place / f"whole{number}") == read_run(place / f"parts{number}")


def signal_in(monkeypatch, name, number, times=1, call_number=3):
    """Let a signal come when a function of the training loop is called, for the third time or another."""
    real, calls = getattr(multitask_classifier, name), iter(range(1, 100))

    def call(*args, **options):
        if next(calls) == call_number:
            for _ in range(times):
                signal.raise_signal(number)
        return real(*args, **options)

    monkeypatch.setattr(multitask_classifier, name, call)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    ("where", "saved"), [("train_step", 3), ("evaluate", 9), ("write_predictions", 9), ("read_data", None)]
)
def test_signal_at_any_time_saves_what_there_is(place, no_plot, capsys, where, saved, number):
    """Also in an evaluation, which is given up at once and comes first when the run goes on."""
    settings = "--max_steps 9 --eval_every 4"
    if not (place / "undisturbed").exists():
        assert main(command(place, "undisturbed", settings)) == 0
    name = f"{where}{number}"
    with pytest.MonkeyPatch.context() as patch:
        if where == "write_predictions":
            patch.setattr(
                multitask_classifier, "format_predictions", lambda *args: signal.raise_signal(number)
            )
        else:
            signal_in(patch, where, number, call_number=1 if where == "read_data" else 3)
        try:
            code = main(command(place, name, settings))
        except SystemExit as end:
            code = end.code
    assert code == 128 + number
    printed = capsys.readouterr()
    folder = place / name
    assert not (folder / ".lock").exists()
    if saved is None:
        assert not folder.exists()
        return
    assert f"--output_dir {folder} --resume" in printed.out
    assert json.loads((folder / "last" / "state.json").read_text())["step"] == saved
    assert main(["--output_dir", str(folder), "--resume"]) == 0
    assert read_run(folder) == read_run(place / "undisturbed")


def test_second_signal_ends_at_once(place):
    """In a process of its own, which the second one kills."""
    code = f"""
import signal, sys
import pytest
import multitask_classifier
from tests.test_multitask_classifier import signal_in
signal_in(pytest.MonkeyPatch(), "train_step", signal.SIGTERM, times=2)
multitask_classifier.main({command(place, "twice", "--max_steps 9")!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=300, check=False
    )
    assert done.returncode == -signal.SIGTERM and not done.stderr
    folder = place / "twice"
    assert json.loads((folder / "last" / "state.json").read_text())["step"] == 2
    assert main(["--output_dir", str(folder), "--resume", "--max_steps", "3"]) == 0


def test_signal_before_the_first_step(place, no_plot):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multitask_classifier, "print_plan", lambda *args: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit):
            main(command(place, "step0", "--max_steps 4"))
    assert json.loads((place / "step0" / "last" / "state.json").read_text())["step"] == 0
    assert main(["--output_dir", str(place / "step0"), "--resume"]) == 0
    assert main(command(place, "step0_whole", "--max_steps 4")) == 0
    assert read_run(place / "step0") == read_run(place / "step0_whole")


def test_run_killed_before_its_first_checkpoint_goes_on_from_the_start(place, no_plot, capsys):
    settings = "--max_steps 4 --eval_every 2"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "save_last", interrupt)  # best/ is there by then
        assert main(command(place, "early", settings)) == 130
    assert (place / "early" / "best").exists() and not (place / "early" / "last").exists()
    assert main(["--output_dir", str(place / "early"), "--resume"]) == 0
    assert "at step 0" in capsys.readouterr().out
    assert main(command(place, "early_whole", settings)) == 0
    assert read_run(place / "early") == read_run(place / "early_whole")


def interrupt(*args, **options):
    raise KeyboardInterrupt


def test_damaged_checkpoint_falls_back_to_the_one_before(place, no_plot, capsys):
    settings = "--max_steps 6 --eval_every 2"
    assert main(command(place, "sound", settings)) == 0
    assert main(command(place, "damaged", settings)) == 0
    folder = place / "damaged"
    (folder / "scores.json").unlink()
    path = folder / "last" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    capsys.readouterr()
    assert main(["--output_dir", str(folder), "--resume"]) == 0
    printed = capsys.readouterr().out
    assert f"warning: {path}: damaged" in printed and f"going on with {folder / 'last.1'}" in printed
    assert "at step 4" in printed
    assert read_run(folder) == read_run(place / "sound")


def test_kill_before_old_checkpoints_were_removed(place, no_plot):
    assert main(command(place, "surplus", "--max_steps 4 --eval_every 1")) == 0
    folder = place / "surplus"
    for name in ("last.2", "last.3", "best.1"):
        shutil.copytree(folder / name.partition(".")[0], folder / name)
    assert main(["--output_dir", str(folder), "--resume"]) == 0
    found = {path.name for path in folder.iterdir() if path.name.startswith(("last", "best"))}
    assert found == {"last", "last.1", "best"}


def test_nothing_undamaged_is_an_error_and_changes_nothing(place, no_plot, capsys):
    assert main(command(place, "ruined", "--max_steps 2 --eval_every 1")) == 0
    folder = place / "ruined"
    for name in ("last", "last.1"):
        (folder / name / "state.json").write_text("{}")
    before = read_run(folder), (folder / "args.json").read_bytes()
    assert main(["--output_dir", str(folder), "--resume"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "last.1/state.json: damaged" in error and "no undamaged" in error
    assert (read_run(folder), (folder / "args.json").read_bytes()) == before


@pytest.mark.parametrize("max_steps", [2, 3])  # finished, or to go on
def test_damaged_best_is_made_again_from_here_on(place, no_plot, capsys, max_steps):
    folder = place / f"no_best{max_steps}"
    assert main(command(place, folder.name, "--max_steps 2 --eval_every 1")) == 0
    (folder / "best" / "model.safetensors").write_bytes(b"x")
    assert main(["--output_dir", str(folder), "--eval_only"]) == 2
    assert "best/model.safetensors: damaged" in capsys.readouterr().err
    assert main(["--output_dir", str(folder), "--resume", "--max_steps", str(max_steps)]) == 0
    assert "the best checkpoint from step 2 on will take its place" in capsys.readouterr().out
    assert json.loads((folder / "best" / "state.json").read_text())["step"] == max_steps
    assert main(["--output_dir", str(folder), "--eval_only"]) == 0


def test_args_json_that_is_lost_during_the_run_comes_back(place, no_plot, monkeypatch):
    real = multitask_classifier.train_step

    def step_and_delete(*args, step, **options):
        if step == 1:
            (place / "lost_args" / "args.json").unlink()
        return real(*args, step=step, **options)

    monkeypatch.setattr(multitask_classifier, "train_step", step_and_delete)
    assert main(command(place, "lost_args", "--max_steps 3 --eval_every 1")) == 0
    texts = [(place / "lost_args" / name / "args.json").read_text() for name in (".", "last", "best")]
    assert len(set(texts)) == 1
    assert main(["--output_dir", str(place / "lost_args"), "--resume", "--max_steps", "4"]) == 0


def test_other_encoder_before_the_first_checkpoint_is_refused(place, no_plot, tmp_path, capsys):
    encoder = make_encoder(tmp_path / "encoder")
    flags = [*command(place, "swapped", "--max_steps 2"), "--pretrained", str(encoder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multitask_classifier, "train_step", interrupt)
        assert main(flags) == 130
    make_encoder(encoder, seed=1)
    capsys.readouterr()
    assert main(["--output_dir", str(place / "swapped"), "--resume"]) == 2
    assert "is not what" in capsys.readouterr().err
    make_encoder(encoder, seed=0)
    assert main(["--output_dir", str(place / "swapped"), "--resume"]) == 0


def test_evaluation_in_another_way_leaves_the_runs_scores(place, no_plot, capsys):
    assert main(command(place, "scored", "--max_steps 1")) == 0
    path = place / "scored" / "scores.json"
    path.write_text(path.read_text() + "\n")
    for flags in (
        "--eval_only --max_length 5",
        "--predict_only --max_length 5",
        "--predict_only --predict_splits test",
    ):
        assert main(["--output_dir", str(place / "scored"), *flags.split()]) == 0
        assert path.read_text().endswith("\n\n") and f"{path} stays as it is" in capsys.readouterr().out
    assert main(["--output_dir", str(place / "scored"), "--predict_only"]) == 0
    assert not path.read_text().endswith("\n\n")


def test_signal_in_the_last_moment_of_training(place, no_plot):
    """After the loop looked for the last time: it must not be lost."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "close", lambda progress: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit) as end:
            main(command(place, "last_moment", "--max_steps 1"))
    assert end.value.code == 143 and not (place / "last_moment" / "scores.json").exists()
    assert main(["--output_dir", str(place / "last_moment"), "--resume"]) == 0


def test_curves_that_cannot_be_drawn_do_not_fail_the_run(place, monkeypatch, capsys):
    def fail(folder):
        raise MemoryError

    monkeypatch.setattr(multitask_classifier, "plot_run", fail)
    assert main(command(place, "no_curves", "--max_steps 1")) == 0
    assert "warning: no curves" in capsys.readouterr().out


def test_settings_changed_in_args_json_are_refused_by_name(place, no_plot, capsys):
    assert main(command(place, "edited", "--max_steps 2")) == 0
    path = place / "edited" / "args.json"
    path.write_text(
        path.read_text().replace('"lr": 0.003', '"lr": 0.03').replace('"seed": 11711', '"seed": 11')
    )
    assert main(["--output_dir", str(place / "edited"), "--resume", "--max_steps", "3"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--lr was 0.003, is 0.03, --seed was 11711, is 11" in error


def test_second_run_on_a_folder_is_refused(place, no_plot, capsys):
    with lock_folder(place / "locked"):
        flags = command(place, "locked")
        code = f"import multitask_classifier, sys; sys.exit(multitask_classifier.main({flags!r}))"
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "in use by another run" in done.stderr


LIMITED = """
import resource, sys
import multitask_classifier
multitask_classifier.plot_run = lambda folder: None
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(multitask_classifier.main(sys.argv[2:]))
"""


def test_full_disk_ends_in_one_line_and_keeps_the_last_good_state(place, no_plot):
    """A limit on file sizes lets every large write fail as a full disk does."""
    assert main(command(place, "full", "--max_steps 2 --schedule constant --warmup_steps 0")) == 0
    folder = place / "full"
    before = read_run(folder)[0]
    flags = ["--output_dir", str(folder), "--resume", "--max_steps", "4"]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, "60000", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "File too large" in done.stderr
    assert read_run(folder)[0] == before
    assert not [path for path in folder.rglob("*") if path.name.endswith((".new", ".tmp"))]
    assert main(flags) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user, whom only root can become")
def test_folder_that_may_not_be_written_ends_in_one_line(place, tmp_path_factory):
    code = "import os, sys, multitask_classifier as script; os.setuid(65534);"
    code += "sys.exit(script.main(sys.argv[1:]))"
    folder = tmp_path_factory.mktemp("read_only")
    for path in (folder, *folder.parents[:2]):
        path.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", code, *command(folder, "run")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "Permission denied" in done.stderr and not (folder / "run").exists()


def test_longer_run_can_continue_a_shorter_one(place, no_plot):
    assert main(command(place, "short", "--max_steps 2 --schedule constant --warmup_steps 0")) == 0
    assert main(["--output_dir", str(place / "short"), "--resume", "--max_steps", "4"]) == 0
    assert json.loads((place / "short" / "last" / "state.json").read_text())["step"] == 4


def test_too_many_bad_steps_end_the_run_in_one_line(place, no_plot, capsys):
    assert main(command(place, "bad", "--max_steps 40 --eval_every 5 --lr 1e30 --clip_norm 0")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--lr" in error


@pytest.fixture
def spoiled(monkeypatch):
    """Chosen training examples have a label that is not a number, as a fault of our own would make it."""

    def spoil(task, row_ids):
        real = TaskData.batch

        def batch(data, examples, pad_token_id):
            made = real(data, examples, pad_token_id)
            if data.rows.path.name == TASKS[task].files["train"]:
                bad = [data.rows.ids[n] in row_ids for n in examples]
                made["labels"] = made["labels"].masked_fill(torch.tensor(bad), math.nan)
            return made

        monkeypatch.setattr(TaskData, "batch", batch)

    return spoil


def test_skipped_steps_are_counted_and_name_the_examples(place, no_plot, capsys, spoiled):
    ids = read_rows(place / "data" / TASKS["sts"].files["train"], TASKS["sts"], "train").ids
    spoiled("sts", {ids[4]})
    settings = "--max_steps 12 --eval_every 6"  # two epochs of 24 examples in batches of 4
    assert main(command(place, "skipped", settings)) == 0
    printed = capsys.readouterr().out
    assert printed.count(f"skipped for all tasks: sts loss is not finite, examples {ids[4]}\n") == 2
    assert "warning: 2 of 12 steps were skipped" in printed
    state = json.loads((place / "skipped" / "last" / "state.json").read_text())
    assert state["skipped_steps"] == 2
    lines = [json.loads(line) for line in (place / "skipped" / "metrics.jsonl").read_text().splitlines()]
    skipped = [line for line in lines if "skipped" in line]
    expected = {"sts": {"not_finite": "loss", "examples": [ids[4]]}}
    assert [line["skipped"] for line in skipped] == [expected] * 2
    assert [1 <= line["step"] <= 6 for line in skipped] == [True, False]


def test_dropout_goes_on_after_a_skipped_step(place, no_plot, spoiled, monkeypatch):
    """The examples to blame are looked for without dropout."""
    ids = read_rows(place / "data" / TASKS["sts"].files["train"], TASKS["sts"], "train").ids
    spoiled("sts", set(ids))
    real, modes = multitask_classifier.train_step, []

    def watched(model, *args, **options):
        modes.append(model.training)
        return real(model, *args, **options)

    monkeypatch.setattr(multitask_classifier, "train_step", watched)
    assert main(command(place, "modes", "--max_steps 3 --max_bad_steps 9")) == 0
    assert modes == [True] * 3


def test_run_with_skipped_steps_resumes_with_the_same_bits(place, no_plot, spoiled):
    ids = read_rows(place / "data" / TASKS["para"].files["train"], TASKS["para"], "train").ids
    spoiled("para", set(ids[:9]))
    settings = "--max_steps 9 --eval_every 4"
    assert main(command(place, "bad_whole", settings)) == 0
    with pytest.MonkeyPatch.context() as patch:
        signal_in(patch, "train_step", signal.SIGTERM)
        with pytest.raises(SystemExit):
            main(command(place, "bad_parts", settings))
    assert main(["--output_dir", str(place / "bad_parts"), "--resume"]) == 0
    assert read_run(place / "bad_whole") == read_run(place / "bad_parts")


def test_float16_overflows_are_counted_apart_from_faults(place, no_plot, capsys, spoiled):
    """The scale falls until the gradients fit; that is no reason to give up, as a label that is NaN is."""
    ids = read_rows(place / "data" / TASKS["para"].files["train"], TASKS["para"], "train").ids
    settings = "--precision fp16 --task_weights sts=5 --max_steps 12 --eval_every 6 --max_bad_steps 1"
    assert main(command(place, "overflow", settings)) == 0
    printed = capsys.readouterr()
    state = json.loads((place / "overflow" / "last" / "state.json").read_text())
    found, count = state["loss_scale"], state["loss_scale"]["overflow_steps"]
    assert 3 < count < 12 and found["scale"] == 2 ** (16 - count) and found["good_steps"] <= 12 - count
    assert state["skipped_steps"] == state["bad_steps"] == 0
    assert set(state["optimizer_steps"]) == {12 - count}
    assert f"\n{count} of 12 steps were skipped because a float16 gradient overflowed; " in printed.out
    assert "warning: step" not in printed.out + printed.err
    lines = [json.loads(line) for line in (place / "overflow" / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    assert (logged[-1]["loss_scale"], logged[-1]["overflow_steps"]) == (found["scale"], count)
    assert all(math.isfinite(line["grad_norm"]) for line in logged)
    assert read_metrics(place / "overflow")

    spoiled("para", {ids[4]})
    assert main(command(place, "fault", settings)) == 2
    assert "1 steps in a row without a finite loss and gradient" in capsys.readouterr().err


def test_gradient_that_is_not_finite_names_the_batch(place, no_plot, capsys, monkeypatch):
    real = multitask_classifier.train_step

    def spoiled_step(model, *args, step, **options):
        def spoil(module, inputs, output):
            output.register_hook(lambda grad: grad * math.nan)

        hook = model.heads["para"].register_forward_hook(spoil) if step == 1 else None
        result = real(model, *args, step=step, **options)
        if hook:
            hook.remove()
        return result

    monkeypatch.setattr(multitask_classifier, "train_step", spoiled_step)
    assert main(command(place, "nan_gradient", "--max_steps 3")) == 0
    named = re.search(r"para gradient is not finite, examples (.*)", capsys.readouterr().out)[1].split(", ")
    ids = read_rows(place / "data" / TASKS["para"].files["train"], TASKS["para"], "train").ids
    assert len(named) == 4 and set(named) <= set(ids)


def test_gradient_of_the_heads_that_is_not_finite_names_the_examples_too(place, no_plot, capsys):
    """With a frozen encoder there is no other gradient."""
    flags = "--max_steps 9 --freeze_encoder --head_lr 1e10 --clip_norm 0 --max_bad_steps 2 --precision fp32"
    assert main(command(place, "bad_heads", flags)) == 2
    capsys.readouterr()
    lines = [json.loads(line) for line in (place / "bad_heads" / "metrics.jsonl").read_text().splitlines()]
    skipped = [line["skipped"] for line in lines if "skipped" in line]
    assert len(skipped) == 2 and all(
        found and all(bad["examples"] for bad in found.values()) for found in skipped
    )


def test_outputs_that_are_not_finite_end_the_run_at_its_evaluation(place, no_plot, capsys):
    """One step makes weights that are finite, and products of them that are not."""
    flags = "--max_steps 3 --eval_every 1 --lr 1e15 --head_lr 1e15 --warmup_steps 0 --clip_norm 0"
    assert main(command(place, "nan_outputs", f"{flags} --precision fp32")) == 2
    error = capsys.readouterr().err
    assert "step 1: sst: 11 of 11 predictions are not finite, the first for id " in error
    assert error.endswith("; train with a smaller --lr; there is no checkpoint yet\n")
    assert error.count("\n") == 1
    left = {path.name for path in (place / "nan_outputs").iterdir()}
    assert not left & {"best", "last", "predictions", "scores.json"}


def test_outputs_that_are_not_finite_leave_what_was_good(place, no_plot, capsys, monkeypatch):
    """One bad example out of 11 at the second evaluation; then in predictions of the run that went on."""
    real, bad_tasks = MultitaskBERT.classify, set()

    def classify(model, task, *vectors):
        logits = real(model, task, *vectors)
        if task in bad_tasks and not model.training:
            logits[3] = math.nan
        return logits

    def first_step(*args, step, **options):
        bad_tasks.update({"para"} if step == 2 else set())
        return real_step(*args, step=step, **options)

    real_step = multitask_classifier.train_step
    monkeypatch.setattr(MultitaskBERT, "classify", classify)
    monkeypatch.setattr(multitask_classifier, "train_step", first_step)
    folder = place / "nan_later"
    assert main(command(place, "nan_later", "--max_steps 6 --eval_every 2")) == 2
    error = capsys.readouterr().err
    ids = read_rows(place / "data" / TASKS["para"].files["dev"], TASKS["para"], "dev").ids
    assert f"step 4: para: 1 of 11 predictions are not finite, the first for id {ids[3]};" in error
    assert error.endswith(f"{folder / 'last'} still holds step 2\n") and error.count("\n") == 1
    for name in ("last", "best"):
        assert json.loads((folder / name / "state.json").read_text())["step"] == 2
    monkeypatch.setattr(multitask_classifier, "train_step", real_step)
    bad_tasks.clear()
    assert main(["--output_dir", str(folder), "--resume"]) == 0
    files = {path: path.read_bytes() for path in [*folder.glob("predictions/*"), folder / "scores.json"]}
    bad_tasks.add("sts")
    for mode in ("--eval_only", "--predict_only"):
        assert main(["--output_dir", str(folder), mode]) == 2
        assert "sts: 1 of 11 predictions are not finite" in capsys.readouterr().err
    assert len(files) == 7 and all(path.read_bytes() == before for path, before in files.items())


def test_lack_of_memory_names_batch_and_flags(place, no_plot, capsys, monkeypatch):
    def no_memory(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    def no_cpu_memory(*args, **options):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: 5 bytes"
        )

    with monkeypatch.context() as patch:
        patch.setattr(multitask_classifier, "train_step", no_memory)
        assert main(command(place, "memory", "--max_steps 3 --sts_batch_size 9")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--sts_batch_size" in error and "--max_length" in error
    assert re.search(r"batches .* sst \(4, \d+\), para \(8, \d+\), sts \(18, \d+\)", error)
    assert "there is no checkpoint yet" in error
    monkeypatch.setattr(MultitaskBERT, "embed", no_cpu_memory)
    assert main(command(place, "memory", "--max_steps 3 --eval_every 1 --overwrite")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(r"predicting sst.* \(\d+, \d+\).*--max_length", error)


def test_our_own_runtime_errors_keep_their_traceback(place, no_plot, monkeypatch):
    def wrong(*args, **options):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(multitask_classifier, "train_step", wrong)
    with pytest.raises(RuntimeError, match="mat1"):
        main(command(place, "own_error", "--max_steps 3"))


SCORES = {  # step: scores of each task; each aggregate is best at another step
    1: (0.6, 0.5, 0.10),
    2: (0.2, 0.9, 0.09),
    3: (0.4, 0.4, 0.65),
    4: (0.45, 0.82, -0.2),
}


@pytest.mark.parametrize(
    ("select_by", "best"), [("sst", 1), ("para", 2), ("sts", 3), ("mean", 3), ("mean_2024", 4)]
)
def test_best_is_the_checkpoint_that_is_best_by_the_stated_aggregate(
    place, no_plot, monkeypatch, select_by, best
):
    """Aggregates worked out by hand: means .400 .397 .483 .357; 2024's .550 .548 .542 .557."""
    calls = iter(range(1, 99))
    real = multitask_classifier.evaluate

    def scripted(model, dev_data, *args):
        summary, predictions = real(model, dev_data, *args)
        step = next(calls)
        if step in SCORES:
            for (task, spec), score in zip(model.tasks.items(), SCORES[step], strict=True):
                summary["tasks"][task][TASK_KINDS[spec.kind].main_score] = score
            summary = summarise(summary["tasks"], model.tasks)
        weights.append(model.bert.embeddings.word_embeddings.weight.detach().clone())
        return summary, predictions

    weights = []
    monkeypatch.setattr(multitask_classifier, "evaluate", scripted)
    name = f"best_{select_by}"
    assert main(command(place, name, f"--max_steps 4 --eval_every 1 --select_by {select_by}")) == 0
    stored = load_file(place / name / "best" / "model.safetensors")["bert.embeddings.word_embeddings.weight"]
    assert [torch.equal(stored, weight) for weight in weights[:4]] == [step == best for step in SCORES]
    assert torch.equal(stored, weights[4])  # it is the best one that is evaluated at the end
    assert json.loads((place / name / "scores.json").read_text())["step"] == best


def test_collapse_constant_similarity_and_scores_below_the_floor_are_warned_about(
    place, no_plot, capsys, monkeypatch
):
    real = multitask_classifier.evaluate

    def collapsed(model, dev_data, *args):
        _, predictions = real(model, dev_data, *args)
        predictions = {task: np.zeros_like(values) for task, values in predictions.items()}
        scores = {
            task: TASK_KINDS[TASKS[task].kind].scores(values, dev_data[task].rows.labels)
            for task, values in predictions.items()
        }
        return summarise(scores, model.tasks), predictions

    monkeypatch.setattr(multitask_classifier, "evaluate", collapsed)
    assert main(command(place, "collapsed", "--max_steps 1")) == 0
    printed = capsys.readouterr().out
    for text in (
        "sst: 11 of 11 predictions are 0: the model seems to have collapsed",
        "sts: all predictions lie between 0 and 0: the model seems to have collapsed",
        "sts is no better than the constant baseline",
    ):
        assert printed.count(f"warning: {text}") == 2  # in the log of the run, and at its end
    lines = [json.loads(line) for line in (place / "collapsed" / "metrics.jsonl").read_text().splitlines()]
    assert any("sts is no better" in text for text in lines[-1]["warnings"])


def test_args_and_data_report_say_what_was_used(place, no_plot, tmp_path, capsys):
    data = make_data(tmp_path / "data")
    dev, train = data / TASKS["sst"].files["dev"], data / TASKS["sst"].files["train"]
    rows = train.read_text(encoding="utf-8").splitlines(keepends=True)
    with open(dev, "a", encoding="utf-8") as file:  # the first training row, and one without a label
        file.write(rows[1] + rows[2].rpartition("\t")[0] + "\t\n")
    assert main([*command(place, "facts", "--max_steps 1 --sst_batch_size 99"), "--data_dir", str(data)]) == 0
    printed = capsys.readouterr().out
    stored = json.loads((place / "facts" / "args.json").read_text())
    digest = hashlib.sha256(dev.read_bytes()).hexdigest()
    assert stored["data_files"][str(dev)] == digest and len(stored["data_files"]) == 9
    assert stored["args"]["seed"] == 11711 and "git" in stored and stored["versions"]["torch"]
    report = json.loads((place / "facts" / "data_report.json").read_text())
    found = report["tasks"]["sst"]["dev"]
    assert (found["rows"], found["examples"], found["sha256"]) == (13, 12, digest)
    assert found["warnings"]["no label"]["count"] == 1
    checks = {check["check"]: check["message"] for check in report["cross_checks"]}
    assert set(checks) >= {"overlap", "fewer rows than a batch"}
    assert all(f"warning: {message}" in printed for message in checks.values())
    assert "1 row without a label, left out (line 14)" in printed


def test_bad_test_file_is_an_error_before_training(place, tmp_path, no_plot, capsys):
    data = make_data(tmp_path / "data")
    with open(data / TASKS["sts"].files["test"], "ab") as file:
        file.write(b"9\tx\xff\ta\tb\n")
    assert main([*command(place, "bad_test", "--max_steps 1"), "--data_dir", str(data)]) == 2
    captured = capsys.readouterr()
    assert ":11: not UTF-8" in captured.err and "step 1/1" not in captured.out
    assert not (place / "bad_test").exists()


def test_missing_data_says_what_to_do(place, capsys):
    assert main(f"--pretrained {place}/encoder --data_dir {place}/nowhere".split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "make data" in error and "ids-sst-train.csv" in error


def test_vocabulary_and_embeddings_must_fit(place, tmp_path, capsys):
    folder = make_encoder(tmp_path / "encoder")
    with open(folder / "vocab.txt", "a") as file:
        file.write("more\n")
    assert main(f"--pretrained {folder} --data_dir {place}/data".split()) == 2
    assert "vocabulary" in capsys.readouterr().err


def test_padded_embeddings_train_and_the_checkpoint_is_an_encoder(place, tmp_path, no_plot, capsys):
    folder = make_encoder(tmp_path / "encoder")
    BertModel(make_config(128)).save_pretrained(folder)
    for source, run in [(folder, "a"), (tmp_path / "a" / "best", "b")]:
        flags = f"--pretrained {source} --data_dir {place}/data --output_dir {tmp_path}/{run} --max_steps 1"
        assert main([*flags.split(), *TINY.split()]) == 0
        assert f"--pretrained {source}: vocabulary of" in capsys.readouterr().out


def test_damaged_checkpoint_is_no_encoder(place, no_plot, capsys):
    assert main(command(place, "source", "--max_steps 1")) == 0
    path = place / "source" / "best" / "vocab.txt"
    path.write_text(path.read_text().replace("a\n", "A\n", 1))
    assert main(command(place, "target", f"--max_steps 1 --pretrained {place}/source/best")) == 2
    assert "best/vocab.txt: damaged" in capsys.readouterr().err and not (place / "target").exists()


def test_missing_test_file_is_a_warning_not_an_end(place, tmp_path, no_plot, capsys):
    data = make_data(tmp_path / "data")
    (data / TASKS["sts"].files["test"]).unlink()
    flags = command(place, "no_test", "--max_steps 1") + ["--data_dir", str(data)]
    assert main(flags) == 0
    assert "no test predictions for sts" in capsys.readouterr().out
    assert not (place / "no_test" / "predictions" / "sts-test-output.csv").exists()


def test_best_checkpoint_is_an_encoder_for_the_next_run(place, no_plot, capsys):
    assert main(command(place, "first", "--max_steps 1")) == 0
    assert main(command(place, "second", f"--max_steps 1 --pretrained {place}/first/best")) == 0
    assert "39 of 39 weights loaded" in capsys.readouterr().out


def test_command_line_from_end_to_end(place):
    """As a user runs it, in a process of its own, and what they find afterwards."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, ROOT / "multitask_classifier.py", *command(place, "user", "--max_steps 2")],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stdout + done.stderr  # no progress bar when piped
    folder = place / "user"
    for task in DEFAULT_TASKS:
        for split in ("dev", "test"):
            path = folder / "predictions" / f"{task}-{split}-output.csv"
            assert str(path) in done.stdout and path.exists()
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("args.json", "data_report.json", "metrics.jsonl", "scores.json", "curves.png"),
        *("best", "last", "last.1", "predictions"),
    }
    scores = json.loads((folder / "scores.json").read_text())["dev"]
    mains = [scores["tasks"][task][TASK_KINDS[TASKS[task].kind].main_score] for task in DEFAULT_TASKS]
    assert scores["mean"] == pytest.approx(sum(mains) / 3)
    assert scores["mean_2024"] == pytest.approx((mains[0] + mains[1] + (mains[2] + 1) / 2) / 3)
    printed = re.findall(r"overall.*: (\S+)", done.stdout)
    assert printed == [f"{scores['mean']:.4f}", f"{scores['mean_2024']:.4f}"]


def test_predictions_do_not_depend_on_what_else_is_in_the_file(place, tmp_path, no_plot):
    """The whole dev file against a file with one row of it, through the command line, in float32."""
    assert main(command(place, "batches", "--max_steps 3 --precision fp32")) == 0
    spec = TASKS["sts"]
    header, *rows = (place / "data" / spec.files["dev"]).read_text().splitlines(keepends=True)
    (tmp_path / "one.csv").write_text(header + rows[4])
    out = tmp_path / "out.csv"
    flags = ["--output_dir", str(place / "batches"), "--predict_only"]
    assert main([*flags, "--sts_dev", str(tmp_path / "one.csv"), "--sts_dev_out", str(out)]) == 0
    whole = (place / "batches" / "predictions" / "sts-dev-output.csv").read_text().splitlines()
    one = out.read_text().splitlines()[1].split(" , ")
    same = next(line for line in whole if line.startswith(one[0])).split(" , ")
    assert float(one[1]) == pytest.approx(float(same[1]), abs=1e-5)  # float32 rounding


@pytest.mark.parametrize("head", PAIR_HEADS)
def test_prediction_files_hold_the_predictions_that_were_scored(place, no_plot, head):
    """Scores counted again from the files; and dev given as test too: each id gets the same prediction."""
    data = place / "data"
    flags = [f"--{task}_test {data / TASKS[task].files['dev']}" for task in DEFAULT_TASKS]
    settings = f"--max_steps 3 --precision fp32 --para_head {head} --sts_head {head} {' '.join(flags)}"
    assert main(command(place, f"files_{head}", settings)) == 0
    folder = place / f"files_{head}"
    scores = json.loads((folder / "scores.json").read_text())["dev"]["tasks"]
    for task in DEFAULT_TASKS:
        spec = TASKS[task]
        rows = read_rows(data / spec.files["dev"], spec, "dev")
        dev, test = (
            read_predictions(folder / "predictions" / f"{task}-{split}-output.csv", spec)
            for split in ("dev", "test")
        )
        predictions = np.array([dev[row_id] for row_id in rows.ids])
        assert TASK_KINDS[spec.kind].scores(predictions, rows.labels) == pytest.approx(scores[task], abs=1e-6)
        # The test file has rows without a label too, so batches differ: float32 rounding.
        assert [test[row_id] for row_id in rows.ids] == pytest.approx(list(predictions), abs=1e-5)


# --- nothing is overwritten that is not a prediction file of ours ----------------------------------


@pytest.mark.parametrize("target", ["data/ids-sst-dev.csv", "kept/args.json", "notes.txt", "link.csv"])
def test_output_never_replaces_another_file(place, no_plot, capsys, target):
    if not (place / "kept").exists():
        assert main(command(place, "kept", "--max_steps 1")) == 0
        (place / "notes.txt").write_text("mine")
        (place / "link.csv").symlink_to(place / "data" / "ids-sst-dev.csv")
    before = (place / target).read_bytes()
    flags = ["--sst_dev_out", str(place / target)]
    for argv in (
        [*command(place, "other", "--max_steps 1"), *flags],
        ["--output_dir", str(place / "kept"), "--predict_only", *flags],
    ):
        capsys.readouterr()
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert "--sst_dev_out" in error and "is no prediction file" in error and error.count("\n") == 1
    assert (place / target).read_bytes() == before


def test_dangling_links_as_outputs_are_named(place, tmp_path, capsys):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for flag in ("--sst_dev_out", "--output_dir"):
        assert main([*command(place, "dangling", "--max_steps 1"), flag, str(tmp_path / "link")]) == 2
        error = capsys.readouterr().err
        assert f"{flag} {tmp_path / 'link'}: is a link to" in error and "does not exist" in error


@pytest.mark.parametrize("split", ["dev", "test"])
def test_predictions_on_other_data_need_a_name(place, no_plot, tmp_path, capsys, split):
    folder = place / "leaderboard"
    if not folder.exists():
        assert main(command(place, "leaderboard", "--max_steps 1")) == 0
    own = folder / "predictions" / f"sst-{split}-output.csv"
    before = own.read_bytes()
    header, *rows = (place / "data" / TASKS["sst"].files[split]).read_text().splitlines(keepends=True)
    (tmp_path / "few.csv").write_text(header + "".join(rows[:2]))
    flags = ["--output_dir", str(folder), "--predict_only", f"--sst_{split}", str(tmp_path / "few.csv")]
    assert main(flags) == 2
    assert f"give --sst_{split}_out FILE" in capsys.readouterr().err and own.read_bytes() == before
    assert main([*flags, f"--sst_{split}_out", str(tmp_path / "out.csv")]) == 0
    assert (tmp_path / "out.csv").read_text().count("\n") == 3 and own.read_bytes() == before


def test_longer_run_says_what_becomes_of_the_learning_rate(place, no_plot, capsys):
    """Linear, no warm-up: at step 2 of 2 nothing is left, of 8 three quarters."""
    assert main(command(place, "length", "--max_steps 2 --warmup_steps 0 --lr 0.004")) == 0
    capsys.readouterr()
    assert main(["--output_dir", str(place / "length"), "--resume", "--max_steps", "8"]) == 0
    printed = capsys.readouterr().out
    assert "ends at step 8 now, before it was 2" in printed
    assert "next learning rate is 3.00e-03 instead of 0.00e+00" in printed


def test_errors_that_need_no_data_come_before_the_data(place, no_plot, capsys):
    assert main(command(place, "quick", "--max_steps 1")) == 0
    for flags, message in (("", "holds a run already"), ("--overwrite --device cuda:99", "--device cuda:99")):
        capsys.readouterr()
        assert main(command(place, "quick", flags)) == 2
        printed = capsys.readouterr()
        assert message in printed.err and "examples from" not in printed.out


def test_every_file_of_a_run_follows_the_umask(place, no_plot):
    before = os.umask(0o027)
    try:
        assert main(command(place, "modes_of_files", "--max_steps 1")) == 0
    finally:
        os.umask(before)
    files = [path for path in (place / "modes_of_files").rglob("*") if path.is_file()]
    assert len(files) > 10 and {path.stat().st_mode & 0o777 for path in files} == {0o640}


def test_ctrl_c_during_the_imports_ends_without_a_traceback():
    code = (
        "import signal, sys; sys.argv = ['x', '--help']; import runpy, builtins; real = builtins.__import__\n"
    )
    code += "def stop(name, *rest):\n    if name == 'torch': signal.raise_signal(signal.SIGINT)\n"
    code += "    return real(name, *rest)\nbuiltins.__import__ = stop\n"
    code += "runpy.run_path('multitask_classifier.py', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=120, check=False
    )
    assert done.returncode == -signal.SIGINT and not done.stderr
