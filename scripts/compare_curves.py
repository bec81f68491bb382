"""The curves of scripts/compare.py: the summed recalls on dev by epoch, their spread over seeds.

One run says little of a setting: two seeds can lie further apart than two settings. So each epoch
gets a mean over the seeds with its interval, and two settings are compared seed by seed: the same
seed draws the same order of the data for both. Needs scipy; the picture needs matplotlib.

Shapes: S seeds, E epochs.
"""

import argparse
import importlib.util
import itertools
import json
from pathlib import Path

import numpy as np

from intervals import holm
from scripts.compare_table import Setting, ends
from util.cli import counted, replacing

CONFIDENCE = 0.95
POWER = 0.8  # how often the smallest difference would be found
SIZE = (7.0, 4.2)  # of the picture, inches


def mean_and_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Means (E,) over the seeds of values (S, E), and their intervals (2, E); None: one seed.

    The intervals are Student's: where the mean of ever more seeds would lie, if seeds spread as a
    normal distribution.
    """
    from scipy.stats import t

    n, mean = len(values), values.mean(0)  # (E,)
    if n < 2:
        return mean, None
    half = t.ppf((1 + CONFIDENCE) / 2, n - 1) * values.std(0, ddof=1) / np.sqrt(n)  # (E,)
    return mean, np.stack([mean - half, mean + half])  # (2, E)


def compare_seeds(a: np.ndarray, b: np.ndarray) -> dict | None:
    """Is b - a real? The paired t-test of values (S,) of the same seeds; None: one seed.

    Returns 'difference', its 'interval', 'p', and 'smallest': the true difference that so many
    seeds would find (p < 0.05) in 4 of 5 cases, (t_0.975 + t_0.8) sd / sqrt(S), where sd is that of
    the differences.
    """
    from scipy.stats import t

    n, differences = len(a), b - a  # (S,)
    if n < 2:
        return None
    mean, interval = mean_and_interval(differences[:, None])  # (1,), (2, 1)
    error = float(differences.std(ddof=1) / np.sqrt(n))
    smallest = (t.ppf((1 + CONFIDENCE) / 2, n - 1) + t.ppf(POWER, n - 1)) * error
    if error:
        p = float(2 * t.sf(abs(mean[0]) / error, n - 1))
    else:
        p = 1.0 if mean[0] == 0 else 0.0
    found = {"difference": float(mean[0]), "interval": interval[:, 0].tolist()}
    return found | {"p": p, "smallest": float(smallest)}


def curves_of(settings: list[Setting], logs: dict[tuple[str, int], list[dict]]) -> dict:
    """Of each setting by name: title, flags, seeds, and 'rsum' (S, E), as far as all seeds got."""
    found = {}
    for setting in settings:
        seeds = [seed for name, seed in logs if name == setting.folder]
        if seeds:
            runs = [[epoch["rsum"] for epoch in logs[setting.folder, seed]] for seed in seeds]
            length = min(map(len, runs))
            found[setting.folder] = {
                "title": setting.title,
                "flags": setting.all_flags,
                "seeds": seeds,
                "rsum": np.array([run[:length] for run in runs]),  # (S, E)
            }
    return found


def comparisons(curves: dict, tested: dict[tuple[str, int], float], split: str) -> list[dict]:
    """Each pair of settings: on dev after the last epoch that both have, and on the tested split.

    `tested` holds the summed recalls of the tested split by setting and seed. Holm's correction is
    for the pairs of settings; dev and the tested split are two views of one question.
    """
    found = []
    for a, b in itertools.combinations(curves, 2):
        seeds = [seed for seed in curves[a]["seeds"] if seed in curves[b]["seeds"]]
        rows = [[curves[x]["seeds"].index(seed) for seed in seeds] for x in (a, b)]
        last = min(curves[x]["rsum"].shape[1] for x in (a, b)) - 1
        on_dev = [curves[x]["rsum"][row, last] for x, row in zip((a, b), rows, strict=True)]
        on_test = [np.array([tested[x, seed] for seed in seeds]) for x in (a, b)]
        views = f"dev, after {counted(last + 1, 'epoch')}", f"{split}, best epoch on dev"
        tests = compare_seeds(*on_dev), compare_seeds(*on_test)
        if len(seeds) > 1:  # else there is no test
            pair = {"a": a, "b": b, "seeds": seeds}
            found.append([pair | {"where": x} | y for x, y in zip(views, tests, strict=True)])
    for rows in zip(*found, strict=True):  # of one view
        for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
            row["p_holm"] = p
    return list(itertools.chain.from_iterable(found))


def page(curves: dict, tests: list[dict]) -> str:
    """The curves and the comparisons in Markdown."""
    names, count = list(curves), max(x["rsum"].shape[1] for x in curves.values())
    lines = [
        "Summed recalls on dev after each epoch: the mean over the seeds, the 95 % interval of "
        "this mean, and in parentheses each seed. (If the tested split has more images, its "
        "recalls are lower.)",
        "",
        f"| epochs | {' | '.join(curves[name]['title'] for name in names)} |",
        f"|---|{'---|' * len(names)}",
    ]
    for epoch in range(count):
        cells = [cell(curves[name]["rsum"], epoch) for name in names]
        lines.append(f"| {epoch + 1} | {' | '.join(cells)} |")
    if tests:
        pairs = len(tests) // 2  # each on dev and on the tested split
        corrected = f", after Holm's correction for {pairs} pairs" if pairs > 1 else ""
        lines += [
            "",
            "Paired by seed: the second setting minus the first, with its 95 % interval; p of the "
            f"t-test{corrected}; and the true difference that so many seeds would find in 4 of 5 "
            "cases: if a test finds nothing, a smaller one may well be there.",
            "",
            "| | of | difference | p | found in 4 of 5 |",
            "|---|---|---|---|---|",
        ]
    for row in tests:
        a, b = (curves[row[x]]["title"] for x in "ab")
        p = "< 0.001" if row["p_holm"] < 0.001 else f"{row['p_holm']:.3f}"
        value = f"{row['difference']:+.1f} {ends(row['interval'])}"
        lines.append(f"| {a}, {b} | {row['where']} | {value} | {p} | {row['smallest']:.1f} |")
    return "\n".join([*lines, ""])


def cell(values: np.ndarray, epoch: int) -> str:
    """The mean, the interval and the seeds of (S, E) after an epoch."""
    if epoch >= values.shape[1]:
        return ""
    mean, interval = mean_and_interval(values[:, epoch : epoch + 1])
    if interval is None:
        return f"{mean[0]:.1f}"
    seeds = ", ".join(f"{x:.1f}" for x in values[:, epoch])
    return f"{mean[0]:.1f} {ends(interval[:, 0].tolist())} ({seeds})"


def draw(curves: dict, path: Path, title: str) -> None:
    """Write a picture: of each setting the mean, its interval as a band, each seed as a thin line.

    Without matplotlib there is a notice instead.
    """
    if not importlib.util.find_spec("matplotlib"):
        print(f"notice: {path} is not drawn: it needs matplotlib: pip install matplotlib")
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, curve in enumerate(curves.values()):
        colour, epochs = f"C{number}", np.arange(1, curve["rsum"].shape[1] + 1)
        mean, interval = mean_and_interval(curve["rsum"])
        for run in curve["rsum"]:
            axes.plot(epochs, run, color=colour, linewidth=0.7, alpha=0.5)
        label = f"{curve['title']} ({len(curve['seeds'])} seeds)"
        axes.plot(epochs, mean, color=colour, linewidth=2, marker="o", markersize=3, label=label)
        if interval is not None:
            axes.fill_between(epochs, *interval, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("epochs")
    axes.set_ylabel("summed recalls on dev")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=130)


def write(
    opt: argparse.Namespace,
    settings: list[Setting],
    logs: dict[tuple[str, int], list[dict]],
    results: list[dict],
) -> str:
    """Write curves.md, curves.json and curves.png of the finished runs; returns the page."""
    curves = curves_of(settings, logs)
    tested = {(result["setting"], result["seed"]): result["rsum"] for result in results}
    tests, out = comparisons(curves, tested, opt.split), Path(opt.out)
    text = page(curves, tests)
    with replacing(out / "curves.md") as part:
        Path(part).write_text(text)
    stored = {}
    for name, curve in curves.items():
        mean, interval = mean_and_interval(curve["rsum"])
        stored[name] = curve | {"rsum": curve["rsum"].tolist(), "mean": mean.tolist()}
        stored[name]["interval"] = None if interval is None else interval.T.tolist()
        stored[name]["tested"] = [tested[name, seed] for seed in curve["seeds"]]
    record = {"data": opt.data_name, "split": opt.split, "settings": stored, "tests": tests}
    with replacing(out / "curves.json") as part:
        Path(part).write_text(json.dumps(record, indent=1))
    draw(
        curves, out / "curves.png", f"{opt.data_name}: each seed, their mean, and its 95 % interval"
    )
    return text
