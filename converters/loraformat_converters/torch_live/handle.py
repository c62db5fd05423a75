"""Put an adapter on a live module: beside its weights, or merged into them; and take it off again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from loraformat.bound import check_bound
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.resolve import Hints
from loraformat.strength import strengthen
from loraformat_converters.torch_live import merged, stack
from loraformat_converters.torch_live.base import ModuleBase, Place
from loraformat_converters.torch_live.beside import uncalled
from loraformat_converters.torch_live.factors import Factors, UpdateModule

if TYPE_CHECKING:
    from loraformat.adapter import Adapter
    from loraformat.resolve import Match
    from loraformat.updates import Update

__all__ = ["Handle", "apply"]

Mode = Literal["branch", "merge"]


def apply(
    adapter: Adapter,
    module: nn.Module | Mapping[str, Any],
    *,
    mode: Mode = "branch",
    weight: float = 1.0,
    only: Sequence[str] = (),
    scales: Mapping[str, float] | None = None,
    hints: Hints | None = None,
    trainable: bool = False,
    any_base: bool = False,
) -> Handle:
    """Put ``adapter`` on ``module``; several may be there at once, and act in the order in which they came.

    ``branch``: W stays what it is. A pair of a Linear, Conv1D, convolution or embedding runs beside the module,
    h = Wx + s·B(Ax), by a forward hook; every other kind, and every module that overrides ``forward``, gets its changed
    weight by a parametrization, and then ``state_dict`` has ``parametrizations.<leaf>.original``. Where a parent reads a
    weight without calling its module a hook does nothing: of torch's own modules these are known, elsewhere merge.
    Under ``torch.compile`` weight and switch may change at any time; that an adapter came or went makes torch compile
    again. ``torch.jit`` takes merged modules only.

    ``merge``: W + ΔW in the place of W, bit for bit as ``loraformat.merge`` writes it; the original tensor is kept, so
    that the weights of the targets are held twice.

    Args:
        module: or, for an adapter whose keys name components, component → module: a pipeline's ``components``.
        weight, only, scales: as ``loraformat.strength.strengthen``.
        hints: names and axes that the adapter and the module do not share.
        trainable: gradients flow into the adapter's own tensors, which are then parameters of ``module``; what of the
            base is frozen is not touched. Only of a branch.
        any_base: take an adapter that was bound to other weights.

    Raises:
        LoraFormatError: LF-602 … LF-607 a target is not found, not placed or does not fit; LF-608 a parameter that
            cannot be changed in this way; LF-612 a weight for absolute values; LF-705. The module is then as it was.
    """
    if mode not in ("branch", "merge"):
        raise fault("LF-705", f"mode {mode!r} is neither branch nor merge")
    if trainable and mode == "merge":
        raise fault("LF-705", "what is merged has no tensors of its own to train", fix="mode='branch'")
    base = ModuleBase(module)
    chosen = strengthen(adapter, 1.0, only, scales)
    acting = strengthen(chosen, weight)
    resolution = base.resolve(chosen, hints or Hints()).require()
    if not any_base:
        check_bound(chosen, base, resolution)
    places = [(key, match, match.turned(chosen[key])) for key, found in resolution.targets.items() for match in found]
    _check(places, mode)
    handle = Handle(chosen, acting, weight, mode)
    apart = uncalled(base.roots.values())
    try:
        for key, match, update in places:
            handle._put(key, match, update, apart, trainable)
    except BaseException:
        handle.remove()
        raise
    stack.forget_compiled()
    return handle


class Handle:
    """An adapter on a live module, until ``remove``; as a context manager, until the block ends.

    Attributes:
        mode: ``branch`` or ``merge``.
        places: target → the names of the parameters that it acts on: several where they are tied.
    """

    def __init__(self, chosen: Adapter, acting: Adapter, weight: float, mode: Mode) -> None:
        self.mode = mode
        self.places: dict[str, list[str]] = {}
        self._adapter, self._acting, self._weight, self._enabled = chosen, acting, weight, True
        self._branches: list[tuple[str, Place, UpdateModule]] = []
        self._merges: list[tuple[Place, partial[Update | None]]] = []

    @property
    def weight(self) -> float:
        """What ΔW is multiplied by; may be set at any time. LF-612 where the adapter sets absolute values."""
        return self._weight

    @weight.setter
    def weight(self, value: float) -> None:
        self._set(strengthen(self._adapter, value), value, self._enabled)

    @property
    def enabled(self) -> bool:
        """Whether it acts; may be set at any time."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._set(self._acting, self._weight, bool(value))

    @property
    def adapter(self) -> Adapter:
        """The adapter as it is now, at the weight 1: with the values that training left in its tensors."""
        targets = dict(self._adapter.targets)
        for key, _, branch in self._branches:
            parts = {f.part.kind: replace(f.part, **f.arrays()) for f in _factors(branch) if list(f.parameters())}
            old = targets[key]
            targets[key] = replace(old, parts=tuple(parts.get(part.kind, part) for part in old.parts))
        return replace(self._adapter, targets=targets)

    def remove(self) -> None:
        """Take the adapter off: after the last one the module is bit for bit what it was. Once is enough.

        Raises:
            LoraFormatError: LF-613 somebody wrote into a merged parameter since: its values would be lost.
        """
        self._check_untouched()
        for _, at, branch in reversed(self._branches):
            stack.take(at, branch)
        for at, acting in reversed(self._merges):
            merged.take(at, acting)
        self._branches, self._merges = [], []
        stack.forget_compiled()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _put(self, key: str, match: Match, update: Update, apart: frozenset[int], trainable: bool) -> None:
        at: Place = match.handle
        self.places.setdefault(key, []).append(match.weight)
        if self.mode == "merge":
            acting = partial(self._of, key, match)
            merged.put(at, acting)
            self._merges.append((at, acting))
            return
        branch = UpdateModule(update, trainable).to(at.stored.device)
        branch.strength = self._weight
        stack.put(at, branch, apart)
        self._branches.append((key, at, branch))

    def _of(self, key: str, match: Match) -> Update | None:
        """What is merged for a target now."""
        return match.turned(self._acting[key]) if self._enabled else None

    def _set(self, acting: Adapter, weight: float, enabled: bool) -> None:
        """All of it, or none: a weight may take a value beyond the range of its dtype."""
        self._check_untouched()
        before = self._acting, self._weight, self._enabled
        self._acting, self._weight, self._enabled = acting, weight, enabled
        try:
            self._refresh()
        except LoraFormatError:
            self._acting, self._weight, self._enabled = before
            self._refresh()
            raise

    def _refresh(self) -> None:
        for _, _, branch in self._branches:
            branch.strength, branch.enabled = self._weight, self._enabled
        for at, _ in self._merges:
            merged.refresh(at)

    def _check_untouched(self) -> None:
        names = {id(at): name for (at, _), name in zip(self._merges, _flat(self.places), strict=False)}
        what = "the merged parameter was changed since: its values would be lost"
        fix = "take the adapter off before training or loading weights"
        problems = [Problem("LF-613", what, names[id(at)], fix) for at, _ in self._merges if merged.touched(at)]
        if problems:
            raise LoraFormatError(problems)


def _check(places: Sequence[tuple[str, Match, Update]], mode: Mode) -> None:
    """LF-608 for every parameter that cannot be changed in this way."""
    problems = []
    for key, match, update in places:
        at: Place = match.handle
        why = stack.refusal(at) if mode == "branch" else merged.refusal(at, update)
        if why:
            fix = "merge it" if mode == "branch" else ""
            problems.append(Problem("LF-608", why, key, fix))
    if problems:
        raise LoraFormatError(problems)


def _factors(branch: UpdateModule) -> Iterator[Factors]:
    return (f for f in branch.parts if isinstance(f, Factors))


def _flat(places: Mapping[str, Sequence[str]]) -> list[str]:
    return [name for names in places.values() for name in names]
