"""The suite's run-time checks of types refuse what the import hook's own would refuse."""

import typing
from dataclasses import dataclass

import pytest
from beartype import beartype
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float, Float32, TypeCheckError
from torch import Tensor, ones

from shape_types import checked, names_shapes

Rows: typing.TypeAlias = Float32[Tensor, "T D"]


def count(text: str) -> int:
    return len(text) if text else typing.cast(int, "none")


def added(left_TD: Float[Tensor, "T D"], right_TD: Rows) -> Float[Tensor, "T D"]:
    return left_TD[:1] if len(left_TD) == 3 else left_TD + right_TD


def in_a_list(rows: list[Rows], k: int | None = None) -> None: ...


def in_a_string(rows: "list[Rows]") -> None: ...


def test_a_plain_function_is_held_to_its_parameters_and_its_result():
    function = checked(count, beartype)
    assert function("abc") == 3
    for wrong in (3, ""):
        with pytest.raises(BeartypeCallHintViolation):
            function(wrong)


def test_shapes_agree_between_parameters_and_result():
    function = checked(added, beartype)
    assert function(ones(2, 4), ones(2, 4)).shape == (2, 4)
    for left, right in ((2, 1), (3, 3)):
        with pytest.raises(TypeCheckError):
            function(ones(left, 4), ones(right, 4))


@pytest.mark.parametrize("function", [added, in_a_list, in_a_string])
def test_shapes_are_found_wherever_an_annotation_holds_them(function):
    assert names_shapes(function)
    assert not names_shapes(count)


def test_a_dataclass_is_held_to_its_fields():
    @dataclass
    class Row:
        x_TD: Rows
        y_TD: Rows

    held = checked(Row, beartype)
    held(ones(2, 4), ones(2, 4))
    with pytest.raises(TypeCheckError):
        held(ones(2, 4), ones(3, 4))
