"""The schema: what is written is read back, and what does not fit says where and why."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from conftest import manifest_text
from watchdog import ends_within

from build_kernels.specs import KERNELS
from dsv4_router_runtime.artifacts.files import MAX_JSON_BYTES
from dsv4_router_runtime.artifacts.kernel import KIND_LAYOUT
from dsv4_router_runtime.artifacts.limits import MAX_DYNAMIC_SHARED_BYTES
from dsv4_router_runtime.artifacts.manifest import (
    SCHEMA_VERSION,
    parse_manifest,
    serialise_manifest,
)
from dsv4_router_runtime.errors import ManifestError


def altered(manifest, path: str, value):
    """The manifest's document with the value at `path` (dots and indices) replaced or removed."""
    document = json.loads(manifest_text(manifest))
    *parents, last = path.split("/")
    node = document
    for step in parents:
        node = node[int(step)] if isinstance(node, list) else node[step]
    last = int(last) if isinstance(node, list) else last
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return json.dumps(document)


def test_round_trip(manifest):
    text = serialise_manifest(manifest)
    assert parse_manifest(text) == manifest
    assert serialise_manifest(parse_manifest(text)) == text


def test_text_is_sorted_and_ends_in_a_newline(manifest):
    text = serialise_manifest(manifest)
    document = json.loads(text)
    assert text == json.dumps(document, indent=1, sort_keys=True) + "\n"
    keys = [(kernel["name"], kernel["arch"]) for kernel in document["kernels"]]
    assert keys == sorted(keys)
    assert len(keys) == len(manifest.kernels) == 2 * len(KERNELS)


def test_order_of_kernels_does_not_change_the_text(manifest):
    turned = replace(manifest, kernels=manifest.kernels[::-1])
    assert serialise_manifest(turned) == serialise_manifest(manifest)


def test_what_is_absent_is_left_out(manifest):
    document = json.loads(manifest_text(manifest))
    parameters = document["kernels"][0]["parameters"]
    assert "tensor_map" in parameters[0]
    assert "scratch" not in parameters[4]
    topk = document["kernels"][-1]
    assert topk["problem"]["num_tokens"] == [1, None]


def test_a_launch_may_be_of_any_number_of_clusters(manifest):
    """The text leaves max_clusters out where it is no bound, and a reader takes that for none."""
    text = manifest_text(manifest)
    launches = [kernel["launch"] for kernel in json.loads(text)["kernels"]]
    bounds = [launch.get("max_clusters") for launch in launches]
    assert bounds == [kernel.launch.max_clusters for kernel in manifest.kernels]
    clusters = {16: 7, 8: 15, 4: 30}
    assert bounds == [
        clusters[kernel.launch.k_splits] if kernel.role == "prefill" else None
        for kernel in manifest.kernels
    ]
    assert all("max_clusters" not in launches[at] for at in (0, HASH, TOPK))
    kernel = parse_manifest(altered(manifest, MAX_CLUSTERS, ...)).kernels[PREFILL]
    assert kernel.launch.max_clusters is None
    assert kernel.most_tokens(384) == kernel.problem.num_tokens.high == 448


def with_workspace(manifest, **more):
    """Return the manifest with a workspace instead of counters in one kernel, and fields of it."""
    of_kernel = {"at": PREFILL, "bytes": 7680 + 448 * 128 * 8, "high": 448} | more
    document = json.loads(manifest_text(manifest))
    kernel = document["kernels"][of_kernel["at"]]
    (counters,) = (each for each in kernel["parameters"] if each["name"] == "counters")
    counters["name"], counters["scratch"]["elements"] = "workspace", of_kernel["bytes"] // 4
    kernel["problem"]["num_tokens"] = [1, of_kernel["high"]]
    if of_kernel["high"] != 448:
        del kernel["launch"]["max_clusters"]
    return json.dumps(document)


def test_a_workspace_has_a_place_for_every_token_and_expert(manifest):
    assert parse_manifest(with_workspace(manifest))
    for more, message in (
        ({"bytes": 7680 + 448 * 128 * 8 - 4}, "at least 466432 bytes of workspace, which 448"),
        ({"bytes": 0x40}, r"448 tokens of 128 experts take \(got 64\)"),
        # Without max_clusters these are of 512 experts.
        ({"high": 449, "bytes": 7680 + 449 * 384 * 8}, "which 449 tokens of 512 experts take"),
        ({"high": 1921}, r"at most 1920 tokens, a ticket for each \(got 1921\)"),
        ({"high": None}, r"at most 1920 tokens, a ticket for each \(got without an end\)"),
    ):
        with pytest.raises(ManifestError, match=rf"kernels\[{PREFILL}\].parameters: .*{message}"):
            parse_manifest(with_workspace(manifest, **more))


def test_for_arch(manifest):
    assert {kernel.arch for kernel in manifest.for_arch("sm_100a")} == {"sm_100a"}
    assert manifest.for_arch("sm_120a") == ()


LAUNCH = "kernels/1/launch"
DTYPES = "kernels/1/problem/dtypes"
PARAMETER = "kernels/0/parameters"
W_MAP = f"{PARAMETER}/0/tensor_map"
X_MAP = f"{PARAMETER}/1/tensor_map"
# router_hash, router_prefill_kmajor_n64 and router_topk for sm_100a.
HASH, PREFILL, TOPK = 12, 24, 30
MAX_CLUSTERS = f"kernels/{PREFILL}/launch/max_clusters"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema_version", 1, f"schema_version: expected {SCHEMA_VERSION}, the only"),
        ("schema_version", True, "schema_version: expected"),
        ("schema_version", ..., "schema_version: expected"),
        ("extra", 1, '$: unknown key "extra"'),
        ("kernels", {}, "kernels: expected a list of kernels (got {})"),
        ("toolchain", [], "toolchain: expected an object"),
        ("toolchain/nvrtc", 13, "toolchain.nvrtc: expected a version (got 13)"),
        ("kernels/1/colour", "red", 'kernels[1]: unknown key "colour"'),
        ("kernels/1/symbol", ..., "kernels[1].symbol: missing"),
        ("kernels/1/name", "Router", "kernels[1].name: expected a kernel name"),
        ("kernels/1/arch", "sm90", "kernels[1].arch: expected an architecture"),
        ("kernels/1/file", "../x.cubin", "kernels[1].file: expected"),
        ("kernels/1/cubin_sha256", "AB", "kernels[1].cubin_sha256: expected 64 lower-case hex"),
        (f"{LAUNCH}/block", [256], "kernels[1].launch.block: expected 3 ints >= 1 (got [256])"),
        (f"{LAUNCH}/block", [64, 64, 1], "kernels[1].launch.block: expected at most 1024 threads"),
        (f"{LAUNCH}/block", [1025, 1, 1], "kernels[1].launch.block: expected at most 1024 threads"),
        (f"{LAUNCH}/block", [1, 1, True], "kernels[1].launch.block: expected 3 ints"),
        (f"{LAUNCH}/cluster", [32, 1, 1], "kernels[1].launch.cluster: expected at most 16 CTAs"),
        (f"{LAUNCH}/nonportable_cluster", False, "kernels[1].launch.cluster: expected at most 8"),
        (f"{LAUNCH}/grid", ["k_splits", 1], "kernels[1].launch.grid: expected 3 grid axes"),
        (f"{LAUNCH}/grid", ["rows", 1, 1], "kernels[1].launch.grid[0]: expected an int >= 1 or"),
        (f"{LAUNCH}/grid", [0, 1, 1], "kernels[1].launch.grid[0]: expected an int >= 1 or"),
        (f"{LAUNCH}/grid", [24, 1, 1], "kernels[1].launch.grid[0]: expected a multiple of the"),
        (f"{LAUNCH}/grid", ["k_splits", 1, 1025], "launch.grid[2]: expected a multiple of the"),
        (f"{LAUNCH}/grid", [1, "k_splits", 1], "launch.grid[0]: expected a multiple of the"),
        (
            f"{LAUNCH}/k_splits",
            24,
            "kernels[1].launch.grid[0]: expected a multiple of the cluster's 16, at most "
            '1024 with k_splits 24 (got "k_splits")',
        ),
        (
            f"{LAUNCH}/cluster",
            [8, 2, 1],
            "kernels[1].launch.grid[1]: expected whole clusters of 2, which no number of tiles",
        ),
        (
            f"{LAUNCH}/dynamic_shared_bytes",
            MAX_DYNAMIC_SHARED_BYTES + 1,
            "kernels[1].launch.dynamic_shared_bytes: expected an int from 0 to 232448 (got 232449)",
        ),
        (f"{LAUNCH}/dynamic_shared_bytes", -1, "launch.dynamic_shared_bytes: expected an int from"),
        (
            "kernels/1/problem/dtypes/gate",
            ["float32"],
            'kernels[1].problem.dtypes: unknown key "gate" (allowed: W_gate, hidden_states, ',
        ),
        (f"{DTYPES}/out_ids", "int32", "dtypes.out_ids: expected a list of distinct dtype names"),
        (f"{DTYPES}/out_ids", [], "dtypes.out_ids: expected a list of distinct dtype names"),
        (f"{DTYPES}/out_ids", ["int32"] * 2, "dtypes.out_ids: expected a list of distinct dtype"),
        (f"{DTYPES}/out_ids", ["int 32"], "dtypes.out_ids[0]: expected one of bfloat16"),
        ("kernels/1/problem/layout", "kmajor", 'does not fit layout "kmajor"'),
        ("kernels/1/problem/layout", ..., "kernels[1].problem.layout: missing"),
        ("kernels/1/role", "select", 'problem: unknown key "layout"'),
        ("kernels/1/role", "dense", "role: expected one of decode, prefill, hash, select"),
        (MAX_CLUSTERS, 0, "kernels[24].launch.max_clusters: expected an int from 1 to 1024"),
        (MAX_CLUSTERS, "7", 'launch.max_clusters: expected an int from 1 to 1024 (got "7")'),
        (MAX_CLUSTERS, 7.0, "launch.max_clusters: expected an int from 1 to 1024 (got 7.0)"),
        (MAX_CLUSTERS, True, "launch.max_clusters: expected an int from 1 to 1024"),
        (MAX_CLUSTERS, None, "launch.max_clusters: expected an int from 1 to 1024"),
        (MAX_CLUSTERS, 1025, "launch.max_clusters: expected an int from 1 to 1024"),
        (
            f"{W_MAP}/dims",
            ["K", "E"],
            'kernels[0].parameters[0].tensor_map.dims: W_gate first along "K" does not fit layout '
            '"emajor"',
        ),
        (
            f"{X_MAP}/box/0",
            48,
            "kernels[0].parameters[1].tensor_map.box: K blocks of 48 do not divide k_multiple 64",
        ),
        (f"{W_MAP}/dims", ["E", "N"], "[0].tensor_map.dims[1]: expected one of K, E (got"),
        (f"{X_MAP}/dims/1", "E", "[1].tensor_map.dims[1]: expected one of N, K, K_in_block, K_blo"),
        (f"{X_MAP}/dims", ["N", "K", "K_block"], "[1].tensor_map.dims[0]: expected one of K, K_in"),
        (
            f"{W_MAP}/box",
            [128, 64],
            "[0].tensor_map.box: expected rows in multiples of 16 bytes within the swizzle 128B, "
            "not 256 bytes (got [128, 64])",
        ),
        (f"{W_MAP}/box", [4, 64], "tensor_map.box: expected rows in multiples of 16 bytes"),
        (f"{W_MAP}/swizzle", "64B", "tensor_map.box: expected rows in multiples of 16 bytes"),
        (f"{LAUNCH}/pdl", 1, "kernels[1].launch.pdl: expected true or false (got 1)"),
        (f"{LAUNCH}/token_tile", 0, "kernels[1].launch.token_tile: expected an int from 1 to"),
        ("kernels/1/problem/layout", "row", "kernels[1].problem.layout: expected one of kmajor"),
        ("kernels/1/problem/top_k", [8, 1], "kernels[1].problem.top_k: expected [low, high]"),
        ("kernels/1/problem/top_k", [0, 1], "kernels[1].problem.top_k: expected [low, high]"),
        ("kernels/1/resources/opcodes/LDL", -1, "kernels[1].resources.opcodes.LDL: expected"),
        (
            f"{PARAMETER}/2/kind",
            "int8",
            "kernels[0].parameters[2].kind: expected one of tensor_map",
        ),
        (f"{PARAMETER}/2/size", 4, "kernels[0].parameters[2].size: expected 8"),
        (f"{PARAMETER}/2/offset", 260, "kernels[0].parameters[2].offset: expected a multiple of 8"),
        (f"{PARAMETER}/2/offset", 128, "kernels[0].parameters[2]: offset 128 is inside the one"),
        # num_tokens over the second half of the pointer before it
        (f"{PARAMETER}/19/offset", 388, "kernels[0].parameters[19]: offset 388 is inside the one"),
        (f"{PARAMETER}/2/name", "x_map", 'kernels[0].parameters[2]: the name "x_map" is used'),
        (f"{PARAMETER}/2/element_type", ..., 'of kind "pointer" needs "element_type"'),
        (f"{PARAMETER}/0/tensor_map", ..., 'of kind "tensor_map" needs "tensor_map"'),
        (f"{PARAMETER}/19/tensor_map", {}, 'of kind "int32" has no "tensor_map"'),
        (f"{PARAMETER}/19/scratch", {}, 'of kind "int32" has no "scratch"'),
        (f"{PARAMETER}/3/scratch/elements", 0, "parameters[3].scratch.elements: expected an int"),
        (f"{PARAMETER}/0/tensor_map/box", [64], "tensor_map.box: expected 2 ints from 1 to 256"),
        (f"{PARAMETER}/0/tensor_map/box", [64, 512], "tensor_map.box: expected 2 ints"),
        (f"{PARAMETER}/0/tensor_map/dims", ["E"], "tensor_map.dims: expected 2 to 5 distinct"),
        (f"{PARAMETER}/0/tensor_map/dims", ["K", "K"], "tensor_map.dims: expected 2 to 5 distinct"),
        (f"{PARAMETER}/0/tensor_map/swizzle", "96B", "tensor_map.swizzle: expected one of none"),
        (f"{PARAMETER}/0/tensor_map/tensor", "e_bias", "tensor_map.tensor: expected one of W_gate"),
    ],
)
def test_errors_name_the_place(manifest, path, value, message):
    with pytest.raises(ManifestError) as caught:
        parse_manifest(altered(manifest, path, value), source="here/manifest.json")
    assert message in str(caught.value)
    assert str(caught.value).startswith("here/manifest.json: ")
    assert str(caught.value).endswith("; repair it with `build-kernels build --artifacts here`")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (f"{LAUNCH}/block", [1024, 1, 1]),
        (f"{LAUNCH}/k_splits", 32),
        (f"{LAUNCH}/grid", [32, "expert_tiles", 1024]),
        (f"{LAUNCH}/dynamic_shared_bytes", MAX_DYNAMIC_SHARED_BYTES),
        (f"{W_MAP}/box", [64, 256]),
        (f"{LAUNCH}/wait_limit_ms", 600_000),
        (f"{LAUNCH}/max_clusters", 1024),
        (MAX_CLUSTERS, 1),
        ("driver/sm_103a", 12090),
        ("kernels/1/resources/spill_bytes", 8),
    ],
)
def test_what_is_just_within_the_limits(manifest, path, value):
    parse_manifest(altered(manifest, path, value))


HUGE = 10**30
PROBLEM = "kernels/1/problem"
RESOURCES = "kernels/1/resources"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (f"{PARAMETER}", [], 'kernels[0].parameters: none is named "e_bias", which this runtime'),
        (f"{PARAMETER}/3/scratch/elements", HUGE, "scratch.elements: expected an int from 1 to"),
        (f"{PARAMETER}/3/scratch/elements", 2**22, "[0].parameters: expected at most 16777216 byt"),
        (f"{PARAMETER}/4/name", "bias", '[0].parameters: none is named "e_bias", which this runt'),
        (f"{PARAMETER}/2/name", "logits", '[0].parameters[2].name: nothing to pass as "logits"'),
        (f"{PARAMETER}/2/scratch", ..., '[0].parameters[2].name: nothing to pass as "partials"'),
        (
            f"{PARAMETER}/4/scratch",
            {"elements": 1, "zeroed": True},
            'kernels[0].parameters[4]: "e_bias" is passed as a pointer of the call or the layer',
        ),
        (f"{W_MAP}/box", [32, 64], "tensor_map.box: expected 64 along E, launch.expert_tile (g"),
        (
            f"kernels/{PREFILL}/parameters/0/tensor_map/box",
            [64, 64],
            "[24].parameters[0].tensor_map.box: expected 128 along E",
        ),
        (f"{X_MAP}/box/1", 8, "tensor_map.box: expected 32 along N, launch.token_tile (got [64, 8"),
        (f"{LAUNCH}/wait_limit_ms", -1, "launch.wait_limit_ms: expected an int from 0 to 600000"),
        (f"{LAUNCH}/wait_limit_ms", HUGE, "launch.wait_limit_ms: expected an int from 0 to 600000"),
        (f"{LAUNCH}/wait_limit_ms", ..., "launch.wait_limit_ms: missing"),
        ("driver", ..., "driver: missing"),
        ("driver/sm_90a", ..., "driver: sm_90a is missing, which kernels are listed for"),
        ("driver/sm_90a", "12.4", "driver.sm_90a: expected an int from 12000 to 99990"),
        ("driver/hopper", 12040, 'driver: the key "hopper" is no name'),
        (f"{LAUNCH}/expert_tile", HUGE, "launch.expert_tile: expected an int from 1 to 512 (got 1"),
        (f"{LAUNCH}/token_tile", HUGE, "launch.token_tile: expected an int from 1 to 2147483647"),
        (f"{LAUNCH}/k_splits", HUGE, "launch.k_splits: expected an int from 1 to 1024 (got 1"),
        (f"{LAUNCH}/token_tile", 31, "launch.token_tile: expected at least the 32 tokens accepted"),
        (
            f"{LAUNCH}/grid",
            ["k_splits", 1, 1],
            "launch.expert_tile: expected at least the 512 experts accepted, since the grid has no",
        ),
        (
            f"kernels/{TOPK}/launch/grid",
            [1, "token_tiles", 1],
            "launch.grid[1]: expected at most 65535 CTAs, not 2147483647 tokens in tiles of 4",
        ),
        (f"{LAUNCH}/block", [1, 1, 128], "launch.block: expected at most 1024 threads, in at most"),
        (f"{LAUNCH}/block", [2**62] * 3, "launch.block: expected at most 1024 threads"),
        (f"{PROBLEM}/top_k", [1, 100], "problem.top_k: expected [low, high] with 1 <= low <= high"),
        (f"{PROBLEM}/top_k", [1, None], "problem.top_k: expected [low, high] with 1 <= low <= hig"),
        (f"{PROBLEM}/num_experts", [1, 100_000], "num_experts: expected [low, high] with 1 <= low"),
        (f"{PROBLEM}/num_tokens", [1, 2**31], "problem.num_tokens: expected [low, high] with 1 <="),
        (f"{PROBLEM}/num_tokens", [2**31, None], "problem.num_tokens: expected [low, high] with"),
        (f"{PROBLEM}/num_tokens", [1, 4096], "token_tile: expected at least the 4096 tokens acce"),
        (f"{PROBLEM}/num_tokens", [1, None], "expected at least the 2147483647 tokens accepted"),
        (f"{PROBLEM}/k_multiple", HUGE, "problem.k_multiple: expected an int from 1 to"),
        (f"{DTYPES}/out_ids", ["int7"], "dtypes.out_ids[0]: expected one of bfloat16, bool"),
        ("kernels/1/arch", "sm_00", "[1].arch: expected an architecture such as sm_90a, from sm_"),
        ("kernels/1/arch", "sm_89", "[1].arch: expected an architecture such as sm_90a, from sm_"),
        ("kernels/1/arch", "sm_256", "[1].arch: expected an architecture such as sm_90a, from sm_"),
        ("kernels/1/name", "a" * 65, "[1].name: expected a kernel name (a-z, 0-9, _; at most 64)"),
        ("kernels/1/symbol", "a" * 257, "kernels[1].symbol: expected a symbol name"),
        (f"{RESOURCES}/registers", 10**6, "resources.registers: expected an int from 1 to 255"),
        (f"{RESOURCES}/registers", 255, None),
        (f"{RESOURCES}/spill_bytes", HUGE, "resources.spill_bytes: expected an int from 0 to"),
        (f"{RESOURCES}/stack_bytes", 2**20, "resources.stack_bytes: expected an int from 0 to 52"),
        (f"{RESOURCES}/static_shared_bytes", 2**16, "static_shared_bytes: expected an int from 0"),
        (f"{RESOURCES}/opcodes/LDL", HUGE, "opcodes.LDL: expected an int from 0 to"),
        (f"{RESOURCES}/opcodes", {"x y": 1}, 'resources.opcodes: the key "x y" is no name'),
        (f"{PARAMETER}/2/offset", HUGE, "[2].offset: expected an int from 0 to 32764"),
        (f"{PARAMETER}/26/offset", 32764, "parameters[26]: ends after the 32764 bytes that a lau"),
        (
            f"{X_MAP}/dims",
            ["K_in_block", "N", "K"],
            "dims: expected K, N or K_in_block, N, K_block",
        ),
        (f"{X_MAP}/dims", ["K", "N", "K_block"], "tensor_map.dims: expected K, N or K_in_block, N"),
        (f"{X_MAP}/interleave", "16B", "tensor_map.interleave: expected one of none"),
        ("toolchain", {"a\u001b[2J": "1"}, "toolchain: the key "),
        ("toolchain/nvrtc", "1\n2", "toolchain.nvrtc: expected a version"),
    ],
)
def test_what_could_only_fail_later_is_an_error_now(manifest, path, value, message):
    text = altered(manifest, path, value)
    if message is None:
        parse_manifest(text)
        return
    with pytest.raises(ManifestError) as caught:
        parse_manifest(text)
    assert message in str(caught.value)
    assert len(str(caught.value)) <= 1024


def test_a_cta_fits_into_an_sm(manifest):
    document = json.loads(manifest_text(manifest))
    kernel = document["kernels"][1]
    kernel["launch"]["dynamic_shared_bytes"] = MAX_DYNAMIC_SHARED_BYTES - 1024
    kernel["resources"]["static_shared_bytes"] = 1024
    kernel["launch"]["block"] = [1024, 1, 1]
    kernel["resources"]["registers"] = 64
    parse_manifest(json.dumps(document))
    kernel["resources"]["registers"] = 65
    with pytest.raises(ManifestError, match=r"at most 65536 registers per CTA \(got 73728: resour"):
        parse_manifest(json.dumps(document))
    kernel["launch"]["block"] = [897, 1, 1]  # 29 warps
    kernel["resources"]["registers"] = 72
    with pytest.raises(ManifestError, match=r"registers per CTA \(got 66816: .* of 928 threads"):
        parse_manifest(json.dumps(document))
    kernel["resources"] |= {"registers": 64, "static_shared_bytes": 1025}
    with pytest.raises(ManifestError, match=r"at most 232448 bytes of shared memory \(got 232449"):
        parse_manifest(json.dumps(document))


def test_a_kernel_has_the_maps_that_this_runtime_fills(manifest):
    """A second map of hidden_states would stay null, and a missing one was never asked for."""
    document = json.loads(manifest_text(manifest))
    decode = document["kernels"][0]["parameters"]
    w_map, x_map = decode[:2]
    for maps, tensor in (
        ([w_map, x_map, x_map | {"name": "x_map_2"}], "hidden_states"),
        ([], "W_gate"),
        ([w_map], "hidden_states"),
    ):
        document["kernels"][0]["parameters"] = packed([*maps, *decode[2:]])
        with pytest.raises(ManifestError, match=f"role decode takes one tensor map of {tensor}"):
            parse_manifest(json.dumps(document))
    document["kernels"][0]["parameters"] = decode
    topk = document["kernels"][TOPK]["parameters"]
    document["kernels"][TOPK]["parameters"] = packed([*topk, x_map])
    with pytest.raises(ManifestError, match="role select takes no tensor map of hidden_states"):
        parse_manifest(json.dumps(document))


def packed(parameters):
    """The parameters with offsets of their own, in order."""
    end, moved = 0, []
    for parameter in parameters:
        size, alignment = KIND_LAYOUT[parameter["kind"]]
        offset = -(-end // alignment) * alignment
        moved.append(parameter | {"offset": offset})
        end = offset + size
    return moved


@pytest.mark.slow
def test_every_kind_of_a_passed_parameter_is_checked(manifest):
    """A pointer written as an int32 would lose its upper half, and be an address all the same."""
    for at in (0, HASH, PREFILL, TOPK):
        document = json.loads(manifest_text(manifest))
        parameters = document["kernels"][at]["parameters"]
        for index, parameter in enumerate(parameters):
            if parameter["kind"] == "tensor_map" or "scratch" in parameter:
                continue
            for kind in {"pointer", "int32", "float32"} - {parameter["kind"]}:
                other = {"name": parameter["name"], "kind": kind, "size": KIND_LAYOUT[kind][0]}
                if kind == "pointer":
                    other["element_type"] = "int32"
                changed = packed([*parameters[:index], other, *parameters[index + 1 :]])
                document["kernels"][at]["parameters"] = changed
                with pytest.raises(ManifestError, match=f'"{parameter["name"]}" is passed as a'):
                    parse_manifest(json.dumps(document))


def test_one_dimensional_map(manifest):
    document = json.loads(altered(manifest, f"{W_MAP}/dims", ["E"]))
    document["kernels"][0]["parameters"][0]["tensor_map"]["box"] = [64]
    with pytest.raises(ManifestError, match=r"tensor_map\.dims: expected 2 to 5 distinct"):
        parse_manifest(json.dumps(document))


@pytest.mark.parametrize(
    ("line", "place"),
    [
        (f'"schema_version": {SCHEMA_VERSION}', "$"),
        ('"nvrtc": "13.0"', "toolchain"),
        ('"token_tile": 32', "kernels[0].launch"),
        ('"zeroed": true', "kernels[0].parameters[3].scratch"),
        ('"LDL": 0', "kernels[0].resources.opcodes"),
    ],
)
def test_a_key_written_twice_is_refused(manifest, line, place):
    """JSON readers let the last one win, so two readers could see two manifests."""
    text = manifest_text(manifest)
    assert line in text
    key = line.split(":")[0]
    with pytest.raises(ManifestError) as caught:
        parse_manifest(text.replace(line, f"{line},\n{line}", 1))
    assert f"manifest.json: {place}: the key {key} is written twice" in str(caught.value)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('"zeroed": true,\n"zeroed": true', 'the key "zeroed" is written twice'),
        ('"zeroed": 1', "expected true or false"),
    ],
)
def test_a_parameter_that_is_almost_one_read_before_is_refused(manifest, line, problem):
    before, _, after = manifest_text(manifest).rpartition('"zeroed": true')
    with pytest.raises(ManifestError, match=problem):
        parse_manifest(f"{before}{line}{after}")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"kernels": ' * 100_000])
def test_nested_too_deeply(text):
    with pytest.raises(ManifestError, match=r"manifest.json: \$: .*nested too deeply"):
        parse_manifest(text)


BAD = "kernels/0/resources/registers"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("9" * 4300, "an integer of 4300 digits; at most 9223372036854775807 is read"),
        ("9" * 100_000, "an integer of 100000 digits"),
        ("-" + "9" * 41, "an integer of 42 digits"),
        (str(2**63), "registers: expected an int from 1 to 255 (got 9223372036854775808)"),
        ("NaN", "not valid JSON (NaN is no JSON)"),
        ("-Infinity", "not valid JSON (-Infinity is no JSON)"),
        ("1e999", "not valid JSON (a number that no double holds: 1e999)"),
        ("1" * 100 + ".5e308", "a number that no double holds: 1111"),
        ('"\\ud800"', 'registers: expected an int from 1 to 255 (got "\\ud800")'),
        ("[" * 900 + "]" * 900, "registers: expected an int from 1 to 255 (got [[[[[[["),
        ('"' + "x" * 100_000 + '"', 'registers: expected an int from 1 to 255 (got "xxxx'),
        ('{"' + "x" * 100_000 + '": 1}', 'registers: expected an int from 1 to 255 (got {"xxxx'),
        ("[" + "1," * 100_000 + "1]", "registers: expected an int from 1 to 255 (got [1, 1, 1"),
    ],
)
def test_values_that_python_stumbles_on(manifest, text, message):
    written = altered(manifest, BAD, "HERE").replace('"HERE"', text)
    with ends_within(5), pytest.raises(ManifestError) as caught:
        parse_manifest(written)
    assert message in str(caught.value)
    assert len(str(caught.value)) <= 1024
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("key", ["x" * 100_000, "\ud800", "\x1b[2J", ""])
@pytest.mark.parametrize("place", ["", "toolchain", "kernels/0", "kernels/0/resources/opcodes"])
def test_keys_that_nobody_would_print(manifest, place, key):
    with pytest.raises(ManifestError) as caught:
        parse_manifest(altered(manifest, f"{place}/{key}".removeprefix("/"), "value"))
    assert len(str(caught.value)) <= 1024
    assert str(caught.value).isprintable()


def test_bytes_are_utf_8_with_or_without_a_mark(manifest):
    text = manifest_text(manifest)
    assert parse_manifest(b"\xef\xbb\xbf" + text.encode()) == manifest
    for encoding in ("utf-16", "utf-32", "utf-16-le"):
        with pytest.raises(ManifestError, match=r"\$: not valid JSON"):
            parse_manifest(text.encode(encoding))
    # A surrogate written as bytes of its own.
    with pytest.raises(ManifestError, match=r"\$: not valid JSON \('utf-8' codec"):
        parse_manifest(text.replace("nvrtc", "x").encode().replace(b'"x"', b'"\xed\xa0\x80"'))


@pytest.mark.parametrize("kind", [str, bytes])
def test_a_text_beyond_all_manifests_is_not_parsed(kind):
    text = "[" + "{}," * 25_000_000 + "{}]"
    with (
        ends_within(5),
        pytest.raises(ManifestError, match=f"75000004 .*; at most {MAX_JSON_BYTES}"),
    ):
        parse_manifest(text if kind is str else text.encode())


@pytest.mark.slow
def test_the_largest_text_that_is_parsed_is_parsed_soon():
    start = f'{{"schema_version": {SCHEMA_VERSION}, "toolchain": {{}}, "driver": {{}}, "kernels": ['
    text = start + "{}," * ((MAX_JSON_BYTES - 100) // 3) + "{}]}"
    with ends_within(20), pytest.raises(ManifestError, match=r"kernels\[0\]\.name: missing"):
        parse_manifest(text)


def test_a_text_read_twice_is_parsed_once_and_an_error_names_its_own_source(manifest):
    text = manifest_text(manifest)
    assert parse_manifest(text, source="a") is parse_manifest(text, source="b")
    assert parse_manifest(text.encode()) == manifest
    for source in ("a", "b"):
        with pytest.raises(ManifestError, match=f"^{source}: schema_version: expected"):
            parse_manifest('{"schema_version": 4}', source=source)


def test_newer_schema_is_named_before_its_unknown_keys(manifest):
    document = json.loads(manifest_text(manifest)) | {"schema_version": 9, "later": 1}
    with pytest.raises(ManifestError, match=f"schema_version: expected {SCHEMA_VERSION}"):
        parse_manifest(json.dumps(document))


@pytest.mark.parametrize("text", ["", "{", b"\xff\xfe", "[]", "null"])
def test_not_a_manifest(text):
    with pytest.raises(ManifestError, match=r"manifest.json: \$: "):
        parse_manifest(text)


def test_kernels_must_be_unique_and_sorted(manifest):
    document = json.loads(manifest_text(manifest))
    document["kernels"][0] = document["kernels"][1]
    with pytest.raises(ManifestError, match=r"kernels\[1\]: not unique and sorted"):
        parse_manifest(json.dumps(document))


def test_writing_what_cannot_be_read_is_refused(manifest, change):
    with pytest.raises(ManifestError, match=r"kernels\[3\].symbol: expected a symbol name"):
        serialise_manifest(change(manifest, 3, symbol="no symbol"))


@pytest.mark.parametrize("text", [None, 7, ["{}"], bytearray(b"{}")])
def test_a_text_is_str_or_bytes(text):
    with pytest.raises(
        TypeError, match=rf"text: expected str or bytes \(got {type(text).__name__}\)"
    ):
        parse_manifest(text)
