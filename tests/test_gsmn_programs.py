"""GSMN in the programs: its options, its published checkpoints, training and evaluation."""

import math

import numpy as np
import pytest
import torch

import checkpoint as ckpt
import evaluation
import options
import systems
import train
from tests.conftest import GOLDEN, read_log, train_args
from util.cli import InputError
from vocab import deserialize_vocab


def test_weights_keep_their_published_names_and_shapes():
    (case,) = [folder for folder in GOLDEN if folder.name == "gsmn_dense"]
    state = ckpt.load(str(case / "init.pth.tar"))
    assert state["opt"].model == "gsmn"
    net = ckpt.build_model(state["opt"], 66)
    for ours, theirs in zip(ckpt.state_dicts(net, state["opt"]), state["model"], strict=True):
        assert {k: x.shape for k, x in ours.items()} == {k: x.shape for k, x in theirs.items()}


def published(edit, path="published.pth.tar"):
    """Write a checkpoint in the published form, edited, and return its path."""
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
    """SCAN's files hold the last epoch, GSMN's the number of epochs; train.py goes on right."""
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
        (
            "--feat_dim 8",
            "--feat_dim 8: the vector of a node has one number per block, so expected",
        ),
        ("--num_block 24 --feat_dim 24", "--num_block 24: expected a divisor of embed_size 1024"),
        ("--hid_dim 12", "--hid_dim 12: expected a multiple of the 8 kernels"),
    ],
)
def test_sizes_that_do_not_fit(flags, message):
    opt = options.parse(["--model", "gsmn", *flags.split()])
    with pytest.raises(InputError, match=message):
        ckpt.build_model(opt, 10)


@pytest.mark.parametrize(
    ("flags", "name"),
    [("--is_sparse", "is_sparse"), ("--model gsmn --cross_attn i2t", "cross_attn")],
)
def test_options_of_another_system_are_refused(flags, name, capsys):
    with pytest.raises(SystemExit):
        options.parse(flags.split())
    assert f"--{name} is for --model" in capsys.readouterr().err


def test_training_resume_and_evaluation(tiny_graphs):
    """A resumed run gives the weights of an unbroken one; sparse and dense are an ensemble."""
    flags = dict(model="gsmn", num_block=4, feat_dim=4, hid_dim=16, lambda_softmax=20)
    sparse = {"is_sparse": True, "seed": 1}  # with the same seed they would be equal: quirk 18
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
    """Published GSMN data has only word ids."""
    folder = tiny_graphs / "data" / "tiny_precomp"
    words = deserialize_vocab("vocab/tiny_precomp_vocab.json")
    (folder / "test_caps.txt").unlink()
    opt = options.parse(["--model", "gsmn", "--img_dim", "12", "--is_sparse"])
    assert systems.open_split(str(folder), "test", words, opt).n_captions == 75
