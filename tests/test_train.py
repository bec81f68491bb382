"""Training on tiny data: it learns, logs, and says what is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from model import SCAN, ContrastiveLoss
from tests import reference
from tests.conftest import read_log, same_weights, train_args

ROOT = Path(train.__file__).parent


def test_learns(tiny):
    train.main(train_args(num_epochs=12, seed=3))
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


def test_equal_score_keeps_the_older_best(tiny):
    train.main(train_args(num_epochs=3, learning_rate=0))
    assert torch.load("run/model_best.pth.tar", weights_only=False)["epoch"] == 0


def test_second_run_in_one_folder_loses_nothing(tiny, capsys):
    train.main(train_args(num_epochs=1))
    before = (tiny / "run" / "checkpoint_0.pth.tar").read_bytes()
    train.main(train_args(num_epochs=1, seed=5))
    assert (tiny / "run" / "earlier_1" / "checkpoint_0.pth.tar").read_bytes() == before
    assert "run holds an earlier run: 4 files moved to run/earlier_1" in capsys.readouterr().out
    assert len(read_log("run")) == len(read_log("run/earlier_1")) == 1


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
    monkeypatch.setattr(train, "train", None)
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


@pytest.mark.parametrize(
    ("options", "hardest"),
    [
        ({"num_epochs": 3, "vse_mean_warmup_epochs": 2}, [False, False, True]),
        ({"num_epochs": 2, "vse_mean_warmup_epochs": None}, [True, True]),
        ({"num_epochs": 2, "max_violation": None}, [False, False]),
    ],
)
def test_warmup_uses_the_summed_hinge_first(tiny, monkeypatch, options, hardest):
    """The loss of each step is the hinge loss of its epoch; the criterion is built once."""
    seen, built, forward = {}, [], ContrastiveLoss.forward

    def record(self, scores, image_index):
        loss = forward(self, scores, image_index)
        plain = [reference.hinge(scores.detach(), 0.2, kind) for kind in (False, True)]
        matches = [bool(torch.isclose(loss, x.to(loss))) for x in plain]
        assert any(matches)
        if sum(matches) == 1:  # the last batch of an epoch may be too small to tell
            seen.setdefault(self.epoch, set()).add(matches[1])
        built.append(id(self))
        return loss

    monkeypatch.setattr(ContrastiveLoss, "forward", record)
    train.main(train_args(**options))
    assert seen == {epoch: {kind} for epoch, kind in enumerate(hardest)}
    assert len(set(built)) == 1


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
    new = {"grad_norm", "pairs_per_second"}
    assert set(log.Tags()["scalars"]) == {*tags.split(), "rsum"} | new
    assert all(len(log.Scalars(tag)) == 14 for tag in new)
    assert [event.step for event in log.Scalars("Le")] == list(range(1, 15))
    assert [event.step for event in log.Scalars("rsum")] == [3, 6, 7, 9, 12, 14]
    out = capsys.readouterr().out
    assert sum(line.startswith("Epoch: [") for line in out.splitlines()) == 2
    assert "Epoch: [1][3/7]  Eit 10  lr 0.01  Le " in out


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
def test_bad_features_found_while_training_are_one_line(tiny, starts_at_once, workers):
    rows = np.load("data/tiny_precomp/train_ims.npy")
    rows[7, 1, 3] = np.inf
    np.save("data/tiny_precomp/train_ims.npy", rows)
    args = [sys.executable, ROOT / "train.py", *train_args(workers=workers)]
    done = subprocess.run(args, capture_output=True, text=True, timeout=300)
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
    assert f"unknown flag {flag.partition('=')[0]}; did you mean --" in capsys.readouterr().err
