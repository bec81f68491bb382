"""A small backend for the tests of extract_regions.py, pictures for it, and what it wrote."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from util import extract_regions
from util.pictures import open_picture
from util.region_backends import BACKENDS, open_extractor
from util.region_backends.grid import BICUBIC, GridExtractor, Net

DIM, SIDE, CELLS = 6, 32, 8
OUT = Path("data/mine_precomp")


def open_backend(settings: dict, device: torch.device, download: bool) -> GridExtractor:
    """A convolution with fixed weights: a feature map of CELLS x CELLS."""
    torch.manual_seed(len(settings.get("weights") or ""))
    net = torch.nn.Conv2d(3, DIM, SIDE // CELLS, stride=SIDE // CELLS)
    kind = Net(net, net, (SIDE, SIDE), (127.0,) * 3, (128.0,) * 3, BICUBIC, None, "0" * 64)
    return GridExtractor(settings, kind, device)


def draw(path: Path, size: tuple[int, int] = (60, 40), seed: int | None = None, **more) -> Path:
    """Write a random picture."""
    rng = np.random.default_rng(sum(path.name.encode()) if seed is None else seed)
    pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, **more)
    return path


@pytest.fixture(name="photos")
def photo_folder(tmp_path, monkeypatch):
    """A working directory with a folder of seven pictures, and a small backend."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(BACKENDS, "tiny", "tests.tiny_backend")
    folder = tmp_path / "photos"
    folder.mkdir()
    for k, name in enumerate(["b.jpg", "a b.JPG", "c.png", "d.webp", "é.jpeg", "f.bmp", "g.gif"]):
        draw(folder / name, (40 + k, 30))
    return folder


def extract(*more: str, split: str = "test", batch: int = 2):
    """Run the program on the folder of pictures."""
    flags = ["photos", "--out", str(OUT), "--split", split, "--backend", "tiny", "--grid", "3"]
    extract_regions.main([*flags, "--batch_size", str(batch), *more])


def ids(split: str = "test") -> list[str]:
    return (OUT / f"{split}_ids.txt").read_text().splitlines()


def files() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(OUT.iterdir()) if path.is_file()}


def arrays(split: str = "test") -> dict[str, np.ndarray]:
    names = ("ims", "ims_bbx", "ims_size", "num_boxes", "who_ims")
    return {name: np.load(OUT / f"{split}_{name}.npy") for name in names}


def check_rows(names: list[str], folder: Path, split: str = "test") -> None:
    """Each row is that of its picture, extracted alone."""
    assert ids(split) == names
    found = arrays(split)
    one = open_extractor(extract_regions.read_settings(str(OUT / split)), "cpu")
    assert found["ims"].dtype == np.float16 and found["who_ims"].dtype == np.float32
    assert all(len(array) == len(names) for array in found.values())
    for row, name in enumerate(names):
        picture = open_picture(folder / name)
        regions = one.extract([picture])[0]
        n = len(regions.features)
        assert found["num_boxes"][row] == n
        assert tuple(found["ims_size"][row].tolist()) == picture.size == regions.size
        np.testing.assert_allclose(found["ims"][row, :n], regions.features, atol=2e-3)
        np.testing.assert_allclose(found["ims_bbx"][row, :n], regions.boxes, rtol=1e-6)
        np.testing.assert_allclose(found["who_ims"][row], regions.whole, atol=1e-5)
