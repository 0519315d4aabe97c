"""What bounds the CPU kernels on this machine, one thread: `python tests/benchmarks/roofline.py` from the repository.

Peak arithmetic is a tile of four tokens over weights that stay in the nearest cache; bandwidth is a tile of one token,
which reads every weight once, over arrays that fit one cache after the other.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numba
import numpy as np

from model.engine.cpu_kernels import PANEL, tile

KINDS = {"int8": (np.uint8, np.int8, np.int32, 4), "float16": (np.uint16, np.float32, np.float32, 1)}
KINDS["float32"] = (np.float32, np.float32, np.float32, 1)


@numba.njit(nogil=True)
def four_tokens(weights, x, out, n_steps, stride, n_times):
    for _ in range(n_times):
        tile(4, 4, n_steps, weights, 0, stride, x, 0, x.shape[1], out, 0, PANEL)


@numba.njit(nogil=True)
def one_token(weights, x, out, n_steps, stride, n_times):
    for panel in range(n_times):
        tile(1, 4, n_steps, weights, panel * n_steps * stride, stride, x, 0, 0, out, 0, PANEL)


def seconds(function: Callable[..., None], *arguments: object) -> float:
    function(*arguments)  # compiles
    times = []
    for _ in range(9):
        started_s = time.perf_counter()
        function(*arguments)
        times.append(time.perf_counter() - started_s)
    return statistics.median(times)


def main() -> None:
    n_steps = 64
    for name, (stored, read, summed, quad) in KINDS.items():
        stride = PANEL * quad
        x, out = np.ones((4, n_steps * quad), read), np.empty((4, PANEL), summed)
        weights = np.ones(n_steps * stride, stored)
        elapsed_s = seconds(four_tokens, weights, x, out, n_steps, stride, 20_000)
        print(f"{name:8} {2 * 4 * len(weights) * 20_000 / elapsed_s / 1e9:7,.0f} G operations/s")
        for megabytes in (0.5, 8, 24, 256):
            n_panels = int(megabytes * 2**20) // weights.nbytes
            many = np.ones(n_panels * len(weights), stored)
            elapsed_s = seconds(one_token, many, x, out, n_steps, stride, n_panels)
            print(f"{name:8} {many.nbytes / elapsed_s / 1e9:7,.0f} GB/s over {megabytes} MB")


if __name__ == "__main__":
    main()
