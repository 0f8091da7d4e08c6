"""Files of the Hugging Face hub, by way of its own client and its cache."""

from pathlib import Path

from ..kernels import checks

_SAFETENSORS = ["model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]
_PICKLED = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"]


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
    configs = ["config.json", "preprocessor_config.json"]
    try:
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=configs + _SAFETENSORS))
        if not any((folder / name).exists() for name in _SAFETENSORS[:2]):
            folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=configs + _PICKLED))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        at = f" at {revision!r}" if revision else ""
        raise checks.bad("source", f"{hub_id!r}{at}, which the hub does not give ({reason})", "a hub id") from error
    return folder
