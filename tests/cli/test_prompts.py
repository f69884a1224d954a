"""Prompts, one per line."""

import pytest

from raas_jax.cli.prompts import parse_line


@pytest.mark.parametrize(
    ("line", "prompt"),
    [
        ("How many?", "How many?"),
        ('"How\\nmany?"', "How\nmany?"),
        ('"Yes", he said', '"Yes", he said'),
        ('{"prompt": "x"}', "x"),
        ('{"prompt": [1, 2], "id": 7}', [1, 2]),
        (
            '{"messages": [{"role": "user", "content": "x"}]}',
            [{"role": "user", "content": "x"}],
        ),
        ("[1, 2]", "[1, 2]"),
    ],
)
def test_a_line_is_text_or_json(line, prompt):
    assert parse_line(line, "here") == prompt


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{not json", "not valid JSON"),
        ("{}", 'give one of "prompt" and "messages"'),
        ('{"prompt": "x", "messages": []}', 'give one of "prompt" and "messages"'),
        ('{"prompt": 3}', "expected text or a list of token ids"),
        ('{"prompt": [true]}', "expected text or a list of token ids"),
        ('{"messages": "x"}', '"messages" must be a list'),
        ('{"messages": [{"role": "user"}]}', '"messages" must be a list'),
    ],
)
def test_a_bad_line_is_named(line, said):
    with pytest.raises(ValueError, match="file, line 3") as caught:
        parse_line(line, "file, line 3")
    assert said in str(caught.value)
