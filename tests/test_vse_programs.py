"""VSE-infinity in the programs: training, resuming, published checkpoints, the server, pictures."""

import argparse
import json

import numpy as np
import pytest
import torch

import checkpoint as ckpt
import evaluation
import explain
import train
from tests.conftest import read_log, train_args
from tests.test_drop import make
from tests.test_grad_checkpointing import step
from util.cli import InputError
from vse import VSE

PATH = "run/checkpoint_1.pth.tar"


def flags(encoder="bigru", **more):
    """The command line of a tiny run with a GRU, or with the BERT in the folder bert."""
    given = {"model": "vse", "max_violation": None, "bi_gru": None, "learning_rate": 0.003}
    if encoder == "bert":
        given |= {"text_enc_type": "bert", "bert_path": "bert"}
    return train_args(**given | more)


def of_run(folder):
    """The log of a run without times."""
    rows = read_log(folder)
    for row in rows:
        del row["seconds"], row["peak_mib"]
    return rows


def same_states(a, b):
    """Whether two checkpoints hold equal weights, and equal statistics of the batch norm."""
    pairs = zip(*(ckpt.load(path)["model"] for path in (a, b)), strict=True)
    return all(torch.equal(x[name], y[name]) for x, y in pairs for name in (*x, *y))


@pytest.fixture(params=["bigru", "bert"])
def encoder(request):
    """Each text encoder; BERT needs its library."""
    if request.param == "bert":
        pytest.importorskip("transformers", reason="pip install transformers")
        request.getfixturevalue("little")
    return request.param


@pytest.mark.parametrize("pool", ["gpo", "max"])
def test_a_resumed_run_equals_the_unbroken_one(tiny, encoder, pool):
    more = {"pool": pool, "drop": True}
    train.main(flags(encoder, num_epochs=3, model_name="whole", logger_name="whole", **more))
    train.main(flags(encoder, num_epochs=2, **more))
    train.main(flags(encoder, num_epochs=3, resume=PATH, **more))
    assert of_run("whole") == of_run("run")
    assert same_states("whole/checkpoint_2.pth.tar", "run/checkpoint_2.pth.tar")
    log = of_run("run")
    assert log[2]["Le"] < log[1]["Le"]
    image, _ = ckpt.load("run/checkpoint_2.pth.tar")["model"]
    assert image["mlp.bns.0.num_batches_tracked"] == 3 * (100 // 16)
    assert not torch.equal(image["mlp.bns.0.running_var"], torch.ones(8))
    assert image["mlp.bns.1.running_var"].tolist() == [1] * 16
    metrics = evaluation.evalrank("run/checkpoint_2.pth.tar", split="dev")
    assert metrics["rsum"] == pytest.approx(log[2]["rsum"])


def published(path="published.pth.tar", drop=(), **changed):
    """Write the tiny run's checkpoint as the published program does, without the options `drop`."""
    state = torch.load(PATH, weights_only=False)
    names = "data_path data_name vocab_path batch_size embed_size word_dim img_dim vocab_size"
    names += " margin max_violation no_imgnorm no_txtnorm precomp_enc_type vse_mean_warmup_epochs"
    opt = {name: getattr(state["opt"], name) for name in names.split() if name not in drop}
    opt |= {"backbone_path": "", "backbone_source": "detector", "backbone_lr_factor": 0.01}
    model = [{f"module.{name}": x for name, x in part.items()} for part in state["model"]]
    state = {"epoch": 2, "model": model, "best_rsum": 10.0, "Eiters": 14}
    torch.save(state | {"opt": argparse.Namespace(**opt | changed)}, path)
    return path


def test_published_checkpoints(tiny, encoder):
    train.main(flags(encoder, num_epochs=2))
    want = evaluation.evalrank(PATH, split="test", save_path="want.npy")
    vocab_path = "bert" if encoder == "bert" else None
    for lacking in ((), ("embed_size", "word_dim", "img_dim", "vocab_size", "precomp_enc_type")):
        path = published(drop=lacking)
        opt = ckpt.load(path)["opt"]
        found = opt.model, opt.pool, opt.text_enc_type, opt.embed_size, opt.img_dim
        assert found == ("vse", "gpo", encoder, 16, 12)
        got = evaluation.evalrank(path, split="test", vocab_path=vocab_path, save_path="got.npy")
        if encoder == "bigru":  # the weights do not tell the number of BERT's heads
            assert got == want
            np.testing.assert_array_equal(np.load("got.npy"), np.load("want.npy"))
    train.main(flags(encoder, num_epochs=3, resume=published()))  # after the two that are finished
    assert [row["epoch"] for row in read_log("run")][-1] == 2


def test_a_published_option_counts(tiny):
    train.main(flags(num_epochs=2))
    evaluation.evalrank(published(), split="test", save_path="plain.npy")
    for name in ("no_imgnorm", "no_txtnorm"):
        path = published(**{name: True})
        evaluation.evalrank(path, split="test", save_path="long.npy")
        ratio = np.load("long.npy") / np.load("plain.npy")
        along = 1 if name == "no_imgnorm" else 0  # one length for all scores of an image or caption
        assert np.allclose(ratio, ratio.mean(along, keepdims=True), rtol=1e-3)
        assert not np.allclose(ratio, 1, rtol=0.01)


@pytest.mark.parametrize("lost", ["mlp.layers.0.weight", "mlp.bns.0.running_var", "mlp."])
def test_a_published_checkpoint_that_is_not_whole(tiny, lost):
    train.main(flags(num_epochs=2))
    state = torch.load(published(), weights_only=False)
    state["model"][0] = {n: x for n, x in state["model"][0].items() if f"module.{lost}" not in n}
    torch.save(state, "cut.pth.tar")
    said = "no mlp.bns.0.running_var" if "bns" in lost else "a checkpoint of vse without all its"
    with pytest.raises(InputError, match=f"cut.pth.tar: .*{said}"):
        evaluation.evalrank("cut.pth.tar", split="test")


def test_a_published_vocabulary_may_lack_the_mask(tiny):
    train.main(flags(num_epochs=2))
    state = torch.load(published(), weights_only=False)
    text = state["model"][1]
    text["module.embed.weight"] = text["module.embed.weight"][:-1]  # <mask> is the last word
    state["opt"].vocab_size -= 1
    torch.save(state, "fewer.pth.tar")
    want = evaluation.evalrank(published(), split="test")
    assert evaluation.evalrank("fewer.pth.tar", split="test") == want
    del state["opt"].vocab_size
    torch.save(state, "unsaid.pth.tar")
    assert evaluation.evalrank("unsaid.pth.tar", split="test") == want
    with pytest.raises(InputError, match="--drop: the vocabulary has no <mask>"):
        train.main(flags(num_epochs=3, resume="fewer.pth.tar", drop=True))


# Several processes, parts of a batch, few digits


def test_statistics_of_several_processes(tiny, torchrun):
    """With a rate of 0 the weights stay, and the running statistics are those of one process."""
    one, two = (
        flags(num_epochs=1, batch_size=32, learning_rate=0, model_name=x, logger_name=x)
        for x in ("one", "two")
    )
    train.main(one)
    done = torchrun(train.__file__, *two)
    assert done.returncode == 0, done.stderr
    assert read_log("two")[0]["rsum"] == pytest.approx(read_log("one")[0]["rsum"], abs=6)
    states = [ckpt.load(f"{x}/checkpoint_0.pth.tar")["model"][0] for x in ("one", "two")]
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name], msg=name)


@pytest.mark.parametrize("amp", [False, True])
def test_parts_of_a_batch_do_not_reach_the_batch_norm(amp):
    """--grad_checkpointing: its statistics are those of the whole batch, counted once."""
    net, batch = make(VSE, n=7)
    scores, grads, kept = step(net, batch, 0, amp)
    running = {n: x.clone() for n, x in net.state_dict().items() if "running" in n}
    counted = net.img_enc.mlp.bns[0].num_batches_tracked.clone()
    net, batch = make(VSE, n=7)
    got, got_grads, less = step(net, batch, 3, amp)
    torch.testing.assert_close(got, scores, rtol=1e-5, atol=1e-6)
    largest = max(grad.abs().max() for grad in grads.values())
    for name, grad in grads.items():
        apart = (got_grads[name] - grad).abs().max()
        assert apart <= (0.02 if amp else 1e-4) * largest, name
    assert less < kept
    for name, x in running.items():
        torch.testing.assert_close(net.state_dict()[name], x, msg=name)
    assert net.img_enc.mlp.bns[0].num_batches_tracked == counted == 1


def test_amp_and_parts_train(tiny):
    train.main(flags(num_epochs=2, amp=True, grad_checkpointing=3, drop=True))
    log = read_log("run")
    assert log[1]["rsum"] > 30
    opt = ckpt.load(PATH)["opt"]
    assert opt.amp and opt.grad_checkpointing == 3


# The other programs


def test_an_ensemble_with_another_system(tiny):
    train.main(flags(num_epochs=1, model_name="a", logger_name="a"))
    train.main(train_args(num_epochs=1, model_name="b", logger_name="b"))
    paths = [f"{x}/checkpoint_0.pth.tar" for x in "ab"]
    for k, path in enumerate(paths):
        evaluation.evalrank(path, split="test", save_path=f"{k}.npy")
    evaluation.evalrank(paths, split="test", save_path="both.npy")
    want = (np.load("0.npy") + np.load("1.npy")) / 2
    np.testing.assert_allclose(np.load("both.npy"), want, rtol=0, atol=1e-6)


def test_the_server_gives_one_score_for_both_directions(tiny_positions):
    pytest.importorskip("fastapi", reason="pip install fastapi uvicorn")
    from tests.serving import make_body, make_scorer, write_checkpoint

    path = write_checkpoint({"model": "vse"})
    scorer = make_scorer(path)
    evaluation.evalrank(path, split="test", save_path="s.npy")
    queries = [scorer.read(json.dumps(make_body(c)).encode()) for c in (0, 31, 74)]
    for caption, answer in zip((0, 31, 74), scorer.score(queries), strict=True):
        assert answer["sim_t2i"] == answer["sim_i2t"]
        want = np.load("s.npy")[:, caption]
        np.testing.assert_allclose(answer["sim_t2i"], want, rtol=0, atol=2e-6)


def test_there_is_no_attention_to_draw(tiny):
    train.main(flags(num_epochs=2))
    model, words, opt = ckpt.load_model(PATH)
    _, split, *_ = evaluation.encode_split(PATH, None, "test", None, torch.device("cpu"), None)
    with pytest.raises(InputError, match="a VSE model: its encodings hold no regions and words"):
        explain.explain_pair(model, split.dataset, 3, words)
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    with pytest.raises(InputError, match="--log_images: a VSE model: its encodings hold no"):
        train.main(flags(num_epochs=1, log_images=True))
