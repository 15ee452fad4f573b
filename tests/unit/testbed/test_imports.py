"""`make demo`, `make run` and the benchmark use the testbed without the packages that only tests need."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

from tests import testbed
from tests.testbed.processes import ROOT


def test_the_testbed_needs_no_test_packages() -> None:
    modules = [f"tests.testbed.{module.name}" for module in pkgutil.iter_modules(testbed.__path__)]
    assert "tests.testbed.processes" in modules
    hidden = dict.fromkeys(("pytest", "_pytest", "hypothesis", "coverage", "pytest_cov"))
    code = f"import importlib, sys; sys.modules |= {hidden}; [importlib.import_module(name) for name in {modules}]"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
