"""Take the README's picture of the page, from a server that is running with the built-in model.

python -m tests.support.page_picture --output docs/page.webp
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

import httpx
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

PRINTS = {
    "a butterfly in a forest": 12,
    "a turtle under water": 5,
    "a rocket at night": 9,
    "a penguin in the snow": 4,
    "a red car in a desert": 2,
    "a frog in a city": 3,
    "a house next to a tree in the snow": 6,
    "an astronaut riding a horse at night": 3,
}
OTHERS = 9


def develop(page: Page, prompt: str, seed: int) -> None:
    page.fill("#prompt", prompt)
    page.fill("#seed", str(seed))
    page.click("#go")
    expect(page.locator("#status")).to_contain_text(f"seed {seed} ", timeout=60_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--scheme", choices=["dark", "light"], default="dark")
    parser.add_argument("--output", type=Path, default=Path("docs/page.webp"))
    options = parser.parse_args()
    chromium = shutil.which("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, chromium_sandbox=False)
        context = browser.new_context(
            viewport={"width": 1440, "height": 900}, color_scheme=options.scheme, reduced_motion="reduce"
        )
        page = context.new_page()
        page.goto(options.url)
        expect(page.locator("#examples button").first).to_be_visible()
        for prompt, seed in PRINTS.items():
            develop(page, prompt, seed)
        develop(page, "a duck on a beach", 8)
        # Then others are in the bath, each another part of its way when the first of them is done.
        for index in range(OTHERS):
            request = {"prompt": "a fish under water", "num_inference_steps": 60 + 15 * index, "mode": "async"}
            httpx.post(f"{options.url}/generate", json=request).raise_for_status()
        rows = page.locator("#batch-rows i")
        expect(rows).to_have_count(OTHERS, timeout=60_000)
        expect(rows).to_have_count(OTHERS - 1, timeout=60_000)
        picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        browser.close()
    picture.save(options.output, quality=88, method=6)
    print(f"{options.output}: {picture.width} x {picture.height}, {options.output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
