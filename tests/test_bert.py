"""BERT for the words: a small random one in a local folder, for every system."""

import argparse
import base64
import builtins
import json
import os
import pickle
import re
import shutil

import numpy as np
import pytest
import torch

import bert
import checkpoint as ckpt
import evaluation
import options
import train
from bert import EncoderTextBert, WordPieces
from data import Drop, collate_fn, open_split
from model import l2norm
from tests import test_distributed
from tests.conftest import WORDS, read_log, train_args
from util.cli import InputError

transformers = pytest.importorskip("transformers")
SPECIAL = "[PAD] [UNK] [CLS] [SEP] [MASK]".split()
# Whole words, and words that must be put together.
PIECES = [*SPECIAL, "a", ".", ",", "'", "un", "##able", "##s", "##ing", "run", "##n", "cafe"]
PIECES += [*WORDS[:8], *"[]", "mask"]
PIECES += ["b", "##ird", "c", "##ar", "s", "##it", "f", "##lies", "st", "##and", "man"]
SIZES = dict(
    vocab_size=len(PIECES),
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=32,
)
SYSTEMS = ["scan", "gsmn", "pfan", "pfan_whole", "chan"]


def write_bert(folder, **more):
    """A random BERT as the library saves it, and vocab.txt."""
    torch.manual_seed(3)
    model = transformers.BertModel(transformers.BertConfig(**SIZES | more))
    for p in model.parameters():
        torch.nn.init.normal_(p, 0, 0.3)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in PIECES))
    return model.eval()


@pytest.fixture
def little(tmp_path):
    folder = tmp_path / "bert"
    folder.mkdir()
    return folder, write_bert(folder)


def flags(system="scan", **more):
    given = {"model": system, "text_enc_type": "bert", "bert_path": "bert", "learning_rate": 0.001}
    given |= {"num_block": 4, "feat_dim": 4} if system == "gsmn" else {}
    return train_args(**given | more)


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
    """Published programs split a caption into words and pieces, and put [CLS] and [SEP] around."""
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
    for k, n in enumerate(lengths.tolist()):  # alone, without padding
        with torch.no_grad():
            hidden = model(captions[k : k + 1, :n])[0][0]
        want = hidden @ encoder.linear.weight.T + encoder.linear.bias
        torch.testing.assert_close(words[k, :n], l2norm(want, -1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sentence[k], want[0], rtol=1e-5, atol=1e-5)
        assert not words[k, n:].any()
    with pytest.raises(InputError, match="a caption of 33 pieces, but this BERT reads 32"):
        encoder(torch.ones(1, 33, dtype=torch.long), torch.tensor([33]))


@pytest.mark.parametrize("system", SYSTEMS)
def test_training_resuming_and_evaluating(tiny_positions, little, system, capsys):
    """A resumed run equals an unbroken one, dropout included, and needs no folder of BERT's."""
    more = {"num_epochs": 2, "drop": True}
    train.main(flags(system, **more, model_name="whole", logger_name="whole"))
    train.main(flags(system, **more | {"num_epochs": 1}))
    shutil.rmtree("bert")
    train.main(flags(system, **more, resume="run/checkpoint_0.pth.tar"))
    whole, parts = read_log("whole"), read_log("run")
    for record in (*whole, *parts):
        del record["seconds"], record["peak_mib"]
    assert whole == parts
    state = ckpt.load("run/checkpoint_1.pth.tar")
    assert state["opt"].text_enc_type == "bert" and state["opt"].model == system
    kept = state["opt"].bert_config
    assert {name: kept[name] for name in SIZES} == SIZES
    assert kept["hidden_dropout_prob"] == 0.1
    evaluation.evalrank("run/checkpoint_1.pth.tar", split="dev")
    said = capsys.readouterr().out
    i2t = [f"{whole[1][name]:.1f}" for name in evaluation.METRICS]
    assert f"Image to text: {' '.join(i2t)}" in said


def test_torchrun_resumes_exactly(tiny, little):
    """Dropout draws on in each process as it would have without the interruption."""
    more = {"num_epochs": 2, "model": "chan", "batch_size": 50}
    for flag in (
        flags(**more, model_name="whole", logger_name="whole"),
        flags(**more | {"num_epochs": 1}),
        flags(**more, resume="run/checkpoint_0.pth.tar"),
    ):
        done = test_distributed.run(test_distributed.ROOT / "train.py", *flag)
        assert done.returncode == 0, done.stderr
    whole, parts = (ckpt.load(f"{name}/checkpoint_1.pth.tar")["model"] for name in ("whole", "run"))
    for state, again in zip(whole, parts, strict=True):
        assert all(torch.equal(state[name], again[name]) for name in state)


def test_training_starts_from_the_pretrained_weights(tiny, little):
    train.main(flags("chan", num_epochs=1, learning_rate=0))
    text = ckpt.load("run/checkpoint_0.pth.tar")["model"][1]
    for name, x in little[1].state_dict().items():
        assert torch.equal(text[f"bert.{name}"], x), name
    assert set(text) == {f"bert.{n}" for n in little[1].state_dict()} | {
        "linear.weight",
        "linear.bias",
    }


def test_bert_learns_at_a_tenth_of_the_rate(tiny, little):
    opt = options.parse(flags("chan", learning_rate=0.02))
    opt.bert_config = bert.read_config("bert")
    model = ckpt.build_model(opt, len(PIECES))
    optimizer = train.make_optimizer(model, opt)
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
    for name, p in model.named_parameters():  # Adam's first step is the rate itself
        steps[name] = float((before[name] * (1 - 1e-4 * 0.02) - p.detach()).abs().median())
    assert steps["txt_enc.linear.weight"] == pytest.approx(0.02, rel=1e-2)
    name = "txt_enc.bert.encoder.layer.0.attention.self.query.weight"
    assert steps[name] == pytest.approx(0.002, rel=1e-2)
    assert steps["txt_enc.bert.pooler.dense.weight"] == pytest.approx(0, abs=1e-5)


def test_the_rates_reach_the_optimizer_and_fall_together(tiny, little, monkeypatch):
    seen, step = [], torch.optim.AdamW.step

    def record(self, *args, **more):
        seen.append([group["lr"] for group in self.param_groups])
        return step(self, *args, **more)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    train.main(flags(num_epochs=2, lr_update=1, learning_rate=0.01))
    assert np.allclose(seen[0], [0.01, 0.001]) and np.allclose(seen[-1], [0.001, 0.0001])


def test_a_checkpoint_as_published(tiny, little, capsys):
    """No configuration, no tokens, a buffer that the library has dropped; heads of 64 numbers."""
    shutil.rmtree("bert")
    folder = tiny / "bert"
    folder.mkdir()
    write_bert(folder, hidden_size=128)
    train.main(flags("chan", num_epochs=1))
    want = evaluation.evalrank("run/checkpoint_0.pth.tar")
    state = torch.load("run/checkpoint_0.pth.tar", weights_only=False)
    opt = state["opt"]
    state["opt"] = argparse.Namespace(
        **{n: getattr(opt, n) for n in ("data_path", "data_name", "vocab_path", "batch_size")},
        text_enc_type="bert",
        word2idx=None,
        vocab_size=len(PIECES),
        wemb_type=None,
        precomp_enc_type="basic",
    )
    for name in ("run", "vocab"):
        del state[name]
    state["model"][1]["bert.embeddings.position_ids"] = torch.arange(32)[None]
    torch.save(state, "model_best.pth")
    with pytest.raises(InputError, match="BERT bert-base-uncased, which is no folder"):
        evaluation.evalrank("model_best.pth")
    assert evaluation.evalrank("model_best.pth", vocab_path="bert") == want
    (folder / "vocab.txt").write_text("".join(f"{p}\n" for p in PIECES[:-1]))
    said = f"{len(PIECES) - 1} WordPiece tokens, but model_best.pth was trained wi"
    with pytest.raises(InputError, match=said):
        evaluation.evalrank("model_best.pth", vocab_path="bert")
    write_bert(folder, hidden_size=128)
    capsys.readouterr()
    evaluation.evalrank("run/checkpoint_0.pth.tar", vocab_path="nowhere")
    assert "holds its own WordPiece tokens, nowhere is not read" in capsys.readouterr().out
    train.main(flags("chan", num_epochs=2, resume="model_best.pth"))  # a published run goes on


def as_published(path: str, out: str = "model_best.pth") -> None:
    """A checkpoint of ours without what published ones lack."""
    state = torch.load(path, weights_only=False)
    names = ("data_path", "data_name", "vocab_path", "batch_size", "embed_size")
    kept = {name: getattr(state["opt"], name) for name in names}
    state["opt"] = argparse.Namespace(**kept, precomp_enc_type="basic")
    for name in ("run", "vocab"):
        del state[name]
    torch.save(state, out)


def test_what_weights_do_not_tell_comes_from_the_folder(tiny, little, capsys):
    """Heads, activation and layer norm leave no trace in the weights; other ones, other scores."""
    folder, _ = little
    odd = {"num_attention_heads": 4, "hidden_act": "relu", "layer_norm_eps": 1e-3}
    write_bert(folder, **odd)
    train.main(flags("chan", num_epochs=1))
    evaluation.evalrank("run/checkpoint_0.pth.tar", save_path="want.npy")
    as_published("run/checkpoint_0.pth.tar")
    evaluation.evalrank("model_best.pth", vocab_path="bert", save_path="got.npy")
    np.testing.assert_array_equal(np.load("got.npy"), np.load("want.npy"))
    assert "guessed" not in capsys.readouterr().out
    # It goes on in training with them too, and keeps them.
    train.main(flags("chan", num_epochs=2, resume="model_best.pth"))
    kept = ckpt.load("run/checkpoint_1.pth.tar")["opt"].bert_config
    assert {name: kept[name] for name in odd} == odd

    (folder / "config.json").unlink()
    capsys.readouterr()
    evaluation.evalrank("model_best.pth", vocab_path="bert", save_path="guess.npy")
    said = capsys.readouterr().out
    assert "bert: no config.json" in said and "guessed" in said
    assert "num_attention_heads 1, hidden_act gelu," in said and "layer_norm_eps 1e-12" in said
    assert np.abs(np.load("guess.npy") - np.load("want.npy")).max() > 1e-3

    write_bert(folder, **odd, num_hidden_layers=3)
    with pytest.raises(InputError, match="num_hidden_layers 3, but the weights of model_best.pth"):
        evaluation.evalrank("model_best.pth", vocab_path="bert")


@pytest.mark.parametrize(
    "config", ["x", {}, {"hidden_size": 16}, {"vocab_size": "x"}, {"num_attention_heads": 3}]
)
def test_a_checkpoint_with_an_odd_configuration(tiny, little, config):
    train.main(flags(num_epochs=1))
    state = torch.load("run/checkpoint_0.pth.tar", weights_only=False)
    if config and config != "x" and "hidden_size" not in config:  # one value is odd
        config = state["opt"].bert_config | config
    state["opt"].bert_config = config
    torch.save(state, "odd.pth.tar")
    with pytest.raises(InputError):
        evaluation.evalrank("odd.pth.tar")


def test_the_weights_say_which_encoder_it_is(tiny, little):
    train.main(train_args(num_epochs=1))
    state = torch.load("run/checkpoint_0.pth.tar", weights_only=False)
    state["opt"].text_enc_type = "bert"
    torch.save(state, "odd.pth.tar")
    assert ckpt.load("odd.pth.tar")["opt"].text_enc_type == "bigru"


def test_dropping_takes_whole_words(tiny, little):
    pieces = WordPieces.read("bert")
    opt = options.parse(["--model", "chan", "--img_dim", "12"])
    data = open_split(str(tiny / "data" / "tiny_precomp"), "train", pieces, opt)
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
                else:  # dropped, or replaced: then what follows cannot be told from what is left
                    counts["other"] += 1
                    break
    assert counts["mask"] / counts["of"] == pytest.approx(0.1, abs=0.015)
    batch = collate_fn([data[0], data[1]])
    assert batch["captions"].dtype == torch.long and batch["inside"].shape == (2, 4)


def test_gsmn_reads_captions_and_not_word_ids(tiny_graphs, little):
    pieces = WordPieces.read("bert")
    opt = options.parse(["--model", "gsmn", "--img_dim", "12", "--text_enc_type", "bert"])
    opt.bert_config = bert.read_config("bert")
    data = open_split(str(tiny_graphs / "data" / "tiny_precomp"), "dev", pieces, opt)
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


def test_wrong_folders_are_named(tiny, little, capsys):
    for path, message in (
        ("none", "BERT none, which is no folder, and its files are not here: no config.json could"),
        ("./none", "BERT ./none: no such folder"),
        ("vocab", "BERT vocab: no config.json could be read"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            train.main(flags(bert_path=path))
    os.rename("bert/model.safetensors", "model.safetensors")
    with pytest.raises(InputError, match="BERT bert: no weights could be read"):
        train.main(flags())
    os.rename("model.safetensors", "bert/model.safetensors")
    (tiny / "bert" / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(InputError, match="bert: not BERT's tokens: expected WordPiece"):
        train.main(flags())
    (tiny / "bert" / "vocab.txt").write_text("".join(f"{p}\n" for p in [*PIECES, "one", "two"]))
    said = f"{len(PIECES) + 2} WordPiece tokens, but BERT has {len(PIECES)} rows"
    with pytest.raises(InputError, match=said):
        train.main(flags())
    (tiny / "bert" / "vocab.txt").write_text("".join(f"{p}\n" for p in PIECES[:-1]))
    train.main(flags(num_epochs=1))
    said = f"warning: bert: {len(PIECES) - 1} WordPiece tokens, but BERT has {len(PIECES)} rows"
    assert said in capsys.readouterr().out
    config = json.loads((tiny / "bert" / "config.json").read_text())
    config["model_type"] = "roberta"
    (tiny / "bert" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="a roberta model, expected bert"):
        train.main(flags())


def test_a_caption_too_long_is_said_before_training(tiny, little):
    path = tiny / "data/tiny_precomp/dev_caps.txt"
    lines = path.read_text().splitlines()
    lines[6] = "dog " * 31
    path.write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(InputError, match="caption 7 of dev has 33 pieces, this BERT reads 32"):
        train.main(flags())


def test_the_text_encoder_of_a_run_stays(tiny, little):
    train.main(flags(num_epochs=1))
    with pytest.raises(InputError, match="give --text_enc_type bert, as it was trained with"):
        train.main(train_args(num_epochs=2, resume="run/checkpoint_0.pth.tar"))
    with pytest.raises(InputError, match="--optim cannot change on the way"):
        train.main(flags(num_epochs=2, optim="sgd", resume="run/checkpoint_0.pth.tar"))
    train.main(flags(num_epochs=1, optim="sgd", model_name="sgd", logger_name="sgd"))


def test_a_server_scores_as_evaluation_does(tiny, little):
    serve = pytest.importorskip("serve")
    train.main(flags("chan", num_epochs=1))
    evaluation.evalrank("run/checkpoint_0.pth.tar", split="test", save_path="s.npy")
    scorer = serve.Scorer(
        "run/checkpoint_0.pth.tar", None, torch.device("cpu"), serve.Limits(words=256)
    )
    caption = (tiny / "data/tiny_precomp/test_caps.txt").read_text().splitlines()[1]
    records = [
        {"image_w": 10, "image_h": 10, "num_boxes": 4, "features": b64(regions)}
        | {"boxes": b64(np.zeros((4, 4))), "image_id": 0}
        for regions in np.load("data/tiny_precomp/test_ims.npy")
    ]
    body = {"sentence": caption.split(), "boxes": records}
    (answer,) = scorer.score([scorer.read(json.dumps(body).encode())])
    np.testing.assert_allclose(answer["sim_t2i"], np.load("s.npy")[:, 1], rtol=1e-5, atol=1e-5)
    body["sentence"] = ["dog"] * 31
    with pytest.raises(serve.Refused, match="33 words, expected at most 32"):
        scorer.read(json.dumps(body).encode())


def b64(array):
    return base64.b64encode(array.astype("<f4").tobytes()).decode()


class Evil:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_pickled_weights_run_nothing(tiny, little):
    os.remove("bert/model.safetensors")
    with open("bert/pytorch_model.bin", "wb") as file:
        pickle.dump({"embeddings.word_embeddings.weight": Evil()}, file)
    with pytest.raises(InputError, match="no weights could be read"):
        train.main(flags())
    assert not os.path.exists("owned")


def test_code_beside_the_weights_is_not_run(tiny, little):
    config = json.loads((tiny / "bert" / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    config["attn_implementation"] = config["_attn_implementation"] = "evil-org/flash"
    (tiny / "bert" / "config.json").write_text(json.dumps(config))
    (tiny / "bert" / "evil.py").write_text("import os\nos.mkdir('owned')\n")
    train.main(flags(num_epochs=1))
    config["model_type"] = "new"  # nobody is asked whether its code may run
    (tiny / "bert" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="BERT bert: a new model, expected bert"):
        train.main(flags())
    assert not os.path.exists("owned")


def damage(folder, how):
    """Rewrite a BERT's weights, or its configuration."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    state = load_file(path)
    if how == "foreign":
        state = {f"other.{name}": x for name, x in state.items()}
    elif how == "layer":
        state = {name: x for name, x in state.items() if "layer.1." not in name}
    elif how == "size":
        name = "encoder.layer.0.intermediate.dense.bias"
        state[name] = state[name][:-1].clone()
    elif how == "heads":  # as released: under bert., with heads for pretraining
        state = {f"bert.{name}": x for name, x in state.items() if "pooler" not in name}
        state["cls.predictions.bias"] = torch.zeros(len(PIECES))
        state["bert.embeddings.position_ids"] = torch.arange(32)[None]
    save_file(state, path, {"format": "pt"})
    if how == "config":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("foreign", "are not those of its config.json: no embeddings.LayerNorm.bias"),
        ("layer", "no encoder.layer.1."),
        ("size", "weights"),
        ("config", "unknown encoder.layer.1."),
    ],
)
def test_weights_that_do_not_fit_are_refused(tiny, little, how, message):
    damage(little[0], how)
    with pytest.raises(InputError, match=message):
        train.main(flags())


def test_weights_as_released_are_read(tiny, little):
    want = little[1].state_dict()
    damage(little[0], "heads")
    got = bert.pretrained("bert")
    assert all(torch.equal(got[name], x) for name, x in want.items() if "pooler" not in name)


def test_without_the_library_the_error_says_how_to_get_it(tiny, monkeypatch):
    load = builtins.__import__

    def absent(name, *args, **more):
        if name == "transformers":
            raise ImportError(name)
        return load(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(InputError, match="pip install transformers"):
        train.main(flags())
