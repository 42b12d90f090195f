"""Jobs of small shell commands: each runs once and in order, whoever starts, stops or kills the runner.

A command leaves a line in `marks` each time it is started. What has to happen at the same time waits for
files, so nothing here depends on how fast the machine is.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from reporting import jobs
from reporting.jobs import Job, Stage, run_jobs
from support.files import ROOT

PATIENCE = 120  # seconds until something is taken to have failed
SIGNALS = (signal.SIGINT, signal.SIGTERM)

# A runner in a process of its own: FOLDER AT_ONCE SCRIPT NAME...
RUNNER = f"""
import os, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from reporting import jobs as jobs_module
from reporting.jobs import Job, Stage, run_jobs

jobs_module.POLL_SECONDS = 0.02
folder, at_once, script, *names = sys.argv[1:]
folder = Path(folder)
command = lambda name, script: ["sh", "-c", 'mkdir -p "$0"; cd "$0"; ' + script, str(folder / name)]
is_finished = lambda folder: (folder / "done").exists()
resume = "echo again >> marks; touch done"
jobs = [
    Job(name, [Stage(folder / name, command(name, script), is_finished, command(name, resume))]) for name in
    names
]
(folder / f"up-{{os.getpid()}}").touch()
sys.exit(len(run_jobs(jobs, int(at_once))))
"""
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


@pytest.fixture
def start_runner(folder):
    """Starts a runner in a process group of its own, as a terminal does."""
    runners = []

    def start(script, *names, at_once=2):
        command = [sys.executable, "-c", RUNNER, str(folder), str(at_once), script, *names]
        runner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        runners.append(runner)
        return runner

    yield start
    for runner in runners:
        runner.kill()
        runner.wait()
        runner.stdout.close()


def wait_for(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def is_finished(folder):
    return (folder / "done").exists()


def make_stage(folder, script, **options):
    """A stage whose script runs in its folder."""
    command = ["sh", "-c", 'mkdir -p "$0"; cd "$0"; ' + script, str(folder)]
    return Stage(folder, command, is_finished, **options)


def make_job(folder, script, **options):
    return Job(folder.name, [make_stage(folder, script, **options)])


def read_lines(path):
    return path.read_text().splitlines() if path.exists() else []


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
            if [ -e ../$name/here ] && ! [ -e ../$name/done ]; then echo $name >> beside; fi
        done
        touch done
    """
    jobs = [make_job(folder / name, script.format(other=other[name])) for name in other]
    before = [signal.getsignal(number) for number in SIGNALS]
    assert run_jobs(jobs, at_once=2) == []
    assert [signal.getsignal(number) for number in SIGNALS] == before
    for name in other:
        assert is_finished(folder / name)
        assert name in read_lines(folder / name / "beside") and len(read_lines(folder / name / "beside")) <= 2


def test_finished_jobs_are_not_run(folder):
    fill(folder, "a/done", "a/last/state", "b/last/state")
    jobs = [make_job(folder / name, "echo start >> marks; touch done", discard="last") for name in "ab"]
    assert run_jobs(jobs, at_once=1) == []
    assert not (folder / "a" / "marks").exists() and not (folder / "a.log").exists()
    assert read_lines(folder / "b" / "marks") == ["start"]
    # A runner that was killed before it could tidy up leaves that to the next.
    assert not (folder / "a" / "last").exists() and not (folder / "b" / "last").exists()


@pytest.mark.parametrize("finished", [(), ("first/done",)])
def test_stages_run_in_order_from_the_first_unfinished_one(folder, finished):
    fill(folder, *finished)
    first = make_stage(folder / "first", "echo first >> ../marks; touch done")
    second = make_stage(folder / "second", "[ -e ../first/done ] && echo second >> ../marks; touch done")
    assert run_jobs([Job("second", [first, second])], at_once=1) == []
    assert read_lines(folder / "marks") == (["second"] if finished else ["first", "second"])


def test_failed_job_is_named_and_the_others_go_on(folder):
    stages = [
        make_stage(folder / "first", "mkdir last; echo one; echo two >&2; exit 3", discard="last"),
        make_stage(folder / "bad", "echo start >> marks; touch done"),
    ]
    good = make_job(folder / "good", "mkdir last; touch done", discard="last")
    bad = Job("bad", stages)
    assert run_jobs([bad, good], at_once=1) == [bad]
    assert bad.failure == f"two (exit code 3; {folder / 'bad.log'})"
    assert read_lines(folder / "bad.log")[0].startswith("$ sh -c ")
    assert not (folder / "bad").exists()
    assert (folder / "first" / "last").exists()  # to go on from
    assert is_finished(folder / "good") and not (folder / "good" / "last").exists()


@pytest.mark.parametrize(
    ("script", "code"), [("kill -9 $$", -9), ("touch done; exit 3", 3), ("mkdir last; exit 143", 143)]
)
def test_any_exit_code_is_a_failure(folder, script, code):
    job = make_job(folder / "a", "echo before; " + script)
    assert run_jobs([job], at_once=1) == [job]
    assert job.failure == f"before (exit code {code}; {folder / 'a.log'})"


def test_command_that_succeeds_without_its_results_is_a_failure_and_not_run_for_ever(folder):
    stages = [make_stage(folder / "a", "echo start >> marks"), make_stage(folder / "b", "touch done")]
    job = Job("b", stages)
    assert run_jobs([job], at_once=1) == [job]
    assert "without its results" in job.failure
    assert read_lines(folder / "a" / "marks") == ["start"] and not (folder / "b").exists()


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


@pytest.mark.parametrize("present", [None, "args.json", "best/", "metrics.jsonl"])
def test_resume_is_for_runs_that_were_started(folder, present):
    fill(folder, *([f"a/{present}"] if present else []))
    start, resume = (
        make_stage(folder / "a", f"echo {name} >> marks; touch done") for name in ("start", "resume")
    )
    for stage in (replace(start, resume=resume.command), start):  # the second continues by itself
        (folder / "a" / "done").unlink(missing_ok=True)
        assert run_jobs([Job("a", [stage])], at_once=1) == []
    assert read_lines(folder / "a" / "marks") == ["resume" if present == "args.json" else "start", "start"]


@pytest.mark.parametrize("num_threads", [None, 3])
def test_environment_of_the_commands(folder, monkeypatch, num_threads):
    """Modules of the project are found from any folder, and relative paths still start from there."""
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.chdir(folder)
    code = "import support.files, sys; print(support.files.ROOT, sys.path[1:3])"
    script = f"echo $OMP_NUM_THREADS >> marks; '{sys.executable}' -c '{code}' >> marks; touch done"
    stage = Stage(folder / "a", ["sh", "-c", f"mkdir a; cd a; {script}"], is_finished)
    assert run_jobs([Job("a", [stage])], at_once=1, num_threads=num_threads) == []
    assert read_lines(folder / "a" / "marks") == [
        str(num_threads or 7),
        f"{ROOT} {[str(ROOT), '/elsewhere']}",
    ]
    assert os.environ["OMP_NUM_THREADS"] == "7" and os.environ["PYTHONPATH"] == "/elsewhere"


@pytest.mark.parametrize(
    ("log", "steps"),
    [
        (b'{"step": 2}\n{"step": 4, "loss": 1}\n', 4),
        (b'{"step": 99}\n', 10),
        (b'{"step": 4}\n{"st', 0),
        (b"", 0),
        (b"\n\n", 0),
        (b"\xff\xfe\n", 0),
        (b"[1, 2]\n", 0),
        (b"7\n", 0),
        (b'{"step": null}\n', 0),
        (b'{"loss": 1}\n', 0),
    ],
)
def test_steps_done_takes_any_log(folder, log, steps):
    fill(folder, "a/metrics.jsonl")
    (folder / "a" / "metrics.jsonl").write_bytes(log)
    job = make_job(folder / "a", "touch done", num_steps=10)
    assert job.steps_done() == steps
    assert run_jobs([job], at_once=1) == []
    assert job.steps_done() == 10


# --- stopped, killed, and several runners -----------------------------------------------------------------


@pytest.mark.slow
def test_second_signal_does_not_wait_for_what_is_saved(folder, start_runner):
    runner = start_runner(LONG, *"ab")
    started = [folder / "a", folder / "b"]
    wait_for(lambda: all((path / "marks").exists() for path in started))
    os.kill(runner.pid, signal.SIGTERM)
    wait_for(lambda: all((path / "signals").exists() for path in started))
    os.kill(runner.pid, signal.SIGINT)  # nothing lets them save
    runner.communicate(timeout=PATIENCE)
    assert runner.returncode == 128 + signal.SIGTERM
    assert not any((path / "last").exists() for path in started)


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_signal_lets_each_command_save_and_the_next_start_repeats_nothing(folder, start_runner, number):
    fill(folder, "a/done")
    runner = start_runner(LONG, *"abcd")
    started = [folder / "b", folder / "c"]
    wait_for(lambda: all((path / "marks").exists() for path in started))
    # Ctrl-C reaches the whole process group.
    send = os.killpg if number == signal.SIGINT else os.kill
    send(runner.pid, number)
    wait_for(lambda: all((path / "signals").exists() for path in started))
    assert runner.poll() is None  # it waits until they are saved
    (folder / "save").touch()
    output, _ = runner.communicate(timeout=PATIENCE)
    assert runner.returncode == 128 + number
    assert "2 runs were stopped" in output
    assert [read_lines(path / "signals") for path in started] == [["TERM"], ["TERM"]]
    assert all((path / "last").is_dir() and not is_finished(path) for path in started)
    assert not (folder / "d").exists()

    (folder / "go").touch()
    runner = start_runner(LONG, *"abcd")
    runner.communicate(timeout=PATIENCE)
    assert runner.returncode == 0
    marks = [read_lines(folder / name / "marks") for name in "abcd"]
    assert marks == [[], ["start", "again"], ["start", "again"], ["start"]]


@pytest.mark.slow
def test_command_of_a_killed_runner_goes_on_and_is_waited_for(folder, start_runner):
    first = start_runner(LONG, "a", at_once=1)
    wait_for((folder / "a" / "marks").exists)
    first.kill()
    first.wait()

    second = start_runner(f'case "$0" in */a) {LONG};; *) echo start >> marks; touch done;; esac', "a", "b")
    wait_for(lambda: is_finished(folder / "b"))  # what is free need not wait for the other
    assert second.poll() is None and not is_finished(folder / "a")
    (folder / "go").touch()
    second.communicate(timeout=PATIENCE)
    assert second.returncode == 0
    assert [read_lines(folder / name / "marks") for name in "ab"] == [["start"], ["start"]]
    assert not (folder / "a" / "signals").exists()


@pytest.mark.slow
def test_two_runners_share_the_work(folder, start_runner):
    # No command ends before both are at work.
    script = """
        echo start >> marks
        until [ "$(ls .. | grep -c '^up-')" = 2 ]; do sleep 0.02; done
        sleep 0.1
        touch done
    """
    names = "abcdef"
    runners = [start_runner(script, *names) for _ in range(2)]
    for runner in runners:
        runner.communicate(timeout=PATIENCE)
        assert runner.returncode == 0
    assert [read_lines(folder / name / "marks") for name in names] == [["start"]] * len(names)
    assert all(is_finished(folder / name) for name in names)
