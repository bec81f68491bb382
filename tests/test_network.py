"""A file does not choose what is asked of the network: only names that the user typed are."""

import argparse
import json
import os
import socket
from types import SimpleNamespace

import pytest
import torch

import bert
import checkpoint as ckpt
import options
import train
from tests.conftest import train_args
from util.cli import InputError
from util.region_backends import open_extractor, timm_models


@pytest.fixture
def asked(monkeypatch):
    """The addresses that are looked up or connected to; every attempt fails."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    from huggingface_hub import constants

    found = []

    def refuse(*address, **_):
        found.append(address)
        raise OSError("no network in a test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # else the library itself would refuse
    cached_file = transformers.utils.cached_file

    def look_up(name, *rest, **more):
        if not os.path.isdir(name):
            found.append(name)
            raise OSError("no network in a test")  # the library would try for a minute
        return cached_file(name, *rest, **more)

    monkeypatch.setattr(transformers.utils, "cached_file", look_up)
    return found


@pytest.fixture
def stranger(tiny, little):
    """A checkpoint without the tokens and the configuration of its BERT, as published."""
    from tests.small_bert import flags

    opt = options.parse(flags("chan"))
    opt.bert_config, opt.img_dim = bert.read_config("bert"), 12
    torch.manual_seed(0)
    states = ckpt.state_dicts(ckpt.build_model(opt, opt.bert_config["vocab_size"]), opt)
    kept = {name: getattr(opt, name) for name in ("data_path", "data_name", "embed_size")}

    def write(named: str) -> str:
        stored = argparse.Namespace(**kept, bert_path=named, precomp_enc_type="basic")
        torch.save({"epoch": 0, "model": states, "opt": stored}, "strange.pth")
        return "strange.pth"

    return write


@pytest.mark.parametrize(
    "name", ["evil/model", "bert-base-uncased", "https://evil.org/x", "n" * 900]
)
def test_a_checkpoint_does_not_choose_a_request(stranger, asked, name):
    path = stranger(name)
    said = "strange.pth: it does not hold its BERT's tokens .* give --vocab_path"
    with pytest.raises(InputError, match=said) as error:
        ckpt.load_model(path)
    assert len(str(error.value)) < 500
    with pytest.raises(InputError, match=r"give --vocab_path \(to train: --bert_path\)"):
        train.main(train_args(model="chan", text_enc_type="bert", resume=path))
    assert not asked


def test_a_name_that_is_typed_is_asked_for(stranger, asked):
    path = stranger("evil/model")
    for run in (
        lambda: ckpt.load_model(path, "good/model"),
        lambda: train.main(
            train_args(model="chan", text_enc_type="bert", bert_path="good/model", resume=path)
        ),
    ):
        with pytest.raises(InputError, match="BERT good/model, which is not a folder"):
            run()
        assert asked and asked[0] == "good/model" and not any("evil" in str(x) for x in asked)
        asked.clear()


def test_a_folder_that_a_checkpoint_names_is_read(stranger, asked, capsys):
    ckpt.load_model(stranger("bert"))
    assert "is read from bert, as its options say" in capsys.readouterr().out
    assert not asked


def test_the_folder_of_a_bert_does_not_choose_a_request(tiny, little, asked):
    folder = little[0]
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/model"}')
    (folder / "tokenizer_config.json").write_text('{"name_or_path": "evil/model"}')
    config = json.loads((folder / "config.json").read_text())
    names = ("_name_or_path", "_attn_implementation", "attn_implementation")
    more = dict.fromkeys(names, "evil/model") | {"auto_map": {"AutoModel": "evil/model--m.M"}}
    (folder / "config.json").write_text(json.dumps(config | more))
    for read in (bert.read_config, bert.WordPieces.read, bert.pretrained):
        read(str(folder))
    assert not asked


def test_settings_of_timm_do_not_choose_a_request(tmp_path):
    """timm would fetch hf-hub:NAME, and read a local-dir: in its own way."""
    made = []
    timm = SimpleNamespace(is_model=lambda name: name == "resnet18")
    timm.create_model = lambda name, **_: made.append(name) or torch.nn.Linear(1, 1)
    timm.data = SimpleNamespace(resolve_data_config=lambda **_: {})
    torch.save(torch.nn.Linear(1, 1).state_dict(), tmp_path / "pytorch_model.bin")
    for name in ("hf-hub:evil/model", "hf_hub:evil/model", "local-dir:/x", "evil", ["resnet18"], 7):
        (tmp_path / "config.json").write_text(json.dumps({"architecture": name}))
        with pytest.raises(InputError, match="config.json: architecture .* is none of timm"):
            timm_models.load(timm, str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18"}))
    timm_models.load(timm, str(tmp_path))
    assert made == ["resnet18"]


def test_a_folder_of_weights_does_not_choose_a_request(tmp_path, asked):
    """The settings of extracted features may name such a folder."""
    config = {"model_type": "timm_wrapper", "architecture": "hf-hub:evil/model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save({"x": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="no network could be read"):
        open_extractor({"backend": "transformers", "weights": str(tmp_path)}, "cpu")
    assert not asked


@pytest.mark.parametrize("backend", ["transformers", "timm"])
def test_extracted_features_do_not_choose_a_request(tmp_path, asked, backend):
    if backend == "timm":
        pytest.importorskip("timm", reason="pip install timm")
    with pytest.raises(InputError, match="it is not on this machine; extract with it once"):
        open_extractor({"backend": backend, "weights": "evil/model"}, "cpu")
    assert not asked
