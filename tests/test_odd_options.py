"""Whatever options a checkpoint holds, they pass the checks of the command line, or are refused."""

import argparse
import copy
import math
from collections import OrderedDict
from functools import partial

import pytest
import torch

import checkpoint as ckpt
import run_state
import systems
from tests.hostile import HUGE, refusal, trained
from util.cli import InputError


@pytest.fixture
def refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there is no ./data/
    return partial(refusal, tmp_path)


def read(path: str):
    return run_state.read_options(["--resume", path])


@pytest.mark.parametrize(
    ("name", "x"),
    [("batch_size", -3), ("batch_size", 0), ("batch_size", "16"), ("batch_size", [16])]
    + [("batch_size", 1.5), ("batch_size", True), ("batch_size", 10**40), ("num_epochs", [3])]
    + [("learning_rate", math.nan), ("learning_rate", -1.0), ("learning_rate", "x")]
    + [("learning_rate", math.inf), ("lr_update", 0), ("grad_clip", -1.0), ("seed", -1)]
    + [("seed", 10**30), ("data_path", 3), ("data_path", "a\0b"), ("data_path", "x" * 10**6)]
    + [("data_name", ["a"]), ("optim", "rmsprop"), ("optim", None), ("criterion", "Other")]
    + [("criterion", {}), ("margin", -0.1), ("temperature", 0.0), ("obj_drop_rate", 1.0)]
    + [("max_violation", "yes"), ("amp", 2), ("val_step", -1), ("log_step", 0), ("drop", "no")]
    + [("vse_mean_warmup_epochs", -1), ("keep", -1), ("lambda_softmax", 0.0), ("cross_attn", 3)]
    + [("tracker", "x"), ("wemb_path", 1), ("precomp_enc_type", [])],
)
def test_options_pass_the_check_of_their_flags(refused, name, x):
    if x is None:
        x = torch.zeros(3)
    said = refused(lambda state: setattr(state["opt"], name, x))
    assert f"its option {name} is " in said or f"{name}" in said
    assert "expected" in said


def test_a_given_flag_takes_the_place_of_an_odd_option(tmp_path):
    state = copy.deepcopy(trained())
    state["opt"].batch_size = "many"
    torch.save(state, tmp_path / "x.pth.tar")
    path = str(tmp_path / "x.pth.tar")
    with pytest.raises(InputError, match="its option batch_size is 'many', .* give --batch_size"):
        run_state.read_options(["--resume", path])
    assert run_state.read_options(["--resume", path, "--batch_size", "16"])[0].batch_size == 16
    ckpt.load_model(path)  # an evaluation does not read it


def endless() -> list:
    """A list whose repr() has 10^20 characters."""
    x = ["x"]
    for _ in range(40):
        x = [x, OrderedDict(a=x), x]
    return x


@pytest.mark.parametrize(
    "x", [endless(), 10**600, "a\nb" * 10**5, torch.zeros(1).expand(HUGE)], ids=range(4)
)
@pytest.mark.parametrize("name", ["embed_size", "model", "vocab_size", "bert_config", "bi_gru"])
def test_messages_have_a_bound(refused, name, x):
    if name == "bert_config" and isinstance(x, list):
        x = {"vocab_size": x}
    said = refused(lambda state: setattr(state["opt"], name, x))
    assert len(said) < 700


def test_endless_lists_and_long_ranges(tmp_path):
    """What no one reads does not matter; what would fill the memory is refused."""
    path = str(tmp_path / "x.pth.tar")
    state = copy.deepcopy(trained())
    state["opt"].more = endless()
    torch.save(state, path)
    width = ckpt.load(path)["opt"].embed_size
    assert width == 8
    state["opt"].more = range(10**12)
    torch.save(state, path)
    with pytest.raises(InputError, match="not a checkpoint, or a damaged one"):
        ckpt.load(path)


# Sizes that the weights do not have

SIZES = ["num_layers", "embed_size", "word_dim", "img_dim"]
OF_SYSTEMS = {
    "scan": SIZES,
    "gsmn": [*SIZES, "feat_dim", "num_block", "hid_dim", "out_dim"],
    "pfan": [*SIZES, "split_size", "position_embed_size"],
    "pfan_whole": [*SIZES, "split_size", "position_embed_size"],
    "chan": SIZES,
    "vse": SIZES,
}


@pytest.mark.parametrize("system", systems.SYSTEMS)
def test_sizes_that_the_weights_do_not_have(refused, system):
    gsmn = {"num_block": 2, "feat_dim": 2, "hid_dim": 8} if system == "gsmn" else {}
    bi_gru = None if system in ("chan", "vse") else True
    flags = gsmn | {"model": system, "bi_gru": bi_gru}
    state = trained(**flags)
    words = "disagree", "do not fit", "no model"
    for name in OF_SYSTEMS[system]:
        for x in (10**9, 3 if getattr(state["opt"], name) != 3 else 5):

            def change(state, name=name, x=x):
                setattr(state["opt"], name, x)

            said = refused(change, read, **flags)
            assert any(word in said for word in words), said
    said = refused(change, ckpt.load_model, **flags)
    assert any(word in said for word in words), said


def test_many_layers_and_wide_ones(refused):
    for name, x in (("num_layers", 10**9), ("embed_size", 10**18), ("img_dim", 1e30)):
        assert "its " in refused(lambda state: setattr(state["opt"], name, x), ckpt.load_model)  # noqa: B023


def test_a_vocabulary_of_another_size(refused):
    def change(state):
        words = state["vocab"]["word2idx"]
        words["zebra"] = len(words)

    assert "words, but " in refused(change)


def test_published_options_may_lack_a_type(tmp_path):
    """What a run of another program stored is replaced by a default in an evaluation only."""
    state = copy.deepcopy(trained())
    del state["run"], state["opt"].model
    state["opt"] = argparse.Namespace(**vars(state["opt"]) | {"workers": "4", "log_step": None})
    torch.save(state, tmp_path / "x.pth.tar")
    assert run_state.read_options(["--resume", str(tmp_path / "x.pth.tar")])[0].log_step == 10
