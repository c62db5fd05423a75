"""The files of a checkpoint: which hold the weights, whether the index is true, and what else lies in the folder."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loraformat import canonical
from loraformat.checkpoint.safetensors import SafetensorsShard
from loraformat.checkpoint.shard import Shard
from loraformat.checkpoint.torch import TorchShard
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.folders import strange, walk
from loraformat.pickled import is_torch

__all__ = ["Files", "find", "is_weights", "json_object"]

# The names that transformers 5.23 and diffusers look for, in transformers' order; each may be an index of shards.
_NAMES = (
    "model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
)
# The same weights in other forms: beside the merged ones they would be another model.
_OTHER_FORMS = (
    *("model*.safetensors*", "pytorch_model*.bin*", "diffusion_pytorch_model*", "consolidated*", "tf_model*.h5"),
    *("flax_model*.msgpack*", "rust_model.ot", "*.gguf", "*.onnx", "*.onnx_data", "*.tflite", "*.mlmodel", "*.nemo"),
    *("onnx/*", "openvino/*", "original/*", "coreml/*"),
)
_SMALL = 64 << 20


@dataclass(frozen=True)
class Files:
    """What a checkpoint consists of.

    Attributes:
        folder: of the base; None where a single file was given.
        shards: file name → opened.
        homes: tensor → the name of its shard.
        index: the name of the index file, and what it says; empty where there is none.
        others: path in the folder, with ``/`` → where it lies: files that a copy takes along.
        left_out: the same weights in other forms.
    """

    folder: Path | None
    shards: Mapping[str, Shard]
    homes: Mapping[str, str]
    index: tuple[str, Mapping[str, Any]] | None = None
    others: Mapping[str, Path] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


def is_weights(path: Path) -> bool:
    """Whether ``path`` is a file of weights, by its first bytes, or a folder with one of the usual names."""
    if path.is_dir():
        return _primary(path) is not None
    return _is_safetensors(path) or is_torch(path)


def find(path: Path) -> Files:
    """The files of a checkpoint, the index checked against them.

    Raises:
        LoraFormatError: LF-610 an index that names what is not there, or leaves out what is, or leaves the folder;
            LF-1xx, LF-510 a damaged file of weights.
    """
    if not path.is_dir():
        shard = _opened(path)
        return Files(None, {path.name: shard}, dict.fromkeys(shard.infos, path.name))
    primary = _primary(path)
    if primary is None:
        raise fault("LF-601", f"{path} holds none of {', '.join(_NAMES)}, nor an index of shards")
    if primary.endswith(".index.json"):
        index = json_object(_inside(path, primary))
        shards, homes = _sharded(path, primary, index)
        said: tuple[str, Mapping[str, Any]] | None = (primary, index)
    else:
        shards, said = {primary: _opened(_inside(path, primary))}, None
        homes = dict.fromkeys(shards[primary].infos, primary)
    others, left_out = _others(path, {*shards, primary})
    return Files(path, shards, homes, said, others, left_out)


def json_object(path: Path) -> dict[str, Any]:
    """The object in a small JSON file; LF-610 where there is none."""
    try:
        if path.stat().st_size > _SMALL:
            raise ValueError(f"{path.stat().st_size:,} bytes")
        value = canonical.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise fault("LF-610", f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise fault("LF-610", f"{path} is not a JSON object")
    return value


def _primary(folder: Path) -> str | None:
    named = (name for stem in _NAMES for name in (stem, f"{stem}.index.json"))
    return next((name for name in named if (folder / name).is_file()), None)


def _is_safetensors(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except OSError:
        return False
    return head[8:] == b"{" or path.suffix == ".safetensors"  # a damaged one is told what is wrong with it


def _opened(path: Path) -> Shard:
    if is_torch(path):
        return TorchShard(path)
    try:
        return SafetensorsShard(path)
    except LoraFormatError as error:  # a header does not know in which of many files it stands
        named = (replace(p, where=f"{path.name}: {p.where}" if p.where else path.name) for p in error.problems)
        raise LoraFormatError(named) from None


def _sharded(folder: Path, name: str, index: Mapping[str, Any]) -> tuple[dict[str, Shard], dict[str, str]]:
    """Every shard that the index names, opened; and where every tensor lies, by index and shards alike."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise fault("LF-610", f"{name}: weight_map must map tensor names to file names")
    problems: list[Problem] = []
    shards: dict[str, Shard] = {}
    for file in sorted(set(weight_map.values())):
        try:
            shards[file] = _opened(_inside(folder, file))
        except LoraFormatError as error:
            problems += error.problems
    if not problems:
        problems = list(_contradictions(name, weight_map, shards))
    if problems:
        raise LoraFormatError(problems)
    return shards, dict(weight_map)


def _contradictions(name: str, weight_map: Mapping[str, str], shards: Mapping[str, Shard]) -> Iterator[Problem]:
    for tensor, file in weight_map.items():
        if tensor not in shards[file].infos:
            yield Problem("LF-610", f"{name} says that {file} holds the tensor, and it does not", tensor)
    for file, shard in shards.items():
        for tensor in shard.infos:
            if tensor not in weight_map:
                yield Problem("LF-610", f"{file} holds the tensor, and {name} does not name it", tensor)
            elif weight_map[tensor] != file:
                yield Problem("LF-610", f"{file} holds the tensor too; {name} names {weight_map[tensor]}", tensor)


def _inside(folder: Path, name: str) -> Path:
    """The file of that name; LF-610 where it is not a plain name, or a link leads out of the folder."""
    path = folder / name
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name or Path(name).is_absolute():
        raise fault("LF-610", "the index names a file outside the folder", where=ascii(name)[1:-1])
    if not path.exists():
        raise fault("LF-610", f"the file is not in {folder}", where=name, fix="the download is incomplete")
    if why := strange(folder, path):
        raise fault("LF-610", why, where=name)
    return path


def _others(folder: Path, taken: set[str]) -> tuple[dict[str, Path], tuple[str, ...]]:
    """(files to take along, the same weights in other forms); what a version control or a download keeps is neither."""
    found: dict[str, Path] = {}
    left_out: list[str] = []
    problems: list[Problem] = []
    for name in sorted(walk(folder)):
        if name in taken:
            continue
        if any(fits(name, pattern) for pattern in _OTHER_FORMS):
            left_out.append(name)
            continue
        if why := strange(folder, folder / name):
            problems.append(Problem("LF-610", why, name))
        found[name] = folder / name
    if problems:
        raise LoraFormatError(problems)
    return found, tuple(left_out)


def fits(name: str, pattern: str) -> bool:
    """Whether a path in the folder fits a pattern, component by component."""
    parts, wanted = name.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))
