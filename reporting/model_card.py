"""The README.md of an exported model: what it is, how to use it, scores, data, hashes, limits, licence.

It begins with the front matter that the Hugging Face hub reads
(https://huggingface.co/docs/hub/model-cards).
"""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from base_bert import weights_digest
from evaluation import TASK_KINDS
from reporting.export_formats import FORMATS, TaskModel
from reporting.pages import Table, command_line, render_markdown
from reporting.read_run import read_scores
from reporting.report import list_values, read_dev
from reporting.significance import resampled_means, to_interval
from support.errors import UserError
from training.checkpoint import load_state
from training.resolve import data_settings, output_settings

# --pretrained -> the encoder's name on the hub and its licence there.
KNOWN_ENCODERS = {
    "minilm": ("sentence-transformers/all-MiniLM-L6-v2", "apache-2.0"),
    "bert-base-uncased": ("google-bert/bert-base-uncased", "apache-2.0"),
    "google-bert/bert-base-uncased": ("google-bert/bert-base-uncased", "apache-2.0"),
}


@dataclass(frozen=True)
class Source:
    """Where an exported model comes from: a run's flags, its `args.json`, its best checkpoint."""

    run_dir: Path
    args: Namespace
    stored: dict
    checkpoint: Path

    @property
    def encoder(self) -> tuple[str | None, str]:
        """The encoder's name on the hub, None if there is none, and its licence."""
        name, at, _ = self.args.pretrained.partition("@")
        return KNOWN_ENCODERS.get(name, (name if at else None, "unknown"))

    def scores(self, task: str) -> tuple[dict[str, float], str, bool]:
        """A task's dev scores, where they are from, and whether they are those of the whole dev split."""
        state = load_state(self.checkpoint)
        try:
            found = read_scores(self.run_dir)
            if found["step"] == state["step"] and task in found["dev"]["tasks"]:
                return found["dev"]["tasks"][task], f"On dev, step {found['step']}.", True
        except UserError:  # not finished, or scores of another checkpoint
            pass
        limit = self.args.eval_max_examples
        part = f", at most {limit} examples" if limit else ""
        text = f"On dev, step {state['step']}, as evaluated during training{part}."
        return state["dev"]["tasks"][task], text, False


def scores_table(source: Source, chosen: TaskModel) -> tuple[str, Table, int | None]:
    """A sentence, the task's scores with the 95 % interval of the main one, and the number of examples."""
    kind, count = TASK_KINDS[chosen.spec.kind], None
    scores, text, whole = source.scores(chosen.task)
    intervals = {}
    result = None
    if whole:
        files = data_settings(source.args).files, output_settings(source.args).prediction_files
        result = read_dev(chosen.task, *(each[chosen.task, "dev"] for each in files), scores)
    if result is not None and result.predictions is not None:
        labels = result.rows.labels
        count = len(labels)
        resamples = resampled_means(
            {chosen.task: result.predictions[None]}, {chosen.task: labels}, {chosen.task: chosen.spec}
        )
        interval = to_interval(resamples[chosen.task])
        intervals[kind.main_score] = f"{interval.low:.4f} to {interval.high:.4f}"
        text += (
            f" {count} examples; the interval is a bootstrap over them and says nothing about other seeds."
            f" {kind.baseline_name.capitalize()}: {kind.baseline(labels):.4f}."
        )
    else:
        text += " The predictions are not there or not complete, so there is no interval."
    if source.args.precision != "fp32":
        text += (
            f" Computed in {source.args.precision}; this export is float32, and may differ in a few examples."
        )
    rows = [(name, f"{value:.4f}", intervals.get(name, "")) for name, value in scores.items()]
    return text, Table(("score", "dev", "95 % interval"), rows), count


def front_matter(source: Source, chosen: TaskModel, format_name: str, title: str) -> str:
    from huggingface_hub import EvalResult, ModelCardData  # imported late: slow

    encoder, licence = source.encoder
    scores, _, _ = source.scores(chosen.task)
    task_type = "text-classification"
    if chosen.is_two_vector and format_name == "sentence-transformers":
        task_type = "sentence-similarity"
    results = [
        EvalResult(
            task_type=task_type,
            dataset_type=chosen.task,
            dataset_name=chosen.spec.title,
            dataset_split="dev",
            metric_type=name,
            metric_value=round(value, 4),
        )
        for name, value in scores.items()
    ]
    data = ModelCardData(
        language="en",
        license=licence,
        library_name=FORMATS[format_name].library,
        pipeline_tag=task_type,
        base_model=encoder,
        tags=["bert", "multitask", chosen.task],
        model_name=title,
        eval_results=results,
    )
    return data.to_yaml()


def facts_table(source: Source, chosen: TaskModel) -> Table:
    """What the weights depend on, by content."""
    args, stored = source.args, source.stored
    code = stored.get("git") or {}
    files = {Path(path).name: digest for path, digest in (stored.get("data_files") or {}).items()}
    encoder = source.encoder[0] or Path(args.pretrained).name  # where a folder lies is nobody's business
    extra = ", ".join(args.extra_data)
    facts = {
        "tasks trained together": ", ".join(args.tasks),
        "gradients": args.grad_method,
        "seed": str(args.seed),
        "encoder": f"{encoder}, sha256 {stored.get('encoder_sha256', 'unknown')}",
        "checkpoint": f"sha256 {weights_digest(source.checkpoint)}",
        "code": f"commit {code.get('commit', 'unknown')}"
        + (f", with changes in {len(code['changed'])} files" if code.get("changed") else ""),
        "versions": list_values(stored["versions"]),
        **{f"data: {name}": f"sha256 {digest}" for name, digest in files.items()},
        "additional data": extra,
    }
    return Table(("made of", ""), [(name, fact) for name, fact in facts.items() if fact])


def wants_table(chosen: TaskModel) -> Table:
    """What goes in and what comes out."""
    spec = chosen.spec
    rows = [
        ("input", "two sentences" if spec.is_pair else "one sentence"),
        ("output", chosen.output.columns),
        ("classes" if TASK_KINDS[spec.kind].is_discrete else "value", ", ".join(chosen.labels)),
        ("scale of the labels", f"{spec.label_range[0]:g} to {spec.label_range[1]:g}"),
        ("pooling, head", f"{chosen.model.pooling}, {chosen.head_name} ({chosen.num_layers} dense)"),
        ("longest input", f"{chosen.max_length} word pieces; what is longer is cut"),
    ]
    return Table(("what", ""), rows)


def make_card(source: Source, chosen: TaskModel, format_name: str) -> str:
    """The text of the README.md that comes with an export."""
    form = FORMATS[format_name]
    title = f"{chosen.spec.title}, one task of a multitask BERT"
    text, table, _ = scores_table(source, chosen)
    encoder, licence = source.encoder
    limits = [
        *form.limits(chosen),
        "English sentences like those of its training data; on other text nothing was measured.",
        "Scores are of one run, chosen by its own dev scores.",
    ]
    if source.args.pretrained == "minilm":
        limits.append(
            "all-MiniLM-L6-v2 saw Quora and NLI pairs in its own training: scores of pair tasks cannot be"
            " compared with those of a plain BERT, and the CS224N class does not allow it."
        )
    known = f"The encoder, {encoder}, is under {licence}." if encoder and licence != "unknown" else ""
    return render_markdown(
        "model_card.md.jinja",
        front_matter=Markup(front_matter(source, chosen, format_name, title)),
        title=title,
        about=f"A BERT encoder with the head of one task, trained on {len(source.args.tasks)} tasks at once"
        f" ({', '.join(source.args.tasks)}) and exported for {form.library}.",
        wants=wants_table(chosen),
        use=Markup("\n".join(["```python", *form.use(chosen), "print(scores)", "```"])),
        scores_text=text,
        scores=table,
        commands="\n".join(map(command_line, filter(None, source.stored["commands"]))),
        facts=facts_table(source, chosen),
        limits=limits,
        licence=known
        + (" The training data have terms of their own, which this card does not know." if known else "")
        + ("" if known else "Unknown: it depends on the encoder's and on the training data's."),
    )
