"""What tools make of an exported model on its way to a device: quantised, cast, slimmed, fused, or built anew."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import string
import subprocess
import sys
import warnings

import onnx

HEADS = {"bert": (4, 24), "minilm": (12, 384), "gpt2": (3, 24)}


def quiet(work):
    """A tool at work, without what it prints."""

    def run(*args):
        for name in ("onnxruntime", "root", "onnxslim"):
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            work(*args)

    return run


def dynamic(**options):
    def work(given, name, out):
        from onnxruntime.quantization import quantize_dynamic

        quantize_dynamic(str(given.model), str(out), **options)

    return work


def static(form):
    def work(given, name, out):
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

        class Reader(CalibrationDataReader):
            def __init__(self):
                self.rest = iter([dict(given.feeds)])

            def get_next(self):
                return next(self.rest, None)

        quantize_static(str(given.model), str(out), Reader(), quant_format=getattr(QuantFormat, form), per_channel=True)

    return work


def blocks(**options):
    def work(given, name, out):
        from onnxruntime.quantization import QuantFormat
        from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

        settings = {key: getattr(QuantFormat, v) if key == "quant_format" else v for key, v in options.items()}
        config = DefaultWeightOnlyQuantConfig(block_size=16, **settings)
        tool = MatMulNBitsQuantizer(onnx.load(given.model), algo_config=config)
        tool.process()
        onnx.save(tool.model.model, out)

    return work


def fused(half):
    def work(given, name, out):
        from onnxruntime.transformers import optimizer

        heads, hidden = HEADS[name]
        kind = "gpt2" if name == "gpt2" else "bert"
        tool = optimizer.optimize_model(
            str(given.model), model_type=kind, num_heads=heads, hidden_size=hidden, opt_level=0
        )
        if half:
            tool.convert_float_to_float16(keep_io_types=True)
        tool.save_model_to_file(str(out))

    return work


def slimmed(given, name, out):
    import onnxslim

    onnx.save(onnxslim.slim(onnx.load(given.model)), out)


def halved(given, name, out):
    from onnxconverter_common import float16

    onnx.save(float16.convert_float_to_float16(onnx.load(given.model), keep_io_types=True), out)


TOOLS = {
    "dynamic int8": dynamic(),
    "dynamic uint8, per channel": dynamic(per_channel=True),
    "static QDQ": static("QDQ"),
    "4 bits": blocks(is_symmetric=True),
    "4 bits, zero points": blocks(is_symmetric=False),
    "8 bits": blocks(bits=8),
    "4 bits, QDQ": blocks(is_symmetric=False, quant_format="QDQ"),
    "onnxslim": slimmed,
    "float16": halved,
    "fused": fused(half=False),
    "fused, float16": fused(half=True),
}
"""ONNX Runtime's quantisers, its optimizer for transformers, onnxslim, onnxconverter-common."""


def make(tool, given, name, out):
    """Write ``out``, which is what a tool makes of an export."""
    quiet(TOOLS[tool])(given, name, out)


def build(checkpoint, precision, out, adapter=None, architecture="LlamaForCausalLM"):
    """What the builder of onnxruntime-genai makes of a checkpoint: a folder; ``adapter``: PEFT's, in the same graph."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    source = out.parent / f"{out.name}-source"
    shutil.copytree(checkpoint, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": [architecture]}))
    pieces = ["<unk>", "<s>", "</s>", *string.ascii_letters, "Ġ", "at"]
    words = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, [("a", "t")], unk_token="<unk>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(source)
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", out, "-p", precision]
    command += ["--extra_options", f"adapter_path={adapter}"] if adapter else []
    subprocess.run([*command, "-e", "cpu", "-c", out.parent / "cache"], check=True, capture_output=True)
