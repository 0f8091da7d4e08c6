"""Two processes against one with the joined batch, and the draws of ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import relative
from test_step import ALONE
from train_processes import step

import mar_fast

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of a step in one process, and of the same in two by each way."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("one", "ddp", "fsdp"):
        (folder / name).mkdir()
    step(ALONE, "MAR, clipped", False, folder / "one", micro_batches=1)
    # In processes that find the tests' helpers, and what is tested.
    paths = [str(Path(mar_fast.__file__).parents[1]), str(HERE), str(HERE.parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(HERE / "train_processes.py"), "MAR, clipped", str(folder)]
    run = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    return folder


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_are_one(how, runs):
    want, got = (torch.load(runs / name / "result.pt") for name in ("one", how))
    assert set(got["gradients"]) == set(want["gradients"])
    for kind, bound in (("gradients", 1e-10), ("weights", 1e-10)):
        for name, value in want[kind].items():
            assert relative(got[kind][name], value) <= bound, (kind, name)
    assert torch.allclose(got["told"], want["told"], rtol=1e-6)
    model = mar_fast.from_pretrained(runs / how / "model.safetensors")
    assert all(torch.equal(p, got["weights"][name].float()) for name, p in model.named_parameters())
    assert (runs / how / "checkpoints" / "shares-00000001").is_dir() == (how == "fsdp")
