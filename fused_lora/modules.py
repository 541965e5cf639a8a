"""LoRALinear and LoRAEmbedding: the layers over nn.Linear, the Conv1D of transformers, and nn.Embedding.

K in_features, N out_features, R rank.  weight (N, K)  bias (N,)  lora_a (R, K)  lora_b (N, R)
V num_embeddings, D embedding_dim.      weight (V, D)             lora_a (R, V)  lora_b (D, R)

What they share is in ``layer.py``; the convolutions are in ``convolution.py``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .checks import check_bias, check_dtypes, check_operands, check_switch, without_autocast
from .derivatives import transformed
from .dora import Adapter, Norms, dora_formula, dora_forward, row_norms
from .layer import LoRALayer, check_init, default_adapter_dtype, is_transformers_conv1d, lora_scale
from .ops.linear import lora_linear
from .registered import watched

__all__ = ["LoRAEmbedding", "LoRALayer", "LoRALinear", "default_adapter_dtype", "lora_scale"]


class LoRALinear(LoRALayer):
    """A linear layer with a LoRA branch, fused: ``y = x Wᵀ + bias + scale · (drop(x) lora_aᵀ) lora_bᵀ``.

    A drop-in for the LoRALinear people have. lora_a is Kaiming-uniform and lora_b zero at start, so the layer begins as
    its base. weight and bias are frozen.

    Args:
        in_features, out_features: K and N.
        bias: whether the base layer has a bias.
        r: rank, at least 1.
        lora_alpha: scale is lora_alpha / r, or lora_alpha / √r with ``use_rslora``.
        lora_dropout: probability of dropping an element of x before lora_a, in [0, 1]; each layer has its own mask.
        use_rslora: rank-stabilised scale.
        use_dora: weight-decomposed LoRA (Liu et al., DoRA, arXiv 2402.09353): the rows of W + ΔW are brought to the
            lengths in the parameter ``magnitude`` (N,), which starts with theirs; y = magnitude / ‖W + ΔW‖ ⊙ (W + ΔW) x
            + bias. As in PEFT the norm is a constant for the gradient, and with dropout W sees the dropped x too.
        init_lora_weights: True, "gaussian" or False, see :meth:`reset_lora_parameters`.
        device, dtype: of weight and bias.
        adapter_dtype: of lora_a and lora_b; default float32 over bfloat16 and float16, else ``dtype``.

    Shapes: x (..., K) -> (..., N). ``fan_in_fan_out`` is True over the Conv1D of transformers, whose weight is (K, N).

    Raises:
        TypeError, ValueError: r is not an int of at least 1; lora_alpha not finite; lora_dropout outside [0, 1]; an
            unknown init_lora_weights; a dtype that is not one of float64, float32, bfloat16, float16.

    Source: Hu et al., LoRA, arXiv 2106.09685.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        init_lora_weights: bool | str = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ):
        super().__init__(r, lora_alpha, lora_dropout, use_rslora)
        use_dora = check_switch(use_dora, "use_dora")
        check_dtypes(dtype=dtype, adapter_dtype=adapter_dtype)
        linear = nn.Linear(in_features, out_features, check_bias(bias), device=device, dtype=dtype)
        self._adopt(linear, adapter_dtype, init_lora_weights)
        if use_dora:
            self._decompose()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        init_lora_weights: bool | str = True,
        adapter_dtype: torch.dtype | None = None,
    ) -> LoRALinear:
        """A LoRALinear over an existing nn.Linear, or Conv1D of transformers: the same weight and bias parameters,
        frozen, nothing copied. Hooks registered on ``linear`` stay there and do not run on the new layer.

        Raises:
            TypeError: linear is neither of the two, or a subclass with a forward of its own.
            ValueError: linear is parametrized, or hooks compute its weight or bias (pruning, the old weight_norm).
        """
        layer = cls.__new__(cls)
        LoRALayer.__init__(layer, r, lora_alpha, lora_dropout, use_rslora)
        use_dora = check_switch(use_dora, "use_dora")  # before the base is touched
        layer._adopt(linear, adapter_dtype, init_lora_weights)
        if use_dora:
            layer._decompose()
        return layer

    def _decompose(self) -> None:
        """Make this a DoRA layer that starts as its base."""
        self._norms = Norms()
        self.magnitude = nn.Parameter(self._row_norms().to(self.lora_a.dtype))

    def _row_norms(self) -> Tensor:
        weight = self.weight.t() if self.fan_in_fan_out else self.weight
        return row_norms(weight, self.lora_a, self.lora_b, self._scale)

    def reset_lora_parameters(self, init_lora_weights: bool | str = True) -> None:
        """Draw new factors as :class:`LoRALayer` does; a magnitude starts with the lengths of the rows of W + ΔW."""
        super().reset_lora_parameters(init_lora_weights)
        if self.magnitude is not None:
            with torch.no_grad():
                self.magnitude.copy_(self._row_norms())

    def _read_base(self, base: nn.Module) -> None:
        self.fan_in_fan_out = is_transformers_conv1d(base)
        if self.fan_in_fan_out:
            self.in_features, self.out_features = base.get_parameter("weight").shape
        elif isinstance(base, nn.Linear):
            if type(base).forward is not nn.Linear.forward or "forward" in base.__dict__:
                raise TypeError(f"{type(base).__name__} has a forward of its own, which LoRALinear would not run")
            if parametrize.is_parametrized(base):
                raise ValueError(
                    "the layer is parametrized: call torch.nn.utils.parametrize.remove_parametrizations first, or use "
                    "fused_lora.parametrize"
                )
            self.in_features, self.out_features = base.in_features, base.out_features
        else:
            raise TypeError(f"from_linear takes an nn.Linear or a transformers Conv1D, got {type(base).__name__}")

    def _factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (self.r, self.in_features), (self.out_features, self.r)

    def delta_weight(self) -> Tensor:
        """ΔW = scale · lora_b lora_a in the shape of weight, in float32 (float64 for a float64 layer)."""
        acc = torch.promote_types(self.lora_a.dtype, torch.float32)
        a, b = self.lora_a.to(acc), self.lora_b.to(acc)
        with without_autocast(a.device):
            delta = torch.mm(a.t(), b.t()) if self.fan_in_fan_out else torch.mm(b, a)
        return delta.mul_(self._scale)

    def _add_delta(self, delta: Tensor) -> Tensor:
        total = super()._add_delta(delta)
        if self.magnitude is not None:
            ratio = self.magnitude.to(total.dtype) / self._row_norms().to(total.dtype)
            total *= ratio if self.fan_in_fan_out else ratio[:, None]
        return total

    def to_linear(self) -> nn.Linear:
        """A plain nn.Linear with the layer's present behaviour: ΔW merged in, or the base alone where disabled.

        The weight is a copy (the base weight itself is shared only where an nn.Linear's LoRA is disabled); the bias is
        shared.
        """
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        if self._enabled or self.fan_in_fan_out:
            weight = self._sum_weight() if self._enabled else self.weight.detach()
            weight = weight.t().contiguous() if self.fan_in_fan_out else weight
            linear.weight = nn.Parameter(weight, requires_grad=False)
        else:
            linear.weight = self.weight
        linear.bias = self.bias  # type: ignore[assignment]
        return linear.train(self.training)

    def _base_forward(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.fan_in_fan_out:  # what Conv1D itself computes
            y = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), weight)  # type: ignore[arg-type]
            return y.view(*x.shape[:-1], self.out_features)
        return F.linear(x, weight, self.bias)

    def _lora_forward(self, x: Tensor) -> Tensor:
        if self.magnitude is not None:
            return self._dora_forward(x)
        return lora_linear(
            x,
            self.weight.t() if self.fan_in_fan_out else self.weight,
            self.lora_a,
            self.lora_b,
            self._runtime_scale(),
            self.bias,
            dropout_p=self.lora_dropout,
            training=self.training,
        )

    def _dora_forward(self, x: Tensor) -> Tensor:
        weight = self.weight.t() if self.fan_in_fan_out else self.weight
        dtype = check_operands(x, weight, self.lora_a, self.lora_b, self.bias, None)
        assert self.magnitude is not None
        p = self.lora_dropout if self.training else 0.0
        adapter = Adapter(self.lora_a, self.lora_b, self.magnitude, self._runtime_scale(), p)
        # What Norms keeps makes a second call another sequence of operations: no selective checkpoint could replay it.
        if torch.compiler.is_compiling() or transformed() or watched():
            return dora_formula(x, weight, self.bias, adapter, dtype)
        rows = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
        y = dora_forward(rows, weight, self.bias, adapter, dtype, self._norms)
        # No view of what a Function made: autograd forbids in-place work (an activation, += residual) on one.
        return y if x.dim() == 2 else torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], self.out_features))

    def extra_repr(self) -> str:
        layout = "fan_in_fan_out=True, " if self.fan_in_fan_out else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{layout}{self._lora_repr()}"
        )


class LoRAEmbedding(LoRALayer):
    """An embedding with a LoRA branch: row i of ``weight + scale · (lora_b lora_a)ᵀ``; ΔW is never built in forward.

    ``y = weight[i] + scale · lora_a[:, i] lora_bᵀ``. lora_a is zero and lora_b normal at start, as in PEFT, so the
    layer begins as its base. weight is frozen. There is no dropout: an index has no elements to drop.

    Args:
        num_embeddings, embedding_dim: V and D.
        padding_idx: its row of weight gets no gradient, and neither does its column of lora_a.
        scale_grad_by_freq: as in nn.Embedding, for lora_a.
        r, lora_alpha, use_rslora, device, dtype, adapter_dtype: as in :class:`LoRALinear`.
        init_lora_weights: True or "gaussian", the start above; False, both factors normal.

    Shapes: i (...) of integers -> (..., D) in the dtype of weight.

    Raises:
        TypeError, ValueError: r is not an int of at least 1; lora_alpha not finite; an unknown init_lora_weights; a
            dtype that is not one of float64, float32, bfloat16, float16.

    Source: Hu et al., LoRA, arXiv 2106.09685; the branch as in Microsoft's loralib and PEFT.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        scale_grad_by_freq: bool = False,
        r: int = 8,
        lora_alpha: float = 16,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ):
        super().__init__(r, lora_alpha, 0.0, use_rslora)
        check_dtypes(dtype=dtype, adapter_dtype=adapter_dtype)
        embedding = nn.Embedding(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        embedding.scale_grad_by_freq = scale_grad_by_freq
        self._adopt(embedding, adapter_dtype, init_lora_weights)

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        *,
        r: int = 8,
        lora_alpha: float = 16,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        adapter_dtype: torch.dtype | None = None,
    ) -> LoRAEmbedding:
        """A LoRAEmbedding over an existing nn.Embedding: the same weight parameter, frozen, nothing copied.

        Raises:
            TypeError: embedding is not an nn.Embedding.
            ValueError: it has max_norm, which rewrites the weight in forward, or sparse gradients; its weight is
                computed, by a parametrization or a hook.
        """
        layer = cls.__new__(cls)
        LoRALayer.__init__(layer, r, lora_alpha, 0.0, use_rslora)
        layer._adopt(embedding, adapter_dtype, init_lora_weights)
        return layer

    def _read_base(self, base: nn.Module) -> None:
        if not isinstance(base, nn.Embedding):
            raise TypeError(f"from_embedding takes an nn.Embedding, got {type(base).__name__}")
        if base.max_norm is not None:
            raise ValueError(
                f"max_norm={base.max_norm:g} would rewrite the frozen weight in forward: clip the weight once and use "
                "an embedding with max_norm=None"
            )
        if base.sparse:
            raise ValueError(
                "sparse=True is not supported: weight is frozen and lora_a's gradient is dense; set sparse=False"
            )
        self.num_embeddings, self.embedding_dim = base.num_embeddings, base.embedding_dim
        self.padding_idx, self.scale_grad_by_freq = base.padding_idx, base.scale_grad_by_freq

    def _factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (self.r, self.num_embeddings), (self.embedding_dim, self.r)

    def reset_lora_parameters(self, init_lora_weights: bool | str = True) -> None:
        """Draw new factors, as PEFT does: lora_b normal; lora_a zero, or normal where ``init_lora_weights`` is False.

        Raises:
            ValueError: not True, False or "gaussian".
        """
        if check_init(init_lora_weights) is False:
            nn.init.normal_(self.lora_a)
        else:
            nn.init.zeros_(self.lora_a)
        nn.init.normal_(self.lora_b)

    def delta_weight(self) -> Tensor:
        """ΔW = scale · (lora_b lora_a)ᵀ, (V, D), in float32 (float64 for a float64 layer)."""
        acc = torch.promote_types(self.lora_a.dtype, torch.float32)
        with without_autocast(self.lora_a.device):
            return torch.mm(self.lora_a.to(acc).t(), self.lora_b.to(acc).t()).mul_(self._scale)

    def _base_forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(x, weight, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)

    def _lora_forward(self, x: Tensor) -> Tensor:
        base = self._base_forward(x, self.weight)
        acc = torch.promote_types(self.lora_a.dtype, torch.float32)
        s = self._base_forward(x, self.lora_a.t()).to(acc) * self._runtime_scale()  # (..., R)
        return (base + F.linear(s, self.lora_b.to(acc))).to(base.dtype)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f"padding_idx={self.padding_idx}, "
        return f"{self.num_embeddings}, {self.embedding_dim}, {padding}{self._lora_repr()}"
