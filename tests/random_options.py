"""Random options, sizes and inputs of every system, compared with plain loops in float64.

`draw(seed)` makes a case: a system with options, weights and a batch, from degenerate sizes (one
region, one image, one word, blocks of one number) to features that are large, small, opposite,
repeated or missing. `check(case)` runs the forward and backward pass of a training step three
times: as the project does, in float32; with the loops of tests/reference_systems.py in float64,
which count as the truth; and with the same loops in float32. The last run shows the precision that
float32 can reach. The project's scores, loss and gradients may be ten times as far from the truth,
or 1e-5 of the largest number, and no farther.

Shapes: B pairs of a batch, R regions, W words, F numbers per region.
"""

import copy
import dataclasses
import math
from contextlib import ExitStack
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

import attention
import pairs
from chan import CHAN, CODING, FEEDFORWARD, POOLING, InfoNCELoss
from gsmn import GSMN
from gsmn_data import adjacency
from model import AGG_FUNC, RAW_FEATURE_NORM, SCAN, ContrastiveLoss
from pfan import PFAN, PFANWhole
from tests import reference, reference_systems, reference_vse
from vse import POOLS, VSE

SYSTEMS = {"scan": SCAN, "gsmn": GSMN, "pfan": PFAN, "pfan_whole": PFANWhole, "chan": CHAN}
SYSTEMS["vse"] = VSE
WORDS = 12  # in the vocabulary
TIMES, LEAST = 10, 1e-5  # the bound: TIMES the distance of plain loops, at least LEAST


@dataclasses.dataclass
class Case:
    """One draw; see draw()."""

    system: str
    options: dict  # arguments of the model
    training: dict  # of the loss and the route
    model: nn.Module  # float32
    batch: dict[str, Tensor]
    dependencies: list | None  # of each caption, for GSMN's sparse graph

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.batch["images"].shape[:2]))
        words = self.batch["lengths"].tolist()
        options = self.options | {n: x for n, x in self.training.items() if x}
        return f"{self.system} (images {sizes}, words {words}) " + " ".join(
            f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in options.items()
        )


@dataclasses.dataclass
class Finding:
    """A result that is farther from float64 than the bound allows."""

    what: str  # scores, loss, or the weight whose gradient it is
    distance: float
    plain: float  # the distance of plain loops in float32
    bound: float

    def __str__(self) -> str:
        return (
            f"{self.what}: {self.distance:.1e} from float64, plain loops {self.plain:.1e}, "
            f"allowed {self.bound:.1e} (relative to the largest number)"
        )


class Draws:
    """The random numbers of one case."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)

    def pick(self, values):
        return list(values)[self.rng.integers(len(values))]

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def between(self, low: float, high: float) -> float:
        """A random number whose logarithm is uniform."""
        return float(np.exp(self.rng.uniform(np.log(low), np.log(high))))

    def normal(self, *shape: int) -> Tensor:
        return torch.from_numpy(self.rng.normal(size=shape).astype(np.float32))

    def uniform(self, *shape: int) -> Tensor:
        return torch.from_numpy(self.rng.random(shape).astype(np.float32))


def draw(seed: int, system: str | None = None) -> Case:
    """The case of a seed, of any system or of the one given."""
    r = Draws(seed)
    drawn = r.pick(SYSTEMS)
    system = system or drawn
    n, regions = r.pick([1, 2, 3, 4, 5, 6]), r.pick([1, 1, 2, 3, 4, 6, 9])
    options = draw_options(r, system, regions)
    training = {"margin": r.between(0.01, 2), "max_violation": r.chance(0.5)}
    training |= {"infonce": r.between(0.03, 1) if r.chance(0.15) else None}
    training |= {"no_false_negatives": r.chance(0.2), "grad_checkpointing": r.pick([0, 0, 0, 2])}
    training |= {"block_size": r.pick([2**22, 2**22, 40, 1])}
    torch.manual_seed(seed)
    net = draw_model(r, system, options)
    batch = {"images": draw_images(r, n, regions, options["img_dim"])}  # (B, R, F)
    lengths = torch.from_numpy(r.rng.integers(1, r.pick([2, 4, 8]), n))  # (B,)
    captions = torch.from_numpy(r.rng.integers(WORDS, size=(n, int(lengths.max()))))  # (B, W)
    batch |= {"captions": captions, "lengths": lengths}
    if r.chance(0.25):
        mask = r.uniform(n, regions) < 0.6  # (B, R)
        mask[:, -1] = True
        if options.get("need_box_whole"):
            mask[:, 0] = True
        images = batch["images"].masked_fill(~mask[..., None], 0)  # (B, R, F)
        batch |= {"region_mask": mask, "images": images}
        batch["widest"] = mask.sum(1).max().expand(n)  # (B,)
    dependencies = None
    if system == "gsmn":
        batch["boxes"] = r.uniform(n, regions, 2, 2).sort(2).values.flatten(2)  # (B, R, 4)
        if options["is_sparse"]:
            dependencies, batch["adjacency"] = draw_graphs(r, lengths)
    if "split_size" in options:
        some = regions - bool(options.get("need_box_whole"))
        batch |= draw_blocks(r, n, some, options["split_size"])
    if system == "pfan_whole":
        batch["whole"] = r.normal(n, options["img_dim"])  # (B, F)
    if regions > 2 and r.chance(0.25):
        draw_filling(r, batch, 1 + bool(options.get("need_box_whole")))
    return Case(system, options, training, net, batch, dependencies)


def draw_options(r: Draws, system: str, regions: int) -> dict:
    """Random arguments for the model of a system."""
    # In one dimension a cosine is 1 or -1 and all gradients are rounding errors: only GSMN has such
    # blocks. Features of one number make images alike, and their scores are tied.
    img_dim, depth = r.pick([2, 3, 8, 20]), r.pick([2, 3, 4, 8, 16, 32, 64])
    options = {"img_dim": img_dim, "word_dim": r.pick([1, 4, 7]), "embed_size": depth}
    options |= {"num_layers": r.pick([1, 1, 1, 2]), "no_imgnorm": r.chance(0.4)}
    options |= {"no_txtnorm": r.chance(0.4)}
    if system == "chan":
        options |= {"precomp_enc_type": r.pick(FEEDFORWARD), "mask_dropped": r.chance(0.5)}
        if options["precomp_enc_type"] != "basic":  # 8 heads
            options["embed_size"] = r.pick([8, 16, 32, 64])
        options |= {"coding_type": r.pick(CODING), "pooling_type": r.pick(POOLING)}
        options |= {"alpha": r.between(0.03, 3), "belta": r.between(0.03, 3)}
        return options | {"drop_in_place": r.chance(0.3)}
    if system == "vse":
        return options | {"pool": r.pick(POOLS)}
    options |= {"bi_gru": r.chance(0.7), "precomp_enc_type": r.pick(["basic", "weight_norm"])}
    options["lambda_softmax"] = r.pick([r.between(0.01, 1), r.between(1, 30), r.between(1, 100)])
    if system == "gsmn":
        blocks = r.pick([1, 2, 4, 8])
        options |= {"num_block": blocks, "feat_dim": blocks}
        options |= {"embed_size": blocks * r.pick([1, 1, 2, 3, 4, 8, 16])}
        options |= {"hid_dim": r.pick([8, 16]), "out_dim": r.pick([1, 2])}
        options |= {"is_sparse": r.chance(0.6), "neighbours": r.chance(0.4)}
        if r.chance(0.8):
            options["lambda_softmax"] = r.between(3, 100)
        return options
    options |= {"cross_attn": r.pick(["t2i", "i2t"])}
    options |= {"raw_feature_norm": r.pick(RAW_FEATURE_NORM)}
    options |= {"agg_func": r.pick(AGG_FUNC), "lambda_lse": r.between(0.5, 30)}
    if system.startswith("pfan"):
        options |= {"split_size": r.pick([2, 4]), "position_embed_size": r.pick([1, 5])}
    if system == "pfan":
        options["position"] = r.pick(["attention", "only"])
    if system == "pfan_whole":
        options |= {"lambda_whole": r.pick([0.0, 1.0, 2.0])}
        options |= {"need_box_whole": regions > 1 and r.chance(0.4)}
    return options


def draw_model(r: Draws, system: str, options: dict) -> nn.Module:
    """A model whose weights have several magnitudes."""
    net = SYSTEMS[system](WORDS, **options)
    with torch.no_grad():
        spread = r.between(1, 10) if r.chance(0.7) else 1.0
        for p in net.parameters():
            p *= r.between(1 / spread, spread)
        if r.chance(0.3):
            nn.init.normal_(net.img_enc.fc.bias, std=r.between(0.01, 1))
        net.txt_enc.embed.weight *= r.pick([1.0, 10.0, 100.0])
        # A large bias of the new gate makes states that grow in one direction from word to word.
        factor = r.pick([1.0, 1.0, 30.0])
        for name, p in net.txt_enc.rnn.named_parameters():
            if name.startswith("bias_ih"):
                p[-options["embed_size"] :] *= factor
    return net


def draw_images(r: Draws, n: int, regions: int, img_dim: int) -> Tensor:
    """Features (B, R, F), large or small; some regions are opposite, alike or missing."""
    images = r.normal(n, regions, img_dim)  # (B, R, F)
    kind = r.pick(["noise", "noise", "positive", "opposite", "opposite", "alike"])
    if kind == "positive":
        images = images.abs()
    elif kind == "opposite" and regions > 1:
        images[:, 1::2] = r.between(1e-4, 1) * images[:, 1::2] - images[:, 0:-1:2]
    elif kind == "alike":
        images = images[:, :1] + r.between(1e-3, 0.3) * images
    images *= r.pick([1.0, r.between(1e-4, 1), r.between(1, 100)])
    if r.chance(0.15):
        images[r.rng.integers(n), r.rng.integers(regions)] = 0
    return images


def draw_filling(r: Draws, batch: dict[str, Tensor], least: int) -> None:
    """Give images different numbers of regions, at least `least`; zeros fill them up."""
    n, regions = batch["images"].shape[:2]
    counts = torch.from_numpy(r.rng.integers(least, regions + 1, n))  # (B,)
    filling = torch.arange(regions) >= counts[:, None]  # (B, R)
    mask = batch.get("region_mask", torch.ones_like(filling)) & ~filling  # (B, R)
    mask[torch.arange(n), counts - 1] = True  # --drop leaves one, and a whole image at the end
    if least > 1:
        mask[:, 0] = True
    batch |= {"filling": filling, "region_mask": mask}
    for name in ("images", "boxes"):
        if name in batch:
            batch[name] = batch[name].masked_fill(filling[..., None], 0)  # (B, R, ...)


def draw_graphs(r: Draws, lengths: Tensor) -> tuple[list, Tensor]:
    """Dependencies of captions of these lengths (B,), and their adjacency (B, W, W)."""
    longest, many = int(lengths.max()), r.pick([0, 1, 2])
    dependencies, adjacencies = [], torch.zeros(len(lengths), longest, longest)  # (B, W, W)
    for a, w in zip(adjacencies, lengths.tolist(), strict=True):
        # The first pair is that of the root and does not count.
        pairs = torch.from_numpy(r.rng.integers(w, size=(1 + w * many // 2, 2)))
        dependencies.append(pairs.tolist())
        a[:w, :w] = adjacency(w, pairs[1:])
    return dependencies, adjacencies


def draw_blocks(r: Draws, n: int, regions: int, split_size: int) -> dict[str, Tensor]:
    """Blocks of regions and their overlap, some of them none; see PositionDataset."""
    k = r.pick([1, 3])
    order = torch.from_numpy(r.rng.random((n, regions, split_size**2)).argsort(2)[..., :k])
    overlap = r.uniform(n, regions, k)  # (B, R, K)
    empty = r.uniform(n, regions, k) < 0.2  # (B, R, K)
    blocks = order.masked_fill(empty, split_size**2)  # (B, R, K)
    return {"blocks": blocks, "overlap": overlap.masked_fill(empty, 0)}


def results(net: nn.Module, scores: Tensor, loss: Tensor) -> dict[str, Tensor]:
    """Scores, loss, and the gradients of all weights that learn, in float64."""
    net.zero_grad()
    loss.backward(retain_graph=True)
    found = {"scores": scores, "loss": loss} | gradients(net)
    return {name: x.detach().double() for name, x in found.items()}


def gradients(net: nn.Module) -> dict[str, Tensor]:
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named.items()
    }


def scales(
    net: nn.Module, scores: Tensor, loss: Tensor, found: dict[str, Tensor]
) -> dict[str, float]:
    """The number that the distance of each result is divided by.

    For scores and loss it is their largest number, at least 1. For a gradient it is the largest
    number, or what that would be if the parts of the pairs did not cancel, at least a tenth of the
    largest gradient of all weights.
    """
    (weights,) = torch.autograd.grad(loss, scores, retain_graph=True)  # (B, B)
    scale = {name: x.abs().max().item() for name, x in found.items()}
    g = torch.Generator().manual_seed(0)
    for signs in (torch.ones(weights.shape), torch.randn(weights.shape, generator=g).sign()):
        net.zero_grad()
        (weights.abs() * signs * scores).sum().backward(retain_graph=True)
        for name, x in gradients(net).items():
            scale[name] = max(scale[name], x.abs().max().item())
    largest = max(scale[name] for name in gradients(net))
    least = dict.fromkeys(scale, max(0.1 * largest, 1e-30)) | {"scores": 1.0, "loss": 1.0}
    return {name: max(x, least[name]) for name, x in scale.items()}


def image_index(case: Case) -> Tensor | None:
    """Which image each pair shows: two pairs per image, or None where the loss ignores it."""
    if not case.training["no_false_negatives"]:
        return None
    return torch.arange(len(case.batch["images"])) // 2  # (B,)


def run_fast(case: Case) -> dict[str, Tensor]:
    """The results of the step as the project computes it."""
    net, training = case.model, case.training
    net.grad_checkpointing = training["grad_checkpointing"]
    criterion = ContrastiveLoss(training["margin"], training["max_violation"])
    if training["infonce"]:
        criterion = InfoNCELoss(training["infonce"], training["margin"])
    with ExitStack() as stack:
        for module in (attention, pairs):
            size = mock.patch.object(module, "block_size", lambda device: training["block_size"])
            stack.enter_context(size)
        scores = net.similarity(*net(case.batch))
        return results(net, scores, criterion(scores, image_index(case)))


def run_plain(case: Case, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    """The step with plain loops: model, scores (B, B), loss."""
    net = copy.deepcopy(case.model).to(dtype)
    batch = {name: x.to(dtype) if x.is_floating_point() else x for name, x in case.batch.items()}
    if case.system == "vse":
        scores = reference_vse.vse_scores(net, batch)
    else:
        scores = reference_systems.system_scores(net, batch, case.dependencies)
    training, index = case.training, image_index(case)
    if training["infonce"]:
        loss = reference.info_nce(scores, training["infonce"], training["margin"], index)
    else:
        loss = reference.hinge(scores, training["margin"], training["max_violation"], index)
    return net, scores, loss


def distances(case: Case) -> tuple[dict[str, float], dict[str, float]]:
    """How far each result is from the truth: of the project, and of plain loops in float32."""
    truth = run_plain(case, torch.float64)
    want = results(*truth)
    odd = [name for name, x in want.items() if not x.isfinite().all()]
    if odd:
        raise AssertionError(f"plain loops in float64 give no finite {', '.join(odd)}")
    scale = scales(*truth, want)

    def apart(got: dict[str, Tensor]) -> dict[str, float]:
        return {
            name: ((got[name] - x).abs().max() / scale[name]).item() for name, x in want.items()
        }

    return apart(run_fast(case)), apart(results(*run_plain(case, torch.float32)))


def neighbour(case: Case, seed: int) -> Case:
    """The same case with weights that are off by a thousandth."""
    net = copy.deepcopy(case.model)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p *= 1 + 1e-3 * torch.randn(p.shape, generator=g)
    return dataclasses.replace(case, model=net)


def compare(cases: list[Case]) -> list[Finding]:
    """The results whose largest distance in these cases is too far from the truth."""
    got, plain = zip(*map(distances, cases), strict=True)
    found = []
    for name in got[0]:
        distance, of_loops = (max(x[name] for x in runs) for runs in (got, plain))
        # max() and <= may overlook a NaN; the sum is NaN if one of the distances is.
        distance += 0 * sum(x[name] for x in got)
        bound = max(TIMES * of_loops, LEAST)
        if not distance <= bound and math.isfinite(of_loops):
            found.append(Finding(name, distance, of_loops, bound))
    return found


def check(case: Case) -> list[Finding]:
    """The findings of a case; as a rule there are none.

    A real fault shows with weights of nearly the same values, too. These do not: a run of plain
    loops that was exact by luck, and a choice that is almost a tie (of a hardest negative, a
    largest dot, a hinge) and was decided by rounding.
    """
    if not compare([case]):
        return []
    return compare([neighbour(case, seed) for seed in range(8)])
