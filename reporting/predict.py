"""Ask a trained model about sentences: from the command line, from a file or a pipe, or at a prompt.

    python -m reporting.predict runs/first --task sst "a gripping film"
    python -m reporting.predict runs/first --task sts --file pairs.tsv --format tsv

The run's own files are only read. From Python: `training.predictor`.
"""

if __name__ == "__main__":
    from support.interrupts import end_quietly

    end_quietly()

import csv
import io
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from config import TASKS, TaskSpec
from datasets import clean_text, count_of
from reporting.sentences import Example, in_chunks, read_examples
from support.bars import Bar, has_terminal
from support.command_line import OneLineParser, run_script
from support.errors import UserError, one_line
from training.predictor import Prediction, Predictor
from training.run_parser import PRECISION_NAMES

SHOWN_CHARACTERS = 60  # of a sentence in a table
NUM_NAMED = 5  # lines in a warning

# --- formats: the lines before the first prediction, and the line of one ------------------------------------


def values_of(prediction: Prediction) -> list[str]:
    """A prediction as the cells of a row, those of `value_columns`."""
    if prediction.label is None:
        return [f"{prediction.value:.6f}"]
    return [prediction.label, *(f"{p:.6f}" for p in prediction.probabilities.values())]


def value_columns(spec: TaskSpec) -> list[str]:
    return ["prediction", *spec.class_names] if spec.class_names else [spec.label_column]


def tsv_line(cells: list[str]) -> str:
    """One row as this project reads tables: a cell with a quotation mark at its beginning is quoted."""
    text = io.StringIO()
    csv.writer(text, delimiter="\t", lineterminator="\n").writerow(cells)
    return text.getvalue()


def tsv_head(spec: TaskSpec) -> str:
    return tsv_line([*spec.text_columns, *value_columns(spec)])


def tsv_row(spec: TaskSpec, texts: tuple[str, ...], prediction: Prediction) -> str:
    return tsv_line([*texts, *values_of(prediction)])


def jsonl_row(spec: TaskSpec, texts: tuple[str, ...], prediction: Prediction) -> str:
    found = dict(zip(spec.text_columns, texts, strict=True))
    if prediction.label is None:
        found[spec.label_column] = round(prediction.value, 6)
    else:
        found["prediction"] = prediction.label
        found["probabilities"] = {name: round(p, 6) for name, p in prediction.probabilities.items()}
    return json.dumps(found, ensure_ascii=False) + "\n"


def table_line(spec: TaskSpec, cells: list[str], text: str) -> str:
    """Cells under the names of `table_head`, and the text last, since its length is anybody's guess."""
    first, *others = table_columns(spec)
    padded = [cells[0].ljust(max(map(len, (first, *spec.class_names))))]
    padded += [cell.rjust(max(5, len(name))) for name, cell in zip(others, cells[1:], strict=True)]
    return "  ".join([*padded, text]) + "\n"


def table_columns(spec: TaskSpec) -> list[str]:
    if spec.class_names:
        return value_columns(spec)
    low, high = spec.label_range
    return [f"{spec.label_column} ({low:g} to {high:g})"]


def table_head(spec: TaskSpec) -> str:
    return table_line(spec, table_columns(spec), " | ".join(spec.text_columns))


def table_row(spec: TaskSpec, texts: tuple[str, ...], prediction: Prediction) -> str:
    if prediction.label is None:
        cells = [f"{prediction.value:.3f}"]
    else:
        cells = [prediction.label, *(f"{p:.3f}" for p in prediction.probabilities.values())]
    return table_line(spec, cells, " | ".join(one_line(text, SHOWN_CHARACTERS) for text in texts))


@dataclass(frozen=True)
class OutputFormat:
    head: Callable[[TaskSpec], str]
    row: Callable[[TaskSpec, tuple[str, ...], Prediction], str]


OUTPUT_FORMATS = {
    "table": OutputFormat(table_head, table_row),
    "tsv": OutputFormat(tsv_head, tsv_row),
    "jsonl": OutputFormat(lambda spec: "", jsonl_row),
}

# --- where sentences come from ------------------------------------------------------------------------------


def given_examples(sentences: list[str], task: str) -> list[Example]:
    """The examples that stand on the command line; for a task of pairs every two sentences are one."""
    size = len(TASKS[task].text_columns)
    if len(sentences) % size:
        raise UserError(
            f"--task {task}: {count_of(len(sentences), 'sentence')} given; it compares two sentences, so"
            " expected an even number"
        )
    texts = [tuple(map(clean_text, sentences[n : n + size])) for n in range(0, len(sentences), size)]
    if not all(map(all, texts)):
        raise UserError("a sentence on the command line is empty; expected some text")
    return [(0, text) for text in texts]


def ask(task: str) -> Iterator[list[Example]]:
    """Ask a person for one example after the other, until they end the input (Ctrl-D)."""
    with suppress(ImportError):  # not everywhere; it lets a line be edited
        import readline  # noqa: F401
    print(f"{TASKS[task].title}: type a text and press Enter; Ctrl-D ends.", file=sys.stderr, flush=True)
    try:
        while True:
            texts = [clean_text(input(f"{column}> ")) for column in TASKS[task].text_columns]
            if all(texts):
                yield [(0, tuple(texts))]
    except EOFError:
        pass
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: not {error.encoding} text") from None
    print(file=sys.stderr)  # the shell's prompt begins on a line of its own


def open_stream(place: str, stack: ExitStack):
    """The bytes of a file or, for `-`, of standard input; and its name for messages."""
    if place == "-":
        return sys.stdin.buffer, "standard input"
    try:
        if Path(place).is_dir():
            raise UserError(f"--file {place}: is a folder; expected a file, or - for standard input")
        return stack.enter_context(open(place, "rb")), place
    except OSError as error:
        raise UserError(f"--file {place}: cannot be read ({error.strerror})") from None


# --- the command --------------------------------------------------------------------------------------------


def make_parser() -> OneLineParser:
    parser = OneLineParser(
        prog="reporting.predict",
        description="Ask a run's best checkpoint about sentences; nothing in the run's folder is changed.",
        epilog="A file holds a sentence in each line; or two with a tab between them; or a table, separated"
        " by tabs or commas, with the task's text columns in its header. Without sentences or --file,"
        " standard input is read; on a terminal, a prompt asks for them.",
        allow_abbrev=False,
    )
    parser.add_argument("run", help="run folder, or one of its checkpoints")
    parser.add_argument("sentences", nargs="*", help="for a task of pairs, every two of them are one pair")
    parser.add_argument("--task", help="a task of the run; may be left out if there is only one")
    parser.add_argument("--file", metavar="FILE", help="file with sentences; - for standard input")
    parser.add_argument(
        "--columns", metavar="NAME[,NAME]", help="text columns, if the task's have other names"
    )
    parser.add_argument(
        "--format", choices=OUTPUT_FORMATS, default="table", help="form of the output (default: table)"
    )
    parser.add_argument(
        "--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ..."
    )
    text = "number format of matrix products; auto: bf16 where the processor is fast at it (default: auto)"
    parser.add_argument("--precision", choices=PRECISION_NAMES, default="auto", help=text)
    return parser


def choose_task(predictor: Predictor, task: str | None) -> str:
    if task is None and len(predictor.tasks) > 1:
        raise UserError(f"--task is missing; the run has {', '.join(predictor.tasks)}")
    task = task or predictor.tasks[0]
    if task not in predictor.tasks:
        raise UserError(f"--task {task}: not one of this run; it has {', '.join(predictor.tasks)}")
    return task


def find_chunks(args: Namespace, task: str, stack: ExitStack) -> Iterator[list[Example]]:
    """The examples to predict, wherever they come from, some at a time."""
    spec = TASKS[task]
    if args.sentences:
        return iter([given_examples(args.sentences, task)])
    if args.file is None and sys.stdin.isatty() and sys.stdout.isatty():
        return ask(task)
    columns = tuple(name.strip() for name in args.columns.split(",")) if args.columns else None
    if columns and len(columns) != len(spec.text_columns):
        raise UserError(f"--columns {args.columns}: expected {count_of(len(spec.text_columns), 'name')}")
    stream, name = open_stream(args.file or "-", stack)
    return in_chunks(read_examples(stream, name, spec, columns))


def count_lines(place: str | None) -> int | None:
    """The lines of a file, for its bar; None if nobody sees that, or it is no file."""
    if place is None or not has_terminal() or not Path(place).is_file():
        return None
    with open(place, "rb") as file:
        return sum(block.count(b"\n") for block in iter(partial(file.read, 2**20), b""))


def watch(chunks: Iterator[list[Example]], place: str | None) -> Iterator[list[Example]]:
    """The same chunks, with a bar of the lines done; on a terminal, predictions show that themselves."""
    if sys.stdout.isatty():
        yield from chunks
        return
    with Bar(count_lines(place), " lines", "predicting") as bar:
        for chunk in chunks:
            yield chunk
            bar.update(chunk[-1][0] - bar.n)


def predict(argv: list[str] | None) -> None:
    parser = make_parser()
    args = parser.parse_intermixed_args(argv)
    for flag in ("file", "columns"):
        if args.sentences and getattr(args, flag):
            parser.error(
                f"--{flag} and sentences on the command line contradict each other; give one of them"
            )
    with redirect_stdout(sys.stderr):  # a warning is no prediction
        predictor = Predictor.from_run(args.run, args.device, args.precision)
    task = choose_task(predictor, args.task)
    spec, form = TASKS[task], OUTPUT_FORMATS[args.format]
    num_empty, named = 0, []
    with ExitStack() as stack:
        for number, chunk in enumerate(watch(find_chunks(args, task, stack), args.file)):
            if number == 0:
                sys.stdout.write(form.head(spec))
            texts = [sentences for _, sentences in chunk]
            predictions = predictor.predict(task, [text if spec.is_pair else text[0] for text in texts])
            sys.stdout.writelines(map(partial(form.row, spec), texts, predictions))
            sys.stdout.flush()
            empty = [line for line, sentences in chunk if not all(sentences)]
            num_empty, named = num_empty + len(empty), (named + empty)[:NUM_NAMED]
    if num_empty:
        print(
            f"warning: {count_of(num_empty, 'example')} with an empty sentence, predicted like any other"
            f" (first in line {', '.join(map(str, named))})",
            file=sys.stderr,
        )


def main(argv: list[str] | None = None) -> int:
    return run_script("reporting.predict", partial(predict, argv))


if __name__ == "__main__":
    sys.exit(main())
