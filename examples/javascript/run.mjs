// node run.mjs MODEL.onnx ADAPTER.onnx_adapter [node|web]: the model's first output with the adapter and without it.
//
//   loraformat attach style=style.lora.safetensors --to base.onnx -o model.onnx --mode swap --slots required
//   node run.mjs model.onnx model.style.onnx_adapter

import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { noAdapter, readAdapter } from "./adapter.mjs";

const [model, file, host = "node"] = process.argv.slice(2);
const ort = createRequire(import.meta.url)(`onnxruntime-${host}`);
if (host === "web") ort.env.wasm.numThreads = 1;
const session = await ort.InferenceSession.create(host === "web" ? new Uint8Array(await readFile(model)) : model);
const adapter = readAdapter(new Uint8Array(await readFile(file)), ort);

// Ones for what is no adapter's; a real program has tokens here.
const feeds = {};
for (const { name, type, shape } of session.inputMetadata) {
  if (name.startsWith("lora/")) continue;
  const dims = shape.map((size) => (typeof size === "number" ? size : 2));
  const count = dims.reduce((a, b) => a * b, 1);
  feeds[name] = new ort.Tensor(type, type === "int64" ? new BigInt64Array(count).fill(1n) : new Float32Array(count).fill(1), dims);
}

const name = session.outputNames[0];
for (const [what, more] of [["base", noAdapter(session, ort)], ["adapter", adapter], ["base", noAdapter(session, ort)]]) {
  const { data } = (await session.run({ ...feeds, ...more }))[name];
  console.log(JSON.stringify({ what, name, data: Array.from(data) }));
}
