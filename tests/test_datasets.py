"""The course's files with their quirks, token arrays by hand, the order of batches, the samplers' odds.

Bad files are in tests/training/test_check_data.py.
"""

import csv
import hashlib
import math
import random
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from config import TASKS
from datasets import (
    MAX_FIELD_SIZE,
    SAMPLERS,
    BatchOrder,
    Rows,
    TaskData,
    TokenArrays,
    clean_text,
    parse_label,
    plan_tasks,
    read_rows,
    tokenize,
    unknown_rows,
    warning_lines,
)
from support.errors import UserError
from tokenizer import BertTokenizer

SST_HEADER, SST_TEST_HEADER = "\tid\tsentence\tsentiment\n", "0\t\tid\tsentence\n"
PARA_HEADER = "\tid\tsentence1\tsentence2\tis_duplicate\n"
STS_HEADER = "\tid\tsentence1\tsentence2\tsimilarity\n"


@pytest.fixture
def write(tmp_path):
    """Write text, or bytes as they are, to a file and return its path."""

    def write(content: str | bytes) -> Path:
        path = tmp_path / "rows.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


# --- the course's files -------------------------------------------------------------------------------------


def test_sst_file_with_unnamed_index_column(write):
    path = write(SST_HEADER + "0\tAB12 \t It 's a lovely film .\t3\n1\tcd34\t No one goes unindicted .\t0\n")
    rows = read_rows(path, TASKS["sst"], "train")
    assert rows.path == path
    assert rows.ids == ["ab12", "cd34"]  # stripped and lower-cased, as the course's loader does
    assert rows.texts == [("It 's a lovely film .",), ("No one goes unindicted .",)]
    assert rows.labels.dtype == np.float32 and rows.labels.tolist() == [3, 0]
    assert rows.warnings == {} and rows.num_rows == 2
    assert rows.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_sst_test_file_with_two_extra_columns_and_a_shifted_header(write):
    path = write(SST_TEST_HEADER + "1\t0.0\tab12\t Effective but too-tepid biopic\n2\t1.0\tcd34\t Fun .\n")
    rows = read_rows(path, TASKS["sst"], "test")
    assert rows.ids == ["ab12", "cd34"]
    assert rows.texts == [("Effective but too-tepid biopic",), ("Fun .",)]
    assert rows.labels is None


def test_quora_file_with_doubled_quotes_and_float_labels(write):
    quoted = '"""Is """"a"""" right, or ""b""?"""'  # two layers of CSV quoting, as in many Quora rows
    path = write(PARA_HEADER + f'7\tab\t{quoted}\t"Is ""c"" right?"\t1.0\n3\tcd\tWhy?\tHow?\t0.0\n')
    rows = read_rows(path, TASKS["para"], "dev")
    assert rows.texts == [('Is "a" right, or "b"?', 'Is "c" right?'), ("Why?", "How?")]
    assert rows.labels.tolist() == [1, 0]


def test_sts_labels_stay_fractions(write):
    """A bug of the course's starter code cut them to whole numbers."""
    path = write(STS_HEADER + "5\tab\tA dog.\tA cat.\t3.75\n6\tcd\tA.\tB.\t0\n7\tef\tC.\tD.\t5.0\n")
    assert read_rows(path, TASKS["sts"], "train").labels.tolist() == [3.75, 0, 5]


def test_byte_order_mark_is_not_part_of_the_first_column(write):
    path = write(b"\xef\xbb\xbfid\tsentence\tsentiment\nab\tna\xc3\xafve\t4\n")
    rows = read_rows(path, TASKS["sst"], "train")
    assert rows.ids == ["ab"] and rows.texts == [("na\u00efve",)]


def test_columns_are_found_by_name(write):
    path = write("sentiment\tnotes\tsentence\tid\n2\tx\tfine\tab\n")
    rows = read_rows(path, TASKS["sst"], "train")
    assert (rows.ids, rows.texts, rows.labels.tolist()) == (["ab"], [("fine",)], [2])


def test_line_break_inside_quotes_belongs_to_the_sentence(write):
    rows = read_rows(write(SST_HEADER + '0\tab\t"two\nlines"\t4\n'), TASKS["sst"], "dev")
    assert rows.texts == [("two lines",)]


@pytest.mark.parametrize("split", ["train", "dev"])
def test_rows_without_label_or_sentence_are_left_out_and_counted(write, split):
    lines = [
        "0\ta1\tone\tuno\t1.0",
        "1\ta2\ttwo\tdos\t",
        "2\ta3\t \tdrei\t0.0",
        "3\ta4\tvier",
        "4\ta5\tfive\tcinco\t0.0",
    ]
    path = write(PARA_HEADER + "\n".join(lines) + "\n")
    rows = read_rows(path, TASKS["para"], split)
    assert rows.ids == ["a1", "a5"] and len(rows.texts) == 2 and rows.labels.tolist() == [1, 0]
    assert rows.warnings == {"no label": [3], "empty sentence": [4], "too few fields": [5]}
    assert rows.num_rows == 5
    assert warning_lines(rows)[0] == f"{path}: 1 row without a label, left out (line 3)"


def test_test_rows_are_all_kept(write):
    """Each id needs a prediction, whatever its sentence; labels are not read even if they are there."""
    path = write(PARA_HEADER + "0\ta1\tone\tuno\tnonsense\n1\ta2\t\tdos\t\n2\ta3\tthree\n")
    rows = read_rows(path, TASKS["para"], "test")
    assert rows.ids == ["a1", "a2", "a3"] and rows.labels is None
    assert rows.texts == [("one", "uno"), ("", "dos"), ("three", "")]
    assert rows.warnings == {
        "label in a test file": [2],
        "empty sentence, kept": [3],
        "too few fields, kept": [4],
    }


def test_the_sample_that_comes_with_the_project_can_be_read():
    folder = Path(__file__).resolve().parent.parent / "data" / "sample"
    for task in ("sst", "para", "sts"):
        for split, name in TASKS[task].files.items():
            rows = read_rows(folder / name, TASKS[task], split)
            assert len(rows.ids) == len(rows.texts) > 50
            assert (rows.labels is None) == (split == "test")


def test_field_of_the_greatest_size_can_be_read(write):
    csv.field_size_limit(100)  # a global setting of the csv module, which others may have changed
    rows = read_rows(write(SST_HEADER + f"0\tab\t{'x' * MAX_FIELD_SIZE}\t1\n"), TASKS["sst"], "train")
    assert len(rows.texts[0][0]) == MAX_FIELD_SIZE


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


NOTHING_VISIBLE = {
    "zero width": "\u200b \u200c\u200d\u2060\ufeff",
    "control": "\x01 \x7f\x9f",
    "soft hyphen": "\u00ad",
    "direction": "\u202e\u202c\u200f",
    "variation selector": "\ufe0f",
    "accent": "\u0301",
    "private use": "\ue000",
    "blank letters": "\u3164\u115f \u2800",
}


@pytest.mark.parametrize("case", NOTHING_VISIBLE)
def test_nothing_visible_is_an_empty_sentence(write, case):
    text = NOTHING_VISIBLE[case]
    assert clean_text(text) == ""
    lines = f"0\ta1\tone\tuno\t1.0\n1\ta2\t{text}\tdos\t0.0\n2\ta3\ttres\t{text}\t0.0\n"
    train = read_rows(write(PARA_HEADER + lines), TASKS["para"], "train")
    assert train.ids == ["a1"] and train.warnings == {"empty sentence": [3, 4]}
    test = read_rows(write(PARA_HEADER + lines), TASKS["para"], "test")
    assert test.texts == [("one", "uno"), ("", "dos"), ("tres", "")]
    assert test.warnings["empty sentence, kept"] == [3, 4]


def test_a_line_of_backslashes_is_cleaned_at_once():
    started = time.perf_counter()
    assert clean_text("\\" * 20_000 + "/") == "/"
    # One by one they would take 5 s, and minutes for the longest field.
    assert time.perf_counter() - started < 1


@settings(derandomize=True, deadline=None, max_examples=150, database=None)
@given(text=st.text(st.sampled_from("\"'`\\/* -lrbLRB.a")) | st.text())
@example(text="`` a \"\" b ''")
@example(text="\\\\//")
def test_cleaning_any_text_twice_changes_nothing_more(text):
    assert clean_text(clean_text(text)) == clean_text(text)


WORDS = st.one_of(
    st.sampled_from(["``", "''", "-lrb-", "-RRB-", "\\/", "\\*", "'s", '"', ".", "1\\/2", "-lrb-x-rrb-"]),
    st.text(st.characters(categories=["L", "N", "Zs", "Cc"]), max_size=5),
)


@settings(derandomize=True, deadline=None, max_examples=100, database=None)
@given(words=st.lists(WORDS, max_size=12), space=st.sampled_from([" ", "\t", "  ", "\u00a0", "\n"]))
def test_cleaning_tokenized_text_twice_changes_nothing_more(words, space):
    """For text with spaces around its marks, as the course's files have it."""
    clean = clean_text(space.join(words))
    assert clean_text(clean) == clean
    assert clean == " ".join(clean.split())
    assert not any(escape in clean.lower() for escape in ("``", "''", "-lrb-", "-rrb-", "\\/", "\\*"))


# --- tokens -------------------------------------------------------------------------------------------------

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCAB = {piece: i for i, piece in enumerate((*SPECIAL_TOKENS, *"abcde"))}
PAD, _, CLS, SEP, _, A, B, C, D, E = VOCAB.values()


@pytest.fixture
def tokenizer():
    return BertTokenizer(VOCAB)


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


def sequence(data: TaskData, i: int) -> list[int]:
    return data.sequences.input_ids[data.sequences.offsets[i] : data.sequences.offsets[i + 1]].tolist()


def test_tokenize_encodes_each_distinct_sentence_once(tokenizer):
    rows = make_rows([("a b", "c"), ("c", "a b"), ("c", "c"), ("d", "a b")])
    data = tokenize(rows, tokenizer, joint=False, max_length=16)
    assert len(data) == 4 and data.rows is rows
    assert [sequence(data, i) for i in range(3)] == [[CLS, A, B, SEP], [CLS, C, SEP], [CLS, D, SEP]]
    assert len(data.sequences.lengths) == 3
    assert data.index.tolist() == [[0, 1], [1, 0], [1, 1], [2, 0]]
    assert data.lengths.tolist() == [4, 4, 3, 4]  # the longer of the two
    assert not data.sequences.token_type_ids.any()


def test_tokenize_joint_pairs_have_segment_ids(tokenizer):
    rows = make_rows([("a b", "c"), ("c", "a b"), ("a b", "c")])
    data = tokenize(rows, tokenizer, joint=True, max_length=16)
    assert [sequence(data, i) for i in range(2)] == [[CLS, A, B, SEP, C, SEP], [CLS, C, SEP, A, B, SEP]]
    assert data.index.tolist() == [[0], [1], [0]] and len(data.sequences.lengths) == 2
    assert data.sequences.token_type_ids.reshape(2, 6).tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]]


def test_tokenize_single_sentences_and_cut_long_ones(tokenizer):
    data = tokenize(make_rows([("a b c d e",), ("b",), ("",)]), tokenizer, joint=False, max_length=5)
    assert [sequence(data, i) for i in range(3)] == [[CLS, A, B, C, SEP], [CLS, B, SEP], [CLS, SEP]]
    assert data.index.shape == (3, 1) and data.lengths.tolist() == [5, 3, 2]


def test_batch_has_all_first_sentences_before_all_second_ones(tokenizer):
    rows = make_rows([("a", "b c"), ("d", "e"), ("a a a", "d")], labels=[0.5, 1.5, 2.5])
    batch = tokenize(rows, tokenizer, joint=False, max_length=16).batch(np.array([2, 0]), PAD)
    assert batch["input_ids"].tolist() == [
        [CLS, A, A, A, SEP],  # first sentence of example 2
        [CLS, A, SEP, PAD, PAD],  # first sentence of example 0
        [CLS, D, SEP, PAD, PAD],  # second sentence of example 2
        [CLS, B, C, SEP, PAD],  # second sentence of example 0
    ]
    assert batch["labels"].tolist() == [2.5, 0.5]


def test_batch_of_test_rows_has_no_labels(tokenizer):
    batch = tokenize(make_rows([("a",), ("b c",)]), tokenizer, joint=False, max_length=16).batch(
        np.arange(2), PAD
    )
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids"}
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("joint", [False, True])
def test_subset_keeps_the_chosen_examples_and_only_their_sequences(tokenizer, joint):
    rows = make_rows([("a", "b"), ("c", "a"), ("d e", "d e"), ("e", "c")], labels=[0, 1, 2, 3])
    data = tokenize(rows, tokenizer, joint=joint, max_length=16)
    chosen = np.array([1, 3])
    subset = data.subset(chosen)
    assert subset.rows.ids == ["id1", "id3"] and subset.rows.texts == [("c", "a"), ("e", "c")]
    assert len(subset) == 2 and len(subset.sequences.lengths) == (2 if joint else 3)
    expected, batch = data.batch(chosen, PAD), subset.batch(np.arange(2), PAD)
    assert {key: tensor.tolist() for key, tensor in batch.items()} == {
        key: tensor.tolist() for key, tensor in expected.items()
    }
    assert subset.lengths.tolist() == data.lengths[chosen].tolist()
    assert data.rows.ids == ["id0", "id1", "id2", "id3"]  # the whole is not changed


def test_subset_of_test_rows_has_no_labels(tokenizer):
    data = tokenize(make_rows([("a",), ("b",)]), tokenizer, joint=False, max_length=9)
    assert data.subset(np.array([1])).rows.labels is None


@pytest.mark.parametrize("joint", [False, True])
def test_unknown_rows(tokenizer, joint):
    texts = [
        ("a b", "c"),
        ("x y", "a"),
        ("a", "x"),
        ("x", "x"),
        ("x a", "x b"),
        ("", "a"),
        ("", "x"),
        ("a", "a"),
    ]
    data = tokenize(make_rows(texts), tokenizer, joint=joint, max_length=9)
    special = [CLS, SEP, VOCAB["[UNK]"]]
    assert unknown_rows(data, special) == [data.rows.ids[i] for i in (1, 2, 3, 6)]
    assert unknown_rows(data.subset(np.array([0, 4, 7])), special) == []
    single = tokenize(make_rows([("x",), ("a x",), ("",)]), tokenizer, joint=False, max_length=9)
    assert unknown_rows(single, special) == single.rows.ids[:1]


def test_sample_is_fixed_by_its_seed_and_keeps_the_order(tokenizer):
    rows = make_rows([(letter,) for letter in "abcde" * 4], labels=range(20))
    data = tokenize(rows, tokenizer, joint=False, max_length=9)
    chosen = data.sample(7, seed=3).rows.labels.tolist()
    assert len(chosen) == 7 == len(set(chosen)) and chosen == sorted(chosen)
    assert (
        data.sample(7, seed=3).rows.labels.tolist() == chosen != data.sample(7, seed=4).rows.labels.tolist()
    )
    assert data.sample(None, seed=3) is data.sample(20, seed=3) is data.sample(99, seed=3) is data


# --- the order of batches -----------------------------------------------------------------------------------


def make_lengths(num_examples: int = 1003, seed: int = 0) -> np.ndarray:
    """Word pieces per sentence as in SST: about 23 on average, a long tail up to 66, at least 3."""
    lengths = np.random.default_rng(seed).lognormal(mean=3.0, sigma=0.5, size=num_examples)
    return lengths.astype(int).clip(3, 66)


@pytest.mark.parametrize("num_examples, batch_size", [(1003, 16), (64, 16), (5, 16), (1, 1)])
def test_each_epoch_visits_every_example_once(num_examples, batch_size):
    order = BatchOrder(make_lengths(num_examples), batch_size, seed=3, task="sst")
    assert order.batches_per_epoch == math.ceil(num_examples / batch_size)
    for epoch in range(3):
        first = epoch * order.batches_per_epoch
        batches = [order[i] for i in range(first, first + order.batches_per_epoch)]
        assert sorted(np.concatenate(batches).tolist()) == list(range(num_examples))
        sizes = sorted((len(batch) for batch in batches), reverse=True)
        assert sizes[:-1] == [batch_size] * (len(sizes) - 1)  # at most one is short
        assert sizes[-1] == (num_examples % batch_size or batch_size)


def test_fewer_rows_than_a_batch_make_one_batch_an_epoch():
    order = BatchOrder(np.array([3, 9, 4]), batch_size=8, seed=0, task="sst")
    assert order.batches_per_epoch == 1
    assert [sorted(order[i].tolist()) for i in range(4)] == [[0, 1, 2]] * 4


def test_batch_is_a_pure_function_of_seed_task_and_number():
    """Whatever was asked before: a resumed run asks in the middle of an epoch."""
    lengths = make_lengths(200)
    # Fresh each time:
    expected = [BatchOrder(lengths, 7, seed=5, task="para")[i].tolist() for i in range(100)]
    order = BatchOrder(lengths, 7, seed=5, task="para")
    asked = list(range(100)) * 2
    random.Random(0).shuffle(asked)
    assert all(order[i].tolist() == expected[i] for i in asked)


def test_order_differs_between_epochs_tasks_and_seeds():
    lengths = make_lengths(200)

    def epoch(number, seed=1, task="sst"):
        order = BatchOrder(lengths, 7, seed, task)
        first = number * order.batches_per_epoch
        return tuple(n for i in range(first, first + order.batches_per_epoch) for n in order[i].tolist())

    orders = {epoch(0), epoch(1), epoch(2), epoch(0, seed=2), epoch(0, task="sts"), epoch(0, task="para")}
    assert len(orders) == 6
    assert epoch(0) == epoch(0)


def test_order_leaves_the_global_random_state_alone():
    np.random.seed(0)
    expected = np.random.random(3).tolist()
    np.random.seed(0)
    BatchOrder(make_lengths(50), 7, seed=1, task="sst")[0]
    assert np.random.random(3).tolist() == expected


def test_similar_lengths_share_a_batch():
    """Padding of single sentences stays below 5 %; without sorting it is about half on this data."""
    lengths = make_lengths(8544)
    order = BatchOrder(lengths, 16, seed=0, task="sst")
    for epoch in range(3):
        first = epoch * order.batches_per_epoch
        batches = [lengths[order[i]] for i in range(first, first + order.batches_per_epoch)]
        padded = sum(len(batch) * batch.max() for batch in batches)
        assert 1 - lengths.sum() / padded < 0.05


def test_batches_of_an_epoch_are_shuffled():
    """Long and short batches alternate; an epoch sorted by length would be a curriculum nobody asked for."""
    lengths = make_lengths(1600)
    order = BatchOrder(lengths, 16, seed=0, task="sst")
    means = [lengths[order[i]].mean() for i in range(100)]
    # Rank correlation with time is 0 on average with standard error 0.1; sorted groups would give 0.4 to 1.
    assert abs(np.corrcoef(np.argsort(np.argsort(means)), np.arange(100))[0, 1]) < 0.3


# --- samplers -----------------------------------------------------------------------------------------------

SIZES = np.array([84160, 8544, 6040])  # as unequal as the course's tasks

# The probabilities of the tasks, written out: N ** exponent, divided by the sum. None: not drawn at all.
EXPONENTS = {
    "round_robin": None,
    "proportional": {0.0: 1.0, 1.0: 1.0},  # progress -> exponent
    "sqrt": {0.0: 0.5, 1.0: 0.5},
    "annealed": {0.0: 1.0, 0.5: 0.6, 1.0: 0.2},
}


def test_every_sampler_has_its_probabilities():
    assert set(EXPONENTS) == set(SAMPLERS)


@pytest.mark.parametrize(
    "sampler, progress, exponent",
    [(name, *row) for name, rows in EXPONENTS.items() if rows for row in rows.items()],
)
def test_sampler_draws_with_the_stated_probabilities(sampler, progress, exponent):
    probabilities = SIZES**exponent / (SIZES**exponent).sum()
    rng, num_steps = np.random.default_rng(0), 3000
    draws = np.concatenate([SAMPLERS[sampler](SIZES, progress, rng) for _ in range(num_steps)])
    frequencies = np.bincount(draws, minlength=3) / len(draws)
    standard_errors = np.sqrt(probabilities * (1 - probabilities) / len(draws))  # binomial
    assert (np.abs(frequencies - probabilities) < 4 * standard_errors).all()  # fixed seed


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampler_draws_a_task_for_every_batch_in_order(sampler):
    rng = np.random.default_rng(1)
    for progress in np.linspace(0, 1, 50):
        tasks = SAMPLERS[sampler](SIZES, float(progress), rng)
        assert tasks.shape == (3,) and set(tasks.tolist()) <= {0, 1, 2}
        assert (np.diff(tasks) >= 0).all()


def test_round_robin_plan_has_every_task_once_a_step_in_order():
    assert plan_tasks("round_robin", SIZES, total_steps=5, seed=0).tolist() == [[0, 1, 2]] * 5


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_plan_is_reproducible_and_leaves_the_global_random_state_alone(sampler):
    np.random.seed(0)
    expected = np.random.random(3).tolist()
    np.random.seed(0)
    plan = plan_tasks(sampler, SIZES, total_steps=200, seed=4)
    assert np.random.random(3).tolist() == expected
    assert plan.shape == (200, 3)
    assert np.array_equal(plan, plan_tasks(sampler, SIZES, total_steps=200, seed=4))
    other = plan_tasks(sampler, SIZES, total_steps=200, seed=5)
    assert np.array_equal(plan, other) == (sampler == "round_robin")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_longer_run_begins_with_the_same_plan(sampler):
    """Except where the probabilities follow the progress of the run."""
    short, long = (plan_tasks(sampler, SIZES, total_steps=steps, seed=4) for steps in (300, 900))
    assert np.array_equal(short, long[:300]) == (sampler != "annealed")


def test_annealed_plan_turns_to_the_small_tasks():
    """By the exponents 1 and 0.2: the largest task has 85 % of the first batches, but 45 % of the last."""
    plan = plan_tasks("annealed", SIZES, total_steps=3000, seed=0)
    first, last = (plan[:300] == 0).mean(), (plan[-300:] == 0).mean()
    # 900 batches each: the standard error is below 0.017, and progress moves by a tenth within them.
    assert 0.75 < first < 0.90 and 0.40 < last < 0.55


@pytest.mark.parametrize("total_steps", [0, 1])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_shortest_plans(sampler, total_steps):
    assert plan_tasks(sampler, [5, 3], total_steps, seed=0).shape == (total_steps, 2)
