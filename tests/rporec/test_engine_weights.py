import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from rporec.engine.types import SamplingSpec, Version
from rporec.engine.weights import (
    FlatWeights,
    WeightsError,
    check_fit,
    checkpoint_shapes,
    checksum,
    expected_shapes,
    flatten,
    save_safetensors,
    unflatten,
)
from rporec.models.backbone import load_model, merged_named_tensors


def named(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed.weight": (37, 5), "norm": (7,), "scale": (), "empty": (0, 3), "head.weight": (2, 3, 4)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_tensor_comes_back_bit_for_bit(dtype):
    tensors = named(dtype)
    back = dict(unflatten(flatten(tensors.items())))
    assert list(back) == list(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == dtype
        assert torch.equal(back[name], tensor)


def test_numpy_tensors_and_torch_tensors_flatten_alike():
    tensors = named()
    flat = flatten((name, tensor.numpy()) for name, tensor in tensors.items())
    assert np.array_equal(flat.buffer, flatten(tensors.items()).buffer)


def test_tensors_read_from_the_buffer_are_views_of_it():
    flat = flatten(named().items())
    tensor = dict(unflatten(flat))["head.weight"]
    start = flat.buffer.ctypes.data
    assert start <= tensor.data_ptr() < start + flat.nbytes


def test_a_read_only_buffer_reads_without_a_warning(recwarn):
    flat = flatten(named().items())
    flat.buffer.flags.writeable = False
    dict(unflatten(flat))
    assert not recwarn.list


def test_a_conversion_on_the_way_equals_one_before():
    tensors = named()
    before = flatten({name: tensor.bfloat16() for name, tensor in tensors.items()}.items())
    assert flatten(tensors.items(), dtype="bfloat16").checksum == before.checksum


def test_the_buffer_grows_beyond_its_first_size():
    big = torch.arange(6 << 20, dtype=torch.float32)
    back = dict(unflatten(flatten([("a", big), ("b", big + 1), ("c", big[:3])])))
    assert torch.equal(back["b"], big + 1)
    assert torch.equal(back["c"], big[:3])


def test_a_tied_head_is_left_out_when_asked():
    tensors = {"model.embed_tokens.weight": torch.ones(3, 2), "lm_head.weight": torch.ones(3, 2)}
    assert [name for name, *_ in flatten(tensors.items(), drop_tied_head=True).entries] == ["model.embed_tokens.weight"]
    assert len(flatten(tensors.items()).entries) == 2


@pytest.mark.parametrize("position", [0, 3, 100_000, -1])
def test_one_flipped_bit_anywhere_is_refused(position):
    flat = flatten([("a", torch.arange(40_000, dtype=torch.float32)), ("b", torch.ones(3))])
    flat.buffer[position] ^= 1
    with pytest.raises(WeightsError, match="damaged"):
        unflatten(flat)


def test_swapped_blocks_are_refused():
    buffer = np.random.default_rng(0).integers(0, 256, 4 * 32768, dtype=np.uint8)
    rows = buffer.reshape(4, 32768)
    assert checksum(rows[[1, 0, 2, 3]].reshape(-1)) != checksum(buffer)  # whole rows
    assert checksum(np.concatenate([buffer[8:16], buffer[:8], buffer[16:]])) != checksum(buffer)  # two words


def test_a_shortened_buffer_is_refused():
    flat = flatten(named().items())
    with pytest.raises(WeightsError, match="cut short"):
        unflatten(FlatWeights(flat.buffer[:-64], flat.entries, flat.checksum))


def test_integer_tensors_are_refused_by_name():
    with pytest.raises(WeightsError, match=r"position_ids.*int64"):
        flatten([("position_ids", torch.arange(3))])


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"a": (2, 3)}, "b: missing"),
        ({"a": (3, 2), "b": (1,)}, r"a: shape \(3, 2\) where the model has \(2, 3\)"),
        ({"a": (2, 3), "b": (1,), "c": (1,)}, "c: the model has no such tensor"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(shapes, message):
    with pytest.raises(WeightsError, match=message):
        check_fit(shapes, {"a": (2, 3), "b": (1,)})


def test_a_tied_head_fits_whether_published_or_not():
    expected = {"model.embed_tokens.weight": (3, 2)}
    check_fit({"model.embed_tokens.weight": (3, 2), "lm_head.weight": (3, 2)}, expected)
    check_fit(expected, expected)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_in_the_file_of_a_model_is_expected_unless_it_is_tied(tmp_path, tied):
    """Qwen3-0.6B on the hub is such a file: its config ties the head, which is stored all the same."""
    config = Qwen3Config(
        vocab_size=8,
        hidden_size=8,
        head_dim=4,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    model = Qwen3ForCausalLM(config)
    config.save_pretrained(tmp_path)
    save_file(
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert "lm_head.weight" in checkpoint_shapes(tmp_path)
    published = {name: tuple(tensor.shape) for name, tensor in merged_named_tensors(load_model(tmp_path))}
    assert expected_shapes(tmp_path) == published
    assert ("lm_head.weight" in published) is not tied
    check_fit(published, expected_shapes(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_file_holds_the_same_tensors_and_its_header_their_shapes(tmp_path, dtype):
    tensors = named(dtype)
    save_safetensors(flatten(tensors.items()), tmp_path / "model.safetensors")
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert checkpoint_shapes(tmp_path) == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_versions_order_by_attempt_first_and_survive_their_label():
    assert Version(1, 3) > Version(0, 7) > Version(0, 6)
    assert Version.parse(str(Version(2, 13))) == Version(2, 13)


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"n": 0}, {"max_tokens": 0}, {"min_tokens": 65}]
)
def test_a_sampling_that_does_not_exist_is_refused(wrong):
    with pytest.raises(ValueError, match="no such sampling"):
        SamplingSpec(**wrong)


def test_greedy_groups_are_refused():
    with pytest.raises(ValueError, match="greedy"):
        SamplingSpec(temperature=0, n=2)


def test_neighbouring_seeds_share_no_stream():
    seeds = sorted(SamplingSpec(seed=seed).base_seed for seed in range(1000))
    assert min(np.diff(np.array(seeds, dtype=object))) > 64
    assert seeds[-1] < 2**63
