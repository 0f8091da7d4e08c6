"""Fuzz the reader of films: ``python tests/data/fuzz_films.py SECONDS [FIRST_SEED]``.

Small films in many containers and codecs are damaged, and read in a process with a time limit. A read has to end, with
an error or with the pictures of plain decoding: those of the damaged file, or of the film before it was damaged.
"""

import collections
import json
import random
import re
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import av
import av.logging
from test_films import drawn

from mar_fast.data import read_clip
from mar_fast.data.decoding import _packets, open_video

FILMS, LIMIT, TURNS = 150, 60, 200  # films to damage; seconds for one read; damaged films until a new process


def damaged(draw, films):
    """What was done, a film before that, and its bytes after it."""
    film = draw.choice(films)
    data, how = bytearray(film.read_bytes()), []
    for _ in range(draw.choice([1, 1, 2])):
        how.append(draw.choice(["flip", "flip", "cut", "join", "zero", "repeat", "remove", "head"]))
        size = max(len(data), 1)
        start, length = draw.randrange(size), draw.choice([1, 16, 188, 2000, size // 3])
        match how[-1]:
            case "flip" | "head":
                reach = size if how[-1] == "flip" else min(size, 600)
                for at in (draw.randrange(reach) for _ in range(draw.choice([1, 5, 50]))):
                    data[at : at + 1] = [draw.randrange(256)]
            case "cut":
                data = data[start:] if draw.random() < 0.3 else data[:start]
            case "join":
                data += draw.choice([film, film, draw.choice(films)]).read_bytes()
            case "zero":
                data[start : start + length] = bytes(len(data[start : start + length]))
            case "repeat":
                data[start:start] = data[start : start + length]
            case "remove":
                del data[start : start + length]
    return "+".join(how), film, bytes(data)


def plain(path, threads):
    """Pictures and time stamps by plain decoding, which goes on after an error; also the stamps of all packets."""
    pictures, stamps, times = [], [], []
    with av.open(f"file:{path}", metadata_errors="ignore") as file:
        stream = file.streams.best("video")
        stream.thread_type = threads
        for packet in _packets(file, stream):
            if packet.pts is not None and packet.size and not packet.is_discard:
                times.append(packet.pts)
            try:
                frames = packet.decode()
            except av.error.FFmpegError:
                continue
            for frame in frames:
                stamps.append(frame.pts)
                try:
                    pictures.append(hash(frame.to_ndarray(format="rgb24").tobytes()))
                except av.error.FFmpegError:
                    pictures.append(None)  # it counts all the same
        stream.codec_context.flush_buffers()  # as in decoding.py: else this may hang
    return pictures, stamps, sorted(times)


def tell(**what):
    print(json.dumps(what), flush=True)


def check(seed, films, folder):
    """Damage a film and read it; tell what came of each read."""
    draw = random.Random(seed)
    how, film, data = damaged(draw, films)
    path = folder / f"damaged{film.suffix}"
    path.write_bytes(data)
    tell(stage="plain decoding", how=how, film=film.name)
    undamaged, *before = plain(film, "AUTO")
    at_times, known = dict(zip(before[0], undamaged, strict=True)), []
    with av.open(str(film)) as file:
        codec = file.streams.best("video").codec_context.name
    for threads in ("AUTO", "SLICE", "NONE"):
        try:
            known.append(plain(path, threads))
        except (av.error.FFmpegError, AttributeError, MemoryError, ValueError):
            known.append(([], [], []))
    tell(stage="reading")
    try:
        with open_video(path) as video:
            total = video.total
        if not total:
            raise ValueError("path: got '', no frame, expected one")
        runs = [(0, 1, total), *((draw.randrange(total), draw.choice([1, 1, 2, 7]), 4) for _ in range(6))]
    except ValueError as error:
        runs, total = [], 0
        tell(result=kind_of_error(error))
    for start, stride, count in runs:
        count = min(count, (total - start - 1) // stride + 1)
        try:
            clip = read_clip(path, count, stride=stride, start=start, size=None)
        except ValueError as error:
            tell(result=kind_of_error(error))
            continue
        kinds = set()
        for number, picture in zip(range(start, total, stride), clip.permute(1, 2, 3, 0), strict=False):
            kinds.add(kind_of(number, hash(picture.numpy().tobytes()), undamaged, at_times, known, codec))
        wrong = [kind for kind in kinds if kind.startswith("WRONG")]
        tell(result=wrong[0] if wrong else sorted(kinds)[-1], run=(start, stride, count))


def kind_of_error(error):
    """Its words without names and numbers; WRONG if they are not the reader's own."""
    found = re.match(r"path: got '[^']*'(.*), expected ", str(error))
    return "error: " + re.sub(r"[\d.]+", "*", found[1]).strip(" ,") if found else f"WRONG {error!r}"


def kind_of(number, picture, undamaged, at_times, known, codec):
    """Whose picture this is; a film that lacks some of its frames still has the others at their times."""
    if undamaged[number : number + 1] == [picture]:
        return "1 as before the damage"
    there = {hashed for pictures, *_ in known for hashed in pictures[number : number + 1]}
    if picture in there:
        return "2 as plain decoding"
    for pictures, stamps, times in known:
        there.update(at_times.get(time) for time in times[number : number + 1])
        begun = [time for time in times if stamps and time >= stamps[0]]  # without frames that no key frame precedes
        wanted = [some[number] for some in (times, begun) if number < len(some)]
        there.update(picture for picture, time in zip(pictures, stamps, strict=True) if time in wanted)
    if picture in there:
        return "3 as plain decoding, or as before, at that time"
    # Where FFmpeg gives what it could not decode without an error, that may depend on threads and on memory.
    if picture not in undamaged and (not there <= set(undamaged) or codec in ("mjpeg", "ffv1")):
        return "4 damaged, and in plain decoding in another way"
    every = {hashed for pictures, *_ in known for hashed in pictures}
    return f"WRONG {'another picture' if picture in every.union(undamaged) else 'picture of none'}, {codec}"


def work(folder):
    films = sorted((folder / "films").iterdir())
    for line in sys.stdin:
        check(int(line), films, folder)
        tell(stage="done")


class Worker:
    """A process that checks seeds, one after another."""

    def __init__(self, folder, log):
        flags = [sys.executable, __file__, "--worker", str(folder), str(log)]
        self.process = subprocess.Popen(flags, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=-3, bufsize=0)

    def check(self, seed):
        """What was told, and how the process ended if it did."""
        self.process.stdin.write(f"{seed}\n".encode())
        self.process.stdin.flush()
        told = []
        while not told or told[-1].get("stage") != "done":
            if not select.select([self.process.stdout], [], [], LIMIT)[0]:
                self.process.kill()
                return told, "hang"
            line = self.process.stdout.readline()
            if not line:
                return told, f"ended with {self.process.wait()}"
            told.append(json.loads(line))
        return told, None


def main(seconds, seed):
    counts, faults, worker = collections.Counter(), [], None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "films").mkdir()
        for number in range(FILMS):
            draw = random.Random(number)
            film = next(film for _ in range(50) if (film := drawn(draw, folder)))
            film.rename(folder / "films" / f"{number:03d}{film.suffix}")
        end, first = time.monotonic() + seconds, seed
        while time.monotonic() < end:
            if worker is None or (seed - first) % TURNS == 0:
                if worker is not None:
                    worker.process.stdin.close()
                worker = Worker(folder, (seed - first) // TURNS % 2)
            told, ended = worker.check(seed)
            counts["damaged films"] += 1
            stage = next((one["stage"] for one in reversed(told) if "stage" in one), "start")
            if ended:
                counts[f"{ended}, {stage}"] += 1
                worker = None
            results = [one["result"] for one in told if "result" in one]
            counts.update(results)
            if ended or any(result.startswith("WRONG") for result in results):
                faults.append(dict(seed=seed, ended=ended, stage=stage, told=told))
                print(json.dumps(faults[-1]), flush=True)
            seed += 1
    for what, times in sorted(counts.items()):
        print(f"{times:7} {what}")
    return len(faults)


if __name__ == "__main__":
    if sys.argv[1] == "--worker":
        if sys.argv[3] == "1":
            av.logging.set_level(av.logging.ERROR)
        work(Path(sys.argv[2]))
    else:
        sys.exit(main(float(sys.argv[1]), int((*sys.argv, 0)[2])) > 0)
