"""Exported files: the model's values wherever they run, errors for what does not fit, nothing written that is wrong."""

import importlib.util
import re
import resource
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

pytest.importorskip("av")

import numpy as np
import torch
from checkpoint_cases import random_weights
from clips import real_clip
from helpers import relative, small_config
from torch import nn
from torch._functorch.aot_autograd import aot_export_module

import mar_fast
from mar_fast import MAR, data, export_model, load_exported, reference
from mar_fast.config import MARConfig
from mar_fast.export import write
from mar_fast.kernels import cpu_attention

pytestmark = [pytest.mark.compiles, pytest.mark.real_clip]
CONFIG = small_config()
VIDEOS = ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4")
FORMATS = {"pt2": "program.pt2", "onnx": "model.onnx", "aoti": "compiled.pt2"}
HAS_ONNX = all(map(importlib.util.find_spec, write.ONNX_PACKAGES))
ONNX = pytest.param("onnx", marks=pytest.mark.skipif(not HAS_ONNX, reason="needs onnxscript and onnxruntime"))
LABELS = [f"action {number}" for number in range(CONFIG.num_classes)]
BATCHES = (1, 2, 5)

# Runs where neither mar_fast nor, for ONNX, torch can be imported: results of every batch, and what does not fit.
ALONE = """
import sys, numpy
sys.modules["mar_fast"] = None
clips = numpy.load("clips.npy")

def runner(kind, path):
    if kind == "onnx":
        sys.modules["torch"] = None
        import onnxruntime
        session = onnxruntime.InferenceSession(path)
        return lambda clips: session.run(None, {"video": clips})[0]
    import torch
    from torch._inductor import aoti_load_package
    loaded = torch.export.load(path).module() if kind == "pt2" else aoti_load_package(path)
    return lambda clips: loaded(torch.from_numpy(clips)).detach().numpy()

for kind, path in zip(sys.argv[1::2], sys.argv[2::2]):
    run = runner(kind, path)
    numpy.savez(f"{kind}.npz", *(run(clips[:batch]) for batch in (1, 2, 5)))
    wrong = [clips[:, :, :2], clips[:, :, :, :32], clips[:, :1], clips[0], clips.astype("float32")]
    wrong = [numpy.ascontiguousarray(one) for one in wrong]
    for one in (wrong + [numpy.asfortranarray(clips)] if kind == "aoti" else wrong):  # the others take any strides
        try:
            run(one)
        except Exception:
            print("refused", kind)
"""


def real_clips(count=3):
    """(count, 3, 4, 64, 64) uint8, of three films in turn; as decoded, so channels-last in memory."""
    films = [data.read_clip(real_clip(name), 4, size=(64, 64)).permute(1, 2, 3, 0) for name in VIDEOS]
    return torch.stack([films[number % 3] for number in range(count)]).permute(0, 4, 1, 2, 3)


def model_of(**overrides):
    return random_weights(MAR(small_config(**{**dict(depth=1, bridge_depth=1, decoder_depth=1), **overrides})))


def small():
    """What AOTInductor compiles in seconds."""
    return model_of(classifier="linear", decoder_depth=0)


@torch.no_grad()
def expected(model, clips, what="logits"):
    """By the reference implementation in float64."""
    plain = reference.MAR(model.config).double().eval()
    plain.load_state_dict(model.state_dict())
    return getattr(plain(clips), what)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A file of each format, for any batch of uint8 clips."""
    folder = tmp_path_factory.mktemp("exported")
    written = {kind: name for kind, name in FORMATS.items() if kind != "onnx" or HAS_ONNX}
    for kind, name in written.items():
        assert export_model(small(), folder / name, real_clips(), format=kind, labels=LABELS) < 1e-5
    np.save(folder / "clips.npy", np.ascontiguousarray(real_clips(5).numpy()))
    assert sorted(path.name for path in folder.iterdir()) == sorted(["clips.npy", *written.values()])
    return folder


@pytest.mark.parametrize("kind", ["pt2", ONNX, "aoti"])
def test_loaded(kind, folder):
    model, exported = small(), load_exported(folder / FORMATS[kind])
    for batch in BATCHES:
        clips = real_clips(batch)
        assert not clips.is_contiguous()
        assert relative(exported(clips), expected(model, clips)) < 1e-5
    info = exported.info
    assert info.config == model.config and info.labels == tuple(LABELS) and info.versions["torch"] == torch.__version__
    told = (info.format, info.batch, info.input_dtype, info.output, info.dtype, info.device)
    assert told == (kind, None, "uint8", "logits", "float32", "cpu")
    for wrong, error in (
        (clips[:, :, :2], r"video: got shape \(5, 3, 2, 64, 64\), expected \(5, 3, 4, 64, 64\)"),
        (clips[0], r"video: got shape \(3, 4, 64, 64\)"),
        (clips[:0], "video: got no clip, expected at least one"),
        (clips.float(), "video: got torch.float32, expected uint8"),
        (clips.to("meta"), "video: got a tensor on meta, expected one on cpu"),
    ):
        with pytest.raises((ValueError, TypeError), match=error):
            exported(wrong)


@pytest.mark.parametrize("kinds", [["pt2", "aoti"], ONNX])
def test_without_the_package(kinds, folder):
    """ONNX without torch too. AOTInductor's own check of its inputs is off unless the environment asks for it."""
    kinds = [kinds] if kinds == "onnx" else kinds
    command = [sys.executable, "-P", "-c", ALONE, *(word for kind in kinds for word in (kind, FORMATS[kind]))]
    environment = {"AOTI_RUNTIME_CHECK_INPUTS": "1", "PATH": ""}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"refused {kind}" for kind in kinds for _ in range(5 + (kind == "aoti"))], (
        done.stderr
    )
    for kind in kinds:
        results = np.load(folder / f"{kind}.npz")
        for batch, name in zip(BATCHES, results.files, strict=True):
            assert relative(results[name], expected(small(), real_clips(batch))) < 1e-5


@pytest.mark.parametrize("kind", ["pt2", ONNX])
def test_fixed_batch_of_normalised_clips(kind, tmp_path):
    """Dense features, of a model that has neither classifier nor decoder."""
    model = model_of(classifier=None, decoder_depth=0, mask_ratio=0.0)
    model.load_report = types.SimpleNamespace(labels=LABELS)  # of a classifier that was left out
    clips, path = real_clips(2).float() / 127 - 1, tmp_path / FORMATS[kind]
    export_model(model, path, clips, format=kind, dynamic_batch=False)
    exported = load_exported(path)
    assert relative(exported(clips), expected(model, clips, "features")) < 1e-5
    assert (exported.info.batch, exported.info.output, exported.info.labels) == (2, "features", None)
    for wrong in (clips[:1], clips.byte()):
        with pytest.raises((ValueError, TypeError), match="video: got"):
            exported(wrong)


def graph_ops(program):
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def test_plain_ops_on_a_cpu(tmp_path, monkeypatch):
    """Attention in bfloat16 too, which is an op of this package on some CPUs."""
    monkeypatch.setattr(cpu_attention, "PREFERRED", True)
    model, clips, path = model_of().bfloat16(), real_clips(), tmp_path / "half.pt2"
    assert 0 < export_model(model, path, clips) < 5 * 2**-7
    assert not [op for op in graph_ops(torch.export.load(path)) if "mar_fast" in op]
    assert relative(load_exported(path)(clips), expected(model.float(), clips)) < 2e-2


class AsTuple(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs):
        return (self.module(*inputs),)


def test_our_kernels_for_a_gpu(monkeypatch):
    """As for an H100, without one: a pt2 file calls our ops, and what inductor compiles of it has launches instead."""
    triton = pytest.importorskip("triton")
    from test_inductor import StandIn

    from mar_fast.kernels.jit.launch import stubbed

    monkeypatch.setattr(triton.runtime.driver, "_active", StandIn())
    model, clips = write._TestForm(write._inference_copy(model_of())).bfloat16(), real_clips()
    sizes = ({0: torch.export.Dim("batch", min=1)},)
    with torch.no_grad(), stubbed():
        program = torch.export.export(model, (clips,), dynamic_shapes=sizes, strict=False)
        lowered, _ = aot_export_module(AsTuple(program.module(check_guards=False)), (clips,), trace_joint=False)
    ours = {op.split(".")[1] for op in graph_ops(program) if op.startswith("mar_fast.")}
    assert ours == {"gather_patch_embed", "attention", "add_layer_norm", "mlp"}
    assert "triton_kernel_wrapper_functional" in graph_ops(lowered)
    assert not [op for op in graph_ops(lowered) if "mar_fast" in op]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (dict(path="a.onnx"), "path: got a.onnx, expected a name that ends with .pt2, for format 'pt2'"),
        (dict(format="torchscript"), "format: got 'torchscript', expected 'pt2' or 'onnx' or 'aoti'"),
        (dict(labels=["one"]), "labels: got 1 names, expected 11, one for each class"),
        (dict(example=real_clips()[:0]), "example: got no clip, expected at least one"),
        (dict(example=real_clips().double()), "example: got torch.float64, expected uint8 or float32"),
        (dict(example=real_clips()[:, :, :2]), r"video: got shape \(3, 3, 2, 64, 64\)"),
        (dict(model=nn.Linear(2, 2)), "model: got Linear, expected a mar_fast.MAR"),
        (dict(model=model_of().train()), r"model: got a model in training mode, expected one in eval mode"),
        (dict(format="aoti"), r"format: got 'aoti' without a C\+\+ compiler, expected g\+\+ or clang\+\+ on the PATH"),
        (
            dict(format="onnx", path="a.onnx", model=model_of().half()),
            "model: got weights in float16, expected float32",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else "+".join(value),
)
def test_bad_arguments(options, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(write, "has_cpp_compiler", lambda: False)
    with pytest.raises((ValueError, TypeError), match=error):
        export_model(**dict(model=model_of(), path="a.pt2", example=real_clips()) | options)
    assert not list(tmp_path.iterdir())


def test_a_package_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"onnxscript is not installed; .* pip install 'mar-fast\[export\]'"):
        export_model(model_of(), tmp_path / "a.onnx", real_clips(), format="onnx")


def test_a_file_that_differs_is_not_written(tmp_path, monkeypatch):
    """The file that was there stays, and the model is left as it was."""
    path, original = tmp_path / "a.pt2", write._inference_copy
    path.write_bytes(b"old")

    def damaged(model):
        model = original(model)
        model.encoder.blocks[0].mlp.fc2.weight.mul_(1.01)
        return model

    model = model_of()
    with pytest.raises(FileExistsError, match="already exists"):
        export_model(model, path, real_clips())
    monkeypatch.setattr(write, "_inference_copy", damaged)
    with pytest.raises(ArithmeticError, match=r"a.pt2: not written, since results of the pt2 .* by \d.\de-03"):
        export_model(model, path, real_clips(), force=True)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
    assert model.decoder is not None and all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in model_of().state_dict().items())


@pytest.mark.skipif(not HAS_ONNX, reason="needs onnxscript and onnxruntime")
def test_weights_beyond_an_onnx_file(tmp_path, monkeypatch):
    """They are in a second file. Both are written or none, both are replaced, and they can be moved together."""
    monkeypatch.setattr(write, "ONNX_LIMIT", 10_000)
    path, weights, clips = tmp_path / "a.onnx", tmp_path / "a.onnx.data", real_clips()
    model = small()
    weights.write_bytes(b"other")
    with pytest.raises(FileExistsError, match=r"a.onnx.data: already exists, expected a new file \(or --force"):
        export_model(model, path, clips, format="onnx")
    assert not path.exists() and weights.read_bytes() == b"other"

    assert export_model(model, path, clips, format="onnx", force=True) < 1e-5
    total = sum(parameter.nbytes for parameter in (*model.encoder.parameters(), *model.classifier.parameters()))
    assert weights.stat().st_size > 0.9 * total and path.stat().st_size < 0.5 * total
    assert sorted(tmp_path.iterdir()) == [path, weights] and path.stat().st_mode == weights.stat().st_mode

    moved = tmp_path / "other" / "a.onnx"
    moved.parent.mkdir()
    for file in (path, weights):
        shutil.copy(file, moved.parent)
    assert relative(load_exported(moved)(clips), expected(model, clips)) < 1e-5
    (moved.parent / "a.onnx.data").unlink()
    with pytest.raises(ValueError, match=r"path: got .*a.onnx, which onnxruntime does not read .*a.onnx.data"):
        load_exported(moved)

    before, (soft, hard) = (path.read_bytes(), weights.read_bytes()), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, hard))
    try:
        with pytest.raises(OSError, match=r"File too large|requested and"):
            export_model(model_of(), path, clips, format="onnx", dynamic_batch=False, force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (path.read_bytes(), weights.read_bytes()) == before and len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("name", ["text.pt2", "weights.pt2", "none.pt2", "text.onnx", "foreign.onnx"])
def test_other_files_are_refused(name, tmp_path, folder):
    path = tmp_path / name
    if path.suffix == ".onnx":
        pytest.importorskip("onnxruntime")
    if name == "weights.pt2":
        torch.save(model_of().state_dict(), path)
    elif name == "foreign.onnx":
        onnx = pytest.importorskip("onnx")
        model = onnx.load(folder / FORMATS["onnx"])
        del model.metadata_props[:]
        onnx.save(model, path)
    elif name != "none.pt2":
        path.write_text("no model")
    with pytest.raises((ValueError, FileNotFoundError), match=f"path: got {path}"):
        load_exported(path)


def test_server(folder, monkeypatch):
    """The README's server, with a stand-in for FastAPI: the bytes of a film in, classes out."""
    text = (Path(write.__file__).parent / "README.md").read_text()
    server = "".join(re.findall(r"```py(?:thon)?\n(.*?)```", text.partition("## A server")[2], re.DOTALL))
    handlers, pooled = {}, []

    class HTTPException(Exception):
        pass

    class FastAPI:
        def post(self, path):
            return lambda handler: handlers.setdefault(path, handler)

    async def run_in_threadpool(function, *arguments):
        pooled.append(function)
        return function(*arguments)

    names = dict(FastAPI=FastAPI, HTTPException=HTTPException, Request=object)
    monkeypatch.setitem(sys.modules, "fastapi", types.SimpleNamespace(**names))
    monkeypatch.setitem(sys.modules, "fastapi.concurrency", types.SimpleNamespace(run_in_threadpool=run_in_threadpool))
    monkeypatch.chdir(folder)
    scope = {}
    exec(server.replace("mar.pt2", FORMATS["pt2"]), scope)

    def post(body):
        async def read():
            return body

        call = handlers["/classify"](types.SimpleNamespace(body=read))
        with pytest.raises(StopIteration) as done:
            call.send(None)
        return done.value.value

    film = real_clip("bikes.mp4")
    found = post(film.read_bytes())
    clips = data.read_views(film, 4, clips=5, crops=1, size=(64, 64))
    scores = expected(small(), clips).softmax(-1).mean(0)
    want = scores.topk(5)
    assert [one["class"] for one in found] == [LABELS[index] for index in want.indices]
    assert relative([one["probability"] for one in found], want.values) < 1e-5 and pooled == [scope["classify"]]
    with pytest.raises(HTTPException):
        post(b"no film")


def test_info_comes_back():
    info = mar_fast.ExportInfo(
        format="pt2", config=CONFIG, batch=2, input_dtype="uint8", output="logits", dtype="float32", device="cpu",
        labels=("a",), versions={"torch": "2"},
    )  # fmt: skip
    back = mar_fast.ExportInfo.from_json(info.to_json())
    assert back == info and isinstance(back.config, MARConfig) and isinstance(back.labels, tuple)
