"""The launchers of one LoRA linear layer: raw tensors in, raw tensors out; no autograd, no policy.

M rows   N out_features   K in_features   R rank
x (M, K)   w (N, K)   a (R, K)   b (N, R)   s = drop(x) aᵀ (M, R) fp32   y (M, N)
ds = scale · dy b (M, R) fp32   db = scale · dyᵀ s (N, R)   da = dsᵀ drop(x) (R, K)   dx = dy w + drop'(ds a) (M, K)

Every launcher takes its tile from ``tiles.pick_<name>``, or from a test that forces one.
"""

from .device import Drop
from .gemm import expand, grad_x, lowrank_x, lowrank_y
from .skinny import grad_a, grad_b, shrink

__all__ = ["Drop", "expand", "grad_a", "grad_b", "grad_x", "lowrank_x", "lowrank_y", "shrink"]
