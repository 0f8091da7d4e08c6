"""Files of the Hugging Face hub, by way of its own client and its cache."""

from pathlib import Path

from ..kernels import checks

# What transformers calls its files.
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
CONFIGS = ("config.json", "preprocessor_config.json")


def fetch(hub_id: str, revision: str | None = None) -> Path:
    """The local folder of a model of the hub: its configuration, and its weights once, safetensors where there are.

    Raises:
        ModuleNotFoundError: huggingface_hub is not installed.
        ValueError: the hub does not give it; the message says why.
    """
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"source: got the hub id {hub_id!r}, for which huggingface_hub is needed: pip install 'mar-fast[hf]'"
        ) from error
    try:
        for weights in ((*SAFETENSORS, "model-*-of-*.safetensors"), (*PICKLED, "pytorch_model-*-of-*.bin")):
            folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=[*CONFIGS, *weights]))
            if any((folder / name).is_file() for name in weights):
                break
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        at = f" at {revision!r}" if revision else ""
        raise checks.bad("source", f"{hub_id!r}{at}, which the hub does not give ({reason})", "a hub id") from error
    return folder
