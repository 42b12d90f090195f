"""BertConfig: what is accepted, read and written. TASKS: the course's names, and rows that fit the tables.

Damaged JSON files of any kind are in tests/support/test_files.py.
"""

import json
from dataclasses import asdict, fields

import pytest

from config import DEFAULT_TASKS, SIZES, SPLITS, TASKS, BertConfig, TaskSpec, course_files
from evaluation import TASK_KINDS
from heads import HEADS, PAIR_HEADS
from support.errors import UserError, quote
from tests.tiny import refusal

# --- BertConfig ---------------------------------------------------------------------------------------------


def test_defaults_are_bert_base_uncased():
    expected = dict(zip(SIZES, (30522, 768, 12, 12, 3072, 512, 2), strict=True))
    expected |= {"hidden_act": "gelu", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    expected |= {"initializer_range": 0.02, "layer_norm_eps": 1e-12, "pad_token_id": 0}
    assert asdict(BertConfig()) == expected


def test_every_size_is_checked():
    assert set(SIZES) == {field.name for field in fields(BertConfig) if field.type is int} - {"pad_token_id"}


WHOLE = "expected a whole number of at least 1"
BAD_VALUES = [
    *((name, value, WHOLE) for name in SIZES for value in (0, 1.0, True, None)),
    *(
        (name, value, "expected a number in [0, 1)")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob")
        for value in (1, -0.1, "0.1", None, True, float("nan"))
    ),
    *(
        (name, value, "expected a number in [0, 1]")
        for name in ("layer_norm_eps", "initializer_range")
        for value in (2, -1e-12, "0.02", float("inf"))
    ),
    *(
        ("pad_token_id", value, "expected a whole number below vocab_size 30522")
        for value in (-1, 30522, 0.0)
    ),
    *(("hidden_act", value, "expected a name such as 'gelu'") for value in (["gelu"], "x" * 61)),
]


@pytest.mark.parametrize(("name", "value", "expected"), BAD_VALUES)
def test_value_out_of_range(name, value, expected):
    assert refusal(lambda: BertConfig(**{name: value})) == f"BertConfig {name} is {quote(value)}; {expected}"


def test_probability_in_range():
    for value in (0, 0.0, 0.5, 0.999):
        assert BertConfig(hidden_dropout_prob=value).hidden_dropout_prob == value


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
    sizes = dict(zip(SIZES, (99, 33, 5, 3, 37, 11, 3), strict=True))
    assert sizes["hidden_size"] == 33 and sizes["num_attention_heads"] == 3
    rest = {"hidden_act": "relu", "hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}
    rest |= {"initializer_range": 0.4, "layer_norm_eps": 1e-5, "pad_token_id": 7}
    config = BertConfig(**sizes, **rest)
    assert all(getattr(config, field.name) != field.default for field in fields(config))
    config.to_json(tmp_path / "config.json")
    assert BertConfig.from_json(tmp_path / "config.json") == config
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "bert" and written["architectures"] == ["BertModel"]


def test_json_keys_that_are_not_sizes_are_left_alone(tmp_path):
    """Nor does a checkpoint older than `model_type` need one."""
    others = {"position_embedding_type": "absolute", "architectures": ["BertForMaskedLM"]}
    others |= {"model_type": "bert", "torch_dtype": "float32", "is_decoder": False}
    others |= dict.fromkeys(("add_cross_attention", "classifier_dropout", "hidden_act", "pad_token_id"))
    for rest in (others, {}):
        assert BertConfig.from_json(write(tmp_path, {"hidden_size": 24} | rest)) == BertConfig(hidden_size=24)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"{'hidden_size': 24}", "not a JSON file"),
        (b'{"hidden_size": ' + b"9" * 4000 + b"}", "hidden_size 99999999"),
        (b'{"layer_norm_eps": 1e400}', "layer_norm_eps is inf; expected a number in [0, 1]"),
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
    found = refusal(BertConfig.from_json, path)
    assert found.startswith(f"{path}: ") and message in found


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
def test_task_reads_the_course_files_and_fits_the_tables(task):
    spec = TASKS[task]
    stem, *others = EXPECTED_TASKS[task]
    names = [f"{stem}-{split}.csv" for split in ("train", "dev", "test-student")]
    assert spec.files == dict(zip(SPLITS, names, strict=True)) and tuple(spec.files) == SPLITS
    assert [spec.text_columns, spec.label_column, spec.label_range, spec.prediction_column] == others
    assert spec.kind in TASK_KINDS and spec.title
    assert spec.is_pair == (len(spec.text_columns) == 2)
    assert spec.default_head in HEADS.keys() & (PAIR_HEADS if spec.is_pair else ("single",))
    num_classes = 0 if spec.kind == "regression" else int(spec.label_range[1]) + 1
    assert len(spec.class_names) == num_classes


def test_a_task_sees_one_sentence_unless_told():
    spec = TaskSpec("t", "binary", course_files("t"), ("a",), "label", (0, 1), "P", "P")
    assert (spec.is_pair, spec.default_head) == (False, "single")
    assert spec.files == {"train": "t-train.csv", "dev": "t-dev.csv", "test": "t-test-student.csv"}
