"""GSMN's data: images with boxes, captions with dependency graphs.

Beside the files of data.py, `{split}_ims_bbx.npy` and `{split}_ims_size.npy`, and optionally
`{split}_precaps_stan.txt` and `{split}_caps.json`. Shapes: R regions, F numbers per region, W
words.
"""

import os
import reprlib  # what repr() says of a hostile file may have no end
from array import array as flat_array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import PrecompDataset
from util.arrays import open_array, read_sizes
from util.boxes import BoxCheck
from util.cli import InputError
from util.json_file import parse_json
from util.long_captions import cut
from vocab import Vocabulary, read_captions


def check_boxes_are_there(stem: str) -> None:
    """Raise FileNotFoundError if a split has no boxes."""
    path = f"{stem}_ims_bbx.npy"
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{path}: no boxes, which GSMN needs: (N, R, 4), left, top, right, bottom in pixels "
            "(util/convert_data.py writes them)"
        )


class GraphDataset(PrecompDataset):
    """GSMN's split: images come with their boxes, captions with their dependency graphs.

    `{split}_ims_bbx.npy` (rows, R, 4) holds the boxes in pixels: left, top, right, bottom.
    `{split}_ims_size.npy` holds the sizes of the images: a structured array, or a pickled array of
    dicts, with image_w and image_h. Word ids come from `{split}_precaps_stan.txt` if it exists,
    otherwise from the captions. With `dependencies`, `{split}_caps.json` holds for each caption a
    list of [governor, dependent]: positions in its word ids, the pair of the root first.
    util/dependency_parser.py writes the last two files.

    `published_batch` is the batch size of a published evaluation: then image n comes with the boxes
    that it got there (Q9), those of the image of caption n, divided by its size again at each
    access. With `published_folds`, as in the published five-fold evaluation, they are its own.
    """

    def __init__(
        self,
        data_path: str,
        data_split: str,
        vocab: Vocabulary,
        img_dim: int | None = None,
        dependencies: bool = False,
        published_batch: int | None = None,
        published_folds: bool = False,
        keep_empty_regions: bool = False,
        images_only: bool = False,
    ):
        keep_empty_regions |= published_batch is not None  # as the published programs do
        super().__init__(data_path, data_split, vocab, img_dim, keep_empty_regions, images_only)
        stem = os.path.join(data_path, data_split)
        text = super()._caption_file(stem, vocab)
        self.text_path = text if os.path.isfile(text) else None  # published data may lack it
        if self.precomputed and self.text_path:
            self._compare_ids(self.caption_path, text, vocab)
        rows, regions, _ = self.images.shape
        self.box_path = f"{stem}_ims_bbx.npy"
        check_boxes_are_there(stem)
        self.boxes = open_array(self.box_path, ndim=3, integers=True)  # (rows, R, 4)
        if self.boxes.shape != (rows, regions, 4):
            raise InputError(
                f"{self.box_path}: boxes of shape {self.boxes.shape}, but {self.path} holds {rows} "
                f"images of {regions} regions; expected ({rows}, {regions}, 4)"
            )
        self.sizes = read_sizes(f"{stem}_ims_size.npy", rows)  # (rows, 2)
        self._check_boxes()
        self.published_batch, self.published_folds = published_batch, published_folds
        if published_batch:
            self._check_published()
        self.pairs = None
        if dependencies and not self.n_captions:
            raise InputError(
                f"{text}: no such caption file, and a sparse GSMN reads the dependencies of each "
                "caption; to search images without captions, use another model"
            )
        if dependencies:
            self._read_dependencies(f"{stem}_caps.json")

    def _check_boxes(self) -> None:
        """Look at all boxes now: a run should not find a NaN in those of dev after an epoch."""
        boxes = np.asarray(self.boxes, np.float32)  # (rows, R, 4)
        finite = np.isfinite(boxes).all((1, 2))
        if not finite.all():
            row = int(np.argmin(finite))
            raise InputError(f"{self.box_path}: row {row} (from 0) holds NaN or Inf")
        check, regions = BoxCheck(), self.num_boxes  # (rows,) or None
        for start in range(0, len(boxes), 4096):
            some = slice(start, start + 4096)
            check.add(boxes[some], self.sizes[some], None if regions is None else regions[some])
        check.warn(self.box_path)

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
                    f"{path}: line {row} has word ids from {reprlib.repr(min(ids))} to "
                    f"{reprlib.repr(max(ids))}, expected from 0 to {len(vocab) - 1} as in the "
                    "vocabulary; give --vocab_path that of the ids"
                )
            yield cut(ids, vocab.max_words)

    def _compare_ids(self, path: str, text: str, vocab: Vocabulary) -> None:
        """Refuse precomputed word ids that are not those of the captions in this vocabulary."""
        captions = read_captions(text)
        if len(captions) != self.file_captions:
            raise InputError(
                f"{path}: word ids of {self.file_captions} captions, but {text} holds "
                f"{len(captions)}; make the first again with util/dependency_parser.py --overwrite"
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
        """Fill self.pairs (all, 2); those of caption n are pair_start[n] to pair_start[n + 1]."""
        flat, ends, past = flat_array("i"), [0], []
        lists = self._load_dependencies(path)
        for row, (pairs, length) in enumerate(zip(lists, self.lengths.tolist(), strict=False), 1):
            self._check_pairs(path, row, pairs, length)
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
            print(f"warning: {first}; {len(past)} such pairs are left out, as published")  # Q32
        self.pairs = torch.from_numpy(np.array(flat, dtype=np.int32)).view(-1, 2)
        self.pair_start = torch.tensor(ends)

    def _load_dependencies(self, path: str) -> list:
        """The list of a dependency file, one entry per caption."""
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"{path}: no dependencies, which --is_sparse needs; make them with `python "
                "util/dependency_parser.py --data_path DATA_PATH --data_name DATA_NAME`"
            )
        try:
            lists = parse_json(Path(path).read_bytes())
        except ValueError as error:
            raise InputError(f"{path}: not a JSON file ({error}); make it again") from None
        found = len(lists) if isinstance(lists, list) else "no list of"
        whole = self.file_captions  # dev may be cut
        if found not in (whole, self.n_captions):
            raise InputError(f"{path}: {found} captions, expected {whole}, as in its caption file")
        return lists

    def _check_pairs(self, path: str, row: int, pairs: list, length: int) -> None:
        """Refuse what is not the list of pairs of a caption of that length."""
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

    def image_item(self, image: int) -> dict[str, Tensor]:
        """{'images': (R, F), 'boxes': (R, 4)}: the boxes in parts of the image's size.  # Q8"""
        row, times = int(self.rows[image]), 1
        item = super().image_item(image)
        if self.published_batch:
            # Q9: two passes over the loader divide in place, and a batch sees the values that its
            # last item left.
            k = self.file_captions // len(self.images)  # captions a row
            first = image * (self.n_captions // self.n_images)
            caption = first if self.published_folds else image
            row, batch = caption // k, caption // self.published_batch
            times = k + min(k * (row + 1), (batch + 1) * self.published_batch) - k * row
        boxes = self._of_regions(self.boxes, row).astype(np.float32)  # (R, 4)
        for _ in range(times):
            boxes /= np.tile(self.sizes[row], 2)
        return item | {"boxes": torch.from_numpy(boxes)}

    def _check_published(self) -> None:
        """Refuse other sets than those of the published programs.  # Q9"""
        k = self.n_captions // self.n_images
        in_order = torch.equal(self.image_of, torch.arange(self.n_captions) // k)
        if not in_order or self.file_captions % len(self.images):
            raise InputError(
                f"{self.path}: --published_boxes needs as many captions for each image, image by "
                "image, as the published programs do"
            )

    def caption_item(self, caption: int) -> dict[str, Tensor]:
        """{'captions': (W,)} and, with dependencies, 'adjacency' (W, W), identity included."""
        item = super().caption_item(caption)
        if self.pairs is None:
            return item
        start, end = self.pair_start[caption : caption + 2]
        pairs = self.pairs[start:end].long()  # (pairs, 2)
        return item | {"adjacency": adjacency(len(item["captions"]), pairs)}


def adjacency(words: int, pairs: Tensor) -> Tensor:
    """(W, W): 1 for each pair (governor, dependent) of pairs (P, 2), both ways, plus identity."""
    a = torch.zeros(words, words)  # (W, W)
    governor, dependent = pairs.unbind(1)
    a[governor, dependent] = a[dependent, governor] = 1
    return a + torch.eye(words)
