"""A run is asked about sentences: the answers of an evaluation, in the order of the input, in every form."""

import csv
import io
import itertools
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import multitask_classifier
from config import DEFAULT_TASKS, TASKS
from datasets import read_rows, tokenize
from evaluation import predict, read_predictions
from reporting import sentences
from reporting.predict import ask as prompt
from reporting.predict import main
from support.errors import UserError
from support.files import ROOT
from tests.tiny import make_data, make_encoder
from training.predictor import Predictor

RUN = "--max_steps 2 --batch_size 4 --eval_every 2 --device cpu --precision fp32 --head_lr 0.3"
SST = ["a gripping film", "two hours of nothing", "it is what it is", "a gripping film", "an honest try"]
STS = [("a man plays a guitar", "someone plays music"), ("a dog runs", "two cats sleep")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two runs, of all tasks and of one, away from the data and the encoder that they were trained with."""
    start, folder = tmp_path_factory.mktemp("start"), tmp_path_factory.mktemp("asked")
    make_encoder(start / "encoder")
    make_data(start / "data")
    shared = f"--pretrained {start}/encoder --data_dir {start}/data {RUN}".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multitask_classifier, "plot_run", lambda folder: None)
        for name, flags in (("run", "--para_head cross"), ("sst_only", "--tasks sst --predict_splits none")):
            flags = [*shared, *flags.split(), "--output_dir", str(start / name)]
            assert multitask_classifier.main(flags) == 0
            shutil.move(start / name, folder / name)
    shutil.move(start / "data", folder / "data")
    shutil.rmtree(start)
    return folder


@pytest.fixture(scope="module")
def predictor(place):
    return Predictor.from_run(place / "run", device="cpu", precision="fp32")


@pytest.fixture
def command(place):
    """The command on the run of all tasks."""
    return lambda *words, run="run": [str(place / run), "--device", "cpu", "--precision", "fp32", *words]


@pytest.fixture
def ask(command, capsys):
    """Run it; returns what it printed."""

    def ask(*words, **options):
        assert main(command(*words, **options)) == 0
        return capsys.readouterr().out

    return ask


@pytest.fixture
def standard_input(monkeypatch):
    def replace(content: bytes):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))

    return replace


def read_jsonl(text):
    return [json.loads(line) for line in text.splitlines()]


def as_json(task, text, prediction):
    """A prediction of the Python class as the command writes it."""
    found = dict(zip(TASKS[task].text_columns, (text,) if isinstance(text, str) else text, strict=True))
    if prediction.label is None:
        return found | {TASKS[task].label_column: round(prediction.value, 6)}
    rounded = {name: round(p, 6) for name, p in prediction.probabilities.items()}
    return found | {"prediction": prediction.label, "probabilities": rounded}


# --- from Python --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", DEFAULT_TASKS)
def test_predictions_are_those_of_an_evaluation_and_of_the_runs_own_file(place, predictor, task):
    spec, tokenizer = TASKS[task], predictor.tokenizer
    rows = read_rows(place / "data" / spec.files["dev"], spec, "dev")
    found = predictor.predict(task, rows.texts)
    data = tokenize(rows, tokenizer, joint=task == "para", max_length=64)
    values = predict(predictor.model, task, data, tokenizer.pad_token_id).tolist()
    assert [each.value for each in found] == values and len(set(map(str, found))) > 1
    own = read_predictions(place / "run" / "predictions" / f"{task}-dev-output.csv", spec)
    assert values == pytest.approx([own[row_id] for row_id in rows.ids], abs=1e-6)  # float32, other batches


@pytest.mark.parametrize("task", ["sst", "para"])
def test_probabilities_are_those_of_the_logits(predictor, task):
    """Of one example alone, through the model's plain forward pass."""
    tokenizer, names = predictor.tokenizer, TASKS[task].class_names
    texts = SST if task == "sst" else STS
    for text, found in zip(texts, predictor.predict(task, texts), strict=True):
        encoding = tokenizer.encode(text) if task == "sst" else tokenizer.encode_pair(*text)
        batch = {key: torch.tensor([ids]) for key, ids in encoding.items()}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        with torch.no_grad():
            logits = predictor.model(task, batch)[0]
        expected = logits.softmax(-1) if task == "sst" else torch.stack([-logits[0], logits[0]]).sigmoid()
        assert list(found.probabilities) == list(names)
        # float32: alone, sums are taken in another order than among other sentences.
        assert list(found.probabilities.values()) == pytest.approx(expected.tolist(), abs=1e-5)
        assert found.label == max(found.probabilities, key=found.probabilities.get) == names[found.value]


def test_a_checkpoint_is_as_good_as_its_run(place, predictor):
    again = Predictor.from_run(place / "run" / "best", device="cpu", precision="fp32")
    assert again.tasks == DEFAULT_TASKS
    assert again.predict("sts", STS) == predictor.predict("sts", STS)
    assert Predictor.from_run(place / "sst_only", device="cpu").tasks == ("sst",)


def test_loading_leaves_random_numbers_alone(place):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Predictor.from_run(place / "run", device="cpu")
    assert torch.equal(torch.rand(3), expected)


def test_no_texts_and_unusual_texts(predictor):
    assert predictor.predict("sst", []) == []
    odd, empty = predictor.predict("sst", [" a \t gripping\nfilm ", ""])
    assert odd.probabilities == pytest.approx(predictor.predict("sst", SST)[0].probabilities, abs=1e-5)
    assert set(empty.probabilities) == set(odd.probabilities)
    assert len(predictor.predict("sst", ["\ud800 lone surrogate", "x" * 3000])) == 2


@pytest.mark.parametrize(
    ("task", "texts", "message"),
    [
        ("cfimdb", SST, "task 'cfimdb': not one of this run; it has sst, para, sts"),
        ("sst", "a gripping film", "texts is 'a gripping film'; expected a list"),
        ("sst", STS, "expected a sentence"),
        ("sts", SST, "text is 'a gripping film'; expected a pair of sentences"),
        ("sts", [("a", "b", "c")], "expected a pair"),
        ("sts", [("a", None)], "expected a pair"),
    ],
)
def test_wrong_use_from_python(predictor, task, texts, message):
    with pytest.raises(UserError, match=message):
        predictor.predict(task, texts)


# --- the command: forms of output ---------------------------------------------------------------------------


def test_jsonl_has_what_python_gives(ask, predictor):
    for task, texts in (("sst", SST), ("para", STS), ("sts", STS)):
        words = texts if task == "sst" else itertools.chain(*texts)
        found = read_jsonl(ask("--task", task, "--format", "jsonl", *words))
        assert found == [
            as_json(task, *each) for each in zip(texts, predictor.predict(task, texts), strict=True)
        ]


def test_tsv_is_read_back_as_a_table(ask, predictor):
    text = ask("--task", "sst", "--format", "tsv", '"so"\tit goes', "plain")
    header, *rows = csv.reader(io.StringIO(text), delimiter="\t", strict=True)
    assert header == ["sentence", "prediction", *TASKS["sst"].class_names]
    assert [row[0] for row in rows] == ['"so" it goes', "plain"]
    expected = predictor.predict("sst", ['"so" it goes', "plain"])
    for row, prediction in zip(rows, expected, strict=True):
        assert row[1] == prediction.label
        assert list(map(float, row[2:])) == pytest.approx(list(prediction.probabilities.values()), abs=1e-6)
    header, row = ask("--task", "sts", "--format", "tsv", *STS[0]).splitlines()
    assert header.split("\t") == ["sentence1", "sentence2", "similarity"] and row.split("\t")[:2] == [*STS[0]]


def test_table_is_for_people(ask):
    head, *lines = ask("--task", "sst", *SST, "\x1b[2J" + 80 * "long ").splitlines()
    assert head.split("  ")[0] == "prediction" and head.endswith("sentence")
    assert (
        len({line.index(text) for line, text in zip(lines, SST, strict=False)} | {head.rindex("sentence")})
        == 1
    )
    assert "\x1b" not in lines[-1] and lines[-1].endswith("...") and len(lines) == 6
    head, line = ask("--task", "sts", *STS[0]).splitlines()
    assert head.split("  ") == ["similarity (0 to 5)", "sentence1 | sentence2"]
    assert line.endswith("  a man plays a guitar | someone plays music")


# --- the command: where sentences come from -----------------------------------------------------------------

PAIR_LINES = "".join(f"{a}\t{b}\n" for a, b in STS)
INPUTS = {  # name of the file: its content
    "lines.txt": ("sst", "\n".join(SST)),
    "windows.txt": ("sst", "\ufeff" + "\r\n".join(SST) + "\r\n"),
    "pairs.tsv": ("sts", PAIR_LINES),
    "table.csv": ("sst", "number,sentence\n" + "".join(f'{n},"{text}"\n' for n, text in enumerate(SST))),
    "breaks.csv": ("sst", 'sentence,x\n"a gripping\nfilm",1\n' + "".join(f"{text},\n" for text in SST[1:])),
    "semicolon.tsv": ("sts", "sentence2\tid\tsentence1\n" + "".join(f"{b}\t;\t{a}\n" for a, b in STS)),
    "commas.csv": ("sts", "sentence1, sentence2\n" + "".join(f'"{a}","{b}"\n' for a, b in STS)),
}


@pytest.mark.parametrize(
    ("name", "way"),
    [
        (name, way)
        for name in INPUTS
        for way in ("file", "dash", "pipe")
        if way == "file" or name[-3:] != "csv"
    ],
)
def test_files_and_standard_input(ask, predictor, standard_input, tmp_path, name, way):
    task, content = INPUTS[name]
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    standard_input(content.encode() if way != "file" else b"not read")
    source = {"file": ["--file", str(tmp_path / name)], "dash": ["--file", "-"], "pipe": []}[way]
    texts = SST if task == "sst" else STS
    found = read_jsonl(ask("--task", task, "--format", "jsonl", *source))
    assert found == [as_json(task, *each) for each in zip(texts, predictor.predict(task, texts), strict=True)]


def test_the_courses_files_are_read_as_they_are(ask, place):
    for task in DEFAULT_TASKS:
        path = place / "data" / TASKS[task].files["test"]
        found = read_jsonl(ask("--task", task, "--format", "jsonl", "--file", str(path)))
        rows = read_rows(path, TASKS[task], "test")
        assert [tuple(each[column] for column in TASKS[task].text_columns) for each in found] == rows.texts


def test_other_columns(ask, command, refused, tmp_path):
    (tmp_path / "posts.csv").write_text("user,text\n1,a gripping film\n")
    words = ["--task", "sst", "--format", "tsv", "--file", str(tmp_path / "posts.csv")]
    assert "a gripping film\t" in ask(*words, "--columns", "text")
    assert "expected the columns sentence, separated" in refused(main, command(*words))
    assert "expected the columns titel" in refused(main, command(*words, "--columns", "titel"))
    assert "--columns a,b: expected 1 name" in refused(main, command(*words, "--columns", "a,b"))


@pytest.mark.parametrize("size", [1, 2, 4096])
def test_any_size_of_chunk_gives_the_same_in_the_same_order(ask, place, monkeypatch, size):
    path = place / "data" / TASKS["sst"].files["train"]
    monkeypatch.setattr(sentences, "CHUNK_EXAMPLES", 7)
    words = ["--task", "sst", "--format", "jsonl", "--file", str(path)]
    expected = read_jsonl(ask(*words))
    monkeypatch.setattr(sentences, "CHUNK_EXAMPLES", size)
    found = read_jsonl(ask(*words))
    assert [each["sentence"] for each in found] == [each["sentence"] for each in expected]
    for one, other in zip(found, expected, strict=True):  # float32, other batches; then rounded
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)


def test_what_is_typed_in_another_encoding_is_refused(monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt: b"caf\xe9".decode())
    with pytest.raises(UserError, match="standard input: not utf-8 text"):
        next(prompt("sst"))


def test_an_endless_input_is_read_a_chunk_at_a_time():
    class Endless:
        num_lines = 0

        def readline(self, limit):
            self.num_lines += 1
            return b"on and on\n"

    stream = Endless()
    chunks = sentences.in_chunks(sentences.read_examples(stream, "endless", TASKS["sst"]))
    assert len(next(chunks)) == sentences.CHUNK_EXAMPLES == stream.num_lines
    assert next(chunks)[0] == (sentences.CHUNK_EXAMPLES + 1, ("on and on",))
    long = Endless()
    long.readline = lambda limit: b"x" * 2**19 + b"\n"
    assert len(next(sentences.in_chunks(sentences.read_examples(long, "long", TASKS["sst"])))) == 8


def test_prompt_on_a_terminal(place, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for task, typed in (
        ("sst", "a gripping film\n\n  \nan honest try\n"),
        ("sts", "\n".join(STS[0]) + "\na"),
    ):
        monkeypatch.setattr(sys, "stdin", Terminal(typed))
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        assert main([str(place / "run"), "--task", task, "--format", "jsonl", "--device", "cpu"]) == 0
        captured = capsys.readouterr()
        answers = [line.rpartition("> ")[2] for line in captured.out.splitlines() if "{" in line]
        asked = [tuple(json.loads(answer).values())[: 1 + (task == "sts")] for answer in answers]
        assert asked == ([("a gripping film",), ("an honest try",)] if task == "sst" else [STS[0]])
        assert "Ctrl-D ends" in captured.err and f"{TASKS[task].text_columns[0]}> " in captured.out


# --- the page about it --------------------------------------------------------------------------------------


@pytest.fixture
def code_blocks(place):
    """The Python code of docs/use.md, on a run that is there."""
    text = (ROOT / "docs" / "use.md").read_text(encoding="utf-8").replace("runs/first", str(place / "run"))
    return [part.partition("```")[0] for part in text.split("```python\n")[1:]]


def test_python_on_the_page(code_blocks, capsys):
    names = {}
    for code in code_blocks[:2]:
        exec(code, names)  # noqa: S102
    assert len(capsys.readouterr().out.splitlines()) == 3 and names["logits"].shape == (2, 5)


def test_hugging_face_datasets_on_the_page(code_blocks, monkeypatch, standard_input, capsys):
    """With stand-ins for the package, and for the process that answers."""

    def run(command, cwd, input, **options):
        assert command[:3] == ["python", "-m", "reporting.predict"] and cwd == "path/to/this/project"
        assert options == {"capture_output": True, "text": True, "check": True}
        standard_input(input.encode())
        assert main(command[3:]) == 0
        return SimpleNamespace(stdout=capsys.readouterr().out)

    texts, names = {"text": ["two\nlines", *SST]}, {}
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda name, split: texts))
    monkeypatch.setattr(subprocess, "run", run)
    exec(code_blocks[2], names)  # noqa: S102
    assert [answer["sentence"] for answer in names["answers"]] == ["two lines", *SST]


# --- what it leaves alone, and errors -----------------------------------------------------------------------


def test_the_runs_files_are_only_read_and_no_other_file_is_needed(ask, place, monkeypatch, tmp_path):
    def state():
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(place.rglob("*"))}

    before = state()
    monkeypatch.chdir(tmp_path)
    ask("--task", "sst", *SST)
    ask(*SST, run="sst_only")  # the only task need not be named
    assert state() == before and not list(tmp_path.iterdir())


def test_empty_sentences_keep_their_place_and_are_warned_about(place, standard_input, capsys):
    standard_input(b"a gripping film\n\nan honest try\n \n")
    assert main([str(place / "run"), "--task", "sst", "--format", "jsonl", "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert [each["sentence"] for each in read_jsonl(captured.out)] == [
        "a gripping film",
        "",
        "an honest try",
        "",
    ]
    assert captured.err == (
        "warning: 2 examples with an empty sentence, predicted like any other (first in line 2, 4)\n"
    )


def test_a_damaged_checkpoint_is_refused(place, tmp_path, refused):
    shutil.copytree(place / "run", tmp_path / "run")
    path = tmp_path / "run" / "best" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    for run in ("run", "run/best"):
        assert "damaged (its checksum" in refused(main, [str(tmp_path / run), "--task", "sst", "a"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--task sst --file {place}/none.txt", "none.txt: cannot be read (No such file"),
        ("--task sst --file {place}", "is a folder; expected a file"),
        ("--task sst --file x a", "--file and sentences on the command line contradict"),
        ("a", "--task is missing; the run has sst, para, sts"),
        ("--task cfimdb a", "--task cfimdb: not one of this run"),
        ("--task sts a b c", "3 sentences given; it compares two"),
        ("--task sst --device cuda:77 a", "--device cuda:77: not available"),
        ("--task sst --format xml a", "invalid choice: 'xml'"),
        ("--task sst \ufeff", "is empty; expected some text"),
    ],
)
def test_wrong_use_ends_in_one_line(place, flags, message, refused):
    assert message in refused(main, [str(place / "run"), *flags.format(place=place).split(" ")])


@pytest.mark.parametrize("folder", ["none", "data"])
def test_no_run_there(place, folder, refused):
    message = "no run there (no args.json); expected a folder that training wrote"
    assert message in refused(main, [str(place / folder), "--task", "sst", "a"])


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("sst", b"", "standard input: is empty; expected sentences"),
        ("sst", b"good\na\tb\n", "standard input:2: line is 'a\\tb\\n'; expected a sentence without a tab"),
        ("sts", b"a\tb\nc\n", "standard input:2: line is 'c\\n'; expected two sentences with a tab"),
        ("sst", b"good\nb\xe4d\n", "standard input:2: not UTF-8 text (byte 0xe4)"),
        ("sst", b"good\nb\0d\n", "standard input:2: a NUL byte"),
        ("sst", b"\xff\xfea\0\n\0", "looks like UTF-16"),
        ("sst", b"PK\x03\x04...", "looks like a zip archive"),
        ("sst", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        ("sst", b"x" * (sentences.MAX_LINE_BYTES + 1), "standard input:1: a line of more than"),
        ("sst", b"id,sentence\n1,good\n2,so, so\n", "standard input:3: 3 fields; expected 2"),
        ("sst", b"id,sentence\n1\n", "standard input:2: 1 fields; expected 2"),
        ("sst", b'"sentence""",x\na,b\n', "standard input:1: no column 'sentence'; expected one"),
        ("sst", b"sentence,sentence\n1,2\n", "standard input:1: two columns 'sentence'"),
        ("sst", b'id,sentence\n1,"open\n', "standard input:2: a quotation mark in this row is never closed"),
    ],
)
def test_bad_input_ends_in_one_line(command, refused, standard_input, task, content, message):
    standard_input(content)
    assert message in refused(main, command("--task", task))
