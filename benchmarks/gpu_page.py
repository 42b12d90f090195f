"""The page of benchmarks.gpu: targets beside what was measured, checks, times, where a step's time goes.

Times are medians over windows, with the quartiles in brackets; a window is one pass over the same steps.
"""

import shlex
import textwrap
from pathlib import Path
from statistics import median

from benchmarks.page import Target, paragraph, spread, table, target_row
from support.files import read_head, write_text

TITLE = "# One GPU, measured"
INTRODUCTION = """
Written by `python -m benchmarks.gpu` from gpu.json; whatever else is written here is lost. All contenders
train on the same real examples in the same batches, in the precision below, and before their timing gave the
same task losses in float32 without dropout. Peers find their padded batches ready on the device; ours packs
its own within its time. Times are from an idle device to an idle device, work of the host included; medians
over windows of one pass over the steps, with the quartiles in brackets, after passes in which everything was
compiled and captured. One run, one contender after the other.
"""
TRIAL = """
**A trial without a GPU**: twins in plain operations stand in for the Triton kernels, nothing is captured,
encoders and batches are tiny. Nothing on this page says anything about speed.
"""
PCGRAD, TEXTBOOK = "ours pcgrad", "Hugging Face + textbook PCGrad"
SIZES = (16, 64, 256)
MAX_MS = {"MiniLM": (2.5, 3.5, 9), "bert-base": (6, 11, 34)}  # by size


# --- targets ------------------------------------------------------------------------------------------------


def times_of(model: str, size: int, row: str = PCGRAD):
    """A `page.Measure`: milliseconds a step."""

    def measure(measured: dict) -> list[float] | None:
        found = measured.get("times", {}).get(f"{model}/{size}/{row}")
        return found and found["ms"]

    return measure


def share_of(model: str, size: int):
    """Percent of the card's matrix rate."""

    def measure(measured: dict) -> list[float] | None:
        share = measured.get("times", {}).get(f"{model}/{size}/{PCGRAD}", {}).get("share")
        return None if share is None else [100 * share]

    return measure


def ratio_of(model: str, size: int, a: str, b: str):
    """Median time of a over that of b."""

    def measure(measured: dict) -> list[float] | None:
        times = [times_of(model, size, row)(measured) for row in (a, b)]
        return None if None in times else [median(times[0]) / median(times[1])]

    return measure


def run_seconds(measured: dict) -> list[float] | None:
    """Of the whole run that the target is about."""
    found = measured.get("run", {})
    what = [found.get(name) for name in ("model", "steps", "size")]
    return [found["seconds"]] if what == ["MiniLM", 1000, 16] else None


def evaluation_seconds(measured: dict) -> list[float] | None:
    found = measured.get("evaluation", {}).get("MiniLM/ours")
    return found and found["seconds"]


def waits(measured: dict) -> list[float] | None:
    found = measured.get("waits", {}).get(f"MiniLM/{PCGRAD}")
    return None if found is None else [found]


TARGETS = [
    *(
        Target(f"{model}, {size} a task, pcgrad, ms", times_of(model, size), f"at most {limit}")
        for model, limits in MAX_MS.items()
        for size, limit in zip(SIZES, limits, strict=True)
    ),
    *(
        Target(f"share of the matrix rate, bert-base, {size} a task, %", share_of("bert-base", size), goal, 0)
        for size, goal in ((64, "at least 32"), (256, "at least 42"))
    ),
    *(
        Target(
            f"pcgrad over a sum that keeps one gradient, {model}, {size} a task",
            *(ratio_of(model, size, PCGRAD, "ours sum, one row"), "at most 1.08", 3),
        )
        for model in MAX_MS
        for size in SIZES[1:]
    ),
    *(
        Target(
            f"throughput over Hugging Face + textbook PCGrad, {model}, {size} a task",
            *(ratio_of(model, size, TEXTBOOK, PCGRAD), "at least 10", 1),
        )
        for model in MAX_MS
        for size in SIZES
    ),
    Target("MiniLM, 1,000 steps of 16 a task, from command to predictions, s", run_seconds, "at most 25", 1),
    Target("evaluation of all dev examples, MiniLM, s", evaluation_seconds, "at most 3"),
    Target("waits for the device in a step", waits, "at most 0", 1),
    Target(
        "the results table, 13 rows x 5 seeds x 3,000 steps, minutes (`results_table.py`, not this command)",
        *(lambda measured: None, "at most 15"),
    ),
]


# --- sections: all that was measured -> blocks of Markdown --------------------------------------------------


def show_facts(measured: dict) -> list[str]:
    facts = measured["facts"]
    about = facts["machine"] | facts["versions"] | {"precision": facts["precision"]}
    about |= {"smaller encoder": facts["pretrained"], "larger encoder": "bert-base size, random weights"}
    if "rate" in measured:
        about["large matrix product"] = f"{measured['rate'] / 1e12:.3g} TFLOP/s"
    command = textwrap.indent(shlex.join(facts["command"]), "    ")
    return [
        *([paragraph(TRIAL)] if facts["is_trial"] else []),
        command,
        ", ".join(f"{name} {value}" for name, value in about.items()) + f". It took {facts['seconds']} s.",
    ]


def show_targets(measured: dict) -> list[str]:
    rows = [target_row(target, measured) for target in TARGETS]
    return ["## Targets", table(["", "measured", "target", ""], rows)]


def show_checks(measured: dict) -> list[str]:
    cases: dict[str, dict[str, dict]] = {}
    for key, found in measured.get("checks", {}).items():
        case, _, name = key.partition("/")
        cases.setdefault(case, {})[name] = found
    if not cases:
        return []
    compared, *others = measured["facts"]["checks"]
    limits = measured["facts"]["tolerances"]
    rows = []
    for case, checks in cases.items():
        found = checks.get(compared, {}).get("errors", {})
        allowed = checks.get(compared, {}).get("tolerances", {})
        errors = [show_error(found[name], allowed[name]) if found else "-" for name in limits["fp32"]]
        rows.append([case, *errors, *(show_verdict(checks.get(name)) for name in (compared, *others))])
    allowed = "; ".join(
        f"{precision} {', '.join(f'{name} {limit:g}' for name, limit in of_precision.items())}"
        for precision, of_precision in limits.items()
    )
    introduction = f"""
        {measured["facts"]["check_steps"]} steps each. A case is encoder, head of pairs, gradient method,
        precision. First the largest errors of captured steps against plain ones in float32 on the CPU,
        without dropout: relative to the norm of what is right; of the updates of encoder and heads, relative
        to what all steps have changed. Allowed: {allowed}. The other checks are of equal bits; behind each
        the number of graphs that were captured."""
    header = ["case", *limits["fp32"], compared, *others]
    return ["## Checks", paragraph(introduction), table(header, rows)]


def show_error(error: float, limit: float) -> str:
    return f"{error:.1e}" if error <= limit else f"**{error:.1e}**"


def show_verdict(found: dict | None) -> str:
    if found is None:
        return "-"
    return f"{'ok' if found['ok'] else '**not ok**'} ({found.get('note', found['graphs'])})"


def show_times(measured: dict) -> list[str]:
    blocks, groups = [], {}
    for key, found in measured.get("times", {}).items():
        model, size, row = key.split("/")
        groups.setdefault((model, int(size)), {})[row] = found
    for (model, size), rows in sorted(groups.items(), key=lambda item: (item[0][0] == "bert-base", item[0])):
        ours = median(rows[PCGRAD]["ms"]) if PCGRAD in rows else None
        lines = []
        for row, found in rows.items():
            middle = median(found["ms"])
            captured, shapes = found.get("graphs", (0, 0))
            lines.append(
                [
                    row + (f" ({captured} of {shapes} graphs captured)" if captured < shapes else ""),
                    spread(found["ms"], 2),
                    f"{middle / ours:.2f}" if ours else "-",
                    f"{1000 * found['tokens'] / middle:,.0f}",
                    f"{found['share']:.1%}" if "share" in found else "-",
                    f"{found['memory']:,} ({found['reserved']:,})" if "memory" in found else "-",
                ]
            )
        tokens = next(iter(rows.values()))["tokens"]
        blocks.append(f"{model}, {size} examples a task, {tokens:.0f} word pieces a step:")
        header = ["contender", "ms a step", "times ours pcgrad", "word pieces a second"]
        blocks.append(table([*header, "share of the matrix rate", "peak memory (reserved), MiB"], lines))
    note = """
        The share counts 6 operations for each weight of a linear layer and each real word piece, against the
        rate of one large product. One row: a sum that keeps no gradients by task. autogram: its weights reach
        the heads, too."""
    return ["## Times", paragraph(note), *blocks] if blocks else []


def show_inside(measured: dict) -> list[str]:
    blocks = []
    for key, waits_of_row in measured.get("waits", {}).items():
        model, _, row = key.partition("/")
        blocks.append(f"{model}, {row}: {waits_of_row:.1f} waits for the device in a step.")
    for key, found in measured.get("inside", {}).items():
        model, _, row = key.partition("/")
        total = sum(found["kinds"].values())
        blocks.append(
            f"{model}, {found['size']} examples a task, {row}: {found['kernels']:.0f} kernels,"
            f" {total:.2f} ms of work; a step under the profiler took {found['profiled_ms']:.2f} ms."
        )
        lines = [
            [kind, f"{ms:.3f}", f"{ms / max(total, 1e-9):.0%}"]
            for kind, ms in sorted(found["kinds"].items(), key=lambda item: -item[1])
        ]
        blocks.append(table(["kind of kernel", "ms a step", "share"], lines))
    return ["## Inside a step", *blocks] if blocks else []


def show_rest(measured: dict) -> list[str]:
    blocks = []
    evaluation = measured.get("evaluation", {})
    if evaluation:
        rows = [
            [key.replace("/", ", "), str(found["examples"]), *(f"{value:.2f}" for value in found["seconds"])]
            for key, found in evaluation.items()
        ]
        header = ["contender", "dev examples", "seconds", "again"]
        blocks += ["## Evaluation, examples tokenized before", table(header, rows)]
    if "run" in measured:
        found = measured["run"]
        said = "; ".join(found["notes"]) or "nothing of captured steps"
        text = f"""{found["model"]}, {found["steps"]} steps of {found["size"]} examples a task, four
            evaluations, scores and predictions: {found["seconds"]:.1f} s. It said: {said}."""
        blocks += ["## A whole run", paragraph(text)]
    missing = [f"- {name}: {reason}" for name, reason in measured["failed"].items()]
    missing += [f"- {title}: no time was left" for title in measured["left_out"]]
    return [*blocks, "## Not measured", "\n".join(missing) or "Nothing: all was done."]


SECTIONS = (show_facts, show_targets, show_checks, show_times, show_inside, show_rest)


def make_page(measured: dict) -> str:
    blocks = [TITLE, paragraph(INTRODUCTION)]
    for show in SECTIONS:
        blocks += show(measured)
    return "\n\n".join(blocks) + "\n"


def is_page(path: Path) -> bool:
    return read_head(path).startswith(TITLE.encode())


def write_page(path: Path, measured: dict) -> None:
    write_text(path, make_page(measured))
