"""The flat memory that parameters and per-task gradients live in.

One buffer holds every trainable parameter, so that the optimizer and gradient surgery go over a few long
tensors, not over some hundred short ones. `layout.Layout` says what stands where, with a picture;
`FlatMemory` allocates the buffers, makes every parameter a view of its place, and does a step's work on them.

Shapes: K tasks, P parameters shared by all tasks, D of them in weights of linear layers, V words, H
hidden_size, U words that occur in a step.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import nn

from kernels.fused import PLAIN, Kernels
from kernels.layout import MATRIX, OTHER, SHARED, WORDS, ParamRow, make_layout
from kernels.task_grads import GradTarget, is_plain, not_plain
from optimizer import has_weight_decay
from pcgrad import gram_matrix


class FlatMemory:
    """The trainable parameters of a multitask model in one buffer, and a gradient row for each task.

    In the one backward pass of a step, the encoder's layers write each task's gradient to a row of its own
    (see `task_grads`); autograd adds the gradients of the heads, which have one task each, to `grad`. Then
    come the inner products of the rows (`group_grams`), and their weighted sum (`combine`).

    Every model `Parameter` becomes a view of `data`. Do not move or copy the model afterwards (`.to`,
    `deepcopy`): its parameters would leave the buffer that the optimizer updates.

    Args:
        encoder: a `bert.BertModel`, or a module with its methods `word_embeddings` and `linear_groups`.
        heads: task -> that task's head.
        dtype: what linear layers compute in; if not float32, they read a copy of their weights.
        grad_dtype: of `matrix_grads`; a sum of several micro-batches' gradients is better off in float32.
        kernels: how to go over the long tensors.

    Raises:
        ValueError: if a parameter is both shared and a head's, nothing is trainable, or the encoder has a
            trainable parameter in a layer that `task_grads` does not know.
    """

    def __init__(
        self,
        encoder: nn.Module,
        heads: dict[str, nn.Module],
        *,
        dtype: torch.dtype = torch.float32,
        grad_dtype: torch.dtype = torch.float32,
        kernels: Kernels = PLAIN,
    ):
        self.tasks, self.kernels = tuple(heads), kernels
        word_embeddings = encoder.word_embeddings()
        linear_groups = [group for group in encoder.linear_groups() if is_trainable(*group)]
        check_layers(encoder, [layer for group in linear_groups for layer in group])

        # 1. Lay out and move: from here on every parameter is a view of `data`.
        kinds = {id(layer.weight): MATRIX for group in linear_groups for layer in group}
        self._move(encoder, heads, kinds | {id(word_embeddings): WORDS})

        # 2. Room for the task gradients, and for the weights in the type that linear layers compute in.
        layout, num_tasks = self.layout, len(heads)
        num_other, device = layout.num_shared - layout.num_matrix, self.data.device
        self.matrix_grads = torch.zeros(num_tasks, layout.num_matrix, device=device, dtype=grad_dtype)
        self.other_grads = torch.zeros(num_tasks, num_other, device=device)
        # One conversion a step; autocast would convert each weight again for every product.
        self.weight_copy = None if dtype == torch.float32 else self.data[layout.matrices].to(dtype)  # (D,)
        self.word_grads = None  # (K, V, H), a view of `other_grads`
        if layout.words.stop:
            self.word_grads = self.other_grads[:, layout.words].unflatten(1, word_embeddings.shape)
            # (U,) rows of words that may not be zero, in task gradients and in the combined one; None: all
            self.touched = self.combined = None

        # 3. Tell each layer where to write.
        self.targets: dict[int, GradTarget] = {}  # id of a parameter -> where its gradients go
        self._make_targets(encoder, linear_groups)

    def _move(self, encoder: nn.Module, heads: dict[str, nn.Module], kinds: dict[int, int]) -> None:
        """Allocate `data` and `grad`, and give every trainable parameter its range of them."""
        params: dict[tuple[str, str], nn.Parameter] = {}  # (owner, name) ->
        rows: dict[str, list[ParamRow]] = {}
        for owner, module in [(SHARED, encoder), *heads.items()]:
            found = {name: param for name, param in module.named_parameters() if param.requires_grad}
            params |= {(owner, name): param for name, param in found.items()}
            rows[owner] = [
                ParamRow(name, tuple(param.shape), has_weight_decay(param), kinds.get(id(param), OTHER))
                for name, param in found.items()
            ]
        if not params:
            raise ValueError("nothing to train: every parameter is frozen")
        if len({id(param) for param in params.values()}) < len(params):
            raise ValueError(
                "a parameter belongs to two owners (shared encoder, task heads); they must be disjoint"
            )
        self.layout = make_layout(rows.pop(SHARED), rows)
        self.views = [
            (owner, params[owner, name], where) for (owner, name), where in self.layout.places.items()
        ]
        self.ranges = {id(param): where for _, param, where in self.views}
        self.data = torch.empty(self.layout.size, device=self.views[0][1].device)
        self.grad = torch.zeros_like(self.data)
        # The model keeps its Parameter objects; only their storage changes.
        for owner, param, where in self.views:
            view = self.data[where].view_as(param)
            view.copy_(param.detach())
            param.data = view
            if owner != SHARED:
                param.grad = self.grad[where].view_as(param)  # autograd adds to it in place
        # What the optimizer sees: up to two long parameters for the encoder, and as many for each head.
        self.flat_params = {
            block: nn.Parameter(self.data[where])
            for block, where in self.layout.blocks.items()
            if where.start < where.stop
        }

    def _make_targets(self, encoder: nn.Module, linear_groups: list[tuple[nn.Linear, ...]]) -> None:
        """A `GradTarget` for every trainable parameter of the encoder."""
        self.written: list[GradTarget] = []  # overwritten in each step
        self.tables: list[GradTarget] = []  # added to in each step: embeddings, other than of words
        for group in linear_groups:
            self.written.append(self._make_target(*(layer.weight for layer in group)))
            self.written.append(self._make_target(*(layer.bias for layer in group)))
        for module in encoder.modules():
            if isinstance(module, nn.LayerNorm) and is_trainable(module):
                self.written += [self._make_target(module.weight), self._make_target(module.bias)]
            elif isinstance(module, nn.Embedding) and is_trainable(module):
                target = self._make_target(module.weight)
                if module.weight is not encoder.word_embeddings():
                    self.tables.append(target)

    def _make_target(self, *params: nn.Parameter) -> GradTarget:
        """One target for parameters that lie end to end; it is found by the first of them."""
        if not all(id(param) in self.ranges for param in params):
            raise ValueError(
                "the encoder is partly frozen: the weight and bias of a layer, and query, key and value,"
                " can only be trained or frozen together"
            )
        where = slice(self.ranges[id(params[0])].start, self.ranges[id(params[-1])].stop)
        shape = (-1, *params[0].shape[1:])  # weights one below the other: (sum of out, in)
        if self.weight_copy is not None and self.layout.is_matrix(where):
            weight = self.weight_copy[self.layout.columns(where)].view(shape)
        else:
            weight = self.data[where].view(shape)
        grads = self.stored_grads(where).unflatten(1, weight.shape)
        target = GradTarget(weight, list(grads), grads, [True] * len(self.tasks))
        self.targets[id(params[0])] = target
        return target

    def stored_grads(self, where: slice) -> torch.Tensor:
        """(K, n) the task gradients of a range in one section of the encoder, a view."""
        matrix = self.matrix_grads if self.layout.is_matrix(where) else self.other_grads
        return matrix[:, self.layout.columns(where)]

    def step_grads(self, where: slice) -> torch.Tensor:
        """The same without what is zero in this step: of the words only those that occur, (K, U * H)."""
        if self.word_grads is not None and where == self.layout.words and self.touched is not None:
            return torch.stack([grad[self.touched].flatten() for grad in self.word_grads])
        return self.stored_grads(where)

    def sections_of(self, owner: str, where: slice) -> list[slice]:
        """A block cut into ranges that each lie in one section of the gradients."""
        if owner != SHARED:
            return [where]
        return [section for section in self.layout.sections if where.start <= section.start < where.stop]

    def group_columns(self) -> list[tuple[torch.Tensor, list[tuple[int, slice]]]]:
        """The two gradient matrices, each with its layer groups' columns: the group's number, and a range."""
        found = []
        for matrix, is_matrix in ((self.matrix_grads, True), (self.other_grads, False)):
            ranges = [
                (number, self.layout.columns(where))
                for number, group in enumerate(self.layout.layer_groups.values())
                for where in group
                if self.layout.is_matrix(where) == is_matrix
            ]
            if ranges:
                found.append((matrix, ranges))
        return found

    def grad_column(self, param: nn.Parameter) -> int | None:
        """The first column of a parameter's gradients in its matrix; None if it is frozen."""
        where = self.ranges.get(id(param))
        return None if where is None else self.layout.columns(where).start

    @property
    def compute_dtype(self) -> torch.dtype:
        """What linear layers compute in."""
        return torch.float32 if self.weight_copy is None else self.weight_copy.dtype

    def head_grad(self, task: str) -> torch.Tensor:
        """The flat gradient of one task's head, a view of `grad`."""
        return self.grad[self.layout.blocks[task, True].start : self.layout.blocks[task, False].stop]

    def param_groups(
        self, lr: float, head_lr: float, weight_decay: float, layer_decay: float = 1.0
    ) -> list[dict]:
        """Groups for AdamW, one flat parameter each.

        Args:
            layer_decay: the learning rate of a layer of the encoder is this many times that of the layer
                above; see `layout.layer_factors`.
        """
        groups = []
        for (owner, decays), param in self.flat_params.items():
            group_lr = lr if owner == SHARED else head_lr
            group = {"params": [param], "lr": group_lr, "initial_lr": group_lr}
            group["weight_decay"] = weight_decay if decays else 0.0
            if owner == SHARED and layer_decay != 1:
                block = self.layout.blocks[owner, decays]
                group["lr_ranges"] = [
                    (slice(where.start - block.start, where.stop - block.start), factor)
                    for where, factor in self.layout.layer_factors(layer_decay)
                    if block.start <= where.start < block.stop
                ]
            groups.append(group)
        return groups

    # --- a step, in the order of its calls ------------------------------------------------------------------

    def start_step(self, input_ids: Sequence[torch.Tensor] | None = None) -> None:
        """Prepare for the backward passes of a step.

        Args:
            input_ids: all words that will occur, in any shape; None means that any may.
        """
        # After `.to()` or deepcopy, linear layers would still train from this buffer, all else would read the
        # parameters' new places, and the optimizer would update the buffer only.
        base, width = self.data.data_ptr(), self.data.element_size()
        assert all(param.data_ptr() == base + where.start * width for _, param, where in self.views), (
            "the model was moved or changed after move_to_flat_memory: its parameters are no longer views"
        )
        if self.word_grads is not None:
            # Zeroes the last step's words and notes this one's: a step has some hundred of 30,000.
            for grad in self.word_grads:  # (V, H); for all at once, torch would copy the table
                zero_rows(grad, None if input_ids is None else self.touched)
            self.touched = None
            if input_ids is not None:
                self.touched = torch.cat([ids.flatten() for ids in input_ids]).unique()
        # Positions and segments are added to like words, but their tables are small.
        for target in self.tables:
            for grad in target.grads:
                grad.zero_()
        # Most of the gradients need no zeroing: the first write of a step overwrites the last step's.
        for target in self.written:
            target.is_empty = [True] * len(self.tasks)
        self.grad[self.layout.num_shared :].zero_()
        # The weights as the last update left them.
        if self.weight_copy is not None:
            self.weight_copy.copy_(self.data[self.layout.matrices])

    def continue_step(self) -> None:
        """Before a backward pass that adds to what the step's first one has written."""
        for target in self.written:
            target.is_empty = [False] * len(self.tasks)

    def finish_grads(self) -> None:
        """After the step's last backward pass: what none of them wrote is zero."""
        for target in self.written:
            for task, is_empty in enumerate(target.is_empty):
                if is_empty:
                    target.grads[task].zero_()

    def sum_grads(
        self,
        sum_: Callable[[torch.Tensor], None],
        tasks: Sequence[int],
        losses: torch.Tensor,
        touched: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sum the step's gradients over the processes that share its batches.

        What lies scattered is sent as one message: the words of the step, tables, biases, heads, and losses.
        The weights of linear layers, nearly all there is, go from where they are, a task at a time.

        Args:
            sum_: sums a contiguous tensor over all processes, in place.
            tasks: the numbers of those that have a batch; the others' rows are zero everywhere.
            losses: (K,)
            touched: (U,) all words of the step, in all processes, if `start_step` was not told.

        Returns:
            the summed losses, (K,).
        """
        tasks, rest = list(tasks), self.other_grads[:, self.layout.words.stop :]  # (K, P - D - V * H)
        heads = self.grad[self.layout.num_shared :]
        words = []
        if self.word_grads is not None:
            rows = self.touched if touched is None else touched
            rows = slice(None) if rows is None else rows
            words = [self.word_grads[k][rows] for k in tasks]  # (U, H) each
        pieces = [*words, rest[tasks], heads, losses.to(heads)]
        message = torch.cat([piece.flatten() for piece in pieces])
        sum_(message)
        parts = message.split([piece.numel() for piece in pieces])
        *word_sums, summed_rest, summed_heads, summed_losses = parts
        for k, word, summed in zip(tasks, words, word_sums, strict=False):
            self.word_grads[k][rows] = summed.view_as(word)
        rest[tasks] = summed_rest.view(len(tasks), -1)
        heads.copy_(summed_heads)
        for k in tasks:
            sum_(self.matrix_grads[k])
        return summed_losses.to(losses)

    def group_grams(self) -> torch.Tensor:
        """Inner products of the task gradients within each layer group of the encoder, (layer groups, K, K).

        Their sum is the whole gram matrix; no layer group, as with a frozen encoder, gives (0, K, K).
        """

        def gram(where):
            # The words of a step are another number each time: compiled code would be compiled anew for each.
            kernel = gram_matrix if where == self.layout.words else self.kernels.gram_matrix
            return kernel(self.step_grads(where))

        grams = [sum(gram(where) for where in ranges) for ranges in self.layout.layer_groups.values()]
        return torch.stack(grams) if grams else self.grad.new_zeros(0, len(self.tasks), len(self.tasks))

    def combine(self, weights: torch.Tensor) -> None:
        """Write the weighted sum of the task gradients to the shared part of `grad`.

        Args:
            weights: (K,), or (layer groups, K) for another sum in each of `layout.layer_groups`.
        """
        if weights.ndim == 1:  # each section is one long range of one matrix, and is read once
            pieces = [(where, weights) for where in self.layout.sections]
        else:
            groups = self.layout.layer_groups.values()
            pieces = [(where, row) for group, row in zip(groups, weights, strict=True) for where in group]
        for where, row in pieces:
            if where == self.layout.words:
                word_weights = row
            else:
                self.kernels.weighted_sum(self.stored_grads(where), row, self.grad[where])
        if self.word_grads is not None:
            _, num_words, width = self.word_grads.shape
            combined = self.grad[self.layout.words].view(num_words, width)  # (V, H)
            zero_rows(combined, self.combined)  # what the last step wrote
            rows = slice(None) if self.touched is None else self.touched
            combined[rows] = (word_weights @ self.step_grads(self.layout.words)).view(-1, width)
            self.combined = self.touched

    def show_grads(self, tasks: Collection[str]) -> None:
        """Show the optimizer the gradients of the encoder and of these tasks' heads.

        The heads of other tasks get none: a zero gradient would still decay them and move them by their
        momentum.
        """
        for (owner, decays), param in self.flat_params.items():
            is_shown = owner == SHARED or owner in tasks
            param.grad = self.grad[self.layout.blocks[owner, decays]] if is_shown else None


def zero_rows(matrix: torch.Tensor, rows: torch.Tensor | None) -> None:
    """Zero some rows of a matrix; None means all."""
    if rows is None:
        matrix.zero_()
    else:
        matrix.index_fill_(0, rows, 0.0)


def check_layers(encoder: nn.Module, linear_layers: Collection[nn.Module]) -> None:
    """Refuse an encoder with trainable parameters in a layer that `task_grads` does not know, by its name."""
    for name, module in encoder.named_modules():
        has_own = any(param.requires_grad for param in module.parameters(recurse=False))
        is_known = is_plain(module) and (module in linear_layers or not isinstance(module, nn.Linear))
        if (has_own or module in linear_layers) and is_trainable(module) and not is_known:
            raise ValueError(not_plain(f"{name or 'the encoder'} is a {type(module).__name__}"))


def is_trainable(*modules: nn.Module) -> bool:
    return any(param.requires_grad for module in modules for param in module.parameters())
