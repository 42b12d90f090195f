"""Tests of multitask_bert.py: losses of several batches together, and the memory it makes."""

import pytest
import torch

from bert import BertModel
from config import TASKS
from heads import POOLINGS, MultitaskBERT
from kernels.flat_memory import FlatMemory
from kernels.fused import PLAIN, Passes
from tests.tiny import make_config, shared_grads

TASK_HEADS = {"sst": "single", "para": "diff", "sts": "cross"}


def make_model(**options):
    torch.manual_seed(0)
    bert = BertModel(make_config(30, initializer_range=0.2))
    return MultitaskBERT(bert, {task: TASKS[task] for task in TASK_HEADS}, TASK_HEADS, **options)


def make_batch(task, size, positions, seed=0):
    generator = torch.Generator().manual_seed(seed)
    num_sequences = 2 * size if TASK_HEADS[task] == "diff" else size
    lengths = torch.randint(1, positions + 1, (num_sequences, 1), generator=generator)
    mask = (torch.arange(positions) < lengths).long()
    return {
        "input_ids": torch.randint(1, 30, (num_sequences, positions), generator=generator) * mask,
        "attention_mask": mask,
        "token_type_ids": torch.zeros_like(mask),
        "labels": torch.randint(0, 2, (size,), generator=generator).float(),
    }


BATCHES = [("sts", 3, 7), ("sst", 4, 18), ("para", 2, 1), ("sts", 2, 16), ("para", 3, 5)]


@pytest.mark.parametrize("freeze_encoder", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_losses_together_are_those_of_each_batch_alone(pooling, freeze_encoder):
    model = make_model(pooling=pooling, freeze_encoder=freeze_encoder).eval()
    batches = [(task, make_batch(task, *sizes, seed=n)) for n, (task, *sizes) in enumerate(BATCHES)]
    together = model.losses(batches)
    assert len(together) == len(batches)
    for loss, (task, batch) in zip(together, batches, strict=True):
        assert loss.shape == () and loss.requires_grad
        torch.testing.assert_close(loss, model.loss(task, batch), rtol=1e-5, atol=1e-6)  # float32
    assert len({round(loss.item(), 4) for loss in together}) == len(batches)
    model.make_memory().start_step()
    for loss, expected in zip(model.losses(batches, by_task=True), together, strict=True):
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_gradients_by_task_land_in_the_order_of_the_tasks():
    """Whatever the order of the batches; and the model's parameters have no other gradient."""
    model = make_model().eval()
    batches = [(task, make_batch(task, *sizes, seed=n)) for n, (task, *sizes) in enumerate(BATCHES)]
    memory = model.make_memory()
    assert isinstance(memory, FlatMemory) and memory.tasks == tuple(TASK_HEADS)
    for k, task in enumerate(memory.tasks):
        chosen = [pair for pair in batches if pair[0] == task]
        memory.start_step()
        sum(model.losses(chosen, by_task=True)).backward()
        memory.finish_grads()
        rows = shared_grads(memory)
        assert rows[k].any() and not rows[[n for n in range(3) if n != k]].any()
        assert all(memory.head_grad(other).any() == (other == task) for other in memory.tasks)
    assert all(param.grad is None for param in model.bert.parameters())


def test_memory_has_the_types_and_passes_that_were_asked_for():
    memory = make_model().make_memory()
    assert memory.weight_copy is None and memory.matrix_grads.dtype == torch.float32
    assert memory.passes is PLAIN
    passes = Passes(gram_matrix=len)
    memory = make_model().make_memory(torch.bfloat16, torch.bfloat16, passes)
    assert memory.weight_copy.dtype == memory.matrix_grads.dtype == torch.bfloat16 and memory.passes is passes
    memory = make_model(freeze_encoder=True).make_memory(torch.bfloat16, torch.bfloat16)
    assert memory.num_shared == 0


@pytest.mark.parametrize("freeze_encoder", [False, True])
def test_a_frozen_encoder_keeps_nothing_for_a_backward_pass(freeze_encoder):
    model, seen = make_model(freeze_encoder=freeze_encoder), []
    model.bert.embeddings.register_forward_hook(lambda *args: seen.append(torch.is_grad_enabled()))
    batch = make_batch("sst", 2, 5)
    model.loss("sst", batch)
    model("sst", batch)
    assert seen == [not freeze_encoder] * 2
