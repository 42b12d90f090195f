"""The page of benchmarks.speed: what each section measured, as tables, and whether the targets are met.

A round is one pass over the same steps by every contender. Numbers are medians over rounds, with the lower
and upper quartile in brackets; a ratio is taken within each round, before the median.
"""

import shlex
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from support.files import read_head, write_text

TITLE = "# Speed, measured"
BY_HAND = "<!-- written by hand below -->"
INTRODUCTION = """
Written by `python -m benchmarks.speed` from speed.json; only what follows the last line of this part is kept.
Contenders take turns, each in a process of its own, in an order drawn anew for each step, one at a time. A
round is one pass over the same steps, after a warm-up in which every contender meets every batch. Numbers are
medians over rounds, with the quartiles in brackets; ratios are taken within each round.
"""


def paragraph(text: str) -> str:
    """One line of Markdown, however the text was broken into lines here."""
    return " ".join(text.split())


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
    return "\n".join([lines[0], "|" + " --- |" * len(header), *lines[1:]])


def spread(values: Sequence[float], digits: int, scale: float = 1.0) -> str:
    """Median and quartiles; of one value, that alone."""
    if len(values) == 1:
        return f"{values[0] * scale:.{digits}f}"
    low, middle, high = np.percentile(np.asarray(values) * scale, (25, 50, 75))
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


# --- targets ------------------------------------------------------------------------------------------------

# Takes {section: what it measured} and returns one value per round; None: not measured.
Measure = Callable[[dict], list[float] | None]


@dataclass(frozen=True)
class Target:
    text: str
    measure: Measure
    goal: str | None = None  # "at most NUMBER" or "at least NUMBER"; None: reported only
    digits: int = 2


def fastest(measured: dict, section: str, start: str) -> list[float] | None:
    """Seconds of the fastest contender whose name starts so; `{precision}` stands for that asked for."""
    if section not in measured:
        return None
    start = start.format(precision=measured[section]["precision"])
    rows = [values for name, values in measured[section]["seconds"].items() if name.startswith(start)]
    return min(rows, key=np.median) if rows else None


def time_ratio(section: str, a: str, b: str) -> Measure:
    """Time of a over time of b, which on the same examples is the throughput of b over that of a."""

    def measure(measured):
        times = [fastest(measured, section, start) for start in (a, b)]
        return None if None in times else [x / y for x, y in zip(*times, strict=True)]

    return measure


def pair_ratio(name: str) -> Measure:
    """Time of one alone over that of another, from pairs of the section `sharing`."""
    return lambda measured: measured["sharing"]["pairs"][name] if "sharing" in measured else None


def roofline_share(name: str, limits: str = "limits") -> Measure:
    """Percent of the roofline that a contender reaches."""

    def measure(measured):
        seconds, found = fastest(measured, "roofline", name), measured.get("roofline")
        if seconds is None:
            return None
        return [100 * found[limits][found["precision"]] * found["num_steps"] / value for value in seconds]

    return measure


def later_starts(measured: dict) -> list[float] | None:
    return measured["start"]["seconds"][1:] if "start" in measured else None


def extra_memory(a: str, b: str, in_buffers: bool) -> Measure:
    """Peak memory of a less that of b: MiB, or in buffers of P float32."""

    def measure(measured):
        if "step" not in measured:
            return None
        step = measured["step"]
        mib = [step["memory"][name.format(precision=step["precision"])] for name in (a, b)]
        return [(mib[0] - mib[1]) / (step["sizes"]["shared"] * 4 / 2**20 if in_buffers else 1)]

    return measure


def largest_memory_ratio(peer: str) -> Measure:
    """Peak memory of ours over that of a peer: the largest of all steps in the section `memory`."""

    def measure(measured):
        if "memory" not in measured:
            return None
        memory, precision = measured["memory"]["memory"], measured["memory"]["precision"]
        if f"{peer} {precision}" not in memory:  # skipped
            return None
        pairs = zip(memory[f"ours {precision}"], memory[f"{peer} {precision}"], strict=True)
        return [max(a / b for a, b in pairs)]

    return measure


OURS, SUM, ONE_ROW = "ours pcgrad {precision}", "ours sum {precision}", "ours sum, one row {precision}"
TEXTBOOK, TORCHJD = "Hugging Face + textbook", "Hugging Face + TorchJD"
HF_SUM = "Hugging Face sum, random batches"
TARGETS = [
    Target("step with pcgrad, over sum", time_ratio("step", OURS, SUM), "at most 1.05", 3),
    Target("step with pcgrad, over sum in one row", time_ratio("step", OURS, ONE_ROW), "at most 1.05", 3),
    Target(
        "throughput of ours pcgrad, over Hugging Face + textbook PCGrad in its faster precision",
        *(time_ratio("step", TEXTBOOK, OURS), "at least 5"),
    ),
    Target(
        "throughput of ours pcgrad, over Hugging Face + TorchJD mtl_backward in its faster precision",
        *(time_ratio("step", f"{TORCHJD} mtl_backward", OURS), "at least 5"),
    ),
    Target(
        "throughput of ours pcgrad, over the fastest use of TorchJD",
        *(time_ratio("step", TORCHJD, OURS), "at least 5"),
    ),
    Target(
        "throughput of ours sum, over Hugging Face sum in the same precision on random batches",
        *(time_ratio("step", f"{HF_SUM} {{precision}}", SUM), "at least 1.8"),
    ),
    Target(
        "the same, Hugging Face with the allocator setting that ours makes",
        *(time_ratio("step", f"{HF_SUM}, freed memory kept {{precision}}", SUM), "at least 1.8"),
    ),
    Target("bert-base size: step with pcgrad, over sum", time_ratio("base", OURS, SUM), "at most 1.05", 3),
    Target(
        "bert-base size: step with pcgrad, over sum in one row",
        *(time_ratio("base", OURS, ONE_ROW), "at most 1.05", 3),
    ),
    Target(
        "bert-base size: throughput of ours pcgrad,"
        " over Hugging Face + textbook PCGrad in the same precision",
        *(time_ratio("base", TEXTBOOK, OURS), "at least 5"),
    ),
    Target("ours sum, % of the roofline", roofline_share(SUM), "at least 70", 0),
    Target("ours pcgrad, % of the roofline", roofline_share(OURS), "at least 70", 0),
    Target(
        "ours pcgrad, % of the roofline with the matrix rate of all layers in turn",
        *(roofline_share(OURS, "limits_in_turn"), "at least 70", 0),
    ),
    Target(
        "our AdamW, over torch's fused",
        *(time_ratio("optimizer", "ours", "torch.optim.AdamW, fused"), "at most 1"),
    ),
    Target(
        "evaluation, throughput over Hugging Face's",
        *(time_ratio("evaluate", "Hugging Face", "ours"), "at least 4"),
    ),
    Target("seconds from start to the first step, not the first time", later_starts, "at most 5", 1),
    Target("peak memory, pcgrad less sum, MiB", extra_memory(OURS, SUM, False), digits=1),
    Target("the same in gradient buffers (P float32)", extra_memory(OURS, SUM, True)),
    Target("peak memory, pcgrad less sum in one row, MiB", extra_memory(OURS, ONE_ROW, False), digits=1),
    Target("the same in gradient buffers (P float32)", extra_memory(OURS, ONE_ROW, True)),
    Target(
        "peak memory in the longest steps of an epoch, over Hugging Face's (SDPA)",
        *(largest_memory_ratio("Hugging Face (SDPA)"), "at most 1.3"),
    ),
    Target(
        "a run alone, its threads spinning as ours do, over libgomp's own spinning",
        *(pair_ratio("ours"), "at most 1.02", 3),
    ),
    Target("the same of two runs that spin alike", *(pair_ratio("control"), None, 3)),
    Target(
        "two runs at once, over one alone",
        *(time_ratio("sharing", "two at once, ours", "alone, libgomp"), "at most 2.2"),
    ),
    Target(
        "the same with libgomp's own spinning",
        *(time_ratio("sharing", "two at once, libgomp", "alone, libgomp"),),
    ),
]


def target_row(target: Target, measured: dict) -> list[str]:
    values, verdict = target.measure(measured), "-"
    if values is None:
        return [target.text, "not measured", target.goal or "-", "-"]
    if target.goal:
        kind, _, limit = target.goal.rpartition(" ")
        value = float(np.median(values))
        is_met = value <= float(limit) if kind == "at most" else value >= float(limit)
        verdict = "met" if is_met else "missed"
    return [target.text, spread(values, target.digits), target.goal or "-", verdict]


# --- sections: what was measured -> blocks of Markdown ------------------------------------------------------


def skipped_blocks(found: dict) -> list[str]:
    return [f"Not measured: {name}: {reason}." for name, reason in found["skipped"].items()]


def show_step(found: dict) -> list[str]:
    tokens, num_steps, buffer = found["tokens"], found["num_steps"], found["sizes"]["shared"] * 4 / 2**20
    rows = []
    for name, seconds in found["seconds"].items():
        memory, rate = found["memory"][name], [tokens / value for value in seconds]
        times = [spread(seconds, 1, 1000 / num_steps), spread(rate, 0)]
        rows.append([name, *times, f"{memory:.0f}", f"{memory / buffer:.1f}"])
    losses = ", ".join(f"{task} {loss:.4f}" for task, loss in found["losses"].items())
    padding = ", ".join(f"{order} {1 - tokens / places:.0%}" for order, places in found["places"].items())
    profile = found["profile"]
    total = sum(profile.values())
    introduction = f"""
        {num_steps} steps of {tokens / num_steps:.0f} real word pieces. All contenders train on the same
        examples; of the places in padded batches, padding takes: {padding}. Before the timing, in float32 and
        without dropout, all gave the same task losses within {found["tolerance"]:g} ({losses}). Batches are
        made before the timing, and nobody clips gradients. The two precisions are timed one after the other,
        the contenders of one precision in turns. Peak memory: resident, less what the process held before it
        built anything; a gradient buffer is P
        float32, P the encoder's parameters."""
    where = f"Where a step of ours pcgrad {found['precision']} goes"
    where += " (torch.profiler, which slows down small operations):"
    header = [
        "contender",
        "ms a step",
        "real word pieces a second",
        "peak memory, MiB",
        "in gradient buffers",
    ]
    shares = [
        [name, f"{value * 1000:.1f}", f"{100 * value / total:.0f} %"] for name, value in profile.items()
    ]
    return [
        paragraph(introduction),
        table(header, rows),
        *skipped_blocks(found),
        where,
        table(["operations", "ms a step", "share"], shares),
    ]


def show_memory(found: dict) -> list[str]:
    introduction = f"""
        MiB, resident, less what the process held before it built anything: the peak so far after each of the
        steps of an epoch that have the most attention scores, in ascending order, in a process of its own
        for each contender. Sequences of up to {found["longest"]} word pieces; heads: """
    introduction += ", ".join(f"{task} {head}" for task, head in found["heads"].items())
    introduction += ", the others as by default. Sequences and longest sequence of each task are given."
    names = list(found["memory"])
    rows = []
    for i, shapes in enumerate(found["steps"]):
        peaks = [found["memory"][name][i] for name in names]
        ratios = [f"{peaks[0] / peak:.2f}" for peak in peaks[1:]]
        step = ", ".join(f"{task} {shape}" for task, shape in shapes.items())
        rows.append([step, *(f"{peak:.0f}" for peak in peaks), *ratios])
    header = ["step", *names, *(f"ours over {name}" for name in names[1:])]
    return [paragraph(introduction), table(header, rows), *skipped_blocks(found)]


def show_sharing(found: dict) -> list[str]:
    introduction = """
        One training alone, and two at the same time, each with as many threads as there are cores: mean over
        the runs of a pass over the same steps, without pauses. Threads that wait for each other spin before
        they sleep: as long as libgomp lets them, or as our commands tell it (GOMP_SPINCOUNT). The other
        sections leave that to libgomp. What our setting costs a run alone is measured by itself, in pairs of
        equal steps, among the targets."""
    alone, rows = next(iter(found["seconds"].values())), []
    for name, seconds in found["seconds"].items():
        ratio = [a / b for a, b in zip(seconds, alone, strict=True)]
        rows.append([name, spread(seconds, 1, 1000 / found["num_steps"]), spread(ratio, 3)])
    return [paragraph(introduction), table(["runs", "ms a step", "over the first"], rows)]


def show_updates(found: dict) -> list[str]:
    ours, rows = next(iter(found["seconds"].values())), []
    for name, seconds in found["seconds"].items():
        ratio = [a / b for a, b in zip(ours, seconds, strict=True)]
        rows.append([name, spread(seconds, 2, 1000 / found["num_steps"]), spread(ratio, 2)])
    return [table(["contender", "ms", "time of ours over it"], rows), *skipped_blocks(found)]


def show_evaluation(found: dict) -> list[str]:
    examples, tasks = sum(found["examples"].values()), list(found["examples"])
    rows = [
        [name, spread(seconds, 1), spread([examples / value for value in seconds], 0)]
        for name, seconds in found["seconds"].items()
    ]
    agreement = [
        [name, which, *(f"{value:.6g}" for value in values.values())]
        for name, runs in found["agreement"].items()
        for which, values in runs.items()
    ]
    return [
        table(["contender", "seconds", "examples a second"], rows),
        *skipped_blocks(found),
        "Agreement with ours: share of equal classes, or the largest difference of a number.",
        table(["contender", "predictions", *tasks], agreement),
    ]


def show_start(found: dict) -> list[str]:
    first, *later = found["seconds"]
    rows = [["first time", f"{first:.1f}"], ["again", spread(later, 1)]]
    return [table(["start of the command to the end of its first step", "seconds"], rows)]


def show_scaling(found: dict) -> list[str]:
    blocks = []
    for title, cases in (("tasks", found["by_tasks"]), ("word pieces a sentence", found["by_length"])):
        rows = []
        for value, measured in cases.items():
            first = next(iter(measured["seconds"].values()))
            for name, seconds in measured["seconds"].items():
                times = [
                    spread(seconds, 1, 1000 / found["num_steps"]),
                    spread(seconds, 1, 1e6 / measured["tokens"]),
                ]
                ratio = [a / b for a, b in zip(seconds, first, strict=True)]
                rows.append([value, name, *times, spread(ratio, 3)])
        header = [title, "contender", "ms a step", "ms per 1000 real word pieces", "over the first"]
        blocks.append(table(header, rows))
    rows = [
        [share, str(measured["examples"]), *(f"{value:.1f}" for value in measured["seconds"])]
        for share, measured in found["by_data"].items()
    ]
    header = ["share of the training data", "rows", "seconds to the first step, first time", "again"]
    return [*blocks, table(header, rows)]


def show_roofline(found: dict) -> list[str]:
    rates = [
        [precision, shape, f"{rate / 1e9:.0f}"]
        for precision, shapes in found["rates"].items()
        for shape, rate in shapes.items()
    ]
    in_turn = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in found["rates_in_turn"].items())
    rows = []
    for name, seconds in found["seconds"].items():
        cells = [spread(seconds, 1, 1000 / found["num_steps"])]
        for limits in ("limits", "limits_in_turn"):
            limit = found[limits][name.rpartition(" ")[2]]
            share = [100 * limit * found["num_steps"] / value for value in seconds]
            cells += [f"{limit * 1000:.1f}", spread(share, 0)]
        rows.append([name, *cells])
    introduction = f"""
        A step takes {found["flops"] / 1e9:.1f} billion operations in linear layers and attention products,
        counted on real word pieces, and the optimizer must move each parameter, gradient and moment once
        ({found["memory_seconds"] * 1000:.1f} ms at {found["bandwidth"] / 1e9:.1f} GB/s, measured in place on
        a large tensor). The limit is the operations at the best rate below, plus that. That rate is of one
        product again and again, its operands in the cache. The second limit takes the rate of all linear
        layers of the encoder in turn,
        forward and backward, each with its own operands: {in_turn} GFLOP/s."""
    header = [
        "contender",
        "ms a step",
        "limit, ms",
        "share reached, %",
        "second limit, ms",
        "share reached, %",
    ]
    return [
        paragraph(introduction),
        table(header, rows),
        table(["precision", "rows x inputs x outputs", "GFLOP/s"], rates),
    ]


SHOW: dict[str, tuple[str, Callable[[dict], list[str]]]] = {
    "step": ("Training step", show_step),
    "base": ("Training step at bert-base size, random weights", show_step),
    "memory": ("Memory of the longest steps", show_memory),
    "sharing": ("Two runs at once", show_sharing),
    "optimizer": ("Optimizer", show_updates),
    "surgery": ("Gradient surgery alone", show_updates),
    "evaluate": ("Evaluation", show_evaluation),
    "start": ("Start", show_start),
    "scaling": ("Scaling", show_scaling),
    "roofline": ("Roofline", show_roofline),
}


def make_page(measured: dict) -> str:
    """The page, without what is written by hand."""
    blocks = [TITLE, paragraph(INTRODUCTION)]
    for section, (title, show) in SHOW.items():
        if section in measured:
            found = measured[section]
            facts = found["machine"] | {name: found[name] for name in ("torch", "precision", "pretrained")}
            facts |= {"batch size": found["batch_size"], "longest sequence": found["max_length"]}
            command = textwrap.indent(shlex.join(found["command"]), "    ")
            about = ", ".join(f"{name} {value}" for name, value in facts.items())
            blocks += [f"## {title}", command, about, *show(found)]
    rows = [target_row(target, measured) for target in TARGETS]
    blocks += ["## Targets", table(["", "measured", "target", ""], rows)]
    return "\n\n".join(blocks) + "\n"


def is_page(path: Path) -> bool:
    return read_head(path).startswith(TITLE.encode())


def write_page(path: Path, measured: dict) -> None:
    """Write the page; what follows the line BY_HAND in the present one is kept."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    _, _, by_hand = text.partition(BY_HAND)
    write_text(path, f"{make_page(measured)}\n{BY_HAND}{by_hand or chr(10)}")
