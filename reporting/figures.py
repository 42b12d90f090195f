"""Figures of runs and of the results table: plain data in, a matplotlib Figure out; no files, no screen.

Colours are safe for colour-blind readers (Okabe and Ito for tasks, Paul Tol for pairs of tasks and for rows
of the table). A task has the same colour and place everywhere, the plain mean is black, and grey is for what
is not ours: the poster's numbers, chance. `metrics` are the lines of a run's `metrics.jsonl`.
"""

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from config import TASKS
from evaluation import TASK_KINDS, pearson, spearman
from reporting.noise import estimate, probes_of, tasks_and_pairs
from reporting.poster import SCORES

TASK_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#7F4F24", "#B8A100")
LINE_COLORS = ("#332288", "#CC6677", "#44AA99", "#999933", "#882255", "#88CCEE", "#AA4499")
LINE_STYLES = ("-", "--", ":", "-.")
MEAN_COLOR = "black"
POSTER_COLOR = "#888888"
PANELS = ("sst", "para", "sts", "mean")  # the scores that get a panel each, in this order
MAX_COLUMNS = 4  # panels side by side
HEAT_COLUMNS = 25  # stretches of a run that a heat map tells apart
BIN_WIDTH = 0.5  # of true similarity, in plot_regression


# --- what the figures share -------------------------------------------------------------------------------


def make_figure(num_rows: int, num_columns: int, width: float, height: float, **settings):
    """An empty figure and its axes, (num_rows, num_columns); width and height are inches of one panel."""
    figure = Figure(figsize=(width * num_columns, height * num_rows), layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False, **settings)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="0.92", linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, axes


def pixels(figure: Figure) -> np.ndarray:
    """A figure as (height, width, 3) uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def task_color(task: str) -> str:
    return MEAN_COLOR if task == "mean" else TASK_COLORS[list(TASKS).index(task) % len(TASK_COLORS)]


def score_title(score: str) -> str:
    """A score's name and, for a task, what is measured: "sentiment (accuracy)"."""
    return SCORES[score] + (f" ({TASK_KINDS[TASKS[score].kind].main_score})" if score in TASKS else "")


def line_style(number: int) -> dict:
    """Colour and dashes of the pair or row with this number; all 28 pairs of 8 tasks look different."""
    dashes = LINE_STYLES[number // len(LINE_COLORS) % len(LINE_STYLES)]
    return {"color": LINE_COLORS[number % len(LINE_COLORS)], "linestyle": dashes}


def pair_style(pair: str) -> dict:
    """Colour, dashes and label of a pair such as "sst-para"; the order of the two tasks does not matter."""
    first, second = sorted(pair.split("-"), key=list(TASKS).index)
    i, j = list(TASKS).index(first), list(TASKS).index(second)
    # Counted this way, the numbers of existing pairs stay the same when TASKS gets another row.
    return line_style(j * (j - 1) // 2 + i) | {"label": f"{first} and {second}"}


def names_in(metrics: list[dict], key: str) -> list[str]:
    """The names that the lines have under `key`, each once."""
    return list(dict.fromkeys(name for line in metrics for name in line.get(key, ())))


def series(metrics: list[dict], key: str, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of `line[key][name]`, from the lines that have it."""
    lines = [line for line in metrics if name in line.get(key, ())]
    return [line["step"] for line in lines], [line[key][name] for line in lines]


def smooth(values: Sequence[float]) -> np.ndarray:
    """Running mean over about a twentieth of the values, and over fewer at both ends."""
    window = np.ones(2 * (len(values) // 40) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def draw_mean(axis, seeds: list[tuple[Sequence, Sequence]], **style) -> None:
    """Draw the mean over seeds as a line, and a band from the least to the greatest.

    Args:
        seeds: (positions, values) of each; at a position that only some seeds have, the others do not count.
    """
    values = {}
    for xs, ys in seeds:
        for x, y in zip(xs, ys, strict=True):
            values.setdefault(x, []).append(y)
    xs = sorted(values)
    axis.plot(xs, [np.mean(values[x]) for x in xs], linewidth=1.5, **style)
    if len(seeds) > 1:
        low, high = [min(values[x]) for x in xs], [max(values[x]) for x in xs]
        axis.fill_between(xs, low, high, color=style["color"], alpha=0.2, linewidth=0)


def legend_outside(axis, num_columns: int = 1) -> None:
    """Legend to the right of a panel, if it has anything to name."""
    if axis.get_legend_handles_labels()[0]:
        place = {"loc": "upper left", "bbox_to_anchor": (1, 1)}
        axis.legend(**place, frameon=False, fontsize="small", ncols=num_columns)


def shared_legend(figure, axes, place: str, num_columns: int = 1) -> None:
    """One legend beside all panels, each label once."""
    handles = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    layout = {"loc": f"outside {place}", "ncols": min(len(handles), num_columns)}
    figure.legend(handles.values(), handles.keys(), **layout, frameon=False, fontsize="small")


# --- one run ----------------------------------------------------------------------------------------------


def plot_curves(metrics: list[dict], max_examples: int | None = None) -> Figure | None:
    """Training loss, dev scores, cosine between task gradients, learning rate; None if nothing was logged.

    Args:
        max_examples: of dev that the evaluations looked at, for each task; None means all.
    """
    logged = [line for line in metrics if "loss" in line]
    evaluated = [line["dev"] | {"step": line["step"]} for line in metrics if "dev" in line]
    if not logged:
        return None
    has_factors = bool(names_in(logged, "loss_weight"))
    figure, axes = make_figure(3 if has_factors else 2, 2, width=5.8, height=3.4)
    losses, scores, cosines, rates = axes.flat[:4]

    def draw(axis, key, name, style):
        steps, values = series(logged, key, name)
        axis.plot(steps, values, color=style["color"], linewidth=0.8, alpha=0.3)
        axis.plot(steps, smooth(values), linewidth=1.5, **style)

    for task in names_in(logged, "loss"):
        draw(losses, "loss", task, {"color": task_color(task), "label": task})
    losses.set_title("training loss (thin: as logged, thick: running mean)")
    for pair in names_in(logged, "cosine"):
        draw(cosines, "cosine", pair, pair_style(pair))
    if cosines.get_lines():
        cosines.axhline(0, color=POSTER_COLOR, linewidth=0.8)
    cosines.set_title("cosine between task gradients (below 0: conflict)")
    for task in names_in(evaluated, "tasks"):
        main_score = TASK_KINDS[TASKS[task].kind].main_score
        steps, named = series(evaluated, "tasks", task)
        points = [scores_of_task[main_score] for scores_of_task in named]
        scores.plot(steps, points, marker=".", color=task_color(task), label=f"{task} {main_score}")
    if evaluated:
        steps, points = zip(*((line["step"], line["mean"]) for line in evaluated), strict=True)
        scores.plot(steps, points, marker=".", color=MEAN_COLOR, label="plain mean")
    scores.set_title(
        "dev scores" + (f" (part of dev: {max_examples} examples a task)" if max_examples else "")
    )
    for axis, key, title in zip(
        axes.flat[4:],
        ("loss_weight", "grad_weight"),
        ("factor of each task's loss (--loss_weighting)", "weight of each task's gradient (--grad_method)"),
        strict=False,
    ):
        for task in names_in(logged, key):
            draw(axis, key, task, {"color": task_color(task), "label": task})
        axis.set_title(title)
    steps = [line["step"] for line in logged]
    for key, name, dashes in (("lr", "encoder", "-"), ("head_lr", "heads", "--")):
        values = [line[key] for line in logged]
        rates.plot(steps, values, color=MEAN_COLOR, linestyle=dashes, linewidth=1.5, label=name)
    rates.set_yscale("log")
    rates.set_title("learning rate")
    for axis in axes.flat:
        axis.set_visible(bool(axis.get_lines()))
        axis.title.set_size("medium")
        axis.set_xlabel("step")
        legend_outside(axis, num_columns=1 + len(axis.get_legend_handles_labels()[0]) // 15)
    return figure


def plot_layer_conflict_over_time(metrics: list[dict]) -> Figure | None:
    """A heat map per pair of tasks: which layer groups are in conflict, and when; None for an old run.

    Colours fade where a share is within the noise: of n steps with unrelated gradients, half are in conflict
    with a standard error of 0.5 / sqrt(n), and only a share two of these away from one half has full colour.
    """
    lines = [line for line in metrics if line.get("layer_conflict")]
    groups = names_in(lines, "layer_conflict")
    pairs = names_in([line["layer_conflict"] for line in lines], groups[0]) if groups else []
    if not pairs:
        return None
    num_columns = min(3, len(pairs))
    num_rows, height = -(-len(pairs) // num_columns), 0.2 * len(groups) + 1.4
    figure, axes = make_figure(num_rows, num_columns, width=4, height=height, sharey=True)
    for axis in axes.flat[len(pairs) :]:
        axis.set_visible(False)
    for axis, pair in zip(axes.flat, pairs, strict=False):
        edges, shares = heat_map(lines, groups, pair)
        opacity = np.clip(np.abs(shares - 0.5) / (2 * 0.5 / np.sqrt(np.diff(edges))), 0, 1)
        places = np.arange(len(groups) + 1) - 0.5
        heat = axis.pcolormesh(edges, places, shares, cmap="PuOr_r", vmin=0, vmax=1, alpha=opacity)
        axis.set_title(pair_style(pair)["label"], fontsize="medium")
        axis.set_yticks(range(len(groups)), groups, fontsize="small")
        axis.set_xlabel("step")
        axis.grid(False)
    label = "share of steps in conflict\n(faded: may be chance)"
    figure.colorbar(heat, ax=axes, label=label, fraction=0.03, pad=0.01)
    return figure


def heat_map(lines: list[dict], groups: list[str], pair: str) -> tuple[list[int], np.ndarray]:
    """How often a pair is in conflict: limits of HEAT_COLUMNS stretches or fewer, (groups, stretches)."""
    present = [line for line in lines if pair in line["layer_conflict"][groups[0]]]
    shares = np.array([[line["layer_conflict"][group][pair] for line in present] for group in groups])
    stretches = np.array_split(np.arange(len(present)), min(HEAT_COLUMNS, len(present)))
    # A line of the log is about the steps up to its own.
    edges = [0, *(present[stretch[-1]]["step"] for stretch in stretches)]
    return edges, np.stack([shares[:, stretch].mean(1) for stretch in stretches], axis=1)


def plot_predictions(task: str, predictions: Sequence, labels: Sequence) -> Figure:
    """A task's predictions (N,) against its labels (N,): a confusion matrix, or points and the diagonal."""
    spec = TASKS[task]
    if TASK_KINDS[spec.kind].is_discrete:
        return plot_confusion(predictions, labels, class_names(task))
    return plot_regression(predictions, labels, spec.label_range, task)


def class_names(task: str) -> Sequence[str]:
    """The names of a task's classes, or their numbers."""
    spec = TASKS[task]
    return spec.class_names or [str(number) for number in range(int(spec.label_range[1]) + 1)]


def plot_confusion(predictions: Sequence, labels: Sequence, class_names: Sequence[str]) -> Figure:
    """Confusion matrix: counts and percentages of each true class; accuracy in the title.

    Args:
        predictions, labels: (N,) class numbers, positions in `class_names`.
    """
    counts = np.zeros((len(class_names), len(class_names)), dtype=int)  # (true, predicted)
    np.add.at(counts, (np.asarray(labels, dtype=int), np.asarray(predictions, dtype=int)), 1)
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    size = 2.2 + 0.9 * len(class_names)
    figure, axes = make_figure(1, 1, width=size + 0.6, height=size * 0.85)
    axis = axes[0, 0]
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for i, j in np.ndindex(counts.shape):
        text, color = (
            f"{counts[i, j]}\n{100 * shares[i, j]:.0f} %",
            "white" if shares[i, j] > 0.5 else "black",
        )
        axis.text(j, i, text, ha="center", va="center", fontsize="small", color=color)
    names = [name.replace(" ", "\n") for name in class_names]
    axis.set_xticks(range(len(names)), names)
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true (percentages: of this row)")
    axis.grid(False)
    accuracy = np.trace(counts) / counts.sum()
    axis.set_title(f"accuracy {accuracy:.3f}, {counts.sum()} examples", fontsize="medium")
    return figure


def plot_regression(
    predictions: Sequence, labels: Sequence, label_range: tuple[float, float], task: str = "sts"
) -> Figure:
    """Predicted against true values: every example, the mean for each half point of truth, the diagonal.

    The axes are the task's scale; what was predicted beyond it is drawn at its edge, and counted.
    """
    predictions, labels = np.asarray(predictions, dtype=float), np.asarray(labels, dtype=float)
    figure, axes = make_figure(1, 1, width=5.6, height=4.8)
    axis = axes[0, 0]
    grey = {"color": POSTER_COLOR, "linestyle": "--", "linewidth": 1}
    axis.plot(label_range, label_range, **grey, label="perfect predictions")
    opacity = min(0.6, max(0.15, 200 / len(labels)))
    low, high = label_range
    margin = 0.03 * (high - low)
    axis.set_xlim(low - margin, high + margin)
    axis.set_ylim(low - margin, high + margin)
    num_beyond = int(((predictions < low) | (predictions > high)).sum())
    axis.scatter(
        labels, predictions.clip(low, high), s=12, color=task_color(task), alpha=opacity, linewidths=0
    )
    bins = np.round(labels / BIN_WIDTH) * BIN_WIDTH
    centres = np.unique(bins)
    means = [predictions[bins == centre].mean().clip(low, high) for centre in centres]
    label = f"mean per {BIN_WIDTH:g} of truth"
    axis.plot(centres, means, marker="o", markersize=5, color=MEAN_COLOR, label=label)
    axis.set_xlabel("true")
    axis.set_ylabel("predicted")
    axis.legend(loc="upper left", frameon=False, fontsize="small")
    r, rho = pearson(predictions, labels), spearman(predictions, labels)
    beyond = f"\n{num_beyond} predicted beyond the scale, drawn at its edge" if num_beyond else ""
    title = f"Pearson r {r:.3f}, Spearman rho {rho:.3f}, {len(labels)} examples{beyond}"
    axis.set_title(title, fontsize="medium")
    return figure


# --- conflict in one or several rows of the table ---------------------------------------------------------


def plot_pairs(runs: dict, draw, x_label: str) -> Figure | None:
    """Two panels per row, mean cosine above share of steps in conflict; at most MAX_COLUMNS rows abreast.

    Args:
        runs: title -> metrics of each seed.
        draw: (metrics of each seed, axis, "cosine" or "conflict") -> None
    """
    num_columns = min(MAX_COLUMNS, len(runs))
    num_blocks = -(-len(runs) // num_columns)
    width = 6.5 if len(runs) == 1 else 3.6
    figure, axes = make_figure(2 * num_blocks, num_columns, width, height=2.4)
    for number in range(num_blocks * num_columns):
        block, column = divmod(number, num_columns)
        cosines, shares = axes[2 * block : 2 * block + 2, column]
        if number >= len(runs):
            cosines.set_visible(False)
            shares.set_visible(False)
            continue
        title, seeds = list(runs.items())[number]
        draw(seeds, cosines, "cosine")
        draw(seeds, shares, "conflict")
        cosines.axhline(0, color=POSTER_COLOR, linewidth=0.8)
        shares.axhline(0.5, color=POSTER_COLOR, linestyle=":", label="unrelated gradients")
        shares.set_ylim(0, 1)
        cosines.set_title(textwrap.fill(title, 30), fontsize="medium")
        shares.set_xlabel(x_label)
        if column == 0:
            cosines.set_ylabel("mean cosine")
            shares.set_ylabel("share in conflict")
        else:
            cosines.tick_params(labelleft=False)
            shares.tick_params(labelleft=False)
    shown = [axis for axis in axes[::2].flat if axis.get_visible()]
    lows, highs = zip(*(axis.get_ylim() for axis in shown), strict=True)
    for axis in shown:
        axis.set_ylim(min(lows), max(highs))
    shared_legend(figure, axes, "lower center", min(8, 4 * num_columns))
    return figure


def plot_conflict(runs: dict[str, list[list[dict]]]) -> Figure | None:
    """Over the steps: cosine between the gradients of each pair of tasks, and how often they are in conflict.

    Running means, averaged over seeds; the band is from the least to the greatest seed.

    Args:
        runs: row title -> `metrics` of each seed; rows with a single task are left out.
    """
    runs = {row: seeds for row, seeds in runs.items() if any(names_in(lines, "cosine") for lines in seeds)}

    def draw(seeds, axis, key):
        for pair in names_in([line for lines in seeds for line in lines], "cosine"):
            curves = [series(lines, key, pair) for lines in seeds]
            curves = [(steps, smooth(values)) for steps, values in curves if steps]
            draw_mean(axis, curves, **pair_style(pair))

    figure = plot_pairs(runs, draw, "step") if runs else None
    if figure:
        figure.suptitle("Conflict between task gradients over a run")
    return figure


def plot_layer_conflict(runs: dict[str, list[list[dict]]]) -> Figure | None:
    """Conflict by layer group, averaged over the steps; None if no run was logged with its layers."""
    runs = {row: seeds for row, seeds in runs.items() if any(layer_means(s, "layer_cosine") for s in seeds)}

    def draw(seeds, axis, key):
        groups = names_in([line for lines in seeds for line in lines], f"layer_{key}")
        means = [layer_means(lines, f"layer_{key}") for lines in seeds]
        for pair in dict.fromkeys(pair for seed in means for pair in seed):
            found = [seed[pair] for seed in means if pair in seed]
            curves = [([groups.index(group) for group in seed], list(seed.values())) for seed in found]
            draw_mean(axis, curves, marker=".", **pair_style(pair))
        names = [group.replace("layer.", "").replace("embeddings", "e") for group in groups]
        axis.set_xticks(range(len(groups)), names)

    figure = plot_pairs(runs, draw, "e: embeddings, numbers: layers") if runs else None
    if figure:
        figure.suptitle("Conflict between task gradients by layer")
    return figure


def plot_noise(runs: dict[str, list[list[dict]]]) -> Figure | None:
    """Signal in the gradients, and cosines freed of noise: over the run, and by layer; None without probes.

    A column for each of at most MAX_COLUMNS rows: the estimates of all seeds together, and their intervals.

    Args:
        runs: row title -> `metrics` of each seed.
    """
    probes = {row: probes_of([line for lines in seeds for line in lines]) for row, seeds in runs.items()}
    probes = dict(list({row: found for row, found in probes.items() if found}.items())[:MAX_COLUMNS])
    if not probes:
        return None
    figure, axes = make_figure(4, len(probes), 6.5 if len(probes) == 1 else 3.6, height=2.2)
    for column, (title, lines) in enumerate(probes.items()):
        tasks, pairs = tasks_and_pairs(lines)
        groups = list(lines[0].get("layer_noise", ()))
        steps = sorted({line["step"] for line in lines})
        by_step = [(step, [line for line in lines if line["step"] == step], None) for step in steps]
        by_layer = [(number, lines, group) for number, group in enumerate(groups)]
        for n, (names, points) in enumerate(
            [(tasks, by_step), (pairs, by_step), (tasks, by_layer), (pairs, by_layer)]
        ):
            axis = axes[n, column]
            for name in names:
                style = pair_style(name) if "-" in name else {"color": task_color(name), "label": name}
                draw_estimates(axis, [(x, estimate(each, name, group)) for x, each, group in points], style)
            axis.set_visible(bool(axis.get_lines()))
            axis.axhline(0, color=POSTER_COLOR, linewidth=0.8)
            if names == pairs:
                axis.set_ylim(max(-1.1, axis.get_ylim()[0]), min(1.1, axis.get_ylim()[1]))
            if points == by_layer:
                layers = [group.replace("layer.", "").replace("embeddings", "e") for group in groups]
                axis.set_xticks(range(len(groups)), layers)
            axis.set_xlabel("step" if points == by_step else "e: embeddings, numbers: layers")
            if column == 0:
                axis.set_ylabel("cosine" if names == pairs else "share of signal")
        axes[0, column].set_title(textwrap.fill(title, 30), fontsize="medium")
    shared_legend(figure, axes, "lower center", min(8, 4 * len(probes)))
    figure.suptitle("Signal in a batch's gradient, and cosines of expected gradients")
    return figure


def draw_estimates(axis, points: list, style: dict) -> None:
    """Draw (x, Interval or None) as a line with a band."""
    known = [(x, each.estimate, each.low, each.high) for x, each in points if each is not None]
    if known:
        xs, middles, lows, highs = zip(*known, strict=True)
        axis.plot(xs, middles, marker=".", linewidth=1.5, **style)
        axis.fill_between(xs, lows, highs, color=style["color"], alpha=0.15, linewidth=0)


def layer_means(metrics: list[dict], key: str) -> dict[str, dict[str, float]]:
    """Mean over a run's lines: pair -> layer group -> value."""
    values = {}
    for line in metrics:
        for group, pairs in line.get(key, {}).items():
            for pair, value in pairs.items():
                values.setdefault(pair, {}).setdefault(group, []).append(value)
    return {
        pair: {group: float(np.mean(found)) for group, found in groups.items()}
        for pair, groups in values.items()
    }


# --- the results table ------------------------------------------------------------------------------------


def plot_scores(rows: list[dict]) -> Figure | None:
    """The results table as a picture: a panel per score, a line per row, our mean beside the poster's number.

    Args:
        rows: {"title": str, "poster": {score: number}, "measured": {score: (mean, low, high)}}, scores being
            those of PANELS; any entry may be missing or None, and low and high too (one seed).
    """

    def entries(key, score):
        """(place of the row, entry) of the rows that have it."""
        found = [(number, (row.get(key) or {}).get(score)) for number, row in enumerate(rows)]
        return [(number, entry) for number, entry in found if entry is not None]

    def draw_markers(axis, values, places, **style):
        axis.plot(values, places, linestyle="none", markersize=5, **style)

    shown = [score for score in PANELS if entries("poster", score) or entries("measured", score)]
    if not shown:
        return None
    width, height = 2.6 + 3 / len(shown), 0.36 * len(rows) + 1.5
    figure, axes = make_figure(1, len(shown), width, height, sharey=True)
    for axis, score in zip(axes[0], shown, strict=True):
        color = task_color(score)
        poster, measured = entries("poster", score), entries("measured", score)
        # Ours a little above the row's line, the poster's a little below, so that neither hides the other.
        poster_places, places = [n + 0.14 for n, _ in poster], [n - 0.14 for n, _ in measured]
        grey = {"marker": "D", "color": POSTER_COLOR, "label": "poster"}
        draw_markers(axis, [value for _, value in poster], poster_places, **grey)
        for place, (_, (_, low, high)) in zip(places, measured, strict=True):
            if low is not None and high is not None:
                axis.plot([low, high], [place] * 2, color=color, linewidth=2, solid_capstyle="butt")
        means, label = [mean for _, (mean, _, _) in measured], "measured, with its 95 % interval"
        draw_markers(axis, means, places, marker="o", color=color, label=label)
        axis.set_title(score_title(score), fontsize="medium")
        axis.margins(x=0.08)
    axes[0, 0].set_yticks(range(len(rows)), [textwrap.fill(row["title"], 32) for row in rows])
    axes[0, 0].set_ylim(len(rows) - 0.5, -0.5)  # the first row on top
    shared_legend(figure, axes[:, -1:], "lower center", 2)
    return figure


def plot_learning_curves(curves: dict[str, list[list[tuple[int, dict]]]]) -> Figure | None:
    """Dev scores over the steps, a panel per row, a line per score: mean and range over seeds.

    Args:
        curves: row title -> for each seed, (step, {score: number}) of each evaluation, scores being those of
            PANELS; a row without any is left out.
    """

    def curves_of(seeds, score):
        """(steps, values) of each seed that has the score."""
        points = [[(step, s[score]) for step, s in seed if s.get(score) is not None] for seed in seeds]
        return [tuple(zip(*found, strict=True)) for found in points if found]

    curves = {row: seeds for row, seeds in curves.items() if any(curves_of(seeds, score) for score in PANELS)}
    if not curves:
        return None
    num_columns = min(MAX_COLUMNS, len(curves))
    num_rows = -(-len(curves) // num_columns)
    figure, axes = make_figure(num_rows, num_columns, width=3.2, height=2.6, sharex=True, sharey=True)
    for axis in axes.flat[len(curves) :]:
        axis.set_visible(False)
    for axis, (title, seeds) in zip(axes.flat, curves.items(), strict=False):
        for score in PANELS:
            found = curves_of(seeds, score)
            if found:
                style = {"color": task_color(score), "label": score_title(score)}
                draw_mean(axis, found, marker=".", markersize=4, **style)
        axis.set_title(textwrap.fill(title, 32), fontsize="medium")
    for axis in axes.flat[max(0, len(curves) - num_columns) : len(curves)]:
        axis.tick_params(labelbottom=True)  # also above an empty place
        axis.set_xlabel("step")
    shared_legend(figure, axes, "lower center", len(PANELS))
    return figure
