"""Writes docs/models.md from the results of tests: `make models-table`, or `python scripts/models_table.py results.xml ...`.

Results are those of `pytest -o junit_family=xunit1 --junitxml=results.xml`. A test of a family records it with
`record_property("family", name)`, and beside it what it measured, under the names in `TABLES`.
"""

from __future__ import annotations

import math
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tinker_jax.models.registry import FAMILIES

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
HEAD = """\
# Models

What tests measured of each family, on a CPU in float32 unless it says otherwise. `make models-table` runs them and writes this
page from their results (`scripts/models_table.py`); don't edit it. What no test recorded is "not tested".

The models are tiny ones with random weights: norms, biases and routers too. A figure is the largest over the configurations in
brackets, which differ in sizes, options and weights, rounded up to one digit. transformers and torch autograd give the numbers
that ours are compared with; of Kimi-K2, which transformers lacks, its DeepSeek-V3 does.
"""


class Record(NamedTuple):
    """What a test recorded of a family."""

    family: str
    name: str
    value: str
    test: str


def records(file: Path) -> list[Record]:
    """Those of a file of results.

    Raises:
        SystemExit: a test failed.
    """
    found = []
    for case in ET.parse(file).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            sys.exit(f"{file}: {case.get('name')} failed; nothing is written.")
        properties = [(p.attrib["name"], p.attrib["value"]) for p in case.iter("property")]
        test = f"{case.get('file')}::{case.attrib['name'].partition('[')[0]}"
        for family in (value for name, value in properties if name == "family"):
            found += [Record(family, name, value, test) for name, value in properties if name != "family"]
    return found


def rounded_up(value: float) -> str:
    """To one digit: 0.00234 → "3e-3"."""
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(value))
    digit = math.ceil(value / 10.0**exponent - 1e-9)
    return f"{digit}e{exponent}" if digit < 10 else f"1e{exponent + 1}"


def largest(values: Sequence[str]) -> str:
    most = max(map(float, values))
    return f"{'≤ ' if most else ''}{rounded_up(most)} ({len(values)})"


def at_least(values: Sequence[str]) -> str:
    smallest = min(map(float, values))
    return f"{math.floor(smallest * 10) / 10:.1f} ({len(values)})"


def equal_prompts(values: Sequence[str]) -> str:
    return f"equal after {sum(map(int, values))} prompts ({len(values)})"


def listed(values: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def code(values: Sequence[str]) -> str:
    return ", ".join(f"`{value}`" for value in dict.fromkeys(values))


EXPERTS = "Experts: sampling and training on the same tokens"
Render = Callable[[Sequence[str]], str]
#: Section: columns, each a heading, the name that tests record, and how values become a cell.
TABLES: dict[str, dict[str, tuple[str, Render]]] = {
    "Training": {
        "log-probabilities": ("log-probabilities in training", largest),
        "adapter's gradients, relative": ("gradients", largest),
        "LoRA targets": ("LoRA target", code),
    },
    "Sampling": {
        "greedy tokens": ("greedy prompt lengths", equal_prompts),
        "log-probabilities": ("log-probabilities in sampling", largest),
        "log-probabilities under adapters": ("log-probabilities in sampling under adapters", largest),
    },
    EXPERTS: {
        "other choices, share": ("choices of experts that differ, float32", largest),
        "in bfloat16": ("choices of experts that differ, bfloat16", largest),
        "log-probabilities, mean": ("mean difference of log-probabilities, float32", largest),
        "log-probabilities, mean, in bfloat16": ("mean difference of log-probabilities, bfloat16", largest),
    },
    "Files": {
        "read from safetensors": ("import", listed),
        "PEFT adapters read": ("adapter import", listed),
        "a restored run goes on": ("resumed", listed),
    },
    "Exports of a trained adapter: log-probabilities": {
        "the adapter moves them by": ("moved by", at_least),
        "merged, in transformers": ("export merged, transformers", largest),
        "merged, in tinker_jax": ("export merged, tinker_jax", largest),
        "PEFT, in peft": ("export PEFT, peft", largest),
        "Tinker's layout, by its own names and shapes": ("export Tinker's layout", listed),
        "Tinker's layout, in tinker_cookbook": ("export Tinker's layout, tinker_cookbook", largest),
    },
    "Models of the hub whose configurations are read": {
        "names": ("hub", listed),
    },
}


def table(columns: dict[str, tuple[str, Render]], found: Sequence[Record], families: Iterable[str]) -> list[str]:
    lines = ["| family | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for family in families:
        cells = []
        for name, render in columns.values():
            values = [record.value for record in found if (record.family, record.name) == (family, name)]
            cells.append(render(values) if values else "not tested")
        lines.append(f"| `{family}` | " + " | ".join(cells) + " |")
    return lines


def page(found: Sequence[Record]) -> str:
    lines, sources = [HEAD], []
    with_experts = {record.family for record in found if record.name == "LoRA target" and "experts" in record.value}
    for title, columns in TABLES.items():
        families = [family for family in FAMILIES if title != EXPERTS or family in with_experts]
        lines += [f"## {title}", "", *table(columns, found, families), ""]
        for heading, (name, _) in columns.items():
            tests = dict.fromkeys(f"`{record.test}`" for record in found if record.name == name)
            sources.append(f"| {title.partition(':')[0]}: {heading} | {'<br>'.join(tests) or 'none'} |")
    return "\n".join([*lines, "## Tests", "", "| column | test |", "|---|---|", *sources, ""])


if __name__ == "__main__":
    PAGE.write_text(page([record for file in sys.argv[1:] for record in records(Path(file))]), encoding="utf-8")
