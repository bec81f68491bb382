"""Look through a pickle before it is loaded: a few bytes can ask for all memory, or for years.

Which objects a pickle may make is the concern of the unpicklers. Here the amounts are bounded that
those believe: the table of numbered objects, tuples in tuples, and containers of a given length.
"""

import io
import os
import pickletools
import zipfile
from typing import BinaryIO

DEEPEST = 20  # tuples in tuples: to hash n of them, each twice in the next, takes 2^n steps
FILLED = "bytearray"  # the container that a number fills; no file of this field needs it
_MARK = -1
LEGACY_PICKLES = 5  # in a file of PyTorch before 1.6; the numbers of its tensors follow


def check_pickle(file: BinaryIO, size: int) -> None:
    """Raise ValueError if a pickle is cut, or asks for too much.

    It begins at the place of a file of `size` bytes; the file then stands behind it.
    """
    stack: list[int] = []  # how deep tuples lie in each object; _MARK is a mark
    memo: dict[int, int] = {}
    last = ["", ""]  # the last texts: STACK_GLOBAL takes its names from the stack
    while True:
        opcode = pickletools.code2op.get(file.read(1).decode("latin1"))
        if opcode is None:
            raise ValueError("it is cut, or no pickle")
        name, argument = opcode.name, None
        if name == "STRING":  # Python 2's, in any encoding
            argument = file.readline().decode("latin1")
        elif opcode.arg is not None:
            argument = opcode.arg.reader(file)
        if name == "STOP":
            return
        if name.endswith("PUT") and argument > size:
            raise ValueError(f"object number {argument:,} in {size:,} bytes")
        if name in ("GLOBAL", "INST", "STACK_GLOBAL"):
            called = last[1] if argument is None else argument.split()[-1]
            if called == FILLED:
                raise ValueError(f"it makes a {called}")
        if isinstance(argument, str):
            last = [last[1], argument]
        if name.endswith("PUT") or name == "MEMOIZE":
            memo[len(memo) if argument is None else argument] = stack[-1] if stack else 0
        elif name.endswith("GET"):
            stack.append(memo.get(argument, 0))
        else:
            _take_and_give(opcode, stack)


def _take_and_give(opcode: pickletools.OpcodeInfo, stack: list[int]) -> None:
    """Do to the stack what an opcode does, with how deep tuples lie instead of objects."""
    taken = []
    for item in reversed(opcode.stack_before):
        if item is pickletools.stackslice:
            while stack and stack[-1] != _MARK:
                taken.append(stack.pop())
        elif stack:
            taken.append(stack.pop())
    depth = max([0, *taken]) + opcode.name.startswith("TUPLE")
    if depth > DEEPEST:
        raise ValueError(f"more than {DEEPEST} tuples lie in each other")
    stack += [_MARK if item is pickletools.markobject else depth for item in opcode.stack_after]


def check_torch_file(path: str | os.PathLike) -> None:
    """Raise ValueError if a pickle in a file of torch.save is no ordinary one.

    The archive must have been checked before (util/checkpoint_files.py).
    """
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            file.seek(0)
            for _ in range(LEGACY_PICKLES):
                check_pickle(file, os.path.getsize(path))
            return
        with zipfile.ZipFile(file) as archive:
            for record in archive.infolist():
                if record.filename.endswith("/data.pkl"):
                    check_pickle(io.BytesIO(archive.read(record)), record.file_size)
