"""The BERT encoder, written by hand (Devlin et al. 2019, https://arxiv.org/abs/1810.04805).

Parameter names and mathematics are those of Hugging Face's `BertModel`, so checkpoints go both ways. The
one difference is in how the work is laid out: padding hardly reaches a matrix product. Embeddings, linear
layers, LayerNorm and GELU see the real word pieces of the batch, laid end to end; attention alone needs
the rectangle of (sentence, position), and gets it back for its own few operations.

Shapes: B sentences, T padded length in word pieces, M rows of the flat layout (M = B * T without padding),
H hidden_size, N attention heads, D = H // N.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from base_bert import BertPreTrainedModel
from config import BertConfig, UserError

# Matrix libraries prepare each shape they have not met before; few different row counts make that rare.
ROW_MULTIPLE = 32
ACTIVATIONS = {"gelu": F.gelu, "gelu_new": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}


def dropout(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    """Zero each element with probability `p` and scale the rest by 1 / (1 - p).

    On the CPU `torch.nn.functional.dropout` draws one number at a time and takes longer than the matrix
    products around it. Here each 64-bit draw from torch's global generator decides four elements, so `p` is
    rounded to a multiple of 2**-16. On a GPU torch's own kernel is used.
    """
    if not training or p == 0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p)
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    lanes = draws.view(torch.int16)[: x.numel()].view(x.shape)  # uniform over -2**15 .. 2**15 - 1
    dropped = min(round(p * 2**16), 2**16 - 1)  # p < 1: something is always kept
    keep = (lanes >= dropped - 2**15).to(x.dtype)
    return x * keep.mul_(2**16 / (2**16 - dropped))


class Padding:
    """Where the real word pieces of a padded batch are; moves hidden states between the two layouts.

    The rows of the flat layout are the real word pieces and, up to a multiple of ROW_MULTIPLE, some padding.

    Args:
        attention_mask: (B, T), non-zero for real word pieces.
    """

    def __init__(self, attention_mask: torch.Tensor):
        self.mask = attention_mask.bool()
        self.rows = self.key_mask = None
        if not self.mask.all():
            kept = self.mask.flatten().clone()
            # A sentence without any real word piece has nothing to attend to: its softmax is not a number.
            spare = (~self.mask & self.mask.any(1, keepdim=True)).flatten().nonzero().squeeze(1)
            kept[spare[: -int(kept.sum()) % ROW_MULTIPLE]] = True
            self.rows = kept.nonzero().squeeze(1)  # (M,) positions in B * T
            self.key_mask = self.mask[:, None, None, :]  # (B, 1, 1, T), True = attend

    def remove(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, ...) -> (M, ...)"""
        x = x.flatten(0, 1)
        return x if self.rows is None else x[self.rows]

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """(M, H) -> (B, T, H); what stands at padding is of no meaning."""
        if self.rows is not None:
            x = x.new_zeros(self.mask.numel(), x.shape[-1]).index_copy(0, self.rows, x)
        return x.view(*self.mask.shape, -1)


class BertEmbeddings(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout_prob = config.hidden_dropout_prob
        self.sparse_grad = (
            False  # set by who provides a dense .grad to add to: then only the rows in use are touched
        )

    def forward(self, input_ids, position_ids, token_type_ids):
        word_embeddings = self.word_embeddings.weight
        embeddings = F.embedding(input_ids, word_embeddings, sparse=self.sparse_grad)  # (M,) -> (M, H)
        embeddings = embeddings + self.position_embeddings(position_ids)
        embeddings = embeddings + self.token_type_embeddings(token_type_ids)
        return dropout(self.LayerNorm(embeddings), self.dropout_prob, self.training)


class BertSelfAttention(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout_prob = config.attention_probs_dropout_prob

    def forward(self, hidden_states, padding: Padding):
        def split_heads(x):
            return padding.restore(x).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)

        query = split_heads(self.query(hidden_states))  # (M, H) -> (B, N, T, D)
        key = split_heads(self.key(hidden_states))
        value = split_heads(self.value(hidden_states))
        context = self.attend(query, key, value, padding.key_mask)  # (B, N, T, D)
        return padding.remove(context.transpose(1, 2).flatten(2))  # (M, H)

    def attend(self, query, key, value, key_mask):
        dropout_prob = self.dropout_prob if self.training else 0.0
        if query.device.type != "cpu" or not torch.is_grad_enabled():
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=key_mask, dropout_p=dropout_prob
            )
        # Training on a CPU: the fused kernel's dropout is slow, its bfloat16 backward is 4 to 7 times slower
        # than these five lines at sentence lengths (measured with torch 2.13).
        attention_scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])  # (B, N, T, T)
        if key_mask is not None:
            attention_scores = attention_scores.masked_fill(~key_mask, float("-inf"))
        attention_probs = dropout(attention_scores.softmax(-1).to(value.dtype), dropout_prob, self.training)
        return attention_probs @ value


class BertOutput(nn.Module):
    """Projection back to the residual stream, used after attention and after the feed-forward layer."""

    def __init__(self, input_size: int, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(input_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout_prob = config.hidden_dropout_prob

    def forward(self, x, residual):
        x = dropout(self.dense(x), self.dropout_prob, self.training)
        return self.LayerNorm(x + residual)  # (M, H): BERT normalises after the sum


class BertAttention(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertOutput(config.hidden_size, config)

    def forward(self, hidden_states, padding):
        return self.output(self.self(hidden_states, padding), hidden_states)


class BertIntermediate(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, hidden_states):
        return self.activation(self.dense(hidden_states))  # (M, H) -> (M, intermediate_size)


class BertLayer(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config.intermediate_size, config)

    def forward(self, hidden_states, padding):
        hidden_states = self.attention(hidden_states, padding)
        return self.output(self.intermediate(hidden_states), hidden_states)


class BertEncoder(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden_states, padding):
        for layer in self.layer:
            hidden_states = layer(hidden_states, padding)
        return hidden_states


class BertPooler(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, last_hidden_state):
        return self.dense(last_hidden_state[:, 0]).tanh()  # (B, T, H) -> (B, H)


class BertModel(BertPreTrainedModel):
    """The encoder. Make it with random weights from a config, or with `BertModel.from_pretrained`."""

    def __init__(self, config: BertConfig):
        super().__init__(config)
        if config.hidden_act not in ACTIVATIONS:
            raise UserError(f"hidden_act is {config.hidden_act!r}; expected one of {', '.join(ACTIVATIONS)}")
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config)
        self.init_weights()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Encode a batch of sentences or of joint pairs.

        Args:
            input_ids: (B, T) integers in [0, vocab_size); T is at most max_position_embeddings.
            attention_mask: (B, T), 1 for real word pieces and 0 for padding, wherever it stands; None means
                no padding.
            token_type_ids: (B, T), 0 for the first segment and 1 for the second; None means all 0.

        Returns:
            `last_hidden_state` (B, T, H), zeros at padding, and `pooler_output` (B, H).

        Raises:
            ValueError: if T exceeds max_position_embeddings.
        """
        num_positions = input_ids.shape[1]
        if num_positions > self.config.max_position_embeddings:
            raise ValueError(
                f"input_ids has {num_positions} positions; this encoder was built for at most"
                f" {self.config.max_position_embeddings} (max_position_embeddings)"
            )
        padding = Padding(torch.ones_like(input_ids) if attention_mask is None else attention_mask)
        position_ids = torch.arange(num_positions, device=input_ids.device).expand_as(input_ids)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        hidden_states = self.embeddings(
            padding.remove(input_ids), padding.remove(position_ids), padding.remove(token_type_ids)
        )  # (M, H)
        last_hidden_state = padding.restore(self.encoder(hidden_states, padding))  # (B, T, H)
        last_hidden_state = last_hidden_state.masked_fill(~padding.mask.unsqueeze(-1), 0.0)
        return {"last_hidden_state": last_hidden_state, "pooler_output": self.pooler(last_hidden_state)}
