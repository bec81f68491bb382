"""The bodies that serve.py reads and the answers that it gives, and what is wrong with a body.

The parser builds all that a body holds before it looks at it, fields that nobody asks for included,
and keeps the interpreter meanwhile. So the values of a body are counted first, which is fast.

Shapes: R regions, F numbers per region.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, FiniteFloat, ValidationError
from pydantic_core import from_json

from util.cli import InputError

# A list is refused at its first fault, or if it is too long: a report of all faults would be many
# times larger than the body.
MOST = 2**16
FEW = FailFast(), Field(min_length=1, max_length=MOST)


class Record(BaseModel):
    """An image, as in a tsv file of bottom-up-attention; other fields are ignored."""

    image_id: int | str | None = None
    image_w: Annotated[FiniteFloat, Field(gt=0, description="width in pixels")]
    image_h: Annotated[FiniteFloat, Field(gt=0, description="height in pixels")]
    num_boxes: Annotated[int, Field(ge=1, le=10**6, description="number of regions, R")]
    boxes: Annotated[str, Field(description="base64 of float32 (R, 4): left, top, right, bottom")]
    features: Annotated[str, Field(description="base64 of float32 (R, F)")]


class Body(BaseModel):
    """A sentence and the images to score it with; other fields are ignored."""

    sentence: Annotated[list[str], *FEW, Field(description="the words")]
    boxes: Annotated[list[Record], *FEW, Field(description="one record per image")]
    whole_items: Annotated[
        list[Annotated[list[FiniteFloat], *FEW]],
        *FEW,
        Field(description="for pfan_whole: one vector (F,) per image"),
    ] = None
    dependencies: Annotated[
        list[tuple[int, int]],
        *FEW,
        Field(description="for a sparse GSMN: [governor, dependent], <start> is 0, the root first"),
    ] = None


class Scores(BaseModel):
    """One score per image, in the order of the request, in each direction."""

    sim_t2i: list[float]
    sim_i2t: list[float]


# The search (serve_search.py)


class Ranking(BaseModel):
    """How a search ranks, and how much of the ranking it gives."""

    model_config = ConfigDict(extra="forbid", strict=True)

    topk: Annotated[int, Field(ge=1, le=100, description="results in the answer")] = 10
    shortlist: Annotated[
        int, Field(ge=1, le=10_000, description="results of the first stage that are scored again")
    ] = 100
    stages: Annotated[
        Literal["two", "first", "exact"],
        Field(description="two stages, the first one only, or the exact score of all"),
    ] = "two"


class ImageSearch(Ranking):
    """A sentence that images are searched for."""

    query: Annotated[str, Field(max_length=2000, description="a sentence")]


class CaptionSearch(Ranking):
    """An image of the data set that captions are searched for."""

    image: Annotated[int, Field(description="its number, from 0")]


class AttentionOf(BaseModel):
    """A sentence and the images to see it with."""

    model_config = ConfigDict(extra="forbid", strict=True)

    query: Annotated[str, Field(max_length=2000, description="a sentence")]
    images: Annotated[
        list[int],
        FailFast(),
        Field(min_length=1, max_length=100, description="their numbers, from 0"),
    ]


BLOCK = 2**16  # bytes that are counted at a time: other threads run in between


def parse_body(raw: bytes | bytearray, values: int, fields: int) -> Body:
    """The body that `raw` holds. Raises InputError if it does not fit, or holds too much.

    It cannot hold more values than commas and `fields`, nor more objects, lists and fields than
    brackets and colons. If there are too many, only the part before them is looked at, to say what
    is wrong.
    """
    end = bounded_part(raw, values, fields)
    said = [] if end is None else [f"over {values} values, or {fields} fields and lists"]
    try:
        if end is None:
            return Body.model_validate_json(raw)
        Body.model_validate(from_json(bytes(raw[:end]), allow_partial=True))
    except ValidationError as error:
        said.insert(0, explain(error))
    except ValueError as error:  # of from_json
        said.insert(0, f"Invalid JSON: {error}")
    raise InputError("; ".join(said))


def bounded_part(raw: bytes | bytearray, values: int, fields: int) -> int | None:
    """Where a body begins to hold too much; None if it does not."""
    for start in range(0, len(raw), BLOCK):
        block = raw[start : start + BLOCK]
        values -= block.count(b",")
        fields -= sum(map(block.count, (b"[", b"{", b":")))
        if min(values, fields) < 0:
            return start + BLOCK
    return None


def explain(error: ValidationError) -> str:
    """The first three faults of a body, each with its place."""
    said = []
    for fault in error.errors(include_url=False, include_input=False, include_context=False)[:3]:
        place = ".".join(str(part)[:40] for part in fault["loc"])
        said.append(f"{place}: {fault['msg']}" if place else fault["msg"])
    return "; ".join(said)
