"""Write docs/images/: preview, compare and W&B's terminal view, as a real browser shows them.

    python scripts/make_screenshots.py                  # makes a sweep of four points first
    python scripts/make_screenshots.py --sweep DIR      # shows that one

Needs Chromium, and pyte, which draws the terminal (pip install pyte).
"""

import argparse
import fcntl
import html
import os
import pty
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path
from typing import Any

from PIL import Image

from scripts import ROOT

IMAGES = ROOT / "docs" / "images"
# A random model of two layers, which takes a minute. Its answers say nothing, and are not in the picture.
SWEEP = (
    "-m model=tiny_random training.beta=0.05,0.3 training.learning_rate=1e-5,5e-5 training.max_steps=20 "
    "training.eval_steps=2 data.max_train_samples=160 data.max_eval_samples=12 samples.num_prompts=3 "
    "samples.max_new_tokens=12"
)
COLUMNS, LINES = 132, 36
_COLOURS = {"black": "#1e1e1e", "brown": "#c9a227", "default": "#d8d8d8"}
_PAGE = """<!doctype html><meta charset="utf-8"><style>
body {{ margin: 0; background: #1e1e1e; color: #d8d8d8 }}
pre {{ margin: 12px; font: 13px/16px "DejaVu Sans Mono", monospace }}
span {{ display: inline-block; width: 8px; height: 16px; vertical-align: top }}
</style><pre>{}</pre>"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", type=Path, metavar="DIR", help="the directory of a finished sweep")
    args = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sweep = args.sweep or folder / "sweep"
        if args.sweep is None:
            run(folder, "dpo_runner", *SWEEP.split(), f"sweep.dir={sweep}")
        run(folder, "dpo_runner.preview", "--rows", "2", "--html", str(folder / "preview.html"))
        run(folder, "dpo_runner.compare", str(sweep.resolve()), "--html", str(folder / "compare.html"))
        terminal = show_in_terminal([sys.executable, "-m", "wandb", "leet", "wandb"], sweep)
        (folder / "leet.html").write_text(_PAGE.format(terminal), encoding="utf-8")
        for page, size in {"preview": (1100, 1000), "compare": (1300, 1150), "leet": (1080, 600)}.items():
            take_picture(folder / f"{page}.html", size, folder / "browser")


def run(folder: Path, module: str, *arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", module, *arguments], cwd=folder, env=environment, check=True)


def take_picture(page: Path, size: tuple[int, int], profile: Path) -> None:
    """Write a page's picture to docs/images/, in 128 colours."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("no browser; install Debian's chromium")
    picture = page.with_suffix(".png")
    switches = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=8000"]
    window = f"--window-size={size[0]},{size[1]}"
    command = [browser, *switches, window, f"--user-data-dir={profile}", f"--screenshot={picture}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(picture) as image:
        image.convert("RGB").quantize(128).save(IMAGES / picture.name, optimize=True)


def show_in_terminal(command: list[str], folder: Path) -> str:
    """Return what leet shows in a folder after some seconds, with the curves of several runs, as HTML."""
    try:
        import pyte
    except ImportError:
        sys.exit("pyte is not installed; pip install pyte")
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        os.environ.update(TERM="xterm-256color", COLORTERM="truecolor")
        os.execvp(command[0], command)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    for keys, seconds in ((b"", 6), (b" ", 2), (b"\x1b[B", 1), (b" ", 2), (b"\x1b[B", 1), (b" ", 3)):
        os.write(terminal, keys)
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if select.select([terminal], [], [], left)[0]:
                stream.feed(os.read(terminal, 65536))
    text = "\n".join(_describe_line(screen.buffer[line]) for line in range(LINES))
    os.write(terminal, b"q")
    os.kill(child, 9)
    os.waitpid(child, 0)
    return text


def _describe_line(line: Any) -> str:
    return "".join(map(_describe_cell, (line[column] for column in range(COLUMNS))))


def _describe_cell(cell: Any) -> str:
    front, back = (cell.bg, cell.fg) if cell.reverse else (cell.fg, cell.bg)
    style = f"color:{'#1e1e1e' if front == 'default' and cell.reverse else _find_colour(front)}"
    style += f";background:{_find_colour(back)}" if cell.reverse or back != "default" else ""
    return f'<span style="{style}">{html.escape(cell.data)}</span>'


def _find_colour(name: str) -> str:
    is_hexadecimal = len(name) == 6 and set(name) <= set("0123456789abcdef")
    return f"#{name}" if is_hexadecimal else _COLOURS.get(name, name)


if __name__ == "__main__":
    main()
