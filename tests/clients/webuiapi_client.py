"""What an application does with `webuiapi`, by the name of the scene; prints what it saw as JSON.

Run by the tests with the Python of an environment of its own: `webuiapi_client.py SCENE PORT [KEY]`.
"""

from __future__ import annotations

import json
import sys
import threading
from importlib.metadata import version
from typing import Any

import webuiapi
from PIL import Image


def look(api: Any) -> dict[str, Any]:
    return {
        "version": version("webuiapi"),
        "samplers": api.util_get_sampler_names(),
        "schedulers": api.util_get_scheduler_names(),
        "models": api.util_get_model_names(),
        "current": api.util_get_current_model(),
        "progress": api.get_progress()["progress"],
        "nothing": [
            api.get_upscalers(), api.get_latent_upscale_modes(), api.get_sd_vae(), api.get_loras(),
            api.get_hypernetworks(), api.get_face_restorers(), api.get_realesrgan_models(), api.get_prompt_styles(),
            api.get_cmd_flags(),
        ],
        "scripts": api.get_scripts(),
        "embeddings": api.get_embeddings(),
        "memory": api.get_memory(),
        "refreshed": api.refresh_checkpoints(),
    }  # fmt: skip


def draw(api: Any) -> dict[str, Any]:
    result = api.txt2img(
        prompt="a (red:1.3) fox", negative_prompt="blurry", seed=7, sampler_name="DPM++ 2M", scheduler="Karras",
        steps=5, cfg_scale=6.5, width=64, height=72, batch_size=2, n_iter=2,
    )  # fmt: skip
    read = api.png_info(result.images[1])
    return {
        "sizes": [image.size for image in result.images],
        "colours": [image.getpixel((3, 3)) for image in result.images],
        "info": result.info,
        "parameters": result.parameters,
        "read": read.info,
        "read_parameters": read.parameters,
    }


def redraw(api: Any) -> dict[str, Any]:
    image, mask = Image.new("RGB", (64, 64), (200, 30, 20)), Image.new("L", (64, 64), 255)
    result = api.img2img(
        images=[image], mask_image=mask, prompt="a fox", seed=9, denoising_strength=0.5, width=64, height=72, steps=10,
        inpainting_fill=1,
    )  # fmt: skip
    return {"sizes": [one.size for one in result.images], "info": result.info, "parameters": result.parameters}


def choose(api: Any) -> dict[str, Any]:
    api.util_set_model("two")
    api.set_options({**api.get_options(), "CLIP_stop_at_last_layers": 2})
    result = api.txt2img(prompt="a fox", width=64, height=64, steps=2)
    return {"options": api.get_options(), "info": result.info}


def interrupt(api: Any) -> dict[str, Any]:
    """Starts a picture that never ends by itself, and stops it as soon as it is seen to be drawn."""
    seen: dict[str, Any] = {}

    def run() -> None:
        result = api.txt2img(prompt="a fox", width=64, height=64, steps=4)
        seen["images"], seen["info"] = len(result.images), result.info

    drawing = threading.Thread(target=run)
    drawing.start()
    watcher = webuiapi.WebUIApi(baseurl=api.baseurl)
    watcher.session.auth = api.session.auth
    while not (progress := watcher.get_progress())["progress"]:
        pass
    seen["progress"] = progress
    seen["reply"] = watcher.interrupt()
    drawing.join()
    watcher.util_wait_for_ready(check_interval=0.05)
    seen["skipped"] = watcher.skip()
    return seen


if __name__ == "__main__":
    scene, port, *key = sys.argv[1:]
    api = webuiapi.WebUIApi(port=int(port), username="key", password=key[0]) if key else webuiapi.WebUIApi(port=port)
    print(json.dumps(globals()[scene](api)), file=sys.stderr)
