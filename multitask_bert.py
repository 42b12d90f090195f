"""One encoder, one head per task.

Shapes: B examples, R sequences in a batch (R = 2 * B for two-vector heads), T padded length, H hidden_size, C outputs
of a task.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import nn

from bert import BertModel
from compiled import PLAIN, Passes
from config import TaskSpec
from evaluation import TASK_KINDS
from flat_memory import FlatMemory
from heads import POOLINGS, TaskHead


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
