"""Quantised weights: decoded bit for bit as transformers decodes them, read part by part, and refused by name."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from damage import damaged
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tinker_jax.checkpoints.stored import Fp8, Int4, Mxfp4, Quantization, StoredTensor, quantization, stored_tensors
from tinker_jax.checkpoints.tensor_files import TensorEntry, read_header
from tinker_jax.types.errors import BadRequestError, StorageError, TinkerError, UnprocessableEntityError, UnsupportedError

EXPERTS, ATTENTION = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.self_attn.q_proj.weight"
SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """`stored(tensors, quantization)` → the logical tensors of a file that holds `tensors`."""
    file = tmp_path_factory.mktemp("stored") / "model.safetensors"

    def read(tensors: dict[str, torch.Tensor], encoding: Quantization | None) -> dict[str, StoredTensor]:
        save_file(tensors, file)
        return stored_tensors(read_header(file), encoding)

    return read


def random_bytes(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def mxfp4(name: str, seed: int, E: int, N: int, G: int) -> dict[str, torch.Tensor]:
    return {f"{name}_blocks": random_bytes(seed, E, N, G, 16), f"{name}_scales": random_bytes(seed + 1, E, N, G)}


def fp8(
    name: str, seed: int, shape: tuple[int, ...], block: tuple[int, int], dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    *lead, N, K = shape
    grid = (*lead, -(-N // block[0]), -(-K // block[1]))
    scale = torch.rand(grid, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return {name: random_bytes(seed, *shape).view(torch.float8_e4m3fn), f"{name}_scale_inv": scale}


def int4(name: str, seed: int, N: int, groups: int, group: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Packed as the format says: offset by 8 to be unsigned, the first of eight codes in the lowest bits."""
    codes = np.random.default_rng(seed).integers(-8, 8, (N, groups * group // 8, 8))
    packed = ((codes + 8) << (4 * np.arange(8))).sum(-1).astype(np.uint32).view(np.int32)
    return {
        f"{name}_packed": torch.from_numpy(packed),
        f"{name}_scale": torch.randn(N, groups, generator=torch.Generator().manual_seed(seed)).to(dtype),
        f"{name}_shape": torch.tensor([N, groups * group], dtype=torch.int32),
    }


def bits(array: np.ndarray | torch.Tensor) -> np.ndarray:
    """The bits of bfloat16 values, all NaN alike."""
    if isinstance(array, torch.Tensor):
        assert array.dtype == torch.bfloat16
        array = array.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    assert array.dtype == ml_dtypes.bfloat16
    return np.where(np.isnan(array.astype(np.float32)), np.uint16(0x7FC0), array.view(np.uint16))


def assert_parts_are_the_whole(tensor: StoredTensor) -> None:
    whole = tensor.read()
    assert whole.shape == tensor.shape and whole.dtype == tensor.dtype
    for index in range(tensor.shape[0]):
        np.testing.assert_array_equal(bits(tensor.part(index)), bits(whole[index]))


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, E=st.integers(1, 3), N=st.integers(1, 130), G=st.integers(1, 4))
def test_mxfp4_is_what_transformers_makes_of_it(stored, seed, E, N, G):
    parts = mxfp4(EXPERTS, seed, E, N, G)
    (tensor,) = stored(parts, Mxfp4()).values()
    assert (tensor.name, tensor.shape) == (EXPERTS, (E, 32 * G, N))
    expected = convert_moe_packed_tensors(parts[f"{EXPERTS}_blocks"], parts[f"{EXPERTS}_scales"])
    np.testing.assert_array_equal(bits(tensor.read()), bits(expected))
    assert_parts_are_the_whole(tensor)


def test_every_code_of_mxfp4_at_every_scale_is_what_transformers_makes_of_it(stored):
    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(1, 256, 1, 1)
    scales = torch.arange(256, dtype=torch.uint8).reshape(1, 256, 1).repeat(1, 1, 16)
    tensor = stored({"X_blocks": blocks, "X_scales": scales}, Mxfp4())["X"]
    np.testing.assert_array_equal(bits(tensor.read()), bits(convert_moe_packed_tensors(blocks, scales)))


@settings(max_examples=25, deadline=None)
@given(
    seed=SEEDS,
    lead=st.sampled_from([(), (3,)]),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    block=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_fp8_in_whole_blocks_is_what_transformers_makes_of_it(stored, seed, lead, grid, block, dtype):
    shape = (*lead, grid[0] * block[0], grid[1] * block[1])
    parts = fp8(ATTENTION, seed, shape, block, dtype)
    (tensor,) = stored(parts, Fp8(block)).values()
    assert (tensor.name, tensor.shape) == (ATTENTION, shape)
    expected = Fp8Dequantize(None)._dequantize_one(*parts.values(), output_dtype=torch.bfloat16)
    np.testing.assert_array_equal(bits(tensor.read()), bits(expected))
    assert_parts_are_the_whole(tensor)


@settings(max_examples=25, deadline=None)
@given(
    seed=SEEDS,
    lead=st.sampled_from([(), (2,)]),
    N=st.integers(1, 40),
    K=st.integers(1, 40),
    block=st.tuples(st.integers(1, 50), st.integers(1, 50)),
)
def test_the_last_blocks_of_fp8_may_be_partial(stored, seed, lead, N, K, block):
    parts = fp8(ATTENTION, seed, (*lead, N, K), block)
    codes, scale = (part.float().numpy() for part in parts.values())
    expected = codes * scale.repeat(block[0], -2)[..., :N, :].repeat(block[1], -1)[..., :K]
    tensor = stored(parts, Fp8(block))[ATTENTION]
    np.testing.assert_array_equal(bits(tensor.read()), bits(expected.astype(ml_dtypes.bfloat16)))
    assert_parts_are_the_whole(tensor)


@settings(max_examples=25, deadline=None)
@given(
    seed=SEEDS,
    N=st.integers(1, 130),
    groups=st.integers(1, 4),
    group=st.sampled_from([8, 24, 32]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_int4_is_each_integer_times_the_factor_of_its_group(stored, seed, N, groups, group, dtype):
    parts = int4(ATTENTION, seed, N, groups, group, dtype)
    (tensor,) = stored(parts, Int4(group)).values()
    assert (tensor.name, tensor.shape) == (ATTENTION, (N, groups * group))
    codes = np.random.default_rng(seed).integers(-8, 8, (N, groups, group))
    exact = codes * parts[f"{ATTENTION}_scale"].double().numpy()[..., None]
    expected = exact.astype(np.float32).astype(ml_dtypes.bfloat16).reshape(N, -1)
    np.testing.assert_array_equal(bits(tensor.read()), bits(expected))
    assert_parts_are_the_whole(tensor)


def test_int4_reads_the_earlier_code_from_the_lower_bits(stored):
    parts = {
        "w.weight_packed": torch.tensor([[0x76543210]], dtype=torch.int32),
        "w.weight_scale": torch.tensor([[0.5]], dtype=torch.bfloat16),
        "w.weight_shape": torch.tensor([1, 8]),
    }
    values = stored(parts, Int4(8))["w.weight"].read().astype(np.float32)
    assert values.tolist() == [[-4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_plain_tensors_keep_name_shape_dtype_and_values(stored, dtype):
    plain = {"a": torch.randn(3, 4).to(dtype), "scalar": torch.tensor(2.0).to(dtype)}
    tensors = stored(plain | mxfp4("X", 0, 1, 2, 1), Mxfp4())
    assert set(tensors) == {"a", "scalar", "X"}
    assert not tensors["a"].is_encoded and tensors["X"].is_encoded
    for name, value in plain.items():
        assert tensors[name].dtype == tensors[name].read().dtype
        np.testing.assert_array_equal(tensors[name].read().astype(np.float32), value.float().numpy())
    np.testing.assert_array_equal(tensors["a"].part(1), tensors["a"].read()[1])


def test_a_checkpoint_without_codes_is_the_same_with_and_without_an_encoding(stored):
    plain = {"b": torch.randn(2, 2), "a": torch.randn(3)}
    assert stored(plain, None) == stored(plain, Fp8((128, 128)))


def test_tensors_keep_the_order_of_their_entries_and_tell_the_bytes_of_all_their_parts(tmp_path):
    save_file({"a": torch.zeros(3), "z": torch.zeros(5)} | mxfp4("m", 0, 1, 2, 3), tmp_path / "file")
    entries = read_header(tmp_path / "file")
    order = ("z", "m_scales", "m_blocks", "a")
    tensors = stored_tensors({name: entries[name] for name in order}, Mxfp4())
    assert [(name, tensor.name, tensor.nbytes) for name, tensor in tensors.items()] == [
        ("z", "z", 20),
        ("m", "m", 96 + 6),
        ("a", "a", 12),
    ]
    assert [source.name for source in tensors["m"].sources] == ["m_blocks", "m_scales"]


ENCODED = {
    "mxfp4": (mxfp4("X", 0, 4, 64, 8), Mxfp4()),
    "fp8": (fp8("X", 0, (4, 128, 256), (128, 128)), Fp8((128, 128))),
    "int4": (int4("X", 0, 256, 64, 32), Int4(32)),
    "plain": ({"X": torch.zeros(4, 128, 256)}, None),
}


@pytest.mark.parametrize("kind", ENCODED)
def test_a_part_reads_its_own_bytes_alone(stored, monkeypatch, kind):
    tensor = stored(*ENCODED[kind])["X"]
    read = []
    blocks = TensorEntry.blocks
    monkeypatch.setattr(TensorEntry, "blocks", lambda entry, size: read.append(entry.nbytes) or blocks(entry, size))
    tensor.part(2)
    own = sum(source.nbytes // tensor.shape[0] for source in tensor.sources if not source.name.endswith("_shape"))
    assert sum(read) == own + (8 if kind == "int4" else 0)


@pytest.mark.parametrize(
    ("parts", "encoding"),
    [
        (mxfp4("X", 0, 2, 2048, 32), Mxfp4()),
        (fp8("X", 0, (2, 1024, 1024), (128, 128)), Fp8((128, 128))),
    ],
    ids=["mxfp4", "fp8"],
)
def test_a_part_needs_little_memory_besides_itself(stored, parts, encoding):
    tensor = stored(parts, encoding)["X"]
    tensor.part(0)  # makes the table of values
    tracemalloc.start()
    part = tensor.part(1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * part.nbytes


def changed(parts: dict[str, torch.Tensor], **changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """`parts` with those of the given suffixes replaced, or left out where None."""
    parts = parts | {f"X{suffix}": value for suffix, value in changes.items() if value is not None}
    return {name: value for name, value in parts.items() if changes.get(name.removeprefix("X"), value) is not None}


MX, F8, I4 = mxfp4("X", 0, 2, 8, 3), fp8("X", 0, (5, 9), (4, 4)), int4("X", 0, 3, 2, 16)
WRONG_PARTS = [
    (MX, None, r"tensor 'X_blocks' in .*safetensors is stored as U8: expected quant_method 'mxfp4' in .*, got none\."),
    (F8, Mxfp4(), r"tensor 'X' in .* is stored as F8_E4M3: expected quant_method 'fp8' in .*, got 'mxfp4'\."),
    (I4, Fp8((4, 4)), r"tensor 'X_packed' .* expected quant_method 'compressed-tensors' in .*, got 'fp8'\."),
    (changed(MX, _scales=None), Mxfp4(), "tensor 'X_blocks' in .*: expected tensor 'X_scales' beside it, which .* lacks"),
    (changed(F8, _scale_inv=None), Fp8((4, 4)), "tensor 'X' in .*: expected tensor 'X_scale_inv' beside it"),
    (changed(I4, _scale=None), Int4(16), "tensor 'X_packed' in .*: expected tensor 'X_scale' beside it"),
    (changed(I4, _shape=None), Int4(16), "tensor 'X_packed' in .*: expected tensor 'X_shape' beside it"),
    (
        changed(MX, _scales=torch.zeros(2, 8, 4, dtype=torch.uint8)),
        Mxfp4(),
        r"'X_scales' .* U8 \[2, 8, 3\], got U8 \[2, 8, 4\]",
    ),
    (changed(MX, _scales=torch.zeros(2, 8, 3)), Mxfp4(), r"'X_scales' in .*: expected U8 \[2, 8, 3\], got F32 \[2, 8, 3\]"),
    (
        changed(MX, _blocks=torch.zeros(2, 8, 3, 8, dtype=torch.uint8)),
        Mxfp4(),
        r"'X_blocks' in .*: expected U8 \[experts, rows, blocks, 16\], got U8 \[2, 8, 3, 8\]",
    ),
    (changed(F8, _scale_inv=torch.zeros(3, 2)), Fp8((4, 4)), r"'X_scale_inv' .* F32 or BF16 \[2, 3\], got F32 \[3, 2\]"),
    (changed(F8, _scale_inv=torch.tensor(1.0)), Fp8((4, 4)), r"'X_scale_inv' .* F32 or BF16 \[2, 3\], got F32 \[\]"),
    (changed(F8, _scale_inv=torch.zeros(2, 3).half()), Fp8((4, 4)), r"F32 or BF16 \[2, 3\], got F16 \[2, 3\]"),
    (F8, Fp8((8, 4)), r"'X_scale_inv' .* expected F32 or BF16 \[1, 3\], got F32 \[2, 3\]"),
    (fp8("X", 0, (1, 1, 5, 9), (4, 4)), Fp8((4, 4)), r"expected F8_E4M3 of 2 or 3 axes, got F8_E4M3 \[1, 1, 5, 9\]"),
    (changed(I4, _scale=torch.zeros(3, 4).bfloat16()), Int4(16), r"'X_scale' .* F32 or BF16 \[3, 2\], got BF16 \[3, 4\]"),
    (
        I4,
        Int4(24),
        r"'X_packed' .*: expected I32 \[rows, columns / 8\], with columns a multiple of group_size=24, got I32 \[3, 4\]",
    ),
    (changed(I4, _shape=torch.zeros(3, dtype=torch.int64)), Int4(16), r"'X_shape' .* expected I32 or I64 \[2\], got I64 \[3\]"),
    (changed(I4, _zero_point=torch.zeros(3, 2)), Int4(16), "'X_zero_point' in .*: expected none, since .* symmetric"),
    (changed(I4, _g_idx=torch.zeros(32)), Int4(16), "'X_g_idx' in .*: expected none, since .* in order"),
    (MX | {"X": torch.zeros(2)}, Mxfp4(), "holds tensor 'X' twice, plain and quantised"),
]


@pytest.mark.parametrize(("parts", "encoding", "text"), WRONG_PARTS)
def test_parts_that_do_not_belong_together_are_refused_by_name(stored, monkeypatch, parts, encoding, text):
    monkeypatch.setattr(TensorEntry, "read_bytes", lambda entry: pytest.fail("nothing need be read to tell"))
    with pytest.raises(UnprocessableEntityError, match=text) as error:
        stored(parts, encoding)
    assert len(str(error.value)) < 600


def test_a_shape_that_the_codes_do_not_have_is_refused_when_it_is_read(stored):
    tensor = stored(changed(I4, _shape=torch.tensor([32, 3])), Int4(16))["X"]
    with pytest.raises(UnprocessableEntityError, match=r"'X_shape' .*: expected \[3, 32\], the shape of what 'X_packed' holds"):
        tensor.read()


def test_scales_of_other_things_stay_plain_tensors(stored):
    tensors = stored(I4 | {"attn.k_scale": torch.ones(1), "ids": torch.arange(3)}, Int4(16))
    assert set(tensors) == {"X", "attn.k_scale", "ids"}
    with pytest.raises(UnsupportedError, match=r"'ids' in .* is stored as I64; supported are F32, F16, BF16"):
        tensors["ids"].read()


@pytest.mark.parametrize("dtype", ["U8", "I8", "I32", "I64", "F8_E4M3"])
def test_a_part_of_a_quantised_weight_has_the_bytes_that_its_shape_needs(tmp_path, dtype):
    header = f'{{"X":{{"dtype":"{dtype}","shape":[3],"data_offsets":[0,7]}}}}'.encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(7))
    with pytest.raises(StorageError, match=rf"tensor 'X' has bytes 0 to 7 for shape \[3\] of '{dtype}'"):
        read_header(file)


@pytest.mark.parametrize("kind", ENCODED)
def test_a_file_damaged_at_random_gives_no_raw_error(tmp_path, kind):
    parts, encoding = ENCODED[kind]
    file = tmp_path / "model.safetensors"
    save_file(parts, file)
    rng = random.Random(5)
    header = file.read_bytes()[: 8 + int.from_bytes(file.read_bytes()[:8], "little")]
    for _ in range(40):
        with damaged(rng, file, []):
            if rng.random() < 0.5:  # a few bytes among many: half of the damage goes there
                data = bytearray(header)
                data[rng.randrange(8, len(data))] = rng.randrange(32, 127)
                file.write_bytes(data + bytes(sum(part.nbytes for part in parts.values())))
            try:
                for tensor in stored_tensors(read_header(file), encoding).values():
                    tensor.read()
            except TinkerError as error:
                assert len(str(error)) < 1000


def test_rows_of_an_entry_lie_where_the_whole_entry_has_them(tmp_path):
    save_file({"a": torch.zeros(2), "b": torch.arange(24.0).reshape(4, 3, 2)}, tmp_path / "file")
    entry = read_header(Path(tmp_path / "file"))["b"]
    assert entry.rows(1, 3).shape == (2, 3, 2)
    np.testing.assert_array_equal(entry.rows(1, 3).read(), entry.read()[1:3])
    assert entry.rows(2, 2).read().shape == (0, 3, 2)


INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "actorder": None}


def compressed(weights: object = INT4, **changes: object) -> dict:
    """As Kimi-K2-Thinking has it."""
    group = {"input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": weights}
    section = {"config_groups": {"group_0": group}, "format": "pack-quantized", "ignore": ["lm_head", "re:.*self_attn.*"]}
    return (
        {"quant_method": "compressed-tensors", "quantization_status": "compressed", "kv_cache_scheme": None} | section | changes
    )


DEEPSEEK = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
GPT_OSS = {"modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"], "quant_method": "mxfp4"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        ({"quantization_config": None}, None),
        ({"text_config": {}}, None),
        ({"quantization_config": GPT_OSS}, Mxfp4()),
        ({"quantization_config": DEEPSEEK}, Fp8((128, 128))),
        ({"quantization_config": DEEPSEEK | {"scale_fmt": "ue8m0", "weight_block_size": [64, 32]}}, Fp8((64, 32))),
        ({"quantization_config": {"quant_method": "fp8"}}, Fp8((128, 128))),
        ({"quantization_config": compressed()}, Int4(32)),
        ({"text_config": {"quantization_config": compressed()}}, Int4(32)),
    ],
)
def test_the_encoding_is_what_config_json_announces(config, expected):
    assert quantization(config) == expected


def groups(**weights: object) -> dict:
    return compressed(INT4 | weights)


ONLY = r"is not supported; only {} is\. Use the model's bf16 checkpoint"
UNSUPPORTED = [
    (
        {"quant_method": "awq"},
        "quant_method='awq' is not supported; supported are mxfp4, fp8 in blocks, and compressed-tensors",
    ),
    ({"quant_method": "gptq"}, r"quant_method='gptq' .* Use the model's bf16 checkpoint"),
    ({"load_in_4bit": True}, "quant_method=None is not supported"),
    ({"quant_method": "x" * 10_000}, "quant_method='x+… is not supported"),
    (DEEPSEEK | {"fmt": "e5m2"}, "fmt='e5m2' " + ONLY.format("'e4m3'")),
    (DEEPSEEK | {"weight_block_size": None}, r"weight_block_size=None \(one scale for all of a tensor\) is not supported"),
    (groups(num_bits=8), r"config_groups\.group_0\.weights\.num_bits=8 " + ONLY.format("4")),
    (groups(type="float"), "type='float' " + ONLY.format("'int'")),
    (groups(symmetric=False), "symmetric=False " + ONLY.format("True")),
    (groups(strategy="channel"), "strategy='channel' " + ONLY.format("'group'")),
    (groups(actorder="group"), "actorder='group' " + ONLY.format("None")),
    (groups(group_size=12), "group_size=12 is not supported; only multiples of 8 are"),
    (compressed(format="nvfp4-pack-quantized"), "group_0: format='nvfp4-pack-quantized' " + ONLY.format("'pack-quantized'")),
    (compressed(config_groups={"a": {}, "b": {}}), r"config_groups: 2 groups \(\['a', 'b'\]\) are not supported; only one is"),
    (compressed(transform_config={"config_groups": {"R1": {}}}), "transform_config is not supported"),
    (compressed(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config is not supported"),
]


@pytest.mark.parametrize(("section", "text"), UNSUPPORTED)
def test_an_encoding_that_cannot_be_read_is_refused_by_name(section, text):
    with pytest.raises(UnsupportedError, match=rf"^config\.json: quantization_config.*{text}") as error:
        quantization({"quantization_config": section})
    assert len(str(error.value)) < 600


MALFORMED = [
    ("mxfp4", "quantization_config: expected an object, got str 'mxfp4'"),
    (DEEPSEEK | {"weight_block_size": 128}, "weight_block_size: expected a list of two integers, got int 128"),
    (DEEPSEEK | {"weight_block_size": [128]}, r"weight_block_size: expected a list of two integers, got list \[128\]"),
    (DEEPSEEK | {"weight_block_size": [0, 128]}, "weight_block_size: expected an integer >= 1 and <= 2147483647, got int 0"),
    (compressed(config_groups=None), "config_groups: expected an object, got NoneType None"),
    (compressed(config_groups={"g": 3}), "config_groups.g: expected an object, got int 3"),
    (compressed(weights=None), "config_groups.group_0.weights: expected an object, got NoneType None"),
    (groups(group_size=None), "group_size: expected an integer >= 1 and <= 2147483647, got NoneType None"),
]


@pytest.mark.parametrize(("section", "text"), MALFORMED)
def test_a_field_of_the_wrong_kind_is_refused_by_name(section, text):
    with pytest.raises(BadRequestError, match=rf"^config\.json: quantization_config.*{text}|^config\.json: {text}"):
        quantization({"quantization_config": section})


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["fp8", "compressed-tensors", "mxfp4", "x"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["quant_method", "weight_block_size", "fmt", "config_groups", "weights", "format", "group_size"]
                ),
                inner,
            )
        ),
    )
)
def test_no_config_gives_a_raw_error(section):
    try:
        quantization({"quantization_config": section})
    except TinkerError as error:
        assert len(str(error)) < 600
