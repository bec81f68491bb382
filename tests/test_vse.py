"""VSE-infinity: its pooling against plain loops, and what must not change a vector."""

import argparse

import pytest
import torch

import checkpoint as ckpt
import cxc
import options
import systems
from tests import reference_vse, test_filling, test_meta
from tests.conftest import train_args
from tests.test_drop import make, without
from util.cli import InputError
from vocab import Vocabulary
from vse import GPO, MLP, POOLS, VSE, BatchNorm, positions


def drawn(n=7, rows=6, dim=5, seed=0):
    """Numbers (N, K, D) in float64, which of their rows are there, and how many."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, rows, dim, generator=g, dtype=torch.float64)
    there = torch.rand(n, rows, generator=g) < 0.6
    there[torch.arange(n), torch.randint(rows, (n,), generator=g)] = True
    return x, there


@pytest.mark.parametrize("kind", POOLS)
@pytest.mark.parametrize("known", [False, True])
def test_pools_are_plain_loops_over_the_rows_that_are_there(kind, known):
    torch.manual_seed(0)
    for rows in (1, 2, 6, 17):
        pool, (x, there) = POOLS[kind]().double(), drawn(rows=rows)
        x.requires_grad_()
        want = torch.stack([reference_vse.pool(pool, a[m]) for a, m in zip(x, there, strict=True)])
        got = pool(x, there, there.sum(1) if known else None)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
        weights = torch.randn_like(want)
        learnt = [x, *pool.parameters()]
        grads = [torch.autograd.grad((y * weights).sum(), learnt) for y in (got, want)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
        assert not grads[0][0][~there].any()


def test_the_weights_depend_on_the_length_only():
    pool = GPO().double()
    weights = pool.weights(torch.arange(9, 0, -1), 11)
    torch.testing.assert_close(weights.sum(1), torch.ones(9, dtype=torch.float64))
    for n, row in zip(range(9, 0, -1), weights, strict=True):
        assert (row[:n] > 0).all() and not row[n:].any()
        want = torch.stack(reference_vse.gpo_weights(pool, n))
        torch.testing.assert_close(row[:n], want, rtol=1e-10, atol=1e-12)
    # Each distinct length once, however many captions have it.
    calls = []
    pool.gru.register_forward_hook(lambda _, args, out: calls.append(args[0].batch_sizes[0]))
    there = torch.arange(6) < torch.tensor([3, 6, 3, 3, 6, 2])[:, None]
    pool(torch.randn(6, 6, 4, dtype=torch.float64), there, there.sum(1))
    assert calls == [3]


def test_positions_are_sines_and_cosines():
    got = positions(50, torch.zeros(1, dtype=torch.float64))
    angle = torch.tensor(49 * 10000 ** (-10 / 32), dtype=torch.float64)
    torch.testing.assert_close(got[49, 10:12], torch.stack((angle.sin(), angle.cos())))
    assert got.shape == (50, 32) and got[0].tolist() == [0, 1] * 16


def test_a_pool_with_the_weights_of_the_mean_is_the_mean():
    """Section 3: mean and maximum are special cases of GPO."""
    pool, (x, there) = GPO().double(), drawn()
    torch.nn.init.zeros_(pool.linear.weight)
    torch.testing.assert_close(pool(x, there), POOLS["mean"]()(x, there))
    pool.weights = lambda lengths, room: torch.eye(1, room, dtype=x.dtype).expand(len(lengths), -1)
    torch.testing.assert_close(pool(x, there), POOLS["max"]()(x, there))


# Batch norm


@pytest.mark.parametrize("masked", [False, True])
def test_batch_norm_is_that_of_the_regions_that_are_there(masked):
    x, there = drawn(dim=4)
    x, there = 3 * x.float() + 2, there if masked else torch.ones_like(there)
    ours, torchs = BatchNorm(4), torch.nn.BatchNorm1d(4)
    for bn in (ours, torchs):
        torch.nn.init.normal_(bn.weight, generator=torch.Generator().manual_seed(1))
    for training in (True, True, False):
        ours.train(training), torchs.train(training)
        got, want = ours(x, there if masked else None)[there], torchs(x[there])
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        for name, value in torchs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value, msg=name)
    assert ours.num_batches_tracked == 2


def test_a_single_region_trains():
    """torch's own refuses a batch of one value."""
    bn = BatchNorm(3)
    x = torch.randn(1, 1, 3, requires_grad=True)
    bn(x).sum().backward()
    assert all(value.isfinite().all() for value in (*bn.state_dict().values(), x.grad))
    torch.testing.assert_close(bn.running_var, torch.full((3,), 0.9))


def test_what_nothing_reads_and_what_cancels_have_no_gradient():
    """The second batch norm is in published files; batch norm takes the first bias away."""
    torch.manual_seed(0)
    mlp, x = MLP(6, 4, 8).double(), torch.randn(3, 5, 6, dtype=torch.float64)
    want = mlp(x)
    with torch.no_grad():
        mlp.bns[1].weight += 3
        mlp.layers[0].bias += 3
    torch.testing.assert_close(mlp(x), want)
    frozen = [name for name, p in mlp.named_parameters() if not p.requires_grad]
    assert frozen == ["layers.0.bias", "bns.1.weight", "bns.1.bias"]


# What must not change a vector


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("pool", POOLS)
def test_dropped_regions_and_filling_are_absent(pool, training):
    """From the statistics, from the sorting, and from the sum; whatever stands in their places."""
    net, batch = make(VSE, pool=pool)
    net.train(training)
    state = {name: x.clone() for name, x in net.state_dict().items()}

    def encoded(batch):
        net.load_state_dict(state)
        image = net.encode_images(batch)["image"]
        running = {name: x.clone() for name, x in net.state_dict().items() if "running" in name}
        return image, running

    want, running = encoded(batch)
    mask, images = batch["region_mask"], batch["images"]
    order = torch.arange(5, -1, -1)
    padded = torch.nn.functional.pad(images, (0, 0, 0, 4), value=1e4)
    for more in (
        {"images": images.masked_fill(~mask[..., None], 1e6)},
        {"images": images[:, order], "region_mask": mask[:, order]},
        {"images": padded, "region_mask": torch.nn.functional.pad(mask, (0, 4))},
    ):
        got, other = encoded(batch | more)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        for name, x in running.items():
            torch.testing.assert_close(other[name], x, msg=name)
    if not training:
        for image in range(5):
            alone = net.encode_images(without(batch, image))["image"][0]
            torch.testing.assert_close(alone, want[image], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(net.encode_images({"images": images})["image"], want, atol=1e-3)


@pytest.mark.parametrize("pool", POOLS)
def test_the_padding_of_captions_changes_nothing(pool):
    net, batch = make(VSE, pool=pool)
    want = net.encode_captions(batch)["sentence"]
    torch.testing.assert_close(want.norm(dim=1), torch.ones(5))
    wide = {"captions": torch.nn.functional.pad(batch["captions"], (0, 3), value=7)}
    torch.testing.assert_close(net.encode_captions(batch | wide)["sentence"], want)
    for k, n in enumerate(batch["lengths"].tolist()):
        one = {"captions": batch["captions"][k : k + 1, :n], "lengths": torch.tensor([n])}
        torch.testing.assert_close(net.encode_captions(one)["sentence"][0], want[k])


@pytest.mark.parametrize("pool", POOLS)
def test_filling_changes_no_program(tiny_graphs, pool):
    """Training with --drop, evaluation and the server, as for the other systems."""
    test_filling.test_filling_changes_nothing(tiny_graphs, {"model": "vse", "pool": pool})


@pytest.mark.parametrize("norms", [(False, True), (True, False)])
def test_lengths_of_the_vectors(norms):
    net, batch = make(VSE, no_imgnorm=norms[0], no_txtnorm=norms[1])
    images, captions = net.eval()(batch)
    for x, free in zip((images["image"], captions["sentence"]), norms, strict=True):
        assert torch.allclose(x.norm(dim=1), torch.ones(5)) != free
    want = reference_vse.vse_scores(net, batch)
    torch.testing.assert_close(net.similarity(images, captions), want, rtol=1e-5, atol=1e-6)


def test_a_step_stays_on_its_device():
    with torch.device("meta"):
        net = VSE(20, 12, 8, 16)
    for more in ({}, test_meta.REGION_MASK):
        net.similarity(*net(test_meta.batch() | more)).sum().backward()
    learnt = [p for p in net.parameters() if p.requires_grad]
    assert all(p.grad.device.type == "meta" for p in learnt)


def test_cxc_within_one_kind_compares_the_vectors(monkeypatch):
    net, batch = make(VSE)
    images, captions = net.eval()(batch)
    (index, scores), *more = cxc.image_rows(net, images)
    torch.testing.assert_close(scores, images["image"] @ images["image"].T)
    assert index.tolist() == list(range(5)) and not more
    place = torch.tensor([3, 0, 4, 1, 2])
    (index, scores), *more = cxc.caption_rows(net, [captions | {"index": place}])
    want = torch.empty(5, 5)
    want[:, place] = captions["sentence"] @ captions["sentence"].T
    torch.testing.assert_close(scores, want)
    assert index.tolist() == place.tolist() and not more


# Options


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"pool": "gop"}, r"--pool 'gop': expected one of gpo, mean, max; did you mean gpo"),
        ({"precomp_enc_type": "weight_norm"}, "--precomp_enc_type 'weight_norm': expected one of"),
        ({"embed_size": 1}, "--embed_size 1: expected at least 2, the MLP halves it"),
    ],
)
def test_variants_that_do_not_exist_are_named(flags, said):
    opt = argparse.Namespace(**options.defaults("vse") | flags)
    with pytest.raises(InputError, match=said):
        ckpt.build_model(opt, 20)


def test_options_are_the_published_ones(capsys):
    opt = options.parse(["--model", "vse"])
    assert (opt.learning_rate, opt.num_epochs, opt.margin, opt.grad_clip) == (5e-4, 25, 0.2, 2)
    assert (opt.vse_mean_warmup_epochs, opt.lr_update, opt.pool) == (1, 15, "gpo")
    flags = "--embedding_warmup_epochs 3 --input_scale_factor 2 --backbone_source detector"
    options.parse(["--model", "vse", *flags.split(), "--backbone_lr_factor", "0.1"])
    with pytest.raises(SystemExit):
        options.parse(["--pool", "max"])
    assert "--pool is for --model vse, not scan" in capsys.readouterr().err
    criterion = systems.of(opt).criterion(opt)
    assert criterion.max_violation and criterion.warmup_epochs == 1


@pytest.mark.parametrize("optim", ["adam", "sgd"])
def test_the_optimizer_of_a_gru(optim):
    opt = options.parse(train_args(model="vse", optim=optim, learning_rate=0.003))
    net, criterion = ckpt.build_model(opt, 20), torch.nn.Identity()
    optimizer = systems.of(opt).optimizer(net, criterion, opt)
    if optim == "sgd":
        assert isinstance(optimizer, torch.optim.SGD)
        return
    assert type(optimizer) is torch.optim.AdamW
    assert {g["weight_decay"] for g in optimizer.param_groups} == {1e-4}
    assert {g["lr"] for g in optimizer.param_groups} == {0.003}


@pytest.mark.parametrize(("rows", "masked"), [(None, True), (4, True), (3, False)])
def test_the_word_mask_is_there_unless_the_checkpoint_lacks_it(rows, masked):
    opt = options.parse(["--model", "vse"])
    if rows:
        opt.vocab_size = rows
    words = Vocabulary()
    for word in ("<pad>", "<unk>", "dog"):
        words.add_word(word)
    assert (words.mask in systems.of(opt).vocabulary(words, opt).word2idx) == masked
