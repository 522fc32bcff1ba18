"""`migrator verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from migrator.cli.common import json_option, migration_options, open_project, print_json, print_table, progress, say
from migrator.evaluation.verdicts import state_of, summary

if TYPE_CHECKING:
    from migrator.documents import LiveIndex, VerificationResults

MEANING = {
    "baseline": "old query, old gallery: today's search",
    "cross": "new query, old gallery: the canary",
    "self": "new query, new gallery: after the backfill",
    "reverse": "old query, new gallery: must not happen",
    "mixed": "new query, gallery as it is",
}
COLUMNS = ("map@100", "recall@1", "recall@10", "ndcg@10", "mrr@100")
"""What the table has room for; --json and the report have the rest."""
GROUPS = 3


@click.command("verify")
@migration_options
@click.option("--mixed", is_flag=True, help="Evaluate the new encoder on the collection as it is now; no verdict.")
@click.option("--run", help="The training run to verify, which becomes the candidate of plan and rollout.")
@click.option(
    "--live",
    is_flag=True,
    help="Also search through the store's own index, and measure its recall; after the cutover, no verdict.",
)
@click.option(
    "--resample-queries",
    is_flag=True,
    help="Draw a new query set, which counts as a further interim analysis.",
)
@json_option
def command(
    name: str | None,
    config_path: Path,
    mixed: bool,
    run: str | None,
    live: bool,
    resample_queries: bool,
    as_json: bool,
) -> int:
    """Prove on sampled queries that search gets no worse.

    Exit code 0 if the gate passes, 3 if it fails or the queries cannot decide. The query set is drawn once and then
    pinned, so that later verifications evaluate the same one.
    """
    from migrator.verify.run import is_served_by_new, measure_mixed, verify

    if mixed and resample_queries:
        raise click.UsageError("--resample-queries is for a verification, and --mixed is none")
    if mixed and run is not None:
        raise click.UsageError("--run chooses a candidate, and --mixed evaluates the collection as it is")
    with open_project(config_path, name) as project, progress("verify") as advance:

        def report(what: str, done: int, total: int) -> None:
            advance(done, total, what)

        if run is not None:
            project.choose_run(run)
        evaluate_current = mixed or (live and not resample_queries and is_served_by_new(project))
        if evaluate_current:
            found = measure_mixed(project, report, live=live)
        else:
            verified = verify(project, report, resample_queries=resample_queries, live=live)
    if evaluate_current:
        if as_json:
            print_json({"migration": project.name, **found})
        else:
            _print_evaluation(found, project.settings.verify.gate.metric)
        return 0
    if as_json:
        print_json({"migration": project.name, **verified.results.to_json()})
    else:
        _print_results(project.name, verified.results)
    return 0 if verified.verdict.outcome == "pass" else 3


def _print_evaluation(found: dict[str, Any], metric: str) -> None:
    """What the collection gives now; beside it today's search of the verification, for the same queries."""
    from migrator.documents import LiveIndex

    test = {"old": "cross", "new": "self"}.get(found["gallery"], "mixed")
    before = {} if found["today"] is None else {"baseline": found["today"]}
    _print_tests({**before, test: found["mixed"]}, metric)
    _print_live(LiveIndex.model_validate(found["live"]) if "live" in found else None, metric)


def _columns(metric: str) -> list[str]:
    return list(dict.fromkeys([metric, *COLUMNS]))[: len(COLUMNS)]


def _print_tests(tests: dict[str, dict[str, float]], metric: str) -> None:
    metrics = _columns(metric)
    print_table(
        ("test", *metrics),
        [
            (f"{test}: {MEANING[test]}", *(f"{of[name]:.4f}" if name in of else "-" for name in metrics))
            for test, of in tests.items()
        ],
    )


def _print_live(live: LiveIndex | None, metric: str) -> None:
    if live is None:
        return
    metrics = _columns(metric)
    k = live.index_recall["k"]
    print_table(
        (f"through the index, {live.items} items", *metrics, f"index recall@{k}"),
        [
            (test, *(f"{of[name]:.4f}" for name in metrics), f"{live.index_recall[test]:.4f}")
            for test, of in live.tests.items()
        ],
    )


def _print_results(name: str, results: VerificationResults) -> None:
    _print_tests(results.tests, results.metric)
    _print_live(results.live, results.metric)
    query_set = results.query_set
    say(
        f"{results.queries} queries against {results.gallery} items; first results that became irrelevant: "
        f"{results.flips.negative:.1%}, relevant: {results.flips.positive:.1%}"
    )
    say(f"query set {query_set.sha256[:12]} of {query_set.drawn_at[:10]}: {results.evidence}")
    for line in _excluded(results):
        say(line)
    for what, groups in (("classes", results.classes), ("segments", results.segments)):
        losing = [] if groups is None else [group for group in groups.worst if group.gain < 0][:GROUPS]
        if groups is not None and losing:
            worst = ", ".join(f"{group.name!r} {group.gain:+.4f}" for group in losing)
            say(f"{what} that lose most, of {groups.count}: {worst}")
    curve = results.curve
    if curve is not None:
        areas = ", ".join(f"{order} {found.auc:.4f}" for order, found in curve.orders.items())
        say(f"{curve.metric} over the backfill, on average, by its order: {areas}")
        low = curve.lowest
        gain = "" if low.gain is None else f", {low.gain.mean:+.4f} over today"
        say(f"minimum during the backfill: {low.value:.4f} at {low.share:.0%} of the backfill{gain}")
    if results.shift:
        say(f"scores: {results.shift}")
    if results.scores:
        say(", ".join(f"{score} {value:.4f}" for score, value in results.scores.items()))
    document = results.to_json()
    verdict = f"verdict: {summary(document)}"
    for finding in results.findings:
        if finding.reason not in verdict:
            say(f"{'accepted' if finding.accepted else finding.outcome}: {finding.reason}")
    say(verdict, colour="yellow" if state_of(document) == "accepted" else None)
    if results.next_steps:
        say("next steps:")
    for step in results.next_steps:
        say(f"  - {step}", hanging="    ")
    if results.outcome == "pass":
        say(f"next: migrator rollout {name} --stage prepare")


def _excluded(results: VerificationResults) -> list[str]:
    found = []
    if number := results.queries_without_relevant_items:
        found.append(f"{number} queries without a relevant item were excluded")
    if number := results.queries_without_old_vector:
        found.append(f"{number} queries were excluded: no item of the collection has their image")
    if number := results.gallery_gone:
        found.append(f"{number} items of the gallery are gone from the collection")
    if unreadable := results.unreadable:
        path, why = next(iter(unreadable.items()))
        found.append(f"{len(unreadable)} images could not be read, for instance {path}: {why}")
    return found
