"""Vocabularies that older programs pickled: read by a restricted reader, and nothing runs."""

import collections
import json
import os
import pickle
import shutil
import struct

import numpy as np
import pytest
import torch

import checkpoint as ckpt
import evaluation
import options
import train
import vocab
from tests.conftest import train_args
from util.cli import InputError
from vocab import SPECIAL, deserialize_vocab

WORDS = [*SPECIAL, "dog", "café", "狗", "it's", "back\\slash"]


def text(word: str, protocol: int, unicode: bool) -> bytes:
    """A word as Python 2 pickles a `unicode` or, in UTF-8, a `str`."""
    data = word.encode()
    if unicode and protocol:
        return b"X" + struct.pack("<i", len(data)) + data
    if unicode:
        return b"V" + word.replace("\\", "\\u005c").encode("raw-unicode-escape") + b"\n"
    if protocol:
        return b"U" + bytes([len(data)]) + data
    return b"S'" + data.decode("latin1").encode("unicode_escape").replace(b"'", b"\\'") + b"'\n"


def python2(protocol: int, new: bool, unicode: bool, module: str, words=WORDS) -> bytes:
    """An object of `class Vocabulary` or `class Vocabulary(object)`, as Python 2 pickles it."""

    def mapping(pairs) -> bytes:
        return b"(d" + b"".join(key + value + b"s" for key, value in pairs)

    def name(x):
        return text(x, protocol, False)

    strings = [text(word, protocol, unicode and word not in SPECIAL) for word in words]
    number = [b"I%d\n" % i for i in range(len(words))]
    state = mapping(
        [
            (name("word2idx"), mapping(zip(strings, number, strict=True))),
            (name("idx2word"), mapping(zip(number, strings, strict=True))),
            (name("idx"), b"I%d\n" % len(words)),
        ]
    )
    cls = f"c{module}\nVocabulary\n".encode()
    if not new:
        start = b"(i" + cls[1:] if protocol == 0 else b"(" + cls + b"o"
    elif protocol == 2:
        start = cls + b")\x81"
    else:
        start = b"ccopy_reg\n_reconstructor\n(" + cls + b"c__builtin__\nobject\nNtR"
    return (b"\x80\x02" if protocol == 2 else b"") + start + state + b"b."


@pytest.mark.parametrize("module", ["vocab", "__main__", "lib.vocab"])
@pytest.mark.parametrize("unicode", [False, True])
@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_pickles_of_python_2(tmp_path, capsys, protocol, new, unicode, module):
    path = tmp_path / "f8k_vocab.pkl"
    path.write_bytes(python2(protocol, new, unicode, module))
    words = deserialize_vocab(path)
    assert words.word2idx == {word: i for i, word in enumerate(WORDS)}
    # The rules of published files.
    assert words.lower == "ascii" and words.tokenizer is None and words.captions is None
    words.tokenizer = "one_sentence"
    assert words.encode("Dog CAFÉ café 狗")[1:-1] == [4, 3, 5, 6]
    assert capsys.readouterr().err.count("notice: ") == 1


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_python_3(tmp_path, protocol):
    words = vocab.Vocabulary()
    for word in WORDS:
        words.add_word(word)
    for x in (words, words.state_dict()):
        path = tmp_path / "v.pkl"
        path.write_bytes(pickle.dumps(x, protocol))
        assert deserialize_vocab(path).word2idx == words.word2idx


def test_words_in_latin1(tmp_path):
    stream = python2(2, True, False, "vocab").replace(b"U\x05caf\xc3\xa9", b"U\x04caf\xe9")
    (tmp_path / "v.pkl").write_bytes(stream)
    assert deserialize_vocab(tmp_path / "v.pkl").idx2word[5] == "café"


class Hostile:
    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("protocol", range(5))
def test_hostile_pickles_are_refused_and_nothing_runs(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    for function in (
        os.mkdir,
        eval,
        exec,
        getattr,
        print,
        object,
        pickle.loads,
        vocab.serialize_vocab,
    ):
        evil = Hostile(function, "ran")
        for x in (evil, {"word2idx": evil}, {"word2idx": {word: evil for word in SPECIAL}}):
            with open("v.pkl", "wb") as file:
                pickle.dump(x, file, protocol)
            with pytest.raises(InputError, match="v.pkl: (refused, a pickle|not a whole pickled)"):
                deserialize_vocab("v.pkl")
    assert os.listdir() == ["v.pkl"]


@pytest.mark.parametrize(
    "stream",
    [
        b"cos\nVocabulary\n(S'x'\ntR.",  # called, like a function
        b"cvocab\nVocabulary\n}S'word2idx'\nI1\nsb.",  # the class itself gets a state
        b"ccopy_reg\n_reconstructor\n}S'x'\nI1\nsb.",
        b"ccopy_reg\n_reconstructor\n(c__builtin__\nobject\nc__builtin__\nobject\nNtR.",
        b"c__builtin__\nobject\n(tR.",
        b"ccopy_reg\n_reconstructor\n(cposix\nsystem\nc__builtin__\nobject\nNtR.",
        b"cvocab\nVocabulary\n)\x81.",  # without attributes
        b"cvocab\nVocabulary\n)\x81I5\nb.",
        b"cvocab\nVocabulary.__init__\n.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02ls\x85R.",
        b"(lp0\n.",
        b"Pid\n.",
    ],
)
def test_streams_that_no_program_writes(tmp_path, stream):
    for start in (b"", b"\x80\x02"):
        (tmp_path / "v.pkl").write_bytes(start + stream)
        with pytest.raises(InputError, match="v.pkl: "):
            deserialize_vocab(tmp_path / "v.pkl")


def test_a_cut_pickle_is_named(tmp_path):
    stream = python2(2, True, False, "vocab")
    for size in range(1, len(stream), 7):
        (tmp_path / "v.pkl").write_bytes(stream[:size])
        with pytest.raises(InputError, match="v.pkl: not a whole pickled vocabulary"):
            deserialize_vocab(tmp_path / "v.pkl")


@pytest.mark.parametrize(
    "word2idx",
    [None, [1], {"<pad>": 0}, {word: [1] for word in SPECIAL}, {word: "1" for word in SPECIAL}]
    + [{word: 0 for word in SPECIAL}, dict(zip(SPECIAL, range(4), strict=True)) | {4: 4}],
)
def test_contents_of_another_kind_are_named(tmp_path, word2idx):
    (tmp_path / "v.pkl").write_bytes(pickle.dumps({"word2idx": word2idx}, 2))
    with pytest.raises(InputError, match="v.pkl: "):
        deserialize_vocab(tmp_path / "v.pkl")
    if not isinstance(word2idx, dict) or all(isinstance(x, str) for x in word2idx):
        (tmp_path / "v.json").write_text(json.dumps({"word2idx": word2idx}))
        with pytest.raises(InputError, match="v.json: "):
            deserialize_vocab(tmp_path / "v.json")


def pickled(source: str, dest: str) -> None:
    """Write the words of a vocabulary file as an older program does, and remove the file."""
    words = deserialize_vocab(source)
    with open(dest, "wb") as file:
        file.write(python2(2, False, False, "vocab", list(words.word2idx)))
    os.remove(source)


def test_a_checkpoint_with_a_pickled_vocabulary(tiny, capsys):
    """It takes the place of a missing .json, in a folder, or is named itself."""
    train.main(train_args(num_epochs=1))
    want = evaluation.evalrank("run/model_best.pth.tar", split="test")
    state = torch.load("run/model_best.pth.tar", weights_only=False)
    del state["vocab"], state["run"], state["opt"].model
    torch.save(state, "old.pth.tar")
    pickled("vocab/tiny_precomp_vocab.json", "vocab/tiny_precomp_vocab.pkl")
    shutil.copytree("vocab", "other/vocab[1]")
    for place in (None, "vocab", "vocab/tiny_precomp_vocab.pkl", "other/vocab[1]"):
        capsys.readouterr()
        assert evaluation.evalrank("old.pth.tar", split="test", vocab_path=place) == want
        assert (
            "tiny_precomp_vocab.pkl: a vocabulary that an older program" in capsys.readouterr().err
        )
    opt = ckpt.load("old.pth.tar")["opt"]
    assert ckpt.vocab_file("vocab", opt) == "vocab/tiny_precomp_vocab.pkl"
    with pytest.raises(FileNotFoundError, match=r"its folder holds tiny_precomp_vocab.pkl"):
        deserialize_vocab("vocab/f30k_precomp_vocab.json")


def test_the_file_that_a_vocab_path_names(tiny, monkeypatch):
    opt = options.parse(["--data_name", "tiny_precomp"])
    monkeypatch.setenv("HOME", str(tiny))
    json_file = str(tiny / "vocab" / "tiny_precomp_vocab.json")
    assert ckpt.vocab_file("~/vocab", opt) == json_file
    assert ckpt.vocab_file("~/vocab/tiny_precomp_vocab.json", opt) == json_file
    shutil.copy(json_file, tiny / "words.txt")  # a file is taken whatever its name
    assert ckpt.vocab_file("words.txt", opt) == "words.txt"
    assert ckpt.vocab_file("none.json", opt) == "none.json"
    assert ckpt.vocab_file(tiny / "none", opt) == str(tiny / "none" / "tiny_precomp_vocab.json")
    assert len(deserialize_vocab("~/vocab/tiny_precomp_vocab.json")) == 20


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_other_kinds_of_dicts_and_numbers(tmp_path, protocol):
    path = tmp_path / "v.pkl"
    pairs = [(word, i) for i, word in enumerate(WORDS)]
    for kind in (
        collections.OrderedDict,
        collections.Counter,
        lambda x: collections.defaultdict(int, x),
        lambda x: collections.defaultdict(None, x),
        lambda x: {word: np.int64(i) for word, i in x.items()},
        lambda x: {word: np.int32(i) for word, i in x.items()},
    ):
        words = vocab.Vocabulary()
        words.word2idx = kind(dict(pairs))
        for x in (words, {"word2idx": words.word2idx}, kind(dict(pairs)) and vars(words)):
            path.write_bytes(pickle.dumps(x, protocol))
            found = deserialize_vocab(path)
            assert list(found.word2idx.items()) == pairs
            assert {type(i) for i in found.word2idx.values()} == {int}


def test_ordered_dicts_of_python_2(tmp_path):
    content = "".join(f"(lp0\nV{word}\naI{i}\naa" for i, word in enumerate([*SPECIAL, "dog"]))
    stream = f"(dS'word2idx'\nccollections\nOrderedDict\n((l{content}tRs."
    (tmp_path / "v.pkl").write_bytes(stream.encode())
    assert deserialize_vocab(tmp_path / "v.pkl").word2idx["dog"] == 4


def test_the_sentences_vocabulary_of_pfan_whole_may_be_pickled(tmp_path):
    opt = options.parse(["--model", "pfan_whole", "--data_name", "x"])
    cases = (
        (["x_vocab.json", "x_sent_vocab.pkl"], "x_sent_vocab.pkl"),
        (["x_vocab.pkl", "x_sent_vocab.pkl"], "x_sent_vocab.pkl"),
        (["x_vocab.pkl", "x_sent_vocab.json"], "x_sent_vocab.json"),
        (["x_vocab.pkl"], "x_vocab.pkl"),
        ([], "x_sent_vocab.json"),
    )
    for k, (names, want) in enumerate(cases):
        folder = tmp_path / f"v{k}"
        folder.mkdir()
        for name in names:
            (folder / name).write_text("")
        assert ckpt.vocab_file(folder, opt) == str(folder / want)
