"""Makes the README's pictures of MLflow's pages from those that tests/test_ui.py has taken.

make slow ARGS=tests/test_ui.py
make pictures
"""

import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent
SCREENSHOTS = ROOT / "build" / "screenshots"
# Picture -> screenshot, and its part to show: left, top, right, bottom in shares of the whole.
PICTURES = {
    "mlflow-front": ("front", (0.0, 0.0, 1.0, 1.0)),
    "mlflow-study": ("study", (0.0, 0.0, 1.0, 1.0)),
}
WIDTH = 1400  # pixels; a README shows about half of it, on a fine screen all
MAX_BYTES = 200_000
COLORS = (256, 128, 64, 32)


def main() -> int:
    wanted = {SCREENSHOTS / f"{screenshot}.png" for screenshot, _ in PICTURES.values()}
    if missing := sorted(path.name for path in wanted if not path.exists()):
        print(
            f"{SCREENSHOTS} lacks {', '.join(missing)}: make slow ARGS=tests/test_ui.py takes them, with Chromium",
            file=sys.stderr,
        )
        return 2
    for name, (screenshot, part) in PICTURES.items():
        target = ROOT / "docs" / f"{name}.png"
        size = save_small(crop(Image.open(SCREENSHOTS / f"{screenshot}.png"), part), target)
        print(f"{target.relative_to(ROOT)}: {size / 1000:.0f} kB")
    return 0


def crop(image: Image.Image, part: tuple[float, float, float, float]) -> Image.Image:
    """The part of a picture, at most WIDTH wide."""
    left, top, right, bottom = part
    width, height = image.size
    box = (round(left * width), round(top * height), round(right * width), round(bottom * height))
    found = image.convert("RGB").crop(box)
    if found.width > WIDTH:
        found = found.resize((WIDTH, round(found.height * WIDTH / found.width)), Image.Resampling.LANCZOS)
    return found


def save_small(image: Image.Image, target: Path) -> int:
    """Write a picture as PNG with as many colours as fit into MAX_BYTES; returns its bytes.

    Raises:
        ValueError: it does not fit with the fewest.
    """
    for colors in COLORS:
        image.quantize(colors, dither=Image.Dither.NONE).save(target, optimize=True)
        if (size := target.stat().st_size) <= MAX_BYTES:
            return size
    raise ValueError(f"{target} takes {size} bytes, more than {MAX_BYTES}: show a smaller part of it")


if __name__ == "__main__":
    sys.exit(main())
