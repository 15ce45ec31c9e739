"""The reader of compiled programs, on short texts counted by hand."""

import jax
import jax.numpy as jnp
import pytest
from hlo import Program

LEAF = 8 * 128

# A slot is written in place, another is read, and the parameters change. A conditional
# and a loop come before.
STEP = """\
HloModule step, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias), \
{1}: (1, {}, may-alias) }, entry_computation_layout={(f32[8,128]{1,0})->f32[8,128]{1,0}}

%write (p0: f32[3,8,128], p1: s32[], p2: f32[8,128]) -> f32[3,8,128] {
  %p0 = f32[3,8,128]{2,1,0:T(8,128)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %p2 = f32[8,128]{1,0:T(8,128)} parameter(2)
  %zero = s32[] constant(0)
  %slot = f32[1,8,128]{2,1,0:T(8,128)} bitcast(%p2)
  ROOT %new = f32[3,8,128]{2,1,0:T(8,128)} dynamic-update-slice(%p0, %slot, %p1, \
/*index=3*/%zero, %zero), metadata={op_name="jit(step)/scatter (of one)"}
}

%apply (q0: f32[8,128], q1: f32[3,8,128], q2: s32[]) -> (f32[8,128], f32[8]) {
  %q0 = f32[8,128]{1,0} parameter(0)
  %q1 = f32[3,8,128]{2,1,0} parameter(1)
  %q2 = s32[] parameter(2)
  %none = s32[] constant(0)
  %old = f32[1,8,128]{2,1,0} dynamic-slice(%q1, %q2, %none, %none), \
dynamic_slice_sizes={1,8,128}
  %flat = f32[8,128]{1,0} bitcast(%old)
  %sum = f32[8,128]{1,0} add(%q0, %flat)
  %rows = f32[8]{0} reduce(%sum, %none), dimensions={1}, to_apply=%adder
  ROOT %both = (f32[8,128]{1,0}, f32[8]{0}) tuple(%sum, %rows)
}

%adder (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%dear (d: (f32[8,128])) -> f32[8,128] {
  %d = (f32[8,128]{1,0}) parameter(0)
  %d0 = f32[8,128]{1,0} get-tuple-element(%d), index=0
  ROOT %twice = f32[8,128]{1,0} add(%d0, %d0)
}

%cheap (e: (f32[8,128])) -> f32[8,128] {
  %e = (f32[8,128]{1,0}) parameter(0)
  ROOT %e0 = f32[8,128]{1,0} get-tuple-element(%e), index=0
}

%body (w: (f32[8,128])) -> (f32[8,128]) {
  %w = (f32[8,128]{1,0}) parameter(0)
  %w0 = f32[8,128]{1,0} get-tuple-element(%w), index=0
  %negative = f32[8,128]{1,0} negate(%w0)
  ROOT %w1 = (f32[8,128]{1,0}) tuple(%negative)
}

%condition (v: (f32[8,128])) -> pred[] {
  %v = (f32[8,128]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (params: f32[8,128], slots: f32[3,8,128], place: s32[]) -> \
(f32[8,128], f32[3,8,128], f32[8]) {
  %params = f32[8,128]{1,0:T(8,128)} parameter(0)
  %slots = f32[3,8,128]{2,1,0:T(8,128)} parameter(1)
  %place = s32[]{:T(128)} parameter(2), sharding={replicated}
  %yes.1 = pred[]{:T(512)} constant(true)
  %state = (f32[8,128]{1,0}) tuple(%params)
  %chosen = f32[8,128]{1,0} conditional(%yes.1, %state, %state), \
true_computation=%dear, false_computation=%cheap
  %start = (f32[8,128]{1,0}) tuple(%chosen)
  %loop = (f32[8,128]{1,0}) while(%start), condition=%condition, body=%body
  %done = f32[8,128]{1,0} get-tuple-element(%loop), index=0
  %written = f32[3,8,128]{2,1,0} fusion(%slots, %place, %done), kind=kLoop, calls=%write
  %applied = (f32[8,128]{1,0}, f32[8]{0}) fusion(%done, %written, %place), \
kind=kLoop, calls=%apply, backend_config={"estimated_cycles":"7"}
  %new.params = f32[8,128]{1,0} get-tuple-element(%applied), index=0
  %norms = f32[8]{0} get-tuple-element(%applied), index=1
  ROOT %result = (f32[8,128]{1,0}, f32[3,8,128]{2,1,0}, f32[8]{0}) \
tuple(%new.params, %written, %norms)
}
"""


def entry(*lines, before="", alias=""):
    """A program whose entry has these lines."""
    body = "\n".join(f"  {line}" for line in lines)
    return Program(
        f"HloModule m{alias}\n\n{before}\nENTRY %main () -> () {{\n{body}\n}}"
    )


def test_a_step_by_hand():
    step = Program(STEP)
    leaf, index, norms = 4 * LEAF, 4, 4 * 8
    dear = 2 * leaf + leaf  # both operands of the sum, and what it writes
    written = leaf + index + leaf  # read by the write, and one slot
    applied = leaf + leaf + index + leaf + norms  # two arrays; one of the slots
    assert step.moved() == dear + written + applied
    assert step.moved_in_loops() == 2 * leaf
    assert step.loops == 1
    assert step.copies(LEAF) == step.stacks({LEAF}) == step.collectives() == []
    assert [str(array) for array in step.unaliased()] == ["f32[8]"]


def test_memory_on_the_chip_is_free():
    there = "f32[8,128]{1,0:T(8,128)S(1)}"
    program = entry(
        "%x = f32[8,128]{1,0:T(8,128)} parameter(0)",
        f"%s = ({there}, f32[8,128]{{1,0:T(8,128)}}, u32[]{{:S(2)}}) copy-start(%x)",
        f"%y = {there} copy-done(%s)",
        f"%z = {there} add(%y, %y)",
        "ROOT %r = f32[8,128]{1,0:T(8,128)} negate(%z)",
    )
    assert program.moved() == 2 * 4 * LEAF
    assert program.copies(LEAF) == []


def test_whole_copies_are_found_and_named():
    program = entry(
        "%x = f32[8,128]{1,0} parameter(0)",
        "%small = s32[5]{0} parameter(1)",
        "%a = f32[8,128]{0,1} copy(%x)",
        "%b = f32[8,128]{1,0} fusion(%a), kind=kLoop, calls=%turn",
        "%c = (f32[8,128]{1,0}, f32[8,128]{1,0}, u32[]) copy-start(%b)",
        "%d = f32[8,128]{1,0} copy-done(%c)",
        "%e = s32[5]{0} copy(%small)",
        "ROOT %f = f32[8,128]{0,1} fusion(%d), kind=kLoop, calls=%compute",
        before="""
%turn (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{0,1} parameter(0)
  %t = f32[128,8]{1,0} transpose(%p), dimensions={1,0}
  ROOT %u = f32[8,128]{1,0} bitcast(%t)
}

%compute (q: f32[8,128]) -> f32[8,128] {
  %q = f32[8,128]{1,0} parameter(0)
  %n = f32[8,128]{1,0} negate(%q)
  ROOT %l = f32[8,128]{0,1} copy(%n)
}
""",
    )
    # A computed value that is written in another layout is not a copy.
    assert [line.split(":")[0] for line in program.copies(LEAF)] == ["a", "b", "c"]
    assert program.copies(LEAF)[0] == "a: copy of f32[8,128]"
    assert len(program.copies(5)) == 4
    # Four reads and four writes of a leaf, and two of the five numbers.
    assert program.moved() == 4 * 2 * 4 * LEAF + 2 * 4 * 5


def test_stacks_made_anew_are_found_and_those_in_place_are_not():
    program = entry(
        "%x = f32[2,8,128]{2,1,0} parameter(0)",
        "%leaf = f32[8,128]{1,0} parameter(1)",
        "%place = s32[] parameter(2)",
        "%one = f32[1,8,128]{2,1,0} bitcast(%leaf)",
        "%kept = f32[2,8,128]{2,1,0} dynamic-update-slice(%x, %one, %place)",
        "%chosen = (f32[8,128]{1,0}, f32[2,8,128]{2,1,0}) fusion(%kept, %leaf), "
        "kind=kLoop, calls=%choose",
        "%new = f32[2,8,128]{2,1,0} get-tuple-element(%chosen), index=1",
        "%view = f32[2,8,128]{2,1,0} custom-call(%new), "
        'custom_call_target="ConcatBitcast"',
        "ROOT %both = f32[2,8,128]{2,1,0} multiply(%view, %view)",
        before="""
%choose (p: f32[2,8,128], q: f32[8,128]) -> (f32[8,128], f32[2,8,128]) {
  %p = f32[2,8,128]{2,1,0} parameter(0)
  %q = f32[8,128]{1,0} parameter(1)
  %y = pred[2,8,128]{2,1,0} constant({...})
  %w = f32[2,8,128]{2,1,0} broadcast(%q), dimensions={1,2}
  %s = f32[2,8,128]{2,1,0} select(%y, %w, %p)
  %n = f32[8,128]{1,0} negate(%q)
  ROOT %t = (f32[8,128]{1,0}, f32[2,8,128]{2,1,0}) tuple(%n, %s)
}
""",
    )
    assert program.stacks({LEAF}) == [
        "chosen: select to f32[2,8,128]",
        "both: multiply to f32[2,8,128]",
    ]
    # There are leaves of that size, so a stack cannot be told from them.
    assert program.stacks({LEAF, 2 * LEAF}) == []
    leaf = 4 * LEAF
    assert program.moved() == (2 + 2 * (2 + 1) + 3 * 2) * leaf


def test_a_slice_of_bytes_is_counted_in_bytes():
    """int8 slots that are widened before they are sliced are still read as int8."""
    program = entry(
        "%x = s8[4,8,128]{2,1,0} parameter(0)",
        "%place = s32[] parameter(1)",
        "ROOT %y = bf16[8,128]{1,0} fusion(%x, %place), kind=kLoop, calls=%widen",
        before="""
%widen (p: s8[4,8,128], q: s32[]) -> bf16[8,128] {
  %p = s8[4,8,128]{2,1,0} parameter(0)
  %q = s32[] parameter(1)
  %c = bf16[4,8,128]{2,1,0} convert(%p)
  %s = bf16[1,8,128]{2,1,0} dynamic-slice(%c, %q), dynamic_slice_sizes={1,8,128}
  %z = bf16[8,128]{1,0} bitcast(%s)
  ROOT %n = bf16[8,128]{1,0} negate(%z)
}
""",
    )
    assert program.moved() == LEAF + 4 + 2 * LEAF


def test_a_scatter_counts_only_what_it_writes():
    """On a GPU, a vmapped write of one slot counts as one slot."""
    program = entry(
        "%slots = f32[3,4,8,128]{3,2,1,0} parameter(0)",
        "%places = s32[3,2]{1,0} parameter(1)",
        "%new = f32[3,8,128]{2,1,0} parameter(2)",
        "ROOT %y = f32[3,4,8,128]{3,2,1,0} fusion(%slots, %places, %new), "
        "kind=kInput, calls=%write",
        before="""
%write (p: f32[3,4,8,128], q: s32[3,2], r: f32[3,8,128]) -> f32[3,4,8,128] {
  %p = f32[3,4,8,128]{3,2,1,0} parameter(0)
  %q = s32[3,2]{1,0} parameter(1)
  %r = f32[3,8,128]{2,1,0} parameter(2)
  ROOT %s = f32[3,4,8,128]{3,2,1,0} scatter(%p, %q, %r), to_apply=%second
}
""",
    )
    assert program.moved() == 4 * 6 + 2 * 4 * 3 * LEAF
    assert program.stacks({3 * LEAF}) == []


@pytest.mark.parametrize(
    ("dtype", "nbytes"),
    [("s4", 0.5), ("pred", 1), ("f8e4m3fn", 1), ("bf16", 2), ("u32", 4), ("c64", 8)],
)
def test_bytes_of_an_element(dtype, nbytes):
    program = entry(f"ROOT %x = {dtype}[10]{{0}} parameter(0)")
    (array,) = program.unaliased()
    assert array.nbytes == 10 * nbytes


def test_what_is_sent_is_found_in_branches_and_in_fusions():
    program = entry(
        "%x = f32[4]{0} parameter(0)",
        "%n = f32[4]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add",
        "%g = (f32[4]{0}, f32[8]{0}) all-gather-start(%n), dimensions={0}",
        "%h = f32[8]{0} all-gather-done(%g)",
        "ROOT %f = f32[2]{0} fusion(%h), kind=kCustom, calls=%scatter",
        before="""
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%scatter (p: f32[8]) -> f32[2] {
  %p = f32[8]{0} parameter(0)
  ROOT %s = f32[2]{0} reduce-scatter(%p), dimensions={0}, to_apply=%add
}
""",
    )
    found = [(i.opcode, i.arrays[-1].size) for i in program.collectives()]
    assert found == [("all-reduce", 4), ("all-gather-start", 8), ("reduce-scatter", 2)]


def test_a_single_result_may_be_aliased():
    line = "ROOT %x = f32[4]{0} parameter(0)"
    alias = ", input_output_alias={ {}: (0, {}, may-alias) }"
    assert entry(line, alias=alias).unaliased() == []
    assert len(entry(line).unaliased()) == 1


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="The text has no ENTRY"):
        Program("HloModule empty\n")


def test_a_program_that_was_compiled_here():
    """On any platform donated memory is written in place, and a sum is counted."""
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    add = jax.jit(lambda x, y: x + y, donate_argnums=0)
    program = Program(add.lower(x, x).compile().as_text())
    assert program.moved() == 3 * 4 * x.size
    assert program.unaliased() == program.copies(256) == []
