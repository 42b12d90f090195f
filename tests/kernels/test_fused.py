"""Tests of fused.py: the functions to be compiled against their plain twins, and what happens where compiling fails.

Shapes: K tasks, n columns of their gradients.
"""

import os
import stat

import pytest
import torch

from kernels import fused
from kernels.fused import (
    PLAIN,
    CompiledPass,
    Passes,
    compile_passes,
    find_compiler,
    fused_adamw_update,
    fused_gram_matrix,
    fused_weighted_sum,
    pays_off,
)
from optimizer import AdamW, adamw_update
from pcgrad import gram_matrix, weighted_sum

DTYPES = [torch.float32, torch.bfloat16]
# Both sides compute in float32 and add in another order.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}


def random_grads(num_tasks: int, num_columns: int, dtype: torch.dtype = torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tasks, num_columns, generator=generator).to(dtype)


def make_update(size: int, keep: float, seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Parameter, gradient, and both moments in the middle of a run; the numbers of a step."""
    param, grad, exp_avg, exp_avg_sq = random_grads(4, size, seed=seed)
    numbers = torch.tensor([0.9, 0.999, 0.01, 1e-6, keep], dtype=torch.float64)
    return [param, grad, 0.1 * exp_avg, 0.01 * exp_avg_sq.square()], numbers


def check_passes(passes, num_columns: int, dtype: torch.dtype, num_tasks: int = 3) -> None:
    """All three passes against their plain twins."""
    grads = random_grads(num_tasks, num_columns, dtype)
    kept, expected = grads.clone(), gram_matrix(grads)
    scale = float(expected.diagonal().max())
    found = passes.gram_matrix(grads)
    assert found.dtype == torch.float32 and found.shape == (num_tasks, num_tasks)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * scale)
    weights = torch.linspace(-2, 1.5, num_tasks)
    found, expected = torch.full((2, num_columns), torch.nan)
    weighted_sum(grads, weights, expected)
    passes.weighted_sum(grads, weights, found)
    torch.testing.assert_close(found, expected, **FLOAT32)
    assert torch.equal(grads, kept)
    for keep in (1.0, 0.75):
        found, numbers = make_update(num_columns, keep)
        expected, _ = make_update(num_columns, keep)
        adamw_update(*expected, numbers)
        passes.adamw_update(*found, numbers)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, **FLOAT32)
        start, _ = make_update(num_columns, keep)
        changed = [not torch.equal(a, b) for a, b in zip(found, start, strict=True)]
        assert changed == [True, False, True, True]  # all but the gradient


@pytest.fixture
def no_compiling(monkeypatch):
    """Records what would be fused, and how; runs it as it is."""
    asked = []

    def compile(function, **options):
        asked.append((function, options))
        return function

    monkeypatch.setattr(torch, "compile", compile)
    return asked


# --- the functions as they are -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 4, 5])
def test_functions_equal_their_plain_twins(num_tasks, dtype):
    passes = Passes(fused_gram_matrix, fused_weighted_sum, fused_adamw_update)
    check_passes(passes, 1013, dtype, num_tasks)


def test_gram_matrix_is_symmetric_and_right_by_hand():
    grads = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0], [0.0, 2.0, -3.0]])
    expected = [[18.0, -22.0, -1.0], [-22.0, 38.0, -1.0], [-1.0, -1.0, 13.0]]
    assert fused_gram_matrix(grads).tolist() == expected
    assert fused_gram_matrix(grads.bfloat16()).tolist() == expected


def test_weighted_sum_by_hand():
    out = torch.full((3,), torch.nan)
    fused_weighted_sum(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]), torch.tensor([0.5, -2.0]), out)
    assert out.tolist() == [-14.0, -1.5, -1.5]


def test_defaults_are_the_plain_functions():
    assert PLAIN == Passes() == Passes(gram_matrix, weighted_sum, adamw_update)


# --- compiling ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_compiled_passes_equal_their_plain_twins(monkeypatch, capsys):
    monkeypatch.setattr(fused, "MIN_SIZE", 64)
    torch.compiler.reset()  # what other tests compiled counts against torch's limit
    passes = compile_passes()

    def refuse(*args):
        raise AssertionError("the plain way was taken")

    for each in (passes.gram_matrix, passes.weighted_sum, passes.adamw_update):
        each.plain = refuse
    check_passes(passes, 1013, torch.bfloat16)
    numbers = torch.tensor([0.5, 0.75, 0.1, 1.0, 0.5], dtype=torch.float64)  # others than were compiled with
    found, _ = make_update(1013, 0.75, seed=1)
    expected, _ = make_update(1013, 0.75, seed=1)
    passes.adamw_update(*found, numbers)
    adamw_update(*expected, numbers)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **FLOAT32)
    assert all(each.compiled is not None for each in (passes.gram_matrix, passes.weighted_sum))
    assert passes.adamw_update.compiled is not None
    assert capsys.readouterr().out == ""


def test_each_function_is_compiled_for_this_number_of_threads(no_compiling):
    passes = compile_passes()
    functions = [fused_gram_matrix, fused_weighted_sum, fused_adamw_update]
    assert [function for function, _ in no_compiling] == functions
    for _, options in no_compiling:
        assert options["options"] == {"cpp.threads": torch.get_num_threads()}
    plain = (passes.gram_matrix.plain, passes.weighted_sum.plain, passes.adamw_update.plain)
    assert plain == (gram_matrix, weighted_sum, adamw_update)


def test_optimizer_with_a_compiled_update_equals_the_plain_one(no_compiling, monkeypatch):
    monkeypatch.setattr(fused, "MIN_SIZE", 1)
    params = [torch.nn.Parameter(torch.linspace(-1, 1, 101)) for _ in range(2)]
    passes = compile_passes()
    optimizers = [
        AdamW([params[0]], weight_decay=0.1),
        AdamW([params[1]], weight_decay=0.1, update=passes.adamw_update),
    ]
    for step in range(5):
        grad = random_grads(1, 101, seed=step)[0]
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = grad.clone()
            optimizer.step()
    torch.testing.assert_close(*(param.detach() for param in params), **FLOAT32)


@pytest.mark.parametrize(("size", "way"), [(99, "plain"), (100, "compiled")])
def test_small_tensors_take_the_plain_way(no_compiling, monkeypatch, size, way):
    monkeypatch.setattr(fused, "MIN_SIZE", 100)
    found = CompiledPass(lambda tensor, other: ("compiled", other), lambda tensor, other: ("plain", other))
    assert found(torch.zeros(1, size), 7) == (way, 7)


def test_failing_compiler_falls_back_with_one_warning(monkeypatch, capsys):
    """For each pass that fails; later calls go the plain way at once."""
    monkeypatch.setattr(fused, "MIN_SIZE", 1)
    attempts = []

    def fail(*args):
        attempts.append(args)
        raise RuntimeError("\n  no compiler here\nand much more\nto say")

    monkeypatch.setattr(torch, "compile", lambda function, **options: fail)
    passes = compile_passes()
    for _ in range(3):
        check_passes(passes, 50, torch.float32)
    lines = capsys.readouterr().out.splitlines()
    warning = "warning: torch.compile failed, going on with plain operations (no compiler here)"
    assert lines == [warning] * 3 and len(attempts) == 3


def test_failure_without_a_message_names_its_type(monkeypatch, capsys):
    monkeypatch.setattr(fused, "MIN_SIZE", 1)

    def fail(*args):
        raise KeyError

    monkeypatch.setattr(torch, "compile", lambda function, **options: fail)
    assert torch.equal(compile_passes().gram_matrix(torch.ones(2, 3)), torch.full((2, 2), 3.0))
    assert "(KeyError)" in capsys.readouterr().out


# --- whether to compile ------------------------------------------------------------------------------------------


def make_program(folder, name: str) -> str:
    path = folder / name
    path.write_text("#!/bin/sh\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_find_compiler_honours_cxx_and_else_takes_what_is_there(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert find_compiler() is None
    clang = make_program(tmp_path, "clang++")
    assert find_compiler() == clang
    gcc = make_program(tmp_path, "g++")
    assert find_compiler() == gcc
    monkeypatch.setenv("CXX", "clang++")  # a name
    assert find_compiler() == clang
    (tmp_path / "elsewhere").mkdir()
    own = make_program(tmp_path / "elsewhere", "own-compiler")
    monkeypatch.setenv("CXX", own)  # a path
    assert find_compiler() == own
    monkeypatch.setenv("CXX", "")
    assert find_compiler() == gcc


def test_find_compiler_is_none_where_cxx_is_not_there(monkeypatch, tmp_path):
    """An empty PATH, whatever is installed here."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "gone"))
    assert find_compiler() is None
    (tmp_path / "g++").write_text("not a program")
    assert os.access(tmp_path / "g++", os.R_OK) and find_compiler() is None


def test_pays_off_for_many_steps_of_a_large_model(monkeypatch):
    monkeypatch.setattr(fused, "COMPILE_SECONDS", 30.0)
    monkeypatch.setattr(fused, "SAVED_SECONDS", 1e-9)
    assert pays_off(100_000_000, 301) and not pays_off(100_000_000, 299)
    assert pays_off(10_000_000, 3001) and not pays_off(10_000_000, 2999)
    assert not pays_off(0, 10**9) and not pays_off(10**9, 0)
