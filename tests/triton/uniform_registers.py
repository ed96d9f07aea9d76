"""Which uniform registers machine code for Hopper reads before it has set them.

Matrix instructions take the addresses of their operands from uniform registers. ptxas of CUDA 12.8
runs out of those in kernels with many products, and has then dropped an initialisation: the kernel
goes on with what its predecessor on the processor left there.
"""

import re
from typing import NamedTuple

_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_CODE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?(U?P(?:\d|T))\s+)?(\S.*?)\s*;")


class Instruction(NamedTuple):
    text: str
    reads: set[int]
    writes: set[int]
    next: list[int]


def read_before_set(disassembly: str) -> list[str]:
    """The instructions, as nvdisasm writes them, with such a read on some path to them."""
    code = _parse(disassembly)
    known: list[set[int] | None] = [set(), *[None] * (len(code) - 1)]
    pending = [0]
    while pending:
        at = pending.pop()
        after = (known[at] or set()) | code[at].writes
        for following in code[at].next:
            before = known[following]
            merged = after if before is None else before & after
            if merged != before:
                known[following] = merged
                pending.append(following)
    return [x.text for x, is_set in zip(code, known) if is_set is not None and x.reads - is_set]


def _parse(disassembly: str) -> list[Instruction]:
    lines: list[tuple[str | None, str]] = []
    labels: dict[str, int] = {}
    for line in disassembly.splitlines():
        if found := _LABEL.match(line):
            labels[found[1]] = len(lines)
        elif found := _CODE.match(line):
            lines.append((found[1], found[2]))
    return [
        Instruction(text, *_registers(text), _following(at, condition, text, labels, len(lines)))
        for at, (condition, text) in enumerate(lines)
    ]


def _following(
    at: int, condition: str | None, text: str, labels: dict[str, int], end: int
) -> list[int]:
    target = re.search(r"\.L_x_\d+", text) if text.startswith("BRA") else None
    following = [labels[target[0]]] if target else []
    falls_through = condition or re.match(r"BRA\S* !?U?P\d", text)
    if falls_through or not text.startswith(("BRA", "EXIT", "RET")):
        following.append(at + 1)
    return [x for x in following if x < end]


def _registers(text: str) -> tuple[set[int], set[int]]:
    """The uniform registers that an instruction reads and writes.

    Where an operand takes several and does not say so, only its first counts as read.
    """
    name, _, rest = text.partition(" ")
    operands = [x.strip() for x in rest.split(",")]
    if re.fullmatch(r"U?P(\d|T)", operands[0]):  # R2UR P1, UR4, R5
        operands = operands[1:] or operands
    width = 4 if ".128" in name else 2 if ".64" in name or ".WIDE" in name else 1
    writes: set[int] = set()
    target = re.fullmatch(r"UR(\d+)", operands[0])
    if target:
        writes = _from(int(target[1]), width)
        operands = operands[1:]
    return set().union(*(_read(x, name, operands) for x in operands)), writes


def _read(operand: str, name: str, operands: list[str]) -> set[int]:
    found = re.search(r"UR(\d+)", operand)
    if not found:
        return set()
    first = int(found[1])
    if operand.startswith("gdesc"):
        # Two pairs: the left operand's is not used where that comes from registers.
        in_registers = re.fullmatch(r"R\d+(\.reuse)?", operands[1])
        return _from(first + 2, 2) if in_registers else _from(first, 4)
    return _from(first, 2 if operand.startswith("desc") or name.startswith("UIADD3.64") else 1)


def _from(first: int, count: int) -> set[int]:
    return set(range(first, first + count))
