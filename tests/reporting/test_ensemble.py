"""Runs that answer together: means worked by hand, the files of a run, and what is no ensemble."""

import json
import shutil

import numpy as np
import pytest

import multitask_classifier
from config import DEFAULT_TASKS, TASKS
from datasets import read_rows
from evaluation import decide, read_predictions
from reporting import submission
from reporting.ensemble import main
from tests.tiny import make_config, make_data, make_encoder
from training.ensemble import WEIGHTS, average, dev_weights, find_members
from training.flags import get_args
from training.predictor import Predictor
from training.resolve import make_settings, resolve_args
from training.teacher import ask_teacher, find_teacher

RUN = (
    "--max_steps 2 --batch_size 4 --eval_every 2 --device cpu --precision fp32 --head_lr 0.1 --warmup_steps 0"
)
RUNS = {  # they differ in tasks, heads, pooling, encoder and length
    "a": ("--para_head cross --seed 1", {}),
    "b": ("--tasks sts,sst --sts_head cosine --pooling cls --max_length 20 --seed 2", {"hidden_size": 16}),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ensemble")
    make_data(folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multitask_classifier, "plot_run", lambda folder: None)
        for name, (flags, sizes) in RUNS.items():
            make_encoder(folder / f"encoder_{name}", **sizes)
            paths = (
                f"--pretrained {folder}/encoder_{name} --data_dir {folder}/data --output_dir {folder}/{name}"
            )
            assert multitask_classifier.main(f"{paths} {RUN} {flags}".split()) == 0
    return folder


def run(place, output, *runs):
    runs = [str(place / name) if len(name) == 1 else name for name in runs]
    return main([*runs, "--output_dir", str(output), "--device", "cpu"])


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "predictions").iterdir())}


def test_average_and_weights_by_hand():
    answers = np.array(
        [[[0.5, 0.5], [1.0, 0.0]], [[0.2, 0.8], [0.6, 0.4]]]
    )  # of two members for two examples
    assert average(answers, [1, 1]) == pytest.approx(np.array([[0.35, 0.65], [0.8, 0.2]]))
    assert average(answers, [3, 1]) == pytest.approx(np.array([[0.425, 0.575], [0.9, 0.1]]))
    # The first member is right about the first example alone, the second about both, the third about none.
    answers = np.array([[[0.9, 0.1], [0.9, 0.1]], [[0.6, 0.4], [0.4, 0.6]], [[0.0, 1.0], [1.0, 0.0]]])
    assert dev_weights(TASKS["para"], answers, np.array([0, 1])) == [0, 1, 0]


def test_an_ensemble_of_one_is_that_run_and_can_be_handed_in(place, tmp_path):
    assert run(place, tmp_path / "e", "b", "--prediction_style", "handout") == 0  # to be replaced
    assert run(place, tmp_path / "e", "a") == 0
    files = files_of(tmp_path / "e")
    assert files == files_of(place / "a") and len(files) == 6
    scores, own = (
        json.loads((folder / "scores.json").read_text()) for folder in (tmp_path / "e", place / "a")
    )
    assert scores["dev"] == own["dev"] == scores["members"][0]["dev"]
    assert submission.main([str(tmp_path / "e"), "--data_dir", str(place / "data"), "--check_only"]) == 0


def test_two_runs_are_averaged_in_any_order(place, tmp_path):
    for output, runs in (("ab", "ab"), ("ba", "ba")):
        assert run(place, tmp_path / output, *runs) == 0
    assert files_of(tmp_path / "ab") == files_of(tmp_path / "ba")
    first, second = (find_members([place / name for name in runs]) for runs in ("ab", "ba"))
    assert first == second  # of three, sums in another order would be rounded otherwise
    predictors = [Predictor.from_run(place / name, "cpu", "fp32") for name in "ab"]
    for task in DEFAULT_TASKS:
        spec = TASKS[task]
        rows = read_rows(place / "data" / spec.files["test"], spec, "test")
        texts = [texts if spec.is_pair else texts[0] for texts in rows.texts]
        answers = [each.predict(task, texts) for each in predictors if task in each.tasks]
        if spec.class_names:
            sums = sum(np.array([list(each.probabilities.values()) for each in own]) for own in answers)
            expected = sums.argmax(-1)
        else:
            expected = sum(np.array([each.value for each in own]) for own in answers) / 2
        found = read_predictions(tmp_path / "ab" / "predictions" / f"{task}-test-output.csv", spec)
        assert list(found.values()) == pytest.approx(expected, abs=1e-6)  # float32
    members = json.loads((tmp_path / "ab" / "ensemble.json").read_text())["members"]
    assert [each["weight"].keys() for each in members] == [set(DEFAULT_TASKS), {"sts", "sst"}]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_as_a_teacher_it_answers_the_same(place, tmp_path, weights):
    assert run(place, tmp_path / "e", "a", "b", "--weights", weights) == 0
    argv = f"--data_dir {place}/data --teacher {tmp_path}/e --device cpu --precision fp32 --output_dir x"
    args = get_args([*argv.split(), "--max_steps", "1", "--lr", "1"])
    resolve_args(args, make_config(50), dict.fromkeys(DEFAULT_TASKS, 1))
    settings = make_settings(args)
    rows = {task: read_rows(settings.data.files[task, "dev"], TASKS[task], "dev") for task in DEFAULT_TASKS}
    answers = ask_teacher(find_teacher(settings, rows), rows, settings.teacher)
    for task, spec in ((task, TASKS[task]) for task in DEFAULT_TASKS):
        found = read_predictions(tmp_path / "e" / "predictions" / f"{task}-dev-output.csv", spec)
        assert decide(spec, answers[task]).tolist() == list(found.values())


@pytest.mark.parametrize(
    ("words", "output", "message"),
    [
        ("{0}/a {0}/copy", "new", "copy: has the same weights as "),
        ("{0}/a {0}/none", "new", "none: no run there"),
        ("{0}/unfinished", "new", "unfinished: the run is not finished"),
        (
            "{0}/a --data_dir {0}/other",
            "new",
            "a: its sst dev data are not those in {0}/other/ids-sst-dev.csv",
        ),
        ("{0}/a", "a/best/e", "is in {0}/a, one of the runs; expected another folder"),
        ("{0}/a", "data", "data: holds something else; expected a new folder"),
    ],
)
def test_what_is_no_ensemble_is_refused_and_nothing_written(place, words, output, message, capsys):
    if "copy" in words:
        shutil.copytree(place / "a", place / "copy")
    if "unfinished" in words:
        shutil.copytree(place / "a", place / "unfinished").joinpath("scores.json").unlink()
    if "other" in words:
        make_data(place / "other", start=50)
    before = sorted(place.rglob("*"))
    assert main([*words.format(place).split(), "--output_dir", str(place / output)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message.format(place) in error
    assert sorted(place.rglob("*")) == before
