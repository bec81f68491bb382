"""SCAN: two encoders, stacked cross attention, and the ranking loss that its successors share.

Lee et al., Stacked Cross Attention for Image-Text Matching, ECCV 2018 (arXiv:1803.08024).
Letters: I images, C captions, R regions, W words, D joint dimension; in attention N query items of Q
rows each and M key items of K rows each (t2i: captions' words query images' regions; i2t: reverse).
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

EPS = 1e-8


def l1norm(x: Tensor, dim: int) -> Tensor:
    """x / (sum |x| + 1e-8) along `dim`."""
    return x / (x.abs().sum(dim, keepdim=True) + EPS)


def l2norm(x: Tensor, dim: int) -> Tensor:
    """x / (|x| + 1e-8) along `dim`; a zero vector stays zero and passes no gradient."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    # Without the mask the gradient at zero is 1e8 times what comes in, and clipping then spends
    # the whole step on an empty region.
    return x * torch.where(norm > 0, 1 / (norm + EPS), 0)


def _clip(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.1)


# How the dots s of one query item and one key row are normalised over the item's Q rows.
RAW_FEATURE_NORM: dict[str, Callable[[Tensor, int], Tensor]] = {
    "softmax": lambda s, dim: s.softmax(dim),
    "l2norm": l2norm,
    "l1norm": l1norm,
    "clipped": lambda s, dim: _clip(s),
    "clipped_l2norm": lambda s, dim: l2norm(_clip(s), dim),
    "clipped_l1norm": lambda s, dim: l1norm(_clip(s), dim),
    "no_norm": lambda s, dim: s,
}

# How the cosines of the Q rows become one score (the paper's eq. 5, 6 and section 3.1).
AGG_FUNC: dict[str, Callable[[Tensor, int, float], Tensor]] = {
    "LogSumExp": lambda x, dim, lambda_lse: torch.logsumexp(lambda_lse * x, dim) / lambda_lse,
    "Mean": lambda x, dim, lambda_lse: x.mean(dim),
    "Max": lambda x, dim, lambda_lse: x.amax(dim),
    "Sum": lambda x, dim, lambda_lse: x.sum(dim),
}


def choose(table: dict, name: str, flag: str):
    """The entry `name` of a table of variants, or a ValueError that lists them."""
    if name not in table:
        raise ValueError(f"unknown {flag} {name!r}: expected one of {', '.join(table)}")
    return table[name]


class WeightNormLinear(nn.Module):
    """A linear layer whose weight is g v / |v| with one scalar g for the whole matrix."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        plain = nn.Linear(in_features, out_features)
        self.bias = plain.bias
        self.weight_g = nn.Parameter(plain.weight.detach().norm())
        self.weight_v = plain.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_v * (self.weight_g / self.weight_v.norm()), self.bias)


class EncoderImage(nn.Module):
    """Region features to the joint space: one linear layer, then unit length (eq. 9)."""

    def __init__(
        self,
        img_dim: int,
        embed_size: int,
        precomp_enc_type: str = "basic",
        no_imgnorm: bool = False,
    ):
        super().__init__()
        layers = {"basic": nn.Linear, "weight_norm": WeightNormLinear}
        self.fc = choose(layers, precomp_enc_type, "precomp_enc_type")(img_dim, embed_size)
        if precomp_enc_type == "basic":
            nn.init.xavier_uniform_(self.fc.weight)
            nn.init.zeros_(self.fc.bias)
        self.no_imgnorm = no_imgnorm

    def forward(self, images: Tensor) -> Tensor:
        """images (I, R, F), float16 or float32 -> regions (I, R, D), float32."""
        regions = self.fc(images.to(self.fc.bias.dtype)).float()  # (I, R, D)
        return regions if self.no_imgnorm else l2norm(regions, dim=-1)


class EncoderText(nn.Module):
    """Word ids to one vector a word: embedding, (bi-)GRU, mean of both directions (eq. 10 to 13)."""

    def __init__(
        self,
        vocab_size: int,
        word_dim: int,
        embed_size: int,
        num_layers: int = 1,
        use_bi_gru: bool = False,
        no_txtnorm: bool = False,
    ):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, word_dim)
        nn.init.uniform_(self.embed.weight, -0.1, 0.1)
        self.rnn = nn.GRU(
            word_dim, embed_size, num_layers, batch_first=True, bidirectional=use_bi_gru
        )
        self.no_txtnorm = no_txtnorm

    def forward(self, captions: Tensor, lengths: Tensor) -> Tensor:
        """captions (C, W) word ids, lengths (C,) -> words (C, W, D), zero beyond each length."""
        x = self.embed(captions)  # (C, W, word_dim)
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        out, _ = self.rnn(packed)
        x, _ = pad_packed_sequence(out, batch_first=True, total_length=captions.size(1))
        x = x.float()  # (C, W, D) or (C, W, 2 D); float32 under autocast too
        if self.rnn.bidirectional:
            ahead, behind = x.chunk(2, dim=-1)
            x = (ahead + behind) / 2  # (C, W, D)
        return x if self.no_txtnorm else l2norm(x, dim=-1)


def stacked_cross_attention(
    queries: Tensor,
    keys: Tensor,
    normalise: Callable[[Tensor, int], Tensor],
    aggregate: Callable[[Tensor, int, float], Tensor],
    lambda_softmax: float,
    lambda_lse: float,
) -> Tensor:
    """Score of every query item (N, Q, D) against every key item (M, K, D), without padding: (N, M).

    The attended vector c = sum_k a_k k (eq. 2) is never built: q.c = sum_k a_k s_k, and
    |c|^2 = a' G a with G the Gram matrix of an item's K rows. Both directions of the paper are this
    function: eq. 1 to 6 for i2t, eq. 7 and 8 for t2i.
    """
    n, q, _ = queries.shape
    m, k, _ = keys.shape
    s = queries.flatten(0, 1) @ keys.flatten(0, 1).mT  # (N Q, M K)
    s = s.view(n, q, m, k)  # (N, Q, M, K)
    a = (lambda_softmax * normalise(s, 1)).softmax(3)  # (N, Q, M, K)
    dot = (a * s).sum(3)  # (N, Q, M)
    a = a.view(n * q, m, k).transpose(0, 1)  # (M, N Q, K)
    gram = keys @ keys.mT  # (M, K, K)
    square = ((a @ gram) * a).sum(2)  # (M, N Q)
    # Rounding can push a' G a of a vanishing attended vector below 0; the clamp also keeps the
    # gradient of the root finite there.
    length = square.clamp_min(EPS**2).sqrt().mT.view(n, q, m)  # (N, Q, M)
    query_length = torch.linalg.vector_norm(queries, dim=2)[:, :, None]  # (N, Q, 1)
    cosine = dot / (query_length * length).clamp_min(EPS)  # (N, Q, M)
    return aggregate(cosine, 1, lambda_lse)  # (N, M)


def length_groups(lengths: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(length, positions of the captions of that length), shortest first."""
    for length in lengths.unique().tolist():
        yield length, (lengths == length).nonzero().squeeze(1)


def _xattn_score(
    images: Tensor,
    captions: Tensor,
    cap_lens: Tensor,
    words_query: bool,
    raw_feature_norm: str,
    agg_func: str,
    lambda_softmax: float,
    lambda_lse: float,
    block: int | None,
) -> Tensor:
    normalise = choose(RAW_FEATURE_NORM, raw_feature_norm, "raw_feature_norm")
    aggregate = choose(AGG_FUNC, agg_func, "agg_func")
    if block is None:
        # Numbers in one block of dots: what stays in a core's cache, or fills a GPU.
        block = 2**19 if images.device.type == "cpu" else 2**27
    cap_lens = torch.as_tensor(cap_lens)
    columns, order = [], []
    for length, where in length_groups(cap_lens):
        step_c = max(1, int(block**0.5) // length)
        for some in where.split(step_c):
            words = captions[some.to(captions.device), :length]  # (c, length, D)
            step_i = max(1, block // (len(some) * length * images.size(1)))
            rows = []
            for regions in images.split(step_i):
                q, k = (words, regions) if words_query else (regions, words)
                score = stacked_cross_attention(
                    q, k, normalise, aggregate, lambda_softmax, lambda_lse
                )
                rows.append(score.mT if words_query else score)  # (i, c)
            columns.append(torch.cat(rows))  # (I, c)
            order.append(some)
    back = torch.cat(order).argsort().to(images.device)
    return torch.cat(columns, 1)[:, back]  # (I, C)


def xattn_score_t2i(
    images: Tensor,
    captions: Tensor,
    cap_lens: Tensor,
    raw_feature_norm: str = "clipped_l2norm",
    agg_func: str = "LogSumExp",
    lambda_softmax: float = 9.0,
    lambda_lse: float = 6.0,
    block: int | None = None,
) -> Tensor:
    """Text-to-image score (words attend to regions) of all pairs: (I, C).

    images (I, R, D); captions (C, W, D), of which the first cap_lens (C,) words of each are read.
    Captions of one length are scored together, so that no padding enters, in blocks of about
    `block` dots; the block's size does not change the result. Raises ValueError on an unknown name.
    """
    return _xattn_score(
        images,
        captions,
        cap_lens,
        True,
        raw_feature_norm,
        agg_func,
        lambda_softmax,
        lambda_lse,
        block,
    )


def xattn_score_i2t(
    images: Tensor,
    captions: Tensor,
    cap_lens: Tensor,
    raw_feature_norm: str = "clipped_l2norm",
    agg_func: str = "LogSumExp",
    lambda_softmax: float = 4.0,
    lambda_lse: float = 5.0,
    block: int | None = None,
) -> Tensor:
    """Image-to-text score (regions attend to words) of all pairs: (I, C); see xattn_score_t2i."""
    return _xattn_score(
        images,
        captions,
        cap_lens,
        False,
        raw_feature_norm,
        agg_func,
        lambda_softmax,
        lambda_lse,
        block,
    )


CROSS_ATTN = {"t2i": xattn_score_t2i, "i2t": xattn_score_i2t}


class ContrastiveLoss(nn.Module):
    """Hinge ranking loss over a batch of matched pairs, both directions, summed (eq. 14 and 15).

    With `max_violation` each image counts its hardest caption and each caption its hardest image
    only (VSE++); else every negative counts.
    """

    def __init__(self, margin: float = 0.2, max_violation: bool = False):
        super().__init__()
        self.margin, self.max_violation = margin, max_violation

    def forward(self, scores: Tensor) -> Tensor:
        """scores (B, B), images by captions, matched pairs on the diagonal -> loss ()."""
        matched = scores.diagonal()  # (B,)
        own = torch.eye(len(scores), dtype=torch.bool, device=scores.device)  # (B, B)
        caption_cost = (self.margin + scores - matched[:, None]).clamp(min=0)  # (B, B)
        image_cost = (self.margin + scores - matched[None, :]).clamp(min=0)  # (B, B)
        caption_cost = caption_cost.masked_fill(own, 0)
        image_cost = image_cost.masked_fill(own, 0)
        if self.max_violation:
            caption_cost = caption_cost.max(1).values  # (B,)
            image_cost = image_cost.max(0).values  # (B,)
        return caption_cost.sum() + image_cost.sum()


class SCAN(nn.Module):
    """Region and word encoders, and their stacked cross attention score."""

    def __init__(
        self,
        vocab_size: int,
        img_dim: int = 2048,
        word_dim: int = 300,
        embed_size: int = 1024,
        num_layers: int = 1,
        bi_gru: bool = False,
        precomp_enc_type: str = "basic",
        no_imgnorm: bool = False,
        no_txtnorm: bool = False,
        cross_attn: str = "t2i",
        raw_feature_norm: str = "clipped_l2norm",
        agg_func: str = "LogSumExp",
        lambda_softmax: float = 9.0,
        lambda_lse: float = 6.0,
    ):
        super().__init__()
        self.img_enc = EncoderImage(img_dim, embed_size, precomp_enc_type, no_imgnorm)
        self.txt_enc = EncoderText(vocab_size, word_dim, embed_size, num_layers, bi_gru, no_txtnorm)
        self.score = choose(CROSS_ATTN, cross_attn, "cross_attn")
        choose(RAW_FEATURE_NORM, raw_feature_norm, "raw_feature_norm")
        choose(AGG_FUNC, agg_func, "agg_func")
        self.score_options = {
            "raw_feature_norm": raw_feature_norm,
            "agg_func": agg_func,
            "lambda_softmax": lambda_softmax,
            "lambda_lse": lambda_lse,
        }

    def encode_images(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch['images'] (I, R, F) -> {'regions': (I, R, D)}."""
        return {"regions": self.img_enc(batch["images"])}

    def encode_captions(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch['captions'] (C, W), batch['lengths'] (C,) -> {'words': (C, W, D), 'lengths': (C,)}."""
        words = self.txt_enc(batch["captions"], batch["lengths"])
        return {"words": words, "lengths": batch["lengths"]}

    def similarity(self, images: dict[str, Tensor], captions: dict[str, Tensor]) -> Tensor:
        """Scores (I, C) of every encoded image with every encoded caption."""
        return self.score(
            images["regions"], captions["words"], captions["lengths"], **self.score_options
        )
