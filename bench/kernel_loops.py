"""The loops of a compiled kernel, read from its assembly (PTX, SASS or AMD's): what runs once per step.

A loop is what stands between a label and a branch back to it; an innermost loop holds no other. The main loop of a
kernel is the innermost loop with the most multiply-add instructions, of those the one that copies the most.
"""

import re
import subprocess
import tempfile
from collections import Counter

from triton import knobs

_LABEL = re.compile(r"^\s*(\$?\.?L\w+):")
_INSTRUCTION = re.compile(r"^\s*(?:/\*[0-9a-f]+\*/)?\s*\{?\s*(?:@!?U?%?[Pp]\w+\s+)?([A-Za-z][\w.:]*)([^;/]*)")
_BRANCH = re.compile(r"^(bra|BRA|s_cbranch|s_branch)")
_TARGET = re.compile(r"(\$?\.?L\w+)")

TENSOR = ("wgmma.mma_async", "tcgen05.mma", "mma.sync", "v_mfma")
MULTIPLY_ADD = (*TENSOR, "fma.rn.f32", "v_fma", "v_pk_fma", "HGMMA", "HMMA", "UTCHMMA", "FFMA")
COPY = ("cp.async.bulk.tensor", "cp.async.ca", "cp.async.cg", "UTMALDG", "LDGSTS", "buffer_load", "global_load")
BULK_COPY = "cp.async.bulk.tensor"

# SASS that computes addresses, bounds and loop counters, or moves a value between registers. How many of these a loop
# takes is ptxas's allocation of registers; what the source asks for of them is counted in the PTX.
_BOOKKEEPING = (
    "BRA", "CS2R", "IABS", "IADD3", "IADD", "IMAD", "IMNMX", "ISETP", "LDC", "LEA", "LOP3", "MOV", "NOP", "P2R",
    "PLOP3", "PRMT", "R2P", "R2UR", "S2R", "S2UR", "SEL", "SGXT", "SHF", "UIADD3", "UIMAD", "UISETP", "ULDC", "ULEA",
    "ULOP3", "UMOV", "UPLOP3", "UPRMT", "USEL", "USHF", "VIADD", "VIMNMX", "VOTEU",
)  # fmt: skip


def innermost_loops(assembly: str) -> list[Counter[str]]:
    """How often each opcode stands in each innermost loop."""
    labels: dict[str, int] = {}
    opcodes: list[str] = []
    named = []  # (place of a branch, its label)
    for line in assembly.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(opcodes)
        elif found := _INSTRUCTION.match(line):
            opcode, operands = found.groups()
            if target := _TARGET.search(operands) if _BRANCH.match(opcode) else None:
                named.append((len(opcodes), target[1]))
            opcodes.append(opcode)
    branches = [(place, labels[label]) for place, label in named if label in labels]
    # Branches back to one label are one loop: LLVM may begin it at its latch, with a branch there from its middle.
    whole: dict[int, int] = {}
    for place, start in branches:
        if start <= place:
            whole[start] = max(place, whole.get(start, 0))

    def within(other: int, start: int) -> bool:
        """Whether ``other`` is a loop of its own inside that at ``start``: its middle is not the way into both."""
        inside = start < other and whole[other] <= whole[start]
        return inside and not any(
            other < target <= whole[other] and not start <= place <= whole[start] for place, target in branches
        )

    inner = [(start, end) for start, end in whole.items() if not any(within(other, start) for other in whole)]
    return [Counter(opcodes[start : end + 1]) for start, end in inner]


def count(loop: Counter[str], prefixes: tuple[str, ...] | str) -> int:
    """How many instructions of the loop begin with one of the prefixes."""
    return sum(times for opcode, times in loop.items() if opcode.startswith(prefixes))


def main_loop(assembly: str) -> Counter[str]:
    """The opcodes of the main loop; empty for a kernel without one."""
    loops = [loop for loop in innermost_loops(assembly) if count(loop, MULTIPLY_ADD)]
    return max(loops, key=lambda loop: (count(loop, COPY) > 0, count(loop, MULTIPLY_ADD)), default=Counter())


def counts(assembly: str) -> tuple[int, int, int, int]:
    """(instructions, tensor-core instructions, copies, bulk copies) of the main loop."""
    loop = main_loop(assembly)
    return loop.total(), count(loop, TENSOR), count(loop, COPY), count(loop, BULK_COPY)


def machine_code(cubin: bytes) -> str:
    """The SASS of a cubin, by the disassembler that Triton ships."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def sass_work(loop: Counter[str]) -> Counter[str]:
    """The SASS of a loop that does work: tensor cores, floating point, memory, copies, barriers."""
    kept: Counter[str] = Counter()
    for opcode, times in loop.items():
        name = opcode.partition(".")[0]
        if name not in _BOOKKEEPING:
            kept[name] += times
    return kept


def ptx_work(loop: Counter[str]) -> Counter[str]:
    """The PTX of a loop, a vector access counted as the scalars it moves, without comparisons.

    Comparisons: LLVM sinks the test of a tile's bounds into the loop where something outside tests the same.
    """
    kept: Counter[str] = Counter()
    for opcode, times in loop.items():
        if not opcode.startswith("setp"):
            vector = re.search(r"\.v([248])(?=\.)", opcode)
            kept[opcode.replace(vector[0], "") if vector else opcode] += times * (int(vector[1]) if vector else 1)
    return kept
