"""Broken input for everything that reads: files of each type, spoilt in many ways, and command lines.

A case is drawn from the seed and its number alone. Most cases call a reading function: it has to return, or to raise the
error that becomes one line for the user. The others are whole runs in a forked child: exit code 0, or 2 with one line, and
what was whole in the run folder stays whole.
"""

import contextlib
import io
import json
import random
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
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

import multitask_classifier
import prepare_submit
from base_bert import read_tensors
from config import TASKS
from data import download
from datasets import read_rows, tokenize
from evaluation import check_predictions, read_predictions
from reporting import report
from reporting.table_statistics import DevData, read_finished_run
from support.errors import UserError
from support.files import ROOT
from tests.campaign.forks import (
    HANG_SECONDS,
    comparable,
    find_differences,
    find_problems,
    run_forked,
)
from tests.tiny import SAMPLE
from tokenizer import BertTokenizer
from training import checkpoint, flags, resolve, token_cache
from training.checkpoint import SUMS_FILE
from training.sources import EXTRA_SOURCES, add_sources

POOL_SIZE = 300  # of made-up texts, byte strings and JSON values each
MAX_ROUNDS = 3  # of spoiling the same file

NASTY_TEXT = (
    *("\0", "\ufeff", "\u202e", "\x1b[31m", "\u2028", "\r", "\t\t\t", "\n\n", '"', "'", "\\", "", " "),
    *(
        "NaN",
        "-Infinity",
        "1e400",
        "-1",
        "0",
        "1e-320",
        str(2**31),
        str(2**63),
        "9" * 5000,
        "0x1F",
        "1_000",
        "٣",
    ),
    *(
        "null",
        "true",
        "[]",
        "{}",
        '"\\ud800"',
        "[" * 100_000,
        '{"a":' * 100_000,
        "b'",
        "b'\\xff'",
        "(" * 100_000,
    ),
    *("../..", "%s%n", "a,b;c=d", "sst=nan", "x" * 10_000_000, "é" * 70_000, "=" * 1000),
)
NASTY_BYTES = (
    *(text.encode() for text in NASTY_TEXT),
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\x80",
    b"\xf4\x90\x80\x80",
)
NASTY_JSON = (
    *(None, True, False, 0, -1, 1.5, 2**31, 2**63, 10**30, 1e308, float("inf"), float("nan"), -0.0),
    *("", "\0", "\ud800", "x" * 10_000, "../..", [], {}, [[]], [None], {"": None}, [0] * 1000),
)
# Flags that a random command line must not have in a whole run: they write elsewhere, take long, or leave this machine.
NOT_IN_RUNS = {
    "help",
    "output_dir",
    "cache_dir",
    "pretrained",
    "compile",
    "epochs",
    "max_steps",
    "grad_accum",
    "overwrite",
}


PNG_END = b"IEND\xaeB`\x82"


class Hung(BaseException):
    """Not an Exception, so that no reader takes it for one of a file's."""


# --- ways to spoil bytes: (content, rng, pools) -> content -------------------------------------------------------


@dataclass
class Pools:
    """What ways to spoil draw from, besides their generator."""

    texts: list[str]
    blobs: list[bytes]
    values: list
    other: bytes = b""  # another file's content


def span(content: bytes, rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(len(content) + 1)
    return start, min(len(content), start + rng.choice((1, 2, 8, 64, 1024)))


def flip(content: bytes, rng: random.Random, pools: Pools) -> bytes:
    spoilt = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8, 64)) if content else 0):
        spoilt[rng.randrange(len(spoilt))] ^= 1 << rng.randrange(8)
    return bytes(spoilt)


def truncate(content: bytes, rng: random.Random, pools: Pools) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def insert(content: bytes, rng: random.Random, pools: Pools) -> bytes:
    at = rng.randrange(len(content) + 1)
    return content[:at] + rng.choice(pools.blobs) + content[at:]


def duplicate(content: bytes, rng: random.Random, pools: Pools) -> bytes:
    start, stop = span(content, rng)
    return content[:stop] + content[start:stop] * rng.choice((1, 2, 50)) + content[stop:]


def delete(content: bytes, rng: random.Random, pools: Pools) -> bytes:
    start, stop = span(content, rng)
    return content[:start] + content[stop:]


def zero(content: bytes, rng: random.Random, pools: Pools) -> bytes:
    start, stop = span(content, rng)
    return content[:start] + bytes(stop - start) + content[stop:]


def add_nasty(content: bytes, rng: random.Random, pools: Pools) -> bytes:
    start, stop = span(content, rng) if rng.random() < 0.5 else (rng.randrange(len(content) + 1),) * 2
    return content[:start] + rng.choice(NASTY_BYTES) + content[stop:]


def replace_all(content: bytes, rng: random.Random, pools: Pools) -> bytes:
    return rng.choice(
        (b"", pools.other, rng.choice(pools.blobs), rng.choice(pools.texts).encode("utf-8", "replace"))
    )


def shuffle_lines(content: bytes, rng: random.Random, pools: Pools) -> bytes:
    lines = content.splitlines(keepends=True)
    rng.shuffle(lines)
    return b"".join(lines)


def spoil_cell(content: bytes, rng: random.Random, pools: Pools) -> bytes:
    """Replace, drop or double one field of a table."""
    lines = content.split(b"\n")
    number = rng.randrange(len(lines))
    separator = rng.choice((b"\t", b"\t", b","))
    cells = lines[number].split(separator)
    at = rng.randrange(len(cells))
    text = rng.choice(pools.texts).encode("utf-8", "replace")
    other = rng.choice(lines[rng.randrange(len(lines))].split(separator))
    cells[at : at + 1] = rng.choice(([rng.choice(NASTY_BYTES)], [text], [other], [], [cells[at]] * 2))
    lines[number] = separator.join(cells)
    return b"\n".join(lines)


def spoil_value(value, rng: random.Random, pools: Pools):
    """A copy of a JSON value with something in it replaced, removed or added."""
    if isinstance(value, dict | list) and value and rng.random() < 0.85:
        copy = dict(value) if isinstance(value, dict) else list(value)
        key = rng.choice(list(copy)) if isinstance(copy, dict) else rng.randrange(len(copy))
        if rng.random() < 0.15:
            del copy[key]
        else:
            copy[key] = spoil_value(copy[key], rng, pools)
        return copy
    if isinstance(value, dict) and rng.random() < 0.3:
        return value | {rng.choice(pools.texts): rng.choice(pools.values)}
    if type(value) in (int, float) and rng.random() < 0.4:
        return rng.choice((-value, value + 1, value - 1, value * 1000, value / 3, str(value), [value]))
    return rng.choice(rng.choice((NASTY_JSON, pools.values)))


def spoil_json(content: bytes, rng: random.Random, pools: Pools) -> bytes:
    """Change a JSON file, or one line of several; what is no JSON any more is spoilt as bytes."""
    try:
        if content.count(b"\n{") and b"\n}" not in content:
            lines = content.splitlines()
            number = rng.randrange(len(lines))
            lines[number] = json.dumps(spoil_value(json.loads(lines[number]), rng, pools)).encode()
            return b"\n".join(lines) + b"\n"
        return json.dumps(spoil_value(json.loads(content), rng, pools)).encode()
    except (ValueError, RecursionError):
        return flip(content, rng, pools)


def spoil_header(content: bytes, rng: random.Random, pools: Pools) -> bytes:
    """Change the header of a safetensors file: its length, or its JSON, the length kept right."""
    size = int.from_bytes(content[:8], "little")
    if rng.random() < 0.3 or size > len(content):
        size = rng.choice(
            (0, 1, size - 1, size + 1, len(content), 2**31, 2**63, 2**64 - 1, rng.randrange(2**20))
        )
        return min(max(0, size), 2**64 - 1).to_bytes(8, "little") + content[8:]
    try:
        header = json.loads(content[8 : 8 + size])
        name = rng.choice(list(header))
        if rng.random() < 0.5 or "shape" not in header[name]:
            header = spoil_value(header, rng, pools)
        else:
            start, stop = header[name]["data_offsets"]
            changes = {
                "dtype": rng.choice(("F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E5M2", "", "X")),
                "shape": rng.choice(
                    ([], [0], [-1], [2**62, 4], header[name]["shape"][::-1], [1, *header[name]["shape"]])
                ),
                "data_offsets": rng.choice(
                    ([stop, start], [0, stop], [start, 2**63], [start + 1, stop + 1], [0, 0])
                ),
            }
            key = rng.choice(list(changes))
            header[name] = header[name] | {key: changes[key]}
        text = json.dumps(header).encode()
    except (ValueError, RecursionError, TypeError, AttributeError, LookupError):  # spoilt before
        return flip(content, rng, pools)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


ANY = (flip, truncate, insert, duplicate, delete, zero, add_nasty, replace_all, shuffle_lines)
# Form of a file -> what is done to it; what fits the form is drawn more often.
SPOILERS: dict[str, tuple[Callable, ...]] = {
    "bytes": ANY,
    "table": (*ANY, *[spoil_cell] * 9),
    "json": (*ANY, *[spoil_json] * 9),
    "safetensors": (*ANY, *[spoil_header] * 9),
}
FORMS = {".json": "json", ".jsonl": "json", ".csv": "table", ".tsv": "table", ".txt": "table"}


def form_of(name: str) -> str:
    return FORMS.get(Path(name).suffix, "safetensors" if name.endswith("safetensors") else "bytes")


def make_pools(number: int) -> Pools:
    """Texts, byte strings and JSON values that Hypothesis makes up, the same for the same seed."""
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
    values = st.recursive(
        scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4)
    )
    strategies = (
        st.text(st.characters(codec=None, categories=None), max_size=40),
        st.binary(max_size=80),
        values,
    )
    made = []
    for strategy in strategies:
        found = []

        @seed(number)
        @settings(
            max_examples=POOL_SIZE,
            database=None,
            phases=[Phase.generate],
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def collect(example):
            found.append(example)  # noqa: B023 (called in this round of the loop only)

        collect()
        made.append(found)
    return Pools(*made)


# --- command lines -----------------------------------------------------------------------------------------------


def draw_flags(rng: random.Random, pools: Pools, *, for_run: bool) -> list[str]:
    """Some flags with values that may be right, nearly right, or anything."""
    actions = [
        action
        for action in flags.make_parser()._actions
        if action.option_strings and not (for_run and action.dest in NOT_IN_RUNS)
    ]
    argv = []
    for action in rng.choices(actions, k=rng.randint(1, 4)):
        flag = rng.choice(action.option_strings)
        if not for_run and rng.random() < 0.05:
            flag = rng.choice((flag[:-1], flag.upper(), "-" + flag, flag + "=", flag.replace("-", "—")))
        argv.append(flag)
        if action.nargs == 0 and rng.random() < 0.95:
            continue
        good = [*map(str, action.choices or ()), str(action.default), "1", "3", "0.5", "sst", "dev", "data"]
        value = rng.choice(
            (rng.choice(good), rng.choice(good), rng.choice(NASTY_TEXT), rng.choice(pools.texts))
        )
        value = value.replace("\0", "")[:100_000]  # no command line can hold a NUL
        if for_run and action.dest.endswith("_out"):
            value = "".join(c for c in value if c not in "/.")[:80]
        argv.append(value)
    if not for_run and rng.random() < 0.1:
        argv.insert(rng.randrange(len(argv) + 1), rng.choice(pools.texts).replace("\0", ""))
    return argv


# --- targets -----------------------------------------------------------------------------------------------------


@dataclass
class Target:
    """A type of input.

    Args:
        name: for the table of results.
        files: that are spoilt, one in each case, under the job's own copy of the files; none for a command line.
        read: called with the spoilt file; None if `argv` is run.
        errors: that `read` may raise.
        script: a script's main function.
        argv: its arguments, made of the job's folder and the output folder.
        run: the run folder to copy to the output folder; None for a new one.
    """

    name: str
    files: list[str]
    read: Callable[[Path], object] | None = None
    errors: tuple[type[Exception], ...] = (UserError,)
    script: Callable[[list[str]], int] | None = None
    argv: Callable[[Path, Path], list[str]] | None = None
    run: str | None = None


@dataclass
class Fuzzed:
    file_type: str
    refused: bool  # with one line for the user
    wrong: list[str] = field(default_factory=list)
    place: str = ""  # where in our code it went wrong


def is_own(file: str) -> bool:
    return ROOT in Path(file).parents and ".venv" not in Path(file).parts


def find_place(frames: list[traceback.FrameSummary]) -> str:
    """The innermost of our own lines among some frames."""
    own = [
        f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"
        for frame in frames
        if is_own(frame.filename)
    ]
    return own[-1] if own else "outside the project"


def place_in(text: str) -> str:
    """The same, out of a printed traceback."""
    lines = [line.split('"') for line in text.splitlines() if line.startswith('  File "')]
    own = [f"{Path(parts[1]).name}:{parts[2].split()[2].rstrip(',')}" for parts in lines if is_own(parts[1])]
    return own[-1] if own else "outside the project"


class Fuzzer:
    """Makes good files of every type once, and cases out of them.

    Args:
        bench: of the campaign.
        share_of_runs: of the cases; the others call a reader.
    """

    def __init__(self, bench, share_of_runs: float = 0.2):
        self.bench, self.base, self.share_of_runs = bench, bench.folder / "fuzz", share_of_runs
        shutil.copytree(bench.folder / "data", self.base / "data")
        shutil.copytree(bench.folder / "encoder", self.base / "encoder")
        self._make_sources()
        self._make_old_encoder()
        self._make_cache()
        self._make_run("done", 2)
        self._make_run("stopped", 6, strike_at=(4, signal.SIGTERM))
        self.resumed = self._resume("stopped")
        self.data_files = {
            spec.files[split]: (task, split) for task, spec in TASKS.items() for split in spec.files
        }
        self.pools = make_pools(bench.seed)
        targets = self._make_targets()
        self.readers = [target for target in targets if target.read]
        self.runs = [target for target in targets if not target.read]

    # --- good files

    def _make_sources(self) -> None:
        """A few rows of every additional source."""
        for source in EXTRA_SOURCES.values():
            for name in source.files:
                path = self.base / "data" / name
                if path.exists():
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                if (SAMPLE / name).exists():
                    lines = (SAMPLE / name).read_text(encoding="utf-8").splitlines()[:15]
                elif source.form == "triplets":
                    lines = [
                        "sent0,sent1,hard_neg",
                        'a dog runs,"a dog, moving",no dog',
                        "rain falls,wet,dry",
                    ]
                else:
                    label = next(iter(source.labels)) if isinstance(source.labels, dict) else "1"
                    words = ["some words", "other words"][: len(source.text_columns)]
                    lines = ["\t".join([*source.text_columns, source.label_column])]
                    lines += ["\t".join([f"{text} {n}" for text in words] + [label]) for n in range(8)]
                path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def _make_old_encoder(self) -> None:
        """The encoder as older checkpoints have it: a pickle, and the vocabulary in tokenizer.json."""
        folder = self.base / "old_encoder"
        folder.mkdir()
        for name in ("config.json", "tokenizer_config.json"):
            shutil.copy(self.base / "encoder" / name, folder)
        torch.save(read_tensors(self.base / "encoder"), folder / "pytorch_model.bin")
        tokenizer = BertTokenizer.from_pretrained(self.base / "encoder")
        (folder / "tokenizer.json").write_text(tokenizer.settings(), encoding="utf-8")

    def _make_cache(self) -> None:
        self.tokenizer = BertTokenizer.from_pretrained(self.base / "encoder")
        self.rows = self.bench.read("para", "train")
        token_cache.MIN_EXAMPLES = 1
        self.tokens = self._tokenize(self.base / "cache")

    def _tokenize(self, folder: Path):
        return token_cache.tokenize_cached(
            self.rows, self.tokenizer, joint=False, max_length=64, cache_dir=folder
        )

    def _make_run(self, name: str, max_steps: int, **options) -> None:
        ended = self.bench.run(self.bench.flags(max_steps, 2, "diff"), self.base / name, **options)
        if ended.code not in (0, 143):
            raise RuntimeError(f"a run to be spoilt failed: {ended}")

    def _resume(self, name: str) -> dict:
        shutil.copytree(self.base / name, self.base / "resumed")
        ended = self.bench.run(["--resume"], self.base / "resumed")
        if ended.code != 0:
            raise RuntimeError(f"the run to be spoilt could not be resumed: {ended}")
        return comparable(self.base / "resumed")

    # --- readers

    def _read_data(self, path: Path) -> None:
        task, split = self.data_files[path.name]
        rows = read_rows(path, TASKS[task], split)
        tokenizer = BertTokenizer.from_pretrained(self.base / "encoder")
        tokenize(rows, tokenizer, joint=TASKS[task].is_pair, max_length=32)

    def _read_source(self, path: Path) -> None:
        data = next(parent for parent in path.parents if parent.name == "data")
        name = next(
            name for name, source in EXTRA_SOURCES.items() if str(path.relative_to(data)) in source.files
        )
        task = EXTRA_SOURCES[name].task
        add_sources(self.bench.read(task, "train"), {name: None}, data, set())

    def _read_encoder(self, path: Path) -> None:
        args = flags.get_args(["--pretrained", str(path.parent)])
        bert, tokenizer = multitask_classifier.load_encoder(args, path.parent)
        resolve.fit_to_encoder(args, bert.config)
        batch = tokenizer.encode("some words, and more.", args.max_length)
        batch = {name: torch.tensor([ids]) for name, ids in batch.items()}
        with torch.no_grad():
            bert(**batch, attention_mask=torch.ones_like(batch["input_ids"]))

    def _read_tokens(self, path: Path) -> None:
        found = self._tokenize(path.parent)
        for name in ("input_ids", "token_type_ids", "offsets"):
            assert np.array_equal(getattr(found.sequences, name), getattr(self.tokens.sequences, name))
        assert np.array_equal(found.index, self.tokens.index)

    def _read_predictions(self, path: Path) -> None:
        task, split, _ = path.name.split("-")
        read_predictions(path, TASKS[task])
        check_predictions(path, TASKS[task], self.bench.read(task, split).ids)

    def _read_args(self, path: Path, mode: str) -> None:
        flags.get_args(["--output_dir", str(path.parent), mode])

    def _read_checkpoint(self, path: Path) -> None:
        if path.suffix == ".safetensors":
            checkpoint.load_tensors(path)
        else:
            checkpoint.load_state(path.parent)
        if path.name != SUMS_FILE and checkpoint.find_damage(path.parent) is None:
            assert path.read_bytes() == (self.base / path.relative_to(self.job)).read_bytes(), (
                "damage not noticed"
            )

    def _read_finished(self, path: Path) -> None:
        read_finished_run(path.parent, DevData(str(self.base / "data")))

    def _download(self, path: Path) -> None:
        target = path.with_name("downloaded")
        content = (self.base / "data" / path.name).read_bytes()
        blob_id = download.git_blob_id(self.base / "data" / path.name)
        try:
            download.fetch(path.resolve().as_uri(), target, blob_id)
            assert target.read_bytes() == content
        finally:
            target.unlink(missing_ok=True)

    # --- targets

    def _make_targets(self) -> list[Target]:
        data = [f"data/{name}" for name in self.data_files]
        sources = sorted({f"data/{name}" for source in EXTRA_SOURCES.values() for name in source.files})

        def files_of(folder):
            paths = (path for path in (self.base / folder).rglob("*") if path.is_file())
            return sorted(str(path.relative_to(self.base)) for path in paths)

        old, new = files_of("old_encoder"), files_of("encoder")
        checkpoint_files = [name for name in files_of("stopped") if "/last" in name]
        readers = [
            Target("data files", data, self._read_data),
            Target("additional data", sources, self._read_source),
            Target(
                "encoder: config.json", ["encoder/config.json", "old_encoder/config.json"], self._read_encoder
            ),
            Target("encoder: vocab.txt", ["encoder/vocab.txt"], self._read_encoder),
            Target("encoder: tokenizer_config.json", ["encoder/tokenizer_config.json"], self._read_encoder),
            Target("encoder: tokenizer.json", ["old_encoder/tokenizer.json"], self._read_encoder),
            Target("encoder: model.safetensors", ["encoder/model.safetensors"], self._read_encoder),
            Target("encoder: pytorch_model.bin", ["old_encoder/pytorch_model.bin"], self._read_encoder),
            Target("checkpoint files", checkpoint_files, self._read_checkpoint),
            Target("token cache", files_of("cache"), self._read_tokens),
            Target("prediction files", files_of("done/predictions"), self._read_predictions),
            Target("scores.json", ["done/scores.json"], self._read_finished),
            Target("metrics.jsonl", ["done/metrics.jsonl"], lambda path: report.read_metrics(path.parent)),
            Target("downloads", data, self._download, (download.FetchError, ValueError)),
            *(
                Target(f"args.json, {mode}", ["stopped/args.json"], partial(self._read_args, mode=mode))
                for mode in ("--resume", "--eval_only", "--predict_only")
            ),
            Target("command line", [], flags.get_args),
            Target(
                "download.py --base_url", [], lambda argv: download.resolve_base_url(argv[-1]), (ValueError,)
            ),
        ]
        train, flags_of = multitask_classifier.main, self.bench.flags

        def start(job, output, encoder="encoder"):
            extra = ["--extra_data", "sick,mrpc,sst_trees", "--pretrained", str(job / encoder)]
            return [*flags_of(1, 1, "diff"), "--data_dir", str(job / "data"), *extra]

        runs = [
            Target("run: data files", data + sources, script=train, argv=start),
            Target("run: encoder", new, script=train, argv=start),
            Target("run: old encoder", old, script=train, argv=partial(start, encoder="old_encoder")),
            Target("run: command line", [], script=train, argv=start),
            *(
                Target(
                    f"--resume: {kind}",
                    files,
                    script=train,
                    argv=lambda job, output: ["--resume"],
                    run="stopped",
                )
                for kind, files in (
                    ("checkpoint", checkpoint_files),
                    ("args.json", ["stopped/args.json"]),
                    ("metrics.jsonl", ["stopped/metrics.jsonl"]),
                )
            ),
            *(
                Target(
                    f"{mode}: {kind}",
                    files,
                    script=train,
                    argv=lambda job, output, mode=mode: [mode],
                    run="done",
                )
                for mode in ("--eval_only", "--predict_only")
                for kind, files in (
                    ("checkpoint", [name for name in files_of("done") if "/best" in name]),
                    ("args.json", ["done/args.json"]),
                )
            ),
            Target(
                "report.py",
                [f"done/{name}" for name in ("args.json", "scores.json", "metrics.jsonl")]
                + files_of("done/predictions"),
                script=report.main,
                argv=lambda job, output: [str(output)],
                run="done",
            ),
            Target(
                "prepare_submit.py",
                files_of("done/predictions") + [name for name in data if "cfimdb" not in name],
                script=prepare_submit.main,
                argv=lambda job, output: [
                    str(output),
                    "--data_dir",
                    str(job / "data"),
                    "--output",
                    str(output / "z.zip"),
                ],
                run="done",
            ),
        ]
        return readers + runs

    # --- cases

    @property
    def job(self) -> Path:
        """This process's own copy of all files."""
        folder = self.bench.own() / "fuzz"
        if not folder.exists():
            shutil.copytree(self.base, folder)
        return folder

    def spoil(self, name: str, rng: random.Random) -> tuple[bytes, str]:
        """A file's spoilt content, and how it was spoilt."""
        content = (self.base / name).read_bytes()
        siblings = [path for path in (self.base / name).parent.iterdir() if path.is_file()]
        self.pools.other = rng.choice(sorted(siblings)).read_bytes()
        ways = []
        for _ in range(rng.choice((1, 1, 1, 2, MAX_ROUNDS))):
            way = rng.choice(SPOILERS[form_of(name)])
            content = way(content, rng, self.pools)
            ways.append(way.__name__)
        return content, " ".join(ways)

    def case(self, number: int) -> Fuzzed:
        rng = random.Random(f"{self.bench.seed} fuzz {number}")
        target = rng.choice(self.runs if rng.random() < self.share_of_runs else self.readers)
        if target.files:
            name = rng.choice(target.files)
            content, how = self.spoil(name, rng)
            argv = []
        else:
            argv = draw_flags(rng, self.pools, for_run=target.read is None)
            name, content, how = "command line", repr(argv).encode(), ascii(argv)[:200]
        if target.read is None:
            found = self.run(target, name, content, argv)
        else:
            found = self.read(target, name, content, argv)
        found.wrong = [f"{found.place}: {text} | {target.name}, {name} ({how})" for text in found.wrong]
        if found.wrong and self.bench.keep:
            folder = self.bench.keep / f"fuzz-{number}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / Path(name).name).write_bytes(content)
            (folder / "what.txt").write_text(
                "\n".join(found.wrong) + "\n", encoding="utf-8", errors="backslashreplace"
            )
        return found

    def read(self, target: Target, name: str, content: bytes, argv: list[str]) -> Fuzzed:
        """Call a reader in this process."""
        found = Fuzzed(target.name, refused=False)
        path = self.job / name

        def hang(number, frame):
            raise Hung(f"no answer for {HANG_SECONDS} s")

        out, err = io.StringIO(), io.StringIO()
        signal.signal(signal.SIGALRM, hang)
        try:
            if not argv:
                path.write_bytes(content)
            signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                target.read(argv or path)
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
            found.place = find_place(traceback.extract_tb(error.__traceback__))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            if not argv:
                path.write_bytes((self.base / name).read_bytes())
        return found

    def run(self, target: Target, name: str, content: bytes, argv: list[str]) -> Fuzzed:
        """Run a script in a child."""
        found = Fuzzed(target.name, refused=False)
        output = self.bench.own() / "output"
        if target.run:
            shutil.copytree(self.base / target.run, output)
        inside = target.run is not None and name.startswith(target.run + "/")
        path = output / Path(name).relative_to(target.run) if inside else self.job / name
        if not argv:
            path.write_bytes(content)
        in_last = inside and "/last" in name
        before = find_problems(output, {}, damaged=in_last)
        script_argv = [*target.argv(self.job, output), *argv]
        if target.script is multitask_classifier.main:
            ended = self.bench.run(script_argv, output, seconds=HANG_SECONDS * 3)
        else:

            def work():
                Figure.savefig = lambda figure, buffer, **options: buffer.write(PNG_END)  # a second each
                sys.argv = [target.name, *script_argv]
                return target.script(script_argv)

            ended = run_forked(work, self.bench.own(), seconds=HANG_SECONDS * 3)
        found.refused = ended.code == 2
        lines = ended.err.splitlines()
        if ended.code not in (0, 2) or "Traceback" in ended.err:
            found.wrong.append(f"{str(ended).partition(':')[2].partition(':')[0]} | ended with {ended}")
        elif ended.code == 2 and (len(lines) != 1 and target.script is not prepare_submit.main or not lines):
            found.wrong.append(f"exit code 2 with {len(lines)} lines | {ended.err[:300]!r}")
        broken = {text.split(" is ")[0] for text in before}
        after = find_problems(output, {}, damaged=in_last)
        found.wrong += sorted(text for text in after if text.split(" is ")[0] not in broken)
        if in_last and ended.code == 0 and comparable(output) != self.resumed:
            found.wrong.append(f"resumed to another end | {find_differences(output, self.resumed)}")
        found.place = place_in(ended.err) if found.wrong else ""
        shutil.rmtree(output, ignore_errors=True)
        if not argv and not inside:
            path.write_bytes((self.base / name).read_bytes())
        return found
