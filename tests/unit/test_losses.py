"""Each term against its formula written as plain loops, and its gradients against finite differences."""

import math
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from migrator.trainer.errors import TrainingProblem
from migrator.trainer.losses.adversarial import AdversarialAlignment, GradientReversal, reversal_strength
from migrator.trainer.losses.angular_boundary import AngularBoundary
from migrator.trainer.losses.arcface import ArcFace
from migrator.trainer.losses.boundary import ElasticBoundary
from migrator.trainer.losses.centre_alignment import CentreAlignment
from migrator.trainer.losses.contrast import HARDEST, Contrast
from migrator.trainer.losses.influence import Influence
from migrator.trainer.methods.registry import METHODS, LossSettings, build_objective
from migrator.trainer.old_space import OldSpace

DIM, CLASSES, BATCH = 6, 4, 12


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Features, labels and old vectors in float64."""
    features = 3 * torch.randn(BATCH, DIM, dtype=torch.float64)
    old = torch.nn.functional.normalize(torch.randn(BATCH, DIM, dtype=torch.float64))
    return features, torch.randint(0, CLASSES, (BATCH,)), old


@pytest.fixture
def old_space() -> OldSpace:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(CLASSES, DIM)).astype(np.float32) / np.float32(4)
    return OldSpace(centres, np.array([0.3, 0.9, 1.2, 0.0], np.float32), np.array([True, True, True, False]))


def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def unit(vector: list[float]) -> list[float]:
    length = math.sqrt(sum(x * x for x in vector))
    return [x / length for x in vector]


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def cross_entropy(logits: list[float], label: int) -> float:
    top = max(logits)
    return math.log(sum(math.exp(x - top) for x in logits)) + top - logits[label]


def arcface_in_loops(features: Tensor, labels: Tensor, weight: Tensor, scale: float, margin: float) -> float:
    total = 0.0
    for feature, label in zip(features.tolist(), labels.tolist(), strict=True):
        logits = []
        for c, row in enumerate(weight.tolist()):
            cosine = dot(unit(feature), unit(row))
            if c == label:
                theta = math.acos(max(-1, min(1, cosine)))
                beyond = theta > math.pi - margin
                cosine = cosine - margin * math.sin(margin) if beyond else math.cos(theta + margin)
            logits.append(scale * cosine)
        total += cross_entropy(logits, label)
    return total / len(features)


@pytest.mark.parametrize("margin", [0.0, 0.3, 2.0])  # at 2.0 many angles lie beyond pi - m
def test_arcface_is_its_formula(batch: tuple[Tensor, Tensor, Tensor], margin: float) -> None:
    features, labels, _ = batch
    loss = ArcFace(DIM, CLASSES, scale=30.0, margin=margin).double()
    expected = arcface_in_loops(features, labels, loss.weight, 30.0, margin)
    assert loss(features, labels).item() == pytest.approx(expected, rel=1e-9)


def test_arcface_gradient(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    features, labels, _ = batch
    loss = ArcFace(DIM, CLASSES, scale=5.0, margin=0.3).double()

    def with_weight(features: Tensor, weight: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(loss, {"weight": weight}, (features, labels))
        return result

    inputs = (features.requires_grad_(), loss.weight.detach().clone().requires_grad_())
    assert torch.autograd.gradcheck(with_weight, inputs)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_arcface_of_a_feature_on_its_class_direction_has_a_finite_gradient(sign: float) -> None:
    loss = ArcFace(DIM, CLASSES, scale=30.0, margin=0.3)
    features = (sign * 7 * loss.weight.detach()[1:2]).requires_grad_()
    loss(features, torch.tensor([1])).backward()
    assert torch.isfinite(gradient(features)).all()
    assert torch.isfinite(gradient(loss.weight)).all()


def test_arcface_can_start_from_the_old_centres(old_space: OldSpace) -> None:
    loss = ArcFace(DIM, CLASSES, scale=30.0, margin=0.3)
    before = loss.weight.detach().clone()
    loss.start_from(torch.from_numpy(old_space.centres), torch.from_numpy(old_space.known))
    for row, start, centre, known in zip(loss.weight, before, old_space.centres, old_space.known, strict=True):
        if known:
            assert torch.allclose(row / row.norm(), torch.from_numpy(centre / np.linalg.norm(centre)), atol=1e-6)
            assert row.norm().item() == pytest.approx(start.norm().item(), rel=1e-5)
        else:
            assert torch.equal(row, start)


def boundary_in_loops(features: Tensor, labels: Tensor, loss: ElasticBoundary) -> tuple[float, float]:
    excesses, slacks = [], []
    for feature, label in zip(features.tolist(), labels.tolist(), strict=True):
        if not loss.known[label]:
            continue
        r_c = loss.radii[label].item()
        r = r_c + (loss.limit - r_c) / (1 + math.exp(-loss.w[label].item()))
        centre = loss.centres[label].tolist()
        distance = math.sqrt(sum((a - b) ** 2 for a, b in zip(unit(feature), centre, strict=True)))
        if distance > r:
            excesses.append(distance - r)
        slacks.append(r - r_c)
    return (sum(excesses) / len(excesses) if excesses else 0.0), sum(slacks) / len(slacks)


def test_boundary_is_its_formula(batch: tuple[Tensor, Tensor, Tensor], old_space: OldSpace) -> None:
    features, labels, _ = batch
    loss = ElasticBoundary(old_space, limit=1.0).double()
    excess, slack = boundary_in_loops(features, labels, loss)
    assert excess > 0
    assert loss(features, labels).item() == pytest.approx(excess, rel=1e-9)
    assert loss.slack(labels).item() == pytest.approx(slack, rel=1e-9)


def test_boundary_gradient(batch: tuple[Tensor, Tensor, Tensor], old_space: OldSpace) -> None:
    features, labels, _ = batch
    loss = ElasticBoundary(old_space, limit=1.0).double()

    def with_w(features: Tensor, w: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(loss, {"w": w}, (features, labels))
        return result

    assert torch.autograd.gradcheck(with_w, (features.requires_grad_(), loss.w.detach().clone().requires_grad_()))


def test_boundary_without_violation_or_without_known_class_is_zero_with_zero_gradient(old_space: OldSpace) -> None:
    loss = ElasticBoundary(old_space, limit=1.0)
    inside = old_space.centres[[2, 2]] / np.linalg.norm(old_space.centres[2])
    for features, labels in [(torch.from_numpy(inside), [2, 2]), (torch.randn(2, DIM), [3, 3])]:
        features.requires_grad_()
        value = loss(features, torch.tensor(labels))
        assert value.item() == 0
        value.backward()
        assert not gradient(features).any()


def test_radii_start_between_r_c_and_the_limit(old_space: OldSpace) -> None:
    loss = ElasticBoundary(old_space, limit=1.0)
    assert ((loss.w > -1) & (loss.w < 1)).all()
    radii = loss.elastic_radii()
    low = torch.minimum(loss.radii, torch.tensor(1.0))
    high = torch.maximum(loss.radii, torch.tensor(1.0))
    assert ((radii > low) & (radii < high)).all()


def test_the_spring_narrows_the_balls_that_are_violated_least(old_space: OldSpace) -> None:
    loss = ElasticBoundary(old_space, limit=1.5)
    far = torch.from_numpy(-old_space.centres[[0, 0, 0]])
    near = torch.from_numpy(old_space.centres[[1, 1, 1]])
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    (loss(torch.cat([far, near]), labels) + loss.slack(labels)).backward()
    assert gradient(loss.w)[0] < 0  # descent widens the violated ball
    assert gradient(loss.w)[1] > 0  # and narrows the other


def test_adversarial_is_its_formula(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    features, _, old = batch
    loss = AdversarialAlignment(DIM, hidden=5).double()
    first, norm, _, last = cast(Any, loss.discriminator)
    total = 0.0
    for vector, label in [(v, 0) for v in features.tolist()] + [(v, 1) for v in old.tolist()]:
        x = [math.sqrt(DIM) * value for value in unit(vector)]
        hidden = [dot(row, x) + b for row, b in zip(first.weight.tolist(), first.bias.tolist(), strict=True)]
        mean = sum(hidden) / len(hidden)
        deviation = math.sqrt(sum((h - mean) ** 2 for h in hidden) / len(hidden) + norm.eps)
        hidden = [max(0.0, (h - mean) / deviation) for h in hidden]  # the norm starts as identity
        logits = [dot(row, hidden) + b for row, b in zip(last.weight.tolist(), last.bias.tolist(), strict=True)]
        total += cross_entropy(logits, label)
    assert loss(features, old, progress=0.3).item() == pytest.approx(total / (2 * BATCH), rel=1e-9)


def test_adversarial_gradient_is_reversed_for_the_encoder_alone(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    features, _, old = batch
    features.requires_grad_()
    old.requires_grad_()
    loss = AdversarialAlignment(DIM).double()
    parameters = list(loss.discriminator.parameters())
    plain = torch.cat([torch.nn.functional.normalize(features), torch.nn.functional.normalize(old)])
    labels = torch.tensor([0] * BATCH + [1] * BATCH)
    without = torch.nn.functional.cross_entropy(loss.discriminator(loss.scale * plain), labels)
    expected = torch.autograd.grad(without, [features, old, *parameters])
    found = torch.autograd.grad(loss(features, old, progress=0.2), [features, old, *parameters])
    alpha = 2 / (1 + math.exp(-2.0)) - 1
    torch.testing.assert_close(found[0], -alpha * expected[0])
    for a, b in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, b)


def test_reversal_with_alpha_minus_one_passes_gradcheck(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    features = batch[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: GradientReversal.apply(x, -1.0) ** 2, (features,))


def test_reversal_strength_rises_from_nought_to_one() -> None:
    values = [reversal_strength(p) for p in np.linspace(0, 1, 11)]
    assert values[0] == 0
    assert values == sorted(values)
    assert values[-1] == pytest.approx(0.99991, abs=1e-5)


def test_discriminator_sees_a_shift_between_new_and_old() -> None:
    # The flaw of batch norms apart: a constant offset between the two sets must be learnable.
    loss = AdversarialAlignment(DIM)
    new = torch.randn(256, DIM)
    old = torch.nn.functional.normalize(new + 1.5)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        value = loss(new, old, progress=0.0)
        value.backward()
        optimizer.step()
    assert value.item() < 0.45  # blind: log 2 = 0.69


def cosine_to_centre(loss: ArcFace, old_space: OldSpace) -> float:
    return torch.nn.functional.cosine_similarity(loss.weight[0], torch.from_numpy(old_space.centres[0]), dim=0).item()


def test_advbct_adds_up_its_weighted_terms(batch: tuple[Tensor, Tensor, Tensor], old_space: OldSpace) -> None:
    features, labels, old = (batch[0].float(), batch[1], batch[2].float())
    settings = LossSettings(boundary_weight=7.0, adversarial_weight=3.0, anchor_weight=0.5)
    objective: Any = build_objective("advbct", settings, dim=DIM, classes=CLASSES, old=old_space)
    terms = objective(features, labels, old, progress=0.5, remaining=0.25)
    classification, boundary, adversarial = objective.classification, objective.boundary, objective.adversarial
    assert terms["classification"] == classification(features, labels)
    assert terms["boundary"] == 7 * boundary(features, labels)
    assert terms["adversarial"] == 3 * 0.25 * adversarial(features, old, progress=0.5)
    assert terms["slack"] == 7 * boundary.slack(labels)
    assert terms["anchor"] == 0.5 * objective.anchor(features, labels, old)


def test_the_published_recipe_has_no_spring_no_anchor_and_no_start_from_the_centres(
    batch: tuple[Tensor, Tensor, Tensor], old_space: OldSpace
) -> None:
    features, labels, old = (batch[0].float(), batch[1], batch[2].float())
    ours: Any = build_objective("advbct", LossSettings(), dim=DIM, classes=CLASSES, old=old_space)
    assert cosine_to_centre(ours.classification, old_space) == pytest.approx(1)
    objective: Any = build_objective("advbct", LossSettings(reference=True), dim=DIM, classes=CLASSES, old=old_space)
    assert cosine_to_centre(objective.classification, old_space) < 0.99
    assert set(objective(features, labels, old, progress=0, remaining=1)) == {
        "classification",
        "boundary",
        "adversarial",
    }


def directions_of(old: OldSpace) -> list[list[float] | None]:
    """What stands for each class in the influence loss: the classifier's row, else the centre, else nothing."""
    found: list[list[float] | None] = []
    for c in range(CLASSES):
        row = None if old.classifier is None else old.classifier[c].tolist()
        if row is not None and not any(math.isnan(x) for x in row):
            found.append(unit(row))
        else:
            found.append(unit(old.centres[c].tolist()) if old.known[c] else None)
    return found


def with_classifier(old: OldSpace) -> OldSpace:
    """Class 3, of which there are no old vectors, is known to the classifier, and class 0 is not."""
    rows = np.random.default_rng(1).normal(size=(CLASSES, DIM)).astype(np.float32)
    rows[0] = np.nan
    return replace(old, classifier=rows)


@pytest.mark.parametrize("through", ["centres", "classifier"])
def test_influence_is_its_formula(batch: tuple[Tensor, Tensor, Tensor], old_space: OldSpace, through: str) -> None:
    features, labels, _ = batch
    old = old_space if through == "centres" else with_classifier(old_space)
    directions = directions_of(old)
    assert [d is None for d in directions] == [False, False, False, through == "centres"]
    total, count = 0.0, 0
    for feature, label in zip(features.tolist(), labels.tolist(), strict=True):
        if directions[label] is None:
            continue
        logits = [30 * dot(unit(feature), d) if d is not None else -math.inf for d in directions]
        total += cross_entropy(logits, label)
        count += 1
    loss = Influence(old, scale=30.0).double()
    assert loss(features, labels).item() == pytest.approx(total / count, rel=1e-6)
    assert torch.autograd.gradcheck(loss, (features.requires_grad_(), labels))


def test_influence_of_classes_that_nobody_knew_is_zero(old_space: OldSpace) -> None:
    features = torch.randn(2, DIM, requires_grad=True)
    value = Influence(old_space, scale=30.0)(features, torch.tensor([3, 3]))
    assert value.item() == 0
    value.backward()
    assert not gradient(features).any()


def test_bct_adds_up_its_weighted_terms(batch: tuple[Tensor, Tensor, Tensor], old_space: OldSpace) -> None:
    features, labels, old = batch[0].float(), batch[1], batch[2].float()
    settings = LossSettings(influence_weight=2.0)
    objective: Any = build_objective("bct", settings, dim=DIM, classes=CLASSES, old=old_space)
    terms = objective(features, labels, old, progress=0.5, remaining=0.5)
    assert terms["influence"] == 2 * objective.influence(features, labels)
    assert set(terms) == {"classification", "influence"}
    assert not any(name.startswith("influence") for name, _ in objective.named_parameters())  # frozen


def test_centre_alignment_is_its_formula(old_space: OldSpace) -> None:
    weight = torch.randn(CLASSES, DIM, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 0, 2, 3])  # each class counts once; class 3 has no centre
    apart = [1 - dot(unit(weight[c].tolist()), unit(old_space.centres[c].tolist())) for c in (0, 2)]
    loss = CentreAlignment(old_space).double()
    assert loss(weight, labels).item() == pytest.approx(sum(apart) / 2, rel=1e-6)
    assert torch.autograd.gradcheck(lambda w: loss(w, labels), (weight,))


def test_angular_boundary_is_its_formula(batch: tuple[Tensor, Tensor, Tensor], old_space: OldSpace) -> None:
    features, labels, _ = batch
    excesses = []
    for feature, label in zip(features.tolist(), labels.tolist(), strict=True):
        if not old_space.known[label]:
            continue
        centre = old_space.centres[label].tolist()
        length, radius = math.sqrt(dot(centre, centre)), float(old_space.radii[label])
        allowed = math.acos(max(-1, min(1, (1 + length**2 - radius**2) / (2 * length))))
        angle = math.acos(dot(unit(feature), unit(centre)))
        excesses.append(max(0.0, angle - allowed))
    loss = AngularBoundary(old_space).double()
    assert any(excess > 0 for excess in excesses)
    assert loss(features, labels).item() == pytest.approx(sum(excesses) / len(excesses), rel=1e-6)
    assert torch.autograd.gradcheck(loss, (features.requires_grad_(), labels))


@pytest.mark.parametrize("label", [2, 3])
def test_lce_asks_nothing_of_features_inside_the_cone_or_of_unknown_classes(label: int, old_space: OldSpace) -> None:
    features = torch.from_numpy(old_space.centres[[label, label]]).requires_grad_()
    value = AngularBoundary(old_space)(features, torch.tensor([label, label]))
    assert value.item() == 0
    value.backward()
    assert not gradient(features).any()
    weight = torch.randn(CLASSES, DIM, requires_grad=True)
    CentreAlignment(old_space)(weight, torch.tensor([label, label])).backward()
    assert gradient(weight).any() == (label == 2)


def test_the_cone_of_the_angular_boundary_holds_what_the_ball_holds() -> None:
    centre = np.array([[0.8, 0.0]], np.float32)
    on_the_edge = torch.tensor([[math.cos(0.5), math.sin(0.5)]])
    radius = np.linalg.norm(on_the_edge.numpy() - centre, axis=1).astype(np.float32)
    loss = AngularBoundary(OldSpace(centre, radius, np.array([True])))
    assert loss.angles.item() == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("method", METHODS)
def test_a_perfect_fit_has_a_finite_gradient(method: str, length: float, old_space: OldSpace) -> None:
    # At length 1 with centres of unit length the boundary's distance, too, is exactly 0.
    old_space = replace(old_space, centres=old_space.centres / np.linalg.norm(old_space.centres, axis=1)[:, None])
    objective = build_objective(method, LossSettings(), dim=DIM, classes=CLASSES, old=old_space)
    features = (length * torch.from_numpy(old_space.centres[[0, 1, 2]])).requires_grad_()
    old = torch.nn.functional.normalize(features.detach())
    terms = objective(features, torch.tensor([0, 1, 2]), old, progress=1.0, remaining=0.1)
    torch.stack(list(terms.values())).sum().backward()
    assert torch.isfinite(gradient(features)).all()


@pytest.mark.parametrize("labelled", [True, False])
def test_contrast_is_its_formula(batch: tuple[Tensor, Tensor, Tensor], labelled: bool) -> None:
    features, labels, old = batch
    new, other = [unit(f) for f in features.tolist()], [unit(o) for o in old.tolist()]
    total = 0.0
    for i in range(BATCH):
        strangers = [j for j in range(BATCH) if (labels[j] != labels[i] if labelled else j != i)]
        logits = [dot(new[i], other[i])]
        for side in (other, new):
            logits += sorted((dot(new[i], side[j]) for j in strangers), reverse=True)[:HARDEST]
        total += cross_entropy([x / 0.1 for x in logits], 0)
    loss = Contrast(temperature=0.1, labelled=labelled)
    assert loss(features, labels, old).item() == pytest.approx(total / BATCH, rel=1e-9)
    assert torch.autograd.gradcheck(lambda f: loss(f, labels, old), (features.requires_grad_(),))


def test_hot_refresh_classifies_only_by_real_labels(batch: tuple[Tensor, Tensor, Tensor], old_space: OldSpace) -> None:
    features, labels, old = batch[0].float(), batch[1], batch[2].float()
    for labelled, names in ((True, {"contrast", "classification"}), (False, {"contrast"})):
        settings = LossSettings(labelled=labelled)
        objective = build_objective("hot_refresh", settings, dim=DIM, classes=CLASSES, old=old_space)
        assert set(objective(features, labels, old, progress=0, remaining=1)) == names


def test_reference_is_plain_softmax_and_a_discriminator_of_raw_features_with_batch_norms_apart(
    batch: tuple[Tensor, Tensor, Tensor], old_space: OldSpace
) -> None:
    features, labels, old = batch[0].float(), batch[1], batch[2].float()
    objective: Any = build_objective("advbct", LossSettings(reference=True), dim=DIM, classes=CLASSES, old=old_space)
    terms = objective(features, labels, old, progress=0.5, remaining=1.0)
    weight = objective.classification.weight.tolist()
    logits = [[dot(row, feature) for row in weight] for feature in features.tolist()]
    losses = [cross_entropy(row, label) for row, label in zip(logits, labels.tolist(), strict=True)]
    assert terms["classification"].item() == pytest.approx(sum(losses) / BATCH, rel=1e-5)
    discriminator = objective.adversarial.discriminator
    expected = 0.0
    for vectors, side in ((features, 0), (old, 1)):  # the means over the two sides are added
        logits = discriminator(vectors).tolist()
        expected += sum(cross_entropy(row, side) for row in logits) / BATCH
    assert terms["adversarial"].item() == pytest.approx(expected, rel=1e-5)


def test_independent_is_classification_alone(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    objective = build_objective("independent", LossSettings(), dim=DIM, classes=CLASSES, old=None)
    terms = objective(batch[0].float(), batch[1], None, progress=0, remaining=1)
    assert list(terms) == ["classification"]


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.needs_old])
def test_a_compatible_method_without_an_old_encoder_is_refused(method: str) -> None:
    with pytest.raises(TrainingProblem, match=f"method {method} needs the old encoder"):
        build_objective(method, LossSettings(), dim=DIM, classes=CLASSES, old=None)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_listed_without_loading_torch(method: str) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from migrator.trainer.methods.registry import METHODS\n"
        f"assert {method!r} in METHODS; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
