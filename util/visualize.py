"""Show what a model sees in a pair: a picture and a page of one image and one sentence.

    python util/visualize.py CHECKPOINT --data_path data --split test --image 2 --caption 11 --out X
    python util/visualize.py ... --image test_00002 --text "a red ball" --out X

The folder X gets a PNG and an HTML page: what each word looks at, which regions look at each word,
and the matrix of all of them. docs/attention.md explains them. Shapes: R regions, H x V pixels.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # when run by path

from util import attention_figure, attention_page  # noqa: E402
from util.arguments import FROM_0, Parser  # noqa: E402
from util.boxes import BoxCheck  # noqa: E402
from util.cli import InputError, replacing, run  # noqa: E402
from util.drawn_text import letters_without_font, quiet_fonts  # noqa: E402
from util.extract_regions import read_settings  # noqa: E402
from util.image_ids import id_key, shown, written_key  # noqa: E402
from util.photos import find_photos  # noqa: E402
from util.pictures import MAX_PIXELS, open_picture, pillow  # noqa: E402


def find_image(text: str, ids: list[str] | None, n_images: int, source: str) -> int:
    """The image that --image means: its number, from 0, or its id in `{split}_ids.txt`."""
    by_id = [k for k, name in enumerate(ids or ()) if written_key(name) == written_key(text)]
    by_id = by_id or [k for k, name in enumerate(ids or ()) if id_key(name) == id_key(text)]
    number = int(text) if text.isascii() and text.isdigit() and str(int(text)) == text else None
    if number is not None and number < n_images:
        if by_id and number not in by_id:
            print(
                f"notice: --image {text} is taken as the number of an image, from 0; the image "
                f"with the id {ids[by_id[0]]} is number {by_id[0]}"
            )
        return number
    if len(by_id) == 1:
        return by_id[0]
    if by_id:
        several = ", ".join(shown(ids[k]) for k in by_id[:3])
        raise InputError(f"--image {text}: several ids fit ({several}); give the number, from 0")
    listed = f"and its ids are in {source}" if ids else f"and there is no {source} with ids"
    raise InputError(
        f"--image {text}: no such image; there are {n_images} images, from 0 on, {listed}"
    )


def read_photo(
    path: str, size: tuple[float, float] | None, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """The pixels (H, V, 3), uint8, of a photo, turned as the boxes of an image of `size` need it.

    Cameras write how a photo is turned; some extractors obey that, others do not.
    """
    turned = open_picture(path, max_pixels)
    if size is None:
        return np.asarray(turned)
    plain = open_picture(path, max_pixels, turn=False)

    def off(picture) -> float:
        """How far the shape is from that of the boxes' image; 1: the same."""
        ratio = picture.width / picture.height * size[1] / size[0]
        return max(ratio, 1 / ratio)

    best = min((turned, plain), key=off)
    if off(best) > 1.03:
        print(
            f"warning: {path}: {best.width} x {best.height} pixels, but the boxes are those of an "
            f"image of {size[0]:g} x {size[1]:g}: is it another photo, or was it cut?"
        )
    return np.asarray(best)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=os.path.expanduser, help="ours or a published one")
    parser.add_argument("--data_path", help="folder that holds the data; default: as in training")
    parser.add_argument("--data_name", help="another data set than that of the training")
    parser.add_argument("--split", default="test", help="train | dev | test (default) | testall")
    parser.add_argument("--vocab_path", help="folder of the vocabulary; default: as in training")
    parser.add_argument(
        "--image", help="its number, from 0, or its id; default: the image of the caption"
    )
    parser.add_argument(
        "--caption", type=FROM_0, help="its number, from 0; default: the image's first one"
    )
    parser.add_argument("--text", help="a sentence of your own instead of a caption")
    parser.add_argument(
        "--images",
        metavar="FOLDER",
        help="photos, named by {split}_ids.txt; default: those that extract_regions.py has read, "
        "or pictures/ of the data, if it is there",
    )
    parser.add_argument(
        "--out", required=True, type=os.path.expanduser, help="folder for picture and page"
    )
    return parser


def first_caption(dataset, image: int) -> int:
    """The first caption of an image."""
    if dataset.candidates > 1:
        return image // dataset.candidates
    own = (dataset.image_of == image).nonzero()
    if not len(own):
        raise InputError(f"--image {image}: it has no caption; give --caption or --text")
    return int(own[0])


def choose_pair(opt: argparse.Namespace, dataset) -> tuple[int, int | None]:
    """The image and the caption (None: --text) that the options mean."""
    if opt.image is None and (opt.text is not None or opt.caption is None):
        raise InputError(
            "give --image, --caption or both" if opt.text is None else "--text needs --image"
        )
    if opt.text is not None and opt.caption is not None:
        raise InputError("--text and --caption: give one of them")
    if opt.image is None:
        if opt.caption >= dataset.n_captions:
            raise InputError(
                f"--caption {opt.caption}: {opt.split} has {dataset.n_captions} captions, from 0 on"
            )
        return int(dataset.image_of[opt.caption]), opt.caption
    source = dataset.path.replace("_ims.npy", "_ids.txt")
    image = find_image(opt.image, dataset.ids, dataset.n_images, source)
    if opt.caption is None and opt.text is None:
        return image, first_caption(dataset, image)
    return image, opt.caption


def recorded_photos(stem: str) -> str | None:
    """The folder of photos that extract_regions.py made a split of, if it is still there."""
    folder = (read_settings(stem) or {}).get("photos")
    if folder and not os.path.isdir(folder):
        print(f"notice: {folder}: no such folder of photos any more; --images names another")
    return folder if folder and os.path.isdir(folder) else None


def read_scene(opt: argparse.Namespace, folder: str, dataset, image: int) -> dict:
    """Boxes, size and pixels of an image, as attention_figure.draw takes them; says what lacks."""
    from explain import region_boxes

    boxes, size = region_boxes(dataset, image)
    images = opt.images or recorded_photos(os.path.join(folder, opt.split))
    found = find_photos(images, folder, opt.split, dataset.ids, dataset.n_images)[image]
    pixels = None if found is None else read_photo(found, size)
    if boxes is None:
        print(
            f"notice: {folder}: no {opt.split}_ims_bbx.npy, so nobody knows where the regions are: "
            "they are drawn as a numbered grid (docs/data.md: boxes)"
        )
    else:
        if size is None:
            size = boxes[:, 2:].max(0) if pixels is None else pixels.shape[1::-1]
            size = tuple(float(x) for x in size)
            said = "the photo" if pixels is not None else "the boxes"
            print(f"notice: {folder}: no {opt.split}_ims_size.npy; the image is as large as {said}")
        check = BoxCheck()
        check.add(boxes, np.array(size), name=f"image {image}")
        check.warn(f"{folder}/{opt.split}_ims_bbx.npy")
    if pixels is None:
        where = "--images FOLDER names the photos, with their ids in {split}_ids.txt"
        print(f"notice: no photo of image {image}: what is drawn stands on white; {where}")
    return {"boxes": boxes, "size": size, "pixels": pixels}


def main(argv: list[str] | None = None) -> None:
    # Here, not above: tools of util/ stand below the models, and only this one needs them.
    import checkpoint as ckpt
    import systems
    from data import check_files
    from explain import explain_pair

    opt = build_parser().parse_args(argv)
    for library in (attention_figure.library, attention_page.library, pillow):
        library()  # better now than after minutes
    if os.path.exists(opt.out) and not os.path.isdir(opt.out):
        raise InputError(f"--out {opt.out}: a file; give a folder")
    model, vocab, options = ckpt.load_model(opt.checkpoint, opt.vocab_path)
    system = systems.of(options)
    folder = system.find_data(
        opt.data_path or options.data_path, opt.data_name or options.data_name
    )
    dataset = systems.open_split(folder, opt.split, vocab, options, images_only=True)
    if opt.text is None and not dataset.n_captions:
        check_files(folder, os.path.join(folder, f"{opt.split}_caps.txt"))
    image, caption = choose_pair(opt, dataset)
    found = explain_pair(model, dataset, caption, vocab, image, opt.text)
    scene = read_scene(opt, folder, dataset, image)
    if missing := letters_without_font(found.caption):
        print(
            f"notice: no font here has {shown(missing)}: the picture shows boxes for these "
            "letters, the page shows them"
        )
    name = str(image) if dataset.ids is None else f"{image} ({dataset.ids[image]})"
    page = attention_page.render(found, name, **scene)
    figure = attention_figure.draw(found, **scene)
    os.makedirs(opt.out, exist_ok=True)
    of = "text" if caption is None else f"caption{caption}"
    stem = os.path.join(opt.out, f"{opt.split}_image{image}_{of}")
    with replacing(f"{stem}.png") as part, quiet_fonts():
        figure.savefig(part, format="png")
    with replacing(f"{stem}.html") as part:
        Path(part).write_text(page, encoding="utf-8")
    print(f"Image {name}: {found.caption}")
    for line in (f"{system.title} scores this pair {found.score:.4f}", *found.notes):
        print(line)
    print(f"{stem}.png\n{stem}.html")


if __name__ == "__main__":
    run(main)
