"""Write the plans in docs/convert.md anew: `python scripts/write_plans.py`. No weight is made."""

import re
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from zoo.convert.headers import read_blueprint, write_headers
from zoo.convert.plan import make_plan
from zoo.convert.recipe import load_recipe
from zoo.convert.show import plan_text

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "convert.md"
TEACHERS = {  # model type -> sizes of about a billion parameters
    "llama": dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                  num_key_value_heads=8, max_position_embeddings=131072, tie_word_embeddings=True),
    "qwen2": dict(vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=16, num_attention_heads=12,
                  num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True),
}  # fmt: skip
PLANS = {"llama": ("zoo", {"keep": 0.25}), "qwen2": ("radlads", {})}
BLOCK = re.compile(r"(<!-- plan (\w+) -->\n```\n).*?(```\n)", re.S)


def plan_of(kind: str) -> str:
    """The plan of a random checkpoint of this type, without the settings."""
    recipe, changes = PLANS[kind]
    with TemporaryDirectory() as folder, torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**TEACHERS[kind]))
        write_headers(folder, model)
        text = plan_text(make_plan(read_blueprint(folder), load_recipe(recipe, changes)))
    return re.sub(r"\n\nSettings\n.*?\n\n", "\n\n", text, flags=re.S)


def written(document: str) -> str:
    """The document with its plans as they are now."""
    return BLOCK.sub(lambda found: found[1] + plan_of(found[2]) + "\n" + found[3], document)


def main() -> None:
    DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {DOCUMENT}")


if __name__ == "__main__":
    main()
