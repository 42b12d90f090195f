"""Masked language modelling: which word pieces are hidden, and the head that guesses them.

Masking as in BERT (Devlin et al. 2019, https://arxiv.org/abs/1810.04805), drawn anew for every batch.

Shapes: B sentences, T padded length in word pieces, H hidden_size, V vocab_size, M masked positions of a
batch.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from base_bert import check_shape, copy_weight, encoder_tensors, read_tensors, resolve_pretrained
from bert import ACTIVATIONS, BertModel
from datasets import TokenArrays
from support.errors import UserError
from tokenizer import SPECIAL_TOKENS, BertTokenizer

HEAD_PREFIX = "cls.predictions."  # of the head's weights in Hugging Face's checkpoints


def mask_tokens(
    input_ids: torch.Tensor,
    is_word: torch.Tensor,
    mask_token_id: int,
    mlm_prob: float,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose positions to predict: 80 % become [MASK], 10 % a random word piece, 10 % stay as they are.

    Args:
        input_ids: (B, T) int64, on the CPU.
        is_word: (V,) bool, False for special tokens, which are neither chosen nor put in.
        mlm_prob: probability of each word piece to be chosen, in (0, 1). At least one is, whatever the draw.

    Returns:
        the masked copy of `input_ids` and which positions are to be predicted, bool, both (B, T).

    Raises:
        ValueError: if there are special tokens only.
    """
    candidates = is_word[input_ids]
    if not candidates.any():
        raise ValueError("input_ids holds special tokens only; expected at least one other word piece")
    draws = torch.rand(input_ids.shape, generator=generator)
    chosen = candidates & ((draws < mlm_prob) | (draws == draws[candidates].min()))
    action = torch.rand(input_ids.shape, generator=generator)
    words = is_word.nonzero().squeeze(1)
    random_words = words[torch.randint(len(words), input_ids.shape, generator=generator)]
    masked = torch.where(chosen & (action < 0.8), mask_token_id, input_ids)
    return torch.where(chosen & (action >= 0.8) & (action < 0.9), random_words, masked), chosen


class MaskedText:
    """Tokenized sentences, each with at least one word piece to mask; `batch` masks them.

    Raises:
        UserError: if no sentence is left.
    """

    def __init__(self, sentences: list[str], tokenizer: BertTokenizer, max_length: int, mlm_prob: float):
        special = tokenizer.encode(" ".join(SPECIAL_TOKENS))["input_ids"]
        self.is_word = torch.ones(len(tokenizer), dtype=torch.bool)
        self.is_word[special] = False
        self.tokenizer, self.mlm_prob = tokenizer, mlm_prob
        encodings = tokenizer.encode_batch(sentences, max_length)
        encodings = [encoding for encoding in encodings if set(encoding["input_ids"]).difference(special)]
        if not encodings:
            raise UserError(f"--data_dir: {len(sentences)} sentences, none with a word piece to mask")
        self.sequences = TokenArrays.from_encodings(encodings)
        self.lengths = self.sequences.lengths

    def batch(self, rows: np.ndarray, seed: int) -> dict[str, torch.Tensor]:
        """`input_ids` (masked), `attention_mask`, `chosen`, all (B, T), and `labels` (M,)."""
        padded = self.sequences.pad(rows, self.tokenizer.pad_token_id)
        mask_token_id, generator = self.tokenizer.mask_token_id, torch.Generator().manual_seed(seed)
        masked, chosen = mask_tokens(
            padded["input_ids"], self.is_word, mask_token_id, self.mlm_prob, generator
        )
        batch = {"input_ids": masked, "attention_mask": padded["attention_mask"], "chosen": chosen}
        return batch | {"labels": padded["input_ids"][chosen]}


class BertForMaskedLM(nn.Module):
    """The encoder and BERT's prediction head, whose last matrix is the word embedding itself.

    `predictions` has Hugging Face's parameter names. The pooler has no part in this and is frozen.
    """

    def __init__(self, bert: BertModel):
        super().__init__()
        config = bert.config
        self.bert = bert
        bert.pooler.requires_grad_(False)
        dense = nn.Linear(config.hidden_size, config.hidden_size)
        nn.init.normal_(dense.weight, std=config.initializer_range)
        nn.init.zeros_(dense.bias)
        layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.predictions = nn.Module()
        self.predictions.transform = nn.ModuleDict({"dense": dense, "LayerNorm": layer_norm})
        self.predictions.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, chosen: torch.Tensor
    ) -> torch.Tensor:
        """Float32 logits (M, V) at the M chosen positions only; all arguments are (B, T)."""
        hidden_states = self.bert(input_ids, attention_mask)["last_hidden_state"][chosen]  # (M, H)
        transform = self.predictions.transform
        hidden_states = transform["LayerNorm"](self.activation(transform["dense"](hidden_states)))
        word_embeddings = self.bert.embeddings.word_embeddings.weight  # (V, H)
        return F.linear(hidden_states, word_embeddings, self.predictions.bias).float()

    def loss(self, batch: dict[str, torch.Tensor], reduction: str = "mean") -> torch.Tensor:
        """Cross-entropy over the chosen positions of a `MaskedText.batch`, in nats."""
        logits = self(batch["input_ids"], batch["attention_mask"], batch["chosen"])
        return F.cross_entropy(logits, batch["labels"], reduction=reduction)


def load_head(model: BertForMaskedLM, name: str) -> str:
    """Take the head's weights from the checkpoint `name` as far as it has them; the line says which.

    Raises:
        UserError: if one has another shape than the encoder asks for, or is not finite.
    """
    folder = resolve_pretrained(name)
    stored = encoder_tensors(read_tensors(folder), folder)
    expected = model.predictions.state_dict()
    found = {key: stored[HEAD_PREFIX + key] for key in expected if HEAD_PREFIX + key in stored}
    for key, tensor in found.items():
        check_shape(name, HEAD_PREFIX + key, tensor, tuple(expected[key].shape))
        copy_weight(name, HEAD_PREFIX + key, tensor, expected[key])
    new = [key for key in expected if key not in found]
    return f"{len(found)} of {len(expected)} weights loaded" + (f"; new: {', '.join(new)}" if new else "")
