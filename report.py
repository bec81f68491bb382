"""One page about an evaluation, to read in a browser: figures with intervals, curves, queries.

    python evaluation.py CHECKPOINT ... --report report.html [--images FOLDER]

The page holds all that it shows, and loads nothing. Its text is in util/report_page/. Shapes: N
images, M captions, Q queries of one direction.
"""

import os
from pathlib import Path

import numpy as np

import intervals
import options
import report_seeds
import systems
from exports import versions
from ranking import FOLDS, Ranking, Ranks
from report_figures import SERIES, Bar, Line, bars, curves
from report_queries import Items, has_pillow, hubs, lists, only_one_finds
from report_stats import (
    TOP,
    WAYS,
    Way,
    curve_band,
    even_ends,
    labels_of,
    look,
    metrics_of,
    rank_bins,
    recall_by,
    recall_curve,
    skewness,
    words_of,
)
from scoring import Split
from util.cli import InputError, counted, replacing

TEMPLATES = Path(__file__).resolve().parent / "util" / "report_page"


def check(images: str | None = None, seeds: str | None = None) -> None:
    """Raise InputError if a package is missing, or if the file of curves does not fit.

    Call it before hours of work.
    """
    try:
        import jinja2  # noqa: F401
    except ImportError:
        raise InputError("--report needs jinja2: pip install jinja2 scipy pillow") from None
    intervals.check_scipy()
    if images and not has_pillow():
        raise InputError("--images needs pillow: pip install pillow")
    if seeds:
        report_seeds.read(seeds)


def write(path: str, ranking: Ranking, images: str | None = None, seeds: str | None = None) -> None:
    """Write the page to `path`. `images` is a folder of photos; see util/photos.py.

    `seeds` is a file of curves over seeds, which scripts/compare.py writes. Raises InputError if a
    package is missing, if there is no such folder, or if the file does not fit.
    """
    check(images)
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    how = {"trim_blocks": True, "lstrip_blocks": True, "undefined": StrictUndefined}
    templates = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, **how)
    text = templates.get_template("page.html").render(
        page(ranking, images) | {"seeds": seeds and report_seeds.section(seeds)}
    )
    with replacing(path) as part:
        Path(part).write_text(text, encoding="utf-8", errors="replace")
    print(f"Report saved to {path}")


def page(ranking: Ranking, images: str | None) -> dict:
    """All that the page shows, by the names that its text uses."""
    items = Items(ranking, images)
    ways = {name: look(ranking, name) for name in WAYS}
    n, m = ranking.scores.shape
    ranks = [ranking.ranks_of(part) for part in ranking.parts]
    labels = labels_of(ranking.sources)
    shown = {
        "title": title_of(ranking),
        "facts": facts(ranking),
        "models": [model(*pair) for pair in zip(labels, ranking.splits, strict=False)],
        "n": n,
        "m": m,
        "drawn": len(np.unique(ranking.ranks.unit["t2i" if ranking.candidates else "i2t"])),
        "uneven_folds": len({(len(x), len(y)) for x, y in ranking.folds()}) > 1,
        "ranking": ranking,
        "ways": WAYS,
        "labels": labels,
        "columns": columns(ranking, labels, ranks),
        "tests": tests(labels, ranks),
        "curves": recall_charts(ranking, labels, ranks),
        "histogram": histogram(ranking, ways),
        "bins": bin_charts(ranking),
        "hubs": [
            hubs(ranking, items, name, way) | retrieved(ranking, way) for name, way in ways.items()
        ],
        "lists": lists(items, ways),
        "differences": only_one_finds(ranking, items, ranks) if ranks else [],
        "photos": any(items.photos),
        "top": TOP,
        "p_value": p_value,
        "counted": counted,
    }
    items.say_what_is_unreadable()
    return shown


def title_of(ranking: Ranking) -> str:
    """The systems, the split, the data set, and the files with the ends of their folders."""
    names = list(dict.fromkeys(systems.of(split.opt).title for split in ranking.splits))
    title = " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:]))) or "Evaluation"
    if ranking.folder:
        data = os.path.basename(os.path.abspath(ranking.folder))
        title += f" on {ranking.split} of {data}" if ranking.split else f" on {data}"
    return f"{title}: {', '.join(labels_of(ranking.sources, least=3))}"


def facts(ranking: Ranking) -> list[tuple[str, str]]:
    """What was evaluated: pairs of a name and a value."""
    n, m = ranking.scores.shape
    found = [("Files", "\n".join(ranking.sources))]
    if ranking.folder:
        found.append(("Split", " of ".join(filter(None, (ranking.split, ranking.folder)))))
    found.append(("Ranked", f"{counted(n, 'image')}, {counted(m, 'caption')}"))
    if ranking.candidates:
        found.append(("Images per caption", f"{n // m}"))
    else:
        counts = np.bincount(ranking.own_image)
        least, most = counts.min(), counts.max()
        found.append(("Captions per image", f"{least}" if least == most else f"{least} to {most}"))
    if ranking.fold5:
        each = counted(n // FOLDS, "image")
        found.append(("Folds", f"{FOLDS} of about {each}, each ranked alone"))
    of = versions()
    found.append(("Date", of.pop("date").replace("T", " ")))
    return [*found, ("Versions", ", ".join(f"{x} {y}" for x, y in of.items() if y))]


def model(label: str, split: Split) -> dict:
    """A checkpoint's system, and the options of its training that are not the system's defaults."""
    system, opt = systems.of(split.opt), vars(split.opt)
    usual = options.defaults(system.name)
    other = {name: opt[name] for name in usual if name in opt and opt[name] != usual[name]}
    other = {name: value for name, value in other.items() if name != "model"}
    return {"label": label, "system": system.title, "options": sorted(other.items())}


def columns(ranking: Ranking, labels: list[str], ranks: list[Ranks]) -> list[dict]:
    """Of each source and of their mean (or of the one source): label, metrics, intervals."""
    found = [(label, metrics_of(ranking, x), x) for label, x in zip(labels, ranks, strict=False)]
    last = "mean of their scores" if ranks else "all"
    found.append((last, ranking.metrics, ranking.ranks))
    return [
        {"label": x, "metrics": y, "intervals": intervals.intervals_or_none(z)} for x, y, z in found
    ]


def tests(labels: list[str], ranks: list[Ranks]) -> list[dict]:
    """The paired tests of each source against the first, with Holm's correction if several."""
    if len(ranks) < 2 or intervals.of_one_image(ranks[0]):
        return []
    found = []
    for label, other in zip(labels[1:], ranks[1:], strict=True):
        test = intervals.paired_test(ranks[0], other)
        found += [{"label": label, "way": way, **test[way]} for way in WAYS]
    for row, p in zip(found, intervals.holm([row["p"] for row in found]), strict=True):
        row["holm"] = p
    return found


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def recall_charts(ranking: Ranking, labels: list[str], ranks: list[Ranks]) -> list[dict]:
    """Recall over K: of one source both directions in a chart, of several a chart per direction."""
    folds = FOLDS if ranking.fold5 else 1
    n, m = ranking.scores.shape
    candidates = {"i2t": m // folds, "t2i": n // folds}

    def line(name: str, of: Ranks, way: str) -> Line:
        rank, unit = getattr(of, way), of.unit[way]
        values = recall_curve(rank, candidates[way])
        alone = intervals.of_one_image(of)
        return Line(name, values, None if alone else curve_band(rank, unit, len(values)))

    if not ranks:
        groups = {"Both directions": [line(WAYS[way], ranking.ranks, way) for way in WAYS]}
    else:
        several = [*zip(labels, ranks, strict=True)][: SERIES - 1]
        several.append(("mean of their scores", ranking.ranks))
        groups = {WAYS[way]: [line(label, x, way) for label, x in several] for way in WAYS}
    return [
        {
            "title": title,
            "names": [line.name for line in lines],
            "ks": [k for k in (1, 2, 5, 10, 20, 50, 100) if k <= max(len(x.values) for x in lines)],
            "lines": lines,
            "svg": curves(lines, "K", f"Recall at K, {title.lower()}: {said(lines)}"),
        }
        for title, lines in groups.items()
    ]


def said(lines: list[Line]) -> str:
    """Some values of lines, in words."""
    found = []
    for line in lines:
        some = [f"{line.values[k - 1]:.1f} at {k}" for k in (1, 5, 10) if k <= len(line.values)]
        found.append(f"{line.name} {', '.join(some)}")
    return "; ".join(found)


def histogram(ranking: Ranking, ways: dict[str, Way]) -> dict:
    """How many queries have which rank, both directions."""
    folds = FOLDS if ranking.fold5 else 1
    most = max(len(way.first) for way in ways.values()) // folds
    binned = [rank_bins(way.ranks, most) for way in ways.values()]
    while len(binned[0]) > 1 and not any(x[-1][1] for x in binned):
        binned = [x[:-1] for x in binned]
    groups, rows = [], []
    for both in zip(*binned, strict=True):
        label, counts = both[0][0], [count for _, count in both]
        shares = [100 * c / len(way.ranks) for c, way in zip(counts, ways.values(), strict=True)]
        rows.append((label, list(zip(counts, shares, strict=True))))
        named = zip(WAYS.values(), counts, strict=True)
        hints = [f"{name}: {count:,} of rank {label}" for name, count in named]
        first, dash, last = label.partition("–")
        drawn = [Bar(share, hint=hint) for share, hint in zip(shares, hints, strict=True)]
        groups.append((first + dash, last, drawn))
    about = "; ".join(f"rank {label}: {x[0][1]:.1f} and {x[1][1]:.1f} %" for label, x in rows)
    about = f"Ranks, image to text and text to image: {about}"
    return {"svg": bars(groups, "rank of the right answer", about), "rows": rows}


def bin_charts(ranking: Ranking) -> list[dict]:
    """Text to image, recalls by the captions' length and, of a model, by their rare words."""
    if ranking.captions is None:
        return []
    ranks, rare, what, none = ranking.ranks.t2i, None, "", ""
    lengths = np.array([len(caption.split()) for caption in ranking.captions])
    if ranking.splits:
        split = ranking.splits[0]
        lengths, rare = words_of(split)
        what, none = "words unknown to the vocabulary", "All words of all captions are known."
        if split.vocab.pieces:
            what, none = "words of several pieces", "All words of all captions are one piece each."
    charts = [("words of the caption", recall_by(lengths, ranks, even_ends(lengths)), None)]
    if rare is not None:
        ends = [0, 1, 2, 3, 4, max(5, int(rare.max()))]
        charts.append((what, recall_by(rare, ranks, ends), None if rare.any() else none))
    return [
        {"title": title, "rows": rows, "svg": bin_chart(title, rows), "none": said}
        for title, rows, said in charts
    ]


def bin_chart(title: str, rows: list[dict]) -> str:
    groups, about = [], []
    for row in rows:
        drawn, of = [], counted(row["n"], "caption")
        for k in (1, 5, 10):
            value, low, high = row[f"r{k}"]
            hint = f"R@{k} {value:.1f} [{low:.1f}, {high:.1f}] of {of}"
            drawn.append(Bar(value, (low, high), hint))
        groups.append((row["label"], f"n = {row['n']:,}", drawn))
        about.append(f"{row['label']}: R@1 {row['r1'][0]:.1f} of {of}")
    return bars(groups, title, f"Text to image, recalls by {title}: {'; '.join(about)}")


def retrieved(ranking: Ranking, way: Way) -> dict:
    """How evenly candidates come among the first TOP; None where all always do."""
    folds = FOLDS if ranking.fold5 else 1
    if len(way.top) // folds <= TOP:
        return {"skewness": None, "never": None, "most": None}
    never = int((way.top == 0).sum())
    return {"skewness": skewness(way.top), "never": never, "most": int(way.top.max())}
