"""What several ranks cost: bytes a rank sends in a step, and when gradient surgery costs more than a sum.

    python -m benchmarks.scale                                # the model: 8 GPUs in a node, 64 over a network
    python -m benchmarks.scale --network_gb 1.5 --step_ms 8   # other assumptions, all of which are flags
    python -m benchmarks.scale --measure --data_dir data      # two processes on two cores, one on both

The model of a step on N GPUs, each with the same number of examples whatever N is:

    bytes      rows x (D x bytes of a gradient + 4 x (rest + words x H)), rows: tasks for surgery, 1 for a sum
    messages   2 (N - 1) / N x bytes / bandwidth + 2 log2(N) x latency x number of messages    (ring, tree)
    step       computing + messages; with overlap computing + max(messages - backward, the last bucket)

D is what linear layers hold, `words` how many different words a step has. A sum by torch's DDP would send the
whole table of word embeddings; here neither does. Figures that were measured with it: docs/scale.md.
"""

if __name__ == "__main__":
    from support.interrupts import end_quietly
    from support.threads import share_cores

    end_quietly()
    share_cores()  # before torch is imported

import argparse
import math
import os
import socket
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial

import torch

from benchmarks.workers import Worker
from support.command_line import OneLineParser, number, run_script
from support.ranks import ONE, Ranks, connect
from training.run_parser import PRECISION_HELP, PRECISION_NAMES

COUNT, AMOUNT = number(int, 1), number(float, 0, low_open=True)


@dataclass(frozen=True)
class Encoder:
    """Sizes of an encoder, and how long a step takes on one GPU, without messages."""

    linear: int  # D, weights of linear layers
    rest: int  # tables of positions and segments, biases, LayerNorm
    width: int  # H
    words: dict[int, int]  # number of GPUs -> different words in a step, counted on the course's files
    step_ms: float


# bert-base with 64 examples a task and GPU, MiniLM with 16; times as in docs/gpu.md, of an H200.
ENCODERS = {
    "bert-base": Encoder(84_934_656, 516_096, 768, {8: 6668, 64: 16_478}, 12.0),
    "MiniLM": Encoder(10_616_832, 228_096, 384, {8: 2784, 64: 9485}, 2.0),
}


@dataclass(frozen=True)
class Place:
    """How ranks are connected."""

    size: int  # ranks
    bandwidth: float  # bytes a second that a rank sends, while all do
    latency: float  # seconds


def message_bytes(encoder: Encoder, rows: int, words: int, grad_bytes: int) -> int:
    """What is summed over the ranks in a step."""
    return rows * (encoder.linear * grad_bytes + (encoder.rest + words * encoder.width) * 4)


def message_seconds(place: Place, num_bytes: float, num_messages: int) -> float:
    """Time to sum so many bytes over all ranks."""
    sent = 2 * (place.size - 1) / place.size * num_bytes
    return sent / place.bandwidth + 2 * math.log2(place.size) * place.latency * num_messages


def step_seconds(encoder: Encoder, place: Place, rows: int, words: int, args, overlap: bool = False) -> float:
    """Time of a step; a backward pass takes two thirds of its computing."""
    computing = encoder.step_ms / 1000
    num_bytes = message_bytes(encoder, rows, words, args.grad_bytes)
    if not overlap:
        return computing + message_seconds(place, num_bytes, rows + 1)
    num_buckets = max(1, math.ceil(num_bytes / (args.bucket_mb * 1e6)))
    seconds = message_seconds(place, num_bytes, num_buckets)
    return computing + max(seconds - computing * 2 / 3, seconds / num_buckets)


def show_model(args: argparse.Namespace) -> None:
    places = {
        "8 in a node": Place(8, args.node_gb * 1e9, args.node_us * 1e-6),
        "64 over a network": Place(64, args.network_gb * 1e9, args.network_us * 1e-6),
    }
    columns = ("encoder", "GPUs", "MB sent, sum", "surgery", "step ms, sum", "surgery", "ratio")
    print("| " + " | ".join([*columns, "with overlap", "even at GB/s"]) + " |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, encoder in ENCODERS.items():
        if args.step_ms:
            encoder = Encoder(**{**vars(encoder), "step_ms": args.step_ms})
        for where, place in places.items():
            words = args.words or encoder.words[place.size]
            ring = 2 * (place.size - 1) / place.size
            sent = [ring * message_bytes(encoder, rows, words, args.grad_bytes) for rows in (1, args.tasks)]
            plain, surgery = (step_seconds(encoder, place, rows, words, args) for rows in (1, args.tasks))
            hidden = [
                step_seconds(encoder, place, rows, words, args, overlap=True) for rows in (1, args.tasks)
            ]
            # Where the further rows take a twentieth of the time of computing.
            even = (sent[1] - sent[0]) / (0.05 * encoder.step_ms / 1000)
            cells = [name, where, *(f"{each / 1e6:.0f}" for each in sent)]
            cells += [f"{1000 * plain:.1f}", f"{1000 * surgery:.1f}", f"{surgery / plain:.2f}"]
            print("| " + " | ".join([*cells, f"{hidden[1] / hidden[0]:.2f}", f"{even / 1e9:.0f}"]) + " |")


# --- two processes against one ------------------------------------------------------------------------------


@dataclass(frozen=True)
class CountingRanks(Ranks):
    """Notes what is sent."""

    messages: list[int] = field(default_factory=list)

    def sum(self, tensor: torch.Tensor) -> None:
        self.messages.append(tensor.nbytes)
        super().sum(tensor)


@dataclass(frozen=True)
class Setting:
    """One process of a contender."""

    rank: int
    size: int
    port: int
    num_threads: int
    argv: tuple[str, ...]


class Trainer:
    """Makes the steps of a run, as one of `size` ranks."""

    def __init__(self, setting: Setting):
        self.setting = setting

    def start(self) -> None:
        """Join the others, and build the run."""
        from datasets import BatchOrder, plan_tasks
        from multitask_classifier import Steps
        from training.flags import get_args
        from training.resolve import data_settings, make_settings, resolve_args, resolve_machine
        from training.run_data import load_encoder, make_model, read_data, tokenize_split
        from training.run_folder import Run

        own = self.setting
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(own.port)}
        os.environ |= {"RANK": str(own.rank), "WORLD_SIZE": str(own.size)}
        found = connect("benchmarks.scale") if own.size > 1 else ONE
        self.ranks = CountingRanks(found.rank, found.size, found.watch)
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (to the end of the process)
        args = get_args(list(own.argv))
        resolve_machine(args)
        rows, _ = read_data(data_settings(args))
        bert, tokenizer = load_encoder(args.pretrained, None)
        resolve_args(args, bert.config, {task: len(each.ids) for task, each in rows["train"].items()})
        settings = make_settings(args, self.ranks)
        self.run = Run(settings, make_model(settings.model, bert), tokenizer)
        data, loop = tokenize_split(settings.tokens, rows["train"], tokenizer), settings.loop
        self.orders = {
            task: BatchOrder(each.lengths, loop.batch_sizes[task], loop.seed, task)
            for task, each in data.items()
        }
        self.plan = plan_tasks(loop.sampler, [len(each) for each in data.values()], loop.max_steps, loop.seed)
        self.steps = Steps(self.run, data)
        self.run.model.train()

    def make_steps(self, count: int) -> tuple[float, int, list[int]]:
        """Seconds of so many steps, the word pieces in them, and the sizes of the messages of the last."""
        from multitask_classifier import draw_examples

        state, num_tokens, started = self.run.state, 0, time.perf_counter()
        for _ in range(count):
            self.ranks.messages.clear()
            loop = self.run.settings.loop
            examples = draw_examples(loop, self.plan[state.step], self.orders, state.batches_drawn)
            self.steps.start(examples)
            num_tokens += self.steps.record(wait=True)
        return time.perf_counter() - started, num_tokens, list(self.ranks.messages)

    def leave(self) -> None:
        if self.ranks.watch:
            self.ranks.watch.stop()


def make_groups(args: argparse.Namespace, folder: str) -> dict[str, list[Worker]]:
    """Name -> processes of a contender, which have built nothing yet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = {"data_dir": args.data_dir, "pretrained": args.pretrained, "output_dir": f"{folder}/run"}
    flags |= {"batch_size": args.batch_size, "precision": args.precision, "max_steps": 10_000}
    flags |= {"device": "cpu", "compile": "off"}
    argv = tuple(str(word) for name, value in flags.items() for word in (f"--{name}", value))
    settings = {
        "one process": [Setting(0, 1, port, args.cores, argv)],
        f"{args.cores} processes": [Setting(rank, args.cores, port, 1, argv) for rank in range(args.cores)],
    }
    return {
        name: [Worker(f"{name}, rank {each.rank}", Trainer, each) for each in group]
        for name, group in settings.items()
    }


def call_all(group: list[Worker], *message) -> list:
    """Let all processes do the same at the same time; what each returns."""
    for worker in group:
        worker.send(*message)
    return [worker.receive() for worker in group]


def measure(args: argparse.Namespace) -> None:
    """One process with `--cores` threads and as many processes with one thread each, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        groups = make_groups(args, folder)
        for group in groups.values():
            call_all(group, "start")
            call_all(group, "make_steps", 2)  # a warm-up
        seconds = {name: [] for name in groups}
        for _ in range(args.rounds):
            for name, group in groups.items():
                found = call_all(group, "make_steps", args.steps)
                seconds[name].append(max(each[0] for each in found) / args.steps)
        for group in groups.values():
            call_all(group, "leave")
            for worker in group:
                worker.close()
    for name, each in seconds.items():
        low, middle, high = (1000 * value for value in statistics.quantiles(each, n=4))
        print(f"{name}: {middle:.0f} ms a step (quartiles {low:.0f} and {high:.0f})")
    ratios = [many / one for one, many in zip(*seconds.values(), strict=True)]
    print(f"ratio in a round: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    _, num_tokens, sent = found[0]  # of the last group, in its last turn
    parts = f"{len(sent)} messages, the largest of {max(sent) / 1e6:.2f} MB"
    print(
        f"{num_tokens / args.steps:.0f} word pieces a step; to be summed: {sum(sent) / 1e6:.2f} MB in {parts}"
    )


def get_args(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="benchmarks.scale",
        description="What several ranks cost: a model, or two processes against one.",
    )
    add = parser.add_argument
    add("--tasks", type=COUNT, default=3, help="rows that surgery sends (default: 3)")
    add(
        "--grad_bytes",
        type=int,
        choices=(2, 4),
        default=2,
        help="of a gradient of a linear weight: bf16 has 2 (default: 2)",
    )
    add("--words", type=COUNT, help="different words in a step (default: as counted, see ENCODERS)")
    add("--step_ms", type=AMOUNT, help="computing of a step on one GPU (default: the encoder's)")
    add("--node_gb", type=AMOUNT, default=300.0, help="GB/s that a GPU sends within a node (default: 300)")
    add("--node_us", type=AMOUNT, default=5.0, help="latency within a node, microseconds (default: 5)")
    add(
        "--network_gb", type=AMOUNT, default=40.0, help="GB/s that a GPU sends over the network (default: 40)"
    )
    add("--network_us", type=AMOUNT, default=15.0, help="latency of the network, microseconds (default: 15)")
    add(
        "--bucket_mb",
        type=AMOUNT,
        default=25.0,
        help="of messages that go during the backward pass (default: 25)",
    )
    add("--measure", action="store_true", help="time processes on this machine instead")
    add("--data_dir", default="data/sample", help="what to train on (default: data/sample)")
    add("--pretrained", default="minilm", help="encoder (default: minilm)")
    add("--precision", choices=PRECISION_NAMES, default="fp32", help=f"{PRECISION_HELP} (default: fp32)")
    add("--batch_size", type=COUNT, default=16, help="examples of a task in a step (default: 16)")
    add(
        "--cores",
        type=COUNT,
        default=2,
        help="threads of the one process, and number of the others (default: 2)",
    )
    add("--steps", type=COUNT, default=3, help="steps in a turn (default: 3)")
    add("--rounds", type=COUNT, default=5, help="turns (default: 5)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = get_args(argv)
    return run_script("benchmarks.scale", partial(measure if args.measure else show_model, args))


if __name__ == "__main__":
    sys.exit(main())
