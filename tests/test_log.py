"""Records of the package: each kind once, and only if its level is on."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
from conftest import sample_manifest

from dsv4_router_runtime import log


@pytest.fixture(autouse=True)
def _nothing_logged(monkeypatch):
    monkeypatch.setattr(log, "_logged", set())


def test_a_kind_is_warned_of_once(caplog):
    caplog.set_level(logging.WARNING, log.LOGGER.name)
    assert log.warn_once("fallback", "first")
    assert not log.warn_once("fallback", "second")
    assert log.warn_once("weights copied", "100% of them")
    assert [record.message for record in caplog.records] == ["first", "100% of them"]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_a_kind_at_info_does_not_hide_its_warning(caplog):
    caplog.set_level(logging.INFO, log.LOGGER.name)
    assert log.info_once("gpu 0", "first")
    assert log.warn_once("gpu 0", "second")
    assert [record.levelno for record in caplog.records] == [logging.INFO, logging.WARNING]


def test_a_record_that_is_switched_off_is_not_counted(caplog):
    caplog.set_level(logging.WARNING, log.LOGGER.name)
    assert not log.info_once("gpu 0", "text")
    caplog.set_level(logging.INFO, log.LOGGER.name)
    assert log.info_once("gpu 0", "text")


def test_a_gpu_and_a_copy_of_weights_are_logged_once(caplog, monkeypatch, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is the caller's and is not installed here")
    from gpu_recorder import replace_gpu

    from dsv4_router_runtime import ArtifactSet, Router

    replace_gpu(monkeypatch)
    artifacts = ArtifactSet(folder=tmp_path, manifest=sample_manifest())
    caplog.set_level(logging.INFO, log.LOGGER.name)
    for num_experts in (384, 132, 132):
        W = torch.zeros(64, num_experts, dtype=torch.bfloat16)
        bias = torch.zeros(num_experts)
        Router(W, bias, top_k=6, routed_scaling_factor=1.0, artifacts=artifacts)
    gpu, copy = caplog.records
    assert gpu.levelname == "INFO"
    assert gpu.message.startswith(f"GPU None is sm_90a; from {tmp_path}: router_decode_emajor_n8.")
    assert copy.levelname == "WARNING"
    assert copy.message.startswith("W_gate is bound as a copy, since TMA cannot step")


def test_an_application_that_sets_up_no_logging_sees_nothing_on_stderr():
    code = "from dsv4_router_runtime import log; log.warn_once('fallback', 'text')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("", "")
