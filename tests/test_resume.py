"""Training that is stopped and resumed gives the same weights as training without a stop."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from model import SCAN
from tests.conftest import read_log, same_weights, train_args

ROOT = Path(train.__file__).parent


@pytest.mark.parametrize("lr_update", [3, 1])
def test_two_epochs_and_two_more_equal_four(tiny, lr_update):
    train.main(
        train_args(num_epochs=4, lr_update=lr_update, model_name="whole", logger_name="whole")
    )
    train.main(train_args(num_epochs=2, lr_update=lr_update))
    train.main(train_args(num_epochs=4, lr_update=lr_update, resume="run/checkpoint_1.pth.tar"))
    for name in ("checkpoint_2", "checkpoint_3", "model_best"):
        assert same_weights(f"whole/{name}.pth.tar", f"run/{name}.pth.tar")
    whole, parts = read_log("whole"), read_log("run")
    for record in (*whole, *parts):
        del record["seconds"], record["peak_mib"]
    assert whole == parts
    a, b = (torch.load(f"{d}/checkpoint_3.pth.tar", weights_only=False) for d in ("whole", "run"))
    assert a["Eiters"] == b["Eiters"] and a["best_rsum"] == b["best_rsum"]
    for one, other in zip(
        a["run"]["optimizer"]["state"].values(),
        b["run"]["optimizer"]["state"].values(),
        strict=True,
    ):
        assert all(torch.equal(one[name], other[name]) for name in one)


class StopAt(train.StopSignal):
    """It raises SIGTERM after a number of steps."""

    left = 0

    def check(self):
        StopAt.left -= 1
        if StopAt.left == 0:
            signal.raise_signal(signal.SIGTERM)
        super().check()


@pytest.mark.parametrize("steps", [1, 4, 9, 16])
def test_interrupted_run_goes_on_exactly(tiny, monkeypatch, capsys, steps):
    """It stops inside an epoch, or at its end (16: between the last step and the validation)."""
    train.main(train_args(num_epochs=3, model_name="whole", logger_name="whole"))
    with monkeypatch.context() as patch:
        patch.setattr(train, "StopSignal", StopAt)
        StopAt.left = steps
        with pytest.raises(SystemExit) as stopped:
            train.main(train_args(num_epochs=3))
    assert stopped.value.code == 128 + signal.SIGTERM
    assert "go on with --resume run/interrupted.pth.tar" in capsys.readouterr().out
    train.main(train_args(num_epochs=3, resume="run/interrupted.pth.tar"))
    assert same_weights("whole/checkpoint_2.pth.tar", "run/checkpoint_2.pth.tar")
    whole, parts = read_log("whole"), read_log("run")
    for record in (*whole, *parts):
        del record["seconds"], record["peak_mib"]
    assert whole == parts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("workers", [0, 2])
def test_signals_save_first(tiny, warm, number, workers):
    """A real process gets a real signal to its whole group, as a terminal and SLURM send it."""
    flags = train_args(num_epochs=500, log_step=1, workers=workers)
    process = subprocess.Popen(
        [sys.executable if workers else warm, ROOT / "train.py", *flags],  # warm has another group
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout:
        if line.startswith("Epoch: [1]"):
            break
    os.killpg(process.pid, number)
    out = process.stdout.read()
    assert process.wait(60) == 128 + number, out
    assert "Traceback" not in out and "saved epoch" in out
    state = torch.load("run/interrupted.pth.tar", weights_only=False)
    train.main(train_args(num_epochs=state["epoch"] + 2, resume="run/interrupted.pth.tar"))


def test_stop_inside_validation_is_at_once(tiny, monkeypatch):
    def encode_data(*args):
        signal.raise_signal(signal.SIGINT)
        time.sleep(1)
        raise AssertionError("validation went on")

    train.main(train_args(num_epochs=1, model_name="whole", logger_name="whole"))
    with monkeypatch.context() as patch:
        patch.setattr(train, "encode_data", encode_data)
        with pytest.raises(SystemExit):
            train.main(train_args(num_epochs=1))
    train.main(train_args(num_epochs=1, resume="run/interrupted.pth.tar"))
    assert same_weights("whole/checkpoint_0.pth.tar", "run/checkpoint_0.pth.tar")
    assert len(read_log("run")) == 1


def test_resume_keeps_the_best(tiny):
    """A later, worse epoch must not take model_best."""
    train.main(train_args(num_epochs=1))
    state = torch.load("run/checkpoint_0.pth.tar", weights_only=False)
    for where in (state, state["run"]):
        where["best_rsum"] = 599.0
    torch.save(state, "ours.pth.tar")
    del state["run"]
    torch.save(state, "published.pth.tar")
    for resume in ("ours.pth.tar", "published.pth.tar"):
        train.main(train_args(num_epochs=3, resume=resume, model_name="more"))
        assert sorted(os.listdir("more")) == ["checkpoint_1.pth.tar", "checkpoint_2.pth.tar"]
        last = torch.load("more/checkpoint_2.pth.tar", weights_only=False)
        assert last["best_rsum"] == 599.0 and last["Eiters"] == 21


def test_random_state_is_restored(tiny, monkeypatch):
    """Models that draw random numbers in training (to drop words, say) resume exactly, too."""
    encode = SCAN.encode_images

    def noisy(self, batch):
        images = batch["images"]
        if self.training:
            images = images + 0.1 * torch.randn(images.shape)
        return encode(self, {"images": images})

    monkeypatch.setattr(SCAN, "encode_images", noisy)
    train.main(train_args(num_epochs=3, model_name="whole", logger_name="whole"))
    train.main(train_args(num_epochs=1))
    torch.manual_seed(99)
    train.main(train_args(num_epochs=3, resume="run/checkpoint_0.pth.tar"))
    assert same_weights("whole/checkpoint_2.pth.tar", "run/checkpoint_2.pth.tar")


def test_resuming_earlier_rewrites_the_log(tiny):
    train.main(train_args(num_epochs=3))
    train.main(train_args(num_epochs=4, resume="run/checkpoint_0.pth.tar"))
    assert [record["epoch"] for record in read_log("run")] == [0, 1, 2, 3]
    assert not os.path.exists("run/earlier_1")


def test_inside_an_epoch_the_batches_must_stay(tiny, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(train, "StopSignal", StopAt)
        StopAt.left = 3
        with pytest.raises(SystemExit):
            train.main(train_args(num_epochs=3))
    resume = {"resume": "run/interrupted.pth.tar", "num_epochs": 3}
    for change in ({"batch_size": 8}, {"seed": 1}):
        with pytest.raises(ValueError, match="written inside an epoch, at batch 3, with another"):
            train.main(train_args(**resume, **change))
    capsys.readouterr()
    train.main(train_args(**resume, cross_attn="i2t", lambda_softmax=4))
    notice = "changed options: --cross_attn t2i -> i2t, --lambda_softmax 9.0 -> 4.0"
    assert notice in capsys.readouterr().out


def test_stop_inside_a_step_validation_leaves_it_due(tiny, monkeypatch):
    seen, real = [], train.validate

    def validate(model, dev_set, step, tb, stop):
        seen.append(step)
        if len(seen) == 1:
            signal.raise_signal(signal.SIGINT)
        return real(model, dev_set, step, tb, stop)

    monkeypatch.setattr(train, "validate", validate)
    with pytest.raises(SystemExit):
        train.main(train_args(num_epochs=1, val_step=3))
    train.main(train_args(num_epochs=1, val_step=3, resume="run/interrupted.pth.tar"))
    assert seen == [3, 3, 6, 7]


@pytest.mark.parametrize("spoil", ["optimizer", "rng", "batch"])
def test_broken_run_state_is_named(tiny, spoil):
    train.main(train_args(num_epochs=1))
    state = torch.load("run/checkpoint_0.pth.tar", weights_only=False)
    if spoil == "batch":
        del state["run"]["batch"]
    else:
        state["run"][spoil] = {}
    torch.save(state, "broken.pth.tar")
    with pytest.raises(ValueError, match="broken.pth.tar: its run state does not fit"):
        train.main(train_args(num_epochs=2, resume="broken.pth.tar"))


def test_reset_takes_only_the_weights(tiny):
    train.main(train_args(num_epochs=2))
    more = {"resume": "run/checkpoint_1.pth.tar", "reset_start_epoch": True, "model_name": "more"}
    train.main(train_args(num_epochs=1, learning_rate=0, **more))
    assert same_weights("run/checkpoint_1.pth.tar", "more/checkpoint_0.pth.tar")
    state = torch.load("more/checkpoint_0.pth.tar", weights_only=False)
    assert (state["epoch"], state["Eiters"]) == (0, 7)


def test_published_checkpoint_continues_after_its_epoch(tiny, capsys):
    train.main(train_args(num_epochs=2))
    state = torch.load("run/checkpoint_1.pth.tar", weights_only=False)
    del state["vocab"], state["run"]
    torch.save(state, "published.pth.tar")
    train.main(train_args(num_epochs=3, resume="published.pth.tar", model_name="more"))
    assert sorted(os.listdir("more"))[0] == "checkpoint_2.pth.tar"
    assert "holds no optimizer or random state" in capsys.readouterr().out


def test_resumed_tensorboard_log_continues(tiny):
    train.main(train_args(num_epochs=3))
    train.main(train_args(num_epochs=3, resume="run/checkpoint_0.pth.tar"))
    log = EventAccumulator("run")
    log.Reload()
    assert [event.step for event in log.Scalars("Le")] == list(range(1, 22))


def test_vocabulary_that_changed_is_refused(tiny):
    train.main(train_args(num_epochs=1))
    path = tiny / "vocab" / "tiny_precomp_vocab.json"
    text = path.read_text()
    path.write_text(text.replace('"dog": ', '"x": ').replace('"cat": ', '"dog": '))
    with pytest.raises(ValueError, match="not the vocabulary that run/checkpoint_0.pth.tar was"):
        train.main(train_args(resume="run/checkpoint_0.pth.tar"))
    path.unlink()  # without it the vocabulary of the checkpoint is used
    train.main(train_args(num_epochs=2, resume="run/checkpoint_0.pth.tar"))
