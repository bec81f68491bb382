"""A small random BERT in a local folder, for the tests."""

import pytest
import torch

from tests.conftest import WORDS, train_args

transformers = pytest.importorskip("transformers")
SPECIAL = "[PAD] [UNK] [CLS] [SEP] [MASK]".split()
# Some words are whole, others must be put together from pieces.
PIECES = [*SPECIAL, "a", ".", ",", "'", "un", "##able", "##s", "##ing", "run", "##n", "cafe"]
PIECES += [*WORDS[:8], *"[]", "mask"]
PIECES += ["b", "##ird", "c", "##ar", "s", "##it", "f", "##lies", "st", "##and", "man"]
SIZES = dict(
    vocab_size=len(PIECES),
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=32,
)


def write_bert(folder, **more):
    """Write a random BERT as the library saves it, with its vocab.txt, and return the model."""
    torch.manual_seed(3)
    model = transformers.BertModel(transformers.BertConfig(**SIZES | more))
    for p in model.parameters():
        torch.nn.init.normal_(p, 0, 0.3)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in PIECES))
    return model.eval()


def flags(system="scan", **more):
    """The command line of a tiny run with this BERT."""
    given = {"model": system, "text_enc_type": "bert", "bert_path": "bert", "learning_rate": 0.001}
    given |= {"num_block": 4, "feat_dim": 4} if system == "gsmn" else {}
    return train_args(**given | more)
