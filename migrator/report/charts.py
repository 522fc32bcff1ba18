"""The plots of a report, as SVG that stands in an HTML page: in the page's own colours and fonts, light and dark.

matplotlib draws in marker colours, which are then exchanged for CSS variables. It gets no text from outside: where a
plot's text might come from a file, only plain column names pass.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

from migrator.formatting import is_number, metric_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_INK, _FAINT, _GRID = "#0a0b01", "#0a0b02", "#0a0b03"
_SERIES = tuple(f"#0a0b1{number}" for number in range(6))
_VARIABLES = {
    _INK: "--ink", _FAINT: "--faint", _GRID: "--grid", **{c: f"--series-{n}" for n, c in enumerate(_SERIES)},
}  # fmt: skip
_STYLES = ("solid", (0, (5, 2)), (0, (1, 1.5)), "dashdot", (0, (3, 1, 1, 1, 1, 1)), (0, (8, 2)))
_MARKERS = "os^Dvp"
_SETTINGS: Any = {  # Any: matplotlib types the keys by a list of literals
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched and enlarged
    "svg.hashsalt": "migrator",  # the same facts give the same bytes
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],  # comes with matplotlib; the page's own font takes its place
    "font.size": 9,
    "axes.unicode_minus": True,
}
_WIDTH = 4.6  # inches of 72 points: what a phone shows with little shrinking
MAX_POINTS = 400
"""A line of more points is thinned."""
TESTS = {"baseline": "today", "cross": "cross-test", "self": "self-test", "reverse": "reverse test"}
"""How the tests are called, in their order."""


def backfill_curve(
    curve: Mapping[str, Any] | None,
    forecast: Mapping[str, Any] | None,
    measured: Sequence[Mapping[str, Any]],
    *,
    metric: str,
    today: float | None,
) -> str | None:
    """Quality by share of the backfill: as verified for each order, as planned, and as measured; None without any.

    `measured` are the points {share, value}.
    """
    lines: list[tuple[str, list[float], list[float]]] = []
    if curve is not None:
        for order, found in (curve.get("orders") or {}).items():
            points = _points(curve.get("shares"), (found or {}).get("values"))
            lines.append((f"verified, {_order(order)}", *points))
    if forecast is not None:
        dots = forecast.get("points") or []
        lines.append(("planned", *_points([dot.get("share") for dot in dots], [dot.get("value") for dot in dots])))
    lines = [line for line in lines if line[1]]
    shares, values = _points([m.get("share") for m in measured], [m.get("value") for m in measured])
    if not lines and not shares:
        return None
    figure, axes = _axes(height=3.2)
    for number, (label, x, y) in enumerate(lines):
        planned = label == "planned"
        axes.plot(
            x, y, color=_SERIES[3 if planned else 0], linestyle=_STYLES[3 if planned else number],
            marker="D" if planned else "", markersize=3.5, label=label, linewidth=1.8,
        )  # fmt: skip
    if shares:
        axes.plot(
            shares, values, color=_SERIES[1], marker="o", markersize=6, linestyle="none", label="measured", zorder=3
        )
    if today is not None:
        axes.axhline(today, color=_FAINT, linewidth=1.2, linestyle=(0, (2, 2)), label="today’s search")
    axes.set_xlim(-0.02, 1.02)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    axes.set_xlabel("of the collection re-embedded")
    axes.set_ylabel(metric_name(metric))
    _legend(axes)
    return _svg(
        figure,
        "curve",
        f"{metric_name(metric)} by share of the backfill",
        f"{len(lines)} lines of what is expected and {len(shares)} measured points; the numbers are in the tables.",
    )


def _order(order: str) -> str:
    return {"id": "by id", "worst_first": "worst first"}.get(order, "another order")


def histogram(test: str, edges: Sequence[Any], counts: Mapping[str, Any], *, widest: tuple[float, float]) -> str | None:
    """Similarities of relevant and irrelevant pairs in one test, each as a share of its kind; None where there are
    none.

    `edges` (n + 1), `counts` {positives (n), negatives (n)}; `widest` are the limits that all tests share.
    """
    if len(edges) < 2 or not all(map(is_number, edges)):
        return None
    figure, axes = _axes(height=2.1)
    drawn = 0
    for kind, label, color, hatch in (
        ("negatives", "irrelevant pairs", _SERIES[1], "////"),
        ("positives", "relevant pairs", _SERIES[0], None),
    ):
        values = counts.get(kind) or []
        total = sum(value for value in values if is_number(value))
        if len(values) != len(edges) - 1 or not all(map(is_number, values)) or total <= 0:
            continue
        shares = [value / total for value in values]
        axes.stairs(shares, edges, color=color, fill=True, alpha=0.25, hatch=hatch, linewidth=0)
        axes.stairs(shares, edges, color=color, linewidth=1.6, label=label, linestyle="--" if hatch else "-")
        drawn += 1
    if not drawn:
        return None
    axes.set_xlim(*widest)
    axes.set_yticks([])
    axes.set_xlabel("cosine similarity")
    _legend(axes)
    return _svg(
        figure, f"scores-{test}", f"Similarities, {TESTS[test]}", "How often pairs of each kind have a similarity."
    )


def training_curves(epochs: Sequence[Mapping[str, float]]) -> list[tuple[str, str]]:
    """(caption, SVG) of the losses, of the validation, and of P_1, by epoch; what is not in the rows is omitted."""
    if not epochs:
        return []
    from matplotlib.ticker import MaxNLocator

    not_losses = {"epoch", "lr", "images_per_second", "self", "cross", "old", "reverse", "p1"}
    names = list(dict.fromkeys(name for row in epochs for name in row))
    losses = [name for name in names if name not in not_losses][: len(_SERIES)]
    groups: list[tuple[str, str, list[str]]] = [
        ("losses", "Losses", losses),
        ("validation", "mAP@100 on held-out images", [name for name in ("self", "cross", "old") if name in names]),
        ("p1", "P_1, by which the best epoch is chosen", [name for name in ("p1",) if name in names]),
    ]
    found = []
    for key, caption, columns in groups:
        figure, axes = _axes(height=2.4)
        drawn = 0
        for number, name in enumerate(columns):
            x, y = _points([row["epoch"] for row in epochs], [row.get(name) for row in epochs])
            if x:
                axes.plot(
                    x, y, color=_SERIES[number], linestyle=_STYLES[number], linewidth=1.6,
                    marker=_MARKERS[number], markersize=4 if len(x) <= 40 else 0, label=_legible(name),
                )  # fmt: skip
                drawn += 1
        if not drawn:
            continue
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if drawn > 1:
            _legend(axes)
        told = ", ".join(map(_legible, columns))
        found.append((caption, _svg(figure, f"training-{key}", caption, f"By epoch: {told}.")))
    return found


def dated_forecast(points: Sequence[Mapping[str, Any]], *, metric: str) -> str | None:
    """A plan's forecast over the calendar; None unless it has two dates with values."""
    dated = [
        (datetime.fromisoformat(point["at"]), float(point["value"]))
        for point in points
        if isinstance(point.get("at"), str) and is_number(point.get("value"))
    ]
    if len({at for at, _ in dated}) < 2:
        return None
    from matplotlib import dates

    calendar: Any = dates  # its functions are not typed
    figure, axes = _axes(height=2.4)
    axes.plot(
        [calendar.date2num(at) for at, _ in dated], [value for _, value in dated],
        color=_SERIES[3], marker="o", markersize=4,
    )  # fmt: skip
    locator = calendar.AutoDateLocator(minticks=3, maxticks=5)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(calendar.ConciseDateFormatter(locator))
    axes.set_ylabel(metric_name(metric))
    return _svg(figure, "forecast", "The plan’s forecast by date", "Its numbers are in the table beside it.")


def _legible(name: str) -> str:
    return {"self": "self-test", "cross": "cross-test", "old": "old encoder", "p1": "P_1"}.get(name, name)


def _points(x: Sequence[Any] | None, y: Sequence[Any] | None) -> tuple[list[float], list[float]]:
    """The pairs that are two numbers each, thinned."""
    pairs = [(float(a), float(b)) for a, b in zip(x or [], y or [], strict=False) if is_number(a) and is_number(b)]
    step = -(-len(pairs) // MAX_POINTS) or 1
    kept = pairs[::step]
    if pairs and kept[-1] != pairs[-1]:
        kept.append(pairs[-1])
    return [a for a, _ in kept], [b for _, b in kept]


# -- drawing ----------------------------------------------------------------------------------------------------------


@contextmanager
def _style() -> Iterator[None]:
    """Our settings on matplotlib's own defaults, whatever a matplotlibrc of this machine says."""
    from matplotlib import rc_context, rcdefaults, rcParams

    with rc_context():
        rcdefaults()
        rcParams.update(_SETTINGS)
        yield


def _axes(*, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        figure.patch.set_alpha(0)
        axes.patch.set_alpha(0)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("bottom", "left"):
            axes.spines[side].set_color(_GRID)
        axes.tick_params(colors=_FAINT, length=3)
        axes.grid(color=_GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set_color(_FAINT)
    return figure, axes


def _legend(axes: Axes) -> None:
    with _style():
        axes.legend(
            loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, labelcolor=_INK,
            handlelength=2.6, columnspacing=1.4,
        )  # fmt: skip


def _svg(figure: Figure, name: str, title: str, description: str) -> str:
    """The figure as an `svg` element for a page with others: ids of its own, no style sheet, colours by variables."""
    drawn = io.StringIO()
    with _style():
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    root = ET.fromstring(drawn.getvalue())  # noqa: S314 - our own drawing
    for child in list(root):
        if child.tag == f"{{{_SVG}}}metadata":
            root.remove(child)
    for defs in root.iter(f"{{{_SVG}}}defs"):
        for style in defs.findall(f"{{{_SVG}}}style"):  # its rule for `*` would reach the whole page
            defs.remove(style)
    _own_ids(root, name)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-description")
    root.set("style", "stroke-linejoin: round; stroke-linecap: butt")
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ET.Element(f"{{{_SVG}}}{tag}", id=f"{name}-{'title' if tag == 'title' else 'description'}")
        element.text = text
        root.insert(place, element)
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _XLINK)
    text = ET.tostring(root, encoding="unicode")
    return re.sub("|".join(_VARIABLES), lambda color: f"var({_VARIABLES[color[0]]})", text)


def _own_ids(root: ET.Element, name: str) -> None:
    """Ids that something in the drawing refers to get the plot's name before them; the others go."""
    href = f"{{{_XLINK}}}href"
    used: set[str] = set()
    for element in root.iter():
        for key, value in element.attrib.items():
            used |= set(re.findall(r"url\(#([^)]+)\)", value))
            if key == href:
                used.add(value.removeprefix("#"))
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "id":
                if value in used:
                    element.set("id", f"{name}-{value}")
                else:
                    del element.attrib["id"]
            elif key == href:
                element.set(key, f"#{name}-{value.removeprefix('#')}")
            else:
                element.set(key, re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", value))


def interval_bar(mean: object, low: object, high: object, *, extent: tuple[float, float]) -> str:
    """A gain and its interval as a small drawing in a table; `extent` is what its width spans, 0 included."""
    left, right = extent
    if not (is_number(mean) and is_number(low) and is_number(high)) or left >= right:
        return ""
    x0, x1, x2, x3 = (
        5 + 150 * (min(max(float(at), left), right) - left) / (right - left) for at in (0, low, mean, high)
    )
    return (
        f'<svg class="interval" viewBox="0 0 160 14" aria-hidden="true"><path class="zero" d="M{x0:.1f} 0V14"/>'
        f'<path class="range" d="M{x1:.1f} 7H{x3:.1f}"/><circle cx="{x2:.1f}" cy="7" r="3.5"/></svg>'
    )
