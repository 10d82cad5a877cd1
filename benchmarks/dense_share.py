"""From which density on do dense row blocks beat lists of matches? The number behind kernels.dispatch.DENSE_SHARE.

    python -m benchmarks.dense_share

Times decoder, gradients of codes and of both weight matrices, for random codes of growing density, both ways in turn.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch

from apportion.kernels import decode_matches, dispatch, encode_matches
from apportion.latents import Latents

SHARES = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 2048), ("d-in", 768), ("d-sae", 8192), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    print(f"tokens {options.tokens}, d_in {options.d_in}, d_sae {options.d_sae}, {torch.get_num_threads()} threads")
    print("density   lists ms   dense ms   lists / dense")
    for share in SHARES:
        lists, dense = measure(share, options)
        print(f"{share:7.3f} {lists:10.0f} {dense:10.0f} {lists / dense:12.2f}")


def measure(share: float, options: argparse.Namespace) -> tuple[float, float]:
    """Median milliseconds of both ways."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.rand(options.tokens, options.d_sae, generator=generator)
    latents = Latents.from_dense(codes * (codes < share) / share)
    x = torch.randn(options.tokens, options.d_in, generator=generator)
    weights = [torch.randn(options.d_sae, options.d_in, generator=generator).requires_grad_() for _ in range(2)]
    bias = torch.zeros(options.d_sae, requires_grad=True)
    times: dict[float, list[float]] = {1.0: [], -1.0: []}
    for repeat in range(options.repeats + 1):
        for way in times:
            dispatch.DENSE_SHARE = way
            started = time.perf_counter()
            x_hat = decode_matches(encode_matches(x, weights[0], bias, latents), weights[1])
            x_hat.square().sum().backward()
            if repeat:
                times[way].append(1e3 * (time.perf_counter() - started))
    return median(times[1.0]), median(times[-1.0])


if __name__ == "__main__":
    main()
