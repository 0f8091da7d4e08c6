"""The report: its numbers against plain arithmetic on the records, its pictures by what is drawn in them."""

import functools
import itertools
import re
import sys
from dataclasses import replace

import bench_records
import numpy as np
import pytest
from bench_records import Maker, row

from mar_fast.bench import pictures, readme_tables, records, report
from mar_fast.timing import Spread

pytest.importorskip("matplotlib")
pytest.importorskip("pandas")


@functools.cache
def measured():
    return tuple(bench_records.everything(Maker(0)))


def find(found=None, **wanted):
    """The one record with these fields."""
    hits = [one for one in found or measured() if all(getattr(one, key) == value for key, value in wanted.items())]
    assert len(hits) == 1, (wanted, len(hits))
    return hits[0]


def page(found=None):
    found = list(found or measured())
    return report.page(found, pictures.pictures(found))


def lines_of(text, *headings):
    """The lines of the tables below some headings, each {column: cell}."""
    for heading in headings:
        text = re.split(rf"^#+ {re.escape(heading)}$", text, flags=re.MULTILINE)[1]
    lines = []
    for table in re.findall(r"(?:^\|.*\n)+", re.split(r"^#", text, flags=re.MULTILINE)[0], re.MULTILINE):
        cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()]
        lines += [dict(zip(cells[0], line, strict=True)) for line in cells[2:]]
    return lines


def test_numbers_of_a_model_table():
    lines = lines_of(page(), "encoder", "inference")
    for x, provider in itertools.product((1.0, 0.5, 0.25), ("mar_fast", "PyTorch SDPA, max-autotune")):
        at = dict(suite="encoder", case="ViT-B, batch 8")
        (line,) = (one for one in lines if (one["case"], one["provider"], one["x"]) == (at["case"], provider, f"{x:g}"))
        time, base, dense = (
            find(**at, provider=who, metric="time", x=where)
            for who, where in ((provider, x), ("PyTorch SDPA", x), (provider, 1.0))
        )
        floor = find(provider="roofline", metric="floor", x=x, **at)
        assert line["time"] == time.words and line["rounds"] == "20" and line["dtype"] == "bf16"
        assert line["p20 - p80"] == " - ".join(records.in_words(value, "s") for value in (time.p20, time.p80))
        assert line["speed-up"] == f"{base.p50 / time.p50:.2f}x"
        assert line["over its dense"] == f"{dense.p50 / time.p50:.2f}x"
        assert line["of the floor"] == f"{100 * floor.p50 / time.p50:.0f}%"
        for metric in ("peak memory", "error", "throughput"):
            assert line[metric] == find(provider=provider, metric=metric, x=x, **at).words


def test_steps_of_the_waterfall():
    lines = lines_of(page(), "waterfall", "inference")
    at = dict(suite="waterfall", mode="inference", metric="time")
    times = [find(provider=step, **at).p50 for step in bench_records.STEPS]
    assert [line["provider"] for line in lines] == list(bench_records.STEPS)
    assert [line["of the step"] for line in lines] == ["", *(f"{a / b:.2f}x" for a, b in itertools.pairwise(times))]
    assert [line["speed-up"] for line in lines] == [f"{times[0] / time:.2f}x" for time in times]


def test_no_record_is_left_out():
    """Every median is on the page, of whatever suite; unknown suites and metrics too; and why there is none."""
    where = dict(suite="warp drive", case="a | b", x=7)
    found = [*measured(), row("tachyons", 1234.5, "1/s", **where), row("compile time", 12.3, "s", **where)]
    text = page(found)
    for record in found:
        assert record.metric == "unavailable" or record.words in text, record
    assert {"case": r"a \| b", "x": "7", "tachyons": "1,234 1/s"}.items() <= lines_of(text, "warp drive")[0].items()
    absent = [one for one in lines_of(text, "encoder", "inference") if one["provider"] == r"flash-attn \| fused"]
    assert len(absent) == 6 and all(one["unavailable"] == "yes" and one["note"] == "needs a GPU" for one in absent)
    assert any(one.get("note") == r"compute-bound \| so" for one in lines_of(text, "pipeline", "inference"))
    assert lines_of(text, "machine")[1]["rate"] == "740 GFLOP/s"
    (origin,) = lines_of(text, "Measurements")
    assert origin["device"] == bench_records.DEVICE and origin["commits"] == "0123456789ab"
    assert origin["dates"] == "2026-01-02" and origin["suites"].startswith("machine, encoder")


def test_two_devices_an_older_run_and_another_baseline(tmp_path):
    newest = bench_records.waterfall(Maker(3))
    other = [replace(one, device="NVIDIA H100") for one in bench_records.waterfall(Maker(1))]
    older = [replace(one, date="2025-01-01", p50=77.7) for one in newest]
    written = report.write([*older, *newest, *other], tmp_path, baseline="SDPA")
    text = written[0].read_text()
    lines = [lines_of(text, device, "waterfall", "inference") for device in (bench_records.DEVICE, "NVIDIA H100")]
    assert "77.7" not in text and [one[3]["speed-up"] for one in lines] == ["1.00x", "1.00x"]
    assert re.findall(r"!\[.*\]\((.*)\)", text) == [path.name for path in written[1:]] and len(written) == 3
    assert "epyc" in written[1].name and "h100" in written[2].name and all(path.is_file() for path in written)


def test_nothing_is_replaced_and_the_page_comes_last(tmp_path, monkeypatch):
    found = bench_records.waterfall(Maker())
    page_, picture = report.write(found, tmp_path)
    page_.write_text("mine")
    before = picture.read_bytes()
    with pytest.raises(FileExistsError, match=r"report.md: already exists, expected a new file \(or --force"):
        report.write(found, tmp_path)
    assert page_.read_text() == "mine" and picture.read_bytes() == before
    assert report.write(found, tmp_path, force=True)[0].read_text() != "mine"

    def fail(figure, path):
        raise OSError("disk full")

    monkeypatch.setattr(pictures, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        report.write(found, tmp_path / "new")
    assert not (tmp_path / "new" / "report.md").exists()


def test_without_pandas_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match=r"tables need pandas: pip install 'mar-fast\[report\]'"):
        report.write(bench_records.waterfall(Maker()), tmp_path)
    assert not list(tmp_path.iterdir())


@functools.cache
def figures():
    """The pictures of made-up records, as figures instead of files: {file name: figure}."""
    drawn = {}
    awkward = [  # a lone provider at a lone ratio
        replace(one, device="NVIDIA H100")
        for one in measured()
        if one.metric == "rate"
        or (one.suite == "encoder" and one.x == 0.5 and one.provider in ("mar_fast", "roofline"))
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "save", lambda figure, path: drawn.__setitem__(path, figure))
        for found in (measured(), awkward):
            for picture in pictures.pictures(list(found)):
                picture.draw(picture.name.replace(".png", "") + (", alone" if found is awkward else ""))
    return drawn


def texts(figure):
    """Every text that is seen, with its box in pixels; a legend is one box."""
    from matplotlib.legend import Legend
    from matplotlib.text import Text

    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    legends = figure.findobj(Legend)
    skipped = {id(text) for legend in legends for text in legend.findobj(Text)}
    for axes in figure.axes:  # ticks beyond the ends of an axis are there and not drawn
        for axis, place in ((axes.xaxis, 0), (axes.yaxis, 1)):
            low, high = sorted(axis.get_view_interval())
            for label in axis.get_ticklabels(which="both"):
                if not low <= label.get_position()[place] <= high:
                    skipped.add(id(label))
    seen = [(f"legend of {len(legend.get_texts())}", legend.get_window_extent(renderer)) for legend in legends]
    for text in figure.findobj(Text):
        if id(text) not in skipped and text.get_visible() and text.get_text().strip():
            seen.append((text.get_text(), text.get_window_extent(renderer)))
    return seen


def test_no_text_lies_on_another_or_leaves_the_picture():
    """With ten providers and long names, and with next to nothing to show."""
    assert len(figures()) == 15
    for name, figure in figures().items():
        seen = texts(figure)
        assert len(seen) > 5
        width, height = figure.canvas.get_width_height()
        for text, box in seen:
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width + 1 and box.y1 <= height + 1, (name, text, box)
        for (one, first), (two, second) in itertools.combinations(seen, 2):
            across = min(first.x1, second.x1) - max(first.x0, second.x0)
            down = min(first.y1, second.y1) - max(first.y0, second.y0)
            assert min(across, down) <= 1, (name, one, two)
        for axis in figure.axes:
            assert axis.get_xlabel() and (axis.get_ylabel() or axis.get_yticklabels()[0].get_text()), name


def test_bars_are_as_long_as_the_times():
    panels = figures()["kernels-attention-forward-bf16-peers"].axes
    assert len(panels) == 3
    for panel, tokens in zip(panels, (392, 784, 1568), strict=True):
        at = dict(suite="kernels", case=f"attention: 1 clips, {tokens} tokens, 12 heads of 64", mode="forward")
        names = [label.get_text() for label in panel.get_yticklabels()]
        times = [find(metric="time", provider=name, **at) for name in names]
        assert names == ["SDPA", "mar_fast", "SDPA flash", "flex_attention"]
        scale = {"ms": 1e3, "us": 1e6}[re.search(r", (\w+):", panel.get_xlabel())[1]]
        assert [bar.get_width() for bar in panel.patches] == pytest.approx([time.p50 * scale for time in times])
        assert [text.get_text() for text in panel.texts] == [
            f"{time.words} ({times[0].p50 / time.p50:.2f}x)" for time in times
        ]


def test_steps_are_drawn_one_below_the_other():
    (axis,) = figures()["waterfall-vit-b-batch-1-50-percent-masked-inference-bf16-step-by-step"].axes
    at = dict(suite="waterfall", mode="inference", metric="time")
    times = np.array([find(provider=step, **at).p50 for step in bench_records.STEPS])
    widths = np.array([bar.get_width() for bar in axis.patches]).reshape(3, -1)
    assert widths[0] == pytest.approx(times)
    assert widths[1] == pytest.approx([0, *np.maximum(-np.diff(times), 0)])
    assert widths[2] == pytest.approx([0, *np.maximum(np.diff(times), 0)])
    for number, text in enumerate(axis.texts):
        gains = f"{times[max(number - 1, 0)] / times[number]:.2f}x by the step, {times[0] / times[number]:.2f}x in all"
        assert f"{gains}, peak memory 300 MB, error 3e-07" in text.get_text()


def test_curves():
    axes = figures()["encoder-vit-b-batch-8-inference-bf16-time-and-memory-by-keep-ratio"].axes
    at = dict(suite="encoder", case="ViT-B, batch 8", provider="mar_fast")
    for axis, metric, factor in zip(axes, ("time", "peak memory"), (1.0, 1e-6), strict=True):
        lines = {container.get_label(): container.lines[0] for container in axis.containers}
        assert set(lines) == set(bench_records.PEERS)
        want = {x: find(metric=metric, x=x, **at).p50 * factor for x in (0.25, 0.5, 1.0)}
        assert dict(zip(*lines["mar_fast"].get_data(), strict=True)) == pytest.approx(want)


def test_roofline_points_and_ceilings():
    axis = figures()["encoder-encoder-inference-bf16-roofline"].axes[0]
    low, ridge, _ = axis.lines[0].get_xdata()
    assert ridge == pytest.approx(740e9 / 11e9)
    assert list(axis.lines[0].get_ydata()) == pytest.approx([11 * low, 740, 740])
    ours = next(line for line in axis.lines if line.get_label() == "mar_fast")
    points = set(zip(ours.get_xdata(), ours.get_ydata(), strict=True))
    assert len(points) == 6  # two batches, three keep ratios
    for batch, x in itertools.product((1, 8), (1.0, 0.5, 0.25)):
        at = dict(suite="encoder", case=f"ViT-B, batch {batch}", x=x)
        count, moved = (
            find(metric=metric, provider="roofline", **at).p50 for metric in ("multiply-adds", "bytes moved")
        )
        time = find(metric="time", provider="mar_fast", **at).p50
        assert any(point == pytest.approx((2 * count / moved, 2 * count / time / 1e9)) for point in points)
    without = [one for one in measured() if one.suite != "machine"]
    assert not any("roofline" in picture.name for picture in pictures.pictures(without))


def test_many_cases_go_on_pages_and_names_are_unique():
    found = bench_records.kernels(Maker(), tokens=range(10, 200, 10))
    names = [picture.name for picture in pictures.pictures(found) if "attention-forward" in picture.name]
    assert names == [f"kernels-attention-forward-bf16-peers-page-{page}.png" for page in (1, 2, 3)]
    clash = [replace(one, case=case) for one in bench_records.waterfall(Maker()) for case in ("a, b", "a b")]
    assert len({picture.name for picture in pictures.pictures(clash)}) == 2


def test_each_provider_has_a_look_of_its_own():
    names = [*(f"mar_fast, {kind}" for kind in "abc"), *(f"peer {number}" for number in range(20))]
    looks = pictures._looks(names)
    assert len({tuple(look.values()) for look in looks.values()}) == len(names)
    assert {name for name, look in looks.items() if look["color"] == pictures.OURS} == set(names[:3])


def test_tables_of_the_readme():
    found = [one for one in measured() if one.suite == "encoder"]
    lines = "\n".join(["# savings", *readme_tables.savings(report.frame(found)), ""])
    first = next(one for one in lines_of(lines, "savings") if one["provider"] == "mar_fast")
    at = dict(suite="encoder", case="ViT-B, batch 1", metric="time")
    dense, half = (find(provider="mar_fast", x=x, **at) for x in (1.0, 0.5))
    assert first["50 % masked"] == f"{half.words} ({find(provider='PyTorch SDPA', x=0.5, **at).p50 / half.p50:.2f}x)"
    assert first["dense"].startswith(dense.words) and first["dense / 50 %"] == f"{dense.p50 / half.p50:.2f}x"
    found = [one for one in measured() if one.suite == "kernels"]
    lines = lines_of("\n".join(["# kernels", *readme_tables.kernels(report.frame(found)), ""]), "kernels")
    assert [(one["case"].split(":")[0], one["pass"]) for one in lines] == list(
        itertools.product(bench_records.KERNELS, ("forward", "backward"))
    )
    own, peer = (
        find(found, case=lines[2]["case"], mode="forward", provider=who, metric="time")
        for who in ("mar_fast", "PyTorch, compiled")
    )
    assert own.x == 1568 and lines[2]["mar_fast"] == own.words and lines[2]["best peer"] == "PyTorch, compiled"
    assert (lines[2]["its time"], lines[2]["ratio"]) == (peer.words, f"{peer.p50 / own.p50:.2f}x")


def test_command_writes_a_report_from_files_and_folders(run, tmp_path):
    command = functools.partial(run, "bench", "--report")
    (tmp_path / "folder/deep").mkdir(parents=True)
    records.write(tmp_path / "folder/deep/waterfall.jsonl", bench_records.waterfall(Maker()))
    records.write(tmp_path / "others.jsonl", bench_records.others(Maker()))
    code, out, _ = command("folder", "others.jsonl", "--out", "page")
    assert code == 0 and "1 pictures" in out and "Written: page/report.md" in out
    text = (tmp_path / "page/report.md").read_text()
    assert "### waterfall" in text and "### scaling" in text
    (name,) = re.findall(r"\]\((.*\.png)\)", text)
    assert (tmp_path / "page" / name).read_bytes().startswith(b"\x89PNG")
    code, _, err = command("folder", "others.jsonl", "--out", "page")
    assert code == 2 and "already exists, expected a new file (or --force to replace it)" in err
    assert command("folder", "others.jsonl", "--out", "page", "--force")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jsonl"], "nowhere.jsonl: got no such file, expected a record file or a folder of files *.jsonl"),
        (["empty"], "empty: got a folder without such files, expected a record file or a folder of files *.jsonl"),
        (["none.jsonl"], "none.jsonl: got no records, expected measurements, one JSON line each"),
        (["text.jsonl"], "text.jsonl, line 1: got 'not json', expected a measurement"),
        (["list.jsonl"], "list.jsonl, line 1: got '[1]', expected a measurement"),
        (["later.jsonl"], """later.jsonl, line 19: got '{"suite": "kernels"}', expected a measurement"""),
        (["word.jsonl"], "word.jsonl, line 1, p50: got 'fast', expected a number"),
        (["order.jsonl"], "order.jsonl, line 1: got p20 3, p50 2, p80 1, expected them in ascending order"),
        (["good.jsonl", "--baseline", "nobody"], "baseline: got 'nobody', expected one of dense, eager, masked"),
        (["good.jsonl", "--out", "text.jsonl"], "text.jsonl is a file, expected a folder"),
        ([], "--report: got no records, expected files or folders of *.jsonl"),
        (["good.jsonl", "--compare", "good.jsonl", "good.jsonl"], "--compare: got it together with good.jsonl"),
    ],
)
def test_bad_input_is_one_clear_line(refused, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    found = bench_records.waterfall(Maker())
    records.write(tmp_path / "good.jsonl", found)
    records.write(tmp_path / "word.jsonl", [replace(found[0], p50="fast")])
    records.write(tmp_path / "order.jsonl", [replace(found[0], p20=3, p50=2, p80=1)])
    later = (tmp_path / "good.jsonl").read_text() + '{"suite": "kernels"}\n'
    for name, text in (("none", ""), ("text", "not json\n"), ("list", "[1]\n"), ("later", later)):
        (tmp_path / f"{name}.jsonl").write_text(text)
    assert message in refused("bench", "--report", *arguments)


@pytest.mark.parametrize(
    ("value", "unit", "metric", "words"),
    [
        (0.0123456, "s", "time", "12.3 ms"),
        (0.9996, "s", "time", "1,000 ms"),
        (12.0, "s", "time", "12.0 s"),
        (4.5e-10, "s", "time", "0.450 ns"),
        (0.0, "s", "time", "0 s"),
        (312e6, "B", "peak memory", "312 MB"),
        (1.1e10, "B/s", "rate", "11.0 GB/s"),
        (85.34e9, "1", "multiply-adds", "85.34 G"),
        (2.4e-3, "1", "error", "2e-03"),
        (1.234, "1", "exponent", "1.23"),
        (float("nan"), "1", "error", "nan"),
        (2.48, "clips/s", "throughput", "2.48 clips/s"),
        (12345.6, "1/s", "tachyons", "12,346 1/s"),
    ],
)
def test_in_words(value, unit, metric, words):
    assert records.in_words(value, unit, metric) == words


def test_records_come_back(tmp_path):
    path = tmp_path / "a.jsonl"
    made = [row("time", Spread(1.0, 2.0, 3.0, 7), "s"), row("unavailable", Spread(0, 0, 0, 0), note="no GPU")]
    records.write(path, made)
    assert records.read(path) == made == records.newest(made) and [one.note for one in made] == ["", "no GPU"]
    assert [one.ours for one in made] == [True, True] and not replace(made[0], provider="PyTorch").ours
    later = replace(made[0], date="2027-01-01", p50=2.5)
    assert records.newest([made[0], later, made[1]]) == records.newest([later, made[0], made[1]]) == [later, made[1]]
