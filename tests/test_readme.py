"""The README's example runs as printed, and its set-up commands exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_loop_of_the_readme_runs_and_learns(capsys):
    source = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    exec(compile(source, "README.md", "exec"), {})
    *losses, first, second = capsys.readouterr().out.splitlines()
    losses = [float(x) for x in losses]
    assert losses[-1] < 0.5 * losses[0]
    assert first == second and first.startswith("'")  # two greedy samples


def test_the_set_up_commands_are_make_targets():
    commands = re.findall(r"^make (\w+)", README, re.MULTILINE)
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert commands == ["quickstart", "test"] and set(commands) <= set(targets)


def test_every_file_the_readme_links_to_exists():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("http") or (ROOT / link).exists(), link
