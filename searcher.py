"""A split and a checkpoint, and what a search in two stages finds with them.

    searcher = Searcher("runs/x/model_best.pth.tar", "data", "f30k_precomp")
    searcher.images_for("two dogs in snow").places
    searcher.captions_for(12).places

The first stage compares one vector per image (first_stage.py) and gives a shortlist; the second
scores only the shortlist, with the model's own score, and so reads only its rows of the features.
search.py is the command.

Shapes: R regions, F numbers per region, W words, D joint dimension; n images or captions.
"""

import argparse
import functools
import os
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import checkpoint as ckpt
import first_stage as stage
import systems
from bert import WordPieces
from data import PrecompDataset, collate_fn
from explain import tokens_of
from pairs import Encoding
from system import ServedImage
from util.cache_folders import cache_places
from util.cli import InputError
from util.devices import pick_device, to_device
from util.fingerprint import file_hash
from vocab import Vocabulary, read_captions

STAGES = "two", "first", "exact"
TOPK, SHORTLIST = 10, 100


class Found(NamedTuple):
    """What a search has found, the best first."""

    places: list[int]  # images, or captions
    scores: list[float]  # of the stage that ranked them
    first: list[float]  # their scores in the first stage; empty without it
    milliseconds: dict[str, float]  # of "encode", "first" and "exact"; 0: not done


class Reader(NamedTuple):
    """A checkpoint, and the split as its model reads it."""

    path: str
    model: nn.Module
    vocab: Vocabulary | WordPieces
    opt: argparse.Namespace
    dataset: PrecompDataset

    def sentence(self, text: str) -> dict[str, Tensor]:
        """A sentence as the text encoder reads it. Raises InputError."""
        if not text.strip():
            raise InputError("an empty sentence; give at least one word")
        words = self.vocab.encode(text)
        if self.opt.text_enc_type == "bert":
            room = self.opt.bert_config["max_position_embeddings"]
            if len(words) > room:
                raise InputError(
                    f"a sentence of {len(words)} pieces, but this BERT reads at most {room}"
                )
        try:
            return systems.of(self.opt).request_caption(words, None, self.opt)
        except InputError as error:
            raise InputError(
                "this model needs more of a sentence than its words, so it cannot search with one "
                f"({error}); take another checkpoint"
            ) from None

    def image(self, image: int | ServedImage) -> dict[str, Tensor]:
        """An image of the split, or one of one's own, as the image encoder reads it."""
        if not isinstance(image, ServedImage):
            return self.dataset.image_item(image)
        system, numbers = systems.of(self.opt), image.features.size(1)
        if numbers != self.opt.img_dim:
            raise InputError(
                f"the picture's regions have {numbers} numbers, the model of {self.path} expects "
                f"{self.opt.img_dim}; extract it as the images of the split"
            )
        if system.reads_whole and image.whole is None:
            raise InputError(f"a {system.name} model also needs a vector of the whole picture")
        return system.request_image(image, self.opt)

    def encoded(self, item: dict[str, Tensor]) -> Encoding:
        """The encoding of one image or caption."""
        encode = self.model.encode_images if "images" in item else self.model.encode_captions
        return encode(to_device(collate_fn([item]), self.device))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def image_scores(self, caption: Encoding, images: Sequence[int]) -> np.ndarray:
        """The scores (n,) of images of the split with one encoded caption."""
        scores = np.empty(len(images), np.float32)
        for start in range(0, len(images), stage.BLOCK):
            some = images[start : start + stage.BLOCK]
            items = [self.dataset.image_item(image) for image in some]
            for places, encoding in stage.encoded_groups(
                self.model.encode_images, items, self.device
            ):
                found = self.model.similarity(encoding, caption)[:, 0]  # (n,)
                scores[start + np.array(places)] = found.cpu().numpy()
        return scores

    def caption_scores(self, image: Encoding, captions: Sequence[int]) -> np.ndarray:
        """The scores (n,) of one encoded image with captions of the split."""
        scores = []
        for start in range(0, len(captions), stage.BLOCK):
            some = captions[start : start + stage.BLOCK]
            batch = collate_fn([self.dataset.caption_item(caption) for caption in some])
            encoding = self.model.encode_captions(to_device(batch, self.device))
            scores.append(self.model.similarity(image, encoding)[0].cpu().numpy())  # (n,)
        return np.concatenate(scores)


def open_reader(
    path: str, folder: str | None, where: tuple, split: str, vocab_path: str | None, device
) -> tuple[Reader, str]:
    """A checkpoint and a split of the data `folder`, and the folder.

    `folder` None: it is found by `where`, data_path and data_name.
    """
    model, vocab, opt = ckpt.load_model(path, vocab_path, device)
    if folder is None:
        pairs = zip(where, (opt.data_path, opt.data_name), strict=True)
        found = (given or own for given, own in pairs)
        folder = systems.of(opt).find_data(*found)
    dataset = systems.open_split(folder, split, vocab, opt, images_only=True)
    return Reader(path, model.eval(), vocab, opt, dataset), folder


class Searcher:
    """Searches a split with a checkpoint, in two stages.

    `data_path` and `data_name` say where the data is; default: as in training. The split may lack
    captions. `first_stage` is another checkpoint, whose vectors make the shortlist; default: those
    of the model itself. `cache` is the folder for these vectors (util/cache_folders.py). They
    are read or computed at the first search, or by `prepare`. Raises FileNotFoundError or
    InputError.
    """

    def __init__(
        self,
        checkpoint: str,
        data_path: str | None = None,
        data_name: str | None = None,
        split: str = "test",
        first_stage: str | None = None,
        vocab_path: str | None = None,
        device: str | torch.device = "auto",
        cache: str | None = None,
    ):
        device, where = pick_device(device), (data_path, data_name)
        path = os.path.expanduser(checkpoint)
        self.exact, self.folder = open_reader(path, None, where, split, vocab_path, device)
        self.first = self.exact
        if first_stage:
            path = os.path.expanduser(first_stage)
            own = ckpt.load(path).get("vocab")  # then it needs no other
            vocab_path = vocab_path if own is None else None
            self.first, _ = open_reader(path, self.folder, where, split, vocab_path, device)
            same = torch.equal(self.first.dataset.rows, self.exact.dataset.rows)
            if not same or self.first.dataset.n_captions != self.exact.dataset.n_captions:
                raise InputError(
                    f"{path}: its model reads other images or captions of {split} than "
                    f"{checkpoint}; the stages need the same"
                )
        _, self.model, self.vocab, self.opt, self.dataset = self.exact
        self.split, self.ids = split, self.dataset.ids
        self.stem = os.path.join(self.folder, split)  # of the names of the split's files
        self.n_images, self.n_captions = self.dataset.n_images, self.dataset.n_captions
        self._places = cache_places(self.folder, split, cache)

    @functools.cached_property
    def captions(self) -> list[str]:
        """The captions of the split as they are written; without a text file, their words."""
        path = self.dataset.text_path
        if self.n_captions and path:
            return read_captions(path)[: self.n_captions]
        items = (self.dataset.caption_item(k)["captions"].tolist() for k in range(self.n_captions))
        return [" ".join(tokens_of(ids, None, self.vocab)[1:-1]) for ids in items]

    @functools.cached_property
    def image_index(self) -> stage.VectorIndex:
        """The first stage of the images."""
        data = self.first.dataset
        compute = functools.partial(stage.image_vectors, self.first.model, data)
        about = stage.image_features(data)
        return self._index("images", about, self.n_images, compute)

    @functools.cached_property
    def caption_index(self) -> stage.VectorIndex:
        """The first stage of the captions."""
        data = self.first.dataset
        compute = functools.partial(stage.caption_vectors, self.first.model, data)
        return self._index("captions", stage.caption_words(data), self.n_captions, compute)

    def _index(self, what: str, about: dict, count: int, compute: Callable) -> stage.VectorIndex:
        weights = file_hash(self.first.path)
        about = {"format": stage.FORMAT, "checkpoint_sha256": weights, what: about}
        kept = stage.Kept(f"{weights[:16]}_{what}", what, about, count, compute)
        return stage.VectorIndex(*stage.kept_vectors(self._places, kept))

    def prepare(self) -> None:
        """Read or compute the vectors of the first stage now, not at the first search."""
        self.image_index  # noqa: B018
        if self.n_captions:
            self.caption_index  # noqa: B018

    def images_for(
        self, sentence: str, topk: int = TOPK, shortlist: int = SHORTLIST, stages: str = "two"
    ) -> Found:
        """The images that fit a sentence.

        `stages` is "two", "first" (the vectors' order) or "exact" (all images are scored; slow).
        Equal scores stand in the order of the images. Raises InputError.
        """
        return self._search("sentence", sentence, topk, shortlist, stages)

    def captions_for(
        self,
        image: int | ServedImage,
        topk: int = TOPK,
        shortlist: int = SHORTLIST,
        stages: str = "two",
    ) -> Found:
        """The captions of the split that fit an image of it, or a picture of one's own."""
        if not self.n_captions:
            raise InputError(
                f"{self.folder}: {self.split} has no captions, so there are none to find for an "
                "image; search with a sentence"
            )
        if not isinstance(image, ServedImage) and not 0 <= image < self.n_images:
            raise InputError(f"image {image}: {self.split} has {self.n_images} images, from 0 on")
        return self._search("image", image, topk, shortlist, stages)

    @torch.inference_mode()
    def _search(self, kind: str, query, topk: int, shortlist: int, stages: str) -> Found:
        check_numbers(topk, shortlist, stages)
        by_image = kind == "image"
        count = self.n_captions if by_image else self.n_images
        if stages != "exact":  # not in the time of this search
            index = self.caption_index if by_image else self.image_index
        clock = [time.perf_counter()]
        encodings = {}
        for use, reader in (("first", self.first), ("exact", self.exact)):
            if stages in (use, "two"):
                item = getattr(reader, kind)(query)
                same = use == "exact" and "first" in encodings and self.first is self.exact
                encodings[use] = encodings["first"] if same else reader.encoded(item)
        pool = stage.pooled_images if by_image else stage.pooled_captions
        vector = None if stages == "exact" else pool(encodings["first"]).cpu()  # (1, D)
        clock.append(time.perf_counter())
        places, scores, first = np.arange(count), np.zeros(0), np.zeros(0)
        if stages != "exact":
            found = index.search(vector, shortlist if stages == "two" else topk)
            first, places = (x[0] for x in found)
            first, places = first[places >= 0], places[places >= 0]
            scores = first
        clock.append(time.perf_counter())
        if stages != "first":
            score = self.exact.caption_scores if by_image else self.exact.image_scores
            scores = score(encodings["exact"], places.tolist())
        if not np.isfinite(scores).all():
            raise InputError(
                f"{self.exact.path}: a score is NaN or Inf; are the weights and features finite?"
            )
        order = np.lexsort((places, -scores))[:topk]
        clock.append(time.perf_counter())
        times = (1000 * (b - a) for a, b in zip(clock, clock[1:], strict=False))
        first = first[order].tolist() if stages != "exact" else []
        milliseconds = dict(zip(("encode", "first", "exact"), times, strict=True))
        return Found(places[order].tolist(), scores[order].tolist(), first, milliseconds)


def check_numbers(topk: int, shortlist: int, stages: str) -> None:
    """Raise InputError if the numbers of a search do not go together."""
    if stages not in STAGES:
        raise InputError(f"stages {stages!r}: expected one of {', '.join(STAGES)}")
    if topk < 1:
        raise InputError(f"topk {topk}: expected at least 1")
    if stages == "two" and shortlist < topk:
        raise InputError(
            f"shortlist {shortlist}: less than topk, {topk}; the results are taken from the "
            "shortlist"
        )
