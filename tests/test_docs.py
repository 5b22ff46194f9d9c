"""The pages of losses say what the table of losses says."""

import re
from pathlib import Path

from tinker_jax.types.loss_specs import LOSS_SPECS

PAGE = (Path(__file__).parent.parent / "docs" / "losses.md").read_text(encoding="utf-8")


def test_the_table_of_losses_is_the_table_in_the_code():
    rows = {m[1]: m[0] for m in re.finditer(r"^\| `(?!loss_fn)(\w+)` \|.*$", PAGE, re.MULTILINE)}
    assert set(rows) == set(LOSS_SPECS)
    for name, spec in LOSS_SPECS.items():
        _, _, inputs, config, *_ = (cell.strip() for cell in rows[name].split("|"))
        wanted = [key if declared.required else f"[{key}]" for key, declared in spec.inputs.items()]
        assert inputs.split(", ") == wanted, name
        documented = {} if config == "–" else dict(item.rsplit(" ", 1) for item in config.split(", "))
        assert {key: float(value) for key, value in documented.items()} == dict(spec.config), name
