"""Lists of labelled videos, in the formats that data sets come with, and files of class names."""

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..kernels import checks

# What each format is, as it is told to the user.
FORMATS = {
    "list": "lines of a path, for folders of pictures their number, and a label number from 0; or a csv with a header",
    "kinetics": "Kinetics, a csv with the columns label, youtube_id, time_start, time_end",
    "ssv2": "Something-Something v2, JSON entries with id and template",
    "ucf101": "UCF101, lines of Class/file.avi, in training lists with a number from 1",
    "hmdb51": "HMDB51, a file for each class with lines of name.avi and 0, 1 or 2, which is test",
    "paths": "lines of a path, without labels",
}
EXTENSIONS = (".mp4", ".webm", ".avi", ".mkv", ".mov")

# What a header may call its columns.
PATHS = ("path", "video", "video_path", "file", "file_path", "filename", "name")
LABELS = ("label", "label_id", "label_index", "class", "class_id", "class_index", "target")

_LIST_LINE = re.compile(r'(.*[^\s,])\s*[,\s]\s*"?(\d+)(?:\.0*)?"?')
_NUMBER = re.compile(r"\s*(\d+)(?:\.0*)?\s*")  # also 3.0, as pandas writes it after a missing value
_COUNTED_PATH = re.compile(r'(.*[^\s,])\s*[,\s]\s*"?\d+"?')
_UCF101_LINE = re.compile(r"([^/]+)/(.+\.avi)(?:\s+(\d+))?", re.IGNORECASE)
_UCF101_NAME = re.compile(r"(\w+)/v_\1_g\d+_c\d+\.avi(\s+\d+)?", re.IGNORECASE)
_HMDB51_FILE = re.compile(r"(.+)_test_split(\d+)\.txt")
_HMDB51_LINE = re.compile(r"(.+\.avi)\s+([012])", re.IGNORECASE)


@dataclass(frozen=True)
class Sample:
    """A labelled video.

    Attributes:
        name: As in the list.
        path: Its file or folder of pictures, which need not exist.
        label: Its class, from 0; -1 where the list has no labels.
        location: File and line of the list, for messages.
    """

    name: str
    path: Path
    label: int
    location: str


@dataclass(frozen=True)
class Annotations:
    """The samples of a list, its format (a key of `FORMATS`) and how many classes have names (None: they have none)."""

    format: str
    samples: tuple[Sample, ...]
    classes: int | None


def read_annotations(
    path: Path, *, root: Path | None = None, labels: Sequence[str] | None = None, format: str = "auto", split: int = 1
) -> Annotations:
    """Read a list of labelled videos.

    Args:
        path: The list; for HMDB51 the folder of split files, or the file of one class.
        root: The folder that the videos' names are relative to; None is the list's own.
        labels: The names of the classes, for formats that have names and not numbers (kinetics, ssv2, ucf101).
            ucf101 finds classInd.txt beside the list; hmdb51 takes its classes in alphabetical order.
        format: A key of `FORMATS`, or "auto", which tells by the file's name and first line.
        split: Which split of HMDB51, 1 to 3; only for a folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line that does not fit; the message names file and line.
    """
    if format != "auto" and format not in FORMATS:
        raise checks.bad("format", repr(format), "auto, " + ", ".join(FORMATS))
    if not path.exists():
        raise FileNotFoundError(f"list: got {str(path)!r}, expected an existing list of videos")
    folder, files = path if path.is_dir() else path.parent, [path]
    if format == "auto":
        format = "hmdb51" if path.is_dir() or _HMDB51_FILE.fullmatch(path.name) else _detect(_text(path))
    if path.is_dir() and format != "hmdb51":
        raise checks.bad("list", f"{str(path)!r}, a folder", f"a file, for the format {format}")
    if format == "hmdb51":
        every = _hmdb51_files(path, split)
        labels = labels or list(every)
        files = [file for file in every.values() if path in (folder, file)]
    elif format == "ucf101" and labels is None and (folder / "classInd.txt").is_file():
        labels = read_labels(folder / "classInd.txt")
    numbers = {} if format in ("list", "paths") else _numbers(format, labels)
    base = folder if root is None else root
    samples = [sample for file in files for sample in _READERS[format](file, _text(file), base, numbers)]
    if not samples:
        raise ValueError(f"{path}: got no video, expected {FORMATS[format]}")
    seen: dict[str, Sample] = {}
    for sample in samples:
        first = seen.setdefault(sample.name, sample)
        if first is not sample:
            raise checks.bad(sample.location, f"{sample.name!r} again, after {first.location}", "it once")
    return Annotations(format, tuple(samples), None if labels is None else len(labels))


def check_samples(samples: Sequence[Sample], classes: int | None) -> None:
    """Check, before any work, that a list fits a model and that its videos are there.

    Args:
        samples: Of the list.
        classes: How many the model has; None for a model that does not classify.

    Raises:
        ValueError: a label that the model does not have, or none of the files found.
    """
    for sample in samples:
        if classes is not None and not 0 <= sample.label < classes:
            got = f"label {sample.label}" if sample.label >= 0 else "no label"
            raise checks.bad(sample.location, got, f"0 to {classes - 1}, as the model has")
    if not any(sample.path.exists() for sample in samples):
        first = f"the first would be {str(samples[0].path)!r}"
        raise checks.bad("root", f"a folder with none of the {len(samples)} videos", f"one that has them; {first}")


def read_labels(path: Path) -> list[str]:
    """The names of the classes, in the order of their numbers.

    Args:
        path: Text with a name in each line, or with a number and a name where numbers count from 0 or 1 (UCF101's
            classInd.txt); a csv of numbers and names, with or without a header; or JSON: a list of names, an object
            from number to name or from name to number (Something-Something's labels), numbers from 0, or the
            config.json of a Hugging Face model. Quotation marks around a name are taken off.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: something that is no name or number, or numbers with gaps.
    """
    if not path.is_file():
        raise FileNotFoundError(f"labels: got {str(path)!r}, expected an existing file of class names")
    text = _text(path)
    if text.lstrip()[:1] in ("{", "["):
        names = _by_number(path, _json_labels(_json(path, text)))
    else:
        lines = text.rstrip().splitlines()
        for number, line in enumerate(lines, 1):
            if not line.strip():
                raise ValueError(f"{path}, line {number}: got an empty line, expected the name of a class")
        columns = _two_columns(lines) if lines else None
        names = _numbered([line.strip() for line in lines]) if columns is None else _by_number(path, columns)
    names = [_unquoted(name) for name in names]
    if not names:
        raise ValueError(f"{path}: got no class, expected a name in each line or JSON")
    return names


def _numbered(lines: list[str]) -> list[str]:
    """Take away numbers that count the lines."""
    for first in (0, 1):
        if all(line.startswith(f"{number} ") for number, line in enumerate(lines, first)):
            return [line.removeprefix(f"{number} ") for number, line in enumerate(lines, first)]
    return lines


def _two_columns(lines: list[str]) -> list[tuple[object, object]] | None:
    """Numbers from 0 and names of a csv, in either order, with or without a header; None for other text."""
    for separator in ",\t;":
        rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=separator, skipinitialspace=True)]
        if any(len(row) != 2 for row in rows):
            continue
        for column in (0, 1):
            numbered = rows if rows[0][column].isdecimal() else rows[1:]
            if numbered and all(row[column].isdecimal() for row in numbered):
                first = int(min(int(row[column]) for row in numbered) == 1)
                return [(int(row[column]) - first, row[1 - column]) for row in numbered]
    return None


def _unquoted(text: str) -> str:
    quoted = len(text) > 1 and text[0] == text[-1] == '"'
    return text[1:-1].replace('""', '"') if quoted else text


def _json_labels(content: object) -> list[tuple[object, object]]:
    """Numbers and names."""
    if isinstance(content, list):
        return list(enumerate(content))
    assert isinstance(content, dict)
    content = content["id2label"] if isinstance(content.get("id2label"), dict) else content
    by_number = all(key.isdecimal() for key in content)
    return [(key, value) if by_number else (value, key) for key, value in content.items()]


def _by_number(path: Path, pairs: Sequence[tuple[object, object]]) -> list[str]:
    names: dict[int, str] = {}
    for number, name in pairs:
        if not str(number).isdecimal() or not isinstance(name, str) or int(str(number)) in names:
            got = f"number {number!r} for {name!r}"
            raise checks.bad(str(path), got, "a name for each number, or a number of its own for each name")
        names[int(str(number))] = name
    for number in range(len(names)):
        if number not in names:
            raise checks.bad(str(path), f"{len(names)} classes without number {number}", "numbers from 0, no gaps")
    return [names[number] for number in range(len(names))]


def _detect(text: str) -> str:
    """The format of a file that holds this."""
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    if first.startswith("["):
        return "ssv2"
    if "youtube_id" in next(csv.reader([first]), []):
        return "kinetics"
    if _UCF101_NAME.fullmatch(first) or (_UCF101_LINE.fullmatch(first) and not _LIST_LINE.fullmatch(first)):
        return "ucf101"
    return "list" if not first or set(",;\t") & set(first) or _LIST_LINE.fullmatch(first) else "paths"


def _lines(path: Path, text: str) -> Iterator[tuple[str, str]]:
    """The lines that are not empty, each with its file and number."""
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield f"{path}, line {number}", line.strip()


def _matches(path: Path, text: str, form: re.Pattern[str], accepted: str) -> Iterator[tuple[str, re.Match[str]]]:
    """The same lines, each as it matches a form."""
    for where, line in _lines(path, text):
        found = form.fullmatch(line)
        if found is None:
            raise checks.bad(where, repr(line[:80]), accepted)
        yield where, found


def _list(path: Path, text: str, root: Path, numbers: Mapping[str, int]) -> Iterator[Sample]:
    lines = list(_lines(path, text))
    separator = next((character for character in ",;\t" if lines and character in lines[0][1]), " ")
    rows = list(csv.reader([line for _, line in lines], delimiter=separator, skipinitialspace=True))
    header = [cell.lower() for cell in rows[0]] if rows else []
    columns = [next((name for name in known if name in header), None) for known in (PATHS, LABELS)]
    if columns[0] is not None and columns[1] is not None:
        at, number = header.index(columns[0]), header.index(columns[1])
        for (where, line), row in zip(lines[1:], rows[1:], strict=False):
            found = _NUMBER.fullmatch(row[number]) if len(row) == len(header) else None
            if found is None:
                raise checks.bad(where, repr(line[:80]), f"{len(header)} columns as in line 1, a whole {columns[1]}")
            yield Sample(row[at], root / row[at], int(found[1]), where)
        return
    for where, found in _matches(path, text, _LIST_LINE, "a path and a label number from 0"):
        name, counted = _unquoted(found[1]), _COUNTED_PATH.fullmatch(found[1])
        if counted is not None and not (root / name).exists():  # "folder frames label"
            name = _unquoted(counted[1])
        yield Sample(name, root / name, int(found[2]), where)


def _paths(path: Path, text: str, root: Path, numbers: Mapping[str, int]) -> Iterator[Sample]:
    for where, line in _lines(path, text):
        yield Sample(_unquoted(line), root / _unquoted(line), -1, where)


def _kinetics(path: Path, text: str, root: Path, numbers: Mapping[str, int]) -> Iterator[Sample]:
    """Files are named by YouTube id and times, in the root, a folder of the class or one of the split."""
    rows = csv.DictReader(text.splitlines())
    for column in ("label", "youtube_id", "time_start", "time_end"):
        if column not in (rows.fieldnames or ()):
            raise checks.bad(f"{path}, line 1", f"no column {column}", "label, youtube_id, time_start, time_end")
    for row in rows:
        where = f"{path}, line {rows.line_num}"
        times = [_NUMBER.fullmatch(row[column] or "") for column in ("time_start", "time_end")]
        if not row["youtube_id"] or None in times:
            raise checks.bad(where, repr(",".join(map(str, row.values()))), "an id and whole seconds")
        name = "_".join([row["youtube_id"], *(f"{int(time[1]):06d}" for time in times if time)])
        folders = ("", row["label"], row.get("split") or "")
        found = _find(root, [f"{folder}/{name}" if folder else name for folder in folders])
        yield Sample(name, found, _number(numbers, row["label"], where), where)


def _ssv2(path: Path, text: str, root: Path, numbers: Mapping[str, int]) -> Iterator[Sample]:
    content = _json(path, text)
    for number, entry in enumerate(content if isinstance(content, list) else [content], 1):
        where = f"{path}, entry {number}"
        named = isinstance(entry, dict) and ("template" in entry or "label" in entry)
        if not named or not isinstance(entry.get("id"), str | int):
            raise checks.bad(where, str(entry)[:80], "an object with id and template or label")
        # The names of the classes are the templates without their brackets.
        label = str(entry.get("template", entry.get("label"))).replace("[", "").replace("]", "")
        name = str(entry["id"])
        yield Sample(name, _find(root, [name]), _number(numbers, label, where), where)


def _ucf101(path: Path, text: str, root: Path, numbers: Mapping[str, int]) -> Iterator[Sample]:
    for where, found in _matches(path, text, _UCF101_LINE, "Class/file.avi, with or without a number from 1"):
        label = _number(numbers, found[1], where)
        if found[3] is not None and int(found[3]) != label + 1:
            raise checks.bad(where, f"number {found[3]}", f"{label + 1}, that of {found[1]}, counted from 1")
        name = f"{found[1]}/{found[2]}"
        yield Sample(name, root / name, label, where)


def _hmdb51_files(path: Path, split: int) -> dict[str, Path]:
    """The file of each class of HMDB51, in alphabetical order; ``path`` is the folder or one of the files."""
    folder = path
    if path.is_file():
        found = _HMDB51_FILE.fullmatch(path.name)
        if found is None:
            raise checks.bad("list", repr(path.name), "<class>_test_split<number>.txt, or a folder of such files")
        folder, split = path.parent, int(found[2])
    ending = f"_test_split{split}.txt"
    files = {file.name.removesuffix(ending): file for file in folder.glob(f"*{ending}")}
    if not files:
        raise FileNotFoundError(f"list: got {str(folder)!r} without files *{ending}, expected HMDB51's split files")
    return dict(sorted(files.items()))


def _hmdb51(path: Path, text: str, root: Path, numbers: Mapping[str, int]) -> Iterator[Sample]:
    action = path.name.rpartition("_test_split")[0]
    for where, found in _matches(path, text, _HMDB51_LINE, "name.avi and 0, 1 or 2"):
        if found[2] == "2":
            name = f"{action}/{found[1]}"
            yield Sample(name, root / name, _number(numbers, action, where), where)


_READERS = dict(list=_list, paths=_paths, kinetics=_kinetics, ssv2=_ssv2, ucf101=_ucf101, hmdb51=_hmdb51)


def _numbers(format: str, labels: Sequence[str] | None) -> dict[str, int]:
    """From the name of a class to its number."""
    if labels is None:
        raise checks.bad("labels", "none", f"a file of class names, since lists of {format} name classes by words")
    numbers: dict[str, int] = {}
    for number, name in enumerate(labels):
        if name in numbers:
            got = f"{name!r} for classes {numbers[name]} and {number}"
            raise checks.bad("labels", got, "a name for one class each")
        numbers[name] = number
    return numbers


def _number(numbers: Mapping[str, int], label: str | None, where: str) -> int:
    name = label or ""
    name = name if name in numbers else name.replace("_", " ")  # as folders are called
    if name not in numbers:
        raise checks.bad(where, f"class {label!r}", f"one of the {len(numbers)} names of the labels")
    return numbers[name]


def _find(root: Path, names: list[str]) -> Path:
    """The first of these that exists, with any of the usual extensions or as a folder; if none does, the first."""
    candidates = [root / f"{name}{extension}" for name in names for extension in (*EXTENSIONS, "")]
    return next((candidate for candidate in candidates if candidate.exists()), candidates[0])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: got bytes that are no text ({error.reason}), expected text in UTF-8") from error


def _json(path: Path, text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: got broken JSON ({error.msg}), expected JSON") from error
