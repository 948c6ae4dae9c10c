"""Does the method hold for others? The demo's setting, more like it, and bad teachers among good.

SmolLM2-135M into a LoRA student of 12,288 tokens, every arm on the same blocks. Settings:

    two, three            experts of two and of three domains, on these domains
    foreign               two experts, and a third domain that no teacher knows
    useless, harmful,     two experts and a third teacher: random weights; an expert of shuffled
    confident             words; an expert whose logits are three times as large

Prints a table for each setting. The last line is one JSON object. Differences are nats a token, the
recipe's arm less the other one, with their 95 % interval: negative is good for the recipe.

    gain_over_ce, gain_over_ce_in_equal_time, gain_over_best_merge, gain_over_uniform
                          of the setting `two`, and by setting
    worst_domain_loss     loss of the recipe's arm less that of the domain's best teacher, on the
                          domain where it is worst
    bad_teacher_loss      by how much a bad teacher raises the loss of the recipe's arm, as a share
                          of the loss without it; the worst of the three

Teachers, caches and finished arms stay, so that a second call goes on.

    make bench-method ARGS="--settings two,useless,harmful,confident --seeds 3"
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import yaml

from compress.ablate import ablate
from limbeck.app.run import make_products
from limbeck.contract.machine import host
from limbeck.contract.recipe import load_recipe
from limbeck.contract.sources.texts import text_files

EXPERTS = {
    "speeches": "smollm2/expert-speeches",
    "scripture": "smollm2/expert-scripture",
    "code": {"kind": "stdlib", "paths": ["[a-m]*.py"]},
}
BAD = {"useless": "random", "harmful": "shuffled", "confident": "sharpened"}
SETTINGS: dict[str, tuple[list[str], list[str]]] = {  # teachers and domains
    "two": (["speeches", "scripture"], ["speeches", "scripture"]),
    "three": (["speeches", "scripture", "code"], ["speeches", "scripture", "code"]),
    "foreign": (["speeches", "scripture"], ["speeches", "scripture", "code"]),
    **{n: (["speeches", "scripture", bad], ["speeches", "scripture"]) for n, bad in BAD.items()},
}
MERGES = ["merge-average", "merge-ties", "merge-dare", "merge-svd"]
ARMS = ["recipe", "ce-only-equal-time", "uniform", "entropy-token", "best-single", "routed-oracle"]


class Bench:
    """Recipes and teachers below one folder."""

    def __init__(self, folder: Path, tokens: int, arms: list[str]) -> None:
        self.folder, self.tokens, self.arms = folder.resolve(), tokens, arms
        self.folder.mkdir(parents=True, exist_ok=True)
        demo = load_recipe("smollm2/135m-two-experts").resolved()
        self.base = demo["student"]["base"]
        self.texts = {d["name"]: d["text"] for d in demo["data"]["domains"]}
        self.texts["code"] = EXPERTS["code"]
        self.data = {key: demo["data"][key] for key in ("block", "heldout")}

    def ablation(self, setting: str, seeds: int) -> dict[str, Any]:
        """Run what is missing of a setting; the figures by arm."""
        teachers, domains = SETTINGS[setting]
        tree = {
            "name": f"method-{setting}",
            "teachers": [{"name": name, "model": self.teacher(name)} for name in teachers],
            "data": self.data
            | {"domains": [{"name": name, "text": self.texts[name]} for name in domains]},
            "student": {"kind": "lora", "base": self.base, "rank": 16},
            "training": {"tokens": self.tokens, "batch_tokens": 512, "micro_batch": 2},
        }
        recipe = load_recipe(str(self._written(f"method-{setting}", tree)))
        among = ["recipe", "uniform", "entropy-token"] if setting in BAD else [*ARMS, *MERGES]
        arms = self.arms or among
        out = self.folder / setting
        found = ablate(
            recipe=recipe, products=make_products(recipe), out=out, arms=arms, seeds=seeds
        )
        print(f"\n## {setting}\n\n{found['markdown']}\n\n{found['verdict']}\n", flush=True)
        arms_found: dict[str, Any] = found["arms"]
        return arms_found

    def teacher(self, name: str) -> dict[str, str]:
        """The source of a teacher, made if need be."""
        if isinstance(known := EXPERTS.get(name), str):
            return {"kind": "recipe", "recipe": known}
        if name in ("code", "shuffled"):
            text = self.texts["code"] if name == "code" else self._shuffled()
            tree = {
                "extends": "smollm2/expert-speeches",
                "name": f"method-expert-{name}",
                "data": {"domains": [{"name": name, "text": text}]},
            }
            return {"kind": "recipe", "recipe": str(self._written(f"expert-{name}", tree))}
        return {"kind": "local", "path": str(self._changed(name))}

    def _written(self, name: str, tree: dict[str, Any]) -> Path:
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
        return path

    def _shuffled(self) -> dict[str, Any]:
        """Text of the speeches, its words in random order."""
        path = self.folder / "shuffled.txt"
        if not path.exists():
            recipe = load_recipe("smollm2/expert-speeches")
            files = text_files(recipe.data.domains[0].text, folder=recipe.folder)
            words = " ".join(f.read_text(encoding="utf-8") for f in files[:60]).split()
            random.Random(0).shuffle(words)
            path.write_text(" ".join(words), encoding="utf-8")
        return {"kind": "files", "paths": [str(path)]}

    def _changed(self, name: str) -> Path:
        """A folder with the speeches' expert, its weights drawn anew or its logits sharpened."""
        from transformers import AutoConfig, AutoModelForCausalLM

        out = self.folder / name
        if out.exists():
            return out
        recipe = load_recipe("smollm2/135m-two-experts")
        expert = make_products(recipe)["speeches"] / "model"
        torch.manual_seed(0)
        if name == "random":
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(expert))
        else:
            model = AutoModelForCausalLM.from_pretrained(expert, dtype=torch.float32)
            with torch.no_grad():
                model.model.norm.weight.mul_(3)  # what the head multiplies
        part = out.with_name(f"{name}.part")
        shutil.rmtree(part, ignore_errors=True)
        model.save_pretrained(part)
        for file in expert.glob("*token*"):
            shutil.copy(file, part)
        part.rename(out)
        return out


def figures(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the last line says of the settings that ran."""
    result: dict[str, Any] = {}
    mains = {name: table for name, table in found.items() if name not in BAD}
    for name, table in mains.items():
        merges = [arm for arm in MERGES if arm in table]
        best = min(merges, key=lambda arm: table[arm]["mean_loss"], default=None)
        row = {
            "gain_over_ce": table["ce-only"]["recipe_against_it"],
            "gain_over_ce_in_equal_time": table["ce-only-equal-time"]["recipe_against_it"],
            "gain_over_uniform": table["uniform"]["recipe_against_it"],
            "gain_over_best_merge": table[best]["recipe_against_it"] if best else None,
            "worst_domain_loss": max(
                table["recipe"]["loss"][d] - least
                for d, least in table["routed-oracle"]["loss"].items()
            ),
        }
        result[name] = row
    if "two" in mains:
        result |= result["two"]
        good = mains["two"]["recipe"]["mean_loss"]
        rises = {n: found[n]["recipe"]["mean_loss"] / good - 1 for n in BAD if n in found}
        result["bad_teacher_loss"] = max(rises.values(), default=None)
        result["by_bad_teacher"] = rises
    return result


def main() -> None:
    """Run the settings, one after another."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=12288)
    parser.add_argument("--arms", help="instead of the arms that a setting asks for")
    parser.add_argument("--runs", type=Path, default=Path("runs/method"))
    options = parser.parse_args()
    bench = Bench(options.runs, options.tokens, options.arms.split(",") if options.arms else [])
    found = {name: bench.ablation(name, options.seeds) for name in options.settings.split(",")}
    print(
        json.dumps(
            figures(found)
            | {
                "seeds": options.seeds,
                "tokens": options.tokens,
                "processor": host()["processor"],
                "torch": torch.__version__,
                "onnxruntime": onnxruntime.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
