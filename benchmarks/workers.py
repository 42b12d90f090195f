"""Contenders in processes of their own that take turns: the engine under benchmarks.speed.

A worker process builds one contender, so that its memory and its threads are its own, and then does one thing
at a time, when told to.
"""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import contextmanager, suppress

import numpy as np
import torch

from support.errors import UserError

PASSES = 4  # over the steps, in a round of pairs
PAUSE = 0.005  # seconds before each timed call, in which the threads of the contender before it go to sleep


def serve(pipe, build: Callable, setting) -> None:
    """A worker's life: build the contender, then call its methods as told, until told None."""
    torch.set_num_threads(setting.num_threads)
    try:
        contender = build(setting)
        pipe.send((None, None))
        while (message := pipe.recv()) is not None:
            method, args = message
            pipe.send((getattr(contender, method)(*args), None))
    except (EOFError, KeyboardInterrupt):  # the parent is gone, or about to
        return
    except UserError as error:
        pipe.send((None, str(error)))
    except Exception as error:  # noqa: BLE001 (a peer may raise anything; the parent says which one it was)
        traceback.print_exc()
        pipe.send((None, f"{type(error).__name__}: {error}"))


class Worker:
    """A contender in a process of its own."""

    def __init__(self, name: str, build: Callable, setting):
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, build, setting), daemon=True)
        self.process.start()
        theirs.close()
        self.receive()

    def call(self, method: str, *args):
        """Call a method of the contender.

        Raises:
            UserError: naming the contender, if it failed or its process died.
        """
        self.send(method, *args)
        return self.receive()

    def send(self, method: str, *args) -> None:
        with suppress(OSError):  # its process has ended; `receive` says so
            self.pipe.send((method, args))

    def receive(self):
        try:
            answer, failure = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            failure = f"its process ended with exit code {self.process.exitcode}; out of memory?"
        if failure:
            raise UserError(f"{self.name}: {failure.splitlines()[0]}")
        return answer

    def close(self) -> None:
        with suppress(OSError):  # it has ended already
            self.pipe.send(None)
        self.pipe.close()
        self.process.join()


@contextmanager
def changed_environment(changes: Mapping[str, str | None]):
    """Environment variables for processes that are started meanwhile; None: not set."""
    before = {name: os.environ.get(name) for name in changes}

    def change(values: Mapping[str, str | None]) -> None:
        for name, value in values.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    change(changes)
    try:
        yield
    finally:
        change(before)


@contextmanager
def start_workers(table: dict[str, Callable], setting, environment: Mapping[str, str | None] | None = None):
    """Yields name -> Worker, all of them built; `environment` as `changed_environment` takes it."""
    workers = {}
    try:
        with changed_environment(environment or {}):
            for name, build in table.items():
                workers[name] = Worker(name, build, setting)
        yield workers
    finally:
        for worker in workers.values():
            worker.close()


def race(workers: dict[str, Worker], *, rounds: int, num_steps: int, seed: int) -> dict[str, list[float]]:
    """Seconds of each contender's rounds, after a warm-up with every step.

    A round is one pass over the steps. At each step the contenders take turns, in an order that is drawn
    anew, so that what slows the machine down for a while meets all of them.
    """
    for worker in workers.values():
        worker.call("warm_up")
    rng = np.random.default_rng(seed)
    seconds = {name: [0.0] * rounds for name in workers}
    for r in range(rounds):
        for i in range(num_steps):
            for name in rng.permutation(list(workers)).tolist():
                time.sleep(PAUSE)
                seconds[name][r] += workers[name].call("run", i)
        print(f"  round {r + 1} of {rounds}", flush=True)
    return seconds


def race_groups(groups: dict[str, list[Worker]], *, rounds: int, seed: int) -> dict[str, list[float]]:
    """Seconds of each group's rounds: its workers all run at the same time, and the mean over them counts.

    A round is one pass over the steps, without pauses. Groups take turns in an order that is drawn anew.
    """
    for worker in {worker.name: worker for group in groups.values() for worker in group}.values():
        worker.call("warm_up")
    rng = np.random.default_rng(seed)
    seconds = {name: [0.0] * rounds for name in groups}
    for r in range(rounds):
        for name in rng.permutation(list(groups)).tolist():
            time.sleep(PAUSE)
            for worker in groups[name]:
                worker.send("run_all")
            seconds[name][r] = round(float(np.mean([worker.receive() for worker in groups[name]])), 6)
        print(f"  round {r + 1} of {rounds}", flush=True)
    return seconds


def race_pair(a: Worker, b: Worker, *, rounds: int, num_steps: int, seed: int) -> list[float]:
    """Time of a over that of b: in each round the median over pairs, each the same step by one and the other.

    The two of a pair follow each other, in an order that is drawn, so that what slows the machine down meets
    both; a median over many pairs shows a hundredth where the seconds of whole rounds vary by a tenth.
    """
    for worker in (a, b):
        worker.call("warm_up")
    rng, ratios = np.random.default_rng(seed), []
    for r in range(rounds):
        pairs = []
        for i in [*range(num_steps)] * PASSES:
            seconds = {}
            for k in rng.permutation(2).tolist():
                time.sleep(PAUSE)
                seconds[k] = (a, b)[k].call("run", i)
            pairs.append(seconds[0] / seconds[1])
        ratios.append(round(float(np.median(pairs)), 6))
        print(f"  round {r + 1} of {rounds}: {ratios[-1]:.3f}", flush=True)
    return ratios


def check_losses(workers: dict[str, Worker], tolerance: float) -> dict[str, float]:
    """Make sure that all contenders compute the same task losses before any of them is timed.

    Raises:
        UserError: naming the contender and both values, if one is more than `tolerance` from the first.
    """
    reference = None
    for name, worker in workers.items():
        losses = worker.call("losses")
        reference = reference or (name, losses)
        for task, value in losses.items():
            expected = reference[1][task]
            if not abs(value - expected) <= tolerance:  # nan is no agreement
                raise UserError(
                    f"{name}: its {task} loss is {value:.6f}, that of {reference[0]} {expected:.6f}, on the"
                    f" same batch, in float32 without dropout; expected at most {tolerance:g} apart"
                )
    return reference[1]
