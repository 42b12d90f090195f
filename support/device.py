"""The machine that tensors live on: which device, which precision, how much memory."""

import ctypes
import os
import platform
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch

from support.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's <malloc.h>


def is_bf16_fast(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices in hardware (CPU: AVX512-BF16 or AMX)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere
    return any(
        getattr(torch.cpu, name, lambda: False)()
        for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    )


def resolve_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not available here ({str(error).splitlines()[0]})") from None
    return device


def make_autocast(device: str, precision: str):
    """A function that makes the mixed-precision context of a run."""
    if precision == "fp32":
        return nullcontext
    return partial(torch.autocast, torch.device(device).type, dtype=torch.bfloat16)


def to_device(batch: dict[str, torch.Tensor], device: str) -> dict[str, torch.Tensor]:
    """A batch on its device; but for the mask, which the host needs, and would have to wait for there."""
    return {
        key: value if key == "attention_mask" else value.to(device, non_blocking=True)
        for key, value in batch.items()
    }


def describe_machine(device: str) -> dict:
    """What a run's time depends on: processor, cores, threads of tensor operations, GPU."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")  # Linux: platform.processor() says little or nothing there
    for line in cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
    machine = {"processor": processor, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.device(device).type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


def keep_freed_memory() -> None:
    """Let the C library keep what is freed, for the next step to use.

    By default glibc gives large blocks back to the system, which hands them out again page by page, each
    zeroed: 45,000 page faults in every training step, a quarter of its time. Other C libraries are left as
    they are.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
    except (OSError, AttributeError, TypeError):  # not glibc
        pass


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is torch's, of GPU or CPU, or Python's way to say so."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = ("t allocate memory", "bad_alloc", "could not create a primitive")  # the last by oneDNN
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


@contextmanager
def out_of_memory_hint(hint: Callable[[], str]):
    """Turn a lack of memory into one line that says for what, and what would need less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory {hint()}") from None
