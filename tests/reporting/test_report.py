"""The page of a run, held against what its folder says: complete in both formats, whatever is in the data."""

import base64
import csv
import json
import re
import shutil

import pytest
from matplotlib import image
from matplotlib.figure import Figure

from config import DEFAULT_TASKS, TASKS
from datasets import read_rows
from evaluation import OVERALLS, TASK_KINDS, format_predictions
from reporting import figures
from reporting.report import MAX_TEXT, main, plot_run, training_seconds
from tests.fake_runs import SCRIPT, all_tasks, make_run
from tests.reporting.read_pages import NASTY, HtmlPage, markdown_rows
from tests.tiny import make_data
from training.flags import get_args


@pytest.fixture(autouse=True)
def no_drawing(request, monkeypatch):
    """Pictures take most of a page's time; only tests that are about them wait for it."""
    real = Figure.savefig

    def savefig(figure, buffer, **settings):
        if "picture" in request.node.name:
            real(figure, buffer, **settings | {"dpi": 20})
        else:
            buffer.write(b"\x89PNG Matplotlib")

    monkeypatch.setattr(Figure, "savefig", savefig)
    if "picture" not in request.node.name:
        monkeypatch.setattr(figures, "plot_predictions", lambda *args: Figure())


def change_json(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def read_dev_rows(run_dir, task):
    return read_rows(run_dir.parent / "data" / TASKS[task].files["dev"], TASKS[task], "dev")


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A finished run; the first dev row of every task is nasty, and its prediction is wrong."""
    place = tmp_path_factory.mktemp("finished")
    data = make_data(place / "data")
    for task in DEFAULT_TASKS:
        path = data / TASKS[task].files["dev"]
        with open(path, encoding="utf-8", newline="") as file:
            header, first, *rows = csv.reader(file, delimiter="\t")
        first[header.index(TASKS[task].text_columns[0])] = NASTY
        with open(path, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter="\t", lineterminator="\n").writerows([header, first, *rows])
    folder = make_run(place / "run & <more>", data, all_tasks(1, 1, 4))
    args = vars(get_args(["--output_dir", "elsewhere/since/moved"]))
    args |= {"lr": 1e-4, "head_lr": 1e-3, "warmup_steps": 2, "max_steps": 30}
    facts = {"commands": [[SCRIPT, "--data_dir", "my data"]], "encoder": "103 of 103 weights loaded"}
    change_json(folder / "args.json", lambda stored: stored.update(args=args, **facts))
    return folder


@pytest.fixture
def run_dir(finished_run, tmp_path):
    """A copy of it, and of its data."""
    shutil.copytree(finished_run.parent, tmp_path, dirs_exist_ok=True)
    folder, data = tmp_path / finished_run.name, str(tmp_path / "data")
    change_json(folder / "args.json", lambda stored: stored["args"].update(data_dir=data))
    return folder


def make_page(run_dir):
    """Markdown and HTML of a run's page, which must have the same tables."""
    assert main([str(run_dir)]) == 0
    text = (run_dir / "report.md").read_text(encoding="utf-8")
    page = HtmlPage((run_dir / "report.html").read_text(encoding="utf-8"))
    assert markdown_rows(text) == [[cell.strip() for cell in row] for row in page.rows]
    assert "\n\n\n" not in text
    return text, page


# --- the page ---------------------------------------------------------------------------------------------


def test_scores_of_part_of_dev(run_dir):
    """--final_eval part: they need not be those that the prediction files give."""
    change_json(run_dir / "args.json", lambda stored: stored["args"].update(eval_max_examples=3))
    change_json(run_dir / "scores.json", lambda scores: scores["dev"]["tasks"]["sst"].update(accuracy=0.125))
    text, page = make_page(run_dir)
    assert "on at most" not in text and "the run had 0.1250" in text
    change_json(run_dir / "scores.json", lambda scores: scores.update(final_eval="part"))
    text, page = make_page(run_dir)
    assert ", on at most 3 examples per task." in text and "the run had" not in text
    row = next(row for row in page.rows if row[:3] == [TASKS["sst"].title, "accuracy", "0.1250"])
    assert row[-1] == "3"


def test_settings_scores_baselines_and_conflict(run_dir):
    text, page = make_page(run_dir)
    summary = json.loads((run_dir / "scores.json").read_text())["dev"]
    for task in DEFAULT_TASKS:
        kind, scores = TASK_KINDS[TASKS[task].kind], summary["tasks"][task]
        labels = read_dev_rows(run_dir, task).labels
        numbers = [f"{scores[kind.main_score]:.4f}", f"{kind.baseline(labels):.4f}", str(len(labels))]
        assert [TASKS[task].title, kind.main_score, *numbers] in page.rows
    for name, overall in OVERALLS.items():
        assert [overall.title, "", f"{summary[name]:.4f}", "", ""] in page.rows
    assert "best checkpoint by mean, from step 20." in page.text

    assert "    python multitask_classifier.py --data_dir 'my data'\n" in text
    assert "python multitask_classifier.py --data_dir 'my data'" in page.text
    facts = {row[0]: row[1] for row in page.rows if len(row) == 2}
    assert facts["seed"] == "11711" and facts["steps"] == "20 of 30"
    assert facts["heads"] == "sst single, para diff, sts diff; pooling mean"
    assert facts["training time"].startswith("0.1 minutes")
    assert "103 of 103" in facts["encoder"] and "04bf902f" in facts["data"] and "2.13.0" in facts["versions"]
    assert "a | b, cores 2" in facts["machine"]
    assert "loss weights" not in facts  # all are 1

    assert ["sst and para", "-0.1250", "75 %"] in page.rows and ["sts", "1.250", "2.50"] in page.rows
    assert "sst and para, in 75 % of the steps." in page.text
    layers = "most often in layer.0 (sst and para, 88 %), least often in embeddings (sst and para, 12 %)"
    assert layers in page.text


def test_captions_say_which_seed_and_how_many_examples(run_dir):
    change_json(run_dir / "args.json", lambda stored: stored["args"].update(eval_max_examples=3))
    text, page = make_page(run_dir)
    for caption in (
        "seed 11711; dev scores of a part of dev, 3 examples of a task",
        "Conflict by layer, mean over the steps; seed 11711",
        "Predictions of sts: the best checkpoint of seed 11711 on 11 dev examples",
    ):
        assert caption in " ".join(text.split()) and caption in page.text
    html = (run_dir / "report.html").read_text()
    assert "prefers-color-scheme: dark" in html and "width=device-width" in html


@pytest.mark.slow
def test_pictures_lie_beside_the_markdown_and_inside_the_html(run_dir):
    text, page = make_page(run_dir)
    paths = re.findall(r"!\[.*?\]\((.*?)\)", text)
    names = ["conflict", "layer_conflict", "layer_conflict_over_time", "noise", *DEFAULT_TASKS]
    assert paths == ["curves.png", *(f"report/{name}.png" for name in names)]
    assert all(image.imread(run_dir / path)[..., :3].std() > 0.02 for path in paths)  # not blank
    assert len(page.links) == len(paths)
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert plot_run(run_dir) == run_dir / "curves.png"  # as training does
    assert (run_dir / "curves.png").read_bytes() == base64.b64decode(page.links[0].partition(",")[2])
    assert "@import" not in (run_dir / "report.html").read_text() and not {"script", "link"} & set(page.tags)


def test_mistakes_are_shown_as_they_are(run_dir):
    text, page = make_page(run_dir)
    nasty = [row for row in page.rows if row[0] == NASTY[: MAX_TEXT - 1] + "…"]
    assert [len(row) for row in nasty] == [len(TASKS[task].text_columns) + 2 for task in DEFAULT_TASKS]
    assert "<script" not in text.replace("\\<script", "")
    assert page.text.count("1 of 11 examples are wrong. Furthest off:") == 2  # of sst and of para
    # The page ends with similarity's mistakes.
    errors = [abs(float(true) - float(predicted)) for *_, true, predicted in page.rows[-3:]]
    assert errors == sorted(errors, reverse=True)


def files_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_page_can_be_made_twice_and_only_our_own_files_are_replaced(run_dir, one_line):
    before = files_in(run_dir)
    make_page(run_dir)
    first = files_in(run_dir)
    make_page(run_dir)
    assert files_in(run_dir) == first and before.items() <= first.items()
    assert not any(path.suffix == ".unfinished" for path in first)
    pages = (("report.md", None), ("report.html", "args.json"))
    for name, target in (*pages, ("report/conflict.png", "../args.json")):
        path = run_dir / name
        path.unlink()
        path.symlink_to(target) if target else path.write_text("my own notes on this run")
        before = files_in(run_dir)
        assert main([str(run_dir)]) == 2
        assert f"{path}: exists and is no " in one_line() and files_in(run_dir) == before
        path.unlink()
        path.write_bytes(first[path])


# --- runs with something missing --------------------------------------------------------------------------


def test_unfinished_run(run_dir):
    (run_dir / "scores.json").unlink()
    for path in (run_dir / "predictions").iterdir():
        path.unlink()
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 31, "lo')  # killed while it wrote
    _, page = make_page(run_dir)
    assert "The run is not finished." in page.text and "by mean was at step 10." in page.text
    assert page.text.count("Predictions and mistakes are left out.") == 3 and "no such file" in page.text
    for name in ("metrics.jsonl", "report.md", "report.html"):
        (run_dir / name).unlink()
    _, page = make_page(run_dir)
    for text in ("Nothing was evaluated yet.", "Nothing was logged yet.", "No two tasks' gradients"):
        assert text in page.text
    (run_dir / "metrics.jsonl").write_text("")
    assert plot_run(run_dir) is None


def test_data_and_predictions_that_are_not_the_runs(run_dir):
    (run_dir.parent / "data" / "sts-dev.csv").unlink()
    path = run_dir / "predictions" / "sst-dev-output.csv"
    path.write_text(re.sub(r", \d", ", 2", path.read_text()))
    text, page = make_page(run_dir)
    assert "sts-dev.csv: no such file." in page.text and "give accuracy" in page.text
    assert re.findall(r"report/(\w+)\.png", text)[-1:] == ["para"]  # the only task with a picture
    row = next(row for row in page.rows if row[:2] == ["similarity (SemEval STS)", "pearson"])
    assert row[2] != "" and row[3:] == ["", ""]


def test_old_run_has_no_layers_and_not_all_flags(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    lines = [{key: value for key, value in line.items() if "layer" not in key} for line in lines]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def age(stored):
        del stored["args"]["surgery_tasks"], stored["args"]["extra_data"], stored["machine"]

    change_json(run_dir / "args.json", age)
    text, page = make_page(run_dir)
    assert "report/conflict.png" in text and "layer_conflict" not in text and "layer.0" not in page.text


def test_model_that_learned_nothing(run_dir):
    """Predictions that are all alike; nan is no better than the baseline either."""
    ids = read_dev_rows(run_dir, "sts").ids
    path = run_dir / "predictions" / "sts-dev-output.csv"
    path.write_text(format_predictions(TASKS["sts"], ids, [2.5] * len(ids), "starter"))
    scores = run_dir / "scores.json"
    change_json(scores, lambda scores: scores["dev"]["tasks"]["sts"].update(pearson=0.0))
    _, page = make_page(run_dir)
    assert "Warning: sts is no better than the constant baseline." in page.text and "collapsed" in page.text
    change_json(scores, lambda scores: scores["dev"]["tasks"]["sts"].update(pearson=float("nan")))
    _, page = make_page(run_dir)  # the file does not give this score: neither it nor a baseline is shown
    assert "the run had nan" in page.text and "baseline." not in page.text


STORED = '{"args": {%s}, "commands": [], "data": {}}'
DAMAGE = [
    ("args.json", None, "no run there"),
    ("args.json", STORED % '"tasks": ["nli"], "given": {}', "damaged; tasks is ('nli',)"),
    ("args.json", STORED % '"given": {}', "damaged (lr was never resolved)"),
    ("metrics.jsonl", '{"step": 1}\n{\n', "metrics.jsonl:2"),
    ("scores.json", '{"step": 1, "dev": {"tasks": {"sst": {}}}}', "scores.json: damaged"),
]


def test_damage_ends_in_one_line(run_dir, one_line):
    for name, text, message in DAMAGE:
        whole = (run_dir / name).read_bytes()
        (run_dir / name).unlink()
        if text is not None:
            (run_dir / name).write_text(text)
        assert main([str(run_dir)]) == 2 and message in one_line()
        (run_dir / name).write_bytes(whole)
    assert not (run_dir / "report.md").exists() and not (run_dir / "report.html").exists()


def test_training_seconds_by_hand():
    """300 tokens at 50 a second are 6 s, 200 more at 100 are 2 s; a line without a rate adds nothing."""
    metrics = [
        {"step": 10, "tokens": 300, "tokens_per_second": 50},
        {"step": 10, "dev": {}, "score": 0.5},
        {"step": 20, "tokens": 500, "tokens_per_second": 100},
        {"step": 30, "tokens": 510, "tokens_per_second": 0},
    ]
    assert [training_seconds(metrics[:number]) for number in range(5)] == [0, 6, 6, 8, 8]
