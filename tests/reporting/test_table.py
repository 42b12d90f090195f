"""The table's command: its flags, its guards against mixed settings, and small tables from end to end."""

import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import multitask_classifier
from config import DEFAULT_TASKS
from reporting import table
from reporting.jobs import run_jobs
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
from reporting.table_pages import PICTURES
from support.errors import UserError
from support.files import ROOT
from tests.fake_runs import all_tasks, make_table
from tests.tiny import make_data, make_encoder
from training import pretrain_mlm
from training.flags import get_args as get_run_args

PATIENCE = 600  # seconds until something is taken to have failed
TINY = "--max_steps 3 --num_resamples 50"
TINY_RUN = "-- --batch_size 4 --eval_max_examples 5"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("table with spaces")
    make_encoder(folder / "encoder")
    make_data(folder / "data")
    return folder


def command(place, flags, run_flags=TINY_RUN, runs="runs", **paths):
    """A command line in `place`; `paths` take the place of its own."""
    paths = {
        "pretrained": place / "encoder",
        "data_dir": place / "data",
        "runs_dir": place / runs,
        "results_dir": place / f"{runs}-results",
    } | paths
    argv = [part for name, path in paths.items() for part in (f"--{name}", str(path))]
    return [*argv, *TINY.split(), *flags.split(), *run_flags.split()]


def wait_for(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def snapshot(folder):
    """When each file was last written."""
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


def starts(runs_dir):
    """Log file -> how often a command was started."""
    logs = sorted(runs_dir.glob("*.log"))
    return {log.stem: sum(line.startswith("$ ") for line in log.read_text().splitlines()) for log in logs}


def test_results_in_a_runs_folder_are_refused_before_anything_runs(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(table, "run_jobs", None)
    path = tmp_path / "predictions" / "sst-test-output.csv"
    path.parent.mkdir()
    path.write_text("id \t Predicted_Sentiment \n")
    assert main(command(place, "--rows diff --seeds 0", results_dir=tmp_path)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"--results_dir {tmp_path}: predictions/sst-test-output.csv" in error


# --- rows and flags ---------------------------------------------------------------------------------------


def test_rows_differ_and_so_do_all_folders(tmp_path):
    assert all(re.fullmatch(r"[a-z0-9_]+", row) for row in ROWS)
    recipes = [
        (str(sorted(get_run_args(spec.flags.split()).given.items())), spec.pretrain) for spec in ROWS.values()
    ]
    assert len(set(recipes)) == len(ROWS)
    args = get_args(["--runs_dir", str(tmp_path), "--seeds", "0", "1", "11"])
    jobs = [make_job(args, row, seed) for row in ROWS for seed in args.seeds]
    folders = [stage.folder for job in jobs for stage in job.stages] + [job.log for job in jobs]
    assert len(set(folders)) == len(folders)
    assert not any(tmp_path.iterdir())


def test_commands_start_the_projects_own_files(tmp_path, monkeypatch):
    """From whatever folder: scripts by their whole path, modules by PYTHONPATH (see test_jobs.py)."""
    monkeypatch.chdir(tmp_path)
    encoder, train = make_job(get_args([]), "further_pretraining", 0).stages
    assert train.command[1] == train.resume[1] == str(ROOT / "multitask_classifier.py")
    assert Path(train.command[1]).is_file()
    assert encoder.command[1:3] == ["-m", "training.pretrain_mlm"]


def test_dry_run_lists_commands_that_parse_and_does_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(table, "matrix_rate", lambda: 1e10)
    monkeypatch.setattr(subprocess, "Popen", None)
    assert main(["--dry_run", "--seeds", "3", "4", "--", "--lr", "3e-5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("    ")]
    commands = [(argv[1], argv[2:]) if argv[0] == "-m" else (argv[0], argv[1:]) for argv in commands]
    groups = [line for line in lines if re.fullmatch(r"\w.*: \d+", line)]
    assert groups == ["rows of the poster: 8", "its future steps: 4", "control: 1"]
    assert re.findall(r"^  (\w+):", "\n".join(lines), re.MULTILINE) == list(ROWS)
    runs = [get_run_args(argv) for script, argv in commands if script == "multitask_classifier.py"]
    names = [Path(run.output_dir).name for run in runs]
    assert names == [f"{row}-seed{seed}" for row in ROWS for seed in (3, 4)]
    assert [run.seed for run in runs] == [3, 4] * len(ROWS)
    assert all(run.lr == (1e-5 if "untuned" in run.output_dir else 3e-5) for run in runs)  # a row's own wins
    encoders = [pretrain_mlm.get_args(argv) for script, argv in commands if script == "training.pretrain_mlm"]
    assert len(encoders) == 2 and len(runs) + len(encoders) == len(commands)
    further = [run.pretrained for run in runs if "further" in run.output_dir]
    assert [encoder.output_dir for encoder in encoders] == further
    assert f"{2 * len(ROWS)} runs" in lines[-1]
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags",
    [
        "--rows nonsense",
        "--rows diff diff",
        "--seeds 0 0",
        "--seeds -1",
        "--num_resamples 0",
        "--compare diff",
        "--dry",
        "-- --lr 0",
        "-- nonsense",
        "-- --select_by sts",  # which the row with sentiment alone does not have
    ],
)
def test_wrong_flags_end_in_one_line(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["--dry_run", *flags.split()])
    output = capsys.readouterr()
    assert end.value.code == 2
    assert output.out == "" and output.err.count("\n") == 1 and "error: " in output.err
    assert not any(tmp_path.iterdir())


OWN = "the table has to know it"
# Given to every run, it would make rows the same, or have no effect on most.
DIFFER = "rows of the table differ in it"


@pytest.mark.parametrize(
    ("flag", "why"),
    [
        ("--output_dir x", OWN),
        ("--overwrite", OWN),
        ("--resume", OWN),
        ("--predict_only", OWN),
        ("--data_dir x", OWN),
        ("--tasks sst", OWN),
        ("--pretrained x", OWN),
        ("--max_steps 7", OWN),
        ("--seed 7", OWN),
        ("--sts_dev x", OWN),
        ("--sts_dev_out x", OWN),
        ("--predict_splits test", OWN),
        ("--prediction_style handout", OWN),
        ("--head_layers 2", DIFFER),
        ("--grad_method sum", DIFFER),
        ("--extra_data sick", DIFFER),
        ("--warmup_steps 5", DIFFER),
        ("--task_weights sts=2", DIFFER),
    ],
)
def test_flags_that_runs_may_not_be_given(flag, why, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--dry_run", "--", *flag.split()])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert error.startswith(f"results_table.py: error: {flag.split()[0]} ") and why in error


def test_other_flags_go_to_every_run():
    flags = ["--lr", "3e-5", "--pooling", "cls"]
    assert get_args(["--", *flags]).run_flags == flags


def test_dry_run_names_missing_files(place, tmp_path, monkeypatch, capsys):
    """The tiny data have SICK, but not the other sources."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(table, "matrix_rate", lambda: 1e10)
    assert main(["--dry_run", "--data_dir", str(place / "data"), "--rows", "diff", "similar_data"]) == 0
    missing = [line for line in capsys.readouterr().out.splitlines() if line.startswith("missing: ")]
    assert [Path(line.split(",")[0]).name for line in missing] == ["dev_and_test.tsv", "train.txt"]
    assert all(line.endswith("needed by similar_data") for line in missing)


# --- run folders ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(place):
    """A finished run of the row "diff" that had died between its first best/ and its first last/."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multitask_classifier, "plot_run", lambda folder: None)
        args = get_args(command(place, "--rows diff --seeds 0", runs="made"))
        (stage,) = make_job(args, "diff", 0).stages
        with pytest.MonkeyPatch.context() as dying:
            dying.setattr("training.run_folder.save_tensors", die)  # of the optimizer: best/ is there by then
            assert multitask_classifier.main(list(stage.next_command()[2:])) == 130
        assert (stage.folder / "best").exists() and not (stage.folder / "last").exists()
        assert stage.next_command() == stage.resume
        assert multitask_classifier.main(list(stage.next_command()[2:])) == 0
    assert is_finished(stage.folder)
    return stage.folder


def die(*args):
    raise KeyboardInterrupt


def test_run_without_all_its_results_is_not_finished(made, tmp_path):
    assert is_finished(made)
    names = [f"predictions/{task}-dev-output.csv" for task in DEFAULT_TASKS]
    for number, name in enumerate(["scores.json", "predictions", *names]):
        folder = shutil.copytree(made, tmp_path / str(number))
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert not is_finished(folder), name


@pytest.mark.parametrize(
    ("flags", "run_flags", "name"),
    [
        ("--max_steps 4", TINY_RUN, "max_steps"),
        ("--pretrained minilm", TINY_RUN, "pretrained"),
        ("", f"{TINY_RUN} --lr 0.1", "lr"),
        ("", "-- --batch_size 5 --eval_max_examples 5", "batch_size"),
        ("", "-- --batch_size 4", "eval_max_examples"),
        ("", f"{TINY_RUN} --patience 1", "patience"),
        ("", f"{TINY_RUN} --max_length 20", "max_length"),
    ],
)
def test_folder_with_other_settings_is_refused_by_name(place, made, flags, run_flags, name, capsys):
    argv = command(place, f"--rows diff --seeds 0 --no_train {flags}", run_flags, runs="made")
    with pytest.raises(UserError, match=f"diff-seed0.*--{name} "):
        check_settings(get_args(argv), "diff", 0, made)
    before = snapshot(place)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(made) in error
    assert snapshot(place) == before


def test_folder_of_another_row_or_seed_or_with_more_flags_is_refused(place, made, tmp_path):
    args = get_args(command(place, "--rows diff", runs="made"))
    with pytest.raises(UserError, match="--seed 0, .* asks for 1;"):
        check_settings(args, "diff", 1, made)
    with pytest.raises(UserError, match="--grad_method sum"):
        check_settings(args, "surgery_diff", 0, made)
    path = shutil.copytree(made, tmp_path / "more") / "args.json"
    facts = json.loads(path.read_text())
    facts["args"]["given"]["lr"] = 0.1
    path.write_text(json.dumps(facts))
    with pytest.raises(UserError, match=r"--lr 0.1, .* asks for \(default\);"):
        check_settings(args, "diff", 0, path.parent)


def test_folder_may_have_been_moved_and_made_on_another_machine(place, made, tmp_path):
    moved = shutil.copytree(made, tmp_path / "moved")
    free = f"{TINY_RUN} --device cpu --precision fp32 --log_every 1"
    argv = command(place, "--rows diff --seeds 0", free, data_dir=tmp_path, runs_dir=tmp_path)
    check_settings(get_args(argv), "diff", 0, moved)
    check_settings(get_args(argv), "diff", 0, tmp_path / "nothing")


def test_runs_with_other_training_data_are_refused(place, tmp_path):
    rows = {"diff": {0: all_tasks()}, "baseline": {0: all_tasks(), 1: all_tasks()}}
    runs = make_table(tmp_path, place / "data", rows).runs
    check_training_data(runs)
    facts = runs["baseline"][1].facts
    facts["data"]["train"]["para"] = "another"
    with pytest.raises(
        UserError, match="baseline-seed1: was trained on other para data .another. than .*diff-seed0"
    ):
        check_training_data(runs)
    facts["args"]["extra_data"] = {"mrpc": None}  # which explains it
    check_training_data(runs)


# --- from end to end --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_table_from_end_to_end(place, capsys, monkeypatch):
    rows, runs_dir, results_dir = ("baseline", "surgery_diff"), place / "runs", place / "runs-results"
    argv = command(place, f"--rows {' '.join(rows)} --seeds 0 1")
    folders = {(row, seed): folder_of(runs_dir, row, seed) for row in rows for seed in (0, 1)}

    # The first runner is killed when the first run is finished and the second has started.
    runner = subprocess.Popen(
        [sys.executable, str(ROOT / "results_table.py"), *argv], stdout=subprocess.DEVNULL, cwd=place
    )
    try:
        wait_for((folders["surgery_diff", 0] / "args.json").exists)
    finally:
        runner.kill()
        runner.wait()
    first = folders["baseline", 0]
    assert is_finished(first) and not (first / "last").exists()
    before, texts = snapshot(first), {path: path.read_bytes() for path in snapshot(first)}
    assert not results_dir.exists()

    assert main(argv) == 0
    output = capsys.readouterr().out
    assert "claim 2a" in output and "claim 5a not measured" in output
    # Each run was started once: the one that the killed runner left behind went on, and was waited for.
    best = [name.removesuffix("-test") for name in starts(runs_dir) if name.endswith("-test")]
    expected = {folder.name: 1 for folder in folders.values()} | {f"{name}-test": 1 for name in best}
    assert starts(runs_dir) == expected and len(best) == 1
    for path, moment in before.items():
        assert path.stat().st_mtime_ns == moment, path
        assert path.read_bytes() == texts[path], path

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
    assert {path.name for path in results_dir.glob("*.png")} == set(PICTURES)
    means = {row: scores[row, 0]["mean"] + scores[row, 1]["mean"] for row in rows}
    best_row = max(means, key=means.get)
    best_seed = max((0, 1), key=lambda seed: scores[best_row, seed]["mean"])
    assert best == [f"{best_row}-seed{best_seed}"]
    for task in DEFAULT_TASKS:
        name = f"{task}-test-output.csv"
        predictions = (results_dir / "predictions" / name).read_bytes()
        assert predictions == (folders[best_row, best_seed] / "predictions" / name).read_bytes()

    # A third time there is nothing to do but the table; its pictures take seconds.
    before = snapshot(runs_dir)
    monkeypatch.setattr("reporting.table_pages.draw_figures", lambda table: {})
    assert main(argv) == 0
    assert snapshot(runs_dir) == before and starts(runs_dir) == expected

    # Differences of two rows.
    capsys.readouterr()
    assert main(command(place, "--seeds 0 1 --compare surgery_diff baseline")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and "seeds 0 1" in lines[0]
    printed = {line.split()[0]: float(re.search(r"[+-]\d+\.\d", line)[0]) for line in lines if line[0] == " "}
    tasks = [scores["surgery_diff", seed]["tasks"]["sts"]["pearson"] for seed in (0, 1)]
    others = [scores["baseline", seed]["tasks"]["sts"]["pearson"] for seed in (0, 1)]
    assert printed["similarity"] == pytest.approx(100 * (sum(tasks) - sum(others)) / 2, abs=0.051)
    assert snapshot(runs_dir) == before


@pytest.mark.slow
def test_further_pretraining_gives_the_run_its_encoder(place, monkeypatch):
    """In a folder other than the project's, with paths relative to it."""
    monkeypatch.chdir(place)
    paths = {"pretrained": "encoder", "data_dir": "data", "runs_dir": "further", "results_dir": "unused"}
    argv = command(place, "--rows further_pretraining --seeds 0", **paths)
    args = get_args(argv)
    job = make_job(args, "further_pretraining", 0)
    encoder, folder = (stage.folder for stage in job.stages)
    assert run_jobs([job], at_once=1) == [], job.failure
    assert (encoder / "model.safetensors").exists() and is_finished(folder) and not (folder / "last").exists()
    run, first = (json.loads((path / "args.json").read_text())["args"] for path in (folder, encoder))
    assert run["pretrained"] == str(encoder) and run["grad_method"] == "pcgrad"
    assert first["pretrained"] == "encoder" and first["max_steps"] == 3
    assert starts(folder.parent) == {"further_pretraining-seed0": 2}

    check_settings(args, "further_pretraining", 0, folder)
    shutil.rmtree(folder)  # the encoder alone was made with other settings
    for flags, name in (("--max_steps 4", "max_steps"), ("--pretrained minilm", "pretrained")):
        other = get_args([*argv[: argv.index("--")], *flags.split(), *TINY_RUN.split()])
        with pytest.raises(UserError, match=f"encoder-seed0.*--{name} "):
            check_settings(other, "further_pretraining", 0, folder)


@pytest.mark.slow
def test_what_fails_is_named_and_the_table_of_the_rest_is_written(place, made, tmp_path, capsys):
    """A row whose data are missing, and missing test data: the other rows get their table all the same."""
    runs, data = tmp_path / "runs", shutil.copytree(place / "data", tmp_path / "data")
    (data / "sts-test-student.csv").unlink()
    shutil.copytree(made, runs / made.name)
    paths = {"data_dir": data, "runs_dir": runs, "results_dir": tmp_path / "results"}
    assert main(command(place, "--rows diff similar_data --seeds 0", **paths)) == 2
    output = capsys.readouterr()
    assert output.err.count("\n") == 1 and "1 of 2 runs failed: similar_data-seed0: " in output.err
    assert str(data / "extra") in output.err and "exit code 2" in output.err
    assert "warning: no predictions of the test set: " in output.out
    assert starts(runs) == {"diff-seed0-test": 1, "similar_data-seed0": 1}  # no endless loop
    text = (tmp_path / "results" / "table.md").read_text(encoding="utf-8")
    assert ROWS["diff"].title in text and ROWS["similar_data"].title not in text
    assert "no run has predicted it yet" in text
