"""Layers that write one gradient per task, each straight to where it is kept.

A step sends the batches of all tasks through the encoder together, as rows laid end to end, and back again. Automatic
differentiation would sum the gradients of a weight over all rows; gradient surgery wants them apart. They are as cheap
apart as together: a weight's gradient is a matrix product over rows, and here it is one product for each task's
rows, with that task's place in `flat_memory.FlatMemory` as its output. No retained graph, no second backward pass, no
zeroing, no copies.

A layer does so if the `Packing` says which task each row belongs to; otherwise it is an ordinary layer under automatic
differentiation.

Shapes: M rows, in and out the widths of a layer, K tasks.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from kernels.packing import Packing


@dataclass
class Slot:
    """Where a parameter is read in a step, and where its gradients go.

    Args:
        weight: what the step reads: the parameter itself, or its copy in lower precision. Linear layers that share
            their input have one slot, their weights one below the other.
        grads: of each task, shaped as `weight`, maybe of another type.
        is_empty: of each task, whether its gradient has still to be written in this step.
    """

    weight: torch.Tensor
    grads: list[torch.Tensor]
    is_empty: list[bool]

    def write(self, task: int, grad: torch.Tensor) -> None:
        """Take in a task's gradient, or one more part of it."""
        if self.is_empty[task]:
            self.grads[task].copy_(grad)
        else:
            self.grads[task].add_(grad)
        self.is_empty[task] = False

    def write_product(self, task: int, a: torch.Tensor, b: torch.Tensor) -> None:
        """`write` of a matrix product, without a copy where types allow."""
        if self.is_empty[task] and self.grads[task].dtype == a.dtype:
            torch.mm(a, b, out=self.grads[task])
            self.is_empty[task] = False
        else:
            self.write(task, a @ b)


def is_direct(packing: Packing, *params: nn.Parameter) -> bool:
    return bool(packing.tasks) and torch.is_grad_enabled() and any(param.requires_grad for param in params)


class DirectLinear(torch.autograd.Function):
    """Linear layers in one slot; the parameters' gradients go to the slots, only the input's is returned."""

    @staticmethod
    def forward(ctx, x, packing, weight, bias, *params):  # params: for autograd to see that there is work
        x = x.to(weight.weight.dtype)
        ctx.save_for_backward(x)
        ctx.packing, ctx.weight, ctx.bias, ctx.num_params = packing, weight, bias, len(params)
        return torch.addmm(bias.weight.to(x.dtype), x, weight.weight.t())  # (M, in) -> (M, out)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        for task, rows in ctx.packing.tasks:
            ctx.weight.write_product(task, dy[rows].t(), x[rows])
            ctx.bias.write(task, dy[rows].sum(0))
        dx = dy @ ctx.weight.weight if ctx.needs_input_grad[0] else None
        return dx, None, None, None, *[None] * ctx.num_params


def linear(x: torch.Tensor, packing: Packing, *layers: nn.Linear) -> torch.Tensor:
    """Linear layers that share their input, side by side in one product: (M, in) -> (M, sum of out)."""
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    if is_direct(packing, *weights):
        with torch.autocast(x.device.type, enabled=False):  # the slot's weight says which type to compute in
            return DirectLinear.apply(x, packing, weights[0].slot, biases[0].slot, *weights)
    if len(layers) == 1:
        return F.linear(x, weights[0], biases[0])
    return F.linear(x, torch.cat(weights), torch.cat(biases))


class DirectLayerNorm(torch.autograd.Function):
    """LayerNorm; the same."""

    @staticmethod
    def forward(ctx, x, packing, weight, bias, eps):
        y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.packing = packing
        return y

    @staticmethod
    def backward(ctx, dy):
        x, mean, rstd, weight, bias = ctx.saved_tensors
        backward = torch.ops.aten.native_layer_norm_backward
        width = x.shape[-1:]
        # For bfloat16 input the kernel sums over rows in bfloat16, and is wrong by some percent for hundreds of them.
        wide = torch.promote_types(x.dtype, torch.float32)
        wide_dy, wide_x = dy.to(wide), x.to(wide)
        for task, rows in ctx.packing.tasks:
            saved = wide_x[rows], width, mean[rows], rstd[rows], weight, bias
            _, dweight, dbias = backward(wide_dy[rows], *saved, [False, True, True])
            weight.slot.write(task, dweight)
            bias.slot.write(task, dbias)
        dx, _, _ = backward(dy, x, width, mean, rstd, weight, bias, [True, False, False])
        return dx, None, None, None, None


def layer_norm(x: torch.Tensor, packing: Packing, layer: nn.LayerNorm) -> torch.Tensor:
    """LayerNorm over the last dimension: (M, H) -> (M, H)."""
    if is_direct(packing, layer.weight):
        if x.device.type != "cpu":  # only the CPU's kernel takes bfloat16 input with float32 weights
            x = x.to(layer.weight.dtype)
        return DirectLayerNorm.apply(x, packing, layer.weight, layer.bias, layer.eps)
    return layer(x)


class DirectEmbedding(torch.autograd.Function):
    """Table look-up; the gradient is added to the rows of the words that were looked up."""

    @staticmethod
    def forward(ctx, weight, ids, packing):
        ctx.save_for_backward(ids)
        ctx.packing, ctx.slot = packing, weight.slot
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx, dy):
        (ids,) = ctx.saved_tensors
        for task, rows in ctx.packing.tasks:
            ctx.slot.grads[task].index_add_(0, ids[rows], dy[rows])  # the memory has zeroed these rows
        return None, None, None


def embedding(ids: torch.Tensor, packing: Packing, layer: nn.Embedding) -> torch.Tensor:
    """Rows of a table: (M,) integers -> (M, H)."""
    if is_direct(packing, layer.weight):
        return DirectEmbedding.apply(layer.weight, ids, packing)
    return layer(ids)
