"""From hidden states to logits: pooling, and the task heads.

Shapes: B examples, R sentences in a batch (R = 2 * B for two-vector pair heads), T padded length, H hidden_size,
C number of outputs of a task (classes, or 1).
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from bert import BertModel
from config import TaskSpec
from evaluation import TASK_KINDS
from kernels.cpu import dropout
from kernels.flat_memory import FlatMemory
from kernels.fused import PLAIN, Passes

# --- pooling: (encoder outputs, attention_mask (R, T)) -> (R, H) -------------------------------------------------


def pool_cls(outputs: dict[str, torch.Tensor], attention_mask: torch.Tensor) -> torch.Tensor:
    """The last hidden state of [CLS]."""
    return outputs["last_hidden_state"][:, 0]


def pool_mean(outputs: dict[str, torch.Tensor], attention_mask: torch.Tensor) -> torch.Tensor:
    """The mean of the last hidden states over real word pieces, [CLS] and [SEP] included."""
    mask = attention_mask.unsqueeze(-1)
    total = (outputs["last_hidden_state"] * mask).sum(1)  # (R, T, H) -> (R, H)
    return total / mask.sum(1).clamp(min=1)


def pool_pooler(outputs: dict[str, torch.Tensor], attention_mask: torch.Tensor) -> torch.Tensor:
    """BERT's own pooler: a dense layer and tanh on [CLS]."""
    return outputs["pooler_output"]


POOLINGS: dict[str, Callable] = {"cls": pool_cls, "mean": pool_mean, "pooler": pool_pooler}


# --- features of a pair of sentence vectors: u (B, H), v (B, H) -> (B, width) ------------------------------------


def concat_features(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The two vectors side by side; what the pair has in common is for the head to find out."""
    return torch.cat([u, v], dim=-1)


def diff_features(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """(u, v, |u - v|, u * v): the comparison spelled out (Reimers and Gurevych 2019, arXiv:1908.10084, and InferSent)."""
    return torch.cat([u, v, (u - v).abs(), u * v], dim=-1)


def cosine_features(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The cosine alone, in [-1, 1]."""
    return F.cosine_similarity(u.float(), v.float(), dim=-1).unsqueeze(-1)


@dataclass(frozen=True)
class HeadSpec:
    """How a head sees its input.

    Args:
        features: joins the vectors of a pair; None for heads that see one vector (a sentence, or a joint pair).
        vectors: width of the features in units of H; 0 means a single number.
        joint: the pair is encoded as one sequence, `[CLS] a [SEP] b [SEP]`.
    """

    features: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None
    vectors: int
    joint: bool = False


HEADS: dict[str, HeadSpec] = {
    "single": HeadSpec(features=None, vectors=1),  # the head of single-sentence tasks
    "concat": HeadSpec(features=concat_features, vectors=2),
    "cosine": HeadSpec(features=cosine_features, vectors=0),
    "diff": HeadSpec(features=diff_features, vectors=4),
    "cross": HeadSpec(features=None, vectors=1, joint=True),
}
PAIR_HEADS = tuple(name for name in HEADS if name != "single")


class TaskHead(nn.Module):
    """Dropout and one dense layer (or several) from pooled vectors to logits.

    Args:
        name: a key of HEADS.
        hidden_size: H.
        num_outputs: C.
        num_layers: dense layers; each but the last has H outputs, a GELU and its own dropout. The cosine head
            has always one: a learned scale and offset for its single number.
        dropout_prob: in [0, 1).
        logit_range: (least, greatest) that the logits should span: they start in its middle or, for the cosine
            head, with 0 at the low end and 1 at the high end. None: they start at 0.
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
    ):
        super().__init__()
        self.spec = HEADS[name]
        # Dropping the cosine head's single number would only be noise.
        self.dropout_prob = dropout_prob if self.spec.vectors else 0.0
        width = max(1, self.spec.vectors * hidden_size)
        widths = [width, *[hidden_size] * (num_layers - 1 if self.spec.vectors else 0), num_outputs]
        self.dense = nn.ModuleList(nn.Linear(m, n) for m, n in pairwise(widths))
        for layer in self.dense:
            nn.init.normal_(layer.weight, std=initializer_range)
            nn.init.zeros_(layer.bias)
        if logit_range is not None:
            low, high = logit_range
            nn.init.constant_(self.dense[-1].bias, (low + high) / 2)
            if not self.spec.vectors:
                nn.init.constant_(self.dense[-1].weight, high - low)
                nn.init.constant_(self.dense[-1].bias, low)

    def forward(self, u: torch.Tensor, v: torch.Tensor | None = None) -> torch.Tensor:
        """(B, H) and, for two-vector heads, (B, H) -> logits (B, C)."""
        x = u if self.spec.features is None else self.spec.features(u, v)
        for layer in self.dense[:-1]:
            x = F.gelu(layer(dropout(x, self.dropout_prob, self.training)))
        return self.dense[-1](dropout(x, self.dropout_prob, self.training))


class MultitaskBERT(nn.Module):
    """One encoder, one head per task.

    Args:
        bert: the shared encoder.
        tasks: task -> its row in `config.TASKS`.
        head_names: task -> a key of `heads.HEADS`.
        pooling: a key of `heads.POOLINGS`.
        freeze_encoder: train the heads only.
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
    ):
        super().__init__()
        self.bert, self.tasks, self.pooling, self.freeze_encoder = bert, tasks, pooling, freeze_encoder
        self.heads = nn.ModuleDict(
            {
                task: TaskHead(
                    head_names[task],
                    bert.config.hidden_size,
                    TASK_KINDS[spec.kind].num_outputs(spec),
                    num_layers=head_layers,
                    dropout_prob=head_dropout_prob,
                    initializer_range=bert.config.initializer_range,
                    logit_range=TASK_KINDS[spec.kind].logit_range(spec),
                )
                for task, spec in tasks.items()
            }
        )
        bert.requires_grad_(not freeze_encoder)
        if pooling != "pooler":
            bert.pooler.requires_grad_(False)  # not used: must not decay either

    def train(self, mode: bool = True) -> "MultitaskBERT":
        super().train(mode)
        if self.freeze_encoder:
            self.bert.eval()  # a frozen encoder is a fixed function: no dropout
        return self

    def embed(self, input_ids, attention_mask, token_type_ids) -> torch.Tensor:
        """Encode and pool: each (R, T) -> (R, H)."""
        with torch.no_grad() if self.freeze_encoder else nullcontext():
            outputs = self.bert(input_ids, attention_mask, token_type_ids)
            return POOLINGS[self.pooling](outputs, attention_mask)

    def forward(self, task: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits of one task.

        Args:
            batch: `input_ids`, `attention_mask`, `token_type_ids`, each (R, T). For two-vector heads R = 2 * B: all
                first sentences, then all second ones, encoded in one forward pass.

        Returns:
            (B, C) float32.
        """
        pooled = self.embed(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
        return self.logits(task, pooled)

    def logits(self, task: str, pooled: torch.Tensor) -> torch.Tensor:
        """Logits (B, C) float32 from all pooled vectors of a batch, (R, H)."""
        vectors = pooled.chunk(2) if self.heads[task].spec.features is not None else (pooled,)
        return self.classify(task, *vectors)

    def classify(self, task: str, *vectors: torch.Tensor) -> torch.Tensor:
        """Logits (B, C) float32 from the pooled vectors of a task's input, each (B, H): one, or two for a pair.

        Always in float32: bfloat16 has three significant digits, too few for a similarity.
        """
        with torch.autocast(vectors[0].device.type, enabled=False):
            return self.heads[task](*(vector.float() for vector in vectors))

    def make_memory(
        self,
        dtype: torch.dtype = torch.float32,
        grad_dtype: torch.dtype = torch.float32,
        passes: Passes = PLAIN,
    ) -> FlatMemory:
        """Flat memory that holds this model's parameters from now on; for the arguments see there."""
        heads = {task: self.heads[task] for task in self.tasks}
        return FlatMemory(self.bert, heads, dtype=dtype, grad_dtype=grad_dtype, passes=passes)

    def losses(
        self, batches: Sequence[tuple[str, dict[str, torch.Tensor]]], by_task: bool = False
    ) -> list[torch.Tensor]:
        """Mean losses of several batches, each of a task, from one pass through the encoder.

        Args:
            by_task: keep the encoder's gradients of tasks apart, in the memory of `make_memory`.
        """
        tasks = [list(self.tasks).index(task) for task, _ in batches] if by_task else None
        inputs = [
            (batch["input_ids"], batch["attention_mask"], batch["token_type_ids"]) for _, batch in batches
        ]
        with torch.no_grad() if self.freeze_encoder else nullcontext():
            outputs = self.bert.encode(inputs, tasks)
        losses = []
        for (task, batch), output in zip(batches, outputs, strict=True):
            pooled = POOLINGS[self.pooling](output, batch["attention_mask"])
            losses.append(TASK_KINDS[self.tasks[task].kind].loss(self.logits(task, pooled), batch["labels"]))
        return losses

    def loss(self, task: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean loss over a batch with `labels` (B,)."""
        return self.losses([(task, batch)])[0]
