"""Scores of all pairs of images and captions: in blocks, and back through the pairs that count.

SCAN and its successors differ in what one pair's score is; what they share is here. Letters: I
images, C captions, R regions, W words, D joint dimension, P pairs; of these a part: i images, n
captions, p pairs.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def block_size(device: torch.device) -> int:
    """Numbers in one block of work: few enough for a CPU's cache, enough to fill a GPU.

    From the device's size, not from what is free: rounding must not differ from run to run.
    """
    if device.type == "cuda":
        return min(2**27, torch.cuda.get_device_properties(device).total_memory // 128)
    return 2**22


def length_groups(lengths: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(length, positions of the captions of that length), shortest first."""
    for length in lengths.unique().tolist():
        yield length, (lengths == length).nonzero().squeeze(1)


def blocks(
    cap_lens: Tensor, images: Tensor, per_dot: int, captions_of: int
) -> Iterator[tuple[int, Tensor, slice]]:
    """(length, captions of it, images) of all pairs: dense parts that fit the cache.

    `images` (I, R, ...) gives number, regions and device; a part has at most `captions_of`
    captions, and about block_size / per_dot dots of a word with a region.
    """
    size = block_size(images.device) // (per_dot * images.size(1))
    for length, where in length_groups(cap_lens):
        for captions in where.to(images.device).split(captions_of):
            step = max(1, size // (len(captions) * length))
            for start in range(0, len(images), step):
                yield length, captions, slice(start, start + step)


def add_rows(total: Tensor, rows: Tensor, x: Tensor) -> None:
    """total[rows] += x, rows may repeat; in a fixed order, which index_add_ on CUDA has not."""
    if total.is_cuda:
        total.index_put_((rows,), x, accumulate=True)
    else:
        # Of a product with a transposed tensor, x comes with its columns first: slow to add so.
        total.index_add_(0, rows, x.contiguous())


class SparseScore(torch.autograd.Function):
    """A score whose backward visits only the pairs that carry a gradient, a few at a time.

    The forward keeps no graph. With hardest negatives at most 3 B of the B^2 scores have a
    gradient: those pairs are scored again with a graph, and it runs through them only. Where more
    than a quarter of the pairs have one (the summed hinge early in training), all are scored again,
    block by block. The gradient is that of the plain score, in a fraction of time and memory.

    SparseScore.apply(every, some, per_dot, cap_lens, n_images, n_captions, *tensors) gives (I, C).
    See pair_scores, which calls it.
    """

    @staticmethod
    def forward(ctx, every, some, per_dot, cap_lens, n_images, n_captions, *tensors):
        ctx.save_for_backward(*tensors)
        first, last = ctx.counts = n_images, n_images + n_captions
        ctx.some, ctx.per_dot, ctx.cap_lens = some, per_dot, cap_lens
        return every(tensors[:first], tensors[first:last], cap_lens, *tensors[last:])

    @staticmethod
    def backward(ctx, grad):
        first, last = ctx.counts
        tensors = ctx.saved_tensors
        wanted = [k for k, needed in enumerate(ctx.needs_input_grad[6:]) if needed]
        totals = [torch.zeros_like(x) if k in wanted else None for k, x in enumerate(tensors)]
        weights = [
            x.detach().requires_grad_(last + k in wanted) for k, x in enumerate(tensors[last:])
        ]

        def add(image, caption, length: int, part: Tensor, paired: bool) -> None:
            """Add the gradients through the scores of some captions and images (or a slice)."""
            inputs = [x[image] for x in tensors[:first]]
            inputs += [x[caption, :length] for x in tensors[first:last]]
            inputs = [x.detach().requires_grad_(k in wanted) for k, x in enumerate(inputs)]
            with torch.enable_grad():
                scores = ctx.some(tuple(inputs[:first]), tuple(inputs[first:]), paired, *weights)
            inputs += weights
            grads = torch.autograd.grad(
                scores, [inputs[k] for k in wanted], part, allow_unused=True
            )
            for k, g in zip(wanted, grads, strict=True):
                if g is None:
                    continue
                if k >= last:
                    totals[k] += g
                elif k >= first:
                    add_rows(totals[k][:, :length], caption, g)
                elif paired:
                    add_rows(totals[k], image, g)
                else:
                    totals[k][image] += g

        pairs = grad.nonzero()  # (P, 2)
        regions = tensors[0]
        if 4 * len(pairs) < grad.numel():
            # What the pairs gather, and their dots, should stay in the cache.
            size = block_size(grad.device) // 2
            for length, where in length_groups(ctx.cap_lens[pairs[:, 1].cpu()]):
                pair = max(regions[0].numel(), ctx.per_dot * length * regions.size(1))
                for one in where.split(max(1, size // pair)):
                    image, caption = pairs[one.to(grad.device)].unbind(1)  # (p,)
                    add(image, caption, length, grad[image, caption], True)
        else:
            for length, caption, image in blocks(ctx.cap_lens, regions, 2 * ctx.per_dot, 16):
                add(image, caption, length, grad[image, caption].mT, False)
        return None, None, None, None, None, None, *totals


def pair_scores(
    every: Callable[..., Tensor],
    some: Callable[..., Tensor],
    images: tuple[Tensor, ...],
    captions: tuple[Tensor, ...],
    cap_lens: Tensor,
    weights: tuple[Tensor, ...] = (),
    per_dot: int = 1,
) -> Tensor:
    """Scores (I, C) of all pairs, with the sparse backward where a gradient is wanted.

    What a score reads: of the images tensors (I, ...), the first (I, R, ...); of the captions
    tensors (C, W, ...), their lengths (C,) on the host; and weights of its own, if any.
    `every(images, captions, cap_lens, *weights)` gives all scores (I, C), no graph kept.
    `some(images, captions, paired, *weights)` gives those of captions (n, W, ...) of one length,
    with a graph if one is wanted: (n, i) of all pairs, or with `paired`, where images and captions
    are as many, (p,) of each image with the caption of its row. `per_dot` is how many numbers it
    keeps at once for each dot of a word and a region.
    """
    tensors = *images, *captions, *weights
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        counts = len(images), len(captions)
        return SparseScore.apply(every, some, per_dot, cap_lens, *counts, *tensors)
    return every(images, captions, cap_lens, *weights)
