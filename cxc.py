"""CxC's recalls within one modality: images among images, captions among captions.

Parekh et al., Crisscrossed Captions, EACL 2021 (arXiv:2004.15020). Shapes: N images, M captions, R
regions, W words, D joint dimension; n queries.
"""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pairs import Encoding
from util.cli import InputError, progress
from util.json_file import fault_of, read_json

KS = (1, 5, 10)
# CxC within one modality: the file, and the least mean mark (0 to 5) of two items that are alike.
CXC = {"i2i": ("cxc_i2i.json", 2.5), "t2t": ("cxc_t2t.json", 3.0)}


def image_rows(model: nn.Module, images: Encoding) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield positions (n,) of images and their scores (n, N) with all; regions act as words.

    So does the vector 'image' (N, D) as 'sentence', in an encoding that has it instead.
    """
    if "image" in images:
        captions = {"sentence": images["image"]}  # (N, D)
    else:
        regions = images["regions"]  # (N, R, D)
        lengths = torch.full((len(regions),), regions.size(1))  # (N,)
        if "region_mask" in images:  # filling stands behind the regions
            lengths = images["region_mask"].sum(1).cpu()  # (N,)
        captions = {"words": regions, "lengths": lengths}
    n = len(next(iter(captions.values())))  # N
    for index in progress(torch.arange(n).split(64), "image with image"):
        some = {name: x[index.to(x.device)] for name, x in images.items()}  # (n, ...)
        yield index, model.similarity(some, captions).cpu()  # (n, N)


def caption_rows(model: nn.Module, captions: list[Encoding]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield positions (n,) of captions and their scores (n, M) with all; words act as regions."""
    total = sum(len(group["index"]) for group in captions)
    parts = [
        (group, some) for group in captions for some in torch.arange(len(group["index"])).split(64)
    ]
    for queries, some in progress(parts, "caption with caption"):
        own, acts_as = ("words", "regions") if "words" in queries else ("sentence", "image")
        images = {acts_as: queries[own][some.to(queries[own].device)]}  # (n, W, D) or (n, D)
        scores = torch.empty(len(some), total)  # (n, M)
        for group in captions:
            scores[:, group["index"]] = model.similarity(images, group).cpu()
        yield queries["index"][some], scores


def intra_recalls(
    rows: Iterable[tuple[Tensor, Tensor]], positives: list[list[int]]
) -> dict[str, float]:
    """R@K, in percent, of items among the other items of their own kind.

    `rows` yields the positions (n,) of some items and their scores (n, N) with all items.
    `positives` holds, for each item, the positions of the items that are like it; an item without
    any does not count. A wrong item with the same score ranks first.
    """
    ranks = []
    for index, scores in rows:
        scores[torch.arange(len(index)), index] = -torch.inf
        for item, row in zip(index.tolist(), scores, strict=True):
            if positives[item]:
                own = row[positives[item]]
                ranks.append(int((row >= own.max()).sum() - (own >= own.max()).sum()))
    return {f"r{k}": 100 * float(np.mean(np.array(ranks) < k)) for k in KS}


def read_alike(
    path: str, ids: Sequence[int], least: float, image_of: Sequence[int] | None = None
) -> list[list[int]]:
    """For each id, the positions of the items that people marked `least` or more with it.

    With `image_of`, the image of each caption, the other captions of its image are added. The file
    holds {id: [[id, mark], ...]}.
    """
    form = "{id: [[id, mark], ...]}"
    marks = read_json(path, form)
    try:
        alike = {
            whole_id(key): [whole_id(x) for x, mark in pairs if mark >= least]
            for key, pairs in marks.items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: expected {form} ({fault_of(error)})") from None
    place = {x: position for position, x in enumerate(ids)}
    positives, together = [], defaultdict(list)
    for position, image in enumerate(() if image_of is None else image_of):
        together[int(image)].append(position)
    for position, x in enumerate(ids):
        own = () if image_of is None else together[int(image_of[position])]
        some = [*own, *(place[y] for y in alike.get(x, []) if y in place)]
        positives.append(sorted(set(some) - {position}))
    if not any(positives):
        raise InputError(f"{path}: none of its ids is among the {len(ids)} of the split")
    return positives


def whole_id(x) -> int:
    """An id of JSON, a whole number or its digits; a ValueError for 2.9 and others."""
    if type(x) not in (int, str):
        raise ValueError(f"{x!r:.40} is no id")
    return int(x)


def read_cxc(
    folder: str,
    image_ids: Sequence[int],
    caption_ids: Sequence[int],
    image_of: Sequence[int] | None = None,
) -> dict[str, list[list[int]]]:
    """The positives of each item, for 'i2i' and 't2t' if the folder holds their annotations.

    Two images are alike if their mark is at least 2.5. Two captions are alike if their mark is at
    least 3, or if they describe the same image.
    """
    alike = {}
    if image_of is None:
        image_of = np.arange(len(caption_ids)) // (len(caption_ids) // len(image_ids))
    for way, ids in (("i2i", image_ids), ("t2t", caption_ids)):
        name, least = CXC[way]
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            alike[way] = read_alike(path, ids, least, image_of if way == "t2t" else None)
    return alike


@torch.inference_mode()
def cxc_intra(
    model: nn.Module,
    images: Encoding,
    captions: list[Encoding],
    alike: dict[str, list[list[int]]],
) -> dict[str, dict[str, float]]:
    """CxC's {'i2i': {'r1', 'r5', 'r10'}, 't2t': ...}, for the keys of `alike` (see read_cxc).

    The published evaluation of these figures calls a function that does not fit (Q35). Its intent
    is this: the regions of an image are scored as words, the words of a caption as regions.
    """
    rows = {"i2i": lambda: image_rows(model, images), "t2t": lambda: caption_rows(model, captions)}
    return {way: intra_recalls(rows[way](), positives) for way, positives in alike.items()}
