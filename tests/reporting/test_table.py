"""The table's command: its flags, its guards against mixed settings, and small tables from end to end.

Training runs in this process or in forks of it, which need not import anything; that commands start, stop
and inherit what they need is tested in test_jobs.py.
"""

import csv
import importlib
import json
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import multitask_classifier
from config import DEFAULT_TASKS
from reporting import table
from reporting.poster import ROWS
from reporting.table import (
    check_settings,
    check_training_data,
    folder_of,
    get_args,
    is_finished,
    main,
    make_job,
)
from support.errors import UserError
from support.files import ROOT
from tests.fake_runs import all_tasks, make_table
from tests.tiny import make_data, make_encoder
from training import pretrain_mlm
from training.flags import get_args as get_run_args

TINY_RUN = "-- --batch_size 4 --eval_max_examples 5"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("table with spaces")
    make_encoder(folder / "encoder")
    make_data(folder / "data")
    return folder


def command(place, flags, run_flags=TINY_RUN, **paths):
    """A command line in `place`; `paths` take the place of its own."""
    places = {"pretrained": "encoder", "data_dir": "data", "runs_dir": "runs", "results_dir": "results"}
    paths = {name: place / folder for name, folder in places.items()} | paths
    argv = [part for name, path in paths.items() for part in (f"--{name}", str(path))]
    return [*argv, "--max_steps", "3", "--num_resamples", "50", *flags.split(), *run_flags.split()]


def change_given(folder, **flags):
    """Let a run say that it was given these flags."""
    facts = json.loads((folder / "args.json").read_text())
    facts["args"]["given"] |= flags
    (folder / "args.json").write_text(json.dumps(facts))


def snapshot(folder):
    """When each file was last written."""
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


class Forked(multiprocessing.get_context("fork").Process):
    """In place of `subprocess.Popen`: the `main` that a command would call, in a fork."""

    def __init__(self, command, stdout, env, **options):
        super().__init__(target=self.work, args=(command[1:], stdout, env))
        self.start()

    def work(self, command, stdout, env):
        sys.stdout = sys.stderr = stdout
        os.environ.update(env)
        sys.argv = command[1:] if command[0] == "-m" else command
        module = importlib.import_module(Path(sys.argv[0]).name.removesuffix(".py"))
        sys.exit(module.main(sys.argv[1:]))

    returncode = property(lambda process: process.exitcode)
    poll, wait = returncode.fget, multiprocessing.process.BaseProcess.join


@pytest.fixture
def started(monkeypatch):
    """The jobs whose commands were run, which happens in this process."""
    names = []

    def run_jobs(jobs, *args, **options):
        for job in jobs:
            while job.stage:
                names.append(job.name)
                monkeypatch.setattr(sys, "argv", list(job.stage.next_command()[1:]))  # goes into args.json
                assert multitask_classifier.main(sys.argv[1:]) == 0
        return []

    monkeypatch.setattr(table, "run_jobs", run_jobs)
    monkeypatch.setattr(multitask_classifier, "plot_run", lambda folder: None)
    return names


# --- rows and flags ---------------------------------------------------------------------------------------


def test_rows_and_all_folders_differ_and_commands_start_the_projects_own_files(tmp_path, monkeypatch):
    """From whatever folder: scripts by their whole path, modules by PYTHONPATH (see test_jobs.py)."""
    assert all(re.fullmatch(r"[a-z0-9_]+", row) for row in ROWS)
    recipes = {
        (str(sorted(get_run_args(spec.flags.split()).given.items())), spec.pretrain) for spec in ROWS.values()
    }
    assert len(recipes) == len(ROWS)
    monkeypatch.chdir(tmp_path)
    args = get_args(["--seeds", "0", "1", "11"])
    jobs = {(row, seed): make_job(args.shared, row, seed) for row in ROWS for seed in args.seeds}
    folders = [stage.folder for job in jobs.values() for stage in job.stages]
    folders += [job.log for job in jobs.values()]
    assert len(set(folders)) == len(folders) and not any(tmp_path.iterdir())
    encoder, train = jobs["further_pretraining", 0].stages
    assert train.command[1] == train.resume[1] == str(ROOT / "multitask_classifier.py")
    assert Path(train.command[1]).is_file() and encoder.command[1:3] == ["-m", "training.pretrain_mlm"]


def test_dry_run_lists_commands_that_parse_and_missing_files_and_does_nothing(
    place, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(table, "matrix_rate", lambda: 1e10)
    monkeypatch.setattr(subprocess, "Popen", None)
    argv = ["--data_dir", str(place / "data"), "--dry_run", "--seeds", "3", "4", "--", "--lr", "3e-5"]
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("    ")]
    commands = [(argv[1], argv[2:]) if argv[0] == "-m" else (argv[0], argv[1:]) for argv in commands]
    groups = [line for line in lines if re.fullmatch(r"\w.*: \d+", line)]
    assert groups == ["rows of the poster: 8", "its future steps: 4", "control: 1"]
    assert re.findall(r"^  (\w+):", "\n".join(lines), re.MULTILINE) == list(ROWS)
    runs = [get_run_args(argv) for script, argv in commands if script == "multitask_classifier.py"]
    assert [Path(run.output_dir).name for run in runs] == [f"{row}-seed{n}" for row in ROWS for n in (3, 4)]
    assert [run.seed for run in runs] == [3, 4] * len(ROWS)
    assert all(run.lr == (1e-5 if "untuned" in run.output_dir else 3e-5) for run in runs)  # a row's own wins
    encoders = [pretrain_mlm.get_args(argv) for script, argv in commands if script == "training.pretrain_mlm"]
    assert len(encoders) == 2 and len(runs) + len(encoders) == len(commands)
    further = [run.pretrained for run in runs if "further" in run.output_dir]
    assert [encoder.output_dir for encoder in encoders] == further
    assert f"{2 * len(ROWS)} runs" in lines[-1] and not any(tmp_path.iterdir())
    # The tiny data have SICK and trees, but not the other sources.
    missing = [line.rpartition("/")[2] for line in lines if line.startswith("missing: ")]
    assert "dev_and_test.tsv, needed by similar_data" in missing
    assert len(missing) > 2 and not any("SICK" in line for line in missing)


def test_regimes_are_rows_in_other_circumstances(capsys):
    args = get_args(["--regime", "tuned", "course_redrawn", "--rows", "minbert", "diff"])
    assert args.rows == ["minbert", "diff", "course_redrawn.diff"]
    flags = get_run_args(table.run_flags(args.shared, "course_redrawn.diff", 0))
    assert (flags.pooling, flags.lr, flags.head_lr, flags.clip_norm) == ("pooler", 1e-4, 1e-4, 0)
    assert (flags.redraw_layers, flags.sts_head, flags.grad_method) == (3, "diff", "sum")
    args = get_args(["--regime", "course", "--pretrained", "bert-base-uncased"])
    assert args.rows == [f"course.{row}" for row in ("baseline", "cosine", "diff", "surgery_diff")]
    flags = get_run_args(table.run_flags(args.shared, "course.surgery_diff", 0))
    assert (flags.lr, flags.redraw_layers, flags.grad_method) == (1e-5, 0, "pcgrad")
    for wrong in ("--regime course --rows minbert", "--regime course -- --clip_norm 1"):
        with pytest.raises(SystemExit):
            get_args(wrong.split())
        assert "--regime course has" in (error := capsys.readouterr().err) or "--clip_norm is given" in error


WRONG = {
    "--rows nonsense": "'nonsense'",
    "--rows diff diff": "--rows holds a value twice",
    "--seeds 0 0": "--seeds holds a value twice",
    "--seeds -1": "--seeds",
    "--num_resamples 0": "--num_resamples",
    "--compare diff": "--compare",
    "--dry": "--dry",
    "-- --lr 0": "--lr",
    "-- nonsense": "nonsense",
    "-- --select_by sts": "--select_by names sts",  # which the row with sentiment alone does not have
}
OWN = "--output_dir x, --overwrite, --resume, --predict_only, --data_dir x, --tasks sst, --pretrained x"
OWN += ", --max_steps 7, --seed 7, --sts_dev x, --sts_dev_out x, --predict_splits test"
OWN += ", --prediction_style handout"
# Given to every run, it would make rows the same, or have no effect on most.
DIFFER = "--head_layers 2, --grad_method sum, --extra_data sick, --warmup_steps 5, --task_weights sts=2"
for flags, why in ((OWN, "the table has to know it"), (DIFFER, "rows of the table differ in it")):
    WRONG |= {f"-- {flag}": f"{flag.split()[0]} is given after --, but {why}" for flag in flags.split(", ")}


def test_wrong_flags_end_in_one_line(tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    for flags, message in WRONG.items():
        error = refused(main, ["--dry_run", *flags.split()])
        assert " error: " in error and message in error, flags
    assert not any(tmp_path.iterdir())


def test_results_in_a_runs_folder_are_refused_before_anything_runs(place, tmp_path, monkeypatch, one_line):
    monkeypatch.setattr(table, "run_jobs", None)
    path = tmp_path / "predictions" / "sst-test-output.csv"
    path.parent.mkdir()
    path.write_text("id \t Predicted_Sentiment \n")
    assert main(command(place, "--rows diff --seeds 0", results_dir=tmp_path)) == 2
    assert f"--results_dir {tmp_path}: predictions/sst-test-output.csv" in one_line()


# --- run folders ------------------------------------------------------------------------------------------


def die(*args):
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def made(place):
    """A finished run of the row "diff" that had died between its first best/ and its first last/."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multitask_classifier, "plot_run", lambda folder: None)
        args = get_args(command(place, "--rows diff --seeds 0", runs_dir=place / "made"))
        (stage,) = make_job(args.shared, "diff", 0).stages
        with pytest.MonkeyPatch.context() as dying:
            dying.setattr("training.run_folder.save_tensors", die)  # of the optimizer: best/ is there by then
            assert multitask_classifier.main(list(stage.next_command()[2:])) == 130
        assert (stage.folder / "best").exists() and not (stage.folder / "last").exists()
        assert stage.next_command() == stage.resume
        assert multitask_classifier.main(list(stage.next_command()[2:])) == 0
    return stage.folder


def test_run_without_all_its_results_is_not_finished(made, tmp_path):
    assert is_finished(made)
    names = [f"predictions/{task}-dev-output.csv" for task in DEFAULT_TASKS]
    for number, name in enumerate(["scores.json", "predictions", *names]):
        folder = shutil.copytree(made, tmp_path / str(number))
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert not is_finished(folder), name


OTHER = [
    ("--max_steps 4", TINY_RUN, "max_steps"),
    ("--pretrained minilm", TINY_RUN, "pretrained"),
    ("", f"{TINY_RUN} --lr 0.1", "lr"),
    ("", "-- --batch_size 5 --eval_max_examples 5", "batch_size"),
    ("", "-- --batch_size 4", "eval_max_examples"),
    ("", f"{TINY_RUN} --patience 1", "patience"),
    ("", f"{TINY_RUN} --max_length 20", "max_length"),
]


def test_folder_with_other_settings_is_refused_by_name(place, made, tmp_path, one_line):
    before = snapshot(place)
    for flags, run_flags, name in OTHER:
        flags = f"--rows diff --seeds 0 --no_train {flags}"
        assert main(command(place, flags, run_flags, runs_dir=made.parent)) == 2
        assert re.search(rf"{re.escape(str(made))}.*--{name} ", one_line())
    assert snapshot(place) == before
    shared = get_args(command(place, "--rows diff", runs_dir=made.parent)).shared
    more = shutil.copytree(made, tmp_path / "more")
    change_given(more, lr=0.1)
    for row, seed, folder, message in (
        ("diff", 1, made, "--seed 0, .* asks for 1;"),
        ("surgery_diff", 0, made, "--grad_method sum"),
        ("diff", 0, more, r"--lr 0.1, .* asks for \(default\);"),
    ):
        with pytest.raises(UserError, match=message):
            check_settings(shared, row, seed, folder)
    # It may have been moved, and made on another machine.
    free = f"{TINY_RUN} --device cpu --precision fp32 --log_every 1"
    argv = command(place, "--rows diff --seeds 0", free, data_dir=tmp_path, runs_dir=tmp_path)
    for folder in (shutil.copytree(made, tmp_path / "moved"), tmp_path / "nothing"):
        check_settings(get_args(argv).shared, "diff", 0, folder)


def test_runs_with_other_training_data_are_refused(data_dir, tmp_path):
    rows = {"diff": {0: all_tasks()}, "baseline": {0: all_tasks(), 1: all_tasks()}}
    runs = make_table(tmp_path, data_dir, rows).runs
    check_training_data(runs)
    facts = runs["baseline"][1].facts
    facts["data"]["train"]["para"] = "another"
    message = "baseline-seed1: was trained on other para data .another. than .*diff-seed0"
    with pytest.raises(UserError, match=message):
        check_training_data(runs)
    facts["args"]["extra_data"] = {"mrpc": None}  # which explains it
    check_training_data(runs)


# --- from end to end --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_table_from_end_to_end(place, started, capsys, monkeypatch):
    rows, runs_dir, results_dir = ("baseline", "surgery_diff"), place / "runs", place / "results"
    argv = command(place, f"--rows {' '.join(rows)} --seeds 0 1")
    folders = {(row, seed): folder_of(runs_dir, row, seed) for row in rows for seed in (0, 1)}
    monkeypatch.setattr("reporting.table_pages.draw_figures", lambda table: {})  # which takes seconds
    assert main(argv) == 0
    output = capsys.readouterr().out
    assert "claim 2a" in output and "claim 5a not measured" in output
    names = [f"{row}-seed{seed}" for seed in (0, 1) for row in rows]  # a seed of all rows first
    assert started[:-1] == names

    scores = {
        name: json.loads((folder / "scores.json").read_text())["dev"] for name, folder in folders.items()
    }
    with open(results_dir / "runs.csv", encoding="utf-8", newline="") as file:
        found = {(line["row"], int(line["seed"])): float(line["mean"]) for line in csv.DictReader(file)}
    assert found == pytest.approx({name: summary["mean"] for name, summary in scores.items()})
    assert list(found) == [(row, seed) for row in rows for seed in (0, 1)]
    text = (results_dir / "table.md").read_text(encoding="utf-8")
    assert all(ROWS[row].title in text for row in rows) and str(place / "encoder") in text
    assert text.count("python multitask_classifier.py ") == 2  # the first run of each row
    assert "    python results_table.py " in text
    means = {row: scores[row, 0]["mean"] + scores[row, 1]["mean"] for row in rows}
    best_row = max(means, key=means.get)
    best_seed = max((0, 1), key=lambda seed: scores[best_row, seed]["mean"])
    assert started[-1] == f"{best_row}-seed{best_seed}-test"
    for task in DEFAULT_TASKS:
        name = f"predictions/{task}-test-output.csv"
        assert (results_dir / name).read_bytes() == (folders[best_row, best_seed] / name).read_bytes()

    # A second time there is nothing to do but the table.
    before = snapshot(runs_dir)
    assert main(argv) == 0

    # Differences of two rows.
    capsys.readouterr()
    assert main(command(place, "--seeds 0 1 --compare surgery_diff baseline")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and "seeds 0 1" in lines[0]
    printed = {line.split()[0]: float(re.search(r"[+-]\d+\.\d", line)[0]) for line in lines if line[0] == " "}
    ours, others = (
        sum(scores[row, seed]["tasks"]["sts"]["pearson"] for seed in (0, 1)) / 2
        for row in ("surgery_diff", "baseline")
    )
    assert printed["similarity"] == pytest.approx(100 * (ours - others), abs=0.051)
    assert snapshot(runs_dir) == before and len(started) == 5


@pytest.mark.slow
def test_what_fails_is_named_and_the_table_of_the_rest_is_written(place, made, tmp_path, monkeypatch, capsys):
    """In a folder other than the project's, with paths relative to it.

    A row whose data are missing, and missing test data: the other rows get their table all the same, and
    further pre-training gives its run the encoder.
    """
    pipes = {"DEVNULL": subprocess.DEVNULL, "STDOUT": subprocess.STDOUT}
    monkeypatch.setattr("reporting.jobs.subprocess", SimpleNamespace(Popen=Forked, **pipes))
    monkeypatch.setattr("reporting.jobs.POLL_SECONDS", 0.02)
    monkeypatch.setattr(multitask_classifier, "plot_run", lambda folder: None)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place / "encoder", "encoder")
    shutil.copytree(place / "data", "data")
    Path("data/sts-test-student.csv").unlink()
    shutil.copytree(made, f"runs/{made.name}")
    change_given(Path("runs", made.name), pretrained="encoder")
    monkeypatch.setattr("reporting.table_pages.draw_figures", lambda table: {})
    argv = command(Path(), "--rows diff further_pretraining similar_data --seeds 0")
    assert main(argv) == 2
    output = capsys.readouterr()
    assert output.err.count("\n") == 1 and "1 of 3 runs failed: similar_data-seed0: " in output.err
    assert "data/extra" in output.err and "exit code 2" in output.err
    assert "warning: no predictions of the test set: " in output.out
    logs = {path.stem: path.read_text() for path in Path("runs").glob("*.log")}
    tests = [name for name in logs if name.endswith("-test")]
    starts = {name: len(re.findall(r"^\$ ", log, re.MULTILINE)) for name, log in logs.items()}
    assert len(tests) == 1  # and no endless loop
    assert starts == {"further_pretraining-seed0": 2, "similar_data-seed0": 1, tests[0]: 1}
    text = Path("results/table.md").read_text(encoding="utf-8")
    assert ROWS["diff"].title in text and ROWS["similar_data"].title not in text
    assert "no run has predicted it yet" in text

    shared = get_args(argv).shared
    encoder, folder = (stage.folder for stage in make_job(shared, "further_pretraining", 0).stages)
    assert (encoder / "model.safetensors").exists() and is_finished(folder) and not (folder / "last").exists()
    run, first = (json.loads((path / "args.json").read_text())["args"] for path in (folder, encoder))
    assert run["pretrained"] == str(encoder) and run["grad_method"] == "pcgrad"
    assert first["pretrained"] == "encoder" and first["max_steps"] == 3
    shutil.rmtree(folder)  # the encoder alone was made with other settings
    for flags, name in (("--max_steps 4", "max_steps"), ("--pretrained minilm", "pretrained")):
        other = get_args([*argv[: argv.index("--")], *flags.split(), *TINY_RUN.split()])
        with pytest.raises(UserError, match=f"encoder-seed0.*--{name} "):
            check_settings(other.shared, "further_pretraining", 0, folder)
