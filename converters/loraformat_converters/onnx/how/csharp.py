"""C#: Microsoft.ML.OnnxRuntime 1.16 or newer, with OrtValue."""

from __future__ import annotations

from loraformat_converters.onnx.how.call import Call, Feed, quoted

__all__ = ["code"]

# dtype → (type, the literals 0 and 1)
_TYPES = {
    "float32": ("float", "0f", "1f"),
    "float64": ("double", "0d", "1d"),
    "float16": ("Float16", "(Float16)0f", "(Float16)1f"),
    "bfloat16": ("BFloat16", "(BFloat16)0f", "(BFloat16)1f"),
    "bool": ("bool", "false", "true"),
    "int8": ("sbyte", "(sbyte)0", "(sbyte)1"),
    "uint8": ("byte", "(byte)0", "(byte)1"),
    "int16": ("short", "(short)0", "(short)1"),
    "uint16": ("ushort", "(ushort)0", "(ushort)1"),
    "int32": ("int", "0", "1"),
    "uint32": ("uint", "0u", "1u"),
    "int64": ("long", "0L", "1L"),
    "uint64": ("ulong", "0ul", "1ul"),
}

_HEAD = """\
// dotnet add package Microsoft.ML.OnnxRuntime
using System;
using System.Collections.Generic;
using System.Linq;
using Microsoft.ML.OnnxRuntime;
"""

_TAIL = """\
using var outputs = session.Run(options, feeds, outputNames);
for (int i = 0; i < outputs.Count; i++)
    Console.WriteLine($"{outputNames[i]} {string.Join(" ", outputs[i].GetTensorTypeAndShape().Shape)}");
"""


def code(call: Call) -> str:
    """A program of top-level statements."""
    call.types("C#", _TYPES)
    lines = [_HEAD, *(f"// {note}" for note in call.notes)]
    lines += [f"using var session = new InferenceSession({quoted(str(call.path))});"]
    if call.sizes:
        lines += ["", "// Free sizes: put your own.", f"const long {call.declared('{name} = {value}')};"]
    lines += ["", "var feeds = new Dictionary<string, OrtValue>", "{"]
    lines += [f"    [{quoted(feed.name)}] = {_tensor(feed)}," for feed in call.feeds]
    lines += ["};", f"var outputNames = new[] {{ {', '.join(map(quoted, call.outputs))} }};"]
    lines += ["using var options = new RunOptions();"]
    if call.adapter is not None:
        made = f"OrtLoraAdapter.Create({quoted(str(call.adapter))}, OrtAllocator.DefaultInstance)"
        lines += [f"using var adapter = {made};", "options.AddActiveLoraAdapter(adapter); // without it: the base"]
    return "\n".join(lines) + "\n" + _TAIL


def _tensor(feed: Feed) -> str:
    kind, zero, one = _TYPES[feed.dtype]
    values = f"Enumerable.Repeat<{kind}>({one if feed.fill else zero}, (int)({feed.count})).ToArray()"
    sizes = f"new long[] {{ {', '.join(feed.sizes)} }}" if feed.sizes else "new long[0]"
    return f"OrtValue.CreateTensorValueFromMemory({values}, {sizes})"
