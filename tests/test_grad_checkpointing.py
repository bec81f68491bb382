"""--grad_checkpointing: every system takes the same step and keeps less in memory.

With dropout (that of BERT) it draws other numbers, and the backward pass must draw them again.
"""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import model
import train
from bert import EncoderTextBert
from chan import CHAN
from gsmn import GSMN
from model import SCAN, ContrastiveLoss
from pfan import PFAN, PFANWhole
from tests.conftest import read_log, train_args
from tests.test_drop import make

SYSTEMS = [
    (SCAN, {"bi_gru": True, "num_layers": 2}),
    (PFAN, {"cross_attn": "i2t"}),
    (PFANWhole, {"need_box_whole": True}),
    (GSMN, {"num_block": 4, "feat_dim": 4, "is_sparse": True}),
    (CHAN, {"precomp_enc_type": "selfattention"}),
    (CHAN, {"precomp_enc_type": "transformer", "mask_dropped": True}),
    (EncoderTextBert, {}),
]


def make_bert(dropout):
    pytest.importorskip("transformers")
    sizes = dict.fromkeys(("hidden_size", "intermediate_size"), 16) | {"num_attention_heads": 2}
    sizes |= {"vocab_size": 20, "num_hidden_layers": 2, "max_position_embeddings": 7}
    sizes |= dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), dropout)
    torch.manual_seed(2)
    return make(SCAN, n=7, text_encoder=EncoderTextBert(sizes, 8))


def step(net, batch, parts, amp=False):
    """Scores, gradients, and the count of numbers that the graph of the encoders keeps."""
    net.zero_grad()
    net.grad_checkpointing = parts
    kept = []

    def keep(x):
        kept.append(x.numel())
        return x

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=amp):
        images, captions = net(batch)
    scores = net.similarity(images, captions)
    ContrastiveLoss(0.2, max_violation=True)(scores).backward()
    grads = {name: p.grad for name, p in net.named_parameters() if p.requires_grad}
    return scores.detach(), grads, sum(kept)


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize(("kind", "more"), SYSTEMS, ids=lambda x: getattr(x, "__name__", ""))
def test_parts_change_no_score_and_no_gradient(kind, more, amp):
    net, batch = make_bert(0.0) if kind is EncoderTextBert else make(kind, n=7, **more)
    scores, grads, kept = step(net, batch, 0, amp)
    for parts in (1, 3, 7, 50):  # more parts than pairs: one pair per part
        got, got_grads, less = step(net, batch, parts, amp)
        torch.testing.assert_close(got, scores, rtol=1e-5, atol=1e-6)
        largest = max(grad.abs().max() for grad in grads.values())
        for name, grad in grads.items():
            # bfloat16 adds the parts with eight bits.
            apart = (got_grads[name] - grad).abs().max()
            assert apart <= (0.02 if amp else 1e-4) * largest, name
        assert less < kept / 10


def test_each_part_is_encoded_by_itself_and_again_on_the_way_back(monkeypatch):
    net, batch = make(SCAN, n=7)
    encode_images, encode_captions = SCAN.encode_images, SCAN.encode_captions
    sizes, lengths = [], []

    def record_images(self, part):
        sizes.append(len(part["images"]))
        return encode_images(self, part)

    def record_captions(self, part):
        lengths.append(part["lengths"].tolist())
        return encode_captions(self, part)

    monkeypatch.setattr(SCAN, "encode_images", record_images)
    monkeypatch.setattr(SCAN, "encode_captions", record_captions)
    step(net, batch, 3)
    assert sizes == [3, 3, 1, 1, 3, 3]
    short, long, *again = lengths
    assert short + long == sorted(batch["lengths"].tolist()) and again == [long, short]
    sizes.clear()
    with torch.no_grad():  # nothing is kept in this case
        net(batch)
    assert sizes == [7]


def test_dropout_is_drawn_again_as_it_was(monkeypatch):
    """The gradient belongs to the printed loss: both passes drop the same units."""
    net, batch = make_bert(0.5)
    drawn, dropout = [], torch.nn.Dropout.forward

    def record(self, x):
        x = dropout(self, x)
        drawn.append(x.detach() == 0)
        return x

    monkeypatch.setattr(torch.nn.Dropout, "forward", record)
    step(net, batch, 3)
    of_part = len(drawn) // 4  # two parts, twice
    first, second, second_again, first_again = (
        drawn[k * of_part : (k + 1) * of_part] for k in range(4)
    )
    assert of_part >= 5 and all(0.2 < x.float().mean() < 0.8 for x in drawn)
    for part, again in ((first, first_again), (second, second_again)):
        assert all(torch.equal(x, y) for x, y in zip(part, again, strict=True))


@pytest.mark.parametrize("flags", [{}, {"model": "chan", "drop": True}, {"amp": True}])
def test_training_comes_to_the_same(tiny, flags, monkeypatch):
    losses, parts_seen = [], []

    def record(*args, **more):
        parts_seen.append(args)
        return checkpoint(*args, **more)

    monkeypatch.setattr(model, "checkpoint", record)
    for name, parts in (("whole", 0), ("parts", 3)):
        out = {"model_name": name, "logger_name": name}
        more = {"num_epochs": 2, "learning_rate": 1e-4, "grad_checkpointing": parts}
        train.main(train_args(**out, **more, **flags))
        losses.append([row["Le"] for row in read_log(name)])
        assert bool(parts_seen) == bool(parts)
    assert losses[1] == pytest.approx(losses[0], rel=0.02 if flags.get("amp") else 1e-3)
