"""A run that is killed at any moment goes on to the bits of one that never was.

MAR_FAST_KILLS sets how many kills there are (make kills: 20, one of them of one of two processes). Each run is the
command itself, on films made here: what is killed in a process of its own, and with a worker; the others here.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from train_cases import RECIPE, STEPS, write_films

import mar_fast
from mar_fast import cli
from mar_fast.train.log import add_row, read_log

KILLS = int(os.environ.get("MAR_FAST_KILLS", "3"))
# Writes half of the second checkpoint, then ends as by SIGKILL.
KILLED_WHILE_WRITING = """
import os, signal, sys, torch
save, calls = torch.save, []
def half(content, file, **options):
    calls.append(file)
    save(content, file, **options)
    if len(calls) == 2:
        os.truncate(file, os.path.getsize(file) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = half
from mar_fast.cli import main
main()
"""


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    write_films(folder)
    (folder / "small.toml").write_text(RECIPE)
    return folder


def arguments(films, out, *more):
    lists = ["--train", films / "list.txt", "--val", films / "list.txt"]
    return ["train", "--recipe", films / "small.toml", *lists, "--out", out, "--clips", 4, *more]


def here(*words, code=0):
    """The command in this process."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["mar-fast", *map(str, words), "--workers", "0"])
        cli.main()
        raise SystemExit(0)
    assert (stop.value.code or 0) == code


def started(*words):
    """Python with these words, in a group of processes of its own."""
    environment = os.environ | {"PYTHONPATH": str(Path(mar_fast.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-P", *map(str, words)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def command(*words, script="from mar_fast.cli import main; main()"):
    return started("-c", script, *words, "--workers", 1)


def processes(*words):
    """The command in two processes."""
    return started("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "mar_fast.cli", *words)


def finish(process, code=0):
    said, _ = process.communicate(timeout=240)
    assert process.returncode == code, said
    return said


def kill(process):
    """The process and, unlike SIGKILL alone in the field, at once; its workers are to end by themselves."""
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    process.stdout.close()


def state(out):
    newest = sorted((out / "checkpoints").glob("step-*.pt"))[-1]
    return newest.name, torch.load(newest, weights_only=True)


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def rows(out):
    timings = ("clips_per_second", "waiting")
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in timings} for line in lines]


def assert_same(out, want):
    assert rows(out) == rows(want)
    (name, got), (expected_name, expected) = state(out), state(want)
    assert name == expected_name == f"step-{STEPS:08d}.pt"
    assert equal(got, expected)
    for file in ("best.safetensors", "last.safetensors", "test.json"):
        assert (out / file).read_bytes() == (want / file).read_bytes(), file
    assert (out / "curves.png").is_file()
    assert not [path for path in out.rglob(".*") if path.is_file()], "something half-written is left"


@pytest.fixture(scope="module")
def never_killed(films, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "never"
    here(*arguments(films, out))
    assert len(list((out / "checkpoints").glob("*.pt"))) == 2
    assert [row["step"] for row in rows(out) if "loss" in row] == list(range(1, STEPS + 1))
    assert all(0 < row["waiting"] <= 1 for row in map(json.loads, (out / "log.jsonl").open()) if "loss" in row)
    return out


def newest(out):
    return max((int(file.stem[5:]) for file in (out / "checkpoints").glob("step-*.pt")), default=0)


def test_killed_at_random_moments(films, never_killed, tmp_path):
    out, draw, killed = tmp_path / "run", random.Random(1), 0
    while killed < KILLS - 1 - (KILLS > 3):
        process = command(*arguments(films, out, *(["--resume"] if newest(out) else [])))
        reached = newest(out)
        while newest(out) <= reached and process.poll() is None:
            time.sleep(0.005)  # a kill before the first new checkpoint would go in circles
        time.sleep(draw.uniform(0, 0.3))
        if process.poll() is not None:  # it came to its end: once more from the beginning
            finish(process)
            assert_same(out, never_killed)
            out = tmp_path / f"run-{killed}"
            continue
        kill(process)
        killed += 1
        logged = max((row["step"] for row in read_log(out / "log.jsonl") if "loss" in row), default=0)
        assert newest(out) >= logged - 1, "more is lost than what was done since the last checkpoint"
    here(*arguments(films, out, "--resume"))
    assert_same(out, never_killed)


def test_killed_while_a_checkpoint_is_written(films, never_killed, tmp_path):
    out = tmp_path / "run"
    finish(command(*arguments(films, out), script=KILLED_WHILE_WRITING), -signal.SIGKILL)
    assert newest(out) == 1
    here(*arguments(films, out, "--resume"))
    assert_same(out, never_killed)


@pytest.mark.parametrize("step", [3, 4])  # within an epoch, and the last one of an epoch with a validation
def test_interrupted_by_hand(films, never_killed, tmp_path, monkeypatch, capsys, step):
    """Ctrl-C ends the step and saves."""
    out = tmp_path / "run"

    def interrupt(log, row):
        add_row(log, row)
        if row["step"] == step and "loss" in row:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr("mar_fast.train.loop.add_row", interrupt)
        here(*arguments(films, out), code=130)
    assert "--resume goes on" in capsys.readouterr().err
    assert newest(out) == max(row["step"] for row in rows(out)) == step + 1
    here(*arguments(films, out, "--resume"))
    assert_same(out, never_killed)


@pytest.mark.parametrize("line", ["garbage", "[]", "3", '{"loss": 1.0}'])
def test_a_damaged_log_is_named(tmp_path, line):
    log = tmp_path / "log.jsonl"
    log.write_text(f'{{"step": 1, "loss": 2.0}}\n{line}\n{{"step": 2')
    with pytest.raises(ValueError, match=r"log\.jsonl, line 2: got .*, expected a row of a log"):
        read_log(log)


@pytest.mark.skipif(KILLS <= 3, reason="takes a minute: make kills runs it")
def test_one_of_two_processes_is_killed(films, tmp_path):
    never, out = tmp_path / "never", tmp_path / "run"
    shorter = ["--set", "schedule.epochs=2", "--clips", 2]
    finish(processes(*arguments(films, never, *shorter)))
    process = processes(*arguments(films, out, *shorter))
    while newest(out) < 1:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    ranks = {child.environ().get("RANK"): child for child in psutil.Process(process.pid).children()}
    ranks["1"].kill()
    assert process.wait(timeout=120) != 0
    process.stdout.close()
    assert 1 <= newest(out) <= 4
    said = finish(processes(*arguments(films, out, *shorter, "--resume")))
    assert "goes on after step" in said
    assert rows(out) == rows(never)
    assert equal(state(out)[1], state(never)[1])
    assert (out / "best.safetensors").read_bytes() == (never / "best.safetensors").read_bytes()
