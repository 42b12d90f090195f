"""Tasks from a file: what a TOML file may say, the forms of data files, and a run from start to end."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure

import multitask_classifier
from config import TASKS
from datasets import read_rows
from evaluation import overall_titles, read_predictions
from reporting.predict import main as predict
from reporting.report import main as report
from support.errors import UserError
from support.files import ROOT
from tests.tiny import make_data, make_encoder
from training.check_data import main as check_data
from training.flags import get_args
from training.predictor import Predictor
from training.task_file import BUILT_IN, make_task, read_task_files, set_own_tasks

NLI = ROOT / "data" / "sample" / "nli" / "nli.toml"
CONTENT = {
    "name": "own",
    "kind": "classification",
    "texts": ["a", "b"],
    "label": "y",
    "classes": ["no", "maybe", "yes"],
    "files": {"train": "train.csv", "dev": "dev.csv"},
}


@pytest.fixture(autouse=True)
def only_built_in_tasks():
    yield
    set_own_tasks({})


def own(**changes):
    content = {key: value for key, value in (CONTENT | changes).items() if value is not None}
    return make_task(content, "own.toml")


# --- the TOML file ------------------------------------------------------------------------------------------


def test_the_worked_example_is_a_row_like_the_others():
    (content,) = read_task_files(str(NLI)).values()
    spec = make_task(content, "it")
    assert (spec.is_pair, spec.default_head, spec.label_range) == (True, "diff", (0, 2))
    for split, count in (("train", 330), ("dev", 90), ("test", 60)):
        rows = read_rows(spec.files[split], spec, split)
        assert len(rows.ids) == count == len(set(rows.texts)) and rows.ids[:2] == ["1", "2"]
        assert not rows.warnings
        if split != "test":
            assert np.bincount(rows.labels.astype(int)).min() > count / 4


BAD = {
    "name is 'sst'": {"name": "sst"},
    "name is 'Own'": {"name": "Own"},
    "name is 'mean'": {"name": "mean"},
    "kind is 'classes'": {"kind": "classes"},
    "texts is": {"texts": ["a", "b", "c"]},
    "label is 'a'": {"label": "a"},
    "classes is \"\\['no', 'no'\\]\"": {"classes": ["no", "no"]},
    "classes is 'missing'": {"classes": None},
    "expected two names": {"kind": "binary"},
    "files is": {"files": {"train": "x"}},
    "range is 'missing'": {"kind": "regression", "classes": None},
    "kind is 'regression'": {"kind": "regression", "range": [0, 5]},
    "range is": {"range": [0, 1]},
    "range is '\\[0, inf\\]'": {"kind": "regression", "classes": None, "range": [0, float("inf")]},
    "files is .*'dev': '\\.'": {"files": {"train": "train.csv", "dev": "."}},
    "id is ' '": {"id": " "},
    "title is 'a\\\\nb'": {"title": "a\nb"},
    "head is 'single'": {"head": "single"},
    "head is 'cosine'": {"head": "cosine", "texts": ["a"]},
    "labels is 'words'": {"labels": "words"},
    "format is 'xml'": {"format": "xml"},
    "key 'classnames' is not known": {"classnames": ["no"]},
    "key 'label' is missing": {"label": None},
    "title is '3'; expected text": {"title": 3},
    "ordered is 'yes'; expected true or false": {"ordered": "yes"},
    "ordered is 'True'; expected it with": {"ordered": True, "kind": "binary"},
}


@pytest.mark.parametrize("message", BAD)
def test_what_describes_no_task_is_refused(message):
    with pytest.raises(UserError, match=f"^own.toml: .*{message}"):
        own(**BAD[message])


@pytest.mark.parametrize("text", [None, "name = ", "\x00", "a = " + "[" * 5000])
def test_what_is_no_toml_is_one_line_and_exit_code_2(text, tmp_path, capsys):
    path = tmp_path / "own.toml"
    if text is not None:
        path.write_text(text)
    assert multitask_classifier.main(["--task_file", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("multitask_classifier.py: error: --task_file ") and error.count("\n") == 1
    assert str(path) in error


def test_flags_of_tasks_from_files(tmp_path):
    (tmp_path / "own.toml").write_text("ordered = true\n" + NLI.read_text().replace('"nli"', '"own"'))
    flags = ["--task_file", f"{NLI},{tmp_path / 'own.toml'}", "--own_head", "cross", "--nli_batch_size", "3"]
    flags += ["--own_loss", "coral"]
    args = get_args(flags)
    assert args.tasks == ("nli", "own") and args.own_head == "cross" and args.nli_batch_size == 3
    assert TASKS["own"].files["dev"] == str(tmp_path / "nli-dev.jsonl")
    assert get_args([*flags, "--tasks", "sst,own", "--select_by", "own"]).tasks == ("sst", "own")
    get_args([])
    assert get_args(["--task", "qqp"]).tasks == ("para",)
    assert tuple(TASKS) == BUILT_IN  # what an earlier command line named is gone
    with pytest.raises(UserError, match="as in an earlier file"):
        get_args(["--task_file", f"{NLI},{NLI}"])


# --- data files ---------------------------------------------------------------------------------------------

FORMS = {
    "d.csv": 'y,a,b\nyes,"one, two",three\nno,four,"say ""x"""\n',
    "d.tsv": 'a\tb\ty\none, two\tthree\tyes\nfour\tsay "x"\tno\n',
    "d.jsonl": '{"a": "one, two", "b": "three", "y": "yes", "more": [1]}\n\n'
    '{"y": "no", "b": "say \\"x\\"", "a": "four"}\r\n',
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_data_files(name, tmp_path):
    path = tmp_path / name
    path.write_text(FORMS[name])
    rows = read_rows(path, own(), "dev")
    assert rows.texts == [("one, two", "three"), ("four", 'say "x"')]
    assert rows.labels.tolist() == [2, 0] and rows.ids == ["1", "2"]


def test_labels_as_numbers_ids_and_a_named_format(tmp_path):
    path = tmp_path / "d.txt"
    path.write_text('{"key": "X7", "a": "p", "b": 3, "y": 2}\n{"key": 8, "a": "q", "b": "r", "y": null}\n')
    rows = read_rows(path, own(labels="numbers", id="key", format="jsonl"), "dev")
    assert (rows.ids, rows.texts, rows.labels.tolist()) == (["X7"], [("p", "3")], [2])
    assert rows.warnings == {"no label": [2]}
    path.write_text("key,a,y\n1,p,2.5\n2,q,4\n")
    regression = {"kind": "regression", "classes": None, "range": [1, 4], "texts": ["a"], "format": "csv"}
    assert read_rows(path, own(**regression), "dev").labels.tolist() == [2.5, 4]


BAD_DATA = {
    "d.csv:1: separated by tabs, it seems; expected the comma-separated": ("d.csv", "a\tb\ty\n1\t2\tyes\n"),
    "d.csv:2: y is 'Yes'; expected one of no, maybe, yes": ("d.csv", "a,b,y\np,q,Yes\n"),
    "d.csv:2: 4 fields.*holds a comma in quotation marks": ("d.csv", "a,b,y\np,q,r,yes\n"),
    "d.jsonl:1: no column 'b'; expected a JSON object in each line": ("d.jsonl", '{"a": "p", "y": "no"}\n'),
    "d.jsonl:2: line is '{'; expected a JSON object": ("d.jsonl", '{"a": "p", "b": "q", "y": "no"}\n{\n'),
    "d.jsonl:1: line is '3'": ("d.jsonl", "3\n"),
    "d.jsonl:1: a is": ("d.jsonl", '{"a": ["p"], "b": "q", "y": "no"}\n'),
    "d.jsonl: the file is empty": ("d.jsonl", "\n"),
    "d.txt: of no known format": ("d.txt", "a,b,y\n"),
}


@pytest.mark.parametrize("message", BAD_DATA)
def test_bad_data_files(message, tmp_path):
    name, text = BAD_DATA[message]
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_rows(tmp_path / name, own(), "dev")


def test_an_error_is_one_line_whatever_the_path_is():
    with pytest.raises(UserError, match=r"--task_file a\\x1db: cannot be read"):
        read_task_files("a\x1db")  # at the end it would be stripped


# --- the overall --------------------------------------------------------------------------------------------


def test_the_overall_is_called_what_it_is():
    course = {task: TASKS[task] for task in ("sst", "para", "sts")}
    assert "class of 2023" in overall_titles(course)["mean"]
    assert overall_titles({"sst": TASKS["sst"], "own": own()}) == {
        "mean": "plain mean of sst accuracy, own accuracy"
    }
    assert list(overall_titles({"sts": TASKS["sts"], "own": own()})) == ["mean", "mean_2024"]
    assert overall_titles({"own": own()}) == {}


# --- a run --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_needs_its_task_file_only_at_the_start(tmp_path, monkeypatch, capsys):
    make_encoder(tmp_path / "encoder")
    make_data(tmp_path / "data")
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, buffer, **settings: buffer.write(b"\x89PNG Matplotlib")
    )
    monkeypatch.setattr(multitask_classifier, "plot_run", lambda folder: None)
    for path in NLI.parent.iterdir():
        lines = path.read_text().splitlines(keepends=True)
        (tmp_path / path.name).write_text("".join(lines if path == NLI else lines[:13]))
    toml, run = tmp_path / "nli.toml", tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    flags = "--pretrained encoder --data_dir data --batch_size 4 --eval_every 2 --precision fp32 --device cpu"
    command = [*flags.split(), "--task_file", "nli.toml", "--tasks", "nli,sst,sts", "--output_dir", "run"]
    assert multitask_classifier.main([*command, "--max_steps", "2"]) == 0
    said = capsys.readouterr().out
    assert "plain mean of nli accuracy, sst accuracy, sts pearson: " in said and "class of" not in said
    stored = json.loads((run / "args.json").read_text())["args"]
    assert stored["task_file"]["nli"]["classes"] == ["entailment", "neutral", "contradiction"]

    # The same command again, while the file is there; then without it.
    assert multitask_classifier.main([*command, "--max_steps", "3", "--resume"]) == 0
    toml.unlink()
    get_args([])  # as in a new process: the task is not known
    assert multitask_classifier.main(["--output_dir", "run", "--resume", "--max_steps", "4"]) == 0
    assert "continuing run at step 3" in capsys.readouterr().out
    get_args([])
    out = tmp_path / "test.csv"
    elsewhere = ["--nli_test", str(tmp_path / "nli-dev.jsonl"), "--nli_test_out", str(out)]
    again = ["--output_dir", "run", "--predict_only", "--predict_splits", "test", "--predict_tasks", "nli"]
    assert multitask_classifier.main([*again, *elsewhere]) == 0
    predicted = read_predictions(out, TASKS["nli"])
    assert predicted == read_predictions(run / "predictions" / "nli-dev-output.csv", TASKS["nli"])

    get_args([])
    model = Predictor.from_run(run)
    get_args([])  # the model knows its tasks itself
    (answer,) = model.predict("nli", [("a man sleeps", "someone sleeps")])
    assert list(answer.probabilities) == ["entailment", "neutral", "contradiction"]
    capsys.readouterr()
    assert predict(["run", "--task", "nli", "a man sleeps", "someone sleeps"]) == 0
    assert answer.label in capsys.readouterr().out
    assert report(["run"]) == 0
    assert "plain mean of nli accuracy" in (run / "report.md").read_text()


def test_a_damaged_run_is_refused(tmp_path, capsys):
    args = {"args": {"given": {}, "task_file": {"nli": {"name": 3}}}, "commands": [], "data": {}}
    (tmp_path / "args.json").write_text(json.dumps(args))
    assert multitask_classifier.main(["--output_dir", str(tmp_path), "--resume"]) == 2
    assert f"{tmp_path / 'args.json'}: name is '3'" in capsys.readouterr().err


def test_check_data_knows_task_files(tmp_path, capsys):
    assert check_data([str(NLI.parent), "--task_file", str(NLI), "--tasks", "nli"]) == 0
    assert "nli    dev       90 examples" in capsys.readouterr().out
