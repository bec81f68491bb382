"""What a run warns of, and where it must not; dry runs; pictures and trackers of a run."""

import os
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import run_log
import train
import vocab
from losses import ContrastiveLoss
from metrics import retrieval_metrics
from tests.conftest import read_log, same_weights, train_args, write_split
from util import tracker
from util.cli import InputError

LINE = "warning: "
PLATEAU, CHANCE, SHIFT = "twice the margin", "at chance", "out of step"


def warnings(capsys, **flags) -> list[str]:
    """The warnings that a run prints."""
    capsys.readouterr()
    train.main(train_args(**flags))
    lines = capsys.readouterr().out.splitlines()
    return [line for line in lines if line.startswith(LINE) and "vocab" not in line]


@pytest.fixture
def larger(tiny):
    """The directory of tiny with 80 images in dev."""
    write_split(tiny / "data" / "tiny_precomp", "dev", 80)
    vocab.main(["--data_path", "data", "--data_name", "tiny_precomp"])
    return tiny


# A loss that sits at twice the margin


@pytest.mark.parametrize(("margin", "quiet"), [(0.2, None), (0.07, True)])
def test_a_collapsed_loss_is_said_once(larger, capsys, monkeypatch, margin, quiet):
    """Scores that are all alike; the summed hinge of the first epoch is no reason to warn."""
    forward = ContrastiveLoss.forward
    monkeypatch.setattr(ContrastiveLoss, "forward", lambda self, x, of: forward(self, 0 * x, of))
    flags = {"margin": margin, "max_violation": True, "quiet": quiet}
    found = warnings(capsys, num_epochs=1, **flags)
    assert not any(PLATEAU in line for line in found)
    found = warnings(capsys, num_epochs=4, batch_size=3, **flags)
    (line,) = found  # recalls are at chance, too
    assert PLATEAU in line and "captions of train" in line
    assert f"{2 * margin:g} a pair, for epoch 2" in line  # epoch 1 has too few steps
    assert "--vse_mean_warmup_epochs 2" in line and "--learning_rate" in line


def test_a_loss_on_its_way_is_no_plateau():
    hinge = ContrastiveLoss(0.2, max_violation=True)
    falls = [(128 * x, 128) for x in np.linspace(0.6, 0.2, 100)]  # its mean is twice the margin
    assert not run_log.at_twice_the_margin(hinge, falls)
    sits = [(128 * x, 128) for x in np.linspace(0.41, 0.398, 100)]
    assert run_log.at_twice_the_margin(hinge, sits)
    assert not run_log.at_twice_the_margin(ContrastiveLoss(0, max_violation=True), [(0, 128)] * 9)


def test_a_run_that_learns_at_twice_the_margin_is_no_plateau(tiny, capsys, monkeypatch):
    """On the demo set an epoch at 0.4 a pair took R@1 from 21 to 54 %."""
    monkeypatch.setattr(run_log, "at_twice_the_margin", lambda *_: True)
    assert not warnings(capsys, num_epochs=12, seed=3)


# Recall at chance


def drawn(n: int, k: int, strength: float, rng, alike: float = 0.0) -> np.ndarray:
    """Scores (n, k n) of a model that has learned more with more strength.

    `alike`: how much the captions of an image have in common.
    """
    noise = rng.normal(size=(n, n * k))
    noise = (1 - alike) * noise + alike * np.repeat(rng.normal(size=(n, n)), k, 1)
    return noise + strength * np.repeat(np.eye(n), k, 1)


@pytest.mark.parametrize(("n", "k"), [(60, 5), (200, 1), (1000, 5), (300, 2)])
def test_random_scores_are_at_chance(n, k):
    rng = np.random.default_rng(n)
    for alike in (0, 0.9):
        said = [
            run_log.at_chance(retrieval_metrics(drawn(n, k, 0, rng, alike)), n, n * k)
            for _ in range(5)
        ]
        assert sum(said) >= 4


@pytest.mark.parametrize(("n", "k"), [(5, 5), (10, 5), (20, 3), (60, 5), (1000, 1)])
def test_a_model_that_begins_to_learn_is_not_at_chance(n, k):
    """Its R@1 may still be that of chance on a few images."""
    rng = np.random.default_rng(n)
    for strength in (1.0, 1.5, 3.0):
        for _ in range(20):
            scores = drawn(n, k, strength, rng, alike=0.5)
            assert not run_log.at_chance(retrieval_metrics(scores), n, n * k)


def test_equal_scores_are_at_chance():
    assert run_log.at_chance(retrieval_metrics(np.zeros((100, 500))), 100, 500)


def test_recall_at_chance_is_said_once_and_only_then(larger, capsys):
    for flags in ({"num_epochs": 1}, {"num_epochs": 3}, {"num_epochs": 3, "batch_size": 1}):
        found = warnings(capsys, learning_rate=0, **flags)
        found = [line for line in found if CHANCE in line]
        assert len(found) == 1 and "--learning_rate" in found[0] and "chance 1.2 %" in found[0]
    assert not warnings(capsys, num_epochs=12, model_name="other")


# Captions and images out of step


@pytest.mark.parametrize(
    ("n", "k", "unit", "by", "recall"),
    [
        (1000, 5, "images", 1, 0.3),
        (1000, 5, "images", -10, 0.1),
        (1000, 5, "captions", 1, 0.5),
        (1000, 5, "captions", -7, 0.2),
        (100, 1, "images", 3, 0.4),
        (40, 5, "captions", -1, 0.8),
        (40, 3, "images", 2, 0.8),
    ],
)
def test_a_shift_is_found(n, k, unit, by, recall):
    rng = np.random.default_rng(n + by)
    image_of = np.repeat(np.arange(n), k)
    true = image_of + by if unit == "images" else np.roll(image_of, by)
    true = true.clip(0, n - 1)
    scores = rng.normal(size=(n, n * k))
    known = rng.random(n * k) < recall
    scores[true[known], np.flatnonzero(known)] += 10
    found = run_log.find_shift(scores, image_of)
    assert (found.by, found.unit) == (by, unit)
    changed = np.count_nonzero(true != image_of)
    assert abs(found.captions - changed) <= 50  # all but those at the ends
    assert found.found == pytest.approx(100 * known[true != image_of].mean(), abs=10)
    assert found.found > 2 * found.as_paired
    counts = np.bincount(rng.integers(0, n, n * k), minlength=n)  # uneven captions per image
    uneven = np.repeat(np.arange(n), counts.clip(1))
    assert run_log.find_shift(np.eye(n)[:, uneven], uneven) is None


@pytest.mark.parametrize(("n", "k"), [(5, 5), (10, 5), (60, 5), (300, 1), (1000, 5)])
def test_no_shift_where_there_is_none(n, k):
    """Random scores; one image that comes first everywhere; twins that are confused; a sequence."""
    rng = np.random.default_rng(n)
    image_of = np.repeat(np.arange(n), k)
    for _ in range(10):
        for alike in (0, 0.9):
            assert run_log.find_shift(drawn(n, k, 0, rng, alike), image_of) is None
    hub = drawn(n, k, 1, rng)
    hub[n // 2] += 10
    assert run_log.find_shift(hub, image_of) is None
    twin = image_of ^ 1
    scores = drawn(n, k, 8, rng)
    there = twin < n
    scores[twin[there], np.flatnonzero(there)] += 8
    assert run_log.find_shift(scores, image_of) is None
    near = np.exp(-np.abs(np.arange(n)[:, None] - image_of) / 2) + rng.normal(size=(n, n * k)) / 5
    assert run_log.find_shift(near, image_of) is None


@pytest.mark.parametrize(("split", "lines"), [("dev", 1), ("dev", 10), ("dev", -5)])
def test_captions_out_of_step_are_named(larger, capsys, split, lines):
    flags = {"num_epochs": 12, "seed": 3}
    assert not warnings(capsys, **flags)
    path = Path("data/tiny_precomp/dev_caps.txt")
    text = path.read_text().splitlines(True)
    path.write_text("".join(text[-lines:] + text[:-lines]))
    found = warnings(capsys, model_name="other", **flags)
    (line,) = [line for line in found if SHIFT in line]
    what = {1: "the line 1 before it", 10: "image n - 2", -5: "image n + 1"}[lines]
    assert what in line and "dev_caps.txt" in line and "dev_ims.npy" in line
    changed = {1: 79, 10: 390, -5: 395}[lines]
    assert f"of the {changed} captions whose image this changes, " in line
    assert not any(CHANCE in line for line in found[1:])


def test_a_shift_of_dev_is_no_plateau(larger, capsys, monkeypatch):
    """Dev's recalls say nothing then."""
    monkeypatch.setattr(run_log, "at_twice_the_margin", lambda *_: True)
    path = Path("data/tiny_precomp/dev_caps.txt")
    text = path.read_text().splitlines(True)
    path.write_text("".join(text[-100:] + text[:-100]))
    monkeypatch.setattr(run_log, "SHIFTS", 20)
    (line,) = warnings(capsys, num_epochs=12, seed=3)
    assert SHIFT in line and "image n - 20" in line


def test_nothing_else_is_said_after_a_shift(tiny, capsys, monkeypatch):
    """Also in epochs in which the shift is not found again."""
    found = iter([run_log.Shift(1, "images", 50, 80.0, 2.0)])
    monkeypatch.setattr(run_log, "find_shift", lambda *_: next(found, None))
    for name in ("at_twice_the_margin", "worse_than", "at_chance"):
        monkeypatch.setattr(run_log, name, lambda *_: True)
    monkeypatch.setattr(run_log, "SOME_STEPS", 1)
    (line,) = warnings(capsys, num_epochs=3)
    assert SHIFT in line


# A dry run


def everything(folder: Path) -> dict[str, bytes]:
    return {str(x.relative_to(folder)): x.read_bytes() for x in folder.rglob("*") if x.is_file()}


@pytest.mark.parametrize("earlier", [False, True])
def test_a_dry_run_writes_nothing(tiny, capsys, monkeypatch, earlier):
    if earlier:
        train.main(train_args(num_epochs=1))
    before, seen = everything(tiny), []
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda *a, **k: (seen.append(1), step(*a, **k)))
    capsys.readouterr()
    train.main(train_args(num_epochs=7, dry_run=True))
    said = capsys.readouterr().out
    assert everything(tiny) == before and not list(tiny.rglob("events*")) == (not earlier)
    assert len(seen) == 2
    for name in ("step", "validation", "epoch", "run", "memory", "reading"):
        assert f"\n  {name:<12}" in said
    assert "7 steps, 1 validation" in said and ": 7 epochs" in said and " MiB " in said
    assert "nothing (--dry_run)" in said and "rsum" not in said


def test_a_dry_run_reads_all_data(tiny):
    """A bad row that two steps do not meet."""
    for split, row in (("train", 7), ("dev", 9)):
        path = f"data/tiny_precomp/{split}_ims.npy"
        whole = np.load(path)
        broken = whole.copy()
        broken[row, 1, 3] = np.nan
        np.save(path, broken)
        with pytest.raises(InputError, match=f"{split}_ims.npy: row {row}"):
            train.main(train_args(batch_size=1, dry_run=True))
        np.save(path, whole)
    assert not os.path.exists("run")


@pytest.mark.parametrize("flags", [{"batch_size": 500}, {"workers": 2}, {"quiet": True}])
def test_dry_runs_of_other_kinds(tiny, capsys, flags):
    train.main(train_args(dry_run=True, **flags))
    assert "about" in capsys.readouterr().out and not os.path.exists("run")


def test_a_dry_run_goes_on_from_a_checkpoint(tiny, capsys):
    train.main(train_args(num_epochs=2))
    before = everything(tiny)
    train.main(train_args(num_epochs=5, dry_run=True, resume="run/checkpoint_1.pth.tar"))
    assert ": 3 epochs, 21 steps, 3 validations" in capsys.readouterr().out
    train.main(train_args(num_epochs=2, dry_run=True, resume="run/checkpoint_1.pth.tar"))
    said = "nothing is left: 2 epochs are done, --num_epochs is 2\n"
    assert said in capsys.readouterr().out and everything(tiny) == before


@pytest.mark.parametrize(
    ("epochs", "batch", "flags", "left"),
    [
        (4, 7, {}, "the validation of epoch 1 and 2 epochs after it, 14 steps, 3 validations"),
        (4, 7, {"val_step": 7}, ", 14 steps, 3 validations"),
        (2, 7, {"val_step": 2}, "the validation of epoch 1, 0 steps, 1 validation"),
        (4, 3, {}, "the rest of epoch 1 and 2 epochs after it, 18 steps, 3 validations"),
        (4, 3, {"val_step": 4}, ", 18 steps, 7 validations"),
        (4, 5, {"val_step": 4, "val_due": True}, ", 16 steps, 7 validations"),
        (2, 6, {}, "the rest of epoch 1, 1 step, 1 validation"),
        (3, 0, {"val_step": 3}, ": 2 epochs, 14 steps, 6 validations"),
    ],
)
def test_a_dry_run_counts_what_is_left(tiny, capsys, monkeypatch, epochs, batch, flags, left):
    """Of a run that was interrupted inside an epoch, or in the validation at its end."""
    train.main(train_args(num_epochs=1))
    state = torch.load("run/checkpoint_0.pth.tar", weights_only=False)
    state["run"] |= {"batch": batch, "Eiters": 7 + batch, "val_due": flags.pop("val_due", False)}
    torch.save(state, "run/interrupted.pth.tar")
    flags |= {"num_epochs": epochs, "resume": "run/interrupted.pth.tar", "quiet": True}
    capsys.readouterr()
    train.main(train_args(dry_run=True, **flags))
    said = capsys.readouterr().out
    each = {0: 1, 2: 4, 3: 3, 4: 2, 7: 1}[flags.get("val_step", 0)]
    assert f"7 steps, {each} validation" in said and left + "\n" in said
    seen, step = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda *a, **k: (seen.append(1), step(*a, **k)))
    train.main(train_args(**flags))
    validations = capsys.readouterr().out.count("rsum: ")
    assert f", {len(seen)} step" in left and f", {validations} validation" in left


# TensorBoard, pictures and trackers


def events(folder: str = "run") -> EventAccumulator:
    log = EventAccumulator(folder)
    log.Reload()
    return log


@pytest.mark.parametrize("clip", [0, 0.5])
def test_the_gradient_norm_of_each_step(tiny, monkeypatch, clip):
    """That before clipping, whether or not there is any; log_step does not divide the steps."""
    norms, update = [], torch.optim.Adam.step

    def step(self, *args, **more):
        squares = [x.grad.double().square().sum() for g in self.param_groups for x in g["params"]]
        norms.append(float(sum(squares).sqrt()))
        return update(self, *args, **more)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    train.main(train_args(num_epochs=2, grad_clip=clip, log_step=3, val_step=4))
    found = events().Scalars("grad_norm")
    assert [event.step for event in found] == list(range(1, 15))
    values = [event.value for event in found]
    if clip:
        assert norms == pytest.approx([min(value, clip) for value in values], rel=1e-4)
    else:
        assert norms == pytest.approx(values, rel=1e-4)


def test_pictures_of_four_pairs_each_epoch(tiny):
    pytest.importorskip("matplotlib")
    train.main(train_args(num_epochs=2, log_images=True))
    log = events()
    tags = [f"attention/caption_{k}" for k in (0, 16, 32, 49)]
    assert sorted(log.Tags()["images"]) == sorted(tags)
    for tag in tags:
        assert [image.step for image in log.Images(tag)] == [7, 14]
    train.main(train_args(num_epochs=2, model_name="plain", logger_name="plain"))
    assert same_weights("run/checkpoint_1.pth.tar", "plain/checkpoint_1.pth.tar")
    for one, other in zip(read_log("run"), read_log("plain"), strict=True):
        assert one["rsum"] == other["rsum"] and one["Le"] == other["Le"]


def test_pictures_need_matplotlib_before_training(tiny, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="--log_images: .*pip install matplotlib"):
        train.main(train_args(log_images=True))
    assert not os.path.exists("run")


def fake_tracker(monkeypatch, fails_at: int | None = None) -> list:
    """A module wandb that notes what it gets, and fails from a call on."""
    seen = []

    def log(values, step):
        if fails_at is not None and len(seen) >= fails_at:
            raise ConnectionError("no network")
        seen.append((step, values))

    module = types.SimpleNamespace(
        init=lambda **_: None, log=log, finish=lambda: seen.append("end")
    )
    monkeypatch.setitem(__import__("sys").modules, "wandb", module)
    return seen


def test_a_tracker_gets_the_scalars_in_order(tiny, monkeypatch):
    seen = fake_tracker(monkeypatch)
    train.main(train_args(num_epochs=2, tracker="wandb", val_step=3, log_step=5))
    assert seen.pop() == "end"
    steps = [step for step, _ in seen]
    assert steps == sorted(set(steps)) == list(range(1, 15))
    log, values = events(), dict(seen)
    for tag in log.Tags()["scalars"]:
        for event in log.Scalars(tag):
            name = tracker.RENAMED.get(tag, tag)
            assert values[event.step][name] == pytest.approx(event.value)


def test_a_tracker_that_fails_ends_nothing(tiny, monkeypatch, capsys):
    fake_tracker(monkeypatch, fails_at=4)
    train.main(train_args(num_epochs=2, tracker="wandb"))
    assert len(read_log("run")) == 2
    assert capsys.readouterr().out.count("no network") == 1


def test_a_tracker_that_is_missing_is_said_before_training(tiny, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "trackio", None)
    with pytest.raises(InputError, match="pip install trackio"):
        train.main(train_args(tracker="trackio"))
    with pytest.raises(InputError, match="pip install trackio"):
        train.main(train_args(tracker="trackio", dry_run=True))
    assert not os.path.exists("run")


def test_a_dry_run_starts_no_run_of_a_tracker(tiny, monkeypatch):
    fake_tracker(monkeypatch)
    monkeypatch.setattr(__import__("sys").modules["wandb"], "init", None)
    train.main(train_args(tracker="wandb", dry_run=True))
