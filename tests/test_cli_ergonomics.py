"""What makes the commands pleasant: progress, completion, near misses, help, and quiet where a program listens."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from peft_goldens import adapter_of, base_of
from safetensors.numpy import save_file

import loraformat as lf
from loraformat import progress
from loraformat.cli import main

GPT2 = str(adapter_of("gpt2"))
BASE = str(base_of("gpt2"))
IMPATIENT = "import loraformat.cli.progress as p; p._PATIENCE = p._REFRESH = 0; "
MAIN = "from loraformat.cli.main import main; main()"


# Progress.


def test_verbs_report_the_bytes_that_they_write(tmp_path):
    counts = []
    with progress.listening(counts.append):
        outcome = lf.merge(lf.load(GPT2), lf.open_base(BASE), tmp_path / "m.safetensors")
    assert outcome.written * 0.8 < sum(counts) <= outcome.written
    before = len(counts)
    lf.merge(lf.load(GPT2), lf.open_base(BASE), tmp_path / "n.safetensors")
    assert len(counts) == before


def test_validate_reports_the_bytes_that_it_reads():
    counts = []
    with progress.listening(counts.append):
        lf.validate(GPT2)
    assert sum(counts) == sum(t.nbytes for u in lf.load(GPT2).values() for t in (u["lora"].lora_A, u["lora"].lora_B))


def test_a_worker_thread_is_heard_too_and_an_inner_listener_comes_first():
    outer, inner = [], []
    with progress.listening(outer.append):
        with progress.listening(inner.append):
            thread = threading.Thread(target=progress.advance, args=(3,))
            thread.start()
            thread.join()
        progress.advance(5)
    progress.advance(7)
    assert (outer, inner) == ([5], [3])


def on_terminal(*words, folder, colour=True, code=0):
    """What a terminal on stderr gets, and what stdout holds."""
    ours, theirs = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    environment |= {"TERM": "xterm-256color"} | ({} if colour else {"NO_COLOR": "1"})
    script = f"{IMPATIENT}{MAIN}"
    with subprocess.Popen(
        [sys.executable, "-c", script, *words], cwd=folder, stdout=subprocess.PIPE, stderr=theirs, env=environment
    ) as child:
        os.close(theirs)
        seen = b""
        while True:
            try:
                chunk = os.read(ours, 4096)
            except OSError:  # Linux says so when the other end is closed
                break
            if not chunk:
                break
            seen += chunk
        out = child.stdout.read()
    os.close(ours)
    assert child.returncode == code, seen
    return seen.decode(), out.decode()


def test_a_terminal_sees_a_bar_that_goes_away_before_the_last_line(tmp_path):
    seen, out = on_terminal("merge", GPT2, "--into", BASE, "-o", "m.safetensors", folder=tmp_path)
    assert out == ""
    assert "merge" in seen
    assert "━" in seen
    assert "6/6 targets by name" in seen.splitlines()[-1]
    assert re.search(r"\x1b\[[0-9;]*3\d[;m]", seen)


def test_no_color_takes_the_colours_away(tmp_path):
    seen, _ = on_terminal("merge", GPT2, "--into", BASE, "-o", "m.safetensors", folder=tmp_path, colour=False)
    assert "━" in seen
    assert not re.search(r"\x1b\[[0-9;]*[34]\d[;m]", seen)


def test_with_json_a_terminal_sees_nothing(tmp_path):
    seen, out = on_terminal("merge", GPT2, "--into", BASE, "-o", "m.safetensors", "--json", folder=tmp_path)
    assert seen == ""
    assert json.loads(out)["verb"] == "merge"


def test_a_pipe_gets_no_bar_and_rich_is_not_even_imported(tmp_path):
    code = f"{IMPATIENT}import atexit, sys; atexit.register(lambda: print('rich' in sys.modules)); {MAIN}"
    words = [sys.executable, "-c", code, "merge", GPT2, "--into", BASE, "-o", "m.safetensors"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "False\n")
    assert "\x1b" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_short_run_shows_no_bar(run, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert "━" not in run("validate", GPT2).err


# Completion.


def complete(*words):
    environment = {
        **os.environ,
        "_LORAFORMAT_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }
    code = f"import sys; sys.argv[0] = 'loraformat'; {MAIN}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


def test_a_shell_completes_a_verb_an_option_and_a_value():
    assert complete("loraformat", "va") == ["validate"]
    assert complete("loraformat", "validate", "--max") == ["--max-bytes", "--max-rank", "--max-targets"]
    assert complete("loraformat", "info", "--how", "c") == ["cpp", "csharp"]
    assert complete("loraformat", "convert", "--to", "p") == ["peft"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell_calls_the_program(run, shell):
    told = run("completion", shell)
    assert (told.code, told.err) == (0, "")
    assert f"_LORAFORMAT_COMPLETE={shell}_complete" in told.out


# Near misses.

NEAR = {
    "a command": (["vaildate", "x"], "Did you mean 'validate'?"),
    "a file for a command": (["a.safetensors"], "It is a file: loraformat info a.safetensors"),
    "an option": (["info", "x", "--jsno"], "--json"),  # in words of click, which differ
    "a value": (["info", "x", "--how", "pyton"], "Did you mean 'python'?"),
    "a rule": (["convert", "x", "y.safetensors", "--scale-rule", "alpha/sqr(r)"], "Did you mean 'alpha/sqrt(r)'?"),
    "a shell": (["completion", "bahs"], "Did you mean 'bash'?"),
    "a layout": (["validate", "x", "--from", "petf"], 'Did you mean "peft"?'),
}


@pytest.mark.parametrize("mistake", NEAR)
def test_what_was_nearly_right_is_named(run, mistake, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"")
    words, said = NEAR[mistake]
    told = run(*words)
    assert (told.code, told.out) == (2, "")
    assert said in told.err


# Help.


def test_every_verb_has_its_line_in_the_overview(run):
    told = run("-h").out
    assert all(
        re.search(rf"^  {name} +{re.escape(says)}$", told, re.MULTILINE) for name, (_, says) in main._VERBS.items()
    )


@pytest.mark.parametrize("verb", main._VERBS)
def test_every_option_says_what_it_does_and_every_argument_what_it_is(run, verb):
    text = run(verb, "-h").out
    command = main.cli.get_command(None, verb)
    for parameter in command.params:
        if parameter.param_type_name == "option":
            assert getattr(parameter, "help", None), f"{verb} {parameter.opts}"
    assert "TEXT" not in text
    assert "[default: None]" not in text


def test_the_version_is_the_packages_own(run):
    from importlib.metadata import version

    assert run("--version").out == f"loraformat {version('loraformat')}\n"


# Being stopped.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_asked_to_end_ends_with_a_word_and_leaves_nothing(number, tmp_path):
    save_file({"x.weight": np.ones((4000, 9000), np.float32)}, tmp_path / "base.safetensors")
    pair = [np.ones(shape, np.float32) for shape in ((2, 9000), (4000, 2))]
    update = lf.Update((lf.Lora(*pair, 1.0, "factor"),), lf.Placement((4000, 9000), (0,), (1,)))
    lf.save(lf.Adapter({"x.weight": update}), tmp_path / "a.safetensors")
    # A shell's background job ignores SIGINT, nohup's SIGHUP, and so would the child. The sleep is longer than we wait.
    slow = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    slow += "signal.signal(signal.SIGHUP, signal.SIG_DFL); "
    slow += "import time, loraformat.progress as p; p.advance = lambda n: time.sleep(1); "
    words = ["merge", "a.safetensors", "--into", "base.safetensors", "-o", "m.safetensors"]
    with subprocess.Popen(
        [sys.executable, "-c", slow + MAIN, *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        deadline = time.monotonic() + 20
        while not list(tmp_path.glob(".m.safetensors.*")) and time.monotonic() < deadline:
            time.sleep(0.02)
        child.send_signal(number)
        out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (128 + number, b"")
    assert err.decode().strip() == "interrupted"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "base.safetensors"]


def test_what_a_parent_ignores_stays_ignored(tmp_path):
    """As under nohup: the run goes on."""
    code = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
    code += "import loraformat.cli.layouts as l, click; l.layouts.callback = lambda **_: (os.kill(os.getpid(), 1), click.echo('on')); "
    done = subprocess.run([sys.executable, "-c", code + MAIN, "layouts"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "on\n", "")


# Colours.


def test_a_rule_is_red_on_a_terminal_and_plain_without_colours(tmp_path):
    for colour in (True, False):
        seen, _ = on_terminal("info", "nothing-here", folder=tmp_path, colour=colour, code=1)
        assert "LF-701" in seen
        assert ("\x1b[31m" in seen) is colour
