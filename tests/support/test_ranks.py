"""Steps, evaluations and whole runs of two and three processes against those of one; gloo on the CPU.

All without dropout, of which each rank draws its own. Float32, whose sums are taken in another order:
gradients differ by some 1e-7, which a large eps of AdamW keeps from growing.
"""

import json
import multiprocessing
import os
import socket
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import multitask_classifier
from datasets import Rows, tokenize
from evaluation import predict_logits
from kernels.grad_methods import GRAD_METHODS
from kernels.loss_weightings import LOSS_WEIGHTINGS
from multitask_classifier import TaskBatch
from support.device import make_autocast
from support.ranks import ONE, Ranks, join_ranks
from tests.tiny import make_batch, make_data, make_encoder, make_model, make_training, take_step
from tests.training.test_captured_step import Pair
from tokenizer import BertTokenizer
from training import pretrain_mlm

SIZES = (2, 3)
EVEN = [("sst", [6]), ("para", [6]), ("sts", [6])]
# Batches that do not divide; a task with fewer examples than ranks; accumulated, and drawn twice.
UNEVEN = [("sst", [5]), ("para", [4]), ("sts", [1])]
ACCUMULATED = [("sst", [5, 2]), ("sts", [1, 1]), ("sst", [3, 4])]
FOUR = [*UNEVEN, ("cfimdb", [2])]  # of three, `krum` would choose among equals
STEPS = {name: (FOUR, {"grad_method": name}, {"tasks": [task for task, _ in FOUR]}) for name in GRAD_METHODS}
STEPS |= {name: (UNEVEN, {"loss_weighting": name}, {}) for name in LOSS_WEIGHTINGS}
STEPS |= {
    "even": (EVEN, {"clip_norm": 0.5}, {}),
    "accumulated": (ACCUMULATED, {"task_weights": {"sst": 0.3}}, {}),
    "one example": ([("para", [1])], {}, {}),
    "frozen": (UNEVEN, {"clip_norm": 0.1}, {"freeze_encoder": True}),
    "by layer": (UNEVEN, {"surgery_scope": "layer"}, {"pooling": "pooler"}),
    "loss scale": (UNEVEN, {"loss_scale": 2**10, "autocast": make_autocast("cpu", "fp32")}, {}),
    "NaN": (UNEVEN, {}, {}),
}


def take_steps(name: str, ranks: Ranks) -> dict[str, torch.Tensor]:
    """What two steps of a row of STEPS leave, the first of "NaN" being skipped; of a method, one."""
    draws, settings, options = STEPS[name]
    model = make_model(dropout=False, **options).train()
    memory, optimizer = make_training(model, lr=0.01, eps=1e-4)
    start, learned, left = memory.data.clone(), None, {}
    for step in range(1 if name in GRAD_METHODS else 2):
        batches = [
            TaskBatch(
                task, [make_batch(task, size=size, seed=10 * step + k + i) for i, size in enumerate(sizes)]
            )
            for k, (task, sizes) in enumerate(draws)
        ]
        if name == "NaN" and step == 0:
            batches[2].micro_batches[0]["labels"][0] = np.nan
        training = (model, memory, optimizer)
        result = take_step(training, batches, step=step, learned=learned, ranks=ranks, **settings)
        learned = result.learned
        assert result.applied == (name != "NaN" or step == 1), name
        left[f"losses {step}"] = result.losses
        if result.applied:
            left[f"gram {step}"] = result.gram / result.gram.diagonal().max().clamp(min=1e-9)
            left[f"tokens {step}"] = torch.tensor(result.num_tokens)
    return left | {"moved": memory.data - start}


def static_steps(ranks: Ranks) -> dict[str, torch.Tensor]:
    """Steps of static shape, as a GPU makes them; they are compared with plain ones on the way."""
    pair = Pair(ranks=ranks, clip_norm=1.0)
    results = [pair.steps(1, sizes=sizes) for sizes in ((4,), (2, 1), (1,))]
    return {"losses": torch.stack([each.losses for each in results]), "weights": pair.static_training[0].data}


def all_steps(ranks: Ranks) -> dict[str, torch.Tensor]:
    """By name what the rows of STEPS leave; methods and weightings, which see sums alone, not of 3 ranks."""
    left = {f"static: {key}": value for key, value in static_steps(ranks).items()}
    for name in STEPS:
        if ranks.size < 3 or name not in (*GRAD_METHODS, *LOSS_WEIGHTINGS):
            left |= {f"{name}: {key}": value for key, value in take_steps(name, ranks).items()}
    return left


def logits(ranks: Ranks, folder: Path) -> dict:
    """Of 40 sentences in several batches; the same bits, whoever encodes which."""
    tokenizer = BertTokenizer.from_pretrained(folder / "encoder")
    texts = [(f"{'abc ' * (n % 9)} {n}",) for n in range(40)]
    data = tokenize(
        Rows(Path(), [str(n) for n in range(40)], texts, None), tokenizer, joint=False, max_length=64
    )
    model = make_model(dropout=False)
    torch.manual_seed(0)
    model.bert.embeddings.word_embeddings.weight = torch.nn.Parameter(torch.randn(len(tokenizer), 32))
    return {"logits": predict_logits(model, "sst", data, 0, ranks=ranks)}


# --- whole runs ---------------------------------------------------------------------------------------------


def train(folder: Path, output: str, flags: str) -> None:
    flags += " --batch_size 4 --eval_every 2 --device cpu --compile off --precision fp32 --log_every 1"
    flags += " --hidden_dropout_prob 0 --schedule constant --warmup_steps 0"
    run_quietly(multitask_classifier.main, folder, output, flags)


def pretrain(folder: Path, output: str) -> None:
    flags = "--batch_size 5 --max_steps 4 --device cpu --precision fp32"
    run_quietly(pretrain_mlm.main, folder, output, flags)


def run_quietly(main: Callable, folder: Path, output: str, flags: str) -> None:
    places = {"pretrained": folder / "encoder", "data_dir": folder / "data", "output_dir": folder / output}
    argv = [word for name, place in places.items() for word in (f"--{name}", str(place))]
    with redirect_stdout(StringIO()):
        assert main([*argv, *flags.split()]) == 0


def run_whole(folder: Path, size: int) -> None:
    """Four steps in one go."""
    train(folder, f"whole{size}", "--max_steps 4")


def run_resumed(folder: Path, size: int) -> None:
    """What one process has begun goes on with several."""
    train(folder, "resumed", "--resume --max_steps 4")


def run_pretraining(folder: Path, size: int) -> None:
    pretrain(folder, f"mlm{size}")


# --- groups of processes ------------------------------------------------------------------------------------


def compute(folder: Path, size: int) -> None:
    with join_ranks("test") as ranks:
        found = all_steps(ranks) | logits(ranks, folder)
    torch.save(found, folder / f"{ranks.rank} of {size}")


def be_rank(rank: int, size: int, port: int, work: Callable, folder: Path) -> None:
    torch.set_num_threads(1)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), **address}
    work(folder, size)


def start_group(size: int, work: Callable, folder: Path) -> None:
    context = multiprocessing.get_context("fork")  # of this process, which has imported everything
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = [context.Process(target=be_rank, args=(rank, size, port, work, folder)) for rank in range(size)]
    for process in group:
        process.start()
    for process in group:
        process.join(300)
    assert [process.exitcode for process in group] == [0] * size


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    make_encoder(folder / "encoder", attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)
    make_data(folder / "data")
    return folder


@pytest.mark.slow
def test_steps_and_logits_of_two_and_three_ranks_are_those_of_one(folder):
    expected = all_steps(ONE) | logits(ONE, folder)
    for size in SIZES:
        start_group(size, compute, folder)
        by_rank = [torch.load(folder / f"{rank} of {size}") for rank in range(size)]
        for name in by_rank[0]:
            found, values = [values_of[name] for values_of in by_rank], expected[name]
            for other in found[1:]:  # every rank has the same weights, to the bit
                torch.testing.assert_close(other, found[0], rtol=0, atol=0, equal_nan=True, msg=name)
            atol = 0 if name == "logits" else 2e-5
            torch.testing.assert_close(found[0], values, rtol=1e-4, atol=atol, equal_nan=True, msg=name)


@pytest.mark.slow
def test_runs_of_two_and_three_ranks_and_resumed_ones_are_those_of_one(folder):
    train(folder, "whole1", "--max_steps 4")
    train(folder, "resumed", "--max_steps 2")
    pretrain(folder, "mlm1")
    for size, work in ((2, run_whole), (3, run_resumed), (2, run_pretraining)):
        start_group(size, work, folder)
    names = ["last/model.safetensors", "last/optimizer.safetensors", "best/model.safetensors"]
    pairs = [(f"{run}/{name}", f"whole1/{name}") for run in ("whole2", "resumed") for name in names]
    pairs.append(("mlm2/model.safetensors", "mlm1/model.safetensors"))
    for found, expected in pairs:
        tensors, wanted = load_file(folder / found), load_file(folder / expected)
        for name, tensor in wanted.items():
            torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=2e-5, msg=f"{found} {name}")
    lines = [json.loads(line) for line in (folder / "resumed" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 2, 3, 4, 4]  # written once
    files = [sorted(path.name for path in (folder / run).rglob("*")) for run in ("whole1", "whole2")]
    assert files[0] == files[1]
