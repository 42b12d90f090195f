"""The fault campaign notices code that is broken on purpose, and a few of its cases pass.

It works in a fork of this process, which need not import anything. For all of it: `make faults`.
"""

import faulthandler
import multiprocessing
import os
import random
import signal
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from unittest.mock import patch

import pytest

import datasets
import multitask_classifier
from support import files
from support.errors import UserError
from tests.campaign import faults, forks, fuzz
from tests.tiny import SAMPLE

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def apart():
    """Calls a function in a process of its own, which changes nothing here."""
    context = multiprocessing.get_context("fork")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, context, faulthandler.disable) as executor,
    ):
        yield lambda function, *args: executor.submit(function, folder, *args).result(timeout=900)
        executor.submit(os._exit, 0)  # an orderly end takes seconds


@cache
def make_bench(folder):
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    return faults.Bench(Path(folder), steps=(4, 5))


@cache
def make_fuzzer(folder):
    return fuzz.Fuzzer(make_bench(folder), share_of_runs=0.1)


def few_cases(folder):
    bench, later_kinds = make_bench(folder), list(faults.KINDS)[2:4] + list(faults.KINDS)[-1:]
    outcomes = [faults.run_kills(bench, 0, num_settings=1), faults.run_fuzz(bench, 10, make_fuzzer(folder))]
    wrong = [text for outcome in outcomes for text in outcome.wrong]
    with tempfile.TemporaryDirectory() as work:
        setting, rng = bench.settings[0], random.Random(0)
        killed = faults.kill_until_done(bench, setting, Path(work, "run"), later_kinds, rng)
    return sum(outcome.num_cases for outcome in outcomes), wrong + killed.wrong, len(killed.kills)


def careless_files(folder):
    """Every file is written under its own name; runs are killed within each early file operation."""

    @contextmanager
    def careless(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield path

    bench, wrong, rng = make_bench(folder), [], random.Random(0)
    setting = faults.draw_settings(bench, 0)
    with patch.object(files, "whole_file", careless), tempfile.TemporaryDirectory() as work:
        for number in range(4, 9):
            strike = {"strike": forks.Strike(number, "middle")}
            with patch.object(faults, "draw_kill", lambda *args, strike=strike: strike):
                kinds = ["SIGKILL at a file operation"]
                wrong += faults.kill_until_done(bench, setting, Path(work, str(number)), kinds, rng).wrong
            if any("is not whole" in text for text in wrong):
                break
    return wrong


def forgotten_moments(folder):
    load_last = multitask_classifier.Run.load_last

    def forgetful(run, *args):
        load_last(run, *args)
        run.optimizer.state.clear()

    with patch.object(multitask_classifier.Run, "load_last", forgetful):
        return faults.run_matrix(make_bench(folder), faults.matrix_rows(0)[:1]).wrong


DEFECTS = {
    "KeyError": lambda: {}["no such key"],
    "Hung": partial(time.sleep, 60),
    "MemoryError": partial(bytearray, 2**40),
    "process died with code -6": os.abort,
    "several lines": partial(UserError("one\ntwo").with_traceback, None),
}


def defective_readers(folder):
    """What the campaign says of readers that do what they must not: a defect in each case, on a good file."""
    fuzzer = make_fuzzer(folder)
    case, defects = fuzzer.case, list(DEFECTS.values())

    def defective_case(number, own):
        def fail(text):
            raise defects[number]() or UserError("nothing")

        with patch.object(datasets, "clean_text", fail):
            return case(number, own)

    with (
        patch.object(fuzzer, "case", defective_case),
        patch.object(fuzz, "spoil", lambda path, rng: (path.read_bytes(), "not at all")),
        patch.object(fuzz, "HANG_SECONDS", 0.5),
        patch.object(fuzzer, "readers", fuzzer.readers[:1]),
        patch.object(fuzzer, "share_of_runs", 0),
    ):
        return faults.run_fuzz(make_bench(folder), len(defects), fuzzer).wrong


def good_files(folder):
    """What the campaign says of all its readers, each of a file that is whole."""
    fuzzer = make_fuzzer(folder)
    targets = [target for target in fuzzer.readers if target.files]
    found = [fuzzer.read(target, target.files[0], [], fuzzer.base) for target in targets]
    return [text for each in found for text in each.wrong] + [each.target for each in found if each.refused]


def deaths(folder):
    def work(number, own):
        if number == 1:
            os.kill(os.getpid(), signal.SIGSEGV)
        if number == 2:
            time.sleep(60)
        return number

    with patch.object(forks, "SILENCE_SECONDS", 1):
        return {case: str(result) for case, result in forks.in_parallel(work, 4, 2, Path(folder))}


def test_a_few_cases_pass(apart):
    num_cases, wrong, num_kills = apart(few_cases)
    assert not wrong, "\n".join(wrong)
    assert num_cases == 1 + 10 and num_kills


@pytest.mark.parametrize(
    "break_code, said",
    [(careless_files, "is not whole"), (forgotten_moments, "last/optimizer.safetensors differs")],
)
def test_half_written_files_and_forgotten_moments_are_noticed(break_code, said, apart):
    assert any(said in text for text in apart(break_code))


def test_good_files_are_read(apart):
    assert apart(good_files) == []


def test_defective_readers_are_noticed(apart):
    wrong = sorted(apart(defective_readers))
    assert len(wrong) == len(DEFECTS)
    assert all(defect in text for defect, text in zip(DEFECTS, wrong, strict=True)), wrong


def test_a_case_can_be_made_again():
    def spoilt(seed):
        return [fuzz.spoil(SAMPLE / "sts-train.csv", rng) for rng in [random.Random(seed)] * 15]

    assert spoilt(0) == spoilt(0) != spoilt(1)


def test_processes_that_die_or_hang_are_replaced(apart):
    assert apart(deaths) == {0: "0", 1: "process died with code -11", 2: "hung", 3: "3"}
