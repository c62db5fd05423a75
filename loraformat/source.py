"""What a layout reads from: named tensors, header text and the files beside them, whatever holds the bytes."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraformat.container import Container
from loraformat.errors import LoraFormatError, fault
from loraformat.names import nearest
from loraformat.pickled import INDEX, is_torch

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.pickled.distributed import Distributed
    from loraformat.pickled.file import TorchFile

    Array = npt.NDArray[Any]

__all__ = ["Source", "existing", "open_source"]

_SIDECAR_CAP = 16 * 2**20
_LOOSE = frozenset({".bin", ".pt", ".pth", ".ckpt"})


class Source:
    """An input: a tensor file, or a folder that holds one, with the small files beside it.

    Attributes:
        path: as the user gave it.
        folder: where sidecars lie.
        file: the tensor file, or None in a folder without any.
        opened: what a reader of other containers than tensor files keeps, by its name: one opening for all who look.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = path if path.is_dir() else path.parent
        self.file: Path | None = path if not path.is_dir() else _tensor_file(path)
        self.opened: dict[str, Any] = {}
        self._container: Container | None = None
        self._tensors: TorchFile | Distributed | None = None

    @property
    def container(self) -> Container:
        """The opened tensor file; LF-1xx where it is damaged, LF-501 where there is none."""
        if self.file is None:
            steps = [path.parent for path in self.path.glob(f"*/{INDEX}")]  # of a run that saves one after the other
            loose = sorted(
                path.name for path in (*self.path.iterdir(), *steps) if path.suffix in _LOOSE or path in steps
            )
            fix = f"name what is meant: {', '.join(loose[:3])}" if loose else ""
            raise fault("LF-501", f"{self.path} holds no adapter: no tensor file in it goes by a known name", fix=fix)
        if self._container is None:
            self._container = Container(self.file)
        return self._container

    @cached_property
    def head(self) -> bytes:
        """The first 64 bytes of the tensor file, by which its format is known; empty without a file."""
        if self.file is None:
            return b""
        try:
            with open(self.file, "rb") as file:
                return file.read(64)
        except OSError as error:
            raise fault("LF-701", f"cannot read {self.file}: {error.strerror or error}") from None

    @cached_property
    def torch(self) -> bool:
        """Whether the tensor file is one of ``torch.save``, by its first bytes."""
        return self.file is not None and not self.distributed and is_torch(self.file)

    @property
    def distributed(self) -> bool:
        """Whether the tensors are those of a distributed checkpoint of torch, whose index is the tensor file."""
        return self.file is not None and self.file.name == INDEX

    @property
    def tensors(self) -> Mapping[str, Array]:
        """Tensor name → array, of a safetensors file or, by a reader that runs nothing, of what torch saves."""
        if not self.torch and not self.distributed:
            return self.container
        if self._tensors is None:
            from loraformat.pickled.distributed import Distributed  # the machinery is loaded only where it is needed
            from loraformat.pickled.file import TorchFile

            assert self.file is not None
            self._tensors = Distributed(self.file.parent) if self.distributed else TorchFile(self.file)
        return self._tensors

    @property
    def header(self) -> Mapping[str, str]:
        """The container's own metadata strings; what torch saves has none."""
        return {} if self.torch or self.distributed else self.container.metadata

    def sidecar(self, name: str) -> str | None:
        """The text of a file beside the tensors, or None where there is none."""
        path = self.folder / name
        if not path.is_file():
            return None
        if path.stat().st_size > _SIDECAR_CAP:
            raise fault("LF-503", f"{path} has {path.stat().st_size:,} bytes; a configuration has less than 16 MiB")
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise fault("LF-503", f"cannot read {path}: {error}") from None


def open_source(path: str | os.PathLike[str]) -> Source:
    """The source at ``path``; LF-701 if there is nothing that can be read without waiting for it."""
    found = existing(path)
    if found.suffix == ".json" and not found.is_dir():
        raise fault("LF-501", f"{found} holds no tensors", fix=f"name the folder that it lies in: {found.parent}")
    return Source(found)


def existing(path: str | os.PathLike[str]) -> Path:
    """A file or a folder; LF-701 for what is not there, or is neither and would be waited for; LF-501 for a part of one."""
    if not os.fspath(path):  # Path("") is the folder that one stands in
        raise fault("LF-701", "the path is empty", fix="is a variable of your shell unset?")
    found = Path(path)
    try:
        mode = os.stat(found).st_mode
    except FileNotFoundError:
        raise _not_found(os.fspath(path)) from None
    except OSError as error:
        raise fault("LF-701", f"cannot read {found}: {error.strerror or error}") from None
    if stat.S_ISREG(mode) and found.suffix == ".distcp":
        what = f"{found} is what one rank saved of a distributed checkpoint"
        raise fault("LF-501", what, fix=f"name the folder that it lies in: {found.parent}")
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return found
    kind = "a pipe" if stat.S_ISFIFO(mode) else "a device or a socket"
    raise fault("LF-701", f"{found} is {kind}, not a file", fix="save it to a file; validate also reads stdin, as -")


def _not_found(path: str) -> LoraFormatError:
    """LF-701, with what was perhaps meant: a link whose file is gone, or the name of something on a hub."""
    if os.path.islink(path):
        return fault("LF-701", f"{path} is a link to {os.readlink(path)}, which does not exist")
    folder, _, name = path.rpartition("/")
    hub = "://" in path or (name and folder and "/" not in folder and not os.path.exists(folder))
    if path == "-":
        fix = "of all verbs validate alone reads stdin: save it to a file"
    elif hub:
        fix = "a path on this machine is meant; from a hub, download it first"
    else:
        close = nearest(name, _names_in(folder or "."), 1)
        fix = f"did you mean {path.removesuffix(name)}{close[0]}?" if close else ""
    return fault("LF-701", f"no such file or folder: {path}", fix=fix)


def _names_in(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _tensor_file(folder: Path) -> Path | None:
    """The tensor file of an adapter folder: the names that tools write, else the only one there is."""
    for stem in ("adapter_model", "adapters", "pytorch_lora_weights"):
        for ending in (".safetensors", ".bin"):
            if (folder / f"{stem}{ending}").is_file():
                return folder / f"{stem}{ending}"
    for name in ("adapter_model.pt", "lit_model.pth.lora"):  # torchtune, litgpt
        if (folder / name).is_file():
            return folder / name
    if (folder / INDEX).is_file() and any(folder.glob("*.distcp")):
        return folder / INDEX
    files = sorted(folder.glob("*.safetensors"))
    if len(files) > 1:
        raise fault(
            "LF-502",
            f"{folder} holds {len(files)} tensor files: {', '.join(f.name for f in files[:4])}",
            fix="name one",
        )
    return files[0] if files else None
