"""A run that is small enough to be killed many times: films, a list of them, a recipe with everything random in it."""

from clips import textured

VIDEOS, STEPS = 8, 8
RECIPE = """
reconstruction_weight = 0.1
checkpoint_minutes = 1e-9
keep = 2
[model]
name = "mar_vit_small"
num_frames = 4
image_size = [32, 32]
patch_size = [2, 8, 8]
embed_dim = 32
depth = 2
num_heads = 2
num_classes = 2
drop_path_rate = 0.2
head_dropout = 0.2
bridge_embed_dim = 32
bridge_num_heads = 2
decoder_embed_dim = 16
decoder_depth = 1
decoder_num_heads = 2
[mask]
kind = "cell_running"
ratio = 0.5
[data]
batch = 4
repeats = 2
stride = 2
[augment]
rand_augment = "rand-m7-n2-mstd0.5-inc1"
erase = 0.25
mixup = 0.8
cutmix = 1.0
smoothing = 0.1
[optimizer]
precision = "fp32"
ema = 0.9
layer_decay = 0.75
[schedule]
epochs = 4
warmup_epochs = 1.0
[test]
clips = 2
crops = 1
every = 2
"""


def write_films(folder):
    """Films of two classes and list.txt; its lines."""
    for number in range(VIDEOS):
        textured(folder / f"{number}.mp4", frames=12 + number, size=(40, 48 + 2 * number), codec="libx264")
    lines = [f"{number}.mp4 {number % 2}\n" for number in range(VIDEOS)]
    (folder / "list.txt").write_text("".join(lines))
    return lines
