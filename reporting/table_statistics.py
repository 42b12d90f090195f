"""Finished runs of a results table, and the statistics of its rows.

Shapes: S seeds, N examples of a task, R resamples.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from config import TASKS
from datasets import Rows, read_rows
from evaluation import TASK_KINDS, prediction_name, read_predictions, select_score
from reporting.poster import ROWS, TableRow
from reporting.read_run import read_facts, read_metrics, read_scores
from reporting.report import SCORE_TOLERANCE
from reporting.significance import Interval, resampled_means, to_interval, with_overalls
from support.errors import UserError


@dataclass
class FinishedRun:
    """What a results table needs of one run folder."""

    folder: Path
    scores: dict[str, float]  # each task's main score and the overalls, on all of dev
    predictions: dict[str, np.ndarray]  # task -> (N,), in the order of the dev file
    metrics: list[dict]  # lines of metrics.jsonl
    facts: dict  # args.json


class DevData:
    """Dev rows of each task, read when they are first needed."""

    def __init__(self, data_dir: str):
        self.data_dir = data_dir
        self.rows: dict[str, Rows] = {}

    def __getitem__(self, task: str) -> Rows:
        if task not in self.rows:
            spec = TASKS[task]
            self.rows[task] = read_rows(Path(self.data_dir) / spec.files["dev"], spec, "dev")
        return self.rows[task]


def read_finished_run(folder: Path, dev_data: DevData) -> FinishedRun:
    """Read the scores, dev predictions and log of a run.

    Raises:
        UserError: if something is missing or damaged, or if scores, predictions and dev data do not match.
    """
    summary, facts = read_scores(folder), read_facts(folder)
    stored = {task: select_score(summary["dev"], task, TASKS) for task in summary["dev"]["tasks"]}
    style = facts["args"]["prediction_style"]
    scores, predictions = {}, {}
    for task, before in stored.items():
        rows, kind = dev_data[task], TASK_KINDS[TASKS[task].kind]
        path = folder / "predictions" / prediction_name(task, "dev", style)
        found = read_predictions(path, TASKS[task])
        if list(found) != rows.ids:
            raise UserError(f"{path}: its ids are not those of {rows.path}; give the --data_dir of that run")
        predictions[task] = np.array(list(found.values()))
        scores[task] = kind.scores(predictions[task], rows.labels)[kind.main_score]
        if not abs(scores[task] - before) <= SCORE_TOLERANCE:  # in this form nan is refused, too
            raise UserError(
                f"{path}: gives {task} {scores[task]:.6f} on {rows.path}, scores.json says {before:.6f};"
                " predictions or data are not those of that run"
            )
    return FinishedRun(folder, with_overalls(scores, TASKS), predictions, read_metrics(folder), facts)


@dataclass
class Table:
    """Rows of finished runs, and their differences.

    Args:
        runs: row -> seed -> run.
        dev_data: of all runs.
        num_resamples: R.
        specs: what the rows are, by name.
    """

    runs: dict[str, dict[int, FinishedRun]]
    dev_data: DevData
    num_resamples: int = 2000
    specs: dict[str, TableRow] = field(default_factory=lambda: ROWS)
    _resamples: dict = field(default_factory=dict)

    @property
    def has_poster(self) -> bool:
        """Whether there is any row of the poster's, so that its numbers and claims are to be shown."""
        return any(self.specs[row].group != "own" for row in self.runs)

    def values(self, row: str, score: str) -> list[float]:
        """A score of each seed's run; empty for a score that the row does not have."""
        return [run.scores[score] for run in self.runs.get(row, {}).values() if score in run.scores]

    def resamples(self, row: str, seeds: tuple[int, ...]) -> dict[str, np.ndarray]:
        """What `significance.resampled_means` gives, computed once."""
        if (row, seeds) not in self._resamples:
            runs = [self.runs[row][seed] for seed in seeds]
            tasks = runs[0].predictions
            predictions = {task: np.stack([run.predictions[task] for run in runs]) for task in tasks}
            labels = {task: self.dev_data[task].labels for task in tasks}
            self._resamples[row, seeds] = resampled_means(predictions, labels, TASKS, self.num_resamples)
        return self._resamples[row, seeds]

    def interval(self, row: str, score: str) -> Interval | None:
        """A row's mean over seeds with its interval; None if the row does not have the score."""
        return self.combine([(1.0, row, score)])

    def combine(self, terms) -> Interval | None:
        """A sum of terms (factor, row, score) over the seeds that all rows have; None if there are none."""
        seeds = self.shared_seeds({row for _, row, _ in terms})
        if not seeds or not all(self.values(row, score) for _, row, score in terms):
            return None
        return to_interval(sum(factor * self.resamples(row, seeds)[score] for factor, row, score in terms))

    def shared_seeds(self, rows) -> tuple[int, ...]:
        """The seeds that all of some rows were run with."""
        return tuple(sorted(set.intersection(*(set(self.runs.get(row, {})) for row in rows))))

    @cached_property
    def best_run(self) -> tuple[str, int] | None:
        """Row and seed of the run that predicts the test set: the best seed of the best row on average."""
        means = {row: np.mean(self.values(row, "mean")) for row in self.runs if self.values(row, "mean")}
        if not means:
            return None
        row = max(means, key=means.get)
        return row, max(self.runs[row], key=lambda seed: self.runs[row][seed].scores["mean"])
