"""What adapters of engines share: it needs no engine."""

from __future__ import annotations

import logging

import pytest

from dsv4_router_runtime.integrations import engine


@pytest.mark.parametrize(
    ("switch", "kill_switch", "reason"),
    [
        (None, None, "DSV4_ROUTER is not 1"),
        ("", "", "DSV4_ROUTER is not 1"),
        ("0", None, "DSV4_ROUTER is not 1"),
        ("1", None, None),
        ("1", "0", None),
        ("1", "1", "DSV4_ROUTER_DISABLE=1"),
    ],
)
def test_an_engine_is_served_only_if_asked_for(monkeypatch, switch, kill_switch, reason) -> None:
    for name, value in ((engine.SWITCH, switch), (engine.KILL_SWITCH, kill_switch)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert engine.why_off() == reason


@pytest.mark.parametrize("name", [engine.SWITCH, engine.KILL_SWITCH])
def test_a_switch_is_0_or_1(monkeypatch, name) -> None:
    monkeypatch.setenv(name, "true")
    with pytest.raises(ValueError, match=rf"{name}: expected 0 or 1 \(got 'true'\)"):
        engine.why_off()


def test_a_contract_names_each_difference() -> None:
    contract = {
        "json:loads": None,
        "json:JSONDecoder.decode": "(self, s, _w)",
        "json:dump": "(obj, fp)",
        "json:load.back": None,
        "no_such_engine:gate": None,
    }
    changed, gone, missing = engine.mismatches(contract)
    assert changed.startswith("json:dump: expected (obj, fp) (got (obj, fp, *, skipkeys")
    assert gone.startswith("json:load.back: not found")
    assert missing.startswith("no_such_engine:gate: not found")


def test_a_layer_has_one_line(caplog) -> None:
    caplog.set_level(logging.INFO, "dsv4_router_runtime")
    engine.report_layer("some engine", "layer 3", None)
    engine.report_layer("some engine", "layer 4", "it is no router")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "some engine: layer 3 is served by dsv4_router"),
        ("WARNING", "some engine: layer 4 keeps the engine's router: it is no router"),
    ]
