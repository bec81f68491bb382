"""Vocabularies: split captions into words, and number the words.

python vocab.py --data_path data --data_name f30k_precomp    # writes vocab/f30k_precomp_vocab.json
python vocab.py --data_name tencent_data --sent    # writes vocab/tencent_data_sent_vocab.json
"""

import argparse
import functools
import json
import os
import string
import sys
from collections import Counter
from pathlib import Path

import nltk

from util.cli import InputError, progress, replacing, run

SPECIAL = ("<pad>", "<start>", "<end>", "<unk>")
PUNKT, ONE_SENTENCE, JIEBA = "punkt", "one_sentence", "jieba"
# The rules for capital letters and blanks: those of Python 3's str, or those of Python 2's bytes.
UNICODE, ASCII = "unicode", "ascii"
ASCII_BLANKS = " \t\n\r\x0b\x0c"
ASCII_LETTERS = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)


@functools.cache
def available_tokenizer() -> str:
    """`punkt` if nltk's sentence model is installed, else `one_sentence`, with a notice."""
    try:
        nltk.word_tokenize("a dog .")
        return PUNKT
    except LookupError:
        print(
            "notice: nltk's punkt data is not installed, so each caption is tokenised as one "
            "sentence; `python -m nltk.downloader punkt_tab` installs it",
            file=sys.stderr,
        )
        return ONE_SENTENCE


@functools.cache
def jieba_cut():
    """jieba's function for word segmentation."""
    try:
        import jieba
    except ImportError:
        raise InputError(
            "Chinese captions without spaces are split into words by jieba, which is not installed:"
            " pip install jieba (captions with spaces between words do not need it)"
        ) from None
    jieba.setLogLevel("WARNING")
    return jieba.lcut


def tokenize(caption: str, tokenizer: str | None = None, lower: str = UNICODE) -> list[str]:
    """Lower-case tokens of a caption, by `nltk.word_tokenize`.

    `lower` decides which letters become lower case and which blanks are stripped from the ends of
    the caption: those of `unicode`, or those of `ascii`, as in published programs that ran under
    Python 2 (Q25).

    `tokenizer` is `punkt` (split into sentences, then into words, as published), `one_sentence`
    (split into words only; needs no data files), or None (`punkt` if it is installed). The two
    differ if a full stop within a caption touches a word: with `one_sentence`, "he ran. he fell."
    has the token "ran.". `jieba` splits Chinese without spaces between words.
    """
    if lower == ASCII:
        caption = caption.strip(ASCII_BLANKS).translate(ASCII_LETTERS)
    else:
        caption = caption.strip().lower()
    if tokenizer == JIEBA:
        return [word for word in jieba_cut()(caption) if word.strip()]
    if tokenizer != ONE_SENTENCE:
        tokenizer = available_tokenizer()
    return nltk.word_tokenize(caption, preserve_line=tokenizer == ONE_SENTENCE)


class Vocabulary:
    """A two-way map between words and indices; unknown words become `unknown`."""

    unknown, mask = "<unk>", "<mask>"  # only a system or --drop adds the mask
    pieces = False  # a word is one token

    def __init__(self, tokenizer: str | None = None, lower: str = UNICODE):
        self.word2idx: dict[str, int] = {}
        self.idx2word: dict[int, str] = {}
        self.idx = 0
        self.tokenizer = tokenizer  # None: a published file, which names none
        self.lower = lower  # see tokenize

    def add_word(self, word: str) -> None:
        if word not in self.word2idx:
            self.word2idx[word] = self.idx
            self.idx2word[self.idx] = word
            self.idx += 1

    def __call__(self, word: str) -> int:
        index = self.word2idx.get(word)
        return self.word2idx[self.unknown] if index is None else index

    def __len__(self) -> int:
        return len(self.word2idx)

    def words(self, caption: str) -> list[str]:
        """The words of a caption, split and lower-cased by the rules of this vocabulary."""
        return tokenize(caption, self.tokenizer, self.lower)

    def encode(self, caption: str) -> list[int]:
        """Word ids of a caption between `<start>` and `<end>`."""
        return [self("<start>"), *map(self, self.words(caption)), self("<end>")]

    def state_dict(self) -> dict:
        """Plain values for JSON: the published `word2idx`, `idx2word`, `idx`, and the two rules."""
        return {
            "word2idx": self.word2idx,
            "idx2word": {str(index): word for index, word in self.idx2word.items()},
            "idx": self.idx,
            "tokenizer": self.tokenizer,
            "lower": self.lower,
        }

    @classmethod
    def from_state_dict(cls, state: dict, source: str) -> "Vocabulary":
        """The vocabulary that `state_dict` or a published file describes; `source` names it."""
        word2idx = state.get("word2idx") if isinstance(state, dict) else None
        if not isinstance(word2idx, dict) or not all(word in word2idx for word in SPECIAL):
            raise InputError(
                f"{source}: not a vocabulary: expected an object with 'word2idx' that holds "
                f"{' '.join(SPECIAL)}; build one with vocab.py"
            )
        if set(word2idx.values()) != set(range(len(word2idx))):
            raise InputError(
                f"{source}: the indices of its {len(word2idx)} words are not 0, 1, ..."
            )
        # Published files have neither key. Our older files lack 'lower'; they used unicode.
        lower = state.get("lower", UNICODE if "tokenizer" in state else ASCII)
        if lower not in (UNICODE, ASCII):
            raise InputError(f"{source}: 'lower' is {lower!r}, expected {UNICODE} or {ASCII}")
        vocab = cls(state.get("tokenizer"), lower)
        for word in sorted(word2idx, key=word2idx.get):
            vocab.add_word(word)
        return vocab


def serialize_vocab(vocab: Vocabulary, dest: str | os.PathLike) -> None:
    """Write a vocabulary as JSON, completely or not at all."""
    if os.path.isdir(dest):
        raise InputError(f"{dest}: a folder; give the path of the vocabulary file")
    Path(dest).parent.mkdir(parents=True, exist_ok=True)
    with replacing(dest) as part:
        Path(part).write_text(json.dumps(vocab.state_dict()), encoding="utf-8")


def deserialize_vocab(src: str | os.PathLike) -> Vocabulary:
    """Read a vocabulary file of this project, or a published one."""
    if not os.path.isfile(src):
        sent = " --sent" if str(src).endswith("_sent_vocab.json") else ""
        also = " (without --sent if there are no {split}_sent_caps.txt)" if sent else ""
        raise FileNotFoundError(
            f"{src}: no vocabulary file; build it with `python vocab.py --data_path DATA_PATH "
            f"--data_name DATA_NAME{sent}`{also}, or give --vocab_path"
        )
    try:
        state = json.loads(Path(src).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{src}: not a JSON vocabulary ({error})") from None
    return Vocabulary.from_state_dict(state, str(src))


def read_captions(path: str | os.PathLike) -> list[str]:
    """The captions of a UTF-8 file, one per line; an empty line is an empty caption.

    ASCII blanks at both ends of a caption are stripped, as published; a vocabulary may strip more.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such caption file; it holds one caption per line")
    captions = []
    with open(path, "rb") as lines:  # binary, so that errors can name the line of a bad byte
        for row, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8-sig" if row == 1 else "utf-8")  # Q16
                captions.append(text.strip(ASCII_BLANKS))
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path}: line {row} is not UTF-8 (byte {error.object[error.start]:#04x} at "
                    f"column {error.start + 1}); convert the file, e.g. `iconv -f latin1 -t utf-8`"
                ) from None
    if not captions:
        raise InputError(f"{path}: no captions in it; expected one per line")
    return captions


def build_vocab(
    data_path: str,
    data_name: str,
    threshold: int = 4,
    captions: str = "caps",
    tokenizer: str | None = None,
) -> Vocabulary:
    """The vocabulary of the words that occur at least `threshold` times in train and dev.

    The four special words come first. The other words are numbered in the order in which they first
    occur, so that two runs give the same file. The captions come from `{split}_{captions}.txt`; see
    tokenize for `tokenizer`.
    """
    tokenizer = tokenizer or available_tokenizer()
    counter: Counter[str] = Counter()
    total = unspaced = 0
    for split in ("train", "dev"):
        path = os.path.join(data_path, data_name, f"{split}_{captions}.txt")
        for caption in progress(read_captions(path), f"tokenising {split}"):
            tokens = tokenize(caption, tokenizer)
            counter.update(tokens)
            total += 1
            unspaced += any(len(token) > 7 and "\u4e00" <= token[0] <= "\u9fff" for token in tokens)
    if unspaced > 0.1 * total:
        print(
            f"warning: {unspaced} of {total} captions hold Chinese without spaces between words; "
            "--tokenizer jieba splits it (pip install jieba)",
            file=sys.stderr,
        )
    vocab = Vocabulary(tokenizer)
    for word in (*SPECIAL, *(word for word, count in counter.items() if count >= threshold)):
        vocab.add_word(word)
    if len(vocab) == len(SPECIAL):
        raise InputError(f"no word of {data_path}/{data_name} occurs {threshold} times")
    return vocab


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data_path", default="data", help="folder that holds DATA_NAME/")
    parser.add_argument("--data_name", default="f30k_precomp", help="e.g. f30k_precomp")
    parser.add_argument("--threshold", type=int, default=4, help="minimum occurrences of a word")
    parser.add_argument("--out", help="output file; default: vocab/DATA_NAME_vocab.json")
    parser.add_argument(
        "--sent",
        action="store_true",
        help="read {split}_sent_caps.txt, write vocab/DATA_NAME_sent_vocab.json; for pfan_whole",
    )
    parser.add_argument(
        "--tokenizer", choices=[JIEBA], help="for Chinese without spaces; default: nltk"
    )
    opt = parser.parse_args(argv)
    sent = "sent_" if opt.sent else ""
    out = opt.out or os.path.join("vocab", f"{opt.data_name}_{sent}vocab.json")
    vocab = build_vocab(opt.data_path, opt.data_name, opt.threshold, f"{sent}caps", opt.tokenizer)
    serialize_vocab(vocab, out)
    print(f"{out}: {len(vocab)} words (tokens: {vocab.tokenizer})")


if __name__ == "__main__":
    run(main)
