"""What a user writes: one YAML, checked here before anything starts.

Import this without torch, vLLM or Ray: `rporec train` must refuse a bad config in a second, and a
test keeps it so. Every key has its unit in its comment; unknown keys are errors that name the
nearest right one.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

CHEAP_BASELINES = ("popularity", "recent_popularity", "itemknn", "ease", "rules", "text_knn", "text_rules")
BASELINES = (
    *CHEAP_BASELINES,
    "text_rules_reranked",
    "gru4rec",
    "sasrec",
)  # those with networks take by far the longest
Convention = Literal["exclude_history", "all"]  # whether the user's earlier items leave a ranking, or nothing does
CONVENTIONS: tuple[Convention, ...] = ("exclude_history", "all")
VLLM_HEAD_WIDTHS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # of its attention on CPU


class ConfigError(ValueError):
    """A config that cannot run; the message is one line that names the key and the way out."""


def first_line(error: Exception) -> str:
    """What another exception says, short enough to stand in such a line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SyntheticConfig(Section):
    """The embedded world, see `rporec.data.synthetic`."""

    users: int = Field(1200, ge=2)
    series: int = Field(84, ge=4)
    volumes: int = Field(6, ge=2)
    genres: int = Field(12, ge=2, le=20)
    studios: int = Field(20, ge=1)
    length: int = Field(14, ge=3)  # mean interactions of a user


class DataConfig(Section):
    path: str | None = None  # folder or URL of a built data set, or of interactions.* and items.*; None: synthetic
    split: str = "time:8:1:1"  # time[:a:b:c] | leave-one-out | column:NAME
    window: int = Field(20, ge=1)  # history items that the prompt may hold
    k_core: int = Field(0, ge=0)
    headline: Convention = "exclude_history"
    synthetic: SyntheticConfig = SyntheticConfig()

    @field_validator("split")
    @classmethod
    def _known(cls, split: str) -> str:
        if not re.fullmatch(r"time(:\d+:\d+:\d+)?|leave-one-out|column:.+", split):
            raise ValueError("none of time[:8:1:1], leave-one-out, column:NAME")
        return split

    @model_validator(mode="after")  # of a key alone the message would repeat what it was given
    def _without_credentials(self) -> DataConfig:
        # Of other file systems a name before @ is part of the address: abfs://container@account…, sftp://user@host.
        if self.path is not None and re.search(r"https?://[^/?#]*@|://[^/?#@]*:[^/?#@]*@", self.path):
            raise ValueError(
                "path: the URL holds credentials, which a run would keep in its files; put them into the environment"
            )
        return self


class TinyConfig(Section):
    """Shape of `backbone: tiny`, a Qwen3 made on the spot."""

    hidden: int = Field(192, ge=32)
    layers: int = Field(2, ge=1)
    heads: int = Field(6, ge=1)
    kv_heads: int = Field(3, ge=1)
    intermediate: int = Field(576, ge=32)
    vocabulary: int = Field(4096, ge=300)
    context: int = Field(512, ge=64)  # tokens


class LoraConfig(Section):
    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    target_modules: str | list[str] = "all-linear"


class TextConfig(Section):
    """How an item and a history are written for the LLM."""

    columns: list[str] | None = None  # catalogue columns in a prompt; None: title and short ones
    max_words: int = Field(8, ge=1)  # of one attribute
    prompt_items: int | None = Field(None, ge=1)  # newest items written out; None: the whole window
    attribute: str | None = None  # the attribute that rationales count; None: chosen by cardinality


class TeacherConfig(Section):
    kind: Literal["template", "backbone", "openai"] | None = None  # None: template for tiny, else backbone
    decision: bool = False  # template: state "again" or "new" and the attribute before the answer
    base_url: str | None = None  # openai: an OpenAI-compatible endpoint
    model: str | None = None
    api_key_env: str = "OPENAI_API_KEY"  # name of the variable that holds the key, never the key

    @model_validator(mode="after")
    def _reachable(self) -> TeacherConfig:
        if self.kind == "openai" and not (self.base_url and self.model):
            raise ValueError("kind: openai needs teacher.base_url and teacher.model")
        return self


class WarmupConfig(Section):
    steps: int | None = Field(None, ge=0)  # None: `epochs` over the warm-up slice; 0: no warm-up
    epochs: float = Field(4.0, gt=0)
    lr: float = Field(3e-3, gt=0)
    batch_size: int = Field(32, ge=1)  # sequences of one optimiser step
    micro_batch_size: int = Field(32, ge=1)
    checkpoint_every: int = Field(200, ge=1)  # steps; a resumed warm-up goes on from the newest checkpoint


class SamplingConfig(Section):
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(0.95, gt=0, le=1)  # of the head slice; RL always samples the full distribution
    max_tokens: int = Field(64, ge=1)


class EngineConfig(Section):
    kind: Literal["vllm", "transformers"] = "vllm"  # transformers: the exact reference, for tests
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"  # auto: float32 on CPU, bfloat16 on CUDA
    max_num_seqs: int = Field(64, ge=1)
    kv_cache_mb: int = Field(256, ge=16)  # CPU only
    in_flight: Literal["recompute", "keep"] = "recompute"  # the KV cache of what is being written, at new weights
    gpu_share: float = Field(1.0, gt=0, le=1)  # of its GPU; below 1 a learner rank may have the rest
    timeout: float = Field(1800.0, gt=0)  # seconds for one group; a worker that takes longer hangs and is replaced
    args: dict[str, Any] = {}  # passed to vllm.LLM as they are

    @model_validator(mode="after")
    def _on_one_gpu(self) -> EngineConfig:
        spread = {"tensor_parallel_size", "pipeline_parallel_size"} & set(self.args)
        if self.gpu_share < 1 and spread:
            raise ValueError(f"gpu_share: {self.gpu_share:g} is of one GPU; leave out args.{sorted(spread)[0]}")
        return self


class HeadConfig(Section):
    """RecHead, see `rporec.models.rechead`."""

    fusion: Literal["paper", "residual"] = "residual"
    history: Literal["text", "sequence"] = "sequence"
    experts: bool | None = None  # None: on for residual, off for paper
    reranker: bool = False  # a small network over the experts' candidates, see `rporec.models.reranker`
    dim: int = Field(64, ge=8)
    layers: int = Field(2, ge=1)  # of the fusion transformer (paper) and of the sequence encoder
    heads: int = Field(4, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)
    softmax: Literal["sampled", "full"] = "full"
    negatives: int = Field(49, ge=1)  # sampled softmax only
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    batch_size: int = Field(128, ge=1)
    epochs: int = Field(20, ge=1)
    patience: int = Field(3, ge=1)  # epochs without a better validation NDCG
    samples: Literal["slice", "before_rl"] = "slice"  # before_rl: with all others before the RL slice, without text
    workers: int = Field(1, ge=1)
    refit: Literal["none", "train+valid"] = "none"
    refreshed: bool = False  # after RL also heads on the head and the RL slice, for the LLM of either stage
    seed: int | None = None  # None: the run's

    @property
    def has_experts(self) -> bool:
        return self.experts if self.experts is not None else self.fusion == "residual"

    @model_validator(mode="after")
    def _fits_together(self) -> HeadConfig:
        if self.dim % self.heads:
            raise ValueError(f"dim: {self.dim} does not divide by heads: {self.heads}")
        if self.reranker and not self.has_experts:
            raise ValueError("reranker: ranks what the experts propose; it needs experts: true")
        return self


class RewardConfig(Section):
    """Weights of the six terms of `docs/methods.md`; conciseness and faithfulness are off for tiny."""

    format: float = 0.1
    outside: float = 0.1
    ndcg: float = 0.5
    conciseness: float = 0.1
    faithfulness: float = 0.1
    entropy: float = 0.1
    candidates: Literal["catalogue", "sampled"] = "catalogue"
    negatives: int = Field(49, ge=1)  # candidates: sampled only
    mask_history: bool = False  # rank without the mask: with it the policy learns to name seen items
    embedder: str | None = None  # frozen text encoder for faithfulness: folder or hub id
    custom: str | None = None  # own reward, "module:function", added to the sum
    gpu_share: float = Field(0.0, ge=0, le=1)  # of a GPU, for each reward worker; 0: its models run on the CPU
    timeout: float = Field(120.0, gt=0)  # seconds for one batch


class ReReConfig(Section):
    """`recipe: rere`: what the LLM writes is an item, see `rporec.recipes.rere`."""

    identity: Literal["title", "semantic"] = "title"  # semantic: one code a level, of similar items the same ones
    levels: int = Field(3, ge=1, le=20)  # semantic: codes of an item, besides one that tells equal ones apart
    codes: int = Field(64, ge=2)  # semantic: how many there are at each level
    sampling: Literal["beams", "dynamic"] = "beams"  # dynamic: draw 1.5 G items, keep hits and the most diverse misses
    rule: float = 1.0  # weights of the reward's terms
    ranking: float = 1.0
    semantic: float = 0.0
    collaborative: float = 0.0  # needs a recommender, which stage 1 then trains
    eval_beams: int = Field(20, ge=10)  # of validation and test; an item in none of them is a miss
    more_beams: tuple[Annotated[int, Field(ge=10)], ...] = ()  # test again with each of these, for rows of their own


class PreferenceConfig(Section):
    """`recipe: preference`: chosen items against negatives, offline, see `rporec.recipes.preference`.

    Items are written as `rere` says; `steps`, `groups_per_step`, `group_size` (one chosen, the others
    negatives), `rl.lr` and its schedule, `rl.grad_clip` and `rl.micro_batch_groups` are those of RL.
    """

    loss: Literal["s_dpo", "dynamicpo", "napo"] = "s_dpo"
    beta: float = Field(1.0, gt=0)
    negatives: Literal["sampled", "beams"] = "sampled"  # any items the user never had, or what the LLM would write
    similarity: float = Field(0.8, ge=-1, le=1)  # napo: cosine from which users share negatives
    margin: float = Field(1.0, ge=0)  # napo: nats, between the target and a negative that is sure to be one


class RLConfig(Section):
    lr: float = Field(2e-4, gt=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"  # after lr's warm-up; cosine: to 0 one step after the last
    kl: float = Field(0.05, ge=0)
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    loss: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo"] = "grpo"
    clip_low: float = Field(0.2, ge=0)
    clip_high: float = Field(0.2, ge=0)
    correction: Literal["none", "tis", "icepop"] = "tis"
    tis_cap: float = Field(2.0, gt=0)
    icepop: tuple[float, float] = (0.5, 5.0)
    sequence_mask: tuple[float, float] | None = (0.5, 2.0)
    top_entropy: float = Field(0.2, gt=0, le=1)  # share of completion tokens that carry the policy gradient
    grad_clip: float = Field(1.0, gt=0)
    temperature: float = Field(1.0, gt=0)
    max_tokens: int | None = Field(None, ge=1)  # None: sampling.max_tokens
    dynamic_sampling: bool = False  # drop groups of equal reward and lease others
    micro_batch_groups: int = Field(8, ge=1)
    validate_every: int = Field(5, ge=1)  # versions
    validate_samples: int = Field(256, ge=1)
    max_tries: int = Field(3, ge=1)  # of one group before it is dropped

    @field_validator("icepop", "sequence_mask")
    @classmethod
    def _interval(cls, bounds: tuple[float, float] | None) -> tuple[float, float] | None:
        if bounds is not None and not 0 <= bounds[0] < bounds[1]:
            raise ValueError("no interval; write [low, high] with 0 <= low < high")
        return bounds

    @model_validator(mode="after")
    def _of_one_kind(self) -> RLConfig:
        if self.loss in ("gspo", "rloo") and self.correction == "icepop":
            raise ValueError(f"correction: icepop masks tokens, loss: {self.loss} weighs sequences; use tis")
        return self


class DeepSpeedConfig(Section):
    zero_stage: Literal[0, 1, 2, 3] = 1
    bf16: bool | None = None  # None: on CUDA
    gpu_share: float = Field(1.0, gt=0, le=1)  # of its GPU, for each rank; below 1 a rollout worker may have the rest
    args: dict[str, Any] = {}  # merged into the DeepSpeed config


class Slices(Section):
    """Shares of train, oldest first; without warm-up its share goes to the head."""

    warmup: float = Field(0.4, ge=0)
    head: float = Field(0.4, gt=0)
    rl: float = Field(0.2, ge=0)

    @model_validator(mode="after")
    def _shares(self) -> Slices:
        if self.warmup + self.head + self.rl > 1 + 1e-9:
            raise ValueError(
                f"warmup: {self.warmup:g}, head: {self.head:g} and rl: {self.rl:g} are more than 1 together"
            )
        return self


class Elastic(Section):
    """Between two numbers of workers, by the rule of `rporec.rl.elastic`; or one number."""

    min: int = Field(1, ge=1)  # what a run begins with
    max: int = Field(1, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, value: Any) -> Any:
        return {"min": value, "max": value} if isinstance(value, int) else value

    @model_validator(mode="after")
    def _ordered(self) -> Elastic:
        if self.min > self.max:
            raise ValueError(f"min: {self.min} is more than max: {self.max}")
        return self


class EvaluateConfig(Section):
    """What stands beside the run's own methods."""

    baselines: tuple[str, ...] = CHEAP_BASELINES  # names, or `all`
    seeds: int = Field(3, ge=1)  # of a baseline that depends on its seed: its row is their mean
    conventions: Literal["both", "headline"] = "both"  # headline: no ranks, and no beams, but in `data.headline`

    @field_validator("baselines", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if value in ("all", "none"):
            return BASELINES if value == "all" else ()
        names = value.split(",") if isinstance(value, str) else value
        if isinstance(names, list | tuple) and (unknown := [name for name in names if name not in BASELINES]):
            raise ValueError(f"{unknown[0]!r} is none of all, none, {', '.join(BASELINES)}")
        return names


class PromotionConfig(Section):
    """When training hands a version to serving, see `rporec.promotion`."""

    automatic: bool = True  # when validation NDCG@10 exceeds that of all promoted before; False: by hand
    min_gain: float = Field(0.0, ge=0)  # by how much


class ServeConfig(Section):
    """`rporec serve`; a replica is a process, and {min, max} of them follow the load."""

    ingresses: Elastic = Elastic()
    reasoners: Elastic = Elastic()
    retrievers: Elastic = Elastic()
    timeout_ms: int = Field(10_000, ge=1)  # of a request that names none
    ongoing: int = Field(64, ge=1)  # requests that a replica works on at once
    queued: int = Field(256, ge=0)  # that wait for a deployment; more are refused
    # Of a reasoner. 2: new weights go into the idle one while the other answers, and each takes half of the
    # GPU's memory; 1: requests wait until the running ones have ended.
    engines: int = Field(2, ge=1, le=2)
    engine_core: int | None = Field(None, ge=0)  # that engines are pinned to, so that HTTP has the others
    exact_below: int = Field(200_000, ge=1)  # items up to which retrieval is exact, not by an ANN index
    token_file: str | None = None  # holds the bearer token; None: the variable RPOREC_SERVE_TOKEN
    requests_per_minute: int | None = Field(None, ge=1)  # of one token, or of one host without tokens
    max_body_bytes: int = Field(2**20, ge=1024)


class Config(Section):
    name: str = "run"
    seed: int = Field(0, ge=0)
    backbone: str = "tiny"
    # auto: CUDA where a GPU is there when the run begins; cuda: also where an autoscaler has yet to bring one
    device: Literal["auto", "cpu", "cuda"] = "auto"
    recipe: Literal["rporec", "rere", "preference"] = "rporec"
    data: DataConfig = DataConfig()
    tiny: TinyConfig = TinyConfig()
    lora: LoraConfig | None = None
    text: TextConfig = TextConfig()
    teacher: TeacherConfig = TeacherConfig()
    slices: Slices = Slices()
    warmup: WarmupConfig = WarmupConfig()
    sampling: SamplingConfig = SamplingConfig()
    engine: EngineConfig = EngineConfig()
    head: HeadConfig = HeadConfig()
    reward: RewardConfig = RewardConfig()
    rere: ReReConfig = ReReConfig()
    preference: PreferenceConfig = PreferenceConfig()
    rl: RLConfig = RLConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    promotion: PromotionConfig = PromotionConfig()
    serve: ServeConfig = ServeConfig()

    max_staleness: int = Field(1, ge=0)  # versions
    groups_per_step: int = Field(64, ge=1)
    group_size: int = Field(4, ge=2)
    steps: int = Field(30, ge=0)
    rollout_workers: Elastic = Elastic()  # a number, or {min, max}: as many as the learner can use
    reward_workers: Elastic = Elastic()  # likewise
    learners: int = Field(1, ge=1)
    checkpoint_every: int = Field(10, ge=1)  # learner steps
    max_warmup_samples: int | None = Field(None, ge=0)
    max_head_samples: int | None = Field(None, ge=1)
    max_eval_samples: int | None = Field(None, ge=1)  # of validation and of test, newest first; None: all
    more_warmup: bool = False  # control: spend RL's CPU seconds on more warm-up steps and evaluate that too
    eval_samples: int = Field(4, ge=0)  # completions a test user for the `_sampled` rows; 0: no such rows
    weight_transfer: Literal["auto", "store", "nccl"] = "store"  # auto: nccl between GPUs, else the object store
    save_rollouts: bool = False  # keep what every learner step consumed, to look at or to train on again

    @property
    def tiny_backbone(self) -> bool:
        return self.backbone == "tiny"

    @property
    def writes_items(self) -> bool:
        """Whether what the LLM writes is an item itself."""
        return self.recipe != "rporec"

    @property
    def tested_conventions(self) -> tuple[Convention, ...]:
        """Those that test is ranked in."""
        return CONVENTIONS if self.evaluate.conventions == "both" else (self.data.headline,)

    @property
    def teacher_kind(self) -> str:
        return self.teacher.kind or ("template" if self.tiny_backbone else "backbone")

    @property
    def rl_max_tokens(self) -> int:
        return self.rl.max_tokens or self.sampling.max_tokens

    @property
    def reserve(self) -> int:
        """Tokens of the LLM's window that a prompt leaves to the longest completion."""
        return max(self.sampling.max_tokens, self.rl_max_tokens)

    @property
    def slots(self) -> int:
        """Groups that one engine writes at once."""
        return max(1, self.engine.max_num_seqs // self.group_size)

    @model_validator(mode="after")
    def _contradictions(self) -> Config:
        if self.more_warmup and (self.warmup.steps == 0 or self.steps == 0):
            raise ValueError("more_warmup compares RL with more warm-up; it needs both (steps, warmup.steps)")
        if self.recipe == "rere":
            self._check_rere()
        if self.writes_items:
            if self.rere.identity == "semantic" and self.lora:
                raise ValueError(
                    "rere.identity: semantic adds tokens, whose embeddings lora does not train; take title"
                )
            for key, wanted in (
                ("more_warmup", self.more_warmup),
                ("head.refreshed", self.head.refreshed),
                ("reward.custom", self.reward.custom),
            ):
                if wanted:
                    raise ValueError(f"recipe: {self.recipe} has no {key}; leave it out")
        if self.max_staleness > 0 and self.rl.correction == "none":
            raise ValueError("rl.correction: none needs max_staleness: 0; off-policy tokens want tis or icepop")
        if self.groups_per_step % self.learners:
            raise ValueError(f"groups_per_step: {self.groups_per_step} is no multiple of learners: {self.learners}")
        if max(self.learners, self.head.workers) > 1 and self.deepspeed.gpu_share < 1 and self.device != "cpu":
            raise ValueError(
                f"deepspeed.gpu_share: {self.deepspeed.gpu_share:g} wants learners: 1 and head.workers: 1; NCCL takes no two "
                f"ranks on one GPU (got {self.learners} and {self.head.workers})"
            )
        faithful = self.recipe == "rporec" and self.reward.faithfulness
        if not self.tiny_backbone and faithful and self.reward.embedder is None:
            raise ValueError("reward.faithfulness needs reward.embedder, a frozen text encoder; or set it to 0")
        if self.tiny_backbone:
            self._check_tiny()
        return self

    def _check_rere(self) -> None:
        if self.max_staleness:
            raise ValueError(
                "recipe: rere needs max_staleness: 0; beams are no samples of the policy, so nothing can correct for "
                f"older ones (got {self.max_staleness})"
            )
        if self.rl.temperature != 1:
            raise ValueError("recipe: rere needs rl.temperature: 1; beams go by the policy's own log-probabilities")

    def _check_tiny(self) -> None:
        shape = self.tiny
        if shape.hidden % shape.heads or shape.heads % shape.kv_heads:
            raise ValueError("tiny: hidden must divide by heads, and heads by kv_heads")
        width = shape.hidden // shape.heads
        if self.engine.kind == "vllm" and width not in VLLM_HEAD_WIDTHS:
            known = ", ".join(map(str, VLLM_HEAD_WIDTHS))
            raise ValueError(f"tiny: hidden / heads is {width}, and vLLM has attention for {known}; change tiny.heads")
        if self.reserve >= shape.context:
            raise ValueError(f"tiny.context: {shape.context} tokens leave no prompt beside max_tokens: {self.reserve}")


def load_config(path: Path | str | None, overrides: list[str] = ()) -> Config:  # type: ignore[assignment]
    """Read a YAML file and apply `a.b=value` overrides (values are YAML).

    Raises ConfigError with one line: the key, what is wrong, and the nearest key that exists.
    """
    raw: dict[str, Any] = {}
    if path is not None:
        path = Path(path)
        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such config file") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(raw, dict):
            raise ConfigError(f"{path}: a config is a mapping of keys, not a {type(raw).__name__}")
        raw.setdefault("name", path.stem)
    _apply(raw, overrides)
    return parse_config(raw)


def override(config: Config, overrides: list[str]) -> Config:
    """A resolved config with some keys changed, checked again."""
    raw = config.model_dump(mode="json")
    _apply(raw, overrides)
    return parse_config(raw)


def parse_config(raw: dict[str, Any]) -> Config:
    """Check a plain mapping; raises ConfigError with one line."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from None


def _apply(raw: dict[str, Any], overrides: list[str]) -> None:
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"{override!r}: an override is key=value, with dots for sections (rl.lr=1e-4)")
        try:
            _assign(raw, key.split("."), yaml.safe_load(value))
        except yaml.YAMLError:
            raise ConfigError(f"{override!r}: the value is not valid YAML; quote it") from None


def _assign(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        if tree.get(part) is None:  # `rl:` with every key below it commented out
            tree[part] = {}
        child = tree[part]
        if not isinstance(child, dict):
            raise ConfigError(f"{'.'.join(path)}: {part} is a value, not a section")
        tree = child
    tree[path[-1]] = value


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        known = _keys_at(location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(sorted(known))}"
        return f"{key}: unknown config key; {hint}"
    if first["type"] == "model_type":
        return f"{key}: a section with keys, such as {_keys_at(location)[0]}; fill it or leave it out"
    message = first["msg"].removeprefix("Value error, ")
    if not key:
        return message
    if first["type"] == "value_error" and isinstance(first["input"], dict):  # of a section, named by one of its keys
        return f"{key}.{message}"
    return f"{key}: {message} (got {first['input']!r})"


def _keys_at(path: list[str]) -> list[str]:
    model: Any = Config
    for part in path:
        field = model.model_fields.get(part)
        annotation = field.annotation if field else None
        options = [annotation, *getattr(annotation, "__args__", ())]
        model = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
        if model is None:
            return []
    return list(model.model_fields)
