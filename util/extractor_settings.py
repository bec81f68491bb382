"""Read the file beside extracted features that says how they were made."""

import os

from util.cli import InputError
from util.json_file import read_object, shown_value

SETTINGS = "extractor.json"
AGAIN = "; make it again with extract_regions.py"


def read_settings(stem: str) -> dict | None:
    """What `{stem}_extractor.json` says of how features were made; None: there is no such file.

    open_extractor takes it. Its paths are hints. Raises InputError if it is damaged.
    """
    path = f"{stem}_{SETTINGS}"
    if not os.path.isfile(path):
        return None
    found = read_object(path, AGAIN)
    kinds = {"backend": str, "weights": str | None, "weights_sha256": str, "photos": str}
    kinds |= {"grid": int | None, "regions": int | None, "half": bool | None}
    kinds |= {"skipped": list | None}
    for key, kind in kinds.items():
        x = found.get(key)
        if not isinstance(x, kind) or (isinstance(x, str) and not is_short(x)):
            raise InputError(f"{path}: {key} is {shown_value(x)}; make it again")
    return found


def is_short(text: str) -> bool:
    """Whether a text of a file may be a path, and can stand in a line."""
    return len(text) <= 1000 and not any(x < " " or 127 <= ord(x) < 160 for x in text)
