"""C#: Microsoft.ML.OnnxRuntime 1.16 or newer, with OrtValue; 1.20 where an adapter is made active."""

from __future__ import annotations

from loraformat_converters.onnx.how.call import Call, Feed, quoted

__all__ = ["code"]

_TYPES = {
    "float32": "float",
    "float64": "double",
    "float16": "Float16",
    "bfloat16": "BFloat16",
    "bool": "bool",
    "int8": "sbyte",
    "uint8": "byte",
    "int16": "short",
    "uint16": "ushort",
    "int32": "int",
    "uint32": "uint",
    "int64": "long",
    "uint64": "ulong",
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
foreach (var feed in feeds.Values) feed.Dispose(); // else their memory is never freed
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
        # The CPU takes no allocator: "The specified allocator must be a device allocator".
        lines += [f"using var adapter = OrtLoraAdapter.Create({quoted(str(call.adapter))}, null);"]
        lines += [f"options.AddActiveLoraAdapter(adapter); // {call.without}"]
    return "\n".join(lines) + "\n" + _TAIL


def _tensor(feed: Feed) -> str:
    kind = _TYPES[feed.dtype]
    value = str(feed.fill)
    if kind == "bool":
        value = "true" if feed.fill else "false"
    elif kind.endswith("Float16"):
        value = f"({kind}){feed.fill}"
    values = f"Enumerable.Repeat<{kind}>({value}, (int)({feed.count})).ToArray()"
    return f"OrtValue.CreateTensorValueFromMemory({values}, new long[] {{ {', '.join(feed.sizes)} }})"
