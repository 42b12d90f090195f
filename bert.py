"""The BERT encoder, written by hand (Devlin et al. 2019, https://arxiv.org/abs/1810.04805).

Parameter names and mathematics are those of Hugging Face's `BertModel`, so checkpoints go both ways. The
one difference is in how the work is laid out: padding hardly reaches a matrix product. Embeddings, linear
layers, LayerNorm and GELU see the real word pieces of the batch, laid end to end; attention alone needs
the rectangle of (sentence, position), and gets it back for its own few operations.

Shapes: B sentences, T padded length in word pieces, M rows of the flat layout (M = B * T without padding),
H hidden_size, N attention heads, D = H // N.
"""

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from base_bert import BertPreTrainedModel
from config import BertConfig, UserError
from direct_grads import Packing, embedding, layer_norm, linear

# Matrix libraries prepare each shape they have not met before; few different row counts make that rare.
ROW_MULTIPLE = 32
MAX_CPU_WIDTH = (
    256  # positions; beyond, the (T, T) scores that training keeps cost more memory than the speed is worth
)
MIN_WIDTH = 16  # torch's float32 softmax is several times slower on rows that fill no vector register
ACTIVATIONS = {"gelu": F.gelu, "gelu_new": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}


def keep_mask(shape: torch.Size, p: float, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
    """On the CPU: zeros with probability `p`, else ones; and what to multiply the kept elements by.

    Torch draws one number at a time, which takes longer than the matrix products around it. Here each 64-bit draw
    decides four elements, so `p` is rounded to a multiple of 2**-16. The seed comes from torch's global generator.
    """
    num_elements = math.prod(shape)
    seed = int(torch.empty((), dtype=torch.int64).random_())
    draws = np.random.SFC64(seed).random_raw((num_elements + 3) // 4)
    lanes = torch.from_numpy(draws.view(np.int16))[:num_elements].view(shape)  # uniform, -2**15 .. 2**15 - 1
    dropped = min(round(p * 2**16), 2**16 - 1)  # p < 1: something is always kept
    keep = torch.ge(lanes, dropped - 2**15, out=torch.empty(shape, dtype=dtype))
    return keep, 2**16 / (2**16 - dropped)


def dropout(x: torch.Tensor, p: float, training: bool, residual: torch.Tensor | None = None) -> torch.Tensor:
    """Zero each element with probability `p` and scale the rest by 1 / (1 - p); then add `residual`, if given."""
    if not training or p == 0:
        return x if residual is None else residual + x
    if x.device.type != "cpu":
        return F.dropout(x, p) if residual is None else residual + F.dropout(x, p)
    keep, scale = keep_mask(x.shape, p, x.dtype)
    return x * keep.mul_(scale) if residual is None else torch.addcmul(residual, x, keep, value=scale)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """What matrix products on this device run in: autocast's type, or the tensor's own."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


class Padding:
    """Where the real word pieces of a padded batch are; moves hidden states between the two layouts.

    Args:
        attention_mask: (B, T), non-zero for real word pieces.
        num_spare: padding to keep among the rows, if there is so much.
    """

    def __init__(self, attention_mask: torch.Tensor, num_spare: int = 0):
        self.mask = attention_mask.bool()
        self.rows = self.key_mask = None
        if not self.mask.all():
            kept = self.mask.flatten().clone()
            # A sentence without any real word piece has nothing to attend to: its softmax is not a number.
            spare = (~self.mask & self.mask.any(1, keepdim=True)).flatten().nonzero().squeeze(1)
            kept[spare[:num_spare]] = True
            self.rows = kept.nonzero().squeeze(1)  # (M,) positions in B * T
            self.key_mask = self.mask[:, None, None, :]  # (B, 1, 1, T), True = attend

    @property
    def num_rows(self) -> int:
        return self.mask.numel() if self.rows is None else len(self.rows)

    def widen(self, width: int) -> "Padding":
        """The same rows in a rectangle of at least this many positions."""
        num_positions = self.mask.shape[1]
        if num_positions >= width:
            return self
        wide = Padding.__new__(Padding)
        rows = torch.arange(self.mask.numel(), device=self.mask.device) if self.rows is None else self.rows
        wide.mask = F.pad(self.mask, (0, width - num_positions))
        wide.rows = rows // num_positions * width + rows % num_positions
        wide.key_mask = wide.mask[:, None, None, :]
        return wide

    @cached_property
    def sources(self) -> torch.Tensor:
        """(B * T,) the row of the flat layout for each position; for padding the first one, as good as any."""
        sources = torch.zeros_like(self.mask.flatten(), dtype=torch.long)
        return sources.index_copy_(0, self.rows, torch.arange(len(self.rows), device=self.rows.device))

    @cached_property
    def key_bias(self) -> torch.Tensor:
        """(B, 1, 1, T) what is added to attention scores: 0, and minus infinity at padding."""
        return torch.zeros(self.key_mask.shape).masked_fill_(~self.key_mask, float("-inf"))

    def remove(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, ...) -> (M, ...)"""
        x = x.flatten(0, 1)
        return x if self.rows is None else x.index_select(0, self.rows)

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """(M, H) -> (B, T, H), zeros at padding that is not among the rows."""
        if self.rows is not None:
            x = x.new_zeros(self.mask.numel(), x.shape[-1]).index_copy(0, self.rows, x)
        return x.view(*self.mask.shape, -1)

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """As `restore`, faster, with something finite at padding."""
        if self.rows is None or not len(self.rows):
            return self.restore(x)
        return x.index_select(0, self.sources).view(*self.mask.shape, -1)


def make_paddings(attention_masks: Sequence[torch.Tensor]) -> list[Padding]:
    """A `Padding` for each mask; with some padding kept in the last one, the rows are a multiple of ROW_MULTIPLE."""
    num_real = sum(int(mask.count_nonzero()) for mask in attention_masks)
    *others, last = attention_masks
    return [*map(Padding, others), Padding(last, -num_real % ROW_MULTIPLE)]


class CpuAttention(torch.autograd.Function):
    """Attention over short sentences on a CPU: few operations on contiguous tensors, the softmax in float32.

    Torch's fused kernel with dropout takes 2.5 to 3 times as long to train with (bfloat16, 32 to 512 positions, two
    cores). Automatic differentiation of the same lines copies more.

    Takes query, key and value side by side, (M, 3 * H), with the `Padding` of each batch in `packing`; gives the
    context, (M, H).
    """

    @staticmethod
    def forward(ctx, qkv, packing, paddings, num_heads: int, dropout_prob: float):
        ctx.packing, ctx.paddings, ctx.num_heads = packing, paddings, num_heads
        context = qkv.new_empty(len(qkv), qkv.shape[1] // 3)  # (M, H)
        saved = []
        for rows, padding in zip(packing.batches, paddings, strict=True):
            heads = padding.spread(qkv[rows]).unflatten(-1, (3, num_heads, -1))  # (B, T, 3, N, D)
            heads = heads.permute(2, 0, 3, 1, 4).contiguous().flatten(1, 2)  # (3, B * N, T, D)
            query, key, value = heads
            wide = torch.promote_types(qkv.dtype, torch.float32)
            scores = torch.bmm(query, key.transpose(1, 2)).to(wide)  # (B * N, T, T)
            scores.mul_(query.shape[-1] ** -0.5)
            if padding.key_mask is not None:
                scores.unflatten(0, (-1, num_heads)).add_(padding.key_bias)
            probs, keep = scores.softmax(-1), None
            if dropout_prob:
                keep, keep_scale = keep_mask(probs.shape, dropout_prob, probs.dtype)
                keep.mul_(keep_scale)
            kept = (probs if keep is None else probs * keep).to(qkv.dtype)
            attended = torch.bmm(kept, value).unflatten(0, (-1, num_heads))  # (B, N, T, D)
            context[rows] = padding.remove(attended.transpose(1, 2).flatten(2))
            if ctx.needs_input_grad[0]:
                saved += [heads, probs, keep, kept]
        ctx.save_for_backward(*saved)
        return context

    @staticmethod
    def backward(ctx, dcontext):
        saved, num_heads = ctx.saved_tensors, ctx.num_heads
        dqkv = dcontext.new_empty(len(dcontext), 3 * dcontext.shape[1])  # (M, 3 * H)
        for i, (rows, padding) in enumerate(zip(ctx.packing.batches, ctx.paddings, strict=True)):
            heads, probs, keep, kept = saved[4 * i : 4 * i + 4]
            query, key, value = heads
            # Zeros at padding: what is computed from it reaches nothing.
            dattended = padding.restore(dcontext[rows]).unflatten(-1, (num_heads, -1))  # (B, T, N, D)
            dattended = dattended.transpose(1, 2).flatten(0, 1)  # (B * N, T, D)
            dheads = torch.empty_like(heads)
            dquery, dkey, dvalue = dheads
            torch.bmm(kept.transpose(1, 2), dattended, out=dvalue)
            dprobs = torch.bmm(dattended, value.transpose(1, 2)).to(probs.dtype)
            if keep is not None:
                dprobs.mul_(keep)
            dscores = torch._softmax_backward_data(dprobs, probs, -1, probs.dtype)
            dscores = dscores.mul_(query.shape[-1] ** -0.5).to(heads.dtype)
            torch.bmm(dscores, key, out=dquery)
            torch.bmm(dscores.transpose(1, 2), query, out=dkey)
            dheads = dheads.unflatten(1, (-1, num_heads)).permute(1, 3, 0, 2, 4)  # (B, T, 3, N, D)
            dqkv[rows] = padding.remove(dheads.flatten(2))
        return dqkv, None, None, None, None


class BertEmbeddings(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout_prob = config.hidden_dropout_prob

    def forward(self, input_ids, position_ids, token_type_ids, packing):
        embeddings = embedding(input_ids, packing, self.word_embeddings)  # (M,) -> (M, H)
        embeddings = embeddings + embedding(position_ids, packing, self.position_embeddings)
        embeddings = embeddings + embedding(token_type_ids, packing, self.token_type_embeddings)
        embeddings = layer_norm(embeddings, packing, self.LayerNorm)
        return dropout(embeddings, self.dropout_prob, self.training).to(compute_dtype(embeddings))


class BertSelfAttention(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout_prob = config.attention_probs_dropout_prob

    def forward(self, hidden_states, packing, paddings):
        qkv = linear(hidden_states, packing, self.query, self.key, self.value)  # (M, H) -> (M, 3 * H)
        dropout_prob = self.dropout_prob if self.training else 0.0
        if qkv.device.type == "cpu" and max(padding.mask.shape[1] for padding in paddings) <= MAX_CPU_WIDTH:
            with torch.autocast("cpu", enabled=False):  # it chooses its own types
                return CpuAttention.apply(qkv, packing, paddings, self.num_attention_heads, dropout_prob)
        contexts = []
        for rows, padding in zip(packing.batches, paddings, strict=True):
            heads = padding.restore(qkv[rows]).unflatten(-1, (3, self.num_attention_heads, -1))
            query, key, value = heads.permute(2, 0, 3, 1, 4)  # (B, T, 3, N, D) -> (B, N, T, D) each
            context = F.scaled_dot_product_attention(
                query, key, value, attn_mask=padding.key_mask, dropout_p=dropout_prob
            )
            contexts.append(padding.remove(context.transpose(1, 2).flatten(2)))  # (M, H)
        return torch.cat(contexts)


class BertOutput(nn.Module):
    """Projection back to the residual stream, used after attention and after the feed-forward layer."""

    def __init__(self, input_size: int, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(input_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout_prob = config.hidden_dropout_prob

    def forward(self, x, residual, packing):
        x = dropout(linear(x, packing, self.dense), self.dropout_prob, self.training, residual)
        return layer_norm(x, packing, self.LayerNorm)  # (M, H): BERT normalises after the sum


class BertAttention(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertOutput(config.hidden_size, config)

    def forward(self, hidden_states, packing, paddings):
        return self.output(self.self(hidden_states, packing, paddings), hidden_states, packing)


class BertIntermediate(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, hidden_states, packing):
        return self.activation(linear(hidden_states, packing, self.dense))  # (M, H) -> (M, intermediate_size)


class BertLayer(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config.intermediate_size, config)

    def forward(self, hidden_states, packing, paddings):
        hidden_states = self.attention(hidden_states, packing, paddings)
        return self.output(self.intermediate(hidden_states, packing), hidden_states, packing)


class BertEncoder(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden_states, packing, paddings):
        for layer in self.layer:
            hidden_states = layer(hidden_states, packing, paddings)
        return hidden_states


class BertPooler(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, first_states, packing):
        return linear(first_states, packing, self.dense).tanh()  # (B, H) -> (B, H)


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
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        token_type_ids = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        return self.encode([(input_ids, attention_mask, token_type_ids)])[0]

    def encode(
        self,
        batches: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
        tasks: list[int] | None = None,
    ) -> list[dict[str, torch.Tensor]]:
        """Encode several batches of different lengths in one pass.

        Args:
            batches: of each `input_ids`, `attention_mask`, `token_type_ids`, as `forward` takes them.
            tasks: of each batch the number of its task, to keep the gradients of tasks apart (see `direct_grads`;
                the parameters live in a `FlatMemory`); None for ordinary gradients.

        Returns:
            for each batch what `forward` returns.
        """
        for input_ids, _, _ in batches:
            if input_ids.shape[1] > self.config.max_position_embeddings:
                raise ValueError(
                    f"input_ids has {input_ids.shape[1]} positions; this encoder was built for at most"
                    f" {self.config.max_position_embeddings} (max_position_embeddings)"
                )
        paddings = make_paddings([attention_mask for _, attention_mask, _ in batches])
        packing = Packing([padding.num_rows for padding in paddings], tasks)

        def pack(tensors):
            pairs = zip(tensors, paddings, strict=True)
            return torch.cat([padding.remove(tensor) for tensor, padding in pairs])  # (M,)

        input_ids, _, token_type_ids = zip(*batches, strict=True)
        position_ids = [torch.arange(ids.shape[1], device=ids.device).expand_as(ids) for ids in input_ids]
        hidden_states = self.embeddings(pack(input_ids), pack(position_ids), pack(token_type_ids), packing)
        wide = [
            padding.widen(MIN_WIDTH) if hidden_states.device.type == "cpu" else padding
            for padding in paddings
        ]
        hidden_states = self.encoder(hidden_states, packing, wide).to(self.word_embeddings().dtype)  # (M, H)
        outputs = []
        for k, (rows, padding) in enumerate(zip(packing.batches, paddings, strict=True)):
            last_hidden_state = padding.restore(hidden_states[rows])  # (B, T, H)
            last_hidden_state = last_hidden_state.masked_fill(~padding.mask.unsqueeze(-1), 0.0)
            one = Packing([len(padding.mask)], tasks and [tasks[k]])
            pooler_output = self.pooler(last_hidden_state[:, 0], one)
            outputs.append({"last_hidden_state": last_hidden_state, "pooler_output": pooler_output})
        return outputs

    def word_embeddings(self) -> nn.Parameter:
        return self.embeddings.word_embeddings.weight

    def linear_groups(self) -> list[tuple[nn.Linear, ...]]:
        """The linear layers of the encoder, those that share a product together."""
        groups = []
        for layer in self.encoder.layer:
            attention = layer.attention.self
            groups += [(attention.query, attention.key, attention.value), (layer.attention.output.dense,)]
            groups += [(layer.intermediate.dense,), (layer.output.dense,)]
        return [*groups, (self.pooler.dense,)]
