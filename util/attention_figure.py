"""Draw one pair: the photo, what each word looks at, the matrix of words and regions, the edges.

The pair comes as explain.py's Explanation; only its names are used here, so this file needs no
model. util/visualize.py writes the picture, and train.py logs it to TensorBoard.

Shapes: W words, R regions, H x V pixels. Lengths on the sheet are inches, from its left and top.
"""

import math
from collections.abc import Callable

import numpy as np

from util.cli import InputError
from util.drawn_text import clean, cut, families, quiet_fonts, wrap

WIDTH = 12.0  # of the sheet
PANELS = 7  # side by side
HEAD = 2.3  # sides of the photo at the head
FAINT = 0.12  # how much is left of a photo's colours where no weight is
SHOWN = 8  # at most so many boxes in a panel, the strongest
SIDE = 320  # pixels of a panel's photo; more would not be seen
DARK, GREY, PALE, STRONG, BLUE = "#222222", "#666666", "#dddddd", "#d9480f", "#1c5fb0"
Paint = Callable[["Sheet"], None]


def library():
    """matplotlib's class Figure."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("drawing needs matplotlib: pip install matplotlib") from None
    return Figure


# Parts of the picture


class Sheet:
    """A matplotlib figure on which places are given in inches from the left and from the top."""

    def __init__(self, height: float):
        self.height, self.top = height, 0.0
        self.figure = library()(figsize=(WIDTH, height), dpi=100, facecolor="white")

    def axes(self, left: float, top: float, width: float, height: float):
        bottom = self.height - self.top - top - height
        place = left / WIDTH, bottom / self.height, width / WIDTH, height / self.height
        return self.figure.add_axes(place)

    def text(self, left: float, top: float, text: str, size: float, **style) -> None:
        style = {"va": "top", "color": DARK, "family": families()} | style
        y = 1 - (self.top + top) / self.height
        self.figure.text(left / WIDTH, y, clean(text), size=size, **style)


class Scene:
    """The photo of a pair, or what stands for it, and the boxes (R, 4) of its regions.

    Boxes are scaled from `size` to the photo's own pixels. Without boxes the regions are the fields
    of a grid, and the photo is not under them.
    """

    def __init__(self, regions: int, boxes=None, size=None, pixels=None):
        self.numbered = boxes is None
        if pixels is not None:
            pixels = np.asarray(pixels)[..., :3]
            pixels = pixels / 255 if pixels.dtype == np.uint8 else pixels.astype(float)
        self.photo = pixels  # (H, V, 3), 0 to 1, or None
        if boxes is None:
            boxes, size = grid(regions)
            pixels = None
        boxes = np.asarray(boxes, float)
        width, height = boxes[:, 2:].max(0).clip(1) if size is None else size
        if pixels is None:
            scale = SIDE / max(width, height)
            shape = max(1, round(height * scale)), max(1, round(width * scale))
            blue = [int(BLUE[k : k + 2], 16) / 255 for k in (1, 3, 5)]
            self.pixels = np.broadcast_to(np.array(blue), (*shape, 3))
        else:
            step = max(1, math.ceil(max(pixels.shape[:2]) / SIDE))
            self.pixels = pixels[::step, ::step]
        self.faint = 0 if pixels is None else FAINT
        high, wide = self.pixels.shape[:2]
        self.boxes = boxes * np.tile((wide / width, high / height), 2)  # (R, 4) in these pixels
        self.aspect = high / wide

    def fit(self, side: float) -> tuple[float, float]:
        """Width and height of the photo in a square of some side."""
        return min(side, side / self.aspect), min(side, side * self.aspect)

    def lit(self, weights: np.ndarray) -> np.ndarray:
        """The photo (H, V, 3), as bright at each place as the weights (R,) there."""
        light = brightness(weights, self.boxes, *self.pixels.shape[:2])
        light = light / max(light.max(), 1e-9)
        return 1 - (1 - self.pixels) * (self.faint + (1 - self.faint) * light[..., None])

    def show(self, axes, pixels: np.ndarray) -> None:
        axes.imshow(pixels, aspect="auto", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color(PALE)

    def outline(self, axes, region: int, **style) -> None:
        from matplotlib.patches import Rectangle

        x1, y1, x2, y2 = self.boxes[region]
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, **style))

    def number(self, axes) -> None:
        """Write the regions' numbers into the fields of the grid."""
        for region, (x1, y1, x2, y2) in enumerate(self.boxes):
            place = (x1 + x2) / 2, (y1 + y2) / 2
            axes.text(*place, str(region), size=5, ha="center", va="center", color=GREY)


def grid(regions: int) -> tuple[np.ndarray, tuple[float, float]]:
    """Boxes (R, 4) that lay regions out as a square grid, row by row, and the size of it."""
    across = math.ceil(math.sqrt(regions))
    y, x = np.divmod(np.arange(regions), across)
    boxes = np.stack((x + 0.05, y + 0.05, x + 0.95, y + 0.95), 1) * 40
    return boxes, (40.0 * across, 40.0 * (int(y[-1]) + 1))


def brightness(weights: np.ndarray, boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """For each pixel (H, V) the sum of the weights (R,) of the regions whose box it lies in."""
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5  # (V,), (H,)
    left, top, right, bottom = boxes.T[..., None]  # (R, 1) each
    across = (left <= x) & (x < right)  # (R, V)
    down = (top <= y) & (y < bottom)  # (R, H)
    return (down.T * weights) @ across.astype(float)  # (H, V)


def short(number: float) -> str:
    return f"{round(number, 2) + 0:.2f}".replace("-", "\N{MINUS SIGN}")  # + 0: no -0.00


def head(e, scene: Scene, size) -> tuple[float, Paint]:
    """The photo with the caption, the score and the notes: its height, and what paints it."""
    width, height = scene.fit(HEAD)
    left, room = 0.3 + width + 0.35, WIDTH - 0.3 - width - 0.7
    lines = wrap(e.caption, room, 15)[:8]
    first, last = e.tokens[0], e.tokens[-1]
    about = f"{len(e.tokens)} words, {first} and {last} included; {len(scene.boxes)} regions"
    if scene.photo is None:
        about += "; no photo" + ("" if scene.numbered else ": boxes on white")
    if scene.numbered:
        about += "; no boxes: the regions stand in a grid"
    notes = [line for note in (about, *e.notes) for line in wrap(note, room, 9.5)]
    text = 0.29 * len(lines) + 0.55 + 0.185 * len(notes)

    def paint(sheet: Sheet) -> None:
        axes = sheet.axes(0.3, 0.25, width, height)
        scene.show(axes, scene.pixels if scene.photo is not None else 0 * scene.pixels + 1)
        if scene.numbered:
            if scene.photo is not None:
                axes.clear()
                scene.show(axes, scene.photo)
        else:
            thin = {"linewidth": 0.6, "edgecolor": DARK, "alpha": 0.3}
            for region in range(len(scene.boxes)):
                scene.outline(axes, region, **thin)
        y = 0.25
        for line in lines:
            sheet.text(left, y, line, 15)
            y += 0.29
        sheet.text(left, y + 0.1, f"{e.model} scores this pair {e.score:.4f}", 12, weight="bold")
        for k, line in enumerate(notes):
            sheet.text(left, y + 0.45 + 0.185 * k, line, 9.5, color=GREY)

    return 0.25 + max(height, text) + 0.25, paint


def panels(e, view, scene: Scene) -> tuple[float, Paint]:
    """A panel for each word: the photo, lit where the word's weights are."""
    step = (WIDTH - 0.46) / PANELS
    width, height = scene.fit(step - 0.14)
    rows = -(-len(e.tokens) // PANELS)
    weights = np.asarray(view.weights)  # (W, R)
    scores = e.word_scores if view.way == "t2i" else None
    made = "the region with the largest weight: that weight"
    made = "the chosen region" if view.hard and view.way == "t2i" else made
    made = "the regions that choose it" if view.hard and view.way == "i2t" else made
    made = f"the word's own score | {made}" if scores is not None else made

    def paint(sheet: Sheet) -> None:
        sheet.text(0.3, 0.1, view.heading, 13, weight="bold")
        about = f"below each word: {made}"
        sheet.text(WIDTH - 0.3, 0.14, about, 9.5, color=GREY, ha="right")
        for k, token in enumerate(e.tokens):
            row, column = divmod(k, PANELS)
            left, top = 0.3 + column * step, 0.5 + row * (height + 0.52)
            middle = left + width / 2
            w, best = weights[k], int(weights[k].argmax())
            said = f"region {best}: {short(w[best])}"
            if view.hard:
                chosen = np.flatnonzero(w)
                some = ", ".join(map(str, chosen[:3])) + (", …" if len(chosen) > 3 else "")
                said = f"region {some}" if len(chosen) else "no region"
            if scores is not None:
                said = f"{short(float(scores[k]))} | {said}"
            title = cut(token, width, 10, bold=True)
            sheet.text(middle, top, title, 10, ha="center", weight="bold")
            sheet.text(middle, top + 0.18, cut(said, step, 7.5), 7.5, ha="center", color=GREY)
            axes = sheet.axes(left, top + 0.34, width, height)
            scene.show(axes, scene.lit(w))
            if scene.numbered and len(scene.boxes) <= 49:
                scene.number(axes)
            for region in np.argsort(-w)[1:SHOWN]:
                if w[region] > 1.5 * w.mean():  # more than its share
                    colour, alpha = STRONG if view.hard else DARK, float(w[region] / w[best])
                    scene.outline(axes, region, linewidth=1, edgecolor=colour, alpha=alpha)
            if w[best] > 0:
                scene.outline(axes, best, linewidth=1.8, edgecolor=STRONG)

    return 0.5 + rows * (height + 0.52) + 0.1, paint


def matrix(e, view, left: float, room: float) -> tuple[float, Paint]:
    """The heat map of words and regions in a width, with the numbers of words or regions."""
    plain = view.hard or view.way == "dots"
    values = np.asarray(e.dots if plain else view.weights)  # (W, R)
    count, regions = values.shape
    largest = max(float(np.abs(values).max()), 1e-9)
    words = e.word_scores if view.way == "t2i" else None
    below = e.region_scores if view.way == "i2t" else None
    x, width, row = left + 1.2, room - 1.2 - 0.9 * (words is not None), 0.19
    high = count * row
    span = f"white: 0, darkest: {short(largest)}"
    span = f"red: up to {short(largest)}, white: 0, blue: below" if plain else span
    about = "colour: the dots; marks: the choice" if view.hard else view.about
    lines = wrap(f"{about}; {span}", room, 8.5)
    top = 0.46 + 0.16 * len(lines)

    def paint(sheet: Sheet) -> None:
        made = "makes the score" if view.scored else "not in the score"
        title = view.heading if view.way == "dots" else f"{view.heading} ({made})"
        sheet.text(left, 0.1, cut(title, room, 12, bold=True), 12, weight="bold")
        for k, line in enumerate(lines):
            sheet.text(left, 0.36 + 0.16 * k, line, 8.5, color=GREY)
        axes = sheet.axes(x, top, width, high)
        colours = {"cmap": "RdBu_r", "vmin": -largest} if plain else {"cmap": "Blues", "vmin": 0}
        axes.imshow(values, aspect="auto", interpolation="nearest", vmax=largest, **colours)
        if view.hard:
            at = np.argwhere(np.asarray(view.weights))
            axes.scatter(at[:, 1], at[:, 0], s=14, color=DARK, edgecolors="white", linewidths=0.7)
        names = [clean(cut(token, 1.1, 8)) for token in e.tokens]
        axes.set_yticks(range(count), names, size=8, family=families())
        every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 1000) if n * width / regions >= 0.17)
        axes.set_xticks(range(0, regions, every), range(0, regions, every), size=6.5)
        axes.tick_params(length=2, color=GREY)
        axes.spines[:].set_color(PALE)
        sheet.text(left, top + high + 0.06, "region", 8, color=GREY)
        if words is not None:
            side = sheet.axes(x + width + 0.1, top, 0.75, high)
            side.barh(range(count), np.asarray(words), color=BLUE, height=0.7)
            side.set(ylim=(count - 0.5, -0.5), xticks=[], yticks=[])
            side.axvline(0, color=GREY, linewidth=0.6)
            side.spines[:].set_visible(False)
            sheet.text(x + width + 0.1, top + high + 0.06, "word's score", 8, color=GREY)
        if below is not None:
            side = sheet.axes(x, top + high + 0.3, width, 0.5)
            side.bar(range(regions), np.asarray(below), color=BLUE, width=0.7)
            side.set(xlim=(-0.5, regions - 0.5), xticks=[], yticks=[])
            side.axhline(0, color=GREY, linewidth=0.6)
            side.spines[:].set_visible(False)
            sheet.text(left, top + high + 0.45, "region's score", 8, color=GREY)

    return top + high + (0.95 if below is not None else 0.4), paint


def edges(e, scene: Scene) -> tuple[float, Paint]:
    """The graphs of a pair: the two strongest edges of each word, the strongest of each region."""
    width, height = scene.fit(3.0)
    of_words, of_regions = (np.asarray(x).copy() for x in (e.text_edges, e.visual_edges))
    np.fill_diagonal(of_words, 0)
    np.fill_diagonal(of_regions, 0)

    def paint(sheet: Sheet) -> None:
        sheet.text(0.3, 0.1, "The edges of the two graphs", 13, weight="bold")
        about = "the strongest one of each region, the strongest two of each word"
        sheet.text(WIDTH - 0.3, 0.14, about, 9.5, color=GREY, ha="right")
        axes = sheet.axes(0.3, 0.5, width, height)
        scene.show(axes, 1 - 0.35 * (1 - scene.pixels) if scene.faint else 0 * scene.pixels + 1)
        centres = (scene.boxes[:, :2] + scene.boxes[:, 2:]) / 2  # (R, 2)
        for region, other in enumerate(of_regions.argmax(1)):
            alpha = of_regions[region, other] / max(of_regions.max(), 1e-9)
            axes.plot(*centres[[region, other]].T, color=STRONG, alpha=alpha, linewidth=1)
        axes.plot(*centres.T, "o", color=DARK, markersize=3)
        axes.set(xlim=(0, scene.pixels.shape[1]), ylim=(scene.pixels.shape[0], 0))
        count = len(e.tokens)
        arcs = sheet.axes(width + 0.8, 0.5, WIDTH - width - 1.1, 1.9)
        turn = np.linspace(0, np.pi, 40)
        for word in range(count):
            for other in np.argsort(-of_words[word])[:2]:
                if of_words[word, other] <= 0:
                    continue
                x, reach = (word + other) / 2, abs(word - other) / 2
                alpha = float(of_words[word, other] / of_words.max())
                line = {"color": BLUE, "alpha": alpha, "linewidth": 1.2}
                arcs.plot(x + reach * np.cos(turn), reach * np.sin(turn), **line)
        names = [clean(cut(token, 0.9, 8)) for token in e.tokens]
        arcs.set_xticks(range(count), names, size=8, rotation=70, ha="right", family=families())
        for label in arcs.get_xticklabels():
            label.set_rotation_mode("anchor")
        arcs.set(yticks=[], xlim=(-0.5, count - 0.5), ylim=(0, None))
        arcs.spines[["left", "right", "top"]].set_visible(False)

    return 0.5 + max(height, 2.9) + 0.2, paint


def beside(one: tuple[float, Paint], other: tuple[float, Paint]) -> tuple[float, Paint]:
    """Two parts at one height."""

    def paint(sheet: Sheet) -> None:
        one[1](sheet)
        other[1](sheet)

    return max(one[0], other[0]), paint


def draw(explanation, boxes=None, size=None, pixels=None):
    """A matplotlib Figure of a pair.

    boxes (R, 4) are left, top, right, bottom in pixels of an image of `size` (width, height); None:
    the regions are laid out as a grid. pixels (H, V, 3) are the photo's, uint8 or from 0 to 1;
    None: boxes on white. Raises InputError if matplotlib is not there.
    """
    library()
    e = explanation
    scene = Scene(e.dots.shape[1], boxes, size, pixels)
    views = [view for view in e.views if view.way != "dots"] or e.views
    with quiet_fonts():
        parts = [head(e, scene, size)]
        parts += [panels(e, view, scene) for view in views if view.scored]
        if len(views) == 2 and e.dots.shape[1] <= 24:
            half = (WIDTH - 0.9) / 2
            lefts = 0.3, 0.6 + half
            one, other = (matrix(e, view, x, half) for view, x in zip(views, lefts, strict=True))
            parts.append(beside(one, other))
        else:
            parts += [matrix(e, view, 0.3, WIDTH - 0.6) for view in views]
        if e.text_edges is not None:
            parts.append(edges(e, scene))
        sheet = Sheet(sum(height for height, _ in parts))
        for height, paint in parts:
            paint(sheet)
            sheet.top += height
    return sheet.figure
