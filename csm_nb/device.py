"""The device that a model runs on, and which numbers are fast there."""

import contextlib

import torch


def pick_device(device: str = "auto") -> str:
    """Return "cuda" for "auto" where there is one, else "cpu"; anything else is passed through to torch."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def has_fast_bfloat16(device: str) -> bool:
    """Return whether matrix products in bfloat16 are faster on `device`.

    They are on a GPU of compute capability 8 (Ampere) and later, not on a T4 or V100, which only imitate it; on a CPU with
    AVX512-BF16 or AMX.
    """
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def half_precision(device: str) -> torch.autocast:
    """Return a context in which matrix products run in bfloat16 where that is faster; the weights stay as they are.

    For language models and judges; a codec trained in it diverges (its thin convolutions need the digits).
    """
    return torch.autocast(device, torch.bfloat16, enabled=has_fast_bfloat16(device))


@contextlib.contextmanager
def one_thread():
    """Let torch compute on one thread in a with block: with another number of them the last digits of a sum differ."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
