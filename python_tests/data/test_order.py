"""The order of the samples: the same for any number of processes, entered anywhere."""

from __future__ import annotations

import pytest

from evit_ext.data.order import EvaluationOrder, Place, TrainOrder, epoch_order


def micro_batches(num_images: int, micro_batch: int, per_step: int, world_size: int, **more: int):
    """All micro-batches of an epoch, m = 0, 1, … of each step, put together over the processes."""
    accumulation = per_step // world_size
    start = {name: more.pop(name) for name in ("epoch", "first_step") if name in more}
    ranks = []
    for rank in range(world_size):
        order = TrainOrder(num_images, micro_batch, accumulation, rank, world_size, **more)
        order.start(**{"epoch": 0, **start})
        ranks.append(list(order))
        assert len(ranks[-1]) == len(order)
    return [
        ranks[rank][step * accumulation + turn]
        for step in range(len(ranks[0]) // accumulation)
        for turn in range(accumulation)
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_micro_batches_do_not_depend_on_the_number_of_processes(world_size: int) -> None:
    alone = micro_batches(100, 4, 6, 1, seed=3, epoch=2)
    assert micro_batches(100, 4, 6, world_size, seed=3, epoch=2) == alone
    assert len(alone) == 4 * 6 and all(len(batch) == 4 for batch in alone)


def test_positions_are_dealt_out_as_said() -> None:
    """s·G + m + M·j, against the formula itself."""
    batches = micro_batches(50, 3, 4, 2, seed=1, epoch=5)
    order = epoch_order(50, 1, 5).tolist()
    for number, batch in enumerate(batches):
        step, micro = divmod(number, 4)
        positions = [step * 12 + micro + 4 * j for j in range(3)]
        assert batch == [Place(5, position, order[position]) for position in positions]


def test_every_image_once_but_for_the_rest() -> None:
    seen = [place.image for batch in micro_batches(50, 3, 4, 2, seed=1) for place in batch]
    assert len(seen) == 48 and len(set(seen)) == 48 and set(seen) <= set(range(50))


def test_orders_differ_by_epoch_and_seed() -> None:
    orders = [epoch_order(100, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_entered_in_the_middle_an_epoch_is_its_rest() -> None:
    whole = micro_batches(100, 4, 6, 2)
    assert micro_batches(100, 4, 6, 2, first_step=3) == whole[18:]
    assert micro_batches(100, 4, 6, 2, first_step=4) == []


def test_repeats_come_in_a_row_and_the_epoch_keeps_its_size() -> None:
    plain, repeated = epoch_order(100, 7, 1).tolist(), epoch_order(100, 7, 1, repeats=3).tolist()
    assert repeated == [index for index in plain for _ in range(3)][:100]


def test_repeats_are_in_different_micro_batches() -> None:
    batches = micro_batches(60, 5, 3, 3, repeats=3)
    for batch in batches:
        images = [place.image for place in batch]
        assert len(set(images)) == len(images)
    assert {place.image for place in batches[0]} == {place.image for place in batches[1]}


def test_less_than_a_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match="11 images, fewer than the 12"):
        TrainOrder(11, 3, 4)
    assert TrainOrder(12, 3, 4).steps == 1


@pytest.mark.parametrize("first_step", [-1, 5])
def test_a_step_that_is_not_there_is_an_error(first_step: int) -> None:
    with pytest.raises(ValueError, match=rf"in \[0, 4\], got {first_step}"):
        TrainOrder(100, 4, 6).start(0, first_step)


@pytest.mark.parametrize("num_images", [1, 10, 11])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_takes_each_image_once(num_images: int, world_size: int) -> None:
    seen = []
    for rank in range(world_size):
        order = EvaluationOrder(num_images, 2, rank, world_size)
        batches = list(order)
        assert len(batches) == len(order)
        assert all(len(batch) == 2 for batch in batches[:-1])
        images = [place.image for batch in batches for place in batch]
        assert images == list(range(rank, num_images, world_size))
        seen += images
    assert sorted(seen) == list(range(num_images))
