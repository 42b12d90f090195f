"""What a launch of several ranks does when one of them fails: real processes, started by torchrun.

Each case returns what was wrong, in words; empty if nothing was. A launch takes seconds to start, so there
are few.
"""

import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from safetensors.torch import load_file

from support.files import ROOT
from training.checkpoint import load_state

SECONDS = 60  # in which all other ranks have to end
HANGING_SECONDS = 90  # the same for all: torchrun waits half a minute before it kills a rank that hangs
START_SECONDS = 180  # in which the first step has to be made


class Launch:
    """A launch at work, whose output goes to files."""

    def __init__(self, flags: Sequence[str], folder: Path, size: int = 2, name: str = "launch"):
        self.out, self.err = folder / f"{name}.out", folder / f"{name}.err"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}"]
        command += [str(ROOT / "multitask_classifier.py"), *flags]
        with open(self.out, "wb") as out, open(self.err, "wb") as err:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=err, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )

    def wait_for(self, text: str) -> bool:
        """Whether a text comes up on standard output while the launch runs."""
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until and self.process.poll() is None:
            if text in self.out.read_text(errors="replace"):
                return True
            time.sleep(0.1)
        return text in self.out.read_text(errors="replace")

    def ranks(self) -> dict[int, int]:
        """The processes of the ranks, by number."""
        found = {}
        for line in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            environment = Path(f"/proc/{line}/environ").read_bytes()
            if number := re.search(rb"\0RANK=(\d+)\0", environment):
                found[int(number[1])] = int(line)
        return found

    def end(self, seconds: float = SECONDS) -> list[str]:
        """Our own lines of errors, once all has ended; torchrun has a page of its own."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            for process in (*self.ranks().values(), self.process.pid):
                kill(process)  # one that hangs would stay for ever
            return ["still running"]
        lines = self.err.read_text(errors="replace").splitlines()
        return [line for line in lines if line.startswith("multitask_classifier.py:")]


def one_line(launch: Launch, pattern: str, seconds: float = SECONDS) -> list[str]:
    """What is wrong if a launch does not end with a single line of a form."""
    lines = launch.end(seconds)
    if len(lines) != 1 or not re.search(pattern, lines[0]) or launch.process.returncode == 0:
        return [f"ended with {launch.process.returncode} and {lines}, expected one line with {pattern!r}"]
    return []


def is_alive(process: int) -> bool:
    """Whether a process, which need not be a child of ours, is still there and not a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def struck_rank(
    number: int, flags: list[str], folder: Path, *, hit: Callable[[int], None], line: str
) -> list[str]:
    """Something befalls a rank; `line` is what has to be said of it."""
    launch = Launch([*flags, "--output_dir", str(folder / "struck")], folder)
    if not launch.wait_for("step 2/"):
        return [f"no step was made: {launch.end()}"]
    processes, started = launch.ranks(), time.monotonic()
    hit(processes.pop(number))
    while any(map(is_alive, processes.values())):
        if time.monotonic() > started + SECONDS:
            return [f"other ranks still run: {launch.end(0)}"]
        time.sleep(0.1)
    return one_line(launch, rf"rank {number} \(.*\){line}", HANGING_SECONDS)


def kill(process: int) -> None:
    """As the system does with a process that takes too much memory."""
    os.kill(process, signal.SIGKILL)


def hang(process: int) -> None:
    os.kill(process, signal.SIGSTOP)


def forbid_memory(process: int) -> None:
    """No more of it from here on, so that the next allocation fails."""
    resource.prlimit(process, resource.RLIMIT_AS, (1, 1))


def killed_launcher(flags: list[str], folder: Path) -> list[str]:
    launch = Launch([*flags, "--output_dir", str(folder / "orphans")], folder)
    if not launch.wait_for("step 2/"):
        return [f"no step was made: {launch.end()}"]
    processes, until = launch.ranks().values(), time.monotonic() + SECONDS
    launch.process.kill()
    while time.monotonic() < until:
        if not any(map(is_alive, processes)):
            return one_line(launch, "the launcher, or the machine of rank 0, is gone")
        time.sleep(0.1)
    for process in filter(is_alive, processes):
        kill(process)
    return ["ranks outlived their launcher"]


def no_disk(flags: list[str], folder: Path) -> list[str]:
    """Rank 0 cannot write its checkpoint, since a file has taken the place."""
    output = folder / "disk"
    launch = Launch([*flags, "--eval_every", "40", "--output_dir", str(output)], folder)
    if not launch.wait_for("step 2/"):
        return [f"no step was made: {launch.end()}"]
    (output / "metrics.jsonl").unlink()
    (output / "metrics.jsonl").mkdir()
    return one_line(launch, r"rank 0 \(.*\): .*metrics.jsonl")


def second_launch(flags: list[str], folder: Path) -> list[str]:
    """A launch into the folder of one that is at work."""
    flags = [*flags, "--output_dir", str(folder / "taken")]
    first = Launch(flags, folder)
    if not first.wait_for("step 2/"):
        return [f"no step was made: {first.end()}"]
    second = Launch(flags, folder, name="second")
    wrong = one_line(second, r"rank 0 \(.*\): --output_dir .* in use by another run", START_SECONDS)
    first.process.terminate()
    return [*wrong, *first.end()]


def stopped_and_resumed(flags: list[str], folder: Path) -> list[str]:
    """SIGTERM to the launcher saves once. Two ranks go on, to the bits of undisturbed ones; one can, too."""
    output = folder / "stopped"
    launch = Launch([*flags, "--output_dir", str(output)], folder)
    if not launch.wait_for("step 2/"):
        return [f"no step was made: {launch.end()}"]
    launch.process.terminate()
    lines = launch.end()
    said = re.findall(r"stopped by a signal at step (\d+), saved", launch.out.read_text())
    if lines or len(said) != 1 or not (output / "last").exists():
        return [f"SIGTERM: {lines}, said {said}"]
    step, wrong = int(said[0]), []
    if load_state(output / "last")["step"] != step:
        wrong.append(f"SIGTERM: step {step} was said, another was saved")
    length = ["--max_steps", str(step + 2)]
    shutil.copytree(output, folder / "again")
    for name, begin in (("again", ["--resume"]), ("whole", flags)):
        launch = Launch([*begin, *length, "--output_dir", str(folder / name)], folder, name=name)
        if lines := launch.end(START_SECONDS):
            return [*wrong, f"{name}: {lines}"]
    again, whole = (saved_tensors(folder / name / "last") for name in ("again", "whole"))
    if again != whole or not whole:
        wrong.append("two ranks that were stopped and resumed left other bits than two undisturbed ones")
    command = [sys.executable, "multitask_classifier.py", "--output_dir", str(output), "--resume", *length]
    resumed = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    if resumed.returncode or f"continuing {output} at step {step}" not in resumed.stdout:
        wrong.append(f"{shlex.join(command)} ended with {resumed.returncode}: {resumed.stderr[-500:]}")
    elif not all(tensor.isfinite().all() for tensor in load_file(output / "last/model.safetensors").values()):
        wrong.append("weights are not finite after the resume")
    return wrong


def saved_tensors(checkpoint: Path) -> dict[str, bytes]:
    """The files of weights and of the optimizer."""
    return {path.name: path.read_bytes() for path in checkpoint.glob("*.safetensors")}


CASES: dict[str, Callable[[list[str], Path], list[str]]] = {
    "rank 0 is killed": partial(struck_rank, 0, hit=kill, line=" is gone"),
    "rank 1 is killed": partial(struck_rank, 1, hit=kill, line=" is gone"),
    "rank 1 hangs": partial(struck_rank, 1, hit=hang, line=" is gone"),
    "rank 1 runs out of memory": partial(struck_rank, 1, hit=forbid_memory, line=": out of memory"),
    "the launcher is killed": killed_launcher,
    "rank 0 loses its disk": no_disk,
    "a second launch is refused": second_launch,
    "stopped and resumed": stopped_and_resumed,
}
