"""Odd tensors and odd numbers in a checkpoint are refused in one line before they are used."""

import copy
import math
from collections import OrderedDict
from functools import partial

import pytest
import torch

import checkpoint as ckpt
import run_state
from tests.hostile import HUGE, go_on, odd_tensors, refusal, trained

ADVICE = "--reset_start_epoch takes only its weights"


@pytest.fixture
def refused(tmp_path):
    return partial(refusal, tmp_path)


ODD = [*odd_tensors(torch.ones(4, 3))]


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("part", [0, 1])
def test_odd_weights(refused, part, kind):
    def change(state):
        name = ("fc.weight", "rnn.weight_hh_l0")[part]
        state["model"][part][name] = odd_tensors(state["model"][part][name])[kind]

    assert "its weight " in refused(change)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_weights_of_whole_numbers(refused, dtype):
    def change(state):
        state["model"][0]["fc.weight"] = state["model"][0]["fc.weight"].to(dtype)

    assert "of dtype" in refused(change)


@pytest.mark.parametrize("name", ["a" * 10**6, "a\nb", "x.module." * 20_000, "\x1b[2J"])
def test_names_of_weights(refused, name):
    said = refused(lambda state: state["model"][1].update({name: torch.zeros(1)}))
    assert "is no name of a weight" in said


def test_too_many_weights(refused):
    many = OrderedDict((f"a{k}.module.x", torch.zeros(1)) for k in range(6000))
    assert "more than 5000 weights" in refused(lambda state: state["model"].__setitem__(1, many))


def test_half_precision_and_transposed_weights_are_taken(tmp_path):
    state = copy.deepcopy(trained())
    image = state["model"][0]
    image["fc.weight"] = image["fc.weight"].T.contiguous().T
    image["fc.bias"] = image["fc.bias"].half()
    torch.save(state, tmp_path / "x.pth.tar")
    model, *_ = ckpt.load_model(str(tmp_path / "x.pth.tar"))
    assert torch.equal(model.img_enc.fc.weight, trained()["model"][0]["fc.weight"])


# The state of the optimizer


OPTIMIZERS = {
    "Adam": ({}, ["exp_avg", "exp_avg_sq"]),
    "AdamW": ({"model": "vse", "bi_gru": None}, ["exp_avg", "exp_avg_sq"]),
    "SGD": ({"optim": "sgd"}, ["momentum_buffer"]),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_odd_tensors_in_the_state_of_the_optimizer(refused, optimizer):
    """A fused step reads past the end of a short state, and the process dies."""
    flags, names = OPTIMIZERS[optimizer]
    state = trained(**flags)
    k, kept = max(state["run"]["optimizer"]["state"].items(), key=lambda x: x[1][names[0]].ndim)
    x = kept[names[0]]
    assert x.ndim == 2
    changed = {
        "short": torch.zeros(1),
        "flat": x.reshape(-1),
        "transposed": torch.zeros(x.shape[::-1]).T,
        "long": torch.zeros(*x.shape, 2),
        "double": x.double(),
        "whole": x.long(),
        "none": None,
        "list": [0.0] * 3,
    } | odd_tensors(x)
    for name in names:
        for odd in changed.values():
            said = refused(
                lambda state, name=name, odd=odd: state["run"]["optimizer"]["state"][k].update(
                    {name: odd}
                ),
                **flags,
            )
            assert f"its run state does not fit (optimizer: state {k}" in said and ADVICE in said


@pytest.mark.parametrize(
    ("name", "x"),
    [("step", torch.tensor(-1.0)), ("step", torch.tensor(math.nan)), ("step", torch.zeros(2))]
    + [("step", 3), ("exp_avg_sq", None), ("more", torch.zeros(1))],
)
def test_odd_values_in_the_state_of_the_optimizer(refused, name, x):
    def change(state):
        kept = state["run"]["optimizer"]["state"][0]
        kept[name] = -kept[name] if x is None else x

    assert "optimizer: state 0" in refused(change)


def test_two_states_in_one_memory(refused):
    def change(state):
        kept = state["run"]["optimizer"]["state"][0]
        kept["exp_avg"] = kept["exp_avg_sq"]

    assert "lies in the memory of another one" in refused(change)


def set_group(**values):
    return lambda saved: saved["param_groups"][0].update(values)


@pytest.mark.parametrize(
    "change",
    [
        lambda saved: saved["state"].pop(0) and saved["state"].update({10**9: {}}),
        lambda saved: saved["state"].update({-1: {}}),
        lambda saved: saved["state"].update({"0": {}}),
        lambda saved: saved["state"].update({0: {}}),
        lambda saved: saved.update(state=[]),
        lambda saved: saved.pop("state"),
        lambda saved: saved.update(param_groups=[]),
        lambda saved: saved["param_groups"].append({"params": []}),
        lambda saved: saved.update(param_groups=[None]),
        set_group(params=[0]),
        set_group(params=[torch.zeros(1).expand(HUGE)]),
        set_group(params=HUGE),
        set_group(lr=math.nan),
        set_group(lr=-1.0),
        set_group(lr="0.1"),
        set_group(scale=math.inf),
        set_group(betas=(0.9, math.nan)),
        set_group(betas=(0.9,)),
        set_group(betas=0.9),
        set_group(eps=-1e-8),
        set_group(weight_decay=torch.zeros(2)),
    ],
)
def test_odd_groups_of_the_optimizer(refused, change):
    said = refused(lambda state: change(state["run"]["optimizer"]))
    assert "its run state does not fit (optimizer" in said


def test_how_a_step_is_computed_is_not_the_choice_of_the_file(tmp_path):
    state = copy.deepcopy(trained())
    state["run"]["optimizer"]["param_groups"][0].update(
        fused=False, amsgrad=True, capturable=True, maximize=True, foreach=True, betas=(0.5, 0.9)
    )
    torch.save(state, tmp_path / "x.pth.tar")
    group = go_on(str(tmp_path / "x.pth.tar")).param_groups[0]
    assert group["fused"] and group["betas"] == (0.5, 0.9)
    assert not any(group[name] for name in ("amsgrad", "capturable", "maximize", "foreach"))


@pytest.mark.parametrize(
    ("name", "x"),
    [
        ("rng", torch.zeros(10, dtype=torch.uint8)),
        ("rng", torch.zeros(5056)),
        ("rng", torch.zeros(5056, dtype=torch.uint8)),
        ("rng", torch.zeros(1, dtype=torch.uint8).expand(5056)),
        ("rng", None),
        ("rng", "x"),
        ("cuda_rng", None),
        ("cuda_rng", [torch.zeros(1)]),
        ("cuda_rng", [b"x"]),
        ("criterion", {"temperature": torch.zeros(1)}),
        ("criterion", None),
        ("optimizer", None),
    ],
)
def test_odd_random_states_and_criteria(refused, name, x):
    assert ADVICE in refused(lambda state: state["run"].update({name: x}))


# The place of the run

ODD_NUMBERS = ["3", [3], None, {}, math.nan, math.inf, -3, 10**30, True, torch.ones(2)]


@pytest.mark.parametrize("x", ODD_NUMBERS, ids=lambda x: str(x)[:20])
@pytest.mark.parametrize(
    "name", ["epoch", "batch", "Eiters", "loss_sum", "loss_count", "best_rsum"]
)
def test_odd_places(refused, name, x):
    if name == "loss_sum" and isinstance(x, int) and x == -3:
        return
    said = refused(lambda state: state["run"].update({name: x}))
    assert f"its run state does not fit ({name} is " in said and "expected a" in said
    assert ADVICE in said


@pytest.mark.parametrize(
    ("name", "x"),
    [("val_due", 1), ("val_due", "yes"), ("n_captions", -1), ("n_captions", "20")]
    + [("epoch", 1.0), ("batch", 0.5), ("batch", 3), ("best_rsum", 601), ("best_rsum", -2)]
    + [("epoch", 10**6 + 1)],
)
def test_places_that_no_run_comes_to(refused, name, x):
    """20 captions in batches of 16 are two batches."""
    assert f"its run state does not fit ({name} is " in refused(
        lambda state: state["run"].update({name: x})
    )


@pytest.mark.parametrize("name", ["epoch", "Eiters", "best_rsum"])
def test_odd_places_of_a_published_checkpoint(refused, name):
    for x in ("3", [3], math.nan, -3, 10**30, True):

        def change(state, x=x):
            state[name] = x
            del state["run"]

        said = refused(change)
        assert f"{name} is " in said or "expected 'epoch' to be a number" in said


@pytest.mark.parametrize("name", run_state.PLACE)
def test_missing_places(refused, name):
    assert f"no {name}, expected" in refused(lambda state: state["run"].pop(name))
    assert "run is " in refused(lambda state: state.update(run=[1]))
