"""The JAX world's files: what flax, orbax and qwix wrote gives what their models compute, and they load what we write."""

import logging
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import loraformat as lf
from loraformat import LoraFormatError, registry
from loraformat.base import Parameter
from loraformat.layout import ReadOptions
from loraformat.testing import check_claimed_alone, relative_error
from loraformat.verbs.convert import save

GOLDEN = Path(__file__).parent / "golden" / "flax"
NNX_FILES = ("orbax_value", "orbax_plain", "state.msgpack", "state.npz")
QWIX_FILES = ("orbax_plain", "state.msgpack")


def files(layout):
    return [GOLDEN / layout / name for name in {"nnx": NNX_FILES, "qwix": QWIX_FILES}[layout]]


ALL = [pytest.param(layout, path, id=f"{layout}-{path.name}", marks=[pytest.mark.peer] if path.is_dir() else [])
       for layout in ("nnx", "qwix") for path in files(layout)]  # fmt: skip


def expected(layout):
    """Key → {W, x, y} that the tool computed."""
    with np.load(GOLDEN / layout / "expected.npz") as arrays:
        found = {}
        for name in arrays.files:
            key, _, word = name.partition("|")
            found.setdefault(key, {})[word] = arrays[name]
    return found


EQUATIONS = {
    "q": "bi,io->bo", "h": "bi,inh->bnh", "o": "bnh,nhd->bd", "e": "btd,ckdh->cbtkh", "f": "cbtkh,ckhd->btd",
    "x": "ebd,edf->ebf", "t": "btd,vd->btv", "blocks": "bi,io->bo",
}  # fmt: skip


def computed(key, x, kernel):
    """What a module computes from its input and its kernel, in plain numpy."""
    name = key.partition("/")[0]
    if name in EQUATIONS:
        return np.einsum(EQUATIONS[name], x, kernel)
    size = kernel.shape[:-2]
    padded = np.pad(x, [(0, 0), *(((n - 1) // 2, n // 2) for n in size), (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, size, tuple(range(1, 1 + len(size))))
    return np.einsum("bti" + "k,kio->bto" if len(size) == 1 else "bxyikl,klio->bxyo", windows, kernel)


class Kernels:
    """The base weights of a golden, as a reader asks for their shapes."""

    path = Path("base")

    def __init__(self, weights):
        self.weights = weights

    def parameters(self):
        return {k: Parameter(k, w.shape, "F32") for k, w in self.weights.items()}


def read(layout, path):
    want = expected(layout)
    base = Kernels({key: case["W"] for key, case in want.items()})
    options = ReadOptions(base=base) if layout == "nnx" else ReadOptions(alpha=3.0, base=base)
    return registry.read(path, layout, options)[0].adapter


@pytest.mark.parametrize(("layout", "path"), ALL)
def test_what_the_tool_wrote_changes_its_weights_as_the_tool_computed(layout, path):
    adapter, want = read(layout, path), expected(layout)
    assert sorted(adapter) == sorted(want)
    for key, case in want.items():
        kernel = case["W"] + adapter[key].delta()
        assert relative_error(computed(key, case["x"], kernel), case["y"]) < 1e-6, key
        assert relative_error(computed(key, case["x"], case["W"]), case["y"]) > 0.05, key


@pytest.mark.parametrize(("layout", "path"), ALL)
def test_it_is_claimed_by_its_own_layout_alone(layout, path):
    check_claimed_alone(registry.layout(layout), path)


@pytest.mark.parametrize("ending", ["", ".msgpack", ".npz", ".safetensors"])
@pytest.mark.parametrize("layout", ["nnx", "qwix"])
def test_every_container_gives_the_same_leaves_back(layout, ending, tmp_path):
    if not ending:
        pytest.importorskip("orbax.checkpoint", reason="needs orbax: the peers extra")
    adapter = read(layout, GOLDEN / layout / "state.msgpack")
    save(adapter, tmp_path / f"again{ending}", registry.layout(layout))
    again = read(layout, tmp_path / f"again{ending}")
    assert lf.digest(again) == lf.digest(adapter)
    if ending == ".msgpack":
        from loraformat_converters.flax.msgpack import read as leaves

        before, after = leaves(GOLDEN / layout / "state.msgpack"), leaves(tmp_path / "again.msgpack")
        assert {k: v.tobytes() for k, v in before.items()} == {k: v.tobytes() for k, v in after.items()}


def test_qwix_states_no_alpha_and_is_asked_for_it():
    with pytest.raises(LoraFormatError, match="LF-509") as caught:
        registry.read(GOLDEN / "qwix" / "state.msgpack")
    assert "--alpha" in str(caught.value)
    with pytest.raises(LoraFormatError, match="LF-507"):
        registry.read(GOLDEN / "qwix" / "state.msgpack", options=ReadOptions(alpha=3.0, rank=5))


def test_a_scale_that_nnx_has_not_is_refused_until_it_is_folded(run, tmp_path):
    adapter = read("qwix", GOLDEN / "qwix" / "state.msgpack")
    two = {key: update for key, update in adapter.items() if key == "q/kernel"}
    lf.save(lf.Adapter(two, names="flax"), tmp_path / "a.lora.safetensors")
    told = run("convert", "a.lora.safetensors", "state.npz", "--to", "nnx")
    assert (told.code, "--fold-scale" in told.err) == (1, True)
    assert run("convert", "a.lora.safetensors", "state.npz", "--to", "nnx", "--fold-scale").code == 0
    again = lf.load(tmp_path / "state.npz")["q/kernel"]
    assert relative_error(again.matrix(), adapter["q/kernel"].matrix()) < 1e-6


@pytest.mark.parametrize("damage", ["truncated", "flipped", "stray", "alone"])
@pytest.mark.parametrize("name", ["state.msgpack", "state.npz"])
def test_what_is_damaged_is_refused_by_a_rule(name, damage, tmp_path):
    path = tmp_path / name
    shutil.copy(GOLDEN / "nnx" / name, path)
    data = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        path.write_bytes(b"\x00" * 16 + data[16:])
    else:
        from loraformat.source import open_source
        from loraformat_converters.flax import open_tree, output

        leaves = dict(open_tree(open_source(path)).items())
        leaves.pop(next(iter(leaves))) if damage == "alone" else leaves.update({"blocks/0/bias": np.ones(3, "f")})
        with open(path, "wb") as file:
            output(leaves, path.suffix).files[""](file)
    with pytest.raises(LoraFormatError) as caught:
        registry.read(path, "nnx")
    rules = {problem.rule for problem in caught.value.problems}
    assert rules <= {"LF-503", "LF-506", "LF-303"}, caught.value


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("how", ["encrypted", "twice"])
def test_an_archive_that_cannot_be_one_adapter_is_refused(how, tmp_path):
    """Of two entries by one name numpy gives the last, and of an encrypted one an error that is no OSError."""
    path = tmp_path / "state.npz"
    shutil.copy(GOLDEN / "nnx" / "state.npz", path)
    if how == "encrypted":
        data = bytearray(path.read_bytes())
        for start in (data.index(b"PK\x03\x04") + 6, data.index(b"PK\x01\x02") + 8):
            data[start] |= 1
        path.write_bytes(data)
    else:
        with zipfile.ZipFile(path, "a") as archive:
            name = archive.namelist()[0]
            archive.writestr(name, archive.read(name))
    assert [p.rule for p in lf.validate(path, layout="nnx").problems] == ["LF-503"]


@pytest.mark.parametrize("ending", ["", ".msgpack", ".npz"])
def test_a_jax_checkpoint_is_a_base(ending, run, tmp_path):
    if not ending:
        pytest.importorskip("orbax.checkpoint", reason="needs orbax: the peers extra")
    from loraformat.atomic import write_file, write_folder
    from loraformat_converters.flax import output

    want = expected("qwix")
    made = output({f"params/{key}": case["W"] for key, case in want.items()}, ending)
    base = tmp_path / f"base{ending}"
    write_folder(base, made.files) if made.folder else write_file(base, made.files[""])
    source = GOLDEN / "qwix" / "state.msgpack"
    told = run("convert", source, "a.lora.safetensors", "--alpha", "3", "--base", base)
    assert told.code == 0, told.err
    told = run("merge", "a.lora.safetensors", "--into", base, "-o", f"merged{ending}", "--verify")
    assert told.code == 0, told.err
    merged = lf.open_base(tmp_path / f"merged{ending}")
    for key, case in want.items():
        assert relative_error(computed(key, case["x"], merged.read(key)), case["y"]) < 1e-6
    assert run("info", base).code == 0
    assert run("resolve", "a.lora.safetensors", "--in", base).code == 0
    assert run("verify", "--base", base, "--adapter", "a.lora.safetensors", "--merged", f"merged{ending}").code == 0
    assert run("verify", "--base", base, "--adapter", "a.lora.safetensors", "--merged", base).code == 1


def _orbax(path, damage):
    """A folder that Orbax wrote, each array in files of its own, after ``damage``."""
    library = pytest.importorskip("orbax.checkpoint", reason="needs orbax: the peers extra")
    arrays = {"lora_a": {"value": np.ones((64, 4), np.float32)}, "lora_b": {"value": np.ones((4, 64), np.float32)}}
    with library.Checkpointer(library.PyTreeCheckpointHandler(use_ocdbt=False)) as writer:
        writer.save(path.absolute(), args=library.args.PyTreeSave({"blocks": {"0": arrays}}))
    assert lf.validate(path).valid
    for file in path.rglob("*lora_a*/.zarray"):
        file.write_text(damage(file.read_text()))
    return path


def test_an_orbax_folder_that_states_gigabytes_is_refused_unread(tmp_path):
    (problem,) = lf.validate(_orbax(tmp_path / "x", lambda text: text.replace("64", str(2**29)))).problems
    assert (problem.rule, "unpacks to 8,589,935,616 bytes" in problem.what) == ("LF-503", True)


def test_a_damaged_orbax_folder_is_told_in_our_words_alone(tmp_path):
    folder = _orbax(tmp_path / "x", lambda text: "")
    code = "from loraformat.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "validate", str(folder)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert "LF-503" in done.stdout
    assert "NoneType" not in done.stdout


def test_a_read_that_nobody_waits_for_is_not_logged_and_what_others_say_is(tmp_path, caplog):
    lf.validate(_orbax(tmp_path / "x", lambda text: ""))
    caplog.clear()
    for place in (
        "orbax/checkpoint/handlers.py",
        'tasks.py> exception=ValueError(\'Error opening "zarr" driver',
        "theirs.py",
    ):
        logging.getLogger("asyncio").error("Task exception was never retrieved\nfuture: <Task defined at %s>", place)
    assert [record.args for record in caplog.records] == [("theirs.py",)]


def test_an_archive_is_opened_once_for_all_layouts_that_look(tmp_path, monkeypatch):
    from loraformat_converters.flax import npz

    opened = []
    read = npz.read
    monkeypatch.setattr(npz, "read", lambda path: opened.append(path) or read(path))
    lf.load(GOLDEN / "nnx" / "state.npz")
    assert len(opened) == 1
