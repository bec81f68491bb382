"""scripts/compare.py: all systems under one protocol, on tiny data."""

import csv
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import vocab
from scripts import compare, compare_table
from tests.conftest import hear_sigint, read_log
from util.cli import InputError

pytestmark = pytest.mark.usefixtures("starts_at_once")
PYTHON = sys.executable
TINY = "-- --embed_size 16 --word_dim 6 --batch_size 50 --workers 0"
ARGS = "--data_path data --data_name tiny_precomp --out out --processes 1".split()


def read_table(path="out/table.csv"):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_two_systems_and_two_seeds(tiny_graphs, capsys, monkeypatch):
    """Two processes at a time, as by default on two cores."""
    args = [*ARGS, "--num_epochs", "2", "--systems", "scan", "gsmn", "--seeds", "0", "1"]
    args += TINY.split()
    at = args.index("--processes")
    compare.main([*args[:at], *args[at + 2 :]])
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
    assert f"| {np.mean(both):.1f} (sd {np.std(both, ddof=1):.1f}) [" in line
    for row in rows:
        for name in ("rsum", *compare.RECALLS):
            low, high = (float(row[f"{name}_{end}"]) for end in ("low", "high"))
            assert low <= float(row[name]) <= high and low < high
    assert text.count("| SCAN t-i AVG, GSMN dense | ") == 1 and "for these 2 tests" in text
    record = json.loads((tiny_graphs / "out/curves.json").read_text())["settings"]
    for name in ("scan", "gsmn"):
        logs = [[x["rsum"] for x in read_log(f"out/{name}_seed{seed}")] for seed in (0, 1)]
        assert record[name]["rsum"] == logs and record[name]["seeds"] == [0, 1]
        assert record[name]["mean"] == pytest.approx(np.mean(logs, 0).tolist())
    page = (tiny_graphs / "out/curves.md").read_text()
    assert "| SCAN t-i AVG, GSMN dense | dev, after 2 epochs | " in page
    assert (tiny_graphs / "out/curves.png").read_bytes().startswith(b"\x89PNG")

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
    assert (tiny_graphs / "out/earlier_1/curves.md").read_text() == page
    assert (tiny_graphs / "out/gsmn_seed0/result_test.json").is_file()


def test_a_result_without_ranks_is_tested_again_but_not_trained(tiny, monkeypatch, capsys):
    """It is of an older version, without intervals."""
    args = [*ARGS, "--num_epochs", "1", "--systems", "scan", *TINY.split()]
    compare.main(args)
    (first,) = read_table()
    done, ranks = (tiny / "out/scan_seed0" / x for x in ("result_test.json", "ranks_test.npz"))
    old = {
        n: x for n, x in json.loads(done.read_text()).items() if not n.endswith(("_low", "_high"))
    }

    def never(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(compare, "train", never)
    done.write_text(json.dumps(old))
    ranks.unlink()
    compare.main(args)
    (second,) = read_table()
    first.pop("test_seconds"), second.pop("test_seconds")
    assert first == second and "done before" not in capsys.readouterr().out
    monkeypatch.setattr(compare, "evaluate", never)
    compare.main(args)
    assert "done before" in capsys.readouterr().out
    whole = ranks.read_bytes()
    for content in (b"", whole[:300], b"PK no archive", old["flags"].encode()):
        ranks.write_bytes(content)
        with pytest.raises(InputError, match="ranks_test.npz: not a file of ranks.*; remove it"):
            compare.main(args)
    np.savez(ranks, i2t=np.zeros(3))
    with pytest.raises(InputError, match="ranks_test.npz: not a file of ranks"):
        compare.main(args)


def test_scipy_is_missed_before_the_training(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(InputError, match="tests need scipy: pip install scipy"):
        compare.main([*ARGS, "--num_epochs", "1", "--systems", "scan", *TINY.split()])
    assert not (tiny / "out").exists()


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
    """SIGTERM while two trainings run at a time."""
    args = [*ARGS, "--num_epochs", "400", "--systems", "scan"]
    if number == signal.SIGTERM:
        args += ["--processes", "2", "--seeds", "2"]
    args += TINY.split()
    running = subprocess.Popen(
        [PYTHON, compare.__file__, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=hear_sigint,
    )
    for _ in range(3000):
        if len(list(tiny.glob("out/scan_seed0/checkpoint_*"))) > 2:
            break
        time.sleep(0.1)
    running.send_signal(number)  # only to this process
    said = running.communicate(timeout=300)[0]
    assert said.count("interrupted") == 1 and running.returncode == 1
    assert "stopped: the same command goes on" in said
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
    assert compare_table.last_of_each(flags) == "--bi_gru --batch_size 64 --x a b --margin 0.2"


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
    with pytest.raises(InputError, match="101 captions for the 20 rows"):
        compare.main([*ARGS, "--num_epochs", "1", "--out", "new"])


def test_flags_are_looked_for_on_images_that_are_held_out(tiny):
    args = [*ARGS, "--num_epochs", "1", "--systems", "scan", "--split", "dev", "--held_out"]
    compare.main([*args, "6", *TINY.split()])
    images = {
        name: np.load(tiny / f"data/tiny_precomp/{name}_ims.npy") for name in ("train", "test")
    }
    cut = {name: np.load(tiny / f"out/data/tiny_precomp/{name}_ims.npy") for name in images}
    assert np.array_equal(cut["train"], images["train"][:-6])
    assert np.array_equal(cut["test"], images["test"])
    assert len(np.load(tiny / "out/scan_seed0/ranks_dev.npz")["i2t"]) == 6
    with pytest.raises(InputError, match="made with another --held_out; give another --out"):
        compare.main([*args, "7", *TINY.split()])
    with pytest.raises(FileNotFoundError, match="val_ims.npy: no such file; give another --split"):
        compare.main([*args[:-2], "val", "--held_out", "6", *TINY.split()])


@pytest.mark.parametrize("words", ["vocab", "own.json"])
def test_the_vocabulary_is_that_of_the_captions(tiny, monkeypatch, words):
    """As the row scripts; a file is taken too. Runs on other captions are not taken for these."""
    trained = []
    args = [*ARGS, "--num_epochs", "1", "--systems", "scan", "--vocab_path", words, *TINY.split()]
    compare.main(args)
    path = tiny / ("vocab/tiny_precomp_vocab.json" if words == "vocab" else words)
    before = path.read_bytes()
    captions = tiny / "data/tiny_precomp/train_caps.txt"
    captions.write_text(captions.read_text().replace("red", "crimson"))
    with pytest.raises(InputError, match=f"{path.name}: it was built from other captions.* move"):
        compare.main(args)
    assert path.read_bytes() == before
    path.unlink()

    def train(folder, flags):
        trained.append(flags)
        raise InputError("trained")

    monkeypatch.setattr(compare, "train", train)
    with pytest.raises(InputError, match="trained"):
        compare.main(args)
    assert "crimson" in path.read_text() and len(trained) == 1
    assert (tiny / "out/scan_seed0/earlier_1/result_test.json").is_file()


def test_a_vocabulary_of_cut_data_stays_with_it(tiny, capsys):
    """Its train and dev are not those of vocab/."""
    data = tiny / "data/tiny_precomp"
    for path in data.glob("test_*"):
        path.unlink()
    compare.main([*ARGS, "--num_epochs", "1", "--systems", "scan", *TINY.split()])
    assert "the vocabulary of this data is in out/vocab" in capsys.readouterr().out
    vocab.check_file("out/vocab/tiny_precomp_vocab.json", "out/data/tiny_precomp")
    vocab.check_file("vocab/tiny_precomp_vocab.json", "data/tiny_precomp")
    assert "warning" not in (tiny / "out/scan_seed0/train.log").read_text()


def test_folders_with_odd_names(tiny, capsys):
    """A pattern made of them would find nothing: a second run would overwrite the first."""
    odd = tiny / "lr[2e-4] *?"
    (tiny / "data").rename(odd)
    for path in (odd / "tiny_precomp").glob("test_*"):
        path.unlink()
    args = ["--data_path", f"{odd}/tiny_precomp/", "--data_name", "tiny_precomp/", "--out"]
    args += [f"{odd}/out/", "--systems", "scan", *TINY.split()]
    compare.main(["--num_epochs", "1", *args])
    run = odd / "out" / "scan_seed0"
    first = (run / "result_test.json").read_text()
    compare.main(["--num_epochs", "1", *args])
    assert f"{run}: done before" in capsys.readouterr().out
    compare.main(["--num_epochs", "2", *args])
    assert (run / "earlier_1" / "result_test.json").read_text() == first
    assert len(read_log(run / "earlier_1")) == 1 and len(read_log(run)) == 2
    assert (odd / "out" / "earlier_1" / "table.md").is_file()
    assert sorted(x.name for x in tiny.iterdir()) == ["lr[2e-4] *?", "vocab"]


def test_published_positions_need_no_boxes(tiny_positions, monkeypatch):
    """With boxes, all systems are compared by default."""
    jobs = []

    def run_together(some, processes):
        jobs.append([(setting.folder, seed) for setting, seed, *_ in some])
        raise InputError("enough")

    monkeypatch.setattr(compare, "run_together", run_together)
    args = [*ARGS, "--num_epochs", "1", "--processes", "2", "--seeds", "2"]
    with pytest.raises(InputError, match="enough"):
        compare.main([*args, *TINY.split()])
    for path in (tiny_positions / "data/tiny_precomp").glob("*_bbx.npy"):
        path.unlink()
    with pytest.raises(InputError, match="enough"):
        compare.main([*args, "--systems", "pfan", *TINY.split()])
    names = list(compare.SYSTEMS)
    assert jobs == [
        [(name, seed) for seed in (0, 1) for name in some] for some in (names, ["pfan"])
    ]
    with pytest.raises(InputError, match="no boxes"):
        compare.main([*ARGS, "--num_epochs", "1", "--systems", "gsmn", *TINY.split()])


def test_a_run_of_minutes(tiny):
    """0.001 minutes hold no third epoch on any machine."""
    compare.main([*ARGS, "--minutes", "0.001", "--systems", "scan", *TINY.split()])
    (row,) = read_table()
    assert row["epochs"] == "2" and len(read_log("out/scan_seed0")) == 2


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
        varied = f"--margin 0.1 {flag}"  # also among the flags of a setting
        with pytest.raises(SystemExit):
            compare.main([*ARGS, "--num_epochs", "1", "--systems", "scan", "--vary", "", varied])
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
