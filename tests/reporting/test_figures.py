"""The data that figures draw, held against logs and scores whose every number says where it comes from."""

import io

import numpy as np
import pytest
from matplotlib.axes import Axes

from config import TASKS
from reporting import figures
from tests.fake_runs import NOISE, PROBE

STEPS = range(10, 60, 10)
PAIRS = ("sst-para", "sst-sts", "para-sts")


def make_metrics(shift=0.0, pairs=PAIRS, layers=True):
    """Five lines of a log and an evaluation."""
    metrics = []
    for step in STEPS:
        line = {"step": step, "lr": step / 1e6, "head_lr": step / 1e4}
        line["loss"] = {task: number + step / 100 for number, task in enumerate(("sst", "para", "sts"))}
        line["cosine"] = {pair: shift + number / 10 + step / 1000 for number, pair in enumerate(pairs)}
        line["conflict"] = {pair: shift + number / 10 for number, pair in enumerate(pairs)}
        for key, start in (("layer_cosine", -0.5), ("layer_conflict", 0.1)) if layers else ():
            line[key] = {
                group: dict.fromkeys(pairs, start + shift + place / 10 + step / 1000)
                for place, group in enumerate(("embeddings", "layer.0", "layer.1"))
            }
        metrics.append(line)
    tasks = {"sst": {"accuracy": 0.5}, "para": {"accuracy": 0.8}, "sts": {"pearson": 0.2, "spearman": 0.3}}
    return [*metrics, {"step": 50, "dev": {"tasks": tasks, "mean": 0.5, "mean_2024": 0.6}}]


def lines_of(axis):
    """label -> (x, y) of the lines that have one."""
    lines = [line for line in axis.get_lines() if not line.get_label().startswith("_")]
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in lines}


@pytest.fixture
def bands(monkeypatch):
    """(xs, least, greatest) of each band that is drawn."""
    drawn = []
    monkeypatch.setattr(Axes, "fill_between", lambda axis, *band, **style: drawn.append(band))
    return drawn


def shown(figure):
    return [axis for axis in figure.axes if axis.get_visible()]


def test_colours(monkeypatch):
    """All pairs of eight tasks look different, and a pair keeps its style when a task is added."""
    before = [figures.pair_style(pair) for pair in PAIRS]
    monkeypatch.setattr(figures, "TASKS", TASKS | dict.fromkeys("wxyz"))
    names = list(figures.TASKS)
    assert [figures.pair_style(pair) for pair in PAIRS] == before
    assert len({figures.task_color(task) for task in [*names, "mean"]}) == 9
    styles = [figures.pair_style(f"{a}-{b}") for n, a in enumerate(names) for b in names[n + 1 :]]
    assert len({(style["color"], style["linestyle"]) for style in styles}) == 28
    assert figures.pair_style("sts-sst") == figures.pair_style("sst-sts")


def test_smooth():
    assert figures.smooth([3, 1, 2]).tolist() == [3, 1, 2]  # too few for a running mean
    values = [0.0] * 40
    values[1] = values[20] = 6.0
    places = [0, 1, 2, 3, 18, 19, 20, 21, 22]  # over three values, at the ends over two
    assert figures.smooth(values)[places] == pytest.approx([3, 2, 2, 0, 0, 2, 2, 2, 0])


def test_curves():
    metrics = make_metrics()
    del metrics[1]["loss"]["para"], metrics[1]["cosine"]["para-sts"]  # a step without paraphrase
    losses, scores, cosines, rates = figures.plot_curves(metrics).axes
    assert lines_of(losses)["sst"] == (list(STEPS), [step / 100 for step in STEPS])
    assert lines_of(losses)["para"][0] == lines_of(cosines)["para and sts"][0] == [10, 30, 40, 50]
    assert lines_of(cosines)["sst and sts"][1] == pytest.approx([0.1 + step / 1000 for step in STEPS])
    found = {label: y for label, (_, (y,)) in lines_of(scores).items()}
    assert found == {"sst accuracy": 0.5, "para accuracy": 0.8, "sts pearson": 0.2, "plain mean": 0.5}
    assert [lines_of(rates)[name][1][0] for name in ("encoder", "heads")] == [1e-5, 1e-3]
    assert len(shown(figures.plot_curves(make_metrics(pairs=())[:-1]))) == 2  # no scores and no pairs
    assert figures.plot_curves([]) is None
    part = figures.plot_curves(make_metrics(), max_examples=500).axes[1]
    assert (scores.get_title(), part.get_title()) == (
        "dev scores",
        "dev scores (part of dev: 500 examples a task)",
    )


def test_learned_factors_and_weights_are_drawn():
    metrics = make_metrics()
    for line in metrics[:-1]:
        line["loss_weight"] = {"sst": 0.5 + line["step"] / 100, "sts": 2.0}
        line["grad_weight"] = dict.fromkeys(("sst", "para", "sts"), 1.5)
    factors, weights = figures.plot_curves(metrics).axes[4:]
    assert lines_of(factors)["sst"] == (list(STEPS), [0.5 + step / 100 for step in STEPS])
    assert set(lines_of(factors)) == {"sst", "sts"} and lines_of(weights)["para"][1] == [1.5] * 5


def test_signal_and_noise(bands):
    """Over two probes the estimates; by layer the means of both."""
    second = {name: [value / 2 for value in values] for name, values in NOISE.items()}
    layers = {"embeddings": second, "layer.0": NOISE}
    probes = [PROBE, {"step": 50, "noise": second, "layer_noise": layers}]
    shares, cosines, by_layer, cosines_by_layer = figures.plot_noise({"run": [probes]}).axes
    assert lines_of(shares)["para"] == ([0, 50], [0.25, 0.125])
    assert lines_of(cosines)["sst and para"][1] == pytest.approx([-0.2, -0.2])
    assert lines_of(by_layer)["para"] == ([0, 1], [0.1875, 0.25])
    assert lines_of(cosines_by_layer)["sst and sts"][1] == pytest.approx([0.4, 0.4])
    xs, lows, highs = bands[0]  # of sst: 1.96 times the root of 3 times the variance
    assert list(xs) == [0, 50] and lows[0] == pytest.approx(0.25 - 1.96 * 0.00375**0.5)
    assert highs[0] - lows[0] == pytest.approx(2 * (highs[1] - lows[1]))
    assert figures.plot_noise({"run": [make_metrics()]}) is None
    unknown = {name: [-0.1] * 5 for name in NOISE}  # no length, no cosine
    assert not lines_of(figures.plot_noise({"run": [[PROBE | {"noise": unknown}]]}).axes[1])


def test_heat_map():
    edges, shares = figures.heat_map(make_metrics()[:-1], ["embeddings", "layer.0", "layer.1"], "para-sts")
    assert edges == [0, *STEPS]
    expected = [[0.1 + group / 10 + step / 1000 for step in STEPS] for group in range(3)]
    assert shares == pytest.approx(np.array(expected))
    # In a long run, stretches are averaged.
    lines = [{"step": step, "layer_conflict": {"e": {"a-b": float(step % 2)}}} for step in range(1, 51)]
    edges, shares = figures.heat_map(lines, ["e"], "a-b")
    assert shares.tolist() == [[0.5] * figures.HEAT_COLUMNS] and edges[:2] == [0, 2]
    assert figures.plot_layer_conflict_over_time(make_metrics(layers=False)) is None


def test_heat_map_fades_where_it_may_be_chance():
    """Of 100 steps with unrelated gradients, 50 are in conflict with a standard error of 5."""
    shares = {"sst-para": {100: 0.5, 200: 0.55, 300: 0.4, 400: 0.9}}
    lines = [
        {"step": step, "layer_conflict": {"embeddings": {"sst-para": share}}}
        for step, share in shares["sst-para"].items()
    ]
    heat = figures.plot_layer_conflict_over_time(lines).axes[0].collections[0]
    assert np.ravel(heat.get_alpha()) == pytest.approx([0, 0.5, 1, 1])


def test_predictions_by_hand():
    # true 0: predicted 0, 0, 1; true 1: predicted 1; true 2: predicted 0, 2, 2, 2; true 3: never
    labels, predictions = np.float32([0, 0, 0, 1, 2, 2, 2, 2]), np.array([0, 1, 0, 1, 2, 0, 2, 2])
    axis = figures.plot_confusion(predictions, labels, list("abcd")).axes[0]
    cells = {text.get_position()[::-1]: text.get_text() for text in axis.texts}
    expected = {
        (0, 0): "2\n67 %",
        (0, 1): "1\n33 %",
        (1, 1): "1\n100 %",
        (2, 0): "1\n25 %",
        (2, 2): "3\n75 %",
    }
    assert cells == {(i, j): expected.get((i, j), "0\n0 %") for i in range(4) for j in range(4)}
    assert axis.get_title() == "accuracy 0.750, 8 examples"
    labels, predictions = [0.0, 0.2, 1.0, 2.4, 5.0], [1.0, 2.0, 0.5, 2.0, 5.5]
    axis = figures.plot_regression(predictions, labels, (0, 5)).axes[0]
    # 0.2 belongs to the half point 0, 2.4 to 2.5; 5.5 is drawn at the scale's edge
    assert lines_of(axis)["mean per 0.5 of truth"] == ([0, 1, 2.5, 5], [1.5, 0.5, 2.0, 5.0])
    assert axis.collections[0].get_offsets()[:, 1].tolist() == [1.0, 2.0, 0.5, 2.0, 5.0]
    assert axis.get_ylim() == pytest.approx((-0.15, 5.15)) == axis.get_xlim()
    # ranks of the truth 1 2 3 4 5, of the predictions 2 3.5 1 3.5 5
    ranks = [1, 2, 3, 4, 5], [2, 3.5, 1, 3.5, 5]
    r, rho = (np.corrcoef(*pair)[0, 1] for pair in ((labels, predictions), ranks))
    beyond = "1 predicted beyond the scale, drawn at its edge"
    assert axis.get_title() == f"Pearson r {r:.3f}, Spearman rho {rho:.3f}, 5 examples\n{beyond}"
    assert figures.plot_predictions("sts", predictions, labels).axes[0].get_title() == axis.get_title()
    assert figures.pixels(figures.plot_predictions("sst", [0, 1], [0, 1])).shape[-1] == 3


def test_conflict_is_averaged_over_seeds(bands):
    seeds = [make_metrics(0.0), make_metrics(0.2), make_metrics(0.1)[:3]]  # the last was not finished
    cosines, shares = figures.plot_conflict({"row": seeds, "one task": [make_metrics(pairs=())]}).axes
    steps, values = lines_of(cosines)["sst and sts"]
    assert steps == list(STEPS) and values == pytest.approx([0.2 + step / 1000 for step in STEPS])
    assert lines_of(shares)["para and sts"][1] == pytest.approx([0.3] * 5)
    xs, low, high = bands[1]  # of sst and sts
    assert xs == steps and (low[1], high[1]) == pytest.approx((0.12, 0.32))
    assert figures.plot_conflict({"one task": [make_metrics(pairs=())]}) is None


def test_conflict_by_layer(bands):
    old, new = [make_metrics(layers=False)], [make_metrics(0.0), make_metrics(0.2)]
    cosines, shares = shown(figures.plot_layer_conflict({"old": old, "new": new}))
    # The mean of the steps is 30, that of the two shifts 0.1.
    assert lines_of(cosines)["sst and para"] == ([0, 1, 2], pytest.approx([-0.37, -0.27, -0.17]))
    assert lines_of(shares)["para and sts"] == ([0, 1, 2], pytest.approx([0.23, 0.33, 0.43]))
    assert bands[-1] == ([0, 1, 2], pytest.approx([0.13, 0.23, 0.33]), pytest.approx([0.33, 0.43, 0.53]))
    assert figures.plot_layer_conflict({"old": old}) is None


@pytest.mark.parametrize("num_rows", [1, 4, 5])
def test_rows_are_drawn_to_the_same_scale(num_rows):
    runs = {f"row {n}": [make_metrics(n / 10)] for n in range(num_rows)}
    axes = [axis for axis in shown(figures.plot_conflict(runs)) if axis.get_title()]
    assert [axis.get_title() for axis in axes] == list(runs) and len({axis.get_ylim() for axis in axes}) == 1
    assert lines_of(axes[-1])["sst and para"][1][0] == pytest.approx((num_rows - 1) / 10 + 0.01)


def test_scores_of_the_table():
    rows = [
        {"title": "alone", "poster": {"sst": 0.528, "para": None}, "measured": {"sst": (0.51, 0.50, 0.52)}},
        {"title": "baseline", "poster": {"sst": 0.479, "mean": 0.511}, "measured": None},
        {"title": "ours", "measured": {"sst": (0.49, None, None), "mean": (0.7, 0.65, 0.72), "sts": None}},
    ]
    axes = figures.plot_scores(rows).axes
    assert [axis.get_title() for axis in axes] == ["sentiment (accuracy)", "overall"]  # the others are empty
    poster, measured = lines_of(axes[0]).values()
    assert poster[0] == [0.528, 0.479] and np.round(poster[1]).tolist() == [0, 1]
    assert measured[0] == [0.51, 0.49] and np.round(measured[1]).tolist() == [0, 2]
    lines = [line for axis in axes for line in axis.get_lines() if line.get_linestyle() == "-"]
    assert [list(line.get_xdata()) for line in lines] == [[0.50, 0.52], [0.65, 0.72]]
    assert figures.plot_scores([{"title": "later", "poster": None}]) is None


def test_learning_curves(bands):
    seeds = [[(10, {"sst": 0.2, "mean": 0.3}), (20, {"sst": 0.4, "mean": None})], [(10, {"sst": 0.4})]]
    figure = figures.plot_learning_curves({"empty": [], "row": seeds, "late": [[(10, {"mean": 0.1})]]})
    row, late = shown(figure)
    assert [axis.get_title() for axis in (row, late)] == ["row", "late"]
    sentiment, overall = (figures.score_title(score) for score in ("sst", "mean"))
    assert lines_of(row) == {sentiment: ([10, 20], pytest.approx([0.3, 0.4])), overall: ([10], [0.3])}
    assert bands == [([10, 20], [0.2, 0.4], [0.4, 0.4])]
    assert lines_of(late) == {overall: ([10], [0.1])}
    assert row.get_ylim() == late.get_ylim()
    assert figures.plot_learning_curves({"empty": [[]]}) is None


@pytest.mark.slow
def test_large_figures_can_be_saved(monkeypatch):
    """Eight tasks in a run, and fourteen rows with long titles in a table."""
    monkeypatch.setattr(figures, "TASKS", TASKS | dict.fromkeys("wxyz", TASKS["sst"]))
    names = list(figures.TASKS)
    pairs = [f"{a}-{b}" for n, a in enumerate(names) for b in names[n + 1 :]]
    metrics = [line | {"loss": dict.fromkeys(names, 1.0)} for line in make_metrics(pairs=pairs)[:-1]]
    titles = [f"a row with a rather long title, number {n}" for n in range(14)]
    scores, measured = (dict.fromkeys(figures.PANELS, value) for value in (0.5, (0.5, 0.4, 0.6)))
    for figure in (
        figures.plot_curves(metrics),
        figures.plot_scores([{"title": title, "poster": scores, "measured": measured} for title in titles]),
    ):
        figure.savefig(buffer := io.BytesIO(), format="png", dpi=20)
        assert buffer.getvalue().startswith(b"\x89PNG")
