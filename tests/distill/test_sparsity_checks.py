from __future__ import annotations

import pytest

from distill.config import ConfigError
from distill.sparsity_checks import check_sparse
from distill.student_config import Sparsity
from tests.families import factored_config, tiny_config


def test_a_matrix_that_is_not_known_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"student.sparsity.method=wanda does not know .*dense.weight in the layers of phi "
    ):
        check_sparse(Sparsity(method="wanda"), tiny_config("phi"))
    check_sparse(Sparsity(), tiny_config("phi"))


@pytest.mark.parametrize("family", ["llama", "glm4", "gemma2", "starcoder2", "phi3"])
def test_families_whose_matrices_are_known(family: str) -> None:
    check_sparse(Sparsity(method="magnitude"), tiny_config(family))


def test_factors_are_not_held() -> None:
    with pytest.raises(
        ConfigError, match="student.sparsity.method=magnitude holds weights of dense linears, but the student"
    ):
        check_sparse(Sparsity(method="magnitude"), factored_config("llama", {"mlp.up_proj": 8}))
