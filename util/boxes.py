"""Find boxes that are not left, top, right, bottom in pixels, and guess what they are instead."""

from collections import Counter

import numpy as np

TURNED, BEYOND = "end before they begin", "go beyond the picture"


class BoxCheck:
    """Counts the boxes of a stream of images, for one warning at the end.

    Regions whose four numbers are all zero are filling, and are not counted. Boxes may go beyond
    the picture by 2 pixels or 1 % of its side: extractors and float16 round.
    """

    def __init__(self):
        self.count: Counter[str] = Counter()  # boxes by what is true of them
        self.first: dict[str, str] = {}  # the first box that ends before it begins, or goes beyond
        self.rows = 0
        self.largest = 0.0  # number of a box
        self.side = 0.0  # the largest side of a picture, in pixels
        self.reach = 0.0  # how far boxes go, in sides of their picture

    def add(
        self,
        boxes: np.ndarray,
        sizes: np.ndarray,
        regions: np.ndarray | None = None,
        name: str | None = None,
    ) -> None:
        """Look at the boxes (N, R, 4), or (R, 4), of images of some sizes (N, 2), or (2,).

        regions (N,) says how many of the R boxes of an image count; None: all. A row is called by
        its number in the stream, from 0, or by `name`.
        """
        boxes = np.asarray(boxes, np.float64)
        boxes = boxes.reshape(-1, *boxes.shape[-2:])  # (N, R, 4)
        sizes = np.asarray(sizes, np.float64).reshape(-1, 1, 2)  # (N, 1, 2)
        real = boxes.any(2)  # (N, R)
        if regions is not None:
            real &= np.arange(boxes.shape[1]) < np.reshape(regions, (-1, 1))
        start, end = boxes[..., :2], boxes[..., 2:]  # (N, R, 2)
        slack = np.maximum(2, 0.01 * sizes)  # (N, 1, 2)
        kinds = {
            "all": real,
            TURNED: real & (end < start - slack).any(2),
            BEYOND: real & ((start < -slack) | (end > sizes + slack)).any(2),
            "fit as sides": real & ((start >= -slack) & (start + end <= sizes + slack)).all(2),
            "fit exchanged": real
            & ((start >= -slack) & (end <= sizes[..., ::-1] + slack[..., ::-1])).all(2),
        }
        self.count.update({kind: int(found.sum()) for kind, found in kinds.items()})
        for kind in (TURNED, BEYOND):
            if kind not in self.first and kinds[kind].any():
                row, region = np.argwhere(kinds[kind])[0]
                self.first[kind] = (
                    f"{name or f'row {self.rows + row} (from 0)'}, region {region}: "
                    f"{[float(f'{x:.6g}') for x in boxes[row, region]]} in a picture of "
                    f"{sizes[row, 0, 0]:g} x {sizes[row, 0, 1]:g}"
                )
        self.rows += len(boxes)
        self.largest = max(self.largest, np.abs(boxes[real]).max(initial=0))
        self.side = max(self.side, sizes.max(initial=0))
        self.reach = max(self.reach, (end / sizes)[real].max(initial=0))

    def warn(self, source: str) -> None:
        """Print one line if the boxes look wrong: how many, the first, and the likely cause."""
        if found := self._found():
            print(f"warning: {source}: expected left, top, right, bottom in pixels, but {found}")

    def _found(self) -> str | None:
        """What is wrong with the boxes, and the likely cause."""
        count, boxes = self.count, self.count["all"]
        if not boxes:
            return None
        if self.largest <= 1.05 < self.side:  # 1.05: fractions may be rounded, too
            return (
                f"no number is above {max(1, round(self.largest, 2)):g}: are they fractions of the "
                "image already? Multiply these parts of the picture by its width and height"
            )
        kind = TURNED if count[TURNED] > 0.01 * boxes or not count[BEYOND] else BEYOND
        if not count[kind]:
            return None
        said = f"{count[kind]} of {boxes} boxes ({count[kind] / boxes:.1%}) {kind}, the first at "
        return f"{said}{self.first[kind]}: {self._cause(kind)}"

    def _cause(self, kind: str) -> str:
        """The likely cause, a question and what to do."""
        boxes = self.count["all"]
        if kind == TURNED:
            if self.count["fit as sides"] >= 0.99 * boxes:
                return (
                    "are they left, top, width, height? Make x, y, x + width, y + height of "
                    "x, y, width, height"
                )
            return "are their numbers in another order, or those of a centre, width and height?"
        if boxes - self.count["fit exchanged"] < 0.1 * self.count[BEYOND]:
            return (
                "are height and width exchanged (image_h before image_w, LXMERT's order), or are "
                "the boxes top, left, bottom, right?"
            )
        if self.count[BEYOND] < 0.05 * boxes:
            return "did the extractor not cut them at the border, or are some sizes wrong?"
        return (
            f"they reach {self.reach:.3g} times as far as the picture: are sizes and boxes of "
            "another scale, such as that of a resized picture?"
        )
