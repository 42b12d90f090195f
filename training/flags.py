"""The flags of `multitask_classifier.py`: each stands here once, with its default and with what it changes.

The course starter's flags and their defaults stay valid; where we differ, the help text says so. A flag whose
default depends on other flags, the encoder or the machine is None here; `training.resolve` fills it in.
"""

import argparse
import shlex
from pathlib import Path

from config import DEFAULT_TASKS, OFFLINE_ENCODER, RECIPES, TASKS
from datasets import SAMPLERS
from evaluation import CLASS_LOSSES, OVERALLS, PREDICTION_STYLES, TASK_KINDS
from heads import PAIR_HEADS, PHRASE_POOLINGS, POOLINGS
from kernels.grad_methods import GRAD_METHODS, GRAD_REDUCTIONS
from kernels.grad_noise import GRAMS
from kernels.loss_weightings import LOSS_WEIGHTINGS
from optimizer import SCHEDULES
from support.command_line import FlagType, OneLineParser, number, values_by_name
from support.errors import UserError
from support.specs import describe_specs, find_row, spec_type
from training.args_file import ARGS_FILE, read_args_file
from training.phrases import PHRASE_WEIGHTINGS, phrase_sources
from training.run_parser import (
    COUNT,
    COUNT_OR_NONE,
    DEVICE,
    DEVICE_HELP,
    DIR,
    ENCODER,
    FILE,
    NOT_NEGATIVE,
    OUTPUT_DIR,
    POSITIVE,
    PRECISION_HELP,
    PRECISION_NAMES,
    PROBABILITY,
    READING_MARKS,
    RESUME_MARKS,
    SEED,
    RunParser,
    by_task,
    check_sources,
    find_task_files,
    folder_list,
    is_valid_value,
    name_list,
    source_list,
    task_files,
    task_list,
)
from training.settings import HEAD_DROPOUT_PROB
from training.sources import EXTRA_SOURCES
from training.task_file import set_own_tasks
from training.task_schedule import DRAW_SCHEDULES, LOSS_SCHEDULES
from training.trackers import TRACKERS

PROG = "multitask_classifier.py"
COMPILE = ("auto", "on", "off")
FINAL_EVALS = ("full", "part", "none")
FINE_TUNE_MODES = {"last-linear-layer": True, "full-model": False}  # value: is the encoder frozen?
SURGERY_SCOPES = ("model", "layer")
COURSE_TASKS = {"sst": ("sst",), "qqp": ("para",), "sts": ("sts",), "multitask": DEFAULT_TASKS}
MIN_NOISE_BATCHES = 4  # fewer give no error of their estimate
OPTIONS = {"pretrain": True, "finetune": False}


def parse_weights(text: str) -> dict[str, float]:
    return {task: float(weight) for task, weight in values_by_name(text).items()}


def are_weights(value) -> bool:
    return isinstance(value, dict) and all(
        task in TASKS and NOT_NEGATIVE.is_valid(weight) for task, weight in value.items()
    )


some_splits = name_list(("dev", "test"), "dev, test, dev,test or none", "SPLIT,...")
split_list = FlagType(
    lambda text: () if text.strip() == "none" else some_splits.convert(text),
    lambda value: value == () or some_splits.is_valid(value),
    some_splits.expected,
    some_splits.metavar,
)
some_trackers = name_list(tuple(TRACKERS), f"some of {','.join(TRACKERS)}, or none", "NAME,...")
tracker_list = FlagType(
    lambda text: () if text.strip() == "none" else some_trackers.convert(text),
    lambda value: value == () or some_trackers.is_valid(value),
    some_trackers.expected,
    some_trackers.metavar,
)
weight_list = FlagType(
    parse_weights, are_weights, "TASK=NUMBER,..., as in sst=1,sts=2.5", metavar="TASK=X,..."
)


# --- the flags ----------------------------------------------------------------------------------------------


def add_recipe_flag(parser: RunParser) -> None:
    add = parser.adder(parser.add_argument_group("recipe"))
    text = "sets the defaults of other flags (config.py has them); flags that are given win"
    add("--recipe", "result", choices=RECIPES, default="poster", help=text)


def add_data_flags(parser: RunParser) -> None:
    add = parser.adder(parser.add_argument_group("data"))
    add("--data_dir", "place", type=DIR, default="data", help="folder with the data files")
    text = "where the tokens of large files are kept between runs; '': nowhere (default: the user's cache)"
    add("--cache_dir", "place", type=DIR, help=text)
    text = f"tasks to train, out of {', '.join(TASKS)}; with --task_file, its tasks alone if not given"
    add("--tasks", "result", type=task_list(), default=",".join(DEFAULT_TASKS), help=text)
    text = "tasks of your own, a TOML file each (docs/data.md), with the same flags as other tasks"
    add("--task_file", "result", type=task_files, default={}, help=text)
    text = "longest sequence, in word pieces; at most what the encoder can take"
    add("--max_length", "text", type=number(int, 3), default=512, help=text)
    text = "more training examples, out of {}; COUNT: only as many, drawn at random (default: none)"
    add("--extra_data", "result", type=source_list, default={}, help=text.format(", ".join(EXTRA_SOURCES)))
    text = "factor of the loss of labelled phrases inside the training sentences of sst; 0: without them"
    add("--phrase_weight", "result", type=NOT_NEGATIVE, default=0.0, help=text)
    text = "words of the shortest of these phrases; 1: single words, too"
    add("--phrase_min_words", "result", type=COUNT, default=2, help=text)
    text = "the most phrases of a sentence in a batch, drawn anew each time (default: all)"
    add("--phrase_limit", "result", type=COUNT, help=text)
    text = (
        "how much a phrase counts: equally, by its length in word pieces, or less the more its label occurs"
    )
    add("--phrase_weighting", "result", choices=PHRASE_WEIGHTINGS, default="equal", help=text)


def add_model_flags(parser: RunParser) -> None:
    add = parser.adder(parser.add_argument_group("model"))
    text = f"encoder to start from: a folder, NAME@COMMIT of the hub, or {OFFLINE_ENCODER} (needs no network)"
    add("--pretrained", "result", type=ENCODER, default=OFFLINE_ENCODER, help=text)
    text = "how the hidden states of a sequence become one vector"
    add("--pooling", "result", choices=POOLINGS, default="mean", help=text)
    for task, spec in TASKS.items():
        if spec.is_pair:
            text = f"how the two sentences are compared for {spec.title}"
            add(f"--{task}_head", "result", choices=PAIR_HEADS, default=spec.default_head, help=text)
    text = "cross heads train on a pair in an order drawn anew each time, and average both at prediction"
    add("--symmetric", "result", action="store_true", help=text)
    for task, spec in TASKS.items():
        if spec.is_ordered:
            text = f"loss of {spec.title}, whose classes have an order: {describe_specs(CLASS_LOSSES)}"
            add(f"--{task}_loss", "result", type=spec_type(CLASS_LOSSES), default="cross_entropy", help=text)
    add("--head_layers", "result", type=COUNT, default=1, help="dense layers of each head but cosine")
    text = "probability of dropout, in [0, 1), in the encoder and before the heads"
    text += f" (default: the checkpoint's own in the encoder, {HEAD_DROPOUT_PROB} before the heads)"
    add("--hidden_dropout_prob", "result", type=PROBABILITY, help=text)
    text = "last layers of the encoder that start from new random weights, and the pooler with them; 0: none"
    add("--redraw_layers", "result", type=COUNT_OR_NONE, default=0, help=text)
    add("--freeze_encoder", "result", action="store_true", help="train the heads only")
    text = "how often dropout before and in the heads is drawn for each example; the loss is the mean"
    add("--head_dropout_samples", "result", type=COUNT, default=1, help=text)


def add_training_flags(parser: RunParser) -> None:
    add = parser.adder(parser.add_argument_group("training"))
    text = "length of the run; an epoch has as many examples as all tasks together; --sampler says of which"
    add("--epochs", "result", type=POSITIVE, default=10, help=text)
    text = "length of the run in steps (optimizer updates), instead of --epochs"
    add("--max_steps", "length", type=COUNT, help=text)
    text = "examples of a task in one forward pass"
    add("--batch_size", "result", type=COUNT, default=8, help=text)
    for task in TASKS:
        text = f"the same for {task} alone (default: --batch_size)"
        add(f"--{task}_batch_size", "result", type=COUNT, help=text)
    add("--grad_accum", "result", type=COUNT, default=1, help="batches per task and step")
    add("--seed", "result", type=SEED, default=11711, help="seed of all random numbers")
    add("--precision", "machine", choices=PRECISION_NAMES, default="auto", help=PRECISION_HELP)
    text = "share of a label that is spread evenly over all classes, in [0, 1); for tasks with classes"
    add("--label_smoothing", "result", type=by_task(PROBABILITY), default={}, help=text)
    text = "R-Drop: factor of the divergence of two passes with other dropout, both in one batch; 0: one pass"
    add("--rdrop", "result", type=by_task(NOT_NEGATIVE), default={}, help=text)
    text = "FGM: a second pass with embeddings moved by this length so that the loss rises; 0: none"
    add("--fgm", "result", type=NOT_NEGATIVE, default=0.0, help=text)
    text = (
        "on a CPU, torch.compile for what goes over memory; on a GPU, steps captured as CUDA graphs; auto: on"
        " a GPU with Triton, and on a CPU with a C++ compiler if the run is long enough to gain from it"
    )
    add("--compile", "result", choices=COMPILE, default="auto", help=text)
    add("--device", "machine", type=DEVICE, default="auto", help=DEVICE_HELP)


def add_optimizer_flags(parser: RunParser) -> None:
    add = parser.adder(parser.add_argument_group("optimizer"))
    text = (
        "learning rate of the encoder or, where that is frozen and --head_lr not given, of the heads"
        " (default: the course's at bert-base's width, higher for narrower ones)"
    )
    add("--lr", "result", type=POSITIVE, help=text)
    text = "learning rate of the heads, which start from random weights (default: larger than the encoder's)"
    add("--head_lr", "result", type=POSITIVE, help=text)
    text = "factor of the encoder's learning rate for each layer further down, the embeddings last; 1: none"
    add("--layer_lr_decay", "result", type=number(float, 0, 1, low_open=True), default=1.0, help=text)
    text = "evaluate and keep a moving average of the weights with this decay, such as 0.999; 0: none"
    add("--ema", "result", type=PROBABILITY, default=0.0, help=text)
    text = "share that weight matrices lose in a step, times the learning rate"
    add("--weight_decay", "result", type=NOT_NEGATIVE, default=0.01, help=text)
    text = "how the learning rate falls after warm-up"
    add("--schedule", "result", choices=SCHEDULES, default="linear", help=text)
    text = "steps of linear warm-up (default: by --warmup_ratio)"
    add("--warmup_steps", "result", type=COUNT_OR_NONE, help=text)
    text = "share of the run spent on linear warm-up, in [0, 1)"
    add("--warmup_ratio", "result", type=PROBABILITY, default=0.1, help=text)
    add("--rectify", "result", action="store_true", help="RAdam's rectified warm-up in AdamW")
    text = "longer gradients are scaled down to this length; 0: never"
    add("--clip_norm", "result", type=NOT_NEGATIVE, default=1.0, help=text)
    text = "give up after this many steps in a row that were skipped for a NaN or infinite loss or gradient"
    add("--max_bad_steps", "upkeep", type=COUNT, default=20, help=text)


def add_multitask_flags(parser: RunParser) -> None:
    add = parser.adder(parser.add_argument_group("multitask"))
    text = f"how the gradients of the tasks are combined: {describe_specs(GRAD_METHODS)}"
    add("--grad_method", "result", type=spec_type(GRAD_METHODS), default="pcgrad", help=text)
    text = "tasks whose gradients pcgrad or gradvac may change; the others keep theirs (default: all)"
    add("--surgery_tasks", "result", type=task_list(), help=text)
    text = "what --grad_method is applied to: the whole encoder, or each layer of it by itself"
    add("--surgery_scope", "result", choices=SURGERY_SCOPES, default="model", help=text)
    text = "inner products that --grad_method acts on: of the step alone, or running means freed of noise, by"
    text += f" --noise_batches: {describe_specs(GRAMS)}"
    add("--gram", "result", type=spec_type(GRAMS), default="step", help=text)
    text = "sum or mean over the task batches of a step (default: that of --grad_method)"
    add("--grad_reduction", "result", choices=GRAD_REDUCTIONS, help=text)
    text = f"which tasks the batches of a step come from: {describe_specs(SAMPLERS)}"
    add("--sampler", "result", type=spec_type(SAMPLERS), default="round_robin", help=text)
    text = f"how the losses are weighted, besides --task_weights: {describe_specs(LOSS_WEIGHTINGS)}"
    add("--loss_weighting", "result", type=spec_type(LOSS_WEIGHTINGS), default="fixed", help=text)
    text = "factors of the losses (default: 1 for each task)"
    add("--task_weights", "result", type=weight_list, default={}, help=text)
    text = "a task's factor over the run, as points PROGRESS:FACTOR with straight lines between, as in"
    text += " sst=0.4:1/0.7:0; a task at 0 is not drawn"
    add("--loss_schedule", "result", type=LOSS_SCHEDULES, default={}, help=text)
    text = "the same for the share of its draws that a task keeps, in [0, 1]"
    add("--draw_schedule", "result", type=DRAW_SCHEDULES, default={}, help=text)


def add_distillation_flags(parser: RunParser) -> None:
    about = "Learn from trained models: their answers for the training examples are mixed with the labels."
    add = parser.adder(parser.add_argument_group("distillation", about))
    text = "folders of finished runs or ensembles; their mean answer counts, in the tasks they have"
    add("--teacher", "result", type=folder_list, help=text)
    text = "share of the teacher's answers in the targets, in [0, 1]; the rest is the labels"
    add("--teacher_weight", "result", type=number(float, 0, 1), default=0.5, help=text)
    text = "most examples of a --TASK_unlabelled for each labelled one; drawn at random"
    add("--unlabelled_ratio", "result", type=POSITIVE, default=1.0, help=text)
    text = "tasks whose test sentences are trained on with the teacher's answers (see docs/ensemble.md first)"
    add("--transductive", "result", type=task_list(), help=text)


def add_output_flags(parser: RunParser) -> None:
    add = parser.adder(parser.add_argument_group("output"))
    text = "run folder (default: runs/ and a name made of the settings)"
    add("--output_dir", "mode", type=OUTPUT_DIR, help=text)
    text = "steps between evaluations, each with a checkpoint (default: a tenth of the run)"
    add("--eval_every", "result", type=COUNT, help=text)
    text = "batches of each task by which an evaluation measures how much of the gradients is signal, without"
    text += f" an update; 0: none, else at least {MIN_NOISE_BATCHES} (default: a 25th of --eval_every)"
    add("--noise_batches", "result", type=COUNT_OR_NONE, help=text)
    text = "dev examples per task in evaluations during the run; the last one follows --final_eval"
    text += " (default: all)"
    add("--eval_max_examples", "result", type=COUNT, help=text)
    text = "dev score that chooses the best checkpoint: an overall score or a task's"
    add("--select_by", "result", choices=(*OVERALLS, *TASKS), default="mean", help=text)
    text = "evaluations without a better score after which the run ends; 0: never"
    add("--patience", "length", type=COUNT_OR_NONE, default=0, help=text)
    add("--log_every", "upkeep", type=COUNT, default=10, help="steps between lines of the log")
    text = f"where the log goes besides the run's folder: {', '.join(TRACKERS)}, or none"
    add("--report_to", "upkeep", type=tracker_list, default="none", help=text)
    text = "checkpoints to keep, in last/, last.1/, ...; an older one replaces one that is damaged"
    add("--keep_last", "upkeep", type=COUNT, default=2, help=text)
    text = "what the best checkpoint is scored on at the end: all of dev, --eval_max_examples, or nothing"
    add("--final_eval", "predictions", choices=FINAL_EVALS, default="full", help=text)
    text = "splits to write prediction files for at the end, or none"
    add("--predict_splits", "predictions", type=split_list, default="dev,test", help=text)
    text = "tasks to write prediction files for (default: all of the run)"
    add("--predict_tasks", "predictions", type=task_list(), help=text)
    text = "whose form prediction files have: that of the course's starter or of its handout"
    add("--prediction_style", "predictions", choices=PREDICTION_STYLES, default="starter", help=text)


def add_mode_flags(parser: RunParser) -> None:
    about = "What to do with the run in --output_dir. It keeps its settings; a few flags may be given anew."
    add = parser.adder(parser.add_argument_group("modes", about))
    text = "continue a run that was stopped, exactly"
    add("--resume", "mode", action="store_true", help=text)
    text = "remove it and start anew"
    add("--overwrite", "mode", action="store_true", help=text)
    text = "evaluate its best checkpoint on dev"
    add("--eval_only", "mode", action="store_true", help=text)
    text = "write prediction files from its best checkpoint"
    add("--predict_only", "mode", action="store_true", help=text)


def add_course_flags(parser: RunParser) -> None:
    about = "The names that the course's starter code has for flags with other names here."
    add = parser.adder(parser.add_argument_group("course", about))
    add("--option", "result", choices=OPTIONS, help="pretrain: --freeze_encoder; finetune: without it")
    text = "last-linear-layer: --freeze_encoder; full-model: without it"
    add("--fine-tune-mode", "result", choices=FINE_TUNE_MODES, help=text)
    add("--use_gpu", "machine", action="store_true", help="--device cuda")
    text = "--tasks as Goettingen's course has it: " + ", ".join(
        f"{name} is {','.join(tasks)}" for name, tasks in COURSE_TASKS.items()
    )
    add("--task", "result", choices=COURSE_TASKS, help=text)


def add_file_flags(parser: RunParser) -> None:
    about = "Single files outside --data_dir and, for predictions, outside the run folder."
    add = parser.adder(parser.add_argument_group("files", about))
    for task, spec in TASKS.items():
        for split, name in spec.files.items():
            add(f"--{task}_{split}", "place", type=FILE, help=f"to be read instead of {name}")
        text = "sentences of {} without labels, for --teacher, in the form of {}"
        add(f"--{task}_unlabelled", "place", type=FILE, help=text.format(spec.title, spec.files["train"]))
        for split in ("dev", "test"):
            add(f"--{task}_{split}_out", "place", type=FILE, help=f"{split} predictions of {spec.title}")


def make_parser() -> RunParser:
    parser = RunParser(
        prog=PROG,
        usage="python multitask_classifier.py [--FLAG [VALUE]] ...",  # all flags would be a page of their own
        description="Train one BERT on several tasks at once, evaluate it, and write prediction files.",
        epilog="To continue a run that was stopped: --output_dir RUN --resume."
        " To start from the encoder of a finished one: --pretrained RUN/best.",
    )
    add_recipe_flag(parser)
    add_data_flags(parser)
    add_model_flags(parser)
    add_training_flags(parser)
    add_optimizer_flags(parser)
    add_multitask_flags(parser)
    add_distillation_flags(parser)
    add_output_flags(parser)
    add_mode_flags(parser)
    add_course_flags(parser)
    add_file_flags(parser)
    return parser


def flags_marked(*marks: str) -> frozenset[str]:
    return make_parser().marked(*marks)


def may_change(reading: bool = False) -> frozenset[str]:
    """The flags that may have another value when a run is resumed, or when its best checkpoint is read."""
    return flags_marked(*(READING_MARKS if reading else RESUME_MARKS))


# --- reading a command line ---------------------------------------------------------------------------------


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line and check the flags against each other, before anything is loaded.

    With `--resume`, `--eval_only` or `--predict_only` the run's own settings take the place of the defaults,
    so that only `--output_dir` is needed. Exits with code 2 and one line if a flag is wrong. Flags whose
    default depends on others are None until `resolve_args`.

    Raises:
        UserError: if a run is to be read and there is none, or a resumed run would become another one.
    """
    find_own_tasks(argv)
    parser = make_parser()
    args = parser.parse_args(argv)
    args.given = given_flags(argv)
    if takes_up(args):
        restore_settings(parser, args)
    elif args.task:
        if {"tasks", "task_file"} & set(args.given):
            parser.error("--task contradicts --tasks and --task_file; give one of them")
        args.tasks = COURSE_TASKS[args.task]
    elif args.task_file and "tasks" not in args.given:
        args.tasks = tuple(args.task_file)
    if not takes_up(args):
        apply_recipe(args)
    freezing = [
        args.freeze_encoder or None,
        OPTIONS.get(args.option),
        FINE_TUNE_MODES.get(args.fine_tune_mode),
    ]
    if True in freezing and False in freezing:
        parser.error(
            "--option, --fine-tune-mode and --freeze_encoder contradict each other; give one of them"
        )
    args.freeze_encoder = True in freezing
    check_flags(parser, args)
    return args


def takes_up(args: argparse.Namespace) -> bool:
    """Whether a run that exists is taken up again."""
    return args.resume or args.eval_only or args.predict_only


def apply_recipe(args: argparse.Namespace) -> None:
    """Give the flags of --recipe that were not given their values; `args.from_recipe` keeps what it set."""
    values = given_flags(shlex.split(RECIPES[args.recipe]))
    given = set(args.given) | ({"max_steps"} if "epochs" in args.given else set())
    args.from_recipe = {
        name: {key: each for key, each in value.items() if task_of(key) in ("*", *args.tasks)}
        if isinstance(value, dict)
        else value
        for name, value in values.items()
        if name not in given
    }
    vars(args).update(args.from_recipe)


def task_of(key: str) -> str:
    """The task that a key of a dictionary of flags belongs to: a task's name, or that of additional data."""
    return EXTRA_SOURCES[key].task if key in EXTRA_SOURCES else key


def find_own_tasks(argv: list[str] | None) -> None:
    """Make the tasks of --task_file, or of the run that is taken up again, known: they have flags, too."""
    contents = find_task_files(argv)
    parser = OneLineParser(prog=PROG, add_help=False, allow_abbrev=False)
    parser.add_argument("--output_dir")
    for flag in ("--resume", "--eval_only", "--predict_only"):
        parser.add_argument(flag, action="append_const", const=True, dest="takes_up")
    args, _ = parser.parse_known_args(argv)
    if not contents and args.takes_up and args.output_dir and (Path(args.output_dir) / ARGS_FILE).exists():
        read_run(args.output_dir)
    else:
        set_own_tasks(contents)


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with an error if flags contradict each other."""
    if args.use_gpu and args.device not in ("auto", "cuda"):
        parser.error(f"--use_gpu and --device {args.device} contradict each other")
    method, _ = find_row(args.grad_method, GRAD_METHODS)
    if method.is_mean and args.grad_reduction not in (None, method.reduction):
        parser.error(
            f"--grad_method {args.grad_method} and --grad_reduction {args.grad_reduction} contradict each"
            " other"
        )
    if args.loss_weighting != "fixed" and method.ignores_scale:
        parser.error(
            f"--loss_weighting {args.loss_weighting} is lost on --grad_method {args.grad_method}, whose"
            " direction does not depend on the lengths of the gradients"
        )
    if args.freeze_encoder and find_row(args.loss_weighting, LOSS_WEIGHTINGS)[0].needs_gradients:
        parser.error(
            f"--loss_weighting {args.loss_weighting} goes by the gradients of the encoder, which"
            " --freeze_encoder leaves without any"
        )
    check_noise(parser, args)
    for flag, named in (
        ("select_by", {args.select_by} & set(TASKS)),
        ("task_weights", args.task_weights),
        ("loss_schedule", args.loss_schedule),
        ("draw_schedule", args.draw_schedule),
        ("label_smoothing", set(args.label_smoothing) - {"*"}),
        ("rdrop", set(args.rdrop) - {"*"}),
        ("surgery_tasks", args.surgery_tasks or ()),
        ("predict_tasks", args.predict_tasks or ()),
        ("transductive", args.transductive or ()),
    ):
        for task in sorted(set(named) - set(args.tasks)):
            parser.error(f"--{flag} names {task}, which is not among --tasks {','.join(args.tasks)}")
    if not any(args.task_weights.get(task, 1.0) for task in args.tasks):
        parser.error("--task_weights is 0 for every task; nothing would be trained")
    if args.final_eval == "part" and args.eval_max_examples is None:
        parser.error("--final_eval part needs --eval_max_examples, which says how large the part is")
    if args.eval_only and args.final_eval == "none":
        parser.error(
            "--eval_only and --final_eval none contradict each other; give --final_eval full or part"
        )
    if args.predict_only and not args.predict_splits:
        parser.error(
            "--predict_only and --predict_splits none contradict each other; give --predict_splits dev,test"
        )
    for task in sorted(set(args.label_smoothing) & set(args.tasks)):
        if TASK_KINDS[TASKS[task].kind].uniform_loss is None and args.label_smoothing[task]:
            parser.error(f"--label_smoothing names {task}, whose labels are no classes")
    if args.freeze_encoder and args.fgm:
        parser.error("--fgm changes the embeddings, which --freeze_encoder leaves without gradients")
    check_sources(parser, args)
    if args.phrase_weight and not phrase_sources(args.tasks):
        tasks = ",".join(phrase_sources(TASKS))
        parser.error(f"--phrase_weight needs {tasks}, which is not among --tasks {','.join(args.tasks)}")
    if args.phrase_weight and args.pooling not in PHRASE_POOLINGS:
        parser.error(
            f"--phrase_weight and --pooling {args.pooling} contradict each other: a phrase has no vector of"
            f" that kind; give --pooling {' or '.join(PHRASE_POOLINGS)}"
        )


def needs_noise(args: argparse.Namespace) -> bool:
    """Whether the run goes by what an evaluation measures of the gradients' noise."""
    return args.gram != "step" or bool(find_row(args.sampler, SAMPLERS)[0].update)


def check_noise(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with an error if something goes by the noise of gradients, and nobody measures it."""
    if args.noise_batches is not None and 0 < args.noise_batches < MIN_NOISE_BATCHES:
        parser.error(
            f"--noise_batches is {args.noise_batches}; expected 0, or at least {MIN_NOISE_BATCHES} for an"
            " estimate with an error"
        )
    if needs_noise(args):
        name = "gram" if args.gram != "step" else "sampler"
        goes_by = f"--{name} {getattr(args, name)} goes by the noise of the encoder's gradients"
        if args.freeze_encoder:
            parser.error(f"{goes_by}, which --freeze_encoder leaves without any")
        if args.noise_batches == 0:
            parser.error(f"{goes_by}; expected --noise_batches of at least {MIN_NOISE_BATCHES}")


def given_flags(argv: list[str] | None) -> dict:
    """The flags that stand on the command line, without any default."""
    parser = make_parser()
    for flag in parser.flags.values():
        flag.default = argparse.SUPPRESS
    values = vars(parser.parse_args(argv))
    return {name: values[name] for name in parser.flags if name in values}


# --- the settings of a run that exists ----------------------------------------------------------------------


def restore_settings(parser: RunParser, args: argparse.Namespace) -> None:
    """Give `args` the settings of the run in --output_dir as defaults; refuse flags that contradict them.

    `args.given`, the flags of this command line, becomes those given now or when the run was started.
    """
    reading, given = args.eval_only or args.predict_only, args.given
    mode = "--resume" if args.resume else "--eval_only" if args.eval_only else "--predict_only"
    if not args.output_dir:
        parser.error(f"{mode} needs --output_dir, the run folder to read")
    if args.overwrite or (args.resume and reading):
        parser.error("--resume, --overwrite and --eval_only or --predict_only contradict each other")
    stored, first_given = read_run(args.output_dir)
    defaults = vars(parser.parse_args([]))
    changeable = may_change(reading)
    # The command that started the run may be repeated word for word, "auto" and the like included.
    contradictions = [
        f"--{name} {given[name]} (the run has {stored[name]})"
        for name in sorted(set(given) - changeable)
        if given[name] not in (stored[name], first_given.get(name, defaults[name]))
    ]
    if contradictions:
        parser.error(f"{mode} keeps the run's own settings; not so here: {', '.join(contradictions)}")
    modes = parser.marked("mode")
    changed = {name: value for name, value in given.items() if name in changeable - modes}
    # A run may be read on another machine, so --device is not taken over.
    elsewhere = {"device", "use_gpu"} if reading else set()
    vars(args).update({name: stored[name] for name in set(stored) - modes - elsewhere - set(changed)})
    args.given = first_given | changed
    args.from_recipe = read_args_file(Path(args.output_dir))["args"].get("from_recipe", {})


def read_run(output_dir: str | Path) -> tuple[dict, dict]:
    """A run's settings from its `args.json`: all of them, every default resolved, and those that were given.

    Flags that did not exist yet when the run was made are at their defaults. The run's own tasks, kept there
    by content, take the place of others in `config.TASKS`.

    Raises:
        UserError: if there is no run, or a value could not have come from its flag.
    """
    folder = Path(output_dir)
    stored = read_args_file(folder)["args"]
    set_own_tasks(stored.get("task_file", {}), str(folder / ARGS_FILE))
    parser = make_parser()
    given = stored.get("given")
    if not isinstance(given, dict):
        raise UserError(
            f"{folder / ARGS_FILE}: damaged, or from another script (it does not say what was given)"
        )
    return vars(parser.parse_args([])) | pick_flags(parser, stored, folder), pick_flags(parser, given, folder)


def pick_flags(parser: RunParser, stored: dict, folder: Path) -> dict:
    """The values of known flags among `stored`, where JSON has made lists of tuples."""
    values = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in stored.items()
        if name in parser.flags
    }
    for name, value in values.items():
        if not is_valid_value(parser.flags[name], value):
            raise UserError(f"{folder / ARGS_FILE}: damaged; {name} is {value!r}"[:200])
    return values
