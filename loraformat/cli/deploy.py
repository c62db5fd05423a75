"""The verbs that put adapters into a base: merge, attach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from loraformat.cli.adapters import open_both, parse
from loraformat.cli.check import report
from loraformat.cli.options import Choice, force, hints, json_flag, mapping, origin, strength
from loraformat.cli.printing import alike, command, echo_json, warn
from loraformat.cli.progress import progress_bar
from loraformat.cli.proof import json_of, show_plan, show_proof
from loraformat.errors import fault

if TYPE_CHECKING:
    from loraformat.base import Base, Options
    from loraformat.plan import Plan
    from loraformat.resolve import Hints
    from loraformat.verbs.verify import Verdict

__all__ = ["attach", "merge"]

F = TypeVar("F", bound=Callable[..., Any])


def _options(function: F) -> F:
    """What both verbs are asked: which targets, what is known of the base, how, and proof."""
    verify = click.option("--verify", is_flag=True, help="Read the output again, and run it if it is a graph.")
    inputs = click.option("--inputs", type=click.Path(), help="With --verify: values for the model's inputs, .npz.")
    inline = click.option("--inline", is_flag=True, help="Write the model's local functions into its graph first.")
    plan = click.option(
        "--plan", "plan_only", is_flag=True, help="Print what would be read and written; write nothing."
    )
    any_base = click.option("--any-base", is_flag=True, help="Apply an adapter that was bound to other weights.")
    for option in (json_flag, force, any_base, plan, inline, inputs, verify, origin, mapping, strength):
        function = option(function)
    return function


@click.command()
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[:W]…")
@click.option(
    "--into", "base", required=True, metavar="BASE", help="A checkpoint, file or folder, a GGUF model or an ONNX model."
)
@click.option("-o", "--out", required=True, metavar="OUT", help="The file to write; the folder, if BASE is one.")
@click.option(
    "--requantize",
    is_flag=True,
    help="Round to few bits again where BASE stores them: fp8, int8, NF4, GPTQ; in GGUF; in ONNX int8, int4.",
)
@click.option(
    "--survival",
    metavar="SHARE",
    type=click.FloatRange(0.0, 1.0),
    default=0.1,
    show_default=True,
    help="Refuse where less than this share of ΔW survives the dtype of BASE.",
)
@_options
def merge(adapters: tuple[str, ...], base: str, out: str, **options: Any) -> None:
    """Write BASE with W + ΔW in the place of W: fp32 arithmetic, one rounding, everything else bit for bit.

    Several adapters are applied one after the other; a number after the last colon weighs one:

    \b
    loraformat merge mine.lora.safetensors style.lora.safetensors:0.5 --into base/ -o merged/ --verify
    """
    _carry_out(_Asked(verb="merge", words=adapters, base=base, out=out, **options))


@click.command()
@click.argument("adapters", nargs=-1, metavar="[NAME=]ADAPTER[:W]…")
@click.option("--to", "base", required=True, metavar="MODEL", help="An ONNX model, or a folder of them.")
@click.option("-o", "--out", required=True, metavar="OUT", help="The file to write; the folder, if MODEL is one.")
@click.option(
    "--mode",
    type=Choice(["branch", "swap", "stack"]),
    default="branch",
    show_default=True,
    help="Always on; fed at run time; several, chosen row by row.",
)
@click.option("--prefold", is_flag=True, help="Store what a runtime would fold, for one that does not optimise.")
@click.option("--live-scale", is_flag=True, help="branch: the strength is an input, 1 where nothing is fed.")
@click.option(
    "--slots",
    type=Choice(["optional", "required"]),
    default="optional",
    show_default=True,
    help="swap: inputs with a default; required ones for JavaScript.",
)
@click.option(
    "--pad-rank", type=click.IntRange(1), metavar="R", help="swap: slots of rank R, which any provider takes."
)
@click.option(
    "--slot-names",
    type=Choice(["native", "olive", "genai"]),
    default="native",
    show_default=True,
    help="swap: what the inputs are called.",
)
@click.option("--targets", "-t", multiple=True, metavar="PATTERN", help="swap: slots for these modules too.")
@click.option(
    "--rows",
    multiple=True,
    metavar="INPUT[:AXIS]",
    help="stack: the input whose axis counts the rows; may be repeated.",
)
@click.option(
    "--select",
    type=Choice(["index", "weights"]),
    default="index",
    show_default=True,
    help="stack: one adapter a row (lora.index), or a mixture (lora.weights).",
)
@click.option(
    "--provider",
    type=Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="branch, stack: what the graph is laid out for.",
)
@click.option(
    "--topology",
    type=Choice(["auto", "separate", "concat", "folded"]),
    default="auto",
    show_default=True,
    help="branch: where pairs act: beside the operator, in its product, in its weight.",
)
@_options
def attach(adapters: tuple[str, ...], base: str, out: str, **options: Any) -> None:
    """Write an ONNX model that runs the branch s·B·A·x beside each target; its own weights are not touched.

    Several adapters are applied one after the other; each can have a name and a weight. With --mode swap they are
    written beside the model, which is fed one at a time; with --mode stack each row of a batch chooses its own:

    \b
    loraformat attach mine.lora.safetensors style=other.lora.safetensors:0.5 --to model.onnx -o out.onnx --verify
    loraformat attach a=a.lora.safetensors b=b.lora.safetensors --to model.onnx -o out.onnx --mode swap
    loraformat attach a=a.lora.safetensors b=b.lora.safetensors --to model.onnx -o out.onnx --mode stack --rows input_ids
    """
    if not adapters and not options["targets"]:
        raise click.UsageError("give an adapter, or --mode swap --targets PATTERN")
    _carry_out(_Asked(verb="attach", words=adapters, base=base, out=out, **options))


_OF_MODE = {
    "live_scale": ("branch",), "slots": ("swap",), "pad_rank": ("swap",), "slot_names": ("swap",), "targets": ("swap",),
    "rows": ("stack",), "select": ("stack",), "provider": ("branch", "stack"), "topology": ("branch",),
}  # fmt: skip
"""Option → the modes that it is for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """The command line, an option a field."""

    verb: str
    words: tuple[str, ...]
    base: str
    out: str
    only: tuple[str, ...]
    scale: tuple[str, ...]
    names: str | None
    axes: tuple[str, ...]
    origin: str | None
    plan_only: bool
    any_base: bool
    force: bool
    as_json: bool
    verify: bool
    inputs: str | None
    inline: bool
    mode: str = "branch"
    prefold: bool = False
    requantize: bool = False
    survival: float = 0.1
    live_scale: bool = False
    slots: str = "optional"
    pad_rank: int | None = None
    slot_names: str = "native"
    targets: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    select: str = "index"
    provider: str = "cpu"
    topology: str = "auto"

    def how(self) -> Options:
        """How the verb is carried out; LF-705 for an option of another mode."""
        from loraformat.base import Options

        own = {field: getattr(self, field) for field in _OF_MODE}
        usual = {field.name: field.default for field in fields(Options)}
        strange = [f for f, modes in _OF_MODE.items() if own[f] != usual[f] and self.mode not in modes]
        if strange:
            flags = ", ".join(f"--{field.replace('_', '-')}" for field in strange)
            raise fault("LF-705", f"{flags} is not for --mode {self.mode}", fix=f"--mode {_OF_MODE[strange[0]][0]}")
        return Options(Path(self.out), self.mode, self.prefold, self.requantize, self.survival, **own)

    def following(self, base: Base) -> str:
        """What a person does next: compare the output, if that was not asked for already, else look at it."""
        from loraformat.base import Runnable

        # The verb verify is told of neither --base nor --inline: it would not find what they made known.
        if self.verb == "merge" and not (self.verify or self.origin or self.inline):
            stated = {"--adapter": self.words, "--only": self.only, "--scale": self.scale, "--axes": self.axes}
            stated["--names"] = (self.names,) if self.names else ()
            said = [word for flag, values in stated.items() for value in values for word in (flag, value)]
            return command("verify", "--base", self.base, *said, "--merged", self.out)
        return command("info", self.out, *(("--how", "python") if isinstance(base, Runnable) else ()))


def _carry_out(asked: _Asked) -> None:
    from loraformat.apart import check_apart
    from loraformat.outputs import check_free
    from loraformat.verbs.graph import check_provable, inlined, prove
    from loraformat.verbs.merge import prepare

    if not asked.plan_only:
        check_free(Path(asked.out), asked.force)
        check_apart(asked.out, *(parse(word).path for word in asked.words), asked.names, asked.inputs)
    stated = hints(asked.names, asked.axes, asked.origin)
    base, gathered = open_both(asked.words, asked.base, asked.only, asked.scale, stated.base)
    base = inlined(base) if asked.inline else base
    plan = prepare(asked.verb, gathered.adapters, base, asked.how(), stated, any_base=asked.any_base)
    if asked.plan_only:
        show_plan(plan, asked.as_json)
        return
    if not asked.as_json:
        warn(gathered.warnings)
        for note in alike(plan.notes):
            click.echo(f"note: {note}", err=True)
    proves = asked.verify and "prove" in base.verbs
    if proves:
        check_provable(base, plan, asked.inputs)
    with progress_bar(asked.verb, plan.writes, quiet=asked.as_json):
        outcome = base.apply(plan, force=asked.force)
    # What is fed or folded is in no model: it is proved by running alone.
    held = asked.mode != "swap" and not asked.prefold
    verdict = _read_again(base, plan, stated) if asked.verify and held else None
    proof = prove(base, plan, asked.inputs) if proves else None
    holds = not (verdict is not None and verdict.problems) and (proof is None or proof.holds)
    if asked.as_json:
        echo_json(json_of(plan, outcome, verdict, proof, gathered.warnings))
    else:
        if verdict is not None:
            report(verdict, asked.out)
        show_proof(plan, outcome, proof, asked.following(base) if holds else "")
    click.get_current_context().exit(0 if holds else 1)


def _read_again(base: Base, plan: Plan, stated: Hints) -> Verdict:
    from loraformat import registry
    from loraformat.verbs.verify import verify

    given = [(job.adapter, 1.0) for job in plan.jobs]
    return verify(base, given, registry.open_base(plan.options.out), stated)
