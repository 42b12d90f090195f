"""Run jobs on a Slurm cluster by `submitit`: hand them in, watch the queue, go on where a run was stopped.

A job on a node is the one that `reporting.jobs` would run here: the same stages, lock and log. So what is
finished is skipped, what is started is resumed, and whatever is in the shared folders counts, whoever made
it. The ids of what was handed in are kept beside the runs (`cluster/jobs.json`): a second call of the same
command finds them in the queue and waits for them instead of handing them in again.

    python results_table.py --cluster slurm --slurm_partition gpu --slurm_option gres=gpu:1

Before Slurm ends a job for its time limit, it sends SIGUSR2; to one that it preempts, SIGUSR2 or SIGTERM. The
run saves, and submitit puts the job back into the queue. A job that is killed without that, or whose node
fails, goes on from its last checkpoint.
"""

import getpass
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from reporting.jobs import Job, ProgressLine, child_environment, keep_going
from support.errors import UserError, one_line
from support.files import read_json, write_text

CLUSTERS = ("slurm", "local")  # local: submitit's processes on this machine, to try it
POLL_SECONDS = 5.0
JOB_POLL_SECONDS = 0.5  # on the node
# Files that a node has written may take this long to be seen here, over a network's file system.
GRACE_SECONDS = 60.0
SIGNAL_SECONDS = 120  # between SIGUSR2 and the end: what saving may take
MAX_TIMEOUTS = 1000  # times that a job may reach its time limit and go back into the queue
# States in which Slurm still has a job to run; in any other it is over.
WAITING = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
RUNNING = {
    *("RUNNING", "CONFIGURING", "COMPLETING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED", "RESIZING"),
    "UNKNOWN",  # to submitit's local processes
}


@dataclass(frozen=True)
class Cluster:
    """What is asked of the cluster.

    Args:
        kind: one of CLUSTERS.
        folder: of submitit's files and of the ids.
        at_once: how many jobs may run at a time; None: as many as there are.
        partition: Slurm's, None for its default one.
        minutes: time limit of a job.
        options: more of sbatch's options, name -> value.
    """

    kind: str
    folder: Path
    at_once: int | None = None
    partition: str | None = None
    minutes: int = 240
    options: dict[str, str] = field(default_factory=dict)


def parse_minutes(text: str) -> int:
    """Minutes of a time limit as sbatch has it: MINUTES, H:MM:SS, or DAYS-H:MM:SS.

    Raises:
        ValueError: if it is not one.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)|(\d+)", text, re.ASCII)
    if match is None or len(text) > 12:
        raise ValueError(text)
    days, hours, minutes, seconds, alone = (int(part or 0) for part in match.groups())
    found = alone or (days * 24 + hours) * 60 + minutes + (seconds > 0)
    if not found:
        raise ValueError(text)
    return found


def parse_option(text: str) -> tuple[str, str]:
    """An option of sbatch, `NAME=VALUE`; raises ValueError."""
    name, equals, value = text.removeprefix("--").partition("=")
    if not equals or not re.fullmatch("[a-z][a-z0-9-]*", name) or not value.isprintable():
        raise ValueError(text)
    return name, value


def check_cluster(kind: str) -> None:
    """Make sure that jobs can be handed in.

    Raises:
        UserError: naming what is missing.
    """
    if find_spec("submitit") is None:
        raise UserError(
            f"--cluster {kind} needs the package submitit; pip install -r requirements/cluster.txt"
        )
    for program in ("sbatch", "squeue") if kind == "slurm" else ():
        if shutil.which(program) is None:
            raise UserError(f"--cluster slurm: there is no {program} here; expected a machine of the cluster")


# --- on the node ------------------------------------------------------------------------------------------


class OnNode:
    """A job as a node runs it."""

    def __init__(self, job: Job):
        self.job = job

    def __call__(self) -> None:
        signal.signal(signal.SIGTERM, self.receive_end)
        while not self.job.take_lock():  # someone else works on it, and may leave the rest to us
            time.sleep(JOB_POLL_SECONDS)
        try:
            environment = child_environment(allotted_threads())
            while keep_going(self.job, environment):
                time.sleep(JOB_POLL_SECONDS)
        finally:
            self.job.give_back_lock()
        if self.job.failure:
            raise RuntimeError(self.job.failure)

    def receive_end(self, number, frame) -> None:
        """SIGTERM is all that some clusters send before they preempt a job; or it is scancel's."""
        self.stop()
        if is_preempted():
            signal.raise_signal(signal.SIGUSR2)  # submitit's own: back into the queue

    def stop(self) -> None:
        """Let the command that runs save and end."""
        if self.job.process is not None:
            with suppress(ProcessLookupError):
                self.job.process.terminate()
            self.job.process.wait()

    def checkpoint(self):
        """What submitit calls before a job goes back into the queue; returns the job to be run then."""
        from submitit.helpers import DelayedSubmission

        self.stop()
        return DelayedSubmission(OnNode(Job(self.job.name, self.job.stages)))


def is_preempted() -> bool:
    """Whether Slurm is about to take this job's place for another one."""
    with suppress(OSError):
        command = ["scontrol", "show", "job", "--oneliner", os.environ.get("SLURM_JOB_ID", "")]
        found = subprocess.run(command, check=False, capture_output=True, text=True)
        return re.search(r" PreemptTime=\d", found.stdout) is not None
    return False


def allotted_threads() -> int | None:
    """Processors that Slurm gave to this job, where it says so."""
    found = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return int(found) if found.isdecimal() else None


# --- here -------------------------------------------------------------------------------------------------


def run_on_cluster(jobs: list[Job], cluster: Cluster) -> list[Job]:
    """Hand in the jobs that are neither finished nor in the queue, and wait until each is over.

    SIGINT and SIGTERM end the waiting only: the jobs stay, and the same call finds them.

    Returns:
        the jobs that failed, each with its `failure`.
    """
    cluster.folder.mkdir(parents=True, exist_ok=True)
    ids, get_states = hand_in(jobs, cluster)
    waiting = [job for job in jobs if job.name in ids]
    received, failed, over_since, shown = [], [], {}, {}
    handlers = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    line = ProgressLine(jobs)
    try:
        while waiting and not received:
            states = get_states()
            for job in list(waiting):
                state = states.get(ids[job.name], "GONE")
                if job.stage is not None:
                    if state in WAITING | RUNNING:
                        over_since.pop(job.name, None)
                        say_change(job, ids[job.name], state, shown)
                        continue
                    since = over_since.setdefault(job.name, time.monotonic())
                    if time.monotonic() - since < GRACE_SECONDS:
                        continue
                    job.failure = job.describe_failure(f"job {ids[job.name]}: {state.lower()}")
                    failed.append(job)
                elif state in RUNNING:  # it is tidying up
                    continue
                waiting.remove(job)
                line.say_ended(job, len(waiting))
            in_queue = Counter(states.get(ids[job.name]) in RUNNING for job in waiting)
            done = len(jobs) - len(waiting)
            line.show(f"{done}/{len(jobs)} runs; {in_queue[True]} running, {in_queue[False]} waiting")
            if waiting and not received:
                time.sleep(POLL_SECONDS)
    finally:
        line.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if received:
        left = " ".join(ids[job.name] for job in waiting)
        print(f"stopped waiting; {len(waiting)} runs stay in the queue, and the same command finds them")
        print(f"to end them: scancel {left}")
        sys.exit(128 + received[0])
    return failed


def say_change(job: Job, job_id: str, state: str, shown: dict[str, str]) -> None:
    """A line when a job begins to run, or goes back into the queue."""
    now, before = "running" if state in RUNNING else "waiting", shown.get(job.name)
    if now != before and not (before is None and now == "waiting"):
        text = "back in the queue" if now == "waiting" else "running"
        tqdm.write(f"{job.name}: {text} (job {job_id})")
    shown[job.name] = now


def hand_in(jobs: list[Job], cluster: Cluster) -> tuple[dict[str, str], Callable[[], dict[str, str]]]:
    """Hand in what is not finished and not in the queue.

    Returns:
        name -> id of each job that is not finished, and a function that gives the state of each id.
    """
    record = cluster.folder / "jobs.json"
    # Two tables on the same folders must not hand in the same job.
    with FileLock(cluster.folder / "jobs.lock"):
        ids = read_json(record) if record.exists() else {}
        unfinished = [job for job in jobs if job.stage is not None]
        states = slurm_states() if cluster.kind == "slurm" else {}
        known = [job for job in unfinished if states.get(ids.get(job.name)) in WAITING | RUNNING]
        new = [job for job in unfinished if job not in known]
        submitted = submit(new, cluster)
        ids |= {job.name: handle.job_id for job, handle in zip(new, submitted, strict=True)}
        write_text(record, json.dumps(ids, indent=2) + "\n")
    if new or known:
        found = f", {len(known)} in the queue already" if known else ""
        tqdm.write(f"{len(new)} runs handed in{found}; their logs: {cluster.folder}")
    get_states = slurm_states if cluster.kind == "slurm" else lambda: {h.job_id: h.state for h in submitted}
    return {job.name: ids[job.name] for job in unfinished}, get_states


def submit(jobs: Sequence[Job], cluster: Cluster) -> list:
    """Hand in jobs, as one array where there are several; returns submitit's handles.

    Raises:
        UserError: if Slurm refuses them.
    """
    if not jobs:
        return []
    from submitit import AutoExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = AutoExecutor(folder=cluster.folder, cluster=cluster.kind, slurm_max_num_timeout=MAX_TIMEOUTS)
    executor.update_parameters(name="results_table", timeout_min=cluster.minutes)
    if cluster.kind == "slurm":
        executor.update_parameters(
            slurm_partition=cluster.partition,
            slurm_array_parallelism=cluster.at_once or len(jobs),
            slurm_signal_delay_s=SIGNAL_SECONDS,
            slurm_additional_parameters={"requeue": True, **cluster.options},
        )
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = child_environment(None)["PYTHONPATH"]  # a job starts with our environment
    try:
        with executor.batch():
            return [executor.submit(OnNode(job)) for job in jobs]
    except (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError, OSError) as error:
        raise UserError(f"--cluster {cluster.kind}: the jobs were not taken ({one_line(error)})") from None
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def slurm_states() -> dict[str, str]:
    """The state of each of this user's jobs that Slurm remembers: by squeue, which needs no accounting."""
    command = ["squeue", "--user", getpass.getuser(), "--array", "--noheader", "--states=all"]
    for seconds in (1, 5, 30, 60, None):  # the controller may be away for a moment
        result = subprocess.run([*command, "--format=%i|%T"], check=False, capture_output=True, text=True)
        if result.returncode == 0:
            break
        if seconds is None:
            raise UserError(f"squeue gives no answer ({one_line(result.stderr.strip())}); the jobs stay")
        time.sleep(seconds)
    return dict(line.split("|", 1) for line in result.stdout.split())
