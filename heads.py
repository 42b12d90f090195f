"""From hidden states to logits: pooling, task heads, and the model of one encoder with a head per task.

Shapes: B examples, R sentences in a batch (R = 2 * B for two-vector pair heads), T padded length, S labelled
phrases of a sentence, H hidden_size, C number of outputs of a task (classes, or 1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from config import TaskSpec
from evaluation import NOTHING_ADDED, Objective, task_kind
from kernels.adversarial import AdversarialNoise
from kernels.cpu import dropout
from kernels.flat_memory import FlatMemory
from kernels.fused import PLAIN, Kernels
from kernels.static_packing import StaticPacking, static_dropout

if TYPE_CHECKING:  # the flags take their choices from here, and --help should not have to import the encoder
    from bert import BertModel

# --- pooling: (encoder outputs, attention_mask (R, T), query (H,) or None) -> (R, H) ------------------------


def pool_cls(outputs: dict[str, torch.Tensor], attention_mask: torch.Tensor, query=None) -> torch.Tensor:
    """The last hidden state of [CLS]."""
    return outputs["last_hidden_state"][:, 0]


def pool_mean(outputs: dict[str, torch.Tensor], attention_mask: torch.Tensor, query=None) -> torch.Tensor:
    """The mean of the last hidden states over real word pieces, [CLS] and [SEP] included."""
    mask = attention_mask.unsqueeze(-1)  # (R, T, 1)
    total = (outputs["last_hidden_state"] * mask).sum(1)  # (R, T, H) -> (R, H)
    return total / mask.sum(1).clamp(min=1)  # a sentence of nothing but padding stays finite


def pool_pooler(outputs: dict[str, torch.Tensor], attention_mask: torch.Tensor, query=None) -> torch.Tensor:
    """BERT's own pooler: a dense layer and tanh on [CLS]."""
    return outputs["pooler_output"]


def pool_attention(
    outputs: dict[str, torch.Tensor], attention_mask: torch.Tensor, query: torch.Tensor
) -> torch.Tensor:
    """The mean of the last hidden states weighted by softmax(states . query / sqrt(H)), with a learned query.

    As in Yang et al. 2016, https://aclanthology.org/N16-1174, but without a layer before the product; each
    task has a query of its own. With a query of zeros, the start, it is `mean`.
    """
    states = outputs["last_hidden_state"]  # (R, T, H)
    weights = attention_weights(states, attention_mask, query)  # (R, T)
    return (states * weights.unsqueeze(-1)).sum(1)  # (R, T, H) -> (R, H)


def attention_weights(states: torch.Tensor, mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Weights of the positions, states (R, T, H); they sum to 1 where the mask (R, ..., T) is not 0."""
    # No matrix product, which autocast would make in bfloat16.
    scores = (states * query).sum(-1) / query.shape[0] ** 0.5  # (R, T)
    scores = scores.view(mask.shape[0], *[1] * (mask.ndim - 2), -1)  # (R, ..., T)
    # Not -inf: nothing but padding stays finite.
    return scores.masked_fill(mask == 0, torch.finfo(scores.dtype).min).softmax(-1)


def mean_weights(states: torch.Tensor, mask: torch.Tensor, query=None) -> torch.Tensor:
    """`attention_weights` that are all the same."""
    return mask / mask.sum(-1, keepdim=True).clamp(min=1)


@dataclass(frozen=True)
class Pooling:
    """How the hidden states of a sequence become one vector.

    Args:
        pool: as the head of this section says.
        weights: hidden states (R, T, H), mask (R, S, T) of phrases, query -> the weights (R, S, T) of the
            positions by which phrases are pooled in the same way; None where a phrase has no such vector.
        has_query: each task learns a query (H,).
    """

    pool: Callable[..., torch.Tensor]
    weights: Callable[..., torch.Tensor] | None = None
    has_query: bool = False


POOLINGS: dict[str, Pooling] = {
    "cls": Pooling(pool_cls),
    "mean": Pooling(pool_mean, mean_weights),
    "pooler": Pooling(pool_pooler),
    "attention": Pooling(pool_attention, attention_weights, has_query=True),
}
PHRASE_POOLINGS = tuple(name for name, row in POOLINGS.items() if row.weights is not None)


def pool_phrases(
    pooling: Pooling, states: torch.Tensor, spans: torch.Tensor, query: torch.Tensor | None
) -> torch.Tensor:
    """Pool phrases in their sentences: states (R, T, H), spans (R, S, 2) -> (R, S, H)."""
    positions = torch.arange(states.shape[1], device=states.device)  # (T,)
    mask = (spans[..., :1] <= positions) & (positions < spans[..., 1:])  # (R, S, T)
    with torch.autocast(states.device.type, enabled=False):
        # All phrases in one product per sentence: next to no time beside the encoder.
        return pooling.weights(states, mask, query).to(states.dtype) @ states


# --- features of a pair of sentence vectors: u (B, H), v (B, H) -> (B, width) -------------------------------


def concat_features(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The two vectors side by side; what the pair has in common is for the head to find out."""
    return torch.cat([u, v], dim=-1)  # (B, 2 * H)


def diff_features(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """(u, v, |u - v|, u * v): the comparison spelled out, as in InferSent and SBERT.

    Conneau et al. 2017, https://arxiv.org/abs/1705.02364; Reimers and Gurevych 2019,
    https://arxiv.org/abs/1908.10084.
    """
    return torch.cat([u, v, (u - v).abs(), u * v], dim=-1)  # (B, 4 * H)


def cosine_features(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The cosine alone, in [-1, 1]."""
    return F.cosine_similarity(u.float(), v.float(), dim=-1).unsqueeze(-1)  # (B, 1)


@dataclass(frozen=True)
class HeadSpec:
    """How a head sees its input.

    Args:
        features: joins the vectors of a pair; None for heads that see one (of a sentence, or a joint pair).
        vectors: how many vectors of width H the features are.
        joint: the pair is encoded as one sequence, `[CLS] a [SEP] b [SEP]`.
        single_number: the features are one number, (B, 1), not vectors.
        parts: two other heads, one of them joint, whose logits are averaged.
    """

    features: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    vectors: int = 1
    joint: bool = False
    single_number: bool = False
    parts: tuple[str, ...] = ()

    @property
    def num_inputs(self) -> int:
        """How many sequences of an example the encoder sees: both sentences, the joint pair, or all three."""
        if self.parts:
            return sum(HEADS[part].num_inputs for part in self.parts)
        return 1 if self.features is None else 2

    def width(self, hidden_size: int) -> int:
        """Width of the features."""
        return 1 if self.single_number else self.vectors * hidden_size


HEADS: dict[str, HeadSpec] = {
    "single": HeadSpec(),  # the head of single-sentence tasks
    "concat": HeadSpec(concat_features, vectors=2),
    "cosine": HeadSpec(cosine_features, single_number=True),
    "diff": HeadSpec(diff_features, vectors=4),
    "cross": HeadSpec(joint=True),
    "diff+cross": HeadSpec(joint=True, parts=("diff", "cross")),
}
PAIR_HEADS = tuple(name for name in HEADS if name != "single")


class Thresholds(nn.Module):
    """The last layer of a head for ordered classes: one score, and C - 1 thresholds for it.

    One weight vector for all of them, so that the probability to be above a threshold falls from each to the
    next wherever the thresholds are in order (CORAL, https://arxiv.org/abs/1901.07884). They start so that
    all classes are equally likely.

    Args:
        layer: a new layer with C - 1 outputs, whose first row of weights is taken over.
    """

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.weight = nn.Parameter(layer.weight.detach()[:1].clone())  # (1, H)
        num_classes = layer.out_features + 1
        self.bias = nn.Parameter(torch.arange(num_classes - 1, 0, -1).div(num_classes).logit())  # (C - 1,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight) + self.bias  # (B, H) -> (B, C - 1)


class TaskHead(nn.Module):
    """Dropout and one dense layer (or several) from pooled vectors to logits.

    Args:
        name: a key of HEADS.
        hidden_size: H.
        num_outputs: C.
        num_layers: dense layers; each but the last has H outputs and a GELU, and each has dropout before it.
            A head on a single number always has one: a learned scale and offset.
        dropout_prob: in [0, 1).
        logit_range: (least, greatest) that the logits should span: they start in its middle or, for a head on
            a single number, with 0 at the low end and 1 at the high end. None: they start at 0.
        shares_weight: the last layer is `Thresholds`.
    """

    def __init__(
        self,
        name: str,
        hidden_size: int,
        num_outputs: int,
        num_layers: int = 1,
        dropout_prob: float = 0.1,
        initializer_range: float = 0.02,
        logit_range: tuple[float, float] | None = None,
        shares_weight: bool = False,
    ):
        super().__init__()
        self.spec = HEADS[name]
        self.dropout_samples = 1  # in training; see `MultitaskBERT.total_loss`
        if self.spec.single_number:
            num_layers, dropout_prob = 1, 0.0  # dropping the only number would just be noise
        self.dropout_prob = dropout_prob
        widths = [self.spec.width(hidden_size), *[hidden_size] * (num_layers - 1), num_outputs]
        self.dense = nn.ModuleList(nn.Linear(m, n) for m, n in pairwise(widths))
        for layer in self.dense:
            nn.init.normal_(layer.weight, std=initializer_range)
            nn.init.zeros_(layer.bias)
        if shares_weight:
            self.dense[-1] = Thresholds(self.dense[-1])
        if logit_range is not None:
            # Starting at 0 instead, the first steps would go into the labels' mean.
            low, high = logit_range
            nn.init.constant_(self.dense[-1].bias, (low + high) / 2)
            if self.spec.single_number:
                nn.init.constant_(self.dense[-1].weight, high - low)
                nn.init.constant_(self.dense[-1].bias, low)

    def forward(self, u: torch.Tensor, v: torch.Tensor | None = None) -> torch.Tensor:
        """(B, H) and, for two-vector heads, (B, H) -> logits (B, C); with S samples of dropout (S * B, C).

        Of a joint pair in both orders the logits are averaged.
        """
        if self.spec.features is None and v is not None:
            return (self(u) + self(v)) / 2
        x = u if self.spec.features is None else self.spec.features(u, v)  # (B, width)
        if self.training and self.dropout_samples > 1:
            x = x.repeat(self.dropout_samples, 1)  # (S * B, width)
        for layer in self.dense[:-1]:
            x = F.gelu(layer(dropout(x, self.dropout_prob, self.training)))  # (B, H)
        return self.dense[-1](dropout(x, self.dropout_prob, self.training))

    def each(self, *vectors: torch.Tensor) -> list[torch.Tensor]:
        """The logits that each have a loss of their own: here one, (B, C)."""
        return [self(*vectors)]


class CombinedHead(nn.Module):
    """A two-vector head and a joint one on the same task: each has its loss, and their logits are averaged.

    Takes the vectors of both: of the two sentences, then of the joint pair, maybe in both orders.
    """

    def __init__(self, name: str, *sizes: int, **options):
        super().__init__()
        self.spec = HEADS[name]
        self.parts = nn.ModuleList(TaskHead(part, *sizes, **options) for part in self.spec.parts)

    def each(self, u: torch.Tensor, v: torch.Tensor, *joint: torch.Tensor) -> list[torch.Tensor]:
        """Logits of each part, (B, C)."""
        return [part(*joint) if part.spec.joint else part(u, v) for part in self.parts]

    def forward(self, *vectors: torch.Tensor) -> torch.Tensor:
        """(B, H) each -> mean of the parts' logits, (B, C)."""
        return torch.stack(self.each(*vectors)).mean(0)


class MultitaskBERT(nn.Module):
    """One encoder, one head per task.

    Args:
        bert: the shared encoder.
        tasks: task -> its row in `config.TASKS`.
        head_names: task -> a key of `heads.HEADS`.
        pooling: a key of `heads.POOLINGS`.
        freeze_encoder: train the heads only.
        objective: what is added to the losses.
    """

    def __init__(
        self,
        bert: BertModel,
        tasks: dict[str, TaskSpec],
        head_names: dict[str, str],
        pooling: str = "mean",
        head_layers: int = 1,
        head_dropout_prob: float = 0.1,
        freeze_encoder: bool = False,
        objective: Objective = NOTHING_ADDED,
    ):
        super().__init__()
        self.objective = objective
        self.bert, self.tasks, self.pooling, self.freeze_encoder = bert, tasks, pooling, freeze_encoder
        self.heads = nn.ModuleDict()
        for task, spec in tasks.items():
            kind = task_kind(spec)
            make_head = CombinedHead if HEADS[head_names[task]].parts else TaskHead
            head = self.heads[task] = make_head(
                head_names[task],
                bert.config.hidden_size,
                kind.num_outputs(spec),
                num_layers=head_layers,
                dropout_prob=head_dropout_prob,
                initializer_range=bert.config.initializer_range,
                logit_range=kind.logit_range(spec),
                shares_weight=kind.shares_weight,
            )
            query = torch.zeros(bert.config.hidden_size) if POOLINGS[pooling].has_query else None
            head.register_parameter("query", None if query is None else nn.Parameter(query))
            for part in getattr(head, "parts", [head]):
                part.dropout_samples = 1 if part.spec.single_number else objective.head_dropout_samples
        # Before the flat memory is made, which takes what is trainable.
        bert.requires_grad_(not freeze_encoder)
        if pooling != "pooler":
            bert.pooler.requires_grad_(False)  # not used: must not decay either

    def train(self, mode: bool = True) -> MultitaskBERT:
        super().train(mode)
        if self.freeze_encoder:
            self.bert.eval()  # a frozen encoder is a fixed function: no dropout
        return self

    def embed(
        self, task: str, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> torch.Tensor:
        """Encode and pool for a task: each (R, T) -> (R, H)."""
        with (
            torch.no_grad() if self.freeze_encoder else nullcontext()
        ):  # then nothing is kept for a backward pass
            outputs = self.bert(input_ids, attention_mask, token_type_ids)
        return self.pool(task, outputs, attention_mask.to(input_ids.device, non_blocking=True))

    def pool(self, task: str, outputs: dict[str, torch.Tensor], attention_mask: torch.Tensor) -> torch.Tensor:
        """What the encoder gives for a batch of a task -> (R, H); mask (R, T)."""
        return POOLINGS[self.pooling].pool(outputs, attention_mask, self.heads[task].query)

    def forward(self, task: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits of one task.

        Args:
            batch: `input_ids`, `attention_mask`, `token_type_ids`, each (R, T). For two-vector heads they are
                2 * B sequences: all first sentences, then all second ones, encoded in one forward pass.

        Returns:
            (B, C) float32.
        """
        # The two sentences of a pair share a pass: one large product is faster than two small ones.
        pooled = self.embed(task, batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
        return self.logits(task, pooled)

    def logits(self, task: str, pooled: torch.Tensor) -> torch.Tensor:
        """Logits (B, C) float32 from all pooled vectors of a batch, (R, H)."""
        return self.classify(task, *pooled.chunk(self.heads[task].spec.num_inputs))  # (B, H) each

    def classify(self, task: str, *vectors: torch.Tensor) -> torch.Tensor:
        """Logits (B, C) float32 from a task's pooled vectors, each (B, H), in the order of `TaskData.index`.

        Always in float32: bfloat16 has three significant digits, too few for a similarity.
        """
        with torch.autocast(vectors[0].device.type, enabled=False):
            return self.heads[task](*(vector.float() for vector in vectors))

    def move_to_flat_memory(
        self,
        dtype: torch.dtype = torch.float32,
        grad_dtype: torch.dtype = torch.float32,
        kernels: Kernels = PLAIN,
    ) -> FlatMemory:
        """Make every trainable parameter a view of one flat buffer, for good; arguments as for `FlatMemory`.

        To be called when the model is on its device: it must not be moved or copied afterwards.
        """
        heads = {task: self.heads[task] for task in self.tasks}
        return FlatMemory(self.bert, heads, dtype=dtype, grad_dtype=grad_dtype, kernels=kernels)

    def losses(
        self,
        batches: Sequence[tuple[str, dict[str, torch.Tensor]]],
        memory: FlatMemory | None = None,
        noise: AdversarialNoise | None = None,
    ) -> list[torch.Tensor]:
        """Mean losses of several batches, each of a task, from one pass through the encoder.

        Args:
            memory: keep the encoder's gradients of tasks apart, in this memory; None for ordinary gradients.
            noise: added to the embeddings; None for nothing.
        """
        task_numbers, targets = None, None
        if memory is not None:  # each batch's gradients go to the row of its task
            task_numbers, targets = [memory.tasks.index(task) for task, _ in batches], memory.targets
        inputs = [
            (batch["input_ids"], batch["attention_mask"], batch["token_type_ids"]) for _, batch in batches
        ]
        with torch.no_grad() if self.freeze_encoder else nullcontext():
            outputs = self.bert.encode(inputs, task_numbers, targets, noise)
        # From here on each batch alone: heads are small, and their gradients are of one task anyway.
        return [
            self.head_loss(
                task, output, batch["attention_mask"].to(batch["labels"].device), batch["labels"], batch
            )
            for (task, batch), output in zip(batches, outputs, strict=True)
        ]

    def static_losses(self, packing: StaticPacking) -> list[torch.Tensor]:
        """`losses` for the rows of a step of static shape, one loss a draw."""
        tasks = list(self.tasks)
        with static_dropout(packing):
            with torch.no_grad() if self.freeze_encoder else nullcontext():
                outputs = self.bert.encode_static(packing)
            return [
                self.head_loss(tasks[draw.task], output, mask, labels, phrases)
                for draw, (output, mask), labels, phrases in zip(
                    packing.shape.draws, outputs, packing.labels, packing.phrases, strict=True
                )
            ]

    def head_loss(
        self,
        task: str,
        outputs: dict[str, torch.Tensor],
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        phrases: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Mean loss of one batch from what the encoder gives for it, mask (R, T), labels (B,).

        Args:
            phrases: of a batch with labelled phrases, as `datasets.Phrases.batch` gives them, maybe among
                others; their weighted loss is added.
        """
        pooled, kind = self.pool(task, outputs, attention_mask), task_kind(self.tasks[task])  # (R, H)
        with torch.autocast(pooled.device.type, enabled=False):  # as in `classify`
            each = self.heads[task].each(*pooled.float().chunk(self.heads[task].spec.num_inputs))
        loss = sum(self.total_loss(task, logits, labels) for logits in each) / len(each)
        if not phrases or "phrase_spans" not in phrases:
            return loss
        states, query = outputs["last_hidden_state"], self.heads[task].query
        vectors = pool_phrases(POOLINGS[self.pooling], states, phrases["phrase_spans"], query)  # (R, P, H)
        logits = self.classify(task, vectors.flatten(0, 1))  # (R * P, C), or S times as many
        num_samples = self.heads[task].dropout_samples if self.training else 1
        phrase_labels = phrases["phrase_labels"].flatten()
        losses = kind.loss(logits, torch.cat([phrase_labels] * num_samples), reduction="none")
        losses = losses.view(num_samples, len(phrase_labels)).mean(0)
        return loss + (losses * phrases["phrase_weights"].flatten()).sum()  # `@` would be autocast

    def total_loss(self, task: str, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """A task's mean loss with all that `Objective` adds to it; the one place where terms are added.

        Label smoothing: Szegedy et al. 2016, https://arxiv.org/abs/1512.00567. Multi-sample dropout: Inoue
        2019, https://arxiv.org/abs/1905.09788, the mean loss of S samples. R-Drop: Liang et al. 2021,
        https://arxiv.org/abs/2106.14448, as their code has it: the mean, not the sum, of the two passes'
        losses, and of the two directions of the divergence.

        Args:
            logits: (S * B, C), sample by sample.
            labels: (B,), or a teacher's (B, C)
        """
        kind, objective = task_kind(self.tasks[task]), self.objective
        num_samples = len(logits) // len(labels)
        loss = kind.loss(logits, torch.cat([labels] * num_samples))
        smoothing = objective.label_smoothing.get(task, 0.0)
        if smoothing:
            loss = (1 - smoothing) * loss + smoothing * kind.uniform_loss(logits)
        rdrop = objective.rdrop.get(task, 0.0)
        if rdrop and self.training:  # without dropout, both passes are the same
            first, second = logits.unflatten(0, (num_samples, 2, -1)).unbind(1)  # (S, B / 2, C) each
            loss = loss + rdrop * kind.divergence(first.flatten(0, 1), second.flatten(0, 1))
        return loss

    def loss(self, task: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean loss over a batch with `labels` (B,)."""
        return self.losses([(task, batch)])[0]
