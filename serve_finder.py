"""What the search page of serve.py shows, without HTTP: rankings, attention, photos, uploads.

`open_finder` opens what the flags name. serve_search.py asks a Finder, in one thread.

Shapes: R regions, F numbers per region, W words, H x V pixels.
"""

import argparse
import functools
import io
import ipaddress
import math
import os
from collections.abc import Iterator

import numpy as np
import torch

import systems
from explain import Explanation, explain_pair, region_boxes, tokens_of, unknown_words
from search import photos_of
from searcher import Found, Searcher
from serve_schema import AttentionOf, CaptionSearch, ImageSearch, Ranking
from system import ServedImage
from util.arguments import POSITIVE
from util.attention_figure import grid
from util.cli import InputError
from util.extract_regions import read_settings
from util.region_backends import open_extractor
from util.uploads import PictureLimits, PictureReader
from util.visualize import pillow, read_photo, recorded_photos

LONGEST = 1000  # pixels of a photo's longer side
MOST_PIXELS = 50_000_000  # of a photo that is shown
MOST_EXACT = 20_000  # images or captions that one request may score exactly
MOST_WEIGHTS = 4_000  # words times images of one request for attention


class NoSuchImage(InputError):
    """There is no image of this number."""


class Finder:
    """Answers what the page asks, from a searcher, the photos of its images, and an extractor.

    `photos` holds a path or None for each image. `extractor` makes regions of a picture, and
    `pictures` reads uploaded ones; without them `no_uploads` says why, in a sentence.
    """

    words = 256  # of a sentence, at most

    def __init__(
        self,
        searcher: Searcher,
        photos: list[str | None],
        extractor=None,
        pictures: PictureReader | None = None,
        no_uploads: str = "there is no extractor",
    ):
        self.searcher, self.photos = searcher, photos
        self.extractor, self.pictures = extractor, pictures
        self.no_uploads = "" if extractor else no_uploads
        self.no_attention = self._why_no_attention()
        self.photo = functools.lru_cache(256)(self._photo)
        self.info = self._info()

    def close(self) -> None:
        if self.pictures is not None:
            self.pictures.close()

    def _why_no_attention(self) -> str:
        """Why the regions of a word cannot be shown, in a sentence; empty if they can."""
        try:
            self._explain("a", 0)
        except InputError as error:
            return str(error)
        return ""

    def _explain(self, query: str, image: int) -> Explanation:
        s = self.searcher
        return explain_pair(s.model, s.dataset, None, s.vocab, image=image, words=query)

    def _info(self) -> dict:
        """What there is to search."""
        s = self.searcher
        step = max(1, s.n_captions // 3)
        return {
            "model": systems.of(s.opt).title,
            "data": os.path.basename(os.path.normpath(s.folder)),
            "split": s.split,
            "images": s.n_images,
            "captions": s.n_captions,
            "photos": sum(path is not None for path in self.photos),
            "attention": not self.no_attention,
            "why_no_attention": self.no_attention,
            "exact": max(s.n_images, s.n_captions) <= MOST_EXACT,
            "uploads": not self.no_uploads,
            "why_no_uploads": self.no_uploads,
            "examples": [s.captions[k] for k in range(0, s.n_captions, step)][:3],
        }

    def ids_of(self, query: str) -> list[int]:
        """The word ids of a sentence. Raises InputError if it has no word, or too many."""
        if not query.strip():
            raise InputError("an empty sentence; give at least one word")
        ids = self.searcher.vocab.encode(query)
        if len(ids) > self.words:
            raise InputError(f"the sentence has {len(ids)} words, expected at most {self.words}")
        return ids

    def check_image(self, image: int) -> None:
        if not 0 <= image < self.searcher.n_images:
            raise NoSuchImage(f"no such image; there are {self.searcher.n_images}, from 0 on")

    def find_images(self, asked: ImageSearch) -> dict:
        """The images that fit a sentence, best first."""
        s, ids = self.searcher, self.ids_of(asked.query)
        check_exact(asked, s.n_images)
        found = s.images_for(asked.query, asked.topk, asked.shortlist, asked.stages)
        tokens = tokens_of(ids, asked.query, s.vocab)
        return {
            "words": tokens[1:-1],  # without <start> and <end>
            "notes": unknown_words(torch.tensor(ids), tokens, s.vocab),
            "results": [self.shown(image) | scores for image, scores in ranked(found)],
            "milliseconds": times(found, asked.stages),
        }

    def shown(self, image: int) -> dict:
        """What the page needs to show an image."""
        ids, photo = self.searcher.ids, self.photos[image] is not None
        regions = self.regions(image)
        if photo:  # its boxes are drawn when somebody looks at a word
            regions.pop("boxes")
        name = str(image) if ids is None else ids[image]
        return {"image": image, "id": name, "photo": photo} | regions

    def regions(self, image: int) -> dict:
        """The boxes (R, 4) of an image and its size.

        Without boxes they are the fields of a grid, which are no places of the photo: 'placed' is
        False.
        """
        boxes, size = region_boxes(self.searcher.dataset, image)
        placed = boxes is not None
        if not placed:
            boxes, size = grid(len(self.searcher.dataset.image_item(image)["images"]))
        if size is None:
            size = boxes[:, 2:].max(0).clip(1)
        size = [round(float(x), 1) for x in size]
        return {"boxes": boxes.round(1).tolist(), "size": size, "placed": placed}

    def find_captions(self, asked: CaptionSearch) -> dict:
        """The captions that fit an image of the data set, best first."""
        self.check_image(asked.image)
        return self.shown(asked.image) | self.captions_for(asked.image, asked)

    def captions_for(self, image: int | ServedImage, asked: Ranking) -> dict:
        s = self.searcher
        if not s.n_captions:
            return {"results": [], "milliseconds": {}}
        check_exact(asked, s.n_captions)
        found = s.captions_for(image, asked.topk, asked.shortlist, asked.stages)
        results = []
        for caption, scores in ranked(found):
            own = isinstance(image, int) and int(s.dataset.image_of[caption]) == image
            results.append({"caption": caption, "text": s.captions[caption], "own": own} | scores)
        return {"results": results, "milliseconds": times(found, asked.stages)}

    def look(self, asked: AttentionOf) -> dict:
        """The weights (W, R) that each word of a sentence gives the regions of some images."""
        words = len(self.ids_of(asked.query))
        if words * len(asked.images) > MOST_WEIGHTS:
            raise InputError(
                f"{words} words and {len(asked.images)} images: expected at most "
                f"{MOST_WEIGHTS // words} images for such a sentence"
            )
        for image in asked.images:
            self.check_image(image)
        answers = []
        for image in asked.images:
            found = self._explain(asked.query, image)
            view = found.views[0]
            weights = view.weights if found.t2i is None else found.t2i  # (W, R)
            weights = np.round(weights[1:-1].numpy().astype(float), 4).tolist()
            answers.append({"image": image, "weights": weights} | self.regions(image))
        return {"words": found.tokens[1:-1], "images": answers}

    def captions_of_picture(self, pixels: np.ndarray, asked: Ranking) -> dict:
        """The captions that fit a picture (H, V, 3), uint8, that is not of the data set."""
        from PIL import Image

        regions = self.extractor.extract([Image.fromarray(pixels)])[0]
        features, boxes, whole = (
            torch.from_numpy(np.array(x, np.float32))
            for x in (regions.features, regions.boxes, regions.whole)
        )
        size = tuple(float(x) for x in regions.size)
        return self.captions_for(ServedImage(features, boxes, size, whole), asked)

    def _photo(self, image: int) -> bytes:
        """The photo of an image as a JPEG file, turned as its boxes are."""
        from PIL import Image

        path = self.photos[image]
        size = region_boxes(self.searcher.dataset, image)[1]
        pixels = read_photo(path, size, MOST_PIXELS)
        picture, file = Image.fromarray(pixels), io.BytesIO()
        picture.thumbnail((LONGEST, LONGEST))
        picture.save(file, "JPEG", quality=88)
        return file.getvalue()


def check_exact(asked: Ranking, count: int) -> None:
    """Raise InputError if a request asks for the exact scores of too many."""
    if asked.stages == "exact" and count > MOST_EXACT:
        raise InputError(
            f"stages: exact scores of all {count:,} would take too long here (at most "
            f"{MOST_EXACT:,}); take two stages"
        )


def times(found: Found, stages: str) -> dict[str, float]:
    """The milliseconds of what was done."""
    left_out = {"first": "exact", "exact": "first"}.get(stages)
    return {name: x for name, x in found.milliseconds.items() if name != left_out}


def ranked(found: Found) -> Iterator[tuple[int, dict[str, float | None]]]:
    """Each place of a ranking, its score, and that of the first stage, or None.

    Raises InputError if a score is not finite.
    """
    first = found.first or [None] * len(found.places)
    for place, *scores in zip(found.places, found.scores, first, strict=True):
        if not all(score is None or math.isfinite(score) for score in scores):
            raise InputError("the scores are not finite: are features too large?")
        yield place, dict(zip(("score", "first"), scores, strict=True))


# The command line


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of serve.py that concern the search."""
    group = parser.add_argument_group("search", "serve a page that searches a data set")
    group.add_argument("--data_path", help="folder that holds the data; turns the search on")
    group.add_argument("--data_name", help="data set; default: that of the training")
    group.add_argument("--split", default="test", help="train | dev | test | testall")
    group.add_argument(
        "--first_stage", metavar="CHECKPOINT", help="as for search.py; default: the model itself"
    )
    group.add_argument("--cache", metavar="FOLDER", help="where vectors are kept, as for search.py")
    group.add_argument(
        "--images", metavar="FOLDER", help="photos, named by {split}_ids.txt, as for search.py"
    )
    group.add_argument(
        "--max_upload_mb", type=POSITIVE, default=10.0, help="MiB of a picture to search with"
    )
    group.add_argument(
        "--public_host", help="the name by which browsers reach this server, e.g. behind a proxy"
    )


def open_finder(opt: argparse.Namespace, device: torch.device) -> Finder | None:
    """What the flags name, ready to search; None without --data_path.

    Prints what is missing for photos or uploads. Raises InputError or FileNotFoundError.
    """
    needs = [name for name in ("data_name", "first_stage", "cache", "images") if vars(opt)[name]]
    if opt.data_path is None and needs:
        raise InputError(f"--{needs[0]}: give --data_path too, which turns the search on")
    if opt.data_path is None:
        return None
    searcher = Searcher(
        opt.checkpoint,
        data_path=opt.data_path,
        data_name=opt.data_name,
        split=opt.split,
        first_stage=opt.first_stage,
        vocab_path=opt.vocab_path,
        device=str(device),
        cache=opt.cache,
    )
    searcher.prepare()  # not at the first request, which has a time limit
    settings = read_settings(searcher.stem)
    photos = open_photos(opt, searcher)
    parts, why = (None, None), "util/extract_regions.py did not make this data set"
    if not searcher.n_captions:
        why = "this data set has no captions to search"
    elif settings is not None and settings.get("given_boxes"):
        why = "the boxes of its regions came from another program"
    elif settings is not None:
        try:
            limits = PictureLimits(bytes=int(opt.max_upload_mb * 2**20))
            parts = open_extractor(settings, device), PictureReader(limits)
        except InputError as error:
            why = "the extractor of the regions did not open; the server's first lines say why"
            print(f"notice: pictures cannot be uploaded: {error}")
    return Finder(searcher, photos, *parts, why)


def open_photos(opt: argparse.Namespace, searcher: Searcher) -> list[str | None]:
    """The photo of each image, or None."""
    try:
        pillow()
    except InputError as error:
        print(f"notice: no photos are shown: {error}")
        return [None] * searcher.n_images
    if opt.images is not None:
        return photos_of(opt.images, searcher)
    folder = recorded_photos(searcher.stem)
    if folder is not None and not is_own_machine(opt.host):
        print(
            f"notice: no photos are shown: {folder} is only named in {searcher.split}_extractor."
            f"json, and others can reach --host {opt.host}; to show it, give --images {folder}"
        )
        return [None] * searcher.n_images
    if folder is not None:
        print(f"Photos: {folder}, as {searcher.split}_extractor.json says")
    return photos_of(folder, searcher)


def is_own_machine(host: str) -> bool:
    """Whether only programs of this machine can reach a host."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
