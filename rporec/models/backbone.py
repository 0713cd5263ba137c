"""The policy LLM as a Hugging Face folder: made, loaded, saved, and read out for publishing."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rporec.config import ConfigError, LoraConfig, TinyConfig, first_line
from rporec.files import replacing
from rporec.text.completion import TAGS
from rporec.text.tokenizer import fit_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TINY_PARAMETERS = (1_000_000, 5_000_000)


def make_tiny(texts: Iterable[str], config: TinyConfig, seed: int, out: Path | str, tokens: Sequence[str] = ()) -> Path:
    """Write a randomly initialised Qwen3 and a tokenizer fitted to `texts` as a Hugging Face folder.

    `tokens` become tokens of their own.

    The number of parameters is, with tied embeddings, V tokens, width d and head width h = d / heads,

        V d  +  layers * (2 d h (heads + kv_heads)  +  3 d intermediate  +  2 d  +  2 h)  +  d

    V is what the texts need, `config.vocabulary` at most. The shape is meant for 1 to 5 M; outside
    it, a warning is logged. The same texts, config and seed give the same weights.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3Config

    tokenizer = fit_tokenizer(texts, config.vocabulary, tokens)
    tokenizer.model_max_length = config.context
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    shape = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden,
        head_dim=config.hidden // config.heads,
        intermediate_size=config.intermediate,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=config.context,
        tie_word_embeddings=True,
        use_cache=True,
        bos_token_id=None,
        dtype="float32",
        **ends,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    model.generation_config = GenerationConfig(bos_token_id=None, **ends)
    count = model.num_parameters()
    if not TINY_PARAMETERS[0] <= count <= TINY_PARAMETERS[1]:
        logger.warning(
            "backbone tiny has %.2f M parameters, %d of its tokens' embeddings; it is meant to have 1 to 5 M "
            "(tiny.hidden, tiny.layers, tiny.intermediate, tiny.vocabulary)",
            count / 1e6,
            len(tokenizer) * config.hidden,
        )
    save_model(model, tokenizer, out)
    return Path(out)


def bring_backbone(name: str, out: Path, tokens: Sequence[str] = (), seed: int = 0) -> None:
    """Have the LLM `name`, a folder or hub id, at `out`: linked where it can be, copied where it must be.

    `tokens` that it lacks are added, their embeddings drawn near the mean of the others.
    """
    import torch

    if Path(name).is_dir() and not tokens:
        load_tokenizer(name)  # says in one line what is wrong with it
        out.symlink_to(Path(name).absolute(), target_is_directory=True)
        return
    model, tokenizer = load_model(name, "bfloat16"), load_tokenizer(name)
    if tokenizer.add_tokens(list(tokens)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.resize_token_embeddings(max(len(tokenizer), model.get_input_embeddings().num_embeddings))
    save_model(model, tokenizer, out)


def load_model(
    name: Path | str, dtype: str | torch.dtype = "float32", lora: LoraConfig | None = None
) -> PreTrainedModel:
    """Load a causal LM from a folder or hub id, in eval mode, with fresh LoRA adapters if asked for.

    dtype: a torch dtype or its name; "auto" is float32 on the CPU, bfloat16 on CUDA.
    With `lora` a `peft.PeftModel` comes back, whose adapters alone are trainable.
    Raises ConfigError with one line if there is no such model or it cannot be read.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if dtype == "auto":
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    with _readable(name):
        model = AutoModelForCausalLM.from_pretrained(str(name), dtype=dtype)
    if lora is not None:
        import peft

        adapters = peft.LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.target_modules, task_type="CAUSAL_LM"
        )
        try:
            model = peft.get_peft_model(model, adapters)
        except ValueError as error:
            raise ConfigError(f"lora.target_modules: {first_line(error)}") from None
    return model.eval()


def load_tokenizer(name: Path | str) -> PreTrainedTokenizerBase:
    """Load a tokenizer that can pad (with eos if it has no pad token) and that keeps the four tags.

    Raises ConfigError if it cannot be read, or if a tag does not survive encoding and decoding
    (a tag made a special token would be dropped from every completion).
    """
    from transformers import AutoTokenizer

    with _readable(name):
        tokenizer = AutoTokenizer.from_pretrained(str(name))
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"backbone: the tokenizer of {str(name)!r} has no end-of-text token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    for tag in TAGS:
        ids = tokenizer.encode(tag, add_special_tokens=False)
        if tokenizer.decode(ids, skip_special_tokens=True).strip() != tag:
            raise ConfigError(f"backbone: the tokenizer of {str(name)!r} loses the tag {tag} when it decodes")
    return tokenizer


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path | str) -> None:
    """Write model and tokenizer as one Hugging Face folder, LoRA merged into the weights.

    The folder appears whole or not at all; one that was there before is replaced. The live model
    is left as it is.
    """
    weights = {name: tensor.cpu().contiguous() for name, tensor in merged_named_tensors(model)}
    with replacing(Path(out)) as folder:
        _base(model).save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)


def merged_named_tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights that an engine needs: (Hugging Face name, detached tensor), one at a time.

    LoRA is merged into copies, `W + (alpha / rank) B A`; the live model keeps its adapters. A tied
    `lm_head.weight` is left out, the embedding stands for both. The names are those of the module
    in memory: a model whose checkpoint is laid out otherwise (fused experts) is not translated.
    """
    adapted = {f"{name}.base_layer.weight": module for name, module in model.named_modules() if _has_lora(module)}
    prefix = "base_model.model." if hasattr(model, "peft_config") else ""
    tied = bool(model.config.tie_word_embeddings)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        tensor = parameter.detach()
        if name in adapted:
            layer = adapted[name]
            for adapter in layer.active_adapters:
                tensor = tensor + layer.get_delta_weight(adapter).detach().to(tensor)
        name = name.removeprefix(prefix).replace(".base_layer.", ".")
        if not (tied and name == "lm_head.weight"):
            yield name, tensor


def _has_lora(module: torch.nn.Module) -> bool:
    return hasattr(module, "get_delta_weight") and hasattr(module, "base_layer")


def _base(model: PreTrainedModel) -> PreTrainedModel:
    return model.get_base_model() if hasattr(model, "peft_config") else model


@contextmanager
def _readable(name: Path | str) -> Iterator[None]:
    """Turns what goes wrong while a model is looked up and read into one line for the user."""
    text = str(name)
    is_path = text.startswith(("/", ".", "~")) or text.count("/") > 1
    if is_path and not Path(text).is_dir():
        raise ConfigError(f"backbone: no such folder {text!r}; give a Hugging Face model folder, a hub id or tiny")
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"backbone: cannot load {text!r}: {first_line(error)} "
            "(give a Hugging Face model folder, a hub id while the hub can be reached, or tiny)"
        ) from None


def switch_off_dropout(module: torch.nn.Module) -> None:
    """Also in train mode. Policy optimisation compares two passes over the same tokens: masks drawn anew in each
    would look like a policy that moved."""
    import torch

    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
        if isinstance(getattr(part, "attention_dropout", None), float):
            part.attention_dropout = 0.0  # type: ignore[assignment]
