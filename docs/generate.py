"""Write what `ssnas.config.schema` declares: docs/parameters.md, and params.yaml's JSON schema."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import json
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ssnas.config import schema
from ssnas.config.decide import MULTI_LABEL_DECISIONS

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "parameters.md"
JSON_SCHEMA = ROOT / "docs" / "params.schema.json"
HEAD = """\
<!-- Written by `python -m docs.generate` from ssnas/config/schema.py: change the text there. -->
# Parameters

A value comes from three layers, the later ones winning:

1. the default in `ssnas/config/schema.py`;
2. the preset of the scale, under `scales` in `params.yaml`;
3. what `params.yaml` itself sets, or the entry of a row in `papers/systems.yaml`.

| To set | write |
| --- | --- |
| a key that `params.yaml` lists | `dvc exp run -S finetune.gamma=1` |
| one that it does not list | `dvc exp run -S '+search.batch_size=64'` |
| one that the scale presets | `dvc exp run -S scales.small.search.epochs=40` |

A wrong key or value ends the run with one line that names it and says what is accepted.

In the tables, "Published" is the papers' value: T21's, unless another paper is named (DARTS: Liu et
al. 2019; FairDARTS: Chu et al. 2020; PC-DARTS: Xu et al. 2020; Barlow Twins: Zbontar et al. 2021;
SimCLR: Chen et al. 2020). "open" means that T21 does not say; [Fidelity](fidelity.md) has the
reasons for ours.
"""


def meanings(section: type) -> dict[str, tuple[str, str]]:
    """The meaning and the published value of each key, from the texts below the keys.

    A key of a base class keeps its text where the section gives it none.

    Args:
        section: a dataclass of `ssnas.config.schema`.
    """
    texts: dict[str, tuple[str, str]] = {}
    for base in reversed(section.__mro__[:-1]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for field, text in zip(definition.body, definition.body[1:], strict=False):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=key)), ast.Expr(ast.Constant(str(below))):
                    meaning, _, published = " ".join(below.split()).partition(" Published: ")
                    texts[key] = meaning.removesuffix("."), published.removesuffix(".")
    return texts


def page() -> str:
    """The whole text of docs/parameters.md."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    parts = [HEAD, *_top_level(params), *_scales(params["scales"])]
    for name, section in schema.SECTIONS.items():
        summary, _, more = (inspect.getdoc(section) or "").partition("\n\n")
        parts += [f"## {name}", " ".join(summary.split()), *([more] if more else [])]
        parts.append(_table(("Key", "Default", "Accepted", "Meaning", "Published"), _rows(section)))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def json_schema() -> dict[str, Any]:
    """Describe params.yaml for editors, as a JSON schema (draft 2020-12)."""
    sections = {name: _section_schema(section) for name, section in schema.SECTIONS.items()}
    scaled = {name: sections[name] for name in schema.SCALED}
    top: dict[str, dict[str, Any]] = {
        key: {"description": meaning} for key, meaning in schema.TOP_LEVEL.items()
    }
    for key in ("dataset", "recipe", "loss"):
        section = schema.Data if key == "dataset" else schema.Finetune
        top[key] |= _key_schema(section, key)
    top["loss"] |= {"enum": [*top["loss"]["enum"], None], "default": None}
    top["seed"] |= {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
    top["scale"] |= {"type": "string"}
    top["device"] |= {"type": "string"}
    frequencies = {
        "type": "object",
        "additionalProperties": {"type": "number", "minimum": 0, "maximum": 1},
    }
    top["decide"] |= {"anyOf": [{"enum": list(MULTI_LABEL_DECISIONS)}, frequencies]}
    scale = {"type": "object", "properties": scaled, "additionalProperties": False}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "params.yaml",
        "type": "object",
        "properties": {
            **top,
            **sections,
            "scales": {"type": "object", "additionalProperties": scale},
        },
        "additionalProperties": False,
    }


def _section_schema(section: type) -> dict[str, Any]:
    texts = meanings(section)
    keys = {
        field.name: {"description": texts[field.name][0], **_key_schema(section, field.name)}
        for field in dataclasses.fields(section)
    }
    summary = (inspect.getdoc(section) or "").partition("\n\n")[0]
    return {
        "description": " ".join(summary.split()),
        "type": "object",
        "properties": keys,
        "additionalProperties": False,
    }


def _key_schema(section: type, key: str) -> dict[str, Any]:
    """The JSON schema of one key: its type, its limits, its default."""
    fields = {field.name: field for field in dataclasses.fields(section)}
    hint, limits = schema.hints_of(section)[key], fields[key].metadata
    optional = isinstance(hint, types.UnionType)
    kind = typing.get_args(hint)[0] if optional else hint
    nothing = ["null"] if optional else []
    described: dict[str, Any] = {"default": fields[key].default}
    if "choices" in limits:
        choices = list(schema.choices_of(limits["choices"]))
        return described | {"enum": [*choices, *([None] if optional else [])]}
    # YAML 1.1 reads 3e-4 as text, which is accepted.
    names = {int: ["integer"], float: ["number", "string"], str: ["string"], bool: ["boolean"]}
    words = {"low": "minimum", "above": "exclusiveMinimum", "high": "maximum"}
    return (
        described
        | {"type": [*names[kind], *nothing]}
        | {word: limits[name] for name, word in words.items() if name in limits}
    )


def written() -> dict[Path, str]:
    """The text of each file that this module writes."""
    document = json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"
    return {PAGE: page(), JSON_SCHEMA: document}


def accepted(field: dataclasses.Field[Any], hint: Any) -> str:
    """The limits of a key as a reader sees them, such as "a number, > 0 and ≤ 0.5"."""
    limits = field.metadata
    optional = isinstance(hint, types.UnionType)
    kind = typing.get_args(hint)[0] if optional else hint
    if "choices" in limits:
        text = ", ".join(f"`{choice}`" for choice in schema.choices_of(limits["choices"]))
    else:
        words = {int: "whole", float: "number", str: "text", bool: "true, false"}
        signs = {"low": "≥", "above": ">", "high": "≤"}
        bounds = [f"{sign} {limits[name]:,.10g}" for name, sign in signs.items() if name in limits]
        text = ", ".join([words[kind], *([" and ".join(bounds)] if bounds else [])])
    return f"{text}, or null" if optional else text


def _rows(section: type) -> Iterator[tuple[str, ...]]:
    hints, texts = schema.hints_of(section), meanings(section)
    for field in dataclasses.fields(section):
        meaning, published = texts[field.name]
        yield (
            f"`{field.name}`",
            _yaml(field.default),
            accepted(field, hints[field.name]),
            meaning,
            published or "–",
        )


def _top_level(params: Mapping[str, Any]) -> list[str]:
    rows = [
        (f"`{key}`", _yaml(params[key]), meaning.removesuffix("."))
        for key, meaning in schema.TOP_LEVEL.items()
    ]
    return ["## Top level of params.yaml", _table(("Key", "In `params.yaml`", "Meaning"), rows)]


def _scales(scales: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    keys = dict.fromkeys(
        (section, key)
        for preset in scales.values()
        for section in preset
        for key in preset[section]
    )
    rows = []
    for section, key in keys:
        values = (preset.get(section, {}) for preset in scales.values())
        cells = [_yaml(value[key]) if key in value else "–" for value in values]
        rows.append((f"`{section}.{key}`", *cells))
    note = (
        "Systems that need other values at a scale say so themselves, under `small` and `paper` in "
        "`papers/systems.yaml`."
    )
    return ["## Scales", _table(("Key", *(f"`{name}`" for name in scales)), rows), note]


def _yaml(value: Any) -> str:
    """The value as params.yaml writes it; 0.0003 rather than 3e-4, which YAML reads as text."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return f"`{value}`" if isinstance(value, str) else f"{value:.10f}".rstrip("0").rstrip(".")


def _table(head: tuple[str, ...], rows: typing.Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; status 1 if it is not up to date"
    )
    check = parser.parse_args().check
    for path, text in written().items():
        if not check:
            path.write_text(text, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != text:
            sys.exit(f"{path}: not up to date; run `python -m docs.generate`")
