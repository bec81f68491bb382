"""BERT in the programs: training, resuming, evaluation, serving, published checkpoints."""

import argparse
import base64
import json
import shutil

import numpy as np
import pytest
import torch

import checkpoint as ckpt
import evaluation
import systems
import train
from tests.conftest import read_log, train_args
from tests.pooled import PooledSystem
from tests.small_bert import PIECES, SIZES, flags, write_bert
from util.cli import InputError

SYSTEMS = ["scan", "gsmn", "pfan", "pfan_whole", "chan"]


@pytest.mark.parametrize("system", SYSTEMS)
def test_training_resuming_and_evaluating(tiny_positions, little, system, capsys):
    """A resumed run equals an unbroken one, including its dropout, without the folder of BERT."""
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


def test_torchrun_resumes_exactly(tiny, little, torchrun):
    """Each process draws the same dropout as without the interruption."""
    more = {"num_epochs": 2, "model": "chan", "batch_size": 50}
    for flag in (
        flags(**more, model_name="whole", logger_name="whole"),
        flags(**more, resume="whole/checkpoint_0.pth.tar"),
    ):
        done = torchrun(train.__file__, *flag)
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


def test_the_rates_reach_the_optimizer_and_fall_together(tiny, little, monkeypatch):
    seen, step = [], torch.optim.AdamW.step

    def record(self, *args, **more):
        seen.append([group["lr"] for group in self.param_groups])
        return step(self, *args, **more)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    train.main(flags(num_epochs=2, lr_update=1, learning_rate=0.01))
    assert np.allclose(seen[0], [0.01, 0.001]) and np.allclose(seen[-1], [0.001, 0.0001])


def test_a_checkpoint_as_published(tiny, little, capsys):
    """It has no configuration, no tokens and a buffer that the library no longer has.

    The number of heads is guessed from their published size, 64 numbers.
    """
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
    with pytest.raises(InputError, match="BERT bert-base-uncased, which is not a folder"):
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
    # A published run can be resumed.
    train.main(flags("chan", num_epochs=2, resume="model_best.pth"))


def as_published(path: str, out: str = "model_best.pth") -> None:
    """Write one of our checkpoints without the entries that published ones lack."""
    state = torch.load(path, weights_only=False)
    names = ("data_path", "data_name", "vocab_path", "batch_size", "embed_size")
    kept = {name: getattr(state["opt"], name) for name in names}
    state["opt"] = argparse.Namespace(**kept, precomp_enc_type="basic")
    for name in ("run", "vocab"):
        del state[name]
    torch.save(state, out)


def test_what_weights_do_not_tell_comes_from_the_folder(tiny, little, capsys):
    """Heads, activation and layer norm change the scores, but the weights do not show them."""
    folder, _ = little
    odd = {"num_attention_heads": 4, "hidden_act": "relu", "layer_norm_eps": 1e-3}
    write_bert(folder, **odd)
    train.main(flags("chan", num_epochs=1))
    evaluation.evalrank("run/checkpoint_0.pth.tar", save_path="want.npy")
    as_published("run/checkpoint_0.pth.tar")
    evaluation.evalrank("model_best.pth", vocab_path="bert", save_path="got.npy")
    np.testing.assert_array_equal(np.load("got.npy"), np.load("want.npy"))
    assert "guessed" not in capsys.readouterr().out
    # Resumed training uses them too, and keeps them.
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


def test_a_caption_too_long_is_said_before_training(tiny, little):
    path = tiny / "data/tiny_precomp/dev_caps.txt"
    lines = path.read_text().splitlines()
    lines[6] = "dog " * 31
    path.write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(
        InputError, match="caption 7 of dev has 33 pieces, but this BERT reads at most 32"
    ):
        train.main(flags())


def test_the_text_encoder_of_a_run_stays(tiny, little):
    train.main(flags(num_epochs=1))
    with pytest.raises(InputError, match="give --text_enc_type bert, as it was trained with"):
        more = {"text_enc_type": "bigru", "resume": "run/checkpoint_0.pth.tar"}
        train.main(train_args(num_epochs=2, **more))
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


def test_a_system_without_use_for_bert_says_so(tiny, little, monkeypatch):
    monkeypatch.setitem(systems.SYSTEMS, "pooled", PooledSystem())
    message = "--text_enc_type bert: pooled takes no text encoder but its own"
    with pytest.raises(InputError, match=message):
        train.main(flags("pooled", num_epochs=1))
