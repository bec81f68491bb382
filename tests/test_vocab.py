"""Vocabulary files, tokens, and the messages when they are wrong."""

import json
import os
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import nltk
import pytest

import options
import systems
import vocab
from vocab import Vocabulary, deserialize_vocab, read_captions, serialize_vocab, tokenize

ROOT = Path(vocab.__file__).parent


@pytest.fixture
def punkt(monkeypatch):
    """Set whether nltk's punkt data seems to be installed."""

    def install(there: bool):
        vocab.available_tokenizer.cache_clear()

        def word_tokenize(text, preserve_line=False):
            if not preserve_line and not there:
                raise LookupError("punkt_tab")
            return text.replace(".", " . ").split() if there and not preserve_line else text.split()

        monkeypatch.setattr(nltk, "word_tokenize", word_tokenize)

    yield install
    vocab.available_tokenizer.cache_clear()


def test_build_counts_orders_and_thresholds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "x_precomp"
    folder.mkdir(parents=True)
    (folder / "train_caps.txt").write_text("A Dog runs .\nthe dog\ndog cat\n")
    (folder / "dev_caps.txt").write_text("cat dog the\n")
    vocab.main(["--data_path", "data", "--data_name", "x_precomp", "--threshold", "2"])
    first = (tmp_path / "vocab" / "x_precomp_vocab.json").read_bytes()
    words = json.loads(first)
    assert list(words["word2idx"]) == ["<pad>", "<start>", "<end>", "<unk>", "dog", "the", "cat"]
    assert words["idx"] == 7 and words["idx2word"]["4"] == "dog"
    assert words["tokenizer"] in ("punkt", "one_sentence")
    vocab.main(["--data_name", "x_precomp", "--threshold", "2", "--out", "again/v.json"])
    assert (tmp_path / "again" / "v.json").read_bytes() == first
    vocab.main(["--data_name", "x_precomp", "--threshold", "4", "--out", "few.json"])
    assert len(deserialize_vocab("few.json")) == 5
    with pytest.raises(ValueError, match="no word of data/x_precomp occurs 9 times"):
        vocab.main(["--data_name", "x_precomp", "--threshold", "9", "--out", "none.json"])
    with pytest.raises(ValueError, match="again: a folder"):
        vocab.main(["--data_name", "x_precomp", "--threshold", "2", "--out", "again"])


def test_round_trip_and_encoding(tmp_path):
    words = Vocabulary("one_sentence")
    for word in (*vocab.SPECIAL, "dog", "dog", "."):
        words.add_word(word)
    serialize_vocab(words, tmp_path / "v.json")
    back = deserialize_vocab(tmp_path / "v.json")
    assert back.state_dict() == words.state_dict()
    assert back.idx2word[4] == "dog" and back("cat") == back("<unk>") == 3
    assert back.encode("Dog zebra.") == [1, 4, 3, 5, 2]
    assert back.encode("") == [1, 2]


def test_published_file_reads(tmp_path):
    """They have no tokenizer key, and their indices are strings."""
    word2idx = {word: i for i, word in enumerate((*vocab.SPECIAL, "two"))}
    idx2word = {str(i): word for word, i in word2idx.items()}
    state = {"word2idx": word2idx, "idx2word": idx2word, "idx": 5}
    (tmp_path / "v.json").write_text(json.dumps(state))
    words = deserialize_vocab(tmp_path / "v.json")
    assert len(words) == 5 and words("two") == 4 and words.tokenizer is None


# Three capitals that are in the published Tencent vocabulary, and an edge that only Unicode strips:
# after it a quote would not open.
CAPTION = '\u3000"\uff21 \u00c9T\u00c9 Dog\u03a9" \x1c'


def published(*words) -> dict:
    """A vocabulary in the form of a published file."""
    word2idx = {word: i for i, word in enumerate((*vocab.SPECIAL, *words))}
    return {"word2idx": word2idx, "idx2word": {}, "idx": len(word2idx)}


def test_published_vocabularies_lower_ascii_letters_only():
    assert tokenize(CAPTION, "one_sentence") == ["``", "\uff41", "\u00e9t\u00e9", "dog\u03c9", "''"]
    theirs = ["''", "\uff21", "\u00c9t\u00c9", "dog\u03a9", "''"]
    assert tokenize(CAPTION, "one_sentence", "ascii") == theirs
    words = Vocabulary.from_state_dict(published("\uff21", "\u00c9t\u00c9", "dog\u03a9"), "x")
    words.tokenizer = "one_sentence"  # whether punkt is installed or not
    assert words.encode(CAPTION) == [1, 3, 4, 5, 6, 3, 2]
    # A checkpoint keeps the rule of its vocabulary.
    again = Vocabulary.from_state_dict(words.state_dict(), "x")
    assert again.lower == "ascii" and again.encode(CAPTION) == words.encode(CAPTION)


def test_our_vocabularies_say_that_they_lower_all_letters(tmp_path):
    words = Vocabulary("one_sentence")
    for word in (*vocab.SPECIAL, "\uff41", "\u00e9t\u00e9", "``"):
        words.add_word(word)
    serialize_vocab(words, tmp_path / "v.json")
    state = json.loads((tmp_path / "v.json").read_text())
    assert state["lower"] == "unicode"
    assert deserialize_vocab(tmp_path / "v.json").encode(CAPTION) == [1, 6, 4, 5, 3, 3, 2]
    del state["lower"]  # those that vocab.py wrote before it stored the rule
    assert Vocabulary.from_state_dict(state, "x").lower == "unicode"
    with pytest.raises(ValueError, match="x: 'lower' is 'latin', expected unicode or ascii"):
        Vocabulary.from_state_dict(state | {"lower": "latin"}, "x")


@pytest.mark.parametrize("system", ["scan", "gsmn", "pfan", "pfan_whole", "chan", "vse"])
def test_the_rule_of_a_published_vocabulary_is_that_of_its_program(system):
    """CHAN and VSE-infinity are programs for Python 3, where text is Unicode; others used bytes."""
    opt = options.parse(["--model", system])
    words = systems.of(opt).vocabulary(Vocabulary.from_state_dict(published("x"), "x"), opt)
    assert words.lower == ("unicode" if system in ("chan", "vse") else "ascii")


def test_tokens_fall_back_with_one_notice(punkt, capsys):
    punkt(False)
    assert tokenize("He ran. He fell.") == ["he", "ran.", "he", "fell."]
    assert tokenize("a b", "punkt") == ["a", "b"]
    assert capsys.readouterr().err.count("notice: nltk's punkt data is not installed") == 1


def test_tokens_with_punkt(punkt, capsys):
    punkt(True)
    assert tokenize("He ran. He") == ["he", "ran", ".", "he"]
    # A vocabulary made without punkt keeps its tokens where punkt is installed.
    assert tokenize("He ran. He", "one_sentence") == ["he", "ran.", "he"]
    assert capsys.readouterr().err == ""


MODEL = {  # of punkt_tab, with one abbreviation
    "collocations.tab": "",
    "sent_starters.txt": "he\n",
    "abbrev_types.txt": "mr\n",
    "ortho_context.tab": "he\t46\nthe\t46\n",
}


@pytest.fixture
def nltk_data(tmp_path, monkeypatch):
    """A folder of nltk's data, the only one that is looked at, with a small punkt_tab.zip."""
    from nltk.tokenize import _get_punkt_tokenizer

    folder = tmp_path / "nltk_data" / "tokenizers"
    folder.mkdir(parents=True)
    for path in (folder.parent, folder):
        path.chmod(0o755)  # nltk reads no folder that others may write
    with zipfile.ZipFile(folder / "punkt_tab.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("punkt_tab/", "punkt_tab/english/"):
            archive.writestr(name, "")
        for name, content in MODEL.items():
            archive.writestr(f"punkt_tab/english/{name}", content)
    (folder / "punkt_tab.zip").chmod(0o644)
    monkeypatch.setattr(nltk.data, "path", [str(folder.parent)])

    def forget():
        vocab.available_tokenizer.cache_clear()
        _get_punkt_tokenizer.cache_clear()

    forget()
    yield folder, forget
    forget()


@pytest.mark.parametrize("extracted", [False, True])
def test_damaged_punkt_data_is_named_with_the_repair(nltk_data, capsys, extracted):
    folder, forget = nltk_data
    archive = folder / "punkt_tab.zip"
    whole = archive.read_bytes()
    if [int(x) for x in nltk.__version__.split(".")[:2]] < [3, 10]:
        pytest.skip("before 3.10, nltk reads this data from a folder only")
    assert tokenize("He ran. He fell.") == ["he", "ran", ".", "he", "fell", "."]
    assert capsys.readouterr().err == ""
    damages = [whole[: len(whole) * k // 9] for k in range(9)]
    damages += [whole.replace(b"PK\x01\x02", b"PK\x09\x09"), b"<html>", b"\0" * 300]
    damages += [whole.replace(b"PK\x03\x04", b"PK\x03\x05")]
    if extracted:
        archive.unlink()
        (folder / "punkt_tab" / "english").mkdir(parents=True)
        archive = folder / "punkt_tab" / "english" / "ortho_context.tab"
        damages = [b"he\tmany\n", b"he\n", b"\xff\xfe\x00", b"he\t4\t6\n"]
        for name, content in MODEL.items():
            (archive.parent / name).write_text(content)
    for damage in damages:
        archive.write_bytes(damage)
        forget()
        for tokenizer in (None, "punkt"):  # also if the vocabulary was built with it
            assert tokenize("He ran. He fell.", tokenizer) == ["he", "ran.", "he", "fell", "."]
        said = capsys.readouterr().err
        assert said.count("notice: nltk's punkt data cannot be read") == said.count("\n") == 1
        assert str(folder / "punkt_tab") in said and "is damaged" in said
        assert "`python -m nltk.downloader punkt_tab` installs it again" in said


def test_commands_work_with_a_damaged_zip(tmp_path):
    data = tmp_path / "nltk_data" / "tokenizers"
    data.mkdir(parents=True)
    (data / "punkt_tab.zip").write_bytes(b"PK\x03\x04 cut")
    folder = tmp_path / "data" / "x_precomp"
    folder.mkdir(parents=True)
    for split in ("train", "dev"):
        (folder / f"{split}_caps.txt").write_text("a dog .\n" * 4)
    done = subprocess.run(
        [sys.executable, ROOT / "vocab.py", "--data_name", "x_precomp"],
        cwd=tmp_path,
        env=os.environ | {"NLTK_DATA": str(data.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("notice: ") == 1 and "Traceback" not in done.stderr


def test_real_tokens():
    assert tokenize("A man's dog, isn't it?", "one_sentence") == (
        ["a", "man", "'s", "dog", ",", "is", "n't", "it", "?"]
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "not a JSON vocabulary"),
        ("[1]", "not a vocabulary: expected an object"),
        ('{"word2idx": {"a": 0}}', "not a vocabulary: expected an object"),
        (
            '{"word2idx": {"<pad>": null, "<start>": 1, "<end>": 2, "<unk>": 3}}',
            "the indices of its 4 words are not 0, 1",
        ),
        (
            '{"word2idx": {"<pad>": 0, "<start>": 1, "<end>": 2, "<unk>": 5}}',
            "the indices of its 4 words are not 0, 1",
        ),
    ],
)
def test_bad_vocabulary_files(tmp_path, content, message):
    (tmp_path / "v.json").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        deserialize_vocab(tmp_path / "v.json")
    assert "v.json" in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("<!DOCTYPE html>\n<html>", "a web page"),
        ("version https://git-lfs.github.com/spec/v1\n", "a git-LFS pointer"),
    ],
)
def test_vocabulary_files_of_another_kind_are_named(tmp_path, content, said):
    (tmp_path / "v.json").write_text(content)
    with pytest.raises(ValueError, match=rf"v.json: not a JSON vocabulary \({said}"):
        deserialize_vocab(tmp_path / "v.json")


def test_a_byte_order_mark_is_no_matter(tmp_path):
    (tmp_path / "v.json").write_text("\ufeff" + json.dumps(published("dog")), encoding="utf-8")
    assert deserialize_vocab(tmp_path / "v.json")("dog") == 4


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no vocabulary file; build it with"):
        deserialize_vocab(tmp_path / "v.json")
    with pytest.raises(FileNotFoundError, match="no_caps.txt: no such caption file"):
        read_captions(tmp_path / "no_caps.txt")


def test_captions_are_read_line_by_line(tmp_path):
    path = tmp_path / "caps.txt"
    path.write_bytes("\ufeffa dog\r\n\n caf\u00e9\u2028bar \nlast".encode())
    assert read_captions(path) == ["a dog", "", "caf\u00e9\u2028bar", "last"]
    path.write_bytes(" \t\u3000 a dog \xa0\x0c\n".encode())
    assert read_captions(path) == ["\u3000 a dog \xa0"]
    path.write_bytes(b"fine\nbad \xe9 byte\n")
    with pytest.raises(ValueError, match=r"caps.txt: line 2 is not UTF-8 \(byte 0xe9 at column 5"):
        read_captions(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="no captions in it"):
        read_captions(path)


def test_script_ends_with_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "vocab.py", "--data_path", "nowhere"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if not line.startswith("notice")]
    assert len(errors) == 1 and errors[0].startswith("error: nowhere/f30k_precomp/train_caps.txt:")


CHINESE = "一个小孩在公园里玩"


def fake_jieba(monkeypatch):
    """A stand-in for jieba that cuts text into pairs of characters."""
    module = types.ModuleType("jieba")
    module.setLogLevel = lambda level: None
    module.lcut = lambda text: [text[i : i + 2] for i in range(0, len(text), 2)]
    monkeypatch.setitem(sys.modules, "jieba", module)
    vocab.jieba_cut.cache_clear()


def write_chinese(folder, name="caps", caption=CHINESE):
    folder.mkdir(parents=True)
    for split in ("train", "dev"):
        (folder / f"{split}_{name}.txt").write_text(f"{caption}\n" * 4, encoding="utf-8")


def test_chinese_is_split_by_jieba(tmp_path, monkeypatch):
    fake_jieba(monkeypatch)
    monkeypatch.chdir(tmp_path)
    write_chinese(tmp_path / "data" / "news", "sent_caps")
    vocab.main("--data_name news --sent --tokenizer jieba".split())
    words = deserialize_vocab("vocab/news_sent_vocab.json")
    assert words.tokenizer == "jieba"  # each caption is split in the same way when it is read
    assert [words.idx2word[i] for i in words.encode("一个 小孩")[1:-1]][0] == "一个"
    assert words.encode(CHINESE) == [1, 4, 5, 6, 7, 8, 2]
    again = Vocabulary.from_state_dict(words.state_dict(), "x")
    assert again.encode(CHINESE) == [1, 4, 5, 6, 7, 8, 2]
    vocab.jieba_cut.cache_clear()


def test_real_jieba():
    pytest.importorskip("jieba")
    vocab.jieba_cut.cache_clear()
    assert vocab.tokenize(CHINESE, "jieba") == ["一个", "小孩", "在", "公园", "里", "玩"]


def test_missing_jieba_names_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "jieba", None)
    vocab.jieba_cut.cache_clear()
    write_chinese(tmp_path / "data" / "news")
    with pytest.raises(ValueError, match="pip install jieba"):
        vocab.main("--data_name news --tokenizer jieba".split())
    assert not os.path.exists("vocab")


def test_segmented_chinese_needs_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_chinese(tmp_path / "data" / "news", caption="一个 小孩 在 公园 里 玩")
    vocab.main(["--data_name", "news"])
    words = deserialize_vocab("vocab/news_vocab.json")
    assert words.encode("小孩 在 公园") == [1, 5, 6, 7, 2]
    assert "jieba" not in capsys.readouterr().err
    write_chinese(tmp_path / "data" / "other", caption="一个小孩在公园里玩 公园")
    vocab.main(["--data_name", "other"])
    assert "8 of 8 captions hold Chinese without spaces" in capsys.readouterr().err


def test_unknown_words_may_be_another(tmp_path):
    words = Vocabulary.from_state_dict(
        {"word2idx": dict(zip(vocab.SPECIAL, range(4), strict=True))}, "x"
    )
    assert words("zebra") == 3
    words.unknown = "<pad>"
    assert words("zebra") == 0 and words.encode("zebra") == [1, 0, 2]
