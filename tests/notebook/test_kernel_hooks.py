"""What the extension changes in a kernel and restores: nested loops, and errors as one line."""

from __future__ import annotations

import asyncio
import asyncio.tasks
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import nest_asyncio2
import pytest

from sollol_nb.errors import CoordinatorLostError, SollolError
from sollol_nb.notebook import kernel_hooks
from sollol_nb.runtime.io_loop import io_bound, io_loop, run_blocking

T = TypeVar("T")


async def give_one() -> int:
    await asyncio.sleep(0)
    return 1


async def in_a_cell() -> int:
    """Code of a user, in a kernel whose loop runs already."""
    return asyncio.run(give_one()) + asyncio.get_running_loop().run_until_complete(give_one())


def in_kernel(cell: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a cell as with the extension loaded: inside a running loop."""

    async def kernel() -> T:
        kernel_hooks.allow_nested_loops()
        try:
            return await cell()
        finally:
            kernel_hooks.forbid_nested_loops()

    return asyncio.run(kernel())


def owners() -> list[Any]:
    """What nest_asyncio patches."""
    loop = asyncio.new_event_loop()
    loop.close()
    policy = type(asyncio.get_event_loop_policy())
    return [asyncio, asyncio.events, asyncio.futures, asyncio.tasks, *type(loop).__mro__[:-1], policy]


def patchable() -> list[dict[str, Any]]:
    """The attributes of all that can be patched."""
    return [dict(vars(owner)) for owner in owners()]


def restore(before: list[dict[str, Any]]) -> None:
    """Undo what a user would leave."""
    for owner, attributes in zip(owners(), before, strict=True):
        for name in set(vars(owner)) - set(attributes):
            delattr(owner, name)
        for name, value in attributes.items():
            if vars(owner)[name] is not value:
                setattr(owner, name, value)


def test_asyncio_run_works_in_a_running_loop() -> None:
    assert in_kernel(in_a_cell) == 2


def test_the_package_works_in_a_nested_run() -> None:
    @io_bound
    async def where() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    async def cell() -> tuple[asyncio.AbstractEventLoop, int]:
        return asyncio.run(where()), run_blocking(give_one())

    assert in_kernel(cell) == (io_loop(), 1)


def test_without_the_hook_a_running_loop_refuses() -> None:
    async def cell() -> None:
        work = give_one()
        with pytest.raises(RuntimeError, match="running event loop"):
            asyncio.run(work)
        work.close()

    asyncio.run(cell())


def test_everything_is_restored() -> None:
    async def kernel() -> None:
        io_loop()
        before = patchable()
        kernel_hooks.allow_nested_loops()
        kernel_hooks.allow_nested_loops()
        during = patchable()
        kernel_hooks.forbid_nested_loops()
        kernel_hooks.forbid_nested_loops()

        assert during != before
        for now, then in zip(patchable(), before, strict=True):
            assert now == then

    asyncio.run(kernel())
    assert asyncio.run(give_one()) == 1


def test_nesting_can_be_allowed_and_forbidden_repeatedly() -> None:
    for _ in range(3):
        assert in_kernel(in_a_cell) == 2
        assert asyncio.run(give_one()) == 1


def test_the_users_own_nesting_outlives_the_extension() -> None:
    async def kernel() -> list[int]:
        kernel_hooks.allow_nested_loops()
        nest_asyncio2.apply()
        kernel_hooks.forbid_nested_loops()
        after = await in_a_cell()
        kernel_hooks.allow_nested_loops()  # it is the user's now
        kernel_hooks.forbid_nested_loops()
        return [after, await in_a_cell()]

    before = patchable()
    try:
        assert asyncio.run(kernel()) == [2, 2]
    finally:
        restore(before)
    assert asyncio.run(give_one()) == 1


class ForeignLoop(asyncio.AbstractEventLoop):
    """A loop that is not of the standard library, such as uvloop's."""

    def close(self) -> None:
        """Nothing."""


class ForeignPolicy(asyncio.DefaultEventLoopPolicy):
    """As uvloop sets one."""

    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return ForeignLoop()


def test_a_loop_that_cannot_be_nested_is_left_alone() -> None:
    before, policy = patchable(), asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(ForeignPolicy())
    try:
        assert kernel_hooks.allow_nested_loops() == "", "no loop runs, as in a terminal: asyncio.run works"
        asyncio.events._set_running_loop(ForeignLoop())
        hint = kernel_hooks.allow_nested_loops()
        assert "ForeignLoop cannot be nested; use await instead" in hint
        asyncio.events._set_running_loop(None)
        asyncio.set_event_loop_policy(policy)
        asyncio.set_event_loop(ForeignLoop())
        assert kernel_hooks.allow_nested_loops() == ""
    finally:
        asyncio.events._set_running_loop(None)
        asyncio.set_event_loop_policy(policy)
        asyncio.set_event_loop(None)
    assert patchable() == before
    assert asyncio.run(give_one()) == 1


@pytest.fixture
def short_errors() -> Iterator[None]:
    kernel_hooks.shorten_errors(lambda: True)
    yield
    kernel_hooks.restore_errors()


@pytest.mark.usefixtures("short_errors")
def test_errors_of_the_package_render_as_one_line() -> None:
    error: Any = CoordinatorLostError("the coordinator of demo ended")

    assert error._render_traceback_() == ["\x1b[31mCoordinatorLostError\x1b[0m: the coordinator of demo ended"]


def test_whole_tracebacks_come_back() -> None:
    kernel_hooks.shorten_errors(lambda: True)
    kernel_hooks.restore_errors()
    kernel_hooks.restore_errors()

    assert not hasattr(SollolError("x"), "_render_traceback_")
    assert not hasattr(ValueError("x"), "_render_traceback_")


def test_in_a_notebook_the_commands_in_an_error_are_shown_as_code() -> None:
    kernel_hooks.shorten_errors(lambda: True, with_style=True)
    try:
        error: Any = SollolError("no node; run `ollama serve`, or use `demo`")
        (line,) = error._render_traceback_()
    finally:
        kernel_hooks.restore_errors()
    chip = "\x1b[38;2;28;28;28;48;2;236;236;236m{}\x1b[0m"
    commands = [chip.format(command) for command in ("ollama serve", "demo")]
    assert line == "\x1b[1mSollolError\x1b[0m: no node; run {}, or use {}".format(*commands)
