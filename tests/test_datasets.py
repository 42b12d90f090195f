"""The course's files with their quirks, token arrays by hand, the order of batches, the samplers' odds.

Bad files are in tests/training/test_check_data.py.
"""

import csv
import hashlib
import math
import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from config import TASKS
from datasets import (
    MAX_FIELD_SIZE,
    SAMPLERS,
    BatchOrder,
    Phrases,
    Rows,
    TaskData,
    TokenArrays,
    clean_text,
    draw_tasks,
    parse_label,
    plan_tasks,
    read_rows,
    tokenize,
    unknown_rows,
    update_sampler,
    warning_lines,
)
from support.errors import UserError
from support.specs import parse_spec
from tests.tiny import any_text
from tokenizer import SPECIAL_TOKENS, BertTokenizer

SST, SST_TEST = "\tid\tsentence\tsentiment\n", "0\t\tid\tsentence\n"
PARA = "\tid\tsentence1\tsentence2\tis_duplicate\n"
STS = "\tid\tsentence1\tsentence2\tsimilarity\n"


@pytest.fixture
def write(tmp_path):
    """Write text to a file and return its path."""

    def write(content: str) -> Path:
        path = tmp_path / "rows.csv"
        path.write_bytes(content.encode())
        return path

    return write


# --- the course's files -------------------------------------------------------------------------------------

QUOTED = '"""Is """"a"""" right, or ""b""?"""'  # two layers of CSV quoting, as in many rows of Quora
LONG = "x" * MAX_FIELD_SIZE
FILES = {  # task, split, file, what is read: id, sentences, label
    # Ids are stripped and lower-cased, as the course's loader does.
    "unnamed index": ("sst", "train", SST + "0\tAB12 \t It 's so .\t3\n", [("ab12", "It 's so .", 3)]),
    "shifted header": ("sst", "test", SST_TEST + "1\t0.0\tab\t Fun .\n", [("ab", "Fun .")]),
    "quotes": ("para", "dev", PARA + f"7\tab\t{QUOTED}\tB\t1.0\n", [("ab", 'Is "a" right, or "b"?', "B", 1)]),
    # A bug of the course's starter code cut them to whole numbers.
    "fractions": ("sts", "train", STS + "5\tab\tA\tB\t3.75\n", [("ab", "A", "B", 3.75)]),
    "byte order mark": ("sst", "train", "\ufeffid\tsentence\tsentiment\nab\t\xef\t4\n", [("ab", "\xef", 4)]),
    "other order": ("sst", "train", "sentiment\tnotes\tsentence\tid\n2\tx\tfine\tab\n", [("ab", "fine", 2)]),
    "line break": ("sst", "dev", SST + '0\tab\t"two\nlines"\t4\n', [("ab", "two lines", 4)]),
    "two rows": ("sst", "dev", SST + "0\tcd\tA\t0\n1\tab\tB\t4\n", [("cd", "A", 0), ("ab", "B", 4)]),
    "longest field": ("sst", "train", SST + f"0\tab\t{LONG}\t1\n", [("ab", LONG, 1)]),
}


@pytest.mark.parametrize("case", FILES)
def test_files_as_the_course_has_them(write, case):
    task, split, content, expected = FILES[case]
    csv.field_size_limit(100)  # a global setting of the csv module, which others may have changed
    path = write(content)
    rows = read_rows(path, TASKS[task], split)
    labels = [()] * len(expected) if rows.labels is None else rows.labels[:, None].tolist()
    found = [(name, *text, *label) for name, text, label in zip(rows.ids, rows.texts, labels, strict=True)]
    assert found == expected and (rows.path, rows.num_rows) == (path, len(expected))
    assert rows.labels is None or rows.labels.dtype == np.float32
    assert rows.warnings == ({case: [1]} if case == "byte order mark" else {})
    assert rows.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("split", ["train", "dev"])
def test_rows_without_label_or_sentence_are_left_out_and_counted(write, split):
    lines = ["a1\tone\tuno\t1.0", "a2\ttwo\tdos\t", "a3\t \tdrei\t0.0", "a4\tvier", "a5\tfive\tcinco\t0.0"]
    path = write(PARA + "".join(f"0\t{line}\n" for line in lines))
    rows = read_rows(path, TASKS["para"], split)
    assert rows.ids == ["a1", "a5"] and len(rows.texts) == 2 and rows.labels.tolist() == [1, 0]
    assert rows.warnings == {"no label": [3], "empty sentence": [4], "too few fields": [5]}
    assert rows.num_rows == 5
    assert warning_lines(rows)[0] == f"{path}: 1 row without a label, left out (line 3)"


def test_test_rows_are_all_kept(write):
    """Each id needs a prediction, whatever its sentence; labels are not read even if they are there."""
    path = write(PARA + "0\ta1\tone\tuno\tnonsense\n1\ta2\t\tdos\t\n2\ta3\tthree\n")
    rows = read_rows(path, TASKS["para"], "test")
    assert rows.ids == ["a1", "a2", "a3"] and rows.labels is None
    assert rows.texts == [("one", "uno"), ("", "dos"), ("three", "")]
    kinds = ("label in a test file", "empty sentence, kept", "too few fields, kept")
    assert rows.warnings == {kind: [line] for line, kind in enumerate(kinds, start=2)}


@pytest.mark.parametrize("text", ["-0.1", "5.01", "nan", "-inf", "3,5", "much"])
def test_bad_similarity_raises(text):
    with pytest.raises(UserError, match=r"here:7: similarity is .*expected a number from 0 to 5$"):
        parse_label(text, TASKS["sts"], "here:7")


# --- text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw, clean",
    [
        ("  a \t b\u00a0c\r\n", "a b c"),
        ("", ""),
        (" \u2003 ", ""),
        ("`` Conan '' and", '" Conan " and'),
        ("-LRB- Wow -rrb- -Lrb-", "( Wow ) ("),
        ("1\\/2 \\*\\*\\*", "1/2 ***"),
        ("\\\\\\/ \\x", "/ \\x"),
        ('"Is ""this"" so?"', 'Is "this" so?'),
        ('"""So?"" he said"', '"So?" he said'),
        ('"Yes" or "no"', '"Yes" or "no"'),  # real quotation marks at both ends stay
        ('"', '"'),
        ('""', '""'),
        ("It 's CASE , kept .", "It 's CASE , kept ."),
        ("e\u0301 \u200b", "e\u0301 \u200b"),
        ("\U0001f600\ufe0f", "\U0001f600\ufe0f"),
        ("\u200b?", "\u200b?"),
        ("\ud800", "\ud800"),  # read as a question mark
    ],
)
def test_clean_text(raw, clean):
    assert clean_text(raw) == clean


# Zero width, control, soft hyphen, direction; variation selector, accent, private use, blank letters.
NOTHING_VISIBLE = ("\u200b \u200c\u200d\u2060\ufeff", "\x01 \x7f\x9f", "\u00ad", "\u202e\u202c\u200f")
NOTHING_VISIBLE += ("\ufe0f", "\u0301", "\ue000", "\u3164\u115f \u2800")


def test_nothing_visible_is_an_empty_sentence(write):
    for text in NOTHING_VISIBLE:
        assert clean_text(text) == "", ascii(text)
    lines = f"0\ta1\tone\tuno\t1.0\n1\ta2\t{text}\tdos\t0.0\n2\ta3\ttres\t{text}\t0.0\n"
    train = read_rows(write(PARA + lines), TASKS["para"], "train")
    assert train.ids == ["a1"] and train.warnings == {"empty sentence": [3, 4]}
    test = read_rows(write(PARA + lines), TASKS["para"], "test")
    assert test.texts == [("one", "uno"), ("", "dos"), ("tres", "")]
    assert test.warnings["empty sentence, kept"] == [3, 4]


def test_a_line_of_backslashes_is_cleaned_at_once():
    started = time.perf_counter()
    assert clean_text("\\" * 20_000 + "/") == "/"
    # One by one they would take 5 s, and minutes for the longest field.
    assert time.perf_counter() - started < 1


MARKS = ("``", "''", "-lrb-", "-RRB-", "\\/", "\\*", "'s", '"', ".", "1\\/2", "-lrb-x-rrb-", "\\\\//")
ESCAPES = ("``", "''", "-lrb-", "-rrb-", "\\/", "\\*")


def test_cleaning_twice_changes_nothing_more():
    rng = random.Random(0)
    for _ in range(200):
        words = [
            rng.choice(MARKS) if rng.random() < 0.5 else any_text(rng, "aé中１7\u2003\x07 ")[:5]
            for _ in "123456"
        ]
        # With spaces around its marks, as the course's files have it.
        tokenized = rng.choice((" ", "\t", "  ", "\u00a0", "\n")).join(words)
        for raw in ("`` a \"\" b ''", any_text(rng), any_text(rng, "\"'`\\/* -lrbLRB.a"), tokenized):
            clean = clean_text(raw)
            assert clean_text(clean) == clean == " ".join(clean.split())
        assert not any(escape in clean.lower() for escape in ESCAPES)


# --- tokens -------------------------------------------------------------------------------------------------

VOCAB = {piece: i for i, piece in enumerate((*SPECIAL_TOKENS, *"abcde"))}
PAD, UNK, CLS, SEP, _, A, B, C, D, E = VOCAB.values()
TOKENIZER = BertTokenizer(VOCAB)


def make_rows(texts: list[tuple[str, ...]], labels=None) -> Rows:
    labels = None if labels is None else np.array(labels, dtype=np.float32)
    return Rows(Path("rows.csv"), [f"id{i}" for i in range(len(texts))], texts, labels)


def test_pad_by_hand():
    arrays = TokenArrays.from_encodings(
        [
            {"input_ids": [2, 5, 3], "token_type_ids": [1, 0, 0]},  # must not leak into padding
            {"input_ids": [2, 3], "token_type_ids": [0, 0]},
            {"input_ids": [2, 6, 3, 7, 3], "token_type_ids": [0, 0, 0, 1, 1]},
        ]
    )
    assert arrays.offsets.tolist() == [0, 3, 5, 10] and arrays.lengths.tolist() == [3, 2, 5]
    assert arrays.input_ids.dtype == np.int32 and arrays.token_type_ids.dtype == np.int8
    batch = arrays.pad(np.array([2, 1, 2]), pad_token_id=9)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[2, 6, 3, 7, 3], [2, 3, 9, 9, 9], [2, 6, 3, 7, 3]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]],
        "token_type_ids": [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0], [0, 0, 0, 1, 1]],
    }
    assert {str(value.dtype) for value in batch.values()} == {"torch.int64"}
    # As long as these need:
    assert arrays.pad(np.array([1, 0]), 0)["input_ids"].tolist() == [[2, 3, 0], [2, 5, 3]]


def sequences(data: TaskData) -> list[list[int]]:
    return [ids.tolist() for ids in np.split(data.sequences.input_ids, data.sequences.offsets[1:-1])]


def test_tokenize_encodes_each_distinct_sentence_once():
    rows = make_rows([("a b", "c"), ("c", "a b"), ("c", "c"), ("d", "a b")])
    data = tokenize(rows, TOKENIZER, joint=False, max_length=16)
    assert len(data) == 4 and data.rows is rows
    assert sequences(data) == [[CLS, A, B, SEP], [CLS, C, SEP], [CLS, D, SEP]]
    assert data.index.tolist() == [[0, 1], [1, 0], [1, 1], [2, 0]]
    assert data.lengths.tolist() == [4, 4, 3, 4]  # the longer of the two
    assert not data.sequences.token_type_ids.any()


def test_tokenize_joint_pairs_have_segment_ids():
    rows = make_rows([("a b", "c"), ("c", "a b"), ("a b", "c")])
    data = tokenize(rows, TOKENIZER, joint=True, max_length=16)
    assert sequences(data) == [[CLS, A, B, SEP, C, SEP], [CLS, C, SEP, A, B, SEP]]
    assert data.index.tolist() == [[0], [1], [0]]
    assert data.sequences.token_type_ids.reshape(2, 6).tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]]


def test_tokenize_single_sentences_and_cut_long_ones():
    data = tokenize(make_rows([("a b c d e",), ("b",), ("",)]), TOKENIZER, joint=False, max_length=5)
    assert sequences(data) == [[CLS, A, B, C, SEP], [CLS, B, SEP], [CLS, SEP]]
    assert data.index.shape == (3, 1) and data.lengths.tolist() == [5, 3, 2]
    batch = data.batch(np.arange(2), PAD)
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids"}  # no labels in a test file
    assert data.subset(np.array([1])).rows.labels is None


def test_batch_has_all_first_sentences_before_all_second_ones():
    rows = make_rows([("a", "b c"), ("d", "e"), ("a a a", "d")], labels=[0.5, 1.5, 2.5])
    batch = tokenize(rows, TOKENIZER, joint=False, max_length=16).batch(np.array([2, 0]), PAD)
    assert batch["input_ids"].tolist() == [
        [CLS, A, A, A, SEP],  # first sentence of example 2
        [CLS, A, SEP, PAD, PAD],  # first sentence of example 0
        [CLS, D, SEP, PAD, PAD],  # second sentence of example 2
        [CLS, B, C, SEP, PAD],  # second sentence of example 0
    ]
    assert batch["labels"].tolist() == [2.5, 0.5]


def test_symmetric_pairs_are_kept_in_both_orders_and_drawn_in_one():
    rows = make_rows([("a", "b c"), ("d", "d")] * 20, labels=[0.5, 1.5] * 20)
    data = tokenize(rows, TOKENIZER, joint=True, apart=True, symmetric=True, max_length=16)
    pair, swapped = [CLS, A, SEP, B, C, SEP], [CLS, B, C, SEP, A, SEP]
    assert sequences(data)[:4] == [[CLS, A, SEP], [CLS, B, C, SEP], pair, swapped]
    assert data.index[:2].tolist() == [[0, 1, 2, 3], [4, 4, 5, 5]]
    even = np.arange(0, 40, 2)
    batch = data.batch(even, PAD, seed=1)
    assert batch["input_ids"].shape == (3 * len(even), 6)
    drawn = [row.tolist() for row in batch["input_ids"][2 * len(even) :]]
    assert {True, False} == {row == pair for row in drawn} and all(row in (pair, swapped) for row in drawn)
    assert batch["input_ids"].equal(data.batch(even, PAD, seed=1)["input_ids"])
    assert not batch["input_ids"].equal(data.batch(even, PAD, seed=2)["input_ids"])
    first, second = data.batch(np.tile(even, 2), PAD, seed=1)["input_ids"][4 * len(even) :].chunk(2)
    assert first.equal(second)  # as R-Drop needs it
    packed = data.packed_batch(even, 0, seed=1)
    assert packed.input_ids.tolist() == batch["input_ids"][batch["attention_mask"] == 1].tolist()
    assert unknown_rows(data, [CLS, SEP, UNK]) == []


def test_phrases_of_a_batch_are_drawn_and_weigh_as_much_as_asked_for():
    numbers = np.arange(6)
    weights = np.array([1, 2, 3, 1, 1, 4], dtype=np.float32)
    phrases = Phrases(numbers, numbers + 1, numbers % 5, weights, np.array([0, 3, 3, 5, 6]), 0.5)
    batch = phrases.batch(np.array([0, 1, 2]), seed=0)
    assert batch["phrase_spans"][0].tolist() == [[0, 1], [1, 2], [2, 3]]
    assert batch["phrase_labels"][2, :2].tolist() == [3, 4]
    expected = np.array([[1, 2, 3], [0, 0, 0], [1, 1, 0]]) / 16  # of 8 in all, half
    np.testing.assert_allclose(batch["phrase_weights"], expected, rtol=1e-6)
    assert not phrases.batch(np.array([1]), seed=0)["phrase_weights"].any()
    limited = replace(phrases, limit=2)
    assert (phrases.width, limited.width) == (3, 2)
    for number in (0, 1, 2, 3):
        drawn = [limited.batch(np.array([number]), seed) for seed in range(30)]
        assert all(np.isclose(each["phrase_weights"].sum(), 0.5 * (number != 1)) for each in drawn)
        found = {tuple(sorted(each["phrase_spans"][each["phrase_weights"] > 0][:, 0])) for each in drawn}
        assert found == [{(0, 1), (0, 2), (1, 2)}, {()}, {(3, 4)}, {(5,)}][number]
        filled = limited.batch(np.array([number]), 7, width=4)
        assert filled["phrase_weights"].shape == (1, 4)
        assert filled["phrase_weights"].sum() == limited.batch(np.array([number]), 7)["phrase_weights"].sum()


@pytest.mark.parametrize("joint", [False, True])
def test_subset_keeps_the_chosen_examples_and_only_their_sequences(joint):
    rows = make_rows([("a", "b"), ("c", "a"), ("d e", "d e"), ("e", "c")], labels=[0, 1, 2, 3])
    data = tokenize(rows, TOKENIZER, joint=joint, max_length=16)
    chosen = np.array([1, 3])
    subset = data.subset(chosen)
    assert subset.rows.ids == ["id1", "id3"] and subset.rows.texts == [("c", "a"), ("e", "c")]
    assert len(subset) == 2 and len(subset.sequences.lengths) == (2 if joint else 3)
    expected, batch = data.batch(chosen, PAD), subset.batch(np.arange(2), PAD)
    assert batch.keys() == expected.keys() and all(batch[key].equal(expected[key]) for key in batch)
    assert subset.lengths.tolist() == data.lengths[chosen].tolist()
    assert data.rows.ids == ["id0", "id1", "id2", "id3"]  # the whole is not changed


@pytest.mark.parametrize("joint", [False, True])
def test_unknown_rows(joint):
    texts = [
        tuple(pair.split("|")) for pair in ("a b|c", "x y|a", "a|x", "x|x", "x a|x b", "|a", "|x", "a|a")
    ]
    data = tokenize(make_rows(texts), TOKENIZER, joint=joint, max_length=9)
    special = [CLS, SEP, UNK]
    assert unknown_rows(data, special) == [data.rows.ids[i] for i in (1, 2, 3, 6)]
    assert unknown_rows(data.subset(np.array([0, 4, 7])), special) == []
    single = tokenize(make_rows([("x",), ("a x",), ("",)]), TOKENIZER, joint=False, max_length=9)
    assert unknown_rows(single, special) == single.rows.ids[:1]


def test_sample_is_fixed_by_its_seed_and_keeps_the_order():
    rows = make_rows([(letter,) for letter in "abcde" * 4], labels=range(20))
    data = tokenize(rows, TOKENIZER, joint=False, max_length=9)
    chosen, again, other = (data.sample(7, seed).rows.labels.tolist() for seed in (3, 3, 4))
    assert len(chosen) == 7 == len(set(chosen)) and chosen == sorted(chosen)
    assert again == chosen != other
    assert data.sample(None, seed=3) is data.sample(20, seed=3) is data.sample(99, seed=3) is data


# --- the order of batches -----------------------------------------------------------------------------------


def make_lengths(num_examples: int = 1003, seed: int = 0) -> np.ndarray:
    """Word pieces per sentence as in SST: about 23 on average, a long tail up to 66, at least 3."""
    lengths = np.random.default_rng(seed).lognormal(mean=3.0, sigma=0.5, size=num_examples)
    return lengths.astype(int).clip(3, 66)


def epoch_of(order: BatchOrder, epoch: int) -> list[np.ndarray]:
    first = epoch * order.batches_per_epoch
    return [order[i] for i in range(first, first + order.batches_per_epoch)]


@pytest.fixture
def same_global_state():
    """The test leaves numpy's global random state alone."""
    np.random.seed(0)
    before = np.random.get_state()[1].tolist()
    yield
    assert np.random.get_state()[1].tolist() == before


@pytest.mark.parametrize("num_examples, batch_size", [(1003, 16), (64, 16), (5, 16), (1, 1)])
def test_each_epoch_visits_every_example_once(num_examples, batch_size, same_global_state):
    order = BatchOrder(make_lengths(num_examples), batch_size, seed=3, task="sst")
    assert order.batches_per_epoch == math.ceil(num_examples / batch_size)
    for epoch in range(3):
        batches = epoch_of(order, epoch)
        assert sorted(np.concatenate(batches).tolist()) == list(range(num_examples))
        sizes = sorted((len(batch) for batch in batches), reverse=True)
        assert sizes[:-1] == [batch_size] * (len(sizes) - 1)  # at most one is short
        assert sizes[-1] == (num_examples % batch_size or batch_size)


def test_batch_is_a_pure_function_of_seed_task_and_number():
    """Whatever was asked before: a resumed run asks in the middle of an epoch."""
    lengths = make_lengths(200)
    # Fresh each time:
    expected = [BatchOrder(lengths, 7, seed=5, task="para")[i].tolist() for i in range(60)]
    order = BatchOrder(lengths, 7, seed=5, task="para")
    asked = list(range(60)) * 2
    random.Random(0).shuffle(asked)
    assert all(order[i].tolist() == expected[i] for i in asked)


def test_order_differs_between_epochs_tasks_and_seeds():
    cases = [(0, 1, "sst"), (1, 1, "sst"), (2, 1, "sst"), (0, 2, "sst"), (0, 1, "sts"), (0, 1, "para")]
    orders = {
        tuple(np.concatenate(epoch_of(BatchOrder(make_lengths(200), 7, seed, task), epoch)).tolist())
        for epoch, seed, task in cases
    }
    assert len(orders) == len(cases)


def test_batches_hold_similar_lengths_and_come_in_random_order():
    """Padding of single sentences stays below 5 %; without sorting it is about half on this data.

    An epoch sorted by length would be a curriculum that nobody asked for: rank correlation with time is 0 on
    average with a standard error of 0.1; the two sorted groups of these 100 batches would give 0.4 to 1.
    """
    for num_examples, seed in [(8544, 0), (1600, 0), (1600, 1)]:
        lengths = make_lengths(num_examples)
        batches = [lengths[batch] for batch in epoch_of(BatchOrder(lengths, 16, seed, task="sst"), 0)]
        assert 1 - lengths.sum() / sum(len(batch) * batch.max() for batch in batches) < 0.05
        ranks = np.argsort(np.argsort([batch.mean() for batch in batches]))
        assert abs(np.corrcoef(ranks, np.arange(len(ranks)))[0, 1]) < 0.3


# --- samplers -----------------------------------------------------------------------------------------------

SIZES = np.array([84160, 8544, 6040])  # as unequal as the course's tasks

# The probabilities of the tasks, written out: N ** exponent, divided by the sum. None: not drawn at all.
EXPONENTS = {  # sampler -> progress -> exponent
    "round_robin": {},
    "proportional": {0.0: 1.0, 1.0: 1.0},
    "sqrt": {0.0: 0.5, 1.0: 0.5},
    "annealed": {0.0: 1.0, 0.5: 0.6, 1.0: 0.2},
    "temperature": {0.0: 0.2, 1.0: 0.2},  # t is 5
    "pike": {0.0: 0.0},  # until the gradients were measured
}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampler_draws_with_the_stated_probabilities(sampler):
    _, params = parse_spec(sampler, SAMPLERS)
    for progress, exponent in EXPONENTS[sampler].items():
        state = {"state": {}} if SAMPLERS[sampler].update else {}
        chances = SAMPLERS[sampler].chances(SIZES.astype(float), progress, **params, **state)
        assert chances / chances.sum() == pytest.approx(SIZES**exponent / (SIZES**exponent).sum())


def test_shares_of_draws_by_hand():
    def plan(sampler, shares, steps):
        return plan_tasks(sampler, SIZES[: len(shares)], steps, 0, np.array([shares] * steps)).tolist()

    assert plan("round_robin", [1, 0.5, 0.25], 4) == [[0, -1, -1], [0, 1, -1], [0, -1, -1], [0, 1, 2]]
    assert plan("round_robin", [0.5, 0.5], 2) == [[0, -1], [1, -1]]  # no step is empty
    draws = np.array(plan("sqrt", [0.0, 1.0, 0.25], 2000))
    odds = SIZES[1:] ** 0.5 * [1, 0.25]
    assert (draws > 0).all() and (np.diff(draws) >= 0).all()
    assert (draws == 1).mean() == pytest.approx(odds[0] / odds.sum(), abs=0.02)  # standard error below 0.007


@pytest.mark.parametrize("sampler", [name for name, row in SAMPLERS.items() if not row.update])
def test_plan_is_fixed_by_its_seed_and_a_longer_run_begins_with_the_same(sampler, same_global_state):
    """Except where the probabilities follow the progress of the run."""
    plan, again, other = (plan_tasks(sampler, SIZES, total_steps=200, seed=seed) for seed in (4, 4, 5))
    assert plan.shape == (200, 3) and np.array_equal(plan, again)
    assert np.array_equal(plan, other) == (sampler == "round_robin")
    if sampler == "round_robin":  # every task once a step, in order
        assert np.array_equal(plan, [[0, 1, 2]] * 200)
    longer = plan_tasks(sampler, SIZES, total_steps=600, seed=4)
    assert np.array_equal(plan, longer[:200]) == (sampler != "annealed")
    for total_steps in (0, 1):
        assert plan_tasks(sampler, [5, 3], total_steps, seed=0).shape == (total_steps, 2)


def test_pike_by_hand():
    """Squares 1 and 3, mean 2, of signal 1/2 and none: (2 / 2 - 1 / 4) / 2 and -3 / 4."""
    spec, squares, signal = "pike:z1=2,z2=1", torch.tensor([1.0, 3.0]), torch.tensor([0.5, -0.1])
    assert plan_tasks(spec, [5, 3], 9, seed=0) is None and update_sampler("sqrt", squares, signal, {}) == {}
    state = update_sampler(spec, squares, signal.clamp(min=0), {})
    assert state["log_weights"] == pytest.approx([0, -0.375 - 0.75])
    draws = np.stack([draw_tasks(spec, [5, 3], (step, 2000), 0, state=state) for step in range(2000)])
    assert (draws == 0).mean() == pytest.approx(1 / (1 + np.exp(-1.125)), abs=0.03)
    hopeless, shares = {"log_weights": [0, -800]}, np.array([0.0, 1.0])
    assert draw_tasks(spec, [5, 3], (0, 9), 0, state=hopeless, shares=shares).tolist() == [1, 1]
    again = update_sampler(spec, squares, signal, state)  # what is estimated below 0 is 0
    assert again["log_weights"] == pytest.approx([0, -2 * 1.125])


def test_temperature_reaches_the_plan():
    plans = [plan_tasks(f"temperature:t={t}", SIZES, total_steps=1000, seed=0) for t in (1, 5, 1000)]
    shares = [(plan == 0).mean() for plan in plans]  # 3000 draws: a standard error below 0.01
    assert shares == pytest.approx([0.852, 0.441, 1 / 3], abs=0.03)
    assert np.array_equal(plans[0], plan_tasks("proportional", SIZES, total_steps=1000, seed=0))


def test_annealed_plan_turns_to_the_small_tasks():
    """By the exponents 1 and 0.2: the largest task has 85 % of the first batches, but 45 % of the last."""
    plan = plan_tasks("annealed", SIZES, total_steps=3000, seed=0)
    first, last = (plan[:300] == 0).mean(), (plan[-300:] == 0).mean()
    # 900 batches each: the standard error is below 0.017, and progress moves by a tenth within them.
    assert 0.75 < first < 0.90 and 0.40 < last < 0.55
