"""A vocabulary says which captions it was built from; training and the row scripts compare."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
import vocab
from tests.conftest import train_args
from tests.test_scripts import bash
from util.cli import InputError
from util.fingerprint import fingerprint
from vocab import Vocabulary, check_captions, deserialize_vocab, serialize_vocab

ROOT = Path(vocab.__file__).parent
CAPTIONS = {"train": ["A dog .", "two cafés", "", "a cat"] * 4, "dev": ["a dog runs ."] * 4}


def write(folder: Path, captions=CAPTIONS, name="caps", end="\n", last="\n", first="") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, lines in captions.items():
        text = first + end.join(lines) + last
        (folder / f"{split}_{name}.txt").write_bytes(text.encode())
    return folder


def test_the_form_of_a_file_makes_no_difference(tmp_path):
    want = fingerprint(write(tmp_path / "a"))
    assert want["lines"] == 20 and len(want["sha256"]) == 64
    for form in (
        {"end": "\r\n", "last": "\r\n"},
        {"last": ""},
        {"end": " \n", "last": " \n"},
        {"first": "\ufeff"},
        {"end": "\r\n", "last": "", "first": "\ufeff"},
    ):
        assert fingerprint(write(tmp_path / "b", **form)) == want
    assert fingerprint(write(tmp_path / "b", name="sent_caps"), "sent_caps")["lines"] == 20


@pytest.mark.parametrize(
    "change",
    [
        lambda train, dev: (train[:-1], dev),
        lambda train, dev: (train, dev[:-1]),
        lambda train, dev: (train[::-1], dev),
        lambda train, dev: (train[:-1], [train[-1], *dev]),
        lambda train, dev: ([*train, ""], dev),
        lambda train, dev: ([x.lower() for x in train], dev),
    ],
)
def test_other_captions_make_a_difference(tmp_path, change):
    want = fingerprint(write(tmp_path / "a"))
    changed = dict(zip(("train", "dev"), change(*CAPTIONS.values()), strict=True))
    assert fingerprint(write(tmp_path / "b", changed)) != want
    (tmp_path / "b" / "dev_caps.txt").unlink()
    assert fingerprint(tmp_path / "b") is None


def test_the_file_records_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data" / "x")
    vocab.main(["--data_name", "x"])
    state = json.loads(Path("vocab/x_vocab.json").read_text())
    assert (
        state["captions"]
        == fingerprint("data/x")
        == {
            "sha256": state["captions"]["sha256"],
            "lines": 20,
            "name": "caps",
        }
    )
    words = deserialize_vocab("vocab/x_vocab.json")
    serialize_vocab(words, "again.json")
    assert Path("again.json").read_bytes() == Path("vocab/x_vocab.json").read_bytes()
    assert Vocabulary.from_state_dict(words.state_dict(), "x").captions == words.captions
    for wrong in ("x", [], {"sha256": 1, "lines": 2, "name": "caps"}, words.captions | {"more": 1}):
        with pytest.raises(InputError, match="x: 'captions' is .*, expected the sha256"):
            Vocabulary.from_state_dict(state | {"captions": wrong}, "x")
    endless = []
    for _ in range(60):
        endless = [endless, endless]
    with pytest.raises(InputError, match="'captions' is"):
        Vocabulary.from_state_dict(state | {"captions": endless}, "x")


def test_checkpoints_hold_it(tiny):
    train.main(train_args(num_epochs=1))
    stored = torch.load("run/model_best.pth.tar", weights_only=False)["vocab"]["captions"]
    assert stored == fingerprint("data/tiny_precomp") and stored["lines"] == 150


def made(folder: Path, known: bool) -> Vocabulary:
    words = vocab.build_vocab(str(folder.parent), folder.name)
    if not known:
        words.captions = None
    return words


@pytest.mark.parametrize(
    ("known", "unknown", "warned"),
    [(False, 0, False), (False, 300, False), (False, 301, True), (False, 3000, True)]
    + [(True, 0, True), (True, 100, True), (True, 3000, True)],
)
def test_other_captions_are_warned_of(tmp_path, capsys, known, unknown, warned):
    """Published files, which do not say what they are of, are judged by the unknown words."""
    words = made(write(tmp_path / "old"), known)
    other = write(tmp_path / "new", CAPTIONS | {"dev": ["another", "caption"] * 5})
    capsys.readouterr()
    check_captions(words, other, unknown, 10_000, "vocab/x_vocab.json")
    said = capsys.readouterr().out
    assert bool(said) == warned
    if warned:
        assert said.startswith("warning: vocab/x_vocab.json: ") and said.count("\n") == 1
        assert f"{unknown:,} of the 10,000 words of train ({unknown / 100:.1f} %)" in said
        assert "other captions" in said and "vocab.py" in said and "--vocab_path" in said
        for x in (words.captions, fingerprint(other)) if known else ():
            assert f"{x['lines']:,} (SHA-256 {x['sha256'][:8]})" in said


@pytest.mark.parametrize("known", [False, True])
def test_a_hopeless_vocabulary_is_refused(tmp_path, capsys, known):
    words = made(write(tmp_path / "old"), known)
    other = write(tmp_path / "new", {"train": ["another"] * 9, "dev": ["one"]})
    capsys.readouterr()
    with pytest.raises(InputError, match="v.json: 3,001 of the 10,000 .* --allow_unknown"):
        check_captions(words, other, 3001, 10_000, "v.json")
    check_captions(words, other, 3001, 10_000, "v.json", allow_unknown=True)
    assert capsys.readouterr().out.startswith("warning: v.json: 3,001 of the 10,000")


def test_its_own_captions_are_never_warned_of(tmp_path, capsys):
    words = made(write(tmp_path / "own"), True)
    write(tmp_path / "own", end="\r\n", last="")
    for unknown in (0, 500, 9000):
        check_captions(words, tmp_path / "own", unknown, 10_000, "v.json")
    words.pieces = True  # BERT's are of no captions
    check_captions(words, tmp_path / "other", 9000, 10_000, "v.json")
    assert "warning" not in capsys.readouterr().out


def run_check(home: Path, *args) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "vocab.py", "--check", *args],
        cwd=home,
        capture_output=True,
        text=True,
    )


def test_check_compares_and_builds_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("data/x"))
    write(Path("data/x"), name="sent_caps")
    done = run_check(tmp_path, "--data_name", "x")
    assert done.returncode == 1 and "no vocabulary file" in done.stderr
    assert not os.path.exists("vocab")
    for sent in ([], ["--sent"]):
        vocab.main(["--data_name", "x", *sent])
        done = run_check(tmp_path, "--data_name", "x", *sent)
        assert done.returncode == 0 and "built from the captions of data/x" in done.stdout
    write(Path("data/x"), CAPTIONS | {"dev": ["x"]})
    before = Path("vocab/x_vocab.json").read_bytes()
    done = run_check(tmp_path, "--data_name", "x")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    for part in (
        "error: vocab/x_vocab.json: it was built from other captions, 20 (SHA-256 ",
        "data/x has 17 ",
        "remove or move",
        "VOCAB_PATH",
    ):
        assert part in done.stderr
    assert run_check(tmp_path, "--data_name", "x", "--sent").returncode == 0
    Path("data/x/dev_sent_caps.txt").unlink()
    done = run_check(tmp_path, "--data_name", "x", "--sent")
    assert done.returncode == 1 and "data/x has no {split}_sent_caps.txt" in done.stderr
    assert Path("vocab/x_vocab.json").read_bytes() == before
    state = json.loads(before)  # a published file
    for name in ("captions", "tokenizer", "lower"):
        del state[name]
    Path("vocab/x_vocab.json").write_text(json.dumps(state))
    done = run_check(tmp_path, "--data_name", "x")
    assert done.returncode == 0 and "does not say which captions" in done.stdout


def test_row_scripts_do_not_reuse_a_vocabulary_of_other_captions(tmp_path):
    """What a row script calls, with a Python that writes down all but vocab.py."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/bash\necho "$@" >> {tmp_path}/calls\n'
        f'case "$1" in *vocab.py) exec {sys.executable} "$@";; esac\n'
    )
    python.chmod(0o755)

    def row(**env):
        (tmp_path / "calls").write_text("")
        done = bash(tmp_path, "scan_f30k_t2i_avg", "data", PYTHON=str(python), **env)
        return done, [x.split()[0].split("/")[-1] for x in open(tmp_path / "calls")]

    folder = write(tmp_path / "data" / "f30k_precomp")
    for _ in range(2):  # built, then checked
        done, calls = row()
        assert done.returncode == 0 and calls == ["vocab.py", "train.py", "evaluation.py"]
    write(folder, CAPTIONS | {"train": ["another caption"] * 8})
    done, calls = row()
    assert done.returncode == 1 and calls == ["vocab.py"]
    assert "error: vocab/f30k_precomp_vocab.json: it was built from other" in done.stderr
    done, calls = row(VOCAB_PATH="words")
    assert done.returncode == 0 and (tmp_path / "words" / "f30k_precomp_vocab.json").is_file()
    state = json.loads((tmp_path / "vocab" / "f30k_precomp_vocab.json").read_text())
    (tmp_path / "vocab" / "f30k_precomp_vocab.json").write_text(
        json.dumps({name: state[name] for name in ("word2idx", "idx2word", "idx")})
    )
    done, calls = row()  # training judges a published file by its unknown words
    assert done.returncode == 0 and "--check" in (tmp_path / "calls").read_text()


@pytest.mark.parametrize(
    ("built", "read"), [("caps", "sent_caps"), ("sent_caps", "caps"), ("caps", "caps")]
)
def test_captions_of_another_name_are_judged_by_the_unknown_words(tmp_path, capsys, built, read):
    folder = write(write(tmp_path / "x"), {"train": ["other"] * 9, "dev": ["one"]}, "sent_caps")
    words = vocab.build_vocab(str(tmp_path), "x", captions=built)

    def said(unknown, folder=folder):
        capsys.readouterr()
        check_captions(words, folder, unknown, 10_000, "v.json", name=read)
        return capsys.readouterr().out

    if built == read:
        assert not said(9000)
        return
    assert not said(300)
    warning = said(3000)
    assert warning.startswith("warning: v.json: 3,000 of the 10,000 words of train (30.0 %)")
    assert f"of {{split}}_{built}.txt, and {folder} has " in warning
    assert f"in {{split}}_{read}.txt" in warning
    assert (" --sent --out" in warning) == (read == "sent_caps")
    with pytest.raises(InputError, match="v.json: 4,700 of the 10,000 words"):
        said(4700)
    write(folder, {"train": ["new"] * 4, "dev": ["one"]}, built)
    assert "other captions" in said(0)
    for name in ("caps", "sent_caps"):  # the same captions twice
        write(folder, name=name)
    words.captions = fingerprint(folder, built)
    assert not said(9000)


def test_an_earlier_vocabulary_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder, path = write(Path("data/x")), Path("vocab/x_vocab.json")

    def build(*more):
        before = path.read_bytes() if path.exists() else b""
        capsys.readouterr()
        vocab.main(["--data_name", "x", *more])
        return before, capsys.readouterr().out.count("notice: vocab/x_vocab.json was of other")

    assert build()[1] == build()[1] == build("--threshold", "2")[1] == 0
    assert os.listdir("vocab") == ["x_vocab.json"]
    write(folder, CAPTIONS | {"train": ["another caption"] * 8})
    before, notices = build()
    assert notices == 1 and Path("vocab/x_vocab.earlier_1.json").read_bytes() == before
    state = json.loads(path.read_text())
    del state["captions"], state["tokenizer"], state["lower"]
    for k, text in ((2, json.dumps(state)), (3, "no vocabulary"), (4, "")):
        path.write_text(text)
        assert build()[1] == 1
        assert Path(f"vocab/x_vocab.earlier_{k}.json").read_text() == text
    assert len(os.listdir("vocab")) == 5 and deserialize_vocab(path).captions
