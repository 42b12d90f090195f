"""Twins of kernels/triton_kernels.py in plain operations, to test steps of static shape without Triton."""

import torch

BLOCK_COLUMNS = 1000
MAX_TILE = 128


def keep_scale(shape, p, rng, site):
    """What dropout multiplies by: 0 or 1 / (1 - p), a function of the seed and the call's number alone."""
    seed, is_on = rng.tolist()
    if not p or not is_on:
        return torch.ones(shape)
    generator = torch.Generator().manual_seed(seed // 2 + 7919 * site)
    return (torch.rand(shape, generator=generator) >= p) / (1 - p)


def attention(qkv, starts, lengths, num_heads, p, rng, site):
    context = torch.zeros(len(qkv), qkv.shape[1] // 3, dtype=qkv.dtype)
    scale = keep_scale((len(starts), num_heads, MAX_TILE, MAX_TILE), p, rng, site)
    for r, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        heads = qkv[start : start + length].unflatten(-1, (3, num_heads, -1))
        query, key, value = heads.permute(1, 2, 0, 3)  # (N, t, D) each
        probs = (query.float() @ key.float().transpose(1, 2) * query.shape[-1] ** -0.5).softmax(-1)
        attended = (probs * scale[r, :, :length, :length]) @ value.float()
        context[start : start + length] = attended.transpose(0, 1).flatten(1).to(qkv.dtype)
    return context


def attention_forward(qkv, starts, lengths, num_heads, max_length, p, rng, site):
    assert lengths.max() <= max_length <= MAX_TILE
    return attention(qkv, starts, lengths, num_heads, p, rng, site)


def attention_backward(qkv, dcontext, starts, lengths, num_heads, max_length, p, rng, site):
    with torch.enable_grad():
        qkv = qkv.detach().requires_grad_()
        return torch.autograd.grad(attention(qkv, starts, lengths, num_heads, p, rng, site), qkv, dcontext)[0]


def dropout_add_norm_forward(x, residual, weight, bias, eps, p, rng, site):
    z = x.float() * keep_scale(x.shape, p, rng, site)
    z = z if residual is None else z + residual.float()
    rstd = (z.var(-1, unbiased=False) + eps).rsqrt()
    normalised = (z - z.mean(-1, keepdim=True)) * rstd.unsqueeze(-1)
    return (normalised * weight + bias).to(x.dtype), normalised.to(x.dtype), rstd


def dropout_add_norm_backward(dy, normalised, rstd, weight, p, rng, site, has_residual):
    g, n = dy.float() * weight, normalised.float()
    dz = rstd.unsqueeze(-1) * (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True))
    dx = (dz * keep_scale(dy.shape, p, rng, site)).to(dy.dtype)
    return dx, dz.to(dy.dtype) if has_residual else None


def dropout_forward(x, p, rng, site):
    return x * keep_scale(x.shape, p, rng, site).to(x.dtype)


dropout_backward = dropout_forward


def sum_by_task(x, ends, out, times=None, accumulate=False):
    products = x.float() if times is None else x.float() * times.float()
    start = 0
    for task, end in enumerate(ends.tolist()):
        out[task] = products[start:end].sum(0) + (out[task] if accumulate else 0)
        start = end


def sum_rows(x, order, pieces, sums, offsets, out):
    """Add rows of x (M, H) to those of a table that start at `offsets` of the flat `out`."""
    for first, last, offset in zip(sums.tolist(), sums.tolist()[1:], offsets.tolist(), strict=False):
        if first < last:
            rows = order[pieces[first] : pieces[last]].long()
            out[offset : offset + x.shape[1]] += x[rows].sum(0)


def gram_by_block(grads, starts, stops):
    blocks = [
        grads[:, start:stop].float() for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)
    ]
    assert all(block.shape[1] <= BLOCK_COLUMNS for block in blocks)
    return torch.stack([block @ block.T for block in blocks])


def combine_adamw(grads, weights, param, exp_avg, exp_avg_sq, numbers):
    beta1, beta2, step_size, eps, early, late, is_adaptive, is_applied = numbers.tolist()
    if not is_applied:
        return
    g = weights @ grads.float()
    exp_avg.lerp_(g, 1 - beta1)
    exp_avg_sq.mul_(beta2).add_((1 - beta2) * g * g)
    direction = exp_avg / (exp_avg_sq.sqrt() + eps) if is_adaptive else exp_avg
    param.sub_(early * param + step_size * (1 - early) * direction)
    param.sub_(late * param)
