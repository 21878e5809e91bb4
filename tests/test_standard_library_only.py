"""`images`, `access.client` and `nbd_plugin` load under Debian's own interpreter without any site-packages.

`-I -S` is what nbdkit's embedded interpreter comes down to when nobody has told it about our environment.
"""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SYSTEM_PYTHON = "/usr/bin/python3"


def bottom_modules() -> list[str]:
    paths = [*(ROOT / "gateway/images").rglob("*.py"), *(ROOT / "nbd_plugin").rglob("*.py")]
    paths += [*(ROOT / "gateway/access").glob("client*.py"), ROOT / "gateway/access/protocol.py"]
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in paths
        # nbdkit gives the plugin its own module; outside of it the plugin can't be imported.
        if "import nbdkit" not in path.read_text()
    }
    return sorted(modules)


@pytest.mark.skipif(not os.access(SYSTEM_PYTHON, os.X_OK), reason=f"{SYSTEM_PYTHON} isn't there")
def test_the_bottom_loads_without_site_packages() -> None:
    program = (
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import importlib\n"
        f"for module in {bottom_modules()!r}:\n"
        "    importlib.import_module(module)\n"
    )
    done = subprocess.run(
        [SYSTEM_PYTHON, "-I", "-S", "-W", "error", "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "path",
    ["gateway", "gateway/images", "gateway/images/vhd", "gateway/access", "nbd_plugin"],
)
def test_the_packages_on_that_path_are_empty(path: str) -> None:
    assert (ROOT / path / "__init__.py").read_text() == ""
