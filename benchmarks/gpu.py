"""Check our step on a GPU, time it beside its peers, and write the page results/gpu.md; four minutes.

    python -m benchmarks.gpu --data_dir data                  # on a machine with a GPU, all that is needed
    python -m benchmarks.gpu --data_dir data/sample --device cpu     # without: a trial of this command itself

The work is a list of jobs, the most important first. Each starts only if its time is left, is broken off at
the end of --seconds, and costs one line if it fails. The checks are in gpu_checks.py, the contenders in
contenders.py, the page in gpu_page.py.

Without a GPU everything is tiny, and twins in plain operations stand in for the Triton kernels: such numbers
mean nothing, and never go to results/.

Shapes: B examples of each task, R sequences.
"""

if __name__ == "__main__":
    from support.interrupts import end_quietly

    end_quietly()

import argparse
import gc
import importlib.metadata
import json
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from statistics import median

import numpy as np
import torch

from base_bert import resolve_pretrained
from benchmarks.contenders import (
    EVALUATE,
    GPU_STEP,
    OursCaptured,
    Pool,
    Setting,
    StepContender,
    installed,
    make_pool,
)
from benchmarks.gpu_checks import CASES, CHECKS, CHECKS_OF_ALL, NUM_FIRST, TOLERANCES, Case, Lab
from benchmarks.gpu_page import is_page, make_page, write_page
from bert import BertModel
from config import DEFAULT_TASKS, OFFLINE_ENCODER, TASKS, BertConfig
from datasets import Rows, TaskData, read_rows, tokenize
from support.command_line import OneLineParser, number, run_script
from support.device import describe_machine, is_bf16_fast, resolve_device
from support.errors import UserError
from support.files import ROOT, check_replaceable, read_json, write_text
from tokenizer import BertTokenizer

MAX_LENGTH = 128  # word pieces
SEED = 11711
LOSS_TOLERANCE = 1e-3  # between contenders, float32 without dropout; GPUs sum in yet other orders
MIN_WINDOWS = 3
# Heads of MiniLM's size, whose kernels are then compiled already.
TINY = BertConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512)
TINIEST = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
PROFILE_STEPS = 5
PACKAGES = ("torch", "triton", "transformers", "torchjd")
KINDS = {  # of a profile: parts of the names of its kernels; the first that fits counts
    "attention": ("attention", "flash", "fmha", "_scaled_dot"),
    "dropout, residual sum, LayerNorm": ("norm_", "layer_norm", "dropout"),
    "gram matrix": ("gram_kernel",),
    "weighted sum and AdamW": ("combine_adamw", "adamw", "multi_tensor_apply"),
    "sums by task, embedding gradients": ("_sums_kernel", "embedding", "index"),
    "matrix products": (
        "gemm",
        "cutlass",
        "nvjet",
        "xmma",
        "cublas",
        "::mm",
        "::addmm",
        "::bmm",
        "grouped_mm",
    ),
    "GELU": ("gelu",),
    "copies": ("memcpy", "memset", "copy", "catarray", "::cat", "fill", "zero"),
    "other element-wise work": ("elementwise", "triton_poi", "::add", "::mul", "reduce", "::sum"),
}


@dataclass(frozen=True)
class Scale:
    """How much of everything; the second one is for a trial without a GPU."""

    num_batches: dict[int, int]  # examples a task -> different steps, one pass over which is a window
    max_windows: int
    window_seconds: float  # after which no further window of a contender starts
    check_steps: int
    check_examples: int  # a task and step
    matrix_size: int
    eval_examples: int | None  # dev examples a task; None means all
    run_steps: int  # of a whole run
    tiny: BertConfig
    base: BertConfig
    smaller: BertConfig | None  # random weights in place of --pretrained; None: that itself


FULL = Scale({16: 24, 64: 12, 256: 4}, 15, 1.0, 20, 8, 8192, None, 1000, TINY, BertConfig(), None)
TRIAL = Scale({2: 2, 4: 1}, 3, 0.0, 4, 1, 256, 5, 2, TINIEST, TINIEST, TINIEST)


@dataclass
class Bench:
    """What the jobs share: data, encoders, the clock, and what was measured so far."""

    args: argparse.Namespace
    folder: Path  # for encoders of random weights
    started: float
    measured: dict = field(default_factory=dict)

    def __post_init__(self):
        self.is_cuda = torch.device(self.args.device).type == "cuda"
        self.scale = FULL if self.is_cuda else TRIAL
        self.pretrained = resolve_pretrained(self.args.pretrained)
        self.tokenizer = BertTokenizer.from_pretrained(self.pretrained)
        self.tasks = {task: TASKS[task] for task in DEFAULT_TASKS}
        self.precision = "bf16" if is_bf16_fast(torch.device(self.args.device)) else "fp32"
        for name in ("rows", "read", "encoder", "pool"):
            setattr(self, name, cache(getattr(self, name)))
        self.losses: dict[tuple[str, int], dict[str, float]] = {}

    @property
    def seconds_left(self) -> float:
        return self.args.seconds - (time.monotonic() - self.started)

    def rows(self, split: str) -> dict[str, Rows]:
        folder = Path(self.args.data_dir)
        return {task: read_rows(folder / spec.files[split], spec, split) for task, spec in self.tasks.items()}

    def read(self, split: str, limit: int | None, joint: bool = False) -> dict[str, TaskData]:
        """Tokenized examples of every task, at most `limit` of each."""
        data = {}
        for task, spec in self.tasks.items():
            data[task] = tokenize(
                take_rows(self.rows(split)[task], limit),
                self.tokenizer,
                joint=joint and spec.is_pair,
                max_length=min(MAX_LENGTH, self.config("pretrained").max_position_embeddings),
            )
        return data

    def config(self, model: str) -> BertConfig:
        own = BertConfig.from_json(self.pretrained / "config.json")
        config = {"pretrained": self.scale.smaller, "base": self.scale.base, "tiny": self.scale.tiny}[model]
        return replace(config, vocab_size=own.vocab_size) if config else own

    def encoder(self, model: str) -> str:
        """Where an encoder lies: the pretrained one, or one of random weights, which take as long."""
        if model == "pretrained" and not self.scale.smaller:
            return str(self.pretrained)
        torch.manual_seed(SEED)
        folder = self.folder / model
        BertModel(self.config(model)).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        return str(folder)

    def pool(self, size: int) -> Pool:
        """Steps of `size` examples a task, fewer of them where a data file is small."""
        num_batches = self.scale.num_batches[size]
        data = self.read("train", max(a * b for a, b in self.scale.num_batches.items()))
        num_batches = min(num_batches, *(len(rows) // size for rows in data.values()))
        return make_pool(
            self.tasks,
            data,
            self.tokenizer.pad_token_id,
            batch_size=size,
            num_batches=max(1, num_batches),
            seed=SEED,
        )

    def setting(self, model: str, pool: Pool) -> Setting:
        return Setting(pool, self.encoder(model), self.args.device, torch.get_num_threads(), SEED)

    def lab(self) -> Lab:
        size = 4 * self.scale.check_examples
        return Lab(
            {model: self.encoder(model) for model in ("tiny", "pretrained")},
            lambda joint: self.read("train", size, joint),
            self.tokenizer.pad_token_id,
            self.args.device,
            SEED,
            self.scale.check_steps,
            self.scale.check_examples,
        )

    def label(self, model: str) -> str:
        """An encoder's name on the page."""
        if not self.is_cuda:
            return f"{model} (tiny)"
        own = "MiniLM" if self.args.pretrained == OFFLINE_ENCODER else Path(self.args.pretrained).name
        return {"pretrained": own, "base": "bert-base"}[model]

    def note(self, part: str, name: str, values) -> None:
        self.measured.setdefault(part, {})[name] = values


def take_rows(rows: Rows, limit: int | None) -> Rows:
    """At most `limit` of them, drawn at random."""
    if limit is None or limit >= len(rows.ids):
        return rows
    chosen = np.sort(np.random.default_rng(SEED).permutation(len(rows.ids))[:limit])
    ids, texts = ([values[n] for n in chosen] for values in (rows.ids, rows.texts))
    return replace(rows, ids=ids, texts=texts, labels=rows.labels[chosen])


# --- jobs ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """Something to measure; it is left out if fewer than `seconds` are left."""

    title: str
    seconds: float
    work: Callable[[Bench], None]


def measure_rate(bench: Bench) -> None:
    """Operations a second in one large product, which a step's are held against."""
    size, dtype = bench.scale.matrix_size, torch.bfloat16 if bench.precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=bench.args.device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(13):
        started = time.perf_counter()
        torch.mm(a, b)
        synchronize(bench.args.device)
        seconds.append(time.perf_counter() - started)
    bench.measured["rate"] = 2 * size**3 / median(seconds[3:])
    print(f"  {bench.measured['rate'] / 1e12:.3g} TFLOP/s, {size} x {size}, {bench.precision}")


def check(bench: Bench, case: Case, names: list[str]) -> None:
    for name in names:
        gc.collect()  # not of all times while the next one is captured
        found = CHECKS[name](bench.lab(), case)
        if bench.is_cuda and not found["graphs"]:
            found |= {"ok": False, "note": "no graph was captured"}
        bench.note("checks", f"{case.name}/{name}", found)
        errors = ", ".join(f"{what} {error:.1e}" for what, error in found.get("errors", {}).items())
        print(f"  {'ok' if found['ok'] else 'NOT OK'}: {name}  {errors}")


def time_steps(bench: Bench, model: str, size: int, row: str) -> None:
    """Milliseconds a step of one contender, in windows of one pass over the pool; what it shows is noted."""
    table, skipped = installed({row: GPU_STEP[row]})
    if skipped:
        raise UserError(skipped[row])
    pool = bench.pool(size)
    contender = table[row](bench.setting(model, pool), precision=bench.precision)
    check_losses(bench, model, size, contender)
    if bench.is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    contender.warm_up()
    windows, started = [], time.perf_counter()
    while len(windows) < bench.scale.max_windows:
        if len(windows) >= MIN_WINDOWS and time.perf_counter() - started > bench.scale.window_seconds:
            break
        windows.append(time_window(contender, pool.num_steps))
    found = {"ms": [round(1000 * seconds, 4) for seconds in windows], "num_steps": pool.num_steps}
    found["tokens"] = pool.num_tokens("bucketed") / pool.num_steps
    if bench.is_cuda:
        found["memory"] = round(contender.peak_memory())
        found["reserved"] = round(torch.cuda.max_memory_reserved() / 2**20)  # graphs keep theirs
    if bench.is_cuda and isinstance(contender, OursCaptured):
        found["graphs"] = [contender.num_graphs, len(contender.captured.graphs)]
    if "rate" in bench.measured:
        seconds = median(windows)
        found["share"] = linear_flops(bench.config(model), found["tokens"]) / seconds / bench.measured["rate"]
    bench.note("times", f"{bench.label(model)}/{size}/{row}", found)
    print(f"  {median(found['ms']):.2f} ms a step, {found.get('share', 0):.1%} of the matrix rate")


def check_losses(bench: Bench, model: str, size: int, contender: StepContender) -> None:
    """Refuse a contender that computes something else than those before it."""
    losses = contender.losses()
    expected = bench.losses.setdefault((model, size), losses)
    for task, value in losses.items():
        if not abs(value - expected[task]) <= LOSS_TOLERANCE:
            raise UserError(f"its {task} loss is {value:.6f}, that of the others {expected[task]:.6f}")


def time_window(contender: StepContender, num_steps: int) -> float:
    """Seconds a step, from an idle device to an idle device, work of the host included."""
    contender.synchronize()
    started = time.perf_counter()
    for i in range(num_steps):
        contender.step(i)
    contender.synchronize()
    return (time.perf_counter() - started) / num_steps


def linear_flops(config: BertConfig, num_tokens: float) -> float:
    """Operations of a step in linear layers: 2 for each weight and word piece forward, 4 backward."""
    hidden = config.hidden_size
    weights = config.num_hidden_layers * (4 * hidden**2 + 2 * hidden * config.intermediate_size)
    return 6 * weights * num_tokens


def look_inside(bench: Bench, model: str, row: str) -> None:
    """Of some steps of a contender the waits for the device, and where the time goes, by kind of kernel."""
    size = min(bench.scale.num_batches)
    contender = GPU_STEP[row](bench.setting(model, bench.pool(size)), precision=bench.precision)
    contender.warm_up()
    num_steps = min(PROFILE_STEPS, contender.pool.num_steps)
    if bench.is_cuda:
        waits = count_waits(contender)
        bench.note("waits", f"{bench.label(model)}/{row}", waits)
        print(f"  waits for the device in a step: {waits:.1f}")
    found, kinds = {"size": size}, torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, *[kinds.CUDA] * bench.is_cuda]) as profiler:
        found["profiled_ms"] = 1000 * time_window(contender, num_steps)
    found["kinds"] = dict.fromkeys((*KINDS, "other"), 0.0)
    found["kernels"] = 0
    for event in profiler.events():
        is_kernel = event.device_type == torch.autograd.DeviceType.CUDA
        if is_kernel == bench.is_cuda and not event.is_user_annotation:
            microseconds = event.time_range.elapsed_us() if is_kernel else event.self_cpu_time_total
            found["kinds"][kernel_kind(event.name)] += microseconds / 1000 / num_steps
            found["kernels"] += 1 / num_steps
    bench.note("inside", f"{bench.label(model)}/{row}", found)
    print(f"  {found['kernels']:.0f} kernels, {sum(found['kinds'].values()):.2f} ms of work in a step")


def count_waits(contender: StepContender) -> float:
    """How often the host waits for the device in a step.

    Waits for an event are not seen, and are none: results are read many steps later.
    """
    before = torch.cuda.get_sync_debug_mode()
    contender.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for i in range(contender.pool.num_steps):
                contender.step(i)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    waits = sum("synchronizing" in str(warning.message) for warning in caught)
    return waits / contender.pool.num_steps


def kernel_kind(name: str) -> str:
    fitting = (kind for kind, parts in KINDS.items() if any(part in name.lower() for part in parts))
    return next(fitting, "other")


def measure_evaluation(bench: Bench, row: str) -> None:
    """Seconds for all dev examples, tokenized before."""
    table, skipped = installed({row: EVALUATE[row]})
    if skipped:
        raise UserError(skipped[row])
    data = bench.read("dev", bench.scale.eval_examples)
    pool = Pool(bench.tasks, data, {}, bench.tokenizer.pad_token_id)
    contender = table[row](bench.setting("pretrained", pool), precision=bench.precision)
    contender.warm_up()
    seconds = [contender.run(0) for _ in range(2)]
    found = {"seconds": seconds, "examples": sum(map(len, data.values()))}
    bench.note("evaluation", f"{bench.label('pretrained')}/{row}", found)
    print(f"  {seconds[-1]:.2f} s")


def measure_run(bench: Bench) -> None:
    """A whole run, from the command to scores and predictions, with the tokens of its data not yet kept."""
    steps, size = bench.scale.run_steps, min(bench.scale.num_batches)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "multitask_classifier.py", "--data_dir", bench.args.data_dir]
        command += [
            "--pretrained",
            bench.encoder("pretrained"),
            "--device",
            bench.args.device,
            "--batch_size",
            size,
        ]
        command += ["--max_steps", steps, "--lr", 1e-4, "--eval_every", max(1, steps // 4)]
        command += ["--eval_max_examples", 2000, "--seed", SEED, "--output_dir", Path(folder) / "run"]
        started, timeout = time.perf_counter(), max(1.0, bench.seconds_left)
        try:
            done = subprocess.run(
                list(map(str, command)), capture_output=True, text=True, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"not finished after {timeout:.0f} s") from None
    if done.returncode:
        raise UserError(f"exit code {done.returncode}: {(done.stderr.strip() or '-').splitlines()[-1]}")
    notes = [line for line in done.stdout.splitlines() if "captured" in line]
    found = {"seconds": time.perf_counter() - started, "steps": steps, "size": size, "notes": notes}
    found["model"] = bench.label("pretrained")
    bench.measured["run"] = found
    print(f"  {found['seconds']:.1f} s for {steps} steps; {'; '.join(notes) or 'no word of captured steps'}")


def plan(bench: Bench) -> list[Job]:
    """All jobs, the most important first."""

    def checks(cases, names):
        return [
            Job(f"check {case.name}", 3 * len(names), partial(check, case=case, names=names))
            for case in cases
        ]

    def times(model, sizes, rows, seconds):
        return [
            Job(
                f"time {bench.label(model)}, {size} examples a task: {row}",
                seconds,
                partial(time_steps, model=model, size=size, row=row),
            )
            for size in sizes
            for row in rows
        ]

    sizes, names = sorted(bench.scale.num_batches), list(CHECKS)
    small, *larger = sizes
    captured, one_row, plain = ["ours pcgrad"], ["ours sum, one row"], ["ours pcgrad, plain path"]
    textbook, torchjd = ["Hugging Face + textbook PCGrad"], ["Hugging Face + TorchJD mtl_backward"]
    hugging_face = ["Hugging Face sum"]
    look = partial(look_inside, model="pretrained")
    return [
        Job("the card's matrix rate", 2, measure_rate),
        *checks(CASES[:1], names),
        *times("pretrained", sizes, captured, 10),
        *times("base", sizes, captured, 10),
        Job("waits and profile of a step", 5, partial(look, row=captured[0])),
        *checks(CASES[1:NUM_FIRST], names[:CHECKS_OF_ALL]),
        *times("pretrained", larger, one_row, 5),
        *times("base", larger, one_row, 5),
        *times("pretrained", [small], textbook + hugging_face + plain, 5),
        *times("base", larger[:1], textbook + hugging_face + plain, 8),
        Job("evaluation of all of dev: ours", 10, partial(measure_evaluation, row="ours")),
        *times("pretrained", [small], torchjd, 8),
        *times("base", larger[:1], torchjd, 8),
        *checks(CASES[NUM_FIRST:], names[:CHECKS_OF_ALL]),
        Job("a whole run", 40, measure_run),
        *times("pretrained", larger, textbook + hugging_face + plain, 8),
        *times("base", larger[1:], textbook + hugging_face + plain, 10),
        *times("pretrained", [small], ["Hugging Face + TorchJD autogram"], 8),
        *times("pretrained", [small], ["Hugging Face sum, torch.compile"], 45),
        *times("base", larger[:1], ["Hugging Face + TorchJD autogram"], 10),
        *times("base", larger[:1], ["Hugging Face sum, torch.compile"], 60),
        *times("pretrained", sizes, ["ours sum"], 5),
        *times("base", larger[:1], ["ours sum"], 5),
        Job("waits and profile of a plain step", 5, partial(look, row=plain[0])),
        Job("evaluation of all of dev: Hugging Face", 20, partial(measure_evaluation, row="Hugging Face")),
    ]


# --- the command --------------------------------------------------------------------------------------------


def do_jobs(bench: Bench, jobs: list[Job], save: Callable[[], None]) -> None:
    """Do what time is left for, in order; what failed or was left out is named in `bench.measured`."""
    failed = bench.measured.setdefault("failed", {})
    left_out = bench.measured.setdefault("left_out", [])
    is_lost = False
    for job in jobs:
        if is_lost or bench.seconds_left < job.seconds:
            left_out.append(job.title)
            continue
        begun = time.monotonic() - bench.started
        print(f"{begun:5.0f} s  {job.title}", flush=True)
        try:
            with time_limit(bench.seconds_left):
                job.work(bench)
        except OutOfTime:
            left_out.append(job.title)
        except Exception as error:  # noqa: BLE001 (a peer, a compiler or a driver may raise anything)
            failed[job.title] = (str(error).strip() or type(error).__name__).splitlines()[0]
            print(f"  not measured: {failed[job.title]}", flush=True)
        bench.note("job seconds", job.title, round(time.monotonic() - bench.started - begun, 1))
        gc.collect()
        is_lost = not release(bench.args.device)
        save()
    if is_lost:
        print("the GPU no longer answers: nothing more was measured")
    for title in left_out:
        print(f"left out: {title}")
    checks = bench.measured.get("checks", {}).values()
    print(f"checks: {sum(found['ok'] for found in checks)} of {len(checks)} ok")


class OutOfTime(Exception):
    """The end of --seconds has come in the middle of a job."""


@contextmanager
def time_limit(seconds: float):
    """Raises OutOfTime when the time is over, as soon as Python has its turn."""

    def end(number, frame):
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def release(device: str) -> bool:
    """Free what the last job held; False if the device is lost, as after an illegal access."""
    try:
        synchronize(device)
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found | {"python": sys.version.split()[0], "CUDA": torch.version.cuda or "none"}


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="benchmarks.gpu",
        description="Check our step on a GPU and time it beside its peers; write results/gpu.md.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data_dir", default="data", metavar="DIR", help="folder with the data files")
    add("--pretrained", default=OFFLINE_ENCODER, metavar="NAME|DIR", help="the smaller of the two encoders")
    add("--seconds", type=number(float, 0, low_open=True), default=240.0, help="time limit in seconds")
    add("--device", default="auto", help="auto, cuda, or cpu for a trial of this command")
    where = "where gpu.md and gpu.json go; None: results, and nowhere for a trial, which prints its page"
    add("--results_dir", metavar="DIR", help=where)
    args = parser.parse_args(argv)
    args.device = str(resolve_device(args.device))
    is_cuda = torch.device(args.device).type == "cuda"
    if args.results_dir is None:
        args.results_dir = "results" if is_cuda else None
    elif not is_cuda and Path(args.results_dir).resolve() == ROOT / "results":
        raise UserError(f"--results_dir {args.results_dir}: numbers without a GPU do not belong there")
    if is_cuda and "triton" in (missing := [p for p, v in versions().items() if v == "not installed"]):
        raise UserError(f"--device {args.device}: the package triton is not installed ({', '.join(missing)})")
    return args


def is_record(path: Path) -> bool:
    """Whether a file holds what this command measured."""
    return {"facts", "failed", "left_out"} <= set(read_json(path))


def run(argv: list[str] | None) -> None:
    started, args = time.monotonic(), get_args(argv)
    path = Path(args.results_dir) / "gpu.json" if args.results_dir else None
    if path:
        check_replaceable(path, "record of measurements", is_record, "--results_dir")
        check_replaceable(path.with_name("gpu.md"), "page of measurements", is_page, "--results_dir")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder), started)
        bench.rows("train")  # what is wrong with the data is said before anything is measured
        bench.measured["facts"] = {
            "command": ["python", "-m", "benchmarks.gpu", *(sys.argv[1:] if argv is None else argv)],
            "machine": describe_machine(args.device),
            "versions": versions(),
            "precision": bench.precision,
            "pretrained": args.pretrained,
            "is_trial": not bench.is_cuda,
            "check_steps": bench.scale.check_steps,
            "checks": list(CHECKS),
            "tolerances": TOLERANCES,
        }

        def save() -> None:  # after each job: a later one may end the process
            bench.measured["facts"]["seconds"] = round(time.monotonic() - started, 1)
            if path:
                write_text(path, json.dumps(bench.measured, indent=1) + "\n")
                write_page(path.with_name("gpu.md"), bench.measured)

        do_jobs(bench, plan(bench), save)
        save()
        print(f"written: {path.with_name('gpu.md')}, {path}" if path else f"\n{make_page(bench.measured)}")


def main(argv: list[str] | None = None) -> int:
    return run_script("benchmarks.gpu", partial(run, argv))


if __name__ == "__main__":
    sys.exit(main())
