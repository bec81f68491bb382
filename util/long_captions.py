"""Encode the captions of a file: say which are empty or very long, and cut those as asked."""

from collections.abc import Iterable, Iterator

LONG = 1000  # words; the captions of the data sets have 5 to 80


def cut(ids: list[int], most: int) -> list[int]:
    """The ids of a caption with those of its begin and end, and `most` between them; 0: all."""
    return [*ids[: most + 1], ids[-1]] if 0 < most < len(ids) - 2 else ids


def encode_lines(captions: Iterable[str], path: str, vocab) -> Iterator[list[int]]:
    """The ids of each line of a caption file, by a Vocabulary or BERT's WordPieces.

    A caption of more than `vocab.max_words` is cut, and a notice says how many are; without that
    limit a warning names the first of more than LONG words. Empty captions are kept.
    """
    what = "pieces" if vocab.pieces else "words"
    most = vocab.max_words or LONG
    empty, long, first = [], [], 0
    for row, caption in enumerate(captions, 1):
        if not caption.strip():
            empty.append(row)
        ids = vocab.encode_whole(caption)
        if len(ids) - 2 > most:
            long.append(row)
            first = first or len(ids) - 2
        yield cut(ids, vocab.max_words)
    if empty:
        print(
            f"warning: {path}: {len(empty)} empty captions (first at line {empty[0]}), kept "
            "without a word"
        )
    if not long:
        return
    said = f"{path}: {len(long)} of {row} captions have more than {most:,} {what} (first: line "
    said += f"{long[0]}, {first:,} {what})"
    if vocab.max_words:
        print(f"notice: {said}, and are cut to {most:,}, as --max_words says")
    else:
        print(
            f"warning: {said}: are line ends missing? They take much time and memory; "
            f"--max_words N cuts captions to N {what}"
        )
