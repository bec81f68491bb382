"""scripts/compare.py: all systems under one protocol, on tiny data."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from scripts import compare
from tests.conftest import read_log
from util.cli import InputError

TINY = "-- --embed_size 16 --word_dim 6 --batch_size 50 --workers 0"
ARGS = "--data_path data --data_name tiny_precomp --out out".split()


def read_table(path="out/table.csv"):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_two_systems_and_two_seeds(tiny_graphs, capsys, monkeypatch):
    args = [*ARGS, "--num_epochs", "2", "--systems", "scan", "gsmn", "--seeds", "0", "1"]
    args += TINY.split()
    compare.main(args)
    rows = read_table()
    pairs = [(row["system"], row["seed"]) for row in rows]
    assert pairs == [(s, n) for n in "01" for s in ("scan", "gsmn")]
    for row in rows:
        assert row["epochs"] == "2" and float(row["peak_mib"]) > 100
        log = read_log(f"out/{row['system']}_seed{row['seed']}")
        best = max(log, key=lambda epoch: epoch["rsum"])
        assert int(row["best_epoch"]) == best["epoch"] + 1
        assert float(row["rsum"]) == pytest.approx(sum(float(row[n]) for n in compare.RECALLS))
        minutes = sum(epoch["seconds"] for epoch in log) / 60
        assert float(row["train_minutes"]) == pytest.approx(minutes)
        assert f"--model {row['system']}" in row["flags"] and "--img_dim 12" in row["flags"]
    text = (tiny_graphs / "out/table.md").read_text()
    assert text in capsys.readouterr().out
    line = next(line for line in text.splitlines() if line.startswith("| SCAN"))
    both = [float(row["rsum"]) for row in rows if row["system"] == "scan"]
    assert f"{np.mean(both):.1f} (sd {np.std(both, ddof=1):.1f})" in line

    def never(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(compare, "train", never)
    compare.main(args)  # everything is finished
    result = (tiny_graphs / "out/scan_seed0/result_test.json").read_text()
    with pytest.raises(AssertionError, match="trained again"):
        compare.main([*args, "--margin", "0.1"])  # not with these flags
    # The existing results are kept.
    assert (tiny_graphs / "out/scan_seed0/earlier_1/result_test.json").read_text() == result
    assert (tiny_graphs / "out/earlier_1/table.md").read_text() == text
    assert (tiny_graphs / "out/gsmn_seed0/result_test.json").is_file()


def test_minutes_choose_the_epochs(tmp_path, monkeypatch):
    """1 minute holds 2 + 11 epochs if the first takes 10 seconds and the others take 4."""
    calls = []

    def train(folder, flags):
        calls.append(flags)
        log = [{"seconds": s} for s in [10, 4] + [4] * 11][: 2 if len(calls) == 1 else None]
        lines = "".join(json.dumps(epoch) + "\n" for epoch in log)
        (tmp_path / "log.jsonl").write_text(lines)
        return log

    monkeypatch.setattr(compare, "train", train)
    opt = compare.argparse.Namespace(num_epochs=None, minutes=1)
    assert len(compare.fit(tmp_path, ["--x"], opt)) == 13
    whole = ["--x", "--num_epochs", "13", "--lr_update", "10"]
    assert calls == [["--x", "--num_epochs", "2", "--lr_update", "2"], whole]
    compare.fit(tmp_path, ["--x"], opt)  # stopped after two epochs or more
    assert calls[2:] == [whole]
    (tmp_path / "log.jsonl").unlink()
    calls.clear()
    opt.minutes = 0.2
    assert len(compare.fit(tmp_path, [], opt)) == 2 and len(calls) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_ends_its_training_and_goes_on_later(tiny, number):
    args = [*ARGS, "--num_epochs", "400", "--systems", "scan", *TINY.split()]
    running = subprocess.Popen(
        [sys.executable, compare.__file__, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Where the tests run in the background of a shell, SIGINT is ignored from the start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for _ in range(600):
        if len(list(tiny.glob("out/scan_seed0/checkpoint_*"))) > 2:
            break
        time.sleep(0.1)
    running.send_signal(number)  # only to this process
    assert "interrupted" in running.communicate(timeout=60)[0] and running.returncode == 1
    log = (tiny / "out/scan_seed0/train.log").read_text()
    assert "saved epoch" in log.splitlines()[-1]
    done = len(read_log("out/scan_seed0"))
    assert 2 < done < 400
    before = (tiny / "out/scan_seed0/checkpoint_0.pth.tar").stat().st_mtime
    # Fewer epochs would be another run: pretend that these were asked for.
    asked = tiny / "out/scan_seed0/asked.json"
    known = json.loads(asked.read_text())
    asked.write_text(json.dumps(known | {"num_epochs": done + 1}))
    args[args.index("400")] = str(done + 1)
    compare.main(args)
    assert [epoch["epoch"] for epoch in read_log("out/scan_seed0")] == list(range(done + 1))
    assert (tiny / "out/scan_seed0/checkpoint_0.pth.tar").stat().st_mtime == before
    assert read_table()[0]["epochs"] == str(done + 1)


def test_flags_as_they_take_effect():
    flags = "--batch_size 128 --bi_gru --margin=0.1 --batch_size 64 --x a b --margin 0.2".split()
    assert compare.last_of_each(flags) == "--bi_gru --batch_size 64 --x a b --margin 0.2"


def test_dev_is_cut_off_train_where_there_is_no_test(tiny_graphs, capsys):
    data = tiny_graphs / "data/tiny_precomp"
    for path in data.glob("test_*"):
        path.unlink()
    old = {name: np.load(data / f"{name}.npy") for name in ("train_ims", "dev_ims", "dev_ims_bbx")}
    lines = (data / "train_caps.txt").read_text().splitlines()
    compare.main([*ARGS, "--num_epochs", "1", "--systems", "pfan", *TINY.split()])
    assert "no test split" in capsys.readouterr().out
    cut = tiny_graphs / "out/data/tiny_precomp"
    got = np.concatenate([np.load(cut / "train_ims.npy"), np.load(cut / "dev_ims.npy")])
    assert len(np.load(cut / "dev_ims.npy")) == 2 and np.array_equal(got, old["train_ims"])
    assert np.array_equal(np.load(cut / "test_ims.npy"), old["dev_ims"])
    assert np.array_equal(np.load(cut / "test_ims_bbx.npy"), old["dev_ims_bbx"])
    assert (cut / "dev_caps.txt").read_text().splitlines() == lines[-10:]
    assert (cut / "train_caps.txt").read_text().splitlines() == lines[:-10]
    assert [row["system"] for row in read_table()] == ["pfan"]
    assert not (tiny_graphs / "vocab/other_vocab.json").exists()
    with open(data / "train_caps.txt", "a") as file:
        file.write("one more\n")
    with pytest.raises(InputError, match="made from other data than .*; give another --out"):
        compare.main([*ARGS, "--num_epochs", "1", "--systems", "pfan", *TINY.split()])
    with pytest.raises(InputError, match="101 captions for 20 images; expected a multiple"):
        compare.main([*ARGS, "--num_epochs", "1", "--out", "new"])


def test_a_vocabulary_of_cut_data_stays_with_it(tiny):
    data = tiny / "data/tiny_precomp"
    for path in data.glob("test_*"):
        path.unlink()
    shutil.rmtree("vocab")
    compare.main([*ARGS, "--num_epochs", "1", "--systems", "scan", *TINY.split()])
    assert (tiny / "out/vocab/tiny_precomp_vocab.json").is_file() and not (tiny / "vocab").exists()


def test_published_positions_need_no_boxes(tiny_positions):
    """With boxes, all four systems are compared by default."""
    compare.main([*ARGS, "--num_epochs", "1", "--out", "four", *TINY.split()])
    assert [row["system"] for row in read_table("four/table.csv")] == list(compare.SYSTEMS)
    for path in (tiny_positions / "data/tiny_precomp").glob("*_bbx.npy"):
        path.unlink()
    compare.main([*ARGS, "--num_epochs", "1", "--systems", "pfan", *TINY.split()])
    with pytest.raises(InputError, match="no boxes"):
        compare.main([*ARGS, "--num_epochs", "1", "--systems", "gsmn", *TINY.split()])


def test_a_run_of_minutes(tiny):
    """0.001 minutes hold no third epoch on any machine; 2 epochs and 1 more are enough."""
    compare.main([*ARGS, "--minutes", "0.001", "--systems", "scan", *TINY.split()])
    (row,) = read_table()
    assert row["epochs"] == "2" and len(read_log("out/scan_seed0")) == 2
    args = [*ARGS, "--out", "more", "--systems", "scan", "--minutes"]
    seconds = [epoch["seconds"] for epoch in read_log("out/scan_seed0")]
    compare.main([*args, str((sum(seconds) + 15 * max(seconds[1], 0.1)) / 60), *TINY.split()])
    epochs = [epoch["epoch"] for epoch in read_log("more/scan_seed0")]
    assert epochs == list(range(len(epochs))) and len(epochs) > 2


def test_what_is_wrong_is_said(tiny, capsys):
    message = "train_ims_bbx.npy: no boxes, which GSMN needs: .* or leave gsmn out of --systems"
    with pytest.raises(InputError, match=message):
        compare.main([*ARGS, "--num_epochs", "1"])
    args = [*ARGS, "--num_epochs", "1", "--systems", "chan", *TINY.split(), "--embed_size", "12"]
    with pytest.raises(InputError, match="train.log: training ended with 1: error: .*12.*8 heads"):
        compare.main(args)
    assert not (tiny / "out/chan_seed0/result_test.json").exists()
    with pytest.raises(FileNotFoundError, match="tset_ims.npy: no such file; give another --split"):
        compare.main([*ARGS, "--num_epochs", "1", "--systems", "scan", "--split", "tset"])
    with pytest.raises(SystemExit):  # before scan is trained
        compare.main(
            [*ARGS, "--num_epochs", "1", "--systems", "chan", "scan", "--", "--alpha", "1"]
        )
    assert "--alpha is for --model chan, not scan" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compare.main(ARGS)
    assert "--minutes --num_epochs is required" in capsys.readouterr().err
    for flag in ("--seed", "--lr_update=3"):
        with pytest.raises(SystemExit):
            compare.main([*ARGS, "--num_epochs", "1", "--", flag, "3"])
        assert f"{flag}: this script sets that itself" in capsys.readouterr().err


def test_another_split_is_tested_without_training_again(tiny):
    args = [*ARGS, "--num_epochs", "1", "--systems", "scan", "--seeds", "0", "0", "--split"]
    compare.main([*args, "dev", *TINY.split()])
    (dev,) = read_table()
    compare.main([*args, "test", *TINY.split()])
    (test,) = read_table()
    assert dev["rsum"] != test["rsum"] and dev["train_minutes"] == test["train_minutes"]
    assert not list(tiny.glob("out/scan_seed0/earlier_*"))
    compare.main([*args, "dev", *TINY.split()])
    assert read_table() == [dev]
