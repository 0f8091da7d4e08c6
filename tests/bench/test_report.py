"""The report: its numbers against plain arithmetic on the rows, its pictures by what is drawn in them."""

import functools
import itertools
import re
from dataclasses import replace

import bench_records
import numpy as np
import pytest
from bench_records import Maker

from mar_fast.bench import records, report, report_bars, report_curves, report_plots, report_style, rows

pytest.importorskip("matplotlib")


@functools.cache
def measured():
    return tuple(bench_records.everything(Maker(0)))


def find(found=None, **wanted):
    """The one row with these fields."""
    hits = [row for row in found or measured() if all(getattr(row, key) == value for key, value in wanted.items())]
    assert len(hits) == 1, (wanted, len(hits))
    return hits[0]


def tables(text):
    """Every Markdown table below its heading: {heading: list of {column: cell}}."""
    found, heading = {}, ""
    for line in text.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("|"):
            cells = [re.sub(r"\\(.)", r"\1", cell.strip()) for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            found.setdefault(heading, []).append(cells)
    return {name: [dict(zip(lines[0], line, strict=True)) for line in lines[2:]] for name, lines in found.items()}


def page(found=None, baseline=None):
    found = list(found or measured())
    return report.page(found, report_plots.pictures(found, baseline), baseline)


def test_numbers_of_a_model_table():
    lines = tables(page())["ViT-B, batch 8, inference, bfloat16"]
    assert len(lines) == 10 + 9 + 9
    for x, provider in itertools.product((1.0, 0.5, 0.25), ("mar_fast", "PyTorch SDPA, max-autotune")):
        line = next(line for line in lines if line["provider"] == provider and float(line["keep ratio"]) == x)
        at = dict(suite="encoder", case="ViT-B, batch 8", x=x)
        time, base, dense = (
            find(**at | dict(provider=who, metric="time", x=where))
            for who, where in ((provider, x), ("PyTorch SDPA", x), (provider, 1.0))
        )
        floor = find(provider="roofline", metric="floor", **at)
        memory = find(provider=provider, metric="peak memory", **at)
        assert line["speed-up over PyTorch SDPA"] == f"{base.p50 / time.p50:.2f}x"
        assert line["over itself at keep ratio 1"] == f"{dense.p50 / time.p50:.2f}x"
        assert line["of the floor's speed"] == f"{100 * floor.p50 / time.p50:.0f}%"
        value, unit = line["time"].split()
        assert float(value) * {"s": 1, "ms": 1e-3}[unit] == pytest.approx(time.p50, rel=5e-3)
        low, high = re.fullmatch(r"([\d.]+)(?: ms)? - ([\d.]+) m?s", line["p20 - p80"]).groups()
        assert float(low) < float(value) * 1.01 and float(high) > 0.99 * float(low) and line["rounds"] == "20"
        assert float(line["peak memory"].split()[0]) == pytest.approx(memory.p50 / 1e6, rel=5e-3)
        assert line["error"] == f"{find(provider=provider, metric='error', **at).p50:.0e}"


def test_another_baseline():
    lines = tables(page(baseline="reference, autocast"))["ViT-B, batch 1, inference, bfloat16"]
    at = dict(suite="encoder", case="ViT-B, batch 1", x=0.25, metric="time")
    want = find(provider="reference, autocast", **at).p50 / find(provider="mar_fast, compiled", **at).p50
    line = next(line for line in lines if line["provider"] == "mar_fast, compiled" and line["keep ratio"] == "0.25")
    assert line["speed-up over reference, autocast"] == f"{want:.2f}x"


def test_steps_of_the_waterfall():
    lines = tables(page())["ViT-B, batch 1, 50 % masked, inference, bfloat16"]
    at = dict(suite="waterfall", mode="inference", metric="time")
    times = [find(provider=step, **at).p50 for step in bench_records.STEPS]
    assert [line["provider"] for line in lines] == list(bench_records.STEPS)
    assert [line["gain of the step"] for line in lines] == [
        "", *(f"{before / after:.2f}x" for before, after in itertools.pairwise(times))
    ]  # fmt: skip
    assert [line["gain in all"] for line in lines] == [f"{times[0] / time:.2f}x" for time in times]


def test_a_waterfall_through_two_dtypes_is_one():
    found = [replace(row, dtype="float32") if row.x < 4 else row for row in bench_records.waterfall(Maker())]
    lines = tables(page(found))["ViT-B, batch 1, 50 % masked, inference, float32 and bfloat16"]
    assert len(lines) == len(bench_records.STEPS) and len(report_plots.pictures(found)) == 1


def test_what_stands_below_the_tables():
    text = page()
    assert "- Absent: flash-attn \\| fused, keep ratio 1, 0.5, 0.25: needs a GPU" in text
    assert "- Withheld: slow but wrong, keep ratio 1: differs by 3e-1" in text
    assert "- Fitted exponent, mar_fast: 1.15" in text
    arithmetic = find(suite="encoder", case="ViT-B, batch 1", x=0.5, metric="multiply-adds")
    assert f"- By arithmetic, keep ratio 0.5: floor 229 ms, multiply-adds {arithmetic.p50 / 1e9:.2f} G" in text
    assert tables(text)["measured ceilings"][1] == {
        "what": "matrix product", "dtype": "bfloat16", "rate": "740 GFLOP/s"
    }  # fmt: skip
    assert tables(text)["ViT-B"][0]["multiply-adds"] == "180.34 G"
    assert any(line["note"] == "data-bound" for line in tables(text)["ViT-B, bikes.mp4, inference, bfloat16"])


def test_no_row_is_left_out():
    """Every measured median stands on the page, of whatever suite; unknown suites and metrics too."""
    make = Maker()
    found = [
        *measured(),
        make.row("warp drive", "a | b", "mar_fast", "tachyons", 1234.5, "1/s", x=7),
        make.row("warp drive", "a | b", "mar_fast", "compile time", 12.3, "s", x=7),
    ]
    text = page(found)
    for row in found:
        if row.metric not in rows.NO_TIME:
            assert rows.in_words(row.p50, row.unit, row.metric) in text, row
    (line,) = tables(text)["a \\| b, bfloat16"]
    assert line == {"x": "7", "provider": "mar_fast", "compile time": "12.3 s", "tachyons": "1,234 1/s"}


def test_two_devices_and_an_older_run(tmp_path):
    other = [replace(row, device="NVIDIA H100") for row in bench_records.waterfall(Maker(1))]
    older = [replace(row, date="2025-01-01", p50=77.7) for row in bench_records.waterfall(Maker(2))]
    written = report.write([*older, *bench_records.waterfall(Maker(3)), *other], tmp_path)
    text = written[0].read_text()
    assert f"\n## {bench_records.DEVICE}\n" in text and "\n## NVIDIA H100\n" in text
    assert "77.7" not in text and f"{len(older)} older rows of the same identity are left out." in text
    assert len(written) == 3 and all(path.is_file() for path in written)
    pictures = re.findall(r"!\[.*\]\((.*)\)", text)
    assert pictures == [path.name for path in written[1:]] and "h100" in pictures[1] and "epyc" in pictures[0]


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

    monkeypatch.setattr(report_bars, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        report.write(found, tmp_path / "new")
    assert not (tmp_path / "new" / "report.md").exists()
    with pytest.raises(ValueError, match="baseline: got 'nobody', expected one of dense, eager, masked"):
        report.write(found, tmp_path / "new", baseline="nobody")


@functools.cache
def figures(suites):
    """The pictures of made-up rows, as figures instead of files: {file name: figure}."""
    drawn = {}
    with pytest.MonkeyPatch.context() as patch:
        for module in (report_bars, report_curves):
            patch.setattr(module, "save", lambda figure, path: drawn.__setitem__(path, figure))
        for picture in report_plots.pictures(suites(Maker(0))):
            picture.draw(picture.name)
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
                if not axes.axison or not low <= label.get_position()[place] <= high:
                    skipped.add(id(label))
    seen = [(f"legend of {len(legend.get_texts())}", legend.get_window_extent(renderer)) for legend in legends]
    for text in figure.findobj(Text):
        if id(text) not in skipped and text.get_visible() and text.get_text().strip():
            seen.append((text.get_text(), text.get_window_extent(renderer)))
    return seen


@pytest.mark.parametrize(("found", "count"), [(bench_records.everything, 16), (bench_records.awkward, 7)])
def test_no_text_lies_on_another_or_leaves_the_picture(found, count):
    """With ten providers and long names, and with next to nothing to show."""
    drawn = figures(found)
    assert len(drawn) == count
    for name, figure in drawn.items():
        seen = texts(figure)
        assert len(seen) > 5
        width, height = figure.canvas.get_width_height()
        for text, box in seen:
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width + 1 and box.y1 <= height + 1, (name, text, box)
        for (one, first), (two, second) in itertools.combinations(seen, 2):
            over = (
                min(first.x1, second.x1) - max(first.x0, second.x0),
                min(first.y1, second.y1) - max(first.y0, second.y0),
            )
            assert min(over) <= 1, (name, one, two)
        for axis in figure.axes:
            if axis.axison:
                assert axis.get_xlabel() and (axis.get_ylabel() or axis.get_yticklabels()[0].get_text()), name


def test_bars_are_as_long_as_the_times():
    drawn = figures(bench_records.everything)
    panels = drawn["kernels-attention-forward-bfloat16-peers.png"].axes
    assert len(panels) == 3
    for panel, tokens in zip(panels, (392, 784, 1568), strict=True):
        at = dict(suite="kernels", case=f"attention: 1 clips, {tokens} tokens, 12 heads of 64", mode="forward")
        names = [label.get_text() for label in panel.get_yticklabels()]
        times = [find(metric="time", provider=name, **at).p50 for name in names]
        assert names == ["mar_fast", "SDPA", "SDPA flash", "flex_attention"]
        scale = {"ms": 1e3, "us": 1e6}[re.search(r", (\w+):", panel.get_xlabel())[1]]
        assert [bar.get_width() for bar in panel.patches] == pytest.approx([time * scale for time in times])
        want = [f"{rows.in_words(time, 's', 'time')} ({times[1] / time:.2f}x)" for time in times]
        assert [text.get_text() for text in panel.texts] == want


def test_steps_are_drawn_one_below_the_other():
    (axis, columns), = (figure.axes for figure in figures(bench_records.waterfall).values())  # fmt: skip
    found = bench_records.waterfall(Maker(0))
    times = np.array([find(found, provider=step, metric="time").p50 for step in bench_records.STEPS])
    widths = np.array([bar.get_width() for bar in axis.patches]).reshape(3, -1)
    assert widths[1] == pytest.approx(times)
    assert widths[0] == pytest.approx([0, *np.maximum(-np.diff(times), 0)])
    assert widths[2] == pytest.approx([0, *np.maximum(np.diff(times), 0)])
    said = [text.get_text() for text in columns.texts]
    for before, after in itertools.pairwise(times):
        assert f"{before / after:.2f}x" in said and f"{times[0] / after:.2f}x" in said
    assert {"time", "this step", "in all", "peak memory", "error", "300 MB", "3e-07"} <= set(said)


def test_curves_and_laws():
    drawn = figures(bench_records.everything)
    left, right = drawn["encoder-vit-b-batch-8-inference-bfloat16-keep-ratio.png"].axes
    at = dict(suite="encoder", case="ViT-B, batch 8", provider="mar_fast")
    for axis, metric, factor in ((left, "time", 1.0), (right, "peak memory", 1e-6)):
        lines = {container.get_label(): container.lines[0] for container in axis.containers}
        assert set(lines) == set(bench_records.PEERS)
        assert list(lines["mar_fast"].get_xdata()) == [0.25, 0.5, 1.0]
        want = [find(metric=metric, x=x, **at).p50 * factor for x in (0.25, 0.5, 1.0)]
        assert list(lines["mar_fast"].get_ydata()) == pytest.approx(want)
    tokens = drawn["scaling-inference-bfloat16.png"].axes[0]
    points, law = tokens.lines[:2]
    assert points.get_label() == "mar_fast: exponent 1.15" and tokens.get_xscale() == tokens.get_yscale() == "log"
    (x0, x1), (y0, y1) = law.get_xdata(), law.get_ydata()
    assert np.log(y1 / y0) / np.log(x1 / x0) == pytest.approx(1.15)
    assert np.mean(np.log(points.get_ydata()) - np.log(y0 * (points.get_xdata() / x0) ** 1.15)) == pytest.approx(0)


def test_roofline_points_and_ceilings():
    axis = figures(bench_records.everything)["encoder-inference-bfloat16-roofline.png"].axes[0]
    ceiling = axis.lines[0]
    low, ridge, _ = ceiling.get_xdata()
    assert ridge == pytest.approx(740e9 / 11e9)
    assert list(ceiling.get_ydata()) == pytest.approx([11 * low, 740, 740])
    ours = next(line for line in axis.lines if line.get_label() == "mar_fast")
    points = set(zip(ours.get_xdata(), ours.get_ydata(), strict=True))
    assert len(points) == 6  # two batches, three keep ratios
    for batch, x in itertools.product((1, 8), (1.0, 0.5, 0.25)):
        at = dict(suite="encoder", case=f"ViT-B, batch {batch}", x=x)
        count, moved, time = (
            find(metric=metric, provider=provider, **at).p50
            for metric, provider in (("multiply-adds", "roofline"), ("bytes moved", "roofline"), ("time", "mar_fast"))
        )
        want = (2 * count / moved, 2 * count / time / 1e9)
        assert any(point == pytest.approx(want) for point in points)
    without = [row for row in measured() if row.suite != "machine"]
    assert not any("roofline" in picture.name for picture in report_plots.pictures(without))


def test_many_cases_go_on_pages():
    make = Maker()
    found = [
        make.timed("kernels", f"attention: {number} clips", name, 0.01, mode="forward", x=5)
        for number in range(19)
        for name in ("mar_fast", "SDPA")
    ]
    names = [picture.name for picture in report_plots.pictures(found)]
    assert names == [f"kernels-attention-forward-bfloat16-peers-{page}.png" for page in (1, 2, 3)]
    clash = [
        replace(found[0], suite="encoder", case=case, x=x) for case, x in itertools.product(("a, b", "a b"), (0.5, 1.0))
    ]
    names = [picture.name for picture in report_plots.pictures(clash)]
    assert len(names) == len(set(names)) == 3


def test_each_provider_has_a_look_of_its_own():
    names = [*(f"mar_fast, {kind}" for kind in "abc"), *(f"peer {number}" for number in range(20))]
    looks = report_style.looks(names)
    assert len({(look.colour, look.marker, look.dash) for look in looks.values()}) == len(names)
    assert {look.colour for name, look in looks.items() if name.startswith("mar_fast")} == {report_style.OURS}
    assert report_style.OURS not in {look.colour for name, look in looks.items() if name.startswith("peer")}


@pytest.mark.parametrize(
    ("value", "unit", "metric", "words"),
    [
        (0.0123456, "s", "time", "12.3 ms"), (0.9996, "s", "time", "1,000 ms"), (12.0, "s", "time", "12.0 s"),
        (3.21e-6, "s", "time", "3.21 us"), (4.5e-10, "s", "time", "0.450 ns"), (0.0, "s", "time", "0 s"),
        (312e6, "B", "peak memory", "312 MB"), (0.0, "B", "peak memory", "0 B"),
        (740e9, "FLOP/s", "rate", "740 GFLOP/s"),
        (1.1e10, "B/s", "rate", "11.0 GB/s"), (85.34e9, "1", "multiply-adds", "85.34 G"),
        (2.4e-3, "1", "error", "2e-03"),
        (1.234, "1", "exponent", "1.23"), (float("nan"), "1", "error", "nan"),
        (2.48, "clips/s", "throughput", "2.48 clips/s"),
    ],
)  # fmt: skip
def test_in_words(value, unit, metric, words):
    assert rows.in_words(value, unit, metric) == words


@pytest.fixture
def command(run):
    """Run mar-fast report in an empty folder: (exit code, stdout, stderr)."""
    pytest.importorskip("typer")
    return functools.partial(run, "report")


def test_command_writes_a_report_from_files_and_folders(command, tmp_path):
    (tmp_path / "folder").mkdir()
    records.write(tmp_path / "folder" / "waterfall.jsonl", bench_records.waterfall(Maker()))
    records.write(tmp_path / "scaling.jsonl", bench_records.scaling(Maker()))
    assert command("--help")[0] == 0
    code, out, _ = command("folder", "scaling.jsonl", "--out", "page")
    assert code == 0 and "2 pictures" in out and "Written: page/report.md" in out
    text = (tmp_path / "page/report.md").read_text()
    assert "### waterfall" in text and "### scaling" in text
    for name in re.findall(r"\]\((.*\.png)\)", text):
        assert (tmp_path / "page" / name).read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "page").iterdir())) == 3
    code, _, err = command("folder", "scaling.jsonl", "--out", "page")
    assert code == 2 and "already exists, expected a new file (or --force to replace it)" in err
    assert command("folder", "scaling.jsonl", "--out", "page", "--force")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jsonl"], "nowhere.jsonl: got no such file, expected a record file or a folder of files *.jsonl"),
        (["empty"], "empty: got a folder without record files, expected files named *.jsonl"),
        (["none.jsonl"], "none.jsonl: got no rows, expected measurements, one JSON line each"),
        (["text.jsonl"], "text.jsonl, line 1: got 'not json', expected a measurement"),
        (["list.jsonl"], "list.jsonl, line 1: got '[1]', expected a measurement"),
        (["word.jsonl"], "word.jsonl, row 1, p50: got 'fast', expected a number"),
        (["order.jsonl"], "order.jsonl, row 1: got p20 3, p50 2, p80 1, expected them in ascending order"),
        (["good.jsonl", "--baseline", "nobody"], "baseline: got 'nobody', expected one of dense, eager, masked"),
        (["good.jsonl", "--out", "text.jsonl"], "text.jsonl is a file, expected a folder"),
        ([], "Missing argument 'RESULTS...'"),
    ],
)
def test_bad_input_is_one_clear_line(command, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    found = bench_records.waterfall(Maker())
    records.write(tmp_path / "good.jsonl", found)
    records.write(tmp_path / "word.jsonl", [replace(found[0], p50="fast")])
    records.write(tmp_path / "order.jsonl", [replace(found[0], p20=3, p50=2, p80=1)])
    for name, text in (("none", ""), ("text", "not json\n"), ("list", "[1]\n")):
        (tmp_path / f"{name}.jsonl").write_text(text)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = command(*arguments)
    assert code == 2 and out == "" and "Traceback" not in err
    assert message in " ".join(err.replace("│", " ").split())
    assert sorted(tmp_path.rglob("*")) == before


def test_a_record_may_carry_a_note(tmp_path):
    from mar_fast.timing import Spread

    environment = dict(device="d", torch="t", triton="r", commit="c", date="2026-01-01")
    what = dict(suite="s", case="c", provider="p", mode="", metric="absent", unit="1", dtype="", x=0)
    made = [
        records.Record.of(environment, Spread(0, 0, 0, 0), note="no GPU", **what),
        records.Record.of(environment, Spread(0, 0, 0, 0), **what),
    ]
    records.write(tmp_path / "a.jsonl", made)
    assert records.read(tmp_path / "a.jsonl") == made and [row.note for row in made] == ["no GPU", ""]
    path = tmp_path / "old.jsonl"  # written before there were notes
    path.write_text((tmp_path / "a.jsonl").read_text().replace(', "note": "no GPU"', "").replace(', "note": ""', ""))
    assert [row.note for row in rows.load([path])] == ["", ""]
