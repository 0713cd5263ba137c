import logging

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rporec.config import ConfigError, LoraConfig, TinyConfig
from rporec.models.backbone import (
    load_model,
    load_tokenizer,
    make_tiny,
    merged_named_tensors,
    save_model,
    switch_off_dropout,
)

TEXTS = [f" | Zarnak {n} ; fantasy => last before run" for n in range(1, 30)]
SHAPE = TinyConfig(hidden=32, layers=2, heads=4, kv_heads=2, intermediate=64, vocabulary=400, context=64)
IDS = torch.tensor([[3, 77, 300, 12, 9]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(TEXTS, SHAPE, seed=0, out=tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def adapted(folder):
    model = load_model(folder, lora=LoraConfig(rank=4, alpha=8))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3, generator=generator)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_a_tiny_backbone_is_a_tied_qwen3_that_pads_and_stops(folder):
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    config = model.config
    assert (config.model_type, config.head_dim, config.tie_word_embeddings) == ("qwen3", 8, True)
    assert config.vocab_size == len(tokenizer) <= 400
    for settings in (config, model.generation_config):
        assert (settings.eos_token_id, settings.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert not model.training
    assert tokenizer.encode(" Zarnak") == load_tokenizer(str(folder)).encode(" Zarnak")
    assert len(tokenizer.encode(" Zarnak")) == 1
    text = "<think> é</think>"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_the_documented_size_is_the_size(folder):
    d, h = SHAPE.hidden, SHAPE.hidden // SHAPE.heads
    vocabulary = len(load_tokenizer(folder))
    layer = 2 * d * h * (SHAPE.heads + SHAPE.kv_heads) + 3 * d * SHAPE.intermediate + 2 * d + 2 * h
    assert load_model(folder).num_parameters() == vocabulary * d + SHAPE.layers * layer + d


def test_the_seed_alone_decides_the_weights(folder, tmp_path):
    state = torch.random.get_rng_state()
    same = make_tiny(TEXTS, SHAPE, seed=0, out=tmp_path / "same")
    other = make_tiny(TEXTS, SHAPE, seed=1, out=tmp_path / "other")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(logits(load_model(folder)), logits(load_model(same)))
    assert not torch.equal(logits(load_model(folder)), logits(load_model(other)))


def test_a_size_outside_the_meant_range_warns(folder, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        make_tiny(TEXTS, SHAPE, seed=0, out=tmp_path / "small")
    assert "meant to have 1 to 5 M" in caplog.text


def test_merged_weights_give_the_logits_of_the_adapted_model(adapted, folder, tmp_path):
    expected = logits(adapted)
    assert not torch.allclose(expected, logits(load_model(folder)), atol=1e-3)
    save_model(adapted, load_tokenizer(folder), tmp_path / "merged")
    merged = load_model(tmp_path / "merged")
    assert torch.allclose(logits(merged), expected, atol=1e-5)
    assert torch.equal(logits(adapted), expected)  # the live model kept its adapters
    trainable = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)


def test_published_names_are_those_of_the_plain_model_without_the_tied_head(adapted, folder):
    plain = dict(load_model(folder).named_parameters())
    published = dict(merged_named_tensors(adapted))
    assert published.keys() == plain.keys()
    assert "lm_head.weight" not in published
    assert all(published[name].shape == plain[name].shape for name in plain)
    assert not any(tensor.requires_grad for tensor in published.values())
    assert dict(merged_named_tensors(load_model(folder))).keys() == plain.keys()


def test_saving_replaces_a_folder_and_a_failure_leaves_it(folder, tmp_path, monkeypatch):
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    out = tmp_path / "model"
    save_model(model, tokenizer, out)
    (out / "stale").touch()
    monkeypatch.setattr(type(tokenizer), "save_pretrained", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_model(model, tokenizer, out)
    assert (out / "stale").exists()
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.undo()
    save_model(model, tokenizer, out)
    assert not (out / "stale").exists()
    assert (out / "model.safetensors").exists()


def test_what_cannot_be_loaded_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    for name in (tmp_path / "missing", tmp_path / "empty", "nobody/no-such-model", "not a name"):
        for load in (load_model, load_tokenizer):
            with pytest.raises(ConfigError, match=r"^backbone: ") as error:
                load(name)
            assert "\n" not in str(error.value)


def test_unknown_lora_modules_are_refused(folder):
    with pytest.raises(ConfigError, match=r"lora\.target_modules"):
        load_model(folder, lora=LoraConfig(target_modules=["no_such_module"]))


def test_a_tokenizer_that_loses_the_tags_is_refused(folder, tmp_path):
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})
    tokenizer.save_pretrained(tmp_path / "loses")
    save_model(load_model(folder), tokenizer, tmp_path / "loses")
    with pytest.raises(ConfigError, match="loses the tag <think>"):
        load_tokenizer(tmp_path / "loses")


def test_a_tokenizer_without_padding_pads_with_eos(folder, tmp_path):
    tokenizer = load_tokenizer(folder)
    tokenizer.pad_token = None
    save_model(load_model(folder), tokenizer, tmp_path / "unpadded")
    assert load_tokenizer(tmp_path / "unpadded").pad_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_dropout_can_be_switched_off_in_train_mode(kind):
    """Qwen3 drops in attention alone and by a number, GPT-2 in modules too."""
    sizes = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"qwen3": {"attention_dropout": 0.5, "head_dim": 16, "num_key_value_heads": 1}, "gpt2": {"attn_pdrop": 0.5}}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **more[kind])).train()
    assert not torch.equal(logits(model), logits(model))
    switch_off_dropout(model)
    assert torch.equal(logits(model), logits(model))
