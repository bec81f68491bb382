"""Read word vectors from a text file.

Each line of a GloVe file holds a word and its numbers. A .vec file of fastText
has one more line, the first: the number of words, and of numbers per word.
"""

import os

import numpy as np
import torch
from torch import Tensor

from util.cli import InputError, progress
from vocab import SPECIAL, Vocabulary


def spellings(word: str) -> list[str]:
    """Spellings to look for: the word as it is; up to its first /, without - . and '."""
    bare = word.replace("-", "").replace(".", "").replace("'", "")
    return list(dict.fromkeys((word, bare.partition("/")[0] or word)))


def read_vectors(path: str, vocab: Vocabulary, dim: int) -> tuple[list[int], Tensor]:
    """The ids of the vocabulary's words that the file holds, and their vectors (n, dim), float32.

    Only the vocabulary's words are kept in memory. If two lines hold the same word, the first line
    counts. Raises FileNotFoundError, or InputError with the line that does not hold `dim` numbers.
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
            # The first line of a .vec file.
            head = row == 1 and len(fields) == 2 and fields[1].isdigit() and len(fields[1]) < 20
            numbers = int(fields[1]) if head else len(fields) - 1
            # A word may hold spaces; some words of glove.840B do.
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
