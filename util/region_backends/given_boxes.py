"""Read boxes that another program has found, for --boxes. Shapes: N pictures, R boxes."""

import hashlib
import os

import numpy as np

from util.captions import read_lines
from util.cli import InputError
from util.image_ids import ImageIds, shown
from util.json_file import fault_of

BOXES, COUNTS = ("boxes", "bbox", "bboxes"), ("num_boxes", "num_bbox")
FORM = "file name, left, top, right, bottom, with tabs between them"
NUMBERS = "fiu"  # kinds of dtype


class GivenBoxes:
    """The boxes of some pictures, left, top, right, bottom in pixels of the picture as it is seen.

    They come from one of three: a .tsv with a line per box (FORM); an .npz with `ids` (N,), `boxes`
    (N, R, 4) and, where the numbers differ, `num_boxes` (N,); or a folder of .npz files, one per
    picture, called {file name}.npz or without the picture's ending, with `bbox` or `boxes` (R, 4)
    and, if they are pixels of a picture of another size, `image_w` and `image_h`.
    Raises InputError if a picture has no boxes, or some that are not whole.
    """

    def __init__(self, path: str, names: list[str], most: int | None = None):
        """Read the boxes of the pictures `names`, the first `most` of each (None: all)."""
        self.path, self.images = path, ImageIds(names)
        self.boxes: list[np.ndarray | None] = [None] * len(self.images.names)  # (R, 4) each
        self.sizes: dict[int, tuple[float, float]] = {}
        if not os.path.exists(path):
            raise FileNotFoundError(f"--boxes {path}: no such file or folder")
        if os.path.isdir(path):
            self._read_folder(names)
        elif path.lower().endswith(".npz"):
            self._read_npz()
        else:
            self._read_tsv()
        lacking = [k for k, boxes in enumerate(self.boxes) if boxes is None or not len(boxes)]
        if lacking:
            raise InputError(
                f"--boxes {path}: no boxes for {len(lacking)} of {len(names)} pictures, the first "
                f"{shown(self.images.names[lacking[0]])}"
            )
        self.boxes = [boxes[:most] for boxes in self.boxes]
        digest = hashlib.sha256()
        for k, (name, boxes) in enumerate(zip(self.images.names, self.boxes, strict=True)):
            self._check(name, boxes)
            digest.update(f"{name}\n{len(boxes)}\n{self.sizes.get(k)}\n".encode())
            digest.update(boxes.tobytes())
        self.digest = digest.hexdigest()
        self.most = max(map(len, self.boxes))

    def _check(self, name: str, boxes: np.ndarray) -> None:
        """Raise InputError if boxes (R, 4) are no numbers, or end before they begin."""
        wrong = ~np.isfinite(boxes).all(1) | (boxes[:, 2:] < boxes[:, :2]).any(1)
        if wrong.any():
            k = int(wrong.argmax())
            raise InputError(
                f"--boxes {self.path}: {shown(name)}, box {k} (from 0): {boxes[k].tolist()}; "
                "expected left, top, right, bottom in pixels"
            )

    def _read_tsv(self) -> None:
        found: list[list] = [[] for _ in self.boxes]
        for row, line in enumerate(read_lines(self.path), 1):
            if not line:
                continue
            name, *numbers = line.split("\t")
            try:
                box = [float(x) for x in numbers]
            except ValueError:
                box = []
            if len(box) != 4:
                raise InputError(f"{self.path}: line {row}: expected {FORM}; found {line[:60]!r}")
            image = self.images.find(name)
            if image is not None:
                found[image].append(box)
        self.boxes = [np.array(x, np.float32).reshape(-1, 4) for x in found]

    def _load(self, path: str) -> dict[str, np.ndarray]:
        try:
            with np.load(path, allow_pickle=False) as archive:
                wanted = {"ids", "image_w", "image_h", *BOXES, *COUNTS} & set(archive)
                return {name: np.asarray(archive[name]) for name in wanted}
        except Exception as error:  # a damaged archive can fail anywhere in numpy's reader
            said = fault_of(error)
            raise InputError(f"{path}: not a whole .npz file of arrays ({said})") from None

    def _read_npz(self) -> None:
        arrays = self._load(self.path)
        ids, boxes = arrays.get("ids"), _boxes(self.path, arrays, "(N, R, 4)")
        if ids is None or ids.ndim != 1 or ids.dtype.kind not in "US" + NUMBERS:
            raise InputError(f"{self.path}: expected ids (N,) and boxes (N, R, 4)")
        if len(ids) != len(boxes):
            raise InputError(f"{self.path}: {len(ids)} ids, {len(boxes)} rows of boxes")
        counts = _counts(self.path, arrays, len(boxes), boxes.shape[1])
        for name, row, n in zip(ids.tolist(), boxes, counts, strict=True):
            text = name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
            image = self.images.find(text)
            if image is not None:
                self.boxes[image] = row[:n].astype(np.float32)

    def _read_folder(self, names: list[str]) -> None:
        for image, name in enumerate(self.images.names):
            places = [
                os.path.join(self.path, f"{x}.npz") for x in (name, os.path.splitext(name)[0])
            ]
            path = next(filter(os.path.isfile, places), None)
            if path is None:
                continue
            arrays = self._load(path)
            boxes = _boxes(path, arrays, "(R, 4)")
            (n,) = _counts(path, arrays, 1, len(boxes))
            self.boxes[image] = boxes[:n].astype(np.float32)
            if "image_w" in arrays and "image_h" in arrays:
                self.sizes[image] = (
                    _length(path, arrays, "image_w"),
                    _length(path, arrays, "image_h"),
                )

    def of(self, name: str, size: tuple[int, int]) -> np.ndarray:
        """The boxes (R, 4) of a picture of width and height `size`, in its pixels, cut to it.

        Raises InputError if they are those of a picture of another shape, or lie outside of it.
        """
        image = self.images.find(name)
        boxes = self.boxes[image]
        width, height = self.sizes.get(image, size)
        across, down = size[0] / width, size[1] / height
        if not 0.97 < across / down < 1.03:
            raise InputError(
                f"--boxes {self.path}: the boxes of {shown(name)} are those of a picture of "
                f"{width:g} x {height:g}, but it has {size[0]} x {size[1]} as it is seen"
            )
        boxes = boxes * np.array([across, down] * 2, np.float32)
        outside = (boxes[:, :2] >= size).any(1) | (boxes[:, 2:] <= 0).any(1)
        if outside.any():
            k = int(outside.argmax())
            raise InputError(
                f"--boxes {self.path}: {shown(name)}, box {k} (from 0): {boxes[k].tolist()} lies "
                f"outside of the picture of {size[0]} x {size[1]}"
            )
        return np.clip(boxes, 0, np.array([*size, *size], np.float32))


def _boxes(path: str, arrays: dict[str, np.ndarray], shape: str) -> np.ndarray:
    """The array of boxes of a file, (R, 4) or (N, R, 4) as `shape` says."""
    boxes = next((arrays[x] for x in BOXES if x in arrays), None)
    dims = shape.count(",") + 1
    if boxes is None:
        raise InputError(f"{path}: expected bbox or boxes {shape}")
    if boxes.ndim != dims or boxes.shape[-1] != 4 or boxes.dtype.kind not in NUMBERS:
        raise InputError(
            f"{path}: expected bbox or boxes {shape} of numbers; found {boxes.shape} of "
            f"{boxes.dtype}"
        )
    return boxes


def _counts(path: str, arrays: dict[str, np.ndarray], n: int, r: int) -> list[int]:
    """How many of its r boxes each of n pictures has; all of them if the file does not say."""
    name = next((x for x in COUNTS if x in arrays), None)
    if name is None:
        return [r] * n
    counts = arrays[name].reshape(-1)
    if counts.dtype.kind not in NUMBERS or len(counts) != n:
        raise InputError(
            f"{path}: {name}: expected a number for each of {n} pictures; found "
            f"{arrays[name].shape} of {counts.dtype}"
        )
    wrong = ~((counts >= 0) & (counts <= r) & (counts == np.floor(counts)))  # NaN is wrong, too
    if wrong.any():
        k = int(wrong.argmax())
        raise InputError(
            f"{path}: {name}: {counts[k]} of picture {k} (from 0); there are {r} boxes"
        )
    return [int(count) for count in counts]


def _length(path: str, arrays: dict[str, np.ndarray], name: str) -> float:
    """The width or the height of the picture that the boxes of a file are of."""
    found = arrays[name]
    if found.size != 1 or found.dtype.kind not in NUMBERS or not 1 <= found.item() < np.inf:
        raise InputError(
            f"{path}: {name} is {shown(str(found.tolist()))}; expected a number of pixels, at "
            "least 1"
        )
    return float(found.item())
