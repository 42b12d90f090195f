"""Jobs on a cluster: submitit's real processes on this machine, and a Slurm whose queue a script plays.

A real Slurm of one node is started by tests/cluster/one_node_slurm.sh.
"""

import json
import os
import signal
import time

import pytest

from reporting import cluster
from reporting.cluster import Cluster, OnNode, parse_minutes, parse_option, run_on_cluster
from reporting.jobs import Job, Stage
from reporting.table import get_args
from support.errors import UserError

REAL_SLEEP = time.sleep


def make_job(folder, script):
    command = ["sh", "-c", f'mkdir -p "{folder}"; cd "{folder}"; echo start >> marks; {script}']
    # A lambda is pickled whole: submitit's processes need not import this file, and all that it imports.
    return Job(folder.name, [Stage(folder, command, lambda folder: (folder / "done").exists())])


@pytest.fixture(autouse=True)
def poll_often(monkeypatch):
    for name in ("POLL_SECONDS", "JOB_POLL_SECONDS", "GRACE_SECONDS"):
        monkeypatch.setattr(cluster, name, 0.02)


@pytest.mark.slow
def test_local_processes_run_what_is_not_finished_and_name_what_fails(tmp_path, capsys):
    pytest.importorskip("submitit")
    folders = [tmp_path / name for name in ("good", "bad", "finished")]
    folders[2].mkdir()
    (folders[2] / "done").touch()
    jobs = [
        make_job(folder, script)
        for folder, script in zip(folders, ("touch done", "echo no disk; exit 3", "x"), strict=True)
    ]
    failed = run_on_cluster(jobs, Cluster("local", tmp_path / "cluster"))
    assert [job.name for job in failed] == ["bad"]
    assert failed[0].failure.startswith("no disk (job ")
    assert (folders[0] / "marks").read_text() == "start\n" and (folders[0] / "done").exists()
    assert not (folders[2] / "marks").exists()
    assert "2 runs handed in" in capsys.readouterr().out
    assert not run_on_cluster(
        [jobs[0], jobs[2]], Cluster("local", tmp_path / "cluster")
    )  # nothing is left to do
    assert (folders[0] / "marks").read_text() == "start\n"


SQUEUE = """#!/bin/sh
echo x >> "$QUEUE/calls"
[ -e "$QUEUE/away" ] && rm "$QUEUE/away" && echo "no controller" >&2 && exit 1
cat "$QUEUE/states"
"""


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """A squeue that prints `states`, and a `submit` that counts."""
    folder = tmp_path / "queue"
    folder.mkdir()
    script = folder / "squeue"
    script.write_text(SQUEUE)
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("QUEUE", str(folder))
    monkeypatch.setattr(cluster.time, "sleep", lambda seconds: None)
    (folder / "states").write_text("")
    return folder


def test_a_second_call_waits_for_what_the_first_handed_in(tmp_path, queue, monkeypatch, capsys):
    handed_in = []

    def submit(jobs, asked):
        handed_in.extend(job.name for job in jobs)
        if jobs:
            (queue / "states").write_text("7_0|RUNNING\n7_1|PENDING\n")
        return [type("Handle", (), {"job_id": f"7_{i}"}) for i in range(len(jobs))]

    monkeypatch.setattr(cluster, "submit", submit)
    jobs = [make_job(tmp_path / name, "x") for name in ("a", "b")]
    asked = Cluster("slurm", tmp_path / "cluster")
    raised = iter([True])

    def stop_once(seconds):
        if next(raised, False):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(cluster.time, "sleep", stop_once)
    with pytest.raises(SystemExit) as ended:
        run_on_cluster(jobs, asked)
    assert ended.value.code == 130 and "scancel 7_0 7_1" in capsys.readouterr().out
    assert json.loads((asked.folder / "jobs.json").read_text()) == {"a": "7_0", "b": "7_1"}

    # The first goes back into the queue and finishes; the second is lost. squeue fails once on the way.
    changes = iter(["7_0|RUNNING\n7_1|RUNNING\n", "7_0|PENDING\n7_1|RUNNING\n", "away", "7_1|NODE_FAIL\n"])

    def change(seconds):
        new = next(changes, "7_1|NODE_FAIL\n")
        if new == "away":
            (queue / "away").touch()
            return
        (queue / "states").write_text(new)
        if "7_0" not in new:
            (tmp_path / "a").mkdir(exist_ok=True)
            (tmp_path / "a" / "done").touch()

    monkeypatch.setattr(cluster.time, "sleep", change)
    failed = run_on_cluster(jobs, asked)
    assert handed_in == ["a", "b"]  # once each
    out = capsys.readouterr().out
    assert "0 runs handed in, 2 in the queue already" in out and "a: back in the queue (job 7_0)" in out
    assert [job.name for job in failed] == ["b"] and "node_fail" in failed[0].failure


@pytest.mark.parametrize("preempted", [True, False])
def test_on_a_node_a_job_saves_and_goes_back_if_it_is_preempted(tmp_path, queue, monkeypatch, preempted):
    pytest.importorskip("submitit")

    def sleep(seconds):
        signal.raise_signal(signal.SIGTERM) if (tmp_path / "run" / "up").exists() else REAL_SLEEP(0.02)

    monkeypatch.setattr(cluster.time, "sleep", sleep)
    script = queue / "scontrol"
    script.write_text(
        f"#!/bin/sh\necho JobId=6 PreemptTime={'2026-11-28T02:50:34' if preempted else 'None'} x\n"
    )
    script.chmod(0o755)
    job = make_job(
        tmp_path / "run", "trap 'touch saved; exit 143' TERM; touch up; while :; do sleep 0.02; done"
    )
    on_node = OnNode(job)

    def go_back(number, frame):  # as submitit does
        raise InterruptedError(on_node.checkpoint())

    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    signal.signal(signal.SIGUSR2, go_back)
    try:
        with pytest.raises(InterruptedError if preempted else RuntimeError) as stopped:
            on_node()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert (tmp_path / "run" / "saved").exists() and job.lock is None
    if preempted:
        again = stopped.value.args[0].function
        assert again.job.stages == job.stages and again.job.process is None  # it can be pickled


@pytest.mark.parametrize(
    ("text", "minutes"), [("90", 90), ("4:00:00", 240), ("1-01:30:01", 1531), ("0:00:30", 1)]
)
def test_time_limits_are_those_of_sbatch(text, minutes):
    assert parse_minutes(text) == minutes


@pytest.mark.parametrize("text", ["", "0", "4:00", "-1", "1e3", "4h", "9999999999999"])
def test_other_time_limits_are_refused(text):
    with pytest.raises(ValueError):
        parse_minutes(text)


def test_options_and_missing_programs(monkeypatch, capsys):
    assert parse_option("--gres=gpu:1") == ("gres", "gpu:1")
    with pytest.raises(ValueError):
        parse_option("gres")
    with pytest.raises(SystemExit):
        get_args(["--slurm_time", "30"])
    assert "--slurm_time is given, but no --cluster slurm" in capsys.readouterr().err
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match="needs the package submitit; pip install -r requirements/cluster.txt"
    ):
        cluster.check_cluster("slurm")
    monkeypatch.setattr(cluster, "find_spec", lambda name: object())
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="there is no sbatch here"):
        cluster.check_cluster("slurm")
