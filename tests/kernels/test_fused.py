"""fused.py: the functions to be compiled against their plain twins, and what happens where compiling fails.

Shapes: K tasks, n columns of their gradients.
"""

import pytest
import torch

from kernels import fused
from kernels.fused import (
    PLAIN,
    CompiledKernel,
    Kernels,
    compile_kernels,
    find_compiler,
    fused_adamw_update,
    fused_gram_matrix,
    fused_weighted_sum,
    pays_off,
)
from optimizer import adamw_update
from pcgrad import gram_matrix, weighted_sum
from tests.test_optimizer import check_decay

# Both sides compute in float32 and add in another order.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}


def random_grads(num_tasks: int, num_columns: int, dtype: torch.dtype = torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tasks, num_columns, generator=generator).to(dtype)


def make_update(size: int, decays: tuple, seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Parameter, gradient, and both moments in the middle of a run; the hyperparameters of a step."""
    param, grad, exp_avg, exp_avg_sq = random_grads(4, size, seed=seed)
    hyperparameters = torch.tensor([0.9, 0.999, 0.01, 1e-6, *decays], dtype=torch.float64)
    return [param, grad, 0.1 * exp_avg, 0.01 * exp_avg_sq.square()], hyperparameters


def check_kernels(kernels: Kernels, num_columns: int, dtype: torch.dtype, num_tasks: int = 3) -> None:
    """All three kernels against their plain twins."""
    grads = random_grads(num_tasks, num_columns, dtype)
    kept, expected = grads.clone(), gram_matrix(grads)
    scale = float(expected.diagonal().max())
    found = kernels.gram_matrix(grads)
    assert found.dtype == torch.float32 and found.shape == (num_tasks, num_tasks)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * scale)
    weights = torch.linspace(-2, 1.5, num_tasks)
    found, expected = torch.full((2, num_columns), torch.nan)
    weighted_sum(grads, weights, expected)
    kernels.weighted_sum(grads, weights, found)
    torch.testing.assert_close(found, expected, **FLOAT32)
    assert torch.equal(grads, kept)
    for decays in ((0.0, 0.0), (0.25, 0.0), (0.0, 0.25)):
        found, hyperparameters = make_update(num_columns, decays)
        start, expected = (make_update(num_columns, decays)[0] for _ in range(2))
        adamw_update(*expected, hyperparameters)
        kernels.adamw_update(*found, hyperparameters)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, **FLOAT32)
        changed = [not torch.equal(a, b) for a, b in zip(found, start, strict=True)]
        assert changed == [True, False, True, True]  # all but the gradient


# --- the functions as they are ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tasks", [1, 3])
def test_functions_equal_their_plain_twins(num_tasks, dtype):
    kernels = Kernels(fused_gram_matrix, fused_weighted_sum, fused_adamw_update)
    check_kernels(kernels, 1013, dtype, num_tasks)


def test_decay_is_not_lost_when_small():
    check_decay(update=fused_adamw_update)


# --- compiling ----------------------------------------------------------------------------------------------


@pytest.fixture
def no_compiling(monkeypatch):
    """Records what would be compiled, and how; runs it as it is, small tensors too."""
    asked = []

    def compile(function, **options):
        asked.append((function, options))
        return function

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(fused, "MIN_SIZE", 1)
    return asked


@pytest.mark.slow
@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
@pytest.mark.skipif(" " in torch.__path__[0], reason="torch compiles nothing if its own path has a blank")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_compiled_kernels_equal_their_plain_twins(monkeypatch, capsys):
    monkeypatch.setattr(fused, "MIN_SIZE", 64)
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)  # no processes, which import torch first
    torch.compiler.reset()  # what other tests compiled counts against torch's limit
    kernels = compile_kernels()

    def refuse(*args):
        raise AssertionError("the plain way was taken")

    for each in (kernels.gram_matrix, kernels.weighted_sum, kernels.adamw_update):
        each.plain = refuse
    check_kernels(kernels, 3000, torch.bfloat16)
    check_decay(update=kernels.adamw_update)  # of the same size, so that nothing is compiled again
    # Others than were compiled with.
    hyperparameters = torch.tensor([0.5, 0.75, 0.1, 1.0, 0.25, 0.5], dtype=torch.float64)
    found, expected = (make_update(3000, (0.25, 0.5), seed=1)[0] for _ in range(2))
    kernels.adamw_update(*found, hyperparameters)
    adamw_update(*expected, hyperparameters)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **FLOAT32)
    assert capsys.readouterr().out == ""


def test_each_function_is_compiled_for_this_number_of_threads(no_compiling):
    kernels = compile_kernels()
    functions = [fused_gram_matrix, fused_weighted_sum, fused_adamw_update]
    assert [function for function, _ in no_compiling] == functions
    assert all(options["options"] == {"cpp.threads": torch.get_num_threads()} for _, options in no_compiling)
    compiled = (kernels.gram_matrix, kernels.weighted_sum, kernels.adamw_update)
    assert [each.plain for each in compiled] == [gram_matrix, weighted_sum, adamw_update]
    assert PLAIN == Kernels(gram_matrix, weighted_sum, adamw_update)


def test_small_tensors_take_the_plain_way(no_compiling, monkeypatch):
    monkeypatch.setattr(fused, "MIN_SIZE", 100)
    found = CompiledKernel(lambda tensor, other: ("compiled", other), lambda tensor, other: ("plain", other))
    assert [found(torch.zeros(1, size), 7) for size in (99, 100)] == [("plain", 7), ("compiled", 7)]


ERRORS = [
    (RuntimeError("\n  no compiler here\nand much\nto say"), "no compiler here"),
    (KeyError(), "KeyError"),
]


@pytest.mark.parametrize(("error", "reason"), ERRORS)
def test_failing_compiler_falls_back_with_one_warning(monkeypatch, capsys, error, reason):
    """For each kernel that fails; later calls go the plain way at once."""
    monkeypatch.setattr(fused, "MIN_SIZE", 1)
    attempts = []

    def fail(*args):
        attempts.append(args)
        raise error

    monkeypatch.setattr(torch, "compile", lambda function, **options: fail)
    kernels = compile_kernels()
    for _ in range(3):
        check_kernels(kernels, 50, torch.float32)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(attempts) == 3 and all(f"({reason})" in line for line in lines)


# --- whether to compile -------------------------------------------------------------------------------------


def test_find_compiler_honours_cxx_and_else_takes_what_is_there(monkeypatch, tmp_path):
    """An own PATH, whatever is installed here."""

    def make_program(name: str) -> str:
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
        return str(tmp_path / name)

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "gone"))
    (tmp_path / "g++").write_text("not a program")
    assert find_compiler() is None
    clang = make_program("clang++")
    assert find_compiler() == clang
    gcc = make_program("g++")
    (tmp_path / "elsewhere").mkdir()
    own = make_program("elsewhere/own-compiler")
    for cxx, expected in (("clang++", clang), (own, own), ("", gcc)):  # a name, a path, nothing
        monkeypatch.setenv("CXX", cxx)
        assert find_compiler() == expected


def test_pays_off_for_many_steps_of_a_large_model(monkeypatch):
    monkeypatch.setattr(fused, "COMPILE_SECONDS", 30.0)
    monkeypatch.setattr(fused, "SAVED_SECONDS", 1e-9)
    assert pays_off(100_000_000, 301) and not pays_off(100_000_000, 299)
    assert pays_off(10_000_000, 3001) and not pays_off(10_000_000, 2999)
    assert not pays_off(0, 10**9) and not pays_off(10**9, 0)
