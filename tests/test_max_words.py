"""--max_words cuts captions; without it, very long ones are said."""

import pytest

import checkpoint as ckpt
import evaluation
import options
import run_state
import systems
import train
from data import PrecompDataset
from tests.conftest import train_args
from util.cli import InputError
from vocab import deserialize_vocab


@pytest.fixture
def long(tiny):
    """Line 3 of dev has 1,501 words, line 5 exactly 1,000."""
    path = tiny / "data/tiny_precomp/dev_caps.txt"
    lines = path.read_text().splitlines()
    lines[2], lines[4] = "dog " * 1500 + ".", "cat " * 1000
    path.write_text("".join(f"{line}\n" for line in lines))
    return tiny


def dataset(split="dev", most=0):
    words = deserialize_vocab("vocab/tiny_precomp_vocab.json")
    words.max_words = most
    return PrecompDataset("data/tiny_precomp", split, words), words


def test_a_long_caption_is_said_once(long, capsys):
    found, _ = dataset()
    said = capsys.readouterr().out
    assert "dev_caps.txt: 1 of 50 captions have more than 1,000 words (first: line 3, 1,501" in said
    assert said.count("--max_words N") == 1 and found.lengths.max() == 1503


@pytest.mark.parametrize("most", [1, 3, 1000])
def test_captions_are_cut(long, most, capsys):
    whole, words = dataset()
    capsys.readouterr()
    found, words = dataset(most=most)
    for caption in (0, 2, 4):
        ids = whole.caption_item(caption)["captions"].tolist()
        want = [*ids[: most + 1], ids[-1]] if len(ids) - 2 > most else ids
        assert found.caption_item(caption)["captions"].tolist() == want
        assert want[0] == words("<start>") and want[-1] == words("<end>")
    cut = int((whole.lengths - 2 > most).sum())
    said = capsys.readouterr().out
    assert f"notice: data/tiny_precomp/dev_caps.txt: {cut} of 50 captions have more than" in said
    assert "warning" not in said and "as --max_words says" in said
    assert words.words("a dog runs red")[:most] == words.words("a dog runs red")


def test_a_checkpoint_keeps_its_limit(tiny, capsys):
    opt, words = options.parse(train_args(max_words=2, img_dim=12)), dataset()[1]
    states = ckpt.state_dicts(ckpt.build_model(opt, len(words)), opt)
    state = {"epoch": 0, "model": states, "opt": opt, "vocab": words.state_dict()}
    ckpt.save(state | {"best_rsum": 0.0, "Eiters": 0}, str(tiny), "checkpoint_0.pth.tar")
    path = "checkpoint_0.pth.tar"
    _, words, opt = ckpt.load_model(path)
    assert words.max_words == opt.max_words == 2 and len(words.encode("a dog runs red .")) == 4
    capsys.readouterr()
    evaluation.evalrank(path)
    assert "dev_caps.txt: 50 of 50 captions have more than 2 words" in capsys.readouterr().out
    opt, _ = run_state.read_options(["--resume", path])
    assert opt.max_words == 2


def test_pairs_of_whole_captions_are_not_cut(capsys):
    with pytest.raises(SystemExit):
        train.main(train_args(model="gsmn", is_sparse=True, max_words=4))
    assert "--max_words" in capsys.readouterr().err


def test_pieces_are_cut_to_the_room_of_bert(tiny):
    pytest.importorskip("transformers", reason="pip install transformers")
    import bert
    from tests.small_bert import flags, write_bert

    (tiny / "bert").mkdir()
    write_bert(tiny / "bert")
    folder = tiny / "data/tiny_precomp"
    lines = (folder / "train_caps.txt").read_text().splitlines()
    lines[0] = "dog " * 3000
    (folder / "train_caps.txt").write_text("".join(f"{line}\n" for line in lines))
    opt, pieces = options.parse(flags()), bert.WordPieces.read("bert")
    opt.bert_config, opt.img_dim = bert.read_config("bert"), 12
    with pytest.raises(InputError, match="caption 1 of train has .* pieces, but this BERT reads"):
        systems.open_split(str(folder), "train", pieces, opt)
    pieces.max_words = 30
    assert systems.open_split(str(folder), "train", pieces, opt).lengths.max() == 32
