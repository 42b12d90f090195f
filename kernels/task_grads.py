"""Layers that write one gradient per task, each straight to where it is kept.

A step sends the batches of all tasks through the encoder together, as tokens laid end to end, and back again.
Automatic differentiation would sum the gradients of a weight over all tokens; gradient surgery wants them
apart. They are as cheap apart as together: a weight's gradient is a matrix product over tokens, and here it
is one product over the tokens of each task, with that task's place in `flat_memory.FlatMemory` as its output.
No retained graph, no second backward pass; the gradients of weights are neither zeroed nor copied: a step
with PCGrad takes 1.00 times as long as one with summed gradients, where the textbook way, a backward pass per
task, takes 2.9 times as long (Hugging Face's model, results/speed.md).

A layer does so if the `Packing` says which task each token belongs to; otherwise it is an ordinary layer
under automatic differentiation.

Shapes: M tokens, m of them of one task, `in` and `out` the widths of a layer, H hidden_size, V words.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from kernels.cpu import dropout
from kernels.packing import Packing

PLAIN_LAYERS = (nn.Linear, nn.LayerNorm, nn.Embedding)


@dataclass
class GradTarget:
    """A parameter's place in flat memory (not a label): what a step reads, and where its gradients go.

    Args:
        weight: what the step reads: the parameter itself (a bias, too), or its copy in lower precision.
            Linear layers that share their input have one target, their weights one below the other.
        grads: of each task, shaped as `weight`, possibly of another type.
        all_grads: the same as one tensor, (K, ...).
        is_empty: of each task, whether its gradient has still to be written in this step.
    """

    weight: torch.Tensor
    grads: list[torch.Tensor]
    all_grads: torch.Tensor
    is_empty: list[bool]

    def write(self, task: int, grad: torch.Tensor) -> None:
        """Store a task's gradient, or one more summand of it."""
        # The first one overwrites what the last step left, so that no step has to zero the gradients of all
        # tasks.
        if self.is_empty[task]:
            self.grads[task].copy_(grad)
        else:
            self.grads[task].add_(grad)
        self.is_empty[task] = False

    def write_all(self, grads: torch.Tensor) -> None:
        """`write` for all tasks at once, (K, ...)."""
        if self.is_empty[0]:
            self.all_grads.copy_(grads)
        else:
            self.all_grads.add_(grads)
        self.is_empty = [False] * len(self.is_empty)

    def write_product(self, task: int, a: torch.Tensor, b: torch.Tensor) -> None:
        """`write` of the matrix product a @ b, without a copy where types allow."""
        if self.is_empty[task] and self.grads[task].dtype == a.dtype:
            torch.mm(a, b, out=self.grads[task])  # straight to its place
            self.is_empty[task] = False
        else:
            self.write(task, a @ b)


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is nothing but its weight and bias, so that they can be read instead of calling it.

    Adapters, parametrizations and pruning make it another class, or hook into its call.
    """
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    is_called_as_it_is = not any(hooks) and "forward" not in vars(layer)
    return type(layer) in PLAIN_LAYERS and is_called_as_it_is and getattr(layer, "bias", 0) is not None


def is_by_task(packing: Packing, *layers: nn.Module) -> bool:
    """Whether gradients are to be kept by task, and one of these layers has any.

    Raises:
        ValueError: if one of them is not plain then.
    """
    if not packing.tasks or not torch.is_grad_enabled():
        return False
    if not any(param.requires_grad for layer in layers for param in layer.parameters()):
        return False
    for layer in layers:
        if not is_plain(layer):
            raise ValueError(not_plain(type(layer).__name__))
    return True


def not_plain(what: str) -> str:
    """Why a layer is refused."""
    return (
        f"{what}: its gradients cannot be kept by task; expected nn.Linear, nn.LayerNorm or nn.Embedding"
        " itself, with a bias and without hooks (adapters train without FlatMemory)"
    )


class TaskLinear(torch.autograd.Function):
    """Linear layers with one target; the parameters' gradients go there, only the input's is returned."""

    @staticmethod
    def forward(ctx, x, packing, weight: GradTarget, bias: GradTarget, *params):
        # `params` are not used: autograd runs `backward` only if one of the arguments needs a gradient, and
        # the input of the first layer may need none.
        x = x.to(weight.weight.dtype)  # (M, in)
        ctx.save_for_backward(x)
        ctx.packing, ctx.weight, ctx.bias, ctx.num_params = packing, weight, bias, len(params)
        return torch.addmm(bias.weight.to(x.dtype), x, weight.weight.t())  # (M, in) -> (M, out)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        ctx.packing.write_products(ctx.weight, dy, x)
        ctx.packing.write_sums(ctx.bias, dy)
        dx = dy @ ctx.weight.weight if ctx.needs_input_grad[0] else None  # (M, out) -> (M, in)
        return dx, None, None, None, *[None] * ctx.num_params


def linear(x: torch.Tensor, packing: Packing, *layers: nn.Linear) -> torch.Tensor:
    """Linear layers that share their input, side by side in one product: (M, in) -> (M, sum of out).

    Without tasks, layers that are not plain are called.
    """
    by_task = is_by_task(packing, *layers)
    if not all(map(is_plain, layers)):
        return torch.cat([layer(x) for layer in layers], dim=-1)
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    if by_task:
        # The target's weight says which type to compute in: autocast would convert it again for every
        # product.
        with torch.autocast(x.device.type, enabled=False):
            return TaskLinear.apply(
                x, packing, packing.target(weights[0]), packing.target(biases[0]), *weights
            )
    if len(layers) == 1:
        return F.linear(x, weights[0], biases[0])
    return F.linear(x, torch.cat(weights), torch.cat(biases))


class TaskLayerNorm(torch.autograd.Function):
    """LayerNorm whose scale and offset have a target each; only the input's gradient is returned."""

    @staticmethod
    def forward(ctx, x, packing, layer: nn.LayerNorm, weight, bias):  # the last two: see TaskLinear
        y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, layer.eps)  # (M, H)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.packing = packing
        ctx.weight, ctx.bias = packing.target(layer.weight), packing.target(layer.bias)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, mean, rstd, weight, bias = ctx.saved_tensors
        backward = torch.ops.aten.native_layer_norm_backward
        width = x.shape[-1:]
        # For bfloat16 input torch's kernel sums over tokens in bfloat16, and is 1 to 2 % off for some hundred
        # of them.
        wide = torch.promote_types(x.dtype, torch.float32)
        wide_dy, wide_x = dy.to(wide), x.to(wide)
        for task, tokens in ctx.packing.tasks:
            saved = wide_x[tokens], width, mean[tokens], rstd[tokens], weight, bias
            _, dweight, dbias = backward(wide_dy[tokens], *saved, [False, True, True])  # (H,) each
            ctx.weight.write(task, dweight)
            ctx.bias.write(task, dbias)
        # The input's gradient is of each token alone: all tasks at once.
        dx, _, _ = backward(dy, x, width, mean, rstd, weight, bias, [True, False, False])  # (M, H)
        return dx, None, None, None, None


def layer_norm(x: torch.Tensor, packing: Packing, layer: nn.LayerNorm) -> torch.Tensor:
    """LayerNorm over the last dimension: (M, H) -> (M, H)."""
    if packing.is_static:
        return packing.dropout_add_norm(x, None, layer, 0.0)
    if is_by_task(packing, layer):
        if x.device.type != "cpu":  # only the CPU's kernel takes bfloat16 input with float32 weights
            x = x.to(layer.weight.dtype)
        return TaskLayerNorm.apply(x, packing, layer, layer.weight, layer.bias)
    return layer(x)


def dropout_add_norm(
    x: torch.Tensor, residual: torch.Tensor, packing: Packing, layer: nn.LayerNorm, p: float
) -> torch.Tensor:
    """LayerNorm(residual + dropout(x)), (M, H) -> (M, H); with p 0 nothing is dropped."""
    if packing.is_static:
        return packing.dropout_add_norm(x, residual, layer, p)
    return layer_norm(dropout(x, p, p > 0, residual), packing, layer)


class TaskEmbedding(torch.autograd.Function):
    """Table look-up; the gradient is added to the rows of the words that were looked up."""

    @staticmethod
    def forward(ctx, weight, ids, packing, target: GradTarget):
        ctx.save_for_backward(ids)
        ctx.packing, ctx.target = packing, target
        return F.embedding(ids, weight)  # (M,) -> (M, H)

    @staticmethod
    def backward(ctx, dy):
        (ids,) = ctx.saved_tensors
        ctx.packing.write_rows(ctx.target, ids, dy)
        return None, None, None, None


def embedding(ids: torch.Tensor, packing: Packing, layer: nn.Embedding) -> torch.Tensor:
    """Rows of a table: (M,) integers -> (M, H)."""
    if is_by_task(packing, layer):
        return TaskEmbedding.apply(layer.weight, ids, packing, packing.target(layer.weight))
    return layer(ids)
