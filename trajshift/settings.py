"""Options and their defaults, stated once; torch-free."""

from __future__ import annotations

from typing import Any

ENGINES = ("auto", "loop", "parallel", "graph")

SGD_OPTIONS: dict[str, dict[str, Any]] = {
    "inner": {"momentum": 0.9, "weight_decay": 5e-4},
    "finetune": {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
}
"""What a section's options are where the recipe leaves them out and its optimizer is SGD."""
