"""What the rows of a results table did to the gradients, at what cost, and whether one is ahead."""

from config import TASKS
from reporting.noise import estimate, format_cosine, format_share, probes_of, tasks_and_pairs
from reporting.pages import Table as PageTable
from reporting.pages import percent
from reporting.report import means_of, training_seconds
from reporting.significance import LEVEL, Interval
from reporting.table_statistics import Table


def format_interval(interval: Interval | None) -> str:
    """A difference in points, with its interval."""
    if interval is None:
        return "-"
    return f"{100 * interval.estimate:+.1f} ({100 * interval.low:+.1f} to {100 * interval.high:+.1f})"


def row_difference(table: Table, a: str, b: str, score: str) -> Interval | None:
    return table.combine(((1.0, a, score), (-1.0, b, score)))


def step_milliseconds(table: Table, row: str) -> float | None:
    """Of a training step, over all seeds; None if it was not logged."""
    logs = [run.metrics for run in table.runs[row].values()]
    steps = sum(max((line["step"] for line in log if "tokens_per_second" in line), default=0) for log in logs)
    seconds = sum(map(training_seconds, logs))
    return 1000 * seconds / steps if steps and seconds else None


def methods_table(table: Table) -> PageTable:
    """A line per row: time a step, how often a step goes against a task, where the weights went."""
    lines = []
    for row, runs in table.runs.items():
        metrics = [line for run in runs.values() for line in run.metrics]
        time, first = step_milliseconds(table, row), step_milliseconds(table, next(iter(table.runs)))
        before, after = (means_of(metrics, key) for key in ("opposed_by_sum", "opposed"))

        def listed(values, form):
            return ", ".join(f"{task} {form(values[task])}" for task in TASKS if task in values) or "-"

        lines.append(
            [
                table.specs[row].title,
                "-" if time is None else f"{time:.0f}",
                "-" if None in (time, first) else f"{time - first:+.0f}",
                listed(before, percent),
                listed(after, percent),
                listed(means_of(metrics, "grad_weight"), "{:.2f}".format),
                listed(means_of(metrics, "loss_weight"), "{:.2f}".format),
            ]
        )
    header = ["technique", "ms a step", "more than the first row's"]
    header += ["steps against a task: by the plain sum", "by the method"]
    return PageTable([*header, "mean weight of a task's gradient", "mean factor of its loss"], lines)


def noise_table(table: Table) -> PageTable | None:
    """A line per row: how much of a task's gradient is signal, and cosines freed of noise; None without."""
    probes = {
        row: probes_of([line for run in runs.values() for line in run.metrics])
        for row, runs in table.runs.items()
    }
    probes = {row: found for row, found in probes.items() if found}
    tasks, pairs = tasks_and_pairs([line for found in probes.values() for line in found])
    header = ["technique", *(f"signal of {task}" for task in tasks)]
    header += [f"cosine of {pair.replace('-', ' and ')}" for pair in pairs]
    lines = [
        [
            table.specs[row].title,
            *(format_share(estimate(found, task)) for task in tasks),
            *(format_cosine(estimate(found, pair)) for pair in pairs),
        ]
        for row, found in probes.items()
    ]
    return PageTable(header, lines) if lines else None


def who_wins(table: Table) -> str:
    """A sentence on which rows are told apart from the first in the overall, by the intervals alone."""
    first = next(iter(table.runs))
    found = {
        row: row_difference(table, row, first, "mean")
        for row in table.runs
        if row != first and len(table.shared_seeds({row, first})) > 1
    }
    found = {row: interval for row, interval in found.items() if interval is not None}
    if not found:
        return "No row can be told apart from another: that takes two rows with two seeds in common."

    def listed(rows):
        return ", ".join(f"{table.specs[row].title} {format_interval(found[row])}" for row in rows)

    above = sorted((row for row in found if found[row].low > 0), key=lambda row: -found[row].estimate)
    below = sorted((row for row in found if found[row].high < 0), key=lambda row: found[row].estimate)
    name, count = table.specs[first].title, len(found)
    texts = [f"Nothing is told apart from {name}: all {count} intervals of the overall hold 0."]
    if above or below:
        texts = [f"Ahead of {name} in the overall: {listed(above) or 'nothing'}."]
        texts += [f"Behind it: {listed(below) or 'nothing'}."]
        texts += [f"The other {count - len(above) - len(below)} of {count} are not told apart from it."]
    by_chance = count * (1 - LEVEL) / 2
    texts += [f"Of {count} such intervals, {by_chance:.1f} would lie wholly above 0 by chance alone"]
    return " ".join(texts) + ", and as many below; with few seeds more."
