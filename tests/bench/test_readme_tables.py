"""The tables of bench/README.md: they are what the record files say."""

import re
from pathlib import Path

import bench_records
import pytest
from bench_records import Maker

from mar_fast.bench import readme_tables, records, report

ROOM = Path(__file__).parents[2] / "bench"
pytest.importorskip("pandas")


def test_the_readme_is_not_stale():
    """With the results in this repository; run ``python -m mar_fast.bench.readme_tables`` if this is red."""
    assert readme_tables.main(["--check"], ROOM) == 0


@pytest.fixture
def room(tmp_path):
    blocks = (
        "<!-- savings: cpu/encoder.jsonl -->\n<!-- end -->\nbetween\n<!-- kernels: k.jsonl -->\nold\n<!-- end -->\n"
    )
    (tmp_path / "README.md").write_text(f"# Title\n\n{blocks}after\n")
    for name, found in (("cpu/encoder", bench_records.models(Maker(0))), ("k", bench_records.kernels(Maker(0)))):
        records.write(tmp_path / f"results/{name}.jsonl", found)
    return tmp_path


def test_tables_are_written_and_checked(room, capsys):
    before = (room / "README.md").read_text()
    assert readme_tables.main(["--check"], room) == 1
    assert "README.md is stale" in capsys.readouterr().err and (room / "README.md").read_text() == before
    assert readme_tables.main([], room) == 0 and readme_tables.main(["--check"], room) == 0
    text = (room / "README.md").read_text()
    made = "\n".join(readme_tables.savings(report.frame(records.read(room / "results/cpu/encoder.jsonl"))))
    said = f"{bench_records.DEVICE}, torch 2.13.0, bf16, commit 0123456789ab, 2026-01-02."
    assert text.startswith(
        f"# Title\n\n<!-- savings: cpu/encoder.jsonl -->\n\n{made}\n\n{said}\n\n<!-- end -->\nbetween"
    )
    assert text.endswith("<!-- end -->\nafter\n") and "old" not in text and "| attention: " in text
    digit = re.search(r"\| mar_fast \| (\d)", text)
    (room / "README.md").write_text(text[: digit.start(1)] + str((int(digit[1]) + 1) % 10) + text[digit.end(1) :])
    assert readme_tables.main(["--check"], room) == 1
    out = capsys.readouterr().out
    assert out.count("\n-|") == out.count("\n+|") == 1 and "mar_fast" in out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\n<!-- speed: k.jsonl -->\n<!-- end -->", "speed: k.jsonl -->: got table 'speed', expected one of"),
        ("<!-- kernels: k.jsonl -->\na\n", "<!-- kernels: k.jsonl -->: got no end, expected <!-- end --> after it"),
        ("<!-- kernels: k.jsonl -->\n<!-- savings: k.jsonl -->\n<!-- end -->", "<!-- kernels: k.jsonl -->: got no end"),
        ("<!-- kernels: none.jsonl -->\n<!-- end -->", "No such file or directory"),
        ("<!-- kernels: bad.jsonl -->\n<!-- end -->", "bad.jsonl, line 1: got '{}', expected a measurement"),
    ],
)
def test_bad_markers_are_clear_errors(room, text, message, capsys):
    (room / "results/bad.jsonl").write_text("{}\n")
    (room / "README.md").write_text(text)
    assert readme_tables.main([], room) == 2
    assert message in capsys.readouterr().err and (room / "README.md").read_text() == text
    (room / "README.md").unlink()  # as in a wheel
    assert readme_tables.main([], room) == 2 and "README.md" in capsys.readouterr().err
