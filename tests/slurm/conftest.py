"""The cluster that all tests of this folder share."""

import os
from collections.abc import Iterator

import pytest

from tests.slurm.daemons import missing_programs
from tests.slurm.lab import SlurmLab

INSTALL = "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge"


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmLab]:
    if missing := missing_programs():
        reason = f"no {', '.join(missing)} on this machine; {INSTALL}"
        if os.environ.get("CI"):  # there a test that was skipped would look like one that passed
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    with SlurmLab() as lab:
        yield lab
