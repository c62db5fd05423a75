"""Which files of a folder are one base, and which component of a pipeline each of them is."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from loraformat import canonical
from loraformat.errors import LoraFormatError, Problem, fault

__all__ = ["components_of", "files_in", "models_in"]

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


def files_in(path: Path) -> list[str]:
    """Every file of the folder, by its path in it; not what a version control or a download keeps in dot folders.

    Raises:
        LoraFormatError: LF-610 a link that leads out of the folder, or what is neither a file nor a folder.
    """
    names = sorted(_walk(path))
    if problems := [Problem("LF-610", why, name) for name in names if (why := _strange(path, path / name))]:
        raise LoraFormatError(problems)
    return names


def _walk(path: Path) -> Iterator[str]:
    for place, folders, files in os.walk(path):
        linked = [name for name in folders if (Path(place) / name).is_symlink()]
        folders[:] = [name for name in folders if not name.startswith(".") and name not in linked]
        yield from ((Path(place) / name).relative_to(path).as_posix() for name in (*files, *linked))


def _strange(folder: Path, file: Path) -> str | None:
    """Why a file is not copied. A download of huggingface_hub links <repo>/snapshots/<revision>/file to <repo>/blobs."""
    real, home = file.resolve(), folder.resolve()
    homes = [home, *([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])]
    if not any(real.is_relative_to(place) for place in homes):
        return f"it is a link that leaves {folder}"
    if not real.exists() or not stat.S_ISREG(real.stat().st_mode):
        return "it is no file"
    return None
