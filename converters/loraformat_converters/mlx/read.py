"""MLX → Adapter: every tensor understood, every pair under the scale that the configuration states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loraformat.adapter import Adapter
from loraformat.axes import Placement
from loraformat.dtypes import dtype_name
from loraformat.gathered import Gathered
from loraformat.layout import Reading, ReadOptions
from loraformat.parts import Lora, Magnitude, Part, Replace
from loraformat.scale import scale_of
from loraformat.shapes import FLOATS
from loraformat.updates import Update
from loraformat_converters.mlx import config as configs

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.source import Source

    Array = npt.NDArray[Any]
    Roles = dict[str, Array]

__all__ = ["EMBEDDINGS", "read", "read_tensors"]

ROLES = ("lora_a", "lora_b", "m")

EMBEDDINGS = frozenset(
    {
        *("embed_tokens", "embed_tokens_per_layer", "wte", "wpe", "word_embeddings", "embeddings", "tok_embeddings"),
        *("embedding", "token_embeddings", "position_embedding_table", "embed_in", "embed"),
    }
)
"""What mlx-lm 0.32.2 calls its nn.Embedding modules (models/*.py), none of which it uses for another kind.

A pair of an Embedding is stored like that of a Linear: lora_a has a row for each token, or for each input.
"""


def read(source: Source, options: ReadOptions) -> Reading:
    """The adapter in an MLX folder, or in a bare file where the options state the scale.

    Raises:
        LoraFormatError: LF-3xx the tensors do not fit each other; LF-503 … LF-509 see ``loraformat.rules``.
    """
    text = source.sidecar(configs.FILE)
    config, warnings = configs.parse(text) if text is not None else (None, [])
    return Reading(read_tensors(source.tensors, config, options, str(source.path)), warnings)


def read_tensors(
    tensors: Mapping[str, Array], config: configs.Config | None, options: ReadOptions, where: str
) -> Adapter:
    """The adapter that these tensors are under this configuration."""
    draft = _Draft(config, options)
    if config is not None and config.type == "full":
        draft.updates = {name: Update((Replace(tensor),)) for name, tensor in tensors.items()}
    else:
        for module, roles in draft.grouped(tensors).items():
            draft.module(module, roles)
    return draft.finish(where)


class _Draft(Gathered):
    """An adapter in the making, and everything that is wrong with it."""

    def __init__(self, config: configs.Config | None, options: ReadOptions) -> None:
        super().__init__()
        self.config = config
        self.options = options
        base = options.base.parameters() if options.base is not None else {}
        self.shapes = {name: parameter.shape for name, parameter in base.items()}

    def grouped(self, tensors: Mapping[str, Array]) -> dict[str, Roles]:
        """Module → role → tensor; LF-506 for a name of another grammar."""
        found: dict[str, Roles] = {}
        for name in tensors:
            module, _, role = name.rpartition(".")
            if role in ROLES and module:
                found.setdefault(module, {})[role] = tensors[name]
            else:
                self.say("LF-506", f"the name of a tensor ends with .{', .'.join(ROLES)}", name)
        return found

    def module(self, module: str, roles: Roles) -> None:
        """The update of one module's weight."""
        wanted = set(ROLES) if self.dora else {"lora_a", "lora_b"}
        if missing := wanted - roles.keys():
            why = "; mlx-lm would take the norm of the base's rows for it" if missing == {"m"} else ""
            self.say("LF-303", f"{', '.join(sorted(missing))} is missing{why}", module)
        elif extra := roles.keys() - wanted:
            what = f"{', '.join(sorted(extra))} beside a fine_tune_type of lora, in whose adapters mlx-lm refuses it"
            self.say("LF-507", what, module)
        elif self.sound(module, roles):
            self.pair(module, roles)

    @property
    def dora(self) -> bool:
        return self.config is not None and self.config.type == "dora"

    def sound(self, module: str, roles: Roles) -> bool:
        """Whether the tensors are floats, not empty and of the numbers of axes that mlx-lm gives them."""
        axes = {"lora_a": (2, 3), "lora_b": (2, 3), "m": (1,)}
        before = len(self.problems)
        for role, tensor in roles.items():
            dtype, sizes = dtype_name(tensor.dtype), list(tensor.shape)
            if dtype not in FLOATS:
                self.say("LF-314", f"{role} is {dtype}; factors are floats", module)
            elif len(sizes) not in axes[role]:
                self.say("LF-309", f"{role} is {sizes}; it has {' or '.join(map(str, axes[role]))} axes", module)
            elif 0 in sizes:
                self.say("LF-311", f"{role} is empty: {sizes}", module)
        return len(self.problems) == before

    def pair(self, module: str, roles: Roles) -> None:
        factors = self.factors(module, roles["lora_a"], roles["lora_b"])
        if factors is None:
            return
        a, b = factors
        rank = a.shape[-2]
        if self.config is not None and self.config.rank not in (None, rank):
            what = f"rank is {self.config.rank} in {configs.FILE}, and {rank} by the tensors"
            self.say("LF-507", what, module)
        if self.options.rank not in (None, rank):
            self.say("LF-507", f"the rank is stated as {self.options.rank}, and is {rank} by the tensors", module)
        if (scale := self.scale(module, rank)) is None:
            return
        parts: list[Part] = [Lora(a, b, scale, "factor")]
        place, embedding = self.placement(f"{module}.weight", a, b, roles.get("m"))
        if "m" in roles:
            parts.append(Magnitude(roles["m"], (0,) if embedding else None))
        op = "embedding" if embedding else None
        self.updates[f"{module}.weight"] = Update(tuple(parts), place, op, ("name",))

    def factors(self, module: str, a: Array, b: Array) -> tuple[Array, Array] | None:
        """(A [*E, r, in], B [*E, out, r]); those of experts lie so already.

        Up to 2025-03 the A of E experts was [E·r, in], expert by expert: so mlx-lm's fuse still reshapes it.
        """
        if b.ndim == 3:
            count, _, rank = b.shape
            if a.ndim == 2 and a.shape[0] == count * rank:
                a = a.reshape(count, rank, a.shape[1])
            if a.ndim == 3 and (a.shape[0], a.shape[1]) == (count, rank):
                return a, b
            wanted = "[E, r, in] and [E, out, r]"
        elif a.ndim == 2 and a.shape[1] == b.shape[0]:
            return a.T, b.T
        else:
            wanted = "[in, r] and [r, out]"
        self.say("LF-309", f"lora_a {list(a.shape)} and lora_b {list(b.shape)} are not {wanted}", module)
        return None

    def scale(self, module: str, rank: int) -> float | None:
        """The scale by the configuration, else by the user's word; both where they agree."""
        options = self.options
        stated = None
        if options.alpha is not None:
            stated = scale_of(options.alpha, options.scale_rule or "factor", rank)
        readings = self.config.readings if self.config is not None else ()
        if stated is not None and (not readings or stated in readings):
            return stated
        if stated is not None:
            what = (
                f"the scale is stated as {stated:g}, and is {' or '.join(f'{s:g}' for s in readings)} by {configs.FILE}"
            )
            self.say("LF-507", what, module)
            return None
        if len(readings) == 1:
            return readings[0]
        if readings:
            what = (
                f"the scale is {readings[0]:g}, or {readings[1]:g}: mlx-lm multiplied it by alpha / rank until 2024-06, "
                "and the configuration does not tell its version"
            )
            fix = f"state it: --alpha {readings[0]:g} (or {readings[1]:g}) --scale-rule factor"
            self.say("LF-507", what, f"{configs.FILE}: lora_parameters", fix)
        else:
            fix = "state it: --alpha SCALE --scale-rule factor (mlx-lm's default is 20)"
            self.say("LF-509", f"no {configs.FILE} with a scale: it is unknown", module, fix)
        return None

    def placement(self, key: str, a: Array, b: Array, m: Array | None) -> tuple[Placement | None, bool]:
        """(how the matrix lies in the weight, whether that is an Embedding's).

        nn.Linear and SwitchLinear have [*E, out, in], nn.Embedding [tokens, dim]; the tensors of a Linear and of an
        Embedding look alike. An Embedding is told by its name, by a magnitude (one for each of its tokens) or by the
        base; what is not told to be one is read unplaced.
        """
        out, inner = b.shape[-2], a.shape[-1]
        if a.ndim == 3:
            return Placement((a.shape[0], out, inner), (1,), (2,), (0,)), False
        named = key.removesuffix(".weight").rpartition(".")[2] in EMBEDDINGS
        shaped = out != inner and (inner, out) == self.shapes.get(key)
        counted = out != inner and m is not None and m.shape == (inner,)
        if named or shaped or counted:
            return Placement((inner, out), (1,), (0,)), True
        return None, False

    def finish(self, where: str) -> Adapter:
        """The adapter, sorted by key, or every problem at once."""
        targets = self.checked(where)
        extensions = {"mlx": self.config.text} if self.config is not None else {}
        name = self.config.value.get("model") if self.config is not None else None
        base_model = {"name": name} if isinstance(name, str) and name else {}
        return Adapter(targets, "mlx", base_model=base_model, extensions=extensions)
