"""What is made of NVML's answers. The driver itself is asked in tests/gpu/test_health.py."""

import sys
from types import SimpleNamespace

import pytest
import torch

from launcher.config.monitoring import DeviceError
from training import devices
from training.devices import DeviceWatch


def settings(**changes):
    return DeviceError(**{"interval_s": 30.0, "action": "note", "budget": 1, **changes})


class Driver(SimpleNamespace):
    """The part of pynvml that is used, by the names and signatures of nvidia-ml-py 13, of a node with two GPUs."""

    NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC, nvmlEventTypeXidCriticalError = 1, 0, 8
    NVML_ERROR_NOT_SUPPORTED, NVML_ERROR_TIMEOUT, NVML_ERROR_GPU_IS_LOST, NVML_ERROR_UNKNOWN = 3, 10, 15, 999

    class NVMLError(Exception):
        @property
        def value(self):
            return self.args[0]

    def __init__(self):
        super().__init__(ecc=5, ecc_error=None, xids=[], asked=0)

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):
        assert uuid == "GPU-8f2c"
        return "handle"

    def nvmlDeviceGetTotalEccErrors(self, handle, errorType, counterType):
        assert (handle, errorType, counterType) == ("handle", 1, 0)
        self.asked += 1
        if self.ecc_error:
            raise self.NVMLError(self.ecc_error)
        return self.ecc

    def nvmlEventSetCreate(self):
        return []

    def nvmlDeviceRegisterEvents(self, handle, eventTypes, eventSet):
        eventSet.append((handle, eventTypes))

    def nvmlEventSetWait(self, eventSet, timeoutms):
        assert eventSet == [("handle", 8)] and timeoutms == 0
        if not self.xids:
            raise self.NVMLError(self.NVML_ERROR_TIMEOUT)
        return SimpleNamespace(eventData=self.xids.pop(0))


@pytest.fixture
def driver(monkeypatch):
    made = Driver()
    monkeypatch.setitem(sys.modules, "pynvml", made)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="8f2c"))
    return made


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(time=1000.0)
    monkeypatch.setattr(devices.time, "monotonic", lambda: now.time)
    return now


def test_what_is_new_is_told_once(driver, clock):
    watch = DeviceWatch(settings(), 0)
    assert watch.why_not is None
    assert watch.poll() is None  # the 5 errors at the start are older than the run
    clock.time += 30
    driver.ecc, driver.xids = 7, [94, 48, 94]
    assert watch.poll() == "2 uncorrected ECC errors; XID 94; XID 48"
    clock.time += 30
    assert watch.poll() is None


def test_it_asks_no_more_often_than_it_is_told_to(driver, clock):
    watch = DeviceWatch(settings(), 0)
    driver.xids = [79]
    assert watch.poll() == "XID 79"
    driver.xids, driver.asked = [79], 0
    clock.time += 29.9
    assert watch.poll() is None and driver.asked == 0
    clock.time += 0.2
    assert watch.poll() == "XID 79"


def test_faults_of_programs_are_none_of_the_device(driver, clock):
    watch = DeviceWatch(settings(), 0)
    driver.xids = [13, 31, 43, 45, 68, 109]
    assert watch.poll() is None and driver.xids == []


def test_a_gpu_without_ecc(driver, clock):
    driver.ecc_error = driver.NVML_ERROR_NOT_SUPPORTED
    watch = DeviceWatch(settings(), 0)
    driver.xids = [79]
    assert watch.why_not is None and watch.poll() == "XID 79"


def test_a_lost_gpu_is_told_once(driver, clock):
    watch = DeviceWatch(settings(), 0)
    driver.ecc_error = driver.NVML_ERROR_GPU_IS_LOST
    assert watch.poll() == "the GPU has fallen off the bus"
    clock.time += 30
    assert watch.poll() is None


def test_a_driver_that_fails_is_no_error_of_the_gpu(driver, clock):
    watch = DeviceWatch(settings(), 0)
    driver.ecc_error = driver.NVML_ERROR_UNKNOWN
    assert watch.poll() is None and "no longer" in watch.why_not


def test_without_a_gpu_nothing_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    watch = DeviceWatch(settings(interval_s=1e-9), 0)
    assert watch.poll() is None and "no CUDA device" in watch.why_not


def test_without_pynvml_nothing_is_told(driver, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    watch = DeviceWatch(settings(interval_s=1e-9), 0)
    assert watch.poll() is None and "pynvml" in watch.why_not
