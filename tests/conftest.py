"""What all tests share: one thread, no network, nothing of the user's, and a process for Hugging Face."""

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import traceback
from io import StringIO
from pathlib import Path

import pytest

# Here, before anything imports torch: tiny models run faster on one thread, and where other work keeps the
# cores busy, threads that spin while they wait for each other make a test ten times slower.
os.environ["OMP_NUM_THREADS"] = "1"
# No test, and no process that one starts, sees the user's settings, caches or home.
for name in ("PYTHONIOENCODING", "PYTHONPATH", "PYTHONSAFEPATH", "HF_HOME", "CXX", "XDG_CACHE_HOME"):
    os.environ.pop(name, None)
os.environ["HF_HUB_OFFLINE"] = "1"
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored under nohup
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit it
    home = tempfile.TemporaryDirectory(prefix="home-of-tests-")
    os.environ |= {"HOME": home.name, "MPLCONFIGDIR": home.name}


def pytest_collection_modifyitems(items):
    """What needs Hugging Face comes first: of several workers, one alone then has to import it."""
    items.sort(key=lambda item: "run_transformers" not in getattr(item, "fixturenames", ()))


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


def serve(connection, other_end):
    """In a fork that knows nothing of the project: runs code in a folder; answers nothing, or a traceback."""
    from support.files import ROOT
    from tests.tiny import fresh_modules

    other_end.close()  # so that it ends when the tests do, however that is
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    sys.stdout = sys.stderr = StringIO()
    sys.path[:] = [folder for folder in sys.path if Path(folder or ".").resolve() != ROOT]
    with fresh_modules():
        for code, folder in iter(connection.recv, None):
            os.chdir(folder)
            error = ""
            try:
                exec(code, {})  # noqa: S102
            except BaseException:  # noqa: BLE001 (whatever it is, the test has to know)
                error = traceback.format_exc()
            connection.send(error)


@pytest.fixture(scope="session")
def run_transformers():
    """Runs a little Python that uses Hugging Face `transformers`, the reference, in a process of its own.

    Away from the project: our `datasets.py` and `tokenizer.py` look like packages that `transformers`
    imports. One process serves all tests, since the import takes seconds; a fork has torch already.
    """
    context = multiprocessing.get_context("fork")
    connection, its_end = context.Pipe()
    process = context.Process(target=serve, args=(its_end, connection), daemon=True)
    process.start()
    its_end.close()

    def run(code, folder):
        connection.send((code, folder))
        error = connection.recv()
        assert not error, error

    yield run
    connection.send(None)
    process.join()


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
