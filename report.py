"""Pictures of a run: losses, learning rate, dev scores, and how much the tasks' gradients are in conflict.

python report.py runs/NAME
"""

import json
import sys
from functools import partial
from pathlib import Path

from command_line import OneLineParser, run_script
from config import TASKS, UserError
from evaluation import TASK_KINDS


def read_metrics(run_dir: Path) -> list[dict]:
    """The lines of a run's `metrics.jsonl`.

    Raises:
        UserError: if there are none, or one is not JSON.
    """
    path = run_dir / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected the folder of a run") from None
    metrics = []
    for number, line in enumerate(lines, start=1):
        try:
            metrics.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}:{number}: not a JSON line ({error})") from None
    return metrics


def plot_run(run_dir: Path) -> Path | None:
    """Draw `curves.png` in a run's folder; returns its path, or None if nothing was logged."""
    import matplotlib

    matplotlib.use("Agg")  # draws to files, needs no screen
    from matplotlib import pyplot as plt

    metrics = read_metrics(run_dir)
    logged = [line for line in metrics if "loss" in line]
    evaluated = [line for line in metrics if "dev" in line]
    if not logged:
        return None
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")

    def draw(axis, key, title):
        names = dict.fromkeys(name for line in logged for name in line[key])
        for name in names:
            steps = [line["step"] for line in logged if name in line[key]]
            axis.plot(
                steps, [line[key][name] for line in logged if name in line[key]], label=name, linewidth=1
            )
        axis.set_title(title)
        if names:
            axis.legend()

    draw(axes[0, 0], "loss", "training loss by task")
    draw(axes[1, 0], "cosine", "cosine between task gradients (below 0: conflict)")
    axes[1, 0].axhline(0, color="grey", linewidth=0.8)
    scores = axes[0, 1]
    for task in evaluated[0]["dev"]["tasks"] if evaluated else ():
        main_score = TASK_KINDS[TASKS[task].kind].main_score
        points = [line["dev"]["tasks"][task][main_score] for line in evaluated]
        scores.plot([line["step"] for line in evaluated], points, marker=".", label=f"{task} {main_score}")
    if evaluated:
        steps = [line["step"] for line in evaluated]
        scores.plot(
            steps, [line["dev"]["mean"] for line in evaluated], marker=".", color="black", label="plain mean"
        )
        scores.legend()
    scores.set_title("dev scores")
    axes[1, 1].plot([line["step"] for line in logged], [line["lr"] for line in logged], label="encoder")
    axes[1, 1].plot([line["step"] for line in logged], [line["head_lr"] for line in logged], label="heads")
    axes[1, 1].set_yscale("log")
    axes[1, 1].set_title("learning rate")
    axes[1, 1].legend()
    for axis in axes.flat:
        axis.set_xlabel("step")
    path = run_dir / "curves.png"
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def report(argv: list[str] | None) -> None:
    parser = OneLineParser(prog="report.py", description="Draw the curves of a run.", allow_abbrev=False)
    parser.add_argument("run_dir", type=Path, help="run folder")
    print(plot_run(parser.parse_args(argv).run_dir) or "nothing was logged")


def main(argv: list[str] | None = None) -> int:
    return run_script("report.py", partial(report, argv))


if __name__ == "__main__":
    sys.exit(main())
