"""Regions of a network without boxes: overlapping windows of its feature map, or given boxes.

Shapes: B pictures, R regions, F numbers per region, h x v cells of the feature map, G windows of a
side.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from util.cli import InputError
from util.region_backends.extractor import Extractor, Prepared, Regions, numbers, resized

BILINEAR, BICUBIC = 2, 3  # Pillow's numbers of the ways to resize


class Net(NamedTuple):
    """A network with a feature map, and how it wants its pictures."""

    module: nn.Module
    feature_map: Callable[[Tensor], Tensor]  # (B, 3, H, V) -> (B, F, h, v)
    size: tuple[int, int]  # height and width of the pictures
    mean: tuple[float, ...]  # of the pixels from 0 to 255
    std: tuple[float, ...]
    resample: int
    weights: str | None
    digest: str


def windows(cells: int, count: int) -> list[tuple[int, int]]:
    """First and end cell of `count` windows over `cells` cells of a side.

    A window is about twice as long as the step to the next one, so neighbours overlap by a half, if
    there are cells enough. No two are the same, and together they cover all cells. Raises
    InputError if there are more windows than cells.
    """
    if count > cells:
        raise InputError(
            f"--grid {count}: the feature map has {cells} cells a side; give at most {cells}"
        )
    length = min(-(-2 * cells // (count + 1)), cells - count + 1)
    last = cells - length
    starts = [round(k * last / max(1, count - 1)) for k in range(count)]
    return [(start, start + length) for start in starts]


def shares(start: Tensor, end: Tensor, cells: int) -> Tensor:
    """The share (R, cells) that each cell has in the stretches from start (R,) to end (R,).

    Start and end are in cells. A row sums to 1.
    """
    edge = torch.arange(cells, dtype=start.dtype, device=start.device)  # (cells,)
    low = torch.maximum(start[:, None], edge)  # (R, cells)
    high = torch.minimum(end[:, None], edge + 1)  # (R, cells)
    part = (high - low).clamp(min=0)  # (R, cells)
    return part / part.sum(1, keepdim=True)


def pool(feature_map: Tensor, boxes: Tensor) -> Tensor:
    """Mean (R, F) of a feature map (F, h, v) over boxes (R, 4) in cells, weighted by overlap."""
    _, height, width = feature_map.shape
    across = shares(boxes[:, 0], boxes[:, 2], width)  # (R, v)
    down = shares(boxes[:, 1], boxes[:, 3], height)  # (R, h)
    weights = torch.einsum("rh,rv->rhv", down, across)  # (R, h, v)
    return weights.flatten(1) @ feature_map.flatten(1).T  # (R, F)


def inside(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (R, 4) within a picture of width and height, at least a pixel wide and high."""
    limit = torch.tensor(size, dtype=boxes.dtype, device=boxes.device)  # (2,)
    start = torch.minimum(boxes[:, :2].clamp(min=0), limit - 1)  # (R, 2)
    end = torch.minimum(torch.maximum(boxes[:, 2:], start + 1), limit)  # (R, 2)
    return torch.cat([start, end], 1)  # (R, 4)


class GridExtractor(Extractor):
    """Means of a feature map over windows, row by row, or over given boxes.

    The picture is squeezed to the network's size as a whole, so that nothing of it is cut off.
    """

    def __init__(self, settings: dict, net: Net, device: torch.device):
        super().__init__(settings, net.weights, net.digest, device)
        self.net = net
        net.module.eval().requires_grad_(False).to(device)
        self.mean = torch.tensor(net.mean, device=device).view(3, 1, 1)
        self.std = torch.tensor(net.std, device=device).view(3, 1, 1)
        try:
            with torch.inference_mode():
                trial = self._maps(torch.zeros(1, 3, *net.size, dtype=torch.uint8))
        except InputError:
            raise
        except (ValueError, RuntimeError) as error:  # libraries check the size in their own ways
            raise InputError(
                f"{net.weights}: the network does not read pictures of {net.size[0]} x "
                f"{net.size[1]} pixels ({str(error).splitlines()[0]})"
            ) from None
        _, self.width, height, width = trial.shape
        self.cells = width, height
        self.regions = None
        if self.given:
            self.settings["grid"] = None
        else:
            grid = self.settings["grid"] = settings.get("grid") or 6
            columns, rows = windows(width, grid), windows(height, grid)
            boxes = [[a, c, b, d] for c, d in rows for a, b in columns]
            self.windows = torch.tensor(boxes, dtype=torch.float32)  # (R, 4), in cells
            self.regions = len(boxes)
            self.settings["regions"] = None

    def prepare(self, picture) -> Prepared:
        height, width = self.net.size
        return Prepared(resized(picture, width, height, self.net.resample), picture.size)

    def _maps(self, pixels: Tensor) -> Tensor:
        """The feature maps (B, F, h, v) of pixels (B, 3, H, V)."""
        x = (pixels.to(self.device).float() - self.mean) / self.std  # (B, 3, H, V)
        return self.net.feature_map(x).float()  # (B, F, h, v)

    def _run(self, batch: list[Prepared], boxes: list[Tensor] | None) -> list[Regions]:
        maps = self._maps(torch.stack([x.pixels for x in batch]))  # (B, F, h, v)
        found = []
        for k, (feature_map, (_, size)) in enumerate(zip(maps, batch, strict=True)):
            pixels, cells = torch.tensor(size * 2), torch.tensor(self.cells * 2)  # (4,)
            if boxes is None:
                places, windows = self.windows * pixels / cells, self.windows  # (R, 4)
            else:
                places, windows = boxes[k], inside(boxes[k], size) * cells / pixels  # (R, 4)
            with torch.autocast(self.device.type, enabled=False):
                features = pool(feature_map, windows.to(self.device))  # (R, F)
            whole = feature_map.mean((1, 2))  # (F,)
            found.append(Regions(numbers(features), numbers(places), size, numbers(whole)))
        return found
