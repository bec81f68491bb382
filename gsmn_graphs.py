"""GSMN's two graphs: their edges, the weights of their convolutions, and the structure level.

Liu et al., Graph Structured Network for Image-Text Matching, CVPR 2020 (arXiv:2004.00277).
Section 3.1 of the paper builds the graphs. Between words the edges are S_ij = softmax_j(lambda
u_i . u_j); in the sparse graph they are multiplied with the adjacency A of the dependency parse,
and each row gets length 1. Between regions they come from polar coordinates of the box centres.
Section 3.2 matches (structure level): a graph convolution with K kernels and two layers turn the
vector of each node into a number, and the mean over the nodes is the score.

In the published code the convolution adds up the node's *own* vector over its neighbours, so no
node sees another one (Q18). That is the default here, because the published weights depend on it.
`neighbours=True` is what the paper says: x_i = ||_k sigma(sum_j e_ij W_k m_j + b), with the vectors
m_j of the neighbours, sigma = tanh, the edges e_ij of section 3.1, and Gaussian kernels that are
normalised over the neighbours.

Shapes: I images, C captions, R regions, W words, D joint dimension; V nodes of a graph (words or
regions), B numbers of a node's vector, K kernels, H hidden numbers per node. The structure level
works on blocks (N captions with M images) and on pairs (P): "..." stands for either.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import WeightNormLinear
from util.kept import keep

KERNELS = 8


def structure_score(
    nodes: Tensor,
    edges: Tensor | None,
    conv: Tensor,
    hidden: Tensor,
    hidden_bias: Tensor,
    out: Tensor,
    out_bias: Tensor,
    conv_bias: Tensor | None = None,
    *,
    neighbours: bool = False,
    mask: Tensor | None = None,
    kept_as: str = "node_scores",
) -> Tensor:
    """Scores (...) of one graph from its nodes' vectors m (..., V, B): the structure level.

    Section 3.2 of the paper: x_i = ||_k sigma(sum_j e_ij W_k m_j + b), then the mean over i of W_s
    sigma(W_h x_i + b_h) + b_s. conv (H, B) holds the W_k one below the other, conv_bias is b,
    hidden W_h, out W_s. edges: with `neighbours` the e_ij, (..., K or 1, V, V); otherwise, as
    published (Q18), the factor of a node's own vector, (..., V, K or 1), without a sigma around it.
    mask (..., V): the nodes that are there; None: all. kept_as: the name of the nodes' own numbers,
    whose mean is the score, in util/kept.py.
    """
    h = (nodes @ conv.mT).unflatten(-1, (KERNELS, -1))  # (..., V, K, H / K)
    if neighbours:
        h = torch.einsum("...kij,...jkc->...ikc", edges, h)  # (..., V, K, H / K)
    elif edges is not None:
        h = h * edges[..., None]  # (..., V, K, H / K)
    h = h.flatten(-2)  # (..., V, H)
    h = h if conv_bias is None else h + conv_bias  # (..., V, H)
    h = h.tanh() if neighbours else h  # (..., V, H)
    h = (h @ hidden.mT + hidden_bias).tanh()  # (..., V, H)
    keep(**{kept_as: lambda: h @ out.mean(0) + out_bias.mean()})  # (..., V)
    # The last layer is linear, so the mean over nodes (and over out_dim, published) goes first.
    if mask is None:
        h = h.mean(-2)  # (..., H)
    else:
        h = (h * mask[..., None]).sum(-2) / mask.sum(-1)[..., None]  # (..., H)
    return h @ out.mean(0) + out_bias.mean()  # (...)


def textual_edges(
    words: Tensor, lengths: Tensor, adjacency: Tensor | None, scale: float, neighbours: bool
) -> Tensor:
    """Edges of the textual graph: (C, W, W) with `neighbours`, otherwise (C, W).

    words (C, W, D); lengths (C,) on the host; adjacency (C, W, W), the dependency pairs both ways
    plus the identity, or None for the dense graph. The paper's edges (section 3.1) are S_ij =
    softmax_j(scale u_i . u_j); for the sparse graph S times A, divided by the L2 norm over j. In
    the published code the node's own vector is multiplied with sum_j e_ij a_ij / sum_j e_ij
    instead, which is 1 unless a word depends on itself.
    """
    word_mask = (torch.arange(words.size(1)) < lengths[:, None]).to(words.device)  # (C, W)
    joined = word_mask[:, None] if adjacency is None else adjacency > 0  # (C, 1 or W, W)
    # The softmax runs over the neighbourhood (Q31). Over all words, a strong word elsewhere would
    # leave nothing for the others; after the division by the norm the result is the same.
    joined = joined | ~word_mask[:, :, None]  # (C, W, W); rows of padding hold all words: no NaN
    e = (scale * (words @ words.mT)).masked_fill(~joined, -math.inf).softmax(2)  # (C, W, W)
    e = e * word_mask[:, :, None]  # (C, W, W)
    if adjacency is None:
        return e
    if neighbours:
        return F.normalize(e * adjacency.clamp(max=1), dim=2, eps=1e-8)  # (C, W, W)
    e = e * adjacency  # (C, W, W)
    return (e * adjacency).sum(2) / e.sum(2).clamp_min(1e-30)  # (C, W)


class VisualKernels(nn.Module):
    """Gaussian kernels over polar coordinates: the edges of the visual graph (section 3.1)."""

    def __init__(self, feat_dim: int, hid_dim: int):
        super().__init__()
        self.mean_rho = nn.Parameter(torch.empty(KERNELS, 1).uniform_(0, 1))
        self.mean_theta = nn.Parameter(torch.empty(KERNELS, 1).uniform_(-math.pi, math.pi))
        self.precision_rho = nn.Parameter(torch.empty(KERNELS, 1).uniform_(0, 1))
        self.precision_theta = nn.Parameter(torch.empty(KERNELS, 1).uniform_(0, 1))
        self.conv_weights = nn.ModuleList(
            nn.Linear(feat_dim, hid_dim // KERNELS, bias=False) for _ in range(KERNELS)
        )

    def forward(self, boxes: Tensor, neighbours: bool, region_mask: Tensor | None = None) -> Tensor:
        """boxes (I, R, 4) in parts of the image's size -> edges (I, R, K), or (I, K, R, R).

        With rho_ij the distance of two box centres and theta_ij the angle between them, kernel k
        has w_ijk = exp(-(rho_ij - mu_k)^2 / 2 s_k^2) exp(-|theta_ij - nu_k|^2 / 2 t_k^2), angles
        the short way round. In the published code w is divided by its sum over the kernels k (Q20)
        and then added up over j, because the node's own vector stands for all neighbours (Q18):
        (I, R, K). With `neighbours` w is divided by its sum over j, so that each kernel takes a
        mean of the neighbours: (I, K, R, R). region_mask (I, R): the regions that are there; the
        others are no neighbours. None: all.
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
        missing = None if region_mask is None else ~region_mask[:, None, None]  # (I, 1, 1, R)
        # The softmax is that quotient. It is also defined if all kernels are so narrow that each w
        # is 0, where the published quotient is NaN (Q20).
        if neighbours:
            log_w = log_w if missing is None else log_w.masked_fill(missing, -torch.inf)
            return log_w.softmax(3)  # (I, K, R, R)
        w = log_w.softmax(1)  # (I, K, R, R)
        w = w if missing is None else w.masked_fill(missing, 0)  # (I, K, R, R)
        return w.sum(3).mT  # (I, R, K)


class TextualKernels(nn.Module):
    """The kernels of the textual graph.

    In the published code each edge is multiplied with a number per kernel and divided by the sum
    over j of these products. So `params` cancels; it passes no gradient here (Q19).
    """

    def __init__(self, feat_dim: int, hid_dim: int):
        super().__init__()
        self.params = nn.Parameter(torch.empty(KERNELS, 1).uniform_(-1, 1), requires_grad=False)
        self.conv_weights = nn.ModuleList(
            nn.Linear(feat_dim, hid_dim // KERNELS) for _ in range(KERNELS)
        )


class VisualGraph(nn.Module):
    """The weights of the visual graph, under their published names."""

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
    """The weights of the textual graph, under their published names."""

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
