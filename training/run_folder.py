"""The folder of a run: its settings in `args.json`, its log, its state, and what `--resume` goes on from."""

import json
import os
import platform
import re
import subprocess
import sys
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import safetensors
import tokenizers
import torch
from tqdm import tqdm

from config import TASKS
from evaluation import PREDICTION_STYLES, prediction_name
from heads import MultitaskBERT
from kernels.fused import PLAIN, compile_kernels
from optimizer import AdamW, average_weights
from support.device import PRECISIONS, describe_machine
from support.errors import UserError
from support.files import LOCK_FILE, ROOT, naming, read_bytes, sync, write_text
from support.ranks import count_ranks
from tokenizer import BertTokenizer
from training.args_file import ARGS_FILE, read_args_file
from training.checkpoint import (
    MOMENTS,
    STATE_FILE,
    SUMS_FILE,
    add_moments,
    copy_tensors,
    find_checkpoint,
    load_model,
    load_state,
    load_tensors,
    remove_checkpoints,
    remove_leftovers,
    remove_newer,
    remove_versions,
    save_tensors,
    versions,
    write_checkpoint,
    write_model,
)
from training.loss_scale import LossScale
from training.settings import RunSettings
from training.trackers import Trackers

# What a run leaves in its folder besides args.json and checkpoints; a new run there removes it.
RUN_FILES = ["metrics.jsonl", "scores.json", "data_report.json", "soft_targets.npz"]
RUN_FILES += ["curves.png", "report.md", "report.html", "report/*.png", "tensorboard/events.out.tfevents.*"]
CHECKPOINTS = ("best", "last")
# These, those before them, and what a kill may leave of one.
CHECKPOINT_NAME = re.compile(rf"({'|'.join(CHECKPOINTS)})(\.[0-9]+)?|\.({'|'.join(CHECKPOINTS)})\.(new|old)")
JSON_NAMES = {"batches_drawn": "task_batches"}  # fields of RunState that state.json knows by another name
MAX_LOG_BYTES = 2**30


# --- args.json ------------------------------------------------------------------------------------


def describe_code(folder: Path = ROOT) -> dict | None:
    """The git commit of the code and the files changed since; None if this is no repository."""

    def git(*arguments):
        command = ["git", "-C", str(folder), "-c", "core.fsmonitor=false", *arguments]
        done = subprocess.run(command, capture_output=True, timeout=10, check=True)
        return done.stdout.decode("utf-8", "replace").strip("\n")

    try:
        if not Path(git("rev-parse", "--show-toplevel")).samefile(folder):
            return None
        changed = git("status", "--porcelain", "--untracked-files=no").splitlines()
        return {"commit": git("rev-parse", "HEAD"), "changed": [line[3:] for line in changed]}
    except (OSError, subprocess.SubprocessError):
        return None


def describe_versions() -> dict[str, str]:
    modules = (np, safetensors, tokenizers, torch)
    return {"python": platform.python_version()} | {
        module.__name__: str(module.__version__) for module in modules
    }


def write_args(
    folder: Path, flags: Mapping, facts: Mapping, *, device: str, before: Mapping | None = None
) -> str:
    """Write a run's `args.json`: all settings, the commands of the run so far, versions, code, machine.

    Args:
        flags: every flag and its value, resolved.
        facts: what else should be known about the run, as JSON.
        before: what it held, if the run goes on; where versions, code or machine have changed since, it keeps
            the earlier ones, too.

    Returns:
        the file's text.
    """
    circumstances = {"versions": describe_versions(), "git": describe_code()}
    circumstances["machine"] = describe_machine(device)
    if count_ranks() > 1:
        circumstances["machine"]["ranks"] = count_ranks()
    content = {"args": dict(flags), "commands": [sys.argv], **circumstances, **facts}
    if before:
        content["commands"] = [*before["commands"], sys.argv]
        earlier = {name: before.get(name) for name in circumstances}
        content["earlier"] = before.get("earlier", []) + ([earlier] if earlier != circumstances else [])
    text = json.dumps(content, indent=2) + "\n"
    write_text(folder / ARGS_FILE, text)
    return text


def changed_flags(stored: Mapping, flags: Mapping, may_change: Collection[str]) -> list[str]:
    """The flags whose values, as JSON, are not those stored in an `args.json`, each as a few words."""
    now = json.loads(json.dumps(dict(flags)))
    return [
        f"--{name} was {stored[name]}, is {now[name]}"
        for name in sorted(set(stored) & set(now) - set(may_change) - {"given"})
        if stored[name] != now[name]
    ]


def format_changed_circumstances(stored: Mapping, device: str) -> str | None:
    """A warning if a run goes on with other versions or on another machine, where bits may differ."""
    now = {"versions": describe_versions(), "machine": describe_machine(device) | {"ranks": count_ranks()}}
    unsaid = {"ranks": 1}
    changed = [
        f"{name} was {stored[kind].get(name, unsaid.get(name))}, is {value}"
        for kind, values in now.items()
        for name, value in values.items()
        if isinstance(stored.get(kind), dict) and stored[kind].get(name, unsaid.get(name)) != value
    ]
    if not changed:
        return None
    return f"the run's bits may not be those of one that never stopped: {', '.join(changed)}"


# --- starting anew --------------------------------------------------------------------------------


def is_runs_own(path: Path, folder: Path) -> bool:
    """Whether a run in a folder writes, and removes, what has this path: its log, or part of a checkpoint."""
    path, folder = path.resolve(), folder.resolve()
    if path == folder or not path.is_relative_to(folder):
        return False
    name = path.relative_to(folder)
    return bool(CHECKPOINT_NAME.fullmatch(name.parts[0])) or any(
        name.match(pattern) for pattern in (ARGS_FILE, LOCK_FILE, *RUN_FILES)
    )


def check_free(folder: Path, overwrite: bool, pretrained: str) -> None:
    """Make sure that a new run may have its folder: a run that has no checkpoint yet has nothing to lose.

    Raises:
        UserError: if it holds a checkpoint, without --overwrite, or the encoder to start from; or belongs to
            another script, or holds files of other origin in the places of a run's.
    """
    checkpoints = [path for name in CHECKPOINTS for path in versions(folder / name)]
    try:
        flags = read_args_file(folder)["args"]
    except UserError:  # none there, or damaged
        flags = None
        if not any((path / SUMS_FILE).exists() for path in checkpoints):
            check_empty(folder)
    if flags is not None and "given" not in flags:
        raise UserError(
            f"--output_dir {folder}: {ARGS_FILE} there is another script's; expected another folder"
        )
    if not overwrite and checkpoints:
        raise UserError(
            f"--output_dir {folder}: holds a run already; continue it with --resume, or start anew with"
            " --overwrite"
        )
    if is_runs_own(Path(pretrained), folder):
        raise UserError(
            f"--pretrained {pretrained}: is a checkpoint of the run that --overwrite would remove; expected"
            " another --output_dir"
        )


def check_empty(folder: Path) -> None:
    """Refuse a folder, not known as a run's, with anything in it that a run would replace or add to."""
    for name in (ARGS_FILE, *CHECKPOINTS, *RUN_FILES, *own_prediction_files()):
        if os.path.lexists(folder / name) or any(folder.glob(name)):
            raise UserError(
                f"--output_dir {folder}: holds {name}, and is no run's folder; expected a new one"
            )


def begin_run(settings: RunSettings, facts: Mapping) -> str:
    """Write a new run's `args.json` and return its text, then remove what an earlier run left in its folder.

    In this order, a kill on the way leaves a folder that --resume either takes for the new run's or refuses.
    """
    folder = settings.output.folder
    had_run = (folder / ARGS_FILE).exists() or any(versions(folder / name) for name in ("last", "best"))
    text = write_args(folder, settings.flags, facts, device=settings.device)
    if had_run:
        for name in ("last", "best"):
            remove_checkpoints(folder / name)
        for pattern in [*RUN_FILES, *own_prediction_files()]:
            for path in folder.glob(pattern):
                path.unlink(missing_ok=True)
    return text


def own_prediction_files(tasks: Iterable[str] = TASKS) -> list[str]:
    return [
        f"predictions/{prediction_name(task, split, style)}"
        for task in tasks
        for split in ("dev", "test")
        for style in PREDICTION_STYLES
    ]


def find_last(folder: Path, eval_every: int | None) -> Path | None:
    """The checkpoint that --resume goes on from; None if the run was stopped before its first one.

    Args:
        eval_every: steps to the run's first checkpoint, if known.

    Raises:
        UserError: if a checkpoint was there that is not any more, or all are damaged.
    """
    last = find_checkpoint(folder / "last")
    if last is None:
        # Of an unfinished run, best/ alone is what a kill leaves between its first best/ and its first last/.
        best = find_checkpoint(folder / "best")
        if (folder / "scores.json").exists() or (
            best and load_state(best).get("step") not in range((eval_every or 0) + 1)
        ):
            raise UserError(f"{folder / 'last'}: no checkpoint there")
    return last


def check_same_run(
    settings: RunSettings, last: Path | None, facts: dict, may_change: Collection[str]
) -> dict:
    """Refuse to go on with other data, settings or encoder; returns what the run's `args.json` holds."""
    folder = settings.output.folder
    stored = read_args_file(folder)
    if stored["data"] != facts["data"]:
        raise UserError(f"--resume: the train or dev data are not those that {folder} was started with")
    if last:
        copy = read_args_file(last)
        changed = ["the data"] if copy["data"] != facts["data"] else []
        changed += changed_flags(copy["args"], settings.flags, may_change)
        if changed:
            raise UserError(
                f"{folder / ARGS_FILE}: is not that of {last}: {', '.join(changed)}; restore it from"
                f" {last}, or start anew with --overwrite"
            )
    elif stored.get("encoder_sha256") != facts["encoder_sha256"]:
        pretrained = settings.flags["pretrained"]
        raise UserError(f"--resume: --pretrained {pretrained} is not what {folder} was started with")
    warning = format_changed_circumstances(stored, settings.device)
    if warning:
        print(f"warning: {warning}")
    return stored


# --- a run ----------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class RunState:
    """The numbers that a resumed run needs besides weights and moments; K tasks."""

    step: int = 0  # updates made or skipped
    evaluated: int = 0  # the step of the last evaluation
    batches_drawn: dict[str, int]  # task -> micro-batches so far
    tokens: int = 0
    bad_steps: int = 0  # skipped since the last good one
    skipped_steps: int = 0  # in all
    cosine_ema: torch.Tensor | None = None  # (K, K) running mean of the cosines between task gradients
    learned: dict[str, torch.Tensor] = field(default_factory=dict)  # as `StepResult.learned`
    sampler: dict[str, list[float]] = field(default_factory=dict)  # (K,) each, what the sampler goes by
    best_score: float | None = None
    best_step: int | None = None
    evals_without_gain: int = 0
    optimizer_steps: list[int] = field(default_factory=list)  # of each flat parameter
    log_lines: int = 0
    window: list[dict] = field(default_factory=list)  # what the next line of the log averages
    loss_scale: LossScale | None = None  # None: the run's precision needs none

    def to_json(self) -> dict:
        values = {JSON_NAMES.get(each.name, each.name): getattr(self, each.name) for each in fields(self)}
        ema = None if self.cosine_ema is None else self.cosine_ema.tolist()  # float32 survives the round trip
        loss_scale = None if self.loss_scale is None else asdict(self.loss_scale)
        learned = {name: tensor.tolist() for name, tensor in self.learned.items()}  # and so does float64
        return values | {"cosine_ema": ema, "loss_scale": loss_scale, "learned": learned}

    @classmethod
    def from_json(cls, values: dict, tasks: Collection[str]) -> "RunState":
        """Read what `to_json` wrote, now or before there was a loss scale.

        Raises:
            ValueError: naming what is missing or of another kind.
        """
        checks = {
            "batches_drawn": lambda drawn: list(drawn) == list(tasks) and all(map(is_count, drawn.values())),
            "optimizer_steps": lambda steps: isinstance(steps, list) and all(map(is_count, steps)),
            "cosine_ema": lambda ema: ema is None or torch.tensor(ema).shape == (len(tasks), len(tasks)),
            "learned": lambda learned: all(are_learned(each, len(tasks)) for each in learned.values()),
            "sampler": lambda state: all(
                isinstance(each, list) and are_learned([each], len(tasks)) for each in state.values()
            ),
            "best_score": lambda score: score is None or type(score) in (int, float),
            "best_step": lambda step: step is None or is_count(step),
            "window": lambda records: all(isinstance(record, dict) for record in records),
        }
        values = {"loss_scale": None} | values
        read = {"loss_scale": LossScale.from_json(values["loss_scale"])}
        for each in fields(cls):
            if each.name in read:
                continue
            name = JSON_NAMES.get(each.name, each.name)
            try:
                # Until there were methods and samplers with a memory, states had none.
                is_newer = name in ("learned", "sampler")
                read[each.name] = values.get(name, {}) if is_newer else values[name]
                fits = checks.get(each.name, is_count)(read[each.name])
            except (KeyError, TypeError, AttributeError, ValueError):
                fits = False
            if not fits:
                raise ValueError(f"{name!r} is missing or of another kind")
        if read["cosine_ema"] is not None:
            read["cosine_ema"] = torch.tensor(read["cosine_ema"])
        read["learned"] = {
            name: torch.tensor(each, dtype=torch.float64) for name, each in read["learned"].items()
        }
        return cls(**read)


def are_learned(values: list, num_tasks: int) -> bool:
    """Whether JSON holds finite numbers of a shape (..., K)."""
    numbers = torch.tensor(values, dtype=torch.float64)
    return numbers.ndim in (1, 2) and numbers.shape[-1] == num_tasks and bool(numbers.isfinite().all())


def is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**53


class Run:
    """A run at work: model, optimizer and state, and the folder that they are saved to and loaded from."""

    def __init__(self, settings: RunSettings, model: MultitaskBERT, tokenizer: BertTokenizer):
        self.settings, self.model, self.tokenizer = settings, model, tokenizer
        self.folder, self.ranks = settings.output.folder, settings.step.ranks
        optimizer = settings.optimizer
        dtype = PRECISIONS[optimizer.precision]
        kernels = compile_kernels() if optimizer.compiled else PLAIN
        # What leaves one matrix product may stay in its type: autocast would round gradients of weights just
        # so, and what overflows is seen. A sum of several would be rounded each time.
        grad_dtype = torch.float32 if optimizer.accumulates else dtype
        self.memory = model.move_to_flat_memory(dtype, grad_dtype, kernels)
        groups = self.memory.param_groups(
            optimizer.lr, optimizer.head_lr, optimizer.weight_decay, optimizer.layer_lr_decay
        )
        self.optimizer = AdamW(
            groups, lr=optimizer.lr, rectify=optimizer.rectify, update=kernels.adamw_update
        )
        self.average = torch.zeros_like(self.memory.data) if optimizer.ema else None  # of the weights
        self.args_text = ""  # of `args.json`, once it is written
        self.saved_step = None  # of the last good checkpoint
        self.measured_step = None  # whose noise is in a loaded state, though its evaluation is made again
        self.trackers = Trackers()  # none yet; where the log goes besides
        loss_scale = LossScale() if dtype == torch.float16 else None
        self.state = RunState(batches_drawn=dict.fromkeys(settings.loop.tasks, 0), loss_scale=loss_scale)

    @property
    def log_file(self) -> Path:
        return self.folder / "metrics.jsonl"

    def optimizer_tensors(self) -> dict[str, torch.Tensor]:
        """The optimizer's moments by name, and `average`; `state.optimizer_steps` has the counters."""
        moments = {
            f"{owner}.{'decay' if decays else 'no_decay'}.{key}": self.optimizer.state[param][key]
            for (owner, decays), param in self.memory.flat_params.items()
            for key in MOMENTS
            if param in self.optimizer.state
        }
        return moments if self.average is None else moments | {"average": self.average}

    def average_step(self) -> None:
        """Take the weights that a step has left into their average, if there is one.

        Of skipped steps, too: so the average depends on counters alone, and a GPU need not be waited for.
        """
        if self.average is not None:
            decay = self.settings.optimizer.ema
            average_weights(self.average, self.memory.data, decay, self.state.step)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this context the model has the average of its weights, if there is one."""
        if self.average is None:
            yield
            return
        weights = self.memory.data.clone()
        self.memory.data.copy_(self.average)
        try:
            yield
        finally:
            self.memory.data.copy_(weights)

    def check_weights(self) -> None:
        """Refuse to go on with, or to save, weights that a step has made useless.

        Raises:
            UserError: if one is not finite.
        """
        if not self.memory.data.isfinite().all():
            raise UserError(
                f"step {self.state.step}: the weights are not finite any more; try a smaller --lr;"
                f" {self.last_saved_text()}"
            )

    def last_saved_text(self) -> str:
        if self.saved_step is None:
            return "there is no checkpoint yet"
        return f"{self.folder / 'last'} still holds step {self.saved_step}"

    def save_last(self) -> None:
        self.check_weights()
        self.mend_drift()
        self.count_updates()

        def write(folder):
            self._write_model(folder, self.state.to_json())
            save_tensors(self.optimizer_tensors(), folder / "optimizer.safetensors")

        if self.ranks.is_first:
            if self.log_file.exists():
                sync(self.log_file)  # its lines up to here are not written again
            write_checkpoint(self.folder / "last", write, self.settings.output.keep_last)
        self.saved_step = self.state.step

    def save_best(self, summary: dict) -> None:
        state = {"step": self.state.step, "dev": summary}
        if self.ranks.is_first:
            write_checkpoint(self.folder / "best", lambda folder: self._write_model(folder, state))

    def count_updates(self) -> None:
        """Note in the state how often each flat parameter was updated."""
        moments = self.optimizer.state  # has no entry for what was not updated yet, and would make one
        self.state.optimizer_steps = [
            moments.get(param, {}).get("step", 0) for param in self.memory.flat_params.values()
        ]

    def follow_first(self) -> None:
        """Take rank 0's state, weights and moments, so that a run goes on the same on every rank.

        All in place: the training loop holds the state, and captured graphs the moments.
        """
        if self.ranks.size == 1:
            return
        self.count_updates()
        state = self.ranks.from_first(self.state.to_json)
        if not self.ranks.is_first:
            vars(self.state).update(vars(RunState.from_json(state, self.settings.loop.tasks)))
            self._make_moments(self.state)
        steps = self.ranks.from_first(lambda: (self.saved_step, self.measured_step))
        self.saved_step, self.measured_step = steps
        for tensor in (self.memory.data, *self.optimizer_tensors().values()):
            self.ranks.copy_first(tensor)

    def mend_drift(self) -> None:
        """Let all ranks go on from rank 0's weights, if other processors have rounded some differently."""
        if self.ranks.size == 1:
            return
        own = zlib.crc32(self.memory.data.cpu().numpy())
        if self.ranks.any(own != self.ranks.from_first(lambda: own)):
            tqdm.write("warning: the weights of ranks have drifted apart; all go on from those of rank 0")
            self.follow_first()

    def _write_model(self, folder: Path, state: dict) -> None:
        write_model(folder, self.model, self.tokenizer, state)
        if self.args_text:
            (folder / ARGS_FILE).write_text(self.args_text, encoding="utf-8")
            if not (self.folder / ARGS_FILE).exists():  # without it, the checkpoint could not be found again
                write_text(self.folder / ARGS_FILE, self.args_text)

    def load_last(self, folder: Path) -> None:
        """Continue from a checkpoint: weights, moments, counters.

        Raises:
            UserError: if its content does not fit this run.
        """
        load_model(folder, self.model)
        try:
            state = RunState.from_json(load_state(folder), self.settings.loop.tasks)
            if (state.loss_scale is None) != (self.state.loss_scale is None):
                raise ValueError("'loss_scale' is of another precision")
            self._make_moments(state)
        except ValueError as error:
            raise UserError(f"{folder / STATE_FILE}: does not fit this run ({error})") from None
        path = folder / "optimizer.safetensors"
        copy_tensors(load_tensors(path), self.optimizer_tensors(), path)
        for name in ("last", "best"):
            remove_leftovers(self.folder / name)
        remove_newer(self.folder / "last", folder)  # damaged ones
        # A kill may have come before these were removed.
        remove_versions(self.folder / "last", self.settings.output.keep_last)
        self.state, self.saved_step = state, state.step
        self._check_best()

    def _make_moments(self, state: RunState) -> None:
        for param, step in zip(self.memory.flat_params.values(), state.optimizer_steps, strict=True):
            if step and param in self.optimizer.state:
                self.optimizer.state[param]["step"] = step
            elif step:
                add_moments(self.optimizer, param, step)

    def _check_best(self) -> None:
        """Without the best checkpoint that the state speaks of, the best one from here on will have to do."""
        state, best = self.state, self.folder / "best"
        try:
            found = find_checkpoint(best)
            problem = f"{best}: missing"
        except UserError as error:
            found, problem = None, error
        if found is not None:
            remove_newer(best, found)
            remove_versions(best, 1)
        elif state.best_step is not None:
            print(f"warning: {problem}; the best checkpoint from step {state.step} on will take its place")
            state.best_score = state.best_step = None
            self.measured_step = state.step if state.evaluated == state.step else None
            state.evaluated = state.step - 1  # where this step is one that is evaluated, it is so again

    def cut_log(self) -> None:
        """Drop the lines of the log that were written after the state was."""
        lines = []
        if self.log_file.exists():
            lines = read_bytes(self.log_file, MAX_LOG_BYTES).splitlines(keepends=True)
        kept = [line for line in lines[: self.state.log_lines] if line.endswith(b"\n")]
        num_lost = self.state.log_lines - len(kept)
        if num_lost:
            print(f"warning: {self.log_file}: {num_lost} lines have been lost")
            self.state.log_lines = len(kept)
        write_text(self.log_file, b"".join(kept).decode("utf-8", "replace"))

    def log(self, line: dict, pictures: Mapping[str, np.ndarray] | None = None) -> None:
        """Add a line to the log, and show it, and pictures that go with it, to the trackers."""
        if self.ranks.is_first:
            with naming(self.log_file), open(self.log_file, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        self.state.log_lines += 1
        self.trackers.log(line, pictures)
