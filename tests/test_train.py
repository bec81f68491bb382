"""The real main on tiny data: it learns, resumes exactly, stops cleanly, and says what is wrong."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from model import SCAN, ContrastiveLoss
from tests.conftest import read_log, train_args

ROOT = Path(train.__file__).parent


def weights(path: str) -> dict[str, torch.Tensor]:
    image, text = torch.load(path, weights_only=False)["model"]
    return dict(image) | dict(text)


def same_weights(a: str, b: str) -> bool:
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_learns(tiny):
    train.main(train_args(num_epochs=12))
    log = read_log("run")
    assert [record["epoch"] for record in log] == list(range(12))
    assert log[-1]["rsum"] > log[0]["rsum"] + 100
    assert log[-1]["Le"] < 0.9 * log[1]["Le"]
    assert os.path.exists("run/checkpoint_11.pth.tar")
    best = torch.load("run/model_best.pth.tar", weights_only=False)
    top = max(record["rsum"] for record in log)
    assert best["best_rsum"] == top == log[best["epoch"]]["rsum"]


def test_same_seed_same_run_other_seed_another(tiny):
    train.main(train_args(num_epochs=1))
    train.main(train_args(num_epochs=1, model_name="again", workers=2))
    train.main(train_args(num_epochs=1, model_name="other", seed=1))
    assert same_weights("run/checkpoint_0.pth.tar", "again/checkpoint_0.pth.tar")
    assert not same_weights("run/checkpoint_0.pth.tar", "other/checkpoint_0.pth.tar")


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
    """Receives SIGTERM after a number of steps."""

    left = 0

    def check(self):
        StopAt.left -= 1
        if StopAt.left == 0:
            signal.raise_signal(signal.SIGTERM)
        super().check()


@pytest.mark.parametrize("steps", [1, 4, 9, 16])
def test_interrupted_run_goes_on_exactly(tiny, monkeypatch, capsys, steps):
    """Stopped inside an epoch, or (16: between the last step and its validation) at its end."""
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
def test_signals_save_first(tiny, number, workers):
    """A real process, a real signal to its whole group, as a terminal and SLURM send it."""
    flags = train_args(num_epochs=500, log_step=1, workers=workers)
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *flags],
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


def test_equal_score_keeps_the_older_best(tiny):
    train.main(train_args(num_epochs=3, learning_rate=0))
    assert torch.load("run/model_best.pth.tar", weights_only=False)["epoch"] == 0


def test_random_state_is_restored(tiny, monkeypatch):
    """Models that draw in training (dropping words, say) resume exactly too."""
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


def test_second_run_in_one_folder_loses_nothing(tiny, capsys):
    train.main(train_args(num_epochs=1))
    before = (tiny / "run" / "checkpoint_0.pth.tar").read_bytes()
    train.main(train_args(num_epochs=1, seed=5))
    assert (tiny / "run" / "earlier_1" / "checkpoint_0.pth.tar").read_bytes() == before
    assert "run holds an earlier run: 4 files moved to run/earlier_1" in capsys.readouterr().out
    assert len(read_log("run")) == len(read_log("run/earlier_1")) == 1


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


def test_amp_reaches_the_encoders(tiny, monkeypatch):
    seen, encode = [], SCAN.encode_images

    def record(self, batch):
        seen.append(torch.is_autocast_enabled("cpu"))
        return encode(self, batch)

    monkeypatch.setattr(SCAN, "encode_images", record)
    train.main(train_args(num_epochs=1, amp=True))
    assert seen == [True] * 7 + [False]  # seven steps, then the validation
    seen.clear()
    train.main(train_args(num_epochs=1))
    assert not any(seen)


def test_outputs_are_probed_before_training(tiny, monkeypatch):
    monkeypatch.setattr(train, "train_epoch", None)
    (tiny / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        train.main(train_args(model_name="file"))


@pytest.mark.parametrize(
    "flags",
    [
        {"batch_size": 0},
        {"batch_size": -3},
        {"log_step": 0},
        {"lr_update": 0},
        {"workers": -1},
        {"embed_size": 0},
        {"learning_rate": -1},
        {"learning_rate": "nan"},
        {"lambda_lse": 0},
        {"num_epochs": 0},
        {"seed": -1},
    ],
)
def test_numbers_out_of_range_are_named(flags, capsys):
    ((name, value),) = flags.items()
    with pytest.raises(SystemExit) as stopped:
        train.main(train_args(**flags))
    assert stopped.value.code == 2
    assert f"argument --{name}: {value}: expected a number" in capsys.readouterr().err


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


def test_warmup_uses_the_summed_hinge_first(tiny, monkeypatch):
    seen = []
    init = ContrastiveLoss.__init__

    def record(self, margin, max_violation):
        seen.append(max_violation)
        init(self, margin, max_violation)

    monkeypatch.setattr(ContrastiveLoss, "__init__", record)
    train.main(train_args(num_epochs=3, vse_mean_warmup_epochs=2))
    assert seen == [False, False, True]
    seen.clear()
    train.main(train_args(num_epochs=2, vse_mean_warmup_epochs=None))
    assert seen == [True, True]
    seen.clear()
    train.main(train_args(num_epochs=2, max_violation=None))
    assert seen == [False, False]


def test_learning_rate_falls_ten_times(tiny):
    train.main(train_args(num_epochs=5, lr_update=2))
    rates = [record["lr"] for record in read_log("run")]
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.001, 0.0001])


def test_tensorboard_tags_and_val_step(tiny, capsys):
    train.main(train_args(num_epochs=2, val_step=3, log_step=5))
    log = EventAccumulator("run")
    log.Reload()
    tags = (
        "Le lr Eit epoch step batch_time data_time r1 r5 r10 medr meanr r1i r5i r10i medri meanri"
    )
    assert set(log.Tags()["scalars"]) == {*tags.split(), "rsum"}
    assert [event.step for event in log.Scalars("Le")] == list(range(1, 15))
    assert [event.step for event in log.Scalars("rsum")] == [3, 6, 7, 9, 12, 14]
    out = capsys.readouterr().out
    assert sum(line.startswith("Epoch: [") for line in out.splitlines()) == 2
    assert "Epoch: [1][3/7]  Eit 10  lr 0.01  Le " in out


def test_resumed_tensorboard_log_continues(tiny):
    train.main(train_args(num_epochs=3))
    train.main(train_args(num_epochs=3, resume="run/checkpoint_0.pth.tar"))
    log = EventAccumulator("run")
    log.Reload()
    assert [event.step for event in log.Scalars("Le")] == list(range(1, 22))


def test_non_finite_loss_stops_and_keeps_the_checkpoints(tiny):
    train.main(train_args(num_epochs=1))
    before = (tiny / "run" / "checkpoint_0.pth.tar").read_bytes()
    broken = ContrastiveLoss.forward

    def forward(self, *args):
        return broken(self, *args) * float("nan")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ContrastiveLoss, "forward", forward)
        with pytest.raises(
            ValueError, match="the loss is nan at epoch 1, batch 0: training stopped"
        ):
            train.main(train_args(num_epochs=2, resume="run/checkpoint_0.pth.tar"))
    assert (tiny / "run" / "checkpoint_0.pth.tar").read_bytes() == before
    assert not os.path.exists("run/interrupted.pth.tar")


@pytest.mark.parametrize(
    "flags",
    [
        {"cross_attn": "i2t", "agg_func": "Mean", "raw_feature_norm": "softmax"},
        {"precomp_enc_type": "weight_norm", "no_imgnorm": True, "no_txtnorm": True},
        {"num_layers": 2, "bi_gru": None, "grad_clip": 0, "raw_feature_norm": "clipped_l1norm"},
        {"amp": True, "agg_func": "Max"},
        {"no_false_negatives": True, "raw_feature_norm": "no_norm"},
        {"batch_size": 99, "max_violation": None},  # a last batch of one caption
    ],
)
def test_options_run(tiny, flags):
    train.main(train_args(num_epochs=1, **flags))
    assert np.isfinite(read_log("run")[0]["Le"])


def test_vocabulary_that_changed_is_refused(tiny):
    train.main(train_args(num_epochs=1))
    path = tiny / "vocab" / "tiny_precomp_vocab.json"
    text = path.read_text()
    path.write_text(text.replace('"dog": ', '"x": ').replace('"cat": ', '"dog": '))
    with pytest.raises(ValueError, match="not the vocabulary that run/checkpoint_0.pth.tar was"):
        train.main(train_args(resume="run/checkpoint_0.pth.tar"))
    path.unlink()  # the checkpoint's own then serves
    train.main(train_args(num_epochs=2, resume="run/checkpoint_0.pth.tar"))


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"data_path": "nowhere"}, "error: nowhere/tiny_precomp: no such data folder"),
        ({"vocab_path": "no"}, "error: no/tiny_precomp_vocab.json: no vocabulary file"),
        ({"img_dim": 7}, "error: data/tiny_precomp/train_ims.npy: regions have 12 numbers, the"),
        ({"resume": "no.pth.tar"}, "error: no.pth.tar: no such checkpoint"),
        ({"agg_func": "Median"}, "error: --agg_func 'Median': expected one of LogSumExp"),
        ({"device": "tpu9"}, "error: --device tpu9"),
    ],
)
def test_bad_input_is_one_line(tiny, capsys, flags, line):
    from util.cli import run

    with pytest.raises(SystemExit) as stopped:
        run(lambda: train.main(train_args(**flags)))
    assert stopped.value.code == 1
    err = capsys.readouterr().err
    assert err.startswith(line) and len(err.splitlines()) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_features_found_while_training_are_one_line(tiny, workers):
    rows = np.load("data/tiny_precomp/train_ims.npy")
    rows[7, 1, 3] = np.inf
    np.save("data/tiny_precomp/train_ims.npy", rows)
    args = [sys.executable, ROOT / "train.py", *train_args(workers=workers)]
    done = subprocess.run(args, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if not line.startswith("notice")]
    assert errors == [
        "error: data/tiny_precomp/train_ims.npy: row 7 (from 0), region 1 holds NaN or Inf; "
        "extract that image again"
    ]


@pytest.mark.parametrize("flag", ["--max_violations", "--embed", "--lamda_lse=6"])
def test_misspelt_flags_are_errors(flag, capsys):
    with pytest.raises(SystemExit):
        train.main([flag])
    assert f"unrecognized arguments: {flag}" in capsys.readouterr().err
