"""Whatever a file holds: a clear refusal or a correct reading; never another exception, never half an output."""

import json
import os
import shutil
import signal
import time
import tracemalloc
from contextlib import contextmanager

import numpy as np
import pytest
from mutations import cut, damaged, edited, flipped, spliced, with_header, with_value
from peft_goldens import SUPPORTED, adapter_of, base_of
from safetensors.numpy import save_file

import loraformat as lf
from loraformat import testing
from loraformat.atomic import write_folder
from loraformat.values import value_problems
from loraformat_converters.peft import config as configs

KINDS = ("lora", "conv", "embedding", "experts", "dora", "loha", "lokr", "delta", "replace", "rows")


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """The bytes of a native file with every kind of update."""
    path = tmp_path_factory.mktemp("native") / "a.safetensors"
    lf.save(testing.random_adapter(seed=5, kinds=KINDS), path)
    return path.read_bytes()


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def survives(source, folder):
    """Whether ``source`` reads; if so it can be written again, and what is written means the same."""
    before = {p.name for p in folder.iterdir()}
    try:
        adapter, *_ = lf.convert(source, folder / "out.safetensors")
    except lf.LoraFormatError as error:
        assert error.problems
        assert {p.name for p in folder.iterdir()} == before
        return False
    list(value_problems(adapter))
    again = lf.load(folder / "out.safetensors")
    assert lf.digest(again) == lf.digest(adapter)
    with np.errstate(all="ignore"):  # a bit of an exponent makes infinities, which validate finds
        for update in again.values():
            if update.additive:
                update.matrix()
    (folder / "out.safetensors").unlink()
    return True


@contextmanager
def deadline(seconds):
    """Fail instead of hanging: ``re`` looks for signals while it backtracks."""

    def late(number, frame):
        raise TimeoutError(f"not done after {seconds} s")

    old = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


@pytest.mark.parametrize("start", range(0, 1200, 100))
def test_a_damaged_native_file_is_refused_or_read_correctly(start, native, tmp_path):
    for seed in range(start, start + 100):
        (tmp_path / "in.safetensors").write_bytes(damaged(native, np.random.default_rng(seed)))
        try:
            survives(tmp_path / "in.safetensors", tmp_path)
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error


@pytest.mark.parametrize("start", range(0, 800, 100))
def test_a_damaged_peft_folder_is_refused_or_read_correctly(start, tmp_path):
    golden = adapter_of(["patterns", "conv", "embedding", "bf16"][start // 100 % 4])
    config, tensors = ((golden / name).read_bytes() for name in (configs.FILE, "adapter_model.safetensors"))
    (tmp_path / "in").mkdir()
    for seed in range(start, start + 100):
        draw = np.random.default_rng(10_000 + seed)
        text, data = config, tensors
        match draw.integers(4):
            case 0:
                text = flipped(config, draw)
            case 1 | 2:
                text = edited(config.decode(), draw).encode()
            case 3:
                data = damaged(tensors, draw)
        (tmp_path / "in" / configs.FILE).write_bytes(text)
        (tmp_path / "in" / "adapter_model.safetensors").write_bytes(data)
        try:
            survives(tmp_path / "in", tmp_path)
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error


def torch_damaged(data, draw):
    """A few bits of the pickle, of the directory at the end or anywhere; a cut; a splice."""
    if draw.random() < 0.3:
        return (cut if draw.random() < 0.5 else spliced)(data, draw)
    out, near = bytearray(data), min(len(data), 2000)
    for _ in range(draw.integers(1, 9)):
        place = (draw.integers(near), len(out) - 1 - draw.integers(near), draw.integers(len(out)))[draw.integers(3)]
        out[place] ^= 1 << draw.integers(8)
    return bytes(out)


@pytest.mark.parametrize("case", SUPPORTED)
def test_a_damaged_adapter_of_any_kind_and_form_never_ends_a_validation(case, tmp_path):
    """In a file of torch.save, as PEFT writes it on request, or in safetensors."""
    golden, base = adapter_of(case), lf.open_base(base_of(case))
    (source,) = golden.glob("adapter_model.*")
    damage, seeds = (torch_damaged, 300) if source.suffix == ".bin" else (damaged, 12)
    invalid = 0
    for seed in range(seeds):
        draw = np.random.default_rng(20_000 + seed)
        (tmp_path / configs.FILE).write_bytes((golden / configs.FILE).read_bytes())
        (tmp_path / source.name).write_bytes(damage(source.read_bytes(), draw))
        result = lf.validate(tmp_path, base=base if seed % 2 else None)
        assert "LF-713" not in {p.rule for p in result.problems}, f"seed {seed}: {result.problems}"
        invalid += not result.valid
    assert invalid


def test_the_damage_is_neither_always_fatal_nor_never(native, tmp_path):
    path = tmp_path / "in.safetensors"
    read = 0
    for seed in range(300):
        path.write_bytes(damaged(native, np.random.default_rng(seed)))
        read += survives(path, tmp_path)
    assert 5 < read < 150


# Killed.


def killed_while(work, seconds):
    """Run ``work`` over and over in a process of its own and kill it after a while."""
    child = os.fork()
    if not child:
        try:
            while True:
                work()
        finally:
            os._exit(1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_file_that_is_replaced_is_whole_whenever_the_writer_is_killed(tmp_path):
    one, two = testing.random_adapter(seed=1, kinds=KINDS), testing.random_adapter(seed=2, kinds=KINDS)
    out = tmp_path / "out.safetensors"
    lf.save(one, out)

    def work():
        lf.save(two, out, force=True)
        lf.save(one, out, force=True)

    draw = np.random.default_rng(0)
    for _ in range(30):
        killed_while(work, draw.uniform(0.001, 0.03))
        assert lf.digest(lf.load(out)) in {lf.digest(one), lf.digest(two)}
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["out.safetensors"]


def test_a_folder_that_is_replaced_is_whole_after_the_next_run_whenever_the_writer_is_killed(tmp_path):
    def write(word):
        names = (configs.FILE, "adapter_model.safetensors")
        write_folder(tmp_path / "out", {n: lambda file: file.write(word.encode()) for n in names}, force=True)

    write("one")
    draw = np.random.default_rng(0)
    for _ in range(30):
        killed_while(lambda: (write("two"), write("one")), draw.uniform(0.001, 0.02))
        whole = [p for p in (tmp_path / "out", tmp_path / ".out.old") if p.exists()]
        assert {p.read_text() for p in whole[0].iterdir()} in ({"one"}, {"two"})
        assert len(list(whole[0].iterdir())) == 2
        write("one")
        assert {p.read_text() for p in (tmp_path / "out").iterdir()} == {"one"}
        assert not (tmp_path / ".out.old").exists()


# Too much of something.


def peft_with(folder, module, **changes):
    config = json.loads((adapter_of("linear") / configs.FILE).read_text())
    folder.mkdir()
    (folder / configs.FILE).write_text(json.dumps(config | changes))
    pair = {
        f"{module}.lora_A.weight": np.ones((6, 5), np.float32),
        f"{module}.lora_B.weight": np.ones((4, 6), np.float32),
    }
    save_file(pair, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(a|aa)+$",
        "(a|a?)+$",
        "(.*a){20}$",
        "(.*)*x",
        "((a*b|a)*c|a)*$",
        "(?=(a+)+$)b",
        "a{1,9999999}x",
        r"(a|aa)+\2c",
    ],
)
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_regular_expression_that_would_run_for_hours_is_matched_or_refused_at_once(field, pattern, tmp_path):
    folder = peft_with(tmp_path / "in", "a" * 500 + "!", **{field: {pattern: 6}})
    with deadline(5):
        survives(folder, tmp_path)


def test_a_choice_of_modules_that_would_run_for_hours_does_not_stop_the_way_back(tmp_path):
    folder = peft_with(tmp_path / "in", "a" * 500 + "!", target_modules="(a+)+")
    with deadline(5):
        lf.convert(folder, tmp_path / "a.safetensors")
        lf.convert(tmp_path / "a.safetensors", tmp_path / "peft")
    assert len(lf.load(tmp_path / "peft")) == 1


def test_json_nested_a_hundred_thousand_deep_is_refused(native, tmp_path):
    deep = "[" * 100_000 + "]" * 100_000
    path = tmp_path / "in.safetensors"
    for data in (with_value(native, lambda text: deep), with_header(native, lambda text: deep)):
        path.write_bytes(data)
        assert not survives(path, tmp_path)
    folder = peft_with(tmp_path / "in", "m")
    (folder / configs.FILE).write_text(f'{{"peft_type": "LORA", "lora_alpha": {deep}}}')
    assert not survives(folder, tmp_path)


@pytest.mark.parametrize("number", ["1" * 5000, "-" + "1" * 400, "1e999", "9007199254740993", "1" + "0" * 308])
def test_numbers_beyond_every_type_are_refused(number, native, tmp_path):
    path = tmp_path / "in.safetensors"
    path.write_bytes(with_value(native, lambda text: text.replace('"alpha":4.5', f'"alpha":{number}')))
    assert not survives(path, tmp_path)
    folder = peft_with(tmp_path / "in", "m")
    (folder / configs.FILE).write_text(f'{{"peft_type": "LORA", "r": 6, "lora_alpha": {number}}}')
    assert not survives(folder, tmp_path)


@pytest.mark.parametrize("shape", [[2**62], [2**31, 2**31], [2**62, 2**62, 0], [0], [1] * 65, [2**63], [1] * 100_000])
def test_a_shape_that_no_memory_holds_is_refused_without_taking_any(shape, tmp_path):
    size = 0 if 0 in shape else 4
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}
    part = {"kind": "replace"}
    value = json.dumps({"names": "torch", "targets": {"w": {"parts": [part]}}, "version": "1.0"})
    header = json.dumps({"__metadata__": {"loraformat": value}, "w.replace": entry}).encode()
    path = tmp_path / "in.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    tracemalloc.start()
    assert not survives(path, tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


@pytest.mark.parametrize("shape", [[2**62], [2**62, 2**62], [2**31] * 9])
def test_a_placement_that_no_memory_holds_is_refused_without_taking_any(shape, native, tmp_path):
    place = {"shape": shape, "axes": {"out": [0], "in": list(range(1, len(shape)))}}

    def change(text):
        value = json.loads(text)
        value["targets"]["blocks.0.attn.weight"] |= place
        return json.dumps(value)

    path = tmp_path / "in.safetensors"
    path.write_bytes(with_value(native, change))
    tracemalloc.start()
    assert not survives(path, tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_a_file_of_ten_thousand_tensors_is_read(tmp_path):
    pair = np.ones((1, 1), np.float32)
    update = lf.Update((lf.Lora(pair, pair, 1, "alpha/r"),))
    lf.save(lf.Adapter({f"layers.{i}.weight": update for i in range(5000)}), tmp_path / "a.safetensors")
    with deadline(30):
        assert len(lf.load(tmp_path / "a.safetensors")) == 5000


def test_a_header_of_a_hundred_thousand_strange_keys_is_refused_in_few_words(tmp_path):
    header = json.dumps({f"k{i}": None for i in range(100_000)}).encode()
    (tmp_path / "in.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with deadline(30), pytest.raises(lf.LoraFormatError) as caught:
        lf.load(tmp_path / "in.safetensors")
    assert {p.rule for p in caught.value.problems} == {"LF-105"}


def test_a_folder_of_links_and_folders_where_files_belong_is_refused(tmp_path):
    shutil.copytree(adapter_of("linear"), tmp_path / "in")
    (tmp_path / "in" / "adapter_model.safetensors").unlink()
    (tmp_path / "in" / "adapter_model.safetensors").symlink_to("nowhere")
    assert not survives(tmp_path / "in", tmp_path)
    (tmp_path / "in" / "adapter_model.safetensors").unlink()
    (tmp_path / "in" / "adapter_model.safetensors").mkdir()
    assert not survives(tmp_path / "in", tmp_path)
