"""Encode a split once, and score all of its pairs, fold by fold.

Shapes: N images, M captions, R regions.
"""

import argparse
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import checkpoint as ckpt
import systems
from bert import WordPieces
from data import PrecompDataset, collate_fn, pad_to
from pairs import Encoding, length_groups
from util.cli import InputError, progress
from util.devices import to_device
from util.distributed import all_reduce_sum, rank, world_size
from vocab import Vocabulary


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


# A checkpoint and a split


class Split(NamedTuple):
    """A split as a checkpoint's model reads it."""

    dataset: PrecompDataset
    vocab: Vocabulary | WordPieces
    opt: argparse.Namespace  # of the checkpoint
    folder: str
    name: str  # test, ...


def encode_split(
    model_path: str,
    data_path: str | None,
    split: str,
    vocab_path: str | None,
    device: torch.device,
    batch_size: int | None,
    folds: int = 1,
    published: dict | None = None,
    data_name: str | None = None,
    keep_empty_regions: bool = False,
) -> tuple[nn.Module, Split, Encoding, list[Encoding]]:
    """Load a checkpoint, and encode a split with its model; see evalrank and encode_data."""
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size {batch_size}: expected at least 1")
    print(f"Checkpoint: {model_path}")
    model, vocab, opt = ckpt.load_model(model_path, vocab_path, device)
    opt.keep_empty_regions |= keep_empty_regions
    print("Loading dataset")
    folder = systems.of(opt).find_data(data_path or opt.data_path, data_name or opt.data_name)
    print(f"Split: {split} of {folder}")
    dataset = systems.open_split(folder, split, vocab, opt, published)
    fewest = min(dataset.n_images, dataset.n_captions)
    if folds > fewest:
        raise InputError(
            f"{folder}: {fewest} images or captions of {split}, too few for five folds"
        )
    print("Computing results...")
    encoded = encode_data(model, dataset, batch_size or opt.batch_size)
    print_counts((dataset.n_images, dataset.n_captions), rank_by(dataset))
    return model, Split(dataset, vocab, opt, folder, split), *encoded


def rank_by(dataset: PrecompDataset) -> Tensor | None:
    """The image of each caption (M,), for metrics.py; None if captions have several images."""
    return dataset.image_of if dataset.candidates == 1 else None


def print_counts(shape: tuple[int, int], image_of: Sequence[int] | None) -> None:
    """Print what is ranked: images, captions, captions per image."""
    n_images, n_captions = shape
    print(f"Images: {n_images}, Captions: {n_captions}")
    if n_images > n_captions:
        print(f"Images per caption: {n_images // n_captions}")
        return
    least = most = n_captions // n_images
    if image_of is not None:
        counts = np.bincount(np.asarray(image_of))
        least, most = counts.min(), counts.max()
    print(f"Captions per image: {least if least == most else f'{least} to {most}'}")


def split_scores(
    model: nn.Module, split: Split, images: Encoding, captions: list[Encoding], folds: int = 1
) -> np.ndarray:
    """The score matrix (N, M) of an encoded split, summed over all processes."""
    start, dataset = time.time(), split.dataset
    of = rank_by(dataset)
    scores = score_matrix(model, images, captions, folds, dataset.n_captions, of)
    all_reduce_sum(torch.from_numpy(scores))
    print(f"calculate similarity time: {time.time() - start:.1f}")
    return scores
