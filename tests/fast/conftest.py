import pytest
from small_models import GRADIENT, OUTPUT


@pytest.fixture
def same_step(compare):
    """same_step(got, expected, what): asserts that two results of `step` agree as float32 computations do."""

    def check(got: dict, expected: dict, what: str = "") -> None:
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            limit = GRADIENT if name.startswith("gradient") else OUTPUT
            assert got[name].dtype == value.dtype, f"{what} {name}"
            compare("eager", got[name], value, limit, f"{what} {name}")

    return check
