"""A few small calls of every kernel, for compute-sanitizer to watch: ragged sizes, where a mask is wrong first.

compute-sanitizer --tool memcheck python3 bench/gpu_sanitize.py
"""

from __future__ import annotations

import torch

from fused_lora import lora_linear
from fused_lora.accuracy import random_case

_REQUESTS = (
    "triton",
    "triton:expand=pointer,grad_x=pointer",
    "triton:expand=descriptor,grad_x=descriptor",
)
_SHAPES = ((67, 72, 88, 5, 0.1), (131, 264, 136, 33, 0.0), (9, 72, 1040, 3, 0.1))  # the last: contraction in parts


def main(device: torch.device) -> None:
    for request in _REQUESTS:
        for M, N, K, R, p in _SHAPES:
            case = random_case(M, N, K, R, torch.bfloat16, torch.float32, p, device)
            leaves = [t.requires_grad_() for t in (case.x, case.lora_a, case.lora_b)]
            y = lora_linear(
                case.x, case.weight, case.lora_a, case.lora_b, 2.0, case.bias, dropout_p=p, seed=1, strategy=request
            )
            torch.autograd.grad(y, leaves, case.dy)
            print(f"{request} at {(M, N, K, R, p)}", flush=True)
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
