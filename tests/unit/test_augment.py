"""Shifts and mirrors: every one is reached, nothing else happens, and parts of a batch are seen as in the whole."""

import torch
from torch import Tensor

from migrator.trainer.data.augment import Views, augmented, draw_views


def views_of(count: int, side: int, *, flip: bool, seed: int = 0) -> Views:
    return draw_views(count, (side, side), flip=flip, generator=torch.Generator().manual_seed(seed))


def seen(image: Tensor, views: Views) -> Tensor:
    return augmented(image.expand(len(views.mirrored), -1, -1, -1), views)


def test_shifts_are_all_reached_and_repeat_the_edge() -> None:
    side, reach = 16, 2
    image = torch.arange(3 * side * side).reshape(1, 3, side, side)
    axis = torch.arange(side)
    found = set()
    for result in seen(image, views_of(400, side, flip=False)):
        inner = result[0, side // 2, side // 2].item()
        down, right = inner // side - side // 2, inner % side - side // 2
        rows, columns = (axis + down).clamp(0, side - 1), (axis + right).clamp(0, side - 1)
        torch.testing.assert_close(result, image[0][:, rows][:, :, columns])
        found.add((down, right))
    assert found == {(a, b) for a in range(-reach, reach + 1) for b in range(-reach, reach + 1)}


def test_about_half_are_mirrored_and_only_on_request() -> None:
    image = torch.arange(7).repeat(3, 7, 1)[None].to(torch.uint8)  # 7 pixels: too small to shift
    assert (seen(image, views_of(200, 7, flip=False)) == image).all()
    views = views_of(200, 7, flip=True)
    results = seen(image, views)
    assert (results[views.mirrored] == image.flip(3)).all()
    assert (results[~views.mirrored] == image).all()
    assert 60 < views.mirrored.sum() < 140


def test_a_mirrored_view_is_the_mirror_image_of_the_shifted_one() -> None:
    image = torch.rand(1, 3, 16, 16)
    views = views_of(50, 16, flip=True)
    plain = seen(image, Views(views.shift, torch.zeros(50, dtype=torch.bool)))
    torch.testing.assert_close(seen(image, views)[views.mirrored], plain.flip(3)[views.mirrored])


def test_views_follow_their_generator() -> None:
    image = torch.rand(1, 3, 16, 16)
    first, again, other = (seen(image, views_of(8, 16, flip=True, seed=seed)) for seed in (0, 0, 1))
    torch.testing.assert_close(first, again)
    assert not torch.equal(first, other)


def test_a_part_of_a_batch_is_seen_as_in_the_whole() -> None:
    batch = torch.rand(10, 3, 16, 16)
    views = views_of(10, 16, flip=True)
    part = slice(3, 7)
    torch.testing.assert_close(augmented(batch[part], views.part(part)), augmented(batch, views)[part])
