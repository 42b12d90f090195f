"""The fault campaign in short, and that it notices what it is there to notice.

It forks, which a process that has used a GPU or threads must not, so it has a process of its own.
"""

import multiprocessing
import os
import random
import signal
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest

from support.errors import UserError

# As in faults.py; there has to be neither a thread nor a GPU.
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
MEMORY = Path("/dev/shm")


@pytest.fixture(scope="module")
def apart():
    """Calls a function in a fresh process."""
    before = dict(os.environ)
    os.environ |= SETTINGS
    spawn = multiprocessing.get_context("spawn")
    try:
        with (
            tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as folder,
            ProcessPoolExecutor(1, spawn, set_folder, (folder,)) as executor,
        ):
            yield lambda function, *args: executor.submit(function, *args).result(timeout=300)
    finally:
        os.environ.clear()
        os.environ |= before


# --- in that process ---------------------------------------------------------------------------------------------


FOLDER = []  # of that process


def set_folder(folder):
    FOLDER.append(Path(folder))


@cache
def make_bench():
    import torch

    from tests.campaign import faults

    torch.set_num_threads(1)
    return faults.Bench(FOLDER[0], steps=(4, 6))


@cache
def make_fuzzer():
    from tests.campaign.fuzz import Fuzzer

    return Fuzzer(make_bench(), share_of_runs=0.03)


@contextmanager
def replaced(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def campaign(section, *args):
    from tests.campaign import faults

    return getattr(faults, section)(make_bench(), *args)


def short_fuzz(num_cases):
    return campaign("run_fuzz", num_cases, 2, make_fuzzer())


def careless_files():
    """Every file is written under its own name; runs are killed in the middle of each early file operation."""
    from tests.campaign import faults
    from tests.campaign.forks import Strike
    from training import checkpoint

    @contextmanager
    def careless(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield path

    wrong, bench = [], make_bench()
    with replaced(checkpoint, "whole_file", careless):
        bench.settings = [faults.run_undisturbed(bench, faults.draw_settings(bench, 0))]
        for number in range(1, 9):
            strike = {"strike": Strike(number, "middle")}
            with replaced(faults, "draw_kill", lambda *args, strike=strike: strike):
                wrong += faults.kill_case(bench, 1 + number * len(faults.KINDS)).wrong
            if wrong:
                break
    return wrong


def forgotten_moments():
    import multitask_classifier
    from tests.campaign import faults

    load_last = multitask_classifier.Run.load_last

    def forgetful(run, *args):
        load_last(run, *args)
        run.optimizer.state.clear()

    with replaced(multitask_classifier.Run, "load_last", forgetful):
        rows = faults.pairwise_rows()
        return [text for number in range(4) for text in faults.matrix_case(make_bench(), rows, number)]


def defective_readers():
    """What the campaign says of a reader that does what it must not, by what it does."""
    import datasets
    from tests.campaign import faults, fuzz

    def fail(kind, text):
        if kind == "hangs":
            time.sleep(60)
        elif kind == "takes memory":
            bytearray(2**40)
        elif kind == "dies":
            os.abort()
        elif kind == "two lines":
            raise UserError("one\ntwo")
        raise KeyError(text)

    found, fuzzer = {}, make_fuzzer()
    data_files = [target for target in fuzzer.readers if target.name == "data files"]
    for kind in ("raises", "hangs", "takes memory", "dies", "two lines"):
        with (
            replaced(datasets, "clean_text", lambda text, kind=kind: fail(kind, text)),
            replaced(fuzz, "HANG_SECONDS", 0.5),
            replaced(fuzzer, "readers", data_files),
        ):
            outcome = faults.Outcome("fuzz")
            faults.go_through(outcome, fuzzer.case, range(3), 1, lambda result: result.wrong)
        found[kind] = outcome.wrong
    return found


def spoilt_files():
    """Some files, spoilt by generators with the same seed and with another."""
    fuzzer, found = make_fuzzer(), []
    names = ["encoder/vocab.txt", "data/sts-train.csv", "encoder/model.safetensors"]
    for seed in (0, 0, 1):
        rng = random.Random(seed)
        found.append([fuzzer.spoil(name, rng) for name in names * 5])
    return found


def deaths():
    from tests.campaign import forks

    def work(number):
        if number == 1:
            os.kill(os.getpid(), signal.SIGSEGV)
        if number == 4:
            time.sleep(60)
        return number

    with replaced(forks, "SILENCE_SECONDS", 1):
        return {case: str(result) for case, result in forks.in_parallel(work, range(7), 2)}


# --- tests -------------------------------------------------------------------------------------------------------


def test_killed_runs_end_with_the_same_bits(apart):
    outcome = apart(campaign, "run_kills", 28, 2, 4)
    assert not outcome.wrong, "\n".join(outcome.wrong)
    assert outcome.num_cases == 4 + 28  # undisturbed ones, too


def test_each_pair_of_choices_can_be_resumed(apart):
    from tests.campaign.faults import pairwise_rows

    outcome = apart(campaign, "run_matrix", pairwise_rows(), 2)
    assert not outcome.wrong, "\n".join(outcome.wrong)
    assert outcome.num_cases == 25


def test_broken_files_are_refused_in_one_line(apart):
    outcome = apart(short_fuzz, 1000)
    assert not outcome.wrong, "\n".join(outcome.wrong)
    assert outcome.num_cases == 1000


def test_pairwise_rows_cover_all_pairs():
    from tests.campaign.faults import FACTORS, all_rows, pairwise_rows

    for first, second in combinations(FACTORS, 2):
        found = {(row[first], row[second]) for row in pairwise_rows()}
        assert len(found) == len(FACTORS[first]) * len(FACTORS[second])
    assert len(all_rows()) == 512


def test_files_that_are_half_written_are_noticed(apart):
    assert any("is not whole" in text for text in apart(careless_files))


def test_forgotten_moments_are_noticed(apart):
    assert any("last/optimizer.safetensors differs" in text for text in apart(forgotten_moments))


def test_defective_readers_are_noticed(apart):
    found = apart(defective_readers)
    said = {
        "raises": "KeyError",
        "hangs": "Hung",
        "takes memory": "MemoryError",
        "dies": "process died with code -6",
        "two lines": "several lines",
    }
    for kind, words in said.items():
        assert any(words in text for text in found[kind]), (kind, found[kind])


def test_a_case_can_be_made_again(apart):
    first, again, other = apart(spoilt_files)
    assert first == again != other


def test_processes_that_die_or_hang_are_replaced(apart):
    found = apart(deaths)
    assert found.pop(1) == "process died with code -11"
    assert found.pop(4) == "hung"
    assert found == {number: str(number) for number in (0, 2, 3, 5, 6)}
