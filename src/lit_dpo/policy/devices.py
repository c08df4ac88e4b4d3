"""What a GPU computes well in, and what is said of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def has_bf16(device: torch.device | int) -> bool:
    """Whether a CUDA device has bfloat16 units (compute capability 8.0, or ROCm); others emulate it, slowly.

    True without any CUDA device: what is only planned here runs on a card of today.
    """
    import torch

    if not torch.cuda.is_available() or torch.version.hip:
        return True
    # `is_bf16_supported` says yes to emulation, and looks at the current device alone
    return torch.cuda.get_device_capability(device) >= (8, 0)


def default_dtype(device: torch.device) -> torch.dtype:
    """Say what a policy computes in there where nobody chose it."""
    import torch

    if device.type == "cpu":
        return torch.float32
    return torch.float16 if device.type == "cuda" and not has_bf16(device) else torch.bfloat16


def default_precision(accelerator: str = "auto", strategy: str = "auto") -> str | None:
    """Choose the precision where nobody did: `bf16-mixed` on a GPU with bfloat16, `16-mixed` on others.

    Where cards differ the weakest decides. None (Lightning's `32-true`) on everything but a CUDA GPU, and for
    strategies that fork: asking a card would keep the processes from using it.
    """
    import torch

    if accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return None
    if "fork" in strategy or "notebook" in strategy:
        return None
    return "bf16-mixed" if all(map(has_bf16, range(torch.cuda.device_count()))) else "16-mixed"


def remark(device: torch.device, precision: str, dtype: torch.dtype) -> str | None:
    """Say what a user of a CUDA device may want otherwise, or None: products in float32, float16 without a scaler.

    Args:
        device: where the policy is.
        precision: the trainer's.
        dtype: the policy's.
    """
    import torch

    if device.type != "cuda" or "mixed" in precision:  # under autocast no product is float32
        return None
    if dtype == torch.float16:
        return (
            f"precision {precision} with a float16 policy: small gradients may vanish. `16-mixed` scales them; "
            "adapters stay float32 in any case."
        )
    if not has_bf16(device):  # no TF32 either
        return None
    setting = torch.get_float32_matmul_precision()
    which = "all products" if dtype == torch.float32 else "the adapters' products"
    how = "in TF32, 10 bits of mantissa" if setting != "highest" else "exact, without tensor cores"
    other = "" if setting != "highest" else "; 'high' would run them in TF32, faster and with 10 bits of mantissa"
    return (
        f"precision {precision}: {which} are float32 and run {how} (torch.set_float32_matmul_precision is "
        f"{setting!r}{other}). `bf16-mixed` runs them in bfloat16; log-softmax and sums are float32 in any case."
    )
