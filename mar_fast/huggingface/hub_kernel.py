"""mar_fast.kernels in the form that Hugging Face's package ``kernels`` loads from the hub: pure Python, no build.

The layout is its "Kernel requirements": build/<variant>/ is the package itself, with metadata.json, and a folder of the
repository's name inside it is for versions that look there. "torch-cpu", "torch-cuda" and "torch-rocm" are the variants
without an architecture, "torch-universal" is what earlier versions call them. Imports are relative, and each copy has
a namespace of ``torch.ops`` of its own, so that several may be loaded in one process, beside mar_fast too.
"""

import hashlib
import json
from pathlib import Path

from .. import kernels
from ..files import write_whole_folder

NAME = "mar-fast-kernels"
"""Of the repository; its owner is yours."""
VARIANTS = {"torch-cpu": "cpu", "torch-cuda": "cuda", "torch-rocm": "rocm", "torch-universal": "cuda"}
"""Variant -> backend."""
_METADATA = {"name": NAME, "version": 1, "license": "Apache-2.0", "python-depends": []}
# The folder of the repository's name gives what the variant's own __init__ gives, loaded under that copy's name.
_INNER = '''"""What the folder above has: for versions of Hugging Face's kernels that look here."""

import importlib.util
import sys
from pathlib import Path

_name = "{id}"
if _name not in sys.modules:
    _spec = importlib.util.spec_from_file_location(_name, Path(__file__).parent.parent / "__init__.py")
    sys.modules[_name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_name])
globals().update({{name: value for name, value in vars(sys.modules[_name]).items() if not name.startswith("__")}})
__all__ = sys.modules[_name].__all__
'''


def build_hub_kernel(folder: str | Path) -> Path:
    """Write mar_fast.kernels as a repository of kernels, to be uploaded under the name of `NAME`.

    Args:
        folder: A new one.

    Returns:
        The folder: build/<variant>/ for each of `VARIANTS`, and a README.md.

    Raises:
        FileExistsError: it is there.
    """
    folder = Path(folder).expanduser()
    if folder.exists():
        raise FileExistsError(f"{folder}: already exists, expected a new folder")
    (home,) = kernels.__path__
    sources = {file.relative_to(home): file.read_text(encoding="utf-8") for file in sorted(Path(home).rglob("*.py"))}
    digest = hashlib.sha256("".join(f"{name}\n{text}" for name, text in sources.items()).encode()).hexdigest()[:10]

    def write(new: Path) -> None:
        for variant, backend in VARIANTS.items():
            place, unique = new / "build" / variant, f"_{NAME}_{variant}_{digest}".replace("-", "_")
            metadata = _METADATA | {"id": unique, "backend": {"type": backend}}
            own = sources | {
                Path("library.py"): sources[Path("library.py")].replace('"mar_fast"', f'"{unique}"'),
                Path(NAME.replace("-", "_"), "__init__.py"): _INNER.format(id=unique),
                Path("metadata.json"): json.dumps(metadata, indent=2) + "\n",
            }
            for name, text in own.items():
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                (place / name).write_text(text, encoding="utf-8")
        (new / "README.md").write_text(_CARD, encoding="utf-8")

    write_whole_folder(folder, write)
    return folder


_CARD = f"""---
license: apache-2.0
library_name: kernels
tags:
- kernels
---

# The ops of mar_fast

Triton kernels with gradients for masked video transformers, and plain PyTorch on a CPU. They need Python 3.11, PyTorch
2.11 and, on a GPU, Triton 3.6, or newer ones.

```python
from kernels import get_kernel

ops = get_kernel("owner/{NAME}", version=1)
ops.attention(qkv)  # and ops.gather_patch_embed, add_layer_norm, linear_gelu, ...: ops.__all__
```
"""
