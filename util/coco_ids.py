"""The ids of COCO's images and captions: read them from files, and check them."""

import os
from collections.abc import Sequence

from util.captions import read_lines
from util.cli import InputError
from util.image_ids import id_key


def as_ids(
    image_ids: Sequence[int | str], caption_ids: Sequence[int | str]
) -> tuple[list[int], list[int]]:
    """Both ids as numbers; if the image ids are given per caption, each is kept once."""
    images, captions = ([int(x) for x in ids] for ids in (image_ids, caption_ids))
    return list(dict.fromkeys(images)) if len(images) == len(captions) else images, captions


def check_ids(
    image_ids: Sequence[int],
    caption_ids: Sequence[int],
    judge,
    image_of: Sequence[int] | None = None,
) -> None:
    """Raise InputError unless these are the ids of COCO's 5,000 test images and their captions.

    `judge` is eccv_caption's Metrics. `image_of` is the image of each caption, from 0; None: they
    stand image by image.
    """
    of_image = judge.coco_gts["t2i"]
    if not len(image_ids) or (image_of is None and len(caption_ids) % len(image_ids)):
        raise InputError(f"ids of {len(image_ids)} images and {len(caption_ids)} captions")
    missing = of_image.keys() - set(caption_ids)
    if missing or len(caption_ids) != len(of_image):
        raise InputError(
            f"{len(of_image) - len(missing)} of COCO's {len(of_image):,} test captions among "
            f"{len(caption_ids)}; these figures are of all of them, the split testall"
        )
    if image_of is None:
        k = len(caption_ids) // len(image_ids)
        image_of = [row // k for row in range(len(caption_ids))]
    for row, (caption, image) in enumerate(zip(caption_ids, image_of, strict=True)):
        if image_ids[int(image)] not in of_image[caption]:
            raise InputError(
                f"caption {row} (from 0) has id {caption}, which COCO wrote for image "
                f"{of_image[caption][0]}, but its image here has id {image_ids[int(image)]}: the "
                "ids are in another order than the captions"
            )


def read_ids(path: str | os.PathLike) -> list[int]:
    """Read a file of COCO ids, one per line."""
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{path}: no such file; it holds COCO's ids, one per line, in the order of the "
            "captions (_ids.txt: of their images). The cxc_annots of VSE-infinity and CHAN hold "
            "both; for testall as packed for SCAN, `python extended.py --write_ids FOLDER` does"
        )
    ids = []
    for row, line in enumerate(read_lines(path), 1):
        number = id_key(line)
        if not isinstance(number, int):
            raise InputError(f"{path}: line {row} is {line[:40]!r}, expected an id of COCO")
        ids.append(number)
    return ids


def read_pair_of_ids(folder: str | os.PathLike, split: str) -> tuple[list[int], list[int]]:
    """The ids of the images (N,), from `{split}_ids.txt`, and captions, `{split}_capids.txt`.

    The first file has one line per image or per caption.
    """
    return read_pairs(folder, split)[:2]


def read_pairs(
    folder: str | os.PathLike, split: str
) -> tuple[list[int], list[int], list[int] | None]:
    """As read_pair_of_ids, and the image of each caption (M,), if the ids are given per caption."""
    files = (os.path.join(folder, f"{split}_{name}.txt") for name in ("ids", "capids"))
    ids, captions = map(read_ids, files)
    images, captions = as_ids(ids, captions)
    place = {name: image for image, name in enumerate(images)}
    return images, captions, [place[x] for x in ids] if len(ids) == len(captions) else None
