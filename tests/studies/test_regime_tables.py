"""The tables of the paper's regime, from made-up rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from studies.regime.setting import METHODS, REGIME, TARGETS
from studies.regime.tables import print_tables


def rows(seeds: int) -> list[dict[str, Any]]:
    """Made-up rows: shifting two points above the others, which rise with the steps and the seed."""
    made = []
    for seed in range(seeds):
        for step, method in [(0, "scratch"), *((step, method) for step in (1000, 2000) for method in METHODS)]:
            rates = (
                dict.fromkeys(("inner_lr", "meta_lr", "tuned"))
                if step == 0
                else {"inner_lr": 0.1, "meta_lr": 1.0, "tuned": True}
            )
            accuracy = 0.5 + step / 10_000 + 0.01 * seed + (0.02 + 0.001 * seed) * (method == METHODS[0])
            for target in TARGETS:
                for lr in REGIME.finetune_lrs:
                    row = {"size": "32", "method": method, "seed": seed, **rates, "inner_steps": step, "target": target}
                    made.append(row | {"train_images": 1000, "finetune_lr": lr, "accuracy": accuracy})
    return made


@pytest.mark.parametrize("seeds", [2, 3])
def test_nothing_is_claimed_below_three_seeds(seeds: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(seeds)))
    print_tables(tmp_path, tmp_path)
    said = capsys.readouterr().out
    assert "**Size 32, rates tuned at this size, fine-tuning rate 0.03**" in said
    if seeds == 2:
        assert "| 2 (too few for a claim) | 62.55 | 62.55 |" in said
        assert "| 1,000 | fewer than 3 seeds | 2 | fewer than 3 seeds | 2 | fewer than 3 seeds | 2 |" in said
        assert "±" not in said
    else:
        assert "| 1,000 | reptile | 3 | 61.00 ± 2.48 |" in said
        assert "| 1,000 | +2.10 ± 0.25 (0.00076; 0.0023) | 3 |" in said
    assert (tmp_path / "accuracy-32.svg").read_text().startswith("<?xml")


def test_rows_of_several_rates_are_not_averaged(tmp_path: Path) -> None:
    mixed = rows(1)
    mixed[-1]["inner_lr"] = 0.2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mixed))
    with pytest.raises(ValueError, match="rows of no-shifting at size 32 have several rates"):
        print_tables(tmp_path, tmp_path)
