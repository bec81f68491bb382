"""What a score computes on its way to one number, for those who want to look at it.

A score calls `keep` on its weights and on the number of each word or region. Nothing happens then,
except within `keeping`, which util/visualize.py opens around the scoring of one pair: so a picture
shows what the score itself has read.

The names, and the shapes for one pair of W words and R regions (further dimensions have length 1):

| name          | shape  | content                                                       |
|---------------|--------|---------------------------------------------------------------|
| t2i           | (W, R) | weight of each region for a word; a row sums to 1             |
| i2t           | (W, R) | weight of each word for a region; a column sums to 1          |
| word_scores   | (W,)   | the number of each word, of which the score is made           |
| region_scores | (R,)   | the number of each region, of which the score is made         |
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from torch import Tensor

_kept: ContextVar[dict[str, Tensor] | None] = ContextVar("kept", default=None)


@contextlib.contextmanager
def keeping() -> Iterator[dict[str, Tensor]]:
    """Yields a dict that `keep` fills, until the end of the block."""
    kept: dict[str, Tensor] = {}
    token = _kept.set(kept)
    try:
        yield kept
    finally:
        _kept.reset(token)


def keep(**tensors: Tensor | Callable[[], Tensor]) -> None:
    """Within `keeping`, keep copies of tensors under names of the table above; else do nothing.

    Instead of a tensor it may be a function that computes it, which is called only then.
    """
    kept = _kept.get()
    if kept is not None:
        kept |= {name: (x() if callable(x) else x).clone() for name, x in tensors.items()}
