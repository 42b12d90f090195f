"""`train_step` of multitask_classifier.py against one written as the papers describe it; its own promises.

The textbook step knows neither flat memory nor packed passes nor inner products: a loss and a backward pass
per batch, and lists of tensors. Shapes: K tasks, P parameters of the encoder.
"""

import math
from itertools import cycle

import numpy as np
import pytest
import torch

from config import DEFAULT_TASKS
from evaluation import Objective
from heads import PAIR_HEADS, POOLINGS
from kernels.grad_methods import GRAD_METHODS, combination_weights
from kernels.packing import make_paddings
from multitask_classifier import TaskBatch, train_step
from optimizer import AdamW
from pcgrad import TaskFacts, cosine_matrix, draw_step_orders
from support.device import PRECISIONS, make_autocast
from support.seeds import make_seed
from tests.test_pcgrad import draw_orders, textbook_pcgrad
from tests.tiny import make_batch, make_model, make_task_batches, make_training, shared_grads, take_step
from training.settings import StepSettings


def flat_weights(model):
    return torch.cat([param.detach().flatten() for param in model.parameters()])


# --- against the textbook -----------------------------------------------------------------------------------


def textbook_grads(model, task_batches, task_weights):
    """Losses by task, task gradients of the encoder (P,) by task, and the heads' gradients by parameter.

    A task's loss is the mean over its examples, whatever batches they are in, times its number of draws.
    """
    shared = [param for param in model.bert.parameters() if param.requires_grad]
    losses, task_grads, head_grads = {}, {}, {}
    for batch in task_batches:
        head = list(model.heads[batch.task].parameters())
        draws = [each.micro_batches for each in task_batches if each.task == batch.task]
        num_examples = sum(len(piece["labels"]) for pieces in draws for piece in pieces)
        for piece in batch.micro_batches:
            loss = model.loss(batch.task, piece) * len(piece["labels"]) / num_examples
            losses[batch.task] = losses.get(batch.task, 0.0) + loss.item()
            weighted = loss * task_weights.get(batch.task, 1.0) * len(draws)
            grads = torch.autograd.grad(weighted, [*shared, *head], materialize_grads=True, allow_unused=True)
            vector = torch.cat([grad.flatten() for grad in grads[: len(shared)]]).double()
            task_grads[batch.task] = task_grads.get(batch.task, 0.0) + vector
            for param, grad in zip(head, grads[len(shared) :], strict=True):
                head_grads[param] = head_grads.get(param, 0.0) + grad
    return losses, task_grads, head_grads


def textbook_step(model, task_batches, moments, *, step, seed, options, eps):
    """One update; gives losses, task gradients (K, P) of tasks with a batch, the length before clipping."""
    lr, weight_decay = 0.01, 0.01  # those of `make_training`
    losses, task_grads, grads = textbook_grads(model, task_batches, options.get("task_weights", {}))
    present = [task for task in model.tasks if task in losses]
    rows = torch.stack([task_grads[task] for task in present])
    if options["grad_method"] == "pcgrad":
        combined = textbook_pcgrad(rows, draw_orders(len(present), make_seed(seed, step)))
    elif options.get("grad_reduction") == "mean" or options["grad_method"] == "sum":
        combined = rows.sum(0)
    else:
        combined = rows.mean(0)
    if options.get("grad_reduction") == "mean":
        combined = combined / len(task_batches)
    shared = [param for param in model.bert.parameters() if param.requires_grad]
    pieces = combined.float().split([param.numel() for param in shared])
    grads |= {param: piece.view_as(param) for param, piece in zip(shared, pieces, strict=True)}
    norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads.values()))
    clip_norm = options.get("clip_norm", 0.0)
    scale = min(1.0, clip_norm / norm) if clip_norm else 1.0
    with torch.no_grad():
        for param, grad in grads.items():
            zero = {"step": 0, "m": torch.zeros_like(param), "v": torch.zeros_like(param)}
            state = moments.setdefault(param, zero)
            state["step"] += 1
            state["m"] = 0.9 * state["m"] + 0.1 * scale * grad
            state["v"] = 0.999 * state["v"] + 0.001 * (scale * grad) ** 2
            rate = lr * math.sqrt(1 - 0.999 ** state["step"]) / (1 - 0.9 ** state["step"])
            param -= rate * state["m"] / (state["v"].sqrt() + eps)
            param -= lr * weight_decay * param * (param.ndim >= 2)
    return losses, rows, norm


# The task batches of each of three steps: tasks, and how many micro-batches each has.
STEPS = [
    [("sst", 1), ("para", 1), ("sts", 1)],
    # A task twice, apart; unequal numbers of micro-batches.
    [("sst", 2), ("sts", 1), ("sst", 1), ("para", 3)],
    # Others absent, with momentum that must not move their heads.
    [("sts", 2), ("sts", 2)],
]
SUM, MEAN, PCGRAD = ({"grad_method": name} for name in ("sum", "mean", "pcgrad"))
STEP_OPTIONS = [
    ("mean", SUM | {"task_weights": {"sst": 0.5, "sts": 3.0}, "clip_norm": 0.5}),
    ("mean", SUM | {"grad_reduction": "mean"}),
    ("pooler", MEAN | {"grad_reduction": "mean", "clip_norm": 0.1}),
    ("mean", PCGRAD),
    ("pooler", PCGRAD | {"task_weights": {"para": 4.0}, "clip_norm": 0.25, "grad_reduction": "mean"}),
]


@pytest.mark.parametrize(("pooling", "options"), STEP_OPTIONS, ids=range(len(STEP_OPTIONS)))
def test_steps_equal_textbook_steps(options, pooling):
    """Losses, inner products, length and parameters over three steps, without dropout.

    eps is large: Adam's first steps go by a gradient's sign, and of a gradient of zero that is only rounding.
    """
    eps = 1e-4
    model, plain = (make_model(pooling=pooling, dropout=False).train() for _ in range(2))
    start = flat_weights(model)
    memory, optimizer = make_training(model, lr=0.01, eps=eps)
    moments, conflicts = {}, 0
    for step, drawn in enumerate(STEPS):
        task_batches = []
        for n, (task, count) in enumerate(drawn):
            seeds = range(100 * step + 10 * n, 100 * step + 10 * n + count)
            task_batches.append(TaskBatch(task, [make_batch(task, size=2 + i % 10, seed=i) for i in seeds]))
        found = take_step((model, memory, optimizer), task_batches, step=step, seed=7, **options)
        numbers = {"step": step, "seed": 7, "options": options, "eps": eps}
        losses, rows, norm = textbook_step(plain, task_batches, moments, **numbers)
        assert found.applied
        present = [k for k, task in enumerate(memory.tasks) if task in losses]
        for k, task in enumerate(memory.tasks):
            expected = losses.get(task, math.nan)
            assert float(found.losses[k]) == pytest.approx(expected, rel=1e-4, nan_ok=True)  # float32, grown
            assert (found.weights[k] != 0) == (task in losses)
        gram = torch.zeros(3, 3, dtype=torch.float64)  # zero where a task is absent
        gram[np.ix_(present, present)] = rows @ rows.T
        scale = float(gram.diagonal().max())
        torch.testing.assert_close(found.gram.double(), gram, rtol=0, atol=1e-4 * scale)
        assert found.grad_norm == pytest.approx(norm, rel=1e-4)
        pieces = [piece for batch in task_batches for piece in batch.micro_batches]
        assert found.num_tokens == sum(int(piece["attention_mask"].sum()) for piece in pieces)
        conflicts += int((gram < 0).any())
    assert conflicts  # or PCGrad would be the plain sum
    moved, expected = flat_weights(model) - start, flat_weights(plain) - start
    assert expected.norm() > 0.1
    # Gradients differ by 1e-7 or so, which eps lets an update show a thousandfold.
    assert float((moved - expected).norm() / expected.norm()) < 1e-4
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("method", ["pcgrad", "mgda", "cr_mogm"])
def test_surgery_by_layer_combines_each_layer_group_by_itself(method):
    training = (model := make_model(dropout=False).train(), *make_training(model, lr=1e-9))
    memory, options = training[1], {"grad_method": method, "surgery_scope": "layer", "seed": 7}
    options["grad_reduction"] = GRAD_METHODS[method].reduction
    found = take_step(training, make_task_batches(), **options)
    grads, orders = shared_grads(memory).double(), draw_step_orders(7, 0, 3)
    assert len(memory.layout.layer_groups) == 3
    for number, group in enumerate(memory.layout.layer_groups.values()):
        columns = torch.cat([torch.arange(where.start, where.stop) for where in group])
        rows = grads[:, columns]
        facts = TaskFacts(rows @ rows.T, orders)
        alone, _ = combination_weights(
            facts, [0, 1, 2], grad_method=method, grad_reduction=options["grad_reduction"], num_batches=3
        )
        error = (memory.grad[columns].double() - alone @ rows).norm() / rows.norm(dim=1).max()
        assert error < 1e-4, number  # float32 inner products
    length = memory.grad[: memory.layout.num_shared].square().sum() + found.head_squares.sum()
    assert found.grad_norm == pytest.approx(float(length.sqrt()), rel=1e-4)
    whole = take_step(training, make_task_batches(), **options | {"surgery_scope": "model"})
    assert not torch.allclose(whole.weights, found.weights, rtol=1e-3)


def test_gram_ema_gives_the_method_means_of_the_steps_so_far():
    training = (model := make_model(dropout=False).train(), *make_training(model, lr=0.1))
    learned, grams = {}, []
    for step in range(2):
        batches = [
            TaskBatch(task, [make_batch(task, seed=7 * step + k)]) for k, task in enumerate(DEFAULT_TASKS)
        ]
        found = take_step(training, batches, step=step, learned=learned, gram="ema:b=0.5")
        learned, grams = found.learned, [*grams, found.gram]
    mean = (grams[0] + 2 * grams[1]) / 3
    facts = TaskFacts(mean, draw_step_orders(0, 1, 3))
    options = {"grad_method": "pcgrad", "grad_reduction": "sum", "num_batches": 3}
    torch.testing.assert_close(found.weights, combination_weights(facts, [0, 1, 2], **options)[0])
    torch.testing.assert_close(found.gains, grams[1] @ found.weights)  # of the step, not of the means


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.03), ("fp16", 0.004)])
def test_step_in_half_precision_is_near_that_in_float32(precision, tolerance, accumulate):
    """Gradients of each task, within 3 % of their length in bfloat16; float16 has three bits more."""
    outcomes = []
    for dtype in (torch.float32, PRECISIONS[precision]):
        model = make_model(dropout=False)
        memory = model.move_to_flat_memory(dtype, dtype if accumulate == 1 else torch.float32)
        optimizer = AdamW(memory.param_groups(0.01, 0.01, 0.01), lr=0.01)
        task_batches = [
            TaskBatch(task, [make_batch(task, seed=k + i) for i in range(accumulate)])
            for k, task in enumerate(DEFAULT_TASKS)
        ]
        autocast = make_autocast("cpu", "fp32" if dtype == torch.float32 else precision)
        options = {"grad_method": "sum", "autocast": autocast}
        result = take_step((model, memory, optimizer), task_batches, **options)
        assert result.applied
        outcomes.append((result.losses, shared_grads(memory), memory.grad.clone()))
    (losses, rows, grad), (low_losses, low_rows, low_grad) = outcomes
    torch.testing.assert_close(low_losses, losses, rtol=tolerance / 3, atol=0.0)
    assert not torch.equal(low_losses, losses)
    assert ((low_rows - rows).norm(dim=1) / rows.norm(dim=1)).max() < tolerance
    assert (low_grad - grad).norm() / grad.norm() < tolerance


def cut(batch: dict, sizes: list[int]) -> list[dict]:
    """A batch in pieces of so many examples; first sentences come before second ones."""
    num_examples, pieces, start = len(batch["labels"]), [], 0
    for size in sizes:
        examples = slice(start, start + size)
        parts = {
            name: [part[examples] for part in tensor.split(num_examples)] for name, tensor in batch.items()
        }
        pieces.append({name: torch.cat(each) for name, each in parts.items()})
        start += size
    return pieces


@pytest.mark.parametrize("sizes", [[1, 8], [7, 1, 1]])
@pytest.mark.parametrize("apart", [False, True])
def test_every_example_of_a_step_counts_once(sizes, apart):
    """Accumulated, or in draws of their own: nine examples of each task are as one batch of nine.

    A task that was drawn n times counts n times, so that its weight is divided by n here.
    """
    outcomes = []
    for pieces in ([9], sizes):
        model = make_model(dropout=False).train()
        memory, optimizer = make_training(model)
        batches = [(task, cut(make_batch(task, size=9, seed=3), pieces)) for task in DEFAULT_TASKS]
        draws = [TaskBatch(task, each) for task, each in batches]
        if apart:
            draws = [TaskBatch(task, [piece]) for task, each in batches for piece in each]
        task_weights = dict.fromkeys(DEFAULT_TASKS, 3 / len(draws))
        result = take_step((model, memory, optimizer), draws, grad_method="sum", task_weights=task_weights)
        heads = torch.cat([memory.head_grad(task) for task in memory.tasks])
        outcomes.append([result.losses, result.gram, shared_grads(memory), heads])
    for whole, cut_up in zip(*outcomes, strict=True):
        scale = float(whole.abs().max())
        torch.testing.assert_close(cut_up, whole, rtol=0, atol=1e-5 * scale)  # float32, in another order


# --- what an update changes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("head", "pooling"), list(zip(PAIR_HEADS, cycle(POOLINGS), strict=False)))
def test_one_update_changes_every_trainable_parameter_and_no_other(head, pooling, frozen):
    model = make_model(head, pooling=pooling, freeze_encoder=frozen).train()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    training = (model, *make_training(model))
    assert take_step(training, make_task_batches(head=head), clip_norm=1.0).applied
    for name, param in model.named_parameters():
        # A key's bias has no gradient (softmax ignores it) but for rounding; it may stay.
        changed = not torch.equal(param, before[name])
        assert changed == param.requires_grad or name.endswith("key.bias"), name
        assert name.startswith("bert.pooler") or param.requires_grad != (frozen and name.startswith("bert."))
    assert model.bert.pooler.dense.weight.requires_grad == (pooling == "pooler" and not frozen)
    assert model.bert.training == (not frozen)  # no dropout in a fixed function


# --- the loss scale -----------------------------------------------------------------------------------------


def scaled_step(loss_scale, precision="fp32", model=None, task_batches=None, **settings):
    """A step from the same start whatever the scale; also the update and the memory."""
    model = model or make_model()
    dtype = PRECISIONS[precision]
    memory = model.move_to_flat_memory(dtype, dtype)
    optimizer, before = AdamW(memory.param_groups(0.01, 0.01, 0.01), lr=0.01), memory.data.clone()
    settings = StepSettings(0, autocast=make_autocast("cpu", precision), loss_scale=loss_scale, **settings)
    task_batches = task_batches or make_task_batches()
    result = train_step(model, memory, optimizer, task_batches, settings, step=0)
    return result, memory.data - before, optimizer


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
@pytest.mark.parametrize("frozen", [False, True])
def test_loss_scale_changes_no_number_of_a_float32_step(clip_norm, frozen):
    """A power of two rounds nothing, so all bits are the same."""
    options = {"clip_norm": clip_norm, "task_weights": {"sst": 0.3}}
    plain, moved, _ = scaled_step(1, model=make_model(freeze_encoder=frozen), **options)
    scaled, moved_scaled, _ = scaled_step(2**16, model=make_model(freeze_encoder=frozen), **options)
    assert torch.equal(moved, moved_scaled) and moved.any() and plain.grad_norm > 0.5
    for name in ("losses", "gram", "group_grams", "weights", "head_squares", "cosine_ema"):
        assert torch.equal(getattr(plain, name), getattr(scaled, name)), name
    assert plain.grad_norm == scaled.grad_norm and not scaled.overflow


def test_loss_scale_saves_small_gradients_in_float16():
    """With losses of a ten-millionth, most of the gradients lie below what float16 can hold."""
    small = dict.fromkeys(DEFAULT_TASKS, 1e-7)
    exact, *_ = scaled_step(1, task_weights=small)
    lost, *_ = scaled_step(1, "fp16", task_weights=small)
    saved, *_ = scaled_step(2**16, "fp16", task_weights=small)
    error = [float((found.gram - exact.gram).norm() / exact.gram.norm()) for found in (lost, saved)]
    assert error[0] > 0.1 and error[1] < 0.01


def test_overflow_is_told_from_a_fault():
    # 2**24 times gradients of about 50 is beyond 65,504.
    result, moved, optimizer = scaled_step(2**24, "fp16")
    assert result.overflow and not result.applied and not moved.any() and not optimizer.state
    assert result.losses.isfinite().all() and math.isnan(result.grad_norm)
    # The same without a scale to blame: at 1, or where the loss itself is not finite.
    large = {"sts": 1e7}
    assert scaled_step(2, "fp16", task_weights=large)[0].overflow
    fault = scaled_step(1, "fp16", task_weights=large)[0]
    assert not fault.applied and not fault.overflow
    task_batches = make_task_batches()
    task_batches[2].micro_batches[0]["labels"][0] = math.nan
    fault = scaled_step(2**24, "fp16", task_batches=task_batches)[0]
    assert not fault.applied and not fault.overflow


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_step_that_is_not_finite_is_skipped_whole(where):
    model = make_model()
    memory, optimizer = make_training(model)
    before = memory.data.clone()
    task_batches = make_task_batches()
    if where == "loss":
        task_batches[2].micro_batches[0]["labels"][0] = math.nan
    else:

        def spoil(module, inputs, output):
            output.register_hook(lambda grad: grad * math.inf)  # losses stay finite

        hook = model.bert.embeddings.register_forward_hook(spoil)
    result = take_step((model, memory, optimizer), task_batches)
    assert not result.applied and math.isnan(result.grad_norm) and not result.weights.any()
    assert torch.equal(memory.data, before) and not optimizer.state
    assert result.losses.isnan().tolist() == [False, False, where == "loss"]
    if where == "gradient":  # and the next step knows nothing of it
        hook.remove()
        assert take_step((model, memory, optimizer), task_batches, step=1).applied
        assert memory.data.isfinite().all() and not torch.equal(memory.data, before)


def test_surgery_on_chosen_tasks_changes_their_gradients_only():
    def weights(surgery_tasks):
        model = make_model()
        task_batches = make_task_batches()
        task_batches[1].micro_batches[0]["labels"] = 1 - task_batches[1].micro_batches[0]["labels"]
        training = (model, *make_training(model))
        result = take_step(training, task_batches, seed=1, surgery_tasks=surgery_tasks)
        return result.weights, cosine_matrix(result.gram)

    everything, cosines = weights(None)
    assert (cosines < 0).any()  # or else there is nothing to see
    assert torch.equal(weights(DEFAULT_TASKS)[0], everything)
    assert torch.equal(weights(())[0], torch.ones(3))
    # Tasks are adjusted independently, in the same orders, so their changes of the weights add up.
    alone = torch.stack([weights((task,))[0] - 1 for task in DEFAULT_TASKS])
    torch.testing.assert_close(1 + alone.sum(0), everything)
    assert not alone.diagonal().any()  # its own gradient stays whole; others are taken away from it


# --- ingredients --------------------------------------------------------------------------------------------


def test_learning_rates_fall_by_layer():
    """Adam's first update and the decay are as long as the learning rate, whatever the gradient."""
    moves = []
    for decay in (1.0, 0.5):
        model = make_model(dropout=False)
        training = (model, *make_training(model, layer_decay=decay))
        before = {name: param.detach().clone() for name, param in model.named_parameters()}
        take_step(training, make_task_batches())
        moves.append({name: param.detach() - before[name] for name, param in model.named_parameters()})
    for name, move in moves[0].items():
        factor = 0.25 if "embeddings" in name else 0.5 if "layer.0" in name else 1.0
        torch.testing.assert_close(
            moves[1][name], factor * move, rtol=0, atol=1e-6
        )  # float32, of weights up to 1


def test_both_passes_of_r_drop_without_dropout_are_one():
    """Rows twice, and their divergence is 0: losses and gradients are those of a plain step."""
    outcomes = []
    for weight in (0.0, 3.0):
        objective = Objective(rdrop=dict.fromkeys(DEFAULT_TASKS, weight))
        model = make_model("cross", dropout=False, objective=objective).train()
        training = (model, *make_training(model))
        batches = make_task_batches(head="cross")  # rows are examples
        if weight:
            for batch in batches:
                batch.micro_batches[0] = {
                    name: torch.cat([tensor, tensor]) for name, tensor in batch.micro_batches[0].items()
                }
        outcomes.append(take_step(training, batches))
    assert outcomes[1].losses.tolist() == pytest.approx(outcomes[0].losses.tolist(), rel=1e-5)  # float32
    torch.testing.assert_close(outcomes[1].gram, outcomes[0].gram, rtol=1e-4, atol=1e-5)


def test_fast_gradient_method_equals_the_textbook():
    """Gradients of L(s) + L(s + r), r as long as asked for in each sentence, along the gradient of L at s."""
    model, plain = (make_model(tasks=["sst", "para"], dropout=False) for _ in range(2))
    batches = make_task_batches(["sst", "para"])
    training = (model, *make_training(model, lr=0.0))
    result = take_step(training, batches, fgm=0.5, grad_method="sum")
    rows = []
    for batch in batches:
        piece, seen = batch.micro_batches[0], []
        norm = plain.bert.embeddings.LayerNorm
        hook = norm.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        clean = plain.loss(batch.task, piece)
        hook.remove()
        (grad,) = torch.autograd.grad(clean, seen, retain_graph=True)  # (M, H)
        (padding,) = make_paddings([piece["attention_mask"]])  # some of it is among the tokens
        sentence = padding.positions // padding.mask.shape[1]
        noise = torch.zeros_like(grad)
        for n in sentence.unique():
            tokens = [m for m, other in enumerate(sentence) if other == n]
            noise[tokens] = 0.5 * grad[tokens] / grad[tokens].norm()
        hook = norm.register_forward_pre_hook(lambda _, inputs, noise=noise: (inputs[0] + noise,))
        total = clean + plain.loss(batch.task, piece)
        hook.remove()
        params = [param for param in plain.bert.parameters() if param.requires_grad]
        grads = torch.autograd.grad(total, params, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([each.flatten() for each in grads]))
        # The loss is that of the clean pass.
        assert float(result.losses[len(rows) - 1]) == pytest.approx(clean.item(), rel=1e-5)
    rows = torch.stack(rows)
    torch.testing.assert_close(result.gram, rows @ rows.T, rtol=1e-4, atol=1e-5)  # float32


# --- one pass, and its randomness ---------------------------------------------------------------------------


def test_all_task_batches_go_through_the_encoder_together(monkeypatch):
    passes, model = [], make_model()
    memory, optimizer = make_training(model)
    encode = model.bert.encode

    def recorded(inputs, task_numbers, targets, noise):
        passes.append(task_numbers)
        return encode(inputs, task_numbers, targets, noise)

    monkeypatch.setattr(model.bert, "encode", recorded)
    counts = [("sts", 2), ("sst", 1), ("sts", 3)]
    task_batches = [TaskBatch(task, [make_batch(task)] * count) for task, count in counts]
    take_step((model, memory, optimizer), task_batches)
    assert passes == [[2, 0, 2], [2, 2], [2]]


def test_a_step_depends_on_its_seed_and_number_and_not_on_other_random_draws():
    outcomes = []
    for seed, step, noise in ((3, 5, 0), (3, 5, 100), (4, 5, 0), (3, 6, 0)):
        model = make_model().train()
        memory, optimizer = make_training(model)
        torch.rand(noise)
        take_step((model, memory, optimizer), make_task_batches(), step=step, seed=seed)
        outcomes.append(memory.data.clone())
    assert torch.equal(outcomes[0], outcomes[1])
    assert not any(torch.equal(outcomes[0], other) for other in outcomes[2:])


def test_dropout_differs_between_micro_steps_and_between_batches():
    """The first micro-step's dropout is that of a step without accumulation; the second's is another."""
    model = make_model().train()
    training = (model, *make_training(model, lr=0.0))
    batch = make_batch("sst")

    def loss(count, *before):
        return float(take_step(training, [*before, TaskBatch("sst", [batch] * count)]).losses[0])

    first, both = loss(1), loss(2)
    assert first == loss(1) and abs(both - first) > 1e-4  # were the draws the same, so would be the mean
    assert loss(1, TaskBatch("para", [make_batch("para")])) != first
    model.eval()
    assert loss(2) == pytest.approx(loss(1), rel=1e-6)  # float32
