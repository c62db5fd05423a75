"""JavaScript that reads an ``.onnx_adapter``: ONNX Runtime there has no LoraAdapter. As examples/javascript has it."""

__all__ = ["READER"]

READER = """\
const TYPES = { 1: ["float32", Float32Array], 10: ["float16", Uint16Array], 11: ["float64", Float64Array] };

/** The tensors of a file, by the names of the inputs that take them. `bytes`: Uint8Array; `ort`: onnxruntime-node or -web. */
function readAdapter(bytes, ort) {
  const text = (at, length) => new TextDecoder().decode(bytes.subarray(at, at + length));
  if (text(4, 4) !== "TORT") throw new Error("no .onnx_adapter file");
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const u32 = (at) => view.getUint32(at, true);
  const follow = (at) => at + u32(at);
  const field = (table, index) => {
    const vtable = table - view.getInt32(table, true);
    const offset = 4 + 2 * index < view.getUint16(vtable, true) ? view.getUint16(vtable + 4 + 2 * index, true) : 0;
    return offset ? table + offset : 0;
  };
  const vector = (table, index) => {
    const at = field(table, index);
    return at ? [follow(at) + 4, u32(follow(at))] : [0, 0];
  };

  const found = {};
  const [start, count] = vector(follow(0), 3);
  for (let i = 0; i < count; i++) {
    const table = follow(start + 4 * i);
    const name = text(...vector(table, 0));
    const [dimsAt, rank] = vector(table, 1);
    const dims = Array.from({ length: rank }, (_, axis) => Number(view.getBigInt64(dimsAt + 8 * axis, true)));
    const type = TYPES[view.getInt32(field(table, 2), true)];
    if (!type) throw new Error(`${name} has a data type that is not read here`);
    const [dataAt, dataLength] = vector(table, 3);
    const values = new type[1](Uint8Array.from(bytes.subarray(dataAt, dataAt + dataLength)).buffer); // aligned
    if (values.length !== dims.reduce((a, b) => a * b, 1)) throw new Error(`${name} has ${values.length} values for ${dims}`);
    found[name] = new ort.Tensor(type[0], values, dims);
  }
  return found;
}
"""
