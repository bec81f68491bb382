"""The data of scripts/compare.py: a dev split cut off, what the systems need, the vocabulary."""

import argparse
import json
import os
from pathlib import Path

import numpy as np

import vocab
from caption_images import CaptionImages, caption_images
from scripts.compare_table import SYSTEMS
from system import System
from util.arrays import open_array, read_sizes
from util.cli import InputError
from util.fingerprint import fingerprint
from vocab import read_captions

HELD_OUT = 200  # images, at most


def has(folder: Path, split: str) -> bool:
    """Whether a data set has a split."""
    return (folder / f"{split}_ims.npy").is_file()


def hold_out(source: Path, folder: Path, count: int | None = None) -> None:
    """Write a data set whose dev is the last `count` training images of another data set.

    Its test split is that of the other data set, or the other's dev if there is none. Without
    `count` it is a tenth, at most HELD_OUT. Raises InputError if no training image is left.
    """
    for old in ("train", "test" if has(source, "test") else "dev"):
        images = open_array(str(source / f"{old}_ims.npy"), 3)
        text = source / f"{old}_caps.txt"
        captions = read_captions(text)
        pairs = caption_images(str(source / old), images, str(text), len(captions))
        first = len(pairs.rows)
        if old == "train":
            held_out = count or min(HELD_OUT, first // 10)
            if not 0 < held_out < first:
                some = count or "a tenth"
                raise InputError(f"{source}: {first} training images, too few to cut {some} off")
            first -= held_out
            rest = range(first, len(pairs.rows))
            write_part(source / old, pairs, captions, rest, folder / "dev")
        split = "train" if old == "train" else "test"
        write_part(source / old, pairs, captions, range(first), folder / split)


def write_part(
    old: Path, pairs: CaptionImages, captions: list[str], some: range, new: Path
) -> None:
    """Write some of the images of the split `old`, a row per image, and their captions as `new`.

    The captions stand image by image: with one caption per image, a row and a line are a pair.
    """
    rows = pairs.rows[some.start : some.stop].tolist()
    stored = len(open_array(f"{old}_ims.npy", 3))
    for name in ("ims", "ims_bbx", "boxes", "num_boxes"):
        path = f"{old}_{name}.npy"
        if not os.path.isfile(path):
            continue
        array = open_array(path, 1 if name == "num_boxes" else 3, integers=name != "ims")
        if len(array) != stored:
            raise InputError(f"{path}: {len(array)} rows, but {old}_ims.npy has {stored}")
        shape = (len(rows), *array.shape[1:])
        part = np.lib.format.open_memmap(f"{new}_{name}.npy", "w+", array.dtype, shape)
        for place, row in enumerate(rows):  # one row in memory at a time
            part[place] = array[row]
        part.flush()
    path = f"{old}_ims_size.npy"
    if os.path.isfile(path):
        np.save(f"{new}_ims_size.npy", read_sizes(path, stored)[rows])
    image_of = pairs.image_of.tolist()
    kept = [k for k in pairs.image_of.argsort(stable=True).tolist() if image_of[k] in some]
    Path(f"{new}_caps.txt").write_text("".join(f"{captions[k]}\n" for k in kept), "utf-8")
    table = "".join(f"{image_of[k] - some.start}\n" for k in kept)
    Path(f"{new}_caption_image.txt").write_text(table)


def cut_dev(folder: Path, opt: argparse.Namespace) -> Path:
    """The folder of a data set with another dev, made by hold_out if it is not there yet."""
    cut = Path(opt.out) / "data" / opt.data_name
    cut.mkdir(parents=True, exist_ok=True)
    test = "" if has(folder, "test") else "no test split: dev becomes the test split, and "
    print(
        f"notice: {folder}: {test}a new dev is cut off train, in {cut}; "
        f"the vocabulary of this data is in {opt.out}/vocab"
    )
    files = sorted(folder.glob("*_*.*"))
    source = {str(x.resolve()): [x.stat().st_size, x.stat().st_mtime] for x in files}
    if opt.held_out:
        source["held_out"] = opt.held_out
    mark = cut / "source.json"
    if not mark.is_file():
        hold_out(folder, cut, opt.held_out)
        mark.write_text(json.dumps(source))
    elif (known := json.loads(mark.read_text())) != source:
        other = f"from other data than {folder}"
        if known.get("held_out") != opt.held_out:
            other = "with another --held_out"
        raise InputError(f"{cut}: made {other}; give another --out")
    return cut


def prepare(opt: argparse.Namespace) -> list[str]:
    """Make missing data (splits, blocks, vocabulary). Returns the flags of train.py for it.

    With `opt.held_out`, and if there is no test split, this data has another dev: hold_out cuts it.
    Sets `opt.captions`, the fingerprint of the captions. Raises InputError, also if the vocabulary
    is of other captions.
    """
    folder = Path(System().find_data(opt.data_path, opt.data_name))
    if opt.held_out or (opt.split == "test" and not has(folder, "test")):
        folder = cut_dev(folder, opt)
        opt.vocab_path = str(Path(opt.out) / "vocab")  # from fewer captions
    if not has(folder, opt.split):
        raise FileNotFoundError(f"{folder}/{opt.split}_ims.npy: no such file; give another --split")
    for name in opt.systems:
        for split in ("train", "dev", opt.split):
            try:
                SYSTEMS[name].prepare_split(str(folder / split))
            except FileNotFoundError as error:
                raise InputError(f"{error}; or leave {name} out of --systems") from None
    data = ["--data_path", str(folder.parent), "--data_name", opt.data_name]
    words = Path(opt.vocab_path)
    if words.suffix not in (".json", ".pkl"):
        words /= f"{opt.data_name}_vocab.json"
    words = vocab.existing_file(words)
    if os.path.isfile(words):
        vocab.check_file(words, str(folder))
    else:
        vocab.main([*data, "--out", words])
    opt.captions = fingerprint(folder)
    numbers = open_array(str(folder / "train_ims.npy"), 3).shape[2]
    return [*data, "--vocab_path", opt.vocab_path, "--img_dim", str(numbers)]
