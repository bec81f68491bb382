"""Vision backbones of `transformers`: DINOv2, SigLIP, CLIP, ViT, Swin, ConvNeXt and others.

The size, mean and deviation of the pixels are read from preprocessor_config.json; the pictures are
resized here, so that the library's image processors, which may need torchvision, are not needed.
Shapes: B pictures, T tokens, F numbers per token, h x v patches of a picture.
"""

import math
import os

import torch
from torch import Tensor

from util.cli import InputError
from util.hub import offline
from util.json_file import fault_of, read_json
from util.region_backends.grid import BICUBIC, GridExtractor, Net
from util.region_backends.weights import hub_folder, sha256

LARGEST = 10_000  # pixels of a side
UNUSED = ("pooler", "head", "classifier", "mask_token")  # weights that the features do not need


def open_backend(settings: dict, device: torch.device, download: bool) -> GridExtractor:
    """The extractor with the network of a folder, or of a name on the hub."""
    name = settings.get("weights")
    if not name:
        raise InputError(
            "the backend transformers needs --weights: a folder, or a name such as "
            "facebook/dinov2-base"
        )
    try:
        import transformers
    except ImportError:
        raise InputError(
            "the backend transformers needs its package: pip install transformers"
        ) from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = hub_folder(name, download, "transformers")
    module = load(transformers, folder, name)
    size, mean, std, resample = read_preprocessing(folder)
    net = Net(
        module,
        lambda x: to_map(module(pixel_values=x).last_hidden_state, module.config, x.shape[-2:]),
        size,
        mean,
        std,
        resample,
        folder if os.path.isdir(name) else name,
        sha256(folder),
    )
    return GridExtractor(settings, net, device)


def load(transformers, folder: str, name: str) -> torch.nn.Module:
    """The vision network in a folder; of one with two towers, that of the pictures."""
    safe = any(x.endswith(".safetensors") for x in os.listdir(folder))
    try:
        with offline():  # the settings may name parts, or kernels, that are elsewhere
            module, told = transformers.AutoModel.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=safe,
                weights_only=True,
                output_loading_info=True,
            )
    except Exception as error:  # the library raises errors of many types
        raise InputError(
            f"--weights {name}: no network could be read ({fault_of(error)})"
        ) from None
    missing = [x for x in told["missing_keys"] if not any(part in x for part in UNUSED)]
    if missing:
        raise InputError(
            f"--weights {name}: {len(missing)} weights are missing, such as {sorted(missing)[0]}"
        )
    module = getattr(module, "vision_model", module)
    if getattr(module, "main_input_name", "pixel_values") != "pixel_values":
        raise InputError(f"--weights {name}: {type(module).__name__} does not read pictures")
    return module


def read_preprocessing(
    folder: str,
) -> tuple[tuple[int, int], tuple[float, ...], tuple[float, ...], int]:
    """Height and width, mean and deviation (of 0 to 255), and Pillow's way to resize."""
    path = os.path.join(folder, "preprocessor_config.json")
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file; it holds size, mean and deviation of the pixels")
    config = read_json(path)
    try:
        size = config["size"]
        if config.get("do_center_crop", True) and config.get("crop_size"):
            size = config["crop_size"]
        if isinstance(size, dict):
            side = size.get("shortest_edge")
            height, width = size.get("height", side), size.get("width", side)
        else:
            height = width = size
        scale = 1 / config.get("rescale_factor", 1 / 255)
        mean, std = (
            tuple(scale * float(x) for x in config[key]) for key in ("image_mean", "image_std")
        )
        if not config.get("do_normalize", True):
            mean, std = (0.0,) * 3, (scale,) * 3
        found = (int(height), int(width)), mean, std, int(config.get("resample", BICUBIC))
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise InputError(
            f"{path}: expected size, image_mean and image_std ({fault_of(error)})"
        ) from None
    if not all(0 < side <= LARGEST for side in found[0]) or len(mean) != 3 or len(std) != 3:
        raise InputError(f"{path}: expected a size up to {LARGEST}, three means and deviations")
    if not all(map(math.isfinite, mean + std)) or not all(std):
        raise InputError(f"{path}: expected finite means, and deviations that are not 0")
    return found


def to_map(x: Tensor, config, size: tuple[int, int]) -> Tensor:
    """The feature maps (B, F, h, v) of a network's last states, (B, F, h, v) or tokens (B, T, F).

    Tokens that are no patches (class, registers) stand first, and are left out.
    """
    if x.dim() == 4:
        return x
    tokens = x.shape[1]
    patch = getattr(config, "patch_size", None)
    down, across = patch if isinstance(patch, tuple | list) else (patch, patch)
    if patch:
        height, width = size[0] // down, size[1] // across
    if not patch or height * width > tokens:  # Swin merges patches
        height = width = math.isqrt(tokens)
        if height * width != tokens:
            raise InputError(
                f"the network gives {tokens} tokens for {size[0]} x {size[1]} pixels, which is no "
                "square grid"
            )
    patches = x[:, tokens - height * width :]  # (B, h * v, F)
    return patches.transpose(1, 2).unflatten(2, (height, width))  # (B, F, h, v)
