"""MaxText's own adapters (AI-Hypercomputer/maxtext e591f30, utils/lora_utils.py): ``lora_a.kernel``, ``lora_b.kernel``.

A folder with ``adapter_config.json`` (r, lora_alpha: the scale is alpha / r) and the arrays in ``0/items``. Only the
projections of attention have factors. E is the model's width, N heads of H, L the layers of a scan:

    query, key, value    kernel [E, N, H]       a [E, r]          b [r, N, H]
    out                  kernel [N, H, E]       a [N, H, r]       b [r, E]
    scanned              kernel [E, L, N, H]    a [E, L, r]       b [r, L, N, H]
    scanned out          kernel [N, L, H, E]    a [N, L, H, r]    b [r, L, E]

How many axes a and b have tells which it is. MaxText's LoRA of Qwix (``kernel_lora_a``) is the layout ``qwix``.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from loraformat import canonical
from loraformat.axes import Placement
from loraformat.errors import LoraFormatError, Problem
from loraformat.faults import is_number, is_rank
from loraformat.layout import Output, Reading, text_file
from loraformat.parts import Lora
from loraformat.source import Source
from loraformat_converters.flax import Tree, open_tree, orbax
from loraformat_converters.flax.factors import as_arrays, as_matrices, layers_first, layers_second
from loraformat_converters.flax.pairs import Draft, OfTrees, form_of, grouped, kept_form, scale_stated

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import numpy.typing as npt

    from loraformat.adapter import Adapter
    from loraformat.layout import ReadOptions, WriteOptions
    from loraformat.scale import ScaleRule
    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["MaxText", "layout"]

_CONFIG, _ITEMS = "adapter_config.json", "0/items"
_ROLES = ("lora_a.kernel", "lora_b.kernel")
_STATE = re.compile(r"step(/value)?|opt_state/.*")  # of a training state, beside the parameters
_TARGET = re.compile(r"(?:.*/)?(self_attention/(?:query|key|value|out))/kernel")
_PLAIN, _SCANNED = {(2, 3), (3, 2)}, {(3, 4), (4, 3)}  # axes of a and b
_SPECS = ("in,out,out", "in,in,out")


class MaxText(OfTrees):
    """MaxText's folder of an adapter, or the tree alone in any container."""

    name = "maxtext"
    describes = "MaxText's own LoRA of attention: adapter_config.json and 0/items (Orbax); the tree alone, too"
    scale = "lora_alpha / r, in adapter_config.json"

    def detect(self, source: Source) -> str | None:
        """Paths that end with lora_a.kernel and lora_b.kernel."""
        found = next((path for path in _tree(source) or () if _split(path)), None)
        return f"the tree has {found}" if found else None

    def read(self, source: Source, options: ReadOptions) -> Reading:
        """Every pair, scaled as the configuration says or as is stated; all of them placed.

        Raises:
            LoraFormatError: LF-509 no configuration and no alpha; LF-507 two that differ; LF-503, LF-506, LF-303, LF-309.
        """
        tree = _tree(source)
        draft = Draft(tree or {})
        stems, others = grouped(draft.tree, _split)
        draft.strays(others, "name the folder of the adapter, not that of the model")
        config = _config(source, draft)
        scale = _scale(config, options, draft, str(source.path))
        ranks = {"--rank": options.rank, _CONFIG: config.get("r")}
        for stem, a, b in draft.pairs(stems, _ROLES):
            key, rank = f"{stem}/kernel", a.shape[-1]
            wrong = [f"{where} says {said}" for where, said in ranks.items() if said not in (None, rank)]
            if wrong:
                draft.say("LF-507", f"the rank is {rank}, {wrong[0]}", key)
            elif (a.ndim, b.ndim) not in _PLAIN | _SCANNED or not _fit(a, b):
                draft.say("LF-309", f"a {list(a.shape)} and b {list(b.shape)} are no pair of MaxText's", key)
            elif scale is not None:
                draft.target(key, *_pair(a, b, scale))
        form = form_of(tree) | {"config": {k: v for k, v in config.items() if k not in ("r", "lora_alpha")}}
        return Reading(draft.finish("flax", {"maxtext": json.dumps(form, sort_keys=True)}, str(source.path)))

    def write(self, adapter: Adapter, options: WriteOptions) -> Output:
        """A folder as MaxText has it; of a single file the scale, which it does not hold, is said."""
        made = super().write(adapter, options)
        first = next(iter(adapter.values()))["lora"]
        if not made.folder:
            what = f"the scale {first.scale:g} is not in this file: MaxText reads lora_alpha / r of {_CONFIG}"
            return Output(made.files, made.folder, [Problem("LF-509", what, severity="warning")])
        kept = kept_form(adapter, self.name).get("config")
        alpha = first.alpha if first.scale_rule == "alpha/r" else first.scale * first.r
        config = {**(kept if isinstance(kept, dict) else {}), "r": first.r, "lora_alpha": alpha}
        config["target_modules"] = sorted({m[1].replace("/", ".") for key in adapter if (m := _TARGET.fullmatch(key))})
        text = json.dumps(config, indent=2, sort_keys=True)
        return Output({_CONFIG: text_file(text)} | {f"{_ITEMS}/{n}": w for n, w in made.files.items()}, folder=True)

    def leaves(self, adapter: Adapter) -> dict[str, Array]:
        """Path → array, of pairs of attention's projections that share rank and scale; LF-508 for any other."""
        problems = list(_unlike(adapter))
        arrays: dict[str, Array] = {}
        for key, update in adapter.items():
            found = list(_obstacles(key, update))
            problems += found
            if not found:
                stem = key.removesuffix("/kernel")
                a, b = _stored(update)
                arrays |= {f"{stem}/{_ROLES[0]}": a, f"{stem}/{_ROLES[1]}": b}
        if problems:
            raise LoraFormatError(problems)
        return arrays


def _tree(source: Source) -> Tree | None:
    """The adapter's tree: of the folder's ``0/items``, without what a training state has beside the parameters."""
    items = source.folder / _ITEMS
    inner = source.path.is_dir() and orbax.recognises(items)
    tree = open_tree(Source(items) if inner else source)
    if tree is None or not any(_split(path) for path in tree):  # a large checkpoint is not read to be told apart
        return tree
    state = [path for path in tree.arrays if _STATE.fullmatch(path)]
    return tree.without(state) if state else tree


def _split(path: str) -> tuple[str, str] | None:
    stem, _, leaf = path.rpartition("/")
    return (stem, leaf) if stem and leaf in _ROLES else None


def _config(source: Source, draft: Draft) -> Mapping[str, Any]:
    """What adapter_config.json says, beside the arrays or, of ``0/items`` itself, two folders above; else nothing."""
    text = source.sidecar(_CONFIG)
    if text is None and (above := _above(source)) is not None:
        text = Source(above).sidecar(_CONFIG)
    if text is None:
        return {}
    try:
        config = canonical.loads(text)
    except ValueError as error:
        draft.say("LF-503", f"{_CONFIG} is no JSON: {error}", str(source.path))
        return {}
    if not (isinstance(config, dict) and is_rank(config.get("r")) and _is_positive(config.get("lora_alpha"))):
        draft.say("LF-503", f"{_CONFIG} has no r and lora_alpha above zero", str(source.path))
        return {}
    if config.get("use_rslora") or config.get("rank_pattern") or config.get("alpha_pattern"):
        what = "MaxText scales by lora_alpha / r whatever the configuration says of rsLoRA and patterns"
        draft.say("LF-504", what, str(source.path), "remove what MaxText does not read, if its numbers are meant")
    return dict(config)


def _above(source: Source) -> Path | None:
    return source.path.parents[1] if source.path.parts[-2:] == ("0", "items") and source.path.is_dir() else None


def _is_positive(value: Any) -> bool:
    return is_number(value) and value > 0


def _scale(config: Mapping[str, Any], options: ReadOptions, draft: Draft, where: str) -> tuple[float, ScaleRule] | None:
    if not config:
        return scale_stated(options, draft, where)
    if options.alpha not in (None, config["lora_alpha"]) or options.scale_rule not in (None, "alpha/r"):
        draft.say("LF-507", f"{_CONFIG} says {config['lora_alpha']} / r, another scale is stated", where)
    return float(config["lora_alpha"]), "alpha/r"


def _fit(a: Array, b: Array) -> bool:
    scanned = (a.ndim, b.ndim) in _SCANNED
    return a.shape[-1] == b.shape[0] and (not scanned or a.shape[1] == b.shape[1])


def _pair(a: Array, b: Array, scale: tuple[float, ScaleRule]) -> tuple[Lora, Placement]:
    scanned = (a.ndim, b.ndim) in _SCANNED
    if scanned:
        a, b = layers_first(a), layers_first(b)
    n = int(scanned)
    ins, outs = a.shape[n:-1], b.shape[n + 1 :]
    shape = (ins[0], *a.shape[:n], *ins[1:], *outs)
    in_ = (0, *range(1 + n, n + len(ins)))
    place = Placement(shape, tuple(range(n + len(ins), len(shape))), in_, (1,) * n)
    return Lora(*as_matrices(a, b, n), *scale), place


def _stored(update: Update) -> tuple[Array, Array]:
    part, place = update["lora"], update.placement
    assert place is not None
    a, b = as_arrays(part, *(tuple(place.shape[axis] for axis in axes) for axes in (place.in_, place.out)))
    return (layers_second(a), layers_second(b)) if place.batch else (a, b)


def _unlike(adapter: Adapter) -> Iterator[Problem]:
    """Ranks and scales that differ: MaxText has one of each."""
    parts = [update["lora"] for update in adapter.values()]
    if len({part.r for part in parts}) > 1:
        yield Problem("LF-508", "MaxText has one rank for all, here there are several", "", "--pad-rank")
    scales = {part.scale for part in parts}
    if len(scales) > 1 or min(scales) <= 0:
        what = f"MaxText has one scale above zero for all, here they are {min(scales):g} to {max(scales):g}"
        yield Problem("LF-508", what, "", "--fold-scale")


def _obstacles(key: str, update: Update) -> Iterator[Problem]:
    part, place = update["lora"], update.placement
    if part.mid is not None:
        yield Problem("LF-508", "MaxText has no core between two factors", key, "--to-lora R")
    elif not _TARGET.fullmatch(key):
        what = "MaxText's own LoRA is of …/self_attention/query, key, value and out"
        yield Problem("LF-508", what, key, "--to qwix, which it loads too")
    elif place is None:
        yield Problem("LF-508", "the heads of the kernel are not known", key, "--base BASE")
    elif place.spec.replace("batch,", "") not in _SPECS or place.batch not in ((), (1,)):
        yield Problem("LF-508", f"a kernel of MaxText is [in,out,out] or [in,in,out], here [{place.spec}]", key)
    elif part.lora_A.shape[:-2] != place.batch_sizes or part.lora_B.shape[:-2] != place.batch_sizes:
        yield Problem("LF-508", "MaxText keeps a factor of each layer", key)


layout = MaxText()
