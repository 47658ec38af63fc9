"""Other contexts, partitions and broken contexts on a GPU, each in a process with a time limit.

`python tests/test_gpu_contexts.py green 16 0` runs one of them by hand.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from gpu_calls import captured, integers, outputs  # noqa: E402
from gpu_recorder import steps_of, workspace_of  # noqa: E402

from build_kernels.bench.partition import (  # noqa: E402
    LARGE_CLUSTERS,
    PartitionError,
    make_partition,
)
from dsv4_router_runtime import Router, RouterError  # noqa: E402
from dsv4_router_runtime.device import capture, driver, occupancy  # noqa: E402

pytestmark = pytest.mark.gpu

# One for each step of the layer's plan at least: prefill takes 65 to 640, a product the last.
TOKENS = (1, 8, 16, 32, 64, 128, 256, 300, 400, 700)
# Of prefill by clusters of 16 at N = 128: 3 tiles of experts by 2 of tokens.
PREFILL_CLUSTERS = 6
SECONDS = 60

STORE_TO_NOWHERE = "st.global.u32 [%rd1], %r1;"
TRAP = "trap;"
PTX = """.version 8.0
.target sm_90
.address_size 64
.visible .entry broken() {
  .reg .b32 %r<2>;
  .reg .b64 %rd<2>;
  mov.u32 %r1, 1;
  mov.u64 %rd1, 16;
  BODY
  ret;
}
"""


def alone(*arguments: object) -> dict:
    """Run a function of this file in a process of its own; what it prints last is its result."""
    ran = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)],
        capture_output=True, text=True, timeout=SECONDS, cwd=Path(__file__).parent,
    )  # fmt: skip
    print(ran.stdout, ran.stderr, sep="\n")
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize("flags", [0, LARGE_CLUSTERS])
@pytest.mark.parametrize("sms", [8, 16, 32, 64, 128])
def test_green_contexts_are_right_and_say_what_did_not_fit(sms, flags):
    seen = alone("green", sms, flags)
    if "refused" in seen:
        pytest.skip(f"gpu: no green context of {sms} SMs with flags {flags}: {seen['refused']}")
    assert seen["wrong"] == []
    assert seen["contexts_kept"]
    assert seen["null_streams_scratch"], "the null streams of two contexts share scratch"
    # Each step whose kernel had no room is left, with a warning; others for fewer waves, without.
    assert {item["kernel"] for item in seen["fallbacks"]} >= set(seen["unfit"])
    assert len(seen["warnings"]) == len(seen["unfit"])
    (room,) = (
        room for key, room in seen["exclusive_clusters"].items() if "prefill_kmajor_n64." in key
    )
    # Right all the same, with clusters that wait for others to end.
    assert seen["sms"] >= 16 * PREFILL_CLUSTERS or room < PREFILL_CLUSTERS


def test_a_thread_without_a_context_gets_no_other_than_torchs():
    """torch makes the primary one current to say whether its stream is being captured."""
    expected = {"right": True, "before": 0, "none or torch's after": True}
    assert alone("bare_thread") == expected


def test_a_context_of_the_caller_is_refused_and_kept():
    seen = alone("foreign")
    assert seen["kept"]
    for message in seen["refused"]:
        assert "allowed: the primary context, or a green context of the GPU" in message
    assert len(seen["refused"]) == 4


@pytest.mark.parametrize("body", [STORE_TO_NOWHERE, TRAP])
def test_after_a_failed_kernel_a_call_says_to_restart(body):
    seen = alone("broken", body)
    assert "an earlier kernel, of any library, may be to blame" in seen["message"]
    assert seen["message"].endswith("restart the process")


def test_after_a_reset_a_call_says_to_restart():
    assert "restart the process" in alone("reset")["message"]


# ------------------------------------------------------------------ in a process of their own


def layer(num_tokens: int = max(TOKENS)):
    random = torch.Generator(device="cuda").manual_seed(1)
    x, W, bias = integers(random, num_tokens, 7168, 384)
    return x, Router(W, bias, top_k=6, routed_scaling_factor=2.5)


def route(router, x, n):
    weights, ids = outputs(n, 6)
    router(x[:n], weights, ids)
    return weights, ids


def same(got, expected) -> bool:
    torch.cuda.synchronize()
    return torch.equal(got[1], expected[1]) and torch.allclose(got[0], expected[0], rtol=1e-6)


def ask(doing: str, results):
    return driver.checked(doing, results)


def green(sms: str, flags: str) -> dict:
    import logging

    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("dsv4_router_runtime").addHandler(handler)
    x, router = layer()
    expected = {n: route(router, x, n) for n in TOKENS}
    torch.cuda.synchronize()
    try:
        part = make_partition(int(sms), large_clusters=int(flags) == LARGE_CLUSTERS)
    except PartitionError as error:
        return {"refused": str(error)}
    cuda = driver.bindings()
    context, handle, count = cuda.CUcontext(part.context), part.stream, part.sms
    stream = torch.cuda.ExternalStream(handle)
    wrong, kept = [], True
    with torch.cuda.stream(stream):
        for n in TOKENS:
            if not same(route(router, x, n), expected[n]):
                wrong.append(f"N={n} on the stream")
            ask("push", cuda.cuCtxPushCurrent(context))
            out = route_into(router, x, n, outputs_of(expected[n]))
            kept &= driver.current_context() == int(context)
            ask("pop", cuda.cuCtxPopCurrent())
            if not same(out, expected[n]):
                wrong.append(f"N={n} with the context current")
    for n in TOKENS:
        out = outputs_of(expected[n])
        graph = captured([lambda n=n, out=out: route_into(router, x, n, out)], stream)
        for tensor in out:
            tensor.zero_()
        # The stream does not wait for the one of the zeros.
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            graph.replay()
        if not same(out, expected[n]):
            wrong.append(f"N={n} in a graph")
    rooms = {
        step.loaded.kernel.key: occupancy.ask_room(step.loaded, handle) for step in steps_of(router)
    }
    fallbacks = [vars(item) for item in occupancy.fallbacks()]
    # The null stream, which so far was the primary context's.
    for n in TOKENS:
        out = outputs_of(expected[n])
        torch.cuda.synchronize()
        ask("push", cuda.cuCtxPushCurrent(context))
        route_into(router, x, n, out)
        ask("synchronise", cuda.cuCtxSynchronize())
        null_stream = capture.stream_id(0, 0)
        kept &= driver.current_context() == int(context)
        ask("pop", cuda.cuCtxPopCurrent())
        if not same(out, expected[n]):
            wrong.append(f"N={n} on the null stream")
    return {
        "sms": count,
        "wrong": wrong,
        "contexts_kept": kept and driver.is_primary_current(0),
        "null_streams_scratch": ~null_stream in workspace_of(router).slots
        and null_stream != capture.stream_id(0, 0),
        "unfit": [key for key, room in rooms.items() if room.reason],
        "exclusive_clusters": {key: room.exclusive_clusters for key, room in rooms.items()},
        "fallbacks": fallbacks,
        "warnings": warnings,
    }


def outputs_of(expected):
    """Return outputs like the expected ones, made while the primary context is current."""
    return tuple(torch.zeros_like(tensor) for tensor in expected)


def route_into(router, x, n, out):
    router(x[:n], *out)
    return out


def bare_thread() -> dict:
    from threading import Thread

    x, router = layer()
    expected = route(router, x, 8)
    out, seen = outputs_of(expected), {}
    torch.cuda.synchronize()

    def work() -> None:
        seen["before"] = driver.current_context()
        router(x[:8], *out)
        seen["after"] = driver.current_context()

    thread = Thread(target=work)
    thread.start()
    thread.join()
    after = seen["after"] in (0, driver._primary_context(0))
    return {"right": same(out, expected), "before": seen["before"], "none or torch's after": after}


def foreign() -> dict:
    x, router = layer()
    out = {n: route(router, x, n) for n in (8, 128, 300)}
    torch.cuda.synchronize()
    weights, bias = router.W_gate, router.e_bias
    cuda = driver.bindings()
    try:
        made = ask("context", cuda.cuCtxCreate(None, 0, 0))
    except TypeError:  # Bindings of CUDA 12 take no parameters of the context.
        made = ask("context", cuda.cuCtxCreate(0, 0))
    refused = []
    for call in (
        lambda: router(x[:8], *out[8]),
        lambda: router(x[:128], *out[128]),
        lambda: router(x[:300], *out[300]),
        lambda: Router(weights, bias, top_k=6, routed_scaling_factor=1.0),
    ):
        try:
            call()
        except RouterError as error:
            refused.append(str(error))
    kept = driver.current_context() == int(made)
    ask("pop", cuda.cuCtxPopCurrent())
    for n, before in out.items():
        assert same(route(router, x, n), before)
    return {"refused": refused, "kept": kept}


def message_of(call) -> dict:
    """Return the error of a call, or of the one after: a broken context shows itself late."""
    for _ in range(2):
        try:
            call()
            driver.bindings().cuCtxSynchronize()
        except RouterError as error:
            return {"message": str(error)}
    return {"message": "no error"}


def broken(body: str) -> dict:
    x, router = layer()
    out = route(router, x, 8)
    torch.cuda.synchronize()
    cuda = driver.bindings()
    module = ask("module", cuda.cuModuleLoadData(PTX.replace("BODY", body).encode() + b"\0"))
    function = ask("function", cuda.cuModuleGetFunction(module, b"broken"))
    ask("launch", cuda.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0))
    (code,) = cuda.cuCtxSynchronize()
    print("the driver answers", code.name)
    return message_of(lambda: router(x[:8], *out))


def reset() -> dict:
    x, router = layer()
    out = route(router, x, 8)
    torch.cuda.synchronize()
    ask("reset", driver.bindings().cuDevicePrimaryCtxReset(0))
    return message_of(lambda: router(x[:8], *out))


if __name__ == "__main__":
    name, *given = sys.argv[1:]
    print(json.dumps(globals()[name](*given)), flush=True)
    # Without the interpreter's own clean-up, which a broken context may stop.
    __import__("os")._exit(0)
