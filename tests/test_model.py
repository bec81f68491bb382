"""Scores, loss and encoders against plain loops, and what must not change them."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import model
import pairs
from model import (
    AGG_FUNC,
    RAW_FEATURE_NORM,
    SCAN,
    ContrastiveLoss,
    EncoderImage,
    EncoderText,
    l1norm,
    l2norm,
    packed_gru,
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
    """24 pairs with hardest negatives go through the sparse backward, the rest through blocks."""
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
    """Large temperatures, large dots, and a word that is opposed to every region."""
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
    """With hardest negatives the graph is built for at most 3 B pairs, else for all, in blocks."""
    images, captions, lengths = make(16, 16)
    images.requires_grad_()
    seen = []
    some = model.score_some

    def counted(*args, how):
        scores = some(*args, how=how)
        seen.append(scores.numel())
        return scores

    monkeypatch.setattr(model, "score_some", counted)
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
        for module in (model, pairs):
            monkeypatch.setattr(module, "block_size", lambda device, size=size: size)
        leaves = [x.clone().requires_grad_() for x in (images, captions)]
        scores = SCORE[direction](*leaves, lengths)
        ContrastiveLoss(0.2, max_violation)(scores).backward()
        results.append([scores, *(leaf.grad for leaf in leaves)])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_sparse_backward_serves_a_score_with_weights():
    """Any score: here with a weight of its own, integers beside the words, and two an image."""

    def some(images, captions, paired, weight):
        (a, b), (words, bias) = images, captions
        rows = (words.sum(1) @ weight + bias.sum(1)[:, None]).tanh()  # (n, D)
        scores = (rows[:, None] * (a * b)[None]).sum(2)  # (n, i)
        return scores.diagonal() if paired else scores

    def every(images, captions, lengths, weight):
        parts = []
        for words, bias, length in zip(*captions, lengths, strict=True):
            some_captions = words[None, :length], bias[None, :length]
            parts.append(some(images, some_captions, False, weight))
        return torch.cat(parts).mT

    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(6, 3, generator=g, dtype=torch.float64) for _ in range(2))
    words = torch.randn(6, 4, 3, generator=g, dtype=torch.float64)
    bias = torch.randint(3, (6, 4), generator=g)
    weight = torch.randn(3, 3, generator=g, dtype=torch.float64)
    lengths = torch.tensor([4, 2, 2, 3, 4, 1])
    for max_violation in (True, False):
        results = []
        for sparse in (True, False):
            leaves = [x.detach().clone().requires_grad_() for x in (a, b, words, weight)]
            weight = leaves[3]
            images, captions = tuple(leaves[:2]), (leaves[2], bias)
            if sparse:
                scores = pairs.pair_scores(every, some, images, captions, lengths, (weight,))
            else:
                scores = every(images, captions, lengths, weight)
            ContrastiveLoss(0.5, max_violation)(scores).backward()
            results.append([scores.detach(), *(leaf.grad for leaf in leaves)])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("direction", SCORE)
def test_compiled_scores_are_the_same(direction, monkeypatch):
    """The compiler traces what --compile hands to it; its back end needs a C++ compiler."""
    images, captions, lengths = make(7, 7)
    results = []
    for compiled in (False, True):
        if compiled:
            monkeypatch.setattr(model, "attend", model.attend)  # to be restored
            monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
            model.compile_scores()
        leaves = [x.clone().requires_grad_() for x in (images, captions)]
        scores = SCORE[direction](*leaves, lengths)
        ContrastiveLoss(0.2, True)(scores).backward()
        results.append([scores, *(leaf.grad for leaf in leaves)])
    for want, got in zip(*results, strict=True):
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
    """All-zero regions and words, opposite regions whose attended vector vanishes, one word."""
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
    """Zero regions, words and images, not normalised: their gradient does not stop training.

    Attention e^-20 to all but an empty row makes that row's own gradient large in truth.
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
    """Opposite rows cancel: cosines stay in [-1, 1], gradients sane, digits as far as they go."""
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
    scores = torch.tensor([[1.0, 0.9], [0.0, 1.0]])  # one caption too near an image, and back
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
    """Of tied hardest negatives one carries the gradient, as in the published code."""
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


def test_zero_region_trains():
    """A region of zeros with a zero bias must not poison the step."""
    encoder = EncoderImage(6, 8)
    images = torch.randn(2, 3, 6)
    images[0, 0] = 0
    regions = encoder(images)
    assert regions[0, 0].abs().max() == 0
    regions[0, 1:].sum().backward()
    reach = encoder.fc.bias.grad.norm()
    encoder.zero_grad()
    encoder(images)[0].sum().backward()
    torch.testing.assert_close(encoder.fc.bias.grad.norm(), reach)


@pytest.mark.parametrize("bi_gru", [True, False])
@pytest.mark.parametrize("layers", [1, 2])
def test_text_encoder_ignores_padding_and_batch(bi_gru, layers):
    encoder = EncoderText(30, 4, 8, layers, bi_gru)
    captions = torch.randint(4, 30, (3, 7))
    lengths = torch.tensor([4, 7, 2])
    words = encoder(captions, lengths)
    assert words.shape == (3, 7, 8)
    for caption, length, got in zip(captions, lengths, words, strict=True):
        alone = encoder(caption[None, :length], length[None])[0]
        torch.testing.assert_close(got[:length], alone)
        assert (got[length:] == 0).all()
    torch.testing.assert_close(words[0, :4].norm(dim=1), torch.ones(4))
    ahead = encoder.rnn(encoder.embed(captions[1:2]))[0]
    if bi_gru:
        ahead = (ahead[..., :8] + ahead[..., 8:]) / 2
    torch.testing.assert_close(words[1:2], l2norm(ahead, -1))


@pytest.mark.parametrize("bi_gru", [True, False])
@pytest.mark.parametrize("layers", [1, 3])
def test_packed_gru_is_the_librarys(bi_gru, layers):
    rnn = torch.nn.GRU(4, 6, layers, batch_first=True, bidirectional=bi_gru).double()
    results = []
    for run in (lambda packed: rnn(packed)[0].data, partial(packed_gru, rnn)):
        x = torch.linspace(-1, 1, 5 * 7 * 4).sin().double().view(5, 7, 4).requires_grad_()
        out = run(pack_padded_sequence(x, torch.tensor([7, 5, 5, 2, 1]), batch_first=True))
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append([out, x.grad, *(p.grad for p in rnn.parameters())])
        rnn.zero_grad()
    for want, got in zip(*results, strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want)


def test_no_norm_flags():
    plain = SCAN(20, img_dim=6, word_dim=4, embed_size=8, no_imgnorm=True, no_txtnorm=True)
    batch = {"images": torch.randn(2, 3, 6), "captions": torch.ones(2, 3).long()}
    batch["lengths"] = torch.tensor([3, 2])
    regions = plain.encode_images(batch)["regions"]
    torch.testing.assert_close(regions, plain.img_enc.fc(batch["images"]))
    assert not torch.allclose(plain.encode_captions(batch)["words"][0].norm(dim=1), torch.ones(3))


def test_weight_norm_is_one_scalar_over_the_matrix():
    fc = EncoderImage(6, 8, "weight_norm").fc
    assert set(dict(fc.named_parameters())) == {"weight_g", "weight_v", "bias"}
    assert fc.weight_g.shape == ()
    x = torch.randn(3, 6)
    want = x @ (fc.weight_g * fc.weight_v / fc.weight_v.norm()).T + fc.bias
    torch.testing.assert_close(fc(x), want)
    with torch.no_grad():
        fc.weight_v *= 7
    torch.testing.assert_close(fc(x), want)


def test_initialisation():
    encoder = EncoderImage(300, 200)
    bound = (6 / 500) ** 0.5
    assert encoder.fc.bias.abs().max() == 0
    assert 0.95 * bound < encoder.fc.weight.abs().max() <= bound
    text = EncoderText(500, 40, 8)
    assert 0.099 < text.embed.weight.abs().max() <= 0.1


def test_float16_features_are_read():
    encoder = EncoderImage(6, 8)
    images = torch.randn(2, 3, 6).half()
    torch.testing.assert_close(encoder(images), encoder(images.float()))


def test_amp_keeps_scores_in_float32():
    net = SCAN(20, img_dim=16, word_dim=8, embed_size=32, bi_gru=True)
    batch = {
        "images": torch.randn(4, 5, 16),
        "captions": torch.randint(4, 20, (4, 6)),
        "lengths": torch.tensor([6, 5, 4, 3]),
    }
    with torch.autocast("cpu", torch.bfloat16):
        images, captions = net.encode_images(batch), net.encode_captions(batch)
    scores = net.similarity(images, captions)
    assert images["regions"].dtype == captions["words"].dtype == scores.dtype == torch.float32
    want = net.similarity(net.encode_images(batch), net.encode_captions(batch))
    torch.testing.assert_close(scores, want, rtol=0.05, atol=0.05)
    ContrastiveLoss(0.2)(scores).backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())
