"""Faster R-CNN of torchvision: boxes of objects, and the features of its box head in them.

Shapes: P proposals, R regions, F = 1024 numbers per region, C classes, H x V pixels.
"""

import functools
import os
from collections import OrderedDict

import torch
from torch import Tensor

from util.cli import InputError
from util.region_backends.extractor import Extractor, Prepared, Regions, numbers, resized
from util.region_backends.grid import BILINEAR, inside
from util.region_backends.weights import build_fitting, read_state, sha256

NAMES = (
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
)
CLASSES = "roi_heads.box_predictor.cls_score.weight"


def library():
    """torchvision's detectors."""
    try:
        import torchvision
        from torchvision.models import detection  # noqa: F401
    except (ImportError, RuntimeError):  # RuntimeError: a torchvision of another torch
        raise InputError(
            "the backend torchvision needs its package: pip install torchvision"
        ) from None
    return torchvision


def find_weights(torchvision, name: str, download: bool) -> str:
    """The file of weights: `name` itself, or where torch keeps those of a detector's name."""
    if os.path.isfile(name):
        return os.path.abspath(name)
    if name not in NAMES:
        raise InputError(
            f"--weights {name}: no such file, and no detector; expected one of {', '.join(NAMES)}"
        )
    url = torchvision.models.get_model_weights(name).DEFAULT.url
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    path = os.path.join(folder, os.path.basename(url))
    if os.path.isfile(path):
        return path
    if not download:
        raise InputError(f"--weights {name}: not on this machine ({path}); extract with it once")
    try:
        os.makedirs(folder, exist_ok=True)
        torch.hub.download_url_to_file(url, path, hash_prefix=path.rsplit("-", 1)[-1][:8])
    except (OSError, RuntimeError) as error:
        raise InputError(f"--weights {name}: {url} cannot be downloaded ({error})") from None
    return path


def open_backend(settings: dict, device: torch.device, download: bool) -> "Detector":
    """The extractor with the weights of a file, or of the name of a detector (of MS-COCO)."""
    torchvision = library()
    name = settings.get("weights")
    if not name:
        raise InputError(
            f"the backend torchvision needs --weights: a file, or one of {', '.join(NAMES)}"
        )
    path = find_weights(torchvision, name, download)
    state = read_state(path)
    if CLASSES not in state:
        raise InputError(f"{path}: no weights of a Faster R-CNN of torchvision (no {CLASSES})")
    more = {"weights": None, "weights_backbone": None, "num_classes": len(state[CLASSES])}
    detectors = torchvision.models.detection
    builders = {x: functools.partial(getattr(detectors, x), **more) for x in NAMES}
    if name in NAMES:
        builders = {name: builders[name]}  # two of them differ only in the size of the pictures
    model = build_fitting(path, state, builders)
    return Detector(settings, model, name if name in NAMES else path, sha256(path), device)


class Detector(Extractor):
    """The best boxes of a Faster R-CNN, by their score, with the features of its box head.

    One picture is read at a time, so that no picture's features depend on its neighbours.
    """

    def __init__(self, settings: dict, model, weights: str, digest: str, device: torch.device):
        super().__init__(settings, weights, digest, device)
        self.model = model.eval().requires_grad_(False).to(device)
        self.regions = self.settings["regions"] = settings.get("regions") or 36
        self.settings["grid"] = None
        if self.given:
            self.regions = None
        self.width = model.roi_heads.box_predictor.cls_score.in_features

    def prepare(self, picture) -> Prepared:
        transform = self.model.transform
        scale = min(
            transform.min_size[-1] / min(picture.size), transform.max_size / max(picture.size)
        )
        width, height = (max(1, round(scale * side)) for side in picture.size)
        return Prepared(resized(picture, width, height, BILINEAR), picture.size)

    def _run(self, batch: list[Prepared], boxes: list[Tensor] | None) -> list[Regions]:
        given = boxes or [None] * len(batch)
        return [self._one(*pair) for pair in zip(batch, given, strict=True)]

    def _one(self, prepared: Prepared, boxes: Tensor | None) -> Regions:
        """The regions of a picture, in these boxes (R, 4), or in those that it finds."""
        from torchvision.models.detection.image_list import ImageList

        pixels, size = prepared
        shape = tuple(pixels.shape[1:])
        scale = torch.tensor([shape[1] / size[0], shape[0] / size[1]] * 2, device=self.device)
        x = self.model.transform.normalize(pixels.to(self.device).float() / 255)  # (3, H, V)
        x = self.model.transform.batch_images([x])  # (1, 3, H', V'), a little larger
        maps = self.model.backbone(x)
        maps = maps if isinstance(maps, dict) else OrderedDict([("0", maps)])
        if boxes is None:
            proposals, _ = self.model.rpn(ImageList(x, [shape]), maps)
            cells = self._best(maps, proposals[0].float(), shape)  # (R, 4)
            places = inside(cells / scale, size)  # (R, 4)
        else:
            places = boxes
            cells = inside(boxes, size).to(self.device) * scale  # (R, 4)
        everything = cells.new_tensor([[0, 0, shape[1], shape[0]]])  # (1, 4)
        features = self._head(maps, torch.cat([cells, everything]), shape)  # (R + 1, F)
        return Regions(numbers(features[:-1]), numbers(places), size, numbers(features[-1]))

    def _head(self, maps: dict[str, Tensor], boxes: Tensor, shape: tuple[int, int]) -> Tensor:
        """The features (R, F) of the box head in boxes (R, 4)."""
        heads = self.model.roi_heads
        return heads.box_head(heads.box_roi_pool(maps, [boxes], [shape]))

    def _best(self, maps: dict[str, Tensor], proposals: Tensor, shape: tuple[int, int]) -> Tensor:
        """The boxes (R, 4), best first: of each proposal the box of its best class, after NMS.

        Scores have no lower bound, so that there are enough regions; without any proposal, the
        whole picture is one.
        """
        from torchvision.ops import boxes as ops

        whole = proposals.new_tensor([[0, 0, shape[1], shape[0]]])  # (1, 4)
        if not len(proposals):
            return whole
        heads = self.model.roi_heads
        logits, moves = heads.box_predictor(self._head(maps, proposals, shape))
        boxes = heads.box_coder.decode(moves.float(), [proposals])  # (P, C, 4)
        scores, label = logits.float().softmax(1)[:, 1:].max(1)  # (P,), without the background
        boxes = boxes[torch.arange(len(boxes)), label + 1]  # (P, 4)
        boxes = ops.clip_boxes_to_image(boxes, shape)  # (P, 4)
        kept = ops.remove_small_boxes(boxes, min_size=1.0)
        boxes, scores, label = boxes[kept], scores[kept], label[kept]
        best = ops.batched_nms(boxes, scores, label, heads.nms_thresh)[: self.settings["regions"]]
        return boxes[best] if len(best) else whole  # (R, 4)
