"""The first stage of a search: a vector for each image or caption, kept in a folder, and an index.

The score of the first stage is the dot product of two vectors of unit length. A model that scores
by vectors has its own; of the others it is the mean of the regions and the mean of the words. The
vectors are computed in blocks, so memory does not grow with the data, and are written to a folder,
so that the next search starts at once. search.py and rerank.py use them; docs/search.md has the
figures.

Shapes: I images, C captions, N vectors, Q queries, R regions, W words, D joint dimension.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from data import PrecompDataset, collate_fn
from pairs import Encoding
from util.arrays import open_array
from util.cache_folders import writable
from util.cli import InputError, progress, replacing
from util.devices import to_device
from util.fingerprint import file_hash
from util.norms import l2norm
from util.npy_writer import NpyWriter

BLOCK = 256  # images or captions that are encoded at once
LARGE = 100_000  # vectors from which the index is approximate
FORMAT = 2  # of the kept files
SAMPLE = 16  # rows of features that a fingerprint reads
# The files of a split that say what an image is; `caption_item` needs none.
IMAGE_FILES = "ims", "num_boxes", "boxes", "ims_bbx", "ims_size", "who_ims"


# Vectors


def pooled_images(encoding: Encoding) -> Tensor:
    """The vectors (I, D) of encoded images, of unit length.

    They are the mean of 'regions' (I, R, D) over 'region_mask' (I, R); or, if the encoding has no
    regions, 'image' (I, D) as it is, since its dot products are the model's scores.
    """
    if "regions" not in encoding:
        return own_vector(encoding, "image")  # (I, D)
    regions, mask = encoding["regions"].float(), encoding.get("region_mask")  # (I, R, D), (I, R)
    if mask is not None:
        regions = regions.masked_fill(~mask[..., None], 0)  # (I, R, D)
    # The sum has the direction of the mean.
    return l2norm(regions.sum(1), dim=-1)  # (I, D)


def pooled_captions(encoding: Encoding) -> Tensor:
    """The vectors (C, D) of encoded captions, of unit length.

    They are the mean of 'words' (C, W, D) over 'lengths' (C,); or, if the encoding has no words,
    'sentence' (C, D) as it is.
    """
    if "words" not in encoding:
        return own_vector(encoding, "sentence")  # (C, D)
    words, lengths = encoding["words"].float(), encoding["lengths"]  # (C, W, D), (C,)
    there = torch.arange(words.size(1)) < lengths.cpu()[:, None]  # (C, W)
    words = words.masked_fill(~there.to(words.device)[..., None], 0)  # (C, W, D)
    return l2norm(words.sum(1), dim=-1)  # (C, D)


def own_vector(encoding: Encoding, name: str) -> Tensor:
    """The vector that a model itself gives to each image or caption."""
    if name not in encoding:
        raise InputError(
            f"the encodings of this model hold {', '.join(encoding)}, but neither regions and "
            "words nor image and sentence, so there is no first stage; search with --stages exact"
        )
    return encoding[name].float()


def encoded_groups(
    encode: Callable[[dict], Encoding], items: Sequence[dict[str, Tensor]], device: torch.device
) -> Iterator[tuple[list[int], Encoding]]:
    """Encode images, those with as many regions together, as evaluation.py does: without padding.

    Gives the places of a group in `items`, and its encoding.
    """
    groups: dict[int, list[int]] = {}
    for place, item in enumerate(items):
        groups.setdefault(len(item["images"]), []).append(place)
    for places in groups.values():
        batch = collate_fn([items[place] for place in places])
        yield places, encode(to_device(batch, device))


@torch.inference_mode()
def image_vectors(model: nn.Module, dataset: PrecompDataset) -> Iterator[np.ndarray]:
    """The vectors of all images, in blocks (b, D)."""
    device = next(model.parameters()).device
    for start in range(0, dataset.n_images, BLOCK):
        images = range(start, min(start + BLOCK, dataset.n_images))
        items = [dataset.image_item(image) for image in images]
        parts = list(encoded_groups(model.encode_images, items, device))
        x = torch.cat([pooled_images(encoding) for _, encoding in parts])  # (b, D)
        order = torch.tensor([place for places, _ in parts for place in places]).argsort()
        yield x.cpu()[order].numpy()


@torch.inference_mode()
def caption_vectors(model: nn.Module, dataset: PrecompDataset) -> Iterator[np.ndarray]:
    """The vectors of all captions, in blocks (b, D)."""
    device = next(model.parameters()).device
    for start in range(0, dataset.n_captions, BLOCK):
        captions = range(start, min(start + BLOCK, dataset.n_captions))
        batch = collate_fn([dataset.caption_item(caption) for caption in captions])
        encoding = model.encode_captions(to_device(batch, device))
        yield pooled_captions(encoding).cpu().numpy()  # (b, D)


# Kept vectors


class Kept(NamedTuple):
    """Vectors that are kept in files: what they are of, and how they are computed."""

    name: str  # of the files, without ending
    what: str  # images or captions
    about: dict  # if anything of it differs, the vectors are computed again
    count: int
    blocks: Callable[[], Iterator[np.ndarray]]


def image_features(dataset: PrecompDataset) -> dict:
    """What tells whether a split's images are still the same: files, and a sample of features."""
    stem, rows = dataset.path.removesuffix("_ims.npy"), dataset.rows.numpy()
    digest = hashlib.sha256(np.ascontiguousarray(rows).tobytes())
    for row in np.unique(np.linspace(0, len(rows) - 1, SAMPLE).astype(int)).tolist():
        digest.update(np.ascontiguousarray(dataset.images[int(rows[row])]).tobytes())
    files = {}
    for name in IMAGE_FILES:
        path = f"{stem}_{name}.npy"
        if os.path.isfile(path):
            state = os.stat(path)
            files[name] = [state.st_size, state.st_mtime_ns]
    return {
        "shape": list(dataset.images.shape),
        "files": files,
        "sample_sha256": digest.hexdigest(),
        "keep_empty_regions": dataset.keep_empty_regions,
    }


def caption_words(dataset: PrecompDataset) -> dict:
    """What tells whether a split's captions are still the same, as the model reads them."""
    digest = hashlib.sha256(np.ascontiguousarray(dataset.lengths.numpy()).tobytes())
    digest.update(np.ascontiguousarray(dataset.words.numpy()).tobytes())
    return {"captions": dataset.n_captions, "words_sha256": digest.hexdigest()}


def kept_vectors(places: Sequence[str], kept: Kept) -> tuple[np.ndarray, str]:
    """The vectors (N, D), memory-mapped, and the path of their files without ending.

    They are read from one of the folders `places`, if whole and of the same data, or else written.
    """
    faults = []
    for place in places:
        stem = os.path.join(place, kept.name)
        fault = fault_of(stem, kept.about, kept.count)
        if fault is None:
            return open_array(f"{stem}.npy", ndim=2), stem
        faults += [f"{stem}.npy: {fault}"] if fault else []
    for fault in faults:
        print(f"notice: {fault}; the vectors are computed again", flush=True)
    stem = os.path.join(writable(places), kept.name)
    write_vectors(stem, kept)
    print(f"notice: vectors of {kept.count:,} {kept.what} are kept in {stem}.npy", flush=True)
    return open_array(f"{stem}.npy", ndim=2), stem


def fault_of(stem: str, about: dict, count: int) -> str | None:
    """Why kept vectors cannot be taken; '': there are none; None: they can be taken."""
    if not os.path.isfile(f"{stem}.npy") and not os.path.isfile(f"{stem}.json"):
        return ""
    record = read_record(f"{stem}.json")
    if record is None or not os.path.isfile(f"{stem}.npy"):
        return "not whole, one of its two files (.npy, .json) is missing or damaged"
    if record.get("about") != about:
        return "made of other data, or of the data before it was changed"
    if not is_as_written(f"{stem}.npy", record.get("vectors")):
        return "damaged, it is not the file that was written"
    if open_array(f"{stem}.npy", ndim=2).shape[0] != count:
        return "made of other data"
    return None


def read_record(path: str) -> dict | None:
    """What a .json file of kept vectors holds; None if it is missing or damaged."""
    try:
        with open(path, encoding="utf-8") as file:
            record = json.load(file)
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def write_vectors(stem: str, kept: Kept) -> None:
    """Compute and write vectors, and then what they are of."""
    own = f".{os.getpid()}.part"  # another search may write them at the same time
    try:
        with replacing(f"{stem}.npy", own) as part, contextlib.ExitStack() as opened:
            write_blocks(part, kept, opened)
        write_record(f"{stem}.json", {"about": kept.about, "vectors": as_written(f"{stem}.npy")})
    except OSError as error:
        raise InputError(
            f"{stem}.npy: the vectors could not be written ({error.strerror or error}); give "
            "another folder with --cache FOLDER"
        ) from None


def write_blocks(path: str, kept: Kept, opened: contextlib.ExitStack) -> None:
    """Compute vectors and write them to a file, without a mapping, which dies of a full disk."""
    writer, row, steps = None, 0, math.ceil(kept.count / BLOCK)
    for block in progress(kept.blocks(), f"vectors of {kept.what}", steps):
        wrong = ~np.isfinite(block).all(1)
        if wrong.any():
            raise InputError(
                f"the vector of {kept.what[:-1]} {row + int(wrong.argmax())} (from 0) holds "
                "NaN or Inf; are the weights of the checkpoint finite?"
            )
        if writer is None:
            writer = NpyWriter(path, block.shape[1:], np.float32)
            opened.callback(writer.close)
        for vector in block:
            writer.write(vector)
        row += len(block)


def write_record(path: str, record: dict) -> None:
    own = f".{os.getpid()}.part"
    with replacing(path, own) as part, open(part, "w", encoding="utf-8") as file:
        json.dump(record, file, indent=1)


def as_written(path: str) -> dict:
    """What tells whether a file is still the one that was written."""
    state = os.stat(path)
    return {"bytes": state.st_size, "time": state.st_mtime_ns, "sha256": file_hash(path)}


def is_as_written(path: str, said) -> bool:
    """Whether a file is the one of which `said` was written down.

    Of a file of the same size and time the SHA-256 is not computed: that could take seconds.
    """
    if not isinstance(said, dict):
        return False
    state = os.stat(path)
    same = (said.get("bytes"), said.get("time")) == (state.st_size, state.st_mtime_ns)
    return same or said.get("sha256") == file_hash(path)


# The index


def here(path: str) -> list[int]:
    """What no copy of a file has: its number on the disk, and when it was last changed.

    faiss trusts a file that it reads. So an index is read only if it was written here.
    """
    state = os.stat(path)
    return [state.st_ino, state.st_size, state.st_ctime_ns]


def load_faiss():
    """The library faiss, or None if it is not installed."""
    try:
        import faiss
    except ImportError:
        return None
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


class VectorIndex:
    """Vectors (N, D), searched by dot products.

    `kind` is "flat", all vectors are compared, or from LARGE vectors on "IVF": the vectors are
    parted into cells (Sivic and Zisserman, Video Google, ICCV 2003; inverted files), and only those
    of the cells that are nearest to a query are compared. With `stem`, an IVF index is kept beside
    the vectors as `{stem}.faiss`; a file there is read only if it is the one that was written. A
    flat index does not need faiss. Raises InputError if IVF lacks it.
    """

    def __init__(self, vectors: np.ndarray, stem: str | None = None):
        self.count, self.numbers = vectors.shape
        self.kind = "flat" if self.count < LARGE else "IVF"
        self.faiss = load_faiss()
        if self.kind == "IVF":
            if self.faiss is None:
                raise InputError(
                    f"{self.count:,} vectors need an index of faiss (from {LARGE:,} on), which is "
                    "not installed: pip install faiss-cpu"
                )
            self.index = self._kept_cells(vectors, stem) if stem else self._cells(vectors)
            self.index.nprobe = probes(self.index.nlist)
        elif self.faiss is None:
            self.index = torch.from_numpy(np.array(vectors, np.float32))  # (N, D)
        else:
            self.index = self.faiss.IndexFlatIP(self.numbers)
            self.index.add(np.ascontiguousarray(vectors, np.float32))

    @property
    def about(self) -> str:
        """The index in words."""
        size = f"{self.count:,} vectors of {self.numbers} numbers"
        if self.kind == "flat":
            how = "matrix product" if self.faiss is None else "faiss"
            return f"flat index ({how}) of {size}: all are compared"
        cells = f"{self.index.nprobe} of {self.index.nlist:,} cells are compared"
        return f"IVF index (faiss) of {size}: {cells}"

    def search(self, queries: Tensor | np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The scores (Q, k) and rows (Q, k) of the nearest vectors of each query (Q, D).

        The highest score stands first; of equal scores, the first row. Where the compared cells of
        an IVF index hold fewer than k vectors, -1 stands for a row.
        """
        queries = np.ascontiguousarray(queries, np.float32)  # (Q, D)
        k = min(k, self.count)
        if isinstance(self.index, Tensor):
            found = (torch.from_numpy(queries) @ self.index.mT).topk(k)  # (Q, k)
            scores, rows = found.values.numpy(), found.indices.numpy()
        else:
            scores, rows = self.index.search(queries, k)  # (Q, k)
        order = np.lexsort((rows, -scores), axis=1)  # (Q, k)
        return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)

    def _cells(self, vectors: np.ndarray):
        """A new IVF index of the vectors."""
        faiss, n = self.faiss, self.count
        cells = math.isqrt(n)
        quantizer = faiss.IndexFlatIP(self.numbers)
        index = faiss.IndexIVFFlat(quantizer, self.numbers, cells, faiss.METRIC_INNER_PRODUCT)
        sample = np.random.default_rng(0).choice(n, min(n, 64 * cells), replace=False)
        print(f"notice: making an index of {n:,} vectors in {cells:,} cells", flush=True)
        index.cp.min_points_per_centroid = 1  # it warns of fewer than 39 vectors for a cell
        index.train(np.ascontiguousarray(vectors[np.sort(sample)], np.float32))
        for start in range(0, n, LARGE):
            index.add(np.ascontiguousarray(vectors[start : start + LARGE], np.float32))
        return index

    def _kept_cells(self, vectors: np.ndarray, stem: str):
        """The IVF index of the vectors in `{stem}.npy`, kept in `{stem}.faiss`."""
        path, record = f"{stem}.faiss", read_record(f"{stem}.json") or {}
        said, there = record.get("index"), os.path.isfile(path)
        if not (there and isinstance(said, dict) and said.get("here") == here(path)):
            if there:
                print(
                    f"notice: {path}: copied here, of other vectors, or damaged; the index is made "
                    "again"
                )
            index = self._cells(vectors)
            try:
                with replacing(path, f".{os.getpid()}.part") as part:
                    self.faiss.write_index(index, part)
                said = as_written(path) | {"here": here(path)}
                write_record(f"{stem}.json", record | {"index": said})
            except (OSError, RuntimeError) as error:  # faiss has errors of its own
                print(f"notice: {path}: the index could not be written ({error})")
                return index
        return self.faiss.read_index(path, self.faiss.IO_FLAG_MMAP)  # its vectors stay on the disk


def probes(cells: int) -> int:
    """How many of an index's cells are compared with a query.

    With a quarter, 98 of the first 100 images of 100,000 are found, and 99.7 of a million
    (docs/search.md).
    """
    return math.ceil(cells / 4)
