"""BERT for the words of a caption: its tokens, its vectors, its learning rate, dropped words."""

import json
import re

import pytest
import torch

import bert
import checkpoint as ckpt
import options
import systems
from bert import EncoderTextBert, WordPieces
from data import Drop, collate_fn
from model import l2norm
from tests.small_bert import PIECES, flags
from util.cli import InputError

transformers = pytest.importorskip("transformers")

CAPTIONS = [
    "A dogs running, unable.",
    "  Café  RUNNING!!  zebra's un-able ",
    "a man 's cats [MASK] \u4e2d\u6587 birds\tflies",
    "",
    "unable" * 40,
]


def test_pieces_are_those_of_the_library(little):
    folder, _ = little
    pieces = WordPieces.read(folder)
    theirs = transformers.BertTokenizer.from_pretrained(str(folder))
    for caption in CAPTIONS:
        want = theirs(caption, split_special_tokens=True).input_ids
        assert pieces.encode(caption) == want
    assert len(pieces) == len(PIECES)
    ids = pieces.encode("A dogs running")
    tokens = ["[CLS]", "a", "dog", "##s", "run", "##n", "##ing", "[SEP]"]
    assert [PIECES[i] for i in ids] == tokens
    again = WordPieces(pieces.state_dict()["tokenizer_json"], "x")
    assert [again.encode(c) for c in CAPTIONS] == [pieces.encode(c) for c in CAPTIONS]


def test_special_tokens_in_a_caption_are_text(little):
    """Published programs split a caption into words and pieces, then add [CLS] and [SEP]."""
    pieces = WordPieces.read(little[0])
    for again in (pieces, WordPieces(pieces.state_dict()["tokenizer_json"], "x")):
        for caption, tokens in (
            ("a [MASK] dog", "a [ mask ] dog"),
            ("[SEP]a", "[ [UNK] ] a"),
            ("[CLS] [UNK][PAD]", "[ [UNK] ] [ [UNK] ] [ [UNK] ]"),
        ):
            ids = again.encode(caption)
            assert [PIECES[i] for i in ids] == ["[CLS]", *tokens.split(), "[SEP]"]


def test_a_cased_bert_stays_cased(little):
    folder, _ = little
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    pieces = WordPieces.read(folder)
    theirs = transformers.BertTokenizer.from_pretrained(str(folder))
    assert pieces.encode("A dog") == theirs("A dog").input_ids
    assert PIECES[pieces.encode("A dog")[1]] == "[UNK]"


def test_words_are_the_last_hidden_states_through_a_linear_layer(little):
    folder, model = little
    torch.manual_seed(0)
    encoder = EncoderTextBert(bert.read_config(str(folder)), 8).eval()
    encoder.start_from(str(folder))
    lengths = torch.tensor([3, 6, 1])
    captions = torch.randint(5, len(PIECES), (3, 6))
    captions[torch.arange(6) >= lengths[:, None]] = 0
    words, sentence = encoder.words_and_sentence(captions, lengths)
    assert torch.equal(encoder(captions, lengths), words)
    for k, n in enumerate(lengths.tolist()):  # each caption alone, without padding
        with torch.no_grad():
            hidden = model(captions[k : k + 1, :n])[0][0]
        want = hidden @ encoder.linear.weight.T + encoder.linear.bias
        torch.testing.assert_close(words[k, :n], l2norm(want, -1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sentence[k], want[0], rtol=1e-5, atol=1e-5)
        assert not words[k, n:].any()
    with pytest.raises(InputError, match="a caption of 33 pieces, but this BERT reads 32"):
        encoder(torch.ones(1, 33, dtype=torch.long), torch.tensor([33]))


def test_bert_learns_at_a_tenth_of_the_rate(tiny, little):
    opt = options.parse(flags("chan", learning_rate=0.02))
    opt.bert_config = bert.read_config("bert")
    model = ckpt.build_model(opt, len(PIECES))
    optimizer = systems.of(opt).optimizer(model, torch.nn.Identity(), opt)
    assert isinstance(optimizer, torch.optim.AdamW)
    rest, own = optimizer.param_groups
    assert {id(p) for p in own["params"]} == {id(p) for p in model.txt_enc.bert.parameters()}
    every = {id(p) for p in model.parameters()}
    assert {id(p) for group in (rest, own) for p in group["params"]} == every
    assert rest["weight_decay"] == own["weight_decay"] == 1e-4
    steps = {}
    for group in optimizer.param_groups:
        group["lr"] = 0.02 * group["scale"]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    for name, p in model.named_parameters():  # the first step of Adam is the rate itself
        steps[name] = float((before[name] * (1 - 1e-4 * 0.02) - p.detach()).abs().median())
    assert steps["txt_enc.linear.weight"] == pytest.approx(0.02, rel=1e-2)
    name = "txt_enc.bert.encoder.layer.0.attention.self.query.weight"
    assert steps[name] == pytest.approx(0.002, rel=1e-2)
    assert steps["txt_enc.bert.pooler.dense.weight"] == pytest.approx(0, abs=1e-5)


def test_dropping_takes_whole_words(tiny, little):
    pieces = WordPieces.read("bert")
    opt = options.parse(["--model", "chan", "--img_dim", "12"])
    data = systems.open_split(str(tiny / "data" / "tiny_precomp"), "train", pieces, opt)
    plain = [data[i]["captions"].tolist() for i in range(len(data))]
    data.drop = Drop(0.2, 0, pieces)
    counts = {"mask": 0, "gone": 0, "other": 0, "of": 0}
    for data.epoch in range(30):
        for one, item in zip(plain, (data[i] for i in range(len(data))), strict=True):
            got = item["captions"].tolist()
            assert got[0] == one[0] == 2 and got[-1] == one[-1] == 3
            words = re.findall(r"\S+(?: ##\S+)*", " ".join(PIECES[i] for i in one[1:-1]))
            left = [PIECES[i] for i in got[1:-1]]
            for word in words:
                parts = word.split()
                counts["of"] += 1
                if left[: len(parts)] == parts:
                    left = left[len(parts) :]
                elif left[: len(parts)] == ["[MASK]"] * len(parts):
                    counts["mask"] += 1
                    left = left[len(parts) :]
                else:  # dropped or replaced: the words after it cannot be told apart
                    counts["other"] += 1
                    break
    assert counts["mask"] / counts["of"] == pytest.approx(0.1, abs=0.015)
    batch = collate_fn([data[0], data[1]])
    assert batch["captions"].dtype == torch.long and batch["region_mask"].shape == (2, 4)


def test_gsmn_reads_captions_and_not_word_ids(tiny_graphs, little):
    pieces = WordPieces.read("bert")
    opt = options.parse(["--model", "gsmn", "--img_dim", "12", "--text_enc_type", "bert"])
    opt.bert_config = bert.read_config("bert")
    data = systems.open_split(str(tiny_graphs / "data" / "tiny_precomp"), "dev", pieces, opt)
    caption = (tiny_graphs / "data/tiny_precomp/dev_caps.txt").read_text().splitlines()[3]
    assert data.caption_item(3)["captions"].tolist() == pieces.encode(caption)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "gsmn", "--is_sparse"], "--is_sparse: its pairs are of words"),
        (["--wemb_type", "glove", "--wemb_path", "x"], "are for the words of a GRU"),
        (["--bert_path", "x", "--text_enc_type", "bigru"], "--bert_path is for --text_enc_type"),
        (["--obj_drop_rate", "0.1"], "--obj_drop_rate is for --drop"),
    ],
)
def test_what_does_not_go_with_bert(args, message, capsys):
    with pytest.raises(SystemExit):
        options.parse(["--text_enc_type", "bert", *args])
    assert message in capsys.readouterr().err
