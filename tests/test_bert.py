"""The encoder against Hugging Face's `BertModel`, torch's encoder layer, and its own promises about padding.

Shapes: B sentences, T padded length, H hidden_size, M real word pieces.
"""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import bert
from base_bert import resolve_pretrained
from bert import ACTIVATIONS, MIN_WIDTH, BertLayer, BertModel
from config import BertConfig
from kernels.cpu import CpuAttention, dropout, keep_mask
from kernels.packing import Packing, Padding, make_paddings
from support.errors import UserError

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
    rows = ours(padding.remove(ours_in), Packing([padding.num_rows]), [padding])  # (M, H)
    ours_out = padding.restore(rows)[mask]  # (real word pieces, H)
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


def test_padding_moves_between_layouts():
    padding = Padding(torch.tensor([[1, 0, 1], [0, 1, 0]]))
    x = torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]])
    assert padding.remove(x).tolist() == [[1.0], [3.0], [5.0]]
    assert padding.restore(padding.remove(x)).tolist() == [[[1.0], [0.0], [3.0]], [[0.0], [5.0], [0.0]]]
    assert padding.spread(padding.remove(x)).tolist() == [[[1.0], [1.0], [3.0]], [[1.0], [5.0], [1.0]]]
    assert padding.key_bias.flatten(1).tolist() == [[0, -math.inf, 0], [-math.inf, 0, -math.inf]]
    assert padding.num_rows == 3
    full = Padding(torch.ones(2, 3))
    assert full.key_mask is None and full.num_rows == 6
    assert torch.equal(full.restore(full.remove(x)), x) and torch.equal(full.spread(full.remove(x)), x)


@pytest.mark.parametrize("mask", [[[1, 0, 1], [0, 1, 0]], [[1, 1, 1], [1, 1, 1]]])
def test_a_wider_padding_has_the_same_rows(mask):
    padding = Padding(torch.tensor(mask))
    wide = padding.widen(5)
    x = torch.arange(1.0, 13.0).view(2, 3, 2)
    rows = padding.remove(x)
    assert wide.num_rows == padding.num_rows
    assert torch.equal(wide.mask, F.pad(padding.mask, (0, 2)))
    assert torch.equal(wide.key_mask, wide.mask[:, None, None, :])
    expected = F.pad(padding.restore(rows), (0, 0, 0, 2))  # (2, 5, 2), zeros at the new positions
    assert torch.equal(wide.restore(rows), expected)
    assert torch.equal(wide.remove(expected), rows)
    assert (
        torch.equal(wide.spread(rows)[wide.mask], expected[wide.mask]) and wide.spread(rows).isfinite().all()
    )
    assert padding.widen(3) is padding and padding.widen(2) is padding  # wide enough
    assert padding.mask.shape == (2, 3)


@pytest.mark.parametrize(("multiple", "num_rows"), [(1, 12), (4, 12), (8, 16), (16, 16), (64, 19)])
def test_rows_are_filled_up_with_padding(monkeypatch, multiple, num_rows):
    """3 + 9 real word pieces; the last batch has 7 of padding, the first none to give, nor a sentence without any."""
    monkeypatch.setattr(bert, "ROW_MULTIPLE", multiple)
    masks = [torch.tensor([[1, 1, 0, 1]]), torch.tensor([[1] * 8, [1] + [0] * 7, [0] * 8])]
    first, last = make_paddings(masks)
    assert first.rows.tolist() == [0, 1, 3]
    assert first.num_rows + last.num_rows == num_rows
    rows = last.rows.tolist()
    assert rows == sorted(set(rows)) and max(rows) < 16
    assert set(masks[1].flatten().nonzero().flatten().tolist()) <= set(rows)
    assert torch.equal(last.mask, masks[1].bool())


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


# --- several batches in one pass ---------------------------------------------------------------------------------


def make_batches(config):
    """Padded batches of different lengths, one without padding, one of a single word piece, one above MIN_WIDTH."""
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
    monkeypatch.setattr(bert, "ROW_MULTIPLE", 1)
    model, seen = make_model(type_vocab_size=2), []
    model.embeddings.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    first = torch.tensor([[[11, 12, 13], [14, 15, 16]], [[1, 0, 1], [1, 1, 0]], [[0, 0, 1], [1, 0, 0]]])
    second = torch.tensor([[[21, 22]], [[1, 1]], [[1, 0]]])
    model.encode([tuple(first), tuple(second)])
    input_ids, position_ids, token_type_ids, packing = seen[0]
    assert input_ids.tolist() == [11, 13, 14, 15, 21, 22]
    assert position_ids.tolist() == [0, 2, 0, 1, 0, 1]
    assert token_type_ids.tolist() == [0, 1, 1, 0, 1, 0]
    assert packing.batches == [slice(0, 4), slice(4, 6)] and not packing.tasks


def test_too_long_input_among_several():
    model = make_model()
    fits, too_long = (
        (torch.ones(2, length, dtype=torch.long),) * 2 + (torch.zeros(2, length, dtype=torch.long),)
        for length in (11, 12)
    )
    with pytest.raises(ValueError, match="12 positions.*at most 11"):
        model.encode([fits, too_long])


def test_linear_groups_are_all_linear_layers_once():
    model = make_model()
    grouped = [layer for group in model.linear_groups() for layer in group]
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(grouped) == len(set(grouped)) and set(grouped) == set(layers)
    for group in model.linear_groups():  # they share their input, so they have one width
        assert len({layer.in_features for layer in group}) == 1
    assert model.word_embeddings() is model.embeddings.word_embeddings.weight


# --- attention written out by hand -------------------------------------------------------------------------------

N, D = 3, 5  # heads and their width


def make_attention(batches, seed=0, dtype=torch.float64):
    """Random projections for padded batches, (M, 3 * N * D), and where they stand."""
    masks = {
        "full": torch.ones(2, 4),
        "padded": torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [1, 1, 1, 1]]),
        "short": torch.ones(2, 1),
        "long": (torch.arange(MIN_WIDTH + 2) < torch.tensor([[3], [MIN_WIDTH + 2]])).long(),
    }
    paddings = [Padding(masks[name]).widen(6) for name in batches]  # padding on the right of every rectangle
    packing = Packing([padding.num_rows for padding in paddings])
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(packing.batches[-1].stop, 3 * N * D, generator=generator, dtype=dtype)
    return qkv.requires_grad_(), packing, paddings


def plain_attention(qkv, packing, paddings, dropout_prob=0.0):
    """Sentence by sentence: softmax(Q K^T / sqrt(D)) V over real word pieces only, under automatic differentiation."""
    context = torch.zeros(len(qkv), N * D, dtype=qkv.dtype)
    for rows, padding in zip(packing.batches, paddings, strict=True):
        num_sentences, width = padding.mask.shape
        keep, scale = torch.ones(num_sentences * N, width, width), 1.0
        if dropout_prob:
            keep, scale = keep_mask(keep.shape, dropout_prob, keep.dtype)
        positions = torch.arange(padding.mask.numel()) if padding.rows is None else padding.rows
        for b in range(num_sentences):
            inside = ((positions // width) == b).nonzero().flatten()  # rows of this sentence in its batch
            where = positions[inside] % width
            query, key, value = qkv[rows][inside].view(len(inside), 3, N, D).unbind(1)
            for n in range(N):
                probs = (query[:, n] @ key[:, n].T / math.sqrt(D)).softmax(-1)
                kept = keep[b * N + n][where][:, where] * scale
                part = torch.zeros_like(context)
                part[rows.start + inside, n * D : (n + 1) * D] = (probs * kept) @ value[:, n]
                context = context + part
    return context


@pytest.mark.parametrize("dropout_prob", [0.0, 0.3])
@pytest.mark.parametrize("batches", [["full"], ["padded"], ["short"], ["padded", "long", "full", "short"]])
def test_attention_equals_the_formula(in_double, batches, dropout_prob):
    qkv, packing, paddings = make_attention(batches)
    torch.manual_seed(5)
    found = CpuAttention.apply(qkv, packing, paddings, N, dropout_prob)
    torch.manual_seed(5)  # the same draws: dropped elements are the same
    expected = plain_attention(qkv, packing, paddings, dropout_prob)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)  # float64
    weigh = torch.randn(found.shape, generator=torch.Generator().manual_seed(6))
    (found_grad,), (expected_grad,) = (
        torch.autograd.grad((context * weigh).sum(), [qkv]) for context in (found, expected)
    )
    torch.testing.assert_close(found_grad, expected_grad, rtol=1e-10, atol=1e-12)
    query, key, value = expected_grad.view(len(qkv), 3, -1).unbind(1)
    assert value.any() and (batches == ["short"] or (query.any() and key.any()))
    if dropout_prob:
        torch.manual_seed(5)
        assert not torch.allclose(found, plain_attention(qkv, packing, paddings))


@pytest.mark.parametrize("dropout_prob", [0.0, 0.5])
def test_attention_gradient_equals_finite_differences(in_double, dropout_prob):
    qkv, packing, paddings = make_attention(["padded", "full"])

    def attend(qkv):
        torch.manual_seed(2)
        return CpuAttention.apply(qkv, packing, paddings, N, dropout_prob)

    assert torch.autograd.gradcheck(attend, [qkv], fast_mode=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_attention_in_other_types(dtype, tolerance):
    """Of the whole result's length: a few roundings to bfloat16, each by up to 2**-9 of a number, or to float32."""
    qkv, packing, paddings = make_attention(["padded", "long"], dtype=dtype)
    exact = qkv.detach().float().requires_grad_()
    found = CpuAttention.apply(qkv, packing, paddings, N, 0.0)
    expected = plain_attention(exact, packing, paddings)
    assert found.dtype == dtype
    assert (found.float() - expected).norm() / expected.norm() < tolerance
    weigh = torch.randn(found.shape, generator=torch.Generator().manual_seed(6)).to(dtype)
    found.backward(weigh)
    expected.backward(weigh.float())
    assert qkv.grad.dtype == dtype
    assert (qkv.grad.float() - exact.grad).norm() / exact.grad.norm() < tolerance


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


def test_attention_keeps_the_share_that_its_dropout_leaves():
    """With value 1 everywhere the context is the sum of what dropout leaves of each row: 1 on average."""
    padding = Padding(torch.ones(40, 20))
    qkv = torch.randn(800, 3 * N * D, generator=torch.Generator().manual_seed(0))
    qkv[:, 2 * N * D :] = 1.0
    torch.manual_seed(0)
    context = CpuAttention.apply(qkv, Packing([800]), [padding], N, 0.25)
    # 2400 rows of 20 draws each, of about equal weight: an error of about sqrt(1/3 / 48000) = 0.003.
    assert context.mean().item() == pytest.approx(1, abs=0.02) and context.std() > 0.05


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


def test_word_embedding_gradient_is_dense_and_adds_up():
    """Ordinary gradients; those that are kept by task are in test_direct_grads.py."""
    model, inputs = make_model(), make_inputs(tiny_config())
    weight = model.word_embeddings()
    model(**inputs)["last_hidden_state"].pow(3).sum().backward()
    alone = weight.grad.clone()
    weight.grad = torch.ones_like(weight)
    grad = weight.grad
    model(**inputs)["last_hidden_state"].pow(3).sum().backward()
    assert weight.grad is grad and not grad.is_sparse
    torch.testing.assert_close(grad, 1 + alone, rtol=1e-6, atol=1e-5)
    seen = inputs["input_ids"][inputs["attention_mask"].bool()].unique()
    assert torch.equal(alone.any(1).nonzero().squeeze(1), seen)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("p", "training"), [(0.5, True), (0.5, False), (0.0, True)])
def test_dropout_adds_the_residual_afterwards(p, training, dtype):
    generator = torch.Generator().manual_seed(0)
    x, residual, grad = torch.randn(3, 7, 5, generator=generator).to(dtype)
    x, residual = x.requires_grad_(), residual.requires_grad_()
    torch.manual_seed(1)
    expected = dropout(x, p, training) + residual
    expected_grads = torch.autograd.grad(expected, [x, residual], grad)
    torch.manual_seed(1)
    found = dropout(x, p, training, residual)
    # p = 1/2 scales by 2 exactly, so both ways round once.
    assert torch.equal(found, expected) and found.dtype == dtype
    for one, other in zip(torch.autograd.grad(found, [x, residual], grad), expected_grads, strict=True):
        assert torch.equal(one, other)


def test_keep_mask_and_its_scale():
    torch.manual_seed(0)
    keep, scale = keep_mask((1000, 3), 0.25, torch.bfloat16)
    assert keep.shape == (1000, 3) and keep.dtype == torch.bfloat16
    assert set(keep.unique().tolist()) == {0.0, 1.0} and scale == 4 / 3
    assert keep_mask((5,), 0.1, torch.float32)[1] == 65536 / 58982  # 6554 of 65536 are dropped
    keep, scale = keep_mask((5,), 1 - 2**-20, torch.float32)
    assert scale == 65536  # something is always kept


@pytest.mark.parametrize("training", [True, False])
def test_dropout_stands_where_bert_has_it(monkeypatch, training):
    calls = []

    def record(x, p, training, residual=None):
        calls.append(("hidden", tuple(x.shape), p, training, residual is not None))
        return x if residual is None else x + residual

    def record_mask(shape, p, dtype):
        calls.append(("probs", tuple(shape), p))
        return torch.ones(shape, dtype=dtype), 1.0

    monkeypatch.setattr(bert, "dropout", record)
    monkeypatch.setattr(bert, "keep_mask", record_mask)
    model = make_model(num_hidden_layers=1, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3)
    inputs = make_inputs(model.config)
    model.train(training)(**inputs)
    [padding] = make_paddings([inputs["attention_mask"]])
    embeddings, hidden = (
        ("hidden", (padding.num_rows, 32), 0.2, training, residual) for residual in (False, True)
    )
    probs = [("probs", (B * 4, MIN_WIDTH, MIN_WIDTH), 0.3)] * training
    assert calls == [embeddings, *probs, hidden, hidden]  # attention, attention output, feed-forward


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
