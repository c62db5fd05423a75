"""The net has no hole: code made wrong in a way that people do get wrong turns a named check red.

Each mutant changes one place of the real code and runs the real check of the goldens, or of a small ONNX graph
that ONNX Runtime executes. A round trip would stay green under most of them: wrong in both directions is right.
"""

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from peft_goldens import check_deltas, check_merge, check_numbers, check_patterns, check_round_trip

import loraformat as lf
from loraformat import axes, huggingface, parts, registry, testing, updates
from loraformat_converters.onnx import index as onnx_index
from loraformat_converters.onnx.attach import Branch
from loraformat_converters.peft import config, read, write

# Everything is square, the rank too: a mistake cannot hide behind a shape that does not fit.
GRAPH = """<ir_version: 10, opset_import: ["": 20]>
tiny (float[n, 6] x) => (float[n, 6] y) {
   h = Gemm <transB = 1> (x, wa, bias)
   y = MatMul (h, wb)
}"""


# The real checks, by the name of the test that runs them.


def peft_delta(case):
    return lambda tmp_path: check_deltas(case)


def peft_numbers(case):
    return lambda tmp_path: check_numbers(case)


def peft_merge(case):
    return lambda tmp_path: check_merge(case, tmp_path)


def peft_round_trip(case):
    return lambda tmp_path: check_round_trip(case, tmp_path)


def written_to_peft(tmp_path):
    """What is written from the model alone is read back with the same matrices."""
    draw = np.random.default_rng(0)
    ranks = {"layers.1.q+": 3, "layers.11.q+": 4, "a.proj": 3, "proj": 2}
    pairs = {p: [draw.standard_normal(s).astype(np.float32) for s in ((r, 7), (5, r))] for p, r in ranks.items()}
    ours = lf.Adapter(
        {f"{p}.weight": lf.Update((lf.Lora(*ab, 2.0 + i, "factor"),)) for i, (p, ab) in enumerate(pairs.items())}
    )
    testing.check_round_trip(PeftFolder(), ours, tmp_path)


class PeftFolder:
    """The PEFT layout, for ``check_round_trip``, whose path ends like a file's."""

    name, carries = "peft", frozenset({"lora"})

    def read(self, source, options):
        return registry.layout("peft").read(source, options)

    def write(self, adapter):
        return write.write(adapter)


def onnx_output(path, x):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"]).run(None, {"x": x})[0]


def onnx_tiny(verb):
    """The changed graph gives (x·(Wa + ΔWa)ᵀ + bias)·(Wb + ΔWb)ᵀ, computed beside it."""

    def check(tmp_path):
        draw = np.random.default_rng(1)
        wa, wb, x = (draw.standard_normal((6, 6)).astype(np.float32) for _ in range(3))
        bias = draw.standard_normal(6).astype(np.float32)
        pairs = [[draw.standard_normal(s).astype(np.float32) for s in ((6, 6), (6, 6))] for _ in range(2)]
        model = onnx.parser.parse_model(GRAPH)
        stored = {"wa": wa, "bias": bias, "wb": np.ascontiguousarray(wb.T)}
        model.graph.initializer.extend(numpy_helper.from_array(t, name) for name, t in stored.items())
        onnx.save(model, tmp_path / "base.onnx")
        updates = [lf.Update((lf.Lora(*ab, 9.0, "alpha/r"),)) for ab in pairs]
        adapter = lf.Adapter(dict(zip(("wa", "wb"), updates, strict=True)))
        verb(adapter, lf.open_base(tmp_path / "base.onnx"), tmp_path / "out.onnx")
        delta_a, delta_b = (1.5 * b @ a for a, b in pairs)
        wanted = (x @ (wa + delta_a).T + bias) @ (wb + delta_b).T
        assert testing.relative_error(onnx_output(tmp_path / "out.onnx", x), wanted) <= 1e-5

    return check


CHECKS = {
    "delta of linear": peft_delta("linear"),
    "delta of gpt2": peft_delta("gpt2"),
    "delta of rslora": peft_delta("rslora"),
    "delta of patterns": peft_delta("patterns"),
    "delta of mixed_conv1d_linear": peft_delta("mixed_conv1d_linear"),
    "delta of embedding": peft_delta("embedding"),
    "delta of conv": peft_delta("conv"),
    "delta of linear_square": peft_delta("linear_square"),
    "meaning of patterns": lambda tmp_path: check_patterns(config._meant),
    "numbers of patterns": peft_numbers("patterns"),
    "numbers of rslora_patterns": peft_numbers("rslora_patterns"),
    "merge of llama": peft_merge("llama"),
    "merge of bf16_upcast": peft_merge("bf16_upcast"),
    "round trip of dotted": peft_round_trip("dotted"),
    "written to PEFT": written_to_peft,
    "onnx merge": onnx_tiny(lf.merge),
    "onnx attach": onnx_tiny(lf.attach),
}


# The mutants: (what is wrong, the check that must see it, how the code is changed).


def lost_transpose(patch):
    whole = axes.Placement.from_matrix
    patch.setattr(axes.Placement, "from_matrix", lambda self, m: whole(self, m) if m.shape != self.shape else m)


def conv1d_forgotten(patch):
    patch.setattr(huggingface, "_CONV1D", {})


def alpha_is_the_scale(patch):
    patch.setattr(parts, "scale_of", lambda alpha, rule, r: float(alpha))


def scale_is_dropped(patch):
    patch.setattr(parts, "scale_of", lambda alpha, rule, r: 1.0)


def factors_are_swapped(patch):
    whole = read._pairs
    patch.setattr(read, "_pairs", lambda *a: (read._Pair(p.module, p.embedding, p.b.T, p.a.T) for p in whole(*a)))


def a_key_is_skipped(patch):
    whole = read._pairs
    patch.setattr(read, "_pairs", lambda *a: list(whole(*a))[1:])


def rslora_is_ignored(patch):
    patch.setattr(config.Config, "rule", "alpha/r")


def last_pattern_wins(patch):
    whole = config.Config._matches
    patch.setattr(config.Config, "_matches", lambda self, *a: reversed(list(whole(self, *a))))


def patterns_match_anywhere(patch):
    patch.setattr(config, "_meant", lambda pattern, module: config.re.search(pattern, module) is not None)


def patterns_match_any_end(patch):
    patch.setattr(config, "_meant", lambda pattern, module: config.re.search(f"({pattern})$", module) is not None)


def alpha_patterns_are_ignored(patch):
    patch.setattr(config.Config, "alpha", lambda self, module: self.value["lora_alpha"])


def fan_in_fan_out_is_trusted(patch):
    whole = read._update

    def trusting(pair, config, *rest):
        update = whole(pair, config, *rest)
        if update.placement is None:
            out, in_ = update.matrix_shape()
            turned = config.value["fan_in_fan_out"]
            update = update.placed(
                lf.Placement.of((in_, out) if turned else (out, in_), "in,out" if turned else "out,in")
            )
        return update

    patch.setattr(read, "_update", trusting)


def embedding_is_not_transposed(patch):
    whole = read._update

    def straight(pair, *rest):
        update = whole(pair, *rest)
        if update.op != "embedding":
            return update
        return update.placed(lf.Placement(update.matrix_shape(), (0,), (1,)))

    patch.setattr(read, "_update", straight)


def kernel_axes_are_reversed(patch):
    whole = read._convolution

    def reversed_kernel(pair, *rest):
        a = np.ascontiguousarray(pair.a.transpose(0, 1, *reversed(range(2, pair.a.ndim)))).reshape(pair.a.shape)
        return whole(read._Pair(pair.module, pair.embedding, a, pair.b), *rest)

    patch.setattr(read, "_convolution", reversed_kernel)


def the_sum_is_rounded_twice(patch):
    whole = updates.Update._sum
    patch.setattr(updates.Update, "_sum", lambda self, tile: whole(self, tile).astype(np.float16).astype(np.float32))


def the_last_tile_is_not_changed(patch):
    def forgetful(updates, base, norms):
        yield (updates[0].apply(base[:-1], (0, len(base) - 1))).astype(base.dtype)
        yield base[-1:]

    patch.setattr("loraformat.checkpoint.changed", forgetful)


def an_untouched_tensor_is_copied_from_the_wrong_place(patch):
    from loraformat.checkpoint import Checkpoint

    whole = Checkpoint._copy
    patch.setattr(
        Checkpoint,
        "_copy",
        lambda self, file, info: whole(self, file, replace(info, start=0, stop=info.stop - info.start)),
    )


def every_prefix_is_taken_away(patch):
    class Greedy(str):
        def removeprefix(self, prefix):
            return self.replace(prefix, "")

    whole = read._pairs
    patch.setattr(read, "_pairs", lambda tensors, *a: whole({Greedy(k): v for k, v in tensors.items()}, *a))


def written_patterns_are_not_escaped(patch):
    patch.setattr(write.re, "escape", lambda text: text)


def written_patterns_are_not_anchored(patch):
    whole = write._usual

    def loose(values):
        usual, rest = whole(values)
        return usual, {pattern.removeprefix("^"): value for pattern, value in rest.items()}

    patch.setattr(write, "_usual", loose)


def a_factor_is_written_as_alpha(patch):
    patch.setattr(write, "_alpha", lambda lora, rule: lora.alpha)


def trans_b_is_ignored(patch):
    whole = onnx_index._meaning

    def deaf(node, *rest):
        placement, refusal = whole(node, *rest)
        turned = replace(placement, out=placement.in_, in_=placement.out)
        return (turned if node.op_type == "Gemm" else placement), refusal

    patch.setattr(onnx_index, "_meaning", deaf)


def the_scale_is_dropped_in_attach(patch):
    whole = Branch.add

    def unscaled(self, key, lora, *rest):
        return whole(self, key, replace(lora, alpha=1.0, scale_rule="factor"), *rest)

    patch.setattr(Branch, "add", unscaled)


def the_factors_are_not_transposed_in_attach(patch):
    patch.setattr(Branch, "_turn", lambda self, stem, value: value)


MUTANTS = [
    (lost_transpose, "delta of gpt2"),
    (conv1d_forgotten, "delta of gpt2"),
    (alpha_is_the_scale, "delta of linear"),
    (alpha_is_the_scale, "numbers of patterns"),
    (alpha_is_the_scale, "merge of llama"),
    (alpha_is_the_scale, "onnx attach"),
    (scale_is_dropped, "delta of linear"),
    (factors_are_swapped, "delta of linear_square"),
    (a_key_is_skipped, "delta of linear"),
    (rslora_is_ignored, "delta of rslora"),
    (rslora_is_ignored, "numbers of rslora_patterns"),
    (last_pattern_wins, "delta of patterns"),
    (patterns_match_any_end, "meaning of patterns"),
    (patterns_match_anywhere, "meaning of patterns"),
    (alpha_patterns_are_ignored, "delta of patterns"),
    (fan_in_fan_out_is_trusted, "delta of mixed_conv1d_linear"),
    (embedding_is_not_transposed, "delta of embedding"),
    (kernel_axes_are_reversed, "delta of conv"),
    (the_sum_is_rounded_twice, "delta of linear"),
    (the_last_tile_is_not_changed, "merge of llama"),
    (an_untouched_tensor_is_copied_from_the_wrong_place, "merge of llama"),
    (every_prefix_is_taken_away, "round trip of dotted"),
    (written_patterns_are_not_escaped, "written to PEFT"),
    (written_patterns_are_not_anchored, "written to PEFT"),
    (a_factor_is_written_as_alpha, "written to PEFT"),
    (trans_b_is_ignored, "onnx merge"),
    (the_scale_is_dropped_in_attach, "onnx attach"),
    (the_factors_are_not_transposed_in_attach, "onnx attach"),
]


@pytest.mark.parametrize("name", CHECKS)
def test_the_check_is_green_on_the_code_as_it_is(name, tmp_path):
    CHECKS[name](tmp_path)


@pytest.mark.parametrize(("mutant", "name"), MUTANTS, ids=lambda value: getattr(value, "__name__", value))
def test_the_check_is_red_on_a_mutant(mutant, name, monkeypatch, tmp_path):
    config._parsed.cache_clear()
    mutant(monkeypatch)
    with pytest.raises((AssertionError, lf.LoraFormatError)):
        CHECKS[name](tmp_path)
