"""Tests of task_grads.py: gradients by task against ordinary autograd, for single layers and for a whole encoder.

Shapes: M rows, B sentences, T padded length, H hidden_size, K tasks.
"""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bert import MIN_WIDTH, BertModel
from config import BertConfig
from kernels import task_grads
from kernels.flat_memory import FlatMemory
from kernels.packing import Packing
from kernels.task_grads import Slot, embedding, layer_norm, linear

# --- packing -----------------------------------------------------------------------------------------------------


def test_packing_by_hand():
    packing = Packing([3, 2, 4, 1, 5], [1, 1, 0, 1, 1])
    assert packing.batches == [slice(0, 3), slice(3, 5), slice(5, 9), slice(9, 10), slice(10, 15)]
    assert packing.tasks == [(1, slice(0, 5)), (0, slice(5, 9)), (1, slice(9, 15))]  # neighbours together
    assert Packing([3, 2]).tasks == [] and Packing([3, 2]).batches == [slice(0, 3), slice(3, 5)]


# --- slots -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slot_is_overwritten_first_and_added_to_later(dtype):
    grads = torch.full((2, 2, 3), torch.nan, dtype=dtype)
    slot = Slot(torch.zeros(2, 3), list(grads), [True, True])
    a, b = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0, 5.0]])
    product = torch.tensor([[3.0, 4.0, 5.0], [6.0, 8.0, 10.0]])
    slot.write_product(1, a, b)  # in bfloat16 through a copy, else straight to its place
    assert torch.equal(grads[1], product.to(dtype)) and slot.is_empty == [True, False]
    slot.write_product(1, a, b)
    slot.write(1, torch.ones(2, 3))
    assert torch.equal(grads[1], (2 * product + 1).to(dtype))
    assert grads[0].isnan().all()
    slot.write(0, torch.ones(2, 3))
    assert torch.equal(grads[0], torch.ones(2, 3, dtype=dtype)) and slot.is_empty == [False, False]


# --- single layers -----------------------------------------------------------------------------------------------

SIZES, TASKS = [5, 3, 7, 2], [2, 0, 2, 2]  # three tasks, the second without a batch
NUM_ROWS = sum(SIZES)
ROWS_OF = {0: [5, 6, 7], 1: [], 2: [*range(5), *range(8, 17)]}


def give_slot(*params: nn.Parameter, num_tasks: int = 3, dtype: torch.dtype = torch.float32) -> Slot:
    """What `FlatMemory` does for parameters that lie end to end."""
    weight = torch.cat([param.detach() for param in params]).to(dtype)
    grads = torch.full((num_tasks, *weight.shape), torch.nan)
    params[0].slot = Slot(weight, list(grads), [True] * num_tasks)
    return params[0].slot


def random_input(width: int, seed: int = 0, num_rows: int = NUM_ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's input and the gradient of its output, each (M, width)."""
    generator = torch.Generator().manual_seed(seed)
    x, dy = torch.randn(2, num_rows, width, generator=generator)
    return x.requires_grad_(), dy


def test_fused_layers_equal_separate_ones():
    """Query, key and value in one product: values, gradient of the input, and each task's of every parameter."""
    torch.manual_seed(0)
    layers = [nn.Linear(6, width) for width in (6, 6, 5)]
    weight, bias = (
        give_slot(*(layer.weight for layer in layers)),
        give_slot(*(layer.bias for layer in layers)),
    )
    x, _ = random_input(6)
    _, dy = random_input(17)
    expected = torch.cat([F.linear(x, layer.weight, layer.bias) for layer in layers], dim=1)
    expected_dx, *dweights = torch.autograd.grad(expected, [x, *(layer.weight for layer in layers)], dy)
    y = linear(x, Packing(SIZES, TASKS), *layers)
    y.backward(dy)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)  # float32, as all below
    torch.testing.assert_close(x.grad, expected_dx, rtol=1e-5, atol=1e-6)
    for task in (0, 2):
        rows = ROWS_OF[task]
        torch.testing.assert_close(weight.grads[task], dy[rows].T @ x[rows], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(bias.grads[task], dy[rows].sum(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weight.grads[0] + weight.grads[2], torch.cat(dweights), rtol=1e-5, atol=1e-5)
    assert weight.is_empty == bias.is_empty == [False, True, False]
    assert weight.grads[1].isnan().all() and bias.grads[1].isnan().all()  # not written: for `finish_grads`
    assert all(param.grad is None for layer in layers for param in layer.parameters())


def test_linear_without_tasks_is_an_ordinary_layer():
    torch.manual_seed(0)
    layers = [nn.Linear(6, width) for width in (6, 5)]
    for chosen in ([layers[0]], layers):
        x, _ = random_input(6)
        _, dy = random_input(sum(layer.out_features for layer in chosen))
        expected = torch.cat([layer(x) for layer in chosen], dim=1)
        params = [param for layer in chosen for param in layer.parameters()]
        expected_grads = torch.autograd.grad(expected, [x, *params], dy)
        y = linear(x, Packing(SIZES), *chosen)  # no slots are there
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)  # float32
        for found, grad in zip(torch.autograd.grad(y, [x, *params], dy), expected_grads, strict=True):
            torch.testing.assert_close(found, grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_tasks_change_nothing_without_gradients_or_trainable_parameters(frozen):
    torch.manual_seed(0)
    layers = [nn.Linear(6, 6), nn.LayerNorm(6), nn.Embedding(5, 6)]
    for layer in layers:
        layer.requires_grad_(not frozen)
    x, _ = random_input(6)
    ids = torch.arange(NUM_ROWS) % 5
    packing = Packing(SIZES, TASKS)
    with torch.set_grad_enabled(frozen):  # there are no slots: an access would fail
        found = [linear(x, packing, layers[0]), layer_norm(x, packing, layers[1])]
        found += [embedding(ids, packing, layers[2])]
    for y, expected in zip(found, [layers[0](x), layers[1](x), layers[2](ids)], strict=True):
        assert torch.equal(y, expected)
    assert [y.requires_grad for y in found] == [frozen, frozen, False]  # through the input


def test_linear_reads_the_copy_of_its_weights():
    """The slot says what is computed with, and in which type; gradients leave in the type of their place."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 5)
    weight, bias = give_slot(layer.weight, dtype=torch.bfloat16), give_slot(layer.bias)
    x, _ = random_input(6)
    _, dy = random_input(5)
    y = linear(x, Packing(SIZES, TASKS), layer)
    assert y.dtype == torch.bfloat16
    y.backward(dy.bfloat16())
    assert x.grad.dtype == torch.float32 and weight.grads[0].dtype == bias.grads[0].dtype == torch.float32
    rounded, dy = x.detach().bfloat16().float(), dy.bfloat16().float()
    exact = F.linear(rounded, weight.weight.float(), layer.bias.bfloat16().float())
    # Inputs are rounded here as there; results once, by up to 2**-9 of a number of order 1 to 4.
    torch.testing.assert_close(y.float(), exact, rtol=2**-8, atol=2**-8)
    torch.testing.assert_close(
        weight.grads[2], dy[ROWS_OF[2]].T @ rounded[ROWS_OF[2]], rtol=2**-8, atol=2**-8
    )
    torch.testing.assert_close(bias.grads[2], dy[ROWS_OF[2]].sum(0), rtol=2**-8, atol=2**-8)
    torch.testing.assert_close(x.grad, dy @ weight.weight.float(), rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize("with_tasks", [True, False])
def test_layer_norm_equals_the_formula(with_tasks):
    layer = nn.LayerNorm(7, eps=0.1)  # a large eps shows where it is added
    x, dy = random_input(7)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(1))
        layer.bias.uniform_(-1.0, 1.0, generator=torch.Generator().manual_seed(2))
    weight, bias = give_slot(layer.weight), give_slot(layer.bias)
    centred = x - x.mean(1, keepdim=True)
    normal = centred / (x.var(1, unbiased=False, keepdim=True) + 0.1).sqrt()
    expected = normal * layer.weight + layer.bias
    expected_dx, dweight, dbias = torch.autograd.grad(expected, [x, layer.weight, layer.bias], dy)
    y = layer_norm(x, Packing(SIZES, TASKS if with_tasks else None), layer)
    y.backward(dy)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)  # float32, as all below
    torch.testing.assert_close(x.grad, expected_dx, rtol=1e-5, atol=1e-6)
    if not with_tasks:
        torch.testing.assert_close(layer.weight.grad, dweight, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.bias.grad, dbias, rtol=1e-5, atol=1e-5)
        assert weight.is_empty == [True] * 3
        return
    assert layer.weight.grad is None and layer.bias.grad is None
    for task in (0, 2):
        rows = ROWS_OF[task]
        torch.testing.assert_close(weight.grads[task], (dy * normal)[rows].sum(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(bias.grads[task], dy[rows].sum(0), rtol=1e-5, atol=1e-5)
    assert weight.is_empty == bias.is_empty == [False, True, False]


def test_layer_norm_gradients_are_accurate_for_bfloat16_input():
    """450 rows of each task: torch's kernel, which sums in bfloat16, is 1 to 2 % off."""
    num_rows, width = 450, 37
    layer = nn.LayerNorm(width)
    weight, bias = give_slot(layer.weight, num_tasks=2), give_slot(layer.bias, num_tasks=2)
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(2 * num_rows, width, generator=generator) + 0.5).bfloat16().requires_grad_()
    # A common direction, as real gradients have; without it sums stay small, and roundings with them.
    dy = (torch.randn(2 * num_rows, width, generator=generator) + 1.0).bfloat16()
    y = layer_norm(x, Packing([num_rows, num_rows], [0, 1]), layer)
    y.backward(dy)
    assert y.dtype == x.grad.dtype == torch.bfloat16
    x, plain_errors, errors = x.detach(), [], []
    for task, rows in enumerate((slice(0, num_rows), slice(num_rows, 2 * num_rows))):
        centred = x[rows].double() - x[rows].double().mean(1, keepdim=True)
        normal = centred / (centred.square().mean(1, keepdim=True) + layer.eps).sqrt()
        exact = [(dy[rows].double() * normal).sum(0), dy[rows].double().sum(0)]
        params = (layer.weight.detach(), layer.bias.detach())
        _, *saved = torch.native_layer_norm(x[rows], (width,), *params, layer.eps)
        backward = torch.ops.aten.native_layer_norm_backward
        _, *plain = backward(dy[rows], x[rows], (width,), *saved, *params, [False, True, True])
        for grads, kept in ([weight.grads[task], bias.grads[task]], errors), (plain, plain_errors):
            kept += [float((a - b).norm() / b.norm()) for a, b in zip(grads, exact, strict=True)]
    assert max(errors) < 3e-3, errors
    assert max(errors) < max(plain_errors) / 3, plain_errors  # or else there would be no need for more lines


@pytest.mark.parametrize("with_tasks", [True, False])
def test_embedding_adds_to_the_rows_of_its_words(with_tasks):
    torch.manual_seed(0)
    layer = nn.Embedding(9, 4)
    slot = give_slot(layer.weight)
    for grad in slot.grads:
        grad.zero_()  # as `start_step` leaves them
    slot.grads[1].fill_(torch.nan)
    ids = torch.tensor([1, 1, 8, 0, 1, 5, 1, 5, 2, 2, 2, 1, 8, 8, 4, 1, 0])
    _, dy = random_input(4)
    y = embedding(ids, Packing(SIZES, TASKS if with_tasks else None), layer)
    assert torch.equal(y, layer.weight[ids])
    y.backward(dy)
    one_hot = F.one_hot(ids, 9).float()
    if not with_tasks:
        torch.testing.assert_close(layer.weight.grad, one_hot.T @ dy)  # float32
        assert not slot.grads[0].any()
        return
    assert layer.weight.grad is None
    for task in (0, 2):
        torch.testing.assert_close(slot.grads[task], one_hot[ROWS_OF[task]].T @ dy[ROWS_OF[task]])
    assert slot.grads[1].isnan().all()


def test_second_pass_adds_to_the_first():
    norm, dense = nn.LayerNorm(7), nn.Linear(7, 7)
    slots = [give_slot(param) for param in (norm.weight, norm.bias, dense.weight, dense.bias)]
    seen = []
    for _ in range(2):
        x, dy = random_input(7)
        packing = Packing(SIZES, TASKS)
        layer_norm(linear(x, packing, dense), packing, norm).backward(dy)
        seen.append([torch.stack(slot.grads)[[0, 2]] for slot in slots])
    for once, twice in zip(*seen, strict=True):
        torch.testing.assert_close(twice, 2 * once, rtol=1e-6, atol=1e-7)  # float32


# --- a whole encoder ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Batches of one pass: of each its task, number of sentences and positions; and how many passes a step has."""

    batches: tuple[tuple[int, int, int], ...]
    num_passes: int = 1


LAYOUTS = {
    "one task": Layout(((0, 4, 7),)),
    "three tasks": Layout(((0, 4, 7), (1, 3, 19), (2, 5, 16))),
    "side by side": Layout(((0, 4, 7), (0, 3, 5), (1, 5, 9))),
    "apart": Layout(((0, 4, 7), (1, 3, 5), (0, 5, 9))),
    "one word piece": Layout(((0, 4, 1), (1, 3, 5), (2, 6, 1))),
    "one absent": Layout(((2, 4, 7), (0, 3, MIN_WIDTH + 1))),
    "several passes": Layout(((0, 4, 7), (2, 3, 18), (0, 2, 1)), num_passes=3),
}
VOCAB_SIZE, WIDTH, NUM_TASKS = 29, 18, 3


def make_bert(pooler: bool = True, seed: int = 0, **changes) -> BertModel:
    """A tiny encoder in which every parameter matters, without dropout; odd sizes catch swapped axes."""
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 23,
        "max_position_embeddings": 20,
        "type_vocab_size": 3,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    bert = BertModel(BertConfig(**settings | changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in bert.named_parameters():
            param.normal_(1.0 if name.endswith("LayerNorm.weight") else 0.0, 0.2, generator=generator)
    bert.pooler.requires_grad_(pooler)
    return bert.train()


def make_passes(layout: Layout, pooler: bool, seed: int = 0) -> list[list[tuple]]:
    """For each pass its batches: task, encoder inputs with padding, and random weights of a scalar loss."""
    generator = torch.Generator().manual_seed(seed)
    passes = []
    for _ in range(layout.num_passes):
        batches = []
        for task, sentences, positions in layout.batches:
            lengths = torch.randint(1, positions + 1, (sentences, 1), generator=generator)
            mask = (torch.arange(positions) < lengths).long()
            mask[0] = 1
            input_ids = torch.randint(1, VOCAB_SIZE - 1, (sentences, positions), generator=generator) * mask
            token_type_ids = torch.randint(0, 2, (sentences, positions), generator=generator)  # of three
            weigh_last = torch.randn(sentences, positions, WIDTH, generator=generator) / sentences
            weigh_pooler = torch.randn(sentences, WIDTH, generator=generator) * float(pooler)
            batches.append((task, (input_ids, mask, token_type_ids), weigh_last, weigh_pooler))
        passes.append(batches)
    return passes


def loss_of(outputs: dict[str, torch.Tensor], weigh_last, weigh_pooler) -> torch.Tensor:
    return (outputs["last_hidden_state"] * weigh_last.to(outputs["last_hidden_state"])).sum() + (
        outputs["pooler_output"] * weigh_pooler
    ).sum()


def plain_grads(bert: BertModel, passes: list) -> dict[str, torch.Tensor]:
    """By ordinary autograd, of each parameter the gradients of each task's own summed losses, (K, ...)."""
    params = {name: param for name, param in bert.named_parameters() if param.requires_grad}
    grads = {name: torch.zeros(NUM_TASKS, *param.shape) for name, param in params.items()}
    for task in range(NUM_TASKS):
        chosen = [rest for batches in passes for number, *rest in batches if number == task]
        if chosen:
            loss = sum(loss_of(bert(*inputs), *weighs) for inputs, *weighs in chosen)
            found = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
            for name, grad in zip(params, found, strict=True):
                grads[name][task] = 0.0 if grad is None else grad
    return grads


def stored_grads(bert: BertModel, memory: FlatMemory) -> dict[str, torch.Tensor]:
    """The same from where the packed passes wrote it."""
    return {
        name: memory._stored(memory.ranges[id(param)]).unflatten(1, param.shape)
        for name, param in bert.named_parameters()
        if param.requires_grad
    }


def run_step(bert: BertModel, memory: FlatMemory, passes: list, stale: float | None = torch.nan) -> None:
    """One step up to its gradients; before it, everything that may be stale is made so."""
    if stale is not None:
        memory.matrix_grads.fill_(stale)
        memory.other_grads[:, memory.words.stop :].fill_(stale)
        memory.word_grads[:, memory.touched] = stale
    memory.start_step([inputs[0] for batches in passes for _, inputs, _, _ in batches])
    for batches in passes:
        outputs = bert.encode([inputs for _, inputs, _, _ in batches], [task for task, _, _, _ in batches])
        sum(
            loss_of(output, *weighs) for output, (_, _, *weighs) in zip(outputs, batches, strict=True)
        ).backward()
    memory.finish_grads()


def make_memory(bert: BertModel, **options) -> FlatMemory:
    return FlatMemory(bert, {f"task{k}": nn.Linear(1, 1) for k in range(NUM_TASKS)}, **options)


def compare(bert, found, expected, passes, tolerance):
    """Norm-wise per parameter and task: the error relative to the parameter's largest gradient over the tasks."""
    present = {task for batches in passes for task, *_ in batches}
    assert found.keys() == expected.keys() == {n for n, p in bert.named_parameters() if p.requires_grad}
    for name, grads in found.items():
        largest = float(expected[name].flatten(1).norm(dim=1).max())
        for task in range(NUM_TASKS):
            error = float((grads[task] - expected[name][task]).norm())
            if name.endswith("key.bias"):  # softmax ignores it: nothing but rounding, on both sides
                largest = float(expected[name.replace("key", "query")].norm())
            assert error <= tolerance * largest, (name, task, error, largest)
            assert task in present or not grads[task].any(), (name, task)


@pytest.mark.parametrize("pooler", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_every_task_equal_autograd(layout, pooler):
    """Float32 sums in another order: errors of about 1e-6 of a parameter's gradient."""
    bert = make_bert(pooler)
    passes = make_passes(LAYOUTS[layout], pooler)
    expected = plain_grads(bert, passes)
    memory = make_memory(bert)
    run_step(bert, memory, passes)
    compare(bert, stored_grads(bert, memory), expected, passes, 1e-5)
    assert all(param.grad is None for param in bert.parameters())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_every_task_equal_autograd_in_float64(layout, in_double):
    """A tight tolerance: what is wrong in a few rows or a small parameter has no room to hide."""
    bert = make_bert(seed=1)
    passes = make_passes(LAYOUTS[layout], True, seed=1)
    expected = plain_grads(bert, passes)
    memory = make_memory(
        bert, dtype=torch.float32, grad_dtype=torch.float64
    )  # float32: no copy of the weights
    run_step(bert, memory, passes)
    found = stored_grads(bert, memory)
    compare(bert, found, expected, passes, 1e-12)
    present = sorted({task for batches in passes for task, *_ in batches})
    for name, grads in found.items():
        if "query" not in name and "key" not in name:  # with one word piece they have none
            assert all(grads[task].any() for task in present), name


@pytest.mark.parametrize("hidden_act", ["gelu_new", "relu"])
def test_other_configurations(hidden_act, in_double):
    bert = make_bert(
        hidden_act=hidden_act,
        num_attention_heads=1,
        num_hidden_layers=3,
        intermediate_size=5,
        layer_norm_eps=1e-3,
    )
    passes = make_passes(LAYOUTS["apart"], True, seed=2)
    expected = plain_grads(bert, passes)
    memory = make_memory(bert, grad_dtype=torch.float64)
    run_step(bert, memory, passes)
    compare(bert, stored_grads(bert, memory), expected, passes, 1e-12)


def test_steps_after_each_other_know_nothing_of_each_other():
    """Other batches, other tasks absent, other words: each step's gradients are its own, to the bit."""
    bert = make_bert()
    memory = make_memory(bert)
    for seed, layout in enumerate(LAYOUTS):
        passes = make_passes(LAYOUTS[layout], True, seed=seed)
        run_step(bert, memory, passes, stale=None)
        found = {name: grad.clone() for name, grad in stored_grads(bert, memory).items()}
        fresh = make_bert()
        fresh_memory = make_memory(fresh)
        run_step(fresh, fresh_memory, passes, stale=None)
        for name, grads in stored_grads(fresh, fresh_memory).items():
            assert torch.equal(found[name], grads), (layout, name)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["apart", "several passes"])
def test_bfloat16_gradients_are_near_those_of_float32(layout, grad_dtype):
    """Each of a few roundings is 2**-9 of a number; 4 % leaves room for how they add up over two layers."""
    passes = make_passes(LAYOUTS[layout], True)
    expected = plain_grads(make_bert(), passes)
    bert = make_bert()
    memory = make_memory(bert, dtype=torch.bfloat16, grad_dtype=grad_dtype)
    memory.matrix_grads.fill_(torch.nan)
    memory.other_grads.fill_(torch.nan)
    memory.start_step([inputs[0] for batches in passes for _, inputs, _, _ in batches])
    for batches in passes:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = bert.encode([inputs for _, inputs, _, _ in batches], [task for task, *_ in batches])
        sum(loss_of(out, *weighs) for out, (_, _, *weighs) in zip(outputs, batches, strict=True)).backward()
    memory.finish_grads()
    compare(bert, stored_grads(bert, memory), expected, passes, 0.04)
    assert memory.matrix_grads.dtype == grad_dtype


def test_dropout_is_that_of_an_ordinary_pass():
    """The same seed drops the same elements with and without tasks; gradients are consistent with them."""
    options = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}
    passes = make_passes(LAYOUTS["three tasks"], True)
    [batches] = passes
    inputs = [inputs for _, inputs, _, _ in batches]
    bert = make_bert(**options)
    params = {name: param for name, param in bert.named_parameters()}
    torch.manual_seed(4)
    outputs = bert.encode(inputs)
    losses = [loss_of(output, *weighs) for output, (_, _, *weighs) in zip(outputs, batches, strict=True)]
    expected = {name: torch.zeros(NUM_TASKS, *param.shape) for name, param in params.items()}
    for task, loss in enumerate(losses):
        grads = torch.autograd.grad(loss, list(params.values()), retain_graph=True)
        for name, grad in zip(params, grads, strict=True):
            expected[name][task] = grad
    memory = make_memory(bert)
    torch.manual_seed(4)
    run_step(bert, memory, passes)
    compare(bert, stored_grads(bert, memory), expected, passes, 1e-5)  # float32


def test_no_gradient_is_kept_twice(monkeypatch):
    """Each linear layer writes once per task and pass, and each first write goes straight to its place."""
    bert = make_bert()
    passes = make_passes(LAYOUTS["side by side"], True)
    memory = make_memory(bert)
    places, real_mm = [], torch.mm
    monkeypatch.setattr(
        task_grads.torch, "mm", lambda a, b, out: places.append(out.data_ptr()) or real_mm(a, b, out=out)
    )
    run_step(bert, memory, passes)
    groups = len(bert.linear_groups())
    assert len(places) == len(set(places)) == 2 * groups  # two tasks
    low, high = memory.matrix_grads.data_ptr(), memory.matrix_grads[2].data_ptr()
    assert all(low <= place < high for place in places)
