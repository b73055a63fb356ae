"""Cases that CI's time has no room for: `make test-slow` runs them."""

import os

import pytest

slow = pytest.mark.skipif(not os.environ.get("PHIDIAS_SLOW"), reason="takes a minute or more: runs in make test-slow")
