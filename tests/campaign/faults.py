"""A fault campaign: runs are killed and resumed, broken files are read, and nothing may go wrong.

    python -m tests.campaign.faults                 # everything, ten minutes; writes results/faults.md
    python -m tests.campaign.faults kills --kills 50 --seed 1     # a part, printed

- kills: small runs are killed at random moments (by signals, inside a save, by a power cut), resumed,
  perhaps killed again, until they end; then every bit has to be that of a run nobody disturbed.
- matrix: the same, killed once, for every pair of sampler, gradient method, schedule, head, precision.
- fuzz: broken files of every type that we read, and broken command lines; see fuzz.py.
- ranks: launches of two processes by torchrun, of which one is killed or fails; see launches.py.

Exit code: 0, or 1 if anything was wrong. What a run is killed by and what a file is broken by depend only on
--seed and the case's number; where in its work a signal meets a run also depends on the machine.
"""

import argparse
import importlib
import io
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # before torch is imported
    # A process that forks may have neither threads nor a GPU.
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    os.environ["HF_HUB_OFFLINE"] = "1"

import torch

import multitask_classifier
from config import TASKS
from datasets import SAMPLERS, read_rows
from evaluation import prediction_name
from heads import PAIR_HEADS
from kernels.grad_methods import GRAD_METHODS
from optimizer import SCHEDULES
from support.device import describe_machine
from support.files import ROOT, write_text
from tests.campaign import forks
from tests.campaign.forks import DOING, Died, Ended, Strike
from tests.campaign.launches import CASES
from tests.tiny import make_data, make_encoder
from training.run_folder import ARGS_FILE, describe_code, describe_versions

NUM_SETTINGS = 10  # different runs to kill
PLOT_SHARE = 0.05  # of the runs that also draw their curves, which takes a second
# Imported once, for all forks: it takes seconds.
LATE_IMPORTS = ("reporting.figures", "scipy.stats", "sklearn.metrics", "torch._dynamo")
# Kind of kill -> how the process may end: its exit code, or minus the signal.
KINDS = {
    "SIGKILL at a random time": (-9,),
    "SIGKILL at a file operation": (-9,),
    "power cut at a file operation": (-9,),
    "SIGTERM": (143, -15),
    "SIGTERM twice": (143, -15),
    "SIGINT": (130, -2),
    "SIGHUP": (129, -1),
    "damaged last/": (-9,),
}
STEP_KINDS = {"SIGTERM in a step": (143,), "SIGKILL in a step": (-9,)}  # of the matrix
FACTORS = {
    "sampler": tuple(SAMPLERS),
    # The others have no state that a resumed run could lose.
    "grad_method": tuple(name for name, row in GRAD_METHODS.items() if row.on_device or row.state),
    "schedule": tuple(SCHEDULES),
    "head": tuple(PAIR_HEADS),
    "precision": ("fp32", "bf16"),
}


# --- runs ---------------------------------------------------------------------------------------------------


@dataclass
class Setting:
    """A small run, and what it leaves when nobody disturbs it."""

    flags: list[str]
    max_steps: int
    keep_last: int = 2
    seconds: float = 0.0
    num_operations: int = 0
    result: dict[str, object] = field(default_factory=dict)  # empty if it failed
    wrong: list[str] = field(default_factory=list)


@dataclass
class Bench:
    """What all cases share: an encoder, data, and a folder to work in.

    Args:
        keep: where folders and files of failed cases go; None: nowhere.
        steps: least and greatest length of the runs that are killed.
        jobs: processes at a time.
    """

    folder: Path
    seed: int = 0
    keep: Path | None = None
    steps: tuple[int, int] = (9, 14)
    jobs: int = 1
    settings: list[Setting] = field(default_factory=list)

    def __post_init__(self):
        for name in LATE_IMPORTS:
            importlib.import_module(name)
        make_encoder(self.folder / "encoder")
        make_data(self.folder / "data")
        for precision in FACTORS["precision"]:  # what a process does once, its forks need not do again
            output = ["--output_dir", str(self.folder / precision)]
            with redirect_stdout(io.StringIO()):
                multitask_classifier.main([*self.flags(1, 1, "diff", precision=precision), *output])
        splits = [(task, split) for task in TASKS for split in ("dev", "test")]
        self.num_rows = {prediction_name(*names, "starter"): len(self.read(*names).ids) for names in splits}

    def read(self, task: str, split: str):
        return read_rows(self.folder / "data" / TASKS[task].files[split], TASKS[task], split)

    def flags(self, max_steps: int, eval_every: int, head: str, sts_head: str = "", **others) -> list[str]:
        flags = {"para_head": head, "sts_head": sts_head or head}
        flags |= {"max_steps": max_steps, "eval_every": eval_every, "device": "cpu", "compile": "off"}
        flags |= {"pretrained": self.folder / "encoder", "data_dir": self.folder / "data"}
        flags |= {"batch_size": 4, "log_every": 2, "lr": 0.003, "head_lr": 0.01}
        return [str(word) for name, value in (flags | others).items() for word in (f"--{name}", value)]

    def run(self, argv: list[str], output: Path, *, strike=None, plot=False, **options) -> Ended:
        """One run in a child."""
        argv, strike = [*argv, "--output_dir", str(output)], strike or Strike()

        def work(cell):
            forks.watch(cell, strike.in_step, plot)
            forks.count_operations(cell, output, strike)
            sys.argv = ["multitask_classifier.py", *argv]
            return multitask_classifier.main(argv)

        return forks.run_forked(work, output.parent, **options)

    def keep_folder(self, folder: Path, name: str) -> None:
        if self.keep and folder.exists():
            shutil.copytree(folder, self.keep / name, dirs_exist_ok=True)


def draw_settings(bench: Bench, number: int) -> Setting:
    rng = random.Random(f"{bench.seed} setting {number}")
    choices = {name: rng.choice(values) for name, values in FACTORS.items()}
    choices |= {"sts_head": rng.choice(FACTORS["head"]), "grad_accum": rng.choice((1, 2))}
    choices |= {"seed": rng.randrange(1000), "keep_last": rng.choice((1, 2, 3))}
    max_steps, eval_every = rng.randint(*bench.steps), rng.randint(2, 3)
    return Setting(bench.flags(max_steps, eval_every, **choices), max_steps, choices["keep_last"])


def run_undisturbed(bench: Bench, setting: Setting, folder: Path) -> Setting:
    """Fill in what an undisturbed run leaves, and how long it takes."""
    ended = bench.run(setting.flags, folder / "whole")
    setting.seconds, setting.num_operations = ended.seconds, ended.cell.num_operations
    if ended.status == 0:
        setting.result = forks.comparable(folder / "whole")
        setting.wrong += forks.find_problems(folder / "whole", bench.num_rows)
    else:
        setting.wrong.append(f"undisturbed run: {ended}")
    return setting


def next_command(setting: Setting, folder: Path) -> list[str]:
    """How a user would go on after a kill."""
    return ["--resume"] if (folder / ARGS_FILE).exists() else setting.flags


# --- kills --------------------------------------------------------------------------------------------------


@dataclass
class Killed:
    """What became of one run that was killed, maybe several times."""

    kills: list[tuple[str, str]] = field(default_factory=list)  # kind, what the run was doing
    wrong: list[str] = field(default_factory=list)


def draw_kill(kind: str, rng: random.Random, setting: Setting, left: float) -> dict:
    """Options of `Bench.run` for a kill of some kind, as long as there is `left` of the run, as a share."""
    number = signal.SIGKILL if "KILL" in kind else getattr(signal, kind.split()[0], signal.SIGTERM)
    if kind in STEP_KINDS:
        return {"strike": Strike(in_step=(rng.randrange(setting.max_steps), number))}
    at, operations = rng.uniform(0, setting.seconds * left), int(setting.num_operations * left)
    strike = Strike(rng.randint(1, max(1, operations)), rng.choice(("before", "middle", "after")))
    if kind == "SIGTERM twice":
        return {"blows": [(at, number), (at + rng.uniform(0, 0.02), number)]}
    if "operation" not in kind and kind != "damaged last/":
        return {"blows": [(at, number)]}
    if kind == "damaged last/":  # late enough for a checkpoint to be there
        strike = replace(strike, number=strike.number + operations // 3)
    return {"strike": replace(strike, power_cut=kind.startswith("power"))}


def damage_file(path: Path, rng: random.Random) -> None:
    """Flip a bit, cut a file short, invert some bytes of it, or remove it."""
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


def damage_last(bench: Bench, folder: Path, rng: random.Random) -> tuple[list[str], int | None]:
    """Damage the newest checkpoint, or all, and see that the next run resumes from one before it, or refuses.

    Returns:
        what was wrong, and the step from which the run has to resume at least; None where it cannot.
    """
    found = forks.checkpoints(folder)
    spared = [path for path in found[1:] if forks.is_sealed(path)] if rng.random() < 0.75 else []
    for path in found[:1] if spared else found:
        damage_file(rng.choice(sorted(path.iterdir())), rng)
    if spared:
        return [], json.loads((spared[0] / "state.json").read_text())["step"]
    before, wrong = forks.snapshot(folder), []
    ended = bench.run(["--resume"], folder)
    if ended.status != 2 or ended.err.count("\n") != 1:
        wrong.append(f"all checkpoints damaged: ended with {ended}, expected one line and exit code 2")
    if forks.snapshot(folder) != before:
        wrong.append("all checkpoints damaged: the run changed its folder")
    return wrong, None


def kill_case(bench: Bench, number: int, folder: Path) -> Killed:
    """Start a run, kill it, go on, maybe kill it again, and compare what it leaves in the end."""
    rng = random.Random(f"{bench.seed} kills {number}")
    setting, kinds = rng.choice(bench.settings), list(KINDS)
    planned = [kinds[number % len(kinds)]]
    while len(planned) < 4 and rng.random() < 0.4:
        planned.append(rng.choice(kinds))
    for attempt in range(10):  # a signal that comes too late kills nothing
        run = folder / f"run{attempt}"
        killed = kill_until_done(bench, setting, run, planned, rng)
        if killed.kills or killed.wrong:
            break
    if killed.wrong:
        bench.keep_folder(run, f"kills-{number}")
        killed.wrong = [f"{text} | {killed.kills}, {shlex.join(setting.flags)}" for text in killed.wrong]
    return killed


def kill_until_done(
    bench: Bench, setting: Setting, folder: Path, planned: list[str], rng: random.Random
) -> Killed:
    """Run with the planned kills, in order, then without, until the run ends or something is wrong."""
    killed, saved, damaged, ever_damaged = Killed(), 0, False, False
    for kind in [*planned, None]:
        argv = next_command(setting, folder)
        if saved and "--resume" not in argv:
            killed.wrong.append(f"no checkpoint is left, though step {saved} was saved")
        left = max(0.2, 1 - saved / setting.max_steps)
        options = draw_kill(kind, rng, setting, left) if kind else {}
        ended = bench.run(argv, folder, plot=rng.random() < PLOT_SHARE, **options)
        cell = ended.cell
        if 0 <= cell.started_at < saved:
            killed.wrong.append(f"went on at step {cell.started_at}, though step {saved} was saved")
        if cell.started_at > 0 and damaged and "warning" not in ended.out:
            killed.wrong.append("went on from an older checkpoint without a warning")
        if ended.status == 0:
            killed.wrong += forks.find_differences(folder, setting.result)
            killed.wrong += forks.find_problems(folder, bench.num_rows, ever_damaged)
            left_over = [number for number in forks.older(folder) if number >= setting.keep_last]
            killed.wrong += [f"last.{number}/ is left over" for number in left_over]
            break
        expected = (KINDS | STEP_KINDS).get(kind, (0,))
        if ended.status not in expected or "Traceback" in ended.err:
            killed.wrong.append(f"{argv[:1]} ended with {ended}, expected {' or '.join(map(str, expected))}")
        if kind is None:
            break
        killed.kills.append((kind, cell.what()))
        killed.wrong += forks.find_problems(folder, bench.num_rows, ever_damaged)
        saved, damaged = max(saved, cell.started_at, cell.saved_step), False
        stopped = re.search(r"stopped by a signal at step (\d+)", ended.out)
        if stopped and int(stopped[1]) != saved:
            killed.wrong.append(f"stopped at step {stopped[1]}, but step {saved} was saved")
        if kind == "damaged last/" and forks.checkpoints(folder):
            wrong, saved = damage_last(bench, folder, rng)
            killed.wrong += wrong
            damaged = ever_damaged = True
        if killed.wrong or saved is None:
            break
    return killed


def matrix_rows(seed: int) -> list[dict[str, str]]:
    """Rows that hold every pair of values of two factors; all combinations would be thousands."""
    rows = [dict(zip(FACTORS, values, strict=True)) for values in itertools.product(*FACTORS.values())]
    random.Random(f"{seed} rows").shuffle(rows)
    chosen, covered = [], set()
    for row in rows:
        pairs = set(itertools.combinations(row.items(), 2))
        if pairs - covered:
            chosen.append(row)
            covered |= pairs
    return chosen


def matrix_case(bench: Bench, rows: list[dict[str, str]], number: int, folder: Path) -> list[str]:
    """Run a row to its end; again, but stopped in some step and resumed; the bits have to be the same."""
    rng, max_steps = random.Random(f"{bench.seed} matrix {number}"), 4
    setting = Setting(bench.flags(max_steps, 2, **rows[number], seed=rng.randrange(1000)), max_steps)
    wrong, kind = run_undisturbed(bench, setting, folder).wrong, rng.choice(list(STEP_KINDS))
    if setting.result:
        killed = kill_until_done(bench, setting, folder / "stopped", [kind], rng)
        wrong += killed.wrong + ([] if killed.kills else [f"was not stopped by {kind}"])
    if wrong:
        bench.keep_folder(folder / "stopped", f"matrix-{number}")
    row = shlex.join(f"{key}={value}" for key, value in rows[number].items())
    return [f"{row}: {text}" for text in wrong]


# --- the campaign -------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a section of the campaign found."""

    name: str
    num_cases: int = 0
    num_wrong: int = 0  # cases
    wrong: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)  # of Markdown
    seconds: float = 0.0

    def summary(self) -> str:
        return f"{self.name}: {self.num_cases} cases, {self.num_wrong} wrong, {self.seconds:.0f} s"

    def page(self) -> list[str]:
        """Lines of Markdown; the texts of each place (before a bar) are shown once, and counted."""
        counts, first = Counter(), {}
        for text in self.wrong:
            place = text.partition(": ")[2].partition(" | ")[0]
            counts[place] += 1
            first.setdefault(place, " ".join(text.split())[:500])
        wrong = [f"- {count} x {first[place]}" for place, count in counts.most_common(100)]
        heading = ["", f"## {self.name}", "", f"{self.summary()}.", "", *self.lines]
        return [*heading, "", "Wrong:", "", *wrong] if wrong else heading


def go_through(outcome: Outcome, bench: Bench, work: Callable, num_cases: int, take: Callable) -> Outcome:
    """Work on all cases, hand each result to `take`, which returns what was wrong, and show progress."""
    started = shown = time.monotonic()
    for number, (case, result) in enumerate(forks.in_parallel(work, num_cases, bench.jobs, bench.folder), 1):
        wrong = [str(result)] if isinstance(result, Died) else take(result)
        outcome.num_cases += 1
        outcome.num_wrong += bool(wrong)
        outcome.wrong += [f"{outcome.name} {case}: {text}" for text in wrong]
        now = time.monotonic()
        if number == num_cases or now - shown > 15:
            shown, left = now, (now - started) / number * (num_cases - number)
            progress = f"{number}/{num_cases}, {outcome.num_wrong} wrong, {left:.0f} s left"
            print(f"{outcome.name}: {progress}", file=sys.stderr, flush=True)
    outcome.seconds += time.monotonic() - started
    return outcome


def table(corner: str, counts: dict[tuple[str, str], int], rows, columns) -> list[str]:
    """Counts by row and column as Markdown; what was never counted is left out."""
    rows, columns = (
        [name for name in names if any(name in key for key in counts)] for names in (rows, columns)
    )
    lines = [f"| {corner} | {' | '.join(columns)} | all |", "| --- |" + " ---: |" * (len(columns) + 1)]
    for row, summed in [*((row, [row]) for row in rows), ("all", rows)]:
        cells = [sum(counts.get((name, column), 0) for name in summed) for column in columns]
        lines.append(f"| {row} | {' | '.join(map(str, cells))} | {sum(cells)} |")
    return lines


def run_kills(bench: Bench, num_runs: int, num_settings: int = NUM_SETTINGS) -> Outcome:
    drawn = [draw_settings(bench, number) for number in range(num_settings)]
    outcome, counts, chains = Outcome("kills"), Counter(), Counter()
    bench.settings = []

    def work(number, folder):
        return run_undisturbed(bench, drawn[number], folder)

    def take_setting(setting):
        bench.settings += [setting] if setting.result else []
        return [f"{text} ({shlex.join(setting.flags)})" for text in setting.wrong]

    def take(killed):
        counts.update(killed.kills)
        chains[len(killed.kills)] += 1
        return killed.wrong

    go_through(outcome, bench, work, num_settings, take_setting)
    bench.settings.sort(key=lambda setting: setting.flags)
    go_through(outcome, bench, partial(kill_case, bench), num_runs, take)
    often = ", ".join(f"{runs} runs {times} times" for times, runs in sorted(chains.items()))
    outcome.lines = [
        f"{num_runs} runs of {len(bench.settings)} settings were killed {sum(counts.values())} times:",
        f"{often}. By kind of kill and by what the run was doing:",
        "",
        *table("kill", counts, KINDS, DOING),
    ]
    return outcome


def run_matrix(bench: Bench, rows: list[dict[str, str]]) -> Outcome:
    work = partial(matrix_case, bench, rows)
    outcome = go_through(Outcome("matrix"), bench, work, len(rows), lambda wrong: wrong)
    sizes = " x ".join(f"{len(values)} {name}s" for name, values in FACTORS.items())
    outcome.lines = [
        f"{len(rows)} rows with every pair of values ({sizes}), each once whole, once stopped and resumed."
    ]
    return outcome


def run_fuzz(bench: Bench, num_cases: int, fuzzer=None) -> Outcome:
    from tests.campaign.fuzz import Fuzzer  # `kills` and `matrix` have no use for it

    counts, fuzzer = Counter(), fuzzer or Fuzzer(bench)

    def take(result):
        counts[result.target, "refused" if result.refused else "read"] += 1
        return result.wrong

    outcome = go_through(Outcome("fuzz"), bench, fuzzer.case, num_cases, take)
    outcome.lines = [f"{num_cases} broken inputs, by what was done with them:", ""]
    outcome.lines += table("input", counts, sorted({target for target, _ in counts}), ("read", "refused"))
    return outcome


def run_ranks(bench: Bench) -> Outcome:
    names = list(CASES)
    flags = bench.flags(10_000, 10_000, "diff", log_every=1, schedule="constant", warmup_steps=0)

    def work(number, folder):
        return [f"{names[number]}: {text}" for text in CASES[names[number]](flags, folder)]

    outcome = go_through(Outcome("ranks"), bench, work, len(names), lambda wrong: wrong)
    outcome.lines = [f"Two processes each, started by torchrun: {'; '.join(names)}."]
    return outcome


def make_page(outcomes: list[Outcome], argv: list[str]) -> str:
    machine, code = describe_machine("cpu"), describe_code() or {"commit": "unknown", "changed": []}
    facts = [f"Code {code['commit'][:7]}{' with changes' if code['changed'] else ''}"]
    facts += [f"{name} {value}" for name, value in describe_versions().items()]
    facts += [f"{machine['processor']}, {machine['cores']} cores, 1 thread a run", sys.platform]
    num_wrong, num_cases = (sum(getattr(o, name) for o in outcomes) for name in ("num_wrong", "num_cases"))
    lines = [
        "# Faults",
        "",
        f"Made by `{shlex.join(['python', '-m', 'tests.campaign.faults', *argv])}`; its docstring says how.",
        f"**{num_wrong} of {num_cases} cases were wrong.**",
        "",
        f"{'; '.join(facts)}; {sum(outcome.seconds for outcome in outcomes) / 60:.0f} minutes.",
        *(line for outcome in outcomes for line in outcome.page()),
    ]
    return "\n".join(lines) + "\n"


def get_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.campaign.faults",
        description="Kill runs, break files; nothing may go wrong.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    sections = ["kills", "matrix", "fuzz", "ranks"]
    add = parser.add_argument
    add("sections", nargs="*", default=sections, metavar="SECTION", help="kills, matrix, fuzz, ranks")
    add("--kills", type=int, default=200, help="runs to kill, each at least once")
    add("--cases", type=int, default=10_000, help="broken inputs")
    add("--seed", type=int, default=0, help="of everything that is drawn")
    add("--jobs", type=int, default=2, help="processes at a time")
    add("--keep_failures", type=Path, metavar="DIR", help="where the files of failed cases go")
    args = parser.parse_args(argv)
    if unknown := set(args.sections) - set(sections):
        parser.error(f"section {min(unknown)!r}; expected some of {', '.join(sections)}")
    args.is_whole = args.sections == sections and args.kills >= 200 and args.cases >= 10_000
    return args


def main(argv: list[str] | None = None) -> int:
    args, outcomes = get_args(argv), []
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the folder goes
    memory = Path("/dev/shm")  # in memory, where there is that: thousands of small files
    folder = Path(tempfile.mkdtemp(prefix="faults-", dir=memory if os.access(memory, os.W_OK) else None))
    keep = args.keep_failures or Path(tempfile.gettempdir()) / f"faults-failed-{os.getpid()}"
    try:
        bench = Bench(folder, args.seed, keep, jobs=args.jobs)
        sections = {
            "kills": lambda: run_kills(bench, args.kills),
            "matrix": lambda: run_matrix(bench, matrix_rows(args.seed)),
            "fuzz": lambda: run_fuzz(bench, args.cases),
            "ranks": lambda: run_ranks(bench),
        }
        for name in args.sections:
            outcomes.append(sections[name]())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    page = make_page(outcomes, sys.argv[1:] if argv is None else argv)
    for path, name in {str(folder): "WORK", str(ROOT) + os.sep: "", str(keep): "FAILED"}.items():
        page = page.replace(path, name)  # paths of this machine are left out
    print(page)
    if args.is_whole:
        write_text(ROOT / "results" / "faults.md", page)
        print("wrote results/faults.md")
    wrong = any(outcome.wrong for outcome in outcomes)
    if wrong:
        print(f"what failed is kept in {keep}")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
