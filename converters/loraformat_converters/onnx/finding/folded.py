"""Whether a weight still has the values of the module that it is named after, or something was folded into it.

A batch normalisation behind a convolution becomes γ/σ times every row of W. torch's exporters do it (2.13, both by
default), and so do ONNX Runtime (1.32), onnxsim and onnxslim; the operator keeps the module's name, dynamo's weight even
its own. ΔW was trained beside W and not beside that, so neither W + ΔW nor a branch would be what the module computes.

A vector is stored as it is, under its own name, unless something was computed of it: Gemma's norms multiply by 1 + w.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loraformat.errors import fault
from loraformat_converters.onnx.finding.names import names_of, own_copy
from loraformat_converters.onnx.graph.index import Site

if TYPE_CHECKING:
    from loraformat_converters.onnx.finding.witness import Witness

__all__ = ["recomputed", "require_own_values"]

_RULES = "pkg.onnxscript.rewriter.rule_name"
_FOLDING = re.compile(r"FuseBatchNorm|ConvAffine|AffineConv")
"""What onnxscript (0.7.2, the last step of torch's dynamo exporter) calls the rewrites that change a weight."""

_REWRITTEN = re.compile(r"node_(Conv(Transpose)?|Gemm)_\d+(?P<quantised>_quant)?")
"""How it calls an operator that it wrote anew, for a normalisation or a padding: metadata says which, and tools drop it."""

_CHANGED = re.compile(r"(ConvBnFusion|ConvMulFusion|ConvAddFusion|MatMulBnFusion)_.*|.+_(weight|bias)_fused")
"""How ONNX Runtime (1.32) and onnxslim (0.1.98) call what they compute of a weight: attention's 1/√d times q's too."""

_SMOOTHED = re.compile(r".+_smooth_output(_\d+)?")
"""How neural-compressor, of ONNX (1.0) and Intel's, calls an x that SmoothQuant divided, where it folds that into nothing before."""

_RENAMED = re.compile(r"onnx::Conv(Transpose)?_\d+|_v_\d+")
"""How TorchScript (2.13) and onnxsim (0.8) call it. A torch module's weight has a name where nothing was computed of it."""

_OF_TOOLS = re.compile(r"_v_\d+|(.+_output_\d+|getitem|mul)(_\d+)?_weight")
"""How onnxsim and onnxslim do: computed, whatever the operator is called. TorchScript's may be turned, in Keras' models."""

_COMPUTED = re.compile(r"(/.+/)?onnx::\w+|_v_\d+|/.+_output_\d+")
"""How these call any tensor that they computed: TorchScript ``onnx::Mul_27``, tools by the node that gave it."""

_OF_NORMALISATION = re.compile(r"getitem(_\d+)?(_quantized)?")
"""How dynamo calls what a normalisation gives, the first of three: a product that gives it holds the normalisation."""

_CONVOLUTIONS = frozenset({"Conv", "ConvTranspose", "FusedConv", "ConvInteger", "QLinearConv"})

_SAME = 0.995
"""The least cosine at which a convolution's weight is the very one: rounding to 8 bits leaves more, a folded γ/σ less."""

_FIX = (
    "export without folding (dynamo: optimize=False; TorchScript: training=TrainingMode.PRESERVE, "
    "do_constant_folding=False), or merge into the checkpoint and export that; --base CHECKPOINT shows if its values are W's"
)


def require_own_values(key: str, site: Site, said: Sequence[Witness]) -> None:
    """LF-608 where a target's weight is not the module's own any more, or nothing shows that it is.

    Equal values settle it. A sketch does not: of a γ/σ that varies little it sees nothing.
    """
    if any(witness.rung == "fingerprint" for witness in said) or own_copy(site.root_name):
        return
    if why := _changed(site) or _unproved(site, said):
        what = f"{site.node.name or site.operator}: {why}: W + ΔW is not what the module computes"
        raise fault("LF-608", what, where=key, fix=_FIX)


def recomputed(site: Site) -> bool:
    """Whether a convolution's weight goes by the name of what a tool computed of it."""
    stored = names_of(site, "initializer") or ""
    return site.node.op_type in _CONVOLUTIONS and bool(_OF_TOOLS.fullmatch(stored) or _CHANGED.fullmatch(stored))


def _changed(site: Site) -> str:
    """What says that the values were changed."""
    rules = next((p.value for p in site.node.metadata_props if p.key == _RULES), "")
    if _FOLDING.search(rules):
        return f"a batch normalisation was folded into its {site.parameter} ({rules})"
    if site.known_operator and _OF_NORMALISATION.fullmatch(site.node.output[0]):
        return f"it gives {site.node.output[0]}, of a batch normalisation, which was folded into its {site.parameter}"
    if _CHANGED.fullmatch(names_of(site, "initializer") or ""):
        return f"a normalisation or a scale was folded into its {site.parameter}, now {site.root_name}"
    read = [*site.node.input, *([site.product.x] if site.product else [])]
    if smoothed := next(filter(_SMOOTHED.fullmatch, read), None):
        return f"SmoothQuant divided its x, {smoothed}, by a scale for each feature, and multiplied the weight by it"
    return ""


def _is_rewritten(site: Site) -> bool:
    """Without metadata, and with a bias, which a normalisation always leaves; a quantiser adds it elsewhere."""
    named = _REWRITTEN.fullmatch(site.node.name)
    return named is not None and not site.node.metadata_props and bool(site.bias or named["quantised"])


def _computed(site: Site) -> bool:
    """Whether a vector's name is none of a parameter's: dynamo's have the path of their module."""
    stored = names_of(site, "initializer") or ""
    return bool(_COMPUTED.fullmatch(stored)) or ("." not in stored and names_of(site, "name_scopes") is not None)


def _unproved(site: Site, said: Sequence[Witness]) -> str:
    """Why the values of a vector, of a convolution or of a last Gemm may have been changed."""
    if site.vector and _computed(site):
        return f"its {site.parameter} lost its name and is {site.root_name}, which was computed when the model was exported"
    alike = max((witness.cosine for witness in said if witness.rung == "sketch"), default=0.0)
    last = site.node.op_type == "Gemm" and site.node.output[0] in site.scope.outputs  # whose name tells nothing
    if alike < _SAME and (last or site.node.op_type in _CONVOLUTIONS) and _is_rewritten(site):
        return "the exporter wrote it anew: a batch normalisation may be folded into it"
    if site.node.op_type not in _CONVOLUTIONS:
        return ""
    named, stored = any(witness.rung != "sketch" for witness in said), names_of(site, "initializer") or ""
    if _OF_TOOLS.fullmatch(stored) or (named and _RENAMED.fullmatch(stored)):
        return f"its {site.parameter} lost its name and is {site.root_name}: a batch normalisation was folded into it"
    if alike < _SAME and not named:
        return f"its {site.parameter} is like W (cosine {alike:.3f}) and not W: a batch normalisation may be folded into it"
    return ""
