"""What all tests share: one thread, no network, nothing of the user's, and a process for Hugging Face."""

import json
import os
import socket
import subprocess
import sys
import tempfile

import pytest

# Here, before anything imports torch: tiny models run faster on one thread, and where other work keeps the
# cores busy, threads that spin while they wait for each other make a test ten times slower.
os.environ["OMP_NUM_THREADS"] = "1"
# No test, and no process that one starts, sees the user's settings, caches or home.
for name in ("PYTHONIOENCODING", "PYTHONPATH", "PYTHONSAFEPATH", "HF_HOME", "CXX", "XDG_CACHE_HOME"):
    os.environ.pop(name, None)
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit it
    home = tempfile.TemporaryDirectory(prefix="home-of-tests-")
    os.environ |= {"HOME": home.name, "MPLCONFIGDIR": home.name}


@pytest.fixture(scope="session", autouse=True)
def no_network():
    """A test that reaches for another machine fails at once, with or without a network.

    Nor does one wait for a disk: only the power failing would show what it had not yet written.
    """
    connect = socket.socket.connect

    def connect_here(self, address):
        if self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost"):
            return connect(self, address)
        raise OSError(f"a test wants to reach {address}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_here)
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


# Runs code in a folder, as told by a line on standard input; answers with a line, empty or a traceback.
SERVER = """
import json, os, sys, traceback
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # whatever the code prints is no answer
for line in sys.stdin:
    code, folder = json.loads(line)
    os.chdir(folder)
    error = ""
    try:
        exec(code, {})
    except BaseException:
        error = traceback.format_exc()
    print(json.dumps(error), file=answers, flush=True)
"""


@pytest.fixture(scope="session")
def run_transformers(tmp_path_factory):
    """Runs a little Python that uses Hugging Face `transformers`, the reference, in a process of its own.

    It runs in a folder away from the project: our `datasets.py` and `tokenizer.py` look like packages that
    `transformers` imports. One process serves all tests, since the import alone takes seconds.
    """
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        cwd=tmp_path_factory.mktemp("transformers"),
        env=os.environ | {"TRANSFORMERS_VERBOSITY": "error"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(code, folder):
        server.stdin.write(json.dumps([code, str(folder)]) + "\n")
        server.stdin.flush()
        error = json.loads(server.stdout.readline())
        assert not error, error

    with server:
        yield run
        server.stdin.close()


@pytest.fixture
def refused(capsys):
    """Calls a command's `main`, which has to end with exit code 2 and one line of error: that line."""

    def refused(main, *args):
        capsys.readouterr()
        try:
            code = main(*args)
        except SystemExit as end:
            code = end.code
        error = capsys.readouterr().err
        assert code == 2 and error.count("\n") == 1, error
        return error

    return refused


@pytest.fixture
def in_double(monkeypatch):
    """Float64 where the code says float32, so that a tolerance can be tight for gradients of any size."""
    import torch

    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
