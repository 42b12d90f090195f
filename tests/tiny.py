"""Tiny encoders, models, batches and data files, so that steps and whole runs take a fraction of a second.

Shapes: R sequences in a batch, T padded length, K tasks, P parameters of the encoder.
"""

import csv
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

from bert import BertModel
from config import DEFAULT_TASKS, TASKS, BertConfig
from heads import HEADS, MultitaskBERT
from kernels.flat_memory import FlatMemory
from multitask_classifier import StepResult, TaskBatch, train_step
from optimizer import AdamW
from support.errors import UserError
from tokenizer import SPECIAL_TOKENS, BertTokenizer
from training.settings import StepSettings
from training.sources import EXTRA_SOURCES

SAMPLE = Path(__file__).parent.parent / "data" / "sample"
SIZES = {"train": 24, "dev": 11, "test": 9}
ANY_CHARACTER = (range(128), range(128), range(0x80, 0x800), range(0x800, 0x10000), range(0x10000, 0x110000))


def refusal(function, *args) -> str:
    """The message of the UserError that a call ends in: one line, of a length that can be read."""
    try:
        function(*args)
    except UserError as error:
        message = str(error)
        assert message.isprintable() and len(message) < 600
        return message
    raise AssertionError("no UserError was raised")


def one_line(capsys) -> str:
    """What stands on standard error, which is a line."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


@contextmanager
def fresh_modules() -> Iterator[None]:
    """As in a new process: nothing of the project is imported, while torch and others still are."""
    root = SAMPLE.parent.parent
    own = {path.stem for path in root.glob("*.py")} | {path.parent.name for path in root.glob("*/*.py")}
    with patch.dict(sys.modules):
        for name in [name for name in sys.modules if name.partition(".")[0] in own - {"tests"}]:
            del sys.modules[name]
        yield


def any_text(rng: random.Random, characters: str = "") -> str:
    """Of these characters; else any, lone surrogates and unassigned ones included."""
    length = rng.randrange(40)
    if characters:
        return "".join(rng.choices(characters, k=length))
    return "".join(chr(rng.choice(rng.choice(ANY_CHARACTER))) for _ in range(length))


def make_config(vocab_size: int, **changes) -> BertConfig:
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
    return BertConfig(vocab_size=vocab_size, max_position_embeddings=64, **(settings | changes))


def make_encoder(folder: Path, seed: int = 0, **changes) -> Path:
    """Save a random encoder whose vocabulary is single letters."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,?!'\"$%-:;()/&"
    pieces = [*SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = BertTokenizer({piece: number for number, piece in enumerate(pieces)})
    torch.manual_seed(seed)
    # A larger initializer_range than BERT's, so that a few steps leave the start.
    model = BertModel(make_config(len(tokenizer), initializer_range=0.2, **changes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_data(folder: Path, start: int = 0) -> Path:
    """Copy a few rows of each file of the embedded sample, from row `start` on.

    CFIMDB gets rows of SST, halved; SICK, an additional source, later rows of STS. SST's trees branch to the
    right, with the labels 0, 1, 2, ... from the last word on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for task, spec in TASKS.items():
        for split, name in spec.files.items():
            source = name.replace("cfimdb", "sst")
            with open(SAMPLE / source, encoding="utf-8", newline="") as file:
                header, *rows = csv.reader(file, delimiter="\t")
            rows = rows[start : start + SIZES[split]]
            if task == "cfimdb" and split != "test":
                rows = [[*row[:-1], str(int(row[-1]) // 3)] for row in rows]
            with open(folder / name, "w", encoding="utf-8", newline="") as file:
                csv.writer(file, delimiter="\t", lineterminator="\n").writerows([header, *rows])
    with open(SAMPLE / TASKS["sts"].files["train"], encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))[start + 100 : start + 110]
    with open(folder / TASKS["sst"].files["train"], encoding="utf-8", newline="") as file:
        sentences = [row["sentence"].split() for row in csv.DictReader(file, delimiter="\t")]
    trees = []
    for words in sentences:
        tree = f"(0 {words[-1]})"
        for number, word in enumerate(words[-2::-1], start=1):
            tree = f"({number % 5} (2 {word}) {tree})"
        trees.append(tree + "\n")
    path = folder / EXTRA_SOURCES["sst_trees"].files[0]
    path.parent.mkdir(parents=True)
    path.write_text("".join(trees), encoding="utf-8")
    path = folder / EXTRA_SOURCES["sick"].files[0]
    path.parent.mkdir(parents=True)
    lines = [
        f"{row['sentence1']}\t{row['sentence2']}\t{1 + float(row['similarity']) * 0.8:.2f}" for row in rows
    ]
    path.write_text("\n".join(["sentence_A\tsentence_B\trelatedness_score", *lines]) + "\n", encoding="utf-8")
    return folder


# --- models, batches and steps ------------------------------------------------------------------------------


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Make every parameter matter: no zero biases, no identity LayerNorm."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in module.named_parameters():
            param.normal_(1.0 if name.endswith("LayerNorm.weight") else 0.0, 0.2, generator=generator)
    return module


def make_model(
    heads: dict[str, str] | str = "diff",
    tasks: Sequence[str] = DEFAULT_TASKS,
    dropout: bool = True,
    losses: Mapping[str, str] | None = None,
    **options,
) -> MultitaskBERT:
    """A multitask model with random weights; `heads` by task, or one for all pairs."""
    torch.manual_seed(1)
    if isinstance(heads, str):
        heads = {task: heads if TASKS[task].is_pair else "single" for task in tasks}
    bert = BertModel(make_config(50, initializer_range=0.2))
    specs = {task: replace(TASKS[task], loss=(losses or {}).get(task)) for task in tasks}
    model = MultitaskBERT(bert, specs, heads, **options)
    if not dropout:
        for module in model.modules():
            if hasattr(module, "dropout_prob"):
                module.dropout_prob = 0.0
    return model


def make_batch(task: str, head: str = "diff", size: int = 3, seed: int = 0, positions: int = 7) -> dict:
    """A random batch of a task with padding on the right, as `TaskData.batch` makes it."""
    rng = np.random.default_rng(seed)
    num_sequences = size * (HEADS[head].num_inputs if TASKS[task].is_pair else 1)
    lengths = rng.integers(min(3, positions), positions + 1, (num_sequences, 1))
    mask = torch.from_numpy((np.arange(positions) < lengths).astype(np.int64))  # (R, T)
    low, high = TASKS[task].label_range
    return {
        "input_ids": torch.from_numpy(rng.integers(5, 50, (num_sequences, positions))) * mask,
        "attention_mask": mask,
        "token_type_ids": torch.zeros_like(mask),
        "labels": torch.from_numpy(rng.integers(low, high + 1, size).astype(np.float32)),
    }


def make_task_batches(tasks: Sequence[str] = DEFAULT_TASKS, head: str = "diff") -> list[TaskBatch]:
    """One batch of each task, in one piece."""
    return [TaskBatch(task, [make_batch(task, head, seed=number)]) for number, task in enumerate(tasks)]


def make_training(
    model: MultitaskBERT, lr: float = 0.01, layer_decay: float = 1.0, **options
) -> tuple[FlatMemory, AdamW]:
    memory = model.move_to_flat_memory()
    return memory, AdamW(memory.param_groups(lr, lr, 0.01, layer_decay), lr=lr, **options)


def take_step(
    training: tuple, task_batches: Sequence[TaskBatch], *, step: int = 0, learned=None, **settings
) -> StepResult:
    """`train_step` with a model, its memory and its optimizer, and `StepSettings` written out."""
    settings = StepSettings(**{"seed": 0, **settings})
    return train_step(*training, task_batches, settings, step=step, learned=learned)


def shared_grads(memory: FlatMemory) -> torch.Tensor:
    """All task gradients of the encoder, in the order of the flat buffer, (K, P)."""
    pieces = [memory.stored_grads(section) for section in memory.layout.sections]
    return torch.cat([memory.other_grads[:, :0].float(), *(piece.float() for piece in pieces)], dim=1)


def make_sst_model(tokenizer: BertTokenizer, seed: int = 0) -> MultitaskBERT:
    """The smallest model there is: one sentence task."""
    torch.manual_seed(seed)
    return MultitaskBERT(BertModel(make_config(len(tokenizer))), {"sst": TASKS["sst"]}, {"sst": "single"})
