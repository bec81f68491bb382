"""What the published programs compute, recorded by running them (see tests/golden)."""

import json
import shutil

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import checkpoint as ckpt
import evaluation
import options
import systems
import train
from tests.conftest import GOLDEN


@pytest.fixture(params=GOLDEN, ids=lambda path: path.name)
def case(request, tmp_path, monkeypatch):
    """(case.json, expected.npz) of a case, in a copy of its folder."""
    folder = tmp_path / "case"
    shutil.copytree(request.param, folder)
    monkeypatch.chdir(folder)
    info = json.loads((folder / "case.json").read_text())
    if places(info):
        pytest.importorskip("transformers", reason="pip install transformers")
    return info, np.load("expected.npz")


def close(got, want, tolerance):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1, np.abs(want).max()))


def places(info):
    """Where BERT's pieces lie; what else there is, the options of the checkpoint know."""
    return {"vocab_path": "bert"} if info["options"].get("text_enc_type") == "bert" else {}


def test_scores_and_metrics(case):
    info, want = case
    metrics = evaluation.evalrank(
        "init.pth.tar", split="test", save_path="sims.npy", **places(info)
    )
    scores = np.load("sims.npy")
    close(scores, want["sims"], 1e-5)
    if "metrics" not in info:  # the published evaluation of pfan_whole does not run
        return
    assert evaluation.i2t(scores, True)[1][0].tolist() == want["ranks_i2t"].tolist()
    assert evaluation.t2i(scores, True)[1][0].tolist() == want["ranks_t2i"].tolist()
    same_metrics(metrics, info["metrics"])


def same_metrics(got, want):
    for way in ("i2t", "t2i"):
        assert got[way] == pytest.approx(want[way], abs=1e-6)
    assert got["rsum"] == pytest.approx(want["rsum"], abs=1e-4)


def test_published_boxes(case):
    info, want = case
    if info["system"] != "gsmn":
        with pytest.raises(ValueError, match="published_boxes is for GSMN"):
            evaluation.evalrank("init.pth.tar", split="test", published_boxes=True)
        return
    metrics = evaluation.evalrank(
        "init.pth.tar", split="test", published_boxes=True, save_path="sims.npy"
    )
    close(np.load("sims.npy"), want["sims_published_boxes"], 1e-5)
    same_metrics(metrics, info["metrics_published_boxes"])


def test_embeddings(case):
    info, want = case
    net, words, opt = ckpt.load_model("init.pth.tar", places(info).get("vocab_path"))
    folder = systems.of(opt).find_data(opt.data_path, opt.data_name)
    data = systems.open_split(folder, "test", words, opt)
    images, captions = evaluation.encode_data(net, data)
    pooled = "image" in images  # one vector per image, and one per caption
    image, text = ("image", "sentence") if pooled else ("regions", "words")
    close(images[image][0].numpy(), want["image_embedding_0"], 1e-6)
    (first,) = [g[text][g["index"] == 0][0] for g in captions if (g["index"] == 0).any()]
    close(first.numpy(), want["caption_embedding_0"][: len(first)], 1e-6)


def test_training_steps(case):
    info, want = case
    chosen = options.defaults(info["system"])
    chosen |= {name: value for name, value in info["options"].items() if name in chosen}
    chosen |= {"resume": "init.pth.tar", "reset_start_epoch": True, "num_epochs": info["steps"]}
    chosen |= {"model_name": "out", "logger_name": "log", "log_step": 1}
    argv = []
    for name, value in chosen.items():
        if isinstance(value, bool):
            argv += [f"--{name}"] if value else []
        else:
            argv += [f"--{name}", str(value)]
    train.main(argv)
    log = EventAccumulator("log")
    log.Reload()
    losses = [event.value for event in log.Scalars("Le")]
    np.testing.assert_allclose(losses, info["losses"], rtol=1e-4)
    last = f"out/checkpoint_{info['steps'] - 1}.pth.tar"
    evaluation.evalrank(last, split="test", save_path="after.npy")
    # It is wide where a gradient is almost zero: Adam makes a whole step from its rounding error.
    close(np.load("after.npy"), want["sims_after_steps"], info["tolerance_after_steps"])
    assert torch.load(last, weights_only=False)["epoch"] == info["steps"] - 1
