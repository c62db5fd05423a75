"""POST /run: one row through the model, by an adapter of one's own; GET /adapters. See README.md."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from batches import Batches
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from loraformat import LoraFormatError
from loraformat_converters.onnx.runtime import Session

TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


def application(session: Session) -> Starlette:
    """The server of one model."""
    types = {v.name: TYPES.get(v.type) for v in session.inference.get_inputs() if not v.name.startswith("lora.")}

    @contextlib.asynccontextmanager
    async def running(app: Starlette) -> AsyncIterator[None]:
        app.state.batches = Batches(session)
        work = asyncio.create_task(app.state.batches.work())
        yield
        work.cancel()

    async def run(request: Request) -> JSONResponse:
        try:
            asked: dict[str, Any] = await request.json()
            inputs = {name: np.asarray(values, types[name]) for name, values in asked["inputs"].items()}
            if missing := types.keys() - inputs:
                raise ValueError(f"no values for {', '.join(sorted(missing))}")
            found = await request.app.state.batches.row(asked.get("adapter"), inputs)
        except (LoraFormatError, ValueError, TypeError, KeyError, AttributeError) as error:
            return JSONResponse({"error": str(error)}, 400)
        return JSONResponse({"outputs": {name: values.tolist() for name, values in found.items()}})

    async def adapters(request: Request) -> JSONResponse:
        return JSONResponse(session.names)

    routes = [Route("/run", run, methods=["POST"]), Route("/adapters", adapters)]
    return Starlette(routes=routes, lifespan=running)


if "MODEL" in os.environ:
    app = application(Session(os.environ["MODEL"], [os.environ.get("PROVIDER", "CPUExecutionProvider")]))
