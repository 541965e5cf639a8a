"""Layers of other LoRA libraries over the fused operator: their names, signatures and state-dict keys."""
