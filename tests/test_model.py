"""SCAN's scores and the ranking loss against plain loops, and what must not change them."""

import itertools
import math

import pytest
import torch

import attention
import pairs
from attention import CrossAttention
from model import (
    AGG_FUNC,
    RAW_FEATURE_NORM,
    SCAN,
    ContrastiveLoss,
    l1norm,
    l2norm,
    xattn_score_i2t,
    xattn_score_t2i,
)
from tests import reference

SCORE = {"t2i": xattn_score_t2i, "i2t": xattn_score_i2t}
VARIANTS = list(itertools.product(SCORE, RAW_FEATURE_NORM, AGG_FUNC))


def make(
    n_images=3, n_captions=4, regions=5, words=6, dim=8, seed=0, dtype=torch.float64, unit=True
):
    """Random regions and words; padding is filled with large numbers that no score may read."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(n_images, regions, dim, generator=g, dtype=dtype)
    captions = torch.randn(n_captions, words, dim, generator=g, dtype=dtype)
    if unit:
        images, captions = l2norm(images, -1), l2norm(captions, -1)
    lengths = torch.randint(2, words + 1, (n_captions,), generator=g)
    for caption, length in zip(captions, lengths, strict=True):
        caption[length:] = 1e3
    return images, captions, lengths


@pytest.mark.parametrize(("direction", "norm", "agg"), VARIANTS)
@pytest.mark.parametrize("unit", [True, False])
def test_score_equals_plain_loop(direction, norm, agg, unit):
    images, captions, lengths = make(unit=unit)
    got = SCORE[direction](images, captions, lengths, norm, agg, 4.0, 5.0)
    want = reference.xattn_score(direction, images, captions, lengths, norm, agg, 4.0, 5.0)
    assert got.shape == (3, 4)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    loop = reference.caption_loop(direction, images, captions, lengths, norm, agg, 4.0, 5.0)
    torch.testing.assert_close(loop, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("direction", "norm", "agg"), VARIANTS)
@pytest.mark.parametrize("size", [5, 24])
@pytest.mark.parametrize("max_violation", [True, False])
def test_gradient_equals_plain_loop(direction, norm, agg, size, max_violation):
    """24 pairs with hardest negatives use the sparse backward pass, the other cases use blocks."""
    images, captions, lengths = make(size, size)
    loop = reference.xattn_score if size == 5 else reference.caption_loop
    grads = []
    for score in (SCORE[direction], lambda *a: loop(direction, *a)):
        leaves = [x.clone().requires_grad_() for x in (images, captions)]
        scores = score(*leaves, lengths, norm, agg, 4.0, 5.0)
        ContrastiveLoss(0.2, max_violation)(scores).backward()
        grads.append([leaf.grad for leaf in leaves])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(("direction", "norm", "agg"), VARIANTS)
@pytest.mark.parametrize("size", [1, 30])
def test_sharp_attention_does_not_overflow(direction, norm, agg, size):
    """The temperatures and dots are large, and one word is opposed to every region."""
    images, captions, lengths = make(4, 5)
    captions[1, 0] = -l2norm(images.sum((0, 1)), -1)
    lengths[1] = 1
    images = images * size
    for scale in (20.0, 90.0):
        parts = direction, images, captions, lengths, norm, agg, scale, 100.0
        got = SCORE[direction](*parts[1:])
        torch.testing.assert_close(got, reference.caption_loop(*parts), rtol=1e-6, atol=1e-6)
        single = SCORE[direction](images.float(), captions.float(), *parts[3:])
        assert torch.isfinite(single).all()


@pytest.mark.parametrize("direction", SCORE)
@pytest.mark.parametrize("max_violation", [True, False])
def test_sparse_backward_visits_few_pairs(direction, max_violation, monkeypatch):
    """With hardest negatives the graph has at most 3 B pairs, otherwise all pairs, in blocks."""
    images, captions, lengths = make(16, 16)
    images.requires_grad_()
    seen = []
    for layout in ("pairs", "block"):
        score = getattr(CrossAttention, layout)

        def counted(*args, score=score):
            scores = score(*args)
            seen.append(scores.numel())
            return scores

        monkeypatch.setattr(CrossAttention, layout, counted)
    monkeypatch.setattr(pairs, "block_size", lambda device: 500)
    scores = SCORE[direction](images, captions, lengths)
    ContrastiveLoss(5.0, max_violation)(scores).backward()
    assert len(seen) > 4
    assert 0 < sum(seen) <= 3 * 16 if max_violation else sum(seen) == 16 * 16


@pytest.mark.parametrize("direction", SCORE)
@pytest.mark.parametrize("max_violation", [True, False])
@pytest.mark.parametrize("block", [1, 40, 300, 10**9])
def test_block_size_does_not_matter(direction, max_violation, block, monkeypatch):
    images, captions, lengths = make(7, 7)
    results = []
    for size in (2**22, block):
        for module in (attention, pairs):
            monkeypatch.setattr(module, "block_size", lambda device, size=size: size)
        leaves = [x.clone().requires_grad_() for x in (images, captions)]
        scores = SCORE[direction](*leaves, lengths)
        ContrastiveLoss(0.2, max_violation)(scores).backward()
        results.append([scores, *(leaf.grad for leaf in leaves)])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_sparse_backward_serves_a_score_with_weights():
    """It serves any score: this one has a weight, integers per word, and two tensors per image."""

    class Score(pairs.PairScore):
        def block(self, images, captions, weight):
            rows = captions["words"].sum(1) @ weight  # (n, D)
            rows = (rows + captions["bias"].sum(1)[:, None]).tanh()  # (n, D)
            products = (images["regions"] * images["other"]).sum(1)  # (i, D)
            return rows @ products.mT  # (n, i)

        def pairs(self, images, captions, weight):
            return self.block(images, captions, weight).diagonal()  # (p,)

    def every(images, captions, lengths, weight):
        parts = []
        for k, length in enumerate(lengths):
            caption = {name: x[k : k + 1, :length] for name, x in captions.items()}
            parts.append(Score().block(images, caption, weight))
        return torch.cat(parts).mT

    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(6, 2, 3, generator=g, dtype=torch.float64) for _ in range(2))
    words = torch.randn(6, 4, 3, generator=g, dtype=torch.float64)
    bias = torch.randint(3, (6, 4), generator=g)
    weight = torch.randn(3, 3, generator=g, dtype=torch.float64)
    lengths = torch.tensor([4, 2, 2, 3, 4, 1])
    for max_violation in (True, False):
        results = []
        for sparse in (True, False):
            leaves = [x.detach().clone().requires_grad_() for x in (a, b, words, weight)]
            weight = leaves[3]
            images = {"regions": leaves[0], "other": leaves[1]}
            captions = {"words": leaves[2], "bias": bias}
            if sparse:
                scores = pairs.pair_scores(Score(), images, captions, lengths, (weight,))
            else:
                scores = every(images, captions, lengths, weight)
            ContrastiveLoss(0.5, max_violation)(scores).backward()
            results.append([scores.detach(), *(leaf.grad for leaf in leaves)])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("direction", SCORE)
def test_padding_and_order_do_not_matter(direction):
    images, captions, lengths = make(4, 7)
    score = SCORE[direction]
    want = score(images, captions, lengths)
    longer = torch.cat([captions, torch.full((7, 3, 8), 7.0, dtype=captions.dtype)], 1)
    torch.testing.assert_close(score(images, longer, lengths), want)
    order = torch.randperm(7)
    torch.testing.assert_close(score(images, captions[order], lengths[order]), want[:, order])
    torch.testing.assert_close(score(images.flip(0), captions, lengths.tolist()), want.flip(0))
    shuffled = images[:, torch.randperm(5)]
    torch.testing.assert_close(score(shuffled, captions, lengths), want)


@pytest.mark.parametrize(("direction", "norm", "agg"), VARIANTS)
def test_float32_is_close_to_float64(direction, norm, agg):
    images, captions, lengths = make(6, 6, regions=36, words=15, dim=64)
    want = SCORE[direction](images, captions, lengths, norm, agg)
    got = SCORE[direction](images.float(), captions.float(), lengths, norm, agg)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("direction", "norm", "agg"), VARIANTS)
def test_degenerate_vectors_have_finite_scores_and_gradients(direction, norm, agg):
    """Regions and words are zero, or regions are opposite, so that attended vectors vanish."""
    images, captions, lengths = make(3, 3, dtype=torch.float32)
    images[0] = 0
    images[1, 1:] = 0
    images[2, 0], images[2, 1:] = captions[0, 0], -captions[0, 0] / 4
    captions[1] = 0
    lengths[:] = torch.tensor([6, 2, 1])
    captions[0] = l2norm(torch.randn(6, 8), -1)
    images.requires_grad_(), captions.requires_grad_()
    scores = SCORE[direction](images, captions, lengths, norm, agg)
    assert torch.isfinite(scores).all()
    scores.sum().backward()
    assert torch.isfinite(images.grad).all() and torch.isfinite(captions.grad).all()


@pytest.mark.parametrize(("direction", "norm", "agg"), VARIANTS)
@pytest.mark.parametrize(("scale", "bound"), [(4.0, 1e4), (20.0, 1e8)])
def test_empty_rows_do_not_outweigh_the_others(direction, norm, agg, scale, bound):
    """The gradients of zero regions, words and images that are not normalised stay bounded.

    If all rows except an empty one get attention e^-20, the gradient of the empty row is large.
    """
    images, captions, lengths = make(8, 8, dtype=torch.float32)
    images[0] = 0
    images[3, 2:] = 0
    captions[5, 1] = 0
    lengths[5] = 4
    images.requires_grad_(), captions.requires_grad_()
    SCORE[direction](images, captions, lengths, norm, agg, scale).sum().backward()
    assert images.grad.norm() < bound and captions.grad.norm() < bound


@pytest.mark.parametrize(("direction", "norm", "agg"), VARIANTS)
def test_nearly_vanishing_attended_vectors(direction, norm, agg):
    """Opposite rows cancel: cosines stay in [-1, 1], gradients stay small, digits stay right."""
    g = torch.Generator().manual_seed(1)
    v = torch.randn(2, 9, 64, generator=g, dtype=torch.float64)
    w = torch.randn(2, 4, 64, generator=g, dtype=torch.float64)
    for noise, tolerance in ((1e-4, None), (0.3, 1e-4)):
        images = l2norm(torch.cat([v, -v + noise * torch.randn(v.shape, generator=g)], 1), -1)
        captions = l2norm(torch.cat([w, -w + noise * torch.randn(w.shape, generator=g)], 1), -1)
        leaves = images.float().requires_grad_(), captions.float().requires_grad_()
        scores = SCORE[direction](*leaves, [8, 8], norm, agg, 0.01, 6.0)
        rows = 8 if direction == "t2i" else 18
        bound = {"Sum": rows, "LogSumExp": 1 + math.log(rows) / 6}.get(agg, 1)
        assert scores.abs().max() <= bound * 1.0001
        scores.sum().backward()
        assert all(leaf.grad.abs().max() < 1e6 for leaf in leaves)
        if tolerance:
            want = reference.xattn_score(direction, images, captions, [8, 8], norm, agg, 0.01, 6.0)
            torch.testing.assert_close(scores.double(), want, rtol=0, atol=tolerance * bound)


def test_unknown_variants_are_named():
    images, captions, lengths = make()
    with pytest.raises(ValueError, match="raw_feature_norm 'l3norm': expected one of softmax"):
        xattn_score_t2i(images, captions, lengths, "l3norm")
    with pytest.raises(ValueError, match="agg_func 'mean': expected one of LogSumExp"):
        xattn_score_t2i(images, captions, lengths, "l2norm", "mean")
    with pytest.raises(ValueError, match="cross_attn 'both': expected one of t2i, i2t"):
        SCAN(10, cross_attn="both")
    with pytest.raises(ValueError, match="precomp_enc_type 'fancy'"):
        SCAN(10, precomp_enc_type="fancy")


def test_norms():
    x = torch.tensor([[3.0, -4.0], [0.0, 0.0]], requires_grad=True)
    assert l2norm(x, 1).tolist() == [[pytest.approx(0.6), pytest.approx(-0.8)], [0, 0]]
    assert l1norm(x, 1).tolist() == [[pytest.approx(3 / 7), pytest.approx(-4 / 7)], [0, 0]]
    l2norm(x, 1).sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad[1].abs().max() == 0


@pytest.mark.parametrize("max_violation", [True, False])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_loss_equals_plain_loop(max_violation, size):
    scores = torch.randn(size, size, dtype=torch.float64, requires_grad=True)
    loss = ContrastiveLoss(0.2, max_violation)(scores)
    want = reference.hinge(scores, 0.2, max_violation)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(
        torch.autograd.grad(loss, scores)[0],
        torch.autograd.grad(want, scores)[0] if size > 1 else torch.zeros(1, 1).double(),
    )


def test_loss_counts_each_direction_once():
    scores = torch.tensor([[1.0, 0.9], [0.0, 1.0]])  # too near in both directions
    assert ContrastiveLoss(0.2, True)(scores).item() == pytest.approx(0.1 + 0.1)
    scores = torch.tensor([[1.0, 0.9], [0.0, 2.0]])  # too near for image 0 only
    assert ContrastiveLoss(0.2, True)(scores).item() == pytest.approx(0.1)


@pytest.mark.parametrize("max_violation", [True, False])
def test_captions_of_one_image_need_not_be_negatives(max_violation):
    scores = torch.eye(4, dtype=torch.float64)
    scores[0, 2] = scores[2, 0] = 0.95
    scores[0, 1] = scores[3, 2] = 0.9
    image_index = torch.tensor([7, 3, 7, 5])
    loss = ContrastiveLoss(0.2, max_violation)
    apart = scores.clone()
    apart[0, 2] = apart[2, 0] = -100  # never a violation
    torch.testing.assert_close(loss(scores, image_index), loss(apart))
    assert loss(scores) != loss(scores, image_index)
    torch.testing.assert_close(loss(scores, torch.arange(4)), loss(scores))


def test_tied_negatives_share_no_gradient():
    """Only one of the tied hardest negatives gets the gradient, as in the published code."""
    scores = torch.tensor([[0.0, 0.5, 0.5], [-9, 0, -9], [-9, -9, 0.0]], requires_grad=True)
    ContrastiveLoss(0.2, True)(scores).backward()
    assert sorted(scores.grad[0, 1:].tolist()) in ([1.0, 2.0],)


def test_one_image_batch_trains():
    net = SCAN(20, img_dim=6, word_dim=4, embed_size=8)
    batch = {
        "images": torch.randn(1, 5, 6),
        "captions": torch.tensor([[1, 5, 2]]),
        "lengths": torch.tensor([3]),
    }
    scores = net.similarity(net.encode_images(batch), net.encode_captions(batch))
    assert scores.shape == (1, 1)
    loss = ContrastiveLoss(0.2, True)(scores)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in net.parameters())
