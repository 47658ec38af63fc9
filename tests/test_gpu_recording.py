"""Record on a GPU the bits of the calls that `test_recorded_bits.py` repeats in the emulator.

    pytest -m gpu tests/test_gpu_recording.py --bits bits.json
    pytest -m slow tests/test_recorded_bits.py --bits bits.json -n 16 --dist worksteal

The first needs a GPU, for seconds; the second none.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("numpy", reason="needs the extra `verify`")

from bit_recording import Recording, read_recording  # noqa: E402
from recorded_cases import RECORDED, call  # noqa: E402

from dsv4_router_runtime.artifacts.folder import find_artifacts, open_artifacts  # noqa: E402
from dsv4_router_runtime.device.driver import arch_of_device  # noqa: E402

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def recording(request, tmp_path_factory):
    """What the tests add to; written after them, and read back."""
    machine = {
        "gpu": torch.cuda.get_device_name(0),
        "arch": arch_of_device(0),
        "torch": torch.__version__,
    }
    made = Recording(machine=machine)
    yield made
    path = request.config.getoption("--bits") or tmp_path_factory.mktemp("bits") / "all.npz"
    made.write(path)
    assert read_recording(path).outputs == made.outputs


@pytest.fixture(scope="module")
def artifacts():
    return open_artifacts(find_artifacts())


@pytest.mark.parametrize("recorded", RECORDED, ids=str)
def test_a_second_call_gives_the_recorded_bits(recorded, recording, artifacts):
    key = f"{recorded.kernel}.{recording.machine['arch']}"
    (kernel,) = (kernel for kernel in artifacts.manifest.kernels if kernel.key == key)
    inputs = recorded.inputs(kernel)
    outputs, again = (call(artifacts, kernel, inputs, recorded.layout, "cuda") for _ in range(2))
    recording.kernels[kernel.name] = kernel.ptx_sha256
    recording.add(str(recorded), {**inputs.tensors, **inputs.numbers}, outputs)
    for name, array in outputs.items():
        assert array.tobytes() == again[name].tobytes(), name
