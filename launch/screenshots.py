"""Makes the pictures of the README: the report of a run in a browser, and the terminal page of the same run.

python launch/screenshots.py RUN --out docs/images

RUN is a run directory, as of the demo. Writes report.png (needs Playwright and Chromium: pip install playwright; apt
install chromium), watch.svg and watch-slots.svg (Textual, extra watch). RUN gets no file but report.html.
"""

import argparse
import asyncio
import re
import shutil
import sys
from pathlib import Path

from esper.karn.report.write import write_report
from esper.karn.watch.app import WatchApp
from esper.karn.watch.pages import PAGES

WIDTH, HEIGHT = 1000, 1690  # down to the lanes of slots
SHADES = 256  # of the picture, which is flat: two thirds of its bytes
LOCAL = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)  # a picture loads nothing from elsewhere


def shoot_report(run: Path, out: Path) -> Path:
    """The top of the report, at its light colours; returns the file.

    Raises:
        RuntimeError: there is no browser.
    """
    try:
        from PIL import Image
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        raise RuntimeError("report.png needs playwright and pillow: pip install playwright pillow") from None
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        raise RuntimeError("report.png needs Chromium (Debian, Ubuntu: apt install chromium)")
    page_file = write_report([run])
    target = out / "report.png"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        page.goto(page_file.absolute().as_uri())
        page.screenshot(path=target)
        browser.close()
    Image.open(target).convert("RGB").quantize(SHADES).save(target, optimize=True)
    return target


def shoot_watch(run: Path, view: str, target: Path) -> Path:
    """One view of the terminal page, 80 columns by 24 lines; returns the file."""
    app = WatchApp([run])

    async def shoot() -> None:
        async with app.run_test(size=(80, 24)) as pilot:
            await pilot.press(str(1 + list(PAGES).index(view)))
            await pilot.pause()
            target.write_text(LOCAL.sub("", app.export_screenshot(title=f"esper watch {run.name}")))

    asyncio.run(shoot())
    return target


def main(arguments: list[str] | None = None) -> int:
    """Makes them; returns 1 if one could not be made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory")
    parser.add_argument("--out", metavar="FOLDER", type=Path, default=Path("docs/images"), help="docs/images")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    print(shoot_watch(given.run, "overview", given.out / "watch.svg"))
    print(shoot_watch(given.run, "slots", given.out / "watch-slots.svg"))
    try:
        print(shoot_report(given.run, given.out))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
