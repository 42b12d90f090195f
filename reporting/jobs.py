"""Run many commands, each filling a run folder: several at a time, finished ones skipped, stopped resumed.

A job is locked while anyone works on it, the command itself included. So two runners, started on the same
folders, share the work, and one that is started after another was killed waits for the commands that it left
behind.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from support.files import ROOT
from training.checkpoint import remove_checkpoints

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Stage:
    """One command of a job and the run folder that it fills.

    Args:
        command: starts the run; where `resume` is None, it also continues it.
        is_finished: looks into the folder.
        resume: continues a run that was started.
        num_steps: of the run, for the progress bar; its `metrics.jsonl` says how many are done.
        discard: a checkpoint inside the run's folder that is not needed once the job is finished.
    """

    folder: Path
    command: Sequence[str]
    is_finished: Callable[[Path], bool]
    resume: Sequence[str] | None = None
    num_steps: int = 0
    discard: str | None = None

    def next_command(self) -> Sequence[str]:
        started = (self.folder / "args.json").exists()
        return self.resume if self.resume and started else self.command

    def steps_done(self) -> int:
        if self.is_finished(self.folder):
            return self.num_steps
        try:
            lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            return min(self.num_steps, json.loads(lines[-1])["step"])
        except (OSError, ValueError, LookupError, TypeError):  # missing, or cut off in mid-line
            return 0


@dataclass
class Job:
    """Stages that run one after the other; log and lock are named after the job, beside the last folder."""

    name: str
    stages: list[Stage]
    process: subprocess.Popen | None = None
    started: Stage | None = None  # whose command `process` is
    lock: int | None = None  # file descriptor
    failure: str | None = None
    log: Path = field(init=False)

    def __post_init__(self):
        self.log = self.stages[-1].folder.with_name(self.name + ".log")

    @property
    def stage(self) -> Stage | None:
        """The first one that is not finished."""
        return next((stage for stage in self.stages if not stage.is_finished(stage.folder)), None)

    def steps_done(self) -> int:
        return sum(stage.steps_done() for stage in self.stages)

    def take_lock(self) -> bool:
        """Lock the job until `give_back_lock`; False if someone else works on it.

        Not a `filelock`: that keeps its file descriptor to itself, and here the command has to inherit it, so
        that the lock stays until the last of the two ends.
        """
        path = self.log.with_suffix(".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.give_back_lock()
            return False
        return True

    def give_back_lock(self) -> None:
        os.close(self.lock)
        self.lock = None

    def start(self, environment: dict[str, str]) -> None:
        """Start the next stage. It inherits the lock, but no signals from the terminal: we pass them on."""
        self.started = self.stage
        command = self.started.next_command()
        with open(self.log, "a", encoding="utf-8") as log:
            print("$", *command, file=log, flush=True)
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | environment,
                pass_fds=(self.lock,),
                start_new_session=True,
            )

    def discard_checkpoints(self) -> None:
        """Remove what only a job that goes on would need."""
        for stage in self.stages:
            if stage.discard:
                remove_checkpoints(stage.folder / stage.discard)

    def find_failure(self) -> str | None:
        """Why the command that has ended did not finish its stage; None if it did finish."""
        code = self.process.returncode
        if code == 0 and self.stage is not self.started:
            return None
        # A command that succeeds without its results would do so again and again.
        return self.describe_failure(f"exit code {code}" if code else "ended without its results")

    def describe_failure(self, why: str) -> str:
        """The last line of the log, why it is the last, and where to read more."""
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        except FileNotFoundError:  # it never started
            lines = []
        return f"{lines[-1] if lines else ''} ({why}; {self.log})".lstrip()


class ProgressLine:
    """One line over all jobs, with the steps that they have made, and a line for each that ends."""

    def __init__(self, jobs: Sequence[Job]):
        self.jobs, total = jobs, sum(stage.num_steps for job in jobs for stage in job.stages)
        hidden = not sys.stderr.isatty()
        self.bar = tqdm(total=total, unit="step", disable=hidden, dynamic_ncols=True, smoothing=0.05)
        self.bar.update(sum(job.steps_done() for job in jobs))
        self.bar.unpause()  # what earlier calls have done says nothing about today's speed

    def show(self, text: str) -> None:
        self.bar.n = sum(job.steps_done() for job in self.jobs)
        self.bar.set_postfix_str(text)

    def say_ended(self, job: Job, to_go: int) -> None:
        outcome = f"failed: {job.failure}" if job.failure else "finished"
        tqdm.write(f"{job.name}: {outcome}; {to_go} to go")

    def close(self) -> None:
        self.bar.close()


def child_environment(num_threads: int | None) -> dict[str, str]:
    # `python -m training.pretrain_mlm` has to find the project from whatever folder we were started in.
    # Setting the path instead of the folder leaves relative paths in the command as they are.
    search_path = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    threads = {} if num_threads is None else {"OMP_NUM_THREADS": str(num_threads)}
    return {"PYTHONPATH": os.pathsep.join(search_path)} | threads


def run_jobs(jobs: list[Job], at_once: int, num_threads: int | None = None) -> list[Job]:
    """Run jobs until each is finished or has failed; on SIGINT or SIGTERM the running ones save, then we end.

    Args:
        at_once: how many run at a time.
        num_threads: of each command's tensor operations; None leaves it to the commands.

    Returns:
        the jobs that failed, each with its `failure`.
    """
    waiting, running, failed, received = list(jobs), [], [], []

    def receive(number, frame):
        received.append(number)
        for job in running if len(received) > 1 else ():  # the second time, do not wait for them to save
            if job.process is not None:
                job.process.kill()

    handlers = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    line = ProgressLine(jobs)
    try:
        while (waiting or running) and not received:
            for job in list(waiting):
                if len(running) < at_once and job.take_lock():
                    waiting.remove(job)
                    running.append(job)
            ended = [job for job in list(running) if not keep_going(job, child_environment(num_threads))]
            for job in ended:
                running.remove(job)
                job.give_back_lock()
                if job.failure:
                    failed.append(job)
                if job.process is not None:
                    line.say_ended(job, len(running) + len(waiting))
            names = ", ".join(job.name for job in running)
            elsewhere = f"; {len(waiting)} run elsewhere" if waiting and not running else ""
            done = len(jobs) - len(waiting) - len(running)
            line.show(f"{done}/{len(jobs)} runs; {names}{elsewhere}")
            if not ended:  # otherwise the next job need not wait
                time.sleep(POLL_SECONDS)
    finally:
        for job in running:
            if job.process is not None and job.process.poll() is None:
                job.process.terminate()
        for job in running:
            if job.process is not None:
                job.process.wait()
            job.give_back_lock()
        line.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if received:
        print(f"stopped by a signal; {len(running)} runs were stopped, the same command goes on from there")
        sys.exit(128 + received[0])
    return failed


def keep_going(job: Job, environment: dict[str, str]) -> bool:
    """Start a job's next stage if none is running; False if the job is finished or has failed."""
    if job.process is not None:
        if job.process.poll() is None:
            return True
        job.failure = job.find_failure()
    if job.failure is None and job.stage is not None:
        job.start(environment)
        return True
    if job.failure is None:
        job.discard_checkpoints()
    return False
