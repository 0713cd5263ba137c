"""A run as a folder that others can use without it: LLM, RecHead, item index, catalogue, model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rporec import __version__
from rporec.config import Config, ConfigError
from rporec.data import Dataset
from rporec.files import read_json, replacing
from rporec.run import Run

if TYPE_CHECKING:
    from rporec.models.rechead import RecHead

# Beside its safetensors a model folder may hold the same weights in other formats: not copied.
_COPIED = (".json", ".safetensors", ".txt", ".model", ".tiktoken", ".jinja")


def export_run(run: Run, out: Path) -> Path:
    """Write the folder `out`, whole or not at all, and return it.

    The LLM that validation picked (before RL: that of the warm-up) and its tokenizer lie at the top,
    as transformers expects; `rechead/` is the head that ranks test; `item_index.safetensors` and
    `items.parquet` are described in the model card, `README.md`.
    Raises ConfigError when stage 1 has not finished or `out` exists and is not empty.
    """
    from rporec.models.rechead import RecHead

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: exists and is not empty; choose another --out")
    run.require("stage1", "export")
    dataset = Dataset.load(run.data)
    refitted = run.head("head_refit")
    source = refitted if refitted.is_dir() else run.head()
    head = RecHead.load(source, dataset.catalog)
    with replacing(out) as folder:
        folder.mkdir()
        _copy_model(_model(run), folder)
        shutil.copytree(source, folder / "rechead")
        _write_index(head, folder / "item_index.safetensors")
        dataset.catalog.write(folder / "items.parquet")
        (folder / "README.md").write_text(model_card(run, dataset, head, out.resolve().name), encoding="utf-8")
    return out


def _model(run: Run) -> Path:
    return run.best_model if run.best_model.is_dir() else run.warm_model


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
    tensors = {"full": items.full, "text": items.text}
    tensors["bias"] = torch.zeros(len(items.full)) if items.bias is None else items.bias
    if head.config.fusion == "paper":
        del tensors["text"]
    description = {"format": "pt", "fusion": head.config.fusion, "weights": json.dumps(head.weights)}
    save_file({name: value.float().contiguous().cpu() for name, value in tensors.items()}, path, description)


# --- model card ------------------------------------------------------------------------------
def model_card(run: Run, dataset: Dataset, head: RecHead, name: str) -> str:
    """README.md as the Hugging Face hub reads it: YAML front matter, then Markdown."""
    import yaml

    config, metrics = run.config(), read_json(run.folder / "metrics.json", {})
    front = yaml.safe_dump(_front_matter(config, metrics, name), sort_keys=False, allow_unicode=True)
    sections = [
        f"# {name}",
        _what(run, config),
        "## Data\n\n" + _data(dataset),
        "## Results\n\n" + _results(metrics),
        "## Use\n\n" + _use(head),
        "## Limits\n\n" + _limits(dataset, config),
    ]
    return f"---\n{front}---\n\n" + "\n\n".join(sections) + "\n"


def _front_matter(config: Config, metrics: dict[str, Any], name: str) -> dict[str, Any]:
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["recommendation", "reinforcement-learning", "reasoning", "rporec"],
    }
    if not config.tiny_backbone and not Path(config.backbone).exists():
        front["base_model"] = config.backbone
    method = "rporec_stage2" if "rporec_stage2" in _methods(metrics) else "rporec_stage1"
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
    best = read_json(run.folder / "best.json", {}) if run.best_model.is_dir() else {}
    if run.best_model.is_dir():
        place = f" {best['attempt']}.{best['version']}, after step {best['step']} of {config.steps}" if best else ""
        history = f"reinforcement learning against the RecHead's ranking: weight version{place}, the best on validation"
    elif _model(run) != run.backbone:
        history = "supervised warm-up; it has seen no reinforcement learning"
    else:
        history = "no training: it is the starting model"
    return (
        "A language model that reasons about a user before it recommends, and the head that turns its text into a "
        "ranking of the whole catalogue (after RPORec, arXiv 2605.21967).\n\n"
        f"The LLM is {origin}, followed by {history}. It reads a user's last items and writes "
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


def _results(metrics: dict[str, Any]) -> str:
    methods = _methods(metrics)
    if not methods:
        return "Not evaluated yet (`rporec evaluate`)."
    removed = "the user's earlier items removed" if metrics["headline"] == "exclude_history" else "nothing removed"
    part = metrics["conventions"][metrics["headline"]]
    lines = [
        f"Split {metrics['split']}, {part['samples']:,} samples of {part['users']:,} users, ranking of the whole "
        f"catalogue, {removed} (convention `{metrics['headline']}`); 95 % bootstrap intervals over users.",
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
    experts = ", to which `scores` adds experts (transition rules, text neighbours, popularity)" if head.experts else ""
    if head.config.fusion == "paper":
        formula = "`score = q · full + bias`, `q` the head's fused vector of history, thought and answer"
    else:
        formula = "`score = wₕ (h · full + bias) + wₜ (t · text)`, `h` from the history, `t` from thought and answer"
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer
from rporec.data import Catalog
from rporec.models.rechead import RecHead

model = AutoModelForCausalLM.from_pretrained(FOLDER)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
catalog = Catalog.read(FOLDER + "/items.parquet")
head = RecHead.load(FOLDER + "/rechead", catalog)  # head.scores(HeadInputs(...)) ranks all {len(head.catalog):,} items
```

`items.parquet` is the catalogue; its row order is the item index. `item_index.safetensors` holds what an inner-product
index needs, float32, one row per item: `full` [N, {head.config.dim}], `bias` [N]{_text_shape(head)}. The head's
networks are {formula}{experts}."""


def _text_shape(head: RecHead) -> str:
    return "" if head.config.fusion == "paper" else f", `text` [N, {head.config.dim}]"


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
