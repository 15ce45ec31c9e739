"""Read a compiled program: what it moves, copies, keeps in place and sends.

``Program(compiled.as_text())`` reads the optimized HLO of a GPU, a TPU or a CPU.

Bytes moved are those between the chip and its main memory in one run. An instruction
reads its operands and writes its results once. If an array is sliced or updated in
place, only the slice counts. The most expensive branch of a conditional counts. The
bodies of loops do not count, because the text does not say how often they run. The
bytes of one pass are counted apart. Arrays in a TPU's on-chip memory are free.
"""

import math
import re
from typing import NamedTuple

_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^{}]*\})?")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*)$")
# A type has no lower-case word before a parenthesis, so the first one is the opcode.
_OPCODE = re.compile(r" ([a-z][a-z0-9-]*)\(")
_ALIAS = re.compile(r"\{(\d*)\}: \(\d+, \{[\d, ]*\}(?:, [a-z]+-alias)?\)")

_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all"}
_FREE |= {"partition-id", "replica-id"}
_CONTROL = {"conditional", "while", "call", "async-start"}
_SLICES = {"dynamic-slice", "slice", "gather"}
# Opcodes that overwrite a part of their first operand, and the place of the new part
# among the operands.
_IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}
_COPIES = {"copy", "transpose", "reshape"}
_COLLECTIVES = ("all-", "reduce-scatter", "collective-", "ragged-all-")


class Array(NamedTuple):
    """An array type: f32[8,128]{1,0:T(8,128)S(1)}."""

    dtype: str
    shape: tuple
    layout: str

    @property
    def size(self):
        return math.prod(self.shape)

    @property
    def itemsize(self):
        """Bytes of an element: a half for s4, 0 for a token."""
        bits = re.search(r"\d+", self.dtype)
        return 1 if self.dtype == "pred" else int(bits[0]) / 8 if bits else 0

    @property
    def nbytes(self):
        return self.size * self.itemsize

    @property
    def on_chip(self):
        """Is it in a TPU's vector memory?"""
        return "S(1)" in self.layout

    def __str__(self):
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    opcode: str
    arrays: list  # results
    operands: list  # names
    inside: str  # text between the parentheses
    attributes: str  # text after them
    root: bool

    def called(self, *keys):
        """The computation that one of these attributes names, or None."""
        found = re.search(rf"\b(?:{'|'.join(keys)})=%?([\w.-]+)", self.attributes)
        return found and found[1]

    @property
    def free(self):
        """Does it only name data that exist already?"""
        named = self.opcode in _FREE or self.opcode.endswith("-done")
        # A TPU's views of adjacent slices.
        return named or 'custom_call_target="ConcatBitcast"' in self.attributes

    def branches(self):
        """The computations of a conditional."""
        many = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if many:
            return re.findall(r"[\w.-]+", many[1])
        return [self.called("true_computation"), self.called("false_computation")]


class Computation:
    """Instructions by name (with the root), parameters and users."""

    def __init__(self):
        self.instructions = {}
        self.root = None
        self.parameters = {}
        self.users = {}  # name -> instructions, and which of their operands it is

    def add(self, instruction):
        self.instructions[instruction.name] = instruction
        if instruction.root:
            self.root = instruction
        if instruction.opcode == "parameter":
            self.parameters[int(instruction.inside)] = instruction
        for place, operand in enumerate(instruction.operands):
            self.users.setdefault(operand, []).append((instruction, place))

    def results(self):
        """The instructions that make what the computation returns."""
        if self.root.opcode == "tuple":
            return [self.instructions[name] for name in self.root.operands]
        return [self.root]


class Program:
    """An optimized HLO module."""

    def __init__(self, text):
        self.computations, self.entry, current = {}, None, None
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                current = self.computations[header[2]] = Computation()
                self.entry = current if header[1] else self.entry
            elif current is not None and (found := _INSTRUCTION.match(line)):
                current.add(_parse(found[2], found[3], bool(found[1])))
        if self.entry is None:
            raise ValueError("The text has no ENTRY: it is not an HLO module.")
        self._header = text.split("\n", 1)[0]

    # What runs

    def running(self, computation=None):
        """Instructions that run, but for those inside fusions and reductions."""
        for i in (computation or self.entry).instructions.values():
            yield i
            for name in self._runs(i):
                yield from self.running(self.computations[name])

    def _runs(self, i):
        """Names of the computations that an instruction runs."""
        if i.opcode == "conditional":
            return i.branches()
        if i.opcode == "while":
            return [i.called("body")]
        if i.opcode in ("call", "async-start"):
            return [i.called("to_apply", "calls")]
        return []

    @property
    def loops(self):
        """How many loops run."""
        return sum(i.opcode == "while" for i in self.running())

    # What it makes

    def copies(self, smallest):
        """Names and arrays of whole copies of at least ``smallest`` elements.

        Changes of layout count, by themselves or in a fusion. Transfers to a TPU's
        on-chip memory do not.
        """
        found = []
        for i in self.running():
            if i.opcode == "copy-start":
                to, source = i.arrays[:2]
                made = [] if to.on_chip or source.on_chip else [(to, "copy")]
            else:
                made = self._made(i)
            for array, opcode in made:
                if opcode in _COPIES and array.size >= smallest:
                    found.append(f"{i.name}: {opcode} of {array}")
        return found

    def stacks(self, leaves):
        """Names and arrays of stacks that are written in full, not updated in place.

        ``leaves`` are the sizes of leaves. A stack has more elements than the smallest
        of them, and its size is none of theirs.
        """
        found = []
        for i in self.running():
            if i.free or i.opcode.endswith("-start"):
                continue
            for array, opcode in self._made(i):
                stack = array.size > min(leaves) and array.size not in leaves
                if stack and opcode not in {*_IN_PLACE, *_COPIES, *_FREE}:
                    found.append(f"{i.name}: {opcode} to {array}")
        return found

    def _made(self, i):
        """The results of an instruction, and the opcodes that make them."""
        if i.opcode in _CONTROL:
            return []
        if i.opcode != "fusion":
            return [(array, i.opcode) for array in i.arrays]
        within = self.computations[i.called("calls")]
        made = [self._maker(within, result) for result in within.results()]
        return list(zip(i.arrays, made))

    def _maker(self, within, i):
        """The opcode that makes a result of a fusion.

        It is a copy if nothing else happens to a parameter. A computed value can be
        written in another layout at no cost.
        """
        copied = False
        while i.opcode in _COPIES | {"bitcast"}:
            copied |= i.opcode != "bitcast"
            i = within.instructions[i.operands[0]]
        if copied and i.opcode == "parameter":
            return "copy"
        if i.opcode == "fusion":
            within = self.computations[i.called("calls")]
            return self._maker(within, within.results()[0])
        return i.opcode

    # What stays in place

    def unaliased(self):
        """The results that share the memory of no argument."""
        aliases = re.search(r"input_output_alias=\{(.*)", self._header)
        found = _ALIAS.findall(aliases[1]) if aliases else []
        aliased = {int(index or 0) for index in found}
        results = self.entry.root.arrays
        return [array for k, array in enumerate(results) if k not in aliased]

    # What it sends

    def collectives(self):
        """The instructions that send, also those inside fusions."""
        found = []
        for i in self.running():
            inside = [i]
            if i.opcode == "fusion":
                inside = self.computations[i.called("calls")].instructions.values()
            found += [
                j
                for j in inside
                if j.opcode.startswith(_COLLECTIVES) and not j.opcode.endswith("-done")
            ]
        return found

    # Bytes moved

    def moved(self, computation=None):
        """Bytes between the chip and its main memory in one run."""
        computation = computation or self.entry
        total = 0
        for i in computation.instructions.values():
            if i.opcode == "while":
                continue
            branches = [self.moved(self.computations[name]) for name in self._runs(i)]
            total += max(branches) if branches else self._cost(computation, i)
        return total

    def moved_in_loops(self):
        """The same for one pass through the body of every loop."""
        bodies = [i.called("body") for i in self.running() if i.opcode == "while"]
        return sum(self.moved(self.computations[name]) for name in bodies)

    def _cost(self, within, i):
        if i.free:
            return 0
        if i.opcode in ("copy-start", "slice-start"):
            return _transfer(min(a.nbytes for a in i.arrays[:2]), *i.arrays[:2])
        if i.opcode in _IN_PLACE:
            part = within.instructions[i.operands[_IN_PLACE[i.opcode]]].arrays[0]
            return _transfer(part.nbytes, part, i.arrays[0])
        if i.opcode in _SLICES:
            source = within.instructions[i.operands[0]].arrays[0]
            return _transfer(i.arrays[0].nbytes, source, i.arrays[0])
        return self._read(within, i) + self._written(i)

    def _read(self, within, i):
        total = 0
        for place, name in enumerate(i.operands):
            for array in within.instructions[name].arrays:
                if array.on_chip:
                    continue
                if i.opcode == "fusion":
                    total += self._read_by_fusion(i, place, array)
                else:
                    total += array.nbytes
        return total

    def _read_by_fusion(self, fusion, place, array):
        within = self.computations[fusion.called("calls")]
        return self._used(within, within.parameters[place], array)

    def _used(self, within, i, array):
        """Bytes of ``array`` that are read by the users of ``i``, a view of it."""
        total = 0
        for user, place in within.users.get(i.name, []):
            if user.opcode in _SLICES and place == 0:
                total += user.arrays[0].size * array.itemsize
            elif user.opcode in _IN_PLACE and place == 0:
                pass
            elif user.opcode in ("bitcast", "copy", "convert") and not user.root:
                total += self._used(within, user, array)
            elif user.opcode == "fusion" and "copy_fusion" in user.attributes:
                # A TPU changes the tiling during the read, window by window.
                total += self._used(within, user, array)
            elif user.opcode == "fusion":
                total += self._read_by_fusion(user, place, array)
            else:
                total += array.nbytes
        return min(total, array.nbytes)

    def _written(self, i):
        written = [array.nbytes for array in i.arrays]
        if i.opcode == "fusion":
            inside = self._written_by_fusion(i)
            written = inside if len(inside) == len(written) else written
        return sum(n for n, array in zip(written, i.arrays) if not array.on_chip)

    def _written_by_fusion(self, fusion):
        within = self.computations[fusion.called("calls")]
        written = []
        for i in within.results():
            while i.opcode == "bitcast":
                i = within.instructions[i.operands[0]]
            if i.opcode == "fusion":
                written += self._written_by_fusion(i)
            elif i.opcode in _IN_PLACE:
                part = within.instructions[i.operands[_IN_PLACE[i.opcode]]].arrays[0]
                written.append(part.nbytes)
            else:
                written += [array.nbytes for array in i.arrays]
        return written


def _parse(name, text, root):
    """An instruction from the text after its name."""
    opcode = _OPCODE.search(f" {text}")
    begin = opcode.end() - 1
    end = _closing(text, begin - 1)
    inside = text[begin:end]
    return Instruction(
        name=name,
        opcode=opcode[1],
        arrays=_arrays(text[: opcode.start()]),
        operands=re.findall(r"%([\w.-]+)", inside),
        inside=inside,
        attributes=text[end + 1 :],
        root=root,
    )


def _arrays(text):
    return [
        Array(dtype, tuple(int(n) for n in shape.split(",") if n), layout)
        for dtype, shape, layout in _ARRAY.findall(text)
    ]


def _closing(text, begin):
    """The place of the parenthesis that closes the one at ``begin``."""
    depth = 0
    for found in re.finditer(r"[()]", text[begin:]):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return begin + found.start()
    return len(text)


def _transfer(nbytes, *ends):
    """Bytes through main memory for ``nbytes`` that go from one array to another."""
    return nbytes * sum(not array.on_chip for array in ends)
