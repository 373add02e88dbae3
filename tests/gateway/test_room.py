"""Room: bounds, fair turns, and waiters that give up at any moment."""

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.room import Bound, Room
from tests.waiting import PATIENCE_S


async def turn() -> None:
    """Let every task that can go on do so."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_bounds() -> None:
    room = Room(per_tenant=10, total=15)
    assert room.enter_nowait(1, 10)
    assert room.blocked(1, 1) is Bound.TENANT
    assert not room.enter_nowait(1, 1)
    assert room.enter_nowait(2, 5)
    assert room.blocked(3, 1) is Bound.GATEWAY
    room.leave(1, 10)
    room.leave(2, 5)
    assert room.used == 0


async def test_a_message_above_every_bound_enters_alone() -> None:
    room = Room(per_tenant=10, total=15)
    assert room.enter_nowait(1, 100)
    entering = asyncio.create_task(room.enter(2, 100))
    await turn()
    assert not entering.done()
    room.leave(1, 100)
    await entering
    assert room.used == 100


async def test_empty_messages_leave_as_they_came() -> None:
    room = Room(per_tenant=10, total=15)
    for _ in range(3):
        assert room.enter_nowait(1, 0)
    for _ in range(3):
        room.leave(1, 0)
    assert room.used == 0


async def test_tenants_take_turns() -> None:
    room = Room(per_tenant=100, total=1)
    assert room.enter_nowait(9, 1)
    entered: list[int] = []

    async def go(tenant: int) -> None:
        await room.enter(tenant, 1)
        entered.append(tenant)

    # A crowd of one tenant first, then one message of each other.
    tasks = [asyncio.create_task(go(1)) for _ in range(4)]
    await turn()
    tasks += [asyncio.create_task(go(2)), asyncio.create_task(go(3))]
    await turn()
    leaving = 9
    for _ in range(6):
        room.leave(leaving, 1)
        await turn()
        leaving = entered[-1]
    assert entered == [1, 2, 3, 1, 1, 1]
    await asyncio.gather(*tasks)


async def test_small_messages_do_not_overtake_a_large_one() -> None:
    room = Room(per_tenant=100, total=100)
    assert room.enter_nowait(1, 60)
    assert room.enter_nowait(1, 40)
    large = asyncio.create_task(room.enter(2, 90))
    await turn()
    room.leave(1, 40)
    # There would be room for it, and for the next, and the large one would wait for ever.
    assert room.blocked(3, 10) is None
    assert not room.enter_nowait(3, 10)
    room.leave(1, 60)
    await large
    assert room.enter_nowait(3, 10)


async def test_one_tenants_bound_does_not_stop_another() -> None:
    room = Room(per_tenant=10, total=100)
    assert room.enter_nowait(1, 10)
    waiting = asyncio.create_task(room.enter(1, 5))
    await turn()
    assert room.enter_nowait(2, 10)
    room.leave(1, 10)
    await waiting


async def test_who_gives_up_holds_nobody_back() -> None:
    room = Room(per_tenant=100, total=100)
    assert room.enter_nowait(1, 50)
    large = asyncio.create_task(room.enter(2, 90))
    await turn()
    small = asyncio.create_task(room.enter(3, 10))
    await turn()
    assert not small.done()
    large.cancel()
    await asyncio.wait({large})
    await asyncio.wait_for(small, PATIENCE_S)
    assert room.used == 60


@pytest.mark.parametrize("order", ["cancel first", "leave first"])
async def test_a_cancellation_and_the_room_in_the_same_moment(order: str) -> None:
    room = Room(per_tenant=10, total=10)
    assert room.enter_nowait(1, 10)
    waiting = asyncio.create_task(room.enter(1, 10))
    await turn()
    # Neither the waiter nor its cleaning up runs between the two.
    if order == "cancel first":
        waiting.cancel()
        room.leave(1, 10)
    else:
        room.leave(1, 10)
        waiting.cancel()
    await asyncio.wait({waiting})
    assert waiting.cancelled()
    assert room.used == 0
    assert room.enter_nowait(1, 10)


STEPS = st.lists(
    st.tuples(st.sampled_from(["enter", "leave", "cancel", "turn"]), st.integers(1, 3), st.integers(0, 12)),
    max_size=80,
)


@given(STEPS)
def test_any_order_of_events_keeps_the_bounds_and_strands_nobody(steps: list[tuple[str, int, int]]) -> None:
    async def run() -> None:
        room = Room(per_tenant=8, total=12)
        tasks: list[tuple[asyncio.Task[None], int, int]] = []
        left: set[asyncio.Task[None]] = set()

        def inside() -> list[tuple[asyncio.Task[None], int, int]]:
            return [one for one in tasks if one[0].done() and not one[0].cancelled() and one[0] not in left]

        for what, tenant, size in steps:
            if what == "enter":
                tasks.append((asyncio.create_task(room.enter(tenant, size)), tenant, size))
            elif what == "leave" and (found := inside()):
                task, owner, weight = found[size % len(found)]
                left.add(task)
                room.leave(owner, weight)
            elif what == "cancel" and tasks:
                tasks[size % len(tasks)][0].cancel()
            else:
                await turn()
            used: Counter[int] = Counter()
            for _, owner, weight in inside():
                used[owner] += weight
            for one, total in used.items():
                alone = sum(1 for _, other, weight in inside() if other == one and weight) == 1
                assert total <= 8 or alone
        # Everybody gets in, as those inside leave.
        for _ in range(len(tasks) * 2 + 1):
            await turn()
            for task, tenant, size in inside():
                left.add(task)
                room.leave(tenant, size)
        assert all(task.done() for task, _, _ in tasks)
        assert room.used == 0
        assert not room._shares

    asyncio.run(run())
