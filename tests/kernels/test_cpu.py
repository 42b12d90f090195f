"""cpu.py: attention against the formula under automatic differentiation, dropout against what its name
promises.

Shapes: B sentences, T padded length, M tokens, N heads, D their width.
"""

import math

import pytest
import torch

from bert import MIN_WIDTH
from kernels import cpu
from kernels.cpu import MAX_SCORES, CpuAttention, dropout, keep_mask
from kernels.packing import Packing, Padding

# --- attention ----------------------------------------------------------------------------------------------

N, D = 3, 5
# Of the batches below: all of a batch at once; pieces of two sentences with 6 positions, or one with more.
PIECES = [MAX_SCORES, 2 * N * 6**2]


def make_attention(batches, seed=0, dtype=torch.float64):
    """Random projections for padded batches, (M, 3 * N * D), and where they stand."""
    masks = {
        "full": torch.ones(2, 4),
        "padded": torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [1, 1, 1, 1]]),
        "short": torch.ones(2, 1),
        "long": (torch.arange(MIN_WIDTH + 2) < torch.tensor([[3], [MIN_WIDTH + 2]])).long(),
    }
    paddings = [
        Padding.of_mask(masks[name]).widen(6) for name in batches
    ]  # padding to the right of every one
    packing = Packing([padding.num_tokens for padding in paddings])
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(packing.batches[-1].stop, 3 * N * D, generator=generator, dtype=dtype)
    return qkv.requires_grad_(), packing, paddings


def plain_attention(qkv, packing, paddings, dropout_prob=0.0):
    """Sentence by sentence: softmax(Q K^T / sqrt(D)) V over real word pieces only."""
    context = torch.zeros(len(qkv), N * D, dtype=qkv.dtype)
    for tokens, padding in zip(packing.batches, paddings, strict=True):
        num_sentences, width = padding.mask.shape
        keep, scale = torch.ones(num_sentences * N, width, width), 1.0
        if dropout_prob:
            size = N * max(1, cpu.MAX_SCORES // (N * width**2))  # heads of a piece
            pieces = [keep_mask(piece.shape, dropout_prob, keep.dtype) for piece in keep.split(size)]
            keep, scale = torch.cat([piece for piece, _ in pieces]), pieces[0][1]
        positions = torch.arange(padding.mask.numel()) if padding.positions is None else padding.positions
        for b in range(num_sentences):
            inside = ((positions // width) == b).nonzero().flatten()  # tokens of this sentence in its batch
            where = positions[inside] % width
            query, key, value = qkv[tokens][inside].view(len(inside), 3, N, D).unbind(1)
            for n in range(N):
                probs = (query[:, n] @ key[:, n].T / math.sqrt(D)).softmax(-1)
                kept = keep[b * N + n][where][:, where] * scale
                summand = torch.zeros_like(context)
                summand[tokens.start + inside, n * D : (n + 1) * D] = (probs * kept) @ value[:, n]
                context = context + summand
    return context


@pytest.mark.parametrize("max_scores", PIECES)
@pytest.mark.parametrize("dropout_prob", [0.0, 0.3])
@pytest.mark.parametrize("batches", [["full"], ["padded"], ["short"], ["padded", "long", "full", "short"]])
def test_attention_equals_the_formula(in_double, monkeypatch, batches, dropout_prob, max_scores):
    monkeypatch.setattr(cpu, "MAX_SCORES", max_scores)
    qkv, packing, paddings = make_attention(batches)
    torch.manual_seed(5)
    found = CpuAttention.apply(qkv, packing, paddings, N, dropout_prob)
    torch.manual_seed(5)  # the same draws: dropped elements are the same
    expected = plain_attention(qkv, packing, paddings, dropout_prob)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)  # float64
    weigh = torch.randn(found.shape, generator=torch.Generator().manual_seed(6))
    found_grad, expected_grad = (
        torch.autograd.grad((context * weigh).sum(), qkv)[0] for context in (found, expected)
    )
    torch.testing.assert_close(found_grad, expected_grad, rtol=1e-10, atol=1e-12)
    query, key, value = expected_grad.view(len(qkv), 3, -1).unbind(1)
    assert value.any() and (batches == ["short"] or (query.any() and key.any()))
    if dropout_prob:
        assert not torch.allclose(found, plain_attention(qkv, packing, paddings))


@pytest.mark.parametrize("max_scores", PIECES)
@pytest.mark.parametrize("dropout_prob", [0.0, 0.5])
def test_attention_gradient_equals_finite_differences(in_double, monkeypatch, dropout_prob, max_scores):
    monkeypatch.setattr(cpu, "MAX_SCORES", max_scores)
    qkv, packing, paddings = make_attention(["padded", "full"])

    def attend(qkv):
        torch.manual_seed(2)
        return CpuAttention.apply(qkv, packing, paddings, N, dropout_prob)

    assert torch.autograd.gradcheck(attend, [qkv], fast_mode=True)


@pytest.mark.parametrize("max_scores", PIECES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_attention_in_other_types(monkeypatch, dtype, tolerance, max_scores):
    """Of the whole result's length: a few roundings, to bfloat16 each by up to 2**-9 of a number."""
    monkeypatch.setattr(cpu, "MAX_SCORES", max_scores)
    qkv, packing, paddings = make_attention(["padded", "long"], dtype=dtype)
    exact = qkv.detach().float().requires_grad_()
    found = CpuAttention.apply(qkv, packing, paddings, N, 0.0)
    expected = plain_attention(exact, packing, paddings)
    weigh = torch.randn(found.shape, generator=torch.Generator().manual_seed(6)).to(dtype)
    found.backward(weigh)
    expected.backward(weigh.float())
    assert found.dtype == qkv.grad.dtype == dtype
    assert (found.float() - expected).norm() / expected.norm() < tolerance
    assert (qkv.grad.float() - exact.grad).norm() / exact.grad.norm() < tolerance


def test_scores_made_again_are_the_same_bits(monkeypatch):
    """Sentences of 6 positions in pieces of one, and each as a batch of its own, whose scores are kept."""
    qkv, packing, paddings = make_attention(["padded"], dtype=torch.float32)
    mask, outcomes = paddings[0].mask, []
    sentences = [Padding.of_mask(row[None]) for row in mask]
    sizes = [padding.num_tokens for padding in sentences]
    for places in ((packing, paddings), (Packing(sizes), sentences)):
        monkeypatch.setattr(cpu, "MAX_SCORES", N * 6**2)
        torch.manual_seed(5)
        context = CpuAttention.apply(qkv, *places, N, 0.3)
        outcomes.append((context, *torch.autograd.grad(context.pow(2).sum(), qkv)))
    assert all(torch.equal(one, other) for one, other in zip(*outcomes, strict=True))


def saved_bytes(qkv, packing, paddings, num_heads) -> int:
    """Bytes that attention keeps for its backward pass."""
    sizes = []

    def pack(tensor):
        sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        CpuAttention.apply(qkv, packing, paddings, num_heads, 0.1)
    return sum(sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_batch_keeps_no_scores(dtype):
    """Twelve heads, as in MiniLM, 128 positions: 21 sentences have just less than MAX_SCORES, 22 more."""
    num_heads, width, head_width = 12, 128, 2
    for num_sentences in (21, 22):
        num_tokens, num_scores = num_sentences * width, num_sentences * num_heads * width**2
        packing, padding = Packing([num_tokens]), Padding.of_mask(torch.ones(num_sentences, width))
        qkv = torch.zeros(num_tokens, 3 * num_heads * head_width, dtype=dtype, requires_grad=True)
        scores = (4 + 4 + dtype.itemsize) * num_scores  # softmax, dropout; what is left of them
        kept = scores if num_scores <= MAX_SCORES else 0
        assert (num_scores <= MAX_SCORES) == (num_sentences == 21)
        assert saved_bytes(qkv, packing, [padding], num_heads) == qkv.nbytes + kept
        assert saved_bytes(qkv.detach(), packing, [padding], num_heads) == 0  # no gradient is wanted


# --- dropout ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_a_share_of_1_minus_p(p):
    """Within five standard errors, as all of these."""
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


@pytest.mark.parametrize(
    ("p", "scale"),
    [
        (0.1, 65536 / 58982),  # 0.1 * 65536 = 6553.6 rounds to 6554 that are dropped
        (0.25, 4 / 3),  # a multiple of 2**-16
        (2**-18, 1.0),  # rounds to 0: nothing is dropped
        (1 - 2**-20, 65536.0),  # BertConfig takes any probability below 1; something is always kept
    ],
)
def test_keep_mask_and_its_scale_by_hand(p, scale):
    torch.manual_seed(0)
    keep, found = keep_mask((1000, 3), p, torch.bfloat16)
    assert keep.shape == (1000, 3) and keep.dtype == torch.bfloat16 and found == scale
    assert set(keep.unique().tolist()) <= {0.0, 1.0} and (p > 2**-17 or keep.all())
    values = dropout(torch.ones(1000), p, training=True).unique().tolist()
    assert set(values) <= {0.0, torch.tensor(scale).item()}


def test_dropout_is_the_identity_in_eval_and_for_0():
    x = torch.randn(5, 3)
    state = torch.get_rng_state()
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0, training=True) is x
    assert torch.equal(torch.get_rng_state(), state)  # and draws nothing


def test_dropout_follows_the_seed_whatever_the_type():
    x = torch.randn(1001, generator=torch.Generator().manual_seed(0))
    before, ys = x.clone(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        ys += [dropout(x, 0.5, training=True), dropout(x, 0.5, training=True)]
    assert torch.equal(ys[0], ys[2]) and torch.equal(ys[1], ys[3])
    assert not torch.equal(ys[0], ys[1]) and not torch.equal(ys[0], ys[4])
    assert torch.equal(x, before)
    torch.manual_seed(1)
    low = dropout(x.bfloat16(), 0.5, training=True)
    assert torch.equal(low != 0, ys[0] != 0)


@pytest.mark.parametrize("shape", [(0,), (1,), (3,), (5,), (1, 1, 3), (13, 7, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dropout_gradient_flows_through_kept_elements_only(dtype, shape):
    torch.manual_seed(0)
    x = torch.ones(shape, dtype=dtype, requires_grad=True)
    y = dropout(x, 0.5, training=True)
    y.sum().backward()
    assert y.shape == shape and y.dtype == x.grad.dtype == dtype
    assert set(y.flatten().tolist()) <= {0.0, 2.0} and (y.numel() < 100 or len(y.unique()) == 2)
    assert torch.equal(x.grad, y)  # each is 0 or 2 times the 1 that went in, and came back


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
