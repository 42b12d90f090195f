"""Masking, the tied prediction head against Hugging Face's, and pre-training runs: whole, stopped, refused.

Shapes: B sentences, T padded length, H hidden_size, V vocab_size, M masked positions.
"""

import csv
import json
import math
import re
import shutil
import signal
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from bert import BertModel
from config import DEFAULT_TASKS, TASKS
from datasets import read_rows
from optimizer import lr_factor
from support.device import make_autocast
from support.errors import UserError
from support.seeds import make_seed
from tests.tiny import make_config, make_data, make_encoder, one_line, randomise
from tokenizer import BertTokenizer
from training import pretrain_mlm
from training.loss_scale import LossScale
from training.masked_lm import BertForMaskedLM, MaskedText, load_head, mask_tokens
from training.pretrain_mlm import (
    ENCODER_FILES,
    LAST,
    NEW,
    OUTPUT_FILES,
    TENSORS_FILE,
    evaluate,
    find_run,
    main,
    make_optimizer,
    read_sentences,
    train_step,
)
from training.sources import EXTRA_SOURCES
from training.task_file import set_own_tasks

V = 60
NUM_SPECIAL = 5
PAD, UNK, CLS, SEP, MASK = range(NUM_SPECIAL)
IS_WORD = torch.arange(V) >= NUM_SPECIAL
TINY = "--max_steps 6 --batch_size 16 --lr 0.01 --warmup_ratio 0.34 --device cpu --precision fp32"
TINY += " --log_every 4 --save_every 2"

REFERENCE = """
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertForMaskedLM, BertModel

inputs = load_file("inputs.safetensors")
model = BertForMaskedLM.from_pretrained("model", attn_implementation="eager").eval()
with torch.no_grad():
    logits = model(**inputs).logits
    model.save_pretrained("saved")
    encoder = BertModel.from_pretrained("run", attn_implementation="eager").eval()
    last = encoder(**inputs).last_hidden_state
ids = AutoTokenizer.from_pretrained("run")("a b, cat")["input_ids"]
save_file({"logits": logits, "last": last, "ids": torch.tensor(ids)}, "results.safetensors")
"""


def make_model(seed=0, **changes):
    return randomise(BertForMaskedLM(BertModel(make_config(V, **changes))), seed).eval()


def make_input_ids(num_sentences, length, seed=0):
    """Random words between [CLS] and [SEP], an [UNK], and padding up to (B, length + 4)."""
    words = torch.randint(
        NUM_SPECIAL, V, (num_sentences, length), generator=torch.Generator().manual_seed(seed)
    )
    special = torch.full((num_sentences, 1), CLS)
    return torch.cat([special, words, special + UNK - CLS, special + SEP - CLS, special + PAD - CLS], dim=1)


def make_batch(seed=0):
    """B = 5 sentences, T = 11, masked."""
    input_ids = make_input_ids(5, 7, seed)
    masked, chosen = mask_tokens(input_ids, IS_WORD, MASK, 0.3, torch.Generator().manual_seed(seed))
    attention_mask = (input_ids != PAD).long()
    labels = input_ids[chosen]
    return {"input_ids": masked, "attention_mask": attention_mask, "chosen": chosen, "labels": labels}


def run(place, flags="", out="out"):
    """Run the script on the tiny encoder and data; flags here override TINY. Returns the exit code."""
    argv = f"--data_dir {place}/data --pretrained {place}/encoder --output_dir {place / out} {TINY} {flags}"
    try:
        return main(argv.split())
    except SystemExit as stop:
        return stop.code


def stop_at(monkeypatch, name, number, act):
    """Let `act` happen when `train_step` or `evaluate` is called for the n-th time, counted from 0."""
    real, calls = getattr(pretrain_mlm, name), iter(range(99))

    def stopping(*args, **options):
        if next(calls) == number:
            act()
        return real(*args, **options)

    monkeypatch.setattr(pretrain_mlm, name, stopping)


def interrupt():
    raise KeyboardInterrupt


def terminate():
    signal.raise_signal(signal.SIGTERM)


@pytest.fixture(scope="module")
def watched():
    """The learning rates and the loss of each update of the undisturbed run."""
    return [], []


@pytest.fixture(scope="module")
def place(tmp_path_factory, watched):
    """Encoder, data, and in `run` what an undisturbed run gives."""
    folder, (rates, losses) = tmp_path_factory.mktemp("mlm"), watched
    make_encoder(folder / "encoder")
    make_data(folder / "data")

    def watched_step(model, optimizer, *args, **options):
        rates.append([group["lr"] for group in optimizer.param_groups])
        result = train_step(model, optimizer, *args, **options)
        losses.append(result[0])
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain_mlm, "train_step", watched_step)
        assert run(folder, out="run") == 0
    return folder


@pytest.fixture(scope="module")
def reference(place, run_transformers):
    """What Hugging Face computes with our weights and with the encoder of the undisturbed run."""
    model = make_model()
    (place / "model").mkdir()
    model.bert.config.to_json(place / "model" / "config.json")
    weights = {f"bert.{name}": tensor for name, tensor in model.bert.state_dict().items()}
    weights |= {f"cls.predictions.{name}": tensor for name, tensor in model.predictions.state_dict().items()}
    save_file(weights, place / "model" / "model.safetensors", metadata={"format": "pt"})
    batch = make_batch()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    save_file(inputs, place / "inputs.safetensors")
    run_transformers(REFERENCE, place)
    return load_file(place / "results.safetensors")


# --- masking --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mlm_prob", [0.15, 0.4])
def test_mask_rates(mlm_prob):
    input_ids = make_input_ids(500, 100)
    masked, chosen = mask_tokens(input_ids, IS_WORD, MASK, mlm_prob, torch.Generator().manual_seed(1))

    def within(count, total, prob):  # 4 standard deviations of the binomial; the seed is fixed
        return abs(count - total * prob) < 4 * math.sqrt(total * prob * (1 - prob))

    total = int(chosen.sum())
    assert within(total, int(IS_WORD[input_ids].sum()), mlm_prob)
    after, before = masked[chosen], input_ids[chosen]
    num_words = V - NUM_SPECIAL
    assert within(int((after == MASK).sum()), total, 0.8)
    assert within(int((after == before).sum()), total, 0.1 + 0.1 / num_words)  # kept, or drawn by chance
    changed = after[(after != MASK) & (after != before)]
    assert within(len(changed), total, 0.1 * (1 - 1 / num_words))
    assert set(changed.tolist()) == set(range(NUM_SPECIAL, V))  # every word piece, no special token
    assert torch.equal(masked[~chosen], input_ids[~chosen])


def test_special_tokens_are_never_chosen_and_arguments_stay():
    input_ids, is_word = make_input_ids(50, 20), IS_WORD.clone()
    copy = input_ids.clone()
    masked, chosen = mask_tokens(input_ids, is_word, MASK, 0.9, torch.Generator().manual_seed(0))
    special = copy < NUM_SPECIAL
    assert not chosen[special].any() and torch.equal(masked[special], copy[special])
    assert torch.equal(input_ids, copy) and torch.equal(is_word, IS_WORD)


def test_at_least_one_position_is_masked():
    for seed in range(20):
        input_ids = make_input_ids(1, 2, seed)
        _, chosen = mask_tokens(input_ids, IS_WORD, MASK, 1e-6, torch.Generator().manual_seed(seed))
        assert chosen.sum() == 1 and IS_WORD[input_ids[chosen]].all()
    with pytest.raises(ValueError, match="special tokens only"):
        mask_tokens(torch.tensor([[CLS, UNK, SEP]]), IS_WORD, MASK, 0.15, torch.Generator())


def test_masks_depend_on_the_seed_only(place):
    tokenizer = BertTokenizer.from_pretrained(place / "encoder")
    text = MaskedText(["cat and dog", "a fox", "日", "the sea"], tokenizer, 20, 0.5)
    assert len(text.lengths) == 3  # the sentence of which nothing but [UNK] is left has nothing to mask
    rows = np.arange(3)
    batches = [text.batch(rows, make_seed(7, step, 1)) for step in (0, 0, 1)]
    same = [torch.equal(batches[0]["chosen"], batch["chosen"]) for batch in batches]
    assert same == [True, True, False]
    assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
    original = text.sequences.pad(rows, PAD)["input_ids"]
    assert torch.equal(batches[2]["labels"], original[batches[2]["chosen"]])


# --- the model ------------------------------------------------------------------------------------


def test_logits_against_hugging_face(reference):
    batch = make_batch()
    with torch.no_grad():
        logits = make_model()(batch["input_ids"], batch["attention_mask"], batch["chosen"])
    assert logits.shape == (int(batch["chosen"].sum()), V) and logits.dtype == torch.float32
    # Both sides compute in float32 and add in another order; logits are of order 1.
    torch.testing.assert_close(logits, reference["logits"][batch["chosen"]], rtol=0, atol=2e-5)
    with torch.no_grad():
        loss = make_model().loss(batch)
    expected = F.cross_entropy(reference["logits"][batch["chosen"]], batch["labels"])
    torch.testing.assert_close(loss, expected, rtol=0, atol=2e-5)


def test_head_comes_from_the_checkpoint(place, reference, tmp_path):
    model = make_model()
    for folder in (place / "model", place / "saved"):  # ours, and as Hugging Face saves it
        loaded = BertForMaskedLM(BertModel.from_pretrained(folder))
        assert load_head(loaded, str(folder)) == "5 of 5 weights loaded"
        for name, tensor in model.state_dict().items():
            if not name.startswith("bert.pooler"):  # Hugging Face's masked model has none
                assert torch.equal(loaded.state_dict()[name], tensor), name
    # Names of the TensorFlow era, as bert-base-uncased has them, and one weight missing.
    weights = load_file(place / "model" / "model.safetensors")
    for new, old in (("weight", "gamma"), ("bias", "beta")):
        name = "cls.predictions.transform.LayerNorm."
        weights[name + old] = weights.pop(name + new)
    del weights["cls.predictions.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    fresh = BertForMaskedLM(BertModel(model.bert.config))
    assert load_head(fresh, str(tmp_path)) == "4 of 5 weights loaded; new: bias"
    for name in ("weight", "bias"):
        name = f"transform.LayerNorm.{name}"
        assert torch.equal(fresh.predictions.state_dict()[name], model.predictions.state_dict()[name])


def test_new_head_is_initialised_as_bert_does(place):
    torch.manual_seed(0)
    model = BertForMaskedLM(BertModel(make_config(V, hidden_size=128)))
    assert load_head(model, str(place / "encoder")).startswith("0 of 5 weights loaded; new: bias, ")
    transform = model.predictions.transform
    std = transform["dense"].weight.std().item()
    assert abs(std - 0.02) < 4 * 0.02 / math.sqrt(2 * 128**2)  # 4 standard errors of a normal's std
    assert not model.predictions.bias.any() and not transform["dense"].bias.any()
    assert (transform["LayerNorm"].weight == 1).all() and not transform["LayerNorm"].bias.any()


def test_word_embedding_is_tied_and_its_gradient_has_both_parts():
    model, batch = make_model(), make_batch()
    weight = model.bert.embeddings.word_embeddings.weight
    assert sum(param.shape == weight.shape for param in model.parameters()) == 1
    model.loss(batch).backward()
    tied = weight.grad.clone()
    model.zero_grad()
    # The same with a second matrix in the decoder: the two gradients are the parts.
    decoder = weight.detach().clone().requires_grad_()
    hidden_states = model.bert(batch["input_ids"], batch["attention_mask"])["last_hidden_state"]  # (B, T, H)
    hidden_states = hidden_states[batch["chosen"]]  # (M, H)
    transform = model.predictions.transform
    hidden_states = transform["LayerNorm"](F.gelu(transform["dense"](hidden_states)))
    logits = F.linear(hidden_states, decoder, model.predictions.bias)
    F.cross_entropy(logits, batch["labels"]).backward()
    assert weight.grad.abs().max() > 0.01 and decoder.grad.abs().max() > 0.01
    # Sums of float32 numbers of order 0.1, in another order.
    torch.testing.assert_close(tied, weight.grad + decoder.grad, rtol=0, atol=1e-6)


def test_one_update_changes_every_trainable_parameter_and_not_the_pooler():
    model = make_model().train()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer = make_optimizer(model, 0.01, 0.01)
    decays, rest = (group["params"] for group in optimizer.param_groups)
    assert all(param.ndim == 2 for param in decays) and all(param.ndim == 1 for param in rest)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    loss, grad_norm = train_step(model, optimizer, make_batch(), seed=0, clip_norm=1.0)
    assert loss > 0 and grad_norm > 0
    for name, param in model.named_parameters():
        if not name.endswith("key.bias"):  # softmax ignores it: its gradient is rounding, it may stay
            assert torch.equal(param, before[name]) == name.startswith("bert.pooler."), name


def test_update_repeats_and_clips():
    models = [make_model().train() for _ in range(3)]
    results = []
    for model, seed in zip(models, (5, 5, 6), strict=True):
        results.append(
            train_step(model, make_optimizer(model, 0.01, 0.0), make_batch(), seed=seed, clip_norm=0.1)
        )
        grads = [param.grad for param in model.parameters() if param.grad is not None]
        # float32: the norm of a clipped gradient is the limit but for rounding and torch's epsilon of 1e-6.
        assert math.sqrt(sum(float(grad.square().sum()) for grad in grads)) == pytest.approx(0.1, rel=1e-4)
    assert results[0] == results[1] != results[2]  # dropout follows the seed


@pytest.mark.parametrize("clip_norm", [0.0, 0.1])
def test_loss_scale_changes_no_float32_update(clip_norm):
    """But for torch's epsilon of 1e-6 when it clips."""
    outcomes = []
    for loss_scale in (1, 2**14):
        model = make_model().train()
        options = {"seed": 5, "clip_norm": clip_norm, "loss_scale": loss_scale}
        result = train_step(model, make_optimizer(model, 0.01, 0.01), make_batch(), **options)
        outcomes.append((result, torch.cat([param.detach().flatten() for param in model.parameters()])))
    (result, params), (scaled_result, scaled_params) = outcomes
    assert scaled_result == result
    assert clip_norm or torch.equal(scaled_params, params)
    torch.testing.assert_close(scaled_params, params, rtol=0, atol=1e-4 if clip_norm else 0)


def test_float16_step_overflows_or_is_near_that_in_float32():
    model, exact = make_model(), make_model()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer, autocast = make_optimizer(model, 0.01, 0.01), make_autocast("cpu", "fp16")
    step = partial(train_step, model, optimizer, make_batch(), seed=0, autocast=autocast)
    assert step(loss_scale=2**24)[1] is None
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())
    loss, grad_norm = step(loss_scale=2**10)
    expected = train_step(exact, make_optimizer(exact, 0.01, 0.01), make_batch(), seed=0)
    assert (loss, grad_norm) == pytest.approx(expected, rel=4e-3) and loss != expected[0]
    with torch.no_grad():
        model.predictions.bias.fill_(math.nan)
    with pytest.raises(UserError, match="loss nan"):
        step(loss_scale=2**10)


def test_float16_run_goes_on_with_the_same_bits_after_overflows(place, monkeypatch, capsys):
    """The first steps overflow, and the run is saved and stopped before any update was made."""
    monkeypatch.setattr(LossScale.__init__, "__defaults__", (2**24, 0, 0))
    flags = "--precision fp16 --save_every 1 --max_steps 12 --log_every 4"
    assert run(place, flags, "half") == 0
    lines = [json.loads(line) for line in (place / "half" / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "loss" in line][-1]
    count = last["overflow_steps"]
    assert 4 <= count < 12 and last["loss_scale"] == 2 ** (24 - count)
    assert f"\n{count} of 12 steps were skipped because" in capsys.readouterr().out
    for step in (2, count + 1):
        with monkeypatch.context() as patch:
            stop_at(patch, "train_step", step, interrupt)
            assert run(place, flags, f"half{step}") == 130
        assert run(place, flags, f"half{step}") == 0
        for name in ("model.safetensors", "metrics.jsonl"):
            assert (place / f"half{step}" / name).read_bytes() == (place / "half" / name).read_bytes()


def test_loss_falls_on_a_tiny_corpus(place):
    tokenizer = BertTokenizer.from_pretrained(place / "encoder")
    text = MaskedText(["a b c d e f g h", "h g f e d c b a"] * 4, tokenizer, 20, 0.15)
    torch.manual_seed(0)
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForMaskedLM(BertModel(make_config(len(tokenizer), **no_dropout))).train()
    optimizer = make_optimizer(model, 0.01, 0.01)
    losses = [
        train_step(model, optimizer, text.batch(np.arange(8), make_seed(step)), seed=step, clip_norm=1.0)[0]
        for step in range(80)
    ]
    # At first all of the vocabulary is as likely; in the end less than a guess among the eight letters costs.
    assert losses[0] == pytest.approx(math.log(len(tokenizer)), abs=0.3)
    assert sum(losses[-10:]) / 10 < 0.5 * math.log(8)


def test_loss_that_is_not_finite_changes_nothing():
    model = make_model()
    with torch.no_grad():
        model.predictions.bias[7] = math.inf
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    with pytest.raises(UserError, match="smaller --lr"):
        train_step(model, make_optimizer(model, 0.01, 0.0), make_batch(), seed=0, clip_norm=1.0)
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())


def test_evaluation_repeats_without_dropout_and_keeps_the_mode(place):
    tokenizer = BertTokenizer.from_pretrained(place / "encoder")
    text = MaskedText(["a cat", "the dog ran", "a fox and a hen", "sea"], tokenizer, 20, 0.5)
    model = BertForMaskedLM(BertModel(make_config(len(tokenizer)))).train()
    losses = [evaluate(model, text, 3, seed, nullcontext) for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2] and model.training
    # The mean is over positions, not over batches.
    order = np.argsort(text.lengths, kind="stable")
    batches = [text.batch(rows, make_seed(0, start)) for start, rows in ((0, order[:3]), (3, order[3:]))]
    model.eval()
    with torch.no_grad():
        total = sum(model.loss(batch, reduction="sum").item() for batch in batches)
    assert losses[0] == total / sum(len(batch["labels"]) for batch in batches)
    evaluate(model, text, 3, 0, nullcontext)
    assert not model.training


# --- text -----------------------------------------------------------------------------------------


def read_text(data, extra_data=None, eval_max_examples=2000):
    return read_sentences(
        data, DEFAULT_TASKS, extra_data or {}, seed=11711, eval_max_examples=eval_max_examples
    )


def texts_of(data, task, split):
    return read_rows(data / TASKS[task].files[split], TASKS[task], split).texts


def test_training_text_has_each_train_sentence_once_and_no_dev_or_test_sentence(tmp_path):
    data = make_data(tmp_path / "data")
    for task in ("sst", "sts"):  # dev and test rows in a train file
        path, spec = data / TASKS[task].files["train"], TASKS[task]
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        for split in ("dev", "test"):
            for number, texts in enumerate(texts_of(data, task, split)):
                leaked = dict(zip(spec.text_columns, texts, strict=True))
                rows.append(rows[0] | {"id": f"{split}{number}"} | leaked)
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    sentences, dev = read_text(data)
    found = {
        split: {text for task in DEFAULT_TASKS for texts in texts_of(data, task, split) for text in texts}
        for split in ("train", "dev", "test")
    }
    assert len(found["train"] & found["dev"]) > 10 and len(found["train"] & found["test"]) > 10
    assert sorted(sentences) == sorted(found["train"] - found["dev"] - found["test"])
    assert sorted(dev) == sorted(found["dev"])
    seven = read_text(data, eval_max_examples=7)[1]
    assert len(seven) == 7 and seven == read_text(data, eval_max_examples=7)[1]
    for spec in TASKS.values():
        (data / spec.files["test"]).unlink()  # may be absent
    assert sorted(read_text(data)[0]) == sorted(found["train"] - found["dev"])


def test_additional_text_and_variants_of_dev_sentences(tmp_path, capsys):
    """A source adds its sentences, but for those of a dev file, in capitals or without full stop too."""
    data = make_data(tmp_path / "data")
    before, dev = read_text(data)
    with open(data / EXTRA_SOURCES["sick"].files[0], "a", encoding="utf-8") as file:
        file.write(f"{dev[0].upper()} !\tA new sentence\t3\n")
    assert read_text(data)[0] == before
    after, _ = read_text(data, {"sick": None})
    assert "A new sentence" in after and f"{dev[0].upper()} !" not in after
    assert set(before) < set(after) and "11 examples from sick" in capsys.readouterr().out
    review = max((text for (text,) in texts_of(data, "sst", "dev")), key=len)
    path = data / EXTRA_SOURCES["rotten_tomatoes"].files[0]
    path.parent.mkdir()
    path.write_text(f"sentence\tsentiment\nA new review\t1\nAs they say: {review}\t1\n", encoding="utf-8")
    assert [text for text in read_text(data, {"rotten_tomatoes": None})[0] if text not in before] == [
        "A new review"
    ]


# --- runs -----------------------------------------------------------------------------------------


def log_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(place, folder):
    for name in ("model.safetensors", "config.json", "metrics.jsonl", "vocab.txt"):
        assert (folder / name).read_bytes() == (place / "run" / name).read_bytes(), name
    assert not list(folder.glob("last*"))


def test_finished_folder(place, reference):
    folder = place / "run"
    assert {path.name for path in folder.iterdir()} == {*ENCODER_FILES, "args.json", "metrics.jsonl"}
    settings = json.loads((folder / "args.json").read_text())
    assert settings["args"]["max_steps"] == 6 and settings["versions"]["torch"] == torch.__version__
    trained, start = (BertModel.from_pretrained(path) for path in (folder, place / "encoder"))
    for name, tensor in trained.state_dict().items():
        changed = not torch.equal(tensor, start.state_dict()[name])
        assert changed != name.startswith("pooler."), name
    batch = make_batch()
    with torch.no_grad():
        last = trained(batch["input_ids"], batch["attention_mask"])["last_hidden_state"]
    real = batch["attention_mask"].bool()
    # float32 on both sides; hidden states are of order 1 after LayerNorm.
    torch.testing.assert_close(last[real], reference["last"][real], rtol=0, atol=2e-5)
    assert BertTokenizer.from_pretrained(folder).encode("a b, cat")["input_ids"] == reference["ids"].tolist()


def test_learning_rate_and_log(place, watched):
    rates, losses = watched
    factors = [lr_factor("linear", step, warmup_steps=2, total_steps=6) for step in range(6)]
    assert rates == [[0.01 * factor] * 2 for factor in factors]
    first, *steps, last = log_of(place / "run")
    assert (first["step"], last["step"]) == (0, 6) and last["dev_loss"] < first["dev_loss"] - 0.3
    assert {line["step"]: line["loss"] for line in steps} == {4: sum(losses[:4]) / 4, 6: sum(losses[4:]) / 2}


# How a run is stopped (at which call of what, by what, its exit code), and the step that it goes on from.
STOPS = {
    "signal in an update": ("train_step", 4, terminate, 143, 5),  # finishes it and saves
    "kill": ("train_step", 5, interrupt, 130, 4),  # ends at once: back to the last save
    "kill, then damage": ("train_step", 5, interrupt, 130, 2),
    "signal in the first evaluation": ("evaluate", 0, terminate, 143, None),  # given up; nothing to save
    "signal in the last evaluation": ("evaluate", 1, terminate, 143, 6),  # without the encoder
}


@pytest.mark.slow
@pytest.mark.parametrize("case", STOPS)
def test_stopped_run_goes_on_with_the_same_bits(place, monkeypatch, tmp_path, capsys, case):
    name, number, act, code, saved = STOPS[case]
    with monkeypatch.context() as patch:
        stop_at(patch, name, number, act)
        assert run(place, out=tmp_path) == code
    assert (tmp_path / LAST).exists() == bool(saved) and not (tmp_path / "config.json").exists()
    # Before its first save it may start anew with any settings.
    assert (find_run(tmp_path, str(place / "encoder"), overwrite=False) is not None) == bool(saved)
    path = tmp_path / LAST / TENSORS_FILE
    if "damage" in case:
        path.write_bytes(path.read_bytes()[:-1])
    capsys.readouterr()
    assert run(place, out=tmp_path) == 0
    printed = capsys.readouterr().out
    assert (f"warning: {path}: damaged" in printed) == ("damage" in case)
    assert f"at step {saved}\n" in printed if saved else "continuing" not in printed
    assert_same_run(place, tmp_path)


@pytest.mark.slow
def test_other_settings_or_data_are_refused_on_resume(place, monkeypatch, capsys, tmp_path):
    with monkeypatch.context() as patch:
        stop_at(patch, "train_step", 2, interrupt)
        assert run(place, out=tmp_path / "run") == 130
    before = (tmp_path / "run" / LAST / TENSORS_FILE).read_bytes()
    for flags, message in (
        ("--lr 0.02 --mlm_prob 0.2", "--lr was 0.01, is 0.02, --mlm_prob was 0.15, is 0.2"),
        (f"--data_dir {make_data(tmp_path / 'other', start=30)}", "not the sentences"),
    ):
        capsys.readouterr()
        assert run(place, flags, tmp_path / "run") == 2
        assert message in one_line(capsys)
    assert (tmp_path / "run" / LAST / TENSORS_FILE).read_bytes() == before


@pytest.mark.slow
def test_finished_run_is_kept_without_overwrite(place, capsys, tmp_path, monkeypatch):
    """--overwrite is for our own runs: not for other files, another encoder's folder or the one that is read.

    And a device that is not there: all that needs no data is said before they are read.
    """
    folder = shutil.copytree(place / "run", tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(pretrain_mlm, "read_rows", None)
        for flags, out, message in (
            ("--seed 5", folder, "holds a finished encoder; start anew with --overwrite"),
            ("--overwrite", place / "encoder", "not this script's"),
            (f"--overwrite --pretrained {folder}", folder, "is --pretrained itself"),
            ("--device moon", tmp_path / "new", "--device moon: not available"),
        ):
            capsys.readouterr()
            assert run(place, flags, out) == 2
            assert message in one_line(capsys)
        for name in (*OUTPUT_FILES, NEW):
            other = tmp_path / f"with {name}".replace(" ", "_")
            other.mkdir()
            (other / name).write_text("somebody's")
            for flags in ("", "--overwrite"):
                assert run(place, flags, other) == 2
                assert name in one_line(capsys) and (other / name).read_text() == "somebody's"
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert (place / "encoder" / "config.json").exists()
    assert run(place, "--seed 5 --overwrite --max_steps 1", folder) == 0
    assert (folder / "model.safetensors").read_bytes() != before[folder / "model.safetensors"]
    assert [line["step"] for line in log_of(folder)] == [0, 1, 1]


def test_lack_of_memory_names_the_batch(place, monkeypatch, capsys):
    def no_memory():
        raise RuntimeError("could not create a primitive")

    stop_at(monkeypatch, "train_step", 0, no_memory)
    assert run(place, out="memory") == 2
    assert re.search(r"word pieces\) \(\d+, \d+\); try a smaller --batch_size", one_line(capsys))


def test_dev_loss_that_is_not_finite_ends_the_run(place, monkeypatch, capsys):
    losses = iter((3.0, math.nan))
    monkeypatch.setattr(pretrain_mlm, "evaluate", lambda *args: next(losses))
    assert run(place, "--max_steps 1", out="nan") == 2
    assert "step 1: the dev loss is nan; try a smaller --lr" in one_line(capsys)
    assert [line.get("dev_loss") for line in log_of(place / "nan")] == [3.0, None]
    assert not (place / "nan" / "model.safetensors").exists()


def test_epochs_give_the_length(place, capsys):
    args = f"--data_dir {place}/data --pretrained {place}/encoder --device cpu --batch_size 64 --epochs 1.2"
    assert main([*args.split(), "--output_dir", str(place / "epochs")]) == 0
    num_sentences = int(capsys.readouterr().out.split()[0])
    assert log_of(place / "epochs")[-1]["step"] == math.ceil(1.2 * math.ceil(num_sentences / 64))


def test_text_of_own_tasks(place, tmp_path, capsys):
    """A task of one's own gives its training sentences, and its dev sentences are kept out of everything."""
    lines = ['name = "own"', 'kind = "regression"', 'texts = ["t"]', 'label = "y"', "range = [0, 9]"]
    lines += ['files = { train = "train.csv", dev = "dev.csv" }']
    (tmp_path / "own.toml").write_text("\n".join(lines))
    (tmp_path / "train.csv").write_text("t,y\nOne.,1\nTwo.,2\nThree.,3\n")
    taken = texts_of(place / "data", "sst", "train")[0][0]
    (tmp_path / "dev.csv").write_text(f't,y\ntwo,1\n"{taken}",2\n')
    flags = f"--task_file {tmp_path}/own.toml --max_steps 1"
    assert run(place, flags, "own") == 0
    assert "2 sentences to train on (1 more are also dev or test sentences)" in capsys.readouterr().out
    assert run(place, f"{flags} --tasks sst,own", "both") == 0
    set_own_tasks({})
    alone = len(read_sentences(place / "data", ("sst",), {}, seed=1, eval_max_examples=9)[0])
    assert f"{2 + alone - 1} sentences to train on" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags",
    [
        *("--mlm_prob 0", "--mlm_prob 1", "--max_steps 0", "--epochs 1 --max_steps 3", "--batch_size 0"),
        *("--max_length 2", "--warmup_ratio 1", "--tasks sst,foo", "--schedule step", "--device moon"),
        *("--data_dir nowhere", "--pretrained /nowhere/at/all", "--output_dir", "--log 3"),
    ],
)
def test_bad_flags_end_in_one_line(place, capsys, flags):
    assert run(place, flags, "bad") == 2
    error, flag = one_line(capsys), flags.split()[0]
    assert (flag if flag != "--data_dir" else "nowhere") in error
    assert error.startswith("training.pretrain_mlm: error: ") and not (place / "bad").exists()


def test_bad_row_names_file_and_line(place, capsys, tmp_path):
    path = make_data(tmp_path) / TASKS["sst"].files["train"]
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    lines[3] = lines[3].rstrip("\n")[:-1] + "x\n"
    path.write_text("".join(lines), encoding="utf-8")
    assert run(place, f"--data_dir {tmp_path}", "bad") == 2
    assert f"{path}:4" in one_line(capsys)
