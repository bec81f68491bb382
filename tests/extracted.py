"""Images as extractors write them, for the tests of the converter."""

import base64
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Made(NamedTuple):
    """An image: its features (R, F), boxes (R, 4) within the picture, width and height."""

    name: str
    features: np.ndarray
    boxes: np.ndarray
    size: tuple[int, int]


def made(name, regions: int = 3, dim: int = 5, size: tuple[int, int] = (100, 80), seed: int = 0):
    """A random image."""
    rng = np.random.default_rng([seed, regions, dim, *str(name).encode()])
    corners = np.sort(rng.uniform(0, 1, (regions, 2, 2)), axis=1) * size
    features = rng.normal(size=(regions, dim)).astype(np.float32)
    return Made(str(name), features, corners.reshape(regions, 4).astype(np.float32), size)


def b64(array: np.ndarray, dtype: str = "<f4") -> str:
    return base64.b64encode(np.asarray(array).astype(dtype).tobytes()).decode()


def fields(image: Made, features: str = "<f4", boxes: str = "<f4") -> list[str]:
    """The six fields of bottom-up-attention, with types of numbers."""
    width, height = image.size
    numbers = [str(width), str(height), str(len(image.boxes))]
    return [image.name, *numbers, b64(image.boxes, boxes), b64(image.features, features)]


def spoiled(image: Made, index: int, value: str) -> list[str]:
    """The fields of an image, one of which is damaged."""
    line = fields(image)
    line[index] = value
    return line


def write_tsv(path: Path, *rows: list[str]) -> str:
    path.write_text("".join("\t".join(row) + "\n" for row in rows))
    return str(path)


def check(out, *images: Made, features: type = np.float32, tolerance: float = 0) -> None:
    """Compare what the converter wrote with images, filled up with zeros."""
    ims, bbx, counts = (np.load(f"{out}_{x}.npy") for x in ("ims", "ims_bbx", "num_boxes"))
    sizes = np.load(f"{out}_ims_size.npy")
    assert ims.dtype == features and bbx.dtype == np.float32 and counts.dtype == np.int32
    assert len(ims) == len(bbx) == len(counts) == len(sizes) == len(images)
    for row, image in enumerate(images):
        n = len(image.boxes)
        assert counts[row] == n and tuple(sizes[row].tolist()) == image.size
        np.testing.assert_allclose(ims[row, :n], image.features, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(bbx[row, :n], image.boxes, rtol=tolerance, atol=tolerance)
        assert not ims[row, n:].any() and not bbx[row, n:].any()


def ids_of(out) -> list[str]:
    return Path(f"{out}_ids.txt").read_text(encoding="utf-8").splitlines()
