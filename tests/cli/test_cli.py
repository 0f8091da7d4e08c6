"""The command mar-fast, in process: what it prints, what it writes, its exit codes, and bad input."""

import gc
import io
import json
import re
import sys
from dataclasses import replace

import pytest

pytest.importorskip("matplotlib")

import matplotlib.image
import torch
from rich.console import Console

from mar_fast import cli, machine
from mar_fast.data import video
from mar_fast.eval import savings

pytestmark = pytest.mark.real_clip


QUICK = ("--model", "small", "--seconds", "0.1")


@pytest.fixture
def small(monkeypatch):
    """Models of one layer, 96 wide, on clips of the usual size."""
    monkeypatch.setattr(gc, "collect", lambda: 0)  # it looks at all of torch, for a second each time
    made = {
        case: replace(
            savings.model_config("small", case),
            embed_dim=96,
            num_heads=3,
            depth=1,
            bridge_embed_dim=32,
            bridge_num_heads=2,
            bridge_depth=1,
        )
        for case in savings.CASES
    }
    monkeypatch.setattr(savings, "model_config", lambda size, case: made[case])
    return made


def test_demo_table_and_files(run, small, known_rates, tmp_path):
    code, out, _ = run("demo", *QUICK, "--out", "results")
    assert code == 0
    for text in ("dense", "50 %", "75 %", "visible tokens", "1568", "784", "392", "multiply-adds", "p20 - p80"):
        assert text in out
    for text in ("clips per second", "peak memory", "speed-up over dense", "matmul rate", "difference", "Random"):
        assert text in out
    content = json.loads((tmp_path / "results/results.json").read_text())
    assert [row["case"] for row in content["rows"]] == ["dense", "50 %", "75 %"]
    for row in content["rows"]:
        assert row["correct"] and row["difference_fp32"] < 1e-5
        assert 0 < row["latency"]["p20"] <= row["latency"]["p50"] <= row["latency"]["p80"] and row["latency"]["n"] >= 5
        assert row["clips_per_second"] == pytest.approx(1 / row["latency"]["p50"])
        assert row["peak_memory"] is None or row["peak_memory"] > 1e6
        rate = content["matmul_rates"][content["dtype"]]
        assert row["rate_fraction"] == pytest.approx(2 * row["multiply_adds"] / row["latency"]["p50"] / rate)
    dense, _, quarter = content["rows"]
    assert dense["multiply_adds"] > 4 * quarter["multiply_adds"] and quarter["speedup"] > 1
    assert content["environment"]["torch"] == torch.__version__ and content["clip"] == "bikes.mp4"
    assert matplotlib.image.imread(tmp_path / "results/results.png").std() > 0.05
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["results.json", "results.png"]


@pytest.fixture
def known_rates(monkeypatch):
    """The machine's matrix-product rates, which take seconds to measure."""
    monkeypatch.setattr(machine, "matmul_rates", lambda device, dtypes: dict.fromkeys(dtypes, 1e11))


def test_demo_json_is_all_of_stdout(run, small, known_rates):
    code, out, _ = run("demo", *QUICK, "--json", "--dtype", "fp32", "--batch", "2")
    content = json.loads(out)
    assert code == 0 and content["dtype"] == "fp32" and content["batch"] == 2
    assert content["rows"][0]["multiply_adds"] == 2 * savings.cost.count(small["dense"]).multiply_adds


def test_wrong_model_withholds_speeds(run, small, known_rates, monkeypatch, tmp_path):
    """A fast model that is another function than the reference gets no speed, and the exit code says so."""
    module = sys.modules["mar_fast.kernels.attention"]
    right = module.eager_attention
    monkeypatch.setattr(module, "eager_attention", lambda qkv, scale: right(qkv, scale * 1.01))
    code, out, err = run("demo", *QUICK)
    assert code == 1 and "differs from the reference" in err
    assert "latency" not in out and "speed-up" not in out
    rows = json.loads((tmp_path / "mar-fast-results/results.json").read_text())["rows"]
    assert all(row["latency"] is None and row["speedup"] is None for row in rows)
    assert not (tmp_path / "mar-fast-results/results.png").exists()


def test_progress_shows_names_as_they_are(monkeypatch):
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    monkeypatch.setattr(cli.common, "errors", console)
    with cli.common.progress() as step:
        step("writing a[/b] [x].pt2", 0.5)
    assert "writing a[/b] [x].pt2" in console.file.getvalue() and " 50 %" in console.file.getvalue()


def test_cost_tables(run):
    code, out, _ = run("cost", "mar_vit_base")
    assert code == 0
    for number in ("85.34", "39.52", "86.27", "40.91", "93.02"):
        assert number in out
    code, out, _ = run("cost", "mar_vit_base", "--batch", 32, "--peak-tflops", 800, "--bandwidth", 3000, "--json")
    rows = json.loads(out)["rows"]
    assert [row["mask_ratio"] for row in rows] == [0.0, 0.5, 0.75]
    assert rows[1]["floor_seconds"] > 2 * 32 * 85.34e9 / 800e12
    code, out, _ = run("cost", "mar_vit_base", "--training", "--mask-ratio", 0.5)
    assert code == 0 and "decoder.head" in out and "training step" in out


def test_version_and_help(run):
    assert run("--version")[1].startswith("mar-fast 0.")
    for command in ("demo", "bench", "eval", "classify", "tradeoff", "visualize", "checkpoint", "cost"):
        assert run(command, "--help")[0] == 0
    for command in ("inspect", "convert", "verify"):
        code, out, _ = run("checkpoint", command, "--help")
        assert code == 0 and "--set" in out


def test_interrupt_has_its_exit_code(run, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(machine, "matmul_rates", interrupted)
    code, _, _ = run("demo", *QUICK)
    assert code == 130


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "nowhere.mp4"], "path: got 'nowhere.mp4', expected an existing video file"),
        (["demo", "text.mp4"], "path: got 'text.mp4' .* expected a file that FFmpeg can decode"),
        (["demo", "--model", "tiny"], "'tiny' is not one of 'small', 'base', 'large', 'huge', 'giant'"),
        (["demo", "--batch", "0"], "batch: got 0, expected a whole number, 1 or more"),
        (["demo", "--seconds", "0"], "seconds: got 0.0, expected a number above 0"),
        (["bench"], "suite: got none, expected one or more of flops, encoder, .*, or all"),
        (["bench", "speed"], "suite: got 'speed', expected one or more of flops, encoder"),
        (["bench", "encoder", "--batch", "0"], "batch: got 0, expected a whole number, 1 or more"),
        (["bench", "encoder", "--seconds", "0"], "seconds: got 0.0, expected a number above 0"),
        (["bench", "pipeline", "--clip", "nowhere.mp4"], "clip: got 'nowhere.mp4', expected an existing video file"),
        (["bench", "flops", "--out", "there.png"], "there.png: already exists, expected a new file"),
        (["bench", "flops", "--compare", "a", "b"], "--compare: got it together with flops, expected no suite"),
        (["bench", "--compare", "nowhere", "there.png"], "nowhere"),
        (["bench", "flops", "--fail-on-regression"], "--fail-on-regression: got it without --compare, expected both"),
        (["cost", "mar_vit_base", "--classes", "0"], "num_classes: got 0, expected a whole number, 1 or more"),
        (["demo", "--dtype", "int8"], "'int8' is not one of 'auto', 'fp32', 'bf16', 'fp16'"),
        (["demo", "--device", "cuda"], "device: got 'cuda', but torch finds no GPU here; expected 'cpu' or 'auto'"),
        (["demo", "--stride", "100"], "path: got a video of 250 frames, expected at least 1501: 16 frames at stride"),
        (["demo", "--out", "text.mp4"], "text.mp4 is a file, expected a folder"),
        (["demo", "--out", "."], r"results.json: already exists, expected a new file \(or --force"),
        (["cost", "vit_base"], "name: got 'vit_base', expected one of mar_vit_small"),
        (["cost"], "Missing argument 'model'"),
        (
            ["cost", "mar_vit_base", "--mask-ratio", "0.4"],
            "mask_ratio: got 0.4, expected a whole number of the 4 slots",
        ),
        (
            ["cost", "mar_vit_base", "--peak-tflops", "8"],
            "--peak-tflops and --bandwidth: got .* expected both or neither",
        ),
        (["cost", "mar_vit_base", "--peak-tflops", "0", "--bandwidth", "1"], "peak_flops: got 0.0, expected a number"),
        (["fly"], "No such command 'fly'"),
    ],
)
def test_bad_input_is_one_clear_line(refused, monkeypatch, tmp_path, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "text.mp4").write_text("not a video")
    for name in ("there.png", "results.json"):
        (tmp_path / name).write_text("mine")
    assert re.search(message, refused(*arguments))


def test_commands_that_moved(run):
    registered = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    for old, now in cli.MOVED.items():
        code, out, err = run(old, "--quick")
        assert code == 2 and out == "" and err == f"error: command: got '{old}', which is now: {now}\n"
        program, command, *_ = now.split()
        assert old not in registered and (program == "python" or command in registered | {"checkpoint"})
    old = {"savings", "masks", "reconstruct", "curve", "report", "inspect", "convert", "verify", "kernels", "tune"}
    assert set(cli.MOVED) == old


def test_missing_sample_clip(run, monkeypatch):
    monkeypatch.setattr(video, "SAMPLE", "absent.mp4")
    code, _, err = run("demo")
    assert code == 2 and "clip: got none, and the sample absent.mp4" in err and "mar-fast[demo]" in err


def test_missing_matplotlib(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    code, _, err = run("visualize")
    assert code == 2 and "mar-fast[plot]" in err
