"""Checkpoints: what is read and written, held against Hugging Face's BertModel and a safe round trip.

Damaged and hostile folders are refused, with one case for each kind of message; so are names that lead
nowhere.
"""

import json
import math
import os
import pickle
import runpy
import struct
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

import base_bert
from base_bert import check_vocab_size, encoder_tensors, find_weights, resolve_pretrained, weights_digest
from bert import BertModel
from config import SIZES, BertConfig
from support.errors import UserError
from support.files import ROOT, file_digest
from tests.tiny import make_config, randomise, refusal

CONFIG = replace(make_config(99), max_position_embeddings=11)
NUM_WEIGHTS = 5 + 16 * CONFIG.num_hidden_layers + 2  # embeddings, layers, pooler
INPUT_IDS = torch.arange(13 * 7).view(13, 7) % CONFIG.vocab_size
KEY = "encoder.layer.1.attention.self.key.weight"
WORDS = "embeddings.word_embeddings.weight"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4f\nsize 438\n"
TWO = "model-00002-of-00002.safetensors"


def make_model():
    return randomise(BertModel(CONFIG)).eval()


def write_folder(folder, tensors, as_bin=False, zipped=True):
    folder.mkdir(exist_ok=True)
    CONFIG.to_json(folder / "config.json")
    if as_bin:
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


def is_ours(model):
    mine, theirs = model.state_dict(), make_model().state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.fixture
def tensors():
    return {key: tensor.clone() for key, tensor in make_model().state_dict().items()}


@pytest.fixture
def folder(tmp_path, tensors):
    return write_folder(tmp_path / "encoder", tensors)


# --- initialisation and sizes -------------------------------------------------------------------------------


def test_initial_weights():
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(num_hidden_layers=1, vocab_size=1000, initializer_range=0.05, pad_token_id=3)
    )
    assert model.load_report == "random weights"
    for name, param in model.named_parameters():
        if name.endswith(("LayerNorm.weight", "bias")):
            assert (param == float(name.endswith("weight"))).all()
        else:  # five standard errors of the mean and of the standard deviation
            size = param.numel()
            assert abs(param.mean()) < 5 * 0.05 / size**0.5, name
            assert abs(param.std() - 0.05) < 5 * 0.05 / (2 * size) ** 0.5 + 0.05 / 1000, name
    assert (model.embeddings.word_embeddings.weight == 0).all(1).nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("config", [CONFIG, make_config(5, num_hidden_layers=3, type_vocab_size=1)])
def test_weight_shapes_are_those_of_the_model_and_draw_nothing(config):
    state = torch.get_rng_state()
    shapes = BertModel.weight_shapes(config)
    assert torch.equal(torch.get_rng_state(), state)  # loading leaves a run's random numbers alone
    assert shapes == {key: tuple(tensor.shape) for key, tensor in BertModel(config).state_dict().items()}


def test_check_vocab_size(capsys):
    base_bert.warn_once.cache_clear()
    check_vocab_size(99, 99, "x")
    message = refusal(check_vocab_size, 100, 99, "x")
    assert message.startswith("--pretrained x: vocabulary of 100 word pieces, embeddings for 99; expected at")
    check_vocab_size(30522, 30528, "x")  # padded to a multiple of 64
    warning = "warning: --pretrained x: vocabulary of 30522 word pieces, embeddings for 30528; no text uses"
    assert capsys.readouterr().out.startswith(warning)


# --- reading ------------------------------------------------------------------------------------------------

STARTER_NAMES = """
embeddings.word_embeddings:word_embedding embeddings.position_embeddings:pos_embedding
embeddings.token_type_embeddings:tk_type_embedding embeddings.LayerNorm:embed_layer_norm
encoder.layer:bert_layers attention.self:self_attention attention.output.dense:attention_dense
attention.output.LayerNorm:attention_layer_norm intermediate.dense:interm_dense
output.dense:out_dense output.LayerNorm:out_layer_norm pooler.dense:pooler_dense
"""


def renamed(tensors, *pairs):
    for old, new in pairs:
        tensors = {key.replace(old, new): tensor for key, tensor in tensors.items()}
    return tensors


def below(prefix, tensors):
    return {prefix + key: tensor for key, tensor in tensors.items()}


def old_names(tensors):
    return renamed(tensors, ("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))


def starter_names(tensors):
    """The names in a `.pt` file of the course's starter code, with the buffer that it keeps."""
    pairs = [pair.split(":") for pair in STARTER_NAMES.split()]
    return below("bert.", renamed(tensors, *pairs) | {"position_ids": torch.arange(11)[None]})


FORMS = {
    "plain": lambda tensors: tensors,
    "old names": old_names,
    "starter": starter_names,
    "position_ids": lambda tensors: tensors | {"embeddings.position_ids": torch.arange(11)[None]},
    "old names below": lambda tensors: below("module.bert.", old_names(tensors)),
    "starter's names below": lambda tensors: below("module.", starter_names(tensors)),
    "bfloat16": lambda tensors: {key: tensor.bfloat16() for key, tensor in tensors.items()},
    "float64": lambda tensors: {key: tensor.double() for key, tensor in tensors.items()},
    **{
        f"below {prefix}": lambda tensors, prefix=prefix: below(prefix, tensors)
        for prefix in ("bert.", "module.", "0.auto_model.", "_orig_mod.module.", "bert.bert.", "bert.model.")
    },
}


WAYS = ({}, {"as_bin": True}, {"as_bin": True, "zipped": False})  # the last as old as BERT


@pytest.mark.parametrize("form", FORMS)
def test_reads_every_form(tmp_path, tensors, form):
    for number, how in enumerate(WAYS if form in ("plain", "old names", "bfloat16") else WAYS[:1]):
        folder = write_folder(tmp_path / str(number), FORMS[form](tensors), **how)
        model = BertModel.from_pretrained(folder)
        assert not model.training and model.config == CONFIG
        assert model.load_report == f"{NUM_WEIGHTS} of {NUM_WEIGHTS} weights loaded from {folder}"
        for key, tensor in model.state_dict().items():
            rtol = 2**-8 if form == "bfloat16" else 0
            torch.testing.assert_close(tensor, tensors[key], rtol=rtol, atol=0)  # float32, too


@pytest.mark.parametrize("prefix", ["", "module.", "0.auto_model."])
def test_heads_lose_the_same_prefix(tensors, prefix):
    """`--pretrained` of a masked language model in a wrapper: its prediction head is found too."""
    stored = below("bert.", tensors) | {"cls.predictions.bias": torch.zeros(99)}
    assert set(encoder_tensors(below(prefix, stored), Path("x"))) == {*tensors, "cls.predictions.bias"}


def test_encoder_without_a_prefix_is_the_one_of_several(tmp_path, tensors):
    other = {"a.bert." + key: torch.zeros_like(tensor) for key, tensor in tensors.items()}
    model = BertModel.from_pretrained(write_folder(tmp_path / "encoder", other | below("bert.", tensors)))
    assert is_ours(model) and f"; not used: {NUM_WEIGHTS} (" in model.load_report


def write_shards(folder, shards, name="model.safetensors"):
    """Replace the weights by shards and their index, as Hugging Face splits a large model."""
    stem, end = os.path.splitext(name)
    (folder / "model.safetensors").unlink(missing_ok=True)
    weight_map = {}
    for number, tensors in enumerate(shards, start=1):
        shard = f"{stem}-{number:05}-of-{len(shards):05}{end}"
        weight_map |= dict.fromkeys(tensors, shard)
        (torch.save if end == ".bin" else save_file)(tensors, folder / shard)
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def split(tensors, number):
    return [{name: tensors[name] for name in sorted(tensors)[start::number]} for start in range(number)]


def test_shards_are_read_and_safetensors_go_first(folder, tensors):
    report = f"{NUM_WEIGHTS} of {NUM_WEIGHTS} weights loaded from {folder}"
    (folder / "model.safetensors").unlink()
    for name, number in (("pytorch_model.bin", 2), ("model.safetensors", 1), ("model.safetensors", 5)):
        write_shards(folder, split(below("bert.", tensors), number), name)
        assert find_weights(folder) == folder / f"{name}.index.json"
        model = BertModel.from_pretrained(folder)
        assert is_ours(model) and model.load_report == report
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    write_folder(folder, tensors)
    assert find_weights(folder) == folder / "model.safetensors" and is_ours(BertModel.from_pretrained(folder))


def test_digest_of_weights_is_the_files_own_or_of_all_shards(folder):
    assert weights_digest(folder) == file_digest(folder / "model.safetensors")
    found = set()
    for change in (0, 1):  # in the second shard only: the index stays as it is
        write_shards(folder, [{"a": torch.zeros(1)}, {"b": torch.full((1,), float(change))}])
        found.add(weights_digest(folder))
    assert len(found) == 2 and {len(digest) for digest in found} == {64}


def test_what_is_new_or_not_used_is_reported_without_escapes(tmp_path, tensors):
    pooler = {key: tensors.pop(key) for key in ("pooler.dense.weight", "pooler.dense.bias")}
    extra = {f"cls.predictions.{i}": torch.zeros(2) for i in range(4)} | {"\x1b[2J\n": torch.zeros(1)}
    torch.manual_seed(5)
    model = BertModel.from_pretrained(write_folder(tmp_path / "encoder", tensors | extra))
    names = ", ".join(f"cls.predictions.{i}" for i in range(3))
    assert f"{NUM_WEIGHTS - 2} of {NUM_WEIGHTS} weights loaded" in model.load_report
    assert model.load_report.endswith(f"; new: {', '.join(pooler)}; not used: 5 (?[2J , {names}, ...)")
    fresh = model.pooler.dense.weight
    assert abs(fresh.std() - CONFIG.initializer_range) < 0.002  # 1024 numbers: 5 standard errors are 0.0022
    assert not torch.equal(fresh, pooler["pooler.dense.weight"])


def test_overrides(folder):
    model = BertModel.from_pretrained(folder, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.4)
    assert model.embeddings.dropout_prob == model.encoder.layer[1].output.dropout_prob == 0.3
    assert model.encoder.layer[1].attention.self.dropout_prob == 0.4 and is_ours(model)


def test_default_type_of_torch_changes_nothing(tmp_path, tensors, in_double):
    del tensors["pooler.dense.bias"]  # a weight that is loaded and one that is not
    found = BertModel.from_pretrained(write_folder(tmp_path / "encoder", tensors)).state_dict()
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())


def test_minilm():
    model = BertModel.from_pretrained("minilm")
    assert sum(parameter.numel() for parameter in model.parameters()) == 22_713_216
    assert model.load_report == f"103 of 103 weights loaded from {resolve_pretrained('minilm')}"


# --- refusing -----------------------------------------------------------------------------------------------


def config(**changes):
    def rewrite(folder):
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | changes))

    return rewrite


def change(rewrite):
    """Rewrite the dictionary of tensors."""

    def rewrite_file(folder):
        path = folder / "model.safetensors"
        save_file(rewrite(load_file(path)), path)

    return rewrite_file


def add(key, value):
    return change(lambda tensors: tensors | {key: value})


def write(name, contents):
    return lambda folder: (folder / name).write_bytes(contents)


def both(*steps):
    return lambda folder: [step(folder) for step in steps]


def shards(*then):
    return both(lambda folder: write_shards(folder, split(make_model().state_dict(), 2)), *then)


def remove(name):
    return lambda folder: (folder / name).unlink()


def grow(name):
    """To a terabyte: a hole, which takes no space."""
    return lambda folder: os.truncate(folder / name, 2**40)


def as_bin(contents):
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
    tensors = make_model().state_dict() | {WORDS: torch.zeros(1, 1).expand(shape)}
    return both(config(**sizes, num_attention_heads=1), as_bin(tensors))


def header_of(tensor):
    """The start of a safetensors file that claims to hold one tensor."""
    header = json.dumps({"a": tensor}).encode()
    return struct.pack("<Q", len(header)) + header


def index_of(weight_map):
    index = json.dumps({"weight_map": weight_map}).encode()
    return both(lambda folder: write_shards(folder, [{}]), write("model.safetensors.index.json", index))


def without_key(tensors):
    return {key: tensors[key] for key in tensors if key != KEY}


def is_missing(count, first):
    return f"{count} of {NUM_WEIGHTS} encoder weights are missing, the first is {first}"


SQUARE, ONE = torch.zeros(32, 32), torch.zeros(1)
INDEX, UNREADABLE = "model.safetensors.index.json: ", "model.safetensors: not a readable weights file"
BAD_TYPE = "expected floating point of 16, 32 or 64 bits"
HUGE = {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}
MANY = 99 * 10**6
DAMAGE = [
    (remove("config.json"), "config.json: cannot be read"),
    (config(model_type="roberta"), "config.json: model_type is 'roberta'"),
    (config(hidden_act="swish"), "hidden_act is 'swish'"),
    (write("config.json", POINTER), "config.json: a Git LFS pointer, not yet the file"),
    *(
        (
            config(**{size: 10**18}, num_attention_heads=1),
            f"config.json says {size} {10**18}; the weights have",
        )
        for size in SIZES
        if size != "num_attention_heads"
    ),
    # Layers are counted, a number in a name is not believed.
    (
        both(config(num_hidden_layers=10**9), add("encoder.layer.999999999.a", ONE)),
        "says num_hidden_layers 10000",
    ),
    (change(lambda tensors: renamed(tensors, ("layer.1.", "layer.2."))), is_missing(16, KEY[:29])),
    (change(without_key), is_missing(1, KEY)),
    (change(lambda all: below("a.", without_key(all)) | {"b." + KEY: all[KEY]}), is_missing(1, KEY)),
    (change(lambda tensors: {}), f"the encoder weight {WORDS} is missing"),
    (add(WORDS, torch.zeros(99)), f"{WORDS} has shape (99,); expected a matrix"),
    (add(KEY, torch.zeros(32, 37)), f"{KEY} has shape (32, 37); config.json asks for (32, 32)"),
    (add(KEY, SQUARE.index_fill(0, torch.tensor(3), math.nan)), f"{KEY} holds 32 values that are NaN or inf"),
    (add(KEY, SQUARE.double() + 1e300), f"{KEY} holds 1024 values that are NaN"),  # beyond float32
    (add(KEY, SQUARE.to(torch.float8_e4m3fn)), f"{KEY} has type torch.float8_e4m3fn; {BAD_TYPE}"),
    (add(KEY, SQUARE.to(torch.complex64)), f"{KEY} has type torch.complex64; {BAD_TYPE}"),
    (add("bert." + KEY, SQUARE), f"holds {KEY} twice, with and without a prefix"),
    (
        change(lambda all: below("a.", all) | {"b." + WORDS: all[WORDS].clone()}),
        "holds 2 encoders, below a. and b.",
    ),
    (shards(remove(TWO)), f"{TWO}: missing; model.safetensors.index.json lists it"),
    (shards(write(TWO, POINTER)), f"{TWO}: a Git LFS pointer, not yet the file itself"),
    (shards(grow(TWO)), INDEX + "too large; expected at most 4 GiB"),
    (shards(lambda folder: save_file({KEY: SQUARE}, folder / TWO)), f"{TWO}: holds {KEY}, as another file"),
    (index_of({}), INDEX + "expected a weight_map with a file's name for each weight"),
    (index_of({"a": 1}), INDEX + "expected a weight_map"),
    (index_of({"a": "../b.safetensors"}), INDEX + "weight_map has '../b.safetensors'; expected a name such"),
    (
        index_of({"a": "m-1.bin"}),
        INDEX + "weight_map has 'm-1.bin'; expected a name such as model-00001.safe",
    ),
    (remove("model.safetensors"), "holds no weights; expected model.safetensors or pytorch_model.bin"),
    (lambda folder: os.truncate(folder / "model.safetensors", 20_000), UNREADABLE),
    (write("model.safetensors", b""), UNREADABLE),
    (write("model.safetensors", header_of(HUGE)), UNREADABLE),
    (grow("model.safetensors"), "model.safetensors: too large; expected at most 4 GiB"),
    (write("model.safetensors", POINTER), "not yet the file itself; fetch that with 'git lfs pull'"),
    (as_bin(POINTER), "pytorch_model.bin: a Git LFS pointer, not yet the file itself"),
    (as_bin(b"version 1"), "pytorch_model.bin: not a readable weights file"),
    (as_bin([torch.zeros(2)]), "expected a dictionary of tensors"),
    (as_bin({"state_dict": {"a": torch.zeros(2)}}), "expected a dictionary of tensors"),
    (as_bin({1: torch.zeros(2)}), "expected a dictionary of tensors"),
    (one_number_as(MANY, 32, vocab_size=MANY), "the weights share their numbers; expected each its own"),
    (one_number_as(99, 10**12, hidden_size=10**12), "config.json: Storage size calculation overflowed"),
]


@pytest.mark.parametrize(("spoil", "message"), DAMAGE, ids=[message[:60] for _, message in DAMAGE])
def test_damaged_folder_is_refused(folder, spoil, message):
    spoil(folder)
    found = refusal(BertModel.from_pretrained, folder)
    assert message in found and str(folder) in found


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin"])
def test_what_is_no_file_is_refused_at_once(folder, name):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").unlink(missing_ok=name != "config.json")
    path = folder / name
    message = "config.json: cannot be read" if name == "config.json" else "holds no weights; expected"
    for target in ("pipe", "nowhere", "/dev/zero", "."):  # a link to nothing, to a device, to a folder
        path.unlink(missing_ok=True)
        os.mkfifo(path) if target == "pipe" else path.symlink_to(target)
        assert message in refusal(BertModel.from_pretrained, folder)


def test_truncated_bin_is_refused(folder, tensors):
    (folder / "model.safetensors").unlink()
    for zipped in (True, False):
        whole = (write_folder(folder, tensors, True, zipped) / "pytorch_model.bin").read_bytes()
        for length in (1, 3, 10, 100, 3000, len(whole) // 2, len(whole) - 1):
            (folder / "pytorch_model.bin").write_bytes(whole[:length])
            message = refusal(BertModel.from_pretrained, folder)
            assert "pytorch_model.bin: not a readable weights file" in message


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_bin_cannot_run_code(folder, tensors):
    trace, path = folder / "code was run", folder / "pytorch_model.bin"
    (folder / "model.safetensors").unlink()
    for contents in (Bomb(trace), tensors | {"pooler.dense.extra": Bomb(trace)}, None):
        torch.save(contents, path) if contents else path.write_bytes(pickle.dumps(Bomb(trace), protocol=2))
        assert "pytorch_model.bin: not a readable weights file" in refusal(BertModel.from_pretrained, folder)
        assert not trace.exists()
        torch.load(path, weights_only=False) if contents else pickle.loads(path.read_bytes())
        trace.unlink()  # so the bomb was live


# --- writing, and Hugging Face ------------------------------------------------------------------------------


def test_saved_views_of_one_buffer_load_exactly(tmp_path):
    model, folder = make_model(), tmp_path / "deep" / "encoder"
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    start = 0
    for parameter in model.parameters():  # as in training: each parameter is a view of the flat memory
        parameter.data = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    model.save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    size = (folder / "model.safetensors").stat().st_size
    assert size < 4 * len(flat) + 10_000  # the buffer is not written once per view
    again = BertModel.from_pretrained(folder)
    assert again.config == model.config and is_ours(again)


REFERENCE = """
import torch
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
for cls in (BertForSequenceClassification, BertForMaskedLM):
    torch.manual_seed(3)
    model = cls(BertConfig(**size))
    model.save_pretrained(cls.__name__)
    torch.save(model.state_dict(), cls.__name__ + ".bin")
    save_file(run(model.bert), cls.__name__ + ".safetensors")
"""
# Class that wrote the folder -> what our report must say at its end.
WRITERS = {
    "BertForSequenceClassification": "; not used: 2 (classifier.bias, classifier.weight)",
    "BertForMaskedLM": "; new: pooler.dense.weight, pooler.dense.bias; not used:",
}


def check_outputs(model, path):
    with torch.no_grad():
        outputs = model(INPUT_IDS)
    for key, tensor in load_file(path).items():  # float32 on both sides, added in another order
        torch.testing.assert_close(outputs[key], tensor, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_hugging_face_loads_ours_and_we_load_theirs(tmp_path, run_transformers):
    make_model().save_pretrained(tmp_path / "ours")
    save_file({"input_ids": INPUT_IDS}, tmp_path / "input_ids.safetensors")
    run_transformers(REFERENCE, tmp_path)
    check_outputs(make_model(), tmp_path / "ours.safetensors")
    for writer, report in WRITERS.items():
        for is_bin in (False, True):
            if is_bin:
                (tmp_path / writer / "model.safetensors").unlink()
                (tmp_path / f"{writer}.bin").rename(tmp_path / writer / "pytorch_model.bin")
            model = BertModel.from_pretrained(tmp_path / writer)
            assert report in model.load_report
            check_outputs(model, tmp_path / f"{writer}.safetensors")


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
    monkeypatch.setattr(base_bert, "OFFLINE_PACKAGE", "no_such_package_at_all")
    message = refusal(resolve_pretrained, "minilm")
    assert message.startswith("--pretrained minilm: the package that carries it is not installed")


NO_FOLDER = "no such folder; expected a folder, a hub name or 'minilm'"
NO_REVISION = "no such folder, and a hub name without a revision; expected NAME@REVISION (a commit), a folder"
REFUSED_NAMES = {
    NO_FOLDER: [
        *("no/such/folder", "./encoder", "../encoder", "/no/such", "two words", ".hidden", "a/b/"),
        "gs://bucket/bert",
        # Against the hub's own rules for names:
        *("bert--base", "bert..base", "-bert", "owner/bert.git", "bärt", "b" * 97, "b" * 300),
    ],
    NO_REVISION: [
        *("owner/tiny", "bert-large-uncased", "owner/tiny@", "bert-base-uncased@", "owner/tiny@../../main"),
        *(f"owner/tiny@{revision}" for revision in ("/etc", "a b", ".", "a/../b", "@main", "-x")),
    ],
}


def test_names_that_lead_nowhere_are_refused_unasked(hub_cache, monkeypatch):
    fill_cache(hub_cache, "owner/tiny")  # not even what is in the cache is taken
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    for expected, names in REFUSED_NAMES.items():
        for name in names:
            assert refusal(resolve_pretrained, name).startswith(f"--pretrained {name}: {expected}")
    for name in ("encoder\0", "owner/tiny@a\n"):
        with pytest.raises(UserError, match="no such folder"):
            resolve_pretrained(name)


def starter_file(path, tensors):
    """A `.pt` file as the course's starter saves it."""
    args = SimpleNamespace(lr=1e-5)
    torch.save({"model": starter_names(tensors) | {"head.bias": torch.zeros(5)}, "args": args}, path)


# What is given instead of a folder -> how to make it, and what it is called.
NO_FOLDERS = {
    "model.pt": (starter_file, "a file of torch.save"),
    "old.pt": (lambda path, tensors: path.write_bytes(pickle.dumps(1)), "a file of torch.save"),
    "model.safetensors": (lambda path, tensors: save_file(tensors, path), "a file of weights"),
    "pointer.bin": (lambda path, tensors: path.write_bytes(POINTER), "a Git LFS pointer"),
    "empty": (lambda path, tensors: path.touch(), "a file"),
    "pipe": (lambda path, tensors: os.mkfifo(path), "a pipe or device"),
}


def test_file_instead_of_a_folder(tmp_path, tensors):
    for name, (make, kind) in NO_FOLDERS.items():
        make(tmp_path / name, tensors)
        assert refusal(resolve_pretrained, str(tmp_path / name)).startswith(
            f"--pretrained {tmp_path / name}: is {kind}; expected a folder with config.json, vocab.txt and"
        )


def test_documented_way_from_a_starters_file_to_a_folder(tmp_path, tensors, monkeypatch):
    starter_file(tmp_path / "model.pt", tensors)
    (tmp_path / "encoder").mkdir()
    CONFIG.to_json(tmp_path / "encoder" / "config.json")
    code = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8").partition("```python\n")[2]
    (tmp_path / "convert.py").write_text(code.partition("```")[0])
    monkeypatch.chdir(tmp_path)
    runpy.run_path("convert.py")
    assert is_ours(BertModel.from_pretrained("encoder"))


def test_hub_name_in_the_cache_and_a_branch_with_its_commit(hub_cache, capsys):
    snapshot = fill_cache(hub_cache, "owner/tiny")
    name = f"owner/tiny@{REVISION}"
    assert resolve_pretrained(name).samefile(snapshot) and is_ours(BertModel.from_pretrained(name))
    assert capsys.readouterr().out == ""  # nothing was fetched
    for _ in range(3):  # for the tokenizer, the encoder, the head
        resolve_pretrained("owner/tiny@main")
    assert capsys.readouterr().out == (
        "warning: --pretrained owner/tiny@main: main is not a commit of 40 digits, so what it means can"
        f" change; today it is owner/tiny@{REVISION}\n"
    )


@pytest.mark.parametrize("has_safetensors", [True, False])
def test_hub_is_asked_after_the_cache_and_for_one_file_of_weights(monkeypatch, tmp_path, has_safetensors):
    filenames = ["config.json", "pytorch_model.bin", "vocab.txt"] + ["model.safetensors"] * has_safetensors
    steps = []

    def snapshot_download(repo_id, revision, allow_patterns, local_files_only=False, dry_run=False):
        assert (repo_id, revision) == ("owner/tiny", "v1")
        assert {"config.json", "model.safetensors", "vocab.txt"} < set(allow_patterns)
        # Only tensors and settings: no pattern can match anything else.
        ends = (".json", ".safetensors", ".bin", ".txt")
        assert all(name.endswith(ends) and not {"*", "/"} & set(name) for name in allow_patterns)
        steps.append("cache" if local_files_only else "list" if dry_run else "fetch")
        if local_files_only:
            raise LocalEntryNotFoundError("not in the cache")
        if dry_run:
            return [SimpleNamespace(filename=filename) for filename in filenames]
        assert ("pytorch_model.bin" in allow_patterns) == (not has_safetensors)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_pretrained("owner/tiny@v1") == tmp_path
    assert steps == ["cache", "list", "fetch"]


def test_tested_revision_is_the_default_and_needs_no_bin_that_the_hub_also_has(hub_cache):
    """The first download leaves `pytorch_model.bin` out; in the hub's own list of files it is no gap."""
    revision = base_bert.HUB_REVISIONS["bert-base-uncased"]
    assert len(revision) == 40 and int(revision, 16)
    snapshot = fill_cache(hub_cache, "bert-base-uncased", revision)
    (snapshot.parent.parent / "refs" / "main").write_text(REVISION)  # the branch has moved on
    assert resolve_pretrained("bert-base-uncased").samefile(snapshot)
    files = [*(path.name for path in snapshot.iterdir()), "pytorch_model.bin"]
    listing = {name: {"size": 1, "blob_id": "0" * 40} for name in files}
    trees = snapshot.parent.parent / "trees"
    trees.mkdir()
    (trees / f"{revision}.json").write_text(json.dumps({"format_version": 1, "files": listing}))
    assert resolve_pretrained("bert-base-uncased").samefile(snapshot)


def test_damaged_cache_is_as_none_and_named_when_there_is_no_network(hub_cache):
    snapshot = fill_cache(hub_cache, "owner/tiny")

    def is_refused(revision):
        message = refusal(resolve_pretrained, f"owner/tiny@{revision}")
        start = f"--pretrained owner/tiny@{revision}: not a folder, and not available from the hub ("
        end = "expected a folder, a hub name or 'minilm' (works offline)"
        return message.startswith(start) and message.endswith(end)

    assert is_refused("f" * 40) and is_refused("v1")
    for contents in (b"", b"\xff", b"a\0b", b"../../.."):
        (snapshot.parent.parent / "refs" / "main").write_bytes(contents)
        assert is_refused("main"), contents
    (snapshot / "model.safetensors").unlink()  # an interrupted download
    assert is_refused(REVISION)
