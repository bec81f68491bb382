"""Where what was computed from a data set is kept for the next time."""

import hashlib
import os
import tempfile
from collections.abc import Sequence

from util.cli import InputError


def cache_places(folder: str, split: str, cache: str | None) -> list[str]:
    """The folders in which vectors may be kept; the first that can be written to is taken.

    `{split}_search` of the data folder, then a folder of the user's own cache; or, if `cache` is
    given, only a folder in that one.
    """
    path = os.path.realpath(folder).encode("utf-8", "surrogateescape")
    name = f"{split}_{hashlib.sha256(path).hexdigest()[:16]}"  # several data sets may share a cache
    if cache:
        return [os.path.join(os.path.expanduser(cache), name)]
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return [os.path.join(folder, f"{split}_search"), os.path.join(base, "image_text_search", name)]


def writable(places: Sequence[str]) -> str:
    """The first of the folders in which files can be written. Raises InputError if none is one."""
    said = []
    for place in places:
        try:
            os.makedirs(place, exist_ok=True)
            with tempfile.TemporaryFile(dir=place):
                return place
        except OSError as error:
            said.append(f"{place} ({error.strerror})")
    raise InputError(
        f"no folder for the vectors of the first stage: {', '.join(said)} cannot be written to; "
        "give another with --cache FOLDER"
    )
