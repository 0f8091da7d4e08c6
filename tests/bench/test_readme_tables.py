"""The README's tables of results: what stands there is what the newest record files say."""

import itertools
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import bench_records
import pytest
from bench_records import Maker

from mar_fast.bench import readme_tables, records

ROOT = Path(__file__).parents[2]


def test_the_readme_is_not_stale():
    """With the results in this repository; run ``python -m mar_fast.bench.readme_tables`` if this is red."""
    assert readme_tables.update(ROOT, check=True) == 0


@pytest.fixture
def checkout(tmp_path):
    """A checkout with markers of every name and results of one run."""
    markers = "\n".join(f"## {name}\n<!-- results: {name} -->\n{readme_tables.END}" for name in readme_tables.TABLES)
    (tmp_path / "README.md").write_text(f"# Title\n\nbefore\n\n{markers}\nafter\n")
    keep(tmp_path, "cpu/all.jsonl", bench_records.everything(Maker(0)))
    return tmp_path


def keep(root, name, found):
    records.write(root / "bench" / "results" / name, found)


def block(root, name):
    text = (root / "README.md").read_text()
    return re.search(rf"<!-- results: {name} -->\n(.*?){readme_tables.END}", text, re.DOTALL)[1]


def cells(text):
    """The cells of the first table: {(first column filled downwards, second column): {column: cell}}."""
    lines = [line.split(" | ") for line in re.search(r"(\|.*\n)+", text)[0].replace("| ", "", 1).splitlines()]
    lines = [[cell.strip("| ") for cell in line] for line in lines]
    found, first = {}, ""
    for line in lines[2:]:
        first = line[0] or first
        found[first, line[1]] = dict(zip(lines[0], line, strict=True))
    return found


def test_tables_are_written_and_checked(checkout, capsys):
    assert readme_tables.update(checkout, check=True) == 1
    assert "README.md is stale" in capsys.readouterr().err
    assert (checkout / "README.md").read_text().count("|") == 0  # checking writes nothing
    assert readme_tables.update(checkout, check=False) == 0
    text = (checkout / "README.md").read_text()
    assert text.startswith("# Title\n\nbefore\n\n## encoder\n") and text.endswith(f"{readme_tables.END}\nafter\n")
    assert readme_tables.update(checkout, check=True) == 0 and capsys.readouterr().out == ""
    assert readme_tables.update(checkout, check=False) == 0 and (checkout / "README.md").read_text() == text
    digit = re.search(r"\| mar_fast \| (\d)", text)
    (checkout / "README.md").write_text(text[: digit.start(1)] + str((int(digit[1]) + 1) % 10) + text[digit.end(1) :])
    assert readme_tables.update(checkout, check=True) == 1
    out = capsys.readouterr().out
    assert out.count("\n-|") == out.count("\n+|") == 1 and "mar_fast" in out


def test_numbers_of_the_tables(checkout):
    readme_tables.update(checkout, check=False)
    found = bench_records.everything(Maker(0))
    time = {
        (row.suite, row.case, row.provider, row.mode, row.x): row.p50 for row in found if row.metric == "time"
    }  # fmt: skip
    table = cells(block(checkout, "encoder"))
    assert len(table) == 20
    for case, x, column in (("ViT-B, batch 1", 1.0, "100% kept"), ("ViT-B, batch 8", 0.25, "25% kept")):
        ours, base = (time["encoder", case, name, "inference", x] for name in ("mar_fast", "PyTorch SDPA"))
        got = re.fullmatch(r"([\d,.]+) \((\d\.\d\d)x\)", table[case, "mar_fast"][column])
        assert float(got[1].replace(",", "")) == pytest.approx(1e3 * ours, rel=5e-3) and got[2] == f"{base / ours:.2f}"
    assert table["ViT-B, batch 1", "Hugging Face VideoMAE, dense"]["50% kept"] == ""
    table = cells(block(checkout, "kernels"))
    case = "attention: 1 clips, 1568 tokens, 12 heads of 64"
    assert len(table) == 11 and {first for first, _ in table if first.startswith("attention")} == {case}
    ours, base = (time["kernels", case, name, "backward", 1568] for name in ("flex_attention", "SDPA"))
    assert table[case, "flex_attention"]["backward"].endswith(f"({base / ours:.2f}x)")
    steps = [time["waterfall", "ViT-B, batch 1, 50 % masked", step, "inference", number]
             for number, step in enumerate(bench_records.STEPS)]  # fmt: skip
    lines = [line.split(" | ") for line in block(checkout, "waterfall").splitlines() if line.startswith("|")]
    assert [line[2] for line in lines[3:10]] == [f"{a / b:.2f}x" for a, b in itertools.pairwise(steps)]
    assert [line[3] for line in lines[2:10]] == [f"{steps[0] / b:.2f}x" for b in steps]
    assert "| batch | mar_fast | 1 to 16 | " in block(checkout, "scaling") and " | 0.97 |" in block(checkout, "scaling")
    assert re.search(r"\| end to end \| .*compute-bound\) \| .*data-bound\) \|", block(checkout, "pipeline"))
    said = f"{bench_records.DEVICE}, torch 2.13.0, bfloat16, inference, commit 0123456789ab, 2026-01-02. Median ms"
    assert said in block(checkout, "encoder") and "training step, commit" in block(checkout, "training")


def test_the_newest_run_of_each_device_counts(checkout):
    readme_tables.update(checkout, check=False)
    before = {name: block(checkout, name) for name in readme_tables.TABLES}
    run = bench_records.pipeline(Maker(5))
    keep(checkout, "cpu/a-older.jsonl", [replace(row, date="2025-05-05") for row in run])
    assert readme_tables.update(checkout, check=True) == 0
    keep(checkout, "cpu/a-newer.jsonl", [replace(row, date="2026-05-05", commit="feedfeedfeed") for row in run])
    keep(checkout, "gpu/run.jsonl", [replace(row, device="NVIDIA H100", date="2024-01-01") for row in run])
    assert readme_tables.update(checkout, check=True) == 1
    readme_tables.update(checkout, check=False)
    after = {name: block(checkout, name) for name in readme_tables.TABLES}
    assert [name for name in after if after[name] != before[name]] == ["pipeline"]
    captions = [line for line in after["pipeline"].splitlines() if "torch" in line]
    assert len(captions) == 2 and "feedfeedfeed, 2026-05-05" in captions[0] and "H100" in captions[1]


def test_what_is_not_measured_says_so(checkout):
    shutil.rmtree(checkout / "bench")
    keep(checkout, "cpu/scaling.jsonl", bench_records.scaling(Maker(0)))
    readme_tables.update(checkout, check=False)
    assert block(checkout, "encoder") == "\nNot measured yet.\n\n" and "tokens" in block(checkout, "scaling")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\n<!-- results: speed -->\n<!-- end results -->", "line 2: got results 'speed', expected one of encoder, "),
        ("<!-- results: encoder -->\na\n", "line 1: got <!-- results: encoder --> without an end, expected '<!-- end"),
        (
            "<!-- results: encoder -->\n<!-- results: kernels -->\n<!-- end results -->",
            "line 1: got <!-- results: encoder --> without an end",
        ),
        ("a\n\n<!-- end results -->", "line 3: got '<!-- end results -->' without a beginning, expected <!-- results"),
        ("see <!-- results: encoder --> here", "line 1: got a marker within a line, expected it on a line of its own"),
    ],
)  # fmt: skip
def test_bad_markers_are_clear_errors(checkout, text, message):
    (checkout / "README.md").write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"README.md, {message}")):
        readme_tables.update(checkout, check=False)
    assert (checkout / "README.md").read_text() == text


def test_command(checkout, monkeypatch, capsys):
    monkeypatch.setattr(readme_tables, "checkout", lambda: checkout)
    assert readme_tables.main(["--check"]) == 1 and readme_tables.main([]) == 0 and readme_tables.main(["--check"]) == 0
    capsys.readouterr()
    (checkout / "bench/results/cpu/broken.jsonl").write_text("{}\n")
    assert readme_tables.main([]) == 2
    assert re.match(r"error: .*broken.jsonl, line 1: got '\{\}', expected a measurement", capsys.readouterr().err)


def test_installed_elsewhere_it_says_so(tmp_path):
    """As in a wheel: the package is there, a checkout is not."""
    shutil.copytree(ROOT / "mar_fast", tmp_path / "mar_fast")
    for folder in ("bench", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / "mar_fast" / folder)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from mar_fast.bench.readme_tables import main
sys.exit(main([]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(
        f"error: checkout: {tmp_path / 'mar_fast'} is none, expected the folder of the project"
    )
    assert readme_tables.checkout() == ROOT
