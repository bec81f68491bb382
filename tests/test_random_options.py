"""Random options against plain loops in float64; scripts/fuzz_options.py is the long form.

After the draws, each fault that they found has a test of its own, at a size that people use.
"""

import pytest
import torch

import attention
import chan
import gsmn
from gsmn import GSMN, textual_edges
from model import SCAN, ContrastiveLoss, l2norm, xattn_score_i2t, xattn_score_t2i
from scripts import fuzz_options
from tests import random_options, reference
from tests.random_options import SYSTEMS, check, draw
from util.cli import InputError

# Seeds that found a fault, or that find it again when it is put back; see the tests below.
FOUND = {
    (35, "scan"): "gradients of dots without a bound",
    (154, "gsmn"): "a vanished node's value is left out of the gradient of later weights",
    (516, "gsmn"): "a strong word outside the neighbourhood",
    (130, "pfan_whole"): "faint attended vectors in the Gram form (PFAN)",
    (343, "scan"): "faint attended vectors in the Gram form (SCAN)",
}


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("first", range(0, 20, 5))
def test_scores_loss_and_gradients_are_those_of_plain_loops(system, first):
    for seed in range(first, first + 5):
        assert not check(draw(seed, system)), f"--seed {seed} --model {system}"


@pytest.mark.parametrize(("seed", "system"), FOUND)
def test_cases_that_found_a_fault(seed, system):
    assert not check(draw(seed, system))


def test_a_seed_is_a_case():
    for seed in range(20):
        one, other = draw(seed), draw(seed)
        assert str(one) == str(other)
        assert all(torch.equal(one.batch[name], x) for name, x in other.batch.items())
        weights, same = one.model.state_dict(), other.model.state_dict()
        assert all(torch.equal(x, same[name]) for name, x in weights.items())
    assert {draw(seed).system for seed in range(60)} == set(SYSTEMS)


def test_a_wrong_score_is_found(monkeypatch, capsys):
    """The comparison finds a cosine that is off by 1e-4, a missing gradient, and a NaN."""
    case, cosine = draw(1, "scan"), attention.cosine
    assert not check(case)
    for wrong in (
        lambda *args: cosine(*args) * (1 + 1e-4),
        lambda *args: cosine(*args).detach() + 0 * args[0],
        lambda *args: cosine(*args) * float("nan"),
    ):
        monkeypatch.setattr(attention, "cosine", wrong)
        assert check(case)
    monkeypatch.undo()

    def mistaken(case):
        return [random_options.Finding("scores", 1.0, 0.0, 1e-5)]

    monkeypatch.setattr(fuzz_options, "check", mistaken)
    with pytest.raises(SystemExit):
        fuzz_options.main("--n 2 --seed 3 --jobs 1 --model chan".split())
    out = capsys.readouterr().out
    assert "seed 3: chan" in out and "scores: 1.0e+00 from float64" in out
    assert "2 of 2 cases too far from float64 (chan 2 of 2)" in out
    for flags in ("--n 0", "--jobs 0", "--seed -1"):
        with pytest.raises(InputError, match=f"{flags}: expected at least"):
            fuzz_options.main(flags.split())


# The faults


@pytest.mark.parametrize("neighbours", [False, True])
def test_a_strong_word_outside_the_neighbourhood_takes_nothing_from_it(neighbours):
    """GSMN --is_sparse --no_txtnorm: a softmax over all words gave the neighbours 0."""
    g = torch.Generator().manual_seed(0)
    words = 1 + 0.1 * torch.randn(2, 6, 1024, generator=g)  # all in nearly the same direction
    words *= torch.tensor([0.02, 0.3, 1, 0.1, 2, 0.05])[:, None]
    words[1, 4:] = 0
    lengths = torch.tensor([6, 4])
    adjacency = torch.eye(6).repeat(2, 1, 1)
    adjacency[0, 0, 3] = adjacency[0, 3, 0] = 1
    adjacency[0, 1, 1] = 2  # a word that depends on itself
    adjacency[1, 4:] = adjacency[1, :, 4:] = 0
    got = textual_edges(words, lengths, adjacency, 20.0, neighbours)
    for k, length in enumerate(lengths.tolist()):
        for i in range(length):
            joined = [j for j in range(length) if adjacency[k, i, j]]
            dots = torch.stack([20 * words[k, i].double() @ words[k, j].double() for j in joined])
            e = dots.softmax(0)
            if neighbours:
                torch.testing.assert_close(
                    got[k, i, joined].double(), e / e.norm(), rtol=1e-4, atol=1e-6
                )
                rest = [j for j in range(6) if j not in joined]
                assert not got[k, i, rest].any()
            else:
                a = adjacency[k, i, joined].double()
                want = (e * a * a).sum() / (e * a).sum()
                assert got[k, i].item() == pytest.approx(want.item(), rel=1e-4)


@pytest.mark.parametrize("length", [0.5, 0.05, 0.015, 1.5e-3])
@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_faint_attended_vectors_keep_their_digits(direction, length):
    """Two keys are almost opposite: |c| is small, its Gram form a difference of large numbers."""
    g = torch.Generator().manual_seed(0)
    a, b, q = l2norm(torch.randn(3, 40, 64, generator=g, dtype=torch.float64), -1)
    keys = l2norm(torch.stack([a, -a + 2 * length * b], 1), -1)  # (40, 2, D)
    queries = q[:, None]  # (40, 1, D)
    images, captions = (keys, queries) if direction == "t2i" else (queries, keys)
    lengths = [captions.size(1)] * 40
    score = {"t2i": xattn_score_t2i, "i2t": xattn_score_i2t}[direction]
    options = "no_norm", "Mean", 1e-6, 6.0
    want = reference.xattn_score(direction, images[:3], captions, lengths, *options)
    got = score(images[:3].float(), captions.float(), lengths, *options)
    assert (got.double() - want).abs().max() < 3e-7 / length + 1e-6


def test_faint_blocks_of_gsmn_and_faint_means_of_chan():
    g = torch.Generator().manual_seed(0)
    a, b, q = torch.randn(3, 4, 64, generator=g, dtype=torch.float64)
    words = l2norm(torch.stack([a, -a + 0.01 * b], 1), -1)  # (4, 2, D)
    regions = l2norm(torch.stack([q, -q + 0.01 * a], 1), -1)  # (4, 2, D)
    with torch.no_grad():
        net = GSMN(20, 6, 5, 64, feat_dim=4, num_block=4, hid_dim=8, lambda_softmax=1e-3).double()
        boxes = torch.rand(4, 2, 4, generator=g, dtype=torch.float64)
        pairs = list(zip(regions, boxes, strict=True))
        want = [[reference.gsmn_pair(net, x, y, w, None) for w in words] for x, y in pairs]
        edges = net.visual_graph.graph_convolution_1(boxes, False).float()
        images = {"regions": regions.float(), "edges": edges}
        captions = {"words": words.float(), "lengths": torch.tensor([2] * 4)}
        got = net.float().similarity(images, captions)
        torch.testing.assert_close(got.double(), torch.tensor(want), rtol=0, atol=1e-4)

        net = chan.CHAN(20, 6, 5, 64, coding_type="VSACoding", pooling_type="SumPooling", alpha=1e3)
        parts = "VSACoding", "SumPooling", 1e3, 0.1
        want = [[reference.chan_pair(x, w, *parts) for w in words] for x in regions]
        got = net.similarity(images, captions)
        torch.testing.assert_close(got.double(), torch.tensor(want), rtol=0, atol=1e-4)


@pytest.mark.parametrize("norm", ["no_norm", "clipped", "softmax"])
@pytest.mark.parametrize("size", [10.0, 100.0])
def test_gradients_of_dots_without_a_bound(norm, size):
    """--no_imgnorm: exponentials that were not divided by their sum made errors of 1e-3."""
    torch.manual_seed(0)
    net = SCAN(20, 8, 8, 32, bi_gru=True, no_imgnorm=True, raw_feature_norm=norm)
    lengths = torch.tensor([3, 5, 2, 4])
    batch = {"images": size * torch.randn(4, 6, 8), "captions": torch.randint(20, (4, 5))}
    batch["lengths"] = lengths
    training = {"margin": 0.2, "max_violation": True, "infonce": None, "block_size": 2**22}
    training |= {"no_false_negatives": False, "grad_checkpointing": 0}
    case = random_options.Case("scan", {}, training, net, batch, None)
    got, plain = random_options.distances(case)
    for name, distance in got.items():
        assert distance <= max(10 * plain[name], 1e-5), name


def test_a_vanished_vector_keeps_its_value_where_a_graph_is_kept():
    """Its cosine passes no gradient; its value is the same with a graph and without one."""
    square = torch.tensor([1e-18, 1.0, 0.04], requires_grad=True)
    dot = torch.tensor([4e-10, 0.5, 0.1], requires_grad=True)
    length = torch.tensor([1.0, 1.0, 0.0])
    with torch.no_grad():
        want = attention.cosine(dot, square, length)
    torch.testing.assert_close(want, torch.tensor([0.04, 0.5, 0.1e8]))
    got = attention.cosine(dot, square, length)
    torch.testing.assert_close(got, want)
    got.sum().backward()
    torch.testing.assert_close(dot.grad, torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(square.grad, torch.tensor([0.0, -0.25, 0.0]))


def test_a_dropped_region_takes_no_attention():
    """GSMN: a word opposed to all regions attended to the zeros of a dropped region."""
    net = GSMN(20, 6, 5, 8, feat_dim=4, num_block=4, hid_dim=8, lambda_softmax=30.0)
    words = torch.full((1, 1, 8), -1.0)
    regions = torch.cat([torch.rand(1, 3, 8) + 0.1, torch.zeros(1, 1, 8)], 1)
    region_mask = torch.tensor([[True, True, True, False]])
    seen = []
    node_vectors = gsmn.word_nodes

    def record(*args):
        seen.append(node_vectors(*args))
        return seen[-1]

    captions = {"words": words, "lengths": torch.tensor([1])}
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(gsmn, "word_nodes", record)
        edges = torch.ones(1, 4, 8)
        net.similarity({"regions": regions, "edges": edges, "region_mask": region_mask}, captions)
        net.similarity({"regions": regions[:, :3], "edges": edges[:, :3]}, captions)
    torch.testing.assert_close(seen[0], seen[1])
    assert (seen[1] < -0.5).all()


def test_the_loss_of_one_case_is_the_hinge_of_its_scores():
    """run_fast measures the step of train.py: scores, then the loss of the batch."""
    case = draw(2, "scan")
    found = random_options.run_fast(case)
    net, training = case.model, case.training
    scores = net.similarity(*net(case.batch))
    criterion = ContrastiveLoss(training["margin"], training["max_violation"])
    if training["infonce"]:
        criterion = chan.InfoNCELoss(training["infonce"], training["margin"])
    loss = criterion(scores, random_options.image_index(case))
    torch.testing.assert_close(found["loss"], loss.detach().double())
