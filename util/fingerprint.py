"""Fingerprints of captions and of features: they tell whether two files hold the same."""

import hashlib
import os
from collections.abc import Iterable

import numpy as np

from util.captions import read_captions

KEYS = {"sha256": str, "lines": int, "name": str}
SAMPLE = 2**24  # bytes of an array that are hashed, or SAMPLED_ROWS rows if these are more
SAMPLED_ROWS = 16


def fingerprint(folder: str | os.PathLike, name: str = "caps") -> dict | None:
    """The fingerprint of train's and dev's `{split}_{name}.txt` in a data folder.

    None: the folder does not have both files. Line ends, blanks at the ends of a line and a missing
    last line end make no difference.
    """
    paths = [os.path.join(folder, f"{split}_{name}.txt") for split in ("train", "dev")]
    if not all(map(os.path.isfile, paths)):
        return None
    return fingerprint_of(map(read_captions, paths), name)


def fingerprint_of(splits: Iterable[list[str]], name: str) -> dict:
    """The fingerprint of the captions of train and dev, read from `{split}_{name}.txt`."""
    digest, lines = hashlib.sha256(), 0
    for captions in splits:
        digest.update(f"{len(captions)}\n".encode())
        for caption in captions:
            digest.update(f"{caption}\n".encode())
        lines += len(captions)
    return {"sha256": digest.hexdigest(), "lines": lines, "name": name}


def is_fingerprint(x) -> bool:
    """Whether a value from a file has the form of a fingerprint."""
    if not isinstance(x, dict) or {key: type(value) for key, value in x.items()} != KEYS:
        return False
    return len(x["name"]) <= 1000 and len(x["sha256"]) <= 64 and 0 <= x["lines"] < 2**63


def other_captions(
    theirs: dict | None, folder: str | os.PathLike, name: str | None = None
) -> str | None:
    """Which other captions a fingerprint is of, in words; None: those of the folder, or unknown.

    `name`: the captions that are meant are `{split}_{name}.txt`, not those of the fingerprint's
    own name.
    """
    if theirs is None:
        return None
    name = name or theirs["name"]
    ours = fingerprint(folder, name)
    if ours == theirs | {"name": name}:
        return None
    here = f"{folder} has no {{split}}_{name}.txt of train and dev"
    if ours:
        here = f"{folder} has {ours['lines']:,} (SHA-256 {ours['sha256'][:8]})"
    of = f"{theirs['lines']:,} (SHA-256 {theirs['sha256'][:8]})"
    if name != theirs["name"]:
        of += f" of {{split}}_{theirs['name']}.txt"
        here += f" in {{split}}_{name}.txt" if ours else ""
    return f"it was built from other captions, {of}, and {here}"


def file_hash(path: str) -> str:
    """The SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sampled_rows(n: int, most: int = SAMPLED_ROWS) -> list[int]:
    """At most `most` of n rows, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, n - 1, most).astype(int)).tolist() if n > most else [*range(n)]


def sampled_hash(array: np.ndarray) -> str:
    """The SHA-256 of rows spread over an array: of all of them if it is small."""
    most = max(SAMPLED_ROWS, SAMPLE // max(array[:1].nbytes, 1))
    digest = hashlib.sha256(f"{array.shape} {array.dtype.str}".encode())
    for row in sampled_rows(len(array), most):
        digest.update(np.ascontiguousarray(array[row]).tobytes())
    return digest.hexdigest()
