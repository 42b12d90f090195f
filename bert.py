"""The BERT encoder, written by hand (Devlin et al. 2019, https://arxiv.org/abs/1810.04805).

Parameter names and mathematics are those of Hugging Face's `BertModel`, so checkpoints go both ways. What
differs is how the work is laid out: padding hardly reaches a matrix product. The real word pieces of all
batches are laid end to end as tokens, which is all that embeddings, linear layers, LayerNorm and GELU need;
attention gets the rectangle of (sentence, position) back for its own few operations. kernels/packing.py has a
picture of both.

Layers are called through `linear`, `layer_norm` and `embedding` of kernels/task_grads.py, which also keep the
gradients of tasks apart where a `Packing` says so.

Shapes: B sentences, T padded length in word pieces, M tokens (the word pieces of all
batches, and a little spare padding), H hidden_size, I intermediate_size, N attention heads, D = H // N.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base_bert import BertPreTrainedModel
from config import BertConfig
from kernels.adversarial import AdversarialNoise
from kernels.cpu import CpuAttention, compute_dtype, dropout
from kernels.packing import Packing, Padding, make_paddings
from kernels.static_packing import StaticPacking
from kernels.task_grads import GradTarget, dropout_add_norm, embedding, layer_norm, linear
from support.errors import UserError

# Positions up to which attention is written out on the CPU, where it has been measured. Beyond, the (T, T)
# scores of a single sentence take much memory.
MAX_CPU_WIDTH = 512
# On the CPU the rectangle has at least this many positions: torch's float32 softmax is several times slower
# on rows that fill no vector register.
MIN_WIDTH = 16
ACTIVATIONS = {"gelu": F.gelu, "gelu_new": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}


class BertEmbeddings(nn.Module):
    """The sum of word, position and segment embeddings, normalised."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout_prob = config.hidden_dropout_prob

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        token_type_ids: Tensor,
        packing: Packing,
        add_noise: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        embeddings = embedding(input_ids, packing, self.word_embeddings)  # (M,) -> (M, H)
        embeddings = embeddings + embedding(position_ids, packing, self.position_embeddings)
        embeddings = embeddings + embedding(token_type_ids, packing, self.token_type_embeddings)
        if add_noise:
            embeddings = add_noise(embeddings)
        embeddings = layer_norm(embeddings, packing, self.LayerNorm)
        # From here on hidden states are in autocast's type, or every operation would convert them again.
        return dropout(embeddings, self.dropout_prob, self.training).to(compute_dtype(embeddings))


class BertSelfAttention(nn.Module):
    """softmax(query key^T / sqrt(D)) value for each head, within each sentence."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout_prob = config.attention_probs_dropout_prob

    def forward(self, hidden_states: Tensor, packing: Packing, paddings: Sequence[Padding]) -> Tensor:
        # One product instead of three: large matrices keep the processor busier.
        qkv = linear(hidden_states, packing, self.query, self.key, self.value)  # (M, H) -> (M, 3 * H)
        dropout_prob = self.dropout_prob if self.training else 0.0
        if packing.is_static:
            return packing.attention(qkv, self.num_attention_heads, dropout_prob)
        if qkv.device.type == "cpu" and max(padding.mask.shape[1] for padding in paddings) <= MAX_CPU_WIDTH:
            with torch.autocast("cpu", enabled=False):  # it chooses its own types
                return CpuAttention.apply(qkv, packing, paddings, self.num_attention_heads, dropout_prob)
        contexts = []
        for tokens, padding in zip(packing.batches, paddings, strict=True):
            heads = padding.restore(qkv[tokens]).unflatten(-1, (3, self.num_attention_heads, -1))
            query, key, value = heads.permute(2, 0, 3, 1, 4)  # (B, T, 3, N, D) -> (B, N, T, D) each
            context = F.scaled_dot_product_attention(
                query, key, value, attn_mask=padding.key_mask, dropout_p=dropout_prob
            )  # (B, N, T, D)
            contexts.append(padding.remove(context.transpose(1, 2).flatten(2)))  # the batch's tokens, H
        return torch.cat(contexts)  # (M, H)


class BertOutput(nn.Module):
    """Projection back to the residual stream, used after attention and after the feed-forward layer."""

    def __init__(self, input_size: int, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(input_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout_prob = config.hidden_dropout_prob

    def forward(self, x: Tensor, residual: Tensor, packing: Packing) -> Tensor:
        x = linear(x, packing, self.dense)  # (M, H) or (M, I) -> (M, H)
        # BERT normalises after the sum; most later models normalise before the layer.
        dropout_prob = self.dropout_prob if self.training else 0.0
        return dropout_add_norm(x, residual, packing, self.LayerNorm, dropout_prob)


class BertAttention(nn.Module):
    """Self-attention and its projection."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertOutput(config.hidden_size, config)

    def forward(self, hidden_states: Tensor, packing: Packing, paddings: Sequence[Padding]) -> Tensor:
        context = self.self(hidden_states, packing, paddings)  # (M, H) -> (M, H)
        return self.output(context, hidden_states, packing)  # (M, H)


class BertIntermediate(nn.Module):
    """The feed-forward layer's first half."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, hidden_states: Tensor, packing: Packing) -> Tensor:
        return self.activation(linear(hidden_states, packing, self.dense))  # (M, H) -> (M, I)


class BertLayer(nn.Module):
    """One Transformer layer: attention, then feed-forward."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config.intermediate_size, config)

    def forward(self, hidden_states: Tensor, packing: Packing, paddings: Sequence[Padding]) -> Tensor:
        hidden_states = self.attention(hidden_states, packing, paddings)  # (M, H) -> (M, H)
        intermediate = self.intermediate(hidden_states, packing)  # (M, H) -> (M, I)
        return self.output(intermediate, hidden_states, packing)  # (M, I) -> (M, H)


class BertEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden_states: Tensor, packing: Packing, paddings: Sequence[Padding]) -> Tensor:
        for layer in self.layer:
            hidden_states = layer(hidden_states, packing, paddings)  # (M, H) -> (M, H)
        return hidden_states


class BertPooler(nn.Module):
    """A dense layer and tanh on [CLS]."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, first_states: Tensor, packing: Packing) -> Tensor:
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
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Encode a batch of sentences or of joint pairs.

        Args:
            input_ids: (B, T) integers in [0, vocab_size); T is at most max_position_embeddings.
            attention_mask: (B, T), 1 for real word pieces and 0 for padding, wherever it stands; None means
                no padding. With a GPU it is better left on the host, which lays out the word pieces.
            token_type_ids: (B, T), 0 for the first segment and 1 for the second; None means all 0.

        Returns:
            `last_hidden_state` (B, T, H), zeros at padding, and `pooler_output` (B, H).

        Raises:
            ValueError: if T exceeds max_position_embeddings, or there is no sentence or no position.
        """
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        token_type_ids = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        return self.encode([(input_ids, attention_mask, token_type_ids)])[0]

    def encode(
        self,
        batches: Sequence[tuple[Tensor, Tensor, Tensor]],
        task_numbers: Sequence[int] | None = None,
        targets: Mapping[int, GradTarget] | None = None,
        noise: AdversarialNoise | None = None,
    ) -> list[dict[str, Tensor]]:
        """Encode several batches of different lengths in one pass.

        Args:
            batches: of each `input_ids`, `attention_mask`, `token_type_ids`, as `forward` takes them.
            task_numbers: of each batch the number of its task, to keep the gradients of tasks apart; None for
                ordinary gradients.
            targets: where gradients by task go, `FlatMemory.targets`; needed with `task_numbers`.
            noise: added to the embeddings; None for nothing.

        Returns:
            for each batch what `forward` returns.
        """
        if not batches:
            raise ValueError("batches is empty; expected at least one")
        for input_ids, _, _ in batches:
            if input_ids.ndim != 2 or not input_ids.numel():
                raise ValueError(
                    f"input_ids has shape {tuple(input_ids.shape)}; expected (B, T), sentences and positions,"
                    " at least one of each"
                )
            if input_ids.shape[1] > self.config.max_position_embeddings:
                raise ValueError(
                    f"input_ids has {input_ids.shape[1]} positions; this encoder was built for at most"
                    f" {self.config.max_position_embeddings} (max_position_embeddings)"
                )

        # 1. Lay the word pieces of all batches end to end.
        device = batches[0][0].device
        paddings = [padding.to(device) for padding in make_paddings([mask for _, mask, _ in batches])]
        packing = Packing([padding.num_tokens for padding in paddings], task_numbers, targets)

        def pack(tensors: Sequence[Tensor]) -> Tensor:
            """(B, T) of each batch -> (M,)"""
            pairs = zip(tensors, paddings, strict=True)
            return torch.cat([padding.remove(tensor) for tensor, padding in pairs])

        input_ids, _, token_type_ids = zip(*batches, strict=True)
        position_ids = [torch.arange(ids.shape[1], device=ids.device).expand_as(ids) for ids in input_ids]

        # 2. All layers, on tokens.
        ids = (pack(input_ids), pack(position_ids), pack(token_type_ids))
        hidden_states = self.embeddings(*ids, packing, noise and partial(noise.add, paddings=paddings))
        rectangles = paddings
        if hidden_states.device.type == "cpu":
            rectangles = [padding.widen(MIN_WIDTH) for padding in paddings]
        hidden_states = self.encoder(hidden_states, packing, rectangles)  # (M, H)
        hidden_states = hidden_states.to(next(self.parameters()).dtype)  # float32 for pooling and heads

        # 3. Back to a rectangle for each batch.
        outputs = []
        for k, (tokens, padding) in enumerate(zip(packing.batches, paddings, strict=True)):
            last_hidden_state = padding.restore(hidden_states[tokens])  # (B, T, H)
            # Padding that was kept among the tokens went through the layers too.
            last_hidden_state = last_hidden_state.masked_fill(~padding.mask.unsqueeze(-1), 0.0)
            # Computed always, as Hugging Face does: one small product. For it each sentence is one token.
            sentences = Packing([len(padding.mask)], task_numbers and [task_numbers[k]], targets)
            pooler_output = self.pooler(last_hidden_state[:, 0], sentences)  # (B, H)
            outputs.append({"last_hidden_state": last_hidden_state, "pooler_output": pooler_output})
        return outputs

    def encode_static(self, packing: StaticPacking) -> list[tuple[dict[str, Tensor], Tensor]]:
        """`encode` for the rows of a step of static shape: of each draw its outputs and its mask (R, T)."""
        hidden_states = self.embeddings(
            packing.input_ids, packing.position_ids, packing.token_type_ids, packing
        )
        hidden_states = self.encoder(hidden_states, packing, ())  # (M, H)
        outputs = []
        rectangles = packing.rectangles(hidden_states.to(next(self.parameters()).dtype))
        for draw, (last_hidden_state, mask) in zip(packing.shape.draws, rectangles, strict=True):
            sentences = Packing([draw.num_sequences], packing.targets and [draw.task], packing.targets)
            pooler_output = self.pooler(last_hidden_state[:, 0], sentences)  # (R, H)
            outputs.append(({"last_hidden_state": last_hidden_state, "pooler_output": pooler_output}, mask))
        return outputs

    def table_params(self) -> list[nn.Parameter]:
        """The embedding tables, in the order of `kernels.static.TABLES`."""
        tables = self.embeddings
        return [
            table.weight
            for table in (tables.word_embeddings, tables.position_embeddings, tables.token_type_embeddings)
        ]

    def word_embeddings(self) -> nn.Parameter:
        return self.embeddings.word_embeddings.weight  # (V, H)

    def linear_groups(self) -> list[tuple[nn.Linear, ...]]:
        """The encoder's linear layers; those that are computed in one product form one group.

        `linear` finds the place of a group's gradients by its first layer: same layers, same order there.
        """
        groups = []
        for layer in self.encoder.layer:
            attention = layer.attention.self
            groups += [(attention.query, attention.key, attention.value), (layer.attention.output.dense,)]
            groups += [(layer.intermediate.dense,), (layer.output.dense,)]
        return [*groups, (self.pooler.dense,)]
