"""The runtime: what is chosen acts, in each call and in each thread; what does not belong to the model is refused."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import updates
from graphs import adapter, lora, model, save, session, stored

import loraformat as lf
from loraformat import Adapter, LoraFormatError, Placement
from loraformat.base import Options
from loraformat.registry import open_base
from loraformat.sketch import sketch
from loraformat.testing import relative_error
from loraformat.verbs.convert import convert
from loraformat.verbs.merge import merge, prepare
from loraformat_converters.onnx import runtime
from loraformat_converters.onnx.attaching.slots import Fed
from loraformat_converters.onnx.effective import Effective
from loraformat_converters.onnx.running import pooled
from loraformat_converters.onnx.running.blend import blend
from loraformat_converters.onnx.runtime import Session

KEY, OTHER = "m.q.weight", "m.v.weight"
TEXT = """g (float[N,T,5] x) => (float[N,T,4] y) <float[5,7] w, float[7,4] v, float[7] b>
  { ["/m/q/MatMul"] h = MatMul(x, w)  a = Add(h, b)  ["/m/v/MatMul"] y = MatMul(a, v) }"""
GIVEN = {
    "both": adapter({KEY: (7, 5), OTHER: (4, 7)}),
    "q": adapter({KEY: lora(7, 5, rank=3, seed=11)}),
    "v": adapter({OTHER: lora(4, 7, rank=1, seed=12)}),
}
X = {"x": np.random.default_rng(5).standard_normal((3, 2, 5)).astype(np.float32)}


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """(choice) → what base and adapters give, by merging."""
    folder = tmp_path_factory.mktemp("truth")
    base = open_base(save(model(TEXT), folder / "base.onnx"))

    def of(choice):
        weights = {choice: 1.0} if isinstance(choice, str) else choice or {}
        path = base.path
        if weights:
            path = folder / "merged.onnx"
            merge([(GIVEN[name], weight) for name, weight in weights.items()], base, path, force=True)
        return session(path).run(None, X)[0]

    return of


def attached(folder, mode, names=(), **options):
    base = open_base(save(model(TEXT), folder / "base.onnx"))
    given = [(name, GIVEN[name]) for name in names]
    base.apply(prepare("attach", given, base, Options(folder / f"{mode}.onnx", mode, **options)))
    return folder / f"{mode}.onnx"


CHOICES = [None, "both", "q", "v", {"both": 0.5, "q": -2.0}, {"q": 0.7, "v": 0.3, "both": 1.0}, {"q": 0.0}, {}]


@pytest.mark.parametrize("slots", ["optional", "required"])
@pytest.mark.parametrize("pad", [None, 6])
def test_what_is_chosen_acts(slots, pad, truth, tmp_path):
    running = Session(attached(tmp_path, "swap", ["both"], slots=slots, pad_rank=pad))
    lf.save(GIVEN["q"], tmp_path / "q.safetensors")
    running.load("both", tmp_path / "swap.both.onnx_adapter")
    running.load("q", tmp_path / "q.safetensors")
    running.load("v", GIVEN["v"])
    assert running.names == ["both", "q", "v"]
    for choice in CHOICES:
        assert relative_error(running.use(choice).run(X)["y"], truth(choice)) <= 3e-6
    assert relative_error(running.run(X)["y"], truth(None)) == 0
    assert list(running.run(X, ["y"])) == ["y"]


@pytest.mark.parametrize("select", ["index", "weights"])
def test_every_row_of_a_stack_is_chosen_for(select, truth, tmp_path):
    running = Session(attached(tmp_path, "stack", ["both", "q", "v"], rows=("x",), select=select))
    wanted = np.stack([truth(choice)[row] for row, choice in enumerate(["v", None, "both"])])
    assert relative_error(running.use(["v", None, "both"]).run(X)["y"], wanted) <= 3e-6
    assert relative_error(running.use("q").run(X)["y"], truth("q")) <= 3e-6
    assert relative_error(running.run(X)["y"], truth(None)) <= 1e-6
    if select == "weights":
        one = adapter({KEY: (7, 5)})
        assert one[KEY].rank == 2
        found = running.use([{"q": 0.5}, "q", {"v": -1.0}]).run(X)["y"]
        wanted = np.stack([truth({"q": 0.5})[0], truth("q")[1], truth({"v": -1.0})[2]])
        assert relative_error(found, wanted) <= 3e-6
    else:
        with pytest.raises(LoraFormatError, match=r"LF-705.*one adapter, as it is"):
            running.use([{"q": 0.5}, None, None])
    with pytest.raises(LoraFormatError, match="LF-705  2 rows are chosen for, and the inputs have 3"):
        running.use(["q", None]).run(X)
    with pytest.raises(LoraFormatError, match="LF-705  no adapter is called z"):
        running.use(["q", "z", None])


def test_a_live_strength_is_chosen(truth, tmp_path):
    running = Session(attached(tmp_path, "branch", ["q", "v"], live_scale=True))
    for choice in (None, "q", {"q": 0.5, "v": -1.5}):
        assert relative_error(running.use(choice).run(X)["y"], truth(choice)) <= 3e-6
    assert relative_error(running.run(X)["y"], truth({"q": 1.0, "v": 1.0})) <= 3e-6


def test_threads_that_use_different_adapters_do_not_meet(truth, tmp_path):
    running = Session(attached(tmp_path, "swap", ["both", "q", "v"]), resident=2)
    for name in GIVEN:
        running.load(name, tmp_path / f"swap.{name}.onnx_adapter")
    choices = [None, "both", "q", "v", {"both": 0.5, "q": -2.0}]
    wanted = [truth(choice) for choice in choices]

    def work(n):
        return relative_error(running.use(choices[n % 5]).run(X)["y"], wanted[n % 5])

    with ThreadPoolExecutor(8) as pool:
        assert max(pool.map(work, range(400))) <= 3e-6
    assert len(running._held) <= 2


def test_adapters_are_loaded_anew_and_unloaded_while_others_run(truth, tmp_path):
    running = Session(attached(tmp_path, "swap", ["both"]))
    names = ["q", "both"]
    wanted = [truth(name) for name in names]

    def reload(n):
        running.load("a", GIVEN[names[n % 2]])

    def work(_):
        found = running.use("a").run(X)["y"]
        return min(relative_error(found, one) for one in wanted)

    reload(0)
    with ThreadPoolExecutor(6) as pool:
        jobs = [pool.submit(reload if n % 7 == 0 else work, n) for n in range(210)]
        assert max(job.result() or 0.0 for job in jobs) <= 3e-6
    running.load("a", GIVEN["q"])
    held = running.use("a")
    running.unload("a")
    assert relative_error(held.run(X)["y"], truth("q")) <= 3e-6
    with pytest.raises(LoraFormatError, match="LF-705"):
        running.use("a")


@pytest.mark.parametrize("how", ["a path", "in memory", "onnx_adapter", "effective"])
def test_a_file_that_is_written_over_does_not_change_what_was_loaded(how, truth, tmp_path):
    """In its place, as safetensors' save_file and torch.save do it. A shorter file would end the process."""
    path, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    lf.save(GIVEN["q"], path)
    lf.save(adapter({KEY: lora(7, 5, rank=3, seed=99)}), other)
    if how == "effective":
        effective = Effective(save(model(TEXT), tmp_path / "base.onnx"), {"q": path})
        path.write_bytes(other.read_bytes())
        effective.use("q")
        assert relative_error(effective.run(X)["y"], truth("q")) <= 3e-6
        return
    running = Session(attached(tmp_path, "swap", ["both", "q"]), resident=1)
    file = tmp_path / "swap.q.onnx_adapter" if how == "onnx_adapter" else path
    running.load("q", lf.load(path) if how == "in memory" else file)
    file.write_bytes(other.read_bytes() if file == path else bytes(file.stat().st_size))
    for choice in (None, "q", {"q": 0.5}):
        assert relative_error(running.use(choice).run(X)["y"], truth(choice)) <= 3e-6


def test_the_latest_choices_are_kept_and_no_more(tmp_path):
    running = Session(attached(tmp_path, "swap", ["both"]), resident=2)
    for name, one in GIVEN.items():
        running.load(name, one)
    for name in ("both", "q", "both", "v"):
        running.use(name)
    assert list(running._held) == [(("both", 1.0),), (("v", 1.0),)]


def test_an_adapter_of_another_model_is_refused(tmp_path):
    running = Session(attached(tmp_path, "swap", ["q"]))
    (tmp_path / "other").mkdir()
    base = open_base(save(model(TEXT, seed=8), tmp_path / "other" / "base.onnx"))
    base.apply(prepare("attach", [("q", GIVEN["q"])], base, Options(tmp_path / "other" / "swap.onnx", "swap")))
    path = tmp_path / "other" / "swap.q.onnx_adapter"
    with pytest.raises(LoraFormatError, match=r"LF-607.*\n.*--for"):
        running.load("q", path)
    running.load("q", path, any_base=True)
    lf.save(adapter({KEY: lora(7, 5, alpha=2)}), tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "for_none.onnx_adapter")
    with pytest.raises(LoraFormatError, match="LF-607"):
        running.load("q", tmp_path / "for_none.onnx_adapter")
    convert(tmp_path / "a.safetensors", tmp_path / "for_this.onnx_adapter", model=tmp_path / "swap.onnx")
    running.load("q", tmp_path / "for_this.onnx_adapter")


def bound(given, base):
    """The adapter with the sketches of the weights that stand in a graph as [in, out]."""
    weights = {KEY: stored(base.path)["w"].T, OTHER: stored(base.path)["v"].T}
    places = {key: Placement(weights[key].shape, (0,), (1,)) for key in given}
    return Adapter({k: replace(u, placement=places[k], sketch=sketch(weights[k], places[k])) for k, u in given.items()})


def test_an_adapter_that_is_bound_to_other_weights_is_refused(tmp_path):
    """By the sketches that a swap keeps of its weights, where an adapter of it was bound."""
    base = open_base(save(model(TEXT), tmp_path / "base.onnx"))
    (tmp_path / "other").mkdir()
    other = open_base(save(model(TEXT, seed=8), tmp_path / "other" / "base.onnx"))
    own, strange = bound(GIVEN["both"], base), bound(GIVEN["q"], other)
    base.apply(prepare("attach", [("both", own)], base, Options(tmp_path / "swap.onnx", "swap")))
    running = Session(tmp_path / "swap.onnx")
    running.load("own", bound(GIVEN["q"], base))
    running.load("unbound", GIVEN["q"])
    lf.save(strange, tmp_path / "strange.safetensors")
    for given in (strange, tmp_path / "strange.safetensors"):
        with pytest.raises(LoraFormatError, match=r"LF-607.*cosine"):
            running.load("strange", given)
    scaled = {k: replace(u, sketch=2 * u.sketch) for k, u in own.items()}
    with pytest.raises(LoraFormatError, match=r"LF-616.*the model's weight is 0\.5 times"):
        running.load("strange", Adapter(scaled))
    running.load("strange", strange, any_base=True)
    assert running.names == ["own", "unbound", "strange"]
    bare = Session(attached(tmp_path / "other", "swap", ["both"]))
    assert bare.slots.sketches == {}
    bare.load("own", own)


def test_what_runs_is_bound_once_and_lets_go_of_its_inputs(tmp_path):
    running = Session(attached(tmp_path, "swap", ["both"]))
    running.load("both", GIVEN["both"])
    x = {"x": X["x"].copy()}
    held = weakref.ref(x["x"])
    for _ in range(3):
        running.use("both").run(x)
    (bindings,) = running.use("both").held._free.values()
    assert len(bindings) == 1
    del x
    gc.collect()
    assert held() is None


def test_a_run_that_failed_leaves_nothing_behind(truth, tmp_path):
    running = Session(attached(tmp_path, "swap", ["both"]))
    running.load("both", GIVEN["both"])
    with pytest.raises(Exception, match="x"):
        running.use("both").run({"x": np.zeros((1, 2, 9), np.float32)})
    assert relative_error(running.use("both").run(X)["y"], truth("both")) <= 3e-6


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_where_a_provider_is_not_installed_adapters_lie_where_the_model_runs(truth, tmp_path):
    given = [("CUDAExecutionProvider", {"device_id": 1}), "CPUExecutionProvider"]
    running = Session(attached(tmp_path, "swap", ["both"]), given)
    if running.inference.get_providers()[0].startswith("CUDA"):
        pytest.skip("it is installed here")
    running.load("both", GIVEN["both"])
    assert running.device == ("cpu", 0)
    assert relative_error(running.use("both").run(X)["y"], truth("both")) <= 3e-6


def test_a_file_that_is_no_model_is_a_fault(tmp_path):
    (tmp_path / "no.onnx").write_bytes(b"no model")
    with pytest.raises(LoraFormatError, match="LF-705  ONNX Runtime cannot open"):
        Session(tmp_path / "no.onnx")


MISFITS = {
    "a target without a slot": (adapter({"m.k.weight": (7, 5)}), "LF-602"),
    "other sizes": (adapter({KEY: (7, 6)}), "LF-606"),
    "no pair": (Adapter({KEY: updates.made("loha", Placement((7, 5), (0,), (1,)))}), "LF-508"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_an_adapter_that_does_not_fit_is_refused_when_it_is_loaded(case, tmp_path):
    running = Session(attached(tmp_path, "swap", ["both"]))
    given, rule = MISFITS[case]
    with pytest.raises(LoraFormatError, match=rule):
        running.load("a", given)
    assert running.names == []


def test_ranks_of_a_blend_add_up_to_the_slots_rank_at_most(tmp_path):
    running = Session(attached(tmp_path, "swap", ["q"], pad_rank=4))
    running.load("q", tmp_path / "swap.q.onnx_adapter")
    running.load("p", adapter({KEY: (7, 5)}))
    with pytest.raises(LoraFormatError, match="LF-606  rank 5"):
        running.use({"q": 1.0, "p": 1.0})


WRONG = {
    "swap": [
        lambda s: s.use("z"),
        lambda s: s.use({"q": "much"}),
        lambda s: s.use({"q": None}),
        lambda s: s.use({"q": 1j}),
        lambda s: s.use({1: 1.0}),
        lambda s: s.use("q").run({}),
        lambda s: s.load(None, GIVEN["q"]),
        lambda s: s.use(["q"]),
        lambda s: s.use({"q": float("nan")}),
        lambda s: s.unload("z"),
    ],
    "branch": [lambda s: s.use("q"), lambda s: s.load("q", GIVEN["q"])],
    "stack": [
        lambda s: s.use(7),
        lambda s: s.use([["q"], None, None]),
        lambda s: s.use([7, None, None]),
        lambda s: s.use("q").run({"x": np.float32(3)}),
        lambda s: s.use("q").run({}),
        lambda s: s.load("q", GIVEN["q"]),
    ],
}


@pytest.mark.parametrize(("mode", "n"), [(mode, n) for mode in WRONG for n in range(len(WRONG[mode]))])
def test_what_the_model_cannot_do_is_refused(mode, n, tmp_path):
    running = Session(attached(tmp_path, mode, ["q"], **({"rows": ("x",)} if mode == "stack" else {})))
    if mode == "swap":
        running.load("q", GIVEN["q"])
        with pytest.raises(LoraFormatError, match="LF-705"):
            running.use("q").run({**X, f"lora/{KEY}/A": np.zeros((5, 0), np.float32)})
    with pytest.raises(LoraFormatError, match="LF-705"):
        WRONG[mode][n](running)


@pytest.mark.parametrize("captured", [False, True])
def test_bytes_of_another_order_are_the_same_numbers(captured, truth, tmp_path):
    running = Session(attached(tmp_path, "swap", ["q"], pad_rank=3), captured=captured)
    running.load("q", GIVEN["q"])
    assert relative_error(running.use("q").run({"x": X["x"].astype(">f4")})["y"], truth("q")) <= 3e-6


def test_a_value_of_onnx_runtime_tells_its_rows(truth, tmp_path):
    running = Session(attached(tmp_path, "stack", ["q", "v"], rows=("x",)))
    x = {"x": onnxruntime.OrtValue.ortvalue_from_numpy(X["x"])}
    assert relative_error(running.use("q").run(x)["y"], truth("q")) <= 3e-6
    with pytest.raises(LoraFormatError, match="LF-705  2 rows"):
        running.use(["q", None]).run(x)


@pytest.mark.parametrize("slots", ["optional", "required"])
def test_bindings_of_ones_own_feed_what_is_chosen(slots, truth, tmp_path):
    running = Session(attached(tmp_path, "swap", ["q"], slots=slots), resident=1)
    running.load("q", GIVEN["q"])
    out = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((3, 2, 4), np.float32))
    for choice in ("q", None, {"q": -0.5}, "q"):
        binding = running.inference.io_binding()
        binding.bind_cpu_input("x", X["x"])
        for name, value in running.use(choice).values.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output("y", out)
        running.inference.run_with_iobinding(binding)
        assert relative_error(out.numpy(), truth(choice)) <= 3e-6


def test_a_captured_session_gives_no_values_away(tmp_path):
    running = Session(attached(tmp_path, "swap", ["q"], pad_rank=3), captured=True)
    running.load("q", GIVEN["q"])
    with pytest.raises(LoraFormatError, match="LF-705"):
        _ = running.use("q").values


@pytest.mark.parametrize("resident", [0, -1])
def test_nothing_needs_to_stay_on_the_device(resident, truth, tmp_path):
    running = Session(attached(tmp_path, "swap", ["q"]), resident=resident)
    running.load("q", GIVEN["q"])
    assert relative_error(running.use("q").run(X)["y"], truth("q")) <= 3e-6


def test_a_model_without_adapters_just_runs(truth, tmp_path):
    running = Session(save(model(TEXT), tmp_path / "base.onnx"))
    assert relative_error(running.run(X)["y"], truth(None)) == 0
    assert running.names == []
    with pytest.raises(LoraFormatError, match="LF-701"):
        Session(tmp_path / "no.onnx")


def test_a_record_that_cannot_be_read_is_a_fault(tmp_path):
    made = onnx.load(attached(tmp_path, "swap", ["q"]))
    for prop in made.metadata_props:
        if prop.key == "loraformat.base":
            prop.value = '{"sha256": "", "slots": {"slots": {"k": 3}, "required": 1}}'
    with pytest.raises(LoraFormatError, match="LF-613"):
        Session(save(made, tmp_path / "x.onnx"))


def test_half_precision_is_fed_in_its_own_type(tmp_path):
    base = open_base(save(model(TEXT.replace("float", "float16")), tmp_path / "base.onnx"))
    base.apply(prepare("attach", [("both", GIVEN["both"])], base, Options(tmp_path / "swap.onnx", "swap")))
    running = Session(tmp_path / "swap.onnx")
    running.load("both", tmp_path / "swap.both.onnx_adapter")
    running.load("again", GIVEN["both"])
    x = {"x": X["x"].astype(np.float16)}
    merge(GIVEN["both"], base, tmp_path / "merged.onnx")
    wanted = session(tmp_path / "merged.onnx").run(None, x)[0].astype(np.float64)
    for name in ("both", "again"):
        assert relative_error(running.use(name).run(x)["y"].astype(np.float64), wanted) <= 5e-3


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_a_scale_is_not_rounded_to_the_type_of_the_factors(dtype, tmp_path):
    """But to that of the slots: an adapter of 16 bits acts in a model of 32 as a merge has it."""
    given = adapter({KEY: lora(7, 5, rank=3, alpha=7.0, rule="alpha/sqrt(r)", dtype=dtype)})
    base = open_base(save(model(TEXT), tmp_path / "base.onnx"))
    base.apply(prepare("attach", [("q", given)], base, Options(tmp_path / "swap.onnx", "swap")))
    merge([(given, 0.7)], base, tmp_path / "part.onnx")
    merge(given, base, tmp_path / "merged.onnx")
    wanted = {path: session(tmp_path / f"{path}.onnx").run(None, X)[0] for path in ("base", "merged", "part")}
    running = Session(tmp_path / "swap.onnx")
    running.load("q", given)
    running.load("file", tmp_path / "swap.q.onnx_adapter")
    for choice, path in (("q", "merged"), ("file", "merged"), ({"q": 0.7}, "part")):
        moved = running.use(choice).run(X)["y"] - wanted["base"]
        assert relative_error(moved, wanted[path] - wanted["base"]) <= 1e-6


def test_a_blend_is_the_sum():
    blended = blend([(Fed(GIVEN["both"]), 0.5), (Fed(GIVEN["q"]), -2.0)]).pairs
    wanted = 0.5 * GIVEN["both"][KEY].matrix() - 2.0 * GIVEN["q"][KEY].matrix()
    assert relative_error(blended[KEY].matrix(), wanted) <= 1e-6
    assert blended[KEY].rank == GIVEN["both"][KEY].rank + GIVEN["q"][KEY].rank


def test_the_runtime_needs_no_onnx():
    code = "import loraformat_converters.onnx.runtime, sys; print('onnx' in sys.modules, 'onnxruntime' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr


# No test that cannot fail.


def one_binding_serves_all_choices(patch):
    whole, first = pooled.Pooled.hold, []
    patch.setattr(pooled.Pooled, "hold", lambda self, tensors: first.append(whole(self, tensors)) or first[0])


def what_was_bound_stays_bound(patch):
    whole, first = pooled.Bound.take, []
    patch.setattr(pooled.Bound, "take", lambda self, names: first.append(self) or whole(first[0], names))


def weights_are_ignored(patch):
    patch.setattr(runtime, "blend", lambda adapters: blend([(one, 1.0) for one, _ in adapters]))


@pytest.mark.parametrize("mutant", [one_binding_serves_all_choices, what_was_bound_stays_bound, weights_are_ignored])
def test_a_choice_that_does_not_act_is_red(mutant, monkeypatch, truth, tmp_path):
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        test_what_is_chosen_acts("optional", 6, truth, tmp_path)


def test_sketches_that_are_not_compared_are_red(monkeypatch, tmp_path):
    monkeypatch.setattr(runtime.Slots, "check_base", lambda self, adapter: None)
    with pytest.raises(pytest.fail.Exception):
        test_an_adapter_that_is_bound_to_other_weights_is_refused(tmp_path)
