"""Pickles read as lists of instructions, never run."""

from __future__ import annotations

import importlib.util
import io
import pickletools
import re
import sys

#: Instructions that look a name up; a pickle without any of them makes plain values only.
_BY_NAME, _BY_STACK = frozenset({"GLOBAL", "INST"}), frozenset({"STACK_GLOBAL", "EXT1", "EXT2", "EXT4"})
#: Instructions that begin the arguments of a call.
_ARGUMENTS = frozenset({"MARK", "EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"})
_NAME = re.compile(r"[\w.]+ [\w.]+")
#: What PyTorch's own restricted unpickler builds tensors of; none of it takes a name or code as its argument.
_TENSORS = re.compile(
    r"torch\.(_utils\._rebuild_(tensor_v2|parameter|qtensor|sparse_tensor)|\w+Storage|Size|device|dtype"
    r"|b?float\d*|double|half|u?int\d+|long|bool|complex\d+|storage\.UntypedStorage|Tensor"
    r"|nn\.parameter\.Parameter|serialization\._get_layout)|collections\.OrderedDict"
)
#: Longer text than this is no pickle of protocol 0 that a model library has written.
_MOST_TEXT = 64 << 20


def is_pickle(content: bytes) -> bool:
    """Whether ``content`` starts as a pickle of protocol 2 or newer, or is one of an older protocol that acts.

    Old pickles are plain text, so they are told by being read, up to an instruction that looks a name up. Damage after
    it does not make a file harmless: what comes before the damage runs. A list of words may look names up, too
    (``carrier``, ``origin``); it acts only if there is such a name here, or if arguments for a call were made.
    """
    if content[:1] == b"\x80" and len(content) > 1 and content[1] <= 8:
        return True
    acting = named = calls = False
    try:
        for opcode, argument, _ in pickletools.genops(io.BytesIO(content[:_MOST_TEXT])):
            calls = calls or opcode.name in _ARGUMENTS
            if opcode.name in _BY_NAME and _NAME.fullmatch(str(argument)):
                named, acting = True, acting or _exists(*str(argument).split(" "))
            acting = acting or (named and calls) or opcode.name in _BY_STACK
            if opcode.name == "STOP":
                return acting
    except Exception:  # whatever a damaged one raises
        return acting
    return acting


def _exists(module: str, attribute: str) -> bool:
    """Whether looking a name up does more here than fail; nothing is imported to know."""
    if known := sys.modules.get(module):
        return attribute.split(".")[0] in vars(known) or "__getattr__" in vars(known)
    try:
        return importlib.util.find_spec(module.split(".")[0]) is not None
    except (ImportError, ValueError):
        return False


def globals_of(content: bytes) -> tuple[str, ...]:
    """The dotted names that a pickle looks up, sorted; ``?`` among them where a name is made while it runs.

    :raises ValueError: it is damaged, or something follows it
    """
    found: set[str] = set()
    memo: dict[int, str | None] = {}
    # The strings on top of the stack; anything that is no string, or moves them about, makes them unknown.
    top: list[str | None] = []
    stream = io.BytesIO(content)
    for opcode, argument, _ in pickletools.genops(stream):
        name = opcode.name
        if name in _BY_NAME:
            found.add(str(argument).replace(" ", ".", 1))
        elif name == "STACK_GLOBAL":
            module, attribute = [None, None, *top][-2:]
            found.add(f"{module}.{attribute}" if module and attribute else "?")
        elif name in _BY_STACK:
            found.add("?")
        if name == "MEMOIZE":
            memo[len(memo)] = top[-1] if top else None
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[int(argument or 0)] = top[-1] if top else None
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            top.append(memo.get(int(argument or 0)))
        elif isinstance(argument, str) and "UNICODE" in name:
            top.append(argument)
        elif name != "FRAME":
            top.clear()
    if stream.read(1):
        raise ValueError("something follows the pickle")
    return tuple(sorted(found))


def unsafe_globals(content: bytes) -> tuple[str, ...]:
    """Those of :func:`globals_of` that PyTorch's weights-only unpickler would refuse.

    :raises ValueError: it is damaged, or something follows it
    """
    return tuple(name for name in globals_of(content) if not _TENSORS.fullmatch(name))
