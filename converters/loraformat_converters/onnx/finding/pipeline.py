"""Which files of a folder are one base, and which component of a pipeline each of them is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loraformat import canonical
from loraformat.errors import fault

__all__ = ["components_of", "models_in"]

_INDEX = "model_index.json"
"""What diffusers writes beside the folders of a pipeline's components."""


def components_of(path: Path) -> dict[str | None, list[str]]:
    """Component → its files, by their paths in the folder; None for models that lie in the folder itself."""
    listed = _listed(path / _INDEX)
    groups: dict[str | None, list[str]] = {}
    for file in models_in(path):
        groups.setdefault(_component(file, listed), []).append(file)
    return groups


def models_in(path: Path) -> list[str]:
    """The ONNX files that make one base: those of the folder itself; with ``model_index.json``, of its subfolders too."""
    pattern = ("*.onnx", "*/*.onnx") if (path / _INDEX).is_file() else ("*.onnx",)
    return sorted(file.relative_to(path).as_posix() for p in pattern for file in path.glob(p) if file.is_file())


def _listed(path: Path) -> list[str]:
    """The components that ``model_index.json`` lists."""
    if not path.is_file():
        return []
    try:
        index = canonical.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise fault("LF-610", f"cannot read {path}: {error}") from None
    return [name for name in index if not name.startswith("_")] if isinstance(index, dict) else []


def _component(file: str, listed: Sequence[str]) -> str | None:
    """optimum-onnx 0.1 writes a component to its own folder, but ``vae`` to ``vae_encoder`` and ``vae_decoder``."""
    folder = Path(file).parent.as_posix()
    if folder == ".":
        return None
    fits = [name for name in listed if folder == name or folder.startswith(f"{name}_")]
    return max(fits, key=len, default=folder)
