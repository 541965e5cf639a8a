"""``python -m fused_lora``: the same as the command ``fused-lora``."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
