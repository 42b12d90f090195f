"""What a launch of several ranks does when one of them fails: real processes, started by torchrun.

Each case returns what was wrong, in words; empty if nothing was. A launch takes seconds to start, so there
are few.
"""

import os
import re
import shlex
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

SECONDS = 60  # in which all ranks have to end
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

    def rank(self, number: int) -> int:
        """The process of a rank."""
        for line in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            environment = Path(f"/proc/{line}/environ").read_bytes().split(b"\0")
            if f"RANK={number}".encode() in environment:
                return int(line)
        raise LookupError(f"no rank {number}")

    def end(self, seconds: float = SECONDS) -> list[str]:
        """Our own lines of errors, once all has ended; torchrun has a page of its own."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return ["still running"]
        lines = self.err.read_text(errors="replace").splitlines()
        return [line for line in lines if line.startswith("multitask_classifier.py:")]


def one_line(launch: Launch, pattern: str, seconds: float = SECONDS) -> list[str]:
    """What is wrong if a launch does not end with a single line of a form."""
    lines = launch.end(seconds)
    if len(lines) != 1 or not re.search(pattern, lines[0]) or launch.process.returncode == 0:
        return [f"ended with {launch.process.returncode} and {lines}, expected one line with {pattern!r}"]
    return []


def killed_rank(number: int, flags: list[str], folder: Path) -> list[str]:
    """SIGKILL, as the system sends it to a process that takes too much memory."""
    launch = Launch([*flags, "--output_dir", str(folder / "killed")], folder)
    if not launch.wait_for("step 2/"):
        return [f"no step was made: {launch.end()}"]
    os.kill(launch.rank(number), signal.SIGKILL)
    return one_line(launch, rf"rank {number} \(.*\) is gone")


def no_disk(flags: list[str], folder: Path) -> list[str]:
    """Rank 0 cannot write its checkpoint, since a file has taken the place."""
    output = folder / "disk"
    launch = Launch([*flags, "--eval_every", "40", "--output_dir", str(output)], folder)
    if not launch.wait_for("step 2/"):
        return [f"no step was made: {launch.end()}"]
    (output / "metrics.jsonl").unlink()
    (output / "metrics.jsonl").mkdir()
    return one_line(launch, r"rank 0 \(.*\): .*metrics.jsonl")


def stopped_and_resumed(flags: list[str], folder: Path) -> list[str]:
    """SIGTERM to the launcher saves once; one process goes on from there. A second launch is refused."""
    output = folder / "stopped"
    launch = Launch([*flags, "--output_dir", str(output)], folder)
    if not launch.wait_for("step 2/"):
        return [f"no step was made: {launch.end()}"]
    second = Launch([*flags, "--output_dir", str(output)], folder, name="second")
    wrong = one_line(second, r"rank 0 \(.*\): --output_dir .* in use by another run", START_SECONDS)
    launch.process.send_signal(signal.SIGTERM)
    lines = launch.end()
    said = re.findall(r"stopped by a signal at step (\d+), saved", launch.out.read_text())
    if lines or len(said) != 1 or not (output / "last").exists():
        return [*wrong, f"SIGTERM: {lines}, said {said}"]
    step = int(said[0])
    if load_state(output / "last")["step"] != step:
        wrong.append(f"SIGTERM: step {step} was said, another was saved")
    command = [sys.executable, "multitask_classifier.py", "--output_dir", str(output), "--resume"]
    resumed = subprocess.run(
        [*command, "--max_steps", str(step + 2)], check=False, cwd=ROOT, capture_output=True, text=True
    )
    if resumed.returncode or f"continuing {output} at step {step}" not in resumed.stdout:
        wrong.append(f"{shlex.join(command)} ended with {resumed.returncode}: {resumed.stderr[-500:]}")
    elif not all(tensor.isfinite().all() for tensor in load_file(output / "last/model.safetensors").values()):
        wrong.append("weights are not finite after the resume")
    return wrong


CASES: dict[str, Callable[[list[str], Path], list[str]]] = {
    "rank 0 is killed": partial(killed_rank, 0),
    "rank 1 is killed": partial(killed_rank, 1),
    "rank 0 loses its disk": no_disk,
    "stopped, refused, resumed": stopped_and_resumed,
}
