"""`explain` says what a Router's binding does, and refuses questions that no call can ask."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from math import prod

import pytest
from conftest import sample_manifest

from dsv4_router_runtime.__main__ import main
from dsv4_router_runtime.artifacts.folder import ArtifactSet
from dsv4_router_runtime.errors import NoKernelError
from dsv4_router_runtime.explain import Question, as_json, as_text, explain

# The first and the last number of tokens of each step, for any number of experts.
PREFILL_ENDS = tuple(
    end + more
    for end in (128, 192, 256, 320, 384, 448, 640, 896, 960, 1280, 1920)
    for more in (0, 1)
)
ENDS = (1, 8, 9, 32, 33, 56, 57, 64, 65, *PREFILL_ENDS)
QUESTION = Question(num_tokens=48, k=7168, num_experts=384, top_k=6)


@pytest.fixture
def artifacts(write_artifacts, manifest):
    return ArtifactSet(folder=write_artifacts(manifest), manifest=manifest)


def bind_and_route(question, artifacts):
    """Make the call of a question; return its Router."""
    import torch

    from dsv4_router_runtime import Router

    n, k, top_k = question.num_tokens, question.k, question.top_k
    num_experts = question.num_experts
    kmajor = question.layout == "kmajor"
    W = torch.zeros((num_experts, k) if kmajor else (k, num_experts), dtype=torch.bfloat16)
    bound = Router(
        W.t() if kmajor else W,
        None if question.hashed else torch.zeros(num_experts),
        top_k=top_k,
        routed_scaling_factor=1.0,
        artifacts=artifacts,
        tid2eid=torch.arange(top_k, dtype=torch.int32)[None] if question.hashed else None,
        bias_vl=torch.zeros(num_experts) if question.images or question.logits else None,
        same_bits=question.same_bits,
    )
    bound(
        torch.zeros(n, k, dtype=torch.bfloat16),
        torch.zeros(n, top_k),
        torch.zeros(n, top_k, dtype=torch.int32),
        input_ids=torch.zeros(n, dtype=torch.int32) if question.hashed else None,
        image_mask=torch.zeros(n, dtype=torch.bool) if question.images else None,
        **({"out_logits": torch.zeros(n, num_experts)} if question.logits else {}),
    )
    return bound


def compare(document, question, bound, gpu) -> None:
    from gpu_recorder import workspace_of

    launch = gpu.launches[0]
    assert {launch["kernel"] for launch in gpu.launches} == {document["kernel"]}
    assert document["grid"] == list(launch["grid"])
    verdicts = document["candidates"]
    chosen = [each["kernel"] for each in verdicts if each["reason"].startswith("chosen")]
    assert chosen == [document["kernel"]]
    assert document["launches"] == len(gpu.launches) + len(gpu.products)
    whole_gate = question.images or question.logits
    steps = document["steps"] + (document["gate_steps"] if whole_gate else [])
    assert list(dict.fromkeys(step["kernel"] for step in steps)) == list(bound.kernels)
    assert bool(document["weights_copy_bytes"]) == bound.weights_copied
    assert (document["copy_reason"] is None) == (not bound.weights_copied)
    layout = workspace_of(bound).layout
    assert document["scratch_bytes"] == layout.zeroed_bytes + layout.plain_bytes
    products = [] if question.logits else [out for _, _, out in gpu.products]
    scratch = [*products, *gpu.transposed]
    assert document["logits_bytes"] == sum(out.numel() * out.element_size() for out in scratch)


def test_explain_is_what_a_binding_does(tmp_path):
    pytest.importorskip("torch", reason="torch is the caller's and is not installed here")
    pytest.importorskip("hypothesis", reason="draws the questions")
    from gpu_recorder import replace_gpu
    from hypothesis import given, settings
    from hypothesis import strategies as st

    artifacts = ArtifactSet(folder=tmp_path, manifest=sample_manifest())
    ctas = {each.key: prod(each.launch.cluster) for each in artifacts.manifest.kernels}

    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(
        question=st.builds(
            lambda num_experts, top_k, **given: Question(
                num_experts=num_experts, top_k=min(top_k, num_experts), **given
            ),
            num_tokens=st.one_of(st.sampled_from(ENDS), st.integers(1, 4000)),
            k=st.integers(1, 6).map(lambda blocks: 64 * blocks),
            num_experts=st.one_of(st.integers(1, 70), st.integers(1, 512)),
            top_k=st.integers(1, 8),
            layout=st.sampled_from(["kmajor", "emajor"]),
            hashed=st.booleans(),
            images=st.booleans(),
            logits=st.booleans(),
            same_bits=st.booleans(),
        ),
        arch=st.sampled_from(["sm_90a", "sm_100a"]),
    )
    def agree(question, arch):
        document = as_json(explain(artifacts, question, arch))
        with pytest.MonkeyPatch.context() as monkeypatch:
            gpu = replace_gpu(monkeypatch)
            gpu.arch = arch
            compare(document, question, bind_and_route(question, artifacts), gpu)
            others = document["kernel_without_clusters_of"]
            assert (
                document["kernel_without_clusters"] == ([document["kernel"], *others.values()][-1])
            )
            assert max(map(int, others), default=1) == ctas[document["kernel"]]
            for size, kernel in others.items():
                gpu.unfit = {key: "no room" for key in ctas if ctas[key] >= int(size)}
                if kernel is None:
                    assert question.same_bits
                    with pytest.raises(NoKernelError):
                        bind_and_route(question, artifacts)
                else:
                    bind_and_route(question, artifacts)
                    assert gpu.last["kernel"] == kernel

    agree()


def test_every_candidate_has_a_verdict_and_a_reason(artifacts):
    document = as_json(explain(artifacts, QUESTION, "sm_90a"))
    verdicts = {each["kernel"]: each for each in document["candidates"]}
    assert list(verdicts) == [kernel.key for kernel in artifacts.manifest.kernels]
    assert verdicts["router_decode_kmajor_n64.sm_90a"]["verdict"] == "accepted"
    assert verdicts["router_decode_kmajor_n64.sm_90a"]["reason"].startswith("chosen")
    assert verdicts["router_decode_kmajor_n32.sm_90a"]["reason"] == (
        "takes num_tokens 1..32, got 48"
    )
    assert verdicts["router_topk.sm_100a"]["reason"] == "built for sm_100a, this GPU is sm_90a"
    one = as_json(explain(artifacts, replace(QUESTION, num_tokens=1), "sm_90a"))
    chosen = [each for each in one["candidates"] if each["reason"].startswith("chosen")]
    assert [each["kernel"] for each in chosen] == ["router_decode_kmajor_n8.sm_90a"]
    reasons = {each["kernel"]: each["reason"] for each in one["candidates"]}
    assert reasons["router_decode_kmajor_n64.sm_90a"] == "not chosen, made for 1..64 tokens"


def test_prefill_names_its_clusters_scratch_and_bound(artifacts):
    question = replace(QUESTION, num_tokens=100)
    text = as_text(explain(artifacts, question, "sm_90a"))
    assert "one launch of router_prefill_kmajor_n64.sm_90a, 96 CTAs in 6 clusters of 16" in text
    assert "-> 65..128 tokens: computes the whole gate in one launch, by larger tiles" in text
    document = as_json(explain(artifacts, question, "sm_90a"))
    assert (document["launches"], document["logits_bytes"]) == (1, 0)
    assert document["kernel_without_clusters"] == "router_topk.sm_90a"
    more = as_json(explain(artifacts, replace(question, num_tokens=129), "sm_90a"))
    reasons = {each["kernel"]: each["reason"] for each in more["candidates"]}
    assert reasons["router_prefill_kmajor_n64.sm_90a"] == (
        "takes at most 7 clusters, which are 128 tokens of 384 experts, got 129"
    )
    assert reasons["router_prefill_kmajor_n64_k8.sm_90a"].startswith("chosen")


def test_the_text_names_path_steps_copies_scratch_pdl_and_evidence(artifacts):
    question = replace(QUESTION, num_tokens=1000, num_experts=132, layout="emajor", hashed=True)
    text = as_text(explain(artifacts, question, "sm_90a"))
    assert "N=1000, K=7168, num_experts=132, top_k=6, emajor hash layer on sm_90a" in text
    assert "path: torch.mm (cuBLAS), then one launch of router_topk.sm_90a, " in text
    assert "-> 961.. tokens: selects from the logits of a matrix product: router_topk" in text
    assert "copies: W_gate, 1892352 bytes per layer, since TMA cannot step" in text
    assert "copies: tid2eid as int32" in text
    # The logits, and as much to compute them transposed.
    assert f"scratch: {2 * 1000 * 132 * 4} bytes of logits per stream" in text
    assert "pdl: allowed" in text
    assert "evidence of router_topk.sm_90a: none for these bytes" in text


def test_a_hash_layer_has_other_steps_for_calls_of_the_whole_gate(artifacts):
    question = replace(QUESTION, hashed=True)
    for more, chosen in (
        ({}, "router_hash"),
        ({"images": True}, "router_decode_kmajor_n64"),
        ({"logits": True}, "router_decode_kmajor_n64"),
    ):
        text = as_text(explain(artifacts, replace(question, **more), "sm_90a"))
        assert "steps of calls with image rows or out_logits, if the layer has bias_vl:" in text
        assert f"path: one launch of {chosen}.sm_90a, " in text
        assert text.count("  -> ") == 1
    everything = replace(question, images=True, logits=True, layout="emajor")
    text = as_text(explain(artifacts, everything, "sm_90a"))
    assert "emajor hash layer, image rows, out_logits on" in text
    assert "image rows" not in as_text(explain(artifacts, QUESTION, "sm_90a"))


def test_clusters_of_the_launch_are_said(artifacts):
    text = as_text(explain(artifacts, QUESTION, "sm_90a"))
    assert "one launch of router_decode_kmajor_n64.sm_90a, 96 CTAs in 6 clusters of 16" in text
    assert "copies: W_gate is read in place" in text


def test_the_kernel_of_a_context_with_room_for_smaller_clusters_alone_is_said(artifacts):
    text = as_text(explain(artifacts, QUESTION, "sm_90a"))
    lines = [line for line in text.splitlines() if line.startswith("without room")]
    assert lines == [
        f"without room for a cluster of {size} CTAs (MIG, MPS, green contexts): {kernel}.sm_90a"
        for size, kernel in (
            (16, "router_prefill_kmajor_n64_k8"),
            (8, "router_prefill_kmajor_n64_k4"),
            (4, "router_topk"),
        )
    ]
    some = "with room for some of its clusters at once: the step from it on of the fewest waves"
    assert some in text
    product = as_text(explain(artifacts, replace(QUESTION, num_tokens=641), "sm_90a"))
    assert "without room" not in product
    assert some not in product


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_tokens": 0}, r"num_tokens: expected 1\.\.2147483647 \(got 0\)"),
        ({"num_experts": 513}, r"num_experts: expected 1\.\.512 \(got 513\)"),
        ({"top_k": 9}, r"top_k: expected 1\.\.8 \(got 9\)"),
        ({"num_experts": 4, "top_k": 6}, r"top_k: expected 1\.\.4 \(got 6\)"),
        ({"k": 100}, r"k: expected a multiple of 64 \(got 100\)"),
        ({"k": 0}, r"k: expected 1\.\.\d+ \(got 0\)"),
        ({"layout": "row"}, r"layout: expected kmajor or emajor \(got 'row'\)"),
    ],
)
def test_a_question_that_no_call_can_ask_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        replace(QUESTION, **wrong)


def test_an_architecture_without_kernels_is_an_error_with_every_reason(artifacts, capsys):
    with pytest.raises(NoKernelError):
        explain(artifacts, QUESTION, "sm_80")
    arguments = "explain --n 1 --k 64 --experts 8 --top-k 2 --arch sm_80".split()
    assert main([*arguments, "--artifacts", str(artifacts.folder)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: no kernel for role=decode")
    assert "router_topk.sm_90a: built for sm_90a, this GPU is sm_80" in captured.err


# "" is what `--arch "$ARCH"` gives if nothing is set: no question about this machine's GPU.
@pytest.mark.parametrize("arch", ["", "foo", "SM_90A", "sm_90aa"])
def test_what_is_no_architecture_is_refused(artifacts, capsys, arch):
    arguments = "explain --n 1 --k 64 --experts 8 --top-k 2".split()
    given = ["--arch", arch, "--artifacts", str(artifacts.folder)]
    assert main([*arguments, *given]) == 2
    expected = f"error: arch: expected an architecture such as sm_90a (got {arch!r})\n"
    assert capsys.readouterr() == ("", expected)


def test_the_command_prints_the_document_and_needs_neither_torch_nor_a_gpu(artifacts):
    arguments = "explain --n 48 --k 7168 --experts 384 --top-k 6 --arch sm_100a --json".split()
    code = f"""
import sys
sys.modules["torch"] = sys.modules["cuda"] = None
from dsv4_router_runtime.__main__ import main
sys.exit(main({[*arguments, "--artifacts", str(artifacts.folder)]!r}))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    expected = as_json(explain(artifacts, QUESTION, "sm_100a"))
    assert json.loads(run.stdout) == json.loads(json.dumps(expected))


def test_without_a_gpu_the_architecture_has_to_be_named(artifacts, monkeypatch, capsys):
    from dsv4_router_runtime.device import driver
    from dsv4_router_runtime.errors import DriverMissingError

    def missing(index):
        raise DriverMissingError("no CUDA driver")

    monkeypatch.setattr(driver, "arch_of_device", missing)
    arguments = "explain --n 1 --k 64 --experts 8 --top-k 2".split()
    assert main([*arguments, "--artifacts", str(artifacts.folder)]) == 2
    assert "no CUDA driver; name an architecture: --arch sm_90a" in capsys.readouterr().err
    monkeypatch.setattr(driver, "arch_of_device", lambda index: {3: "sm_90a"}[index])
    assert main([*arguments, "--device", "3", "--artifacts", str(artifacts.folder)]) == 0
    assert "on sm_90a\n" in capsys.readouterr().out


def test_a_kernel_that_is_not_chosen_is_made_for_what_its_clusters_hold(artifacts):
    kernels = tuple(
        replace(kernel, launch=replace(kernel.launch, max_clusters=7))
        if kernel.role == "prefill"
        else kernel
        for kernel in artifacts.manifest.kernels
    )
    held = replace(artifacts, manifest=replace(artifacts.manifest, kernels=kernels))
    text = as_text(explain(held, replace(QUESTION, num_tokens=100), "sm_90a"))
    assert "router_prefill_kmajor_n64_k8.sm_90a: not chosen, made for 1..128 tokens" in text
