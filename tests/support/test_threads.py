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
@pytest.mark.parametrize(
    ("users", "found"),
    [
        ({}, f"{OURS} None"),
        ({"GOMP_SPINCOUNT": "7"}, "7 None"),
        ({"OMP_WAIT_POLICY": "active"}, "None active"),
        ({"OMP_NUM_THREADS": "1"}, f"{OURS} None"),
    ],
)
def test_commands_that_train_set_it_before_torch(command, users, found):
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    process = [sys.executable, "-c", SPY, command, "--max_steps", "1"]
    done = subprocess.run(process, cwd=ROOT, env=clean | users, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == found


def test_nothing_else_is_set(monkeypatch):
    monkeypatch.setattr(os, "environ", {"OMP_NUM_THREADS": "1"})
    share_cores()
    assert os.environ == {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": OURS}
