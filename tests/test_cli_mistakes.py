"""What a newcomer types: every mistake ends in words, with the right code, and leaves nothing behind."""

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from peft_goldens import adapter_of, base_of
from safetensors.numpy import load_file, save_file

import loraformat as lf
from loraformat import folders, registry

GPT2 = str(adapter_of("gpt2"))
BASE = str(base_of("gpt2"))
LINEAR = str(adapter_of("linear"))
LINEAR_BASE = str(base_of("linear"))
TRAINED = str(adapter_of("modules_to_save"))


def left(folder):
    return sorted(path.name for path in folder.iterdir())


WRONG = {
    "unknown command": (["konvert"], 2, "Did you mean 'convert'?"),
    "unknown option": (["info", GPT2, "--jason"], 2, "No such option"),
    "missing argument": (["info"], 2, "Missing argument"),
    "missing option": (["attach", GPT2, "-o", "m.onnx"], 2, "Missing option '--to'. An ONNX model"),
    "a weight with a comma": (["merge", f"{GPT2}:0,5", "--into", BASE, "-o", "m.safetensors"], 2, f"a number, such as {GPT2}:0.5"),
    "a named weight with a comma": (["merge", f"a={GPT2}:0,5", "--into", BASE, "-o", "m.safetensors"], 2, "'0,5' is no weight"),
    "a pattern for nobody": (["merge", GPT2, "--into", BASE, "-o", "m.safetensors", "--only", "*c_fx*"], 2, "modules: c_fc"),
    "missing file": (["info", "nothing-here"], 1, "LF-701  no such file or folder: nothing-here"),
    "nearly a file": (["info", f"{GPT2[:-1]}"], 1, f"did you mean {GPT2}?"),
    "code for an adapter": (["info", GPT2, "--how", "python"], 2, "attach an adapter to a model first"),
    "a name on a hub": (["info", "meta-llama/Llama"], 1, "from a hub, download it first"),
    "a base on a hub": (["merge", GPT2, "--into", "https://hub.example/x", "-o", "m.safetensors"], 1, "from a hub, download it first"),
    "the configuration for the adapter": (["info", f"{GPT2}/adapter_config.json"], 1, f"name the folder that it lies in: {GPT2}"),
    "missing base": (["merge", GPT2, "--into", "nowhere", "-o", "m.safetensors"], 1, "no such file or folder: nowhere"),
    "a folder without an adapter": (["info", "."], 1, "LF-501"),
    "a folder that is no base": (["merge", GPT2, "--into", ".", "-o", "m.safetensors"], 1, "LF-601"),
    "a checkpoint as adapter": (["convert", LINEAR_BASE, "o.safetensors"], 1, "LF-501  no known layout claims"),
    "adapter and base swapped": (["merge", LINEAR_BASE, "--into", LINEAR, "-o", "m.safetensors"], 1, "are adapter and base swapped?"),
    "swapped for resolve": (["resolve", LINEAR_BASE, "--in", LINEAR], 1, "are adapter and base swapped?"),
    "another model's base": (["merge", LINEAR, "--into", BASE, "-o", "m.safetensors"], 1, "LF-602  none of the adapter's 4 targets is found"),
    "unknown layout to": (["convert", GPT2, "out.safetensors", "--to", "peff"], 2, 'Did you mean "peft"?'),
    "unknown layout from": (["convert", GPT2, "out.safetensors", "--from", "natve"], 2, 'Did you mean "native"?'),
    "a layout that cannot be guessed": (["convert", GPT2, "out.bin"], 2, "which layout is out.bin?"),
    "axes without a base": (["convert", GPT2, "out.safetensors", "--axes", "c_proj=in,out"], 2, "give --base"),
    "axes without a pattern": (["resolve", GPT2, "--in", BASE, "--axes", "in,out"], 2, "is not PATTERN=SPEC"),
    "axes with a typing error": (["resolve", GPT2, "--in", BASE, "--axes", "c_proj=inn,out"], 2, "is not PATTERN=SPEC"),
    "axes for nobody": (["merge", GPT2, "--into", BASE, "-o", "m.safetensors", "--axes", "qq=in,out"], 2, "no target of the adapter is meant"),
    "too many axes": (["merge", GPT2, "--into", BASE, "-o", "m.safetensors", "--axes", "c_fc=in,in,out"], 2, "names 3 axes, the tensor has 2"),
    "axes against the configuration": (["merge", GPT2, "--into", BASE, "-o", "m.safetensors", "--axes", "c_proj=out,in"], 1, "LF-605"),
    "a names map that is not there": (["resolve", GPT2, "--in", BASE, "--names", "map.json"], 2, "cannot read map.json"),
    "an unknown scale rule": (["convert", GPT2, "out.safetensors", "--scale-rule", "alpha"], 2, "is not one of"),
    "an alpha against the file": (["convert", GPT2, "out.safetensors", "--alpha", "9"], 1, "LF-507"),
    "a folder that does not exist": (["convert", GPT2, "no/out.safetensors"], 1, "the folder no does not exist"),
    "a folder where nobody can write": (["convert", GPT2, "/proc/out.safetensors"], 1, "LF-703  cannot write /proc/out.safetensors"),
    "a name too long": (["info", "x" * 300], 1, "File name too long"),
    "attach to a checkpoint": (["attach", GPT2, "--to", BASE, "-o", "m.safetensors"], 1, "attach needs an ONNX model"),
    "detach of a checkpoint": (["detach", BASE, "-o", "m.safetensors"], 1, "a merge is not taken back"),
    "no adapter": (["combine", "-o", "c.safetensors"], 2, "no adapter is given"),
    "one end of an arc": (["combine", GPT2, "-m", "slerp", "-o", "c.safetensors"], 2, "an arc has two ends, not 1"),
    "an arc backwards": (["combine", f"{GPT2}:-1", GPT2, "-m", "slerp", "-o", "c.safetensors"], 2, "are not negative"),
    "a width for kaiming": (["init", BASE, "-t", "c_fc", "-r", "4", "-a", "8", "--init", "kaiming", "--sigma", "1", "-o", "i.safetensors"], 2, "kaiming has no sigma"),
    "half of what is replaced": (["merge", f"{TRAINED}:0.5", "--into", str(base_of("modules_to_save")), "-o", "m.safetensors"], 1, "LF-612  a replace update sets absolute values"),
    "a weight that is no number": (["merge", f"{GPT2}:1e999", "--into", BASE, "-o", "m.safetensors"], 2, "weights must be finite"),
    "functions of a checkpoint": (["merge", GPT2, "--into", BASE, "-o", "m.safetensors", "--inline"], 1, "leave --inline out"),
    "one checkpoint to extract from": (["extract", BASE, "-o", "x.safetensors"], 1, "loraformat extract BASE TUNED"),
    "a page that is no PDF": (["report", GPT2, "-o", "r.pdf"], 2, "call it NAME.html"),
    "rank zero": (["init", BASE, "-t", "c_fc", "-r", "0", "-a", "8", "-o", "i.safetensors"], 2, "rank 0 must be at least 1"),
    "a rank that is no number": (["init", BASE, "-t", "c_fc", "-r", "x", "-a", "8", "-o", "i.safetensors"], 2, "is not a valid integer"),
    "an alpha that is infinite": (["init", BASE, "-t", "c_fc", "-r", "4", "-a", "inf", "-o", "i.safetensors"], 2, "alpha inf finite"),
    "a target that is no module": (["init", BASE, "-t", "q_proj", "-r", "4", "-a", "8", "-o", "i.safetensors"], 1, "LF-602"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", WRONG)
def test_a_newcomers_mistake_is_told_in_words_and_leaves_nothing(run, mistake, tmp_path):
    words, code, said = WRONG[mistake]
    told = run(*words)
    assert told.code == code, told.err
    assert said in told.err
    assert told.out == ""
    assert "Traceback" not in told.err
    assert left(tmp_path) == []


def test_only_what_can_be_written_is_offered(run):
    told = run("convert", GPT2, "out.bin").err.partition("one of ")[2].split(", ")
    written = {name for name, item in registry.layouts().items() if item.writes}
    assert {name.strip() for name in told} == written < set(registry.layouts())


MISTAKEN = {
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "git lfs pull"),
    "a web page": (b"<!DOCTYPE html><html><body>404</body></html>", "it is a web page"),
    "JSON": (b'{"error": "not found", "code": 404}', "it is JSON"),
    "GGUF": (b"GGUF\x03\x00\x00\x00\x02\x00\x00\x00", "it is a GGUF file"),
    "noise": (bytes(range(90, 130)), "it is not a safetensors file"),
}


@pytest.mark.parametrize("kind", MISTAKEN)
def test_what_was_saved_under_the_name_of_an_adapter_is_recognised(run, kind, tmp_path):
    data, said = MISTAKEN[kind]
    (tmp_path / "a.safetensors").write_bytes(data)
    told = run("info", "a.safetensors")
    assert (told.code, told.out) == (1, "")
    assert said in told.err


def test_a_link_whose_file_is_gone_says_where_it_leads(run, tmp_path):
    (tmp_path / "a.safetensors").symlink_to("../blobs/0a1b")
    told = run("info", "a.safetensors")
    assert told.code == 1
    assert "a.safetensors is a link to ../blobs/0a1b, which does not exist" in told.err


def test_a_missing_extra_names_what_to_install(run, monkeypatch, tmp_path):
    for name in [n for n in sys.modules if n.startswith("loraformat_converters.onnx.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx", None)
    (tmp_path / "m.onnx").write_bytes(b"x")
    for words in (["info", "m.onnx"], ["attach", GPT2, "--to", "m.onnx", "-o", "o.onnx"]):
        told = run(*words)
        assert (told.code, told.out) == (1, "")
        assert told.err.startswith("LF-704  reading m.onnx needs the onnx package")
        assert "pip install 'loraformat[onnx]'" in told.err


def test_a_model_for_an_adapter_is_told_to_be_a_base(run, tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"x")
    told = run("validate", "m.onnx")
    assert (told.code, told.err) == (1, "")
    assert "it looks like a base, not an adapter: ONNX model" in told.out


def test_one_fault_of_many_targets_is_told_once(run, tmp_path):
    shutil.copy(adapter_of("gpt2") / "adapter_model.safetensors", tmp_path / "a.safetensors")
    told = run("info", "a.safetensors")
    assert told.code == 1
    assert told.err.count("LF-509") == 1
    assert "transformer.h.0.attn.c_attn, transformer.h.0.attn.c_proj and 4 more" in told.err
    assert len(run("info", "a.safetensors", "--json").json["problems"]) == 6


def test_a_fault_before_the_first_line_is_a_line_of_json_too(run):
    told = run("validate", GPT2, "--base", "nowhere", "--jsonl")
    assert (told.code, told.err) == (1, "")
    assert [p["rule"] for p in told.json["problems"]] == ["LF-701"]


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', "{", '{"a": "b", "a": "c"}'])
def test_a_names_map_that_is_none_is_a_mistake_of_usage(run, text, tmp_path):
    (tmp_path / "map.json").write_text(text)
    told = run("resolve", GPT2, "--in", BASE, "--names", "map.json")
    assert (told.code, told.out) == (2, "")
    assert "map.json" in told.err


def test_a_names_map_to_nowhere_names_the_target(run, tmp_path):
    (tmp_path / "map.json").write_text('{"transformer.h.0.mlp.c_fc.weight": "nowhere"}')
    told = run("merge", GPT2, "--into", BASE, "-o", "m.safetensors", "--names", "map.json")
    assert told.code == 1
    assert "LF-602  the base has no tensor nowhere" in told.err
    assert left(tmp_path) == ["map.json"]


def test_two_targets_for_one_weight_are_refused(run, tmp_path):
    (tmp_path / "map.json").write_text('{"transformer.h.0.mlp.c_fc.weight": "transformer.h.1.mlp.c_fc.weight"}')
    told = run("merge", GPT2, "--into", BASE, "-o", "m.safetensors", "--names", "map.json")
    assert told.code == 1
    assert "LF-603" in told.err


@pytest.mark.parametrize("words", [["convert", GPT2, "out"], ["merge", GPT2, "--into", BASE, "-o", "out"]])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_output_that_exists_stays_as_it_is(run, words, kind, tmp_path):
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
        out = out / "mine.txt"
    out.write_text("mine")
    told = run(*words)
    assert (told.code, told.out) == (1, "")
    assert "LF-702  out exists" in told.err
    assert "--force" in told.err
    assert out.read_text() == "mine"
    assert left(tmp_path) == ["out"]


def test_force_replaces_a_file_but_never_a_folder_of_other_things(run, tmp_path):
    (tmp_path / "out.safetensors").write_text("old")
    assert run("convert", GPT2, "out.safetensors", "--force").code == 0
    assert len(lf.load(tmp_path / "out.safetensors")) == 6
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "thesis.txt").write_text("mine")
    told = run("convert", GPT2, "project", "--force")
    assert told.code == 1
    assert (tmp_path / "project" / "thesis.txt").read_text() == "mine"


def test_a_folder_as_the_output_of_a_merged_file_is_refused_with_force_too(run, tmp_path):
    (tmp_path / "out").mkdir()
    told = run("merge", str(adapter_of("linear")), "--into", LINEAR_BASE, "-o", "out", "--force")
    assert told.code == 1
    assert "the output is a file" in told.err
    assert left(tmp_path) == ["out"]


def test_the_base_itself_is_never_the_output(run, tmp_path):
    shutil.copytree(BASE, tmp_path / "base")
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    told = run("merge", GPT2, "--into", "base", "-o", "base/model.safetensors", "--force")
    assert told.code == 1
    assert "base/model.safetensors is a file of the base base" in told.err
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_in_an_adapter_is_found_and_never_merged(run, value, tmp_path):
    shutil.copytree(GPT2, tmp_path / "sick")
    tensors = load_file(tmp_path / "sick" / "adapter_model.safetensors")
    name = "base_model.model.transformer.h.1.mlp.c_fc.lora_B.weight"
    tensors[name][3, 2] = value
    save_file(tensors, tmp_path / "sick" / "adapter_model.safetensors")
    told = run("validate", "sick")
    assert told.code == 1
    assert "LF-312" in told.out
    assert "transformer.h.1.mlp.c_fc.weight.lora_B" in told.out
    told = run("merge", "sick", "--into", BASE, "-o", "m.safetensors")
    assert told.code == 1
    assert told.err.count("LF-312") == 1
    assert left(tmp_path) == ["sick"]


def test_an_adapter_that_changes_nothing_is_told_and_merged(run, tmp_path):
    assert run("init", BASE, "-t", "c_fc", "-r", "4", "-a", "8", "-o", "i.safetensors").code == 0
    told = run("merge", "i.safetensors", "--into", BASE, "-o", "m.safetensors")
    assert told.code == 0
    assert "2 of 2 targets of i.safetensors have a part that is all zero: it changes nothing" in told.err
    assert load_file(tmp_path / "m.safetensors").keys() == load_file(f"{BASE}/model.safetensors").keys()


def test_an_onnx_model_as_adapter_is_refused(run, tmp_path):
    (tmp_path / "m.onnx").write_bytes(bytes.fromhex("080a120774726163655f313a"))
    told = run("info", "m.onnx")
    assert (told.code, told.out) == (1, "")
    assert "LF-" in told.err
    assert "Traceback" not in told.err


def test_an_adapter_as_base_is_refused(run, tmp_path):
    lf.save(lf.load(GPT2), tmp_path / "a.safetensors")
    told = run("merge", GPT2, "--into", "a.safetensors", "-o", "m.safetensors")
    assert told.code == 1
    assert "is a loraformat adapter, not a base" in told.err


def test_a_truncated_file_says_so(run, tmp_path):
    lf.save(lf.load(GPT2), tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[:-10])
    told = run("info", "cut.safetensors")
    assert told.code == 1
    assert "LF-107" in told.err
    assert "truncated" in told.err


def test_with_json_a_fault_is_json_on_stdout(run):
    told = run("info", "nothing-here", "--json")
    assert (told.code, told.err) == (1, "")
    assert told.json == {
        "schema": 1,
        "problems": [
            {
                "rule": "LF-701",
                "severity": "error",
                "where": "",
                "what": "no such file or folder: nothing-here",
                "fix": "",
            }
        ],
    }


@pytest.mark.parametrize("words", [["validate", "a.safetensors"], ["info", "a.safetensors"]])
def test_control_characters_in_a_strangers_names_do_not_reach_the_terminal(run, words, tmp_path):
    save_file({"m\x1b[2J.lora_A.weight": np.ones((2, 3), np.float32), "\x07": np.ones(1)}, tmp_path / "a.safetensors")
    told = run(*words)
    assert told.code == 1
    assert r"m\x1b[2J" in told.out + told.err
    assert "\x1b" not in told.out + told.err
    assert "\x07" not in told.out + told.err


def test_names_that_a_terminal_cannot_show_are_shown_escaped(tmp_path):
    lf.save(lf.Adapter({"Ω.weight": lf.load(LINEAR)["blocks.0.mlp.fc.weight"]}), tmp_path / "a.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", "from loraformat.cli.main import main; main()", "info", tmp_path / "a.safetensors"],
        env={"PYTHONIOENCODING": "latin-1"}, capture_output=True, encoding="latin-1",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert r"\u03a9.weight" in done.stdout


@pytest.mark.parametrize("out", ["out.safetensors", "out"])
def test_a_full_disk_is_told_and_leaves_nothing(out, tmp_path):
    def small():
        resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900))

    done = subprocess.run(
        [sys.executable, "-c", "from loraformat.cli.main import main; main()", "convert", GPT2, out],
        cwd=tmp_path, preexec_fn=small, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"LF-703  cannot write {out}: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert left(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("words", [["info", GPT2], ["info", GPT2, "--json"], ["validate", GPT2, "--jsonl"]])
def test_a_stdout_that_takes_nothing_is_told_on_stderr(words):
    code = "from loraformat.cli.main import main; main()"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code, *words], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert "LF-701  cannot use a file: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", ["info", "validate", "report -o out.html"])
def test_an_empty_path_is_not_the_folder_that_one_stands_in(run, words, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"")
    done = run(*words.split(), "")
    assert done.code == 1
    assert "LF-701" in done.out + done.err
    assert "the path is empty" in done.out + done.err


def test_a_link_to_itself_in_a_folder_is_told_of(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(lf.LoraFormatError) as caught:
        folders.files_in(tmp_path)
    assert [(p.rule, p.where) for p in caught.value.problems] == [("LF-610", "loop")]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_model_whose_name_is_not_utf8_cannot_be_proved(tmp_path):
    from loraformat_converters.onnx.proving.prove import compare

    model = tmp_path / "m\udcfe.onnx"
    with pytest.raises(lf.LoraFormatError) as caught:
        compare(model, model, model, {}, 1e-5)
    assert caught.value.problems[0].rule == "LF-705"
