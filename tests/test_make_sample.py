"""The sample data: reproducible, in the course's format, and without leaks between its splits."""

import csv
import importlib.util
import io
import re
from collections import Counter
from pathlib import Path

import pytest

import config
import datasets
import extra_data
from config import DEFAULT_TASKS, EXTRA_SOURCES

SCRIPT = Path(__file__).resolve().parents[1] / "data" / "make_sample.py"
SAMPLE_DIR = SCRIPT.parent / "sample"
HEADERS = {
    "ids-sst-train.csv": b"\tid\tsentence\tsentiment\n",
    "ids-sst-dev.csv": b"\tid\tsentence\tsentiment\n",
    "ids-sst-test-student.csv": b"0\t\tid\tsentence\n",
    "quora-train.csv": b"\tid\tsentence1\tsentence2\tis_duplicate\n",
    "quora-dev.csv": b"\tid\tsentence1\tsentence2\tis_duplicate\n",
    "quora-test-student.csv": b"\tid\tsentence1\tsentence2\n",
    "sts-train.csv": b"\tid\tsentence1\tsentence2\tsimilarity\n",
    "sts-dev.csv": b"\tid\tsentence1\tsentence2\tsimilarity\n",
    "sts-test-student.csv": b"\tid\tsentence1\tsentence2\n",
}
TASKS = {"ids-sst": (1600, 300, 300), "quora": (2000, 400, 400), "sts": (1200, 300, 300)}
SPLITS = ("train", "dev", "test-student")


def load_script():
    spec = importlib.util.spec_from_file_location("make_sample", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_sample = load_script()


def read_rows(name):
    with open(SAMPLE_DIR / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.fixture(scope="module")
def generated():
    return make_sample.make_files(seed=0)


@pytest.fixture(scope="module")
def extra(generated):
    return make_sample.make_extra_files(0, generated)


@pytest.fixture(scope="module")
def tables():
    return {name: read_rows(name) for name in HEADERS}


def texts_of(row):
    return [row[column] for column in ("sentence", "sentence1", "sentence2") if row.get(column)]


def words_of(rows):
    return {word for row in rows for text in texts_of(row) for word in re.findall(r"[a-z]+", text.lower())}


# ---------------------------------------------------------------- reproducibility


def test_committed_files_are_what_the_script_makes(generated, extra):
    assert set(generated) == set(HEADERS)
    on_disk = {str(path.relative_to(SAMPLE_DIR)) for path in SAMPLE_DIR.rglob("*") if path.is_file()}
    assert on_disk == set(generated) | set(extra)
    for name, content in (generated | extra).items():
        assert (SAMPLE_DIR / name).read_bytes() == content, name


def test_same_seed_same_bytes_other_seed_other_bytes(monkeypatch):
    monkeypatch.setattr(make_sample, "SIZES", {task: (20, 8, 8) for task in make_sample.SIZES})
    first, again, other = (make_sample.make_files(seed) for seed in (0, 0, 1))
    assert first == again
    assert all(other[name] != first[name] for name in first)
    assert make_sample.make_extra_files(0, first) == make_sample.make_extra_files(0, first)


def test_all_files_together_are_small(generated, extra):
    assert sum(len(content) for content in (generated | extra).values()) < 1_100_000


def test_additional_sources_are_read_and_add_new_rows(extra):
    """As `--extra_data` does: nothing leaks, nothing is known already, every row has a label."""
    names = [name for name, source in EXTRA_SOURCES.items() if any(file in extra for file in source.files)]
    assert {file for name in names for file in EXTRA_SOURCES[name].files} == set(extra)
    files = [
        (SAMPLE_DIR / config.TASKS[task].files[split], config.TASKS[task], split)
        for task in DEFAULT_TASKS
        for split in ("dev", "test")
    ]
    held_out = extra_data.held_out_keys(files)
    for name in names:
        task = EXTRA_SOURCES[name].task
        rows = datasets.read_rows(SAMPLE_DIR / config.TASKS[task].files["train"], config.TASKS[task], "train")
        extended, (line,) = extra_data.add_sources(rows, {name: None}, SAMPLE_DIR, held_out)
        assert len(extended.ids) - len(rows.ids) >= make_sample.EXTRA_SIZE, name
        assert "0 in a dev or test file" in line and "0 without a usable" in line
        if name != "sst_trees":  # its roots are training sentences, its words recur
            assert "0 known already" in line


def test_tree_by_hand():
    assert make_sample.write_tree(["a", "b", "c"], "3") == "(3 (2 a) (2 (2 b) (2 c)))"
    assert make_sample.write_tree(["a", "b", "c"], "0") == "(0 (2 a) (0 (2 b) (2 c)))"
    assert make_sample.write_tree(["a"], "1") == "(1 a)"


def test_command_line_writes_and_checks(tmp_path, capsys, generated, extra, monkeypatch):
    monkeypatch.setattr(make_sample, "make_files", lambda seed: generated)
    flags = ["--output_dir", str(tmp_path / "new")]
    assert make_sample.main(flags) == 0
    assert make_sample.main([*flags, "--check"]) == 0
    written = {
        str(path.relative_to(tmp_path / "new")) for path in (tmp_path / "new").rglob("*") if path.is_file()
    }
    assert written == set(generated | extra)  # nothing temporary
    capsys.readouterr()

    (tmp_path / "new" / "sts-dev.csv").write_bytes(b"changed")
    (tmp_path / "new" / "quora-dev.csv").unlink()
    assert make_sample.main([*flags, "--check"]) == 1
    printed = capsys.readouterr().out
    assert "sts-dev.csv" in printed and "quora-dev.csv" in printed and "sts-train.csv" not in printed


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path, capsys, generated, monkeypatch):
    monkeypatch.setattr(make_sample, "make_files", lambda seed: generated)
    (tmp_path / "file").write_text("")
    assert make_sample.main(["--output_dir", str(tmp_path / "file" / "sample")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_running_out_of_rows_is_an_error():
    taken = type("Everything", (), {"isdisjoint": lambda self, keys: False})()
    with pytest.raises(ValueError, match="only 0 of 5 sst rows"):
        make_sample.make_rows(make_sample.Random(0), "sst", 5, False, taken)


# ---------------------------------------------------------------- format


@pytest.mark.parametrize("name", HEADERS)
def test_bytes_are_the_courses(name):
    content = (SAMPLE_DIR / name).read_bytes()
    assert content.startswith(HEADERS[name])
    assert content.endswith(b"\n") and b"\r" not in content
    num_columns = HEADERS[name].count(b"\t") + 1
    rows = list(csv.reader(io.StringIO(content.decode()), delimiter="\t"))
    assert {len(row) for row in rows} == {num_columns}


@pytest.mark.parametrize("task", TASKS)
def test_sizes(task, tables):
    assert tuple(len(tables[f"{task}-{split}.csv"]) for split in SPLITS) == TASKS[task]


def test_ids_are_25_hex_characters_and_unique(tables):
    ids = [row["id"] for rows in tables.values() for row in rows]
    assert all(re.fullmatch("[0-9a-f]{25}", row_id) for row_id in ids)
    assert len(set(ids)) == len(ids)


def test_sst_test_file_has_the_shifted_header(tables):
    rows = tables["ids-sst-test-student.csv"]
    assert [row["0"] for row in rows] == [str(i + 1) for i in range(len(rows))]
    assert [row[""] for row in rows] == [f"{i}.0" for i in range(len(rows))]


@pytest.mark.parametrize("task", ["quora", "sts"])
def test_pair_indices_are_unique_and_out_of_order(task, tables):
    indices = [int(row[""]) for split in SPLITS for row in tables[f"{task}-{split}.csv"]]
    assert len(set(indices)) == len(indices)
    assert indices != sorted(indices) and max(indices) > len(indices)


@pytest.mark.parametrize("split", SPLITS)
def test_sst_sentences_are_split_at_punctuation(split, tables):
    for row in tables[f"ids-sst-{split}.csv"]:
        assert row["sentence"].startswith(" ") and not row["sentence"].startswith("  ")
        assert re.fullmatch(r"(?: [\w'-]+| [.,;:!])+", row["sentence"]), row["sentence"]


@pytest.mark.parametrize("split", SPLITS)
def test_some_questions_carry_doubled_quotation_marks(split, tables):
    texts = [text for row in tables[f"quora-{split}.csv"] for text in texts_of(row)]
    doubled = [text for text in texts if re.fullmatch(r'"[^"]+""[^"]+""[^"]*"', text)]
    once = [text for text in texts if re.fullmatch(r'[^"]+"[^"]+"[^"]*', text)]
    assert len(doubled) > len(once) > 0


def test_test_files_have_no_label():
    for name, header in HEADERS.items():
        columns = header.decode().strip("\n").split("\t")
        has_label = {"sentiment", "is_duplicate", "similarity"} & set(columns)
        assert bool(has_label) == ("test" not in name)


# ---------------------------------------------------------------- labels


@pytest.mark.parametrize("split", ["train", "dev"])
def test_sentiments_are_balanced(split, tables):
    counts = Counter(row["sentiment"] for row in tables[f"ids-sst-{split}.csv"])
    assert sorted(counts) == list("01234")
    assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("split", ["train", "dev"])
def test_quora_labels(split, tables):
    rows = tables[f"quora-{split}.csv"]
    counts = Counter(row["is_duplicate"] for row in rows)
    assert set(counts) == {"0.0", "1.0", ""} and counts[""] == 1
    assert counts["1.0"] / len(rows) == pytest.approx(0.375, abs=0.01)
    (cut,) = [row for row in rows if not row["is_duplicate"]]
    assert (cut["sentence2"] == "") == (split == "train")


@pytest.mark.parametrize("split", ["train", "dev"])
def test_similarities_fill_their_range_with_one_decimal(split, tables):
    scores = [row["similarity"] for row in tables[f"sts-{split}.csv"]]
    assert all(re.fullmatch(r"[0-4]\.\d|5\.0", score) for score in scores)
    bands = Counter(min(int(float(score)), 4) for score in scores)
    assert min(bands.values()) > 0.1 * len(scores)


def test_similarity_by_hand():
    """Weights 3 and 1: the heavy slot differs within its group, the light one is only said once."""
    cat, dog = make_sample.Concept(("cat",), 0), make_sample.Concept(("dog",), 0)
    bus, here = make_sample.Concept(("bus",), 1), make_sample.Concept(("here",), 0)
    block = make_sample.Block({}, {"thing": 3.0, "place": 1.0}, "", [])
    full, bare = "a {thing} {place}", "a {thing}"
    same = {"thing": cat, "place": here}
    assert make_sample.similarity(block, (full, same), (full, same)) == 5
    assert make_sample.similarity(block, (bare, same), (bare, same | {"thing": bus})) == pytest.approx(0.4)
    expected = 0.4 + 4.6 * ((3 * 0.45 + 1 * 0.6) / 4) ** 1.4
    assert make_sample.similarity(block, (full, same), (bare, same | {"thing": dog})) == pytest.approx(
        expected
    )


def test_similarity_says_nothing_about_one_sentence_alone(tables):
    """The mean score of the rows whose first sentence holds a word hardly depends on the word."""
    scores = {}
    for row in tables["sts-train.csv"]:
        for word in words_of([{"sentence": row["sentence1"]}]):
            scores.setdefault(word, []).append(float(row["similarity"]))
    means = [sum(found) / len(found) for found in scores.values() if len(found) >= 100]
    assert len(means) > 5
    assert all(2.0 < mean < 3.0 for mean in means)


# ---------------------------------------------------------------- splits


@pytest.mark.parametrize("task", TASKS)
def test_no_sentence_is_in_two_splits(task, tables):
    splits = []
    for split in SPLITS:
        texts = [texts_of(row) for row in tables[f"{task}-{split}.csv"]]
        splits.append({make_sample.text_key(text) for row_texts in texts for text in row_texts})
    train, dev, test = splits
    assert not (train & dev or train & test or dev & test)


@pytest.mark.parametrize("name", HEADERS)
def test_no_row_is_repeated(name, tables):
    rows = [frozenset(make_sample.text_key(text) for text in texts_of(row)) for row in tables[name]]
    assert len(set(rows)) == len(rows)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["dev", "test-student"])
def test_nearly_every_evaluation_row_has_words_unseen_in_training(task, split, tables):
    seen = words_of(tables[f"{task}-train.csv"])
    rows = tables[f"{task}-{split}.csv"]
    assert sum(bool(words_of([row]) - seen) for row in rows) > 0.95 * len(rows)
    assert len(words_of(rows) - seen) > 200


@pytest.mark.parametrize(
    ("task", "source"),
    [("ids-sst", "SENTIMENT_TABLES"), ("quora", "QUESTION_TABLES"), ("sts", "SCENE_TABLES")],
)
def test_held_out_words_are_never_in_training(task, source, tables):
    def spaced(text):
        return " " + " ".join(re.findall(r"[\w'-]+", text.lower())) + " "

    training = " | ".join(spaced(text) for row in tables[f"{task}-train.csv"] for text in texts_of(row))
    for line in getattr(make_sample, source).strip().split("\n"):
        for _, held_out in make_sample.read_tables()[line.split(":")[0]]:
            words = [word for concept in held_out for word in concept.words]
            for form in (form for word in words for form in word.split("~")):
                assert spaced(form) not in training, form


def test_templates_name_only_slots_and_tables():
    """A misspelt slot would only fail on the draw that meets it."""
    names = set(make_sample.read_tables())
    for text in (make_sample.QUESTION_BLOCKS, make_sample.SCENE_BLOCKS):
        for block in make_sample.read_blocks(text):
            assert set(block.tables.values()) <= names
            known = names | set(block.tables) | {"be", "was"}
            for template in (template for line in block.lines for template in line):
                assert set(re.findall(r"\{(\w+)~?\}", template)) <= known, template
