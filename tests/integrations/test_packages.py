"""Other people's classes and models, for real: what `packages.py` lists."""

from __future__ import annotations

import importlib.util

import packages
import pytest

pytestmark = pytest.mark.clients


def name_of(package: packages.Package) -> str:
    return f"{package.name} {package.what}"


@pytest.mark.parametrize("package", [*packages.classes(), *packages.models()], ids=name_of)
def test_the_same_is_computed_or_it_is_refused(package):
    if importlib.util.find_spec(package.name) is None:
        pytest.skip(reason=f"{package.name} is missing: `make test-clients` installs it and runs these tests")
    found = packages.compare(package)
    assert (found.replaced > 0, found.refused > 0) == (package.served, not package.served)
    assert all(reason.startswith(package.told) for reason in found.reasons)
    assert max(found.output, found.gradient) <= 1e-5  # softmax in single precision, which some have in double
