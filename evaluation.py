"""How a model is judged: kinds of task with their losses and scores, evaluation, prediction files.

The class ranks by the mean of sentiment accuracy, paraphrase accuracy and similarity's Pearson r (2023), or
by the same with similarity mapped to (r + 1) / 2 (2024). Both are computed, each under its own name.

Shapes: B examples in a batch, N examples in all, U distinct sequences, H hidden_size, C outputs of a task.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from config import DEFAULT_TASKS, TaskSpec
from support.bars import Bar
from support.command_line import number
from support.device import to_device
from support.errors import UserError, one_line, quote
from support.files import read_bytes
from support.ranks import ONE, Ranks
from support.specs import Param, find_row

# --- scores -------------------------------------------------------------------------------------------------


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's r, in [-1, 1]; 0 where a side is constant (r is undefined), NaN where one is not finite."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return math.nan  # not 0, which is better than many a real r
    # Asked before centring, because a mean is rounded: that of three times 0.1 is not 0.1.
    if x.min() == x.max() or y.min() == y.max():
        return 0.0
    # The largest between 1/2 and 1, or squares of numbers beyond 1e154 would be infinite; r has no scale, and
    # a power of two rounds nothing.
    x, y = (np.ldexp(values, -np.frexp(np.abs(values).max())[1]) for values in (x, y))
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt((x @ x) * (y @ y))
    return max(-1.0, min(1.0, float(x @ y / scale))) if scale > 0 else 0.0


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rho, in [-1, 1]: Pearson's r of the ranks; ties share their mean rank."""
    # Imported late, here and below, so that the first step need not wait half a second for it.
    from scipy.stats import rankdata

    return pearson(rankdata(x), rankdata(y))


def class_scores(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    from sklearn.metrics import accuracy_score, f1_score

    macro_f1 = f1_score(labels, predictions, average="macro", zero_division=0)
    return {"accuracy": float(accuracy_score(labels, predictions)), "macro_f1": float(macro_f1)}


def correlation_scores(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {"pearson": pearson(predictions, labels), "spearman": spearman(predictions, labels)}


def majority_baseline(labels: np.ndarray) -> float:
    """Accuracy of always predicting the most frequent label."""
    return max(Counter(labels.tolist()).values()) / len(labels)


# --- kinds of task ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskKind:
    """What `TaskSpec.kind` stands for.

    Args:
        num_outputs: C, from the task's row.
        loss: mean loss of logits (B, C) float32 against labels (B,), or of several classes with
            reduction="none" the losses (B,). Where a teacher's answers are mixed in, labels are no whole
            numbers, and of several classes (B, classes); linear in them, but for a constant.
        decode: logits (B, C) -> predictions (B,), on the scale of the labels.
        probabilities: logits (B, C) -> probabilities of the classes (B, classes), in the order of
            `TaskSpec.class_names`; None if predictions are no classes.
        scores: predictions and labels -> named scores in [-1, 1].
        baseline: labels -> the main score of a model that ignores its input.
        baseline_name: what that score is called.
        text: one prediction as the prediction file has it, in the starter's style.
        handout_text: the same in the handout's style.
        is_legal: whether a predicted value makes sense, given the task's label range.
        is_discrete: whether predictions are class numbers.
        main_score: the name of the score that counts in the overall.
        logit_range: what the logits should span, (least, greatest), so that a new head starts sensibly; None
            if it does not matter.
        divergence: how far two predictions of the same examples are apart: logits (B, C) twice -> their mean
            over the batch, symmetric, 0 for equal ones.
        uniform_loss: mean loss of logits (B, C) if all classes were equally right; None without classes.
        shares_weight: logits differ in their biases alone, as those of `coral_loss` have to.
    """

    num_outputs: Callable[[TaskSpec], int]
    loss: Callable[..., torch.Tensor]
    decode: Callable[[torch.Tensor], torch.Tensor]
    probabilities: Callable[[torch.Tensor], torch.Tensor] | None
    scores: Callable[[np.ndarray, np.ndarray], dict[str, float]]
    baseline: Callable[[np.ndarray], float]
    baseline_name: str
    text: Callable[[float], str]
    handout_text: Callable[[float], str]
    is_legal: Callable[[float, TaskSpec], bool]
    is_discrete: bool
    main_score: str
    logit_range: Callable[[TaskSpec], tuple[float, float] | None]
    divergence: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    uniform_loss: Callable[[torch.Tensor], torch.Tensor] | None
    shares_weight: bool = False


@dataclass(frozen=True)
class Objective:
    """What is added to the losses of tasks in training, by `heads.MultitaskBERT.total_loss`.

    Args:
        label_smoothing: task -> share of the label that goes to all classes alike, in [0, 1).
        rdrop: task -> factor of R-Drop's divergence. Its batches hold each example twice: all of them, then
            all of them again.
        head_dropout_samples: how often dropout before and in the heads is drawn for each example.
    """

    label_smoothing: Mapping[str, float] = field(default_factory=dict)
    rdrop: Mapping[str, float] = field(default_factory=dict)
    head_dropout_samples: int = 1


NOTHING_ADDED = Objective()


def class_divergence(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Symmetric Kullback-Leibler divergence of softmax distributions: the mean of both directions."""
    return divergence_of(a.log_softmax(-1), b.log_softmax(-1))


def divergence_of(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1).mean()


def binary_divergence(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The same of two classes, of the logit (B, 1) of one of them."""
    return 0.5 * ((a.sigmoid() - b.sigmoid()) * (a - b)).mean()


def is_class(value: float, spec: TaskSpec) -> bool:
    low, high = spec.label_range
    return low <= value <= high and value == int(value)  # in this order: int(inf) raises


def class_loss(logits: torch.Tensor, labels: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Cross-entropy against class numbers (B,), or against probabilities of the classes (B, C)."""
    return F.cross_entropy(logits, labels if labels.ndim == 2 else labels.long(), reduction=reduction)


TASK_KINDS = {
    "classification": TaskKind(
        num_outputs=lambda spec: int(spec.label_range[1]) + 1,
        loss=class_loss,
        decode=lambda logits: logits.argmax(-1),
        probabilities=lambda logits: logits.softmax(-1),
        scores=class_scores,
        baseline=majority_baseline,
        baseline_name="majority baseline",
        text=lambda value: str(int(value)),
        handout_text=lambda value: str(int(value)),
        is_legal=is_class,
        is_discrete=True,
        main_score="accuracy",
        logit_range=lambda spec: None,
        divergence=class_divergence,
        uniform_loss=lambda logits: -logits.log_softmax(-1).mean(),
    ),
    "binary": TaskKind(
        num_outputs=lambda spec: 1,
        loss=lambda logits, labels: F.binary_cross_entropy_with_logits(logits.squeeze(-1), labels.float()),
        decode=lambda logits: (logits.squeeze(-1) > 0).long(),  # the threshold that the loss trains for
        probabilities=lambda logits: torch.cat([-logits, logits], dim=-1).sigmoid(),
        scores=class_scores,
        baseline=majority_baseline,
        baseline_name="majority baseline",
        text=lambda value: str(float(value)),
        handout_text=lambda value: str(int(value)),
        is_legal=is_class,
        is_discrete=True,
        main_score="accuracy",
        logit_range=lambda spec: (-5.0, 5.0),
        divergence=binary_divergence,
        uniform_loss=lambda logits: 0.5 * (F.softplus(logits) + F.softplus(-logits)).mean(),
    ),
    "regression": TaskKind(
        num_outputs=lambda spec: 1,
        loss=lambda logits, labels: F.mse_loss(logits.squeeze(-1), labels.float()),
        decode=lambda logits: logits.squeeze(-1),
        probabilities=None,
        scores=correlation_scores,
        baseline=lambda labels: 0.0,
        baseline_name="constant baseline",
        text=lambda value: str(float(value)),
        handout_text=lambda value: str(float(value)),
        is_legal=lambda value, spec: True,  # any finite number: Pearson's r has no scale
        is_discrete=False,
        main_score="pearson",
        logit_range=lambda spec: spec.label_range,
        divergence=F.mse_loss,
        uniform_loss=None,
    ),
}


# --- losses of ordered classes, in place of the cross-entropy -----------------------------------------------


def as_probabilities(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Probabilities of the classes (B, C), of class numbers (B,) or of what are probabilities already."""
    return labels if labels.ndim == 2 else F.one_hot(labels.long(), num_classes).float()


def coral_loss(logits: torch.Tensor, labels: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """CORAL: for each threshold k the cross-entropy of "the class is above k", added up.

    Cao, Mirjalili and Raschka 2020, https://arxiv.org/abs/1901.07884; without its weights of the thresholds.

    Args:
        logits: (B, C - 1) of the probabilities that the class is above 0, 1, ..., C - 2.
    """
    at_least = as_probabilities(labels, logits.shape[1] + 1).flip(-1).cumsum(-1).flip(-1)  # (B, C)
    above = at_least[:, 1:].to(logits.dtype)
    losses = F.binary_cross_entropy_with_logits(logits, above, reduction="none").sum(-1)
    return losses if reduction == "none" else losses.mean()


def uniform(logits: torch.Tensor, num_classes: int) -> torch.Tensor:
    """(B, num_classes) the same probability for all classes."""
    return logits.new_full((len(logits), num_classes), 1 / num_classes)


def coral_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Probabilities of the classes, (B, C - 1) -> (B, C): differences of those to be above."""
    above = logits.sigmoid()
    one, zero = torch.ones_like(above[:, :1]), torch.zeros_like(above[:, :1])
    differences = torch.cat([one, above], -1) - torch.cat([above, zero], -1)
    # Thresholds in the wrong order, which training puts right, would make some of them negative.
    differences = differences.clamp(min=0)
    return differences / differences.sum(-1, keepdim=True)


def ordinal_log_loss(
    logits: torch.Tensor, labels: torch.Tensor, reduction: str = "mean", *, alpha: float
) -> torch.Tensor:
    """-sum_i log(1 - p_i) |label - i|^alpha, p being the softmax of the logits (B, C).

    Far classes cost more; Castagnos, Mihelich and Dognin 2022, https://aclanthology.org/2022.coling-1.407.
    """
    classes = torch.arange(logits.shape[1], device=logits.device)
    between = (classes[:, None] - classes).abs().to(logits.dtype) ** alpha  # (C, C)
    # A weighted sum, not a product, which autocast would make in bfloat16.
    distances = (as_probabilities(labels, len(classes))[..., None] * between).sum(1)  # (B, C)
    # log(1 - p_i) from all logits but the i-th: finite also where p_i rounds to 1.
    others = logits[:, None].masked_fill(torch.eye(len(classes), device=logits.device).bool(), -math.inf)
    log_others = others.logsumexp(-1) - logits.logsumexp(-1, keepdim=True)  # (B, C, C) -> (B, C)
    losses = -(log_others * distances).sum(-1)
    return losses if reduction == "none" else losses.mean()


@dataclass(frozen=True)
class ClassLoss:
    """Another loss for ordered classes.

    Args:
        changes: the row's parameters by name -> the fields of the task's `TaskKind` that are others.
        params: by name, for the flag.
    """

    changes: Callable[..., dict] = dict
    params: Mapping[str, Param] = field(default_factory=dict)


CLASS_LOSSES: dict[str, ClassLoss] = {
    "cross_entropy": ClassLoss(),
    "coral": ClassLoss(
        lambda: {
            "num_outputs": lambda spec: int(spec.label_range[1]),
            "loss": coral_loss,
            # The likeliest class, as for every loss here; the paper takes the median, which accuracy does not
            # ask for.
            "decode": lambda logits: coral_probabilities(logits).argmax(-1),
            "probabilities": coral_probabilities,
            "divergence": lambda a, b: divergence_of(
                *(coral_probabilities(logits).clamp(min=1e-7).log() for logits in (a, b))
            ),
            "uniform_loss": lambda logits: coral_loss(logits, uniform(logits, logits.shape[1] + 1)),
            "shares_weight": True,
        }
    ),
    "oll": ClassLoss(
        lambda alpha: {
            "loss": partial(ordinal_log_loss, alpha=alpha),
            "uniform_loss": lambda logits: ordinal_log_loss(
                logits, uniform(logits, logits.shape[1]), alpha=alpha
            ),
        },
        {"alpha": Param(1.5, number(float, 0), "power of the distance between classes")},
    ),
}


def task_kind(spec: TaskSpec) -> TaskKind:
    """The row of TASK_KINDS that a task has, with its loss if it has another."""
    kind = TASK_KINDS[spec.kind]
    if spec.loss is None:
        return kind
    loss, params = find_row(spec.loss, CLASS_LOSSES)
    return replace(kind, **loss.changes(**params))


# --- overall scores: (kind, main score) of each task -> one number ------------------------------------------


def mean_score(scores: dict[str, tuple[str, float]]) -> float:
    """The plain mean of the tasks' scores."""
    return sum(score for _, score in scores.values()) / len(scores)


def mean_2024_score(scores: dict[str, tuple[str, float]]) -> float:
    """The mean after mapping each correlation r to (r + 1) / 2."""
    mapped = [(score + 1) / 2 if kind == "regression" else score for kind, score in scores.values()]
    return sum(mapped) / len(mapped)


@dataclass(frozen=True)
class Overall:
    score: Callable[[dict[str, tuple[str, float]]], float]
    title: str


OVERALLS = {
    "mean": Overall(mean_score, "overall, plain mean (poster, class of 2023)"),
    "mean_2024": Overall(mean_2024_score, "overall, similarity as (r + 1) / 2 (class of 2024)"),
}


def overall_titles(tasks: Mapping[str, TaskSpec]) -> dict[str, str]:
    """What the overalls of these tasks are called: by the class for its own tasks, else what they are."""
    if set(tasks) == set(DEFAULT_TASKS):
        return {name: overall.title for name, overall in OVERALLS.items()}
    if len(tasks) < 2:
        return {}
    scores = [f"{task} {TASK_KINDS[spec.kind].main_score}" for task, spec in tasks.items()]
    titles = {"mean": f"plain mean of {', '.join(scores)}"}
    if any(spec.kind == "regression" for spec in tasks.values()):
        titles["mean_2024"] = "the same with each correlation as (r + 1) / 2"
    return titles


def summarise(task_scores: dict[str, dict[str, float]], tasks: dict[str, TaskSpec]) -> dict:
    """Add the overall scores to the tasks' own.

    Args:
        task_scores: task -> named scores, as `TaskKind.scores` gives them.

    Returns:
        {"tasks": task_scores, "mean": float, "mean_2024": float}
    """
    mains = {
        task: (tasks[task].kind, scores[TASK_KINDS[tasks[task].kind].main_score])
        for task, scores in task_scores.items()
    }
    return {"tasks": task_scores, **{name: overall.score(mains) for name, overall in OVERALLS.items()}}


def select_score(summary: dict, select_by: str, tasks: dict[str, TaskSpec]) -> float:
    """The number that chooses the best checkpoint: an overall score, or one task's main score."""
    if select_by in OVERALLS:
        return summary[select_by]
    return summary["tasks"][select_by][TASK_KINDS[tasks[select_by].kind].main_score]


# --- evaluation ---------------------------------------------------------------------------------------------

# Word pieces per forward pass, padding included: what stays in a CPU's cache, and what keeps a GPU busy.
MAX_EVAL_TOKENS = {"cpu": 2**12, "cuda": 2**16, "mps": 2**14}
MAX_EVAL_EXAMPLES = 4096  # examples per head call; the head only sees vectors
NUM_NAMED = 3  # ids in a message


class Model(Protocol):
    """The part of `heads.MultitaskBERT`, which builds on this file, that an evaluation needs."""

    bert: torch.nn.Module
    tasks: dict[str, TaskSpec]
    training: bool

    def train(self, mode: bool = True): ...
    def parameters(self) -> Iterator[torch.nn.Parameter]: ...
    def embed(self, task, input_ids, attention_mask, token_type_ids) -> torch.Tensor: ...
    def classify(self, task: str, *vectors: torch.Tensor) -> torch.Tensor: ...


class Examples(Protocol):
    """The part of `datasets.TaskData` that an evaluation needs."""

    rows: object
    sequences: object
    index: np.ndarray


def cut_by_length(lengths: np.ndarray, max_tokens: int) -> Iterator[np.ndarray]:
    """Batches of sequences by length: their numbers, as many as `max_tokens` can hold when padded."""
    order = np.argsort(lengths, kind="stable")
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * lengths[order[stop]] <= max_tokens:
            stop += 1
        yield order[start:stop]
        start = stop


@torch.no_grad()
def predict_logits(
    model: Model, task: str, data: Examples, pad_token_id: int, autocast=nullcontext, ranks: Ranks = ONE
) -> torch.Tensor:
    """Logits of a task for all examples of `data`.

    Each distinct sequence is encoded once, together with others of similar length; the head then sees the
    vectors. The model is in eval mode meanwhile, and left in the mode that it was in.

    Args:
        autocast: makes the context for mixed precision.
        ranks: the processes that share out the batches; each gets all logits.

    Returns:
        (N, C) float32.

    Raises:
        UserError: if a logit is not finite; what it decodes to may well be a class like any other.
        Stopped: if one of several ranks is to stop.
    """
    was_training = model.training
    model.train(False)
    device = next(model.parameters()).device
    lengths = data.sequences.lengths
    vectors = torch.zeros(len(lengths), model.bert.config.hidden_size, device=device)  # (U, H)
    batches = ranks.share(list(cut_by_length(lengths, MAX_EVAL_TOKENS[device.type])))
    num_tokens = sum(int(lengths[chosen].sum()) for chosen in batches)
    try:
        with autocast(), Bar(num_tokens, " word pieces", f"predicting {task}", scaled=True) as bar:
            for chosen in batches:
                if ranks.stopping():
                    break
                batch = data.sequences.pad(chosen, pad_token_id)
                try:
                    embedded = model.embed(task, **to_device(batch, device))
                    vectors[torch.from_numpy(chosen).to(device, non_blocking=True)] = embedded.float()
                except (RuntimeError, MemoryError) as error:  # out of memory, most likely: then it says where
                    shape = tuple(batch["input_ids"].shape)
                    error.add_note(f"predicting {task}, batch (sequences, word pieces) {shape}")
                    raise
                bar.update(int(lengths[chosen].sum()))
        ranks.go_on()
        ranks.sum(vectors)  # each was zero on all ranks but one
        index = torch.from_numpy(data.index).to(device)  # (N, 1 to 4)
        logits = [
            model.classify(task, *(vectors[column] for column in rows.unbind(-1)))
            for rows in index.split(MAX_EVAL_EXAMPLES)
        ]
    finally:
        model.train(was_training)
    logits = torch.cat(logits)  # (N, C)
    check_finite(task, logits, data.rows.ids)
    return logits


def predict(
    model: Model, task: str, data: Examples, pad_token_id: int, autocast=nullcontext, ranks: Ranks = ONE
) -> np.ndarray:
    """Predictions of a task for all examples of `data`; arguments and errors as for `predict_logits`.

    Returns:
        (N,) on the scale of the labels: int64 classes, or float32.
    """
    logits = predict_logits(model, task, data, pad_token_id, autocast, ranks)
    return task_kind(model.tasks[task]).decode(logits).cpu().numpy()


def soft_answers(spec: TaskSpec, logits: torch.Tensor) -> np.ndarray:
    """What logits (N, C) say, in numbers that may be averaged over models.

    Returns:
        float64: probabilities of the classes (N, classes), or values on the scale of the labels (N, 1).
    """
    kind, logits = task_kind(spec), logits.cpu().double()
    return (kind.probabilities(logits) if kind.is_discrete else kind.decode(logits)[:, None]).numpy()


def decide(spec: TaskSpec, answers: np.ndarray) -> np.ndarray:
    """Predictions (N,), as `predict` returns them, from what `soft_answers` returns."""
    is_discrete = TASK_KINDS[spec.kind].is_discrete
    return answers.argmax(-1) if is_discrete else answers[:, 0].astype(np.float32)


def check_finite(task: str, logits: torch.Tensor, ids: Sequence[str]) -> None:
    """Refuse logits (N, C) that are not finite, by the ids of their examples."""
    bad = (~logits.isfinite().all(-1)).nonzero().flatten().tolist()
    if bad:
        named = ", ".join(one_line(ids[n], 60) for n in bad[:NUM_NAMED])
        raise UserError(
            f"{task}: {len(bad)} of {len(ids)} predictions are not finite, the first for id {named};"
            " train with a smaller --lr"
        )


def evaluate(
    model: Model,
    dev_data: Mapping[str, Examples],
    pad_token_id: int,
    autocast=nullcontext,
    ranks: Ranks = ONE,
) -> tuple[dict, dict[str, np.ndarray]]:
    """Scores of a model on the dev split of its tasks.

    Args:
        dev_data: task -> examples with labels.

    Returns:
        what `summarise` returns, and task -> predictions (N,).
    """
    predictions = {
        task: predict(model, task, data, pad_token_id, autocast, ranks) for task, data in dev_data.items()
    }
    task_scores = {
        task: TASK_KINDS[model.tasks[task].kind].scores(predictions[task], data.rows.labels)
        for task, data in dev_data.items()
    }
    return summarise(task_scores, model.tasks), predictions


def collapse_warning(predictions: Sequence[float], spec: TaskSpec) -> str | None:
    """A warning if at least 95 % of the classes are the same, or all numbers lie within 1 % of the scale."""
    if len(predictions) < 2:
        return None
    least, greatest = min(predictions), max(predictions)
    if not TASK_KINDS[spec.kind].is_discrete:
        if greatest - least < 0.01 * (spec.label_range[1] - spec.label_range[0]):
            return (
                f"all predictions lie between {least:g} and {greatest:g}: the model seems to have collapsed"
            )
        return None
    value, count = Counter(predictions).most_common(1)[0]
    if count >= 0.95 * len(predictions):
        return f"{count} of {len(predictions)} predictions are {value:g}: the model seems to have collapsed"
    return None


def score_warnings(
    task: str, spec: TaskSpec, scores: dict[str, float], predictions: np.ndarray, labels: np.ndarray
) -> list[str]:
    """Warnings about an evaluation: a score no better than the baseline, predictions that are all alike."""
    kind = TASK_KINDS[spec.kind]
    warnings = []
    if not scores[kind.main_score] > kind.baseline(labels):  # not `<=`, which would let NaN pass
        warnings.append(f"{task} is no better than the {kind.baseline_name}")
    collapse = collapse_warning(predictions.tolist(), spec)
    return warnings + ([f"{task}: {collapse}"] if collapse else [])


# --- prediction files ---------------------------------------------------------------------------------------

# What float() accepts, except for 1_000 and digits of other scripts, which other readers of the file refuse.
NUMBER = re.compile(r"[+-]?(([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|inf|nan)", re.IGNORECASE)
PREDICTION_STYLES = {"starter": "output", "handout": "out"}  # style -> how its file names end


def prediction_name(task: str, split: str, style: str) -> str:
    """The name of a prediction file."""
    return f"{task}-{split}-{PREDICTION_STYLES[style]}.csv"


def part1_name(mode: str, task: str, split: str) -> str:
    """The name of a prediction file of the class's Part 1, single tasks; `mode` is a --fine-tune-mode."""
    return f"{mode}-{task}-{split}-out.csv"


def format_predictions(spec: TaskSpec, ids: Sequence[str], predictions: Sequence[float], style: str) -> str:
    """The text of a prediction file.

    Args:
        style: "starter", byte for byte what the course's starter code writes (tab in the header, commas in
            the rows, a space around each separator and before each line's end), or "handout" (plain commas).
    """
    kind = TASK_KINDS[spec.kind]
    if style == "starter":
        lines = [f"id \t {spec.prediction_column} \n"]
        lines += [f"{row_id} , {kind.text(value)} \n" for row_id, value in zip(ids, predictions, strict=True)]
    else:
        lines = [f"id,{spec.handout_column}\n"]
        lines += [
            f"{row_id},{kind.handout_text(value)}\n" for row_id, value in zip(ids, predictions, strict=True)
        ]
    return "".join(lines)


def read_predictions(path: str | Path, spec: TaskSpec) -> dict[str, float]:
    """Read a prediction file of either style.

    Returns:
        id -> value, in file order.

    Raises:
        UserError: naming file:line, for a header or row of another form, an id given twice, an illegal value.
    """
    kind = TASK_KINDS[spec.kind]
    if not os.path.lexists(path):
        raise UserError(f"{path}: no such file")
    try:
        lines = read_bytes(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from None
    header = [part.strip() for part in lines[0].replace("\t", ",").split(",")] if lines else []
    if header not in (["id", spec.prediction_column], ["id", spec.handout_column]):
        raise UserError(
            f"{path}:1: header is {quote(lines[0] if lines else '')}; expected id and"
            f" {spec.prediction_column}"
        )
    predictions = {}
    for at, line in enumerate(lines[1:], start=2):
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != 2 or not fields[0] or not NUMBER.fullmatch(fields[1]):
            raise UserError(f"{path}:{at}: row is {quote(line)}; expected an id, a comma, a number")
        row_id, value = fields[0], float(fields[1])
        if row_id in predictions:
            raise UserError(f"{path}:{at}: id {one_line(row_id, 60)} appears twice")
        if not math.isfinite(value) or not kind.is_legal(value, spec):
            low, high = spec.label_range
            expected = f"a whole number from {low:g} to {high:g}" if kind.is_discrete else "a finite number"
            raise UserError(f"{path}:{at}: value is {one_line(fields[1], 60)}; expected {expected}")
        predictions[row_id] = value
    return predictions


def check_predictions(path: str | Path, spec: TaskSpec, ids: Sequence[str]) -> str | None:
    """Compare a prediction file with the ids of its data file.

    Returns:
        A warning (collapse), or None.

    Raises:
        UserError: if the file is malformed, or an id is missing or unknown.
    """
    predictions = read_predictions(path, spec)
    missing = [row_id for row_id in ids if row_id not in predictions]
    unknown = set(predictions) - set(ids)
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of {len(ids)} ids have no prediction,"
            f" the first is {one_line(missing[0], 60)}"
        )
    if unknown:
        raise UserError(
            f"{path}: {len(unknown)} ids are not in the data, the first is {one_line(min(unknown), 60)}"
        )
    return collapse_warning(list(predictions.values()), spec)
