"""The page of benchmark.py: what each section measured, as tables, and whether the targets are met.

A round is one pass over the same steps by every contender. Numbers are medians over rounds, with the lower and upper
quartile in brackets; a ratio is taken within each round, before the median.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reporting.report import Code, Heading, Paragraph, TableBlock, markdown_page, percent
from support.files import write_text

BY_HAND = "<!-- written by hand below -->"
INTRODUCTION = (
    "Written by benchmark.py from speed.json; only what stands below the last line of this part is kept. Contenders"
    " take turns, each in a process of its own, in an order drawn anew for each step, one at a time. A round is one pass"
    " over the same steps, after a warm-up in which every contender meets every batch. Numbers are medians over rounds,"
    " with the quartiles in brackets; ratios are taken within each round."
)


def spread(values: list[float], digits: int, scale: float = 1.0) -> str:
    """Median and quartiles."""
    low, middle, high = np.percentile(np.asarray(values) * scale, (25, 50, 75))
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


# --- targets ------------------------------------------------------------------------------------------------
# A measure takes {section: what it measured} and returns one value per round; None: not measured.


@dataclass(frozen=True)
class Target:
    text: str
    measure: Callable[[dict], list[float] | None]
    goal: float | None  # None: reported only
    at_most: bool = True
    digits: int = 2


def fastest(measured: dict, section: str, start: str) -> list[float] | None:
    """Seconds of the fastest contender whose name starts so; `{precision}` stands for the precision asked for."""
    if section not in measured:
        return None
    start = start.format(precision=measured[section]["precision"])
    rows = [values for name, values in measured[section]["seconds"].items() if name.startswith(start)]
    return min(rows, key=np.median) if rows else None


def time_ratio(section: str, a: str, b: str) -> Callable[[dict], list[float] | None]:
    """Time of a over time of b, which on the same examples is the throughput of b over that of a."""

    def measure(measured):
        times = [fastest(measured, section, start) for start in (a, b)]
        return None if None in times else [x / y for x, y in zip(*times, strict=True)]

    return measure


def roofline_share(name: str, limits: str = "limits") -> Callable[[dict], list[float] | None]:
    def measure(measured):
        seconds, found = fastest(measured, "roofline", name), measured.get("roofline")
        if seconds is None:
            return None
        return [100 * found[limits][found["precision"]] * found["num_steps"] / value for value in seconds]

    return measure


def later_starts(measured: dict) -> list[float] | None:
    return measured["start"]["seconds"][1:] if "start" in measured else None


def extra_memory(a: str, b: str, in_buffers: bool) -> Callable[[dict], list[float] | None]:
    """Peak memory of a less that of b: MiB, or in buffers of P float32."""

    def measure(measured):
        if "step" not in measured:
            return None
        step = measured["step"]
        mib = [step["memory"][name.format(precision=step["precision"])] for name in (a, b)]
        return [(mib[0] - mib[1]) / (step["sizes"]["shared"] * 4 / 2**20 if in_buffers else 1)]

    return measure


OURS, SUM, ONE_ROW = "ours pcgrad {precision}", "ours sum {precision}", "ours sum, one row {precision}"
TARGETS = [
    Target("step with pcgrad, over sum", time_ratio("step", OURS, SUM), 1.05, digits=3),
    Target("step with pcgrad, over sum in one row", time_ratio("step", OURS, ONE_ROW), 1.05, digits=3),
    Target(
        "throughput of ours pcgrad, over Hugging Face + textbook PCGrad in its faster precision",
        time_ratio("step", "Hugging Face + textbook", OURS),
        5.0,
        at_most=False,
    ),
    Target(
        "throughput of ours pcgrad, over Hugging Face + TorchJD mtl_backward in its faster precision",
        time_ratio("step", "Hugging Face + TorchJD mtl_backward", OURS),
        5.0,
        at_most=False,
    ),
    Target(
        "throughput of ours pcgrad, over the fastest use of TorchJD",
        time_ratio("step", "Hugging Face + TorchJD", OURS),
        5.0,
        at_most=False,
    ),
    Target(
        "throughput of ours sum, over Hugging Face sum in the same precision on random batches",
        time_ratio("step", "Hugging Face sum, random batches {precision}", SUM),
        1.8,
        at_most=False,
    ),
    Target(
        "the same, Hugging Face with the allocator setting that ours makes",
        time_ratio("step", "Hugging Face sum, random batches, freed memory kept {precision}", SUM),
        1.8,
        at_most=False,
    ),
    Target("bert-base size: step with pcgrad, over sum", time_ratio("base", OURS, SUM), 1.05, digits=3),
    Target(
        "bert-base size: step with pcgrad, over sum in one row",
        time_ratio("base", OURS, ONE_ROW),
        1.05,
        digits=3,
    ),
    Target(
        "bert-base size: throughput of ours pcgrad, over Hugging Face + textbook PCGrad in the same precision",
        time_ratio("base", "Hugging Face + textbook", OURS),
        5.0,
        at_most=False,
    ),
    Target("ours sum, % of the roofline", roofline_share(SUM), 70.0, at_most=False, digits=0),
    Target("ours pcgrad, % of the roofline", roofline_share(OURS), 70.0, at_most=False, digits=0),
    Target(
        "ours pcgrad, % of the roofline with the matrix rate of all layers in turn",
        roofline_share(OURS, "limits_in_turn"),
        70.0,
        at_most=False,
        digits=0,
    ),
    Target("our AdamW, over torch's fused", time_ratio("optimizer", "ours", "torch.optim.AdamW, fused"), 1.0),
    Target(
        "evaluation, throughput over Hugging Face's",
        time_ratio("evaluate", "Hugging Face", "ours"),
        4.0,
        at_most=False,
    ),
    Target("seconds from start to the first step, not the first time", later_starts, 5.0, digits=1),
    Target("peak memory, pcgrad less sum, MiB", extra_memory(OURS, SUM, False), None, digits=1),
    Target("the same in gradient buffers (P float32)", extra_memory(OURS, SUM, True), None),
    Target(
        "peak memory, pcgrad less sum in one row, MiB", extra_memory(OURS, ONE_ROW, False), None, digits=1
    ),
    Target("the same in gradient buffers (P float32)", extra_memory(OURS, ONE_ROW, True), None),
]


def target_row(target: Target, measured: dict) -> list[str]:
    values = target.measure(measured)
    goal = "-" if target.goal is None else f"{'at most' if target.at_most else 'at least'} {target.goal:g}"
    if values is None:
        return [target.text, "not measured", goal, "-"]
    value = float(np.median(values))
    if target.goal is None:
        verdict = "-"
    else:
        verdict = "met" if (value <= target.goal if target.at_most else value >= target.goal) else "missed"
    return [target.text, spread(values, target.digits), goal, verdict]


# --- sections: what was measured -> blocks ------------------------------------------------------------------


def skipped_blocks(found: dict) -> list:
    return [Paragraph(f"Not measured: {name}: {reason}.") for name, reason in found["skipped"].items()]


def show_step(found: dict) -> list:
    tokens, num_steps, buffer = found["tokens"], found["num_steps"], found["sizes"]["shared"] * 4 / 2**20
    rows = []
    for name, seconds in found["seconds"].items():
        rate = [tokens / value for value in seconds]
        memory = found["memory"][name]
        cells = [
            spread(seconds, 1, 1000 / num_steps),
            spread(rate, 0),
            f"{memory:.0f}",
            f"{memory / buffer:.1f}",
        ]
        rows.append([name, *cells])
    losses = ", ".join(f"{task} {loss:.4f}" for task, loss in found["losses"].items())
    padding = ", ".join(f"{order} {1 - tokens / places:.0%}" for order, places in found["places"].items())
    profile = found["profile"]
    total = sum(profile.values())
    return [
        Paragraph(
            f"{num_steps} steps of {tokens / num_steps:.0f} real word pieces. All contenders train on the same examples;"
            f" of the places in padded batches, padding takes: {padding}. Before the timing, in float32 and without"
            f" dropout, all gave the same task losses within {found['tolerance']:g} ({losses}). Batches are made before"
            " the timing, and nobody clips gradients. The two precisions are timed one after the other, the"
            " contenders of one precision in turns. Peak memory: resident, less what the process held"
            " before it built anything; a gradient buffer is P float32, P the encoder's parameters."
        ),
        TableBlock(
            [
                "contender",
                "ms a step",
                "real word pieces a second",
                "peak memory, MiB",
                "in gradient buffers",
            ],
            rows,
        ),
        *skipped_blocks(found),
        Paragraph(
            f"Where a step of ours pcgrad {found['precision']} goes (torch.profiler, which slows down small operations):"
        ),
        TableBlock(
            ["operations", "ms a step", "share"],
            [[name, f"{value * 1000:.1f}", percent(value / total)] for name, value in profile.items()],
        ),
    ]


def show_updates(found: dict) -> list:
    first = next(iter(found["seconds"]))
    ours, num_steps = found["seconds"][first], found["num_steps"]
    rows = []
    for name, seconds in found["seconds"].items():
        ratio = [a / b for a, b in zip(ours, seconds, strict=True)]
        rows.append([name, spread(seconds, 2, 1000 / num_steps), spread(ratio, 2)])
    return [TableBlock(["contender", "ms", "time of ours over it"], rows), *skipped_blocks(found)]


def show_evaluation(found: dict) -> list:
    examples = sum(found["examples"].values())
    rows = [
        [name, spread(seconds, 1), spread([examples / value for value in seconds], 0)]
        for name, seconds in found["seconds"].items()
    ]
    tasks = list(found["examples"])
    agreement = [
        [name, which, *(f"{value:.6g}" for value in values.values())]
        for name, runs in found["agreement"].items()
        for which, values in runs.items()
    ]
    return [
        TableBlock(["contender", "seconds", "examples a second"], rows),
        *skipped_blocks(found),
        Paragraph("Agreement with ours: share of equal classes, or the largest difference of a number."),
        TableBlock(["contender", "predictions", *tasks], agreement),
    ]


def show_start(found: dict) -> list:
    first, *later = found["seconds"]
    rows = [["first time", f"{first:.1f}"], ["again", spread(later, 1)]]
    return [TableBlock(["start of the command to the end of its first step", "seconds"], rows)]


def show_scaling(found: dict) -> list:
    blocks = []
    for title, part in (("tasks", found["by_tasks"]), ("word pieces a sentence", found["by_length"])):
        rows = []
        for value, measured in part.items():
            first = next(iter(measured["seconds"].values()))
            for name, seconds in measured["seconds"].items():
                ratio = [a / b for a, b in zip(seconds, first, strict=True)]
                per_step, per_token = 1000 / found["num_steps"], 1e6 / measured["tokens"]
                rows.append(
                    [
                        value,
                        name,
                        spread(seconds, 1, per_step),
                        spread(seconds, 1, per_token),
                        spread(ratio, 3),
                    ]
                )
        header = [title, "contender", "ms a step", "ms per 1000 real word pieces", "over the first"]
        blocks.append(TableBlock(header, rows))
    rows = [
        [share, str(measured["examples"]), *(f"{value:.1f}" for value in measured["seconds"])]
        for share, measured in found["by_data"].items()
    ]
    header = ["share of the training data", "rows", "seconds to the first step, first time", "again"]
    return [*blocks, TableBlock(header, rows)]


def show_roofline(found: dict) -> list:
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
    return [
        Paragraph(
            f"A step takes {found['flops'] / 1e9:.1f} billion operations in linear layers and attention products, counted"
            " on real word pieces, and the optimizer must move each parameter, gradient and moment once"
            f" ({found['memory_seconds'] * 1000:.1f} ms at {found['bandwidth'] / 1e9:.1f} GB/s, measured in place on a"
            " large tensor). The limit is the operations at the best rate below, plus that. That rate is of one product"
            " again and again, its operands in the cache. The second limit takes the rate of all linear layers of the"
            f" encoder in turn, forward and backward, each with its own operands: {in_turn} GFLOP/s."
        ),
        TableBlock(
            [
                "contender",
                "ms a step",
                "limit, ms",
                "share reached, %",
                "second limit, ms",
                "share reached, %",
            ],
            rows,
        ),
        TableBlock(["precision", "rows x inputs x outputs", "GFLOP/s"], rates),
    ]


SHOW: dict[str, tuple[str, Callable[[dict], list]]] = {
    "step": ("Training step", show_step),
    "base": ("Training step at bert-base size, random weights", show_step),
    "optimizer": ("Optimizer", show_updates),
    "surgery": ("Gradient surgery alone", show_updates),
    "evaluate": ("Evaluation", show_evaluation),
    "start": ("Start", show_start),
    "scaling": ("Scaling", show_scaling),
    "roofline": ("Roofline", show_roofline),
}


def make_page(measured: dict) -> str:
    """The page, without what is written by hand."""
    blocks = [Heading("Speed, measured", level=1), Paragraph(INTRODUCTION)]
    for section, (title, show) in SHOW.items():
        if section in measured:
            found = measured[section]
            facts = found["machine"] | {name: found[name] for name in ("torch", "precision", "pretrained")}
            facts |= {"batch size": found["batch_size"], "longest sequence": found["max_length"]}
            blocks += [
                Heading(title),
                Code(shlex.join(found["command"])),
                Paragraph(", ".join(f"{name} {value}" for name, value in facts.items())),
                *show(found),
            ]
    rows = [target_row(target, measured) for target in TARGETS]
    return markdown_page([*blocks, Heading("Targets"), TableBlock(["", "measured", "target", ""], rows)])


def write_page(path: Path, measured: dict) -> None:
    """Write the page and keep what stands below the line BY_HAND in the one that is there."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    _, _, by_hand = text.partition(BY_HAND)
    write_text(path, f"{make_page(measured)}\n{BY_HAND}{by_hand or chr(10)}")
