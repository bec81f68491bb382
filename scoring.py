"""Encode a split once, and score all of its pairs, fold by fold.

Shapes: N images, M captions, R regions.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from data import PrecompDataset, collate_fn, pad_to
from pairs import Encoding, length_groups
from util.cli import progress
from util.devices import to_device
from util.distributed import rank, world_size


@torch.inference_mode()
def encode_data(
    model: nn.Module, dataset: PrecompDataset, batch_size: int = 128
) -> tuple[Encoding, list[Encoding]]:
    """Encode each image and each caption of a dataset once, on the model's device (Q6).

    Returns the images, with N rows, and the captions as a list with one encoding per length, so
    that there is no padding. Each encoding holds the positions of its captions as 'index'. Images
    are encoded without padding too, those with as many regions together; then 'region_mask' (N, R)
    says which regions are there, if not all are. With several processes, each encodes all images,
    which is little work, and its share of the captions.
    """
    model.eval()
    device = next(model.parameters()).device

    def encode(encoder, item, parts: Iterable[Tensor]) -> Encoding:
        encoded = []
        for part in parts:
            batch = collate_fn([item(number) for number in part.tolist()])
            encoded.append(encoder(to_device(batch, device)))
        return {name: torch.cat([x[name] for x in encoded]) for name in encoded[0]}

    groups = list(length_groups(dataset.region_counts))
    encoded = [
        encode(model.encode_images, dataset.image_item, progress(parts, "encoding images"))
        for parts in (where.split(batch_size) for _, where in groups)
    ]
    images = encoded[0] if len(encoded) == 1 else join_images(encoded, groups)

    captions, dealt = [], 0
    groups = list(length_groups(dataset.lengths[: dataset.n_captions]))
    for _, where in progress(groups, "encoding captions"):
        parts = where.split(batch_size)
        # The batches are dealt out in turn, so that each process gets captions of all lengths.
        mine = parts[(rank() - dealt) % world_size() :: world_size()]
        dealt += len(parts)
        if mine:
            encoding = encode(model.encode_captions, dataset.caption_item, mine)
            captions.append(encoding | {"index": torch.cat(mine)})
    return images, captions


def join_images(encoded: list[Encoding], groups: list[tuple[int, Tensor]]) -> Encoding:
    """One encoding of all images, of encodings of images with as many regions each.

    `groups` holds the number of regions and the positions (n,) of each encoding's images. Regions
    that an image lacks are zeros, and False in 'region_mask'.
    """
    images, order = {}, torch.cat([where for _, where in groups]).argsort()  # (N,)
    counts = torch.cat([torch.full_like(where, n) for n, where in groups])  # (N,)
    for name in encoded[0]:
        shapes = zip(*(x[name].shape[1:] for x in encoded), strict=True)
        largest = [max(sizes) for sizes in shapes]
        x = torch.cat([pad_to(x[name], [len(x[name]), *largest]) for x in encoded])
        images[name] = x[order.to(x.device)]  # (N, ...)
    there = torch.arange(int(counts.max())) < counts[order, None]  # (N, R)
    return images | {"region_mask": there.to(x.device)}


@torch.inference_mode()
def score_matrix(
    model: nn.Module,
    images: Encoding,
    captions: list[Encoding],
    folds: int = 1,
    n_captions: int | None = None,
    image_of: Sequence[int] | None = None,
) -> np.ndarray:
    """Scores (N, M), float32, of all encoded images and captions.

    With `folds` > 1, only the pairs within each of `folds` equal parts are scored; the other scores
    are 0 (`image_of` (M,): see metrics.py). The scores of captions that another process holds are 0
    too; `n_captions`, M, counts these captions as well.
    """
    n_images = len(next(iter(images.values())))
    n_captions = n_captions or sum(len(group["index"]) for group in captions)
    scores = np.zeros((n_images, n_captions), dtype=np.float32)
    for fold in range(folds):
        rows, columns, _ = fold_parts((n_images, n_captions), fold, folds, image_of)
        of_fold = {name: x[rows] for name, x in images.items()}
        for group in progress(captions, "scoring"):
            mask = torch.isin(group["index"], columns)  # (c,)
            if not mask.any():
                continue
            index = group["index"][mask]
            chosen = {name: x[mask.to(x.device)] for name, x in group.items() if name != "index"}
            block = model.similarity(of_fold, chosen)  # (n, c)
            scores[rows, index.numpy()] = block.cpu().numpy()
    return scores


def fold_slices(n_images: int, n_captions: int, fold: int, folds: int) -> tuple[slice, slice]:
    """Slices of images and captions for one of `folds` equal parts (published: 1,000 of 5,000)."""
    n = min(n_images, n_captions)
    first, last = fold * n // folds, (fold + 1) * n // folds
    # Not total // n * first: without folds all captions count, also if n does not divide them.
    return tuple(slice(total * first // n, total * last // n) for total in (n_images, n_captions))


def fold_parts(
    shape: tuple[int, int], fold: int, folds: int, image_of: Sequence[int] | None = None
) -> tuple[slice, Tensor, Tensor | None]:
    """The images of a fold of scores (N, M), the positions of their captions, and their image_of.

    `image_of` (M,) is the image of each caption; None: the captions stand image by image.
    """
    n_images, n_captions = shape
    if image_of is None:
        rows, columns = fold_slices(n_images, n_captions, fold, folds)
        return rows, torch.arange(n_captions)[columns], None
    rows, _ = fold_slices(n_images, n_images, fold, folds)
    image_of = torch.as_tensor(np.asarray(image_of))  # (M,)
    columns = ((image_of >= rows.start) & (image_of < rows.stop)).nonzero().flatten()
    return rows, columns, image_of[columns] - rows.start
