"""The way in for pictures that requests begin with. `pictures` does the work, beside the event loop and few at a time.

Pillow is loaded with the first picture, so that an API process that gets none stays small.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

# Pictures decoded at one time; each may take nine bytes a pixel.
MAX_AT_ONCE = 2


@dataclass(frozen=True, eq=False)
class Pictures:
    """What a request begins with: the init image as RGB and the mask as L, white where the picture is drawn anew.

    `digest` is of the bytes that were sent, so that the same request is known again.
    """

    init_image: Image.Image
    mask_image: Image.Image | None
    digest: str

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the init image, in pixels."""
        return self.init_image.size


class Intake:
    """Reads pictures. `max_pixels` is the most that one may have."""

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._places = asyncio.Semaphore(MAX_AT_ONCE)

    async def read(
        self,
        init_image: str | bytes,
        mask_image: str | bytes | None = None,
        *,
        mask_is_alpha: bool = False,
        mask_is_inverted: bool = False,
    ) -> Pictures:
        """As `pictures.read_pictures`."""

        def read() -> Pictures:
            from darkroom.api.pictures import read_pictures

            return read_pictures(
                init_image,
                mask_image,
                mask_is_alpha=mask_is_alpha,
                mask_is_inverted=mask_is_inverted,
                max_pixels=self._max_pixels,
            )

        async with self._places:
            return await asyncio.to_thread(read)

    async def read_texts(self, image: str) -> dict[str, str]:
        """As `pictures.read_texts`."""

        def read() -> dict[str, str]:
            from darkroom.api.pictures import read_texts

            return read_texts(image)

        async with self._places:
            return await asyncio.to_thread(read)

    async def fit(self, pictures: Pictures, width: int, height: int, resize_mode: str) -> dict[str, bytes]:
        """As `pictures.fitted`."""

        def fit() -> dict[str, bytes]:
            from darkroom.api.pictures import fitted

            return fitted(pictures, width, height, resize_mode)

        async with self._places:
            return await asyncio.to_thread(fit)
