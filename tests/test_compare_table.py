"""scripts/compare_table.py: intervals and paired tests of made-up runs of several systems."""

import argparse
import re

import numpy as np
import pytest

from intervals import holm, paired_test, recall_intervals
from scripts import compare_table
from scripts.compare_table import RECALLS, SYSTEMS, joined
from tests.test_intervals import draw
from util.cli import InputError

NAMES = list(SYSTEMS)
TITLES = {name: system.compared[0] for name, system in SYSTEMS.items()}


def runs(systems, seeds, n=60):
    """Results and ranks of runs of the same split; seed 0 of two systems is the same run."""
    results, ranks, unit = [], [], draw(0, n).unit
    for seed in seeds:
        for place, system in enumerate(systems):
            found = draw(1 if place < 2 and seed == 0 else 10 * seed + place, n)._replace(unit=unit)
            result = {
                "setting": system,
                "system": system,
                "seed": seed,
                "epochs": 9,
                "best_epoch": 7,
            }
            for name in RECALLS:
                way, k = name.split("_r")
                result[name] = 100 * (getattr(found, way) < int(k)).mean()
            result["rsum"] = sum(result[name] for name in RECALLS)
            costs = ("parameters", "train_minutes", "test_seconds", "peak_mib")
            results.append(result | dict.fromkeys(costs, 1))
            ranks.append(found)
    return results, ranks


def options(out, systems, seeds):
    known = {"out": out, "systems": systems, "seeds": seeds, "split": "test", "device": "cpu"}
    known |= {"settings": compare_table.settings_of(systems, None), "processes": 1}
    return argparse.Namespace(**known, data_name="x", minutes=None, num_epochs=9)


def numbers(cell):
    return [float(x) for x in re.findall(r"[-+]?[\d.]+", cell)]


def rows(text):
    """The cells of each row of the tables."""
    return [[cell.strip() for cell in x.split("|")[1:-1]] for x in text.splitlines() if "| " in x]


@pytest.mark.parametrize(
    ("system", "flags", "title"),
    [
        ("scan", "--embed_size 8 --lambda_softmax 9 --margin 0.1", "SCAN t-i AVG"),
        ("scan", "--agg_func LogSumExp", "SCAN t-i AVG --agg_func LogSumExp"),
        ("pfan", "--cross_attn=i2t", "PFAN-A t-i AVG --cross_attn i2t"),
        ("gsmn", "--is_sparse", "GSMN dense --is_sparse"),
        ("chan", "--margin 0.2 --drop", "CHAN VHA LSE --margin 0.2"),
    ],
)
def test_a_title_does_not_hide_that_the_model_is_another(system, flags, title):
    [all_have] = compare_table.settings_of([system], None, flags.split())
    assert all_have.title == title
    varied = compare_table.settings_of([system], ["", "--seed 3"], flags.split())
    assert [setting.title for setting in varied] == [title, f"{title} --seed 3"]


@pytest.mark.parametrize("seeds", [[0], [0, 1, 2]])
def test_the_intervals_are_of_the_mean_over_seeds(tmp_path, seeds):
    results, ranks = runs(NAMES[:3], seeds)
    opt = options(tmp_path, NAMES[:3], seeds)
    compare_table.write(results, ranks, opt, ["--batch_size", "8"])
    text = (tmp_path / "table.md").read_text()
    for place, name in enumerate(NAMES[:3]):
        own = ranks[place::3]
        (cells,) = [x for x in rows(text) if x[0] == TITLES[name]]
        found = recall_intervals(joined(own))
        for cell, way in zip(cells[1:], ("i2t", "t2i"), strict=False):
            r1, low, high, r5, _ = numbers(cell)
            assert [low, high] == pytest.approx(found[way]["r1"], abs=0.051)
            for k, value in ((1, r1), (5, r5)):
                means = [100 * (getattr(x, way) < k).mean() for x in own]
                assert value == pytest.approx(np.mean(means), abs=0.051)
        assert numbers(cells[3])[-2:] == pytest.approx(found["rsum"], abs=0.051)
        assert ("sd" in cells[3]) == (len(seeds) > 1)
    assert "images of the test split" in text.replace("\n", " ")


def test_more_seeds_make_the_mean_surer_but_not_as_more_images_would():
    """The images are the same ones in all seeds."""
    one = draw(1, 200)
    (low, high), (other_low, other_high) = (
        recall_intervals(x)["t2i"]["r1"] for x in (one, joined([one] * 4))
    )
    assert (low, high) == pytest.approx((other_low, other_high))


@pytest.mark.parametrize("n_systems", [1, 2, 4])
def test_each_pair_is_tested_and_the_p_values_are_corrected(tmp_path, n_systems):
    systems = NAMES[:n_systems]
    results, ranks = runs(systems, [0])
    text = compare_table.table(results, ranks, options(tmp_path, systems, [0]), [])
    pairs = [(a, b) for k, a in enumerate(systems) for b in systems[k + 1 :]]
    if not pairs:
        assert "Paired tests" not in text
        return
    found = [paired_test(ranks[systems.index(a)], ranks[systems.index(b)]) for a, b in pairs]
    p = holm([test[way]["p"] for test in found for way in ("i2t", "t2i")])
    assert f"for these {len(p)} tests" in text
    for k, ((a, b), test) in enumerate(zip(pairs, found, strict=True)):
        (cells,) = [x for x in rows(text) if x[0] == f"{TITLES[a]}, {TITLES[b]}"]
        for j, way in enumerate(("i2t", "t2i")):
            points, said, only = cells[1 + 3 * j : 4 + 3 * j]
            expected = [test[way]["difference"], *test[way]["interval"]]
            assert numbers(points) == pytest.approx(expected, abs=0.051)
            assert said == ("< 0.001" if p[2 * k + j] < 0.001 else f"{p[2 * k + j]:.3f}")
            assert numbers(only) == [test[way]["only_a"], test[way]["only_b"]]
    if n_systems > 1:  # the same run twice
        (cells,) = [x for x in rows(text) if x[0] == f"{TITLES[NAMES[0]]}, {TITLES[NAMES[1]]}"]
        assert cells[1].startswith("+0.0 [-") and cells[2] == "1.000" and cells[3] == "0, 0"


def test_while_some_runs_are_missing_the_seeds_that_both_have_are_tested(tmp_path):
    results, ranks = runs(NAMES[:2], [3, 4])
    opt = options(tmp_path, NAMES, [3, 4])
    text = compare_table.table(results[:3], ranks[:3], opt, [])  # no second seed of the second
    (cells,) = [x for x in rows(text) if x[0] == f"{TITLES[NAMES[0]]}, {TITLES[NAMES[1]]}"]
    found = paired_test(ranks[0], ranks[1])["t2i"]
    assert numbers(cells[6]) == [found["only_a"], found["only_b"]]
    assert TITLES[NAMES[2]] not in text


def test_ranks_in_a_file(tmp_path):
    one = draw(5, 30, "uneven")
    compare_table.save_ranks(tmp_path / "x.npz", one)
    other = compare_table.read_ranks(tmp_path / "x.npz")
    assert recall_intervals(one) == recall_intervals(other)
    assert [x.name for x in tmp_path.iterdir()] == ["x.npz"]
    objects = np.array([print, 1], dtype=object)
    np.savez(tmp_path / "y.npz", i2t=objects, t2i=objects, unit_i2t=objects, unit_t2i=objects)
    whole = (tmp_path / "x.npz").read_bytes()
    middle = len(whole) // 8  # within the compressed numbers
    np.save(tmp_path / "array.npy", one.i2t)
    bad = {
        "y.npz": (tmp_path / "y.npz").read_bytes(),
        "empty.npz": b"",
        "text.npz": b"no ranks",
        "half.npz": whole[: len(whole) // 2],
        "noise.npz": whole[:middle] + b"\xff" * 40 + whole[middle + 40 :],
        "array.npz": (tmp_path / "array.npy").read_bytes(),
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name}: not a file of ranks, or a dam") as error:
            compare_table.read_ranks(tmp_path / name)
        assert "pickle" not in str(error.value)


@pytest.mark.parametrize("seeds", [[5], [0, 7]])
def test_counts_over_several_seeds_are_said_to_be_sums(tmp_path, seeds):
    results, ranks = runs(NAMES[:2], seeds)
    text = compare_table.table(results, ranks, options(tmp_path, NAMES[:2], seeds), [])
    assert ("sums over the seeds" in text) == (len(seeds) > 1)


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        (7, "7"),
        (1000, "1 k"),
        (34_210, "34 k"),
        (99_400, "99 k"),
        (1e5, "0.1 M"),
        (2.35e7, "23.5 M"),
    ],
)
def test_small_models_show_thousands_of_parameters(parameters, said):
    assert compare_table.size(parameters) == said


def test_an_older_table_stays_if_the_new_one_cannot_be_written(tmp_path, monkeypatch):
    results, ranks = runs(NAMES[:2], [0])
    opt = options(tmp_path, NAMES[:2], [0])
    compare_table.write(results, ranks, opt, [])
    before = {path: path.read_text() for path in tmp_path.iterdir()}
    assert sorted(path.name for path in before) == ["table.csv", "table.md"]
    monkeypatch.setattr(compare_table.csv.DictWriter, "writerows", lambda *_: 1 / 0)
    monkeypatch.setattr(compare_table, "table", lambda *_: "\ud800")  # cannot be encoded
    with pytest.raises(UnicodeEncodeError):
        compare_table.write(results, ranks, opt, [])
    monkeypatch.setattr(compare_table, "table", lambda *_: before[tmp_path / "table.md"])
    with pytest.raises(ZeroDivisionError):
        compare_table.write(results, ranks, opt, [])
    assert {path: path.read_text() for path in tmp_path.iterdir()} == before
