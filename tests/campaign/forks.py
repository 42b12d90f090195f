"""Runs in forked processes, and what they leave: for the fault campaign, which kills a run at any moment.

The parent has imported everything once. A child shares a few numbers with it (`Cell`), so that the parent
knows what the child was doing when it was killed.
"""

import builtins
import ctypes
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
import tempfile
import threading
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from multiprocessing import connection
from pathlib import Path

from safetensors.numpy import load_file
from tqdm import tqdm

import multitask_classifier
from config import TASKS
from evaluation import read_predictions
from support.bars import Bar
from training import checkpoint
from training.checkpoint import SUMS_FILE
from training.run_folder import ARGS_FILE

DOING = (
    *("reading data, encoder or checkpoint", "training, no checkpoint yet", "training", "evaluating"),
    *("writing best/", "writing last/", "scores and predictions"),
)
FIRST_TRAINING, TRAINING = 1, 2
# What touches the disk, by module; writing to an opened file is counted separately.
OPERATIONS = {
    os: ("replace", "rename", "fsync", "unlink", "remove", "rmdir", "mkdir", "link", "symlink", "truncate"),
    shutil: ("rmtree", "copyfile"),
    checkpoint: ("save_file",),
}
# A file or folder whose name ends so may be half written.
UNFINISHED = (".unfinished", ".new", ".old", ".lock")
CHECKPOINT_FILES = {"config.json", "vocab.txt", "tokenizer_config.json", "model.safetensors", "state.json"}
CHECKPOINT_FILES.add(SUMS_FILE)
PNG_END = b"IEND\xaeB`\x82"
MEMORY_LIMIT = 8 * 2**30  # bytes of address space; a damaged file must not ask for more
SILENCE_SECONDS = 400  # of a case, before it is given up


# --- what a run folder holds --------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, bytes]:
    """File -> content, but for the lock."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def older(folder: Path) -> list[int]:
    """Numbers of the checkpoints before `last/`: N of each `last.N/`."""
    found = (re.fullmatch(r"last\.(\d+)", path.name) for path in folder.glob("last.*"))
    return sorted(int(match[1]) for match in found if match)


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that a run can resume from, newest first."""
    names = ["last", *(f"last.{number}" for number in older(folder))]
    return [folder / name for name in names if (folder / name / "state.json").exists()]


def check_sums(path: Path) -> None:
    sums = dict(reversed(line.split("  ")) for line in path.read_text(encoding="utf-8").splitlines())
    if set(sums) != {other.name for other in path.parent.iterdir()} - {SUMS_FILE}:
        raise ValueError("other files than listed")
    for name, digest in sums.items():
        if hashlib.sha256((path.parent / name).read_bytes()).hexdigest() != digest:
            raise ValueError(f"{name} has another checksum")


def is_sealed(folder: Path) -> bool:
    """Whether a checkpoint's files are those that its checksums were made of."""
    try:
        check_sums(folder / SUMS_FILE)
    except (OSError, ValueError):
        return False
    return True


def check_file(path: Path, num_rows: dict[str, int]) -> None:
    """Raises something if a file is not whole.

    Args:
        num_rows: file name -> rows, of prediction files whose number of rows is known.
    """
    content = path.read_bytes()
    if path.name == SUMS_FILE:
        check_sums(path)
    elif path.suffix in (".json", ".jsonl"):
        for text in content.split(b"\n")[:-1] if path.suffix == ".jsonl" else [content]:
            assert isinstance(json.loads(text), dict), "no JSON object"
    elif path.suffix == ".safetensors":
        load_file(path)
    elif path.suffix == ".csv":
        found = len(read_predictions(path, TASKS[path.name.split("-")[0]]))
        assert found == num_rows.get(path.name, found), f"{found} rows of {num_rows[path.name]}"
    elif path.suffix == ".zip":
        zipfile.ZipFile(path).close()
    else:
        assert content.endswith(PNG_END if path.suffix == ".png" else (b"\n", b">")), "cut off"


def find_problems(folder: Path, num_rows: dict[str, int], damaged: bool = False) -> set[str]:
    """What is not whole under a final name in a run folder.

    Args:
        damaged: checkpoints to resume from were damaged on purpose.
    """
    problems = set()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        was_damaged = damaged and re.match(r"last[./]|last$", name)
        if was_damaged or any(part.endswith(UNFINISHED) for part in name.split("/")):
            continue
        if path.is_file():
            try:
                check_file(path, num_rows)
            except Exception as error:  # noqa: BLE001 (whatever a damaged file makes a reader raise)
                problems.add(f"{name} is not whole: {type(error).__name__}: {str(error)[:200]}")
        elif name.startswith(("last", "best")):
            needed = CHECKPOINT_FILES | ({"optimizer.safetensors"} if name.startswith("last") else set())
            absent = sorted(needed - {file.name for file in path.iterdir()})
            problems |= {f"{name}/ is not whole: {missing} is missing" for missing in absent}
    return problems


def comparable(folder: Path) -> dict[str, object]:
    """Everything a run leaves that must be the same bits, by file; commands, pictures and speed are not.

    A run that was stopped has other checkpoints before `last/`; `find_problems` asks whether they are whole.
    """
    found = {}
    for name, content in snapshot(folder).items():
        path = Path(name)
        if path.name in (ARGS_FILE, "curves.png") or re.fullmatch(r"last\.\d+", path.parts[0]):
            continue
        if path.name == "metrics.jsonl":
            content = [json.loads(line) | {"tokens_per_second": None} for line in content.splitlines()]
        elif path.name == SUMS_FILE:
            content = [line for line in content.decode().splitlines() if not line.endswith(ARGS_FILE)]
        found[name] = content
    return found


def find_differences(folder: Path, reference: dict[str, object]) -> list[str]:
    found = comparable(folder)
    return [
        f"{name} {'is absent' if name not in found else 'differs' if name in reference else 'is extra'}"
        for name in sorted(found.keys() | reference.keys())
        if found.get(name) != reference.get(name)
    ]


# --- children -----------------------------------------------------------------------------------------------


class Cell(ctypes.Structure):
    """Numbers that a child writes, and that outlive it."""

    NAMES = ("doing", "started_at", "saved_step", "num_saves", "num_operations")
    _fields_ = [(name, ctypes.c_int64) for name in NAMES]

    def what(self) -> str:
        """What the child was doing, in words."""
        first = self.doing == TRAINING and not self.num_saves and self.started_at <= 0
        return DOING[FIRST_TRAINING if first else self.doing]


@dataclass
class Ended:
    """How a child ended."""

    status: int  # the exit code, or minus the signal that killed it
    seconds: float
    out: str
    err: str
    cell: Cell

    def __str__(self) -> str:
        how = f"killed by signal {-self.status}" if self.status < 0 else f"exit code {self.status}"
        last = self.err.strip().splitlines()[-1:]
        return f"{how}{': ' + last[0][:300] if last else ''}"


def run_forked(
    work: Callable[[Cell], int], folder: Path, blows: Sequence[tuple[float, int]] = (), seconds: float = 60
) -> Ended:
    """Run `work` in a child and wait for it.

    Args:
        work: returns the exit code, or exits.
        folder: the child's working folder.
        blows: (seconds after the start, signal) to send, in order.
        seconds: after which the child is killed by SIGALRM: it hangs.
    """
    cell, blows = Cell.from_buffer(mmap.mmap(-1, mmap.PAGESIZE)), list(blows)
    cell.started_at = -1  # the training loop was not reached
    with tempfile.TemporaryFile(dir=folder) as out, tempfile.TemporaryFile(dir=folder) as err:
        started, done = time.monotonic(), 0
        pid = os.fork()
        if pid == 0:
            run_in_child(lambda: work(cell), folder, (out, err), seconds)
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            passed = time.monotonic() - started
            if done:
                break
            if blows and passed >= blows[0][0]:
                os.kill(pid, blows.pop(0)[1])  # not reaped yet, so the number is still the child's
            elif passed > seconds + 20:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.001)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
    return Ended(os.waitstatus_to_exitcode(status), passed, *texts, cell)


def run_in_child(work: Callable[[], int], folder: Path, files: tuple, seconds: float) -> None:
    code = 1
    try:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        # tqdm's locks are shared with all forks: one that is killed while it holds one would stop them all.
        for bar in (tqdm, Bar):
            bar.set_lock(threading.RLock())
        os.chdir(folder)  # relative paths of random command lines lead there
        for number, (name, file) in enumerate(zip(("stdout", "stderr"), files, strict=True), start=1):
            os.dup2(file.fileno(), number)
            stream = io.TextIOWrapper(io.FileIO(number, "w"), "utf-8", "backslashreplace", write_through=True)
            setattr(sys, name, stream)
        code = work()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:  # before or after the run's own handling of it
        code = 130
    except BaseException:  # noqa: BLE001 (a child must never carry on as if it were its parent)
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


# --- what a child does to itself; it ends afterwards, so nothing is put back --------------------------------


def watch(cell: Cell, strike_at: tuple[int, int] | None = None, plot: bool = False) -> None:
    """Let a run note in `cell` what it is doing.

    Args:
        strike_at: (step, signal) that the run gets in the middle of that step.
        plot: draw the curves at the end, which takes a second.
    """

    def start_training(run, *rest):
        cell.started_at = run.state.step

    def start_step(*args, step, **options):
        if strike_at and step == strike_at[0]:
            signal.raise_signal(strike_at[1])

    def note_save(run):
        cell.saved_step = run.state.step
        cell.num_saves += 1

    def nothing(*args, **options):
        pass

    def wrap(owner, name, doing, before=nothing, after=nothing):
        function, number = getattr(owner, name), DOING.index(doing)

        def wrapped(*args, **options):
            outside, cell.doing = cell.doing, number
            before(*args, **options)
            result = function(*args, **options)
            after(*args)
            cell.doing = outside
            return result

        setattr(owner, name, wrapped)

    main = multitask_classifier
    wrap(main, "train", "training", start_training)
    wrap(main, "train_step", "training", start_step)
    wrap(main, "evaluate", "evaluating")
    wrap(main, "evaluate_best", "scores and predictions")
    wrap(main.Run, "save_best", "writing best/")
    wrap(main.Run, "save_last", "writing last/", after=note_save)
    if not plot:
        main.plot_run = lambda folder: None


@dataclass
class Strike:
    """SIGKILL at the file operation with this number; 0 for none.

    Args:
        moment: before it, in the middle (half of the bytes are written), or after it.
        power_cut: what was not put on disk by then is lost, as when the power fails.
        in_step: instead, a step and the signal that the run gets in the middle of it.
    """

    number: int = 0
    moment: str = "before"
    power_cut: bool = False
    in_step: tuple[int, int] | None = None


def count_operations(cell: Cell, folder: Path, strike: Strike) -> None:
    """Count a run's file operations, in `folder` where they name a file, and kill it at one of them."""
    inside, real_open = str(folder), io.open
    dirty = {}  # path -> bytes that are safe on disk

    def die():
        for path, size in dirty.items() if strike.power_cut else ():
            with suppress(OSError), real_open(path, "r+b") as file:
                file.truncate(min(size, os.fstat(file.fileno()).st_size))
        os.kill(os.getpid(), signal.SIGKILL)

    def is_due():
        cell.num_operations += 1
        due = cell.num_operations == strike.number
        if due and strike.moment == "before":
            die()
        return due

    def note(name, args):
        if name == "save_file":
            dirty[str(args[1])] = 0
        elif name == "fsync":
            with suppress(OSError):
                dirty.pop(os.readlink(f"/proc/self/fd/{args[0]}"), None)
        elif name in ("replace", "rename"):  # a folder takes its files with it
            source, target = str(args[0]), str(args[1])
            for path in [path for path in dirty if path == source or path.startswith(source + os.sep)]:
                dirty[target + path.removeprefix(source)] = dirty.pop(path)

    def wrap(owner, name):
        function = getattr(owner, name)

        def wrapped(*args, **options):
            due = is_due()
            result = function(*args, **options)
            note(name, args)
            if due and strike.moment == "middle" and name == "save_file":
                os.truncate(args[1], os.path.getsize(args[1]) // 2)
            if due:
                die()
            return result

        setattr(owner, name, wrapped)

    def opened(file, mode="r", *args, **options):
        if not set(mode) & set("wax+") or not str(file).startswith(inside):
            return real_open(file, mode, *args, **options)
        due = is_due()
        before = os.path.getsize(file) if "a" in mode and os.path.exists(file) else 0
        stream = real_open(file, mode, *args, **options)
        dirty[str(file)] = min(dirty.get(str(file), before), before)

        def write_and_die(content):
            type(stream).write(stream, content[: len(content) // 2] if strike.moment == "middle" else content)
            stream.flush()
            die()

        if due:
            stream.write = write_and_die
        return stream

    for owner, names in OPERATIONS.items():
        for name in names:
            wrap(owner, name)
    builtins.open = io.open = opened


# --- many cases on several cores ----------------------------------------------------------------------------


@dataclass
class Died:
    """In place of a result: the case's process died, or was killed because it hung."""

    exit_code: int

    def __str__(self) -> str:
        return "hung" if self.exit_code == -signal.SIGKILL else f"process died with code {self.exit_code}"


def in_parallel(
    work: Callable[[int, Path], object], num_cases: int, jobs: int, folder: Path
) -> Iterator[tuple]:
    """Yields (case, `work(case, its own folder)`) as they are done, each in a forked process of its own."""
    gc.collect()
    gc.freeze()  # the children's collectors leave the parent's memory alone, which then need not be copied
    context, cases, running = multiprocessing.get_context("fork"), iter(range(num_cases)), {}

    def serve(sender, case, own):
        if sys.platform == "linux":
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
        sender.send(work(case, own))

    try:
        while True:
            for case in islice(cases, jobs - len(running)):
                own = Path(tempfile.mkdtemp(prefix=f"case{case}-", dir=folder))
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=serve, args=(sender, case, own))
                process.start()
                sender.close()
                running[receiver] = case, process, own, time.monotonic()
            if not running:
                return
            for receiver in connection.wait(running, timeout=1):
                case, process, own, _ = running.pop(receiver)
                try:
                    result = receiver.recv()
                except EOFError:
                    result = None
                receiver.close()
                process.join()
                shutil.rmtree(own, ignore_errors=True)
                yield case, Died(process.exitcode) if result is None else result
            for _, process, _, since in running.values():
                if time.monotonic() - since > SILENCE_SECONDS:
                    process.kill()
    finally:
        for _, process, _, _ in running.values():
            process.kill()
            process.join()
        gc.unfreeze()
