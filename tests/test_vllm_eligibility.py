"""What of the adapter for vLLM needs no vLLM: the decision about a layer, and the switches."""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest

from dsv4_router_runtime.integrations.engine import KILL_SWITCH, SWITCH
from dsv4_router_runtime.integrations.vllm import plugin
from dsv4_router_runtime.integrations.vllm.contract import RELEASE
from dsv4_router_runtime.integrations.vllm.eligibility import LayerFacts, reasons_against

PLAIN = LayerFacts(num_experts=256, first_shared_id=256)


def test_a_plain_layer_is_served():
    assert reasons_against(PLAIN) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"router": "CPURouter"}, "the router is a CPURouter, not a FusedTopKBiasRouter"),
        ({"gate": "elsewhere"}, "the gate is elsewhere, not a plain GateLinear"),
        ({"scoring_func": "sigmoid"}, "the scores are sigmoid, not sqrtsoftplus"),
        ({"device": "xpu"}, "the gate is on xpu"),
        ({"quantized": True}, "the gate is quantized"),
        ({"biased": True}, "the gate has a bias of its own"),
        ({"hooked": True}, "a hook on the gate reads its logits"),
        ({"offloaded": True}, "weights are offloaded"),
        ({"fused_shared_gate": True}, "the gate of the shared expert is fused"),
        ({"monolithic": True}, "the experts route by themselves"),
        ({"naive_dispatch": True}, "logits are gathered across ranks"),
        ({"gathered_over_pcp": True}, "logits are gathered across prefill context parallel"),
        ({"padded_hidden_states": True}, "hidden_states are padded"),
        (
            {"shared_experts": 1, "first_shared_id": 264},
            "fused shared experts have ids from 264; the kernels write ids from 256",
        ),
    ],
)
def test_each_fact_against_a_layer_is_a_reason(change, reason):
    (said,) = reasons_against(dataclasses.replace(PLAIN, **change))
    assert said.startswith(reason)


@pytest.mark.parametrize("change", [{"device": "cpu"}, {"shared_experts": 2}])
def test_what_the_kernels_do_is_no_reason(change):
    assert reasons_against(dataclasses.replace(PLAIN, **change)) == []


def test_all_reasons_are_named():
    facts = dataclasses.replace(PLAIN, hooked=True, monolithic=True)
    assert len(reasons_against(facts)) == 2


@pytest.mark.parametrize(
    "switches", [{}, {"DSV4_ROUTER": "0"}, {"DSV4_ROUTER": "1", "DSV4_ROUTER_DISABLE": "1"}]
)
def test_nothing_is_imported_unless_asked_for(monkeypatch, switches, caplog):
    for name in (SWITCH, KILL_SWITCH):
        monkeypatch.delenv(name, raising=False)
    for name, value in switches.items():
        monkeypatch.setenv(name, value)
    # Any import of vLLM would be an ImportError.
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(plugin, "_why_not_register", lambda: pytest.fail("registered"))
    plugin.register()
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_another_release_is_declined_in_words(monkeypatch, caplog):
    monkeypatch.setenv("DSV4_ROUTER", "1")
    monkeypatch.delenv("DSV4_ROUTER_DISABLE", raising=False)
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.34.1")
    plugin.register()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "this adapter is for vLLM 0.33.x (got 0.34.1)" in record.getMessage()


def test_the_page_names_what_there_is():
    page = (Path(plugin.__file__).parents[1] / "VLLM.md").read_text(encoding="utf-8")
    assert f"{SWITCH}=1 vllm serve" in page
    assert f"Set `{KILL_SWITCH}=1`" in page
    assert f"vLLM {RELEASE}x" in page
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    imported = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
    ours = {name.name for node in imported if node.module == plugin.__name__ for name in node.names}
    assert ours == {"summary"}
    assert all(hasattr(plugin, name) for name in ours | {"refresh"})
