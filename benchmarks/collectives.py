"""What a compiled program sends between devices, read from its HLO text."""

import dataclasses
import functools
import math
import re

# Opcodes of collectives -> bytes a device sends in a ring of n, for each byte of the result.
SENT_PER_BYTE = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-gather": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}
COMPUTE = {"fusion", "convolution", "dot", "custom-call", "while", "call", "conditional", "reduce"}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a compiled program.

    Attributes:
      kind: opcode, a key of SENT_PER_BYTE.
      num_bytes: of its result on one device.
      group_size: devices that take part together.
      times: how often a step runs it, by the lengths of the loops around it.
      overlapped: it is split into a start and an end, with compute between them.
    """

    kind: str
    num_bytes: int
    group_size: int
    times: int
    overlapped: bool

    @property
    def bytes_per_step(self):
        return self.num_bytes * self.times

    @property
    def sent_per_step(self):
        """Bytes that a device sends, if it is done as a ring."""
        return SENT_PER_BYTE[self.kind](self.group_size) * self.bytes_per_step


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes


def find_collectives(hlo_text, num_devices):
    """The collectives that one run of a compiled and scheduled program executes.

    A collective in a loop counts as often as the loop is known to turn; of a conditional, all
    branches count. An asynchronous pair counts once, with the shape of its end.

    Args:
      hlo_text: `compiled.as_text()`.
      num_devices: that run the program; the group of collectives that name none.
    Returns:
      List of Collective.
    Raises:
      ValueError: a collective is in a loop whose length the compiler does not know.
    """
    computations, entry = _parse_hlo(hlo_text)

    @functools.cache
    def visit(name):
        instructions = computations[name]
        found = []
        for index, instruction in enumerate(instructions):
            kind = instruction.opcode.removesuffix("-start")
            if kind in SENT_PER_BYTE:
                found.append(_collective(kind, instructions, index, num_devices))
                continue
            inner = [c for called in _called(instruction.rest) for c in visit(called)]
            trips = 1
            if instruction.opcode == "while" and inner:
                trips = _trip_count(instruction)
            found += [dataclasses.replace(c, times=c.times * trips) for c in inner]
        return found

    return visit(entry)


def _parse_hlo(text):
    """({computation: [_Instruction, ...] in order of execution}, name of the entry)."""
    computations, entry = {}, None
    header = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
    line_of = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.+?) ([a-z][\w-]*)\((.*)$")
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if match := header.match(line):
            name = match[2]
            computations[name] = []
            entry = name if match[1] else entry
        elif computations and (match := line_of.match(line)):
            computations[name].append(_Instruction(*match.groups()))
    return computations, entry


def _called(rest):
    """Names of the computations that an instruction runs."""
    groups = re.findall(
        r"(?:body|condition|calls|to_apply|branch_computations|\w+_computation)="
        r"(?:\{([^}]*)\}|%?([\w.-]+))",
        rest,
    )
    return [name.strip().lstrip("%") for group in groups for name in "".join(group).split(",")]


def _trip_count(loop):
    match = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
    if match is None:
        raise ValueError(f"loop {loop.name} holds collectives and its length is not known")
    return int(match[1])


def _collective(kind, instructions, index, num_devices):
    start = instructions[index]
    end, between = start, []
    if start.opcode.endswith("-start"):
        done = kind + "-done"
        last = next(
            i
            for i, other in enumerate(instructions)
            if other.opcode == done and re.search(r"%([\w.-]+)", other.rest)[1] == start.name
        )
        end, between = instructions[last], instructions[index + 1 : last]
    return Collective(
        kind=kind,
        num_bytes=shape_bytes(end.shape),
        group_size=_group_size(start.rest, num_devices),
        times=1,
        overlapped=any(other.opcode in COMPUTE for other in between),
    )


def shape_bytes(shape):
    """Bytes of an HLO shape, or of all parts of a tuple: "(f32[8,3]{1,0}, bf16[2]{0})" has 100."""
    total = 0
    for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape):
        bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
        total += math.prod(int(n) for n in dims.split(",") if n) * bits
    return math.ceil(total / 8)


def _group_size(attributes, num_devices):
    """Devices in a group: {{0,1},{2,3}}, [2,4]<=[8] or mesh['a'=2,'b'=4] {'b'}; {} means all."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[(.*?)\].*?\{(.*?)\}", attributes):
        sizes = dict(re.findall(r"('.*?')=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'.*?'", match[2]))
    return num_devices
