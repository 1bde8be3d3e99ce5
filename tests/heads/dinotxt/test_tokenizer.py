from __future__ import annotations

import functools
import gzip
import logging
import random
import sys
from pathlib import Path

import pytest
from open_clip.tokenizer import SimpleTokenizer

from dinov3.heads.dinotxt.tokenizer import Tokenizer

START, END = 49406, 49407


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer()


def test_ids_equal_those_of_open_clip_on_random_texts() -> None:
    theirs, draw = SimpleTokenizer(), random.Random(0)
    ranges = [(0x20, 0x7F), (0x20, 0x7F), (0xA0, 0x250), (0x370, 0x600), (0x900, 0xE00), (0x3040, 0xA000), (0, 0x30000)]
    for _ in range(10_000):
        codes = [draw.randrange(*draw.choice(ranges)) for _ in range(draw.randrange(1, 12))]
        text = "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)
        assert tokenizer().encode(text) == theirs.encode(text), repr(text)


def test_special_tokens_in_a_text() -> None:
    assert tokenizer().encode("a<|EndOfText|>") == [320, END]
    ordinary = tokenizer().encode("a<|endoftext|>", allow_special=False)
    assert END not in ordinary and tokenizer().decode(ordinary) == "a <| endoftext |> "
    assert not {START, END} & set(tokenizer().encode("<end_of_text> <start_of_text>"))
    assert tokenizer().tokenize(["<|startoftext|>"], 5, allow_special=False)[0].tolist().count(START) == 1


def test_a_text_that_is_too_long(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "dinov3"):
        ids = tokenizer().tokenize(["a dog", "a photo of a dog"], 4)
    assert ids.tolist() == [[START, 320, 1929, END], [START, 320, 1125, END]]
    assert "1 of 2 texts are cut to 4 tokens: text 1 ('a photo of a dog'...) has 7 tokens" in caplog.text
    with pytest.raises(ValueError, match="1 of 2 texts exceed context_length=4: text 1"):
        tokenizer().tokenize(["a dog", "a photo of a dog"], 4, truncate=False)


def test_inputs_that_are_not_texts() -> None:
    assert tokenizer().tokenize([]).shape == (0, 77)
    assert tokenizer().tokenize("", 3).tolist() == [[START, END, 0]]
    with pytest.raises(ValueError, match="context_length=0"):
        tokenizer().tokenize("a", 0)
    with pytest.raises(TypeError, match="expected a text, got 3"):
        tokenizer().tokenize(["a", 3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="49408 is not a token id"):
        tokenizer().decode([49408])


def test_vocabularies_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no vocabulary at .*missing\.gz"):
        Tokenizer(tmp_path / "missing.gz")
    for name, content in (
        ("page.gz", b"<html>"),
        ("short.gz", gzip.compress(b"header\ni n\n")),
        ("cut.gz", gzip.compress(b"header\ni n\n" * 999)[:30]),
        ("binary.gz", gzip.compress(b"\xff\xfe")),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is not a vocabulary of 49408 tokens"):
            Tokenizer(tmp_path / name)
        with (tmp_path / name).open("rb") as file, pytest.raises(ValueError, match="is not a vocabulary"):
            Tokenizer(file)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip.tokenizer", None)
    with pytest.raises(ModuleNotFoundError, match="pip install open_clip_torch"):
        Tokenizer()
