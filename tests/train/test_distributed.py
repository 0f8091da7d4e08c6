"""Two processes against one with the joined batch, and the draws of ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import relative
from train_processes import step

import mar_fast

HERE = Path(__file__).parent


def torchrun(*arguments, processes=2, **options):
    """Run in processes that find the tests' helpers, and what is tested."""
    paths = [str(Path(mar_fast.__file__).parents[1]), str(HERE), str(HERE.parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=240, **options
    )


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_are_one(how, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    step("MAR, clipped", False, one, micro_batches=1)
    run = torchrun(HERE / "train_processes.py", "MAR, clipped", how, two, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    want, got = (torch.load(folder / "result.pt") for folder in (one, two))
    assert set(got["gradients"]) == set(want["gradients"])
    for kind, bound in (("gradients", 1e-10), ("weights", 1e-10)):
        for name, value in want[kind].items():
            assert relative(got[kind][name], value) <= bound, (kind, name)
    assert torch.allclose(got["told"], want["told"], rtol=1e-6)
    model = mar_fast.from_pretrained(two / "model.safetensors")
    assert all(torch.equal(p, got["weights"][name].float()) for name, p in model.named_parameters())
    assert (two / "checkpoints" / "shares-00000001").is_dir() == (how == "fsdp")
