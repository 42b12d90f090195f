"""The command line of `multitask_classifier.py`: every flag once, and one function for defaults that depend on others.

The course starter's flags and their defaults stay valid; where we differ, the help text says so.
"""

import argparse
import math
from pathlib import Path

from config import DEFAULT_TASKS, OFFLINE_ENCODER, SPLITS, TASKS
from datasets import SAMPLERS
from evaluation import OVERALLS, PREDICTION_STYLES
from heads import PAIR_HEADS, POOLINGS
from optimizer import SCHEDULES
from pcgrad import GRAD_METHODS, GRAD_REDUCTIONS
from support.command_line import OneLineParser, number
from support.errors import UserError
from training.run_folder import ARGS_FILE, read_args_file
from training.settings import HEAD_DROPOUT_PROB
from training.sources import EXTRA_SOURCES

PRECISIONS = ("auto", "fp32", "bf16")
COMPILE = ("auto", "on", "off")
FINE_TUNE_MODES = {"last-linear-layer": True, "full-model": False}  # value: is the encoder frozen?
OPTIONS = {"pretrain": True, "finetune": False}
# What may change when a run is read again: where things are and how much is said, not what is computed.
FILES = {f"{task}_{split}{ending}" for task in TASKS for split in SPLITS for ending in ("", "_out")}
MODES = {"output_dir", "resume", "overwrite", "eval_only", "predict_only"}
RESUME_MAY_CHANGE = (
    FILES
    | MODES
    | {"data_dir", "cache_dir", "predict_splits", "prediction_style", "max_steps", "patience", "log_every"}
    | {"keep_last", "max_bad_steps"}
)
READING_MAY_CHANGE = (
    FILES
    | MODES
    | {"data_dir", "cache_dir", "predict_splits", "prediction_style"}
    | {"device", "use_gpu", "precision", "max_length"}
)


COUNT = number(int, 1)
COUNT_OR_NONE = number(int, 0)
PROBABILITY = number(float, 0, 1, high_open=True)
POSITIVE = number(float, 0, low_open=True)
NOT_NEGATIVE = number(float, 0)


def task_list(text: str) -> tuple[str, ...]:
    tasks = tuple(part.strip() for part in text.split(",") if part.strip())
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks or len(set(tasks)) < len(tasks):
        raise argparse.ArgumentTypeError(f"value is {text!r}; expected some of {','.join(TASKS)}, each once")
    return tasks


def weight_list(text: str) -> dict[str, float]:
    weights = {}
    for part in text.split(","):
        task, _, value = part.partition("=")
        try:
            weights[task.strip()] = float(value)
        except ValueError:
            weights[task.strip()] = math.nan
    if not all(task in TASKS and 0 <= weight < math.inf for task, weight in weights.items()):
        raise argparse.ArgumentTypeError(f"value is {text!r}; expected TASK=NUMBER,..., as in sst=1,sts=2.5")
    return weights


def source_list(text: str) -> dict[str, int | None]:
    sources = {}
    for part in text.split(","):
        name, _, count = part.strip().partition("=")
        if name not in EXTRA_SOURCES or name in sources or (count and not count.isdecimal()) or count == "0":
            raise argparse.ArgumentTypeError(
                f"value is {text!r}; expected NAME or NAME=COUNT,... with names out of {','.join(EXTRA_SOURCES)}, each once"
            )
        sources[name] = int(count) if count else None
    return sources


def split_list(text: str) -> tuple[str, ...]:
    splits = tuple(part.strip() for part in text.split(",") if part.strip())
    if not splits or not set(splits) <= {"dev", "test"} or len(set(splits)) < len(splits):
        raise argparse.ArgumentTypeError(f"value is {text!r}; expected dev, test or dev,test")
    return splits


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="multitask_classifier.py",
        description="Train one BERT on several tasks at once, evaluate it, and write prediction files.",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    data = parser.add_argument_group("data")
    data.add_argument(
        "--data_dir", default="data", metavar="DIR", help="folder with the data files (default: data)"
    )
    data.add_argument(
        "--cache_dir",
        metavar="DIR",
        help="where the word pieces of large files are kept between runs; '' for nowhere (default: the user's cache)",
    )
    data.add_argument(
        "--tasks",
        type=task_list,
        default=DEFAULT_TASKS,
        metavar="TASK,...",
        help=f"tasks to train, out of {','.join(TASKS)} (default: {','.join(DEFAULT_TASKS)})",
    )
    data.add_argument(
        "--max_length",
        type=number(int, 3),
        default=512,
        help="longest sequence, in word pieces (default: 512)",
    )
    data.add_argument(
        "--extra_data",
        type=source_list,
        default={},
        metavar="NAME[=COUNT],...",
        help=f"additional training rows, out of {','.join(EXTRA_SOURCES)}; COUNT: as many, drawn at random (default: none)",
    )
    for task, spec in TASKS.items():
        for split, name in spec.files.items():
            data.add_argument(f"--{task}_{split}", metavar="FILE", help=f"instead of {name} in --data_dir")

    model = parser.add_argument_group("model")
    model.add_argument(
        "--pretrained",
        default=OFFLINE_ENCODER,
        metavar="NAME|DIR",
        help=f"encoder to start from: a folder, a hub name (NAME@COMMIT), or {OFFLINE_ENCODER}, which needs no network"
        f" (default: {OFFLINE_ENCODER})",
    )
    model.add_argument(
        "--pooling",
        choices=POOLINGS,
        default="mean",
        help="how a sequence becomes one vector (default: mean)",
    )
    for task, spec in TASKS.items():
        if spec.is_pair:
            model.add_argument(
                f"--{task}_head",
                choices=PAIR_HEADS,
                default=spec.default_head,
                help=f"how {spec.title} sees a pair (default: {spec.default_head})",
            )
    model.add_argument(
        "--head_layers", type=COUNT, default=1, help="dense layers in each head but cosine (default: 1)"
    )
    model.add_argument(
        "--hidden_dropout_prob",
        type=PROBABILITY,
        help="dropout of hidden states in the encoder and before the heads, in [0, 1) (default: the checkpoint's own in the encoder,"
        f" {HEAD_DROPOUT_PROB} before the heads)",
    )
    model.add_argument("--freeze_encoder", action="store_true", help="train the heads only")
    model.add_argument("--option", choices=OPTIONS, help="course starter: pretrain is --freeze_encoder")
    model.add_argument(
        "--fine-tune-mode",
        choices=FINE_TUNE_MODES,
        help="later starters: last-linear-layer is --freeze_encoder",
    )

    training = parser.add_argument_group("training")
    training.add_argument(
        "--epochs",
        type=POSITIVE,
        default=10,
        help="length of the run; one epoch takes as many examples as all tasks hold together, which task they come from"
        " is up to --sampler (default: 10)",
    )
    training.add_argument(
        "--max_steps", type=COUNT, help="length of the run in steps (optimizer updates), instead of --epochs"
    )
    training.add_argument(
        "--batch_size", type=COUNT, default=8, help="examples per task and forward pass (default: 8)"
    )
    for task in TASKS:
        training.add_argument(
            f"--{task}_batch_size", type=COUNT, help="the same for one task (default: --batch_size)"
        )
    training.add_argument(
        "--grad_accum", type=COUNT, default=1, help="batches per task and step (default: 1)"
    )
    training.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=11711, help="(default: 11711)")
    training.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="of matrix products; weights and optimizer stay fp32. auto: bf16 where the processor is fast at it (default: auto)",
    )
    training.add_argument(
        "--compile",
        choices=COMPILE,
        default="auto",
        help="compile the passes over gradients and weights (torch.compile). auto: on the CPU, if there is a C++ compiler and"
        " the run is long enough for it to pay (default: auto)",
    )
    training.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    training.add_argument("--use_gpu", action="store_true", help="course starter: --device cuda")

    optimizer = parser.add_argument_group("optimizer")
    optimizer.add_argument(
        "--lr",
        type=POSITIVE,
        help="learning rate of the encoder (default: 1e-5, the course's, at bert-base size; 1e-4 for narrower encoders)",
    )
    optimizer.add_argument(
        "--head_lr",
        type=POSITIVE,
        help="learning rate of the heads, which start from nothing (default: 1e-3)",
    )
    optimizer.add_argument(
        "--weight_decay",
        type=NOT_NEGATIVE,
        default=0.01,
        help="per update, times lr; matrices only (default: 0.01)",
    )
    optimizer.add_argument(
        "--schedule",
        choices=SCHEDULES,
        default="linear",
        help="of the learning rate after warm-up (default: linear)",
    )
    optimizer.add_argument(
        "--warmup_steps", type=COUNT_OR_NONE, help="linear warm-up, in steps (default: --warmup_ratio)"
    )
    optimizer.add_argument(
        "--warmup_ratio",
        type=PROBABILITY,
        default=0.1,
        help="linear warm-up, as a share of the run (default: 0.1)",
    )
    optimizer.add_argument("--rectify", action="store_true", help="RAdam's rectified warm-up in AdamW")
    optimizer.add_argument(
        "--clip_norm",
        type=NOT_NEGATIVE,
        default=1.0,
        help="longest gradient of a step; 0: no clipping (default: 1)",
    )

    optimizer.add_argument(
        "--max_bad_steps",
        type=COUNT,
        default=20,
        help="steps in a row that may be skipped, because loss or gradient is not finite, before the run gives up (default: 20)",
    )

    multitask = parser.add_argument_group("multitask")
    multitask.add_argument(
        "--grad_method",
        choices=GRAD_METHODS,
        default="pcgrad",
        help="how task gradients are combined (default: pcgrad)",
    )
    multitask.add_argument(
        "--surgery_tasks",
        type=task_list,
        metavar="TASK,...",
        help="tasks whose gradients pcgrad or gradvac may change; the others keep theirs (default: all)",
    )
    multitask.add_argument(
        "--grad_reduction",
        choices=GRAD_REDUCTIONS,
        help="sum or mean over the step's slots (default: sum; mean for --grad_method mean)",
    )
    multitask.add_argument(
        "--sampler",
        choices=SAMPLERS,
        default="round_robin",
        help="which tasks fill the slots of a step (default: round_robin)",
    )
    multitask.add_argument(
        "--task_weights",
        type=weight_list,
        default={},
        metavar="TASK=W,...",
        help="factors of the losses (default: 1)",
    )

    output = parser.add_argument_group("output")
    output.add_argument(
        "--output_dir", metavar="DIR", help="run folder (default: runs/ and a name made of the settings)"
    )
    output.add_argument(
        "--eval_every",
        type=COUNT,
        help="steps between evaluations and checkpoints (default: a tenth of the run)",
    )
    output.add_argument(
        "--eval_max_examples",
        type=COUNT,
        help="dev examples per task in evaluations during the run; the last one takes all (default: all)",
    )
    output.add_argument(
        "--select_by",
        choices=(*OVERALLS, *TASKS),
        default="mean",
        help="dev score that chooses the best checkpoint: an overall or one task (default: mean)",
    )
    output.add_argument(
        "--patience",
        type=COUNT_OR_NONE,
        default=0,
        help="evaluations without a better score before stopping; 0: never (default: 0)",
    )
    output.add_argument(
        "--log_every", type=COUNT, default=10, help="steps between lines of the log (default: 10)"
    )
    output.add_argument(
        "--keep_last",
        type=COUNT,
        default=2,
        help="checkpoints to keep in last/, last.1/, ...; a damaged one is replaced by the one before (default: 2)",
    )
    output.add_argument("--resume", action="store_true", help="continue the run in --output_dir, exactly")
    output.add_argument(
        "--overwrite", action="store_true", help="start anew in an --output_dir that holds a run"
    )
    output.add_argument(
        "--eval_only", action="store_true", help="evaluate the best checkpoint in --output_dir on dev"
    )
    output.add_argument(
        "--predict_only",
        action="store_true",
        help="write prediction files from the best checkpoint in --output_dir",
    )
    output.add_argument(
        "--predict_splits",
        type=split_list,
        default=("dev", "test"),
        metavar="SPLIT,...",
        help="splits to write prediction files for at the end (default: dev,test)",
    )
    output.add_argument(
        "--prediction_style",
        choices=PREDICTION_STYLES,
        default="starter",
        help="form of prediction files (default: starter)",
    )
    for task, spec in TASKS.items():
        for split in ("dev", "test"):
            output.add_argument(
                f"--{task}_{split}_out", metavar="FILE", help=f"{split} predictions of {spec.title}"
            )
    return parser


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line and check the flags against each other, before anything is loaded.

    With `--resume`, `--eval_only` or `--predict_only` the run's own settings take the place of the defaults, so
    that only `--output_dir` is needed. Exits with code 2 and one line if a flag is wrong. Flags whose default
    depends on others are None until `resolve_args`.

    Raises:
        UserError: if a run is to be read and there is none, or a resumed run would become another one.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    given = given_flags(argv)
    if args.resume or args.eval_only or args.predict_only:
        given = take_settings_of_run(parser, args, given)
    args.given = given
    frozen = {
        args.option and OPTIONS[args.option],
        args.fine_tune_mode and FINE_TUNE_MODES[args.fine_tune_mode],
        args.freeze_encoder or None,
    } - {None}
    if len(frozen) > 1:
        parser.error(
            "--option, --fine-tune-mode and --freeze_encoder contradict each other; give one of them"
        )
    args.freeze_encoder = frozen == {True}
    if args.use_gpu and args.device not in ("auto", "cuda"):
        parser.error(f"--use_gpu and --device {args.device} contradict each other")
    if args.select_by in TASKS and args.select_by not in args.tasks:
        parser.error(f"--select_by {args.select_by}: that task is not among --tasks {','.join(args.tasks)}")
    stray = sorted(set(args.task_weights) - set(args.tasks))
    if stray:
        parser.error(f"--task_weights names {stray[0]}, which is not among --tasks {','.join(args.tasks)}")
    stray = sorted(set(args.surgery_tasks or ()) - set(args.tasks))
    if stray:
        parser.error(f"--surgery_tasks names {stray[0]}, which is not among --tasks {','.join(args.tasks)}")
    if not any(args.task_weights.get(task, 1.0) for task in args.tasks):
        parser.error("--task_weights is 0 for every task; nothing would be trained")
    stray = [name for name in args.extra_data if EXTRA_SOURCES[name].task not in args.tasks]
    if stray:
        parser.error(
            f"--extra_data {stray[0]} feeds {EXTRA_SOURCES[stray[0]].task}, which is not among --tasks"
            f" {','.join(args.tasks)}"
        )
    method = GRAD_METHODS[args.grad_method]
    if method.is_mean and args.grad_reduction not in (None, method.reduction):
        parser.error(
            f"--grad_method {args.grad_method} and --grad_reduction {args.grad_reduction} contradict each other"
        )
    if args.output_dir == "":
        parser.error("--output_dir is empty; expected a folder")
    return args


def take_settings_of_run(parser: argparse.ArgumentParser, args: argparse.Namespace, given: dict) -> dict:
    """Put the settings of the run in --output_dir into `args`, in place of defaults; refuse flags that contradict it.

    Returns:
        the flags given, now or when the run was started.
    """
    reading = args.eval_only or args.predict_only
    mode = "--resume" if args.resume else "--eval_only" if args.eval_only else "--predict_only"
    if not args.output_dir:
        parser.error(f"{mode} needs --output_dir, the run folder to read")
    if args.overwrite or (args.resume and reading):
        parser.error("--resume, --overwrite and --eval_only or --predict_only contradict each other")
    stored, first_given = read_run(args.output_dir)
    may_change = RESUME_MAY_CHANGE if args.resume else READING_MAY_CHANGE
    # The command that started the run may be repeated word for word, with "auto" and the like.
    changed = [
        f"--{name} {given[name]} (the run has {stored[name]})"
        for name in sorted(set(given) - may_change)
        if given[name] not in (stored[name], first_given.get(name, parser.get_default(name)))
    ]
    if changed:
        parser.error(f"{mode} goes on with the run's own settings, other than {', '.join(changed)}")
    changed = {name: value for name, value in given.items() if name in may_change - MODES}
    elsewhere = {"device", "use_gpu"} if reading else set()  # a run may be read on another machine
    vars(args).update({name: stored[name] for name in set(stored) - MODES - elsewhere - set(changed)})
    return first_given | changed


def given_flags(argv: list[str] | None) -> dict:
    """The flags that stand on the command line, without any default."""
    parser = make_parser()
    absent = object()  # argparse keeps what it finds in the namespace where it would put a default
    args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(parser.parse_args([])), absent)))
    return {name: value for name, value in vars(args).items() if value is not absent}


def read_run(output_dir: str | Path) -> tuple[dict, dict]:
    """A run's settings from its `args.json`: all of them with dependent defaults resolved, and those that were given.

    Flags that came after the run was made are at their defaults.

    Raises:
        UserError: if there is no run, or a value could not have come from its flag.
    """
    folder = Path(output_dir)
    parser, stored = make_parser(), read_args_file(folder)["args"]
    given = stored.get("given")
    if not isinstance(given, dict):
        raise UserError(
            f"{folder / ARGS_FILE}: damaged, or from another script (it does not say what was given)"
        )
    actions = [action for action in parser._actions if action.dest != "help"]
    for settings in (stored, given):
        for action in (action for action in actions if action.dest in settings):
            value = settings[action.dest]
            settings[action.dest] = value = tuple(value) if isinstance(value, list) else value
            if not could_give(action, value):
                raise UserError(f"{folder / ARGS_FILE}: damaged; {action.dest} is {value!r}"[:200])
    names = [action.dest for action in actions]
    settings = {name: stored.get(name, parser.get_default(name)) for name in names}
    return settings, {name: given[name] for name in names if name in given}


def could_give(action: argparse.Action, value) -> bool:
    """Whether a flag can have a value, as seen from its type and choices."""
    if isinstance(action.default, bool):
        return isinstance(value, bool)
    if type(value) is type(action.default) and value == action.default:
        return True
    if isinstance(value, dict):
        value_text = ",".join(name if count is None else f"{name}={count}" for name, count in value.items())
    else:
        value_text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    try:
        parsed = action.type(value_text) if action.type else value_text
    except argparse.ArgumentTypeError:
        return False
    return (
        parsed == value
        and not isinstance(value, bool)
        and (action.choices is None or parsed in action.choices)
    )
