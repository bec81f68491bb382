"""The files that a command line of evaluation.py asks for: checked first, written at the end."""

import argparse
import os

import exports
from ranking import Ranking
from score_files import beside, check_matrix_target, check_target
from util.cli import InputError


def check(opt: argparse.Namespace) -> None:
    """Raise InputError, before hours of scoring, if an output cannot be written."""
    for name in ("json", "csv", "trec", "report", "save_path"):
        path = getattr(opt, name)
        if path == "":
            raise InputError(f"--{name}: an empty name; is a shell variable unset?")
        setattr(opt, name, path and os.path.expanduser(path))
    opt.seeds = opt.seeds and os.path.expanduser(opt.seeds)
    given = [*opt.checkpoint, *(opt.embeddings or []), opt.ids or "", opt.seeds or ""]
    read = map(os.path.expanduser, given)
    inputs = {os.path.realpath(file) for path in read for file in (path, beside(path))}
    written = [opt.json, opt.csv, *(exports.trec_files(opt.trec) if opt.trec else [])]
    written += [opt.report, opt.save_path, opt.save_path and beside(opt.save_path)]
    written = [path for path in written if path]
    for path in written:
        check_target(path)
        if os.path.realpath(path) in inputs:
            raise InputError(f"{path}: an input of this evaluation; give another name")
    if len(set(map(os.path.realpath, written))) < len(written):
        raise InputError(f"two outputs of one name, of {', '.join(written)}")
    if opt.save_path:
        check_matrix_target(opt.save_path)
    exports.check(opt.json, opt.csv, opt.trec, opt.report)
    if opt.images and not opt.report:
        raise InputError("--images: the photos are for --report")
    if opt.seeds and not opt.report:
        raise InputError("--seeds: the curves are for --report")
    if opt.images and not os.path.isdir(os.path.expanduser(opt.images)):
        raise InputError(f"--images {opt.images}: no such folder")
    if opt.report:
        import report  # the page needs packages that an evaluation does not

        report.check(opt.images, opt.seeds)


def write(opt: argparse.Namespace, ranking: Ranking) -> None:
    """Write the files that the command line asks for. If one fails, the others are written."""
    failed = []
    for name in ("json", "csv", "trec", "report"):
        path = getattr(opt, name)
        try:
            if path and name == "report":
                import report

                report.write(path, ranking, opt.images, opt.seeds)
            elif path:
                getattr(exports, f"write_{name}")(path, ranking)
        except (InputError, OSError) as error:
            failed.append(f"--{name} {path}: {error}")
    if failed:
        raise InputError("; ".join(failed))
