"""The section of a report on curves over seeds, which scripts/compare.py writes.

The file is read as one of a stranger. Shapes: S seeds, E epochs.
"""

import math
from numbers import Real

import numpy as np

from report_figures import SERIES, Line, over_epochs
from util.cli import InputError, printable
from util.json_file import fault_of, read_object

MOST = 600.0  # a sum of six recalls, in percent


def read(path: str) -> dict:
    """The curves of a file, as scripts/compare.py writes it. Raises InputError."""
    advice = ", the curves.json of scripts/compare.py"
    record = read_object(path, advice)
    settings, tests = record.get("settings"), record.get("tests")
    if not isinstance(settings, dict) or not settings or not isinstance(tests, list):
        raise InputError(f"{path}: no settings and tests, expected{advice.removeprefix(',')}")
    try:
        curves = [curve(setting) for setting in settings.values()]
        rows = [test(row, settings) for row in tests]
        data = text(record.get("data", ""))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(f"{path}: not{advice.removeprefix(',')} ({fault_of(error)})") from None
    return {"curves": curves, "tests": rows, "data": data}


def text(x) -> str:
    if not isinstance(x, str) or len(x) > 1000:
        raise ValueError("a title is no text of at most 1,000 letters")
    return printable(x)


def numbers(values, *shape: int | None) -> np.ndarray:
    """Finite numbers of a shape; None: any length but 0."""
    found = np.array(values, dtype=float)
    fits = found.ndim == len(shape) and all(
        n == m or (m is None and n) for n, m in zip(found.shape, shape, strict=False)
    )
    if not fits or not np.isfinite(found).all():
        raise ValueError(f"numbers of shape {found.shape}, which do not fit, or no numbers")
    return found


def curve(setting: dict) -> dict:
    """Of one setting: title, seeds, summed recalls (S, E), mean (E,), interval (2, E) or None."""
    rsum = numbers(setting["rsum"], None, None)  # (S, E)
    if rsum.min() < 0 or rsum.max() > MOST:
        raise ValueError("a sum of six recalls that is not of 0 to 600")
    interval = setting["interval"]
    if interval is not None:
        interval = numbers(interval, rsum.shape[1], 2).T  # (2, E)
    seeds = numbers(setting["seeds"], len(rsum)).astype(int).tolist()
    mean = numbers(setting["mean"], rsum.shape[1])  # (E,)
    found = {"title": text(setting["title"]), "seeds": seeds, "rsum": rsum}
    return found | {"mean": mean, "interval": interval}


def test(row: dict, settings: dict) -> dict:
    """A comparison of two settings, by their titles."""
    figures = [row[name] for name in ("difference", "p_holm", "smallest")] + [*row["interval"]]
    if not all(isinstance(x, Real) and math.isfinite(x) for x in figures) or len(figures) != 5:
        raise ValueError("a comparison without its figures")
    pair = [text(settings[row[name]]["title"]) for name in ("a", "b")]
    names = "difference", "p_holm", "smallest", "interval"
    return {"pair": pair, "where": text(row["where"])} | {name: row[name] for name in names}


def section(path: str) -> dict:
    """All that the page shows of a file of curves, by the names that its text uses."""
    found = read(path)
    shown = found["curves"][:SERIES]
    lines, thin = [], []
    for number, one in enumerate(shown):
        band = None if one["interval"] is None else tuple(one["interval"])
        lines.append(Line(one["title"], one["mean"], band))
        thin += [(number, run) for run in one["rsum"]]
    said = "; ".join(f"{one['title']} ends at {one['mean'][-1]:.1f}" for one in shown)
    return {
        "data": found["data"],
        "names": [one["title"] for one in shown],
        "svg": over_epochs(lines, thin, f"Summed recalls on dev by epoch: {said}"),
        "rows": [
            [cell(one, epoch) for one in shown]
            for epoch in range(max(len(x["mean"]) for x in shown))
        ],
        "tests": found["tests"],
    }


def cell(one: dict, epoch: int) -> dict | None:
    """What the table says of a setting after an epoch; None: it ended before."""
    if epoch >= len(one["mean"]):
        return None
    interval = None if one["interval"] is None else one["interval"][:, epoch].tolist()
    seeds = ", ".join(f"{x:.1f}" for x in one["rsum"][:, epoch])
    return {"mean": float(one["mean"][epoch]), "interval": interval, "seeds": seeds}
