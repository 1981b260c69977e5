"""torch's setting for fp32 matrix products: set for a while, and proved to be fp32 arithmetic by its values.

On a CPU the setting chooses between two libraries, of which now one and now the other is faster. "medium" is
oneDNN, which may also round its inputs to bf16; it does so only where the processor has units for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def float32_matmul(setting: str) -> Iterator[None]:
    """torch's setting for fp32 products inside, what it was outside."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def fp32_stays(setting: str) -> bool:
    """Whether products of fp32 matrices and batches of them are fp32 arithmetic under a setting of torch's."""
    generator = torch.Generator().manual_seed(0)
    shapes = [((256, 320), (320, 192)), ((4, 128, 64), (4, 64, 128))]
    with float32_matmul(setting):
        for left, right in shapes:
            a, b = torch.randn(left, generator=generator), torch.randn(right, generator=generator)
            exact = a.double() @ b.double()
            # bf16 keeps 8 bits: its error is a thousand times that of fp32
            if float(((a @ b).double() - exact).abs().max() / exact.abs().max()) > 1e-5:
                return False
    return True
