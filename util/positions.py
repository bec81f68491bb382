"""Convert pixel boxes to the position blocks that PFAN reads.

    python util/positions.py --data_path data --data_name f30k_precomp      # all splits
    python util/positions.py --data_name tencent_data --with_area           # for pfan_whole

An image is cut into 16 x 16 blocks with id = column * 16 + row. For each region,
`{split}_boxes.npy` (N, R, 30) holds the ids of the 15 blocks with the largest overlap, the largest
first; if two overlaps are equal, the lower id comes first. Then come their weights: the overlaps
divided by the sum of the 15. If a region overlaps fewer blocks, the other ids are 256 (no block)
and their weights 0. The script reads `{split}_ims_bbx.npy` (N, R, 4), left, top, right, bottom in
pixels, floats or integers, and `{split}_ims_size.npy`. It writes beside them, or to --out FOLDER if
they are read-only. Training reads one folder: there must be links to the other files in FOLDER, as
`ln -s /data/f30k_precomp/* FOLDER` makes them.
"""

import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # when run by path

from util.arguments import FOLDER, Parser  # noqa: E402
from util.arrays import open_array, read_sizes  # noqa: E402
from util.boxes import BoxCheck  # noqa: E402
from util.cli import InputError, progress, replacing, run  # noqa: E402
from util.folders import SPLITS, find_folder  # noqa: E402


def find_blocks(
    boxes: np.ndarray,
    sizes: np.ndarray,
    split_size: int = 16,
    n_blocks: int = 15,
    with_area: bool = False,
) -> np.ndarray:
    """Blocks and weights (N, R, 2 n_blocks), float32, of boxes (N, R, 4) in pixels.

    sizes (N, 2) are the images' widths and heights. The part of a box outside the image overlaps no
    block. A box without area, such as a padding region, has no blocks. `with_area` adds a column:
    the area of the box, inside the image, as a fraction of the area of the image.
    """
    scale = np.tile(np.asarray(sizes, np.float64), 2)[:, None]  # (N, 1, 4)
    low, high = np.split(np.asarray(boxes, np.float64) / scale * split_size, 2, axis=2)  # (N, R, 2)
    lines = np.arange(split_size)
    # The part of each column and of each row of blocks that a box covers. Its unit is a block, so
    # that the blocks that a box covers completely have exactly 1, and tie.
    covered = np.minimum(high[..., None], lines + 1) - np.maximum(low[..., None], lines)
    columns, rows = np.moveaxis(covered.clip(0, 1), 2, 0)  # (N, R, split_size)
    overlap = (columns[..., :, None] * rows[..., None, :]).reshape(*columns.shape[:2], -1)
    rounded = overlap.round(9)  # so that rounding errors decide no tie and add no block
    overlap = np.where(rounded > 0, overlap, 0)
    order = np.argsort(-rounded, axis=2, kind="stable")[..., :n_blocks]  # (N, R, k)
    kept = np.take_along_axis(overlap, order, 2)  # (N, R, k)
    missing = n_blocks - kept.shape[2]  # an image may have fewer blocks
    ids = np.where(kept > 0, order, split_size**2)  # (N, R, k)
    weights = kept / np.maximum(kept.sum(2, keepdims=True), 1e-300)  # (N, R, k)
    pad = ((0, 0), (0, 0), (0, missing))
    parts = [np.pad(ids, pad, constant_values=split_size**2), np.pad(weights, pad)]
    if with_area:
        sides = (high.clip(max=split_size) - low.clip(min=0)).clip(min=0)  # (N, R, 2)
        parts.append(np.prod(sides, axis=2, keepdims=True) / split_size**2)  # (N, R, 1)
    return np.concatenate(parts, 2).astype(np.float32)


def convert(
    stem: str,
    split_size: int = 16,
    n_blocks: int = 15,
    with_area: bool = False,
    chunk: int = 256,
    target: str | None = None,
) -> tuple[int, int]:
    """Write `target`, by default `{stem}_boxes.npy`, completely or not at all.

    Returns the number of images and the number of regions that overlap no block.
    """
    boxes = open_array(f"{stem}_ims_bbx.npy", ndim=3, integers=True)  # (N, R, 4)
    if boxes.shape[2] != 4 or not boxes.size:
        raise InputError(
            f"{stem}_ims_bbx.npy: boxes of shape {boxes.shape}, expected (N, R, 4): left, top, "
            "right, bottom in pixels"
        )
    sizes = read_sizes(f"{stem}_ims_size.npy", len(boxes))  # (N, 2)
    shape = *boxes.shape[:2], 2 * n_blocks + with_area
    without, check = 0, BoxCheck()
    with replacing(target or f"{stem}_boxes.npy") as part:
        out = np.lib.format.open_memmap(part, mode="w+", dtype=np.float32, shape=shape)
        for start in progress(range(0, len(boxes), chunk), os.path.basename(stem)):
            some = np.asarray(boxes[start : start + chunk], np.float64)
            if not np.isfinite(some).all():
                row = start + int(np.argmin(np.isfinite(some).all((1, 2))))
                raise InputError(f"{stem}_ims_bbx.npy: row {row} (from 0) holds NaN or Inf")
            found = find_blocks(some, sizes[start : start + chunk], split_size, n_blocks, with_area)
            check.add(some, sizes[start : start + chunk])
            real = some.any(2)  # (n, R), without filling
            without += int((real & (found[..., 0] == split_size**2)).sum())
            out[start : start + chunk] = found
        out.flush()
    check.warn(f"{stem}_ims_bbx.npy")
    return len(boxes), without


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data_path", default="data", type=FOLDER, help="folder that holds DATA_NAME/"
    )
    parser.add_argument(
        "--data_name", default="f30k_precomp", type=FOLDER, help="e.g. f30k_precomp"
    )
    parser.add_argument("--splits", nargs="+", help="default: all splits that have boxes")
    parser.add_argument("--split_size", type=int, default=16, help="blocks per side of an image")
    parser.add_argument("--n_blocks", type=int, default=15, help="blocks kept per region")
    parser.add_argument(
        "--with_area", action="store_true", help="add a column: area of the box / area of the image"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    parser.add_argument(
        "--out",
        type=FOLDER,
        help="folder to write to, if that of the data is read-only; training also needs links to "
        "the other files in it: ln -s DATA_PATH/DATA_NAME/* OUT",
    )
    opt = parser.parse_args(argv)
    if opt.split_size < 1 or opt.n_blocks < 1:
        raise InputError("--split_size and --n_blocks: expected at least 1")
    folder = find_folder(opt.data_path, opt.data_name)
    stems = {split: os.path.join(folder, split) for split in opt.splits or SPLITS}
    if not opt.splits:
        stems = {s: stem for s, stem in stems.items() if os.path.isfile(f"{stem}_ims_bbx.npy")}
    if not stems:
        raise FileNotFoundError(
            f"{folder}: no boxes ({{split}}_ims_bbx.npy); util/convert_data.py writes them"
        )
    out = opt.out or folder
    targets = {split: os.path.join(out, f"{split}_boxes.npy") for split in stems}
    there = [split for split, target in targets.items() if os.path.exists(target)]
    if there and not opt.overwrite:
        if opt.splits or len(there) == len(stems):
            raise InputError(f"{targets[there[0]]}: exists already; --overwrite replaces it")
        print(f"kept: {', '.join(f'{split}_boxes.npy' for split in there)}")
        stems = {split: stem for split, stem in stems.items() if split not in there}
    os.makedirs(out, exist_ok=True)
    for split, stem in stems.items():
        images, without = convert(
            stem, opt.split_size, opt.n_blocks, opt.with_area, target=targets[split]
        )
        note = f"; {without} regions overlap no block" if without else ""
        print(f"{targets[split]}: {images} images{note}")
    if not os.path.samefile(out, folder):
        print(f"notice: training reads one folder: ln -s {os.path.abspath(folder)}/* {out}")


if __name__ == "__main__":
    run(main, clean_up=True)
