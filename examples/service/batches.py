"""Rows that were asked for one by one, computed together."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from loraformat_converters.onnx.runtime import Session

Row = Mapping[str, np.ndarray]


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
        wait: seconds for which a first row waits for others.
        most: rows of a run.
    """

    def __init__(self, session: Session, *, wait: float = 0.005, most: int = 32) -> None:
        self.session, self.wait, self.most, self.runs = session, wait, most, 0
        self._asked: asyncio.Queue[Asked] = asyncio.Queue()

    async def row(self, adapter: str | None, inputs: Row) -> Row:
        """Output name → values of this row."""
        self.session.use([adapter])  # LF-705 here, for this caller alone
        asked = Asked(adapter, inputs, asyncio.get_running_loop().create_future())
        await self._asked.put(asked)
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
                alike.setdefault(asked.like, []).append(asked)
            for rows in alike.values():
                await self._answer(rows)

    async def _answer(self, rows: Sequence[Asked]) -> None:
        feeds = {name: np.stack([asked.inputs[name] for asked in rows]) for name in rows[0].inputs}
        chosen = self.session.use([asked.adapter for asked in rows])
        self.runs += 1
        try:
            found = await asyncio.to_thread(chosen.run, feeds)
        except Exception as error:  # onnxruntime raises a dozen classes of its own, without a common one
            if len(rows) > 1:  # an index beyond a table, say: it is one row's mistake
                for asked in rows:
                    await self._answer([asked])
            elif not rows[0].answer.cancelled():
                rows[0].answer.set_exception(ValueError(str(error)))
            return
        for i, asked in enumerate(rows):
            if not asked.answer.cancelled():
                asked.answer.set_result({name: values[i] for name, values in found.items()})
