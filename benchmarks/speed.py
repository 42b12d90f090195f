"""Measure our speed against its peers and against the machine, and write the page results/speed.md.

    python -m benchmarks.speed --data_dir data               # all sections, over two hours on two cores
    python -m benchmarks.speed step --data_dir data/sample --repeats 2 --num_batches 4

A section's measurements go to speed.json, replaced when the section is run again; the page is made from it.
The contenders are in contenders.py, how they take turns in workers.py, the page and its targets in page.py.

Shapes: K tasks, T word pieces of a sentence, H hidden_size, I intermediate_size, P shared parameters.
"""

if __name__ == "__main__":
    from support.interrupts import end_quietly

    end_quietly()

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property, partial
from itertools import cycle, islice
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.nn import functional as F

from base_bert import resolve_pretrained
from benchmarks.contenders import (
    EVALUATE,
    MEMORY,
    OPTIMIZER,
    STEP,
    SURGERY,
    Pool,
    Setting,
    installed,
    longest_steps,
    make_pool,
    with_precisions,
)
from benchmarks.page import is_page, write_page
from benchmarks.workers import check_losses, race, race_groups, race_pair, start_workers
from bert import BertModel
from config import DEFAULT_TASKS, OFFLINE_ENCODER, TASKS, BertConfig, TaskSpec
from datasets import TaskData, TokenArrays, read_rows, tokenize
from evaluation import TASK_KINDS
from heads import HEADS
from support.command_line import OneLineParser, number, run_script
from support.device import describe_machine, is_bf16_fast, resolve_device
from support.errors import UserError
from support.files import ROOT, check_replaceable, read_json, write_text
from support.threads import SPIN_COUNT
from tokenizer import BertTokenizer
from training.flags import COUNT

# Of a task loss, in float32: sums in another order differ by some 1e-6 of a loss near 1, while another mask,
# pooling, activation or weight changes it by more than 1e-3.
LOSS_TOLERANCE = 1e-4
PROFILE_STEPS = 5
EVALUATION_ROUNDS = 2  # at most; one takes minutes
AGREEMENT_EXAMPLES = 500  # per task, for predictions in float32
FRACTIONS = (0.25, 0.5, 1.0)  # of the training data
LENGTHS = (16, 32, 64, 128)  # word pieces
NUM_TASKS = range(2, 9)
OURS, RANDOM = ("ours sum", "ours pcgrad"), "Hugging Face sum, random batches"
ROOFLINE_ROWS = (*OURS, RANDOM, "Hugging Face sum, our batches")
BASE_ROWS = (*OURS, "ours sum, one row", RANDOM, "Hugging Face + textbook PCGrad")
BASE_CONFIG = BertConfig()  # of the section `base`; the vocabulary is that of --pretrained
SPINNING = {"libgomp's own spinning": None, "ours": str(SPIN_COUNT)}  # of threads that wait, in `sharing`
# Of the section `memory`: a run that once took 8.8 GB on the real data.
LONG_BATCHES, LONG_HEADS, LONG_STEPS = {"sst": 32, "para": 64, "sts": 24}, {"para": "cross"}, 5
LONG_LENGTH = 512  # word pieces; training's --max_length
MATRIX_REPEATS, MEMORY_ELEMENTS, MEMORY_REPEATS = 20, 2**26, 10


class Bench:
    """What the sections of one call share: settings, data, what they measured."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.measured = args, {}
        self.folder = resolve_pretrained(args.pretrained)
        self.config = BertConfig.from_json(self.folder / "config.json")
        args.max_length = min(args.max_length, self.config.max_position_embeddings)
        self.precisions = list(dict.fromkeys((args.precision, "fp32")))
        self.tasks = {task: TASKS[task] for task in DEFAULT_TASKS}
        self.tokenizer = BertTokenizer.from_pretrained(self.folder)

    def read(
        self, split: str, heads: dict[str, str] | None = None, max_length: int | None = None
    ) -> dict[str, TaskData]:
        """One split of every task, tokenized for `heads`, where they are not the default."""
        data, max_length = {}, max_length or self.args.max_length
        for task, spec in self.tasks.items():
            rows = read_rows(Path(self.args.data_dir) / spec.files[split], spec, split)
            joint = HEADS[(heads or {}).get(task, spec.default_head)].joint
            data[task] = tokenize(rows, self.tokenizer, joint=joint, max_length=max_length)
        return data

    @cached_property
    def train_data(self) -> dict[str, TaskData]:
        return self.read("train")

    def make_pool(self, tasks: dict[str, TaskSpec], data: dict[str, TaskData]) -> Pool:
        return make_pool(
            tasks,
            data,
            self.tokenizer.pad_token_id,
            batch_size=self.args.batch_size,
            num_batches=self.args.num_batches,
            seed=self.args.seed,
        )

    @cached_property
    def pool(self) -> Pool:
        return self.make_pool(self.tasks, self.train_data)

    def setting(self, pool: Pool) -> Setting:
        args = self.args
        return Setting(pool, args.pretrained, args.device, args.num_threads, args.seed)

    def race(self, workers: dict, num_steps: int, rounds: int | None = None) -> dict[str, list[float]]:
        seconds = race(workers, rounds=rounds or self.args.repeats, num_steps=num_steps, seed=self.args.seed)
        return {name: [round(value, 6) for value in values] for name, values in seconds.items()}


def present(table: dict[str, partial]) -> tuple[dict[str, partial], dict[str, str]]:
    """`installed`, and a line for each row that is left out."""
    table, skipped = installed(table)
    for name, reason in skipped.items():
        print(f"  skipped: {name}: {reason}")
    return table, skipped


# --- sections: Bench -> what was measured, as JSON ----------------------------------------------------------


def measure_step(
    bench: Bench,
    rows: dict[str, partial] = STEP,
    precisions: list[str] | None = None,
    pretrained: str | None = None,
) -> dict:
    """Training steps of every contender on the same examples; one heat per precision, to fit in memory."""
    pool = bench.pool
    setting = replace(bench.setting(pool), pretrained=pretrained or bench.args.pretrained)
    found = {"seconds": {}, "memory": {}, "skipped": {}}
    for precision in precisions or bench.precisions:
        table, skipped = present(with_precisions(rows, [precision]))
        found["skipped"] |= skipped
        with start_workers(table, setting) as workers:
            found["losses"] = check_losses(workers, LOSS_TOLERANCE)
            found["seconds"] |= bench.race(workers, pool.num_steps)
            found["memory"] |= {
                name: round(worker.call("peak_memory"), 1) for name, worker in workers.items()
            }
            if precision == bench.args.precision:
                ours = workers[f"ours pcgrad {precision}"]
                found |= {"sizes": ours.call("sizes"), "profile": ours.call("profile", PROFILE_STEPS)}
    return found | {
        "num_steps": pool.num_steps,
        "tokens": pool.num_tokens("bucketed"),
        "places": {order: pool.num_places(order) for order in pool.orders},
        "tolerance": LOSS_TOLERANCE,
    }


def measure_base(bench: Bench) -> dict:
    """Training steps at bert-base size, with random weights, which take as long as trained ones."""
    with tempfile.TemporaryDirectory() as folder:
        BertModel(replace(BASE_CONFIG, vocab_size=bench.config.vocab_size)).save_pretrained(folder)
        bench.tokenizer.save_pretrained(folder)
        rows = {name: STEP[name] for name in BASE_ROWS}
        found = measure_step(bench, rows, [bench.args.precision], folder)
    return found | {"pretrained": "none: random weights"}


def measure_memory(bench: Bench) -> dict:
    """Peak memory in the longest training steps of an epoch, in ascending order: MiB after each."""
    max_length = min(LONG_LENGTH, bench.config.max_position_embeddings)
    data = bench.read("train", LONG_HEADS, max_length)
    pool = longest_steps(
        bench.tasks,
        data,
        bench.tokenizer.pad_token_id,
        batch_sizes=LONG_BATCHES,
        num_steps=LONG_STEPS,
        seed=bench.args.seed,
    )
    setting = replace(bench.setting(pool), heads=LONG_HEADS)
    table, skipped = present(with_precisions(MEMORY, [bench.args.precision]))
    found = {"memory": {}, "skipped": skipped, "heads": LONG_HEADS, "longest": max_length}
    for name, build in table.items():  # one after the other: together they might not fit
        print(f"  {name}", flush=True)
        found["memory"][name] = []
        with start_workers({name: build}, setting) as workers:
            for i in range(pool.num_steps):
                workers[name].call("run", i)
                found["memory"][name].append(round(workers[name].call("peak_memory"), 1))
    found["steps"] = [
        {
            task: f"{len(lengths)} x {lengths.max()}"
            for task, lengths in zip(pool.tasks, pool.lengths("longest", i), strict=True)
        }
        for i in range(pool.num_steps)
    ]
    return found


def measure_sharing(bench: Bench) -> dict:
    """A training alone, and two at the same time on the same cores, by how long waiting threads spin.

    Of one alone also in pairs, which are exact enough for a hundredth; two equal ones say how exact.
    """
    pool, build = bench.pool, partial(STEP["ours pcgrad"], precision=bench.args.precision)
    setting, groups = bench.setting(pool), {}
    with ExitStack() as stack:
        for label, count in SPINNING.items():
            environment = {"OMP_WAIT_POLICY": None, "GOMP_SPINCOUNT": count}
            table = {f"{label}, run {i}": build for i in (1, 2)}
            runs = list(stack.enter_context(start_workers(table, setting, environment)).values())
            groups |= {f"alone, {label}": runs[:1], f"two at once, {label}": runs}
        options = {"rounds": bench.args.repeats, "seed": bench.args.seed}
        seconds = race_groups(groups, **options)
        theirs, ours = (groups[f"two at once, {label}"] for label in SPINNING)
        pairs = {
            name: race_pair(*pair, num_steps=pool.num_steps, **options)
            for name, pair in (("ours", (ours[0], theirs[0])), ("control", (theirs[1], theirs[0])))
        }
    return {"num_steps": pool.num_steps, "seconds": seconds, "pairs": pairs, "skipped": {}}


def measure_updates(bench: Bench, rows: dict[str, partial]) -> dict:
    """Contenders that need no data: a round is --num_batches updates."""
    table, skipped = present(rows)
    with start_workers(table, bench.setting(Pool(bench.tasks, {}, {}, 0))) as workers:
        seconds = bench.race(workers, bench.args.num_batches)
    return {"num_steps": bench.args.num_batches, "seconds": seconds, "skipped": skipped}


def measure_evaluation(bench: Bench) -> dict:
    """All dev examples; then, whether the contenders predict the same."""
    args, data = bench.args, bench.read("dev")
    data = {task: rows.sample(args.eval_max_examples, args.seed) for task, rows in data.items()}
    table, skipped = present(with_precisions(EVALUATE, [args.precision]))
    with start_workers(
        table, bench.setting(Pool(bench.tasks, data, {}, bench.tokenizer.pad_token_id))
    ) as workers:
        seconds = bench.race(workers, 1, min(args.repeats, EVALUATION_ROUNDS))
        found = {
            (name, limit): worker.call("predictions", limit)
            for name, worker in workers.items()
            for limit in (None, AGREEMENT_EXAMPLES)
        }
    ours = next(iter(table))
    agreement = {
        name: {
            f"timed run, {args.precision}": agree(found[ours, None], found[name, None], bench.tasks),
            f"{AGREEMENT_EXAMPLES} examples a task, fp32": agree(
                found[ours, AGREEMENT_EXAMPLES], found[name, AGREEMENT_EXAMPLES], bench.tasks
            ),
        }
        for name in table
        if name != ours
    }
    examples = {task: len(rows) for task, rows in data.items()}
    return {"examples": examples, "seconds": seconds, "agreement": agreement, "skipped": skipped}


def agree(a: dict[str, np.ndarray], b: dict[str, np.ndarray], tasks: dict[str, TaskSpec]) -> dict[str, float]:
    """Task -> share of equal classes, or the largest difference between two numbers."""
    return {
        task: float((a[task] == b[task]).mean())
        if TASK_KINDS[spec.kind].is_discrete
        else float(np.abs(a[task] - b[task]).max())
        for task, spec in tasks.items()
    }


def measure_start(bench: Bench) -> dict:
    """From the start of the command to its first step; the first run also fills the cache of tokens."""
    runs = min(3, bench.args.repeats)
    return {"seconds": [first_step_seconds(bench.args, bench.args.data_dir) for _ in range(1 + runs)]}


def first_step_seconds(args: argparse.Namespace, data_dir: str | Path) -> float:
    """Seconds from the start of multitask_classifier.py to the end of its first step; it is stopped there."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-u", ROOT / "multitask_classifier.py", "--data_dir", data_dir]
        for name in ("pretrained", "batch_size", "max_length", "precision", "device", "seed"):
            command += [f"--{name}", getattr(args, name)]
        command += ["--max_steps", 1, "--log_every", 1, "--output_dir", Path(folder) / "run"]
        started, lines = time.perf_counter(), []
        process = subprocess.Popen(
            list(map(str, command)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(args.num_threads)},
        )
        with process:
            try:
                for line in process.stdout:
                    lines.append(line.strip())
                    if line.startswith("step 1/1 "):
                        return round(time.perf_counter() - started, 3)
            finally:
                process.kill()
    raise UserError(
        f"multitask_classifier.py ended before its first step: {lines[-1] if lines else 'no output'}"
    )


def measure_scaling(bench: Bench) -> dict:
    """How a step grows with tasks and with length, and start-up with the amount of data."""
    table = {name: STEP[name] for name in OURS}
    table = with_precisions(table, [bench.args.precision])

    def steps(title: str, pool: Pool) -> dict:
        print(f"  {title}", flush=True)
        with start_workers(table, bench.setting(pool)) as workers:
            seconds = bench.race(workers, pool.num_steps)
        return {"tokens": pool.num_tokens("bucketed"), "seconds": seconds}

    by_tasks, by_length, by_data = {}, {}, {}
    for count in NUM_TASKS:
        names = [f"{task}_{i}" for i, task in enumerate(islice(cycle(bench.tasks), count))]
        tasks = {name: bench.tasks[name.partition("_")[0]] for name in names}
        data = {name: bench.train_data[name.partition("_")[0]] for name in names}
        by_tasks[str(count)] = steps(f"{count} tasks", bench.make_pool(tasks, data))
    for length in LENGTHS:
        if length <= bench.config.max_position_embeddings:
            data = {task: exact_length(rows, length) for task, rows in bench.pool.data.items()}
            by_length[str(length)] = steps(f"length {length}", bench.make_pool(bench.tasks, data))
    for fraction in FRACTIONS:
        print(f"  {fraction:g} of the data", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            examples = sum(copy_fraction(bench, task, folder, fraction) for task in bench.tasks)
            seconds = [first_step_seconds(bench.args, folder) for _ in range(2)]
        by_data[f"{fraction:g}"] = {"examples": examples, "seconds": seconds}
    return {
        "num_steps": bench.pool.num_steps,
        "by_tasks": by_tasks,
        "by_length": by_length,
        "by_data": by_data,
    }


def exact_length(data: TaskData, length: int) -> TaskData:
    """As many examples, of sequences with exactly `length` word pieces: real sentences end to end."""
    ids, offsets = data.sequences.input_ids, data.sequences.offsets
    inner = np.ones(len(ids), dtype=bool)
    inner[offsets[:-1]] = inner[offsets[1:] - 1] = False  # [CLS] and [SEP]
    num_sequences = data.index.size
    sequences = np.empty((num_sequences, length), dtype=np.int32)
    sequences[:, 0], sequences[:, -1] = ids[0], ids[-1]
    sequences[:, 1:-1] = np.resize(ids[inner], (num_sequences, length - 2))
    tokens = TokenArrays(
        sequences.ravel(), np.zeros(sequences.size, dtype=np.int8), np.arange(num_sequences + 1) * length
    )
    return TaskData(data.rows, tokens, np.arange(num_sequences).reshape(data.index.shape))


def copy_fraction(bench: Bench, task: str, folder: str, fraction: float) -> int:
    """Copy the first rows of a task's training file, and its dev file; returns the rows copied."""
    spec, source = bench.tasks[task], Path(bench.args.data_dir)
    with open(source / spec.files["train"], encoding="utf-8-sig", newline="") as file:
        header, *rows = csv.reader(file, delimiter="\t")
    rows = rows[: max(1, round(fraction * len(rows)))]
    with open(Path(folder) / spec.files["train"], "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([header, *rows])
    (Path(folder) / spec.files["dev"]).write_bytes((source / spec.files["dev"]).read_bytes())
    return len(rows)


# --- roofline: what the machine could do --------------------------------------------------------------------


def step_flops(config: BertConfig, lengths: np.ndarray) -> int:
    """Floating-point operations that a training step on sentences of these lengths cannot do without.

    Linear layers: 2 per weight and word piece forward, twice that backward. Attention: two products of
    2 * T * T * H in each layer and sentence, scores and context, twice that backward. Embeddings, elementwise
    work and the heads, which see one vector a sentence, are left out.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    weights = layers * (4 * hidden**2 + 2 * hidden * config.intermediate_size)
    lengths = lengths.astype(np.int64)
    return int(6 * weights * lengths.sum() + 12 * layers * hidden * (lengths**2).sum())


def optimizer_bytes(num_params: int) -> int:
    """What AdamW must move, float32: parameter, gradient, two moments in; parameter, two moments out."""
    return 7 * 4 * num_params


def median_seconds(work: Callable, repeats: int, device: str) -> float:
    """Of one call of `work`, after three that do not count."""
    seconds = []
    for _ in range(3 + repeats):
        started = time.perf_counter()
        work()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return median(seconds[3:])


@torch.no_grad()
def matrix_rates(bench: Bench, precision: str) -> dict[str, float]:
    """Shape -> operations a second in a linear layer of the model, on one task's batch and on all."""
    hidden, inner, device = bench.config.hidden_size, bench.config.intermediate_size, bench.args.device
    steps = range(bench.pool.num_steps)
    num_tokens = [lengths.sum() for i in steps for lengths in bench.pool.lengths("bucketed", i)]
    per_task = int(np.median(num_tokens))
    dtype, rates = torch.bfloat16 if precision == "bf16" else torch.float32, {}
    for rows in (per_task, per_task * len(bench.tasks)):
        for inputs, outputs in ((hidden, hidden), (hidden, inner), (inner, hidden)):
            x = torch.randn(rows, inputs, device=device, dtype=dtype)
            weight = torch.randn(outputs, inputs, device=device, dtype=dtype)
            seconds = median_seconds(partial(F.linear, x, weight), MATRIX_REPEATS, device)
            rates[f"{rows} x {inputs} x {outputs}"] = 2 * rows * inputs * outputs / seconds
    return rates


@torch.no_grad()
def rate_in_turn(bench: Bench, precision: str) -> float:
    """Operations a second in the linear layers of a whole encoder, forward and backward, one after the other.

    Each product has its own operands, as in a training step, so that the call before has not cached them.
    """
    hidden, inner, device = bench.config.hidden_size, bench.config.intermediate_size, bench.args.device
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    num_rows, products, work = bench.pool.num_tokens("bucketed") // bench.pool.num_steps, [], 0
    for _ in range(bench.config.num_hidden_layers):
        for inputs, outputs in ((hidden, 3 * hidden), (hidden, hidden), (hidden, inner), (inner, hidden)):
            x = torch.randn(num_rows, inputs, device=device, dtype=dtype)
            dy = torch.randn(num_rows, outputs, device=device, dtype=dtype)
            weight = torch.randn(outputs, inputs, device=device, dtype=dtype)
            products += [(x, weight.t()), (dy, weight), (dy.t(), x)]
            work += 6 * num_rows * inputs * outputs

    def all_products():
        for a, b in products:
            torch.mm(a, b)

    return work / median_seconds(all_products, MEMORY_REPEATS, device)


def memory_bandwidth(device: str) -> float:
    """Bytes a second, read and written, when a large float32 tensor is changed in place."""
    tensor = torch.ones(MEMORY_ELEMENTS, device=device)
    return 2 * 4 * MEMORY_ELEMENTS / median_seconds(tensor.neg_, MEMORY_REPEATS, device)


def measure_roofline(bench: Bench) -> dict:
    """The least time of a step, and the share of it in what the contenders take."""
    rates = {precision: matrix_rates(bench, precision) for precision in bench.precisions}
    in_turn = {precision: rate_in_turn(bench, precision) for precision in bench.precisions}
    bandwidth = memory_bandwidth(bench.args.device)
    step = bench.measured.get("step") or measure_step(bench, {name: STEP[name] for name in ROOFLINE_ROWS})
    names = [name for name in step["seconds"] if name.rpartition(" ")[0] in ROOFLINE_ROWS]
    lengths = [np.concatenate(bench.pool.lengths("bucketed", i)) for i in range(bench.pool.num_steps)]
    flops = sum(step_flops(bench.config, of_step) for of_step in lengths) / len(lengths)
    memory = optimizer_bytes(step["sizes"]["all"]) / bandwidth
    limits = {precision: flops / max(rates[precision].values()) + memory for precision in bench.precisions}
    return {
        "rates": rates,
        "rates_in_turn": in_turn,
        "limits_in_turn": {precision: flops / rate + memory for precision, rate in in_turn.items()},
        "bandwidth": bandwidth,
        "flops": flops,
        "memory_seconds": memory,
        "limits": limits,
        "num_steps": step["num_steps"],
        "seconds": {name: step["seconds"][name] for name in names},
    }


SECTIONS: dict[str, Callable[[Bench], dict]] = {
    "step": measure_step,
    "base": measure_base,
    "memory": measure_memory,
    "sharing": measure_sharing,
    "optimizer": partial(measure_updates, rows=OPTIMIZER),
    "surgery": partial(measure_updates, rows=SURGERY),
    "evaluate": measure_evaluation,
    "start": measure_start,
    "scaling": measure_scaling,
    "roofline": measure_roofline,
}


# --- the command --------------------------------------------------------------------------------------------


def section_name(text: str) -> str:
    if text not in SECTIONS:
        raise argparse.ArgumentTypeError(f"section is {text!r}; expected some of {', '.join(SECTIONS)}")
    return text


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line and fit --device, --precision and --num_threads to this machine."""
    parser = OneLineParser(
        prog="benchmarks.speed",
        description="Measure our speed against its peers and against the machine; write results/speed.md.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    sections = f"out of {', '.join(SECTIONS)}"
    parser.add_argument(
        "sections", nargs="*", type=section_name, default=list(SECTIONS), metavar="SECTION", help=sections
    )
    data = parser.add_argument_group("data").add_argument
    data("--data_dir", default="data", metavar="DIR", help="folder with the data files")
    data("--max_length", type=number(int, 3), default=128, help="word pieces")
    data("--batch_size", type=COUNT, default=16, help="examples per task and step")
    data("--num_batches", type=COUNT, default=12, help="different steps, each timed in every round")
    data("--eval_max_examples", type=COUNT, help="dev examples per task in evaluate; None means all")
    model = parser.add_argument_group("model").add_argument
    encoder = "encoder, as in multitask_classifier.py"
    model("--pretrained", default=OFFLINE_ENCODER, metavar="NAME|DIR", help=encoder)
    precision = "of matrix products, measured beside fp32; auto: bf16 where the processor is fast at it"
    model("--precision", choices=("auto", "fp32", "bf16"), default="auto", help=precision)
    machine = parser.add_argument_group("machine").add_argument
    machine("--device", default="auto", help="auto, cpu, cuda, ...")
    machine("--num_threads", type=COUNT, help="of each contender; None means torch's choice")
    output = parser.add_argument_group("output").add_argument
    output("--repeats", type=COUNT, default=5, help="timed rounds")
    output("--seed", type=number(int, 0, 2**32 - 1), default=11711, help="of examples, dropout and turns")
    output("--results_dir", default="results", metavar="DIR", help="where speed.md and speed.json go")
    args = parser.parse_args(argv)
    device = resolve_device(args.device)
    args.device = str(device)
    if args.precision == "auto":
        args.precision = "bf16" if is_bf16_fast(device) else "fp32"
    args.num_threads = args.num_threads or torch.get_num_threads()
    return args


def is_record(path: Path) -> bool:
    """Whether a file is there and holds what this command measured."""
    return path.exists() and path.stat().st_size > 0 and set(read_json(path)) <= set(SECTIONS)


def run(argv: list[str] | None) -> None:
    args = get_args(argv)
    torch.set_num_threads(args.num_threads)
    path = Path(args.results_dir) / "speed.json"
    check_replaceable(path, "record of measurements", is_record, "--results_dir")
    check_replaceable(path.with_name("speed.md"), "page of measurements", is_page, "--results_dir")
    bench, stored = Bench(args), read_json(path) if is_record(path) else {}
    facts = {
        "command": ["python", "-m", "benchmarks.speed", *(sys.argv[1:] if argv is None else argv)],
        "machine": describe_machine(args.device),
        "torch": torch.__version__,
        **{name: getattr(args, name) for name in ("precision", "pretrained", "batch_size", "max_length")},
    }
    for section in (name for name in SECTIONS if name in args.sections):
        print(section, flush=True)
        bench.measured[section] = SECTIONS[section](bench)
        stored[section] = facts | bench.measured[section]
        write_text(path, json.dumps(stored, indent=1) + "\n")
        write_page(path.with_name("speed.md"), stored)  # after each section: a later one may fail
    print(f"written: {path.with_name('speed.md')}, {path}")


def main(argv: list[str] | None = None) -> int:
    return run_script("benchmarks.speed", partial(run, argv))


if __name__ == "__main__":
    sys.exit(main())
