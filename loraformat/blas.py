"""One thread for numpy's BLAS, while we multiply by a rank of 16 and have threads of our own.

Its threads would meet after every such product: on two busy cores that made a merge of 1.7 GB take 40 seconds of
processor time instead of 4 (OpenBLAS 0.3.31).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from threadpoolctl import threadpool_limits

__all__ = ["one_blas_thread"]


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """A block, or as a decorator a function, during which BLAS works in the thread that calls it."""
    with threadpool_limits(1, "blas"):
        yield
