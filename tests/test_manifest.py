"""The schema: what is written is read back, and what does not fit says where and why."""

from __future__ import annotations

import json

import pytest

from dsv4_router_runtime.errors import ManifestError
from dsv4_router_runtime.manifest import (
    DTYPE_TENSORS,
    MAX_DYNAMIC_SHARED_BYTES,
    SCHEMA_VERSION,
    parse_manifest,
    serialise_manifest,
)


def altered(manifest, path: str, value):
    """The manifest's document with the value at `path` (dots and indices) replaced or removed."""
    document = json.loads(serialise_manifest(manifest))
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
    assert len(keys) == 16


def test_order_of_kernels_does_not_change_the_text(manifest):
    turned = type(manifest)(toolchain=manifest.toolchain, kernels=manifest.kernels[::-1])
    assert serialise_manifest(turned) == serialise_manifest(manifest)


def test_what_is_absent_is_left_out(manifest):
    document = json.loads(serialise_manifest(manifest))
    parameters = document["kernels"][0]["parameters"]
    assert "tensor_map" in parameters[0]
    assert "scratch" not in parameters[4]
    topk = document["kernels"][-1]
    assert topk["problem"]["num_tokens"] == [1, None]


def test_for_arch(manifest):
    assert {kernel.arch for kernel in manifest.for_arch("sm_100a")} == {"sm_100a"}
    assert manifest.for_arch("sm_120a") == ()


LAUNCH = "kernels/1/launch"
DTYPES = "kernels/1/problem/dtypes"
PARAMETER = "kernels/0/parameters"
W_MAP = f"{PARAMETER}/0/tensor_map"
X_MAP = f"{PARAMETER}/1/tensor_map"


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
        (f"{LAUNCH}/grid", ["k_splits", 1, 65536], "launch.grid[2]: expected a multiple of the"),
        (f"{LAUNCH}/grid", [1, "k_splits", 1], "launch.grid[0]: expected a multiple of the"),
        (
            f"{LAUNCH}/k_splits",
            24,
            "kernels[1].launch.grid[0]: expected a multiple of the cluster's 16, at most "
            '2147483647 with k_splits 24 (got "k_splits")',
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
        (f"{DTYPES}/out_ids", ["int 32"], "dtypes.out_ids[0]: expected a dtype name"),
        ("kernels/1/problem/layout", "kmajor", 'does not fit layout "kmajor"'),
        ("kernels/1/problem/layout", "logits", 'does not fit layout "logits"'),
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
        (f"{LAUNCH}/token_tile", 0, "kernels[1].launch.token_tile: expected an int >= 1"),
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
        (f"{PARAMETER}/15/offset", 356, "kernels[0].parameters[15]: offset 356 is inside the one"),
        (f"{PARAMETER}/2/name", "x_map", 'kernels[0].parameters[2]: the name "x_map" is used'),
        (f"{PARAMETER}/2/element_type", ..., 'of kind "pointer" needs "element_type"'),
        (f"{PARAMETER}/0/tensor_map", ..., 'of kind "tensor_map" needs "tensor_map"'),
        (f"{PARAMETER}/15/tensor_map", {}, 'of kind "int32" has no "tensor_map"'),
        (f"{PARAMETER}/15/scratch", {}, 'of kind "int32" has no "scratch"'),
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
    assert "`build-kernels build`" in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (f"{LAUNCH}/block", [1024, 1, 1]),
        (f"{LAUNCH}/k_splits", 32),
        (f"{LAUNCH}/grid", [32, "token_tiles", 65535]),
        (f"{LAUNCH}/dynamic_shared_bytes", MAX_DYNAMIC_SHARED_BYTES),
        (f"{W_MAP}/box", [8, 256]),
        ("kernels/1/resources/spill_bytes", 8),
    ],
)
def test_what_is_just_within_the_limits(manifest, path, value):
    parse_manifest(altered(manifest, path, value))


def test_one_dimensional_map(manifest):
    document = json.loads(altered(manifest, f"{W_MAP}/dims", ["E"]))
    document["kernels"][0]["parameters"][0]["tensor_map"]["box"] = [64]
    with pytest.raises(ManifestError, match=r"tensor_map\.dims: expected 2 to 5 distinct"):
        parse_manifest(json.dumps(document))


@pytest.mark.parametrize(
    ("line", "place"),
    [
        ('"schema_version": 2', "$"),
        ('"nvrtc": "13.0"', "toolchain"),
        ('"token_tile": 32', "kernels[0].launch"),
        ('"zeroed": true', "kernels[0].parameters[3].scratch"),
        ('"LDL": 0', "kernels[0].resources.opcodes"),
    ],
)
def test_a_key_written_twice_is_refused(manifest, line, place):
    """JSON readers let the last one win, so two readers could see two manifests."""
    text = serialise_manifest(manifest)
    assert line in text
    key = line.split(":")[0]
    with pytest.raises(ManifestError) as caught:
        parse_manifest(text.replace(line, f"{line},\n{line}", 1))
    assert f"manifest.json: {place}: the key {key} is written twice" in str(caught.value)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"kernels": ' * 100_000])
def test_nested_too_deeply(text):
    with pytest.raises(ManifestError, match=r"manifest.json: \$: .*nested too deeply"):
        parse_manifest(text)


def test_dtypes_that_a_binding_states_are_of_the_schema():
    pytest.importorskip("torch", reason="torch is the caller's and is not installed here")
    from dsv4_router_runtime import binding

    assert set(DTYPE_TENSORS) >= set(binding.DTYPES)


def test_newer_schema_is_named_before_its_unknown_keys(manifest):
    document = json.loads(serialise_manifest(manifest)) | {"schema_version": 9, "later": 1}
    with pytest.raises(ManifestError, match=f"schema_version: expected {SCHEMA_VERSION}"):
        parse_manifest(json.dumps(document))


@pytest.mark.parametrize("text", ["", "{", b"\xff\xfe", "[]", "null"])
def test_not_a_manifest(text):
    with pytest.raises(ManifestError, match=r"manifest.json: \$: "):
        parse_manifest(text)


def test_kernels_must_be_unique_and_sorted(manifest):
    document = json.loads(serialise_manifest(manifest))
    document["kernels"][0] = document["kernels"][1]
    with pytest.raises(ManifestError, match=r"kernels\[1\]: not unique and sorted"):
        parse_manifest(json.dumps(document))


def test_writing_what_cannot_be_read_is_refused(manifest, change):
    with pytest.raises(ManifestError, match=r"kernels\[3\].symbol: expected a symbol name"):
        serialise_manifest(change(manifest, 3, symbol="no symbol"))
