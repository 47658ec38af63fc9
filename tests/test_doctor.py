"""`doctor` gives the right verdict, exit code and repair in each fault that it must catch."""

from __future__ import annotations

import getpass
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dsv4_router_runtime import doctor
from dsv4_router_runtime.__main__ import main
from dsv4_router_runtime.artifacts.dispatch import LayerProblem, plan_layer
from dsv4_router_runtime.artifacts.kernel import LAYOUTS
from dsv4_router_runtime.artifacts.manifest import parse_manifest
from dsv4_router_runtime.device import facts
from dsv4_router_runtime.doctor import finding, installation
from dsv4_router_runtime.errors import DriverError

torch = pytest.importorskip("torch", reason="torch is the caller's and is not installed here")

from doctor_faults import (  # noqa: E402
    BUILD,
    FAULTS,
    SELF_TEST,
    TOPK,
    flip_a_byte,
    fork,
    raises,
    without_torch,
)
from doctor_world import forget_driver, make_world  # noqa: E402

from dsv4_router_runtime.doctor import selftest  # noqa: E402


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


def test_a_machine_in_good_order_exits_0(examine):
    code, found = examine()
    assert code == 0
    assert {each["status"] for each in found.values()} == {"OK"}
    assert found["driver for sm_90a"]["needed"] == "CUDA 12.4 or newer"
    assert "passed on NVIDIA H200" in found["evidence sm_90a"]["found"]
    assert found["gpu 0"]["found"].startswith("NVIDIA H200, sm_90a, 132 SMs, 232448 bytes")
    decode = found["kernel router_decode_emajor_n8.sm_90a gpu 0"]["found"]
    assert decode == (
        "loads; 7 clusters of 16 CTAs fit with an SM for each CTA; "
        "1..8 tokens: computes the whole gate in one launch"
    )
    assert found[SELF_TEST]["found"] == "28 calls right, and 28 replayed"
    assert found["workspace gpu 0"]["status"] == "OK"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_has_its_verdict_exit_code_and_repair(world, capsys, fault):
    arrange, check, status, words, repair = FAULTS[fault]
    arrange(world)
    # The self-test takes a second on a CPU.
    quick = [] if check in (SELF_TEST, "workspace gpu 0") else ["--quick"]
    code = main(["doctor", "--json", "--artifacts", str(world.folder), *quick])
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


def test_without_a_driver_the_other_checks_are_made_and_no_kernel_is_loaded(world):
    fork(world)
    found = doctor.examine(artifacts=world.folder)
    assert [each.check for each in found if each.status == "FAIL"] == ["driver"]
    assert "artifacts" in [each.check for each in found if each.status == "OK"]
    assert found[-1].found == "no GPU to load them on"


def test_without_torch_the_kernels_are_skipped_with_the_extra_that_brings_it(world, examine):
    without_torch(world)
    code, found = examine()
    assert code == 1
    assert found["kernels"]["status"] == "SKIP"
    assert found["kernels"]["repair"] == "pip install 'dsv4-router[torch]'"


def test_quick_leaves_the_self_test_out(world, examine):
    world.monkeypatch.setattr(selftest, "self_test", raises(AssertionError))
    _, found = examine("--quick")
    assert found[SELF_TEST]["status"] == "SKIP"
    assert found[TOPK]["status"] == "OK"
    assert "workspace gpu 0" not in found


@pytest.mark.parametrize("arguments", [(), ("--quick",)])
def test_a_torch_whose_import_fails_is_found_with_quick_too(world, examine, arguments):
    error = ImportError("libcudart.so.13: cannot open shared object file")
    world.monkeypatch.setattr(doctor, "import_module", raises(error))
    code, found = examine(*arguments)
    assert code == 2
    assert "libcudart" in found[SELF_TEST]["found"]
    assert "--force-reinstall" in found[SELF_TEST]["repair"]
    assert found[TOPK]["status"] == "OK"


def test_kernels_are_loaded_while_torch_is_imported(world, examine):
    loaded = threading.Event()
    world.cuda.cuLibraryLoadData = lambda *given: (loaded.set() or 0, None)
    seen = []
    world.monkeypatch.setattr(doctor, "import_module", lambda name: seen.append(loaded.wait(5)))
    examine("--quick")
    assert seen == [True]


def test_torch_is_imported_while_the_driver_starts(world, examine):
    importing, seen = threading.Event(), []
    world.cuda.cuDeviceGetCount = lambda: (seen.append(importing.wait(5)) or 0, 1)
    world.monkeypatch.setattr(doctor, "may_have_gpu", lambda: True)
    world.monkeypatch.setattr(doctor, "import_module", lambda name: importing.set())
    examine("--quick")
    assert seen[0]


@pytest.mark.parametrize(
    ("device_file", "visible", "may_have"),
    [
        ("nvidiactl", None, True),
        ("nvidiactl", "1", True),
        ("nvidiactl", "", False),
        ("nvidiactl", "-1", False),
        ("none", None, False),
    ],
)
def test_a_gpu_that_may_be_there(monkeypatch, tmp_path, device_file, visible, may_have):
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(facts, "_DEVICE_FILE", tmp_path / device_file)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert facts.may_have_gpu() is may_have


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
    world.monkeypatch.setattr(selftest, "run_eagerly", raises(error))
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
    """The best of three in CPU time: what else the machine does is left out."""
    code = """
import sys, time
from dsv4_router_runtime.__main__ import main
code = main(["doctor"])
print(code, "torch" in sys.modules, time.process_time())
"""
    best = 9.0
    for _ in range(3):
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            check=True,
        )
        exit_code, torch_is_there, seconds = run.stdout.splitlines()[-1].split()
        assert (exit_code, torch_is_there) == ("2", "False")
        best = min(best, float(seconds))
    assert best < 0.5


def test_the_self_test_takes_every_step_of_its_layers_and_the_product():
    manifest = parse_manifest(
        (Path(__file__).parents[1] / "artifacts" / "manifest.json").read_bytes()
    )
    ends = {1}
    for arch in manifest.driver:
        for layout in LAYOUTS:
            layer = LayerProblem(
                layout=layout,
                tma_loadable=True,
                hashed=False,
                num_experts=selftest.EXPERTS,
                top_k=selftest.TOP_K,
                k=selftest.K,
            )
            steps = plan_layer(manifest, layer, arch).steps
            assert steps[-1].is_product_and_select
            ends |= {step.max_tokens for step in steps[:-1]} | {steps[-2].max_tokens + 1}
    assert sorted(ends) == list(selftest.TOKENS)


def test_the_keys_of_the_self_test_are_equal_or_far_apart():
    """Ids are compared bit for bit: no two keys may be as close as FP32 rounds."""
    for case in selftest.CASES:
        inputs = selftest.make_inputs(case)
        if inputs.e_bias is None:
            continue
        logits = inputs.x.double() @ inputs.W_gate.double()
        assert logits.abs().max() < 2**24
        keys = torch.nn.functional.softplus(logits).sqrt() + inputs.e_bias.double()
        gaps = keys.sort(dim=1).values.diff(dim=1)
        assert gaps[gaps > 1e-12].min() > 1e-5
        assert (gaps <= 1e-12).any()


@pytest.mark.gpu
@pytest.mark.timing
def test_doctor_finds_nothing_wrong_here_within_5_seconds():
    start = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-m", "dsv4_router_runtime", "doctor", "--device", "0", "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    seconds = time.perf_counter() - start
    findings = json.loads(run.stdout)["findings"]
    assert [each for each in findings if each["status"] == "FAIL"] == []
    print(f"doctor: {seconds:.2f} s", *map(str, findings), sep="\n")
    assert seconds < 5


@pytest.mark.gpu
@pytest.mark.timing
def test_the_self_test_is_right_here_within_2_seconds():
    from dsv4_router_runtime.artifacts.folder import open_artifacts

    torch.zeros(1, device="cuda")
    start = time.perf_counter()
    found = selftest.self_test(open_artifacts(), 0)
    assert found.status == "OK", found
    assert time.perf_counter() - start < 2
