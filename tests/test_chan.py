"""CHAN's scores against sums written out, what must not change them, its data and its loss."""

import json
import shutil

import pytest
import torch

import checkpoint as ckpt
import evaluation
import options
import pairs
import systems
import train
from chan import CHAN, CODING, POOLING, InfoNCELoss
from data import Drop, collate_fn
from losses import ContrastiveLoss
from tests import reference
from tests.conftest import read_log, train_args
from vocab import deserialize_vocab

KINDS = ("basic", "selfattention", "transformer")


def make(n=5, **more):
    """A model in float64 and a batch of n pairs; some of the 5 regions of an image are missing."""
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = CHAN(20, img_dim=6, word_dim=5, embed_size=8, **more).double()
    lengths = torch.randint(3, 8, (n,), generator=g)
    captions = torch.randint(1, 20, (n, int(lengths.max())), generator=g)
    captions[torch.arange(captions.size(1)) >= lengths[:, None]] = 0
    images = torch.randn(n, 5, 6, generator=g, dtype=torch.float64)
    region_mask = torch.rand(n, 5, generator=g) < 0.7
    region_mask[:2] = torch.tensor([[True] * 5, [False, False, True, False, False]])[:n]
    images[~region_mask] = 0
    batch = {"captions": captions, "lengths": lengths, "images": images}
    return net, batch | {"region_mask": region_mask}


def encode(net, batch):
    """Both encodings in float64, because the encoders end in float32."""
    return [
        {name: x.double() if x.is_floating_point() else x for name, x in part.items()}
        for part in net(batch)
    ]


def loop(net, images, captions, region_mask):
    scores = []
    for image, some in zip(images["regions"], region_mask, strict=True):
        for words, length in zip(captions["words"], captions["lengths"].tolist(), strict=True):
            scores.append(reference.chan_pair(image[some], words[:length], *net.config))
    return torch.stack(scores).view(len(region_mask), -1)


@pytest.mark.parametrize("coding", CODING)
@pytest.mark.parametrize("pooling", POOLING)
@pytest.mark.parametrize("dropped", [False, True])
def test_scores_and_gradients_are_those_of_sums_written_out(coding, pooling, dropped):
    net, batch = make(coding_type=coding, pooling_type=pooling, alpha=0.2, belta=0.3)
    region_mask = batch["region_mask"]
    if not dropped:
        region_mask = torch.ones_like(region_mask)
        del batch["region_mask"]
    few = torch.zeros(5, 5, dtype=torch.float64)
    few[1, 2], few[1, 3], few[0, 3], few[3, 0] = 1.0, -2.0, 0.5, 1.0
    for weight in (few, torch.randn(5, 5, dtype=torch.float64)):  # pair by pair, then in blocks
        results = []
        for score in (net.similarity, lambda *x: loop(net, *x, region_mask)):
            net.zero_grad()
            scores = score(*encode(net, batch))
            (scores * weight).sum().backward()
            grads = {n: p.grad for n, p in net.named_parameters() if p.requires_grad}
            results.append((scores.detach(), grads))
        (got, got_grads), (want, want_grads) = results
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
        for name, grad in got_grads.items():
            torch.testing.assert_close(grad, want_grads[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("coding", CODING)
def test_block_size_order_and_padding_do_not_matter(coding, monkeypatch):
    net, batch = make(7, coding_type=coding, precomp_enc_type="selfattention")
    with torch.no_grad():
        images, captions = encode(net, batch)
        want = net.similarity(images, captions)
        for size in (1, 300, 10**9):
            monkeypatch.setattr(pairs, "block_size", lambda device, size=size: size)
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
@pytest.mark.parametrize("training", [False, True])
def test_an_image_does_not_see_the_others_of_its_batch(kind, training):
    net, batch = make(precomp_enc_type=kind)
    net.train(training)
    with torch.no_grad():
        regions = net.encode_images(batch)["regions"]
        for k in range(5):
            alone = net.encode_images({name: x[k : k + 1] for name, x in batch.items()})
            torch.testing.assert_close(alone["regions"], regions[k : k + 1], rtol=1e-5, atol=1e-6)
        moved = batch["images"][:, torch.tensor([4, 3, 2, 1, 0])]
        again = net.encode_images({"images": moved})["regions"]
        want = net.encode_images({"images": batch["images"]})["regions"]
        torch.testing.assert_close(again.flip(1), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["selfattention", "transformer"])
def test_encoders_written_out(kind):
    net, batch = make(precomp_enc_type=kind, no_imgnorm=True)
    encoder = net.img_enc
    got = net.encode_images({"images": batch["images"]})["regions"].double()
    x = encoder.fc(batch["images"])  # (I, R, D)
    part = encoder.feedforward
    y = (part.ln if kind == "selfattention" else part.ln_1)(x)
    q, k, v = (y @ part.attn.in_proj_weight.T + part.attn.in_proj_bias).chunk(3, 2)
    heads = [z.unflatten(2, (8, 1)).transpose(1, 2) for z in (q, k, v)]  # (I, 8, R, 1)
    a = torch.softmax(heads[0] @ heads[1].mT / 1.0, 3)  # (I, 8, R, R)
    x = x + part.attn.out_proj((a @ heads[2]).transpose(1, 2).flatten(2))
    if kind == "transformer":
        h = part.mlp.c_fc(part.ln_2(x))
        x = x + part.mlp.c_proj(h * torch.sigmoid(1.702 * h))
    torch.testing.assert_close(got, x, rtol=1e-5, atol=1e-5)


def test_dropped_regions_are_attended_to_unless_masked():
    net, batch = make(precomp_enc_type="selfattention")
    batch["region_mask"] = (torch.arange(5) < 3).expand(5, 5)
    kept = {"images": batch["images"][:, :3]}
    batch["images"][:, 3:] = 0
    got = net.encode_images(batch)["regions"][:, :3]
    alone = net.encode_images(kept)["regions"]
    assert not torch.allclose(got, alone, atol=1e-3)
    net.mask_dropped = True
    torch.testing.assert_close(net.encode_images(batch)["regions"][:, :3], alone)


@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_info_nce_is_that_of_a_plain_loop(margin):
    scores = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    got = InfoNCELoss(0.5, margin)(scores)
    want = reference.info_nce(scores, 0.5, margin)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(x, scores)[0] for x in (got, want)))
    assert InfoNCELoss(0.001, 0.2)(scores).isfinite()  # exp would overflow
    image = torch.tensor([0, 1, 1, 2, 3, 4])
    masked = InfoNCELoss(0.5, margin)(scores, image)
    far = scores.detach().clone()
    far[1, 2] = far[2, 1] = -1e9
    torch.testing.assert_close(masked, reference.info_nce(far, 0.5, margin))


def test_hardest_negatives_follow_the_warm_up_without_a_flag(tiny, monkeypatch):
    seen, forward = [], ContrastiveLoss.forward

    def record(self, scores, image_index):
        hardest = self.max_violation and self.epoch >= self.warmup_epochs
        seen.append((self.epoch, self.margin, hardest))
        return forward(self, scores, image_index)

    monkeypatch.setattr(ContrastiveLoss, "forward", record)
    args = train_args(model="chan", max_violation=None, num_epochs=3, vse_mean_warmup_epochs=2)
    train.main(args)
    assert sorted(set(seen)) == [(0, 0.05, False), (1, 0.05, False), (2, 0.05, True)]
    groups = ckpt.load("run/checkpoint_0.pth.tar")["run"]["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.01]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"drop": True, "precomp_enc_type": "selfattention"},
        {"drop": True, "coding_type": "THACoding", "pooling_type": "MeanPooling", "workers": 1},
        {"criterion": "InfoNCELoss", "temperature": 0.1, "coding_type": "VSACoding"},
        {"drop": True, "mask_dropped": True, "precomp_enc_type": "transformer"},
    ],
    ids=str,
)
def test_training_resumes_exactly_and_evaluates(tiny, more):
    more = {"model": "chan", "max_violation": None} | more
    train.main(train_args(num_epochs=3, **more))
    unbroken = read_log("run")
    train.main(train_args(num_epochs=2, model_name="two", logger_name="two", **more))
    resumed = train_args(num_epochs=3, model_name="two", logger_name="two", **more)
    train.main([*resumed, "--resume", "two/checkpoint_1.pth.tar"])
    for line, other in zip(unbroken, read_log("two"), strict=True):
        assert (line["Le"], line["rsum"]) == (other["Le"], other["rsum"])
    one, two = (torch.load(f"{d}/checkpoint_2.pth.tar", weights_only=False) for d in ("run", "two"))
    assert len(one["model"]) == 4 and not one["model"][2] and not one["model"][3]
    for a, b in zip(one["model"], two["model"], strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    metrics = evaluation.evalrank("run/model_best.pth.tar", split="dev")
    assert metrics["rsum"] == pytest.approx(max(line["rsum"] for line in unbroken))


def test_published_layout_and_vocabulary(tiny, monkeypatch):
    """$DATA_PATH/precomp or $DATA_PATH_precomp; data_name f30k has f30k_precomp_vocab.json."""
    shutil.copy("vocab/tiny_precomp_vocab.json", "vocab/f30k_precomp_vocab.json")
    for place in ("f30k/precomp", "f30k_precomp"):
        shutil.rmtree("data/f30k", ignore_errors=True)
        shutil.copytree("data/tiny_precomp", f"data/{place}")
        names = {"data_path": "data/f30k", "data_name": "f30k"}
        train.main(train_args(model="chan", num_epochs=1, **names))
        assert evaluation.evalrank("run/model_best.pth.tar", split="test")["rsum"] > 0
    shutil.copy("run/model_best.pth.tar", "model_best.pth")  # its published name
    assert evaluation.evalrank("model_best.pth", split="test")["rsum"] > 0
    shutil.move("vocab/f30k_precomp_vocab.json", "vocab/coco_precomp_vocab.json")
    opt = options.parse(["--model", "chan", "--data_name", "my_coco"])
    assert systems.of(opt).vocab_file("vocab", opt.data_name) == "vocab/coco_precomp_vocab.json"


def test_data_of_another_name_is_not_taken(tiny):
    shutil.copytree("data/tiny_precomp", "data/f30k/precomp")
    for name, system in (("coco", "chan"), ("f30k", "scan"), ("typo_precomp", "gsmn")):
        with pytest.raises(FileNotFoundError, match="no such data folder"):
            systems.SYSTEMS[system].find_data("data/f30k", name)
    assert systems.SYSTEMS["chan"].find_data("data/f30k/", "f30k") == "data/f30k/precomp"
    assert systems.SYSTEMS["chan"].find_data("data", "tiny") == "data/tiny_precomp"  # SCAN's layout


def test_a_published_checkpoint_may_hold_its_vocabulary(tiny):
    train.main(train_args(model="chan", num_epochs=1))
    state = torch.load("run/checkpoint_0.pth.tar", weights_only=False)
    words = ckpt.find_vocab(ckpt.load("run/checkpoint_0.pth.tar"), "x")
    state["opt"].word2idx = dict(words.word2idx)
    del state["vocab"], state["run"]
    torch.save(state, "model_best.pth")
    shutil.rmtree("vocab")
    again = ckpt.find_vocab(ckpt.load("model_best.pth"), "model_best.pth")
    assert again.word2idx == words.word2idx and len(again) == len(words)
    assert evaluation.evalrank("model_best.pth", split="test")["rsum"] > 0


@pytest.mark.parametrize("coding", CODING)
@pytest.mark.parametrize("pooling", POOLING)
def test_nan_is_not_swallowed(coding, pooling):
    net, batch = make(coding_type=coding, pooling_type=pooling)
    with torch.no_grad():
        images, captions = net(batch)
        images["regions"][0, 0, 0] = torch.nan  # of an image that has it
        assert net.similarity(images, captions)[0].isnan().all()


def test_the_vocabulary_has_a_mask(tiny):
    opt = options.parse(["--model", "chan"])
    words = deserialize_vocab("vocab/tiny_precomp_vocab.json")
    n = len(words)
    systems.of(opt).vocabulary(words, opt)
    assert words("<mask>") == n and len(words) == n + 1
    train.main(train_args(model="chan", num_epochs=1))
    state = ckpt.load("run/checkpoint_0.pth.tar")
    assert state["model"][1]["embed.weight"].shape[0] == n + 1
    assert len(ckpt.find_vocab(state, "x")) == n + 1
    assert len(ckpt.find_vocab(state, "x", "vocab")) == n + 1
    del state["vocab"]  # published: the file has one word fewer
    assert len(ckpt.find_vocab(state, "x", "vocab")) == n + 1


@pytest.mark.parametrize("kind", KINDS)
def test_options_missing_from_a_checkpoint_come_from_its_weights(kind, tmp_path):
    net, _ = make(precomp_enc_type=kind, num_layers=2)
    path = str(tmp_path / "model_best.pth")
    weights = ckpt.state_dicts(net, ckpt.argparse.Namespace(model="chan"))
    state = {"model": weights, "opt": ckpt.argparse.Namespace(), "epoch": 3}
    torch.save(state, path)
    got = ckpt.load(path)
    opt = got["opt"]
    assert (opt.model, opt.precomp_enc_type, opt.num_layers) == ("chan", kind, 2)
    assert got["epoch"] == 2 and opt.margin == 0.05  # published: the number of epochs
    again = ckpt.build_model(opt, 20)
    ckpt.load_weights(again, got, path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--coding_type", "X"], "--coding_type 'X': expected one of VHACoding, THACoding"),
        (["--pooling_type", "X"], "--pooling_type 'X': expected one of LSEPooling"),
        (["--precomp_enc_type", "weight_norm"], "expected one of basic, selfattention, tran"),
        (
            ["--precomp_enc_type", "selfattention", "--embed_size", "20"],
            "a multiple of the 8 heads",
        ),
    ],
)
def test_unknown_variants_are_named(flags, message):
    with pytest.raises(ValueError, match=message):
        ckpt.build_model(options.parse(["--model", "chan", *flags]), 20)


def items(tiny, rate=0.2, seed=0, epoch=0):
    opt = options.parse(["--model", "chan", "--img_dim", "12"])
    words = systems.of(opt).vocabulary(deserialize_vocab("vocab/tiny_precomp_vocab.json"), opt)
    data = systems.open_split(str(tiny / "data" / "tiny_precomp"), "train", words, opt)
    plain = [data[i] for i in range(len(data))]
    data.drop, data.epoch = Drop(rate, seed, words), epoch
    return words, plain, [data[i] for i in range(len(data))]


def test_dropping_follows_the_published_odds(tiny):
    counts = {"mask": 0, "kept": 0, "regions": 0, "words": 0, "of": 0}
    for epoch in range(40):
        words, plain, dropped = items(tiny, epoch=epoch)
        for one, other in zip(plain, dropped, strict=True):
            region_mask = other["region_mask"]
            assert region_mask.any() and not other["images"][~region_mask].any()
            assert torch.equal(other["images"][region_mask], one["images"][region_mask])
            counts["regions"] += int(region_mask.sum())
            counts["words"] += len(other["captions"])
            counts["of"] += len(one["captions"])
            counts["mask"] += int((other["captions"] == words("<mask>")).sum())
    n = 40 * len(plain)
    assert counts["regions"] / (4 * n) == pytest.approx(0.8, abs=0.01)
    assert counts["words"] / counts["of"] == pytest.approx(1 - 0.2 * 0.4, abs=0.01)
    # a tenth of the chosen words become any word of the vocabulary, even <mask>
    mask = 0.2 * (0.5 + 0.1 / len(words))
    assert counts["mask"] / counts["of"] == pytest.approx(mask, abs=0.01)


def test_dropping_is_seeded_and_differs_from_epoch_to_epoch(tiny):
    same, again, later, other = (
        items(tiny, seed=seed, epoch=epoch)[2] for seed, epoch in ((0, 1), (0, 1), (0, 2), (1, 1))
    )
    text = [json.dumps([x["captions"].tolist() for x in part]) for part in (same, later, other)]
    assert all(
        torch.equal(a["images"], b["images"]) and torch.equal(a["captions"], b["captions"])
        for a, b in zip(same, again, strict=True)
    )
    assert len(set(text)) == 3
    _, plain, whole = items(tiny, rate=0.0)
    assert all(torch.equal(a["images"], b["images"]) for a, b in zip(plain, whole, strict=True))
    assert all(item["region_mask"].sum() == 1 for item in items(tiny, rate=1 - 1e-12)[2])
    batch = collate_fn(whole[:3])
    assert batch["region_mask"].shape == (3, 4) and batch["region_mask"].all()


def test_a_rate_beyond_one_is_refused(capsys):
    with pytest.raises(SystemExit):
        options.parse(["--model", "chan", "--drop", "--obj_drop_rate", "1"])
    assert "expected a number of at least 0 and below 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        options.parse(["--model", "scan", "--mask_dropped"])
    assert "--mask_dropped is for --model chan, not scan" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        options.parse(["--model", "chan", "--lambda_softmax", "3"])
    assert "--lambda_softmax is for --model scan | gsmn" in capsys.readouterr().err


def test_one_pair_alone_and_zero_regions():
    for coding in CODING:
        net, batch = make(coding_type=coding)
        batch["images"][0] = 0  # with a bias of 0 its regions vanish
        scores = net.similarity(*net(batch))
        scores.sum().backward()
        assert scores.isfinite().all()
        assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)
        one = {name: x[:1] for name, x in batch.items()}
        assert net.similarity(*net(one)).shape == (1, 1)
