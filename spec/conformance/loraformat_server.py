"""The reference implementation behind the protocol of appendix B: ``python run.py python loraformat_server.py``."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from loraformat import file
from loraformat.errors import LoraFormatError, fault
from loraformat.identity import digest, tensor_sha256
from loraformat.values import value_problems

Reply = dict[str, Any]
Array = np.ndarray[Any, np.dtype[Any]]


def validate(path: str) -> Reply:
    """Every problem of a file."""
    try:
        adapter, problems = file.read(path)
    except LoraFormatError as error:
        return {"problems": [problem.as_json() for problem in error.problems]}
    return {"problems": [problem.as_json() for problem in [*problems, *value_problems(adapter)]]}


def matrix(path: str, key: str) -> Reply:
    """The sum of the additive parts of a target."""
    return _numbers(file.read(path)[0][key].matrix())


def apply(path: str, key: str, base: Reply | None) -> Reply:
    """A base tensor as the target changes it."""
    update, tensor = file.read(path)[0][key], _array(base)
    if tensor is not None and update.placement and tensor.shape == update.placement.shape:
        if update.base_sha256:
            found = tensor_sha256(tensor)
            if found != update.base_sha256:
                raise fault("LF-607", f"bound to {update.base_sha256}, the base has {found}", where=key)
        elif update.sketch is not None and update.sketch.any():
            from loraformat.likeness import unlike
            from loraformat.sketch import sketch

            drawn = sketch(tensor, update.placement)
            if drawn is not None and (problem := unlike(key, update.sketch, drawn, "the base's tensor")):
                raise LoraFormatError([problem])
    return _numbers(update.apply(tensor))


def roundtrip(path: str, out: str) -> Reply:
    """Read and written again."""
    file.save(file.read(path)[0], out, force=True)
    return {}


def sketch(path: str, key: str, base: Reply) -> Reply:
    """The sketch of a base tensor."""
    from loraformat import sketch as sketches

    update, tensor = file.read(path)[0][key], _array(base)
    if tensor is None or update.placement is None:
        raise fault("LF-604", "a sketch needs a placed base tensor", where=key)
    return _numbers(sketches.sketch(tensor, update.placement))


OPERATIONS: dict[str, Callable[..., Reply]] = {
    "validate": validate,
    "digest": lambda path: {"digest": digest(file.read(path)[0])},
    "matrix": matrix,
    "apply": apply,
    "roundtrip": roundtrip,
}
if importlib.util.find_spec("loraformat.sketch"):
    OPERATIONS["sketch"] = sketch


def reply(request: Reply) -> Reply:
    """The answer to one request."""
    operation = OPERATIONS.get(request.pop("op"))
    if operation is None:
        return {"unsupported": True}
    try:
        return operation(**request)
    except LoraFormatError as error:
        return {"refused": sorted({problem.rule for problem in error.problems})}


def _array(told: Reply | None) -> Array | None:
    return None if told is None else np.array(told["values"], np.float32).reshape(told["shape"])


def _numbers(array: Array) -> Reply:
    return {"shape": list(array.shape), "values": array.reshape(-1).tolist()}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(reply(json.loads(line))), flush=True)
