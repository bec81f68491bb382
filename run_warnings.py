"""What may be wrong with a run, told from the losses of an epoch and from what dev shows.

docs/training.md says when each is said. Shapes: N images, M captions.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np
from torch import nn

from data import PrecompDataset
from losses import ContrastiveLoss

SHIFTS = 10  # captions and images are tried out of step by up to as many


def at_twice_the_margin(criterion: nn.Module, losses: list[tuple[float, int]]) -> bool:
    """Whether the (loss, pairs) of an epoch's steps all lie near twice the margin.

    If all scores are alike, each pair pays the margin of its hardest negative in both directions.
    A run that learns may be there for an epoch too: only its recalls tell the two apart.
    """
    level = 2 * criterion.margin
    near = sum(size for loss, size in losses if abs(loss / size - level) <= 0.03 * level)
    return level > 0 and near >= 0.9 * sum(size for _, size in losses)


def worse_than(place: float, metrics: dict, n: int) -> bool:
    """Whether captions rank their image behind `place` of the n images, on average, beyond doubt.

    0.5 is chance. The doubt is two standard deviations of random ranks of n images.
    """
    mean = (metrics["t2i"]["meanr"] - 1) / max(n - 1, 1)
    return mean - 2 * math.sqrt(1 / 12 / n) > place


def chances(n: int) -> list[float]:
    """R@1, R@5 and R@10 of random scores among n images, in percent."""
    return [100 * min(k / n, 1) for k in (1, 5, 10)]


def fell_back(rsum: float, best: float, n: int) -> bool:
    """Whether a model has lost two fifths of what it had learned, beyond doubt, on n images.

    What it has learned is the sum of its six recalls above that of chance. The doubt is two
    standard deviations of that sum, 300 / sqrt(n) at most: 50 / sqrt(n) for each recall.
    """
    chance = 2 * sum(chances(n))
    lost = best - rsum > 2 * 300 / math.sqrt(n)
    return lost and rsum - chance < 0.6 * (best - chance)


def what_to_change(criterion: nn.Module, rate: str) -> str:
    """The settings that decide whether a run learns; docs/troubleshooting.md has a table.

    `rate` says which other --learning_rate.
    """
    rate = f"{rate} --learning_rate"
    if not isinstance(criterion, ContrastiveLoss):
        return rate
    warmup = f"--vse_mean_warmup_epochs {criterion.warmup_epochs + 1}, "
    return f"{warmup * criterion.max_violation}a larger --margin or {rate}"


def at_chance(metrics: dict, n: int, m: int) -> bool:
    """Whether recalls among n images and m captions are those of random scores, beyond doubt.

    R@1 must be within four standard deviations of chance in both directions, where the captions of
    an image may all rise or fall together. And the mean rank of the images must be clearly worse
    than that of a model that has begun to learn; on a few images this cannot be told, so there is
    no warning.
    """
    if n < 2:
        return False
    k = m / n
    for way, queries, together in (("i2t", n, 1), ("t2i", m, k)):
        expected = queries / n
        hits = metrics[way]["r1"] * queries / 100
        if hits > expected + 4 * math.sqrt(together * expected):
            return False
    return worse_than(0.35, metrics, n)


class Shift(NamedTuple):
    """Captions belong to the images of captions `by` lines before them, or to images `by` on."""

    by: int
    unit: str  # captions or images
    captions: int  # those whose image it changes
    found: float  # percent of these that find the shifted image first
    as_paired: float  # percent of these that find their own image first


def find_shift(scores: np.ndarray, image_of: np.ndarray) -> Shift | None:
    """Whether captions fit images better if all are shifted by a constant number; None: no.

    scores (N, M), image_of (M,). For each shift, the captions whose image it changes are looked at:
    how many find their image as they are paired, how many the shifted one? A model that confuses
    neighbours, such as two photos of one scene, finds both as often. So more must find the shifted
    one than twice as many as the own one, and of many images.
    """
    n, m = scores.shape
    first, rows = scores.argmax(0), np.arange(m)  # (M,) what each caption finds
    found: dict[str, list[tuple[float, bool, Shift]]] = {"images": [], "captions": []}
    shifts = [by for by in range(-SHIFTS, SHIFTS + 1) if by]
    for by, unit in itertools.product(shifts, found):
        if unit == "images":
            other = image_of + by  # (M,)
            there = (other >= 0) & (other < n)
        else:
            other = image_of[(rows - by).clip(0, m - 1)]  # (M,)
            there = (rows - by >= 0) & (rows - by < m)
        there &= other != image_of
        shifted, own = (first == other) & there, (first == image_of) & there
        by_image = np.bincount(image_of, shifted.astype(float) - own, n)  # (N,)
        gain, spread = by_image.sum(), math.sqrt((by_image**2).sum())
        enough = there.sum() * max(0.05, 5 / n) + 2 * own.sum()
        certain = gain > 0 and gain >= 3 * spread and shifted.sum() >= enough
        changed = int(there.sum())
        percents = (100 * x.sum() / max(changed, 1) for x in (shifted, own))
        found[unit].append((gain, certain, Shift(by, unit, changed, *percents)))
    images, captions = (max(x, key=lambda x: x[0]) for x in found.values())
    # Five captions may be one image, and then four or six are nearly that.
    near = images[0] + 2 * math.sqrt(max(captions[0], 0)) >= captions[0]
    _, certain, shift = images if near else captions
    return shift if certain else None


def out_of_step(dev_set: PrecompDataset, shift: Shift) -> str:
    """What to say of a shift."""
    by, unit = shift.by, shift.unit
    if unit == "images":
        fits = f"the captions of image n fit image n {'+' if by > 0 else '-'} {abs(by)}"
    else:
        where = "before" if by > 0 else "after"
        fits = f"each caption fits the image of the line {abs(by)} {where} it"
    return (
        f"{dev_set.caption_path} and {dev_set.path} are out of step by {abs(by)} "
        f"{unit if abs(by) > 1 else unit[:-1]}: {fits} (of the {shift.captions:,} captions whose "
        f"image this changes, {shift.found:.1f} % find the new one first, {shift.as_paired:.1f} % "
        "their own); look for an extra or a missing line in the one or row in the other, in train "
        "too"
    )
