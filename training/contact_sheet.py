"""A contact sheet drawn by a running server: `python -m training.contact_sheet --out sheet.png`."""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

import httpx
from PIL import Image, ImageDraw, ImageFont

PROMPTS = (
    "an astronaut riding a horse", "a duck arguing with a turtle in a forest", "a corgi in a house made of sushi",
    "a dog looking in the mirror seeing a cat", "a penguin in the snow", "a rocket above a house at night",
    "three apples", "a fish under water", "a robot riding a turtle in the mountains", "a house at night",
    "a red heart left of a blue circle", "a cat in front of a tree in a meadow", "a butterfly on a pink background",
    "a duck below a banana on the beach", "a robot in the city",
)  # fmt: skip
GAP_PX, LINE_PX = 8, 12


def drawn(client: httpx.Client, prompt: str, seed: int, model: str | None) -> Image.Image:
    """One picture with the model's own settings. Raises `httpx.HTTPStatusError` where the server does not draw it."""
    body = {"prompt": prompt, "seed": seed} | ({"model": model} if model else {})
    reply = client.post("/generate", json=body, headers={"accept": "image/png"}).raise_for_status()
    return Image.open(io.BytesIO(reply.content)).convert("RGB")


def sheet_of(pictures: Sequence[Image.Image], prompts: Sequence[str], columns: int) -> Image.Image:
    """Pictures of one size, row by row, each over its prompt."""
    font = ImageFont.load_default(10)
    width = pictures[0].width
    lines = [wrapped(prompt, font, width) for prompt in prompts]
    height = pictures[0].height + LINE_PX * max(map(len, lines)) + GAP_PX
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + GAP_PX) + GAP_PX, rows * (height + GAP_PX) + GAP_PX), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (picture, words) in enumerate(zip(pictures, lines, strict=True)):
        left = GAP_PX + index % columns * (width + GAP_PX)
        top = GAP_PX + index // columns * (height + GAP_PX)
        sheet.paste(picture, (left, top))
        draw.multiline_text((left, top + picture.height + 2), "\n".join(words), "black", font, spacing=1)
    return sheet


def wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width_px:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of a running server")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--model", help="a model that it serves; default: its own")
    parser.add_argument("--prompts", nargs="+", default=list(PROMPTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--columns", type=int, default=5)
    args = parser.parse_args()
    with httpx.Client(base_url=args.url, timeout=300, trust_env=False) as client:
        pictures = [drawn(client, prompt, args.seed, args.model) for prompt in args.prompts]
    sheet_of(pictures, args.prompts, args.columns).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
