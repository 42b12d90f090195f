"""The class's Part 1: sentiment alone, SST and then CFIMDB, with a frozen encoder or the full model.

    python -m reporting.part1 --fine-tune-mode last-linear-layer --pretrained bert-base-uncased
    python -m reporting.part1 --fine-tune-mode full-model --pretrained bert-base-uncased

Runs go to `runs/MODE-TASK`, predictions to `predictions/MODE-TASK-SPLIT-out.csv`. One that is finished is not
trained again, and one that was stopped is continued, so the same command goes on where it ended.
"""

if __name__ == "__main__":
    from support.interrupts import end_quietly

    end_quietly()

import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

from evaluation import part1_name
from reporting.submission import PART1_TASKS
from support.command_line import OneLineParser, catch_signals, run_script
from support.files import ROOT
from training.checkpoint import find_checkpoint
from training.flags import FINE_TUNE_MODES, OPTIONS

POLL_SECONDS = 0.5
SCRIPT = ROOT / "multitask_classifier.py"


def make_parser() -> OneLineParser:
    parser = OneLineParser(
        prog="reporting.part1",
        description="Train sentiment alone, on SST and then on CFIMDB, and write Part 1's prediction files.",
        epilog="All other flags, such as --pretrained, --lr or --epochs, go to multitask_classifier.py; see"
        " its --help. Then: python prepare_submit.py RUN --part1 predictions",
        allow_abbrev=False,
    )
    text = "last-linear-layer: the encoder is frozen; full-model: it is trained (default: %(default)s)"
    parser.add_argument("--fine-tune-mode", choices=FINE_TUNE_MODES, default="last-linear-layer", help=text)
    text = "the same under its older names: pretrain, finetune"
    parser.add_argument("--option", choices=OPTIONS, help=text)
    parser.add_argument(
        "--runs_dir", type=Path, default=Path("runs"), help="for the two run folders (default: runs)"
    )
    text = "for the prediction files (default: predictions)"
    parser.add_argument("--predictions_dir", type=Path, default=Path("predictions"), help=text)
    return parser


def run_command(folder: Path, mode: str, task: str, predictions_dir: Path, flags: list[str]) -> list[str]:
    """The command that trains one model, or continues it, or only writes its predictions again."""
    outputs = [
        word
        for split in ("dev", "test")
        for word in (f"--{task}_{split}_out", str(predictions_dir / part1_name(mode, task, split)))
    ]
    what = []
    if "--overwrite" not in flags and find_checkpoint(folder / "last"):
        what = ["--predict_only" if (folder / "scores.json").exists() else "--resume"]
    # The flags in each case, so that other ones than the run had are refused.
    what += ["--output_dir", str(folder), "--tasks", task, "--fine-tune-mode", mode, *outputs, *flags]
    return [sys.executable, str(SCRIPT), *what]


def run_to_end(command: list[str]) -> int:
    """Run a command and return its exit code; when we are asked to stop, it saves its work before."""
    with catch_signals() as stop:
        process = subprocess.Popen(command)
        while True:
            try:
                return process.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                # A terminal's signals reach both of us, but `kill` reaches us alone.
                if stop.signal_number == signal.SIGTERM:
                    process.terminate()
                    return process.wait()


def train_both(argv: list[str] | None) -> None:
    """Train or continue both models, and write their prediction files; an error of one ends both."""
    args, flags = make_parser().parse_known_args(argv)
    mode = args.fine_tune_mode
    if args.option:
        mode = next(name for name, freezes in FINE_TUNE_MODES.items() if freezes == OPTIONS[args.option])
    for task in PART1_TASKS:
        command = run_command(args.runs_dir / f"{mode}-{task}", mode, task, args.predictions_dir, flags)
        print("$", *command[1:], flush=True)
        code = run_to_end(command)
        if code:
            sys.exit(code)  # it has said why


def main(argv: list[str] | None = None) -> int:
    return run_script("reporting.part1", partial(train_both, argv))


if __name__ == "__main__":
    sys.exit(main())
