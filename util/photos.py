"""Find the photos of a split's images, by their ids."""

import os
from collections.abc import Sequence

from util.cli import InputError
from util.image_ids import id_key, shown
from util.pictures import ENDINGS


def find_photos(
    folder: str | os.PathLike | None,
    data_folder: str | os.PathLike | None,
    split: str,
    ids: Sequence[str] | None,
    n_images: int,
) -> list[str | None]:
    """The path of each image's photo (n_images,); None where there is none.

    `folder` holds `{id}.jpg` or other pictures; the ids may be file names, or numbers that stand
    in the names in another way (COCO's). Without `folder` it is `pictures` of `data_folder`, if the
    data set has it. If it has a folder `{split}`, that is taken instead. If there are no ids, the
    names of the photos are the numbers of the images, from 0, and none may be missing: else they
    might be photos of other images.

    Prints one notice if a folder does not hold all photos. Raises InputError if there is no such
    folder.
    """
    nothing: list[str | None] = [None] * n_images
    if folder is None:
        folder = os.path.join(data_folder or "", "pictures")
        if data_folder is None or not os.path.isdir(folder):
            return nothing
    folder = os.path.expanduser(folder)
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder of photos")
    inner = os.path.join(folder, split)
    folder = inner if os.path.isdir(inner) else folder
    by_name, by_key = list_photos(folder)
    names = [str(image) for image in range(n_images)] if ids is None else ids
    there = set(os.listdir(folder))
    found = [
        os.path.join(folder, name)  # 12.jpg and 12.png may be two images
        if name in there and name.lower().endswith(ENDINGS)
        else by_name.get(stem(name)) or by_key.get(id_key(name))
        for name in names
    ]
    missing = [image for image, path in enumerate(found) if path is None]
    if not missing:
        return found
    what = how_many_miss(len(missing), n_images)
    first = "it is" if len(missing) == 1 else "the first is"
    first += f" {shown(names[missing[0]])}"
    if ids is None:
        what += f"; the names must be the numbers 0 to {n_images - 1:,}, so none is shown"
        first += f"; {split}_ids.txt beside the features can name the photos (docs/data.md)"
    print(f"notice: {folder}: {what}; {first}")
    return nothing if ids is None else found


def how_many_miss(missing: int, total: int) -> str:
    """In words, that `missing` of `total` photos are not there."""
    if total == 1:
        return "the photo of the only image is not there"
    if missing == total:
        return f"none of the {total:,} photos is there"
    return f"{missing:,} of the {total:,} photos {'is' if missing == 1 else 'are'} not there"


def list_photos(folder: str) -> tuple[dict[str, str], dict[int | str, str | None]]:
    """The photos of a folder: by name without ending, and by id_key (None: several names fit)."""
    by_name: dict[str, str] = {}
    by_key: dict[int | str, str | None] = {}
    names = [name for name in os.listdir(folder) if name.lower().endswith(ENDINGS)]
    for name in sorted(names, key=lambda x: (ENDINGS.index(os.path.splitext(x.lower())[1]), x)):
        path, plain = os.path.join(folder, name), stem(name)
        if plain in by_name:
            continue  # 12.jpg and 12.png
        by_name[plain] = path
        key = id_key(name)
        by_key[key] = None if key in by_key else path
    return by_name, by_key


def stem(name: str) -> str:
    """A photo's name, or an id, without folder and ending."""
    name = name.strip().replace("\\", "/").rpartition("/")[2]
    plain, ending = os.path.splitext(name)
    return plain if ending.lower() in ENDINGS else name
