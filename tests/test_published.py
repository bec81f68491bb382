"""Checkpoints of other programs: wrapped weights, options of their own, names of relatives."""

import argparse
import os
import pathlib
import pickle
import types
from collections import OrderedDict

import numpy as np
import pytest
import torch

import checkpoint as ckpt
import evaluation
import train
from tests.conftest import train_args
from util.cli import InputError


@pytest.fixture
def saved(tiny):
    """A checkpoint of a tiny run, its recalls, and a function that writes a changed one."""
    train.main(train_args(num_epochs=1))
    state = torch.load("run/model_best.pth.tar", weights_only=False)

    def write(change, ours=False, **options):
        if not ours:
            for name in ("vocab", "run"):
                del state[name]
            del state["opt"].model
        change(state)
        torch.save(state, "changed.pth.tar", **options)
        return "changed.pth.tar"

    return evaluation.evalrank("run/model_best.pth.tar", split="test"), write


def prefixed(state: dict, prefix: str) -> OrderedDict:
    return OrderedDict((prefix + name, x) for name, x in state.items())


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize(
    ("image", "text"),
    [
        ("module.", "module."),
        ("_orig_mod.", "_orig_mod."),
        ("", "module."),
        ("module._orig_mod.", "_orig_mod.module."),
        ("module.module.", "_orig_mod._orig_mod.module._orig_mod."),
    ],
)
def test_prefixes_of_wrappers(saved, ours, image, text):
    want, write = saved

    def change(state):
        state["model"] = [
            prefixed(x, p) for x, p in zip(state["model"], (image, text), strict=True)
        ]

    path = write(change, ours)
    assert evaluation.evalrank(path, split="test") == want
    train.main(train_args(resume=path, num_epochs=2))


def test_a_part_of_an_encoder_may_be_compiled(saved):
    want, write = saved

    def change(state):
        text = state["model"][1]
        state["model"][1] = {x.replace("rnn.", "module.rnn._orig_mod."): text[x] for x in text}
        assert "module.rnn._orig_mod.weight_hh_l0_reverse" in state["model"][1]
        embed = state["model"][1].pop("embed.weight")
        state["model"][1]["module.embed.weight"] = embed

    assert evaluation.evalrank(write(change), split="test") == want


def test_prefixes_of_some_names_only_are_not_guessed(saved):
    _, write = saved

    def change(state):
        state["model"][0]["module.fc.bias"] = state["model"][0].pop("fc.bias")

    with pytest.raises(InputError, match="no fc.bias; unknown module.fc.bias; is it of another"):
        evaluation.evalrank(write(change), split="test")


def own_values() -> dict:
    """Options that only the program which wrote them reads."""
    return {
        "device": torch.device("cuda:1"),
        "out": pathlib.Path("runs") / "x",
        "root": pathlib.PureWindowsPath("C:\\data\\x"),
        "dtype": torch.bfloat16,
        "size": torch.Size([2, 3]),
        "means": np.arange(3, dtype=np.float32),
        "names": np.array(["a", {"b": 1}], dtype=object),
        "step": np.int32(7),
        "flag": np.bool_(True),
        "kinds": {1, 2},
        "fixed": frozenset({3}),
        "range": range(2, 8, 3),
        "slice": slice(1, None),
        "table": OrderedDict(a=[pathlib.Path("x"), torch.device("cpu")]),
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_options_of_other_programs(saved, zipped):
    want, write = saved

    def change(state):
        vars(state["opt"]).update(own_values())
        state["opt"].data_path = pathlib.Path("data")
        state["opt"].vocab_path = pathlib.Path("vocab")

    path = write(change, _use_new_zipfile_serialization=zipped)
    assert evaluation.evalrank(path, split="test") == want
    opt = ckpt.load(path)["opt"]
    assert (opt.device, opt.dtype, opt.data_path) == ("cuda:1", "torch.bfloat16", "data")
    assert opt.out == str(pathlib.Path("runs/x")) and opt.root == "C:\\data\\x"
    assert opt.table["a"][0] == "x" and opt.step == 7 and opt.flag and opt.kinds == {1, 2}
    np.testing.assert_array_equal(opt.means, np.float32([0, 1, 2]))
    assert opt.names.tolist() == ["a", {"b": 1}]


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
@pytest.mark.parametrize("kind", ["PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"])
def test_paths_of_all_pythons_and_systems(saved, module, kind):
    """Python 3.13 names another module, and no machine has both kinds of path."""
    want, write = saved
    path = write(
        lambda state: vars(state["opt"]).update(out=pathlib.PurePosixPath("runs", "x")),
        _use_new_zipfile_serialization=False,
    )
    data = open(path, "rb").read()
    own = f"c{pathlib.PurePosixPath.__module__}\nPurePosixPath\n".encode()
    assert data.count(own) == 1
    name = f"c{module}\n{kind}\n".encode()
    with open(path, "wb") as file:
        file.write(data.replace(own, name))
    assert ckpt.load(path)["opt"].out.replace("\\", "/") == "runs/x"
    assert evaluation.evalrank(path, split="test") == want


@pytest.mark.parametrize("kind", [dict, OrderedDict, lambda x: types.SimpleNamespace(**x)])
@pytest.mark.parametrize("ours", [True, False])
def test_options_in_a_dict(saved, kind, ours):
    want, write = saved
    path = write(lambda state: state.update(opt=kind(vars(state["opt"]) | own_values())), ours)
    assert evaluation.evalrank(path, split="test") == want
    assert isinstance(ckpt.load(path)["opt"], argparse.Namespace)


def test_options_of_a_run_may_have_other_types(saved):
    want, write = saved
    path = write(lambda state: vars(state["opt"]).update(device=0, resume=False, workers="4"))
    assert evaluation.evalrank(path, split="test") == want
    assert ckpt.load(path)["opt"].workers == 10


class Hostile:
    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


class Unknown:
    pass


class Disguised:
    """An array that lies about its content: numpy itself would read memory that is not its own."""

    def __init__(self, dtype, content):
        self.state = (1, (1,), dtype, False, content)

    def __reduce__(self):
        function, args, _ = np.empty(0).__reduce__()
        return function, args, self.state


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("as_dict", [True, False])
@pytest.mark.parametrize(
    "evil",
    [
        Hostile(os.mkdir, "ran"),
        Hostile(pathlib.Path.mkdir, pathlib.Path("ran")),
        Hostile(eval, "1"),
        Hostile(getattr, "x", "join"),
        Hostile(types.SimpleNamespace, "x"),
        Hostile(pathlib.PurePosixPath, 1),
        Hostile(np.ndarray, (1,), np.dtype("f8"), b"A" * 8),
        Hostile(np.dtype, [("x", "O")]),
        Disguised(np.dtype("O"), b"A" * 8),
        Disguised(np.dtype("i8"), b"A"),
        Unknown(),
        Unknown,
    ],
)
def test_what_is_not_plain_is_refused_and_nothing_runs(
    tmp_path, monkeypatch, evil, as_dict, zipped
):
    monkeypatch.chdir(tmp_path)
    opt = {"nested": [{"trap": evil}]} if as_dict else argparse.Namespace(trap=evil)
    state = {"model": [{"fc.weight": torch.zeros(2, 2)}, {"embed.weight": torch.zeros(2, 2)}]}
    torch.save(state | {"opt": opt}, "x.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match="x.pth: (refused, it would run|not a checkpoint, or)"):
        ckpt.load("x.pth")
    assert not os.path.exists("ran")


GRU = ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]
FC, WORDS = ["fc.weight", "fc.bias"], ["embed.weight", *(f"rnn.{x}" for x in GRU)]
POOL = [*(f"gpool.gru.{x}{d}" for x in GRU for d in ("", "_reverse")), "gpool.linear.weight"]
BERT = ["bert.embeddings.word_embeddings.weight", "bert.pooler.dense.weight", "linear.weight"]
GCN = [f"Rs_GCN_{k}.g.weight" for k in range(1, 5)]
SIM = ["v_global_w.embedding_local.0.weight", "sim_tranloc_w.weight", "sim_eval_w.bias"]
RELATIVES = {
    "VSE-infinity on raw images": [
        [["backbone.base.0.weight", *(f"image_encoder.{x}" for x in FC + POOL)], [*BERT, *POOL]],
    ],
    "VSE\\+\\+": [
        [["cnn.module.conv1.weight", "cnn.module.layer1.0.bn1.bias", *FC], WORDS],
        [["cnn.features.module.0.weight", "cnn.classifier.0.weight", *FC], WORDS],
    ],
    "VSRN": [[[*FC, "img_rnn.weight_ih_l0", *GCN], WORDS]],
    "SGRAF": [
        [FC, ["embed.weight", *(f"cap_rnn.{x}" for x in GRU)], [*SIM, "SGR_module.0.w.weight"]],
        [FC, WORDS, [*SIM, "SAF_module.attn_sim_w.weight", "SAF_module.bn.running_var"]],
    ],
    "CAMERA": [[[*FC, "agsa.proj_lin.0.weight", "mvs.conv.0.weight"], BERT]],
}


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
@pytest.mark.parametrize(
    ("program", "names"), [(name, x) for name, all_ in RELATIVES.items() for x in all_]
)
def test_relatives_are_called_by_their_names(tmp_path, program, names, prefix):
    path = tmp_path / "x.pth"
    states = [{prefix + name: torch.zeros(4, 4) for name in part} for part in names]
    torch.save({"model": states, "opt": argparse.Namespace(), "epoch": 3}, path)
    said = f"x.pth: a checkpoint of {program} .*, which this project does not have; it has scan, "
    with pytest.raises(InputError, match=said):
        ckpt.load(str(path))


def test_a_relative_that_saves_one_state_dict(tmp_path):
    """IMRAM saves the whole model under DataParallel."""
    names = ["img_enc.fc_local.weight", "txt_enc.embed.weight", "gate_t2i.weight"]
    for prefix in ("", "module."):
        state = {prefix + name: torch.zeros(4, 4) for name in names}
        torch.save({"model": state, "opt": argparse.Namespace()}, tmp_path / "x.pth")
        with pytest.raises(InputError, match="x.pth: a checkpoint of IMRAM"):
            ckpt.load(str(tmp_path / "x.pth"))
    torch.save({"model": {"a": torch.zeros(1)}, "opt": argparse.Namespace()}, tmp_path / "x.pth")
    with pytest.raises(InputError, match="expected 'model' to be a list of state dicts, one for"):
        ckpt.load(str(tmp_path / "x.pth"))


@pytest.mark.parametrize(
    ("own", "program"),
    [
        ({"measure": "cosine", "cnn_type": "vgg19", "use_abs": False}, "VSE\\+\\+"),
        ({"focal_type": "equal", "lambda_softmax": 20.0}, "BFAN"),
        ({"thres": 0.1, "thres_safe": 0.0}, "NAAF"),
    ],
)
def test_relatives_with_weights_like_scan_are_known_by_their_options(saved, own, program):
    def change(state):
        opt = {name: x for name, x in vars(state["opt"]).items() if name != "cross_attn"}
        state["opt"] = argparse.Namespace(**opt | own)

    with pytest.raises(InputError, match=f"a checkpoint of {program} "):
        ckpt.load(saved[1](change))


def test_weights_of_an_unknown_program_are_not_called_a_matter_of_options(saved):
    _, write = saved
    path = write(lambda state: state["model"][0].update({"tower.weight": torch.zeros(2)}))
    with pytest.raises(
        InputError, match="unknown tower.weight; is it of another program than scan"
    ):
        evaluation.evalrank(path, split="test")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<!DOCTYPE html><html>Sign in</html>", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "it is a git-LFS pointer"),
        (b"", "it is an empty file"),
        (b"\x1f\x8b\x08\x00cut", "it is a file compressed with gzip"),
        (pickle.dumps({"model": 1}, 2)[:-4], "it is a Python pickle"),
    ],
)
def test_files_of_another_kind_are_named(tmp_path, content, said):
    (tmp_path / "x.pth.tar").write_bytes(content)
    with pytest.raises(InputError, match=f"x.pth.tar: not a checkpoint, or a damaged one .*{said}"):
        ckpt.load(str(tmp_path / "x.pth.tar"))
    with pytest.raises(FileNotFoundError, match="a folder; give a checkpoint in it"):
        ckpt.load(str(tmp_path))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "kind",
    [
        np.int64,
        np.int16,
        np.float32,
        float,
        np.array,
        torch.tensor,
        lambda x: torch.tensor(x + 0.0),
    ],
)
def test_numbers_of_other_types(saved, kind, zipped):
    want, write = saved

    def change(state):
        for name in ("embed_size", "num_layers", "img_dim", "batch_size", "num_epochs"):
            setattr(state["opt"], name, kind(getattr(state["opt"], name)))
        state["opt"].bi_gru, state["opt"].lambda_softmax = kind(1), kind(9)
        state["best_rsum"] = kind(5)

    path = write(change, _use_new_zipfile_serialization=zipped)
    assert evaluation.evalrank(path, split="test") == want
    opt = ckpt.load(path)["opt"]
    assert [type(x) for x in (opt.embed_size, opt.num_layers, opt.batch_size)] == [int] * 3
    assert opt.bi_gru is True and opt.lambda_softmax == 9
    train.main(train_args(resume=path, num_epochs=2))


@pytest.mark.parametrize(
    ("name", "value"),
    [("embed_size", x) for x in ([16], {"a": 1}, -16, 16.5, True, float("nan"), float("inf"))]
    + [("num_layers", np.array([1])), ("bi_gru", "yes"), ("bi_gru", 2), ("lambda_softmax", [9.0])]
    + [("precomp_enc_type", 1), ("img_dim", np.float64(-1)), ("word_dim", torch.ones(2))],
)
@pytest.mark.parametrize("ours", [True, False])
def test_options_of_the_model_of_another_type_are_named(saved, ours, name, value):
    path = saved[1](lambda state: setattr(state["opt"], name, value), ours)
    with pytest.raises(InputError, match=f"its option {name} is .*, expected such as"):
        ckpt.load(path)


@pytest.mark.parametrize("ours", [True, False])
def test_parts_of_an_encoder_under_data_parallel(saved, ours):
    want, write = saved

    def change(state):
        image, text = state["model"]
        image = {x.replace("fc.", "fc.module."): y for x, y in image.items()}
        text = {x.replace("rnn.", "rnn.module.module."): y for x, y in text.items()}
        state["model"] = [image, {x.replace("embed.", "embed.module."): y for x, y in text.items()}]

    assert evaluation.evalrank(write(change, ours), split="test") == want


def test_a_part_that_is_wrapped_in_part_is_not_guessed(saved):
    def change(state):
        state["model"][0]["fc.module.bias"] = state["model"][0].pop("fc.bias")

    with pytest.raises(InputError, match="no fc.bias; unknown fc.module.bias"):
        evaluation.evalrank(saved[1](change), split="test")
