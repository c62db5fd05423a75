"""POST /run: one row through the model, by an adapter of one's own; GET /adapters. See README.md."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import numpy as np
from batches import Batches, BusyError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from loraformat import LoraFormatError
from loraformat_converters.onnx.runtime import Session

T = TypeVar("T")

# ONNX Runtime's word → numpy's, and the kinds of JSON's numbers that it takes without losing anything.
TYPES = {
    "tensor(float)": (np.float32, "iuf"), "tensor(double)": (np.float64, "iuf"), "tensor(float16)": (np.float16, "iuf"),
    "tensor(int64)": (np.int64, "iu"), "tensor(int32)": (np.int32, "iu"), "tensor(bool)": (np.bool_, "b"),
}  # fmt: skip
MOST_BYTES, MOST_SECONDS = 8 << 20, 30.0  # of a request's body: how large it is, and how long it may take to come


def application(session: Session) -> Starlette:
    """The server of one model; KeyError where it has inputs of other types."""
    types = {v.name: TYPES[v.type] for v in session.inference.get_inputs() if not v.name.startswith("lora.")}

    @contextlib.asynccontextmanager
    async def running(app: Starlette) -> AsyncIterator[None]:
        app.state.batches = Batches(session)
        work = asyncio.create_task(app.state.batches.work())
        yield  # uvicorn has answered every request when it goes on here
        work.cancel()
        await asyncio.wait([work])

    async def run(request: Request) -> JSONResponse:
        try:
            asked: dict[str, Any] = json.loads(await body(request))
            inputs = {name: array(name, values, *types[name]) for name, values in asked["inputs"].items()}
            if missing := types.keys() - inputs:
                raise ValueError(f"no values for {', '.join(sorted(missing))}")
            found = await while_connected(request, request.app.state.batches.row(asked.get("adapter"), inputs))
        except BusyError:
            return JSONResponse({"error": "too many requests wait"}, 503, {"Retry-After": "1"})
        except (LoraFormatError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            return JSONResponse({"error": str(error)}, 400)
        if not all(np.isfinite(values).all() for values in found.values()):  # JSON has no word for them
            return JSONResponse({"error": "the model computed infinities or NaN"}, 500)
        return JSONResponse({"outputs": {name: values.tolist() for name, values in found.items()}})

    async def adapters(request: Request) -> JSONResponse:
        return JSONResponse(session.names)

    routes = [Route("/run", run, methods=["POST"]), Route("/adapters", adapters)]
    return Starlette(routes=routes, lifespan=running)


async def body(request: Request) -> bytes:
    """What a client sends, if it is not too much and comes in time."""
    held = bytearray()
    try:
        async with asyncio.timeout(MOST_SECONDS):
            async for chunk in request.stream():
                held += chunk
                if len(held) > MOST_BYTES:
                    raise HTTPException(413, f"a request has {MOST_BYTES:,} bytes at most")
    except TimeoutError:
        raise HTTPException(408) from None
    except ClientDisconnect:
        raise HTTPException(499) from None
    return bytes(held)


def array(name: str, values: Any, dtype: type, kinds: str) -> np.ndarray:
    """The values as the model takes them; ValueError where they are of another kind, or beyond the type."""
    given = np.asarray(values)
    if given.size and given.dtype.kind not in kinds:
        raise ValueError(f"{name} takes {np.dtype(dtype).name}, not {given.dtype.name}")
    with np.errstate(over="ignore"):
        made = given.astype(dtype)
    if not np.isfinite(made).all() or (made.dtype.kind == "i" and (made != given).any()):
        raise ValueError(f"a value of {name} is beyond {made.dtype.name}")
    return made


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What the work gives; a client that hangs up ends it."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer, left = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({answer, left}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise HTTPException(499)
        return answer.result()
    finally:
        answer.cancel()
        left.cancel()


if "MODEL" in os.environ:
    app = application(Session(os.environ["MODEL"], [os.environ.get("PROVIDER", "CPUExecutionProvider")]))
