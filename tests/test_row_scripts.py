"""What the shell scripts call: folders, vocabularies, --resume, the paper's sizes, flags."""

import os
import re
import subprocess
from pathlib import Path

import pytest

import options
import train
from scripts import compare

SCRIPTS = {path.stem: path.read_text() for path in Path(train.__file__).parent.glob("scripts/*.sh")}
ROWS = sorted(name for name, text in SCRIPTS.items() if ')/row.sh"' in text)
ENSEMBLES = sorted(name for name, text in SCRIPTS.items() if ')/ensemble.sh"' in text)
RECIPES = sorted(name for name, text in SCRIPTS.items() if ')/recipe.sh"' in text)
ROW, FOLDER = "scan_f30k_t2i_avg", "runs/scan_f30k_t2i_avg"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A working directory with the folders of three data sets, and a Python that writes down calls.

    The checkpoints of all rows are there, as empty files.
    """
    monkeypatch.chdir(tmp_path)
    python = tmp_path / "python"
    python.write_text(f"#!/bin/bash\n{{ printf '%s\\0' \"$@\"; echo; }} >> '{tmp_path}/calls'\n")
    python.chmod(0o755)
    for name in ("f30k_precomp", "coco_precomp", "tencent_data", "flickr8k_precomp"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for row in ROWS:
        (tmp_path / "runs" / row).mkdir(parents=True)
        (tmp_path / "runs" / row / "model_best.pth.tar").touch()
    return tmp_path


def run(home: Path, script: str, *args: str, cwd: Path | str = ".", **env: str):
    """What the script printed, and its calls of Python: a list of arguments each."""
    (home / "calls").write_text("")
    done = subprocess.run(
        ["bash", Path(train.__file__).parent / "scripts" / f"{script}.sh", *args],
        cwd=home / cwd,
        env=os.environ | {"PYTHON": str(home / "python")} | env,
        capture_output=True,
        text=True,
    )
    calls = [call.split("\0") for call in (home / "calls").read_text().split("\0\n")[:-1]]
    return done, [[Path(call[0]).stem, *call[1:]] for call in calls]


def value(call: list[str], flag: str) -> str:
    assert call.count(flag) == 1, call
    return call[call.index(flag) + 1]


@pytest.mark.parametrize("script", [*ROWS, *ENSEMBLES])
def test_each_row_of_a_paper_comes_with_the_number_of_its_images(home, script):
    done, calls = run(home, script, "data")
    assert done.returncode == 0, done.stderr
    rows = re.findall(r'^paper(?:_5k)?="(.+)"$', SCRIPTS[script], re.MULTILINE)
    shown = [call for call in calls if "--paper" in call]
    assert [" ".join(call[call.index("--paper") + 1 :]) for call in shown] == rows
    for call in shown:
        whole = value(call, "--split") == "testall" and "--fold5" not in call
        assert value(call, "--paper_images") == ("5000" if whole else "1000")
    assert not any("--paper_images" in call for call in calls if call not in shown)
    assert not re.search(r"\d,\d{3}|\b\dK\b", done.stdout)  # the titles tell no numbers


def test_all_rows_were_tried():
    assert len(ROWS) == 28 and len(ENSEMBLES) == 7
    assert RECIPES == ["f8k_chan", "f8k_gsmn", "f8k_pfan", "f8k_scan", "f8k_vse"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_one_comparison_of_three_seeds(home, recipe):
    """Flags that are given come last: of two, argparse takes the second."""
    env = {"RUNS": "my runs", "VOCAB_PATH": "~/words", "HOME": str(home)}
    done, calls = run(home, recipe, "data/flickr8k_precomp", "--margin", "0.3", **env)
    assert done.returncode == 0 and len(calls) == 1, done.stderr
    call, at = calls[0], calls[0].index("--")
    opt = compare.build_parser().parse_args(call[1:at])
    assert call[0] == "compare" and opt.systems == [recipe.removeprefix("f8k_")]
    assert (home / opt.data_path / opt.data_name).samefile(home / "data" / "flickr8k_precomp")
    assert (opt.seeds, opt.out, opt.split) == ([3], f"my runs/{recipe}", "test")
    assert opt.vocab_path == str(home / "words") and opt.num_epochs
    flags = call[at + 1 :]
    assert flags[-2:] == ["--margin", "0.3"] and options.parse(flags).margin == 0.3
    assert f"bash scripts/{recipe}.sh DATA_PATH" in SCRIPTS[recipe]


@pytest.mark.parametrize("args", [[], ["--margin", "0.3"]])
def test_the_use_of_a_recipe_is_explained(home, args):
    done, calls = run(home, "f8k_scan", *args)
    assert done.returncode == 2 and not calls
    assert done.stderr.startswith("use: bash scripts/f8k_scan.sh DATA_PATH [more flags of train")


@pytest.mark.parametrize(
    "script", [ROW, "chan_f30k_bert", "gsmn_f30k_sparse", "scan_f30k_ensemble"]
)
@pytest.mark.parametrize(
    ("given", "cwd"),
    [
        ("data/", "."),
        ("data/f30k_precomp", "."),
        ("data/f30k_precomp//", "."),
        (".", "data"),
        (".", "data/f30k_precomp"),
        ("..", "data/f30k_precomp/old"),
        ("~/data", "runs"),
        ("~/data/f30k_precomp/", "runs"),
        ("a [b]*? c", "."),
        ("a [b]*? c/f30k_precomp", "."),
        ("f30k_precomp", "a [b]*? c"),
    ],
)
def test_all_forms_of_a_data_path(home, script, given, cwd):
    (home / "data" / "f30k_precomp" / "old").mkdir()
    for name in ("a [b]*? c", "a b c", "a bxx c"):  # a pattern would find the others
        (home / name / "f30k_precomp").mkdir(parents=True)
    (home / "data" / "f30k_precomp" / "train_caps.txt").touch()
    there = home / ("a [b]*? c" if "[" in given + cwd else "data") / "f30k_precomp"
    env = {"HOME": str(home), "RUNS": str(home / "runs"), "VOCAB_PATH": str(home / "vocab")}
    done, calls = run(home, script, given, cwd=cwd, **env)
    assert done.returncode == 0 and calls, done.stderr
    for call in calls:
        found = home / cwd / value(call, "--data_path") / "f30k_precomp"
        assert found.samefile(there)
        assert call[0] == "evaluation" or value(call, "--data_name") == "f30k_precomp"


@pytest.mark.parametrize("script", [ROW, "chan_f30k_bert", "pfan_f30k_i2t", "scan_f30k_ensemble"])
@pytest.mark.parametrize("given", ["nowhere", "data/f30k", "data/coco_precomp", "only_coco", "a b"])
def test_without_data_nothing_is_built(home, script, given):
    (home / "only_coco" / "coco_precomp").mkdir(parents=True)
    done, calls = run(home, script, given)
    assert done.returncode == 1 and not calls and not done.stdout
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {given}/f30k_precomp: no such data folder; DATA_PATH ")
    assert not (home / "vocab").exists()


@pytest.mark.parametrize("flag", "data_path data_name vocab_path model_name logger_name".split())
@pytest.mark.parametrize("end", [["x"], []])
def test_a_row_refuses_the_flags_that_it_sets(home, flag, end):
    """With another --model_name it would test an earlier run."""
    args = [f"--{flag}", *end] if end else [f"--{flag}=x"]
    done, calls = run(home, ROW, "data", "--num_epochs", "2", *args)
    assert done.returncode == 2 and not calls
    assert f"error: --{flag}: this script sets it" in done.stderr


@pytest.mark.parametrize("form", [["--resume", "{}"], ["--resume={}"]])
def test_resume_goes_on_in_the_folder_of_its_run(home, form):
    """A run of this row keeps its own flags, such as a learning rate that was given."""

    def resumed(path, *more, **env):
        args = ["--num_epochs", "7", *(x.format(path) for x in form), *more]
        done, calls = run(home, ROW, "data", *args, **env)
        assert done.returncode == 0, done.stderr
        training, tested = calls[-2:]
        assert training[0] == "train" and training[-len(args) :] == args
        folder = value(training, "--model_name")
        assert value(training, "--logger_name") == folder
        assert tested[:2] == ["evaluation", f"{folder}/model_best.pth.tar"]
        return folder, "--cross_attn" in training

    assert resumed(f"{FOLDER}/interrupted.pth.tar") == (FOLDER, False)
    path = home / FOLDER / "checkpoint_3.pth.tar"
    assert resumed(path) == (str(path.parent), False)
    (home / "kept [1]").mkdir()
    assert resumed("kept [1]/checkpoint_3.pth.tar") == ("kept [1]", True)
    assert resumed(path, "--reset_start_epoch") == (FOLDER, True)  # a new run
    here = {"RUNS": "~/here", "HOME": str(home)}
    (home / "here" / ROW).mkdir(parents=True)
    assert resumed(f"~/here/{ROW}/a.pth.tar", **here) == (str(home / "here" / ROW), False)


def test_what_is_checked_is_what_is_trained_with(home):
    """A vocabulary is a file of the folder, a file, or one of an older program."""

    def used(row="scan_f30k_t2i_avg", **env):
        done, calls = run(home, row, "data", **env)
        assert done.returncode == 0, done.stderr
        words = [call for call in calls if call[0] == "vocab"][0]
        path = value(words, "--out")
        assert {value(x, "--vocab_path") for x in calls if "--vocab_path" in x} == {path}
        return path, "--check" in words

    assert used() == ("vocab/f30k_precomp_vocab.json", False)
    assert used(VOCAB_PATH="my words") == ("my words/f30k_precomp_vocab.json", False)
    assert used(VOCAB_PATH="v.json") == ("v.json", False)
    assert used(VOCAB_PATH="~/v.json", HOME=str(home)) == (f"{home}/v.json", False)
    (home / "v.json").touch()
    assert used(VOCAB_PATH="v.json") == ("v.json", True)
    (home / "vocab").mkdir()
    (home / "vocab" / "f30k_precomp_vocab.pkl").touch()
    (home / "data" / "f30k_precomp" / "train_caps.txt").touch()
    for row in ("scan_f30k_t2i_avg", "gsmn_f30k_sparse"):  # the second parses its captions
        assert used(row) == ("vocab/f30k_precomp_vocab.pkl", True)
    (home / "vocab" / "f30k_precomp_vocab.json").touch()
    assert used() == ("vocab/f30k_precomp_vocab.json", True)
    # PFAN's whole-image variant would take the first, where both are there.
    (home / "vocab" / "tencent_data_sent_vocab.json").touch()
    assert used("pfan_tencent_t2i") == ("vocab/tencent_data_vocab.json", False)
    (home / "data" / "tencent_data" / "train_sent_caps.txt").touch()
    assert used("pfan_tencent_t2i") == ("vocab/tencent_data_sent_vocab.json", True)


def test_an_ensemble_is_tested_on_the_data_of_its_title(home):
    """Two checkpoints may be of models that were trained on another data set."""
    for args in ([], ["a.pth.tar", "b c.pth.tar"]):
        done, calls = run(home, "scan_coco_ensemble", "data", *args)
        assert done.returncode == 0 and len(calls) == 2, done.stderr
        for call in calls:
            assert value(call, "--data_name") == "coco_precomp"
            assert not args or call[1:3] == args
    done, calls = run(home, "scan_coco_ensemble", "data", RUNS="~/runs", HOME=str(home))
    assert done.returncode == 0 and all(Path(path).is_file() for path in calls[0][1:3])
