from __future__ import annotations

from unittest import mock

import pytest
import torch

from distill.head import Head, HeadProducts, row_blocks
from parallel.mesh import Axis
from tests.distill.loss_cases import Case, plain_loss, sharded_loss


@pytest.mark.parametrize("half_products", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(dtype: torch.dtype, half_products: bool) -> None:
    """Errors are those of rounding the inputs' products (if so multiplied) and the hidden gradient, no more."""
    case = Case(bias=True, vocab=301, student_width=32, teacher_width=48)
    tensors = case.tensors(dtype)
    tensors |= {name: tensors[name] * 0.3 for name in ("weight", "teacher_weight")}
    expected = plain_loss(case, tensors, 10)
    with mock.patch("distill.head._product_dtype", lambda weight, wide: dtype if half_products else wide):
        found = sharded_loss(case, tensors, Axis("tp"), 10)
    assert found["grad_hidden"].dtype == dtype
    assert found["grad_weight"].dtype == torch.float32
    for name in expected:
        exact_name = not half_products and name != "grad_hidden"
        limit = 1e-5 if exact_name else 2e-2
        distance = (found[name].double() - expected[name]).norm() / expected[name].norm()
        assert distance < limit, (name, distance)


def test_a_converted_head_gives_the_products_of_the_whole() -> None:
    """2,000 rows of 300 are more than one block in float32."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2000, 300, generator=generator).bfloat16()
    hidden, grad = torch.randn(3, 300, generator=generator), torch.randn(3, 2000, generator=generator)
    with mock.patch("distill.head._product_dtype", lambda weight, wide: wide):
        products = HeadProducts(Head(weight), torch.float32)
    logits, target = torch.empty(3, 2000), torch.ones(2000, 300)
    products.logits_(hidden, logits)
    products.add_weight_gradient_(target, grad, hidden)
    wide = weight.float()
    torch.testing.assert_close(logits, hidden @ wide.T, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(products.hidden_gradient(grad), grad @ wide, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(target, 1 + grad.T @ hidden, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("num_rows", [0, 1, 7, 100])
@pytest.mark.parametrize("row_bytes", [0, 1, 1 << 19, 1 << 30])
def test_row_blocks_cover_every_row_once(num_rows: int, row_bytes: int) -> None:
    assert [row for rows in row_blocks(num_rows, row_bytes) for row in range(num_rows)[rows]] == list(
        range(num_rows)
    )
