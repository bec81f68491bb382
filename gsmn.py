"""GSMN: node-level and structure-level matching of a textual and a visual graph.

Liu et al., Graph Structured Network for Image-Text Matching, CVPR 2020 (arXiv:2004.00277).
Letters: I images, C captions, R regions, W words, D joint dimension; in a score M images, N
captions; V nodes of a graph (words or regions), B blocks of D / B dimensions, K kernels, H hidden
numbers a node, F what a key has in a block.

Section 3.1 builds the graphs: edges S_ij = softmax_j(lambda u_i . u_j) among words, for the sparse
graph times the adjacency A of the dependency parse, rows of length 1; polar coordinates of the box
centres among regions. Section 3.2 matches: a node attends to the other modality's nodes and becomes
the vector of its cosines, block by block, with what it attends to (node level); a graph convolution
with K kernels and two layers make each vector a number, and the mean over the nodes is the score
(structure level). The score of a pair is the sum of both graphs' scores.

As published, the convolution adds up the node's *own* vector over its neighbours, so that no node
sees another; that is the default here, for the published weights depend on it. `neighbours=True` is
what the paper says: x_i = ||_k sigma(sum_j e_ij W_k m_j + b), neighbours' vectors m_j, with sigma =
tanh, the edges e_ij as in section 3.1, and Gaussian kernels normalised over the neighbours.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import (
    CrossAttention,
    EncoderImage,
    Encoders,
    EncoderText,
    WeightNormLinear,
    attention,
    cosine,
    restore_faint,
)
from pairs import blocks, pair_scores

KERNELS = 8
READ = "regions", "keys", "norms", "edges", "inside"  # of the images by a score


class Matching(NamedTuple):
    """What decides a score beside weights; see options.py."""

    num_block: int = 16
    lambda_softmax: float = 20.0
    neighbours: bool = False

    @property
    def per_dot(self) -> int:
        """Numbers kept for each dot: the dots block by block, and the attended vectors."""
        return 2 * self.num_block


def block_keys(x: Tensor, num_block: int) -> Tensor:
    """What the length of an attended vector sum_k a_k x_k needs, block by block: (N, V, B F).

    x (N, V, D) itself, to build its blocks of F = D / B; or, where V is less, the blocks' Gram
    matrices, F = V: row k holds the dots of block b of x_k with that of each x_l.
    """
    part = x.unflatten(2, (num_block, -1)).transpose(1, 2)  # (N, B, V, D / B)
    if x.size(1) >= part.size(3):
        return x
    return (part @ part.mT).transpose(1, 2).flatten(2)  # (N, V, B V)


def block_norms(x: Tensor, num_block: int) -> Tensor:
    """Length of each block of x (N, V, D): (N, V, B), with no gradient at 0."""
    square = x.square().unflatten(2, (num_block, -1)).sum(3)  # (N, V, B)
    if not x.requires_grad:
        return square.sqrt_()
    return square.masked_fill(square == 0, 1).sqrt().masked_fill(square == 0, 0)


def word_nodes(
    s: Tensor,
    dots: Tensor,
    keys: Tensor,
    gram: bool,
    norms: tuple[Tensor, Tensor],
    vectors: tuple[Tensor, Tensor],
    scale: float,
    inside: Tensor | None = None,
) -> Tensor:
    """Vectors (M, N, W, B) of the textual nodes: each word attends to the regions.

    s (B, N, W, M, R) holds the dots block by block, `dots` (N, W, M, R) their sum; keys (M, R, B F)
    are the images' block_keys, Gram matrices or not. norms are the words', which broadcast to the
    result, and the regions' (M, R, B). vectors are the words (N, W, B, D / B) and regions (M, R, B,
    D / B) block by block; for these and `inside` (1, M, R) see attend of model.py.
    """
    a = attention(dots, CrossAttention(True, lambda_softmax=scale), inside)  # (N, W, M, R)
    words, regions = vectors
    rows = a.flatten(0, 1).transpose(0, 1).contiguous()  # (M, N W, R)
    c = (rows @ keys).unflatten(2, (norms[1].size(2), -1))  # (M, N W, B, F)
    if not gram:
        c = c.unflatten(1, a.shape[:2])  # (M, N, W, B, F)
        queries = words[None] if len(words) == len(a) else words[:, None]
        return cosine((c * queries).sum(4), c.square().sum(4), norms[0])  # (M, N, W, B)
    # (N W M, B, R) times (N W M, R, 1): the products are not written down before they are summed.
    dot = s.flatten(1, 3).transpose(0, 1).bmm(a.reshape(-1, a.size(3), 1))  # (N W M, B, 1)
    dot = dot.view(*a.shape[:3], -1).permute(2, 0, 1, 3)  # (M, N, W, B)
    square = c.flatten(0, 1).bmm(rows.view(-1, rows.size(2), 1)).view(dot.shape)  # (M, N, W, B)

    def gather(m: Tensor, n: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        caption = n if len(words) == len(a) else m
        image = m if len(regions) == a.size(2) else n
        return a[n, w, m], words[caption, w, b], regions[image, :, b]

    bound = norms[1].amax(1).square()[:, None, None]  # (M, 1, 1, B)
    return restore_faint(cosine(dot, square, norms[0]), square, bound, gather)


def region_nodes(
    s: Tensor,
    dots: Tensor,
    keys: Tensor,
    gram: bool,
    norms: tuple[Tensor, Tensor],
    vectors: tuple[Tensor, Tensor],
    scale: float,
) -> Tensor:
    """Vectors (N, B, M, R) of the visual nodes: each region attends to the words.

    As word_nodes, but keys (N, W, B F) are the captions', and norms the regions', which broadcast
    to the result, and the words' (N, W, B). Overwrites s where no graph is kept.
    """
    mul = Tensor.mul if dots.requires_grad else Tensor.mul_
    a = attention(dots, CrossAttention(False, lambda_softmax=scale))  # (N, W, M, R)
    words, regions = vectors
    c = keys.mT @ a.flatten(2)  # (N, B F, M R)
    c = c.view(len(a), norms[1].size(2), -1, *a.shape[2:])  # (N, B, F, M, R)
    if not gram:
        queries = regions.movedim(1, 3)  # (M, B, F, R)
        one = len(regions) == a.size(2)
        queries = queries.movedim(0, 2)[None] if one else queries[:, :, :, None]
        return cosine((c * queries).sum(2), c.square().sum(2), norms[0])  # (N, B, M, R)
    dot = mul(s, a).sum(2).transpose(0, 1)  # (N, B, M, R)
    square = mul(c, a[:, None]).sum(2)  # (N, B, M, R)

    def gather(n: Tensor, b: Tensor, m: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        caption = n if len(words) == len(a) else m
        image = m if len(regions) == a.size(2) else n
        return a.transpose(1, 3)[n, r, m], regions[image, r, b], words[caption, :, b]

    bound = norms[1].amax(1).square()[:, :, None, None]  # (N, B, 1, 1)
    return restore_faint(cosine(dot, square, norms[0]), square, bound, gather)


def structure_score(
    nodes: Tensor,
    edges: Tensor | None,
    neighbours: bool,
    conv: Tensor,
    hidden: Tensor,
    hidden_bias: Tensor,
    out: Tensor,
    out_bias: Tensor,
    conv_bias: Tensor | None = None,
    *,
    inside: Tensor | None = None,
) -> Tensor:
    """Scores (M, N) of one graph from its nodes' vectors m (M, N, V, B): structure level.

    Section 3.2 of the paper: x_i = ||_k sigma(sum_j e_ij W_k m_j + b), and then the mean over i of
    W_s sigma(W_h x_i + b_h) + b_s. conv (H, B) are the W_k one below the other, conv_bias b, hidden
    W_h, out W_s. edges: with `neighbours` e_ij, (m, n, k, V, V); else, as published, what a node's
    own vector is multiplied with instead of that sum, (m, n, V, k), and no sigma around it.
    `inside` (m, n, V) says which nodes there are; None: all. The letters in lower case are M, N, K,
    or 1.
    """
    h = (nodes @ conv.mT).unflatten(3, (KERNELS, -1))  # (M, N, V, K, H / K)
    if neighbours:
        h = torch.einsum("mnkij,mnjkc->mnikc", edges, h)  # (M, N, V, K, H / K)
    elif edges is not None:
        h = h * edges[..., None]  # (M, N, V, K, H / K)
    h = h.flatten(3)  # (M, N, V, H)
    h = h if conv_bias is None else h + conv_bias  # (M, N, V, H)
    h = h.tanh() if neighbours else h  # (M, N, V, H)
    h = (h @ hidden.mT + hidden_bias).tanh()  # (M, N, V, H)
    # The last layer is linear, so the mean over nodes (and over out_dim, published) goes first.
    if inside is None:
        h = h.mean(2)  # (M, N, H)
    else:
        h = (h * inside[..., None]).sum(2) / inside.sum(2)[..., None]  # (M, N, H)
    return h @ out.mean(0) + out_bias.mean()  # (M, N)


def score_some(
    images: tuple[Tensor, ...],
    captions: tuple[Tensor, ...],
    paired: bool,
    *weights: Tensor,
    how: Matching,
) -> Tensor:
    """Scores of captions of one length and some images; see pair_scores.

    Of images: regions (i, R, D), their block_keys, block_norms, and edges (i, ...), and if some
    regions are missing, which there are (i, R): the others are zeros. Of captions: words (n, W, D)
    and, if the graph has any, edges (n, W) or (n, W, all W).
    """
    regions, keys, norms, visual_edges, *inside = images
    words, *textual_edges = captions
    b, length, depth = how.num_block, words.size(1), words.size(2)
    words_b, regions_b = (x.unflatten(2, (b, -1)) for x in (words, regions))  # (n, W, B, D / B)
    word_norms = block_norms(words, b)  # (n, W, B)
    if paired:
        s = words_b.permute(2, 0, 1, 3) @ regions_b.permute(2, 0, 3, 1)  # (B, p, W, R)
        dots = s.sum(0)  # (p, W, R)
        # Words meet their image as if all were one caption's, regions as if all were one image's:
        # then keys are one a pair. In the graphs N = 1 and M = p.
        by_word, word_dots = s.transpose(1, 2)[:, None], dots.transpose(0, 1)[None]
        by_region, region_dots = s[:, :, :, None], dots[:, :, None]
        of_words = word_norms[:, None]  # (p, 1, W, B)
        of_regions = norms.mT[:, :, None]  # (p, B, 1, R)
        textual_edges = [x[:, None] for x in textual_edges]  # (p, 1, W, ...)
    else:
        s = words_b.flatten(0, 1).transpose(0, 1) @ regions_b.flatten(0, 1).permute(1, 2, 0)
        by_word = by_region = s.view(b, *words.shape[:2], *regions.shape[:2])  # (B, n, W, i, R)
        word_dots = region_dots = by_word.sum(0)  # (n, W, i, R)
        of_words, of_regions = word_norms, norms.permute(2, 0, 1)  # (n, W, B), (B, i, R)
        textual_edges = [x[None] for x in textual_edges]  # (1, n, W, ...)
    more = (words_b, regions_b), how.lambda_softmax
    gram = keys.size(2) < depth
    there = inside[0][None] if inside else None  # (1, i, R) or (1, p, R)
    x = word_nodes(by_word, word_dots, keys, gram, (of_words, norms), *more, there)  # (M, N, W, B)
    keys = block_keys(words, b)  # (n, W, B F)
    gram = keys.size(2) < depth
    norms = of_regions, word_norms
    y = region_nodes(by_region, region_dots, keys, gram, norms, *more)  # (N, B, M, R)
    y = y.permute(0, 2, 3, 1) if paired else y.permute(2, 0, 3, 1)  # (M, N, R, B)

    edges = None
    if textual_edges:
        (edges,) = textual_edges
        edges = edges[..., None, :, :length] if how.neighbours else edges[..., None]
    scores = structure_score(x, edges, how.neighbours, *weights[:6])  # (M, N)
    present = inside[0][:, None] if inside else None  # (i, 1, R) or (p, 1, R)
    edges = visual_edges[:, None]
    scores = scores + structure_score(y, edges, how.neighbours, *weights[6:], inside=present)
    return scores.flatten() if paired else scores.mT  # (p,) or (n, i)


@torch.no_grad()
def score_all(
    images: tuple[Tensor, ...],
    captions: tuple[Tensor, ...],
    cap_lens: Tensor,
    *weights: Tensor,
    how: Matching,
) -> Tensor:
    """Scores (I, C) of all pairs, no graph kept."""
    regions, words = images[0], captions[0]
    scores = regions.new_empty(len(regions), len(words))  # (I, C)
    for length, caption, image in blocks(cap_lens, regions, how.per_dot, 16):
        some = tuple(x[caption, :length] for x in captions)
        part = score_some(tuple(x[image] for x in images), some, False, *weights, how=how)  # (n, i)
        scores[image, caption] = part.mT
    return scores


def compile_scores() -> None:
    """Let torch.compile fuse the passes of GSMN's score, for the rest of this process."""
    global word_nodes, region_nodes, structure_score
    # Two graphs, with and without edges, pairs and blocks, training and evaluation.
    torch._dynamo.config.recompile_limit = 64
    word_nodes, region_nodes, structure_score = (
        torch.compile(x, dynamic=True) for x in (word_nodes, region_nodes, structure_score)
    )


class VisualKernels(nn.Module):
    """Kernels over polar coordinates: edge weights of the visual graph (section 3.1)."""

    def __init__(self, feat_dim: int, hid_dim: int):
        super().__init__()
        self.mean_rho = nn.Parameter(torch.empty(KERNELS, 1).uniform_(0, 1))
        self.mean_theta = nn.Parameter(torch.empty(KERNELS, 1).uniform_(-math.pi, math.pi))
        self.precision_rho = nn.Parameter(torch.empty(KERNELS, 1).uniform_(0, 1))
        self.precision_theta = nn.Parameter(torch.empty(KERNELS, 1).uniform_(0, 1))
        self.conv_weights = nn.ModuleList(
            nn.Linear(feat_dim, hid_dim // KERNELS, bias=False) for _ in range(KERNELS)
        )

    def forward(self, boxes: Tensor, neighbours: bool, inside: Tensor | None = None) -> Tensor:
        """boxes (I, R, 4) in parts of the image's size -> edges (I, R, K), or (I, K, R, R).

        `inside` (I, R) says which regions there are; no other is a neighbour. None: all.

        Of w_ijk = exp(-(rho_ij - mu_k)^2 / 2 s_k^2) exp(-|theta_ij - nu_k|^2 / 2 t_k^2), angles
        the short way round. As published they are divided by their sum over the kernels k and, as
        the node's own vector stands for all neighbours, added up over j. The paper's edges are one
        a pair of regions; divided by their sum over j, each kernel takes a mean of neighbours.
        """
        centre = (boxes[..., :2] + boxes[..., 2:]) / 2  # (I, R, 2)
        dx, dy = (centre[:, :, None] - centre[:, None]).unbind(-1)  # (I, R, R)
        rho = (dx.square() + dy.square()).sqrt()[:, None]  # (I, 1, R, R)
        theta = torch.atan2(dx, dy)[:, None]  # (I, 1, R, R)

        def exponent(d: Tensor, precision: Tensor) -> Tensor:
            return -0.5 * d.square() / (1e-14 + precision.square()[..., None])  # (I, K, R, R)

        around = (theta - self.mean_theta[..., None]).abs()  # (I, K, R, R)
        around = torch.minimum(around, (2 * math.pi - around).abs())  # (I, K, R, R)
        log_w = exponent(rho - self.mean_rho[..., None], self.precision_rho)  # (I, K, R, R)
        log_w = log_w + exponent(around, self.precision_theta)  # (I, K, R, R)
        outside = None if inside is None else ~inside[:, None, None]  # (I, 1, 1, R)
        # A softmax is that quotient, but where all kernels are so narrow that each w is 0: the
        # published quotient is then NaN.
        if neighbours:
            log_w = log_w if outside is None else log_w.masked_fill(outside, -torch.inf)
            return log_w.softmax(3)  # (I, K, R, R)
        w = log_w.softmax(1)  # (I, K, R, R)
        w = w if outside is None else w.masked_fill(outside, 0)  # (I, K, R, R)
        return w.sum(3).mT  # (I, R, K)


class TextualKernels(nn.Module):
    """Kernels of the textual graph. As published each edge is multiplied with a number a kernel and
    divided by the sum over j of these products: it cancels, and passes no gradient."""

    def __init__(self, feat_dim: int, hid_dim: int):
        super().__init__()
        self.params = nn.Parameter(torch.empty(KERNELS, 1).uniform_(-1, 1), requires_grad=False)
        self.conv_weights = nn.ModuleList(
            nn.Linear(feat_dim, hid_dim // KERNELS) for _ in range(KERNELS)
        )


class VisualGraph(nn.Module):
    """Weights of the visual graph, under their published names."""

    def __init__(self, feat_dim: int, hid_dim: int, out_dim: int):
        super().__init__()
        self.graph_convolution_1 = VisualKernels(feat_dim, hid_dim)
        self.out_1 = WeightNormLinear(hid_dim, hid_dim, per_row=True)
        self.out_2 = WeightNormLinear(hid_dim, out_dim, per_row=True)

    def weights(self) -> tuple[Tensor, ...]:
        """What structure_score reads."""
        conv = torch.cat([kernel.weight for kernel in self.graph_convolution_1.conv_weights])
        return conv, self.out_1.weight, self.out_1.bias, self.out_2.weight, self.out_2.bias


class TextualGraph(nn.Module):
    """Weights of the textual graph, under their published names."""

    def __init__(self, feat_dim: int, hid_dim: int, out_dim: int):
        super().__init__()
        self.graph_convolution_3 = TextualKernels(feat_dim, hid_dim)
        self.out_1 = WeightNormLinear(hid_dim, hid_dim, per_row=True)
        self.out_2 = WeightNormLinear(hid_dim, out_dim, per_row=True)

    def weights(self) -> tuple[Tensor, ...]:
        """What structure_score reads, the convolution's bias last."""
        kernels = self.graph_convolution_3.conv_weights
        conv, bias = (torch.cat([getattr(k, x) for k in kernels]) for x in ("weight", "bias"))
        return conv, self.out_1.weight, self.out_1.bias, self.out_2.weight, self.out_2.bias, bias


def textual_edges(
    words: Tensor, lengths: Tensor, adjacency: Tensor | None, scale: float, neighbours: bool
) -> Tensor:
    """Edges of the textual graph: (C, W, W) with `neighbours`, else (C, W).

    words (C, W, D); lengths (C,) on the host; adjacency (C, W, W), the dependency pairs both ways
    plus the identity, or None for the dense graph. The paper's edges (section 3.1) are S_ij =
    softmax_j(scale u_i . u_j); for the sparse graph S times A, divided by the L2 norm over j. As
    published a node's own vector is multiplied with sum_j e_ij a_ij / sum_j e_ij, which is 1 unless
    a word depends on itself.
    """
    inside = (torch.arange(words.size(1)) < lengths[:, None]).to(words.device)  # (C, W)
    joined = inside[:, None] if adjacency is None else adjacency > 0  # (C, 1 or W, W)
    # S is taken over the neighbourhood: over all words, one that is strong but no neighbour would
    # leave nothing of the others. After the division by the norm it is the same.
    joined = joined | ~inside[:, :, None]  # (C, W, W), rows of padding hold all: no NaN
    e = (scale * (words @ words.mT)).masked_fill(~joined, -math.inf).softmax(2)  # (C, W, W)
    e = e * inside[:, :, None]  # (C, W, W)
    if adjacency is None:
        return e
    if neighbours:
        return F.normalize(e * adjacency.clamp(max=1), dim=2, eps=1e-8)  # (C, W, W)
    e = e * adjacency  # (C, W, W)
    return (e * adjacency).sum(2) / e.sum(2).clamp_min(1e-30)  # (C, W)


class GSMN(Encoders):
    """Region and word encoders, and the matching of their two graphs."""

    compile_scores = staticmethod(compile_scores)

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
        lambda_softmax: float = 9.0,
        feat_dim: int = 16,
        num_block: int = 16,
        hid_dim: int = 32,
        out_dim: int = 1,
        is_sparse: bool = False,
        neighbours: bool = False,
        text_encoder: nn.Module | None = None,
    ):
        super().__init__()
        if embed_size % num_block:
            raise ValueError(
                f"num_block {num_block}: expected a divisor of embed_size {embed_size}"
            )
        if feat_dim != num_block:
            raise ValueError(
                f"feat_dim {feat_dim}: a node's vector has one number a block, so expected as many "
                f"as num_block, {num_block}"
            )
        if hid_dim % KERNELS:
            raise ValueError(f"hid_dim {hid_dim}: expected a multiple of the {KERNELS} kernels")
        self.img_enc = EncoderImage(img_dim, embed_size, precomp_enc_type, no_imgnorm)
        self.txt_enc = text_encoder or EncoderText(
            vocab_size, word_dim, embed_size, num_layers, bi_gru, no_txtnorm
        )
        self.visual_graph = VisualGraph(feat_dim, hid_dim, out_dim)
        self.textual_graph = TextualGraph(feat_dim, hid_dim, out_dim)
        self.how = Matching(num_block, lambda_softmax, neighbours)
        self.is_sparse = is_sparse

    def encode_images(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch['images'] (I, R, img_dim), 'boxes' (I, R, 4) -> {'regions': (I, R, D), 'edges'}.

        Boxes are (left, top, right, bottom) in parts of the image's width and height.
        """
        kernels, inside = self.visual_graph.graph_convolution_1, batch.get("inside")
        edges = kernels(batch["boxes"], self.how.neighbours, inside)
        encoded = super().encode_images(batch) | {"edges": edges}
        return encoded if self.training else encoded | self._keys(encoded["regions"])

    def _keys(self, regions: Tensor) -> dict[str, Tensor]:
        """What a score needs of the regions: once a step, once an evaluation."""
        b = self.how.num_block
        return {"keys": block_keys(regions, b), "norms": block_norms(regions, b)}

    def encode_captions(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """As Encoders; for the sparse graph also batch['adjacency'] (C, W, W), passed on."""
        encoded = super().encode_captions(batch)
        return encoded | ({"adjacency": batch["adjacency"]} if self.is_sparse else {})

    def similarity(self, images: dict[str, Tensor], captions: dict[str, Tensor]) -> Tensor:
        """Scores (I, C) of every encoded image with every encoded caption."""
        how = self.how
        regions, words = images["regions"], captions["words"]
        lengths = torch.as_tensor(captions["lengths"]).cpu()
        edges = ()
        if self.is_sparse or how.neighbours:  # else they would be 1: see textual_edges
            adjacency = captions.get("adjacency")
            edges = (textual_edges(words, lengths, adjacency, how.lambda_softmax, how.neighbours),)
        images = images if "keys" in images else images | self._keys(regions)
        return pair_scores(
            partial(score_all, how=how),
            partial(score_some, how=how),
            tuple(images[name] for name in READ if name in images),
            (words, *edges),
            lengths,
            (*self.textual_graph.weights(), *self.visual_graph.weights()),
            per_dot=how.per_dot,
        )
