"""The training benchmark's pure parts: what it splits, what it names, and how it sums up."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bench.datasets import Images, code, icon_names, kept
from bench.intervals import over_queries, over_seeds
from bench.runs import Run, per_query, per_question, with_bases
from bench.splits import PROTOCOLS, QUERY_ARTISTS, Size, seen_by_old, split
from bench.sweep import DEFAULTS, table
from bench.train import override, selected
from bench.train_speed import KINDS, summary
from bench.train_table import aims, points, scores


def emoji(classes: int = 40) -> Images:
    artists = ("blobs", "fluent", *QUERY_ARTISTS)
    labels, by = zip(*((f"{number:03d}", artist) for number in range(classes) for artist in artists), strict=True)
    none = np.full(len(labels), "")
    return Images(
        "emoji", Path(), tuple(map("/".join, zip(by, labels, strict=True))), np.array(labels), np.array(by), none, ""
    )


def fashion(train: int = 200, test: int = 100) -> Images:
    number = train + test
    parts = np.array(["train"] * train + ["test"] * test)
    labels = np.array([str(row % 10) for row in range(number)])
    return Images("fashion", Path(), tuple(map(str, range(number))), labels, np.full(number, ""), parts, "")


class TestSplits:
    def test_no_class_of_the_open_set_is_both_trained_on_and_asked_for(self) -> None:
        images = emoji()
        whole = split(images, Size(), seed=1)
        tested = set(images.labels[whole.test_rows])
        assert len(tested) == 12  # 30 % of 40
        assert not tested & set(images.labels[whole.train])
        assert len(whole.train) + len(whole.test_rows) == len(images.paths)

    def test_each_test_of_the_open_set_asks_with_one_artist(self) -> None:
        images = emoji()
        for artist, test in zip(QUERY_ARTISTS, split(images, Size(), seed=1).tests, strict=True):
            assert set(images.artists[test.queries]) == {artist}
            assert artist not in set(images.artists[test.gallery])
            assert set(images.labels[test.queries]) == set(images.labels[test.gallery])

    def test_a_smaller_open_set_has_fewer_classes_with_all_their_drawings(self) -> None:
        images = emoji()
        whole, half = split(images, Size(), seed=1), split(images, Size(train=56), seed=1)
        assert len(half.train) == 56
        assert set(half.train) < set(whole.train)
        assert np.all(np.unique(images.labels[half.train], return_counts=True)[1] == 4)
        assert np.array_equal(half.test_rows, whole.test_rows)

    def test_the_closed_set_keeps_training_queries_and_gallery_apart(self) -> None:
        images = fashion()
        whole = split(images, Size(120, 20, 50), seed=0)
        (test,) = whole.tests
        assert (len(whole.train), len(test.queries), len(test.gallery)) == (120, 20, 50)
        assert set(images.parts[whole.train]) == {"train"}
        assert set(images.parts[whole.test_rows]) == {"test"}
        assert not set(test.queries) & set(test.gallery)

    @pytest.mark.parametrize("images", [emoji(), fashion()], ids=["emoji", "fashion"])
    def test_a_seed_decides_everything(self, images: Images) -> None:
        one, same, other = (split(images, Size(train=100), seed=seed) for seed in (3, 3, 4))
        assert np.array_equal(one.train, same.train)
        assert not np.array_equal(one.train, other.train)

    def test_the_old_encoder_saw_a_part(self) -> None:
        images = emoji()
        train = split(images, Size(), seed=0).train
        seen = {protocol: seen_by_old(images, train, protocol, seed=0) for protocol in PROTOCOLS}
        assert len(seen["extended_data"]) == round(0.3 * len(train))
        assert set(seen["extended_data"]) < set(train)
        classes = set(images.labels[seen["extended_class"]])
        assert len(classes) == round(0.3 * 28)
        assert np.array_equal(seen["extended_class"], train[np.isin(images.labels[train], sorted(classes))])
        assert np.array_equal(seen["extended_backbone"], train)


def entry(unified: str, **others: Any) -> dict[str, Any]:
    return {"unified": unified, "name": "", "category": "Objects", "subcategory": "tool", "short_names": [], **others}


class TestEmoji:
    def test_code_points_have_one_form(self) -> None:
        assert code("2764-FE0F-200D-1F525") == code("2764-200d-1f525") == "2764-200d-1f525"

    @pytest.mark.parametrize(
        "left_out",
        [
            entry("1F1EA-1F1EC", category="Flags"),
            entry("1F3FB", category="Component"),
            entry("1F46A", category="People & Body", subcategory="family"),
            entry("1F3C3-200D-2640-FE0F", category="People & Body"),
            entry("1F468-200D-1F373", category="People & Body"),
            entry("1F550", name="CLOCK FACE ONE OCLOCK"),
            entry("25FD", name="WHITE MEDIUM SMALL SQUARE"),
        ],
        ids=lambda one: one["unified"],
    )
    def test_look_alikes_are_left_out(self, left_out: dict[str, Any]) -> None:
        assert not kept(left_out)

    @pytest.mark.parametrize("of_its_own", [entry("1F468"), entry("1F9D1-200D-1F373"), entry("2642"), entry("1F528")])
    def test_others_are_kept(self, of_its_own: dict[str, Any]) -> None:
        assert kept(of_its_own)

    def test_an_icon_is_known_by_any_of_its_names_unless_two_code_points_have_it(self) -> None:
        wanted = {
            "1f428": entry("1F428", name="KOALA", short_names=["koala"]),
            "1f535": entry("1F535", name="LARGE BLUE CIRCLE", short_names=["circle"]),
            "1f534": entry("1F534", name="LARGE RED CIRCLE", short_names=["circle"]),
        }
        names = icon_names(wanted, [{"1F428-FE0F": "koala-bear"}])
        assert names == {
            "koala": "1f428",
            "koalabear": "1f428",
            "largebluecircle": "1f535",
            "largeredcircle": "1f534",
        }


class TestIntervals:
    def test_over_seeds_is_students(self) -> None:
        mean, low, high = over_seeds([1.0, 2.0, 3.0])
        reach = 4.302653 * 1.0 / math.sqrt(3)
        assert (mean, low, high) == pytest.approx((2.0, 2.0 - reach, 2.0 + reach), abs=1e-5)

    def test_one_seed_has_no_interval(self) -> None:
        mean, low, high = over_seeds([0.5])
        assert mean == 0.5
        assert math.isnan(low)
        assert math.isnan(high)

    def test_over_queries_of_one_seed_is_as_wide_as_the_normal_one(self) -> None:
        values = np.random.default_rng(0).normal(0.1, 1.0, 400)
        mean, low, high = over_queries([values])
        reach = 1.96 * values.std() / math.sqrt(400)
        assert mean == pytest.approx(values.mean())
        assert (low, high) == pytest.approx((mean - reach, mean + reach), abs=0.1 * reach)

    def test_over_queries_counts_the_spread_between_seeds(self) -> None:
        near = [np.full(50, value) for value in (0.1, 0.1, 0.1)]
        far = [np.full(50, value) for value in (-0.2, 0.1, 0.4)]
        assert over_queries(near) == pytest.approx((0.1, 0.1, 0.1))
        mean, low, high = over_queries(far)
        assert mean == pytest.approx(0.1)
        assert low < -0.05 < 0.25 < high


class TestTable:
    def test_parity_scores_a_half(self) -> None:
        assert scores(0.8, 0.5, 0.5, 0.8) == pytest.approx({"p_up": 0.5, "p_comp": 0.5, "p_1": 0.5})

    def test_where_nothing_can_be_gained_there_is_no_p_comp(self) -> None:
        found = scores(0.8, 0.5, 0.8, 0.8)
        assert found["p_up"] == 0.5
        assert math.isnan(found["p_1"])

    def test_points_show_an_interval_where_there_is_one(self) -> None:
        assert points({"mean": 0.123, "low": 0.11, "high": 0.14}) == "12.3 [11.0, 14.0]"
        assert points({"mean": 0.123, "low": math.nan, "high": math.nan}, sign=True) == "+12.3"

    def test_aims_are_met_or_missed_one_by_one(self) -> None:
        def row(method: str, p_1: list[float], *, cross: float = 0.01, same: float = 0.0) -> dict[str, Any]:
            return {
                "dataset": "emoji",
                "protocol": "extended_data",
                "method": method,
                "seeds": [0, 1, 2],
                "values": {"p_1": p_1},
                "cross_minus_old": {"mean": cross + 0.01, "low": cross, "high": cross + 0.02},
                "self_minus_independent": {"mean": same, "low": same - 0.02, "high": same + 0.02},
            }

        ours = row("advbct", [0.50, 0.51, 0.52], cross=-0.001, same=-0.004)
        place, average = aims([ours, row("bct", [0.49, 0.50, 0.51]), row("lce", [0.60, 0.61, 0.62])])
        assert not place["cross_beats_old"]
        assert place["self_within_half_a_point"]
        assert place["beaten_by"] == ["lce"]
        assert average["above_bct"]
        assert average["p_1_minus_bct_on_average"]["mean"] == pytest.approx(0.01)

    def test_what_is_asked_for(self) -> None:
        assert selected("emoji/extended_data/bct", [])
        assert selected("emoji/extended_data/bct", ["fashion", "emoji/extended_data"])
        assert selected("emoji/extended_data/bct", ["*/*/bct"])
        assert not selected("emoji/extended_data/bct", ["emoji/extended_data/lce"])

    def test_settings_are_read_as_values(self) -> None:
        assert [override(text) for text in ("lr=0.1", "spring=False", "discriminator_norm=batch")] == [
            ("lr", 0.1),
            ("spring", False),
            ("discriminator_norm", "batch"),
        ]

    def test_a_variant_is_compared_with_the_defaults_seed_by_seed(self) -> None:
        def run(**means: float) -> SimpleNamespace:
            result = {"means": {f"{side}/map@100": value for side, value in means.items()}}
            return SimpleNamespace(done=True, result=lambda: result)

        done: list[Any] = []
        for seed, level in enumerate((0.5, 0.6)):
            bases = {"old": run(self=level), "independent": run(self=level + 0.2)}
            methods = {
                DEFAULTS: run(self=level + 0.1, cross=level + 0.01),
                "spring=False": run(self=level + 0.1, cross=level + 0.03 + 0.02 * seed),
            }
            done.append(SimpleNamespace(dataset="emoji", protocol="extended_data", seed=seed, methods=methods, **bases))
        average = next(row for row in table(done) if row["variant"] == "spring=False" and row["place"] == "average")
        assert average["seeds"] == 2
        assert average["cross - old"]["mean"] == pytest.approx(4.0)
        assert average["cross - old, gain"]["mean"] == pytest.approx(3.0)
        assert average["self - independent, gain"]["mean"] == pytest.approx(0.0)

    def test_ratios_of_steps_are_of_their_times(self) -> None:
        rates = dict(zip(KINDS, ([110.0, 110.0], [100.0, 90.0], [50.0, 90.0], [25.0, 30.0]), strict=True))
        found = summary(rates)
        assert found["advbct_over_arcface"] == {"median": 1.5, "least": 1.0, "largest": 2.0}
        assert found["published_over_advbct"] == {"median": 2.5, "least": 2.0, "largest": 3.0}


class TestMetrics:
    def test_the_answers_of_two_artists_to_one_class_are_one_value(self) -> None:
        images = emoji(classes=10)
        whole = split(images, Size(), seed=0)
        vectors = np.eye(len(whole.test_rows), dtype=np.float32)
        first = per_query(images, whole, vectors, vectors, "recall@1")
        assert len(first) == 2 * 3
        values = np.array([1.0, 0.0, np.nan, 0.0, 0.0, np.nan])
        assert per_question(images, whole, values).tolist() == [0.5, 0.0]  # and the third class was never answered

    def test_an_encoder_that_knows_every_class_is_always_right(self) -> None:
        images = emoji(classes=10)
        whole = split(images, Size(), seed=0)
        _, classes = np.unique(images.labels[whole.test_rows], return_inverse=True)
        vectors = np.eye(3, dtype=np.float32)[classes]
        assert per_query(images, whole, vectors, vectors, "map@100").tolist() == [1.0] * 6
        turned = np.roll(vectors, 1, axis=1)
        assert per_query(images, whole, turned, vectors, "recall@1").tolist() == [0.0] * 6


class TestRuns:
    def run(self, **changed: Any) -> Run:
        basic: dict[str, Any] = {
            "dataset": "emoji", "digest": "d", "size": Size(), "seed": 0, "method": "independent", "arch": "a",
            "image_size": 32, "dim": 8, "settings": (("epochs", 3),),
        }  # fmt: skip
        return Run(**{**basic, **changed})

    def test_the_key_tells_apart_whatever_decides_the_outcome(self) -> None:
        base = self.run()
        others = [
            self.run(digest="e"),
            self.run(seed=1),
            self.run(size=Size(100)),
            self.run(settings=(("epochs", 4),)),
            self.run(method="advbct", builds_on=(base,)),
            self.run(method="advbct", builds_on=(self.run(seen="extended_data"),)),
        ]
        assert self.run().key == base.key
        assert len({run.key for run in [base, *others]}) == 7

    def test_what_others_build_on_comes_first_and_once(self) -> None:
        old, new = self.run(seen="extended_data"), self.run()
        mapped, trained = (
            self.run(method=name, builds_on=built) for name, built in (("ridge", (old, new)), ("bct", (old,)))
        )
        assert with_bases([trained, mapped, new]) == [old, trained, new, mapped]
