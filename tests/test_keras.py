"""KerasHub's .lora.h5: what it wrote changes its kernels as it computed, and it loads what we write."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import loraformat as lf
from loraformat import LoraFormatError, registry
from loraformat.layout import ReadOptions
from loraformat.resolve import Hints
from loraformat.testing import check_claimed_alone, relative_error
from loraformat.verbs.bind import bind
from loraformat.verbs.convert import save

h5py = pytest.importorskip("h5py", reason="needs h5py: the test extra")
GOLDEN = Path(__file__).parent / "golden" / "keras"
FILE = GOLDEN / "gemma.lora.h5"
LAYOUT = registry.layout("keras")


@pytest.fixture(scope="module")
def expected():
    """Key → (the kernel, the kernel with the factors in it)."""
    with np.load(GOLDEN / "expected.npz") as arrays:
        keys = sorted({name.partition("|")[0] for name in arrays.files})
        return {key: (arrays[f"{key}|W"], arrays[f"{key}|merged"]) for key in keys}


@pytest.fixture
def bound(expected, tmp_path):
    """The golden, bound to the model's kernels."""
    np.savez(tmp_path / "base.npz", **{key: weight for key, (weight, _) in expected.items()})
    axes = {key: "in0,in1,out" for key, (weight, _) in expected.items() if weight.ndim == 3}
    return bind(lf.load(FILE), lf.open_base(tmp_path / "base.npz"), Hints(axes=axes))


def test_what_kerashub_wrote_changes_its_kernels_as_it_computed(bound, expected):
    assert sorted(bound) == sorted(expected)
    for key, (weight, merged) in expected.items():
        assert relative_error(bound[key].apply(weight), merged) < 1e-6, key
        assert relative_error(weight, merged) > 0.1, key


def test_it_is_claimed_by_its_own_layout_alone():
    check_claimed_alone(LAYOUT, FILE)


def test_the_scale_that_is_assumed_is_said_and_another_may_be_stated():
    reading, _, _ = registry.read(FILE)
    assert [problem.rule for problem in reading.warnings] == ["LF-509"]
    stated, _, _ = registry.read(FILE, options=ReadOptions(alpha=6.0))
    assert {update.scale for update in stated.adapter.values()} == {2.0}
    with pytest.raises(LoraFormatError, match="LF-507"):
        registry.read(FILE, options=ReadOptions(rank=4))


def test_weights_of_keras_hold_no_adapter_and_say_so():
    with pytest.raises(LoraFormatError, match="LF-504") as caught:
        lf.load(GOLDEN / "gemma.weights.h5")
    assert "merged" in str(caught.value)


def test_the_same_datasets_are_written_again(bound, tmp_path):
    save(bound, tmp_path / "again.lora.h5", LAYOUT)
    assert datasets(tmp_path / "again.lora.h5") == datasets(FILE)


def datasets(path):
    found = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: found.update({name: np.asarray(item[()]).tobytes()}) if hasattr(item, "dtype") else None
        )
    return found


@pytest.mark.parametrize(
    ("change", "rule", "fix"),
    [
        (lambda u: {"8/kernel": u["8/kernel"].placed(u["8/kernel"].placement)}, None, ""),
        (lambda u: {"layer": u["8/kernel"]}, "LF-508", "retarget"),
        (lambda u: {"4/kernel": scaled(u["4/kernel"])}, "LF-508", "--fold-scale"),
        (lambda u: {"4/kernel": u["4/kernel"], "15/kernel": wider(u["15/kernel"])}, "LF-508", "--pad-rank"),
    ],
)
def test_what_the_file_cannot_hold_is_refused(change, rule, fix, bound, tmp_path):
    adapter = lf.Adapter(change(bound.targets), names="keras")
    if rule is None:
        save(adapter, tmp_path / "a.lora.h5", LAYOUT)
        return
    with pytest.raises(LoraFormatError, match=rule) as caught:
        save(adapter, tmp_path / "a.lora.h5", LAYOUT)
    assert fix in str(caught.value)
    assert not list(tmp_path.glob("*.h5"))


def scaled(update):
    part = update["lora"]
    return lf.Update((lf.Lora(part.lora_A, part.lora_B, 2.0, "factor"),), update.placement)


def wider(update):
    part = update["lora"]
    a, b = np.vstack([part.lora_A, part.lora_A]), np.hstack([part.lora_B, part.lora_B])
    return lf.Update((lf.Lora(a, b, 1.0, "factor"),), update.placement)


@pytest.mark.parametrize("damage", ["truncated", "stray", "alone"])
def test_what_is_damaged_is_refused_by_a_rule(damage, tmp_path):
    path = tmp_path / "x.lora.h5"
    shutil.copy(FILE, path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:9000])
    else:
        with h5py.File(path, "a") as file:
            if damage == "alone":
                del file["lora/8/vars/lora_kernel_b"]
            else:
                file["lora/8/vars/other"] = np.ones(3, np.float32)
    with pytest.raises(LoraFormatError, match=r"LF-(503|506|303)"):
        lf.load(path)


@pytest.mark.peer
def test_kerashub_loads_what_is_written(bound, expected, tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras", reason="needs keras: the peers extra")
    hub = pytest.importorskip("keras_hub", reason="needs keras-hub: make test installs it")
    save(bound, tmp_path / "ours.lora.h5", LAYOUT)
    model = hub.models.GemmaBackbone(
        vocabulary_size=13, num_layers=2, num_query_heads=4, num_key_value_heads=2, hidden_dim=10, intermediate_dim=14, head_dim=6
    )  # fmt: skip
    model.enable_lora(3, target_layer_names=["query_dense", "value_dense", "ffw_gating", "query", "value"])
    layers = [layer for layer in model._flatten_layers(include_self=False) if layer.weights]
    model.load_lora_weights(str(tmp_path / "ours.lora.h5"))
    for key, (weight, merged) in expected.items():
        layer = layers[int(key.partition("/")[0])]
        layer._kernel.assign(weight)
        assert relative_error(keras.ops.convert_to_numpy(layer.kernel), merged) < 1e-6, key


def _of(path, make):
    """A file of one layer, whose factor a is made by ``make`` in its group."""
    with h5py.File(path, "w") as file:
        file["lora/vars/rank"] = 4
        group = file.create_group("lora/0/vars")
        group["lora_kernel_b"] = np.ones((4, 8), np.float32)
        make(group)
    return path


def test_a_small_file_that_unpacks_to_gigabytes_is_refused_unread(tmp_path):
    shape = (2**29, 4)
    path = _of(
        tmp_path / "a.lora.h5",
        lambda g: g.create_dataset("lora_kernel_a", shape, "f4", chunks=(2**16, 4), compression="gzip"),
    )
    assert path.stat().st_size < 20_000
    (problem,) = lf.validate(path).problems
    assert (problem.rule, "unpacks to 8,589,934,592 bytes" in problem.what) == ("LF-503", True)


@pytest.mark.parametrize("kind", ["external", "virtual", "link"])
def test_values_that_lie_in_another_file_are_not_fetched_from_there(kind, tmp_path):
    (tmp_path / "secret.bin").write_bytes(np.ones((8, 4), np.float32).tobytes())
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["d"] = np.ones((8, 4), np.float32)
    layout = h5py.VirtualLayout((8, 4), "f4")
    layout[:] = h5py.VirtualSource(str(tmp_path / "secret.h5"), "d", shape=(8, 4))
    ways = {
        "external": lambda g: g.create_dataset(
            "lora_kernel_a", (8, 4), "f4", external=[(str(tmp_path / "secret.bin"), 0, 128)]
        ),
        "virtual": lambda g: g.create_virtual_dataset("lora_kernel_a", layout),
        "link": lambda g: g.__setitem__("lora_kernel_a", h5py.ExternalLink(str(tmp_path / "secret.h5"), "/d")),
    }
    told = lf.validate(_of(tmp_path / "a.lora.h5", ways[kind]))
    assert [problem.rule for problem in told.problems] == ["LF-503"]


@pytest.mark.parametrize(
    "rank",
    [float("nan"), float("inf"), "abc", "3", True, 2.5, 3j, [3, 3], np.array((3, 1.0), [("a", "i4"), ("b", "f4")])],
)
def test_a_rank_that_is_no_whole_number_is_told(rank, tmp_path):
    path = tmp_path / "x.lora.h5"
    shutil.copy(FILE, path)
    with h5py.File(path, "a") as file:
        del file["lora/vars/rank"]
        file["lora/vars/rank"] = rank
    assert [(p.rule, p.where) for p in lf.validate(path).problems if p.severity == "error"] == [
        ("LF-503", "lora/vars/rank")
    ]


NAMES = {
    "no UTF-8": (b"lora/\xff\xfe", "LF-503"),
    "a number of 5000 digits": ("lora/" + "9" * 5000 + "/vars/lora_kernel_a", "LF-506"),
    "another script's digits": ("lora/\u0663/vars/lora_kernel_a", "LF-506"),
    "two names for one layer": ("lora/08/vars/lora_kernel_a", "LF-506"),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_no_layers_is_told(name, tmp_path):
    path = tmp_path / "x.lora.h5"
    shutil.copy(FILE, path)
    called, rule = NAMES[name]
    with h5py.File(path, "a") as file:
        file[called] = np.ones((8, 3), np.float32)
    assert {p.rule for p in lf.validate(path).problems if p.severity == "error"} == {rule}


def test_what_holds_nothing_is_told(tmp_path):
    told = lf.validate(_of(tmp_path / "a.lora.h5", lambda g: g.create_dataset("lora_kernel_a", data=h5py.Empty("f4"))))
    assert [problem.rule for problem in told.problems] == ["LF-503"]
