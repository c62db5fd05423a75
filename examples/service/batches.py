"""Rows that were asked for one by one, computed together."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from loraformat_converters.onnx.runtime import Session

Row = Mapping[str, np.ndarray]


class BusyError(Exception):
    """As many rows wait as may wait: ask again later."""


@dataclass(frozen=True, eq=False)
class Asked:
    """One row: who adapts it, and where its answer is awaited."""

    adapter: str | None
    inputs: Row
    answer: asyncio.Future[Row]

    @property
    def like(self) -> tuple[object, ...]:
        """Equal for rows that fit into one batch."""
        return tuple((name, values.shape, values.dtype) for name, values in sorted(self.inputs.items()))


class Batches:
    """Runs of a stack, each with an adapter for every row.

    Args:
        session: of a stack whose rows lie along the first axis.
        wait: seconds for which a first row waits for others.
        most: rows of a run.
        waiting: rows that may wait; one more is ``BusyError``.
    """

    def __init__(self, session: Session, *, wait: float = 0.005, most: int = 32, waiting: int = 1024) -> None:
        if not session.rows or any(session.rows.values()):
            raise ValueError("a model by attach --mode stack is served, whose --rows lie along the first axis")
        self.session, self.wait, self.most, self.runs = session, wait, most, 0
        self._asked: asyncio.Queue[Asked] = asyncio.Queue(waiting)

    async def row(self, adapter: str | None, inputs: Row) -> Row:
        """Output name → values of this row. Who stops waiting is not computed for, if that has not begun."""
        self.session.use([adapter])  # LF-705 here, for this caller alone
        asked = Asked(adapter, inputs, asyncio.get_running_loop().create_future())
        try:
            self._asked.put_nowait(asked)
        except asyncio.QueueFull:
            raise BusyError from None
        return await asked.answer

    async def work(self) -> None:
        """Compute what is asked for, for ever."""
        while True:
            first = await self._asked.get()
            await asyncio.sleep(self.wait)
            batch = [first]
            while len(batch) < self.most and not self._asked.empty():
                batch.append(self._asked.get_nowait())
            alike: dict[object, list[Asked]] = {}
            for asked in batch:
                if not asked.answer.done():
                    alike.setdefault(asked.like, []).append(asked)
            for rows in alike.values():
                await self._answer(rows)

    async def _answer(self, rows: Sequence[Asked]) -> None:
        """Nothing that goes wrong with these ends the work for others."""
        self.runs += 1
        try:
            found = await asyncio.to_thread(self._computed, rows)
        except Exception as error:  # onnxruntime raises a dozen classes of its own, without a common one
            if len(rows) > 1:  # an index beyond a table, say: it is one row's mistake
                for asked in rows:
                    await self._answer([asked])
            elif not rows[0].answer.done():
                rows[0].answer.set_exception(ValueError(str(error)))
            return
        for asked, own in zip(rows, found, strict=True):
            if not asked.answer.done():
                asked.answer.set_result(own)

    def _computed(self, rows: Sequence[Asked]) -> list[Row]:
        feeds = {name: np.stack([asked.inputs[name] for asked in rows]) for name in rows[0].inputs}
        found = self.session.use([asked.adapter for asked in rows]).run(feeds)
        if strange := [name for name, values in found.items() if values.shape[:1] != (len(rows),)]:
            raise ValueError(f"the output {strange[0]} has no entry for each row")
        return [{name: values[i] for name, values in found.items()} for i in range(len(rows))]
