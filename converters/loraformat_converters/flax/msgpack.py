"""flax's msgpack (flax 0.12.8 serialization.py): nested maps whose arrays are an extension type of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from loraformat.errors import fault

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["read", "write"]

_ARRAY, _SCALAR = 1, 3
_CHUNKED = "__msgpack_chunked_array__"
_FAULTS = (ValueError, TypeError, KeyError, AttributeError, RecursionError, MemoryError)
_MISSING = "reading msgpack needs the package msgpack"


def read(path: Path) -> dict[str, Array]:
    """Path → array, views of the file's bytes. LF-503: damaged, or leaves that are no arrays; LF-704: no msgpack."""
    import ml_dtypes  # noqa: F401  (numpy knows bfloat16 by its name once it is imported)

    library = _library()
    try:
        tree = library.unpackb(path.read_bytes(), ext_hook=_array, strict_map_key=False, raw=False)
    except OSError as error:
        raise fault("LF-701", f"cannot read {path}: {error.strerror or error}") from None
    except _FAULTS as error:  # msgpack's own are all of ValueError
        raise fault("LF-503", f"{path} is no tree that flax stores: {str(error) or type(error).__name__}") from None
    if not isinstance(tree, dict):
        raise fault("LF-503", f"{path} holds {type(tree).__name__}, no map of names to arrays")
    return dict(_leaves(tree, ()))


def write(file: BinaryIO, arrays: Mapping[str, Array]) -> None:
    """As ``flax.serialization.to_bytes`` writes the nested map."""
    from loraformat_converters.flax.tree import nested

    library = _library()
    file.write(library.packb(nested(arrays), default=_packed, strict_types=True))


def _library() -> Any:
    try:
        import msgpack
    except ImportError:
        raise fault("LF-704", _MISSING, fix="pip install 'loraformat[jax]'") from None
    return msgpack


def _packed(value: Any) -> Any:
    library = _library()
    array = np.ascontiguousarray(value)
    return library.ExtType(_ARRAY, library.packb((value.shape, array.dtype.name, array.tobytes())))


def _array(code: int, data: bytes) -> Any:
    if code not in (_ARRAY, _SCALAR):
        raise ValueError(f"an extension of type {code}")
    shape, name, values = _library().unpackb(data, raw=False)
    dtype = np.dtype(name.decode() if isinstance(name, bytes) else name)
    if dtype.hasobject:
        raise ValueError(f"an array of {name}")
    return np.frombuffer(values, dtype).reshape(shape)


def _leaves(tree: Mapping[Any, Any], path: tuple[str, ...]) -> Iterator[tuple[str, Array]]:
    for key, value in tree.items():
        here = (*path, str(key))
        if isinstance(value, dict) and _CHUNKED in value:
            yield "/".join(here), _joined(value, here)
        elif isinstance(value, dict):
            yield from _leaves(value, here)
        elif isinstance(value, np.ndarray):
            yield "/".join(here), value
        elif value is not None:
            raise fault("LF-503", f"a {type(value).__name__} is no array", where="/".join(here))


def _joined(value: Mapping[str, Any], path: tuple[str, ...]) -> Array:
    """An array beyond 2³⁰ bytes, which flax stores in pieces."""
    try:
        shape = [value["shape"][str(i)] for i in range(len(value["shape"]))]
        pieces = [value["chunks"][str(i)] for i in range(len(value["chunks"]))]
        return np.concatenate(pieces).reshape(shape)
    except (KeyError, TypeError, ValueError) as error:
        raise fault("LF-503", f"an array in pieces that do not fit: {error}", where="/".join(path)) from None
