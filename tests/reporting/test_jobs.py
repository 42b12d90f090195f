"""Jobs of small shell commands: each runs once and in order, whoever starts, stops or kills the runner.

A command leaves a line in `marks` each time it is started. What has to happen at the same time waits for
files, so nothing here depends on how fast the machine is.
"""

import multiprocessing
import os
import signal
import sys
import time
from dataclasses import replace

import pytest

from reporting import jobs
from reporting.jobs import Job, Stage, run_jobs
from support.files import ROOT

PATIENCE = 120  # seconds until something is taken to have failed
SIGNALS = (signal.SIGINT, signal.SIGTERM)
ONCE = "echo start >> marks; touch done"
# Waits until the test lets it end or it is told to stop; saves only when the test lets it.
LONG = """
trap 'echo INT >> signals' INT
trap 'echo TERM >> signals' TERM
echo start >> marks
touch args.json
until [ -e signals ] || [ -e ../go ]; do sleep 0.02; done
if [ -e signals ]; then
    until [ -e ../save ]; do sleep 0.02; done
    mkdir last
    exit 143
fi
touch done
"""


@pytest.fixture(autouse=True)
def poll_often(monkeypatch):
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.02)


@pytest.fixture
def folder(tmp_path):
    yield tmp_path
    for name in ("go", "save"):  # whatever a failed test left waiting ends
        (tmp_path / name).touch()


def is_finished(folder):
    return (folder / "done").exists()


def make_stage(folder, script, **options):
    """A stage whose script runs in its folder."""
    command = ["sh", "-c", 'mkdir -p "$0"; cd "$0"; ' + script, str(folder)]
    return Stage(folder, command, is_finished, **options)


def make_job(folder, script, **options):
    return Job(folder.name, [make_stage(folder, script, **options)])


def marks_of(folder, names, file="marks"):
    paths = [folder / name / file for name in names]
    return [path.read_text().split() if path.exists() else [] for path in paths]


def fill(folder, *names):
    """Make files, and folders where the name ends in a slash."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if name.endswith("/") else path.touch()


# --- in one runner ----------------------------------------------------------------------------------------


def test_all_jobs_run_at_most_so_many_at_a_time(folder):
    """a and b, then c and d wait for each other, so two run at once; each notes who is in there with it."""
    other = {"a": "b", "b": "a", "c": "d", "d": "c"}
    script = """
        touch here
        until [ -e ../{other}/here ]; do sleep 0.02; done
        sleep 0.2
        for name in a b c d; do
            if [ -e ../$name/here ] && ! [ -e ../$name/done ]; then echo $name >> marks; fi
        done
        touch done
    """
    jobs = [make_job(folder / name, script.format(other=other[name])) for name in other]
    before = [signal.getsignal(number) for number in SIGNALS]
    assert run_jobs(jobs, at_once=2) == []
    assert [signal.getsignal(number) for number in SIGNALS] == before
    for name, beside in zip(other, marks_of(folder, other), strict=True):
        assert is_finished(folder / name) and name in beside and len(beside) <= 2


def test_finished_jobs_are_not_run(folder):
    fill(folder, "a/done", "a/last/state", "b/last/state")
    assert run_jobs([make_job(folder / name, ONCE, discard="last") for name in "ab"], at_once=1) == []
    assert marks_of(folder, "ab") == [[], ["start"]] and not (folder / "a.log").exists()
    # A runner that was killed before it could tidy up leaves that to the next.
    assert not (folder / "a" / "last").exists() and not (folder / "b" / "last").exists()


def test_stages_run_in_order_from_the_first_unfinished_one(folder):
    first = make_stage(folder / "first", "echo first >> ../marks; touch done")
    second = make_stage(folder / "second", "[ -e ../first/done ] && echo second >> ../marks; touch done")
    assert run_jobs([Job("second", [first, second])], at_once=1) == []
    (folder / "second" / "done").unlink()
    assert run_jobs([Job("second", [first, second])], at_once=1) == []
    assert marks_of(folder, ["."]) == [["first", "second", "second"]]


FAILURES = {  # script: what it printed last, and the reason
    "mkdir last; echo one; echo two >&2; exit 3": "two (exit code 3; ",
    "echo before; kill -9 $$": "before (exit code -9; ",
    "echo before; touch done; exit 3": "before (exit code 3; ",
    "mkdir last; exit 143": " (exit code 143; ",
    "echo start >> marks": " (ended without its results; ",  # and is not run for ever
}


@pytest.mark.parametrize("script", FAILURES)
def test_failed_job_is_named_and_the_others_go_on(folder, script):
    bad = Job("bad", [make_stage(folder / "first", script, discard="last"), make_stage(folder / "bad", ONCE)])
    good = make_job(folder / "good", f"mkdir last; {ONCE}", discard="last")
    assert run_jobs([bad, good], at_once=1) == [bad]
    assert bad.failure.endswith(FAILURES[script] + f"{folder / 'bad.log'})")
    assert (folder / "bad.log").read_text().startswith("$ sh -c ") and not (folder / "bad").exists()
    assert (folder / "first" / "last").exists() == ("last" in script)  # to go on from
    assert is_finished(folder / "good") and not (folder / "good" / "last").exists()
    assert marks_of(folder, ["first", "good"]) == [["start"] if "marks" in script else [], ["start"]]


def test_command_that_cannot_be_started_leaves_nothing_behind(folder):
    before = [signal.getsignal(number) for number in SIGNALS]
    long = make_job(folder / "a", LONG)
    (folder / "save").touch()
    with pytest.raises(FileNotFoundError, match="no-such-command"):
        run_jobs([long, Job("b", [Stage(folder / "b", ["no-such-command"], is_finished)])], at_once=2)
    assert long.process.returncode is not None
    assert [signal.getsignal(number) for number in SIGNALS] == before
    again = make_job(folder / "a", LONG)
    wait_for(again.take_lock)  # the shell's last `sleep` may hold it for a moment longer
    again.give_back_lock()


def test_resume_is_for_runs_that_were_started(folder):
    for number, present in enumerate([None, "args.json", "best/", "metrics.jsonl"]):
        path = folder / str(number)
        fill(path, *filter(None, [present]))
        start, resume = (make_stage(path, f"echo {name} >> marks; touch done") for name in ("new", "on"))
        for stage in (replace(start, resume=resume.command), start):  # the second continues by itself
            assert run_jobs([Job("a", [stage])], at_once=1) == []
            (path / "done").unlink()
        assert marks_of(folder, [path.name]) == [["on" if present == "args.json" else "new", "new"]]


def test_environment_of_the_commands(folder, monkeypatch):
    """Modules of the project are found from any folder, and relative paths still start from there."""
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.chdir(folder)
    code = r'import support.files, sys; print(support.files.ROOT, *sys.path[1:3], sep="\n")'
    for name, num_threads, script in (("a", None, ""), ("b", 3, f"'{sys.executable}' -c '{code}' >> marks")):
        script = f"mkdir {name}; cd {name}; echo $OMP_NUM_THREADS >> marks; {script or ':'}; touch done"
        stage = Stage(folder / name, ["sh", "-c", script], is_finished)
        assert run_jobs([Job(name, [stage])], at_once=1, num_threads=num_threads) == []
    marks = [(folder / name / "marks").read_text().splitlines() for name in "ab"]  # a path may hold a blank
    assert marks == [["7"], ["3", str(ROOT), str(ROOT), "/elsewhere"]]
    assert os.environ["OMP_NUM_THREADS"] == "7" and os.environ["PYTHONPATH"] == "/elsewhere"


def test_steps_done_takes_any_log(folder):
    fill(folder, "a/metrics.jsonl")
    job = make_job(folder / "a", ONCE, num_steps=10)
    for log, steps in {b'{"step": 2}\n{"step": 4, "loss": 1}\n': 4, b'{"step": 99}\n': 10}.items():
        (folder / "a" / "metrics.jsonl").write_bytes(log)
        assert job.steps_done() == steps
    for log in (b'{"step": 4}\n{"st', b"", b"\n\n", b"\xff\n", b"[1, 2]\n", b"7\n", b'{"step": null}\n'):
        (folder / "a" / "metrics.jsonl").write_bytes(log)
        assert job.steps_done() == 0, log
    assert run_jobs([job], at_once=1) == [] and job.steps_done() == 10


# --- stopped, killed, and several runners -----------------------------------------------------------------


def run_alone(folder, script, names, at_once):
    """The work of a runner's process, in a process group of its own, as a terminal makes it."""
    os.setsid()
    resume = make_stage(folder, "").command[:2] + ['cd "$0"; echo again >> marks; touch done']
    jobs = [make_job(folder / name, script, resume=[*resume, str(folder / name)]) for name in names]
    (folder / f"up-{os.getpid()}").touch()
    with open(folder / "output", "a", buffering=1) as sys.stdout:
        sys.exit(len(run_jobs(jobs, at_once)))


def start_runner(folder, script, names, at_once=2):
    """Starts a runner in another process: a fork, which need not import anything."""
    arguments = (folder, script, names, at_once)
    runner = multiprocessing.get_context("fork").Process(target=run_alone, args=arguments, daemon=True)
    runner.start()
    return runner


def wait_for(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def wait_for_all(folder, names, file="marks"):
    wait_for(lambda: all((folder / name / file).exists() for name in names))


def end_of(runner):
    runner.join(PATIENCE)
    return runner.exitcode


def test_second_signal_does_not_wait_for_what_is_saved(folder):
    runner = start_runner(folder, LONG, "ab")
    wait_for_all(folder, "ab")
    os.kill(runner.pid, signal.SIGTERM)
    wait_for_all(folder, "ab", "signals")
    os.kill(runner.pid, signal.SIGINT)  # nothing lets them save
    assert end_of(runner) == 128 + signal.SIGTERM
    assert not any((folder / name / "last").exists() for name in "ab")


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_lets_each_command_save_and_the_next_start_repeats_nothing(folder, number):
    fill(folder, "a/done")
    runner = start_runner(folder, LONG, "abcd")
    wait_for_all(folder, "bc")
    # Ctrl-C reaches the whole process group.
    send = os.killpg if number == signal.SIGINT else os.kill
    send(runner.pid, number)
    wait_for_all(folder, "bc", "signals")
    assert runner.is_alive()  # it waits until they are saved
    (folder / "save").touch()
    assert end_of(runner) == 128 + number
    assert "2 runs were stopped" in (folder / "output").read_text()
    assert marks_of(folder, "bc", "signals") == [["TERM"], ["TERM"]]
    assert all((folder / name / "last").is_dir() and not is_finished(folder / name) for name in "bc")
    assert not (folder / "d").exists()

    (folder / "go").touch()
    assert end_of(start_runner(folder, LONG, "abcd")) == 0
    assert marks_of(folder, "abcd") == [[], ["start", "again"], ["start", "again"], ["start"]]


def test_command_of_a_killed_runner_goes_on_and_is_waited_for(folder):
    first = start_runner(folder, LONG, "a", at_once=1)
    wait_for_all(folder, "a")
    first.kill()
    first.join()

    second = start_runner(folder, f'case "$0" in */a) {LONG};; *) {ONCE};; esac', "ab")
    wait_for_all(folder, "b", "done")  # what is free need not wait for the other
    assert second.is_alive() and not is_finished(folder / "a")
    (folder / "go").touch()
    assert end_of(second) == 0
    assert marks_of(folder, "ab") == [["start"], ["start"]] and not (folder / "a" / "signals").exists()


def test_two_runners_share_the_work(folder):
    # No command ends before both are at work.
    script = """
        echo start >> marks
        until [ "$(ls .. | grep -c '^up-')" = 2 ]; do sleep 0.02; done
        sleep 0.1
        touch done
    """
    runners = [start_runner(folder, script, "abcdef") for _ in range(2)]
    assert [end_of(runner) for runner in runners] == [0, 0]
    assert marks_of(folder, "abcdef") == [["start"]] * 6
    assert all(is_finished(folder / name) for name in "abcdef")
