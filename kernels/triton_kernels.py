"""The kernels of the GPU step, by hand in Triton (Tillet et al. 2019,
https://doi.org/10.1145/3315508.3329973).

On a GPU a small BERT waits for memory, not for arithmetic. Each function here replaces several of torch's,
and reads and writes every number once; what can be computed again, dropout masks above all, is never stored.

How to read it: a function with `@triton.jit` is a kernel. It runs as many small programs, each of which works
out a tile of addresses from its number, `tl.program_id`, loads the tile, computes and stores. Its launcher,
an ordinary function of tensors, stands below it. Sizes of tiles are powers of two, and masks cut off what is
too much; they are `tl.constexpr`, compiled in, as is what stays the same in a run. Sums are taken in float32
and in an order that never changes, so equal input gives equal bits.

Launchers never wait for the device, and what they launch and allocate depends on shapes alone: a CUDA graph
can capture them, after a first call with these shapes, which compiles. There is no autograd; a backward
function takes the gradient of the forward one's result. Tensors are contiguous where nothing else is said.

Randomness: `p` in [0, 1) is the share of elements that dropout takes; `rng` (2,) int64 on the device holds a
seed, new in every step, and 1, or 0 to switch dropout off in a captured graph; `site` is an integer of its
own for every use of dropout in a step. A backward kernel draws the forward one's numbers again.

Shapes: M rows (tokens, and spare rows that belong to nobody), H hidden_size, N attention heads, D = H // N,
R sequences, K tasks, n columns of their gradients, W any width.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """How attention goes over the sequences that fit into so many rows."""

    num_queries: int  # at a time, so that their scores stay in registers
    num_warps: int
    # Bytes of shared memory that the backward kernel takes with D = 64, in 16-bit types and in float32; as
    # the compiler says (tests/kernels/compile_triton.py), for compute capability 8.0 as for 9.0.
    shared_16_bit: int
    shared_float32: int


# By rows. A program holds all keys of its sequence and head, and no tile makes the registers overflow.
TILES = {
    32: Tile(32, 4, 22_528, 36_864),
    64: Tile(32, 4, 40_960, 57_344),
    128: Tile(32, 8, 73_728, 98_304),
    256: Tile(16, 8, 118_784, 155_648),
}
MAX_TILE = max(TILES)
MAX_HEAD_SIZE = 64
# A range of `gram_by_block` should have at most as many columns: one program goes over it.
BLOCK_COLUMNS = 16384
NUM_SPLITS = 16  # programs that share the rows of a task in `sum_by_task`
BLOCK = 1024  # elements of one program of an element-wise kernel


def max_tile(dtype: torch.dtype, shared_memory: int) -> int:
    """The longest sequences that attention takes on a card, 0 if none.

    Args:
        shared_memory: bytes, `torch.cuda.get_device_properties(device).shared_memory_per_block_optin`.
    """
    needs = {
        rows: tile.shared_float32 if dtype == torch.float32 else tile.shared_16_bit
        for rows, tile in TILES.items()
    }
    # Cards before 8.0, which all have less, take up to twice as much (7.5, float16: 45,056 and 73,728 bytes).
    times = 2 if shared_memory < 100_000 else 1
    return max((rows for rows, need in needs.items() if need * times <= shared_memory), default=0)


def are_contiguous(*tensors: Tensor | None) -> bool:
    return all(tensor is None or tensor.is_contiguous() for tensor in tensors)


# --- dropout ------------------------------------------------------------------------------------------------


@triton.jit
def keep_factor(rng, site, p, rows, WIDTH: tl.constexpr):
    """What dropout multiplies elements by, for numbers of rows (A,) int64: (A, WIDTH), 0 or 1 / (1 - p).

    Philox (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405) makes four draws of 32 bits from a
    key, the seed, and a counter: the number of a group of four elements, and `site`. So no two elements of a
    step share a draw. Of its usual 10 rounds, 7 pass all tests of its authors.
    """
    p = p * tl.load(rng + 1).to(tl.float32)  # switched off, nothing is dropped and the factor is 1
    groups = rows[:, None] * (WIDTH // 4) + tl.arange(0, WIDTH // 4)[None, :]  # (A, WIDTH // 4)
    low, high = groups.to(tl.uint32), (groups >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(tl.load(rng), low, high, low * 0 + site, low * 0, 7)
    draws = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))  # (A, WIDTH) uint32
    return tl.where(draws >= (p * 4294967296.0).to(tl.uint32), 1.0 / (1.0 - p), 0.0)


@triton.jit(do_not_specialize=["site"])
def dropout_kernel(x, out, p, rng, site, size, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offsets = rows[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]  # (ROWS, WIDTH)
    inside = offsets < size
    values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + offsets, values * keep_factor(rng, site, p, rows, WIDTH), mask=inside)


def dropout_forward(x: Tensor, p: float, rng: Tensor, site: int) -> Tensor:
    """Zero each element of x, of any shape, with probability p and scale the rest; as `F.dropout`."""
    assert are_contiguous(x, rng)
    out = torch.empty_like(x)
    grid = (triton.cdiv(x.numel(), BLOCK),)
    dropout_kernel[grid](x, out, float(p), rng, site, x.numel(), ROWS=4, WIDTH=BLOCK // 4)
    return out


def dropout_backward(dy: Tensor, p: float, rng: Tensor, site: int) -> Tensor:
    """Gradient of `dropout_forward`, which is linear: the same factors again."""
    return dropout_forward(dy, p, rng, site)


# --- attention ----------------------------------------------------------------------------------------------


@triton.jit
def head_offsets(rows, width, head, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Where one head's D columns of rows (A,) int64 lie in a matrix of this width, (A, BLOCK_D)."""
    return rows[:, None] * width + head * D + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def attention_probs(queries, keys, length, scale, TILE: tl.constexpr):
    """softmax(queries keys^T * scale) over the first `length` keys, (A, TILE) float32."""
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
    scores = tl.where(tl.arange(0, TILE)[None, :] < length, scores, float("-inf"))
    exponentials = tl.exp(scores - tl.max(scores, 1)[:, None])
    return exponentials / tl.sum(exponentials, 1)[:, None]


@triton.jit(do_not_specialize=["site"])
def attention_forward_kernel(
    qkv, context, starts, lengths, num_heads, scale, p, rng, site,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SMALLER: tl.constexpr, TILE: tl.constexpr, QUERIES: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """One program for each sequence and head; of the launches for each tile, one takes the sequence."""
    program = tl.program_id(0)
    sequence, head = program // num_heads, program % num_heads
    length = tl.load(lengths + sequence)
    if (length <= SMALLER) | (length > TILE):
        return
    start = tl.load(starts + sequence).to(tl.int64)
    width = num_heads * D
    in_head = tl.arange(0, BLOCK_D)[None, :] < D
    places = tl.arange(0, TILE)
    inside_keys = (places[:, None] < length) & in_head
    key_offsets = head_offsets(start + places, 3 * width, head, D, BLOCK_D)
    keys = tl.load(qkv + width + key_offsets, mask=inside_keys, other=0.0)  # (TILE, BLOCK_D)
    values = tl.load(qkv + 2 * width + key_offsets, mask=inside_keys, other=0.0)
    for first in range(0, length, QUERIES):
        positions = first + tl.arange(0, QUERIES)
        inside = (positions[:, None] < length) & in_head
        offsets = head_offsets(start + positions, 3 * width, head, D, BLOCK_D)
        queries = tl.load(qkv + offsets, mask=inside, other=0.0)  # (QUERIES, BLOCK_D)
        probs = attention_probs(queries, keys, length, scale, TILE)  # (QUERIES, TILE)
        if HAS_DROPOUT:
            probs *= keep_factor(rng, site, p, program.to(tl.int64) * TILE + positions, TILE)
        result = tl.dot(probs.to(values.dtype), values, input_precision="ieee")  # (QUERIES, BLOCK_D)
        tl.store(context + head_offsets(start + positions, width, head, D, BLOCK_D), result, mask=inside)


@triton.jit(do_not_specialize=["site"])
def attention_backward_kernel(
    qkv, dcontext, dqkv, starts, lengths, num_heads, scale, p, rng, site,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SMALLER: tl.constexpr, TILE: tl.constexpr, QUERIES: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """The programs of the forward kernel; the probabilities are computed again."""
    program = tl.program_id(0)
    sequence, head = program // num_heads, program % num_heads
    length = tl.load(lengths + sequence)
    if (length <= SMALLER) | (length > TILE):
        return
    start = tl.load(starts + sequence).to(tl.int64)
    width = num_heads * D
    in_head = tl.arange(0, BLOCK_D)[None, :] < D
    places = tl.arange(0, TILE)
    inside_keys = (places[:, None] < length) & in_head
    key_offsets = head_offsets(start + places, 3 * width, head, D, BLOCK_D)
    keys = tl.load(qkv + width + key_offsets, mask=inside_keys, other=0.0)  # (TILE, BLOCK_D)
    values = tl.load(qkv + 2 * width + key_offsets, mask=inside_keys, other=0.0)
    dkeys = tl.zeros((TILE, BLOCK_D), dtype=tl.float32)
    dvalues = tl.zeros((TILE, BLOCK_D), dtype=tl.float32)
    for first in range(0, length, QUERIES):
        positions = first + tl.arange(0, QUERIES)
        inside = (positions[:, None] < length) & in_head
        offsets = head_offsets(start + positions, 3 * width, head, D, BLOCK_D)
        queries = tl.load(qkv + offsets, mask=inside, other=0.0)  # (QUERIES, BLOCK_D)
        grads = dcontext + head_offsets(start + positions, width, head, D, BLOCK_D)
        grads = tl.load(grads, mask=inside, other=0.0)  # (QUERIES, BLOCK_D), 0 beyond the sequence
        probs = attention_probs(queries, keys, length, scale, TILE)  # (QUERIES, TILE)
        dprobs = tl.dot(grads, tl.trans(values), input_precision="ieee")
        kept = probs
        if HAS_DROPOUT:
            factor = keep_factor(rng, site, p, program.to(tl.int64) * TILE + positions, TILE)
            kept = probs * factor
            dprobs *= factor
        dvalues += tl.dot(tl.trans(kept.to(grads.dtype)), grads, input_precision="ieee")
        dscores = (probs * (dprobs - tl.sum(dprobs * probs, 1)[:, None])).to(keys.dtype)
        dkeys += tl.dot(tl.trans(dscores), queries, input_precision="ieee")
        dqueries = tl.dot(dscores, keys, input_precision="ieee")
        tl.store(dqkv + offsets, dqueries * scale, mask=inside)
    tl.store(dqkv + width + key_offsets, dkeys * scale, mask=inside_keys)
    tl.store(dqkv + 2 * width + key_offsets, dvalues, mask=inside_keys)


def launch_attention(kernel, tensors, starts, lengths, num_heads, max_length, dropout) -> None:
    """One launch for each tile up to that of the longest sequence."""
    p, rng, site = dropout
    head_size = tensors[0].shape[1] // (3 * num_heads)
    assert are_contiguous(*tensors, starts, lengths, rng) and max_length <= MAX_TILE
    assert head_size <= MAX_HEAD_SIZE and tensors[0].shape[1] == 3 * num_heads * head_size
    grid = (len(lengths) * num_heads,)
    smaller = 0
    for rows, tile in TILES.items():
        if smaller < max_length:
            kernel[grid](
                *tensors, starts, lengths, num_heads, head_size**-0.5, float(p), rng, site,
                D=head_size, BLOCK_D=max(16, triton.next_power_of_2(head_size)), SMALLER=smaller, TILE=rows,
                QUERIES=tile.num_queries, HAS_DROPOUT=p > 0, num_warps=tile.num_warps, num_stages=1,
            )  # fmt: skip
        smaller = rows


def attention_forward(
    qkv: Tensor,
    starts: Tensor,
    lengths: Tensor,
    num_heads: int,
    max_length: int,
    p: float,
    rng: Tensor,
    site: int,
) -> Tensor:
    """softmax(query key^T / sqrt(D)) value in each head of each sequence, with dropout on the probabilities.

    Replaces `F.scaled_dot_product_attention` and the copies that it needs to and from a rectangle of padding.

    Args:
        qkv: (M, 3 * H), query, key and value side by side; D at most MAX_HEAD_SIZE.
        starts: (R,) int32, the first row of each sequence.
        lengths: (R,) int32, its number of rows, 0 to `max_length`; sequences may not overlap.
        max_length: at most `max_tile` of the card; MAX_TILE on an A100 or H100.

    Returns:
        context (M, H), of qkv's type; zeros in rows of no sequence.
    """
    context = qkv.new_zeros(len(qkv), qkv.shape[1] // 3)
    tensors = (qkv, context)
    launch_attention(
        attention_forward_kernel, tensors, starts, lengths, num_heads, max_length, (p, rng, site)
    )
    return context


def attention_backward(
    qkv: Tensor,
    dcontext: Tensor,
    starts: Tensor,
    lengths: Tensor,
    num_heads: int,
    max_length: int,
    p: float,
    rng: Tensor,
    site: int,
) -> Tensor:
    """Gradient of `attention_forward` for that of its result, (M, H): (M, 3 * H), of qkv's type."""
    dqkv = torch.zeros_like(qkv)
    tensors = (qkv, dcontext, dqkv)
    launch_attention(
        attention_backward_kernel, tensors, starts, lengths, num_heads, max_length, (p, rng, site)
    )
    return dqkv


# --- dropout, residual sum and LayerNorm --------------------------------------------------------------------


@triton.jit(do_not_specialize=["site", "num_rows"])
def norm_forward_kernel(
    x, residual, weight, bias, y, normalised, rstd, eps, p, rng, site, num_rows,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, ROWS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_WIDTH)
    in_width, in_rows = columns < WIDTH, rows < num_rows
    inside = in_rows[:, None] & in_width[None, :]
    offsets = rows[:, None] * WIDTH + columns[None, :]  # (ROWS, BLOCK_WIDTH)
    total = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    if HAS_DROPOUT:
        total *= keep_factor(rng, site, p, rows, BLOCK_WIDTH)
    if residual is not None:
        total += tl.load(residual + offsets, mask=inside, other=0.0).to(tl.float32)
    # From the differences to the mean: a difference of two large sums would lose the variance.
    centred = tl.where(inside, total - (tl.sum(total, 1) / WIDTH)[:, None], 0.0)
    scale = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1) / WIDTH + eps)  # (ROWS,)
    result = centred * scale[:, None]
    tl.store(rstd + rows, scale, mask=in_rows)
    tl.store(normalised + offsets, result, mask=inside)
    scales = tl.load(weight + columns, mask=in_width, other=0.0).to(tl.float32)
    shifts = tl.load(bias + columns, mask=in_width, other=0.0).to(tl.float32)
    tl.store(y + offsets, result * scales[None, :] + shifts[None, :], mask=inside)


@triton.jit(do_not_specialize=["site", "num_rows"])
def norm_backward_kernel(
    dy, normalised, rstd, weight, dx, dresidual, p, rng, site, num_rows,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, ROWS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_WIDTH)
    in_width, in_rows = columns < WIDTH, rows < num_rows
    inside = in_rows[:, None] & in_width[None, :]
    offsets = rows[:, None] * WIDTH + columns[None, :]  # (ROWS, BLOCK_WIDTH)
    grads = tl.load(dy + offsets, mask=inside, other=0.0).to(tl.float32)
    grads *= tl.load(weight + columns, mask=in_width, other=0.0).to(tl.float32)[None, :]
    centred = tl.load(normalised + offsets, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(rstd + rows, mask=in_rows, other=0.0)
    # Shifting a row, or scaling it, changes nothing: what of the gradient points there is taken out.
    shift = tl.sum(grads, 1) / WIDTH  # (ROWS,)
    stretch = tl.sum(grads * centred, 1) / WIDTH
    result = (grads - shift[:, None] - centred * stretch[:, None]) * scale[:, None]
    if dresidual is not None:
        tl.store(dresidual + offsets, result, mask=inside)
    if HAS_DROPOUT:
        result *= keep_factor(rng, site, p, rows, BLOCK_WIDTH)
    tl.store(dx + offsets, result, mask=inside)


def norm_launch(x: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """Grid and tile for rows of x (M, H): a few short rows a program."""
    block_width = max(16, triton.next_power_of_2(x.shape[1]))
    rows = max(1, 2048 // block_width)
    return (triton.cdiv(len(x), rows),), {"WIDTH": x.shape[1], "BLOCK_WIDTH": block_width, "ROWS": rows}


def dropout_add_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    p: float,
    rng: Tensor,
    site: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm(residual + dropout(x)), what ends each half of a Transformer layer.

    Replaces dropout, addition and `F.layer_norm`; with residual None and p 0 the last alone.

    Args:
        x: (M, H).
        residual: (M, H), or None.
        weight, bias: (H,) float32, of the LayerNorm; eps: its epsilon.

    Returns:
        y and the normalised rows, both (M, H) of x's type, and rstd (M,) float32, one over their standard
        deviations: what the backward pass needs.
    """
    assert are_contiguous(x, residual, weight, bias, rng)
    y, normalised = torch.empty_like(x), torch.empty_like(x)
    rstd = x.new_empty(len(x), dtype=torch.float32)
    grid, tile = norm_launch(x)
    norm_forward_kernel[grid](
        x, residual, weight, bias, y, normalised, rstd, float(eps), float(p), rng, site, len(x),
        HAS_DROPOUT=p > 0, **tile,
    )  # fmt: skip
    return y, normalised, rstd


def dropout_add_norm_backward(
    dy: Tensor,
    normalised: Tensor,
    rstd: Tensor,
    weight: Tensor,
    p: float,
    rng: Tensor,
    site: int,
    has_residual: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `dropout_add_norm_forward` for that of y, (M, H), with respect to x and residual.

    Those of weight and bias are sums over rows: `sum_by_task(dy, ends, out, times=normalised)`, and of dy.
    """
    assert are_contiguous(dy, normalised, rstd, weight, rng)
    dx = torch.empty_like(dy)
    dresidual = torch.empty_like(dy) if has_residual else None
    grid, tile = norm_launch(dy)
    norm_backward_kernel[grid](
        dy, normalised, rstd, weight, dx, dresidual, float(p), rng, site, len(dy), HAS_DROPOUT=p > 0, **tile
    )
    return dx, dresidual


# --- sums over the rows of a task ---------------------------------------------------------------------------


@triton.jit
def partial_sums_kernel(
    x, times, ends, partial, width, NUM_SPLITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """One program for some columns of one share of a task's rows."""
    task, split = tl.program_id(1), tl.program_id(2)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    in_width = columns < width
    begin = tl.load(ends + task - 1, mask=task > 0, other=0)
    end = tl.load(ends + task)
    share = tl.cdiv(end - begin, NUM_SPLITS)
    begin = begin + split * share
    end = tl.minimum(begin + share, end)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(begin, end, ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = (rows < end)[:, None] & in_width[None, :]
        offsets = rows.to(tl.int64)[:, None] * width + columns[None, :]
        values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
        if times is not None:
            values *= tl.load(times + offsets, mask=inside, other=0.0).to(tl.float32)
        total += values
    row = (task * NUM_SPLITS + split).to(tl.int64)
    tl.store(partial + row * width + columns, tl.sum(total, 0), mask=in_width)


@triton.jit
def total_sums_kernel(
    partial, out, width, out_stride, ACCUMULATE: tl.constexpr, NUM_SPLITS: tl.constexpr, COLUMNS: tl.constexpr
):
    task = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    in_width = columns < width
    rows = task * NUM_SPLITS + tl.arange(0, NUM_SPLITS)
    offsets = rows[:, None] * width + columns[None, :]  # (NUM_SPLITS, COLUMNS)
    total = tl.sum(tl.load(partial + offsets, mask=in_width[None, :], other=0.0), 0)
    place = out + task * out_stride + columns
    if ACCUMULATE:
        total += tl.load(place, mask=in_width, other=0.0)
    tl.store(place, total, mask=in_width)


def sum_by_task(
    x: Tensor, ends: Tensor, out: Tensor, times: Tensor | None = None, accumulate: bool = False
) -> None:
    """The sum of each task's rows of x, times `times` where given: gradients of biases and of LayerNorms.

    Replaces a slice, a conversion to float32, a product and a sum for every task. Without atomic additions,
    whose order, and so whose rounding, would be another in every run.

    Args:
        x, times: (M, W).
        ends: (K,) int32, where the rows of each task end and those of the next begin; rows after the last
            are spare.
        out: (K, W) float32, overwritten, or added to with `accumulate`; its rows may lie apart.
    """
    assert are_contiguous(x, times, ends) and out.stride(1) == 1
    (num_tasks, width), columns = out.shape, 128
    partial = out.new_empty(num_tasks * NUM_SPLITS, width)
    num_blocks = triton.cdiv(width, columns)
    sizes = {"NUM_SPLITS": NUM_SPLITS, "COLUMNS": columns}
    partial_sums_kernel[num_blocks, num_tasks, NUM_SPLITS](x, times, ends, partial, width, ROWS=16, **sizes)
    total_sums_kernel[num_blocks, num_tasks](
        partial, out, width, out.stride(0), ACCUMULATE=accumulate, **sizes
    )


# --- task gradients: inner products, weighted sum and AdamW -------------------------------------------------


@triton.jit
def gram_kernel(
    grads, starts, stops, out, stride,
    ALIGNMENT: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program for each range of columns."""
    block = tl.program_id(0)
    start = tl.multiple_of(tl.load(starts + block), ALIGNMENT)
    length = tl.multiple_of((tl.load(stops + block) - start).to(tl.int32), ALIGNMENT)
    rows = tl.arange(0, BLOCK_K)
    offsets = rows.to(tl.int64) * stride + start
    left, right = offsets[:, None, None], offsets[None, :, None]
    in_left, in_right = (rows < K)[:, None, None], (rows < K)[None, :, None]
    total = tl.zeros((BLOCK_K, BLOCK_K, COLUMNS), dtype=tl.float32)
    for first in range(0, length, COLUMNS):
        columns = (first + tl.arange(0, COLUMNS))[None, None, :]
        inside = columns < length
        # The second load of an element finds it in the first-level cache.
        a = tl.load(grads + left + columns, mask=in_left & inside, other=0.0).to(tl.float32)
        b = tl.load(grads + right + columns, mask=in_right & inside, other=0.0).to(tl.float32)
        total += a * b
    place = out + block * K * K + rows[:, None] * K + rows[None, :]
    tl.store(place, tl.sum(total, 2), mask=(rows < K)[:, None] & (rows < K)[None, :])


def gram_by_block(grads: Tensor, starts: Tensor, stops: Tensor, alignment: int = 1) -> Tensor:
    """Inner products of the task gradients within each of several ranges of columns.

    Replaces `pcgrad.gram_matrix` for each layer group, and reads each element once. What is not finite in a
    range makes its products NaN or infinite.

    Args:
        grads: (K, n), K from 1 to 8, of any float type; its rows may lie apart.
        starts, stops: (b,) int64, the ranges; best of at most BLOCK_COLUMNS columns each.
        alignment: a power of two that divides all of them; from 4 on, a load takes several numbers at once.

    Returns:
        (b, K, K) float32.
    """
    num_tasks = len(grads)
    assert are_contiguous(starts, stops) and grads.stride(1) == 1 and 1 <= num_tasks <= 8
    block_k = triton.next_power_of_2(num_tasks)
    out = grads.new_empty(len(starts), num_tasks, num_tasks, dtype=torch.float32)
    gram_kernel[(len(starts),)](
        grads, starts, stops, out, grads.stride(0),
        ALIGNMENT=alignment, K=num_tasks, BLOCK_K=block_k, COLUMNS=512 // block_k,
    )  # fmt: skip
    return out


@triton.jit
def combine_adamw_kernel(
    grads, weights, param, exp_avg, exp_avg_sq, numbers, copy, grad_out, stride, size,
    K: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    if tl.load(numbers + 7) == 0:  # this step is left out
        return
    # One minus a number, in the type that it comes in: from float32, 1 - 0.999 would be off by 1e-5.
    rest1 = (1.0 - tl.load(numbers)).to(tl.float32)
    beta2 = tl.load(numbers + 1)
    rest2 = (1.0 - beta2).to(tl.float32)
    beta2 = beta2.to(tl.float32)
    step_size = tl.load(numbers + 2).to(tl.float32)
    eps = tl.load(numbers + 3).to(tl.float32)
    early_decay = tl.load(numbers + 4).to(tl.float32)
    late_decay = tl.load(numbers + 5).to(tl.float32)
    is_adaptive = tl.load(numbers + 6) != 0

    columns = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < size
    grad = tl.zeros((COLUMNS,), dtype=tl.float32)
    row = grads + columns
    for k in tl.static_range(K):
        grad += tl.load(weights + k) * tl.load(row, mask=inside, other=0.0).to(tl.float32)
        row += stride
    m = tl.load(exp_avg + columns, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq + columns, mask=inside, other=0.0)
    p = tl.load(param + columns, mask=inside, other=0.0)
    m += rest1 * (grad - m)
    v = beta2 * v + rest2 * grad * grad
    denominator = tl.where(is_adaptive, tl.sqrt_rn(v) + eps, 1.0)
    p -= p * early_decay + tl.div_rn(m, denominator) * (step_size * (1.0 - early_decay))
    p -= p * late_decay
    tl.store(exp_avg + columns, m, mask=inside)
    tl.store(exp_avg_sq + columns, v, mask=inside)
    tl.store(param + columns, p, mask=inside)
    if copy is not None:
        tl.store(copy + columns, p, mask=inside)
    if grad_out is not None:
        tl.store(grad_out + columns, grad, mask=inside)


def combine_adamw(
    grads: Tensor,
    weights: Tensor,
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    numbers: Tensor,
    copy: Tensor | None = None,
    grad_out: Tensor | None = None,
) -> None:
    """The weighted sum of the task gradients, and one AdamW update with it, in place.

    Replaces `pcgrad.weighted_sum`, both branches of `optimizer.AdamW._update`, and the conversion of the
    weights to the type that linear layers compute in. Everything is read from memory once.

    Args:
        grads: (K, n) of any float type; its rows may lie apart. K = 1 serves a head.
        weights: (K,) float32.
        param, exp_avg, exp_avg_sq: (n,) float32.
        numbers: (8,) on the device: beta1, beta2, step size, eps, early and late decay, as
            `optimizer.adamw_update` has them; 1 to divide by the second moment, 0 for momentum alone, as
            `rectify` has it at first; 1 for a step, 0 for one that is left out: nothing is written. Float64,
            or float32, which puts 1 - beta2 off by 1e-5 of itself.
        copy: (n,) gets the new parameter in its own type.
        grad_out: (n,) gets the weighted sum.
    """
    num_tasks, size = grads.shape
    assert are_contiguous(weights, param, exp_avg, exp_avg_sq, numbers, copy, grad_out)
    assert grads.stride(1) == 1
    combine_adamw_kernel[(triton.cdiv(size, BLOCK),)](
        grads, weights, param, exp_avg, exp_avg_sq, numbers, copy, grad_out, grads.stride(0), size,
        K=num_tasks, COLUMNS=BLOCK,
    )  # fmt: skip


# --- gradients of embedding tables --------------------------------------------------------------------------


@triton.jit
def piece_sums_kernel(x, order, pieces, partial, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One program for some columns of one piece: hidden rows that are added to the same table row."""
    piece = tl.program_id(0)
    begin, end = tl.load(pieces + piece), tl.load(pieces + piece + 1)
    if begin >= end:
        return
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_width = columns < width
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(begin, end, ROWS):
        places = first + tl.arange(0, ROWS)
        rows = tl.load(order + places, mask=places < end, other=0).to(tl.int64)
        inside = (places < end)[:, None] & in_width[None, :]
        offsets = rows[:, None] * width + columns[None, :]  # (ROWS, COLUMNS)
        total += tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(partial + piece.to(tl.int64) * width + columns, tl.sum(total, 0), mask=in_width)


@triton.jit
def table_sums_kernel(partial, sums, offsets, out, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One program for some columns of one table row: adds up its pieces, which lie end to end."""
    table_row = tl.program_id(0)
    begin, end = tl.load(sums + table_row), tl.load(sums + table_row + 1)
    if begin >= end:
        return
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_width = columns < width
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(begin, end, ROWS):
        pieces = first + tl.arange(0, ROWS)
        inside = (pieces < end)[:, None] & in_width[None, :]
        places = pieces.to(tl.int64)[:, None] * width + columns[None, :]  # (ROWS, COLUMNS)
        total += tl.load(partial + places, mask=inside, other=0.0)
    place = out + tl.load(offsets + table_row).to(tl.int64) + columns
    before = tl.load(place, mask=in_width, other=0.0)
    tl.store(place, before + tl.sum(total, 0), mask=in_width)


def sum_rows(x: Tensor, order: Tensor, pieces: Tensor, sums: Tensor, offsets: Tensor, out: Tensor) -> None:
    """Add rows of x to the rows of a table that they were looked up in, in a fixed order.

    Replaces `index_add_`, whose atomic additions round in another way in every run, and which lets all
    occurrences of a frequent word wait for each other.

    Args:
        x: (M, H).
        order, pieces, sums, offsets: int32, on the device, as `static.TableRows` explains them; what is left
            over of `pieces` and `sums` is empty ranges.
        out: float32, flat; row j is added to out[offsets[j] : offsets[j] + H].
    """
    assert are_contiguous(x, order, pieces, sums, offsets, out)
    width, columns = x.shape[1], 128
    partial = x.new_empty(len(pieces) - 1, width, dtype=torch.float32)
    num_blocks, tile = triton.cdiv(width, columns), {"ROWS": 8, "COLUMNS": columns}
    piece_sums_kernel[len(pieces) - 1, num_blocks](x, order, pieces, partial, width, **tile)
    table_sums_kernel[len(offsets), num_blocks](partial, sums, offsets, out, width, **tile)
