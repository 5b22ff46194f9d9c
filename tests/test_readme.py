"""The README's example runs as printed, the commands after it find what it saved, and its set-up commands exist."""

import re
from pathlib import Path

import pytest

from tinker_jax.cli.main import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LOOP = re.search(r"## The loop\n\n```python\n(.*?)```", README, re.DOTALL).group(1)  # type: ignore[union-attr]
AFTER = re.search(r"## After training\n.*?```bash\n(.*?)```", README, re.DOTALL).group(1)  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def output():
    """Lines that the loop prints."""
    lines = []
    exec(compile(LOOP, "README.md", "exec"), {"print": lambda line: lines.append(str(line))})
    return lines


def test_the_loop_learns(output):
    *losses, first, second, _ = output
    losses = [float(loss) for loss in losses]
    assert losses[-1] < 0.5 * losses[0]
    assert first == second and first.startswith("'")  # two greedy samples


def test_the_loop_does_the_same_every_time_and_uses_nothing_deprecated(output, recwarn):
    again = []
    exec(compile(LOOP, "README.md", "exec"), {"print": lambda line: again.append(str(line))})
    assert again[:-1] == output[:-1]
    assert not [warning for warning in recwarn if "deprecated in the Tinker API" in str(warning.message)]


def test_the_commands_after_the_loop_find_what_it_saved(output, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = output[-1]
    commands = [line.partition("#")[0].split() for line in AFTER.splitlines()]
    for program, *arguments in commands:
        assert program == "tinker-jax"
        assert main([re.sub(r"tinker://RUN/weights/final", path, argument) for argument in arguments]) == 0
    assert path in capsys.readouterr().out
    assert (tmp_path / "adapter" / "adapter_config.json").exists() and (tmp_path / "model" / "config.json").exists()


def test_the_set_up_commands_are_make_targets():
    commands = re.findall(r"^make (\w+)", README, re.MULTILINE)
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert commands == ["quickstart", "test"] and set(commands) <= set(targets)


def test_every_file_the_readme_links_to_exists():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("http") or (ROOT / link).exists(), link
