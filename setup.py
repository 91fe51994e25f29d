"""Packaging: the folders of the tree that `MAPPED` names are packages inside `zoo`, where links stand for them."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, find_packages, setup

ROOT = Path(__file__).parent
MAPPED = ("models", "kernels", "scripts", "model_cards")


def under(package: str, folder: str) -> list[str]:
    """The package mapped to `folder`, and all packages in it."""
    return [package, *(f"{package}.{found}" for found in find_namespace_packages(str(ROOT / folder), exclude=["*__pycache__*"]))]


setup(
    name="seqzoo",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "zoo" / "__init__.py").read_text()).group(1),
    description="Efficient sequence architectures behind one interface: load, convert, train, serve",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.10",
    packages=[
        *find_packages(str(ROOT), include=["zoo", "zoo.*"], exclude=[f"zoo.{folder}*" for folder in MAPPED]),
        *(package for folder in MAPPED for package in under(f"zoo.{folder}", folder)),
    ],
    package_dir={"zoo": "zoo"} | {f"zoo.{folder}": folder for folder in MAPPED},
    include_package_data=True,
    entry_points={"console_scripts": ["zoo = zoo.__main__:main"]},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17,<6",
        "huggingface_hub",
        "httpx",
        "numpy",
        "pyyaml",
        "safetensors",
        "tokenizers",
        "einops",
        "accelerate",
        "tqdm",
    ],
    extras_require={
        "demo": ["gguf", "matplotlib"],
        "train": ["peft", "datasets", "matplotlib"],
        "eval": ["lm-eval"],
        "triton": ["triton"],
        "dev": [
            "pytest",
            "pytest-xdist",
            "ruff",
            "gguf",
            "matplotlib",
            "peft",
            "triton ; platform_system == 'Linux' and platform_machine == 'x86_64'",  # interpreted where there is no GPU
        ],
    },
)
