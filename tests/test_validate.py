"""The gate: what is found, what is refused, and that nothing which lies in a folder stops the run."""

import gc
import io
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from peft_goldens import adapter_of, base_of

import loraformat as lf
from loraformat import file, registry, testing

GPT2 = adapter_of("gpt2")
GOLDEN = Path(__file__).parent / "golden"
MAIN = "from loraformat.cli.main import main; main()"


def native(path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    lf.save(testing.random_adapter(**options), path)
    return path


def rules(result):
    return [problem.rule for problem in result.problems]


def lines(told):
    return [json.loads(line) for line in told.out.splitlines()]


# What a folder holds.


def test_every_adapter_under_a_folder_is_one_result_in_the_order_of_names(run, tmp_path):
    native(tmp_path / "in/b.safetensors")
    native(tmp_path / "in/a/deep/x.safetensors")
    shutil.copytree(GPT2, tmp_path / "in/peft")
    shutil.copytree(GPT2, tmp_path / "in/peft/second")
    (tmp_path / "in/notes.txt").write_text("no adapter")
    told = run("validate", "in", "--jsonl")
    assert told.code == 0
    assert [(r["path"], r["layout"], r["targets"]) for r in lines(told)] == [
        ("in/b.safetensors", "native", 1),
        ("in/a/deep/x.safetensors", "native", 1),
        ("in/peft", "peft", 6),
        ("in/peft/second", "peft", 6),
    ]


@pytest.mark.parametrize("content", [[], ["notes.txt"]])
def test_a_folder_without_an_adapter_is_invalid(run, content, tmp_path):
    (tmp_path / "in/inner").mkdir(parents=True)
    for name in content:
        (tmp_path / "in" / name).write_text("x")
    told = run("validate", "in", "--jsonl")
    assert told.code == 1
    assert [(r["path"], r["problems"][0]["rule"]) for r in lines(told)] == [("in", "LF-501")]


def test_a_tensor_file_that_no_layout_claims_does_not_pass_in_silence(run, tmp_path):
    native(tmp_path / "in/a.safetensors")
    shutil.copy(base_of("linear"), tmp_path / "in/base.safetensors")
    told = run("validate", "in", "--jsonl")
    assert told.code == 1
    assert [(r["path"], r["valid"]) for r in lines(told)] == [
        ("in/a.safetensors", True),
        ("in/base.safetensors", False),
    ]


@pytest.mark.parametrize(
    ("golden", "name"),
    [
        ("maxtext/llama-0/lora.npz", "a.npz"),
        ("gemma/gqa/lora.msgpack", "a.msgpack"),
        ("keras/gemma.lora.h5", "a.lora.h5"),
        ("gguf/llama/adapter.gguf", "a.GGUF"),
        ("kohya/locon/adapter.safetensors", "a.SafeTensors"),
    ],
)
def test_no_container_of_a_layout_passes_in_silence(run, golden, name, tmp_path):
    native(tmp_path / "in/z.safetensors")
    shutil.copy(GOLDEN / golden, tmp_path / "in" / name)
    assert [r["path"] for r in lines(run("validate", "in", "--jsonl"))] == [f"in/{name}", "in/z.safetensors"]


@pytest.mark.parametrize(
    ("data", "said"), [(b"", "empty"), (b"<html>", "a web page"), (b"version https://git-lfs", "git lfs pull")]
)
@pytest.mark.parametrize("name", ["a.gguf", "a.onnx_adapter", "a.lora.h5"])
def test_what_no_layout_claims_is_told_by_its_beginning(data, said, name, tmp_path):
    (tmp_path / name).write_bytes(data)
    (problem,) = lf.validate(tmp_path / name).problems
    assert (problem.rule, said in problem.fix) == ("LF-501", True)


@pytest.mark.parametrize(("alpha", "valid"), [(3.4e38, True), (3.5e38, False), (-1e308, False)])
def test_an_alpha_that_no_file_of_ours_can_state_is_told(alpha, valid, tmp_path):
    """In any layout: as convert says it, which comes later."""
    shutil.copytree(GPT2, tmp_path / "in")
    config = json.loads((tmp_path / "in/adapter_config.json").read_text())
    (tmp_path / "in/adapter_config.json").write_text(json.dumps({**config, "lora_alpha": alpha}))
    told = lf.validate(tmp_path / "in")
    assert (told.valid, {p.rule for p in told.problems if p.severity == "error"}) == (
        valid,
        set() if valid else {"LF-306"},
    )


@pytest.mark.parametrize("name", ["a.bin", "a.pt", "a.pth", "a.ckpt"])
def test_what_torch_saved_is_found_in_a_folder_as_well(run, name, tmp_path):
    shutil.copytree(adapter_of("bin"), tmp_path / "in/peft")
    (tmp_path / "in/peft/training_args.bin").write_bytes(b"beside a PEFT adapter, and no part of it")
    shutil.copy(adapter_of("bin") / "adapter_model.bin", tmp_path / "in" / name)
    for protocol in (0, 2):  # the first of them has no first bytes of its own
        (tmp_path / f"in/p{protocol}").mkdir()
        (tmp_path / f"in/p{protocol}" / name).write_bytes(pickle.dumps(os.getcwd, protocol))
    told = run("validate", "in", "--jsonl")
    assert told.code == 1
    assert [(r["path"], {p["rule"] for p in r["problems"]}) for r in lines(told)] == [
        (f"in/{name}", {"LF-509"}),  # PEFT's tensors without the configuration that states the scale
        (f"in/p0/{name}", {"LF-501"}),
        (f"in/p2/{name}", {"LF-510"}),
        ("in/peft", set()),
    ]


def test_links_to_files_are_followed_and_loops_of_folders_are_not(run, tmp_path):
    native(tmp_path / "blobs/0a1b")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.safetensors").symlink_to("../blobs/0a1b")
    (tmp_path / "in/loop").symlink_to(".")
    (tmp_path / "in/self.safetensors").symlink_to("self.safetensors")
    (tmp_path / "in/gone.safetensors").symlink_to("nowhere")
    told = run("validate", "in", "--jsonl")
    assert told.code == 1
    assert {r["path"]: [p["rule"] for p in r["problems"]] for r in lines(told)} == {
        "in/a.safetensors": [],
        "in/gone.safetensors": ["LF-701"],
        "in/self.safetensors": ["LF-701"],
    }


# What never ends, or cannot be read.


def test_pipes_and_sockets_and_devices_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    with socket.socket(socket.AF_UNIX) as open_socket:
        here = os.getcwd()
        os.chdir(tmp_path)  # the address of a socket is short
        open_socket.bind("socket.safetensors")
        os.chdir(here)
        done = subprocess.run(
            [sys.executable, "-c", MAIN, "validate", tmp_path, "/dev/zero", "--jsonl"],
            capture_output=True, text=True, timeout=30,
        )  # fmt: skip
    assert done.returncode == 1
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [[p["rule"] for p in r["problems"]] for r in found] == [["LF-701"]] * 3
    assert "a pipe" in found[0]["problems"][0]["what"]


def test_the_container_itself_does_not_wait_for_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    code = "import sys; from loraformat.container import Container; Container(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "pipe"], capture_output=True, text=True, timeout=30)
    assert "is not a regular file" in done.stderr


@pytest.mark.skipif(not shutil.which("setpriv"), reason="needs setpriv to run as nobody")
def test_what_must_not_be_read_is_told_and_the_rest_goes_on(tmp_path):
    native(tmp_path / "in/a.safetensors").chmod(0)
    (tmp_path / "in/closed").mkdir(mode=0)
    native(tmp_path / "in/z.safetensors")
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and str(folder) != "/" and "pytest" in str(folder):
            folder.chmod(0o755)
    words = [sys.executable, "-c", MAIN, "validate", "in", "--jsonl"]
    if os.getuid() == 0:
        words = ["setpriv", "--reuid=65534", "--clear-groups", *words]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    if done.returncode == 127 or "Permission denied: '" in done.stderr or "No module named" in done.stderr:
        pytest.skip("nobody may not run this Python")
    found = {r["path"]: [p["rule"] for p in r["problems"]] for r in map(json.loads, done.stdout.splitlines())}
    assert found == {"in/a.safetensors": ["LF-701"], "in/closed": ["LF-701"], "in/z.safetensors": []}, done.stderr


def test_a_huge_sparse_file_is_refused_by_its_header(run, tmp_path):
    for name, head in (("zero", bytes(8)), ("cap", (200_000_000).to_bytes(8, "little"))):
        with open(tmp_path / f"{name}.safetensors", "wb") as file:
            file.write(head)
            file.truncate(1 << 40)
    told = run("validate", "zero.safetensors", "cap.safetensors", "--jsonl")
    assert told.code == 1
    assert [[p["rule"] for p in r["problems"]] for r in lines(told)] == [["LF-103"], ["LF-102"]]


@pytest.mark.parametrize("name", ["a\nvalid  b", "a\x1b[2Jb", "a\udcffb"])
def test_a_hostile_file_name_forges_nothing(run, name, tmp_path):
    native(tmp_path / f"in/{name}.safetensors")
    told = run("validate", "in")
    assert told.code == 0
    assert len(told.out.splitlines()) == 1
    assert "\x1b" not in told.out
    assert lines(run("validate", "in", "--jsonl"))[0]["path"] == f"in/{name}.safetensors"


HOSTILE = "\x1b[2J\x1b]0;me\x07\nvalid  all good\r\u202e\u2028\x9b"
WORDS = [
    ("info", "in"), ("info", "in", "--deep"), ("info", "in", "--for", "vllm"), ("validate", "in"), ("validate", "in", "--strict"),
    ("convert", "in", "out.lora.safetensors"), ("info", "a.lora.safetensors"), ("diff", "in", "a.lora.safetensors"),
    ("combine", "in", "a.lora.safetensors", "-o", "two.lora.safetensors"), ("report", "in", "-o", "r.html"),
]  # fmt: skip


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_a_hostile_configuration_forges_nothing(run, words, tmp_path):
    """Nothing that an adapter says of itself moves the cursor, nor begins a line of ours."""
    shutil.copytree(GPT2, tmp_path / "in")
    config = json.loads((tmp_path / "in/adapter_config.json").read_text())
    more = {"base_model_name_or_path": HOSTILE, "revision": HOSTILE, f"strange{HOSTILE}": HOSTILE}
    (tmp_path / "in/adapter_config.json").write_text(json.dumps(config | more))
    lf.save(lf.load(tmp_path / "in"), tmp_path / "a.lora.safetensors")
    told = run(*words)
    assert all(c.isprintable() or c == "\n" for c in told.out + told.err)
    assert not any(line.startswith("valid  all") for line in (told.out + told.err).splitlines())


# One bad file of many.


class _Sick:
    name = "sick"
    carries = frozenset()
    markers = frozenset()

    def __init__(self, error):
        self.error = error

    def detect(self, source):
        return "its name" if source.file is not None and source.file.name.startswith("sick") else None

    def read(self, source, options):
        raise self.error


@pytest.mark.parametrize("error", [ZeroDivisionError("by zero"), MemoryError(), RecursionError(), AssertionError()])
def test_an_unforeseen_exception_is_a_problem_of_that_file(run, error, monkeypatch, tmp_path):
    whole = registry._loaded
    monkeypatch.setattr(
        registry, "_loaded", lambda g: ({**whole(g)[0], "sick": _Sick(error)}, ()) if "layouts" in g else whole(g)
    )
    native(tmp_path / "in/a.safetensors")
    shutil.copy(base_of("linear"), tmp_path / "in/sick.safetensors")
    native(tmp_path / "in/z.safetensors")
    told = run("validate", "in", "--jsonl")
    assert told.code == 1
    assert [[p["rule"] for p in r["problems"]] for r in lines(told)] == [[], ["LF-713"], []]
    assert type(error).__name__ in lines(told)[1]["problems"][0]["what"]


def test_every_result_is_printed_as_soon_as_it_is_known(tmp_path):
    native(tmp_path / "a.safetensors")
    child = subprocess.Popen(
        [sys.executable, "-c", MAIN, "validate", "a.safetensors", "-", "--jsonl"],
        cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    with child:
        assert json.loads(child.stdout.readline())["path"] == "a.safetensors"  # while it still waits for stdin
        child.stdin.close()
        assert [p["rule"] for p in json.loads(child.stdout.readline())["problems"]] == ["LF-101"]
    assert child.returncode == 1


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
def test_thousands_of_files_leave_nothing_open_and_nothing_in_memory(tmp_path):
    good, bad = native(tmp_path / "good.safetensors"), tmp_path / "bad.safetensors"
    bad.write_bytes(good.read_bytes()[:-4])
    results = [lf.validate(path).valid for path in [good, bad, GPT2] * 50]
    assert results == [True, False, True] * 50
    gc.disable()  # nothing may wait for the collector either
    try:
        before = _held()
        for _ in range(400):
            lf.validate(good), lf.validate(bad), lf.validate(GPT2)
        after = _held()
    finally:
        gc.enable()
    assert after.files == before.files
    assert after.maps == before.maps
    assert after.anonymous - before.anonymous < 2 << 20


def _held():
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    with open("/proc/self/maps") as maps:
        mapped = sum("safetensors" in line for line in maps)
    return SimpleNamespace(
        files=len(os.listdir("/proc/self/fd")), maps=mapped, anonymous=int(fields["RssAnon"].split()[0]) * 1024
    )


# stdin and limits.


@pytest.fixture
def stdin(monkeypatch):
    def give(data):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))

    return give


def test_a_file_on_stdin_is_read_like_any_other(run, stdin, tmp_path):
    stdin(native(tmp_path / "a.safetensors").read_bytes())
    told = run("validate", "-", "--jsonl")
    assert told.code == 0
    assert lines(told) == [
        {"schema": 1, "path": "-", "valid": True, "layout": "native", "targets": 1, "problems": []},
    ]


def test_stdin_that_no_disk_takes_is_a_line_like_any_other(run, stdin, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("loraformat.cli.validate._copy", full)
    stdin(b"")
    told = run("validate", "-", native(tmp_path / "a.safetensors"), "--jsonl")
    assert [(line["path"], line["valid"]) for line in lines(told)] == [
        ("-", False),
        (str(tmp_path / "a.safetensors"), True),
    ]
    assert "No space left on device" in lines(told)[0]["problems"][0]["what"]


class Endless(io.RawIOBase):
    """A stream of zeros; given to a reader without a limit it would fill the disk, so it complains."""

    given = 0

    def readable(self):
        return True

    def readinto(self, buffer):
        self.given += len(buffer)
        assert self.given < 1 << 24
        return len(buffer)


def test_stdin_beyond_the_limit_is_not_read_to_its_end(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BufferedReader(Endless())))
    told = run("validate", "-", "--max-bytes", "1MB", "--jsonl")
    assert told.code == 1
    assert [p["rule"] for p in lines(told)[0]["problems"]] == ["LF-710"]


@pytest.mark.parametrize(
    ("limit", "allowed", "refused", "rule"),
    [("--max-rank", 5, 4, "LF-711"), ("--max-targets", 6, 5, "LF-712"), ("--max-bytes", 25_000, 10_000, "LF-710")],
)
def test_a_limit_lets_pass_what_reaches_it_and_refuses_what_is_over(run, limit, allowed, refused, rule, tmp_path):
    lf.save(lf.load(GPT2), tmp_path / "a.safetensors")
    assert run("validate", "a.safetensors", limit, allowed).code == 0
    told = run("validate", "a.safetensors", limit, refused, "--jsonl")
    assert told.code == 1
    assert [p["rule"] for p in lines(told)[0]["problems"]] == [rule]


def test_a_header_of_a_million_tensors_is_counted_and_not_taken_apart(tmp_path):
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"t{n}": entry for n in range(10**6)}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    start = time.process_time()
    (problem,) = lf.validate(tmp_path / "a.safetensors", limits=lf.Limits(targets=5000)).problems
    assert (problem.rule, "1,000,000 tensors" in problem.what) == ("LF-712", True)
    assert time.process_time() - start < 3  # 50 s otherwise


def test_the_size_limit_is_exact(tmp_path):
    path = native(tmp_path / "a.safetensors")
    size = path.stat().st_size
    assert lf.validate(path, limits=lf.Limits(bytes=size)).valid
    assert rules(lf.validate(path, limits=lf.Limits(bytes=size - 1))) == ["LF-710"]


def test_the_size_of_a_folder_whose_tensors_lie_in_many_files_is_that_of_all(tmp_path):
    (folder,) = (path.parent for path in (Path(__file__).parent / "golden" / "megatron" / "lora").rglob(".metadata"))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert lf.validate(folder, limits=lf.Limits(bytes=size)).valid
    assert rules(lf.validate(folder, limits=lf.Limits(bytes=size - 1))) == ["LF-710"]


def test_what_a_small_file_unpacks_to_counts_too(tmp_path):
    from loraformat.memory import MemorySource

    text, tensors = file.check(testing.random_adapter())
    size = sum(tensor.nbytes for tensor in tensors.values())
    for limit, found in ((size, []), (size - 1, ["LF-710"])):
        source = MemorySource(tensors, {"loraformat": text})
        assert rules(lf.validate(source, layout="native", limits=lf.Limits(bytes=limit))) == found


@pytest.mark.parametrize(("text", "size"), [("12", 12), ("3k", 3000), ("2MB", 2_000_000), ("1 gb", 10**9)])
def test_a_size_is_a_number_with_a_unit(text, size):
    from loraformat.cli.validate import _size

    assert _size(None, None, text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1", "1.5GB", "2 TiB"])
def test_what_is_no_size_is_a_mistake_of_usage(run, text):
    told = run("validate", GPT2, "--max-bytes", text)
    assert (told.code, told.out) == (2, "")


def test_one_document_and_a_line_each_are_not_asked_for_together(run):
    assert run("validate", GPT2, "--json", "--jsonl").code == 2


# The library.


def test_validate_in_python_gives_what_the_command_prints(run):
    result = lf.validate(GPT2)
    assert (result.valid, result.layout, result.targets, result.problems) == (True, "peft", 6, ())
    assert run("validate", GPT2, "--json").json["files"] == [result.as_json()]


def test_strict_makes_a_warning_a_fault_in_python_too():
    path = adapter_of("patterns_resorted")
    assert lf.validate(path).valid
    assert not lf.validate(path, strict=True).valid
