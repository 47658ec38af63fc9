"""`pytest -m gpu --record FILE`: what ran on which cubin, for `build-kernels verify --record FILE`.

A test is one case for each artifact that it launched, found by watching launches; a test of several
cases says so with the fixture `record_cases`. A test of the host's time (`timing`) is none.
"""

from __future__ import annotations

import datetime
from collections import defaultdict
from pathlib import Path

import pytest

from build_kernels.evidence.rungs.hardware import Record, append_record
from dsv4_router_runtime.device import driver


class Tally:
    """Cases by artifact and test, of launches told as they happen."""

    def __init__(self) -> None:
        self.cases: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self.failed: dict[str, set[str]] = defaultdict(set)
        self._launched: set[str] = set()
        self._counted: dict[str, int] = defaultdict(int)

    def launched(self, artifact: str) -> None:
        self._launched.add(artifact)

    def count(self, number: int = 1) -> None:
        """That many cases, of each artifact launched since the last count."""
        for artifact in self._launched:
            self._counted[artifact] += number
        self._launched.clear()

    def end(self, name: str, *, failed: bool) -> None:
        """The test, named with its parameters, is over; if it counted nothing it is one case."""
        for artifact in self._launched - set(self._counted):
            self._counted[artifact] = 1
        for artifact, number in self._counted.items():
            self.cases[artifact][name] += number
            if failed:
                self.failed[artifact].add(name)
        self.forget()

    def forget(self) -> None:
        """What was launched outside a test's own call is no case."""
        self._launched.clear()
        self._counted.clear()


class HardwareRecord:
    """Watches launches from its making on; writes one record per launched artifact at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kernels: dict = {}
        self.tally = Tally()
        # The class is changed, not an object: sites are made later, and keep a bound launch.
        # Here, since it needs torch, and the tally below does not.
        from dsv4_router_runtime.device.launch_site import LaunchSite

        launch = LaunchSite.launch

        def watched(site: LaunchSite) -> None:
            kernel = site.block.kernel
            self.kernels[kernel.key] = kernel
            self.tally.launched(kernel.key)
            launch(site)

        LaunchSite.launch = watched

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        is_case = item.get_closest_marker("gpu") and not item.get_closest_marker("timing")
        if call.when == "call" and is_case:
            self.tally.end(item.name, failed=report.failed)
        if call.when == "teardown":
            self.tally.forget()
        return report

    def pytest_sessionfinish(self) -> None:
        if not self.tally.cases:
            return
        import torch

        version = driver.checked(
            "reading the driver's version", driver.bindings().cuDriverGetVersion()
        )
        for key, counts in sorted(self.tally.cases.items()):
            kernel = self.kernels[key]
            record = Record(
                artifact=key,
                cubin_sha256=kernel.cubin_sha256,
                ptx_sha256=kernel.ptx_sha256,
                gpu=torch.cuda.get_device_name(0),
                arch=driver.arch_of_device(0),
                driver=f"CUDA {version // 1000}.{version % 1000 // 10}",
                date=datetime.date.today().isoformat(),
                cases=dict(sorted(counts.items())),
                failed=tuple(sorted(self.tally.failed[key])),
            )
            append_record(self.path, record)
