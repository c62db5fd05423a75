// The metadata value and the tensors → targets, each checked (sections 5 to 10).

import { fit } from "./fit.mjs";
import { canonical, parse } from "./json.mjs";
import { Refusal, isObject, open } from "./container.mjs";

const NAME_SPACES = ["torch", "mlx", "gguf", "flax", "keras", "kohya"];
export const KINDS = {
  replace: { tensors: ["replace"], fields: { allows: "words" } },
  lora: { tensors: ["lora_A", "lora_B"], optional: ["mid"], additive: true },
  loha: { tensors: ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"], optional: ["t1", "t2"], additive: true },
  lokr: {
    tensors: [],
    optional: ["lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "t2"],
    additive: true,
  },
  delta: { tensors: ["delta"], additive: true },
  magnitude: { tensors: ["magnitude"], fields: { magnitude_axes: "integers", eps: "number" } },
  rows: { tensors: ["values", "indices"], fields: { axis: "integer" } },
};
const ROLES = new Set(Object.values(KINDS).flatMap((kind) => [...kind.tensors, ...(kind.optional ?? [])]).concat("sketch"));
const SCALED = { alpha: "anything", scale_rule: "string", r: "integer" };
const TOP = {
  version: "string", names: "string", targets: "object", requires: "strings", components: "strings",
  base_model: "object", about: "object", provenance: "object", extensions: "texts",
};
const TARGET = { parts: "list", shape: "naturals", axes: "object", op: "string", assumed: "strings", base_sha256: "string" };
const AXES = { out: "naturals", in: "naturals", batch: "naturals" };

const isInteger = (value) => typeof value === "bigint";
const isText = (value) => typeof value === "string";
const listOf = (test) => (value) => Array.isArray(value) && value.every(test);
const TYPES = {
  anything: () => true,
  string: isText,
  integer: isInteger,
  number: (value) => isInteger(value) || typeof value === "number",
  object: isObject,
  list: Array.isArray,
  strings: listOf(isText),
  integers: listOf(isInteger),
  naturals: listOf((value) => isInteger(value) && value >= 0n),
  texts: (value) => isObject(value) && Object.values(value).every(isText),
  words: listOf((value) => value === "resize" || value === "add"),
};
const LARGEST = (2 - 2 ** -23) * 2 ** 127;

// {names, targets: key → target, warnings}; a Refusal for the first error.
export function read(path) {
  const { tensors, metadata } = open(path);
  if (!("loraformat" in metadata)) throw new Refusal("LF-201");
  const warnings = [];
  const value = valueOf(metadata.loraformat, warnings);
  checkVersion(value);
  const top = members(value, TOP, ["version", "names", "targets"], "loraformat", warnings);
  if (!NAME_SPACES.includes(top.names) && !/^[a-z][a-z0-9-]*(\.[a-z0-9][a-z0-9_-]*)+$/.test(top.names))
    throw new Refusal("LF-208", "loraformat.names");
  const components = top.components ?? [];
  if (!components.every((name) => /^[A-Za-z_][A-Za-z0-9_]*$/.test(name)) || new Set(components).size < components.length)
    throw new Refusal("LF-209", "loraformat.components");
  const roles = rolesOf(tensors), targets = Object.create(null);
  if (!Object.keys(top.targets).length) throw new Refusal("LF-304", "loraformat.targets");
  for (const [key, entry] of Object.entries(top.targets)) {
    checkKey(key, components);
    targets[key] = targetOf(key, entry, roles[key] ?? {}, warnings);
    delete roles[key];
  }
  for (const key in roles) throw new Refusal("LF-302", `${key}.${Object.keys(roles[key])[0]}`);
  return { names: top.names, targets, warnings };
}

function valueOf(text, warnings) {
  let value, spelled;
  try {
    value = parse(text);
    spelled = canonical(value);
  } catch {
    throw new Refusal("LF-202", "loraformat");
  }
  if (!isObject(value)) throw new Refusal("LF-202", "loraformat");
  if (spelled !== text) warnings.push({ rule: "LF-207", severity: "warning", where: "loraformat" });
  return value;
}

function checkVersion({ version, requires }) {
  if (isText(version) && !/^1\.(0|[1-9][0-9]*)$/.test(version)) throw new Refusal("LF-205", "loraformat.version");
  if (TYPES.strings(requires) && requires.length) throw new Refusal("LF-206", "loraformat.requires");
}

// The members that a table names, each of its type; others are reported.
function members(value, types, required, where, warnings) {
  if (!isObject(value)) throw new Refusal("LF-203", where);
  for (const name of required) if (!(name in value)) throw new Refusal("LF-203", where);
  const known = Object.create(null);
  for (const [name, member] of Object.entries(value)) {
    if (!Object.hasOwn(types, name)) warnings.push({ rule: "LF-204", severity: "warning", where });
    else if (!TYPES[types[name]](member)) throw new Refusal("LF-203", `${where}.${name}`);
    else known[name] = member;
  }
  return known;
}

function rolesOf(tensors) {
  const roles = Object.create(null);
  for (const name in tensors) {
    const dot = name.lastIndexOf("."), role = name.slice(dot + 1);
    if (dot < 0 || !ROLES.has(role)) throw new Refusal("LF-302", name);
    (roles[name.slice(0, dot)] ??= Object.create(null))[role] = tensors[name];
  }
  return roles;
}

function checkKey(key, components) {
  if (!key || key !== key.normalize("NFC") || /[\p{Cc}\p{Zl}\p{Zp}\u202a-\u202e\u2066-\u2069]/u.test(key))
    throw new Refusal("LF-301", key);
  const colon = key.indexOf(":");
  if (components.length && !(components.includes(key.slice(0, colon)) && colon > 0 && colon < key.length - 1))
    throw new Refusal("LF-209", key);
}

function targetOf(key, entry, roles, warnings) {
  const where = `targets["${key}"]`;
  const known = members(entry, TARGET, ["parts"], where, warnings);
  const place = placeOf(known, where, warnings);
  if ("base_sha256" in known && !/^[0-9a-f]{64}$/.test(known.base_sha256)) throw new Refusal("LF-407", where);
  const { sketch, ...stored } = roles;
  const kinds = known.parts.map((part) => (isObject(part) ? part.kind : undefined));
  const order = kinds.map((kind) => Object.keys(KINDS).indexOf(kind));
  if (!kinds.length || order.some((n, i) => n < 0 || (i && n <= order[i - 1]))) throw new Refusal("LF-305", where);
  const parts = known.parts.map((part) => partOf(part, stored, where, warnings));
  const target = { key, where, parts, place, sketch, base_sha256: known.base_sha256 };
  fit(target);
  if (Object.keys(stored).length) throw new Refusal("LF-302", `${key}.${Object.keys(stored)[0]}`);
  return target;
}

function placeOf(known, where, warnings) {
  if ("shape" in known !== "axes" in known) throw new Refusal("LF-401", where);
  if (!("shape" in known)) return undefined;
  const axes = members(known.axes, AXES, ["out", "in"], `${where}.axes`, warnings);
  const [out, in_, batch] = [axes.out, axes.in, axes.batch ?? []].map((list) => list.map(Number));
  const shape = known.shape.map(Number), listed = [...batch, ...out, ...in_].sort((a, b) => a - b);
  if (listed.length !== shape.length || listed.some((axis, n) => axis !== n)) throw new Refusal("LF-402", where);
  if (shape.includes(0) || (shape.length && !out.length)) throw new Refusal("LF-402", where);
  return { shape, out, in: in_, batch };
}

// {kind, tensors: role → Tensor, …}; takes its tensors out of `stored`.
function partOf(entry, stored, where, warnings) {
  const { tensors, optional = [], additive, fields = {} } = KINDS[entry.kind];
  const types = { kind: "string", ...(additive ? SCALED : fields) };
  const part = { ...members(entry, types, additive ? ["alpha", "scale_rule"] : [], where, warnings), tensors: {} };
  for (const role of [...tensors, ...optional]) {
    if (role in stored) part.tensors[role] = stored[role];
    else if (tensors.includes(role)) throw new Refusal("LF-303", where);
    delete stored[role];
  }
  if (additive) {
    const { alpha, scale_rule: rule, r } = part;
    if (!TYPES.number(alpha) || !(Math.abs(Number(alpha)) <= LARGEST)) throw new Refusal("LF-306", where);
    if (!["alpha/r", "alpha/sqrt(r)", "factor"].includes(rule) || (r !== undefined && r < 1n)) throw new Refusal("LF-307", where);
  }
  for (const name of ["magnitude_axes"]) if (name in part) part[name] = part[name].map(Number);
  for (const name of ["alpha", "r", "eps", "axis"]) if (name in part) part[name] = Number(part[name]);
  return part;
}
