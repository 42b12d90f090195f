"""From flags to settings: every default that depends on another flag, the encoder, the data or this machine.

`resolve_args` is the one function that fills them in; what it chose is printed and kept in the run's `args.json`.
"""

import argparse
import math
from pathlib import Path

from config import TASKS, BertConfig
from evaluation import prediction_name
from heads import HEADS
from kernels.fused import find_compiler, pays_off
from pcgrad import GRAD_METHODS
from support.device import is_bf16_fast, resolve_device
from support.errors import UserError
from training.token_cache import default_cache_dir


def data_file(args: argparse.Namespace, task: str, split: str) -> Path:
    """Where a task's rows come from."""
    return Path(getattr(args, f"{task}_{split}") or Path(args.data_dir) / TASKS[task].files[split])


def cache_dir(args: argparse.Namespace) -> Path | None:
    """Where tokens are kept; None for nowhere."""
    if args.cache_dir is None:
        return default_cache_dir()
    return Path(args.cache_dir) if args.cache_dir else None


def prediction_file(args: argparse.Namespace, task: str, split: str) -> Path:
    """Where a task's predictions go."""
    default = Path(args.output_dir) / "predictions" / prediction_name(task, split, args.prediction_style)
    return Path(getattr(args, f"{task}_{split}_out") or default)


def head_name(args: argparse.Namespace, task: str) -> str:
    return getattr(args, f"{task}_head") if TASKS[task].is_pair else "single"


def resolve_machine(args: argparse.Namespace, bert_config: BertConfig) -> list[str]:
    """Fit --max_length to the encoder, and --device and --precision to this machine, in place.

    Returns:
        lines that say what was chosen.

    Raises:
        UserError: if the device is not to be had, or a pair cannot be encoded as one sequence.
    """
    chosen = []
    if args.max_length > bert_config.max_position_embeddings:
        args.max_length = bert_config.max_position_embeddings
        chosen.append(f"max_length {args.max_length} (the encoder's max_position_embeddings)")
    device = resolve_device("cuda" if args.use_gpu else args.device)
    if args.device != str(device):
        args.device = str(device)
        chosen.append(f"device {device}")
    if args.precision == "auto":
        fast = is_bf16_fast(device)
        args.precision = "bf16" if fast else "fp32"
        chosen.append(
            f"precision {args.precision} (this processor is {'fast' if fast else 'slow'} at bfloat16)"
        )
    for task in args.tasks:
        head = head_name(args, task)
        if HEADS[head].joint and bert_config.type_vocab_size < 2:
            raise UserError(
                f"--{task}_head {head} needs segment ids, and this encoder's type_vocab_size is 1"
            )
    return chosen


def resolve_args(args: argparse.Namespace, bert_config: BertConfig, sizes: dict[str, int]) -> list[str]:
    """Fill in every default that depends on other flags, in place.

    Args:
        args: from `get_args`; each attribute that was None and is needed by the run gets its value.
        sizes: task -> training examples.

    Returns:
        lines that say what was chosen and why.

    Raises:
        UserError: if a flag does not fit the encoder or this machine.
    """
    chosen = resolve_machine(args, bert_config)

    def choose(name: str, value, why: str):
        if getattr(args, name) is None:
            setattr(args, name, value)
            chosen.append(f"{name} {value} ({why})")

    small = bert_config.hidden_size < 768
    choose("lr", 1e-4 if small else 1e-5, f"encoder with hidden_size {bert_config.hidden_size}")
    choose("head_lr", 1e-3, "new heads need larger steps than a trained encoder")
    choose("grad_reduction", GRAD_METHODS[args.grad_method].reduction, f"grad_method {args.grad_method}")
    for task in args.tasks:
        if getattr(args, f"{task}_batch_size") is None:
            setattr(args, f"{task}_batch_size", args.batch_size)
    args.task_weights = {task: args.task_weights.get(task, 1.0) for task in args.tasks}
    examples_per_step = args.grad_accum * sum(getattr(args, f"{task}_batch_size") for task in args.tasks)
    steps_per_epoch = sum(sizes.values()) / examples_per_step
    choose(
        "max_steps",
        max(1, math.ceil(args.epochs * steps_per_epoch)),
        f"{args.epochs:g} epochs of {steps_per_epoch:.1f} steps",
    )
    resolve_compile(args, bert_config, chosen)
    choose("warmup_steps", int(args.warmup_ratio * args.max_steps), f"warmup_ratio {args.warmup_ratio:g}")
    choose("eval_every", max(1, math.ceil(args.max_steps / 10)), "a tenth of the run")
    choose("output_dir", default_output_dir(args), "made of the settings")
    return chosen


def default_output_dir(args: argparse.Namespace) -> str:
    encoder = Path(args.pretrained.partition("@")[0]).name or "encoder"
    heads = "-".join(head_name(args, task) for task in args.tasks if TASKS[task].is_pair)
    name = "-".join(filter(None, [encoder, *args.tasks, args.grad_method, heads, f"seed{args.seed}"]))
    return str(Path("runs") / name)


def resolve_compile(args: argparse.Namespace, bert_config: BertConfig, chosen: list[str]) -> None:
    """Decide --compile for good: a resumed run has to go on with the same operations."""
    size, layers = bert_config.hidden_size, bert_config.num_hidden_layers
    num_params = size * (
        bert_config.vocab_size + layers * (4 * size + 2 * bert_config.intermediate_size)
    )  # about
    if args.compile == "on" and find_compiler() is None:
        raise UserError("--compile on: no C++ compiler found; expected g++ or clang++ (or their name in CXX)")
    if args.compile == "auto":
        if args.freeze_encoder or not args.device.startswith("cpu"):
            args.compile, why = "off", "nothing to gain"
        elif not pays_off(num_params, args.max_steps):
            args.compile, why = "off", "the run is too short for it to pay"
        elif find_compiler() is None:
            args.compile, why = "off", "no C++ compiler found"
        else:
            args.compile, why = "on", "the first step will take some seconds more"
        chosen.append(f"compile {args.compile} ({why})")


def idle_flags(args: argparse.Namespace) -> list[str]:
    """The flags given on the command line that this run ignores, each with the reason."""
    reasons = {}
    if "max_steps" in args.given:
        reasons["epochs"] = "--max_steps says how long the run is"
    if "warmup_steps" in args.given:
        reasons["warmup_ratio"] = "--warmup_steps says how long the warm-up is"
    if len(args.tasks) == 1:
        for name in ("grad_method", "grad_reduction", "surgery_tasks", "sampler"):
            reasons[name] = "there is one task"
    if not GRAD_METHODS[args.grad_method].changes_gradients:
        reasons["surgery_tasks"] = f"--grad_method {args.grad_method} changes no gradient"
    if args.freeze_encoder:
        for name in ("grad_method", "grad_reduction", "surgery_tasks"):
            reasons[name] = "with a frozen encoder the tasks share no gradient"
        reasons["lr"] = "the encoder is frozen; --head_lr trains the heads"
    if all(HEADS[head_name(args, task)].single_number for task in args.tasks):
        reasons["head_layers"] = "a cosine head has one number to scale"
    for task in set(TASKS) - set(args.tasks):
        for name in args.given:
            if name.startswith(f"{task}_"):
                reasons[name] = f"{task} is not among --tasks"
    return [
        f"--{name} {args.given[name]}: {reason}" for name, reason in reasons.items() if name in args.given
    ]


def check_outputs(args: argparse.Namespace) -> None:
    """Make sure, before anything is trained, that what a run writes has places to go.

    Raises:
        UserError: if a path is taken by a folder, or by two outputs.
    """
    taken = {}
    for task in args.tasks:
        for split in ("dev", "test"):
            flag, path = f"--{task}_{split}_out", prediction_file(args, task, split)
            if path.is_dir():
                raise UserError(f"{flag} {path}: is a folder; expected a file")
            if path.absolute() in taken:
                raise UserError(f"{flag} {path}: already taken by {taken[path.absolute()]}")
            taken[path.absolute()] = flag
