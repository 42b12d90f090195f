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
from config import TASKS, BertConfig
from datasets import Rows, tokenize
from evaluation import (
    OVERALLS,
    PREDICTION_STYLES,
    TASK_KINDS,
    check_predictions,
    class_scores,
    collapse_warning,
    correlation_scores,
    evaluate,
    format_predictions,
    is_class,
    majority_baseline,
    pearson,
    predict,
    read_predictions,
    score_warnings,
    select_score,
    spearman,
    summarise,
)
from heads import MultitaskBERT
from support.errors import UserError
from support.files import write_text
from tokenizer import SPECIAL_TOKENS, BertTokenizer

# --- scores -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
def test_correlations_equal_scipy(ties):
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


def test_correlations_by_hand():
    """(1, 2, 3) with (1, 3, 2): centred products 1 + 0 + 0, squares 2 and 2. A monotone curve has rho 1."""
    assert pearson([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5, abs=1e-12)
    x = np.array([0.0, 1.0, 2.0, 3.0])
    assert spearman(x, np.exp(x)) == pytest.approx(1, abs=1e-12) and pearson(x, np.exp(x)) < 0.95
    assert pearson(x, -2 * x + 7) == pytest.approx(-1, abs=1e-12)


def test_correlation_does_not_depend_on_scale_or_offset():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 50))
    assert pearson(1e6 * x - 3, 1e-6 * y + 5) == pytest.approx(pearson(x, y), abs=1e-9)  # digits lost to + 5


@pytest.mark.parametrize("correlation", [pearson, spearman])
def test_correlation_with_a_constant_is_zero(correlation):
    x = np.array([1.0, 2.0, 4.0])
    assert correlation(np.full(3, 2.5), x) == 0 and correlation(x, np.full(3, 2.5)) == 0
    assert correlation(np.zeros(3), np.zeros(3)) == 0
    assert correlation([0.1] * 3, x) == 0 and correlation([0.1] * 3, [0.1] * 3) == 0  # a mean that rounds


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("correlation", [pearson, spearman])
def test_correlation_with_a_number_that_is_not_finite_is_no_score(correlation, bad):
    """0 would be better than a negative r. Ranks of infinite numbers are ranks, though."""
    x, y = [1, 2, bad, 4], [4.0, 3.0, 2.0, 1.0]
    for found in (correlation(x, y), correlation(y, x)):
        assert found < 0 if correlation is spearman and math.isinf(bad) else math.isnan(found)
    if correlation is pearson:  # constant but for it, or nothing else
        assert math.isnan(pearson([1, 1, bad], y[:3])) and math.isnan(pearson([bad] * 3, y[:3]))


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e160, 1e300])
def test_pearson_of_very_small_and_very_large_numbers(scale):
    """Their squares are 0 or infinite in float64; the correlation is not."""
    x, y = np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0])
    assert pearson(scale * x, y) == pytest.approx(0.5, abs=1e-12)
    assert pearson(x, -scale * y) == pytest.approx(-0.5, abs=1e-12)


def test_pearson_does_not_leave_its_range():
    rng = np.random.default_rng(0)
    for x in rng.normal(size=(200, 9)):
        assert pearson(x, 3 * x) <= 1 and pearson(x, -3 * x) >= -1


def test_class_scores_by_hand():
    """Class 0: precision 2/3, recall 1, F1 0.8. Class 1: precision 1, recall 1/3, F1 0.5. Class 2: F1 0."""
    scores = class_scores(np.array([0, 0, 0, 1, 2, 1]), np.array([0, 0, 1, 1, 1, 2]))
    expected_f1 = (0.8 + 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3) + 0) / 3
    assert scores == pytest.approx({"accuracy": 0.5, "macro_f1": expected_f1}, abs=1e-12)


def test_correlation_scores_name_both():
    scores = correlation_scores(np.array([1.0, 2.0, 30.0]), np.array([0.0, 1.0, 2.0], dtype=np.float32))
    assert scores["spearman"] == pytest.approx(1, abs=1e-12)
    assert scores["pearson"] == pytest.approx(29 / math.sqrt(2 * (1 + 4 + 900 - 3 * 11**2)), abs=1e-12)


def test_baselines_by_hand():
    assert majority_baseline(np.array([1, 0, 1, 2, 1], dtype=np.float32)) == 0.6
    assert TASK_KINDS["regression"].baseline(np.array([1.0, 2.0])) == 0


def test_score_no_better_than_the_baseline_is_warned_about():
    labels, predictions = np.array([0, 1, 1, 0]), np.array([1, 1, 0, 0])
    assert score_warnings("para", TASKS["para"], {"accuracy": 0.5}, predictions, labels) == [
        "para is no better than the majority baseline"
    ]
    assert score_warnings("para", TASKS["para"], {"accuracy": 0.51}, predictions, labels) == []
    (said,) = score_warnings("sts", TASKS["sts"], {"pearson": math.nan}, predictions * 5.0, labels)
    assert said == "sts is no better than the constant baseline"


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


def test_every_kind_has_a_hand_worked_row():
    assert set(HAND_KINDS) == set(TASK_KINDS) and {spec.kind for spec in TASKS.values()} <= set(TASK_KINDS)


@pytest.mark.parametrize("kind", HAND_KINDS)
def test_loss_and_decode_by_hand(kind):
    logits, labels, expected_loss, expected = HAND_KINDS[kind]
    logits, labels = torch.tensor(logits, dtype=torch.float32), torch.tensor(labels, dtype=torch.float32)
    loss = TASK_KINDS[kind].loss(logits, labels)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-6)  # float32
    assert TASK_KINDS[kind].decode(logits).tolist() == expected


@pytest.mark.parametrize("kind", HAND_KINDS)
def test_loss_is_a_mean_over_the_batch(kind):
    """Twice the batch, the same loss; and a batch of one works."""
    logits, labels, expected_loss, _ = HAND_KINDS[kind]
    logits, labels = torch.tensor(logits, dtype=torch.float32), torch.tensor(labels, dtype=torch.float32)
    loss = TASK_KINDS[kind].loss(torch.cat([logits, logits]), torch.cat([labels, labels]))
    assert loss.item() == pytest.approx(expected_loss, rel=1e-6)  # float32
    alone = [TASK_KINDS[kind].loss(logits[i : i + 1], labels[i : i + 1]).item() for i in range(len(labels))]
    assert sum(alone) / len(alone) == pytest.approx(expected_loss, rel=1e-6)


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


def test_binary_threshold_is_the_one_that_the_loss_trains_for():
    """The decoded class is the one with the smaller loss; at logit 0 both cost ln 2, and the answer is 0."""
    kind = TASK_KINDS["binary"]
    for logit in (-30.0, -1.0, -1e-6, 0.0, 1e-6, 1.0, 30.0):
        logits = torch.tensor([[logit]])
        losses = [kind.loss(logits, torch.tensor([float(label)])).item() for label in (0, 1)]
        assert kind.decode(logits).item() == int(losses[1] < losses[0]), logit
    assert kind.decode(torch.tensor([[-0.0]])).item() == 0


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
    scores = kind.scores(predictions.numpy(), np.arange(13, dtype=np.float32) % 2)
    assert kind.main_score in scores


# --- overall scores -----------------------------------------------------------------------------------------

POSTER_TASKS = {task: TASKS[task] for task in ("sst", "para", "sts")}
POSTER_SCORES = {
    "sst": {"accuracy": 0.513, "macro_f1": 0.4},
    "para": {"accuracy": 0.776, "macro_f1": 0.7},
    "sts": {"pearson": 0.655, "spearman": 0.6},
}


def test_both_overalls_on_the_posters_result():
    summary = summarise(POSTER_SCORES, POSTER_TASKS)
    assert set(OVERALLS) == {"mean", "mean_2024"}
    assert summary["tasks"] == POSTER_SCORES
    assert summary["mean"] == pytest.approx((0.513 + 0.776 + 0.655) / 3, abs=1e-12)
    assert round(summary["mean"], 3) == 0.648
    # (0.655 + 1) / 2 = 0.8275; the three add up to 2.1165, a third of it is 0.7055, printed as .706.
    assert summary["mean_2024"] == pytest.approx(0.7055, abs=1e-12)


def test_select_score():
    summary = summarise(POSTER_SCORES, POSTER_TASKS)
    chosen = {
        name: select_score(summary, name, POSTER_TASKS) for name in ("mean", "mean_2024", *POSTER_TASKS)
    }
    assert chosen == {
        "mean": summary["mean"],
        "mean_2024": summary["mean_2024"],
        "sst": 0.513,
        "para": 0.776,
        "sts": 0.655,
    }


def test_overalls_of_a_single_task():
    sts = {"sts": TASKS["sts"]}
    summary = summarise({"sts": {"pearson": -0.5, "spearman": 0.1}}, sts)
    assert summary["mean"] == -0.5 and summary["mean_2024"] == 0.25


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


@pytest.mark.parametrize("task, style", EXPECTED_FILES)
def test_prediction_file_byte_for_byte_and_back(tmp_path, task, style):
    path = tmp_path / "predictions.csv"
    write_text(path, format_predictions(TASKS[task], ["ab12", "cd34"], VALUES[task], style))
    assert path.read_bytes() == EXPECTED_FILES[task, style]
    assert read_predictions(path, TASKS[task]) == dict(zip(["ab12", "cd34"], VALUES[task], strict=True))


def test_every_style_has_expected_files():
    assert {style for _, style in EXPECTED_FILES} == set(PREDICTION_STYLES)


def test_numpy_predictions_are_written_like_plain_numbers():
    text = format_predictions(TASKS["sts"], ["ab"], np.array([0.1], dtype=np.float32), "starter")
    assert float(text.splitlines()[1].split(",")[1]) == np.float32(0.1)
    assert "np." not in text
    assert (
        format_predictions(TASKS["sst"], ["ab"], np.array([2]), "handout") == "id,Predicted_Sentiment\nab,2\n"
    )


def test_as_many_predictions_as_ids():
    for style in PREDICTION_STYLES:
        with pytest.raises(ValueError):
            format_predictions(TASKS["sst"], ["ab", "cd"], [1], style)


@pytest.mark.parametrize(
    "content",
    [
        b"id \t Predicted_Sentiment \r\nab , 3 \r\ncd , 0 \r\n",  # Windows
        b"id,Predicted_Sentiment\nab,3.0\ncd,0",  # no line end
        b"id , Predicted_Sentiment\n ab,3\ncd ,0\n",
        b"\xef\xbb\xbfid,Predicted_Sentiment\nab,3\ncd,0\n",  # a byte order mark
    ],
)
def test_small_differences_in_form_are_read(tmp_path, content):
    (tmp_path / "sst.csv").write_bytes(content)
    assert read_predictions(tmp_path / "sst.csv", TASKS["sst"]) == {"ab": 3, "cd": 0}


HEADERS = {task: f"id \t {spec.prediction_column} \n" for task, spec in TASKS.items()}
ROW = "expected an id, a comma, a number"
# case -> task, what the file holds, the error.
BAD_PREDICTIONS = {
    "empty": ("sst", "", r"p\.csv:1: header is ''; expected id and Predicted_Sentiment$"),
    "no header": ("sst", "ab , 3 \n", r"p\.csv:1: header is 'ab , 3 '"),
    "other task's header": ("para", "id,Predicted_Sentiment\nab,1\n", r"p\.csv:1: header is .*Is_Paraphrase"),
    "three columns": ("sst", "id,Predicted_Sentiment,more\nab,1,2\n", r"p\.csv:1: header"),
    "huge header": ("sst", "a" * 10**6, r"p\.csv:1: header is 'aaa"),
    "id twice": ("sst", "HEADER" + "ab , 1 \ncd , 2 \nab , 1 \n", r"p\.csv:4: id ab appears twice$"),
    "escapes in an id": ("sst", "HEADER" + "\x1b[2J,3\n" * 2, r"p\.csv:3: id \?\[2J appears twice"),
    "fraction of a class": (
        "sst",
        "HEADERab , 3.5 \n",
        r"p\.csv:2: value is 3\.5; .*a whole number from 0 to 4$",
    ),
    "class too high": ("sst", "HEADERab , 7 \n", r"p\.csv:2: value is 7; expected"),
    "class too low": ("sst", "HEADERab , -1 \n", r"p\.csv:2: value is -1"),
    "class NaN": ("sst", "HEADERab , nan \n", r"p\.csv:2: value is nan"),
    "class beyond float": ("para", "HEADERab , 1e999\n", r"p\.csv:2: value is 1e999; .*from 0 to 1$"),
    "number NaN": ("sts", "HEADERab , nan \n", r"p\.csv:2: value is nan; expected a finite number$"),
    "number infinite": ("sts", "HEADERab , 1 \ncd , -inf \n", r"p\.csv:3: value is -inf"),
    "number of 10,000 digits": ("sts", "HEADERab , " + "9" * 10_000 + "\n", r"p\.csv:2: value is 9999"),
    "text": ("sts", "HEADERab , high \n", rf"p\.csv:2: row is 'ab , high '; {ROW}$"),
    "no value": ("sst", "HEADERab\n", r"p\.csv:2: row is 'ab'"),
    "empty value": ("sst", "HEADERab , \n", r"p\.csv:2: row"),
    "no id": ("sst", "HEADER , 3 \n", r"p\.csv:2: row"),
    "too many values": ("sst", "HEADERab , 3 , 4 \n", r"p\.csv:2: row"),
    "blank line": ("sst", "HEADERab , 3 \n\ncd , 3 \n", r"p\.csv:3: row"),
    "digits in groups": ("sts", "HEADERab , 1_0\n", r"p\.csv:2: row is 'ab , 1_0'"),
    "digits of another script": ("sst", "HEADERab , \u0663\n", r"p\.csv:2: row is"),
    "escapes": ("sst", "HEADERab\x1b[2J ; 3 \n", r"p\.csv:2: row is 'ab\\x1b\[2J ; 3 '"),
    "huge field": ("sst", "HEADER" + "a" * 10**6 + " , x\n", r"p\.csv:2: row is 'aaa"),
    "huge file": ("sst", b"a" * (2**24 + 1), r"p\.csv: too large; expected at most 16 MiB"),
    "not UTF-8": ("sst", b"id,Predicted_Sentiment\nna\xefve,3\n", r"p\.csv: not UTF-8"),
}


@pytest.mark.parametrize("case", BAD_PREDICTIONS)
def test_bad_prediction_file_raises_and_names_the_line(tmp_path, case):
    task, content, message = BAD_PREDICTIONS[case]
    path = tmp_path / "p.csv"
    if isinstance(content, str):
        content = content.replace("HEADER", HEADERS[task]).encode()
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_predictions(path, TASKS[task])
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_prediction_file_that_is_no_file(tmp_path, make):
    make(tmp_path / "p.csv")
    with pytest.raises(UserError, match=r"p\.csv: cannot be read .not a regular file"):
        read_predictions(tmp_path / "p.csv", TASKS["sst"])
    with pytest.raises(UserError, match=r"absent\.csv: no such file"):
        read_predictions(tmp_path / "absent.csv", TASKS["sst"])


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e308, -1, 5, 0.5])
def test_what_is_no_class(value):
    assert not is_class(value, TASKS["sst"])


@pytest.mark.parametrize("text", ["3", "+3", "3.", "3.0", "0.3e1", "30E-1", " 3 "])
def test_numbers_in_other_forms(tmp_path, text):
    (tmp_path / "p.csv").write_text(f"{HEADERS['sst']}ab,{text}\n")
    assert read_predictions(tmp_path / "p.csv", TASKS["sst"]) == {"ab": 3}


def test_similarity_may_be_on_any_scale(tmp_path):
    """Pearson's r has none: a cosine or a logit is as good as a number from 0 to 5."""
    (tmp_path / "p.csv").write_text(HEADERS["sts"] + "ab , -7.5 \ncd , 1e3 \n")
    assert read_predictions(tmp_path / "p.csv", TASKS["sts"]) == {"ab": -7.5, "cd": 1000}


def test_check_predictions_holds_them_against_the_ids(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text(HEADERS["sst"] + "cd , 1 \nab , 3 \n")
    assert check_predictions(path, TASKS["sst"], ["ab", "cd"]) is None  # the order is free
    with pytest.raises(UserError, match=r"p\.csv: 2 of 4 ids have no prediction, the first is x1"):
        check_predictions(path, TASKS["sst"], ["ab", "x1", "cd", "x2"])
    with pytest.raises(UserError, match=r"p\.csv: 1 ids are not in the data, the first is cd"):
        check_predictions(path, TASKS["sst"], ["ab"])


def test_check_predictions_warns_of_collapse(tmp_path):
    path, ids = tmp_path / "p.csv", [f"id{i}" for i in range(30)]
    write_text(path, format_predictions(TASKS["sst"], ids, [3] * 30, "starter"))
    assert "30 of 30 predictions are 3" in check_predictions(path, TASKS["sst"], ids)


def test_collapse_warning():
    """From 95 % equal predictions on; a single prediction proves nothing."""
    spec = TASKS["sst"]
    assert "95 of 100 predictions are 2" in collapse_warning([2] * 95 + [1] * 5, spec)
    assert collapse_warning([2] * 94 + [1] * 6, spec) is None
    assert "2 of 2" in collapse_warning([0, 0], spec)
    assert collapse_warning([0], spec) is None and collapse_warning([], spec) is None
    assert collapse_warning(np.linspace(0, 5, 40).tolist(), TASKS["sts"]) is None
    assert "between 2.5 and 2.54" in collapse_warning([2.5, 2.54] * 20, TASKS["sts"])  # 1 % of 0 to 5 is 0.05
    assert collapse_warning([2.5, 2.56] * 20, TASKS["sts"]) is None


# --- prediction ---------------------------------------------------------------------------------------------

LETTERS = "abcdefghijklmnop"
HEAD_NAMES = {"sst": "single", "para": "concat", "sts": "diff"}


@pytest.fixture
def tokenizer():
    return BertTokenizer({piece: i for i, piece in enumerate((*SPECIAL_TOKENS, *LETTERS))})


def make_model(tokenizer, head_names=None, pooling: str = "mean", **options) -> MultitaskBERT:
    """Random weights, larger than BERT's so that predictions differ clearly; odd sizes catch swapped axes."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=37,
        max_position_embeddings=24,
        initializer_range=0.3,
        hidden_dropout_prob=0.5,  # a forward pass in training mode would be far off
        attention_probs_dropout_prob=0.5,
    )
    head_names = HEAD_NAMES | (head_names or {})
    specs = {task: TASKS[task] for task in head_names}
    return MultitaskBERT(BertModel(config), specs, head_names, pooling=pooling, **options)


def make_data(tokenizer, task: str, num_examples: int = 13, joint: bool = False):
    """Sentences of 1 to 18 letters, some of them in several examples."""
    rng = np.random.default_rng(3)
    sentences = [
        " ".join(rng.choice(list(LETTERS), size=rng.integers(1, 9 if joint else 19))) for _ in range(12)
    ]
    num_sentences = len(TASKS[task].text_columns)
    texts = [tuple(sentences[i] for i in rng.integers(12, size=num_sentences)) for _ in range(num_examples)]
    labels = rng.integers(2, size=num_examples).astype(np.float32)
    rows = Rows(Path("rows.csv"), [f"id{i}" for i in range(num_examples)], texts, labels, [])
    return tokenize(rows, tokenizer, joint=joint, max_length=24)


SETTINGS = {  # task, head, pooling
    "single, mean": ("sst", "single", "mean"),
    "concat, mean": ("para", "concat", "mean"),
    "diff, mean": ("sts", "diff", "mean"),
    "diff, cls": ("sts", "diff", "cls"),
    "diff, pooler": ("sts", "diff", "pooler"),
    "cosine, mean": ("sts", "cosine", "mean"),
    "cross, mean": ("sts", "cross", "mean"),
    "cross, cls": ("sts", "cross", "cls"),
}


@pytest.fixture(params=SETTINGS.values(), ids=SETTINGS)
def setting(request, tokenizer, monkeypatch):
    """(task, model, data) for each kind of head and pooling; `predict` gives logits: they show more."""
    task, head, pooling = request.param
    kind = TASKS[task].kind
    monkeypatch.setitem(TASK_KINDS, kind, replace(TASK_KINDS[kind], decode=lambda logits: logits))
    data = make_data(tokenizer, task, joint=head == "cross")
    return task, make_model(tokenizer, {task: head}, pooling), data


def check_close(logits: np.ndarray, expected: np.ndarray) -> None:
    """To 1e-5, absolute: float32 matrix products of other shapes sum in another order; logits are about 1."""
    assert expected.std(axis=0).max() > 1e-2  # not all the same, so that the comparison can fail
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


def test_predict_matches_forward_on_padded_batches(setting, tokenizer):
    task, model, data = setting
    logits = predict(model, task, data, tokenizer.pad_token_id)
    model.eval()
    batches = [
        data.batch(np.arange(start, min(start + 5, 13)), tokenizer.pad_token_id) for start in (0, 5, 10)
    ]
    with torch.no_grad():
        expected = torch.cat([model(task, batch) for batch in batches]).numpy()
    check_close(logits, expected)


def test_prediction_does_not_depend_on_the_rest_of_the_batch(setting, tokenizer, monkeypatch):
    """One example alone, all at once, and all in many small forward passes."""
    task, model, data = setting
    together = predict(model, task, data, tokenizer.pad_token_id)
    alone = [predict(model, task, data.subset(np.array([i])), tokenizer.pad_token_id) for i in range(13)]
    check_close(np.concatenate(alone), together)
    monkeypatch.setattr(evaluation, "MAX_EVAL_TOKENS", 30)
    monkeypatch.setattr(evaluation, "MAX_EVAL_EXAMPLES", 4)
    check_close(predict(model, task, data, tokenizer.pad_token_id), together)


@pytest.mark.parametrize("task", HEAD_NAMES)
def test_predictions_are_decoded(tokenizer, task):
    model, data = make_model(tokenizer), make_data(tokenizer, task)
    predictions = predict(model, task, data, tokenizer.pad_token_id)
    kind = TASK_KINDS[TASKS[task].kind]
    assert predictions.shape == (13,) and predictions.dtype == (np.int64 if kind.is_discrete else np.float32)
    assert all(kind.is_legal(value, TASKS[task]) for value in predictions.tolist())


@pytest.mark.parametrize("training", [True, False])
def test_predict_restores_the_mode_and_needs_no_gradient(tokenizer, training):
    model, data = make_model(tokenizer), make_data(tokenizer, "sts")
    model.train(training)
    first = predict(model, "sts", data, tokenizer.pad_token_id)
    assert all(module.training == training for module in model.modules())
    # Dropout of 0.5 would change a second result; eval mode does not.
    assert np.array_equal(predict(model, "sts", data, tokenizer.pad_token_id), first)
    assert all(p.grad is None for p in model.parameters()) and torch.is_grad_enabled()


def test_lack_of_memory_says_where(tokenizer, monkeypatch):
    model, data = make_model(tokenizer), make_data(tokenizer, "sts")
    monkeypatch.setattr(model, "embed", lambda **batch: torch.empty(2**60))
    with pytest.raises(RuntimeError) as caught:
        predict(model, "sts", data, tokenizer.pad_token_id)
    num_sentences = len(data.sequences.lengths)
    assert caught.value.__notes__ == [
        f"predicting sts, batch (sequences, word pieces) ({num_sentences}, {data.lengths.max()})"
    ]
    assert model.training  # as before


def test_predict_keeps_a_frozen_encoder_in_eval_mode(tokenizer):
    model, data = make_model(tokenizer, freeze_encoder=True), make_data(tokenizer, "sts")
    model.train()
    predict(model, "sts", data, tokenizer.pad_token_id)
    assert model.training and model.heads.training and not model.bert.training


@pytest.mark.parametrize("max_tokens", [1, 30, 8192])  # the first forces one sentence a forward pass
def test_each_distinct_sentence_is_encoded_once(tokenizer, monkeypatch, max_tokens):
    model, data = make_model(tokenizer), make_data(tokenizer, "sts", num_examples=40)
    monkeypatch.setattr(evaluation, "MAX_EVAL_TOKENS", max_tokens)
    seen, shapes = [], []

    def record(module, inputs):
        input_ids, attention_mask = inputs[:2]
        shapes.append(tuple(input_ids.shape))
        seen.extend(
            tuple(ids[mask.bool()].tolist()) for ids, mask in zip(input_ids, attention_mask, strict=True)
        )

    model.bert.register_forward_pre_hook(record)
    predict(model, "sts", data, tokenizer.pad_token_id)
    distinct = {sentence for texts in data.rows.texts for sentence in texts}
    assert len(distinct) < 80  # sentences do come up again
    assert len(seen) == len(set(seen)) == len(distinct)
    assert all(rows == 1 or rows * length <= max_tokens for rows, length in shapes)
    assert len(shapes) == {1: len(distinct), 8192: 1}.get(max_tokens, len(shapes))


def test_evaluate_scores_every_task(tokenizer):
    model = make_model(tokenizer)
    dev_data = {task: make_data(tokenizer, task) for task in HEAD_NAMES}
    summary, predictions = evaluate(model, dev_data, tokenizer.pad_token_id)
    for task, data in dev_data.items():
        expected = predict(model, task, data, tokenizer.pad_token_id)
        assert np.array_equal(predictions[task], expected)
        kind = TASK_KINDS[TASKS[task].kind]
        assert summary["tasks"][task] == kind.scores(expected, data.rows.labels)
    accuracies = [float((predictions[task] == dev_data[task].rows.labels).mean()) for task in ("sst", "para")]
    r = float(np.corrcoef(predictions["sts"], dev_data["sts"].rows.labels)[0, 1])
    assert summary["mean"] == pytest.approx((sum(accuracies) + r) / 3, abs=1e-6)  # float32 predictions
    assert summary["mean_2024"] == pytest.approx((sum(accuracies) + (r + 1) / 2) / 3, abs=1e-6)


@pytest.mark.parametrize("task", HEAD_NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused_by_the_ids_of_their_examples(
    tokenizer, monkeypatch, task, bad
):
    """Of classes, too, where the largest logit would hide them."""
    model, data = make_model(tokenizer), make_data(tokenizer, task)
    classify = model.classify

    def spoil(task, *vectors):
        logits = classify(task, *vectors)
        logits[[2, 5, 7, 11], -1] = bad
        return logits

    monkeypatch.setattr(model, "classify", spoil)
    expected = (
        f"^{task}: 4 of 13 predictions are not finite, the first for id id2, id5, id7; train with a smal"
    )
    for judge in (lambda: predict(model, task, data, 0), lambda: evaluate(model, {task: data}, 0)):
        with pytest.raises(UserError, match=expected):
            judge()
    assert model.training  # as before
