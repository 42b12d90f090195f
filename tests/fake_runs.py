"""Run folders as training leaves them, with made-up predictions whose scores can be computed by hand."""

import json
from pathlib import Path

import numpy as np

from config import DEFAULT_TASKS, TASKS
from datasets import Rows, read_rows
from evaluation import TASK_KINDS, format_predictions, prediction_name, summarise
from reporting.table_statistics import DevData, Table, read_finished_run

SCRIPT = "/home/someone/code/multitask_classifier.py"  # args.json holds the path by which the run was started
PAIRS = {"sst-para": -0.125, "sst-sts": 0.25, "para-sts": 0.0625}
LINE = {
    "lr": 1e-5,
    "head_lr": 1e-3,
    "loss": dict.fromkeys(DEFAULT_TASKS, 1.5),
    "grad_weight": {"sst": 1.125, "para": 1.0, "sts": 1.25},
    "opposed": {"sst": 0.0, "para": 0.25, "sts": 0.5},
    "opposed_by_sum": {"sst": 0.125, "para": 0.25, "sts": 0.75},
    "task_grad_norm": dict.fromkeys(DEFAULT_TASKS, 2.5),
    "cosine": PAIRS,
    "conflict": {"sst-para": 0.75, "sst-sts": 0.25, "para-sts": 0.5},
    "layer_cosine": {"embeddings": PAIRS, "layer.0": PAIRS},
    "layer_conflict": {"embeddings": dict.fromkeys(PAIRS, 0.125), "layer.0": dict.fromkeys(PAIRS, 0.875)},
}
# Of four batches: shares of signal and products with all of them, then without each; cosines -0.2, 0.4, 0.1.
NOISE = {"sst": [0.25, 0.2, 0.3, 0.25, 0.25], "para": [0.25] * 5, "sts": [0.0625] * 5}
NOISE |= {
    "sst-para": [-0.05] * 5,
    "sst-sts": [0.05] * 5,
    "para-sts": [0.0125, 0.0125, 0.0125, 0.0375, -0.0125],
}
PROBE = {"step": 0, "noise": NOISE, "layer_noise": {"embeddings": NOISE, "layer.0": NOISE}}


def make_predictions(task: str, rows: Rows, num_wrong: int, seed: int = 0) -> np.ndarray:
    """The labels, except in `num_wrong` rows from row `seed` on: the next class, or the scale reversed."""
    predictions, high = rows.labels.copy(), TASKS[task].label_range[1]
    wrong = (seed + np.arange(num_wrong)) % len(predictions)
    if TASK_KINDS[TASKS[task].kind].is_discrete:
        predictions[wrong] = (predictions[wrong] + 1) % (high + 1)
    else:
        predictions[wrong] = high - predictions[wrong]
    return predictions


def make_run(
    folder: Path,
    data_dir: Path,
    num_wrong: dict,
    seed: int = 0,
    style: str = "starter",
    pretrained: str = "tiny",
) -> Path:
    """Write a finished run of the tasks in `num_wrong`, with 6 + 2 seconds of training."""
    (folder / "predictions").mkdir(parents=True)
    scores = {}
    for task, number in num_wrong.items():
        spec = TASKS[task]
        rows = read_rows(data_dir / spec.files["dev"], spec, "dev")
        predictions = make_predictions(task, rows, number, seed)
        scores[task] = TASK_KINDS[spec.kind].scores(predictions, rows.labels)
        path = folder / "predictions" / prediction_name(task, "dev", style)
        path.write_text(format_predictions(spec, rows.ids, predictions.tolist(), style))
    summary = summarise(scores, TASKS)
    facts = {
        "args": {"prediction_style": style, "precision": "fp32", "pretrained": pretrained, "extra_data": {}},
        "commands": [[SCRIPT, "--output_dir", f"runs/{folder.name}"], [SCRIPT, "--resume"]],
        "versions": {"torch": "2.13.0"},
        "machine": {"processor": "a | b", "cores": 2},
        "data": dict.fromkeys(("train", "dev"), dict.fromkeys(num_wrong, "04bf902f")),
    }
    (folder / "args.json").write_text(json.dumps(facts))
    (folder / "scores.json").write_text(json.dumps({"step": 20, "dev": summary}))
    line = LINE if len(num_wrong) > 1 else {}
    metrics = [PROBE] if line else []
    metrics += [
        line | {"step": 10, "tokens": 300, "tokens_per_second": 50},
        {"step": 10, "dev": summary, "score": summary["mean"]},
        line | {"step": 20, "tokens": 500, "tokens_per_second": 100},
        {"step": 20, "dev": summary, "score": summary["mean"]},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    return folder


def all_tasks(sst: int = 0, para: int = 0, sts: int = 0) -> dict[str, int]:
    return dict(zip(DEFAULT_TASKS, (sst, para, sts), strict=True))


def make_table(folder: Path, data_dir: Path, rows: dict[str, dict], num_resamples: int = 40, **changes):
    """A table of runs that are written to `folder` and read again.

    Args:
        rows: row -> seed -> `num_wrong` of each task.
    """
    dev_data = DevData(str(data_dir))
    runs = {}
    for row, seeds in rows.items():
        folders = {
            seed: make_run(folder / f"{row}-seed{seed}", data_dir, num_wrong, seed, **changes)
            for seed, num_wrong in seeds.items()
        }
        runs[row] = {seed: read_finished_run(run, dev_data) for seed, run in folders.items()}
    return Table(runs, dev_data, num_resamples)
