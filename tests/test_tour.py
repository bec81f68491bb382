"""docs/tour.py runs, what it prints is true, and docs/tour.ipynb is the same text."""

import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint as ckpt
import options
import vocab
from tests.conftest import train_args
from util import demo_data

DOCS = Path(__file__).resolve().parent.parent / "docs"


def save_model(path: str, seed: int) -> None:
    """A small SCAN with random weights for the drawn set."""
    torch.manual_seed(seed)
    sizes = {"img_dim": demo_data.DIM, "embed_size": 16, "word_dim": 8}
    opt = options.parse(train_args(data_name="demo_precomp", **sizes))
    words = vocab.deserialize_vocab("vocab/demo_precomp_vocab.json")
    model = ckpt.build_model(opt, len(words))
    state = {"epoch": 0, "model": ckpt.state_dicts(model, opt), "opt": opt}
    torch.save(state | {"vocab": words.state_dict()}, path)


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """A folder docs/ beside a drawn set and two models of it; Jupyter starts in docs/."""
    monkeypatch.chdir(tmp_path)
    demo_data.main("--train 8 --dev 6 --test 14".split())
    vocab.main("--data_name demo_precomp --threshold 1".split())
    for folder in ("run", "docs"):
        (tmp_path / folder).mkdir()
    save_model("run/model_best.pth.tar", 0)
    save_model("run/checkpoint_2.pth.tar", 1)
    for name, value in {"RUN": "run", "EPOCH": "2"}.items():
        monkeypatch.setenv(f"TOUR_{name}", value)
    monkeypatch.chdir("docs")
    return tmp_path


def test_the_tour(drawn, monkeypatch, capsys):
    matplotlib = pytest.importorskip("matplotlib")
    pytest.importorskip("scipy")
    from matplotlib import pyplot as plt

    plt.switch_backend("agg")
    monkeypatch.setattr(sys, "path", [*sys.path])
    with matplotlib.rc_context():
        names = runpy.run_path(str(DOCS / "tour.py"))
        figures = [plt.figure(number) for number in plt.get_fignums()]
        plt.close("all")
    said = capsys.readouterr().out
    scores, ranks = names["scores"], names["ranks"]
    assert "14 images x 70 captions, float32" in said
    assert np.array_equal(ranks.t2i, (scores > scores[np.arange(70) // 5, np.arange(70)]).sum(0))
    i2t, t2i = 100 * np.mean(scores.argmax(1) // 5 == np.arange(14)), 100 * np.mean(ranks.t2i == 0)
    assert f"R@1: image to text {i2t:.1f}, text to image {t2i:.1f}\n" in said
    assert re.search(r"^i2t R@ 1 +[\d.]+ +[\d.]+ to [\d.]+$", said, re.M)
    (pair,) = re.findall(r"score (\S+); in the matrix (\S+)", said)
    assert pair[0] == pair[1]
    assert "looks most at region" in said and "<end>" in said
    other = 100 * np.mean(names["earlier"].ranks.t2i == 0)
    assert f"t2i: {t2i - other:+.1f} points of R@1" in said
    assert len(figures) == 4 and all(figure.axes for figure in figures)


def cells_of_script() -> list[tuple[str, str]]:
    """The kind and the text of each cell of docs/tour.py."""
    text = (DOCS / "tour.py").read_text().split("# ---\n")[2]
    parts = re.split(r"^# %%(.*)\n", text, flags=re.M)[1:]
    cells = []
    for head, source in zip(parts[::2], parts[1::2], strict=True):
        if "[markdown]" in head:
            lines = [re.sub("^# ?", "", line) for line in source.strip("\n").splitlines()]
            cells.append(("markdown", "\n".join(lines)))
        else:
            cells.append(("code", source.strip("\n")))
    return cells


def test_the_notebook_is_the_script():
    """If this fails: run the command that stands in the last cell of docs/tour.py."""
    path = DOCS / "tour.ipynb"
    cells = json.loads(path.read_text())["cells"]
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in cells] == cells_of_script()
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [x for x in outputs if x["output_type"] == "error" or x.get("name") == "stderr"]
    assert sum("image/png" in x.get("data", ()) for x in outputs) == 5
    assert path.stat().st_size < 500_000
    pages = re.findall(r"\]\((.+?)\)", "".join(text for _, text in cells_of_script()))
    assert len(pages) > 3 and all((DOCS / page).is_file() for page in pages)
