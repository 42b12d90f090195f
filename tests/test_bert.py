"""The encoder against Hugging Face's `BertModel`, torch's encoder layer, and its own promises about padding.

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
from bert import ACTIVATIONS, MIN_WIDTH, BertLayer, BertModel
from config import BertConfig
from kernels import cpu, packing
from kernels.cpu import CpuAttention
from kernels.packing import Packing, Padding, make_paddings
from kernels.task_grads import PLAIN_LAYERS
from optimizer import AdamW
from support.errors import UserError
from tests.tiny import randomise

TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 11,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
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
RANDOM_CASES = [name for name, changes in CASES.items() if changes is not None]
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
    attention_mask[1] = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    attention_mask[2] = torch.tensor([1, 1, 0, 0, 1, 1, 1])
    attention_mask[3] = torch.tensor([0, 1, 0, 1, 0, 0, 1])
    # From 1 on: Hugging Face gives the [PAD] row of the embeddings no gradient, ours never meets it.
    input_ids = torch.randint(1, config.vocab_size, (B, T), generator=generator)
    token_type_ids = torch.randint(0, config.type_vocab_size, (B, T), generator=generator)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}


def load_case(name):
    if name == "minilm":
        return BertModel.from_pretrained("minilm", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return make_model(seed=list(CASES).index(name), **CASES[name])


def make_loss_weights(inputs, hidden_size):
    """Random weights of a scalar loss: (B, T, H) for real word pieces, (B, H) where position 0 is one."""
    generator = torch.Generator().manual_seed(7)
    real = inputs["attention_mask"].double()
    weigh_last = torch.randn(B, T, hidden_size, generator=generator, dtype=torch.float64) * real[:, :, None]
    weigh_pooler = torch.randn(B, hidden_size, generator=generator, dtype=torch.float64) * real[:, :1]
    return weigh_last, weigh_pooler


@pytest.fixture(scope="module")
def references(tmp_path_factory, run_transformers):
    """Case -> what Hugging Face computes, all cases in one process."""
    root = tmp_path_factory.mktemp("references")
    for name, changes in CASES.items():
        folder = root / name
        folder.mkdir()
        if changes is None:
            case = {"folder": str(resolve_pretrained(name))}
            config = BertConfig.from_json(resolve_pretrained(name) / "config.json")
        else:
            case = TINY | changes
            model = load_case(name)
            config = model.config
            save_file(model.state_dict(), folder / "weights.safetensors")
        (folder / "case.json").write_text(json.dumps(case))
        inputs = make_inputs(config)
        weigh_last, weigh_pooler = make_loss_weights(inputs, config.hidden_size)
        inputs |= {"weigh_last": weigh_last, "weigh_pooler": weigh_pooler}
        save_file(inputs, folder / "inputs.safetensors")
    run_transformers(REFERENCE, root)
    return {name: load_file(root / name / "results.safetensors") for name in CASES}


# --- against Hugging Face -----------------------------------------------------------------------------------


def test_every_activation_has_a_case():
    covered = {(TINY | CASES[name]).get("hidden_act", BertConfig.hidden_act) for name in RANDOM_CASES}
    assert covered == set(ACTIVATIONS)


@pytest.mark.slow  # a process that imports transformers
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_outputs_equal_hugging_face(references, name, training):
    model = load_case(name).train(training)
    inputs = make_inputs(model.config)
    with torch.set_grad_enabled(training):  # with gradients, attention is written out by hand
        outputs = model(**inputs)
    real = inputs["attention_mask"].bool()
    last, expected = outputs["last_hidden_state"], references[name]["last_hidden_state"]
    torch.testing.assert_close(last[real], expected[real], **FLOAT32)
    # With padding at position 0 both poolers read something that means nothing, each its own.
    starts = real[:, 0]
    torch.testing.assert_close(
        outputs["pooler_output"][starts], references[name]["pooler_output"][starts], **FLOAT32
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", RANDOM_CASES)
def test_gradients_equal_hugging_face(references, name, request):
    model, inputs = load_case(name), make_inputs(load_case(name).config)
    request.getfixturevalue("in_double")  # from here on: weights and inputs are drawn in float32
    model.double().train()
    weigh_last, weigh_pooler = make_loss_weights(inputs, model.config.hidden_size)
    outputs = model(**inputs)
    loss = (outputs["last_hidden_state"] * weigh_last).sum() + (outputs["pooler_output"] * weigh_pooler).sum()
    loss.backward()
    found = {"grad." + key: parameter.grad for key, parameter in model.named_parameters()}
    expected = {key: value for key, value in references[name].items() if key.startswith("grad.")}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        # float64: a tight tolerance holds for small and large gradients alike
        torch.testing.assert_close(
            found[key], value, rtol=1e-8, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}"
        )


# --- against torch's own layer ------------------------------------------------------------------------------


def test_layer_equals_torch_encoder_layer():
    config = tiny_config()
    torch.manual_seed(1)
    theirs = nn.TransformerEncoderLayer(
        config.hidden_size,
        config.num_attention_heads,
        config.intermediate_size,
        dropout=0.0,
        activation="gelu",
        layer_norm_eps=config.layer_norm_eps,
        batch_first=True,
        norm_first=False,
    )
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    ours = BertLayer(config)
    weight = dict(theirs.named_parameters())
    for kind in ("weight", "bias"):
        parts = weight[f"self_attn.in_proj_{kind}"].chunk(3)
        weight |= {
            f"{name}.{kind}": part for name, part in zip(("query", "key", "value"), parts, strict=True)
        }
    names = {  # ours: theirs
        "attention.self.query": "query",
        "attention.self.key": "key",
        "attention.self.value": "value",
        "attention.output.dense": "self_attn.out_proj",
        "attention.output.LayerNorm": "norm1",
        "intermediate.dense": "linear1",
        "output.dense": "linear2",
        "output.LayerNorm": "norm2",
    }
    ours.load_state_dict(
        {
            f"{own}.{kind}": weight[f"{name}.{kind}"]
            for own, name in names.items()
            for kind in ("weight", "bias")
        }
    )
    mask = make_inputs(config)["attention_mask"].bool()
    ours_in = torch.randn(B, T, config.hidden_size).requires_grad_()
    theirs_in = ours_in.detach().clone().requires_grad_()
    padding = Padding.of_mask(mask)
    tokens = ours(padding.remove(ours_in), Packing([padding.num_tokens]), [padding])  # (M, H)
    ours_out = padding.restore(tokens)[mask]  # (real word pieces, H)
    theirs_out = theirs(theirs_in, src_key_padding_mask=~mask)[mask]  # (real word pieces, H)
    torch.testing.assert_close(ours_out, theirs_out, **FLOAT32)
    weigh = torch.randn(ours_out.shape)
    (ours_out * weigh).sum().backward()
    (theirs_out * weigh).sum().backward()
    torch.testing.assert_close(ours_in.grad, theirs_in.grad, rtol=1e-4, atol=1e-4)  # values up to 20
    assert ours_in.grad[mask].abs().min() > 0


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
def test_last_hidden_state_is_zero_at_padding_and_blind_to_it(grad):
    model = make_model()
    inputs = make_inputs(model.config)
    padding = inputs["attention_mask"] == 0
    with torch.set_grad_enabled(grad):
        first = model(**inputs)
        inputs["input_ids"][padding] = 0
        inputs["token_type_ids"][padding] = 0
        second = model(**inputs)
    assert padding.any() and (first["last_hidden_state"][padding] == 0).all()
    assert (first["last_hidden_state"][~padding] != 0).all()
    assert torch.equal(first["last_hidden_state"], second["last_hidden_state"])
    assert torch.equal(first["pooler_output"], second["pooler_output"])


@pytest.mark.parametrize("grad", [False, True])
def test_an_empty_row_stays_finite(grad):
    model = make_model()
    inputs = make_inputs(model.config)
    inputs["attention_mask"][5] = 0
    with torch.set_grad_enabled(grad):
        outputs = model(**inputs)
    assert all(output.isfinite().all() for output in outputs.values())
    if grad:
        outputs["last_hidden_state"].square().sum().backward()
        assert all(p.grad.isfinite().all() for name, p in model.named_parameters() if "pooler" not in name)


def test_defaults_are_no_padding_and_one_segment():
    model = make_model()
    input_ids = make_inputs(model.config)["input_ids"]
    ones, zeros = torch.ones_like(input_ids), torch.zeros_like(input_ids)
    default, explicit = model(input_ids), model(input_ids, attention_mask=ones, token_type_ids=zeros)
    other_segment = model(input_ids, token_type_ids=ones)
    assert torch.equal(default["last_hidden_state"], explicit["last_hidden_state"])
    assert not torch.allclose(default["last_hidden_state"], other_segment["last_hidden_state"], atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_any_type_of_mask(dtype):
    model = make_model()
    inputs = make_inputs(model.config)
    expected = model(**inputs)["last_hidden_state"]
    inputs["attention_mask"] = inputs["attention_mask"].to(dtype)
    assert torch.equal(model(**inputs)["last_hidden_state"], expected)


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
    assert min(ids.shape[1] for ids, _, _ in batches) < MIN_WIDTH < max(ids.shape[1] for ids, _, _ in batches)
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
    model.embeddings.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    first = torch.tensor([[[11, 12, 13], [14, 15, 16]], [[1, 0, 1], [1, 1, 0]], [[0, 0, 1], [1, 0, 0]]])
    second = torch.tensor([[[21, 22]], [[1, 1]], [[1, 0]]])
    model.encode([tuple(first), tuple(second)])
    input_ids, position_ids, token_type_ids, found = seen[0]
    assert input_ids.tolist() == [11, 13, 14, 15, 21, 22]
    assert position_ids.tolist() == [0, 2, 0, 1, 0, 1]
    assert token_type_ids.tolist() == [0, 1, 1, 0, 1, 0]
    assert found.batches == [slice(0, 4), slice(4, 6)] and not found.tasks


def test_linear_groups_are_all_linear_layers_once():
    model = make_model()
    grouped = [layer for group in model.linear_groups() for layer in group]
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(grouped) == len(set(grouped)) and set(grouped) == set(layers)
    for group in model.linear_groups():  # they share their input, so they have one width
        assert len({layer.in_features for layer in group}) == 1
    assert model.word_embeddings() is model.embeddings.word_embeddings.weight


@pytest.mark.parametrize("grad", [False, True])
def test_long_sentences_take_torchs_attention_and_come_to_the_same(monkeypatch, grad):
    outcomes, calls, apply = [], [], CpuAttention.apply

    def counted(*args):
        calls.append(1)
        return apply(*args)

    for longest in (256, 18):  # one batch of the five has 19 positions
        monkeypatch.setattr(bert, "MAX_CPU_WIDTH", longest)
        model = make_model(max_position_embeddings=19)
        calls.clear()
        monkeypatch.setattr(CpuAttention, "apply", counted)
        with torch.set_grad_enabled(grad):
            outputs = model.encode(make_batches(model.config))
        monkeypatch.undo()
        assert len(calls) == (2 if longest == 256 else 0)  # layers
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
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, 4), nn.Linear(4, base.out_features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("adapter", [LowRank, Wrapped])
@pytest.mark.parametrize("names", [("query", "value"), ("dense",)])
@pytest.mark.parametrize("autocast", [False, True])
def test_adapters_of_rank_four_train(adapter, names, autocast):
    """They start as the encoder itself, learn, and leave everything else as it was."""
    model = make_model().requires_grad_(False)
    inputs = make_inputs(model.config)
    with torch.no_grad():
        expected = model(**inputs)
    for module in list(model.modules()):
        for name in names:
            if isinstance(getattr(module, name, None), nn.Linear):
                setattr(module, name, adapter(getattr(module, name)))
    start = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer = AdamW([param for param in model.parameters() if param.requires_grad], lr=0.01)
    target, losses = torch.randn(B, 32, generator=torch.Generator().manual_seed(0)), []
    for step in range(20):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            outputs = model(**inputs)
        if step == 0 and not autocast:
            for key, found in outputs.items():
                torch.testing.assert_close(found, expected[key], **FLOAT32)
        loss = (outputs["last_hidden_state"][:, 3].float() - target).square().mean()
        if names == ("dense",):
            loss = loss + (outputs["pooler_output"].float() - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    for name, param in model.named_parameters():
        assert torch.equal(param, start[name]) != param.requires_grad, name


def test_adapter_equals_its_merged_weights():
    model, merged = make_model(), make_model()
    for layer, plain in zip(model.encoder.layer, merged.encoder.layer, strict=True):
        for name in ("query", "key"):
            adapted = LowRank(getattr(layer.attention.self, name))
            nn.init.normal_(adapted.up, std=0.3)
            setattr(layer.attention.self, name, adapted)
            with torch.no_grad():
                getattr(plain.attention.self, name).weight += adapted.up @ adapted.down
    inputs = make_inputs(model.config)
    for key, found in model(**inputs).items():
        torch.testing.assert_close(found, merged(**inputs)[key], rtol=0, atol=1e-4)  # float32, larger scores


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
    for lengths in ([longest + 1], [longest, longest + 1]):
        batches = [(torch.ones(2, length, dtype=torch.long),) * 3 for length in lengths]
        with pytest.raises(ValueError, match=f"{longest + 1} positions.*at most {longest}"):
            model.encode(batches)


@pytest.mark.parametrize("shape", [(0, 7), (3, 0), (0, 0), (7,), (1, 2, 3)])
def test_batch_without_sentences_or_positions(shape):
    model = make_model()
    empty, whole = torch.ones(shape, dtype=torch.long), torch.ones(2, 3, dtype=torch.long)
    for encode in (lambda: model(empty), lambda: model.encode([(whole,) * 3, (empty,) * 3])):
        with pytest.raises(
            ValueError, match=rf"^input_ids has shape {re.escape(str(shape))}; expected .B, T"
        ):
            encode()
    with pytest.raises(ValueError, match="batches is empty"):
        model.encode([])


def test_unknown_activation():
    with pytest.raises(UserError, match="hidden_act is 'swish'; expected one of gelu, gelu_new, relu"):
        BertModel(tiny_config(hidden_act="swish"))


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
        calls.append(("hidden", tuple(x.shape), p, training, residual is not None))
        return x if residual is None else x + residual

    def record_mask(shape, p, dtype, seed):
        calls.append(("probs", tuple(shape), p))
        return torch.ones(shape, dtype=dtype), 1.0

    monkeypatch.setattr(bert, "dropout", record)
    monkeypatch.setattr(cpu, "keep_mask", record_mask)
    model = make_model(num_hidden_layers=1, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3)
    inputs = make_inputs(model.config)
    model.train(training)(**inputs)
    [padding] = make_paddings([inputs["attention_mask"]])
    embeddings, hidden = (
        ("hidden", (padding.num_tokens, 32), 0.2, training, residual) for residual in (False, True)
    )
    probs = [("probs", (B * 4, MIN_WIDTH, MIN_WIDTH), 0.3)] * training
    assert calls == [embeddings, *probs, hidden, hidden]  # attention, attention output, feed-forward
