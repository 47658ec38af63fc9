"""ptxas compiles `sqrt.rn` and `rcp.rn` to the kernels' own steps, from the same seeds.

The ISA promises that these two are correctly rounded. So the seeds of an architecture are not those
of `ROOT_EXCEPTIONS` and `RECIPROCAL_EXCEPTIONS`, from which the same steps are not.
"""

from __future__ import annotations

import re
import subprocess

import pytest

pytest.importorskip("elftools", reason="needs dsv4-router-builder")
np = pytest.importorskip("numpy", reason="needs the extra `verify`")

from test_approximations import (  # noqa: E402
    FOUR,
    ONE,
    RCP,
    RECIPROCAL_EXCEPTIONS,
    ROOT_EXCEPTIONS,
    RSQRT,
    TWO,
    bits_of,
    fused,
    of_bits,
    reciprocal,
    root,
    seeds,
)

from build_kernels.binaries.wheels import wheel_file  # noqa: E402
from build_kernels.building import compilers  # noqa: E402
from build_kernels.specs import ARCHITECTURES  # noqa: E402

INSTRUCTIONS = ("sqrt.rn.f32", "rcp.rn.f32", "rsqrt.approx.ftz.f32", "rcp.approx.ftz.f32")
SOURCE = "\n".join(
    f'extern "C" __global__ void {opcode.replace(".", "_")}(const float* in, float* out) {{'
    f' float y; asm("{opcode} %0, %1;" : "=f"(y) : "f"(*in)); *out = y; }}'
    for opcode in INSTRUCTIONS
)
LINE = re.compile(r"/\*[0-9a-f]{4}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
LARGEST = 0x7F7FFFFF


ARCHS = [arch.name for arch in ARCHITECTURES]


@pytest.fixture(
    scope="module",
    params=[ARCHS[0], *(pytest.param(arch, marks=pytest.mark.slow) for arch in ARCHS[1:])],
)
def sass(request, tmp_path_factory) -> dict[str, list[tuple[str, str]]]:
    """Opcodes and operands by PTX instruction, up to the exit: the slow paths come after it."""
    path = tmp_path_factory.mktemp("sass") / "rounded.cubin"
    path.write_bytes(compilers.nvrtc_compile(SOURCE, name="rounded.cu", arch=request.param)[0])
    tool = wheel_file("nvidia-cuda-nvdisasm", "nvdisasm")
    text = subprocess.run([tool, "-c", path], capture_output=True, text=True, check=True).stdout
    bodies = {}
    for opcode in INSTRUCTIONS:
        body = re.search(
            rf"^\.text\.{re.escape(opcode.replace('.', '_'))}:(.*?)EXIT", text, re.M | re.S
        )
        bodies[opcode] = LINE.findall(body[1])
    return bodies


def computed(body, argument, seed):
    """What is stored, with `seed` in place of the MUFU; of integers nothing is computed."""
    registers = {"RZ": np.zeros_like(seed), "1": np.ones_like(seed), "-1": -np.ones_like(seed)}
    registers["0.5"] = np.full_like(seed, 0.5)

    def value(operand):
        if operand in registers:
            return registers[operand]
        return -registers[operand.removeprefix("-")]

    stored = None
    for opcode, text in body:
        first, *others = (each.strip() for each in text.split(","))
        match opcode.split(".")[0]:
            case "LDG":
                registers[first] = argument
            case "MUFU":
                assert value(others[0]) is argument
                registers[first] = seed
            case "FMUL":
                registers[first] = value(others[0]) * value(others[1])
            case "FADD":
                registers[first] = value(others[0]) + value(others[1])
            case "FFMA":
                registers[first] = fused(*map(value, others))
            case "STG":
                stored = registers[others[0]]
    return stored


@pytest.mark.slow
@pytest.mark.parametrize(
    ("opcode", "band", "step", "end", "exceptions"),
    [
        ("sqrt.rn.f32", RSQRT, root, FOUR, ROOT_EXCEPTIONS),
        ("rcp.rn.f32", RCP, reciprocal, TWO, RECIPROCAL_EXCEPTIONS),
    ],
)
def test_a_rounded_instruction_has_the_kernels_steps(sass, opcode, band, step, end, exceptions):
    arguments, odd = (of_bits(each) for each in zip(*sorted(exceptions), strict=True))
    np.testing.assert_array_equal(
        bits_of(computed(sass[opcode], arguments, odd)), bits_of(step(arguments, odd))
    )
    values = of_bits(np.arange(ONE, end, 99))
    for has, seed in seeds(band, values):
        given = values[has]
        np.testing.assert_array_equal(
            bits_of(computed(sass[opcode], given, seed)), bits_of(step(given, seed))
        )


@pytest.mark.slow
@pytest.mark.parametrize(("approximate", "rounded"), [INSTRUCTIONS[2::-2], INSTRUCTIONS[3::-2]])
def test_an_approximate_instruction_is_the_seed_alone(sass, approximate, rounded):
    float_opcodes, of_rounded = (
        [opcode for opcode, _ in sass[name] if re.match(r"MUFU|F[A-Z]", opcode)]
        for name in (approximate, rounded)
    )
    assert len(float_opcodes) == 1
    assert float_opcodes[0] == next(each for each in of_rounded if each.startswith("MUFU"))


@pytest.mark.slow
def test_the_slow_paths_are_for_other_arguments(sass):
    """Those of roots below 2^-101; those of reciprocals outside of normal ones."""
    constants = {
        opcode: re.findall(r"-?0x[0-9a-f]{5,}", " ".join(text for _, text in sass[opcode]))
        for opcode in ("sqrt.rn.f32", "rcp.rn.f32")
    }
    assert constants["sqrt.rn.f32"] == ["-0xd000000", "0x727fffff"]
    assert LARGEST - 0xD000000 == 0x727FFFFF
    assert constants["rcp.rn.f32"] == ["0x1800000", "0x7f800000", "0x1ffffff"]
    exponents = [(exponent << 23) + 0x1800000 & 0x7F800000 for exponent in range(256)]
    fast = [exponent for exponent, each in enumerate(exponents) if each > 0x1FFFFFF]
    assert fast == list(range(1, 253))
