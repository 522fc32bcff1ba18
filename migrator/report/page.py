"""The report as one HTML file that needs no network, no script and nothing beside it.

Everything that the page prints is untrusted text: labels, payloads, paths, reasons, names. It is sanitized
and cut to length (`formatting.sanitized`) and escaped by the template engine; none of it becomes a link, a style or a
drawing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from migrator import formatting
from migrator.errors import ConfigError, TemporarilyUnavailable, UsageProblem
from migrator.evaluation.verdicts import TITLES, finding_state, state_of
from migrator.lifecycle.strategy import STRATEGIES
from migrator.project import Project
from migrator.report import charts
from migrator.report.facts import facts_of
from migrator.report.thumbnails import Thumbnail, thumbnails
from migrator.report.verdict import is_moved, meaning
from migrator.trainer.files import write_whole

if TYPE_CHECKING:
    from jinja2 import Environment

MAX_EXAMPLES = 12
MAX_ANSWERS = 5
MAX_ROWS = 30
"""Classes, segments and unreadable images that are shown."""
MAX_EVENTS = 100
"""Of the audit log and of the measurements the newest are shown."""
_FOLDER = Path(__file__).parent
TESTS = {
    "baseline": ("Today", "old query, old gallery"),
    "cross": ("Cross-test", "new query, old gallery"),
    "self": ("Self-test", "new query, new gallery"),
    "reverse": ("Reverse test", "old query, new gallery: no stage of a migration does this"),
}


def write_report(
    project: Project, out: Path | None, report: Callable[[int, int], None] = lambda _done, _of: None
) -> Path:
    """Writes the page and returns its path: `out`, or report.html beside the migration's artifacts.

    An image that cannot be read or reached leaves its place to a note. Raises `UsageProblem` for a place where no file
    can be, and where jinja2 or matplotlib is missing; `TemporarilyUnavailable` where the file cannot be written. Then
    whatever lay there before is as it was.
    """
    check_installed()
    path = _default_path(project) if out is None else out
    if path.exists() and not path.is_file():
        raise UsageProblem(f"{path} is no file: give the name of one with --out")
    if not path.absolute().parent.is_dir():
        raise UsageProblem(f"{path}: the folder {path.parent} does not exist: make it, or give another --out")
    facts = facts_of(project)
    pictures = thumbnails(project.images, _paths(_examples(facts)), report)
    page = render(facts, pictures).encode()
    try:
        write_whole(path, page)
    except OSError as error:
        raise TemporarilyUnavailable(
            f"{path}: {error.strerror or error}: nothing was written; make room or correct the permissions, then again"
        ) from error
    return path


def check_installed() -> None:
    """Raises `UsageProblem` where what draws the page is missing."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageProblem(f"a report needs {error.name}: pip install 'advbct-migrator[report]'") from None


def _default_path(project: Project) -> Path:
    try:
        folder = project.training_folder().parent
    except ConfigError:  # the artifacts lie on a server
        return Path(f"{project.name}-report.html")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TemporarilyUnavailable(
            f"{folder}: {error.strerror}: correct that, or give another place with --out"
        ) from error
    return folder / "report.html"


def render(facts: Mapping[str, Any], pictures: Mapping[str, Thumbnail]) -> str:
    """The whole page, from `facts_of` and the thumbnails of the examples. The same facts give the same page."""
    from markupsafe import Markup

    environment = _environment()
    facts = _known(facts)
    verification = facts.get("verification", {})
    results = verification.get("results", {})
    tests = results.get("tests", {})
    metric = results.get("metric") or next(iter(tests.get("baseline", {})), "map@100")
    measured = [_measurement(entry, metric) for entry in facts["measured"]]
    plan = facts.get("plan", {})
    strategy = STRATEGIES[facts["status"]["strategy"]]
    return environment.get_template("report.html.j2").render(
        facts=facts,
        status=facts["status"],
        verification=verification,
        results=results,
        plan=plan,
        answered_by=_answered_by(facts),
        metric=metric,
        meaning=meaning(metric),
        metrics=_metrics(tests, metric),
        tests={test: caption for test, caption in TESTS.items() if test in tests},
        stages=strategy.stages,
        queries_first=strategy.queries_first,
        findings=_findings(results),
        state=state_of(results) or verification.get("outcome"),
        titles=TITLES,
        groups=[
            (name, results[key]) for key, name in (("classes", "class"), ("segments", "segment")) if results.get(key)
        ],
        measured=measured,
        orders=_orders(results.get("curve") or {}),
        is_moved=is_moved(facts["status"]),
        examples=_with_pictures(_examples(facts), pictures),
        curve=_drawn(
            charts.backfill_curve(
                results.get("curve"),
                _of_metric(plan.get("forecast"), metric),
                measured,
                metric=metric,
                today=tests.get("baseline", {}).get(metric),
            )
        ),
        forecast=_drawn(_forecast(plan.get("forecast"))),
        histograms=_histograms(results.get("histograms") or {}),
        training=[
            (caption, _drawn(svg))
            for caption, svg in charts.training_curves(facts.get("training", {}).get("epochs", []))
        ],
        css=Markup((_FOLDER / "report.css").read_text(encoding="utf-8")),  # noqa: S704 - our own
        max_rows=MAX_ROWS,
        max_events=MAX_EVENTS,
    )


@functools.cache
def _environment() -> Environment:
    from jinja2 import ChainableUndefined, Environment, FileSystemLoader
    from markupsafe import Markup

    def printed(value: Any) -> Any:
        return value if isinstance(value, Markup | int | float) else formatting.sanitized(str(value))

    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=ChainableUndefined,  # results of an older migrator lack what it did not measure
        finalize=printed,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "short": _short,
        "number": formatting.number,
        "signed": formatting.signed,
        "percent": formatting.percent,
        "count": formatting.count,
        "when": formatting.when,
        "duration": formatting.duration,
        "size": formatting.size,
        "disk": formatting.disk_needed,
        "metric": lambda value: formatting.metric_name(str(value)),
        "event_summary": _event_summary,
        "commands": _commands,
        "sentence": lambda value: formatting.sentence(str(value)),
    }
    environment.globals |= {
        "interval_bar": _interval_bar,
        "extent": _extent,
    }
    return environment


def _short(value: object, max_length: int = 80) -> str:
    """Untrusted text in a place where there is little room."""
    return formatting.sanitized(str(value), max_length)


def _interval_bar(mean: object, low: object, high: object, *, extent: tuple[float, float]) -> Any:
    return _drawn(charts.interval_bar(mean, low, high, extent=extent))


def _commands(text: str) -> Any:
    """A sentence with what stands between backticks as code."""
    from markupsafe import Markup, escape

    parts = formatting.sanitized(str(text)).split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if number % 2 else escape(part) for number, part in enumerate(parts)
    )


def _event_summary(event: Mapping[str, Any]) -> str:
    """An event of the audit log in a line; of a measurement only what is not in its own table."""
    detail = event["detail"]
    if event["event"] == "measured":
        detail = {key: value for key, value in detail.items() if key in ("run", "share", "value", "outcome")}
    return _line(detail)


def _line(detail: Any) -> str:
    if isinstance(detail, Mapping):
        return ", ".join(f"{key}: {_line(value)}" for key, value in detail.items() if value not in (None, [], {}))
    if isinstance(detail, Sequence) and not isinstance(detail, str):
        return ", ".join(map(_line, detail))
    return f"{detail:.4g}" if isinstance(detail, float) else str(detail)


def _drawn(svg: str | None) -> Any:
    from markupsafe import Markup

    return None if svg is None else Markup(svg)  # noqa: S704 - drawn by `charts`, which takes no text from outside


def _known(value: Any) -> Any:
    """The same without what is None: to the page, null and missing are one."""
    if isinstance(value, Mapping):
        return {key: _known(each) for key, each in value.items() if each is not None}
    return [_known(each) for each in value] if isinstance(value, list) else value


# -- what a part of the page shows ------------------------------------------------------------------------------------


def _metrics(tests: Mapping[str, Any], metric: str) -> list[str]:
    """The metrics of all tests, the gate's first."""
    known = dict.fromkeys(name for values in tests.values() for name in values or {})
    return sorted(known, key=lambda name: name != metric)


def _extent(intervals: Sequence[Mapping[str, Any] | None]) -> tuple[float, float]:
    """The least and the greatest end, with 0 among them, so that the drawings of a table share one scale."""
    ends = [each[end] for each in intervals if each for end in ("low", "high") if formatting.is_number(each.get(end))]
    return min([0.0, *ends]), max([0.0, *ends])


def _answered_by(facts: Mapping[str, Any]) -> str:
    """Who answers the queries, in words."""
    route, new = facts.get("route"), facts["status"].get("new_encoder")
    if route is None:
        return "the old encoder answers; there is no route yet"
    if route["query_encoder"] == new:
        return "the new encoder answers all of them"
    if not route["canary_percent"]:
        return "the old encoder answers all of them"
    return f"the new encoder answers {route['canary_percent']:g} % of them"


def _findings(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The gate's findings, each with its `state`; of an older verification its verdict and reasons."""
    if results.get("findings"):
        return [{**finding, "state": finding_state(finding)} for finding in results["findings"]]
    if "outcome" not in results:
        return []
    return [
        {
            "metric": results.get("metric"),
            "outcome": results["outcome"],
            "state": state_of(results),
            "interval": results.get("interval"),
            "queries": results.get("queries"),
            "reason": "; ".join(map(str, results.get("reasons") or [])),
        }
    ]


def _measurement(entry: Mapping[str, Any], metric: str) -> Mapping[str, Any]:
    """A measurement in today's form; older ones hold the metrics and no more."""
    mixed = entry.get("mixed")
    if isinstance(mixed, Mapping) and "value" not in entry:
        return {**entry, "metric": metric, "value": mixed.get(metric)}
    return entry


def _of_metric(forecast: Mapping[str, Any] | None, metric: str) -> Mapping[str, Any] | None:
    """The plan's forecast, where it is of the metric that the curve shows."""
    return forecast if forecast and forecast.get("metric", metric) == metric else None


def _forecast(forecast: Mapping[str, Any] | None) -> str | None:
    if not forecast:
        return None
    return charts.dated_forecast(forecast.get("points") or [], metric=str(forecast.get("metric") or "map@100"))


def _orders(curve: Mapping[str, Any]) -> dict[str, Any]:
    """Area under the curve of each order, and the gain of beginning with the worst items."""
    orders = curve.get("orders") or {}
    areas = {
        order: found.get("auc") for order, found in orders.items() if formatting.is_number((found or {}).get("auc"))
    }
    gain = curve.get("auc_gain")
    if gain is None and {"id", "worst_first"} <= areas.keys():
        gain = {"mean": areas["worst_first"] - areas["id"]}
    return {"areas": areas, "auc_gain": gain, "chosen": curve.get("order")}


def _histograms(histograms: Mapping[str, Any]) -> list[tuple[str, Any]]:
    edges, tests = histograms.get("edges") or [], histograms.get("tests") or {}
    limits = [edge for edge in edges if formatting.is_number(edge)]
    found = []
    for test, (name, _) in TESTS.items():
        drawn = limits and tests.get(test) and charts.histogram(
            test, edges, tests[test], widest=_occupied(edges, list(tests.values()))
        )  # fmt: skip
        if drawn:
            found.append((name, _drawn(drawn)))
    return found


def _occupied(edges: Sequence[Any], tests: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """The part of the axis on which any test has counts."""
    used = [
        place
        for test in tests
        for counts in (test or {}).values()
        for place, value in enumerate(counts or [])
        if formatting.is_number(value) and value > 0 and place < len(edges) - 1
    ]
    if not used:
        return float(edges[0]), float(edges[-1])
    return float(edges[min(used)]), float(edges[max(used) + 1])


def _examples(facts: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    results = (facts.get("verification") or {}).get("results") or {}
    found: list[Mapping[str, Any]] = (results.get("examples") or [])[:MAX_EXAMPLES]
    return found


def _paths(examples: Sequence[Mapping[str, Any]]) -> list[object]:
    return [
        picture.get("path")
        for example in examples
        for picture in (example.get("query") or {}, *_results(example, "old"), *_results(example, "new"))
    ]


def _results(example: Mapping[str, Any], test: str) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = (example.get(test) or [])[:MAX_ANSWERS]
    return found


def _with_pictures(examples: Sequence[Mapping[str, Any]], pictures: Mapping[str, Thumbnail]) -> list[Mapping[str, Any]]:
    missing = Thumbnail(None, problem="its path is not known")

    def shown(picture: Mapping[str, Any]) -> dict[str, Any]:
        path = picture.get("path")
        return {**picture, "thumbnail": pictures.get(path, missing) if isinstance(path, str) else missing}

    return [
        {
            **example,
            "query": shown(example.get("query") or {}),
            "results": [
                ("today", example.get("old_value"), [shown(each) for each in _results(example, "old")]),
                ("new", example.get("new_value"), [shown(each) for each in _results(example, "new")]),
            ],
        }
        for example in examples
    ]
