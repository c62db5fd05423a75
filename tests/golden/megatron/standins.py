"""What stands in for transformer_engine, megatron-energon and a CUDA device, none of which runs on a CPU.

No factor, no name and no file comes from here: Megatron-Core's local layers take the place of transformer_engine's, of
which only names are imported; energon loads data; a CPU has no random state of CUDA to save.
"""

import importlib.abc
import importlib.machinery
import sys
import tempfile
import types
import typing
from pathlib import Path

import torch
import typing_extensions

_ABSENT = ("transformer_engine", "megatron.energon")


class _Nothing(types.ModuleType):
    """A module of which anything can be imported: a class for a name with a capital, else another module."""

    __path__: typing.ClassVar[list[str]] = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name[:1].isupper():
            value = type(name, (), {"__class_getitem__": classmethod(lambda cls, item: cls)})
        else:
            value = _Nothing(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        absent = any(name == top or name.startswith(f"{top}.") for top in _ABSENT)
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if absent else None

    def create_module(self, spec):
        return _Nothing(spec.name)

    def exec_module(self, module):
        pass


def install():
    """Before anything of Megatron-Bridge is imported."""
    if not hasattr(typing, "override"):  # the wheels ask for Python 3.12
        typing.override = typing_extensions.override
    from megatron.core.models.gpt import GPTModel  # noqa: F401  first without transformer_engine: it takes its own layers

    sys.meta_path.append(_Finder())
    version = Path(tempfile.mkdtemp()) / "transformer_engine-0.0.1.dist-info"
    version.mkdir()
    (version / "METADATA").write_text("Metadata-Version: 2.1\nName: transformer-engine\nVersion: 0.0.1\n")
    sys.path.append(str(version.parent))

    import megatron.bridge.peft.module_matcher as matcher
    import megatron.bridge.peft.utils as utils

    matcher.HAVE_TE = utils.HAVE_TE = False
    torch.cuda.get_rng_state = torch.get_rng_state
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.current_device = lambda: "cpu"
