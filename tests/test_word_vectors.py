"""Word vectors: both text formats, spellings, and the messages about bad files."""

import numpy as np
import pytest
import torch

import checkpoint as ckpt
import train
from tests.conftest import train_args
from util.word_vectors import read_vectors
from vocab import SPECIAL, Vocabulary

WORDS = ["dog", "t-shirt", "and/or", "zebra", "'s", "ice cream"]


@pytest.fixture
def words():
    vocab = Vocabulary("one_sentence")
    for word in (*SPECIAL, *WORDS):
        vocab.add_word(word)
    return vocab


def write(path, rows, head=""):
    lines = [f"{word} {' '.join(map(str, vector))}\n" for word, vector in rows]
    path.write_text(head + "".join(lines), encoding="utf-8")
    return str(path)


ROWS = [
    ("the", [9, 9, 9]),
    ("dog", [1, 2, 3]),
    ("dog", [7, 7, 7]),  # a word again: the first one counts
    ("tshirt", [0.5, -1, 2e-3]),
    ("and", [4, 5, 6]),
    ("ice cream", [3, 2, 1]),  # a token with a space
    ("<pad>", [8, 8, 8]),
    ("Ärger", [1, 1, 1]),
]


@pytest.mark.parametrize("head", ["", "8 3\n", "\ufeff8 3\n", "\ufeff"])
def test_both_formats(tmp_path, words, head):
    ids, vectors = read_vectors(write(tmp_path / "v.txt", ROWS, head), words, 3)
    got = {words.idx2word[i]: v for i, v in zip(ids, vectors.tolist(), strict=True)}
    assert got.keys() == {"dog", "t-shirt", "and/or", "ice cream"}  # no vector for <pad>
    assert got["dog"] == [1, 2, 3] and got["and/or"] == [4, 5, 6] and got["ice cream"] == [3, 2, 1]
    np.testing.assert_allclose(got["t-shirt"], [0.5, -1, 2e-3])
    assert vectors.dtype == torch.float32


def test_an_exact_spelling_goes_first(tmp_path, words):
    rows = [("tshirt", [1, 1, 1]), ("t-shirt", [2, 2, 2])]
    _, vectors = read_vectors(write(tmp_path / "v.txt", rows), words, 3)
    assert vectors.tolist() == [[2, 2, 2]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dog 1 2\n", "line 1 has 2 numbers after its word, expected 3, as --word_dim says"),
        ("dog 1 2 3 4\n", "line 1 has 4 numbers"),
        ("5 300\n", "line 1 has 300 numbers"),
        ("5 2000000000\n", "line 1 has 2000000000 numbers"),
        ("the 1 2 3\ndog 1\n", "line 2 has 1 numbers"),
        ("the 1 2 3\ndog 1 x 3\n", "line 2: expected 3 numbers after a word"),
        ("dog 1 nan 3\n", "line 1 holds NaN or Inf"),
        ("the 1 2 3\n", "none of the 10 words of the vocabulary is in it"),
        ("", "none of the 10 words"),
    ],
)
def test_bad_files_are_named(tmp_path, words, text, message):
    (tmp_path / "v.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_vectors(str(tmp_path / "v.txt"), words, 3)
    with pytest.raises(FileNotFoundError, match="no such file; --wemb_path is a text file"):
        read_vectors(str(tmp_path / "no.txt"), words, 3)


@pytest.mark.parametrize("system", ["scan", "chan", "gsmn", "pfan_whole"])
def test_training_starts_from_them(tiny_positions, system, capsys):
    rows = [("dog", np.arange(8.0)), ("red", np.ones(8))]
    path = write(tiny_positions / "glove.txt", rows)
    more = {"num_block": 4, "feat_dim": 4, "hid_dim": 16} if system == "gsmn" else {}
    args = train_args(num_epochs=1, learning_rate=0, model=system, **more)
    train.main([*args, "--wemb_type", "glove", "--wemb_path", path])
    assert "found in vocabulary" in capsys.readouterr().out
    state = ckpt.load("run/checkpoint_0.pth.tar")
    words = ckpt.find_vocab(state, "x")
    embed = state["model"][1]["embed.weight"]
    assert (
        embed[words("dog")].tolist() == list(range(8)) and embed[words("red")].tolist() == [1] * 8
    )
    assert 0 < embed[words("cat")].abs().max() < (5 if system == "chan" else 0.1)
    train.main([*args, "--resume", "run/checkpoint_0.pth.tar", "--num_epochs", "2"])
    out = capsys.readouterr().out
    assert "found in vocabulary" not in out and "changed options" not in out
    for flags in (["--wemb_type", "glove"], ["--wemb_path", path], ["--wemb_type", "x"]):
        with pytest.raises(ValueError, match="expected glove or fasttext, and the file"):
            train.main([*args, *flags])
