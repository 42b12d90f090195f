"""Scores against scipy and by hand, losses and decoding by hand, prediction files byte for byte.

Prediction is compared with the model's own forward pass on padded batches.
"""

import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

import evaluation
from bert import BertModel
from config import TASKS
from datasets import Rows, tokenize
from evaluation import (
    CLASS_LOSSES,
    OVERALLS,
    PREDICTION_STYLES,
    TASK_KINDS,
    check_predictions,
    class_scores,
    collapse_warning,
    correlation_scores,
    evaluate,
    format_predictions,
    majority_baseline,
    pearson,
    predict,
    read_predictions,
    score_warnings,
    select_score,
    spearman,
    summarise,
    task_kind,
)
from heads import MultitaskBERT
from support.errors import UserError
from tests.tiny import make_config
from tokenizer import SPECIAL_TOKENS, BertTokenizer

# --- scores -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
def test_correlations_equal_scipy_and_do_not_depend_on_scale_or_offset(ties):
    rng = np.random.default_rng(0)
    for size in (2, 3, 10, 863):
        x = rng.normal(size=size)
        y = 0.5 * x + rng.normal(size=size)
        if ties:  # labels with one decimal, predictions that repeat
            x, y = np.round(x), np.round(y, 1)
            x[:2], y[:2] = [1, 2], [3, 1]  # neither side constant
        # float64 both; scipy centres and scales in another order
        assert pearson(x, y) == pytest.approx(scipy.stats.pearsonr(x, y).statistic, abs=1e-12)
        assert spearman(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-12)
        assert pearson(1e6 * x - 3, 1e-6 * y + 5) == pytest.approx(
            pearson(x, y), abs=1e-9
        )  # digits lost to + 5


def test_correlations_by_hand():
    """(1, 2, 3) with (1, 3, 2): centred products 1 + 0 + 0, squares 2 and 2. A monotone curve has rho 1."""
    x, y = np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0])
    for scale in (1, 1e-300, 1e-160, 1e160, 1e300):  # squares of these are 0 or infinite; r is not
        assert pearson(scale * x, y) == pytest.approx(0.5, abs=1e-12)
        assert pearson(x, -scale * y) == pytest.approx(-0.5, abs=1e-12)
    scores = correlation_scores(np.array([1.0, 2.0, 30.0]), np.array([0.0, 1.0, 2.0], dtype=np.float32))
    r = 29 / math.sqrt(2 * (1 + 4 + 900 - 3 * 11**2))
    assert scores == pytest.approx({"spearman": 1, "pearson": r}, abs=1e-12)
    for x in np.random.default_rng(0).normal(size=(200, 9)):  # rounding leads nowhere beyond the range
        assert 1 - 1e-12 < pearson(x, 3 * x) <= 1 and -1 <= pearson(x, -3 * x) < -1 + 1e-12


@pytest.mark.parametrize("correlation", [pearson, spearman])
def test_correlation_with_a_constant_is_zero_and_with_what_is_not_finite_no_score(correlation):
    """0 would be better than a negative r. Ranks of infinite numbers are ranks, though."""
    for constant in ([2.5] * 3, [0.0] * 3, [0.1] * 3):  # the last has a mean that rounds
        for other in ([1.0, 2.0, 4.0], constant):
            assert correlation(constant, other) == correlation(other, constant) == 0
    for bad in (math.nan, math.inf, -math.inf):
        x, y = [1, 2, bad, 4], [4.0, 3.0, 2.0, 1.0]
        for found in (correlation(x, y), correlation(y, x)):
            assert found < 0 if correlation is spearman and math.isinf(bad) else math.isnan(found)
        if correlation is pearson:  # constant but for it, or nothing else
            assert math.isnan(pearson([1, 1, bad], y[:3])) and math.isnan(pearson([bad] * 3, y[:3]))


def test_class_scores_and_baselines_by_hand():
    """Class 0: precision 2/3, recall 1, F1 0.8. Class 1: precision 1/2, recall 1/3, F1 0.4. Class 2: 0."""
    scores = class_scores(np.array([0, 0, 0, 1, 2, 1]), np.array([0, 0, 1, 1, 1, 2]))
    assert scores == pytest.approx({"accuracy": 0.5, "macro_f1": (0.8 + 0.4 + 0) / 3}, abs=1e-12)
    assert majority_baseline(np.array([1, 0, 1, 2, 1], dtype=np.float32)) == 0.6
    assert TASK_KINDS["regression"].baseline(np.array([1.0, 2.0])) == 0


@pytest.mark.parametrize(
    "task, score, name",
    [("para", 0.5, "majority"), ("para", 0.51, None), ("sts", math.nan, "constant"), ("sts", 0.01, None)],
)
def test_score_no_better_than_the_baseline_is_warned_about(task, score, name):
    labels, predictions = np.array([0, 1, 1, 0]), np.array([1, 1, 0, 0])
    found = score_warnings(
        task, TASKS[task], {"accuracy": score, "pearson": score}, predictions * 1.0, labels
    )
    assert found == ([f"{task} is no better than the {name} baseline"] if name else [])


def test_collapse_warning():
    """From 95 % equal predictions on, or within 1 % of 0 to 5, 0.05; a single prediction proves nothing."""
    spec = TASKS["sst"]
    assert "95 of 100 predictions are 2" in collapse_warning([2] * 95 + [1] * 5, spec)
    assert collapse_warning([2] * 94 + [1] * 6, spec) is None
    assert "2 of 2" in collapse_warning([0, 0], spec)
    assert collapse_warning([0], spec) is None and collapse_warning([], spec) is None
    assert "between 2.5 and 2.54" in collapse_warning([2.5, 2.54] * 20, TASKS["sts"])
    assert collapse_warning([2.5, 2.56] * 20, TASKS["sts"]) is None
    (said,) = score_warnings("sst", spec, {"accuracy": 1.0}, np.full(4, 3), np.arange(4))
    assert said.startswith("sst: 4 of 4 predictions are 3")


# --- kinds of task ------------------------------------------------------------------------------------------

# kind -> logits (B, C), labels (B,), the mean loss and the predictions, worked by hand.
HAND_KINDS = {
    # Softmax of (0, ln 3): 1/4 and 3/4; of (ln 2, 0): 2/3 and 1/3. Losses -ln 3/4 and -ln 1/3, their mean
    # ln(4) / 2.
    "classification": ([[0, math.log(3)], [math.log(2), 0]], [1, 1], math.log(4) / 2, [1, 0]),
    # Sigmoid of ln 3 is 3/4, of -ln 2 is 1/3, of 0 is 1/2: losses -ln 3/4, -ln 2/3, -ln 1/2, in all -ln 1/4.
    "binary": ([[math.log(3)], [-math.log(2)], [0]], [1, 0, 1], math.log(4) / 3, [1, 0, 0]),
    # Squared errors 0.25, 4 and 0; the prediction is the logit, also outside of 0 to 5.
    "regression": ([[2.0], [-1.5], [5.5]], [2.5, 0.5, 5.5], 4.25 / 3, [2.0, -1.5, 5.5]),
}


@pytest.mark.parametrize("kind", TASK_KINDS)
def test_loss_and_decode_by_hand(kind):
    """Twice the batch has the same loss, and it is the mean of its examples' own."""
    logits, labels, expected_loss, expected = HAND_KINDS[kind]
    logits, labels = torch.tensor(logits, dtype=torch.float32), torch.tensor(labels, dtype=torch.float32)
    loss, approx = TASK_KINDS[kind].loss, pytest.approx(expected_loss, rel=1e-6)  # float32
    assert TASK_KINDS[kind].decode(logits).tolist() == expected
    assert loss(logits, labels).item() == approx
    assert loss(torch.cat([logits, logits]), torch.cat([labels, labels])).item() == approx
    alone = [loss(logits[i : i + 1], labels[i : i + 1]).item() for i in range(len(labels))]
    assert sum(alone) / len(alone) == approx


@pytest.mark.parametrize("kind", HAND_KINDS)
def test_probabilities_are_those_that_the_loss_is_made_of(kind):
    """The loss is the mean of -log p(label)."""
    logits, labels, expected_loss, _ = HAND_KINDS[kind]
    if not TASK_KINDS[kind].is_discrete:
        assert TASK_KINDS[kind].probabilities is None
        return
    probabilities = TASK_KINDS[kind].probabilities(torch.tensor(logits, dtype=torch.float32))  # (B, classes)
    assert probabilities.sum(-1).tolist() == pytest.approx([1.0] * len(labels), abs=1e-6)
    chosen = probabilities[torch.arange(len(labels)), torch.tensor(labels).long()]
    assert -chosen.log().mean().item() == pytest.approx(expected_loss, rel=1e-5)  # float32


# Loss -> logits (B, outputs), labels, the losses and the probabilities of three classes, worked by hand.
HAND_LOSSES = {
    "cross_entropy": ([[0, math.log(2), 0]], [1], [math.log(2)], [[0.25, 0.5, 0.25]]),
    # 3/4 to be above 0, 1/4 to be above 1. In the wrong order, 1/4 and 3/4, class 1 has -1/2, so none.
    "coral": (
        [[math.log(3), -math.log(3)]] * 2 + [[-math.log(3), math.log(3)]],
        [1, 0, 2],
        [-2 * math.log(3 / 4), -math.log(3 / 16), -math.log(3 / 16)],
        [[0.25, 0.5, 0.25]] * 2 + [[0.5, 0, 0.5]],
    ),
    # Of 1/4, 1/2, 1/4, and of a certain class, of which float32 makes 1: far from the label, and it.
    "oll:alpha=1.5": (
        [[0, math.log(2), 0], [0, 0, 90], [0, 0, 90]],
        [0, 0, 2],
        [-math.log(1 / 2) - 2**1.5 * math.log(3 / 4), 2**1.5 * (90 - math.log(2)), 0],
        [[0.25, 0.5, 0.25], [0, 0, 1], [0, 0, 1]],
    ),
}


@pytest.mark.parametrize("loss", HAND_LOSSES)
def test_losses_of_ordered_classes_by_hand(loss):
    assert {name.partition(":")[0] for name in HAND_LOSSES} == CLASS_LOSSES.keys()
    logits, labels, losses, probabilities = map(torch.tensor, HAND_LOSSES[loss])
    kind = task_kind(replace(TASKS["sst"], label_range=(0, 2), loss=loss))
    assert kind.num_outputs(replace(TASKS["sst"], label_range=(0, 2))) == logits.shape[1]
    torch.testing.assert_close(kind.loss(logits, labels.float(), reduction="none"), losses)
    torch.testing.assert_close(kind.loss(logits, labels.float()), losses.mean())
    found = kind.probabilities(logits)
    torch.testing.assert_close(found, probabilities)
    assert torch.equal(kind.decode(logits), found.argmax(-1))


def test_a_joint_pair_in_both_orders_has_the_prediction_of_the_swapped_pair():
    model = make_model({"sts": "cross"})
    rows = make_data("sts", 5).rows
    options = {"joint": True, "symmetric": True, "max_length": 24}
    found = [
        predict(model, "sts", tokenize(replace(rows, texts=texts), TOKENIZER, **options), PAD)
        for texts in (rows.texts, [text[::-1] for text in rows.texts])
    ]
    np.testing.assert_allclose(*found, rtol=0, atol=1e-5)
    one_order = predict(model, "sts", tokenize(rows, TOKENIZER, joint=True, max_length=24), PAD)
    assert np.abs(one_order - found[0]).max() > 1e-3


def test_binary_threshold_is_the_one_that_the_loss_trains_for():
    """The decoded class is the one with the smaller loss; at logit 0 both cost ln 2, and the answer is 0."""
    kind = TASK_KINDS["binary"]
    for logit in (-30.0, -1e-6, -0.0, 0.0, 1e-6, 30.0):
        logits = torch.tensor([[logit]])
        losses = [kind.loss(logits, torch.tensor([float(label)])).item() for label in (0, 1)]
        assert kind.decode(logits).item() == int(losses[1] < losses[0]), logit


@pytest.mark.parametrize("task", TASKS)
def test_kind_fits_the_tasks_row(task):
    """As many outputs as classes; every label and every decoded value is legal and can be written."""
    spec, kind = TASKS[task], TASK_KINDS[TASKS[task].kind]
    expected = {"sst": 5, "para": 1, "sts": 1, "cfimdb": 2}.get(task, kind.num_outputs(spec))
    assert kind.num_outputs(spec) == expected
    logits = torch.randn(13, expected, generator=torch.Generator().manual_seed(0))
    predictions = kind.decode(logits)
    assert predictions.shape == (13,) and predictions.is_floating_point() != kind.is_discrete
    for value in [*predictions.tolist(), *spec.label_range]:
        assert kind.is_legal(value, spec)
        assert float(kind.text(value)) == float(kind.handout_text(value)) == value
    assert kind.main_score in kind.scores(predictions.numpy(), np.arange(13, dtype=np.float32) % 2)


# --- overall scores -----------------------------------------------------------------------------------------


def test_both_overalls_on_the_posters_result_and_the_choice_among_scores():
    tasks = {task: TASKS[task] for task in ("sst", "para", "sts")}
    scores = {
        "sst": {"accuracy": 0.513, "macro_f1": 0.4},
        "para": {"accuracy": 0.776, "macro_f1": 0.7},
        "sts": {"pearson": 0.655, "spearman": 0.6},
    }
    summary = summarise(scores, tasks)
    assert summary["tasks"] == scores and set(summary) == {"tasks", *OVERALLS}
    # (0.655 + 1) / 2 = 0.8275; the three add up to 2.1165, a third of it is 0.7055, printed as .706.
    expected = {"mean": (0.513 + 0.776 + 0.655) / 3, "mean_2024": 0.7055, "sst": 0.513, "para": 0.776}
    expected["sts"] = 0.655
    chosen = {name: select_score(summary, name, tasks) for name in expected}
    assert chosen == pytest.approx(expected, abs=1e-12)
    alone = summarise({"sts": {"pearson": -0.5, "spearman": 0.1}}, tasks)
    assert alone["mean"] == -0.5 and alone["mean_2024"] == 0.25


# --- prediction files ---------------------------------------------------------------------------------------

# What the course's starter code writes: a tab in the header, commas in the rows, a space on both sides of
# each and before every line's end; "Similiary" is its own spelling. The handout has plain commas and whole
# numbers.
EXPECTED_FILES = {
    ("sst", "starter"): b"id \t Predicted_Sentiment \nab12 , 3 \ncd34 , 0 \n",
    ("para", "starter"): b"id \t Predicted_Is_Paraphrase \nab12 , 1.0 \ncd34 , 0.0 \n",
    ("sts", "starter"): b"id \t Predicted_Similiary \nab12 , 3.25 \ncd34 , -0.5 \n",
    ("sst", "handout"): b"id,Predicted_Sentiment\nab12,3\ncd34,0\n",
    ("para", "handout"): b"id,Predicted_Is_Paraphrase\nab12,1\ncd34,0\n",
    ("sts", "handout"): b"id,Predicted_Similarity\nab12,3.25\ncd34,-0.5\n",
}
VALUES = {"sst": [3, 0], "para": [1, 0], "sts": [3.25, -0.5]}


@pytest.mark.parametrize("style", PREDICTION_STYLES)
@pytest.mark.parametrize("task", VALUES)
def test_prediction_file_byte_for_byte_and_back(tmp_path, task, style):
    path, ids, values = tmp_path / "predictions.csv", ["ab12", "cd34"], VALUES[task]
    for written in (values, np.array(values, dtype=np.float32), np.array(values, dtype=np.float64)):
        path.write_bytes(format_predictions(TASKS[task], ids, written, style).encode())
        assert path.read_bytes() == EXPECTED_FILES[task, style]
    assert read_predictions(path, TASKS[task]) == dict(zip(ids, values, strict=True))
    with pytest.raises(ValueError):  # as many predictions as ids
        format_predictions(TASKS[task], ids, values[:1], style)


def test_a_float32_prediction_comes_back_as_the_same_number():
    text = format_predictions(TASKS["sts"], ["ab"], np.array([0.1], dtype=np.float32), "starter")
    assert float(text.splitlines()[1].split(",")[1]) == np.float32(0.1)


HEADERS = {task: f"id \t {spec.prediction_column} \n" for task, spec in TASKS.items()}
NUMBERS = ("3", "+3", "3.", "3.0", "0.3e1", "30E-1", " 3 ")
GOOD_PREDICTIONS = [
    ("sst", b"id \t Predicted_Sentiment \r\nab , 3 \r\ncd , 0 \r\n", {"ab": 3, "cd": 0}),  # Windows
    ("sst", b"id,Predicted_Sentiment\nab,3.0\ncd,0", {"ab": 3, "cd": 0}),  # no line end
    ("sst", b"id , Predicted_Sentiment\n ab,3\ncd ,0\n", {"ab": 3, "cd": 0}),
    ("sst", b"\xef\xbb\xbfid,Predicted_Sentiment\nab,3\n", {"ab": 3}),  # a byte order mark
    *(("sst", f"{HEADERS['sst']}ab,{text}\n".encode(), {"ab": 3}) for text in NUMBERS),
    # Pearson's r has no scale: a cosine or a logit is as good as a number from 0 to 5.
    ("sts", f"{HEADERS['sts']}ab , -7.5 \ncd , 1e3 \n".encode(), {"ab": -7.5, "cd": 1000}),
]


@pytest.mark.parametrize("task, content, expected", GOOD_PREDICTIONS)
def test_small_differences_in_form_are_read(tmp_path, task, content, expected):
    (tmp_path / "p.csv").write_bytes(content)
    assert read_predictions(tmp_path / "p.csv", TASKS[task]) == expected


ROW = "expected an id, a comma, a number"
# case -> task, what the file holds (after its header, where that begins with a plus), the error.
BAD_PREDICTIONS = {
    "empty": ("sst", "", r":1: header is ''; expected id and Predicted_Sentiment$"),
    "no header": ("sst", "ab , 3 \n", r":1: header is 'ab , 3 '"),
    "other task's header": ("para", "id,Predicted_Sentiment\nab,1\n", r":1: header is .*Is_Paraphrase"),
    "three columns": ("sst", "id,Predicted_Sentiment,more\nab,1,2\n", r":1: header"),
    "huge header": ("sst", "a" * 10**6, r":1: header is 'aaa"),
    "id twice": ("sst", "+ab , 1 \ncd , 2 \nab , 1 \n", r":4: id ab appears twice$"),
    "escapes in an id": ("sst", "+\x1b[2J,3\n\x1b[2J,3\n", r":3: id \?\[2J appears twice"),
    "fraction of a class": ("sst", "+ab , 3.5 \n", r":2: value is 3\.5; .*a whole number from 0 to 4$"),
    "class too high": ("sst", "+ab , 7 \n", r":2: value is 7; expected"),
    "class too low": ("sst", "+ab , -1 \n", r":2: value is -1"),
    "class NaN": ("sst", "+ab , nan \n", r":2: value is nan"),
    "class beyond float": ("para", "+ab , 1e999\n", r":2: value is 1e999; .*from 0 to 1$"),
    "number NaN": ("sts", "+ab , nan \n", r":2: value is nan; expected a finite number$"),
    "number infinite": ("sts", "+ab , 1 \ncd , -inf \n", r":3: value is -inf"),
    "number of 10,000 digits": ("sts", f"+ab , {'9' * 10_000}\n", r":2: value is 9999"),
    "text": ("sts", "+ab , high \n", rf":2: row is 'ab , high '; {ROW}$"),
    "no value": ("sst", "+ab\n", r":2: row is 'ab'"),
    "empty value": ("sst", "+ab , \n", r":2: row"),
    "no id": ("sst", "+ , 3 \n", r":2: row"),
    "too many values": ("sst", "+ab , 3 , 4 \n", r":2: row"),
    "blank line": ("sst", "+ab , 3 \n\ncd , 3 \n", r":3: row"),
    "digits in groups": ("sts", "+ab , 1_0\n", r":2: row is 'ab , 1_0'"),
    "digits of another script": ("sst", "+ab , \u0663\n", r":2: row is"),
    "escapes": ("sst", "+ab\x1b[2J ; 3 \n", r":2: row is 'ab\\x1b\[2J ; 3 '"),
    "huge file": ("sst", b"a" * (2**24 + 1), r": too large; expected at most 16 MiB"),
    "not UTF-8": ("sst", b"id,Predicted_Sentiment\nna\xefve,3\n", r": not UTF-8"),
}


@pytest.mark.parametrize("case", BAD_PREDICTIONS)
def test_bad_prediction_file_raises_and_names_the_line(tmp_path, case):
    task, content, message = BAD_PREDICTIONS[case]
    if isinstance(content, str):
        content = (HEADERS[task] + content[1:] if content.startswith("+") else content).encode()
    (tmp_path / "p.csv").write_bytes(content)
    with pytest.raises(UserError, match=rf"p\.csv{message}") as caught:
        read_predictions(tmp_path / "p.csv", TASKS[task])
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_prediction_file_that_is_no_file(tmp_path, make):
    make(tmp_path / "p.csv")
    with pytest.raises(UserError, match=r"p\.csv: cannot be read .not a regular file"):
        read_predictions(tmp_path / "p.csv", TASKS["sst"])
    with pytest.raises(UserError, match=r"absent\.csv: no such file"):
        read_predictions(tmp_path / "absent.csv", TASKS["sst"])


def test_check_predictions_holds_them_against_the_ids_and_warns_of_collapse(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text(HEADERS["sst"] + "cd , 1 \nab , 3 \n")
    assert check_predictions(path, TASKS["sst"], ["ab", "cd"]) is None  # the order is free
    with pytest.raises(UserError, match=r"p\.csv: 2 of 4 ids have no prediction, the first is x1"):
        check_predictions(path, TASKS["sst"], ["ab", "x1", "cd", "x2"])
    with pytest.raises(UserError, match=r"p\.csv: 1 ids are not in the data, the first is cd"):
        check_predictions(path, TASKS["sst"], ["ab"])
    path.write_text(HEADERS["sst"] + "cd , 3 \nab , 3 \n")
    assert "2 of 2 predictions are 3" in check_predictions(path, TASKS["sst"], ["ab", "cd"])


# --- prediction ---------------------------------------------------------------------------------------------

LETTERS = "abcdefghijklmnop"
HEAD_NAMES = {"sst": "single", "para": "concat", "sts": "diff"}
TOKENIZER = BertTokenizer({piece: i for i, piece in enumerate((*SPECIAL_TOKENS, *LETTERS))})
PAD = TOKENIZER.pad_token_id


def make_model(head_names=None, pooling: str = "mean", **options) -> MultitaskBERT:
    """Random weights, larger than BERT's so that predictions differ clearly; odd sizes catch swapped axes.

    A forward pass in training mode, with a dropout of one half, would be far off.
    """
    torch.manual_seed(0)
    dropout = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    config = make_config(len(TOKENIZER), hidden_size=20, initializer_range=0.3, **dropout)
    head_names = HEAD_NAMES | (head_names or {})
    specs = {task: TASKS[task] for task in head_names}
    return MultitaskBERT(BertModel(config), specs, head_names, pooling=pooling, **options)


def make_data(task: str, num_examples: int = 13, joint: bool = False):
    """Sentences of 1 to 18 letters, some of them in several examples."""
    rng = np.random.default_rng(3)
    sentences = [
        " ".join(rng.choice(list(LETTERS), size=rng.integers(1, 9 if joint else 19))) for _ in range(12)
    ]
    num_sentences = len(TASKS[task].text_columns)
    texts = [tuple(sentences[i] for i in rng.integers(12, size=num_sentences)) for _ in range(num_examples)]
    labels = rng.integers(2, size=num_examples).astype(np.float32)
    rows = Rows(Path("rows.csv"), [f"id{i}" for i in range(num_examples)], texts, labels, [])
    return tokenize(rows, TOKENIZER, joint=joint, max_length=24)


def check_close(logits: np.ndarray, expected: np.ndarray) -> None:
    """To 1e-5, absolute: float32 matrix products of other shapes sum in another order; logits are about 1."""
    assert expected.std(axis=0).max() > 1e-2  # not all the same, so that the comparison can fail
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "task, head, pooling",
    [
        ("sst", "single", "mean"),
        ("para", "concat", "mean"),
        *(("sts", "diff", pooling) for pooling in ("mean", "cls", "pooler")),
        ("sts", "cosine", "mean"),
        *(("sts", "cross", pooling) for pooling in ("mean", "cls")),
    ],
)
def test_predict_matches_forward_on_padded_batches_however_it_cuts_them(task, head, pooling, monkeypatch):
    """All at once, one example alone, and all in many small forward passes; logits show more than classes."""
    kind = TASKS[task].kind
    monkeypatch.setitem(TASK_KINDS, kind, replace(TASK_KINDS[kind], decode=lambda logits: logits))
    model, data = make_model({task: head}, pooling), make_data(task, joint=head == "cross")
    together = predict(model, task, data, PAD)
    alone = [predict(model, task, data.subset(np.array([i])), PAD) for i in range(13)]
    monkeypatch.setitem(evaluation.MAX_EVAL_TOKENS, "cpu", 30)
    monkeypatch.setattr(evaluation, "MAX_EVAL_EXAMPLES", 4)
    in_pieces = predict(model, task, data, PAD)
    model.eval()
    batches = [data.batch(np.arange(start, min(start + 5, 13)), PAD) for start in (0, 5, 10)]
    with torch.no_grad():
        expected = torch.cat([model(task, batch) for batch in batches]).numpy()
    for found in (together, np.concatenate(alone), in_pieces):
        check_close(found, expected)


@pytest.mark.parametrize("training, frozen", [(True, False), (False, False), (True, True)])
def test_predict_restores_the_mode_and_needs_no_gradient(training, frozen):
    model, data = make_model(freeze_encoder=frozen), make_data("sts")
    model.train(training)
    modes = [module.training for module in model.modules()]
    first = predict(model, "sts", data, PAD)
    assert [module.training for module in model.modules()] == modes
    assert model.training == training and model.bert.training == (training and not frozen)
    # Dropout of 0.5 would change a second result; eval mode does not.
    assert np.array_equal(predict(model, "sts", data, PAD), first)
    assert all(p.grad is None for p in model.parameters()) and torch.is_grad_enabled()


def test_lack_of_memory_says_where(monkeypatch):
    model, data = make_model(), make_data("sts")
    monkeypatch.setattr(model, "embed", lambda task, **batch: torch.empty(2**60))
    with pytest.raises(RuntimeError) as caught:
        predict(model, "sts", data, PAD)
    shape = (len(data.sequences.lengths), data.lengths.max())
    assert caught.value.__notes__ == [
        f"predicting sts, batch (sequences, word pieces) ({shape[0]}, {shape[1]})"
    ]
    assert model.training  # as before


@pytest.mark.parametrize("max_tokens", [1, 30, 8192])  # the first forces one sentence a forward pass
def test_each_distinct_sentence_is_encoded_once(monkeypatch, max_tokens):
    model, data = make_model(), make_data("sts", num_examples=40)
    monkeypatch.setitem(evaluation.MAX_EVAL_TOKENS, "cpu", max_tokens)
    seen, shapes = [], []

    def record(module, inputs):
        input_ids, attention_mask = inputs[:2]
        shapes.append(tuple(input_ids.shape))
        seen.extend(
            tuple(ids[mask.bool()].tolist()) for ids, mask in zip(input_ids, attention_mask, strict=True)
        )

    model.bert.register_forward_pre_hook(record)
    predict(model, "sts", data, PAD)
    distinct = {sentence for texts in data.rows.texts for sentence in texts}
    assert len(distinct) < 80  # sentences do come up again
    assert len(seen) == len(set(seen)) == len(distinct)
    assert all(rows == 1 or rows * length <= max_tokens for rows, length in shapes)
    assert len(shapes) == {1: len(distinct), 8192: 1}.get(max_tokens, len(shapes))


def test_evaluate_scores_every_task():
    model = make_model()
    dev_data = {task: make_data(task) for task in HEAD_NAMES}
    summary, predictions = evaluate(model, dev_data, PAD)
    for task, data in dev_data.items():
        kind, found = TASK_KINDS[TASKS[task].kind], predictions[task]
        assert np.array_equal(found, predict(model, task, data, PAD))
        assert found.shape == (13,) and found.dtype == (np.int64 if kind.is_discrete else np.float32)
        assert all(kind.is_legal(value, TASKS[task]) for value in found.tolist())
        assert summary["tasks"][task] == kind.scores(found, data.rows.labels)
    accuracies = [float((predictions[task] == dev_data[task].rows.labels).mean()) for task in ("sst", "para")]
    r = float(np.corrcoef(predictions["sts"], dev_data["sts"].rows.labels)[0, 1])
    assert summary["mean"] == pytest.approx((sum(accuracies) + r) / 3, abs=1e-6)  # float32 predictions
    assert summary["mean_2024"] == pytest.approx((sum(accuracies) + (r + 1) / 2) / 3, abs=1e-6)


@pytest.mark.parametrize("task", HEAD_NAMES)
def test_logits_that_are_not_finite_are_refused_by_the_ids_of_their_examples(monkeypatch, task):
    """Of classes, too, where the largest logit would hide them."""
    model, data = make_model(), make_data(task)
    classify = model.classify

    def spoil(task, *vectors):
        logits = classify(task, *vectors)
        logits[[2, 5, 7, 11], -1] = torch.tensor([math.nan, math.inf, -math.inf, math.nan])
        return logits

    monkeypatch.setattr(model, "classify", spoil)
    expected = (
        f"^{task}: 4 of 13 predictions are not finite, the first for id id2, id5, id7; train with a smal"
    )
    with pytest.raises(UserError, match=expected):
        evaluate(model, {task: data}, PAD)
    assert model.training  # as before
