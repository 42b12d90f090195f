"""What is drawn is what the data say: lines, bands, markers, cells and titles are read back from the figures."""

import io

import numpy as np
import pytest

from config import TASKS
from reporting import figures

STEPS = range(10, 60, 10)
PAIRS = ("sst-para", "sst-sts", "para-sts")


def make_metrics(shift=0.0, pairs=PAIRS, layers=True):
    """Five lines of a log and an evaluation; each number says where it comes from."""
    metrics = []
    for step in STEPS:
        line = {"step": step, "lr": step / 1e6, "head_lr": step / 1e4}
        line["loss"] = {task: number + step / 100 for number, task in enumerate(("sst", "para", "sts"))}
        line["cosine"] = {pair: shift + number / 10 + step / 1000 for number, pair in enumerate(pairs)}
        line["conflict"] = {pair: shift + number / 10 for number, pair in enumerate(pairs)}
        if layers:
            for key, start in (("layer_cosine", -0.5), ("layer_conflict", 0.1)):
                line[key] = {
                    part: {pair: start + shift + place / 10 + step / 1000 for pair in pairs}
                    for place, part in enumerate(("embeddings", "layer.0", "layer.1"))
                }
        metrics.append(line)
    tasks = {"sst": {"accuracy": 0.5}, "para": {"accuracy": 0.8}, "sts": {"pearson": 0.2, "spearman": 0.3}}
    return [*metrics, {"step": 50, "dev": {"tasks": tasks, "mean": 0.5, "mean_2024": 0.6}}]


def lines_of(axis):
    """label -> (x, y) of the lines that have one."""
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
        for line in axis.get_lines()
        if not line.get_label().startswith("_")
    }


def band(axis, number=0):
    """x -> (low, high) of a band."""
    corners = axis.collections[number].get_paths()[0].vertices
    return {
        x: (min(corners[corners[:, 0] == x, 1]), max(corners[corners[:, 0] == x, 1])) for x in corners[:, 0]
    }


def shown(figure):
    return [axis for axis in figure.axes if axis.get_visible()]


def check_savable(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=30)
    assert buffer.getvalue().startswith(b"\x89PNG")


# --- colours and means -------------------------------------------------------------------------------------------


def test_a_task_has_one_colour_and_all_pairs_of_eight_tasks_differ(monkeypatch):
    monkeypatch.setattr(figures, "TASKS", dict.fromkeys("abcdefgh"))
    assert len({figures.task_color(task) for task in [*"abcdefgh", "mean"]}) == 9
    styles = [figures.pair_style(f"{a}-{b}") for a in "abcdefgh" for b in "abcdefgh" if a < b]
    assert len({(style["color"], style["linestyle"]) for style in styles}) == 28
    assert figures.pair_style("c-a") == figures.pair_style("a-c")


def test_a_pair_keeps_its_style_when_a_task_is_added(monkeypatch):
    before = [figures.pair_style(pair) for pair in PAIRS]
    monkeypatch.setattr(figures, "TASKS", TASKS | {"new": None})
    assert [figures.pair_style(pair) for pair in PAIRS] == before


def test_smooth():
    assert figures.smooth([3, 1, 2]).tolist() == [3, 1, 2]  # too few for a running mean
    values = [0.0] * 40
    values[1] = values[20] = 6.0
    smoothed = figures.smooth(values)  # over three values, at the ends over two
    assert smoothed[[0, 1, 2, 3]] == pytest.approx([3, 2, 2, 0])
    assert smoothed[[18, 19, 20, 21, 22]] == pytest.approx([0, 2, 2, 2, 0])
    assert figures.smooth([5.0] * 100) == pytest.approx([5.0] * 100)


# --- one run -----------------------------------------------------------------------------------------------------


def test_curves():
    losses, scores, cosines, rates = figures.plot_curves(make_metrics()).axes
    for number, task in enumerate(("sst", "para", "sts")):
        assert lines_of(losses)[task] == (list(STEPS), [number + step / 100 for step in STEPS])
        line = next(line for line in losses.get_lines() if line.get_label() == task)
        assert line.get_color() == figures.task_color(task)
    assert lines_of(scores) == {
        "sst accuracy": ([50], [0.5]),
        "para accuracy": ([50], [0.8]),
        "sts pearson": ([50], [0.2]),
        "plain mean": ([50], [0.5]),
    }
    assert lines_of(cosines)["para and sts"][1] == pytest.approx([0.2 + step / 1000 for step in STEPS])
    assert lines_of(rates)["encoder"][1] == [step / 1e6 for step in STEPS]
    assert lines_of(rates)["heads"][1] == [step / 1e4 for step in STEPS]


def test_curves_of_one_task_and_of_nothing():
    """No pairs and no evaluation: their panels are not shown."""
    lines = [line | {"loss": {"sts": 1.0}, "cosine": {}} for line in make_metrics()[:-1]]
    assert [axis.get_title() for axis in shown(figures.plot_curves(lines))] == [
        "training loss (thin: as logged, thick: running mean)",
        "learning rate",
    ]
    assert figures.plot_curves([]) is None


def test_task_that_is_absent_in_some_lines():
    metrics = make_metrics()
    del metrics[1]["loss"]["para"], metrics[1]["cosine"]["para-sts"]
    losses, _, cosines, _ = figures.plot_curves(metrics).axes
    assert lines_of(losses)["para"][0] == lines_of(cosines)["para and sts"][0] == [10, 30, 40, 50]


def test_heat_map_over_time():
    figure = figures.plot_layer_conflict_over_time(make_metrics())
    assert [axis.get_title() for axis in figure.axes[:3]] == ["sst and para", "sst and sts", "para and sts"]
    mesh = figure.axes[2].collections[0]
    values = [[0.1 + place / 10 + step / 1000 for step in STEPS] for place in range(3)]
    assert np.array(mesh.get_array()).reshape(3, 5) == pytest.approx(np.array(values))
    assert mesh.get_coordinates()[0, :, 0].tolist() == [0, *STEPS]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [
        "embeddings",
        "layer.0",
        "layer.1",
    ]
    assert figures.plot_layer_conflict_over_time(make_metrics(layers=False)) is None


def test_heat_map_of_a_long_run_averages_stretches():
    line = make_metrics(pairs=("sst-sts",))[0]
    lines = [
        line | {"step": step, "layer_conflict": {"embeddings": {"sst-sts": float(step % 2)}}}
        for step in range(1, 2 * figures.HEAT_COLUMNS + 1)
    ]
    mesh = figures.plot_layer_conflict_over_time(lines).axes[0].collections[0]
    assert mesh.get_array().ravel().tolist() == [0.5] * figures.HEAT_COLUMNS


def test_confusion_matrix_by_hand():
    # true 0: predicted 0, 0, 1; true 1: predicted 1; true 2: predicted 0, 2, 2, 2; true 3: never
    labels, predictions = [0, 0, 0, 1, 2, 2, 2, 2], [0, 1, 0, 1, 2, 0, 2, 2]
    figure = figures.plot_confusion(
        np.array(predictions), np.array(labels, dtype=np.float32), ["a", "b b", "c", "d"]
    )
    axis = figure.axes[0]
    cells = {(text.get_position()[1], text.get_position()[0]): text.get_text() for text in axis.texts}
    expected = {
        (0, 0): "2\n67 %",
        (0, 1): "1\n33 %",
        (1, 1): "1\n100 %",
        (2, 0): "1\n25 %",
        (2, 2): "3\n75 %",
    }
    assert cells == {(i, j): expected.get((i, j), "0\n0 %") for i in range(4) for j in range(4)}
    assert axis.images[0].get_array()[2].tolist() == [0.25, 0, 0.75, 0]
    assert axis.get_title() == "accuracy 0.750, 8 examples"
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b\nb", "c", "d"]
    assert "predicted" in axis.get_xlabel() and "true" in axis.get_ylabel()


def test_regression_by_hand():
    labels, predictions = [0.0, 0.2, 1.0, 2.6, 5.0], [1.0, 2.0, 0.5, 2.0, 5.5]
    axis = figures.plot_regression(predictions, labels, (0, 5)).axes[0]
    assert axis.collections[0].get_offsets().tolist() == [list(pair) for pair in zip(labels, predictions)]
    # 0.2 belongs to the half point 0, 2.6 to 2.5
    assert lines_of(axis)["mean per 0.5 of truth"] == ([0, 1, 2.5, 5], [1.5, 0.5, 2.0, 5.5])
    assert lines_of(axis)["as it should be"] == ([0, 5], [0, 5])
    r = np.corrcoef(labels, predictions)[0, 1]
    # ranks of the truth 1 2 3 4 5, of the predictions 2 3.5 1 3.5 5
    rho = np.corrcoef([1, 2, 3, 4, 5], [2, 3.5, 1, 3.5, 5])[0, 1]
    assert axis.get_title() == f"Pearson r {r:.3f}, Spearman rho {rho:.3f}, 5 examples"


# --- conflict ----------------------------------------------------------------------------------------------------


def test_conflict_is_averaged_over_seeds():
    seeds = [make_metrics(0.0), make_metrics(0.2), make_metrics(0.1)[:3]]  # the last was not finished
    cosines, shares = figures.plot_conflict({"row": seeds}).axes
    steps, values = lines_of(cosines)["sst and sts"]
    assert steps == list(STEPS)
    assert values == pytest.approx([0.2 + step / 1000 for step in STEPS])
    assert band(cosines, 1)[20] == pytest.approx((0.12, 0.32))
    assert lines_of(shares)["para and sts"][1] == pytest.approx([0.3] * 5)
    assert band(shares, 2)[50] == pytest.approx((0.2, 0.4))
    assert [0, 0] in [list(line.get_ydata()) for line in cosines.get_lines()]  # the line at 0
    assert shares.get_ylim() == (0, 1)


def test_one_seed_has_no_band():
    cosines, shares = figures.plot_conflict({"row": [make_metrics()]}).axes
    assert not cosines.collections and not shares.collections


@pytest.mark.parametrize("num_rows", [1, 3, 4, 5, 14])
def test_conflict_of_several_rows(num_rows):
    runs = {f"row {n}": [make_metrics(n / 10)] for n in range(num_rows)} | {"alone": [make_metrics(pairs=())]}
    axes = shown(figures.plot_conflict(runs))
    assert len(axes) == 2 * num_rows  # the row with one task is left out
    assert [axis.get_title() for axis in axes if axis.get_title()] == [f"row {n}" for n in range(num_rows)]
    cosines = [axis for axis in axes if axis.get_title()]
    assert len({axis.get_ylim() for axis in cosines}) == 1  # so that rows can be compared
    assert lines_of(cosines[-1])["sst and para"][1][0] == pytest.approx((num_rows - 1) / 10 + 0.01)
    low, high = cosines[0].get_ylim()
    assert low < 0 and high > (num_rows - 1) / 10 + 0.25


def test_one_legend_with_each_pair_once():
    figure = figures.plot_conflict({"a": [make_metrics()], "b": [make_metrics(pairs=("para-sst",))]})
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["sst and para", "sst and sts", "para and sts", "unrelated gradients"]


def test_nothing_to_be_in_conflict():
    assert figures.plot_conflict({"alone": [make_metrics(pairs=())]}) is None
    assert figures.plot_conflict({}) is None


def test_layer_conflict():
    figure = figures.plot_layer_conflict({"row": [make_metrics(0.0), make_metrics(0.2)]})
    cosines, shares = figure.axes
    # the mean of the steps is 30, that of the two shifts 0.1
    assert lines_of(cosines)["sst and para"] == ([0, 1, 2], pytest.approx([-0.37, -0.27, -0.17]))
    assert lines_of(shares)["para and sts"] == ([0, 1, 2], pytest.approx([0.23, 0.33, 0.43]))
    assert band(shares)[1] == pytest.approx((0.23, 0.43))
    assert [label.get_text() for label in shares.get_xticklabels()] == ["e", "0", "1"]


def test_layer_conflict_of_runs_without_layers():
    old, new, alone = make_metrics(layers=False), make_metrics(), make_metrics(pairs=())
    assert figures.plot_layer_conflict({"old": [old], "alone": [alone]}) is None
    assert len(shown(figures.plot_layer_conflict({"old": [old], "new": [new]}))) == 2


# --- the table ---------------------------------------------------------------------------------------------------

ROWS = [
    {"title": "alone", "poster": {"sst": 0.528, "para": None}, "measured": {"sst": (0.51, 0.50, 0.52)}},
    {"title": "baseline", "poster": {"sst": 0.479, "mean": 0.511}, "measured": None},
    {"title": "ours", "measured": {"sst": (0.49, None, None), "mean": (0.7, 0.65, 0.72), "sts": None}},
]


def test_scores():
    figure = figures.plot_scores(ROWS)
    assert [axis.get_title() for axis in figure.axes] == [
        "sentiment accuracy",
        "plain mean",
    ]  # the others are empty
    sentiment, mean = figure.axes
    poster, measured = (
        lines_of(sentiment)[label] for label in ("poster", "measured, with its 95 % interval")
    )
    assert poster[0] == [0.528, 0.479] and measured[0] == [0.51, 0.49]
    assert np.round(poster[1]).tolist() == [0, 1] and np.round(measured[1]).tolist() == [0, 2]
    intervals = [line for line in sentiment.get_lines() if line.get_linestyle() == "-"]
    assert [list(line.get_xdata()) for line in intervals] == [[0.50, 0.52]]
    assert list(intervals[0].get_ydata()) == [measured[1][0]] * 2
    assert [list(line.get_xdata()) for line in mean.get_lines() if line.get_linestyle() == "-"] == [
        [0.65, 0.72]
    ]
    assert [label.get_text() for label in sentiment.get_yticklabels()] == ["alone", "baseline", "ours"]
    assert sentiment.get_ylim()[0] > sentiment.get_ylim()[1]  # the first row is on top
    colors = {line.get_label(): line.get_color() for line in sentiment.get_lines()}
    assert colors["poster"] == figures.POSTER_COLOR
    assert colors["measured, with its 95 % interval"] == figures.task_color("sst")


def test_no_scores():
    assert figures.plot_scores([]) is None
    assert figures.plot_scores([{"title": "later", "poster": None}]) is None


def test_learning_curves():
    seeds = [[(10, {"sst": 0.2, "mean": 0.3}), (20, {"sst": 0.4, "mean": None})], [(10, {"sst": 0.4})]]
    figure = figures.plot_learning_curves({"empty": [], "row": seeds, "late": [[(10, {"mean": 0.1})]]})
    sentiment, mean = shown(figure)
    assert sentiment.get_title() == "sentiment accuracy" and mean.get_title() == "plain mean"
    assert lines_of(sentiment) == {"row": ([10, 20], pytest.approx([0.3, 0.4]))}
    assert band(sentiment)[10] == (0.2, 0.4)
    assert lines_of(mean) == {"row": ([10], [0.3]), "late": ([10], [0.1])}
    assert mean.get_lines()[1].get_color() == figures.line_style(2)["color"]  # the third row's, in each panel
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["row", "late"]
    assert figures.plot_learning_curves({"empty": [[]]}) is None


@pytest.mark.parametrize("num_rows", [1, 14])
def test_tables_can_be_drawn(num_rows):
    titles = [f"a row with a rather long title, number {n}" for n in range(num_rows)]
    scores = dict.fromkeys(figures.SCORES, 0.5)
    measured = dict.fromkeys(figures.SCORES, (0.5, 0.4, 0.6))
    check_savable(figures.plot_scores([{"title": t, "poster": scores, "measured": measured} for t in titles]))
    check_savable(figures.plot_learning_curves({t: [[(1, scores), (2, scores)]] for t in titles}))


def test_figures_of_eight_tasks_can_be_drawn(monkeypatch):
    monkeypatch.setattr(figures, "TASKS", TASKS | dict.fromkeys("wxyz", TASKS["sst"]))
    names = list(figures.TASKS)
    pairs = [f"{a}-{b}" for n, a in enumerate(names) for b in names[n + 1 :]]
    metrics = [line | {"loss": dict.fromkeys(names, 1.0)} for line in make_metrics(pairs=pairs)[:-1]]
    for figure in (
        figures.plot_curves(metrics),
        figures.plot_conflict({"row": [metrics]}),
        figures.plot_layer_conflict({"row": [metrics]}),
    ):
        check_savable(figure)
    assert len(shown(figures.plot_layer_conflict_over_time(metrics))) == 28 + 1  # with the scale of colours
