"""The size of a BERT: what is accepted, read and written. The tasks: each row fits the tables it names."""

import json
import os
from dataclasses import FrozenInstanceError, asdict, fields

import pytest

from config import DEFAULT_TASKS, SIZES, SPLITS, TASKS, BertConfig, TaskSpec, course_files
from evaluation import TASK_KINDS
from heads import HEADS, PAIR_HEADS
from support.errors import UserError, one_line, quote

# --- BertConfig --------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("value", [0, -1, 1.0, "12", True, None, [12]])
@pytest.mark.parametrize("name", SIZES)
def test_size_out_of_range(name, value):
    with pytest.raises(UserError) as caught:
        BertConfig(**{name: value})
    assert str(caught.value) == f"BertConfig {name} is {value!r}; expected a whole number of at least 1"


@pytest.mark.parametrize("value", [1, 1.0, 1.5, -0.1, "0.1", None, True, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_probability_out_of_range(name, value):
    with pytest.raises(UserError) as caught:
        BertConfig(**{name: value})
    assert str(caught.value) == f"BertConfig {name} is {value!r}; expected a number in [0, 1)"


@pytest.mark.parametrize("value", [0, 0.0, 0.5, 0.999])
def test_probability_in_range(value):
    config = BertConfig(hidden_dropout_prob=value, attention_probs_dropout_prob=value)
    assert config.hidden_dropout_prob == config.attention_probs_dropout_prob == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layer_norm_eps", "1e-12"),
        ("layer_norm_eps", -1e-12),
        ("layer_norm_eps", float("nan")),
        ("layer_norm_eps", None),
        ("initializer_range", "0.02"),
        ("initializer_range", -0.02),
        ("initializer_range", 1e300),
        ("layer_norm_eps", 2),
        ("initializer_range", float("inf")),
        ("pad_token_id", -1),
        ("pad_token_id", 30522),
        ("pad_token_id", 0.0),
        ("pad_token_id", "0"),
        ("hidden_act", ["gelu"]),
    ],
)
def test_other_values_out_of_range(name, value):
    with pytest.raises(UserError, match=f"^BertConfig {name} is "):
        BertConfig(**{name: value})


def test_heads_must_share_the_width_out():
    with pytest.raises(UserError, match="hidden_size 768 is not a multiple of num_attention_heads 7"):
        BertConfig(num_attention_heads=7)
    assert BertConfig(hidden_size=35, num_attention_heads=7).hidden_size == 35


def test_user_error_is_a_value_error():
    assert issubclass(UserError, ValueError)


# --- config.json -------------------------------------------------------------------------------------------------


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
        (b"", "not a JSON file"),
        (b"{'hidden_size': 24}", "not a JSON file"),
        (b'{"hidden_size": 24', "not a JSON file"),
        (b'\xff{"hidden_size": 24}', "not a JSON file"),
        (b"[" * 100_000, "not a JSON file"),
        (b"[]", "expected a JSON object, found list"),
        (b"null", "expected a JSON object, found NoneType"),
        (
            b'{"hidden_size": 24, "hidden_size": 36}',
            "not a JSON file (the key 'hidden_size' stands there twice)",
        ),
        (b'{"a": [{"b": 1, "b": 1}]}', "not a JSON file (the key 'b' stands there twice)"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "not a JSON file (Exceeds the limit"),
        (b'{"hidden_size": ' + b"9" * 4000 + b"}", "hidden_size 99999999"),
        (b'{"layer_norm_eps": 1e400}', "layer_norm_eps is inf; expected a number in [0, 1]"),
        (b'{"hidden_size": true}', "hidden_size is True; expected a whole number"),
        (b" " * 2**24 + b"{}", "too large; expected at most 16 MiB"),
        ({"hidden_act": "x" * 99}, "hidden_act is 'xxxx"),
        ({"model_type": "\x1b[31m\u202e"}, r"model_type is '\x1b[31m\u202e'; only 'bert'"),
        ({"model_type": [[["bert"]]]}, "model_type is [[[...]]]; only 'bert'"),
        ({"is_decoder": True}, "is_decoder is True; expected false"),
        ({"add_cross_attention": 1}, "add_cross_attention is 1; expected false"),
        (
            {"architectures": ["RobertaModel"]},
            "architectures is ['RobertaModel']; expected names such as 'BertModel'",
        ),
        ({"architectures": {}}, "architectures is {}; expected names"),
        ({"architectures": [1]}, "architectures is [1]; expected names"),
        ({"model_type": "roberta"}, "model_type is 'roberta'; only 'bert' can be loaded"),
        ({"model_type": "distilbert"}, "model_type is 'distilbert'; only 'bert' can be loaded"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"hidden_size": "24"}, "hidden_size is '24'; expected a whole number"),
        ({"hidden_size": 24.0}, "hidden_size is 24.0; expected a whole number"),
        ({"hidden_size": 25}, "hidden_size 25 is not a multiple of num_attention_heads 12"),
        (b'{"hidden_dropout_prob": NaN}', "hidden_dropout_prob is nan; expected a number in [0, 1)"),
    ],
)
def test_json_that_is_refused(tmp_path, contents, message):
    path = write(tmp_path, contents)
    with pytest.raises(UserError) as caught:
        BertConfig.from_json(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "No such file or directory"),
        (lambda path: path.mkdir(), "not a regular file"),
        (os.mkfifo, "not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    ],
)
def test_json_that_is_no_file(tmp_path, make, reason):
    make(tmp_path / "config.json")
    with pytest.raises(UserError) as caught:
        BertConfig.from_json(tmp_path / "config.json")
    assert str(caught.value) == f"{tmp_path / 'config.json'}: cannot be read ({reason})"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("ab", "'ab'"),
        ("\x1b[2J\n\u202e\ud800", r"'\x1b[2J\n\u202e\ud800'"),
        ("a" * 10**7, "'" + "a" * 27 + "..." + "a" * 28 + "'"),
        ([1] * 10**6, "[1, 1, 1, 1, 1, 1, ...]"),
        (10**4000, "1" + "0" * 27 + "..." + "0" * 29),
    ],
)
def test_quote(value, shown):
    assert quote(value).isprintable() and len(quote(value)) < 80
    if type(value) is not int:
        assert quote(value) == shown


def test_quote_of_deep_nesting():
    nested = []
    for _ in range(100_000):
        nested = [nested]
    assert len(quote(nested)) < 20


def test_one_line():
    assert one_line("a  b\r\nc\x1b[2J\u202e\ud800") == "a b c?[2J??"
    assert one_line("a" * 10**7, 60) == "a" * 57 + "..."
    assert one_line(OSError("x")) == "x"


# --- tasks -------------------------------------------------------------------------------------------------------

# As the course names them: files of the splits, columns, label range, and the column of the predictions.
EXPECTED_TASKS = {
    "sst": (
        ("ids-sst-train.csv", "ids-sst-dev.csv", "ids-sst-test-student.csv"),
        ("sentence",),
        ("sentiment", (0, 4)),
        "Predicted_Sentiment",
    ),
    "para": (
        ("quora-train.csv", "quora-dev.csv", "quora-test-student.csv"),
        ("sentence1", "sentence2"),
        ("is_duplicate", (0, 1)),
        "Predicted_Is_Paraphrase",
    ),
    "sts": (
        ("sts-train.csv", "sts-dev.csv", "sts-test-student.csv"),
        ("sentence1", "sentence2"),
        ("similarity", (0, 5)),
        "Predicted_Similiary",
    ),
    "cfimdb": (
        ("ids-cfimdb-train.csv", "ids-cfimdb-dev.csv", "ids-cfimdb-test-student.csv"),
        ("sentence",),
        ("sentiment", (0, 1)),
        "Predicted_Sentiment",
    ),
}


def test_every_task_is_expected():
    assert TASKS.keys() == EXPECTED_TASKS.keys()
    assert DEFAULT_TASKS == ("sst", "para", "sts")


@pytest.mark.parametrize("task", TASKS)
def test_task_reads_the_course_files(task):
    spec = TASKS[task]
    files, text_columns, label, prediction_column = EXPECTED_TASKS[task]
    assert tuple(spec.files[split] for split in SPLITS) == files
    assert spec.text_columns == text_columns
    assert (spec.label_column, spec.label_range) == label
    assert spec.prediction_column == prediction_column


@pytest.mark.parametrize("task", TASKS)
def test_task_fits_the_tables(task):
    spec = TASKS[task]
    assert spec.kind in TASK_KINDS
    assert tuple(spec.files) == SPLITS
    assert spec.is_pair == (len(spec.text_columns) == 2)
    assert spec.default_head in (PAIR_HEADS if spec.is_pair else ("single",))
    assert spec.default_head in HEADS
    assert spec.title


def test_a_task_sees_one_sentence_unless_told():
    spec = TaskSpec("t", "binary", course_files("t"), ("a",), "label", (0, 1), "P", "P")
    assert (spec.is_pair, spec.default_head) == (False, "single")
    assert spec.files == {"train": "t-train.csv", "dev": "t-dev.csv", "test": "t-test-student.csv"}
