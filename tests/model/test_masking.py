"""masking.py: the definition token by token, counts, coverage, draws, tracing without data, and every check."""

import itertools
import math
from contextlib import nullcontext
from functools import partial

import pytest

pytest.importorskip("hypothesis")

import numpy as np
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch._subclasses.fake_tensor import FakeTensorMode

from mar_fast import TokenMask, masking
from mar_fast.masking import cell_running

GRID = (8, 4, 4)
# Every form, called with the batch. Tensors are made inside, so that they are fake in a fake mode.
FIXED = {
    "number": partial(cell_running, grid=GRID, ratio=0.5, phase=0),
    "clip": lambda batch, **to: cell_running(batch, GRID, 0.75, phase=torch.arange(batch), **to),
    "place": lambda batch, **to: cell_running(batch, GRID, 0.25, phase=torch.arange(4 * batch).view(-1, 4), **to),
    "backwards": partial(cell_running, grid=GRID, ratio=0.625, cell=(4, 2, 1), phase=5, direction=-1),
    "bool": lambda batch, **to: from_bool(torch.arange(24 * batch, **to).view(-1, 24) % 3 > 0, num_visible=8),
    "bool 3D": lambda batch, **to: from_bool(torch.arange(24 * batch, **to).view(-1, 2, 3, 4) % 8 > 2, num_visible=9),
}
DRAWN = {
    "phase": partial(cell_running, grid=GRID, ratio=0.5),
    "phase of each cell": partial(cell_running, grid=GRID, ratio=0.5, spatial_repeat=False),
    "shuffle": partial(cell_running, grid=GRID, ratio=0.5, phase=0, temporal_shuffle=True),
    "recipe": partial(cell_running, grid=GRID, ratio=0.75, temporal_shuffle=True),
    **{name: partial(getattr(masking, name), grid=GRID, ratio=0.6) for name in ("random", "tube", "frame")},
}
from_bool = TokenMask.from_bool_masked
each_drawn = pytest.mark.parametrize("form", DRAWN.values(), ids=list(DRAWN))
each_form = pytest.mark.parametrize("form", (FIXED | DRAWN).values(), ids=[*FIXED, *DRAWN])
directions, seeds = st.sampled_from([1, -1]), st.integers(0, 2**32 - 1)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def indices(mask):
    return mask.keep_idx.tolist(), mask.drop_idx.tolist()


def assert_partition(mask, batch, grid, visible):
    tokens = math.prod(grid)
    assert (mask.batch, mask.num_visible, mask.num_tokens, mask.grid) == (batch, visible, tokens, tuple(grid))
    assert mask.keep_idx.dtype == mask.drop_idx.dtype == torch.int32
    assert mask.keep_idx.shape == (batch, visible) and mask.drop_idx.shape == (batch, tokens - visible)
    for keep, drop in zip(*indices(mask), strict=True):
        assert keep == sorted(keep) and drop == sorted(drop) and sorted(keep + drop) == list(range(tokens))


def assert_even(counts, total, share):
    """Every count is binomial(total, share) to within 6 standard deviations."""
    assert (counts - total * share).abs().max() <= 6 * math.sqrt(total * share * (1 - share))


def naive(grid, cell, count, direction, phases):
    """The definition for one clip, token by token: (T', H', W') bool, phases in (row, column) order of the cells."""
    slots, columns = math.prod(cell), grid[2] // cell[2]
    masked = np.zeros(grid, dtype=bool)
    for t, y, x in itertools.product(*map(range, grid)):
        slot = ((t % cell[0]) * cell[1] + y % cell[1]) * cell[2] + x % cell[2]
        phase = int(phases[y // cell[1] * columns + x // cell[2]])
        masked[t, y, x] = (slot - direction * (t // cell[0]) - phase) % slots < count
    return masked


def slabs(masked, length, shuffled):
    """A (T', H', W') mask cut along time into cells, sorted where their order is left to chance."""
    parts = np.asarray(masked).reshape(len(masked) // length, -1).tolist()
    return sorted(parts) if shuffled else parts


def by_slot(mask, cell):
    """(B, steps, places, slots) bool."""
    (t, h, w), (ct, ch, cw) = mask.grid, cell
    split = mask.bool_masked().reshape(mask.batch, t // ct, ct, h // ch, ch, w // cw, cw)
    return split.permute(0, 1, 3, 5, 2, 4, 6).reshape(mask.batch, t // ct, -1, ct * ch * cw)


@st.composite
def cases(draw, longest=3):
    """A cell, its number of slots, how many of them are masked, and a grid that the cell divides."""
    cell = draw(st.tuples(st.integers(1, longest), st.integers(1, 3), st.integers(1, 3)))
    repeats = draw(st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3)))
    slots = math.prod(cell)
    return cell, slots, draw(st.integers(0, slots - 1)), tuple(np.multiply(cell, repeats).tolist())


def test_hand_written():
    """True is masked; at 50 %, frame 0 masks slots 0 and 1, frame 1 masks 1 and 2, and so on."""
    assert indices(from_bool(torch.tensor([[True, False, False, True]]))) == ([[1, 2]], [[0, 3]])
    assert cell_running(1, (4, 2, 2), 0.5, phase=0).drop_idx.tolist() == [[0, 1, 5, 6, 10, 11, 12, 15]]


@given(cases(), st.integers(0, 3), directions, st.booleans(), seeds, st.data())
def test_given_phases_follow_the_definition(case, batch, direction, shuffled, seed, data):
    cell, slots, count, grid = case
    places = grid[1] // cell[1] * (grid[2] // cell[2])
    shape = data.draw(st.sampled_from([(), (batch,), (batch, places)]))
    phase = data.draw(arrays(st.sampled_from([np.int64, np.int32, np.int8]), shape, elements=st.integers(-100, 100)))
    before, generator = torch.get_rng_state(), seeded(seed)
    options = dict(cell=cell, direction=direction, temporal_shuffle=shuffled, generator=generator)
    mask = cell_running(batch, grid, count / slots, phase=torch.from_numpy(phase) if shape else int(phase), **options)
    # The torch generator is never drawn from, the given one for a shuffle only.
    assert torch.equal(torch.get_rng_state(), before)
    assert shuffled or torch.equal(generator.get_state(), seeded(seed).get_state())
    assert_partition(mask, batch, grid, math.prod(grid) * (slots - count) // slots)
    phases = np.broadcast_to(phase[:, None] if len(shape) == 1 else phase, (batch, places))
    for clip, row in zip(mask.bool_masked().reshape(batch, *grid), phases, strict=True):
        assert slabs(clip, cell[0], shuffled) == slabs(naive(grid, cell, count, direction, row), cell[0], shuffled)


@given(cases(), st.integers(0, 2), directions, st.booleans(), st.booleans(), seeds)
def test_drawn_phases_follow_the_definition(case, batch, direction, repeat, shuffled, seed):
    """Some phase explains the whole clip, or each cell of it where each has its own."""
    cell, slots, count, grid = case
    rows, columns = grid[1] // cell[1], grid[2] // cell[2]
    options = dict(cell=cell, direction=direction, temporal_shuffle=shuffled, spatial_repeat=repeat)
    mask = cell_running(batch, grid, count / slots, generator=seeded(seed), **options)
    assert_partition(mask, batch, grid, math.prod(grid) * (slots - count) // slots)
    regions = mask.bool_masked().reshape(batch, *grid)
    if not repeat:
        regions = torch.cat([part for row in regions.chunk(rows, 2) for part in row.chunk(columns, 3)])
    fit = partial(naive, regions.shape[1:], cell, count, direction)
    fits = [slabs(fit([phase] * rows * columns), cell[0], shuffled) for phase in range(slots)]
    assert all(slabs(region, cell[0], shuffled) in fits for region in regions)


@given(cases(longest=1), st.integers(0, 3), directions, st.booleans(), seeds)
def test_every_place_is_seen_in_turn(case, more, direction, repeat, seed):
    cell, slots, count, (_, *space) = case
    options = dict(cell=cell, direction=direction, spatial_repeat=repeat, generator=seeded(seed))
    visible = ~cell_running(2, (slots + more, *space), count / slots, **options).bool_masked().view(2, slots + more, -1)
    assert (visible.unfold(1, slots, 1).sum(-1) == slots - count).all()


@pytest.mark.parametrize(("count", "repeat"), list(itertools.product(range(4), (True, False))))
def test_every_place_is_seen_after_a_shuffle(count, repeat):
    mask = cell_running(64, (8, 4, 6), count / 4, temporal_shuffle=True, spatial_repeat=repeat, generator=seeded(0))
    assert ((~mask.bool_masked()).reshape(64, 8, -1).sum(1) == 2 * (4 - count)).all()


@given(cases(), st.integers(-30, 30), directions)
def test_a_phase_rolls_slots_and_time(case, phase, direction):
    cell, slots, count, (_, *space) = case
    run = partial(cell_running, 1, (slots * cell[0], *space), count / slots, cell=cell, direction=direction)
    start, moved = by_slot(run(phase=0), cell), by_slot(run(phase=phase), cell)
    assert torch.equal(moved, start.roll(phase, 3)) and torch.equal(moved, start.roll(-direction * phase, 1))


def test_drawn_phases_are_even_and_independent():
    def phases(**options):  # with one masked slot, frame 0 masks the slot whose number is the phase
        mask = cell_running(4000, (2, 4, 4), 0.25, generator=seeded(0), **options)
        return by_slot(mask, (1, 2, 2))[:, 0].long().argmax(-1)

    whole, single = phases(), phases(spatial_repeat=False)
    assert (whole == whole[:, :1]).all()
    assert_even(whole[:, 0].bincount(minlength=4), 4000, 1 / 4)
    assert_even((single[:, :, None] == torch.arange(4)).sum(0), 4000, 1 / 4)
    equal = (single[:, :, None] == single[:, None]).sum(0)
    assert_even(equal[~torch.eye(4, dtype=torch.bool)], 4000, 1 / 4)


def test_shuffles_are_even_and_of_each_clip():
    mask = cell_running(4000, (8, 2, 4), 1 / 8, cell=(1, 2, 4), phase=0, temporal_shuffle=True, generator=seeded(0))
    order = by_slot(mask, (1, 2, 4))[:, :, 0].long().argmax(-1)  # one masked slot of eight: its number is the step
    assert torch.equal(order.sort(1).values, torch.arange(8).expand(4000, 8))
    assert_even((order[:, :, None] == torch.arange(8)).sum(0), 4000, 1 / 8)
    assert len(order.unique(dim=0)) > 3600  # of 40320 orders, 4000 draws hit about 3800


# The masks that users compare with: the part of (B, T', H', W') that is drawn, which the rest repeats
PARTS = {"random": np.s_[:], "tube": np.s_[:, :1], "frame": np.s_[:, :, :1, :1]}


@pytest.mark.parametrize("kind", PARTS)
@given(st.integers(0, 3), st.tuples(*[st.integers(1, 6)] * 3), st.integers(0, 99), seeds)
@example(1, (100, 10, 10), 29, 0)  # 0.29 * 100 is below 29 in floating point
def test_counts_are_the_floor(kind, batch, grid, percent, seed):
    mask = getattr(masking, kind)(batch, grid, percent / 100, generator=seeded(seed))
    masked = mask.bool_masked().reshape(batch, *grid)
    assert torch.equal(masked, masked[PARTS[kind]].expand_as(masked))
    drawn = masked[PARTS[kind]].flatten(1)
    total, count = drawn.shape[1], percent * drawn.shape[1] // 100
    assert (drawn.sum(1) == count).all()
    assert_partition(mask, batch, grid, math.prod(grid) // total * (total - count))


@pytest.mark.parametrize("kind", PARTS)
def test_all_choices_are_equally_likely(kind):
    """Each unit alone and each pair of units: runs of neighbours would pass the first only."""
    mask = getattr(masking, kind)(4000, (4, 3, 4), 0.5, generator=seeded(0))
    drawn = mask.bool_masked().reshape(4000, 4, 3, 4)[PARTS[kind]].flatten(1).double()
    together, total = drawn.T @ drawn, drawn.shape[1]
    assert_even(together.diagonal(), 4000, 1 / 2)
    assert_even(together[~torch.eye(total, dtype=torch.bool)], 4000, (total / 2 - 1) / (total - 1) / 2)


@each_drawn
def test_draws_follow_the_generator_alone(form):
    before, generator = torch.get_rng_state(), seeded(3)
    first, second = indices(form(8, generator=generator)), indices(form(8, generator=generator))
    assert first == indices(form(8, generator=seeded(3))) and first != second
    assert first != indices(form(8, generator=seeded(4)))
    assert torch.equal(torch.get_rng_state(), before)
    assert with_seed(5, form, 8) == with_seed(5, form, 8) != with_seed(6, form, 8)


@given(st.sampled_from([(7,), (30,), (1, 1, 1), (2, 3, 4)]), st.integers(0, 3), st.floats(0, 1), st.booleans(), seeds)
def test_bool_masks_go_round(grid, batch, share, told, seed):
    tokens = math.prod(grid)
    visible = round(share * tokens) if told or batch else tokens  # nothing tells the count of no clips
    flat = np.random.default_rng(seed).permuted(np.tile(np.arange(tokens) >= visible, (batch, 1)), axis=1)
    mask = from_bool(torch.from_numpy(flat).reshape(batch, *grid), num_visible=visible if told else None)
    assert_partition(mask, batch, grid, visible)
    assert mask.keep_idx.tolist() == [np.flatnonzero(~row).tolist() for row in flat]  # True = masked
    assert np.array_equal(mask.bool_masked().numpy(), flat)


@pytest.mark.parametrize("mask", [FIXED["place"](2), TokenMask.ragged(torch.rand(3, *GRID) > 0.5)])
def test_to_keeps_everything_but_the_device(mask):
    assert torch.equal(mask.to("cpu").bool_masked(), mask.bool_masked())
    moved = mask.to("meta")
    tensors = [value for value in (moved.keep_idx, moved.drop_idx, moved.cu_seqlens) if value is not None]
    assert len(tensors) == (2 if mask.cu_seqlens is None else 3) and all(value.is_meta for value in tensors)
    for name in ("grid", "max_seqlen", "batch", "total_visible", "num_tokens"):
        assert getattr(moved, name) == getattr(mask, name)


# Besides the calls of test_errors.py.
i32, three = partial(torch.tensor, dtype=torch.int32), partial(TokenMask, grid=(3,))
HALF, running = torch.tensor([[True, False], [False, True]]), partial(cell_running, 2, GRID, 0.5)
REFUSED = [
    ("keep_idx", three, i32([[0, 1], [1, 0]]), i32([[2], [2]])), ("drop_idx", three, i32([[0]]), i32([[2, 1]])),
    ("keep_idx", three, i32([[0, 0]]), i32([[1]])), ("drop_idx", three, i32([[0]]), i32([[1], [2]])),
    ("keep_idx", three, i32([0]), i32([[1, 2]])), ("drop_idx", three, i32([[0, 1]]), i32([[-1]])),
    ("keep_idx", three, i32([[0]]).long(), i32([[1, 2]])), ("drop_idx", three, i32([[0]]), i32([[1, 2]]).float()),
    ("grid", TokenMask, i32([[0]]), i32([[1, 2]]), (1, 3)), ("ratio", masking.tube, 2, GRID, -0.1),
    ("num_visible", partial(from_bool, num_visible=3), HALF.to("meta")), ("cell", partial(running, cell=(0, 2, 2))),
    ("grid", cell_running, 2, (8, 4), 0.5), ("grid", masking.frame, 2, (0, 4, 4), 0.5),
    ("phase", partial(running, phase=torch.zeros(2))), ("phase", partial(running, phase=HALF[0])),
]  # fmt: skip


@pytest.mark.parametrize("row", REFUSED, ids=[f"{i}-{row[0]}" for i, row in enumerate(REFUSED)])
def test_the_message_names_the_argument(row):
    named, call, *arguments = row
    with pytest.raises((TypeError, ValueError), match=f"^{named}: got"):
        call(*arguments)


@pytest.mark.compiles
@pytest.mark.parametrize(("device", "mode"), [("meta", nullcontext), ("cpu", FakeTensorMode)], ids=["meta", "fake"])
@each_form
def test_shapes_without_data(form, device, mode):
    real = form(2)
    with mode():
        bare = form(2, device=device)
    assert bare.keep_idx.device.type == bare.drop_idx.device.type == device
    for name in ("batch", "num_visible", "num_tokens", "grid"):
        assert getattr(bare, name) == getattr(real, name)


def with_seed(seed, build, *args):
    torch.manual_seed(seed)
    return indices(build(*args))


@pytest.mark.compiles
@each_form
def test_compiled_equals_eager(form):
    torch._dynamo.reset()
    compiled = torch.compile(lambda video: form(len(video)), fullgraph=True, backend="eager")
    for batch in (2, 3, 5):  # from the second on, the batch is a symbol
        assert with_seed(7, compiled, torch.zeros(batch, 1)) == with_seed(7, form, batch)


@pytest.mark.gpu
@each_form
def test_nothing_waits_for_a_gpu(form):
    form(2, device="cuda")  # loads the kernels, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        form(2, device="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
