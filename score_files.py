"""Score matrices in files: written by evaluation.py, or dumped by the published programs.

A matrix (N, M) of N images and M captions is a plain float32 .npy. If its captions do not stand
image by image, as many for each image, `{name}_caption_image.txt` beside `{name}.npy` holds a line
per caption: the image (the row of the matrix, from 0) that it describes.
"""

import os
import reprlib  # what repr() says of a hostile file may have no end
import tempfile
from collections.abc import Sequence

import numpy as np

from util.captions import read_lines
from util.cli import InputError, replacing
from util.folders import splits_in
from util.npy_reader import type_name
from util.plain_pickle import load_objects


def beside(path: str) -> str:
    """The file that says which image each caption of a saved matrix describes."""
    return f"{path.removesuffix('.npy')}_caption_image.txt"


def check_target(path: str) -> None:
    """Raise InputError, before hours of scoring, if an output cannot be written there.

    Files of a data set are never replaced.
    """
    real = os.path.realpath(path)
    folder, name = os.path.split(real)
    if os.path.isdir(path) or not os.path.isdir(folder):
        raise InputError(f"{path}: expected a file in an existing folder; nothing was scored")
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{path}: not a file that can be replaced; give another name")
    if os.path.exists(path) and any(name.startswith(f"{x}_") for x in splits_in(folder)):
        raise InputError(f"{path}: exists, and is a file of the data; give another name")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"{path}: the folder cannot be written to ({error.strerror}); nothing was scored"
        ) from None


def check_matrix_target(path: str) -> None:
    """check_target of a score matrix, which may get a table beside it."""
    check_target(path)
    if os.path.exists(beside(path)) and not os.path.exists(path):
        raise InputError(
            f"{path}: {beside(path)} exists and belongs to something else; give another name"
        )


def in_order(image_of: Sequence[int], n_images: int) -> bool:
    """Whether the captions stand image by image, as many for each image."""
    m = len(image_of)
    return m % n_images == 0 and np.array_equal(image_of, np.arange(m) // (m // n_images))


def save_scores(path: str, scores: np.ndarray, image_of: Sequence[int] | None) -> None:
    """Write scores (N, M), and the images of the captions (M,) if they are not in order."""
    table = beside(path)
    with replacing(path) as part, open(part, "wb") as file:  # np.save would append .npy to a name
        np.save(file, scores)
    if image_of is not None and not in_order(image_of, len(scores)):
        with replacing(table) as part, open(part, "w") as file:
            file.writelines(f"{int(image)}\n" for image in image_of)
    elif os.path.isfile(table):
        os.remove(table)  # of the matrix that was replaced
    print(f"Scores saved to {path}")


def read_image_of(path: str, shape: tuple[int, int]) -> np.ndarray | None:
    """The image of each caption of the saved matrix at `path`; None: they are in order."""
    table = beside(path)
    if not os.path.isfile(table):
        return None
    lines = read_lines(table)
    images, captions = shape
    known = {str(image) for image in range(images)}
    if len(lines) != captions or not known.issuperset(lines):
        raise InputError(
            f"{table}: expected {captions} lines, the image of each caption, from 0 to "
            f"{images - 1}; it belongs to another matrix"
        )
    return np.array([int(line) for line in lines])


def mean_scores(paths: str | Sequence[str]) -> np.ndarray:
    """The mean of saved score matrices (images, captions); see read_mean."""
    return read_mean(paths)[0]


def read_mean(
    paths: str | Sequence[str], parts: list[np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """The mean of saved score matrices (N, M), and the image of each caption (None: in order).

    The files are those that evalrank writes to `save_path`, or those that the published programs
    dumped. The matrices themselves are appended to `parts`, if it is given. Raises
    FileNotFoundError or ValueError that names the file that does not fit.
    """
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    scores = image_of = None
    for path in map(os.path.expanduser, paths):
        part = load_objects(path)
        if part.dtype == object and part.shape == ():  # CHAN's: {'npts': images, 'sims': scores}
            whole = part.item()
            sims = whole.get("sims") if isinstance(whole, dict) else None
            part = sims if isinstance(sims, np.ndarray) else part
        if part.ndim != 2 or part.dtype.kind != "f" or 0 in part.shape:
            raise InputError(
                f"{path}: {type_name(part.dtype)} of shape {reprlib.repr(part.shape)}, expected "
                "scores (images, captions)"
            )
        if scores is not None and part.shape != scores.shape:
            raise InputError(
                f"{path}: scores {part.shape} images x captions, the files before it {scores.shape}"
            )
        own = read_image_of(path, part.shape)
        if scores is not None and not np.array_equal(own, image_of):
            raise InputError(
                f"{path}: its captions describe other images than those of the files before it "
                f"({beside(path)}); an ensemble needs one split"
            )
        image_of = own
        if parts is not None:
            parts.append(part)
        scores = part.astype(np.float64) if scores is None else scores + part
    if scores is None:
        raise InputError("no score matrix to evaluate")
    return scores / len(paths), image_of
