"""Search the images of a split by a sentence, or its captions by an image, in two stages.

    python search.py runs/x/model_best.pth.tar "two dogs in snow" --data_path data --split test
    python search.py runs/x/model_best.pth.tar --image 12 --topk 5        # its captions

The first stage compares one vector per image and gives a shortlist, which the model's own score
orders. docs/search.md says what that costs and saves; searcher.py does it, also in Python.
"""

import argparse
import contextlib
import json
import os
import sys

import torch

from explain import tokens_of, unknown_words
from score_files import check_target
from searcher import SHORTLIST, STAGES, TOPK, Found, Searcher, check_numbers  # noqa: F401
from system import ServedImage
from util.arguments import COUNT, Parser
from util.cli import InputError, replacing, run
from util.devices import pick_device
from util.image_ids import shown
from util.photos import find_photos
from util.visualize import find_image, recorded_photos
from vocab import read_captions


def build_parser(sentence: bool = False) -> argparse.ArgumentParser:
    """The parser; `sentence`: it must be there. (An optional one could not stand behind flags.)"""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=os.path.expanduser, help="ours or a published one")
    nargs = None if sentence else "?"
    parser.add_argument("query", nargs=nargs, metavar="SENTENCE", help="what to find, in quotes")
    parser.add_argument("--queries", metavar="FILE", help="sentences instead, one a line")
    parser.add_argument(
        "--image",
        metavar="FILE_OR_ID",
        help="search the captions of an image instead: its number in the split, from 0, its id, or "
        "a picture (for features of util/extract_regions.py)",
    )
    parser.add_argument("--data_path", help="folder that holds the data; default: as in training")
    parser.add_argument("--data_name", help="another data set than that of the training")
    parser.add_argument("--split", default="test", help="train | dev | test (default) | testall")
    parser.add_argument("--vocab_path", help="folder of the vocabulary; default: as in training")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--topk", type=COUNT, default=TOPK, help="results (default: %(default)s)")
    parser.add_argument(
        "--shortlist",
        type=COUNT,
        default=SHORTLIST,
        help="how many the first stage leaves for the exact score (default: %(default)s)",
    )
    parser.add_argument(
        "--stages", default="two", choices=STAGES, help="two (default), or one of them alone"
    )
    parser.add_argument(
        "--first_stage",
        metavar="CHECKPOINT",
        help="a model whose vectors make the shortlist, e.g. one of vse; default: the model itself",
    )
    parser.add_argument(
        "--cache",
        metavar="FOLDER",
        help="where vectors are kept; default: {split}_search beside the features, or the user's "
        "cache where that cannot be written to",
    )
    parser.add_argument(
        "--images", metavar="FOLDER", help="photos, whose paths are printed with the results"
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="results as JSON, to a file, or to stdout (-)",
    )
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options; ends the program if they do not go together."""
    words = sys.argv[1:] if argv is None else argv
    others = {"--queries", "--image", "-h", "--help"} & {word.partition("=")[0] for word in words}
    parser = build_parser(sentence=not others)
    opt = parser.parse_args(argv)
    if sum(x is not None for x in (opt.query, opt.queries, opt.image)) != 1:
        parser.error("give one of a sentence, --queries FILE and --image FILE_OR_ID")
    if opt.json == "":
        parser.error("--json: an empty name; is a shell variable unset?")
    if opt.json not in (None, "-"):
        opt.json = os.path.expanduser(opt.json)
        check_target(opt.json)
    try:
        check_numbers(opt.topk, opt.shortlist, opt.stages)
    except InputError as error:
        parser.error(f"--{error}")
    return opt


def read_queries(opt: argparse.Namespace) -> list[str]:
    """The sentences of a command line."""
    if opt.query is not None:
        return [opt.query]
    path = os.path.expanduser(opt.queries)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file; it holds sentences, one a line")
    lines = read_captions(path)
    empty = [number for number, line in enumerate(lines, 1) if not line.strip()]
    if empty or not lines:
        where = f"line {empty[0]} is empty" if empty else "an empty file"
        raise InputError(f"{path}: {where}; expected a sentence in each line")
    return lines


def wanted_image(opt: argparse.Namespace, searcher: Searcher) -> int | ServedImage:
    """What --image means: an image of the split, by number or id, or a picture in a file."""
    stem, path = searcher.stem, os.path.expanduser(opt.image)
    if not os.path.isfile(path) or opt.image in (searcher.ids or ()):
        return find_image(opt.image, searcher.ids, searcher.n_images, f"{stem}_ids.txt")
    return own_picture(path, stem, opt)


def own_picture(path: str, stem: str, opt: argparse.Namespace) -> ServedImage:
    """A picture, extracted as the images of the split were: `{stem}_extractor.json` says how."""
    import util.pictures as pictures  # these need packages that other searches do not
    from util import extract_regions, region_backends

    settings = extract_regions.read_settings(stem)
    if settings is None:
        raise InputError(
            f"--image {path}: there is no {stem}_extractor.json, so nobody knows how the features "
            "of this split were made; give the number or the id of one of its images, or make the "
            "features with util/extract_regions.py"
        )
    if settings.get("given_boxes"):
        raise InputError(
            f"--image {path}: the boxes of this split came from another program, so nobody knows "
            "those of this picture; give the number or the id of one of its images"
        )
    extractor = region_backends.open_extractor(settings, pick_device(opt.device))
    found = extractor.extract([pictures.open_picture(path)])[0]
    arrays = (torch.from_numpy(x).float() for x in (found.features, found.boxes))
    return ServedImage(*arrays, found.size, torch.from_numpy(found.whole).float())


def photos_of(folder: str | None, searcher: Searcher) -> list[str | None]:
    """The path of each image's photo in a folder, or in that of the data; None: there is none."""
    ids, n = searcher.ids, searcher.n_images
    return find_photos(folder, searcher.folder, searcher.split, ids, n)


def results(found: Found, searcher: Searcher, photos: list | None) -> list[dict]:
    """What was found, a record for each; `photos` None: captions were searched."""
    records = []
    for rank, (place, score) in enumerate(zip(found.places, found.scores, strict=True), 1):
        record = {"rank": rank, "score": score}
        if found.first:
            record["first"] = found.first[rank - 1]
        image = place
        if photos is None:
            image = int(searcher.dataset.image_of[place])
            record |= {"caption": place, "text": searcher.captions[place]}
        record |= {"image": image, "id": None if searcher.ids is None else searcher.ids[image]}
        if photos is not None:
            record["photo"] = photos[place]
        records.append(record)
    return records


def print_found(title: str, found: Found, records: list[dict]) -> None:
    """Print what a search has found, and how long each stage took."""
    print(f"\n{title}")
    for record in records:
        line = f"{record['rank']:>4}  {record['score']:8.4f}  "
        if "text" in record:
            line += f"caption {record['caption']} of "
        line += f"image {record['image']}"
        line += f"  {shown(record['id'])}" if record["id"] is not None else ""
        line += f"  {record.get('photo') or record.get('text') or ''}"
        print(line.rstrip())
    times = found.milliseconds
    print(
        f"milliseconds: query {times['encode']:.1f}, first stage {times['first']:.1f}, "
        f"exact scores {times['exact']:.1f}"
    )


def search(opt: argparse.Namespace) -> dict:
    """Do what a command line asks for, print it, and return it as a record."""
    searcher = Searcher(
        opt.checkpoint,
        opt.data_path,
        opt.data_name,
        opt.split,
        opt.first_stage,
        opt.vocab_path,
        opt.device,
        opt.cache,
    )
    n, m = searcher.n_images, searcher.n_captions
    print(f"Split: {opt.split} of {searcher.folder}: {n:,} images, {m:,} captions")
    how = opt.topk, opt.shortlist, opt.stages
    by_image = opt.image is not None
    queries = [wanted_image(opt, searcher)] if by_image else read_queries(opt)
    photos = None
    if not by_image:
        folder = recorded_photos(searcher.stem) if opt.images is None else opt.images
        photos = photos_of(folder, searcher)
    index, answers = None, []
    for number, query in enumerate(queries):
        if not by_image:
            say_unknown(query, searcher)
        found = searcher.captions_for(query, *how) if by_image else searcher.images_for(query, *how)
        if opt.stages != "exact" and not number:
            index = searcher.caption_index if by_image else searcher.image_index
            print(f"First stage: {index.about}")
        records = results(found, searcher, photos)
        name = opt.image if by_image else query
        print_found(f"Captions for {name}" if by_image else f'"{query}"', found, records)
        answers.append({"query": name, "milliseconds": found.milliseconds, "results": records})
    names = "checkpoint", "first_stage", "split", "stages", "topk", "shortlist"
    record = {name: getattr(opt, name) for name in names} | {"folder": searcher.folder}
    record |= {"searched": "captions" if by_image else "images", "images": n, "captions": m}
    return record | {"index": index and index.kind, "queries": answers}


def say_unknown(sentence: str, searcher: Searcher) -> None:
    """Print a notice of the words that the vocabulary lacks."""
    ids = torch.tensor(searcher.vocab.encode(sentence))  # (W,)
    tokens = tokens_of(ids.tolist(), sentence, searcher.vocab)
    for line in unknown_words(ids, tokens, searcher.vocab):
        print(f"notice: {line[0].lower()}{line[1:]}")


def main(argv: list[str] | None = None) -> None:
    opt = parse(argv)
    if opt.json != "-":
        record = search(opt)
    else:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the record alone
            record = search(opt)
    text = json.dumps(record, indent=2, allow_nan=False) + "\n" if opt.json else ""
    if opt.json == "-":
        sys.stdout.write(text)
    elif opt.json:
        with replacing(opt.json) as part, open(part, "w", encoding="utf-8") as file:
            file.write(text)
        print(f"Results saved to {opt.json}")


if __name__ == "__main__":
    run(main, clean_up=True)
