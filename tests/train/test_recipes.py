"""The recipes of the package against tables typed here, and every kind of bad input of a recipe."""

import math
import re
from dataclasses import replace

import pytest

from mar_fast.train import Recipe, list_recipes, read_recipe
from mar_fast.train.recipe import FOLDER, Augment, Mask, Optimizer, Schedule

COMMON = {
    "augment.scale": (0.08, 1.0), "augment.erase": 0.25, "augment.erase_aspect": 0.3, "augment.mixup": 0.8,
    "augment.cutmix": 1.0, "augment.mix": 1.0, "augment.switch": 0.5, "augment.smoothing": 0.1,
    "augment.crop": "random_resized", "augment.interpolation": "bicubic", "optimizer.betas": (0.9, 0.999),
    "optimizer.weight_decay": 0.05, "optimizer.clip_grad": 0.0, "optimizer.ema": 0.0, "optimizer.eps": 1e-8,
    "optimizer.precision": "fp16", "schedule.warmup_epochs": 5.0, "test.crops": 3, "seed": 0, "task": "finetune",
    "model.image_size": (224, 224), "model.num_frames": 16, "model.patch_size": (2, 16, 16),
}  # fmt: skip
MAR = COMMON | {
    "mask.kind": "cell_running", "mask.ratio": 0.5, "mask.temporal_shuffle": True, "mask.spatial_repeat": True,
    "mask.decoder": "dropped", "augment.rand_augment": "rand-m9-mstd0.5-inc1", "augment.aspect": (0.75, 1.333),
    "augment.erase_area": (0.02, 0.33), "optimizer.lr_batch": 0, "optimizer.layer_decay_of": "weights",
    "optimizer.head_scale": 1.0, "schedule.warmup_lr": 1e-6, "schedule.min_lr": 1e-6, "schedule.warmup_to": "cosine",
    "test.every": 10, "checkpoint_every": 10, "data.repeat": "resample", "model.classifier": "bridging",
    "model.bridge_embed_dim": 512, "model.bridge_depth": 2, "model.bridge_num_heads": 4, "model.bridge_dropout": 0.0,
    "model.mask_ratio": 0.5, "model.norm_pix_loss": True,
}  # fmt: skip
MAR_B = {"model.embed_dim": 768, "model.drop_path_rate": 0.1, "model.decoder_embed_dim": 384, "model.decoder_depth": 4,
         "model.decoder_num_heads": 6}  # fmt: skip
MAR_L = {"model.embed_dim": 1024, "model.drop_path_rate": 0.2, "model.decoder_embed_dim": 512,
         "model.decoder_depth": 12, "model.decoder_num_heads": 8}  # fmt: skip
MAR_K400 = {"reconstruction_weight": 0.01, "data.repeats": 2, "data.sampling": "stride", "data.stride": 4,
            "data.fps": 30.0, "augment.flip": 0.5, "test.clips": 7, "model.num_classes": 400}  # fmt: skip
MAR_SSV2 = {"reconstruction_weight": 0.1, "data.repeats": 1, "data.sampling": "uniform", "augment.flip": 0.0,
            "test.clips": 2, "model.num_classes": 174}  # fmt: skip
VIDEOMAE = COMMON | {
    "mask.kind": "none", "mask.ratio": 0.0, "augment.rand_augment": "rand-m7-n4-mstd0.5-inc1",
    "augment.aspect": (0.75, 1.3333), "augment.erase_area": (0.02, 1 / 3), "optimizer.lr_batch": 256,
    "optimizer.layer_decay_of": "all", "optimizer.head_scale": 0.001, "schedule.warmup_lr": 0.0,
    "schedule.warmup_to": "peak", "data.repeat": "reaugment", "data.repeats": 2, "reconstruction_weight": 0.0,
    "model.classifier": "linear", "model.final_norm": False, "model.decoder_depth": 0, "model.bridge_dropout": 0.0,
}  # fmt: skip
K400 = {"data.sampling": "stride", "data.stride": 4, "data.fps": 0.0, "augment.flip": 0.5, "test.clips": 5}
SSV2 = {"data.sampling": "uniform", "augment.flip": 0.0, "test.clips": 2, "model.num_classes": 174}
PRETRAIN = {
    "task": "pretrain", "mask.kind": "tube", "mask.ratio": 0.9, "data.sampling": "stride", "data.stride": 4,
    "augment.rand_augment": "", "augment.crop": "multi_scale", "augment.scale": (1.0, 0.875, 0.75, 0.66),
    "augment.flip": 0.0, "augment.erase": 0.0, "augment.mixup": 0.0, "augment.cutmix": 0.0, "augment.smoothing": 0.0,
    "optimizer.lr_batch": 256, "optimizer.betas": (0.9, 0.95), "optimizer.weight_decay": 0.05, "optimizer.eps": 1e-8,
    "optimizer.layer_decay": 1.0, "optimizer.clip_grad": 0.0, "schedule.min_lr": 1e-5, "schedule.warmup_lr": 0.0,
    "schedule.warmup_to": "peak", "model.classifier": None, "model.final_norm": True, "model.norm_pix_loss": True,
    "model.drop_path_rate": 0.0, "seed": 0,
}  # fmt: skip
# lr, layer decay, videos a step, epochs, drop path, dropout before the head, lowest lr
ROWS = {
    # What MAR's configurations call DROP_OUT of the bridge is in its code the dropout before the head.
    "mar_k400_base": (MAR | MAR_B | MAR_K400, 1e-3, 0.65, 8 * 8, 100, 0.1, 0.0, 1e-6),
    "mar_k400_large": (MAR | MAR_L | MAR_K400, 5e-4, 0.75, 4 * 8, 60, 0.2, 0.1, 1e-6),
    "mar_ssv2_base": (MAR | MAR_B | MAR_SSV2, 1e-3, 0.75, 16 * 8, 40, 0.1, 0.1, 1e-6),
    "mar_ssv2_large": (MAR | MAR_L | MAR_SSV2, 2.5e-4, 0.75, 2 * 8, 40, 0.2, 0.1, 1e-6),
    "videomae_k400_small": (VIDEOMAE | K400, 5e-4, 0.75, 12 * 32, 150, 0.1, 0.0, 1e-6),
    "videomae_k400_base": (VIDEOMAE | K400, 5e-4, 0.75, 6 * 64, 75, 0.1, 0.0, 1e-6),
    "videomae_k400_large": (VIDEOMAE | K400, 2e-3, 0.75, 2 * 64, 35, 0.1, 0.0, 1e-6),
    "videomae_k400_huge": (VIDEOMAE | K400, 1e-3, 0.75, 8 * 64, 50, 0.2, 0.5, 1e-5),
    "videomae_ssv2_small": (VIDEOMAE | SSV2, 1e-3, 0.7, 12 * 32, 40, 0.1, 0.0, 1e-6),
    "videomae_ssv2_base": (VIDEOMAE | SSV2, 5e-4, 0.75, 6 * 64, 30, 0.1, 0.0, 1e-6),
    "videomae_ucf101_base": (VIDEOMAE | K400, 5e-4, 0.7, 16 * 8, 100, 0.2, 0.5, 1e-5),
    "videomaev2_k400_base": (VIDEOMAE | K400, 7e-4, 0.75, 16 * 32, 90, 0.1, 0.0, 1e-6),
    "videomaev2_k400_large": (VIDEOMAE | K400, 2e-3, 0.75, 6 * 32, 35, 0.2, 0.0, 1e-6),
    "videomaev2_ssv2_base": (VIDEOMAE | SSV2, 2e-3, 0.65, 16 * 16, 25, 0.1, 0.0, 1e-6),
    "videomaev2_ssv2_large": (VIDEOMAE | SSV2, 5e-4, 0.75, 6 * 32, 20, 0.2, 0.0, 1e-6),
}
COLUMNS = ("optimizer.lr", "optimizer.layer_decay", "data.batch", "schedule.epochs", "model.drop_path_rate",
           "model.head_dropout", "schedule.min_lr")  # fmt: skip
# lr, videos a step, epochs, warm-up, samples; decoder's embed_dim, depth, heads
PRETRAINING = {
    "videomae_pretrain_base": (1.5e-4, 32 * 64, 1601, 40.0, 1, 384, 4, 6),
    "videomae_pretrain_large": (1.5e-4, 8 * 64, 1601, 40.0, 1, 512, 12, 8),
    "videomae_pretrain_huge": (1.5e-4, 16 * 64, 1601, 40.0, 1, 640, 12, 8),
    "videomaev2_pretrain_base": (1e-3, 32 * 32, 200, 20.0, 4, 384, 4, 6),
}
PRETRAINING_COLUMNS = ("optimizer.lr", "data.batch", "schedule.epochs", "schedule.warmup_epochs", "data.repeats",
                       "model.decoder_embed_dim", "model.decoder_depth", "model.decoder_num_heads")  # fmt: skip
DUAL = {"mask.decoder": "cell_running", "mask.decoder_ratio": 0.5, "data.repeat": "reaugment"}
EXPECTED = {name: shared | dict(zip(COLUMNS, row, strict=True)) for name, (shared, *row) in ROWS.items()}
EXPECTED |= {
    name: PRETRAIN | dict(zip(PRETRAINING_COLUMNS, row, strict=True)) | (DUAL if "v2" in name else {})
    for name, row in PRETRAINING.items()
}
CLASSES = {"k400": 400, "ssv2": 174, "ucf101": 101}
SIZES = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16), "huge": (1280, 32, 16)}


def value_of(recipe, name):
    section, _, key = name.rpartition(".")
    if section == "model":
        return getattr(recipe.config(), key)
    return getattr(getattr(recipe, section) if section else recipe, key)


def test_recipes_are_those_of_the_tables():
    assert sorted([*EXPECTED, "motions", "motions_pretrain"]) == list_recipes()  # the demo's are ours


@pytest.mark.parametrize("name", EXPECTED)
def test_values_of_the_papers(name):
    recipe = read_recipe(name)
    found = {key: value_of(recipe, key) for key in EXPECTED[name]}
    assert found == EXPECTED[name]
    _, data, size = name.split("_")
    config = recipe.config()
    assert (config.embed_dim, config.depth, config.num_heads) == SIZES[size]
    assert data == "pretrain" or config.num_classes == CLASSES[data]


@pytest.mark.parametrize(
    "file", sorted(set(FOLDER.glob("*.toml")) - set(FOLDER.glob("motions*"))), ids=lambda file: file.stem
)
def test_each_value_has_its_source(file):
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith(("#", "["))]
    assert lines
    for line in lines:
        assert re.fullmatch(r"\w+ = [^#]+  # .{3,}", line), line
        assert len(line) <= 120


BAD = {
    "epochs=3": "epochs: got an unknown key, expected 'schedule.epochs'",
    "num_classes=3": "num_classes: got an unknown key, expected 'model.num_classes'",
    "schedule.lr=3": "schedule.lr: got an unknown key, expected 'optimizer.lr'",
    "data.seed=3": "data.seed: got an unknown key, expected 'seed'",
    "model.gradient_checkpointing=true": "model.gradient_checkpointing: got an unknown key, expected 'gradient_check",
    "optimizer.lrr=3": "optimizer.lrr: got an unknown key, expected 'lr', the nearest known key",
    "model.num_class=3": "model.num_class: got an unknown key, expected 'num_classes', the nearest",
    "optimiser.lr=3": "optimiser: got an unknown key, expected 'optimizer', the nearest",
    "extends=3": "extends: got an unknown key",
    "a.b.c=3": "a: got an unknown key, expected",
    "optimizer.lr.x=3": "optimizer.lr: got {'x': 3}, expected a finite number",
    "=3": "--set: got '=3'",
    "#seed=3": "--set: got '#seed=3'",
    "seed": "--set: got 'seed'",
    "seed.x=3": "seed: got {'x': 3}, expected a whole number",
    "optimizer=3": "optimizer: got 3, expected a section",
    "model=mar": "model: got 'mar', expected a section",
    "seed=[1]": "seed: got [1], expected a whole number",
    "seed={}": "seed: got {}, expected a whole number",
    "seed=-1": "seed: got -1, expected 0 or more",
    "seed=1979-05-27": "seed: got datetime.date(1979, 5, 27), expected a whole number",
    "compile=1": "compile: got 1, expected true or false",
    "keep=0": "keep: got 0, expected a whole number, 1 or more",
    "checkpoint_every=0": "checkpoint_every: got 0",
    "task=train": "task: got 'train', expected one of 'finetune', 'pretrain'",
    "task=[]": "task: got [], expected one of",
    "reconstruction_weight=inf": "reconstruction_weight: got inf, expected a finite number",
    "optimizer.lr=nan": "optimizer.lr: got nan, expected a finite number",
    "optimizer.lr=true": "optimizer.lr: got True, expected a finite number",
    "optimizer.lr=fast": "optimizer.lr: got 'fast', expected a finite number",
    "optimizer.lr=0": "optimizer.lr: got 0.0, expected a number above 0",
    "optimizer.lr_batch=1.5": "optimizer.lr_batch: got 1.5, expected a whole number",
    "optimizer.lr_batch=-256": "optimizer.lr_batch: got -256, expected 0 or more",
    "optimizer.eps=-1": "optimizer.eps: got -1.0, expected a number above 0",
    "optimizer.betas=[]": "optimizer.betas: got [], expected a list of 2 numbers",
    "optimizer.betas=[0.9, 1.5]": "optimizer.betas: got (0.9, 1.5), expected two rates",
    "optimizer.betas=[0.9, nan]": "optimizer.betas: got nan, expected a finite number",
    "optimizer.betas=0.9": "optimizer.betas: got 0.9, expected a list of 2 numbers",
    "optimizer.layer_decay=0": "optimizer.layer_decay: got 0.0, expected a number above 0, up to 1",
    "optimizer.ema=1": "optimizer.ema: got 1.0, expected a number in [0, 1)",
    "optimizer.weight_decay=-1": "optimizer.weight_decay: got -1.0, expected 0 or more",
    "schedule.epochs=0": "schedule.epochs: got 0",
    "schedule.epochs=2.5": "schedule.epochs: got 2.5, expected a whole number",
    "schedule.warmup_epochs=1e9": "schedule.warmup_epochs: got 1000000000.0, expected 0 to 100",
    "schedule.min_lr=1": "schedule.min_lr: got 1.0, expected 0.001 (optimizer.lr) or less",
    "data.sampling=3": "data.sampling: got 3, expected one of 'stride', 'uniform'",
    "data.batch=0": "data.batch: got 0",
    "data.max_broken=2": "data.max_broken: got 2.0, expected a number from 0 to 1",
    "augment.flip=-0.5": "augment.flip: got -0.5, expected a number from 0 to 1",
    "augment.scale=[]": "augment.scale: got (), expected numbers above 0, up to 1",
    "augment.scale=[1, 0.1]": "augment.scale: got (1.0, 0.1), expected two areas",
    "augment.scale=[0.5, 0.7, 1]": "augment.scale: got (0.5, 0.7, 1.0), expected two areas",
    'augment.aspect=["a", 1]': "augment.aspect: got 'a', expected a finite number",
    "augment.aspect=[2, 1]": "augment.aspect: got (2.0, 1.0), expected two numbers above 0, the smaller first",
    "augment.erase_area=[0.1, 2]": "augment.erase_area: got (0.1, 2.0), expected shares of the picture",
    "augment.erase_aspect=0": "augment.erase_aspect: got 0.0",
    "augment.mixup=-1": "augment.mixup: got -1.0, expected 0 or more",
    "mask.kind=none": "mask.ratio: got 0.5, expected 0 with kind 'none'",
    "mask.ratio=0.3": "mask.ratio: got 0.3, expected a whole number of the 4 slots",
    "mask.ratio=1": "mask.ratio: got 1.0, expected a number in [0, 1)",
    "model.name=vit": "model.name: got 'vit', expected one of mar_vit_small",
    "model.name=5": "model.name: got 5, expected text",
    "model.embed_dim=big": "model.embed_dim: got 'big', expected a whole number",
    "model.embed_dim=-768": "model.embed_dim: got -768",
    "model.num_heads=7": "model.num_heads: got 7, expected a divisor",
    "model.image_size=224": "model.image_size: got 224, expected a list of 2 numbers",
    "model.image_size=[224, 1.5]": "model.image_size: got 1.5, expected a whole number",
    "model.patch_size=[2, 16]": "model.patch_size: got [2, 16], expected a list of 3 numbers",
    'model.mean=["a", "b", "c"]': "model.mean: got 'a', expected a finite number",
    "model.std=[inf, 1, 1]": "model.std: got inf, expected a finite number",
    "model.encoder_eps=nan": "model.encoder_eps: got nan, expected a finite number",
    "model.final_norm=3": "model.final_norm: got 3, expected true or false",
    "model.classifier=3": "model.classifier: got 3, expected one of 'bridging', 'linear'",
    "model.classifier=none": "model.classifier: got None, expected one, in fine-tuning",
    "model.decoder_depth=0": "reconstruction_weight: got 0.01, expected 0: this model has no decoder",
    "model.attention_dropout=0.1": "model.attention_dropout: got 0.1, expected 0",
    "task=pretrain": "model.classifier: got 'bridging', expected 'none' in pre-training",
}


@pytest.mark.parametrize("change", BAD)
def test_bad_values(change):
    with pytest.raises(ValueError, match="^" + re.escape(BAD[change])) as caught:
        read_recipe("mar_k400_base", [change])
    assert type(caught.value) is ValueError


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mar_k400_base", ["mask.kind=none", "mask.ratio=0"],
         "reconstruction_weight: got 0.01, expected 0: without a mask"),
        ("mar_k400_base", ["mask.decoder=cell_running", "mask.decoder_ratio=0.1"],
         "mask.decoder_ratio: got 0.1, expected a whole"),
        ("mar_k400_base", ["model.patch_size=[2, 32, 32]"],
         "model.cell: got (1, 2, 2), expected a cell whose sides divide the grid"),
        ("mar_k400_base", ["model.patch_size=[2, 32, 32]", "model.mask_ratio=0"],
         "cell: got (1, 2, 2), expected a cell whose sides"),
        ("mar_k400_base", ["mask.kind=none", "mask.ratio=0.0", "reconstruction_weight=0", "model.mask_ratio=0.5"],
         "model.mask_ratio: got 0.5, expected 0 with mask.kind = 'none'"),
        ("videomae_k400_base", ["mask.decoder=cell_running"],
         "mask.decoder: got 'cell_running', expected 'dropped': this model"),
        ("videomae_pretrain_base", ["augment.mixup=0.8"],
         "augment.mixup: got 0.8, expected 0 in pre-training, which has no labels"),
        ("videomae_pretrain_base", ["model.decoder_depth=0"],
         "model.decoder_depth: got 0, expected 1 or more: pre-training decodes"),
        ("videomae_pretrain_base", ["model.classifier=linear"],
         "model.classifier: got 'linear', expected 'none' in pre-training"),
    ],
)  # fmt: skip
def test_values_that_do_not_fit_together(name, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_recipe(name, changes)


def test_models_follow_the_mask_and_the_loss():
    none = ["mask.kind=none", "mask.ratio=0.0", "reconstruction_weight=0"]
    for changes, ratio, depth in (([], 0.5, 4), (["mask.ratio=0.75"], 0.75, 4), (none, 0.0, 0)):
        config = read_recipe("mar_k400_base", changes).config()
        assert (config.mask_ratio, config.decoder_depth) == (ratio, depth)
    assert read_recipe("mar_k400_base", ["mask.ratio=0.75", "model.mask_ratio=0.5"]).config().mask_ratio == 0.5


def test_changes():
    changes = ["optimizer.lr=3e-4", "seed = 7", "model.classifier=linear", "augment.rand_augment=", "data.fps=0"]
    changes += ["model.image_size=[192, 96]", "augment.crop = center", "compile=true", "optimizer.betas=[0, 0.5]"]
    recipe, before = read_recipe("mar_k400_base", changes), read_recipe("mar_k400_base")
    assert (recipe.optimizer.lr, recipe.seed, recipe.compile, recipe.data.fps) == (3e-4, 7, True, 0.0)
    assert (recipe.augment.rand_augment, recipe.augment.crop) == ("", "center")
    assert recipe.optimizer.betas == (0.0, 0.5)
    assert (recipe.config().classifier, recipe.config().image_size) == ("linear", (192, 96))
    assert recipe.schedule == before.schedule
    assert recipe != before == read_recipe("mar_k400_base")


@pytest.mark.parametrize(
    "wrong",
    [
        dict(optimizer=Optimizer(lr=math.inf)),
        dict(optimizer=Optimizer(betas=(0.9, 2.0))),
        dict(schedule=Schedule(epochs=1.5)),
        dict(schedule=Optimizer()),
        dict(augment=Augment(scale=())),
        dict(mask=Mask(kind="tubes", ratio=0.5)),
        dict(model={"embed_dim": "x"}),
        dict(model=[]),
        dict(seed=True),
    ],
)
def test_recipes_made_in_python_are_checked_too(wrong):
    name = next(iter(wrong))
    with pytest.raises(ValueError, match=rf"^{name}.*: got"):
        Recipe(**wrong)
    with pytest.raises(ValueError, match=rf"^{name}.*: got"):
        replace(Recipe(), **wrong)


def write(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.toml").write_text(text, encoding="latin-1")


def test_extends(tmp_path):
    write(
        tmp_path,
        mine='extends = "theirs"\nseed = 4\n[optimizer]\nlr = 1e-5\n',
        theirs='extends = "mar_ssv2_base"\nseed = 3\n[optimizer]\nlayer_decay = 0.9\n[data]\nbatch = 8\n',
    )
    found, base = read_recipe(tmp_path / "mine.toml"), read_recipe("mar_ssv2_base")
    optimizer = replace(base.optimizer, lr=1e-5, layer_decay=0.9)
    assert found == replace(base, seed=4, optimizer=optimizer, data=replace(base.data, batch=8))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('extends = "a"', "extends: got a -> a, expected no recipe that extends itself"),
        ('extends = "b"', "extends: got a -> b -> a, expected no recipe"),
        ("extends = 3", "extends: got 3, expected the name of a recipe"),
        ('extends = ""', "extends: got '', expected the name of a recipe"),
        ('extends = ["mar_k400_base"]', "extends: got ['mar_k400_base'], expected the name"),
        ('extends = "mar_k400_base"\noptimizer = 3', "optimizer: got 3, expected a section"),
        ('extends = "mar_k400_base"\n[seed]\nx = 3', "seed: got {'x': 3}, expected a whole number"),
        ("[optimizer]\n[optimizer.lr]\nx = 3", "optimizer.lr: got {'x': 3}, expected a finite number"),
        ("[optimiser]\nlr = 3", "optimiser: got an unknown key, expected 'optimizer', the nearest"),
        ("[[optimizer]]\nlr = 3", "optimizer: got [{'lr': 3}], expected a section"),
        ("seed = ", "which is not TOML"),
        ("seed = 1\nseed = 2", "which is not TOML"),
        ("\xff\xfe", "which is not TOML"),  # written as bytes that are no UTF-8
    ],
)
def test_bad_files(tmp_path, text, message):
    write(tmp_path, a=text, b='extends = "a"')
    with pytest.raises(ValueError, match=re.escape(message)):
        read_recipe(tmp_path / "a.toml")


@pytest.mark.parametrize("name", ["mar_k400_bse", "", "_mar", "no/such.toml", "folder.toml"])
def test_no_such_recipe(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(FileNotFoundError, match="recipe: got") as caught:
        read_recipe(name)
    assert ("did you mean mar_k400_base?" in str(caught.value)) == (name == "mar_k400_bse")
