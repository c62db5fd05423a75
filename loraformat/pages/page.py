"""The page: one file without script and without any other resource, told top down from what it is to every target."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from loraformat.dtypes import dtype_names
from loraformat.identity import digest
from loraformat.pages.heat import Heat, heat_map
from loraformat.pages.html import Content, Markup, element, said
from loraformat.pages.spectra import spectra
from loraformat.pages.style import STYLE
from loraformat.plan import size
from loraformat.spans import span

if TYPE_CHECKING:
    from loraformat.errors import Problem
    from loraformat.pages.facts import Facts
    from loraformat.updates import Update

__all__ = ["fragment", "page"]

_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'"  # nothing is fetched and nothing runs, whatever the page holds
)


def page(several: Sequence[Facts], title: str, warnings: Sequence[Problem] = ()) -> str:
    """The whole page of one adapter, or of several that are attached to one model."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("title", f"{title} – loraformat"),
        Markup(f"<style>{STYLE}</style>"),
    )
    body = element("body", element("main", [_adapter(facts) for facts in several], _problems(warnings)), class_="lf")
    return f'<!doctype html>\n<html lang="en">{head}{body}</html>\n'


def fragment(facts: Facts) -> str:
    """What it is and its heat map, for a notebook."""
    return element("div", Markup(f"<style>{STYLE}</style>"), _head(facts, "h3"), heat_map(Heat.of(facts)), class_="lf")


def _adapter(facts: Facts) -> Markup:
    return element(
        "section",
        _head(facts, "h1"),
        element("h2", "Problems"),
        _problems([*facts.problems]) or element("p", "None was found.", class_="good"),
        _oddities(facts),
        element("h2", "Where it changes the model"),
        heat_map(Heat.of(facts)),
        [element("h2", "How much of its rank it uses"), spectra(facts.anatomy)] if facts.anatomy.organs else None,
        _evidence(facts),
        element("h2", "Targets"),
        _targets(facts),
    )


# What it is.


def _head(facts: Facts, tag: str) -> Markup:
    title = facts.adapter.about.get("title")
    named = title if isinstance(title, str) and title else facts.name
    cards = [element("div", element("dt", name), element("dd", value)) for name, value in _cards(facts) if value]
    below: list[Content] = [said(facts.name)] if named != facts.name else []
    if facts.layout:
        below += [" · ", facts.layout] if below else [facts.layout]
    told = element("p", below, class_="soft") if below else Markup("")
    return Markup(element(tag, said(named)) + told + element("dl", cards))


def _cards(facts: Facts) -> Iterator[tuple[str, Content]]:
    adapter = facts.adapter
    updates = adapter.values()
    dtypes = dtype_names(tensor for update in updates for tensor in update.tensors)
    yield "targets", str(len(adapter))
    yield "kinds", ", ".join(f"{kind} ×{n}" for kind, n in Counter(update.kind for update in updates).most_common())
    yield "rank", span(update.rank for update in updates if update.rank is not None)
    yield "scale", span((update.scale for update in updates if update.scale is not None), "{:.4g}".format)
    yield "stored as", f"{dtypes} · {size(facts.nbytes)}"
    yield "names", said(adapter.names)
    yield "base model", said(adapter.base_model["name"]) if isinstance(adapter.base_model.get("name"), str) else None
    yield "looked up in", said(facts.base) if facts.base else None
    for field in ("license", "trigger_words", "tags"):
        if value := adapter.about.get(field):
            yield field.replace("_", " "), said(", ".join(map(str, value)) if isinstance(value, list) else value)
    changes = [100 * n.change for n in facts.norms.values() if n.change is not None]
    yield "‖ΔW‖ / ‖W‖", f"{span(changes)} %" if changes else None
    losses = [100 * n.loss for n in facts.norms.values() if n.delta and not n.new]
    yield "a merge would round away", f"{span(losses)} % of ΔW" if losses else None
    yield "digest", element("code", digest(adapter)[:16], title=digest(adapter))


# What is wrong or odd.


def _problems(problems: Sequence[Problem]) -> Markup:
    if not problems:
        return Markup("")
    items = [
        element(
            "li",
            element("b", problem.rule),
            " ",
            said(problem.what),
            [" @ ", said(problem.where)] if problem.where else None,
            element("p", said(problem.fix), class_="soft") if problem.fix else None,
            class_=problem.severity,
        )
        for problem in problems
    ]
    return element("ul", items, class_="problems")


def _oddities(facts: Facts) -> Markup:
    found = facts.anatomy
    lines: list[Content] = []
    if found.dead:
        lines.append([f"{len(found.dead)} dead: ΔW = 0 of ", _list(found.dead)])
    if found.outliers:
        odd = [
            [", " if i else "", said(key), f" ×{ratio:.2g}"] for i, (key, ratio) in enumerate(found.outliers.items())
        ]
        lines.append(
            [
                "far from what is usual among their like: ",
                odd[:12],
                f" and {len(odd) - 12} more" if len(odd) > 12 else "",
            ]
        )
    lines += [["the same parts, bit for bit: ", _list(group)] for group in found.duplicates]
    return (
        element("ul", [element("li", line, class_="warning") for line in lines], class_="problems")
        if lines
        else Markup("")
    )


def _list(keys: Sequence[str]) -> Content:
    rest = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
    return [[", " if i else "", said(key)] for i, key in enumerate(keys[:8])] + [rest]


# Where it goes.


def _evidence(facts: Facts) -> Content:
    if facts.found is None:
        return None
    total = len(facts.adapter)
    by = f" by {facts.found.rungs}" if facts.found.targets else ""
    rows = [
        element(
            "tr",
            element("th", said(key), scope="row"),
            element("td", [[element("br") if i else None, said(m.weight)] for i, m in enumerate(places)]),
            element("td", said(places[0].placement.spec)),
            element("td", [[element("br") if i else None, said(e)] for i, e in enumerate(places[0].evidence)]),
        )
        for key, places in facts.found.targets.items()
        if places
    ]
    head = element(
        "tr", [element("th", word, scope="col") for word in ("target", "weight in the base", "axes", "evidence")]
    )
    table = element("table", element("thead", head), element("tbody", rows), class_="list")
    opened = element("summary", f"{len(facts.found.targets)} of {total} targets found{by}")
    return [
        element("h2", "Where every target lies, and what says so"),
        element(
            "details", opened, element("div", table, class_="scroll", tabindex=0, role="region", aria_label="evidence")
        ),
    ]


def _targets(facts: Facts) -> Markup:
    words = ["target", "kind", "rank", "scale", "[out, in]", "dtype", "‖ΔW‖", "effective rank"]
    words += ["‖ΔW‖ / ‖W‖", "rounded away"] if facts.norms else []
    rows = [element("tr", element("th", said(k), scope="row"), _cells(facts, k, u)) for k, u in facts.adapter.items()]
    head = element(
        "tr",
        [
            element("th", word, scope="col", class_="number" if i in (2, 3, 6, 7, 8, 9) else None)
            for i, word in enumerate(words)
        ],
    )
    table = element("table", element("thead", head), element("tbody", rows), class_="list")
    opened = element("summary", f"all {len(facts.adapter)} targets, one by one")
    return element(
        "details", opened, element("div", table, class_="scroll", tabindex=0, role="region", aria_label="targets")
    )


def _cells(facts: Facts, key: str, update: Update) -> Iterator[Markup]:
    organ, norms = facts.anatomy.organs.get(key), facts.norms.get(key)
    yield element("td", update.kind)
    yield _number(update.rank)
    yield _number(update.scale)
    yield element("td", "×".join(map(str, update.matrix_shape() or ())) or "–")
    yield element("td", dtype_names(update.tensors))
    yield _number(organ.norm if organ else None)
    yield _number(organ.effective_rank if organ else None)
    if facts.norms:
        yield _number(100 * norms.change if norms and norms.change is not None else None, " %")
        yield _number(100 * norms.loss if norms and norms.delta and not norms.new else None, " %")


def _number(value: float | None, unit: str = "") -> Markup:
    return element("td", "–" if value is None else f"{value:.4g}{unit}", class_="number")
