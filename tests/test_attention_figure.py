"""scripts/attention_figure.py: the weights that it draws, and what it says of wrong input."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import checkpoint as ckpt
import options
import systems
import vocab
from scripts import attention_figure
from tests.conftest import train_args
from util import demo_data
from util.cli import InputError

SMALL = {"img_dim": demo_data.DIM, "embed_size": 16, "word_dim": 8, "data_name": "demo_precomp"}


def save_model(path: str, **flags) -> None:
    """A checkpoint with random weights, made for the drawn set or as the flags say."""
    torch.manual_seed(0)
    opt = options.parse(train_args(**SMALL | flags))
    words = vocab.deserialize_vocab(f"vocab/{opt.data_name}_vocab.json")
    words = systems.of(opt).vocabulary(words, opt)
    model = ckpt.build_model(opt, len(words))
    state = {"epoch": 0, "model": ckpt.state_dicts(model, opt), "opt": opt}
    torch.save(state | {"vocab": words.state_dict()}, path)


@pytest.fixture
def scenes(tiny):
    """The tiny folder with a few drawn scenes as well, and model.pth.tar for them."""
    demo_data.main(["--out", "data", "--train", "8", "--dev", "4", "--test", "6"])
    vocab.main(["--data_path", "data", "--data_name", "demo_precomp", "--threshold", "1"])
    save_model("model.pth.tar")
    return tiny


def drawn(monkeypatch, *flags: str) -> dict:
    """What the script hands to its drawing function, by the names of the arguments."""
    calls = []
    monkeypatch.setattr(attention_figure, "draw", lambda *args: calls.append(args))
    attention_figure.main(["--checkpoint", "model.pth.tar", "--out", "a.png", *flags])
    names = ("out", "picture", "text", "below", "words", "weights", "boxes")
    return dict(zip(names, *calls, strict=True))


@pytest.mark.parametrize("lambda_softmax", ["9", "30"])
def test_weights_are_a_softmax_over_the_regions(scenes, monkeypatch, lambda_softmax):
    save_model("model.pth.tar", lambda_softmax=lambda_softmax)
    got = drawn(monkeypatch, "--caption", "13")
    folder = scenes / "data/demo_precomp"
    caption = (folder / "test_caps.txt").read_text().splitlines()[13]
    assert got["text"].replace(" ", "") == caption.replace(" ", "")
    assert str(got["picture"]).endswith("demo_precomp/pictures/test/test_00002.png")
    assert np.array_equal(got["boxes"], np.load(folder / "test_ims_bbx.npy")[2])

    model, words, opt = ckpt.load_model("model.pth.tar")
    tokens = ["<start>", *words.words(caption), "<end>"]
    chosen = {k: token for k, token in enumerate(tokens) if k in got["words"]}
    assert got["words"] == chosen
    assert {"a", "an", ".", "is", "<start>"}.isdisjoint(chosen.values())
    nouns = {name for names in demo_data.KINDS.values() for name in names} | set(demo_data.COLOURS)
    assert [w for w in tokens if w in nouns] == [w for w in chosen.values() if w in nouns]

    with torch.no_grad():
        features = torch.from_numpy(np.load(folder / "test_ims.npy"))[2:3]
        v = model.img_enc(features)[0]  # (R, D)
        ids = torch.tensor([words.encode(caption)])
        e = model.txt_enc(ids, torch.tensor([ids.size(1)]))[0]  # (W, D)
    s = (e @ v.T).double().numpy()  # (W, R)
    s = np.where(s > 0, s, 0.1 * s)
    s = s / np.sqrt((s**2).sum(0))  # over the words of each region
    expected = np.exp(float(lambda_softmax) * s)
    expected /= expected.sum(1, keepdims=True)
    assert got["weights"].shape == (len(tokens), demo_data.REGIONS)
    np.testing.assert_allclose(got["weights"].sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(got["weights"], expected, rtol=1e-3, atol=1e-6)


def test_the_rank_is_that_of_the_scores(scenes, monkeypatch):
    model, words, opt = ckpt.load_model("model.pth.tar")
    dataset = systems.open_split("data/demo_precomp", "test", words, opt)
    for caption in (0, 13, 29):
        _, scores = attention_figure.attend(model, dataset, caption)
        with torch.no_grad():
            items = [dataset.image_item(k) for k in range(6)]
            images = model.encode_images(attention_figure.collate_fn(items))
            batch = attention_figure.collate_fn([dataset.caption_item(caption)])
            expected = model.similarity(images, model.encode_captions(batch))[:, 0]  # (6,)
        torch.testing.assert_close(scores, expected)
        rank = 1 + sorted(expected.tolist(), reverse=True).index(expected[caption // 5].item())
        below = drawn(monkeypatch, "--caption", str(caption))["below"]
        assert below == f"SCAN ranks this scene no. {rank} of 6"


def test_brightness_adds_up_the_boxes():
    boxes = np.array([[0, 0, 2, 3], [1, 0, 4, 1], [0, 0, 4, 3]], np.float32)
    light = attention_figure.brightness(np.array([0.5, 0.25, 0.125]), boxes, 3, 4)
    top = [0.625, 0.875, 0.375, 0.375]
    assert light.tolist() == [top, *[[0.625, 0.625, 0.125, 0.125]] * 2]


def test_other_systems_with_this_attention(scenes, monkeypatch):
    systems.SYSTEMS["pfan"].prepare_split("data/demo_precomp/test")
    save_model("model.pth.tar", model="pfan")
    weights = drawn(monkeypatch, "--caption", "3")["weights"]
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)


def test_a_picture(scenes):
    pytest.importorskip("matplotlib")
    from PIL import Image

    for caption in ("0", "7"):
        args = ["--checkpoint", "model.pth.tar", "--caption", caption, "--out", f"{caption}.png"]
        attention_figure.main(args)
        with Image.open(f"{caption}.png") as picture:
            assert picture.size == (1200, 430)
            assert picture.convert("RGB").getpixel((2, 2)) == (255, 255, 255)
            assert len(picture.convert("RGB").getcolors(2**20)) > 100
    assert not list(scenes.glob("*.part"))


def test_without_matplotlib(scenes, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # so that its import fails
    with pytest.raises(InputError, match="drawing needs matplotlib: pip install matplotlib"):
        attention_figure.main(["--checkpoint", "model.pth.tar", "--caption", "0"])


def test_what_is_wrong_is_said(scenes):
    def main(*flags):
        attention_figure.main(["--caption", "0", "--out", "a.png", *flags])

    message = "runs/demo/model_best.pth.tar: no such checkpoint"
    with pytest.raises(FileNotFoundError, match=message):
        main()
    done = subprocess.run(
        [sys.executable, attention_figure.__file__], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (1, f"error: {message}\n")
    for flags, title in (
        ({"cross_attn": "i2t"}, "SCAN"),
        ({"model": "chan"}, "CHAN"),
        ({"model": "gsmn"}, "GSMN"),
    ):
        save_model("other.pth.tar", **flags)
        message = (
            f"other.pth.tar: a model of {title} without SCAN's t2i attention, .*cross_attn t2i"
        )
        with pytest.raises(InputError, match=message):
            main("--checkpoint", "other.pth.tar")
    save_model("tiny.pth.tar", data_name="tiny_precomp", img_dim=12)
    with pytest.raises(InputError, match="pictures/test/0.png: no such picture; draw the set with"):
        main("--checkpoint", "tiny.pth.tar")
    model = ("--checkpoint", "model.pth.tar")
    with pytest.raises(InputError, match="--caption 30: test has 30 captions, from 0 on"):
        main(*model, "--caption", "30")
    with pytest.raises(FileNotFoundError, match="elsewhere/demo_precomp: no such data folder"):
        main(*model, "--data_path", "elsewhere")
    (scenes / "data/demo_precomp/test_ims_bbx.npy").unlink()
    with pytest.raises(FileNotFoundError, match="test_ims_bbx.npy: no such file"):
        main(*model)
    assert not (scenes / "a.png").exists()
