"""mar-fast export: what it writes and prints, exit codes, bad input."""

import sys

import pytest

pytest.importorskip("typer")
pytest.importorskip("av")

import torch
from checkpoint_cases import small_model
from helpers import relative

from mar_fast import data, load_exported, save_checkpoint
from mar_fast.export import write

pytestmark = [pytest.mark.compiles, pytest.mark.real_clip]


@pytest.fixture
def mar(tmp_path):
    """A small MAR for 50 %, as a file."""
    return save_checkpoint(small_model(depth=1, bridge_depth=1, decoder_depth=1), tmp_path / "mar.safetensors")


def views(count):
    return data.read_views(data.sample_clip(), 6, clips=count, crops=1, size=(32, 64))


@torch.no_grad()
def test_file(run, mar, tmp_path):
    """The checkpoint's own mask for any batch of pixels, and the dense form for two normalised clips."""
    (tmp_path / "names.txt").write_text("\n".join(f"name {number}" for number in range(11)))
    code, out, _ = run("export", mar, "any.pt2", "--labels", "names.txt")
    assert code == 0 and "Written: any.pt2 (pt2), " in out
    assert "uint8 video (B, 3, 6, 32, 64) -> logits, mask ratio 0.5" in out and "on 3 clips of bikes.mp4" in out
    exported, clips = load_exported("any.pt2"), views(4)
    model = small_model(depth=1, bridge_depth=1, decoder_depth=1)
    assert relative(exported(clips), model(clips).logits) < 1e-5 and exported.info.labels[10] == "name 10"

    dense = ("--keep", 1, "--batch", 2, "--input", "float", "--set", "classifier=none", "--dtype", "bf16")
    code, out, _ = run("export", mar, "dense.pt2", *dense, "--clip", data.sample_clip())
    assert code == 0 and "float video (2, 3, 6, 32, 64) -> features, mask ratio 0" in out
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (model.config.mean, model.config.std))
    got = load_exported("dense.pt2")((views(2) / 255 - mean) / std)
    want = small_model(depth=1, bridge_depth=1, decoder_depth=1, mask_ratio=0.0)(views(2)).features
    assert got.shape == (2, 24, 96) and got.dtype == torch.bfloat16 and relative(got, want) < 2e-2


def test_both_files_are_told(run, mar, monkeypatch):
    """Where weights do not fit into one file; how they are written is tested with `export_model`."""

    def export_model(model, out, example, **options):
        for file in (out, write.weights_file(model, out, "onnx")):
            file.write_bytes(bytes(1_500_000))
        return 1e-7

    monkeypatch.setattr(write, "ONNX_LIMIT", 1000)
    monkeypatch.setattr(sys.modules["mar_fast.cli.export"], "export_model", export_model)
    code, out, _ = run("export", mar, "large.onnx", "--format", "onnx")
    assert code == 0 and "Written: large.onnx and large.onnx.data (onnx), 3" in out


def test_bad_input(run, mar, tmp_path, monkeypatch):
    (tmp_path / "there.pt2").write_bytes(b"old")
    for arguments, message in (
        (("there.pt2",), "there.pt2: already exists, expected a new file (or --force to replace it)"),
        (("a.pt2", "--format", "onnx"), "path: got a.pt2, expected a name that ends with .onnx, for format 'onnx'"),
        (("a.pt2", "--keep", 0.3), "--keep: got 0.3, a share of visible patches that is not allowed"),
        (("a.pt2", "--keep", 2), "--keep: got 2.0, expected a share above 0, up to 1"),
        (("a.pt2", "--clip", "none.mp4"), "none.mp4"),
        (("a.onnx", "--format", "onnx", "--dtype", "fp16"), "model: got weights in float16, expected float32"),
    ):
        code, _, err = run("export", mar, *arguments)
        assert code == 2 and message in err, (arguments, err)
    monkeypatch.setattr(write, "relative", lambda got, want: float("nan"))
    code, _, err = run("export", mar, "there.pt2", "--force")
    assert code == 1 and "not written, since results of the pt2 file differ" in err
    assert (tmp_path / "there.pt2").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2
