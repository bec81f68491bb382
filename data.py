"""Precomputed region features and captions, read lazily; batches; loaders.

`DATA_PATH/DATA_NAME/` holds per split `{split}_ims.npy` (rows, R, F), `{split}_caps.txt` (a split
that is only searched needs none) and, optionally, `{split}_ids.txt` (caption_images.py reads which
image a caption is of) and `{split}_num_boxes.npy` (rows,), how many of the R regions of a row are
there; the others are filling. gsmn_data.py and pfan_data.py read what these papers need besides.

Everything travels as tensors by name. A dataset gives items, `collate_fn` makes a batch of them,
and the encoders make two encodings of the batch. These are all the names:

| key             | in       | shape        | content                                          |
|-----------------|----------|--------------|--------------------------------------------------|
| images          | batch    | (B, R, F)    | region features, float16 or float32              |
| captions        | batch    | (B, W)       | word ids, padded with 0                          |
| lengths         | both     | (B,)         | words of each caption; they stay on the host     |
| index           | batch    | (B,)         | which caption it is                              |
| image_index     | batch    | (B,)         | which image the pair shows                       |
| region_mask     | both     | (B, R)       | True: the region is scored; only if some are not |
| filling         | batch    | (B, R)       | True: no region, only padding; only if some are  |
| widest          | batch    | (B,)         | --drop: the most regions that an image has left  |
| boxes           | batch    | (B, R, 4)    | GSMN: corners in parts of the image's size        |
| adjacency       | both     | (B, W, W)    | GSMN, sparse: dependency pairs and the identity  |
| blocks, overlap | batch    | (B, R, K)    | PFAN: block ids, and their parts of the overlap  |
| whole           | both     | (B, F or D)  | PFAN, whole images: vector of the whole image    |
| regions         | encoding | (B, R, D)    | encoded regions                                  |
| words           | encoding | (B, W, D)    | encoded words, zeros beyond each length          |
| sentence        | encoding | (B, D)       | VSE: the caption; PFAN whole: the GRU's end      |
| image           | encoding | (B, D)       | VSE: the image as one vector                     |
| edges           | encoding | (B, R, K)    | GSMN: edges of the visual graph                  |

A batch holds images and captions of B pairs. In evaluation images and captions are encoded apart,
I images and C captions. A new paper may add names of its own. Further letters: R regions, F
numbers per region, W words, D joint dimension, K blocks per region (PFAN), K kernels (GSMN).
"""

import functools
import os
from array import array as flat_array
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from batches import Batch, EpochSampler, collate_fn, get_train_loader, pad_to  # noqa: F401
from caption_images import CaptionImages, caption_images
from util.arrays import open_array
from util.cli import InputError, progress
from util.folders import SPLITS
from util.long_captions import encode_lines
from vocab import Vocabulary, read_captions

DEV_CAPTIONS = 5000  # the published programs validate on the first 5,000 captions (Q2)


class Drop:
    """Size augmentation, as published for CHAN: fewer regions and words in training.

    Each region is dropped with probability `rate`. Each word is chosen with probability 0.2; of the
    chosen words half are masked, a tenth are replaced by a random word, and the rest are dropped.
    <start> and <end> are words like the others; WordPiece's [CLS] and [SEP] are not, and the pieces
    of a word share its fate. An image keeps at least one region, and with `keep_last` its last one
    too; a caption keeps at least one word. The random numbers follow from seed, epoch and caption,
    so a resumed run draws the same (Q12).
    """

    def __init__(self, rate: float, seed: int, vocab: Vocabulary, keep_last: bool = False):
        if vocab.mask not in vocab.word2idx:
            raise InputError(
                f"--drop: the vocabulary has no {vocab.mask}, as the checkpoint of --resume was "
                "trained without --drop; train afresh"
            )
        self.rate, self.seed, self.keep_last = rate, seed, keep_last
        self.mask, self.size, self.pieces = vocab.word2idx[vocab.mask], len(vocab), vocab.pieces
        self.first = torch.ones(self.size, dtype=torch.bool)  # whether a piece begins a word
        if self.pieces:
            self.first[[i for w, i in vocab.word2idx.items() if w.startswith("##")]] = False

    def __call__(self, item: dict, epoch: int) -> dict:
        """An item with zeros for dropped regions, and 'region_mask' (R,): the regions left."""
        rng = np.random.default_rng((self.seed, epoch, item["index"]))
        images, captions = item["images"], item["captions"]
        mask = torch.from_numpy(rng.random(len(images)) >= self.rate)  # (R,)
        regions = mask[: len(mask) - self.keep_last]  # a view
        regions[rng.integers(len(regions))] |= not regions.any()
        mask[len(regions) :] = True
        chance = torch.from_numpy(rng.random(len(captions)) / 0.2)  # (W,), chosen below 1
        chance = chance[self.first[captions].cumsum(0) - 1]  # (W,), one number per word
        if self.pieces:
            chance[[0, -1]] = 1
        other = torch.from_numpy(rng.integers(self.size, size=len(captions)))  # (W,)
        words = captions.where(chance >= 0.5, self.mask)  # (W,)
        words = words.where((chance < 0.5) | (chance >= 0.6), other)  # (W,)
        stay = (chance < 0.6) | (chance >= 1)  # (W,)
        if not stay.any():
            words, stay = captions, torch.ones_like(stay)  # (W,)
        images = images.masked_fill(~mask[:, None], 0)  # (R, F)
        item = item | {"images": images, "captions": words[stay], "region_mask": mask}
        if "adjacency" in item:
            item["adjacency"] = item["adjacency"][stay][:, stay]  # (W', W')
        return item


class PrecompDataset(Dataset):
    """One split of precomputed features with its captions; an item is one caption and its image.

    `data_path` is the folder of the split's files, `data_split` one of train, dev, test, testall.
    Trailing regions that are all zero are filling, unless `{split}_num_boxes.npy` says how many
    regions there are; with `keep_empty_regions` all count, as in the published programs.

    Attributes: `n_images` distinct images, `n_captions`, `image_of` (n_captions,) the image of each
    caption, `rows` (n_images,) where an image is stored, `ids` or None, `text_path`, the file of
    the sentences, or None. With `images_only` images without a caption count too, and the caption
    file may be missing: then `n_captions` is 0. The training loop sets `drop`, which changes each
    item, and the `epoch`. Raises InputError or FileNotFoundError naming file and row if the files
    do not fit.
    """

    drop: Drop | None = None
    epoch = 0
    last_region_is_image = False  # the last region stands for the whole image: it is never dropped

    def __init__(
        self,
        data_path: str,
        data_split: str,
        vocab: Vocabulary,
        img_dim: int | None = None,
        keep_empty_regions: bool = False,
        images_only: bool = False,
    ):
        stem = os.path.join(data_path, data_split)
        self.path, self.keep_empty_regions = f"{stem}_ims.npy", keep_empty_regions
        text = self._caption_file(stem, vocab)
        bare = images_only and not os.path.isfile(text)
        check_files(data_path, *([] if bare else [text]), self.path)
        captions = [] if bare else read_captions(text)
        self.images = open_array(self.path, ndim=3)  # (rows, R, F)
        rows, regions, found = self.images.shape
        if not self.images.size:
            raise InputError(f"{self.path}: an array of shape {self.images.shape}, which is empty")
        if img_dim not in (None, found):
            raise InputError(
                f"{self.path}: regions have {found} numbers, the model expects {img_dim}; "
                f"give --img_dim {found} in training, or features like those that the checkpoint "
                "was trained on (docs/own_images.md)"
            )
        # Options of the model that the files decide.
        self.options_of_data: dict = {"img_dim": found}
        self.num_boxes = None if keep_empty_regions else read_counts(stem, rows, regions)
        self._say_what_is_filling()
        self.file_captions = len(captions)  # before dev is cut
        n_captions = None if bare else len(captions)
        pairs = self._caption_images(stem, data_split, text, n_captions, images_only)
        if data_split == "dev":
            pairs = pairs.first(DEV_CAPTIONS)  # Q2
            captions = captions[: len(pairs.image_of)]
        self.rows, self.image_of, self.ids = pairs
        self.n_captions, self.n_images = len(self.image_of), len(self.rows)

        # One flat array: forked loader workers share it; they would copy a list of objects.
        words, lengths = flat_array("i"), []
        for ids in self._word_ids(progress(captions, f"tokenising {data_split}"), text, vocab):
            words.extend(ids)
            lengths.append(len(ids))
        self.lengths = torch.tensor(lengths, dtype=torch.long)  # (n_captions,)
        self.words = torch.from_numpy(np.array(words, dtype=np.int32))
        self.start = self.lengths.cumsum(0) - self.lengths  # (n_captions,)
        self.caption_path, self.text_path = text, None if bare else text
        # Without <start> and <end>.
        self.n_words = len(self.words) - 2 * self.n_captions
        self.n_unknown = int((self.words == vocab.word2idx[vocab.unknown]).sum())
        self._warn_of_unknown_words()

    def _caption_images(
        self, stem: str, data_split: str, text: str, n_captions: int | None, every_image: bool
    ) -> CaptionImages:
        """The images of the captions, or `every_image`; of `n_captions` None all rows."""
        rows, self.candidates = len(self.images), 1
        if n_captions is None:
            none = torch.zeros(0, dtype=torch.long)
            return CaptionImages(torch.arange(rows), none, None).with_ids(stem, rows)
        if not os.path.isfile(f"{stem}_caption_image.txt"):
            self.candidates = self._candidates(data_split, rows, n_captions)
        if self.candidates == 1:
            return caption_images(stem, self.images, text, n_captions, every_image)
        print(
            f"notice: {text}: {n_captions} captions for {rows} images, so {self.candidates} "
            "candidate images per caption"
        )
        first = torch.arange(n_captions) * self.candidates
        return CaptionImages(torch.arange(rows), first, None).with_ids(stem, rows)

    def _candidates(self, data_split: str, rows: int, captions: int) -> int:
        """How many candidate images each caption has; they stand in a row. Usually one."""
        return 1

    def _warn_of_unknown_words(self) -> None:
        if self.n_unknown > 0.3 * self.n_words:
            print(
                f"warning: {self.caption_path}: {self.n_unknown} of its {self.n_words} words are "
                "not in the vocabulary; is it that of other captions?"
            )

    def _caption_file(self, stem: str, vocab: Vocabulary) -> str:
        return f"{stem}_caps.txt"

    def _word_ids(
        self, captions: Iterable[str], path: str, vocab: Vocabulary
    ) -> Iterator[list[int]]:
        """Word ids of each line of a caption file."""
        yield from encode_lines(captions, path, vocab)

    def _say_what_is_filling(self) -> None:
        """Look at the ends of some rows: enough to say that there is filling."""
        if self.keep_empty_regions or self.num_boxes is not None:
            return
        some = np.unique(np.linspace(0, len(self.images) - 1, 1000).astype(int)).tolist()
        kept = {row: len(self.kept_regions(row)) for row in some}
        filled = [row for row in some if kept[row] < self.images.shape[1]]
        if filled:
            print(
                f"notice: {self.path}: {len(filled)} of {len(some)} images that were looked at end "
                "with regions that are all zero: taken for filling, and not scored; "
                "--keep_empty_regions scores them, as published"
            )
        # Of such an image one region is kept; the others need not be read again.
        empty = [row for row in filled if kept[row] == 1 and not self.images[row, 0].any()]
        if empty:
            print(
                f"warning: {self.path}: {len(empty)} of these images, the first in row {empty[0]} "
                "(from 0), hold no region: all is zero; extract them again"
            )

    def kept_regions(self, row: int) -> range | list[int]:
        """Which regions of a row are there: not filling."""
        if self.keep_empty_regions:
            return range(self.images.shape[1])
        if self.num_boxes is not None:
            return range(int(self.num_boxes[row]))
        return without_filling(self.images[row], self.last_region_is_image)

    @property
    def k(self) -> int | None:
        """Captions per image; None if they differ."""
        counts = self.image_of.bincount()
        k = int(counts[0]) * self.candidates
        return k if self.candidates > 1 or (counts == k).all() else None

    @functools.cached_property
    def region_counts(self) -> Tensor:
        """How many regions each image has (n_images,)."""
        return torch.tensor([len(self.kept_regions(row)) for row in self.rows.tolist()])

    def image_item(self, image: int) -> dict[str, Tensor]:
        """The distinct image `image` as the image encoder reads it: {'images': (R, F)}."""
        row = int(self.rows[image])
        regions = self._of_regions(self.images, row)  # (R, F)
        if not np.isfinite(regions).all():
            region = int(np.argmin(np.isfinite(regions).all(1)))
            raise InputError(
                f"{self.path}: row {row} (from 0), region {region} holds NaN or Inf; "
                "extract that image again"
            )
        return {"images": torch.from_numpy(regions)}

    def _of_regions(self, array: np.ndarray, row: int) -> np.ndarray:
        """What an array (rows, R, ...) holds of a row's regions, as a copy."""
        kept = self.kept_regions(row)
        return np.array(array[row, : len(kept)] if isinstance(kept, range) else array[row, kept])

    def caption_item(self, caption: int) -> dict[str, Tensor]:
        """One caption as the text encoder reads it: {'captions': (W,)} word ids."""
        start = self.start[caption]
        return {"captions": self.words[start : start + self.lengths[caption]].long()}

    def __len__(self) -> int:
        return self.n_captions

    def __getitem__(self, caption: int) -> dict:
        image = int(self.image_of[caption])
        where = {"index": caption, "image_index": image}
        item = self.image_item(image) | self.caption_item(caption) | where
        return item if self.drop is None else self.drop(item, self.epoch)


def without_filling(regions: np.ndarray, last_is_image: bool = False) -> range | list[int]:
    """Which of the regions (R, F) are there: all but those at the end that are all zero (Q43).

    If the last region is the whole image, it may stand behind the filling. Of an image that is all
    zero one region is left, so that its scores do not depend on the filling either.
    """
    n = len(regions)
    last = [n - 1] if last_is_image and regions[-1].any() else []
    n -= len(last)
    while n and not regions[n - 1].any():
        n -= 1
    return [*range(n), *last] if last else range(max(n, 1))


def check_files(folder: str, *paths: str) -> None:
    """Raise FileNotFoundError that lists the splits of a folder if a file of a split is missing."""
    for path in paths:
        if os.path.isfile(path):
            continue
        what = "caption file" if path.endswith(".txt") else "file"
        splits = [split for split in SPLITS if os.path.isfile(f"{folder}/{split}_ims.npy")]
        raise FileNotFoundError(
            f"{path}: no such {what}; splits there: {', '.join(splits) or 'none'} (docs/data.md)"
        )


def read_counts(stem: str, rows: int, regions: int) -> np.ndarray | None:
    """The number of regions of each row (rows,), from `{stem}_num_boxes.npy` if it exists."""
    path = f"{stem}_num_boxes.npy"
    if not os.path.isfile(path):
        return None
    counts = np.array(open_array(path, ndim=1, integers=True))  # a copy, not the mapped file
    if counts.shape != (rows,):
        raise InputError(f"{path}: counts of shape {counts.shape}, expected ({rows},), one per row")
    wrong = (counts < 1) | (counts > regions) | (counts != np.floor(counts))
    if wrong.any():
        row = int(wrong.argmax())
        raise InputError(
            f"{path}: row {row} (from 0) has {counts[row]} regions, expected 1 to {regions}: "
            f"{stem}_ims.npy has room for {regions}"
        )
    return counts
