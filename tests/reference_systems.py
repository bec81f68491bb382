"""Whole systems as plain loops: encoders and scores with the weights of a model.

They take one image and one caption at a time, in the precision of the weights.
"""

import torch
from torch import Tensor

from tests.reference import chan_pair, cosine, gsmn_pair, pair_score, positions


def unit(x: Tensor) -> Tensor:
    """A vector of unit length; a zero vector stays zero and passes no gradient."""
    return x / (x.norm() + 1e-8) if x.any() else 0 * x


def gru(rnn: torch.nn.GRU, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs (W, D) and final state (D,) of a GRU for x (W, E), averaged over its directions."""
    for layer in range(rnn.num_layers):
        sides, final = [], []
        for side in ("", "_reverse") if rnn.bidirectional else ("",):
            names = "weight_ih", "bias_ih", "weight_hh", "bias_hh"
            w_x, b_x, w_h, b_h = (getattr(rnn, f"{x}_l{layer}{side}") for x in names)
            h, states = x.new_zeros(rnn.hidden_size), []
            for word in x.flip(0) if side else x:
                x_reset, x_update, x_new = (w_x @ word + b_x).chunk(3)
                h_reset, h_update, h_new = (w_h @ h + b_h).chunk(3)
                new = (x_new + (x_reset + h_reset).sigmoid() * h_new).tanh()
                update = (x_update + h_update).sigmoid()
                h = (1 - update) * new + update * h
                states.append(h)
            final.append(h)
            sides.append(torch.stack(states[::-1] if side else states))
        x = torch.cat(sides, 1)
    return sum(sides) / len(sides), sum(final) / len(final)


def encode_caption(encoder: torch.nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Words (W, D) and the sentence (D,) of one caption (W,)."""
    words, sentence = gru(encoder.rnn, encoder.embed.weight[ids])
    return (words if encoder.no_txtnorm else torch.stack([unit(w) for w in words])), sentence


def self_attention(attn: torch.nn.MultiheadAttention, x: Tensor, mask: Tensor) -> Tensor:
    """Multi-head attention of x (R, D) to those of its rows that the mask (R,) selects."""
    heads = []
    weights, biases = attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3)
    q, k, v = (x @ w.T + b for w, b in zip(weights, biases, strict=True))
    size = x.size(1) // attn.num_heads
    for q_h, k_h, v_h in zip(q.split(size, 1), k.split(size, 1), v.split(size, 1), strict=True):
        heads.append(torch.softmax(q_h @ k_h[mask].T / size**0.5, 1) @ v_h[mask])
    return torch.cat(heads, 1) @ attn.out_proj.weight.T + attn.out_proj.bias


def layer_norm(layer: torch.nn.LayerNorm, x: Tensor) -> Tensor:
    """Each row of x with mean 0 and variance 1, then scaled and shifted."""
    centred = x - x.mean(1, keepdim=True)
    variance = (centred**2).mean(1, keepdim=True)
    return centred / (variance + layer.eps).sqrt() * layer.weight + layer.bias


def cut_filling(item: dict[str, Tensor]) -> dict[str, Tensor]:
    """An image without the regions that only fill it up."""
    if "filling" not in item:
        return item
    n, cut = int((~item["filling"]).sum()), dict(item)
    for name in ("images", "boxes", "region_mask"):
        if name in item:
            cut[name] = item[name][:n]
    for name in ("blocks", "overlap"):  # they may have none for the whole image at the end
        if name in item:
            cut[name] = item[name][: n - len(item["images"]) + len(item[name])]
    return cut


def encode_image(model: torch.nn.Module, item: dict[str, Tensor]) -> Tensor:
    """Regions (R', D) of one image, without those that its region_mask (R,) drops."""
    encoder, x = model.img_enc, item["images"]
    mask = item.get("region_mask", torch.ones(len(x), dtype=torch.bool))
    if hasattr(encoder, "position_embedding"):
        some = len(item["blocks"])
        p = positions(encoder, x[:some], item["blocks"], item["overlap"])
        if some < len(x):  # the last region is the whole image
            p = torch.cat((p, encoder.position_embedding.weight.mean(0)[None]))
        x = torch.cat((x, p), 1)
    weight = encoder.fc.weight
    if hasattr(encoder.fc, "weight_g"):
        weight = encoder.fc.weight_g * encoder.fc.weight_v / encoder.fc.weight_v.norm()
    x = x @ weight.T + encoder.fc.bias
    block = getattr(encoder, "feedforward", None)
    if hasattr(block, "attn"):
        seen = mask if model.mask_dropped else torch.ones_like(mask)
        if "widest" in item and not (model.mask_dropped or model.drop_in_place):
            zeros = (~mask).nonzero()[:, 0]  # of dropped regions, cut behind the widest image
            seen[zeros[max(0, int(item["widest"] - mask.sum())) :]] = False
        norms = [layer for name, layer in block.named_children() if name.startswith("ln")]
        x = x + self_attention(block.attn, layer_norm(norms[0], x), seen)
    if hasattr(block, "mlp"):
        h = layer_norm(block.ln_2, x) @ block.mlp.c_fc.weight.T + block.mlp.c_fc.bias
        h = h * torch.sigmoid(1.702 * h)
        x = x + h @ block.mlp.c_proj.weight.T + block.mlp.c_proj.bias
    x = x if encoder.no_imgnorm else torch.stack([unit(v) for v in x])
    return x[mask]


def system_pair(model: torch.nn.Module, item: dict[str, Tensor], caption: dict) -> Tensor:
    """The score of one image and one caption by any of the systems."""
    regions, (words, sentence), config = item["regions"], caption["encoded"], model.config
    system = type(model).__name__
    if system == "CHAN":
        names = "coding_type", "pooling_type", "alpha", "belta"
        return chan_pair(regions, words, *(getattr(config, name) for name in names))
    if system == "GSMN":
        boxes = item["boxes"][item["region_mask"]] if "region_mask" in item else item["boxes"]
        return gsmn_pair(model, regions, boxes, words, caption["pairs"])
    score = 0
    if system == "PFANWhole":
        whole = item["whole"] @ model.img_enc.fc_whole.weight.T + model.img_enc.fc_whole.bias
        score = model.lambda_whole * cosine(whole, sentence)
        if model.need_box_whole and config.cross_attn == "t2i":
            score = score + 0.5 * cosine(regions[-1], sentence)
            regions = regions[:-1]
    queries, keys = (words, regions) if config.cross_attn == "t2i" else (regions, words)
    names = "raw_feature_norm", "agg_func", "lambda_softmax", "lambda_lse", "bonus"
    return score + pair_score(queries, keys, *(getattr(config, name) for name in names))


def system_scores(model: torch.nn.Module, batch: dict, pairs: list | None = None) -> Tensor:
    """Scores (I, C) of a batch by any system; `pairs` are the captions' dependencies (GSMN)."""
    items, captions = [], []
    for k in range(len(batch["images"])):
        item = cut_filling({name: x[k] for name, x in batch.items()})
        items.append(item | {"regions": encode_image(model, item)})
    for k, length in enumerate(batch["lengths"].tolist()):
        encoded = encode_caption(model.txt_enc, batch["captions"][k, :length])
        captions.append({"encoded": encoded, "pairs": pairs[k] if pairs else None})
    scores = [system_pair(model, item, caption) for item in items for caption in captions]
    return torch.stack(scores).view(len(items), len(captions))
