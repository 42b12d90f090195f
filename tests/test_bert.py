"""The encoder against Hugging Face's `BertModel`, torch's encoder layer, and its own promises about padding.

Shapes: B sentences, T padded length, H hidden_size, M real word pieces.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import bert
from base_bert import resolve_pretrained
from bert import ACTIVATIONS, BertLayer, BertModel, Padding, dropout
from config import BertConfig, UserError

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
    """A tiny encoder in which every parameter matters: no zero biases, no identity LayerNorm."""
    model = BertModel(tiny_config(**changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if name.endswith("LayerNorm.weight") else 0.0
            parameter.normal_(centre, 0.2, generator=generator)
    return model.eval()


def make_inputs(config, seed=0):
    """B random sentences of length T with padding on the right, on the left, in the middle and none at all."""
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


# --- against Hugging Face ----------------------------------------------------------------------------------------


def test_every_activation_has_a_case():
    covered = {(TINY | CASES[name]).get("hidden_act", BertConfig.hidden_act) for name in RANDOM_CASES}
    assert covered == set(ACTIVATIONS)


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


@pytest.mark.parametrize("name", RANDOM_CASES)
def test_gradients_equal_hugging_face(references, name):
    model = load_case(name).double().train()
    inputs = make_inputs(model.config)
    weigh_last, weigh_pooler = make_loss_weights(inputs, model.config.hidden_size)
    outputs = model(**inputs)
    loss = (outputs["last_hidden_state"] * weigh_last).sum() + (outputs["pooler_output"] * weigh_pooler).sum()
    loss.backward()
    found = {"grad." + key: parameter.grad for key, parameter in model.named_parameters()}
    expected = {key: value for key, value in references[name].items() if key.startswith("grad.")}
    assert found.keys() == expected.keys()
    for (
        key,
        value,
    ) in expected.items():  # float64: a tight tolerance holds for small and large gradients alike
        torch.testing.assert_close(
            found[key], value, rtol=1e-8, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}"
        )


# --- against torch's own layer -----------------------------------------------------------------------------------


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
    query, key, value = weight["self_attn.in_proj_weight"].chunk(3)
    query_bias, key_bias, value_bias = weight["self_attn.in_proj_bias"].chunk(3)
    ours.load_state_dict(
        {
            "attention.self.query.weight": query,
            "attention.self.query.bias": query_bias,
            "attention.self.key.weight": key,
            "attention.self.key.bias": key_bias,
            "attention.self.value.weight": value,
            "attention.self.value.bias": value_bias,
            "attention.output.dense.weight": weight["self_attn.out_proj.weight"],
            "attention.output.dense.bias": weight["self_attn.out_proj.bias"],
            "attention.output.LayerNorm.weight": weight["norm1.weight"],
            "attention.output.LayerNorm.bias": weight["norm1.bias"],
            "intermediate.dense.weight": weight["linear1.weight"],
            "intermediate.dense.bias": weight["linear1.bias"],
            "output.dense.weight": weight["linear2.weight"],
            "output.dense.bias": weight["linear2.bias"],
            "output.LayerNorm.weight": weight["norm2.weight"],
            "output.LayerNorm.bias": weight["norm2.bias"],
        }
    )
    mask = make_inputs(config)["attention_mask"].bool()
    ours_in = torch.randn(B, T, config.hidden_size).requires_grad_()
    theirs_in = ours_in.detach().clone().requires_grad_()
    padding = Padding(mask)
    ours_out = padding.restore(ours(padding.remove(ours_in), padding))[mask]  # (real word pieces, H)
    theirs_out = theirs(theirs_in, src_key_padding_mask=~mask)[mask]  # (real word pieces, H)
    torch.testing.assert_close(ours_out, theirs_out, **FLOAT32)
    weigh = torch.randn(ours_out.shape)
    (ours_out * weigh).sum().backward()
    (theirs_out * weigh).sum().backward()
    torch.testing.assert_close(ours_in.grad, theirs_in.grad, rtol=1e-4, atol=1e-4)  # values up to 20
    assert ours_in.grad[mask].abs().min() > 0


# --- padding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
def test_a_sentence_is_the_same_alone_and_in_a_batch(grad):
    model = make_model()
    inputs = make_inputs(model.config)
    inputs["attention_mask"] = inputs["attention_mask"].sort(dim=1, descending=True)[
        0
    ]  # padding on the right
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


def test_padding_moves_between_layouts(monkeypatch):
    monkeypatch.setattr(bert, "ROW_MULTIPLE", 1)
    padding = Padding(torch.tensor([[1, 0, 1], [0, 1, 0]]))
    x = torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]])
    assert padding.remove(x).tolist() == [[1.0], [3.0], [5.0]]
    assert padding.restore(padding.remove(x)).tolist() == [[[1.0], [0.0], [3.0]], [[0.0], [5.0], [0.0]]]
    full = Padding(torch.ones(2, 3))
    assert full.key_mask is None
    assert torch.equal(full.restore(full.remove(x)), x)


@pytest.mark.parametrize(("multiple", "num_rows"), [(1, 9), (4, 12), (8, 16), (16, 16), (64, 16)])
def test_rows_are_filled_up_with_padding(monkeypatch, multiple, num_rows):
    """9 real word pieces and 7 of padding; 16 is all there is beside the sentence without any."""
    monkeypatch.setattr(bert, "ROW_MULTIPLE", multiple)
    mask = torch.tensor([[1] * 8, [1] + [0] * 7, [0] * 8])
    rows = Padding(mask).rows
    assert len(rows) == num_rows and rows.tolist() == sorted(set(rows.tolist()))
    assert set(mask.flatten().nonzero().flatten().tolist()) <= set(rows.tolist())
    assert rows.max() < 16


def test_filling_up_changes_no_result_and_no_gradient(monkeypatch):
    outcomes = []
    for multiple in (1, 64):
        monkeypatch.setattr(bert, "ROW_MULTIPLE", multiple)
        model = make_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
        inputs = make_inputs(model.config)
        outputs = model(**inputs)["last_hidden_state"]
        outputs.square().mean().backward()
        outcomes.append(
            [outputs, *(param.grad for name, param in model.named_parameters() if "pooler" not in name)]
        )
    for plain, filled in zip(*outcomes, strict=True):
        torch.testing.assert_close(filled, plain, atol=1e-6, rtol=1e-4)  # float32 sums in another order


# --- limits ------------------------------------------------------------------------------------------------------


def test_too_long_input():
    model = make_model()
    longest = model.config.max_position_embeddings
    assert model(torch.ones(1, longest, dtype=torch.long))["last_hidden_state"].shape == (1, longest, 32)
    with pytest.raises(ValueError, match=f"{longest + 1} positions.*at most {longest}"):
        model(torch.ones(1, longest + 1, dtype=torch.long))


def test_unknown_activation():
    with pytest.raises(UserError, match="hidden_act is 'swish'; expected one of gelu, gelu_new, relu"):
        BertModel(tiny_config(hidden_act="swish"))


def test_size_of_bert_base():
    with torch.device("meta"):
        model = BertModel(BertConfig())
    assert sum(p.numel() for p in model.parameters()) == 109_482_240  # of bert-base-uncased with its pooler


# --- precision and layout of gradients ---------------------------------------------------------------------------


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


def test_sparse_embedding_gradient_adds_to_the_dense_one():
    inputs = make_inputs(tiny_config())
    grads = {}
    for sparse_grad in (False, True):
        model = make_model()
        model.embeddings.sparse_grad = sparse_grad
        weight = model.embeddings.word_embeddings.weight
        weight.grad = torch.ones_like(weight)
        grad = weight.grad
        model(**inputs)["last_hidden_state"].pow(3).sum().backward()
        assert weight.grad is grad and not grad.is_sparse
        grads[sparse_grad] = grad
    torch.testing.assert_close(grads[True], grads[False], rtol=1e-6, atol=1e-5)
    model.zero_grad()
    model(**inputs)["last_hidden_state"].sum().backward()
    assert weight.grad.is_sparse  # so only the rows in use were written above
    seen = inputs["input_ids"][inputs["attention_mask"].bool()].unique()
    touched = (grads[True] != 1).any(1).nonzero().squeeze(1)
    assert torch.equal(touched, seen)


# --- dropout -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_a_share_of_1_minus_p(p):
    torch.manual_seed(0)
    n = 400_001  # not a multiple of four: the last draw is used in part
    kept = (dropout(torch.ones(n), p, training=True) != 0).double()
    sigma = (p * (1 - p)) ** 0.5
    assert abs(kept.mean() - (1 - p)) < 5 * sigma / n**0.5
    for lane in range(4):  # each of the four parts of a 64-bit draw
        share = kept[lane::4]
        assert abs(share.mean() - (1 - p)) < 5 * sigma / len(share) ** 0.5
    centred = kept - (1 - p)
    for distance in range(1, 9):  # neighbours know nothing of each other
        correlation = (centred[distance:] * centred[:-distance]).mean() / sigma**2
        assert abs(correlation) < 5 / n**0.5


def test_dropout_scales_by_hand():
    # 0.1 * 65536 = 6553.6 rounds to 6554, so the rest is scaled by 65536 / (65536 - 6554).
    torch.manual_seed(0)
    y = dropout(torch.ones(1000), 0.1, training=True)
    assert y.unique().tolist() == [0.0, torch.tensor(65536 / 58982).item()]
    y = dropout(torch.ones(1000), 0.25, training=True)  # 0.25 is a multiple of 2**-16
    assert y.unique().tolist() == [0.0, torch.tensor(4 / 3).item()]
    x = torch.ones(1000)
    assert torch.equal(dropout(x, 2**-18, training=True), x)  # rounds to 0


def test_dropout_next_to_1():
    # BertConfig takes any probability below 1; one that rounds to 1 must not divide by zero.
    y = dropout(torch.ones(1000), 1 - 2**-20, training=True)
    assert y.isfinite().all()


def test_dropout_is_the_identity_in_eval_and_for_0():
    x = torch.randn(5, 3)
    state = torch.get_rng_state()
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0, training=True) is x
    assert torch.equal(torch.get_rng_state(), state)  # and draws nothing


def test_dropout_follows_the_seed():
    x = torch.randn(1001, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    ys = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        ys += [dropout(x, 0.5, training=True), dropout(x, 0.5, training=True)]
    assert torch.equal(ys[0], ys[2]) and torch.equal(ys[1], ys[3])
    assert not torch.equal(ys[0], ys[1]) and not torch.equal(ys[0], ys[4])
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dropout_gradient_flows_through_kept_elements_only(dtype):
    torch.manual_seed(0)
    x = torch.ones(3, 5, 7, dtype=dtype, requires_grad=True)
    y = dropout(x, 0.5, training=True)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(x.grad, y)  # each is 0 or 2 times the 1 that went in, and came back


def test_dropout_in_bfloat16():
    torch.manual_seed(0)
    x = torch.ones(4001, dtype=torch.bfloat16)
    low = dropout(x, 0.1, training=True)
    torch.manual_seed(0)
    high = dropout(x.float(), 0.1, training=True)
    assert torch.equal(low != 0, high != 0)  # the same elements, whatever the type
    torch.testing.assert_close(low.float(), high, rtol=2**-8, atol=0)  # bfloat16 has 8 significant bits


@pytest.mark.parametrize("shape", [(0,), (1,), (2,), (3,), (5,), (1, 1, 3), (13, 7, 3)])
def test_dropout_takes_any_number_of_elements(shape):
    torch.manual_seed(0)
    y = dropout(torch.ones(shape), 0.5, training=True)
    assert y.shape == shape
    assert set(y.flatten().tolist()) <= {0.0, 2.0}


def test_dropout_of_a_transposed_view():
    torch.manual_seed(0)
    x = torch.arange(1.0, 92.0).view(7, 13).T
    y = dropout(x, 0.5, training=True)
    assert ((y == 0) | (y == 2 * x)).all() and (y == 0).any() and (y != 0).any()


@pytest.mark.parametrize("training", [True, False])
def test_dropout_stands_where_bert_has_it(monkeypatch, training):
    calls = []

    def record(x, p, training):
        calls.append((tuple(x.shape), p, training))
        return x

    monkeypatch.setattr(bert, "dropout", record)
    model = make_model(num_hidden_layers=1, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3)
    inputs = make_inputs(model.config)
    model.train(training)(**inputs)
    hidden = ((len(Padding(inputs["attention_mask"]).rows), 32), 0.2, training)
    probs = ((B, 4, T, T), 0.3 if training else 0.0, training)
    assert calls == [hidden, probs, hidden, hidden]  # embeddings, attention, attention output, feed-forward


@pytest.mark.parametrize("name", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_each_dropout_probability_has_an_effect(name):
    model = make_model(**{name: 0.5})
    inputs = make_inputs(model.config)
    plain = model.eval()(**inputs)["last_hidden_state"]
    assert torch.equal(model(**inputs)["last_hidden_state"], plain)
    model.train()
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(model(**inputs)["last_hidden_state"])
    assert torch.equal(outputs[0], outputs[1])
    assert F.l1_loss(outputs[0], outputs[2]) > 0.05 and F.l1_loss(outputs[0], plain) > 0.05
