"""The commands that work: what they print on which stream, what they write, and their exit codes."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from peft_goldens import adapter_of, base_of, raw
from safetensors.numpy import load_file, save_file

import loraformat as lf
from loraformat import registry, testing
from loraformat.cli.main import _VERBS as VERBS

GPT2 = str(adapter_of("gpt2"))
BASE = str(base_of("gpt2"))
LINEAR = str(adapter_of("linear"))


@pytest.fixture
def native(tmp_path):
    lf.save(lf.load(GPT2), tmp_path / "a.safetensors")
    return "a.safetensors"


@pytest.fixture
def onnx_model(tmp_path):
    """One MatMul, whose weight goes by the name of a module."""
    import onnx

    text = """<ir_version: 10, opset_import: ["": 20]>
    one (float[n, 4] x) => (float[n, 3] y) { y = MatMul (x, w) }"""
    model = onnx.parser.parse_model(text)
    model.graph.node[0].input[1] = "m.proj.weight"
    weight = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "m.proj.weight"))
    onnx.save(model, tmp_path / "m.onnx")
    draw = np.random.default_rng(1)
    pair = [draw.standard_normal(shape).astype(np.float32) for shape in ((2, 4), (3, 2))]
    lf.save(lf.Adapter({"m.proj.weight": lf.Update((lf.Lora(*pair, 3.0, "alpha/r"),))}), tmp_path / "o.safetensors")
    return "m.onnx"


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_without_a_command_the_commands_are_listed(run):
    told = run()
    words = list(VERBS)
    assert told.code == 2
    assert [line.split()[0] for line in told.err.partition("Commands:")[2].splitlines() if line.strip()] == words


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_has_help(run, verb):
    told = run(verb, "--help")
    assert told.code == 0
    assert told.out.startswith(f"Usage: loraformat {verb}")


def test_validate_says_what_an_adapter_is_and_that_it_is_valid(run):
    told = run("validate", GPT2)
    assert (told.code, told.err) == (0, "")
    assert told.out == f"valid  {GPT2}  peft (adapter_config.json has peft_type), 6 targets\n"


def test_validate_goes_through_all_paths_and_fails_if_one_is_invalid(run):
    told = run("validate", GPT2, adapter_of("ia3"), "nothing-here", LINEAR)
    assert told.code == 1
    assert [line.split()[0] for line in told.out.splitlines() if "valid" in line.lower()[:7]] == [
        "valid", "INVALID", "INVALID", "valid",
    ]  # fmt: skip
    assert "LF-504  peft_type IA3 multiplies the base weight" in told.out
    assert "LF-701  no such file or folder: nothing-here" in told.out


def test_validate_json_has_a_file_for_each_path_and_five_fields_a_problem(run):
    told = run("validate", GPT2, adapter_of("ia3"), "--json")
    assert told.code == 1
    assert told.json == {
        "schema": 1,
        "files": [
            {"path": GPT2, "valid": True, "layout": "peft", "targets": 6, "problems": []},
            {
                "path": str(adapter_of("ia3")),
                "valid": False,
                "layout": None,
                "targets": None,
                "problems": [
                    {
                        "rule": "LF-504",
                        "severity": "error",
                        "where": "adapter_config.json",
                        "what": "peft_type IA3 multiplies the base weight: there is no ΔW without it",
                        "fix": "read are LORA, ADALORA, LOHA, LOKR, VERA, TRAINABLE_TOKENS",
                    }
                ],
            },
        ],
    }


def test_validate_strict_makes_a_warning_a_fault(run):
    path = adapter_of("patterns_resorted")
    assert run("validate", path).code == 0
    told = run("validate", path, "--strict")
    assert told.code == 1
    assert "LF-507  warning" in told.out


def test_validate_with_a_base_resolves_every_target(run):
    assert run("validate", GPT2, "--base", BASE).code == 0
    told = run("validate", LINEAR, "--base", BASE)
    assert told.code == 1
    assert told.out.count("LF-602") == 2
    assert told.out.count("and 1 more like it") == 2
    assert len(run("validate", LINEAR, "--base", BASE, "--json").json["files"][0]["problems"]) == 4


def test_info_shows_one_line_for_targets_that_differ_in_numbers_only(run):
    told = run("info", GPT2)
    assert told.code == 0
    assert "6 targets" in told.out
    lines = [line for line in told.out.splitlines() if line.startswith("transformer.h.*")]
    assert len(lines) == 3
    assert all("×2" in line and "r 5, 1.6 = 8/5" in line and "unplaced" in line for line in lines)


def test_info_json_states_every_target_and_null_where_it_is_unplaced(run, native):
    told = run("info", native, "--json")
    assert told.code == 0
    assert list(told.json) == ["schema", "path", "layout", "version", "digest", "names", "base_model", "targets"]
    assert (told.json["schema"], told.json["layout"], told.json["version"]) == (1, "native", "1.0")
    assert (told.json["path"], told.json["names"]) == (native, "torch")
    assert told.json["digest"] == lf.digest(lf.load(GPT2))
    assert told.json["targets"].keys() == lf.load(GPT2).targets.keys()
    assert told.json["targets"]["transformer.h.0.attn.c_attn.weight"] == {
        "kind": "lora",
        "rank": 5,
        "alpha": 8,
        "scale_rule": "alpha/r",
        "scale": 1.6,
        "shape": None,
        "axes": None,
        "dtype": "F32",
        "bytes": 4 * 5 * (24 + 72),
        "parts": [{"kind": "lora", "alpha": 8, "scale_rule": "alpha/r", "r": 5}],
    }


def test_info_json_of_every_kind_of_update_has_the_same_fields(run, tmp_path):
    kinds = ["lora", "conv", "embedding", "experts", "dora", "loha", "lokr", "delta", "replace", "rows"]
    lf.save(testing.random_adapter(kinds=kinds), tmp_path / "all.safetensors")
    targets = run("info", "all.safetensors", "--json").json["targets"]
    fields = ["kind", "rank", "alpha", "scale_rule", "scale", "shape", "axes", "dtype", "bytes", "parts"]
    assert len(targets) == len(kinds)
    assert {tuple(target) for target in targets.values()} == {tuple(fields)}
    assert targets["head.weight"]["rank"] is None
    assert targets["blocks.1.conv.weight"]["axes"] == {"out": [0], "in": [1, 2, 3]}


def test_layouts_lists_what_is_installed(run):
    rows = run("layouts").out.splitlines()
    assert [row.split()[0] for row in rows if row[0] != " "] == list(registry.layouts())
    (at,) = (i for i, row in enumerate(rows) if row.startswith("peft "))
    assert "adapter_model.safetensors" in rows[at]
    assert "replace, lora, loha, lokr, delta, magnitude, rows · scale: lora_alpha / r" in rows[at + 1]
    assert "read only · scale: alpha / dim" in rows[next(i for i, row in enumerate(rows) if row.startswith("mega")) + 1]
    told = run("layouts", "--json").json
    assert told["schema"] == 1
    assert list(told["layouts"]["peft"]) == ["describes", "writes", "carries", "scale"]
    assert told["layouts"]["peft"]["carries"] == told["layouts"]["native"]["carries"]


def test_convert_guesses_the_layouts_says_so_on_stderr_and_ends_with_a_proof(run, tmp_path):
    told = run("convert", GPT2, "a.safetensors")
    assert (told.code, told.out) == (0, "")
    assert "peft → native (the name ends with .safetensors)" in told.err
    assert f"6 targets, 0 placed · scale 1.6 · digest {lf.digest(lf.load(GPT2))[:12]}" in told.err
    assert told.err.rstrip().endswith("next: loraformat info a.safetensors")
    assert left(tmp_path) == ["a.safetensors"]


def test_convert_back_to_a_folder_gives_the_same_tensors(run, native, tmp_path):
    assert run("convert", native, "peft").code == 0
    assert raw(tmp_path / "peft" / "adapter_model.safetensors") == raw(adapter_of("gpt2") / "adapter_model.safetensors")


def test_convert_with_a_base_writes_the_placements(run, tmp_path):
    told = run("convert", GPT2, "a.safetensors", "--base", BASE, "--json")
    assert told.json == {
        "schema": 1,
        "out": "a.safetensors",
        "digest": lf.digest(lf.load(GPT2)),
        "residuals": {},
        "dropped": [],
        "targets": 6,
        "placed": 6,
        "warnings": [],
    }
    square = lf.load(tmp_path / "a.safetensors")["transformer.h.0.attn.c_proj.weight"]
    assert square.placement == lf.Placement((24, 24), (1,), (0,))


def test_bind_keeps_the_digest(run, native, tmp_path):
    before = lf.digest(lf.load(tmp_path / native))
    assert run("bind", native, "--base", BASE, "-o", "b.safetensors").code == 0
    bound = lf.load(tmp_path / "b.safetensors")
    assert lf.digest(bound) == before
    assert all(update.placement and update.base_sha256 for update in bound.values())


def test_bind_writes_the_file_itself_only_with_force(run, native, tmp_path):
    assert run("bind", native, "--base", BASE).code == 1
    assert lf.load(tmp_path / native)["transformer.h.0.attn.c_proj.weight"].placement is None
    assert run("bind", native, "--base", BASE, "--force").code == 0
    assert lf.load(tmp_path / native)["transformer.h.0.attn.c_proj.weight"].placement


def test_a_bound_adapter_refuses_a_base_with_other_weights(run, native, tmp_path):
    run("bind", native, "--base", BASE, "-o", "b.safetensors")
    shutil.copytree(BASE, tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    tensors["transformer.h.1.mlp.c_fc.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "other" / "model.safetensors")
    told = run("merge", "b.safetensors", "--into", "other", "-o", "m.safetensors")
    assert told.code == 1
    assert told.err.count("LF-607") == 1
    assert "transformer.h.1.mlp.c_fc.weight" in told.err
    assert "m.safetensors" not in left(tmp_path)
    assert run("merge", "b.safetensors", "--into", "other", "-o", "m.safetensors", "--any-base").code == 0


def test_resolve_json_says_where_every_target_lies_and_by_which_evidence(run):
    told = run("resolve", GPT2, "--in", BASE, "--json")
    assert told.code == 0
    assert list(told.json) == ["schema", "targets", "unresolved", "ambiguous"]
    assert (told.json["schema"], told.json["unresolved"], told.json["ambiguous"]) == (1, [], [])
    key = "transformer.h.0.attn.c_proj.weight"
    assert told.json["targets"][key] == [
        {
            "file": "model.safetensors",
            "node": None,
            "weight": key,
            "slice": None,
            "target_slice": None,
            "permute": None,
            "axes": "in,out",
            "evidence": ["name: equal", "config: gpt2 stores c_proj as Conv1D [in, out]"],
            "confidence": 1.0,
        }
    ]


def test_resolve_fails_if_a_target_is_not_found_and_prints_the_nearest_names(run, tmp_path):
    renamed = {k.replace("c_fc", "fc_in"): u for k, u in lf.load(GPT2).items()}
    lf.save(lf.Adapter(renamed), tmp_path / "r.safetensors")
    told = run("resolve", "r.safetensors", "--in", BASE)
    assert told.code == 1
    assert told.out.count("LF-602") == 1
    assert "and 1 more like it: transformer.h.1.mlp.fc_in.weight" in told.out
    assert "nearest: transformer.h.0.mlp.c_fc.weight" in told.out
    assert "--names map.json" in told.out
    assert told.err == "4/6 targets by name\n"
    problems = run("resolve", "r.safetensors", "--in", BASE, "--json").json["unresolved"]
    assert [p["rule"] for p in problems] == ["LF-602", "LF-602"]


def test_a_names_map_finds_what_goes_by_another_name(run, tmp_path):
    renamed = {k.replace("transformer.", "model."): u for k, u in lf.load(GPT2).items()}
    lf.save(lf.Adapter(renamed), tmp_path / "r.safetensors")
    (tmp_path / "map.json").write_text('{"model.*": "transformer.*"}')
    told = run("resolve", "r.safetensors", "--in", BASE, "--names", "map.json", "--json")
    assert told.code == 0
    assert told.json["targets"]["model.h.0.mlp.c_fc.weight"][0]["weight"] == "transformer.h.0.mlp.c_fc.weight"


def test_merge_then_verify_accepts(run, tmp_path):
    told = run("merge", GPT2, "--into", BASE, "-o", "m.safetensors")
    assert (told.code, told.out) == (0, "")
    assert "6/6 targets by name" in told.err
    assert f"loraformat verify --base {BASE} --adapter {GPT2} --merged m.safetensors" in told.err
    told = run("verify", "--base", BASE, "--adapter", GPT2, "--merged", "m.safetensors", "--json")
    assert told.code == 0
    assert told.json["valid"] is True
    assert told.json["touched"].keys() == lf.load(GPT2).targets.keys()
    assert max(told.json["touched"].values()) < 1e-6


def test_verify_fails_where_nothing_was_merged(run):
    told = run(
        "verify", "--base", BASE, "--adapter", GPT2, "--merged", f"{BASE}/model.safetensors", "--axes", "c_proj=in,out"
    )
    assert told.code == 1
    assert told.out.count("LF-611  the adapter was not applied") == 3
    assert told.out.count("transformer.h.") == 6


def test_a_plan_tells_what_would_be_written_and_writes_nothing(run, tmp_path):
    told = run("merge", GPT2, "--into", BASE, "-o", "m.safetensors", "--plan")
    assert told.code == 0
    assert told.out.count("merge transformer.h.") == 6
    planned = run("merge", GPT2, "--into", BASE, "-o", "m.safetensors", "--plan", "--json").json
    assert left(tmp_path) == []
    run("merge", GPT2, "--into", BASE, "-o", "m.safetensors")
    assert planned["writes"] == (tmp_path / "m.safetensors").stat().st_size


def test_attach_and_merge_an_onnx_model(run, onnx_model, tmp_path):
    assert run("attach", "o.safetensors", "--to", onnx_model, "-o", "attached.onnx").code == 0
    assert run("merge", "o.safetensors", "--into", onnx_model, "-o", "merged.onnx").code == 0
    told = run("verify", "--base", onnx_model, "--adapter", "o.safetensors", "--merged", "merged.onnx")
    assert told.code == 0
    assert left(tmp_path) == ["attached.onnx", "m.onnx", "merged.onnx", "o.safetensors"]


def test_a_name_before_the_adapter_is_recorded_in_the_attached_model(run, onnx_model, tmp_path):
    import onnx

    assert run("attach", "style=o.safetensors", "--to", onnx_model, "-o", "attached.onnx").code == 0
    props = {p.key: p.value for p in onnx.load(tmp_path / "attached.onnx").metadata_props}
    assert [entry["name"] for entry in json.loads(props["loraformat.attached"])] == ["style"]


def test_the_installed_script_is_the_same_program():
    done = subprocess.run(
        [shutil.which("loraformat", path=sys.prefix + "/bin"), "validate", GPT2], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stdout.startswith("valid  ")
