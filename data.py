"""Precomputed region features and captions, read lazily; batches; loaders.

`DATA_PATH/DATA_NAME/` holds per split `{split}_ims.npy` (rows, R, F), `{split}_caps.txt` and,
optionally, `{split}_ids.txt`; for GSMN boxes and dependencies too (see GraphDataset), for PFAN the
blocks of the regions (see PositionDataset). Letters: B batch, R regions, F numbers a region, W
words, K blocks a region.
"""

import argparse
import glob
import json
import os
import reprlib  # what repr() says of a hostile file may have no end
import signal
import threading
from array import array as flat_array
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from util.arrays import open_array, read_sizes
from util.cli import InputError, progress
from vocab import Vocabulary, read_captions

DEV_CAPTIONS = 5000  # the published programs validate on the first 5,000 captions


def repeats(array: np.ndarray, captions_per_row: int) -> int:
    """How many times in a row each image is stored: k, or 1 where rows are distinct images.

    COCO's test and testall are stored with one row a caption. The run of equal rows at the start
    gives k; up to 200 further groups spread over the file must repeat too, so that two equal
    photos at the start of a one-caption-an-image set do not mislead.
    """
    if captions_per_row > 1 or len(array) == 1:
        return 1
    equal = 1
    while equal < len(array) and np.array_equal(array[0], array[equal]):
        equal += 1
    # The first photos may be alike, so k can be any divisor of that run.
    for k in range(equal, 1, -1):
        if equal % k or len(array) % k:
            continue
        groups = np.unique(np.linspace(0, len(array) // k - 1, 200).astype(int)) * k
        if all(np.array_equal(array[g], array[g + j]) for g in groups for j in range(1, k)):
            return k
    return 1


class Drop:
    """Size augmentation, as published for CHAN: fewer regions and words in training.

    Each region is dropped with probability `rate`; each word is chosen with probability 0.2, and
    then masked (half of them), replaced by a random one (a tenth) or dropped. <start> and <end> are
    words like others; WordPiece's [CLS] and [SEP] are not, and a word is all its pieces. An image
    keeps a region at least, with `whole` its last one besides, and a caption a token. Random
    numbers follow from seed, epoch and caption, so a resumed run draws the same.
    """

    def __init__(self, rate: float, seed: int, vocab: Vocabulary, whole: bool = False):
        if vocab.mask not in vocab.word2idx:
            raise InputError(
                f"--drop: the vocabulary has no {vocab.mask}, as the checkpoint of --resume was "
                "trained without --drop; train afresh"
            )
        self.rate, self.seed, self.whole = rate, seed, whole
        self.mask, self.size, self.pieces = vocab.word2idx[vocab.mask], len(vocab), vocab.pieces
        self.first = torch.ones(self.size, dtype=torch.bool)  # whether a piece begins a word
        if self.pieces:
            self.first[[i for w, i in vocab.word2idx.items() if w.startswith("##")]] = False

    def __call__(self, item: dict, epoch: int) -> dict:
        """An item with zeros for dropped regions, and 'inside' (R,), which regions are left."""
        rng = np.random.default_rng((self.seed, epoch, item["index"]))
        images, captions = item["images"], item["captions"]
        inside = torch.from_numpy(rng.random(len(images)) >= self.rate)  # (R,)
        regions = inside[: len(inside) - self.whole]  # a view: without the whole image
        regions[rng.integers(len(regions))] |= not regions.any()
        inside[len(regions) :] = True
        chance = torch.from_numpy(rng.random(len(captions)) / 0.2)  # (W,), chosen below 1
        chance = chance[self.first[captions].cumsum(0) - 1]  # (W,), one a word
        if self.pieces:
            chance[[0, -1]] = 1
        other = torch.from_numpy(rng.integers(self.size, size=len(captions)))  # (W,)
        words = captions.where(chance >= 0.5, self.mask)  # (W,)
        words = words.where((chance < 0.5) | (chance >= 0.6), other)  # (W,)
        stay = (chance < 0.6) | (chance >= 1)  # (W,)
        if not stay.any():
            words, stay = captions, torch.ones_like(stay)  # (W,)
        images = images.masked_fill(~inside[:, None], 0)  # (R, F)
        item = item | {"images": images, "captions": words[stay], "inside": inside}
        if "adjacency" in item:
            item["adjacency"] = item["adjacency"][stay][:, stay]  # (W', W')
        return item


class PrecompDataset(Dataset):
    """One split of precomputed features with its captions; an item is one caption and its image.

    `data_path` is the folder of the split's files, `data_split` one of train, dev, test, testall.
    Attributes: `n_images` distinct images, `n_captions`, `k` captions an image, `ids` or None;
    `drop`, what an item goes through in training, with the `epoch` that the loop sets. Raises
    InputError or FileNotFoundError naming file and row where the files do not fit.
    """

    drop: Drop | None = None
    epoch = 0

    def __init__(self, data_path: str, data_split: str, vocab: Vocabulary, img_dim: int):
        stem = os.path.join(data_path, data_split)
        self.path = f"{stem}_ims.npy"
        text = self._caption_file(stem, vocab)
        captions = read_captions(text)
        self.images = open_array(self.path, ndim=3)  # (rows, R, F)
        rows, _, found = self.images.shape
        if found != img_dim:
            raise InputError(
                f"{self.path}: regions have {found} numbers, the model expects {img_dim}; "
                f"give --img_dim {found}, or the features that the checkpoint was trained on"
            )
        self.candidates = self._candidates(data_split, rows, len(captions))
        if self.candidates > 1:
            print(
                f"notice: {text}: {len(captions)} captions for {rows} images, so {self.candidates} "
                "candidate images a caption"
            )
        elif rows == 0 or len(captions) % rows:
            raise InputError(
                f"{text}: {len(captions)} captions for the {rows} rows of {self.path}; "
                "expected a multiple (usually 5 captions an image, image by image)"
            )
        # Rows an image takes, and captions an image.
        self.stride = repeats(self.images, len(captions) // rows) if self.candidates == 1 else 1
        self.k = len(captions) * self.candidates // (rows // self.stride)
        if data_split == "dev":
            captions = captions[: max(DEV_CAPTIONS // self.k, 1) * self.k]
        self.n_captions = len(captions)
        self.n_images = self.n_captions * self.candidates // self.k
        self.ids = self._read_ids(f"{stem}_ids.txt", rows)

        # One flat array: forked loader workers share it, where a list of objects would be copied.
        words, lengths = flat_array("i"), []
        for ids in self._word_ids(progress(captions, f"tokenising {data_split}"), text, vocab):
            words.extend(ids)
            lengths.append(len(ids))
        self.lengths = torch.tensor(lengths)  # (n_captions,)
        self.words = torch.from_numpy(np.array(words, dtype=np.int32))
        self.start = self.lengths.cumsum(0) - self.lengths  # (n_captions,)

        self._warn_of_unknown_words(text, vocab)

    def _candidates(self, data_split: str, rows: int, captions: int) -> int:
        """How many images a caption has: one, or a caption several images in a row."""
        return 1

    def _warn_of_unknown_words(self, path: str, vocab: Vocabulary) -> None:
        words = len(self.words) - 2 * self.n_captions  # without <start> and <end>
        unknown = int((self.words == vocab.word2idx[vocab.unknown]).sum())
        if unknown > 0.3 * words:
            print(
                f"warning: {path}: {unknown} of its {words} words are not in the vocabulary; is it "
                "that of other captions?"
            )

    def _caption_file(self, stem: str, vocab: Vocabulary) -> str:
        return f"{stem}_caps.txt"

    def _word_ids(
        self, captions: Iterable[str], path: str, vocab: Vocabulary
    ) -> Iterator[list[int]]:
        """Word ids of each line of a caption file."""
        empty = []
        for row, caption in enumerate(captions, 1):
            if not caption.strip():
                empty.append(row)
            yield vocab.encode(caption)
        if empty:
            print(
                f"warning: {path}: {len(empty)} empty captions (first at line {empty[0]}), kept "
                "without a word"
            )

    def _read_ids(self, path: str, rows: int) -> list[str] | None:
        if not os.path.isfile(path):
            return None
        ids = read_captions(path)
        if len(ids) == rows:
            ids = ids[:: self.stride]
        elif len(ids) == rows // self.stride * self.k and self.candidates == 1:
            ids = ids[:: self.k]
        elif len(ids) != rows // self.stride:
            raise InputError(f"{path}: {len(ids)} ids for {rows // self.stride} images")
        return ids[: self.n_images]

    def image_item(self, image: int) -> dict[str, Tensor]:
        """What the encoder of images reads of the distinct image `image`: {'images': (R, F)}."""
        row = image * self.stride
        regions = np.array(self.images[row])  # a copy: the map stays read-only
        if not np.isfinite(regions).all():
            region = int(np.argmin(np.isfinite(regions).all(1)))
            raise InputError(
                f"{self.path}: row {row} (from 0), region {region} holds NaN or Inf; "
                "extract that image again"
            )
        return {"images": torch.from_numpy(regions)}

    def caption_item(self, caption: int) -> dict[str, Tensor]:
        """What the encoder of captions reads of one caption: {'captions': (W,)} word ids."""
        start = self.start[caption]
        return {"captions": self.words[start : start + self.lengths[caption]].long()}

    def __len__(self) -> int:
        return self.n_captions

    def __getitem__(self, caption: int) -> dict:
        image = caption * self.candidates // self.k
        where = {"index": caption, "image_index": image}
        item = self.image_item(image) | self.caption_item(caption) | where
        return item if self.drop is None else self.drop(item, self.epoch)


class PositionDataset(PrecompDataset):
    """PFAN's split: regions come with the blocks of the image that they overlap.

    `{split}_boxes.npy` (rows, R, 2 K): K block ids, then K weights, as util/positions.py writes
    them; one more column, the area, is not read. The file says how many, `n_blocks`. `split_size`
    squared is the id of no block.
    """

    def __init__(
        self,
        data_path: str,
        data_split: str,
        vocab: Vocabulary,
        img_dim: int,
        split_size: int = 16,
    ):
        super().__init__(data_path, data_split, vocab, img_dim)
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
        if found[:2] != (rows, regions) or self.n_blocks < 1:
            raise InputError(
                f"{self.block_path}: an array of shape {found}, but {self.path} holds {rows} "
                f"images of {regions} regions; expected ({rows}, {regions}, 2 K), K block ids and "
                "K weights"
            )

    def image_item(self, image: int) -> dict[str, Tensor]:
        """{'images': (R, F), 'blocks': (R, K) ids, 'overlap': (R, K) weights}."""
        row = image * self.stride
        k = self.n_blocks
        table = torch.from_numpy(np.array(self.blocks[row, :, : 2 * k], np.float32))  # (R, 2 K)
        ids, overlap = table.split(k, 1)
        blocks = ids.long()  # (R, K)
        wrong = (blocks != ids) | (blocks < 0) | (blocks > self.none) | ~(overlap >= 0)
        wrong |= overlap > 1.001  # parts of the overlap, as float16 may hold them
        # No block may be there twice: what another grid calls none would be.
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

    `{split}_who_ims.npy` (rows, F); captions from `{split}_sent_caps.txt` where there is one. With
    `need_box_whole` the last region of `{split}_ims.npy` is the whole image, of which
    `{split}_boxes.npy` may have a row or not. A split to test on (test...) may hold, image by
    image, `candidates` images a caption instead of k captions an image.
    """

    def __init__(self, *position_dataset, need_box_whole: bool = False):
        self.need_box_whole = need_box_whole
        super().__init__(*position_dataset)
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
        """As PositionDataset, and 'whole' (F,); blocks and overlap of a whole image left out."""
        item = super().image_item(image)
        whole = np.array(self.whole[image * self.stride])
        if not np.isfinite(whole).all():
            raise InputError(
                f"{self.whole_path}: row {image * self.stride} (from 0) holds NaN or Inf"
            )
        if self.need_box_whole:
            regions = len(item["images"]) - 1
            item |= {name: item[name][:regions] for name in ("blocks", "overlap")}
        return item | {"whole": torch.from_numpy(whole)}


class GraphDataset(PrecompDataset):
    """GSMN's split: images come with their boxes, captions with their dependency graphs.

    Boxes `{split}_ims_bbx.npy` (rows, R, 4) in pixels (left, top, right, bottom), and the images'
    sizes `{split}_ims_size.npy`, a structured array or a pickled array of dicts with image_w and
    image_h. Word ids from `{split}_precaps_stan.txt` where there is one, else from the captions.
    With `dependencies`, `{split}_caps.json`: a list of [governor, dependent] a caption, positions
    in its word ids, the first pair the root. util/dependency_parser.py writes the last two.

    With `published_boxes`, the batch size of a published evaluation, image n comes with the boxes
    that it got there: those of the image of caption n, divided by its size again at each access;
    with `published_folds`, as in the published five-fold evaluation, its own.
    """

    def __init__(
        self,
        data_path: str,
        data_split: str,
        vocab: Vocabulary,
        img_dim: int,
        dependencies: bool = False,
        published_boxes: int | None = None,
        published_folds: bool = False,
    ):
        super().__init__(data_path, data_split, vocab, img_dim)
        stem = os.path.join(data_path, data_split)
        text = super()._caption_file(stem, vocab)
        if self.precomputed and os.path.isfile(text):  # published data may lack the captions
            self._compare_ids(self._caption_file(stem, vocab), text, vocab)
        rows, regions, _ = self.images.shape
        self.box_path = f"{stem}_ims_bbx.npy"
        if not os.path.isfile(self.box_path):
            raise FileNotFoundError(
                f"{self.box_path}: no boxes, which GSMN needs: (N, R, 4), left, top, right, bottom "
                "in pixels (util/convert_data.py writes them)"
            )
        self.boxes = open_array(self.box_path, ndim=3)  # (rows, R, 4)
        if self.boxes.shape != (rows, regions, 4):
            raise InputError(
                f"{self.box_path}: boxes of shape {self.boxes.shape}, but {self.path} holds {rows} "
                f"images of {regions} regions; expected ({rows}, {regions}, 4)"
            )
        self.sizes = read_sizes(f"{stem}_ims_size.npy", rows)  # (rows, 2)
        self._check_boxes()
        self.published_boxes, self.published_folds = published_boxes, published_folds
        self.pairs = None
        if dependencies:
            self._read_dependencies(f"{stem}_caps.json")

    def _check_boxes(self) -> None:
        """Look at all boxes now: a run should not find a NaN in those of dev after an epoch."""
        boxes = np.asarray(self.boxes, np.float32)  # (rows, R, 4)
        finite = np.isfinite(boxes).all((1, 2))
        if not finite.all():
            row = int(np.argmin(finite))
            raise InputError(f"{self.box_path}: row {row} (from 0) holds NaN or Inf")
        said = f"warning: {self.box_path}: expected left, top, right, bottom in pixels, but"
        if boxes.max() <= 1 < self.sizes.max():
            print(f"{said} no number is above 1: are they parts of the image already?")
        turned = (boxes[..., 2:] < boxes[..., :2]).any(2).mean()
        if turned > 0.01:
            print(
                f"{said} {turned:.0%} of the boxes end before they begin: are they left, top, "
                "width, height?"
            )

    def _caption_file(self, stem: str, vocab: Vocabulary) -> str:
        path = f"{stem}_precaps_stan.txt"
        self.precomputed = os.path.isfile(path) and not vocab.pieces
        return path if self.precomputed else super()._caption_file(stem, vocab)

    def _word_ids(
        self, captions: Iterable[str], path: str, vocab: Vocabulary
    ) -> Iterator[list[int]]:
        if not self.precomputed:
            yield from super()._word_ids(captions, path, vocab)
            return
        for row, line in enumerate(captions, 1):
            try:
                ids = [int(number) for number in line.split(",")]
            except ValueError:
                raise InputError(
                    f"{path}: line {row} is {line[:40]!r}, expected word ids such as 1,5,17,2; "
                    "make the file again with util/dependency_parser.py"
                ) from None
            if min(ids) < 0 or max(ids) >= len(vocab):
                raise InputError(
                    f"{path}: line {row} has word ids from {min(ids)} to {max(ids)}, expected from "
                    f"0 to {len(vocab) - 1} as in the vocabulary; give --vocab_path that of the ids"
                )
            yield ids

    def _compare_ids(self, path: str, text: str, vocab: Vocabulary) -> None:
        """Refuse precomputed word ids that are not those of the captions in this vocabulary."""
        captions = read_captions(text)
        expected = len(self.images) // self.stride * self.k
        if len(captions) != expected:
            raise InputError(
                f"{path}: word ids of {expected} captions, but {text} holds {len(captions)}; make "
                "the first again with util/dependency_parser.py --overwrite"
            )
        words = same = 0
        for row in np.unique(np.linspace(0, self.n_captions - 1, 1000).astype(int)).tolist():
            ids = self.words[self.start[row] : self.start[row] + self.lengths[row]].tolist()
            again = vocab.encode(captions[row])
            if len(again) == len(ids):  # else it was split into words in another way
                words += len(ids) - 2
                same += sum(a == b for a, b in zip(ids[1:-1], again[1:-1], strict=True))
        said = f"{path}: {same} of {words} word ids are those of {text} in this vocabulary"
        if same < 0.5 * words:
            raise InputError(
                f"{said}: they were made with another vocabulary; give --vocab_path that one, or "
                "make them again with util/dependency_parser.py --overwrite"
            )
        if same < words:
            print(f"warning: {said}: were they made with another vocabulary, or captions?")

    def _read_dependencies(self, path: str) -> None:
        """Fill self.pairs (all, 2), those of caption n from self.pair_start[n] to [n + 1]."""
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"{path}: no dependencies, which --is_sparse needs; make them with `python "
                "util/dependency_parser.py --data_path DATA_PATH --data_name DATA_NAME`"
            )
        try:
            with open(path, encoding="utf-8") as file:
                lists = json.load(file)
        except ValueError as error:
            raise InputError(f"{path}: not a JSON file ({error}); make it again") from None
        found = len(lists) if isinstance(lists, list) else "no list of"
        whole = len(self.images) // self.stride * self.k  # dev may be cut
        if found not in (whole, self.n_captions):
            raise InputError(f"{path}: {found} captions, expected {whole}, as in its caption file")
        flat, ends, past = flat_array("i"), [0], []
        for row, (pairs, length) in enumerate(zip(lists, self.lengths.tolist(), strict=False), 1):
            if not isinstance(pairs, list) or not all(
                isinstance(pair, list)
                and len(pair) == 2
                and all(type(x) is int and 0 <= x < 2**31 for x in pair)
                for pair in pairs
            ):
                raise InputError(
                    f"{path}: caption {row}: expected a list of [governor, dependent], positions "
                    f"from 0 on, found {reprlib.repr(pairs)}"
                )
            if not self.precomputed and len(pairs) != max(length - 2, 1):
                raise InputError(
                    f"{path}: caption {row}: {len(pairs)} dependencies for its {length - 2} words; "
                    "they were split in another way: make word ids and dependencies with "
                    "util/dependency_parser.py"
                )
            for pair in pairs[1:]:  # the first is the root
                if max(pair) < length:
                    flat.extend(pair)
                else:
                    past.append((row, pair, length))
            ends.append(len(flat) // 2)
        if past:
            row, pair, length = past[0]
            first = f"{path}: caption {row}: dependency {pair} is past its {length} words"
            if not self.precomputed:
                raise InputError(
                    f"{first}; the words were split in another way: make both files again with "
                    "util/dependency_parser.py"
                )
            if len(past) > 0.1 * (len(past) + ends[-1]):
                raise InputError(
                    f"{first}, and so are {len(past)} of {len(past) + ends[-1]}: they are those of "
                    "other captions; make them again with util/dependency_parser.py --overwrite"
                )
            print(f"warning: {first}; {len(past)} such pairs are left out, as published")
        self.pairs = torch.from_numpy(np.array(flat, dtype=np.int32)).view(-1, 2)
        self.pair_start = torch.tensor(ends)

    def image_item(self, image: int) -> dict[str, Tensor]:
        """{'images': (R, F), 'boxes': (R, 4)}: the boxes in parts of the image's size."""
        row, times = image * self.stride, 1
        if self.published_boxes:
            # Two passes over the loader divide in place, and a batch sees what its last item left.
            k = self.k // self.stride  # captions a row
            caption = image * self.k if self.published_folds else image
            row, batch = caption // k, caption // self.published_boxes
            times = k + min(k * (row + 1), (batch + 1) * self.published_boxes) - k * row
        boxes = self.boxes[row].astype(np.float32)  # (R, 4)
        for _ in range(times):
            boxes /= np.tile(self.sizes[row], 2)
        return super().image_item(image) | {"boxes": torch.from_numpy(boxes)}

    def caption_item(self, caption: int) -> dict[str, Tensor]:
        """{'captions': (W,)} and, with dependencies, 'adjacency' (W, W), identity included."""
        item = super().caption_item(caption)
        if self.pairs is None:
            return item
        start, end = self.pair_start[caption : caption + 2]
        pairs = self.pairs[start:end].long()  # (pairs, 2)
        return item | {"adjacency": adjacency(len(item["captions"]), pairs)}


def adjacency(words: int, pairs: Tensor) -> Tensor:
    """(W, W): 1 for each dependency (governor, dependent) of pairs (P, 2), both ways, plus the
    identity."""
    a = torch.zeros(words, words)  # (W, W)
    governor, dependent = pairs.unbind(1)
    a[governor, dependent] = a[dependent, governor] = 1
    return a + torch.eye(words)


def open_split(
    folder: str,
    split: str,
    vocab: Vocabulary,
    opt: argparse.Namespace,
    **more,
) -> PrecompDataset:
    """The dataset that the system of the options reads; `more` as its class has it."""
    kind, own = PrecompDataset, ()
    if opt.model == "gsmn":
        kind, own = GraphDataset, (opt.is_sparse,)
    elif opt.model in ("pfan", "pfan_whole"):
        kind, own = PositionDataset, (opt.split_size,)
    if opt.model == "pfan_whole":
        kind, more = WholeDataset, more | {"need_box_whole": opt.need_box_whole}
    dataset = kind(folder, split, vocab, opt.img_dim, *own, **more)
    if opt.text_enc_type == "bert":
        longest, room = int(dataset.lengths.max()), opt.bert_config["max_position_embeddings"]
        if longest > room:
            line = int(dataset.lengths.argmax()) + 1
            raise InputError(
                f"{folder}: caption {line} of {split} has {longest} pieces, this BERT reads {room} "
                "at most; shorten it"
            )
    return dataset


def collate_fn(items: list[dict]) -> dict[str, Tensor]:
    """Items to a batch: images (B, R, F), captions (B, W) padded with 0, lengths, indices (B,).

    A caption's 'adjacency' (W, W) is padded with 0 too.
    """
    batch = {}
    for name in items[0]:
        values = [item[name] for item in items]
        if name == "captions":
            batch["lengths"] = torch.tensor([len(v) for v in values])  # (B,)
            batch[name] = pad_sequence(values, batch_first=True)  # (B, W)
        elif name == "adjacency":
            longest = max(map(len, values))
            batch[name] = torch.stack(
                [F.pad(x, (0, longest - len(x), 0, longest - len(x))) for x in values]
            )  # (B, W, W)
        elif isinstance(values[0], Tensor):
            batch[name] = default_collate(values)  # in a worker, straight into shared memory
        else:
            batch[name] = torch.tensor(values)
    return batch


class EpochSampler(Sampler[list[int]]):
    """Batches of a seeded shuffle that depends on (seed, epoch) only, from batch `first` on.

    Order that follows from the epoch is what makes a resumed run equal an unbroken one. Of several
    processes each takes its share of every batch.
    """

    def __init__(self, n: int, batch_size: int, seed: int, rank: int = 0, world: int = 1):
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.rank, self.world = rank, world
        self.epoch = self.first = 0

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        order = torch.randperm(self.n, generator=generator)
        for batch in order.split(self.batch_size)[self.first :]:
            yield (batch[self.rank :: self.world] if self.shared(len(batch)) else batch).tolist()

    def shared(self, size: int) -> bool:
        """Whether a batch is split; one with less than a pair a process is taken whole by each."""
        return size >= self.world

    def __len__(self) -> int:
        return -(-self.n // self.batch_size) - self.first


def leave_signals_to_the_loop(worker: int) -> None:
    """Let a loader worker end only when its training loop says so.

    Ctrl-C and a scheduler's SIGTERM reach workers too, and a worker that dies of one tears the
    loop's step. SIGTERM is how the loop's own process ends a worker, so it counts from there only.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS cannot tell who sent a signal
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def get_train_loader(
    dataset: Dataset,
    batch_size: int,
    workers: int,
    seed: int,
    pin_memory: bool = False,
    rank: int = 0,
    world: int = 1,
) -> DataLoader:
    """Shuffled batches; set `loader.batch_sampler.epoch` (and `.first`) before each epoch.

    Process `rank` of `world` gets its share of each batch.
    """
    cores = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return DataLoader(
        dataset,
        batch_sampler=EpochSampler(len(dataset), batch_size, seed, rank, world),
        collate_fn=collate_fn,
        # More processes than cores only slow each other down; the published default is 10.
        num_workers=min(workers, cores),
        pin_memory=pin_memory,
        worker_init_fn=leave_signals_to_the_loop,
        # Of its own: seeding the workers must not draw from the state that a resume restores.
        generator=torch.Generator().manual_seed(seed % 2**63),
    )
