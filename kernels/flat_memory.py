"""The flat memory that parameters and per-task gradients live in.

Shapes: K tasks, P parameters shared by all tasks, D of them in weights of linear layers, V words, H hidden_size, U words
that occur in a step.
"""

import re
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from kernels.fused import PLAIN, Passes
from kernels.task_grads import Slot
from optimizer import has_weight_decay
from pcgrad import gram_matrix


def part_name(name: str) -> str:
    """The part of the encoder that a parameter is in: `embeddings`, `layer.0`, `layer.1`, ..., `pooler`."""
    layer = re.match(r"encoder\.(layer\.\d+)\.", name)
    return layer[1] if layer else name.partition(".")[0]


class FlatMemory:
    """The trainable parameters of a multitask model in one buffer, and a gradient row for each task.

    Layout of `data` and `grad`: the shared encoder first (P elements), then each task's head; within each,
    first what decays, then what does not. Every model `Parameter` becomes a view of `data`, and the optimizer
    sees a few long tensors, the `param_groups`.

    In the one backward pass of a step, the encoder's layers write each task's gradient to a row of its own (see
    `direct_grads`); autograd adds those of the heads, which have one task each, to `grad`. The rows stand in two
    tensors: `matrix_grads` (K, D) for the weights of linear layers, `other_grads` (K, P - D) for the rest. Of
    the word embeddings, only the rows of words that occur in a step are zeroed, read and combined.

    Args:
        encoder: a `bert.BertModel`, or a module with its methods `word_embeddings` and `linear_groups`.
        heads: task -> that task's head.
        dtype: what linear layers compute in; other than float32, they read a copy of their weights.
        grad_dtype: of `matrix_grads`; a sum of several batches' gradients is better off in float32.
        passes: how to go over the long tensors.

    Raises:
        ValueError: if a parameter is both shared and a head's, nothing is trainable, or the encoder has a trainable
            parameter in a layer that `direct_grads` does not know.
    """

    def __init__(
        self,
        encoder: nn.Module,
        heads: dict[str, nn.Module],
        *,
        dtype: torch.dtype = torch.float32,
        grad_dtype: torch.dtype = torch.float32,
        passes: Passes = PLAIN,
    ):
        self.tasks, self.passes = tuple(heads), passes
        groups = [
            group
            for group in encoder.linear_groups()
            if any(param.requires_grad for layer in group for param in layer.parameters())
        ]
        self._place(encoder, heads, [layer.weight for group in groups for layer in group])
        device, num_tasks = self.data.device, len(heads)
        num_matrix = self.matrices.stop - self.matrices.start
        self.weight_copy = None if dtype == torch.float32 else self.data[self.matrices].to(dtype)  # (D,)
        self.matrix_grads = torch.zeros(num_tasks, num_matrix, device=device, dtype=grad_dtype)
        self.other_grads = torch.zeros(num_tasks, self.num_shared - num_matrix, device=device)
        self.word_grads = None  # (K, V, H), a view of `other_grads`
        if self.words.stop:
            shape = encoder.word_embeddings().shape
            self.word_grads = self.other_grads[:, self.words].unflatten(1, shape)
            self.touched = torch.arange(shape[0], device=device)  # (U,) rows that may not be zero
            self.combined = self.touched  # the same of the combined gradient

        self.slots: list[Slot] = []  # written to in each step
        self.tables: list[Slot] = []  # added to in each step: embeddings, other than of words
        for group in groups:
            self.slots += [self._make_slot(*(layer.weight for layer in group))]
            self.slots += [self._make_slot(*(layer.bias for layer in group))]
        for module in encoder.modules():
            if isinstance(module, nn.LayerNorm) and any(p.requires_grad for p in module.parameters()):
                self.slots += [self._make_slot(module.weight), self._make_slot(module.bias)]
            elif isinstance(module, nn.Embedding) and module.weight.requires_grad:
                slot = self._make_slot(module.weight)
                self.tables += [slot] if module.weight is not encoder.word_embeddings() else []
        num_known = self.words.stop + sum(slot.weight.numel() for slot in self.slots + self.tables)
        if num_known != self.num_shared:
            raise ValueError(
                f"{self.num_shared - num_known} trainable parameters of the encoder are in layers whose gradients"
                " cannot be kept by task; see direct_grads.py"
            )

    def _place(self, encoder: nn.Module, heads: dict[str, nn.Module], matrices: list[nn.Parameter]) -> None:
        """Give every trainable parameter its range of the buffers."""
        # Word embeddings first and linear layers last among what decays: each is one range.
        rank = {id(encoder.word_embeddings()): -1} | {id(weight): 1 for weight in matrices}
        self.slices: dict[tuple[str, bool], slice] = {}  # (owner, decays) -> where in the buffers
        self.views: list[tuple[str, nn.Parameter, int]] = []  # (owner, parameter, offset)
        self.parts: dict[str, list[slice]] = {}  # part of the encoder -> its ranges of the buffers
        self.ranges: dict[int, slice] = {}  # id of a parameter -> its range of the buffers
        names: list[str] = []  # of the encoder's parameters, as they stand in `views`
        offset = 0
        for owner, module in [("shared", encoder), *heads.items()]:
            params = [(name, param) for name, param in module.named_parameters() if param.requires_grad]
            for decays in (True, False):
                start = offset
                for name, param in sorted(params, key=lambda item: rank.get(id(item[1]), 0)):
                    if has_weight_decay(param) == decays:
                        if id(param) in self.ranges:
                            raise ValueError(
                                "a parameter belongs to two owners (shared encoder, task heads); they must be disjoint"
                            )
                        self.views.append((owner, param, offset))
                        self.ranges[id(param)] = slice(offset, offset + param.numel())
                        names += [name] * (owner == "shared")
                        offset += param.numel()
                self.slices[owner, decays] = slice(start, offset)
        if not self.views:
            raise ValueError("nothing to train: every parameter is frozen")
        self.num_shared = self.slices["shared", False].stop
        self.data = torch.empty(offset, device=self.views[0][1].device)
        self.grad = torch.zeros_like(self.data)
        for owner, param, _ in self.views:
            where = self.ranges[id(param)]
            view = self.data[where].view_as(param)
            view.copy_(param.detach())
            param.data = view
            if owner != "shared":
                param.grad = self.grad[where].view_as(param)
        self.flat_params = {
            key: nn.Parameter(self.data[where])
            for key, where in self.slices.items()
            if where.start < where.stop
        }
        stop = self.slices["shared", True].stop
        self.matrices = slice(self.ranges[id(matrices[0])].start if matrices else stop, stop)
        self.words = self.ranges.get(id(encoder.word_embeddings()), slice(0, 0))
        for name, (_, param, _) in zip(names, self.views, strict=False):
            self._add_to_part(part_name(name), self.ranges[id(param)])

    def _add_to_part(self, part: str, where: slice) -> None:
        ranges = self.parts.setdefault(part, [])
        borders = (self.words.stop, self.matrices.start, self.matrices.stop)
        if ranges and ranges[-1].stop == where.start and where.start not in borders:
            where = slice(ranges.pop().start, where.stop)  # side by side: one range
        ranges.append(where)

    def _make_slot(self, *params: nn.Parameter) -> Slot:
        """One slot for parameters that lie end to end; the first one carries it."""
        if not all(id(param) in self.ranges for param in params):
            raise ValueError(
                "the encoder is partly frozen: the weight and bias of a layer, and query, key and value, can only be"
                " trained or frozen together"
            )
        where = slice(self.ranges[id(params[0])].start, self.ranges[id(params[-1])].stop)
        shape = (-1, *params[0].shape[1:])
        weight, start = self.data, where.start
        if self.weight_copy is not None and self.matrices.start <= where.start < self.matrices.stop:
            weight, start = self.weight_copy, where.start - self.matrices.start
        weight = weight[start : start + where.stop - where.start].view(shape)
        grads = self._stored(where).unflatten(1, weight.shape)
        params[0].slot = Slot(weight, list(grads), [True] * len(self.tasks))
        return params[0].slot

    def _stored(self, where: slice) -> torch.Tensor:
        """(K, n) where the task gradients of a range of the buffers stand; the range crosses no border."""
        if self.matrices.start <= where.start < self.matrices.stop:
            return self.matrix_grads[:, where.start - self.matrices.start : where.stop - self.matrices.start]
        skipped = self.matrix_grads.shape[1] if where.start >= self.matrices.stop else 0
        return self.other_grads[:, where.start - skipped : where.stop - skipped]

    def param_groups(self, lr: float, head_lr: float, weight_decay: float) -> list[dict]:
        """Groups for AdamW, one flat parameter each."""
        groups = []
        for (owner, decays), param in self.flat_params.items():
            group_lr = lr if owner == "shared" else head_lr
            group = {"params": [param], "lr": group_lr, "initial_lr": group_lr}
            groups.append(group | {"weight_decay": weight_decay if decays else 0.0})
        return groups

    def start_step(self, input_ids: Sequence[torch.Tensor] | None = None) -> None:
        """Forget the gradients of the last step, and copy the weights as they are now.

        Args:
            input_ids: all words that the step will look up, in tensors of any shape; None means any word.
        """
        if self.word_grads is not None:
            for grad in self.word_grads:  # (V, H); all tasks at once would copy the whole table
                grad.index_fill_(0, self.touched, 0.0)
            if input_ids is None:
                self.touched = torch.arange(self.word_grads.shape[1], device=self.grad.device)
            else:
                self.touched = torch.cat([ids.flatten() for ids in input_ids]).unique()
        for slot in self.tables:
            for grad in slot.grads:
                grad.zero_()
        for slot in self.slots:
            slot.is_empty = [True] * len(self.tasks)
        self.grad[self.num_shared :].zero_()
        if self.weight_copy is not None:
            self.weight_copy.copy_(self.data[self.matrices])

    def finish_grads(self) -> None:
        """After the step's last backward pass: what none of them wrote is zero."""
        for slot in self.slots:
            for task, is_empty in enumerate(slot.is_empty):
                if is_empty:
                    slot.grads[task].zero_()

    def show_grads(self, tasks: set[str]) -> None:
        """Show the optimizer the gradients of the encoder and of these tasks' heads; other heads are left alone."""
        for (owner, decays), param in self.flat_params.items():
            param.grad = (
                self.grad[self.slices[owner, decays]] if owner == "shared" or owner in tasks else None
            )

    def head_grad(self, task: str) -> torch.Tensor:
        """The flat gradient of one task's head, a view of `grad`."""
        return self.grad[self.slices[task, True].start : self.slices[task, False].stop]

    def rows(self, where: slice) -> torch.Tensor:
        """(K, n) the task gradients of a range of the buffers; of word embeddings those of the step's words only."""
        if self.word_grads is not None and where == self.words:
            return torch.stack([grad[self.touched].flatten() for grad in self.word_grads])  # (K, U * H)
        return self._stored(where)

    def part_grams(self) -> torch.Tensor:
        """Inner products of the task gradients within each part of the encoder, (number of parts, K, K).

        Their sum is the whole gram matrix; no part, as with a frozen encoder, gives (0, K, K).
        """

        def gram(where):
            # The words of a step are another number each time: nothing to compile for.
            return (gram_matrix if where == self.words else self.passes.gram_matrix)(self.rows(where))

        grams = [sum(gram(where) for where in ranges) for ranges in self.parts.values()]
        return torch.stack(grams) if grams else self.grad.new_zeros(0, len(self.tasks), len(self.tasks))

    def combine(self, weights: torch.Tensor) -> None:
        """Write the weighted sum of the task gradients, weights (K,), to the shared part of `grad`."""
        if self.word_grads is not None:
            _, num_words, width = self.word_grads.shape
            combined = self.grad[self.words].view(num_words, width)
            combined.index_fill_(0, self.combined, 0.0)
            combined[self.touched] = (weights @ self.rows(self.words)).view(-1, width)
            self.combined = self.touched
        borders = (self.words.stop, self.matrices.start, self.matrices.stop, self.num_shared)
        for where in (slice(start, stop) for start, stop in pairwise(borders) if start < stop):
            self.passes.weighted_sum(self._stored(where), weights, self.grad[where])
