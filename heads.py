"""From hidden states to logits: pooling, and the task heads.

Shapes: B examples, R sentences in a batch (R = 2 * B for two-vector pair heads), T padded length, H hidden_size,
C number of outputs of a task (classes, or 1).
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from bert import dropout

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
