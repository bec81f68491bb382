"""Draw what region-word attention does: a scene, its caption, and what each word looks at.

    bash scripts/demo.sh                   # the set of scenes and a model, in minutes
    python scripts/attention_figure.py     # writes docs/attention.png (pip install matplotlib)

For each content word the picture has a copy of the scene. A pixel of it keeps as much colour as the
regions over it have weight: t2i attention weights, which sum to 1 over the regions. The number is
the largest weight. The data set must have pictures (util/demo_data.py draws them), and the model
SCAN's t2i attention.

Shapes: I images, R regions, W words of the caption, H x V pixels; in a part of the work i images.
"""

import argparse
import re
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint as ckpt
import systems
from attention import REGIONS, WORDS, attention_weights
from data import PrecompDataset, collate_fn
from pairs import block_dots
from util.arguments import FROM_0
from util.arrays import open_array
from util.cli import InputError, replacing, run
from vocab import Vocabulary, read_captions

CAPTION = 3403  # three shapes of five, and one word twice for two of them
NO_CONTENT = set("a an the and is are there we see shows picture in of on to it with also".split())
FAINT = 0.18  # how much is left of a scene's colours where no weight is
DARK, GREY, PALE = "#222222", "#666666", "#dddddd"


def content_words(ids: Tensor, vocab: Vocabulary) -> dict[int, str]:
    """The caption's words that name something, by their positions among its word ids (W,)."""
    word_of = {index: word for word, index in vocab.word2idx.items()}
    words = [word_of[index] for index in ids.tolist()]
    return {k: word for k, word in enumerate(words) if word.isalpha() and word not in NO_CONTENT}


@torch.inference_mode()
def attend(model: nn.Module, dataset: PrecompDataset, caption: int) -> tuple[Tensor, Tensor]:
    """The weights (W, R) of a caption's words over its image's regions; all images' scores (I,)."""
    model.eval()
    images, captions = model(collate_fn([dataset[caption]]))
    s = block_dots(images["regions"], captions["words"])  # (1, W, 1, R)
    weights = attention_weights(s, WORDS, REGIONS, model.config)[0, :, 0]  # (W, R)
    scores = []
    for part in torch.arange(dataset.n_images).split(128):
        batch = collate_fn([dataset.image_item(image) for image in part.tolist()])
        scores.append(model.similarity(model.encode_images(batch), captions))  # (i, 1)
    return weights, torch.cat(scores)[:, 0]


def brightness(weights: np.ndarray, boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """For each pixel (H, V) the sum of the weights (R,) of the regions whose box it lies in."""
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5  # (V,), (H,)
    left, top, right, bottom = boxes.T[..., None]  # (R, 1) each
    across = (left <= x) & (x < right)  # (R, V)
    down = (top <= y) & (y < bottom)  # (R, H)
    return np.einsum("r,rh,rv->hv", weights, down, across).clip(0, 1)


def draw(out: str, picture: Path, text: str, below: str, words: dict, weights, boxes) -> None:
    """Write the scene and a copy for each of some words; weights (W, R), boxes (R, 4) in pixels."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.image import imread
        from matplotlib.patches import Rectangle
    except ImportError:
        raise InputError("drawing needs matplotlib: pip install matplotlib") from None
    pixels = imread(picture)[..., :3]  # (H, V, 3), 0 to 1
    figure = Figure(figsize=(12, 4.3), dpi=100, facecolor="white")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 2.2))
    scene = left.add_axes((0.06, 0.09, 0.9, 0.75))
    scene.imshow(pixels, interpolation="bicubic")
    width, font = (36, 14) if len(text) <= 70 else (46, 11)
    style = {"ha": "center", "color": DARK}
    left.text(0.51, 0.97, textwrap.fill(text, width), va="top", fontsize=font, **style)
    left.text(0.51, 0.03, below, ha="center", fontsize=11, color=GREY)
    note = f"What each word looks at: its attention weights over the {len(boxes)} regions"
    right.text(0.5, 0.94, note, ha="center", fontsize=12, color=GREY)
    panels = right.subplots(2, max(1, -(-len(words) // 2)), squeeze=False).ravel()
    right.subplots_adjust(0.01, 0.02, 0.99, 0.85, 0.05, 0.17)
    for some in (scene, *panels[len(words) :]):
        some.set_axis_off()
    for panel, (at, word) in zip(panels, words.items(), strict=False):
        light = brightness(weights[at], boxes, *pixels.shape[:2])[..., None]  # (H, V, 1)
        panel.imshow(1 - (1 - pixels) * (FAINT + (1 - FAINT) * light), interpolation="bicubic")
        panel.set_title(word, fontsize=14, fontweight="bold", color=DARK, pad=4)
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_color(PALE)
        for weight, (x1, y1, x2, y2) in zip(weights[at], boxes, strict=True):
            box = Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, linewidth=2, edgecolor=DARK)
            panel.add_patch(box).set_alpha(min(weight, 1))
        x1, y1, x2, y2 = boxes[weights[at].argmax()]
        y, side = (y2 + 3, "top") if y2 < 0.88 * len(pixels) else (y1 - 3, "bottom")
        panel.text((x1 + x2) / 2, y, f"{weights[at].max():.2f}", va=side, fontsize=11, **style)
    with replacing(out) as part:
        figure.savefig(part, format="png")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", default="runs/demo/model_best.pth.tar")
    parser.add_argument("--data_path", default="data", help="folder that holds the set of scenes")
    parser.add_argument("--split", default="test", help="train | dev | test")
    parser.add_argument("--caption", type=FROM_0, default=CAPTION, help="which one, from 0")
    parser.add_argument("--out", default="docs/attention.png", help="the picture to write")
    opt = parser.parse_args(argv)
    model, vocab, options = ckpt.load_model(opt.checkpoint)
    if getattr(getattr(model, "config", None), "cross_attn", None) != "t2i":
        raise InputError(
            f"{opt.checkpoint}: a model of {systems.of(options).title} without SCAN's t2i "
            "attention, in which words query regions; give one trained with --cross_attn t2i"
        )
    folder = Path(systems.of(options).find_data(opt.data_path, options.data_name))
    dataset = systems.open_split(str(folder), opt.split, vocab, options)
    if opt.caption >= dataset.n_captions:
        raise InputError(
            f"--caption {opt.caption}: {opt.split} has {dataset.n_captions} captions, from 0 on"
        )
    item = dataset[opt.caption]
    image = item["image_index"]
    name = dataset.ids[image] if dataset.ids else image
    picture = folder / "pictures" / opt.split / f"{name}.png"
    if not picture.is_file():
        raise InputError(f"{picture}: no such picture; draw the set with util/demo_data.py")
    boxes = open_array(
        str(folder / f"{opt.split}_ims_bbx.npy"), ndim=3, integers=True
    )  # (rows, R, 4)
    lines = read_captions(str(folder / f"{opt.split}_caps.txt"))
    text = re.sub(r" (?=[.,;])", "", lines[opt.caption])
    weights, scores = attend(model, dataset, opt.caption)  # (W, R), (I,)
    rank = 1 + int((scores > scores[image]).sum())
    below = f"{systems.of(options).title} ranks this scene no. {rank} of {len(scores):,}"
    words = content_words(item["captions"], vocab)
    of_image = boxes[int(dataset.rows[image])][: weights.size(1)]  # (R, 4), without filling
    draw(opt.out, picture, text, below, words, weights.numpy(), of_image)
    print(f"{opt.out}: {text} ({below})")


if __name__ == "__main__":
    run(main)
