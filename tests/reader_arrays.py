"""The readers of arrays and other binary files; see tests/reader_cases.py."""

import base64
import gzip
import importlib.util
import io
import json
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

import exports
import report_seeds
from data import PrecompDataset
from gsmn_data import GraphDataset
from pfan_data import PositionDataset, WholeDataset
from score_files import beside, read_mean
from tests.conftest import WORDS, write_graphs, write_positions, write_split
from tests.extracted import Made, fields, made, write_tsv
from tests.reader_cases import Reader, mutate
from util import convert_data, positions
from vocab import SPECIAL, Vocabulary

IMAGES, CAPTIONS, REGIONS, NUMBERS_PER_REGION = 4, 2, 3, 6  # captions per image


# The files of a split


def vocabulary() -> Vocabulary:
    words = Vocabulary()
    for word in (*SPECIAL, "a", ".", *WORDS):
        words.add_word(word)
    return words


VOCABULARY = vocabulary()


def of_split(
    name: str,
    file: str,
    dataset: type[PrecompDataset],
    prepare: Callable[[Path], None] | None = None,
    edit: Callable | None = None,
    **arguments,
) -> Reader:
    """The reader of one file of a split, the other files of which are whole."""

    def make(folder: Path) -> Path:
        write_split(folder, "dev", IMAGES, CAPTIONS, REGIONS, NUMBERS_PER_REGION)
        write_graphs(folder, "dev", VOCABULARY)
        write_positions(folder, "dev", NUMBERS_PER_REGION)
        if prepare:
            prepare(folder / f"dev_{file}")
        return folder / f"dev_{file}"

    def read(path: Path) -> list:
        found = dataset(str(path.parent), "dev", VOCABULARY, **arguments)
        items = [found.image_item(image) for image in range(found.n_images)]
        captions = [found.caption_item(caption) for caption in range(found.n_captions)]
        return [items, captions, found.image_of, found.ids]

    return Reader(name, make, read, edit=edit)


def save_counts(path: Path) -> None:
    np.save(path, np.array([3, 2, 1, 3], np.int32))


def save_sizes_as_dicts(path: Path) -> None:
    sizes = [{"image_w": 300 + n, "image_h": 200} for n in range(IMAGES)]
    np.save(path, np.array(sizes, dtype=object), allow_pickle=True)


def save_plain_sizes(path: Path) -> None:
    np.save(path, np.full((IMAGES, 2), 400.0, np.float32))


def save_ids(path: Path) -> None:
    path.write_text("".join(f"COCO_val2014_{n:012}.jpg\n" for n in range(IMAGES)))


def save_ids_of_captions(path: Path) -> None:
    path.write_text("".join(f"{1000 + n // CAPTIONS}\n" for n in range(CAPTIONS * IMAGES)))


def save_rows(path: Path) -> None:
    path.write_text("".join(f"{n % IMAGES}\n" for n in range(CAPTIONS * IMAGES)))


def edit_npy(data: bytes, rng: random.Random) -> bytes:
    """Another header before the same content, which may then have another place."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    content = data[file.tell() :]
    sizes = "0", "1", "-1", "True", "1e30", "2**3", "9" * 4000, str(2**62), str(2**31), "()", "'1'"
    lengths = [str(n) for n in shape]
    where = rng.randrange(len(lengths) + 1)
    lengths[where : where + rng.randrange(2)] = [rng.choice(sizes)] * rng.choice([1, 1, 2, 70])
    descr = np.lib.format.dtype_to_descr(dtype)
    if rng.random() < 0.5:
        descr = rng.choice(
            ["<f8", ">f4", "<c8", "|O", "?", "<M8[ns]", "<U9999999", f"S{'9' * 5000}", "|V0", "e"]
            + [[("a", "<f4", (10**6, 10**6))], ("<f4", (2, 2)), [("\n" * 900, "<i4")], 7, None]
            + [[(("title", "image_w"), "<i4"), ("image_h", "<i4")], [("image_w", [("x", "<f4")])]]
            + [[("image_w", "<f8"), ("image_h", "<U5")], [("image_w", "O"), ("image_h", "<i8")]]
        )
    fortran = rng.choice([fortran, True, "1", None])
    text = f"{{'descr': {descr!r}, 'fortran_order': {fortran!r}, 'shape': ({', '.join(lengths)},)}}"
    if rng.random() < 0.05:
        text = rng.choice(["[" * 9000, "-" * 9000 + "1", "{" + "1:{" * 3000, "a" * 100])
    head, length = text.encode() + b"\n", len(text) + 1
    if rng.random() < 0.1:
        length = rng.choice([0, 1, 2**16 - 1, 3 * 2**30])
    if rng.random() < 0.3 or length >= 2**16:
        version = rng.choice([(2, 0), (3, 0), (1, 1), (4, 0)])
    width = 2 if version[0] == 1 and length < 2**16 else 4
    return b"\x93NUMPY" + bytes(version) + length.to_bytes(width, "little") + head + content


def read_positions(path: Path) -> np.ndarray:
    """PFAN's blocks, computed from boxes."""
    target = path.parent / "new_boxes.npy"
    positions.convert(str(path.parent / "dev"), target=str(target))
    return np.load(target)


SPLIT = [
    of_split("ims.npy", "ims.npy", PrecompDataset, edit=edit_npy),
    of_split("ims_bbx.npy", "ims_bbx.npy", GraphDataset, edit=edit_npy),
    of_split("ims_bbx.npy (positions)", "ims_bbx.npy", GraphDataset, edit=edit_npy)._replace(
        read=read_positions
    ),
    of_split("ims_size.npy (structured)", "ims_size.npy", GraphDataset, edit=edit_npy),
    of_split("ims_size.npy (dicts)", "ims_size.npy", GraphDataset, save_sizes_as_dicts),
    of_split("ims_size.npy (plain)", "ims_size.npy", GraphDataset, save_plain_sizes, edit_npy),
    of_split("num_boxes.npy", "num_boxes.npy", PrecompDataset, save_counts, edit_npy),
    of_split("boxes.npy", "boxes.npy", PositionDataset, edit=edit_npy),
    of_split("who_ims.npy", "who_ims.npy", WholeDataset, edit=edit_npy),
    of_split("ids.txt (a row each)", "ids.txt", PrecompDataset, save_ids),
    of_split("ids.txt (a caption each)", "ids.txt", PrecompDataset, save_ids_of_captions),
    of_split("caption_image.txt", "caption_image.txt", PrecompDataset, save_rows),
    of_split("precaps_stan.txt", "precaps_stan.txt", GraphDataset, dependencies=True),
    of_split("caps.json", "caps.json", GraphDataset, dependencies=True),
]


# Features as extractors write them


def pictures() -> list[Made]:
    return [made(f"COCO_val2014_{n:012}.jpg", REGIONS, 8, seed=1) for n in range(3)]


def make_tsv(folder: Path) -> Path:
    return Path(write_tsv(folder / "features.tsv", *map(fields, pictures())))


def make_lxmert(folder: Path) -> Path:
    names = (
        "img_id img_h img_w objects_id objects_conf attrs_id attrs_conf num_boxes boxes features"
    )
    rows = [names.split()]
    for name, width, height, n, boxes, features in map(fields, pictures()):
        more = [base64.b64encode(bytes(8 * REGIONS)).decode()] * 4
        rows.append([name, height, width, *more, n, boxes, features])
    return Path(write_tsv(folder / "lxmert.tsv", *rows))


def make_zipped_tsv(folder: Path) -> Path:
    path = folder / "features.tsv.gz"
    path.write_bytes(gzip.compress(make_tsv(folder).read_bytes(), mtime=0))
    return path


def of_picture() -> dict[str, np.ndarray]:
    """The arrays of a picture."""
    picture = pictures()[0]
    width, height = picture.size
    return {
        "image_id": np.array(picture.name),
        "features": picture.features,
        "bbox": picture.boxes,
        "num_bbox": np.array(REGIONS),
        "image_w": np.array(width),
        "image_h": np.array(height),
    }


def make_npz(folder: Path) -> Path:
    np.savez_compressed(folder / "picture.npz", **of_picture())
    return folder / "picture.npz"


def edit_members(data: bytes, rng: random.Random) -> bytes:
    """An archive with right checksums of damaged arrays, or with other names."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        names = old.namelist()
        spoiled = rng.choice(names)
        for name in names:
            content = old.read(name)
            if name == spoiled:
                content = rng.choice([other_scalar, edit_npy, mutate])(content, rng)
                name = rng.choice([name] * 9 + ["x.npy"])
            method = rng.choice([zipfile.ZIP_DEFLATED] * 9 + [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
            new.writestr(name, content, method)
    return out.getvalue()


def other_scalar(data: bytes, rng: random.Random) -> bytes:
    """Another array in the place of one."""
    values = np.nan, np.inf, -1, 2.9, 1e30, 1e300, 2**62, True, "a\nb", "9" * 5000, "\x1b[2J", 1j
    value = np.array(
        rng.choice([*values, np.datetime64("2020-01-01"), b"\xff\n", [], [[]], [1, 2]])
    )
    file = io.BytesIO()
    np.save(
        file, np.full(rng.choice([(), (1,), (1, 1), (3, 4)]), value) if value.size == 1 else value
    )
    return file.getvalue()


def make_hdf5(folder: Path) -> Path:
    import h5py

    with h5py.File(folder / "features.h5", "w") as file:
        for number in range(3):
            group = file.create_group(f"picture_{number}")
            for name, value in of_picture().items():
                if name != "image_id":
                    group[name] = value
    return folder / "features.h5"


def read_converted(path: Path) -> list:
    """What util/convert_data.py writes of the features of a file."""
    folder = path.parent / "converted"
    shutil.rmtree(folder, ignore_errors=True)
    convert_data.convert([str(path)], f"{folder}/dev", max_boxes=REGIONS)
    found = [np.load(file) for file in sorted(folder.glob("*.npy"))]
    return [*found, (folder / "dev_ids.txt").read_text(encoding="utf-8")]


FEATURES = [
    Reader("tsv", make_tsv, read_converted),
    Reader("tsv (LXMERT)", make_lxmert, read_converted),
    Reader("tsv.gz", make_zipped_tsv, read_converted, checked=True),
    Reader("npz", make_npz, read_converted, checked=True),
    Reader("npz (other members)", make_npz, read_converted, edit=edit_members),
]
if importlib.util.find_spec("h5py"):
    FEATURES.append(Reader("HDF5", make_hdf5, read_converted))


# Score matrices


def scores() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(IMAGES, CAPTIONS * IMAGES)).astype(np.float32)


def make_scores(folder: Path) -> Path:
    np.save(folder / "scores.npy", scores())
    return folder / "scores.npy"


def make_dumped_scores(folder: Path) -> Path:
    scores().dump(folder / "scores.npy")
    return folder / "scores.npy"


def make_chan_scores(folder: Path) -> Path:
    whole = np.array({"npts": IMAGES, "sims": scores()}, dtype=object)
    np.save(folder / "scores.npy", whole, allow_pickle=True)
    return folder / "scores.npy"


def make_image_of(folder: Path) -> Path:
    path = Path(beside(str(make_scores(folder))))
    save_rows(path)
    return path


def read_scores(path: Path) -> tuple:
    return read_mean(str(path.with_name("scores.npy")))


def make_figures(folder: Path) -> Path:
    path = folder / "figures.json"
    path.write_text(json.dumps({"metrics": {"i2t": {"r1": 50.0}}, "split": "dev"}))
    return path


def make_curves(folder: Path) -> Path:
    """Two settings over two seeds and three epochs, as scripts/compare.py writes them."""
    path = folder / "curves.json"
    rsum = [[100.0, 200.5, 300.0], [110.0, 190.0, 310.0]]
    one = {"title": "SCAN --margin 0.1", "flags": "", "seeds": [0, 1], "rsum": rsum}
    one |= {"mean": [105.0, 195.0, 305.0], "interval": [[90, 120], [180, 210], [290, 320]]}
    test = {"a": "a", "b": "b", "where": "dev, epoch 2", "difference": -1.5, "p_holm": 0.5}
    test |= {"interval": [-3.0, 0.5], "smallest": 4.0}
    record = {"data": "tiny", "settings": {"a": one, "b": one | {"interval": None}}}
    path.write_text(json.dumps(record | {"tests": [test]}))
    return path


SCORES = [
    Reader("scores", make_scores, read_scores, edit=edit_npy),
    Reader("scores (array.dump)", make_dumped_scores, read_scores),
    Reader("scores (CHAN's dict)", make_chan_scores, read_scores),
    Reader("scores' caption_image.txt", make_image_of, read_scores),
    Reader("figures of --json", make_figures, lambda path: exports.check_figures(str(path))),
    Reader("curves over seeds", make_curves, lambda path: str(report_seeds.section(str(path)))),
]


READERS = [*SPLIT, *FEATURES, *SCORES]
