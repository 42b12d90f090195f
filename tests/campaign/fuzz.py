"""Broken input for everything that reads: files of each type, spoilt in many ways, and command lines.

A case is drawn from the seed and its number alone. Most cases call a reading function: it has to return, or
to raise the error that becomes one line for the user. The others are whole runs in a forked child: exit code
0, or 2 with one line, and what was whole in the run folder stays whole.
"""

import contextlib
import io
import json
import random
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import multitask_classifier
import prepare_submit
from base_bert import read_tensors
from config import TASKS
from datasets import read_rows, tokenize
from evaluation import check_predictions, read_predictions
from reporting import report
from reporting.table_statistics import DevData, read_finished_run
from support.errors import UserError
from support.files import ROOT
from tests.campaign.forks import PNG_END, Strike, comparable, find_differences, find_problems, run_forked
from tests.tiny import SAMPLE, any_text
from tokenizer import BertTokenizer
from training import checkpoint, download, flags, resolve, token_cache
from training.checkpoint import SUMS_FILE
from training.sources import EXTRA_SOURCES, add_sources

HANG_SECONDS = 30  # for one case, on a busy machine; then it counts as hanging
MAX_ROUNDS = 3  # of spoiling the same file

NASTY_TEXT = (
    *("\0", "\ufeff", "\u202e", "\x1b[31m", "\u2028", "\r", "\t\t\t", "\n\n", '"', "'", "\\", "", " ", "٣"),
    *("NaN", "-Infinity", "1e400", "-1", "0", "1e-320", str(2**31), str(2**63), "0x1F", "1_000"),
    *("null", "true", "[]", "{}", "b'", "b'\\xff'"),
    *("9" * 5000, '"\\ud800"', "[" * 100_000, '{"a":' * 100_000, "(" * 100_000, "x" * 10_000_000),
    *("é" * 70_000, "../..", "%s%n", "a,b;c=d", "sst=nan", "=" * 1000),
)
NASTY_BYTES = (
    *(text.encode() for text in NASTY_TEXT),
    *(b"\xff\xfe", b"\xed\xa0\x80", b"\x80", b"\xf4\x90\x80\x80"),
)
NASTY_JSON = (
    *(None, True, False, 0, -1, 1.5, 2**31, 2**63, 10**30, 1e308, float("inf"), float("nan"), -0.0),
    *("", "\0", "\ud800", "x" * 10_000, "../..", [], {}, [[]], [None], {"": None}, [0] * 1000),
)
# Whole runs take no random values of these flags: they write elsewhere, take long, or need a network.
NOT_IN_RUNS = {"help", "output_dir", "cache_dir", "pretrained", "compile", "epochs", "max_steps"}
NOT_IN_RUNS |= {"grad_accum", "overwrite"}


class Hung(BaseException):
    """Not an Exception, so that no reader takes it for one of a file's."""


# --- made-up input ------------------------------------------------------------------------------------------


def any_value(rng: random.Random, depth: int = 0):
    """A JSON value."""
    kind = rng.randrange(8 if depth < 3 else 6)
    if kind == 6:
        return [any_value(rng, depth + 1) for _ in range(rng.randrange(5))]
    if kind == 7:
        return {any_text(rng): any_value(rng, depth + 1) for _ in range(rng.randrange(5))}
    number = rng.choice((1, -1)) * rng.randrange(10 ** rng.randrange(1, 20))
    return (None, rng.random() < 0.5, number, number * 10.0 ** rng.randint(-30, 30), any_text(rng), "")[kind]


# --- ways to spoil bytes: (content, rng) -> content ---------------------------------------------------------


def flip(content: bytes, rng: random.Random) -> bytes:
    spoilt = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8, 64)) if content else 0):
        spoilt[rng.randrange(len(spoilt))] ^= 1 << rng.randrange(8)
    return bytes(spoilt)


def truncate(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def splice(content: bytes, rng: random.Random) -> bytes:
    """Put something else in the place of a piece, which may be empty."""
    start = rng.randrange(len(content) + 1)
    stop = min(len(content), start + rng.choice((0, 1, 2, 8, 64, 1024)))
    piece = content[start:stop]
    others = (rng.choice(NASTY_BYTES), rng.choice(NASTY_BYTES), rng.randbytes(rng.randrange(80)))
    other = rng.choice((b"", bytes(len(piece)), piece * 2, piece * 51, *others))
    return content[:start] + other + content[stop:]


def replace_all(content: bytes, rng: random.Random) -> bytes:
    return rng.choice((b"", rng.randbytes(rng.randrange(80)), any_text(rng).encode("utf-8", "replace")))


def shuffle_lines(content: bytes, rng: random.Random) -> bytes:
    lines = content.splitlines(keepends=True)
    rng.shuffle(lines)
    return b"".join(lines)


def spoil_cell(content: bytes, rng: random.Random) -> bytes:
    """Replace, drop or double one field of a table."""
    lines, separator = content.split(b"\n"), rng.choice((b"\t", b"\t", b","))
    number = rng.randrange(len(lines))
    cells = lines[number].split(separator)
    at = rng.randrange(len(cells))
    text = any_text(rng).encode("utf-8", "replace")
    other = rng.choice(lines[rng.randrange(len(lines))].split(separator))
    cells[at : at + 1] = rng.choice(([rng.choice(NASTY_BYTES)], [text], [other], [], [cells[at]] * 2))
    lines[number] = separator.join(cells)
    return b"\n".join(lines)


def spoil_value(value, rng: random.Random):
    """A copy of a JSON value with something in it replaced, removed or added."""
    if isinstance(value, dict | list) and value and rng.random() < 0.85:
        copy = value.copy()
        key = rng.choice(list(copy)) if isinstance(copy, dict) else rng.randrange(len(copy))
        if rng.random() < 0.15:
            del copy[key]
        else:
            copy[key] = spoil_value(copy[key], rng)
        return copy
    if isinstance(value, dict) and rng.random() < 0.3:
        return value | {any_text(rng): any_value(rng)}
    if type(value) in (int, float) and rng.random() < 0.4:
        return rng.choice((-value, value + 1, value - 1, value * 1000, value / 3, str(value), [value]))
    return rng.choice((rng.choice(NASTY_JSON), any_value(rng)))


def spoil_json(content: bytes, rng: random.Random) -> bytes:
    """Change a JSON file, or one line of several; what is no JSON any more is spoilt as bytes."""
    lines = content.splitlines() if content.count(b"\n{") and b"\n}" not in content else [content]
    number = rng.randrange(len(lines))
    try:
        lines[number] = json.dumps(spoil_value(json.loads(lines[number]), rng)).encode()
    except (ValueError, RecursionError, OverflowError):
        return flip(content, rng)
    return b"\n".join(lines) + b"\n" * (len(lines) > 1)


def spoil_header(content: bytes, rng: random.Random) -> bytes:
    """Change the header of a safetensors file: its length, or its JSON, the length kept right."""
    size = int.from_bytes(content[:8], "little")
    if rng.random() < 0.3 or size > len(content):
        sizes = (0, 1, size - 1, size + 1, len(content), 2**31, 2**63, 2**64 - 1, rng.randrange(2**20))
        return min(max(0, rng.choice(sizes)), 2**64 - 1).to_bytes(8, "little") + content[8:]
    try:
        header = json.loads(content[8 : 8 + size])
        name = rng.choice(list(header))
        if rng.random() < 0.5 or "shape" not in header[name]:
            header = spoil_value(header, rng)
        else:
            (start, stop), shape = header[name]["data_offsets"], header[name]["shape"]
            changes = {
                "dtype": ("F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E5M2", "", "X"),
                "shape": ([], [0], [-1], [2**62, 4], shape[::-1], [1, *shape]),
                "data_offsets": ([stop, start], [0, stop], [start, 2**63], [start + 1, stop + 1], [0, 0]),
            }
            key = rng.choice(list(changes))
            header[name] = header[name] | {key: rng.choice(changes[key])}
        text = json.dumps(header).encode()
    except (ValueError, RecursionError, ArithmeticError, TypeError, AttributeError, LookupError):
        return flip(content, rng)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


ANY = (flip, truncate, splice, splice, splice, splice, replace_all, shuffle_lines)
# What fits the form of a file is drawn more often.
SPOILERS = {".json": spoil_json, ".jsonl": spoil_json, ".safetensors": spoil_header}
SPOILERS |= dict.fromkeys((".csv", ".tsv", ".txt"), spoil_cell)


def spoil(path: Path, rng: random.Random) -> tuple[bytes, str]:
    """A file's spoilt content, and how it was spoilt."""
    content, ways = path.read_bytes(), []
    for _ in range(rng.choice((1, 1, 1, 2, MAX_ROUNDS))):
        if rng.random() < 0.05:
            siblings = sorted(other for other in path.parent.iterdir() if other.is_file())
            content = rng.choice(siblings).read_bytes()
            ways.append("another file")
        else:
            fitting = [SPOILERS[path.suffix]] * len(ANY) if path.suffix in SPOILERS else []
            ways.append(rng.choice((*ANY, *fitting)))
            content = ways[-1](content, rng)
    return content, " ".join(way if isinstance(way, str) else way.__name__ for way in ways)


def draw_flags(rng: random.Random, *, for_run: bool) -> list[str]:
    """Some flags with values that may be right, nearly right, or anything."""
    actions = [action for action in flags.make_parser()._actions if action.option_strings]
    actions = [action for action in actions if not (for_run and action.dest in NOT_IN_RUNS)]
    argv = []
    for action in rng.choices(actions, k=rng.randint(1, 4)):
        flag = rng.choice(action.option_strings)
        if not for_run and rng.random() < 0.05:
            flag = rng.choice((flag[:-1], flag.upper(), "-" + flag, flag + "=", flag.replace("-", "—")))
        argv.append(flag)
        if action.nargs == 0 and rng.random() < 0.95:
            continue
        good = [*map(str, action.choices or ()), str(action.default), "1", "3", "0.5", "sst", "dev", "data"]
        value = rng.choice((rng.choice(good), rng.choice(good), rng.choice(NASTY_TEXT), any_text(rng)))
        value = value.replace("\0", "")[:100_000]  # no command line can hold a NUL
        if for_run and action.dest.endswith("_out"):
            value = "".join(c for c in value if c not in "/.")[:80]
        argv.append(value)
    if not for_run and rng.random() < 0.1:
        argv.insert(rng.randrange(len(argv) + 1), any_text(rng).replace("\0", ""))
    return argv


# --- cases --------------------------------------------------------------------------------------------------


@dataclass
class Target:
    """What reads files: a function called in this process, or a script that is run in a child.

    Args:
        name: for the table of results.
        files: that are spoilt, one in each case; none if it takes a command line.
        read: called with the spoilt file and the good one, or with a command line; a script's `main`.
        errors: that a function may raise.
        argv: of a script, where JOB and OUTPUT stand for the case's folders; None: no script.
        run: the run folder that a script finds at OUTPUT; None for a new one.
    """

    name: str
    files: list[str]
    read: Callable
    errors: tuple[type[Exception], ...] = (UserError,)
    argv: list[str] | None = None
    run: str | None = None


@dataclass
class Fuzzed:
    target: str
    refused: bool = False  # with one line for the user
    wrong: list[str] = field(default_factory=list)
    place: str = ""  # where in our code it went wrong


def find_place(traceback_text: str) -> str:
    """The innermost of our own lines in a printed traceback."""
    lines = re.findall(rf'File "{re.escape(str(ROOT))}/(?!\.venv)(.*)", line (\d+)', traceback_text)
    return ":".join(lines[-1]) if lines else "outside the project"


class Fuzzer:
    """Makes good files of every type once, and cases out of them.

    Args:
        bench: of the campaign.
        share_of_runs: of the cases; the others call a reader.
    """

    def __init__(self, bench, share_of_runs: float = 0.2):
        self.bench, self.base, self.share_of_runs = bench, bench.folder / "fuzz", share_of_runs
        for name in ("data", "encoder"):
            shutil.copytree(bench.folder / name, self.base / name)
        self.tokenizer = BertTokenizer.from_pretrained(self.base / "encoder")
        self.make_sources()
        self.make_old_encoder()
        token_cache.MIN_EXAMPLES = 1
        self.rows = bench.read("para", "train")
        self.tokens = self.tokenize(self.base / "cache")
        self.make_run("done", bench.flags(2, 2, "diff"), 0)
        self.make_run("stopped", bench.flags(6, 2, "diff"), 143, strike=Strike(in_step=(4, signal.SIGTERM)))
        shutil.copytree(self.base / "stopped", self.base / "resumed")
        self.make_run("resumed", ["--resume"], 0)
        self.resumed = comparable(self.base / "resumed")
        splits = {spec.files[split]: (task, split) for task, spec in TASKS.items() for split in spec.files}
        self.data_files = splits
        self.source_files = {name: key for key, source in EXTRA_SOURCES.items() for name in source.files}
        self.readers, self.scripts = self.make_readers(), self.make_scripts()

    # --- good files

    def make_sources(self) -> None:
        """A few rows of every additional source."""
        for source in EXTRA_SOURCES.values():
            for name in source.files:
                path = self.base / "data" / name
                if path.exists():
                    continue
                if (SAMPLE / name).exists():
                    lines = (SAMPLE / name).read_text(encoding="utf-8").splitlines()[:15]
                elif source.form == "triplets":
                    lines = [
                        "sent0,sent1,hard_neg",
                        'a dog runs,"a dog, moving",no dog',
                        "rain falls,wet,dry",
                    ]
                elif path.suffix == ".json":
                    row = dict.fromkeys(
                        [*source.text_columns, source.label_column], next(iter(source.labels))
                    )
                    lines = [json.dumps({str(n): row for n in range(8)}, indent=1)]
                elif path.suffix in (".pos", ".neg"):
                    lines = [f"some words {n}" for n in range(8)]
                else:
                    label = next(iter(source.labels)) if isinstance(source.labels, dict) else "1"
                    words = ["some words", "other words"][: len(source.text_columns)]
                    lines = ["\t".join([*source.text_columns, source.label_column])]
                    lines += ["\t".join([*(f"{text} {n}" for text in words), label]) for n in range(8)]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def make_old_encoder(self) -> None:
        """The encoder as older checkpoints have it: a pickle, and the vocabulary in tokenizer.json."""
        folder = self.base / "old_encoder"
        folder.mkdir()
        for name in ("config.json", "tokenizer_config.json"):
            shutil.copy(self.base / "encoder" / name, folder)
        torch.save(read_tensors(self.base / "encoder"), folder / "pytorch_model.bin")
        (folder / "tokenizer.json").write_text(self.tokenizer.settings(), encoding="utf-8")

    def make_run(self, name: str, argv: list[str], status: int, **options) -> None:
        ended = self.bench.run(argv, self.base / name, **options)
        if ended.status != status:
            raise RuntimeError(f"a run to be spoilt failed: {ended}")

    def files_of(self, folder: str) -> list[str]:
        return sorted(str(p.relative_to(self.base)) for p in (self.base / folder).rglob("*") if p.is_file())

    def tokenize(self, folder: Path):
        options = {"joint": False, "max_length": 64, "cache_dir": folder}
        return token_cache.tokenize_cached(self.rows, self.tokenizer, **options)

    # --- readers: (spoilt file, good file)

    def read_data(self, path: Path, good: Path) -> None:
        task, split = self.data_files[path.name]
        rows = read_rows(path, TASKS[task], split)
        tokenize(rows, self.tokenizer, joint=TASKS[task].is_pair, max_length=32)

    def read_source(self, path: Path, good: Path) -> None:
        data = next(parent for parent in path.parents if parent.name == "data")
        name = self.source_files[path.relative_to(data).as_posix()]
        add_sources(self.bench.read(EXTRA_SOURCES[name].task, "train"), {name: None}, data, set())

    def read_encoder(self, path: Path, good: Path) -> None:
        args = flags.get_args(["--pretrained", str(path.parent)])
        bert, tokenizer = multitask_classifier.load_encoder(path.parent, None)
        resolve.fit_to_encoder(args, bert.config)
        batch = tokenizer.encode("some words, and more.", args.max_length)
        batch = {name: torch.tensor([ids]) for name, ids in batch.items()}
        with torch.no_grad():
            bert(**batch, attention_mask=torch.ones_like(batch["input_ids"]))

    def read_tokens(self, path: Path, good: Path) -> None:
        found = self.tokenize(path.parent)
        assert np.array_equal(found.index, self.tokens.index)
        for array, expected in zip(
            *(vars(data.sequences).values() for data in (found, self.tokens)), strict=True
        ):
            assert np.array_equal(array, expected)

    def read_predictions(self, path: Path, good: Path) -> None:
        task, split, _ = path.name.split("-")
        read_predictions(path, TASKS[task])
        check_predictions(path, TASKS[task], self.bench.read(task, split).ids)

    def read_checkpoint(self, path: Path, good: Path) -> None:
        if path.suffix == ".safetensors":
            checkpoint.load_tensors(path)
        else:
            checkpoint.load_state(path.parent)
        if path.name != SUMS_FILE and checkpoint.find_damage(path.parent) is None:
            assert path.read_bytes() == good.read_bytes(), "damage not noticed"

    def read_finished(self, path: Path, good: Path) -> None:
        read_finished_run(path.parent, DevData(str(self.base / "data")))

    def read_metrics(self, path: Path, good: Path) -> None:
        report.read_metrics(path.parent)

    def download(self, path: Path, good: Path) -> None:
        target = path.with_name("downloaded")
        download.fetch(path.resolve().as_uri(), path.name, target, download.git_blob_id(good))
        assert target.read_bytes() == good.read_bytes()

    def make_readers(self) -> list[Target]:
        data = [f"data/{name}" for name in self.data_files]
        last = [name for name in self.files_of("stopped") if "/last" in name]
        encoder = ["vocab.txt", "tokenizer_config.json", "model.safetensors", "config.json"]
        encoder = [f"encoder/{name}" for name in encoder] + [
            "old_encoder/config.json",
            "old_encoder/tokenizer.json",
        ]

        def resolve_args(mode, path, good):
            flags.get_args(["--output_dir", str(path.parent), mode])

        modes = {mode: partial(resolve_args, mode) for mode in ("--resume", "--eval_only", "--predict_only")}
        return [
            Target("data files", data, self.read_data),
            Target("additional data", [f"data/{name}" for name in self.source_files], self.read_source),
            *(Target(f"encoder: {Path(name).name}", [name], self.read_encoder) for name in encoder),
            Target("checkpoint files", last, self.read_checkpoint),
            Target("token cache", self.files_of("cache"), self.read_tokens),
            Target("prediction files", self.files_of("done/predictions"), self.read_predictions),
            Target("scores.json", ["done/scores.json"], self.read_finished),
            Target("metrics.jsonl", ["done/metrics.jsonl"], self.read_metrics),
            Target("downloads", data, self.download, (ValueError,)),
            *(Target(f"args.json, {mode}", ["stopped/args.json"], modes[mode]) for mode in modes),
            Target("command line", [], flags.get_args),
            Target("base_url", [], lambda argv: download.resolve_base_url(argv[-1]), (ValueError,)),
        ]

    def make_scripts(self) -> list[Target]:
        def script(name, files, argv, run=None, main=multitask_classifier.main):
            return Target(name, files, main, argv=argv, run=run)

        data = [f"data/{name}" for name in (*self.data_files, *self.source_files)]
        old = [name for name in self.files_of("old_encoder") if not name.endswith(".bin")]
        last = [name for name in self.files_of("stopped") if "/last" in name]
        best = [name for name in self.files_of("done") if "/best" in name]
        predictions = self.files_of("done/predictions")
        results = [f"done/{name}" for name in ("args.json", "scores.json", "metrics.jsonl")]
        start = [*self.bench.flags(1, 1, "diff"), "--data_dir", "JOB/data"]
        start += ["--extra_data", "sick,mrpc,sst_trees", "--pretrained"]
        new, old_encoder = [*start, "JOB/encoder"], [*start, "JOB/old_encoder"]
        submit = ["OUTPUT", "--data_dir", "JOB/data", "--output", "OUTPUT/z.zip"]
        args, metrics = ["stopped/args.json"], ["stopped/metrics.jsonl"]
        again = {"checkpoint": best, "args.json": ["done/args.json"]}.items()
        modes = ("--eval_only", "--predict_only")
        return [
            script("run: data files", data, new),
            script("run: encoder", self.files_of("encoder"), new),
            script("run: old encoder", old, old_encoder),
            script("run: command line", [], new),
            script("--resume: checkpoint", last, ["--resume"], "stopped"),
            script("--resume: args.json", args, ["--resume"], "stopped"),
            script("--resume: metrics.jsonl", metrics, ["--resume"], "stopped"),
            *(script(f"{mode}: {kind}", names, [mode], "done") for mode in modes for kind, names in again),
            script("report", results + predictions, ["OUTPUT"], "done", report.main),
            script("prepare_submit", predictions + data[:9], submit, "done", prepare_submit.main),
        ]

    # --- a case

    def case(self, number: int, folder: Path) -> Fuzzed:
        """Spoil an input in the case's own copy of the files, and see what becomes of it."""
        rng = random.Random(f"{self.bench.seed} fuzz {number}")
        target = rng.choice(self.scripts if rng.random() < self.share_of_runs else self.readers)
        is_script = target.argv is not None
        if target.files:
            name, argv = rng.choice(target.files), []
            content, how = spoil(self.base / name, rng)
        else:
            name, argv = "command line", draw_flags(rng, for_run=is_script)
            content, how = repr(argv).encode(), ascii(argv)[:200]
        needed = {Path(name).parts[0]} | ({"data", "encoder"} if is_script else set())
        for part in needed & {path.name for path in self.base.iterdir()}:
            shutil.copytree(self.base / part, folder / part)
        if target.files:
            (folder / name).write_bytes(content)
        found = (self.run if is_script else self.read)(target, name, argv, folder)
        found.wrong = [f"{found.place}: {text} | {target.name}, {name} ({how})" for text in found.wrong]
        if found.wrong and self.bench.keep:
            kept = self.bench.keep / f"fuzz-{number}"
            kept.mkdir(parents=True, exist_ok=True)
            (kept / Path(name).name).write_bytes(content)
            (kept / "what.txt").write_bytes("\n".join(found.wrong).encode("utf-8", "backslashreplace"))
        return found

    def read(self, target: Target, name: str, argv: list[str], folder: Path) -> Fuzzed:
        """Call a reader in this process."""
        found, out, err = Fuzzed(target.name), io.StringIO(), io.StringIO()

        def hang(number, frame):
            raise Hung(f"no answer for {HANG_SECONDS} s")

        signal.signal(signal.SIGALRM, hang)
        signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                target.read(*([folder / name, self.base / name] if target.files else [argv]))
        except target.errors as error:
            found.refused = True
            if len(str(error).splitlines()) != 1 and UserError in target.errors:
                found.wrong.append(f"the error has several lines | {str(error)[:200]!r}")
        except SystemExit as end:
            found.refused = True
            if end.code == 2 and err.getvalue().count("\n") != 1:
                found.wrong.append(f"exit code 2 without one line | {err.getvalue()[:300]!r}")
        except (Exception, Hung) as error:  # noqa: BLE001 (this is what is looked for)
            found.wrong.append(f"{type(error).__name__} | {ascii(str(error))[:200]}")
            found.place = find_place("".join(traceback.format_exception(error)))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        return found

    def run(self, target: Target, name: str, argv: list[str], folder: Path) -> Fuzzed:
        """Run a script in a child."""
        found, output, in_last = Fuzzed(target.name), folder / (target.run or "output"), "/last" in name
        if target.run and not output.exists():
            shutil.copytree(self.base / target.run, output)
        before = find_problems(output, {}, damaged=in_last)
        argv = [
            word.replace("JOB", str(folder)).replace("OUTPUT", str(output)) for word in target.argv
        ] + argv

        def work(cell):
            Figure.savefig = lambda figure, buffer, **options: buffer.write(PNG_END)  # a second each
            sys.argv = [target.name, *argv]
            return target.read(argv)

        if target.read is multitask_classifier.main:
            ended = self.bench.run(argv, output, seconds=HANG_SECONDS * 3)
        else:
            ended = run_forked(work, folder, seconds=HANG_SECONDS * 3)
        found.refused, num_lines = ended.status == 2, len(ended.err.splitlines())
        if ended.status not in (0, 2) or "Traceback" in ended.err:
            found.wrong.append(f"{str(ended).partition(':')[2].partition(':')[0]} | ended with {ended}")
        elif found.refused and (num_lines == 0 or num_lines > 1 and target.read is not prepare_submit.main):
            found.wrong.append(f"exit code 2 with {num_lines} lines | {ended.err[:300]!r}")
        broken = {text.split(" is ")[0] for text in before}
        after = find_problems(output, {}, damaged=in_last)
        found.wrong += sorted(text for text in after if text.split(" is ")[0] not in broken)
        if in_last and ended.status == 0 and comparable(output) != self.resumed:
            found.wrong.append(f"resumed to another end | {find_differences(output, self.resumed)}")
        found.place = find_place(ended.err) if found.wrong else ""
        return found
