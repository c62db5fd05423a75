"""ONNX Runtime GenAI: a folder with genai_config.json, generated from in a loop of its own."""

from __future__ import annotations

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
params.set_search_options(max_length=200)
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
    """A script; LF-705 where the model is none of GenAI's."""
    folder = call.path.parent
    if not (folder / _CONFIG).is_file():
        what = f"{call.path} is no model of ONNX Runtime GenAI: no {_CONFIG} lies beside it"
        raise fault("LF-705", what, fix="GenAI's model builder writes one; else take --how python")
    adapter = ""
    if call.adapter is not None:
        adapter = _ADAPTER.format(path=str(call.adapter))
    return _CODE.format(adapter=adapter, notes="".join(f"# {note}\n" for note in call.notes), folder=str(folder))
