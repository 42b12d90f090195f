"""What a run is told, as small frozen objects: each says who uses what, so that nobody below needs all flags.

`training.resolve` makes them out of the command line. Fields have the names and meanings of their flags,
whose help texts give units and ranges; what differs is said here.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

from evaluation import Objective
from support.ranks import ONE, Ranks
from training.task_schedule import TaskSchedule, factor_in_step

HEAD_DROPOUT_PROB = 0.3  # the course's default, which in its starter reaches the heads only


@dataclass(frozen=True)
class DataSettings:
    """Which rows a run reads."""

    tasks: tuple[str, ...]
    data_dir: Path
    files: Mapping[tuple[str, str], Path]  # (task, split) -> data file, of every task that there is
    extra_data: Mapping[str, int | None]  # source -> examples to draw; None means its own limit
    predict_splits: tuple[str, ...]
    predict_tasks: tuple[str, ...]
    batch_sizes: Mapping[str, int]  # task -> examples; a smaller file is warned about
    unlabelled: Mapping[str, Path] = field(default_factory=dict)  # task -> file, for a teacher to label
    unlabelled_ratio: float = 1.0
    transductive: tuple[str, ...] = ()

    @property
    def needs_teacher(self) -> dict[str, str]:
        """Task -> the flag that gives it examples without labels."""
        return {task: f"--{task}_unlabelled" for task in self.unlabelled} | dict.fromkeys(
            self.transductive, "--transductive"
        )


@dataclass(frozen=True)
class TokenSettings:
    """How rows become word pieces."""

    joint: Mapping[str, bool]  # task -> whether its pairs are encoded as one sequence
    max_length: int
    cache_dir: Path | None  # None: keep no tokens between runs
    apart: Mapping[str, bool] = field(default_factory=dict)  # task -> ... and each sentence by itself, too
    symmetric: bool = False  # joint pairs in both orders

    def pairs(self, task: str) -> dict[str, bool]:
        """How the pairs of a task are encoded, for `datasets.tokenize`."""
        return {
            "joint": self.joint[task],
            "apart": self.apart.get(task, False),
            "symmetric": self.symmetric and self.joint[task],
        }


@dataclass(frozen=True)
class PhraseSettings:
    """Labelled phrases inside the training sentences, see training.phrases."""

    weight: float  # factor of their loss; 0: none
    min_words: int
    limit: int | None  # of each sentence in a batch; None: all
    weighting: str  # a key of phrases.PHRASE_WEIGHTINGS


@dataclass(frozen=True)
class ModelSettings:
    """What is built on the encoder."""

    heads: Mapping[str, str]  # task -> a key of heads.HEADS
    losses: Mapping[str, str]  # task -> a row of evaluation.CLASS_LOSSES; absent: the kind's own loss
    pooling: str
    head_layers: int
    head_dropout_prob: float
    freeze_encoder: bool
    objective: Objective  # what is added to the losses
    seed: int  # of the heads' first weights
    redraw_layers: int = 0


@dataclass(frozen=True)
class StepSettings:
    """How the losses of a step become one update; for the values see the flags of the same names."""

    seed: int
    grad_method: str = "pcgrad"  # a key of grad_methods.GRAD_METHODS, maybe with parameters
    grad_reduction: str = "sum"  # a key of grad_methods.GRAD_REDUCTIONS
    task_weights: Mapping[str, float] = field(default_factory=dict)  # task -> factor of its loss; 1 if absent
    loss_weighting: str = "fixed"  # a key of loss_weightings.LOSS_WEIGHTINGS, maybe with parameters
    clip_norm: float = 0.0  # longest gradient, encoder and heads together; 0 means no clipping
    surgery_tasks: tuple[str, ...] | None = None  # whose gradients the method may change; None means all
    surgery_scope: str = "model"  # or "layer": each layer group by itself
    gram: str = "step"  # a key of grad_noise.GRAMS, maybe with parameters
    autocast: Callable = nullcontext  # makes the context for mixed precision
    loss_schedule: Mapping[str, TaskSchedule] = field(default_factory=dict)  # by task: of one more factor
    total_steps: int = 1  # of the run, which schedules are stretched to
    fgm: float = 0.0  # length of adversarial changes of the embeddings; 0: none
    # Factor of the losses in the backward pass, so that float16 holds its gradients. No result of a step
    # depends on it, but for rounding. Unlike the rest, it changes from step to step.
    loss_scale: int = 1
    ranks: Ranks = ONE  # the processes that share out the batches of a step

    def task_weight(self, task: str, step: int) -> float:
        """Factor of a task's loss in a step, counted from 0; a loss weighting comes on top."""
        factor = factor_in_step(self.loss_schedule, task, step, self.total_steps)
        return self.task_weights.get(task, 1.0) * factor

    def shares_and_weights(
        self, drawn: Sequence[tuple[str, int]], pieces: Sequence[tuple[str, int]], step: int
    ) -> tuple[list[float], list[float]]:
        """Factors of the mean losses of pieces of a step's batches.

        Every example of a task counts the same, also in the short batch that ends an epoch; and a task as
        often as it was drawn.

        Args:
            drawn: the task of each draw, and how many examples it has.
            pieces: the same of each piece.

        Returns:
            each piece's share of its task's loss, and its factor in the loss of the step.
        """
        num_examples, num_draws = Counter(), Counter()
        for task, size in drawn:
            num_examples[task] += size
            num_draws[task] += 1
        shares = [size / num_examples[task] for task, size in pieces]
        weights = [
            self.task_weight(task, step) * (num_draws[task] * share)
            for (task, _), share in zip(pieces, shares, strict=True)
        ]
        return shares, weights

    def adjusted(self, tasks: Sequence[str]) -> torch.Tensor:
        """(K,) whether each of these tasks may have its gradient changed by the method."""
        return torch.tensor([self.surgery_tasks is None or task in self.surgery_tasks for task in tasks])


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW, and what is kept how precisely."""

    lr: float
    head_lr: float
    weight_decay: float
    rectify: bool
    precision: str  # a key of support.device.PRECISIONS
    accumulates: bool  # several gradients of a task are added up in a step
    compiled: bool  # passes over flat memory, on the CPU
    layer_lr_decay: float = 1.0  # factor of the learning rate for each layer further down
    ema: float = 0.0  # decay of the moving average of the weights; 0: none


@dataclass(frozen=True)
class LoopSettings:
    """The course of a run: which batches, how many, and what happens between steps."""

    tasks: tuple[str, ...]
    batch_sizes: Mapping[str, int]  # task -> examples per micro-batch
    grad_accum: int
    sampler: str
    loss_schedule: Mapping[str, TaskSchedule]  # of factors of the losses, by task
    draw_schedule: Mapping[str, TaskSchedule]  # of shares of the draws
    rdrop: Mapping[str, float]  # task -> factor of R-Drop's term; above 0, its batches hold every row twice
    seed: int
    max_steps: int
    schedule: str
    warmup_steps: int
    max_bad_steps: int
    eval_every: int
    noise_batches: int  # of each task, at each evaluation
    eval_max_examples: int | None
    select_by: str
    patience: int
    log_every: int


@dataclass(frozen=True)
class TeacherSettings:
    """Who answers the training examples, and how much the answers count beside the labels."""

    folders: tuple[Path, ...]
    weight: float
    device: str
    precision: str


@dataclass(frozen=True)
class OutputSettings:
    """Where results go, and in which form."""

    folder: Path
    prediction_files: Mapping[tuple[str, str], Path]  # (task, split) -> file
    prediction_style: str
    predict_splits: tuple[str, ...]
    predict_tasks: tuple[str, ...]
    final_eval: str
    select_by: str
    keep_last: int
    report_to: tuple[str, ...]  # keys of trackers.TRACKERS

    @property
    def asked_files(self) -> dict[tuple[str, str], Path]:
        """The prediction files that are to be written."""
        return {
            (task, split): path
            for (task, split), path in self.prediction_files.items()
            if split in self.predict_splits and task in self.predict_tasks
        }


@dataclass(frozen=True)
class RunSettings:
    """Everything that a run is told, and the flags as `args.json` records them."""

    data: DataSettings
    tokens: TokenSettings
    phrases: PhraseSettings
    model: ModelSettings
    step: StepSettings
    optimizer: OptimizerSettings
    loop: LoopSettings
    output: OutputSettings
    teacher: TeacherSettings | None
    device: str
    captured: bool  # steps are captured as CUDA graphs, see training.captured_step
    flags: Mapping[str, object]
