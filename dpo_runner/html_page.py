"""HTML pages that need no network and run nothing out of the data that they show."""

import html
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dpo_runner.console import visible

_LONGEST_LABEL = 60


def render_page(template: str, filters: Mapping[str, Callable[..., Any]], **values: Any) -> str:
    """Return a page as HTML.

    Whatever comes from data or configuration is text in it: Jinja2 escapes it, plots get it escaped for plotly's own
    markup, and the page's policy runs no script but the page's own and loads nothing.

    Args:
        template: a file of this folder, which includes `page_head.html`; it gets `plotlyjs`, and a `nonce` for scripts.
        filters: of the template.
        values: what it shows; texts that are `Markup` stay as they are.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    def finalize(value: Any) -> Any:
        return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    page = environment.get_template(template)
    return page.render(**values, plotlyjs=Markup(get_plotlyjs()), nonce=secrets.token_urlsafe(16))


def escape_label(text: str) -> str:
    """Return data's text as one line of a plot, where plotly takes some tags and entities as markup."""
    line = " ".join(visible(text).split())
    return html.escape(line if len(line) <= _LONGEST_LABEL else line[: _LONGEST_LABEL - 1] + "…", quote=False)
