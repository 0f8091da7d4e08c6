import gc
import importlib.util
import os
import sys

import poison
import pytest
import torch

# The first large float32 sqrt of a process is now and then wrong by 3e-4 with torch 2.13 on a CPU; a small one first
# prevents it.
torch.ones(8).sqrt()

# Small models gain nothing from a second thread, and lose much where another process keeps a core busy.
torch.set_num_threads(1)

# Launch choices are ours, not those of the user who runs the tests.
os.environ["MAR_FAST_CONFIGS"] = os.devnull

# The cache of compiled graphs does not notice that a custom op has got another argument.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

if importlib.util.find_spec("hypothesis"):
    from hypothesis import settings

    settings.register_profile("repo", deadline=None, max_examples=60)
    settings.load_profile("repo")

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = os.environ.get("MAR_FAST_TEST_DEVICE") == "cuda"
if ON_GPU:
    torch.set_default_device("cuda")
    # What plain PyTorch reaches in float32 bounds the error of the kernels; its convolutions are in TF32 by default.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "matrix" in item.keywords and "matrix" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="takes minutes: make matrix runs it"))
        if "interpreter" in item.keywords and not INTERPRETING:
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1: make test runs it separately"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if INTERPRETING and parameters.get("dtype") == torch.bfloat16:
            item.add_marker(pytest.mark.skip(reason="Triton's interpreter computes bfloat16 wrongly"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _quick_collections():
    """What is timed collects garbage before each measurement: half a second each among all that is imported by now."""
    gc.freeze()
    yield
    gc.collect()
    gc.unfreeze()


@pytest.fixture(autouse=True)
def poisoned(request):
    """On the Triton path every test runs on poisoned outputs, and fails if nothing went through a launcher."""
    on_path = "triton_too" in request.keywords and (INTERPRETING or ON_GPU)
    if not on_path and not (INTERPRETING and "interpreter" in request.keywords):
        yield None
        return
    with poison.launchers() as poisoning:
        yield poisoning
    assert poisoning.allocated != 0, "nothing went through a launcher"  # a test sets None where nothing should


@pytest.fixture
def few_tiles():
    """The small calls of plan_cases in tiles that fit them."""
    import plan_cases

    from mar_fast.kernels.jit.launch import forced

    with forced(plan_cases.CONFIGS):
        yield


@pytest.fixture
def bfloat16_too(monkeypatch):
    """The interpreter takes bfloat16: for tests that compare bits or allow for the rounding that it gets wrong."""
    monkeypatch.setattr("mar_fast.kernels.device.REFUSED", ())


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run mar-fast in an empty folder: (exit code, stdout, stderr)."""
    pytest.importorskip("typer")  # a machine that only tests kernels has none
    from mar_fast import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["mar-fast", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
            raise SystemExit(0)
        streams = capsys.readouterr()
        return stop.value.code or 0, streams.out, streams.err

    return call


@pytest.fixture
def refused(run, tmp_path):
    """Run mar-fast with bad input: exit code 2, nothing on stdout, no file changed; returns stderr as one line."""

    def files():
        return {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}

    def call(*arguments):
        before = files()
        code, out, err = run(*arguments)
        assert code == 2 and out == "" and "Traceback" not in err
        assert files() == before
        return " ".join(err.replace("│", " ").split())

    return call
