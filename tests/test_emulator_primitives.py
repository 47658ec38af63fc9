"""NVIDIA's primitives examples with the emulator in the GPU's place: what each script comes to.

Needs a checkout of NVIDIA/cutlass (see `test_emulator_tutorials`) and apache-tvm-ffi.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from foreign_gemms import EXAMPLES, runtime

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not EXAMPLES, reason="CUTLASS_EXAMPLES does not name NVIDIA/cutlass's CuTeDSL examples"
    ),
]

RIGHT = """
    async_pipeline bar_warp_sync barrier_cta_red barrier_cta_sync cp_async_bulk_prefetch
    cp_async_mbarrier_arrive_cluster cp_async_mbarrier_arrive_cta cp_async_shared_global
    cp_async_shared_global_swizzled elect_sync ldmatrix_stmatrix mbarrier mbarrier_lifecycle red
    shfl_sync vote_sync reduction/block_smem_reduce reduction/cluster_smem_reduce
    reduction/thread_vector_reduce reduction/warp_vector_reduce tma/tma_1cta_mbarrier
    tma/tma_load_to_ldmatrix tma/tma_pipeline_pingpong tma/tma_swizzle_modes
    tutorial/07_vectorized_array tutorial/08_mlir_value_tree_debug
""".split()
BY_THE_LETTER = """
    tcgen05/1cta_mma_basic tcgen05/1cta_mma_mn_major tcgen05/1cta_mma_pipeline
    tcgen05/2cta_mma_basic tcgen05/2cta_mma_tma_store tcgen05/clusterMxN_2cta_mma
""".split()
# The script's check passes, and the script leaves to chance what PTX does not order.
FAULTS = {
    # Every warp initialises the mbarriers.
    "tutorial/05_minimal_tensor_mma": {"barrier-reinitialised", "race"},
    # Every warp stores the tile.
    "tma/tma_store": {"race"},
    "tma/tma_load_store": {"race"},
    # One lane releases a stage that the others may still read.
    "pipeline_software_fill": {"race"},
    "warp_named_barrier": {"race"},
    "tma/tma_pipeline_count2": {"race"},
    "tma/tma_pipeline_warpspec": {"race"},
    # Lanes that wait for a phase may still be at it when the next one ends.
    "cp_async_bulk": {"phase-overrun"},
    # barrier.cluster.arrive.relaxed hands data over.
    "tma/tma_multicast": {"race", "unfinished-at-exit"},
    # A CTA does not wait for its peers' commits on its mbarrier before it exits.
    "tcgen05/mcast_clusterMxN_1cta_mma": {"exited-peer"},
    "tcgen05/mcast_clusterMxN_2cta_mma": {"exited-peer"},
    # A second reduction overwrites the first one's result while threads still read it.
    "tutorial/06_softmax": {"race"},
    # No fault: one half of a packed register is never written, and not read.
    "basic_types": {"poison"},
}
# Some schedule gives a wrong result.
WRONG = {
    # It waits for the CTA before it and reads from the one after it, which may have exited.
    "mapa": {"exited-peer", "poison"},
    # A stage is filled while other warps read it.
    "tma/tma_pipeline_single_warp": {"race"},
}
REFUSED = {
    "redux_sync": "e4m3x2",
    "tcgen05/1cta_mma_a_from_tmem": "kind::tf32",
    "tcgen05/2cta_mma_blockscale_m128": "e2m1x2",
    "tcgen05/cp_narrow_a_to_tmem_mma": "element type 14",
    "tcgen05/slicek_m32n8k128": "kind::f8f6f4",
    "tcgen05/tmem_ld_st": r"'\.func'",
    "tcgen05/tmem_ld_to_stmatrix_transpose": "e4m3x2",
    "reduction/cluster_tmem_reduce": r"tcgen05\.cp",
    "tma/tma_tensormap_replace": r"tensormap\.replace",
    "tutorial/01_hello_world": r"'\.func'",
    "tutorial/04_tma_load": r"'\.func'",
    "tutorial/09_tma_4d_to_2d": r"'\.func'",
    "tutorial/10_minimal_tensor_mma_fp8": "kind::f8f6f4",
}
# 8192 CTAs that multiply without tensor cores; a measurement after the check, which needs a driver.
NOT_RUN = {
    "tutorial/02_naive_gemm",
    "tutorial/03_gemm_tiled_smem",
    "tutorial/gemm_M128_N128_Kany_TN_warpspec_multistage",
}


def primitives() -> Path:
    return Path(str(EXAMPLES)).parent / "experimental" / "primitives"


def outcome(script: str, folder: Path) -> dict:
    """Run a script; return what `foreign_primitives` wrote down."""
    pytest.importorskip("cutlass", reason="the DSL (nvidia-cutlass-dsl) is not installed")
    pytest.importorskip("tvm_ffi", reason="apache-tvm-ffi is not installed")
    settings = {
        "CUTE_DSL_LIBS": runtime(folder), "CUTE_DSL_ARCH": "sm_100a", "CUTE_DSL_KEEP_PTX": "1",
        "CUTE_DSL_DUMP_DIR": str(folder),
    }  # fmt: skip
    written = folder / "outcome.json"
    runner = Path(__file__).with_name("foreign_primitives.py")
    done = subprocess.run(
        [sys.executable, runner, primitives() / f"{script}.py", written],
        capture_output=True, text=True, cwd=folder, env=os.environ | settings, check=False,
    )  # fmt: skip
    assert written.exists(), (done.stdout + done.stderr)[-3000:]
    return json.loads(written.read_text())


def faults(found: dict) -> set[str]:
    return {kind for kind in found["findings"] if not kind.endswith("(by the letter)")}


@pytest.mark.parametrize("script", RIGHT + BY_THE_LETTER + sorted(FAULTS))
def test_a_script_is_right_under_every_schedule(script, tmp_path):
    found = outcome(script, tmp_path)
    assert (found["refused"], found["error"]) == ("", "")
    assert script in FAULTS or found["differing"] == 0
    assert found["launches"] >= 3
    assert faults(found) == FAULTS.get(script, set())
    assert script not in RIGHT or not found["findings"]


@pytest.mark.parametrize("script", sorted(WRONG))
def test_a_script_with_a_race_is_wrong_under_some_schedule(script, tmp_path):
    found = outcome(script, tmp_path)
    assert found["differing"] > 0
    assert faults(found) == WRONG[script]


@pytest.mark.parametrize("script", sorted(REFUSED))
def test_a_script_is_refused_by_name(script, tmp_path):
    found = outcome(script, tmp_path)
    assert found["error"] == ""
    assert re.search(REFUSED[script], found["refused"])


def test_every_script_has_its_place():
    scripts = {
        str(path.relative_to(primitives()).with_suffix("")) for path in primitives().rglob("*.py")
    }
    assert scripts == {*RIGHT, *BY_THE_LETTER, *FAULTS, *WRONG, *REFUSED, *NOT_RUN}
