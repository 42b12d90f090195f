"""BertConfig: what is accepted, read and written. TASKS: the course's names, and rows that fit the tables.

Damaged JSON files of any kind are in tests/support/test_files.py.
"""

import json
from dataclasses import FrozenInstanceError, asdict, fields

import pytest

from config import DEFAULT_TASKS, SIZES, SPLITS, TASKS, BertConfig, TaskSpec, course_files
from evaluation import TASK_KINDS
from heads import HEADS, PAIR_HEADS
from support.errors import UserError, quote

# --- BertConfig ---------------------------------------------------------------------------------------------


def test_defaults_are_bert_base_uncased():
    assert asdict(BertConfig()) == {
        "vocab_size": 30522,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
    }


def test_frozen():
    with pytest.raises(FrozenInstanceError):
        BertConfig().hidden_size = 1


def test_every_size_is_checked():
    assert set(SIZES) == {field.name for field in fields(BertConfig) if field.type is int} - {"pad_token_id"}


WHOLE = "expected a whole number of at least 1"
BAD_VALUES = [
    *((name, value, WHOLE) for name in SIZES for value in (0, 1.0, "12", True, None)),
    *(
        (name, value, "expected a number in [0, 1)")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob")
        for value in (1, 1.5, -0.1, "0.1", None, True, float("nan"))
    ),
    *(
        (name, value, "expected a number in [0, 1]")
        for name in ("layer_norm_eps", "initializer_range")
        for value in (2, -1e-12, "0.02", None, float("nan"), float("inf"))
    ),
    *(
        ("pad_token_id", value, "expected a whole number below vocab_size 30522")
        for value in (-1, 30522, 0.0, "0")
    ),
    ("hidden_act", ["gelu"], "expected a name such as 'gelu'"),
    ("hidden_act", "x" * 61, "expected a name such as 'gelu'"),
]


@pytest.mark.parametrize(("name", "value", "expected"), BAD_VALUES)
def test_value_out_of_range(name, value, expected):
    with pytest.raises(UserError) as caught:
        BertConfig(**{name: value})
    assert str(caught.value) == f"BertConfig {name} is {quote(value)}; {expected}"


@pytest.mark.parametrize("value", [0, 0.0, 0.5, 0.999])
def test_probability_in_range(value):
    config = BertConfig(hidden_dropout_prob=value, attention_probs_dropout_prob=value)
    assert config.hidden_dropout_prob == config.attention_probs_dropout_prob == value


def test_heads_must_share_the_width_out():
    with pytest.raises(UserError, match="hidden_size 768 is not a multiple of num_attention_heads 7"):
        BertConfig(num_attention_heads=7)
    assert BertConfig(hidden_size=35, num_attention_heads=7).hidden_size == 35


# --- config.json --------------------------------------------------------------------------------------------


def write(tmp_path, contents):
    path = tmp_path / "config.json"
    path.write_bytes(contents if isinstance(contents, bytes) else json.dumps(contents).encode())
    return path


def test_json_round_trip(tmp_path):
    config = BertConfig(
        vocab_size=99,
        hidden_size=33,
        num_hidden_layers=5,
        num_attention_heads=3,
        intermediate_size=37,
        max_position_embeddings=11,
        type_vocab_size=3,
        hidden_act="relu",
        hidden_dropout_prob=0.2,
        attention_probs_dropout_prob=0.3,
        initializer_range=0.4,
        layer_norm_eps=1e-5,
        pad_token_id=7,
    )
    assert all(getattr(config, field.name) != field.default for field in fields(config))
    config.to_json(tmp_path / "config.json")
    assert BertConfig.from_json(tmp_path / "config.json") == config
    assert BertConfig.from_json(str(tmp_path / "config.json")) == config
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "bert" and written["architectures"] == ["BertModel"]


def test_json_keys_that_are_not_sizes_are_left_alone(tmp_path):
    path = write(
        tmp_path,
        {
            "hidden_size": 24,
            "model_type": "bert",
            "position_embedding_type": "absolute",
            "architectures": ["BertForMaskedLM"],
            "torch_dtype": "float32",
            "is_decoder": False,
            "add_cross_attention": None,
            "classifier_dropout": None,
            "hidden_act": None,
            "pad_token_id": None,
        },
    )
    assert BertConfig.from_json(path) == BertConfig(hidden_size=24)


def test_json_of_a_checkpoint_older_than_model_type(tmp_path):
    assert BertConfig.from_json(write(tmp_path, {"hidden_size": 24})) == BertConfig(hidden_size=24)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"{'hidden_size': 24}", "not a JSON file"),
        (b'{"hidden_size": ' + b"9" * 4000 + b"}", "hidden_size 99999999"),
        (b'{"layer_norm_eps": 1e400}', "layer_norm_eps is inf; expected a number in [0, 1]"),
        (b'{"hidden_dropout_prob": NaN}', "hidden_dropout_prob is nan; expected a number in [0, 1)"),
        ({"hidden_size": 25}, "hidden_size 25 is not a multiple of num_attention_heads 12"),
        ({"model_type": "roberta"}, "model_type is 'roberta'; only 'bert' can be loaded"),
        ({"model_type": "\x1b[31m\u202e"}, r"model_type is '\x1b[31m\u202e'; only 'bert'"),
        ({"is_decoder": True}, "is_decoder is True; expected false"),
        ({"add_cross_attention": 1}, "add_cross_attention is 1; expected false"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'; expected"),
        (
            {"architectures": ["BertModel", "Other"]},
            "architectures is ['BertModel', 'Other']; expected names",
        ),
        ({"architectures": "BertModel"}, "architectures is 'BertModel'; expected names such as 'BertModel'"),
        ({"architectures": [1]}, "architectures is [1]; expected names"),
    ],
)
def test_json_that_is_refused(tmp_path, contents, message):
    path = write(tmp_path, contents)
    with pytest.raises(UserError) as caught:
        BertConfig.from_json(path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


# --- tasks --------------------------------------------------------------------------------------------------

# As the course names them: stem of the files, text columns, label column and range, column of the
# predictions.
PAIR = ("sentence1", "sentence2")
EXPECTED_TASKS = {
    "sst": ("ids-sst", ("sentence",), "sentiment", (0, 4), "Predicted_Sentiment"),
    "para": ("quora", PAIR, "is_duplicate", (0, 1), "Predicted_Is_Paraphrase"),
    "sts": ("sts", PAIR, "similarity", (0, 5), "Predicted_Similiary"),
    "cfimdb": ("ids-cfimdb", ("sentence",), "sentiment", (0, 1), "Predicted_Sentiment"),
}


def test_every_task_is_expected():
    assert TASKS.keys() == EXPECTED_TASKS.keys()
    assert DEFAULT_TASKS == ("sst", "para", "sts")


@pytest.mark.parametrize("task", TASKS)
def test_task_reads_the_course_files(task):
    spec = TASKS[task]
    stem, *others = EXPECTED_TASKS[task]
    names = [f"{stem}-{split}.csv" for split in ("train", "dev", "test-student")]
    assert spec.files == dict(zip(SPLITS, names, strict=True))
    found = [spec.text_columns, spec.label_column, spec.label_range, spec.prediction_column]
    assert found == others


@pytest.mark.parametrize("task", TASKS)
def test_task_fits_the_tables(task):
    spec = TASKS[task]
    assert spec.kind in TASK_KINDS
    assert tuple(spec.files) == SPLITS
    assert spec.is_pair == (len(spec.text_columns) == 2)
    assert spec.default_head in (PAIR_HEADS if spec.is_pair else ("single",))
    assert spec.default_head in HEADS
    assert spec.title
    num_classes = 0 if spec.kind == "regression" else int(spec.label_range[1]) + 1
    assert len(spec.class_names) == num_classes


def test_a_task_sees_one_sentence_unless_told():
    spec = TaskSpec("t", "binary", course_files("t"), ("a",), "label", (0, 1), "P", "P")
    assert (spec.is_pair, spec.default_head) == (False, "single")
    assert spec.files == {"train": "t-train.csv", "dev": "t-dev.csv", "test": "t-test-student.csv"}
