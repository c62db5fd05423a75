"""The JavaScript example: an adapter that is fed changes the output, as merged weights do, and one of rank 0 does not."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import updates
from graphs import adapter, lora, model, save, session

import loraformat as lf
from loraformat import Placement
from loraformat.base import Options
from loraformat.registry import open_base
from loraformat.testing import relative_error
from loraformat.verbs.merge import merge, prepare

pytestmark = pytest.mark.peer

ROOT = Path(__file__).parents[1]
TEXT = """g (float[N,T,5] x, int64[N,T] ids) => (float[N,T,4] y) <float[5,7] w, float[7,4] v, float[9,5] e>
  { ["/e/Gather"] t = Gather(e, ids)  s = Add(x, t)  ["/m/q/MatMul"] h = MatMul(s, w)  ["/m/v/MatMul"] y = MatMul(h, v) }"""


def modules(host):
    """The folder of npm's modules that has the host, or a skip."""
    found = [Path(p) for p in os.environ.get("NODE_PATH", "").split(os.pathsep) if p] + [ROOT / "node_modules"]
    place = next((path for path in found if (path / f"onnxruntime-{host}").is_dir()), None)
    if shutil.which("node") is None or place is None:
        pytest.skip(f"needs node and onnxruntime-{host}: npm install --no-save onnxruntime-{host}")
    return place


def made(folder, pad, kind="lora"):
    """The files of the example, and what base and adapter give for its inputs."""
    base = open_base(save(model(TEXT), folder / "base.onnx"))
    q = lora(7, 5, rank=3) if kind == "lora" else updates.made(kind, Placement((7, 5), (0,), (1,)))
    given = adapter({"m.q.weight": q, "e.weight": (5, 9)})
    options = Options(folder / "out.onnx", "swap", slots="required", pad_rank=pad, targets=("v",))
    base.apply(prepare("attach", [("style", given)], base, options))
    merge(given, base, folder / "merged.onnx")
    x = {"x": np.ones((2, 2, 5), np.float32), "ids": np.ones((2, 2), np.int64)}
    one, other = (session(folder / f"{name}.onnx").run(None, x)[0].reshape(-1) for name in ("base", "merged"))
    assert kind == "dora" or lf.load(folder / "out.style.onnx_adapter").keys() == given.keys()
    return one, other


def check(told, wanted):
    """Without the adapter, with it, and without it again."""
    lines = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
    assert [line["what"] for line in lines] == ["base", "adapter", "base"], told
    for line, truth in zip(lines, (wanted[0], wanted[1], wanted[0]), strict=True):
        assert relative_error(np.array(line["data"]), truth.astype(np.float64)) <= 2e-6
    assert relative_error(np.array(lines[1]["data"]), np.array(lines[0]["data"])) > 0.01


@pytest.mark.parametrize("host", ["node", "web"])
@pytest.mark.parametrize(("pad", "kind"), [(None, "lora"), (4, "lora"), (None, "dora")])
def test_an_adapter_that_is_fed_changes_the_output(host, pad, kind, tmp_path):
    place, wanted = modules(host), made(tmp_path, pad, kind)
    example = shutil.copytree(ROOT / "examples" / "javascript", tmp_path / "example")
    (tmp_path / "node_modules").symlink_to(place.resolve())
    words = ["node", "run.mjs", tmp_path / "out.onnx", tmp_path / "out.style.onnx_adapter", host]
    done = subprocess.run(words, cwd=example, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    check(done.stdout, wanted)


def test_an_adapter_changes_the_output_in_a_browser(tmp_path):
    place, wanted = modules("web"), made(tmp_path, None)
    browser = shutil.which("chromium") or shutil.which("google-chrome") or pytest.skip("needs Chromium")
    shutil.copytree(ROOT / "examples" / "javascript", tmp_path, dirs_exist_ok=True)
    shutil.copytree(
        place / "onnxruntime-web" / "dist",
        tmp_path / "ort",
        ignore=lambda _, names: [n for n in names if "wasm" not in n],
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    page = f"http://127.0.0.1:{server.server_port}/index.html?model=out.onnx&adapter=out.style.onnx_adapter"
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    words += ["--virtual-time-budget=60000", "--dump-dom", page]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    finally:
        server.shutdown()
    (told,) = re.findall(r'<pre id="told">(.*?)</pre>', done.stdout, re.DOTALL)
    check(html.unescape(told), wanted)


class Quiet(SimpleHTTPRequestHandler):
    """Files, and no word of them."""

    extensions_map: ClassVar = {
        **SimpleHTTPRequestHandler.extensions_map,
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def log_message(self, *args):
        pass
