"""mar_fast.kernels as a kernel of the hub: the documented layout, and copies that load without mar_fast and beside it.

No network is used: an upload, and `get_kernel` of it, are not tested. Where Hugging Face's package ``kernels`` is
installed, its get_local_kernel loads the folder.
"""

import ast
import importlib.metadata
import json
import os
import subprocess
import sys

import pytest

from mar_fast import kernels
from mar_fast.huggingface import build_hub_kernel
from mar_fast.huggingface.hub_kernel import NAME, VARIANTS


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build_hub_kernel(tmp_path_factory.mktemp("hub") / NAME)


def test_layout(built):
    """Kernel requirements: build/<variant>/__init__.py, metadata.json, and a folder of the repository's name."""
    assert {file.name for file in (built / "build").iterdir()} == set(VARIANTS) and (built / "README.md").is_file()
    unique = set()
    for variant, backend in VARIANTS.items():
        folder = built / "build" / variant
        metadata = json.loads((folder / "metadata.json").read_text())
        assert metadata["name"] == NAME == built.name and metadata["backend"] == {"type": backend}
        assert {"id", "version", "license", "python-depends"} <= set(metadata) and metadata["id"].isidentifier()
        assert (folder / "__init__.py").is_file() and (folder / NAME.replace("-", "_") / "__init__.py").is_file()
        assert (folder / "jit/attention.py").is_file() and metadata["id"] in (folder / "library.py").read_text()
        unique.add(metadata["id"])
    assert len(unique) == len(VARIANTS)


def test_imports(built):
    """Relative ones within the kernel; else the standard library, torch and triton."""
    tops = set()
    for file in (built / "build/torch-cuda").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                tops |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                tops.add(node.module.partition(".")[0])
    assert {"torch", "triton"} <= tops <= {"torch", "triton", *sys.stdlib_module_names}


def test_nothing_is_overwritten(built):
    with pytest.raises(FileExistsError, match="already exists, expected a new folder"):
        build_hub_kernel(built)


LOAD = """
import importlib.util, json, sys
from pathlib import Path
import torch

def load(variant, inner=""):
    folder = Path(BUILT) / "build" / variant
    name = json.loads((folder / "metadata.json").read_text())["id"] + inner.replace("/", "_")
    spec = importlib.util.spec_from_file_location(name, folder / inner / "__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def values(ops):
    results = []
    with ops.use_backend("triton"):
        x, residual = (torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
        x.requires_grad_()
        normed, stream = ops.add_layer_norm(x, residual, torch.ones(48), torch.zeros(48))
        (normed * residual).sum().backward()
        qkv = torch.randn(2, 17, 3, 2, 32, generator=torch.Generator().manual_seed(3))
        results += [normed, stream, x.grad, ops.attention(qkv)]
    return results

first = load("torch-cuda")
alone = values(first)
assert not [name for name in sys.modules if name.split(".")[0] in ("mar_fast", "kernels")]
inner = load("torch-cuda", "mar_fast_kernels")
assert inner.attention is first.attention and inner.__all__ == first.__all__
others = [load("torch-cpu"), load("torch-universal", "mar_fast_kernels")]
import mar_fast.kernels
for ops in (*others, mar_fast.kernels):
    assert all(torch.equal(*pair) for pair in zip(values(ops), alone, strict=True))
assert sorted(mar_fast.kernels.__all__) == sorted(first.__all__)
print("same bits")
"""


def run(code, built, folder):
    done = subprocess.run(
        [sys.executable, "-c", f"BUILT = {str(built)!r}\n{code}"],
        cwd=folder,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_copies_load_alone_and_beside_mar_fast(built, tmp_path):
    """As the package's loader does it, by path and under the name of metadata.json; kernels run interpreted."""
    pytest.importorskip("triton")
    assert run(LOAD, built, tmp_path) == "same bits\n"


def test_hugging_faces_loader(built, tmp_path):
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("Hugging Face's kernels is not installed")
    code = (
        "from pathlib import Path\nfrom kernels import get_local_kernel\nprint(get_local_kernel(Path(BUILT)).__all__)"
    )
    assert ast.literal_eval(run(code, built, tmp_path)) == kernels.__all__
