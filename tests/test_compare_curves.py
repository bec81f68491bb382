"""compare.py --seeds, --vary: settings over seeds, their curves, and whether they differ."""

import numpy as np
import pytest

from intervals import holm
from scripts import compare, compare_curves
from scripts.compare_curves import compare_seeds, mean_and_interval
from tests.test_compare import ARGS, TINY
from util.cli import InputError


def test_the_other_runs_go_on_if_one_fails(tiny, capfd):
    args = [*ARGS, "--processes", "2", "--num_epochs", "1", "--systems", "chan"]
    args += ["--vary", "--embed_size 16", "--embed_size 12", *TINY.split()[:1], *TINY.split()[3:]]
    args += ["--margin", "0.2"]  # CHAN's row has another
    with pytest.raises(InputError, match="1 of 2 runs failed"):
        compare.main(args)
    assert (tiny / "out/chan_embed_size_16_seed0/result_test.json").is_file()
    said = capfd.readouterr()
    assert "training ended with 1" in said.err
    assert "CHAN VHA LSE --margin 0.2 --embed_size 16, seed 0: summed recalls " in said.out
    assert "; 1 epoch took " in said.out
    # Two runs' lines of a test would mix.
    assert "Average i2t Recall" not in said.out
    assert "Average i2t Recall" in (tiny / "out/chan_embed_size_16_seed0/test.log").read_text()


def test_flags_to_vary():
    parser = compare.build_parser()
    args = [
        "--vary",
        "",
        "--drop",
        "--margin 0.1",
        "--seeds",
        "6",
        "--vary=--amp",
        "--minutes",
        "1",
    ]
    args += ["--data_path", "a", "--data_name", "b"]
    opt = parser.parse_args(compare.each_varied(args, parser))
    assert opt.vary == ["", "--drop", "--margin 0.1", "--amp"] and opt.seeds == [6]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--systems", "scan", "chan", "--vary", "--drop"], "--vary needs one system, found 2"),
        (["--systems", "scan", "--vary", "--amp", "--amp"], "'--amp' and an earlier one"),
    ],
)
def test_what_cannot_be_varied(tiny, more, message):
    with pytest.raises(InputError, match=message):
        compare.main([*ARGS, "--num_epochs", "1", *more])


def test_a_setting_without_quotes(tiny, capsys):
    with pytest.raises(SystemExit):
        compare.main([*ARGS, "--num_epochs", "1", "--systems", "scan", "--vary", "--margin", "0.1"])
    assert "0.1 is no flag; quote each setting" in capsys.readouterr().err


def test_each_view_is_corrected_for_the_pairs_of_settings():
    pytest.importorskip("scipy")
    rng = np.random.default_rng(1)
    seeds = list(range(5))
    curves = {x: {"seeds": seeds, "rsum": rng.normal(k, 1, (5, 2))} for k, x in enumerate("abc")}
    tested = {(x, seed): rng.normal() for x in "abc" for seed in seeds}
    rows = compare_curves.comparisons(curves, tested, "test")
    assert [row["where"] for row in rows] == ["dev, after 2 epochs", "test, best epoch on dev"] * 3
    for view in (rows[::2], rows[1::2]):
        assert [row["p_holm"] for row in view] == holm([row["p"] for row in view])
    two = compare_curves.comparisons({x: curves[x] for x in "ab"}, tested, "test")
    assert all(row["p_holm"] == row["p"] for row in two)


def test_intervals_and_tests_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    a, b = rng.normal(100, 5, (2, 6))
    found, want = compare_seeds(a, b), stats.ttest_rel(b, a)
    assert found["p"] == pytest.approx(want.pvalue)
    assert found["difference"] == pytest.approx((b - a).mean())
    low, high = want.confidence_interval()
    assert found["interval"] == pytest.approx([low, high])
    assert mean_and_interval(a[:1, None])[1] is None and compare_seeds(a[:1], b[:1]) is None
    assert compare_seeds(a, a)["p"] == 1 and compare_seeds(a, a + 1)["p"] == 0


def test_the_smallest_difference_is_found_in_four_of_five_cases():
    """By simulation: 6 seeds whose differences spread with sd 1."""
    pytest.importorskip("scipy")
    rng, n, cases = np.random.default_rng(0), 6, 2000
    zero = np.zeros(n)
    spread = [compare_seeds(zero, x)["smallest"] for x in rng.normal(0, 1, (cases, n))]
    true = np.sqrt(np.mean(np.square(spread)))  # of the sd 1
    found = [compare_seeds(zero, x)["p"] < 0.05 for x in rng.normal(true, 1, (cases, n))]
    assert 0.75 < np.mean(found) < 0.85


def test_curves_end_where_the_shortest_run_does():
    settings = [
        compare_curves.Setting("a", "scan", "A", ""),
        compare_curves.Setting("b", "b", "B", ""),
    ]
    logs = {("a", 0): [{"rsum": 1.0}] * 3, ("a", 1): [{"rsum": 2.0}] * 2}
    curves = compare_curves.curves_of(settings, logs)
    assert list(curves) == ["a"] and curves["a"]["rsum"].tolist() == [[1, 1], [2, 2]]
    assert "| 2 | 1.5 [-4.9, 7.9] (1.0, 2.0) |" in compare_curves.page(curves, [])
