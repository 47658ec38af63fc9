"""`build-kernels diff`: every planted change is named and classed, and bad sides are refused."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("click", reason="needs the builder")

from click.testing import CliRunner, Result

from build_kernels.cli import main as cli

CHECKOUT = Path(__file__).parents[1]
TRACKED = CHECKOUT / "artifacts"
DECODE, TOPK = "router_decode_kmajor_n8.sm_90a", "router_topk.sm_90a"

Json = Any
Edit = Callable[[Json, Json, Json], None]


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.main, ["diff", *map(str, arguments)])


def write_set(folder: Path, manifest: Json, evidence: Json | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    if evidence is not None:
        (folder / "evidence.json").write_text(json.dumps(evidence))
    return folder


@pytest.fixture
def tracked() -> tuple[Json, Json]:
    """The tracked set's decode and select kernels of sm_90a, and evidence that is known here."""
    manifest = json.loads((TRACKED / "manifest.json").read_text())
    manifest["kernels"] = [
        entry
        for entry in manifest["kernels"]
        if f"{entry['name']}.{entry['arch']}" in (DECODE, TOPK)
    ]
    records = [{"gpu": "NVIDIA H200"}]
    evidence = [
        {
            "artifact": f"{entry['name']}.{entry['arch']}",
            "cubin_sha256": entry["cubin_sha256"],
            "ptx_sha256": entry["ptx_sha256"],
            "rungs": {
                "lint": {"status": "passed", "scope": "full", "checker": "lint 1"},
                "hardware": {"status": "passed", "scope": "full", "figures": {"records": records}},
                "faults": {"status": "not run", "scope": "full", "reason": "no time"},
            },
        }
        for entry in manifest["kernels"]
    ]
    return manifest, {"schema_version": 1, "evidence": evidence}


def at(path: str, value: Json) -> Edit:
    """Set a member of the decode kernel's entry."""

    def edit(_manifest: Json, kernel: Json, _rungs: Json) -> None:
        *parents, last = path.split(".")
        for name in parents:
            kernel = kernel[int(name) if name.isdigit() else name]
        if value is None:
            del kernel[last]
        else:
            kernel[last] = value

    return edit


def of_set(change: Callable[[Json], object]) -> Edit:
    return lambda manifest, _kernel, _rungs: change(manifest) and None


def rung(name: str, **members: Json) -> Edit:
    return lambda _manifest, _kernel, rungs: rungs[name].update(members)


def swap(kernel: Json, i: int, j: int) -> None:
    """Exchange two parameters of equal size, each with the other's place."""
    items = kernel["parameters"]
    items[i], items[j] = items[j], items[i]
    items[i]["offset"], items[j]["offset"] = items[j]["offset"], items[i]["offset"]


def place(kernel: Json, name: str) -> int:
    return next(i for i, item in enumerate(kernel["parameters"]) if item["name"] == name)


def retyped(_manifest: Json, kernel: Json, _rungs: Json) -> None:
    kernel["parameters"][place(kernel, "out_ids")]["element_type"] = "int64"


def renamed(_manifest: Json, kernel: Json, _rungs: Json) -> None:
    kernel["parameters"][place(kernel, "gate_temp")]["name"] = "temperature"


def moved(_manifest: Json, kernel: Json, _rungs: Json) -> None:
    first = place(kernel, "num_tokens")
    swap(kernel, first, first + 1)


def shifted(_manifest: Json, kernel: Json, _rungs: Json) -> None:
    kernel["parameters"][-1]["offset"] += 8


def appended(_manifest: Json, kernel: Json, _rungs: Json) -> None:
    end = kernel["parameters"][-1]["offset"] + 4
    kernel["parameters"].append({"name": "more", "kind": "int32", "offset": end, "size": 4})


def dropped(_manifest: Json, kernel: Json, _rungs: Json) -> None:
    del kernel["parameters"][-1]


def boxed(_manifest: Json, kernel: Json, _rungs: Json) -> None:
    kernel["parameters"][0]["tensor_map"]["box"] = [64, 32]


def scratch(_manifest: Json, kernel: Json, _rungs: Json) -> None:
    kernel["parameters"][place(kernel, "workspace")]["scratch"]["elements"] *= 2


def more(*path: str, by: int) -> Edit:
    def edit(_manifest: Json, kernel: Json, _rungs: Json) -> None:
        *parents, last = path
        for name in parents:
            kernel = kernel[name]
        kernel[last] = kernel.get(last, 0) + by

    return edit


def no_opcode(_manifest: Json, kernel: Json, _rungs: Json) -> None:
    del kernel["resources"]["opcodes"]["HGMMA"]


def rehashed(_manifest: Json, kernel: Json, _rungs: Json) -> None:
    kernel["cubin_sha256"] = "0" * 64


def no_evidence(_manifest: Json, _kernel: Json, rungs: Json) -> None:
    del rungs["lint"]


def no_gpu(_manifest: Json, _kernel: Json, rungs: Json) -> None:
    rungs["hardware"]["figures"]["records"] = [{"gpu": "NVIDIA H100"}]


# The change, its class, a part of its name, its word, and whether it is that of a whole set.
PLANTED: dict[str, tuple[Edit, str, str, str]] = {
    "a register more": (more("resources", "registers", by=1), "resources", "registers", ""),
    "a spill": (more("resources", "spill_bytes", by=8), "resources", "bytes of spills", ""),
    "a stack frame": (more("resources", "stack_bytes", by=16), "resources", "bytes of stack", ""),
    "a local store": (more("resources", "opcodes", "STL", by=1), "resources", "STL", ""),
    "static shared memory": (
        more("resources", "static_shared_bytes", by=128),
        *("resources", "bytes of static shared memory", ""),
    ),
    "dynamic shared memory": (
        more("launch", "dynamic_shared_bytes", by=1024),
        *("resources", "bytes of dynamic shared memory", ""),
    ),
    "an opcode lost": (no_opcode, "opcodes", "HGMMA", "lost"),
    "an opcode less": (more("resources", "opcodes", "SYNCS", by=-1), "opcodes", "SYNCS", ""),
    "an opcode new": (more("resources", "opcodes", "UTMASTG", by=1), "opcodes", "UTMASTG", ""),
    "a parameter moved": (moved, "abi", ", place", "moved"),
    "a parameter renamed": (renamed, "abi", "parameter", "renamed"),
    "a parameter retyped": (retyped, "abi", "parameter out_ids, element_type", ""),
    "a parameter's offset": (shifted, "abi", ", offset", ""),
    "a parameter added": (appended, "abi", "parameter more", "added"),
    "a parameter removed": (dropped, "abi", "parameter out_logits_stride", "removed"),
    "another symbol": (at("symbol", "other"), "abi", "symbol", ""),
    "another role": (at("role", "prefill"), "abi", "role", ""),
    "threads": (at("launch.block", [512, 1, 1]), "launch", "block", ""),
    "cluster": (at("launch.cluster", [8, 1, 1]), "launch", "cluster", ""),
    "grid": (at("launch.grid", ["k_splits", 1, 1]), "launch", "grid", ""),
    "PDL": (at("launch.pdl", False), "launch", "pdl", ""),
    "wait limit": (more("launch", "wait_limit_ms", by=1), "launch", "wait_limit_ms", ""),
    "a tensor map's box": (boxed, "launch", "parameter w_map, tensor_map.box", ""),
    "more scratch": (scratch, "launch", "parameter workspace, scratch.elements", ""),
    "a range narrowed": (
        at("problem.num_tokens", [1, 4]),
        *("problem range", "num_tokens", "narrowed"),
    ),
    "a range widened": (
        at("problem.num_tokens", [1, 16]),
        *("problem range", "num_tokens", "widened"),
    ),
    "a range without end": (
        at("problem.top_k", [1, 9]),
        *("problem range", "top_k", "widened"),
    ),
    "a range elsewhere": (
        at("problem.num_experts", [2, 1024]),
        *("problem range", "num_experts", "moved"),
    ),
    "K in larger steps": (
        at("problem.k_multiple", 128),
        *("problem range", "k_multiple", "narrowed"),
    ),
    "a dtype refused": (
        at("problem.dtypes.out_ids", ["int32"]),
        *("problem range", "dtypes of out_ids", "narrowed"),
    ),
    "a dtype accepted": (
        at("problem.dtypes.tid2eid", ["int32", "int64"]),
        *("problem range", "dtypes of tid2eid", "widened"),
    ),
    "a bound of clusters": (
        at("launch.max_clusters", 7),
        *("problem range", "clusters per launch", "narrowed"),
    ),
    "another ptxas": (
        of_set(lambda m: m["toolchain"].update(ptxas="13.0.48")),
        *("toolchain", "ptxas", ""),
    ),
    "another DSL": (
        of_set(lambda m: m["toolchain"].update({"nvidia-cutlass-dsl": "4.9.0"})),
        *("toolchain", "nvidia-cutlass-dsl", ""),
    ),
    "a newer driver needed": (
        of_set(lambda m: m["driver"].update(sm_90a=12080)),
        *("driver", "sm_90a", "raised"),
    ),
    "another schema": (
        of_set(lambda m: m.update(schema_version=m["schema_version"] + 1)),
        *("schema", "schema_version", ""),
    ),
    "a key of another schema": (at("colour", "blue"), "other", "colour", ""),
    "the source digest": (at("source_digest", "0" * 64), "sources", "source digest", "changed"),
    "evidence lost": (no_evidence, "evidence", "lint", "lost"),
    "evidence quicker": (rung("lint", scope="quick"), "evidence", "lint", "lost"),
    "evidence gained": (rung("faults", status="passed"), "evidence", "faults", "gained"),
    "evidence failed": (
        rung("lint", status="failed", reason="W0001"),
        *("evidence", "lint", "failed"),
    ),
    "another checker": (rung("lint", checker="lint 2"), "evidence", "lint, checker", ""),
    "another GPU": (no_gpu, "evidence", "hardware on NVIDIA H100", "gained"),
}
OPPOSITES = {
    **{"narrowed": "widened", "widened": "narrowed", "raised": "lowered"},
    **{"added": "removed", "removed": "added"},
    **{"lost": "gained", "gained": "lost", "failed": "gained"},
}
# Kinds of change that are the set's.
OF_THE_SET = {"toolchain", "driver", "schema"}


def planted(tracked: tuple[Json, Json], tmp_path: Path, edit: Edit) -> tuple[Path, Path]:
    """Two folders that differ by one edit of the decode kernel or of its set."""
    before = write_set(tmp_path / "before", *tracked)
    manifest, evidence = json.loads(json.dumps(tracked))
    edit(manifest, manifest["kernels"][0], evidence["evidence"][0]["rungs"])
    return before, write_set(tmp_path / "after", manifest, evidence)


@pytest.mark.quick(8)
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_change_is_named_and_classed(
    name: str, tracked: tuple[Json, Json], tmp_path: Path
) -> None:
    edit, kind, what, word = PLANTED[name]
    folders = planted(tracked, tmp_path, edit)
    result = call(*folders, "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    kernels = {kernel["key"]: kernel for kernel in report["kernels"]}
    changes = report["set_changes"] if kind in OF_THE_SET else kernels[DECODE]["changes"]
    found = [c for c in changes if c["kind"] == kind and what in c["what"] and c["word"] == word]
    assert found
    assert report["classes"].keys() == {kind}, "a change is of one class"
    assert not report["is_same"]
    assert kernels[TOPK] == {"key": TOPK, "cubin": "same bytes", "changes": []}
    for form in ((), ("--markdown",)):
        told = call(*folders, *form)
        assert told.exit_code == 1
        assert what.replace("[", "&#91;") in told.stdout
        assert word in told.stdout
    # And the other way round it is a change of the same class, and of the opposite sense.
    back = json.loads(call(*folders[::-1], "--json").stdout)
    assert back["classes"].keys() == {kind}
    changes = back["set_changes"] + [c for kernel in back["kernels"] for c in kernel["changes"]]
    if word in OPPOSITES and kind != "opcodes":  # of those, one that is gained has no word
        words = {c["word"] for c in changes if kind == "abi" or what in c["what"]}
        assert OPPOSITES[word] in words


def test_equal_sets_differ_in_nothing(tracked: tuple[Json, Json], tmp_path: Path) -> None:
    folders = planted(tracked, tmp_path, lambda *_: None)
    result = call(*folders)
    assert result.exit_code == 0
    assert "2 cubins: 2 same bytes; no difference" in result.stdout
    assert "no difference" in call(*folders, "--markdown").stdout


def test_a_kernel_added_or_removed_is_told_with_its_resources(
    tracked: tuple[Json, Json], tmp_path: Path
) -> None:
    folders = planted(tracked, tmp_path, of_set(lambda m: m["kernels"].pop(0)))
    assert f"{DECODE.replace('.', ' (')}): removed" in call(*folders).stdout
    added = call(*folders[::-1], "--markdown").stdout
    row = next(line for line in added.splitlines() if "router_decode_kmajor_n8 (sm_90a)" in line)
    assert "| added |" in row
    assert "registers" in row
    assert "HGMMA" in row
    assert f"Unchanged: {TOPK.replace('.', ' (')})." in added


def test_of_two_swapped_parameters_one_moved(tracked: tuple[Json, Json], tmp_path: Path) -> None:
    """The other parameters keep their order, so naming all of them would hide the one."""
    report = json.loads(call(*planted(tracked, tmp_path, moved), "--json").stdout)
    changes = report["kernels"][0]["changes"]
    assert [c["what"] for c in changes if c["word"] == "moved"] in (
        ["parameter num_tokens, place"],
        ["parameter num_experts, place"],
    )


def test_a_parameter_inserted_shifts_the_others_in_one_line(
    tracked: tuple[Json, Json], tmp_path: Path
) -> None:
    def inserted(_manifest: Json, kernel: Json, _rungs: Json) -> None:
        items, index = kernel["parameters"], place(kernel, "top_k")
        for item in items[index:]:
            item["offset"] += 4
        offset = items[index]["offset"] - 4
        items.insert(index, {"name": "more", "kind": "int32", "offset": offset, "size": 4})

    report = json.loads(call(*planted(tracked, tmp_path, inserted), "--json").stdout)
    count = len(tracked[0]["kernels"][0]["parameters"])
    told = [change["what"] for change in report["kernels"][0]["changes"]]
    shifted = count - place(tracked[0]["kernels"][0], "top_k")
    last = f"parameter top_k to out_logits_stride ({shifted}), offset"
    assert told == ["parameter more", last]


def test_delta_and_both_values_are_told(tracked: tuple[Json, Json], tmp_path: Path) -> None:
    registers = tracked[0]["kernels"][0]["resources"]["registers"]
    told = call(*planted(tracked, tmp_path, more("resources", "registers", by=1))).stdout
    assert f"registers {registers} → {registers + 1} (+1)" in told


def test_kernels_with_equal_changes_share_a_row(tracked: tuple[Json, Json], tmp_path: Path) -> None:
    def both(manifest: Json, _kernel: Json, _rungs: Json) -> None:
        for kernel in manifest["kernels"]:
            kernel["source_digest"] = "0" * 64

    told = call(*planted(tracked, tmp_path, both), "--markdown").stdout
    rows = [line for line in told.splitlines() if line.startswith("| router")]
    assert len(rows) == 1
    assert "router_decode_kmajor_n8 (sm_90a), router_topk (sm_90a)" in rows[0]


def test_names_out_of_a_wheel_are_no_markup(tracked: tuple[Json, Json], tmp_path: Path) -> None:
    edit = at("symbol", "a|b<img src=x>[c](http://d)\n@everyone")
    row = call(*planted(tracked, tmp_path, edit), "--markdown").stdout
    assert "<img" not in row
    assert "a|b" not in row
    assert "@everyone" not in row
    assert "[c]" not in row


# --- the places that a side is read from


def git(repository: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false")
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=repository, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tracked: tuple[Json, Json], tmp_path: Path) -> Path:
    """A repository whose second commit narrows the tracked set's range; no cubin is in it."""
    root = tmp_path / "repository"
    root.mkdir()
    git(root, "init", "--quiet", "--initial-branch=main")
    for high in (8, 4):
        tracked[0]["kernels"][0]["problem"]["num_tokens"] = [1, high]
        write_set(root / "artifacts", *tracked)
        git(root, "add", ".")
        git(root, "commit", "--quiet", "--message", f"high {high}")
    return root


_FRESH = """
import runpy, sys
for name in ("cutlass", "elftools", "torch", "numpy", "sentryward"):
    sys.modules[name] = None  # an import of it fails
sys.argv = ["build-kernels", *sys.argv[1:]]
runpy.run_module("build_kernels", run_name="__main__", alter_sys=False)
"""


def fresh(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process that cannot import a compiler."""
    return subprocess.run(
        [sys.executable, "-c", _FRESH, *arguments],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), **more},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_two_git_refs_are_compared_without_a_compiler_in_a_second(repository: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = fresh(repository, "diff", "HEAD~1", "main")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 1, done.stderr
    assert "problem range: num_tokens [1, 8] → [1, 4] narrowed" in done.stdout
    # Of the processor, as other tests run beside this one.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_the_tracked_set_of_this_checkout_is_compared_in_a_second(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = fresh(tmp_path, "diff", str(TRACKED), str(TRACKED))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_a_ref_is_compared_with_a_folder(repository: Path, monkeypatch) -> None:
    monkeypatch.chdir(repository)
    assert call("main", "artifacts").exit_code == 0
    assert call("HEAD~1", "artifacts").exit_code == 1


def test_what_a_ref_cannot_tell_is_said(repository: Path, monkeypatch) -> None:
    monkeypatch.chdir(repository)
    manifest = json.loads((repository / "artifacts" / "manifest.json").read_text())
    manifest["kernels"][0]["cubin_sha256"] = "0" * 64
    (write_set(repository / "artifacts", manifest, None) / "evidence.json").unlink()
    told = call("main", "artifacts").stdout
    assert "changed (SASS not compared)" in told
    assert "note: not compared, as the cubins of both sides are not at hand" in told
    assert "has no evidence.json" in told


def test_a_wheel_is_compared_with_the_folder_it_came_from(
    tracked: tuple[Json, Json], tmp_path: Path
) -> None:
    folder, _ = planted(tracked, tmp_path, lambda *_: None)
    wheel = tmp_path / "dsv4_router-0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("manifest.json", "evidence.json"):
            archive.write(folder / name, f"dsv4_router_runtime/_artifacts/{name}")
    assert call(folder, wheel).exit_code == 0


def test_a_manifest_that_this_runtime_cannot_fill_is_compared_and_it_is_said(
    tracked: tuple[Json, Json], tmp_path: Path
) -> None:
    told = call(*planted(tracked, tmp_path, renamed)).stdout
    assert "note: the runtime here refuses manifest.json of folder" in told


# --- cubins


@pytest.fixture
def built(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders with router_topk, built; a fraction of a second."""
    pytest.importorskip("elftools", reason="needs the builder")
    from builds import topk_set

    before = topk_set(tmp_path / "before")
    shutil.copytree(before, tmp_path / "after")
    return before, tmp_path / "after"


def alter(folder: Path, section: str, *, grow: int = 0, in_manifest: bool = True) -> None:
    """Change a byte of a section of router_topk's cubin of sm_90a."""
    from elftools.elf.elffile import ELFFile

    path = folder / f"{TOPK}.cubin"
    with path.open("rb") as file:
        place = ELFFile(file).get_section_by_name(section)["sh_offset"]
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data) + b"\0" * grow)
    if in_manifest:
        manifest = json.loads((folder / "manifest.json").read_text())
        for entry in manifest["kernels"]:
            if f"{entry['name']}.{entry['arch']}" == TOPK:
                entry["cubin_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("section", "state"),
    [
        (".text.router_topk", "changed"),
        (".nv.constant0.router_topk", "same SASS"),
        (".strtab", "same SASS"),
    ],
)
def test_with_cubins_at_hand_the_sass_is_compared(
    section: str, state: str, built: tuple[Path, Path]
) -> None:
    alter(built[1], section, grow=8)
    report = json.loads(call(*built, "--json").stdout)
    kernel = next(kernel for kernel in report["kernels"] if kernel["key"] == TOPK)
    assert kernel["cubin"] == state
    (change,) = kernel["changes"]
    assert (change["kind"], change["what"]) == ("resources", "bytes of cubin")
    assert change["after"] - change["before"] == 8
    assert not report["notes"] or "not compared" not in report["notes"][-1]


@pytest.mark.slow
def test_every_opcode_is_counted_on_demand(built: tuple[Path, Path]) -> None:
    """The manifest counts those that matter; an IMAD more is in the cubin alone."""
    pytest.importorskip("elftools", reason="needs the builder")
    other = Path(f"{TOPK}.cubin").with_suffix("").with_suffix(".sm_100a.cubin")
    before = built[0] / f"{TOPK}.cubin"
    manifest = json.loads((built[0] / "manifest.json").read_text())
    digest = hashlib.sha256((built[0] / other).read_bytes()).hexdigest()
    shutil.copy(built[0] / other, built[1] / before.name)
    next(e for e in manifest["kernels"] if e["arch"] == "sm_90a")["cubin_sha256"] = digest
    (built[1] / "manifest.json").write_text(json.dumps(manifest))
    assert "SASS " not in call(*built).stdout
    report = json.loads(call(*built, "--json", "--sass").stdout)
    found = {c["what"] for k in report["kernels"] for c in k["changes"] if c["kind"] == "opcodes"}
    assert any(what.startswith("SASS IMAD") for what in found), "no watched opcode"


# --- bad sides


def refused(*sides: str | Path) -> str:
    result = call(*sides)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert isinstance(result.exception, SystemExit), "no traceback"
    return " ".join(result.stderr.split())


def test_a_cubin_that_the_manifest_does_not_record_is_an_error(built: tuple[Path, Path]) -> None:
    alter(built[1], ".strtab")
    alter(built[1], ".text.router_topk", in_manifest=False)
    assert f"{TOPK}.cubin is not the one that manifest.json records" in refused(*built)


def test_a_cubin_that_was_altered_under_an_equal_manifest_is_an_error(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    """Both manifests have the same hash: the bytes at hand do not."""
    alter(built[1], ".text.router_topk", in_manifest=False)
    wheel = tmp_path / "evil.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in built[1].iterdir():
            archive.write(path, f"dsv4_router_runtime/_artifacts/{path.name}")
    for side in (built[1], wheel):
        assert f"{TOPK}.cubin is not the one that manifest.json records" in refused(built[0], side)
        assert f"{TOPK}.cubin is not the one that manifest.json records" in refused(side, built[0])


def test_a_cubin_that_is_no_cubin_is_an_error(built: tuple[Path, Path]) -> None:
    for folder, data in zip(built, (b"\x7fELF", b"rubbish"), strict=True):
        (folder / f"{TOPK}.cubin").write_bytes(data)
        manifest = json.loads((folder / "manifest.json").read_text())
        next(e for e in manifest["kernels"] if e["arch"] == "sm_90a")["cubin_sha256"] = (
            hashlib.sha256(data).hexdigest()
        )
        (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "not a readable cubin" in refused(*built)


BAD_MANIFESTS = {
    "": "not valid JSON",
    "[]": "expected an object",
    "{": "not valid JSON",
    '{"schema_version": "5", "kernels": []}': "schema_version: expected an int",
    '{"schema_version": 5}': "kernels: expected a list of kernels",
    '{"schema_version": 99, "kernels": [], "kernels": []}': 'the key "kernels" is written twice',
    '{"schema_version": 5, "kernels": [1]}': "kernels[0]: expected an object",
    '{"schema_version": 5, "kernels": [{"name": "../x", "arch": "sm_90a"}]}': "kernels[0].name",
    '{"schema_version": 5, "kernels": [], "x": ' + "[" * 20_000 + "]" * 20_000 + "}": "nested",
    "\ud83d": "not valid JSON",
}


@pytest.mark.parametrize("text", BAD_MANIFESTS)
def test_a_corrupt_manifest_is_an_error_with_its_place(
    text: str, tracked: tuple[Json, Json], tmp_path: Path
) -> None:
    good = write_set(tmp_path / "good", *tracked)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "manifest.json").write_bytes(text.encode("utf-16", "surrogatepass"))
    if text.isascii():
        (tmp_path / "bad" / "manifest.json").write_text(text)
    assert BAD_MANIFESTS[text] in refused(good, tmp_path / "bad")


def test_a_kernel_listed_twice_is_an_error(tracked: tuple[Json, Json], tmp_path: Path) -> None:
    twice = of_set(lambda m: m["kernels"].append(m["kernels"][0]))
    assert f"a second kernel {DECODE}" in refused(*planted(tracked, tmp_path, twice))


def test_a_parameter_listed_twice_is_an_error(tracked: tuple[Json, Json], tmp_path: Path) -> None:
    def twice(_manifest: Json, kernel: Json, _rungs: Json) -> None:
        kernel["parameters"].append(kernel["parameters"][0])

    assert "a second parameter w_map" in refused(*planted(tracked, tmp_path, twice))


def test_values_of_no_known_shape_are_shown_as_they_are(
    tracked: tuple[Json, Json], tmp_path: Path
) -> None:
    """As another schema may have them."""
    odd = at("problem.dtypes.out_ids", [["int32"], 7])
    assert 'dtypes of out_ids ["int32", "int64"] → [["int32"], 7]' in (
        call(*planted(tracked, tmp_path, odd)).stdout
    )


def test_corrupt_evidence_is_an_error(tracked: tuple[Json, Json], tmp_path: Path) -> None:
    folders = planted(tracked, tmp_path, rung("lint", status="perhaps"))
    assert "evidence[0].rungs.lint.status: expected one of" in refused(*folders)


def test_evidence_of_another_schema_is_not_compared_and_it_is_said(
    tracked: tuple[Json, Json], tmp_path: Path
) -> None:
    before, after = planted(tracked, tmp_path, lambda *_: None)
    write_set(after, tracked[0], {"schema_version": 2})
    assert "note: evidence not compared" in call(before, after).stdout


def test_places_that_are_no_side_are_errors_in_words(
    tracked: tuple[Json, Json], tmp_path: Path, monkeypatch
) -> None:
    good = write_set(tmp_path / "good", *tracked)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.whl").write_text("no wheel")
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("other/__init__.py", "")
    (tmp_path / "fifo").mkdir()
    os.mkfifo(tmp_path / "fifo" / "manifest.json")
    os.mkfifo(tmp_path / "fifo.whl")
    for place, words in {
        "empty": "has no manifest.json",
        "text.whl": "cannot be read as a wheel",
        "other.whl": "name a wheel of dsv4-router",
        "absent.whl": "there is no such file or folder",
        "./absent": "there is no such file or folder",
        "absent": "no commit of the git repository",
        "fifo": "a FIFO, not a regular file",
        "fifo.whl": "a FIFO, not a regular file",
        "nul\0byte": "null byte",
    }.items():
        assert words in refused(good, place), place
    assert 'expected a folder, a wheel or a git ref (got "")' in refused("", good)


def test_a_ref_without_a_set_and_a_machine_without_git_are_errors(
    repository: Path, monkeypatch
) -> None:
    monkeypatch.chdir(repository)
    git(repository, "rm", "-r", "--quiet", "artifacts")
    git(repository, "commit", "--quiet", "--message", "none")
    assert "has no manifest.json" in refused("HEAD~1", "HEAD")
    assert "no commit of the git repository" in refused("HEAD~1", "HEAD~9")
    assert "No such option" in refused("HEAD", "--output=x")
    assert "no commit of the git repository" in refused("HEAD~1", "HEAD~1:artifacts")
    monkeypatch.setenv("PATH", str(repository))
    assert "git cannot be run" in refused("HEAD~1", "HEAD")


def test_two_forms_of_output_at_once_are_refused(tmp_path: Path) -> None:
    assert "leave one out" in " ".join(call("a", "b", "--json", "--markdown").stderr.split())
