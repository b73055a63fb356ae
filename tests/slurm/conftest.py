"""The cluster that all tests of this folder share."""

import os

import pytest

from tests.slurm.daemons import missing_programs
from tests.slurm.lab import SlurmLab

INSTALL = "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge"


@pytest.fixture(scope="session")
def slurm_installed():
    require(missing_programs())


@pytest.fixture(scope="session")
def slurm(slurm_installed):
    with SlurmLab() as lab:
        yield lab


@pytest.fixture(autouse=True)
def as_booted(request):
    """What a test leaves behind, also one that fails, is not the next one's."""
    yield
    if lab := request.node.funcargs.get("slurm"):
        lab.reset()


@pytest.fixture(scope="session")
def slow():
    """A case whose decision has a fast test elsewhere, or that takes minutes: `make test-slow` runs it. Asked for
    first, and of the whole session: nothing is set up for what is skipped."""
    if not os.environ.get("PHIDIAS_SLOW"):
        pytest.skip("slow: PHIDIAS_SLOW=1, or make test-slow")


def require(missing):
    """Skips where Slurm is not installed; not in CI, where a test that was skipped would look like one that passed."""
    reason = f"no {', '.join(missing)} on this machine: {INSTALL}"
    if missing and os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    if missing:
        pytest.skip(reason)
