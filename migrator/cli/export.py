"""`migrator export`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from migrator.cli.common import json_option, migration_options, open_project, print_json, say

if TYPE_CHECKING:
    from migrator.trainer.encoders.export import Format
    from migrator.trainer.encoders.spec import EncoderSpec


@click.command("export")
@migration_options
@click.option("--encoder", help="old, new, or an encoder's id. Default: the new one, if there is one.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["pt2", "onnx", "safetensors"]),
    required=True,
    help="A program of torch.export, an ONNX model, or a state dict as training writes it.",
)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The file; it must not exist yet.")
@json_option
def command(
    name: str | None, config_path: Path, encoder: str | None, form: Format, output: Path, as_json: bool
) -> None:
    """Write an encoder as a .pt2, .onnx or .safetensors file.

    The file is loaded again and must give the same vectors. Its manifest is written beside it.
    """
    with open_project(config_path, name) as project:
        spec, expected = project.declared_encoder(encoder)
        from migrator.trainer.encoders.export import export_encoder

        loaded = project.load_only(spec, expected, device="cpu")
        exported = export_encoder(loaded, spec, output, form)
        folder = project.config.folder
    declared = {**declaration(exported.spec), "weights": os.path.relpath(output.resolve(), folder.resolve())}
    if as_json:
        print_json(
            {
                "encoder": loaded.id,
                "exported": exported.encoder.id,
                "output": str(output),
                "pictures": exported.pictures,
                "cosine": exported.cosine,
                "difference": exported.difference,
                "declaration": declared,
            }
        )
        return
    import yaml

    say(
        f"{loaded.id} exported to {output}: the same vectors for {exported.pictures} pictures (minimum cosine "
        f"{exported.cosine:.6f}, greatest difference {exported.difference:.1e})"
    )
    flow = yaml.safe_dump(declared, default_flow_style=True, sort_keys=False, width=10_000).strip()
    click.echo(f"in migrations.yaml it is {exported.encoder.id}: {flow}")


def declaration(spec: EncoderSpec) -> dict[str, Any]:
    """An encoder as `migrations.yaml` declares it, without keys at their defaults."""
    from dataclasses import fields

    from migrator.trainer.encoders.architecture import PROGRAMS
    from migrator.trainer.factories import MODULE

    preprocessing = spec.preprocessing
    keys: dict[str, Any] = {}
    if spec.arch.startswith(MODULE):
        keys["module"] = spec.arch.removeprefix(MODULE)
    elif spec.arch not in PROGRAMS:
        keys["arch"] = spec.arch
    keys |= {"weights": str(spec.weights), "dim": spec.dim}
    if spec.head is not None:
        keys["head"] = spec.head
    if preprocessing.transform is not None and preprocessing.transform == spec.arch:
        return keys
    for field in fields(preprocessing):
        value = getattr(preprocessing, field.name)
        if preprocessing.transform is not None and field.name in ("mean", "std"):
            continue  # the transform's own
        if value != field.default or (preprocessing.transform is not None and field.name in ("exif", "convert")):
            keys[field.name] = list(value) if isinstance(value, tuple) else value
    return keys
