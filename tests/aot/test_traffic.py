"""The counter of bytes, on programs that were worked by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from raas_jax.aot.traffic import ON_GPU, ON_TPU, account, total

F32 = 4


def moved(text, memory=ON_TPU):
    return {each.name: each for each in account(text, memory).moved}


def program(entry, *others):
    """A module; each computation is its head and its lines."""
    blocks = [*others, ("ENTRY %main (x: f32[]) -> f32[]", entry)]
    return "HloModule m, is_scheduled=true\n\n" + "\n\n".join(
        "\n".join([head + " {", *(f"  {line}" for line in lines), "}"]) for head, lines in blocks
    )


def test_a_product_that_was_compiled():
    """Both factors once, the result once; whatever XLA makes of it on a CPU."""
    a, b = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 128), (128, 32)))
    text = jax.jit(lambda a, b: a @ b).lower(a, b).compile().as_text()
    assert total(account(text).moved) == F32 * (64 * 128 + 128 * 32 + 64 * 32)


def test_a_loop_that_was_compiled():
    """A carried vector is read and written in each pass, and no more than a little around it."""

    def double(x):
        return jax.lax.fori_loop(0, 7, lambda _, x: jnp.sin(x) * 2, x)

    text = jax.jit(double).lower(jax.ShapeDtypeStruct((1000,), jnp.float32)).compile().as_text()
    found = [each for each in account(text).moved if each.loops]
    assert 7 * 2 * F32 * 1000 <= total(found) < 7 * (2 * F32 * 1000 + 100)


BODY = "%body (t: (s32[], f32[8], f32[5,8,8])) -> (s32[], f32[8], f32[5,8,8])"
CONDITION = (
    "%condition (t: (s32[], f32[8], f32[5,8,8])) -> pred[]",
    [
        "%t.1 = (s32[], f32[8]{0}, f32[5,8,8]{2,1,0}) parameter(0)",
        "%i.1 = s32[] get-tuple-element(%t.1), index=0",
        "%n = s32[] constant(5)",
        "ROOT %lt = pred[] compare(%i.1, %n), direction=LT",
    ],
)
STATE = [
    "%t = (s32[], f32[8]{0}, f32[5,8,8]{2,1,0}) parameter(0)",
    "%i = s32[] get-tuple-element(%t), index=0",
    "%v = f32[8]{0} get-tuple-element(%t), index=1",
    "%w = f32[5,8,8]{2,1,0} get-tuple-element(%t), index=2",
]
END = "ROOT %next = (s32[], f32[8]{0}, f32[5,8,8]{2,1,0}) tuple(%i, %dot, %w)"
MAIN = [
    "%x = f32[8]{0} parameter(0)",
    "%stack = f32[5,8,8]{2,1,0} parameter(1), "
    "metadata={op_name=\"params.weights['layers']['up']\"}",
    "%zero = s32[] constant(0)",
    "%start = (s32[], f32[8]{0}, f32[5,8,8]{2,1,0}) tuple(%zero, %x, %stack)",
    "%loop = (s32[], f32[8]{0}, f32[5,8,8]{2,1,0}) while(%start), condition=%condition, body=%body",
    "ROOT %out = f32[8]{0} get-tuple-element(%loop), index=1",
]
TAKE = (
    "%take (p: f32[5,8,8], j: s32[]) -> f32[8,8]",
    [
        "%p = f32[5,8,8]{2,1,0} parameter(0)",
        "%j = s32[] parameter(1)",
        "%o = s32[] constant(0)",
        "%cut = f32[1,8,8]{2,1,0} dynamic-slice(%p, %j, %o, %o), dynamic_slice_sizes={1,8,8}",
        "ROOT %flat = f32[8,8]{1,0} bitcast(%cut)",
    ],
)
FUSED = (
    "%fused (p: f32[5,8,8], j: s32[], u: f32[8]) -> f32[8]",
    [
        *TAKE[1][:-1],
        "%flat = f32[8,8]{1,0} bitcast(%cut)",
        "%u = f32[8]{0} parameter(2)",
        "ROOT %d = f32[8]{0} dot(%flat, %u), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
    ],
)


def test_a_slice_that_is_copied_counts_three_times():
    """Five passes: a slice of 64 numbers is read, written, and read again by the product."""
    copied = [
        *STATE,
        "%slice = f32[8,8]{1,0} fusion(%w, %i), kind=kLoop, calls=%take",
        "%dot = f32[8]{0} dot(%slice, %v), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
        END,
    ]
    found = moved(program(MAIN, TAKE, (BODY, copied), CONDITION))
    assert set(found) == {"slice", "dot"}
    slice_, dot = found["slice"], found["dot"]
    assert slice_.times == dot.times == 5
    # The index is a number, too.
    assert (slice_.reads, slice_.writes) == (F32 * (64 + 1), F32 * 64)
    assert (dot.reads, dot.writes) == (F32 * (64 + 8), F32 * 8)
    assert slice_.copies and not dot.copies
    assert slice_.of == dot.of == "layers.up"
    assert total(found.values()) == 5 * F32 * (65 + 64 + 72 + 8)


def test_a_slice_that_is_fused_is_read_once():
    text = program(
        MAIN,
        FUSED,
        (BODY, [*STATE, "%dot = f32[8]{0} fusion(%w, %i, %v), kind=kLoop, calls=%fused", END]),
        CONDITION,
    )
    [only] = account(text).moved
    assert (only.reads, only.writes, only.copies) == (F32 * (64 + 1 + 8), F32 * 8, False)
    assert only.times == 5


@pytest.mark.parametrize(
    ("loop", "times", "unknown"),
    [
        ('backend_config={"known_trip_count":{"n":"9"}}', 9, ()),
        ("", 5, ()),
        ("direction=GT", 1, ("loop",)),
    ],
)
def test_how_often_a_loop_runs(loop, times, unknown):
    """By what XLA says, by the bound in its condition, or not known."""
    body = (BODY, [*STATE, "%dot = f32[8]{0} negate(%v)", END])
    text = program(MAIN, body, CONDITION)
    if loop.startswith("direction"):
        text = text.replace("direction=LT", loop)
    else:
        text = text.replace("body=%body", f"body=%body, {loop}".rstrip(", "))
    found = account(text)
    assert [each.times for each in found.moved] == [times]
    assert found.unknown == unknown


UPDATE = [
    "%b = f32[100,8]{1,0} parameter(0)",
    "%row = f32[1,8]{1,0} parameter(1)",
    "%at = s32[] parameter(2)",
    "%o = s32[] constant(0)",
]
UPDATED = "%new = f32[100,8]{1,0} dynamic-update-slice(%b, %row, %at, %o)"


def test_an_update_in_place_writes_what_is_new():
    [only] = account(program([*UPDATE, f"ROOT {UPDATED}"])).moved
    assert (only.reads, only.writes) == (F32 * (8 + 2), F32 * 8)
    fused = (
        "%put (b: f32[100,8], row: f32[1,8], at: s32[]) -> f32[100,8]",
        [*UPDATE[:4], f"ROOT {UPDATED}"],
    )
    call = "ROOT %put.1 = f32[100,8]{1,0} fusion(%b, %row, %at), kind=kLoop, calls=%put"
    [only] = account(program([*UPDATE[:3], call], fused)).moved
    assert (only.reads, only.writes) == (F32 * (8 + 1), F32 * 8)
    # Also where the buffer has another name, with other tiles, inside.
    tiles = (
        "%tiles (p: f32[100,8]) -> f32[100,8]",
        ["%p = f32[100,8]{1,0} parameter(0)", "ROOT %c = f32[100,8]{1,0} copy(%p)"],
    )
    renamed = "%r = f32[100,8]{1,0} fusion(%b), output_to_operand_aliasing={{}: (0, {})}, "
    lines = [*UPDATE, renamed + "calls=%tiles", f"ROOT {UPDATED}".replace("(%b,", "(%r,")]
    [only] = account(program([*UPDATE[:3], call], tiles, (fused[0], lines))).moved
    assert (only.reads, only.writes) == (F32 * (8 + 1), F32 * 8)


def test_an_update_of_what_is_still_needed_writes_all():
    lines = [*UPDATE, UPDATED, "ROOT %both = f32[100,8]{1,0} add(%new, %b)"]
    found = moved(program(lines))
    assert found["new"].writes == F32 * 800
    assert found["new"].reads == F32 * (800 - 8 + 8 + 2)


def test_two_updates_of_one_buffer_in_one_fusion():
    twice = (
        "%twice (b: f32[100,8], row: f32[1,8], at: s32[]) -> f32[100,8]",
        [
            *UPDATE,
            UPDATED,
            "ROOT %newer = f32[100,8]{1,0} dynamic-update-slice(%new, %row, %o, %o)",
        ],
    )
    call = "ROOT %put = f32[100,8]{1,0} fusion(%b, %row, %at), kind=kLoop, calls=%twice"
    [only] = account(program([*UPDATE[:3], call], twice)).moved
    # The row is read once, and written twice.
    assert (only.reads, only.writes) == (F32 * (8 + 1), F32 * 16)


KERNEL = (
    '%out = f32[8]{0} custom-call(%q, %w), custom_call_target="tpu_custom_call", '
    'backend_config={"custom_call_config":{"cost_estimate":{"flops":"1","bytes_accessed":"100"}}}'
)


@pytest.mark.parametrize(
    ("space", "reads"), [("", 100.0), ("S(1)", 100 * 8 / (8 + 320))], ids=["memory", "on chip"]
)
def test_a_kernel_reads_what_it_declares(space, reads):
    """And nothing of the share of an operand that lies in VMEM."""
    tiles = f":T(8,128){space}"
    text = program(
        [
            "%q = f32[8]{0} parameter(0)",
            f"%w = f32[5,8,8]{{2,1,0{tiles}}} parameter(1)",
            f"ROOT {KERNEL}",
        ]
    )
    [only] = account(text).moved
    assert only.reads == pytest.approx(reads)
    assert only.writes == F32 * 8
    assert only.calls and only.op == "tpu_custom_call"


def test_a_kernel_that_declares_nothing_reads_one_layer_of_a_stack():
    """Brought in by the loop with its number of passes in front, also under another shape."""
    lines = [
        *STATE,
        "%flat = f32[40,8]{1,0} bitcast(%w)",
        '%dot = f32[8]{0} custom-call(%v, %flat, %i), custom_call_target="mosaic_gpu_v2"',
        END,
    ]
    [only] = account(program(MAIN, (BODY, lines), CONDITION), ON_GPU).moved
    assert only.reads == F32 * (8 + 64 + 1)
    # A loop over repeats of a pattern has fewer passes, within one over tokens.
    tokens = "%token (t: (s32[], f32[8], f32[5,8,8])) -> (s32[], f32[8], f32[5,8,8])"
    some = (
        CONDITION[0].replace("%condition", "%more"),
        [line.replace("constant(5)", "constant(3)") for line in CONDITION[1]],
    )
    inner = [
        *STATE[:1],
        "ROOT %layers = (s32[], f32[8]{0}, f32[5,8,8]{2,1,0}) while(%t), condition=%more, "
        "body=%body",
    ]
    outer = [line.replace("body=%body", "body=%token") for line in MAIN]
    text = program(outer, (BODY, lines), (tokens, inner), CONDITION, some)
    for layers, read in ((), 320), ((5,), 64), ((7,), 320):
        [only] = account(text, ON_GPU, layers).moved
        assert only.reads == F32 * (8 + read + 1) and only.times == 5 * 3
    # Outside of the loop it would be read whole.
    whole = [
        "%v = f32[8]{0} parameter(0)",
        "%w = f32[5,8,8]{2,1,0} parameter(1)",
        'ROOT %dot = f32[8]{0} custom-call(%v, %w), custom_call_target="mosaic_gpu_v2"',
    ]
    [only] = account(program(whole), ON_GPU).moved
    assert only.reads == F32 * (8 + 320)


def test_a_kernel_reads_what_the_name_of_its_place_says():
    """Of GPUs' kernels, which cannot declare it."""
    text = program(
        [
            "%q = f32[8]{0} parameter(0)",
            "%w = f32[5,8,8]{2,1,0} parameter(1)",
            'ROOT %out = f32[8]{0} custom-call(%q, %w), custom_call_target="mosaic_gpu_v2", '
            'metadata={op_name="jit(f)/reads_100_bytes/grouped_product/mpmd_map"}',
        ]
    )
    [only] = account(text, ON_GPU).moved
    assert only.reads == pytest.approx(100) and only.writes == F32 * 8
    assert only.what == "grouped_product/mpmd_map"


def test_a_kernel_that_writes_into_its_operand():
    text = program(
        [
            "%page = f32[8]{0} parameter(0)",
            "%w = f32[5,8,8]{2,1,0} parameter(1)",
            "ROOT %kept = f32[5,8,8]{2,1,0} custom-call(%page, %w), "
            'custom_call_target="tpu_custom_call", output_to_operand_aliasing={{}: (1, {})}, '
            'backend_config={"cost_estimate":{"bytes_accessed":"64"}}',
        ]
    )
    [only] = account(text).moved
    assert (only.reads, only.writes) == (64, 0)


def test_room_of_a_library_call_is_not_moved():
    text = program(
        [
            "%a = f32[8,8]{1,0} parameter(0)",
            "ROOT %d = (f32[8,8]{1,0}, s8[4096]{0}) custom-call(%a, %a), "
            'custom_call_target="__cublas$gemm"',
        ]
    )
    [only] = account(text, ON_GPU).moved
    assert only.writes == F32 * 64


def test_a_prefetch_is_one_read():
    """Of a copy to VMEM; what reads it there costs nothing."""
    text = program(
        [
            "%w = f32[64]{0:T(128)} parameter(0)",
            "%s = (f32[64]{0:T(128)S(1)}, f32[64]{0:T(128)}, u32[]{:S(2)}) copy-start(%w)",
            "%d = f32[64]{0:T(128)S(1)} copy-done(%s)",
            "%part = ((f32[64]{0}), f32[16]{0:S(1)}, s32[]{:S(2)}) slice-start(%w), slice={[0:16]}",
            "%p = f32[16]{0:S(1)} slice-done(%part)",
            "ROOT %n = f32[64]{0:T(128)} negate(%d)",
        ]
    )
    found = moved(text)
    assert {name: (each.reads, each.writes) for name, each in found.items()} == {
        "s": (F32 * 64, 0),
        "part": (F32 * 16, 0),
        "n": (0, F32 * 64),
    }
    assert found["s"].copies


def test_of_a_condition_the_worst_and_the_best():
    branches = [
        (
            f"%{name} (a: f32[64]) -> f32[64]",
            [f"%a.{name} = f32[64]{{0}} parameter(0)", *work(name)],
        )
        for name, work in (
            ("hard", lambda n: [f"ROOT %r.{n} = f32[64]{{0}} sine(%a.{n})"]),
            ("easy", lambda n: [f"ROOT %t.{n} = f32[64]{{0}} bitcast(%a.{n})"]),
        )
    ]
    text = program(
        [
            "%p = pred[] parameter(0)",
            "%x = f32[64]{0} parameter(1)",
            "ROOT %c = f32[64]{0} conditional(%p, %x, %x), true_computation=%hard, "
            "false_computation=%easy",
        ],
        *branches,
    )
    found = account(text)
    assert total(found.moved) == F32 * 128
    assert total(found.least) == 0
    assert found.conditions == ((),)


def test_a_fusion_that_asks_for_less_than_it_is_given():
    """A gather reads its rows; a broadcast its source; a reduction all of its input."""
    fused = (
        "%rows (table: f32[1000,8], ids: s32[3,1], bias: f32[8], deep: f32[3,16]) -> f32[3,8]",
        [
            "%table = f32[1000,8]{1,0} parameter(0)",
            "%ids = s32[3,1]{1,0} parameter(1)",
            "%g = f32[3,8]{1,0} gather(%table, %ids), slice_sizes={1,8}",
            "%bias = f32[8]{0} parameter(2)",
            "%b = f32[3,8]{1,0} broadcast(%bias), dimensions={1}",
            "%deep = f32[3,16]{1,0} parameter(3)",
            "%zero = f32[] constant(0)",
            "%r = f32[3]{0} reduce(%deep, %zero), dimensions={1}, to_apply=%add",
            "%rb = f32[3,8]{1,0} broadcast(%r), dimensions={0}",
            "%s = f32[3,8]{1,0} add(%g, %b)",
            "ROOT %out = f32[3,8]{1,0} multiply(%s, %rb)",
        ],
    )
    text = program(
        [
            "%t = f32[1000,8]{1,0} parameter(0)",
            "%i = s32[3,1]{1,0} parameter(1)",
            "%b0 = f32[8]{0} parameter(2)",
            "%d = f32[3,16]{1,0} parameter(3)",
            "ROOT %f = f32[3,8]{1,0} fusion(%t, %i, %b0, %d), kind=kLoop, calls=%rows",
        ],
        fused,
    )
    [only] = account(text).moved
    assert only.reads == F32 * (24 + 3 + 8 + 48)
    assert only.writes == F32 * 24


def test_a_text_that_is_no_program():
    with pytest.raises(ValueError, match="no ENTRY"):
        account("nothing")


def test_a_fusion_in_a_fusion_is_asked_for_as_much():
    """A change of layout of a whole stack, of which one layer is wanted."""
    inner = (
        "%whole (p0: f32[5,8,8]) -> f32[5,8,8]",
        ["%p0 = f32[5,8,8]{2,1,0} parameter(0)", "ROOT %c = f32[5,8,8]{2,1,0} copy(%p0)"],
    )
    outer = (
        "%one (p: f32[5,8,8], j: s32[]) -> f32[1,8,8]",
        [
            *TAKE[1][:3],
            "%f = f32[5,8,8]{2,1,0} fusion(%p), kind=kLoop, calls=%whole",
            "ROOT %cut = f32[1,8,8]{2,1,0} dynamic-slice(%f, %j, %o, %o)",
        ],
    )
    call = "ROOT %out = f32[1,8,8]{2,1,0} fusion(%p, %j), kind=kLoop, calls=%one"
    [only] = account(program([*TAKE[1][:2], call], inner, outer)).moved
    assert only.reads == F32 * (64 + 1)
    assert only.copies


def test_a_copy_on_another_core():
    """A call that runs beside the others: all of it is read and written, once."""
    there = (
        "%there (p: f32[64], t: token[]) -> f32[64]",
        [
            "%p = f32[64]{0} parameter(0)",
            "%t = token[] parameter(1)",
            "ROOT %c = f32[64]{0} copy(%p)",
        ],
    )
    lines = [
        '%x = f32[64]{0} parameter(0), metadata={op_name="state.cache.prompt.k"}',
        "%k = token[] after-all()",
        "%s = ((f32[64]{0}, token[]), f32[64]{0}) call-start(%x, %k), to_apply=%there",
        "ROOT %d = f32[64]{0} call-done(%s)",
    ]
    [only] = account(program(lines, there)).moved
    assert (only.reads, only.writes, only.copies) == (F32 * 64, F32 * 64, True)
    assert only.of == "cache.prompt.k"
