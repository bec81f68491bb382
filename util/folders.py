"""Find the folder of a data set."""

import os
from collections.abc import Sequence

SPLITS = ("train", "dev", "test", "testall")


def find_folder(data_path: str, data_name: str, places: Sequence[str] = ()) -> str:
    """The folder of the data set `data_name`, at one of `places` or at data_path/data_name.

    If `data_path` is that folder itself, it is taken. Raises FileNotFoundError that says which
    flags would find the data.
    """
    data_path, data_name = os.path.expanduser(data_path), data_name.rstrip(os.sep)
    usual = os.path.join(data_path, data_name)
    for folder in places or (usual,):
        if os.path.isdir(folder):
            return folder
    itself = os.path.normpath(data_path)
    parent, name = os.path.split(os.path.abspath(itself))
    if holds_splits(itself):
        if name == data_name:
            return itself
        beside = os.path.dirname(itself) or ("." if itself != "." else parent)
        if not holds_splits(os.path.join(beside, data_name)):
            data_name = name
        raise FileNotFoundError(
            f"{usual}: no such data folder, but {data_path} is one: give --data_path {beside} "
            f"--data_name {data_name}"
        )
    there = ", ".join(
        x for x in list_folders(data_path) if holds_splits(os.path.join(data_path, x))
    )
    hint = f" (there are {there})" if there else ""
    raise FileNotFoundError(f"{usual}: no such data folder; give --data_path its parent{hint}")


def list_folders(folder: str) -> list[str]:
    if not os.path.isdir(folder):
        return []
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())


def holds_splits(folder: str) -> bool:
    """Whether a folder holds features or captions of a split."""
    return os.path.isdir(folder) and bool(splits_in(folder))


def splits_in(folder: str) -> set[str]:
    """The splits of which a folder holds features or captions."""
    ends = "_ims.npy", "_caps.txt"
    names = os.listdir(folder)
    return {name.removesuffix(end) for name in names for end in ends if name.endswith(end)}
