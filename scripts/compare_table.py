"""The table of scripts/compare.py: recalls with their intervals, costs, and paired tests."""

import argparse
import csv
import itertools
import re
import shlex
import statistics
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

import options
import systems
from intervals import WAYS, holm, paired_test, recall_intervals
from ranking import Ranks
from scripts.benchmark import machine
from util.cli import InputError, counted, replacing

# The systems to compare: `compared` is a title, and the flags of the paper's Flickr30K row.
SYSTEMS = {name: system for name, system in systems.SYSTEMS.items() if system.compared}
RECALLS = [f"{way}_r{k}" for way in WAYS for k in (1, 5, 10)]
TITLES = {"i2t": "image to text", "t2i": "text to image"}
ENDS = ("low", "high")
QUERIES = ("i2t", "t2i", "unit_i2t", "unit_t2i")  # arrays of a file of ranks


class Setting(NamedTuple):
    """A row of the table: a system with its flags."""

    folder: str  # its runs are in {folder}_seed{seed}
    system: str
    title: str
    flags: str  # of the system's row
    varied: str = ""  # flags of --vary: they come last

    @property
    def all_flags(self) -> str:
        return f"{self.flags} {self.varied}".strip()


def settings_of(
    names: list[str], varied: list[str] | None, common: Iterable[str] = ()
) -> list[Setting]:
    """A setting for each system; or for each of `varied`, flags of the one system there is.

    `common` are the flags that all get.
    """
    if varied is None:
        return [Setting(s, s, title_of(s, common), own_flags(s)) for s in names]
    if len(names) != 1:
        raise InputError(f"--vary needs one system, found {len(names)}: give --systems NAME")
    (system,), found = names, {}
    title = title_of(system, common)
    for flags in varied:
        name = "_".join([system, *re.findall(r"[\w.]+", flags)])
        if name in found:
            raise InputError(f"--vary: {flags!r} and an earlier one are both named {name}")
        varied_title = f"{title} {flags}".strip()
        found[name] = Setting(name, system, varied_title, own_flags(system), flags)
    return list(found.values())


def save_ranks(path: Path, ranks: Ranks) -> None:
    """Write the rank of each query and its image, for intervals and tests."""
    arrays = ranks.i2t, ranks.t2i, ranks.unit["i2t"], ranks.unit["t2i"]
    with replacing(path) as part, open(part, "wb") as file:
        np.savez_compressed(file, **dict(zip(QUERIES, arrays, strict=True)))


def read_ranks(path: Path) -> Ranks:
    """Read what save_ranks wrote; nothing is unpickled. Raises InputError."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            i2t, t2i, *units = (archive[name].astype(int) for name in QUERIES)
    except (ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        raise InputError(
            f"{path}: not a file of ranks, or a damaged one; remove it, and the run is tested again"
        ) from None
    return Ranks(i2t, t2i, None, None, dict(zip(WAYS, units, strict=True)))


def joined(runs: list[Ranks]) -> Ranks:
    """The runs of several seeds as one: an image's queries are those of all runs.

    A recall of it is the mean over the runs, and an image is drawn with its results in all of them.
    """
    unit = {way: np.concatenate([run.unit[way] for run in runs]) for way in WAYS}
    ways = [np.concatenate([getattr(run, way) for run in runs]) for way in WAYS]
    return Ranks(*ways, None, None, unit)


def run_intervals(ranks: Ranks) -> dict[str, float]:
    """The columns of table.csv with the 95 % intervals of a run."""
    found = recall_intervals(ranks)
    found = {name: found[name[:3]][name[4:]] for name in RECALLS} | {"rsum": found["rsum"]}
    return {f"{n}_{end}": x for n, xs in found.items() for end, x in zip(ENDS, xs, strict=True)}


def own_flags(system: str) -> str:
    """The flags of a system's row."""
    return f"--model {system} {SYSTEMS[system].compared[1]}"


def title_of(system: str, flags: Iterable[str]) -> str:
    """The title of a system's row, with the flags that make another model than that of the row.

    These are the flags of the row and the system's own: "SCAN t-i AVG" may have been told to take
    the LSE.
    """
    title, row = SYSTEMS[system].compared
    _, owners = options.build_parser()
    own = {flag.removeprefix("--") for flag, names in owners.items() if system in names}
    before, after = (vars(options.parse([*own_flags(system).split(), *x])) for x in ((), flags))
    for name in sorted(own | set(re.findall(r"--(\w+)", row))):
        if after[name] != before[name]:
            title += f" --{name}" + (f" {after[name]}" if after[name] is not True else "")
    return title


def last_of_each(flags: list[str]) -> str:
    """The flags that take effect: if one is given twice, the last."""
    kept: dict[str, list[str]] = {}
    for flag in flags:
        name, equals, value = flag.partition("=")
        if flag.startswith("--"):
            kept.pop(name, None)
            kept[name] = [value] if equals else []
        else:
            kept[list(kept)[-1]].append(flag)
    return shlex.join(part for name, values in kept.items() for part in (name, *values))


def head(opt: argparse.Namespace, flags: list[str]) -> list[str]:
    """What all runs have in common, and the heads of the columns."""
    where = machine()
    device = where["gpu"] if opt.device != "cpu" and where["gpu"] else where["cpu"]
    threads = 1 if opt.processes > 1 else where["threads"]
    time_given = f"{opt.minutes:g} minutes" if opt.minutes else counted(opt.num_epochs, "epoch")
    return [
        f"{opt.data_name}, {opt.split} split; {time_given} each; seeds "
        f"{', '.join(map(str, opt.seeds))}; {device}, "
        f"{counted(threads, 'thread')}, torch {where['torch']}.",
        "",
        f"All: `{last_of_each(flags)}`",
        "",
        "| | image to text R@1 / 5 / 10 | text to image R@1 / 5 / 10 | summed recalls | epochs "
        "(best on dev) | parameters | training | test | peak memory of training |",
        "|---|---|---|---|---|---|---|---|---|",
    ]


def row(setting: Setting, runs: list[dict], ranks: Ranks) -> str:
    """A setting's row: means over its runs, and intervals of these means."""

    def mean(name: str, form: str = ".1f") -> str:
        return format(statistics.mean(result[name] for result in runs), form)

    found = recall_intervals(ranks)
    total = mean("rsum")
    if len(runs) > 1:
        total += f" (sd {statistics.stdev(result['rsum'] for result in runs):.1f})"
    epochs = ", ".join(f"{result['epochs']} ({result['best_epoch']})" for result in runs)
    cells = [setting.title]
    for way in WAYS:
        first, *others = (mean(f"{way}_r{k}") for k in (1, 5, 10))
        cells.append(" / ".join([f"{first} {ends(found[way]['r1'])}", *others]))
    cells += [f"{total} {ends(found['rsum'])}", epochs, size(runs[0]["parameters"])]
    cells += [f"{mean('train_minutes')} min", f"{mean('test_seconds', '.0f')} s"]
    cells.append(f"{mean('peak_mib', '.0f')} MiB")
    return f"| {' | '.join(cells)} |"


def size(parameters: int) -> str:
    """A number of parameters: 12.3 M, 34 k below 0.1 M, or 120."""
    if parameters < 1000:
        return f"{parameters}"
    return f"{parameters / 1e6:.1f} M" if parameters >= 1e5 else f"{parameters / 1e3:.0f} k"


def ends(interval: list[float]) -> str:
    low, high = interval
    return f"[{low:.1f}, {high:.1f}]"


def tests(settings: list[Setting], runs_of: dict[str, dict[int, Ranks]]) -> list[str]:
    """The paired test of each pair of settings, on the seeds that both have."""
    pairs, found, several = list(itertools.combinations(settings, 2)), [], False
    for a, b in pairs:
        seeds = [seed for seed in runs_of[a.folder] if seed in runs_of[b.folder]]
        both = [joined([runs_of[x.folder][seed] for seed in seeds]) for x in (a, b)]
        found.append(paired_test(*both))
        several |= len(seeds) > 1
    if not pairs:
        return []
    p = holm([test[way]["p"] for test in found for way in WAYS])
    sums = " The numbers of queries that only one finds are sums over the seeds." if several else ""
    lines = [
        f"Paired tests of R@1: the second row minus the first, in points; p values after "
        f"Holm's correction for these {len(p)} tests.{sums}",
        "",
        f"| | {' | '.join(f'{x}, points | p | only first, second' for x in TITLES.values())} |",
        "|---|---|---|---|---|---|---|",
    ]
    for k, ((a, b), test) in enumerate(zip(pairs, found, strict=True)):
        cells = [f"{a.title}, {b.title}"]
        for way, corrected in zip(WAYS, p[2 * k :], strict=False):
            this = test[way]
            cells.append(f"{this['difference']:+.1f} {ends(this['interval'])}")
            cells.append("< 0.001" if corrected < 0.001 else f"{corrected:.3f}")
            cells.append(f"{this['only_a']:,}, {this['only_b']:,}")
        lines.append(f"| {' | '.join(cells)} |")
    return ["", *lines]


NOTES = """The brackets hold 95 % intervals: the bootstrap draws the images of the {split} split,
each with its captions and its results in all seeds. They say how sure these models' figures are,
given that other images could have been tested; the tests say the same of differences. Neither says
how other seeds would do: curves.md does, and the standard deviation (sd) over the seeds."""


def table(
    results: list[dict], ranks: list[Ranks], opt: argparse.Namespace, flags: list[str]
) -> str:
    """The page in Markdown: a row per setting, with means over its seeds, and the paired tests.

    `results` and `ranks` are those of the same runs; `flags` are those of all runs.
    """
    done = {result["setting"] for result in results}
    settings = [setting for setting in opt.settings if setting.folder in done]
    runs_of = {setting.folder: {} for setting in settings}  # the ranks by seed
    for result, of_run in zip(results, ranks, strict=True):
        runs_of[result["setting"]][result["seed"]] = of_run
    lines = head(opt, flags)
    for setting in settings:
        runs = [result for result in results if result["setting"] == setting.folder]
        lines.append(row(setting, runs, joined(list(runs_of[setting.folder].values()))))
    lines += ["", *NOTES.format(split=opt.split).splitlines(), *tests(settings, runs_of), ""]
    own = [f"{x.title}: `{x.all_flags}`" for x in settings]
    return "\n".join([*lines, *(f"- {line}" for line in own), ""])


def write(
    results: list[dict], ranks: list[Ranks], opt: argparse.Namespace, flags: list[str]
) -> None:
    """Write table.md and table.csv of the finished runs; see table()."""
    page, numbers = (Path(opt.out) / name for name in ("table.md", "table.csv"))
    with replacing(page) as part:
        Path(part).write_text(table(results, ranks, opt, flags))
    with replacing(numbers) as part, open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, list(results[0]))
        writer.writeheader()
        writer.writerows(results)
