"""Self-contained HTML pages and their plots, and the output files named by command-line flags."""

import html
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from dpo_runner.errors import ConfigError
from dpo_runner.io.console import visible
from dpo_runner.io.files import write_text

if TYPE_CHECKING:
    import plotly.graph_objects as go

_LONGEST_LABEL = 60


@dataclass
class Plot:
    """A figure, `height` pixels high and as wide as the page, with its heading and note."""

    heading: str
    note: str
    figure: "go.Figure"
    height: int


def render_page(template: Path, filters: Mapping[str, Callable[..., Any]], **values: Any) -> str:
    """Render a page as HTML.

    Text from data or configuration is never markup: Jinja2 escapes it, `escape_label` escapes it for plotly, and the
    page's content security policy runs only the page's own scripts and loads nothing.

    Args:
        template: a file that includes `page_head.html`; it receives `plotlyjs`, and a `nonce` for scripts.
        filters: Jinja2 filters for the template.
        values: template variables; `Markup` values are not escaped.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    def finalize(value: Any) -> Any:
        return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    page = environment.get_template(template.name)
    return page.render(**values, plotlyjs=Markup(get_plotlyjs()), nonce=secrets.token_urlsafe(16))


def plot_layout(left: int, right: int, top: int, bottom: int) -> dict[str, Any]:
    """Return the layout shared by all figures; the page sets colours of text and lines, in light and dark mode."""
    return {
        "template": "none",
        "margin": {"l": left, "r": right, "t": top, "b": bottom},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "autosize": True,
        "showlegend": False,
    }


def escape_label(text: str) -> str:
    """Return text from data as a one-line plot label, escaped: plotly interprets some tags and entities."""
    line = " ".join(visible(text).split())
    return html.escape(line if len(line) <= _LONGEST_LABEL else line[: _LONGEST_LABEL - 1] + "…", quote=False)


def check_targets(targets: dict[str, Path]) -> None:
    """Check that output files can be written, before minutes of work.

    Args:
        targets: output files by flag, such as `--html`.

    Raises:
        ConfigError: one line for each bad target.
    """
    mistakes = []
    for flag, path in targets.items():
        if path.is_dir():
            mistakes.append(f"{flag} {path}: is a folder; name a file")
        elif not path.parent.is_dir():
            mistakes.append(f"{flag} {path}: no such folder {path.parent}")
    for (flag, path), (other, second) in combinations(targets.items(), 2):
        if path.resolve() == second.resolve():
            mistakes.append(f"{flag} and {other}: both name {path}")
    if mistakes:
        raise ConfigError(mistakes)


def write_report(flag: str, path: Path, text: str, console: Console) -> None:
    """Write the output file of a flag, and report its path.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        write_text(path, text)
    except OSError as error:
        raise ConfigError(f"{flag} {path}: cannot be written; {error.strerror}") from None
    console.print(Text(visible(f"{flag.removeprefix('--')} written to {path}"), overflow="fold"), soft_wrap=True)
