"""Vocabularies: split captions into words, and number the words.

python vocab.py --data_path data --data_name f30k_precomp    # writes vocab/f30k_precomp_vocab.json
python vocab.py --data_name tencent_data --sent    # writes vocab/tencent_data_sent_vocab.json
python vocab.py --data_name f30k_precomp --check    # is the file there built from these captions?
"""

import contextlib
import functools
import json
import numbers
import os
import shutil
import string
import sys
from collections import Counter
from pathlib import Path

from util.arguments import Parser
from util.captions import ASCII_BLANKS, read_captions
from util.cli import InputError, progress, replacing, run
from util.fingerprint import fingerprint_of, is_fingerprint, other_captions
from util.folders import find_folder
from util.json_file import read_json, shown_value
from util.long_captions import cut
from util.plain_pickle import load_vocabulary

SPECIAL = ("<pad>", "<start>", "<end>", "<unk>")
PUNKT, ONE_SENTENCE, JIEBA = "punkt", "one_sentence", "jieba"
# The rules for capital letters and blanks: those of Python 3's str, or those of Python 2's bytes.
UNICODE, ASCII = "unicode", "ascii"
ASCII_LETTERS = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)
# Parts of train's words that are unknown. A vocabulary of the words that occur four times leaves
# 0.8 % of Flickr30K unknown and 1.8 % of Flickr8K.
SUSPICIOUS, HOPELESS = 0.03, 0.3


@functools.cache
def available_tokenizer() -> str:
    """`punkt` if nltk's sentence model can be read, else `one_sentence`, with a notice."""
    import nltk  # as in tokenize

    try:
        nltk.word_tokenize("a dog .")
        return PUNKT
    except Exception as error:  # a damaged model can fail anywhere in nltk's reader
        names = "punkt_tab", "punkt_tab.zip"
        files = [os.path.join(x, "tokenizers", name) for x in nltk.data.path for name in names]
        files = " or ".join(filter(os.path.exists, files))
        what, repair = "is not installed", "installs it"
        if files or not isinstance(error, LookupError):
            what = f"cannot be read ({type(error).__name__}): {files or error} is damaged"
            repair = "installs it again, once that is removed"
    print(
        f"notice: nltk's punkt data {what}, so each caption is tokenised as one sentence; "
        f"`python -m nltk.downloader punkt_tab` {repair}",
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
    import nltk  # here: it takes as long as torch to import, and --help and errors need no words

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
    max_words = 0  # see words

    def __init__(self, tokenizer: str | None = None, lower: str = UNICODE):
        self.word2idx: dict[str, int] = {}
        self.idx2word: dict[int, str] = {}
        self.idx = 0
        self.tokenizer = tokenizer  # None: a published file, which names none
        self.lower = lower  # see tokenize
        self.captions: dict | None = None  # see fingerprint; None: the file does not say it

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
        """The words of a caption, split and lower-cased by the rules of this vocabulary.

        They are its first `max_words`, if that is not 0.
        """
        return tokenize(caption, self.tokenizer, self.lower)[: self.max_words or None]

    def encode(self, caption: str) -> list[int]:
        """Word ids of a caption, see words, between `<start>` and `<end>`."""
        return cut(self.encode_whole(caption), self.max_words)

    def encode_whole(self, caption: str) -> list[int]:
        """Ids of all words of a caption between `<start>` and `<end>`."""
        words = tokenize(caption, self.tokenizer, self.lower)
        return [self("<start>"), *map(self, words), self("<end>")]

    def state_dict(self) -> dict:
        """Plain values for JSON: the published `word2idx`, `idx2word`, `idx`, and what is ours."""
        return {
            "word2idx": self.word2idx,
            "idx2word": {str(index): word for index, word in self.idx2word.items()},
            "idx": self.idx,
            "tokenizer": self.tokenizer,
            "lower": self.lower,
            "captions": self.captions,
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
        ids = list(word2idx.values())
        if (
            not all(isinstance(index, numbers.Integral) for index in ids)
            or sorted(ids) != list(range(len(ids)))
            or not all(isinstance(word, str) for word in word2idx)
        ):
            raise InputError(
                f"{source}: the indices of its {len(word2idx)} words are not 0, 1, ..."
            )
        # Published files have neither key. Our older files lack 'lower'; they used unicode.
        lower = state.get("lower", UNICODE if "tokenizer" in state else ASCII)
        if lower not in (UNICODE, ASCII):
            said = f"{source}: 'lower' is {shown_value(lower)}"
            raise InputError(f"{said}, expected {UNICODE} or {ASCII}")
        if state.get("tokenizer") not in (None, PUNKT, ONE_SENTENCE, JIEBA):
            said = f"{source}: 'tokenizer' is {shown_value(state['tokenizer'])}"
            raise InputError(f"{said}, expected {PUNKT}, {ONE_SENTENCE} or {JIEBA}")
        vocab = cls(state.get("tokenizer"), lower)
        vocab.captions = state.get("captions")
        if vocab.captions is not None and not is_fingerprint(vocab.captions):
            raise InputError(
                f"{source}: 'captions' is {shown_value(vocab.captions)}, expected the sha256 and "
                "the number of captions that vocab.py writes"
            )
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


def existing_file(path: str | os.PathLike) -> str:
    """A vocabulary's path; if the .json is missing, that of an older program's .pkl beside it."""
    path = os.path.expanduser(path)
    older = path.removesuffix(".json") + ".pkl"
    missing = path.endswith(".json") and not os.path.isfile(path)
    return older if missing and os.path.isfile(older) else path


def deserialize_vocab(src: str | os.PathLike) -> Vocabulary:
    """Read a vocabulary file of this project, or a published one: JSON, or pickled by Python 2.

    If a .json is missing, the .pkl beside it is read. Raises FileNotFoundError or InputError.
    """
    src = existing_file(src)
    if not os.path.isfile(src):
        raise FileNotFoundError(_missing_file(src))
    with open(src, "rb") as file:
        pickled = file.read(1) in (b"\x80", b"(", b"c", b"}")  # no JSON begins so
    if pickled:
        print(f"notice: {src}: a vocabulary that an older program pickled", file=sys.stderr)
        state = {"word2idx": load_vocabulary(src).get("word2idx")}
        return Vocabulary.from_state_dict(state, src)
    return Vocabulary.from_state_dict(read_json(src, "a JSON vocabulary"), src)


def _missing_file(path: str) -> str:
    """What to do about a vocabulary file that is not there."""
    sent = " --sent" if path.endswith("_sent_vocab.json") else ""
    also = " (without --sent if there are no {split}_sent_caps.txt)" if sent else ""
    folder = os.path.dirname(path) or "."
    ends = "_vocab.json", "_vocab.pkl"
    names = os.listdir(folder) if os.path.isdir(folder) else []
    there = ", ".join(sorted(name for name in names if name.endswith(ends))[:5])
    return (
        f"{path}: no vocabulary file; build it with `python vocab.py --data_path DATA_PATH "
        f"--data_name DATA_NAME{sent}`{also}, or give --vocab_path"
        f"{f' (its folder holds {there})' if there else ''}"
    )


def check_captions(
    vocab: Vocabulary,
    folder: str | os.PathLike,
    unknown: int,
    words: int,
    source: str,
    allow_unknown: bool = False,
    name: str = "caps",
    checkpoint: bool = False,
) -> None:
    """Warn if a vocabulary seems to be of other captions than those of a data folder.

    `unknown` of the `words` tokens of train are not in it; `source` is its file; training reads
    `{split}_{name}.txt`. If it says that it was built from these captions, all is well. One of the
    folder's captions of another name may do: the unknown words decide, as for a file that does not
    say what it was built from. A `checkpoint` keeps its vocabulary, so that of other captions will
    do while few words are unknown. Raises InputError if more than 30 % are unknown, and
    `allow_unknown` is not set. BERT's pieces are of no captions.
    """
    if vocab.pieces:
        return
    other = other_captions(vocab.captions, folder, name)
    if other is None and vocab.captions:
        return
    share = unknown / max(words, 1)
    if share <= SUSPICIOUS:
        known = other is None or checkpoint
        # Captions of another name in the same folder.
        if known or (vocab.captions["name"] != name and not other_captions(vocab.captions, folder)):
            return
    said = f"{source}: {unknown:,} of the {words:,} words of train ({100 * share:.1f} %) are not in"
    sent = " --sent" if name == "sent_caps" else ""
    if checkpoint:
        said += " its vocabulary, which was built from other captions and cannot change"
        advice = f"these words become {vocab.unknown}, unless you train afresh"
    else:
        said += f" it; {other or 'it seems to be of other captions'}"
        advice = (
            f"`python vocab.py --data_path DATA_PATH --data_name DATA_NAME{sent} --out FILE` "
            "builds the vocabulary of these captions, and --vocab_path FILE names it"
        )
    if share > HOPELESS and not allow_unknown:
        raise InputError(f"{said}; {advice}; --allow_unknown trains with it all the same")
    print(f"warning: {said}; {advice}")


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
    folder = os.path.join(data_path, data_name)
    if os.path.isdir(os.path.expanduser(data_path)):
        folder = find_folder(data_path, data_name)
    tokenizer = tokenizer or available_tokenizer()
    counter: Counter[str] = Counter()
    total = unspaced = 0
    splits = {
        split: read_captions(os.path.join(folder, f"{split}_{captions}.txt"))
        for split in ("train", "dev")
    }
    for split, lines in splits.items():
        for caption in progress(lines, f"tokenising {split}"):
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
    vocab.captions = fingerprint_of(splits.values(), captions)
    for word in (*SPECIAL, *(word for word, count in counter.items() if count >= threshold)):
        vocab.add_word(word)
    if len(vocab) == len(SPECIAL):
        raise InputError(f"no word of {folder} occurs {threshold} times")
    return vocab


def check_file(path: str, folder: str) -> None:
    """Raise InputError if a vocabulary file was built from other captions than a data folder's."""
    vocab = deserialize_vocab(path)
    if other := other_captions(vocab.captions, folder):
        raise InputError(
            f"{path}: {other}; remove or move the file to build it anew, or give another folder "
            "of vocabularies (row scripts: VOCAB_PATH)"
        )
    same = f"built from the captions of {folder}"
    print(f"{path}: {same if vocab.captions else 'does not say which captions it was built from'}")


def keep_earlier(vocab: Vocabulary, path: str) -> None:
    """Copy the file at `path` to another name, unless `vocab` is of the same captions or equal.

    A published vocabulary cannot be built again, and checkpoints belong to their vocabulary.
    """
    if not os.path.isfile(path):
        return
    with contextlib.suppress(InputError):  # a file that cannot be read is kept too
        old = deserialize_vocab(path)
        if old.captions == vocab.captions or old.state_dict() == vocab.state_dict():
            return
    stem, end = os.path.splitext(path)
    k = 1
    while os.path.exists(aside := f"{stem}.earlier_{k}{end}"):
        k += 1
    with replacing(aside) as part:
        shutil.copy2(path, part)
    print(f"notice: {path} was of other captions, or does not say of which; it is now {aside}")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", default="data", help="folder that holds DATA_NAME/")
    parser.add_argument("--data_name", default="f30k_precomp", help="e.g. f30k_precomp")
    parser.add_argument("--threshold", type=int, default=4, help="minimum occurrences of a word")
    parser.add_argument(
        "--out", type=os.path.expanduser, help="output file; default: vocab/DATA_NAME_vocab.json"
    )
    parser.add_argument(
        "--sent",
        action="store_true",
        help="read {split}_sent_caps.txt, write vocab/DATA_NAME_sent_vocab.json; for pfan_whole",
    )
    parser.add_argument(
        "--tokenizer", choices=[JIEBA], help="for Chinese without spaces; default: nltk"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="build nothing: see whether the output file was built from these captions",
    )
    opt = parser.parse_args(argv)
    opt.data_name = opt.data_name.rstrip(os.sep)
    sent = "sent_" if opt.sent else ""
    out = opt.out or os.path.join("vocab", f"{opt.data_name}_{sent}vocab.json")
    if opt.check:
        check_file(out, find_folder(opt.data_path, opt.data_name))
        return
    vocab = build_vocab(opt.data_path, opt.data_name, opt.threshold, f"{sent}caps", opt.tokenizer)
    keep_earlier(vocab, out)
    serialize_vocab(vocab, out)
    print(f"{out}: {len(vocab)} words (tokens: {vocab.tokenizer})")


if __name__ == "__main__":
    run(main)
