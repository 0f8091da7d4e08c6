"""mar-fast train: fine-tune or pre-train by a recipe, in one process or, under torchrun, in many."""

import math
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import machine
from ..kernels import checks
from . import common, options

if TYPE_CHECKING:
    from ..data.annotations import Sample
    from ..train.distributed import World
    from ..train.recipe import Recipe

DEMO = "motions"
SECONDS = 60  # from one line of progress to the next, in a file or a pipe, where no bar moves


def train(
    recipe: Annotated[str | None, typer.Option(help="Its name, or a TOML file. --recipe list lists them.")] = None,
    videos: Annotated[Path | None, typer.Option("--train", help="The list of videos to train on.")] = None,
    val: Annotated[Path | None, typer.Option(help="The list of videos to validate and test on.")] = None,
    root: Annotated[Path | None, typer.Option(help="Folder of the videos. Default: that of each list.")] = None,
    init: Annotated[str | None, typer.Option(help="Checkpoint to start from, in any layout. Default: random.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("run"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")] = False,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Resume with another recipe, list or number of processes.")
    ] = False,
    given: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="A value of the recipe, such as optimizer.lr=3e-4."),
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Say what will happen, draw the schedule, and stop.")] = False,
    num_videos: Annotated[int, typer.Option(min=1, help="For --show without a list.")] = 10_000,
    processes: Annotated[int, typer.Option(min=1, help="For --show: of the run.")] = 1,
    demo: Annotated[bool, typer.Option("--demo", help="Camera motions over real films, in minutes on a CPU.")] = False,
    clips: Annotated[int, typer.Option(min=1, help="Clips that a process takes at a time, at most.")] = 8,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read, for each process that trains.")] = 2,
    form: options.ListFormat = "auto",
    labels: options.ListLabels = None,
    split: options.Split = 1,
    device: options.DeviceOption = common.Device.auto,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write the log for it as well.")] = False,
) -> None:
    """Fine-tune or pre-train a model."""
    from .. import train as training

    if recipe == "list":
        common.show("\n".join(training.list_recipes()))
        return
    if demo and (recipe or videos or val or init):
        raise checks.bad("--demo", "also --recipe, --train, --val or --init", "none of them: the demo has its own")
    if recipe is None and not demo:
        raise checks.bad("--recipe", "none", f"one of {', '.join(training.list_recipes())}, or a TOML file")
    chosen = training.read_recipe(DEMO if recipe is None else recipe, given or ())
    listed, checked = (
        () if path is None else options.read_list(path, root, form, labels, split).samples for path in (videos, val)
    )
    if show:
        _show(chosen, len(listed) or num_videos, processes, clips, out)
        return
    if not demo and not listed:
        raise checks.bad("--train", "none", "a list of videos (or --demo, or --show to see what will happen)")
    _check_folder(out, resume)
    with _process(device) as world, _rows(out, world, tensorboard) as on_row:
        how: dict[str, Any] = dict(clips=clips, workers=workers, resume=resume, allow_changes=allow_changes)
        how |= dict(say=common.tell, on_row=on_row)
        if demo:
            stopped = _demo(chosen, out, world, how)
        else:
            stopped = training.fit(chosen, listed, checked, out, world, init=init, **how).stopped
        if stopped:
            if world.main:
                common.tell(f"{out}: stopped; the same command with --resume goes on")
            raise KeyboardInterrupt
        if world.main and not demo and checked and chosen.task == "finetune":
            _test(chosen, checked, out, world, workers)
        world.barrier()  # all wait for the test, and leave together


def _show(recipe: "Recipe", videos: int, processes: int, clips: int, out: Path) -> None:
    from ..train import show

    where, dtype = machine.device(), recipe.optimizer.precision
    dtype = "bf16" if dtype == "fp16" and where.type == "cpu" else dtype  # where fp16 takes seconds for a product
    (flops,) = machine.matmul_rates(where, (dtype,), budget=0.3).values()
    common.show(show.describe(recipe, videos, processes, clips, flops=flops))
    picture = out.absolute().with_name(f"{out.absolute().name}.schedule.png")
    show.draw_schedule(recipe, videos, picture)
    common.show(f"Written: {picture}")


def _check_folder(out: Path, resume: bool) -> None:
    if int(os.environ.get("RANK", 0)):
        return  # the first process may have begun to write
    if out.is_file():
        raise FileExistsError(f"--out: {out} is a file, expected a folder")
    if out.is_dir() and any(out.iterdir()) and not resume:
        raise FileExistsError(f"--out: {out} is not empty, expected a new folder (or --resume to go on with a run)")
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise PermissionError(f"--out: {out} cannot be written")


@contextmanager
def _process(device: common.Device) -> Iterator["World"]:
    """This process among those of torchrun; one of many ends here, with its exit code."""
    from ..train import distributed

    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        with distributed.world(device) as world:
            yield world
        return
    code = 0
    try:
        with distributed.world(device) as world:
            yield world
    except KeyboardInterrupt:
        code = common.INTERRUPTED
    except common.USER_ERRORS as error:
        common.show_error(error)
        code = common.BAD_INPUT
    except BaseException:
        traceback.print_exc()
        code = common.CHECK_FAILED
    distributed.leave(code)


@contextmanager
def _rows(out: Path, world: "World", tensorboard: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that shows each row of the log as progress, and writes it for tensorboard."""
    if not world.main:
        yield lambda row: None
        return
    if tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("--tensorboard needs tensorboard: pip install tensorboard") from error
    board, first, began, told = None, 0, 0.0, -math.inf
    with common.progress() as step, ExitStack() as opened:

        def on_row(row: dict[str, Any]) -> None:
            nonlocal board, first, began, told
            now = time.monotonic()
            if "loss" in row:
                if not first:
                    first, began = row["step"], now
                text = _progress(row, first, now - began)
                step(text, row["step"] / row["steps"])
                if not common.errors.is_terminal and now - told > SECONDS:
                    common.tell(text)
                    told = now
            elif "validation" in row:
                found = ", ".join(f"{name} {value:.4g}" for name, value in row["validation"].items())
                common.tell(f"epoch {row['epoch']}: {found}")
            for broken in row.get("broken", ()):
                common.tell(f"warning: {broken['path']} cannot be read: {broken['error']}", style="yellow")
            numbers = row | {f"validation/{name}": value for name, value in row.get("validation", {}).items()}
            if tensorboard and board is None:  # only now: a run that is refused leaves nothing behind
                board = SummaryWriter(str(out / "tensorboard"), purge_step=row["step"])
                opened.callback(board.close)
            for name, value in numbers.items():
                if board is not None and isinstance(value, int | float):
                    board.add_scalar(name, value, row["step"])

        yield on_row


def _progress(row: dict[str, Any], first: int, seconds: float) -> str:
    """The row of a step in words; ``seconds`` after that of the step ``first``."""
    accuracy = f", accuracy {row['accuracy']:.0%}" if "accuracy" in row else ""
    bound = "waits for data" if row["waiting"] > 0.5 else "data is ahead"
    text = (
        f"step {row['step']} of {row['steps']}, loss {row['loss']:.3f}{accuracy}, lr {row['lr']:.2e}, "
        f"{row['clips_per_second']:.1f} clips/s, {row['waiting']:.0%} waiting ({bound})"
    )
    if row["step"] == first:
        return text
    left = (row["steps"] - row["step"]) * seconds / (row["step"] - first)
    return f"{text}, {timedelta(seconds=round(left))} left"


def _test(recipe: "Recipe", samples: "Sequence[Sample]", out: Path, world: "World", workers: int) -> None:
    from .. import train as training

    best, last = out / "best.safetensors", out / "last.safetensors"
    best = best if best.exists() else last  # no video could be read to validate on
    with common.progress() as step:
        outcome = training.multi_view_test(
            recipe, best, samples, out / "test.jsonl", world, workers=workers,
            on_video=lambda so_far: step(f"test: video {so_far.finished}", so_far.finished / so_far.videos),
        )  # fmt: skip
    common.write_json(asdict(outcome), out / "test.json")
    if outcome.top1 is not None:
        views = f"{recipe.test.clips} clips x {recipe.test.crops} crops"
        common.show(f"test of {best}, {views}: top-1 {outcome.top1:.2%}, top-5 {outcome.top5:.2%}")
    common.show(f"Written: {out}")


def _demo(recipe: "Recipe", out: Path, world: "World", how: dict[str, Any]) -> bool:
    """Pre-train on camera motions, fine-tune from there, and report the accuracy; whether it was stopped."""
    from ..train.demo import demo

    found = demo(recipe, out, world, **how)
    if found is None:
        return True
    if world.main:
        common.write_json(found, out / "demo.json")
        for name, value in found.items():
            common.show(f"{name}: {value:.1%}" if isinstance(value, float) else f"{name}: {value}")
        common.show(f"Written: {out}")
    return False
