"""The net over llama.cpp's goldens has no hole: reading and writing made wrong, as people do, turns a check red."""

from dataclasses import replace

import numpy as np
from gguf_goldens import check_deltas
from mutants import net
from test_decoder_spaces import check_converted
from test_gguf import LLAMA, pair

import loraformat as lf
from loraformat import Adapter, testing
from loraformat.naming import decoders
from loraformat.verbs.convert import save
from loraformat_converters.gguf import architectures, file, layout, names, read, write

Draft = read._Draft


def gguf_delta(case):
    return lambda folder: check_deltas(case)


def read_back(folder):
    """What is written of unequal scales, ranks and kinds has the same changes."""
    targets = {
        "blk.0.attn_q.weight": pair(4, 11, 7, 6, "alpha/sqrt(r)"),
        "blk.0.attn_v.weight": pair(2, 5, 7, 6),
        "blk.0.attn_k.weight": pair(3, 5, 7, 6),
        "blk.0.ffn_up_exps.weight": pair(2, 6, 8, 0.7, "factor", batch=(3,)),
    }
    save(Adapter(targets, "gguf"), folder / "a.gguf", layout, LLAMA)
    again = lf.load(folder / "a.gguf")
    for key, update in targets.items():
        assert testing.relative_error(again[key].matrix(), update.matrix()) <= 1e-6, key


def zero(folder):
    save(Adapter({"a.weight": pair(2, 5, 7, 0.0)}, "gguf"), folder / "a.gguf", layout, LLAMA)
    assert not lf.load(folder / "a.gguf")["a.weight"].matrix().any()


def the_scale_is_lost(monkeypatch):
    monkeypatch.setattr(Draft, "scale", lambda *_: (1.0, "factor"))


def alpha_is_the_scale(monkeypatch):
    monkeypatch.setattr(Draft, "scale", lambda self, *_: (self.alpha, "factor"))


def alpha_is_of_rslora(monkeypatch):
    monkeypatch.setattr(Draft, "scale", lambda self, *_: (self.alpha, "alpha/sqrt(r)"))


def factors_are_swapped(monkeypatch):
    whole = Draft.grouped

    def swapped(self, source):
        found = whole(self, source)
        return {
            k: {"lora_a": r["lora_b"].swapaxes(-1, -2), "lora_b": r["lora_a"].swapaxes(-1, -2)}
            for k, r in found.items()
        }

    monkeypatch.setattr(Draft, "grouped", swapped)


def shapes_are_as_ggml_counts_them(monkeypatch):
    whole = file._shape
    monkeypatch.setattr(file, "_shape", lambda *args: whole(*args)[::-1])


def a_key_is_skipped(monkeypatch):
    whole = Draft.grouped
    monkeypatch.setattr(Draft, "grouped", lambda self, source: dict(list(whole(self, source).items())[1:]))


def an_embedding_is_like_the_rest(monkeypatch):
    monkeypatch.setattr(read, "EMBEDDING", "no such tensor")


def an_embedding_is_placed_like_the_rest(monkeypatch):
    whole = read.Placement
    monkeypatch.setattr(
        read,
        "Placement",
        lambda shape, out, in_, *b: whole(shape, in_, out) if out == (1,) and not b else whole(shape, out, in_, *b),
    )


def experts_are_turned_round(monkeypatch):
    whole = Draft.grouped

    def turned(self, source):
        found = whole(self, source)
        return {
            k: {**r, "lora_a": r["lora_a"][::-1] if r["lora_a"].ndim == 3 else r["lora_a"]} for k, r in found.items()
        }

    monkeypatch.setattr(Draft, "grouped", turned)


def q8_0_forgets_its_scales(monkeypatch):
    whole = file._q8_0
    monkeypatch.setattr(file, "_q8_0", lambda data: np.sign(whole(data)))


def nothing_is_folded(monkeypatch):
    monkeypatch.setattr(write, "under_scale", lambda part, scale: (part.lora_B, 0.0))


def rslora_is_forgotten(monkeypatch):
    monkeypatch.setattr(write, "_own_alpha", lambda part: part.alpha)


def the_fold_forgets_the_rank(monkeypatch):
    whole = write.under_scale
    monkeypatch.setattr(write, "under_scale", lambda part, scale: whole(part, scale * part.r))


def an_alpha_of_zero_is_written(monkeypatch):
    monkeypatch.setattr(write, "_alpha", lambda parts: 0.0)
    monkeypatch.setattr(write, "_under", lambda key, part, *_: part.lora_B)


def experts_are_written_the_other_way(monkeypatch):
    whole = write.store.write

    def wrong(file, values, tensors):
        turned = {n: t[::-1] if t.ndim == 3 and n.endswith(".lora_a") else t for n, t in tensors.items()}
        whole(file, values, turned)

    monkeypatch.setattr(write.store, "write", wrong)


def converted(case):
    return lambda folder: check_converted(case, folder)


def rows_are_not_reordered(monkeypatch):
    monkeypatch.setattr(names, "interleaved", lambda rows, heads: np.arange(rows))


def rows_are_reordered_twice(monkeypatch):
    whole = names.interleaved
    monkeypatch.setattr(names, "interleaved", lambda rows, heads: whole(rows, heads)[whole(rows, heads)])


def rows_are_reordered_the_other_way(monkeypatch):
    whole = names.interleaved
    monkeypatch.setattr(names, "interleaved", lambda rows, heads: np.argsort(whole(rows, heads)))


def rows_are_reordered_where_they_are_not(monkeypatch):
    whole = architectures.by_config
    monkeypatch.setattr(architectures, "by_config", lambda config: replace(whole(config), permuted=True))


def keys_have_the_heads_of_queries(monkeypatch):
    monkeypatch.setitem(names._HEADS, "k_proj", ("num_attention_heads",))


def experts_are_numbered_backwards(monkeypatch):
    whole = decoders.Seat

    def seat(name, index=None, **more):
        return whole(name, index=index and (index[1] - 1 - index[0], index[1]), **more)

    monkeypatch.setattr(decoders, "Seat", seat)


def gate_and_up_are_exchanged(monkeypatch):
    whole = architectures.by_config

    def exchanged(config):
        found = whole(config)
        other = {"gate": "up", "up": "gate"}
        swap = {k: "_".join(other.get(p, p) for p in v.split("_")) for k, v in found.decoder.experts.items()}
        return replace(found, decoder=replace(found.decoder, experts=swap))

    monkeypatch.setattr(architectures, "by_config", exchanged)


CASES = ("llama", "mixtral", "llama_f16", "llama_q8_0")
CHECKS = {case: gguf_delta(case) for case in CASES} | {"read back": read_back, "zero": zero}
CHECKS |= {f"converted {case}": converted(case) for case in ("llama", "rslora_patterns", "mixtral", "qwen3", "gpt2")}
MUTANTS = [
    *((mutant, "llama") for mutant in (the_scale_is_lost, alpha_is_the_scale, alpha_is_of_rslora, factors_are_swapped)),
    *((mutant, "llama") for mutant in (shapes_are_as_ggml_counts_them, a_key_is_skipped)),
    *((mutant, "llama") for mutant in (an_embedding_is_like_the_rest, an_embedding_is_placed_like_the_rest)),
    *((mutant, "mixtral") for mutant in (experts_are_turned_round, a_key_is_skipped, the_scale_is_lost)),
    (factors_are_swapped, "llama_f16"),
    (q8_0_forgets_its_scales, "llama_q8_0"),
    *((mutant, "read back") for mutant in (nothing_is_folded, rslora_is_forgotten, the_fold_forgets_the_rank)),
    (experts_are_written_the_other_way, "read back"),
    (an_alpha_of_zero_is_written, "zero"),
    *((rows_are_not_reordered, f"converted {case}") for case in ("llama", "rslora_patterns", "mixtral")),
    *((mutant, "converted llama") for mutant in (rows_are_reordered_twice, rows_are_reordered_the_other_way)),
    (rows_are_reordered_where_they_are_not, "converted qwen3"),
    (keys_have_the_heads_of_queries, "converted llama"),
    *((mutant, "converted mixtral") for mutant in (experts_are_numbered_backwards, gate_and_up_are_exchanged)),
    *(
        (mutant, "converted rslora_patterns")
        for mutant in (nothing_is_folded, rslora_is_forgotten, the_fold_forgets_the_rank)
    ),
    (an_embedding_is_like_the_rest, "converted llama"),
]

test_gguf_is_green, test_a_mutant_of_gguf_turns_red = net(CHECKS, MUTANTS)
