"""Choose the photos of a folder, read captions of them, and write those as a split's captions."""

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from util.captions import read_lines
from util.cli import InputError, replacing, say
from util.image_ids import ImageIds, id_key, shown
from util.pictures import ENDINGS

NUMBERED = re.compile(r"(\.\w+)#\d+$")  # Flickr's lists call them name.jpg#0, name.jpg#1, ...
USUAL = 5  # captions per image that the programs take for granted
MOST_NAMES = 20  # of skipped pictures in a warning
SAMPLE = 4096  # bytes of a file that are compared at its start, its middle and its end


class Photos(NamedTuple):
    """Some pictures of a folder: their file names, and for each line of --ids its picture."""

    folder: str
    names: list[str]
    lines: list[int] | None

    def digest(self) -> str:
        """A SHA-256 of the names and the lengths of the files, and of three parts of each."""
        found = hashlib.sha256()
        for name in self.names:
            size, parts = _sample(os.path.join(self.folder, name))
            found.update(f"{name}\n{size}\n".encode() + parts)
        return found.hexdigest()


def _sample(path: str) -> tuple[int, bytes]:
    """The length of a file, and its first, middle and last SAMPLE bytes; all of a short one.

    Whole files would take as long to read as to extract. The length of one that cannot be read is
    -1: what is wrong with it is said where its picture is read.
    """
    if not os.path.isfile(path):
        return -1, b""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size <= 3 * SAMPLE:
                return size, file.read()
            parts = []
            for start in (0, (size - SAMPLE) // 2, size - SAMPLE):
                file.seek(start)
                parts.append(file.read(SAMPLE))
            return size, b"".join(parts)
    except OSError:
        return -1, b""


def _are(n: int, noun: str) -> str:
    return f"{n:,} {noun} is" if n == 1 else f"{n:,} {noun}s are"


def list_photos(folder: str) -> list[str]:
    """The names of the pictures in a folder, sorted; those of folders in it are not read."""
    if os.path.isfile(folder):
        raise InputError(f"{folder}: is a file; give the folder it is in")
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder of pictures")
    names, folders, others = [], 0, []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            folders += 1
        elif entry.name.lower().endswith(ENDINGS):
            names.append(entry.name)
        else:
            others.append(entry.name)
    if folders:
        say(f"notice: {folder}: {_are(folders, 'folder')} not read")
    if others:
        say(
            f"notice: {folder}: {_are(len(others), 'file')} not read, such as {shown(others[0])}; "
            f"pictures end with {', '.join(ENDINGS)}"
        )
    if not names:
        raise InputError(f"{folder}: no pictures in it; they end with {', '.join(ENDINGS)}")
    return names


def choose_photos(folder: str, ids: Sequence[str] | None) -> Photos:
    """The pictures of a folder, or those that a list names, in its order.

    An id is a file name, a name without ending, or a number as `id_key` reads it. Raises InputError
    if one is missing or is not clear, or if a name cannot stand in a line.
    """
    names, lines = list_photos(folder), None
    if ids is not None:
        listed = ImageIds(ids)
        by_key: dict[int | str, list[str]] = {}
        for name in names:
            by_key.setdefault(id_key(name), []).append(name)
        there, found = set(names), []
        for text in listed.names:
            found.append([text] if text in there else by_key.get(id_key(text), []))
        missing = [text for text, some in zip(listed.names, found, strict=True) if not some]
        if missing:
            raise InputError(
                f"{folder}: {len(missing):,} of the {len(found):,} pictures of --ids are not in "
                f"it, the first {shown(missing[0])}"
            )
        for text, some in zip(listed.names, found, strict=True):
            if len(some) > 1:
                raise InputError(
                    f"--ids: {shown(text)} may be {' or '.join(map(shown, some[:3]))}; write the "
                    "whole file name"
                )
        names, lines = [some[0] for some in found], listed.lines
        if len(set(names)) < len(names):
            twice = next(x for k, x in enumerate(names) if x in names[:k])
            raise InputError(f"--ids: two of its ids mean the picture {shown(twice)}")
    for name in names:
        if name != name.strip() or any(x in name for x in "\n\r\t\0\x0b\x0c") or not _is_text(name):
            raise InputError(
                f"{folder}: the file name {name!r} cannot stand in a list of ids: it has a line "
                "end, a tab, a blank at an end, or bytes that are not UTF-8; rename it"
            )
    return Photos(os.path.abspath(folder), names, lines)


def _is_text(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:  # the bytes of a file's name that are no UTF-8
        return False


def warn_of_skipped(broken: Sequence[str], photos: Photos, path: str) -> None:
    """Name the pictures that could not be read; the file at `path` lists all."""
    if broken:
        some = ", ".join(map(shown, broken[:MOST_NAMES]))
        more = f" and {len(broken) - MOST_NAMES:,} more" if len(broken) > MOST_NAMES else ""
        say(
            f"warning: skipped {len(broken):,} of {len(photos.names):,} pictures: {some}{more} "
            f"({path} lists all)"
        )


def read_photo_captions(
    path: str, names: Sequence[str], lines: Sequence[int] | None
) -> list[list[str]]:
    """The captions of each of the photos `names`, in the order of the file.

    A line is a photo's name, a tab and a caption; lines of other photos are left out, with a
    notice, and so are empty captions. A tab in a caption becomes a blank. Or all lines are captions
    only, as many for each line of --ids: `lines` says which photo such a line names. Raises
    InputError with the line if the file is neither.
    """
    text = read_lines(path, "caption")
    tabbed = sum("\t" in line for line in text)
    if not tabbed:
        return _plain(path, text, len(names), lines)
    found: list[list[str]] = [[] for _ in names]
    images, others, other = ImageIds(names), 0, ""
    empty = []  # numbers of lines
    for row, line in enumerate(text, 1):
        name, tab, caption = line.partition("\t")
        name = NUMBERED.sub(r"\1", name.strip())
        image = images.find(name)
        if not tab and (image is not None or name.lower().endswith(ENDINGS)):
            empty.append(row)  # read_lines cuts a tab at the end
            continue
        if line and image is None and tab:
            others, other = others + 1, other or name
        elif image is not None:
            found[image].append(caption.strip().replace("\t", " "))
        elif line:
            raise InputError(
                f"{path}: line {row}: expected a file name, a tab and a caption, as in other "
                f"lines; found {shown(line)}"
            )
    if empty and not any(found):
        raise InputError(f"{path}: line {empty[0]}: expected a caption behind the tab; found none")
    if not any(found):
        raise InputError(
            f"{path}: no captions of these photos: it names {shown(other)}, the first photo is "
            f"{shown(names[0])}"
        )
    if others:
        say(
            f"notice: {path}: {_are(others, 'line')} of other photos, such as {shown(other)}, and "
            "left out"
        )
    if empty:
        say(
            f"notice: {path}: {_are(len(empty), 'line')} without a caption, the first line "
            f"{empty[0]}, and left out"
        )
    return found


def _plain(path: str, text: list[str], n: int, lines: Sequence[int] | None) -> list[list[str]]:
    """The captions of a file without names: k for each line of --ids."""
    if lines is None:
        raise InputError(
            f"{path}: no tabs in it; expected lines of a file name, a tab and a caption, or give "
            "--ids FILE, whose order the captions have"
        )
    k = len(text) // len(lines)
    if not k or k * len(lines) != len(text):
        raise InputError(
            f"{path}: {len(text)} captions for the {len(lines)} lines of --ids; expected a "
            "multiple, or lines of a file name, a tab and a caption"
        )
    found: list[list[str]] = [[] for _ in range(n)]
    for place, image in enumerate(lines):
        found[image] += text[k * place : k * place + k]
    return found


def write_photo_captions(
    stem: str, photos: Photos, captions: list[list[str]], skipped: set[str], overwrite: bool
) -> None:
    """Write {stem}_caps.txt, row by row, and {stem}_caption_image.txt if a row has not just five.

    `captions` are those of each of the photos; those of photos that were `skipped` are left out,
    with a notice. Raises InputError if other captions are there, unless `overwrite`.
    """
    pairs = list(zip(photos.names, captions, strict=True))
    captions = [some for name, some in pairs if name not in skipped]
    lost = sum(len(some) for name, some in pairs if name in skipped)
    if lost:
        say(f"notice: {_are(lost, 'caption')} of pictures that were skipped, and left out")
    rows = [row for row, some in enumerate(captions) for _ in some]
    regular = all(len(some) == USUAL for some in captions)
    table = None if regular else "".join(f"{row}\n" for row in rows)
    wanted = {
        "caps": "".join(f"{caption}\n" for some in captions for caption in some),
        "caption_image": table,
    }
    for name, text in wanted.items():
        path = Path(f"{stem}_{name}.txt")
        if path.is_file() and not overwrite and path.read_text("utf-8", "replace") != text:
            raise InputError(
                f"{path}: of other captions; move it away, or replace it with --overwrite"
            )
    for name, text in wanted.items():
        path = f"{stem}_{name}.txt"
        if text is not None:
            with replacing(path) as part:
                Path(part).write_text(text, encoding="utf-8", newline="\n")
        elif os.path.exists(path):
            os.remove(path)
    without = sum(not some for some in captions)
    if without:
        say(
            f"notice: no caption of {without:,} of {len(captions):,} photos; their features are "
            f"kept, and {stem}_caption_image.txt says which photo a caption is of"
        )
    print(f"{stem}_caps.txt: {len(rows):,} captions")
