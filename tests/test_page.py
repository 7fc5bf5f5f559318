"""The page in a real browser: what a person does, and what they see then."""

from __future__ import annotations

import asyncio
import base64
import functools
import io
import itertools
import json
import os
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import pytest_asyncio
import torch
from axe_playwright_python.async_playwright import Axe
from darkroom.config import BUILTIN_MODEL, Settings
from darkroom.diffusion.images import encode_image
from darkroom.diffusion.loader import load_model
from darkroom.engine.engine import Engine
from darkroom.infotext import infotext
from darkroom.jobs import Failure, GenerationRequest
from darkroom.queue import JobQueue, new_key
from PIL import Image
from playwright.async_api import Browser, BrowserContext, ConsoleMessage, Page, Route, async_playwright, expect

from tests.support.http import Served, served
from tests.support.instant_worker import InstantWorker, colour
from tests.support.s3 import BUCKET, S3Server
from tests.test_worker import serving

pytest_plugins = "tests.support.bucket"
pytestmark = pytest.mark.asyncio(loop_scope="module")

expect.set_options(timeout=30_000)
CHROMIUM = shutil.which("chromium")
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True, "device_scale_factor": 2}
DESKTOP = {"viewport": {"width": 1440, "height": 900}}


@dataclass
class Darkroom:
    """A served page with a worker behind it, and the browser that looks at it."""

    browser: Browser
    site: Served
    worker: InstantWorker | None
    queue: JobQueue
    contexts: list[BrowserContext] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    async def open(self, *, is_locked: bool = False, **options: object) -> Page:
        """The page in a browser that has never seen it. Whatever it complains about fails the test."""
        context = await self.browser.new_context(**{"reduced_motion": "reduce", **DESKTOP, **options})
        context.set_default_timeout(30_000)
        self.contexts.append(context)
        page = await context.new_page()
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        await page.goto(f"http://127.0.0.1:{self.site.port}/")
        if not is_locked:
            await expect(page.locator("#examples button").first).to_be_attached()
        return page

    def _heard(self, message: ConsoleMessage) -> None:
        # The browser itself notes each refused call.
        if message.type in ("error", "warning") and "the server responded with a status of 4" not in message.text:
            self.complaints.append(message.text)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def browser() -> AsyncIterator[Browser]:
    if CHROMIUM is None:
        assert not os.environ.get("CI"), "chromium is missing; run tests/system-packages.sh"
        pytest.skip("chromium is not installed")
    async with async_playwright() as playwright:
        # As root, and in containers, its own sandbox cannot be had.
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, chromium_sandbox=False)
        yield browser
        await browser.close()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def queue(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[JobQueue]:
    settings = Settings(data_dir=tmp_path_factory.mktemp("page"), redis_url=redis_url, shard="test-page")
    queue = await JobQueue.connect(settings, redis_url)
    yield queue
    await queue.close()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def site(queue: JobQueue, redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    settings = Settings(data_dir=tmp_path_factory.mktemp("page"), redis_url=redis_url, shard="test-page")
    async with served(settings, queue) as site:
        yield site


@pytest_asyncio.fixture(loop_scope="module")
async def darkroom(browser: Browser, site: Served, queue: JobQueue) -> AsyncIterator[Darkroom]:
    async with InstantWorker(queue).running() as worker:
        darkroom = Darkroom(browser, site, worker, queue)
        yield darkroom
        for context in darkroom.contexts:
            await context.close()
    assert darkroom.complaints == []


async def develop(page: Page, prompt: str, **values: object) -> None:
    await page.fill("#prompt", prompt)
    for name, value in values.items():
        await page.fill(f"#{name}", str(value))
    await page.click("#go")


async def printed(page: Page, seed: int) -> None:
    await expect(page.locator("#status")).to_contain_text(f"seed {seed} · 4 steps of DPM++ 2M")
    await expect(page.locator("#tray img").last).to_have_js_property("naturalWidth", 64)


async def test_a_prompt_becomes_a_print_on_the_strip(darkroom: Darkroom) -> None:
    page = await darkroom.open()
    await develop(page, "a red fox in the snow", seed=7, num_images_per_prompt=2)
    await printed(page, 7)
    assert await page.locator("#tray .paper").count() == 2
    assert await page.locator("#tray img").first.get_attribute("alt") == "a red fox in the snow (1 of 2)"
    assert await page.locator("#strip .frame").count() == 1


async def test_one_of_several_pictures_can_be_picked_and_put_back(darkroom: Darkroom) -> None:
    page = await darkroom.open()
    await develop(page, "a red fox", seed=7, num_images_per_prompt=3)
    await printed(page, 7)
    await page.click("#tray .paper:nth-child(2)")
    await printed(page, 8)
    assert await page.locator("#tray .paper").count() == 1
    async with page.expect_download() as download:
        await page.click("#download")
    assert (await download.value).suggested_filename == "darkroom-8.png"
    saved = Image.open(await (await download.value).path())
    assert saved.getpixel((0, 0)) == colour(8)
    await page.click("#use")
    await expect(page.locator("#seed")).to_have_value("8")
    await expect(page.locator("#num_images_per_prompt")).to_have_value("1")
    await page.click("#tray .paper")
    await expect(page.locator("#tray .paper")).to_have_count(3)


async def test_everything_can_be_done_by_keyboard(darkroom: Darkroom) -> None:
    page = await darkroom.open()
    await page.focus("#prompt")
    await page.keyboard.type("a red fox")
    await page.keyboard.press("Control+Enter")
    await expect(page.locator("#print-actions")).to_be_visible()
    await page.focus("#strip button")
    await page.keyboard.press("Enter")
    await expect(page.locator("#strip button")).to_have_attribute("aria-pressed", "true")
    await page.focus("#forget")
    await page.keyboard.press("Enter")
    await expect(page.locator("#strip .frame")).to_have_count(0)
    await expect(page.locator("#prompt")).to_be_focused()


def draft(shade: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (16, 16), (shade, shade, shade)).save(content, "JPEG")
    return content.getvalue()


async def test_the_picture_comes_up_draft_by_draft(darkroom: Darkroom) -> None:
    darkroom.worker.gate.clear()
    page = await darkroom.open()
    async with page.expect_response("**/generate") as answered:
        await develop(page, "a red fox", seed=3)
    job_id = (await (await answered.value).json())["job_id"]
    await expect(page.locator("#timer-step")).to_have_text("1")
    for step, shade in ((2, 40), (3, 200)):
        await darkroom.queue.show(darkroom.worker.worker_id, {(job_id, 1, 0): (step, draft(shade))})
        data = base64.b64encode(draft(shade)).decode()
        await expect(page.locator("#tray img").last).to_have_attribute("src", f"data:image/jpeg;base64,{data}")
    darkroom.worker.gate.set()
    await printed(page, 3)
    await expect(page.locator("#tray img.draft")).to_have_count(0)


async def test_a_real_picture_is_watched_from_noise_to_print(browser: Browser, redis_url: str, tmp_path: Path) -> None:
    """Nothing stands in for anything here: the page, the server, the queue, a worker and the built-in model."""
    settings = Settings(
        data_dir=tmp_path, redis_url=redis_url, shard="test-page-real", num_threads=1, preview_interval_s=0.05
    )
    queue = await JobQueue.connect(settings, redis_url)
    threads = torch.get_num_threads()
    model = load_model(BUILTIN_MODEL)
    # Warm, as workers are: previews of a model wait until their map is fitted.
    engine = functools.partial(Engine, warm_up=True)
    async with serving(settings, queue, model, engine), served(settings, queue) as site:
        while not (await queue.cards()).offered:  # noqa: ASYNC110 - another process might as well be the worker
            await asyncio.sleep(0.01)
        darkroom = Darkroom(browser, site, None, queue)
        page = await darkroom.open(is_locked=True)
        await expect(page.locator("#examples button").first).to_be_attached()
        await page.evaluate(
            """() => {
                window.laid = [];
                const watch = new MutationObserver((changes) => {
                    for (const { addedNodes } of changes) for (const one of addedNodes) if (one.src) laid.push(one.src);
                });
                watch.observe(document.getElementById("prints"), { childList: true, subtree: true });
            }"""
        )
        await develop(page, "a duck on a beach", seed=8, num_inference_steps=50, width=64, height=64)
        await expect(page.locator("#status")).to_contain_text("seed 8 · 50 steps of DPM++ 2M")
        *drafts, last = await page.evaluate("laid")
        assert len(set(drafts)) >= 2
        assert all(one.startswith("data:image/jpeg;base64,") for one in drafts)
        assert last.startswith("blob:")
        await darkroom.contexts[0].close()
        assert darkroom.complaints == []
    torch.set_num_threads(threads)
    await queue.close()


async def test_a_picture_under_way_can_be_called_off(darkroom: Darkroom) -> None:
    darkroom.worker.gate.clear()
    page = await darkroom.open()
    await develop(page, "a red fox")
    await expect(page.locator("#timer")).to_have_text("1of 4")
    await page.click("#stop")
    await expect(page.locator("#status")).to_have_text("Cancelled.")
    await expect(page.locator("#empty")).to_be_visible()
    await expect(page.locator("#go")).to_be_enabled()


async def test_the_batch_shows_a_bar_for_each_row_and_which_are_ones_own(darkroom: Darkroom) -> None:
    darkroom.worker.gate.clear()
    await darkroom.site.client.post("/generate", json={"prompt": "of somebody else", "mode": "async"})
    page = await darkroom.open()
    await develop(page, "a red fox")
    await expect(page.locator("#batch-line")).to_have_text("2 pictures in the bath · 2 in this tick · 1 yours")
    assert await page.locator("#batch-rows .own").count() == 1
    darkroom.worker.gate.set()
    await expect(page.locator("#batch-line")).to_have_text("The bath is still")


async def test_a_reload_finds_the_strip_and_goes_on_with_the_picture_under_way(darkroom: Darkroom) -> None:
    page = await darkroom.open()
    await develop(page, "a red fox", seed=1)
    await printed(page, 1)
    darkroom.worker.gate.clear()
    await develop(page, "a blue fox", seed=2)
    await expect(page.locator("#timer-step")).to_have_text("1")
    await page.reload()
    await expect(page.locator("#strip .frame")).to_have_count(1)
    await expect(page.locator("#prompt")).to_have_value("a blue fox")
    await expect(page.locator("#stop")).to_be_visible()
    darkroom.worker.gate.set()
    await printed(page, 2)
    await expect(page.locator("#strip .frame")).to_have_count(2)
    await page.click("#strip .frame:nth-child(2) button")
    await printed(page, 1)


async def test_a_print_can_be_made_again_varied_and_copied(darkroom: Darkroom) -> None:
    page = await darkroom.open(permissions=["clipboard-read", "clipboard-write"])
    await develop(page, "it's a fox", seed=11, negative_prompt="snow")
    await printed(page, 11)
    await page.click("#copy")
    await expect(page.locator("#copy")).to_have_text("Copied")
    command = await page.evaluate("navigator.clipboard.readText()")
    sent = json.loads(command.partition("-d '")[2].rpartition("' -o")[0].replace("'\\''", "'"))
    assert (sent["prompt"], sent["negative_prompt"], sent["seed"]) == ("it's a fox", "snow", 11)
    await develop(page, "something else", seed=12, negative_prompt="")
    await printed(page, 12)
    await page.click("#strip .frame:nth-child(2) button")
    await page.click("#again")
    await expect(page.locator("#strip .frame")).to_have_count(3)
    await printed(page, 11)
    await expect(page.locator("#negative_prompt")).to_have_value("snow")
    await page.click("#vary")
    await expect(page.locator("#strip .frame")).to_have_count(4)
    await expect(page.locator("#status")).not_to_contain_text("seed 11 ·")


async def drop(page: Page, content: bytes, media_type: str = "image/png") -> None:
    """Let go of a file over the tray."""
    carried = await page.evaluate_handle(
        """([text, type]) => {
            const carried = new DataTransfer();
            const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
            carried.items.add(new File([bytes], "dropped", { type }));
            return carried;
        }""",
        [base64.b64encode(content).decode(), media_type],
    )
    await page.dispatch_event("#tray", "drop", {"dataTransfer": carried})


REQUEST = GenerationRequest(
    prompt="two (foxes:1.2),\nünder Wasser",
    negative_prompt="snow",
    model="test-world",
    width=128,
    height=64,
    num_inference_steps=9,
    guidance_scale=4.5,
    seed=2**63 - 2,
    sampler="euler_a",
    sigma_schedule="simple",
    prompt_syntax="weighted",
)


async def restored(page: Page) -> None:
    await expect(page.locator("#status")).to_contain_text("Settings restored")
    for name, value in {
        "prompt": REQUEST.prompt,
        "negative_prompt": "snow",
        "width": "128",
        "height": "64",
        "num_inference_steps": "9",
        "guidance_scale": "4.5",
        "seed": str(REQUEST.seed),
        "sampler": "euler_a",
        "sigma_schedule": "simple",
    }.items():
        await expect(page.locator(f"#{name}")).to_have_value(value)
    await expect(page.locator("#weighted")).to_be_checked()


async def test_a_dropped_png_brings_its_settings_back(darkroom: Darkroom) -> None:
    page = await darkroom.open()
    pixels = np.zeros((64, 128, 3), np.uint8)
    await drop(page, encode_image(pixels, REQUEST, 0, model_hash="0123456789abcdef", version="1"))
    await restored(page)


async def test_a_png_of_another_tool_brings_its_settings_back(darkroom: Darkroom, tmp_path: Path) -> None:
    """With the record taken out, only the text that AUTOMATIC1111 reads and writes is left."""
    page = await darkroom.open()
    pixels = np.zeros((64, 128, 3), np.uint8)
    content = encode_image(pixels, REQUEST, 0, model_hash="0123456789abcdef", version="1")
    (tmp_path / "other.png").write_bytes(content.replace(b"darkroom\0", b"somebody\0"))
    async with page.expect_file_chooser() as chooser:
        await page.click("#restore")
    await (await chooser.value).set_files(tmp_path / "other.png")
    await restored(page)


TRICKY = [
    'a "quoted", comma, colon: and \\ backslash',
    "two lines\nSteps: many, but not a last line",
    "(fox:1.3) BREAK [snow]",
    "  blanks around  ",
]


async def test_what_is_written_into_a_picture_is_read_back_the_same(darkroom: Darkroom) -> None:
    page = await darkroom.open()
    for prompt, syntax in itertools.product(TRICKY, ["plain", "weighted"]):
        request = msgspec.structs.replace(
            REQUEST,
            prompt=prompt,
            prompt_syntax=syntax,
            negative_prompt="a, b: c\nd",
            model='my "model", large',
            clip_skip=1,
        )
        read = await page.evaluate(
            "async (text) => (await import('/static/png.js')).parseInfotext(text)",
            infotext(request, 0, model_hash="0123456789abcdef", version="1"),
        )
        assert read == {
            "prompt": prompt.strip(),
            "negative_prompt": "a, b: c\nd",
            "model": request.model,
            "width": 128,
            "height": 64,
            "num_inference_steps": 9,
            "guidance_scale": 4.5,
            "seed": str(request.seed),
            "sampler": "euler_a",
            "sigma_schedule": "simple",
            "clip_skip": 1,
            # Without brackets there is nothing to read.
            **({"prompt_syntax": "weighted"} if syntax == "weighted" and "(" in prompt else {}),
        }


async def test_a_png_that_is_cut_short_or_scrambled_breaks_nothing(darkroom: Darkroom) -> None:
    page = await darkroom.open()
    content = encode_image(np.zeros((8, 8, 3), np.uint8), REQUEST, 0, model_hash="0123456789abcdef", version="1")
    read = await page.evaluate(
        """async (text) => {
            const { settingsOf } = await import("/static/png.js");
            const whole = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
            const read = [];
            for (let at = 0; at < whole.length; at += 5) {
                const scrambled = whole.slice();
                scrambled[at] ^= 0xff;
                read.push(typeof await settingsOf(new Blob([whole.slice(0, at)])));
                read.push(typeof await settingsOf(new Blob([scrambled])));
            }
            return read;
        }""",
        base64.b64encode(content).decode(),
    )
    assert len(read) > 200
    assert set(read) == {"object"}  # a request, or null


async def test_a_picture_without_settings_is_said_to_have_none(darkroom: Darkroom, tmp_path: Path) -> None:
    page = await darkroom.open()
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    async with page.expect_file_chooser() as chooser:
        await page.click("#restore")
    await (await chooser.value).set_files(tmp_path / "plain.png")
    await expect(page.get_by_role("alert")).to_contain_text("This picture carries no settings")


async def start_from(page: Page, picture: Image.Image, tmp_path: Path) -> None:
    picture.save(tmp_path / "start.png")
    async with page.expect_file_chooser() as chooser:
        await page.click("#start-choose")
    await (await chooser.value).set_files(tmp_path / "start.png")
    await expect(page.locator("#start-set")).to_be_visible()


async def sent_by(page: Page, *, click: str) -> dict[str, Any]:
    async with page.expect_request("**/generate") as asked:
        await page.click(click)
    body: dict[str, Any] = (await asked.value).post_data_json
    return body


def opened(data_url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data_url.partition(",")[2])))


async def test_a_picture_to_start_from_is_cut_to_size_and_sent_with_its_strength(
    darkroom: Darkroom, tmp_path: Path
) -> None:
    page = await darkroom.open()
    await start_from(page, Image.new("RGB", (300, 100), (200, 40, 10)), tmp_path)
    await page.fill("#strength", "0.35")
    await page.fill("#prompt", "a red fox")
    await page.fill("#seed", "5")
    sent = await sent_by(page, click="#go")
    assert sent["strength"] == 0.35
    assert "mask_image" not in sent
    assert opened(sent["init_image"]).size == (64, 64)
    assert opened(sent["init_image"]).convert("RGB").getpixel((32, 32)) == (200, 40, 10)
    await printed(page, 5)
    await page.click("#start-clear")
    assert "init_image" not in await sent_by(page, click="#go")
    await page.click("#strip .frame:nth-child(2) button")
    again = await sent_by(page, click="#again")
    assert (again["init_image"], again["strength"]) == (sent["init_image"], 0.35)


async def test_a_mask_is_painted_undone_and_filled_without_a_brush(darkroom: Darkroom, tmp_path: Path) -> None:
    page = await darkroom.open()
    await start_from(page, Image.new("RGB", (64, 64), "gray"), tmp_path)
    await page.fill("#prompt", "a red fox")
    await page.click("#mask-open")
    assert (await Axe().run(page)).violations_count == 0
    await page.select_option("#mask-fill", "left")
    box = await page.locator("#mask-canvas").bounding_box()
    assert box is not None
    for part in (0.85, 0.6):
        await page.mouse.move(box["x"] + box["width"] * part, box["y"] + box["height"] * 0.1)
        await page.mouse.down()
        await page.mouse.move(box["x"] + box["width"] * part, box["y"] + box["height"] * 0.9, steps=3)
        await page.mouse.up()
    await page.click("#mask-undo")
    await page.click("#mask-done")
    mask = opened((await sent_by(page, click="#go"))["mask_image"]).convert("L")
    row = [mask.getpixel((x, 32)) for x in (10, 30, 38, 54, 62)]
    assert row == [255, 255, 0, 255, 0]
    await expect(page.locator("#print-actions")).to_be_visible()
    await page.click("#use")
    await expect(page.locator("#mask-open")).to_have_text("Change the mask")
    again = opened((await sent_by(page, click="#go"))["mask_image"]).convert("L")
    assert [again.getpixel((x, 32)) for x in (10, 30, 38, 54, 62)] == row


async def test_a_dropped_picture_without_settings_is_what_the_next_one_starts_from(darkroom: Darkroom) -> None:
    page = await darkroom.open()
    content = io.BytesIO()
    Image.new("RGB", (32, 32)).save(content, "JPEG")
    await drop(page, content.getvalue(), "image/jpeg")
    await expect(page.locator("#start-set")).to_be_visible()
    await expect(page.locator("#status")).to_have_text("The next picture starts from this one.")


async def test_a_wrong_field_is_said_beside_the_field(darkroom: Darkroom) -> None:
    page = await darkroom.open()
    await develop(page, "a red fox", num_inference_steps=9999, width=63)
    await expect(page.locator("#num_inference_steps-error")).to_have_text(
        "This takes an integer from 1 to 200; it was given 9999."
    )
    await expect(page.locator("#num_inference_steps")).to_be_focused()
    await develop(page, "a red fox", num_inference_steps=4)
    await expect(page.locator("#num_inference_steps-error")).to_be_hidden()
    await expect(page.locator("#width-error")).to_contain_text("a multiple of 8")
    await develop(page, "a red fox", width=64, seed=3)
    await printed(page, 3)


async def test_a_failed_job_is_told_in_its_own_words(darkroom: Darkroom) -> None:
    darkroom.worker.failure = Failure(code="non_finite", message="the picture came out as NaN or infinity")
    page = await darkroom.open()
    await develop(page, "a red fox")
    await expect(page.get_by_role("alert")).to_contain_text("The picture came out as NaN or infinity.")
    await expect(page.locator("#go")).to_be_enabled()


async def test_a_full_queue_counts_down_and_is_tried_again_by_itself(
    browser: Browser, redis_url: str, tmp_path: Path
) -> None:
    settings = Settings(data_dir=tmp_path, redis_url=redis_url, shard="test-page-full", max_queue_jobs=1)
    queue = await JobQueue.connect(settings, redis_url)
    worker = InstantWorker(queue)
    await queue.register(worker.worker_id, worker.cards)
    async with served(settings, queue) as site:
        darkroom = Darkroom(browser, site, worker, queue)
        waiting = (await site.client.post("/generate", json={"prompt": "the one that waits", "mode": "async"})).json()
        page = await darkroom.open()
        await develop(page, "a red fox", seed=4)
        await expect(page.get_by_role("alert")).to_contain_text("The queue is full")
        await expect(page.locator(".count")).to_contain_text("A place comes free in about")
        await page.click("text=Wait and try by itself")
        await site.client.delete(waiting["url"])
        async with worker.running():
            await printed(page, 4)
        await expect(page.get_by_role("alert")).to_be_hidden()
        await darkroom.contexts[0].close()
        assert darkroom.complaints == []
    await queue.close()


async def test_a_darkroom_with_a_lock_asks_for_a_key_and_remembers_it_for_the_visit(
    browser: Browser, redis_url: str, tmp_path: Path
) -> None:
    settings = Settings(data_dir=tmp_path, redis_url=redis_url, shard="test-page-keys", auth="keys")
    queue = await JobQueue.connect(settings, redis_url)
    key, token = new_key(name="ann", tenant="ann", scopes=["generate"])
    await queue.api_keys.add(key)
    async with InstantWorker(queue).running() as worker, served(settings, queue) as site:
        darkroom = Darkroom(browser, site, worker, queue)
        page = await darkroom.open(is_locked=True, permissions=["clipboard-read", "clipboard-write"])
        dialog = page.get_by_role("dialog")
        await expect(dialog).to_contain_text("This darkroom has a lock")
        assert (await Axe().run(page)).violations_count == 0
        await dialog.get_by_role("button", name="Not now").click()
        # Nothing asks again by itself; what a person asks for does.
        await expect(page.locator("#health")).to_have_text("Locked")
        await expect(dialog).to_be_hidden()
        await develop(page, "a red fox", seed=6)
        await page.fill("#key-input", "dk_of_another")
        await page.click("#key-use")
        await expect(dialog).to_contain_text("That key does not fit")
        await page.fill("#key-input", token)
        await page.click("#key-use")
        await printed(page, 6)
        await page.click("#copy")
        await expect(page.locator("#copy")).to_have_text("Copied")
        command = await page.evaluate("navigator.clipboard.readText()")
        assert token not in command
        environment = {"PATH": os.environ["PATH"], "DARKROOM_API_KEY": token}
        pasted = await asyncio.create_subprocess_shell(command, cwd=tmp_path, env=environment)
        assert await asyncio.wait_for(pasted.wait(), 20) == 0
        with Image.open(tmp_path / "picture.png") as picture:
            assert picture.getpixel((0, 0)) == colour(6)
        await page.reload()
        await expect(page.locator("#examples button").first).to_be_attached()
        await expect(dialog).to_be_hidden()
        assert await page.evaluate("localStorage.length") == 0
        await darkroom.contexts[0].close()
        assert darkroom.complaints == []
    await queue.close()


async def test_prints_come_from_a_bucket_whose_keys_the_page_does_not_have(
    browser: Browser, redis_url: str, s3: S3Server, tmp_path: Path
) -> None:
    settings = Settings(
        data_dir=tmp_path, redis_url=redis_url, shard="test-page-bucket", auth="keys",
        result_store=f"s3://{BUCKET}/darkroom", result_urls="signed",
    )  # fmt: skip
    queue = await JobQueue.connect(settings, redis_url)
    key, token = new_key(name="ann", tenant="ann", scopes=["generate"])
    await queue.api_keys.add(key)
    async with InstantWorker(queue).running() as worker, served(settings, queue) as site:
        darkroom = Darkroom(browser, site, worker, queue)
        page = await darkroom.open(is_locked=True)
        await page.fill("#key-input", token)
        await page.click("#key-use")
        await develop(page, "a red fox", seed=6, num_images_per_prompt=2)
        await printed(page, 6)
        assert len(s3.objects) == 2
        await page.click("#tray .paper:nth-child(2)")
        async with page.expect_download() as download:
            await page.click("#download")
        assert Image.open(await (await download.value).path()).getpixel((0, 0)) == colour(7)
        await page.click("#again")
        await expect(page.locator("#strip .frame")).to_have_count(2)
        await printed(page, 6)
        assert darkroom.complaints == []

        async def without_the_bucket(route: Route) -> None:
            s3.stop()
            await route.continue_()

        await page.route("**/images/*", without_the_bucket)
        await develop(page, "a blue fox", seed=9, num_images_per_prompt=1)
        await expect(page.get_by_role("alert")).to_contain_text("The result store cannot be reached")
        await expect(page.locator(".count")).to_contain_text("It may work again")
        # What is drawn is not lost by a page that could not have it yet, nor by one that is loaded too early.
        await page.reload()
        await expect(page.get_by_role("alert")).to_contain_text("The result store cannot be reached")
        await page.unroute("**/images/*")
        s3.start()
        await page.reload()
        await printed(page, 9)
        await expect(page.locator("#strip .frame")).to_have_count(3)
        await darkroom.contexts[0].close()
        assert all("the server responded with a status of 503" in complaint for complaint in darkroom.complaints)
    await queue.close()


async def test_the_theme_is_the_systems_until_another_is_chosen(darkroom: Darkroom) -> None:
    page = await darkroom.open(color_scheme="light")
    ground = "getComputedStyle(document.body).backgroundColor"
    light = await page.evaluate(ground)
    await page.click("#theme")
    dark = await page.evaluate(ground)
    assert dark != light
    await page.reload()
    assert await page.evaluate(ground) == dark
    await expect(page.locator("#theme")).to_have_text("Light")


@pytest.mark.parametrize(("screen", "color_scheme"), [(DESKTOP, "dark"), (PHONE, "light")], ids=["desktop", "phone"])
async def test_the_page_is_accessible_empty_developing_done_and_in_error(
    darkroom: Darkroom, screen: dict[str, object], color_scheme: str
) -> None:
    page = await darkroom.open(color_scheme=color_scheme, **screen)

    async def check(state: str) -> None:
        found = await Axe().run(page)
        assert found.violations_count == 0, f"{state}: {found.generate_report()}"
        assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth"), state

    await check("empty")
    darkroom.worker.gate.clear()
    await develop(page, "a red fox")
    await expect(page.locator("#timer-step")).to_have_text("1")
    await check("developing")
    darkroom.worker.gate.set()
    await expect(page.locator("#print-actions")).to_be_visible()
    await page.locator("#settings").evaluate("(settings) => { settings.open = true; }")
    await check("done")
    await develop(page, "a red fox", num_inference_steps=9999)
    await expect(page.locator("#num_inference_steps-error")).to_be_visible()
    await check("in error")
