"""A dry run reads all data, says how long the run takes, and writes nothing."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from tests.conftest import train_args
from util.cli import InputError

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
