"""Pooling, pair features and task heads with numbers worked by hand; losses of several batches together and
alone.

Shapes: B examples, R sentences, T padded length, H hidden_size, C outputs.
"""

import math

import pytest
import torch
import torch.nn.functional as F

import heads
from heads import HEADS, PAIR_HEADS, POOLINGS, TaskHead
from kernels.fused import PLAIN, Kernels
from tests.tiny import make_batch, make_model, shared_grads

B, H = 13, 6

# --- pooling ------------------------------------------------------------------------------------------------

# Two sentences: the first with padding at the end, the second with padding in the middle. The padding holds
# numbers that would show (the encoder leaves zeros there, which would not).
OUTPUTS = {
    "last_hidden_state": torch.tensor(
        [[[1.0, 2.0], [3.0, 5.0], [100.0, 100.0]], [[-1.0, 0.0], [100.0, 100.0], [4.0, -6.0]]]
    ),
    "pooler_output": torch.tensor([[0.5, -0.5], [0.25, 1.0]]),
}
ATTENTION_MASK = torch.tensor([[1, 1, 0], [1, 0, 1]])
POOLED = {
    "cls": [[1.0, 2.0], [-1.0, 0.0]],
    "mean": [[2.0, 3.5], [1.5, -3.0]],
    "pooler": [[0.5, -0.5], [0.25, 1.0]],
}


@pytest.mark.parametrize("mask_type", [torch.long, torch.bool, torch.float32])
def test_pooling_by_hand_ignores_padding(mask_type):
    assert POOLED.keys() == POOLINGS.keys()
    mask = ATTENTION_MASK.to(mask_type)
    changed = OUTPUTS["last_hidden_state"].masked_fill(ATTENTION_MASK[:, :, None] == 0, -7.0)
    longer = OUTPUTS | {"last_hidden_state": F.pad(changed, (0, 0, 0, 4), value=9.0)}  # (R, T + 4, H)
    for name, pool in POOLINGS.items():
        assert pool(OUTPUTS, mask).tolist() == pool(longer, F.pad(mask, (0, 4))).tolist() == POOLED[name]


def test_mean_of_nothing_is_finite():
    pooled = POOLINGS["mean"](OUTPUTS, torch.zeros(2, 3, dtype=torch.long))
    assert pooled.tolist() == [[0.0, 0.0], [0.0, 0.0]]


# --- features -----------------------------------------------------------------------------------------------

U = torch.tensor([[3.0, 4.0], [1.0, 0.0], [2.0, 0.0]])
V = torch.tensor([[4.0, 3.0], [0.0, -2.0], [-1.0, 0.0]])
FEATURES = {
    "concat": [[3.0, 4.0, 4.0, 3.0], [1.0, 0.0, 0.0, -2.0], [2.0, 0.0, -1.0, 0.0]],
    "diff": [
        [3.0, 4.0, 4.0, 3.0, 1.0, 1.0, 12.0, 12.0],
        [1.0, 0.0, 0.0, -2.0, 1.0, 2.0, 0.0, 0.0],
        [2.0, 0.0, -1.0, 0.0, 3.0, 0.0, -2.0, 0.0],
    ],
    "cosine": [[24 / 25], [0.0], [-1.0]],
}


def test_features_by_hand():
    assert FEATURES.keys() == {name for name, spec in HEADS.items() if spec.features is not None}
    for name, expected in FEATURES.items():
        found = HEADS[name].features(U, V)
        # The cosine is rounded in float32, the others are exact.
        atol = 1e-6 * (name == "cosine")
        torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=atol)
        assert found.shape[-1] == HEADS[name].width(U.shape[-1])


def test_cosine_of_bfloat16_is_float32_and_finite_with_a_zero_vector():
    torch.manual_seed(0)
    u, v = torch.randn(2, B, 384).bfloat16()
    expected = F.cosine_similarity(u.double(), v.double())[:, None].float()
    # bfloat16 arithmetic would be 1e-3 off
    torch.testing.assert_close(HEADS["cosine"].features(u, v), expected, rtol=0, atol=1e-6)
    u = torch.zeros(1, H, requires_grad=True)
    cosine = HEADS["cosine"].features(u, torch.ones(1, H))
    cosine.sum().backward()
    assert cosine.item() == 0 and u.grad.isfinite().all()


# --- heads --------------------------------------------------------------------------------------------------

# Head -> (inputs of its last dense layer with one layer, vectors it takes, whether the pair is one sequence).
EXPECTED_HEADS = {
    "single": (H, 1, False),
    "concat": (2 * H, 2, False),
    "cosine": (1, 2, False),
    "diff": (4 * H, 2, False),
    "cross": (H, 1, True),
}


def make_vectors(name, seed=0):
    torch.manual_seed(seed)
    return torch.randn(EXPECTED_HEADS[name][1], B, H).unbind()


def test_every_head_has_a_row():
    assert EXPECTED_HEADS.keys() == HEADS.keys()
    assert PAIR_HEADS == ("concat", "cosine", "diff", "cross")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("name", HEADS)
def test_shapes_and_dropout_before_every_layer(monkeypatch, name, num_layers, training):
    """But not of a single number: dropping it would only be noise."""
    calls = []

    def record(x, p, training):
        calls.append((tuple(x.shape), p, training))
        return x

    monkeypatch.setattr(heads, "dropout", record)
    width, num_vectors, joint = EXPECTED_HEADS[name]
    num_outputs = 1 if training else 5
    head = TaskHead(name, H, num_outputs, num_layers, dropout_prob=0.3).train(training)
    widths = [width] + [H] * (num_layers - 1) * (name != "cosine")
    shapes = [tuple(layer.weight.shape) for layer in head.dense]
    assert shapes == list(zip([*widths[1:], num_outputs], widths, strict=True))
    assert head.spec.joint is joint and (head.spec.features is None) == (num_vectors == 1)
    logits = head(*make_vectors(name))
    assert logits.shape == (B, num_outputs)
    logits.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in head.parameters())
    assert calls == [((B, width), 0.3 if width > 1 else 0.0, training) for width in widths]


def test_two_layers_by_hand():
    head = TaskHead("single", 2, 1, num_layers=2).eval()
    with torch.no_grad():
        head.dense[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
        head.dense[0].bias.copy_(torch.tensor([0.0, 3.0]))
        head.dense[1].weight.copy_(torch.tensor([[2.0, 10.0]]))
        head.dense[1].bias.fill_(1.0)
    gelu_3, gelu_1 = (x * 0.5 * (1 + math.erf(x / math.sqrt(2))) for x in (3, -1))
    # (3, 4): hidden 3 and -4 + 3 = -1
    assert head(U[:1]).item() == pytest.approx(2 * gelu_3 + 10 * gelu_1 + 1, abs=1e-5)


def test_initial_weights():
    torch.manual_seed(0)
    head = TaskHead("diff", 100, 50, num_layers=2, initializer_range=0.3)
    for layer in head.dense:
        size = layer.weight.numel()  # 40,000 and 5,000 numbers: five standard errors
        assert abs(layer.weight.mean()) < 5 * 0.3 / size**0.5
        assert abs(layer.weight.std() - 0.3) < 5 * 0.3 / (2 * size) ** 0.5
        assert (layer.bias == 0).all()


@pytest.mark.parametrize("num_outputs", [1, 5])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_logits_start_in_the_middle_and_the_cosine_at_its_range(num_layers, num_outputs):
    for name in HEADS.keys() - {"cosine"}:
        nothing = [torch.zeros(1, H)] * EXPECTED_HEADS[name][1]  # then the last bias alone speaks
        for middle, options in ((3.0, {"logit_range": (1, 5)}), (0.0, {})):
            head = TaskHead(name, H, num_outputs, num_layers, **options).eval()
            assert head(*nothing).tolist() == [[middle] * num_outputs]
            # Vectors of order 1 through weights of order 0.02 stay near it, and differ.
            logits = head(*make_vectors(name))
            assert logits.std() > 0 and (logits - middle).abs().max() < 1
    head = TaskHead("cosine", 2, num_outputs, num_layers, logit_range=(-1, 4))
    u = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 3.0], [1.0, 0.0]])
    v = torch.tensor([[0.0, 5.0], [7.0, 0.0], [0.0, -1.0], [0.5, math.sqrt(0.75)]])
    expected = torch.tensor([-1.0, 4.0, -6.0, 1.5])  # cosines 0, 1, -1 and a half
    torch.testing.assert_close(head(u, v), expected[:, None].expand(4, num_outputs), rtol=0, atol=1e-5)


# --- the multitask model ------------------------------------------------------------------------------------

TASK_HEADS = {"sst": "single", "para": "diff", "sts": "cross"}
SIZES = [("sts", 3, 7), ("sst", 4, 18), ("para", 2, 1), ("sts", 2, 16), ("para", 3, 5)]


def make_batches():
    return [
        (task, make_batch(task, TASK_HEADS[task], size, seed=n, positions=positions))
        for n, (task, size, positions) in enumerate(SIZES)
    ]


@pytest.mark.parametrize("freeze_encoder", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_losses_together_are_those_of_each_batch_alone(pooling, freeze_encoder):
    model = make_model(TASK_HEADS, pooling=pooling, freeze_encoder=freeze_encoder).eval()
    batches = make_batches()
    together = model.losses(batches)
    assert len(together) == len(batches)
    for loss, (task, batch) in zip(together, batches, strict=True):
        assert loss.shape == () and loss.requires_grad
        torch.testing.assert_close(loss, model.loss(task, batch), rtol=1e-5, atol=1e-6)  # float32
    assert len({round(loss.item(), 4) for loss in together}) == len(batches)
    memory = model.move_to_flat_memory()
    memory.start_step()
    for loss, expected in zip(model.losses(batches, memory), together, strict=True):
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_gradients_by_task_land_in_the_order_of_the_tasks():
    """Whatever the order of the batches; and the encoder's parameters have no other gradient."""
    model, batches = make_model(TASK_HEADS).eval(), make_batches()
    memory = model.move_to_flat_memory()
    assert memory.tasks == tuple(TASK_HEADS)
    for k, task in enumerate(memory.tasks):
        memory.start_step()
        sum(model.losses([pair for pair in batches if pair[0] == task], memory)).backward()
        memory.finish_grads()
        rows = shared_grads(memory)
        assert rows[k].any() and not rows[[n for n in range(3) if n != k]].any()
        assert all(memory.head_grad(other).any() == (other == task) for other in memory.tasks)
    assert all(param.grad is None for param in model.bert.parameters())


def test_memory_has_the_types_and_kernels_that_were_asked_for():
    kernels = Kernels(gram_matrix=len)
    for frozen in (False, True):
        model = make_model(freeze_encoder=frozen)
        memory = model.move_to_flat_memory(torch.bfloat16, torch.bfloat16, kernels)
        assert memory.matrix_grads.dtype == torch.bfloat16 and memory.kernels is kernels
        assert frozen or memory.weight_copy.dtype == torch.bfloat16
        assert (memory.layout.num_shared == 0) == frozen
    memory = make_model().move_to_flat_memory()
    assert memory.weight_copy is None and memory.matrix_grads.dtype == torch.float32
    assert memory.kernels is PLAIN


@pytest.mark.parametrize("freeze_encoder", [False, True])
def test_a_frozen_encoder_keeps_nothing_for_a_backward_pass(freeze_encoder):
    model, seen = make_model(freeze_encoder=freeze_encoder), []
    model.bert.embeddings.register_forward_hook(lambda *args: seen.append(torch.is_grad_enabled()))
    batch = make_batch("sst", "single", 2)
    model.loss("sst", batch)
    model("sst", batch)
    assert seen == [not freeze_encoder] * 2


def test_head_runs_in_float32_under_autocast():
    model = make_model().eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model("sts", make_batch("sts"))
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())  # not rounded on the way
