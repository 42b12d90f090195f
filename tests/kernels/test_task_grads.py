"""task_grads.py: gradients by task against ordinary autograd, for single layers and for a whole encoder.

Shapes: M tokens, B sentences, T padded length, H hidden_size, K tasks.
"""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bert import MIN_WIDTH, BertModel
from kernels.flat_memory import FlatMemory
from kernels.packing import Packing
from kernels.task_grads import GradTarget, embedding, layer_norm, linear
from tests.tiny import make_config, randomise

FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}  # sums in another order

# --- targets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_target_is_overwritten_first_and_added_to_later(dtype):
    grads = torch.full((2, 2, 3), torch.nan, dtype=dtype)
    target = GradTarget(torch.zeros(2, 3), list(grads), grads, [True, True])
    a, b = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0, 5.0]])
    product = torch.tensor([[3.0, 4.0, 5.0], [6.0, 8.0, 10.0]])
    target.write_product(1, a, b)  # in bfloat16 through a copy, else straight to its place
    assert torch.equal(grads[1], product.to(dtype)) and target.is_empty == [True, False]
    target.write_product(1, a, b)
    target.write(1, torch.ones(2, 3))
    assert torch.equal(grads[1], (2 * product + 1).to(dtype))
    assert grads[0].isnan().all()
    target.write(0, torch.ones(2, 3))
    assert torch.equal(grads[0], torch.ones(2, 3, dtype=dtype)) and target.is_empty == [False, False]


# --- single layers ------------------------------------------------------------------------------------------

SIZES, TASKS = [5, 3, 7, 2], [2, 0, 2, 2]  # three tasks, the second without a batch
NUM_TOKENS = sum(SIZES)
TOKENS_OF = {0: [5, 6, 7], 1: [], 2: [*range(5), *range(8, 17)]}


def make_target(*params: nn.Parameter, num_tasks: int = 3, dtype: torch.dtype = torch.float32) -> GradTarget:
    """What `FlatMemory` does for parameters that lie end to end."""
    weight = torch.cat([param.detach() for param in params]).to(dtype)
    grads = torch.full((num_tasks, *weight.shape), torch.nan)
    return GradTarget(weight, list(grads), grads, [True] * num_tasks)


def pack(targets: dict[nn.Parameter, GradTarget], with_tasks: bool = True) -> Packing:
    if not with_tasks:
        return Packing(SIZES)
    return Packing(SIZES, TASKS, {id(param): target for param, target in targets.items()})


def random_input(width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's input and the gradient of its output, each (M, width)."""
    x, dy = torch.randn(2, NUM_TOKENS, width, generator=torch.Generator().manual_seed(0))
    return x.requires_grad_(), dy


def normalise(x: torch.Tensor, layer: nn.LayerNorm) -> torch.Tensor:
    centred = x - x.mean(1, keepdim=True)
    return centred / (x.var(1, unbiased=False, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias


# Layers, what is tested, and the formula. Query, key and value in one product; an eps that shows where it is
# added.
LAYERS = {
    "linear": (
        lambda: [nn.Linear(6, width) for width in (6, 6, 5)],
        linear,
        lambda x, *layers: torch.cat([x @ layer.weight.T + layer.bias for layer in layers], dim=1),
    ),
    "layer_norm": (lambda: [randomise(nn.LayerNorm(6, eps=0.1))], layer_norm, normalise),
    "embedding": (
        lambda: [nn.Embedding(9, 4)],
        embedding,
        lambda ids, layer: F.one_hot(ids, 9).float() @ layer.weight,
    ),
}
WORD_IDS = torch.tensor([1, 1, 8, 0, 1, 5, 1, 5, 2, 2, 2, 1, 8, 8, 4, 1, 0])


@pytest.mark.parametrize("with_tasks", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_equal_the_formula_and_each_task_has_its_gradients(kind, with_tasks):
    torch.manual_seed(0)
    make, function, formula = LAYERS[kind]
    layers = make()
    x = WORD_IDS if kind == "embedding" else random_input(6)[0]
    expected = formula(x, *layers)
    dy = torch.randn_like(expected)
    kinds = ("weight",) if kind == "embedding" else ("weight", "bias")
    groups = [[getattr(layer, name) for layer in layers] for name in kinds]
    targets = [make_target(*group) for group in groups]
    for task in (0, 2) if kind == "embedding" else ():
        targets[0].grads[task].zero_()  # as `start_step` leaves them
    by_param = {group[0]: target for group, target in zip(groups, targets, strict=True)}
    y = function(x, pack(by_param, with_tasks), *layers)
    torch.testing.assert_close(y, expected, **FLOAT32)
    y.backward(dy)
    if x.requires_grad:
        torch.testing.assert_close(x.grad, torch.autograd.grad(expected, x, dy, True)[0], **FLOAT32)
    for group, target in zip(groups, targets, strict=True):
        if not with_tasks:
            for param, grad in zip(group, torch.autograd.grad(expected, group, dy, True), strict=True):
                torch.testing.assert_close(param.grad, grad, **FLOAT32)
            assert target.is_empty == [True] * 3
            continue
        for task in (0, 2):
            tokens = TOKENS_OF[task]
            grads = torch.autograd.grad(expected[tokens], group, dy[tokens], retain_graph=True)
            torch.testing.assert_close(target.grads[task], torch.cat(grads), **FLOAT32)
        assert target.grads[1].isnan().all()  # not written: for `finish_grads`
        assert kind == "embedding" or target.is_empty == [False, True, False]
        assert all(param.grad is None for param in group)


@pytest.mark.parametrize("frozen", [False, True])
def test_tasks_change_nothing_without_gradients_or_trainable_parameters(frozen):
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(6, 6), nn.LayerNorm(6), nn.Embedding(5, 6)]).requires_grad_(not frozen)
    (x, _), ids, packing = random_input(6), torch.arange(NUM_TOKENS) % 5, pack({})
    functions = zip((linear, layer_norm, embedding), (x, x, ids), layers, strict=True)
    with torch.set_grad_enabled(frozen):  # there are no targets: an access would fail
        found = [function(tensor, packing, layer) for function, tensor, layer in functions]
    for y, expected in zip(found, [layers[0](x), layers[1](x), layers[2](ids)], strict=True):
        assert torch.equal(y, expected)
    assert [y.requires_grad for y in found] == [frozen, frozen, False]  # through the input


def test_linear_reads_the_copy_of_its_weights():
    """The target says what is computed with, in which type; gradients leave in the type of their place."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 5)
    weight, bias = make_target(layer.weight, dtype=torch.bfloat16), make_target(layer.bias)
    x, _ = random_input(6)
    _, dy = random_input(5)
    y = linear(x, pack({layer.weight: weight, layer.bias: bias}), layer)
    assert y.dtype == torch.bfloat16
    y.backward(dy.bfloat16())
    assert x.grad.dtype == torch.float32 and weight.grads[0].dtype == bias.grads[0].dtype == torch.float32
    rounded, dy = x.detach().bfloat16().float(), dy.bfloat16().float()
    exact = F.linear(rounded, weight.weight.float(), layer.bias.bfloat16().float())
    # Inputs are rounded here as there; results once, by up to 2**-9 of a number of order 1 to 4.
    torch.testing.assert_close(y.float(), exact, rtol=2**-8, atol=2**-8)
    torch.testing.assert_close(
        weight.grads[2], dy[TOKENS_OF[2]].T @ rounded[TOKENS_OF[2]], rtol=2**-8, atol=2**-8
    )
    torch.testing.assert_close(bias.grads[2], dy[TOKENS_OF[2]].sum(0), rtol=2**-8, atol=2**-8)
    torch.testing.assert_close(x.grad, dy @ weight.weight.float(), rtol=2**-8, atol=2**-8)


def test_layer_norm_gradients_are_accurate_for_bfloat16_input():
    """450 tokens of each task: torch's kernel, which sums in bfloat16, is 1 to 2 % off."""
    num_tokens, width = 450, 37
    layer = nn.LayerNorm(width)
    weight, bias = make_target(layer.weight, num_tasks=2), make_target(layer.bias, num_tasks=2)
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(2 * num_tokens, width, generator=generator) + 0.5).bfloat16().requires_grad_()
    # A common direction, as real gradients have; without it sums stay small, and roundings with them.
    dy = (torch.randn(2 * num_tokens, width, generator=generator) + 1.0).bfloat16()
    targets = {id(layer.weight): weight, id(layer.bias): bias}
    y = layer_norm(x, Packing([num_tokens, num_tokens], [0, 1], targets), layer)
    y.backward(dy)
    assert y.dtype == x.grad.dtype == torch.bfloat16
    x, plain_errors, errors = x.detach(), [], []
    for task, tokens in enumerate((slice(0, num_tokens), slice(num_tokens, 2 * num_tokens))):
        centred = x[tokens].double() - x[tokens].double().mean(1, keepdim=True)
        normal = centred / (centred.square().mean(1, keepdim=True) + layer.eps).sqrt()
        exact = [(dy[tokens].double() * normal).sum(0), dy[tokens].double().sum(0)]
        params = (layer.weight.detach(), layer.bias.detach())
        _, *saved = torch.native_layer_norm(x[tokens], (width,), *params, layer.eps)
        backward = torch.ops.aten.native_layer_norm_backward
        _, *plain = backward(dy[tokens], x[tokens], (width,), *saved, *params, [False, True, True])
        for grads, kept in ([weight.grads[task], bias.grads[task]], errors), (plain, plain_errors):
            kept += [float((a - b).norm() / b.norm()) for a, b in zip(grads, exact, strict=True)]
    assert max(errors) < 3e-3, errors
    assert max(errors) < max(plain_errors) / 3, plain_errors  # or else there would be no need for more lines


# --- a whole encoder ----------------------------------------------------------------------------------------


# The batches of each pass of a step: task, number of sentences, positions.
CASES = {
    "one task": [[(0, 4, 7)]],
    "three tasks": [[(0, 4, 7), (1, 3, 19), (2, 5, 16)]],
    "side by side": [[(0, 4, 7), (0, 3, 5), (1, 5, 9)]],
    "apart": [[(0, 4, 7), (1, 3, 5), (0, 5, 9)]],
    "one word piece": [[(0, 4, 1), (1, 3, 5), (2, 6, 1)]],
    "one absent": [[(2, 4, 7), (0, 3, MIN_WIDTH + 1)]],
    "several passes": [[(0, 4, 7), (2, 3, 18), (0, 2, 1)]] * 3,
}
VOCAB_SIZE, WIDTH, NUM_TASKS = 29, 18, 3


def make_bert(pooler: bool = True, seed: int = 0, **changes) -> BertModel:
    """A tiny encoder in which every parameter matters, without dropout; odd sizes catch swapped axes."""
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes = {"hidden_size": WIDTH, "num_attention_heads": 3, "intermediate_size": 23}
    config = replace(make_config(VOCAB_SIZE, type_vocab_size=3, **sizes), **no_dropout | changes)
    bert = randomise(BertModel(replace(config, max_position_embeddings=20)), seed)
    bert.pooler.requires_grad_(pooler)
    return bert.train()


def make_passes(case: list, pooler: bool, seed: int = 0) -> list[list[tuple]]:
    """For each pass its batches: task, encoder inputs with padding, and random weights of a scalar loss."""
    generator = torch.Generator().manual_seed(seed)
    passes = []
    for shapes in case:
        batches = []
        for task, sentences, positions in shapes:
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
    last = (outputs["last_hidden_state"] * weigh_last.to(outputs["last_hidden_state"])).sum()
    return last + (outputs["pooler_output"] * weigh_pooler).sum()


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
        name: memory.stored_grads(memory.ranges[id(param)]).unflatten(1, param.shape)
        for name, param in bert.named_parameters()
        if param.requires_grad
    }


def run_step(bert, memory: FlatMemory, passes: list, autocast=nullcontext):
    """One step up to its gradients; before it, everything that may be stale is made NaN."""
    memory.matrix_grads.fill_(torch.nan)
    memory.other_grads[:, memory.layout.words.stop :].fill_(torch.nan)
    memory.word_grads[:, memory.touched] = torch.nan
    memory.start_step([inputs[0] for batches in passes for _, inputs, _, _ in batches])
    for batches in passes:
        inputs, task_numbers = [inputs for _, inputs, _, _ in batches], [task for task, *_ in batches]
        with autocast():
            outputs = bert.encode(inputs, task_numbers, memory.targets)
        losses = [loss_of(out, *weighs) for out, (_, _, *weighs) in zip(outputs, batches, strict=True)]
        sum(losses).backward()
    memory.finish_grads()


def make_memory(bert: BertModel, **options) -> FlatMemory:
    return FlatMemory(bert, {f"task{k}": nn.Linear(1, 1) for k in range(NUM_TASKS)}, **options)


def compare(bert, found, expected, passes, tolerance):
    """By parameter and task: the error relative to the parameter's largest gradient over the tasks."""
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
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_every_task_equal_autograd(case, pooler, in_double):
    """A tight tolerance: what is wrong in a few rows or a small parameter has no room to hide."""
    bert = make_bert(pooler)
    passes = make_passes(CASES[case], pooler)
    expected = plain_grads(bert, passes)
    memory = make_memory(bert, grad_dtype=torch.float64)
    run_step(bert, memory, passes)
    found = stored_grads(bert, memory)
    compare(bert, found, expected, passes, 1e-12)
    assert all(param.grad is None for param in bert.parameters())
    present = sorted({task for batches in passes for task, *_ in batches})
    for name, grads in found.items():
        if "query" not in name and "key" not in name:  # with one word piece they have none
            assert all(grads[task].any() for task in present), name


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["apart", "several passes"])
def test_bfloat16_gradients_are_near_those_of_float32(case, grad_dtype):
    """Each of a few roundings is 2**-9 of a number; 4 % leaves room for how they add up over two layers."""
    passes = make_passes(CASES[case], True)
    expected = plain_grads(make_bert(), passes)
    bert = make_bert()
    memory = make_memory(bert, dtype=torch.bfloat16, grad_dtype=grad_dtype)
    run_step(bert, memory, passes, autocast=partial(torch.autocast, "cpu", dtype=torch.bfloat16))
    compare(bert, stored_grads(bert, memory), expected, passes, 0.04)
    assert memory.matrix_grads.dtype == grad_dtype


def test_dropout_is_that_of_an_ordinary_pass():
    """The same seed drops the same elements with and without tasks; gradients are consistent with them."""
    options = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}
    passes = make_passes(CASES["three tasks"], True)
    [batches] = passes
    inputs = [inputs for _, inputs, _, _ in batches]
    bert = make_bert(**options)
    params = dict(bert.named_parameters())
    torch.manual_seed(4)
    outputs = bert.encode(inputs)
    losses = [loss_of(output, *weighs) for output, (_, _, *weighs) in zip(outputs, batches, strict=True)]
    by_task = [torch.autograd.grad(loss, list(params.values()), retain_graph=True) for loss in losses]
    expected = {name: torch.stack(grads) for name, *grads in zip(params, *by_task, strict=True)}
    memory = make_memory(bert)
    torch.manual_seed(4)
    run_step(bert, memory, passes)
    compare(bert, stored_grads(bert, memory), expected, passes, 1e-5)  # float32
