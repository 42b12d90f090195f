"""Checkpoints: what is read and written, held against Hugging Face's BertModel and a safe round trip.

Damaged and hostile folders are refused, with one case for each kind of message; so are names that lead
nowhere.
"""

import io
import json
import os
import pickle
import runpy
import struct
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

import base_bert
from base_bert import (
    check_vocab_size,
    encoder_tensors,
    find_weights,
    resolve_pretrained,
    weights_digest,
)
from bert import BertModel
from config import SIZES, BertConfig
from support.errors import UserError
from support.files import ROOT, file_digest
from tokenizer import BertTokenizer

CONFIG = BertConfig(
    vocab_size=99,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=37,
    max_position_embeddings=11,
)
NUM_WEIGHTS = 5 + 16 * CONFIG.num_hidden_layers + 2  # embeddings, layers, pooler
INPUT_IDS = torch.arange(13 * 7).view(13, 7) % CONFIG.vocab_size


def make_model(seed=0):
    torch.manual_seed(seed)
    model = BertModel(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def write_folder(folder, tensors, as_bin=False):
    folder.mkdir(exist_ok=True)
    CONFIG.to_json(folder / "config.json")
    if as_bin:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


def same_weights(model, other):
    mine, theirs = model.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.fixture
def tensors():
    return {key: tensor.clone() for key, tensor in make_model().state_dict().items()}


@pytest.fixture
def folder(tmp_path, tensors):
    return write_folder(tmp_path / "encoder", tensors)


# --- initialisation -----------------------------------------------------------------------------------------


def test_initial_weights():
    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=1, vocab_size=1000, initializer_range=0.05, pad_token_id=3)
    model = BertModel(config)
    assert model.load_report == "random weights"
    for name, parameter in model.named_parameters():
        if name.endswith("LayerNorm.weight"):
            assert (parameter == 1).all()
        elif name.endswith("bias"):
            assert (parameter == 0).all()
        else:  # five standard errors of the mean and of the standard deviation
            size = parameter.numel()
            assert abs(parameter.mean()) < 5 * 0.05 / size**0.5, name
            assert abs(parameter.std() - 0.05) < 5 * 0.05 / (2 * size) ** 0.5 + 0.05 / 1000, name
    padding_rows = (model.embeddings.word_embeddings.weight == 0).all(1).nonzero().flatten()
    assert padding_rows.tolist() == [3]


# --- reading ------------------------------------------------------------------------------------------------


def old_names(tensors):
    return {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for key, tensor in tensors.items()
    }


STARTER_NAMES = """
embeddings.word_embeddings word_embedding
embeddings.position_embeddings pos_embedding
embeddings.token_type_embeddings tk_type_embedding
embeddings.LayerNorm embed_layer_norm
encoder.layer bert_layers
attention.self self_attention
attention.output.dense attention_dense
attention.output.LayerNorm attention_layer_norm
intermediate.dense interm_dense
output.dense out_dense
output.LayerNorm out_layer_norm
pooler.dense pooler_dense
"""


def starter_names(tensors):
    """The names in a `.pt` file of the course's starter code, with the buffer that it keeps."""
    renamed = {"bert.position_ids": torch.arange(11)[None]}
    for key, tensor in tensors.items():
        for line in STARTER_NAMES.split("\n")[1:-1]:
            key = key.replace(*line.split())
        renamed["bert." + key] = tensor
    return renamed


def prefixed(tensors):
    return {"bert." + key: tensor for key, tensor in tensors.items()}


def below(prefix, rename=lambda tensors: tensors):
    return lambda tensors: {prefix + key: tensor for key, tensor in rename(tensors).items()}


PREFIXES = (
    "module.",
    "model.bert.",
    "0.auto_model.",
    "_orig_mod.module.",
    "bert.bert.",
    "bert.model.",
    "a.b.c.",
)
FORMS = {
    **{f"below {prefix}": below(prefix) for prefix in PREFIXES},
    "old names below": below("module.bert.", old_names),
    "starter's names below": below("module.", starter_names),
    "plain": lambda tensors: tensors,
    "prefix": prefixed,
    "gamma_beta": old_names,
    "prefix_gamma_beta": lambda tensors: prefixed(old_names(tensors)),
    "position_ids": lambda tensors: tensors | {"embeddings.position_ids": torch.arange(11)[None]},
    "starter": starter_names,
    "bfloat16": lambda tensors: {key: tensor.bfloat16() for key, tensor in tensors.items()},
    "float64": lambda tensors: {key: tensor.double() for key, tensor in tensors.items()},
}


@pytest.mark.parametrize("as_bin", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_reads_every_form(tmp_path, tensors, form, as_bin):
    folder = write_folder(tmp_path / "encoder", FORMS[form](tensors), as_bin)
    model = BertModel.from_pretrained(folder)
    assert not model.training
    assert model.config == CONFIG
    assert model.load_report == f"{NUM_WEIGHTS} of {NUM_WEIGHTS} weights loaded from {folder}"
    rtol = 2**-8 if form == "bfloat16" else 0
    for key, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, tensors[key], rtol=rtol, atol=0)


@pytest.mark.parametrize("prefix", ["", "module.", "0.auto_model."])
def test_heads_lose_the_same_prefix(tensors, prefix):
    """`--pretrained` of a masked language model in a wrapper: its prediction head is found too."""
    stored = prefixed(tensors) | {"cls.predictions.bias": torch.zeros(99)}
    found = encoder_tensors(below(prefix)(stored), Path("x"))
    assert set(found) == {*tensors, "cls.predictions.bias"}


@pytest.mark.parametrize("prefix", ["a.bert.", "module.", "embeddings."])
def test_encoder_without_a_prefix_is_the_one_of_several(tmp_path, tensors, prefix):
    other = {prefix + key: torch.zeros_like(tensor) for key, tensor in tensors.items()}
    model = BertModel.from_pretrained(write_folder(tmp_path / "encoder", other | prefixed(tensors)))
    assert same_weights(model, make_model()) and f"; not used: {NUM_WEIGHTS} (" in model.load_report


def test_bin_as_old_as_bert(tmp_path, tensors):
    folder = write_folder(tmp_path / "encoder", {})
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert same_weights(BertModel.from_pretrained(folder), make_model())


def test_safetensors_go_first(folder):
    assert find_weights(folder) == folder / "model.safetensors"
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    assert same_weights(BertModel.from_pretrained(folder), make_model())


def write_shards(folder, shards, name="model.safetensors"):
    """Replace the weights by shards and their index, as Hugging Face splits a large model."""
    stem, end = os.path.splitext(name)
    (folder / "model.safetensors").unlink(missing_ok=True)
    weight_map = {}
    for number, tensors in enumerate(shards, start=1):
        shard = f"{stem}-{number:05}-of-{len(shards):05}{end}"
        weight_map |= dict.fromkeys(tensors, shard)
        if end == ".bin":
            torch.save(tensors, folder / shard)
        else:
            save_file(tensors, folder / shard)
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def split(tensors, number):
    names = sorted(tensors)
    return [{name: tensors[name] for name in names[start::number]} for start in range(number)]


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("number", [1, 2, 5])
def test_shards(folder, tensors, name, number):
    write_shards(folder, split(prefixed(tensors), number), name)
    assert find_weights(folder) == folder / f"{name}.index.json"
    model = BertModel.from_pretrained(folder)
    assert same_weights(model, make_model())
    assert model.load_report == f"{NUM_WEIGHTS} of {NUM_WEIGHTS} weights loaded from {folder}"


def test_digest_of_weights_is_the_files_own_or_of_all_shards(folder, tensors):
    assert weights_digest(folder) == file_digest(folder / "model.safetensors")
    found = set()
    for change in (0, 1):  # in the second shard only: the index stays as it is
        write_shards(folder, [{"a": torch.zeros(1)}, {"b": torch.full((1,), float(change))}])
        found.add(weights_digest(folder))
    assert len(found) == 2 and {len(digest) for digest in found} == {64}


def test_missing_pooler_is_reported(tmp_path, tensors):
    pooler = {key: tensors.pop(key) for key in ("pooler.dense.weight", "pooler.dense.bias")}
    torch.manual_seed(5)
    model = BertModel.from_pretrained(write_folder(tmp_path / "encoder", tensors))
    assert f"{NUM_WEIGHTS - 2} of {NUM_WEIGHTS} weights loaded" in model.load_report
    assert model.load_report.endswith("; new: pooler.dense.weight, pooler.dense.bias")
    fresh = model.pooler.dense.weight
    assert abs(fresh.std() - CONFIG.initializer_range) < 0.002  # 1024 numbers: 5 standard errors are 0.0022
    assert not torch.equal(fresh, pooler["pooler.dense.weight"])


def test_unused_weights_are_reported_without_escapes(tmp_path, tensors):
    extra = {f"cls.predictions.{i}": torch.zeros(2) for i in range(4)} | {"\x1b[2J\n": torch.zeros(1)}
    model = BertModel.from_pretrained(write_folder(tmp_path / "encoder", tensors | extra))
    names = ", ".join(f"cls.predictions.{i}" for i in range(3))
    assert model.load_report.endswith(f"; not used: 5 (?[2J , {names}, ...)")
    assert same_weights(model, make_model())


def test_overrides(folder):
    model = BertModel.from_pretrained(folder, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.4)
    assert model.embeddings.dropout_prob == model.encoder.layer[1].output.dropout_prob == 0.3
    assert model.encoder.layer[1].attention.self.dropout_prob == 0.4
    assert same_weights(model, make_model())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_default_type_of_torch_changes_nothing(tmp_path, tensors, dtype):
    del tensors["pooler.dense.bias"]  # a weight that is loaded and one that is not
    folder = write_folder(tmp_path / "encoder", tensors)
    torch.set_default_dtype(dtype)
    try:
        model = BertModel.from_pretrained(folder)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    loaded = {key: tensor for key, tensor in model.state_dict().items() if key in tensors}
    assert len(loaded) == NUM_WEIGHTS - 1
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in loaded.items())
    assert model(INPUT_IDS)["pooler_output"].dtype == torch.float32


def test_minilm():
    model = BertModel.from_pretrained("minilm")
    assert sum(parameter.numel() for parameter in model.parameters()) == 22_713_216
    assert model.load_report == f"103 of 103 weights loaded from {resolve_pretrained('minilm')}"


# --- refusing -----------------------------------------------------------------------------------------------


def change_config(**changes):
    def change(folder):
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | changes))

    return change


def change_tensors(change):
    def rewrite(folder):
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path)

    return rewrite


def swap_for_bin(contents):
    """Replace the weights by a `pytorch_model.bin` of these bytes, or of anything else by `torch.save`."""

    def swap(folder):
        (folder / "model.safetensors").unlink()
        if isinstance(contents, bytes):
            (folder / "pytorch_model.bin").write_bytes(contents)
        else:
            torch.save(contents, folder / "pytorch_model.bin")

    return swap


def one_number_as(*shape, **sizes):
    """Word embeddings of any size, stored as a single number; config.json agrees."""

    def change(folder):
        change_config(**sizes, num_attention_heads=1)(folder)
        swap_for_bin(load_file(folder / "model.safetensors") | {WORDS: torch.zeros(1, 1).expand(shape)})(
            folder
        )

    return change


def header_of(tensor):
    """The start of a safetensors file that claims to hold one tensor."""
    header = json.dumps({"a": tensor}).encode()
    return struct.pack("<Q", len(header)) + header


def change_tensor(key, tensor):
    return change_tensors(lambda tensors: tensors | {key: tensor})


def write(name, contents):
    return lambda folder: (folder / name).write_bytes(contents)


KEY = "encoder.layer.1.attention.self.key.weight"
WORDS = "embeddings.word_embeddings.weight"
NOT_FINITE = torch.ones(32, 32).index_fill_(0, torch.tensor(3), float("nan"))
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4f\nsize 438\n"
DAMAGE = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json: cannot be read"),
    "not bert": (change_config(model_type="roberta"), "config.json: model_type is 'roberta'"),
    "unknown activation": (change_config(hidden_act="swish"), "hidden_act is 'swish'"),
    **{
        f"{size} {value}": (
            change_config(**{size: value}, num_attention_heads=1),
            f"config.json says {size} {value}; the weights have {getattr(CONFIG, size)}",
        )
        for size in SIZES
        if size != "num_attention_heads"
        for value in (1, 10**18)
    },
    "layer of any number": (  # counted, not believed
        lambda folder: (
            change_config(num_hidden_layers=10**9)(folder),
            change_tensor("encoder.layer.999999999.a", torch.zeros(1))(folder),
        ),
        "config.json says num_hidden_layers 1000000000; the weights have 3",
    ),
    "layer left out": (
        change_tensors(
            lambda tensors: {key.replace("layer.1.", "layer.2."): tensors[key] for key in tensors}
        ),
        f"16 of {NUM_WEIGHTS} encoder weights are missing, the first is encoder.layer.1.attention.self",
    ),
    "weight missing": (
        change_tensors(lambda tensors: {key: tensors[key] for key in tensors if key != KEY}),
        f"1 of {NUM_WEIGHTS} encoder weights are missing, the first is {KEY}",
    ),
    "no tensors": (change_tensors(lambda tensors: {}), f"the encoder weight {WORDS} is missing"),
    "flat embeddings": (change_tensor(WORDS, torch.zeros(99)), f"{WORDS} has shape (99,); expected a matrix"),
    "other shape": (
        change_tensor(KEY, torch.zeros(32, 37)),
        f"{KEY} has shape (32, 37); config.json asks for (32, 32)",
    ),
    "NaN": (
        change_tensor(KEY, NOT_FINITE),
        f"{KEY} holds 32 values that are NaN or infinite; the file is damaged",
    ),
    "beyond float32": (
        change_tensor(KEY, torch.full((32, 32), 1e300, dtype=torch.float64)),
        f"{KEY} holds 1024 values that are NaN or infinite",
    ),
    **{
        str(dtype): (
            change_tensor(KEY, torch.zeros(32, 32).to(dtype)),
            f"{KEY} has type {dtype}; expected floating point of 16, 32 or 64 bits",
        )
        for dtype in (torch.int8, torch.float8_e4m3fn, torch.complex64)
    },
    "with and without prefix": (
        change_tensor("bert." + KEY, torch.zeros(32, 32)),
        f"holds {KEY} twice, with and without a prefix",
    ),
    "two encoders": (
        change_tensors(
            lambda tensors: {"query.bert." + WORDS: tensors[WORDS].clone(), **below("document.")(tensors)}
        ),
        "holds 2 encoders, below query. and document.; expected one",
    ),
    "other prefix before one weight": (
        change_tensors(
            lambda tensors: (
                below("a.")({key: tensors[key] for key in tensors if key != KEY}) | {"b." + KEY: tensors[KEY]}
            )
        ),
        f"1 of {NUM_WEIGHTS} encoder weights are missing, the first is {KEY}",
    ),
    "shard missing": (
        lambda folder: (
            write_shards(folder, split(make_model().state_dict(), 2))
            or (folder / "model-00002-of-00002.safetensors").unlink()
        ),
        "model-00002-of-00002.safetensors: missing; model.safetensors.index.json lists it",
    ),
    "shard is a pointer": (
        lambda folder: (
            write_shards(folder, split(make_model().state_dict(), 2))
            or write("model-00002-of-00002.safetensors", POINTER)(folder)
        ),
        "model-00002-of-00002.safetensors: a Git LFS pointer, not yet the file itself",
    ),
    "weight in two shards": (
        lambda folder: write_shards(folder, [make_model().state_dict(), {KEY: torch.zeros(32, 32)}]),
        f"model-00002-of-00002.safetensors: holds {KEY}, as another file of the weights does",
    ),
    "terabyte in a shard": (
        lambda folder: (
            write_shards(folder, split(make_model().state_dict(), 2))
            or os.truncate(folder / "model-00002-of-00002.safetensors", 2**40)
        ),
        "model.safetensors.index.json: too large; expected at most 4 GiB",
    ),
    **{
        f"index {weight_map!r}": (
            lambda folder, weight_map=weight_map: (
                write_shards(folder, [{}])
                or write("model.safetensors.index.json", json.dumps({"weight_map": weight_map}).encode())(
                    folder
                )
            ),
            f"model.safetensors.index.json: {message}",
        )
        for weight_map, message in [
            (None, "expected a weight_map with a file's name for each weight"),
            ({}, "expected a weight_map"),
            ({"a": 1}, "expected a weight_map"),
            ({"a": "../model.safetensors"}, "weight_map has '../model.safetensors'; expected a name such as"),
            ({"a": "/etc/passwd"}, "weight_map has '/etc/passwd'"),
            (
                {"a": "model-1.bin"},
                "weight_map has 'model-1.bin'; expected a name such as model-00001.safetensors",
            ),
        ]
    },
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "holds no weights; expected model.safetensors or pytorch_model.bin",
    ),
    "truncated": (
        lambda folder: write("model.safetensors", (folder / "model.safetensors").read_bytes()[:-1])(folder),
        "model.safetensors: not a readable weights file",
    ),
    "empty": (write("model.safetensors", b""), "not a readable weights file"),
    "terabyte in the header": (
        write("model.safetensors", header_of({"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]})),
        "model.safetensors: not a readable weights file",
    ),
    "terabyte on disk": (
        lambda folder: os.truncate(folder / "model.safetensors", 2**40),  # a hole: takes no space
        "model.safetensors: too large; expected at most 4 GiB",
    ),
    "text as .bin": (swap_for_bin(b"version 1"), "pytorch_model.bin: not a readable weights file"),
    "pointer as .bin": (
        swap_for_bin(POINTER),
        "pytorch_model.bin: a Git LFS pointer, not yet the file itself",
    ),
    "pointer as weights": (
        write("model.safetensors", POINTER),
        "model.safetensors: a Git LFS pointer, not yet the file itself; fetch that with 'git lfs pull'",
    ),
    "pointer as config": (write("config.json", POINTER), "config.json: a Git LFS pointer, not yet the file"),
    "list as .bin": (swap_for_bin([torch.zeros(2)]), "expected a dictionary of tensors"),
    "nested .bin": (swap_for_bin({"state_dict": {"a": torch.zeros(2)}}), "expected a dictionary of tensors"),
    "numbers as names": (swap_for_bin({1: torch.zeros(2)}), "expected a dictionary of tensors"),
    "one number as many": (
        one_number_as(99 * 10**6, 32, vocab_size=99 * 10**6),
        "the weights share their numbers; expected each its own",
    ),
    "beyond any memory": (
        one_number_as(99, 10**12, hidden_size=10**12),
        "config.json: Storage size calculation overflowed",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folder_is_refused(folder, damage):
    spoil, message = DAMAGE[damage]
    spoil(folder)
    with pytest.raises(UserError) as caught:
        BertModel.from_pretrained(folder)
    assert message in str(caught.value) and str(folder) in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


def test_sizes_are_compared_before_a_model_is_made(folder, monkeypatch):
    change_config(hidden_size=10**9, num_attention_heads=1)(folder)
    monkeypatch.setattr(BertModel, "__init__", None)
    with pytest.raises(UserError, match="config.json says hidden_size 1000000000; the weights have 32"):
        BertModel.from_pretrained(folder)


@pytest.mark.parametrize("config", [CONFIG, BertConfig(num_hidden_layers=1, vocab_size=5)])
def test_weight_shapes_are_those_of_the_model_and_draw_nothing(config):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    shapes = BertModel.weight_shapes(config)
    assert torch.equal(torch.rand(1), expected)  # so that loading leaves a run's random numbers alone
    assert shapes == {key: tuple(tensor.shape) for key, tensor in BertModel(config).state_dict().items()}


@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling link", "device"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin"])
def test_what_is_no_file_is_refused_at_once(folder, name, kind):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (folder / name).unlink(missing_ok=True)
    (folder / "pytorch_model.bin").unlink(missing_ok=name != "config.json")
    make = {"folder": Path.mkdir, "pipe": os.mkfifo, "dangling link": lambda path: path.symlink_to("nowhere")}
    make.get(kind, lambda path: path.symlink_to("/dev/zero"))(folder / name)
    message = "config.json: cannot be read" if name == "config.json" else "holds no weights; expected"
    with pytest.raises(UserError, match=message):
        BertModel.from_pretrained(folder)


def test_check_vocab_size(capsys):
    base_bert.warn_once.cache_clear()
    config = BertConfig.from_json(resolve_pretrained("minilm") / "config.json")
    check_vocab_size(len(BertTokenizer.from_pretrained("minilm")), config.vocab_size, "minilm")
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError) as caught:
        check_vocab_size(100, 99, "x")
    assert str(caught.value) == (
        "--pretrained x: vocabulary of 100 word pieces, embeddings for 99; expected at least as many: its"
        " vocabulary and its weights are from different models"
    )
    check_vocab_size(30522, 30528, "x")  # padded to a multiple of 64
    assert capsys.readouterr().out == (
        "warning: --pretrained x: vocabulary of 30522 word pieces, embeddings for 30528; no text uses the"
        " last 6, which is as it should be for padding and added tokens only\n"
    )


def test_truncated_bin_is_refused(folder, tensors):
    (folder / "model.safetensors").unlink()
    for with_zip in (True, False):
        stream = io.BytesIO()
        torch.save(tensors, stream, _use_new_zipfile_serialization=with_zip)
        whole = stream.getvalue()
        for length in (1, 3, 10, 100, 3000, len(whole) // 2, len(whole) - 1):
            (folder / "pytorch_model.bin").write_bytes(whole[:length])
            with pytest.raises(UserError, match=r"pytorch_model\.bin: not a readable weights file"):
                BertModel.from_pretrained(folder)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["alone", "among tensors", "plain pickle"])
def test_bin_cannot_run_code(folder, tensors, form):
    trace = folder / "code was run"
    path = folder / "pytorch_model.bin"
    (folder / "model.safetensors").unlink()
    bomb = Bomb(trace)
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(bomb, protocol=2))
    else:
        torch.save(bomb if form == "alone" else tensors | {"pooler.dense.extra": bomb}, path)
    with pytest.raises(UserError, match=r"pytorch_model\.bin: not a readable weights file"):
        BertModel.from_pretrained(folder)
    assert not trace.exists()
    if form == "plain pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert trace.exists()  # so the bomb was live


# --- writing, and Hugging Face ------------------------------------------------------------------------------


def test_save_and_load_are_exact(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "deep" / "encoder")
    files = (tmp_path / "deep" / "encoder").iterdir()
    assert sorted(path.name for path in files) == ["config.json", "model.safetensors"]
    again = BertModel.from_pretrained(tmp_path / "deep" / "encoder")
    assert again.config == model.config and same_weights(again, model)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_saved_files_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        make_model().save_pretrained(tmp_path / "encoder")
        BertTokenizer.from_pretrained("minilm").save_pretrained(tmp_path / "encoder")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "encoder").iterdir()}
    assert len(modes) == 4 and set(modes.values()) == {0o666 & ~umask}


def test_saves_views_of_one_buffer(tmp_path):
    model = make_model()
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    start = 0
    for parameter in model.parameters():  # as in training: each parameter is a view of the flat memory
        parameter.data = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    model.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size < 4 * len(flat) + 10_000  # the buffer is not written once per view
    assert same_weights(BertModel.from_pretrained(tmp_path), make_model())


REFERENCE = """
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel

input_ids = load_file("input_ids.safetensors")["input_ids"]

def run(model):
    with torch.no_grad():
        outputs = model.eval()(input_ids)
    outputs = {"last_hidden_state": outputs.last_hidden_state, "pooler_output": outputs.pooler_output}
    return {key: value.contiguous() for key, value in outputs.items() if value is not None}

model, info = BertModel.from_pretrained("ours", output_loading_info=True)
assert not any(info.values()), info
save_file(run(model), "ours.safetensors")
size = dict(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37,
            max_position_embeddings=11, initializer_range=0.3)
for cls in (BertModel, BertForSequenceClassification, BertForMaskedLM):
    torch.manual_seed(3)
    model = cls(BertConfig(**size))
    model.save_pretrained(cls.__name__)
    torch.save(model.state_dict(), cls.__name__ + ".bin")
    save_file(run(getattr(model, "bert", model)), cls.__name__ + ".safetensors")
"""
# Class that wrote the folder -> what our report must say at its end.
WRITERS = {
    "BertModel": f"{NUM_WEIGHTS} of {NUM_WEIGHTS} weights loaded from",
    "BertForSequenceClassification": "; not used: 2 (classifier.bias, classifier.weight)",
    "BertForMaskedLM": "; new: pooler.dense.weight, pooler.dense.bias; not used:",
}


@pytest.fixture(scope="module")
def exchange(tmp_path_factory, run_transformers):
    """A folder where Hugging Face has loaded our checkpoint and left its own."""
    root = tmp_path_factory.mktemp("exchange")
    make_model().save_pretrained(root / "ours")
    save_file({"input_ids": INPUT_IDS}, root / "input_ids.safetensors")
    run_transformers(REFERENCE, root)
    return root


def check_outputs(model, path):
    expected = load_file(path)
    with torch.no_grad():
        outputs = model(INPUT_IDS)
    for key, tensor in expected.items():  # float32 on both sides, added in another order
        torch.testing.assert_close(outputs[key], tensor, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_hugging_face_loads_ours(exchange):
    check_outputs(make_model(), exchange / "ours.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("as_bin", [False, True])
@pytest.mark.parametrize("writer", WRITERS)
def test_we_load_theirs(exchange, tmp_path, writer, as_bin):
    folder = exchange / writer
    if as_bin:
        (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
        (tmp_path / "pytorch_model.bin").write_bytes((exchange / f"{writer}.bin").read_bytes())
        folder = tmp_path
    model = BertModel.from_pretrained(folder)
    assert WRITERS[writer] in model.load_report
    check_outputs(model, exchange / f"{writer}.safetensors")


# --- names --------------------------------------------------------------------------------------------------

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty hub cache, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    base_bert.warn_once.cache_clear()
    return tmp_path / "hub"


def fill_cache(hub_cache, repo_id, revision=REVISION):
    """Lay out a repository as the hub's own downloader does."""
    root = hub_cache / ("models--" + repo_id.replace("/", "--"))
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(revision)
    make_model().save_pretrained(root / "snapshots" / revision)
    return root / "snapshots" / revision


def test_names_of_folders(folder, monkeypatch):
    assert resolve_pretrained(str(folder)) == folder
    monkeypatch.chdir(folder.parent)
    assert resolve_pretrained("encoder") == Path("encoder")
    minilm = resolve_pretrained("minilm")
    assert all((minilm / name).is_file() for name in ("config.json", "model.safetensors", "vocab.txt"))


def test_minilm_not_installed(monkeypatch):
    monkeypatch.setattr(base_bert, "OFFLINE_PACKAGE", "no_such_package_at_all")
    with pytest.raises(UserError, match="--pretrained minilm: the package that carries it is not installed"):
        resolve_pretrained("minilm")


NONSENSE = [
    *("no/such/folder", "./encoder", "../encoder", "/no/such", "two words", ".hidden", "a/b/"),
    *("gs://bucket/bert", "encoder\0"),
    # Against the hub's own rules for names:
    *("bert--base", "bert..base", "-bert", "owner/bert.git", "bärt", "b" * 97, "b" * 300),
]


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_name(hub_cache, name):
    with pytest.raises(UserError) as caught:
        resolve_pretrained(name)
    message = f"--pretrained {name}: no such folder; expected a folder, a hub name or 'minilm'"
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "name", ["bert-base-uncased", f"owner/tiny@{REVISION}", "owner/tiny@v1", "nonsense@main"]
)
def test_hub_name_without_network_and_cache(hub_cache, name):
    with pytest.raises(UserError) as caught:
        resolve_pretrained(name)
    message = str(caught.value)
    assert message.startswith(f"--pretrained {name}: not a folder, and not available from the hub (")
    assert message.endswith("expected a folder, a hub name or 'minilm' (works offline)")
    assert "\n" not in message


def starter_file(path, tensors):
    """A `.pt` file as the course's starter saves it."""
    args = SimpleNamespace(lr=1e-5)
    torch.save({"model": starter_names(tensors) | {"head.bias": torch.zeros(5)}, "args": args}, path)


# What is given instead of a folder -> how to make it, and what it is called.
NO_FOLDERS = {
    "model.pt": (starter_file, "a file of torch.save"),
    "old.pt": (
        lambda path, tensors: torch.save(tensors, path, _use_new_zipfile_serialization=False),
        "a file of torch.save",
    ),
    "model.safetensors": (lambda path, tensors: save_file(tensors, path), "a file of weights"),
    "pointer.bin": (
        lambda path, tensors: path.write_bytes(POINTER),
        "a Git LFS pointer",
    ),
    "notes.txt": (lambda path, tensors: path.write_text("notes"), "a file"),
    "empty": (lambda path, tensors: path.touch(), "a file"),
    "pipe": (lambda path, tensors: os.mkfifo(path), "a pipe or device"),
}


@pytest.mark.parametrize("name", NO_FOLDERS)
def test_file_instead_of_a_folder(tmp_path, tensors, name):
    make, kind = NO_FOLDERS[name]
    make(tmp_path / name, tensors)
    with pytest.raises(UserError) as caught:
        resolve_pretrained(str(tmp_path / name))
    assert str(caught.value).startswith(
        f"--pretrained {tmp_path / name}: is {kind}; expected a folder with config.json, vocab.txt and the"
        " weights (model.safetensors or pytorch_model.bin); docs/runs.md"
    )


def test_documented_way_from_a_starters_file_to_a_folder(tmp_path, tensors, monkeypatch):
    starter_file(tmp_path / "model.pt", tensors)
    write_folder(tmp_path / "encoder", {})
    (tmp_path / "encoder" / "model.safetensors").unlink()
    code = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8").partition("```python\n")[2]
    (tmp_path / "convert.py").write_text(code.partition("```")[0])
    monkeypatch.chdir(tmp_path)
    runpy.run_path("convert.py")
    assert same_weights(BertModel.from_pretrained("encoder"), make_model())


def test_hub_name_in_the_cache(hub_cache, capsys):
    snapshot = fill_cache(hub_cache, "owner/tiny")
    name = f"owner/tiny@{REVISION}"
    assert resolve_pretrained(name).samefile(snapshot)
    assert same_weights(BertModel.from_pretrained(name), make_model())
    assert capsys.readouterr().out == ""  # nothing was fetched


@pytest.mark.parametrize(
    "name", ["owner/tiny", "bert-large-uncased", "tiny", "owner/tiny@", "bert-base-uncased@"]
)
def test_hub_name_without_a_revision_is_refused_unasked(hub_cache, monkeypatch, name):
    fill_cache(hub_cache, name.partition("@")[0])  # not even what is in the cache is taken
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(UserError) as caught:
        resolve_pretrained(name)
    assert str(caught.value) == (
        f"--pretrained {name}: no such folder, and a hub name without a revision; expected NAME@REVISION"
        " (a commit), a folder, or 'minilm'"
    )


@pytest.mark.parametrize("revision", ["../../main", "/etc", "a b", "a\n", ".", "a/../b", "@main", "-x"])
def test_revision_that_is_none(hub_cache, monkeypatch, revision):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(UserError, match="expected NAME@REVISION"):
        resolve_pretrained(f"owner/tiny@{revision}")


def test_branch_is_a_warning_with_its_commit(hub_cache, capsys):
    fill_cache(hub_cache, "owner/tiny")
    for _ in range(3):  # for the tokenizer, the encoder, the head
        resolve_pretrained("owner/tiny@main")
    assert capsys.readouterr().out == (
        "warning: --pretrained owner/tiny@main: main is not a commit of 40 digits, so what it means can"
        f" change; today it is owner/tiny@{REVISION}\n"
    )


def test_only_tensors_and_settings_are_fetched():
    assert all(name.endswith((".json", ".safetensors", ".bin", ".txt")) for name in base_bert.HUB_FILES)
    assert not any("*" in name or "/" in name for name in base_bert.HUB_FILES)  # nothing else can match


@pytest.mark.parametrize("has_safetensors", [True, False])
def test_hub_is_asked_after_the_cache_and_for_one_file_of_weights(monkeypatch, tmp_path, has_safetensors):
    filenames = ["config.json", "pytorch_model.bin", "vocab.txt"] + ["model.safetensors"] * has_safetensors
    steps = []

    def snapshot_download(repo_id, revision, allow_patterns, local_files_only=False, dry_run=False):
        assert (repo_id, revision) == ("owner/tiny", "v1")
        steps.append("cache" if local_files_only else "list" if dry_run else "fetch")
        if local_files_only:
            raise LocalEntryNotFoundError("not in the cache")
        if dry_run:
            return [SimpleNamespace(filename=filename) for filename in filenames]
        assert ("pytorch_model.bin" in allow_patterns) == (not has_safetensors)
        assert {"config.json", "model.safetensors", "vocab.txt"} < set(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_pretrained("owner/tiny@v1") == tmp_path
    assert steps == ["cache", "list", "fetch"]


def test_tested_revision_is_the_default(hub_cache):
    revision = base_bert.HUB_REVISIONS["bert-base-uncased"]
    assert len(revision) == 40 and int(revision, 16)
    snapshot = fill_cache(hub_cache, "bert-base-uncased", revision)
    (snapshot.parent.parent / "refs" / "main").write_text(REVISION)  # the branch has moved on
    assert resolve_pretrained("bert-base-uncased").samefile(snapshot)


def test_cache_without_the_bin_that_the_hub_also_has(hub_cache):
    """The first download leaves `pytorch_model.bin` out; in the hub's own list of files it is no gap."""
    revision = base_bert.HUB_REVISIONS["bert-base-uncased"]
    snapshot = fill_cache(hub_cache, "bert-base-uncased", revision)
    files = [*(path.name for path in snapshot.iterdir()), "pytorch_model.bin"]
    listing = {name: {"size": 1, "blob_id": "0" * 40} for name in files}
    trees = snapshot.parent.parent / "trees"
    trees.mkdir()
    (trees / f"{revision}.json").write_text(json.dumps({"format_version": 1, "files": listing}))
    assert resolve_pretrained("bert-base-uncased").samefile(snapshot)


def damage_ref(contents):
    return lambda snapshot: (snapshot.parent.parent / "refs" / "main").write_bytes(contents)


# What is done to a snapshot in the cache, and the revision that is asked for.
BAD_CACHES = {
    "other revision": (lambda snapshot: None, "f" * 40),
    "interrupted download": (lambda snapshot: (snapshot / "model.safetensors").unlink(), REVISION),
    **{
        repr(contents[:4]): (damage_ref(contents), "main")
        for contents in (b"", b"\xff", b"a\0b", b"../../..")
    },
}


@pytest.mark.parametrize("case", BAD_CACHES)
def test_damaged_cache_is_as_none(hub_cache, case):
    damage, revision = BAD_CACHES[case]
    damage(fill_cache(hub_cache, "owner/tiny"))
    with pytest.raises(UserError, match="not a folder, and not available from the hub"):
        resolve_pretrained(f"owner/tiny@{revision}")
