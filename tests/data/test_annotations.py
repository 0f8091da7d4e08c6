"""Lists and class names in the formats of the data sets: what is read, what is told apart, and bad lines."""

import json

import pytest

from mar_fast.data.annotations import read_annotations, read_labels

KINETICS = """label,youtube_id,time_start,time_end,split
"dancing, ballet",-abc_123,5,15,validate
testifying,xYz,1200,1210,validate
"""
UCF101 = "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi{0}\nHandstandPushups/v_HandStandPushups_g01_c02.avi{1}\n"


def write(folder, files):
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def found(annotations, root):
    return [(s.name, str(s.path.relative_to(root)), s.label) for s in annotations.samples]


@pytest.mark.parametrize("separator", [" ", ",", ", ", "\t"])
def test_lists_of_paths_and_labels(tmp_path, separator):
    names = ["a.mp4", "some folder/b c, d.mp4", "e 7.mp4"]
    text = "".join(f"{name}{separator}{label}\n\n" for label, name in enumerate(names))
    (tmp_path / "val.csv").write_text("\ufeff" + text, encoding="utf-8")
    read = read_annotations(tmp_path / "val.csv")
    assert read.format == "list" and read.classes is None
    assert found(read, tmp_path) == [(name, name, label) for label, name in enumerate(names)]
    assert [sample.location for sample in read.samples] == [f"{tmp_path / 'val.csv'}, line {n}" for n in (1, 3, 5)]
    assert read_annotations(tmp_path / "val.csv", root=tmp_path / "videos").samples[0].path.parent.name == "videos"


def test_lists_of_paths(tmp_path):
    """Recognised where the first line has neither a label nor columns, or asked for."""
    names = ["some folder/b c.mp4", "a.mp4", "frames/v1", "d 2, e.mp4"]
    (tmp_path / "val.txt").write_text("\n".join(names) + "\n\n")
    for read in (read_annotations(tmp_path / "val.txt"), read_annotations(tmp_path / "val.txt", format="paths")):
        assert read.format == "paths" and found(read, tmp_path) == [(name, name, -1) for name in names]
    (tmp_path / "val.txt").write_text("b 2.mp4, c.mp4\n")
    assert [s.name for s in read_annotations(tmp_path / "val.txt", format="paths").samples] == ["b 2.mp4, c.mp4"]


@pytest.mark.parametrize(
    "text",
    [
        '"a ""b"", c.mp4",3\nd e.mp4 0\n',
        '"a ""b"", c.mp4","3"\n"d e.mp4","0"\n',
        '"a ""b"", c.mp4",3.0\nd e.mp4,0.0\n',
        'path,label\n"a ""b"", c.mp4",3\nd e.mp4,0\n',
        ',video_path,length,Label\n0,"a ""b"", c.mp4",7,3.0\n1,d e.mp4,9,0.0\n',
        'label;path\n3;"a ""b"", c.mp4"\n0;d e.mp4\n',
        '"a ""b"", c.mp4" 120 3\nd e.mp4 90 0\n',
    ],
)
def test_quotes_headers_and_counts(tmp_path, text):
    (tmp_path / "val.csv").write_text(text)
    assert found(read_annotations(tmp_path / "val.csv"), tmp_path) == [
        ('a "b", c.mp4', 'a "b", c.mp4', 3),
        ("d e.mp4", "d e.mp4", 0),
    ]


def test_folders_of_pictures(tmp_path):
    """With the number of frames or without; a folder whose name ends in a number is what it is."""
    for name in ("frames/v1", "frames/v 2", "frames/-abc_000001_000011"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "val.txt").write_text(f"frames/v1 20 3\nframes/v 2 1\n{tmp_path}/frames/v3 0\n")
    samples = read_annotations(tmp_path / "val.txt").samples
    assert [(s.name, s.label) for s in samples[:2]] == [("frames/v1", 3), ("frames/v 2", 1)]
    assert samples[2].path == tmp_path / "frames/v3"
    (tmp_path / "k.csv").write_text("label,youtube_id,time_start,time_end\nwalk,-abc,1,11\n")
    read = read_annotations(tmp_path / "k.csv", labels=["walk"], root=tmp_path / "frames")
    assert read.samples[0].path == tmp_path / "frames/-abc_000001_000011"


def test_kinetics(tmp_path):
    """The official csv: files are named by id and six-digit times, flat, or in the folder of the class or split."""
    write(tmp_path, {"val.csv": KINETICS, "testifying/xYz_001200_001210.mkv": ""})
    read = read_annotations(tmp_path / "val.csv", labels=["testifying", "dancing, ballet"])
    assert read.format == "kinetics"
    assert found(read, tmp_path) == [
        ("-abc_123_000005_000015", "-abc_123_000005_000015.mp4", 1),
        ("xYz_001200_001210", "testifying/xYz_001200_001210.mkv", 0),
    ]
    quoted = '"label","youtube_id","time_start","time_end"\n"air_drumming","-abc","1.0","11.0"\n'
    write(tmp_path, {"quoted.csv": quoted})  # and _ for spaces, as in the names of folders
    read_quoted = read_annotations(tmp_path / "quoted.csv", labels=["walk", "air drumming"])
    assert [(s.name, s.label) for s in read_quoted.samples] == [("-abc_000001_000011", 1)]
    write(tmp_path, {"validate/-abc_123_000005_000015.mp4": ""})
    read = read_annotations(tmp_path / "val.csv", labels=["testifying", "dancing, ballet"])
    assert read.samples[0].path == tmp_path / "validate/-abc_123_000005_000015.mp4"


def test_something_something(tmp_path):
    entries = [
        {
            "id": "78687",
            "label": "holding potato next to vicks vaporub bottle",
            "template": "Holding [something] next to [something]",
        },
        {"id": 42, "label": "Covering something with something"},
    ]
    labels = {"Covering something with something": "1", "Holding something next to something": "0"}
    write(tmp_path, {"validation.json": entries, "labels.json": labels, "42.webm": ""})
    read = read_annotations(tmp_path / "validation.json", labels=read_labels(tmp_path / "labels.json"))
    assert read.format == "ssv2"
    assert found(read, tmp_path) == [("78687", "78687.mp4", 0), ("42", "42.webm", 1)]


@pytest.mark.parametrize("numbers", [("", ""), (" 1", " 2")])  # test list, training list
def test_ucf101(tmp_path, numbers):
    write(tmp_path, {"list01.txt": UCF101.format(*numbers), "classInd.txt": "1 ApplyEyeMakeup\n2 HandstandPushups\n"})
    read = read_annotations(tmp_path / "list01.txt")
    assert read.format == "ucf101"
    names = ["ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi", "HandstandPushups/v_HandStandPushups_g01_c02.avi"]
    assert found(read, tmp_path) == [(name, name, label) for label, name in enumerate(names)]
    if not numbers[0]:
        swapped = read_annotations(tmp_path / "list01.txt", labels=["HandstandPushups", "ApplyEyeMakeup"])
        assert [sample.label for sample in swapped.samples] == [1, 0]


def test_ucf101_numbers_taken_as_they_stand_if_asked(tmp_path):
    write(tmp_path, {"list01.txt": UCF101.format(" 1", " 2")})
    assert [s.label for s in read_annotations(tmp_path / "list01.txt", format="list").samples] == [1, 2]


def test_hmdb51(tmp_path):
    """Only rows with a 2 are of the test; classes are numbered in alphabetical order."""
    write(
        tmp_path,
        {
            "wave_test_split1.txt": "w one.avi 2 \nw2.avi 1 \n",
            "brush_hair_test_split1.txt": "b1.avi 0 \nb2.avi 2 \n",
            "brush_hair_test_split2.txt": "b1.avi 2 \n",
        },
    )
    read = read_annotations(tmp_path, root=tmp_path / "videos")
    assert read.format == "hmdb51"
    assert found(read, tmp_path / "videos") == [
        ("brush_hair/b2.avi", "brush_hair/b2.avi", 0),
        ("wave/w one.avi", "wave/w one.avi", 1),
    ]
    assert read.classes == 2
    second = read_annotations(tmp_path, split=2)
    assert [s.name for s in second.samples] == ["brush_hair/b1.avi"] and second.classes == 1
    wave = read_annotations(tmp_path / "wave_test_split1.txt")
    assert [(s.name, s.label) for s in wave.samples] == [("wave/w one.avi", 1)] and wave.classes == 2


@pytest.mark.parametrize(
    "content",
    [
        "walk\nrun fast\n3 jumps\n",
        "0 walk\n1 run fast\n2 3 jumps",
        "1 walk\n2 run fast\n3 3 jumps\n\n",
        '["walk", "run fast", "3 jumps"]',
        '{"2": "3 jumps", "0": "walk", "1": "run fast"}',
        '{"3 jumps": "2", "walk": "0", "run fast": 1}',
        '{"walk": 0, "\\"run fast\\"": 1, "3 jumps": 2}',  # as kinetics_classnames.json has quotation marks
        '{"id2label": {"0": "walk", "1": "run fast", "2": "3 jumps"}, "model_type": "videomae"}',
        '"walk"\n"run fast"\n"3 jumps"\n',
        "id,name\n0,walk\n1,run fast\n2,3 jumps\n",
        "2,3 jumps\n0,walk\n1,run fast\n",
        '1; "walk"\n2; "run fast"\n3; "3 jumps"\n',
        "0\twalk\n1\trun fast\n2\t3 jumps\n",
        "name\tid\nwalk\t0\nrun fast\t1\n3 jumps\t2\n",
    ],
)
def test_labels(tmp_path, content):
    (tmp_path / "labels").write_text(content)
    assert read_labels(tmp_path / "labels") == ["walk", "run fast", "3 jumps"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "got no class, expected a name in each line or JSON"),
        ("walk\n\nrun\n", "line 2: got an empty line, expected the name of a class"),
        ('{"walk": 0,\n "run" 1}', "line 2: got broken JSON"),
        ('{"walk": 0, "run": 2}', "got 2 classes without number 1, expected numbers from 0"),
        ('{"walk": 0, "run": 0}', "got number 0 for 'run', expected .* a number of its own"),
        ('{"walk": "zero"}', "got number 'zero' for 'walk'"),
        ("0,walk\n2,run\n", "got 2 classes without number 1, expected numbers from 0"),
        ('{"0": ["walk"]}', "got number '0' for .'walk'."),
    ],
)
def test_bad_labels(tmp_path, content, message):
    (tmp_path / "labels").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_labels(tmp_path / "labels")


CLASSES = ["walk", "run"]


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.csv", "a.mp4 0\nb.mp4\n", {}, "a.csv, line 2: got 'b.mp4', expected a path and a label number from 0"),
        ("a.csv", "a.mp4 0\n\nb.mp4 -1\n", {}, "a.csv, line 3: got 'b.mp4 -1'"),
        ("a.csv", "a.mp4,walk\n", {}, "a.csv, line 1: got 'a.mp4,walk'"),
        ("a.csv", "a.mp4 0\nb.mp4 1\na.mp4 1\n", {}, "line 3: got 'a.mp4' again, after .*line 1, expected it once"),
        ("a.csv", "path,label\na.mp4,0\nb.mp4,walk\n", {}, "line 3: got 'b.mp4,walk', expected 2 columns as in line 1"),
        ("a.csv", "\n", {}, "a.csv: got no video, expected lines of a path"),
        ("k.csv", KINETICS, {}, "labels: got none, expected a file of class names, since lists of kinetics"),
        ("k.csv", KINETICS, dict(labels=CLASSES), "k.csv, line 2: got class 'dancing, ballet', expected one of the 2"),
        ("k.csv", "label,youtube_id,time_start,time_end\nwalk,x,1,y", dict(labels=CLASSES), "line 2: got 'walk,x,1,y'"),
        ("k.csv", "youtube_id,time_start,time_end,split\n", dict(labels=CLASSES), "line 1: got no column label"),
        ("k.csv", KINETICS, dict(labels=["walk", "walk"]), "labels: got 'walk' for classes 0 and 1"),
        ("s.json", '[{"id": "1"}]', dict(labels=CLASSES), "s.json, entry 1: got .*expected an object with id and temp"),
        ("s.json", '[{"id": "1", "template": "[x] walk"}]', dict(labels=CLASSES), "entry 1: got class 'x walk'"),
        ("s.json", '[\n{"id": }]', dict(labels=CLASSES), "s.json, line 2: got broken JSON"),
        ("u.txt", "walk/v_walk_g01_c01.avi\n", {}, "labels: got none"),
        ("u.txt", "walk/v_walk_g01_c01.avi 1\nx.avi 2\n", dict(labels=CLASSES), "u.txt, line 2: got 'x.avi 2'"),
        ("u.txt", "run/v_run_g01_c01.avi 1\n", dict(labels=CLASSES), "line 1: got number 1, expected 2, that of run"),
        ("u.txt", "fly/v_fly_g01_c01.avi 1\n", dict(labels=CLASSES), "line 1: got class 'fly'"),
        ("run_test_split1.txt", "a.avi 2\nb.avi 3\n", {}, "run_test_split1.txt, line 2: got 'b.avi 3'"),
        ("run_test_split1.txt", "a.avi 2\n", dict(labels=["walk"]), "line 1: got class 'run'"),
        ("x.txt", "a.avi 2\n", dict(format="hmdb51"), "list: got 'x.txt', expected <class>_test_split<number>.txt"),
        ("x.txt", "a.avi 2\n", dict(format="ava"), "format: got 'ava', expected auto, list, kinetics"),
    ],
)  # fmt: skip
def test_bad_lists(tmp_path, name, content, options, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_annotations(tmp_path / name, **options)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="got bytes that are no text"):
        read_annotations(tmp_path / "a.csv")


def test_missing_lists(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"list: got .*nowhere.csv', expected an existing list of videos"):
        read_annotations(tmp_path / "nowhere.csv")
    with pytest.raises(FileNotFoundError, match=r"without files .*_test_split1.txt, expected HMDB51's split files"):
        read_annotations(tmp_path)
    with pytest.raises(ValueError, match="a folder, expected a file, for the format ssv2"):
        read_annotations(tmp_path, format="ssv2")
    with pytest.raises(FileNotFoundError, match=r"labels: got .*expected an existing file of class names"):
        read_labels(tmp_path)
