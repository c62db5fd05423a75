// A second reader and validator of loraformat 1.0, written from spec/loraformat.md: plain Node, no packages, and
// slow on purpose, one formula a function. It speaks the protocol of appendix B: a JSON request a line, a reply a line.
//
//     python run.py node reader.mjs

import { createInterface } from "node:readline";
import { read } from "./reader/adapter.mjs";
import { apply, digest, faultsOfValues, matrix, sketch } from "./reader/arithmetic.mjs";
import { Refusal } from "./reader/container.mjs";

const numbers = ({ shape, values }) => ({ shape: [...shape], values: [...values] });

function validate(path) {
  try {
    const { targets, warnings } = read(path);
    const faults = Object.values(targets).flatMap((target) => [...faultsOfValues(target)]);
    return [...warnings, ...faults.map(([rule, severity, where]) => ({ rule, severity, where }))];
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    return [{ rule: error.rule, severity: "error", where: error.where }];
  }
}

const OPERATIONS = {
  validate: ({ path }) => ({ problems: validate(path) }),
  digest: ({ path }) => ({ digest: digest(read(path).targets) }),
  matrix: ({ path, key }) => numbers(matrix(read(path).targets[key])),
  apply: ({ path, key, base }) => numbers(apply(read(path).targets[key], base)),
  sketch: ({ path, key, base }) => numbers(sketch(read(path).targets[key], base)),
};

function reply(request) {
  if (!Object.hasOwn(OPERATIONS, request.op)) return { unsupported: true };
  try {
    return OPERATIONS[request.op](request);
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    return { refused: [error.rule] };
  }
}

for await (const line of createInterface({ input: process.stdin })) {
  process.stdout.write(`${JSON.stringify(reply(JSON.parse(line)))}\n`);
}
