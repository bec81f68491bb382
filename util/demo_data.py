"""Make the demo set: drawn scenes, region features from their pixels, and English captions.

    python util/demo_data.py --out data     # writes data/demo_precomp/; one seed gives one set
    python util/demo_data.py --regions 4 36 --name demo_adaptive_precomp

A scene holds two to five shapes; each has a kind, a colour and a size. Every second scene is a twin
of the one before it: two shapes have exchanged colours or places. The same words describe both
scenes, so a bag of words cannot tell them apart. The regions are the boxes of the shapes, the boxes
around pairs of shapes (they show relations), the whole image, and random windows as distractors, in
random order. Each scene has 24 regions. With --regions LOW HIGH their number is drawn for each
scene, as extractors with adaptive boxes give them: the arrays have HIGH rows per scene, filled up
with zeros, and {split}_num_boxes.npy holds the counts.
"""

import math
import os
import random
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # when run by path

from util.arguments import Parser  # noqa: E402
from util.cli import InputError, progress, run  # noqa: E402

CANVAS = 128  # pixels per side
REGIONS = 24
VIEW = 12  # each box is resized to VIEW x VIEW pixels
DIM = 256
SPLITS = {"train": 3000, "dev": 500, "test": 1000}
COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 150, 60),
    "blue": (45, 85, 205),
    "yellow": (240, 205, 40),
    "purple": (130, 55, 165),
    "orange": (245, 130, 30),
    "black": (30, 30, 30),
    "pink": (245, 140, 190),
}
KINDS = {
    "ball": ("ball", "circle"),
    "box": ("box", "square"),
    "triangle": ("triangle",),
    "star": ("star",),
    "ring": ("ring",),
    "cross": ("cross",),
    "diamond": ("diamond",),
    "moon": ("moon", "crescent"),
}
SIZES = {"small": (("small", "little"), 9), "large": (("large", "big"), 17)}  # words, radius


def polygon(kind: str) -> list[tuple[float, float]]:
    """Corner points, within [-1, 1]^2, of a kind of shape; [] if it is drawn from circles."""
    if kind == "star":
        angles = [math.pi * (i / 5 - 0.5) for i in range(10)]
        radii = [1.0, 0.42] * 5
        return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]
    t = 0.35
    return {
        "box": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
        "triangle": [(0, -1), (1, 0.85), (-1, 0.85)],
        "diamond": [(0, -1), (0.7, 0), (0, 1), (-0.7, 0)],
        "cross": [(-t, -1), (t, -1), (t, -t), (1, -t), (1, t), (t, t)]
        + [(t, 1), (-t, 1), (-t, t), (-1, t), (-1, -t), (-t, -t)],
    }.get(kind, [])


def draw_scene(shapes: list[dict], backdrop: tuple[int, int, int]):
    """A PIL image of the shapes on a backdrop that darkens downwards."""
    from PIL import Image, ImageDraw

    scale = 3  # draw larger, then reduce, for smooth edges
    shade = np.linspace(1.0, 0.85, CANVAS)[:, None, None]
    pixels = np.broadcast_to(shade * np.array(backdrop), (CANVAS, CANVAS, 3)).astype(np.uint8)
    picture = Image.fromarray(pixels).resize((CANVAS * scale,) * 2, Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(picture)
    for shape in shapes:
        x, y, r = shape["x"], shape["y"], SIZES[shape["size"]][1]
        colour = COLOURS[shape["colour"]]

        def circle(cx, cy, radius, fill):
            box = [(cx - radius) * scale, (cy - radius) * scale]
            pen.ellipse([*box, (cx + radius) * scale, (cy + radius) * scale], fill=fill)

        points = [((x + r * px) * scale, (y + r * py) * scale) for px, py in polygon(shape["kind"])]
        if points:
            pen.polygon(points, fill=colour)
        else:  # a disc; ring and moon lose a second disc
            hole = tuple(int(c) for c in pixels[int(y), int(x)])
            circle(x, y, r, colour)
            if shape["kind"] == "ring":
                circle(x, y, 0.5 * r, hole)
            elif shape["kind"] == "moon":
                circle(x + 0.45 * r, y, 0.75 * r, hole)
    return picture.resize((CANVAS, CANVAS), Image.Resampling.BOX)


def draw_shapes(rng: random.Random) -> list[dict]:
    """Draw two to five shapes that do not touch; no two share both kind and colour."""
    shapes: list[dict] = []
    wanted = rng.choice((2, 3, 3, 4, 4, 5))
    while len(shapes) < wanted:
        size = rng.choice(tuple(SIZES))
        r = SIZES[size][1]
        shape = {
            "kind": rng.choice(tuple(KINDS)),
            "colour": rng.choice(tuple(COLOURS)),
            "size": size,
            "x": rng.uniform(r + 2, CANVAS - r - 2),
            "y": rng.uniform(r + 2, CANVAS - r - 2),
        }
        if is_clear([*shapes, shape]):
            shapes.append(shape)
    return shapes


def is_clear(shapes: list[dict]) -> bool:
    """Whether the shapes fit on the canvas, do not touch, and differ in kind or colour."""
    for i, a in enumerate(shapes):
        r = SIZES[a["size"]][1]
        if not all(r + 2 <= a[axis] <= CANVAS - r - 2 for axis in "xy"):
            return False
        for b in shapes[:i]:
            if math.hypot(a["x"] - b["x"], a["y"] - b["y"]) <= r + SIZES[b["size"]][1] + 6:
                return False
            if (a["kind"], a["colour"]) == (b["kind"], b["colour"]):
                return False
    return True


def draw_twins(rng: random.Random) -> tuple[list[dict], list[dict]]:
    """Draw a scene and its twin, in which two shapes have exchanged colours or places."""
    while True:
        shapes = draw_shapes(rng)
        other = [dict(shape) for shape in shapes]
        a, b = rng.sample(other, 2)
        for name in rng.choice((("colour",), ("x", "y"))):
            a[name], b[name] = b[name], a[name]
        if other != shapes and is_clear(other):
            return shapes, other


def noun(shape: dict, rng: random.Random, article: bool = True) -> str:
    """A phrase for a shape: its colour and kind, and half of the time its size."""
    words = [shape["colour"], rng.choice(KINDS[shape["kind"]])]
    if rng.random() < 0.5:
        words.insert(0, rng.choice(SIZES[shape["size"]][0]))
    if article:
        words.insert(0, "an" if words[0][0] in "aeiou" else "a")
    return " ".join(words)


def relation(a: dict, b: dict, rng: random.Random) -> str:
    """A phrase that relates a to b, on the axis on which they are further apart."""
    dx, dy = a["x"] - b["x"], a["y"] - b["y"]
    if abs(dx) > abs(dy):
        side = "left" if dx < 0 else "right"
        return rng.choice((f"to the {side} of", f"on the {side} of", f"{side} of"))
    return rng.choice(("above", "over", "higher than") if dy < 0 else ("below", "under", "beneath"))


def caption(shapes: list[dict], rng: random.Random) -> str:
    """One sentence about two or three of the shapes, their attributes and their relations."""
    some = rng.sample(shapes, min(len(shapes), rng.choice((2, 2, 3))))
    a, b = some[0], some[1]
    there = rng.choice(("there is ", "we see ", "the picture shows ", ""))
    verb = "" if there else " is"
    text = f"{there}{noun(a, rng)}{verb} {relation(a, b, rng)} {noun(b, rng)}"
    if len(some) == 3:
        c = some[2]
        text += rng.choice(
            (
                f" , and {noun(c, rng)} is {relation(c, b, rng)} it",
                f" and {relation(a, c, rng)} {noun(c, rng)}"
                if there
                else f" , with {noun(c, rng)}",
                f" ; there is also {noun(c, rng)}",
            )
        )
    elif rng.random() < 0.3:
        text += f" in a picture of {('two', 'three', 'four', 'five')[len(shapes) - 2]} shapes"
    return text[0].upper() + text[1:] + " ."


def boxes_of(
    shapes: list[dict], rng: random.Random, count: int = REGIONS
) -> list[tuple[float, float, float, float]]:
    """`count` boxes (x1, y1, x2, y2) in random order.

    First come the shapes, then pairs of shapes, the whole image, and random windows.
    """
    own = [
        (s["x"] - r, s["y"] - r, s["x"] + r, s["y"] + r)
        for s in shapes
        for r in (SIZES[s["size"]][1] + rng.uniform(0, 2),)
    ]
    pairs = [
        (min(p[0], q[0]), min(p[1], q[1]), max(p[2], q[2]), max(p[3], q[3]))
        for i, p in enumerate(own)
        for q in own[i + 1 :]
    ]
    boxes = [*own, *pairs, (0, 0, CANVAS, CANVAS)][:count]
    while len(boxes) < count:
        x, y = rng.uniform(0, CANVAS - 16), rng.uniform(0, CANVAS - 16)
        boxes.append((x, y, rng.uniform(x + 12, CANVAS), rng.uniform(y + 12, CANVAS)))
    rng.shuffle(boxes)
    return [tuple(min(max(v, 0), CANVAS) for v in box) for box in boxes]


def encoder(seed: int = 0) -> np.ndarray:
    """The fixed weights (2 VIEW^2 3 + 1, DIM) of the region encoder."""
    inputs = 2 * VIEW * VIEW * 3
    weights = np.random.default_rng(seed).normal(size=(inputs + 1, DIM)) / math.sqrt(inputs)
    return weights.astype(np.float32)


def encode_regions(picture, boxes: list, weights: np.ndarray) -> np.ndarray:
    """Features (len(boxes), DIM) of the boxes: one random ReLU layer over two views of the pixels.

    One view is the box itself. The other is a window of fixed size around the centre of the box; it
    shows the size of the shape and its surroundings.
    """
    from PIL import Image

    views = []
    for x1, y1, x2, y2 in boxes:
        cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
        half = 24
        cx, cy = (min(max(c, half), CANVAS - half) for c in (cx, cy))
        for box in ((x1, y1, x2, y2), (cx - half, cy - half, cx + half, cy + half)):
            views.append(picture.resize((VIEW, VIEW), Image.Resampling.BILINEAR, box=box))
    pixels = np.stack([np.asarray(view, np.float32) for view in views]) / 127.5 - 1
    flat = pixels.reshape(len(boxes), -1)
    flat = np.concatenate([flat, np.ones((len(boxes), 1), np.float32)], 1)
    return np.maximum(flat @ weights, 0)


def make_split(
    folder: str, split: str, n: int, seed: int, regions: tuple[int, int] | None = None
) -> None:
    """Draw and write one split of n scenes, of REGIONS regions each.

    With `regions`, the lowest and the highest number, a number is drawn for each scene;
    `{split}_num_boxes.npy` (n,) holds these numbers, and the rows behind them are zeros.
    """
    rng = random.Random(f"{seed} {split}")
    weights = encoder()
    pictures = os.path.join(folder, "pictures", split)
    os.makedirs(pictures, exist_ok=True)
    most = regions[1] if regions else REGIONS
    features = np.zeros((n, most, DIM), np.float16)
    boxes = np.zeros((n, most, 4), np.float32)
    counts = np.full(n, REGIONS, np.int32)
    captions, scenes = [], []
    for i in progress(range(n), f"drawing {split}"):
        scenes = scenes or list(draw_twins(rng))
        shapes = scenes.pop(0)
        backdrop = tuple(rng.randint(185, 250) for _ in range(3))
        picture = draw_scene(shapes, backdrop)
        picture.save(os.path.join(pictures, f"{split}_{i:05d}.png"))
        if regions:
            counts[i] = rng.randint(*regions)
        found = boxes_of(shapes, rng, counts[i])
        boxes[i, : counts[i]] = found
        features[i, : counts[i]] = encode_regions(picture, found, weights)
        captions += [caption(shapes, rng) for _ in range(5)]
    sizes = np.full(n, CANVAS, [("image_w", "<i8"), ("image_h", "<i8")])
    sizes["image_h"] = CANVAS
    np.save(os.path.join(folder, f"{split}_ims.npy"), features)
    np.save(os.path.join(folder, f"{split}_ims_bbx.npy"), boxes)
    np.save(os.path.join(folder, f"{split}_ims_size.npy"), sizes)
    count_path = os.path.join(folder, f"{split}_num_boxes.npy")
    if regions:
        np.save(count_path, counts)
    elif os.path.exists(count_path):  # of an older set in this folder
        os.remove(count_path)
    for name, lines in (("caps", captions), ("ids", [f"{split}_{i:05d}" for i in range(n)])):
        with open(os.path.join(folder, f"{split}_{name}.txt"), "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", default="data", type=os.path.expanduser, help="the set is written to OUT/NAME"
    )
    parser.add_argument("--name", default="demo_precomp", help="name of the set")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws another set")
    parser.add_argument("--train", type=int, default=SPLITS["train"], help="scenes to train on")
    parser.add_argument("--dev", type=int, default=SPLITS["dev"], help="scenes to validate on")
    parser.add_argument("--test", type=int, default=SPLITS["test"], help="scenes to test on")
    parser.add_argument(
        "--regions",
        nargs=2,
        type=int,
        metavar=("LOW", "HIGH"),
        help=f"draw each scene with LOW to HIGH regions; default: {REGIONS} each",
    )
    opt = parser.parse_args(argv)
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise InputError("drawing the demo set needs Pillow: pip install pillow") from None
    folder = os.path.join(opt.out, opt.name)
    if min(opt.train, opt.dev, opt.test) < 1:
        raise InputError("each split needs at least one scene")
    if opt.regions and not 1 <= opt.regions[0] <= opt.regions[1]:
        low, high = opt.regions
        raise InputError(f"--regions {low} {high}: expected 1 or more, the lower number first")
    for split in SPLITS:
        make_split(folder, split, getattr(opt, split), opt.seed, opt.regions)
    print(
        f"{folder}: {', '.join(f'{getattr(opt, s)} {s}' for s in SPLITS)} scenes, 5 captions each"
    )


if __name__ == "__main__":
    run(main, clean_up=True)
