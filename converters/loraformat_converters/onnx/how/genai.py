"""ONNX Runtime GenAI: a folder with genai_config.json, generated from in a loop of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loraformat import canonical
from loraformat.errors import fault
from loraformat_converters.onnx.how.call import Call

__all__ = ["code"]

_CONFIG = "genai_config.json"

# onnxruntime-genai 0.9 to 0.18: the model's inputs are fed by the library, so none of them is named here.
_CODE = """\
import onnxruntime_genai as og

{notes}model = og.Model({folder!r})
tokenizer = og.Tokenizer(model)
params = og.GeneratorParams(model)
params.set_search_options(max_length={length})
generator = og.Generator(model, params)
{adapter}generator.append_tokens(tokenizer.encode("Once upon a time"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
"""

_ADAPTER = """\
adapters = og.Adapters(model)
adapters.load({path!r}, "adapter")
generator.set_active_adapter(adapters, "adapter")  # without it: the base
"""


def code(call: Call) -> str:
    """A script; LF-705 where the model is none of GenAI's, or needs what GenAI does not feed."""
    folder = call.path.parent
    model = _model(call.path)
    off = [feed.name for feed in (*call.slots, *call.feeds) if not feed.fill]
    if off:
        what = f"GenAI feeds inputs of its own only: {off[0]} would be missing"
        raise fault(
            "LF-705", what, where=str(call.path), fix="attach with --mode branch, or --mode swap with optional slots"
        )
    adapter = ""
    if call.adapter is not None:
        adapter = _ADAPTER.format(path=str(call.adapter))
    notes = "".join(f"# {note}\n" for note in call.notes)
    longest = model.get("context_length")
    length = min(200, longest) if isinstance(longest, int) else 200
    return _CODE.format(adapter=adapter, notes=notes, folder=str(folder), length=length)


def _model(path: Path) -> Mapping[str, Any]:
    """What the configuration beside a model says of it; LF-705 where it is of other models, which GenAI would run."""
    config = path.with_name(_CONFIG)
    if not config.is_file():
        what = f"{path} is no model of ONNX Runtime GenAI: no {_CONFIG} lies beside it"
        raise fault("LF-705", what, fix="GenAI's model builder writes one; else take --how python")
    try:
        value = canonical.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise fault("LF-705", f"{config} is no JSON: {error}") from None
    model = value.get("model") if isinstance(value, dict) else None
    files = list(_files(model))
    if not isinstance(model, dict) or path.name not in files:
        what = f"{config} names {', '.join(files) or 'no model'}, not {path.name}: GenAI would run that"
        raise fault("LF-705", what, fix=f"attach --to {path.parent} -o FOLDER writes a folder of its own")
    return model


def _files(section: Any) -> Iterator[str]:
    """The models that a section of the configuration names, at any depth: decoder, encoder, the steps of a pipeline."""
    if isinstance(section, list):
        for entry in section:
            yield from _files(entry)
    elif isinstance(section, dict):
        for key, value in section.items():
            if key == "filename":
                yield str(value)
            else:
                yield from _files(value)
