"""Fingerprints of captions: they tell from which captions a vocabulary was built."""

import hashlib
import os
from collections.abc import Iterable

from util.captions import read_captions

KEYS = {"sha256": str, "lines": int, "name": str}


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
    return isinstance(x, dict) and {key: type(value) for key, value in x.items()} == KEYS


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
