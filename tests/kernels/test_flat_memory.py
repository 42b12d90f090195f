"""flat_memory.py: views, task gradients against autograd, what is frozen or refused.

Whole steps are held against the textbook in tests/test_train_step.py.

Shapes: K tasks, P shared parameters, D of them in weights of linear layers, V words, H their width.
"""

import pytest
import torch
from torch import nn

from bert import BertModel
from kernels.flat_memory import FlatMemory
from kernels.fused import PLAIN, Kernels
from kernels.packing import Packing
from kernels.task_grads import embedding, layer_norm, linear
from optimizer import AdamW
from tests.tiny import make_config, shared_grads

FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}  # sums of the same numbers in another order

# --- a tiny model -------------------------------------------------------------------------------------------

HEAD_OUTPUTS = {"first": 3, "second": 1}
V, H = 11, 6
NUM_MATRIX = 6 * 5 + 6 * 3  # D
NUM_SHARED = V * H + 7 * H + NUM_MATRIX + 5 + 3 + 8 + 8  # P


class TinyEncoder(nn.Module):
    """Every kind of parameter, and two linear layers that share their input; odd sizes catch swapped axes."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(H, 5), nn.Linear(H, 3)
        self.positions = nn.Embedding(7, H)
        self.words = nn.Embedding(V, H)
        self.norm = nn.LayerNorm(8)

    def word_embeddings(self):
        return self.words.weight

    def linear_groups(self):
        return [(self.left, self.right)]

    def forward(self, batches, task_numbers=None, targets=None):
        """Batches of word numbers, each (B, T) -> hidden states, each (B * T, 8)."""
        packing = Packing([ids.numel() for ids in batches], task_numbers, targets)
        x = embedding(torch.cat([ids.flatten() for ids in batches]), packing, self.words)
        positions = [torch.arange(ids.shape[1]).expand_as(ids).flatten() for ids in batches]
        x = x + embedding(torch.cat(positions), packing, self.positions)
        x = layer_norm(linear(x, packing, self.left, self.right), packing, self.norm)
        return [x[tokens] for tokens in packing.batches]


def make_two_heads(seed: int = 0) -> nn.ModuleDict:
    """A shared encoder and two heads."""
    torch.manual_seed(seed)
    heads = {task: nn.Linear(8, num_outputs) for task, num_outputs in HEAD_OUTPUTS.items()}
    return nn.ModuleDict({"encoder": TinyEncoder(), **heads})


def make_memory(model: nn.ModuleDict, **options) -> FlatMemory:
    return FlatMemory(model["encoder"], {task: model[task] for task in HEAD_OUTPUTS}, **options)


def prepare(**options) -> tuple[nn.ModuleDict, FlatMemory]:
    model = make_two_heads()
    return model, make_memory(model, **options)


def make_batches(task: str, seed: int = 0) -> list[torch.Tensor]:
    """Two batches of words for one task; word 0 and word 10 never occur."""
    generator = torch.Generator().manual_seed(100 * seed + len(task))
    ids = torch.randint(1, V - 1, (13, 7), generator=generator)
    return [ids, ids[:2, :3]]


def loss_of(head: nn.Module, hidden: list[torch.Tensor]) -> torch.Tensor:
    return head(hidden[0]).square().mean() + 0.1 * head(hidden[1]).sum()


def run_backward(model: nn.ModuleDict, memory: FlatMemory, tasks=HEAD_OUTPUTS, seeds=(0,)) -> None:
    """All of a step that comes before the combination: one packed pass for each seed."""
    memory.start_step([ids for seed in seeds for task in tasks for ids in make_batches(task, seed)])
    for seed in seeds:
        batches = [ids for task in tasks for ids in make_batches(task, seed)]
        task_numbers = [memory.tasks.index(task) for task in tasks for _ in range(2)]
        hidden = model["encoder"](batches, task_numbers, memory.targets)
        sum(loss_of(model[task], hidden[2 * k : 2 * k + 2]) for k, task in enumerate(tasks)).backward()
    memory.finish_grads()


def plain_grads(model: nn.ModuleDict, task: str) -> dict[int, torch.Tensor]:
    """Ordinary autograd's gradients by `id(parameter)`; zeros where there is none."""
    params = [param for param in model.parameters() if param.requires_grad]
    loss = loss_of(model[task], model["encoder"](make_batches(task)))
    grads = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
    return {id(param): grad for param, grad in zip(params, grads, strict=True)}


def flat(memory: FlatMemory, owner: str, grads: dict[int, torch.Tensor]) -> torch.Tensor:
    """Gradients in the order of the flat buffer."""
    return torch.cat([grads[id(param)].flatten() for who, param, _ in memory.views if who == owner])


# --- views --------------------------------------------------------------------------------------------------


def test_layout_of_an_encoder():
    """Query, key and value lie end to end, and what is no matrix of a linear layer is no MATRIX."""
    config = make_config(13, hidden_size=6, num_attention_heads=2, intermediate_size=5)
    bert = BertModel(config)
    memory = FlatMemory(bert, {"a": nn.Linear(6, 1)})
    layout = memory.layout
    assert list(layout.layer_groups) == ["embeddings", "layer.0", "layer.1", "pooler"]
    assert layout.num_matrix == 2 * (4 * 36 + 2 * 30) + 36 and layout.words == slice(0, 13 * 6)
    attention = bert.encoder.layer[1].attention.self
    for kind in ("weight", "bias"):
        layers = (attention.query, attention.key, attention.value)
        query, key, value = (memory.ranges[id(getattr(layer, kind))] for layer in layers)
        assert query.stop == key.start and key.stop == value.start


def test_parameters_become_views_with_their_values():
    model, untouched = make_two_heads(), make_two_heads()
    params = list(model.parameters())
    memory = make_memory(model)
    assert memory.data.numel() == sum(p.numel() for p in params) and memory.layout.num_shared == NUM_SHARED
    assert all(a is b for a, b in zip(params, model.parameters(), strict=True))  # the same Parameter objects
    for p, expected in zip(model.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(p, expected) and torch.equal(memory.data[memory.ranges[id(p)]], p.flatten())
    memory.data.fill_(0.25)
    assert all(torch.all(p == 0.25) for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_weights_are_copied_at_each_step_if_layers_compute_in_another_type(dtype, grad_dtype):
    model, memory = prepare(dtype=dtype, grad_dtype=grad_dtype)
    encoder = model["encoder"]
    target = memory.targets[id(encoder.left.weight)]
    assert target.weight.dtype == dtype and target.grads[0].dtype == memory.matrix_grads.dtype == grad_dtype
    assert memory.data.dtype == memory.grad.dtype == memory.other_grads.dtype == torch.float32
    assert memory.targets[id(encoder.left.bias)].weight.dtype == torch.float32
    assert (target.weight.data_ptr() == encoder.left.weight.data_ptr()) == (dtype == torch.float32)
    memory.data.mul_(1.5)  # an update
    memory.start_step()
    assert torch.equal(target.weight, torch.cat([encoder.left.weight, encoder.right.weight]).to(dtype))


def test_a_model_that_has_left_the_memory_is_refused():
    model, memory = prepare()
    memory.start_step()
    model.to(torch.float64)
    with pytest.raises(AssertionError, match="moved or changed after move_to_flat_memory"):
        memory.start_step()


# --- gradients of a step ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_last_step_left_is_forgotten(dtype):
    """Other words and NaN too; to the bit."""
    model, memory = prepare(grad_dtype=dtype)
    run_backward(model, memory, seeds=(0, 1))
    touched = memory.touched
    for grads in (memory.matrix_grads, memory.other_grads[:, memory.layout.words.stop :], memory.grad):
        grads.fill_(torch.nan)
    memory.word_grads[:, touched] = torch.nan
    run_backward(model, memory, seeds=(2,))
    fresh_model, fresh = prepare(grad_dtype=dtype)
    run_backward(fresh_model, fresh, seeds=(2,))
    assert torch.equal(shared_grads(memory), shared_grads(fresh))
    for each in (memory, fresh):
        each.combine(torch.ones(2))
    assert torch.equal(memory.grad, fresh.grad)
    memory.start_step([torch.tensor([4])])
    memory.finish_grads()
    assert not shared_grads(memory).any() and not memory.grad[memory.layout.num_shared :].any()


def test_only_the_rows_of_a_steps_words_are_touched():
    """Words that are not named may be any."""
    model, memory = prepare()
    memory.start_step()
    assert memory.touched is None  # any may
    run_backward(model, memory)
    seen = torch.cat([ids.flatten() for task in HEAD_OUTPUTS for ids in make_batches(task)]).unique()
    assert torch.equal(memory.touched, seen) and 0 < len(seen) < V
    absent = [word for word in range(V) if word not in seen]
    assert not memory.word_grads[:, absent].any() and memory.word_grads[0, seen].any(1).all()
    memory.word_grads[:, absent] = 7.0  # to see that nobody writes there, and nobody reads it
    grams = memory.group_grams()
    run_backward(model, memory)
    assert torch.all(memory.word_grads[:, absent] == 7.0)
    assert torch.equal(memory.group_grams(), grams)
    memory.combine(torch.ones(2))
    combined = memory.grad[memory.layout.words].view(V, H)
    assert not combined[absent].any() and combined[seen].any(1).all()


# --- inner products and the combined gradient ---------------------------------------------------------------


def test_group_grams_are_those_of_their_parameters():
    model, memory = prepare()
    run_backward(model, memory)
    grams, grads = memory.group_grams(), shared_grads(memory).double()
    assert list(memory.layout.layer_groups) == ["words", "positions", "left", "right", "norm"]
    assert grams.shape == (5, 2, 2) and grams.dtype == torch.float32
    for gram, group in zip(grams.double(), memory.layout.layer_groups, strict=True):
        params = getattr(model["encoder"], group).parameters()
        columns = torch.cat([grads[:, memory.ranges[id(p)]] for p in params], dim=1)
        torch.testing.assert_close(gram, columns @ columns.T, rtol=1e-5, atol=1e-7)  # float32
    torch.testing.assert_close(grams.sum(0).double(), grads @ grads.T, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_combine_is_the_weighted_sum_of_the_rows(grad_dtype):
    model, memory = prepare(grad_dtype=grad_dtype)
    run_backward(model, memory)
    grads = shared_grads(memory)
    memory.grad[NUM_SHARED:] = 3.0
    memory.combine(torch.tensor([0.5, -2.0]))
    torch.testing.assert_close(memory.grad[:NUM_SHARED], 0.5 * grads[0] - 2.0 * grads[1])  # float32 rounding
    assert torch.all(memory.grad[NUM_SHARED:] == 3.0)  # heads keep their own gradient
    memory.combine(torch.zeros(2))
    assert not memory.grad[:NUM_SHARED].any()


def test_kernels_are_used():
    """But not for words, whose number differs from step to step: nothing to compile for."""
    calls = []

    def counted(name):
        return lambda *args: (calls.append(name), getattr(PLAIN, name)(*args))[1]

    names = ("gram_matrix", "weighted_sum")
    model, memory = prepare(kernels=Kernels(**{name: counted(name) for name in names}))
    run_backward(model, memory)
    memory.group_grams()
    memory.combine(torch.ones(2))
    ranges = sum(map(len, memory.layout.layer_groups.values()))
    assert calls == ["gram_matrix"] * (ranges - 1) + ["weighted_sum"] * (len(memory.layout.sections) - 1)


def test_param_groups_carry_learning_rates_and_decay_matrices_only():
    """With all gradients zero an update is the decay alone: 1 - lr * weight_decay, or nothing."""
    model, memory = prepare()
    memory.data.fill_(1.0)
    groups = memory.param_groups(lr=0.5, head_lr=0.25, weight_decay=0.1)
    assert [group["lr"] for group in groups] == [0.5, 0.5, 0.25, 0.25, 0.25, 0.25]
    assert [group["initial_lr"] for group in groups] == [group["lr"] for group in groups]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0] * 3
    memory.show_grads(HEAD_OUTPUTS)
    AdamW(groups).step()
    for name, p in model.named_parameters():
        kept = 0.95 if name.startswith("encoder") else 0.975
        is_matrix = name.endswith("weight") and "norm" not in name
        assert p.unique().item() == pytest.approx(kept if is_matrix else 1.0, rel=1e-6), name  # float32


# --- what is frozen, and what is refused --------------------------------------------------------------------


@pytest.mark.parametrize("names", [(), ("words",), ("positions",), ("norm",), ("left", "right")])
def test_task_gradients_equal_autograd_and_leave_frozen_parameters_out(names):
    model = make_two_heads()
    encoder = model["encoder"]
    frozen = [p for name in names for p in getattr(encoder, name).parameters()]
    addresses = [p.requires_grad_(False).data_ptr() for p in frozen]
    model["second"].bias.requires_grad_(False)
    expected = {task: plain_grads(model, task) for task in HEAD_OUTPUTS}
    memory = make_memory(model)
    num_shared = memory.layout.num_shared
    assert num_shared == NUM_SHARED - sum(p.numel() for p in frozen)
    assert [p.data_ptr() for p in frozen] == addresses
    run_backward(model, memory)
    assert all(p.grad is None for p in [*frozen, *encoder.parameters()])  # nothing was computed twice
    grads = shared_grads(memory)
    for k, task in enumerate(memory.tasks):
        torch.testing.assert_close(grads[k], flat(memory, "shared", expected[task]), **FLOAT32)
        torch.testing.assert_close(memory.head_grad(task), flat(memory, task, expected[task]), **FLOAT32)
    memory.combine(torch.ones(2))
    torch.testing.assert_close(memory.grad[:num_shared], grads.sum(0), **FLOAT32)
    torch.testing.assert_close(memory.group_grams().sum(0), grads @ grads.T, **FLOAT32)


def test_what_cannot_be_laid_out_is_refused():
    model = make_two_heads()
    heads = {task: model[task] for task in HEAD_OUTPUTS}
    for other in (model["encoder"].left, heads["first"]):
        with pytest.raises(ValueError, match="two owners"):
            FlatMemory(model["encoder"], heads | {"second": other})
    with pytest.raises(ValueError, match="nothing to train"):
        make_memory(make_two_heads().requires_grad_(False))
    model["encoder"].left.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="partly frozen"):
        make_memory(model)
    model = make_two_heads()
    model["encoder"].extra = nn.Conv1d(2, 3, 1)
    with pytest.raises(ValueError, match="^extra is a Conv1d: its gradients cannot be kept by task"):
        make_memory(model)
    model["encoder"].extra.requires_grad_(False)
    make_memory(model)


class Adapted(nn.Linear):
    """A subclass, such as a low-rank adapter."""


# Name in the refusal -> what is done to the encoder.
NOT_PLAIN = {
    "left is a Adapted": lambda encoder: setattr(encoder, "left", Adapted(H, 5)),
    "left is a Sequential": lambda encoder: setattr(encoder, "left", nn.Sequential(nn.Linear(H, 5))),
    "left is a Linear": lambda encoder: encoder.left.register_forward_hook(lambda *args: None),
    "right is a Linear": lambda encoder: setattr(encoder, "right", nn.Linear(H, 3, bias=False)),
    "norm is a LayerNorm": lambda encoder: encoder.norm.register_forward_pre_hook(lambda *args: None),
    "words is a Embedding": lambda encoder: encoder.words.register_full_backward_hook(lambda *args: None),
    "positions.parametrizations.weight is a ParametrizationList": lambda encoder: (
        nn.utils.parametrize.register_parametrization(encoder.positions, "weight", nn.Identity())
    ),
    "extra is a Linear": lambda encoder: setattr(encoder, "extra", nn.Linear(2, 2)),  # in no group
    "the encoder is a TinyEncoder": lambda encoder: setattr(encoder, "own", nn.Parameter(torch.zeros(2))),
}


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_layers_that_do_more_than_their_weights_say_are_refused_by_name(name):
    model = make_two_heads()
    NOT_PLAIN[name](model["encoder"])
    message = f"^{name}: its gradients cannot be kept by task; expected nn.Linear"
    with pytest.raises(ValueError, match=message):
        make_memory(model)


def test_layers_changed_later_are_refused_and_frozen_ones_are_called():
    (model, memory), calls = prepare(), []
    hook = model["encoder"].norm.register_forward_hook(lambda *args: calls.append(1))
    with pytest.raises(ValueError, match="^LayerNorm: its gradients cannot be kept by task"):
        run_backward(model, memory)
    hook.remove()
    run_backward(model, memory)
    model = make_two_heads()
    model["encoder"].norm.requires_grad_(False)
    model["encoder"].norm.register_forward_hook(lambda *args: calls.append(1))
    run_backward(model, make_memory(model))
    assert calls == [1]
