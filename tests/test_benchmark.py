"""The figures of the benchmark exist, are positive, and form one JSON object."""

import json

import pytest

import model
from scripts import benchmark
from system import System

KEYS = {"score_speedup", "score_vs_gemm", "step_speedup", "step_vs_floor", "step_memory_ratio"}
KEYS |= {"step_parts_vs_floor", "step_parts_memory_ratio"}


SMALL = {"img_dim": 16, "embed_size": 32, "word_dim": 8, "batch": 8, "images": 20}


def test_prints_one_json_object(capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "QUICK", SMALL)
    monkeypatch.setattr(benchmark, "peak_memory", lambda *a: 500.0)
    benchmark.main(["--quick", "--json", "--only", "scoring", "step", "memory"])
    result = json.loads(capsys.readouterr().out)
    assert result["machine"]["torch"] and result["machine"]["threads"] > 0
    for way in ("t2i", "i2t"):
        assert all(result[way][key] > 0 for key in KEYS)
        assert result[way]["step_ours_mib"] == 500
        assert result[way]["score_max_difference"] < 1e-5


@pytest.mark.parametrize("name", ["step_parts", "growth10"])
def test_peak_memory_is_that_of_a_process_of_its_own(name):
    assert 100 < benchmark.peak_memory(name, System(), "t2i", True, "cpu") < 10000


def test_gsmn(capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "QUICK", SMALL)
    monkeypatch.setattr(benchmark, "peak_memory", lambda *a: 1.0)
    benchmark.main(["--quick", "--model", "gsmn"])
    out = capsys.readouterr().out
    assert "| training step, ours / usual loop | " in out and "\n| | dense |\n" in out
    with pytest.raises(ValueError, match="--only: of gsmn there are scoring, step, memory"):
        benchmark.main(["--model", "gsmn", "--only", "growth"])


def test_chan(capsys, monkeypatch):
    parts = []

    def record(encode, part, **more):
        parts.append(part)
        return encode(part)

    monkeypatch.setattr(model, "checkpoint", record)
    monkeypatch.setattr(benchmark, "peak_memory", lambda *a: 1.0)
    benchmark.main(["--quick", "--model", "chan"])
    out = capsys.readouterr().out
    assert "| training step, ours / floor | " in out and "\n| | VHA |\n" in out
    # A part of a batch of 32 has at most 3 images or 6 captions; five steps are timed, five not.
    assert len(parts) == (11 + 6) * 10


def test_evalrank_and_growth(capsys, monkeypatch, tmp_path):
    """The published procedure gives the same recalls; the tables and the picture are made."""
    monkeypatch.setattr(benchmark, "QUICK", SMALL)
    monkeypatch.setattr(benchmark, "GROWTH", (10, 20))
    monkeypatch.setattr(benchmark, "GROWTH_CAPTIONS", 10)
    monkeypatch.setattr(benchmark, "peak_memory", lambda *a: 1.0)
    benchmark.main(["--quick", "--only", "evalrank", "growth"])
    out = capsys.readouterr().out
    assert "| evalrank, ours / published procedure |" in out and "| 20 x 10 |" in out


def test_refuses_few_repeats():
    with pytest.raises(ValueError, match="--repeats 3"):
        benchmark.main(["--repeats", "3"])
