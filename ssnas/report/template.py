"""The templates of the page and of the model card."""

from __future__ import annotations

from collections.abc import Callable

from jinja2 import Environment, PackageLoader, StrictUndefined, Template


def template(name: str, autoescape: bool, **filters: Callable[..., str]) -> Template:
    """Load a file of templates/; one that reads an undefined name fails."""
    environment = Environment(
        loader=PackageLoader("ssnas.report"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= filters
    return environment.get_template(name)
