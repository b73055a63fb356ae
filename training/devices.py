"""What the driver tells of this rank's GPU: uncorrected memory errors (ECC) and critical events (XID), through NVML.

pynvml (nvidia-ml-py) is optional: without it, or without a GPU, nothing is told, and `why_not` says why.
"""

import importlib
import time
from typing import Any

import torch

from launcher.config.monitoring import DeviceError

# Programs cause these themselves, as NVIDIA's device plugin for Kubernetes has it: faults of a kernel, a process that ended.
OF_PROGRAMS = frozenset({13, 31, 43, 45, 68, 109})
MOST_EVENTS = 100  # read at once


class DeviceWatch:
    """Of one rank. It asks when it is polled, from no thread of its own; a poll that is not due costs a look at the clock."""

    def __init__(self, settings: DeviceError, local_index: int):
        """`local_index`: of the GPU among those that this process sees."""
        self.interval_s, self.due = settings.interval_s, 0.0
        self.why_not: str | None = None
        try:
            self._open(local_index)
        except Exception as error:  # a broken driver has many names
            self.why_not = f"GPU errors are not looked for: {type(error).__name__}: {error}"

    def poll(self) -> str | None:
        """What went wrong since the last poll, at most every `interval_s`; None where nothing did."""
        if self.why_not or time.monotonic() < self.due:
            return None
        self.due = time.monotonic() + self.interval_s
        try:
            return "; ".join([*self._new_ecc_errors(), *self._new_events()]) or None
        except self.nvml.NVMLError as error:
            self.why_not = f"GPU errors are no longer looked for: {error}"
            return "the GPU has fallen off the bus" if error.value == self.nvml.NVML_ERROR_GPU_IS_LOST else None

    def _open(self, local_index: int) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("no CUDA device")
        self.nvml: Any = importlib.import_module("pynvml")
        self.nvml.nvmlInit()
        # NVML counts all GPUs of the node, whatever CUDA_VISIBLE_DEVICES is.
        uuid = f"GPU-{torch.cuda.get_device_properties(local_index).uuid}"
        self.handle = self.nvml.nvmlDeviceGetHandleByUUID(uuid)
        self.ecc_errors = self._count_ecc_errors()
        self.events = self.nvml.nvmlEventSetCreate()
        self.nvml.nvmlDeviceRegisterEvents(self.handle, self.nvml.nvmlEventTypeXidCriticalError, self.events)

    def _count_ecc_errors(self) -> int:
        """Since the driver was loaded, so what was there at the start is not this run's; 0 of a GPU without ECC."""
        kind, since = self.nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, self.nvml.NVML_VOLATILE_ECC
        try:
            return int(self.nvml.nvmlDeviceGetTotalEccErrors(self.handle, kind, since))
        except self.nvml.NVMLError as error:
            if error.value == self.nvml.NVML_ERROR_NOT_SUPPORTED:
                return 0
            raise

    def _new_ecc_errors(self) -> list[str]:
        before, self.ecc_errors = self.ecc_errors, self._count_ecc_errors()
        new = self.ecc_errors - before
        return [f"{new} uncorrected ECC errors"] if new > 0 else []

    def _new_events(self) -> list[str]:
        """XIDs that tell of the device, each once."""
        found: dict[int, None] = {}
        for _ in range(MOST_EVENTS):
            try:
                event = self.nvml.nvmlEventSetWait(self.events, 0)
            except self.nvml.NVMLError as error:
                if error.value != self.nvml.NVML_ERROR_TIMEOUT:
                    raise
                break
            if event.eventData not in OF_PROGRAMS:
                found[int(event.eventData)] = None
        return [f"XID {number}" for number in found]
