"""Equivalent mutants: what is excused, and that nothing more is."""

from __future__ import annotations

import pytest

pytest.importorskip("numpy", reason="needs the extra `verify`")

from small_ptx import MODULE

from build_kernels.mutants.operators.edits import OPERATORS
from build_kernels.mutants.operators.equivalents import equivalents, why_equivalent
from build_kernels.mutants.operators.mutation import mutations_of
from build_kernels.mutants.operators.ranges import NOTHING, Facts, Interval


def excused(
    body: str, facts: Facts = NOTHING, *, of: int = 0, kernel: str = "k"
) -> dict[tuple[str, str], str | None]:
    """Return why each mutant of instruction `of` is equivalent, by operator and new text."""
    found = mutations_of(f"{kernel}.sm_90a", MODULE.format(body=body), "sm_90a", facts)
    return {(m.operator, m.after_words): why_equivalent(m) for m in found if m.index == of}


READ = "st.global.b32 [%rd1], %r1; @%p1 st.global.b32 [%rd1], %r2;"
WAIT = "mbarrier.try_wait.parity.shared.b64 %p1, [%r1], %r2, {};"
SHUFFLE = "shfl.sync.idx.b32 %r1, %r2, {};"


def test_a_prefetch_and_a_result_that_nothing_reads_are_excused() -> None:
    assert all(excused("prefetch.global.L2 [%rd1];").values())
    assert all(excused("@%p1 prefetch.global.L2 [%rd1];").values())
    assert not any(excused("st.global.b32 [%rd1], %r1;").values())
    unread = excused("add.s32 %r1, %r2, 1;")
    assert all(unread.values())
    assert not any(excused(f"add.s32 %r1, %r2, 1; {READ}").values())
    assert not any(excused("ld.global.b32 %r1, [%rd1];").values()), "its address may be wrong"


def test_a_cache_hint_is_excused_and_the_copy_is_not() -> None:
    copy = "cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes"
    copy += ".L2::cache_hint [%r1], [%rd1, {%r2, %r2}], [%r3], %rd2"
    text = "mov.b64 %rd3, 5; mov.b64 %rd2, {}; {}; st.global.b64 [%rd1], %rd3;"
    of_hint = excused(text.format(0, copy), of=1)
    assert of_hint["immediate", "mov.b64 %rd2, 1"]
    assert of_hint["dropped", ""]
    assert not excused(text.format(5, copy), of=1)["immediate", "mov.b64 %rd2, 6"]
    of_copy = excused(text.format(0, copy), of=2)
    assert of_copy["register", copy[:-1] + "3"]
    assert {reason for (name, _), reason in of_copy.items() if name != "register"} == {None}
    assert sum(reason is not None for reason in of_copy.values()) == 1


def test_the_correction_of_a_negative_quotient_is_excused() -> None:
    text = "and.b32 %r4, %r3, -8; setp.ne.b32 %p1, %r3, %r4; setp.lt.s32 %p2, %r5, {}; "
    text += "and.pred %p3, %p2, %p1; selp.b32 %r2, -1, 0, %p3; " + READ
    changes = (
        (0, ("immediate", "and.b32 %r4, %r3, -7")),
        (1, ("comparison", "setp.eq.b32 %p1, %r3, %r4")),
        (4, ("immediate", "selp.b32 %r2, 0, 0, %p3")),
        (2, ("comparison", "setp.le.s32 %p2, %r5, {}")),
    )
    for at, change in changes:
        for bound in (-7, 7):
            named = (change[0], change[1].format(bound))
            assert bool(excused(text.format(bound), of=at)[named]) == (bound < 0), named
    assert not excused(text.format(-7), of=2)["signedness", "setp.lt.u32 %p2, %r5, -7"]
    assert not excused(text.format(-7), of=4)["immediate", "selp.b32 %r2, -1, 1, %p3"]
    assert not excused(text.format(-7), of=3)["dropped", ""]


def test_the_hint_of_a_wait_is_excused_and_the_wait_is_not() -> None:
    found = excused(WAIT.format(10000000))
    assert {key for key, reason in found.items() if reason} == {
        ("immediate", WAIT.format(n)[:-1]) for n in (9999999, 10000001)
    }
    assert len(found) > 2


@pytest.mark.parametrize(
    ("lane", "clamps"),
    [("0", {"30", "32"}), ("30", {"30"}), ("31", set()), ("%r3", set())],
)
def test_a_clamp_is_excused_that_the_lane_lies_within(lane: str, clamps: set[str]) -> None:
    found = excused(SHUFFLE.format(f"{lane}, 31, -1") + READ)
    expected = {SHUFFLE.format(f"{lane}, {clamp}, -1")[:-1] for clamp in clamps}
    assert {text for (_, text), reason in found.items() if reason} == expected


def test_an_order_that_a_sign_check_has_decided_is_excused() -> None:
    text = "setp.lt.s64 %p1, %rd1, 0; setp.ge.s64 %p2, %rd1, %rd2; or.pred %p3, %p1, {}; "
    text += "@%p3 st.global.b32 [%rd1], %r1; @%p2 st.global.b32 [%rd1], %r1; " + READ
    changed = ("signedness", "setp.ge.u64 %p2, %rd1, %rd2")
    assert excused(text.format("%p2"), of=1)[changed]
    assert not excused(text.format("%p1"), of=1)[changed]


def test_the_wait_of_the_first_round_may_be_made() -> None:
    text = "setp.eq.b32 %p1, %r3, 0; @%p1 bra DONE; not.b32 %r4, %r3; and.b32 %r2, %r4, {}; "
    text += WAIT.format(10000000) + " DONE: " + READ
    assert excused(text.format(1), of=1)["dropped", ""]
    assert not excused(text.format(2), of=1)["dropped", ""]
    assert not excused(text.format(1), of=1)["other-guard", "@!%p1 bra DONE"]


def test_the_value_of_a_block_that_is_not_there_is_excused() -> None:
    text = "mov.b32 %r1, 0; mov.b32 %r2, 0; setp.lt.s32 %p1, %r3, 2; @%p1 bra NONE; "
    text += "add.s64 %rd2, %rd1, 14; and.b64 %rd3, %rd2, -16; "
    text += "ld.global.v4.b32 {{%r1, {}, %r4, %r5}}, [%rd3]; NONE: " + READ
    assert excused(text.format("%r2"), of=1)["immediate", "mov.b32 %r2, 1"]
    assert not excused(text.format("%r6"), of=1)["immediate", "mov.b32 %r2, 1"]


def test_the_last_place_of_the_least_coefficient_is_excused_and_of_others_not() -> None:
    assert excused("mov.b32 %r1, 958458266;" + READ)["immediate", "mov.b32 %r1, 958458267"]
    assert not excused("mov.b32 %r1, 984588981;" + READ)["immediate", "mov.b32 %r1, 984588982"]


@pytest.mark.parametrize(
    ("offset", "then", "changes"),
    [
        (14, "and.b64 %rd3, %rd2, -16;", {13, 15}),
        (16, "and.b64 %rd3, %rd2, -16;", {17}),
        (14, "and.b64 %rd3, %rd2, 16;", set()),
        (14, "and.b64 %rd3, %rd1, -16;", set()),
        (14, "and.b64 %rd3, %rd2, -16; st.global.b64 [%rd1], %rd2;", set()),
    ],
    ids=["both", "one", "no mask", "another sum", "read once more"],
)
def test_an_offset_that_is_rounded_away_is_excused(
    offset: int, then: str, changes: set[int]
) -> None:
    text = f"add.s64 %rd2, %rd1, {offset}; {then} st.global.b64 [%rd3], %rd1;"
    found = excused(text + "@%p1 st.global.b64 [%rd3], %rd2;" * ("%rd1, -16" in then))
    assert {text for (_, text), reason in found.items() if reason} == {
        f"add.s64 %rd2, %rd1, {change}" for change in changes
    }


def only(found: dict[tuple[str, str], str | None]) -> set[str]:
    """Return the new texts that are excused."""
    return {text for (_, text), reason in found.items() if reason}


def test_the_sign_may_be_shifted_out_by_32_bits() -> None:
    assert only(excused("shr.s32 %r1, %r2, 31; " + READ)) == {"shr.s32 %r1, %r2, 32"}
    assert not only(excused("shr.u32 %r1, %r2, 31; " + READ))


def test_a_division_by_1_may_be_made() -> None:
    text = "ld.param.f32 %f1, [out]; setp.eq.f32 %p1, %f1, 0f3F800000; @%p1 bra NONE; {} NONE: "
    text += "st.global.v2.f32 [%rd1], {{%f2, %f3}}; " + READ
    for divides in (
        "div.rn.f32 %f2, %f2, %f1;",
        "ld.param.f32 %f3, [out]; div.rn.f32 %f2, %f2, %f3;",
    ):
        found = only(excused(text.format(divides), of=1, kernel="router_topk"))
        assert found == {"setp.eq.f32 %p1, %f1, 0f00000000"}, "a temperature may be 2"
        of_branch = excused(text.format(divides), of=2, kernel="router_topk")
        assert {name for (name, _), reason in of_branch.items() if reason} == {"dropped"}
    for other in ("div.rn.f32 %f2, %f2, %f3;", "div.rn.f32 %f2, %f3, %f1;"):
        for at in (1, 2):
            assert not only(excused(text.format(other), of=at, kernel="router_topk"))


def test_a_nan_may_be_looked_for_in_a_constant_too() -> None:
    text = "mov.f32 %f1, {}; mov.f32 %f3, %f2; setp.nan.f32 %p1, %f2, %f2; "
    text += "st.global.v2.f32 [%rd1], {{%f1, %f3}}; " + READ
    changes = {"setp.nan.f32 %p1, %f1, %f2", "setp.nan.f32 %p1, %f2, %f1"}
    assert only(excused(text.format("0f3F800000"), of=2)) & changes
    assert not only(excused(text.format("0f7FC00000"), of=2)), "a NaN"
    assert not only(excused(text.format("%f3"), of=2)), "not a constant"


def test_a_logit_beyond_the_last_expert_is_excused_and_a_loaded_one_is_not() -> None:
    text = "mov.f32 %f1, 0f3F800000; @%p1 bra NONE; ld.global.f32 {}, [%rd1]; NONE: "
    text += "st.global.v2.f32 [%rd1], {{%f1, %f2}}; " + READ
    others = {f"mov.f32 %f1, 0f{bits}" for bits in ("40000000", "00000000")}
    assert only(excused(text.format("%f1"), kernel="router_topk")) == {"", *others}
    assert not only(excused(text.format("%f2"), kernel="router_topk"))
    assert not only(excused(text.format("%f1"), kernel="router_hash"))


def test_more_candidates_of_router_topk_are_excused_and_fewer_are_not() -> None:
    passes = "setp.geu.f32 %p1, %f1, %f2; selp.b32 %r1, 8, 0, %p1; or.b32 %r2, %r1, %r3; " + READ
    found = only(excused(passes, kernel="router_topk"))
    assert found == {"setp.gtu.f32 %p1, %f1, %f2"}
    found = only(excused(passes, of=1, kernel="router_topk"))
    assert found == {"selp.b32 %r1, 8, 1, %p1"}
    store = "st.global.f32 [%rd1], %f3; " + READ
    for text, harmless in (
        ("max.f32 %f3, %f1, %f2;", {"min.f32 %f3, %f1, %f2"}),
        ("add.rn.f32 %f3, %f1, 0f43400000;", {"add.rn.f32 %f3, %f1, 0f433F0000"}),
        ("add.rn.f32 %f3, %f1, 0fC3400000;", {"add.rn.f32 %f3, %f1, 0fC3410000"}),
        ("add.rn.f32 %f3, %f1, 0fBB000000;", set()),
    ):
        assert only(excused(text + store, kernel="router_topk")) == harmless
        assert not only(excused(text + store, kernel="router_hash"))


def test_the_range_of_estimates_may_be_smaller_and_not_larger() -> None:
    text = "setp.le.f32 %p1, %f1, 0f42C00000; selp.f32 %f3, %f1, %f2, %p1; "
    text += "st.global.f32 [%rd1], %f3; " + READ
    found = only(excused(text, kernel="router_topk"))
    assert found == {"setp.lt.f32 %p1, %f1, 0f42C00000", "setp.le.f32 %p1, %f1, 0f42BE0000"}


def test_a_group_of_experts_that_do_not_exist_is_excused() -> None:
    text = "add.s32 %r3, %r4, 127; shr.u32 %r1, %r3, {}; " + READ
    assert only(excused(text.format(7), kernel="router_topk")) == {"add.s32 %r3, %r4, 128"}
    assert not only(excused(text.format(6), kernel="router_topk"))


def test_a_token_id_without_a_table_is_excused() -> None:
    text = "setp.ne.s64 %p1, %rd1, 0; mov.u64 %rd2, 0; {} st.global.b64 [%rd1], %rd2; " + READ
    pointers = "or.b64 %rd3, %rd1, %rd1; st.global.b64 [%rd1], %rd3;"
    assert len(only(excused(text.format(pointers), of=1, kernel="router_topk"))) == 2
    assert not only(excused(text.format(""), of=1, kernel="router_topk"))


@pytest.mark.parametrize(("offset", "proven"), [(14, True), (13, False)])
def test_an_even_address_may_keep_its_last_bit(offset: int, proven: bool) -> None:
    text = f"add.s64 %rd2, %rd1, {offset}; and.b64 %rd3, %rd2, -16; "
    text += "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd3]; " + READ
    found = only(excused(text, of=1, kernel="router_hash"))
    assert found == ({"and.b64 %rd3, %rd2, -15"} if proven else set()), "-17 clears another bit"
    text = f"add.s32 %r6, %r7, {offset}; and.b32 %r8, %r6, -16; "
    text += "st.shared.v4.b32 [%r8], {%r1, %r2, %r3, %r4}; " + READ
    found = only(excused(text, of=1, kernel="router_hash"))
    assert found == ({"and.b32 %r8, %r6, -15"} if proven else set())


@pytest.mark.parametrize(("least", "proven"), [(3, True), (9, False)])
def test_the_order_of_a_number_of_blocks_may_be_unsigned(least: int, proven: bool) -> None:
    text = f"setp.lt.s32 %p1, %r3, {least}; @%p1 bra NONE; add.s64 %rd2, %rd1, 14; NONE: "
    text += "st.global.b64 [%rd1], %rd2; " + READ
    found = only(excused(text, of=0, kernel="router_hash"))
    assert found == ({f"setp.lt.u32 %p1, %r3, {least}"} if proven else set())


@pytest.mark.parametrize("of", [0, 6, 13])
@pytest.mark.parametrize(("count", "proven"), [(14, True), (8, False)])
def test_the_values_of_blocks_that_are_not_there_are_excused(
    of: int, count: int, proven: bool
) -> None:
    of = min(of, count - 1)
    numbers = range(1, count + 1)
    text = "".join(f"mov.b32 %r{n}, 0; " for n in numbers)
    text += "".join(f"st.global.b32 [%rd1], %r{n}; " for n in numbers)
    found = only(excused(text, of=of, kernel="router_hash"))
    assert found == ({f"mov.b32 %r{of + 1}, {n}" for n in (1, -1)} if proven else set())


@pytest.mark.parametrize("of", [0, 6, 12])
@pytest.mark.parametrize("source", [0, 14])
def test_a_copy_of_such_a_value_is_excused_among_copies_of_one_register(
    of: int, source: int
) -> None:
    numbers = range(1, 14)
    text = "".join(f"mov.b32 %r{n}, %r{0 if n < 7 else source}; " for n in numbers)
    text = f"mov.b32 %r14, 1; mov.b32 %r0, 2; mov.b32 %r15, 3; {text}"
    text += "".join(f"st.global.b32 [%rd1], %r{n}; " for n in (0, *numbers, 14, 15))
    found = only(excused(text, of=of + 3, kernel="router_hash"))
    assert len(found) == (source == 0)


def test_the_next_kernel_may_start_later_but_this_one_no_sooner() -> None:
    assert excused("griddepcontrol.launch_dependents;")["dropped", ""]
    assert not any(excused("griddepcontrol.wait;").values())


def test_an_expert_beyond_the_last_may_have_the_key_of_a_nan() -> None:
    text = "selp.b32 %r3, 1, %r4, %p2; selp.b32 %r1, {}, 0, %p1; st.shared.u32 [%rd1], %r1; "
    text += "st.global.v2.b32 [%rd1], {{%r3, %r5}}; " + READ
    found = only(excused(text.format("%r3"), of=1, kernel="router_topk"))
    assert found == {"selp.b32 %r1, %r3, 1, %p1"}, "-1 is above all keys"
    assert not only(excused(text.format("%r5"), of=1, kernel="router_topk"))


@pytest.mark.parametrize(("tile", "proven"), [(8, True), (32, True), (64, False)])
def test_32_replicas_are_as_many_as_33_for_tokens_below_32(tile: int, proven: bool) -> None:
    text = "setp.lt.s32 %p1, %r3, %r4; selp.b32 %r5, 0, %r4, %p1; sub.s32 %r6, %r3, %r5; "
    text += "setp.gt.s32 %p2, %r7, 32; selp.b32 %r1, %r6, %r2, %p2; " + READ
    kernel = f"router_decode_kmajor_n{tile}"
    assert only(excused(text, kernel=kernel)) == (
        {"setp.le.s32 %p1, %r3, %r4"} if proven else set()
    )
    changes = {"setp.ge.s32 %p2, %r7, 32", "setp.gt.s32 %p2, %r7, 31", "setp.gt.s32 %p2, %r7, 33"}
    assert only(excused(text, of=3, kernel=kernel)) == (changes if proven else set())
    assert not only(excused(text.replace("%r6, %r2", "%r8, %r2"), of=3, kernel=kernel))


LOAD = "ld.param.u32 %r3, [out]; "
USES = "@%p1 st.global.b32 [%rd1], %r2; @%p3 st.global.b32 [%rd1], %r4;"
SIZES = Facts(parameters={0: Interval(1, 8)}, specials={"%tid.x": Interval(0, 1023)})


@pytest.mark.parametrize(
    ("text", "changed", "proven"),
    [
        # An unsigned order is the signed one of numbers that are not negative.
        ("setp.lt.s32 %p1, %r3, %r3;", ("signedness", "setp.lt.u32 %p1, %r3, %r3"), True),
        ("setp.lt.s32 %p1, %r5, %r3;", ("signedness", "setp.lt.u32 %p1, %r5, %r3"), False),
        # A predicate that every allowed number decides alike.
        ("setp.lt.s32 %p1, %r3, 1;", ("immediate", "setp.lt.s32 %p1, %r3, 0"), True),
        ("setp.lt.s32 %p1, %r3, 1;", ("immediate", "setp.lt.s32 %p1, %r3, 2"), False),
        ("setp.gt.s32 %p1, %r3, 8;", ("comparison", "setp.ge.s32 %p1, %r3, 8"), False),
        ("setp.gt.s32 %p1, %r3, 9;", ("comparison", "setp.ge.s32 %p1, %r3, 9"), True),
    ],
)
def test_a_result_that_no_launch_changes_is_excused(
    text: str, changed: tuple[str, str], proven: bool
) -> None:
    assert (excused(LOAD + text + USES, SIZES, of=1)[changed] is not None) == proven
    assert excused(LOAD + text + USES, of=1)[changed] is None, "nothing is known of the parameter"


def test_what_another_operand_decides_is_excused() -> None:
    """As the correction of a quotient that is rounded down, for a dividend that may be negative."""
    never = "setp.lt.s32 %p1, %r3, 0; "
    text = (
        LOAD + never + "setp.ne.b32 %p2, %r5, 3; and.pred %p3, %p1, %p2; selp.b32 %r4, -1, 0, %p3; "
    )
    of_other = excused(text + USES, SIZES, of=2)
    assert of_other["comparison", "setp.eq.b32 %p2, %r5, 3"]
    assert not of_other["dropped", ""], "it would read a register that nothing wrote"
    of_select = excused(text + USES, SIZES, of=4)
    assert of_select["immediate", "selp.b32 %r4, -2, 0, %p3"]
    assert not of_select["immediate", "selp.b32 %r4, -1, 1, %p3"]
    assert not of_select["swap", "selp.b32 %r4, 0, -1, %p3"]
    assert not excused(text + USES, of=2)["comparison", "setp.eq.b32 %p2, %r5, 3"]
    for read in ("@%p2 st.global.b32 [%rd1], %r4;", "selp.b32 %r5, 1, 2, %p2;"):
        read_elsewhere = f"{text} {read} st.global.b32 [%rd1], %r5; {USES}"
        assert not excused(read_elsewhere, SIZES, of=2)["comparison", "setp.eq.b32 %p2, %r5, 3"]


@pytest.mark.parametrize(("most", "proven"), [(8, True), (2**31 - 1, False)])
def test_a_sum_that_may_wrap_is_not_taken_for_a_count(most: int, proven: bool) -> None:
    facts = Facts(parameters={0: Interval(1, most)}, specials={})
    text = LOAD + "add.s32 %r1, %r3, 1; setp.lt.s32 %p1, %r1, %r3; " + READ
    reason = excused(text, facts, of=2)["signedness", "setp.lt.u32 %p1, %r1, %r3"]
    assert (reason is not None) == proven


def test_a_counter_of_a_loop_is_not_taken_for_a_count() -> None:
    text = "mov.b32 %r1, 0; LOOP: add.s32 %r1, %r1, 1; setp.lt.s32 %p1, %r1, %r3; @%p1 bra LOOP;"
    assert not excused(LOAD + text + READ, SIZES, of=3)["signedness", "setp.lt.u32 %p1, %r1, %r3"]


def test_every_reason_has_a_condition() -> None:
    for each in equivalents():
        assert each.reason
        assert set(each.operators) <= set(OPERATORS), each.reason
        patterns = (each.change != ".*", each.around != "")
        assert any((*patterns, each.unread, each.rounded, each.same_result)), each.reason
