"""NVIDIA's GEMMs, compiled by the DSL and emulated: exact under every schedule, without a fault.

Needs the CuTeDSL examples of a checkout of NVIDIA/cutlass, which are not part of this project:
CUTLASS_EXAMPLES=<checkout>/examples/python/CuTeDSL/cute python -m pytest tests/test_emulator_tutorials.py
"""  # noqa: E501

from __future__ import annotations

import numpy as np
import pytest
from foreign_cases import GEMMS
from foreign_gemms import EXAMPLES, capture, device_arrays, launch_of, loaded
from test_emulator import kinds

from build_kernels.emulator import Schedule, emulate

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not EXAMPLES, reason="CUTLASS_EXAMPLES does not name NVIDIA/cutlass's CuTeDSL examples"
    ),
]

SCHEDULES = (
    Schedule(policy="earliest"),
    Schedule(policy="latest"),
    Schedule(seed=1),
    Schedule(seed=2, freezes=True),
    # Clusters of persistent kernels are cancelled.
    Schedule(seed=3, resident_ctas=1),
)
# The examples do not wait for tcgen05.ld, put no tcgen05.fence behind an mbarrier wait, let all 32
# lanes of a warp issue one TMA store, and zero accumulators behind wgmma.fence.
BY_THE_LETTER = {
    "missing-tcgen05-fence",
    "unwaited-register",
    "missing-wgmma-fence",
    "race",
}


@pytest.mark.parametrize("gemm", GEMMS, ids=lambda gemm: gemm.name)
def test_a_foreign_gemm_is_right_under_every_schedule(gemm, tmp_path):
    ptx, line = capture(gemm, tmp_path)
    for schedule in SCHEDULES:
        arrays, product = device_arrays(gemm)
        launch, arguments = launch_of(gemm, line, arrays)
        result = emulate(ptx, launch, arguments, schedule)
        order = gemm.tensors()[2][2]
        np.testing.assert_array_equal(loaded(result.memory["c"], gemm.c, order), product)
        assert [str(f) for f in result.findings if not f.by_the_letter] == []
        assert kinds(result) <= BY_THE_LETTER
