"""Dropout and attention for the CPU, where torch's own take longer than the matrix products around them.

`dropout` and `compute_dtype` work on any device; elsewhere than on the CPU, dropout is torch's.

Shapes: B sentences, T padded length, M tokens, H hidden_size, N attention heads, D = H // N; see
kernels/packing.py.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from kernels import static_packing
from kernels.packing import Packing, Padding

# Attention scores that are held at once. A batch with more is worked on in pieces of whole sentences, and its
# scores are made again in the backward pass: those of 64 pairs of 256 word pieces, with what goes with them,
# would take 600 MB in every layer of MiniLM.
MAX_SCORES = 2**22


def draw_seed() -> int:
    """A seed from torch's global generator, so that `torch.manual_seed` fixes all dropout of a step."""
    return int(torch.empty((), dtype=torch.int64).random_())


def keep_mask(
    shape: torch.Size, p: float, dtype: torch.dtype, seed: int | None = None
) -> tuple[torch.Tensor, float]:
    """On the CPU: zeros with probability `p`, else ones; and what to multiply the kept elements by.

    Torch draws one number at a time: 1.9 ms for 800 x 384 elements, where this takes 0.5 ms. Each 64-bit draw
    of numpy's SFC64 decides four elements, so `p` is rounded to a multiple of 2**-16. Without a `seed`, it
    draws one.
    """
    num_elements = math.prod(shape)
    generator = np.random.SFC64(draw_seed() if seed is None else seed)
    draws = generator.random_raw((num_elements + 3) // 4)
    lanes = torch.from_numpy(draws.view(np.int16))[:num_elements].view(shape)  # uniform, -2**15 .. 2**15 - 1
    dropped = min(round(p * 2**16), 2**16 - 1)  # p < 1: something is always kept
    # `out` converts in the same pass: no bool tensor in between.
    keep = torch.ge(lanes, dropped - 2**15, out=torch.empty(shape, dtype=dtype))
    return keep, 2**16 / (2**16 - dropped)


def dropout(x: torch.Tensor, p: float, training: bool, residual: torch.Tensor | None = None) -> torch.Tensor:
    """Zero each element with probability `p`, scale the rest by 1 / (1 - p), and add `residual`, if any."""
    if not training or p == 0:
        return x if residual is None else residual + x
    if static_packing.current is not None:
        return static_packing.current.dropout(x, p)
    if x.device.type != "cpu":
        return F.dropout(x, p) if residual is None else residual + F.dropout(x, p)
    keep, scale = keep_mask(x.shape, p, x.dtype)
    return x * keep.mul_(scale) if residual is None else torch.addcmul(residual, x, keep, value=scale)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """What matrix products on this device run in: autocast's type, or the tensor's own."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def attention_weights(
    query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None, p: float, seed: int | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """How much each position attends to each, before and after dropout with probability `p`.

    Args:
        query, key: (B * N, T, D).
        bias: (B, 1, 1, T) added to the scores; None for nothing.
        seed: of dropout; None if `p` is 0.

    Returns:
        (B * N, T, T) each: the softmax; what dropout multiplies it by, None for nothing; and their product,
        in the type of `query`.
    """
    wide = torch.promote_types(query.dtype, torch.float32)  # softmax in float32, or float64 in tests
    scores = torch.bmm(query, key.transpose(1, 2)).to(wide)  # (B * N, T, T)
    scores.mul_(query.shape[-1] ** -0.5)
    if bias is not None:
        scores.unflatten(0, (len(bias), -1)).add_(bias)
    probs, keep = scores.softmax(-1), None
    if p:
        keep, keep_scale = keep_mask(probs.shape, p, wide, seed)
        keep.mul_(keep_scale)
    return probs, keep, (probs if keep is None else probs * keep).to(query.dtype)


def key_bias(padding: Padding, sentences: slice) -> torch.Tensor | None:
    """(B, 1, 1, T) what `padding` adds to the scores of some sentences; None for nothing."""
    return None if padding.key_mask is None else padding.key_bias[sentences]


def sentence_pieces(heads: torch.Tensor) -> list[slice]:
    """Cut the sentences of (3, B, N, T, D) into pieces of at most MAX_SCORES scores, or of one sentence."""
    _, num_sentences, num_heads, width, _ = heads.shape
    size = max(1, MAX_SCORES // (num_heads * width**2))
    return [slice(start, start + size) for start in range(0, num_sentences, size)]


class CpuAttention(torch.autograd.Function):
    """Attention on a CPU: few operations on contiguous tensors, the softmax in float32.

    Torch's fused kernel with dropout takes 2.5 to 3 times as long to train with (bfloat16, 32 to 512
    positions, two cores). Automatic differentiation of the same lines copies more.

    Takes query, key and value side by side, (M, 3 * H), with the `Padding` of each batch in `packing`; gives
    the context, (M, H).
    """

    @staticmethod
    def forward(
        ctx,
        qkv: torch.Tensor,
        packing: Packing,
        paddings: Sequence[Padding],
        num_heads: int,
        dropout_prob: float,
    ) -> torch.Tensor:
        ctx.packing, ctx.paddings = packing, paddings
        ctx.num_heads, ctx.dropout_prob = num_heads, dropout_prob
        context = qkv.new_empty(len(qkv), qkv.shape[1] // 3)  # (M, H)
        needs_grad, saved, ctx.seeds = ctx.needs_input_grad[0], [], []
        for tokens, padding in zip(packing.batches, paddings, strict=True):
            # `spread` leaves something finite at padding: as a key it is masked, as a query removed below.
            heads = padding.spread(qkv[tokens]).unflatten(-1, (3, num_heads, -1))  # (B, T, 3, N, D)
            # One copy here, so that all products, in the backward pass too, are of contiguous tensors.
            heads = heads.permute(2, 0, 3, 1, 4).contiguous()  # (3, B, N, T, D)
            attended, pieces = torch.empty_like(heads[0]), sentence_pieces(heads)
            if needs_grad:
                saved.append(heads)
            ctx.seeds.append([draw_seed() if dropout_prob else None for _ in pieces])
            for piece, seed in zip(pieces, ctx.seeds[-1], strict=True):
                query, key, value = heads[:, piece].flatten(1, 2)  # (B * N, T, D) each, B of the piece
                weights = attention_weights(query, key, key_bias(padding, piece), dropout_prob, seed)
                torch.bmm(weights[-1], value, out=attended[piece].flatten(0, 1))
                if needs_grad and len(pieces) == 1:
                    saved += weights
            context[tokens] = padding.remove(attended.transpose(1, 2).flatten(2))
        ctx.save_for_backward(*saved)
        return context

    @staticmethod
    def backward(ctx, dcontext):
        saved, num_heads = iter(ctx.saved_tensors), ctx.num_heads
        dqkv = dcontext.new_empty(len(dcontext), 3 * dcontext.shape[1])  # (M, 3 * H)
        for tokens, padding, seeds in zip(ctx.packing.batches, ctx.paddings, ctx.seeds, strict=True):
            heads = next(saved)
            # `restore`, for zeros at padding: what it got in `forward` must not reach the gradients of keys
            # and values.
            dattended = padding.restore(dcontext[tokens]).unflatten(-1, (num_heads, -1))  # (B, T, N, D)
            dattended, dheads = dattended.transpose(1, 2), torch.empty_like(heads)
            for piece, seed in zip(sentence_pieces(heads), seeds, strict=True):
                query, key, value = heads[:, piece].flatten(1, 2)  # (B * N, T, D) each, B of the piece
                if len(seeds) == 1:
                    probs, keep, kept = next(saved), next(saved), next(saved)
                else:
                    bias = key_bias(padding, piece)
                    probs, keep, kept = attention_weights(query, key, bias, ctx.dropout_prob, seed)
                dquery, dkey, dvalue = dheads[:, piece].flatten(1, 2)
                dweighted = dattended[piece].flatten(0, 1)  # (B * N, T, D)
                torch.bmm(kept.transpose(1, 2), dweighted, out=dvalue)
                dprobs = torch.bmm(dweighted, value.transpose(1, 2)).to(probs.dtype)  # (B * N, T, T)
                if keep is not None:
                    dprobs.mul_(keep)
                dscores = torch._softmax_backward_data(dprobs, probs, -1, probs.dtype)
                dscores = dscores.mul_(query.shape[-1] ** -0.5).to(heads.dtype)
                torch.bmm(dscores, key, out=dquery)
                torch.bmm(dscores.transpose(1, 2), query, out=dkey)
            dheads = dheads.permute(1, 3, 0, 2, 4)  # (B, T, 3, N, D)
            dqkv[tokens] = padding.remove(dheads.flatten(2))
        return dqkv, None, None, None, None
