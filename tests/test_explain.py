"""explain.py: the weights that are drawn give the score, for every system and variant."""

import copy
import json

import numpy as np
import pytest
import torch

import checkpoint as ckpt
import explain
import options
import systems
import vocab
from tests.conftest import train_args
from tests.pooled import Pooled
from tests.reference import aggregate, block_cosines, graph_score, log_gaussians
from util.cli import InputError
from vocab import deserialize_vocab

FOLDER = "data/tiny_precomp"
WORDS = "vocab/tiny_precomp_vocab.json"


def opened(seed: int = 0, **flags):
    """A random model for the tiny set as the flags say, its test split, and the vocabulary."""
    opt = options.parse(train_args(**flags))
    words = systems.of(opt).vocabulary(deserialize_vocab(WORDS), opt)
    torch.manual_seed(seed)
    model = ckpt.build_model(opt, len(words)).eval()
    return model, systems.open_split(FOLDER, "test", words, opt), words


def encoded(model, dataset, image: int, caption: int) -> tuple[dict, dict]:
    """The encodings of a pair, without its first dimension, in float64."""
    item = dataset.image_item(image) | dataset.caption_item(caption)
    with torch.no_grad():
        both = model(explain.collate_fn([item]))
    return tuple({name: x[0].double() for name, x in one.items()} for one in both)


def cosines(x, y):
    return (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1)).clamp_min(1e-8)


def scan_score(e, model, image, caption):
    """SCAN's and PFAN's score of the drawn weights: attended vectors, cosines, their aggregate."""
    config, words, regions = model.config, caption["words"], image["regions"]
    assert e.scored == (config.cross_attn,)
    if config.cross_attn == "t2i":
        weights = e.t2i.double()
        if getattr(model, "need_box_whole", False):
            assert not weights[:, -1].any()
            weights, regions = weights[:, :-1], regions[:-1]
        x, kept = cosines(words, weights @ regions), e.word_scores
    else:
        weights = e.i2t.double().T
        x, kept = cosines(regions, weights @ words), e.region_scores
    torch.testing.assert_close(weights.sum(1), torch.ones(len(weights)).double())
    torch.testing.assert_close(kept.double(), x, atol=1e-5, rtol=1e-4)
    score = aggregate(x, config.agg_func, config.lambda_lse)
    largest = weights.max(1).values
    bonus = config.bonus * aggregate(largest, config.agg_func, config.lambda_lse)
    how = config.agg_func if config.agg_func == "LogSumExp" else config.agg_func.lower()
    whose = "words'" if config.cross_attn == "t2i" else "regions'"
    said = [note for note in e.notes if "largest weights" in note]
    assert len(said) == bool(config.bonus)
    for note in said:
        assert note.startswith(f"Half of the {how} of the {whose} largest weights adds ")
        number = float(note.split(" adds ")[1].split()[0])
        assert number == pytest.approx(bonus.item(), abs=2e-4)
    return score + bonus


def whole_score(e, model, image, caption):
    """PFAN with whole images: the whole image, and perhaps the last region, with the sentence."""
    sentence = caption["sentence"]
    score = model.lambda_whole * cosines(image["whole"], sentence)
    if model.need_box_whole and model.config.cross_attn == "t2i":
        score = score + 0.5 * cosines(image["regions"][-1], sentence)
    return score + scan_score(e, model, image, caption)


def chan_score(e, model, image, caption):
    """CHAN's score: the numbers of the drawn choices, or of the drawn means of words, pooled."""
    config, words, regions = model.config, caption["words"], image["regions"]
    if config.coding_type == "VSACoding":
        attended = e.i2t.double().T @ words
        x = (regions * attended).sum(1) / (attended.norm(dim=1) + 1e-8)
    else:
        chosen, dim = (e.t2i, 1) if config.coding_type == "VHACoding" else (e.i2t, 0)
        x = ((words @ regions.T) * chosen).sum(dim)
    kept = e.word_scores if config.coding_type == "VHACoding" else e.region_scores
    torch.testing.assert_close(kept.double(), x, atol=1e-5, rtol=1e-4)
    belta = config.belta
    return {
        "LSEPooling": lambda: (x / belta).exp().sum().log(),
        "MeanPooling": lambda: x.mean(),
        "MaxPooling": lambda: x.max(),
        "SumPooling": lambda: x.sum(),
        "SoftmaxPooling": lambda: ((x / belta).softmax(0) * x).sum(),
    }[config.pooling_type]()


def gsmn_score(e, model, image, caption):
    """GSMN's: the nodes' vectors of the drawn weights, through the graphs that are drawn."""
    blocks, words, regions = model.config.num_block, caption["words"], image["regions"]
    nodes = block_cosines(words, e.t2i.double() @ regions, blocks)  # (W, B)
    graphs = [copy.deepcopy(g).double() for g in (model.textual_graph, model.visual_graph)]
    if model.config.neighbours:
        w = e.text_edges.double()[:, :, None].expand(-1, -1, 8)
        text = graph_score(nodes, w, torch.ones(w.shape[:2]).double(), graphs[0], True)
        torch.testing.assert_close(e.visual_edges.sum(1), torch.ones(len(regions)))
    else:
        one = torch.ones(1, 1, 8).double(), torch.ones(1, 1).double()
        each = [graph_score(node[None], *one, graphs[0], False) for node in nodes]
        text = torch.stack(each).mean()
        torch.testing.assert_close(e.word_scores.double(), torch.stack(each), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(e.word_scores.double().mean(), text, atol=1e-5, rtol=1e-4)
    nodes = block_cosines(regions, e.i2t.double().T @ words, blocks)  # (R, B)
    boxes = image["boxes"]
    w = log_gaussians(graphs[1].graph_convolution_1, boxes)
    w = w.softmax(1 if model.config.neighbours else 2)
    ones = torch.ones(w.shape[:2]).double()
    visual = graph_score(nodes, w, ones, graphs[1], model.config.neighbours)
    torch.testing.assert_close(e.region_scores.double().mean(), visual, atol=1e-5, rtol=1e-4)
    return e.word_scores.double().mean() + e.region_scores.double().mean()


SCORES = {"SCAN": scan_score, "PFAN": scan_score, "PFANWhole": whole_score, "CHAN": chan_score}
SCORES["GSMN"] = gsmn_score
AGGREGATES = "LogSumExp", "Mean", "Max", "Sum"
NORMS = ("clipped_l2norm", "l2norm", "clipped_l1norm", "l1norm", "clipped", "no_norm", "softmax")
SMALL = {"num_block": 4, "feat_dim": 4, "model": "gsmn"}
VARIANTS = [
    *({"cross_attn": d, "agg_func": a} for d in ("t2i", "i2t") for a in AGGREGATES),
    *({"cross_attn": d, "raw_feature_norm": n} for d in ("t2i", "i2t") for n in NORMS),
    {"no_imgnorm": True, "no_txtnorm": True, "lambda_softmax": 3},
    *({"model": "pfan", "cross_attn": d, "agg_func": "Mean"} for d in ("t2i", "i2t")),
    {"model": "pfan", "position": "only"},
    *({"model": "pfan_whole", "cross_attn": d, "lambda_whole": 0.7} for d in ("t2i", "i2t")),
    *({"model": "pfan_whole", "cross_attn": d, "need_box_whole": True} for d in ("t2i", "i2t")),
    SMALL,
    SMALL | {"neighbours": True},
    SMALL | {"is_sparse": True},
    SMALL | {"is_sparse": True, "neighbours": True},
    *({"model": "chan", "coding_type": f"{c}Coding"} for c in ("VHA", "THA", "VSA")),
    *(
        {"model": "chan", "coding_type": f"{c}Coding", "pooling_type": f"{p}Pooling"}
        for c in ("VHA", "VSA")
        for p in ("Mean", "Max", "Sum", "Softmax")
    ),
    {"model": "chan", "precomp_enc_type": "selfattention"},
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with all that the systems read, for the whole file."""
    from tests import conftest

    root = tmp_path_factory.mktemp("explained")
    folder = root / FOLDER
    folder.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for split, n in (("train", 8), ("dev", 4), ("test", 9)):
            conftest.write_split(folder, split, n, regions=6)
        vocab.main(["--data_path", "data", "--data_name", "tiny_precomp"])
        for split in ("train", "dev", "test"):
            conftest.write_graphs(folder, split, deserialize_vocab(WORDS))
            conftest.write_positions(folder, split)
    return root


@pytest.fixture
def there(data, monkeypatch):
    monkeypatch.chdir(data)
    return data


@pytest.mark.parametrize("flags", VARIANTS, ids=lambda x: "-".join(map(str, x.values())))
def test_the_drawn_weights_give_the_score(there, flags):
    model, dataset, words = opened(**flags)
    for caption, image in ((0, 0), (13, 2), (13, 7)):
        e = explain.explain_pair(model, dataset, caption, words, image)
        of_image, of_caption = encoded(model, dataset, image, caption)
        if "boxes" in dataset.image_item(image):
            of_image["boxes"] = dataset.image_item(image)["boxes"].double()
        with torch.no_grad():
            item = dataset.image_item(image) | dataset.caption_item(caption)
            score = model.similarity(*model(explain.collate_fn([item]))).item()
        assert e.score == score and e.model == type(model).__name__
        again = SCORES[e.model](e, model, of_image, of_caption)
        assert again.item() == pytest.approx(score, rel=1e-4, abs=1e-5)
        dots = of_caption["words"] @ of_image["regions"].T
        torch.testing.assert_close(e.dots.double(), dots, atol=1e-5, rtol=1e-4)
        for weights in (e.t2i, e.i2t):  # both sides can always be drawn
            assert weights.shape == dots.shape


def test_the_other_direction_is_that_of_a_model_of_the_other_direction(there):
    for system in ({"model": "scan"}, {"model": "pfan"}, {"model": "pfan_whole"}):
        one, dataset, words = opened(**system, cross_attn="t2i")
        other, _, _ = opened(**system, cross_attn="i2t")
        e, f = (explain.explain_pair(model, dataset, 4, words) for model in (one, other))
        assert (e.scored, f.scored) == (("t2i",), ("i2t",))
        for name in ("t2i", "i2t", "word_scores", "region_scores"):
            torch.testing.assert_close(getattr(e, name), getattr(f, name))
        assert f"The score does not read the other direction, i2t; alone it would be {f.score:.4f}."
        assert [view.way for view in e.views] == ["t2i", "i2t", "dots"]
        assert [view.way for view in f.views] == ["i2t", "t2i", "dots"]
        assert [view.scored for view in f.views] == [True, False, False]


def test_chan_shows_the_best_fits_of_the_other_side(there):
    model, dataset, words = opened(model="chan", coding_type="VHACoding")
    e = explain.explain_pair(model, dataset, 7, words)
    assert torch.equal(e.t2i.argmax(1), e.dots.argmax(1)) and e.scored == ("t2i",)
    assert torch.equal(e.i2t.argmax(0), e.dots.argmax(0))
    assert e.t2i.sum() == len(e.tokens) and e.i2t.sum() == e.dots.size(1)
    model, dataset, words = opened(model="chan", coding_type="THACoding")
    e = explain.explain_pair(model, dataset, 7, words)
    assert torch.equal(e.t2i.argmax(1), e.dots.argmax(1)) and e.scored == ("i2t",)
    assert all(view.hard for view in e.views[:2]) and not e.views[2].hard
    assert e.notes == [
        "The score pools numbers of the regions; what the words choose is not in it."
    ]


def test_gsmn_shows_its_edges_and_says_whether_they_are_read(there):
    for sparse in (False, True):
        for neighbours in (False, True):
            flags = {"is_sparse": sparse or None, "neighbours": neighbours or None}
            model, dataset, words = opened(**SMALL | flags)
            e = explain.explain_pair(model, dataset, 8, words)
            joined = e.text_edges > 0
            n = len(e.tokens)
            if sparse:
                assert torch.equal(joined, dataset.caption_item(8)["adjacency"] > 0)
            else:
                assert joined.all()
                torch.testing.assert_close(e.text_edges.sum(1), torch.ones(n))
            assert e.visual_edges.shape == (6, 6) and e.scored == ("t2i", "i2t")
            torch.testing.assert_close(e.visual_edges.sum(1), torch.ones(6))
            assert ("no vector passes along them" in " ".join(e.notes)) != neighbours
            assert ("Q18" in " ".join(e.notes)) != neighbours


def test_tokens_caption_and_unknown_words(there):
    model, dataset, words = opened()
    e = explain.explain_pair(model, dataset, 3, words)
    line = (there / FOLDER / "test_caps.txt").read_text().splitlines()[3]
    assert e.caption == line and e.tokens == ["<start>", *words.words(line), "<end>"]
    e = explain.explain_pair(model, dataset, None, words, 2, "A zebra and a red unicorn, a zebra")
    assert e.tokens[1:-1] == "a zebra and a red unicorn , a zebra".split()
    said = 'Not in the vocabulary, so read as <unk>: "zebra", "and", "unicorn", ",".'
    assert [note for note in e.notes if note.startswith("Not in")] == [said]


def test_a_sentence_of_ones_own_is_scored_like_a_caption(there):
    for flags in ({}, {"model": "pfan"}, {"model": "chan"}, SMALL):
        model, dataset, words = opened(**flags)
        lines = (there / FOLDER / "test_caps.txt").read_text().splitlines()
        e = explain.explain_pair(model, dataset, 22, words, 6)
        f = explain.explain_pair(model, dataset, None, words, 6, lines[22])
        assert e.score == f.score and e.tokens == f.tokens and torch.equal(e.t2i, f.t2i)


def test_captions_of_word_ids_show_their_text(there):
    model, dataset, words = opened(**SMALL)
    assert dataset.caption_path.endswith("_precaps_stan.txt")
    e = explain.explain_pair(model, dataset, 3, words)
    assert e.caption == (there / FOLDER / "test_caps.txt").read_text().splitlines()[3]


def test_filling_is_not_drawn(there, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / FOLDER).mkdir(parents=True)
    (tmp_path / "vocab").mkdir()
    for path in [*(there / FOLDER).iterdir(), there / WORDS]:
        (tmp_path / path.relative_to(there)).write_bytes(path.read_bytes())
    images = np.load(f"{FOLDER}/test_ims.npy")
    images[2, 4:] = 0
    np.save(f"{FOLDER}/test_ims.npy", images)
    for flags in ({}, {"model": "pfan_whole", "cross_attn": "i2t"}, SMALL, {"model": "chan"}):
        model, dataset, words = opened(**flags)
        e = explain.explain_pair(model, dataset, 11, words)
        assert e.dots.size(1) == 4
        boxes, size = explain.region_boxes(dataset, 2)
        assert np.array_equal(boxes, np.load(f"{FOLDER}/test_ims_bbx.npy")[2, :4])
        assert size == tuple(np.load(f"{FOLDER}/test_ims_size.npy")[2])


def test_the_model_goes_on_as_it_was(there):
    model, dataset, words = opened(model="chan", precomp_enc_type="transformer")
    e = explain.explain_pair(model, dataset, 3, words)
    model.train()
    dataset.drop = None  # --drop is set by training only
    f = explain.explain_pair(model, dataset, 3, words)
    assert model.training and e.score == f.score
    assert not f.t2i.requires_grad
    f.t2i.mul_(2)  # its tensors are one's own
    assert torch.equal(f.t2i, 2 * e.t2i)


def test_bert_shows_pieces(there, little):
    folder, _ = little
    opt = options.parse(train_args(text_enc_type="bert", bert_path=str(folder)))
    from bert import WordPieces, read_config

    opt.bert_config = read_config(str(folder))
    pieces = WordPieces.read(str(folder))
    model = ckpt.build_model(opt, len(pieces))
    dataset = systems.open_split(FOLDER, "test", pieces, opt)
    e = explain.explain_pair(model, dataset, None, pieces, 1, "a running bird zebra")
    assert e.tokens == ["[CLS]", "a", "run", "##n", "##ing", "b", "##ird", "[UNK]", "[SEP]"]
    assert e.t2i.shape == (9, 6)
    of_image, _ = encoded(model.eval(), dataset, 1, 0)
    ids = torch.tensor([pieces.encode("a running bird zebra")])
    with torch.no_grad():
        words = model.txt_enc(ids, torch.tensor([9]))[0].double()
    again = scan_score(e, model, of_image, {"words": words})
    assert again.item() == pytest.approx(e.score, rel=1e-4, abs=1e-5)


def test_what_cannot_be_explained_is_said(there):
    model, dataset, words = opened()
    for pair, said in (
        ((45, words), "--caption 45: test has 45 captions, from 0 on"),
        ((-1, words), "--caption -1: test has 45 captions, from 0 on"),
        ((3, words, 9), "--image 9: test has 9 images, from 0 on"),
        ((None, words, None, "a dog"), "a sentence of one's own has no image; name one"),
        ((None, words, 2, "  "), "an empty sentence"),
    ):
        with pytest.raises(InputError, match=said):
            explain.explain_pair(model, dataset, *pair)
    sparse, graphs, _ = opened(**SMALL | {"is_sparse": True})
    with pytest.raises(InputError, match="also reads adjacency of a caption.*dependency_parser.py"):
        explain.explain_pair(sparse, graphs, None, words, 2, "a dog")
    pooled = Pooled(len(words), 12, 8, 16, True)
    with pytest.raises(InputError, match="a Pooled model: its encodings hold no regions and words"):
        explain.explain_pair(pooled, dataset, 3, words)
    assert json.loads((there / WORDS).read_text())  # nothing was written


def test_a_new_model_shows_its_dots_and_what_it_adds(there):
    """A score that keeps no weights; what the model's method beside_score gives is drawn."""
    model, dataset, words = opened(model="chan")

    class Own(type(model)):
        def similarity(self, images, captions):
            return (images["regions"] @ captions["words"].mT).amax((1, 2))[:, None]

    own = Own(len(words), 12, 8, 16)
    own.beside_score = lambda batch, images, captions: {"notes": ["Mine."]}
    e = explain.explain_pair(own, dataset, 3, words)
    assert (e.t2i, e.i2t, e.scored, e.notes) == (None, None, (), ["Mine."])
    assert [view.way for view in e.views] == ["dots"] and e.score == e.dots.max()
    own.beside_score = lambda batch, *_: {"i2t": batch["images"].new_ones(1, len(e.tokens), 6)}
    f = explain.explain_pair(own, dataset, 3, words)
    assert [view.way for view in f.views] == ["i2t", "dots"] and not f.views[0].scored


@pytest.mark.parametrize("shape", [(9, 5, 4), (8, 6, 4), (9, 6, 5)])
def test_boxes_of_other_features_are_refused(there, monkeypatch, tmp_path, shape):
    model, dataset, words = opened()
    stem = tmp_path / "test"
    dataset.path = f"{stem}_ims.npy"
    assert explain.region_boxes(dataset, 0) == (None, None)
    np.save(f"{stem}_ims_bbx.npy", np.ones(shape, np.float32))
    with pytest.raises(
        InputError, match="test_ims_bbx.npy: boxes of shape .* 9 images of 6 regions"
    ):
        explain.region_boxes(dataset, 0)
    boxes = np.ones((9, 6, 4), np.float32)
    boxes[3, 2, 1] = np.nan
    np.save(f"{stem}_ims_bbx.npy", boxes)
    with pytest.raises(InputError, match=r"row 3 \(from 0\) holds NaN"):
        explain.region_boxes(dataset, 3)
    assert explain.region_boxes(dataset, 4)[0].shape == (6, 4)


def test_the_box_of_a_last_region_that_is_the_image(there, tmp_path):
    """Boxes without a row for the whole image, which is the last region, get one."""
    model, dataset, words = opened(model="pfan_whole", need_box_whole=True)
    dataset.path = f"{tmp_path}/test_ims.npy"
    boxes = np.random.default_rng(0).random((9, 5, 4)).astype(np.float32)
    np.save(tmp_path / "test_ims_bbx.npy", boxes)
    np.save(tmp_path / "test_ims_size.npy", np.array([[30.0, 20.0 + k] for k in range(9)]))
    found, size = explain.region_boxes(dataset, 4)
    assert size == (30, 24) and found[-1].tolist() == [0, 0, 30, 24]
    assert np.array_equal(found[:-1].astype(np.float32), boxes[4])
