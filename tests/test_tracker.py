"""util/tracker.py: what a tracker gets, and what happens if it is missing or fails."""

import sys
import types

import numpy as np
import pytest
import torch

from util.cli import InputError
from util.tracker import PROJECT, PROJECTS, open_tracker

NAMES = {"runs/x": "runs/x", "./runs/x/": "runs/x", "/data/../runs": "data/runs"}


class Fake(types.ModuleType):
    """A tracker's module that notes its calls, and fails at the calls named in `bad`."""

    def __init__(self, bad=()):
        super().__init__("fake")
        self.calls, self.bad = [], bad

    def note(self, call, *args, **settings):
        self.calls.append((call, *args, *([settings] if settings else [])))
        if call in self.bad:
            raise ConnectionError("no route to host\nsecond line")

    def init(self, **settings):
        self.note("init", **settings)

    def log(self, values, step):
        self.note("log", step, values)

    def finish(self):
        self.note("finish")

    def Image(self, array):
        self.note("Image")
        return array.shape, array.dtype, len(np.unique(array))


@pytest.fixture(params=PROJECTS)
def kind(request):
    return request.param


def opened(monkeypatch, kind, bad=()):
    """A tracker and its module; the calls of the start are not among those of the module."""
    module = Fake(bad)
    monkeypatch.setitem(sys.modules, kind, module)
    tracker = open_tracker(kind, "runs/x", {"model": "scan"})
    module.calls.clear()
    return tracker, module


@pytest.mark.parametrize("name", NAMES)
def test_the_start(monkeypatch, kind, name):
    module = Fake()
    monkeypatch.setitem(sys.modules, kind, module)
    monkeypatch.delenv(PROJECTS[kind], raising=False)
    config = {"model": "scan", "margin": 0.2}
    open_tracker(kind, name, config)
    monkeypatch.setenv(PROJECTS[kind], "mine")
    open_tracker(kind, name, config)
    got = [settings for _, settings in module.calls]
    assert [settings.pop("project") for settings in got] == [PROJECT, "mine"]
    assert got == [{"name": NAMES[name], "config": config}] * 2
    assert got[0]["config"] is not config  # options that change later are not those of the start


def test_the_scalars_of_a_step_are_sent_together(monkeypatch, kind):
    tracker, module = opened(monkeypatch, kind)
    for step, scores in ((1, (2.5,)), (2, (1.5,)), (7, (torch.tensor(0.5), np.float32(3)))):
        tracker.add_scalar("Eit", step, step)
        tracker.add_scalar("step", step - 1, step)
        for name, score in zip(("Le", "r1"), scores, strict=False):
            tracker.add_scalar(name, score, step)
        assert all(sent < step for _, sent, _ in module.calls)
    tracker.close()
    assert module.calls == [
        ("log", 1, {"Eit": 1, "batch": 0, "Le": 2.5}),
        ("log", 2, {"Eit": 2, "batch": 1, "Le": 1.5}),
        ("log", 7, {"Eit": 7, "batch": 6, "Le": 0.5, "r1": 3}),
        ("finish",),
    ]
    assert all(type(x) is float for _, _, values in module.calls[:-1] for x in values.values())


def test_nothing_is_sent_after_the_end(monkeypatch, kind, capsys):
    tracker, module = opened(monkeypatch, kind)
    tracker.close()
    tracker.add_scalar("Le", 1.0, 3)
    tracker.close()
    assert module.calls == [("finish",)]
    assert not capsys.readouterr().out


def test_figures_are_pictures(monkeypatch, kind):
    figure = pytest.importorskip("matplotlib.figure").Figure(figsize=(3, 2), dpi=50)
    figure.subplots().plot([1, 2])
    tracker, module = opened(monkeypatch, kind)
    tracker.add_scalar("r1", 5, 4)
    tracker.add_figure("attention/0", figure, 4)
    figure.clear()  # the picture was taken before
    tracker.close()
    (_, step, values) = next(call for call in module.calls if call[0] == "log")
    shape, dtype, colours = values.pop("attention/0")
    assert (step, values, shape, dtype) == (4, {"r1": 5}, (100, 150, 3), np.uint8)
    assert colours > 10


@pytest.mark.parametrize("bad", ["log", "finish"])
def test_a_failure_is_said_once_and_ends_nothing(monkeypatch, kind, capsys, bad):
    tracker, module = opened(monkeypatch, kind, [bad])
    for step in range(1, 6):
        tracker.add_scalar("Le", 1 / step, step)
    tracker.close()
    tracker.close()
    assert [call[0] for call in module.calls].count(bad) == 1
    assert module.calls[-1][0] == bad
    said = capsys.readouterr().out
    assert said == (
        f"warning: --tracker {kind} has failed (ConnectionError: no route to host); the run goes "
        "on without it, and TensorBoard and log.jsonl get all values\n"
    )


def test_a_picture_that_fails(monkeypatch, kind, capsys):
    tracker, module = opened(monkeypatch, kind)
    tracker.add_figure("attention/0", "no figure", 1)
    tracker.add_scalar("Le", 1, 1)
    tracker.close()
    assert not module.calls and capsys.readouterr().out.count("warning: ") == 1


def test_ctrl_c_gets_through(monkeypatch, kind):
    tracker, module = opened(monkeypatch, kind)

    def stopped(*args, **settings):
        raise KeyboardInterrupt

    module.log = stopped
    tracker.add_scalar("Le", 1, 1)
    with pytest.raises(KeyboardInterrupt):
        tracker.add_scalar("Le", 1, 2)


def test_a_tracker_that_does_not_start(monkeypatch, kind, tmp_path):
    monkeypatch.setitem(sys.modules, kind, Fake(["init"]))
    message = f"^--tracker {kind} does not start: ConnectionError: no route to host$"
    with pytest.raises(InputError, match=message):
        open_tracker(kind, "x", {})
    monkeypatch.setitem(sys.modules, kind, None)  # so that its import fails
    message = f"^--tracker {kind} needs its package: pip install {kind}$"
    with pytest.raises(InputError, match=message):
        open_tracker(kind, "x", {})
    # A folder of that name, which offline runs of wandb leave, is no package.
    monkeypatch.setitem(sys.modules, kind, types.ModuleType(kind))
    with pytest.raises(InputError, match=message):
        open_tracker(kind, "x", {})


def test_no_tracker_and_an_unknown_one():
    tracker = open_tracker(None, "x", {})
    tracker.add_scalar("Le", 1, 1)
    tracker.add_figure("x", None, 1)
    tracker.close()
    with pytest.raises(InputError, match="--tracker neptune: expected one of wandb, trackio"):
        open_tracker("neptune", "x", {})
