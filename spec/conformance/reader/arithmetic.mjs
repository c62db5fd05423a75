// M and W' in double precision (section 8), the content digest (11) and the sketch (10).

import { createHash } from "node:crypto";
import { Refusal, product } from "./container.mjs";
import { rowsFit } from "./fit.mjs";
import { canonical } from "./json.mjs";

// A function of indices, written out in row-major order.
function fill(shape, at) {
  const values = new Float64Array(product(shape)), index = shape.map(() => 0);
  for (let n = 0; n < values.length; n++) {
    values[n] = at(index);
    for (let axis = shape.length; axis-- && ++index[axis] === shape[axis]; ) index[axis] = 0;
  }
  return { shape, values };
}

// The value at an index; a size of 1 stands for all.
const get = ({ shape, values }, index) => values[shape.reduce((at, n, axis) => at * n + (n === 1 ? 0 : index[axis]), 0)];
const sum = (count, term) => {
  let total = 0;
  for (let n = 0; n < count; n++) total += term(n);
  return total;
};

// a·b, or a and b around a core: Σ a[m, o] core[m, k, κ] b[k, i]; as [out, in].
function around(a, b, core) {
  if (!core) return fill([a.shape[0], b.shape[1]], ([o, i]) => sum(a.shape[1], (k) => get(a, [o, k]) * get(b, [k, i])));
  const kernel = product(core.shape.slice(2)), flat = { shape: [...core.shape.slice(0, 2), kernel], values: core.values };
  return fill([a.shape[1], b.shape[1] * kernel], ([o, column]) => {
    const i = Math.floor(column / kernel), tap = column % kernel;
    return sum(core.shape[0], (m) => get(a, [m, o]) * sum(core.shape[1], (k) => get(flat, [m, k, tap]) * get(b, [k, i])));
  });
}

const transposed = (a) => fill([a.shape[1], a.shape[0]], ([i, j]) => get(a, [j, i]));
const flattened = ({ shape, values }) => ({ shape: [shape[0], product(shape.slice(1))], values });

const PRODUCTS = {
  lora({ tensors: { lora_A: A, lora_B: B, mid }, matrix }) {
    if (mid) return around(transposed(B), A, mid);
    return fill(matrix, (index) => {
      const batch = index.slice(0, -2), [o, i] = index.slice(-2);
      return sum(A.shape.at(-2), (k) => get(B, [...batch, o, k]) * get(A, [...batch, k, i]));
    });
  },
  loha({ tensors: t, matrix }) {
    const first = around(t.hada_w1_a, t.hada_w1_b, t.t1), second = around(t.hada_w2_a, t.hada_w2_b, t.t2);
    return fill(matrix, (index) => get(first, index) * get(second, index));
  },
  lokr({ tensors: t, matrix }) {
    const w1 = t.lokr_w1 ?? around(t.lokr_w1_a, t.lokr_w1_b);
    const w2 = t.lokr_w2 ? flattened(t.lokr_w2) : around(t.lokr_w2_a, t.lokr_w2_b, t.t2);
    const [rows, columns] = w2.shape;
    return fill(matrix, ([o, i]) =>
      get(w1, [Math.floor(o / rows), Math.floor(i / columns)]) * get(w2, [o % rows, i % columns]));
  },
  delta: ({ tensors, matrix }) => ({ shape: matrix, values: tensors.delta.values }),
};

const scale = ({ alpha, scale_rule: rule, r }) => (rule === "factor" ? alpha : rule === "alpha/r" ? alpha / r : alpha / Math.sqrt(r));

// M: Σ scale·P over the additive parts.
export function matrix(target) {
  if (!target.matrix) throw new Refusal("LF-612", target.where);
  const terms = target.parts.filter((part) => part.matrix).map((part) => [scale(part), PRODUCTS[part.kind](part)]);
  return fill(target.matrix, (index) => sum(terms.length, (n) => terms[n][0] * get(terms[n][1], index)));
}

// Where an index of the base tensor stands in the matrix.
function inMatrix({ shape, batch, out, in: in_ }, index) {
  const flat = (axes) => axes.reduce((at, axis) => at * shape[axis] + index[axis], 0);
  return [...batch.map((axis) => index[axis]), flat(out), flat(in_)];
}

// W' of a base tensor {shape, values}, or null: the base has none.
export function apply(target, base) {
  const { parts, place, where } = target;
  const part = Object.fromEntries(parts.map((part) => [part.kind, part])), { replace, magnitude, rows } = part;
  if (!base && !replace?.allows?.includes("add")) throw new Refusal("LF-602", where);
  const start = replace?.tensors.replace ?? base;
  if (base && (place || replace) && !replace?.allows?.includes("resize")) {
    const wanted = replace ? start.shape : place.shape;
    if (String(base.shape) !== String(wanted)) throw new Refusal("LF-606", where);
  }
  if (base && place && String(base.shape) === String(place.shape)) checkIdentity(target, base);
  if ((target.matrix || magnitude) && !place) throw new Refusal("LF-604", where);
  let W = fill([...start.shape], (index) => get(start, index));
  if (target.matrix) {
    const M = matrix(target), V = W;
    W = fill(V.shape, (index) => get(V, index) + get(M, inMatrix(place, index)));
  }
  if (magnitude) W = rescaled(magnitude, W, place, where);
  if (rows) W = withRows({ axis: 0, ...rows, ...rows.tensors }, W, where);
  return W;
}

// Whether a tensor that lies as the file says is the one that the target was bound to (section 10).
function checkIdentity(target, base) {
  const { base_sha256: digest, where } = target, wanted = target.sketch?.values;
  if (digest && sha256(Float32Array.from(base.values)) !== digest) throw new Refusal("LF-607", where);
  if (digest || !wanted?.some((n) => n !== 0)) return;
  const drawn = sketch(target, base)?.values;
  if (!drawn) return;
  const dot = (a, b) => sum(64, (n) => a[n] * b[n]), [want, have] = [wanted, drawn].map((s) => Math.sqrt(dot(s, s)));
  if (!(dot(wanted, drawn) >= 0.9 * want * have) || !have) throw new Refusal("LF-607", where);
  const scaled = [want, have].every((norm) => Math.abs(norm - 1) > 1e-5);
  if (scaled && Math.max(want / have, have / want) > 6 / 5) throw new Refusal("LF-616", where);
}

function rescaled({ magnitude_axes: axes, eps = 0, tensors: { magnitude } }, V, place, where) {
  const slot = (index) => (axes ? axes.map((axis) => index[axis]) : inMatrix(place, index).slice(0, -1));
  const squares = fill(magnitude.shape, () => 0);
  const at = (index) => magnitude.shape.reduce((at, n, axis) => at * n + slot(index)[axis], 0);
  fill(V.shape, (index) => (squares.values[at(index)] += get(V, index) ** 2));
  const norms = squares.values.map((square) => Math.sqrt(square) + eps);
  if (norms.includes(0)) throw new Refusal("LF-612", where);
  return fill(V.shape, (index) => (magnitude.values[at(index)] * get(V, index)) / norms[at(index)]);
}

function withRows(rows, W, where) {
  if (!rowsFit(rows, W.shape)) throw new Refusal("LF-606", where);
  const order = new Map([...rows.indices.values].map((index, n) => [index, n]));
  return fill(W.shape, (index) => {
    const n = order.get(index[rows.axis]);
    return n === undefined ? get(W, index) : get(rows.values, index.map((i, axis) => (axis === rows.axis ? n : i)));
  });
}

// Every fault that only the values show: [rule, severity, where].
export function* faultsOfValues(target) {
  const bad = (tensor) => tensor.values.some((n) => !(Math.abs(n) <= (2 - 2 ** -23) * 2 ** 127));
  for (const { kind, tensors, matrix } of target.parts)
    for (const role in tensors) {
      if (role !== "indices" && bad(tensors[role])) yield ["LF-312", "error", `${target.key}.${role}`];
      else if (matrix && tensors[role].values.every((n) => n === 0)) yield ["LF-313", "warning", `${target.key}.${role}`];
    }
  if (target.sketch && bad(target.sketch)) yield ["LF-312", "error", `${target.key}.sketch`];
}

const sha256 = (bytes) => createHash("sha256").update(bytes).digest("hex");

// Over key → parts, each with its fields as a canonical file states them and its roles.
export function digest(targets) {
  const content = {};
  for (const [key, { parts }] of Object.entries(targets)) content[key] = parts.map(contentOf);
  return sha256(canonical(content));
}

function contentOf({ tensors, matrix, ...fields }) {
  for (const name of ["r", "eps", "axis", "magnitude_axes"]) if (fields[name] === undefined) delete fields[name];
  for (const name of ["eps", "axis"]) if (fields[name] === 0) delete fields[name];
  if (!fields.allows?.length) delete fields.allows;
  const roles = {};
  for (const [role, { dtype, shape, bytes }] of Object.entries(tensors)) roles[role] = { dtype, shape, sha256: sha256(bytes) };
  return { ...fields, roles };
}

// 64 values by which a base tensor is recognised; null for one that has none.
export function sketch({ place, where }, base) {
  if (!place) throw new Refusal("LF-604", where);
  const [width, height] = [place.matrix.at(-1), product(place.matrix.slice(0, -1))];
  const [P, Q] = [["out", height], ["in", width]].map(([side, outputLength]) =>
    createHash("shake128", { outputLength }).update(`loraformat/1\nsketch\n${side}`).digest());
  const sign = (bytes, j, k) => ((bytes[j] >> k) & 1 ? 1 : -1), S = fill([8, 8], () => 0);
  fill(base.shape, (index) => {
    const at = inMatrix(place, index), i = at.pop(), value = get(base, index);
    const row = at.reduce((flat, n, axis) => flat * place.matrix[axis] + n, 0);
    for (let n = 0; n < 64; n++) S.values[n] += sign(P, row, n >> 3) * value * sign(Q, i, n & 7);
  });
  const values = S.values.map(Math.fround);
  return values.every(Number.isFinite) ? { shape: [64], values } : null;
}
