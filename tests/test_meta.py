"""Every tensor of a step on the `meta` device: a stray CPU tensor or a needless .item() fails.

It replaces a GPU where there is none. The lengths of the captions are read on the host on purpose
and stay there.
"""

import pytest
import torch
from torch.fx.experimental import _config

import gsmn
from attention import CrossAttention
from bert import EncoderTextBert
from chan import CHAN, CODING, POOLING, InfoNCELoss
from gsmn import GSMN
from model import AGG_FUNC, RAW_FEATURE_NORM, SCAN, ContrastiveLoss
from pfan import PFAN, PFANWhole

REGION_MASK = {"region_mask": torch.empty(6, 5, dtype=torch.bool, device="meta")}


def batch(n: int = 6) -> dict[str, torch.Tensor]:
    return {
        "images": torch.empty(n, 5, 12, device="meta"),
        "captions": torch.empty(n, 4, dtype=torch.long, device="meta"),
        "lengths": torch.tensor([4, 2, 2, 3, 4, 1][:n]),
    }


@pytest.fixture
def all_nonzero():
    """Let nonzero() on the meta device treat every element as nonzero."""
    if not hasattr(_config, "meta_nonzero_assume_all_nonzero"):
        pytest.skip("this PyTorch cannot count nonzero elements on the meta device")
    with _config.patch(meta_nonzero_assume_all_nonzero=True):
        yield


@pytest.mark.parametrize("direction", ["t2i", "i2t"])
@pytest.mark.parametrize("dropped", [{}, REGION_MASK])
@pytest.mark.parametrize(
    ("norm", "agg"),
    [(norm, "LogSumExp") for norm in RAW_FEATURE_NORM] + [("l2norm", agg) for agg in AGG_FUNC],
)
def test_a_step_stays_on_its_device(direction, dropped, norm, agg, all_nonzero):
    with torch.device("meta"):
        model = SCAN(
            20, 12, 8, 16, bi_gru=True, cross_attn=direction, raw_feature_norm=norm, agg_func=agg
        )
    images, captions = model(batch() | dropped)
    scores = model.similarity(images, captions)
    assert scores.device.type == "meta" and scores.shape == (6, 6)
    for max_violation in (True, False):
        loss = ContrastiveLoss(0.2, max_violation)(scores, torch.zeros(6, device="meta"))
        (grad,) = torch.autograd.grad(loss, scores)  # (I, C)
    scores.backward(grad)
    assert all(p.grad.device.type == "meta" and p.grad.shape == p.shape for p in model.parameters())
    with torch.inference_mode():
        images, captions = model(batch())
        assert model.similarity(images, captions).device.type == "meta"


@pytest.mark.parametrize("direction", ["t2i", "i2t"])
@pytest.mark.parametrize(
    ("kind", "more"),
    [(PFAN, {}), (PFAN, {"position": "only"}), (PFANWhole, {}), (PFANWhole, {"need_box_whole": 1})],
)
def test_a_step_of_pfan_stays_on_its_device(kind, more, direction, all_nonzero):
    regions = 4 if more.get("need_box_whole") else 5
    with torch.device("meta"):
        model = kind(20, img_dim=12, word_dim=8, embed_size=16, cross_attn=direction, **more)
        extra = {"blocks": torch.empty(6, regions, 3, dtype=torch.long)}
        extra |= {"overlap": torch.empty(6, regions, 3), "whole": torch.empty(6, 12)}
    images, captions = model(batch() | extra)
    scores = model.similarity(images, captions)
    assert scores.device.type == "meta" and scores.shape == (6, 6)
    ContrastiveLoss(0.2, max_violation=True)(scores).backward()
    assert all(p.grad.device.type == "meta" and p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("coding", CODING)
@pytest.mark.parametrize("pooling", POOLING)
@pytest.mark.parametrize("kind", ["basic", "selfattention", "transformer"])
def test_a_step_of_chan_stays_on_its_device(coding, pooling, kind, all_nonzero):
    with torch.device("meta"):
        model = CHAN(20, 12, 8, 16, precomp_enc_type=kind, coding_type=coding, pooling_type=pooling)
    images, captions = model(batch() | (REGION_MASK if kind == "basic" else {}))
    scores = model.similarity(images, captions)
    assert scores.device.type == "meta" and scores.shape == (6, 6)
    for criterion in (ContrastiveLoss(0.05, True), InfoNCELoss(0.01, 0.05)):
        loss = criterion(scores, torch.zeros(6, device="meta"))
        (grad,) = torch.autograd.grad(loss, scores)  # (I, C)
    scores.backward(grad)
    for p in model.parameters():
        assert not p.requires_grad or p.grad.device.type == "meta" and p.grad.shape == p.shape


def test_a_step_with_bert_stays_on_its_device(all_nonzero):
    pytest.importorskip("transformers")
    sizes = dict.fromkeys(("hidden_size", "intermediate_size"), 16) | {"num_attention_heads": 2}
    sizes |= {"vocab_size": 20, "num_hidden_layers": 2, "max_position_embeddings": 7}
    with torch.device("meta"):
        model = SCAN(20, 12, 8, 16, text_encoder=EncoderTextBert(sizes, 16))
    scores = model.similarity(*model(batch()))
    assert scores.device.type == "meta" and scores.shape == (6, 6)
    ContrastiveLoss(0.2, max_violation=True)(scores).backward()
    for p in model.parameters():
        assert not p.requires_grad or p.grad.device.type == "meta" and p.grad.shape == p.shape


@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("dropped", [{}, REGION_MASK])
def test_a_step_of_gsmn_stays_on_its_device(is_sparse, neighbours, dropped, all_nonzero):
    with torch.device("meta"):
        model = GSMN(
            20, 12, 8, 32, num_block=4, feat_dim=4, is_sparse=is_sparse, neighbours=neighbours
        )
        graphs = {"boxes": torch.empty(6, 5, 4), "adjacency": torch.empty(6, 4, 4)}
    images, captions = model(batch() | graphs | dropped)
    scores = model.similarity(images, captions)
    assert scores.device.type == "meta" and scores.shape == (6, 6)
    ContrastiveLoss(0.2)(scores).backward()
    for p in model.parameters():
        assert not p.requires_grad or p.grad.device.type == "meta" and p.grad.shape == p.shape
    shapes = {"regions": (5, 32), "keys": (5, 32), "norms": (5, 4)}
    shapes["edges"] = (8, 5, 5) if neighbours else (5, 8)
    images = {name: torch.empty(6, *shape, device="meta") for name, shape in shapes.items()}
    words = torch.empty(6, 4, 32, device="meta", requires_grad=True)
    weights = *model.textual_graph.weights(), *model.visual_graph.weights()
    captions = {"words": words}
    if is_sparse or neighbours:
        captions["edges"] = torch.empty(6, *((4, 7) if neighbours else (4,)), device="meta")
    scores = gsmn.GraphMatching(model.config).pairs(images, captions, *weights)
    assert scores.device.type == "meta" and scores.shape == (6,)
    scores.sum().backward()
    assert words.grad.shape == words.shape


@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_pairs_stay_on_their_device(direction, all_nonzero):
    regions = torch.empty(9, 5, 16, device="meta", requires_grad=True)
    words = torch.empty(9, 4, 16, device="meta", requires_grad=True)
    with torch.device("meta"):
        config = SCAN(20, 12, 8, 16, cross_attn=direction).config
    images, captions = {"regions": regions}, {"words": words}
    if direction == "t2i":
        images["gram"], captions["norms"] = regions @ regions.mT, words.norm(dim=2)
    else:
        images["norms"] = regions.norm(dim=2)
    scores = CrossAttention(config).pairs(images, captions)
    assert scores.device.type == "meta" and scores.shape == (9,)
    scores.sum().backward()
    assert regions.grad.shape == regions.shape and words.grad.shape == words.shape
