"""triton_kernels.py in Triton's interpreter, against float64; and each kernel compiled, which needs no GPU.

Dropout masks are read from the kernels' own results, and a reference that uses them must then agree in both
directions: the backward kernel has drawn the same numbers.

Shapes: as in triton_kernels.py.
"""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported
pytest.importorskip("triton")

import numpy as np

from kernels import static
from kernels import triton_kernels as tk
from optimizer import AdamW, rectification
from support.files import ROOT
from tests.training.test_captured_step import Pair

if type(tk.dropout_kernel).__name__ != "InterpretedFunction":
    pytest.skip("triton was imported before, without its interpreter", allow_module_level=True)

# The kernels compute in float32, sums of up to some hundred products of numbers around 1 included.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}
# Rounded to float16 on the way, by up to 2**-11 of numbers up to about 4.
FLOAT16 = {"rtol": 4e-3, "atol": 4e-3}


def close(found: torch.Tensor, expected: torch.Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(found.double(), expected.double(), **(tolerance or FLOAT32))


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ints(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def make_rng(seed: int = 2**40 + 12345, is_on: int = 1) -> torch.Tensor:
    return torch.tensor([seed, is_on])


def check_keep_rate(factor: torch.Tensor, p: float) -> None:
    """A mask of 0 and 1 / (1 - p) that keeps its share, within 4 sigma."""
    kept = factor != 0
    close(factor[kept], torch.full((int(kept.sum()),), 1 / (1 - p)))
    sigma = math.sqrt(p * (1 - p) / kept.numel())
    assert abs(float(kept.float().mean()) - (1 - p)) < 4 * sigma


# --- dropout ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1,), (1024,), (3, 5, 70), (41, 384)])
def test_dropout_keeps_its_share_and_draws_the_same_in_both_directions(shape):
    rng, x = make_rng(), randn(*shape)
    factor = tk.dropout_forward(torch.ones(shape), 0.1, rng, 7)
    check_keep_rate(factor, 0.1)
    assert torch.equal(tk.dropout_forward(x, 0.1, rng, 7), x * factor)
    assert torch.equal(tk.dropout_backward(x, 0.1, rng, 7), x * factor)
    half = tk.dropout_forward(x.half(), 0.1, rng, 7)
    assert half.dtype == torch.float16 and torch.equal(half, (x.half().float() * factor).half())


def test_dropout_draws_by_seed_and_site_and_can_be_switched_off():
    x = torch.ones(8, 512)
    masks = [
        tk.dropout_forward(x, 0.5, make_rng(seed), site) for seed in (3, 4, 3 + 2**32) for site in (0, 1)
    ]
    # Neighbours within a mask, as well as masks with each other: half of the elements agree, within 4 sigma.
    pairs = [*itertools.combinations(masks, 2), *((mask[:, 1:], mask[:, :-1]) for mask in masks)]
    for a, b in [*pairs, *((mask[1:], mask[:-1]) for mask in masks)]:
        assert abs(float((a == b).float().mean()) - 0.5) < 4 * 0.5 / math.sqrt(a.numel())
    assert torch.equal(tk.dropout_forward(x, 0.5, make_rng(3), 0), masks[0])
    assert torch.equal(tk.dropout_forward(x, 0.5, make_rng(3, is_on=0), 0), x)
    assert torch.equal(tk.dropout_forward(x, 0.0, make_rng(3), 0), x)


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9])
def test_keep_rates(p):
    check_keep_rate(tk.dropout_forward(torch.ones(10_000), p, make_rng(), 0), p)


# --- attention ----------------------------------------------------------------------------------------------


def pack(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Starts and lengths of sequences with a spare row before each and some after; the number of rows."""
    starts = [sum(lengths[:i]) + i + 1 for i in range(len(lengths))]
    return ints(*starts), ints(*lengths), sum(lengths) + len(lengths) + 9


def attention(qkv, starts, lengths, num_heads, factors=None):
    """The reference, in qkv's type; `factors` (sequence, head) -> what dropout multiplies by."""
    num_rows, width = qkv.shape
    heads = qkv.view(num_rows, 3, num_heads, -1)
    context = qkv.new_zeros(num_rows, num_heads, heads.shape[-1])
    for i, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        for head in range(num_heads):
            query, key, value = heads[start : start + length, :, head].unbind(1)
            probs = (query @ key.T * query.shape[1] ** -0.5).softmax(1)
            if factors is not None:
                probs = probs * factors[i, head]
            context[start : start + length, head] = probs @ value
    return context.view(num_rows, width // 3)


def check_attention(qkv, starts, lengths, num_heads, p=0.0, factors=None, tolerance=FLOAT32):
    """Both kernels against the reference; whatever stands in the rows of no sequence is left alone."""
    num_rows, width = qkv.shape
    own = torch.zeros(num_rows, dtype=torch.bool)
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        own[start : start + length] = True
    spoil = torch.where(own, 0.0, math.nan)[:, None].to(qkv)
    dcontext = randn(num_rows, width // 3, seed=1, dtype=qkv.dtype)
    same = (starts, lengths, num_heads, int(lengths.max()), p, make_rng(), 5)
    found = tk.attention_forward(qkv + spoil, *same)
    gradient = tk.attention_backward(qkv + spoil, dcontext + spoil, *same)
    assert found.dtype == gradient.dtype == qkv.dtype
    leaf = qkv.double().requires_grad_()
    expected = attention(leaf, starts, lengths, num_heads, factors)
    expected.backward(dcontext.double())
    close(found, expected.detach(), **tolerance)
    close(gradient, leaf.grad, **tolerance)
    assert not found[~own].any() and not gradient[~own].any()


@pytest.mark.parametrize("head_size", [32, 64, 20])
def test_attention(head_size):
    starts, lengths, num_rows = pack([0, 1, 31, 32, 0, 33, 17, 64])
    check_attention(randn(num_rows, 3 * 2 * head_size), starts, lengths, 2)


def test_attention_over_long_sequences():
    starts, lengths, num_rows = pack([65, 2, 128, 129, tk.MAX_TILE])
    check_attention(randn(num_rows, 3 * 32), starts, lengths, 1)


def test_attention_in_float16():
    starts, lengths, num_rows = pack([40, 7])
    check_attention(randn(num_rows, 3 * 2 * 32, dtype=torch.float16), starts, lengths, 2, tolerance=FLOAT16)


def read_factors(starts, lengths, num_rows, num_heads, p, rng, site) -> dict:
    """(sequence, head) -> what dropout multiplies the probabilities by, (length, length).

    With equal scores each probability is 1 / length, and with rows of the identity as values the context is
    the probabilities, head_size columns of them at a time.
    """
    head_size = 64
    parts = []
    for first in range(0, int(lengths.max()), head_size):
        qkv = torch.zeros(num_rows, 3, num_heads, head_size)
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            qkv[start : start + length, 2] = torch.eye(length, head_size + first)[:, None, first:]
        same = (starts, lengths, num_heads, int(lengths.max()), p, rng, site)
        parts.append(tk.attention_forward(qkv.flatten(1), *same).view(num_rows, num_heads, head_size))
    probs = torch.cat(parts, 2)
    return {
        (i, head): probs[start : start + length, head, :length] * length
        for i, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True))
        for head in range(num_heads)
    }


@pytest.mark.parametrize("sizes, num_heads", [([33, 5, 0, 32], 2), ([100], 1), ([150], 1)])
def test_attention_with_dropout(sizes, num_heads):
    starts, lengths, num_rows = pack(sizes)
    factors = read_factors(starts, lengths, num_rows, num_heads, 0.2, make_rng(), 5)
    check_keep_rate(torch.cat([factor.flatten() for factor in factors.values()]), 0.2)
    check_attention(randn(num_rows, 3 * num_heads * 32), starts, lengths, num_heads, 0.2, factors)


def test_attention_masks_differ_by_head_sequence_site_and_seed():
    starts, lengths, num_rows = pack([32, 32])

    def read(seed, site, is_on=1):
        return read_factors(starts, lengths, num_rows, 2, 0.5, make_rng(seed, is_on), site)

    masks = [*read(1, 1).values(), *read(1, 2).values(), *read(2, 1).values()]
    for a, b in itertools.combinations(masks, 2):
        assert abs(float((a == b).float().mean()) - 0.5) < 4 * 0.5 / 32
    assert all((factor == 1).all() for factor in read(1, 1, is_on=0).values())


def test_attention_is_the_same_bits_beside_other_sequences():
    """Spare sequences and rows, and the longest length of the batch, change nothing."""
    qkv, dcontext, rng = randn(60, 3 * 64), randn(60, 64, seed=1), make_rng()
    few = (ints(0, 20), ints(20, 33), 2, 33, 0.1, rng, 5)
    many = (ints(0, 20, 0, 0), ints(20, 33, 0, 0), 2, 128, 0.1, rng, 5)
    assert torch.equal(tk.attention_forward(qkv[:55], *few), tk.attention_forward(qkv, *many)[:55])
    found = tk.attention_backward(qkv, dcontext, *many)
    assert torch.equal(tk.attention_backward(qkv[:55], dcontext[:55], *few), found[:55])


def test_attention_refuses_what_no_tile_holds():
    with pytest.raises(AssertionError):
        tk.attention_forward(randn(4, 96), ints(0), ints(4), 1, tk.MAX_TILE + 1, 0.0, make_rng(), 0)


# --- dropout, residual sum and LayerNorm --------------------------------------------------------------------


def check_norm(num_rows, width, p, has_residual, dtype=torch.float32, is_on=1, tolerance=FLOAT32):
    x, dy = randn(num_rows, width, dtype=dtype), randn(num_rows, width, seed=1, dtype=dtype)
    residual = 3 + randn(num_rows, width, seed=2, dtype=dtype) if has_residual else None
    weight, bias, same = randn(width, seed=3), randn(width, seed=4), (p, make_rng(is_on=is_on), 9)
    y, normalised, rstd = tk.dropout_add_norm_forward(x, residual, weight, bias, 1e-5, *same)
    dx, dresidual = tk.dropout_add_norm_backward(dy, normalised, rstd, weight, *same, has_residual)
    assert y.dtype == normalised.dtype == dx.dtype == dtype and rstd.dtype == torch.float32

    factor = torch.ones(num_rows, width, dtype=torch.float64)
    if p and is_on:  # the backward kernel's mask: if the forward one's is another, y is
        factor = (dx.double() / dresidual.double()).nan_to_num(0.0).round(decimals=2)
        factor = (factor != 0) / (1 - p)
        check_keep_rate(factor, p)
    leaves = [x.double().requires_grad_()]
    total = leaves[0] * factor
    if has_residual:
        leaves.append(residual.double().requires_grad_())
        total = total + leaves[1]
    expected = F.layer_norm(total, (width,), weight.double(), bias.double(), 1e-5)
    close(y, expected.detach(), **tolerance)
    close(rstd, (total.var(1, correction=0) + 1e-5).rsqrt().detach(), **tolerance)
    close(normalised, F.layer_norm(total, (width,), eps=1e-5).detach(), **tolerance)
    gradients = torch.autograd.grad(expected, leaves, dy.double())
    close(dx, gradients[0], **tolerance)
    assert (dresidual is None) == (not has_residual)
    if has_residual:
        close(dresidual, gradients[1], **tolerance)


@pytest.mark.parametrize(
    "num_rows, width, p, has_residual",
    [
        (1, 32, 0.0, False),
        (7, 384, 0.0, True),
        (9, 384, 0.1, True),
        (5, 768, 0.5, True),
        (3, 1500, 0.1, True),
    ],
)
def test_dropout_add_norm(num_rows, width, p, has_residual):
    check_norm(num_rows, width, p, has_residual)


def test_dropout_add_norm_switched_off_and_in_float16():
    check_norm(6, 100, 0.4, True, is_on=0)
    check_norm(6, 100, 0.0, True, dtype=torch.float16, tolerance=FLOAT16)


def test_norm_of_large_numbers():
    """A mean a thousand times the deviation, of which E[x^2] - E[x]^2 would leave nothing in float32."""
    x = 1e4 + randn(4, 384)
    y, _, _ = tk.dropout_add_norm_forward(
        x, None, torch.ones(384), torch.zeros(384), 1e-12, 0.0, make_rng(), 0
    )
    # The mean is rounded to 2**-11, half a unit of 1e4 in float32.
    close(y, F.layer_norm(x.double(), (384,), eps=1e-12), rtol=0, atol=2e-3)


# --- sums over the rows of a task ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ends, width, dtype",
    [((50,), 150, torch.float32), ((0, 1, 1, 40), 60, torch.float16), ((300, 333), 60, torch.float32)],
)
def test_sum_by_task(ends, width, dtype):
    num_rows = ends[-1] + 5
    x, times = randn(num_rows, width, dtype=dtype), randn(num_rows, width, seed=1, dtype=dtype)
    begins = (0, *ends[:-1])
    expected = [x[a:b].double().sum(0) for a, b in zip(begins, ends, strict=True)]
    products = [(x.double() * times)[a:b].sum(0) for a, b in zip(begins, ends, strict=True)]
    out = torch.full((len(ends), 400), math.nan)[:, 100 : 100 + width]  # a part of longer rows
    x[ends[-1] :] = times[ends[-1] :] = math.nan
    tk.sum_by_task(x, ints(*ends), out)
    close(out, torch.stack(expected), rtol=1e-5, atol=1e-4)
    tk.sum_by_task(x, ints(*ends), out, times, accumulate=True)
    close(out, torch.stack(expected) + torch.stack(products), rtol=1e-5, atol=1e-4)
    assert out._base[:, :100].isnan().all() and out._base[:, 100 + width :].isnan().all()


def test_sum_by_task_is_the_same_bits_with_spare_rows():
    x, few, many = randn(90, 40), torch.empty(2, 40), torch.empty(2, 40)
    tk.sum_by_task(x[:61], ints(20, 61), few)
    tk.sum_by_task(x, ints(20, 61), many)
    assert torch.equal(few, many)


# --- task gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tasks", range(1, 9))
def test_gram_by_block(num_tasks):
    dtype = torch.float16 if num_tasks == 3 else torch.float32
    grads = randn(num_tasks, 3000, dtype=dtype)[:, 100:]
    bounds = [(0, 1000), (1000, 1001), (1001, 2900), (5, 5)]
    starts, stops = torch.tensor(bounds).T.contiguous()
    found = tk.gram_by_block(grads, starts, stops)
    expected = [grads[:, a:b].double() @ grads[:, a:b].double().T for a, b in bounds]
    assert found.dtype == torch.float32
    close(found, torch.stack(expected), rtol=1e-5, atol=1e-3)  # of norms up to 44
    starts, stops = torch.tensor([[0, 1024, 2048], [1024, 2048, 2896]])
    apart = tk.gram_by_block(grads, starts, stops, alignment=16)
    close(apart.sum(0), grads[:, :2896].double() @ grads[:, :2896].double().T, rtol=1e-5, atol=1e-3)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of infinity times 0
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_gram_shows_what_is_not_finite(value):
    grads = randn(3, 900)
    grads[1, 700] = value
    found = tk.gram_by_block(grads, torch.tensor([0, 600]), torch.tensor([600, 900]))
    assert found[0].isfinite().all()
    assert found[1].isfinite().tolist() == [[True, False, True], [False] * 3, [True, False, True]]


@pytest.mark.parametrize("options", [{}, {"weight_decay": 1e-6}, {"weight_decay": 0.1}, {"rectify": True}])
@pytest.mark.parametrize("num_tasks", [1, 3])
def test_combine_adamw_follows_the_optimizer(num_tasks, options):
    size, lr = 300 if options else 1100, 0.01
    dtype = torch.float16 if num_tasks == 3 else torch.float32
    start = randn(size)
    reference = torch.nn.Parameter(start.double())
    optimizer = AdamW([reference], lr=lr, **options)
    param, exp_avg, exp_avg_sq = start.clone(), torch.zeros(size), torch.zeros(size)
    copy, grad_out = torch.zeros(size, dtype=torch.float16), torch.zeros(size)
    weights = torch.linspace(-1, 2, num_tasks) if num_tasks > 1 else torch.ones(1)
    adaptive = set()
    for step in range(1, 9):
        grads = (randn(num_tasks, size + 7, seed=step) * 0.1).to(dtype)[:, :size]
        reference.grad = weights.double() @ grads.double()
        optimizer.step()
        # As AdamW has them; float64, see combine_adamw.
        beta1, beta2, decay = 0.9, 0.999, lr * options.get("weight_decay", 0.0)
        factor = rectification(beta2, step) if options.get("rectify") else 1.0
        step_size = lr / (1 - beta1**step)
        step_size *= 1.0 if factor is None else math.sqrt(1 - beta2**step) * factor
        decays = (decay, 0.0) if decay < 8e-8 else (0.0, decay)
        numbers = [beta1, beta2, step_size, 1e-6, *decays, float(factor is not None), 1.0]
        adaptive.add(factor is not None)
        numbers = torch.tensor(numbers, dtype=torch.float64)
        tk.combine_adamw(grads, weights, param, exp_avg, exp_avg_sq, numbers, copy, grad_out)
        close(grad_out, reference.grad, rtol=1e-6, atol=1e-6)
        assert torch.equal(copy, param.half())
    assert adaptive == ({True, False} if options.get("rectify") else {True})
    # The parameter is rounded to float32 in each of 8 steps, by up to 2**-23 of numbers up to 4.
    close(param, reference.detach(), rtol=0, atol=4e-6)
    state = optimizer.state[reference]
    close(exp_avg, state["exp_avg"], rtol=1e-5, atol=1e-7)
    close(exp_avg_sq, state["exp_avg_sq"], rtol=1e-5, atol=1e-9)


def test_combine_adamw_meets_the_optimizer_in_float32():
    """A large early decay too, of which no run has one: both branches of the mathematics, in one step."""
    for early, late, is_adaptive in itertools.product((0.0, 0.25), (0.0, 0.25), (0.0, 1.0)):
        grads, param, m = randn(1, 300), randn(300, seed=1), randn(300, seed=2)
        v = randn(300, seed=3).square()
        p, g, exp_avg, exp_avg_sq = (each.double() for each in (param, grads[0], m, v))
        exp_avg = 0.9 * exp_avg + 0.1 * g
        exp_avg_sq = 0.999 * exp_avg_sq + 0.001 * g**2
        denominator = exp_avg_sq.sqrt() + 1e-6 if is_adaptive else 1.0
        p = (p - 0.3 * exp_avg / denominator) * (1 - early) + early * 0.0
        p = p * (1 - late)
        numbers = torch.tensor([0.9, 0.999, 0.3, 1e-6, early, late, is_adaptive, 1.0])
        tk.combine_adamw(grads, torch.ones(1), param, m, v, numbers)
        # Float32 numbers: 1 - 0.999 is off by 1.3e-5 of itself.
        close(param, p, rtol=1e-5, atol=2e-5)
        close(m, exp_avg)
        close(v, exp_avg_sq, rtol=2e-5, atol=1e-7)


def test_a_step_that_is_left_out_changes_nothing():
    grads = torch.full((2, 50), math.nan)
    before = [randn(50, seed=seed) for seed in range(3)]
    after = [tensor.clone() for tensor in before]
    copy, grad_out = torch.zeros(50, dtype=torch.float16), torch.zeros(50)
    numbers = torch.tensor([0.9, 0.999, math.nan, 1e-6, 0.0, 0.0, 1.0, 0.0])
    tk.combine_adamw(grads, torch.full((2,), math.nan), *after, numbers, copy, grad_out)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not copy.any() and not grad_out.any()


# --- the compiler -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_launch_compiles(tmp_path):
    """In a process of its own, without the interpreter. The two smallest tiles stand for all; by hand,
    `python -m tests.kernels.compile_triton` tries the others, and other cards.
    """
    code = "import torch, tests.kernels.compile_triton as c; c.main(80, torch.bfloat16, 32, max_length=64)"
    settings = {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(tmp_path)}
    settings = {**os.environ, **settings, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=False, cwd=ROOT, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f" {name}" in done.stdout for name in vars(tk) if name.endswith("_kernel"))


def test_max_tile_by_card():
    """Tesla T4, GeForce RTX 30 and 40, A100, H100."""
    cards = (65_536, 101_376, 166_912, 232_448)
    assert [tk.max_tile(torch.float16, shared) for shared in cards] == [32, 128, 256, 256]
    assert [tk.max_tile(torch.float32, shared) for shared in cards] == [0, 128, 256, 256]
    assert tk.max_tile(torch.float32, 0) == 0


# --- gradients of embedding tables, and a whole step --------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_are_added_to_the_table_rows_that_they_were_looked_up_in(dtype, monkeypatch):
    """Some occur more often than a piece holds; two tasks, each with a table of its own."""
    monkeypatch.setattr(static, "PIECE", 16)
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 9, 150) * rng.integers(0, 2, 150)  # half of them are 0
    tasks, starts = [slice(0, 70), slice(70, 150)], [40, 5000]
    table = static.sort_rows(numbers, tasks, starts, 130)
    pad = [(values, size) for values, size in ((table.pieces, 40), (table.sums, 40), (table.offsets, 39))]
    padded = [torch.from_numpy(np.pad(values, (0, size - len(values)), "edge")).int() for values, size in pad]
    x, out = randn(150, 130, dtype=dtype), randn(8000)
    expected = out.double()
    for task, start in zip(tasks, starts, strict=True):
        for row in range(task.start, task.stop):
            place = start + 130 * int(numbers[row])
            expected[place : place + 130] += x[row].double()
    tk.sum_rows(x, torch.from_numpy(table.order).int(), *padded, out)
    close(out, expected)


def test_whole_steps_with_these_kernels_equal_plain_ones():
    pair = Pair(ops=tk, grad_method="pcgrad", clip_norm=1.0)
    pair.steps(2, sizes=(2,))
    pair.compare_parameters()
