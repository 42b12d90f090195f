"""From flags to settings: the last place that sees the whole command line.

`resolve_args` fills in every default that depends on another flag, the encoder, the data or this machine;
what it chose is printed and kept in the run's `args.json`. `make_settings` then sorts the flags into the
objects of `training.settings`.
"""

import argparse
import hashlib
import json
import math
import shlex
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import torch

from config import RECIPES, TASKS, BertConfig
from datasets import Rows, data_file
from evaluation import TASK_KINDS, Objective, prediction_name
from heads import HEADS
from kernels.fused import find_compiler, pays_off
from kernels.grad_methods import GRAD_METHODS
from support.device import (
    is_ampere,
    make_autocast,
    resolve_device,
    resolve_precision,
    set_float32_products,
    warn_of_device,
)
from support.errors import UserError
from support.files import check_replaceable, read_head
from support.ranks import ONE, Ranks
from support.specs import find_row
from training.flags import MIN_NOISE_BATCHES, flags_marked, given_flags, needs_noise
from training.run_folder import is_runs_own
from training.run_parser import value_of_task
from training.settings import (
    HEAD_DROPOUT_PROB,
    DataSettings,
    LoopSettings,
    ModelSettings,
    OptimizerSettings,
    OutputSettings,
    PhraseSettings,
    RunSettings,
    StepSettings,
    TeacherSettings,
    TokenSettings,
)
from training.task_schedule import draw_shares
from training.token_cache import default_cache_dir

# Flags that a run's default name speaks of where they are given, each after a word.
NAMED_FLAGS = {
    "lr": "lr",
    "head_lr": "headlr",
    "batch_size": "batch",
    "epochs": "epochs",
    "max_steps": "steps",
}
NAMED_FLAGS |= {"sampler": "", "recipe": ""}
NAME_MARKS = ("result", "length", "text")  # what changes weights or scores; --precision does, too
# What follows a task's name in the flags that it has for itself.
TASK_FLAGS = ("head", "loss", "batch_size", "train", "dev", "test", "unlabelled", "dev_out", "test_out")
# The noise of gradients is measured with as many batches as cost about 4 % of the steps between evaluations.
NOISE_INTERVAL, MAX_NOISE_BATCHES = 25, 16
LOOP_FLAGS = [field.name for field in fields(LoopSettings) if field.name != "batch_sizes"]


# --- settings -------------------------------------------------------------------------------------


def output_folder(args: argparse.Namespace) -> Path:
    return Path(args.output_dir or default_output_dir(args))


def default_output_dir(args: argparse.Namespace) -> str:
    """A name that tells runs apart: what every run has, what was given in words, the rest of it as a hash."""
    encoder = Path(args.pretrained.partition("@")[0]).name or "encoder"
    words = [encoder, *args.tasks, args.grad_method.replace(":", "-")]  # some file systems take no colon
    words += ["by-layer"] if args.surgery_scope == "layer" else []
    words += [] if args.gram == "step" else [args.gram.replace(":", "-")]
    words += [] if args.loss_weighting == "fixed" else [args.loss_weighting.replace(":", "-")]
    words += [head_name(args, task) for task in args.tasks if TASKS[task].is_pair]
    words += ["frozen"] if args.freeze_encoder else []
    for flag, word in NAMED_FLAGS.items():
        value = args.given.get(flag)
        if value is not None:
            words.append(word + (value.replace(":", "-") if isinstance(value, str) else f"{value:g}"))
    told = {
        *NAMED_FLAGS,
        "tasks",
        "task",
        "grad_method",
        "surgery_scope",
        "gram",
        "loss_weighting",
        "seed",
        "freeze_encoder",
        "option",
        "fine_tune_mode",
    }
    told |= {f"{task}_head" for task in args.tasks} | (
        {"pretrained"} if args.pretrained == encoder else set()
    )
    rest = {
        name: args.given[name]
        for name in sorted(({"precision"} | flags_marked(*NAME_MARKS)) & set(args.given) - told)
    }
    if rest:
        words.append(hashlib.sha256(json.dumps(rest).encode()).hexdigest()[:6])
    return str(Path("runs") / "-".join([*words, f"seed{args.seed}"]))


def head_name(args: argparse.Namespace, task: str) -> str:
    return getattr(args, f"{task}_head") if TASKS[task].is_pair else "single"


def data_settings(args: argparse.Namespace) -> DataSettings:
    """Known before anything is resolved, since the defaults of other flags depend on the data."""
    files = {
        (task, split): Path(getattr(args, f"{task}_{split}") or data_file(args.data_dir, spec, split))
        for task, spec in TASKS.items()
        for split in spec.files
    }
    return DataSettings(
        tasks=args.tasks,
        data_dir=Path(args.data_dir),
        files=files,
        extra_data=args.extra_data,
        predict_splits=args.predict_splits,
        predict_tasks=args.predict_tasks or args.tasks,
        batch_sizes=batch_sizes(args),
        **unlabelled_settings(args),
    )


def unlabelled_settings(args: argparse.Namespace) -> dict:
    """What `DataSettings` says of examples without labels: none where no teacher labels them."""
    if not args.teacher:
        return {}
    given = {task: getattr(args, f"{task}_unlabelled") for task in args.tasks}
    return {
        "unlabelled": {task: Path(path) for task, path in given.items() if path},
        "unlabelled_ratio": args.unlabelled_ratio,
        "transductive": args.transductive or (),
    }


def batch_sizes(args: argparse.Namespace) -> dict[str, int]:
    """Examples of a micro-batch: a task's own flag, or --batch_size."""
    return {task: getattr(args, f"{task}_batch_size") or args.batch_size for task in args.tasks}


def token_settings(args: argparse.Namespace) -> TokenSettings:
    joint = {task: HEADS[head_name(args, task)].joint for task in args.tasks}
    apart = {task: bool(HEADS[head_name(args, task)].parts) for task in args.tasks}
    cache_dir = default_cache_dir() if args.cache_dir is None else Path(args.cache_dir or ".")
    cache_dir = None if args.cache_dir == "" else cache_dir
    return TokenSettings(joint, args.max_length, cache_dir, apart, args.symmetric)


def model_settings(args: argparse.Namespace) -> ModelSettings:
    head_dropout_prob = args.hidden_dropout_prob
    return ModelSettings(
        heads={task: head_name(args, task) for task in args.tasks},
        losses={task: getattr(args, f"{task}_loss") for task in args.tasks if TASKS[task].is_ordered},
        pooling=args.pooling,
        head_layers=args.head_layers,
        head_dropout_prob=HEAD_DROPOUT_PROB if head_dropout_prob is None else head_dropout_prob,
        freeze_encoder=args.freeze_encoder,
        objective=Objective(args.label_smoothing, args.rdrop, args.head_dropout_samples),
        seed=args.seed,
        redraw_layers=args.redraw_layers,
    )


def output_settings(args: argparse.Namespace) -> OutputSettings:
    folder = output_folder(args)
    default = folder / "predictions"
    files = {
        (task, split): Path(
            getattr(args, f"{task}_{split}_out")
            or default / prediction_name(task, split, args.prediction_style)
        )
        for task in args.tasks
        for split in ("dev", "test")
    }
    names = ("prediction_style", "predict_splits", "final_eval", "select_by", "keep_last", "report_to")
    return OutputSettings(
        folder=folder,
        prediction_files=files,
        predict_tasks=args.predict_tasks or args.tasks,
        **{name: getattr(args, name) for name in names},
    )


def teacher_settings(args: argparse.Namespace) -> TeacherSettings | None:
    if not args.teacher:
        return None
    return TeacherSettings(tuple(map(Path, args.teacher)), args.teacher_weight, args.device, args.precision)


def make_settings(args: argparse.Namespace, ranks: Ranks = ONE) -> RunSettings:
    """The settings of a run whose flags are all resolved."""
    return RunSettings(
        data=data_settings(args),
        tokens=token_settings(args),
        phrases=PhraseSettings(
            args.phrase_weight, args.phrase_min_words, args.phrase_limit, args.phrase_weighting
        ),
        model=model_settings(args),
        step=StepSettings(
            seed=args.seed,
            grad_method=args.grad_method,
            grad_reduction=args.grad_reduction,
            task_weights=args.task_weights,
            clip_norm=args.clip_norm,
            surgery_tasks=args.surgery_tasks,
            surgery_scope=args.surgery_scope,
            gram=args.gram,
            loss_weighting=args.loss_weighting,
            loss_schedule=args.loss_schedule,
            total_steps=args.max_steps,
            fgm=args.fgm,
            autocast=make_autocast(args.device, args.precision),
            ranks=ranks,
        ),
        optimizer=OptimizerSettings(
            lr=args.lr,
            head_lr=args.head_lr,
            layer_lr_decay=args.layer_lr_decay,
            weight_decay=args.weight_decay,
            rectify=args.rectify,
            ema=args.ema,
            precision=args.precision,
            accumulates=args.grad_accum > 1 or args.fgm > 0,
            compiled=args.compile == "on" and not is_cuda(args),
        ),
        loop=LoopSettings(
            batch_sizes=batch_sizes(args), **{name: getattr(args, name) for name in LOOP_FLAGS}
        ),
        output=output_settings(args),
        teacher=teacher_settings(args),
        device=args.device,
        captured=args.compile == "on" and is_cuda(args),
        flags=dict(vars(args)),
    )


# --- defaults that depend on others ---------------------------------------------------------------


def resolve_machine(args: argparse.Namespace) -> list[str]:
    """Settle --device and --precision on this machine, in place, and TF32 for this process.

    Returns:
        lines that say what was chosen.

    Raises:
        UserError: if the device is not available, or lacks the precision.
    """
    chosen = []
    device = resolve_device("cuda" if args.use_gpu else args.device)
    warn_of_device(device)
    if args.device != str(device):
        args.device = str(device)
        chosen.append(f"device {device}")
    args.precision, why = resolve_precision(args.precision, device)
    if why:
        chosen.append(f"precision {args.precision} ({why})")
    set_float32_products(args.precision)
    return chosen


def fit_to_encoder(args: argparse.Namespace, bert_config: BertConfig) -> list[str]:
    """Fit --max_length to the encoder, in place; returns lines that say what was chosen.

    Raises:
        UserError: if a pair cannot be encoded as one sequence, or there are too few layers to redraw.
    """
    if args.redraw_layers > bert_config.num_hidden_layers:
        raise UserError(
            f"--redraw_layers is {args.redraw_layers}; expected at most {bert_config.num_hidden_layers}, the"
            " layers of the encoder"
        )
    for task in args.tasks:
        if HEADS[head_name(args, task)].joint and bert_config.type_vocab_size < 2:
            raise UserError(
                f"--{task}_head {head_name(args, task)} needs segment ids, and this encoder's type_vocab_size"
                " is 1"
            )
    if args.max_length <= bert_config.max_position_embeddings:
        return []
    args.max_length = bert_config.max_position_embeddings
    return [f"max_length {args.max_length} (the encoder's max_position_embeddings)"]


def resolve_args(args: argparse.Namespace, bert_config: BertConfig, sizes: dict[str, int]) -> list[str]:
    """Fill in every default that depends on other flags, in place.

    Args:
        args: from `get_args`, after `resolve_machine`; each attribute that was None and is needed by the run
            gets its value.
        sizes: task -> training examples.

    Returns:
        lines that say what was chosen and why.

    Raises:
        UserError: if a flag does not fit the encoder or this machine.
    """
    chosen = fit_to_encoder(args, bert_config)

    def choose(name: str, value, why: str):
        if getattr(args, name) is None:
            setattr(args, name, value)
            chosen.append(f"{name} {value} ({why})")

    small = bert_config.hidden_size < 768
    choose("lr", 1e-4 if small else 1e-5, f"encoder with hidden_size {bert_config.hidden_size}")
    if args.freeze_encoder and "lr" in args.given:
        choose("head_lr", args.lr, "--lr, since the encoder is frozen")
    choose("head_lr", 1e-3, "new heads need larger steps than a trained encoder")
    method, _ = find_row(args.grad_method, GRAD_METHODS)
    choose("grad_reduction", method.reduction, f"grad_method {args.grad_method}")
    for task, batch_size in batch_sizes(args).items():
        setattr(args, f"{task}_batch_size", batch_size)
    args.task_weights = {task: args.task_weights.get(task, 1.0) for task in args.tasks}
    has_classes = {task: TASK_KINDS[TASKS[task].kind].uniform_loss is not None for task in args.tasks}
    for name, tasks in (("rdrop", args.tasks), ("label_smoothing", filter(has_classes.get, args.tasks))):
        values = {task: value_of_task(getattr(args, name), task) for task in tasks}
        setattr(args, name, {task: value for task, value in values.items() if value})
    examples_per_step = args.grad_accum * sum(batch_sizes(args).values())
    steps_per_epoch = sum(sizes.values()) / examples_per_step
    choose(
        "max_steps",
        max(1, math.ceil(args.epochs * steps_per_epoch)),
        f"{args.epochs:g} epochs of {steps_per_epoch:.1f} steps",
    )
    draw_shares(
        args.tasks, args.loss_schedule, args.draw_schedule, args.max_steps
    )  # ends here if one is empty
    resolve_compile(args, bert_config, chosen)
    choose("warmup_steps", int(args.warmup_ratio * args.max_steps), f"warmup_ratio {args.warmup_ratio:g}")
    choose("eval_every", max(1, math.ceil(args.max_steps / 10)), "a tenth of the run")
    choose("noise_batches", *noise_batches(args))
    choose("output_dir", default_output_dir(args), "made of the settings")
    return chosen


def noise_batches(args: argparse.Namespace) -> tuple[int, str]:
    """How many batches measure the noise of the gradients at each evaluation, and why."""
    if args.freeze_encoder:
        return 0, "the encoder is frozen"
    number = min(MAX_NOISE_BATCHES, args.eval_every // NOISE_INTERVAL)
    if number < MIN_NOISE_BATCHES and not needs_noise(args):
        return 0, f"fewer than {MIN_NOISE_BATCHES * NOISE_INTERVAL} steps between evaluations"
    if number < MIN_NOISE_BATCHES:
        return MIN_NOISE_BATCHES, "the fewest whose error is known"
    return number, f"one for every {NOISE_INTERVAL} steps between evaluations"


def is_cuda(args: argparse.Namespace) -> bool:
    return args.device.startswith("cuda")


def resolve_compile(args: argparse.Namespace, bert_config: BertConfig, chosen: list[str]) -> None:
    """Decide --compile for good: a resumed run has to go on with the same operations."""
    problem = compile_problem(args)
    if args.compile == "on" and problem:
        raise UserError(f"--compile on: {problem}")
    if args.compile == "auto":
        why_not = compile_is_idle(args, bert_config) or problem
        args.compile = "off" if why_not else "on"
        why = (
            "steps are captured as CUDA graphs"
            if is_cuda(args)
            else "the first step will take some seconds more"
        )
        chosen.append(f"compile {args.compile} ({why_not or why})")


def compile_problem(args: argparse.Namespace) -> str | None:
    """Why a run cannot compile or capture anything; None if it can."""
    if args.precision == "fp16":
        return "--precision fp16 trains with plain operations only, which its loss scale needs"
    if is_cuda(args):
        if find_spec("triton") is None:
            return "the package triton is not installed; steps are captured with its kernels"
        device = torch.device(args.device)
        if device.type == "cuda" and not is_ampere(device):
            return f"{device} has a compute capability below 8.0, which captured steps need"
        return None
    if not args.device.startswith("cpu"):
        return f"--device {args.device} trains with plain operations only"
    if find_compiler() is None:
        return "no C++ compiler found; expected g++ or clang++ (or their name in CXX)"
    return None


def compile_is_idle(args: argparse.Namespace, bert_config: BertConfig) -> str | None:
    """Why compiling would not make a run any shorter; None if it would."""
    if is_cuda(args):
        return None
    size, layers = bert_config.hidden_size, bert_config.num_hidden_layers
    # Biases and small tables left out: about the number is good enough.
    num_params = size * (bert_config.vocab_size + layers * (4 * size + 2 * bert_config.intermediate_size))
    if args.freeze_encoder:
        return "nothing to gain"
    return None if pays_off(num_params, args.max_steps) else "the run is too short for it to pay"


def describe_recipe(args: argparse.Namespace) -> str | None:
    """A line that says what --recipe set, and what was given instead; None if it sets nothing."""
    if not RECIPES[args.recipe]:
        return None
    text = ", ".join(f"{name} {value}" for name, value in args.from_recipe.items())
    instead = sorted(set(given_flags(shlex.split(RECIPES[args.recipe]))) & set(args.given))
    ending = f"; given instead: {', '.join(instead)}" if instead else ""
    return f"recipe {args.recipe}: {text or 'nothing of it'}{ending}"


def flags_without_effect(args: argparse.Namespace) -> list[str]:
    """The flags given on the command line that this run ignores, each with the reason."""
    reasons = {}
    own_sizes = {f"{task}_batch_size" for task in args.tasks}
    if own_sizes <= {*args.given, *args.from_recipe}:
        reasons["batch_size"] = (
            f"each task has its own, {', '.join(f'--{name}' for name in sorted(own_sizes))}"
        )
    if "max_steps" in args.given:
        reasons["epochs"] = "--max_steps says how long the run is"
    if "warmup_steps" in args.given:
        reasons["warmup_ratio"] = "--warmup_steps says how long the warm-up is"
    surgery = ("grad_method", "grad_reduction", "surgery_tasks", "surgery_scope", "gram")
    if len(args.tasks) == 1:
        for name in (*surgery, "sampler", "loss_weighting"):
            reasons[name] = "there is one task"
    if not find_row(args.grad_method, GRAD_METHODS)[0].changes_gradients:
        reasons["surgery_tasks"] = f"--grad_method {args.grad_method} changes no gradient"
    if args.freeze_encoder:
        for name in surgery:
            reasons[name] = "with a frozen encoder the tasks share no gradient"
        reasons["layer_lr_decay"] = reasons["noise_batches"] = "the encoder is frozen"
        if "head_lr" in args.given:
            reasons["lr"] = "the encoder is frozen, and --head_lr trains the heads"
    if all(TASK_KINDS[TASKS[task].kind].uniform_loss is None for task in args.tasks):
        reasons["label_smoothing"] = "no task has classes"
    if not any(HEADS[head_name(args, task)].joint for task in args.tasks):
        reasons["symmetric"] = "no task has a head that reads a pair as one sequence"
    if not args.phrase_weight:
        for name in ("phrase_min_words", "phrase_limit", "phrase_weighting"):
            reasons[name] = "--phrase_weight is 0"
    if all(HEADS[head_name(args, task)].single_number for task in args.tasks):
        reasons["head_layers"] = "a cosine head has one number to scale"
        reasons["head_dropout_samples"] = "a cosine head has no dropout"
    if args.hidden_dropout_prob == 0:
        reasons["head_dropout_samples"] = "--hidden_dropout_prob is 0"
    if not args.teacher:
        unlabelled = [f"{task}_unlabelled" for task in args.tasks]
        for name in ("teacher_weight", "unlabelled_ratio", "transductive", *unlabelled):
            reasons[name] = "there is no --teacher"
    elif not any(getattr(args, f"{task}_unlabelled") for task in args.tasks):
        reasons["unlabelled_ratio"] = "no --TASK_unlabelled is given"
    for task in set(TASKS) - set(args.tasks):
        for flag in TASK_FLAGS:
            reasons[f"{task}_{flag}"] = f"{task} is not among --tasks"
    return [
        f"--{name} {args.given[name]}: {reason}" for name, reason in reasons.items() if name in args.given
    ]


def check_outputs(output: OutputSettings) -> None:
    """Make sure early that what a run writes has places to go, and that it replaces nothing else.

    Raises:
        UserError: if a path is taken by a folder, by two outputs, by the run itself, or by a file that is no
            prediction file.
    """
    taken = {}
    for (task, split), path in output.asked_files.items():
        flag = f"--{task}_{split}_out"
        check_replaceable(path, "prediction file", is_prediction_file, flag)
        if is_runs_own(path, output.folder):
            raise UserError(f"{flag} {path}: the run itself writes a file there; expected another name")
        if path.resolve() in taken:
            raise UserError(f"{flag} {path}: already taken by {taken[path.resolve()]}")
        taken[path.resolve()] = flag


def is_prediction_file(path: Path) -> bool:
    """Whether a file begins as a prediction file of any task does."""
    header = read_head(path).partition(b"\n")[0].decode("utf-8", "replace")
    names = [part.strip() for part in header.replace("\t", ",").split(",")]
    columns = {column for spec in TASKS.values() for column in (spec.prediction_column, spec.handout_column)}
    return len(names) == 2 and names[0] == "id" and names[1] in columns


def check_own_predictions(args: argparse.Namespace, stored: dict, rows: dict[str, dict[str, Rows]]) -> None:
    """Refuse to put predictions of other data in the place of the run's own.

    Args:
        rows: split -> task -> what is to be predicted.

    Raises:
        UserError: naming the flag that says where they should go.
    """
    digests = set(stored.get("data_files", {}).values())
    for (task, split), path in output_settings(args).asked_files.items():
        found, flag = rows.get(split, {}).get(task), f"--{task}_{split}_out"
        if found and not getattr(args, flag[2:]) and found.sha256 not in digests and path.exists():
            raise UserError(
                f"{found.path}: is not the {split} data of this run, whose predictions in {path} would be"
                f" lost; give {flag} FILE"
            )
