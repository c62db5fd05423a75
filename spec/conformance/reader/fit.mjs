// Whether the tensors of a target fit each other, their dtypes, the placement (sections 4, 7, 8, 9).

import { Refusal, product } from "./container.mjs";

const FLOATS = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"];
const same = (a, b) => a.length === b.length && a.every((n, i) => n === b[i]);
const covers = (matrix, whole) =>
  matrix.length === whole.length && matrix.every((n, i) => n === whole[i] || (n === 1 && i < whole.length - 2));

// Throws a Refusal, or sets `matrix`, the shape of M, and `r` where the tensors tell it.
export function fit(target) {
  const { key, where, parts, place, sketch } = target;
  for (const part of parts) for (const role in part.tensors) checkTensor(part.tensors[role], role, `${key}.${role}`);
  if (sketch && (sketch.dtype !== "F32" || !same(sketch.shape, [64]))) throw new Refusal("LF-408", `${key}.sketch`);
  const shapes = [];
  for (const part of parts.filter((part) => "alpha" in part)) {
    part.matrix = MATRIX[part.kind](part.tensors, (holds) => { if (!holds) throw new Refusal("LF-309", where); });
    const rank = { lora: () => part.tensors.lora_A.shape.at(-2), loha: () => part.tensors.hada_w1_b.shape[0] }[part.kind]?.();
    if (rank !== undefined && part.r !== undefined && part.r !== rank) throw new Refusal("LF-308", where);
    part.r ??= rank;
    if (part.r === undefined && part.scale_rule !== "factor") throw new Refusal("LF-307", where);
    shapes.push(part.matrix);
  }
  if (shapes.some((shape) => shape.length !== shapes[0].length)) throw new Refusal("LF-309", where);
  if (shapes.length) target.matrix = shapes[0].map((_, axis) => Math.max(...shapes.map((shape) => shape[axis])));
  if (!shapes.every((shape) => covers(shape, target.matrix))) throw new Refusal("LF-309", where);
  if (place) place.matrix = [...place.batch.map((a) => place.shape[a]), sizeOf(place, "out"), sizeOf(place, "in")];
  if (place && shapes.length && !covers(target.matrix, place.matrix)) throw new Refusal("LF-403", where);
  for (const part of parts) CHECKS[part.kind]?.(part, target);
}

const sizeOf = (place, side) => product(place[side].map((axis) => place.shape[axis]));

function checkTensor({ dtype, shape }, role, where) {
  const allowed = role === "indices" ? dtype === "I64" : FLOATS.includes(dtype) || (role === "replace" && dtype !== "C64");
  if (!allowed) throw new Refusal("LF-314", where);
  if (shape.includes(0)) throw new Refusal("LF-311", where);
}

// The shape of a product a·b, or of a, b around a core.
function pair(a, b, core, must) {
  must(a && b && a.shape.length === 2 && b.shape.length === 2);
  if (!core) {
    must(a.shape[1] === b.shape[0]);
    return [a.shape[0], b.shape[1]];
  }
  must(core.shape.length > 2 && core.shape[0] === a.shape[0] && core.shape[1] === b.shape[0]);
  return [a.shape[1], b.shape[1] * product(core.shape.slice(2))];
}

const MATRIX = {
  lora({ lora_A: { shape: a }, lora_B: { shape: b }, mid }, must) {
    must(a.length > 1 && a.length === b.length);
    must(!mid || (a.length === 2 && mid.shape.length > 2 && mid.shape[0] === b[1] && mid.shape[1] === a[0]));
    must(mid || a.at(-2) === b.at(-1));
    must(a.slice(0, -2).every((n, i) => n === b[i] || n === 1 || b[i] === 1));
    const kernel = mid ? product(mid.shape.slice(2)) : 1;
    return [...a.slice(0, -2).map((n, i) => Math.max(n, b[i])), b.at(-2), a.at(-1) * kernel];
  },
  loha(t, must) {
    must(!t.t1 === !t.t2);
    const [first, second] = [pair(t.hada_w1_a, t.hada_w1_b, t.t1, must), pair(t.hada_w2_a, t.hada_w2_b, t.t2, must)];
    must(same(first, second));
    return first;
  },
  lokr(t, must) {
    const side = (whole, a, b, core) => {
      must(!whole !== !(a || b) && (!whole || !core));
      return whole ? [whole.shape[0], product(whole.shape.slice(1))] : pair(a, b, core, must);
    };
    must(!t.lokr_w1 || t.lokr_w1.shape.length === 2);
    must(!t.lokr_w2 || t.lokr_w2.shape.length > 1);
    const [first, second] = [side(t.lokr_w1, t.lokr_w1_a, t.lokr_w1_b), side(t.lokr_w2, t.lokr_w2_a, t.lokr_w2_b, t.t2)];
    return [first[0] * second[0], first[1] * second[1]];
  },
  delta({ delta: { shape } }, must) {
    must(shape.length > 0);
    return shape.length === 1 ? [shape[0], 1] : shape;
  },
};

const CHECKS = {
  replace({ tensors }, { place, where }) {
    if (place && !same(tensors.replace.shape, place.shape)) throw new Refusal("LF-406", where);
  },
  magnitude(part, { place, matrix, where }) {
    const { magnitude_axes: axes, eps = 0, tensors } = part;
    if (axes && !(place && new Set(axes).size === axes.length && axes.every((a) => a in place.shape)))
      throw new Refusal("LF-404", where);
    const whole = place?.matrix ?? matrix;
    if (!whole || !(eps >= 0)) throw new Refusal("LF-404", where);
    if (!same(tensors.magnitude.shape, axes ? axes.map((a) => place.shape[a]) : whole.slice(0, -1)))
      throw new Refusal("LF-404", where);
  },
  rows({ axis = 0, tensors: { indices, values } }, { place, parts, where }) {
    const rising = indices.values.every((n, i, all) => n >= 0 && (!i || n > all[i - 1]));
    const shape = place?.shape ?? parts.find((part) => part.kind === "replace")?.tensors.replace.shape;
    if (indices.shape.length !== 1 || !rising || values.shape[axis] !== indices.shape[0]) throw new Refusal("LF-405", where);
    if (shape && !rowsFit({ axis, indices, values }, shape)) throw new Refusal("LF-405", where);
  },
};

// Whether these rows are slices of a tensor of this shape.
export function rowsFit({ axis, indices, values }, shape) {
  const cut = shape.map((n, a) => (a === axis ? indices.shape[0] : n));
  return same(values.shape, cut) && indices.values.at(-1) < shape[axis];
}
