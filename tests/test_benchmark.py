"""The benchmark's figures: there, positive, and one JSON object."""

import json

import pytest
import torch

import model
from scripts import benchmark

KEYS = {"score_speedup", "score_vs_gemm", "step_speedup", "step_vs_floor", "step_memory_ratio"}
KEYS |= {"step_parts_vs_floor", "step_parts_memory_ratio", "encoders_speedup"}


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
    assert 100 < benchmark.peak_memory(name, "t2i", True, "cpu") < 10000


def test_the_usual_loop_calls_the_gru_as_a_whole(monkeypatch):
    monkeypatch.setattr(model, "packed_gru", None)
    work = benchmark.Work(SMALL, "t2i", torch.device("cpu"))
    assert work.step_loop() > 0
    work.encoders_usual()
    for ours in (work.step_ours, work.encoders):
        with pytest.raises(TypeError, match="'NoneType' object is not callable"):
            ours()


def test_gsmn(capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "QUICK", SMALL)
    monkeypatch.setattr(benchmark, "peak_memory", lambda *a: 1.0)
    benchmark.main(["--quick", "--model", "gsmn"])
    out = capsys.readouterr().out
    assert "| training step, ours / usual loop | " in out and "| dense | aim |" in out
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
    assert "| training step, ours / floor | " in out and "| VHA | aim |" in out
    # Of a batch of 32 at most 3 images a part and 6 captions, in five steps timed and five not.
    assert len(parts) == (11 + 6) * 10


def test_evalrank_and_growth(capsys, monkeypatch, tmp_path):
    """The published procedure comes to the same recalls; tables and picture are made."""
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
