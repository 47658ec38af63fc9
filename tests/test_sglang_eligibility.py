"""Which layers of SGLang are served, and when the plugin hooks anything: SGLang is not needed."""

from __future__ import annotations

import logging
import re
import sys
from dataclasses import replace

import pytest

from dsv4_router_runtime.integrations.sglang import plugin
from dsv4_router_runtime.integrations.sglang.eligibility import LayerFacts, reason_against

TEXT = LayerFacts(
    is_deepseek_v4=True,
    gate="MoEGate",
    topk="TopK",
    experts="Mxfp4MarlinMoEMethod",
    device="cuda",
    weight="torch.bfloat16",
    weight_shape=(256, 4096),
    contiguous=True,
    e_bias="torch.float32",
    hashed=False,
    sees=False,
    num_experts=256,
    hidden_size=4096,
    top_k=6,
    num_shared=0,
    scoring_func="sqrtsoftplus",
    grouped=False,
    custom=False,
    renormalize=True,
    output_format="STANDARD",
    waterfill=False,
    simulated=False,
    dispatch=None,
)
HASH = replace(TEXT, topk="HashTopK", e_bias=None, hashed=True, output_format=None)


@pytest.mark.parametrize(
    "facts",
    [
        TEXT,
        HASH,
        replace(TEXT, sees=True),
        replace(HASH, sees=True),
        replace(TEXT, num_shared=1),
        replace(TEXT, renormalize=False),
        replace(TEXT, device="cpu"),
        replace(TEXT, dispatch="static"),
        replace(HASH, dispatch="dynamic", num_shared=1),
    ],
)
def test_a_layer_is_served(facts) -> None:
    assert reason_against(facts) is None


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (replace(TEXT, is_deepseek_v4=False), "no layer of DeepSeek-V4"),
        (replace(TEXT, gate="MoEGateWithLoRA"), r"\('MoEGateWithLoRA', 'TopK'\)"),
        (replace(HASH, topk="TopK"), r"\('MoEGate', 'HashTopK'\) are served"),
        (replace(TEXT, scoring_func="sigmoid"), "the scores are sigmoid"),
        (replace(TEXT, grouped=True), "grouped sqrtsoftplus"),
        (replace(TEXT, custom=True), "a routing function of its own"),
        (replace(TEXT, sees=True, top_k=1), "top_k 1"),
        (replace(TEXT, num_shared=1, renormalize=False), "a sum of scores"),
        (replace(TEXT, device="hip"), "the weight is on hip"),
        (replace(TEXT, weight="torch.float32"), "the weight is torch.float32"),
        (replace(TEXT, weight_shape=(128, 2, 4096)), "packed as"),
        (replace(TEXT, contiguous=False), "packed as"),
        (replace(TEXT, e_bias="torch.bfloat16"), "e_score_correction_bias is torch.bfloat16"),
        (replace(TEXT, e_bias=None), "e_score_correction_bias is None"),
        (replace(TEXT, hidden_size=4000, weight_shape=(256, 4000)), "multiples of 64"),
        (replace(TEXT, num_experts=513, weight_shape=(513, 4096)), "up to 8 of 512"),
        (replace(TEXT, top_k=9), "up to 8 of 512"),
        (replace(TEXT, num_shared=9), "up to 8 are served"),
        (replace(TEXT, output_format="BYPASSED"), "the format BYPASSED"),
        (replace(TEXT, waterfill=True), "waterfill"),
        (replace(TEXT, simulated=True), "SGLANG_SIMULATE"),
        (replace(TEXT, dispatch="lp"), "--ep-dispatch-algorithm is lp"),
        (replace(TEXT, experts="KTEPWrapperMethod"), "KTransformers"),
    ],
)
def test_a_layer_is_declined_in_words(facts, reason) -> None:
    assert re.search(reason, reason_against(facts) or "")


@pytest.fixture
def without_sglang(monkeypatch) -> None:
    """Let no import of SGLang succeed, of modules that another test imported either."""
    for name in ["sglang", *sys.modules]:
        if name.partition(".")[0] == "sglang":
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(plugin, "_registered", False)
    for name in ("DSV4_ROUTER", "DSV4_ROUTER_DISABLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("without_sglang")
@pytest.mark.parametrize("switches", [{}, {"DSV4_ROUTER": "1", "DSV4_ROUTER_DISABLE": "1"}])
def test_a_plugin_that_is_off_imports_nothing(monkeypatch, caplog, switches) -> None:
    caplog.set_level(logging.INFO, "dsv4_router_runtime")
    for name, value in switches.items():
        monkeypatch.setenv(name, value)
    plugin.register()
    assert "sglang: dsv4_router is off: " in caplog.text


@pytest.mark.usefixtures("without_sglang")
def test_a_release_without_the_names_is_declined(monkeypatch, caplog) -> None:
    monkeypatch.setattr(plugin, "version", lambda _: plugin.VERSION)
    monkeypatch.setenv("DSV4_ROUTER", "1")
    plugin.register()
    assert "dsv4_router serves no layer" in caplog.text
    assert "sglang.srt.layers.moe.topk:TopK.forward: not found" in caplog.text
    assert not plugin._registered
