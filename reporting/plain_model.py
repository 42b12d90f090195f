"""One task of a model as a plain graph of tensor operations, for exporters that trace what they are given.

The model that is trained packs rows, and its shapes depend on the mask; here every sequence keeps its
padding. The weights are the same tensors, and so are pooling and head.

Shapes: B examples, T padded length, H hidden_size, N attention heads, D = H // N, C outputs of the task.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bert import BertLayer
from heads import POOLINGS, MultitaskBERT


class PlainModel(nn.Module):
    """Encoder, pooling and head of one task, without packing or dropout.

    Args:
        scores: logits (B, C) -> what users are shown, (B, C).
    """

    def __init__(self, model: MultitaskBERT, task: str, scores: Callable[[Tensor], Tensor]):
        super().__init__()
        self.bert, self.head = model.bert, model.heads[task]
        self.pool, self.scores = POOLINGS[model.pooling].pool, scores
        self.eval()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and scores, each (B, C).

        Args:
            inputs: `input_ids`, `attention_mask`, `token_type_ids`, each (B, T); for a head that sees several
                sequences of an example, these of the first ones, then of the second ones, which may have
                another T, and so on.
        """
        vectors = [self.embed(*inputs[n : n + 3]) for n in range(0, len(inputs), 3)]  # (B, H) each
        logits = self.head(*vectors)  # (B, C)
        return logits, self.scores(logits)

    def embed(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """Encode and pool: each (B, T) -> (B, H)."""
        table = self.bert.embeddings
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)  # (T,)
        x = table.word_embeddings(input_ids) + table.position_embeddings(positions)  # (B, T, H)
        x = table.LayerNorm(x + table.token_type_embeddings(token_type_ids))
        # Added to the scores of attention. Not -inf: a sentence of nothing but padding stays finite.
        lowest = torch.finfo(x.dtype).min
        key_mask = (1 - attention_mask[:, None, None, :].to(x.dtype)) * lowest  # (B, 1, 1, T)
        for layer in self.bert.encoder.layer:
            x = plain_layer(layer, x, key_mask)
        outputs = {"last_hidden_state": x, "pooler_output": self.bert.pooler.dense(x[:, 0]).tanh()}
        return self.pool(outputs, attention_mask, self.head.query)


def plain_layer(layer: BertLayer, x: Tensor, key_mask: Tensor) -> Tensor:
    """One Transformer layer, (B, T, H) -> (B, T, H)."""
    attention, output = layer.attention.self, layer.attention.output
    query, key, value = (
        dense(x).unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)  # (B, N, T, D)
        for dense in (attention.query, attention.key, attention.value)
    )
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5 + key_mask  # (B, N, T, T)
    context = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)  # (B, T, H)
    x = output.LayerNorm(output.dense(context) + x)
    feed_forward = layer.intermediate.activation(layer.intermediate.dense(x))  # (B, T, I)
    return layer.output.LayerNorm(layer.output.dense(feed_forward) + x)
