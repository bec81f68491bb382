"""PFAN against sums written out, its data, and what must not change its scores."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import checkpoint as ckpt
import evaluation
import model
import options
import pairs
import train
import vocab
from data import PositionDataset, WholeDataset, collate_fn, open_split
from model import AGG_FUNC, ContrastiveLoss, EncoderText
from pfan import PFAN, PFANWhole
from tests import reference
from tests.conftest import read_log, train_args, write_positions
from util import positions
from vocab import deserialize_vocab

KINDS = {
    "attention": (PFAN, {}),
    "only": (PFAN, {"position": "only"}),
    "whole": (PFANWhole, {"lambda_whole": 2.0}),
    "box_whole": (PFANWhole, {"lambda_whole": 2.0, "need_box_whole": True}),
}
FOCUS = {("attention", "i2t"): 0.0, ("only", "i2t"): 0.0}  # else a half


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
    blocks = torch.rand(n, regions, 10, generator=g).argsort(2)[..., :4]  # none twice
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
    """Both encodings, in float64: the encoders end in float32."""
    return [
        {name: x if name == "lengths" else x.double() for name, x in part.items()}
        for part in net(batch)
    ]


def loop(net, kind, direction, images, captions):
    """Scores of all pairs, from the encodings."""
    how, regions = net.how, images["regions"]
    box = None
    if kind == "box_whole" and direction == "t2i":
        regions, box = regions[:, :-1], regions[:, -1]
    scores = reference.xattn_score(
        direction,
        regions,
        captions["words"],
        captions["lengths"].tolist(),
        how.raw_feature_norm,
        how.agg_func,
        how.lambda_softmax,
        how.lambda_lse,
        focus=FOCUS.get((kind, direction), 0.5),
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
    for weight in (few, torch.randn(5, 5, dtype=torch.float64)):  # pair by pair; in blocks
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
    batch["blocks"][2, 2] = torch.tensor([3, 3, 1, 9])  # one twice
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
            for module in (pairs, model):
                monkeypatch.setattr(module, "block_size", lambda device, size=size: size)
            torch.testing.assert_close(net.similarity(images, captions), want)
        back = torch.arange(6, -1, -1)
        flipped = {name: x[back] for name, x in captions.items()}
        torch.testing.assert_close(net.similarity(images, flipped), want[:, back])
        for k, length in enumerate(batch["lengths"].tolist()):  # each caption alone, not padded
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
    opt = ckpt.argparse.Namespace()  # a published one without any option
    torch.save({"model": ckpt.state_dicts(net, system), "opt": opt, "epoch": 7}, path)
    state = ckpt.load(path)
    got = vars(state["opt"])
    assert got["model"] == system and state["epoch"] == 6  # published: how many are finished
    assert (got["split_size"], got["position_embed_size"], got["img_dim"]) == (3, 4, 6)
    assert got["precomp_enc_type"] == "weight_norm" and got["num_layers"] == 2
    if system == "pfan":
        assert got["position"] == kind
    again = ckpt.build_model(state["opt"], 20)
    ckpt.load_weights(again, state, path)
    assert again.how.focus == net.how.focus


def splits(tiny, system="pfan", split="train", **more):
    words = ckpt.as_read(
        deserialize_vocab("vocab/tiny_precomp_vocab.json"), options.parse(["--model", system])
    )
    opt = options.parse(["--model", system, "--img_dim", "12"])
    for name, value in more.items():
        setattr(opt, name, value)
    return open_split(str(tiny / "data" / "tiny_precomp"), split, words, opt)


def test_items_and_batches(tiny_positions):
    data = splits(tiny_positions)
    assert isinstance(data, PositionDataset)
    table = np.load(tiny_positions / "data" / "tiny_precomp" / "train_boxes.npy")
    batch = collate_fn([data[i] for i in (0, 7, 99)])
    assert batch["blocks"].dtype == torch.long and batch["overlap"].dtype == torch.float32
    np.testing.assert_array_equal(batch["blocks"], table[[0, 1, 19], :, :15])
    np.testing.assert_array_equal(batch["overlap"], table[[0, 1, 19], :, 15:])
    whole = splits(tiny_positions, "pfan_whole")
    assert isinstance(whole, WholeDataset)
    batch = collate_fn([whole[i] for i in (0, 7)])
    vectors = np.load(tiny_positions / "data" / "tiny_precomp" / "train_who_ims.npy")
    np.testing.assert_array_equal(batch["whole"], vectors[[0, 1]])
    boxed = splits(tiny_positions, "pfan_whole", need_box_whole=True)
    assert boxed[0]["blocks"].shape == (3, 15) and boxed[0]["images"].shape == (4, 12)


def test_area_is_not_read_and_the_whole_box_may_be_missing(tiny_positions):
    folder = tiny_positions / "data" / "tiny_precomp"
    want = splits(tiny_positions, "pfan_whole", need_box_whole=True)[3]
    write_positions(folder, "train", with_area=True)
    table = np.load(folder / "train_boxes.npy")
    assert table.shape[2] == 31
    np.save(folder / "train_boxes.npy", table[:, :-1])
    got = splits(tiny_positions, "pfan_whole", need_box_whole=True)[3]
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])
    with pytest.raises(ValueError, match="train_boxes.npy: an array of shape .20, 3, 31., but"):
        splits(tiny_positions, "pfan_whole")


def change(name, row, column, value):
    def spoil(folder):
        array = np.load(folder / name)
        array[row, ..., column] = value
        np.save(folder / name, array)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "train_boxes.npy").unlink(), "no positions, which PFAN needs; make them"),
        (
            lambda f: np.save(f / "train_boxes.npy", np.zeros((20, 5, 30), np.float32)),
            r"shape \(20, 5, 30\), but .* holds 20 images of 4 regions; expected \(20, 4, 2 K\)",
        ),
        (
            lambda f: np.save(f / "train_boxes.npy", np.zeros((4, 30), np.float32)),
            "expected a float16 or float32 array of 3 axes",
        ),
        (
            lambda f: np.save(f / "train_boxes.npy", np.zeros((20, 4, 1), np.float32)),
            r"shape \(20, 4, 1\).* expected \(20, 4, 2 K\), K block ids and K weights",
        ),
        (
            lambda f: np.save(f / "train_boxes.npy", np.zeros((20, 4, 10), np.float32)),
            r"row 0 \(from 0\), region 0: expected 5 block ids",
        ),
        (  # pixel boxes
            lambda f: np.save(f / "train_boxes.npy", np.full((20, 4, 4), [3, 4, 60, 70.0])),
            r"row 0 \(from 0\), region 0: expected 2 block ids .*: util/positions.py makes them",
        ),
        (
            change("train_boxes.npy", 3, 2, 257),
            r"row 3 \(from 0\), region 0: expected 15 block ids",
        ),
        (change("train_boxes.npy", 3, 2, -1), "block ids from 0 to 256"),
        (change("train_boxes.npy", 3, 2, 1.5), "expected 15 block ids"),
        (change("train_boxes.npy", 3, 2, np.nan), "expected 15 block ids"),
        (change("train_boxes.npy", 3, 17, np.nan), "then 15 weights from 0 to 1"),
        (change("train_boxes.npy", 3, 17, np.inf), "then 15 weights from 0 to 1"),
        (change("train_boxes.npy", 3, 17, -0.5), "then 15 weights from 0 to 1"),
        (lambda f: (f / "train_who_ims.npy").unlink(), "train_who_ims.npy: no such file"),
        (
            lambda f: np.save(f / "train_who_ims.npy", np.zeros((20, 7), np.float32)),
            r"shape \(20, 7\), expected \(20, 12\), a vector for each image",
        ),
        (change("train_who_ims.npy", 5, 3, np.nan), r"train_who_ims.npy: row 5 \(from 0\) holds"),
    ],
)
def test_bad_files_are_named(tiny_positions, spoil, message):
    spoil(tiny_positions / "data" / "tiny_precomp")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        data = splits(tiny_positions, "pfan_whole")
        for i in range(len(data)):
            data[i]


@pytest.mark.parametrize("split_size", [4, 32])
def test_blocks_of_another_grid_are_named(tiny_positions, split_size):
    with pytest.raises(ValueError, match=f"it is not made for --split_size {split_size}"):
        data = splits(tiny_positions, split_size=split_size)
        for i in range(len(data)):
            data[i]


def test_other_grids_and_numbers_of_blocks(tiny_positions):
    positions.main(
        "--data_name tiny_precomp --split_size 4 --n_blocks 6 --with_area --overwrite".split()
    )
    # The file says how many there are.
    train.main(train_args(num_epochs=1, model="pfan", position="only", split_size=4))
    opt = ckpt.load("run/checkpoint_0.pth.tar")["opt"]
    assert (opt.split_size, opt.n_blocks) == (4, 6)
    metrics = evaluation.evalrank("run/checkpoint_0.pth.tar", split="test", save_path="x.npy")
    # So it does for the data that a checkpoint is tested on: here with blocks that add nothing.
    for split in ("test", "dev"):
        path = f"data/tiny_precomp/{split}_boxes.npy"
        ids, weights, _ = np.split(np.load(path), [6, 12], axis=2)
        more = np.full_like(ids[..., :3], 16), np.zeros_like(ids[..., :3])
        np.save(path, np.concatenate([ids, more[0], weights, more[1]], 2))
    evaluation.evalrank("run/checkpoint_0.pth.tar", split="test", save_path="y.npy")
    np.testing.assert_allclose(np.load("y.npy"), np.load("x.npy"), rtol=1e-5)
    assert metrics["rsum"] > 0


def test_a_vocabulary_of_other_captions_is_warned_of(tiny_positions, capsys):
    splits(tiny_positions)
    assert "not in the vocabulary" not in capsys.readouterr().out
    (tiny_positions / "data" / "tiny_precomp" / "train_caps.txt").write_text(
        "zebra wolf red\n" * 100
    )
    for system in ("pfan", "pfan_whole"):
        splits(tiny_positions, system)
        said = "train_caps.txt: 200 of its 300 words are not in the vocabulary"
        assert said in capsys.readouterr().out


def test_whole_images_have_captions_and_words_of_their_own(tiny_positions):
    folder = tiny_positions / "data" / "tiny_precomp"
    assert splits(tiny_positions, "pfan_whole")[0]["captions"].tolist()[1] == 4  # of _caps.txt
    (folder / "train_sent_caps.txt").write_text("red zebra\n" * 100)
    words = deserialize_vocab("vocab/tiny_precomp_vocab.json")
    red = words("red")
    assert splits(tiny_positions, "pfan_whole")[0]["captions"].tolist() == [1, red, 0, 2]
    assert splits(tiny_positions, "pfan")[0]["captions"].tolist()[1] == 4
    (folder / "train_caps.txt").write_text("red zebra\n" * 100)
    assert splits(tiny_positions, "pfan")[0]["captions"].tolist() == [1, red, 3, 2]  # <unk>


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


def test_splits_must_have_one_kind_of_captions(tiny_positions):
    folder = tiny_positions / "data" / "tiny_precomp"
    (folder / "train_sent_caps.txt").write_text("red dog\n" * 100)
    with pytest.raises(
        FileNotFoundError, match="dev_sent_caps.txt: no such file, but there is .*tra"
    ):
        splits(tiny_positions, "pfan_whole", "dev")
    assert len(splits(tiny_positions, "pfan", "dev")) == 50


def test_the_vocabulary_of_whole_images_has_its_own_name(tiny_positions):
    folder = tiny_positions / "data" / "tiny_precomp"
    for split in ("train", "dev"):
        captions = (folder / f"{split}_caps.txt").read_text()
        (folder / f"{split}_sent_caps.txt").write_text(captions.replace("red", "crimson"))
    vocab.main(["--data_path", "data", "--data_name", "tiny_precomp", "--sent"])
    opt = options.parse(["--model", "pfan_whole", "--data_name", "tiny_precomp"])
    assert ckpt.vocab_file(opt, "vocab") == "vocab/tiny_precomp_sent_vocab.json"
    words = deserialize_vocab(ckpt.vocab_file(opt, "vocab"))
    assert "crimson" in words.word2idx and "red" not in words.word2idx
    train.main(train_args(num_epochs=1, model="pfan_whole"))
    state = ckpt.load("run/checkpoint_0.pth.tar")
    stored = ckpt.find_vocab(state, "run/checkpoint_0.pth.tar")
    assert stored.word2idx == words.word2idx and stored("zebra") == 0
    opt.model = "scan"
    assert ckpt.vocab_file(opt, "vocab") == "vocab/tiny_precomp_vocab.json"


def test_one_caption_an_image(tiny_positions):
    """Tencent-News has one; so may train."""
    folder = tiny_positions / "data" / "tiny_precomp"
    for split in ("train", "dev"):
        captions = (folder / f"{split}_caps.txt").read_text().splitlines()[::5]
        (folder / f"{split}_caps.txt").write_text("".join(f"{c}\n" for c in captions))
    train.main(train_args(num_epochs=1, model="pfan_whole"))
    assert splits(tiny_positions, "pfan_whole", "dev").k == 1


def test_a_test_split_may_have_candidate_images(tiny_positions, capsys):
    folder = tiny_positions / "data" / "tiny_precomp"
    train.main(train_args(num_epochs=1, model="pfan_whole"))
    captions = (folder / "test_caps.txt").read_text().splitlines()[:5]
    (folder / "test_caps.txt").write_text("".join(f"{c}\n" for c in captions))
    (folder / "test_ids.txt").write_text("".join(f"{k}\n" for k in range(15)))
    data = splits(tiny_positions, "pfan_whole", "test")
    assert (data.n_images, data.n_captions, data.candidates) == (15, 5, 3)
    assert [data[i]["image_index"] for i in range(5)] == [0, 3, 6, 9, 12] and len(data.ids) == 15
    assert "5 captions for 15 images, so 3 candidate images a caption" in capsys.readouterr().out
    metrics = evaluation.evalrank("run/checkpoint_0.pth.tar", split="test", save_path="s.npy")
    scores = np.load("s.npy")
    assert scores.shape == (15, 5)
    # A caption's rank is that of the best of its images; an image has one caption.
    ranks = [int((scores[:, c] > scores[3 * c : 3 * c + 3, c].max()).sum()) for c in range(5)]
    assert metrics["t2i"]["r1"] == 100 * np.mean([r < 1 for r in ranks])
    ranks = [int((scores[i] > scores[i, i // 3]).sum()) for i in range(15)]
    assert metrics["i2t"]["r1"] == pytest.approx(100 * np.mean([r < 1 for r in ranks]))
    folds = evaluation.evalrank("run/checkpoint_0.pth.tar", split="test", fold5=True)
    assert folds["t2i"]["r1"] == 100.0 and folds["i2t"]["meanr"] == 1.0  # one caption a fold
    with pytest.raises(ValueError, match="train_caps.txt: 5 captions for the 20 rows"):
        (folder / "train_caps.txt").write_text("a\n" * 5)
        splits(tiny_positions, "pfan_whole")
    with pytest.raises(ValueError, match="test_caps.txt: 5 captions for the 15 rows"):
        splits(tiny_positions, "pfan", "test")  # it would be half a file
    (folder / "test_ids.txt").write_text("".join(f"{k}\n" for k in range(5)))
    with pytest.raises(ValueError, match="5 ids for 15 images"):
        splits(tiny_positions, "pfan_whole", "test")
