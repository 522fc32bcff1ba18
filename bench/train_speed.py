"""How fast a step of training is, `python -m bench train-speed`: ratios, in one run on one machine.

Four kinds of step over the same images, with the same backbone and optimiser: forward and backward of the bare
encoder; plain ArcFace; AdvBCT as the trainer has it; and the published recipe as one would first write it down (the old
model runs in each step, the boundary goes sample by sample). They take turns in short blocks, so that what else the
machine does meets all of them; a ratio is the median over the rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.machine import machine
from bench.memory import memory_of_this_process
from bench.results_files import heading, save

if TYPE_CHECKING:
    from torch import Tensor, nn

KINDS = ("forward + backward", "arcface", "advbct", "published")
IMAGES, CLASSES, DIM, BATCH = 2048, 200, 128, 128


def step_of(kind: str, arch: str, image_size: int, device: str, *, fast: bool) -> Callable[[], None]:
    """A function that does one step of training. `fast` is bf16 and torch.compile, for CUDA."""
    import torch
    import torch.nn.functional as F

    from bench.published import Published
    from migrator.trainer.data.augment import augmented, draw_views
    from migrator.trainer.encoders.building import build_model
    from migrator.trainer.encoders.spec import EncoderSpec
    from migrator.trainer.images.preprocessing import Preprocessing
    from migrator.trainer.methods.registry import LossSettings, build_objective
    from migrator.trainer.old_space import measure_old_space

    torch.manual_seed(0)
    random = np.random.default_rng(0)
    spec = EncoderSpec(arch, DIM, Preprocessing(image_size))
    labels = random.integers(0, CLASSES, IMAGES)
    vectors = random.standard_normal((CLASSES, DIM))[labels] + 0.5 * random.standard_normal((IMAGES, DIM))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    pixels = random.integers(0, 256, (IMAGES, 3, image_size, image_size), dtype=np.uint8)
    model = build_model(spec).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    settings = LossSettings()
    old_model: nn.Module | None = None
    objective: nn.Module | None = None
    if kind == "published":
        space = measure_old_space(vectors, labels, classes=CLASSES, quantile=1.0)
        objective = Published(space, DIM).to(device)
        old_model = build_model(spec).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        old_model.eval()
    elif kind != "forward + backward":
        space = measure_old_space(vectors, labels, classes=CLASSES, quantile=settings.radius_quantile)
        method = "independent" if kind == "arcface" else kind
        objective = build_objective(method, settings, dim=DIM, classes=CLASSES, old=space).to(device)
    parameters = [*model.parameters(), *(objective.parameters() if objective else ())]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    encoder: Callable[[Tensor], Tensor] = torch.compile(model) if fast else model
    mean, std = (
        torch.tensor(getattr(spec.preprocessing, name), device=device)[:, None, None] * 255 for name in ("mean", "std")
    )
    generator = torch.Generator().manual_seed(0)
    fixed = torch.from_numpy(pixels[:BATCH]).to(device)

    def embed(network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        ready = ((images - mean) / std).contiguous(memory_format=torch.channels_last)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=fast):
            return network(ready).float()

    def step() -> None:
        optimizer.zero_grad()
        if objective is None:
            embed(encoder, fixed).sum().backward()
            return
        rows = random.integers(0, IMAGES, BATCH)
        views = draw_views(BATCH, (image_size, image_size), flip=False, generator=generator)
        images = augmented(torch.from_numpy(pixels[rows]), views).to(device)
        old = torch.from_numpy(vectors[rows]).to(device)
        if old_model is not None:
            with torch.no_grad():
                old = F.normalize(embed(old_model, images))
        features = embed(encoder, images)
        terms = objective(features, torch.from_numpy(labels[rows]).to(device), old, progress=0.5, remaining=0.5)
        torch.stack(list(terms.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()

    return step


def rates(arch: str, image_size: int, device: str, *, fast: bool, rounds: int, steps: int) -> dict[str, list[float]]:
    """Images a second of each kind, a value a round."""
    made = {kind: step_of(kind, arch, image_size, device, fast=fast) for kind in KINDS}
    for step in made.values():
        for _ in range(3):
            step()
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(rounds):
        order = KINDS if number % 2 == 0 else KINDS[::-1]
        for kind in order:
            settle(device)
            began = time.perf_counter()
            for _ in range(steps):
                made[kind]()
            settle(device)
            found[kind].append(steps * BATCH / (time.perf_counter() - began))
    return found


def settle(device: str) -> None:
    """Waits until the device has finished."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def peak_mib(kind: str, arch: str, image_size: int, device: str, *, fast: bool) -> float:
    """The most memory that ten steps need, in a process of their own: of the process, or on CUDA of the device."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.train_speed", kind, arch, str(image_size), device, str(int(fast))],
        check=True,
        capture_output=True,
        text=True,
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


def peak_of_this_process(kind: str, arch: str, image_size: int, device: str, *, fast: bool) -> float:
    import torch

    step = step_of(kind, arch, image_size, device, fast=fast)
    for _ in range(10):
        step()
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return memory_of_this_process("VmHWM")


def summary(found: dict[str, list[float]]) -> dict[str, Any]:
    """Medians of the rates, and ratios of one step's time to another's with the least and the largest of the rounds."""

    def ratio(slow: str, quick: str) -> dict[str, float]:
        each = [b / a for a, b in zip(found[slow], found[quick], strict=True)]
        return {"median": statistics.median(each), "least": min(each), "largest": max(each)}

    return {
        "images_per_second": {kind: round(statistics.median(values), 1) for kind, values in found.items()},
        "advbct_over_arcface": ratio("advbct", "arcface"),
        "published_over_advbct": ratio("published", "advbct"),
        "advbct_over_bare": ratio("advbct", "forward + backward"),
    }


def measure(arch: str, image_size: int, device: str, *, fast: bool, rounds: int, steps: int) -> dict[str, Any]:
    found = summary(rates(arch, image_size, device, fast=fast, rounds=rounds, steps=steps))
    peaks = {kind: peak_mib(kind, arch, image_size, device, fast=fast) for kind in KINDS}
    how = "bf16 and compile" if fast else "float32"
    return {"device": device, "how": how, "arch": arch, "image_size": image_size, **found, "peak_mib": peaks}


def table(results: dict[str, Any]) -> str:
    lines = heading(
        "Speed of a training step",
        results,
        f"Batches of {BATCH}; medians of interleaved rounds, least and largest in brackets.",
    )
    lines += [
        "| device | encoder | AdvBCT step over ArcFace step (aim: at most 1.10) "
        "| published recipe over AdvBCT (aim: at least 1.5) | AdvBCT over bare forward + backward |",
        "|---|---|---|---|---|",
    ]

    def shown(ratio: dict[str, float]) -> str:
        return f"{ratio['median']:.2f} [{ratio['least']:.2f}, {ratio['largest']:.2f}]"

    for one in results["speed"]:
        ratios = (shown(one[name]) for name in ("advbct_over_arcface", "published_over_advbct", "advbct_over_bare"))
        what = f"{one['arch']} at {one['image_size']} px, {one['how']}"
        lines.append(f"| {one.get('device_name', one['device'])} | {what} | {' | '.join(ratios)} |")
    lines += ["", "| device | encoder | step | images/s | peak memory |", "|---|---|---|---|---|"]
    for one in results["speed"]:
        for kind in KINDS:
            lines.append(
                f"| {one.get('device_name', one['device'])} | {one['arch']} at {one['image_size']} px, {one['how']} | "
                f"{kind} | {one['images_per_second'][kind]:,.0f} | {math.ceil(one['peak_mib'][kind]):,} MiB |"
            )
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    import torch

    parser = argparse.ArgumentParser(prog="python -m bench train-speed", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args(argv)
    speed = [measure("resnet18", 64, "cpu", fast=False, rounds=args.rounds, steps=3)]
    if torch.cuda.is_available():
        for fast in (False, True):
            one = measure("resnet50", 224, "cuda", fast=fast, rounds=args.rounds, steps=20)
            speed.append({**one, "device_name": torch.cuda.get_device_name()})
    results = {"machine": machine(), "speed": speed}
    save("train_speed", results, table(results))


if __name__ == "__main__":
    kind, arch, image_size, device, fast = sys.argv[1:]
    print(json.dumps(peak_of_this_process(kind, arch, int(image_size), device, fast=fast == "1")))
