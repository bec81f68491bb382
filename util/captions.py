"""Read caption files and other lists, one item per line, and say what is wrong with a file."""

import codecs
import contextlib
import itertools
import os
import re
import shlex

from util.cli import InputError
from util.file_kinds import kind_of

ASCII_BLANKS = " \t\n\r\x0b\x0c"
SAMPLE = 100  # lines that show whether a file holds captions only
MARKS = (  # UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
PICTURE = re.compile(r"[^\t]*\.(jpe?g|png|bmp|gif|webp|tiff?)(#\w+)?", re.IGNORECASE)
NUMBER = re.compile(r"[^\s\d]*\d\S*")  # 391895, COCO_val2014_000000391895, 36979#0
LONG = re.compile(r"[^\s\d]*\d{5,}(#\d+)?")  # no year, no amount such as 2,000
HEADER = re.compile(r'"?(image|img|file|photo|picture|name|id)', re.IGNORECASE)
COLUMN = re.compile(r"(\w|Unnamed: )*")  # pandas writes no name above its row numbers, or Unnamed
CAPTIONS = re.compile(r"\w*(caption|comment|sentence|raw)s?", re.IGNORECASE)
IMAGES = re.compile(r"image|img|file|photo|picture|name|id", re.IGNORECASE)
WIDE = re.compile(r"[\t\n\r -~\u3000-\u30ff\u4e00-\u9fff\uff00-\uffef]")
JSON = re.compile(r'[\[{]\s*($|["\[{])')


def read_lines(path: str | os.PathLike, what: str = "line") -> list[str]:
    """The lines of a UTF-8 file without the ASCII blanks at both ends; `what` names one in errors.

    Raises FileNotFoundError, or an InputError that says what the file is instead.
    """
    if not os.path.isfile(path):
        kind = "" if what == "line" else f"{what} "
        raise FileNotFoundError(f"{path}: no such {kind}file; it holds one {what} per line")
    with open(path, "rb") as file:
        head = file.read(4096)
    if not head:
        raise InputError(f"{path}: no {what}s in it; expected one per line")
    if kind := kind_of(path):
        raise InputError(f"{path}: expected one {what} per line, found {kind}")
    if encoding := wide_encoding(head):
        raise InputError(
            f"{path}: text in {encoding.upper()}, expected UTF-8; convert it with "
            f"`iconv -f {encoding} -t utf-8 {shlex.quote(str(path))} > NEW` and use the new file"
        )
    found = []
    with open(path, "rb") as lines:  # binary, so that errors can name the line of a bad byte
        for row, line in enumerate(lines, 1):
            if b"\0" in line:
                raise InputError(
                    f"{path}: line {row} holds a NUL byte (column {line.index(0) + 1}), which no "
                    "text has: the file is damaged, or of another kind; copy or make it again"
                )
            try:
                text = line.decode("utf-8-sig" if row == 1 else "utf-8")  # Q16
            except UnicodeDecodeError as error:
                lines.seek(0)
                windows = re.search(rb"[\x80-\x9f]", lines.read())  # latin1 has no letters there
                encoding = "cp1252" if windows else "latin1"
                raise InputError(
                    f"{path}: line {row} is not UTF-8 (byte {error.object[error.start]:#04x} at "
                    f"column {error.start + 1}); convert the file, e.g. `iconv -f {encoding} -t "
                    "utf-8` (Chinese: `-f gb18030`)"
                ) from None
            found.append(text.strip(ASCII_BLANKS))
    return found


def read_captions(path: str | os.PathLike) -> list[str]:
    """The captions of a UTF-8 file, one per line; an empty line is an empty caption.

    ASCII blanks at both ends of a caption are stripped, as published; a vocabulary may strip more.
    Raises FileNotFoundError, or InputError, also for a table of images and captions.
    """
    captions = read_lines(path, "caption")
    sample = list(itertools.islice(filter(None, captions), SAMPLE))
    if sample and JSON.match(sample[0]):
        raise InputError(
            f"{path}: expected one caption per line, found JSON; write its captions to a text "
            "file, image by image in the order of the features"
        )
    for separator in "\t|,;: ":
        _refuse_table(path, sample, separator)
    return captions


def wide_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32, by the mark at the beginning of a text or by the places of NUL bytes."""
    for mark, encoding in MARKS:
        if head.startswith(mark):
            return encoding
    even, odd = head[::2].count(0), head[1::2].count(0)
    if max(even, odd) < 0.25 * len(head):
        return _wide_chinese(head)
    if min(even, odd) > 0.2 * max(even, odd):
        guesses = ["utf-32le", "utf-32be"]
    else:  # every second byte of English is NUL
        guesses = ["utf-16le" if odd > even else "utf-16be"]
    for encoding in guesses:
        with contextlib.suppress(UnicodeDecodeError):
            codecs.getincrementaldecoder(encoding)().decode(head)  # it may end inside a character
            return encoding
    return None


def _wide_chinese(head: bytes) -> str | None:
    """UTF-16 of Chinese without a mark: only its blanks and line ends have NUL bytes."""
    if b"\0" not in head:
        return None
    with contextlib.suppress(UnicodeDecodeError):
        codecs.getincrementaldecoder("utf-8")().decode(head)
        return None
    for encoding in ("utf-16le", "utf-16be"):
        with contextlib.suppress(UnicodeDecodeError):
            text = codecs.getincrementaldecoder(encoding)().decode(head)
            if len(WIDE.findall(text)) >= 0.95 * len(text):
                return encoding
    return None


def _refuse_table(path: str | os.PathLike, sample: list[str], separator: str) -> None:
    """Raise InputError if nearly all lines have the name of an image beside the caption."""
    if not sample:
        return
    named = _columns(sample[0], separator)
    header = named is not None or bool(
        len(sample) > 1
        and separator in sample[0]
        and HEADER.match(sample[0])
        and not _names_before(sample[0].split(separator), separator)
    )
    rows = sample[header:]
    fields = [row.split(separator) for row in rows]
    before = _common([_names_before(x, separator) for x in fields])
    after = 0
    if separator != " ":  # my photo.jpg is one name
        after = _common([_names_before(x[:0:-1], separator, last=True) for x in fields])
    if not before and not after and named and _common([separator in row for row in rows]):
        before, after = named
    if not before and not after:
        return
    file, mark = shlex.quote(str(path)), "" if separator == "\t" else f"-d{shlex.quote(separator)} "
    steps = [f"tail -n +2 {file}"] if header else []
    if before:
        steps.append(f"cut {mark}-f{before + 1}-" + ("" if steps else f" {file}"))
    if after:
        one = r"\t" if separator == "\t" else separator
        steps.append(f"sed -E 's/([{one}][^{one}]*){{{after}}}$//'" + ("" if steps else f" {file}"))
    if any(field.lstrip().startswith('"') for x in fields for field in x[before : before + 1]):
        steps.append("""sed 's/^ *"//; s/"$//; s/""/"/g'""")
    where = "begins with" if before else "ends with"
    raise InputError(
        f"{path}: its lines hold more than captions: {rows[0][:60]!r} {where} the name of an "
        f"image; keep only the captions, `{' | '.join(steps)} > NEW`, and their order: image by "
        "image, as the features are stored"
    )


def _common(counts: list[int]) -> int:
    """The smallest of the counts that are not 0, if nearly all are so; else 0."""
    some = [count for count in counts if count]
    return int(min(some)) if some and len(some) >= 0.9 * len(counts) else 0


def _columns(line: str, separator: str) -> tuple[int, int] | None:
    """How many columns a header line names before and after that of the captions; None: no header.

    It names captions, and beside them images, ids or files, or a column of numbers without a name.
    """
    if separator in ": ":
        return None
    names = [name.strip().strip('"') for name in line.split(separator)]
    at = [k for k, name in enumerate(names) if CAPTIONS.fullmatch(name)]
    others = [name for k, name in enumerate(names) if k not in at]
    if (
        not at
        or not all(map(COLUMN.fullmatch, names))
        or not any(not name or name.startswith("Unnamed") or IMAGES.search(name) for name in others)
    ):
        return None
    return at[0], len(names) - at[0] - 1


def _names_before(fields: list[str], separator: str, last: bool = False) -> int:
    """How many of a line's first fields, but not its last, are a name of an image or its number.

    Numbers alone count if they are long, if the separator is none that captions have, or if no
    blank is behind the comma. `last`: the fields are those behind the caption, from the end.
    """
    count, sure = 0, separator in "\t|"
    for field in fields if last else fields[:-1]:
        field = field.strip().strip('"')
        picture = PICTURE.fullmatch(field)
        if not (picture or NUMBER.fullmatch(field)):
            break
        count += 1
        sure = sure or bool(picture or LONG.fullmatch(field))
    if count and not last and separator in ",;":
        sure = sure or fields[count][:1].isalpha() or fields[count].startswith('"')
    return count if sure else 0
