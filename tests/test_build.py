"""Planning and compiling: what is rebuilt, what is refused, what a part of a build leaves."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NoReturn

import pytest

pytest.importorskip("elftools", reason="needs the builder")

from builds import ARCHS, DECODE, TOPK, check_whole, contents, make, mounted, nvrtc_once, topk_set

from build_kernels import workers
from build_kernels.binaries import cubin, nvdisasm
from build_kernels.binaries.cubin import CubinParameter
from build_kernels.building import build, compilers, entry
from build_kernels.building import plan as plan_module
from build_kernels.building.build import BuildError, run_build
from build_kernels.building.entry import EntryError
from build_kernels.building.plan import Task, make_plan, source_digest
from build_kernels.specs import CudaSource, KernelSpec
from dsv4_router_runtime.artifacts.folder import open_artifacts

COMMAND = [sys.executable, "-c", "from build_kernels.__main__ import main; main()", "build"]

LOCAL_ARRAY = """
extern "C" __global__ void __launch_bounds__(128) router_topk(
    const float* a, const float* b, float* c, int* d, int e, int f, int g, float h, int i, int j,
    int k) {
  int many[64];
  for (int n = 0; n < 64; ++n) many[n] = d[n];
  for (int n = 0; n < 64; ++n) many[d[64 + n] & 63] += n;
  d[threadIdx.x] = many[d[threadIdx.x] & 63];
}
"""


@pytest.fixture
def artifacts(tmp_path: Path) -> Path:
    """router_topk, built for every architecture; a copy for the test to spoil."""
    return topk_set(tmp_path / "artifacts")


@pytest.fixture
def topk_is_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build of router_topk is a build of everything."""
    monkeypatch.setattr(plan_module, "KERNELS", (TOPK,))


@pytest.fixture
def no_compiler(artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse to start a compiler, once the set that the test spoils is there."""

    def refuse(*_args: object, **_options: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(workers, "ProcessPoolExecutor", refuse)


@pytest.mark.usefixtures("compile_once")
class TestPlan:
    def test_a_build_makes_a_whole_set(self, artifacts: Path) -> None:
        check_whole(artifacts)
        names = {f"{TOPK.name}.{arch}.{kind}" for arch in ARCHS for kind in ("cubin", "ptx")}
        assert set(contents(artifacts)) == names | {"manifest.json"}

    @pytest.mark.usefixtures("no_compiler")
    def test_nothing_to_do_touches_nothing(self, artifacts: Path) -> None:
        before = {path: path.stat() for path in (artifacts, *artifacts.iterdir())}
        report = make(artifacts)
        assert report.built == ()
        assert report.up_to_date == tuple(f"{TOPK.name}.{arch}" for arch in ARCHS)
        for path, was in before.items():
            now = path.stat()
            assert (now.st_ino, now.st_mtime_ns) == (was.st_ino, was.st_mtime_ns)

    @pytest.mark.parametrize("kind", ["cubin", "ptx"])
    @pytest.mark.parametrize("damage", ["altered", "truncated", "missing"])
    def test_a_damaged_file_is_repaired(self, artifacts: Path, kind: str, damage: str) -> None:
        wanted = contents(artifacts)
        path = artifacts / f"{TOPK.name}.sm_90a.{kind}"
        data = path.read_bytes()
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(data[:-1] + (b"" if damage == "truncated" else b"x"))
        assert make(artifacts).built == (f"{TOPK.name}.sm_90a",)
        assert contents(artifacts) == wanted

    @pytest.mark.usefixtures("no_compiler")
    def test_evidence_and_dotfiles_stay(self, artifacts: Path) -> None:
        path = artifacts / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text())))
        for name in ("evidence.json", ".keep"):
            (artifacts / name).write_text("{}")
        assert make(artifacts).removed == ()
        assert {"evidence.json", ".keep"} < set(contents(artifacts))
        check_whole(artifacts)

    @pytest.mark.usefixtures("topk_is_all")
    @pytest.mark.parametrize(
        "text",
        [
            "",
            '{\n "kernels": [',
            '<<<<<<< HEAD\n{\n "kernels": []\n}\n',
            '{"schema_version": 99, "kernels": []}',
        ],
        ids=["empty", "truncated", "conflict", "schema 99"],
    )
    def test_an_unreadable_manifest_is_made_anew(self, artifacts: Path, text: str) -> None:
        wanted = contents(artifacts)
        (artifacts / "manifest.json").write_text(text)
        plan = make_plan(artifacts, [TOPK.name], ARCHS)
        assert plan.manifest is None
        assert plan.problem
        make(artifacts)
        assert contents(artifacts) == wanted

    def test_a_manifest_not_as_we_write_it_is_written_again(self, artifacts: Path) -> None:
        path = artifacts / "manifest.json"
        wanted = path.read_bytes()
        path.write_text(json.dumps(json.loads(wanted)))
        assert make(artifacts).built == ()
        assert path.read_bytes() == wanted

    def test_another_toolchain_makes_everything_stale(
        self, artifacts: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        versions = compilers.toolchain_versions() | {"nvidia-cutlass-dsl-libs-core": "9.9.9"}
        monkeypatch.setattr(compilers, "toolchain_versions", lambda: versions)
        plan = make_plan(artifacts, [TOPK.name], ["sm_90a"])
        assert [task.arch for task in plan.stale] == ["sm_90a"]
        assert plan.kept == ()  # made by the old tools: not to be listed under the new ones

    def test_the_digest_covers_source_spec_arch_and_tools(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tools = {"nvrtc": "1"}
        digests = [
            source_digest(TOPK, "sm_90a", tools),
            source_digest(TOPK, "sm_100a", tools),
            source_digest(TOPK, "sm_90a", {"nvrtc": "2"}),
            source_digest(dataclasses.replace(TOPK, pdl=False), "sm_90a", tools),
        ]
        monkeypatch.setattr(compilers, "source_files", lambda spec: (Path(build.__file__),))
        digests.append(source_digest(TOPK, "sm_90a", tools))
        assert len(set(digests)) == len(digests)

    @pytest.mark.parametrize("module", [compilers, cubin, entry, nvdisasm])
    @pytest.mark.parametrize("spec", [TOPK, DECODE], ids=["topk", "decode"])
    def test_a_change_of_what_decides_bytes_or_entry_makes_them_stale(
        self, spec: KernelSpec, module: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        changed = Path(module.__file__ or "")
        before = source_digest(spec, "sm_90a", {})
        read = Path.read_bytes
        monkeypatch.setattr(
            Path, "read_bytes", lambda path: read(path) + (b"#" if path == changed else b"")
        )
        assert source_digest(spec, "sm_90a", {}) != before

    def test_decode_sources_are_all_python_kernels(self) -> None:
        names = {path.name for path in compilers.source_files(DECODE)}
        assert {"decode.py", "top_k.py"} <= names
        assert [path.name for path in compilers.source_files(TOPK)] == ["topk.cu"]

    def test_architectures_built_one_after_another_add_up(
        self, artifacts: Path, tmp_path: Path
    ) -> None:
        parts = tmp_path / "parts" / "artifacts"
        for arch in ARCHS:
            assert make(parts, archs=[arch]).built == (f"{TOPK.name}.{arch}",)
        assert contents(parts) == contents(artifacts)

    @pytest.mark.parametrize("rebuilt", ARCHS)
    def test_a_part_built_again_gives_the_same_manifest(
        self, artifacts: Path, rebuilt: str
    ) -> None:
        """Some cubins name their assembler and some do not: the history must not show."""
        wanted = contents(artifacts)
        (artifacts / f"{TOPK.name}.{rebuilt}.cubin").unlink()
        make(artifacts, archs=[rebuilt])
        assert contents(artifacts) == wanted
        assert open_artifacts(artifacts).manifest.toolchain["ptxas"]

    def test_one_kernel_built_again_gives_the_same_manifest(self, tmp_path: Path) -> None:
        """The DSL's assembler and NVRTC's differ: each must stay named when one alone is run."""
        folder = tmp_path / "artifacts"
        make(folder, [DECODE.name, TOPK.name], ["sm_90a", "sm_100a"])
        wanted = contents(folder)
        assert len(open_artifacts(folder).manifest.toolchain["ptxas"].split()) == 2
        for path in folder.glob(f"{TOPK.name}.*"):
            path.unlink()
        report = make(folder, [TOPK.name], ["sm_90a", "sm_100a"])
        assert report.built == (f"{TOPK.name}.sm_90a", f"{TOPK.name}.sm_100a")
        assert contents(folder) == wanted


@pytest.mark.usefixtures("compile_once")
class TestAPartOfABuild:
    """A build of some kernels never drops the others: it keeps them, or is refused."""

    def check_refused(self, artifacts: Path, *words: str, names: Sequence[str] = ()) -> None:
        before = contents(artifacts)
        with pytest.raises(BuildError) as caught:
            make(artifacts, names or [TOPK.name], archs=["sm_90a"])
        message = str(caught.value)
        for word in (
            *words,
            "would drop others",
            "without --kernel and --arch",
            "--artifacts FOLD",
        ):
            assert word in message
        assert contents(artifacts) == before

    def test_in_a_fresh_clone(self, artifacts: Path) -> None:
        """The manifest that was reviewed is there, and no cubin."""
        for path in artifacts.glob(f"{TOPK.name}.*"):
            path.unlink()
        missing = "router_topk.sm_100a (its files are missing or altered)"
        self.check_refused(artifacts, missing, "sm_103a")
        assert make(artifacts).built  # nothing is lost by a build of all that is listed

    def test_after_a_change_of_tools(
        self, artifacts: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        core = "nvidia-cutlass-dsl-libs-core"
        versions = compilers.toolchain_versions()
        monkeypatch.setattr(compilers, "toolchain_versions", lambda: versions | {core: "9.9.9"})
        made = f"router_topk.sm_100a (made by other tools: {core} {versions[core]}, here 9.9.9)"
        self.check_refused(artifacts, made)

    def test_beside_an_altered_file(self, artifacts: Path) -> None:
        (artifacts / f"{TOPK.name}.sm_100a.ptx").write_text("")
        self.check_refused(artifacts, "router_topk.sm_100a (its files are missing or altered)")

    def test_beside_a_kernel_that_no_spec_names(
        self, artifacts: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        two = dataclasses.replace(TOPK, archs=("sm_90a", "sm_100a"))
        monkeypatch.setattr(plan_module, "KERNELS", (two,))
        self.check_refused(artifacts, "router_topk.sm_103a (no spec names it any more)")

    @pytest.mark.parametrize("text", ['{"schema_version": 1, "kernels": []}', '{\n "kernels": ['])
    def test_beside_a_manifest_that_cannot_be_read(self, artifacts: Path, text: str) -> None:
        for path in artifacts.glob(f"{TOPK.name}.*"):
            path.unlink()
        (artifacts / "manifest.json").write_text(text)
        self.check_refused(artifacts, "all that the manifest lists (")

    def test_beside_cubins_without_a_manifest(self, artifacts: Path) -> None:
        (artifacts / "manifest.json").unlink()
        self.check_refused(artifacts, "router_topk.sm_100a (no manifest lists it)")

    def test_many_are_counted(self, tmp_path: Path) -> None:
        tracked = Path(build.__file__).parents[2] / "artifacts" / "manifest.json"
        shutil.copy(tracked, tmp_path)
        self.check_refused(tmp_path, "and 44 more")

    def test_before_anything_is_compiled(
        self, artifacts: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (artifacts / f"{TOPK.name}.sm_100a.ptx").unlink()
        monkeypatch.setattr(build, "_compile_all", None)
        self.check_refused(artifacts)

    @pytest.mark.usefixtures("topk_is_all")
    def test_all_kernels_after_a_change_of_tools(
        self, artifacts: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        versions = compilers.toolchain_versions() | {"nvidia-cutlass-dsl-libs-core": "9.9.9"}
        monkeypatch.setattr(compilers, "toolchain_versions", lambda: versions)
        assert len(make(artifacts).built) == len(ARCHS)

    def test_in_a_folder_of_its_own(self, tmp_path: Path) -> None:
        make(tmp_path / "new", archs=["sm_90a"])
        check_whole(tmp_path / "new")

    def test_of_kernels_out_of_date_beside_others(self, artifacts: Path) -> None:
        """An edited source makes no kernel go."""
        path = artifacts / "manifest.json"
        document = json.loads(path.read_text())
        for kernel in document["kernels"]:
            kernel["source_digest"] = "0" * 64
        path.write_text(json.dumps(document))
        report = make(artifacts, archs=["sm_90a"])
        assert report.built == ("router_topk.sm_90a",)
        assert report.kept == ("router_topk.sm_100a", "router_topk.sm_103a")
        check_whole(artifacts)


class TestDeterminism:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "arch"), [(TOPK.name, "sm_90a"), (DECODE.name, "sm_90a"), (DECODE.name, "sm_100a")]
    )
    def test_two_builds_give_identical_bytes(self, name: str, arch: str, tmp_path: Path) -> None:
        results = []
        for index in range(2):
            home = tmp_path / str(index)
            home.mkdir()
            # What must not matter: the folder, the hash seed, the number of jobs, DSL variables.
            environment = os.environ | {
                "PYTHONHASHSEED": str(index),
                "PYTHONPATH": str(Path(build.__file__).parent.parent),
                **({"CUTE_DSL_LINEINFO": "1"} if index else {}),
            }
            options = ["--artifacts", str(home / "artifacts"), "--kernel", name, "--arch", arch]
            command = [*COMMAND, *options, "--jobs", str(index + 1)]
            done = subprocess.run(
                command, cwd=home, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
            results.append(contents(home / "artifacts"))
        assert results[0] == results[1]
        assert f"{name}.{arch}.cubin" in results[0]
        for data in results[0].values():
            assert str(tmp_path).encode() not in data

    def test_nothing_to_do_takes_two_seconds_and_no_compiler(self, artifacts: Path) -> None:
        code = (
            "import sys, time\n"
            "from build_kernels.cli.main import main\n"
            f"main(['build', '--kernel', {TOPK.name!r}, '--artifacts', {str(artifacts)!r}],"
            " standalone_mode=False)\n"
            "heavy = {'cutlass', 'torch', 'cuda', 'numpy'} & set(sys.modules)\n"
            "libraries = open('/proc/self/maps').read()\n"
            "assert not heavy and 'nvrtc' not in libraries, heavy\n"
            # CPU time: a busy machine, as with CI's legs side by side, takes longer.
            "assert time.process_time() <= 2.0, time.process_time()\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"0 built, {len(ARCHS)} up to date")


@pytest.mark.usefixtures("disassemble_once")
class TestRefusals:
    """A kernel that is not what its spec says is not published."""

    @pytest.fixture(autouse=True)
    def compile_a_text_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(compilers, "nvrtc_compile", nvrtc_once)

    def task(self, **changes: object) -> Task:
        return Task(spec=dataclasses.replace(TOPK, **changes), arch="sm_90a", digest="0" * 64)

    def built(self, task: Task, folder: Path) -> build.Built | str:
        made = build.compile_one(task, folder)
        if isinstance(made, str):
            return made
        return build.make_entries([task], {task.key: made})[task.key]

    def outcome(self, tmp_path: Path, **changes: object) -> str:
        result = self.built(self.task(**changes), tmp_path / "dump")
        assert isinstance(result, str), "the kernel was accepted"
        return result

    @pytest.mark.slow
    def test_the_unchanged_spec_is_accepted(self, tmp_path: Path) -> None:
        assert isinstance(self.built(self.task(), tmp_path / "dump"), build.Built)

    @pytest.mark.slow
    def test_a_folder_with_blanks_and_quotes_is_one_word_to_the_compilers(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The DSL puts it into a line of options."""
        folder, compile_kernel = tmp_path / "it's a dump", compilers.compile_kernel

        def compile_there(spec: KernelSpec, arch: str, named: Path) -> compilers.Compiled:
            assert shlex.split(str(named)) == [str(named)]
            assert named.resolve() == folder
            return compile_kernel(spec, arch, named)

        monkeypatch.setattr(compilers, "compile_kernel", compile_there)
        before = os.getcwd()
        assert isinstance(self.built(self.task(), folder), build.Built)
        assert os.getcwd() == before

    @pytest.mark.slow
    def test_local_memory(self, tmp_path: Path) -> None:
        source = tmp_path / "local.cu"
        source.write_text(LOCAL_ARRAY)
        changed = CudaSource(file=str(source), block=(128, 1, 1))
        assert "uses local memory: stack 256 bytes" in self.outcome(tmp_path, source=changed)

    def test_a_source_that_does_not_compile(self, tmp_path: Path) -> None:
        source = tmp_path / "broken.cu"
        source.write_text("void kernel( {")
        outcome = self.outcome(tmp_path, source=CudaSource(file=str(source), block=(128, 1, 1)))
        assert "broken.cu for sm_90a does not compile" in outcome
        assert "Traceback" not in outcome

    @pytest.mark.slow
    def test_block(self, tmp_path: Path) -> None:
        source = dataclasses.replace(TOPK.source, block=(64, 1, 1))
        assert "block that the cubin is bounded to" in self.outcome(tmp_path, source=source)

    @pytest.mark.slow
    def test_symbol(self, tmp_path: Path) -> None:
        assert "symbol: the compiled kernel has router_topk, the spec says other" in self.outcome(
            tmp_path, symbol="other"
        )

    @pytest.mark.slow
    def test_a_parameter_of_another_kind(self, tmp_path: Path) -> None:
        first, *rest = TOPK.parameters
        wrong = dataclasses.replace(first, kind="int32", element_type=None)
        outcome = self.outcome(tmp_path, parameters=(wrong, *rest))
        assert "parameter logits: size of a int32: the compiled kernel has 8" in outcome

    def test_too_few_parameters(self, tmp_path: Path) -> None:
        outcome = self.outcome(tmp_path, parameters=TOPK.parameters[:-1])
        last = len(TOPK.parameters) - 1
        assert f"parameter {last}: the source declares forced_ids_stride, the spec None" in outcome

    @pytest.mark.slow
    def test_parameters_of_one_size_in_another_order(self, tmp_path: Path) -> None:
        """Neither sizes nor offsets tell e_bias from bias_vl: their names have to."""
        logits, e_bias, bias_vl, *rest = TOPK.parameters
        outcome = self.outcome(tmp_path, parameters=(logits, bias_vl, e_bias, *rest))
        assert "parameter 1: the source declares e_bias, the spec bias_vl" in outcome

    @pytest.mark.slow
    def test_a_parameter_that_the_kernel_never_reads(self, tmp_path: Path) -> None:
        """An option that is passed and ignored would look like one that works."""
        assert isinstance(TOPK.source, CudaSource)
        text = (Path(build.__file__).parents[1] / TOPK.source.file).read_text()
        source = tmp_path / "deaf.cu"
        source.write_text(text.replace("lane < top_k + num_shared_slots", "lane < top_k"))
        changed = dataclasses.replace(TOPK.source, file=str(source))
        outcome = self.outcome(tmp_path, source=changed)
        assert "parameter num_shared_slots: the kernel takes it and never reads it" in outcome

    def test_a_cubin_with_too_few_parameters(self) -> None:
        with pytest.raises(
            EntryError, match=f"parameters: the cubin has 0, the spec {len(DECODE.parameters)}"
        ):
            entry.make_parameters(DECODE, ())

    @pytest.mark.parametrize(
        ("index", "change", "message"),
        [
            (0, {"size": 64}, "parameter w_map: size of a tensor_map: the compiled kernel has 64"),
            (2, {"offset": 260}, "the compiled kernel has 260, the spec says 256"),
            (-1, {"offset": 4}, "the compiled kernel has 4, the spec says"),
        ],
    )
    def test_offsets_and_sizes_of_tensor_maps(
        self, index: int, change: dict[str, int], message: str
    ) -> None:
        found, end = [], 0
        for parameter in DECODE.parameters:
            size, alignment = entry.KIND_LAYOUT[parameter.kind]
            offset = -(-end // alignment) * alignment
            found.append(CubinParameter(offset=offset, size=size))
            end = offset + size
        assert len(entry.make_parameters(DECODE, found)) == len(found)
        found[index] = dataclasses.replace(found[index], **change)
        with pytest.raises(EntryError, match=message):
            entry.make_parameters(DECODE, found)

    @pytest.mark.slow
    def test_an_architecture_that_the_dsl_does_not_know(self, tmp_path: Path) -> None:
        plan = make_plan(tmp_path / "a", [DECODE.name], ["sm_90a"])
        tasks = (Task(spec=DECODE, arch="sm_101a", digest="0" * 64),)
        with pytest.raises(BuildError) as caught:
            run_build(tmp_path / "a", dataclasses.replace(plan, stale=tasks), jobs=1)
        message = str(caught.value)
        assert "nvidia-cutlass-dsl does not compile for sm_101a: it looked for *.sm_110a" in message
        assert "Traceback" not in message

    def test_ptx_that_is_cut_off(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The hash in the manifest would be that of the cut text, and nothing would complain."""
        ptx = ".version 8.8\n.visible .entry k()\n{\n\tret;\n}\n\0"
        written = []
        module = SimpleNamespace(
            launch_properties=lambda **_: dict.fromkeys(_FACTS, 0) | {"block": [1], "cluster": [1]},
            compile_kernel=lambda **_: (b"\x7fELF", written[-1]),
        )
        monkeypatch.setattr(compilers.importlib, "import_module", lambda name: module)
        written.append(ptx)
        assert compilers.compile_kernel(DECODE, "sm_90a", tmp_path).ptx == ptx.rstrip("\0")
        for end in (0, 10, -4):
            written.append(ptx[:end])
            with pytest.raises(compilers.CompileError, match="wrote for sm_90a is cut off"):
                compilers.compile_kernel(DECODE, "sm_90a", tmp_path)

    @pytest.mark.slow
    @pytest.mark.parametrize(("name", "size"), [(TOPK.name, 24), (DECODE.name, 120)])
    def test_a_full_disk_is_said(self, tmp_path: Path, name: str, size: int) -> None:
        with mounted(tmp_path / "volume", "-o", f"size={size}k") as volume:
            with pytest.raises(BuildError) as caught:
                make(volume / "a", [name], ["sm_90a"])
        words = rf"{name}\.sm_90a: no file can be written in .* \(No space left on device\)"
        assert re.search(words, str(caught.value))
        assert "Traceback" not in str(caught.value)

    def test_a_cubin_that_a_quota_cut_off(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def over_quota(_: int) -> NoReturn:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

        compile_kernel = compilers.compile_kernel
        monkeypatch.setattr(
            compilers,
            "compile_kernel",
            lambda *a: dataclasses.replace(compile_kernel(*a), cubin=b"\x7fELF"),
        )
        monkeypatch.setattr(build.os, "fsync", over_quota)
        assert "(Disk quota exceeded): not a readable cubin" in self.outcome(tmp_path)

    @pytest.mark.slow
    def test_one_failure_publishes_nothing(
        self, artifacts: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        source = tmp_path / "broken.cu"
        source.write_text("void kernel( {")
        before = contents(artifacts)
        spec = dataclasses.replace(TOPK, source=CudaSource(file=str(source), block=(128, 1, 1)))
        good = Task(spec=TOPK, arch="sm_100a", digest="1" * 64)
        bad = [Task(spec=spec, arch=arch, digest="0" * 64) for arch in ("sm_90a", "sm_103a")]
        plan = make_plan(artifacts, [TOPK.name], ARCHS)
        plan = dataclasses.replace(plan, stale=(bad[0], good, bad[1]), current=())
        with pytest.raises(BuildError) as caught:
            run_build(artifacts, plan, jobs=2)
        assert "router_topk.sm_90a: broken.cu" in str(caught.value)
        assert "router_topk.sm_103a: broken.cu" in str(caught.value)
        assert contents(artifacts) == before

    @pytest.mark.slow
    def test_a_compiler_that_dies_is_a_failure_of_its_kernel(
        self, artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = contents(artifacts)
        plan = make_plan(tmp_path / "empty", [TOPK.name], ["sm_90a"])
        monkeypatch.setattr(build, "compile_one", os.abort)
        monkeypatch.setattr(build, "_prepare_compiler", _die)
        with pytest.raises(BuildError, match=r"router_topk\.sm_90a: its process died"):
            run_build(artifacts, plan, jobs=1)
        assert contents(artifacts) == before


_FACTS = ("parameters", "expert_tile", "dynamic_shared_bytes", "workspace_bytes")


def _die() -> None:
    os._exit(1)


@pytest.mark.usefixtures("compile_once")
class TestLocked:
    def test_the_same_bytes_pass(self, artifacts: Path) -> None:
        wanted = contents(artifacts)
        for path in artifacts.glob("*.cubin"):
            path.unlink()
        assert len(make(artifacts, locked=True).built) == len(ARCHS)
        assert contents(artifacts) == wanted

    @pytest.mark.parametrize(
        ("field", "value"),
        [("cubin_sha256", "0" * 64), ("ptx_sha256", "1" * 64), ("source_digest", "2" * 64)],
    )
    def test_other_bytes_fail_and_publish_nothing(
        self, artifacts: Path, field: str, value: str
    ) -> None:
        path = artifacts / "manifest.json"
        document = json.loads(path.read_text())
        document["kernels"][0][field] = value
        path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
        before = contents(artifacts)
        key = f"{document['kernels'][0]['name']}.{document['kernels'][0]['arch']}"
        with pytest.raises(BuildError, match=f"{key}: {field}: {value} in the manifest"):
            make(artifacts, locked=True)
        assert contents(artifacts) == before

    def test_resources_count_too(self, artifacts: Path) -> None:
        path = artifacts / "manifest.json"
        path.write_text(path.read_text().replace('"registers": ', '"registers": 1'))
        for file in artifacts.glob("*.cubin"):
            file.unlink()
        with pytest.raises(BuildError, match=r"router_topk\.sm_90a: resources: .*registers"):
            make(artifacts, locked=True)

    def test_no_manifest_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(BuildError, match="--locked needs a manifest"):
            make(tmp_path / "artifacts", locked=True)


@pytest.mark.slow
def test_kernel_specs_pickle_into_the_compilers(tmp_path: Path) -> None:
    """A kernel that is compiled went through a process boundary and kept its launch facts."""
    artifacts = tmp_path / "artifacts"
    assert make(artifacts, archs=["sm_90a"]).built
    for kernel in open_artifacts(artifacts).manifest.kernels:
        assert isinstance(TOPK, KernelSpec)
        assert kernel.launch.block == (128, 1, 1)
        assert kernel.launch.grid == ("token_tiles", 1, 1)
        assert kernel.launch.token_tile == 4
        assert kernel.resources.spill_bytes == kernel.resources.stack_bytes == 0
        assert kernel.resources.opcodes["LDL"] == kernel.resources.opcodes["STL"] == 0
        assert kernel.source_digest == source_digest(
            TOPK, kernel.arch, compilers.toolchain_versions()
        )


@pytest.mark.usefixtures("compile_once")
class TestAFamilysTarget:
    def test_is_left_out_unless_it_is_named(self, tmp_path: Path) -> None:
        made = topk_set(tmp_path / "a")
        assert not list(made.glob("*f.cubin"))
        assert not any(
            task.arch.endswith("f") for task in make_plan(made, [TOPK.name], ARCHS).stale
        )

    @pytest.mark.slow
    def test_joins_a_set_and_stays_in_it(self, artifacts: Path) -> None:
        assert make(artifacts, archs=("sm_100f",)).built == ("router_topk.sm_100f",)
        listed = {kernel.arch for kernel in open_artifacts(artifacts).manifest.kernels}
        assert listed == {*ARCHS, "sm_100f"}
        again = make(artifacts, archs=("sm_90a",))
        assert "router_topk.sm_100f" in again.kept
        assert (artifacts / "router_topk.sm_100f.cubin").is_file()

    @pytest.mark.slow
    def test_is_not_shipped(self, artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(plan_module, "KERNELS", (TOPK,))
        manifest = open_artifacts(artifacts).manifest
        assert plan_module.packaging_problem(manifest) is None
        make(artifacts, archs=("sm_100f",))
        problem = plan_module.packaging_problem(open_artifacts(artifacts).manifest)
        assert problem == "no spec names router_topk.sm_100f"
