"""Inputs from text and from files; what is wrong repeats what was typed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bnify.errors import SpecError, UsageError
from bnify.spec import parse_inputs, read_input_file


@pytest.mark.parametrize(
    ("item", "shape", "dtype", "low", "high"),
    [
        ("1,3,8,8", (1, 3, 8, 8), torch.float32, -6, 6),
        ("500", (500,), torch.float32, -6, 6),
        ("2,3:float64", (2, 3), torch.float64, -6, 6),
        ("2,3:bfloat16@normal", (2, 3), torch.bfloat16, -6, 6),
        ("500@uniform(2,3.5)", (500,), torch.float32, 2, 3.5),
        ("500@uniform(-1e-3, 1e-3)", (500,), torch.float32, -1e-3, 1e-3),
        ("500@int(0,30522)", (500,), torch.int64, 0, 30521),
        ("500:uint8@int(0,256)", (500,), torch.uint8, 0, 255),
        ("500:float32@int(0,9)", (500,), torch.float32, 0, 8),
        ("500:int32", (500,), torch.int32, 0, 1),
        ("500:bool", (500,), torch.bool, 0, 1),
        ("4@ones", (4,), torch.float32, 1, 1),
        ("4:bool@zeros", (4,), torch.bool, 0, 0),
        (" 2, 3 ", (2, 3), torch.float32, -6, 6),
        ("()@ones", (), torch.float32, 1, 1),
    ],
)
def test_each_form(item, shape, dtype, low, high):
    call = parse_inputs([item])
    (tensor,) = call.args
    assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
    assert low <= float(tensor.min()) <= float(tensor.max()) <= high


def test_a_range_is_used_up_to_its_end():
    (ids,) = parse_inputs(["500@int(3,5)"]).args
    assert set(ids.tolist()) == {3, 4}


def test_named_inputs_are_keywords_and_draws_differ():
    call = parse_inputs(["ids=2,8@int(0,9)", "2,8", "mask=2,8:bool@ones", "2,8"])
    assert list(call.kwargs) == ["ids", "mask"]
    assert len(call.args) == 2
    assert not torch.equal(*call.args)


def test_the_seed_decides():
    first, same, other = (parse_inputs(["9"], seed=seed).args[0] for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_complex_values():
    assert parse_inputs(["3:complex64"]).args[0].is_complex()


@pytest.mark.parametrize(
    ("item", "fragment", "hint"),
    [
        ("", "no list of sizes", "write [NAME=]"),
        ("a,b", "no list of sizes", "write"),
        ("1,,3", "no list of sizes", "write"),
        ("1,-3", "no list of sizes", "write"),
        ("1x3", "no list of sizes", "write"),
        ("1,0", "size of 0", "1 or more"),
        ("1,3:float31", "unknown dtype 'float31'", "float32, float64, float16"),
        ("1,3:", "unknown dtype ''", "known are"),
        ("1,3@gauss", "unknown values 'gauss'", "write"),
        ("1,3@", "unknown values ''", "write"),
        ("1,3@int(5)", "unknown values", "write"),
        ("1,3@int(0,x)", "two numbers", "write"),
        ("1,3@int(0,1.5)", "two numbers", "write"),
        ("1,3@int(5,5)", "empty range", "larger"),
        ("1,3@uniform(1,nan)", "empty range", "larger"),
        ("1,3:int64@normal", "normal values are no int64", "@int"),
        ("1,3:uint8@int(0,300)", "uint8 holds 0 to 255", "write"),
        ("1,3:bool@int(0,3)", "bool holds 0 to 1", "write"),
        ("my input=1,3", "'my input' is no argument name", "write"),
        ("=1,3", "'' is no argument name", "write"),
        ("1000000,1000000,1000000", "do not fit in memory", "write"),
        ("99999999999999999999999,2", "do not fit in memory", "write"),
    ],
)
def test_what_cannot_be_right(item, fragment, hint):
    with pytest.raises(UsageError) as caught:
        parse_inputs([item])
    assert f"--input {item}" in caught.value.message
    assert fragment in caught.value.message
    assert hint in caught.value.hint


def test_names_given_twice_and_nothing_at_all():
    with pytest.raises(UsageError, match="x is given twice"):
        parse_inputs(["x=1", "x=2"])
    with pytest.raises(UsageError, match="no input"):
        parse_inputs([])


# -- files ---------------------------------------------------------------------------------------


def test_npz_names_and_numbers(tmp_path):
    a, b, ids = np.ones((2, 3), np.float32), np.zeros((2,), ">f8"), np.arange(4)
    np.savez(tmp_path / "x.npz", a, b, ids=ids)
    call = read_input_file(tmp_path / "x.npz")
    assert [tuple(t.shape) for t in call.args] == [(2, 3), (2,)]
    assert call.args[1].dtype == torch.float64
    assert call.kwargs["ids"].tolist() == [0, 1, 2, 3]


def test_safetensors_positions_are_numbers_not_letters(tmp_path):
    tensors = {str(i): torch.full((1,), float(i)) for i in range(11)}
    save_file(tensors | {"mask": torch.ones(2, dtype=torch.bool)}, tmp_path / "x.safetensors")
    call = read_input_file(tmp_path / "x.safetensors")
    assert [float(t) for t in call.args] == list(range(11))
    assert call.kwargs["mask"].dtype == torch.bool


def test_a_scalar_keeps_its_shape(tmp_path):
    np.savez(tmp_path / "x.npz", t=np.float32(3))
    assert read_input_file(tmp_path / "x.npz").kwargs["t"].shape == ()


@pytest.mark.parametrize(
    ("arrays", "fragment"),
    [
        ({"x": np.array([object()])}, "cannot be read"),
        ({"x": np.array(["text"])}, "not of numbers"),
        ({"0": np.ones(1), "2": np.ones(1)}, "0, 2, with a gap"),
        ({"0": np.ones(1), "arr_0": np.ones(1)}, "two arrays are number 0"),
        ({"a b": np.ones(1)}, "'a b' is no argument name"),
        ({}, "holds no array"),
    ],
)
def test_files_that_hold_no_inputs(tmp_path, arrays, fragment):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(SpecError, match=fragment):
        read_input_file(tmp_path / "x.npz")


@pytest.mark.parametrize("name", ["x.npz", "x.safetensors"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"\x00" * 40])
def test_damaged_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SpecError, match="cannot be read"):
        read_input_file(tmp_path / name)


def test_missing_files_and_other_suffixes(tmp_path):
    with pytest.raises(SpecError, match="no such file"):
        read_input_file(tmp_path / "gone.npz")
    with pytest.raises(UsageError, match="unknown suffix"):
        read_input_file(tmp_path / "x.csv")
