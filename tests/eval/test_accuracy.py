"""classify against softmax by hand, and the evaluation of a list: shares, resuming, broken videos."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import plain, small_config

import mar_fast
from mar_fast.data.annotations import Sample, check_samples
from mar_fast.eval import accuracy, classify
from mar_fast.eval.accuracy import Accuracy, Journal


def model(**overrides):
    made = mar_fast.MAR(small_config(decoder_depth=0, **overrides)).eval()
    with torch.no_grad():
        made.classifier.head.weight.normal_()  # far from uniform scores
    return made


def video_views(count):
    return torch.randint(256, (count, 3, 4, 64, 64), dtype=torch.uint8)


@pytest.mark.parametrize(("count", "batch"), [(1, 8), (7, 3), (6, 3), (5, 100)])
def test_scores_are_summed_over_views(count, batch):
    """One view at a time, in float64, by the plain reference."""
    fast, views = model(), video_views(count)
    oracle, want = plain(fast), torch.zeros(11, dtype=torch.float64)
    for view in views:
        logits = oracle(view[None]).logits[0].tolist()
        powers = [math.exp(value - max(logits)) for value in logits]
        want += torch.tensor([power / sum(powers) for power in powers], dtype=torch.float64)
    scores = classify(fast, views, batch=batch)
    assert scores.dtype == torch.float32 and scores.device.type == "cpu" and not scores.requires_grad
    assert float((scores - want).abs().max()) < 1e-5 * count
    assert want.max() > 0.2 * count  # the views differ from chance, or the sum would prove little


def test_limit_of_a_batch():
    seen = []
    watched = model()
    watched.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    classify(watched, video_views(7), batch=3)
    assert seen == [3, 3, 1]


def test_low_precision_is_summed_in_float32():
    half, views = model().to(torch.bfloat16), video_views(9)
    with torch.no_grad():  # with gradients attention may round in another way
        want = sum(half(view[None]).logits.float().softmax(-1)[0] for view in views)
    assert torch.allclose(classify(half, views, batch=1), want, atol=1e-6)
    normalised = (views.float() / 255 - 0.45) / 0.225
    assert classify(half, normalised).sum() == pytest.approx(9, abs=1e-4)


@pytest.mark.parametrize(
    ("made", "views", "options", "message"),
    [
        (
            lambda: mar_fast.MAR(small_config(classifier=None)).eval(),
            (1, 3, 4, 64, 64),
            {},
            "model: got one without a classifier",
        ),
        (lambda: model().train(), (1, 3, 4, 64, 64), {}, "model: got one in training mode, expected model.eval"),
        (model, (3, 4, 64, 64), {}, "views: got shape .3, 4, 64, 64., expected shape .V, C, T, H, W."),
        (model, (1, 3, 8, 64, 64), {}, "video: got shape .1, 3, 8, 64, 64., expected .1, 3, 4, 64, 64."),
        (model, (0, 3, 4, 64, 64), {}, "views: got no view, expected at least one"),
        (model, (1, 3, 4, 64, 64), dict(batch=0), "batch: got 0, expected a whole number, 1 or more"),
    ],
)
def test_bad_arguments(made, views, options, message):
    with pytest.raises(ValueError, match=message):
        classify(made(), torch.zeros(views, dtype=torch.uint8), **options)


def test_scores_that_are_no_numbers():
    broken = model()
    with torch.no_grad():
        broken.classifier.head.bias[3] = float("nan")
    with pytest.raises(ValueError, match=r"model: got logits that are not finite in torch.float32"):
        classify(broken, video_views(1))


# Evaluation of a list. Every "video" is an empty file; what would be read from it is random, but the same each time.


@pytest.fixture
def listed(tmp_path):
    """Eight videos, labelled by what the model says: 3 as the first class, 2 as the third, 3 as the last."""
    judge, views = model(), {}
    samples = []
    for number in range(8):
        path = tmp_path / f"{number}.mp4"
        path.touch()
        views[path] = video_views(3)
        order = classify(judge, views[path]).argsort(descending=True).tolist()
        label = order[0] if number < 3 else order[2] if number < 5 else order[-1]
        samples.append(Sample(path.name, path, label, f"line {number + 1}"))
    return judge, samples, views


def run(listed, path, settings=None, broken=(), **options):
    judge, samples, views = listed
    reads = []

    def read(file):
        reads.append(file.name)
        if file.name in broken:
            raise ValueError(f"path: got {file.name}, expected a better one")
        return views[file]

    return accuracy.evaluate(judge, samples, read, Journal(path, settings or {"views": "3x1"}, **options)), reads


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_shares_and_rows(listed, tmp_path):
    outcome, _ = run(listed, tmp_path / "r.jsonl")
    assert outcome == Accuracy(videos=8, finished=8, broken=0, top1=3 / 8, top5=5 / 8)
    judge, samples, views = listed
    head, *lines = rows(tmp_path / "r.jsonl")
    assert head == {"settings": {"views": "3x1"}} and [line["video"] for line in lines] == [s.name for s in samples]
    for line, sample in zip(lines, samples, strict=True):
        scores = classify(judge, views[sample.path]) / 3
        assert line["label"] == sample.label and line["classes"] == scores.topk(5).indices.tolist()
        assert line["probabilities"] == pytest.approx(scores.topk(5).values.tolist())


def test_broken_videos_are_counted_and_tried_again(listed, tmp_path):
    outcome, _ = run(listed, tmp_path / "r.jsonl", broken=("1.mp4", "6.mp4"))
    assert outcome == Accuracy(videos=8, finished=8, broken=2, top1=2 / 6, top5=4 / 6)
    assert rows(tmp_path / "r.jsonl")[2]["error"] == "path: got 1.mp4, expected a better one"
    outcome, reads = run(listed, tmp_path / "r.jsonl", broken=("6.mp4",))
    assert sorted(reads) == ["1.mp4", "6.mp4"]
    assert outcome == Accuracy(videos=8, finished=8, broken=1, top1=3 / 7, top5=5 / 7)


def test_a_second_run_goes_on(listed, tmp_path):
    """Interrupted at a video, and in the middle of a line: the whole lines are kept, the rest is done."""
    path = tmp_path / "r.jsonl"
    whole, _ = run(listed, path)
    complete = path.read_text()
    lines = complete.splitlines(keepends=True)
    path.write_text("".join(lines[:4]) + lines[4][:20])
    again, reads = run(listed, path)
    assert again == whole and reads == [f"{number}.mp4" for number in range(3, 8)]
    assert [line["video"] for line in rows(path)[1:]] == [f"{number}.mp4" for number in range(8)]
    _, reads = run(listed, path)
    assert reads == [] and len(rows(path)) == 9
    _, reads = run(listed, path, force=True)
    assert len(reads) == 8 and len(rows(path)) == 9


def test_each_result_is_on_disk_at_once(listed, tmp_path):
    """The lines that another process would see while the third video is read."""
    judge, samples, views = listed
    journal = Journal(tmp_path / "r.jsonl", {})
    seen = []

    def on_video(so_far):
        seen.append((so_far.finished, len(rows(tmp_path / "r.jsonl")) - 1))
        if so_far.finished == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        accuracy.evaluate(judge, samples, views.__getitem__, journal, on_video=on_video)
    assert seen == [(0, 0), (1, 1), (2, 2), (3, 3)]


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ('{"a": 1}\n', FileExistsError, "r.jsonl: got a file without settings, expected results of mar-fast eval"),
        ("my notes", FileExistsError, "got a file without settings"),
        ("my notes\n", ValueError, "r.jsonl, line 1: got b'my notes', expected JSON"),
        ('{"settings": {}}\n[1]\n', ValueError, "line 2: got .*expected a JSON object"),
        ('{"settings": {}}\n{"video": "a"}\n', ValueError, "line 2: got .*expected the result of a video"),
    ],
)
def test_files_that_hold_something_else(tmp_path, content, error, message):
    (tmp_path / "r.jsonl").write_text(content)
    with pytest.raises(error, match=message):
        Journal(tmp_path / "r.jsonl", {})
    assert (tmp_path / "r.jsonl").read_text() == content


def test_fingerprints(listed):
    judge, samples, _ = listed
    same = mar_fast.MAR(judge.config)
    same.load_state_dict(judge.state_dict())
    assert accuracy.fingerprint(same) == accuracy.fingerprint(judge)
    other = mar_fast.MAR(replace(judge.config, mask_ratio=0.75))
    other.load_state_dict(judge.state_dict())
    assert accuracy.fingerprint(other) != accuracy.fingerprint(judge)
    with torch.no_grad():
        same.classifier.head.bias[0] += 1e-6
    assert accuracy.fingerprint(same) != accuracy.fingerprint(judge)
    assert accuracy.fingerprint(judge.to(torch.bfloat16)) != accuracy.fingerprint(same)
    moved = [replace(sample, path=Path("elsewhere") / sample.name) for sample in samples]
    assert accuracy.list_fingerprint(moved) == accuracy.list_fingerprint(samples)
    relabelled = [replace(samples[0], label=(samples[0].label + 1) % 11), *samples[1:]]
    assert accuracy.list_fingerprint(relabelled) != accuracy.list_fingerprint(samples)


def test_lists_that_do_not_fit(listed, tmp_path):
    judge, samples, _ = listed
    with pytest.raises(ValueError, match="line 1: got label 11, expected 0 to 10, as the model has"):
        check_samples([replace(samples[0], label=11)], 11)
    with pytest.raises(ValueError, match="line 1: got no label, expected 0 to 10, as the model has"):
        check_samples([replace(samples[0], label=-1)], 11)
    lost = [replace(sample, path=tmp_path / "gone" / sample.name) for sample in samples]
    with pytest.raises(ValueError, match=r"root: got a folder with none of the 8 videos, expected .*gone/0.mp4"):
        check_samples(lost, 11)
    with pytest.raises(ValueError, match="workers: got 0"):
        accuracy.evaluate(judge, samples, None, Journal(tmp_path / "r.jsonl", {}), workers=0)


@pytest.mark.parametrize("workers", [1, 3])
def test_order_and_errors_of_reading_ahead(listed, tmp_path, workers):
    """However many readers: results in the order of the list, and an unexpected error is not swallowed."""
    judge, samples, views = listed
    journal = Journal(tmp_path / "r.jsonl", {})
    accuracy.evaluate(judge, samples, views.__getitem__, journal, workers=workers)
    assert list(journal.rows) == [sample.name for sample in samples]

    def fail(path):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        accuracy.evaluate(judge, samples, fail, Journal(tmp_path / "other.jsonl", {}), workers=workers)
