"""Models of transformers' three VideoMAE classes, and their files, for the tests of checkpoints and of the drop-in."""

import torch
from checkpoint_cases import FRAMES, SIZE, random_weights

CLASSES = {
    "VideoMAEModel": dict(use_mean_pooling=True),
    "VideoMAEModel, last norm": dict(use_mean_pooling=False),
    "VideoMAEForVideoClassification": dict(use_mean_pooling=True, num_labels=7),
    "VideoMAEForPreTraining": dict(use_mean_pooling=False, norm_pix_loss=False),
    "VideoMAEForPreTraining, no last norm": dict(use_mean_pooling=True),
}


def their_model(case, scores=1, dtype=torch.float32, **more):
    """With random weights: no bias is 0, no norm the identity, and large ``scores`` make attention far from uniform."""
    import transformers

    config = transformers.VideoMAEConfig(**{
        **dict(
            image_size=list(SIZE), num_frames=FRAMES, hidden_size=96, num_hidden_layers=2, num_attention_heads=3,
            intermediate_size=4 * 96, decoder_hidden_size=48, decoder_num_hidden_layers=2, layer_norm_eps=1e-4,
            decoder_num_attention_heads=3, decoder_intermediate_size=3 * 48, attn_implementation="eager",
        ),
        **CLASSES[case], **more,
    })  # fmt: skip
    return random_weights(getattr(transformers, case.split(",")[0])(config).to(dtype), scores=scores)


def saved(folder, theirs, biases="q_bias", **options):
    from safetensors.torch import load_file, save_file

    theirs.save_pretrained(folder, **options)
    for file in folder.glob("*.safetensors"):
        # Both namings, whichever this version of transformers writes.
        tensors = {}
        for name, tensor in load_file(file).items():
            for one, other in (("q_bias", "query.bias"), ("v_bias", "value.bias")):
                name = name.replace(other, one) if biases == "q_bias" else name.replace(one, other)
            tensors[name] = tensor
        save_file(tensors, file, metadata={"format": "pt"})
    return folder
