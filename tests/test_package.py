"""The package as users get it: installed elsewhere, without triton, one op at a time."""

import ast
import graphlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def python(code, *, cwd, **environment):
    """Run code in a fresh interpreter; returns its stdout."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the sources, so that nothing of an earlier build gets in."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = "git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t"
    (folder / "source").mkdir()
    subprocess.run(f"{copy} {folder / 'source'}", shell=True, cwd=ROOT, check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder), str(folder / "source")]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"mar_fast", next(top for top in tops if top.endswith(".dist-info"))}
    for needed in ("py.typed", "kernels/plan.py", "kernels/jit/bias_gelu.py", "bench/harness.py", "eval/savings.py"):
        assert f"mar_fast/{needed}" in names
    metadata = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("METADATA"))).decode()
    for extra in ("test", "plot", "report", "demo", "hf", "xformers", "flash-attn"):
        assert f"Provides-Extra: {extra}\n" in metadata
    assert "triton>=3.6; platform_system ==" in metadata


def test_installed_wheel_works_outside_the_repository(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = """
import torch, mar_fast
from mar_fast.kernels import device
from mar_fast.kernels.jit import bias_gelu
assert mar_fast.__file__.startswith(SITE) and device.__file__.startswith(SITE), (mar_fast.__file__, device.__file__)
assert bias_gelu.config("sm_90", torch.bfloat16, backward=False).block_m
model = mar_fast.create_model("mar_vit_small", depth=1, num_classes=5).eval()
print(model(torch.zeros(1, 3, 16, 224, 224)).logits.shape)
"""
    site = str(tmp_path / "site")
    assert python(f"SITE = {site!r}\n{code}", cwd=tmp_path, PYTHONPATH=site) == "torch.Size([1, 5])\n"


def test_everything_but_jit_without_triton(tmp_path):
    """macOS and Windows have no triton: all other modules import, a model trains, and asking for triton is clear."""
    code = """
import importlib, pkgutil, sys
sys.modules["triton"] = None
import torch, mar_fast
for module in pkgutil.walk_packages(mar_fast.__path__, "mar_fast."):
    if not module.name.startswith("mar_fast.kernels.jit."):
        importlib.import_module(module.name)
model = mar_fast.create_model("mar_vit_small", depth=1, decoder_depth=1, num_classes=5)
out = model(torch.zeros(1, 3, 16, 224, 224, dtype=torch.uint8))
mar_fast.mar_loss(out, torch.tensor([1])).backward()
try:
    with mar_fast.kernels.use_backend("triton"):
        pass
except RuntimeError as error:
    print(error)
"""
    assert "triton is not installed" in python(code, cwd=tmp_path)


def test_kernels_load_alone(tmp_path):
    """One op in someone else's code: no model, no video, no command line gets loaded with it."""
    code = """
import sys
from mar_fast.kernels import bias_gelu
import torch
bias_gelu(torch.zeros(2, 3), torch.zeros(3))
print(sorted(name for name in sys.modules if name.startswith("mar_fast.") and ".kernels" not in name))
"""
    assert python(code, cwd=tmp_path) == "[]\n"


def test_import_is_light(tmp_path):
    heavy = "('av', 'matplotlib', 'transformers', 'typer', 'rich', 'triton')"
    code = f"import sys, mar_fast; mar_fast.create_model; print([m for m in {heavy} if m in sys.modules])"
    loaded = python(code, cwd=tmp_path)
    assert loaded in ("[]\n", "['triton']\n")  # torch itself may load triton


def test_under_the_name_kernels_there_is_nothing():
    """From the repository's root the folder can be imported as if it were Hugging Face's package `kernels`."""
    code = """
import sys
import torch, mar_fast.kernels
before, torch.library.custom_op = set(sys.modules), None  # an op registered again would be an error
import kernels
print(kernels.__file__, [name for name in dir(kernels) if not name.startswith("_")], set(sys.modules) - before)
for statement in ("kernels.attention", "from kernels import attention", "import kernels.attention"):
    try:
        print(exec(statement))
    except (AttributeError, ImportError) as error:
        print(type(error).__name__, error)
"""
    found, attribute, *imports = python(code, cwd=ROOT).splitlines()
    assert found == f"{ROOT / 'kernels/__init__.py'} [] {{'kernels'}}"
    assert attribute == (
        "AttributeError kernels has no 'attention': this folder is mar_fast.kernels, import it by that name"
    )
    assert [line.split()[0] for line in imports] == ["ImportError", "ModuleNotFoundError"]


@pytest.mark.compiles
def test_transformers_from_the_repository_root():
    """It looks for the package `kernels` when a first model is loaded, which may be between two of our calls."""
    pytest.importorskip("transformers")
    code = """
import sys
import transformers
import torch, mar_fast
size = dict(image_size=32, num_frames=2, hidden_size=24, num_hidden_layers=1, num_attention_heads=2)
config = mar_fast.named_config(
    "mar_vit_small", num_frames=2, image_size=(32, 32), embed_dim=24, num_heads=2, depth=1,
    bridge_embed_dim=16, bridge_num_heads=2, bridge_depth=1, decoder_depth=0,
)
model, video = mar_fast.MAR(config).eval(), torch.randn(2, 3, 2, 32, 32)
def compiled():
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager")(video)
with torch.no_grad():
    want, before = model(video), compiled()
    theirs = transformers.VideoMAEModel(transformers.VideoMAEConfig(**size)).eval()
    # Imported, and no op registered anew: what compiled calls do then differs from run to run.
    assert [name for name in sys.modules if name.split(".")[0] == "kernels"] == ["kernels"]
    assert theirs(video.transpose(1, 2)).last_hidden_state.shape == (2, 4, 24)
    after = compiled()
for got in (before, after):
    torch.testing.assert_close(got.logits, want.logits)
"""
    python(code, cwd=ROOT, TRITON_INTERPRET="1")


def test_public_names_exist():
    import mar_fast

    assert all(getattr(mar_fast, name) is not None for name in mar_fast.__all__)
    assert set(mar_fast.__all__) <= set(dir(mar_fast))


def modules(folder):
    """{dotted name: file}."""
    files = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in (ROOT / folder).rglob("*.py")}
    return {name.removesuffix(".__init__"): file for name, file in files.items()}


def at_import(body):
    """The import statements that run when a module is imported: not those in functions, nor for type checkers."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from at_import(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for part in ("body", "orelse", "finalbody", "handlers"):
                yield from at_import(getattr(node, part, []) if not isinstance(node, ast.Expr) else [])


def needs(name, file, known):
    """Which modules of ``known`` a module imports."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in at_import(ast.parse(file.read_text()).body):
        if isinstance(node, ast.Import):
            found = [alias.name.replace("mar_fast.kernels", "kernels") for alias in node.names]
        else:
            above = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (above, node.module)))
            # A name is a module of the package, or something that its __init__ has.
            found = [f"{module}.{alias.name}" if f"{module}.{alias.name}" in known else module for alias in node.names]
        yield from (other for other in found if other in known and other != name)


@pytest.mark.parametrize("folder", ["kernels", "bench", "mar_fast"])
def test_no_circle_of_imports(folder):
    known = modules(folder)
    graph = {name: set(needs(name, file, known)) for name, file in known.items()}
    assert sum(map(len, graph.values())) > len(graph) / 2  # it does see them
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_a_circle_of_imports_is_found(tmp_path):
    file = tmp_path / "b.py"
    file.write_text(
        "try:\n    from .a import x\nexcept ImportError:\n    import os\n\ndef f():\n    from .c import y\n"
    )
    assert list(needs("p.b", file, {"p", "p.a", "p.b", "p.c"})) == ["p.a"]
    with pytest.raises(graphlib.CycleError, match="nodes are in a cycle"):
        graphlib.TopologicalSorter({"p.a": {"p.b"}, "p.b": {"p.a"}}).prepare()


def imports(folder):
    for file in sorted((ROOT / folder).rglob("*.py")):
        for line in file.read_text().splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]):
                yield file.relative_to(ROOT), words[1]


def test_imports_run_one_way():
    """cli -> bench -> mar_fast -> kernels -> torch, triton; the reference shares nothing with what it checks."""
    assert not [(f, m) for f, m in imports("kernels") if m.startswith("mar_fast") or m.startswith("...")]
    ours = [found for folder in ("kernels", "mar_fast", "bench") for found in imports(folder)]
    triton = [f for f, m in ours if m.split(".")[0] == "triton"]
    assert triton and all(f.parts[:2] == ("kernels", "jit") for f in triton)
    library = [(f, m) for f, m in imports("mar_fast") if "cli" not in f.parts]
    assert not [(f, m) for f, m in library if "bench" in m or ".cli" in m]
    assert {m for f, m in library if f.name == "reference.py" and m.startswith(".")} == {".config"}
    assert not [m for f, m in imports("tests") if f.name == "oracle.py" and m.startswith("mar_fast")]
