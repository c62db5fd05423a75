"""C++: the header-only API over the C library."""

from __future__ import annotations

from collections.abc import Iterator

from loraformat_converters.onnx.how.call import Call, Feed, quoted

__all__ = ["code"]

_TYPES = {
    "float32": "float",
    "float64": "double",
    "float16": "Ort::Float16_t",
    "bfloat16": "Ort::BFloat16_t",
    "bool": "bool",
    **{f"{kind}{bits}": f"{kind}{bits}_t" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
}

_HEAD = """\
// c++ -std=c++17 run.cpp -I ONNXRUNTIME/include -L ONNXRUNTIME/lib -lonnxruntime
#include <cstdint>
#include <iostream>
#include <vector>

#include <onnxruntime_cxx_api.h>
"""

_TAIL = """\
  for (size_t i = 0; i < outputs.size(); i++) {
    std::cout << output_names[i];
    for (int64_t size : outputs[i].GetTensorTypeAndShapeInfo().GetShape()) std::cout << ' ' << size;
    std::cout << '\\n';
  }
}
"""


def code(call: Call) -> str:
    """A program."""
    call.types("C++", _TYPES)
    lines = [_HEAD, *(f"// {note}" for note in call.notes), "int main() {"]
    lines += ["  Ort::Env env;"]
    lines += [f"  Ort::Session session(env, ORT_TSTR({quoted(str(call.path))}), Ort::SessionOptions());"]
    lines += ["  auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);"]
    if call.sizes:
        lines += ["", "  // Free sizes: put your own.", f"  const int64_t {call.declared('{name} = {value}')};"]
    lines += ["", "  std::vector<Ort::Value> inputs;"]
    lines += [line for feed in call.feeds for line in _tensor(feed)]
    for word, names in (("input", [f.name for f in call.feeds]), ("output", call.outputs)):
        lines += [f"  const char* {word}_names[] = {{{', '.join(map(quoted, names))}}};"]
    lines += ["  Ort::RunOptions options;"]
    if call.adapter is not None:
        lines += [
            f"  auto adapter = Ort::LoraAdapter::CreateLoraAdapter(ORT_TSTR({quoted(str(call.adapter))}), nullptr);"
        ]
        lines += [f"  options.AddActiveLoraAdapter(adapter);  // {call.without}"]
    lines += ["  auto outputs = session.Run(options, input_names, inputs.data(), inputs.size(),"]
    lines += [f"                             output_names, {len(call.outputs)});"]
    return "\n".join(lines) + "\n" + _TAIL


def _tensor(feed: Feed) -> Iterator[str]:
    kind, name = _TYPES[feed.dtype], feed.variable
    held = "uint8_t" if kind == "bool" else kind  # a vector<bool> has no data()
    value = f"{kind}({feed.fill}.0f)" if kind.startswith("Ort::") else str(feed.fill)
    data = f"reinterpret_cast<bool*>({name}.data())" if kind == "bool" else f"{name}.data()"
    yield f"  std::vector<int64_t> {name}_shape{{{', '.join(feed.sizes)}}};"
    yield f"  std::vector<{held}> {name}({feed.count}, {value});"
    yield f"  inputs.push_back(Ort::Value::CreateTensor<{kind}>(memory, {data}, {name}.size(),"
    yield f"                                                   {name}_shape.data(), {name}_shape.size()));"
