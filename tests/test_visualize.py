"""util/visualize.py: which pair, which photo, the picture, the page, and what is said of faults."""

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint as ckpt
import explain
import options
import systems
import vocab
from tests.conftest import train_args
from util import attention_figure, demo_data, visualize
from util.cli import InputError

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
SMALL = {"img_dim": demo_data.DIM, "embed_size": 16, "word_dim": 8, "data_name": "demo_precomp"}
SETS = [
    {},
    {"cross_attn": "i2t"},
    {"model": "pfan"},
    {"model": "gsmn", "num_block": 4, "feat_dim": 4},
    {"model": "chan"},
    {"model": "chan", "coding_type": "THACoding"},
]


def save_model(path: str, **flags) -> None:
    """A checkpoint with random weights, made for the drawn set or as the flags say."""
    torch.manual_seed(0)
    opt = options.parse(train_args(**SMALL | flags))
    words = vocab.deserialize_vocab(f"vocab/{opt.data_name}_vocab.json")
    words = systems.of(opt).vocabulary(words, opt)
    model = ckpt.build_model(opt, len(words))
    state = {"epoch": 0, "model": ckpt.state_dicts(model, opt), "opt": opt}
    torch.save(state | {"vocab": words.state_dict()}, path)


@pytest.fixture(scope="module")
def drawn_set(tmp_path_factory):
    """A folder with a few drawn scenes and model.pth.tar for them, for the whole file."""
    root = tmp_path_factory.mktemp("scenes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        demo_data.main(["--out", "data", "--train", "8", "--dev", "4", "--test", "6"])
        vocab.main(["--data_path", "data", "--data_name", "demo_precomp", "--threshold", "1"])
        systems.SYSTEMS["pfan"].prepare_split("data/demo_precomp/test")
        save_model("model.pth.tar")
    return root


@pytest.fixture
def scenes(drawn_set, tmp_path, monkeypatch):
    """A copy of it, as the working directory."""
    root = tmp_path / "scenes"
    shutil.copytree(drawn_set, root)
    monkeypatch.chdir(root)
    return root


def show(*flags: str, model: str = "model.pth.tar") -> tuple[Path, str]:
    """Run the command; the picture's path and the page."""
    shutil.rmtree("out", ignore_errors=True)
    visualize.main([model, "--data_path", "data", "--out", "out", *flags])
    (picture,), (page,) = Path("out").glob("*.png"), Path("out").glob("*.html")
    assert len(list(Path("out").iterdir())) == 2, "no half files"
    return picture, page.read_text(encoding="utf-8")


def data_of(page: str) -> dict:
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1]
    )


@pytest.mark.parametrize("flags", SETS, ids=lambda x: "-".join(map(str, x.values())) or "scan")
def test_picture_and_page_of_every_system(scenes, flags, capsys):
    save_model("other.pth.tar", **flags)
    picture, page = show("--image", "2", "--caption", "11", model="other.pth.tar")
    assert picture.name == "test_image2_caption11.png"
    with Image.open(picture) as file:
        assert file.width == 1200 and len(file.convert("RGB").getcolors(2**22)) > 100
    data, said = data_of(page), capsys.readouterr().out
    model, words, opt = ckpt.load_model("other.pth.tar")
    dataset = systems.open_split("data/demo_precomp", "test", words, opt)
    e = explain.explain_pair(model, dataset, 11, words)
    assert data["tokens"] == e.tokens and len(data["boxes"]) == demo_data.REGIONS
    for view, same in zip(e.views, data["views"], strict=True):
        assert view.way == same["way"] and view.scored == same["scored"]
        np.testing.assert_allclose(same["weights"], view.weights, atol=1e-4)
    assert f"scores this pair {e.score:.4f}" in said and f"scores this pair {e.score:.4f}" in page
    boxes = np.load("data/demo_precomp/test_ims_bbx.npy")[2]
    ours = np.array(data["boxes"])
    np.testing.assert_allclose(ours[:, :2] + ours[:, 2:], boxes[:, 2:], atol=0.02)
    assert ("textEdges" in data and data["textEdges"] is not None) == (e.model == "GSMN")


def test_the_pair_is_any_image_with_any_sentence(scenes):
    lines = Path("data/demo_precomp/test_caps.txt").read_text().splitlines()
    for flags, name, line in (
        (("--caption", "13"), "test_image2_caption13", lines[13]),
        (("--image", "3"), "test_image3_caption15", lines[15]),
        (("--image", "test_00004", "--caption", "1"), "test_image4_caption1", lines[1]),
        (("--image", "test_00004.png"), "test_image4_caption20", lines[20]),
        (("--image", "0", "--text", "a red ball"), "test_image0_text", "a red ball"),
    ):
        picture, page = show(*flags)
        assert picture.stem == name
        assert f'<h1 dir="auto">{html.escape(line)}</h1>' in page


def test_numbers_and_ids(capsys):
    ids = ["COCO_val2014_000000000007.jpg", "COCO_val2014_000000391895.jpg", "x/dog.png", "1"]
    source = "test_ids.txt"
    for text, image in (("1", 1), ("391895", 1), ("000000000007", 0), ("dog.png", 2), ("dog", 2)):
        assert visualize.find_image(text, ids, 4, source) == image
    said = capsys.readouterr().out
    assert said == (
        "notice: --image 1 is taken as the number of an image, from 0; the image with the id 1 is "
        "number 3\n"
    )
    assert visualize.find_image("2", None, 4, source) == 2
    for text in ("7", "001"):
        assert visualize.find_image(text, ids, 4, source) == {"7": 0, "001": 3}[text]
    for text, some, said in (
        ("9", ids, "--image 9: no such image; there are 4 images, from 0 on, and its ids are in"),
        ("cat", None, "--image cat: no such image; .* and there is no test_ids.txt with ids"),
        ("dog", ["a/dog.jpg", "b/dog.jpg"], "several ids fit .*; give the number, from 0"),
    ):
        with pytest.raises(InputError, match=said):
            visualize.find_image(text, some, 4, source)


def test_photos_of_a_folder(scenes, capsys):
    folder = scenes / "photos"
    folder.mkdir()
    ids = [f"COCO_val2014_{n:012d}.jpg" for n in (7, 12, 391895, 5, 6, 8)]
    Path("data/demo_precomp/test_ids.txt").write_text("".join(f"{x}\n" for x in ids))
    shutil.rmtree("data/demo_precomp/pictures")
    Image.new("RGB", (256, 256), (200, 30, 30)).save(folder / "391895.png")
    _, page = show("--image", "391895", "--images", "photos")
    assert 'alt="The photo of image 2 (COCO_val2014_000000391895.jpg)"' in page
    assert 'viewBox="0 0 128.0 128.0"' in page  # the boxes are scaled to the photo
    assert "no photo" not in page and "no photo" not in capsys.readouterr().out
    picture, page = show("--image", "1", "--images", "photos")
    said = "notice: no photo of image 1: what is drawn stands on white; --images FOLDER names the"
    assert said in capsys.readouterr().out
    assert "no photo, so the boxes are drawn on white" in page.replace("\n", "")
    assert "<img" not in page
    with Image.open(picture) as file:
        assert file.size[0] == 1200
    with pytest.raises(InputError, match="nowhere: no such folder of photos"):
        show("--image", "1", "--images", "nowhere")
    (folder / "391895.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match="391895.png: not a picture that can be read"):
        show("--image", "2", "--images", "photos")


@pytest.mark.parametrize("kind", ["RGBA", "L", "P", "CMYK", "I;16", "1"])
def test_pictures_of_all_kinds(tmp_path, kind):
    path = tmp_path / ("x.jpg" if kind == "CMYK" else "x.png")
    Image.new(kind, (30, 20)).save(path)
    assert visualize.read_photo(str(path), (30, 20)).shape == (20, 30, 3)


def test_turned_and_cut_photos(tmp_path, capsys):
    """A camera's note that a photo is turned counts if the boxes are those of the turned one."""
    path, exif = str(tmp_path / "x.jpg"), Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (40, 30)).save(path, exif=exif)
    assert visualize.read_photo(path, (300, 400)).shape == (40, 30, 3)
    assert visualize.read_photo(path, (400, 300)).shape == (30, 40, 3)
    assert visualize.read_photo(path, None).shape == (40, 30, 3)
    assert not capsys.readouterr().out
    visualize.read_photo(path, (500, 100))
    assert (
        "40 x 30 pixels, but the boxes are those of an image of 500 x 100"
        in capsys.readouterr().out
    )


def test_without_boxes_the_regions_are_a_grid(scenes, capsys):
    Path("data/demo_precomp/test_ims_bbx.npy").unlink()
    for images in (True, False):
        if not images:
            shutil.rmtree("data/demo_precomp/pictures")
        picture, page = show("--caption", "3")
        assert (
            "no test_ims_bbx.npy, so nobody knows where the regions are" in capsys.readouterr().out
        )
        assert "no boxes, so the regions stand in a grid" in page.replace("\n", " ")
        assert ('<img class="beside"' in page) == images
        assert len(re.findall('<text class="number"', page)) == demo_data.REGIONS
        with Image.open(picture) as file:
            assert file.height > 500
    boxes, size = attention_figure.grid(7)
    assert size == (120.0, 120.0) and len({tuple(box) for box in boxes}) == 7


def test_without_sizes_the_photo_or_the_boxes_say_how_large_the_image_is(scenes, capsys):
    Path("data/demo_precomp/test_ims_size.npy").unlink()
    show("--caption", "3")
    assert "no test_ims_size.npy; the image is as large as the photo" in capsys.readouterr().out
    shutil.rmtree("data/demo_precomp/pictures")
    show("--caption", "3")
    assert "no test_ims_size.npy; the image is as large as the boxes" in capsys.readouterr().out
    path = "data/demo_precomp/test_ims_bbx.npy"
    np.save("data/demo_precomp/test_ims_size.npy", np.full((6, 2), 128.0))
    np.save(path, np.load(path) / 128)
    show("--caption", "3")
    assert "are they fractions of the image already?" in capsys.readouterr().out


def test_the_page_needs_nothing_else(scenes):
    _, page = show("--caption", "3")
    links = re.findall(r'(?:src|href)="([^"]{0,40})', page)
    assert links and all(link.startswith("data:") for link in links)
    assert set(re.findall(r"https?://[\w./]+", page)) == {"http://www.w3.org/2000/svg"}
    assert "url(" not in page.replace("url(#holes)", "") and "@import" not in page
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page
    assert all('alt="' in image for image in re.findall("<img[^>]*>", page))


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("matplotlib.figure", "drawing needs matplotlib: pip install matplotlib"),
        ("jinja2", "the page needs jinja2: pip install jinja2"),
        ("PIL", "reading photos needs Pillow: pip install pillow"),
    ],
)
def test_without_a_package(scenes, monkeypatch, module, said):
    monkeypatch.setitem(sys.modules, module, None)  # so that its import fails
    with pytest.raises(InputError, match=said):
        show("--caption", "0")


def test_what_is_wrong_is_said(scenes):
    done = subprocess.run(
        [sys.executable, visualize.__file__, "none.pth.tar", "--caption", "0", "--out", "out"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (1, "error: none.pth.tar: no such checkpoint\n")
    for flags, said in (
        ((), "give --image, --caption or both"),
        (("--text", "a dog"), "--text needs --image"),
        (("--image", "1", "--text", "a dog", "--caption", "1"), "--text and --caption: give one"),
        (("--caption", "30"), "--caption 30: test has 30 captions, from 0 on"),
        (("--image", "6"), "--image 6: no such image; there are 6 images, from 0 on"),
        (("--image", "1", "--text", " "), "an empty sentence"),
        (("--caption", "1", "--data_name", "elsewhere"), "data/elsewhere: no such data folder"),
    ):
        with pytest.raises((InputError, FileNotFoundError), match=said):
            show(*flags)
    Path("file").write_text("mine")
    with pytest.raises(InputError, match="--out file: a file; give a folder"):
        visualize.main(["model.pth.tar", "--data_path", "data", "--caption", "0", "--out", "file"])
    assert Path("file").read_text() == "mine" and not Path("out").exists()
