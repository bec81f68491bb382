"""The folder of a BERT: wrong, damaged and hostile files are refused."""

import builtins
import json
import os
import pickle
import re

import pytest
import torch

import bert
import train
from bert import WordPieces
from tests.small_bert import PIECES, flags, write_bert
from util.cli import InputError


def test_wrong_folders_are_named(tiny, little, capsys):
    for path, message in (
        (
            "none",
            "BERT none, which is not a folder, and its files are not in the local cache: no "
            "config.json could",
        ),
        ("./none", "BERT ./none: no such folder"),
        ("vocab", "BERT vocab: no config.json could be read"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            train.main(flags(bert_path=path))
    os.rename("bert/model.safetensors", "model.safetensors")
    with pytest.raises(InputError, match="BERT bert: no weights could be read"):
        train.main(flags())
    os.rename("model.safetensors", "bert/model.safetensors")
    (tiny / "bert" / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(InputError, match="bert: not BERT's tokens: expected WordPiece"):
        train.main(flags())
    (tiny / "bert" / "vocab.txt").write_text("".join(f"{p}\n" for p in [*PIECES, "one", "two"]))
    said = f"{len(PIECES) + 2} WordPiece tokens, but BERT has {len(PIECES)} rows"
    with pytest.raises(InputError, match=said):
        train.main(flags())
    (tiny / "bert" / "vocab.txt").write_text("".join(f"{p}\n" for p in PIECES[:-1]))
    train.main(flags(num_epochs=1))
    said = f"warning: bert: {len(PIECES) - 1} WordPiece tokens, but BERT has {len(PIECES)} rows"
    assert said in capsys.readouterr().out
    config = json.loads((tiny / "bert" / "config.json").read_text())
    config["model_type"] = "roberta"
    (tiny / "bert" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="a roberta model, expected bert"):
        train.main(flags())


class Evil:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_pickled_weights_run_nothing(tiny, little):
    os.remove("bert/model.safetensors")
    with open("bert/pytorch_model.bin", "wb") as file:
        pickle.dump({"embeddings.word_embeddings.weight": Evil(), "other": bytes(10**4)}, file)
    with pytest.raises(InputError, match="no weights could be read"):
        train.main(flags())
    assert not os.path.exists("owned")


def test_code_beside_the_weights_is_not_run(tiny, little):
    config = json.loads((tiny / "bert" / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    config["attn_implementation"] = config["_attn_implementation"] = "evil-org/flash"
    (tiny / "bert" / "config.json").write_text(json.dumps(config))
    (tiny / "bert" / "evil.py").write_text("import os\nos.mkdir('owned')\n")
    train.main(flags(num_epochs=1))
    config["model_type"] = "new"  # the library would ask whether its code may run
    (tiny / "bert" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="BERT bert: a new model, expected bert"):
        train.main(flags())
    assert not os.path.exists("owned")


def damage(folder, kind):
    """Rewrite the weights of a BERT, or its configuration."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    state = load_file(path)
    if kind == "foreign":
        state = {f"other.{name}": x for name, x in state.items()}
    elif kind == "layer":
        state = {name: x for name, x in state.items() if "layer.1." not in name}
    elif kind == "size":
        name = "encoder.layer.0.intermediate.dense.bias"
        state[name] = state[name][:-1].clone()
    elif kind == "heads":  # as released: names begin with bert., and there are pretraining heads
        state = {f"bert.{name}": x for name, x in state.items() if "pooler" not in name}
        state["cls.predictions.bias"] = torch.zeros(len(PIECES))
        state["bert.embeddings.position_ids"] = torch.arange(32)[None]
    save_file(state, path, {"format": "pt"})
    if kind == "config":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("foreign", "are not those of its config.json: no embeddings.LayerNorm.bias"),
        ("layer", "no encoder.layer.1."),
        ("size", "weights"),
        ("config", "unknown encoder.layer.1."),
    ],
)
def test_weights_that_do_not_fit_are_refused(tiny, little, kind, message):
    damage(little[0], kind)
    with pytest.raises(InputError, match=message):
        train.main(flags())


def test_weights_as_released_are_read(tiny, little):
    want = little[1].state_dict()
    damage(little[0], "heads")
    got = bert.pretrained("bert")
    assert all(torch.equal(got[name], x) for name, x in want.items() if "pooler" not in name)


def test_without_the_library_the_error_says_how_to_get_it(tiny, monkeypatch):
    load = builtins.__import__

    def absent(name, *args, **more):
        if name == "transformers":
            raise ImportError(name)
        return load(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(InputError, match="pip install transformers"):
        train.main(flags())


@pytest.mark.parametrize("place", ["vocab", "added_tokens"])
@pytest.mark.parametrize("number", [2**31, 2**28, 10_000, -1, 2.5, "3", None])
def test_a_piece_with_a_number_far_from_the_others_is_refused(little, place, number):
    """The library makes a table as long as the largest one."""
    tokenizer = json.loads(bert.WordPieces.read(little[0]).state_dict()["tokenizer_json"])
    if place == "vocab":
        tokenizer["model"]["vocab"]["dog"] = number
    else:
        tokenizer["added_tokens"][-1]["id"] = number
    with pytest.raises(InputError, match="x: not BERT's tokens: expected ids of pieces from 0"):
        bert.WordPieces(json.dumps(tokenizer), "x")


def test_an_old_library_is_named(monkeypatch):
    """Its BERT takes other masks, and would end in a traceback."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(transformers, "__version__", "4.57.3")
    with pytest.raises(
        InputError, match="transformers 5 or newer, found 4.57.3: pip install --upg"
    ):
        bert.library()


def test_a_large_id_is_refused_before_the_library_reads_it(tmp_path):
    """It would make a table of 2^31 pieces, in half a minute or not at all."""
    library = pytest.importorskip("tokenizers")
    write_bert(tmp_path)
    text = WordPieces.read(tmp_path).state_dict()["tokenizer_json"]
    assert library.Tokenizer.from_str(text)
    changed = text.replace('"dog":21', '"dog":2147483648')
    assert changed != text
    (tmp_path / "tokenizer.json").write_text(changed)
    with pytest.raises(InputError, match="tokenizer.json: not BERT's tokens: .*expected ids"):
        WordPieces.read(tmp_path)
