"""A model in GGUF as a base: names, shapes, values, the numbers that its metadata tells; and merges into it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraformat.axes import Placement
from loraformat.base import Options, Parameter
from loraformat.checkpoint.requantised import Values, requantised
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.names import nearest
from loraformat.placing import place
from loraformat.plan import Job, Outcome, Plan
from loraformat.resolve import Hints, Match, Resolution
from loraformat.tiles import Norms
from loraformat_converters.gguf import keys
from loraformat_converters.gguf.blocks import QUANTISED, Blocks
from loraformat_converters.gguf.file import NUMPY, GgufFile
from loraformat_converters.gguf.merging import Merge
from loraformat_converters.gguf.read import EMBEDDING

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.adapter import Adapter
    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["GgufModel"]

# Of the metadata, under ``<architecture>.``, by the names of a config.json (gguf 0.19.0 constants.py Keys).
_NUMBERS = {
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "num_local_experts": "expert_count",
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
}


class GgufModel:
    """An opened model; LF-511 where the file is not sound, LF-601 where it holds no model.

    Attributes:
        names: the name space of its parameters.
        architecture: ``general.architecture``.
        config: what a ``config.json`` would say, as far as the metadata tells it.
    """

    verbs = frozenset({"merge"})
    names = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = GgufFile(path)
        kind = self._value("general.type", "str") or "model"
        if kind != "model":
            raise fault("LF-601", f"{path} is of type {kind!r}, not a model", fix="an adapter is no base of another")
        self.architecture = self._value(keys.ARCHITECTURE, "str") or ""
        numbers = {name: self._value(f"{self.architecture}.{key}", "u32") for name, key in _NUMBERS.items()}
        told = {name: value for name, value in numbers.items() if value is not None}
        tied = "output.weight" not in self.file
        self.config: Mapping[str, Any] = {keys.ARCHITECTURE: self.architecture, "tie_word_embeddings": tied, **told}

    def _value(self, key: str, kind: str) -> Any:
        found = self.file.metadata.get(key)
        return found.value if found is not None and found.type == kind else None

    def parameters(self) -> Mapping[str, Parameter]:
        """Every tensor by its name; of a quantised one the dtype is ggml's name of the type."""
        return {name: Parameter(name, info.shape, info.type) for name, info in self.file.infos.items()}

    def describe(self) -> Mapping[str, Any]:
        """Architecture, the types of the tensors, and the numbers that the names of an adapter may depend on."""
        types = Counter(info.type for info in self.file.infos.values())
        return {
            "kind": "gguf",
            "architecture": self.architecture,
            "name": self._value("general.name", "str"),
            "tensors": len(self.file),
            "bytes": sum(info.stop - info.start for info in self.file.infos.values()),
            "types": dict(types.most_common()),
            "config": {name: value for name, value in self.config.items() if name != keys.ARCHITECTURE},
        }

    def linears(self, hints: Hints) -> Mapping[str, Placement | None]:
        """Every weight of two axes that ggml multiplies by."""
        shapes = {name: info.shape for name, info in self.file.infos.items()}
        wanted = {n: s for n, s in shapes.items() if len(s) == 2 and n.endswith(".weight") and n != EMBEDDING}
        return {name: Placement(shape, (0,), (1,)) for name, shape in wanted.items()}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Array:
        """The values, quantised ones as float32; or those of some rows. LF-704 the package ``gguf`` is not installed."""
        return self.file.read(name, rows)

    def dequantised(self, name: str) -> Values | None:
        """The values of a quantised tensor; None of any other."""
        info = self.file.infos.get(name)
        return Values(Blocks(self.file, name)) if info is not None and info.type not in NUMPY else None

    def requantised(
        self, name: str, updates: Sequence[Update], norms: Norms | None = None
    ) -> Iterator[tuple[tuple[int, int], Array]] | None:
        """(rows, the values of what a merge stores in them) of a tensor that it can round to, in order; None of any other."""
        if name not in self.file.infos or self.file.infos[name].type not in QUANTISED:
            return None
        return self._requantised(Blocks(self.file, name), updates, norms or Norms())

    @staticmethod
    def _requantised(grid: Blocks, updates: Sequence[Update], norms: Norms) -> Iterator[tuple[tuple[int, int], Array]]:
        start = 0
        for stored in requantised(updates, grid, norms):
            stop = start + len(stored)
            yield (start, stop), grid.run(start, stop).means(stored)
            start = stop

    def resolve(self, adapter: Adapter, hints: Hints) -> Resolution:
        """By exact name or the user's map; ggml's tensors are [*experts, out, in], the embedding [tokens, dim]."""
        targets: dict[str, tuple[Match, ...]] = {}
        problems = hints.unused(adapter)
        taken: dict[str, str] = {}
        for key, update in adapter.items():
            weight = hints.mapped(key) or key
            try:
                targets[key] = (self._match(key, update, weight, hints),)
            except LoraFormatError as error:
                problems += error.problems
                continue
            if weight in taken:
                problems.append(Problem("LF-603", f"{weight} is meant by {taken[weight]} too", key))
            taken[weight] = key
        return Resolution(targets, tuple(problems))

    def _match(self, key: str, update: Update, weight: str, hints: Hints) -> Match:
        if weight not in self.file.infos:
            close = ", ".join(nearest(weight, self.file.infos)) or "none"
            fix = "loraformat retarget translates names; or --names map.json"
            raise fault("LF-602", f"the base has no tensor {weight}; nearest: {close}", where=key, fix=fix)
        shape = self.file.infos[weight].shape
        lookup = weight == EMBEDDING and len(shape) == 2
        spec = "in,out" if lookup else ",".join(["batch"] * (len(shape) - 2) + ["out", "in"])
        claims = [(spec, f"gguf: {'rows are looked up' if lookup else 'ggml multiplies by rows'}")]
        placement, evidence = place(key, update, shape, hints.spec(key), claims if len(shape) > 1 else [])
        rung = f"user: {weight}" if hints.mapped(key) else "name: equal"
        return Match(self.path.name, None, weight, placement, (rung, *evidence))

    def plan(self, verb: str, jobs: Sequence[Job], options: Options) -> Plan:
        """What a merge replaces; every obstacle at once (LF-606, LF-608, LF-609, LF-703)."""
        if verb not in self.verbs:
            what = f"a model in GGUF is no graph to {verb} to"
            fix = f"loraformat convert ADAPTER adapter.gguf --base {self.path}; llama.cpp runs it beside the model (--lora)"
            raise fault("LF-608", what, where=str(self.path), fix=fix)
        merge = Merge.of(self.file, jobs, options)
        size = self.file.size
        return Plan(verb, tuple(jobs), options, merge.steps, size, size, merge.peak, state=merge, estimate=merge.losses)

    def apply(self, plan: Plan, *, force: bool = False) -> Outcome:
        """Write the merged model: a file of the same size, in which only the tensors that change are others."""
        merge: Merge = plan.state
        merge.write(plan.options.out, force=force)
        norms = {key: change.norms for change in merge.changes.values() for key in change.keys}
        ordered = {key: norms[key] for job in plan.jobs for key in job.resolution.targets}
        return Outcome(ordered, plan.writes)
