"""What several test files share."""

import os
import subprocess
import sys

import pytest
import torch


@pytest.fixture(scope="session")
def run_transformers():
    """Runs a few lines of Python that use Hugging Face `transformers`, the reference, in a process of their own.

    They run in a folder away from the project: our `datasets.py` and `tokenizer.py` look like packages that
    `transformers` imports.
    """

    def run(code, folder):
        kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        # One thread: the models are tiny, and threads that wait for each other take longer.
        own = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder,
            env=kept | own,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    return run


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny models run faster on one thread, and far faster where other work keeps the cores busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def in_double(monkeypatch):
    """Float64 where the code says float32, so that a tolerance can be tight for small and large gradients alike."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
