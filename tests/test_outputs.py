"""outputs.py: the files of a command line are checked before scoring, and nothing else is lost."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import checkpoint as ckpt
import evaluation
import exports
from tests.test_exports import made, read_csv, read_json  # skips where scipy is missing
from util.cli import InputError

# Faults are said before scoring


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--json", "no/a.json"], "no/a.json: expected a file in an existing folder"),
        (["--csv", "no/a.csv"], "no/a.csv: expected a file in an existing folder"),
        (["--trec", "no/a"], "no/a.i2t.run: expected a file in an existing folder"),
        (["--report", "no/a.html"], "no/a.html: expected a file in an existing folder"),
        (["--json", "data"], "data: expected a file in an existing folder"),
        (
            ["--trec", "data/"],
            "--trec data/: a folder; expected the beginning of file names",
        ),
        (["--trec", "."], "--trec .: a folder; expected the beginning of file names"),
        (["--json", "x", "--csv", "./x"], "two outputs of one name, of x, ./x"),
        (["--json", "model.pth.tar"], "model.pth.tar: an input of this evaluation; give another"),
        (["--save_path", "a", "--json", "a"], "two outputs of one name, of a, a"),
        (["--save_path", "a.npy", "--json", "a_caption_image.txt"], "two outputs of one name"),
        (["--json", ""], "--json: an empty name; is a shell variable unset?"),
        (["--report", ""], "--report: an empty name"),
        (["--json", "data/tiny_precomp/test_caps.txt"], "exists, and is a file of the data"),
        (["--report", "data/tiny_precomp/test_ims.npy"], "exists, and is a file of the data"),
        (["--save_path", "data/tiny_precomp/train_ims.npy"], "exists, and is a file of the data"),
        (["--json", "vocab/tiny_precomp_vocab.json"], "exists, and holds no figures of --json"),
        (["--csv", "vocab/tiny_precomp_vocab.json"], "exists, and is not a table of --csv"),
        (["--report", "vocab/tiny_precomp_vocab.json"], "exists, and is no report"),
        (["--json", "/dev/null"], "/dev/null: not a file that can be replaced"),
        (["--json", "/proc/x.json"], "/proc/x.json: the folder cannot be written to"),
        (["--images", "data"], "--images: the photos are for --report"),
        (["--seeds", "curves.json"], "--seeds: the curves are for --report"),
        (
            ["--report", "r.html", "--seeds", "vocab/tiny_precomp_vocab.json"],
            "vocab.json: no settings and tests, expected the curves.json of scripts/compare.py",
        ),
    ],
)
def test_faults_are_said_before_scoring(untrained, monkeypatch, flags, said):
    monkeypatch.setattr(ckpt, "load_model", None)
    before = sorted(os.listdir())
    with pytest.raises(InputError) as error:
        evaluation.main(["model.pth.tar", *flags])
    assert said in str(error.value) and "\n" not in str(error.value)
    assert sorted(os.listdir()) == before


def test_a_table_of_the_data_is_not_taken_for_that_of_a_matrix(untrained):
    """`--save_path data/x/test.npy` would write or remove `data/x/test_caption_image.txt`."""
    folder = untrained / "data/tiny_precomp"
    table = "".join(f"{k // 5}\n" for k in range(75))
    (folder / "test_caption_image.txt").write_text(table)
    with pytest.raises(InputError, match="test_caption_image.txt exists and belongs to something"):
        evaluation.evalrank("model.pth.tar", split="test", save_path=str(folder / "test.npy"))
    assert (folder / "test_caption_image.txt").read_text() == table


def test_a_link_stays_a_link(untrained):
    Path("old.json").write_text('{"metrics": 1}')
    os.symlink("old.json", "link.json")
    evaluation.main(["model.pth.tar", "--split", "test", "--json", "link.json"])
    assert os.path.islink("link.json") and "intervals" in read_json("old.json")


def test_one_output_that_fails_does_not_stop_the_others(untrained, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(exports, "write_json", fail)
    flags = ["--json", "a.json", "--csv", "a.csv", "--trec", "a"]
    with pytest.raises(InputError, match="--json a.json: disk full"):
        evaluation.main(["model.pth.tar", "--split", "test", *flags])
    assert len(read_csv("a.csv")) == 2 and os.path.isfile("a.t2i.run")


def test_tables_that_grow_at_once_keep_all_lines(tmp_path):
    path, table = str(tmp_path / "a.csv"), made()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: exports.write_csv(path, table), range(24)))
    assert len(read_csv(path)) == 48 and not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("flag", ["--json", "--csv", "--report"])
def test_a_missing_package_is_named(untrained, monkeypatch, flag):
    monkeypatch.setattr(ckpt, "load_model", None)
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(InputError, match="pip install .*scipy"):
        evaluation.main(["model.pth.tar", flag, "x"])


def test_two_processes_write_once(tmp_path, torchrun):
    """Each of score matrices' outputs is written by one process, and stands there whole."""
    np.save(tmp_path / "a.npy", made().scores)
    flags = ["a.npy", "--json", "a.json", "--csv", "a.csv", "--trec", "a"]
    done = torchrun(evaluation.__file__, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rsum: ") == 1 and len(read_csv(tmp_path / "a.csv")) == 2
    assert sorted(os.listdir(tmp_path)) == sorted(
        ["a.npy", "a.json", "a.csv", *exports.trec_files("a")]
    )
