"""Installs `flash_attend/` as it lies, and the top-level `kernels/` as `flash_attend.kernels`."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    """The version, read as text: importing the package here would need torch at build time."""
    source = (ROOT / "flash_attend" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if found is None:
        raise RuntimeError('flash_attend/__init__.py has no line __version__ = "..."')
    return found[1]


# A model that the package serves, which imports `packaging` without declaring it, and what shows how it trains.
DEMO = ["complex-valued-transformer==0.0.14", "matplotlib", "packaging", "tqdm"]

setup(
    name="flash_attend",
    version=read_version(),
    description="Exact masked attention, forward and backward, from Triton kernels, behind a drop-in Attend",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="the flash_attend authors",
    license="MIT",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    # A top-level package named `kernels` would shadow the one on PyPI, which transformers imports.
    package_dir={"flash_attend.kernels": "kernels"},
    packages=[
        "flash_attend",
        "flash_attend.integrations",
        "flash_attend.kernels",
        "flash_attend.kernels.hopper",
        "flash_attend.testing",
    ],
    python_requires=">=3.10",
    install_requires=["einops>=0.7", "numpy", "torch>=2.10", "tqdm"],
    extras_require={
        "triton": ['triton>=3.6,<3.10; platform_system == "Linux"'],
        "demo": DEMO,
        "bench": [*DEMO, "pandas"],
        "test": [
            *["build", "hypothesis", "mypy", "pytest>=8", "pytest-xdist", "ruff", "setuptools>=77"],
            "transformers>=5",
        ],
    },
)
