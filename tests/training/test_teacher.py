"""What is trained for where a teacher answers beside the labels, and what is trained on without labels."""

import numpy as np
import pytest
import torch

from config import TASKS
from datasets import read_rows
from evaluation import TASK_KINDS
from tests.tiny import make_data, refusal
from training.args_file import read_ensemble
from training.flags import get_args
from training.resolve import data_settings
from training.run_data import add_unlabelled
from training.teacher import mix_targets

LABELS = {"sst": [3, 0, 4], "para": [1, 0, 1], "sts": [2.0, 0.5, 5.0]}


@pytest.mark.parametrize(
    ("task", "answer", "expected"),  # for a label of 1 and a weight of 1/4
    [
        ("sst", [0.2, 0.4, 0.4, 0.0, 0.0], [0.05, 0.85, 0.1, 0.0, 0.0]),
        ("para", [0.8, 0.2], 0.8),
        ("sts", [3.0], 1.5),
    ],
)
def test_targets_by_hand(task, answer, expected):
    found = mix_targets(TASKS[task], np.array([1.0, np.nan]), np.array([answer, answer]), 0.25)
    assert found.dtype == np.float32 and found[0] == pytest.approx(expected)
    assert found[1] == pytest.approx(answer if task == "sst" else answer[-1])  # without a label


@pytest.mark.parametrize("task", LABELS)
def test_gradients_are_mixed_as_targets_are(task):
    """And so a teacher that answers with the labels changes nothing."""
    spec, labels, rng = TASKS[task], np.array(LABELS[task], dtype=np.float32), np.random.default_rng(0)
    kind = TASK_KINDS[spec.kind]
    answers = rng.dirichlet(np.ones(5), 3) if task == "sst" else rng.random((3, 1))
    logits = torch.randn(3, kind.num_outputs(spec), generator=torch.Generator().manual_seed(0))

    def grad(targets):
        leaf = logits.clone().requires_grad_()
        kind.loss(leaf, torch.from_numpy(targets)).backward()
        return leaf.grad

    mixed = grad(mix_targets(spec, labels, answers, 0.25))
    expected = 0.75 * grad(labels) + 0.25 * grad(mix_targets(spec, labels, answers, 1.0))
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-6)  # float32
    sure = np.eye(5)[labels.astype(int)] if task == "sst" else labels[:, None]
    torch.testing.assert_close(grad(mix_targets(spec, labels, sure, 0.25)), grad(labels), rtol=0, atol=1e-6)


def test_held_out_sentences_are_not_trained_on_unless_named(tmp_path):
    """Of a file with another task's training pairs, and all pairs of the task: known, dev and test ones."""
    folder, spec = make_data(tmp_path / "data"), TASKS["sts"]
    quora = read_rows(folder / "quora-train.csv", TASKS["para"], "train").texts
    rows = {split: read_rows(folder / name, spec, split) for split, name in spec.files.items()}
    pairs = [("sentence1", "sentence2"), *quora, *(pair for each in rows.values() for pair in each.texts)]
    path = tmp_path / "pairs.csv"
    path.write_text("".join(f"{first}\t{second}\n" for first, second in pairs))

    def added(*flags):
        settings = data_settings(get_args(["--data_dir", str(folder), "--teacher", "x", *flags]))
        found = add_unlabelled(settings, {"sts": rows["train"]})[0]["sts"]
        assert np.isnan(found.labels).tolist() == [n >= 24 for n in range(len(found.ids))]
        return {row_id.partition("-")[0] for row_id in found.ids[24:]}, found.texts[24:]

    file = ["--sts_unlabelled", str(path)]
    assert added(*file) == ({"unlabelled"}, quora)
    assert len(added(*file, "--unlabelled_ratio", "0.5")[1]) == 12
    assert added("--transductive", "sts") == ({"test"}, rows["test"].texts)
    assert added() == (set(), [])
    assert refusal(added, "--sts_unlabelled", "none.csv").startswith("--sts_unlabelled: none.csv: ")


@pytest.mark.parametrize(
    "content",
    ["{}", '{"members": [1]}', '{"members": [{"run": "a", "sha256": "b", "pretrained": "c"}]}']
    + [
        f'{{"members": [{{"run": "a", "sha256": "b", "pretrained": "c", "weight": {{"sst": {weight}}}}}]}}'
        for weight in ("-1", "NaN", "1e999", '"x"')
    ],
)
def test_damaged_ensemble_is_refused(tmp_path, content):
    (tmp_path / "ensemble.json").write_text(content)
    assert "ensemble.json: damaged (" in refusal(read_ensemble, tmp_path)
