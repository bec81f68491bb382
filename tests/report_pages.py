"""Rankings to report on, and what the page about one of them holds."""

import re
from html.parser import HTMLParser

import numpy as np

import evaluation
import report
from ranking import Ranking
from tests.conftest import WORDS

VOID = {"meta", "img", "wbr"}  # other elements without content are written as <path ... />
HOSTILE = '<script>alert("1")</script> & <b>' + "w" * 300


class Page(HTMLParser):
    """A page: its texts, tables, headings and elements; fails if it is not well-formed."""

    def __init__(self, text: str):
        super().__init__()
        self.text, self.open, self.elements, self.headings = text, [], [], []
        self.tables: list[list[list[str]]] = []
        self.items: list[str] = []  # of lists
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names))
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag == "li":
            self.items.append("")
        if re.fullmatch("h[1-6]", tag):
            self.headings.append([int(tag[1]), ""])

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data
        if "li" in self.open:
            self.items[-1] += data
        if self.open and re.fullmatch("h[1-6]", self.open[-1]):
            self.headings[-1][1] += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]

    def table(self, head: str) -> list[list[str]]:
        """The rows of the first table whose first cell is `head`, without its head."""
        tables = [[[" ".join(x.split()) for x in row] for row in rows] for rows in self.tables]
        return next(rows[1:] for rows in tables if rows[0][0] == head)

    def cards(self) -> list[tuple[int, str, list[float]]]:
        """Of each query that is shown: its rank, its text, and its scores."""
        found = []
        for text in (" ".join(x.split()) for x in self.items):
            if rank := re.match(r"Rank (\d+) ", text):
                scores = [float(x) for x in re.findall(r"(?<![\w.])-?\d+\.\d{4}(?!\d)", text)]
                found.append((int(rank[1]), text, scores))
        return found


def make(n=12, counts=None, sources=1, seed=0, texts=True, digits=None, **more) -> Ranking:
    """A ranking by random scores; image i has counts[i] captions (None: 5), in a mixed order.

    With `digits` the scores are rounded, so that there are ties.
    """
    rng = np.random.default_rng(seed)
    counts = [5] * n if counts is None else counts
    image_of = None
    if not more.get("candidates"):
        image_of = rng.permutation(np.repeat(np.arange(n), counts))
    shape = n, sum(counts)
    parts = [rng.normal(size=shape) for _ in range(sources)]
    if image_of is not None and n > 1:
        for part in parts:
            part[image_of, np.arange(shape[1])] += 1.5
    scores = sum(parts) / sources
    scores = scores if digits is None else scores.round(digits)
    names = [f"runs/{k}/model_best.pth.tar" for k in range(sources)]
    if texts:
        more["captions"] = [" ".join(rng.choice(WORDS, 6)) + f" {c}" for c in range(shape[1])]
        more["ids"] = [f"photo_{i:03}" for i in range(n)]
    metrics = evaluation.rank_and_print(
        scores, more.get("fold5", False), more.get("candidates", False), image_of
    )
    parts = parts if sources > 1 else []
    return Ranking(names, scores, image_of, metrics, parts=parts, **more)


def page_of(ranking: Ranking, images=None, seeds=None) -> Page:
    report.write("report.html", ranking, images, seeds)
    with open("report.html", encoding="utf-8") as file:
        return Page(file.read())


VARIANTS = {
    "usual": {},
    "folds": {"n": 23, "fold5": True},
    "uneven": {"n": 14, "counts": [1, 7, 3, 5, 2, 6, 5, 1, 1, 12, 4, 5, 5, 5]},
    "one caption": {"n": 30, "counts": [1] * 30},
    "three images": {"n": 3, "counts": [2, 1, 3]},
    "one image": {"n": 1, "counts": [3]},
    "no texts": {"texts": False},
    "two": {"sources": 2},
    "three, in folds": {"sources": 3, "fold5": True, "n": 20},
    "candidates": {"n": 24, "counts": [1] * 8, "candidates": True},
    "ties": {"n": 9, "digits": 0},
}
