"""The gateway and the SR of the system tests, and programs of others that scripts/setup has installed."""

from pathlib import Path

import pytest

from tests.foreign.programs import OPENSTACK_PYTHON, NodeProgram
from tests.system.conftest import random_file, shared_site, site

__all__ = ["openstack_python", "random_file", "shared_site", "site", "xen_api"]

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def xen_api() -> NodeProgram:
    """Runs a program of this directory with Node's xen-api."""
    if not (HERE / "node_modules" / "xen-api").is_dir():
        pytest.fail("Node's xen-api isn't installed; run ./scripts/setup --tests", pytrace=False)
    return NodeProgram(HERE)


@pytest.fixture(scope="session")
def openstack_python() -> Path:
    """The interpreter of the environment that has OpenStack's os-xenapi."""
    if not OPENSTACK_PYTHON.exists():
        pytest.fail("OpenStack's os-xenapi isn't installed; run ./scripts/setup --tests", pytrace=False)
    return OPENSTACK_PYTHON
