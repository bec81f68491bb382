"""What a model computes of one pair on its way to the score, for pictures of it.

    e = explain_pair(model, dataset, caption=11, vocab=vocab)   # with its own image
    e.t2i                                                       # (W, R), or None

The weights and numbers come from the scoring itself, which keeps them while somebody looks
(util/kept.py). util/attention_figure.py draws them, util/attention_page.py writes a page, and
util/visualize.py is the command. Shapes: W words, R regions, D joint dimension.
"""

import dataclasses
import os
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import PrecompDataset, collate_fn
from pairs import Encoding, pair_dots
from util.arrays import open_array, read_sizes
from util.cli import InputError
from util.devices import to_device
from util.kept import keeping
from vocab import Vocabulary, read_captions

OTHER = {"t2i": "i2t", "i2t": "t2i"}
# Headings: (direction, whether each query chooses one key) -> heading, and what the numbers are.
HEADINGS = {
    ("t2i", False): (
        "What each word looks at",
        "weight of each region for a word; a row sums to 1",
    ),
    ("i2t", False): (
        "Which regions look at each word",
        "weight of each word for a region; a column sums to 1",
    ),
    ("t2i", True): ("The region that each word chooses", "1 where a word has chosen a region"),
    ("i2t", True): ("The word that each region chooses", "1 where a region has chosen a word"),
}


class View(NamedTuple):
    """One matrix of words and regions that can be drawn."""

    way: str  # t2i, i2t or dots
    heading: str
    about: str  # what its numbers are
    weights: Tensor  # (W, R)
    scored: bool  # whether the score is made of it
    hard: bool  # whether each word, or region, chooses one: weights are 0 and 1


@dataclasses.dataclass
class Explanation:
    """One pair: what is known of each word and region. Tensors are float32, on the host."""

    model: str  # its class
    caption: str
    tokens: list[str]  # W words, or BERT's pieces, <start> and <end> included
    score: float
    dots: Tensor  # (W, R)
    t2i: Tensor | None = None  # (W, R) weight of each region for a word
    i2t: Tensor | None = None  # (W, R) weight of each word for a region
    word_scores: Tensor | None = None  # (W,)
    region_scores: Tensor | None = None  # (R,)
    text_edges: Tensor | None = None  # (W, W) GSMN
    visual_edges: Tensor | None = None  # (R, R) GSMN
    scored: tuple[str, ...] = ()  # of t2i and i2t, those that the score is made of
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def views(self) -> list[View]:
        """What can be drawn, that of the score first, the dots last."""
        found = []
        for way in sorted(OTHER, key=lambda x: x not in self.scored):
            weights = getattr(self, way)
            if weights is None:
                continue
            keys = weights.size(1 if way == "t2i" else 0)
            hard = keys > 1 and bool(((weights == 0) | (weights == 1)).all())
            scored = way in self.scored
            found.append(View(way, *HEADINGS[way, hard], weights, scored, hard))
        about = "dot product of each word's vector with each region's"
        return [
            *found,
            View("dots", "How alike words and regions are", about, self.dots, False, False),
        ]


@torch.no_grad()
def explain_pair(
    model: nn.Module,
    dataset: PrecompDataset,
    caption: int | None,
    vocab: Vocabulary,
    image: int | None = None,
    words: str | None = None,
) -> Explanation:
    """The score of one image and one caption, and what it is made of.

    `image` is by default that of the caption. `words` is a sentence of one's own instead of the
    caption; then `image` is needed. Without dropout and --drop. Raises InputError if there is no
    such image or caption, or nothing of the score could be drawn.
    """
    image, item, text, tokens = read_pair(dataset, caption, vocab, image, words)
    device = next(model.parameters()).device
    batch = to_device(collate_fn([dataset.image_item(image) | item]), device)
    training = model.training
    model.eval()
    try:
        with keeping() as kept:
            images, captions = model.encode_images(batch), model.encode_captions(batch)
            score = model.similarity(images, captions).item()
        if not {"regions", "words"} <= {*images, *captions}:
            raise InputError(
                f"a {type(model).__name__} model: its encodings hold no regions and words, so "
                "there is no attention to draw"
            )
        scored = tuple(name for name in OTHER if name in kept)
        more = beside_the_score(model, batch, images, captions)
    finally:
        model.train(training)
    notes = unknown_words(item["captions"], tokens, vocab) + more.pop("notes", [])
    w, r = len(tokens), images["regions"].size(1)
    shapes = {"t2i": (w, r), "i2t": (w, r), "text_edges": (w, w), "visual_edges": (r, r)}
    shapes |= {"word_scores": (w,), "region_scores": (r,)}
    found = {name: x.float().cpu() for name, x in (more | kept).items() if name in shapes}
    found = {name: fitted(x, shapes[name]) for name, x in found.items()}
    dots = pair_dots(images["regions"], captions["words"])[0].float().cpu()  # (W, R)
    name = type(model).__name__
    return Explanation(name, text, tokens, score, dots, scored=scored, notes=notes, **found)


def beside_the_score(
    model: nn.Module, batch: dict, images: Encoding, captions: Encoding
) -> dict[str, Tensor | list[str]]:
    """What a picture shows besides that of which the score is made.

    The names are those of Explanation; 'notes' are sentences. For a score with a direction
    (`config.cross_attn`, SCAN's) it is the other direction; the model's method `beside_score` may
    add to it (docs/adding_a_model.md).
    """
    found: dict = {"notes": []}
    other = OTHER.get(getattr(getattr(model, "config", None), "cross_attn", None))
    if other:
        with keeping() as kept:
            score = model.similarity(images, captions, other).item()
        found |= kept
        found["notes"].append(
            f"The score does not read the other direction, {other}; alone it would be {score:.4f}."
        )
    if hasattr(model, "beside_score"):
        more = model.beside_score(batch, images, captions)
        more["notes"] = found["notes"] + more.get("notes", [])
        found |= more
    return found


def fitted(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """x without its dimensions of length 1, of the shape; regions that the score skips are zeros.

    (PFAN with whole images compares the last region with the sentence, not with the words.)
    """
    x = x.reshape(*shape[:-1], -1) if len(shape) > 1 else x.flatten()
    return F.pad(x, (0, shape[-1] - x.size(-1)))


# The pair


def read_pair(
    dataset: PrecompDataset,
    caption: int | None,
    vocab: Vocabulary,
    image: int | None,
    words: str | None,
) -> tuple[int, dict[str, Tensor], str, list[str]]:
    """The image, the caption as the text encoder reads it, its text, and its tokens."""
    split = os.path.basename(dataset.path).removesuffix("_ims.npy")
    if words is not None:
        item, text = own_sentence(dataset, vocab, words)
        if image is None:
            raise InputError("a sentence of one's own has no image; name one (--image)")
        tokens = tokens_of(item["captions"].tolist(), text, vocab)
    else:
        n = dataset.n_captions
        if caption is None or not 0 <= caption < n:
            raise InputError(f"--caption {caption}: {split} has {n} captions, from 0 on")
        item = dataset.caption_item(caption)
        ids = item["captions"].tolist()
        text = caption_text(dataset, caption, ids, vocab)
        tokens = tokens_of(ids, text, vocab)
        text = text or " ".join(tokens[1:-1])
        image = int(dataset.image_of[caption]) if image is None else image
    if not 0 <= image < dataset.n_images:
        raise InputError(f"--image {image}: {split} has {dataset.n_images} images, from 0 on")
    return image, item, text, tokens


def own_sentence(
    dataset: PrecompDataset, vocab: Vocabulary, words: str
) -> tuple[dict[str, Tensor], str]:
    """A sentence that is no caption of the data, as the text encoder reads it, and its text."""
    text = words if isinstance(words, str) else " ".join(words)
    if not text.strip():
        raise InputError("an empty sentence; give at least one word")
    lacks = dataset.caption_item(0).keys() - {"captions"} if dataset.n_captions else ()
    if lacks:
        raise InputError(
            f"this model also reads {', '.join(sorted(lacks))} of a caption, which a sentence of "
            "one's own lacks; write the sentence into the caption file of a split, make its "
            "dependencies with util/dependency_parser.py, and name it with --caption"
        )
    return {"captions": torch.tensor(vocab.encode(text))}, text


def caption_text(
    dataset: PrecompDataset, caption: int, ids: list[int], vocab: Vocabulary
) -> str | None:
    """The line of the caption file that gives these word ids; None if there is none."""
    lines = read_captions(dataset.text_path) if dataset.text_path else []
    fits = caption < len(lines) and vocab.encode(lines[caption]) == ids
    return lines[caption] if fits else None


def tokens_of(ids: list[int], text: str | None, vocab: Vocabulary) -> list[str]:
    """The words of a caption as they are written, <start> and <end> included; BERT's pieces."""
    word_of = {index: word for word, index in vocab.word2idx.items()}
    tokens = [word_of[index] for index in ids]
    if text is not None and not vocab.pieces:
        tokens[1:-1] = vocab.words(text)
    return tokens


def unknown_words(ids: Tensor, tokens: list[str], vocab: Vocabulary) -> list[str]:
    """A sentence that lists the words that the vocabulary lacks, if there are any."""
    unknown = vocab.word2idx[vocab.unknown]
    missing = [token for token, index in zip(tokens, ids.tolist(), strict=True) if index == unknown]
    missing = [token for token in dict.fromkeys(missing) if token != vocab.unknown]
    if not missing:
        return []
    said = ", ".join(f'"{token}"' for token in missing)
    return [f"Not in the vocabulary, so read as {vocab.unknown}: {said}."]


# Its regions


def region_boxes(
    dataset: PrecompDataset, image: int
) -> tuple[np.ndarray | None, tuple[float, float] | None]:
    """The boxes (R, 4) of an image's regions in pixels, and its width and height, for pictures.

    They are read from `{split}_ims_bbx.npy` and `{split}_ims_size.npy`, without filling; None where
    there is no such file. Raises InputError if boxes are not those of the features.
    """
    stem, row = dataset.path.removesuffix("_ims.npy"), int(dataset.rows[image])
    rows, regions, _ = dataset.images.shape
    size, path = None, f"{stem}_ims_size.npy"
    if os.path.isfile(path):
        size = tuple(read_sizes(path, rows)[row].tolist())
    path = f"{stem}_ims_bbx.npy"
    if not os.path.isfile(path):
        return None, size
    array = open_array(path, ndim=3, integers=True)  # (rows, R, 4)
    fewer = regions - dataset.last_region_is_image
    if array.shape not in ((rows, regions, 4), (rows, fewer, 4)):
        raise InputError(
            f"{path}: boxes of shape {array.shape}, but {dataset.path} holds {rows} images of "
            f"{regions} regions; expected ({rows}, {regions}, 4)"
        )
    boxes = dataset._of_regions(array, row).astype(np.float64)  # (R, 4)
    if not np.isfinite(boxes).all():
        raise InputError(f"{path}: row {row} (from 0) holds NaN or Inf")
    if array.shape[1] < regions:  # the last region is the image
        width, height = size or boxes[:, 2:].max(0)
        boxes = np.concatenate((boxes, [[0, 0, width, height]]))
    return boxes, size
