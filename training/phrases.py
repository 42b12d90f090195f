"""Labelled phrases inside the training sentences (`--phrase_weight`), from the trees that label them.

SST's annotators labelled each phrase of each sentence's parse, some 17 of two words and more (Socher et al.
2013, https://aclanthology.org/D13-1170). As rows of their own (`--extra_data sst_trees`) they take many times
as long as the sentences. Here the encoder reads the sentence once; the head sees each phrase as the pooled
hidden states of its own positions, which know their context, and the mean of the phrases' losses is added to
the sentence's.

A tree belongs to the sentence with the same word pieces, its words being encoded one by one; so each word's
positions are known. Phrases that occur as an example of a dev or test file are left out, and so are those of
sentences without a label.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from datasets import Phrases, TaskData, clean_text
from training.settings import PhraseSettings
from training.sources import EXTRA_SOURCES, read_cells, source_paths, text_key

if TYPE_CHECKING:  # the flags take their choices from here; see datasets
    from tokenizer import BertTokenizer

# --- how much each phrase counts: (length in word pieces (P,), label (P,)) -> (P,) --------------------------


def equal_weights(lengths: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """All the same."""
    return np.ones(len(lengths))


def weights_by_length(lengths: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """By length: long phrases are more like the sentences that the task is about."""
    return lengths


def weights_by_label(lengths: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """All labels together the same: most short phrases are neutral, and say it again and again."""
    _, numbers, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return 1 / counts[numbers]


PHRASE_WEIGHTINGS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "equal": equal_weights,
    "length": weights_by_length,
    "label": weights_by_label,
}


# --- from trees to phrases ----------------------------------------------------------------------------------


def phrase_sources(tasks: Iterable[str]) -> dict[str, str]:
    """Those of the tasks that have trees, each with the name of its source."""
    return {
        source.task: name
        for name, source in EXTRA_SOURCES.items()
        if source.form == "trees" and source.task in tasks
    }


def tree_files(task: str, data_dir: Path) -> list[Path]:
    return source_paths(phrase_sources([task])[task], data_dir)


@dataclass(frozen=True)
class Tree:
    """A sentence with its labelled phrases, the whole sentence among them."""

    words: list[str]
    nodes: list[tuple[int, int, float]]  # first word, the one after the last, label


def read_tree_file(path: Path, task: str) -> list[Tree]:
    """The trees of a file.

    Raises:
        UserError: if it is missing or unreadable; naming file:line if there is one.
    """
    rows = read_cells(path, EXTRA_SOURCES[phrase_sources([task])[task]], "--phrase_weight")
    trees = {}
    for line, row, label in rows:
        tree = trees.setdefault(line, Tree(row["words"], []))  # all nodes of a line share their words
        if label is not None:
            tree.nodes.append((row["first"], row["last"], label))
    return list(trees.values())


def make_phrases(
    data: TaskData,
    trees: Iterable[Tree],
    tokenizer: "BertTokenizer",
    settings: PhraseSettings,
    held_out: Collection[tuple[str, ...]],
) -> tuple[Phrases, str]:
    """Align trees with the sentences of a task.

    Args:
        held_out: `sources.text_key` of all examples of dev and test files.

    Returns:
        the phrases, and a line that says how many there are and how many were left out.
    """
    # 1. Each word's pieces and key, and the tree of each sequence of word pieces.
    words = sorted({word for tree in trees for word in tree.words})
    clean = [clean_text(word) for word in words]
    pieces = [each["input_ids"][1:-1] for each in tokenizer.encode_batch(clean)]
    pieces = dict(zip(words, pieces, strict=True))
    keys = {word: text_key((text,))[0] for word, text in zip(words, clean, strict=True)}
    longest = int(data.sequences.lengths.max()) - 2  # a longer sentence would have been cut
    by_pieces: dict[tuple[int, ...], Tree] = {}
    for tree in trees:
        ids = tuple(chain.from_iterable(pieces[word] for word in tree.words))
        by_pieces.setdefault(ids[:longest], tree)

    # 2. The phrases of each example: not the sentence itself, nothing that was cut, no held-out example.
    chosen, offsets, num_aligned, num_leaked = [], [0], 0, 0
    offset_pairs = zip(data.sequences.offsets[:-1], data.sequences.offsets[1:], strict=True)
    sequences = [
        tuple(data.sequences.input_ids[start + 1 : stop - 1].tolist()) for start, stop in offset_pairs
    ]
    for number, own_label in zip(data.index[:, 0], data.rows.labels, strict=True):
        # None in a sentence without a label: in those of the test file (--transductive) they would tell it.
        sequence, is_labelled = sequences[number], not np.isnan(own_label)
        tree = by_pieces.get(sequence if is_labelled else None, Tree([], []))
        num_aligned += bool(tree.words)
        bounds = list(accumulate((len(pieces[word]) for word in tree.words), initial=1))  # [CLS] is before
        for first, last, label in tree.nodes:
            start, stop = bounds[first], bounds[last]
            is_phrase = settings.min_words <= last - first < len(tree.words)
            if is_phrase and start < stop <= len(sequence) + 1:
                if ("".join(keys[word] for word in tree.words[first:last]),) in held_out:
                    num_leaked += 1
                else:
                    chosen.append((start, stop, label))
        offsets.append(len(chosen))
    starts, stops, labels = np.array(chosen, dtype=np.int64).reshape(-1, 3).T
    counts_as = PHRASE_WEIGHTINGS[settings.weighting](stops - starts, labels).astype(np.float32)
    phrases = Phrases(starts, stops, labels, counts_as, np.array(offsets), settings.weight, settings.limit)
    return phrases, (
        f"{len(labels)} in {num_aligned} of {len(data)} training sentences; {num_leaked} that stand in a"
        " dev or test file are left out"
    )
