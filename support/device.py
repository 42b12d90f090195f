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

# What linear layers compute in under each --precision.
PRECISIONS: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "tf32": torch.float32,  # whose products a GPU makes of factors with 10 bits after the point instead of 23
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
DEVICE_TYPES = ("cpu", "cuda", "mps")
AMPERE = (8, 0)  # NVIDIA's compute capability from which on there are bfloat16 and TF32
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's <malloc.h>


def is_bf16_fast(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices in hardware (CPU: AVX512-BF16 or AMX)."""
    if device.type != "cpu":
        return is_ampere(device)
    return any(
        getattr(torch.cpu, name, lambda: False)()
        for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    )


def is_ampere(device: torch.device) -> bool:
    """Whether a device is an NVIDIA GPU with bfloat16 and TF32: Ampere or newer."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= AMPERE


def resolve_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU of NVIDIA's if there is one, else the CPU.

    Raises:
        UserError: if it is not available, or of a kind that nothing here was written for.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]  # torch goes on about its backends
        raise UserError(f"--device {name}: not available here ({reason})") from None
    if device.type not in DEVICE_TYPES:
        raise UserError(f"--device {name}: expected auto or one of {', '.join(DEVICE_TYPES)}")
    return device


def warn_of_device(device: torch.device) -> None:
    """Say so in a line if nobody has tried a kind of device."""
    if device.type == "mps":
        print("warning: --device mps is untested; compare a short run with one on --device cpu")


def resolve_precision(name: str, device: torch.device) -> tuple[str, str | None]:
    """A key of PRECISIONS for --precision, and the reason if it was "auto".

    Raises:
        UserError: if the device does not have it.
    """
    if name == "tf32" and not is_ampere(device):
        raise UserError(
            f"--precision tf32: {device} has no TF32, as NVIDIA GPUs of compute capability 8.0 and newer do;"
            " expected another precision"
        )
    if name != "auto":
        return name, None
    if device.type == "mps":
        return "fp32", "the safest where nothing is tested"
    if is_bf16_fast(device):
        return "bf16", "this processor is fast at bfloat16"
    if device.type == "cuda":
        return "fp16", "this GPU has no bfloat16; losses are scaled"
    return "fp32", "this processor is slow at bfloat16"


def set_float32_products(precision: str) -> None:
    """Let GPUs make float32 products in TF32, or not, for the whole process, whatever it was set to."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def make_autocast(device: str, precision: str):
    """A function that makes the mixed-precision context of a run."""
    dtype = PRECISIONS[precision]
    if dtype == torch.float32:
        return nullcontext
    return partial(torch.autocast, torch.device(device).type, dtype=dtype)


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
