"""PFAN's data: regions with the blocks of the image that they overlap, and whole images.

Beside the files of data.py, `{split}_boxes.npy`, and for the whole-image variant
`{split}_who_ims.npy`. Shapes: R regions, F numbers per region, K blocks per region.
"""

import glob
import os
import reprlib  # what repr() says of a hostile file may have no end

import numpy as np
import torch
from torch import Tensor

from data import PrecompDataset
from util.arrays import open_array
from util.cli import InputError
from vocab import Vocabulary


class PositionDataset(PrecompDataset):
    """PFAN's split: regions come with the blocks of the image that they overlap.

    `{split}_boxes.npy` (rows, R, 2 K) holds K block ids, then K weights, as util/positions.py
    writes them; one more column, the area, is not read. K is taken from the file: `n_blocks`.
    `split_size` squared is the id of "no block".
    """

    def __init__(
        self,
        data_path: str,
        data_split: str,
        vocab: Vocabulary,
        img_dim: int | None = None,
        split_size: int = 16,
        keep_empty_regions: bool = False,
        images_only: bool = False,
    ):
        super().__init__(data_path, data_split, vocab, img_dim, keep_empty_regions, images_only)
        self.none = split_size**2
        self.block_path = os.path.join(data_path, f"{data_split}_boxes.npy")
        if not os.path.isfile(self.block_path):
            raise FileNotFoundError(
                f"{self.block_path}: no positions, which PFAN needs; make them with `python "
                "util/positions.py --data_path DATA_PATH --data_name DATA_NAME`"
            )
        self.blocks = open_array(self.block_path, ndim=3)  # (rows, R, 2 K or 2 K + 1)
        rows, regions, _ = self.images.shape
        self._check_blocks(rows, regions)

    def _check_blocks(self, rows: int, regions: int) -> None:
        found = self.blocks.shape
        self.n_blocks = found[2] // 2
        self.options_of_data["n_blocks"] = self.n_blocks
        if found[:2] != (rows, regions) or self.n_blocks < 1:
            raise InputError(
                f"{self.block_path}: an array of shape {found}, but {self.path} holds {rows} "
                f"images of {regions} regions; expected ({rows}, {regions}, 2 K), K block ids and "
                "K weights"
            )

    def image_item(self, image: int) -> dict[str, Tensor]:
        """{'images': (R, F), 'blocks': (R, K) ids, 'overlap': (R, K) weights}."""
        row, k = int(self.rows[image]), self.n_blocks
        table = self._of_regions(self.blocks, row).astype(np.float32)  # (R, 2 K or 2 K + 1)
        table = torch.from_numpy(table[:, : 2 * k])  # (R, 2 K)
        ids, overlap = table.split(k, 1)
        blocks = ids.long()  # (R, K)
        wrong = (blocks != ids) | (blocks < 0) | (blocks > self.none) | ~(overlap >= 0)
        wrong |= overlap > 1.001  # parts of the overlap, as float16 may hold them
        # No block may occur twice. This also finds the "no block" of another grid.
        ordered = blocks.sort(1).values
        twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != self.none)
        wrong[:, 1:] |= twice
        if wrong.any():
            region = int(wrong.any(1).nonzero()[0])
            raise InputError(
                f"{self.block_path}: row {row} (from 0), region {region}: expected {k} block ids "
                f"from 0 to {self.none}, then {k} weights from 0 to 1, found "
                f"{reprlib.repr(table[region].tolist())}; it is not made for --split_size "
                f"{round(self.none**0.5)}, or these are not blocks: util/positions.py makes them"
            )
        return super().image_item(image) | {"blocks": blocks, "overlap": overlap.contiguous()}


class WholeDataset(PositionDataset):
    """The split of PFAN's whole-image variant: images come with a vector of the whole image.

    `{split}_who_ims.npy` (rows, F) holds these vectors. Captions come from `{split}_sent_caps.txt`
    if it exists. With `need_box_whole` the last region of `{split}_ims.npy` is the whole image;
    `{split}_boxes.npy` may have a row for it or not. A split to test on (test...) may hold, image
    by image, `candidates` images per caption instead of k captions per image.
    """

    def __init__(self, *position_dataset, need_box_whole: bool = False, **more):
        self.need_box_whole = self.last_region_is_image = need_box_whole
        super().__init__(*position_dataset, **more)
        self.whole_path = f"{self.path.removesuffix('_ims.npy')}_who_ims.npy"
        self.whole = open_array(self.whole_path, ndim=2)  # (rows, F)
        rows, _, numbers = self.images.shape
        if self.whole.shape != (rows, numbers):
            raise InputError(
                f"{self.whole_path}: an array of shape {self.whole.shape}, expected "
                f"({rows}, {numbers}), a vector for each image of {self.path}"
            )

    def _candidates(self, data_split: str, rows: int, captions: int) -> int:
        several = data_split.startswith("test") and rows > captions and rows % captions == 0
        return rows // captions if several else 1

    def _caption_file(self, stem: str, vocab: Vocabulary) -> str:
        path = f"{stem}_sent_caps.txt"
        if os.path.isfile(path):
            return path
        others = sorted(
            glob.glob(os.path.join(glob.escape(os.path.dirname(stem)), "*_sent_caps.txt"))
        )
        if others:
            raise FileNotFoundError(
                f"{path}: no such file, but there is {others[0]}: the splits must have one kind of "
                "captions"
            )
        return super()._caption_file(stem, vocab)

    def _check_blocks(self, rows: int, regions: int) -> None:
        if self.need_box_whole and self.blocks.shape[1] == regions - 1:
            regions -= 1
        super()._check_blocks(rows, regions)

    def image_item(self, image: int) -> dict[str, Tensor]:
        """As PositionDataset, and 'whole' (F,); a whole image has no blocks and no overlap."""
        item, row = super().image_item(image), int(self.rows[image])
        whole = np.array(self.whole[row])
        if not np.isfinite(whole).all():
            raise InputError(f"{self.whole_path}: row {row} (from 0) holds NaN or Inf")
        if self.need_box_whole:
            regions = len(item["images"]) - 1
            item |= {name: item[name][:regions] for name in ("blocks", "overlap")}
        return item | {"whole": torch.from_numpy(whole)}

    def kept_regions(self, row: int) -> range | list[int]:
        """As PrecompDataset; with `need_box_whole` the whole image is one more."""
        kept = super().kept_regions(row)
        if self.need_box_whole and len(kept) < 2:
            raise InputError(
                f"{self.path}: row {row} (from 0) has one region; with --need_box_whole the last "
                "one is the whole image, and others must stand before it"
            )
        return kept

    def _of_regions(self, array: np.ndarray, row: int) -> np.ndarray:
        """As PrecompDataset; an array of R - 1 regions has none for the whole image."""
        if array.shape[1] == self.images.shape[1]:
            return super()._of_regions(array, row)
        return np.array(array[row, self.kept_regions(row)[:-1]])
