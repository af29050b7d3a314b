"""Names with options, as people type them."""

from __future__ import annotations

import pytest

from dalle_zoo.specs import format_spec, parse_spec


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("ddp", "ddp", {}),
        (" ddp() ", "ddp", {}),
        ("hsdp_powersgd(rank=896,shard_size=8)", "hsdp_powersgd", {"rank": 896, "shard_size": 8}),
        ("shift( by = -2 )", "shift", {"by": -2}),
    ],
)
def test_specs_are_read(text: str, name: str, options: dict[str, int]) -> None:
    assert parse_spec(text) == (name, options)
    assert parse_spec(format_spec(name, options)) == (name, options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "",
            r"a strategy is written 'name' or 'name\(option=integer, ...\)', such as 'hsdp' or 'hsdp\(shard_size=8\)'",
        ),
        ("hsdp(8)", "an option of 'hsdp' is written 'option=integer', such as 'shard_size=8', got '8'"),
        ("hsdp(rank=a)", "got 'rank=a' in"),
        ("hsdp(rank=1, rank=2)", "option 'rank' is given twice in .*: remove one"),
        ("hsdp(rank=1", "a strategy is written"),
    ],
)
def test_other_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_spec(text, "strategy", "hsdp(shard_size=8)")
