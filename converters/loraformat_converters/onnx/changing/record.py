"""What ``attach`` did to a model, written into it; and the way back: the adapters, and the model as it was.

The record says below which names the adapters' tensors lie and which values of the base gave up their names. The
SHA-256 of the graph as it was tells whether somebody changed the model since.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from loraformat import canonical, metadata
from loraformat.dtypes import dtype_name, numpy_dtype
from loraformat.errors import LoraFormatError, fault
from loraformat.file import tensors_of
from loraformat.identity import digest
from loraformat.names import split_role
from loraformat.parse import parse
from loraformat_converters.onnx.attaching.slots import Slots
from loraformat_converters.onnx.changing.identity import base_sha256
from loraformat_converters.onnx.changing.undo import taken_out

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.adapter import Adapter
    from loraformat.plan import Job

    Array = npt.NDArray[Any]

__all__ = ["ATTACHED", "Attached", "Record"]

ATTACHED = "loraformat.attached"
"""metadata_props key: a list of what was attached, so that it can be told, checked and taken out again."""

BASE = "loraformat.base"
"""metadata_props key: what the model was before."""

_FIX = "it was changed after attach, by another tool perhaps: attach to the original model again"


class Attached(Protocol):
    """What was put into a graph, whichever way."""

    @property
    def mode(self) -> str:
        """branch, swap or stack."""

    @property
    def prefold(self) -> bool:
        """Whether the adapters' own tensors are not kept."""

    @property
    def stems(self) -> Mapping[tuple[int, str], str]:
        """(job, key) → below what the adapter's tensors and our nodes are named."""

    @property
    def values(self) -> Mapping[str, str]:
        """A value of ours → the value of the base in whose place it stands."""

    @property
    def record(self) -> Mapping[str, Any]:
        """What else the way back, or a host, must know."""


@dataclass(frozen=True)
class Record:
    """The record of an attached model.

    Attributes:
        attached: of each adapter: name, mode, digest, targets (key → below what its tensors are named), the dtypes of
            those tensors, and the metadata that its file would hold.
        base: ``sha256`` of the model before, and ``values``: those that stand in the place of a value of the model;
            ``slots``: what a swap made inputs; ``inputs``: what else attach made one, by name;
            ``stems``: below what nodes lie that are no adapter's own; ``stack``: what a row is, and how it chooses;
            ``apart``: below what lies what a node was taken apart into → the node as it was.
    """

    attached: Sequence[Mapping[str, Any]]
    base: Mapping[str, Any]

    @classmethod
    def of(cls, jobs: Sequence[Job], attachment: Attached, sha256: str, apart: Mapping[str, bytes]) -> Record:
        """What to write: the adapters without their tensors, which are in the graph."""
        stems: list[dict[str, str]] = [{} for _ in jobs]
        for (job, key), stem in attachment.stems.items():
            stems[job][key] = stem
        entries = [_entry(job, names, attachment) for job, names in zip(jobs, stems, strict=True) if job.name]
        base = {"sha256": sha256, "values": attachment.values, **attachment.record}
        nodes = {stem: base64.b64encode(node).decode() for stem, node in apart.items()}
        return cls(entries, base | ({"apart": nodes} if nodes else {}))

    @classmethod
    def read(cls, model: onnx.ModelProto) -> Record | None:
        """The record in a model; LF-613 if it cannot be read."""
        texts = {p.key: p.value for p in model.metadata_props if p.key in (ATTACHED, BASE)}
        if not texts:
            return None
        try:
            record = cls(canonical.loads(texts[ATTACHED]), canonical.loads(texts[BASE]))
            names = [entry[name] for entry in record.attached for name in ("name", "mode", "digest")]
            names += [*record.stems, *record.base["values"].values(), record.base["sha256"], *record.inputs]
            _ = record.slots, record.apart
            known = (
                isinstance(record.attached, list)
                and (record.attached or record.slots)
                and all(e["version"] == 1 for e in record.attached)
            )
            if known and all(isinstance(name, str) for name in names):
                return record
        except (ValueError, KeyError, TypeError, AttributeError, DecodeError):
            pass
        return _unread()

    @classmethod
    def of_file(cls, path: Path) -> Record:
        """The record in a file; LF-613 where it has none."""
        model = onnx.load(str(path), load_external_data=False)
        return cls.read(model) or _unread()

    def write(self, model: onnx.ModelProto) -> None:
        """Put the record into a model."""
        model.metadata_props.add(key=ATTACHED, value=canonical.dumps(list(self.attached)))
        model.metadata_props.add(key=BASE, value=canonical.dumps(dict(self.base)))

    @property
    def slots(self) -> Slots | None:
        """What is fed to a model that ``attach --mode swap`` wrote."""
        return Slots.from_json(self.base["slots"], self.base["sha256"]) if "slots" in self.base else None

    @property
    def inputs(self) -> list[str]:
        """Every input that the base has not."""
        return [*self.base.get("inputs", ()), *(self.slots.inputs if self.slots else ())]

    @property
    def apart(self) -> dict[str, onnx.NodeProto]:
        """The nodes that were taken apart, as they were, by what their parts are named below."""
        held = self.base.get("apart", {}).items()
        return {stem: onnx.NodeProto.FromString(base64.b64decode(node)) for stem, node in held}

    @property
    def stems(self) -> list[str]:
        """Below what everything that is attached is named."""
        return [
            *self.base.get("stems", ()),
            *self.base.get("apart", ()),
            *(stem for entry in self.attached for stem in entry["targets"].values()),
        ]

    def adapters(self, model: onnx.ModelProto) -> list[tuple[str, Adapter]]:
        """(name, adapter) of everything that is attached, bit for bit."""
        stored = {tensor.name: tensor for tensor in model.graph.initializer}
        return [(entry["name"], _adapter(entry, stored)) for entry in self.attached]

    def folded(self, model: onnx.ModelProto) -> Mapping[str, list[tuple[str, int | None]]] | None:
        """Target → (kind, rank) of each part, where tensors of the only adapter are gone: a tool has made others of them."""
        try:
            (entry,) = self.attached
            stems = {split_role(name): entry["targets"][split_role(name)[0]] for name in entry["dtypes"]}
            stored = {tensor.name for tensor in model.graph.initializer}
            if all(f"{stem}/{role}" in stored for (_, role), stem in stems.items() if role != "sketch"):
                return None
            targets = entry["metadata"]["targets"].items()
            return {key: [(part["kind"], part.get("r")) for part in target["parts"]] for key, target in targets}
        except (KeyError, ValueError, TypeError, AttributeError, LoraFormatError):
            return None

    def undo(self, model: onnx.ModelProto) -> None:
        """Take everything out of ``model``, whatever somebody changed in it since."""
        taken_out(model, self.stems, self.base["values"], frozenset(self.inputs), self.apart)

    def detach(self, model: onnx.ModelProto) -> None:
        """Take everything out of ``model``: then it is what it was, or LF-613."""
        self.undo(model)
        for i in reversed(range(len(model.metadata_props))):
            if model.metadata_props[i].key in (ATTACHED, BASE):
                del model.metadata_props[i]
        try:
            same = base_sha256(model) == self.base["sha256"]
        except LoraFormatError:  # what is left is no graph
            same = False
        if not same:
            raise fault("LF-613", "without what is attached, the model is not what it was before", fix=_FIX)


def _unread() -> Record:
    raise fault("LF-613", "the record of what is attached cannot be read", where=ATTACHED, fix=_FIX)


def _entry(job: Job, stems: Mapping[str, str], attachment: Attached) -> dict[str, Any]:
    """One adapter: what its file would say, where its tensors are, and what the graph cannot hold of it."""
    entry: dict[str, Any] = {"version": 1, "name": job.name, "mode": attachment.mode, "digest": digest(job.adapter)}
    entry["targets"] = dict(stems)
    if job.components:
        entry["components"] = list(job.components)
    if attachment.mode == "swap":
        return entry
    if attachment.prefold:
        return entry | {"prefolded": True}
    named = dict(tensors_of(job.adapter))
    entry["dtypes"] = {name: dtype_name(t.dtype) for name, t in named.items()}
    entry["metadata"] = canonical.loads(metadata.render(job.adapter))
    sketches = {name: base64.b64encode(t.tobytes()).decode() for name, t in named.items() if name.endswith(".sketch")}
    return entry | ({"sketches": sketches} if sketches else {})


def _adapter(entry: Mapping[str, Any], stored: Mapping[str, onnx.TensorProto]) -> Adapter:
    if entry.get("prefolded"):
        fix = "keep the adapter's own file, or attach without --prefold"
        raise fault("LF-613", "the adapter was folded into constants: its own tensors are not kept", fix=fix)
    if entry["mode"] == "swap":
        fix = "convert the .onnx_adapter file beside the model, or keep the adapter's own"
        raise fault("LF-613", f"{entry['name']} is fed to the model, which does not hold it", fix=fix)
    held: dict[str, Array] = {}
    try:
        for name, dtype in entry["dtypes"].items():
            key, role = split_role(name)
            if role == "sketch":
                held[name] = np.frombuffer(base64.b64decode(entry["sketches"][name]), np.float32)
            else:  # a type that the opset cannot cast was widened, which loses nothing
                held[name] = numpy_helper.to_array(stored[f"{entry['targets'][key]}/{role}"]).astype(numpy_dtype(dtype))
        adapter, _ = parse(canonical.dumps(entry["metadata"]), held)
    except (KeyError, ValueError, TypeError, LoraFormatError) as error:
        raise fault(
            "LF-613", f"a part of the adapter is gone: {error}", where=entry.get("name", ""), fix=_FIX
        ) from None
    if digest(adapter) != entry["digest"]:
        raise fault(
            "LF-613", "the adapter in the graph is not the one that was attached", where=entry["name"], fix=_FIX
        )
    return adapter
