"""Settings that are facts: the size of a BERT, and what each task reads, predicts and writes.

Nothing here runs; the flags, the loader, the heads, the metrics and the prediction files all follow
from these rows. BERT: https://arxiv.org/abs/1810.04805.
"""

import json
import os
import reprlib
import stat
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path

SPLITS = ("train", "dev", "test")
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
)
MAX_TEXT_BYTES = 2**24  # of JSON, a vocabulary, predictions; the largest real one has half of it
MAX_DATA_BYTES = 2**28  # of a file of sentences; Quora has a tenth of it

shorten = reprlib.Repr()
shorten.maxstring = shorten.maxother = shorten.maxlong = 60
shorten.maxlevel = 2

# What a config.json may say besides sizes that would make another encoder of the same weights.
PLAIN_BERT = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}


class UserError(ValueError):
    """Something the user can mend; scripts print it as one line and exit with code 2."""


def quote(value: object) -> str:
    """A value from a file as a message shows it: its repr, cut, so that it can neither flood nor steer a terminal."""
    return shorten.repr(value)


def one_line(text: object, limit: int = 200) -> str:
    """Text from elsewhere for the middle of a message: as `quote`, but without quotation marks."""
    text = " ".join(str(text)[: 10 * limit].split())
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def is_regular(path: str | Path) -> bool:
    """Whether a path leads to a plain file; opening a pipe would wait for its other end.

    Raises:
        OSError: if there is nothing.
    """
    return stat.S_ISREG(os.stat(path).st_mode)


def read_bytes(path: str | Path, max_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """Read a whole file of moderate size.

    Raises:
        UserError: if it cannot be read, is no regular file, or has more than `max_bytes`.
    """
    try:
        if not is_regular(path):
            raise UserError(f"{path}: cannot be read (not a regular file)")
        with open(path, "rb") as file:
            contents = file.read(max_bytes + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if len(contents) > max_bytes:
        raise UserError(f"{path}: too large; expected at most {max_bytes // 2**20} MiB")
    return contents


def unique_keys(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object whose every key stands there once: which of two is meant cannot be known."""
    values = dict(pairs)
    if len(values) < len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {quote(twice)} stands there twice")
    return values


def read_json(path: str | Path) -> dict:
    """Read a JSON object.

    Raises:
        UserError: if it cannot be read, holds something else, or a key twice.
    """
    try:
        values = json.loads(read_bytes(path).decode("utf-8"), object_pairs_hook=unique_keys)
    except UserError:  # a ValueError too
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON file ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


@dataclass(frozen=True)
class BertConfig:
    """Size and regularisation of a BERT encoder, under Hugging Face's names; the defaults are bert-base-uncased."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0

    def __post_init__(self):
        for name in SIZES:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise UserError(f"BertConfig {name} is {quote(value)}; expected a whole number of at least 1")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < 1:
                raise UserError(f"BertConfig {name} is {quote(value)}; expected a number in [0, 1)")
        for name in ("initializer_range", "layer_norm_eps"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value <= 1:
                raise UserError(f"BertConfig {name} is {quote(value)}; expected a number in [0, 1]")
        if type(self.pad_token_id) is not int or not 0 <= self.pad_token_id < self.vocab_size:
            raise UserError(
                f"BertConfig pad_token_id is {quote(self.pad_token_id)}; expected a whole number below vocab_size"
                f" {quote(self.vocab_size)}"
            )
        if not isinstance(self.hidden_act, str) or len(self.hidden_act) > 60:
            raise UserError(
                f"BertConfig hidden_act is {quote(self.hidden_act)}; expected a name such as 'gelu'"
            )
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"BertConfig hidden_size {quote(self.hidden_size)} is not a multiple of"
                f" num_attention_heads {quote(self.num_attention_heads)}"
            )

    @classmethod
    def from_json(cls, path: str | Path) -> "BertConfig":
        """Read a Hugging Face `config.json`; keys that change nothing about the encoder are left alone.

        Raises:
            UserError: if the file is missing or no JSON object, or describes another architecture than plain BERT.
        """
        values = read_json(path)
        if values.get("model_type", "bert") != "bert":
            raise UserError(f"{path}: model_type is {quote(values['model_type'])}; only 'bert' can be loaded")
        for key, expected in PLAIN_BERT.items():
            if values.get(key) not in (None, expected):
                raise UserError(f"{path}: {key} is {quote(values[key])}; expected {json.dumps(expected)}")
        architectures = values.get("architectures")
        names = [] if architectures is None else architectures
        if not isinstance(names, list) or not all(
            isinstance(name, str) and name.startswith("Bert") for name in names
        ):
            raise UserError(
                f"{path}: architectures is {quote(architectures)}; expected names such as 'BertModel'"
            )
        known = {field.name for field in fields(cls)}
        try:
            return cls(**{key: value for key, value in values.items() if key in known and value is not None})
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def to_json(self, path: str | Path) -> None:
        """Write a `config.json` that Hugging Face's `BertModel.from_pretrained` reads."""
        values = {"model_type": "bert", "architectures": ["BertModel"], **asdict(self)}
        Path(path).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class TaskSpec:
    """One task: where its rows are, what its labels mean, how its predictions are written.

    `kind` is a row of `evaluation.TASK_KINDS`. One text column makes a single-sentence task, two make a
    pair task, which then gets the flag `--NAME_head`.
    """

    title: str
    kind: str
    files: dict[str, str]  # split -> file name under --data_dir
    text_columns: tuple[str, ...]
    label_column: str
    label_range: tuple[float, float]  # inclusive
    prediction_column: str  # as the course's starter spells it, misspellings included
    handout_column: str  # as the course's handout spells it
    default_head: str = "single"  # row of heads.HEADS

    @property
    def is_pair(self) -> bool:
        return len(self.text_columns) == 2


def course_files(stem: str) -> dict[str, str]:
    """File names of the three splits as the course ships them."""
    return {"train": f"{stem}-train.csv", "dev": f"{stem}-dev.csv", "test": f"{stem}-test-student.csv"}


TASKS = {
    "sst": TaskSpec(
        title="sentiment (SST-5)",
        kind="classification",
        files=course_files("ids-sst"),
        text_columns=("sentence",),
        label_column="sentiment",
        label_range=(0, 4),
        prediction_column="Predicted_Sentiment",
        handout_column="Predicted_Sentiment",
    ),
    "para": TaskSpec(
        title="paraphrase (Quora)",
        kind="binary",
        files=course_files("quora"),
        text_columns=("sentence1", "sentence2"),
        label_column="is_duplicate",
        label_range=(0, 1),
        prediction_column="Predicted_Is_Paraphrase",
        handout_column="Predicted_Is_Paraphrase",
        default_head="diff",
    ),
    "sts": TaskSpec(
        title="similarity (SemEval STS)",
        kind="regression",
        files=course_files("sts"),
        text_columns=("sentence1", "sentence2"),
        label_column="similarity",
        label_range=(0, 5),
        prediction_column="Predicted_Similiary",
        handout_column="Predicted_Similarity",
        default_head="diff",
    ),
    "cfimdb": TaskSpec(
        title="sentiment of film reviews (CFIMDB)",
        kind="classification",
        files=course_files("ids-cfimdb"),
        text_columns=("sentence",),
        label_column="sentiment",
        label_range=(0, 1),
        prediction_column="Predicted_Sentiment",
        handout_column="Predicted_Sentiment",
    ),
}
DEFAULT_TASKS = ("sst", "para", "sts")


@dataclass(frozen=True)
class SourceSpec:
    """Additional training rows for a task, from a data set of another form (`--extra_data`).

    Labels become the task's own by `labels`: what a cell says -> the task's label (rows with any other cell are left
    out), or (low, high), a scale that is stretched to the task's, or None, when they are the task's already.
    """

    task: str  # whose training rows it adds to
    files: tuple[str, ...]  # under --data_dir
    form: str  # row of extra_data.FORMS
    text_columns: tuple[str, ...]
    label_column: str
    labels: dict[str, float] | tuple[float, float] | None = None
    columns: tuple[str, ...] | None = None  # of files without a header
    max_examples: int | None = None  # as many are taken, at random; None: all


NLI_LABELS = {"entailment": 1.0, "contradiction": 0.0}  # neutral pairs say nothing about paraphrase
# The most frequent SST label of the negative and of the positive sentences of Movie Review.
POLARITY_LABELS = {"0": 1.0, "1": 3.0}

EXTRA_SOURCES = {
    "sick": SourceSpec(
        task="sts",
        files=("extra/sick/SICK.txt",),
        form="plain",
        text_columns=("sentence_A", "sentence_B"),
        label_column="relatedness_score",
        labels=(1, 5),
    ),
    "mrpc": SourceSpec(
        task="para",
        files=("extra/mrpc/msr_paraphrase_train.txt", "extra/mrpc/msr_paraphrase_test.txt"),
        form="plain",
        text_columns=("#1 String", "#2 String"),
        label_column="Quality",
    ),
    "paws_wiki": SourceSpec(
        task="para",
        files=("extra/paws_wiki/dev.tsv", "extra/paws_wiki/test.tsv"),
        form="plain",
        text_columns=("sentence1", "sentence2"),
        label_column="label",
        columns=("id", "sentence1", "sentence2", "label"),
    ),
    "paws_qqp": SourceSpec(
        task="para",
        files=("extra/paws_qqp/dev_and_test.tsv",),
        form="byte_literals",
        text_columns=("sentence1", "sentence2"),
        label_column="label",
    ),
    "quora_positives": SourceSpec(
        task="para",
        files=("extra/quora_positives/quora-positives.tsv",),
        form="quoted",
        text_columns=("sentence1", "sentence2"),
        label_column="is_duplicate",
        max_examples=10_000,  # all of them would turn the majority of the training labels
    ),
    "snli": SourceSpec(
        task="para",
        files=("extra/snli_sample/train.tsv", "extra/snli_sample/dev.tsv"),
        form="quoted",
        text_columns=("text_a", "text_b"),
        label_column="label",
        labels=NLI_LABELS,
    ),
    "mnli": SourceSpec(
        task="para",
        files=("extra/mnli_sample/train.tsv", "extra/mnli_sample/dev.tsv"),
        form="quoted",
        text_columns=("text_a", "text_b"),
        label_column="label",
        labels=NLI_LABELS,
    ),
    "nli_triplets": SourceSpec(
        task="para",
        files=("extra/nli_triplets/nli_for_simcse-dev.csv",),
        form="triplets",
        text_columns=("sentence1", "sentence2"),
        label_column="label",
        labels=NLI_LABELS,
        max_examples=20_000,
    ),
    "sst_trees": SourceSpec(
        task="sst",
        files=("extra/sst_trees/train.txt",),
        form="trees",
        text_columns=("phrase",),
        label_column="label",
        max_examples=20_000,
    ),
    "movie_review": SourceSpec(
        task="sst",
        files=("extra/rotten_tomatoes_mr/rt-polarity.tsv",),
        form="quoted",
        text_columns=("sentence",),
        label_column="label",
        labels=POLARITY_LABELS,
    ),
    "rotten_tomatoes": SourceSpec(
        task="sst",
        files=("extra/rotten_tomatoes_5class/rotten15k.csv",),
        form="quoted",
        text_columns=("sentence",),
        label_column="sentiment",
    ),
    "kindle": SourceSpec(
        task="sst",
        files=("extra/kindle_5class/kindle15k.csv",),
        form="quoted",
        text_columns=("sentence",),
        label_column="sentiment",
    ),
    "cfimdb": SourceSpec(
        task="sst",
        files=("ids-cfimdb-train.csv",),
        form="quoted",
        text_columns=("sentence",),
        label_column="sentiment",
        labels=POLARITY_LABELS,
    ),
}
