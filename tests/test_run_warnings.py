"""What a run warns of, and where it must not."""

from pathlib import Path

import numpy as np
import pytest
import torch

import run_log
import run_warnings
import train
import vocab
from losses import ContrastiveLoss, InfoNCELoss
from metrics import retrieval_metrics
from tests.conftest import read_log, train_args, write_split

LINE = "warning: "
PLATEAU, CHANCE, SHIFT, BACK = "twice the margin", "at chance", "out of step", "fell from"
LEARNS = {"num_epochs": 12, "learning_rate": 0.02}  # and from any seed


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
    assert not run_warnings.at_twice_the_margin(hinge, falls)
    sits = [(128 * x, 128) for x in np.linspace(0.41, 0.398, 100)]
    assert run_warnings.at_twice_the_margin(hinge, sits)
    assert not run_warnings.at_twice_the_margin(
        ContrastiveLoss(0, max_violation=True), [(0, 128)] * 9
    )


def test_a_run_that_learns_at_twice_the_margin_is_no_plateau(tiny, capsys, monkeypatch):
    """On the demo set an epoch at 0.4 a pair took R@1 from 21 to 54 %."""
    monkeypatch.setattr(run_log, "at_twice_the_margin", lambda *_: True)
    assert not warnings(capsys, **LEARNS)


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
            run_warnings.at_chance(retrieval_metrics(drawn(n, k, 0, rng, alike)), n, n * k)
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
            assert not run_warnings.at_chance(retrieval_metrics(scores), n, n * k)


def test_equal_scores_are_at_chance():
    assert run_warnings.at_chance(retrieval_metrics(np.zeros((100, 500))), 100, 500)


def test_recall_at_chance_is_said_once_and_only_then(larger, capsys):
    for flags in ({"num_epochs": 1}, {"num_epochs": 3}, {"num_epochs": 3, "batch_size": 1}):
        found = warnings(capsys, learning_rate=0, **flags)
        found = [line for line in found if CHANCE in line]
        assert len(found) == 1 and "--learning_rate" in found[0] and "chance 1.2 %" in found[0]
    assert not warnings(capsys, **LEARNS, model_name="other")


# A model that falls back


def test_two_fifths_beyond_doubt():
    fell_back = run_warnings.fell_back
    assert fell_back(58, 107, 1000) and fell_back(38, 107, 1000)
    assert not fell_back(70, 107, 1000) and not fell_back(107, -1, 1000)  # -1: there is no best yet
    assert not fell_back(6, 12, 1000)  # near chance, which is 3.2
    assert not fell_back(250, 420, 5) and not fell_back(100, 180, 20)  # few images
    assert fell_back(300, 530, 80)
    assert fell_back(125, 200, 100) and not fell_back(135, 200, 100)  # above 32, which is chance


def test_the_cures_are_those_of_the_loss():
    hardest = ContrastiveLoss(0.2, max_violation=True, warmup_epochs=2)
    said = run_warnings.what_to_change(hardest, "a lower")
    assert said == "--vse_mean_warmup_epochs 3, a larger --margin or a lower --learning_rate"
    summed = run_warnings.what_to_change(ContrastiveLoss(0.2), "another")
    assert summed == "a larger --margin or another --learning_rate"
    assert run_warnings.what_to_change(InfoNCELoss(), "a lower") == "a lower --learning_rate"


@pytest.mark.parametrize("max_violation", [True, None])
def test_a_model_that_falls_back_is_said_once(larger, capsys, monkeypatch, max_violation):
    flags = LEARNS | {"num_epochs": 14, "lr_update": 12, "max_violation": max_violation}
    flags["vse_mean_warmup_epochs"] = 1
    monkeypatch.setattr(run_log, "at_twice_the_margin", lambda *_: False)
    monkeypatch.setattr(run_log, "SOME_STEPS", 80)  # of 7 an epoch
    start_epoch = train.start_epoch

    def forget(run):
        """Before epochs 12 and 13, all that was learned is lost."""
        if run.state.epoch >= 12:
            for p in run.model.parameters():
                torch.nn.init.normal_(p, std=0.1)
        return start_epoch(run)

    monkeypatch.setattr(train, "start_epoch", forget)
    (line,) = warnings(capsys, **flags)
    best = max(x["rsum"] for x in read_log("run"))
    assert BACK in line and f"fell from {best:.1f} (epoch " in line and " after epoch 12" in line
    assert "a larger --margin or a lower --learning_rate" in line
    for text in ("hardest negatives", "--vse_mean_warmup_epochs 2"):
        assert (text in line) == bool(max_violation)


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
    found = run_warnings.find_shift(scores, image_of)
    assert (found.by, found.unit) == (by, unit)
    changed = np.count_nonzero(true != image_of)
    assert abs(found.captions - changed) <= 50  # all but those at the ends
    assert found.found == pytest.approx(100 * known[true != image_of].mean(), abs=10)
    assert found.found > 2 * found.as_paired
    counts = np.bincount(rng.integers(0, n, n * k), minlength=n)  # uneven captions per image
    uneven = np.repeat(np.arange(n), counts.clip(1))
    assert run_warnings.find_shift(np.eye(n)[:, uneven], uneven) is None


@pytest.mark.parametrize(("n", "k"), [(5, 5), (10, 5), (60, 5), (300, 1), (1000, 5)])
def test_no_shift_where_there_is_none(n, k):
    """Random scores; one image that comes first everywhere; twins that are confused; a sequence."""
    rng = np.random.default_rng(n)
    image_of = np.repeat(np.arange(n), k)
    for _ in range(10):
        for alike in (0, 0.9):
            assert run_warnings.find_shift(drawn(n, k, 0, rng, alike), image_of) is None
    hub = drawn(n, k, 1, rng)
    hub[n // 2] += 10
    assert run_warnings.find_shift(hub, image_of) is None
    twin = image_of ^ 1
    scores = drawn(n, k, 8, rng)
    there = twin < n
    scores[twin[there], np.flatnonzero(there)] += 8
    assert run_warnings.find_shift(scores, image_of) is None
    near = np.exp(-np.abs(np.arange(n)[:, None] - image_of) / 2) + rng.normal(size=(n, n * k)) / 5
    assert run_warnings.find_shift(near, image_of) is None


@pytest.mark.parametrize(("split", "lines"), [("dev", 1), ("dev", 10), ("dev", -5)])
def test_captions_out_of_step_are_named(larger, capsys, split, lines):
    flags = LEARNS
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
    monkeypatch.setattr(run_warnings, "SHIFTS", 20)
    (line,) = warnings(capsys, **LEARNS)
    assert SHIFT in line and "image n - 20" in line


def test_nothing_else_is_said_after_a_shift(tiny, capsys, monkeypatch):
    """Also in epochs in which the shift is not found again."""
    found = iter([run_warnings.Shift(1, "images", 50, 80.0, 2.0)])
    monkeypatch.setattr(run_log, "find_shift", lambda *_: next(found, None))
    for name in ("at_twice_the_margin", "worse_than", "at_chance"):
        monkeypatch.setattr(run_log, name, lambda *_: True)
    monkeypatch.setattr(run_log, "SOME_STEPS", 1)
    (line,) = warnings(capsys, num_epochs=3)
    assert SHIFT in line
