"""PFAN's scores against sums written out, its options, its checkpoints and its training."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import attention
import checkpoint as ckpt
import evaluation
import options
import pairs
import train
from model import AGG_FUNC, ContrastiveLoss, EncoderText
from pfan import PFAN, PFANWhole
from tests import reference
from tests.conftest import read_log, train_args

KINDS = {
    "attention": (PFAN, {}),
    "only": (PFAN, {"position": "only"}),
    "whole": (PFANWhole, {"lambda_whole": 2.0}),
    "box_whole": (PFANWhole, {"lambda_whole": 2.0, "need_box_whole": True}),
}
BONUS = {("attention", "i2t"): 0.0, ("only", "i2t"): 0.0}  # all others: one half


def make(kind="attention", n=5, **more):
    """A model in float64 with 3 x 3 blocks, and a batch of n pairs."""
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    make_model, own = KINDS[kind]
    more = {"img_dim": 6, "word_dim": 5, "embed_size": 8, "bi_gru": True} | own | more
    net = make_model(20, split_size=3, position_embed_size=4, **more).double()
    lengths = torch.randint(3, 8, (n,), generator=g)
    captions = torch.randint(1, 20, (n, int(lengths.max())), generator=g)
    captions[torch.arange(captions.size(1)) >= lengths[:, None]] = 0
    regions = 4 if kind == "box_whole" else 5
    blocks = torch.rand(n, regions, 10, generator=g).argsort(2)[..., :4]  # no block twice
    blocks[0, 0], blocks[1, 1, 2:] = 9, 9  # no block
    overlap = torch.rand(n, regions, 4, generator=g, dtype=torch.float64)
    overlap = overlap.masked_fill(blocks == 9, 0)
    batch = {"captions": captions, "lengths": lengths, "blocks": blocks}
    batch |= {
        "images": torch.randn(n, 5, 6, generator=g, dtype=torch.float64),
        "overlap": overlap / overlap.sum(2, keepdim=True).clamp_min(1e-9),
        "whole": torch.randn(n, 6, generator=g, dtype=torch.float64),
    }
    return net, batch


def encode(net, batch):
    """Both encodings in float64, because the encoders end in float32."""
    return [
        {name: x if name == "lengths" else x.double() for name, x in part.items()}
        for part in net(batch)
    ]


def loop(net, kind, direction, images, captions):
    """The scores of all pairs, from the encodings."""
    config, regions = net.config, images["regions"]
    box = None
    if kind == "box_whole" and direction == "t2i":
        regions, box = regions[:, :-1], regions[:, -1]
    scores = reference.xattn_score(
        direction,
        regions,
        captions["words"],
        captions["lengths"].tolist(),
        config.raw_feature_norm,
        config.agg_func,
        config.lambda_softmax,
        config.lambda_lse,
        bonus=BONUS.get((kind, direction), 0.5),
    )
    if isinstance(net, PFANWhole):
        sentence = captions["sentence"][None]
        scores = scores + 2.0 * F.cosine_similarity(images["whole"][:, None], sentence, dim=2)
        if box is not None:
            scores = scores + 0.5 * F.cosine_similarity(box[:, None], sentence, dim=2)
    return scores


@pytest.mark.parametrize("direction", ["t2i", "i2t"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("agg", AGG_FUNC)
def test_scores_and_gradients_are_those_of_sums_written_out(kind, direction, agg):
    net, batch = make(kind, cross_attn=direction, agg_func=agg)
    few = torch.zeros(5, 5, dtype=torch.float64)
    few[1, 2], few[1, 3], few[0, 3] = 1.0, -2.0, 0.5
    for weight in (few, torch.randn(5, 5, dtype=torch.float64)):  # pair by pair, then in blocks
        results = []
        for score in (net.similarity, lambda *x: loop(net, kind, direction, *x)):
            net.zero_grad()
            scores = score(*encode(net, batch))
            (scores * weight).sum().backward()
            results.append((scores.detach(), {n: p.grad for n, p in net.named_parameters()}))
        (got, got_grads), (want, want_grads) = results
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        assert all(g is not None and g.any() for g in got_grads.values())
        for name, grad in got_grads.items():
            torch.testing.assert_close(grad, want_grads[name], rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("own", ["t2i", "i2t"])
def test_a_model_scores_in_the_other_direction_too(kind, own):
    net, batch = make(kind, cross_attn=own)
    with torch.no_grad():
        encoded = encode(net, batch)
        for direction in ("t2i", "i2t"):
            torch.testing.assert_close(
                net.similarity(*encoded, direction), loop(net, kind, direction, *encoded)
            )
        torch.testing.assert_close(net.similarity(*encoded), net.similarity(*encoded, own))


@pytest.mark.parametrize("kind", ["attention", "only"])
def test_positions_are_means_of_blocks(kind):
    net, batch = make(kind)
    batch["blocks"][2, 2] = torch.tensor([3, 3, 1, 9])  # one block twice
    got = net.img_enc.positions(batch["images"], batch["blocks"], batch["overlap"])
    wanted = zip(batch["images"], batch["blocks"], batch["overlap"], strict=True)
    want = torch.stack([reference.positions(net.img_enc, *image) for image in wanted])
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    (got_grad,) = torch.autograd.grad(got.square().sum(), net.img_enc.position_embedding.weight)
    (want_grad,) = torch.autograd.grad(want.square().sum(), net.img_enc.position_embedding.weight)
    torch.testing.assert_close(got_grad, want_grad, rtol=1e-5, atol=1e-6)


def test_the_box_of_a_whole_image_is_the_mean_of_all_blocks():
    net, batch = make("box_whole")
    got = net.img_enc.positions(batch["images"], batch["blocks"], batch["overlap"])
    assert got.shape == (5, 5, 4)
    mean = net.img_enc.position_embedding.weight.mean(0)
    torch.testing.assert_close(got[:, -1], mean.expand(5, -1))
    want = torch.einsum(
        "irk,irkp->irp", batch["overlap"], net.img_enc.position_embedding.weight[batch["blocks"]]
    )
    torch.testing.assert_close(got[:, :-1], want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_block_size_order_and_padding_do_not_matter(kind, direction, monkeypatch):
    net, batch = make(kind, n=7, cross_attn=direction)
    with torch.no_grad():
        images, captions = encode(net, batch)
        want = net.similarity(images, captions)
        for size in (1, 3000, 10**9):
            for module in (pairs, attention):
                monkeypatch.setattr(module, "block_size", lambda device, size=size: size)
            torch.testing.assert_close(net.similarity(images, captions), want)
        back = torch.arange(6, -1, -1)
        flipped = {name: x[back] for name, x in captions.items()}
        torch.testing.assert_close(net.similarity(images, flipped), want[:, back])
        for k, length in enumerate(batch["lengths"].tolist()):  # each caption without padding
            alone = {name: x[k : k + 1] for name, x in batch.items()}
            alone["captions"] = alone["captions"][:, :length]
            _, caption = encode(net, alone)
            torch.testing.assert_close(
                net.similarity(images, caption), want[:, k : k + 1], rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("no_imgnorm", [False, True])
def test_empty_regions_and_images_have_finite_gradients(kind, no_imgnorm):
    net, batch = make(kind, no_imgnorm=no_imgnorm)
    with torch.no_grad():
        net.img_enc.position_embedding.weight.zero_()
    batch["images"][0] = batch["whole"][0] = batch["images"][1, 2] = 0
    scores = net.similarity(*encode(net, batch))
    ContrastiveLoss(0.2)(scores).backward()
    for name, p in net.named_parameters():
        assert p.grad.isfinite().all() and p.grad.abs().max() < 1e4, name


@pytest.mark.parametrize("kind", KINDS)
def test_one_pair_alone(kind):
    net, batch = make(kind, n=5)
    one = {name: x[:1] for name, x in batch.items()}
    assert net.similarity(*net(one)).shape == (1, 1)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bi_gru", [False, True])
def test_the_sentence_is_the_last_layers_final_state(layers, bi_gru):
    torch.manual_seed(0)
    net = EncoderText(20, 5, 8, layers, bi_gru, no_txtnorm=True)
    captions, lengths = torch.randint(20, (4, 6)), torch.tensor([3, 6, 1, 4])
    words, sentence = net.words_and_sentence(captions, lengths)
    for caption, length, got, all_words in zip(captions, lengths, sentence, words, strict=True):
        out, _ = net.rnn(net.embed(caption[None, :length]))
        out = out[0]  # (W, D) or (W, 2 D)
        want = (out[-1, :8] + out[0, 8:]) / 2 if bi_gru else out[-1]
        torch.testing.assert_close(got, want)
        assert all_words[length:].abs().sum() == 0
    torch.testing.assert_close(net(captions, lengths), words)
    net.no_txtnorm = False
    normed, again = net.words_and_sentence(captions, lengths)
    torch.testing.assert_close(normed, F.normalize(words, dim=2))
    torch.testing.assert_close(again, sentence)


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--model", "scan", "--position", "only"], "--position is for --model pfan, not scan"),
        (["--model", "pfan", "--lambda_whole", "2"], "--lambda_whole is for --model pfan_whole,"),
        (["--model", "gsmn", "--split_size", "8"], "--split_size is for --model pfan | pfan_whole"),
        (["--model", "pfan_whole", "--is_sparse"], "--is_sparse is for --model gsmn"),
        (["--model", "gsmn", "--agg_func", "Mean"], "is for --model scan | pfan | pfan_whole, not"),
    ],
)
def test_options_of_another_system_are_refused(flags, what, capsys):
    with pytest.raises(SystemExit):
        options.parse(flags)
    assert what in capsys.readouterr().err


def test_published_defaults():
    assert options.defaults("pfan_whole")["embed_size"] == 512
    assert options.defaults("pfan")["embed_size"] == 1024
    with pytest.raises(ValueError, match="--position 'all': expected one of attention, only"):
        ckpt.build_model(options.parse(["--model", "pfan", "--position", "all"]), 20)


@pytest.mark.parametrize("kind", KINDS)
def test_options_missing_from_a_checkpoint_come_from_its_weights(kind, tmp_path):
    net, _ = make(kind, precomp_enc_type="weight_norm", num_layers=2)
    system = "pfan" if isinstance(net, PFAN) else "pfan_whole"
    path = str(tmp_path / "x.pth.tar")
    opt = ckpt.argparse.Namespace()  # a published checkpoint without any option
    torch.save(
        {
            "model": ckpt.state_dicts(net, ckpt.argparse.Namespace(model=system)),
            "opt": opt,
            "epoch": 7,
        },
        path,
    )
    state = ckpt.load(path)
    got = vars(state["opt"])
    assert got["model"] == system and state["epoch"] == 6  # published: the number of epochs
    assert (got["split_size"], got["position_embed_size"], got["img_dim"]) == (3, 4, 6)
    assert got["precomp_enc_type"] == "weight_norm" and got["num_layers"] == 2
    if system == "pfan":
        assert got["position"] == kind
    again = ckpt.build_model(state["opt"], 20)
    ckpt.load_weights(again, state, path)
    assert again.config.bonus == net.config.bonus


ROUTES = [
    {"model": "pfan"},
    {"model": "pfan", "position": "only", "cross_attn": "i2t"},
    {"model": "pfan_whole", "lambda_whole": 2},
    {"model": "pfan_whole", "need_box_whole": True, "cross_attn": "i2t"},
]


@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_training_resumes_exactly_and_evaluates(tiny_positions, route):
    train.main(train_args(num_epochs=3, **route))
    unbroken = read_log("run")
    train.main(train_args(num_epochs=2, model_name="two", logger_name="two", **route))
    resumed = train_args(num_epochs=3, model_name="two", logger_name="two", **route)
    train.main([*resumed, "--resume", "two/checkpoint_1.pth.tar"])
    again = read_log("two")
    assert len(unbroken) == 3
    for line, other in zip(unbroken, again, strict=True):
        assert (line["Le"], line["rsum"]) == (other["Le"], other["rsum"])
    one, two = (torch.load(f"{d}/checkpoint_2.pth.tar", weights_only=False) for d in ("run", "two"))
    for a, b in zip(one["model"], two["model"], strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert one["opt"].model == route["model"]
    metrics = evaluation.evalrank("run/model_best.pth.tar", split="dev", save_path="s.npy")
    assert metrics["rsum"] == pytest.approx(max(line["rsum"] for line in unbroken))
    assert np.load("s.npy").shape == (10, 50)
