"""Several processes that make one run: which one this is, and what it must have in common with the others.

    torchrun --standalone --nproc_per_node=8 multitask_classifier.py --data_dir data

`torchrun` starts the processes, called ranks, and says in the environment who they are; messages go through
torch.distributed, by NCCL between GPUs and by gloo between CPUs. A run of one process is `ONE`, whose methods
do nothing and call nothing of that.

Every rank runs the same program, and rank 0 alone prints and writes files. What depends on a clock, a signal
or a file may differ between ranks, so it is settled by `largest` or `from_first` before anything hangs on it:
a rank that took another turn than the others would wait for them for ever.

A rank that fails ends all others, and one line says which and why. Whoever speaks puts a mark into the
launcher's store first, and the others leave without a word. A process that was killed says nothing, so each
counts up a number in the store once a second, and is given up when that stands still. docs/scale.md has more.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from support.command_line import STOP_SIGNALS, Stopped, explain
from support.errors import RankError, UserError, one_line

Result = TypeVar("Result")

BEAT_SECONDS = 1.0
SILENCE_SECONDS = 30.0  # without a beat, before a rank is given up
SHORT_SILENCE_SECONDS = 4.0  # the same once a connection has broken
GRACE_SECONDS = 10.0  # to leave by itself, for a rank that learns of another's failure
JOIN_TIMEOUT = timedelta(minutes=5)
# For a message: rank 0 may write to a slow disk meanwhile, and lost ranks are noticed in another way.
MESSAGE_TIMEOUT = timedelta(hours=2)
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun puts into the environment
DONE = b"done"
FAILED = "failed"  # the store's key for the rank that speaks


class Watch:
    """Tells whether the other ranks are alive. It has a thread, as the main one may be stuck in a message.

    Args:
        store: of the launcher; this object uses it alone.
        names: of each rank, for messages.
    """

    def __init__(self, prog: str, store: dist.Store, rank: int, names: Sequence[str]):
        self.prog, self.store, self.rank, self.names = prog, store, rank, names
        self.keys = [f"beat/{number}" for number in range(len(names))]
        self.beats, self.heard = [b""] * len(names), [time.monotonic()] * len(names)
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        self.over.set()
        self.thread.join()
        with suppress(RuntimeError):  # the launcher is gone
            self.store.set(self.keys[self.rank], DONE)

    def claim(self) -> bool:
        """Whether this rank is the one to say what has failed: the first that asks."""
        try:
            return self.store.compare_set(FAILED, "", str(self.rank)) == str(self.rank).encode()
        except RuntimeError:  # no launcher any more
            return self.rank == 0

    def is_claimed(self) -> bool:
        with suppress(RuntimeError):
            return self.store.check([FAILED])
        return False

    def leave(self) -> None:
        """Speak for all ranks from here on.

        Raises:
            RankError: if another does so.
        """
        # What all of them have found, such as a missing file, is for rank 0 to say.
        if self.rank:
            handle_stops(signal.SIG_DFL)  # once torchrun ends all, there is nothing to add
        is_told = (self.rank > 0 and self.wait_for_claim(2 * BEAT_SECONDS)) or not self.claim()
        self.stop()
        if is_told:
            raise RankError("") from None

    def wait_for_claim(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while not self.is_claimed():
            if time.monotonic() > until:
                return False
            time.sleep(BEAT_SECONDS / 10)
        time.sleep(BEAT_SECONDS)  # torchrun ends all when one leaves: first let the one speak
        return True

    def lost(self, seconds: float) -> list[int]:
        """The ranks not heard of for so long."""
        now = time.monotonic()
        pairs = enumerate(zip(self.beats, self.heard, strict=True))
        return [number for number, (beat, heard) in pairs if beat != DONE and now - heard > seconds]

    def loss_text(self, numbers: Sequence[int]) -> str:
        named = ", ".join(f"{number} ({self.names[number]})" for number in numbers)
        return f"rank {named} is gone: killed, out of memory, or its machine is lost; all ranks end"

    def find_loss(self) -> RankError | None:
        """What to raise if another rank has failed; it takes some seconds to see that none has."""
        handle_stops(signal.SIG_IGN)  # torchrun is about to send one, but there is something to say first
        until = time.monotonic() + SHORT_SILENCE_SECONDS + 2 * BEAT_SECONDS
        while time.monotonic() < until:
            if self.wait_for_claim(BEAT_SECONDS / 2):
                return RankError("")
            found = self.lost(SHORT_SILENCE_SECONDS)
            if found:
                return RankError(self.loss_text(found) if self.claim() else "")
        return None

    def _run(self) -> None:
        count, failed_at = 0, None
        while not self.over.wait(BEAT_SECONDS):
            count += 1
            try:
                self.store.set(self.keys[self.rank], str(count))
                beats, is_failed = self.store.multi_get(self.keys), self.store.check([FAILED])
            except RuntimeError:
                if not self.over.is_set():
                    self._end("the launcher, or the machine of rank 0, is gone; all ranks end")
                return
            now = time.monotonic()
            for number, beat in enumerate(beats):
                if beat != self.beats[number]:
                    self.beats[number], self.heard[number] = beat, now
            if is_failed:
                failed_at = failed_at or now
                if now - failed_at > GRACE_SECONDS:
                    os._exit(2)
            elif found := self.lost(SILENCE_SECONDS):
                self._end(self.loss_text(found))

    def _end(self, message: str) -> None:
        if self.claim():
            print(f"{self.prog}: error: {message}", file=sys.stderr, flush=True)
        os._exit(2)  # the main thread may never come back from where it is


def handle_stops(handler) -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, handler)


def never() -> bool:
    return False


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run.

    Args:
        rank: its number, from 0.
        size: how many there are.
        watch: None for a single process.
        stopping: whether this rank has been asked to stop, for work that may be given up by all together.
    """

    rank: int = 0
    size: int = 1
    watch: Watch | None = None
    stopping: Callable[[], bool] = never

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def own_numbers(self) -> tuple[int, ...]:
        """For seeds of what each rank draws by itself; rank 0's are those of a run of one process."""
        return (self.rank,) if self.rank else ()

    def share(self, things: Sequence, turn: int = 0) -> Sequence:
        """Every `size`-th of some things; by `turn`, what is left over goes to another rank."""
        return things if self.size == 1 else things[(self.rank + turn) % self.size :: self.size]

    # --- what all ranks have to call, in the same order -----------------------------------------------------

    def sum(self, tensor: torch.Tensor) -> None:
        """Sum a contiguous tensor over all ranks, in place; each gets the same bits."""
        if self.size > 1 and tensor.numel():
            self._together(lambda: dist.all_reduce(tensor))

    def copy_first(self, tensor: torch.Tensor) -> None:
        """Copy rank 0's values into the tensors of the others."""
        if self.size > 1 and tensor.numel():
            self._together(lambda: dist.broadcast(tensor, 0))

    def largest(self, number: int) -> int:
        if self.size == 1:
            return number
        found = torch.tensor([number], dtype=torch.int64)
        self._together(lambda: dist.all_reduce(found, dist.ReduceOp.MAX))
        return int(found)

    def any(self, flag: bool) -> bool:
        return bool(self.largest(int(flag)))

    def from_first(self, work: Callable[[], Result]) -> Result:
        """What rank 0's `work` returns, for all; the others do none, and wait."""
        if self.size == 1:
            return work()
        box = [work() if self.is_first else None]
        self._together(lambda: dist.broadcast_object_list(box, 0, device=torch.device("cpu")))
        return box[0]

    def check_same(self, what: str, value: object) -> None:
        """Make sure that something is the same as on rank 0.

        Raises:
            UserError: where it is not.
        """
        if self.from_first(lambda: value) != value:
            raise UserError(f"{what}: not the same here as on rank 0; expected the same on every machine")

    def go_on(self) -> None:
        """Let all give up their work where one is `stopping`.

        Raises:
            Stopped: then, on all of them.
        """
        if self.any(self.stopping()):
            raise Stopped

    def _together(self, message: Callable[[], object]) -> None:
        try:
            message()
        except RuntimeError as error:
            loss = self.watch.find_loss()
            if loss is None:
                text = f"the connection to other ranks has broken ({one_line(error, 100)})"
                loss = RankError(text if self.watch.claim() else "")
            raise loss from None

    # --- alone ----------------------------------------------------------------------------------------------

    def check_device(self, device: str) -> None:
        """Refuse a device that ranks cannot share out, by its flag.

        Raises:
            UserError: naming what was expected.
        """
        if self.size == 1 or device == "cpu":
            return
        if device != "cuda":
            raise UserError(f"--device {device}: of several ranks each takes its own; expected cuda or cpu")
        local, count = local_rank(), torch.cuda.device_count()
        if local >= count:
            raise UserError(
                f"--nproc_per_node: more than {local} ranks on a machine with {count} GPUs; expected one each"
            )

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """For errors that every rank finds by itself: only rank 0 shows them."""
        if self.is_first:
            yield
        else:
            with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stderr(nowhere):
                yield


ONE = Ranks()


def count_ranks() -> int:
    """How many processes make this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """The number of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def connect(prog: str) -> Ranks:
    """Find the other ranks, as the environment says.

    Raises:
        UserError: if they do not come.
    """
    if torch.cuda.is_available():  # what `--device cuda` means from here on
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    # What a launch before torchrun's restart has left in its store must not be taken for ours.
    prefix = f"ranks {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=JOIN_TIMEOUT))
        own = dist.PrefixStore(prefix, store.clone())
        messages = dist.PrefixStore(f"{prefix} messages", store)
        dist.init_process_group(backend, store=messages, rank=rank, world_size=size, timeout=MESSAGE_TIMEOUT)
        own.set(f"beat/{rank}", "0")
        own.set(f"name/{rank}", f"{socket.gethostname()}, process {os.getpid()}")
        names = own.multi_get([f"name/{number}" for number in range(size)])  # waits for them
    except RuntimeError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(f"the other ranks were not found by {place} ({one_line(error, 100)})") from None
    watch = Watch(prog, own, rank, [name.decode() for name in names])
    watch.start()
    return Ranks(rank, size, watch)


@contextmanager
def join_ranks(prog: str) -> Iterator[Ranks]:
    """The ranks of this run, if `torchrun` has started several; their failures end in one line in all.

    On all but rank 0, standard output goes nowhere from here on.
    """
    if not all(map(os.environ.get, LAUNCHED)) or os.environ["WORLD_SIZE"] == "1":
        yield ONE
        return
    ranks = connect(prog)
    watch = ranks.watch
    if not ranks.is_first:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (to the end of the process)
    try:
        yield ranks
        ranks.any(False)  # the store may be rank 0's, and go with it
        watch.stop()
        dist.destroy_process_group()
    except RankError:
        watch.stop()
        raise
    except Exception as error:
        watch.leave()
        message = explain(error)
        if message is None:  # our own mistake
            raise
        raise UserError(f"rank {ranks.rank} ({watch.names[ranks.rank]}): {message}") from None
    except KeyboardInterrupt:
        loss = watch.find_loss()  # torchrun sends the signal, too, when another rank has failed
        if loss is None:
            watch.leave()
            raise
        watch.stop()
        raise loss from None
    except SystemExit:  # after a signal, everywhere; or for a wrong flag
        if not ranks.is_first:
            handle_stops(signal.SIG_DFL)
            time.sleep(BEAT_SECONDS)
        watch.stop()
        raise
