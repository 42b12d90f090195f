"""Exports, opened by the libraries they are made for, as their cards say: our scores, or a refusal."""

import importlib.util
import json
from dataclasses import replace

import huggingface_hub
import pytest
import torch
import yaml

from config import DEFAULT_TASKS, TASKS
from evaluation import TASK_KINDS
from heads import HEADS, PAIR_HEADS, POOLINGS, MultitaskBERT
from reporting import export_formats
from reporting.export import MARK, check_folder, load_run, main, write_folder
from reporting.export_formats import FOLDER, FORMATS, KIND_OUTPUTS, TaskModel, input_names
from reporting.plain_model import PlainModel
from support.errors import UserError
from tests.tiny import make_batch, make_encoder, make_model, randomise
from training.checkpoint import UNTRAINED, write_checkpoint, write_model
from training.flags import get_args
from training.run_data import load_encoder
from training.run_folder import write_args

# Of short and long inputs, one of them beyond the 64 positions of the tiny encoder.
TEXTS = ["a film", "not a good film, though it is long", "q" * 5 + " no", "many words are cut here " * 5]
SECOND = ["the film", "long", "many, many, many words", "and here, too, they are cut " * 4]
PAIRS = list(zip(TEXTS, SECOND, strict=True))
RUNS = {
    "pooler": ["--pooling", "pooler", "--para_head", "cross", "--sts_head", "cross"],
    "cls": ["--pooling", "cls", "--para_head", "cross", "--sts_head", "cosine"],
    "mean": ["--pooling", "mean", "--para_head", "diff", "--sts_head", "diff"],
    "deep": ["--pooling", "mean", "--head_layers", "3", "--para_head", "concat", "--sts_head", "cross"],
    "deep_pooler": ["--pooling", "pooler", "--head_layers", "2", "--para_head", "cross"],
}
SCORES = {"sst": {"accuracy": 0.5}, "para": {"accuracy": 0.5}, "sts": {"pearson": 0.25}}


def has(*packages):
    return all(importlib.util.find_spec(package) for package in packages)


needs_st = pytest.mark.skipif(
    not has("sentence_transformers"), reason="no sentence-transformers (requirements/export.txt)"
)
needs_onnx = pytest.mark.skipif(
    not has("onnx", "onnxscript", "onnxruntime"), reason="no onnx (requirements/export.txt)"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders with random weights, by the names of RUNS; never trained, never evaluated on all of dev."""
    root = tmp_path_factory.mktemp("runs")
    encoder = make_encoder(root / "encoder")
    for name, flags in RUNS.items():
        folder = root / name
        args = get_args(["--pretrained", str(encoder), "--output_dir", str(folder), *flags])
        args.lr = args.head_lr = 1e-3
        args.max_steps = args.warmup_steps = 1
        args.precision = "fp32"
        write_args(folder, vars(args), {"data": {}, "encoder_sha256": "01ab"}, device="cpu")
        bert, tokenizer = load_encoder(encoder, None)
        heads = {task: getattr(args, f"{task}_head", "single") for task in DEFAULT_TASKS}
        tasks = {task: TASKS[task] for task in DEFAULT_TASKS}
        model = MultitaskBERT(bert, tasks, heads, pooling=args.pooling, head_layers=args.head_layers)
        randomise(model, seed=len(name))
        state = {"step": 7, "dev": {"tasks": SCORES}}
        write_checkpoint(
            folder / "best",
            lambda new, model=model, state=state, tokenizer=tokenizer: write_model(
                new, model, tokenizer, state
            ),
        )
    return root


@torch.no_grad()
def our_scores(run_dir, task):
    """(B, C) by the model that trains: packed rows, in one batch."""
    _, models = load_run(run_dir)
    (chosen,) = (each for each in models if each.task == task)
    if chosen.head.spec.joint:
        encoded = chosen.tokenizer.encode_pair_batch(PAIRS, chosen.max_length)
    else:
        texts = TEXTS + SECOND if chosen.spec.is_pair else TEXTS
        encoded = chosen.tokenizer.encode_batch(texts, chosen.max_length)
    width = max(len(each["input_ids"]) for each in encoded)

    def rectangle(rows):
        return torch.tensor([row + [0] * (width - len(row)) for row in rows])

    batch = {name: rectangle([each[name] for each in encoded]) for name in ("input_ids", "token_type_ids")}
    batch["attention_mask"] = rectangle([[1] * len(each["input_ids"]) for each in encoded])
    return chosen.output.scores(chosen.model(task, batch))


# Does what each card says with other sentences, and writes down the scores.
FOLLOW_CARDS = f"""
import json, re
from pathlib import Path
texts, pairs = {TEXTS!r}, {PAIRS!r}
for folder in (path.parent for path in sorted(Path.cwd().rglob("{MARK}"))):
    text = re.search("```python\\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
    text = text.replace("{FOLDER}", str(folder))
    text = re.sub("^(texts|pairs) = .*$", "", text, flags=re.M)
    names = {{"texts": texts, "pairs": pairs}}
    exec(text, names)
    scores = names["scores"]
    if isinstance(scores, list):  # of the pipeline: labels and scores, best first
        order = json.loads((folder / "{MARK}").read_text())["labels"]
        scores = [[{{e["label"]: e["score"] for e in row}}[label] for label in order] for row in scores]
    else:
        scores = scores.tolist()
    (folder / "scores.json").write_text(json.dumps(scores))
"""


def export_all(runs, place, form, chosen):
    for name, tasks in chosen.items():
        assert main([str(runs / name), "--to", form, str(place / name), "--tasks", tasks]) == 0


def compare(runs, place, chosen, tolerance, second_class=False):
    """Hold the scores that the libraries gave against ours."""
    for name, tasks in chosen.items():
        for task in tasks.split(","):
            folder = place / name / task if "," in tasks else place / name
            found = torch.tensor(json.loads((folder / "scores.json").read_text()))
            expected = our_scores(runs / name, task)
            if second_class and KIND_OUTPUTS[TASKS[task].kind].has_one_logit:
                torch.testing.assert_close(found.sum(-1), torch.ones(len(found)))
                found = found[:, 1:]
            assert expected.std(0).max() > 1e-3  # or equal would mean nothing
            difference = (found.view_as(expected) - expected).abs().max().item()
            scale = max(1.0, expected.abs().max().item())
            print(f"{name} {task}: {difference:.1e} of {scale:.3g}")
            assert difference <= tolerance * scale, (name, task)


# --- equal scores -------------------------------------------------------------------------------------------

# Probabilities and similarities are computed in float32, in another order: the tolerances are the issue's.


@pytest.mark.slow  # a process that imports transformers
def test_pipelines_of_transformers_give_our_scores(runs, tmp_path, run_transformers):
    chosen = {"pooler": "sst,para,sts", "cls": "sst,para"}
    export_all(runs, tmp_path, "hf", chosen)
    run_transformers(FOLLOW_CARDS, tmp_path)
    compare(runs, tmp_path, chosen, 1e-5, second_class=True)


@needs_st
@pytest.mark.slow
def test_sentence_transformers_give_our_scores(runs, tmp_path, run_transformers):
    chosen = dict.fromkeys(RUNS, "sst,para,sts")
    export_all(runs, tmp_path, "sentence-transformers", chosen)
    run_transformers(FOLLOW_CARDS, tmp_path)
    compare(runs, tmp_path, chosen, 1e-5)


@needs_onnx
@pytest.mark.slow
def test_onnxruntime_gives_our_scores(runs, tmp_path, run_transformers):
    # Tracing takes seconds each; test_plain_model_gives_our_logits has every combination.
    chosen = {"cls": "sts", "mean": "para", "deep": "sts", "pooler": "sst"}
    export_all(runs, tmp_path, "onnx", chosen)
    run_transformers(FOLLOW_CARDS, tmp_path)
    compare(runs, tmp_path, chosen, 1e-4)


@pytest.mark.parametrize("head", PAIR_HEADS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_plain_model_gives_our_logits(pooling, head):
    model = make_model(head, pooling=pooling, head_layers=2).eval()
    randomise(model)
    for task in DEFAULT_TASKS:
        name = head if TASKS[task].is_pair else "single"
        batch = make_batch(task, name)
        rows = [batch[key] for key in export_formats.INPUTS]
        parts = zip(*(row.chunk(HEADS[name].num_inputs) for row in rows), strict=True)
        rows = [row for part in parts for row in part]
        with torch.no_grad():
            logits, scores = PlainModel(model, task, lambda z: z.sigmoid())(*rows)
            expected = model(task, batch)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(scores, logits.sigmoid())


def test_every_kind_of_task_has_a_meaning():
    assert set(KIND_OUTPUTS) == set(TASK_KINDS)
    logits = torch.tensor([[0.5, -1.0]])
    for output in KIND_OUTPUTS.values():
        assert torch.equal(output.scores(logits), eval(f"logits{output.code}", {"logits": logits}))


# --- what a form cannot hold --------------------------------------------------------------------------------


def make_task_model(task, head, pooling, head_layers=1):
    model = make_model(head, pooling=pooling, head_layers=head_layers)
    return TaskModel(task, model, head if TASKS[task].is_pair else "single", None, 64)


@pytest.mark.parametrize(
    ("task", "head", "pooling", "layers", "reason"),
    [
        ("sst", "cross", "mean", 1, "pooling mean"),
        ("para", "diff", "pooler", 1, "head diff compares two vectors"),
        ("sts", "cosine", "cls", 1, "head cosine compares two vectors"),
        ("para", "cross", "pooler", 2, "head_layers 2"),
        ("para", "cross", "cls", 1, None),
        ("sst", "cross", "pooler", 1, None),
        ("sst", "cross", "attention", 1, "pooling attention"),
        ("sts", "diff+cross", "cls", 1, "head diff+cross, the average of two"),
    ],
)
def test_what_bert_for_sequence_classification_holds(task, head, pooling, layers, reason):
    found = FORMATS["hf"].refuse(make_task_model(task, head, pooling, layers))
    assert found is None if reason is None else found.startswith(reason)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_sentence_transformers_and_onnx_hold_every_pooling(pooling):
    """But the one that no module of sentence-transformers is."""
    chosen = make_task_model("sst", "diff", pooling)
    assert FORMATS["onnx"].refuse(chosen) is None
    refused = FORMATS["sentence-transformers"].refuse(chosen)
    assert refused is None if pooling != "attention" else refused.startswith("pooling attention")


def test_what_only_onnx_holds_is_refused_by_name_elsewhere():
    chosen = make_task_model("sts", "diff+cross", "cls")
    both = replace(make_task_model("sts", "cross", "cls"), both_orders=True)
    coral = TaskModel("sst", make_model(losses={"sst": "coral"}), "single", None, 64)
    for each, reason in ((chosen, "head diff+cross"), (both, "--symmetric"), (coral, "loss coral")):
        assert FORMATS["onnx"].refuse(each) is None
        for form in ("hf", "sentence-transformers"):
            assert FORMATS[form].refuse(each).startswith(reason)
    assert input_names(both)[::3] == ["pair_input_ids", "swapped_input_ids"]
    assert input_names(chosen)[::3] == ["first_input_ids", "second_input_ids", "pair_input_ids"]
    assert torch.allclose(coral.output.scores(torch.zeros(1, 4)), torch.tensor([[0.5, 0, 0, 0, 0.5]]))


def test_pooling_that_is_new_is_refused_by_name():
    chosen = make_task_model("sst", "diff", "cls")
    chosen.model.pooling = "max"
    for form in ("hf", "sentence-transformers"):
        assert FORMATS[form].refuse(chosen).startswith("pooling max; ")


def run_to_error(argv, capsys):
    assert main(list(map(str, argv))) == 2
    captured = capsys.readouterr().err
    assert captured.count("\n") == 1
    return captured


def test_refusal_names_flag_task_and_what_fits(runs, tmp_path, capsys):
    error = run_to_error([runs / "cls", "--to", "hf", tmp_path / "out"], capsys)
    assert "--to hf: sts has head cosine" in error
    assert "it fits --to sentence-transformers or onnx; here --tasks sst,para fits" in error
    assert not (tmp_path / "out").exists()


def test_errors_in_one_line(runs, tmp_path, capsys, monkeypatch):
    run, out = runs / "pooler", tmp_path / "out"
    assert "no run there" in run_to_error([tmp_path / "none", "--to", "hf", out], capsys)
    error = run_to_error([run, "--to", "hf", out, "--tasks", "cfimdb"], capsys)
    assert "--tasks cfimdb: not a task of this run; expected one of sst, para, sts" in error
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    error = run_to_error([run, "--to", "onnx", out], capsys)
    assert "the package onnx is not installed; pip install -r requirements/export.txt" in error
    assert not out.exists()


# --- folders ------------------------------------------------------------------------------------------------


def test_only_an_export_is_replaced(runs, tmp_path, capsys):
    command = [runs / "pooler", "--to", "hf", tmp_path / "out", "--tasks", "sst"]
    (tmp_path / "out").mkdir()  # empty: nothing to lose
    assert main(list(map(str, command))) == 0
    (tmp_path / "out" / "stray").write_text("")
    assert main(list(map(str, command))) == 0
    assert not (tmp_path / "out" / "stray").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "out" / MARK).unlink()
    assert "exists and is no export" in run_to_error(command, capsys)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    for name, words in (("file", "is a file"), ("link", "is a link to nowhere")):
        with pytest.raises(UserError, match=words):
            check_folder(tmp_path / name)


def test_folder_is_whole_or_not_there(tmp_path):
    def fail(new):
        (new / "model").write_text("")
        raise ZeroDivisionError

    folder = tmp_path / "out"
    with pytest.raises(ZeroDivisionError):
        write_folder(folder, fail)
    assert not any(tmp_path.iterdir())
    write_folder(folder, lambda new: (new / "model").write_text("old"))
    with pytest.raises(ZeroDivisionError):
        write_folder(folder, fail)
    assert (folder / "model").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "out.new").mkdir()  # somebody's
    (tmp_path / "out.new" / "thesis").write_text("")
    with pytest.raises(UserError, match="exists and is no export"):
        write_folder(folder, lambda new: None)


# --- cards --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["hf", "sentence-transformers"])
def test_card(runs, tmp_path, form):
    assert main([str(runs / "pooler"), "--to", form, str(tmp_path / "out"), "--tasks", "para"]) == 0
    _, front, text = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    values = yaml.safe_load(front)
    assert values["license"] == "unknown" and values["library_name"] == FORMATS[form].library
    (result,) = values["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "accuracy", "value": 0.5}]
    assert result["dataset"] == {"name": TASKS["para"].title, "type": "para", "split": "dev"}
    for words in ("## Limits", "sha256 01ab", "no paraphrase, paraphrase", "64 word pieces", "step 7"):
        assert words in text
    assert str(runs) not in text.replace(str(runs / "pooler"), "")  # no one else's folders


def test_pair_head_beside_the_vectors_is_spoken_of(runs, tmp_path):
    for name, words in (("mean", "is no module of the library"), ("cls", "* cosine")):
        command = [runs / name, "--to", "sentence-transformers", tmp_path / name, "--tasks", "sts"]
        assert main(list(map(str, command))) == 0
        assert words in (tmp_path / name / "README.md").read_text()
        assert (tmp_path / name / "head.safetensors").exists()


UNTRAINED_HEAD = """
import json
from transformers import pipeline
(found,) = pipeline("text-classification", "{folder}")("a film")
open("answer.json", "w").write(json.dumps(found))
"""


@pytest.mark.slow
def test_checkpoint_opened_without_its_heads_says_so(runs, tmp_path, run_transformers):
    run_transformers(UNTRAINED_HEAD.format(folder=runs / "mean" / "best"), tmp_path)
    assert UNTRAINED in json.loads((tmp_path / "answer.json").read_text())["label"]


# --- the hub ------------------------------------------------------------------------------------------------


class StandIn:
    """The two calls of the hub's interface that an upload takes."""

    def __init__(self, fails=False):
        self.calls, self.fails = [], fails

    def create_repo(self, repo, **options):
        self.calls.append(("create", repo, options))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{repo.partition('/')[2]}")

    def upload_folder(self, folder_path, repo_id, commit_message):
        if self.fails:
            raise OSError("the hub is away\nfor long")
        self.calls.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir())))
        return f"https://huggingface.co/{repo_id}/commit/1"


def test_push(runs, tmp_path, monkeypatch, capsys):
    hub = StandIn()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    command = [runs / "pooler", "--to", "hf", tmp_path / "out", "--push_to_hub", "me/bert"]
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "--push_to_hub me/bert-sst: no token" in run_to_error(command, capsys)
    assert not (tmp_path / "out").exists() and not hub.calls
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    assert main(list(map(str, command))) == 0
    assert [call[:2] for call in hub.calls] == [
        (what, f"me/bert-{task}") for task in DEFAULT_TASKS for what in ("create", "upload")
    ]
    assert hub.calls[0][2] == {"private": True, "exist_ok": True}
    assert {"README.md", "config.json", "model.safetensors"} <= set(hub.calls[1][2])
    assert "pushed" in capsys.readouterr().out
    hub.fails = True
    command[3] = tmp_path / "one"
    error = run_to_error([*command, "--tasks", "sst"], capsys)
    assert "--push_to_hub me/bert: the hub is away;" in error and "is written" in error
    command[-1] = "no/name/at all"
    assert "expected USER/NAME" in run_to_error([*command, "--tasks", "sst"], capsys)
