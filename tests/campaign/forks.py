"""Runs in forked processes, and what they leave: for the fault campaign, where a run may be killed at any moment.

The parent has imported everything once. A child shares a few numbers with it (`Cell`), so that the parent knows what the
child was doing when it was killed.
"""

import builtins
import gc
import hashlib
import io
import json
import mmap
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

import multitask_classifier
from config import TASKS
from evaluation import read_predictions
from training import checkpoint
from training.checkpoint import SUMS_FILE
from training.run_folder import ARGS_FILE

DOING = (
    "reading data, encoder or checkpoint",
    "training, no checkpoint yet",
    "training",
    "evaluating",
    "writing best/",
    "writing last/",
    "scores and predictions",
)
STARTING, FIRST_TRAINING, TRAINING, EVALUATING, SAVING_BEST, SAVING_LAST, FINISHING = range(len(DOING))
# What touches the disk, by module; writing to an opened file is counted apart.
OPERATIONS = {
    os: ("replace", "rename", "fsync", "unlink", "remove", "rmdir", "mkdir", "link", "symlink", "truncate"),
    shutil: ("rmtree", "copyfile"),
    checkpoint: ("save_file",),
}
# Endings of names under which a file or folder may be half there.
UNFINISHED = (".tmp", ".new", ".old", ".lock")
MEMORY_LIMIT = 8 * 2**30  # bytes of address space; a damaged file must not ask for more
HANG_SECONDS = 30  # for one case, on a busy machine; then it counts as hanging
SILENCE_SECONDS = 90  # of a worker, before it is given up


class Cell:
    """Numbers that outlive the child that writes them."""

    NAMES = ("doing", "step", "started_at", "saved_step", "saves", "operations")

    def __init__(self):
        self.numbers = np.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), dtype=np.int64)
        self.clear()

    def __getitem__(self, name: str) -> int:
        return int(self.numbers[self.NAMES.index(name)])

    def __setitem__(self, name: str, value: int) -> None:
        self.numbers[self.NAMES.index(name)] = value

    def what(self) -> str:
        """What the child was doing, in words."""
        first = self["doing"] == TRAINING and not self["saves"] and self["started_at"] <= 0
        return DOING[FIRST_TRAINING if first else self["doing"]]

    def clear(self) -> None:
        self.numbers[:] = 0
        self["started_at"] = -1  # the training loop was not reached


# --- what a run folder holds -------------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def older(folder: Path) -> list[int]:
    """Numbers of the checkpoints before `last/`: N of each `last.N/`."""
    found = (re.fullmatch(r"last\.(\d+)", path.name) for path in folder.glob("last.*"))
    return sorted(int(match[1]) for match in found if match)


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints to go on from, newest first."""
    names = ["last", *(f"last.{number}" for number in older(folder))]
    return [folder / name for name in names if (folder / name / "state.json").exists()]


def is_sealed(folder: Path) -> bool:
    """Whether a checkpoint's files are those that its checksums were made of."""
    try:
        check_file(folder / SUMS_FILE, {})
    except (OSError, ValueError):
        return False
    return True


def check_file(path: Path, num_rows: dict[str, int]) -> None:
    """Raises something if a file is not whole.

    Args:
        num_rows: file name -> rows, of prediction files whose number of rows is known.
    """
    if path.suffix == ".json":
        if not isinstance(json.loads(path.read_text(encoding="utf-8")), dict):
            raise ValueError("no JSON object")
    elif path.suffix == ".safetensors":
        load_file(path)
    elif path.suffix == ".jsonl":
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            json.loads(line)
    elif path.suffix == ".csv":
        found = len(read_predictions(path, TASKS[path.name.split("-")[0]]))
        if found != num_rows.get(path.name, found):
            raise ValueError(f"{found} rows of {num_rows[path.name]}")
    elif path.suffix == ".zip":
        zipfile.ZipFile(path).close()
    elif path.suffix == ".png":
        if not path.read_bytes().endswith(b"IEND\xaeB`\x82"):
            raise ValueError("cut off")
    elif path.name == SUMS_FILE:
        sums = dict(reversed(line.split("  ")) for line in path.read_text(encoding="utf-8").splitlines())
        if set(sums) != {other.name for other in path.parent.iterdir()} - {SUMS_FILE}:
            raise ValueError("other files than listed")
        for name, digest in sums.items():
            if hashlib.sha256((path.parent / name).read_bytes()).hexdigest() != digest:
                raise ValueError(f"{name} has another checksum")
    elif not path.read_bytes().endswith((b"\n", b">")):
        raise ValueError("cut off")


def find_problems(folder: Path, num_rows: dict[str, int], damaged: bool = False) -> set[str]:
    """What is not whole under a final name in a run folder.

    Args:
        damaged: checkpoints to go on from were damaged on purpose.
    """

    def is_exempt(parts):
        is_last = parts[0].partition(".")[0] == "last"
        return (damaged and is_last) or any(part.endswith(UNFINISHED) for part in parts)

    problems = set()
    for path in sorted(folder.rglob("*")) if folder.exists() else ():
        parts = path.relative_to(folder).parts
        if not path.is_file() or is_exempt(parts):
            continue
        try:
            check_file(path, num_rows)
        except Exception as error:  # noqa: BLE001 (whatever a damaged file makes a reader raise)
            problems.add(f"{'/'.join(parts)} is not whole: {type(error).__name__}: {str(error)[:200]}")
    for path in (*folder.glob("last*"), *folder.glob("best*")):
        if is_exempt((path.name,)):
            continue
        needed = {"config.json", "vocab.txt", "tokenizer_config.json", "model.safetensors", "state.json"}
        needed |= {"optimizer.safetensors"} if path.name.startswith("last") else set()
        needed.add(SUMS_FILE)
        for name in sorted(needed - {file.name for file in path.iterdir()}):
            problems.add(f"{path.name}/ is not whole: {name} is missing")
    return problems


def comparable(folder: Path) -> dict[str, object]:
    """Everything a run leaves that must be the same bits, by file; commands, pictures and speed are not.

    A run that was stopped has other checkpoints before `last/`; that they are whole is asked elsewhere.
    """
    found = {}
    for name, content in snapshot(folder).items():
        path = Path(name)
        if path.name in (ARGS_FILE, "curves.png") or re.fullmatch(r"last\.\d+", path.parts[0]):
            continue
        if path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in content.decode().splitlines()]
            found[name] = [{key: line[key] for key in line if key != "tokens_per_second"} for line in lines]
        elif path.name == SUMS_FILE:
            found[name] = [line for line in content.decode().splitlines() if not line.endswith(ARGS_FILE)]
        else:
            found[name] = content
    return found


def find_differences(folder: Path, reference: dict[str, object]) -> list[str]:
    found = comparable(folder)
    return [
        f"{name} {'differs' if name in found and name in reference else 'is extra' if name in found else 'is absent'}"
        for name in sorted(set(found) | set(reference))
        if found.get(name) != reference.get(name)
    ]


# --- what a child does to itself; it ends afterwards, so nothing is put back --------------------------------------


def watch(cell: Cell, strike_at: tuple[int, int] | None = None, plot: bool = False) -> None:
    """Let a run note in `cell` what it is doing.

    Args:
        strike_at: (step, signal) that the run gets in the middle of that step.
        plot: draw the curves at the end, which takes a second.
    """

    def wrap(owner, name, doing, before=None, after=None):
        function = getattr(owner, name)

        def wrapped(*args, **options):
            outside, cell["doing"] = cell["doing"], doing
            if before:
                before(*args, **options)
            result = function(*args, **options)
            if after:
                after(*args)
            cell["doing"] = outside
            return result

        setattr(owner, name, wrapped)

    def start_training(args, run, *rest, **options):
        cell["started_at"] = cell["step"] = run.state["step"]

    def start_step(*args, step, **options):
        cell["step"] = step
        if strike_at and step == strike_at[0]:
            signal.raise_signal(strike_at[1])

    def note_save(run):
        cell["saved_step"] = run.state["step"]
        cell["saves"] += 1

    main = multitask_classifier
    wrap(main, "train", TRAINING, start_training)
    wrap(main, "train_step", TRAINING, start_step)
    wrap(main, "evaluate", EVALUATING)
    wrap(main, "finish", FINISHING)
    wrap(main.Run, "save_best", SAVING_BEST)
    wrap(main.Run, "save_last", SAVING_LAST, after=note_save)
    if not plot:
        main.plot_run = lambda folder: None


@dataclass
class Strike:
    """SIGKILL at the file operation with this number.

    Args:
        moment: before it, in the middle (half of the bytes are written), or after it.
        power_cut: what was not put on disk by then is lost, as when the power fails.
    """

    number: int
    moment: str = "before"
    power_cut: bool = False


def count_operations(cell: Cell, folder: Path, strike: Strike | None = None) -> None:
    """Count a run's file operations, in `folder` where they name a file, and kill it at one of them."""
    inside = str(folder)
    dirty = {}  # path -> bytes that are safe on disk
    strike = strike or Strike(0)

    def is_due():
        cell["operations"] += 1
        return cell["operations"] == strike.number

    def die():
        for path, size in dirty.items() if strike.power_cut else ():
            with suppress(OSError), real_open(path, "r+b") as file:
                file.truncate(min(size, os.fstat(file.fileno()).st_size))
        os.kill(os.getpid(), signal.SIGKILL)

    def wrap(owner, name):
        function = getattr(owner, name)

        def wrapped(*args, **options):
            due = is_due()
            if due and strike.moment == "before":
                die()
            result = function(*args, **options)
            if name == "save_file":
                dirty[str(args[1])] = 0
                if due and strike.moment == "middle":
                    os.truncate(args[1], os.path.getsize(args[1]) // 2)
            elif name == "fsync":
                with suppress(OSError):
                    path = os.readlink(f"/proc/self/fd/{args[0]}")
                    dirty.pop(path, None)
            elif name in ("replace", "rename"):
                # A folder takes its files with it.
                source, target = str(args[0]), str(args[1])
                for path in [path for path in dirty if path == source or path.startswith(source + os.sep)]:
                    dirty[target + path.removeprefix(source)] = dirty.pop(path)
            if due:
                die()
            return result

        setattr(owner, name, wrapped)

    real_open = io.open

    def opened(file, mode="r", *args, **options):
        if not set(mode) & set("wax+") or not str(file).startswith(inside):
            return real_open(file, mode, *args, **options)
        due = is_due()
        if due and strike.moment == "before":
            die()
        before = os.path.getsize(file) if "a" in mode and os.path.exists(file) else 0
        stream = real_open(file, mode, *args, **options)
        dirty[str(file)] = min(dirty.get(str(file), before), before)

        def write(content):
            type(stream).write(stream, content[: len(content) // 2] if strike.moment == "middle" else content)
            stream.flush()
            die()

        if due:
            stream.write = write
        return stream

    for owner, names in OPERATIONS.items():
        for name in names:
            wrap(owner, name)
    builtins.open = io.open = opened


# --- children ----------------------------------------------------------------------------------------------------


@dataclass
class Ended:
    """How a child ended: an exit code, or the signal that killed it."""

    code: int | None
    signal: int | None
    seconds: float
    num_signals: int  # of those planned, sent before it ended
    out: str
    err: str

    def __str__(self) -> str:
        how = f"killed by signal {self.signal}" if self.code is None else f"exit code {self.code}"
        last = self.err.strip().splitlines()[-1:]
        return f"{how}{': ' + last[0][:300] if last else ''}"


def run_forked(
    work: Callable[[], int],
    folder: Path,
    blows: Sequence[tuple[float, int]] = (),
    seconds: float = 60,
) -> Ended:
    """Run `work` in a child and wait for it.

    Args:
        work: returns the exit code, or exits.
        folder: where the child's output goes.
        blows: (seconds after the start, signal) to send, in order.
        seconds: after which the child is killed by SIGALRM: it hangs.
    """
    out, err = folder / "stdout", folder / "stderr"
    out.touch()
    err.touch()  # a child may be killed before it opens them
    pid = os.fork()
    if pid == 0:
        in_child(work, out, err, seconds)
    started, num_signals, done = time.monotonic(), 0, 0
    while not done:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        now = time.monotonic() - started
        if num_signals < len(blows) and now >= blows[num_signals][0]:
            os.kill(pid, blows[num_signals][1])  # not reaped yet, so the number is still the child's
            num_signals += 1
        elif now > seconds + 20:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)
    code = os.waitstatus_to_exitcode(status)
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in (out, err))
    ended = Ended(
        code if code >= 0 else None,
        -code if code < 0 else None,
        time.monotonic() - started,
        num_signals,
        *texts,
    )
    out.unlink()
    err.unlink()
    return ended


def in_child(work: Callable[[], int], out: Path, err: Path, seconds: float) -> None:
    code = 1
    try:
        for number in (signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        os.chdir(out.parent)  # relative paths of random command lines lead there
        for descriptor, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(io.FileIO(descriptor, "w"), "utf-8", "backslashreplace", write_through=True)
            for descriptor in (1, 2)
        )
        code = work()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:  # before or after the run's own handling of it
        code = 130
    except BaseException:  # noqa: BLE001 (a child must never go on as if it were its parent)
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


# --- many cases on several cores ---------------------------------------------------------------------------------


@dataclass
class Died:
    """In place of a result: the process that worked on the case died, or was killed because it hung."""

    exit_code: int

    def __str__(self) -> str:
        return "hung" if self.exit_code == -signal.SIGKILL else f"process died with code {self.exit_code}"


def in_parallel(work: Callable, cases: Iterable, jobs: int) -> Iterator[tuple]:
    """Yields (case, result of `work(case)`) in the order they are done; each job is a forked process."""
    gc.collect()
    gc.freeze()  # the children's collectors leave the parent's memory alone, which then need not be copied
    context = multiprocessing.get_context("fork")

    def serve(sender, share):
        if sys.platform == "linux":
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
        for case in share:
            sender.send((case, None))
            sender.send((case, work(case)))
        sender.close()

    def start(share):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=serve, args=(sender, share))
        process.start()
        sender.close()
        workers[receiver] = [process, share, None, time.monotonic()]

    workers = {}
    cases = list(cases)
    for number in range(max(1, min(jobs, len(cases)))):
        start(cases[number::jobs])
    try:
        while workers:
            for receiver in connection.wait(list(workers), timeout=1):
                worker = workers[receiver]
                try:
                    case, result = receiver.recv()
                except EOFError:
                    process, share, current, _ = workers.pop(receiver)
                    receiver.close()
                    process.join()
                    if current is not None:
                        yield current, Died(process.exitcode)
                        start(share[share.index(current) + 1 :])
                    continue
                worker[2:] = case if result is None else None, time.monotonic()
                if result is not None:
                    yield case, result
            for process, _, _, since in workers.values():
                if time.monotonic() - since > SILENCE_SECONDS:
                    process.kill()
    finally:
        for process, *_ in workers.values():
            process.kill()
            process.join()
        gc.unfreeze()
