"""A run as a folder that others can use without it: LLM, RecHead, item index, catalogue, model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rporec import __version__
from rporec.config import Config, ConfigError
from rporec.data import Dataset
from rporec.evaluation.table import IN_WORDS
from rporec.files import read_json, replacing, write_json
from rporec.run import Run

if TYPE_CHECKING:
    from rporec.models.rechead import RecHead
    from rporec.recipes.rporec import RPORec

# Beside its safetensors a model folder may hold the same weights in other formats: not copied.
_COPIED = (".json", ".safetensors", ".txt", ".model", ".tiktoken", ".jinja")


def export_run(run: Run, out: Path) -> Path:
    """Write the folder `out`, whole or not at all, and return it.

    The LLM that validation picked (without RL: that of the warm-up) and its tokenizer lie at the top,
    as transformers expects; `rechead/` is the head that ranks test. What the other files are and how
    all of them work together is in the model card, `README.md`.
    Raises ConfigError when stage 1 has not finished or `out` exists and is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: exists and is not empty; choose another --out")
    run.require("stage1", "export")
    from rporec.recipes.head_stage import final_head
    from rporec.recipes.rporec import RPORec

    recipe = RPORec(run, run.config())
    head = final_head(run, recipe, "head")
    with replacing(out) as folder:
        folder.mkdir()
        _copy_model(run.best_model if run.best_model.is_dir() else run.warm_model, folder)
        head.save(folder / "rechead")
        _write_index(head, folder / "item_index.safetensors")
        recipe.dataset.catalog.write(folder / "items.parquet")
        write_json(folder / "prompt.json", _prompt(recipe))
        (folder / "README.md").write_text(model_card(run, recipe.dataset, head, out.resolve().name), encoding="utf-8")
    return out


def _prompt(recipe: RPORec) -> dict[str, Any]:
    """What a PromptWriter needs; `reserve` is also the longest completion."""
    config = recipe.config
    return {
        "text": config.text.model_dump(),
        "tiny": config.tiny_backbone,
        "window": recipe.dataset.window,
        "context": recipe.context,
        "reserve": config.reserve,
    }


def _copy_model(source: Path, folder: Path) -> None:
    if not any(source.glob("*.safetensors")):
        raise ConfigError(f"{source}: no safetensors here; save the backbone as safetensors and train again")
    for path in source.iterdir():
        if path.is_file() and path.suffix in _COPIED:
            shutil.copy(path, folder)


def _write_index(head: RecHead, path: Path) -> None:
    """Item vectors of the head's networks; experts, which are no inner product, stay in `rechead/`."""
    import torch
    from safetensors.torch import save_file

    with torch.no_grad():
        items = head.item_vectors()
    tensors = {"full": items.full, "bias": torch.zeros(len(items.full)) if items.bias is None else items.bias}
    if head.config.fusion == "residual":
        tensors["text"] = items.text.clone()  # may be `full` itself, and safetensors stores no tensor twice
    description = {"format": "pt", "fusion": head.config.fusion, "weights": json.dumps(head.weights)}
    save_file({name: value.float().contiguous().cpu() for name, value in tensors.items()}, path, description)


# --- model card ------------------------------------------------------------------------------
def model_card(run: Run, dataset: Dataset, head: RecHead, name: str) -> str:
    """README.md as the Hugging Face hub reads it: YAML front matter, then Markdown."""
    import yaml

    config, metrics = run.config(), read_json(run.folder / "metrics.json", {})
    method = "rporec_stage2" if run.best_model.is_dir() else "rporec_stage1"
    front = yaml.safe_dump(_front_matter(config, metrics, method, name), sort_keys=False, allow_unicode=True)
    sections = [
        f"# {name}",
        _what(run, config),
        "## Data\n\n" + _data(dataset),
        "## Results\n\n" + _results(metrics, method),
        "## Use\n\n" + _use(head),
        "## Limits\n\n" + _limits(dataset, config),
    ]
    return f"---\n{front}---\n\n" + "\n\n".join(sections) + "\n"


def _front_matter(config: Config, metrics: dict[str, Any], method: str, name: str) -> dict[str, Any]:
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["recommendation", "reinforcement-learning", "reasoning", "rporec"],
    }
    if not config.tiny_backbone and not Path(config.backbone).exists():
        front["base_model"] = config.backbone
    if entry := _methods(metrics).get(method):
        results = {
            "task": {"type": "recommendation", "name": "next item, full ranking"},
            "dataset": {"name": config.name, "type": config.name, "split": metrics["split"]},
            "metrics": [
                {"type": metric, "name": f"{metric.upper()}, {metrics['headline']}", "value": round(entry[metric], 4)}
                for metric in ("ndcg@10", "hr@10")
            ],
        }
        front["model-index"] = [{"name": name, "results": [results]}]
    return front


def _what(run: Run, config: Config) -> str:
    origin = "a small Qwen3 made for this data set" if config.tiny_backbone else f"`{config.backbone}`"
    taught = [] if run.warm_model == run.backbone else ["supervised warm-up"]
    if run.best_model.is_dir():
        best = read_json(run.folder / "best.json")
        version = f", version {best['attempt']}.{best['version']} after step {best['step']}" if best else ""
        taught.append(f"reinforcement learning against the RecHead's ranking (the best on validation{version})")
    history = f"taught by {', then '.join(taught)}" if taught else "as it came"
    return (
        "A language model that reasons about a user before it recommends, and the head that turns its text into a "
        "ranking of the whole catalogue (after RPORec, arXiv 2605.21967).\n\n"
        f"The LLM is {origin}, {history}. It reads a user's last items and writes "
        "`<think> … </think><answer> … </answer>`; the RecHead scores every item from the history, the thought and "
        f"the answer. Made by rporec {__version__}, run `{config.name}`, seed {config.seed}."
    )


def _data(dataset: Dataset) -> str:
    counts, settings = dataset.manifest["counts"], dataset.manifest["settings"]
    samples = ", ".join(f"{count:,} {split}" for split, count in counts["samples"].items())
    return (
        f"{counts['users']:,} users, {counts['items']:,} items, {counts['interactions']:,} interactions; "
        f"split `{settings['split']}`; samples: {samples}. A history holds the last {dataset.window} items."
    )


def _results(metrics: dict[str, Any], method: str) -> str:
    methods = _methods(metrics)
    if not methods:
        return "Not evaluated yet (`rporec evaluate`)."
    removed, part = IN_WORDS[metrics["headline"]], metrics["conventions"][metrics["headline"]]
    lines = [
        f"Split {metrics['split']}, {part['samples']:,} samples of {part['users']:,} users, ranking of the whole "
        f"catalogue, {removed} (convention `{metrics['headline']}`); 95 % bootstrap intervals over users. This folder is "
        f"`{method}`, decoded greedily.",
        "",
        "| method | NDCG@10 | HR@10 |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {m} | {_interval(e, 'ndcg@10')} | {_interval(e, 'hr@10')} |" for m, e in methods.items()]
    if part["paired"]:
        lines += ["", "Paired differences on the same samples, NDCG@10:", "", "| A − B | difference |", "| --- | --- |"]
        lines += [
            f"| {pair.replace('-', ' − ', 1)} | {_interval(entry, 'ndcg@10', 'ci', '+')} |"
            for pair, entry in part["paired"].items()
        ]
    return "\n".join(lines)


def _methods(metrics: dict[str, Any]) -> dict[str, Any]:
    """By name, in the headline convention; {} for a run that has not been evaluated."""
    return metrics.get("conventions", {}).get(metrics.get("headline"), {}).get("methods", {})


def _interval(entry: dict[str, Any], metric: str, interval: str | None = None, sign: str = "") -> str:
    low, high = entry[interval or f"{metric}_ci"]
    return f"{entry[metric]:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def _use(head: RecHead) -> str:
    dim, experts = head.config.dim, ""
    if head.experts:
        read = ", as a reranker reads them" if head.experts.reranker else ""
        experts = f" `head.scores` adds experts: transition rules, text neighbours, popularity{read}."
    if head.config.fusion == "paper":
        tensors = f"`full` [N, {dim}] and `bias` [N]"
        formula = "`q · full + bias`, with `q` from history, thought and answer"
    else:
        tensors = f"`full` [N, {dim}], `text` [N, {dim}] and `bias` [N]"
        formula = "`a (h · full + bias) + b (t · text)`, with `h` from the history, `t` from thought and answer"
    return f"""```python
{_EXAMPLE}```

`items.parquet` is the catalogue; its row order is the item index. `item_index.safetensors` holds what an inner-product
index needs, float32, one row per item: {tensors}. The score of the head's networks is {formula}.{experts}"""


_EXAMPLE = """\
import json

import numpy as np
import torch
from rporec.config import TextConfig
from rporec.data import Catalog
from rporec.models.head_inputs import HeadInputs
from rporec.models.rechead import RecHead
from rporec.text.completion import parse
from rporec.text.prompt import PromptWriter
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, history, now = ".", [0, 1, 2], 1_700_000_000  # rows of items.parquet, oldest first; seconds since 1970

model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
catalog = Catalog.read(f"{folder}/items.parquet")
head = RecHead.load(f"{folder}/rechead", catalog)
with open(f"{folder}/prompt.json") as file:
    how = json.load(file)
writer = PromptWriter(catalog, TextConfig(**how["text"]), tokenizer, how["tiny"], how["context"], how["reserve"])

prompt = torch.tensor([writer.prompt_ids(history[-how["window"] :])])
written = model.generate(
    prompt, max_new_tokens=how["reserve"], do_sample=False, stop_strings=["</answer>"], tokenizer=tokenizer
)
said = parse(tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True))
form = np.array([said.format], np.float32)
scores = head.scores(HeadInputs([np.array(history)], np.array([now]), [said.cot], [said.answer], form))[0]
best = [catalog.title(item) for item in scores.topk(10).indices.tolist()]
"""


def _limits(dataset: Dataset, config: Config) -> str:
    limits = [
        "The figures are on test, for the users, items and period of this data set; they say nothing of others, and "
        f"only the headline convention (`{config.data.headline}`) is shown.",
        f"It knows the {len(dataset.catalog):,} items of `items.parquet`. `RecHead.with_catalog` adds items by their "
        "text alone.",
        "The thought is optimised for the ranking it leads to. It need not be why an item is recommended, nor true of "
        "the user.",
        "The data set and the starting model have licences of their own; add one here before you publish.",
    ]
    if config.tiny_backbone:
        limits.insert(0, "A tiny model that speaks the templates of its warm-up and nothing else; it is no chat model.")
    return "\n".join(f"- {limit}" for limit in limits)
