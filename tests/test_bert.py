"""The encoder against Hugging Face's `BertModel`, and its own promises about padding.

Shapes: B sentences, T padded length, H hidden_size, M tokens.
"""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import bert
from base_bert import resolve_pretrained
from bert import ACTIVATIONS, MIN_WIDTH, BertModel
from config import BertConfig
from kernels import cpu, packing, task_grads
from kernels.cpu import CpuAttention
from kernels.packing import make_paddings
from kernels.task_grads import PLAIN_LAYERS
from tests.tiny import randomise

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TINY = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"intermediate_size": 37, "max_position_embeddings": 11} | NO_DROPOUT
# One row per configuration that is compared with Hugging Face; `minilm` is the packaged encoder.
CASES = {
    "tiny": {},
    "one_head": {"num_attention_heads": 1, "hidden_act": "relu", "type_vocab_size": 1},
    "many_heads": {"num_attention_heads": 8, "hidden_act": "gelu_new", "type_vocab_size": 3},
    "deep": {"num_hidden_layers": 5, "hidden_size": 33, "num_attention_heads": 3, "layer_norm_eps": 1e-5},
    "wide": {"num_hidden_layers": 1, "hidden_size": 70, "num_attention_heads": 14, "intermediate_size": 3},
    "narrow": {"hidden_size": 6, "num_attention_heads": 6, "hidden_act": "gelu_new", "type_vocab_size": 3},
    "minilm": None,
}
B, T = 13, 7
# Both sides compute in float32 and add in another order; hidden states are of order 1 after LayerNorm.
FLOAT32 = {"rtol": 0, "atol": 1e-5}

REFERENCE = """
import json
import torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

for folder in [path for path in Path().iterdir() if path.is_dir()]:
    case = json.loads((folder / "case.json").read_text())
    inputs = load_file(folder / "inputs.safetensors")
    weigh_last, weigh_pooler = inputs.pop("weigh_last"), inputs.pop("weigh_pooler")
    if "folder" in case:
        model = BertModel.from_pretrained(case["folder"], attn_implementation="eager")
    else:
        model = BertModel(BertConfig(**case, attn_implementation="eager"))
        model.load_state_dict(load_file(folder / "weights.safetensors"), strict=True)
    with torch.no_grad():
        outputs = model.eval()(**inputs)
    results = {"last_hidden_state": outputs.last_hidden_state, "pooler_output": outputs.pooler_output}
    if "folder" not in case:
        model.double().train()
        outputs = model(**inputs)
        loss = (outputs.last_hidden_state * weigh_last).sum() + (outputs.pooler_output * weigh_pooler).sum()
        loss.backward()
        results |= {"grad." + name: parameter.grad for name, parameter in model.named_parameters()}
    save_file({key: value.contiguous() for key, value in results.items()}, folder / "results.safetensors")
"""


def tiny_config(**changes):
    return BertConfig(**TINY | changes)


def make_model(seed=0, **changes):
    return randomise(BertModel(tiny_config(**changes)), seed).eval()


def make_inputs(config, seed=0):
    """B random sentences of length T with padding on the right, on the left, in the middle, and none."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, T, (B, 1), generator=generator)
    attention_mask = (torch.arange(T) < lengths).long()
    attention_mask[0] = 1
    attention_mask[1:4] = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1, 1], [0, 1, 0, 1, 0, 0, 1]])
    # From 1 on: Hugging Face gives the [PAD] row of the embeddings no gradient, ours never meets it.
    input_ids = torch.randint(1, config.vocab_size, (B, T), generator=generator)
    token_type_ids = torch.randint(0, config.type_vocab_size, (B, T), generator=generator)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}


def load_case(name):
    if name == "minilm":
        return BertModel.from_pretrained("minilm", **NO_DROPOUT)
    return make_model(seed=list(CASES).index(name), **CASES[name])


def make_loss_weights(inputs, hidden_size):
    """Random weights of a scalar loss: (B, T, H) for real word pieces, (B, H) where position 0 is one."""
    weigh = torch.randn(
        B, T + 1, hidden_size, generator=torch.Generator().manual_seed(7), dtype=torch.float64
    )
    real = inputs["attention_mask"].double()
    return weigh[:, :T] * real[:, :, None], weigh[:, T] * real[:, :1]


# --- against Hugging Face -----------------------------------------------------------------------------------


def test_every_activation_has_a_case():
    assert {(changes or {}).get("hidden_act", "gelu") for changes in CASES.values()} == set(ACTIVATIONS)


@pytest.mark.slow  # a process that imports transformers, once for all cases
def test_outputs_and_gradients_equal_hugging_face(tmp_path, run_transformers, request):
    models, inputs, weighs = {}, {}, {}
    for name, changes in CASES.items():
        model, folder = load_case(name), tmp_path / name
        folder.mkdir()
        case = {"folder": str(resolve_pretrained(name))} if changes is None else TINY | changes
        (folder / "case.json").write_text(json.dumps(case))
        if changes is not None:
            save_file(model.state_dict(), folder / "weights.safetensors")
        models[name], inputs[name] = model, make_inputs(model.config)
        weighs[name] = make_loss_weights(inputs[name], model.config.hidden_size)
        loss_weights = dict(zip(("weigh_last", "weigh_pooler"), weighs[name], strict=True))
        save_file(inputs[name] | loss_weights, folder / "inputs.safetensors")
    run_transformers(REFERENCE, tmp_path)
    references = {name: load_file(tmp_path / name / "results.safetensors") for name in CASES}
    for name, expected in references.items():
        real = inputs[name]["attention_mask"].bool()
        # With padding at position 0 both poolers read something that means nothing, each its own.
        places = {"last_hidden_state": real, "pooler_output": real[:, 0]}
        for training in (False, True):
            with torch.set_grad_enabled(training):  # with gradients, attention is written out by hand
                found = models[name].train(training)(**inputs[name])
            for key, where in places.items():
                torch.testing.assert_close(found[key][where], expected[key][where], **FLOAT32, msg=name)
    request.getfixturevalue("in_double")  # from here on: weights and inputs were drawn in float32
    for name in CASES.keys() - {"minilm"}:
        found = models[name].double()(**inputs[name])
        outputs = (found["last_hidden_state"], found["pooler_output"])
        sum((out * weigh).sum() for out, weigh in zip(outputs, weighs[name], strict=True)).backward()
        assert len(references[name]) == 2 + len(list(models[name].parameters()))
        for key, param in models[name].named_parameters():  # float64: tight for small and large gradients
            expected = references[name]["grad." + key]
            torch.testing.assert_close(param.grad, expected, rtol=1e-8, atol=1e-9, msg=f"{name}: {key}")


# --- padding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
def test_a_sentence_is_the_same_alone_and_in_a_batch(grad):
    model = make_model()
    inputs = make_inputs(model.config)
    # With padding on the right.
    inputs["attention_mask"] = inputs["attention_mask"].sort(dim=1, descending=True)[0]
    with torch.set_grad_enabled(grad):
        together = model(**inputs)
        for i in range(5):
            length = inputs["attention_mask"][i].sum()
            alone = model(**{key: value[i : i + 1, :length] for key, value in inputs.items()})
            last = together["last_hidden_state"][i, :length]
            torch.testing.assert_close(last, alone["last_hidden_state"][0], **FLOAT32)
            torch.testing.assert_close(together["pooler_output"][i], alone["pooler_output"][0], **FLOAT32)


@pytest.mark.parametrize("grad", [False, True])
def test_last_hidden_state_is_zero_at_padding_blind_to_it_and_finite_in_an_empty_row(grad):
    model = make_model()
    inputs = make_inputs(model.config)
    inputs["attention_mask"][5] = 0
    padding = inputs["attention_mask"] == 0
    with torch.set_grad_enabled(grad):
        first = model(**inputs)
        inputs["input_ids"][padding] = 0
        inputs["token_type_ids"][padding] = 0
        inputs["attention_mask"] = inputs["attention_mask"].float()  # any type will do
        second = model(**inputs)
    assert padding.any() and (first["last_hidden_state"][padding] == 0).all()
    assert (first["last_hidden_state"][~padding] != 0).all()
    assert all(torch.equal(first[key], second[key]) and first[key].isfinite().all() for key in first)
    if grad:
        first["last_hidden_state"].square().sum().backward()
        assert all(p.grad.isfinite().all() for name, p in model.named_parameters() if "pooler" not in name)


def test_defaults_are_no_padding_and_one_segment():
    model = make_model()
    input_ids = make_inputs(model.config)["input_ids"]
    ones, zeros = torch.ones_like(input_ids), torch.zeros_like(input_ids)
    default = model(input_ids)["last_hidden_state"]
    for mask_type in (torch.bool, torch.int32):
        explicit = model(input_ids, attention_mask=ones.to(mask_type), token_type_ids=zeros)
        assert torch.equal(default, explicit["last_hidden_state"])
    other_segment = model(input_ids, token_type_ids=ones)["last_hidden_state"]
    assert not torch.allclose(default, other_segment, atol=1e-2)


# --- several batches in one pass ----------------------------------------------------------------------------


def make_batches(config):
    """Padded batches of different lengths: without padding, of a single position, above MIN_WIDTH."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for sentences, positions in ((5, 7), (3, 19), (2, 1), (4, 16), (1, 3)):
        lengths = torch.randint(1, positions + 1, (sentences, 1), generator=generator)
        mask = (torch.arange(positions) < lengths).long()
        input_ids = torch.randint(1, config.vocab_size, (sentences, positions), generator=generator)
        token_type_ids = torch.randint(0, config.type_vocab_size, (sentences, positions), generator=generator)
        batches.append((input_ids, mask, token_type_ids))
    batches[3][1][:] = 1
    batches[1][1][0] = torch.arange(19) % 2  # padding at the start and in between
    return batches


@pytest.mark.parametrize("grad", [False, True])
def test_batches_encoded_together_are_as_each_alone(grad):
    model = make_model(max_position_embeddings=19)
    batches = make_batches(model.config)
    assert 1 < MIN_WIDTH < 19  # some batches are wider, others are not
    with torch.set_grad_enabled(grad):
        together = model.encode(batches)
        assert len(together) == len(batches)
        for batch, outputs in zip(batches, together, strict=True):
            alone = model(*batch)
            assert outputs["last_hidden_state"].shape == (*batch[0].shape, 32)
            for key, expected in alone.items():
                torch.testing.assert_close(outputs[key], expected, **FLOAT32)
            assert (outputs["last_hidden_state"][batch[1] == 0] == 0).all()
            assert (outputs["last_hidden_state"][batch[1] == 1] != 0).all()
    backwards = model.encode(batches[::-1])[::-1]  # nothing depends on the order
    for outputs, expected in zip(backwards, together, strict=True):
        torch.testing.assert_close(outputs["last_hidden_state"], expected["last_hidden_state"], **FLOAT32)


def test_word_pieces_are_laid_end_to_end_in_order(monkeypatch):
    """What the embeddings see: real word pieces of the first batch, row by row, then those of the next."""
    monkeypatch.setattr(packing, "TOKEN_MULTIPLE", 1)
    model, seen = make_model(type_vocab_size=2), []
    model.embeddings.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs))
    first = torch.tensor([[[11, 12, 13], [14, 15, 16]], [[1, 0, 1], [1, 1, 0]], [[0, 0, 1], [1, 0, 0]]])
    second = torch.tensor([[[21, 22]], [[1, 1]], [[1, 0]]])
    model.encode([tuple(first), tuple(second)])
    expected = [[11, 13, 14, 15, 21, 22], [0, 2, 0, 1, 0, 1], [0, 1, 1, 0, 1, 0]]  # ids, positions, types
    assert [tensor.tolist() for tensor in seen[:3]] == expected
    assert seen[3].batches == [slice(0, 4), slice(4, 6)] and not seen[3].tasks


@pytest.mark.parametrize("grad", [False, True])
def test_long_sentences_take_torchs_attention_and_come_to_the_same(monkeypatch, grad):
    outcomes, calls, apply = [], [], CpuAttention.apply
    monkeypatch.setattr(CpuAttention, "apply", lambda *args: (calls.append(1), apply(*args))[1])
    for longest, expected_calls in ((256, 2), (18, 0)):  # layers; one batch of the five has 19 positions
        monkeypatch.setattr(bert, "MAX_CPU_WIDTH", longest)
        model = make_model(max_position_embeddings=19)
        calls.clear()
        with torch.set_grad_enabled(grad):
            outputs = model.encode(make_batches(model.config))
        assert len(calls) == expected_calls
        outcomes.append([output["last_hidden_state"] for output in outputs])
        if grad:
            sum(output.pow(3).sum() for output in outcomes[-1]).backward()
            outcomes[-1] += [p.grad for name, p in model.named_parameters() if "pooler" not in name]
    for ours, theirs in zip(*outcomes, strict=True):
        scale = max(1.0, float(ours.detach().abs().max()))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * scale)  # float32


# --- layers that are more than their weights ---------------------------------------------------------------


class LowRank(nn.Linear):
    """A linear layer with a trainable adapter of rank 4, starting at zero (https://arxiv.org/abs/2106.09685)."""

    def __init__(self, base: nn.Linear):
        super().__init__(base.in_features, base.out_features)
        self.load_state_dict(base.state_dict())
        self.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(4, base.in_features) / 4)
        self.up = nn.Parameter(torch.zeros(base.out_features, 4))

    def forward(self, x):
        return super().forward(x) + x @ self.down.T @ self.up.T


class Wrapped(nn.Module):
    """The same as a module with a base layer, which has no weight of its own."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.adapted = LowRank(base)

    def forward(self, x):
        return self.adapted(x)


@pytest.mark.parametrize("adapter", [LowRank, Wrapped])
@pytest.mark.parametrize("names", [("query", "value"), ("dense",)])
def test_adapters_of_rank_four_get_all_gradients_and_equal_their_merged_weights(adapter, names):
    model, merged = (make_model().requires_grad_(False) for _ in range(2))
    for (path, layer), plain in zip(list(model.named_modules()), list(merged.modules()), strict=True):
        if path.endswith(names) and path != "pooler.dense":
            adapted = adapter(layer)
            params = [param for param in adapted.parameters() if param.requires_grad]
            with torch.no_grad():
                params[1].normal_(std=0.3)
                plain.weight += params[1] @ params[0]
            model.set_submodule(path, adapted)
    inputs = make_inputs(model.config)
    found = model(**inputs)
    for key, expected in merged(**inputs).items():
        torch.testing.assert_close(found[key], expected, rtol=0, atol=1e-4)  # float32, larger scores
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**inputs)["last_hidden_state"][:, 3].float().pow(3).sum().backward()
    for name, param in model.named_parameters():
        assert (param.grad is not None and param.grad.any()) == name.endswith(("up", "down")), name


def test_hooks_of_every_layer_fire_and_may_change_its_output():
    model = make_model()
    inputs = make_inputs(model.config)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PLAIN_LAYERS)}
    assert len(layers) == 3 + 1 + 2 * 8 + 1
    expected, fired = model(**inputs), []
    for name, layer in layers.items():
        layer.register_forward_hook(lambda *args, name=name: fired.append(name))
    for key, found in model(**inputs).items():
        torch.testing.assert_close(found, expected[key], **FLOAT32)
    assert sorted(fired) == sorted(layers)
    for name, layer in layers.items():
        hook = layer.register_forward_hook(lambda module, args, output: output * 1.5)
        found = model(**inputs)
        assert not torch.allclose(found["pooler_output"], expected["pooler_output"], atol=1e-4), name
        hook.remove()


# --- limits -------------------------------------------------------------------------------------------------


def test_too_long_input():
    model = make_model()
    longest = model.config.max_position_embeddings
    assert model(torch.ones(1, longest, dtype=torch.long))["last_hidden_state"].shape == (1, longest, 32)
    batches = [(torch.ones(2, length, dtype=torch.long),) * 3 for length in (longest, longest + 1)]
    with pytest.raises(ValueError, match=f"{longest + 1} positions.*at most {longest}"):
        model.encode(batches)


@pytest.mark.parametrize("shape", [(0, 7), (3, 0), (7,), (1, 2, 3)])
def test_batch_without_sentences_or_positions(shape):
    model = make_model()
    empty, whole = torch.ones(shape, dtype=torch.long), torch.ones(2, 3, dtype=torch.long)
    bad_shape = rf"^input_ids has shape {re.escape(str(shape))}; expected .B, T"
    for batches, message in (([(whole,) * 3, (empty,) * 3], bad_shape), ([], "batches is empty")):
        with pytest.raises(ValueError, match=message):
            model.encode(batches)


def test_size_of_bert_base():
    with torch.device("meta"):
        model = BertModel(BertConfig())
    assert sum(p.numel() for p in model.parameters()) == 109_482_240  # of bert-base-uncased with its pooler


# --- precision and layout of gradients ----------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
def test_bfloat16_autocast(grad):
    model = make_model()
    inputs = make_inputs(model.config)
    expected = model(**inputs)["last_hidden_state"]
    with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(**inputs)["last_hidden_state"]
    # bfloat16 rounds to 2**-8 of a number, a few times per layer; a wrong formula is off by about 1.
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.15)
    assert not torch.equal(found.float(), expected)
    if grad:
        found.float().square().sum().backward()
        assert all(p.grad.isfinite().all() for name, p in model.named_parameters() if "pooler" not in name)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_stands_where_bert_has_it(monkeypatch, training):
    calls = []

    def record(x, p, training, residual=None):
        calls.append(("hidden", tuple(x.shape), p if training else 0.0, residual is not None))
        return x if residual is None else x + residual

    def record_mask(shape, p, dtype):
        calls.append(("probs", tuple(shape), p))
        return torch.ones(shape, dtype=dtype), 1.0

    for module in (bert, task_grads):
        monkeypatch.setattr(module, "dropout", record)
    monkeypatch.setattr(cpu, "keep_mask", record_mask)
    model = make_model(num_hidden_layers=1, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3)
    inputs = make_inputs(model.config)
    model.train(training)(**inputs)
    [padding] = make_paddings([inputs["attention_mask"]])
    embeddings, hidden = (
        ("hidden", (padding.num_tokens, 32), 0.2 * training, residual) for residual in (False, True)
    )
    probs = [("probs", (B * 4, MIN_WIDTH, MIN_WIDTH), 0.3)] * training
    assert calls == [embeddings, *probs, hidden, hidden]  # attention, attention output, feed-forward
