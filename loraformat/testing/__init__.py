"""The laws that every layout must keep, and adapters to try them on. For authors of layouts; needs only numpy.

A round trip proves that a layout is invertible, not that it is true: transposed both ways it would still pass.
So a layout is done when these laws hold *and* a file written by the real tool gives the ΔW that the tool computed
(``check_golden``). ``LayoutLaws`` holds the laws that need nothing but the layout: with pytest, a layout's test is

    class TestMine(LayoutLaws):
        layout = layout
        kinds = ("lora", "dora")
        files = (Path("golden/adapter.safetensors"),)  # written by the real tool
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat import registry, serializer
from loraformat.adapter import Adapter
from loraformat.errors import LoraFormatError
from loraformat.layout import Layout, ReadOptions
from loraformat.source import Source, open_source
from loraformat.testing.adapters import KINDS, random_adapter
from loraformat.updates import Update
from loraformat.verbs.convert import save

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = [
    "KINDS", "LayoutLaws", "check_claimed_alone", "check_exact_or_refused", "check_golden", "check_nothing_skipped",
    "check_rewrite", "check_round_trip", "check_tiles", "random_adapter", "relative_error",
]  # fmt: skip


def check_round_trip(layout: Layout, adapter: Adapter, folder: Path) -> Adapter:
    """What is written is read back with the same keys, kinds, scales and matrices; returns it.

    Scales may differ where the writer warns that it states the same change otherwise.
    """
    path = folder / "adapter.safetensors"
    said = save(adapter, path, layout, force=True)
    again = _read(layout, path)
    assert sorted(again) == sorted(adapter), (sorted(again), sorted(adapter))
    for key, update in adapter.items():
        assert again[key].kind == update.kind, key
        assert said or again[key].scale == update.scale, (key, again[key].scale, update.scale)
        if update.additive:
            # equal but for the order of sums: factors that lie otherwise in memory are multiplied otherwise
            assert relative_error(again[key].matrix(), update.matrix()) <= 1e-6, key
    return again


def check_claimed_alone(layout: Layout, path: Path) -> None:
    """A file of this layout is claimed by this layout and by no other that is installed."""
    source = open_source(path)
    claims = {name for name, item in (registry.layouts() | {layout.name: layout}).items() if item.detect(source)}
    assert claims == {layout.name}, f"{path} is claimed by {sorted(claims)}"


def check_rewrite(layout: Layout, path: Path, folder: Path) -> None:
    """A file of the real tool, read and written again, has the same tensors: names, dtypes, shapes, bytes."""
    again = folder / "again.safetensors"
    save(_read(layout, path), again, layout)
    before, after = open_source(path).tensors, open_source(again).tensors
    assert sorted(before) == sorted(after), (sorted(before), sorted(after))
    for name, tensor in before.items():
        assert (tensor.dtype, tensor.shape) == (after[name].dtype, after[name].shape), name
        assert tensor.tobytes() == after[name].tobytes(), name


def check_nothing_skipped(layout: Layout, path: Path, folder: Path) -> None:
    """A stray tensor is refused; one that is missing is refused or seen in the adapter. For safetensors sources.

    Seen is another target, kind, scale or placement, what had to be assumed, and what is kept of the source.
    """
    whole = open_source(path)
    tensors, seen = dict(whole.tensors), _seen(_read(layout, path))
    for name in tensors:
        broken = _copy(whole, {n: t for n, t in tensors.items() if n != name}, folder / "missing")
        assert _read_seen(layout, broken) != seen, f"nobody misses {name}"
    stray = _copy(whole, {**tensors, "stray.tensor": np.ones(3, np.float32)}, folder / "stray")
    assert _read_seen(layout, stray) is None, "a tensor that is not understood is skipped"


def check_exact_or_refused(layout: Layout, adapter: Adapter, folder: Path) -> bool:
    """What a layout cannot say exactly it refuses, by LF-508, and writes nothing; whether it could say it."""
    refusal = _refusal(layout, adapter, folder / "adapter.safetensors")
    if refusal is None:
        check_round_trip(layout, adapter, folder)
        return True
    assert {problem.rule for problem in refusal.problems} == {"LF-508"}, refusal
    assert not list(folder.iterdir())
    return False


class LayoutLaws:
    """Every law that needs nothing but the layout, as tests; a subclass names the layout and what it can.

    Attributes:
        layout: the layout.
        kinds: of ``KINDS``, that it can write and read.
        files: written by the real tool.
    """

    layout: Layout
    kinds: Sequence[str] = ("lora",)
    files: Sequence[Path] = ()

    def adapter(self, seed: int, kinds: Sequence[str], dtype: Any = np.float32) -> Adapter:
        """A random adapter, in a name space that the layout writes."""
        made, known = random_adapter(seed, kinds, dtype), self.layout.names
        return replace(made, names=made.names if not known or made.names in known else min(known))

    def test_what_is_written_is_read_back(self, tmp_path: Path) -> None:
        """For each kind, for every float dtype that numpy has."""
        for kind in self.kinds:
            for dtype in (np.float32, np.float16):
                folder = tmp_path / f"{kind}-{np.dtype(dtype)}"
                folder.mkdir()
                check_round_trip(self.layout, self.adapter(3, (kind,), dtype), folder)

    def test_what_is_written_is_claimed_by_this_layout_alone(self, tmp_path: Path) -> None:
        """For an adapter of every kind."""
        check_round_trip(self.layout, self.adapter(4, self.kinds), tmp_path)
        check_claimed_alone(self.layout, tmp_path / "adapter.safetensors")

    def test_what_cannot_be_said_exactly_is_refused(self, tmp_path: Path) -> None:
        """For each kind alone, for each beside a plain pair, and for all in one adapter."""
        for kinds in (*((kind,) for kind in KINDS), *(("lora", kind) for kind in KINDS[1:]), KINDS):
            folder = tmp_path / "-".join(kinds)
            folder.mkdir()
            carried = check_exact_or_refused(self.layout, self.adapter(6, kinds), folder)
            assert carried or not set(kinds) <= set(self.kinds), f"{self.layout.name} refuses {kinds}"

    def test_a_file_of_the_real_tool_is_claimed_read_whole_and_written_again(self, tmp_path: Path) -> None:
        """For each of ``files``."""
        for n, path in enumerate(self.files):
            folder = tmp_path / str(n)
            folder.mkdir()
            check_claimed_alone(self.layout, path)
            check_nothing_skipped(self.layout, path, folder)
            check_rewrite(self.layout, path, folder)


def check_golden(adapter: Adapter, deltas: Mapping[str, Array], tolerance: float = 1e-6) -> None:
    """The adapter changes exactly the parameters that the tool changed, by the ΔW that the tool computed.

    Args:
        deltas: base parameter → ΔW in the base tensor's own axes, as the tool gave it; every target must be placed.
        tolerance: of ‖ours − theirs‖ / ‖theirs‖.
    """
    assert sorted(adapter) == sorted(deltas), f"targets {sorted(adapter)} ≠ {sorted(deltas)}"
    for key, wanted in deltas.items():
        error = relative_error(adapter[key].delta(), wanted)
        assert error <= tolerance, f"{key}: ΔW is off by {error:.2g}, allowed {tolerance:.2g}"


def check_tiles(update: Update, base: Array) -> None:
    """Runs of rows, put together, are the whole."""
    whole = update.apply(base)
    cut = max(1, base.shape[0] // 3)
    runs = [(start, min(start + cut, base.shape[0])) for start in range(0, base.shape[0], cut)]
    tiles = [update.apply(base[a:b], (a, b)) for a, b in runs]
    np.testing.assert_allclose(np.concatenate(tiles), whole, rtol=1e-5, atol=1e-6)


def relative_error(found: Array, wanted: Array) -> float:
    """‖found − wanted‖ / ‖wanted‖ in float64; infinite where the shapes differ."""
    if found.shape != wanted.shape:
        return float("inf")
    difference = np.linalg.norm(found.astype(np.float64) - wanted.astype(np.float64))
    return float(difference / (np.linalg.norm(wanted.astype(np.float64)) or 1.0))


def _read(layout: Layout, path: Path) -> Adapter:
    return layout.read(open_source(path), ReadOptions()).adapter


def _refusal(layout: Layout, adapter: Adapter, path: Path) -> LoraFormatError | None:
    """Why the adapter is not written, or None."""
    try:
        save(adapter, path, layout, force=True)
    except LoraFormatError as error:
        return error
    return None


def _seen(adapter: Adapter) -> tuple[Any, ...]:
    """What an adapter is without its numbers."""
    targets = {key: (u.kind, u.scale, u.placement, u.assumed) for key, u in adapter.items()}
    return targets, dict(adapter.extensions)


def _read_seen(layout: Layout, path: Path) -> tuple[Any, ...] | None:
    """What is read, or None where it is refused."""
    try:
        return _seen(_read(layout, path))
    except LoraFormatError:
        return None


def _copy(source: Source, tensors: Mapping[str, Array], path: Path) -> Path:
    """The source with other tensors: the file alone, or in its folder with the files beside it."""
    assert source.file is not None
    name = path.with_suffix(".safetensors")
    if source.path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(source.path, path)
        name = path / source.file.name
    with open(name, "wb") as file:
        serializer.write(file, tensors, source.header)
    return path if source.path.is_dir() else name
