"""The results table as a command: which runs it needs, running them, holding them against what is asked for.

`results_table.py` starts it. Each row and seed is a run folder under --runs_dir; what is finished there is
not run again. So the same command goes on where it was stopped, and folders made on several machines can be
put together.
Poster: "Fine-tuning minBERT for Various Downstream Tasks", Stanford CS224N.
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from config import OFFLINE_ENCODER, BertConfig
from evaluation import prediction_name
from reporting.cluster import CLUSTERS, Cluster, check_cluster, parse_minutes, parse_option, run_on_cluster
from reporting.jobs import Job, Stage, run_jobs
from reporting.own_rows import own_rows
from reporting.poster import REGIME_ROWS, REGIMES, ROWS, TUNED, TableRow, regime_rows
from reporting.read_run import read_scores
from reporting.table_pages import (
    TEST_FILES,
    check_results_dir,
    format_claims,
    format_comparison,
    format_differences,
    write_results,
)
from reporting.table_statistics import DevData, FinishedRun, Table, read_finished_run
from support.command_line import FlagType, OneLineParser, number, run_script
from support.device import PRECISIONS, resolve_precision
from support.errors import UserError
from support.files import ROOT, read_json
from training.flags import COUNT, SEED, flags_marked, given_flags, read_run
from training.flags import get_args as get_run_args
from training.resolve import data_settings
from training.sources import source_paths

# What a run is told besides its row's flags. Three evaluations on part of dev choose the best checkpoint,
# which is then evaluated on all of dev.
BATCH_SIZE = 16
NUM_EVALS = 3
EVAL_MAX_EXAMPLES = 600
# For the estimate of the cost: word pieces in an example of SST, Quora or STS, and examples in dev.
TOKENS_PER_EXAMPLE = 30
EVAL_EXAMPLES = 22_000
# Flags of a run that are the table's own: it gives them itself, or could not read the run with others.
OWN_FLAGS = flags_marked("mode", "place", "predictions") - {"cache_dir"}
OWN_FLAGS |= {"tasks", "pretrained", "max_steps", "seed"}
# What the poster's rows differ in: given to every run, these flags would make two rows one, or be overridden
# by most. And those that would not mean the same in every row.
ROW_FLAGS = {
    name for row in ROWS.values() if row.group != "control" for name in given_flags(row.flags.split())
}
NO_FLAGS = {"epochs", "warmup_steps", "freeze_encoder", "option", "fine_tune_mode"}
# What may differ from run to run: where and how it was computed, not what. (The table can read predictions in
# the starter's form only, and scores on all of dev.)
FREE_FLAGS = flags_marked("mode", "place", "predictions", "machine", "upkeep")
FREE_FLAGS -= {"prediction_style", "final_eval"}


# --- runs -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SharedSettings:
    """What all runs of a table are told; the rest is their row's and seed's."""

    pretrained: str
    data_dir: str
    max_steps: int
    runs_dir: Path
    run_flags: list[str]  # more flags of multitask_classifier.py
    specs: dict[str, TableRow]  # name -> what its runs are told


def folder_of(runs_dir: Path, row: str, seed: int) -> Path:
    return runs_dir / f"{row}-seed{seed}"


def run_flags(shared: SharedSettings, row: str, seed: int) -> list[str]:
    """The flags of multitask_classifier.py for a row and seed, all but where data and run are."""
    spec, eval_every = shared.specs[row], -(-shared.max_steps // NUM_EVALS)
    pretrained = encoder_folder(shared.runs_dir, row, seed) if spec.pretrain else shared.pretrained
    own = f"--max_steps {shared.max_steps} --batch_size {BATCH_SIZE} --predict_splits dev"
    own += f" --eval_every {eval_every} --eval_max_examples {EVAL_MAX_EXAMPLES}"
    flags = [*own.split(), *shared.run_flags, *shlex.split(spec.flags), "--seed", str(seed)]
    return ["--pretrained", str(pretrained), *flags]


def is_finished(folder: Path) -> bool:
    """Whether a run got to its end, where it writes its scores and then its prediction files."""
    if not (folder / "scores.json").exists():
        return False
    names = [prediction_name(task, "dev", "starter") for task in read_scores(folder)["dev"]["tasks"]]
    return all((folder / "predictions" / name).exists() for name in names)


def has_encoder(folder: Path) -> bool:
    return (folder / "config.json").exists()


def encoder_folder(runs_dir: Path, row: str, seed: int) -> Path:
    return folder_of(runs_dir, f"{row}-encoder", seed)


def make_job(shared: SharedSettings, row: str, seed: int) -> Job:
    folder = folder_of(shared.runs_dir, row, seed)
    train = [sys.executable, str(ROOT / "multitask_classifier.py"), "--output_dir", str(folder)]
    stages = [
        Stage(
            folder,
            [*train, "--data_dir", shared.data_dir, *run_flags(shared, row, seed)],
            is_finished,
            resume=[*train, "--data_dir", shared.data_dir, "--resume"],
            num_steps=shared.max_steps,
            discard="last",
        )
    ]
    if shared.specs[row].pretrain:
        encoder = encoder_folder(shared.runs_dir, row, seed)
        script = [sys.executable, "-m", "training.pretrain_mlm", "--output_dir", str(encoder)]
        settings = ["--pretrained", shared.pretrained]
        settings += ["--max_steps", str(shared.max_steps), "--seed", str(seed)]
        given = given_flags(shared.run_flags)
        for name in sorted({"device", "precision"} & set(given)):
            settings += [f"--{name}", given[name]]
        command = [*script, "--data_dir", shared.data_dir, *settings]  # resumes by itself
        stages.insert(0, Stage(encoder, command, has_encoder, num_steps=shared.max_steps))
    return Job(folder.name, stages)


def check_settings(shared: SharedSettings, row: str, seed: int, folder: Path) -> None:
    """Refuse a run folder that was made with settings other than those the table would give it now.

    Raises:
        UserError: naming the folder and the flag.
    """

    def compare(folder, stored, asked, names):
        # The table's own flags first: --eval_every, for one, follows from --max_steps.
        for name in sorted(names, key=lambda name: (name not in OWN_FLAGS, name)):
            if stored.get(name) != asked.get(name):
                raise UserError(
                    f"{folder}: was made with --{name} {stored.get(name, '(default)')}, the table now asks"
                    f" for {asked.get(name, '(default)')}; give the flags it was made with, give another"
                    " --runs_dir, or remove that folder"
                )

    free, encoder = FREE_FLAGS, encoder_folder(shared.runs_dir, row, seed)
    if shared.specs[row].pretrain:
        free = free | {"pretrained"}
        if (encoder / "args.json").exists():
            asked = {"pretrained": shared.pretrained, "max_steps": shared.max_steps}
            compare(encoder, read_json(encoder / "args.json").get("args", {}), asked, asked)
    if (folder / "args.json").exists():
        stored, asked = read_run(str(folder))[1], get_run_args(run_flags(shared, row, seed)).given
        compare(folder, stored, asked, (set(stored) | set(asked)) - free)


# --- cost -------------------------------------------------------------------------------------------------


def estimate_seconds(shared: SharedSettings, row: str, rate: float) -> float:
    """Rough time of one run on this machine: its operations over a measured matrix rate."""
    if shared.pretrained == OFFLINE_ENCODER:
        size = BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)
    elif Path(shared.pretrained).is_dir():
        size = BertConfig.from_json(Path(shared.pretrained) / "config.json")
    else:  # a hub name: assume the size of bert-base
        size = BertConfig()
    width = size.hidden_size
    params = size.num_hidden_layers * (4 * width**2 + 2 * width * size.intermediate_size)
    tasks = get_run_args(shlex.split(shared.specs[row].flags)).tasks
    examples = 3 * shared.max_steps * BATCH_SIZE * len(tasks)  # forward and twice that backward
    examples += EVAL_EXAMPLES if len(tasks) > 1 else 1_100
    stages = 2 if shared.specs[row].pretrain else 1
    return stages * 2 * params * TOKENS_PER_EXAMPLE * examples / rate


def matrix_rate() -> float:
    """Floating-point operations a second in a matrix product of the size and type that training uses."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = PRECISIONS[resolve_precision("auto", device)[0]]
    a = torch.randn(1024, 1024, device=device, dtype=dtype)
    best = 0.0
    for _ in range(8):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # waits for a GPU
        best = max(best, 2 * 1024**3 / (time.perf_counter() - start))
    return 0.2 * best  # the share of it that a small encoder reaches (measured on two CPU cores)


def missing_files(data_dir: str, flags: str) -> list[Path]:
    """Data files that a row with these flags needs but that are missing."""
    run_args = get_run_args(["--data_dir", data_dir, *shlex.split(flags)])
    files = data_settings(run_args).files
    paths = [files[task, split] for task in run_args.tasks for split in ("train", "dev")]
    paths += [path for source in run_args.extra_data for path in source_paths(source, data_dir)]
    return [path for path in paths if not path.exists()]


def print_plan(shared: SharedSettings, rows: list[str], seeds: list[int]) -> None:
    rate, total = matrix_rate(), 0.0
    headings = {"poster": "rows of the poster", "future": "its future steps", "own": "rows given here"}
    headings |= {name: f"rows of the poster, {regime.title}" for name, regime in REGIMES.items()}
    for group in dict.fromkeys(shared.specs[row].group for row in rows):
        of_group = [row for row in rows if shared.specs[row].group == group]
        print(f"{headings.get(group, group)}: {len(of_group)}")
        for row in of_group:
            print(f"  {row}: {shared.specs[row].title}")
            for seed in seeds:
                job = make_job(shared, row, seed)
                seconds = estimate_seconds(shared, row, rate) if job.stage else 0.0
                total += seconds
                for stage in job.stages:
                    done = stage.is_finished(stage.folder)
                    command = stage.next_command()
                    command = ["python", Path(command[1]).name, *command[2:]]
                    print("    " + ("(finished) " if done else "") + shlex.join(command))
    print("test set: predictions of the run that is best on dev")
    needed_by = {}
    for row in rows:
        for path in missing_files(shared.data_dir, shared.specs[row].flags):
            needed_by.setdefault(path, []).append(row)
    for path, names in needed_by.items():
        print(f"missing: {path}, needed by {', '.join(names)}")
    cost = f"about {total / 3600:.1f} hours on this machine (a rough estimate from its matrix rate)"
    print(f"{len(rows) * len(seeds)} runs, {cost}")


# --- the command ------------------------------------------------------------------------------------------


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with code 2 and one line if a flag is wrong."""
    parser = OneLineParser(
        prog="results_table.py",
        description="Train every row of the poster's table with several seeds, compare, judge the claims.",
        epilog="Flags after -- go to every run, as in: results_table.py --seeds 0 1 -- --lr 3e-5",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--rows",
        nargs="+",
        choices=ROWS,
        metavar="ROW",
        help=f"out of {', '.join(ROWS)} (default: all, or none if rows are given by --row or --row_file)",
    )
    text = "a row of your own, compared with the table's first one, as in 'mgda: --grad_method mgda'; may be"
    text += " given several times"
    add("--row", action="append", default=[], metavar="NAME: FLAGS", help=text)
    add("--row_file", type=Path, metavar="FILE", help="a file of such rows, one a line; # begins a comment")
    text = f"regimes to train in: {TUNED} (ours, all rows); of {', '.join(REGIME_ROWS)} alone: "
    text += ", ".join(f"{name} ({regime.title})" for name, regime in REGIMES.items())
    add("--regime", nargs="+", choices=(TUNED, *REGIMES), default=[TUNED], help=f"{text} (default: {TUNED})")
    add("--seeds", nargs="+", type=SEED, default=[0, 1, 2], help="(default: 0 1 2)")
    add("--pretrained", default=OFFLINE_ENCODER, help=f"encoder to start from (default: {OFFLINE_ENCODER})")
    add("--data_dir", default="data", metavar="DIR", help="folder with the data files (default: data)")
    add("--max_steps", type=COUNT, default=1000, help="length of each run in steps (default: 1000)")
    add("--runs_dir", type=Path, default=Path("runs/table"), help="folder of the runs (default: runs/table)")
    add("--results_dir", type=Path, help="where the table goes (default: results/ in --runs_dir)")
    text = "runs at a time; here they share the processor's cores (default: 1; on a cluster: all)"
    add("--jobs", type=COUNT, help=text)
    add("--num_resamples", type=number(int, 40), default=2000, help="of the bootstrap (default: 2000)")
    add(
        "--dry_run",
        action="store_true",
        help="print the commands and a rough estimate of the time, run nothing",
    )
    add("--no_train", action="store_true", help="make the table from what is finished, run nothing")
    add("--compare", nargs=2, metavar="ROW", help="print how two rows differ, run nothing")
    add_cluster_flags(add)
    argv = sys.argv[1:] if argv is None else argv
    split = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:split])
    more = argv[split + 1 :]
    args.results_dir = args.results_dir or args.runs_dir / "results"
    slurm = {"partition": args.slurm_partition, "time": args.slurm_time, "option": args.slurm_option}
    for name in (name for name, value in slurm.items() if value and args.cluster != "slurm"):
        parser.error(f"--slurm_{name} is given, but no --cluster slurm; expected both or neither")
    for name in ("rows", "seeds", "regime"):
        if len(set(getattr(args, name) or ())) < len(getattr(args, name) or ()):
            parser.error(f"--{name} holds a value twice; expected each once")
    choose_rows(parser, args, more)
    given = (args.pretrained, args.data_dir, args.max_steps, args.runs_dir)
    args.shared = SharedSettings(*given, more, args.specs)
    for row in args.rows:
        get_run_args(run_flags(args.shared, row, args.seeds[0]))  # ends here if a flag is wrong
    return args


def add_cluster_flags(add: Callable) -> None:
    """The flags that hand runs to a cluster."""
    text = "hand the runs to a Slurm cluster, wait for them there; local: try it without one, all at once"
    add("--cluster", choices=CLUSTERS, help=text)
    add("--slurm_partition", metavar="NAME", help="partition of the cluster (default: the cluster's)")
    minutes = FlagType(parse_minutes, bool, "minutes, H:MM:SS or DAYS-H:MM:SS", "TIME")
    text = "time limit of a job, which saves and goes on in a new one before it ends (default: 4:00:00)"
    add("--slurm_time", type=minutes, metavar="TIME", help=text)
    option = FlagType(parse_option, bool, "NAME=VALUE, as in gres=gpu:1", "NAME=VALUE")
    text = "a further option of sbatch, as in gres=gpu:1 or cpus-per-task=8; may be given several times"
    add("--slurm_option", type=option, action="append", default=[], metavar="NAME=VALUE", help=text)


def starter(args: argparse.Namespace) -> Callable[[list[Job]], list[Job]]:
    """What runs jobs until each is over and returns those that failed: this machine, or a cluster."""
    if args.cluster:
        check_cluster(args.cluster)
        limits = {"at_once": args.jobs, "partition": args.slurm_partition, "options": dict(args.slurm_option)}
        limits |= {"minutes": args.slurm_time} if args.slurm_time else {}
        return partial(run_on_cluster, cluster=Cluster(args.cluster, args.runs_dir / "cluster", **limits))
    at_once = args.jobs or 1
    num_threads = max(1, (os.cpu_count() or 1) // at_once) if at_once > 1 else None
    return partial(run_jobs, at_once=at_once, num_threads=num_threads)


def choose_rows(parser: OneLineParser, args: argparse.Namespace, run_flags: list[str]) -> None:
    """Set `args.rows`, names, and `args.specs`, what they are; refuse flags that belong elsewhere."""
    own, asked = own_rows(args), args.rows or ()
    lr = "1e-4" if args.pretrained == OFFLINE_ENCODER else "1e-5"  # as --lr is chosen by the encoder's width
    of_regimes = regime_rows(lr)
    rows = list(asked or ([] if own else ROWS)) if TUNED in args.regime else []
    for name in args.regime:
        chosen = [row for row in REGIME_ROWS if name != TUNED and (not asked or row in asked)]
        rows += [f"{name}.{row}" for row in chosen]
    args.rows = [*rows, *own]
    args.specs = ROWS | of_regimes | own
    if not args.rows:
        parser.error(
            f"--regime {' '.join(args.regime)} has {', '.join(REGIME_ROWS)} only; expected one of them"
        )
    for row in args.compare or ():
        if row not in args.specs:
            parser.error(f"--compare: value is {row!r}; expected two out of {', '.join(args.specs)}")
    differ = set(ROW_FLAGS) if rows else set()
    for row in set(rows) & set(of_regimes):
        differ |= set(given_flags(shlex.split(of_regimes[row].flags)))
    for row, spec in own.items():
        given = set(given_flags(shlex.split(spec.flags)))
        for name in sorted(given & (OWN_FLAGS - {"tasks"})):
            parser.error(f"row {row} has --{name}, but the table gives it itself; expected other flags")
        differ |= given
    for name in sorted(set(given_flags(run_flags)) & (OWN_FLAGS | NO_FLAGS | differ)):
        why = "the table has to know it" if name in OWN_FLAGS else "rows of the table differ in it"
        parser.error(f"--{name} is given after --, but {why}; expected other flags of training")


def check_training_data(runs: dict[str, dict[int, FinishedRun]]) -> None:
    """Refuse to compare runs that were trained on different data, unless --extra_data made the difference.

    Raises:
        UserError: naming two such folders.
    """
    first = {}  # (task, additional sources) -> fingerprint and folder
    for run in (run for found in runs.values() for run in found.values()):
        for task, fingerprint in run.facts["data"]["train"].items():
            key = task, str(run.facts["args"]["extra_data"])
            seen, folder = first.setdefault(key, (fingerprint, run.folder))
            if seen != fingerprint:
                raise UserError(
                    f"{run.folder}: was trained on other {task} data ({fingerprint}) than {folder} ({seen});"
                    " all runs of a table need the same --data_dir"
                )


def read_table(shared: SharedSettings, rows: list[str], seeds: list[int], num_resamples: int) -> Table:
    """The finished runs of some rows; `num_resamples` is that of the bootstrap."""
    dev_data, runs = DevData(shared.data_dir), {}
    for row in rows:
        folders = {seed: folder_of(shared.runs_dir, row, seed) for seed in seeds}
        finished = {seed: folder for seed, folder in folders.items() if is_finished(folder)}
        for seed, folder in finished.items():
            check_settings(shared, row, seed, folder)
        if finished:
            runs[row] = {seed: read_finished_run(folder, dev_data) for seed, folder in finished.items()}
    check_training_data(runs)
    if not runs:
        raise UserError(f"--runs_dir {shared.runs_dir}: holds no finished run of {', '.join(rows)}")
    return Table(runs, dev_data, num_resamples, shared.specs)


def predict_test_set(data_dir: str, folder: Path, run_all: Callable[[list[Job]], list[Job]]) -> None:
    """Let a run predict the test set, if it has not yet; says so if it could not."""
    script = [sys.executable, str(ROOT / "multitask_classifier.py"), "--output_dir", str(folder)]
    script += ["--data_dir", data_dir, "--predict_only", "--predict_splits", "test"]
    for job in run_all([Job(f"{folder.name}-test", [Stage(folder, script, has_predicted)])]):
        print(f"warning: no predictions of the test set: {job.failure}")


def has_predicted(folder: Path) -> bool:
    return all((folder / name).exists() for name in TEST_FILES)


def run(argv: list[str] | None) -> None:
    args = get_args(argv)
    shared, rows, seeds = args.shared, args.rows, args.seeds
    if args.compare:
        table = read_table(shared, args.compare, seeds, args.num_resamples)
        return print(format_comparison(table, *args.compare))
    for row in rows:
        for seed in seeds:
            check_settings(shared, row, seed, folder_of(shared.runs_dir, row, seed))
    if args.dry_run:
        return print_plan(shared, rows, seeds)
    check_results_dir(args.results_dir)
    run_all = starter(args)
    jobs = [make_job(shared, row, seed) for seed in seeds for row in rows]  # a seed of all rows first
    failed = [] if args.no_train else run_all(jobs)
    table = read_table(shared, rows, seeds, args.num_resamples)
    best = table.best_run and folder_of(shared.runs_dir, *table.best_run)
    if best and not args.no_train:
        predict_test_set(shared.data_dir, best, run_all)
    command = ["results_table.py", *(sys.argv[1:] if argv is None else argv)]
    predicted = best if best and has_predicted(best) else None
    written = write_results(table, args.results_dir, command, predicted)
    print(format_claims(table) if table.has_poster else format_differences(table))
    print("written: " + ", ".join(map(str, written)))
    if failed:
        reasons = "; ".join(f"{job.name}: {job.failure}" for job in failed)
        raise UserError(f"{len(failed)} of {len(jobs)} runs failed: {reasons}")


def main(argv: list[str] | None = None) -> int:
    return run_script("results_table.py", partial(run, argv))
