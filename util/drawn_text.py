"""Text on a matplotlib figure: letters that there are, and lines that fit their place.

Sizes are in points, widths in inches.
"""

import contextlib
import functools
import re
import warnings
from collections.abc import Iterator

FONTS = "DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Noto Sans"


@functools.cache
def families() -> list[str]:
    """The fonts to draw with: the later ones have letters that the first one lacks."""
    from matplotlib.font_manager import fontManager

    there = set(fontManager.get_font_names())
    return [name for name in FONTS if name in there]


@functools.cache
def letter_width(letter: str, bold: bool = False) -> float:
    """The width of a letter of 1 point, in inches."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(family=families(), size=100, weight="bold" if bold else "normal")
    with quiet_fonts():
        return text_to_path.get_text_width_height_descent(letter, font, False)[0] / 7200


@contextlib.contextmanager
def quiet_fonts() -> Iterator[None]:
    """A letter that no font has is drawn as a box, and matplotlib does not warn of each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        yield


def clean(text: str) -> str:
    """Text that can be drawn: no control letters, no $ that would begin a formula."""
    return "".join(x if x.isprintable() else " " for x in text).replace("$", r"\$")


def width_of(text: str, size: float, bold: bool = False) -> float:
    return size * sum(letter_width(x, bold) for x in text if x.isprintable())


def cut(text: str, width: float, size: float, bold: bool = False) -> str:
    """The text, shortened to a width."""
    if width_of(text, size, bold) <= width:
        return text
    while text and width_of(f"{text}…", size, bold) > width:
        text = text[:-1]
    return f"{text}…"


def wrap(text: str, width: float, size: float) -> list[str]:
    """The lines of a text; a word that is too long for a line is broken."""
    lines = [""]
    for part in re.findall(r"\s*\S+", text):
        if lines[-1] and width_of(lines[-1] + part, size) > width:
            lines.append("")
        part = part if lines[-1] else part.lstrip()
        for letter in part if width_of(part, size) > width else [part]:
            if lines[-1] and width_of(lines[-1] + letter, size) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def letters_without_font(text: str) -> str:
    """The letters of a text that no font here has; they are drawn as boxes."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    fonts = [get_font(findfont(FontProperties(family=name))) for name in families()]
    letters = dict.fromkeys(x for x in text if x.isprintable())
    return "".join(x for x in letters if not any(font.get_char_index(ord(x)) for font in fonts))
