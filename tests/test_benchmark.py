"""The benchmark's figures: there, positive, and one JSON object."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import model
from scripts import benchmark

ROOT = Path(__file__).parent.parent
KEYS = {"score_speedup", "score_vs_gemm", "step_speedup", "step_vs_floor", "step_memory_ratio"}
KEYS |= {"step_parts_vs_floor", "step_parts_memory_ratio", "encoders_speedup"}


def test_prints_one_json_object():
    command = [sys.executable, ROOT / "scripts" / "benchmark.py", "--quick", "--json"]
    done = subprocess.run(
        [*command, "--only", "scoring", "step", "memory"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["machine"]["torch"] and result["machine"]["threads"] > 0
    for way in ("t2i", "i2t"):
        assert all(result[way][key] > 0 for key in KEYS)
        assert 100 < result[way]["step_ours_mib"] < 10000
        assert result[way]["score_max_difference"] < 1e-5


def test_the_usual_loop_calls_the_gru_as_a_whole(monkeypatch):
    monkeypatch.setattr(model, "packed_gru", None)
    work = benchmark.Work(benchmark.QUICK, "t2i", torch.device("cpu"))
    assert work.step_loop() > 0
    work.encoders_usual()
    for ours in (work.step_ours, work.encoders):
        with pytest.raises(TypeError, match="'NoneType' object is not callable"):
            ours()


def test_gsmn(capsys, monkeypatch):
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
    monkeypatch.setattr(benchmark, "QUICK", benchmark.QUICK | {"images": 20})
    monkeypatch.setattr(benchmark, "GROWTH", (10, 20))
    monkeypatch.setattr(benchmark, "GROWTH_CAPTIONS", 10)
    monkeypatch.setattr(benchmark, "peak_memory", lambda *a: 1.0)
    benchmark.main(["--quick", "--only", "evalrank", "growth"])
    out = capsys.readouterr().out
    assert "| evalrank, ours / published procedure |" in out and "| 20 x 10 |" in out


def test_refuses_few_repeats():
    with pytest.raises(ValueError, match="--repeats 3"):
        benchmark.main(["--repeats", "3"])
