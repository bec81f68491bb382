"""--drop for every system: a dropped region is as if the image had never had it."""

import itertools

import pytest
import torch

import checkpoint as ckpt
import evaluation
import options
import run_state
import systems
import train
from chan import CHAN
from data import Drop, collate_fn
from gsmn import GSMN
from model import AGG_FUNC, RAW_FEATURE_NORM, SCAN
from pfan import PFAN, PFANWhole
from tests.conftest import read_log, train_args
from vocab import deserialize_vocab

SIZES = {"img_dim": 6, "word_dim": 5, "embed_size": 8}
SYSTEMS = [
    *((SCAN, {"raw_feature_norm": x, "agg_func": "Mean"}) for x in RAW_FEATURE_NORM),
    *((SCAN, {"agg_func": x}) for x in AGG_FUNC),
    (PFAN, {}),
    (PFAN, {"position": "only", "agg_func": "Mean"}),
    (PFANWhole, {}),
    (PFANWhole, {"need_box_whole": True}),
    (GSMN, {"num_block": 4, "feat_dim": 4}),
    (GSMN, {"num_block": 4, "feat_dim": 4, "neighbours": True}),
    (GSMN, {"num_block": 4, "feat_dim": 4, "is_sparse": True}),
    (CHAN, {"coding_type": "THACoding"}),
]
NAMES = [f"{kind.__name__} {' '.join(map(str, more.values()))}" for kind, more in SYSTEMS]


def make(kind, n=5, regions=6, **more):
    """A model, and a batch with some regions dropped, but never the last region of an image."""
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(1)
    net = kind(20, **SIZES, **more)
    lengths = torch.randint(2, 7, (n,), generator=g)
    captions = torch.randint(1, 20, (n, int(lengths.max())), generator=g)
    region_mask = torch.rand(n, regions, generator=g) < 0.6
    region_mask[:, -1] = True
    images = torch.randn(n, regions, 6, generator=g)
    some = regions - bool(more.get("need_box_whole"))  # the whole image has no blocks
    batch = {"captions": captions, "lengths": lengths, "images": images, "region_mask": region_mask}
    batch["boxes"] = torch.rand(n, regions, 4, generator=g)
    batch["blocks"] = torch.rand(n, some, 257, generator=g).argsort(2)[..., :3]
    batch["overlap"] = torch.rand(n, some, 3, generator=g)
    batch["whole"] = torch.randn(n, 6, generator=g)
    if more.get("is_sparse"):
        batch["adjacency"] = (torch.rand(n, 6, 6, generator=g) < 0.5).float()
        batch["adjacency"] = batch["adjacency"][:, : captions.size(1), : captions.size(1)]
        batch["adjacency"] += torch.eye(captions.size(1))
    return net, batch


def without(batch, image):
    """The batch of one image with only the regions that are not dropped, and all captions."""
    region_mask = batch["region_mask"][image]
    one = {name: x[image : image + 1] for name, x in batch.items()}
    one["images"] = one["images"][:, region_mask]
    one["boxes"] = one["boxes"][:, region_mask]
    for name in ("blocks", "overlap"):
        one[name] = one[name][:, region_mask[: one[name].size(1)]]
    del one["region_mask"]
    captions = {name: batch[name] for name in ("captions", "lengths", "adjacency") if name in batch}
    return one | captions


@pytest.mark.parametrize("direction", ["t2i", "i2t"])
@pytest.mark.parametrize(("kind", "more"), SYSTEMS, ids=NAMES)
def test_scores_and_gradients_are_those_of_the_regions_left(kind, more, direction):
    if issubclass(kind, SCAN):
        more = more | {"cross_attn": direction}
    elif direction == "i2t":
        return
    net, batch = make(kind, **more)
    few = torch.zeros(5, 5)
    few[1, 2], few[1, 3], few[0, 3], few[3, 0] = 1.0, -2.0, 0.5, 1.0
    for weight in (few, torch.randn(5, 5)):  # pair by pair, then in blocks
        results = []

        def by_image(net=net, batch=batch):
            return torch.cat([net.similarity(*net(without(batch, i))) for i in range(5)])

        for score in (lambda net=net, batch=batch: net.similarity(*net(batch)), by_image):
            net.zero_grad()
            scores = score()
            (scores * weight).sum().backward()
            grads = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
            results.append((scores.detach(), grads))
        (got, got_grads), (want, want_grads) = results
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert got_grads.keys() == want_grads.keys()
        for name, grad in got_grads.items():
            scale = float(want_grads[name].abs().max())
            torch.testing.assert_close(
                grad, want_grads[name], rtol=1e-3, atol=1e-4 * max(scale, 0.1), msg=name
            )
        everything = {name: x for name, x in batch.items() if name != "region_mask"}
        assert not torch.allclose(net.similarity(*net(everything)), got, atol=1e-3)


@pytest.mark.parametrize(
    ("system", "more"),
    [
        *((system, {}) for system in ("scan", "gsmn", "pfan", "pfan_whole", "chan")),
        ("gsmn", {"is_sparse": True}),
        ("gsmn", {"is_sparse": True, "neighbours": True}),
    ],
)
def test_a_run_with_drop_ends_and_resumes_exactly(tiny_positions, system, more):
    flags = {"model": system, "drop": True, "num_epochs": 3} | more
    flags |= {"num_block": 4, "feat_dim": 4} if system == "gsmn" else {}
    if system == "pfan_whole":
        flags |= {"need_box_whole": True, "cross_attn": "t2i"}
    train.main(train_args(**flags, model_name="whole", logger_name="whole"))
    train.main(train_args(**flags | {"num_epochs": 1}))
    train.main(train_args(**flags, resume="run/checkpoint_0.pth.tar"))
    whole, parts = read_log("whole"), read_log("run")
    for record in (*whole, *parts):
        del record["seconds"], record["peak_mib"]
    assert whole == parts


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("kind", ["selfattention", "transformer"])
def test_dropped_regions_count_up_to_the_widest_image(kind, filled):
    """As if what is left of each image stood at the front of a batch that is as wide as needed."""
    torch.manual_seed(0)
    net = CHAN(20, img_dim=6, embed_size=8, precomp_enc_type=kind).double()
    images = torch.randn(5, 5, 6, dtype=torch.float64)
    counts = torch.tensor([5, 4, 5, 2, 1]) if filled else torch.full((5,), 5)
    there = torch.arange(5) < counts[:, None]  # (I, R)
    mask = torch.tensor(
        [[1, 0, 1, 0, 1], [0, 1, 0, 0, 0], [1, 1, 0, 0, 1], [0, 1, 0, 1, 0], [1] * 5]
    )
    mask[4, 3:] = 0
    mask = mask.bool() & there
    items = [
        {"images": x[:n] * m[:n, None], "captions": torch.tensor([1]), "region_mask": m[:n]}
        for x, m, n in zip(images, mask, counts.tolist(), strict=True)
    ]
    got = net.encode_images(collate_fn(items))["regions"]
    wide = 3
    for k, (image, left) in enumerate(zip(images, mask, strict=True)):
        packed = image.new_zeros(min(wide, int(counts[k])), image.size(1))
        packed[: left.sum()] = image[left]
        alone = net.encode_images({"images": packed[None]})["regions"][0, : left.sum()]
        torch.testing.assert_close(got[k, left], alone, rtol=1e-5, atol=1e-6)
    net.drop_in_place = True
    again = net.encode_images(collate_fn(items))["regions"]
    assert not torch.allclose(again[1], got[1], atol=1e-3)
    if not filled:  # then nothing depends on the others of the batch
        single = net.encode_images(collate_fn(items[1:2]))["regions"]
        torch.testing.assert_close(single[0], again[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("more", "steps"), [({}, 3), ({"keep_short_batch": True}, 4)])
def test_a_short_last_batch_is_left_out_unless_kept(tiny, more, steps):
    train.main(train_args(num_epochs=1, drop=True, batch_size=32, **more))
    state = ckpt.load("run/checkpoint_0.pth.tar")  # of 100 captions
    assert state["Eiters"] == steps
    # A run of before goes on as it began.
    path = "run/old.pth.tar"
    del state["opt"].keep_short_batch, state["opt"].drop_in_place
    torch.save({name: x for name, x in state.items() if name != "unfit"}, path)
    assert run_state.read_options(["--resume", path])[0].keep_short_batch
    flags = ["--resume", path, "--no-keep_short_batch"]
    assert not run_state.read_options(flags)[0].keep_short_batch


def test_a_graph_loses_the_words_that_its_caption_loses(tiny_graphs):
    opt = options.parse(["--model", "gsmn", "--is_sparse", "--img_dim", "12", "--drop"])
    words = systems.of(opt).vocabulary(deserialize_vocab("vocab/tiny_precomp_vocab.json"), opt)
    data = systems.open_split(str(tiny_graphs / "data" / "tiny_precomp"), "train", words, opt)
    plain = [data[i] for i in range(len(data))]
    data.drop = Drop(0.2, 0, words)
    shorter = 0
    for one, other in zip(plain, (data[i] for i in range(len(data))), strict=True):
        before, after = len(one["captions"]), len(other["captions"])
        assert other["adjacency"].shape == (after, after)
        # The rest of a chain: words that were neighbours still are, and each word has itself.
        assert other["adjacency"].diagonal().all()
        if after == before:
            assert torch.equal(other["adjacency"], one["adjacency"])
        else:
            shorter += 1
            left = [
                rows
                for rows in itertools.combinations(range(before), after)
                if torch.equal(one["adjacency"][list(rows)][:, list(rows)], other["adjacency"])
            ]
            assert left
    assert shorter > 10


def test_the_whole_image_is_never_dropped_nor_left_alone(tiny):
    opt = options.parse(["--img_dim", "12", "--drop"])
    words = systems.of(opt).vocabulary(deserialize_vocab("vocab/tiny_precomp_vocab.json"), opt)
    data = systems.open_split(str(tiny / "data" / "tiny_precomp"), "train", words, opt)
    data.drop = Drop(0.9, 0, words, keep_last=True)
    left = torch.stack([data[i]["region_mask"] for i in range(len(data))])
    assert left[:, -1].all() and left[:, :-1].any(1).all() and not left.all()


def test_a_run_goes_on_without_drop_and_again(tiny):
    """The vocabulary then keeps its <mask>."""
    train.main(train_args(num_epochs=1, drop=True))
    train.main(train_args(num_epochs=2, resume="run/checkpoint_0.pth.tar"))
    train.main(train_args(num_epochs=3, resume="run/checkpoint_1.pth.tar"))
    evaluation.evalrank("run/checkpoint_2.pth.tar", vocab_path="vocab")
    train.main(train_args(num_epochs=4, drop=True, resume="run/checkpoint_2.pth.tar"))


def test_a_run_without_drop_cannot_go_on_with_it(tiny):
    train.main(train_args(num_epochs=1))
    with pytest.raises(ValueError, match="--drop: the vocabulary has no <mask>"):
        train.main(train_args(num_epochs=2, drop=True, resume="run/checkpoint_0.pth.tar"))
