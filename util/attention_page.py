"""Write one pair as a page: pointing at a word shows its regions on the photo, and the reverse.

The page is one HTML file with everything in it, the photo too. attention_page.html beside this file
is its template. The pair comes as explain.py's Explanation. Shapes: W words, R regions.
"""

import base64
import io
from pathlib import Path

import numpy as np

from util.attention_figure import grid
from util.cli import InputError

TEMPLATE = Path(__file__).with_name("attention_page.html")
LONGEST = 1000  # pixels of the photo's longer side in the page


def library():
    """The jinja2 package."""
    try:
        import jinja2
    except ImportError:
        raise InputError("the page needs jinja2: pip install jinja2") from None
    return jinja2


def photo_uri(pixels: np.ndarray) -> str:
    """A photo (H, V, 3), uint8, as the address of an image that holds it."""
    from PIL import Image

    picture, file = Image.fromarray(pixels), io.BytesIO()
    picture.thumbnail((LONGEST, LONGEST))
    picture.save(file, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def rounded(x, digits: int = 4):
    """The numbers of a tensor as lists; None stays None."""
    return None if x is None else np.round(np.asarray(x, np.float64), digits).tolist()


def render(explanation, name: str, boxes=None, size=None, pixels: np.ndarray | None = None) -> str:
    """The page of a pair as HTML text; `name` is that of the image.

    boxes (R, 4), size and pixels (H, V, 3), uint8, are those of attention_figure.draw. Raises
    InputError if jinja2 is not there.
    """
    jinja2, e = library(), explanation
    gridded = boxes is None
    if gridded:
        boxes, size = grid(e.dots.shape[1])
    boxes = np.asarray(boxes, float)
    width, height = boxes[:, 2:].max(0).clip(1).tolist() if size is None else size
    views = [view._asdict() | {"weights": rounded(view.weights)} for view in e.views]
    data = {
        "tokens": e.tokens,
        "views": views,
        "wordScores": rounded(e.word_scores),
        "regionScores": rounded(e.region_scores),
        "textEdges": rounded(e.text_edges),
        "visualEdges": rounded(e.visual_edges),
        "boxes": rounded(np.concatenate((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), 1), 2),
    }
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        e=e,
        data=data,
        name=name,
        width=round(width, 2),
        height=round(height, 2),
        photo=None if pixels is None else photo_uri(pixels),
        gridded=gridded,
        # Under a grid there is no photo: the fields are not its places.
        under=pixels is not None and not gridded,
        small=np.argsort(-(boxes[:, 2:] - boxes[:, :2]).prod(1), kind="stable").tolist(),
    )
