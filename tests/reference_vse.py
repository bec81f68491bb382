"""VSE-infinity as plain loops, with the weights of a model and in their precision."""

import math

import torch
from torch import Tensor

from tests.reference_systems import cut_filling, encode_caption, gru, unit


def gpo_weights(gpool: torch.nn.Module, n: int) -> list[Tensor]:
    """The weights () of n sorted numbers, the largest number's first."""
    rows = []
    for place in range(n):
        row = []
        for k in range(16):
            angle = place * 10000 ** (-2 * k / 32)
            row += [math.sin(angle), math.cos(angle)]
        rows.append(row)
    x = torch.tensor(rows, dtype=torch.float64).to(gpool.linear.weight.dtype)
    scores = [gpool.linear.weight[0] @ h / 0.1 for h in gru(gpool.gru, x)[0]]
    total = sum((score - max(scores)).exp() for score in scores)
    return [(score - max(scores)).exp() / total for score in scores]


def pool(gpool: torch.nn.Module, x: Tensor) -> Tensor:
    """One vector (D,) of the rows of x (K, D)."""
    kind, columns = type(gpool).__name__, [list(column) for column in x.T]
    if kind == "MeanPool":
        return torch.stack([sum(column) / len(column) for column in columns])
    if kind == "MaxPool":
        return torch.stack([max(column) for column in columns])
    weights = gpo_weights(gpool, len(x))
    ordered = [sorted(column, reverse=True) for column in columns]
    return torch.stack(
        [sum(w * y for w, y in zip(weights, column, strict=True)) for column in ordered]
    )


def batch_norm(bn: torch.nn.Module, rows: list[Tensor]) -> list[Tensor]:
    """Each of the rows (H,) of a batch; in evaluation, with the running mean and variance."""
    mean, variance = bn.running_mean, bn.running_var
    if bn.training:
        mean = sum(rows) / len(rows)
        variance = sum((row - mean) ** 2 for row in rows) / len(rows)
    return [(row - mean) / (variance + bn.eps).sqrt() * bn.weight + bn.bias for row in rows]


def encode_images(model: torch.nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """The vectors (D,) of the images of a batch."""
    images = []
    for k in range(len(batch["images"])):
        item = cut_filling({name: x[k] for name, x in batch.items()})
        mask = item.get("region_mask", torch.ones(len(item["images"]), dtype=torch.bool))
        images.append(item["images"][mask])
    first, second = model.img_enc.mlp.layers
    hidden = [first.weight @ x + first.bias for image in images for x in image]
    hidden = iter(batch_norm(model.img_enc.mlp.bns[0], hidden))
    fc, found = model.img_enc.fc, []
    for image in images:
        regions = [
            fc.weight @ x + fc.bias + second.weight @ next(hidden).clamp(min=0) + second.bias
            for x in image
        ]
        vector = pool(model.img_enc.gpool, torch.stack(regions))
        found.append(vector if model.no_imgnorm else unit(vector))
    return found


def vse_scores(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Scores (I, C) of a batch."""
    captions = []
    for ids, length in zip(batch["captions"], batch["lengths"].tolist(), strict=True):
        words, _ = encode_caption(model.txt_enc, ids[:length])
        vector = pool(model.txt_enc.gpool, words)
        captions.append(vector if model.no_txtnorm else unit(vector))
    return torch.stack(
        [torch.stack([image @ x for x in captions]) for image in encode_images(model, batch)]
    )
