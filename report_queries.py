"""The images, captions and queries that a report shows: what they are called, photos, scores.

Shapes: N images, M captions.
"""

import base64
import io
from collections.abc import Sequence

import numpy as np

from ranking import Ranking
from report_stats import WAYS, Way, look
from util.json_file import fault_of
from util.photos import find_photos
from util.pictures import FORMATS

SHOWN = 20  # queries of a list
HUBS = 10
LONGEST = 160  # pixels of the longer side of a photo on the page
QUALITY = 70  # of its JPEG


def has_pillow() -> bool:
    try:
        import PIL  # noqa: F401
    except ImportError:
        return False
    return True


class Items:
    """The images and captions of a split, as the page shows them."""

    def __init__(self, ranking: Ranking, folder: str | None):
        self.captions, self.ids = ranking.captions, ranking.ids
        n_images = ranking.scores.shape[0]
        images, captions = ranking.right_pairs
        self.image_of = dict(zip(captions[::-1].tolist(), images[::-1].tolist(), strict=True))
        self.caption_of = dict(zip(images[::-1].tolist(), captions[::-1].tolist(), strict=True))
        where = ranking.folder, ranking.split or ""
        self.photos = find_photos(folder, *where, self.ids, n_images)
        if any(self.photos) and not has_pillow():
            print("notice: the report has no photos, as they need pillow: pip install pillow")
            self.photos = [None] * n_images
        self.made: dict[int, dict | None] = {}  # photos as the page holds them
        self.unreadable: list[str] = []  # what is wrong with photos

    def image(self, image: int) -> dict | None:
        """An image's name, its photo, a text for it, and a caption (None: there is none)."""
        if image < 0:
            return None
        image = int(image)
        name = self.ids[image] if self.ids else f"image {image}"
        caption = self.caption(self.caption_of[image])["text"] if self.captions else None
        if image not in self.made:
            self.made[image] = self._photo(image)
        alt = f"Photo {name}: {caption}" if caption else f"Photo {name}"
        return {"name": name, "photo": self.made[image], "alt": alt, "caption": caption}

    def caption(self, caption: int) -> dict | None:
        """A caption's text (its number, if there are no texts), its name, and that of its image."""
        if caption < 0:
            return None
        caption, name = int(caption), f"caption {caption}"
        image = self.image_of[caption]
        text = self.captions[caption] if self.captions else name
        of = self.ids[image] if self.ids else f"image {image}"
        return {"text": text.strip() or "(an empty caption)", "name": name, "of": of}

    def _photo(self, image: int) -> dict | None:
        """A small JPEG for the page: {'data', 'width', 'height'}."""
        path = self.photos[image]
        if path is None:
            return None
        from PIL import Image, ImageOps

        try:
            with Image.open(path, formats=FORMATS) as photo:
                photo.draft("RGB", (2 * LONGEST, 2 * LONGEST))  # a JPEG is read at a smaller size
                photo = ImageOps.exif_transpose(photo)
                photo.thumbnail((LONGEST, LONGEST))
                photo = photo.convert("RGBA")
                plain = Image.new("RGB", photo.size, "white")
                plain.paste(photo, mask=photo.getchannel("A"))
        except Exception as error:  # decoders raise errors of all types for damaged files
            self.unreadable.append(f"{path}: {fault_of(error)}")
            return None
        file = io.BytesIO()
        plain.save(file, "JPEG", quality=QUALITY, optimize=True)
        data = base64.b64encode(file.getvalue()).decode()
        return {"data": data, "width": plain.width, "height": plain.height}

    def say_what_is_unreadable(self) -> None:
        if self.unreadable:
            number = len(self.unreadable)
            verb, which = ("is", "it is") if number == 1 else ("are", "the first is")
            print(
                f"notice: {number} of the photos could not be read and {verb} not in the report; "
                f"{which} {self.unreadable[0]}"
            )


def cards(items: Items, name: str, way: Way, queries: Sequence[int]) -> list[dict]:
    """What the page shows of each query: it, its best right candidate, and its best wrong one."""
    asked, found = items.image, items.caption
    if name == "t2i":
        asked, found = found, asked
    return [
        {
            "query": asked(q),
            "rank": int(way.ranks[q]) + 1,
            "right": found(way.right[q]),
            "right_score": float(way.right_score[q]),
            "wrong": found(way.wrong[q]),
            "wrong_score": float(way.wrong_score[q]),
        }
        for q in queries
    ]


def lists(items: Items, ways: dict[str, Way]) -> list[dict]:
    """The worst and the best queries of each direction."""
    found = []
    for kind in ("worst", "best"):
        for name, way in ways.items():
            queries = getattr(way, kind)(SHOWN)
            found.append({"kind": kind, "way": name, "cards": cards(items, name, way, queries)})
    return found


def hubs(ranking: Ranking, items: Items, name: str, way: Way) -> dict:
    """The candidates that come first too often, and those that nobody retrieves.

    `way` ranks images for captions, if `name` is t2i, or captions for images.
    """
    images, captions = ranking.right_pairs
    m, ranks = ranking.scores.shape[1], ranking.ranks
    if name == "i2t":
        firsts, asked = ranks.first_caption, np.arange(len(ranks.i2t)) * m + ranks.first_caption
    else:
        firsts, asked = ranks.first_image, ranks.first_image * m + np.arange(m)
    right = np.bincount(firsts[np.isin(asked, images * m + captions)], minlength=len(way.first))
    expected = len(way.ranks) / len(way.first)
    often = np.flatnonzero(way.first > max(1, expected))
    often = often[np.lexsort((right[often], -way.first[often]))][:HUBS]
    show = items.caption if name == "i2t" else items.image
    rows = [{"item": show(c), "first": int(way.first[c]), "right": int(right[c])} for c in often]
    return {"way": name, "expected": expected, "rows": rows}


def only_one_finds(ranking: Ranking, items: Items, ranks: list) -> list[dict]:
    """The queries that one of the first two sources finds (rank 1), and the other does not.

    `ranks` are those of the sources. The queries that the other one ranks worst come first.
    """
    found = []
    for finds, misses in ((0, 1), (1, 0)):
        for name in WAYS:
            mine, others = (getattr(ranks[k], name) for k in (finds, misses))
            queries = np.flatnonzero((mine == 0) & (others > 0))
            chosen = queries[np.argsort(-others[queries], kind="stable")][:SHOWN]
            way = look(ranking, name, ranking.parts[misses], ranks[misses], chosen)
            shown = cards(items, name, way, chosen)
            found.append(
                {"finds": finds, "misses": misses, "way": name, "n": len(queries), "cards": shown}
            )
    return found
