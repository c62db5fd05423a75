// The safetensors container, strictly (section 4): bytes → tensors and metadata.

import { readFileSync } from "node:fs";
import { parse } from "./json.mjs";

// What breaks a rule: the rule and the place. Thrown for an error; a warning is collected instead.
export class Refusal extends Error {
  constructor(rule, where = "") {
    super(`${rule} ${where}`);
    Object.assign(this, { rule, where });
  }
}

export const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
export const product = (sizes) => sizes.reduce((a, b) => a * b, 1);

// A sign, an exponent, a mantissa; of a finite variant only the last pattern is no number.
const float = (exponent, mantissa, finite = false) => (bits) => {
  const sign = bits >> (exponent + mantissa) ? -1 : 1, top = 2 ** exponent - 1, bias = top >> 1;
  const e = (bits >> mantissa) & top, m = bits & (2 ** mantissa - 1);
  if (e === top && !finite) return m ? NaN : sign * Infinity;
  if (e === top && m === 2 ** mantissa - 1) return NaN;
  return sign * (e ? 2 ** mantissa + m : 2 * m) * 2 ** (e - bias - mantissa);
};
const half = float(5, 10), e4m3 = float(4, 3, true), e5m2 = float(5, 2);
const brain = (bits) => new DataView(Uint8Array.of(bits >> 8, bits & 255, 0, 0).buffer).getFloat32(0);

// dtype → [bytes, how to read one value]
export const DTYPES = {
  F64: [8, (view, at) => view.getFloat64(at, true)],
  F32: [4, (view, at) => view.getFloat32(at, true)],
  F16: [2, (view, at) => half(view.getUint16(at, true))],
  BF16: [2, (view, at) => brain(view.getUint16(at, true))],
  F8_E4M3: [1, (view, at) => e4m3(view.getUint8(at))],
  F8_E5M2: [1, (view, at) => e5m2(view.getUint8(at))],
  I64: [8, (view, at) => Number(view.getBigInt64(at, true))],
  U64: [8, (view, at) => Number(view.getBigUint64(at, true))],
  I32: [4, (view, at) => view.getInt32(at, true)],
  U32: [4, (view, at) => view.getUint32(at, true)],
  I16: [2, (view, at) => view.getInt16(at, true)],
  U16: [2, (view, at) => view.getUint16(at, true)],
  I8: [1, (view, at) => view.getInt8(at)],
  U8: [1, (view, at) => view.getUint8(at)],
  BOOL: [1, (view, at) => Number(view.getUint8(at) !== 0)],
  C64: [8, () => NaN],
};

export class Tensor {
  constructor(dtype, shape, bytes) {
    Object.assign(this, { dtype, shape, bytes });
  }

  // Row-major, in double precision.
  get values() {
    const [width, read] = DTYPES[this.dtype];
    const view = new DataView(this.bytes.buffer, this.bytes.byteOffset, this.bytes.byteLength);
    this.decoded ??= Float64Array.from({ length: this.bytes.length / width }, (_, n) => read(view, n * width));
    return this.decoded;
  }
}

// {tensors: name → Tensor, metadata: name → text}
export function open(path) {
  const file = readFileSync(path);
  if (file.length < 8) throw new Refusal("LF-101");
  const length = file.readBigUInt64LE(0);
  if (length > 100_000_000n || length > file.length - 8) throw new Refusal("LF-102");
  const data = file.subarray(8 + Number(length));
  const header = headerOf(file.subarray(8, 8 + Number(length)));
  const metadata = header.__metadata__ ?? {};
  delete header.__metadata__;
  if (!isObject(metadata) || Object.values(metadata).some((text) => typeof text !== "string"))
    throw new Refusal("LF-109", "__metadata__");
  const tensors = Object.create(null), spans = [];
  for (const [name, entry] of Object.entries(header)) {
    const [begin, end] = spanOf(name, entry);
    spans.push([begin, end, name]);
    tensors[name] = new Tensor(entry.dtype, entry.shape.map(Number), data.subarray(Number(begin), Number(end)));
  }
  let covered = 0n;
  for (const [begin, end, name] of spans.sort((a, b) => (a[0] < b[0] ? -1 : a[0] > b[0] ? 1 : Number(a[1] - b[1])))) {
    if (begin !== covered) throw new Refusal("LF-107", name);
    covered = end;
  }
  if (covered !== BigInt(data.length)) throw new Refusal("LF-107");
  return { tensors, metadata };
}

function headerOf(bytes) {
  try {
    const text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
    if (text[0] !== "{") throw new SyntaxError("no brace");
    return parse(text);
  } catch (error) {
    throw new Refusal(error.duplicate ? "LF-104" : "LF-103");
  }
}

function spanOf(name, entry) {
  const naturals = (list) => Array.isArray(list) && list.every((n) => typeof n === "bigint" && n >= 0n && n < 2n ** 63n);
  if (!isObject(entry) || Object.keys(entry).sort().join() !== "data_offsets,dtype,shape") throw new Refusal("LF-105", name);
  const { dtype, shape, data_offsets: offsets } = entry;
  if (typeof dtype !== "string" || !naturals(shape) || shape.length > 32 || !naturals(offsets) || offsets.length !== 2)
    throw new Refusal("LF-105", name);
  if (!Object.hasOwn(DTYPES, dtype)) throw new Refusal("LF-106", name);
  const needed = shape.reduce((a, b) => a * b, BigInt(DTYPES[dtype][0]));
  if (offsets[1] - offsets[0] !== needed) throw new Refusal("LF-108", name);
  return offsets;
}
