"""A config that cannot run is refused with one line that names the key."""

from __future__ import annotations

import pytest

from rporec.config import BASELINES, ConfigError, load_config, parse_config

NARROW = {"tiny": {"hidden": 128, "heads": 8, "kv_heads": 2}}  # attention of width 16

REFUSED = {
    "unknown key": ({"group_sizes": 8}, "group_sizes: unknown config key; did you mean group_size?"),
    "unknown key of a section": ({"rl": {"lrr": 1}}, "rl.lrr: unknown config key; did you mean lr?"),
    "unknown key of an optional section": ({"lora": {"rnk": 3}}, "lora.rnk: unknown config key; did you mean rank?"),
    "nothing near": ({"reward": {"zzz": 1}}, "reward.zzz: unknown config key; known here: candidates, "),
    "negative": ({"steps": -1}, "steps: Input should be greater than or equal to 0 (got -1)"),
    "negative in a section": ({"rl": {"kl": -0.1}}, "rl.kl: "),
    "no number": ({"rl": {"lr": "fast"}}, "rl.lr: "),
    "infinite": ({"rl": {"lr": float("inf")}}, "rl.lr: Input should be a finite number"),
    "no such choice": ({"engine": {"kind": "vlm"}}, "engine.kind: Input should be 'vllm' or 'transformers'"),
    "no section": ({"rl": 3}, "rl: a section with keys, such as lr"),
    "empty section": ({"rl": None}, "rl: a section with keys, such as lr"),
    "off-policy without correction": ({"max_staleness": 2, "rl": {"correction": "none"}}, "rl.correction: none needs"),
    "beams of older weights": ({"recipe": "rere"}, "recipe: rere needs max_staleness: 0; beams are no samples"),
    "tempered beams": (
        {"recipe": "rere", "max_staleness": 0, "rl": {"temperature": 0.7}},
        "recipe: rere needs rl.temperature: 1",
    ),
    "a control of another recipe": (
        {"recipe": "rere", "max_staleness": 0, "more_warmup": True},
        "recipe: rere has no more_warmup",
    ),
    "heads of another recipe": (
        {"recipe": "rere", "max_staleness": 0, "head": {"refreshed": True}},
        "recipe: rere has no head.refreshed",
    ),
    "no such baseline": (
        {"evaluate": {"baselines": ["easy"]}},
        "evaluate.baselines: 'easy' is none of all, none, popul",
    ),
    "new tokens that nothing trains": (
        {"recipe": "rere", "max_staleness": 0, "rere": {"identity": "semantic"}, "lora": {"rank": 2}},
        "rere.identity: semantic adds tokens",
    ),
    "masks of tokens in a loss of sequences": (
        {"rl": {"loss": "gspo", "correction": "icepop"}},
        "rl.correction: icepop",
    ),
    "interval upside down": (
        {"rl": {"icepop": [5, 0.5]}},
        "rl.icepop: no interval; write [low, high] with 0 <= low < high (got [5, 0.5])",
    ),
    "sequence mask upside down": ({"rl": {"sequence_mask": [2, 2]}}, "rl.sequence_mask: "),
    "a share of several GPUs": (
        {"engine": {"gpu_share": 0.5, "args": {"tensor_parallel_size": 2}}},
        "engine.gpu_share: 0.5 is of one GPU; leave out args.tensor_parallel_size",
    ),
    "two ranks on one GPU": (
        {"learners": 2, "deepspeed": {"gpu_share": 0.5}},
        "deepspeed.gpu_share: 0.5 wants learners: 1 and head.workers: 1",
    ),
    "endpoint without address": ({"teacher": {"kind": "openai"}}, "teacher.kind: openai needs teacher.base_url"),
    "uneven learners": ({"learners": 3, "groups_per_step": 64}, "groups_per_step: 64 is no multiple of learners: 3"),
    "new tokens under lora": (
        {"recipe": "preference", "rere": {"identity": "semantic"}, "lora": {"rank": 2}, "backbone": "some/llm"},
        "rere.identity: semantic adds tokens, whose embeddings lora does not train",
    ),
    "no such split": (
        {"data": {"split": "random"}},
        "data.split: none of time[:8:1:1], leave-one-out, column:NAME (got 'random')",
    ),
    "faithfulness without embedder": ({"backbone": "some/llm"}, "reward.faithfulness needs reward.embedder"),
    "more than everything": (
        {"slices": {"warmup": 0.9}},
        "slices.warmup: 0.9, head: 0.4 and rl: 0.2 are more than 1 together",
    ),
    "more genres than there are": ({"data": {"synthetic": {"genres": 21}}}, "data.synthetic.genres: "),
    "heads that do not divide": (
        {"tiny": {"hidden": 128, "heads": 3, "kv_heads": 1}},
        "tiny: hidden must divide by heads",
    ),
    "heads too narrow for vLLM": (NARROW, "tiny: hidden / heads is 16, and vLLM has attention for 32,"),
    "no room for a prompt": ({"tiny": {"context": 64}}, "tiny.context: 64 tokens leave no prompt"),
    "head width": ({"head": {"dim": 30}}, "head.dim: 30 does not divide by heads: 4"),
    "reranker without experts": (
        {"head": {"reranker": True, "experts": False}},
        "head.reranker: ranks what the experts propose; it needs experts: true",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_config_that_cannot_run_is_one_line_that_names_the_key(name):
    raw, wanted = REFUSED[name]
    with pytest.raises(ConfigError) as fault:
        parse_config(raw)
    assert str(fault.value).startswith(wanted)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize(
    "raw",
    [
        {"max_staleness": 0, "rl": {"correction": "none"}},
        {**NARROW, "engine": {"kind": "transformers"}},  # which takes any width
        {**NARROW, "backbone": "some/llm", "reward": {"faithfulness": 0}},  # the shape is not used
        {"rl": {"sequence_mask": None}, "data": {"split": "column:cut"}},
    ],
)
def test_what_only_looks_like_a_contradiction_is_taken(raw):
    parse_config(raw)


def test_overrides_win_and_are_yaml(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 1\nrl:\n  # lr: 1\n")  # a section with every key commented out
    config = load_config(
        path, ["rl.lr=1e-4", "lora.rank=8", "rl.sequence_mask=null", "teacher.decision=true", "seed=2"]
    )
    assert (config.name, config.seed, config.rl.lr, config.rl.sequence_mask) == ("mine", 2, 1e-4, None)
    assert config.lora is not None
    assert config.lora.rank == 8
    assert config.teacher.decision


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("seed", "an override is key=value"),
        ("=3", "an override is key=value"),
        ("rl=[", "not valid YAML"),
        ("seed.x=1", "seed"),
        ("sed=1", "did you mean seed?"),
    ],
)
def test_a_bad_override_is_named(override, wanted):
    with pytest.raises(ConfigError, match=wanted.replace("?", r"\?")):
        load_config(None, [override])


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("- a", "a config is a mapping of keys, not a list"),
        ("a: [", "not valid YAML"),
        (b"name: caf\xe9", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_config_is_named(tmp_path, text, wanted):
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as fault:
        load_config(path)
    assert str(fault.value).startswith(f"{path}: {wanted}")
    assert "\n" not in str(fault.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: no such config file"):
        load_config(tmp_path / "none.yaml")


def test_a_resolved_config_reads_back_as_it_was():
    config = parse_config({"rl": {"icepop": [0.4, 3]}, "lora": {}, "engine": {"args": {"max_model_len": 512}}})
    assert parse_config(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("all", BASELINES),
        ("none", ()),
        ("sasrec,ease", ("sasrec", "ease")),
        (["rules"], ("rules",)),
    ],
)
def test_baselines_are_named_in_a_list_or_in_one_word(written, meant):
    assert parse_config({"evaluate": {"baselines": written}}).evaluate.baselines == meant


@pytest.mark.parametrize(
    "url", ["https://me:secret@host/log", "https://secret@host/log", "s3://key:secret@bucket", "a::http://a:secret@h/"]
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url):
    with pytest.raises(ConfigError, match=r"^data\.path: the URL holds credentials") as error:
        parse_config({"data": {"path": url}})
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("path", ["abfs://box@account.dfs.core.windows.net/log", "s3://a/b@c:d@e", "data/a:b@c", None])
def test_an_at_sign_alone_is_no_credential(path):
    assert parse_config({"data": {"path": path}}).data.path == path
