"""Adapters on live JAX parameters: a pytree, a Linen or NNX model; no adapter library is needed (jax 0.10).

``apply`` gives merged parameters. ``branch`` gives parameters beside which the factors stay: an unchanged function of
the parameters then computes W·x + s·B·(A·x), and no ΔW is formed. Both work under ``jit``, ``vmap`` and ``grad``.

``from_pytree`` and ``to_pytree`` turn trees of factors (NNX's, Qwix's) into adapters and back.

``tree`` names the leaves, ``places`` finds the targets, ``merged`` adds, ``factored`` is a weight with its factors,
``interpret`` evaluates a traced function in which such weights stand, ``operations`` what becomes of each, and ``branched`` puts them together.
"""

from __future__ import annotations

from loraformat_converters.jax_live.branched import Branched, branch
from loraformat_converters.jax_live.merged import apply
from loraformat_converters.jax_live.pytrees import from_pytree, to_pytree

__all__ = ["Branched", "apply", "branch", "from_pytree", "to_pytree"]
