"""Runs from end to end, held against one that nothing disturbed: stopped, damaged or out of memory, they go
on to the same bits, keep what was good, or end in one line; and what the files of a run say.

`whole` runs each set of flags once; a test that writes in a run folder takes a copy of it.
"""

import hashlib
import json
import math
import multiprocessing
import os
import re
import resource
import runpy
import shutil
import signal
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
from heads import MultitaskBERT
from multitask_classifier import main
from reporting.read_run import read_metrics
from support.files import ROOT, lock_folder
from support.seeds import make_seed
from tests.tiny import fresh_modules, make_config, make_data, make_encoder, one_line
from training.metrics import average
from training.progress import Progress
from training.run_folder import Run

TINY = "--batch_size 4 --device cpu --precision fp32 --lr 0.003 --head_lr 0.01 --log_every 2"
SHORT = "--max_steps 4 --eval_every 2 --warmup_steps 0"
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an encoder and data, and no plots to wait for."""
    folder = tmp_path_factory.mktemp("runs")
    make_encoder(folder / "encoder")
    make_data(folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multitask_classifier, "plot_run", lambda folder: None)
        yield folder


@pytest.fixture(scope="module")
def whole(place):
    """The folder of an undisturbed run; the same flags run once, so it must stay as it is."""
    done = {}

    def whole(flags=SHORT):
        if flags not in done:
            done[flags] = place / f"whole{len(done)}"
            assert main(command(place, done[flags], flags)) == 0
        return done[flags]

    return whole


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of the short run, to be damaged."""
    return shutil.copytree(whole(), tmp_path / "run")


def command(place, folder, flags=SHORT):
    paths = f"--pretrained {place}/encoder --data_dir {place}/data --output_dir {folder}"
    return f"{paths} {TINY} {flags}".split()


def again(folder, flags="--resume"):
    return main(["--output_dir", str(folder), *flags.split()])


def exit_code(argv):
    try:
        return main(argv)
    except SystemExit as end:
        return end.code


def step_of(checkpoint):
    return json.loads((checkpoint / "state.json").read_text())["step"]


def log_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def read_run(folder):
    """Everything a run leaves that must be the same bits; speed is not, nor how often it was saved."""
    differ = ("args.json", "SHA256SUMS", "metrics.jsonl", "curves.png")
    files = {
        str(path.relative_to(folder)): content
        for path, content in contents(folder).items()
        if path.name not in differ and path.parent.name != "last.1"
    }
    return files, [
        {name: value for name, value in line.items() if name != "tokens_per_second"}
        for line in log_of(folder)
    ]


def before_step(patch, act):
    """Let `act(step)` happen before each update."""
    real = multitask_classifier.train_step

    def train_step(*args, step, **options):
        act(step)
        return real(*args, step=step, **options)

    patch.setattr(multitask_classifier, "train_step", train_step)


def test_make_seed_is_stable_and_sensitive():
    numbers = [(1, 2, 3), (1, 3, 2), (1, 2), (0, 1, 2), (1, 2, 0), (1, 2, 0, 0)]
    assert len({make_seed(*each) for each in numbers + numbers}) == 6 and 0 <= make_seed(5) < 2**63


def test_average_by_hand():
    def record(a, b, norm, cosine, layers):
        """Of a step with the tasks a and b; without b there is no cosine."""
        losses = {"a": a} | ({} if b is None else {"b": b})
        cosines = [{} if value is None else {"a-b": value} for value in (cosine, *layers)]
        groups = dict(zip(("embeddings", "layer.0"), cosines[1:], strict=True))
        named = {"loss": losses, "task_grad_norm": losses, "grad_weight": losses}
        return named | {"cosine": cosines[0], "layer_cosine": groups, "grad_norm": norm}

    averaged = average(
        [
            record(1.0, 2.0, 2.0, -0.5, (-0.5, 0.25)),
            record(3.0, None, 4.0, None, (None, None)),
            record(2.0, 3.0, 3.0, -0.5, (0.0, -0.75)),
        ]
    )
    for name in ("loss", "task_grad_norm", "grad_weight"):
        assert averaged[name] == {"a": 2.0, "b": 2.5}
    assert averaged["grad_norm"] == 3.0
    assert averaged["cosine"] == {"a-b": -0.5} and averaged["conflict"] == {"a-b": 1.0}
    assert averaged["layer_cosine"] == {"embeddings": {"a-b": -0.25}, "layer.0": {"a-b": -0.25}}
    assert averaged["layer_conflict"] == {"embeddings": {"a-b": 0.5}, "layer.0": {"a-b": 0.5}}


# --- stopped and resumed ------------------------------------------------------------------------------------


PHRASES = "--phrase_weight 1 --phrase_limit 2 --sst_loss coral --pooling attention"
PHRASES += " --para_head cross --sts_head diff+cross --symmetric --sampler proportional"
INGREDIENTS = "--ema 0.7 --layer_lr_decay 0.5 --rdrop 1,sts=0.1 --fgm 0.1 --label_smoothing 0.1"
INGREDIENTS += " --head_dropout_samples 2 --loss_schedule sst=0.2:1/0.7:0 --draw_schedule sts=0:0.5/0.5:1"


@slow
@pytest.mark.parametrize(
    "flags",
    [
        f"--patience 9 --rectify --max_steps 7 {PHRASES}",  # of which the first five are not adaptive
        "--sampler annealed --grad_method gradvac --precision bf16 --schedule cosine",
        "--precision fp16 --sampler sqrt --task_weights sts=5 --max_steps 7",  # so that the first overflow
        "--grad_method cr_mogm --surgery_scope layer --loss_weighting famo --sampler pike --gram ema",
        f"--grad_accum 2 {INGREDIENTS}",
    ],
)
def test_resumed_run_has_the_same_bits(place, whole, monkeypatch, tmp_path, flags, capsys):
    """Stopped in its third step: at no evaluation, with half a log interval open."""
    flags = f"--max_steps 5 --eval_every 2 {flags}"
    with monkeypatch.context() as patch:
        before_step(patch, lambda step: signal.raise_signal(signal.SIGTERM) if step == 2 else None)
        assert exit_code(command(place, tmp_path / "run", flags)) == 128 + signal.SIGTERM
    assert f"--output_dir {tmp_path / 'run'} --resume" in capsys.readouterr().out
    assert step_of(tmp_path / "run" / "last") == 3
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "loss": "written after the checkpoint, to be dropped"}\n{"step": 3, "lo')
    assert again(tmp_path / "run") == 0
    assert read_run(tmp_path / "run") == read_run(whole(flags))


@slow
def test_best_holds_the_average_of_the_weights(whole):
    """Of three steps, evaluated once: the average that last/ keeps besides the weights."""
    folder = whole("--ema 0.5 --max_steps 3 --eval_every 3")
    average = load_file(folder / "last" / "optimizer.safetensors")["average"]
    names = [name for name in load_file(folder / "best" / "model.safetensors") if ".pooler." not in name]
    best, last = (
        torch.cat([load_file(folder / which / "model.safetensors")[name].flatten() for name in names])
        for which in ("best", "last")
    )
    assert torch.equal(best.sort().values, average.sort().values)  # in another order
    assert not torch.equal(best, last)


def test_measuring_noise_changes_no_bit_and_what_goes_by_it_does(place, whole, tmp_path):
    flags = f"{SHORT} --rdrop para=1 --para_batch_size 3"  # an odd number, which R-Drop doubles
    plain, log = read_run(whole(flags))
    measured, its_log = read_run(whole(f"{flags} --noise_batches 4"))
    assert measured["last/model.safetensors"] == plain["last/model.safetensors"]
    assert [line for line in its_log if "noise" not in line] == log
    assert [line["step"] for line in its_log if "noise" in line] == [0, 2, 4]
    assert all(len(values) == 5 for values in its_log[0]["noise"].values())
    assert set(its_log[0]["layer_noise"]) == {"embeddings", "layer.0", "layer.1"}
    pike, its_log = read_run(whole(f"{SHORT} --sampler pike:z1=30 --gram ema"))
    assert pike["last/model.safetensors"] != plain["last/model.safetensors"]
    state = json.loads(pike["last/state.json"])
    assert max(state["sampler"]["log_weights"]) == 0 > min(state["sampler"]["log_weights"])
    assert set(state["learned"]) == {"gram.total", "gram.weight", "gram.signal"}


def test_distilled_run_is_resumed_without_its_teacher(place, whole, monkeypatch, tmp_path, capsys):
    """The same bits, with accumulated gradients, and with additional rows and some without labels."""
    teacher = shutil.copytree(whole(), tmp_path / "teacher")
    flags = f"--max_steps 5 --eval_every 2 --grad_accum 2 --extra_data sick --teacher {teacher}"
    flags += f" --sts_unlabelled {place}/data/quora-train.csv --transductive sst --cache_dir {tmp_path}/cache"
    for folder, stop_at in (("run", 2), ("whole", None)):
        with monkeypatch.context() as patch:
            before_step(
                patch, lambda step, at=stop_at: signal.raise_signal(signal.SIGTERM) if step == at else None
            )
            assert exit_code(command(place, tmp_path / folder, flags)) == (
                stop_at and 128 + signal.SIGTERM or 0
            )
    assert capsys.readouterr().out.count(f"asking {teacher} about") == 1  # the second one finds the answers
    for folder in (teacher, tmp_path / "cache"):
        shutil.rmtree(folder)
    answers = tmp_path / "run" / "soft_targets.npz"
    kept = answers.read_bytes()
    answers.write_bytes(kept[:-100])
    assert again(tmp_path / "run") == 2 and f"--teacher: {teacher}: no run there" in one_line(capsys)
    answers.write_bytes(kept)
    assert again(tmp_path / "run") == 0
    assert read_run(tmp_path / "run") == read_run(tmp_path / "whole")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--teacher {0}/none", "--teacher: {0}/none: no run there"),
        ("--teacher {0}/run --output_dir {0}/run --overwrite", "--teacher {0}/run: is the run itself"),
        (
            "--teacher {0}/run/best --output_dir {0}/run --overwrite",
            "--teacher {0}/run/best: is the run itself",
        ),
        (
            "--teacher {0}/run --data_dir {0}/other",
            "--teacher: {0}/run: its sst dev data are not those in {0}/other/",
        ),
        (
            "--teacher {0}/run --tasks sst,cfimdb --transductive cfimdb",
            "--transductive: the teacher has no cfimdb, so it cannot answer examples without labels",
        ),
        ("--teacher {0}/run --tasks cfimdb", "--teacher: has none of the tasks cfimdb"),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused(place, folder, tmp_path, flags, message, capsys):
    make_data(tmp_path / "other", start=50)
    before = contents(folder)
    assert exit_code([*command(place, tmp_path / "new"), *flags.format(tmp_path).split()]) == 2
    assert message.format(tmp_path) in one_line(capsys)
    assert contents(folder) == before and not (tmp_path / "new").exists()


# What is at work when the signal comes, in which of its calls, and the step that is saved.
MOMENTS = {
    "read_data": (multitask_classifier, 1, None),
    "print_plan": (multitask_classifier, 1, 0),
    "evaluate": (multitask_classifier, 1, 2),  # given up at once; comes first when the run goes on
    "close": (Progress, 1, 4),  # after the loop looked for the last time: it must not be lost
    "format_predictions": (multitask_classifier, 2, 4),
    "save_last": (Run, 1, None),  # as a kill does it; best/ is there by then
}


@slow
@pytest.mark.parametrize("name", MOMENTS)
def test_signal_at_any_time_saves_what_there_is(place, whole, monkeypatch, tmp_path, capsys, name):
    owner, number, saved = MOMENTS[name]
    sent = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP][list(MOMENTS).index(name) % 3]
    real, calls = getattr(owner, name), iter(range(1, 99))
    is_kill = name == "save_last"

    def call(*args, **options):
        if next(calls) == number:
            if is_kill:
                raise KeyboardInterrupt
            signal.raise_signal(sent)
        return real(*args, **options)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, call)
        assert exit_code(command(place, folder)) == (130 if is_kill else 128 + sent)
    printed = capsys.readouterr().out
    assert not (folder / ".lock").exists()
    if name == "read_data":
        assert not folder.exists()
        return
    if saved is None:
        assert (folder / "best").exists() and not (folder / "last").exists()
    else:
        assert step_of(folder / "last") == saved and f"--output_dir {folder} --resume" in printed
    assert name == "format_predictions" or not (folder / "scores.json").exists()
    assert again(folder) == 0
    assert f"at step {saved or 0}\n" in capsys.readouterr().out
    assert read_run(folder) == read_run(whole())


def test_second_signal_ends_at_once(folder, monkeypatch, capfd):
    """In a process of its own, which the second one kills."""
    twice = [signal.SIGTERM] * 2
    before_step(monkeypatch, lambda step: [signal.raise_signal(each) for each in twice])
    child = multiprocessing.get_context("fork").Process(target=again, args=(folder, "--resume --max_steps 6"))
    child.start()
    child.join(300)
    assert child.exitcode == -signal.SIGTERM and not capfd.readouterr().err
    assert step_of(folder / "last") == 4


@slow
def test_longer_run_says_what_becomes_of_the_learning_rate(folder, capsys):
    """Linear, no warm-up: at step 4 of 4 nothing is left, of 5 a fifth."""
    assert again(folder, "--resume --max_steps 5") == 0
    printed = capsys.readouterr().out
    assert "ends at step 5 now, before it was 4" in printed
    assert "next learning rate is 6.00e-04 instead of 0.00e+00" in printed
    stored = json.loads((folder / "args.json").read_text())
    assert step_of(folder / "last") == stored["args"]["max_steps"] == 5 and len(stored["commands"]) == 2


# --- damage -------------------------------------------------------------------------------------------------


@slow
def test_damaged_checkpoint_falls_back_to_the_one_before(whole, folder, capsys):
    (folder / "scores.json").unlink()
    path = folder / "last" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    assert again(folder) == 0
    printed = capsys.readouterr().out
    assert f"warning: {path}: damaged" in printed and f"going on with {folder / 'last.1'}" in printed
    assert "at step 2\n" in printed and read_run(folder) == read_run(whole())


@slow
def test_kill_before_old_checkpoints_were_removed(folder):
    before = set(folder.iterdir())
    for name in ("last.2", "last.3", "best.1"):
        shutil.copytree(folder / name.partition(".")[0], folder / name)
    assert again(folder) == 0
    assert set(folder.iterdir()) == before


@slow
@pytest.mark.parametrize("max_steps", [4, 5])  # finished, or to go on
def test_damaged_best_is_made_again_from_here_on(whole, tmp_path, capsys, max_steps):
    folder = shutil.copytree(whole(f"{SHORT} --sampler pike:z1=30 --gram ema"), tmp_path / "run")
    (folder / "best" / "model.safetensors").write_bytes(b"x")
    assert again(folder, "--eval_only") == 2
    assert "best/model.safetensors: damaged" in one_line(capsys)
    assert again(folder, f"--resume --max_steps {max_steps}") == 0
    assert "the best checkpoint from step 4 on will take its place" in capsys.readouterr().out
    measured = [line["step"] for line in read_run(folder)[1] if "noise" in line]
    assert measured == [0, 2, 4, 5][: max_steps - 1]  # what was measured counts once for the sampler
    assert step_of(folder / "best") in range(4, max_steps + 1)


def test_nothing_undamaged_is_an_error_and_changes_nothing(folder, capsys):
    for name in ("last", "last.1"):
        (folder / name / "state.json").write_text("{}")
    before = contents(folder)
    assert again(folder) == 2
    error = one_line(capsys)
    assert "last.1/state.json: damaged" in error and "no undamaged" in error
    assert contents(folder) == before


def test_what_is_not_the_same_run_is_not_gone_on_with(place, folder, capsys, tmp_path):
    """Other data; settings changed in args.json; with no checkpoint yet, another encoder."""
    before = contents(folder)
    assert again(folder, f"--resume --data_dir {make_data(tmp_path / 'other', start=50)}") == 2
    assert "are not those" in one_line(capsys)
    path = folder / "args.json"
    good = path.read_text()
    path.write_text(good.replace('"lr": 0.003', '"lr": 0.03').replace('"seed": 11711', '"seed": 11'))
    assert again(folder) == 2
    assert "--lr was 0.003, is 0.03, --seed was 11711, is 11" in one_line(capsys)
    path.write_text(good)
    assert contents(folder) == before
    encoder = make_encoder(tmp_path / "encoder", seed=1)
    path.write_text(good.replace(str(place / "encoder"), str(encoder)))
    for path in (folder / "scores.json", *folder.glob("last*/*"), *folder.glob("best/*")):
        path.unlink()
    for name in ("last", "last.1", "best"):
        (folder / name).rmdir()
    assert again(folder) == 2
    assert f"--pretrained {encoder} is not what" in one_line(capsys)


@slow
def test_full_disk_ends_in_one_line_and_keeps_the_last_good_state(folder, capsys):
    """A limit on file sizes lets every large write fail as a full disk does."""
    before = read_run(folder)[0]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
        assert again(folder, "--resume --max_steps 5") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in one_line(capsys)
    assert read_run(folder)[0] == before
    assert not [path for path in folder.rglob("*") if path.name.endswith((".new", ".unfinished"))]
    assert again(folder, "--resume --max_steps 5") == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user, whom only root can become")
def test_folder_that_may_not_be_written_ends_in_one_line(place, tmp_path, capsys):
    for path in (tmp_path, *tmp_path.parents[:3]):
        path.chmod(0o755)
    os.seteuid(65534)
    try:
        assert main(command(place, tmp_path / "run")) == 2
    finally:
        os.seteuid(0)
    assert "Permission denied" in one_line(capsys) and not (tmp_path / "run").exists()


# --- errors before training ---------------------------------------------------------------------------------


def append(path, text):
    with open(path, "ab") as file:
        file.write(text)
    return path.parent


def damage_encoder(place, tmp_path):
    path = tmp_path / "run" / "best" / "vocab.txt"
    path.write_text(path.read_text().replace("a\n", "A\n", 1))
    return f"--pretrained {tmp_path}/run/best"


def link_to_nowhere(flag):
    def make(place, tmp_path):
        (tmp_path / "link").symlink_to(tmp_path / "nowhere")
        return f"{flag} {tmp_path}/link"

    return make


def spoil_test_file(place, tmp_path):
    return f"--data_dir {append(make_data(tmp_path / 'data') / TASKS['sts'].files['test'], BAD_ROW)}"


def add_to_vocabulary(place, tmp_path):
    return f"--pretrained {append(make_encoder(tmp_path / 'encoder') / 'vocab.txt', b'more')}"


BAD_ROW = b"9\tx\xff\ta\tb\n"
# What is wrong -> what makes it so and returns flags, and what the line says.
EARLY_ERRORS = {
    "bad test file": (spoil_test_file, "sts-test-student.csv:11: not UTF-8"),
    "no data": (lambda *_: "--data_dir /nowhere", "make data"),
    "vocabulary too large": (add_to_vocabulary, "vocabulary"),
    "damaged checkpoint as encoder": (damage_encoder, "best/vocab.txt: damaged"),
    "file is a dangling link": (link_to_nowhere("--sst_dev_out"), "--sst_dev_out {0}/link: is a link to"),
    "folder is a dangling link": (link_to_nowhere("--output_dir"), "--output_dir {0}/link: is a link to"),
    "finished run": (lambda _, tmp_path: f"--output_dir {tmp_path}/run", "holds a run already"),
    "no such device": (lambda *_: "--device cuda:99", "--device cuda:99"),
}


@pytest.mark.parametrize("case", EARLY_ERRORS)
def test_error_that_needs_no_training_is_one_line_and_leaves_nothing(place, folder, tmp_path, capsys, case):
    make, message = EARLY_ERRORS[case]
    argv = command(place, tmp_path / "new", f"{SHORT} {make(place, tmp_path)}")
    assert main(argv) == 2
    said = capsys.readouterr()
    assert message.format(tmp_path) in said.err and said.err.count("\n") == 1
    assert "step 1/" not in said.out and not (tmp_path / "new").exists()
    # What needs no data is said before they are read.
    assert "examples from" not in said.out or case not in ("finished run", "no such device")


def test_folder_in_use_is_refused(place, tmp_path, capsys):
    with lock_folder(tmp_path / "run"):
        assert main(command(place, tmp_path / "run")) == 2
    assert "in use by another run" in one_line(capsys)


@pytest.mark.parametrize("target", ["data/ids-sst-dev.csv", "run/args.json", "notes.txt", "link.csv"])
def test_output_never_replaces_another_file(place, folder, tmp_path, capsys, target):
    make_data(tmp_path / "data")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "link.csv").symlink_to(tmp_path / "data" / "ids-sst-dev.csv")
    before = contents(tmp_path)
    out = f"--sst_dev_out {tmp_path / target}"
    for argv in (
        command(place, tmp_path / "other", f"{SHORT} --data_dir {tmp_path}/data {out}"),
        ["--output_dir", str(folder), "--predict_only", *out.split()],
    ):
        assert main(argv) == 2
        error = one_line(capsys)
        assert "--sst_dev_out" in error and "is no prediction file" in error
    assert contents(tmp_path) == before


# --- numbers that are not finite, and lack of memory --------------------------------------------------------


def ids_of(place, task, split="train"):
    return read_rows(place / "data" / TASKS[task].files[split], TASKS[task], split).ids


@slow
def test_skipped_steps_name_the_examples_and_change_no_bit_of_a_resumed_run(
    place, tmp_path, monkeypatch, capsys
):
    """In two epochs of 24 examples, one has a label that is not a number, as a fault of our own would do.

    The examples to blame are looked for without dropout, which then goes on.
    """
    bad, real, was_training = ids_of(place, "sts")[4], TaskData.batch, []

    def batch(data, examples, *options):
        made = real(data, examples, *options)
        if data.rows.path.name == TASKS["sts"].files["train"]:
            made["labels"][[data.rows.ids[n] == bad for n in examples]] = math.nan
        return made

    monkeypatch.setattr(TaskData, "batch", batch)
    real_losses = MultitaskBERT.losses

    def losses(model, *args):
        was_training.append(model.training)
        return real_losses(model, *args)

    monkeypatch.setattr(MultitaskBERT, "losses", losses)
    flags = "--max_steps 6 --eval_every 3 --batch_size 8"
    assert main(command(place, tmp_path / "whole", flags)) == 0
    printed = capsys.readouterr().out
    assert printed.count(f"skipped for all tasks: sts loss is not finite, examples {bad}\n") == 2
    assert "warning: 2 of 6 steps were skipped" in printed and was_training.count(True) == 6
    assert json.loads((tmp_path / "whole" / "last" / "state.json").read_text())["skipped_steps"] == 2
    skipped = {line["step"]: line["skipped"] for line in log_of(tmp_path / "whole") if "skipped" in line}
    assert list(skipped.values()) == [{"sts": {"not_finite": "loss", "examples": [bad]}}] * 2
    first, second = skipped
    assert first <= 3 < second
    with monkeypatch.context() as patch:
        before_step(patch, lambda step: signal.raise_signal(signal.SIGTERM) if step == first - 1 else None)
        assert exit_code(command(place, tmp_path / "parts", flags)) == 143
    assert again(tmp_path / "parts") == 0
    assert read_run(tmp_path / "whole") == read_run(tmp_path / "parts")


@slow
def test_gradient_that_is_not_finite_names_the_batch(place, tmp_path, capsys, monkeypatch):
    real, calls = MultitaskBERT.losses, iter(range(9))

    def losses(model, pieces, *memory):
        found = real(model, pieces, *memory)
        if memory and next(calls) == 1:
            loss = found[[task for task, _ in pieces].index("para")]
            loss.register_hook(lambda grad: grad * math.nan)
        return found

    monkeypatch.setattr(MultitaskBERT, "losses", losses)
    assert main(command(place, tmp_path / "run", "--max_steps 2")) == 0
    named = re.search(r"para gradient is not finite, examples (.*)", capsys.readouterr().out)[1].split(", ")
    assert len(named) == 4 and set(named) <= set(ids_of(place, "para"))


@slow
def test_gradient_of_the_heads_that_is_not_finite_names_the_examples_too(place, tmp_path, capsys):
    """With a frozen encoder there is no other gradient."""
    flags = "--max_steps 9 --freeze_encoder --head_lr 1e10 --clip_norm 0 --max_bad_steps 2"
    assert main(command(place, tmp_path / "run", flags)) == 2
    error = one_line(capsys)
    assert "2 steps in a row" in error and "try a smaller --lr" in error
    skipped = [line["skipped"] for line in log_of(tmp_path / "run") if "skipped" in line]
    assert len(skipped) == 2 and all(skipped)
    assert all(bad["examples"] for found in skipped for bad in found.values())


@slow
def test_outputs_that_are_not_finite_leave_what_was_good(place, whole, tmp_path, capsys, monkeypatch):
    """One bad example out of 11 at the second evaluation; then in predictions of the run that went on."""
    real, bad_tasks, folder = MultitaskBERT.classify, set(), tmp_path / "run"

    def classify(model, task, *vectors):
        logits = real(model, task, *vectors)
        if task in bad_tasks and not model.training:
            logits[3] = math.nan
        return logits

    monkeypatch.setattr(MultitaskBERT, "classify", classify)
    with monkeypatch.context() as patch:
        before_step(patch, lambda step: bad_tasks.update({"para"} if step == 2 else ()))
        assert main(command(place, folder)) == 2
    error = one_line(capsys)
    bad = ids_of(place, "para", "dev")[3]
    assert f"step 4: para: 1 of 11 predictions are not finite, the first for id {bad};" in error
    assert error.endswith(f"{folder / 'last'} still holds step 2\n")
    assert step_of(folder / "last") == step_of(folder / "best") == 2
    bad_tasks.clear()
    assert again(folder) == 0
    assert read_run(folder) == read_run(whole())
    bad_tasks.add("sts")
    before = contents(folder)
    for mode in ("--eval_only", "--predict_only"):
        assert again(folder, mode) == 2
        assert "sts: 1 of 11 predictions are not finite" in one_line(capsys)
    assert contents(folder) == before


def test_lack_of_memory_names_batch_and_flags(place, tmp_path, capsys, monkeypatch):
    def fail(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(multitask_classifier, "train_step", fail)
    assert main(command(place, tmp_path / "run", "--max_steps 3 --sts_batch_size 9")) == 2
    error = one_line(capsys)
    assert "--sts_batch_size" in error and "--max_length" in error and "there is no checkpoint yet" in error
    assert re.search(r"batches .* sst \(4, \d+\), para \(8, \d+\), sts \(18, \d+\)", error)


# --- scores, the best checkpoint, warnings ------------------------------------------------------------------


DEV_SCORES = [(0.6, 0.5, 0.1), (0.2, 0.9, 0.09), (0.4, 0.4, 0.65), (0.45, 0.82, -0.2), (0.2, 0.9, -0.2)]


@slow
def test_best_is_the_checkpoint_that_is_best_by_the_stated_score(place, tmp_path, monkeypatch, capsys):
    """Better at steps 1 and 2, then worse twice, where 4 is better than 3; by mean, 3 were the best.

    And in the end a score is below its floor.
    """
    real, weights = multitask_classifier.evaluate, []

    def evaluate(model, *args):
        summary, predictions = real(model, *args)
        for task, score in zip(model.tasks, DEV_SCORES[len(weights)], strict=True):
            summary["tasks"][task][TASK_KINDS[TASKS[task].kind].main_score] = score
        weights.append(model.bert.embeddings.word_embeddings.weight.detach().clone())
        return summarise(summary["tasks"], model.tasks), predictions

    monkeypatch.setattr(multitask_classifier, "evaluate", evaluate)
    assert main(command(place, tmp_path, "--max_steps 4 --eval_every 1 --select_by para")) == 0
    stored = load_file(tmp_path / "best" / "model.safetensors")["bert.embeddings.word_embeddings.weight"]
    # The best one it is that is evaluated at the end.
    assert [torch.equal(stored, weight) for weight in weights] == [False, True, False, False, True]
    assert json.loads((tmp_path / "scores.json").read_text())["step"] == step_of(tmp_path / "best") == 2
    logged = [line for line in log_of(tmp_path) if "dev" in line]
    assert [line["score"] for line in logged] == [0.5, 0.9, 0.4, 0.82]
    floor = "sts is no better than the constant baseline"
    assert capsys.readouterr().out.count(f"warning: {floor}") == 2  # in the log, and at the end
    assert [any(floor in text for text in line["warnings"]) for line in logged] == [False] * 3 + [True]


@slow
def test_evaluation_in_another_way_leaves_the_runs_scores(folder, tmp_path, capsys):
    """Also of a run that was made on a machine that is not there."""
    args, path = folder / "args.json", folder / "scores.json"
    other = make_data(tmp_path / "other", start=50)
    path.write_text(path.read_text() + "\n")
    before = contents(folder)
    for flags in (
        "--eval_only --max_length 5",
        f"--eval_only --data_dir {other}",
        "--predict_only --predict_splits test",
    ):
        assert again(folder, flags) == 0
        assert f"{path} stays as it is" in capsys.readouterr().out and contents(folder) == before
    good = args.read_text()
    args.write_text(good.replace('"device": "cpu"', '"device": "cuda:7"'))
    assert again(folder, "--eval_only --device cpu") == 0
    assert path.read_bytes() == before[path]
    args.write_text(good)
    assert again(folder, "--predict_only") == 0
    assert path.read_text() + "\n" == before[path].decode()


# --- what a run leaves, and what it is good for -------------------------------------------------------------


@slow
def test_command_line_from_end_to_end(place, tmp_path, monkeypatch, capsys):
    """As a user runs it, with all modules imported anew, and what they find afterwards."""
    folder, script = tmp_path / "run", str(ROOT / "multitask_classifier.py")
    monkeypatch.setattr(sys, "argv", [script, *command(place, folder, "--max_steps 2")])
    with fresh_modules(), pytest.raises(SystemExit) as end:
        runpy.run_path(script, run_name="__main__")
    out, err = capsys.readouterr()
    assert end.value.code == 0 and "\r" not in out + err  # no progress bar when piped
    for task in DEFAULT_TASKS:
        for split in ("dev", "test"):
            path = folder / "predictions" / f"{task}-{split}-output.csv"
            assert str(path) in out and path.exists()
    names = "args.json data_report.json metrics.jsonl scores.json curves.png best last last.1 predictions"
    assert {path.name for path in folder.iterdir()} == set(names.split())
    scores = json.loads((folder / "scores.json").read_text())["dev"]
    mains = [scores["tasks"][task][TASK_KINDS[TASKS[task].kind].main_score] for task in DEFAULT_TASKS]
    assert scores["mean"] == pytest.approx(sum(mains) / 3)
    assert scores["mean_2024"] == pytest.approx((mains[0] + mains[1] + (mains[2] + 1) / 2) / 3)
    printed = re.findall(r"overall.*: (\S+)", out)
    assert printed == [f"{scores['mean']:.4f}", f"{scores['mean_2024']:.4f}"]


@slow
def test_args_and_data_report_say_what_was_used(place, tmp_path, monkeypatch, capsys):
    """In files that follow the umask, args.json among them, though it is lost during the run."""
    folder, data = tmp_path / "run", make_data(tmp_path / "data")
    dev, train = data / TASKS["sst"].files["dev"], data / TASKS["sst"].files["train"]
    rows = train.read_text(encoding="utf-8").splitlines(keepends=True)
    with open(dev, "a", encoding="utf-8") as file:  # the first training row, and one without a label
        file.write(rows[1] + rows[2].rpartition("\t")[0] + "\t\n")
    before_step(monkeypatch, lambda step: (folder / "args.json").unlink())
    umask = os.umask(0o027)
    try:
        assert main(command(place, folder, f"--max_steps 1 --sst_batch_size 99 --data_dir {data}")) == 0
    finally:
        os.umask(umask)
    printed = capsys.readouterr().out
    assert {path.stat().st_mode & 0o777 for path in contents(folder)} == {0o640}
    assert len({(folder / name / "args.json").read_text() for name in (".", "last", "best")}) == 1
    stored = json.loads((folder / "args.json").read_text())
    digest = hashlib.sha256(dev.read_bytes()).hexdigest()
    assert stored["data_files"][str(dev)] == digest and len(stored["data_files"]) == 9
    assert stored["args"]["seed"] == 11711 and "git" in stored and stored["versions"]["torch"]
    report = json.loads((folder / "data_report.json").read_text())
    found = report["tasks"]["sst"]["dev"]
    assert (found["rows"], found["examples"], found["sha256"]) == (13, 12, digest)
    assert found["warnings"]["no label"]["count"] == 1
    checks = {check["check"]: check["message"] for check in report["cross_checks"]}
    assert set(checks) >= {"overlap", "fewer rows than a batch"}
    assert all(f"warning: {message}" in printed for message in checks.values())
    assert "1 row without a label, left out (line 14)" in printed


@slow
def test_prediction_files_hold_the_predictions_that_were_scored(place, tmp_path):
    """Scores counted again from the files; and dev given as test too: each id gets the same prediction."""
    data = place / "data"
    flags = " ".join(f"--{task}_test {data / TASKS[task].files['dev']}" for task in DEFAULT_TASKS)
    assert main(command(place, tmp_path, f"--max_steps 3 --para_head cross --sts_head cosine {flags}")) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())["dev"]["tasks"]
    for task in DEFAULT_TASKS:
        spec = TASKS[task]
        rows = read_rows(data / spec.files["dev"], spec, "dev")
        files = [tmp_path / "predictions" / f"{task}-{split}-output.csv" for split in ("dev", "test")]
        dev, test = (read_predictions(path, spec) for path in files)
        predictions = np.array([dev[row_id] for row_id in rows.ids])
        assert TASK_KINDS[spec.kind].scores(predictions, rows.labels) == pytest.approx(scores[task], abs=1e-6)
        # The test file has rows without a label too, so batches differ: float32 rounding.
        assert [test[row_id] for row_id in rows.ids] == pytest.approx(list(predictions), abs=1e-5)


@slow
@pytest.mark.parametrize("split", ["dev", "test"])
def test_predictions_on_other_data_need_a_name_and_do_not_depend_on_the_rest(
    place, folder, tmp_path, capsys, split
):
    """A file with one row of the whole one; in float32."""
    header, *rows = (place / "data" / TASKS["sts"].files[split]).read_text().splitlines(keepends=True)
    (tmp_path / "one.csv").write_text(header + rows[4])
    before = contents(folder)
    flags = f"--predict_only --sts_{split} {tmp_path}/one.csv"
    assert again(folder, flags) == 2
    assert f"give --sts_{split}_out FILE" in one_line(capsys) and contents(folder) == before
    assert again(folder, f"{flags} --sts_{split}_out {tmp_path}/out.csv") == 0
    own = folder / "predictions" / f"sts-{split}-output.csv"
    assert own.read_bytes() == before[own]
    ((row_id, prediction),) = read_predictions(tmp_path / "out.csv", TASKS["sts"]).items()
    assert prediction == pytest.approx(
        read_predictions(own, TASKS["sts"])[row_id], abs=1e-5
    )  # float32 rounding


@slow
def test_best_checkpoint_is_an_encoder_for_the_next_run(place, tmp_path, capsys):
    """Also where embeddings are padded; and without a test file there are no predictions for it."""
    encoder, data = make_encoder(tmp_path / "encoder"), make_data(tmp_path / "data")
    BertModel(make_config(128)).save_pretrained(encoder)
    (data / TASKS["sts"].files["test"]).unlink()
    for source, name in [(encoder, "a"), (tmp_path / "a" / "best", "b")]:
        flags = f"--max_steps 1 --pretrained {source} --data_dir {data}"
        assert main(command(place, tmp_path / name, flags)) == 0
        printed = capsys.readouterr().out
        assert f"--pretrained {source}: vocabulary of" in printed and "39 of 39 weights loaded" in printed
        assert "no test predictions for sts" in printed
        assert not (tmp_path / name / "predictions" / "sts-test-output.csv").exists()


def test_curves_are_drawn_anew_for_a_twentieth_of_the_time(monkeypatch, tmp_path):
    clock, drawn = [0.0], []

    def plot(folder):
        drawn.append(clock[0])
        clock[0] += 3  # seconds that it takes

    monkeypatch.setattr(multitask_classifier, "plot_run", plot)
    monkeypatch.setattr(multitask_classifier.time, "perf_counter", lambda: clock[0])
    curves = multitask_classifier.FreshCurves(tmp_path)
    for _ in range(20):
        clock[0] += 10
        curves.refresh()
    assert drawn == [20, 83, 146, 209]  # after 20 s by the first guess, then each 60 s


def test_curves_that_cannot_be_drawn_do_not_fail_the_run(monkeypatch, capsys, tmp_path):
    def fail(folder):
        raise MemoryError

    monkeypatch.setattr(multitask_classifier, "plot_run", fail)
    assert multitask_classifier.draw_curves(tmp_path) == ""
    assert "warning: no curves" in capsys.readouterr().out


@slow
def test_float16_overflows_are_counted_apart_from_faults(place, tmp_path, capsys, monkeypatch):
    """The scale falls until the gradients fit; that is no reason to give up, as a loss that is NaN is."""
    flags = "--precision fp16 --task_weights sts=5 --max_steps 12 --eval_every 6 --max_bad_steps 1"
    folder = tmp_path / "overflow"
    assert main(command(place, folder, flags)) == 0
    printed = capsys.readouterr()
    state = json.loads((folder / "last" / "state.json").read_text())
    found, count = state["loss_scale"], state["loss_scale"]["overflow_steps"]
    assert 3 < count < 12 and found["scale"] == 2 ** (16 - count) and found["good_steps"] <= 12 - count
    assert state["skipped_steps"] == state["bad_steps"] == 0
    assert set(state["optimizer_steps"]) == {12 - count}
    assert f"\n{count} of 12 steps were skipped because a float16 gradient overflowed; " in printed.out
    assert "warning: step" not in printed.out + printed.err
    logged = [line for line in read_metrics(folder) if "loss" in line]
    assert (logged[-1]["loss_scale"], logged[-1]["overflow_steps"]) == (found["scale"], count)
    assert all(math.isfinite(line["grad_norm"]) for line in logged)

    real = MultitaskBERT.losses
    monkeypatch.setattr(MultitaskBERT, "losses", lambda *args: [loss * math.nan for loss in real(*args)])
    assert main(command(place, tmp_path / "fault", flags)) == 2
    assert "1 steps in a row without a finite loss and gradient" in capsys.readouterr().err
