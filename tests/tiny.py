"""A tiny encoder and a few rows of data, so that whole runs take a fraction of a second."""

import csv
from pathlib import Path

import torch

from bert import BertModel
from config import TASKS, BertConfig
from kernels.flat_memory import FlatMemory
from tokenizer import SPECIAL_TOKENS, BertTokenizer
from training.sources import EXTRA_SOURCES

SAMPLE = Path(__file__).parent.parent / "data" / "sample"
SIZES = {"train": 24, "dev": 11, "test": 9}


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

    CFIMDB gets rows of SST, halved; SICK, an additional source, later rows of STS.
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
    path = folder / EXTRA_SOURCES["sick"].files[0]
    path.parent.mkdir(parents=True)
    lines = [
        f"{row['sentence1']}\t{row['sentence2']}\t{1 + float(row['similarity']) * 0.8:.2f}" for row in rows
    ]
    path.write_text("\n".join(["sentence_A\tsentence_B\trelatedness_score", *lines]) + "\n", encoding="utf-8")
    return folder


def shared_grads(memory: FlatMemory) -> torch.Tensor:
    """All task gradients of the encoder, in the order of the flat buffer, (K, P)."""
    borders = (0, memory.matrices.start, memory.matrices.stop, memory.num_shared)
    pieces = [memory._stored(slice(borders[n], borders[n + 1])) for n in range(3)]
    return torch.cat([piece.float() for piece in pieces], dim=1)
