// Reads an .onnx_adapter file for ONNX Runtime in JavaScript, which has no LoraAdapter of its own: the tensors are fed.
//
//   const adapter = readAdapter(bytes, ort);            // input name → ort.Tensor
//   await session.run({ ...feeds, ...adapter });
//
// The file is a flatbuffer: { format_version, adapter_version, model_version, parameters: [{ name, dims, data_type, raw_data }] }
// (onnxruntime/lora/adapter_format/adapter_schema.fbs). DataView throws where an offset leads out of the file.

const TYPES = { 1: ["float32", Float32Array], 10: ["float16", Uint16Array], 11: ["float64", Float64Array] };

/** The tensors of a file, by the names of the inputs that take them. `bytes`: Uint8Array; `ort`: onnxruntime-node or -web. */
export function readAdapter(bytes, ort) {
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

/** Tensors that leave the base as it is, for the inputs of a session that adapters are fed to. */
export function noAdapter(session, ort) {
  const none = {};
  for (const { name, type, shape } of session.inputMetadata) {
    if (!name.startsWith("lora/")) continue;
    const dims = shape.map((size) => (typeof size === "number" ? size : 0)); // the rank is the only size that is free
    const [, kind] = Object.values(TYPES).find(([word]) => word === type);
    none[name] = new ort.Tensor(type, new kind(dims.reduce((a, b) => a * b, 1)), dims);
  }
  return none;
}
