"""Every Triton kernel is built for every class of device, none of which is here, and its machine code is looked at."""

from __future__ import annotations

import pytest

from tests.support.builds import Built, kernel_modules, report

# Every build of a session is made in the first test that asks.
pytestmark = pytest.mark.timeout(900)

# KiB of shared memory that one program may have. 8.0 has 163, but rows for it also serve 8.6, 8.9 and 12.0.
SHARED_KIB = {80: 99, 90: 227, 100: 227}
PRODUCTS = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


def names(found: list[Built]) -> list[str]:
    return [f"{built.name} on sm_{built.capability}: {built}" for built in found]


def test_every_room_of_kernels_lists_its_builds() -> None:
    rooms = {name.split(".")[1] for name in kernel_modules()}
    assert rooms == {"attention", "geglu", "group_norm", "layer_norm", "residual", "step"}


def test_no_build_spills_a_register_but_a_few_of_what_another_release_was_tuned_with() -> None:
    assert names([built for built in report() if built.stack_bytes > built.most_stack_bytes]) == []


def test_products_run_on_tensor_cores() -> None:
    """Hopper's own instruction is what half its speed hangs on; only fp32 tiles too small for it use the older one."""
    slow = [
        built
        for built in report()
        if built.has_products and PRODUCTS[built.capability] not in built.products
        if "fp32" not in built.name or "HMMA" not in built.products
    ]
    assert names(slow) == []


def test_no_product_of_tf32_on_hopper_is_8_columns_wide() -> None:
    """Of those, Triton 3.6 builds some that read beyond their shared memory, and the device is lost."""
    assert names([built for built in report() if built.has_narrow_tf32]) == []


def test_every_build_fits_the_shared_memory_of_its_device() -> None:
    assert names([built for built in report() if built.shared_bytes > SHARED_KIB[built.capability] << 10]) == []
