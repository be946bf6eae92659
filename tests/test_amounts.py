import pytest

from stages.amounts import parse_bytes
from stages.errors import RecipeError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1.1GB", 1_100_000_000),
        ("900MB", 900_000_000),
        ("850MiB", 850 * 1024 * 1024),
        ("1.5 gib", 3 * 1024**3 // 2),
        ("12345", 12345),
        (".5kb", 500),
    ],
)
def test_sizes_as_people_write_them(text: str, expected: int) -> None:
    assert parse_bytes(text, "--target_size") == expected


@pytest.mark.parametrize("text", ["", "big", "1.1.1GB", "-3MB", "4XB", "0MB", "MB"])
def test_what_is_no_size_is_refused_by_the_options_name(text: str) -> None:
    with pytest.raises(RecipeError, match="--target_size"):
        parse_bytes(text, "--target_size")
