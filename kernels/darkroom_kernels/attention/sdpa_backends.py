"""The backends of PyTorch's attention by name, each by the operator that torch itself would call.

`torch.nn.attention.sdpa_kernel` switches backends for the whole process, and attention is computed on two threads, the
ticks' and the decoder's: one would change what the other is given. `torch.export` does not keep its switches either.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.backends import cuda

from darkroom_kernels.backend import KernelUnavailable

NAMES = ("cudnn", "flash", "efficient")
# Heads that a backend has kernels for, in values; cuDNN's limit is that of the devices before Hopper.
MAX_HEAD_DIMS = {"cudnn": 128, "flash": 256, "efficient": 1 << 16}
HEAD_DIM_MULTIPLE = 8


def head_refusal(name: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a backend has no kernel for heads of this size and dtype on any device; None when it may have one."""
    if head_dim > MAX_HEAD_DIMS[name] or head_dim % HEAD_DIM_MULTIPLE:
        return f"it takes heads up to {MAX_HEAD_DIMS[name]} in steps of {HEAD_DIM_MULTIPLE}, not {head_dim}"
    if name != "efficient" and dtype not in (torch.float16, torch.bfloat16):
        return f"it computes fp16 and bf16, not {dtype}"
    return None


def attention_by(name: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """softmax(q·kᵀ·scale)·v by one backend. `q` `[B, H, Lq, d]`, `k` and `v` `[B, H, Lk, d]` on a CUDA device.

    Raises `KernelUnavailable` when the backend does not take these inputs. Source: torch
    `aten/src/ATen/native/transformers/attention.cpp`, `scaled_dot_product_attention`.
    """
    # While torch's compiler traces there is nothing to ask about; what it traces has run before.
    if not torch.compiler.is_compiling() and not _takes(name, q, k, v):
        raise KernelUnavailable(
            f"attention {name!r} does not take q {list(q.shape)}, k {list(k.shape)} in {q.dtype} on this device"
        )
    operators: Any = torch.ops.aten
    try:
        if name == "flash":
            results = operators._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)
        elif name == "cudnn":
            results = operators._scaled_dot_product_cudnn_attention(
                q, k, v, None, False, 0.0, False, False, scale=scale
            )
        else:
            results = operators._scaled_dot_product_efficient_attention(q, k, v, None, False, 0.0, False, scale=scale)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except RuntimeError as error:
        raise KernelUnavailable(f"attention {name!r} refuses: {str(error).strip().splitlines()[0]}") from error
    out: Tensor = results[0]
    return out


def _takes(name: str, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """What torch asks before it chooses a backend; nothing is computed."""
    parameters = cuda.SDPAParams(q, k, v, None, 0.0, False, False)
    asked = {
        "cudnn": cuda.can_use_cudnn_attention,
        "flash": cuda.can_use_flash_attention,
        "efficient": cuda.can_use_efficient_attention,
    }
    return q.shape[3] % HEAD_DIM_MULTIPLE == 0 and asked[name](parameters, False)
