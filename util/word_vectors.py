"""Word vectors from a text file.

GloVe's has a word and its numbers a line; fastText's .vec besides a first line that says how many
words there are, and numbers a word.
"""

import os

import numpy as np
import torch
from torch import Tensor

from util.cli import InputError, progress
from vocab import SPECIAL, Vocabulary


def spellings(word: str) -> list[str]:
    """A word as it may stand in the file: as it is; without - . '; before its first /."""
    bare = word.replace("-", "").replace(".", "").replace("'", "")
    return list(dict.fromkeys((word, bare.partition("/")[0] or word)))


def read_vectors(path: str, vocab: Vocabulary, dim: int) -> tuple[list[int], Tensor]:
    """Ids of the vocabulary's words that the file holds, and their vectors (n, dim), float32.

    Only the vocabulary's words are kept in memory. Of two lines of one word the first counts.
    Raises FileNotFoundError, or InputError with the line that has not `dim` numbers.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{path}: no such file; --wemb_path is a text file of word vectors, such as "
            "glove.840B.300d.txt (nlp.stanford.edu/projects/glove) or wiki.en.vec (fasttext.cc)"
        )
    wanted = {spelling for word in vocab.word2idx for spelling in spellings(word)}
    found: dict[str, np.ndarray] = {}
    with open(path, "rb") as lines:
        for row, line in enumerate(progress(lines, "word vectors"), 1):
            fields = line.removeprefix(b"\xef\xbb\xbf" if row == 1 else b"").rstrip().split(b" ")
            head = row == 1 and len(fields) == 2 and fields[1].isdigit()  # fastText's
            numbers = int(fields[1]) if head else len(fields) - 1
            # A token may hold spaces, as some of glove.840B do.
            if numbers < dim or (row == 1 and numbers > dim):
                raise InputError(
                    f"{path}: line {row} has {numbers} numbers after its word, expected {dim}, as "
                    "--word_dim says"
                )
            if head:
                continue
            word = b" ".join(fields[:-dim]).decode("utf-8", errors="replace")
            if word not in wanted or word in found:
                continue
            try:
                found[word] = np.array(fields[-dim:], dtype=np.float32)
            except ValueError:
                raise InputError(
                    f"{path}: line {row}: expected {dim} numbers after a word"
                ) from None
            if not np.isfinite(found[word]).all():
                raise InputError(f"{path}: line {row} holds NaN or Inf")
    ids, vectors = [], []
    for word, index in vocab.word2idx.items():
        spelling = next((s for s in spellings(word) if s in found), None)
        if spelling is not None and word not in SPECIAL:
            ids.append(index)
            vectors.append(found[spelling])
    if not ids:
        raise InputError(f"{path}: none of the {len(vocab)} words of the vocabulary is in it")
    return ids, torch.from_numpy(np.stack(vectors))
