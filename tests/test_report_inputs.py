"""report.py: photos, texts that could harm a page, models and their words, missing packages."""

import base64
import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import checkpoint as ckpt
import evaluation
import options
import report
import report_queries
import report_stats
import systems
import vocab
from tests.conftest import train_args
from tests.report_pages import HOSTILE, Page, make, page_of
from util import demo_data
from util.cli import InputError

Image = pytest.importorskip("PIL.Image")
ARGS = ["model.pth.tar", "--report", "report.html"]


def save_model(path: str, name="demo_precomp", img_dim=demo_data.DIM, **flags) -> None:
    """A checkpoint with random weights for the drawn set."""
    torch.manual_seed(0)
    opt = options.parse(train_args(**flags | {"img_dim": img_dim, "data_name": name}))
    words = vocab.deserialize_vocab(f"vocab/{name}_vocab.json")
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


def read_page() -> Page:
    with open("report.html", encoding="utf-8") as file:
        return Page(file.read())


def test_a_checkpoint_on_the_drawn_set(scenes, capsys):
    evaluation.main(ARGS)
    assert capsys.readouterr().out.endswith("Report saved to report.html\n")
    page = read_page()
    photos = page.all("img")
    assert len(photos) >= 30
    for photo in photos:
        kind, data = photo["src"].split(",")
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        assert kind == "data:image/jpeg;base64" and image.format == "JPEG"
        assert image.size == (int(photo["width"]), int(photo["height"]))
        assert max(image.size) <= report_queries.LONGEST
        assert photo["alt"].startswith("Photo test_0000")
    items = [" ".join(x.split()) for x in page.items]
    assert "--embed_size 16" in items and "--bi_gru" in items
    assert "--agg_func LogSumExp" not in items  # the default
    lines = (scenes / "data/demo_precomp/test_caps.txt").read_text().splitlines()
    shown = [text for _, text, _ in page.cards()]
    assert any(lines[0] in text for text in shown)
    rows = page.table("Words of the caption")
    assert sum(int(row[1]) for row in rows) == len(lines)


def test_two_checkpoints_of_one_name(scenes, capsys):
    for folder, seed in (("a", 1), ("b", 2)):
        (scenes / folder).mkdir()
        save_model(f"{folder}/m.pth.tar", margin=seed / 10)
    evaluation.main(["a/m.pth.tar", "b/m.pth.tar", "--report", "report.html"])
    page = read_page()
    heads = [row[0] for rows in page.tables for row in [rows[0]]]
    assert heads.count("Figure") == 1
    titles = [title for _, title in page.headings]
    assert "SCAN on test of demo_precomp: a/m, b/m" in titles
    assert sum("finds" in title for title in titles) == 5  # the section, and four lists
    alone = capsys.readouterr().out
    evaluation.main(["a/m.pth.tar", "b/m.pth.tar"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "time" not in line]
    assert [x for x in alone.splitlines() if "time" not in x and "Report" not in x] == lines


GSMN = {"num_block": 4, "feat_dim": 4}


@pytest.mark.parametrize("system", sorted(systems.SYSTEMS))
def test_every_system(system, tiny_positions):
    flags = {"model": system} | (GSMN if system == "gsmn" else {})
    save_model("model.pth.tar", "tiny_precomp", 12, **flags)
    evaluation.main(ARGS)
    page = read_page()
    assert f"{systems.SYSTEMS[system].title}: model" in [title for _, title in page.headings]
    assert sum(int(row[1]) for row in page.table("Words of the caption")) == 75


def test_photos_of_another_folder(scenes, capsys):
    (scenes / "mine").mkdir()
    for k in range(5):
        Image.new("RGBA" if k else "P", (400, 100 + k)).save(scenes / f"mine/test_0000{k}.png")
    (scenes / "mine/test_00005.png").write_bytes(b"no photo")
    evaluation.main([*ARGS, "--images", "mine"])
    said = capsys.readouterr().out
    assert "notice: 1 of the photos could not be read and is not in the report; it is mine" in said
    sizes = {photo["width"] for photo in read_page().all("img")}
    assert sizes == {"160"}


def test_without_pillow(scenes, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    evaluation.main(ARGS)
    assert "no photos, as they need pillow: pip install pillow" in capsys.readouterr().out
    page = read_page()
    assert "There are no photos: images are called by their names." in page.text
    assert not page.all("img") and any("test_00001" in text for _, text, _ in page.cards())
    with pytest.raises(InputError, match="--images needs pillow: pip install pillow"):
        report.check("mine")


def test_without_jinja2(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(InputError, match="--report needs jinja2: pip install jinja2"):
        report.write("none.html", make())


def test_texts_cannot_harm_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ranking = make(sources=2)
    ranking.captions = [HOSTILE + str(k) for k in range(60)]
    ranking.ids = [f'"><img src=x onerror=alert({k})>' for k in range(12)]
    ranking.sources = [f"<i>/{k}</i>.npy" for k in range(2)]
    page = page_of(ranking)
    assert "<script" not in page.text and "&lt;script&gt;" in page.text
    assert not page.all("img") and not page.all("i") and not page.all("b")
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
    assert any(HOSTILE in text for _, text, _ in page.cards())


def test_empty_captions_and_letters_of_all_kinds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ranking = make(n=3)
    ranking.captions = ["", "  ", "猫が走る", "\u202edog", "\x00\x1b", "é", *"abcdefghi"]
    text = page_of(ranking).text
    assert "(an empty caption)" in text and "猫が走る" in text


class Words(SimpleNamespace):
    """A split's words as a dataset holds them."""

    def __init__(self, captions, words):
        ids = [words.encode(caption) for caption in captions]
        lengths = torch.tensor([*map(len, ids), 9])  # one caption more than the split has
        flat = torch.tensor([*(x for row in ids for x in row), *range(9)])
        dataset = SimpleNamespace(n_captions=len(ids), lengths=lengths, words=flat)
        super().__init__(dataset=dataset, vocab=words)


def test_words_that_the_vocabulary_does_not_know():
    words = vocab.Vocabulary("one_sentence", vocab.UNICODE)
    for word in (*vocab.SPECIAL, *"a dog runs .".split()):
        words.add_word(word)
    captions = ["A dog runs .", "a Cat runs", "", "zebras , a cow"]
    lengths, unknown = report_stats.words_of(Words(captions, words))
    assert lengths.tolist() == [4, 3, 0, 4]
    assert unknown.tolist() == [0, 1, 0, 3]


def test_words_of_several_pieces(little):
    from bert import WordPieces

    words = WordPieces.read(little[0])
    captions = ["a red bird runs", "dog .", "car", "xyz a red", ""]
    lengths, several = report_stats.words_of(Words(captions, words))
    assert lengths.tolist() == [4, 2, 1, 3, 0]
    assert several.tolist() == [2, 0, 1, 0, 0]


def test_recalls_by_unknown_words(scenes):
    folder = scenes / "data/demo_precomp"
    words = vocab.deserialize_vocab("vocab/demo_precomp_vocab.json")
    lines = (folder / "test_caps.txt").read_text().splitlines()
    counts = [sum(x not in words.word2idx for x in words.words(line)) for line in lines]
    evaluation.main(ARGS)
    rows = read_page().table("Words unknown to the vocabulary")
    assert {int(row[0]): int(row[1]) for row in rows} == {n: counts.count(n) for n in set(counts)}
    known = (folder / "train_caps.txt").read_text().splitlines()[:30]
    (folder / "test_caps.txt").write_text("".join(f"{line}\n" for line in known))
    evaluation.main(ARGS)
    assert "All words of all captions are known." in read_page().text


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_matrices_of_files(tmp_path, monkeypatch, dtype):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        np.save(f"{name}.npy", rng.normal(size=(10, 50)).astype(dtype))
    evaluation.main(["a.npy", "b.npy", "--fold5", "--report", "report.html"])
    page = read_page()
    assert len(page.table("Fold")) == 5
    assert [row[0] for row in page.table("File")] == ["b", "b"]
