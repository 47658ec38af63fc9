"""The self-test: layers of small integers, routed eagerly and in a replayed CUDA graph.

The launches are a server's, by `LayerSteps`, on memory and a stream of the driver's. The ids must
be the exact ones. Of a step with a matrix product the kernel alone is tested, on exact logits: the
product is torch's, which takes seconds to import.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from dsv4_router_runtime.artifacts.dispatch import LayerProblem
from dsv4_router_runtime.artifacts.folder import ArtifactSet
from dsv4_router_runtime.device.arguments import NO_OPTIONS, NO_RARE, Call, CallOptions
from dsv4_router_runtime.device.memory import DeviceMemory, read, write
from dsv4_router_runtime.device.own_stream import OwnStream, own_stream
from dsv4_router_runtime.device.workspace import Slot, check_zeroed
from dsv4_router_runtime.errors import NoKernelError
from dsv4_router_runtime.parameters import DTYPES, PARAMETERS_OFF
from dsv4_router_runtime.steps import LayerSteps, Streams

from .finding import RIGHT_OUTPUTS, Finding, fail, ok, out_of_service
from .inputs import (
    CASES,
    EXPERTS,
    SCALE,
    TOP_K,
    VOCABULARY,
    Case,
    Inputs,
    K,
    Row,
    make_inputs,
)

# Of an FP32 weight against FP64: 2e-7 is the worst that the evidence records.
TOLERANCE = 1e-5
CANARY = -77
# Of an output's element.
_ELEMENT_BYTES = 4


def self_test(artifacts: ArtifactSet, index: int) -> Finding:
    """Route every case on GPU `index`, eagerly and replayed, and compare with the exact results."""
    check = f"self-test gpu {index}"
    inputs, calls, untested = make_inputs(), 0, ""
    with own_stream(index) as stream:
        uploaded = {
            name: _upload(index, getattr(inputs, name)) for name in ("x", "logits", "token_ids")
        }
        for case in CASES:
            try:
                layer = _TestedLayer(artifacts, index, stream, case, inputs, uploaded)
                wrong = _find_wrong(layer, stream, inputs.expected[case.hashed])
            except NoKernelError as error:
                # A set may lack such kernels, and a part of a GPU the room for them.
                if not case.same_bits:
                    raise
                untested = f"; not tested: {case}, {error}"
                continue
            if wrong:
                repair = out_of_service(index)
                return fail(check, f"{case}, {wrong}", needed=RIGHT_OUTPUTS, repair=repair)
            calls += len(case.tokens)
    return ok(check, f"{calls} calls right, and {calls} replayed{untested}")


def _upload(index: int, content: bytes) -> DeviceMemory:
    memory = DeviceMemory(index, len(content))
    write(index, memory.address, content)
    return memory


class _TestedLayer(LayerSteps):
    """The layer of a case, its inputs and the outputs of a call of each number of tokens."""

    def __init__(
        self,
        artifacts: ArtifactSet,
        index: int,
        stream: OwnStream,
        case: Case,
        inputs: Inputs,
        uploaded: Mapping[str, DeviceMemory],
    ) -> None:
        problem = LayerProblem(
            layout=case.layout,
            tma_loadable=True,
            hashed=case.hashed,
            num_experts=EXPERTS,
            top_k=TOP_K,
            k=K,
            same_bits=case.same_bits,
            dtypes=DTYPES,
        )
        streams = Streams(
            current_stream=lambda index: stream.handle,
            is_capturing=lambda: stream.is_capturing,
            is_lasting=lambda index, handle: True,
        )
        super().__init__(artifacts, problem, index, streams)
        self._uploaded = uploaded
        self._write_weights(case, inputs)
        self._options = NO_OPTIONS
        if case.hashed:
            self._options = CallOptions(0, 0, 0, uploaded["token_ids"].address, 1, NO_RARE)
        self.tokens = case.tokens
        # Of all calls, one after another: weights and ids.
        self._elements = sum(case.tokens) * TOP_K
        size = self._elements * _ELEMENT_BYTES
        self._outputs = tuple(DeviceMemory(index, size) for _ in range(2))

    def _write_weights(self, case: Case, inputs: Inputs) -> None:
        """Upload what the layer binds, and write it to the launch sites."""
        # A hash layer's copy is uploaded as such.
        layout = case.layout if self.plan.copy_reason is None else "kmajor"
        weights = _upload(self._index, inputs.W_gate[layout])
        small = _upload(self._index, inputs.table if case.hashed else inputs.e_bias)
        self._bound = weights, small
        values = {
            **PARAMETERS_OFF,
            "w_gate": weights.address,
            "w_stride": K,
            "num_experts": EXPERTS,
            "top_k": TOP_K,
            "routed_scaling_factor": SCALE,
            "e_bias": 0 if case.hashed else small.address,
            "tid2eid": small.address if case.hashed else 0,
            "vocab_size": VOCABULARY if case.hashed else 0,
        }
        strides = (1, K) if layout == "kmajor" else (EXPERTS, 1)
        self.write_layer(values, weights.address, strides)

    def route_all(self) -> None:
        """Make a call of each number of tokens on the stream."""
        weights, ids = (memory.address for memory in self._outputs)
        for num_tokens in self.tokens:
            call = Call(
                num_tokens=num_tokens,
                hidden_states=self._uploaded["x"].address,
                hidden_states_stride=K,
                out_weights=weights,
                out_weights_stride=TOP_K,
                out_ids=ids,
                out_ids_stride=TOP_K,
                weights_are_bfloat16=0,
                ids_are_int64=0,
            )
            self.run(call, self._options, None, None, False)
            weights += num_tokens * TOP_K * _ELEMENT_BYTES
            ids += num_tokens * TOP_K * _ELEMENT_BYTES

    def _logits(
        self,
        slot: Slot,
        call: Call,
        options: CallOptions,
        hidden_states: Any,
        W_gate: Any,
        out_logits: Any,
    ) -> tuple[int, int]:
        return self._uploaded["logits"].address, EXPERTS

    def fill_outputs(self) -> None:
        """Write the canary to every element of the outputs."""
        for memory, element_type in zip(self._outputs, "fi", strict=True):
            canaries = array(element_type, [CANARY]) * self._elements
            write(self._index, memory.address, canaries.tobytes())

    def read_outputs(self) -> tuple[array[float], array[int]]:
        """Return the weights and ids of all calls; the stream's work is done."""
        weights, ids = (read(self._index, each.address, each.size) for each in self._outputs)
        return array("f", weights), array("i", ids)


def _find_wrong(layer: _TestedLayer, stream: OwnStream, expected: Sequence[Row]) -> str | None:
    """Return the first eager or replayed call that is wrong, None if all are right."""

    def route_eagerly() -> None:
        layer.route_all()
        stream.wait()

    for way, route in (
        ("eager", route_eagerly),
        ("replayed", lambda: stream.replay(layer.route_all)),
    ):
        layer.fill_outputs()
        route()
        weights, ids = layer.read_outputs()
        first = 0
        for num_tokens in layer.tokens:
            end = first + num_tokens * TOP_K
            wrong = _compare(weights[first:end], ids[first:end], expected[:num_tokens])
            if wrong:
                return f"N={num_tokens}, {way}: {wrong}"
            first = end
    return None


def _compare(weights: array[float], ids: array[int], expected: Sequence[Row]) -> str | None:
    right = array("i", (expert for row, _ in expected for expert in row))
    if ids != right:
        starts = range(0, len(right), TOP_K)
        rows = sum(ids[at : at + TOP_K] != right[at : at + TOP_K] for at in starts)
        return f"{rows} of {len(expected)} rows have other ids"
    exact = (weight for _, row in expected for weight in row)
    for got, want in zip(weights, exact, strict=True):
        off = abs(got / want - 1)
        # Not >, which NaN would pass.
        if not off <= TOLERANCE:
            return f"a weight is off by {off:.2g} of itself"
    return None


def check_workspace(index: int) -> Finding:
    """Look whether the launches so far left their scratch zero."""
    check_zeroed(index)
    return ok(f"workspace gpu {index}", "zero after the launches of this process")
