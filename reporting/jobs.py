"""Run many commands, each with a run folder of its own: several at a time, finished ones skipped, stopped ones resumed.

Whoever works on a run folder holds a lock on it, the command itself included. So two of these, started on the same
folders, share the work, and one that is started after the other was killed waits for the commands it left behind.
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
        command: starts the run, or continues it where `resume` is None.
        is_finished: looks into the folder.
        resume: continues a run that was started.
        num_steps: of the run, for the progress line; its `metrics.jsonl` says how many are done.
        discard: checkpoint inside the run's folder that nobody needs once it is finished.
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
        except (OSError, ValueError, LookupError, TypeError):  # not there yet, or half a line
            return 0


@dataclass
class Job:
    """Stages that run one after the other; log and lock lie beside the last one's folder, under the job's name."""

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
        """Whether nobody else works on the job; if so, nobody else will until `give_back_lock`."""
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
        """Start the next stage. It inherits the lock, and no signal from the terminal: we pass those on once."""
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

    def find_failure(self) -> str | None:
        """Why the command that has ended did not finish its stage; None if it did."""
        code = self.process.returncode
        if code == 0 and self.stage is not self.started:
            return None
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        # A command that succeeds without its results would do so again and again.
        why = f"exit code {code}" if code else "ended without its results"
        return f"{lines[-1] if lines else ''} ({why}; {self.log})"


def run_jobs(jobs: list[Job], at_once: int, num_threads: int | None = None) -> list[Job]:
    """Run jobs until all are finished or have failed; SIGINT and SIGTERM let the running ones save, then end us.

    Args:
        at_once: how many run at a time.
        num_threads: of each command's tensor operations; None leaves it to them.

    Returns:
        the jobs that failed, each with its `failure`.
    """
    # `python -m training.pretrain_mlm` has to find us from whatever folder we were called in.
    search_path = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    environment = {"PYTHONPATH": os.pathsep.join(search_path)}
    if num_threads is not None:
        environment["OMP_NUM_THREADS"] = str(num_threads)
    waiting, running, failed, received = list(jobs), [], [], []

    def receive(number, frame):
        received.append(number)
        for job in running if len(received) > 1 else ():  # the second time without waiting for what they save
            if job.process is not None:
                job.process.kill()

    handlers = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    total, done = sum(stage.num_steps for job in jobs for stage in job.stages), 0
    bar = tqdm(total=total, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True, smoothing=0.05)
    bar.update(sum(job.steps_done() for job in jobs))
    bar.unpause()  # what earlier calls have done says nothing of today's speed
    try:
        while (waiting or running) and not received:
            done_before = done
            for job in [job for job in waiting if len(running) < at_once]:
                if len(running) < at_once and job.take_lock():
                    waiting.remove(job)
                    running.append(job)
            for job in list(running):
                if job.process is not None and job.process.poll() is None:
                    continue
                if job.process is not None:
                    job.failure = job.find_failure()
                if job.stage is not None and job.failure is None:
                    job.start(environment)
                    continue
                running.remove(job)
                for stage in job.stages if job.failure is None else ():
                    if stage.discard:
                        remove_checkpoints(stage.folder / stage.discard)
                job.give_back_lock()
                if job.failure:
                    failed.append(job)
                done += 1
                left = f"{len(running) + len(waiting)} to go"
                if job.process is not None:
                    tqdm.write(
                        f"{job.name}: {'failed: ' + job.failure if job.failure else 'finished'}; {left}"
                    )
            bar.n = sum(job.steps_done() for job in jobs)
            names = ", ".join(job.name for job in running)
            elsewhere = f"; {len(waiting)} run elsewhere" if waiting and not running else ""
            bar.set_postfix_str(f"{done}/{len(jobs)} runs; {names}{elsewhere}")
            if done == done_before:  # else the next one need not wait
                time.sleep(POLL_SECONDS)
    finally:
        for job in running:
            if job.process is not None and job.process.poll() is None:
                job.process.terminate()
        for job in running:
            if job.process is not None:
                job.process.wait()
            job.give_back_lock()
        bar.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if received:
        print(f"stopped by a signal; {len(running)} runs were stopped, the same command goes on from there")
        sys.exit(128 + received[0])
    return failed
