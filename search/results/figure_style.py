"""The look that all figures of a study share, and how a file is replaced in one step."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

# Okabe and Ito's palette, whose colours are told apart with any colour vision.
FRONT, OTHER, SEEDS, REFERENCE, AREA = "#0072B2", "#8C8C8C", "#E69F00", "#000000", "rgba(0, 114, 178, 0.10)"
# Lines of trials below the front, among lines whose colour is a number; a neutral grey is yellow to eyes without blue.
BELOW = "#D6E1EA"
INK, FAINT, GRID = "#1F2328", "#57606A", "#E4E7EB"
FONT = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"

# By default plotly offers to upload a figure with its data: a report talks to nobody.
PLOTLY_CONFIG = {
    "showSendToCloud": False,
    "plotlyServerURL": "",
    "displaylogo": False,
    "responsive": True,
    "modeBarButtonsToRemove": ["select2d", "lasso2d"],
}


def empty_figure(x_title: str, y_title: str) -> go.Figure:
    """Axes to draw on."""
    axis = {"gridcolor": GRID, "zeroline": False, "linecolor": "#AFB8C1", "ticks": "outside", "tickcolor": "#AFB8C1"}
    return go.Figure(
        layout={
            "font": {"family": FONT, "size": 13, "color": INK},
            "paper_bgcolor": "white",
            "plot_bgcolor": "white",
            "margin": {"l": 70, "r": 20, "t": 40, "b": 60},
            "height": 460,
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
            "hoverlabel": {"align": "left", "font_size": 12},
            "xaxis": axis | {"title": {"text": x_title}},
            "yaxis": axis | {"title": {"text": y_title}},
        }
    )


def time_unit(seconds: float) -> tuple[float, str]:
    """The unit in which the largest of several times reads well, and its length in seconds."""
    if seconds < 180:
        return 1.0, "seconds"
    return (60.0, "minutes") if seconds < 3 * 3600 else (3600.0, "hours")


def replace_file(path: Path | str, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a file beside `path` and move it there: a reader sees the old file or the new one."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=target.suffix)
    os.close(descriptor)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
