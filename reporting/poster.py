"""The poster's results table as data: each row's recipe and numbers, each claim as a difference of rows.

"Fine-tuning minBERT for Various Downstream Tasks", Stanford CS224N. Its scores are accuracy for sentiment
(SST-5) and paraphrase (Quora) and Pearson's r for similarity (SemEval STS), on dev; its overall is their
plain mean.
"""

from dataclasses import dataclass, replace

# The names of the scores, a task's or an overall, in tables and figures.
SCORES = {
    "mean": "overall",
    "mean_2024": "overall 2024",
    "sst": "sentiment",
    "para": "paraphrase",
    "sts": "similarity",
}


@dataclass(frozen=True)
class TableRow:
    """A recipe of the table.

    Args:
        flags: for multitask_classifier.py, on top of what all rows share.
        poster: the poster's dev scores for sentiment, paraphrase, similarity; None where it has no such row.
        versus: the row that this one is a change of; the table shows the difference.
        group: "poster", "future" (the poster's future steps), "control", a key of REGIMES, or "own".
        pretrain: first pre-train the encoder further on the tasks' text.
    """

    title: str
    flags: str
    poster: tuple[float | None, float | None, float | None] | None = None
    versus: str | None = None
    group: str = "poster"
    pretrain: bool = False


CONCAT, COSINE, DIFF = (f"--para_head {head} --sts_head {head}" for head in ("concat", "cosine", "diff"))
SURGERY = f"{DIFF} --grad_method pcgrad"
MORE_DATA = "--extra_data sick,mrpc,paws_wiki,rotten_tomatoes"
SIMILAR_DATA = "--extra_data sick,paws_qqp,sst_trees"  # from the very sources of STS, Quora and SST
UNTUNED = "--lr 1e-5 --head_lr 1e-5 --schedule constant --warmup_ratio 0 --weight_decay 0 --clip_norm 0"

ROWS = {
    "minbert": TableRow("minBERT (sentiment alone)", "--tasks sst", (0.528, None, None), versus="baseline"),
    "baseline": TableRow("Baseline", f"{CONCAT} --grad_method sum", (0.479, 0.781, 0.274)),
    "cosine": TableRow("Cosine similarity", f"{COSINE} --grad_method sum", (0.503, 0.722, 0.412), "baseline"),
    "diff": TableRow("Diff", f"{DIFF} --grad_method sum", (0.520, 0.795, 0.529), "baseline"),
    "diff_2_layers": TableRow(
        "Diff + 2 dense layers", f"{DIFF} --grad_method sum --head_layers 2", (0.497, 0.787, 0.531), "diff"
    ),
    "diff_extra": TableRow(
        "Diff + additional data", f"{DIFF} --grad_method sum {MORE_DATA}", (0.462, 0.782, 0.502), "diff"
    ),
    "surgery_diff": TableRow("Gradient surgery + diff", SURGERY, (0.513, 0.776, 0.655), "diff"),
    "surgery_diff_extra": TableRow(
        "Gradient surgery + diff + additional data",
        f"{SURGERY} {MORE_DATA}",
        (0.498, 0.777, 0.639),
        "surgery_diff",
    ),
    "surgery_sts_only": TableRow(
        "Surgery on similarity only", f"{SURGERY} --surgery_tasks sts", None, "surgery_diff", "future"
    ),
    "sts_weighted": TableRow(
        "Similarity weighted 3 times", f"{SURGERY} --task_weights sts=3", None, "surgery_diff", "future"
    ),
    "similar_data": TableRow(
        "More similar data", f"{SURGERY} {SIMILAR_DATA}", None, "surgery_diff", "future"
    ),
    "further_pretraining": TableRow(
        "Further pre-training on the task text", SURGERY, None, "surgery_diff", "future", pretrain=True
    ),
    "baseline_untuned": TableRow(
        "Baseline, the course's learning rate, no schedule",
        f"{CONCAT} --grad_method sum {UNTUNED}",
        None,
        "baseline",
        "control",
    ),
}


@dataclass(frozen=True)
class Regime:
    """Other circumstances for the rows that decide whether surgery and heads help.

    Args:
        title: follows a row's own.
        flags: before those of a row; {lr} stands for the course's learning rate at the encoder's width.
    """

    title: str
    flags: str


# How a plain course submission trains: the pooler's output, one learning rate, no schedule, no clipping.
COURSE = "--pooling pooler --lr {lr} --head_lr {lr} --schedule constant --warmup_ratio 0 --weight_decay 0"
COURSE += " --clip_norm 0"
REGIMES = {
    "course": Regime("as in the course", COURSE),
    # So that similarity, which MiniLM has learned, is not there to begin with.
    "course_redrawn": Regime("as in the course, last 3 layers drawn anew", f"{COURSE} --redraw_layers 3"),
}
REGIME_ROWS = ("baseline", "cosine", "diff", "surgery_diff")
TUNED = "tuned"  # the name of the table's own circumstances


def regime_rows(lr: str) -> dict[str, TableRow]:
    """The rows of all regimes, named as in `course.diff`."""
    return {
        f"{name}.{row}": replace(
            ROWS[row],
            title=f"{ROWS[row].title}, {regime.title}",
            flags=f"{regime.flags.format(lr=lr)} {ROWS[row].flags}",
            versus=ROWS[row].versus and f"{name}.{ROWS[row].versus}",
            group=name,
        )
        for name, regime in REGIMES.items()
        for row in REGIME_ROWS
    }


POSTER_TEST = (0.510, 0.775, 0.634)  # its row "Test set": gradient surgery + diff


@dataclass(frozen=True)
class Claim:
    """A claim of the poster as a statement about a sum of differences between rows.

    Args:
        terms: (factor, row, score); a score is a task or an overall.
        direction: 1 if the sum should be above `margin`, -1 if below.
        claimed: the sum on the poster's own numbers; None: computed from its rows.
    """

    number: str
    text: str
    terms: tuple[tuple[float, str, str], ...]
    direction: int
    margin: float = 0.0
    claimed: float | None = None

    def in_regime(self, regime: str) -> "Claim | None":
        """The same claim about the rows of a regime; None if it is about others, too."""
        if regime == TUNED:
            return self
        if not all(row in REGIME_ROWS for _, row, _ in self.terms):
            return None
        return replace(self, terms=tuple((n, f"{regime}.{row}", score) for n, row, score in self.terms))


def difference(a: str, b: str, *scores: str) -> tuple[tuple[float, str, str], ...]:
    """Row a minus row b, in the mean of some scores."""
    return tuple((sign / len(scores), row, score) for sign, row in ((1, a), (-1, b)) for score in scores)


CLAIMS = (
    Claim("1", "diff raises the overall", difference("diff", "baseline", "mean"), 1),
    Claim("2a", "surgery raises similarity", difference("surgery_diff", "diff", "sts"), 1),
    Claim(
        "2b",
        "surgery costs something on the other two",
        difference("surgery_diff", "diff", "sst", "para"),
        -1,
    ),
    Claim("3a", "cosine fails: overall below diff", difference("cosine", "diff", "mean"), -1),
    Claim("3b", "additional data fail: overall below diff", difference("diff_extra", "diff", "mean"), -1),
    Claim(
        "3c",
        "additional data fail with surgery too",
        difference("surgery_diff_extra", "surgery_diff", "mean"),
        -1,
    ),
    Claim(
        "4",
        "the baseline is good at sentiment and paraphrase: less than 5 points below diff",
        difference("baseline", "diff", "sst", "para"),
        1,
        margin=-0.05,
    ),
    Claim(
        "5a",
        "tuning hyper-parameters gives similarity less than 5 points",
        difference("baseline", "baseline_untuned", "sts"),
        -1,
        margin=0.05,
        claimed=0.04,
    ),
    Claim(
        "5b",
        "tuning gives similarity less than diff and surgery do",
        (
            *difference("baseline", "baseline_untuned", "sts"),
            *difference("baseline", "surgery_diff", "sts"),
        ),
        -1,
        # 0.04 of the way from 0.274 to 0.655, against all the rest of it
        claimed=0.04 - (0.655 - 0.274 - 0.04),
    ),
    Claim(
        "6", "two dense layers do worse than one: overall", difference("diff_2_layers", "diff", "mean"), -1
    ),
)
