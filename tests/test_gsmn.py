"""GSMN against sums written out, its data, and what must not change its scores."""

import itertools
import json
import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch

import checkpoint as ckpt
import evaluation
import gsmn
import options
import pairs
import train
from data import GraphDataset, collate_fn, open_split, read_sizes
from gsmn import GSMN
from model import ContrastiveLoss
from tests import reference
from tests.conftest import GOLDEN, read_log, train_args
from util.cli import InputError
from util.plain_pickle import load_objects
from vocab import deserialize_vocab

# With 36 regions and the usual blocks of 64 numbers, a key's block is larger than its Gram matrix;
# here 5 regions with blocks of 8 or 2.
SIZES = {"gram": dict(embed_size=32, num_block=4), "direct": dict(embed_size=8, num_block=4)}
KINDS = list(itertools.product((False, True), (False, True)))  # is_sparse, neighbours


def make(size="gram", is_sparse=False, neighbours=False, n=4, seed=0, **more):
    """A model in float64, a batch of n pairs, and each caption's dependencies."""
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
    """Both encodings, in float64: the encoders end in float32."""
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
    for weight in (few, torch.randn(4, 4, dtype=torch.float64)):  # pair by pair; in blocks
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
        # The encoders' float32 ends are shared; edges pass through float32 in encode().
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
        for k, length in enumerate(batch["lengths"].tolist()):  # each caption alone, not padded
            alone = {name: x[k : k + 1] for name, x in batch.items() if name != "adjacency"}
            alone["captions"] = alone["captions"][:, :length]
            alone["adjacency"] = batch["adjacency"][k : k + 1, :length, :length]
            _, caption = encode(net, alone)
            torch.testing.assert_close(
                net.similarity(images, caption), want[:, k : k + 1], rtol=1e-5, atol=1e-6
            )


def test_dense_and_sparse_agree_where_no_word_depends_on_itself():
    """Quirk 18: the published text graph sees the node itself only. With neighbours they differ."""
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
    """Quirks 20 and 21: the published quotient of kernels is 0 / 0 here, and a zero has no root."""
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


def test_compiled_scores_are_the_same(monkeypatch):
    """The compiler traces what --compile hands to it; its back end needs a C++ compiler."""
    net, batch, _ = make("gram", True, True, n=2)
    results = []
    for compiled in (False, True):
        if compiled:
            for name in ("word_nodes", "region_nodes", "structure_score"):
                monkeypatch.setattr(gsmn, name, getattr(gsmn, name))  # to be restored
            eager = partial(torch.compile, backend="eager")
            monkeypatch.setattr(torch, "compile", eager)
            net.compile_scores()
        net.zero_grad()
        scores = net.similarity(*encode(net, batch))
        ContrastiveLoss(0.2, True)(scores).backward()
        results.append([scores, *(p.grad for p in net.parameters() if p.requires_grad)])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_caption_loop_of_the_benchmark_is_the_same_score():
    net, batch, _ = make()
    images, captions = encode(net, batch)
    got = reference.gsmn_caption_loop(net, images, captions, batch["boxes"])
    torch.testing.assert_close(got, net.similarity(images, captions), rtol=1e-5, atol=1e-6)


def test_weights_keep_their_published_names_and_shapes():
    (case,) = [folder for folder in GOLDEN if folder.name == "gsmn_dense"]
    state = ckpt.load(str(case / "init.pth.tar"))
    assert state["opt"].model == "gsmn"
    net = ckpt.build_model(state["opt"], 66)
    for ours, theirs in zip(ckpt.state_dicts(net, "gsmn"), state["model"], strict=True):
        assert {k: x.shape for k, x in ours.items()} == {k: x.shape for k, x in theirs.items()}


def published(edit, path="published.pth.tar"):
    """A published-style checkpoint, edited."""
    (case,) = [folder for folder in GOLDEN if folder.name == "gsmn_dense"]
    with torch.serialization.safe_globals(ckpt.SAFE):
        state = torch.load(case / "init.pth.tar", weights_only=True)
    edit(state)
    torch.save(state, path)
    return path


def test_names_of_the_later_revision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    want = ckpt.load(published(lambda state: None))

    def rename(state):
        for k, old, new in (
            (2, "graph_convolution_1.", "vGNN."),
            (3, "graph_convolution_3.", "tGNN."),
        ):
            state["model"][k] = {n.replace(old, new): x for n, x in state["model"][k].items()}

    got = ckpt.load(published(rename))
    assert got["opt"] == want["opt"] and got["opt"].model == "gsmn"
    for a, b in zip(got["model"], want["model"], strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_published_epochs_count_those_finished(tmp_path, monkeypatch):
    """As train.py goes on: SCAN's files name the last epoch, GSMN's how many there were."""
    monkeypatch.chdir(tmp_path)
    assert ckpt.load(published(lambda state: state.update(epoch=3)))["epoch"] == 2


@pytest.mark.parametrize(
    "edit",
    [
        lambda model: model[3].pop("graph_convolution_3.conv_weights.0.weight"),
        lambda model: model[3].pop("out_2.weight_v"),
        lambda model: model[1].pop("embed.weight"),
        lambda model: model[3].update({"out_2.weight_v": torch.ones(3)}),
        lambda model: model.reverse(),
        lambda model: model[2].pop("out_1.bias"),
    ],
)
def test_checkpoints_without_all_weights(tmp_path, monkeypatch, edit):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="published.pth.tar: "):
        path = published(lambda state: edit(state["model"]))
        state = ckpt.load(path)
        ckpt.load_weights(ckpt.build_model(state["opt"], 66), state, path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--feat_dim 8", "--feat_dim 8: a node's vector has one number a block, so expected"),
        ("--num_block 24 --feat_dim 24", "--num_block 24: expected a divisor of embed_size 1024"),
        ("--hid_dim 12", "--hid_dim 12: expected a multiple of the 8 kernels"),
    ],
)
def test_sizes_that_do_not_fit(flags, message):
    opt = options.parse(["--model", "gsmn", *flags.split()])
    with pytest.raises(InputError, match=message):
        ckpt.build_model(opt, 10)


# Data


def dataset(split="train", dependencies=True, **more):
    words = deserialize_vocab("vocab/tiny_precomp_vocab.json")
    return GraphDataset("data/tiny_precomp", split, words, 12, dependencies, **more)


def test_items_and_batches(tiny_graphs):
    data = dataset()
    sizes = np.load("data/tiny_precomp/train_ims_size.npy")
    boxes = np.load("data/tiny_precomp/train_ims_bbx.npy")
    batch = collate_fn([data[7], data[60]])
    w, h = sizes["image_w"][[1, 12]], sizes["image_h"][[1, 12]]
    scale = np.stack([w, h, w, h], 1)[:, None]
    np.testing.assert_allclose(batch["boxes"], boxes[[1, 12]] / scale, rtol=1e-6)
    assert batch["boxes"].max() <= 1
    for row, length in zip(batch["adjacency"], batch["lengths"].tolist(), strict=True):
        # The chain 1 - 2 - ... of the words; <start> and <end> stand alone.
        want = torch.eye(length)
        for i in range(1, length - 2):
            want[i, i + 1] = want[i + 1, i] = 1
        torch.testing.assert_close(row[:length, :length], want)
        assert not row[length:].any() and not row[:, length:].any()


def test_word_ids_come_from_the_precomputed_file_if_there_is_one(tiny_graphs):
    path = tiny_graphs / "data" / "tiny_precomp" / "train_precaps_stan.txt"
    lines = path.read_text().splitlines()
    lines[3] = "1,5,4,2"
    path.write_text("\n".join(lines))
    assert dataset()[3]["captions"].tolist() == [1, 5, 4, 2]
    path.unlink()
    words = deserialize_vocab("vocab/tiny_precomp_vocab.json")
    caption = (path.parent / "train_caps.txt").read_text().splitlines()[3]
    assert dataset()[3]["captions"].tolist() == words.encode(caption)


def test_sizes_of_pickled_dicts_are_read(tiny_graphs):
    path = "data/tiny_precomp/train_ims_size.npy"
    want = read_sizes(path, 20)
    rows = np.load(path)
    as_dicts = [{"image_w": int(w), "image_h": int(h)} for w, h in rows]
    for one in (as_dicts, [{k: np.int64(v) for k, v in row.items()} for row in as_dicts]):
        np.save(path, np.array(one, dtype=object), allow_pickle=True)
        np.testing.assert_array_equal(read_sizes(path, 20), want)
    # As Python 2 wrote it: protocol 2, numpy's old module names.
    objects = pickle.dumps(np.array(as_dicts, dtype=object), protocol=2)
    objects = objects.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|O", "fortran_order": False, "shape": (20,)}
        )
        file.write(objects)
    np.testing.assert_array_equal(read_sizes(path, 20), want)


class Hostile:
    def __init__(self, function, *args):
        self.how = function, args

    def __reduce__(self):
        return self.how


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_hostile_pickle_is_refused_and_nothing_runs(tiny_graphs, wrapped):
    import os

    path = "data/tiny_precomp/train_ims_size.npy"
    evil = Hostile(os.mkdir, "ran")
    row = {"image_w": 1, "image_h": evil} if wrapped else evil
    np.save(path, np.array([row] * 20, dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="refused, a pickle that holds more .*mkdir"):
        read_sizes(path, 20)
    assert not os.path.exists("ran")
    for function in (eval, getattr, np.load, print, np.ndarray, np.frombuffer):
        np.save(path, np.array([Hostile(function, "1")], dtype=object), allow_pickle=True)
        with pytest.raises(InputError, match="refused"):
            load_objects(path)


def write_pickle(path, stream, shape=(1,)):
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|O", "fortran_order": False, "shape": shape}
        )
        file.write(stream)


class Twisted:
    """An array as numpy pickles one, of parts that it would not write."""

    def __init__(self, shape, dtype, content):
        self.state = (1, shape, dtype, False, content)

    def __reduce__(self):
        function, args, _ = np.empty(0).__reduce__()
        return function, args, self.state


class Dtype:
    def __init__(self, name, state):
        self.parts = name, state

    def __reduce__(self):
        name, state = self.parts
        return np.dtype, (name, False, True), state


PLAIN = (3, "|", None, None, None, -1, -1, 63)
FIELDS = (3, "|", None, ("image_w",), {"image_w": (np.dtype("O"), 0)}, 8, 1, 0)


@pytest.mark.parametrize(
    "evil",
    [
        Hostile(np.ndarray, (1,), np.dtype("O"), b"A" * 8),
        Twisted((1,), Dtype("V8", FIELDS), b"A" * 8),  # pointers in the guise of bytes
        Twisted((1,), Dtype("i8", FIELDS), b"A" * 8),
        Twisted((1,), Dtype("O8", PLAIN), b"A" * 8),
        Twisted((10**9,), Dtype("O8", PLAIN), []),
        Twisted((10**9,), Dtype("i8", PLAIN), b""),
        Twisted((-1,), Dtype("i8", PLAIN), b""),
        Hostile(np.float64(0).__reduce__()[0], np.dtype("O"), b"A" * 8),
        Hostile(np.float64(0).__reduce__()[0], np.dtype("i8"), b"A"),
        Hostile(np.float64(0).__reduce__()[0], np.dtype("i8"), b"A" * 16),
        Twisted((1,), Dtype("O,i8", PLAIN), [1]),  # structured by its name
    ],
)
def test_numpy_does_not_read_what_it_should_not(tmp_path, evil):
    """Arrays that are not what they say would let numpy read memory that is not theirs."""
    path = tmp_path / "x.npy"
    for x in (evil, Twisted((1,), Dtype("O8", PLAIN), [{"image_w": evil}])):
        write_pickle(path, pickle.dumps(x, protocol=2).replace(b"_core.multi", b"core.multi"))
        with pytest.raises(InputError, match="x.npy: (refused|not a whole)"):
            load_objects(path)


def test_functions_of_a_pickle_keep_no_state(tmp_path):
    """BUILD would set attributes of what the file names."""
    for name in (b"numpy\ndtype", b"_codecs\nencode", b"numpy\nndarray"):
        stream = b"c" + name + b"\n}S'x'\nI1\nsb."
        write_pickle(tmp_path / "x.npy", stream)
        with pytest.raises(InputError, match="refused.*a function with a state"):
            load_objects(tmp_path / "x.npy")
    write_pickle(tmp_path / "x.npy", b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR.")
    with pytest.raises(InputError, match="refused.*bytes in rot13"):
        load_objects(tmp_path / "x.npy")


def test_arrays_and_numbers_inside_objects(tmp_path):
    rows = [
        {"image_w": np.array(3.0), "name": "a", "b": b"x"},
        {"image_w": np.float32(4), "n": None},
    ]
    for protocol in range(5):  # np.save writes 2 to 4
        stream = pickle.dumps(np.array(rows, dtype=object), protocol)
        write_pickle(tmp_path / "x.npy", stream, (2,))
        first, second = load_objects(tmp_path / "x.npy")
        assert first["image_w"] == 3 and first["name"] == "a" and first["b"] == b"x"
        assert second == {"image_w": 4, "n": None}


def test_an_error_about_endless_rows_ends(tiny_graphs):
    row = []
    for _ in range(60):
        row = [row, row]
    write_pickle("x.npy", pickle.dumps(np.array([{"image_w": row}], dtype=object)))
    with pytest.raises(InputError, match="expected rows with numbers"):
        read_sizes("x.npy", 1)


def test_damaged_sizes(tiny_graphs):
    path = "data/tiny_precomp/train_ims_size.npy"
    np.save(path, np.array([{"image_w": 1, "image_h": 2}] * 20, dtype=object), allow_pickle=True)
    whole = open(path, "rb").read()
    for cut in (3, 60, len(whole) - 20):
        open(path, "wb").write(whole[:cut])
        with pytest.raises(InputError, match="train_ims_size.npy: (not a whole|refused)"):
            read_sizes(path, 20)
    for rows, message in (
        ([{"image_w": 1}] * 20, "expected rows with numbers image_w and image_h"),
        ([3] * 20, "expected rows with numbers image_w and image_h"),
        ([{"image_w": 0, "image_h": 4}] * 20, r"row 0 \(from 0\): an image of \(0.0, 4.0\) pixels"),
        ([{"image_w": 1, "image_h": 4}] * 19, "sizes of shape .19,., expected 20"),
        ({"image_w": 1, "image_h": 4}, r"sizes of shape \(\), expected 20"),
        ([{"image_w": 10**400, "image_h": 4}] * 20, "expected rows with numbers image_w"),
    ):
        np.save(path, np.array(rows, dtype=object), allow_pickle=True)
        with pytest.raises(InputError, match=message):
            read_sizes(path, 20)


def edit_json(path, edit):
    lists = json.loads(path.read_text())
    edit(lists)
    path.write_text(json.dumps(lists))


def test_bad_graph_files(tiny_graphs):
    folder = tiny_graphs / "data" / "tiny_precomp"
    path = folder / "train_caps.json"
    whole = path.read_text()
    for edit, message in (
        (lambda x: x.pop(), "train_caps.json: 99 captions, expected 100"),
        (lambda x: x[4].append([1, -2]), "caption 5: expected a list of .governor, dependent"),
        (lambda x: x[4].append([1, 2, 3]), "caption 5: expected a list of .governor, dependent"),
        (lambda x: x[4].append([1, True]), "caption 5: expected a list of .governor, dependent"),
        (lambda x: x.__setitem__(4, "words"), "caption 5: expected a list of .governor"),
    ):
        edit_json(path, edit)
        with pytest.raises(InputError, match=message):
            dataset()
        path.write_text(whole)
    path.write_text("{}")
    with pytest.raises(InputError, match="no list of captions, expected 100"):
        dataset()
    path.write_text("[[[0, 1")
    with pytest.raises(InputError, match="not a JSON file"):
        dataset()
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no dependencies, which --is_sparse needs"):
        dataset()
    assert dataset(dependencies=False).pairs is None


def test_a_dependency_past_its_caption(tiny_graphs, capsys):
    """With published word ids it is left out, as published; with words of our own, refused."""
    folder = tiny_graphs / "data" / "tiny_precomp"
    want = dataset()[4]["adjacency"]
    edit_json(folder / "train_caps.json", lambda x: x[4].append([99, 1]))
    capsys.readouterr()
    torch.testing.assert_close(dataset()[4]["adjacency"], want)
    out = capsys.readouterr().out
    assert f"caption 5: dependency [99, 1] is past its {len(want)} words; 1 such pairs" in out
    (folder / "train_precaps_stan.txt").unlink()
    edit_json(folder / "train_caps.json", lambda x: x[4].pop(1))
    with pytest.raises(InputError, match=r"caption 5: dependency \[99, 1\] is past its"):
        dataset()
    edit_json(folder / "train_caps.json", lambda x: x[4].pop())
    with pytest.raises(InputError, match="caption 5: . dependencies for its . words; they were"):
        dataset()


def test_boxes_in_another_form_are_noticed(tiny_graphs, capsys):
    path = "data/tiny_precomp/train_ims_bbx.npy"
    boxes = np.load(path)
    dataset()
    assert "warning" not in capsys.readouterr().out
    np.save(path, np.concatenate([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], -1))
    dataset()
    assert "are they left, top, width, height?" in capsys.readouterr().out
    np.save(path, boxes / 1000)
    dataset()
    assert "are they parts of the image already?" in capsys.readouterr().out


def test_dependencies_of_other_captions(tiny_graphs):
    """Each caption with those of a longer one: most are past its end."""
    folder = tiny_graphs / "data" / "tiny_precomp"
    chain = [[i, i + 1] for i in range(20)]
    edit_json(folder / "train_caps.json", lambda x: x.__setitem__(slice(None), [chain] * 100))
    with pytest.raises(InputError, match="past its .* words, and so are .* those of other capt"):
        dataset()


@pytest.mark.parametrize(
    ("flags", "name"),
    [("--is_sparse", "is_sparse"), ("--model gsmn --cross_attn i2t", "cross_attn")],
)
def test_options_of_another_system_are_refused(flags, name, capsys):
    with pytest.raises(SystemExit):
        options.parse(flags.split())
    assert f"--{name} is for --model" in capsys.readouterr().err


def test_word_ids_of_another_vocabulary(tiny_graphs, capsys):
    """Each id one too high is one word too many in front."""
    path = tiny_graphs / "data" / "tiny_precomp" / "train_precaps_stan.txt"
    lines = [line.split(",") for line in path.read_text().splitlines()]

    def write(shifted):
        rows = [
            [a, *(str(4 + (int(x) - 3) % 16) if shifted(x) else x for x in inner), b]
            for a, *inner, b in lines
        ]
        path.write_text("".join(",".join(row) + "\n" for row in rows))

    write(lambda x: True)
    with pytest.raises(InputError, match="word ids are those of .*made with another vocabulary"):
        dataset()
    write(lambda x: int(x) > 14)
    capsys.readouterr()
    dataset()
    assert "were they made with another vocabulary, or captions?" in capsys.readouterr().out
    path.write_text("".join(",".join(row) + "\n" for row in lines))
    captions = path.parent / "train_caps.txt"
    captions.write_text("\n".join(captions.read_text().splitlines()[:80]))
    with pytest.raises(InputError, match="word ids of 100 captions, but .* holds 80"):
        dataset()


def test_bad_word_ids(tiny_graphs):
    path = tiny_graphs / "data" / "tiny_precomp" / "train_precaps_stan.txt"
    lines = path.read_text().splitlines()
    for line, message in (
        ("1,99,2", "line 3 has word ids from 1 to 99, expected from 0 to 19"),
        ("1,-4,2", "line 3 has word ids from -4 to 2"),
        ("a dog", "line 3 is 'a dog', expected word ids such as"),
        ("", "line 3 is '', expected word ids such as"),
    ):
        path.write_text("\n".join([*lines[:2], line, *lines[3:]]))
        with pytest.raises(InputError, match=message):
            dataset()


def test_bad_boxes(tiny_graphs):
    path = tiny_graphs / "data" / "tiny_precomp" / "train_ims_bbx.npy"
    boxes = np.load(path)
    for wrong in (boxes[:-1], boxes[:, :2], boxes[:, :, :3]):
        np.save(path, wrong)
        with pytest.raises(InputError, match=r"boxes of shape .*expected \(20, 4, 4\)"):
            dataset()
    boxes[3, 1, 2] = np.nan
    np.save(path, boxes)
    with pytest.raises(InputError, match=r"train_ims_bbx.npy: row 3 \(from 0\) holds NaN"):
        dataset()
    path.unlink()
    with pytest.raises(FileNotFoundError, match="train_ims_bbx.npy: no boxes, which GSMN needs"):
        dataset()
    boxes[3, 1, 2] = 400
    np.save(path, boxes)
    (path.parent / "train_ims_size.npy").unlink()
    with pytest.raises(FileNotFoundError, match="it holds the images' sizes"):
        dataset()


def test_published_boxes_where_images_straddle_batches(tiny_graphs):
    """The published loop itself, in place on the array, two passes, batches of 8."""
    sizes = np.load("data/tiny_precomp/test_ims_size.npy")
    boxes = np.load("data/tiny_precomp/test_ims_bbx.npy")
    seen = []
    for _ in range(2):
        seen.clear()
        for first in range(0, 75, 8):
            batch = range(first, min(first + 8, 75))
            for n in batch:
                w, h = sizes[n // 5]
                boxes[n // 5] /= np.array([w, h, w, h], np.float32)
            seen += [boxes[n // 5].copy() for n in batch]
    for folds in (False, True):  # five-fold takes each image's own
        data = dataset("test", published_boxes=8, published_folds=folds)
        for image in range(15):
            want = seen[5 * image if folds else image]
            np.testing.assert_allclose(data.image_item(image)["boxes"], want, rtol=1e-5)


# The real programs


def test_training_resume_and_evaluation(tiny_graphs):
    """Two epochs, and one and one more, are the same weights; sparse and dense are an ensemble."""
    flags = dict(model="gsmn", num_block=4, feat_dim=4, hid_dim=16, lambda_softmax=20)
    sparse = {"is_sparse": True, "seed": 1}  # of one seed they would be the same: quirk 18
    for name, more in (("dense", {}), ("sparse", sparse), ("n", {"neighbours": True})):
        run = dict(model_name=name, logger_name=name, num_epochs=2, **flags, **more)
        train.main(train_args(**run))
        run |= dict(model_name=f"{name}_2", logger_name=f"{name}_2", num_epochs=1)
        train.main(train_args(**run))
        train.main(train_args(**run | {"num_epochs": 2}, resume=f"{name}_2/checkpoint_0.pth.tar"))
        whole, resumed = (ckpt.load(f"{x}/checkpoint_1.pth.tar") for x in (name, f"{name}_2"))
        assert len(whole["model"]) == 4 and whole["opt"].model == "gsmn"
        for a, b in zip(whole["model"], resumed["model"], strict=True):
            assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        first, last = read_log(name)
        assert math.isfinite(last["Le"]) and 0 <= last["rsum"] <= 600
    paths = [f"{x}/checkpoint_1.pth.tar" for x in ("dense", "sparse")]
    alone = []
    for path in paths:
        evaluation.evalrank(path, split="test", save_path="one.npy")
        alone.append(np.load("one.npy"))
    metrics = evaluation.evalrank(paths, split="test", save_path="both.npy", fold5=True)
    np.testing.assert_allclose(np.load("both.npy"), np.mean(alone, 0), rtol=1e-6)
    assert len(metrics["folds"]) == 5
    assert not np.allclose(*alone)


def test_command_line(tiny_graphs, capsys):
    train.main(train_args(model="gsmn", num_block=4, feat_dim=4, hid_dim=16, num_epochs=1))
    argv = ["run/model_best.pth.tar", "--data_path", "data", "--split", "test"]
    evaluation.main(argv)
    plain = capsys.readouterr().out
    evaluation.main([*argv, "--published_boxes"])
    assert "Image to text:" in plain and "Image to text:" in capsys.readouterr().out


def test_published_data_without_captions(tiny_graphs):
    """Published GSMN data has word ids alone."""
    folder = tiny_graphs / "data" / "tiny_precomp"
    words = deserialize_vocab("vocab/tiny_precomp_vocab.json")
    (folder / "test_caps.txt").unlink()
    opt = options.parse(["--model", "gsmn", "--img_dim", "12", "--is_sparse"])
    assert open_split(str(folder), "test", words, opt).n_captions == 75


def test_kernels_are_those_of_the_design():
    """Named once more on their own, because a score sees little of them."""
    net, batch, _ = make()
    kernels = net.visual_graph.graph_convolution_1
    w = [reference.log_gaussians(kernels, boxes) for boxes in batch["boxes"]]
    w = torch.stack(w).exp()  # (I, R, R, K)
    want = (w / w.sum(3, keepdim=True)).sum(2)  # (I, R, K)
    torch.testing.assert_close(kernels(batch["boxes"], False), want)
    want = (w / w.sum(2, keepdim=True)).permute(0, 3, 1, 2)  # (I, K, R, R)
    torch.testing.assert_close(kernels(batch["boxes"], True), want)
    assert gsmn.KERNELS == w.size(3)
