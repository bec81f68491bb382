"""Writes a checkpoint so that a kill, a power cut or a full disk leaves the older ones whole."""

import contextlib
import os
import shutil

import torch
from torch import Tensor

from util import checkpoint_files
from util.cli import InputError


class SaveError(InputError):
    """A checkpoint could not be written; the message says what is needed and what is whole."""


def save(state: dict, directory: str, name: str, is_best: bool = False, keep: int = 0) -> None:
    """Write `directory/name`, and `model_best.pth.tar` if it is the best: beside, then renamed.

    A run killed while it writes leaves the old files whole. The best is renamed first: a run that
    dies between the two resumes from the older checkpoint and comes to the same best again. Then
    the checkpoints of all but the newest `keep` epochs are removed; 0 keeps all. Raises SaveError
    on a full disk, or if the folder cannot be written.
    """
    path = os.path.join(directory, name)
    best = os.path.join(directory, checkpoint_files.BEST)
    parts = [f"{x}{checkpoint_files.PART}" for x in (path, best)]
    run = state.get("run")
    try:
        with open(parts[0], "wb") as file:
            torch.save(state, file)
        checkpoint_files.seal(parts[0], (run["epoch"], run["batch"]) if run else None)
        sync(parts[0])
        if is_best:
            shutil.copyfile(*parts)
            sync(parts[1])
            os.replace(parts[1], best)
        os.replace(parts[0], path)
        if hasattr(os, "O_DIRECTORY"):  # elsewhere a folder cannot be opened
            sync(directory)
    except BaseException as error:  # a full disk, a second Ctrl-C: leave no half file
        for part in parts:
            with contextlib.suppress(OSError):
                os.remove(part)
        cause = os_error_of(error)
        if cause is None:
            raise
        needed = bytes_of(state) * (1 + is_best)
        raise SaveError(said_of_disk(path, cause, needed)) from None
    try:
        checkpoint_files.rotate(directory, keep)
    except OSError as error:  # the new one is saved
        said = error.strerror or error
        print(f"warning: {directory}: an old checkpoint could not be removed ({said})")


def sync(path: str) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def os_error_of(error: BaseException | None) -> OSError | None:
    """The error of the operating system that an error is, or comes from, as torch.save's does."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__ if isinstance(error, RuntimeError) else None
    return error


def bytes_of(x) -> int:
    """The bytes of the tensors in a state."""
    if isinstance(x, Tensor):
        return x.numel() * x.itemsize
    values = x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else ()
    return sum(map(bytes_of, values))


def said_of_disk(path: str, error: OSError, needed: int) -> str:
    """One line on a checkpoint that could not be written."""
    directory = os.path.dirname(path) or "."
    said = f"{path}: not saved ({error.strerror or error}): it needs {needed / 1e6:,.1f} MB"
    if not os.path.isdir(directory):
        return f"{said}, and {directory} is gone"
    with contextlib.suppress(OSError):  # of a disk that has failed nothing is known
        said += f", {shutil.disk_usage(directory).free / 1e6:,.1f} MB are free"
    whole = checkpoint_files.newest_whole(directory, quiet=True)
    return f"{said}; " + (f"{whole} is whole" if whole else "no checkpoint is there yet")
