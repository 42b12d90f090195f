"""`make setup` without a network: what it asks the registry for, and when it does not ask at all."""

import os
import shutil
import subprocess

import pytest

from support.files import ROOT

# Stands for python3 and, once it has "made" an environment, for the python in it.
PYTHON = """#!/bin/sh
echo "$@" >> "$LOG"
[ "$1 $2" = "-m venv" ] && mkdir -p "$3/bin" && cp "$0" "$3/bin/python"
exit 0
"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def make(tmp_path):
    """Run make in a copy of what it reads; returns its output, and what python was asked for."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    (tmp_path / "python3").write_text(PYTHON)
    (tmp_path / "python3").chmod(0o755)

    def make(*arguments):
        log = tmp_path / "log"
        log.write_text("")
        environment = {"PATH": os.environ["PATH"], "LOG": str(log)}
        command = ["make", f"PYTHON={tmp_path / 'python3'}", *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        asked = [line for line in log.read_text().splitlines() if "pip install" in line]
        return done.returncode, done.stdout + done.stderr, asked

    make.folder = tmp_path
    return make


def test_the_registry_is_asked_once(make):
    code, out, asked = make("train")
    assert code == 0 and len(asked) == 2 and asked[0].endswith("-r requirements.txt")
    assert "to download: some GB where torch comes with CUDA" in out
    assert make("train")[2] == make("setup")[2] == []
    assert len(make("test")[2]) == 1 and make("quick")[2] == []
    # A file with a new time, as after a change of branch; then one with other content.
    path = make.folder / "requirements.txt"
    os.utime(path, (2e9, 2e9))
    assert make("train")[2] == make("test")[2] == []
    path.write_text(path.read_text() + "more==1\n")
    os.utime(path, (2.1e9, 2.1e9))
    assert len(make("train")[2]) == 2


def test_build_without_cuda(make):
    code, out, asked = make("TORCH_INDEX=address", "train")
    assert code == 0 and "--extra-index-url address -r requirements.txt" in asked[0]
    assert "to download: 0.4 GB" in out and make("train")[2] == []
