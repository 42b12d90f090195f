"""threads.py: each command that trains sets it before torch is imported, and what a user has set wins."""

import os
import subprocess
import sys

import pytest

from support.files import ROOT
from support.threads import SPIN_COUNT, share_cores

# Runs a command up to its first import of torch, and says what a thread library would read there.
SPY = """
import os, runpy, sys

class Spy:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Spy())
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__")
"""
OURS = str(SPIN_COUNT)


@pytest.mark.parametrize("command", ["multitask_classifier", "training.pretrain_mlm"])
def test_commands_that_train_set_it_before_torch(command):
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    process = [sys.executable, "-c", SPY, command, "--max_steps", "1"]
    done = subprocess.run(process, cwd=ROOT, env=clean, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{OURS} None"


@pytest.mark.parametrize(
    ("users", "added"),
    [
        ({"OMP_NUM_THREADS": "1"}, {"GOMP_SPINCOUNT": OURS}),
        ({"GOMP_SPINCOUNT": "7"}, {}),
        ({"OMP_WAIT_POLICY": "active"}, {}),
    ],
)
def test_what_a_user_has_set_wins_and_nothing_else_is_set(monkeypatch, users, added):
    monkeypatch.setattr(os, "environ", dict(users))
    share_cores()
    assert os.environ == users | added
