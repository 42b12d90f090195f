"""Facts: the size of a BERT, and what each task reads, predicts and writes.

Nothing here does any work beyond checking these facts; the flags, the loader, the heads, the metrics and the
prediction files all follow from them. BERT: https://arxiv.org/abs/1810.04805.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from support.errors import UserError, quote
from support.files import read_json

# The encoder that needs no network, and the value of --pretrained that names it.
OFFLINE_ENCODER = "minilm"

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
# Keys of a config.json that make another encoder of the same weights, and their values in a plain BERT.
PLAIN_BERT = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}


@dataclass(frozen=True)
class BertConfig:
    """Size and regularisation of a BERT encoder, under Hugging Face's names; by default bert-base-uncased."""

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
                f"BertConfig pad_token_id is {quote(self.pad_token_id)}; expected a whole number below"
                f" vocab_size {quote(self.vocab_size)}"
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
        """Read a Hugging Face `config.json`; keys that change nothing about the encoder are ignored.

        Raises:
            UserError: if the file is missing or not a JSON object, or describes another architecture than
                plain BERT.
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

    `kind` is a row of `evaluation.TASK_KINDS`. One text column makes a single-sentence task; two make a pair
    task, which has the flag `--NAME_head`.
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
    is_ordered: bool = False  # the classes have an order: the task has the flag `--NAME_loss`
    loss: str | None = None  # row of evaluation.CLASS_LOSSES that a run has chosen; None: the kind's own
    class_names: tuple[str, ...] = ()  # of discrete labels, in order
    label_texts: tuple[
        str, ...
    ] = ()  # what stands for the classes in the label's column; empty: their numbers
    id_column: str | None = "id"  # None: rows are numbered
    lower_ids: bool = True  # as the course's loader does
    other_files: dict[str, str] = field(default_factory=dict)  # split -> name in another course
    form: str | None = "tsv"  # row of datasets.FORMS; None: what the ending of a file's name says

    @property
    def is_pair(self) -> bool:
        return len(self.text_columns) == 2


def course_files(stem: str) -> dict[str, str]:
    """File names of the three splits as the course ships them; Goettingen's course differs in the stems."""
    return {"train": f"{stem}-train.csv", "dev": f"{stem}-dev.csv", "test": f"{stem}-test-student.csv"}


# Beside these rows stand those of --task_file, see training.task_file.
TASKS = {
    "sst": TaskSpec(
        title="sentiment (SST-5)",
        kind="classification",
        files=course_files("ids-sst"),
        other_files=course_files("sst-sentiment"),
        text_columns=("sentence",),
        label_column="sentiment",
        label_range=(0, 4),
        prediction_column="Predicted_Sentiment",
        handout_column="Predicted_Sentiment",
        class_names=("negative", "somewhat negative", "neutral", "somewhat positive", "positive"),
        is_ordered=True,
    ),
    "para": TaskSpec(
        title="paraphrase (Quora)",
        kind="binary",
        files=course_files("quora"),
        other_files=course_files("quora-paraphrase"),
        text_columns=("sentence1", "sentence2"),
        label_column="is_duplicate",
        label_range=(0, 1),
        prediction_column="Predicted_Is_Paraphrase",
        handout_column="Predicted_Is_Paraphrase",
        default_head="diff",
        class_names=("no paraphrase", "paraphrase"),
    ),
    "sts": TaskSpec(
        title="similarity (SemEval STS)",
        kind="regression",
        files=course_files("sts"),
        other_files=course_files("sts-similarity"),
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
        class_names=("negative", "positive"),
    ),
}
DEFAULT_TASKS = ("sst", "para", "sts")

# --recipe: flags of multitask_classifier.py that are the defaults then. What is given besides comes first; of
# a flag by task, or of additional data, a run takes what belongs to its tasks.
RECIPES = {
    "poster": "",  # the defaults themselves: the poster's best row
    # A first look at data or flags: some minutes on two cores, and scores on part of dev.
    "fast": "--max_steps 200 --batch_size 16 --eval_max_examples 400 --final_eval part",
    # Provisional: what has been seen to help with MiniLM, in single runs; docs/recipe_rows.txt has the
    # comparison that is to settle it. Pairs of paraphrases are read together; many of them in a step, since
    # that task gains longest; SICK for similarity; phrases for sentiment.
    "best": "--para_head cross --sts_head diff --extra_data sick,sst_trees=60000 --max_steps 2000"
    " --sst_batch_size 32 --para_batch_size 64 --sts_batch_size 24",
}
