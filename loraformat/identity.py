"""The content digest: equal for adapters that do the same, whatever file, base binding or notes they came with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from loraformat import canonical, progress
from loraformat.dtypes import dtype_name
from loraformat.metadata import part_json
from loraformat.parts import roles_of
from loraformat.serializer import raw, slabs

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.adapter import Adapter
    from loraformat.updates import Update

__all__ = ["digest", "digesting", "runs_sha256", "tensor_sha256"]


def digest(adapter: Adapter) -> str:
    """SHA-256, in hexadecimal, over the canonical JSON of key → parts, each part with its fields and its roles.

    A role counts as {dtype, shape, SHA-256 of its little-endian bytes}. Placement, sketches, base_sha256,
    base_model, about, provenance and extensions do not count: binding an adapter to a base keeps its digest.
    """
    return _of({key: _content(update) for key, update in adapter.items()})


@contextmanager
def digesting(adapter: Adapter) -> Iterator[Callable[[], str]]:
    """The digest, which is worked out in a thread of its own while something else is done inside."""
    from concurrent.futures import ThreadPoolExecutor  # takes 10 ms to import

    pool = ThreadPoolExecutor(1)
    try:
        content = {key: pool.submit(_content, update) for key, update in adapter.items()}
        yield lambda: _of({key: found.result() for key, found in content.items()})
    finally:
        pool.shutdown(cancel_futures=True)  # whoever was interrupted waits for one target at most


def _content(update: Update) -> list[dict[str, Any]]:
    return [part_json(part) | {"roles": {role: _role(t) for role, t in roles_of(part)}} for part in update.parts]


def _of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical.dumps(content).encode()).hexdigest()


def tensor_sha256(tensor: npt.NDArray[Any]) -> str:
    """SHA-256 of a tensor's row-major little-endian bytes."""
    return runs_sha256(slabs(tensor))


def runs_sha256(runs: Iterable[npt.NDArray[Any]]) -> str:
    """SHA-256 of a tensor's row-major little-endian bytes, which come in runs of its rows."""
    total = hashlib.sha256()
    for run in runs:
        total.update(raw(run))
        progress.advance(run.nbytes)
    return total.hexdigest()


def _role(tensor: npt.NDArray[Any]) -> dict[str, Any]:
    return {"dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape), "sha256": tensor_sha256(tensor)}
