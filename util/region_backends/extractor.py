"""What all extractors of regions have in common.

Shapes: R regions, F numbers per region, H x V pixels that a network reads.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from util.cli import InputError

KEYS = ("backend", "weights", "weights_sha256", "grid", "regions", "half", "given_boxes")


class Regions(NamedTuple):
    """The regions of one picture; `boxes` are left, top, right, bottom in its pixels."""

    features: np.ndarray  # (R, F) float32
    boxes: np.ndarray  # (R, 4) float32
    size: tuple[int, int]  # width and height of the picture
    whole: np.ndarray  # (F,) float32, of the whole picture


class Prepared(NamedTuple):
    """A picture as a network reads it, small, and the size that it had."""

    pixels: Tensor  # (3, H, V) uint8
    size: tuple[int, int]  # width and height


class Extractor:
    """A network that gives the regions of pictures.

    `settings` describe it (see open_extractor); `width` is F, and `regions` the most regions of a
    picture, None if boxes from elsewhere decide it.
    """

    settings: dict
    width: int
    regions: int | None

    def __init__(self, settings: dict, weights: str | None, digest: str, device: torch.device):
        """`weights` is where they were found, `digest` their SHA-256."""
        found = {"weights": weights, "weights_sha256": digest}
        self.settings = {key: (settings | found).get(key) for key in KEYS}
        self.half = bool(settings.get("half"))
        self.given = bool(settings.get("given_boxes"))
        self.device = device

    def prepare(self, picture) -> Prepared:
        """A picture of Pillow in the size that the network reads."""
        raise NotImplementedError

    def _run(self, batch: list[Prepared], boxes: list[Tensor] | None) -> list[Regions]:
        """The regions of prepared pictures, in these boxes (R, 4) in pixels, or in its own."""
        raise NotImplementedError

    def run(self, batch: list[Prepared], boxes: list[np.ndarray] | None = None) -> list[Regions]:
        """The regions of prepared pictures; `boxes` (R, 4) of each if they come from elsewhere.

        Raises InputError if boxes are missing, or if the network gives NaN or Inf.
        """
        if self.given != (boxes is not None):
            raise InputError(
                "these features were extracted in boxes from another program (--boxes), so a "
                "picture needs its boxes"
                if self.given
                else "boxes are given to an extractor that finds its own"
            )
        tensors = (
            None if boxes is None else [torch.from_numpy(np.array(x, np.float32)) for x in boxes]
        )
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, torch.float16, enabled=self.half),
        ):
            found = self._run(batch, tensors)
        for regions in found:
            if not np.isfinite(regions.features).all():
                raise InputError(
                    f"the network {self.settings['weights'] or self.settings['backend']} gives NaN "
                    "or Inf" + ("; try without --half" if self.half else "; are the weights whole?")
                )
        return found

    def extract(self, pictures: list, boxes: list[np.ndarray] | None = None) -> list[Regions]:
        """The regions of pictures of Pillow in RGB."""
        return self.run([self.prepare(picture) for picture in pictures], boxes)


def resized(picture, width: int, height: int, resample: int) -> Tensor:
    """The pixels (3, height, width), uint8, of a picture of Pillow in another size."""
    pixels = np.array(picture.resize((width, height), resample))  # (height, width, 3)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def numbers(x: Tensor) -> np.ndarray:
    """A tensor as an array of float32."""
    return x.float().cpu().numpy()
