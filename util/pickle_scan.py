"""Look through a pickle before it is loaded: a few bytes can ask for all memory, or for years.

Which objects a pickle may make is the concern of the unpicklers. Here the amounts are bounded that
those believe: the table of numbered objects, tuples in tuples, containers of a given length, and
names that torch would put into the message of an error, and search with a slow pattern.
"""

import io
import os
import pickletools
import zipfile
from typing import BinaryIO

DEEPEST = 20  # tuples in tuples: to hash n of them, each twice in the next, takes 2^n steps
FILLED = "bytearray"  # the container that a number fills; no file of this field needs it
LONGEST_NAME = 1000  # letters of the name of an object
_MARK = -1, 0
# Opcodes that take the name of an object, and which of the taken objects it is, from the top.
NAMING = {"BINPERSID": 0, "REDUCE": 1, "NEWOBJ": 1, "NEWOBJ_EX": 2}
LEGACY_PICKLES = 5  # in a file of PyTorch before 1.6; the numbers of its tensors follow


def check_pickle(file: BinaryIO, size: int) -> None:
    """Raise ValueError if a pickle is cut, or asks for too much.

    It begins at the place of a file of `size` bytes; the file then stands behind it.
    """
    # Of each object, how deep tuples lie in it, and the letters of the longest text in its tuples.
    stack: list[tuple[int, int]] = []  # _MARK is a mark
    memo: dict[int, tuple[int, int]] = {}
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
            if len(argument or "".join(last)) > LONGEST_NAME:
                raise ValueError(f"a name of over {LONGEST_NAME:,} letters")
        if isinstance(argument, str):
            last = [last[1], argument]
        if name.endswith("PUT") or name == "MEMOIZE":
            memo[len(memo) if argument is None else argument] = stack[-1] if stack else (0, 0)
        elif name.endswith("GET"):
            stack.append(memo.get(argument, (0, 0)))
        else:
            is_text = isinstance(argument, str) and "GLOBAL" not in name
            _take_and_give(opcode, stack, len(argument) if is_text else 0)


def _take_and_give(
    opcode: pickletools.OpcodeInfo, stack: list[tuple[int, int]], letters: int
) -> None:
    """Do to the stack what an opcode does, with what is known of the objects instead of them.

    `letters`: those of the text that it pushes.
    """
    taken = []
    for item in reversed(opcode.stack_before):
        if item is pickletools.stackslice:
            while stack and stack[-1] != _MARK:
                taken.append(stack.pop())
        elif stack:
            taken.append(stack.pop())
    depth = max([0, *(deep for deep, _ in taken)]) + opcode.name.startswith("TUPLE")
    if depth > DEEPEST:
        raise ValueError(f"more than {DEEPEST} tuples lie in each other")
    place = NAMING.get(opcode.name)
    name = [] if place is None else taken[place:]
    if max([0, *(long for _, long in name)]) > LONGEST_NAME:
        raise ValueError(f"a name of over {LONGEST_NAME:,} letters")
    # In a list or a dict a long text is a value.
    inside = taken if opcode.name.startswith("TUPLE") else []
    longest = max([letters, *(long for _, long in inside)])
    stack += [
        _MARK if item is pickletools.markobject else (depth, longest) for item in opcode.stack_after
    ]


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
