"""Command lines: what is misspelt is named with what is near, in one line, in every program."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import options
import train
from tests.conftest import train_args
from util.arguments import COUNT, FROM_0, POSITIVE, Parser, fraction, nearest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [path for folder in (".", "util", "scripts") for path in ROOT.glob(f"{folder}/*.py")]


def made(path: Path) -> set[str]:
    """The classes named *Parser that a file makes an object of."""
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if type(node) is ast.Call]
    names = {getattr(f, "attr", getattr(f, "id", "")) for f in calls}
    return {name for name in names if name in ("Parser", "ArgumentParser")}


PROGRAMS = [path for path in SOURCES if made(path) and path.name != "options.py"]
PROGRAMS.append(ROOT / "train.py")


def refused(parse, *words: str, capsys) -> str:
    """What is said of a command line that is wrong, without the program's name."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        parse(list(words))
    out, err = capsys.readouterr()
    assert end.value.code == 2 and not out
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
    assert "usage" not in err.lower()
    return err.removeprefix("error: ").partition(": ")[2].rstrip()


@pytest.fixture
def parser():
    parser = Parser(prog="p.py")
    parser.add_argument("files", nargs="*")
    parser.add_argument("--learning_rate", type=float)
    parser.add_argument("--num_epochs", type=int, default=1)
    parser.add_argument("--data_path")
    parser.add_argument("--sizes", type=COUNT, nargs="+")
    parser.add_argument("--optim", choices=["adam", "sgd"])
    parser.add_argument("--layers", type=int, choices=[1, 2, 12])
    parser.add_argument("--bi_gru", action="store_true")
    parser.add_argument("--drop", action=options.SWITCH)
    return parser


def test_every_program_has_this_parser():
    assert len(PROGRAMS) > 14
    for path in SOURCES:
        assert "ArgumentParser" not in made(path), path.name


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_every_program_names_the_flag_that_was_meant(path, monkeypatch, capsys):
    if path.name == "serve.py":
        pytest.importorskip("fastapi")
    folder = path.parent.relative_to(ROOT)
    monkeypatch.syspath_prepend(ROOT)
    program = importlib.import_module(".".join([*folder.parts, path.stem]))

    def main(words):
        monkeypatch.setattr(sys, "argv", [str(path), *words])
        program.main()

    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    flags = re.findall(r"--[a-z_]{4,}", capsys.readouterr().out)
    flag = next(flag for flag in flags if flag != "--help" and flag[3] != flag[4])
    wrong = flag[:3] + flag[4] + flag[3] + flag[5:]  # --data_path: --dtaa_path
    said = refused(main, wrong, "3", capsys=capsys)
    assert said == f"unknown flag {wrong}; did you mean {flag}? (--help lists all)"


def test_a_real_command_line():
    words = [sys.executable, ROOT / "train.py", "--leraning_rate", "0.1"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: train.py: unknown flag --leraning_rate; did you mean --learning_rate? "
        "(--help lists all)\n"
    )


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("--leraning_rate", "--learning_rate"),
        ("--learning-rate", "--learning_rate"),
        ("--Learning_Rate=0.1", "--learning_rate"),
        ("-num_epochs", "--num_epochs"),
        ("--epochs", "--num_epochs"),
        ("--bigru", "--bi_gru"),
        ("--data", "--data_path"),
        ("--no_drop", "--no-drop"),
        ("--hlep", "--help"),
    ],
)
def test_flags(parser, word, meant, capsys):
    flag = word.partition("=")[0]
    said = refused(parser.parse_args, word, "3", capsys=capsys)
    assert said == f"unknown flag {flag}; did you mean {meant}? (--help lists all)"


@pytest.mark.parametrize("word", ["--cnn_type", "--use_restval", "--x", "-z"])
def test_a_flag_like_no_other_is_only_unknown(parser, word, capsys):
    said = refused(parser.parse_args, word, capsys=capsys)
    assert said == f"unknown flag {word} (--help lists all)"


def test_several_flags(parser, capsys):
    words = ["--num_epoch", "3", "a", "--cnn_type", "x", "--bi_gru", "--sizs=3"]
    said = refused(parser.parse_args, *words, capsys=capsys)
    flags = "--num_epoch (--num_epochs?), --cnn_type, --sizs (--sizes?)"
    assert said == f"unknown flags {flags} (--help lists all)"


def test_flags_of_forks_get_no_far_fetched_names():
    flags = options.build_parser()[0]._option_string_actions
    for word in "--cnn_type --use_restval --finetune --gpu --measure --lr --weight_decay".split():
        assert nearest(word, flags) is None, word
    for flag in flags:
        assert nearest(flag, flags) == flag


def test_a_misspelt_flag_is_named_before_what_is_missing(capsys):
    parser = Parser()
    parser.add_argument("file")
    parser.add_argument("--out", required=True)
    said = refused(parser.parse_args, "--uot", "x", capsys=capsys)
    assert said == "unknown flag --uot; did you mean --out? (--help lists all)"
    said = refused(parser.parse_args, capsys=capsys)
    assert said == "the following arguments are required: file, --out"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--num_epochs", "ten"], "argument --num_epochs: ten: expected a whole number"),
        (["--num_epochs=2.5"], "argument --num_epochs: 2.5: expected a whole number"),
        (["--num_epochs", ""], "argument --num_epochs: '': expected a whole number"),
        (["--learning_rate", "2e"], "argument --learning_rate: 2e: expected a number"),
        (["--sizes", "1", "x"], "argument --sizes: x: expected a whole number of at least 1"),
        (["--sizes", "1", "0"], "argument --sizes: 0: expected a number of at least 1"),
        (
            ["--optim", "adamw"],
            "argument --optim: adamw: expected one of adam, sgd; did you mean adam?",
        ),
        (["--optim", "SGD"], "argument --optim: SGD: expected one of adam, sgd; did you mean sgd?"),
        (["--optim", "lamb"], "argument --optim: lamb: expected one of adam, sgd"),
        (["--optim", ""], "argument --optim: '': expected one of adam, sgd"),
        (["--layers", "3"], "argument --layers: 3: expected one of 1, 2, 12"),
        (["--data_path", "--bi_gru"], "argument --data_path: expected one argument"),
    ],
)
def test_values(parser, words, said, capsys):
    assert refused(parser.parse_args, *words, capsys=capsys) == said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--bi_gru=1"], "--bi_gru takes no value, found 1"),
        (["--no-drop=False"], "--no-drop takes no value, found False"),
        (["a", "--bi_gru", "True"], "--bi_gru takes no value, found True"),
        (
            ["a", "--data_path", "my", "data"],
            "data, after my, belongs to no flag: a value stands behind its flag, a path with "
            "blanks in quotes, and all of FILES stand together",
        ),
    ],
)
def test_stray_words(parser, words, said, capsys):
    assert refused(parser.parse_args, *words, capsys=capsys) == said


@pytest.mark.parametrize("word", ["--quiet=1", "--no-quiet=0", "--bi_gru=", "--dry_run=yes"])
def test_train_names_a_value_of_a_switch(word, capsys):
    flag, _, value = word.partition("=")
    for read in (train.main, options.given, options.parse):
        said = refused(read, "--seed", "1", word, capsys=capsys)
        assert said == f"{flag} takes no value, found {value or repr('')}"


def test_stray_words_without_positional_arguments(capsys):
    said = refused(options.parse, "data", "--seed", "1", capsys=capsys)
    rest = "belongs to no flag: a value stands behind its flag, a path with blanks in quotes"
    assert said == f"data {rest}"
    said = refused(options.parse, "--data_path", "/my", "data", capsys=capsys)
    assert said == f"data, after /my, {rest}"


def test_right_command_lines_are_read(parser, capsys):
    opt = parser.parse_args("a b --learning_rate -0.5 --no-drop --sizes 1 2 --num_epochs=3".split())
    assert (opt.files, opt.learning_rate, opt.drop) == (["a", "b"], -0.5, False)
    assert (opt.sizes, opt.num_epochs, opt.bi_gru) == ([1, 2], 3, False)
    assert parser.parse_args(["--data_path", "-a b", "--", "--seed"]).files == ["--seed"]
    assert parser.parse_known_args(["--other", "3"])[1] == ["--other"]
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["--num_epoch", "3", "--help"])
    assert end.value.code == 0 and "--num_epochs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("read", "wrong"),
    [(COUNT, "0 -1 x 1.5"), (FROM_0, "-1 x"), (POSITIVE, "0 inf nan x"), (fraction, "1 -1 nan x")],
)
def test_numbers_out_of_bounds(read, wrong, capsys):
    parser = Parser()
    parser.add_argument("--x", type=read)
    for text in wrong.split():
        said = refused(parser.parse_args, f"--x={text}", capsys=capsys)
        assert said.startswith(f"argument --x: {text}: expected a ") and "number" in said


def test_the_name_of_a_variant(tiny):
    """Variants are looked up when the model is built."""
    with pytest.raises(ValueError, match=r"'mean': expected one of .*Sum; did you mean Mean\?"):
        train.main(train_args(agg_func="mean"))
    with pytest.raises(ValueError, match=r"'zebra': expected one of [^?]*Sum$"):
        train.main(train_args(agg_func="zebra"))
