"""Train an encoder further by masked language modelling on the tasks' own training sentences.

    python -m training.pretrain_mlm --data_dir data --output_dir runs/mlm --max_steps 300
    python multitask_classifier.py --pretrained runs/mlm

Further training on the text of the task as in "Don't stop pretraining" (Gururangan et al. 2020,
https://arxiv.org/abs/2004.10964); masks and head are in masked_lm.py. No sentence of a dev or test file is
trained on, not even one that a train file has too.
"""

if __name__ == "__main__":
    from support.interrupts import end_quietly
    from support.threads import share_cores

    end_quietly()
    share_cores()  # before torch is imported

import argparse
import json
import math
import os
import shutil
import sys
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from base_bert import (
    check_vocab_size,
    resolve_pretrained,
)
from bert import BertModel
from config import DEFAULT_TASKS, OFFLINE_ENCODER, TASKS
from datasets import BatchOrder, Rows, data_file, read_rows, warning_lines
from optimizer import SCHEDULES, AdamW, has_weight_decay, lr_factor, set_lr
from support.bars import Bar
from support.command_line import Stopped, StopRequest, catch_signals, number, run_script
from support.device import (
    make_autocast,
    out_of_memory_hint,
    resolve_device,
    resolve_precision,
    set_float32_products,
    to_device,
    warn_of_device,
)
from support.errors import UserError
from support.files import lock_folder, read_json, sync, write_text
from support.ranks import ONE, Ranks, join_ranks
from support.seeds import make_seed
from tokenizer import BertTokenizer
from training.checkpoint import (
    MOMENTS,
    STATE_FILE,
    add_moments,
    copy_tensors,
    find_checkpoint,
    load_state,
    load_tensors,
    remove_checkpoints,
    save_tensors,
    versions,
    write_checkpoint,
)
from training.loss_scale import LossScale, scale_of
from training.masked_lm import BertForMaskedLM, MaskedText, load_head
from training.run_folder import ARGS_FILE, changed_flags, write_args
from training.run_parser import (
    COUNT,
    DEVICE,
    DEVICE_HELP,
    DIR,
    ENCODER,
    NOT_NEGATIVE,
    OUTPUT_DIR,
    POSITIVE,
    PRECISION_HELP,
    PRECISION_NAMES,
    PROBABILITY,
    RESUME_MARKS,
    SEED,
    RunParser,
    check_sources,
    find_task_files,
    source_list,
    task_files,
    task_list,
)
from training.sources import EXTRA_SOURCES, add_sources, held_out_keys, text_key
from training.task_file import set_own_tasks

LAST = "last"  # the checkpoint that an unfinished run goes on from
NEW = "encoder.new"  # the finished encoder, before its files get their names
TENSORS_FILE = "training.safetensors"  # in it
ENCODER_FILES = ("config.json", "model.safetensors", "vocab.txt", "tokenizer_config.json")
# In the order in which --overwrite removes them: a folder with config.json is finished, one with args.json is
# ours.
OUTPUT_FILES = (*ENCODER_FILES, "metrics.jsonl", "args.json")
SHRINK = "try a smaller --batch_size or --max_length"


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> AdamW:
    """AdamW over what is trainable; only matrices decay. Its moments are there from the start."""
    trainable = [param for param in model.parameters() if param.requires_grad]
    groups = [
        {
            "params": [param for param in trainable if has_weight_decay(param) == decays],
            "initial_lr": lr,
            "weight_decay": weight_decay if decays else 0.0,
        }
        for decays in (True, False)
    ]
    optimizer = AdamW(groups, lr=lr)
    for param in trainable:  # they are saved even if every step so far has overflowed
        add_moments(optimizer, param, 0)
    return optimizer


def train_step(
    model: BertForMaskedLM,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, torch.Tensor],
    *,
    seed: int,
    clip_norm: float = 0.0,
    autocast=nullcontext,
    loss_scale: int = 1,
    ranks: Ranks = ONE,
) -> tuple[float, float | None]:
    """One optimizer update; the learning rates are already in the optimizer's groups.

    Args:
        batch: from `MaskedText.batch`, on the model's device; each rank takes its own rows of it.
        seed: fixes dropout.
        clip_norm: longest gradient; 0 means no clipping.
        loss_scale: factor of the loss in the backward pass, so that float16 holds its gradients.

    Returns:
        loss in nats and the gradient's length before clipping; None instead of that if the gradient
        overflowed, which a smaller `loss_scale` may mend: nothing was updated then.

    Raises:
        UserError: if either is not finite for another reason; nothing was updated then.
    """
    torch.manual_seed(make_seed(seed, *ranks.own_numbers) if ranks.rank else seed)
    optimizer.zero_grad()
    trainable = [param for param in model.parameters() if param.requires_grad]
    if ranks.size == 1:
        with autocast():
            loss = model.loss(batch)
        (loss * loss_scale).backward()  # the word embedding's gradient is the sum of both its uses
    else:
        loss = backward_share(model, trainable, batch, autocast, loss_scale, ranks)
    max_norm = clip_norm * loss_scale or math.inf
    grad_norm = float(nn.utils.clip_grad_norm_(trainable, max_norm)) / loss_scale
    if loss_scale > 1 and not math.isfinite(grad_norm) and loss.isfinite():
        return loss.item(), None
    if not math.isfinite(grad_norm + loss.item()):
        raise UserError(
            f"loss {loss.item()} with a gradient of length {grad_norm}; try a smaller --lr, with --overwrite"
        )
    if loss_scale > 1:
        for param in trainable:
            param.grad.div_(loss_scale)
    optimizer.step()
    return loss.item(), grad_norm


def backward_share(
    model: BertForMaskedLM,
    trainable: Sequence[nn.Parameter],
    batch: dict[str, torch.Tensor],
    autocast,
    loss_scale: int,
    ranks: Ranks,
) -> torch.Tensor:
    """The loss of a whole batch, and its gradients times the scale, from this rank's rows and the others'."""
    rows = ranks.share(torch.arange(len(batch["input_ids"])))
    own = {
        name: batch[name][rows.to(batch[name].device)] for name in ("input_ids", "attention_mask", "chosen")
    }
    sentences = batch["chosen"].nonzero()[:, 0]  # (M,) of each label
    own["labels"] = batch["labels"][torch.isin(sentences, rows.to(sentences.device))]
    loss = batch["labels"].new_zeros((), dtype=torch.float32)
    if len(own["labels"]):
        with autocast():
            loss = model.loss(own, reduction="sum") / len(batch["labels"])
        (loss * loss_scale).backward()
    grads = [torch.zeros_like(param) if param.grad is None else param.grad for param in trainable]
    message = torch.cat([each.flatten() for each in (*grads, loss.detach())])
    ranks.sum(message)
    *sums, loss = message.split([each.numel() for each in (*grads, loss)])
    for param, total in zip(trainable, sums, strict=True):
        param.grad = total.view_as(param)
    return loss.squeeze(0)


@torch.no_grad()
def evaluate(
    model: BertForMaskedLM, text: MaskedText, batch_size: int, seed: int, autocast, ranks: Ranks = ONE
) -> float:
    """Mean cross-entropy over masked positions in nats; the masks depend on the seed only. Keeps the mode.

    Raises a Stopped if one of several ranks is to stop.
    """
    device, mode = model.predictions.bias.device, model.training
    model.eval()
    order = np.argsort(text.lengths, kind="stable")
    total, count = 0.0, 0
    with Bar(len(order), " sentences", "checking the dev loss") as bar:
        for start in ranks.share(range(0, len(order), batch_size)):
            if ranks.stopping():
                break
            chosen = order[start : start + batch_size]
            batch = to_device(text.batch(chosen, make_seed(seed, start)), device)
            with autocast():
                total += model.loss(batch, reduction="sum").item()
            count += len(batch["labels"])
            bar.update(len(chosen))
    model.train(mode)
    if ranks.size > 1:
        ranks.go_on()
        sums = torch.tensor([total, count], dtype=torch.float64)
        ranks.sum(sums)
        total, count = sums.tolist()
    return total / count


# --- a run ----------------------------------------------------------------------------------------


def make_parser() -> RunParser:
    parser = RunParser(
        prog="training.pretrain_mlm",
        usage="python -m training.pretrain_mlm --output_dir DIR [--FLAG [VALUE]] ...",
        description="Train an encoder further by masked language modelling on the tasks' training sentences.",
        epilog="A run that was stopped continues, exactly, when its command is given again.",
    )
    add = parser.adder(parser.add_argument_group("data"))
    add("--data_dir", "place", type=DIR, default="data", help="folder with the data files")
    text = (
        f"tasks whose sentences to train on, out of {', '.join(TASKS)}; with --task_file, its tasks alone if"
    )
    text += " not given"
    add("--tasks", "result", type=task_list(), default=",".join(DEFAULT_TASKS), help=text)
    text = "tasks of your own, a TOML file each (docs/data.md)"
    add("--task_file", "result", type=task_files, default={}, help=text)
    text = f"more text, out of {', '.join(EXTRA_SOURCES)} (default: none)"
    add("--extra_data", "result", type=source_list, default={}, help=text)
    text = "longest sentence, in word pieces; at most what the encoder can take"
    add("--max_length", "result", type=number(int, 3), default=128, help=text)

    add = parser.adder(parser.add_argument_group("model"))
    text = f"encoder to start from: a folder, NAME@COMMIT of the hub, or {OFFLINE_ENCODER} (needs no network)"
    add("--pretrained", "result", type=ENCODER, default=OFFLINE_ENCODER, help=text)

    training = parser.add_argument_group("training")
    add, add_length = parser.adder(training), parser.adder(training.add_mutually_exclusive_group())
    text = "length of the run; an epoch takes each sentence once"
    add_length("--epochs", "result", type=POSITIVE, default=1.0, help=text)
    text = "length of the run in steps (optimizer updates), instead of --epochs"
    add_length("--max_steps", "result", type=COUNT, help=text)
    add("--batch_size", "result", type=COUNT, default=64, help="sentences per step")
    inside = number(float, 0, 1, low_open=True, high_open=True)
    add("--mlm_prob", "result", type=inside, default=0.15, help="share of the word pieces to predict")
    add("--seed", "result", type=SEED, default=11711, help="seed of all random numbers")
    add("--precision", "machine", choices=PRECISION_NAMES, default="auto", help=PRECISION_HELP)
    add("--device", "machine", type=DEVICE, default="auto", help=DEVICE_HELP)

    add = parser.adder(parser.add_argument_group("optimizer"))
    add("--lr", "result", type=POSITIVE, default=5e-5, help="learning rate")
    text = "share that weight matrices lose in a step, times the learning rate"
    add("--weight_decay", "result", type=NOT_NEGATIVE, default=0.01, help=text)
    text = "how the learning rate falls after warm-up"
    add("--schedule", "result", choices=SCHEDULES, default="linear", help=text)
    text = "share of the run spent on linear warm-up, in [0, 1)"
    add("--warmup_ratio", "result", type=PROBABILITY, default=0.1, help=text)
    text = "longer gradients are scaled down to this length; 0: never"
    add("--clip_norm", "result", type=NOT_NEGATIVE, default=1.0, help=text)

    add = parser.adder(parser.add_argument_group("output"))
    add("--output_dir", "mode", type=OUTPUT_DIR, required=True, help="folder for the encoder")
    text = "dev sentences to measure the loss on"
    add("--eval_max_examples", "result", type=COUNT, default=2000, help=text)
    add("--log_every", "upkeep", type=COUNT, default=10, help="steps between lines of the log")
    text = "steps between checkpoints, from which a run that was stopped continues"
    add("--save_every", "upkeep", type=COUNT, default=100, help=text)
    text = "remove the run in --output_dir and start anew"
    add("--overwrite", "mode", action="store_true", help=text)
    return parser


RESUME_MAY_CHANGE = make_parser().marked(*RESUME_MARKS)


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with code 2 and one line if a flag is wrong."""
    own_tasks = find_task_files(argv)
    set_own_tasks(own_tasks)  # before the parser lists all tasks
    parser = make_parser()
    if own_tasks:
        parser.set_defaults(tasks=tuple(own_tasks))
    args = parser.parse_args(argv)
    check_sources(parser, args)
    return args


@dataclass(frozen=True)
class MlmSettings:
    """What the training loop is told, every flag resolved; fields are named after their flags."""

    folder: Path  # --output_dir
    seed: int
    batch_size: int
    max_steps: int
    lr: float
    schedule: str
    warmup_ratio: float
    clip_norm: float
    precision: str
    device: str
    log_every: int
    save_every: int
    ranks: Ranks = ONE


@dataclass
class MlmState:
    """The numbers that a resumed run needs besides weights and moments."""

    step: int = 0
    losses: list[float] = field(default_factory=list)  # since the last line of the log
    log: list[dict] = field(default_factory=list)
    loss_scale: LossScale | None = None  # None: the run's precision needs none

    @classmethod
    def from_json(cls, values: dict) -> "MlmState":
        """Read what `asdict` made, now or before there was a loss scale.

        Raises a ValueError, naming what is missing or of another kind.
        """
        for name, kind in (("step", int), ("losses", list), ("log", list)):
            if type(values.get(name)) is not kind:
                raise ValueError(f"{name!r} is missing or of another kind")
        loss_scale = LossScale.from_json(values.get("loss_scale"))
        return cls(values["step"], values["losses"], values["log"], loss_scale)

    @property
    def num_updates(self) -> int:
        return self.step - (self.loss_scale.overflow_steps if self.loss_scale else 0)


def find_run(folder: Path, pretrained: str, overwrite: bool) -> dict | None:
    """What `args.json` says of an unfinished run in a folder; None if there is nothing to go on from.

    Raises:
        UserError: if the folder holds a finished run (without --overwrite) or files of something else.
    """
    present = [name for name in (*OUTPUT_FILES, NEW) if (folder / name).exists()]
    present += [path.name for path in versions(folder / LAST)]
    if not present:
        return None
    stored = read_json(folder / ARGS_FILE) if ARGS_FILE in present else {}
    if not isinstance(stored.get("args"), dict) or "mlm_prob" not in stored["args"]:
        raise UserError(f"--output_dir {folder}: {present[0]} is not this script's; expected another folder")
    if resolve_pretrained(pretrained).resolve() == folder.resolve():
        raise UserError(f"--output_dir {folder}: is --pretrained itself; expected another folder")
    if "config.json" in present and not overwrite:
        raise UserError(f"--output_dir {folder}: holds a finished encoder; start anew with --overwrite")
    return stored if versions(folder / LAST) and not overwrite else None


def read_rows_of_split(data_dir: Path, tasks: Iterable[str], split: str) -> dict[str, Rows]:
    found = {task: read_rows(data_file(data_dir, TASKS[task], split), TASKS[task], split) for task in tasks}
    for rows in found.values():
        for line in warning_lines(rows):
            print(f"warning: {line}")
    return found


def distinct_sentences(rows: dict[str, Rows]) -> list[str]:
    sentences = (text for task_rows in rows.values() for texts in task_rows.texts for text in texts if text)
    return list(dict.fromkeys(sentences))  # a dict, since a set has no order


def read_sentences(
    data_dir: Path,
    tasks: Sequence[str],
    extra_data: Mapping[str, int | None],
    *,
    seed: int,
    eval_max_examples: int,
) -> tuple[list[str], list[str]]:
    """The distinct sentences to train on, and so many of the dev files', drawn by the seed."""
    train_rows = read_rows_of_split(data_dir, tasks, "train")
    dev_rows = read_rows_of_split(data_dir, tasks, "dev")
    splits = [(spec, split) for spec in TASKS.values() for split in ("dev", "test")]
    files = [(data_file(data_dir, *each), *each) for each in splits]
    keys = held_out_keys(file for file in files if file[0].exists())
    held_out = {sentence for key in keys for sentence in key}
    single_held_out = {key[0] for key in keys if len(key) == 1}
    for task in tasks:
        sources = {name: n for name, n in extra_data.items() if EXTRA_SOURCES[name].task == task}
        # Rows that are held-out examples are left in; their sentences are taken out below.
        train_rows[task], lines = add_sources(train_rows[task], sources, data_dir, set(), single_held_out)
        for line in lines:
            print(f"{task:6s} extra {line}")
    sentences, dev = distinct_sentences(train_rows), distinct_sentences(dev_rows)
    train = [sentence for sentence in sentences if text_key((sentence,))[0] not in held_out]
    chosen = np.random.default_rng(seed).permutation(len(dev))[:eval_max_examples]
    print(
        f"{len(train)} sentences to train on ({len(sentences) - len(train)} more are also dev or test"
        f" sentences); {len(chosen)} of {len(dev)} dev sentences to check with"
    )
    return train, [dev[i] for i in sorted(chosen)]


def load_encoder(pretrained: str, seed: int) -> tuple[BertForMaskedLM, BertTokenizer, str]:
    """Model and tokenizer of --pretrained, and which weights are new, in a line; those depend on the seed."""
    torch.manual_seed(make_seed(seed))
    tokenizer = BertTokenizer.from_pretrained(pretrained)
    model = BertForMaskedLM(BertModel.from_pretrained(pretrained))
    check_vocab_size(len(tokenizer), model.bert.config.vocab_size, pretrained)
    head_report = load_head(model, pretrained)
    return model, tokenizer, f"{model.bert.load_report}\nprediction head: {head_report}"


def check_same(folder: Path, stored: dict, flags: Mapping, data: str) -> None:
    """Refuse to go on with a run under other settings or with other sentences."""
    changed = changed_flags(stored["args"], flags, RESUME_MAY_CHANGE)
    if changed:
        raise UserError(
            f"--output_dir {folder}: the unfinished run there has other settings: {', '.join(changed)}; give"
            " those of the run, or start anew with --overwrite"
        )
    if stored.get("data") != data:
        raise UserError(f"--data_dir {flags['data_dir']}: not the sentences that {folder} was started with")


def run_tensors(model: BertForMaskedLM, optimizer: AdamW) -> dict[str, torch.Tensor]:
    """All that training changes: weights and both moments, by name."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, param in model.named_parameters():
        for key in MOMENTS if param.requires_grad else ():
            tensors[f"{key}.{name}"] = optimizer.state[param][key]
    return tensors


def save_last(folder: Path, model: BertForMaskedLM, optimizer: AdamW, state: MlmState) -> None:
    def write(new):
        save_tensors(run_tensors(model, optimizer), new / TENSORS_FILE)
        (new / STATE_FILE).write_text(json.dumps(asdict(state)) + "\n", encoding="utf-8")

    write_checkpoint(folder / LAST, write, keep=2)


def load_last(folder: Path, model: BertForMaskedLM, optimizer: AdamW) -> MlmState:
    """Put weights, moments and counters back from a checkpoint; returns the run's state.

    Raises:
        UserError: if its content does not fit this run.
    """
    try:
        state = MlmState.from_json(load_state(folder))
    except ValueError as error:
        raise UserError(f"{folder / STATE_FILE}: does not fit this run ({error})") from None
    take_state(optimizer, state)
    path = folder / TENSORS_FILE
    copy_tensors(load_tensors(path), run_tensors(model, optimizer), path)
    return state


def take_state(optimizer: AdamW, state: MlmState) -> None:
    """Moments, still zero, after as many updates as the state has."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            add_moments(optimizer, param, state.num_updates)


def save_encoder(folder: Path, model: BertForMaskedLM, tokenizer: BertTokenizer) -> None:
    """Write the finished encoder; `config.json` comes last, so that a folder with it is complete."""
    new = folder / NEW
    model.bert.save_pretrained(new)
    tokenizer.save_pretrained(new)
    for name in reversed(ENCODER_FILES):
        sync(new / name)
        os.replace(new / name, folder / name)
    sync(folder)
    remove_checkpoints(folder / LAST)
    shutil.rmtree(new)


class MlmLog:
    """The log of a run, `metrics.jsonl` and the terminal."""

    def __init__(self, settings: MlmSettings, state: MlmState):
        self.is_written = settings.ranks.is_first
        self.path, self.max_steps, self.state = settings.folder / "metrics.jsonl", settings.max_steps, state
        self.started, self.first_step = time.perf_counter(), state.step

    def write(self, line: dict) -> None:
        self.state.log.append(line)
        if self.is_written:
            write_text(self.path, "".join(json.dumps(each) + "\n" for each in self.state.log))

    def dev_loss(self, loss: float) -> None:
        print(f"step {self.state.step}/{self.max_steps}  dev loss {loss:.4f}", flush=True)
        self.write({"step": self.state.step, "dev_loss": loss})

    def step(self, lr: float, grad_norm: float | None) -> None:
        """Average the losses since the last line."""
        state, loss = self.state, sum(self.state.losses) / len(self.state.losses)
        state.losses = []
        line = {"step": state.step, "lr": lr, "loss": loss, "grad_norm": grad_norm}
        if state.loss_scale is not None:
            line |= {"loss_scale": state.loss_scale.scale, "overflow_steps": state.loss_scale.overflow_steps}
        self.write(line)
        seconds = (time.perf_counter() - self.started) / (state.step - self.first_step)
        print(
            f"step {state.step}/{self.max_steps}  loss {loss:.4f}  lr {lr:.2e}  {seconds:.2f} s/step"
            f"  {(self.max_steps - state.step) * seconds:.0f} s left",
            flush=True,
        )


def train(
    settings: MlmSettings,
    model: BertForMaskedLM,
    optimizer: AdamW,
    state: MlmState,
    text: MaskedText,
    dev_text: MaskedText,
    stop: StopRequest,
) -> None:
    """From `state` to --max_steps, or until a signal ends it, which exits the process."""
    folder, max_steps, seed = settings.folder, settings.max_steps, settings.seed
    autocast, ranks = make_autocast(settings.device, settings.precision), settings.ranks
    order = BatchOrder(text.lengths, settings.batch_size, seed, "mlm")
    warmup_steps = int(settings.warmup_ratio * max_steps)
    log = MlmLog(settings, state)

    def check() -> None:
        """Evaluate, unless a stop is requested."""
        together = replace(ranks, stopping=lambda: stop.requested)
        work = partial(evaluate, model, dev_text, settings.batch_size, seed, autocast, together)
        try:
            with out_of_memory_hint(lambda: f"checking the dev loss; {SHRINK}"):
                loss = stop.interruptible(work) if ranks.size == 1 else work()
        except Stopped:
            return
        if loss is None:
            return
        if not math.isfinite(loss):  # the weights are useless: never logged as a score, never saved
            raise UserError(
                f"step {state.step}: the dev loss is {loss}; try a smaller --lr, with --overwrite"
            )
        log.dev_loss(loss)

    if not state.log:
        check()
    model.train()
    while state.step < max_steps and not ranks.any(stop.requested):
        # 1. The batch, its masks and the learning rate depend on the step alone.
        batch = text.batch(order[state.step], make_seed(seed, state.step, 1))
        factor = lr_factor(settings.schedule, state.step, warmup_steps=warmup_steps, total_steps=max_steps)
        set_lr(optimizer, factor)

        # 2. Update.
        shape = tuple(batch["input_ids"].shape)
        with out_of_memory_hint(lambda shape=shape: f"in a batch (sentences, word pieces) {shape}; {SHRINK}"):
            loss, grad_norm = train_step(
                model,
                optimizer,
                to_device(batch, settings.device),
                seed=make_seed(seed, state.step),
                clip_norm=settings.clip_norm,
                autocast=autocast,
                loss_scale=scale_of(state.loss_scale),
                ranks=ranks,
            )
        state.step += 1
        if state.loss_scale is not None:
            state.loss_scale.count(applied=grad_norm is not None, overflow=grad_norm is None)
        state.losses.append(loss)

        # 3. Log and save.
        if state.step % settings.log_every == 0 or state.step == max_steps:
            log.step(settings.lr * factor, grad_norm)
        is_due = state.step % settings.save_every == 0 and state.step < max_steps and not stop.requested
        if is_due and ranks.is_first:
            save_last(folder, model, optimizer, state)
    if state.step == max_steps:
        if state.loss_scale is not None and state.loss_scale.overflow_steps:
            print(state.loss_scale.overflow_text(state.step), flush=True)
        check()
    stop.signal_number = ranks.largest(stop.signal_number or 0) or None
    if stop.requested:
        if state.step and ranks.is_first:
            save_last(folder, model, optimizer, state)
        ranks.any(False)  # not before rank 0 has saved: torchrun ends all when one leaves
        print(
            f"stopped by a signal at step {state.step}, saved; the same command goes on from here", flush=True
        )
        sys.exit(stop.exit_code)


# --- from the command line ------------------------------------------------------------------------


def resolve_machine(args: argparse.Namespace) -> None:
    """Fit --device and --precision to this machine, in place, and TF32 for this process."""
    device = resolve_device(args.device)
    warn_of_device(device)
    args.device = str(device)
    args.precision, _ = resolve_precision(args.precision, device)
    set_float32_products(args.precision)


def start(args: argparse.Namespace, ranks: Ranks = ONE) -> None:
    """Train, from where a stopped run left off if there is one, and write the encoder."""
    folder = Path(args.output_dir)
    stored = ranks.from_first(lambda: find_run(folder, args.pretrained, args.overwrite))
    resolve_machine(args)  # before the data are read, which takes a while
    ranks.check_device(args.device)
    sentences, dev_sentences = read_sentences(
        Path(args.data_dir),
        args.tasks,
        args.extra_data,
        seed=args.seed,
        eval_max_examples=args.eval_max_examples,
    )
    model, tokenizer, report = load_encoder(args.pretrained, args.seed)
    args.max_length = min(args.max_length, model.bert.config.max_position_embeddings)
    print(f"chosen: max_length {args.max_length}, device {args.device}, precision {args.precision}")
    text, dev_text = (
        MaskedText(found, tokenizer, args.max_length, args.mlm_prob) for found in (sentences, dev_sentences)
    )
    steps_per_epoch = math.ceil(len(text.lengths) / args.batch_size)
    args.max_steps = args.max_steps or math.ceil(args.epochs * steps_per_epoch)
    names = [each.name for each in fields(MlmSettings) if each.name not in ("folder", "ranks")]
    settings = MlmSettings(folder, **{name: getattr(args, name) for name in names}, ranks=ranks)
    data = f"{zlib.crc32(repr((sentences, dev_sentences)).encode('utf-8', 'replace')):08x}"
    ranks.check_same("data", data)
    if stored:
        check_same(folder, stored, vars(args), data)
    print(f"encoder {args.pretrained}: {report}")
    model.to(args.device)
    optimizer = make_optimizer(model, args.lr, args.weight_decay)

    def open_folder() -> MlmState:
        if not stored:
            remove_checkpoints(folder / LAST)
            for name in OUTPUT_FILES:
                (folder / name).unlink(missing_ok=True)
        facts = {"data": data, "encoder": report}
        write_args(folder, vars(args), facts, device=args.device, before=stored)
        last = find_checkpoint(folder / LAST)
        if last is None:
            return MlmState(loss_scale=LossScale() if args.precision == "fp16" else None)
        state = load_last(last, model, optimizer)
        print(f"continuing {folder} at step {state.step}")
        return state

    state = ranks.from_first(open_folder)
    if not ranks.is_first:
        take_state(optimizer, state)
    for tensor in run_tensors(model, optimizer).values():
        ranks.copy_first(tensor)
    with catch_signals() as stop:
        train(settings, model, optimizer, state, text, dev_text, stop)
        if ranks.is_first:
            save_encoder(folder, model, tokenizer)
    print(f"encoder: {folder}")


def run(argv: list[str] | None) -> None:
    with join_ranks("training.pretrain_mlm") as ranks:
        with ranks.quiet():
            args = get_args(argv)
        with lock_folder(Path(args.output_dir)) if ranks.is_first else nullcontext():
            start(args, ranks)


def main(argv: list[str] | None = None) -> int:
    return run_script("training.pretrain_mlm", partial(run, argv))


if __name__ == "__main__":
    sys.exit(main())
