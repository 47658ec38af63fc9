"""Records of the package: each kind once, and only if its level is on."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

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


def test_an_application_that_sets_up_no_logging_sees_nothing_on_stderr():
    code = "from dsv4_router_runtime import log; log.warn_once('fallback', 'text')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("", "")
