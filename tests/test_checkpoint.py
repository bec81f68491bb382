"""Which checkpoints load, what is filled in, what is refused; no code in a file runs."""

import argparse
import collections
import os
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import checkpoint as ckpt
import evaluation
import train
from tests.conftest import GOLDEN, train_args


@pytest.fixture
def published(tiny):
    """A function that writes a checkpoint as the published code does, and returns its path."""
    train.main(train_args(num_epochs=1))
    state = torch.load("run/model_best.pth.tar", weights_only=False)
    for name in ("vocab", "run"):
        del state[name]
    del state["opt"].model

    def write(change=lambda state: None, **options):
        change(state)
        torch.save(state, "published.pth.tar", **options)
        return "published.pth.tar"

    return write


def test_keys_and_parameter_names(tiny):
    """The published programs can read ours."""
    train.main(train_args(num_epochs=2))
    state = torch.load("run/checkpoint_1.pth.tar", weights_only=False)
    assert {"epoch", "model", "best_rsum", "opt", "Eiters"} <= set(state)
    assert state["epoch"] == 1 and state["Eiters"] == 14
    assert type(state["opt"]) is argparse.Namespace
    image, text = state["model"]
    assert list(image) == ["fc.weight", "fc.bias"]
    names = [
        f"rnn.{w}_{g}h_l0{d}" for d in ("", "_reverse") for w in ("weight", "bias") for g in "ih"
    ]
    assert list(text) == ["embed.weight", *names]


@pytest.mark.parametrize("zipped", [True, False])
def test_both_serialisations(published, zipped):
    want = evaluation.evalrank("run/model_best.pth.tar", split="test")
    path = published(_use_new_zipfile_serialization=zipped)
    assert evaluation.evalrank(path, split="test") == want


def test_numpy_numbers_are_admitted(published):
    def change(state):
        state["best_rsum"] = np.float64(12.5)
        state["Eiters"] = state["epoch"] = np.int64(3)

    assert ckpt.load(published(change))["best_rsum"] == 12.5


@pytest.mark.parametrize("core", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_numpy_numbers_of_both_majors(tmp_path, published, core):
    """The module name in a pickle depends on the numpy that wrote it."""
    path = published(
        lambda state: state.update(best_rsum=np.float64(12.5)),
        _use_new_zipfile_serialization=False,
    )
    data = open(path, "rb").read()
    written = re.search(rb"cnumpy\._?core\.multiarray\n", data)[0]
    with open("other.pth.tar", "wb") as file:
        file.write(data.replace(written, b"c" + core + b"\n"))
    assert ckpt.load("other.pth.tar")["best_rsum"] == 12.5


def test_missing_options_come_from_weights_and_paper(published):
    def change(state):
        state["opt"] = argparse.Namespace(data_path="data", data_name="tiny_precomp")

    opt = ckpt.load(published(change))["opt"]
    assert (opt.img_dim, opt.embed_size, opt.word_dim, opt.num_layers) == (12, 16, 8, 1)
    assert opt.bi_gru and opt.precomp_enc_type == "basic" and opt.model == "scan"
    assert (opt.agg_func, opt.cross_attn, opt.lambda_softmax) == ("LogSumExp", "t2i", 9.0)
    assert evaluation.evalrank("published.pth.tar", split="test")["rsum"] > 0


def test_old_weight_norm_scalar_of_one_element(published):
    """PyTorch 0.3 had no 0-d tensors."""
    train.main(train_args(num_epochs=1, precomp_enc_type="weight_norm", model_name="wn"))
    want = evaluation.evalrank("wn/model_best.pth.tar", split="test")
    state = torch.load("wn/model_best.pth.tar", weights_only=False)
    assert sorted(state["model"][0]) == ["fc.bias", "fc.weight_g", "fc.weight_v"]
    state["model"][0]["fc.weight_g"] = state["model"][0]["fc.weight_g"].reshape(1)
    torch.save(state, "old.pth.tar")
    assert evaluation.evalrank("old.pth.tar", split="test") == want


def test_old_tensor_pickles(published, monkeypatch):
    """PyTorch 0.3 rebuilt tensors with `_rebuild_tensor`, which takes fewer arguments."""

    def reduce(self, protocol):
        arguments = self._typed_storage(), 0, tuple(self.shape), self.stride()
        return torch._utils._rebuild_tensor, arguments

    want = evaluation.evalrank("run/model_best.pth.tar", split="test")
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__reduce_ex__", reduce)
        path = published(_use_new_zipfile_serialization=False)
    assert b"_rebuild_tensor\n" in open(path, "rb").read()
    assert evaluation.evalrank(path, split="test") == want


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile_was_here",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["opt", "model", "extra"])
def test_hostile_files_are_refused_and_do_not_run(published, zipped, where):
    def change(state):
        if where == "opt":
            state["opt"].trap = Hostile()
        elif where == "model":
            state["model"][0]["fc.weight"] = Hostile()
        else:
            state["extra"] = Hostile()

    path = published(change, _use_new_zipfile_serialization=zipped)
    for read in (lambda: ckpt.load(path), lambda: train.main(train_args(resume=path))):
        with pytest.raises(ValueError, match="refused, it would run code or load objects"):
            read()
    assert not os.path.exists("hostile_was_here")


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"PK\x03\x04 cut", pickle.dumps({"model": 1}), pickle.dumps([1, 2])],
)
def test_damaged_files_are_named(tmp_path, content):
    path = tmp_path / "x.pth.tar"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="x.pth.tar: not a checkpoint"):
        ckpt.load(str(path))


def test_truncated_checkpoint_is_named(published):
    data = open(published(), "rb").read()
    with open("cut.pth.tar", "wb") as file:
        file.write(data[: len(data) // 2])
    with pytest.raises(ValueError, match="cut.pth.tar: not a checkpoint, or a damaged one"):
        ckpt.load("cut.pth.tar")


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        ckpt.load(str(tmp_path / "no.pth.tar"))
    torch.save({"state_dict": {}}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="not a checkpoint of this family"):
        ckpt.load(str(tmp_path / "x.pth"))


@pytest.mark.parametrize(
    ("states", "system"),
    [
        ([("position_embedding.weight",), ("rnn.weight_ih_l0",)], "pfan"),
        ([("position_embedding.weight", "fc_whole.weight"), ()], "pfan_whole"),
        ([(), (), ("graph_convolution_1.mean_rho",), ()], "gsmn"),
        ([(), (), (), ()], "chan"),
        ([("gpool.linear.weight", "mlp.layers.0.weight"), ("gpool.linear.weight",)], "vse"),
    ],
)
def test_other_systems_are_detected(tmp_path, states, system):
    path = str(tmp_path / "x.pth.tar")
    names = [("fc.weight", *states[0]), ("embed.weight", *states[1]), *states[2:]]
    states = [{name: torch.zeros(2, 2) for name in some} for some in names]
    torch.save({"model": states, "opt": argparse.Namespace()}, path)
    if system != "gsmn":
        assert ckpt.load(path)["opt"].model == system
        return
    with pytest.raises(ValueError, match=f"a checkpoint of {system} without"):
        ckpt.load(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("opt", None),
        ("opt", [("embed_size", 16)]),
        ("opt", {1: 2}),
        ("model", []),
        ("model", [{}]),
        ("model", [{}, {}]),
        ("model", [torch.zeros(2), torch.zeros(2)]),
        ("model", [{1: torch.zeros(2)}, {}]),
        ("model", [{"fc.weight": 1}, {"embed.weight": 2}]),
        ("epoch", "three"),
    ],
)
def test_contents_of_another_kind_are_named(published, name, value):
    path = published(lambda state: state.update({name: value}))
    with pytest.raises(ValueError, match="published.pth.tar: not a checkpoint of this family"):
        ckpt.load(path)


def test_options_of_another_kind_are_named(published):
    path = published(lambda state: setattr(state["opt"], "embed_size", "16"))
    with pytest.raises(ValueError, match="its option embed_size is '16', expected such as 1024"):
        ckpt.load(path)


def test_sizes_are_compared_without_torchs_compiler():
    """Once its import was most of the time that a small evaluation took."""
    code = """
import argparse, sys
import checkpoint, options, systems
from util.state_checks import without_numbers
with without_numbers():
    for name in systems.SYSTEMS.keys() - {"gsmn"}:  # its weight norm needs it
        model = checkpoint.build_model(argparse.Namespace(**options.defaults(name)), 9)
        assert all(x.is_meta for x in model.state_dict().values()), name
assert "torch._dynamo" not in sys.modules
"""
    env = os.environ | {"PYTHONPATH": os.path.dirname(train.__file__)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)


def test_given_vocabulary_must_agree_with_the_checkpoint(tiny):
    train.main(train_args(num_epochs=1))
    path = "run/model_best.pth.tar"
    evaluation.evalrank(path, split="test", vocab_path=tiny / "vocab")
    with pytest.raises(FileNotFoundError, match="no vocabulary file"):
        evaluation.evalrank(path, split="test", vocab_path="no")
    text = (tiny / "vocab" / "tiny_precomp_vocab.json").read_text()
    (tiny / "v.json").write_text(text.replace('"dog": ', '"x": '))
    with pytest.raises(ValueError, match="v.json: not the vocabulary that run/model_best"):
        evaluation.evalrank(path, split="test", vocab_path="v.json")


def test_weights_that_do_not_fit_are_named(published):
    def change(state):
        state["opt"].embed_size = 32

    path = published(change)
    with pytest.raises(ValueError, match=r"fc.weight \(16, 12\) where \(32, 12\) is expected"):
        evaluation.evalrank(path, split="test")


def test_vocabulary_of_another_size_is_refused(published):
    with open("vocab/tiny_precomp_vocab.json") as file:
        text = file.read()
    os.makedirs("other")
    with open("other/tiny_precomp_vocab.json", "w") as file:
        size = len(ckpt.deserialize_vocab("vocab/tiny_precomp_vocab.json"))
        file.write(text.replace('"word2idx": {', f'"word2idx": {{"zebra": {size}, '))
    path = published()
    with pytest.raises(ValueError, match=f"{size + 1} words, but .* was trained with {size}"):
        evaluation.evalrank(path, split="test", vocab_path="other")
    with pytest.raises(ValueError, match=f"{size + 1} words, but .* was trained with {size}"):
        train.main(train_args(resume=path, vocab_path="other"))


def test_vocabulary_places(published, monkeypatch):
    path = os.path.abspath(published())
    want = evaluation.evalrank(path, split="test")  # in the folder that the options name
    os.makedirs("moved/sub")
    shutil.move("vocab/tiny_precomp_vocab.json", "moved/v.json")
    data = os.path.abspath("data")
    monkeypatch.chdir("moved/sub")
    got = evaluation.evalrank(path, data_path=data, split="test", vocab_path="../v.json")
    assert got == want
    with pytest.raises(FileNotFoundError, match="no vocabulary file"):
        evaluation.evalrank(path, data_path=data, split="test")


def test_saving_is_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = str(tmp_path / "run")
    ckpt.prepare(folder)
    ckpt.save({"x": 1}, folder, "checkpoint_0.pth.tar", is_best=True)

    def dies(state, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        ckpt.save({"x": 2}, folder, "checkpoint_0.pth.tar", is_best=True)
    monkeypatch.undo()
    assert sorted(os.listdir(folder)) == ["checkpoint_0.pth.tar", "model_best.pth.tar"]
    monkeypatch.setattr(shutil, "copyfile", lambda a, b: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ckpt.save({"x": 3}, folder, "checkpoint_0.pth.tar", is_best=True)
    assert len(os.listdir(folder)) == 2
    for name in ("checkpoint_0.pth.tar", "model_best.pth.tar"):
        assert torch.load(os.path.join(folder, name)) == {"x": 1}


@pytest.mark.parametrize("name", ["lr[2e-4]", "what?", "a*b", "[!x]", "[", "x]y[", "**", "{a,b}"])
def test_an_earlier_run_is_moved_aside_in_a_folder_of_any_name(tmp_path, name):
    folder = tmp_path / name / "log"
    (tmp_path / "lr2").mkdir()  # what a pattern would find instead
    (tmp_path / "lr2" / "log.jsonl").write_text("of another run")
    names = ["checkpoint_0.pth.tar", "events.out.tfevents.1", "log.jsonl"]
    for k in (0, 1, 2):
        ckpt.prepare(str(folder), ("*.pth.tar", "log.jsonl", "events.out.tfevents.*"))
        assert not [x.name for x in folder.iterdir() if x.is_file()]
        assert len(list(folder.iterdir())) == k
        for file in names:
            (folder / file).write_text(f"run {k}")
    for k in (1, 2):
        aside = folder / f"earlier_{k}"
        assert sorted(x.name for x in aside.iterdir()) == names
        assert {x.read_text() for x in aside.iterdir()} == {f"run {k - 1}"}
    assert (tmp_path / "lr2" / "log.jsonl").read_text() == "of another run"


def test_a_second_run_into_a_folder_with_brackets_loses_nothing(tiny):
    where = {"model_name": "lr[2e-4]", "logger_name": "lr[2e-4]", "num_epochs": 1}
    train.main(train_args(**where))
    first = (tiny / "lr[2e-4]" / "checkpoint_0.pth.tar").read_bytes()
    train.main(train_args(**where, seed=1))
    assert (tiny / "lr[2e-4]" / "earlier_1" / "checkpoint_0.pth.tar").read_bytes() == first
    assert (tiny / "lr[2e-4]" / "earlier_1" / "log.jsonl").is_file()


@pytest.mark.parametrize("case", GOLDEN, ids=lambda path: path.name)
def test_golden_checkpoints_load(case):
    state = ckpt.load(str(case / "init.pth.tar"))
    assert isinstance(state["model"][0], collections.OrderedDict)
    whole = "whole" in case.name
    assert state["opt"].model == ("pfan_whole" if whole else case.name.partition("_")[0])
