"""The page of losses says what the table of losses says; that of models has every family, and tests that exist."""

import re
from pathlib import Path

from tinker_jax.models.registry import FAMILIES
from tinker_jax.types.loss_specs import LOSS_SPECS

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
MODELS = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


def test_the_table_of_losses_is_the_table_in_the_code():
    rows = {m[1]: m[0] for m in re.finditer(r"^\| `(?!loss_fn)(\w+)` \|.*$", PAGE, re.MULTILINE)}
    assert set(rows) == set(LOSS_SPECS)
    for name, spec in LOSS_SPECS.items():
        _, _, inputs, config, *_ = (cell.strip() for cell in rows[name].split("|"))
        wanted = [key if declared.required else f"[{key}]" for key, declared in spec.inputs.items()]
        assert inputs.split(", ") == wanted, name
        documented = {} if config == "–" else dict(item.rsplit(" ", 1) for item in config.split(", "))
        assert {key: float(value) for key, value in documented.items()} == dict(spec.config), name


def test_every_table_of_models_has_a_row_of_each_family():
    *tables, _ = re.split(r"^## ", MODELS, flags=re.MULTILINE)[1:]
    assert len(tables) > 1
    for table in tables:
        rows = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
        assert rows == [family for family in FAMILIES if family in rows or not table.startswith("Experts")], table


def test_the_tests_that_the_page_of_models_names_exist():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", MODELS)
    assert named
    for file, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), (file, test)
