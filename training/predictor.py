"""A trained run as something to ask: texts go in, named classes with probabilities or similarities come out.

    from training.predictor import Predictor

    model = Predictor.from_run("runs/first")
    model.predict("sst", ["a gripping film", "two hours of nothing"])
    model.predict("sts", [("a man plays a guitar", "someone plays music")])

Reads a run's best checkpoint and nothing else: no data file, no lock, and nothing is written.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from datasets import Rows, clean_text, tokenize
from evaluation import predict_logits, soft_answers, task_kind
from heads import MultitaskBERT
from support.errors import UserError, quote
from tokenizer import BertTokenizer
from training.args_file import ARGS_FILE
from training.checkpoint import SUMS_FILE, load_model, need_checkpoint
from training.flags import read_run
from training.resolve import make_settings, resolve_machine
from training.run_data import load_encoder, make_model
from training.settings import TokenSettings


@dataclass(frozen=True)
class Prediction:
    """What a model says about a sentence or a pair.

    `value` is on the scale of the task's labels: a class number, or a similarity, which may lie a little
    outside of its range. `label` and `probabilities` (by class name, in the classes' order) are of classes
    only.
    """

    value: float
    label: str | None = None
    probabilities: dict[str, float] = field(default_factory=dict)


def find_best(folder: Path) -> Path:
    """The best checkpoint of a run, undamaged; or the folder itself, if it is a checkpoint.

    Raises:
        UserError: if there is none.
    """
    if (folder / SUMS_FILE).is_file():
        return folder
    if not (folder / ARGS_FILE).exists():
        raise UserError(f"{folder}: no run there (no {ARGS_FILE}); expected a folder that training wrote")
    return need_checkpoint(folder / "best")


class Predictor:
    """A model that is asked, with what it needs to read a text; made by `from_run`."""

    def __init__(
        self,
        model: MultitaskBERT,
        tokenizer: BertTokenizer,
        tokens: TokenSettings,
        autocast: Callable = nullcontext,
    ):
        self.model, self.tokenizer, self.tokens, self.autocast = model, tokenizer, tokens, autocast

    @classmethod
    def from_run(cls, run: str | Path, device: str = "auto", precision: str | None = "auto") -> "Predictor":
        """Load the best checkpoint of a run.

        Args:
            run: the run's folder, or one of its checkpoints (`RUN/last`).
            device, precision: as the flags of `multitask_classifier.py` have them; the run may have had
                others. None: the run's own precision.

        Raises:
            UserError: if there is no run, no undamaged checkpoint, or no such device.
        """
        checkpoint = find_best(Path(run))
        args = Namespace(**read_run(checkpoint)[0])  # its own copy, which belongs to its weights
        args.device, args.precision, args.use_gpu = device, precision or args.precision, False
        resolve_machine(args)
        settings = make_settings(args)
        with torch.random.fork_rng():  # the caller's random numbers go on as if none had been drawn here
            bert, tokenizer = load_encoder(checkpoint, None)
            model = make_model(settings.model, bert)
        load_model(checkpoint, model)
        return cls(model.to(settings.device).eval(), tokenizer, settings.tokens, settings.step.autocast)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.model.tasks)

    def predict(self, task: str, texts: Sequence[str] | Sequence[tuple[str, str]]) -> list[Prediction]:
        """Predictions of a task, in the order of the texts.

        Texts are cleaned as those of data files are; one with nothing in it is predicted like any other.

        Args:
            texts: sentences; for a task of pairs, pairs of sentences.

        Raises:
            UserError: for a task that the model was not trained on, and for texts of another form.
        """
        if task not in self.tasks:
            raise UserError(f"task {quote(task)}: not one of this run; it has {', '.join(self.tasks)}")
        if isinstance(texts, str):  # else each of its letters would be taken for a sentence
            raise UserError(f"task {task}: texts is {quote(texts)}; expected a list")
        examples = [self._example(task, text) for text in texts]
        if not examples:
            return []
        rows = Rows(Path(), [str(number) for number in range(1, len(examples) + 1)], examples, None)
        logits = self.logits(task, rows)  # (N, C)
        spec = self.model.tasks[task]
        kind, names = task_kind(spec), spec.class_names
        values = kind.decode(logits).tolist()
        if kind.probabilities is None:
            return [Prediction(value) for value in values]
        return [
            Prediction(value, names[value], dict(zip(names, row, strict=True)))
            for value, row in zip(values, kind.probabilities(logits).tolist(), strict=True)
        ]

    def logits(self, task: str, rows: Rows) -> torch.Tensor:
        """Logits (N, C) float32 of a task for rows whose texts are clean."""
        data = tokenize(rows, self.tokenizer, **self.tokens.pairs(task), max_length=self.tokens.max_length)
        return predict_logits(self.model, task, data, self.tokenizer.pad_token_id, self.autocast)

    def answers(self, task: str, rows: Rows) -> np.ndarray:
        """The same in numbers that may be averaged over models, (N, C), see `evaluation.soft_answers`."""
        return soft_answers(self.model.tasks[task], self.logits(task, rows))

    def _example(self, task: str, text: str | tuple[str, str]) -> tuple[str, ...]:
        """One example as `datasets.Rows` has it: one clean sentence, or two."""
        columns = self.model.tasks[task].text_columns
        sentences = (text,) if isinstance(text, str) else tuple(text)
        if len(sentences) != len(columns) or not all(isinstance(sentence, str) for sentence in sentences):
            expected = "a pair of sentences" if len(columns) == 2 else "a sentence"
            raise UserError(f"task {task}: text is {quote(text)}; expected {expected}")
        return tuple(clean_text(sentence) for sentence in sentences)
