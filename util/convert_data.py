"""Convert the region features that extractors write to the arrays that data.py reads.

    python util/convert_data.py train.tsv --out data/my_precomp/train
    python util/convert_data.py a.tsv b.tsv --ids dev_ids.txt --out data/my_precomp/dev
    python util/convert_data.py folder_of_npz/ --ids dev_ids.txt --out data/my_precomp/dev

It reads

- tsv files of bottom-up-attention, also compressed (.tsv.gz): image_id, image_w, image_h,
  num_boxes, boxes and features, separated by tabs; the last two are float16, float32 or float64 in
  base64;
- tsv files of LXMERT: ten fields, img_id, img_h, img_w, objects_id, objects_conf, attrs_id,
  attrs_conf, num_boxes, boxes and features;
- .npz files, one per image, or folders of them, as bottom-up-attention.pytorch writes them: x or
  features (R, F) or (F, R), bbox or boxes, num_bbox or num_boxes, image_w and image_h; an image_id,
  else the name of the file is the id;
- HDF5 files (pip install h5py) with the same names: a group per image, datasets {id}_features and
  {id}_boxes, or datasets of all images beside their image_id.

It writes {out}_ims.npy (N, R, F), {out}_ims_bbx.npy (N, R, 4) in pixels, {out}_ims_size.npy,
{out}_num_boxes.npy (N,), how many of the R regions an image has, and {out}_ids.txt. If an image has
fewer than R = --max_boxes regions, zeros follow. It writes one row at a time, so memory does not
grow with the files. Damaged rows are skipped; they are an error only if an image is nowhere whole.
"""

import argparse
import contextlib
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # when run by path

from util.arguments import COUNT, Parser  # noqa: E402
from util.boxes import BoxCheck  # noqa: E402
from util.cli import InputError, progress, run, say  # noqa: E402
from util.folders import SPLITS  # noqa: E402
from util.image_ids import ImageIds, read_ids, shown  # noqa: E402
from util.npy_writer import NpyWriter, reorder  # noqa: E402
from util.region_files import read_rows  # noqa: E402
from util.region_tsv import FIELDS  # noqa: E402, F401
from util.region_values import Image, Row, decode, first_kinds  # noqa: E402, F401

FILES = ("ims.npy", "ims_bbx.npy", "ims_size.npy", "num_boxes.npy", "ids.txt")
IMS, BOXES, SIZES, COUNTS, IDS = FILES
OUT_ENDING = re.compile(r"(_(ims(_bbx|_size)?|num_boxes|ids)?)?(\.(npy|txt))?$")
TABLE = "caption_image.txt"  # which row a line of the list of ids names
SIZE = np.dtype([("image_w", "<i8"), ("image_h", "<i8")])
MOST_WARNINGS = 10  # about single damaged rows


class Layout:
    """What the first whole images of some files have: features of a width, boxes, sizes.

    The width is that of most of them, so that a damaged one does not decide it.
    """

    def __init__(self, paths: Sequence[str], max_boxes: int, img_dim: int | None):
        kinds = first_kinds(read_rows(paths))
        if img_dim and not kinds:  # the values do not tell the width
            kinds = first_kinds(read_rows(paths), img_dim)
        widths = Counter(kind.width for kind in kinds)
        self.boxes = any(kind.boxes for kind in kinds)
        self.sizes = any(kind.size for kind in kinds)
        self.max_boxes = max_boxes
        found = max(widths, key=lambda width: (widths[width], width), default=None)
        self.width = img_dim or found
        if found and max(self.width, found) in [times * min(self.width, found) for times in (2, 4)]:
            raise InputError(
                f"--img_dim {img_dim}: the values look like {found} numbers per region; leave "
                "--img_dim out, or give the right one"
            )

    def read(self, row: Row) -> Image:
        """The image of a row. Raises InputError if it is damaged or lacks what others have."""
        image = row.read(self.width, self.max_boxes)
        if row.image_id is None:
            raise InputError(f"{row.where}: no image id that can be read")
        if self.boxes and image.boxes is None:
            raise InputError(f"{row.where}: no boxes, which other images have")
        if self.sizes and image.size is None:
            raise InputError(f"{row.where}: no image_w and image_h, which other images have")
        return image

    def arrays(self, dtype: str) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape of a row and type of each array to write."""
        arrays = {IMS: ((self.max_boxes, self.width or 0), np.dtype(dtype))}
        if self.boxes:
            arrays[BOXES] = (self.max_boxes, 4), np.dtype(np.float32)
        if self.sizes:
            arrays[SIZES] = (), SIZE
        return arrays | {COUNTS: ((), np.dtype(np.int32))}


class Conversion:
    """Writes the wanted images of some files in file order, each once, and keeps account."""

    def __init__(self, images: ImageIds, layout: Layout):
        self.images, self.layout = images, layout
        self.rows: dict[int, int] = {}  # the row of each image that was found whole
        self.damaged: dict[int, str] = {}  # the first fault of an image
        self.taken: dict[int, str] = {}  # the id, in the files, of the row of an image
        self.again: dict[int, str] = {}  # where an image came whole again
        self.filled: set[int] = set()  # images with filling
        self.skipped = 0
        self.unwanted: str | None = None  # an id of the files that is not in the list
        self.check = BoxCheck()

    def write(self, paths: Sequence[str], writers: dict[str, NpyWriter]) -> None:
        """Read the files and write the images; of two whole rows of one the last counts (Q46)."""
        for row in progress(read_rows(paths), "rows"):
            image = None if row.image_id is None else self.images.find(row.image_id)
            if image is None and row.image_id is not None:
                self.unwanted = row.image_id
                continue
            try:
                found = self.layout.read(row)
            except InputError as error:
                self._skip(row, image, str(error))
                continue
            if self._is_whole(image):
                self.again[image] = row.where
            self.taken[image] = row.image_id
            (self.filled.add if found.filled else self.filled.discard)(image)
            self._write_image(row, found, self.rows.setdefault(image, len(self.rows)), writers)

    def _skip(self, row: Row, image: int | None, fault: str) -> None:
        """Keep account of a damaged row."""
        self.skipped += 1
        if image is not None:
            self.damaged.setdefault(image, fault)
        if self.skipped <= MOST_WARNINGS:
            whose = (
                f"image {shown(row.image_id)}"
                if image is not None
                else "an id that is not readable"
            )
            say(f"warning: {fault}; this row of {whose} is skipped")

    def _write_image(
        self, row: Row, image: Image, place: int, writers: dict[str, NpyWriter]
    ) -> None:
        regions, most = len(image.features), self.layout.max_boxes
        if regions > most:
            raise InputError(
                f"{row.where}: {regions} boxes, expected 1 to {most}; see --max_boxes: give the "
                f"largest number of an image, {regions} or more (extractors that keep 10 to 100 "
                "boxes need --max_boxes 100)"
            )
        largest, dtype = np.finfo(writers[IMS].dtype).max, writers[IMS].dtype
        if np.abs(image.features).max() > largest:
            raise InputError(
                f"image {row.image_id}: a feature above {largest:g}, too large for {dtype}"
            )
        filling = ((0, most - regions), (0, 0))
        writers[IMS].write(np.pad(image.features, filling), place)
        writers[COUNTS].write(np.array(regions), place)
        if BOXES in writers:
            writers[BOXES].write(np.pad(image.boxes, filling), place)
        if SIZES in writers:
            writers[SIZES].write(np.array(image.size, SIZE), place)
        if BOXES in writers and SIZES in writers:
            self.check.add(image.boxes, image.size, name=f"image {row.image_id}")

    def _is_whole(self, image: int) -> bool:
        """Whether a whole row was found, and not one of another image with such a name."""
        return image in self.rows and self.images.means(image, self.taken[image])

    def check_whole(self, paths: Sequence[str]) -> None:
        """Raise InputError unless each image was found whole."""
        names = self.images.names
        missing = [image for image in range(len(names)) if not self._is_whole(image)]
        damaged = [image for image in missing if image in self.damaged]
        absent = [image for image in missing if image not in self.damaged]
        faults = []
        if damaged:
            some = "; ".join(f"{shown(names[x])}: {self.damaged[x]}" for x in damaged[:5])
            faults.append(f"{len(damaged)} of {len(names)} images have no whole row: {some}")
        if absent:
            tsv = all(os.path.isfile(p) and not p.endswith((".npz", "h5", "hdf5")) for p in paths)
            such = f"; the files hold ids such as {shown(self.unwanted)}" if self.unwanted else ""
            faults.append(
                f"{len(absent)} of {len(names)} ids are in no {'tsv ' * tsv}file, the first "
                f"{shown(names[absent[0]])}{such}"
            )
        if faults:
            raise InputError("; ".join(faults))
        if not self.rows:
            raise InputError(f"{', '.join(paths)}: none of the requested images")

    def report(self, source: str) -> None:
        """Say what was noticed in a conversion that succeeded."""
        if self.skipped:
            say(
                f"warning: {source}: {self.skipped} damaged rows were skipped; each image with a "
                "readable id is whole in another row"
            )
        if self.again:
            image, where = next(iter(self.again.items()))
            say(
                f"notice: {source}: {len(self.again)} images come more than once; the last row of "
                f"each counts, as published (such as {shown(self.images.names[image])} at {where})"
            )
        if self.filled:
            say(
                f"notice: {source}: {len(self.filled)} images end with regions whose features are "
                "all zero; these are filling and are not counted"
            )
        if not (self.layout.boxes and self.layout.sizes):
            lacks = " and no ".join(x for x in ("boxes", "sizes") if not getattr(self.layout, x))
            say(f"notice: {source}: no {lacks} of the images, which GSMN and PFAN need")
        self.check.warn(source)


def file_stem(out: str) -> str:
    """What stands before the names of the files: `out` is a folder and a split, or only a folder.

    A folder ends with a slash, or exists and is not called like a split: a folder data/x/train may
    hold the pictures of data/x/train_ims.npy. Raises InputError for the name of a file.
    """
    out = os.path.expanduser(out)
    is_folder = os.path.isdir(out) and os.path.basename(out) not in SPLITS
    if is_folder or out.endswith(("/", os.sep)):
        return os.path.join(out, "")
    right = OUT_ENDING.sub("", out)
    if right != out or not out:
        right = right if os.path.basename(right) else "data/my_precomp/train"
        raise InputError(f"--out {out!r}: expected a folder and a split, such as --out {right}")
    return f"{out}_"


def check_target(stem: str) -> str:
    """Make the folder of the files and return it. Raises InputError if they cannot be written."""
    folder = os.path.dirname(os.path.abspath(f"{stem}{IMS}"))
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out: cannot make the folder {folder} ({error.strerror})") from None
    if not os.access(folder, os.W_OK):
        raise InputError(f"--out: no permission to write to the folder {folder}")
    for name in FILES:
        if os.path.isdir(f"{stem}{name}"):
            raise InputError(f"--out: {stem}{name} is a folder; move it away")
    if not os.path.basename(stem):
        say(
            f"notice: --out is a folder: {', '.join(FILES)} are written to it; the programs read "
            f"the files of a split: --out {stem}train gives {stem}train_{IMS}, ..."
        )
    return folder


def read_list(ids: Sequence[str] | None, stem: str, repeat_rows: bool) -> tuple[ImageIds, bool]:
    """The images of a list of ids, and whether its lines must be kept in a table of their own."""
    images = ImageIds(ids)
    if images.alike:
        one, other = images.alike[0]
        say(
            f"notice: {one!r} and {other!r} of the list of ids differ only in folder or ending, so "
            "such ids are looked for as they are written"
        )
    n, lines = len(images.names), images.lines
    if len(lines) == n:
        return images, False
    said = f"notice: the {len(lines)} lines of the list of ids name {n} images"
    if repeat_rows:  # Q45
        say(f"{said}: a row for each line is written")
        return images, False
    k = len(lines) // n
    irregular = lines != [line // k for line in range(len(lines))]
    table = f"; {stem}{TABLE} says which row a line names" if irregular else ""
    say(
        f"{said}: a row for each image is written, in the order in which they are first mentioned "
        f"(--repeat_rows: for each line){table}"
    )
    return images, irregular


def lines_to_write(path: str, ids: Sequence[str] | None, names: list[str]) -> list[str] | None:
    """The lines of {out}_ids.txt; None: it holds them. If it is the list itself, they are its ids.

    Blank lines and blanks beside an id, which training refuses, do not stay.
    """
    before = []
    if os.path.isfile(path):
        with open(path, encoding="utf-8", errors="replace", newline="\n") as lines:
            before = [line.removesuffix("\n") for line in lines]
    ids = [x.strip() for x in ids or ()]
    listed = [x for line in before if (x := line.removeprefix("\ufeff").strip())]
    wanted = ids if ids and listed == ids else names
    return None if wanted == before else wanted


def write_lines(path: str, lines: Sequence) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


def convert(
    paths: Sequence[str],
    out: str,
    ids: Sequence[str] | None = None,
    max_boxes: int = 36,
    dtype: str = "float32",
    img_dim: int | None = None,
    repeat_rows: bool = False,
) -> int:
    """Write the arrays of `out`; return the number of rows.

    Without `ids`, all images are written in file order. `ids` may name an image once per caption:
    these images are written in the order in which they are first mentioned; with `repeat_rows`, a
    row for each line. `img_dim` is the numbers of a region; None: found from the files. Raises
    InputError or FileNotFoundError with the file and the row, and then writes nothing.
    """
    stem = file_stem(out)
    folder = check_target(stem)
    images, irregular = read_list(ids, stem, repeat_rows)
    layout = Layout(paths, max_boxes, img_dim)
    arrays = layout.arrays(dtype)
    for name in (BOXES, SIZES):
        if layout.width and name not in arrays and os.path.exists(f"{stem}{name}"):
            raise InputError(f"{stem}{name}: of other images, and these come without; move it away")
    work = Conversion(images, layout)
    # The files are written beside their targets and renamed at the very end. So an interrupted run
    # leaves no files that look complete, and no rows in another order than their ids.
    prefix = os.path.basename(stem)
    with tempfile.TemporaryDirectory(prefix=prefix, suffix=".part", dir=folder) as scratch:
        with contextlib.ExitStack() as opened:
            writers = {}
            for name, kind in arrays.items():
                writers[name] = NpyWriter(os.path.join(scratch, name), *kind)
                opened.callback(writers[name].close)
            work.write(paths, writers)
        work.check_whole(paths)
        order = range(len(images.names)) if images.listed else list(work.rows)
        if images.listed and repeat_rows:
            order = images.lines
        rows = [work.rows[image] for image in order]
        if rows != list(range(len(work.rows))):
            for name in arrays:
                reorder(os.path.join(scratch, name), rows)
        files = list(arrays)
        names = [images.names[image] for image in order]
        if (lines := lines_to_write(f"{stem}{IDS}", ids, names)) is not None:
            write_lines(os.path.join(scratch, IDS), lines)
            files.append(IDS)
        if irregular:
            write_lines(os.path.join(scratch, TABLE), images.lines)
            files.append(TABLE)
        elif os.path.exists(f"{stem}{TABLE}"):
            say(
                f"notice: {stem}{TABLE} stays as it is and says which row the image of a caption "
                "has; remove it if it was made for other rows"
            )
        for name in files:
            os.replace(os.path.join(scratch, name), f"{stem}{name}")
    work.report(paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more")
    return len(rows)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", help="tsv, .npz or HDF5 files, or folders of .npz")
    parser.add_argument(
        "--out", required=True, help="folder and split, e.g. data/my_precomp/train; or folder/"
    )
    parser.add_argument(
        "--ids",
        help="file of image ids, one per line, or one per caption: write these, in this order. "
        "Numbers are compared as numbers, file names without folder and ending",
    )
    parser.add_argument(
        "--repeat_rows",
        action="store_true",
        help="write a row for each line of --ids, as SCAN's converter did",
    )
    parser.add_argument(
        "--max_boxes", type=COUNT, default=36, help="boxes per image, R (default: 36)"
    )
    parser.add_argument("--dtype", default="float32", choices=("float16", "float32"))
    parser.add_argument("--img_dim", type=COUNT, help="numbers per region; default: found")
    opt = parser.parse_args(argv)
    if opt.repeat_rows and not opt.ids:
        parser.error("--repeat_rows: give --ids, the list with a line per row")
    ids = read_ids(os.path.expanduser(opt.ids)) if opt.ids else None
    paths = [os.path.expanduser(path) for path in opt.files]
    n = convert(paths, opt.out, ids, opt.max_boxes, opt.dtype, opt.img_dim, opt.repeat_rows)
    print(f"{file_stem(opt.out)}{IMS}: {n} {'rows' if opt.repeat_rows else 'images'}")


if __name__ == "__main__":
    run(main, clean_up=True)
