"""The family of a model is known to `tinker_jax.models` alone; elsewhere its name is only shown."""

from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "tinker_jax"
SHOWN = {
    ("sampling/requests.py", 'is {type(chunk).__name__}, but {cfg.model_type} is a text model; send text tokens only."'),
    ("engine/engine.py", "    model_type: str"),
    ("engine/engine.py", "ModelInfo(self.base_model, cfg.model_type, str(directory), cfg.context_length, cfg.V)"),
    ("engine/engine.py", "            cfg.model_type,"),
}


def test_nothing_outside_of_models_branches_on_the_family():
    found = [
        (path.relative_to(PACKAGE).as_posix(), line)
        for part in ("training", "sampling", "checkpoints", "engine")
        for path in sorted((PACKAGE / part).rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if "model_type" in line
    ]
    unknown = [(path, line) for path, line in found if not any(path == p and line.endswith(end) for p, end in SHOWN)]
    assert not unknown and len(found) == len(SHOWN)
