"""The net over mlx-lm's goldens has no hole: reading made wrong in a way that people do get wrong turns a check red."""

from dataclasses import replace

import numpy as np
from mlx_goldens import CASES, check_deltas
from mutants import net

from loraformat.axes import Placement
from loraformat.parts import Lora, Magnitude
from loraformat_converters.mlx import config, read
from loraformat_converters.mlx import write as writer

Draft = read._Draft


def changed(monkeypatch, method, change):
    """The method gives what ``change`` makes of its result."""
    whole = getattr(Draft, method)
    monkeypatch.setattr(Draft, method, lambda self, *args: change(whole(self, *args), *args))


def factors_are_swapped(monkeypatch):
    changed(
        monkeypatch,
        "factors",
        lambda pair, _, a, b: (b.swapaxes(-1, -2), a.swapaxes(-1, -2)) if a.ndim == 3 else (b, a),
    )


def a_transpose_is_lost(monkeypatch):
    def reshaped(pair, _, a, b):
        return tuple(x.reshape(y.shape) for x, y in zip((a, b), pair, strict=True))

    changed(monkeypatch, "factors", reshaped)


def experts_lie_in_another_order(monkeypatch):
    changed(monkeypatch, "factors", lambda pair, *_: (pair[0][::-1], pair[1]) if pair[0].ndim == 3 else pair)


def experts_are_read_by_rank(monkeypatch):
    def by_rank(pair, *_):
        a, b = pair
        return (a.reshape(a.shape[1], a.shape[0], -1).swapaxes(0, 1), b) if a.ndim == 3 else pair

    changed(monkeypatch, "factors", by_rank)


def the_scale_is_lost(monkeypatch):
    changed(monkeypatch, "scale", lambda *_: 1.0)


def the_scale_is_taken_for_alpha(monkeypatch):
    changed(monkeypatch, "scale", lambda scale, _, rank: scale / rank)


def a_key_is_skipped(monkeypatch):
    whole = Draft.grouped
    monkeypatch.setattr(Draft, "grouped", lambda self, t: dict(list(whole(self, t).items())[:-1]))


def an_embedding_lies_like_a_linear(monkeypatch):
    def turned(found, *_):
        place, embedding = found
        return (Placement(place.shape[::-1], (0,), (1,)), True) if embedding else found

    changed(monkeypatch, "placement", turned)


def a_magnitude_of_an_embedding_is_of_its_dimensions(monkeypatch):
    monkeypatch.setattr(read, "Magnitude", lambda m, axes: Magnitude(np.resize(m, 24) if axes else m, axes and (1,)))


def the_magnitude_is_dropped(monkeypatch):
    whole = read.Update
    monkeypatch.setattr(
        read, "Update", lambda parts, *more: whole(tuple(p for p in parts if p.kind != "magnitude"), *more)
    )


def a_fine_tune_is_added(monkeypatch):
    monkeypatch.setattr(
        read, "Replace", lambda tensor: Lora(np.ones((1, tensor.shape[-1])), tensor[..., :1], 1.0, "factor")
    )


def mlx_delta(case):
    return lambda folder: check_deltas(case)


def old_scale(folder):
    """A scale that a configuration leaves in doubt is none."""
    text = '{"lora_layers": 1, "lora_parameters": {"rank": 8, "alpha": 16, "scale": 10.0}}'
    assert len(config.parse(text)[0].readings) == 2


def doubt_is_overlooked(monkeypatch):
    monkeypatch.setattr(config.Config, "doubtful", False)


def folded(folder):
    """What is written of unequal scales and ranks has the same matrices."""
    from test_mlx import pair

    from loraformat import Adapter, testing

    parts = {"a.weight": pair(2, 5, 7, 2.0), "b.weight": pair(3, 4, 7, 0.3), "c.weight": pair(3, 4, 7, 0.3, batch=(5,))}
    testing.check_round_trip(writer_layout(), Adapter(parts, "mlx"), folder)


def writer_layout():
    from loraformat_converters.mlx import layout

    return layout


def the_scale_is_not_folded(monkeypatch):
    monkeypatch.setattr(writer, "under_scale", lambda part, scale: (part.lora_B, 0.0))


def the_scale_is_folded_the_wrong_way(monkeypatch):
    whole = writer.under_scale
    monkeypatch.setattr(writer, "under_scale", lambda part, s: whole(replace(part, alpha=s * s / part.scale), s))


def the_rank_is_padded_in_front(monkeypatch):
    pad = np.pad
    sides = iter([0, 1] * 9)

    def wrong(tensor, widths):
        return pad(tensor, [w[::-1] for w in widths] if next(sides) else widths)

    monkeypatch.setattr(writer.np, "pad", wrong)


CHECKS = {case: mlx_delta(case) for case in CASES} | {"old scale": old_scale, "folded": folded}
MUTANTS = [
    *((factors_are_swapped, case) for case in ("linear", "embedding", "dora")),
    *((a_transpose_is_lost, case) for case in ("linear", "half", "every")),
    *((mutant, "experts") for mutant in (experts_lie_in_another_order, experts_are_read_by_rank)),
    *((the_scale_is_lost, case) for case in ("linear", "half", "experts", "embedding", "dora")),
    *((the_scale_is_taken_for_alpha, case) for case in ("linear", "experts")),
    *((a_key_is_skipped, case) for case in ("linear", "experts", "dora")),
    *((an_embedding_lies_like_a_linear, case) for case in ("embedding", "every", "dora")[::2]),
    (a_magnitude_of_an_embedding_is_of_its_dimensions, "dora"),
    (the_magnitude_is_dropped, "dora"),
    (a_fine_tune_is_added, "full"),
    (doubt_is_overlooked, "old scale"),
    *((mutant, "folded") for mutant in (the_scale_is_not_folded, the_scale_is_folded_the_wrong_way)),
    (the_rank_is_padded_in_front, "folded"),
]

test_mlx_is_green, test_a_mutant_of_mlx_turns_red = net(CHECKS, MUTANTS)
