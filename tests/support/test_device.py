"""Devices and precisions: what is taken on which machine. Machines with a GPU are made up."""

from contextlib import nullcontext

import pytest
import torch

from support import device as device_module
from support.device import (
    is_bf16_fast,
    make_autocast,
    resolve_device,
    resolve_precision,
    set_float32_products,
    warn_of_device,
)
from tests.tiny import refusal

V100, T4, A100 = (7, 0), (7, 5), (8, 0)


@pytest.fixture
def machine(monkeypatch):
    """Make a machine up: the compute capability of its GPU, and whether the processor is fast at bfloat16."""

    def make(capability=A100, fast_cpu=False):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda: fast_cpu, raising=False)

    return make


@pytest.mark.parametrize(
    ("device", "capability", "fast_cpu", "precision"),
    [
        ("cpu", A100, False, "fp32"),
        ("cpu", V100, True, "bf16"),
        ("cuda", V100, True, "fp16"),
        ("cuda:1", T4, False, "fp16"),
        ("cuda", A100, False, "bf16"),
        ("cuda", (12, 0), False, "bf16"),
        ("mps", A100, True, "fp32"),  # not by the processor's flags
    ],
)
def test_auto_precision(machine, device, capability, fast_cpu, precision):
    machine(capability, fast_cpu)
    found, why = resolve_precision("auto", torch.device(device))
    assert found == precision and why
    assert is_bf16_fast(torch.device(device)) == (precision == "bf16")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_precision_that_was_asked_for_is_taken(machine, precision):
    for capability in (V100, A100):
        machine(capability)
        for device in ("cpu", "cuda", "mps"):
            assert resolve_precision(precision, torch.device(device)) == (precision, None)


@pytest.mark.parametrize("device", ["cpu", "mps", "cuda"])
def test_tf32_is_refused_where_there_is_none(machine, device):
    machine(T4, fast_cpu=True)
    message = refusal(resolve_precision, "tf32", torch.device(device))
    assert message.startswith(f"--precision tf32: {device} has no TF32")
    machine(A100)
    assert resolve_precision("tf32", torch.device("cuda")) == ("tf32", None)


def test_float32_products_do_not_depend_on_what_the_process_had():
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("tf32", "fp32", "tf32", "bf16", "tf32", "fp16"):
            set_float32_products(precision)
            assert torch.backends.cuda.matmul.allow_tf32 == (precision == "tf32")
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_autocast_is_only_made_for_half_precision(precision, dtype):
    assert make_autocast("cpu", "fp32") is nullcontext and make_autocast("cpu", "tf32") is nullcontext
    with make_autocast("cpu", precision)():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


@pytest.mark.parametrize(
    "name", ["meta", "nonsense", "cpu:cpu", "", "mps" if torch.cuda.is_available() else "cuda"]
)
def test_device_that_is_not_there(name):
    assert refusal(resolve_device, name).startswith(f"--device {name}: ")


def test_mps_is_taken_by_name_alone_and_said_to_be_untested(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(device_module.torch, "empty", lambda *size, device: None)
    assert resolve_device("auto") == torch.device("cpu")
    assert resolve_device("mps") == torch.device("mps")
    for device in ("cpu", "cuda", "mps"):
        warn_of_device(torch.device(device))
    printed = capsys.readouterr().out
    assert printed == "warning: --device mps is untested; compare a short run with one on --device cpu\n"
