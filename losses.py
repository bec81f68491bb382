"""The ranking losses, by the name that --criterion gives; any of them goes with any system.

Shapes: B pairs of a batch. scores (B, B) are images by captions, matched pairs on the diagonal.

A criterion is an nn.Module with `forward(scores, image_index) -> loss`. It is built once per run;
the training loop sets its `epoch`, and trains and saves its parameters, if it has any.
"""

import torch
from torch import Tensor, nn


def same_image(scores: Tensor, image_index: Tensor | None) -> Tensor:
    """(B, B): pairs that are no negatives of each other.

    With image_index (B,), which image each pair shows, these are all captions of one image; without
    it, as published, only the matched pairs themselves.  # Q14
    """
    if image_index is None:
        image_index = torch.arange(len(scores), device=scores.device)  # (B,)
    return image_index[:, None] == image_index[None, :]  # (B, B)


class ContrastiveLoss(nn.Module):
    """Hinge ranking loss in both directions, summed over the batch (SCAN, section 3.2).

    With `max_violation` each image counts its hardest caption and each caption its hardest image
    only (VSE++); otherwise every negative counts, and so it does in the first `warmup_epochs`.
    """

    def __init__(self, margin: float = 0.2, max_violation: bool = False, warmup_epochs: int = 0):
        super().__init__()
        self.margin, self.max_violation = margin, max_violation
        self.warmup_epochs, self.epoch = warmup_epochs, warmup_epochs

    def forward(self, scores: Tensor, image_index: Tensor | None = None) -> Tensor:
        """scores (B, B) -> loss (). See same_image for image_index."""
        matched = scores.diagonal()  # (B,)
        same = same_image(scores, image_index)  # (B, B)
        caption_cost = (self.margin + scores - matched[:, None]).clamp(min=0)  # (B, B)
        image_cost = (self.margin + scores - matched[None, :]).clamp(min=0)  # (B, B)
        caption_cost = caption_cost.masked_fill(same, 0)  # (B, B)
        image_cost = image_cost.masked_fill(same, 0)  # (B, B)
        if self.max_violation and self.epoch >= self.warmup_epochs:
            caption_cost = caption_cost.max(1).values  # (B,)
            image_cost = image_cost.max(0).values  # (B,)
        return caption_cost.sum() + image_cost.sum()


class InfoNCELoss(nn.Module):
    """Cross-entropy of the matched pair among all, with a margin; published for CHAN.

    z_ij = (s_ij - s_ii + margin) / temperature off the diagonal, and 0 on it. The loss is the mean
    over the rows of log sum_j exp z_ij, plus the same over the columns with s_jj.  # Q23
    """

    def __init__(self, temperature: float = 0.01, margin: float = 0.0):
        super().__init__()
        self.temperature, self.margin = temperature, margin

    def forward(self, scores: Tensor, image_index: Tensor | None = None) -> Tensor:
        """scores (B, B) -> loss (). See same_image for image_index."""
        matched = scores.diagonal()  # (B,)
        diagonal = torch.eye(len(scores), dtype=torch.bool, device=scores.device)  # (B, B)
        same = same_image(scores, image_index)  # (B, B)
        total = scores.new_zeros(())
        for dim, own in ((1, matched[:, None]), (0, matched[None, :])):
            z = (scores - own + self.margin) / self.temperature  # (B, B)
            z = z.masked_fill(same, -torch.inf).masked_fill(diagonal, 0)  # (B, B)
            total = total + z.logsumexp(dim).mean()
        return total


CRITERIA = ("ContrastiveLoss", "InfoNCELoss")


def make_criterion(
    name: str, margin: float, max_violation: bool, warmup_epochs: int, temperature: float
) -> nn.Module:
    """The criterion of that name, from the options that it reads."""
    if name == "InfoNCELoss":
        return InfoNCELoss(temperature, margin)
    return ContrastiveLoss(margin, max_violation, warmup_epochs)
