"""GSMN's scores and graphs against sums written out, and what must not change the scores."""

import itertools

import pytest
import torch

import gsmn
import pairs
from gsmn import GSMN
from model import ContrastiveLoss
from tests import reference

# With 36 regions and the usual blocks of 64 numbers, the block of a key is larger than its Gram
# matrix. Here there are 5 regions, with blocks of 8 (larger) or 2 numbers (smaller).
SIZES = {"gram": dict(embed_size=32, num_block=4), "direct": dict(embed_size=8, num_block=4)}
KINDS = list(itertools.product((False, True), (False, True)))  # is_sparse, neighbours


def make(size="gram", is_sparse=False, neighbours=False, n=4, seed=0, **more):
    """A model in float64, a batch of n pairs, and the dependencies of each caption."""
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net = GSMN(
        20,
        img_dim=6,
        word_dim=5,
        feat_dim=4,
        hid_dim=16,
        lambda_softmax=20.0,
        is_sparse=is_sparse,
        neighbours=neighbours,
        **SIZES[size],
        **more,
    ).double()
    lengths = torch.randint(3, 8, (n,), generator=g)
    corners = torch.rand(n, 5, 2, 2, generator=g, dtype=torch.float64).sort(2).values
    batch = {
        "images": torch.randn(n, 5, 6, generator=g, dtype=torch.float64),
        "boxes": corners.flatten(2),
        "lengths": lengths,
        "captions": torch.randint(20, (n, int(lengths.max())), generator=g),
        "adjacency": torch.zeros(n, int(lengths.max()), int(lengths.max()), dtype=torch.float64),
    }
    graphs = []
    for k, length in enumerate(lengths.tolist()):
        some = torch.randint(length, (length, 2), generator=g).tolist()
        some[-1] = [1, 1]  # a word that depends on itself
        graphs.append(some)
        for a, b in some[1:]:
            batch["adjacency"][k, a, b] = batch["adjacency"][k, b, a] = 1
        batch["adjacency"][k, :length, :length] += torch.eye(length)
    return net, batch, graphs


def encode(net, batch):
    """Both encodings in float64, because the encoders end in float32."""
    images, captions = net(batch)
    return [
        {name: x if name == "lengths" else x.double() for name, x in part.items()}
        for part in (images, captions)
    ]


def loop(net, batch, images, captions, graphs):
    scores = []
    for image, boxes in zip(images["regions"], batch["boxes"], strict=True):
        for words, length, some in zip(
            captions["words"], batch["lengths"].tolist(), graphs, strict=True
        ):
            some = some if net.is_sparse else None
            scores.append(reference.gsmn_pair(net, image, boxes, words[:length], some))
    return torch.stack(scores).view(len(images["regions"]), -1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("is_sparse", "neighbours"), KINDS)
def test_scores_and_gradients_are_those_of_sums_written_out(size, is_sparse, neighbours):
    net, batch, graphs = make(size, is_sparse, neighbours, out_dim=2)
    few = torch.zeros(4, 4, dtype=torch.float64)
    few[1, 2], few[1, 3], few[0, 3] = 1.0, -2.0, 0.5
    for weight in (few, torch.randn(4, 4, dtype=torch.float64)):  # pair by pair, then in blocks
        results = []
        for score in (
            net.similarity,
            lambda images, captions: loop(net, batch, images, captions, graphs),
        ):
            net.zero_grad()
            images, captions = encode(net, batch)
            scores = score(images, captions)
            (scores * weight).sum().backward()
            grads = {name: p.grad for name, p in net.named_parameters() if p.requires_grad}
            assert all(g is not None for g in grads.values())
            results.append((scores.detach(), grads))
        (got, got_grads), (want, want_grads) = results
        # Both share the float32 ends of the encoders; edges pass through float32 in encode().
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        for name in got_grads:
            torch.testing.assert_close(
                got_grads[name], want_grads[name], rtol=1e-4, atol=1e-6, msg=name
            )


@pytest.mark.parametrize(("is_sparse", "neighbours"), KINDS)
def test_block_size_order_and_padding_do_not_matter(is_sparse, neighbours, monkeypatch):
    net, batch, _ = make("gram", is_sparse, neighbours, n=7)
    with torch.no_grad():
        images, captions = encode(net, batch)
        want = net.similarity(images, captions)
        for size in (1, 3000, 10**9):
            monkeypatch.setattr(pairs, "block_size", lambda device, size=size: size)
            torch.testing.assert_close(net.similarity(images, captions), want)
        back = torch.arange(6, -1, -1)
        flipped = {name: x[back] for name, x in captions.items()}
        torch.testing.assert_close(net.similarity(images, flipped), want[:, back])
        for k, length in enumerate(batch["lengths"].tolist()):  # each caption without padding
            alone = {name: x[k : k + 1] for name, x in batch.items() if name != "adjacency"}
            alone["captions"] = alone["captions"][:, :length]
            alone["adjacency"] = batch["adjacency"][k : k + 1, :length, :length]
            _, caption = encode(net, alone)
            torch.testing.assert_close(
                net.similarity(images, caption), want[:, k : k + 1], rtol=1e-5, atol=1e-6
            )


def test_dense_and_sparse_agree_where_no_word_depends_on_itself():
    """Quirk 18: the published text graph sees only the node itself. With neighbours they differ."""
    for neighbours in (False, True):
        scores = []
        for is_sparse in (False, True):
            net, batch, _ = make("gram", is_sparse, neighbours)
            batch["adjacency"].clamp_(max=1)
            with torch.no_grad():
                scores.append(net.similarity(*encode(net, batch)))
        apart = (scores[0] - scores[1]).abs().max()
        assert apart > 1e-4 if neighbours else apart < 1e-6


def test_neighbours_are_seen_with_the_flag_only():
    """Without dependencies each word stands alone, which is all that the published graph sees."""
    for neighbours in (False, True):
        net, batch, _ = make("gram", True, neighbours)
        batch["adjacency"].clamp_(max=1)
        scores = []
        alone = torch.eye(len(batch["adjacency"][0])).expand(4, -1, -1)
        for adjacency in (batch["adjacency"], alone):
            with torch.no_grad():
                scores.append(net.similarity(*encode(net, batch | {"adjacency": adjacency})))
        assert torch.allclose(*scores, atol=1e-6) != neighbours


def test_params_cancel_and_have_no_gradient():
    net, batch, _ = make()
    with torch.no_grad():
        want = net.similarity(*encode(net, batch))
        net.textual_graph.graph_convolution_3.params.uniform_(-3, -1)
        torch.testing.assert_close(net.similarity(*encode(net, batch)), want)
    assert not net.textual_graph.graph_convolution_3.params.requires_grad
    assert "graph_convolution_3.params" in net.textual_graph.state_dict()


@pytest.mark.parametrize("neighbours", [False, True])
def test_narrow_kernels_and_empty_images_stay_finite(neighbours):
    """Quirks 20 and 21: here the published code divides 0 by 0, or takes the root of 0."""
    net, batch, _ = make("gram", True, neighbours)
    kernels = net.visual_graph.graph_convolution_1
    with torch.no_grad():
        kernels.precision_rho.fill_(1e-3)
        kernels.precision_theta.fill_(1e-3)
    batch["images"][0] = 0
    batch["boxes"][1] = 0
    net.img_enc.fc.bias.data.zero_()
    net.zero_grad()
    scores = net.similarity(
        *net.float()({n: x.float() if x.is_floating_point() else x for n, x in batch.items()})
    )
    assert torch.isfinite(scores).all()
    ContrastiveLoss(0.2)(scores).backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.requires_grad)


def test_caption_loop_of_the_benchmark_is_the_same_score():
    net, batch, _ = make()
    images, captions = encode(net, batch)
    got = reference.gsmn_caption_loop(net, images, captions, batch["boxes"])
    torch.testing.assert_close(got, net.similarity(images, captions), rtol=1e-5, atol=1e-6)


def test_kernels_are_those_of_the_design():
    """They have a test of their own, because they change a score very little."""
    net, batch, _ = make()
    kernels = net.visual_graph.graph_convolution_1
    w = [reference.log_gaussians(kernels, boxes) for boxes in batch["boxes"]]
    w = torch.stack(w).exp()  # (I, R, R, K)
    want = (w / w.sum(3, keepdim=True)).sum(2)  # (I, R, K)
    torch.testing.assert_close(kernels(batch["boxes"], False), want)
    want = (w / w.sum(2, keepdim=True)).permute(0, 3, 1, 2)  # (I, K, R, R)
    torch.testing.assert_close(kernels(batch["boxes"], True), want)
    assert gsmn.KERNELS == w.size(3)
