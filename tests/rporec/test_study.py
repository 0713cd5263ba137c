"""Results of a study: what a file holds, when it counts as finished, and seeds pooled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rporec.config import Config, ConfigError, parse_config
from rporec.evaluation.bootstrap import bootstrap_mean
from rporec.evaluation.ranking import hit, ndcg
from rporec.evaluation.table import RankTable, metrics
from rporec.files import read_json, write_json
from rporec.run import Run
from rporec.study import Result, finished, study_name, write_result
from rporec.study_tables import markdown, over_trainings, pooled

USERS = np.repeat(np.arange(40), np.random.default_rng(0).integers(1, 6, size=40))


def config(seed: int, path: str | None = "/somewhere/films", **changes: object) -> Config:
    return parse_config({"name": "small", "seed": seed, "data": {"path": path, "headline": "all"}, **changes})


def result(tmp_path: Path, config: Config, ranks: dict[str, np.ndarray]) -> Result:
    """Of a run whose methods had these ranks [draws, samples] in both conventions."""
    run = Run.create(tmp_path / f"run-{config.seed}", config, resume=False)
    rows = [
        {"method": name, "convention": convention, "user_id": f"u{user}", "sample": sample, "target": "i", "rank": at}
        for name, draws in ranks.items()
        for convention in ("all", "exclude_history")
        for draw in np.atleast_2d(draws)
        for sample, (user, at) in enumerate(zip(USERS.tolist(), draw.tolist(), strict=True))
    ]
    table = RankTable(pa.Table.from_pylist(rows))
    table.write(run.folder / "ranks.parquet")
    summary = metrics(
        table, {"path": f"{tmp_path}/films"}, "test", [config.seed], "all", cold=["i"], strata={"head": ["i"]}
    )
    for entry in summary["conventions"]["all"]["methods"].values():
        entry["coverage@10"] = 0.1 * (1 + config.seed)
    write_json(run.folder / "metrics.json", summary)
    write_json(run.folder / "stages.json", {"warmup": {"seconds": 3.5}})
    return write_result(tmp_path / "study", run, config, ["rporec", "study", "small.yaml", "--seed", str(config.seed)])


def drawn(seed: int, best: int, draws: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(best, 30, size=(draws, len(USERS))).astype(float)


def test_seeds_on_one_data_set_are_pooled_as_one_bootstrap_of_each_samples_mean_over_seeds(tmp_path):
    ranks = [{"rporec_stage1": drawn(s, 2), "rporec_stage2": drawn(s + 10, 1, draws=2)} for s in range(3)]
    found = pooled([result(tmp_path, config(seed), of_seed) for seed, of_seed in enumerate(ranks)])
    for metric, formula in (("ndcg@10", ndcg), ("hr@10", hit)):
        first, second = (
            np.mean([formula(of_seed[name], 10).mean(axis=0) for of_seed in ranks], axis=0)
            for name in ("rporec_stage1", "rporec_stage2")
        )
        expected = bootstrap_mean(np.stack([first, second, second - first], axis=1), [f"u{user}" for user in USERS])
        keys = ("rporec_stage1", "rporec_stage2", "rporec_stage2-rporec_stage1")
        for at, key in enumerate(keys):
            wanted = (expected.value[at], expected.low[at], expected.high[at])
            assert found[key][metric] == pytest.approx(wanted, abs=1e-12)
    assert found["rporec_stage1"]["ndcg@10"][1] < found["rporec_stage1"]["ndcg@10"][2]


def test_seeds_of_the_embedded_world_have_users_of_their_own(tmp_path):
    ranks = {"rporec_stage2": drawn(0, 1)}

    def width(folder: Path, path: str | None) -> float:
        _, low, high = pooled([result(folder, config(seed, path), ranks) for seed in (0, 1)])["rporec_stage2"]["hr@10"]
        return high - low

    assert width(tmp_path / "same", "films") / width(tmp_path / "apart", None) == pytest.approx(2**0.5, rel=0.1)


def test_the_tables_have_a_row_a_method_and_a_column_a_study_or_seed(tmp_path):
    for seed, rank in ((0, 1.0), (1, 3.0)):
        ranks = {"popularity": np.full(len(USERS), 30.0), "rporec_stage2": np.full(len(USERS), rank)}
        result(tmp_path, config(seed), ranks)
    said = markdown(tmp_path / "study").splitlines()
    revision = read_json(tmp_path / "study" / "small-films-seed1.json")["revision"]
    for line in (
        f"rporec study small.yaml --seed 1  # {revision}",
        f"| small-films | 0, 1 | {len(USERS)} | 40 | nothing removed |",
        "| NDCG@10 | small-films |",
        "| rporec_stage2 | .7500 [.7500, .7500] |",
        "| NDCG@10 | seed 0 | seed 1 | all, new users | all, new seeds |",
        "| rporec_stage2 | 1.0000 [1.0000, 1.0000] | .5000 [.5000, .5000] | .7500 [.7500, .7500] | .7500 [−2.4266, 3.9266] |",
        "| rporec_stage2 − popularity | +.7500 [+.7500, +.7500] |",
        f"| NDCG@10 | cold ({len(USERS)}) | head ({len(USERS)}) | coverage@10 | diversity@10 |",
        "| rporec_stage2 | .7500 (.5000–1.0000) | .7500 (.5000–1.0000) | .1500 (.1000–.2000) | – |",
    ):
        assert line in said
    assert said.index("| popularity | .0000 [.0000, .0000] |") < said.index("| rporec_stage2 | .7500 [.7500, .7500] |")


def test_a_result_says_how_it_came_about_and_nothing_of_this_machine(tmp_path):
    made = result(tmp_path, config(2), {"popularity": drawn(0, 1)})
    assert made.path == tmp_path / "study" / "small-films-seed2.json"
    assert made.summary["stages"] == {"warmup": {"seconds": 3.5}}
    assert {"python", "torch", "numpy"} <= made.summary["versions"].keys()
    assert set(made.summary["conventions"]) == {"all"}
    assert "ndcg@5" in made.table["methods"]["popularity"]
    assert set(made.table["by_popularity"]["head"]["methods"]["popularity"]) >= {"ndcg@10", "ndcg@10_ci", "samples"}
    said = made.path.read_text()
    assert "/somewhere" not in said
    assert str(tmp_path) not in said


def test_a_finished_study_is_known_wherever_its_data_lie_and_another_config_is_refused(tmp_path):
    out = tmp_path / "study"
    assert finished(out, config(0)) is None
    made = result(tmp_path, config(0), {"popularity": drawn(0, 1)})
    again = finished(out, config(0, "/elsewhere/films"))
    assert again is not None
    assert again.summary == made.summary
    assert finished(out, config(0, "/somewhere/books")) is None
    for changes, key in (({"steps": 7}, "steps"), ({"evaluate": {"seeds": 2}}, "evaluate.seeds")):
        with pytest.raises(ConfigError, match=f"small-films-seed0.json: made with another {key}; move it away"):
            finished(out, config(0, **changes))


def test_a_finished_study_grows_by_rows_and_loses_none(tmp_path):
    out = tmp_path / "study"

    def asked(beams: list[int], baselines: list[str]) -> Config:
        return config(0, rere={"more_beams": beams}, evaluate={"baselines": baselines, "seeds": 1})

    made = result(tmp_path, asked([50], ["popularity"]), {"popularity": drawn(0, 1)})
    for less in (asked([50], ["popularity"]), asked([], ["popularity"]), asked([50], [])):
        assert (held := finished(out, less)) is not None
        assert held.summary == made.summary
    assert finished(out, asked([50, 80], ["popularity"])) is None
    assert finished(out, asked([50], ["popularity", "rules"])) is None
    with pytest.raises(ConfigError, match="holds 50 beams, popularity too; ask for them as well"):
        finished(out, asked([80], ["rules"]))


def test_new_trainings_spread_as_student_says(tmp_path):
    values = (0.1, 0.2, 0.6)
    results = [result(tmp_path, config(seed), {"popularity": drawn(0, 1)}) for seed in range(3)]
    for one, value in zip(results, values, strict=True):
        one.table["methods"]["popularity"]["ndcg@10"] = value
    found = over_trainings(results)["popularity"]
    half = 4.302653 * 0.264575131 / 3**0.5  # t of two degrees of freedom, standard deviation
    assert found == pytest.approx((0.3, 0.3 - half, 0.3 + half), abs=1e-6)
    assert over_trainings(results[:1]) == {}


def test_what_does_not_belong_together_is_named(tmp_path):
    out = tmp_path / "study"
    with pytest.raises(ConfigError, match="no results of a study here"):
        markdown(out)
    result(tmp_path, config(0), {"popularity": drawn(0, 1)})
    (out / "small-films-seed0.parquet").rename(tmp_path / "away")
    with pytest.raises(ConfigError, match=r"small-films-seed0.parquet: missing"):
        markdown(out)
    result(tmp_path, config(1, steps=7), {"popularity": drawn(0, 1)})
    with pytest.raises(ConfigError, match=r"seed1.json: another steps than small-films-seed0.json"):
        markdown(out)


def test_one_seed_alone_may_have_the_control_and_more_beams(tmp_path):
    both = {"rporec_stage1": drawn(0, 1), "rporec_stage2": drawn(1, 1)}
    result(
        tmp_path, config(0, more_warmup=True, rere={"more_beams": [50]}), {**both, "rporec_stage1_moresft": drawn(2, 1)}
    )
    result(tmp_path, config(1), both)
    told = markdown(tmp_path / "study")
    means, rest = told.split("by seed")
    seeds, _ = rest.split("beside accuracy")
    assert "stage2" in means
    assert "moresft" not in means
    [row] = [line for line in seeds.splitlines() if line.startswith("| rporec_stage1_moresft |")]
    assert row.count("–") == 3, "neither seed 1 nor all"


def test_a_study_is_named_by_config_and_data_set():
    assert study_name(config(0, None)) == "small"
    assert study_name(config(0, "s3://bucket/films/")) == "small-films"


def test_a_study_of_data_under_a_signed_url_does_not_publish_the_signature():
    config = parse_config({"data": {"path": "https://host/logs/films?sig=a/SECRET"}})
    assert study_name(config) == "run-films"
