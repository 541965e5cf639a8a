"""Only what pyproject.toml cannot say: the folder ``kernels/`` is the package ``fused_lora.kernels``.

A top-level package named ``kernels`` would collide with the one on PyPI that transformers imports.
"""

from setuptools import setup

setup(
    packages=["fused_lora", "fused_lora.ops", "fused_lora.compat", "fused_lora.compat.loralib", "fused_lora.kernels"],
    package_dir={"fused_lora.kernels": "kernels"},
)
