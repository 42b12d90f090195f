"""Text to word pieces: a thin layer over the `tokenizers` library (https://huggingface.co/docs/tokenizers).

With the same vocabulary and case, the result is exactly that of Hugging Face's BERT tokenizer, for single
sentences and for joint pairs (`[CLS] a [SEP] b [SEP]` with segment ids, the longer sentence cut first).
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from base_bert import resolve_pretrained, warn_once
from support.bars import Bar
from support.errors import UserError, quote
from support.files import read_bytes, read_json

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ENCODED_AT_ONCE = 8192  # texts; enough for all cores, few enough for a bar
MAX_ID = 2**22  # eight times the largest word-piece vocabulary that we know
# What the parts of a tokenizer.json must say, if they say it at all, to mean what this file does.
EXPECTED_PARTS = {
    "model": {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
    },
    "normalizer": {"type": "BertNormalizer"},
    "pre_tokenizer": {"type": "BertPreTokenizer"},
}
# What a checkpoint may choose -> its name in the normalizer of a tokenizer.json, and what holds if nothing
# tells it.
CHOICES = {
    "do_lower_case": ("lowercase", True),
    "strip_accents": ("strip_accents", None),
    "tokenize_chinese_chars": ("handle_chinese_chars", True),
}


class BertTokenizer:
    """Word-piece tokenizer of one checkpoint.

    Args:
        vocab: word piece -> id, the special tokens included.
        do_lower_case: lower-case the text (uncased checkpoints).
        strip_accents: None means as `do_lower_case`.
        tokenize_chinese_chars: each Chinese character is a word.
        max_length: longest sequence in word pieces, special tokens included, when a call names none.
    """

    def __init__(
        self,
        vocab: dict[str, int],
        do_lower_case: bool = True,
        max_length: int = 512,
        strip_accents: bool | None = None,
        tokenize_chinese_chars: bool = True,
    ):
        absent = [token for token in SPECIAL_TOKENS if token not in vocab]
        if absent:
            raise UserError(f"vocabulary lacks the special token {absent[0]}")
        self.do_lower_case, self.strip_accents = do_lower_case, strip_accents
        self.tokenize_chinese_chars = tokenize_chinese_chars
        self.max_length = max_length
        self.pad_token_id = vocab["[PAD]"]
        self.cls_token_id, self.sep_token_id = vocab["[CLS]"], vocab["[SEP]"]
        self.mask_token_id, self.unk_token_id = vocab["[MASK]"], vocab["[UNK]"]
        self._tokenizer = Tokenizer(WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
        self._tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
        self._tokenizer.normalizer = BertNormalizer(
            lowercase=do_lower_case,
            strip_accents=strip_accents,
            handle_chinese_chars=tokenize_chinese_chars,
        )
        self._tokenizer.pre_tokenizer = BertPreTokenizer()
        self._tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", self.cls_token_id), ("[SEP]", self.sep_token_id)],
        )

    @classmethod
    def from_pretrained(cls, name: str | Path, max_length: int = 512) -> "BertTokenizer":
        """Read a checkpoint's `tokenizer.json`, or else its `vocab.txt` and `tokenizer_config.json`.

        What `tokenizer.json` says of case is believed, with a warning where `tokenizer_config.json` differs.
        Hugging Face's BertTokenizer takes only the vocabulary from it, and lower-cases unless
        `tokenizer_config.json` says not to, which makes [UNK] of every capital that a cased encoder knows.

        Args:
            name: see `base_bert.resolve_pretrained`.

        Raises:
            UserError: if there is no vocabulary, or it is not one of word pieces.
        """
        folder = resolve_pretrained(str(name))
        # lexists: a broken link or a pipe is refused, not passed over.
        settings, normalizer = {}, {}
        if os.path.lexists(settings_path := folder / "tokenizer_config.json"):
            settings = read_json(settings_path)
        if os.path.lexists(path := folder / "tokenizer.json"):
            vocab, normalizer = read_tokenizer_json(path)
        elif os.path.lexists(path := folder / "vocab.txt"):
            vocab = read_vocab(path)
        else:
            raise UserError(f"--pretrained {name}: {folder} holds neither vocab.txt nor tokenizer.json")
        warn_of_added_tokens(settings.get("added_tokens_decoder"), vocab, settings_path)
        choices = {}
        for key, (json_key, default) in CHOICES.items():
            sources = [(path, json_key, normalizer), (settings_path, key, settings)]
            choices[key] = choose([source for source in sources if source[1] in source[2]], default)
        if "lowercase" not in normalizer and "do_lower_case" not in settings:
            warn_of_capitals(vocab, path)
        try:
            return cls(vocab, max_length=max_length, **choices)
        except UserError as error:  # a special token is missing
            raise UserError(f"{path}: {error}") from None

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `vocab.txt` and `tokenizer_config.json`, which Hugging Face's tokenizer reads too."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        lines = [f"[unused id {index}]" for index in range(len(self))]  # a line's number is its piece's id
        for token, index in vocab.items():
            lines[index] = token
        (folder / "vocab.txt").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        settings = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": self.do_lower_case,
            "strip_accents": self.strip_accents,
            "tokenize_chinese_chars": self.tokenize_chinese_chars,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings) + "\n", encoding="utf-8")

    def settings(self) -> str:
        """Everything that decides which ids a text gets, including the vocabulary."""
        return self._tokenizer.to_str()

    def __len__(self) -> int:
        """Number of word pieces: the smallest vocab_size of an encoder that covers every id."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def __call__(
        self,
        text: str | Sequence[str],
        text_pair: str | Sequence[str] | None = None,
        *,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
    ) -> dict[str, list | Tensor]:
        """One text or several, in the way of Hugging Face's tokenizers and of the course's code.

        Args:
            text: a sentence, or B of them.
            text_pair: the second sentences of joint pairs, in the same form.
            padding: True or "longest": to the longest sequence; "max_length": to `max_length`.
            truncation: cut sequences to `max_length`, which by default is the tokenizer's own.
            return_tensors: "pt" for tensors (B, T), also of a single sentence; None for lists.

        Returns:
            `input_ids`, `token_type_ids`, and `attention_mask` (1 for word pieces, 0 for padding).

        Raises:
            ValueError: for arguments that contradict each other or that this tokenizer does not know.
        """
        if padding not in (True, False, "longest", "max_length") or return_tensors not in (None, "pt"):
            raise ValueError(
                f"padding is {padding!r}, return_tensors {return_tensors!r}; expected True, False, 'longest'"
                " or 'max_length', and None or 'pt'"
            )
        is_single = isinstance(text, str)
        if text_pair is not None and isinstance(text_pair, str) != is_single:
            raise ValueError("text is one sentence and text_pair several, or the other way round")
        texts, limit = [text] if is_single else list(text), max_length or self.max_length
        cut_at = limit if truncation else sys.maxsize
        if text_pair is None:
            encodings = self.encode_batch(texts, cut_at)
        else:
            pairs = zip(texts, [text_pair] if is_single else text_pair, strict=True)
            encodings = self.encode_pair_batch(list(pairs), cut_at)
        longest = max((len(encoding["input_ids"]) for encoding in encodings), default=0)
        width = {False: 0, "max_length": limit}.get(padding, longest)
        columns = {"input_ids": [], "token_type_ids": [], "attention_mask": []}
        for encoding in encodings:
            length = len(encoding["input_ids"])
            rest = max(0, width - length)
            columns["input_ids"].append(encoding["input_ids"] + rest * [self.pad_token_id])
            columns["token_type_ids"].append(encoding["token_type_ids"] + rest * [0])
            columns["attention_mask"].append(length * [1] + rest * [0])
        if return_tensors is None:
            return {name: rows[0] for name, rows in columns.items()} if is_single else columns
        if len({len(row) for row in columns["input_ids"]}) > 1:
            raise ValueError("sequences of different lengths make no tensor; give padding=True")
        return {name: torch.tensor(rows, dtype=torch.long) for name, rows in columns.items()}

    def encode(self, text: str, max_length: int | None = None) -> dict[str, list[int]]:
        """One sentence as `[CLS] text [SEP]`; see `encode_batch`."""
        return self.encode_batch([text], max_length)[0]

    def encode_pair(self, a: str, b: str, max_length: int | None = None) -> dict[str, list[int]]:
        """Two sentences as `[CLS] a [SEP] b [SEP]`; see `encode_pair_batch`."""
        return self.encode_pair_batch([(a, b)], max_length)[0]

    def encode_batch(self, texts: Sequence[str], max_length: int | None = None) -> list[dict[str, list[int]]]:
        """Many sentences at once, on all cores, each as `[CLS] text [SEP]`.

        Args:
            max_length: longest sequence in word pieces, special tokens included.

        Returns:
            for each sentence `input_ids` and `token_type_ids` (all 0), equally long.

        Raises:
            ValueError: if `max_length` leaves no room for the special tokens.
        """
        return self._encode([clean_surrogates(text) for text in texts], max_length, num_special_tokens=2)

    def encode_pair_batch(
        self, pairs: Sequence[tuple[str, str]], max_length: int | None = None
    ) -> list[dict[str, list[int]]]:
        """Many pairs at once, each as `[CLS] a [SEP] b [SEP]` with segment ids 0 and 1; else as
        `encode_batch`.

        The longer sentence of a pair is cut first.
        """
        pairs = [(clean_surrogates(a), clean_surrogates(b)) for a, b in pairs]
        return self._encode(pairs, max_length, num_special_tokens=3)

    def _encode(
        self, inputs: list, max_length: int | None, num_special_tokens: int
    ) -> list[dict[str, list[int]]]:
        max_length = self.max_length if max_length is None else max_length
        if max_length < num_special_tokens:
            raise ValueError(
                f"max_length is {max_length}; the special tokens alone take {num_special_tokens}"
            )
        found = []
        with Bar(len(inputs), " sequences", "tokenizing") as bar:
            for start in range(0, len(inputs), ENCODED_AT_ONCE):
                encodings = self._tokenizer.encode_batch_fast(inputs[start : start + ENCODED_AT_ONCE])
                found += [cut(encoding.ids, encoding.type_ids, max_length) for encoding in encodings]
                bar.update(len(encodings))
        return found


def cut(input_ids: list[int], token_type_ids: list[int], max_length: int) -> dict[str, list[int]]:
    """Shorten one sequence to `max_length`, keeping the special tokens.

    The library's own truncation keeps what it cuts off, and pairs every piece cut from one text with every
    piece cut from the other: minutes and gigabytes for long texts.
    """
    if len(input_ids) > max_length:
        if token_type_ids[-1] == 0:  # [CLS] a [SEP]
            input_ids = input_ids[: max_length - 1] + input_ids[-1:]
            token_type_ids = token_type_ids[:max_length]
        else:  # [CLS] a [SEP] b [SEP]
            start = token_type_ids.index(1)
            length_a, length_b = longest_first(start - 2, len(input_ids) - start - 1, max_length - 3)
            sep = input_ids[-1:]
            input_ids = input_ids[: 1 + length_a] + sep + input_ids[start : start + length_b] + sep
            token_type_ids = [0] * (length_a + 2) + [1] * (length_b + 1)
    return {"input_ids": input_ids, "token_type_ids": token_type_ids}


def longest_first(length_a: int, length_b: int, room: int) -> tuple[int, int]:
    """How much of each of two texts to keep: the longer is cut first, then both; an odd place goes to b."""
    if length_a + length_b <= room:
        return length_a, length_b
    shorter = min(length_a, length_b, room // 2)
    return (room - shorter, shorter) if length_a > length_b else (shorter, room - shorter)


def clean_surrogates(text: str) -> str:
    """Replace lone surrogates, which UTF-8 cannot encode and the Rust library refuses."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def choose(sources: list[tuple[Path, str, dict]], default: bool | None) -> bool | None:
    """The value of a choice: the first source that tells it, with a warning if another one differs.

    Args:
        sources: file, key, and the JSON object that holds the key.
        default: the value if none tells it; where it is None, null is a value too, and tells nothing.

    Raises:
        UserError: if a value is neither true nor false.
    """
    found = []
    for path, key, stored in sources:
        value = stored[key]
        if isinstance(value, bool):
            found.append((f"{path}: {key} is {json.dumps(value)}", value))
        elif value is not None or default is not None:
            raise UserError(f"{path}: {key} is {quote(value)}; expected true or false")
    for text, value in found[1:]:
        if value != found[0][1]:
            warn_once(f"{found[0][0]}, which goes before {text}")
    return found[0][1] if found else default


def warn_of_capitals(vocab: dict[str, int], path: Path) -> None:
    """Warn of a vocabulary with capitals, where nothing says whether text is lower-cased before."""
    words = ((piece, piece.removeprefix("##")) for piece in vocab)  # no word: [MASK] and the like
    capitals = [piece for piece, word in words if word[:1].isalpha() and word != word.lower()]
    if capitals:
        settings_path = path.with_name("tokenizer_config.json")
        warn_once(
            f"{path}: {len(capitals)} of {len(vocab)} word pieces have capitals, such as"
            f" {quote(capitals[0])}, but nothing says whether the encoder is cased, so text is lower-cased;"
            f' if it is cased, write {{"do_lower_case": false}} into {settings_path}'
        )


def warn_of_added_tokens(stored: object, vocab: dict[str, int], path: Path) -> None:
    """Warn of tokens that a checkpoint adds to its vocabulary: their embeddings are loaded, but not used.

    Args:
        stored: a list of objects with their `content`, or such objects by id; anything else is passed over.
    """
    tokens = stored.values() if isinstance(stored, dict) else stored if isinstance(stored, list) else []
    names = [token["content"] for token in tokens if isinstance(token, dict) and "content" in token]
    added = [name for name in names if isinstance(name, str) and name not in vocab]
    if added:
        warn_once(
            f"{path}: adds {len(added)} tokens to the vocabulary, such as {quote(added[0])}; in a text they"
            " are read as ordinary characters"
        )


def read_vocab(path: Path) -> dict[str, int]:
    """Read `vocab.txt`: one word piece per line, whose id is the line's number counted from 0.

    A byte order mark and blank lines at the end, which editors leave, are no pieces.

    Raises:
        UserError: if it cannot be read, is not UTF-8, or repeats a piece: after a line doubled by mistake,
            every piece would have its neighbour's id.
    """
    try:
        # Only \n ends a line: some pieces are odd spaces that splitlines would take for line ends.
        lines = read_bytes(path).decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from None
    while lines and lines[-1].rstrip("\r") == "":
        lines.pop()
    vocab = {}
    for index, line in enumerate(lines):
        piece = line.rstrip("\r")
        if vocab.setdefault(piece, index) != index:
            raise UserError(
                f"{path}:{index + 1}: {quote(piece)} appears twice, first in line {vocab[piece] + 1};"
                " expected each word piece once"
            )
    return vocab


def read_tokenizer_json(path: Path) -> tuple[dict[str, int], dict]:
    """The vocabulary and the normalizer's settings in a `tokenizer.json`.

    Raises:
        UserError: if it cannot be read, describes another tokenizer than BERT's, or gives two pieces the same
            id.
    """
    stored = read_json(path)
    parts = {name: stored.get(name) or {} for name in EXPECTED_PARTS}
    vocab = parts["model"].get("vocab") if isinstance(parts["model"], dict) else None
    if not isinstance(vocab, dict):
        raise UserError(f"{path}: not a word-piece vocabulary")
    for name, expected in EXPECTED_PARTS.items():
        if not isinstance(parts[name], dict):
            raise UserError(f"{path}: {name} is {quote(parts[name])}; expected a JSON object")
        for key, value in expected.items():
            if parts[name].get(key, value) != value:
                raise UserError(
                    f"{path}: not a word-piece vocabulary like BERT's: {name} has {key}"
                    f" {quote(parts[name][key])}; expected {json.dumps(value)}"
                )
    pieces = {}
    for piece, index in vocab.items():
        if type(index) is not int or not 0 <= index < MAX_ID:
            raise UserError(
                f"{path}: {quote(piece)} has the id {quote(index)};"
                f" expected a whole number from 0 to {MAX_ID - 1}"
            )
        if pieces.setdefault(index, piece) != piece:
            raise UserError(f"{path}: {quote(pieces[index])} and {quote(piece)} have the same id {index}")
        # No text contains half a character, and a piece saved as a line must be read back as the same line.
        if clean_surrogates(piece) != piece or "\n" in piece or piece.endswith("\r"):
            raise UserError(f"{path}: {quote(piece)} is not a word piece")
    warn_of_added_tokens(stored.get("added_tokens"), vocab, path)
    return vocab, parts["normalizer"]
