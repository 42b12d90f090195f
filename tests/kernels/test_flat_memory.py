"""Tests of flat_memory.py: layout, per-task gradients against autograd, and whole steps against plain training."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from bert import BertModel
from kernels.flat_memory import FlatMemory, part_name
from kernels.fused import PLAIN, Passes
from kernels.packing import Packing
from kernels.task_grads import embedding, layer_norm, linear
from optimizer import AdamW, has_weight_decay
from tests.tiny import make_config, shared_grads

HEAD_OUTPUTS = {"first": 3, "second": 1}
V, H = 11, 6  # words, and the width of their embeddings
NUM_MATRIX = 6 * 5 + 6 * 3  # D, elements in weights of linear layers
NUM_SHARED = V * H + 7 * H + NUM_MATRIX + 5 + 3 + 8 + 8  # P


class TinyEncoder(nn.Module):
    """Every kind of parameter, and two linear layers that share their input; odd sizes catch swapped axes."""

    def __init__(self):
        super().__init__()
        # Not in the order of the flat memory.
        self.left, self.right = nn.Linear(H, 5), nn.Linear(H, 3)
        self.positions = nn.Embedding(7, H)
        self.words = nn.Embedding(V, H)
        self.norm = nn.LayerNorm(8)

    def word_embeddings(self):
        return self.words.weight

    def linear_groups(self):
        return [(self.left, self.right)]

    def forward(self, batches, tasks=None):
        """Batches of word numbers, each (B, T) -> hidden states, each (B * T, 8)."""
        packing = Packing([ids.numel() for ids in batches], tasks)
        x = embedding(torch.cat([ids.flatten() for ids in batches]), packing, self.words)
        positions = [torch.arange(ids.shape[1]).expand_as(ids).flatten() for ids in batches]
        x = x + embedding(torch.cat(positions), packing, self.positions)
        x = layer_norm(linear(x, packing, self.left, self.right), packing, self.norm)
        return [x[rows] for rows in packing.batches]


def make_two_heads(seed: int = 0) -> nn.ModuleDict:
    """A shared encoder and two heads."""
    torch.manual_seed(seed)
    heads = {task: nn.Linear(8, num_outputs) for task, num_outputs in HEAD_OUTPUTS.items()}
    return nn.ModuleDict({"encoder": TinyEncoder(), **heads})


def make_memory(model: nn.ModuleDict, **options) -> FlatMemory:
    return FlatMemory(model["encoder"], {task: model[task] for task in HEAD_OUTPUTS}, **options)


def make_batches(task: str, seed: int = 0) -> list[torch.Tensor]:
    """Two batches of words for one task; word 0 and word 10 never occur."""
    generator = torch.Generator().manual_seed(100 * seed + len(task))
    ids = torch.randint(1, V - 1, (13, 7), generator=generator)
    return [ids, ids[:2, :3]]


def loss_of(head: nn.Module, hidden: list[torch.Tensor]) -> torch.Tensor:
    return head(hidden[0]).square().mean() + 0.1 * head(hidden[1]).sum()


def task_loss(model: nn.ModuleDict, task: str, seed: int = 0) -> torch.Tensor:
    """A loss on random batches that depend on the seed and the task, for ordinary gradients."""
    return loss_of(model[task], model["encoder"](make_batches(task, seed)))


def run_backward(model: nn.ModuleDict, memory: FlatMemory, tasks=HEAD_OUTPUTS, seeds=(0,)) -> None:
    """All of a step that comes before the combination: for each seed one packed pass with the same losses."""
    words = [ids for seed in seeds for task in tasks for ids in make_batches(task, seed)]
    memory.start_step(words)
    for seed in seeds:
        batches = [ids for task in tasks for ids in make_batches(task, seed)]
        hidden = model["encoder"](batches, [memory.tasks.index(task) for task in tasks for _ in range(2)])
        sum(loss_of(model[task], hidden[2 * k : 2 * k + 2]) for k, task in enumerate(tasks)).backward()
    memory.finish_grads()


def plain_grads(model: nn.ModuleDict, task: str, seeds=(0,)) -> dict[str, torch.Tensor]:
    """Ordinary autograd's gradients of the summed losses, by parameter name; zeros where there is none."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = sum(task_loss(model, task, seed) for seed in seeds)
    grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    return {
        name: torch.zeros_like(params[name]) if grad is None else grad
        for name, grad in zip(params, grads, strict=True)
    }


def flat(memory: FlatMemory, owner: str, model: nn.ModuleDict, grads: dict) -> torch.Tensor:
    """Named gradients in the order of the flat buffer."""
    names = {id(p): name for name, p in model.named_parameters()}
    return torch.cat([grads[names[id(p)]].flatten() for who, p, _ in memory.views if who == owner])


def fill_with_random(memory: FlatMemory, seed: int) -> torch.Tensor:
    """Random task gradients as if a step had written them, (K, P): of word embeddings, touched rows only."""
    generator = torch.Generator().manual_seed(seed)
    for grads in (memory.matrix_grads, memory.other_grads):
        grads.copy_(torch.randn(grads.shape, generator=generator))
    memory.touched = torch.tensor([2, 3, 7])
    for row in range(V):
        memory.word_grads[:, row] *= float(row in (2, 3, 7))
    return shared_grads(memory)


# --- layout ------------------------------------------------------------------------------------------------------


def test_parameters_become_views_with_their_values():
    model, untouched = make_two_heads(), make_two_heads()
    params = list(model.parameters())
    memory = make_memory(model)
    assert memory.data.numel() == sum(p.numel() for p in params)
    assert all(a is b for a, b in zip(params, model.parameters(), strict=True))  # the same Parameter objects
    for (name, p), expected in zip(model.named_parameters(), untouched.parameters(), strict=True):
        assert torch.equal(p, expected), name
        assert p.untyped_storage().data_ptr() == memory.data.untyped_storage().data_ptr(), name
    memory.data.fill_(0.25)
    assert all(torch.all(p == 0.25) for p in model.parameters())
    with torch.no_grad():
        model["second"].bias.fill_(7.0)
    assert (memory.data == 7.0).sum() == 1


def test_layout_is_encoder_first_and_each_element_has_one_owner():
    memory = make_memory(make_two_heads())
    assert memory.num_shared == NUM_SHARED
    assert memory.matrix_grads.shape == (2, NUM_MATRIX)
    assert memory.other_grads.shape == (2, NUM_SHARED - NUM_MATRIX)
    stops = [0]
    for (owner, _), where in memory.slices.items():
        assert where.start == stops[-1], owner
        stops.append(where.stop)
    assert stops[-1] == memory.data.numel()
    assert [owner for owner, _ in memory.slices] == ["shared"] * 2 + ["first"] * 2 + ["second"] * 2


def test_word_embeddings_stand_first_and_linear_layers_last_among_what_decays():
    model = make_two_heads()
    memory = make_memory(model)
    assert memory.words == slice(0, V * H)
    assert memory.matrices == slice(V * H + 7 * H, V * H + 7 * H + NUM_MATRIX)
    assert memory.matrices.stop == memory.slices["shared", True].stop
    assert torch.equal(memory.data[memory.words], model["encoder"].words.weight.flatten())
    both = torch.cat([model["encoder"].left.weight.flatten(), model["encoder"].right.weight.flatten()])
    assert torch.equal(memory.data[memory.matrices], both)


def test_every_element_of_the_gradients_belongs_to_one_parameter():
    model = make_two_heads()
    memory = make_memory(model)
    for number, (owner, param, start) in enumerate(memory.views):
        if owner == "shared":
            assert memory.ranges[id(param)] == slice(start, start + param.numel())
            stored = memory._stored(memory.ranges[id(param)])
            assert stored.shape == (2, param.numel())
            assert not stored.any()  # nothing overlaps
            stored.fill_(number + 1)
    assert memory.matrix_grads.all() and memory.other_grads.all()  # and nothing is left over


def test_slots_are_views_of_the_gradients_in_the_shape_of_what_is_read():
    model = make_two_heads()
    encoder, memory = model["encoder"], make_memory(model)
    weight, bias = encoder.left.weight.slot, encoder.left.bias.slot
    assert torch.equal(weight.weight, torch.cat([encoder.left.weight, encoder.right.weight]))
    assert torch.equal(bias.weight, torch.cat([encoder.left.bias, encoder.right.bias]))
    assert not hasattr(encoder.right.weight, "slot")  # one slot for both
    for k in range(2):
        assert weight.grads[k].shape == (8, H) and bias.grads[k].shape == (8,)
        assert weight.grads[k].data_ptr() == memory.matrix_grads[k].data_ptr()
        assert encoder.words.weight.slot.grads[k].data_ptr() == memory.word_grads[k].data_ptr()
        assert encoder.norm.weight.slot.grads[k].shape == (8,)
    assert memory.word_grads.data_ptr() == memory.other_grads.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_weights_are_copied_at_each_step_if_layers_compute_in_another_type(dtype, grad_dtype):
    model = make_two_heads()
    memory = make_memory(model, dtype=dtype, grad_dtype=grad_dtype)
    slot = model["encoder"].left.weight.slot
    assert slot.weight.dtype == dtype and slot.grads[0].dtype == memory.matrix_grads.dtype == grad_dtype
    assert memory.data.dtype == memory.grad.dtype == memory.other_grads.dtype == torch.float32
    assert model["encoder"].left.bias.slot.weight.dtype == torch.float32
    assert (slot.weight.data_ptr() == model["encoder"].left.weight.data_ptr()) == (dtype == torch.float32)
    memory.data.mul_(1.5)  # an update
    memory.start_step()
    both = torch.cat([model["encoder"].left.weight, model["encoder"].right.weight])
    assert torch.equal(slot.weight, both.to(dtype))


def test_part_names():
    names = {
        "embeddings.word_embeddings.weight": "embeddings",
        "embeddings.LayerNorm.bias": "embeddings",
        "encoder.layer.0.attention.self.query.weight": "layer.0",
        "encoder.layer.10.output.dense.bias": "layer.10",
        "pooler.dense.weight": "pooler",
    }
    assert {name: part_name(name) for name in names} == names


def test_what_decays():
    model = make_two_heads()["encoder"]
    decaying = {name for name, p in model.named_parameters() if has_weight_decay(p)}
    assert decaying == {"words.weight", "positions.weight", "left.weight", "right.weight"}


@pytest.mark.parametrize("pooler", [False, True])
def test_parts_of_the_encoder_are_its_columns(pooler):
    """Ranges side by side are one, but for the words, which are read by row, and the border of the matrices."""
    config = make_config(13, num_hidden_layers=2, hidden_size=6, num_attention_heads=2, intermediate_size=5)
    bert = BertModel(replace(config, max_position_embeddings=4))
    bert.pooler.requires_grad_(pooler)
    memory = FlatMemory(bert, {"a": nn.Linear(6, 1)})
    words, tables = 13 * 6, 4 * 6 + 2 * 6
    matrices, vectors = 4 * 36 + 2 * 30, 3 * 6 + 6 + 2 * 6 + 5 + 6 + 2 * 6  # of a layer
    start = words + tables
    others = start + 2 * matrices + 36 * pooler  # where biases and LayerNorm begin
    expected = {
        "embeddings": [slice(0, words), slice(words, start), slice(others, others + 12)],
        "layer.0": [slice(start, start + matrices), slice(others + 12, others + 12 + vectors)],
        "layer.1": [
            slice(start + matrices, start + 2 * matrices),
            slice(others + 12 + vectors, others + 12 + 2 * vectors),
        ],
        "pooler": [slice(others - 36, others), slice(others + 12 + 2 * vectors, others + 18 + 2 * vectors)],
    }
    if not pooler:
        del expected["pooler"]
    assert memory.parts == expected
    covered = sorted((where.start, where.stop) for ranges in memory.parts.values() for where in ranges)
    assert [start for start, _ in covered] == [0, *(stop for _, stop in covered[:-1])]
    assert covered[-1][1] == memory.num_shared


# --- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])  # two backward passes add up: gradient accumulation
def test_task_gradients_land_in_their_rows_and_equal_autograd(seeds):
    model = make_two_heads()
    expected = {task: plain_grads(model, task, seeds) for task in HEAD_OUTPUTS}
    memory = make_memory(model)
    run_backward(model, memory, seeds=seeds)
    assert all(p.grad is None for p in model["encoder"].parameters())  # nothing was computed twice
    for k, task in enumerate(memory.tasks):
        # Sums over the same rows in another order: float32's tolerance.
        found = shared_grads(memory)[k]
        torch.testing.assert_close(found, flat(memory, "shared", model, expected[task]), rtol=1e-5, atol=1e-6)
        found = memory.head_grad(task)
        torch.testing.assert_close(found, flat(memory, task, model, expected[task]), rtol=1e-5, atol=1e-6)


def test_what_the_last_step_left_is_forgotten():
    """Slots may hold anything; tables and the rows of words that the last step touched are zeroed."""
    model = make_two_heads()
    memory = make_memory(model)
    run_backward(model, memory, seeds=(0, 1))
    run_backward(model, memory, seeds=(2,))
    found, found_heads = shared_grads(memory), memory.grad[memory.num_shared :].clone()
    fresh_model = make_two_heads()
    fresh = make_memory(fresh_model)
    run_backward(fresh_model, fresh, seeds=(2,))
    assert torch.equal(found, shared_grads(fresh))
    assert torch.equal(found_heads, fresh.grad[memory.num_shared :])
    memory.start_step([torch.tensor([4])])
    memory.finish_grads()
    assert not shared_grads(memory).any() and not memory.grad[memory.num_shared :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_not_finite_gradients_of_the_last_step_are_forgotten_too(dtype):
    model = make_two_heads()
    memory = make_memory(model, grad_dtype=dtype)
    run_backward(model, memory)
    expected = shared_grads(memory)
    touched = memory.touched
    for grads in (memory.matrix_grads, memory.other_grads[:, memory.words.stop :], memory.grad):
        grads.fill_(torch.nan)
    memory.word_grads[:, touched] = torch.nan
    run_backward(model, memory)
    assert torch.equal(shared_grads(memory), expected)
    memory.combine(torch.ones(2))
    assert memory.grad.isfinite().all()


def test_only_the_rows_of_a_steps_words_are_touched():
    model = make_two_heads()
    memory = make_memory(model)
    run_backward(model, memory)
    seen = torch.cat([ids.flatten() for task in HEAD_OUTPUTS for ids in make_batches(task)]).unique()
    assert torch.equal(memory.touched, seen) and 0 < len(seen) < V
    absent = [word for word in range(V) if word not in seen]
    assert not memory.word_grads[:, absent].any() and memory.word_grads[0, seen].any(1).all()
    memory.word_grads[:, absent] = 7.0  # to see that nobody writes there, and nobody reads it
    grams = memory.part_grams()
    run_backward(model, memory)
    assert torch.all(memory.word_grads[:, absent] == 7.0)
    assert torch.equal(memory.part_grams(), grams)
    memory.combine(torch.ones(2))
    combined = memory.grad[memory.words].view(V, H)
    assert not combined[absent].any() and combined[seen].any(1).all()


def test_words_that_are_not_named_may_be_any():
    model = make_two_heads()
    memory = make_memory(model)
    memory.start_step()
    assert torch.equal(memory.touched, torch.arange(V))
    hidden = model["encoder"](make_batches("first"), [0, 0])
    loss_of(model["first"], hidden).backward()
    memory.finish_grads()
    grads = shared_grads(memory)
    memory.combine(torch.tensor([2.0, 1.0]))
    assert grads[0].any() and not grads[1].any()
    torch.testing.assert_close(memory.grad[: memory.num_shared], 2 * grads[0])


def test_combined_gradient_forgets_the_words_of_the_last_step():
    model = make_two_heads()
    memory = make_memory(model)
    for words in ([1, 2, 3], [3, 4]):
        ids = torch.tensor([words])
        memory.start_step([ids])
        model["first"](model["encoder"]([ids], [0])[0]).square().sum().backward()
        memory.finish_grads()
        memory.combine(torch.ones(2))
        combined = memory.grad[memory.words].view(V, H)
        assert combined.any(1).nonzero().flatten().tolist() == words
    combined[9] = 7.0
    memory.combine(torch.ones(2))
    assert torch.all(combined[9] == 7.0)  # only rows that may not be zero are written


def test_absent_task_has_a_zero_row_and_leaves_others_alone():
    model = make_two_heads()
    memory = make_memory(model)
    run_backward(model, memory)
    both = shared_grads(memory)
    run_backward(model, memory, tasks=["second"])
    found = shared_grads(memory)
    assert not found[0].any() and not memory.head_grad("first").any()
    assert found[1].any() and memory.head_grad("second").any()
    torch.testing.assert_close(found[1], both[1], rtol=1e-5, atol=1e-6)  # float32, other shapes of products
    assert not memory.part_grams()[:, 0].any() and not memory.part_grams()[:, :, 0].any()


def test_part_grams_are_those_of_their_parameters():
    model = make_two_heads()
    memory = make_memory(model)
    run_backward(model, memory)
    parts = {"words": 0, "positions": 1, "left": 2, "right": 3, "norm": 4}
    assert list(memory.parts) == list(parts)
    grams = memory.part_grams()
    grads = shared_grads(memory).double()
    assert grams.shape == (5, 2, 2) and grams.dtype == torch.float32
    for part, number in parts.items():
        ids = {id(p) for p in getattr(model["encoder"], part).parameters()}
        columns = torch.cat(
            [grads[:, at : at + p.numel()] for _, p, at in memory.views if id(p) in ids], dim=1
        )
        torch.testing.assert_close(
            grams[number].double(), columns @ columns.T, rtol=1e-5, atol=1e-7
        )  # float32
    torch.testing.assert_close(grams.sum(0).double(), grads @ grads.T, rtol=1e-5, atol=1e-7)


def test_part_grams_by_hand():
    """One column of each part is 1 for the first task and a number of its own for the second."""
    memory = make_memory(make_two_heads())
    memory.start_step([torch.tensor([4])])
    for number, ranges in enumerate(memory.parts.values()):
        column = ranges[-1].start + (4 * H if number == 0 else 0)
        memory._stored(slice(column, column + 1)).copy_(torch.tensor([[1.0], [number + 2.0]]))
    expected = [[[1.0, n], [n, n * n]] for n in (2.0, 3.0, 4.0, 5.0, 6.0)]
    assert memory.part_grams().tolist() == expected


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_combine_is_the_weighted_sum_of_the_rows(grad_dtype):
    memory = make_memory(make_two_heads(), grad_dtype=grad_dtype)
    grads = fill_with_random(memory, seed=4)
    memory.grad[memory.num_shared :] = 3.0
    memory.combine(torch.tensor([0.5, -2.0]))
    expected = 0.5 * grads[0] - 2.0 * grads[1]
    torch.testing.assert_close(memory.grad[: memory.num_shared], expected)  # float32 rounding
    assert torch.all(memory.grad[memory.num_shared :] == 3.0)  # heads keep their own gradient
    memory.combine(torch.zeros(2))
    assert not memory.grad[: memory.num_shared].any()


def test_rows_of_a_range():
    memory = make_memory(make_two_heads())
    grads = fill_with_random(memory, seed=5)
    words = memory.rows(memory.words)
    assert torch.equal(words, grads[:, memory.words].view(2, V, H)[:, [2, 3, 7]].flatten(1))
    for where in (slice(V * H, V * H + 9), memory.matrices, slice(memory.matrices.stop, memory.num_shared)):
        assert torch.equal(memory.rows(where), grads[:, where])


def test_passes_are_used():
    calls = []

    def gram(task_grads):
        calls.append("gram_matrix")
        return PLAIN.gram_matrix(task_grads)

    def weighted(task_grads, weights, out):
        calls.append("weighted_sum")
        PLAIN.weighted_sum(task_grads, weights, out)

    model = make_two_heads()
    memory = make_memory(model, passes=Passes(gram_matrix=gram, weighted_sum=weighted))
    run_backward(model, memory)
    memory.part_grams()
    memory.combine(torch.ones(2))
    # The words of a step are another number each time: their gram matrix is always a plain one.
    ranges = sum(where != memory.words for ranges in memory.parts.values() for where in ranges)
    assert (
        calls == ["gram_matrix"] * ranges + ["weighted_sum"] * 3
    )  # tables, matrices, and what does not decay


# --- steps -------------------------------------------------------------------------------------------------------


def test_whole_step_equals_plain_training_with_summed_losses():
    """Weights of 1 are ordinary training: the flat path must give what AdamW on the plain model gives."""
    model, plain = make_two_heads(), make_two_heads()
    memory = make_memory(model)
    optimizer = AdamW(memory.param_groups(0.01, 0.01, weight_decay=0.1))
    decays = [p for p in plain.parameters() if p.ndim >= 2]
    others = [p for p in plain.parameters() if p.ndim < 2]
    reference = AdamW([{"params": decays, "weight_decay": 0.1}, {"params": others}], lr=0.01)
    for step in range(3):
        run_backward(model, memory, seeds=(step,))
        memory.combine(torch.ones(2))
        memory.show_grads(set(HEAD_OUTPUTS))
        optimizer.step()
        reference.zero_grad()
        sum(task_loss(plain, task, step) for task in HEAD_OUTPUTS).backward()
        reference.step()
    for (name, p), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        # The sum of the two tasks is rounded in another order, and Adam divides small gradients by themselves.
        torch.testing.assert_close(
            p, expected, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_head_without_a_batch_gets_no_update_and_keeps_its_step_count():
    model = make_two_heads()
    memory = make_memory(model)
    optimizer = AdamW(memory.param_groups(0.1, 0.1, weight_decay=0.5))

    def step(tasks):
        run_backward(model, memory, tasks)
        memory.combine(torch.ones(2))
        memory.show_grads(set(tasks))
        optimizer.step()

    step(["first", "second"])  # so that there is momentum that could move the absent head
    before = copy.deepcopy(model.state_dict())
    step(["first"])
    step(["first"])
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("second."), name
    steps = {key: optimizer.state[p]["step"] for key, p in memory.flat_params.items()}
    assert {owner: count for (owner, _), count in steps.items()} == {"shared": 3, "first": 3, "second": 1}


def test_biases_and_layernorm_do_not_decay():
    """With all gradients zero an update is the decay alone: 1 - lr * weight_decay, or nothing."""
    model = make_two_heads()
    memory = make_memory(model)
    memory.data.fill_(1.0)
    groups = memory.param_groups(lr=0.5, head_lr=0.25, weight_decay=0.1)
    memory.show_grads(set(HEAD_OUTPUTS))
    AdamW(groups).step()
    values = {name: p.unique().item() for name, p in model.named_parameters()}
    assert values == pytest.approx(
        {
            "encoder.words.weight": 0.95,
            "encoder.positions.weight": 0.95,
            "encoder.left.weight": 0.95,
            "encoder.left.bias": 1.0,
            "encoder.right.weight": 0.95,
            "encoder.right.bias": 1.0,
            "encoder.norm.weight": 1.0,
            "encoder.norm.bias": 1.0,
            "first.weight": 0.975,
            "first.bias": 1.0,
            "second.weight": 0.975,
            "second.bias": 1.0,
        },
        rel=1e-6,  # float32
    )


def test_param_groups_carry_the_base_learning_rates():
    memory = make_memory(make_two_heads())
    groups = memory.param_groups(lr=0.5, head_lr=0.25, weight_decay=0.1)
    assert [group["lr"] for group in groups] == [0.5, 0.5, 0.25, 0.25, 0.25, 0.25]
    assert [group["initial_lr"] for group in groups] == [group["lr"] for group in groups]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0] * 3
    assert sum(p.numel() for group in groups for p in group["params"]) == memory.data.numel()


# --- what is frozen, and what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["words", "positions", "norm", "linear"])
def test_frozen_parameters_are_left_out(layer):
    model = make_two_heads()
    encoder = model["encoder"]
    modules = [encoder.left, encoder.right] if layer == "linear" else [getattr(encoder, layer)]
    frozen = [p for module in modules for p in module.parameters()] + [model["second"].bias]
    for p in frozen:
        p.requires_grad_(False)
    addresses = [p.data_ptr() for p in frozen]
    expected = {task: plain_grads(model, task) for task in HEAD_OUTPUTS}
    memory = make_memory(model)
    assert memory.num_shared == NUM_SHARED - sum(p.numel() for p in frozen[:-1])
    assert [p.data_ptr() for p in frozen] == addresses
    assert not any(p is view for _, view, _ in memory.views for p in frozen)
    run_backward(model, memory)
    assert all(p.grad is None for p in frozen)
    for k, task in enumerate(memory.tasks):
        # float32, as where nothing is frozen
        torch.testing.assert_close(
            shared_grads(memory)[k], flat(memory, "shared", model, expected[task]), rtol=1e-5, atol=1e-6
        )
    memory.combine(torch.ones(2))
    grads = shared_grads(memory)
    torch.testing.assert_close(memory.grad[: memory.num_shared], grads.sum(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(memory.part_grams().sum(0), grads @ grads.T, rtol=1e-5, atol=1e-6)


def test_frozen_encoder_trains_heads_only():
    model = make_two_heads()
    model["encoder"].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    memory = make_memory(model)
    assert memory.num_shared == 0
    assert memory.matrix_grads.shape == memory.other_grads.shape == (2, 0)
    assert memory.part_grams().shape == (0, 2, 2)
    optimizer = AdamW(memory.param_groups(0.1, 0.1, 0.0))
    run_backward(model, memory)
    memory.combine(torch.ones(2))
    memory.show_grads(set(HEAD_OUTPUTS))
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("encoder."), name


def test_overlap_raises():
    model = make_two_heads()
    heads = {task: model[task] for task in HEAD_OUTPUTS}
    with pytest.raises(ValueError, match="two owners"):
        FlatMemory(model["encoder"], heads | {"second": model["encoder"].left})
    with pytest.raises(ValueError, match="two owners"):
        FlatMemory(model["encoder"], heads | {"second": heads["first"]})


def test_nothing_trainable_raises():
    model = make_two_heads().requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        make_memory(model)


def test_layers_without_direct_gradients_raise():
    model = make_two_heads()
    model["encoder"].extra = nn.Conv1d(2, 3, 1)
    with pytest.raises(ValueError, match="9 trainable parameters of the encoder.*direct_grads.py"):
        make_memory(model)
    model["encoder"].extra.requires_grad_(False)
    make_memory(model)
