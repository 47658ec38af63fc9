"""`pytest -m gpu --record FILE`: what ran on which cubin, for `build-kernels verify --record FILE`.

A case is a test function; it counts for the artifacts that it launched, found by watching launches.
"""

from __future__ import annotations

import datetime
from collections import defaultdict
from pathlib import Path

import pytest

from build_kernels.verify.hardware import Record, append_record
from dsv4_router_runtime import driver


class HardwareRecord:
    """Watches launches from its making on; writes one record per launched artifact at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kernels: dict = {}
        self.launched: set = set()
        self.cases: dict = defaultdict(lambda: defaultdict(int))
        self.failed: dict = defaultdict(set)
        # The class is changed, not an object: sites are made later, and keep a bound launch.
        launch = driver.LaunchSite.launch

        def watched(site: driver.LaunchSite) -> None:
            kernel = site.block.kernel
            self.kernels[kernel.key] = kernel
            self.launched.add(kernel.key)
            launch(site)

        driver.LaunchSite.launch = watched

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if call.when == "call" and item.get_closest_marker("gpu"):
            for key in self.launched:
                self.cases[key][item.originalname] += 1
                if report.failed:
                    self.failed[key].add(item.name)
        if call.when == "teardown":
            self.launched.clear()
        return report

    def pytest_sessionfinish(self) -> None:
        if not self.cases:
            return
        import torch

        version = driver.checked(
            "reading the driver's version", driver.bindings().cuDriverGetVersion()
        )
        for key, counts in sorted(self.cases.items()):
            kernel = self.kernels[key]
            record = Record(
                artifact=key,
                cubin_sha256=kernel.cubin_sha256,
                ptx_sha256=kernel.ptx_sha256,
                gpu=torch.cuda.get_device_name(0),
                arch=driver.arch_of_device(0),
                driver=f"CUDA {version // 1000}.{version % 1000 // 10}",
                date=datetime.date.today().isoformat(),
                cases=tuple(f"{name}: {count}" for name, count in sorted(counts.items())),
                failed=tuple(sorted(self.failed[key])),
            )
            append_record(self.path, record)
