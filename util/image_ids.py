"""Compare ids of images that were written in different ways, and read lists of them."""

import re
from collections.abc import Sequence
from decimal import Decimal

from util.captions import read_lines
from util.cli import InputError

# 12, 000012, 12.0, and 1.2e+01 as numpy.savetxt writes it. Without the sign, 12e4 may be a hash.
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?(e[+-]\d{1,2})?", re.ASCII | re.IGNORECASE)
LONGEST = 1000  # letters; a longer text is a name: on it the expressions would take hours
LONGEST_NUMBER = 40  # letters; a longer one is a name: Python writes no number of 4,301 digits
_COCO = re.compile(r"COCO_[a-z]+\d{4}_(\d+)", re.ASCII | re.IGNORECASE)
# Extractors also write 12.jpg.npz.
_ENDINGS = re.compile(r"(?<=.)(\.(jpe?g|png|bmp|gif|tiff?|webp|np[yz]))+$", re.IGNORECASE)
# Flickr's lists of captions call them name.jpg#0, name.jpg#1, ...
_CAPTION = re.compile(r"(\.(?:jpe?g|png|bmp|gif|tiff?|webp))#\d+$", re.IGNORECASE)


def shown(text: str) -> str:
    """An id for a message: quoted, and cut if it is long."""
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


def written_key(text: str) -> int | str:
    """The key of an id as it is written; only numbers may be written in several ways."""
    text = text.strip()
    if len(text) > LONGEST_NUMBER or not _NUMBER.fullmatch(text):
        return text
    number = Decimal(text)
    return int(number) if number == number.to_integral_value() else str(number.normalize())


def id_key(text: str) -> int | str:
    """The key of an image: that of its number, or of its file name without folder and ending.

    `391895`, `000000391895`, `391895.0`, `val2014/COCO_val2014_000000391895.jpg` and `391895.jpg`
    have the same key.
    """
    if len(text) > LONGEST:
        return text.strip()
    name = _CAPTION.sub(r"\1", text.strip())
    if not _NUMBER.fullmatch(name):
        name = _ENDINGS.sub("", name.replace("\\", "/").rpartition("/")[2])
    coco = _COCO.fullmatch(name)
    key = written_key(coco[1] if coco else name)
    return text.strip() if key == "" else key


def read_ids(path: str) -> list[str]:
    """The ids of a file with one per line; blank lines are skipped."""
    lines = read_lines(path, "image id")
    for row, line in enumerate(lines, 1):
        if len(line) > LONGEST:
            raise InputError(
                f"{path}: line {row}: an id of {len(line):,} letters; expected one id per line"
            )
    ids = list(filter(None, lines))
    if not ids:
        raise InputError(f"{path}: no image ids in it; expected one per line")
    return ids


class ImageIds:
    """The images of a list of ids, each with a number; or of files, if there is no list.

    `names` are the ids as they are written where they are first mentioned. `lines` are the images
    of the lines of the list, which may name an image again, once per caption.

    An id of a file is looked for as it is written (`written_key`), then by its number or its name
    without folder and ending (`id_key`), unless two images of the list have the same.
    """

    def __init__(self, listed: Sequence[str] | None = None):
        self.listed = listed is not None
        self.names: list[str] = []
        self._written: dict[int | str, int] = {}
        self._loose: dict[int | str, int | None] = {}
        self._meant: dict[int, str] = {}  # the id of the files that was taken for an image
        self.alike: list[tuple[str, str]] = []  # pairs of images with the same id_key
        self.lines = [self._add(text) for text in listed or ()]

    def _add(self, text: str) -> int:
        if self.listed:
            text = _CAPTION.sub(r"\1", text)
        key = written_key(text)
        if key in self._written:
            return self._written[key]
        image = self._written[key] = len(self.names)
        self.names.append(text)
        if self.listed:
            other = self._loose.setdefault(id_key(text), image)
            if other not in (None, image):
                self.alike.append((self.names[other], text))
                self._loose[id_key(text)] = None
        return image

    def find(self, text: str) -> int | None:
        """The image that an id of a file means; None if it is not in the list.

        Raises InputError if two different ids of the files fit the same id of the list.
        """
        if not self.listed:
            return self._add(text)
        key = written_key(text)
        image = self._written.get(key)
        if image is not None:
            self._meant[image] = text
            return image
        image = self._loose.get(id_key(text))
        if image is None:
            return None
        before, name = self._meant.setdefault(image, text), self.names[image]
        if written_key(before) == key:
            return image
        if written_key(before) == written_key(name):
            return None  # the files hold the very id of the list, so this is another image
        raise InputError(
            f"the ids {shown(before)} and {shown(text)} of the files both fit {shown(name)} in the "
            "list of ids; write the ids in the list as they stand in the files"
        )

    def means(self, image: int, text: str) -> bool:
        """Whether `text` is the id of the files that is taken for an image, as known by now."""
        return written_key(self._meant.get(image, text)) == written_key(text)
