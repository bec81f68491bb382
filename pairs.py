"""The scores of all image-caption pairs, in blocks, and the gradient through the pairs that count.

SCAN and its successors differ in the score of one pair; they share everything in this file.
Shapes: I images, C captions, R regions, W words, D joint dimension; in a part of the work i images,
n captions of one length W, or p pairs.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

Encoding = dict[str, Tensor]  # tensors by name, with a row for each image or each caption


class PairScore(Protocol):
    """The score of a pair, as a model defines it: one formula in two layouts.

    `images` holds 'regions' (i, R, D) first, and what else the score reads of images, a row each;
    `captions` holds 'words' (n, W, D) first, and the rest likewise. The captions have one length,
    so there is no padding among the words. `weights` are parameters of the score itself, if any.
    """

    dots_size = 1  # how many numbers the score keeps at once for each dot of a word and a region
    captions_per_block = 64

    def block(self, images: Encoding, captions: Encoding, *weights: Tensor) -> Tensor:
        """Scores (n, i) of every caption with every image."""

    def pairs(self, images: Encoding, captions: Encoding, *weights: Tensor) -> Tensor:
        """Scores (p,) of each caption with the image of the same row."""

    @torch.no_grad()
    def score_all(
        self, images: Encoding, captions: Encoding, cap_lens: Tensor, *weights: Tensor
    ) -> Tensor:
        """Scores (I, C) of all pairs, block by block, without a graph."""
        regions = images["regions"]
        scores = regions.new_empty(len(regions), len(cap_lens))  # (I, C)
        parts = blocks(cap_lens, regions, self.dots_size, self.captions_per_block)
        for length, caption, image in parts:
            block_images = {name: x[image] for name, x in images.items()}
            block_captions = {name: x[caption, :length] for name, x in captions.items()}
            scores[image, caption] = self.block(block_images, block_captions, *weights).mT
        return scores


def block_dots(regions: Tensor, words: Tensor) -> Tensor:
    """Dots (n, W, i, R) of words (n, W, D) with regions (i, R, D), by one matrix product."""
    s = words.flatten(0, 1) @ regions.flatten(0, 1).mT  # (n W, i R)
    return s.view(*words.shape[:2], len(regions), -1)  # (n, W, i, R)


def pair_dots(regions: Tensor, words: Tensor) -> Tensor:
    """Dots (p, W, R) of words (p, W, D) with the regions (p, R, D) of the same row."""
    return words @ regions.mT  # (p, W, R)


def block_size(device: torch.device) -> int:
    """Numbers in one block of work: few enough for a CPU's cache, enough to fill a GPU.

    Blocks bound the memory. Their size matters little for the time: from 2^20 to 2^25 numbers it
    stays within a tenth on two AMD cores. The size of the device decides, not its free memory:
    rounding must not differ between runs.
    """
    if device.type == "cuda":
        return min(2**27, torch.cuda.get_device_properties(device).total_memory // 128)
    return 2**22


def length_groups(lengths: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(length, positions of the captions of that length), shortest first."""
    for length in lengths.unique().tolist():
        yield length, (lengths == length).nonzero().squeeze(1)


def blocks(
    cap_lens: Tensor, regions: Tensor, dots_size: int, captions_per_block: int
) -> Iterator[tuple[int, Tensor, slice]]:
    """(length, captions of that length, images) of all pairs, in parts that fit the cache.

    A part has at most `captions_per_block` captions, and about block_size / dots_size dots.
    """
    size = block_size(regions.device) // (dots_size * regions.size(1))
    for length, where in length_groups(cap_lens):
        for captions in where.to(regions.device).split(captions_per_block):
            step = max(1, size // (len(captions) * length))
            for start in range(0, len(regions), step):
                yield length, captions, slice(start, start + step)


def add_rows(total: Tensor, rows: Tensor, x: Tensor) -> None:
    """total[rows] += x; rows may repeat. In a fixed order, unlike index_add_ on CUDA."""
    if total.is_cuda:
        total.index_put_((rows,), x, accumulate=True)
    else:
        # A gradient of a transposed product has its columns first; adding it so is slow.
        total.index_add_(0, rows, x.contiguous())


class SparseScore(torch.autograd.Function):
    """A score whose backward pass visits only the pairs that carry a gradient.

    The forward pass keeps no graph. With hardest negatives at most 3 B of the B^2 scores have a
    gradient: only these pairs are scored again, with a graph, a few at a time. If more than a
    quarter of the pairs have one (the summed hinge early in training), all are scored again, block
    by block. The gradient is that of the plain score. With the full graph, scores and
    their gradients take 2.5 times as long (batch 128, D = 1024, two cores).

    SparseScore.apply(score, cap_lens, image_names, caption_names, *tensors) gives (I, C). The
    tensors are the images' and the captions', in the order of their names, then the weights.
    """

    @staticmethod
    def forward(ctx, score, cap_lens, image_names, caption_names, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.score, ctx.cap_lens = score, cap_lens
        ctx.image_names, ctx.caption_names = image_names, caption_names
        n, m = len(image_names), len(image_names) + len(caption_names)
        images = dict(zip(image_names, tensors[:n], strict=True))
        captions = dict(zip(caption_names, tensors[n:m], strict=True))
        return score.score_all(images, captions, cap_lens, *tensors[m:])

    @staticmethod
    def backward(ctx, grad):
        score, tensors, needed = ctx.score, ctx.saved_tensors, ctx.needs_input_grad[4:]
        n, m = len(ctx.image_names), len(ctx.image_names) + len(ctx.caption_names)
        totals = [
            torch.zeros_like(x) if need else None for x, need in zip(tensors, needed, strict=True)
        ]

        def accumulate(image, caption, length: int, scores_grad: Tensor, layout) -> None:
            """Add the gradients through the scores of some captions and images (or a slice)."""
            inputs = [x[image] for x in tensors[:n]]
            inputs += [x[caption, :length] for x in tensors[n:m]]
            inputs += tensors[m:]
            inputs = [
                x.detach().requires_grad_(need) for x, need in zip(inputs, needed, strict=True)
            ]
            images = dict(zip(ctx.image_names, inputs[:n], strict=True))
            captions = dict(zip(ctx.caption_names, inputs[n:m], strict=True))
            with torch.enable_grad():
                scores = layout(images, captions, *inputs[m:])
            wanted = [k for k, need in enumerate(needed) if need]
            grads = torch.autograd.grad(
                scores, [inputs[k] for k in wanted], scores_grad, allow_unused=True
            )
            for k, g in zip(wanted, grads, strict=True):
                if g is None:
                    continue
                if k >= m:
                    totals[k] += g
                elif k >= n:
                    add_rows(totals[k][:, :length], caption, g)
                elif isinstance(image, slice):
                    totals[k][image] += g
                else:
                    add_rows(totals[k], image, g)

        regions, pairs = tensors[0], grad.nonzero()  # (I, R, D), (P, 2)
        if 4 * len(pairs) < grad.numel():
            # The gathered rows of some pairs, and their dots, should stay in the cache.
            size = block_size(grad.device) // 2
            for length, where in length_groups(ctx.cap_lens[pairs[:, 1].cpu()]):
                one = max(regions[0].numel(), score.dots_size * length * regions.size(1))
                for part in where.split(max(1, size // one)):
                    image, caption = pairs[part.to(grad.device)].unbind(1)  # (p,)
                    accumulate(image, caption, length, grad[image, caption], score.pairs)
        else:
            for length, caption, image in blocks(ctx.cap_lens, regions, 2 * score.dots_size, 16):
                accumulate(image, caption, length, grad[image, caption].mT, score.block)
        return None, None, None, None, *totals


def pair_scores(
    score: PairScore,
    images: Encoding,
    captions: Encoding,
    cap_lens: Tensor,
    weights: tuple[Tensor, ...] = (),
) -> Tensor:
    """Scores (I, C) of all pairs; SparseScore is their backward pass.

    images: 'regions' (I, R, D) first, and what else the score reads of images, I rows each.
    captions: 'words' (C, W, D) first, of which the first cap_lens (C,) count, and what else it
    reads of captions, (C, W, ...). weights: the score's own parameters.
    """
    tensors = *images.values(), *captions.values(), *weights
    cap_lens = torch.as_tensor(cap_lens).cpu()
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return SparseScore.apply(score, cap_lens, tuple(images), tuple(captions), *tensors)
    return score.score_all(images, captions, cap_lens, *weights)
