"""The page of a run says what its folder holds, in both forms, and is whole whatever stands in the data."""

import csv
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib import image
from matplotlib.figure import Figure

from config import DEFAULT_TASKS, TASKS
from datasets import read_rows
from evaluation import OVERALLS, TASK_KINDS, format_predictions, summarise
from reporting.report import (
    CLASS_NAMES,
    MAX_TEXT,
    OVERALL_TITLES,
    Code,
    Heading,
    Paragraph,
    TableBlock,
    html_page,
    main,
    markdown_page,
    plot_run,
    read_metrics,
    training_seconds,
)
from tests.tiny import make_data
from training.flags import get_args

PAIRS = {"sst-para": -0.125, "sst-sts": 0.25, "para-sts": 0.0625}
LINE = {
    "lr": 1e-5,
    "head_lr": 1e-3,
    "loss": dict.fromkeys(DEFAULT_TASKS, 1.5),
    "cosine": PAIRS,
    "conflict": {"sst-para": 0.75, "sst-sts": 0.25, "para-sts": 0.5},
    "grad_weight": {"sst": 1.125, "para": 1.0, "sts": 1.25},
    "task_grad_norm": dict.fromkeys(DEFAULT_TASKS, 2.5),
    "tokens_per_second": 50,
}
LAYERS = {
    "layer_cosine": {"embeddings": PAIRS, "layer.0": PAIRS},
    "layer_conflict": {"embeddings": dict.fromkeys(PAIRS, 0.125), "layer.0": dict.fromkeys(PAIRS, 0.875)},
}
NASTY = "a | b\\ <script>alert(1)</script> `x` **c** _d_ [e](http://f.g) &amp; $h$ \"i\" 'j' " + "k" * 200


@pytest.fixture(autouse=True)
def no_drawing(request, monkeypatch):
    """Pictures take most of a page's time; only tests that are about them wait for it."""
    if "picture" not in request.node.name and "plot" not in request.node.name:
        monkeypatch.setattr(Figure, "savefig", lambda figure, buffer, **settings: buffer.write(b"png"))


def write_log(folder, *lines):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def predict_badly(task, rows):
    """Predictions with a few mistakes; the first row's is the worst."""
    predictions = rows.labels.copy()
    low, high = TASKS[task].label_range
    predictions[0] = low if predictions[0] > (low + high) / 2 else high
    if not TASK_KINDS[TASKS[task].kind].is_discrete:
        predictions[1:] += np.linspace(-0.25, 0.25, len(predictions) - 1)
    return predictions


@pytest.fixture
def run_dir(tmp_path):
    """A finished run, as training leaves it; the first dev row of every task is nasty."""
    data, folder = make_data(tmp_path / "data"), tmp_path / "run & <more>"
    for task in DEFAULT_TASKS:
        path = data / TASKS[task].files["dev"]
        with open(path, encoding="utf-8", newline="") as file:
            header, first, *rows = csv.reader(file, delimiter="\t")
        first[header.index(TASKS[task].text_columns[0])] = NASTY
        with open(path, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter="\t", lineterminator="\n").writerows([header, first, *rows])
    args = vars(get_args(["--data_dir", str(data), "--output_dir", "elsewhere/since/moved"]))
    args |= {"lr": 1e-4, "head_lr": 1e-3, "warmup_steps": 2, "max_steps": 30}
    stored = {
        "args": args,
        "commands": [["multitask_classifier.py", "--data_dir", "my data"]],
        "machine": {"processor": "a fast one", "cores": 2},
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "data": {"dev": {"sst": "04bf902f"}},
        "encoder": "103 of 103 weights loaded",
    }
    (folder / "predictions").mkdir(parents=True)
    scores = {}
    for task in DEFAULT_TASKS:
        spec = TASKS[task]
        rows = read_rows(data / spec.files["dev"], spec, "dev")
        predictions = predict_badly(task, rows)
        text = format_predictions(spec, rows.ids, predictions.tolist(), "starter")
        (folder / "predictions" / f"{task}-dev-output.csv").write_text(text)
        scores[task] = TASK_KINDS[spec.kind].scores(predictions, rows.labels)
    summary = summarise(scores, TASKS)
    (folder / "args.json").write_text(json.dumps(stored))
    (folder / "scores.json").write_text(json.dumps({"step": 20, "dev": summary}))
    lines = [LINE | LAYERS | {"step": step, "tokens": 300 * step} for step in (10, 20, 30)]
    worse = summary | {"mean": 0.125, "tasks": scores | {"sst": {"accuracy": 0.0625, "macro_f1": 0.03125}}}
    lines.insert(1, {"step": 10, "dev": worse, "score": 0.125})
    lines.insert(3, {"step": 20, "dev": summary, "score": summary["mean"]})
    write_log(folder, *lines)
    return folder


class Page(HTMLParser):
    """Tags that must be balanced, texts of cells and of everything, what is linked to."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.rows, self.text = [], [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def markdown_rows(text):
    """The cells of every table, as a reader sees them."""
    lines = [line for line in text.splitlines() if line.startswith("|") and "| ---" not in line]
    cells = [re.split(r"(?<!\\) \| ", line[2:-2]) for line in lines]
    return [[re.sub(r"\\(.)", r"\1", cell).strip() for cell in row] for row in cells]


def make_page(run_dir):
    """Text, rows and HTML of the two forms, which must have the same tables."""
    assert main([str(run_dir)]) == 0
    text = (run_dir / "report.md").read_text(encoding="utf-8")
    page = Page((run_dir / "report.html").read_text(encoding="utf-8"))
    assert markdown_rows(text) == [[cell.strip() for cell in row] for row in page.rows]
    return text, page


# --- the page ----------------------------------------------------------------------------------------------------


def test_scores_and_floors(run_dir):
    _, page = make_page(run_dir)
    summary = json.loads((run_dir / "scores.json").read_text())["dev"]
    for task in DEFAULT_TASKS:
        spec = TASKS[task]
        kind, scores = TASK_KINDS[spec.kind], summary["tasks"][task]
        labels = read_rows(run_dir.parent / "data" / spec.files["dev"], spec, "dev").labels
        assert [
            spec.title,
            kind.main_score,
            f"{scores[kind.main_score]:.4f}",
            f"{kind.baseline(labels):.4f}",
            str(len(labels)),
        ] in page.rows
    for name, title in OVERALL_TITLES.items():
        assert [title, "", f"{summary[name]:.4f}", "", ""] in page.rows
    assert "Of the best checkpoint by mean, at step 20." in page.text
    assert "Warning" not in page.text


def test_overall_titles_are_complete():
    assert set(OVERALL_TITLES) == set(OVERALLS)


def test_class_names_are_complete():
    for task, names in CLASS_NAMES.items():
        assert len(names) == TASKS[task].label_range[1] + 1


def test_what_was_run(run_dir):
    text, page = make_page(run_dir)
    assert "    python multitask_classifier.py --data_dir 'my data'\n" in text
    assert "python multitask_classifier.py --data_dir 'my data'" in page.text
    facts = {row[0]: row[1] for row in page.rows if len(row) == 2}
    assert facts["seed"] == "11711" and facts["steps"] == "30 of 30"
    assert facts["training time"].startswith("3.0 minutes")  # 9000 word pieces, 50 in a second
    assert "103 of 103" in facts["encoder"] and "04bf902f" in facts["data"] and "2.13.0" in facts["versions"]
    assert "a fast one, cores 2" in facts["computed"]
    assert "loss weights" not in facts  # all are 1


def test_conflict_in_words_and_numbers(run_dir):
    _, page = make_page(run_dir)
    assert ["sst and para", "-0.1250", "75 %"] in page.rows and [
        "para and sts",
        "0.0625",
        "50 %",
    ] in page.rows
    assert ["sts", "1.250", "2.50"] in page.rows
    assert "Most in conflict here: sst and para, in 75 % of the steps." in page.text
    assert "most in layer.0 (sst and para, 88 %), least in embeddings (sst and para, 12 %)" in page.text


def test_pictures_lie_beside_the_markdown_and_inside_the_html(run_dir):
    text, page = make_page(run_dir)
    paths = re.findall(r"!\[.*?\]\((.*?)\)", text)
    names = ["conflict", "layer_conflict", "layer_conflict_over_time", *DEFAULT_TASKS]
    assert paths == ["curves.png", *(f"report/{name}.png" for name in names)]
    assert all(image.imread(run_dir / path)[..., :3].std() > 0.02 for path in paths)  # not blank
    assert len(page.links) == len(paths)
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "@import" not in (run_dir / "report.html").read_text() and not {"script", "link"} & set(page.tags)


def test_mistakes_are_shown_as_they_are(run_dir):
    text, page = make_page(run_dir)
    shown = NASTY[: MAX_TEXT - 1] + "…"
    for task in DEFAULT_TASKS:
        worst = next(row for row in page.rows if row[0] == shown)
        page.rows.remove(worst)
        assert len(worst) == len(TASKS[task].text_columns) + 2
    assert len([line for line in text.splitlines() if "script" in line]) == 3
    assert "<script" not in text.replace("\\<script", "")
    assert "1 of 11 examples are wrong. Furthest off:" in page.text  # of sst and of para
    # The page ends with similarity's mistakes, of which the nasty one was the first.
    errors = [abs(float(true) - float(predicted)) for *_, true, predicted in page.rows[-4:]]
    assert errors == sorted(errors, reverse=True) and page.rows[-5][-1] == "predicted"


def test_a_page_can_be_made_twice_and_nothing_else_changes(run_dir):
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    make_page(run_dir)
    first = (run_dir / "report.html").read_bytes()
    make_page(run_dir)
    assert (run_dir / "report.html").read_bytes() == first
    assert all(path.read_bytes() == content for path, content in before.items())
    assert not list(run_dir.rglob("*.tmp"))


# --- runs of which something is missing --------------------------------------------------------------------------


def test_unfinished_run(run_dir):
    (run_dir / "scores.json").unlink()
    for path in (run_dir / "predictions").iterdir():
        path.unlink()
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 31, "lo')  # killed while it wrote
    _, page = make_page(run_dir)
    assert "The run is not finished. Of its best evaluation so far by mean, at step 20." in page.text
    floor = TASK_KINDS["binary"].baseline(
        read_rows(run_dir.parent / "data" / "quora-dev.csv", TASKS["para"], "dev").labels
    )
    assert any(row[0] == "paraphrase (Quora)" and row[3] == f"{floor:.4f}" for row in page.rows)
    assert page.text.count("Predictions and mistakes are left out.") == 3 and "no such file" in page.text


def test_run_that_has_just_begun(run_dir):
    for name in ("scores.json", "metrics.jsonl"):
        (run_dir / name).unlink()
    _, page = make_page(run_dir)
    for text in ("Nothing was evaluated yet.", "Nothing was logged yet.", "No two tasks' gradients"):
        assert text in page.text


def test_data_that_are_gone(run_dir):
    (run_dir.parent / "data" / "sts-dev.csv").unlink()
    text, page = make_page(run_dir)
    assert "sts-dev.csv: no such file." in page.text and "report/sts.png" not in text
    row = next(row for row in page.rows if row[:2] == ["similarity (SemEval STS)", "pearson"])
    assert row[2] != "" and row[3:] == ["", ""]
    assert "report/sst.png" in text  # the others are there


def test_predictions_that_are_not_the_run_s(run_dir):
    path = run_dir / "predictions" / "sst-dev-output.csv"
    path.write_text(re.sub(r", \d", ", 2", path.read_text()))
    text, page = make_page(run_dir)
    assert "give accuracy" in page.text and "report/sst.png" not in text and "report/para.png" in text


def test_old_run_has_no_layers_and_not_all_flags(run_dir):
    lines = [
        {key: value for key, value in line.items() if key not in LAYERS} for line in read_metrics(run_dir)
    ]
    write_log(run_dir, *lines)
    stored = json.loads((run_dir / "args.json").read_text())
    for flag in ("surgery_tasks", "extra_data"):
        del stored["args"][flag]
    del stored["machine"]
    (run_dir / "args.json").write_text(json.dumps(stored))
    text, page = make_page(run_dir)
    assert "report/conflict.png" in text and "layer_conflict" not in text and "layer.0" not in page.text


def test_model_that_learned_nothing(run_dir):
    scores = json.loads((run_dir / "scores.json").read_text())
    scores["dev"]["tasks"]["sts"]["pearson"] = -0.5
    (run_dir / "scores.json").write_text(json.dumps(scores))
    path = run_dir / "predictions" / "sts-dev-output.csv"
    _, page = make_page(run_dir)
    assert (
        "Warning: sts is no better" not in page.text
    )  # its files do not fit these scores, so no floor is known
    rows = read_rows(run_dir.parent / "data" / "sts-dev.csv", TASKS["sts"], "dev")
    path.write_text(format_predictions(TASKS["sts"], rows.ids, [2.5] * len(rows.ids), "starter"))
    scores["dev"]["tasks"]["sts"]["pearson"] = 0.0
    (run_dir / "scores.json").write_text(json.dumps(scores))
    _, page = make_page(run_dir)
    assert "Warning: sts is no better than answering blindly." in page.text and "collapsed" in page.text


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("args.json", None, "no run there"),
        ("args.json", "{", "args.json: not a JSON file"),
        ("args.json", "{}", "args.json: damaged"),
        (
            "args.json",
            '{"args": {"tasks": ["nli"], "given": {}}, "commands": [], "data": {}}',
            "args.json: damaged; tasks is ('nli',)",
        ),
        (
            "args.json",
            '{"args": {"given": {}}, "commands": [], "data": {}}',
            "damaged (lr was never resolved)",
        ),
        ("metrics.jsonl", '{"step": 1, "loss": {"nli": 1.0}}\n', "'nli', which is not known"),
        ("scores.json", '{"step": 1, "dev": {"tasks": {"sst": {}}}}', "scores.json: damaged"),
        ("metrics.jsonl", '{"step": 1}\n{\n', "metrics.jsonl:2"),
        ("metrics.jsonl", "3\n", "metrics.jsonl:1"),
        ("scores.json", "[]", "scores.json: expected a JSON object"),
    ],
)
def test_damage_ends_in_one_line(run_dir, name, text, message, capsys):
    (run_dir / name).unlink()
    if text is not None:
        (run_dir / name).write_text(text)
    assert main([str(run_dir)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert not (run_dir / "report.md").exists() and not (run_dir / "report.html").exists()


# --- blocks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [NASTY, "two\nlines | here", "# 1 \\| 2 `", "***", "macro_f1", "<b>x</b>"])
def test_any_text_comes_out_as_it_went_in(text):
    blocks = [Heading(text), Paragraph(text), TableBlock(("h",), [(text,)])]
    page = Page(html_page(text, blocks))
    assert page.rows == [["h"], [text]] and page.text.count(text) == 4  # the title too
    assert not {"script", "b"} & set(page.tags)
    plain = " ".join(text.split())
    assert markdown_rows(markdown_page(blocks)) == [["h"], [plain]]
    heading, paragraph = markdown_page(blocks).split("\n\n")[:2]
    assert re.sub(r"\\(.)", r"\1", heading) == f"## {plain}" and re.sub(r"\\(.)", r"\1", paragraph) == plain


def test_code_cannot_be_closed_by_its_text():
    text = "python x.py '```\n\n</pre> | y'"
    assert (
        Page(html_page("", [Code(text)])).text.strip().endswith("}\n\n\n\n" + text)
    )  # the style stands before
    assert all(line.startswith("    ") for line in markdown_page([Code(text)]).rstrip("\n").split("\n"))


# --- curves.png, which training draws ----------------------------------------------------------------------------


def test_plot_run(tmp_path):
    lines = [LINE | {"step": step} for step in (1, 2)]
    scores = {"tasks": {"sst": {"accuracy": 0.4}, "sts": {"pearson": 0.7}}, "mean": 0.55, "mean_2024": 0.625}
    write_log(tmp_path, *lines, {"step": 2, "dev": scores, "score": 0.55})
    assert plot_run(tmp_path) == tmp_path / "curves.png"
    picture = image.imread(tmp_path / "curves.png")
    assert picture.shape[0] > 300 and picture.shape[1] > 500
    assert picture[..., :3].std() > 0.05  # not blank


def test_nothing_logged(tmp_path):
    write_log(tmp_path)
    assert plot_run(tmp_path) is None


def test_training_seconds_by_hand():
    """300 tokens at 50 a second are 6 s, 200 more at 100 are 2 s; a line without a rate adds nothing."""
    metrics = [
        {"step": 10, "tokens": 300, "tokens_per_second": 50},
        {"step": 10, "dev": {}, "score": 0.5},
        {"step": 20, "tokens": 500, "tokens_per_second": 100},
        {"step": 30, "tokens": 510, "tokens_per_second": 0},
    ]
    for number_of_lines, seconds in ((0, 0), (1, 6), (2, 6), (3, 8), (4, 8)):
        assert training_seconds(metrics[:number_of_lines]) == seconds
