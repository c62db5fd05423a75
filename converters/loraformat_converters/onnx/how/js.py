"""JavaScript: onnxruntime-node; onnxruntime-web has the same calls."""

from __future__ import annotations

from loraformat.errors import fault
from loraformat_converters.onnx.how.call import Call, Feed, quoted
from loraformat_converters.onnx.how.reader import READER

__all__ = ["code"]

# dtype → (typed array, the literals 0 and 1). onnxruntime-node 1.2x takes float16 as its bits.
_TYPES = {
    "float32": ("Float32Array", "0", "1"),
    "float64": ("Float64Array", "0", "1"),
    "float16": ("Uint16Array", "0", "0x3c00"),
    "bool": ("Uint8Array", "0", "1"),
    "int64": ("BigInt64Array", "0n", "1n"),
    "uint64": ("BigUint64Array", "0n", "1n"),
    **{f"{kind}{bits}": (f"{word}{bits}Array", "0", "1") for kind, word in (("int", "Int"), ("uint", "Uint")) for bits in (8, 16, 32)},
    "string": ("Array", "", '"text"'),
}  # fmt: skip


def code(call: Call) -> str:
    """A CommonJS script."""
    call.types("JavaScript", _TYPES)
    if (
        call.adapter is not None and not call.slots
    ):  # onnxruntime-node 1.30 ignores what is fed to them, onnxruntime-web throws
        fix = "attach with --slots required, which JavaScript can feed"
        raise fault(
            "LF-705", "JavaScript sees no optional inputs: it would compute the base", where=str(call.path), fix=fix
        )
    lines = ['const ort = require("onnxruntime-node"); // in a browser: onnxruntime-web']
    lines += ['const { readFileSync } = require("node:fs"); // in a browser: fetch', "", READER] if call.slots else [""]
    lines += [f"// {note}" for note in call.notes]
    lines += ["async function main() {"]
    lines += [f"  const session = await ort.InferenceSession.create({quoted(str(call.path))});"]
    if call.sizes:
        lines += ["", "  // Free sizes: put your own.", f"  const {call.declared('{name} = {value}')};"]
    lines += ["", "  const feeds = {", *(f"    {quoted(feed.name)}: {_tensor(feed)}," for feed in call.feeds), "  };"]
    if call.slots:
        lines += [f"  const adapter = readAdapter(readFileSync({quoted(str(call.adapter))}), ort);"]
        lines += [f"  Object.assign(feeds, adapter); // {call.without}"]
    names = ", ".join(map(quoted, call.outputs))
    lines += [f"  const results = await session.run(feeds, [{names}]);"]
    lines += ["  for (const name in results) console.log(name, results[name].type, results[name].dims);"]
    return "\n".join([*lines, "}", "", "main();"]) + "\n"


def _tensor(feed: Feed) -> str:
    array, zero, one = _TYPES[feed.dtype]
    values = f"new {array}({feed.count}).fill({one if feed.fill else zero})"
    return f'new ort.Tensor("{feed.dtype}", {values}, [{", ".join(feed.sizes)}])'
