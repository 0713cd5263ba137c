"""What `rporec export` writes can be used without the run, and says what it is."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import yaml

from rporec.config import ConfigError, HeadConfig, parse_config
from rporec.data import Catalog, Dataset, build, write_synthetic
from rporec.data.slices import rows_of
from rporec.evaluation.table import RankTable, metrics
from rporec.export import export_run
from rporec.files import read_json, write_json
from rporec.models.experts import Experts
from rporec.models.head_inputs import HeadInputs
from rporec.run import Run

CONFIG = parse_config(
    {
        "name": "small",
        "steps": 5,
        "data": {"synthetic": {"users": 60, "series": 8}},
        "tiny": {"hidden": 64, "heads": 2, "kv_heads": 1, "layers": 1, "intermediate": 64, "vocabulary": 512},
        "head": {"dim": 8, "layers": 1, "heads": 2},
    }
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with stage 1 behind it: data, the LLM before RL, a RecHead with experts."""
    from rporec.models.backbone import make_tiny
    from rporec.models.rechead import RecHead

    run = Run.create(tmp_path_factory.mktemp("runs") / "small", CONFIG, resume=False)
    write_synthetic(run.folder / "source", CONFIG.data.synthetic, 0)
    dataset = build(*(run.folder / "source" / f"{name}.parquet" for name in ("interactions", "items")), run.data)
    make_tiny(dataset.catalog.texts(), CONFIG.tiny, 0, run.backbone)
    shutil.copytree(run.backbone, run.folder / "warmup" / "model")
    (run.warm_model / "pytorch_model.bin").write_bytes(b"the same in another format")
    head = trained(RecHead(dataset.catalog, CONFIG.head, window=dataset.window))
    head.experts = Experts.fit(dataset, rows_of(dataset, dataset.split("train")))
    head.weights = {"history": 1.0, "text": 0.5, "rules": 0.25}
    head.save(run.head())
    for stage in ("data", "warmup", "stage1"):
        with run.stage(stage):
            pass
    return run


def trained(head):
    """As after a training: no parameter is where it began."""
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        head.known[::2] = True
    return head


@pytest.fixture
def run(made, tmp_path):
    """The same for tests that add to it."""
    shutil.copytree(made.folder, tmp_path / "small")
    return Run.open(tmp_path / "small")


def inputs(dataset: Dataset, number: int = 30) -> HeadInputs:
    samples = dataset.split("test")[:number]
    titles = [dataset.catalog.title(int(item)) for item in dataset.targets(samples)]
    return HeadInputs(
        dataset.seen_of(samples),
        dataset.times(samples),
        [f"after {title}" for title in titles],
        titles,
        (np.arange(len(samples)) % 3 > 0).astype(np.float32),
    )


def front_matter(card: str) -> tuple[dict, str]:
    start, front, text = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(front), text


def test_transformers_loads_the_folder_and_the_head_scores_as_before(made, tmp_path):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rporec.models.rechead import RecHead

    out = export_run(made, tmp_path / "deep" / "out")
    assert {path.name for path in out.iterdir()} >= {"config.json", "tokenizer.json", "model.safetensors", "README.md"}
    assert not (out / "pytorch_model.bin").exists()
    assert [path.name for path in out.parent.iterdir()] == ["out"]

    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    before = load_file(made.warm_model / "model.safetensors")
    after = model.state_dict()
    assert all((after[name] == tensor).all() for name, tensor in before.items())
    assert tokenizer.decode(tokenizer.encode("<think> a </think>")) == "<think> a </think>"

    dataset = Dataset.load(made.data)
    head = RecHead.load(out / "rechead", Catalog.read(out / "items.parquet"))
    original = RecHead.load(made.head(), dataset.catalog)
    batch = inputs(dataset)
    assert head.scores(batch).equal(original.scores(batch))


@pytest.mark.parametrize(
    ("fusion", "history"), [("residual", "sequence"), ("residual", "text"), ("paper", "sequence"), ("paper", "text")]
)
def test_the_networks_scores_are_inner_products_with_the_item_index(run, tmp_path, fusion, history):
    from safetensors import safe_open

    from rporec.models.rechead import RecHead

    dataset = Dataset.load(run.data)
    config = HeadConfig(dim=8, layers=1, heads=2, fusion=fusion, history=history)
    head = trained(RecHead(dataset.catalog, config, window=dataset.window))
    head.save(run.head())
    with safe_open(export_run(run, tmp_path / "out") / "item_index.safetensors", framework="np") as file:
        index = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        assert file.metadata()["fusion"] == fusion
    assert {array.dtype.name for array in index.values()} == {"float32"}
    assert index["full"].shape == (len(dataset.catalog), 8)
    assert index.keys() == {"full", "bias", *(["text"] if fusion == "residual" else [])}
    # Whatever the query: what is left of the scores without the bias lies in the span of the item vectors.
    left = (head.scores(inputs(dataset)).numpy() - index.pop("bias")).T
    vectors = np.concatenate(list(index.values()), axis=1)
    assert vectors.shape[1] < len(vectors) / 2  # or the test would be empty
    queries, *_ = np.linalg.lstsq(vectors, left, rcond=None)
    np.testing.assert_allclose(vectors @ queries, left, atol=1e-3)


def test_the_best_checkpoint_and_the_refitted_head_go_out_and_the_card_says_which(run, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(run.warm_model, run.best_model)
    weights = {name: tensor + 1 for name, tensor in load_file(run.best_model / "model.safetensors").items()}
    save_file(weights, run.best_model / "model.safetensors", {"format": "pt"})
    write_json(run.folder / "best.json", {"step": 4, "version": 4, "attempt": 1, "ndcg@10": 0.3})
    shutil.copytree(run.head(), run.head("head_refit"))
    write_json(run.head("head_refit") / "head.json", {**read_json(run.head() / "head.json"), "weights": {"text": 7.0}})
    out = export_run(run, tmp_path / "out")
    assert all((tensor == weights[name]).all() for name, tensor in load_file(out / "model.safetensors").items())
    assert read_json(out / "rechead" / "head.json")["weights"] == {"text": 7.0}
    card = (out / "README.md").read_text()
    assert "taught by supervised warm-up, then reinforcement learning" in card
    assert "(the best on validation, version 1.4 after step 4)" in card


def test_the_card_before_evaluation(made, tmp_path):
    front, text = front_matter((export_run(made, tmp_path / "out") / "README.md").read_text())
    assert front["library_name"] == "transformers"
    assert "base_model" not in front  # the tiny one is no model of the hub
    assert "a small Qwen3 made for this data set, taught by supervised warm-up. It reads" in text
    assert "Not evaluated yet" in text
    for part in ("RecHead.load(", "item_index.safetensors", "60 users", "## Limits"):
        assert part in text


def test_the_code_in_the_card_recommends(made, tmp_path, monkeypatch):
    out = export_run(made, tmp_path / "out")
    monkeypatch.chdir(out)
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(code, names)
    catalog = Catalog.read(out / "items.parquet")
    assert len(set(names["best"])) == 10
    assert set(names["best"]) <= {catalog.title(item) for item in range(len(catalog))}


def test_the_card_shows_the_headline_figures_with_their_intervals(run, tmp_path):
    shutil.copytree(run.warm_model, run.best_model)
    dataset = Dataset.load(run.data)
    table, test = RankTable(), dataset.split("test")
    for method, rank in (("popularity", 9), ("rporec_stage1", 3), ("rporec_stage2", 2)):
        for convention in ("exclude_history", "all"):
            table.add(dataset, method, convention, test, np.full(len(test), rank + (convention == "all")))
    summary = metrics(table, {}, "test", [0], "exclude_history", resamples=50)
    write_json(run.folder / "metrics.json", summary)
    front, text = front_matter((export_run(run, tmp_path / "out") / "README.md").read_text())
    assert "| rporec_stage2 | 0.631 [0.631, 0.631] | 1.000 [1.000, 1.000] |" in text
    assert "| rporec_stage2 − rporec_stage1 | +0.131 [+0.131, +0.131] |" in text
    assert f"Split test, {len(test)} samples" in text
    assert "convention `exclude_history`" in text
    assert "This folder is `rporec_stage2`" in text
    [result] = front["model-index"][0]["results"]
    assert result["metrics"][0] == {"type": "ndcg@10", "name": "NDCG@10, exclude_history", "value": 0.6309}
    assert result["dataset"]["split"] == "test"


def test_a_folder_in_use_is_refused_and_an_empty_one_is_taken(made, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").touch()
    for out in (mine, mine / "thesis.tex"):
        with pytest.raises(ConfigError, match="exists and is not empty; choose another --out"):
            export_run(made, out)
    assert [path.name for path in mine.iterdir()] == ["thesis.tex"]
    (tmp_path / "empty").mkdir()
    assert (export_run(made, tmp_path / "empty") / "config.json").is_file()


def test_a_run_that_cannot_be_exported_leaves_nothing(run, tmp_path):
    (run.warm_model / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="no safetensors here"):
        export_run(run, tmp_path / "out" / "model")
    assert list((tmp_path / "out").iterdir()) == []
    write_json(run.folder / "stages.json", {})
    with pytest.raises(ConfigError, match="export needs stage stage1"):
        export_run(run, tmp_path / "out" / "model")
