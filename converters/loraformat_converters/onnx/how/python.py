"""Python: onnxruntime and numpy."""

from __future__ import annotations

import json

from loraformat_converters.onnx.how.call import Call, Feed

__all__ = ["code"]

_TYPES = {
    **{f"{kind}{bits}": f"np.{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"np.float{bits}" for bits in (16, 32, 64)},
    "bool": "np.bool_",
    "string": "object",
}


def code(call: Call) -> str:
    """A script."""
    call.types("Python", _TYPES)
    lines = ["import numpy as np", "import onnxruntime as ort", ""]
    lines += [f"# {note}" for note in call.notes]
    lines += [f'session = ort.InferenceSession({_text(str(call.path))}, providers=["CPUExecutionProvider"])']
    if call.sizes:
        lines += ["", "# Free sizes: put your own."]
        lines += [f"{name} = {value}" for name, value in call.sizes.items()]
    lines += ["", "feeds = {", *(f"    {_text(feed.name)}: {_array(feed)}," for feed in call.feeds), "}"]
    lines += [f"names = [{', '.join(map(_text, call.outputs))}]"]
    options = ""
    if call.slots:  # of which session.run says that they are missing, whatever adapter is active (onnxruntime 1.32)
        lines += ["", f"adapter = ort.AdapterFormat.read_adapter({_text(str(call.adapter))})", f"# {call.without}"]
        lines += ["feeds |= {name: value.numpy() for name, value in adapter.get_parameters().items()}", ""]
    elif call.adapter is not None:
        lines += ["", "adapter = ort.LoraAdapter()", f"adapter.Load({_text(str(call.adapter))})"]
        lines += ["options = ort.RunOptions()", f"options.add_active_adapter(adapter)  # {call.without}", ""]
        options = ", options"
    lines += [f"for name, value in zip(names, session.run(names, feeds{options})):"]
    lines += ["    print(name, value.dtype, value.shape)"]
    return "\n".join(lines) + "\n"


def _text(text: str) -> str:
    """A string of JSON is one of Python, if nothing beyond ASCII is escaped."""
    return json.dumps(text, ensure_ascii=False)


def _array(feed: Feed) -> str:
    sizes = f"({', '.join(feed.sizes)}{',' if len(feed.sizes) == 1 else ''})"
    if feed.dtype == "string":
        return f'np.full({sizes}, "text", dtype=object)'
    return f"np.{'ones' if feed.fill else 'zeros'}({sizes}, {_TYPES[feed.dtype]})"
