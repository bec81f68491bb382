"""Networks that turn pictures into region features: their table, and how one is opened.

    extractor = open_extractor({"backend": "efficientnet_lite", "grid": 6}, "cpu")
    regions = extractor.extract([open_picture("dog.jpg")])[0]

Each file here opens one kind of network, and imports its library only then. grid.py cuts a feature
map into windows. Shapes: R regions, F numbers per region, H x V pixels.
"""

import importlib
import os

from util.arguments import did_you_mean, nearest
from util.cli import InputError
from util.devices import pick_device
from util.json_file import shown_value
from util.region_backends.extractor import Extractor, Regions

BACKENDS = {
    "efficientnet_lite": "util.region_backends.efficientnet_lite",
    "transformers": "util.region_backends.hf_transformers",
    "timm": "util.region_backends.timm_models",
    "torchvision": "util.region_backends.torchvision_detectors",
}
DEFAULT = "efficientnet_lite"
GRID, MOST_REGIONS = 6, 36
MOST = 10_000  # windows of a side, or regions

__all__ = ["BACKENDS", "DEFAULT", "Extractor", "Regions", "open_extractor"]


def open_extractor(settings: dict, device="auto", download: bool = False) -> Extractor:
    """The extractor that `settings` describe, as `{split}_extractor.json` holds them.

    `backend` is a name of BACKENDS; `weights` a file, a folder or a name (None: those that come
    with the backend); `grid` the windows of a side; `regions` the most boxes of a picture; `half`
    computes in float16 on a GPU; `given_boxes` says that the boxes come from elsewhere. If
    `weights_sha256` is there, the weights must be those. Only with `download` may a name of weights
    be fetched from the network: set it only if the user has typed the name.

    Raises InputError with one line if a library, the weights or a sensible setting is missing.
    """
    name = settings.get("backend", DEFAULT)
    if name not in BACKENDS:
        near = did_you_mean(nearest(name, BACKENDS)) if len(name) < 40 else ""
        raise InputError(
            f"unknown backend {shown_value(name)}: expected one of {', '.join(BACKENDS)}{near}"
        )
    for key in ("grid", "regions"):
        count = settings.get(key)
        if count is not None and (type(count) is not int or not 1 <= count <= MOST):
            raise InputError(
                f"{key} {shown_value(count)}: expected a whole number, at least 1 and at most "
                f"{MOST:,}"
            )
    device = pick_device(device)
    if settings.get("half") and device.type != "cuda":
        raise InputError(f"--half is for a GPU; the device is {device}")
    weights = settings.get("weights")
    if weights is not None:
        weights = os.path.expanduser(weights)
    module = importlib.import_module(BACKENDS[name])
    found = module.open_backend(settings | {"weights": weights}, device, download)
    known, here = settings.get("weights_sha256"), found.settings["weights_sha256"]
    if known not in (None, here):
        raise InputError(
            f"{found.settings['weights'] or name}: other weights than those that the features were "
            f"extracted with (SHA-256 {here[:8]}, expected {known[:8]})"
        )
    return found
