"""The ops of mar_fast: one function each, with gradients, on CPU and GPU.

This package stands alone: it needs torch, and triton for the GPU path, and knows nothing of the models built on it.
"""

if __name__ == "kernels":
    # Imported by transformers, which looks for Hugging Face's package of this name and finds this folder if the
    # repository's root is on sys.path. To load it twice would register every op twice, and any error would make
    # `import transformers` fail: so under this name the module is empty and has no submodules.
    def _nothing(name: str) -> object:
        raise AttributeError(f"kernels has no {name!r}: this folder is mar_fast.kernels, import it by that name")

    # With `def __getattr__` type checkers would accept any name in mar_fast.kernels.
    globals().update(__getattr__=_nothing, __path__=[])
else:
    from .add_layer_norm import add_layer_norm, add_layer_norm_rows
    from .attention import attention, attention_kvpacked, attention_varlen
    from .bias_gelu import bias_gelu, bias_gelu_rows
    from .checks import debug_checks
    from .device import use_backend
    from .gather_patch_embed import gather_patch_embed
    from .linear_gelu import linear_gelu
    from .masked_patch_loss import masked_patch_loss
    from .mlp import mlp
    from .quantize_rows import QuantizedRows, quantize_rows
    from .scaled_linear import scaled_linear
    from .scatter_tokens import scatter_tokens

    __all__ = [
        "QuantizedRows",
        "add_layer_norm",
        "add_layer_norm_rows",
        "attention",
        "attention_kvpacked",
        "attention_varlen",
        "bias_gelu",
        "bias_gelu_rows",
        "debug_checks",
        "gather_patch_embed",
        "linear_gelu",
        "masked_patch_loss",
        "mlp",
        "quantize_rows",
        "scaled_linear",
        "scatter_tokens",
        "use_backend",
    ]
