"""A fault campaign: runs are killed at random moments and resumed, broken files are read, and nothing may go wrong.

    python -m tests.campaign.faults                       # everything: kills, matrix, fuzz; writes results/faults.md
    python -m tests.campaign.faults kills --kills 50 --seed 1

- kills: small runs are killed at random moments (by signals, inside a save, by a power cut), resumed, perhaps killed again,
  until they end; then every bit has to be that of a run nobody disturbed.
- matrix: the same for every combination of sampler, gradient method, schedule, head and precision, killed once.
- fuzz: broken files of every type that we read, and broken command lines; see fuzz.py.

Exit code: 0, or 1 if anything was wrong. What a run is killed by and what a file is broken by depend on --seed and the
case's number only; where in its work a signal meets a run also depends on the machine.
"""

import argparse
import importlib
import io
import itertools
import json
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # before torch is imported
    # A process that forks may have neither threads nor a GPU.
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import safetensors
import tokenizers
import torch

import multitask_classifier
from config import TASKS
from datasets import SAMPLERS, read_rows
from evaluation import prediction_name
from heads import PAIR_HEADS
from optimizer import SCHEDULES
from pcgrad import GRAD_METHODS
from support.device import describe_machine
from support.files import ROOT, write_text
from tests.campaign.forks import (
    DOING,
    Cell,
    Died,
    Ended,
    Strike,
    checkpoints,
    comparable,
    count_operations,
    find_differences,
    find_problems,
    in_parallel,
    is_sealed,
    older,
    run_forked,
    snapshot,
    watch,
)
from tests.tiny import make_data, make_encoder
from training.run_folder import ARGS_FILE

NUM_SETTINGS = 10  # different runs to kill
PLOT_SHARE = 0.05  # of the runs that also draw their curves, which takes a second
# Seconds, which forks need not spend.
LATE_IMPORTS = ("figures", "scipy.stats", "sklearn.metrics", "torch._dynamo")
KINDS = (
    "SIGKILL at a random time",
    "SIGKILL at a file operation",
    "power cut at a file operation",
    "SIGTERM",
    "SIGTERM twice",
    "SIGINT",
    "damaged last/",
)
FACTORS = {
    "sampler": tuple(SAMPLERS),
    "grad_method": tuple(GRAD_METHODS),
    "schedule": tuple(SCHEDULES),
    "head": tuple(PAIR_HEADS),
    "precision": ("fp32", "bf16"),
}


# --- runs --------------------------------------------------------------------------------------------------------


@dataclass
class Setting:
    """A small run, and what it leaves when nobody disturbs it."""

    flags: list[str]
    max_steps: int
    keep_last: int = 2
    seconds: float = 0.0
    operations: int = 0
    result: dict[str, object] = field(default_factory=dict)  # empty if it failed
    wrong: list[str] = field(default_factory=list)


@dataclass
class Bench:
    """What all cases share: an encoder, data, and a folder to work in.

    Args:
            keep: where folders and files of failed cases go; None: nowhere.
        steps: least and greatest length of the runs that are killed.
    """

    folder: Path
    seed: int = 0
    keep: Path | None = None
    steps: tuple[int, int] = (9, 14)
    settings: list[Setting] = field(default_factory=list)

    def __post_init__(self):
        for name in LATE_IMPORTS:
            importlib.import_module(name)
        make_encoder(self.folder / "encoder")
        make_data(self.folder / "data")
        for precision in FACTORS["precision"]:  # what a process does once, its forks need not do again
            argv = [
                *self.flags(1, 1, "diff", precision=precision),
                "--output_dir",
                str(self.folder / precision),
            ]
            with redirect_stdout(io.StringIO()):
                multitask_classifier.main(argv)
        self.num_rows = {
            prediction_name(task, split, "starter"): len(self.read(task, split).ids)
            for task in TASKS
            for split in ("dev", "test")
        }
        self.cell = Cell()  # each job gets its own, see `own`
        self.owner = os.getpid()

    def read(self, task: str, split: str):
        return read_rows(self.folder / "data" / TASKS[task].files[split], TASKS[task], split)

    def own(self) -> Path:
        """A folder of this process alone; its cell is renewed, too."""
        folder = self.folder / f"job{os.getpid()}"
        if self.owner != os.getpid():
            self.cell, self.owner = Cell(), os.getpid()
            folder.mkdir()
        folder.mkdir(exist_ok=True)
        return folder

    def flags(
        self, max_steps: int, eval_every: int, head: str, sts_head: str | None = None, **settings
    ) -> list[str]:
        settings |= {"para_head": head, "sts_head": sts_head or head, "max_steps": max_steps}
        settings |= {"eval_every": eval_every, "pretrained": self.folder / "encoder", "compile": "off"}
        settings |= {"data_dir": self.folder / "data", "batch_size": 4, "device": "cpu", "log_every": 2}
        settings |= {"lr": 0.003, "head_lr": 0.01}
        return [str(part) for name, value in settings.items() for part in (f"--{name}", value)]

    def run(self, argv: list[str], output: Path, *, strike=None, strike_at=None, plot=False, **options):
        """One run in a child; `cell` tells what it was doing."""
        self.cell.clear()

        def work():
            watch(self.cell, strike_at, plot)
            count_operations(self.cell, output, strike)
            argv_of_run = [*argv, "--output_dir", str(output)]
            sys.argv = ["multitask_classifier.py", *argv_of_run]
            return multitask_classifier.main(argv_of_run)

        return run_forked(work, self.own(), **options)

    def keep_folder(self, folder: Path, name: str) -> None:
        if self.keep and folder.exists():
            shutil.rmtree(self.keep / name, ignore_errors=True)
            shutil.copytree(folder, self.keep / name)


def draw_settings(bench: Bench, number: int) -> Setting:
    rng = random.Random(f"{bench.seed} setting {number}")
    choices = {name: rng.choice(values) for name, values in FACTORS.items()}
    choices |= {"sts_head": rng.choice(FACTORS["head"]), "grad_accum": rng.choice((1, 2))}
    choices["seed"] = rng.randrange(1000)
    max_steps, eval_every = rng.randint(*bench.steps), rng.randint(2, 3)
    setting = Setting([], max_steps)
    setting.keep_last = choices["keep_last"] = rng.choice((1, 2, 3))
    setting.flags = bench.flags(max_steps, eval_every, **choices)
    return setting


def run_undisturbed(bench: Bench, setting: Setting) -> Setting:
    """Fill in what an undisturbed run leaves, and how long it takes."""
    folder = bench.own() / "whole"
    ended = bench.run(setting.flags, folder)
    setting.seconds, setting.operations = ended.seconds, bench.cell["operations"]
    if ended.code == 0:
        setting.result = comparable(folder)
        setting.wrong += find_problems(folder, bench.num_rows)
    else:
        setting.wrong.append(f"undisturbed run: {ended}")
    shutil.rmtree(folder, ignore_errors=True)
    return setting


def next_command(setting: Setting, folder: Path) -> list[str]:
    """How a user would go on after a kill."""
    return ["--resume"] if (folder / ARGS_FILE).exists() else setting.flags


# --- kills -------------------------------------------------------------------------------------------------------


@dataclass
class Killed:
    """What became of one run that was killed, maybe several times."""

    kills: list[tuple[str, str]] = field(default_factory=list)  # kind, what the run was doing
    wrong: list[str] = field(default_factory=list)


def draw_kill(kind: str, rng: random.Random, setting: Setting, left: float) -> dict:
    """Options of `Bench.run` for a kill of some kind, as long as there is `left` of the run, as a share."""
    at = rng.uniform(0, setting.seconds * left)
    strike = Strike(
        rng.randint(1, max(1, int(setting.operations * left))), rng.choice(("before", "middle", "after"))
    )
    if kind == "damaged last/":
        strike.number += int(setting.operations * left / 3)
    number = {"SIGKILL at a random time": signal.SIGKILL, "SIGINT": signal.SIGINT}.get(kind, signal.SIGTERM)
    if kind == "SIGTERM twice":
        return {"blows": [(at, number), (at + rng.uniform(0, 0.02), number)]}
    if kind.startswith("SIG") and "operation" not in kind:
        return {"blows": [(at, number)]}
    strike.power_cut = kind.startswith("power")
    return {"strike": strike}


def check_end(kind: str, ended: Ended) -> list[str]:
    """What is wrong with how a killed run ended."""
    wrong = []
    expected = {"SIGTERM": (143, -15), "SIGTERM twice": (143, -15), "SIGINT": (130, -2)}.get(kind, (-9,))
    status = ended.code if ended.code is not None else -ended.signal
    if status not in expected:
        wrong.append(f"ended with {ended}, expected {' or '.join(map(str, expected))}")
    if "Traceback" in ended.err:
        wrong.append(f"traceback: {ended}")
    return wrong


def damage_file(path: Path, rng: random.Random) -> None:
    """Flip a bit, cut a file short, overwrite a part of it with zeros, or remove it."""
    content = bytearray(path.read_bytes())
    how, at = rng.randrange(4), rng.randrange(len(content))
    if how == 0:
        content[at] ^= 1 << rng.randrange(8)
    elif how == 1:
        del content[at:]
    elif how == 2:
        content[at : at + 512] = bytes(byte ^ 255 for byte in content[at : at + 512])
    path.write_bytes(content)
    if how == 3:
        path.unlink()


def damage_last(
    bench: Bench, setting: Setting, folder: Path, rng: random.Random
) -> tuple[list[str], int | None]:
    """Damage the newest checkpoint, or all, and see that the next run goes on from one before it, or refuses.

    Returns:
        what was wrong, and the step from which the run has to go on at least; None where it cannot.
    """
    found = checkpoints(folder)
    spared = [path for path in found[1:] if is_sealed(path)] if rng.random() < 0.75 else []
    for path in found[:1] if spared else found:
        damage_file(rng.choice(sorted(path.iterdir())), rng)
    if spared:
        return [], json.loads((spared[0] / "state.json").read_text())["step"]
    before = snapshot(folder)
    ended = bench.run(["--resume"], folder)
    wrong = []
    if ended.code != 2 or ended.err.count("\n") != 1:
        wrong.append(f"all checkpoints damaged: ended with {ended}, expected one line and exit code 2")
    if snapshot(folder) != before:
        wrong.append("all checkpoints damaged: the run changed its folder")
    return wrong, None


def kill_case(bench: Bench, number: int) -> Killed:
    """Start a run, kill it, go on, maybe kill it again, and compare what it leaves in the end."""
    rng = random.Random(f"{bench.seed} kills {number}")
    setting = rng.choice(bench.settings)
    planned = [KINDS[number % len(KINDS)]]
    while len(planned) < 4 and rng.random() < 0.4:
        planned.append(rng.choice(KINDS))
    folder = bench.own() / f"run{number}"
    for _ in range(10):  # a signal that comes too late kills nothing
        shutil.rmtree(folder, ignore_errors=True)
        killed = kill_until_done(bench, setting, folder, planned, rng)
        if killed.kills or killed.wrong:
            break
    if killed.wrong:
        bench.keep_folder(folder, f"kills-{number}")
        killed.wrong = [f"{text} | {killed.kills}, {shlex.join(setting.flags)}" for text in killed.wrong]
    shutil.rmtree(folder, ignore_errors=True)
    return killed


def kill_until_done(
    bench: Bench, setting: Setting, folder: Path, planned: list[str], rng: random.Random
) -> Killed:
    """Run with the planned kills, in order, then without, until the run ends or something is wrong."""
    killed, cell, saved, damaged, ever_damaged = Killed(), bench.cell, 0, False, False
    for kind in [*planned, None]:
        argv = next_command(setting, folder)
        if saved and "--resume" not in argv:
            killed.wrong.append(f"no checkpoint is left, though step {saved} was saved")
        left = max(0.2, 1 - saved / setting.max_steps)
        options = draw_kill(kind, rng, setting, left) if kind else {}
        ended = bench.run(argv, folder, plot=rng.random() < PLOT_SHARE, **options)
        if 0 <= cell["started_at"] < saved:
            killed.wrong.append(f"went on at step {cell['started_at']}, though step {saved} was saved")
        if cell["started_at"] > 0 and damaged and "warning" not in ended.out:
            killed.wrong.append("went on from an older checkpoint without a warning")
        if ended.code == 0:
            killed.wrong += find_differences(folder, setting.result)
            killed.wrong += find_problems(folder, bench.num_rows, ever_damaged)
            left_over = [number for number in older(folder) if number >= setting.keep_last]
            killed.wrong += [f"last.{number}/ is left over" for number in left_over]
            return killed
        if kind is None:
            killed.wrong.append(f"{argv[:1]} ended with {ended}")
            return killed
        killed.kills.append((kind, cell.what()))
        killed.wrong += check_end(kind, ended)
        killed.wrong += find_problems(folder, bench.num_rows, ever_damaged)
        saved, damaged = max(saved, cell["started_at"], cell["saved_step"]), False
        stopped = re.search(r"stopped by a signal at step (\d+)", ended.out)
        if stopped and int(stopped[1]) != saved:
            killed.wrong.append(f"stopped at step {stopped[1]}, but step {saved} was saved")
        if kind == "damaged last/" and checkpoints(folder):
            wrong, saved = damage_last(bench, setting, folder, rng)
            killed.wrong += wrong
            damaged = ever_damaged = True
        if killed.wrong or saved is None:
            return killed


# --- matrix ------------------------------------------------------------------------------------------------------


def all_rows() -> list[dict[str, str]]:
    return [dict(zip(FACTORS, values, strict=True)) for values in itertools.product(*FACTORS.values())]


def pairwise_rows() -> list[dict[str, str]]:
    """25 rows in which each value of each factor meets each value of each other factor."""
    # (i + f * j) mod 5 for factor f: a Latin square of prime order, so any two factors go through all 25 pairs.
    return [
        {
            name: values[(i + factor * j) % 5 % len(values)]
            for factor, (name, values) in enumerate(FACTORS.items())
        }
        for i in range(5)
        for j in range(5)
    ]


def matrix_case(bench: Bench, rows: list[dict[str, str]], number: int) -> list[str]:
    """Run a row to its end; run it again, stopped in some step, and resume it; the bits have to be the same."""
    rng = random.Random(f"{bench.seed} matrix {number}")
    max_steps = 4
    setting = Setting(bench.flags(max_steps, 2, **rows[number], seed=rng.randrange(1000)), max_steps)
    name = shlex.join(f"{key}={value}" for key, value in rows[number].items())
    folder = bench.own() / f"row{number}"
    strike_at = rng.randrange(max_steps), rng.choice((signal.SIGTERM, signal.SIGKILL))
    wrong = run_undisturbed(bench, setting).wrong
    if setting.result:
        ended = bench.run(setting.flags, folder, strike_at=strike_at)
        if (ended.code, ended.signal) not in ((143, None), (None, 9)):
            wrong.append(f"stopped in step {strike_at}: {ended}")
        ended = bench.run(next_command(setting, folder), folder)
        wrong += (
            find_differences(folder, setting.result) if ended.code == 0 else [f"after {strike_at}: {ended}"]
        )
    if wrong:
        bench.keep_folder(folder, f"matrix-{number}")
    shutil.rmtree(folder, ignore_errors=True)
    return [f"{name}: {text}" for text in wrong]


# --- the campaign ------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a section of the campaign found."""

    name: str
    num_cases: int = 0
    num_wrong: int = 0  # cases
    wrong: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)  # of Markdown
    seconds: float = 0.0

    def wrong_by_place(self) -> dict[str, int]:
        """The first text of each place (what stands before a bar), and how often there was something wrong there."""
        counts, first = Counter(), {}
        for text in self.wrong:
            place = text.partition(": ")[2].partition(" | ")[0]
            counts[place] += 1
            first.setdefault(place, text[:500])
        return {first[place]: count for place, count in counts.most_common()}

    def summary(self) -> str:
        return f"{self.name}: {self.num_cases} cases, {self.num_wrong} wrong, {self.seconds:.0f} s"


def go_through(outcome: Outcome, work, cases, jobs: int, take) -> Outcome:
    """Work on all cases, hand each result to `take`, which returns what was wrong with it, and show how far it is."""
    started = shown = time.monotonic()
    cases = list(cases)
    for case, result in in_parallel(work, cases, jobs):
        outcome.num_cases += 1
        wrong = [str(result)] if isinstance(result, Died) else take(result)
        outcome.num_wrong += bool(wrong)
        outcome.wrong += [f"{outcome.name} {case}: {text}" for text in wrong]
        outcome.seconds = time.monotonic() - started
        last = outcome.num_cases == len(cases)
        if last or time.monotonic() - shown > (0.5 if sys.stdout.isatty() else 15):
            shown = time.monotonic()
            left = outcome.seconds / outcome.num_cases * (len(cases) - outcome.num_cases)
            line = f"{outcome.name}: {outcome.num_cases}/{len(cases)}, {outcome.num_wrong} wrong, {left:.0f} s left"
            print(line, end="\r" if sys.stdout.isatty() and not last else "\n", flush=True)
    return outcome


def table(counts: dict[tuple[str, str], int], corner: str) -> list[str]:
    """Counts by row and column as Markdown."""
    rows, columns = (list(dict.fromkeys(key[side] for key in sorted(counts))) for side in (0, 1))
    if corner == "kill":
        rows, columns = (
            [name for name in names if name in found] for names, found in ((KINDS, rows), (DOING, columns))
        )
    lines = [f"| {corner} | {' | '.join(columns)} | all |", "| --- |" + " ---: |" * (len(columns) + 1)]
    for row in rows:
        cells = [counts.get((row, column), 0) for column in columns]
        lines.append(f"| {row} | {' | '.join(map(str, cells))} | {sum(cells)} |")
    totals = [sum(counts.get((row, column), 0) for row in rows) for column in columns]
    return [*lines, f"| all | {' | '.join(map(str, totals))} | {sum(totals)} |"]


def run_kills(bench: Bench, num_runs: int, jobs: int, num_settings: int = NUM_SETTINGS) -> Outcome:
    drawn = [draw_settings(bench, number) for number in range(num_settings)]
    whole = Outcome("undisturbed runs")
    bench.settings = []

    def take_setting(setting):
        bench.settings += [setting] if setting.result else []
        return [f"{text} ({shlex.join(setting.flags)})" for text in setting.wrong]

    go_through(
        whole, lambda number: run_undisturbed(bench, drawn[number]), range(num_settings), jobs, take_setting
    )
    bench.settings.sort(key=lambda setting: setting.flags)
    counts, chains = Counter(), Counter()

    def take(killed):
        counts.update(killed.kills)
        chains[len(killed.kills)] += 1
        return killed.wrong

    outcome = go_through(Outcome("kills"), partial(kill_case, bench), range(num_runs), jobs, take)
    outcome.wrong[:0] = whole.wrong
    outcome.num_cases, outcome.num_wrong = (
        outcome.num_cases + whole.num_cases,
        outcome.num_wrong + whole.num_wrong,
    )
    outcome.lines = [
        f"{num_runs} runs of {len(bench.settings)} settings were killed {sum(counts.values())} times: "
        + ", ".join(f"{runs} runs {times} times" for times, runs in sorted(chains.items()))
        + ". By kind of kill and by what the run was doing:",
        "",
        *table(counts, "kill"),
    ]
    return outcome


def run_matrix(bench: Bench, rows: list[dict[str, str]], jobs: int) -> Outcome:
    work = partial(matrix_case, bench, rows)
    outcome = go_through(Outcome("matrix"), work, range(len(rows)), jobs, lambda wrong: wrong)
    sizes = " x ".join(f"{len(values)} {name}s" for name, values in FACTORS.items())
    outcome.lines = [
        f"{len(rows)} rows ({sizes}), each run to its end, and stopped in some step and resumed."
    ]
    return outcome


def run_fuzz(bench: Bench, num_cases: int, jobs: int, fuzzer=None) -> Outcome:
    from tests.campaign.fuzz import Fuzzer  # late: Hypothesis is needed for this section only

    counts = Counter()

    def take(result):
        counts[result.file_type, "refused" if result.refused else "read"] += 1
        return result.wrong

    fuzzer = fuzzer or Fuzzer(bench)
    outcome = go_through(Outcome("fuzz"), fuzzer.case, range(num_cases), jobs, take)
    outcome.lines = [f"{num_cases} broken inputs, by what was done with them:", "", *table(counts, "input")]
    return outcome


def describe_code() -> str:
    def git(*arguments):
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = " with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return f"{git('rev-parse', '--short', 'HEAD') or 'no repository'}{changed}"


def make_page(outcomes: list[Outcome], argv: list[str], hide: dict[str, str]) -> str:
    """The page of a campaign; paths of this machine are left out."""
    modules = (np, safetensors, tokenizers, torch)
    versions = {"Python": platform.python_version()} | {
        module.__name__: module.__version__ for module in modules
    }
    facts = describe_machine("cpu")
    machine = f"{facts['processor']}, {facts['cores']} cores, 1 thread a run"
    num_wrong = sum(outcome.num_wrong for outcome in outcomes)
    lines = [
        "# Faults",
        "",
        f"Made by `{shlex.join(['python', '-m', 'tests.campaign.faults', *argv])}`; what it does stands at its head.",
        f"**{num_wrong} of {sum(outcome.num_cases for outcome in outcomes)} cases were wrong.**",
        "",
        "; ".join(
            [f"Code {describe_code()}", *(f"{name} {value}" for name, value in versions.items()), machine]
        )
        + f"; {platform.system()}; {sum(outcome.seconds for outcome in outcomes) / 60:.0f} minutes.",
    ]
    for outcome in outcomes:
        lines += ["", f"## {outcome.name}", "", f"{outcome.summary()}.", "", *outcome.lines]
        if outcome.wrong:
            lines += [
                "",
                "Wrong:",
                "",
                *(f"- {' '.join(text.split())[:500]}" for text in outcome.wrong[:100]),
            ]
    page = "\n".join(lines) + "\n"
    for path, name in hide.items():
        page = page.replace(path, name)
    return page


def get_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="faults.py", description="Kill runs, break files; nothing may go wrong."
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help="kills, matrix, fuzz (default: all)")
    parser.add_argument(
        "--kills", type=int, default=200, help="runs to kill, each at least once (default: 200)"
    )
    parser.add_argument("--cases", type=int, default=10_000, help="broken inputs (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default: 2)")
    parser.add_argument(
        "--output", type=Path, help="page to write (default: results/faults.md if all is run)"
    )
    parser.add_argument("--keep_failures", type=Path, metavar="DIR", help="where files of failed cases go")
    args = parser.parse_args(argv)
    unknown = set(args.sections) - {"kills", "matrix", "fuzz"}
    if unknown:
        parser.error(f"section {min(unknown)!r}; expected some of kills, matrix, fuzz")
    args.sections = args.sections or ["kills", "matrix", "fuzz"]
    if args.output is None and len(args.sections) == 3 and args.kills >= 200 and args.cases >= 10_000:
        args.output = ROOT / "results" / "faults.md"
    return args


def main(argv: list[str] | None = None) -> int:
    args = get_args(argv)
    torch.set_num_threads(1)
    signal.signal(
        signal.SIGTERM, lambda number, frame: sys.exit(128 + number)
    )  # so that the folder is removed
    memory = Path("/dev/shm")  # in memory, where there is that: thousands of small files
    folder = Path(tempfile.mkdtemp(prefix="faults-", dir=memory if os.access(memory, os.W_OK) else None))
    keep = args.keep_failures or Path(tempfile.mkdtemp(prefix="faults-failed-"))
    try:
        bench = Bench(folder, args.seed, keep)
        sections = {
            "kills": lambda: run_kills(bench, args.kills, args.jobs),
            "matrix": lambda: run_matrix(bench, all_rows(), args.jobs),
            "fuzz": lambda: run_fuzz(bench, args.cases, args.jobs),
        }
        outcomes = []
        for name in args.sections:
            outcomes.append(sections[name]())
            print(outcomes[-1].summary(), flush=True)
            for text, count in outcomes[-1].wrong_by_place().items():
                print(f"  {count} x {text}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    typed = [
        name if name.startswith("-") else Path(name).name for name in (sys.argv[1:] if argv is None else argv)
    ]
    if args.output:
        hide = {str(folder): "WORK", str(ROOT) + os.sep: "", str(keep): "FAILED"}
        write_text(args.output, make_page(outcomes, typed, hide))
        print(f"wrote {os.path.relpath(args.output)}")
    wrong = any(outcome.wrong for outcome in outcomes)
    if wrong:
        print(f"what failed is kept in {keep}")
    elif not args.keep_failures:
        shutil.rmtree(keep, ignore_errors=True)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
