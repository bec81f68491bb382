"""Read tsv files of region features: those of bottom-up-attention, and LXMERT's."""

import functools
import gzip
import itertools
import os
import reprlib  # what repr() says of a hostile file may have no end
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from util.cli import InputError
from util.file_kinds import kind_of
from util.region_values import (
    LONGEST_ID,
    Image,
    Row,
    boxes_of,
    features_of,
    first_kinds,
    is_readable,
    item_size,
    likely_size,
    raw_bytes,
    whole_image,
    whole_number,
)

FIELDS = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")
LXMERT = (
    *("image_id", "image_h", "image_w", "objects_id", "objects_conf", "attrs_id", "attrs_conf"),
    *("num_boxes", "boxes", "features"),
)
LONGEST_NUMBER, LONGEST_ROW = 20, 2**24  # characters; 1,500 regions of 2048 float32 fit in a row
Types = Callable[[int], tuple[int, int] | None]


def tsv_rows(path: str) -> Iterator[Row]:
    """The rows of a tsv file, which may be compressed by gzip. Blank rows are skipped."""
    zipped = is_zipped(path)
    kind = None if zipped or not os.path.getsize(path) else kind_of(path)
    if kind:
        raise InputError(f"{path}: expected a tsv, .npz or HDF5 file, found {kind}")
    names, header, number = None, False, 0
    types = functools.cache(lambda width: usual_types(path, width))
    try:
        for number, line in logical_lines(short_lines(path)):
            fields = [unwrap(field) for field in line.split("\t")]
            if not any(fields):
                continue
            if not header and "features" in fields and "boxes" in fields:
                names, header = header_names(f"{path}: row {number}", fields), True
                continue
            names = names or usual_layout(path)
            yield tsv_row(f"{path}: row {number}", fields, names, types)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(
            f"{path}: the compressed file is cut or damaged behind row {number} ({error}); copy it "
            "again"
        ) from None


def short_lines(path: str) -> Iterator[str]:
    """The lines of a file, which may be compressed. Raises InputError if one is too long.

    A small compressed file may unpack to one line without an end.
    """
    opened = gzip.open if is_zipped(path) else open
    with opened(path, "rt", encoding="utf-8-sig", errors="replace", newline="") as file:
        number = 0
        while line := file.readline(LONGEST_ROW):
            number += 1
            if len(line) == LONGEST_ROW and line[-1] not in "\r\n":
                raise InputError(
                    f"{path}: line {number} has more than {LONGEST_ROW:,} characters, so it is no "
                    "row of a tsv file"
                )
            yield line


def in_words(names: Sequence[str]) -> str:
    """The names of fields for a message, which a damaged header may spoil."""
    text = ", ".join(names)
    return text if text.isprintable() and len(text) <= LONGEST_ID else reprlib.repr(text)


def header_names(where: str, fields: list[str]) -> list[str]:
    """The names of the fields in a header. Raises InputError if one that is needed is missing."""
    names = [name.replace("img_", "image_") for name in fields]
    if missing := [name for name in FIELDS if name not in names]:
        raise InputError(
            f"{where}: a header without {', '.join(missing)}; it has {in_words(names)}"
        )
    return names


def logical_lines(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Join the lines of a row, and yield the number of the first one with the row.

    base64.encodebytes breaks its text after 76 characters, and a csv writer then quotes the field.
    A line with as many tabs as a row has always begins a row, so damage does not spread. Nor does
    a row become longer than LONGEST_ROW.
    """
    whole = len(FIELDS) - 1  # tabs
    first, parts, tabs, quoted, length = 0, [], 0, False, 0
    for number, line in enumerate(lines, 1):
        line, more = line.rstrip("\r\n"), line.count("\t")
        last = parts[-1].rpartition("\t")[2] if parts else ""
        # An unbroken text of 76 characters would hold 57 bytes, an odd number.
        broken = len(last) == 76 and last[-1] != "="
        # PEM breaks after 64, which an unbroken text may have: only what the row lacks may follow.
        broken |= len(last) == 64 and last[-1] != "=" and more <= max(0, whole - tabs)
        next_field = line.startswith("\t") and (tabs < whole or len(parts) > 1)
        fits = length + len(line) <= LONGEST_ROW
        if parts and more < whole and fits and (quoted or broken or next_field):
            parts.append(line)
            tabs += more
            length += len(line)
        else:
            if parts:
                yield first, "".join(parts)
            first, parts, tabs, quoted, length = number, [line], more, False, len(line)
        quoted ^= line.count('"') % 2 == 1
    if parts:
        yield first, "".join(parts)


def unwrap(field: str) -> str:
    """A field without blanks, a csv writer's quotes, and the b'...' of bytes that were printed."""
    field = field.strip()
    if len(field) > 1 and field[0] == field[-1] == '"':
        field = field[1:-1].replace('""', '"')
    if len(field) > 2 and field[:2] in ("b'", 'b"') and field[-1] == field[1]:
        field = field[2:-1].replace("\\n", "")
    return field.strip()


def usual_layout(path: str, count: int = 20) -> tuple[str, ...]:
    """The names of the fields of most of the first rows of a file without a header.

    A row alone does not tell: if a newline is lost behind a row that is cut inside its boxes, two
    rows of six fields are one of ten. Then its fourth field is a number, and is no base64.
    """
    found = Counter()
    for _, line in itertools.islice(logical_lines(short_lines(path)), count):
        fields = line.split("\t")
        if len(fields) == len(FIELDS):
            found[FIELDS] += 1
        elif len(fields) == len(LXMERT) and not unwrap(fields[3]).isdecimal():
            found[LXMERT] += 1
    return LXMERT if found[LXMERT] > found[FIELDS] else FIELDS


def is_zipped(path: str) -> bool:
    """Whether a file is compressed by gzip."""
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def readable_id(fields: list[str], names: Sequence[str]) -> str | None:
    """The id of a row; None if it is none, or the row may be the tail of one that is broken.

    A row with too few fields has an id only if more follows, and no base64 in place of numbers.
    """
    place = names.index("image_id") if "image_id" in names else 0
    text = fields[place] if place < len(fields) else ""
    if not is_readable(text):
        return None
    if len(fields) < len(names):
        of_numbers = ("image_w", "image_h", "num_boxes")
        pairs = zip(names, fields, strict=False)
        numbers = [field for name, field in pairs if name in of_numbers]
        if not numbers or max(map(len, numbers)) > LONGEST_NUMBER:
            return None
    return text


def tsv_row(where: str, fields: list[str], names: Sequence[str], types: Types) -> Row:
    """A row of a tsv file, whose fields have these names. Types: see tsv_image."""

    def read(width: int | None, max_boxes: int) -> Image:
        if len(fields) != len(names):
            raise InputError(
                f"{where}: {len(fields)} fields, expected {len(names)}: {in_words(names)}"
            )
        row = dict(zip(names, fields, strict=True))
        return tsv_image(where, row, width, max_boxes, types)

    return Row(where, readable_id(fields, names), read)


def tsv_image(
    where: str, row: dict[str, str], width: int | None, max_boxes: int, types: Types
) -> Image:
    """The image of a row, by the names of its fields.

    `types` gives the types of numbers of the other rows. A row of other types is cut: half of a
    float32 array is as long as a float16 one.
    """
    counts = [row.get(name, "") for name in ("image_w", "image_h", "num_boxes")]
    try:
        *size, count = map(float, counts)
        size = [int(x) for x in size]
    except (ValueError, OverflowError):
        raise InputError(
            f"{where}: image_w, image_h, num_boxes are {reprlib.repr(counts)}, expected numbers"
        ) from None
    n = whole_number(count, where)
    boxes, features = (raw_bytes(row[name], where, name) for name in ("boxes", "features"))
    if n < 1 or (n > max_boxes and len(boxes) < 8 * n):
        raise InputError(f"{where}: {n} boxes, expected 1 to {max_boxes}; see --max_boxes")
    of_boxes = item_size(boxes, n, 4, where, "boxes")
    if width:
        of_features = item_size(features, n, width, where, "features")
        usual = types(width) or (of_boxes, of_features)
        check_type("boxes", n, 4, of_boxes, usual[0], where)
        check_type("features", n, width, of_features, usual[1], where)
    else:
        of_features = likely_size(features, n, where, of_boxes)
    values = features_of(features, n, of_features, where)
    image = whole_image(values, boxes_of(boxes, of_boxes, where), size, where)
    return image._replace(types=(of_boxes, of_features))


def check_type(field: str, boxes: int, columns: int, found: int, usual: int, where: str) -> None:
    """Raise InputError if a row has other types of numbers than the others."""
    if found != usual:
        raise InputError(
            f"{where}: {field} holds {boxes * columns * found} bytes; expected {boxes} boxes x "
            f"{columns} float{8 * usual}, {boxes * columns * usual} bytes, as in other rows"
        )


def usual_types(path: str, width: int) -> tuple[int, int] | None:
    """The types of most of the first whole rows of a tsv file that have `width` numbers."""
    found = Counter(kind.types for kind in first_kinds(tsv_rows(path)) if kind.width == width)
    return max(found, key=lambda types: (found[types], types[0] == types[1]), default=None)
