"""All that acts on one parameter of a live module, one adapter after the other.

Pairs run beside the module, where its class allows that; as soon as one of the updates is of another kind, all of them
act in order on the weight itself, by a parametrization: the order counts there, as it does in a merge.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from loraformat_converters.torch_live.beside import add, branch_of
from loraformat_converters.torch_live.factors import UpdateModule

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from loraformat_converters.torch_live.base import Place

__all__ = ["forget_compiled", "put", "refusal", "take"]

_KEY = "_loraformat_stacks"


class Stack(nn.Module):
    """The updates of one parameter, as a submodule of its module, so that they move with it (``.to``, ``.half``)."""

    loraformat_branches = True
    at: Place

    def __init__(self, at: Place, uncalled: frozenset[int]) -> None:
        super().__init__()
        self.updates = nn.ModuleList()
        self.at = at
        self.branch = branch_of(at, uncalled)
        self.hook: RemovableHandle | None = None

    def forward(self, weight: Tensor) -> Tensor:
        """W' of W, as a parametrization."""
        for update in self.updates:
            weight = update(weight)
        return weight

    def put(self, update: UpdateModule) -> None:
        """One more, after the others."""
        self.updates.append(update)
        self._arrange()

    def take(self, update: UpdateModule) -> None:
        """One less; after the last the module is what it was."""
        kept = [other for other in self.updates if other is not update]
        self.updates = nn.ModuleList(kept)
        self._arrange()

    @property
    def name(self) -> str:
        """Of the submodule, while pairs run beside."""
        return f"loraformat_{self.at.leaf}"

    def _each(self) -> Iterator[UpdateModule]:
        return (update for update in self.updates if isinstance(update, UpdateModule))

    def _arrange(self) -> None:
        pairs = all(update.pair is not None for update in self._each())
        beside = bool(self.updates) and self.branch is not None and pairs
        self._set_beside(beside)
        self._set_instead(bool(self.updates) and not beside)

    def _set_beside(self, wanted: bool) -> None:
        module = self.at.module
        if wanted and self.hook is None:
            module.add_module(self.name, self)
            self.hook = module.register_forward_hook(self._add, with_kwargs=True)
        elif not wanted and self.hook is not None:
            self.hook.remove()
            self.hook = None
            del module._modules[self.name]

    def _add(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Tensor:
        """The forward hook."""
        x = args[0] if args else next(iter(kwargs.values()))
        assert self.branch is not None
        for update in self._each():
            output = add(self.branch, update, module, x, output)
        return output

    def _set_instead(self, wanted: bool) -> None:
        at = self.at
        active = self in (at.parametrizations or ())
        if wanted and not active:
            parametrize.register_parametrization(at.module, at.leaf, self, unsafe=True)
        elif not wanted and active:
            parametrize.remove_parametrizations(at.module, at.leaf, leave_parametrized=False)
            for own in (at.module._parameters, at.module._buffers):
                _order(own, at.module.__dict__[_KEY].order)


class _Stacks(dict[str, Stack]):
    """Leaf → stack, of one module; with the order that its parameters had."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.order = [*module._parameters, *module._buffers]


def _order(own: dict[str, Any], order: list[str]) -> None:
    """Removing a parametrization puts the parameter at the end: a state_dict and an optimizer count on the order."""
    for leaf in order:
        if leaf in own:
            own[leaf] = own.pop(leaf)


def forget_compiled() -> None:
    """Compiled code looks at no hook that came or went since (torch 2.13 skip_nnmodule_hook_guards): compile again."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def put(at: Place, update: UpdateModule, uncalled: frozenset[int]) -> None:
    """An update on top of what acts on this parameter; ``uncalled`` as of ``beside``."""
    stacks: _Stacks = at.module.__dict__.setdefault(_KEY, _Stacks(at.module))
    if at.leaf not in stacks:
        stacks[at.leaf] = Stack(at, uncalled)
    stacks[at.leaf].put(update)


def take(at: Place, update: UpdateModule) -> None:
    """Without the update; after the last one the module is what it was."""
    stacks: _Stacks = at.module.__dict__[_KEY]
    stacks[at.leaf].take(update)
    if not stacks[at.leaf].updates:
        del stacks[at.leaf]
    if not stacks:
        del at.module.__dict__[_KEY]


def refusal(at: Place) -> str | None:
    """Why nothing can act beside or on this parameter while the module runs, or None."""
    module = at.module
    if isinstance(module, nn.RNNBase):
        # torch 2.13 modules/rnn.py: forward reads _flat_weights, a list that was made when the module was
        return "a recurrent module keeps a list of its weights, and looks at no attribute when it runs"
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)):
        return f"a {type(module).__name__} is read as a container, not by attributes"
    foreign = at.parametrizations is not None and at.leaf not in module.__dict__.get(_KEY, {})
    return f"{at.leaf} is parametrized already" if foreign else None
