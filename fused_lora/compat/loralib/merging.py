"""What loralib's layers share: their settings, and a weight that is merged by ``eval()`` and restored by ``train()``.

weight: the frozen base, or base + ΔW while ``merged``;  ΔW = scaling · lora_B lora_A in the layout of weight.

loralib adds ΔW to the weight in place and subtracts it again, which drifts, and corrupts the weight where a factor or
the weight was loaded in between. Here the base is kept beside the merged weight, so ``train()`` restores its bits, and
what changes while merged is followed. Users see the same: ``weight`` holds the sum while ``merged``, in place.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ...checks import without_autocast
from ...dropout import check_p
from ...layer import check_alpha, check_rank
from ...substitution import is_plain

# The state dicts that hold a layer's weight itself, not a copy: (the tensor in the dict, the layer's metadata there).
_Holder = tuple["weakref.ref[Tensor]", dict[str, Any]]
_HOLDERS: weakref.WeakKeyDictionary[MergingLayer, list[_Holder]] = weakref.WeakKeyDictionary()


class LoRALayer:
    """The settings of a LoRA layer; a mixin, so that ``isinstance(module, LoRALayer)`` finds the layers.

    Attributes: ``r``, ``lora_alpha``, ``lora_dropout`` (a module), ``merged``, ``merge_weights``.

    Raises:
        TypeError: r is not an int; lora_alpha or lora_dropout not a number.
        ValueError: r below 0; lora_alpha not finite; lora_dropout outside [0, 1].
    """

    merged: bool = False

    def __init__(self, r: int, lora_alpha: float, lora_dropout: float, merge_weights: bool):
        check_rank(r, least=0)
        check_alpha(lora_alpha)
        p = check_p(lora_dropout, "lora_dropout")
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = nn.Dropout(p) if p else nn.Identity()
        self.merged = False
        self.merge_weights = merge_weights


class MergingLayer(LoRALayer, nn.Module):
    """A LoRA layer that merges; not for direct use. A subclass defines ``_delta_weight``."""

    weight: Tensor
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scaling: float
    _base: Tensor | None = None  # weight without ΔW; None while not merged, and where a file brought the merged weight
    _sum: tuple[int, ...] = ()  # weight as merging left it
    _merged_from: tuple[Any, ...] = ()  # the scaling and the factors that were merged

    def _set_up(self, r: int, lora_alpha: float, lora_dropout: float, merge_weights: bool) -> None:
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        self.register_load_state_dict_post_hook(_settle)

    def _add_factors(self, shape_a: tuple[int, int], shape_b: tuple[int, int]) -> None:
        """Freeze weight and put the factors, not yet initialised, beside it."""
        self.lora_A = nn.Parameter(self.weight.new_zeros(shape_a))
        self.lora_B = nn.Parameter(self.weight.new_zeros(shape_b))
        self.scaling = self.lora_alpha / self.r
        self.weight.requires_grad = False

    @property
    def _adapts(self) -> bool:
        """Whether the layer has factors; without, it is its base layer."""
        return "lora_A" in self._parameters

    def _delta_weight(self) -> Tensor:
        """ΔW in the layout of weight, in float32 (float64 for a float64 layer)."""
        raise NotImplementedError

    def _product(self, b: Tensor) -> Tensor:
        """scaling · b lora_A in float32 or wider, whatever autocast says."""
        acc = torch.promote_types(self.lora_A.dtype, torch.float32)
        with without_autocast(b.device):
            return torch.mm(b.to(acc), self.lora_A.to(acc)) * self.scaling

    def train(self, mode: bool = True) -> MergingLayer:
        """Unmerge for training, merge for evaluation, unless ``merge_weights`` is False; return the layer."""
        super().train(mode)
        if self.merge_weights and self.merged == bool(mode):
            self._unmerge() if mode else self._merge()
        return self

    def _merge(self) -> None:
        if self._adapts:
            with torch.no_grad():
                self._base = self.weight.detach().clone()
                self.weight.data.copy_(self._delta_weight().add_(self._base))
            self._sum, self._merged_from = _versions(self.weight), self._factor_versions()
        self.merged = True
        self._mark()

    def _unmerge(self) -> None:
        if self._adapts:
            with torch.no_grad():
                if self._base is not None and self._exact:
                    self.weight.data.copy_(self._base)
                else:
                    self.weight.data.copy_(self._delta_weight().neg_().add_(self.weight))
        self._base, self.merged = None, False
        self._mark()

    def _mark(self) -> None:
        """Keep true what a state dict says of a weight that is this layer's own memory, written by every change."""
        if not (holders := _HOLDERS.get(self)):
            return
        _HOLDERS[self] = [(ref, said) for ref, said in holders if _same_memory(ref(), self.weight)]
        for _, said in _HOLDERS[self]:
            said["merged"] = self.merged

    @property
    def _exact(self) -> bool:
        """Whether weight is still what merging left, so that its base is known and not computed."""
        return self._base is not None and self._sum == _versions(self.weight)

    def _factor_versions(self) -> tuple[Any, ...]:
        return (self.scaling, *_versions(self.lora_A), *_versions(self.lora_B))

    def _runs_as_base(self) -> bool:
        """Whether forward is the base layer's with the present weight. That follows its factors first."""
        if not self.merged or not self._adapts:
            return not self._adapts
        if not torch.compiler.is_compiling() and self._merged_from != self._factor_versions() and self._exact:
            self._unmerge()
            self._merge()
        return True

    def _tie(self) -> None:
        """Make one parameter with two names one again, after a conversion or an assigning load."""

    def _apply(self, fn: Any, recurse: bool = True) -> MergingLayer:
        # The base has to follow too, and converting the sum would round it twice.
        exact = self._exact
        if exact:
            self._unmerge()
        super()._apply(fn, recurse)
        self._tie()
        if exact:
            self._merge()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Versions start anew in a copy: weight is what merging left, the factors are to be looked at once.
        self._sum, self._merged_from = _versions(self.weight), ()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None and self._adapts:
            metadata["merged"] = self.merged
            self._held_by(destination.get(prefix + "weight"), metadata)

    def _held_by(self, t: Tensor | None, metadata: dict[str, Any]) -> None:
        # A parameter outlives its place in the dict, so that it would not tell when a copy has taken that place.
        if t is not None and t is not self.weight and _same_memory(t, self.weight):
            alive = [holder for holder in _HOLDERS.get(self, ()) if holder[0]() is not None]
            _HOLDERS[self] = [*alive, (weakref.ref(t), metadata)]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        was_merged, weight = self.merged, state_dict.get(prefix + "weight")
        if was_merged:
            self._unmerge()
        # Our own memory was unmerged with us just now, or before: whatever is said of it, it holds the base.
        whole = prefix + "lora_A" in state_dict and weight is not None and not _same_memory(weight, self.weight)
        # loralib's files do not say what their weight is. In loralib a merged layer takes it for merged, and so here.
        self._loading = was_merged, self._adapts and whole and local_metadata.get("merged", was_merged)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if self._adapts:
            self._held_by(weight, local_metadata)  # assign=True made it our memory


def _settle(layer: MergingLayer, _incompatible_keys: Any) -> None:
    """Runs after a layer and its children are loaded: what the file held becomes what the layer's state wants."""
    layer._tie()
    was_merged, file_is_merged = layer.__dict__.pop("_loading", (layer.merged, False))
    if file_is_merged:
        layer.merged = True
        layer._mark()
        if not was_merged:
            layer._unmerge()
    elif was_merged and not layer.merged:
        layer._merge()


def _versions(t: Tensor) -> tuple[int, ...]:
    # Inference tensors count no versions: they cannot be written outside inference mode either.
    return id(t), 0 if t.is_inference() else t._version


def _same_memory(t: Tensor | None, weight: Tensor) -> bool:
    """Whether writing weight in place writes t."""
    if not (is_plain(t) and is_plain(weight)) or t.is_meta or t.device != weight.device or not t.numel():
        return False
    return t.data_ptr() == weight.data_ptr()
