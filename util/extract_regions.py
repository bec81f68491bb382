"""Turn a folder of pictures into the region features that the other programs read.

    python util/extract_regions.py PHOTOS --out data/mine_precomp --split test
    python util/extract_regions.py PHOTOS --out data/mine_precomp --split train \\
        --ids train_ids.txt --captions train_caps.txt --backend transformers --weights DIR_OR_NAME

It writes {split}_ims.npy (N, R, F) in float16, {split}_ims_bbx.npy (N, R, 4) in pixels,
{split}_ims_size.npy, {split}_num_boxes.npy (N,), {split}_who_ims.npy (N, F), the whole pictures,
{split}_ids.txt, the file names, and {split}_extractor.json, which says how they were made. They
appear when all are whole; what is done until then lies in {split}_extract.part, and the same
command goes on there. docs/own_images.md explains it. Shapes: N pictures, R regions, F numbers.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # when run by path

from util.arguments import COUNT, Parser  # noqa: E402
from util.cli import InputError, replacing, run, say  # noqa: E402
from util.convert_data import SIZE  # noqa: E402
from util.extractor_settings import AGAIN, SETTINGS, read_settings  # noqa: E402
from util.folders import SPLITS  # noqa: E402
from util.image_ids import read_ids  # noqa: E402
from util.json_file import read_object, shown_value  # noqa: E402
from util.npy_writer import NpyWriter  # noqa: E402
from util.photo_folder import (  # noqa: E402
    Photos,
    choose_photos,
    read_photo_captions,
    warn_of_skipped,
    write_photo_captions,
)
from util.pictures import open_picture, pillow  # noqa: E402
from util.region_backends import BACKENDS, DEFAULT, Extractor, open_extractor  # noqa: E402
from util.region_backends.given_boxes import GivenBoxes  # noqa: E402

ARRAYS = ("ims.npy", "ims_bbx.npy", "ims_size.npy", "num_boxes.npy", "who_ims.npy")
IMS, BOXES, SIZES, COUNTS, WHOLE = ARRAYS
IDS = "ids.txt"
# What belongs to other pictures, or boxes, if these files are replaced.
OF_CAPTIONS = ["caps.txt", "caption_image.txt", "sent_caps.txt", "precaps_stan.txt", "caps.json"]
OF_BOXES = ["boxes.npy"]
BATCH = {"cpu": 4}  # on two cores three times as fast as 32, in half the memory
READERS = 2  # threads that decode pictures; each may hold one of MAX_PIXELS
MOST_WARNINGS = 10
EVERY = 60  # seconds between two lines about the progress, where there is no bar
LARGEST = np.finfo(np.float16).max


class ResumedNpy(NpyWriter):
    """A NpyWriter that can go on behind the first `rows` rows of a file."""

    def __init__(self, path: str, row_shape: tuple[int, ...], dtype: np.dtype, rows: int):
        if not rows:
            super().__init__(path, row_shape, dtype)
            return
        self.path, self.row_shape, self.dtype = path, row_shape, np.dtype(dtype)
        self.rows = rows
        self.file = open(path, "r+b")
        self._header()
        self.start = self.file.tell()
        end = self.start + rows * int(np.prod(row_shape, dtype=int)) * self.dtype.itemsize
        if os.path.getsize(path) < end:
            self.file.close()
            raise InputError(f"{path}: shorter than its {rows} rows; --overwrite begins afresh")
        self.file.truncate(end)
        self.file.seek(end)


class State:
    """How far an extraction is; {split}_extract.part/state.json keeps it."""

    def __init__(self, folder: str, settings: dict):
        self.path, self.settings = os.path.join(folder, "state.json"), settings
        self.done = self.rows = 0  # pictures that were looked at, and rows of the arrays
        self.broken: list[list[str]] = []  # names and faults
        self.whole = False  # only the renaming is left

    def read(self) -> dict | None:
        """Read the file; return its settings. None: there is none."""
        if not os.path.isfile(self.path):
            return None
        found = read_object(self.path, AGAIN)
        done, rows, broken = (found.get(name) for name in ("done", "rows", "broken"))
        fits = all(type(x) is int for x in (done, rows)) and 0 <= rows <= done
        fits = fits and isinstance(broken, list) and all(map(is_pair, broken))
        if not fits or not isinstance(found.get("settings"), dict):
            raise InputError(f"{self.path}: damaged; --overwrite begins afresh")
        self.done, self.rows, self.broken = done, rows, broken
        self.whole = found.get("whole") is True
        return found["settings"]

    def write(self) -> None:
        with replacing(self.path) as part:
            kept = {name: value for name, value in vars(self).items() if name != "path"}
            Path(part).write_text(json.dumps(kept), encoding="utf-8")


def is_pair(x) -> bool:
    return isinstance(x, list) and [*map(type, x)] == [str, str]


class Extraction:
    """Extracts pictures batch by batch into files that are renamed when they are whole."""

    def __init__(self, stem: str, photos: Photos, extractor: Extractor, given: GivenBoxes | None):
        self.stem, self.photos, self.extractor, self.given = stem, photos, extractor, given
        self.folder = f"{stem}_extract.part"
        self.most = extractor.regions if given is None else given.most  # R
        self.settings = extractor.settings | {
            "width": extractor.width,
            "boxes_sha256": None if given is None else given.digest,
            "pictures": len(photos.names),
            "pictures_sha256": photos.digest(),
        }
        self.state = State(self.folder, self.settings)

    def is_there(self) -> bool:
        """Whether the files of just these pictures and settings are there, whole."""
        if not all(os.path.isfile(f"{self.stem}_{x}") for x in (*ARRAYS, IDS, SETTINGS)):
            return False
        return self._differs(read_object(f"{self.stem}_{SETTINGS}", AGAIN)) is None

    def _differs(self, other: dict) -> str | None:
        """In words, the first setting that another extraction has otherwise; None: none."""
        for key, value in self.settings.items():
            if key != "weights" and other.get(key) != value:  # they may lie elsewhere now
                if key == "pictures":
                    return f"other pictures ({shown_value(other.get(key))} before, now {value})"
                if key.endswith("sha256"):
                    return f"other {key.removesuffix('_sha256')}"
                return f"{key} {shown_value(other.get(key))}, not {value}"
        return None

    def warn_of_others(self) -> None:
        """Warn if another split of the folder was extracted otherwise: a model needs them alike."""
        folder, split = os.path.split(self.stem)
        for other in SPLITS:
            found = read_settings(os.path.join(folder, other)) if other != split else None
            for key in ("backend", "weights_sha256", "grid", "regions", "given_boxes"):
                if found and found.get(key) != self.settings[key]:
                    say(
                        f"warning: {folder}: {other} was extracted with {key} "
                        f"{shown_value(found.get(key))}, and {split} with {self.settings[key]}; a "
                        "model needs them alike"
                    )
                    return

    def prepare(self, overwrite: bool) -> None:
        """Read how far an earlier run came. Raises InputError if files of others are in the way."""
        os.makedirs(os.path.dirname(self.stem) or ".", exist_ok=True)
        try:
            before = self.state.read()
            differs = None if before is None else self._differs(before)
        except InputError as error:
            if not overwrite:
                raise
            differs = str(error)
        if differs and not overwrite:
            raise InputError(
                f"{self.folder}: an extraction with {differs} was begun; finish it with its own "
                "command, or begin afresh with --overwrite"
            )
        if differs:
            shutil.rmtree(self.folder)
            self.state = State(self.folder, self.settings)
        there = [name for name in (*ARRAYS, IDS) if os.path.exists(f"{self.stem}_{name}")]
        if there and not overwrite and not self.state.whole:
            path = f"{self.stem}_{SETTINGS}"
            known = read_object(path, AGAIN) if os.path.isfile(path) else None
            differs = f"no {path}" if known is None else self._differs(known)
            raise InputError(
                f"{self.stem}_{there[0]}: is there already, of other pictures or settings "
                f"({differs or 'not all of its files'}); choose another --out or --split, or "
                "replace it with --overwrite"
            )
        os.makedirs(self.folder, exist_ok=True)
        if self.state.done and not self.state.whole:
            say(
                f"notice: {self.folder}: going on behind {self.state.done:,} of "
                f"{len(self.photos.names):,} pictures"
            )
        self.state.write()

    def run(self, batch_size: int) -> None:
        """Extract what is left, a batch at a time; then the state is whole."""
        r, f = self.most, self.extractor.width
        kinds = [((r, f), np.float16), ((r, 4), np.float32), ((), SIZE), ((), np.int32)]
        kinds.append(((f,), np.float32))
        with contextlib.ExitStack() as opened:
            writers = {}
            for name, kind in zip(ARRAYS, kinds, strict=True):
                path = os.path.join(self.folder, name)
                writers[name] = ResumedNpy(path, *kind, self.state.rows)
                opened.callback(writers[name].close)
            for names, prepared in self._batches(batch_size):
                self._extract(names, prepared, writers)
                for writer in writers.values():
                    writer.file.flush()
                self.state.write()
        if not self.state.rows:
            name, fault = self.state.broken[0]
            raise InputError(f"none of the pictures could be read, the first: {fault}")
        self.state.whole = True
        self.state.write()

    def _load(self, name: str):
        """A picture as the network reads it, or what is wrong with it."""
        try:
            return self.extractor.prepare(open_picture(os.path.join(self.photos.folder, name)))
        except (InputError, OSError) as error:
            return str(error)

    def _batches(self, batch_size: int) -> Iterator[tuple[list[str], list]]:
        """The names of each batch and what _load gives; the next batch is read meanwhile."""
        names, start = self.photos.names, self.state.done
        batches = [names[k : k + batch_size] for k in range(start, len(names), batch_size)]
        bar = tqdm(total=len(names), initial=start, leave=False, disable=not sys.stderr.isatty())
        began = said = time.monotonic()
        readers = ThreadPoolExecutor(READERS)
        try:
            ahead = readers.map(self._load, batches[0]) if batches else None
            for k, batch in enumerate(batches):
                prepared = list(ahead)
                if k + 1 < len(batches):
                    ahead = readers.map(self._load, batches[k + 1])
                yield batch, prepared
                bar.update(len(batch))
                now = time.monotonic()
                if bar.disable and now - said > EVERY:
                    said, rate = now, (self.state.done - start) / (now - began)
                    say(f"{self.state.done:,} of {len(names):,} pictures, {rate:.1f} a second")
        finally:
            readers.shutdown(cancel_futures=True)
            bar.close()
        seconds = max(time.monotonic() - began, 1e-9)
        n = len(names) - start
        if n:
            say(f"{n:,} picture{'s'[: n - 1]} read in {seconds:.0f} s, {n / seconds:.1f} a second")

    def _extract(self, names: list[str], prepared: list, writers: dict[str, NpyWriter]) -> None:
        """Write the rows of a batch."""
        whole = []
        for name, found in zip(names, prepared, strict=True):
            if isinstance(found, str):
                self.state.broken.append([name, found])
                if len(self.state.broken) <= MOST_WARNINGS:
                    say(f"warning: {found}; it is skipped")
            else:
                whole.append((name, found))
        boxes = None
        if self.given:
            boxes = [self.given.of(name, found.size) for name, found in whole]
        rows = self.extractor.run([found for _, found in whole], boxes) if whole else []
        for (name, _), regions in zip(whole, rows, strict=True):
            n = len(regions.features)
            if np.abs(regions.features).max() > LARGEST:
                raise InputError(f"{name}: a feature above {LARGEST:g}, too large for float16")
            filling = ((0, self.most - n), (0, 0))
            writers[IMS].write(np.pad(regions.features, filling))
            writers[BOXES].write(np.pad(regions.boxes, filling))
            writers[SIZES].write(np.array(regions.size, SIZE))
            writers[COUNTS].write(np.array(n))
            writers[WHOLE].write(regions.whole)
        self.state.done += len(names)
        self.state.rows += len(whole)

    def finish(self) -> None:
        """Rename the whole files, and say what was skipped."""
        broken = [name for name, _ in self.state.broken]
        lost = set(broken)
        ids = "".join(f"{name}\n" for name in self.photos.names if name not in lost)
        old = Path(f"{self.stem}_{IDS}")
        others = old.is_file() and old.read_text("utf-8", "replace") != ids
        told = self.settings | {"photos": self.photos.folder, "skipped": broken}
        Path(self.folder, IDS).write_text(ids, encoding="utf-8", newline="\n")
        Path(self.folder, SETTINGS).write_text(json.dumps(told, indent=1), encoding="utf-8")
        for name in (*ARRAYS, IDS, SETTINGS):
            if os.path.exists(os.path.join(self.folder, name)):  # else renamed before a stop
                os.replace(os.path.join(self.folder, name), f"{self.stem}_{name}")
        shutil.rmtree(self.folder)
        names = OF_CAPTIONS + OF_BOXES if others else OF_BOXES
        stale = [name for name in names if os.path.exists(f"{self.stem}_{name}")]
        if stale:
            say(
                f"warning: {self.stem}_{', '.join(stale)}: older than these features; if made for "
                "others, make it again, or move it away"
            )
        warn_of_skipped(broken, self.photos, f"{self.stem}_{SETTINGS}")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=os.path.expanduser, help="folder of pictures")
    parser.add_argument(
        "--out", required=True, type=os.path.expanduser, help="folder, e.g. data/mine_precomp"
    )
    parser.add_argument("--split", default="test", choices=SPLITS, help="default: test")
    parser.add_argument("--backend", default=DEFAULT, choices=tuple(BACKENDS))
    parser.add_argument(
        "--weights", help="file, folder or name; a name may be fetched from the network"
    )
    parser.add_argument("--ids", help="list of file names: these pictures, in this order")
    parser.add_argument(
        "--captions",
        help="lines of file name, tab, caption; with --ids also captions only, k for each id",
    )
    parser.add_argument("--grid", type=COUNT, help="windows of a side (default: 6)")
    parser.add_argument("--regions", type=COUNT, help="detectors, --boxes: most boxes (36; all)")
    parser.add_argument("--boxes", help=".tsv, .npz or folder of .npz with boxes from elsewhere")
    parser.add_argument("--batch_size", type=COUNT, help="default: 32 on a GPU, 4 on a CPU")
    parser.add_argument("--device", default="auto", help="auto (default) | cpu | cuda | cuda:1")
    parser.add_argument("--half", action="store_true", help="compute in float16 on a GPU")
    parser.add_argument("--overwrite", action="store_true", help="replace files of other settings")
    return parser


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options. Raises InputError if some do not go together."""
    opt = build_parser().parse_args(argv)
    detector = opt.backend == "torchvision"
    if opt.grid and (opt.boxes or detector):
        raise InputError(f"--grid: {'--boxes' if opt.boxes else 'a detector'} says the regions")
    if opt.regions and not (opt.boxes or detector):
        raise InputError(f"--regions is for detectors and --boxes; {opt.backend} takes --grid")
    return opt


def main(argv: Sequence[str] | None = None) -> None:
    opt = read_options(argv)
    pillow()  # better now than after the network is read
    ids = read_ids(os.path.expanduser(opt.ids)) if opt.ids else None
    photos = choose_photos(opt.photos, ids)
    captions = None
    if opt.captions:
        path = os.path.expanduser(opt.captions)
        captions = read_photo_captions(path, photos.names, photos.lines)
    given = None
    if opt.boxes:
        given = GivenBoxes(os.path.expanduser(opt.boxes), photos.names, opt.regions)
    wanted = {
        name: getattr(opt, name) for name in ("backend", "weights", "grid", "regions", "half")
    }
    wanted["given_boxes"] = given is not None
    extractor = open_extractor(wanted, opt.device, download=True)
    stem = os.path.join(opt.out, opt.split)
    work = Extraction(stem, photos, extractor, given)
    work.warn_of_others()
    if not opt.overwrite and not os.path.isfile(work.state.path) and work.is_there():
        shutil.rmtree(work.folder, ignore_errors=True)  # a stop at the very end leaves it
        say(f"notice: {stem}_{IMS}: is there already, of just these pictures and settings")
    else:
        work.prepare(opt.overwrite)
        try:
            if not work.state.whole:
                work.run(opt.batch_size or BATCH.get(extractor.device.type, 32))
        except KeyboardInterrupt:
            say(f"notice: {work.state.done:,} pictures are done; the same command goes on")
            raise
        work.finish()
    skipped = set(map(str, read_settings(stem).get("skipped") or ()))
    n = len(photos.names) - len(skipped)
    print(f"{stem}_{IMS}: {n:,} images, {work.most} regions of {extractor.width} numbers")
    if captions is not None:
        write_photo_captions(stem, photos, captions, skipped, opt.overwrite)


if __name__ == "__main__":
    run(main, clean_up=True)
