"""The page of a report: complete in one file, safe whatever a file calls its tensors, readable with and without eyes."""

import dataclasses
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from graphs import adapter, lora, model, save
from safetensors.numpy import save_file
from updates import normal

import loraformat as lf
from loraformat import pages
from loraformat.errors import Problem
from loraformat.pages.heat import Heat
from loraformat.pages.html import element, said
from loraformat.testing import KINDS, random_adapter

EVIL = """"><script>alert('x')</script><img src=x onerror=alert(1)></style></title>&amp;<!--"""


def pair(out, in_, seed=0, alpha=3.0):
    return lf.Lora(normal(3, in_, seed=seed), normal(out, 3, seed=seed + 1), alpha, "alpha/r")


def layers(count=4):
    shapes = {"self_attn.q_proj": (9, 9), "mlp.up_proj": (14, 9)}
    return lf.Adapter(
        {
            f"model.layers.{i}.{leaf}.weight": lf.Update((pair(*shape, seed=10 * i + j),))
            for i in range(count)
            for j, (leaf, shape) in enumerate(shapes.items())
        }
    )


def base_of(given, path):
    path.mkdir()
    save_file(
        {key: normal(*update.matrix_shape(), seed=7) for key, update in given.items()}, path / "model.safetensors"
    )
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return lf.open_base(path)


class Page(HTMLParser):
    """Tags, attributes and the text of a page; the tags must close in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], "", []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if "style" not in self.open else ""


def cells(text):
    """(layer, module) → text of the heat map."""
    (table,) = re.findall(r'<table class="heat">.*?</table>', text, re.DOTALL)
    plain = [
        [html.unescape(re.sub(r"<[^>]*>", "", cell)) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
        for row in re.findall(r"<tr>(.*?)</tr>", table)
    ]
    head, *rows = plain
    return {(row[0], name): cell for row in rows for name, cell in zip(head[1:], row[1:], strict=True)}


def test_the_heat_map_has_the_norms_of_the_dense_matrices():
    given = layers()
    found = cells(lf.report(given))
    for key, update in given.items():
        layer, _, module = key.removesuffix(".weight").partition(re.search(r"\.\d+", key)[0])
        assert float(found[layer + re.search(r"\.\d+", key)[0], module[1:]]) == pytest.approx(
            np.linalg.norm(update.matrix()), rel=5e-3
        )


def test_with_a_base_it_has_the_share_that_changes_and_the_evidence(tmp_path):
    given = layers()
    base = base_of(given, tmp_path / "base")
    text = lf.report(given, base=base)
    found = cells(text)
    for i in range(4):
        key = f"model.layers.{i}.mlp.up_proj.weight"
        wanted = 100 * np.linalg.norm(given[key].matrix()) / np.linalg.norm(base.read(key))
        assert float(found[f"model.layers.{i}", "mlp.up_proj"]) == pytest.approx(wanted, rel=5e-3)
    page = Page(text)
    assert "8 of 8 targets found by name" in page.text
    assert "config: llama stores Linear weights as [out, in]" in page.text


def test_dora_is_weighed_as_the_change_that_it_makes_of_the_base(tmp_path):
    key = "model.layers.0.q.weight"
    given = lf.Adapter({key: lf.Update((pair(9, 7), lf.Magnitude(abs(normal(9)) + 1)))})
    base = base_of(given, tmp_path / "base")
    w = base.read(key)
    change = given[key].placed(lf.Placement.of((9, 7), "out,in")).apply(w) - w
    assert float(cells(lf.report(given, base=base))["model.layers.0", "q"]) == pytest.approx(
        100 * np.linalg.norm(change) / np.linalg.norm(w), rel=5e-3
    )


def test_a_target_that_is_not_found_is_a_problem_of_the_page(tmp_path):
    given = layers()
    base = base_of(lf.Adapter(dict(list(given.items())[1:])), tmp_path / "base")
    page = Page(lf.report(given, base=base))
    assert "LF-602 the base has no tensor model.layers.0." in page.text
    assert "7 of 8 targets found" in page.text


def test_dead_odd_and_double_targets_are_among_the_problems():
    given = layers(8)
    key = "model.layers.{}.mlp.up_proj.weight"
    odd = {
        key.format(2): lf.Update((pair(14, 9, alpha=0.0),)),
        key.format(3): lf.Update((pair(14, 9, alpha=900.0),)),
        key.format(4): given[key.format(5)],
    }
    page = Page(lf.report(lf.Adapter({**given.targets, **odd})))
    assert f"1 dead: ΔW = 0 of {key.format(2)}" in page.text
    assert re.search(rf"far from what is usual among their like: {re.escape(key.format(3))} ×\d+", page.text)
    assert f"the same parts, bit for bit: {key.format(4)}, {key.format(5)}" in page.text


def test_one_value_far_above_the_others_does_not_take_their_colour():
    heat = Heat({(str(i), "q"): 1.0 + i / 10 for i in range(10)} | {("x", "q"): 700.0}, relative=False)
    assert (heat.full, heat.capped) == (pytest.approx(3.8), True)
    even = Heat({(str(i), "q"): 1.0 + i / 10 for i in range(10)}, relative=False)
    assert (even.full, even.capped) == (pytest.approx(1.9), False)
    assert Heat({("0", "q"): 0.0, ("1", "q"): None}, relative=False).full == 0.0


def test_layers_are_rows_in_the_order_of_their_numbers_and_a_thousand_experts_are_put_together():
    given = layers(11)
    rows = list(dict.fromkeys(layer for layer, _ in cells(lf.report(given))))
    assert rows == [f"model.layers.{i}" for i in range(11)]
    many = {f"layers.{i}.experts.{e}.up.weight": lf.Update((pair(5, 4, seed=e),)) for i in range(4) for e in range(100)}
    found = cells(lf.report(lf.Adapter(many)))
    assert {layer for layer, _ in found} == {f"layers.{i}" for i in range(4)}
    names = cells(lf.report(lf.Adapter({"lm_head.weight": lf.Update((pair(5, 4),))})))
    assert list(names) == [("—", "lm_head")]


@pytest.mark.parametrize("kinds", [(kind,) for kind in KINDS] + [KINDS])
def test_every_kind_of_part_has_a_page(kinds):
    page = Page(lf.report(random_adapter(5, kinds)))
    assert "targets" in page.text


# Safety.


def hostile():
    about = {"title": EVIL, "license": EVIL, "tags": [EVIL, 3], "trigger_words": EVIL}
    return dataclasses.replace(
        lf.Adapter({EVIL: lf.Update((pair(5, 4),)), f"a.0.{EVIL}": lf.Update((pair(5, 4, 9),))}),
        about=about,
        base_model={"name": EVIL},
    )


def test_a_hostile_file_puts_no_element_and_no_attribute_into_the_page(tmp_path):
    lf.save(hostile(), tmp_path / "a.safetensors")
    problems = [Problem("LF-505", EVIL, EVIL, EVIL, "warning")]
    page = Page(pages.page([pages.facts(lf.load(tmp_path / "a.safetensors"), EVIL, EVIL, problems)], EVIL))
    assert not {"script", "img", "iframe", "object", "link", "a", "form"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href", "srcdoc")]
    assert page.text.count("<script>alert('x')</script>") >= 8


def test_writing_that_turns_or_hides_is_isolated_and_shown():
    assert said("a\u202eb\x00c\x1b") == "<bdi>a\\u202eb\\x00c\\x1b</bdi>"
    assert element("td", "<b>", title="\"x\" & 'y'") == '<td title="&quot;x&quot; &amp; &#x27;y&#x27;">&lt;b&gt;</td>'


def test_the_page_needs_nothing_but_itself_and_runs_nothing():
    text = lf.report(layers())
    assert "script" not in text.lower()
    assert not re.findall(r"""(?:https?:)?//|@import|url\(""", text)
    assert "default-src 'none'" in html.unescape(text)


def test_tables_have_captions_or_names_and_their_heads_say_what_they_head(tmp_path):
    given = layers()
    text = lf.report(given, base=base_of(given, tmp_path / "base"))
    assert all(re.search(r'scope="(row|col)"', th) for th in re.findall(r"<th\b[^>]*>", text))
    assert all("aria-label=" in svg and 'role="img"' in svg for svg in re.findall(r"<svg[^>]*>", text))
    assert text.count("<h1>") == 1
    assert '<html lang="en">' in text
    assert all("tabindex" in region for region in re.findall(r'<div class="scroll"[^>]*>', text))


# Notebooks.


def test_a_notebook_shows_an_adapter():
    text = hostile()._repr_html_()
    page = Page(text)
    assert page.tags[0] == "div"
    assert "script" not in page.tags
    assert cells(layers()._repr_html_()).keys() == cells(lf.report(layers())).keys()


# On the command line.


def test_the_command_writes_the_page(run, tmp_path):
    given = layers()
    lf.save(given, tmp_path / "a.safetensors")
    base_of(given, tmp_path / "base")
    told = run("report", "a.safetensors", "--base", "base", "-o", "r.html")
    assert (told.code, told.out) == (0, "")
    assert told.err == "r.html: 8 targets · 0 problems · next: open it in a browser\n"
    assert "8 of 8 targets found by name" in Page((tmp_path / "r.html").read_text()).text
    assert run("report", "a.safetensors", "-o", "r.html").code == 1
    told = run("report", "a.safetensors", "-o", "r.html", "--force", "--json").json
    assert (told["out"], told["bytes"], told["problems"]) == ("r.html", (tmp_path / "r.html").stat().st_size, [])
    assert run("report", "a.safetensors", "-o", "r2.html", "--axes", "x=out,in").code == 2
    assert run("report", "base", "-o", "r2.html").code == 2
    assert run("report", "nothing", "-o", "r2.html").code == 1


def test_what_is_attached_to_a_model_has_a_page_with_the_place_of_every_target(run, tmp_path):
    made = model(
        "g (float[N, 7] x) => (float[N, 11] y) <float[7, 5] q, float[5, 11] v> { h = MatMul (x, q)  y = MatMul (h, v) }"
    )
    for node, tensor, name in zip(made.graph.node, made.graph.initializer, ("a.q.weight", "a.v.weight"), strict=True):
        node.input[1] = tensor.name = name
    save(made, tmp_path / "m.onnx")
    lf.save(adapter({"a.q.weight": lora(5, 7, seed=1), "a.v.weight": lora(11, 5, seed=3)}), tmp_path / "a.safetensors")
    assert run("report", "m.onnx", "-o", "r.html").code == 1
    assert run("attach", "mine=a.safetensors", "--to", "m.onnx", "-o", "out.onnx").code == 0
    told = run("report", "out.onnx", "-o", "r.html")
    assert told.code == 0, told.err
    page = Page((tmp_path / "r.html").read_text())
    assert "attached to out.onnx" in page.text
    assert "2 of 2 targets found" in page.text
    assert "MatMul reads the weight as" in page.text


# In a browser.

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MEASURE = """<script>
const paint = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
function rgb(colour) { paint.clearRect(0, 0, 1, 1); paint.fillStyle = colour; paint.fillRect(0, 0, 1, 1); return paint.getImageData(0, 0, 1, 1).data; }
function light(c) { const [r, g, b] = [0, 1, 2].map(i => { const v = c[i] / 255; return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; }); return .2126 * r + .7152 * g + .0722 * b; }
function behind(node) { for (; node; node = node.parentElement) { const c = rgb(getComputedStyle(node).backgroundColor); if (c[3] === 255) return c; } return [255, 255, 255, 255]; }
let worst = 99;
for (const node of document.querySelectorAll("td, th, dt, dd, p, li, h1, h2, figcaption, summary, b")) {
  const [a, b] = [light(rgb(getComputedStyle(node).color)), light(behind(node))];
  worst = Math.min(worst, (Math.max(a, b) + .05) / (Math.min(a, b) + .05));
}
const page = document.documentElement;
document.title = JSON.stringify({worst, wide: page.scrollWidth - page.clientWidth, dark: getComputedStyle(document.body).backgroundColor, rows: document.querySelectorAll(".heat tbody tr").length});
</script>"""


def browsed(path, width, scheme):
    words = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={path.parent / 'profile'}",
        f"--window-size={width},1200",
        f"--blink-settings=preferredColorScheme={scheme}",
        "--dump-dom",
        path.as_uri(),
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    return html.unescape(re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)[1]), done.stdout


@pytest.mark.peer
@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium: apt-get install chromium")
@pytest.mark.parametrize(("width", "scheme"), [(1200, 1), (1200, 0), (520, 1)], ids=["light", "dark", "narrow"])
def test_a_browser_shows_it_readable_in_light_and_dark_and_on_a_narrow_screen(width, scheme, tmp_path):
    given = layers(6)
    text = lf.report(given, base=base_of(given, tmp_path / "base"))
    opened = (
        re.sub(r"<meta http-equiv[^>]*>", "", text)
        .replace("<details>", "<details open>")
        .replace("</body>", f"{MEASURE}</body>")
    )
    (tmp_path / "r.html").write_text(opened)
    seen = json.loads(browsed(tmp_path / "r.html", width, scheme)[0])
    assert seen["rows"] == 6
    assert seen["wide"] <= 0
    assert seen["worst"] >= 4.5
    assert seen["dark"] == ("rgb(13, 17, 23)" if scheme == 0 else "rgb(255, 255, 255)")


@pytest.mark.peer
@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium: apt-get install chromium")
def test_a_browser_runs_nothing_of_a_hostile_file(tmp_path):
    evil = EVIL.replace("alert('x')", "document.title=1").replace("alert(1)", "document.title=2")
    given = dataclasses.replace(hostile(), about={"title": evil})
    for text in (lf.report(given, name=evil), re.sub(r"<meta http-equiv[^>]*>", "", lf.report(given, name=evil))):
        (tmp_path / "r.html").write_text(text)
        title, dom = browsed(tmp_path / "r.html", 1200, 1)
        assert title.startswith('"><script>document.title=1')
        assert "<script" not in dom
        assert "<img" not in dom
