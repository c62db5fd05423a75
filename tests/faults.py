"""A command run again and again, each time with a fault at the next of its file events; ``python faults.py CASE FOLDER STEP``.

An event is an open, write, copy, fsync, rename or deletion of a file or folder under FOLDER. At each the run is killed, asked
to end by a signal, told once that the device fails, or told from there on that the disk is full. Whatever comes, what stood
there is whole until the new is; only a run that was killed leaves anything else, and the next one clears it away.
"""

import builtins
import io
import os
import re
import shutil
import signal
import sys
from copy import deepcopy
from errno import EIO, ENOSPC
from pathlib import Path
from threading import Lock

import onnx
from graphs import adapter, lora, model, save

import loraformat as lf
from loraformat.cli.main import main

TEXT = """g (float[N,T,12] x) => (float[N,T,6] y) <float[12,16] wq, float[16] bq, float[16,6] wk>
  { ["/m/q/MatMul"] h = MatMul(x, wq)  s = Add(h, bq)  r = Relu(s)  ["/m/k/MatMul"] y = MatMul(r, wk) }"""
CODES = """g (float[N,T,12] x) => (float[N,T,16] y) <int8[12,16] wq, float sq, int8 zq, float[16,16] wk>
  { ["/m/q/dq"] w = DequantizeLinear(wq, sq, zq)  ["/m/q/MatMul"] h = MatMul(x, w)  ["/m/k/MatMul"] y = MatMul(h, wk) }"""
SIZES = {"m.q.weight": (16, 12), "m.k.weight": (6, 16)}

STACK = ["--mode", "stack", "--rows", "x"]
SWAP, REQUIRED = ["--mode", "swap"], ["--mode", "swap", "--slots", "required"]
TWO, OTHERS = ["one=a.safetensors", "two=b.safetensors"], ["one=b.safetensors", "two=a.safetensors"]


TAG = re.compile(rb"o\.onnx\.[0-9a-f]{8}\.")


def attach(base, out, *options):
    """The run that is disturbed, and the one that wrote what stood there."""
    return [["attach", *which, "--to", base, "-o", out, *options] for which in (TWO, OTHERS)]


CASES = {
    "stack": attach("inline.onnx", "out/o.onnx", *STACK),
    "stack beside": attach("out/beside.onnx", "out/o.onnx", *STACK),
    "stack elsewhere": attach("far/beside.onnx", "out/o.onnx", *STACK),
    "stack folder": attach("models", "out/o", *STACK),
    "swap": attach("inline.onnx", "out/o.onnx", *SWAP),
    "swap elsewhere": attach("far/beside.onnx", "out/o.onnx", *REQUIRED),
    "swap folder": attach("models", "out/o", *REQUIRED),
    "proved": attach("far/beside.onnx", "out/o.onnx", *STACK, "--verify"),
    "detach": [["detach", "far/attached.onnx", "-o", "out/o.onnx"], attach("inline.onnx", "out/o.onnx", *STACK)[1]],
    "detach swap": [["detach", "far/swapped.onnx", "-o", "out/o.onnx"], attach("inline.onnx", "out/o.onnx", *SWAP)[1]],
    "detach folder": [["detach", "attached", "-o", "out/o"], attach("models", "out/o", *STACK)[1]],
    "extract": [["extract", f"far/one{n}.onnx", "-o", "out/o.safetensors"] for n in (1, 2)],
    "extract to PEFT": [["extract", f"far/one{n}.onnx", "-o", "out/o", "--to", "peft"] for n in (1, 2)],
    "merge": [["merge", f"{n}.safetensors", "--into", "far/beside.onnx", "-o", "out/o.onnx", "--verify"] for n in "ab"],
    "merge codes": [
        ["merge", f"{n}.safetensors", "--into", f"{where}/codes.onnx", "-o", "out/o.onnx", "--requantize", *options]
        for n, where, options in (("ca", "out", ["--verify"]), ("cb", "out", []))
    ],
    "merge codes folder": [
        ["merge", f"{n}.safetensors", "--into", "coded", "-o", "out/o", "--requantize"] for n in ("ca", "cb")
    ],
    "combine": [
        ["combine", f"a.safetensors:{w}", "b.safetensors", "-o", "out/o.safetensors", "--save-recipe", "out/r.json"]
        for w in (2, 3)
    ],
}  # fmt: skip
"""Name → the command that is disturbed, and the one whose output may stand there before."""


def make():
    """What the commands read, in the current folder."""
    for name in ("far", "models", "coded", "start"):
        os.mkdir(name)
    for n, seed in (("a", 1), ("b", 5)):
        pairs = {key: lora(*size, seed=seed + i) for i, (key, size) in enumerate(SIZES.items())}
        lf.save(adapter(pairs), f"{n}.safetensors")
        small = lora(16, 12, alpha=9.0, rule="factor", seed=seed)
        lf.save(adapter({"m.q.weight": small, "m.k.weight": lora(16, 16, seed=seed)}), f"c{n}.safetensors")
    made, coded = model(TEXT), model(CODES)
    save(made, Path("inline.onnx"))
    for path in ("far/beside.onnx", "start/beside.onnx", "models/one.onnx"):
        outside(made, path, "beside.data")
    for path in ("start/codes.onnx", "coded/codes.onnx"):
        outside(coded, path, "codes.data")
    save(made, Path("models/two.onnx"))
    Path("models/config.json").write_text("{}")
    far = "far/beside.onnx"
    for words in (
        *(attach(base, out, *STACK)[0] for base, out in ((far, "far/attached.onnx"), ("models", "attached"))),
        attach(far, "far/swapped.onnx", *SWAP)[0],
        *(["attach", f"{n}.safetensors", "--to", far, "-o", f"far/one{i}.onnx"] for i, n in ((1, "a"), (2, "b"))),
    ):
        assert done(words) == 0, words


def outside(made, path, data):
    """A model whose tensors lie in a file beside it."""
    onnx.save(deepcopy(made), path, save_as_external_data=True, location=data, size_threshold=0)


def done(words):
    """The exit code of a command, in this process; its words are thrown away."""
    before = sys.argv
    sys.argv = ["loraformat", *words]
    try:
        main()
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = before


class Faults:
    """Counts the events under the current folder, and does ``act`` at the ``at``-th, or from there on."""

    def __init__(self, act, at, lasting):
        self.act, self.at, self.lasting, self.count, self.lock = act, at, lasting, 0, Lock()
        self.home = os.getcwd()

    def event(self, kind, path=None):
        if path is not None and not os.path.abspath(os.fspath(path)).startswith(self.home):
            return
        with self.lock:
            now, self.count = self.count, self.count + 1
        if now == self.at or (self.lasting and now > self.at):
            self.act(kind)

    def install(self):
        """Put in the place of what the process opens, writes and renames with."""
        faults, opened = self, builtins.open

        class Counted(io.BufferedRandom):
            def write(self, data):
                faults.event("write")
                return super().write(data)

        def open_(path, mode="r", *args, **kwargs):
            if isinstance(path, int):
                return opened(path, mode, *args, **kwargs)
            faults.event("create" if set("wxa") & set(mode) else "open", path)
            if "+b" in mode and os.path.abspath(path).startswith(faults.home):
                return Counted(io.FileIO(path, mode.replace("b", "")))
            return opened(path, mode, *args, **kwargs)

        builtins.open = io.open = open_
        for name, kind in (
            ("pwrite", "write"), ("copy_file_range", "write"), ("fsync", "write"), ("mkdir", "create"),
            ("link", "create"), ("replace", "rename"), ("rename", "rename"), ("unlink", "delete"), ("rmdir", "delete"),
        ):  # fmt: skip
            setattr(os, name, self.around(getattr(os, name), kind))

    def around(self, whole, kind):
        def call(*args, **kwargs):
            self.event(kind, args[0] if not isinstance(args[0], int) and "dir_fd" not in kwargs else None)
            return whole(*args, **kwargs)

        return call


def kill(kind):
    os.kill(os.getpid(), signal.SIGKILL)


def fail(kind):
    raise OSError(EIO, "Input/output error")


def fill(kind):
    if kind in ("write", "create"):
        raise OSError(ENOSPC, "No space left on device")


def ask(number):
    return lambda kind: os.kill(os.getpid(), number)


ACTS = {"SIGKILL": kill, "SIGTERM": ask(signal.SIGTERM), "SIGINT": ask(signal.SIGINT), "failure": fail, "full": fill}


def disturbed(words, name, at):
    """(exit code, or −signal; what it said; how many events there were) of a run with that fault at that event."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        said = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        faults = Faults(ACTS[name], at, lasting=name == "full")
        faults.install()
        code = 99
        try:
            code = done(words)
        finally:
            os.write(writing, str(faults.count).encode())
            os._exit(code)
    os.close(writing)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with os.fdopen(reading, "rb") as counted:
        return status, Path("said").read_text(), int(counted.read() or 0)


def content():
    """Path → bytes of every file in ``out``."""
    return {p.relative_to("out").as_posix(): p.read_bytes() for p in Path("out").rglob("*") if p.is_file()}


def told(files):
    """The same without what tells the data files of two runs from each other."""
    return {TAG.sub(b"o.onnx.#.", n.encode()).decode(): TAG.sub(b"o.onnx.########.", d) for n, d in files.items()}


def reset(before):
    shutil.rmtree("out", ignore_errors=True)
    for name, data in before.items():
        path = Path("out") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def whole(found, states):
    """Whether the output is one of the states; a folder may stand aside, and what lies beside a model be of either run."""
    kept = {name.replace(".o.old/", "o/"): data for name, data in found.items()}
    of_either = (".onnx_adapter", ".json")
    return any(
        all(kept.get(name) == data for name, data in state.items() if not name.endswith(of_either)) for state in states
    )


def check(words, name, at, before, after):
    """One run, from ``before`` to what should be ``after``; False where it had fewer events."""
    reset(before)
    status, said, count = disturbed(words, name, at)
    found, where = told(content()), f"{name} at event {at} of {' '.join(words)}: exit {status}, {said}"
    if status != -signal.SIGKILL and count <= at:
        assert (status, found) == (0, after), where
        return False
    assert "Traceback" not in said, where
    assert status in (0, 1, 130, 143, -signal.SIGKILL), where
    if status == -signal.SIGKILL or name == "failure":  # of a deletion, which may leave what was to be deleted
        assert whole(found, (told(before), after)), (where, sorted(found))
    else:
        assert found in ([after] if status == 0 else [told(before), after]), (where, sorted(found))
    assert status != 1 or "LF-70" in said, where
    assert done([*words, "--force"]) == 0, where
    assert told(content()) == after, (where, sorted(content()))
    return True


def all_of(case, step):
    """The case into an empty place, and over another output; how many faults were met."""
    disturbed_words, other_words = CASES[case]
    start = {p.name: p.read_bytes() for p in Path("start").iterdir()}
    met = 0
    for over in (False, True):
        reset(start)
        if over:
            assert done(other_words) == 0
        before, words = content(), [*disturbed_words, *(["--force"] if over else [])]
        assert done(words) == 0
        after = told(content())
        assert told(before) != after
        for i, name in enumerate(ACTS):
            at = i % step
            while check(words, name, at, before, after):
                at, met = at + step, met + 1
    return met


if __name__ == "__main__":
    os.chdir(sys.argv[2])
    make()
    print(all_of(sys.argv[1], int(sys.argv[3])))
