"""`doctor` gives the right verdict, exit code and repair in each fault that it must catch."""

from __future__ import annotations

import getpass
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import decode_kernel, sample_manifest, topk_kernel

from dsv4_router_runtime import doctor
from dsv4_router_runtime.__main__ import main
from dsv4_router_runtime.device import driver
from dsv4_router_runtime.device.facts import Gpu
from dsv4_router_runtime.doctor import finding, installation, machine
from dsv4_router_runtime.errors import DriverError

torch = pytest.importorskip("torch", reason="torch is the caller's and is not installed here")

from doctor_faults import (  # noqa: E402
    BUILD,
    FAULTS,
    SELF_TEST,
    TOPK,
    flip_a_byte,
    fork,
    leave_out,
    raises,
    without_torch,
)
from doctor_world import forget_driver, make_world, write_version  # noqa: E402

from dsv4_router_runtime.doctor import inputs, selftest  # noqa: E402


@pytest.fixture
def world(monkeypatch, write_artifacts, manifest):
    yield make_world(monkeypatch, write_artifacts(manifest), manifest)
    forget_driver()


@pytest.fixture
def examine(world, capsys):
    """Run `doctor --json` on the world; returns the exit code and the findings by check."""

    def run(*arguments):
        code = main(["doctor", "--json", "--artifacts", str(world.folder), *arguments])
        document = json.loads(capsys.readouterr().out)
        assert document["exit"] == code
        return code, {each["check"]: each for each in document["findings"]}

    return run


def test_a_machine_in_good_order_exits_0(world, examine):
    world.cuda.clusters = 6
    code, found = examine()
    assert code == 0
    assert {each["status"] for each in found.values()} == {"OK"}
    assert found["driver for sm_90a"]["needed"] == "CUDA 12.4 or newer"
    assert "passed on NVIDIA H200" in found["evidence sm_90a"]["found"]
    assert [check for check in found if check.startswith("evidence")] == ["evidence sm_90a"]
    assert found["gpu 0"]["found"].startswith("NVIDIA H200, sm_90a, 132 SMs, 232448 bytes")
    decode = found["kernel router_decode_emajor_n8.sm_90a gpu 0"]["found"]
    assert decode == (
        "loads; 6 clusters of 16 CTAs fit with an SM for each CTA; "
        "1..8 tokens: computes the whole gate in one launch"
    )
    table = found["kernel router_hash.sm_90a gpu 0"]["found"]
    assert table.endswith("; 1..56 tokens: reads the rows of the chosen experts only")
    assert found[SELF_TEST]["found"] == "36 calls right, and 36 replayed"
    last = found["kernel router_prefill_emajor_n128_k4.sm_90a gpu 0"]["found"]
    assert "for each CTA; with same_bits, 641..1280 tokens: computes the whole gate in one" in last
    assert " and with same_bits, 1281.. tokens: computes the whole gate in launches of 1280" in last
    assert found["workspace gpu 0"]["status"] == "OK"


@pytest.mark.quick(20)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_has_its_verdict_exit_code_and_repair(world, capsys, fault):
    arrange, check, status, words, repair, *more = FAULTS[fault]
    arrange(world)
    # The self-test takes a second on a CPU.
    quick = [] if check in (SELF_TEST, "workspace gpu 0") else ["--quick"]
    code = main(["doctor", "--json", "--artifacts", str(world.folder), *quick, *more])
    document = json.loads(capsys.readouterr().out)
    found = {each["check"]: each for each in document["findings"]}[check]
    assert (found["status"], code) == (status, {"WARN": 1, "FAIL": 2}[status])
    assert words in found["found"]
    assert found["needed"]
    assert repair in found["repair"]


@pytest.mark.parametrize(
    ("rungs", "place"),
    [
        ([], "rungs: expected an object"),
        ({"hardware": 1}, "rungs.hardware: expected an object"),
        ({"hardware": {"status": "good"}}, "rungs.hardware.status: expected one of passed, failed"),
        ({"hardware": {"status": "passed"}}, "rungs.hardware.figures: expected an object"),
        (
            {"hardware": {"status": "passed", "figures": {"records": {}}}},
            "figures.records: expected a list of records",
        ),
        (
            {"hardware": {"status": "passed", "figures": {"records": [{"gpu": 7}]}}},
            "records[0].gpu: expected a GPU's name",
        ),
    ],
)
def test_malformed_evidence_is_named_by_its_place(world, examine, rungs, place):
    world.entries[0]["rungs"] = rungs
    world.write_evidence()
    code, found = examine("--quick")
    assert code == 2
    assert place in found["evidence sm_90a"]["found"]


def test_an_installed_set_without_evidence_is_to_be_installed_again(world, capsys):
    (world.folder / "evidence.json").unlink()
    installed = world.folder.rename(world.folder.with_name("_artifacts"))
    assert main(["doctor", "--json", "--quick", "--artifacts", str(installed)]) == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    (found,) = (each for each in findings if each["check"] == "evidence sm_90a")
    assert found["repair"] == "pip install --force-reinstall dsv4-router"


@pytest.mark.parametrize(
    ("names", "text"), [("abc", "a, b, c"), ("abcd", "a, b, c and 1 more"), ("a", "a")]
)
def test_three_names_of_many_are_listed_and_the_others_counted(names, text):
    assert installation._listed(list(names)) == text


def test_without_a_driver_the_other_checks_are_made_and_no_kernel_is_loaded(world):
    fork(world)
    found = doctor.examine(artifacts=world.folder)
    assert [each.check for each in found if each.status == "FAIL"] == ["driver"]
    right = [each.check for each in found if each.status == "OK"]
    assert {"artifacts", "evidence sm_100a", "evidence sm_90a"} <= set(right)
    assert found[-1].found == "no GPU to load them on"


def test_without_torch_the_kernels_are_tested_all_the_same(world, examine):
    without_torch(world)
    code, found = examine()
    assert code == 1
    assert found["torch"]["status"] == "SKIP"
    assert found["torch"]["repair"] == "pip install 'dsv4-router[torch]'"
    assert found[SELF_TEST]["status"] == "OK"


def test_torch_is_not_imported_unless_asked_for(world, examine):
    # Once before: the fake driver's reference imports parts of torch late.
    examine()
    world.monkeypatch.setitem(sys.modules, "torch", None)
    world.monkeypatch.setattr(installation, "import_module", raises(AssertionError))
    code, found = examine()
    assert code == 0
    assert found["torch"]["found"] == "built for CUDA 13.0; not imported without --torch"
    cuda = SimpleNamespace(is_available=lambda: True)
    torch = SimpleNamespace(__version__="2.13.0", cuda=cuda)
    world.monkeypatch.setattr(installation, "import_module", lambda name: torch)
    code, found = examine("--quick", "--torch")
    assert (code, found["torch"]["found"]) == (0, "2.13.0 sees the GPU")


@pytest.mark.parametrize(("version", "code"), [(12039, 2), (12040, 0), (12050, 0)])
def test_the_floor_itself_is_no_fault(world, examine, version, code):
    world.cuda.version = version
    write_version(world, 'cuda = "12.4"')
    got, found = examine("--quick")
    status = found["driver for sm_90a"]["status"]
    assert (got, status) == (code, "FAIL" if code else "OK")


def test_the_floor_is_that_of_every_kernel_which_runs_on_a_gpu(monkeypatch):
    """A kernel of a family needs a newer driver than one of the GPU's own architecture."""
    kernels = tuple(topk_kernel(arch) for arch in ("sm_100a", "sm_100f"))
    manifest = replace(sample_manifest(("sm_100a", "sm_100f")), kernels=kernels)
    for version, status in ((12080, "FAIL"), (12090, "OK")):
        monkeypatch.setattr(driver, "driver_version", lambda version=version: version)
        found = machine.check_floor(SimpleNamespace(manifest=manifest), "sm_100a")
        assert (found.status, found.needed) == (status, "CUDA 12.9 or newer")


@pytest.mark.parametrize(("static", "status"), [(0, "OK"), (15, "OK"), (16, "FAIL")])
def test_static_shared_memory_counts_too(static, status):
    kernel = decode_kernel()
    assert kernel.launch.dynamic_shared_bytes == 100_000
    resources = replace(kernel.resources, static_shared_bytes=static)
    manifest = replace(sample_manifest(), kernels=(replace(kernel, resources=resources),))
    gpu = Gpu(
        index=0,
        name="NVIDIA H200",
        arch="sm_90a",
        num_sms=132,
        shared_bytes_per_cta=100_015,
        ecc=True,
        mps=False,
    )
    assert machine.check_gpu(gpu, SimpleNamespace(manifest=manifest)).status == status


def test_quick_leaves_the_self_test_out(world, examine):
    world.monkeypatch.setattr(selftest, "self_test", raises(AssertionError))
    _, found = examine("--quick")
    assert found[SELF_TEST]["status"] == "SKIP"
    assert found[TOPK]["status"] == "OK"
    assert "workspace gpu 0" not in found


def test_the_self_test_launches_each_case_eagerly_and_captured(world, examine):
    examine()
    launched = world.cuda.launched
    assert {stream for _, stream, _ in launched} == {launched[0][1]} != {0}
    left = iter(launched)
    for case in inputs.CASES:
        # The largest call of same_bits is two launches.
        expected = [*case.tokens, *case.tokens[-1:] * case.same_bits]
        eager, captured = (list(islice(left, len(expected))) for _ in range(2))
        launches = eager + captured
        assert [name for name, _, _ in eager] == [name for name, _, _ in captured]
        assert [values["num_tokens"] for _, _, values in captured] == expected
        # A capture has scratch of its own.
        scratch = [
            {values.get("counters", 0) for _, _, values in each} - {0} for each in (eager, captured)
        ]
        assert all(scratch)
        assert scratch[0].isdisjoint(scratch[1])
        names = {name for name, _, _ in launches}
        assert ("router_hash" in names) == case.hashed
        assert ("router_topk" in names) != case.same_bits
        layout = "kmajor" if case.hashed else case.layout
        if case.same_bits:
            assert names == {f"router_prefill_{layout}_n128_k4"}
            assert [values["first_token"] for _, _, values in captured] == [0, 0, 1280]
        else:
            assert f"router_decode_{layout}_n64" in names
    assert list(left) == []


@pytest.mark.parametrize("fault", ["no room", "no kernel"])
def test_same_bits_is_left_out_where_no_kernel_serves_it(world, examine, fault):
    if fault == "no room":
        world.cuda.clusters = 0
    else:
        for name in {each.name for each in world.manifest.kernels if each.role == "prefill"}:
            leave_out(name)(world)
    _, found = examine()
    expected = "32 calls right, and 32 replayed; not tested: emajor same_bits, "
    assert found[SELF_TEST]["status"] == "OK"
    assert found[SELF_TEST]["found"].startswith(expected)


def test_the_self_test_gives_its_memory_back(world, examine):
    examine("--quick")
    before = set(world.cuda.memory)
    examine()
    # Scratch stays, and is one chunk for each need of zeroing.
    assert len(set(world.cuda.memory) - before) == 2


def test_the_build_of_the_torch_here_is_read_as_torch_says_it():
    assert installation.cuda_of_torch() == torch.version.cuda


def test_a_kernel_is_loaded_once_for_its_check_and_the_self_test(world, examine):
    examine()
    assert world.cuda.loads == len(world.manifest.for_arch("sm_90a"))


def test_gpus_of_one_kind_are_loaded_once_and_one_can_be_named(world, examine):
    world.cuda.count = 3
    _, found = examine("--quick")
    assert [check for check in found if check.startswith("gpu ")] == ["gpu 0", "gpu 1", "gpu 2"]
    assert found["kernels gpu 2"]["found"] == "checked on GPU 0, which is alike"
    assert found["kernels gpu 2"]["repair"] == "python -m dsv4_router_runtime doctor --device 2"
    _, found = examine("--quick", "--device", "1")
    assert [check for check in found if check.startswith("gpu ")] == ["gpu 1"]
    assert "kernel router_topk.sm_90a gpu 1" in found
    code, found = examine("--device", "3")
    assert (code, found["gpu 3"]["needed"]) == (2, "a GPU from 0 to 2")


def test_a_driver_that_does_not_know_mps_is_no_fault(world, examine):
    del world.cuda.facts["MPS_ENABLED"]
    world.cuda.cuGetErrorString = lambda code: (0, b"invalid argument")
    code, found = examine("--quick")
    assert code == 0
    assert found["gpu 0"]["found"].endswith("MPS unknown")


@pytest.mark.parametrize(
    ("version", "bounds", "within"),
    [
        ("13.5.0", "<14,>=12.9", True),
        ("14.0.0", "<14,>=12.9", False),
        ("12.8.1", "<14,>=12.9", False),
        ("12.9", "<14,>=12.9", True),
        ("2.13.0+cpu", ">=2.8", True),
        ("2.8.0+cu129", ">=2.8", True),
        ("2.7.1", ">=2.8", False),
        ("1.0", "", True),
    ],
)
def test_versions_are_held_against_the_bounds_of_the_metadata(version, bounds, within):
    assert installation._within(version, bounds) is within


def test_a_version_outside_its_bounds_is_a_warning(world, examine):
    world.monkeypatch.setattr(installation, "_required", lambda name: ">=99")
    code, found = examine("--quick")
    assert code == 1
    assert found["package torch"]["repair"] == "pip install 'torch>=99'"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("a bug")])
def test_an_error_of_doctor_itself_is_no_warning(monkeypatch, capsys, error):
    """Python's own exit code of an exception is 1, which says that the machine can route."""
    monkeypatch.setattr(doctor, "examine", raises(error))
    assert main(["doctor"]) == 2
    assert str(error) in capsys.readouterr().err


def test_output_that_the_terminal_cannot_show_is_escaped(tmp_path):
    command = [sys.executable, "-m", "dsv4_router_runtime", "doctor", "--quick", "--artifacts"]
    command.append(str(tmp_path / "\u00fc"))
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "\\xfc/manifest.json: cannot be read" in ran.stdout, ran.stderr


def test_lines_start_with_the_status_and_end_with_the_repair(world, capsys):
    flip_a_byte(world)
    assert main(["doctor", "--artifacts", str(world.folder)]) == 2
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if line.startswith("FAIL artifacts: "))
    assert line.endswith(f"; repair: {BUILD}{world.folder}")
    assert {line.split()[0] for line in lines} <= {"OK", "WARN", "FAIL", "SKIP"}


def test_a_report_has_no_path_outside_the_package_and_no_name(world, capsys):
    world.monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/var/secret/mps")
    world.monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-0a1b2c3d-aaaa-bbbb-cccc-0123456789ab")
    user, host = getpass.getuser(), socket.gethostname()
    error = DriverError(f"{user}@{host}: ~/x and '/opt/a b' at /home/{user}/file:3, 1/2, N/A")
    world.monkeypatch.setattr(selftest, "make_inputs", raises(error))
    flip_a_byte(world)
    main(["doctor", "--report", "--artifacts", str(world.folder)])
    text = capsys.readouterr().out
    assert text.startswith("dsv4-router ")
    for secret in (str(world.folder), "secret", "/opt", "~/x", "0a1b2c3d", "/home"):
        assert secret not in text
    assert host not in text.replace("<host>", "")
    assert "FAIL artifacts: <artifacts>/router_topk.sm_90a.cubin: altered or truncated" in text


def test_names_are_taken_out_of_a_report_and_the_packages_own_paths_stay(monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: "ann")
    monkeypatch.setattr(socket, "gethostname", lambda: "node7")
    parent = finding._PACKAGE_PARENT
    text = f"{parent}/artifacts/a.cubin by ann on node7: annex of node71, 1/2; /etc/x:3"
    assert finding.without_names(text) == (
        "artifacts/a.cubin by <user> on <host>: annex of node71, 1/2; <path>:3"
    )
    text = "'/opt/a b', \"~/c d\" and https://www.nvidia.com/drivers of /x"
    assert finding.without_names(text) == (
        "<path>, <path> and https://www.nvidia.com/drivers of <path>"
    )
    folder = Path("relative/my set")
    assert finding.without_names(f"{folder}: use --artifacts '{folder}'", folder) == (
        "<artifacts>: use --artifacts <artifacts>"
    )
    monkeypatch.setattr(getpass, "getuser", raises(KeyError("no such uid")))
    assert finding.without_names("ann") == "ann"


def test_without_a_gpu_doctor_takes_half_a_second_and_no_torch():
    """One of three times, in CPU time: what else the machine does is left out."""
    code = """
import sys, time
from dsv4_router_runtime.__main__ import main
code = main(["doctor"])
print(code, "torch" in sys.modules, time.process_time())
"""

    def seconds() -> float:
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            check=True,
        )
        exit_code, torch_is_there, taken = run.stdout.splitlines()[-1].split()
        assert (exit_code, torch_is_there) == ("2", "False")
        return float(taken)

    assert any(seconds() < 0.5 for _ in range(3))


@pytest.mark.gpu
@pytest.mark.timing
def test_doctor_finds_nothing_wrong_here_within_5_seconds():
    """In a fresh process, which imports no torch."""
    code = """
import sys
from dsv4_router_runtime.__main__ import main
main(["doctor", "--device", "0", "--json"])
print("torch" in sys.modules, file=sys.stderr)
"""
    start = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    seconds = time.perf_counter() - start
    findings = json.loads(run.stdout)["findings"]
    print(f"doctor: {seconds:.2f} s", *map(str, findings), sep="\n")
    assert [each for each in findings if each["status"] == "FAIL"] == []
    assert {each["check"]: each["status"] for each in findings}[SELF_TEST] == "OK"
    assert run.stderr.split()[-1] == "False"
    assert seconds < 5


@pytest.mark.gpu
@pytest.mark.timing
def test_the_self_test_is_right_here_within_2_seconds():
    from dsv4_router_runtime.artifacts.folder import open_artifacts

    start = time.perf_counter()
    found = selftest.self_test(open_artifacts(), 0)
    assert found.status == "OK", found
    assert time.perf_counter() - start < 2
