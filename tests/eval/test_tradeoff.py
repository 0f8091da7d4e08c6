"""mar-fast tradeoff: agreement against the plain reference by hand, what is timed, what is printed and written."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("av")

import torch
import torch.nn.functional as F
from checkpoint_cases import random_weights
from helpers import plain, small_config
from tradeoff_cases import PATHS, made

import mar_fast
from mar_fast import TokenMask, cost, masking, timing
from mar_fast.data.video import read_views
from mar_fast.eval import mask_settings, measured, tradeoff, tradeoff_plot
from mar_fast.eval.mask_settings import MaskSetting, choose

pytestmark = pytest.mark.real_clip

DENSE = MaskSetting("dense", 1.0)
FEW = [("running", 0.5), ("running", 0.25, 4), ("random", 0.5), ("tube", 0.5, 2), ("content", 0.25)]
FEW = [DENSE, *(MaskSetting(*one) for one in FEW)]


def read(path):
    return read_views(path, 4, clips=3, crops=1, stride=3, size=(64, 64))


def measure(model=None, settings=FEW, **options):
    model = made() if model is None else model
    options = {**dict(dtype="fp32", batch=2, seed=5, budget=0.01), **options}
    return tradeoff.measure(
        model, "weights", options.pop("videos", PATHS), options.pop("read", read), settings, **options
    )


def by_definition(config, keep, phase):
    """Cell running masking, from its definition."""
    drop = round(4 * (1 - keep))
    frames, rows, columns = config.grid
    return torch.tensor([
        ((y % 2 * 2 + x % 2) - t - phase) % 4 < drop
        for t in range(frames) for y in range(rows) for x in range(columns)
    ])  # fmt: skip


@pytest.fixture(scope="module")
def result():
    return measure()


@pytest.fixture(scope="module")
def truth():
    """Probabilities (views, classes) of each setting in float64, from the plain reference, one view at a time."""
    model = made()
    oracle, config, views = plain(model), model.config, [read(path) for path in PATHS]

    @torch.no_grad()
    def answer(view, masked):
        return oracle(view[None], TokenMask.from_bool_masked(masked[None])).logits[0].softmax(0)

    every = torch.cat(views)
    found = {
        "dense": [answer(view, torch.zeros(config.num_tokens, dtype=torch.bool)) for view in every],
        "running 50 %": [answer(view, by_definition(config, 0.5, 0)) for view in every],
        "running 25 %, 4 views": [
            sum(answer(view, by_definition(config, 0.25, phase)) for phase in range(4)) / 4 for view in every
        ],
        "random 50 %": [],
        "tube 50 %, 2 views": [],
        "content 25 %": [],
    }
    drawn, dealt = (torch.Generator().manual_seed(5) for _ in range(2))
    for part in (part for own in views for part in own.split(2)):
        random = masking.random(len(part), config.grid, 0.5, generator=drawn).bool_masked()
        # A tube's places in random order: even ones in one view, odd ones in the other.
        order = torch.rand(len(part), 16, generator=dealt).argsort(1) % 2 == 1
        tubes = order[:, None].expand(-1, config.grid[0], -1).flatten(1)
        content = masking.content(part, config.grid, budget=0.25).bool_masked()
        for number, view in enumerate(part):
            found["random 50 %"].append(answer(view, random[number]))
            found["tube 50 %, 2 views"].append((answer(view, tubes[number]) + answer(view, ~tubes[number])) / 2)
            found["content 25 %"].append(answer(view, content[number]))
    return {label: torch.stack(rows) for label, rows in found.items()}


def test_agreement_by_hand(result, truth):
    dense = truth["dense"]
    assert [point.setting for point in result.points] == list(truth) and result.views == 9
    for point in result.points:
        own = truth[point.setting]
        same = (own.argmax(1) == dense.argmax(1)).double().mean()
        assert point.top1_agreement == pytest.approx(float(same))
        want = F.kl_div(own.log(), dense, reduction="batchmean")
        assert point.kl == pytest.approx(float(want), rel=1e-3, abs=1e-6)
        videos = [(rows.mean(0).argmax(), base.mean(0).argmax()) for rows, base in zip(own.split(3), dense.split(3),
                                                                                      strict=True)]  # fmt: skip
        assert point.same_answers == pytest.approx(sum(left == right for left, right in videos) / 3)
    first, *masked = result.points
    assert (first.top1_agreement, first.kl, first.same_answers, first.speedup) == (1, 0, 1, 1)
    assert all(point.kl > 1e-3 for point in masked), "nothing to tell apart"
    assert any(point.top1_agreement < 1 for point in masked) and any(point.same_answers < 1 for point in masked)


def test_answers_by_hand(result, truth):
    for number, answer in enumerate(result.answers):
        mean = {label: rows[3 * number : 3 * number + 3].mean(0) for label, rows in truth.items()}
        assert answer.video == str(PATHS[number]) and answer.views == 3
        assert answer.dense.number == int(mean["dense"].argmax())
        assert answer.dense.probability == pytest.approx(float(mean["dense"].max()), abs=1e-5)
        other = {label: rows for label, rows in mean.items() if rows.argmax() != answer.dense.number}
        assert {label: best.number for label, best in answer.changed.items()} == {
            label: int(rows.argmax()) for label, rows in other.items()
        }
        for label, best in answer.changed.items():
            assert best.probability == pytest.approx(float(other[label].max()), abs=1e-5)


def test_work_is_that_of_all_passes(result):
    config = made().config
    adds = {point.setting: point.multiply_adds for point in result.points}
    tokens = {point.setting: point.visible_tokens for point in result.points}
    half, quarter = (cost.count(config, mask_ratio=ratio).multiply_adds for ratio in (0.5, 0.75))
    assert adds["dense"] == cost.count(config).multiply_adds and tokens["dense"] == 32
    assert adds["running 50 %"] == adds["random 50 %"] == half and adds["tube 50 %, 2 views"] == 2 * half
    assert adds["running 25 %, 4 views"] == 4 * quarter and tokens["running 25 %, 4 views"] == 8
    lengths = [
        int(length)
        for path in PATHS for part in read(path).split(2)
        for length in masking.content(part, config.grid, budget=0.25).cu_seqlens.diff()
    ]  # fmt: skip
    assert len(set(lengths)) > 1 and tokens["content 25 %"] == pytest.approx(sum(lengths) / 9)
    want = sum(cost.count(config, visible=length).multiply_adds for length in lengths) / 9
    assert adds["content 25 %"] == pytest.approx(want)


def test_calls_that_are_timed(monkeypatch):
    """Each setting's call runs all its passes on the first batch of views, with new draws of what is random."""
    model, seen, runs = made(), [], {}

    def catch(candidates, device, **options):
        runs.update(candidates)
        return {name: timing.Spread(0.5, 1.0 + number, 2.0 + number, 7) for number, name in enumerate(candidates)}

    monkeypatch.setattr(measured, "interleaved", catch)
    monkeypatch.setattr(measured.machine, "peak_memory", lambda run, device: 1234)
    found = measure(model)
    model.register_forward_hook(lambda module, inputs, output: seen.append(inputs))
    for point, (label, run) in zip(found.points, runs.items(), strict=True):
        seen.clear()
        run(), run()
        assert label == point.setting and len(seen) == 2 * point.passes
        assert all(torch.equal(inputs[0], read(PATHS[0])[:2]) for inputs in seen)
        masks = [inputs[1] for inputs in seen]
        first, again = masks[0], masks[point.passes]
        if point.kind in ("random", "tube"):
            assert not torch.equal(first.keep_idx, again.keep_idx)
        elif point.kind == "running":
            assert first is again and len({id(mask) for mask in masks}) == point.passes
    assert [point.latency.p50 for point in found.points] == [1, 2, 3, 4, 5, 6] and found.timed_views == 2
    assert [point.speedup for point in found.points] == pytest.approx([1 / n for n in range(1, 7)])
    assert [point.clips_per_second for point in found.points] == pytest.approx([2 / n for n in range(1, 7)])
    assert {point.peak_memory for point in found.points} == {1234}


def test_seed_and_dtype():
    """The same seed gives the same draws, another others; bfloat16 is measured in bfloat16."""
    settings = [DENSE, MaskSetting("running", 0.5), MaskSetting("random", 0.5)]
    first, again, other = ([p.kl for p in measure(settings=settings, seed=seed).points] for seed in (1, 1, 2))
    assert first == again and first[:2] == other[:2] and first[2] != other[2]
    model = made()
    low = measure(model, settings, dtype="bf16", seed=1)
    assert next(model.parameters()).dtype == torch.bfloat16 and low.dtype == "bf16" and low.correct
    assert all(point.difference > 1e-4 and point.difference_fp32 < 1e-5 for point in low.points)
    assert low.points[1].kl != first[1]


def test_no_agreement_without_finite_scores():
    def broken(path):
        views = read(path).float() / 255
        return views * float("nan") if "carphone" in path.name else views

    with pytest.raises(ValueError, match="model: got scores of dense that are not finite in fp32"):
        measure(read=broken)


def test_divergence():
    logs = torch.tensor([[0.5, 0.5], [0.9, 0.1], [1.0, 1e-300]], dtype=torch.float64).log()
    others = torch.tensor([[0.25, 0.75], [0.9, 0.1], [0.5, 0.5]], dtype=torch.float64).log()
    want = [0.5 * torch.tensor(4 / 3).log().item(), 0.0, torch.tensor(2.0).log().item()]
    assert tradeoff.divergence(logs, others).tolist() == pytest.approx(want)


@pytest.mark.parametrize("where", ["attention", "ragged"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_wrong_model_gets_no_speed(monkeypatch, where, dtype):
    """Attention is off by a factor, for all masks or for packed tokens alone: no speed and no agreement."""
    module = sys.modules["mar_fast.kernels.attention"]
    name = "eager_attention" if where == "attention" else "eager_attention_varlen"
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda qkv, *rest: 1.05 * right(qkv, *rest))
    monkeypatch.setattr(measured, "interleaved", lambda *rest, **options: pytest.fail("a wrong model was timed"))
    found = measure(dtype=dtype)
    assert not found.correct and not found.answers
    wrong = {point.setting for point in found.points if not point.correct}
    packed, every = {"content 25 %"}, {point.setting for point in found.points}
    assert wrong == (every - packed if where == "attention" else packed)
    assert all(point.latency is None and point.kl is None and point.top1_agreement is None for point in found.points)


def test_settings():
    config = made().config
    found, absent = choose(config, ["running", "random"], [0.5, 1.0, 0.75, 0.5], "once")
    labels = ["dense", "running 75 %", "running 50 %", "running 50 %, 2 views", "random 75 %", "random 50 %"]
    assert [setting.label for setting in found] == [*labels, "random 50 %, 2 views"] and not absent
    found, _ = choose(config, ["tube"], [0.75], "all")
    assert [setting.label for setting in found] == ["dense", "tube 75 %", "tube 75 %, 4 views"]
    found, _ = choose(config, ["tube", "content"], [0.5], "none")
    assert [setting.label for setting in found] == ["dense", "tube 50 %", "content 50 %"]
    found, absent = choose(config, ["running", "random", "frame"], [0.25, 0.3], "all")
    labels = ["random 30 %", "random 25 %", "random 25 %, 4 views", "frame 30 %", "frame 25 %"]
    assert [setting.label for setting in found] == ["dense", "running 25 %", "running 25 %, 4 views", *labels]
    assert set(absent) == {
        "running 30 %", "running 30 %, 10 views", "random 30 %, 10 views", "frame 30 %, 10 views",
        "frame 25 %, 4 views",
    }  # fmt: skip
    assert "4 slots of cell" in absent["running 30 %"] and "2 frames of tubelets" in absent["frame 25 %, 4 views"]
    _, absent = choose(config, ["random"], [0.7123], "all")
    assert "k/n of the tokens" in absent["random 71.23 %, complementary views"]


def test_usual_keep_ratios():
    """3/8 where the running cell has it."""
    config = made(num_frames=8).config
    assert mask_settings.usual_keep(config) == (0.75, 0.5, 0.25)
    assert mask_settings.usual_keep(replace(config, cell=(2, 2, 2))) == (0.75, 0.5, 0.375, 0.25)
    found, absent = choose(replace(config, cell=(2, 2, 2)), ["running"], [0.375], "all")
    assert [setting.label for setting in found] == ["dense", "running 37.5 %", "running 37.5 %, 8 views"] and not absent


@pytest.mark.parametrize(
    ("kinds", "keep", "said"),
    [
        (["spiral"], [0.5], "kind: got 'spiral', expected one of running"),
        (["running"], [1.5], "keep: got 1.5, expected a share above 0, up to 1"),
        (["running"], [0.0], "keep: got 0.0"),
        (["running"], [float("nan")], "keep: got nan"),
        (["running"], [0.4, 0.3], r"a share that one of the masks can keep \(running 40 %: ratio"),
        (["running"], [1.0], "expected a share that one of the masks can keep .1 is the dense model"),
    ],
)
def test_settings_errors(kinds, keep, said):
    with pytest.raises(ValueError, match=said):
        choose(made().config, kinds, keep, "once")


def test_measure_errors(tmp_path):
    with pytest.raises(ValueError, match="settings: got running 50 % first, expected dense"):
        measure(settings=[MaskSetting("running", 0.5), DENSE])
    with pytest.raises(ValueError, match=r"model: got mask_ratio 0.5, expected 0"):
        measure(random_weights(mar_fast.MAR(small_config(decoder_depth=0))))
    with pytest.raises(ValueError, match="batch: got 0"):
        measure(batch=0)
    with pytest.raises(ValueError, match="seconds: got 0"):
        measure(budget=0)
    with pytest.raises(ValueError, match=r"VIDEO: got none of 1 that can be read .*nowhere.mp4"):
        measure(videos=[tmp_path / "nowhere.mp4"])


def test_picture_shows_every_point(result, monkeypatch, tmp_path):
    """All points of both measures against both costs, where they belong; names in the legend."""
    kept = SimpleNamespace()
    monkeypatch.setattr(tradeoff_plot, "save", lambda figure, path: setattr(kept, "figure", figure))
    tradeoff_plot.draw(result, tmp_path / "x.png")
    largest = max(point.latency.p80 for point in result.points)
    factor = 1.0 if largest >= 1 else 1e3 if largest >= 1e-3 else 1e6
    costs = (lambda point: point.multiply_adds / 1e6, lambda point: point.latency.p50 * factor)
    values = (lambda point: 100 * point.top1_agreement, lambda point: point.kl)
    pairs = [(cost, value) for value in values for cost in costs]
    for axis, (across, up) in zip(kept.figure.axes, pairs, strict=True):
        drawn = [xy for line in axis.lines if line.get_marker() != "|" for xy in line.get_xydata().tolist()]
        for point in result.points:
            assert any(xy == pytest.approx([across(point), up(point)]) for xy in drawn), point
        lines = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
        for kind in ("running", "random", "tube", "content"):  # from the dense model through the single masks
            singles = [p for p in result.points if p.kind == kind and p.passes == 1]
            want = [[across(p), up(p)] for p in (result.points[0], *singles)]
            assert [pytest.approx(xy) for xy in want] == lines[kind]
        assert all(axis.get_xlim()[0] <= x <= axis.get_xlim()[1] for line in axis.lines for x in line.get_xdata())
        assert all(axis.get_ylim()[0] <= y <= axis.get_ylim()[1] for line in axis.lines for y in line.get_ydata())
    legend = [text.get_text() for text in kept.figure.legends[0].get_texts()]
    ensembles = {"running, complementary views", "tube, complementary views"}
    assert len(legend) == 7 and set(legend) == {"dense", "running", "random", "tube", "content"} | ensembles
    assert "9 views of 3 videos" in kept.figure.get_suptitle() and torch.__version__ in kept.figure.get_suptitle()
