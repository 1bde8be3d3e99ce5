"""The tokenizer of dino.txt: CLIP's byte-pair encoding of lower-cased text, as the package open_clip_torch has it.

Only the spelling of the special tokens differs from that package's: `<|startoftext|>` and `<|endoftext|>`.
"""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

logger = logging.getLogger("dinov3")

N_TOKENS = 49408
CONTEXT_LENGTH = 77
START, END = "<|startoftext|>", "<|endoftext|>"
#: Words whose pieces are remembered.
_CACHE_SIZE = 100_000


class Tokenizer:
    """Text to token ids, and back.

    Attributes:
        encoder: the id of each token, as a string of byte symbols.
        decoder: the token of each id.

    Args:
        vocab_path: a file of merges like `bpe_simple_vocab_16e6.txt.gz`, or one that is open for reading bytes.
            Default: the one in the package open_clip_torch, which is the published one.

    Raises:
        ModuleNotFoundError: open_clip_torch is missing.
        FileNotFoundError: there is no such file.
        ValueError: the file is not a vocabulary.
    """

    def __init__(self, vocab_path: str | os.PathLike[str] | BinaryIO | None = None) -> None:
        try:
            import regex
            from open_clip.tokenizer import SimpleTokenizer
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"the tokenizer of dino.txt needs the package {error.name}: pip install open_clip_torch",
                name=error.name,
            ) from error
        if isinstance(vocab_path, str | os.PathLike):
            vocab_path = str(Path(vocab_path).expanduser())
        try:
            bpe = SimpleTokenizer() if vocab_path is None else SimpleTokenizer(bpe_path=vocab_path)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"no vocabulary at {vocab_path}: there is no such file") from error
        except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
            raise ValueError(_not_a_vocabulary(vocab_path)) from error
        if len(bpe.encoder) != N_TOKENS or any(len(merge) != 2 for merge in bpe.bpe_ranks):
            raise ValueError(_not_a_vocabulary(vocab_path))
        self._bpe: Any = bpe
        for token, theirs in ((START, bpe.sot_token_id), (END, bpe.eot_token_id)):
            del bpe.encoder[bpe.decoder[theirs]]
            bpe.encoder[token], bpe.decoder[theirs] = theirs, token
        self._special = {token: token for token in (START, END)}
        special_or = "|".join(regex.escape(token) for token in self._special) + "|"
        ordinary = bpe.pat.pattern.split("|", 2)[2]  # what follows the package's own two special tokens
        self._patterns = {
            allow_special: regex.compile((special_or if allow_special else "") + ordinary, regex.IGNORECASE)
            for allow_special in (True, False)
        }
        self.encoder: dict[str, int] = bpe.encoder
        self.decoder: dict[int, str] = bpe.decoder

    def encode(self, text: str, *, allow_special: bool = True) -> list[int]:
        """Return the ids of a text, without start and end.

        Args:
            text: any; it is repaired, unescaped and lower-cased first.
            allow_special: the literal text of a special token becomes that token, as published. A caption that contains
                one is cut there, so choose False for texts that you do not trust.
        """
        if not isinstance(text, str):
            raise TypeError(f"expected a text, got {text!r}")
        if len(self._bpe.cache) > _CACHE_SIZE:
            self._bpe.cache.clear()
        self._bpe.cache.update(self._special)
        self._bpe.pat = self._patterns[allow_special]
        return self._bpe.encode(text)

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Return the text of ids; words are followed by a space, special tokens appear as their text.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        if unknown := [i for i in ids if i not in self.decoder]:
            raise ValueError(f"{unknown[0]} is not a token id: expected 0 to {len(self.decoder) - 1}")
        return self._bpe.decode(ids)

    def tokenize(
        self,
        texts: str | Sequence[str],
        context_length: int = CONTEXT_LENGTH,
        *,
        allow_special: bool = True,
        truncate: bool = True,
    ) -> Tensor:
        """Return the ids of texts, each with start and end, padded with 0.

        Args:
            texts: one text or several.
            context_length: N, the number of ids of each.
            allow_special: see `encode`.
            truncate: cut texts that are too long, before their end token, and log how many were.

        Returns:
            [T, N], int64.

        Raises:
            ValueError: `context_length` below 1; without `truncate`, a text that is too long.
            TypeError: something that is not a text.
        """
        if context_length < 1:
            raise ValueError(f"context_length={context_length}: a text needs at least 1 position")
        texts = [texts] if isinstance(texts, str) else texts
        start, end = self.encoder[START], self.encoder[END]
        rows = [[start, *self.encode(text, allow_special=allow_special), end] for text in texts]
        if too_long := [i for i, row in enumerate(rows) if len(row) > context_length]:
            first = f"text {too_long[0]} ({texts[too_long[0]][:40]!r}...) has {len(rows[too_long[0]])} tokens"
            if not truncate:
                raise ValueError(
                    f"{len(too_long)} of {len(rows)} texts exceed context_length={context_length}: {first}"
                )
            logger.debug("%d of %d texts are cut to %d tokens: %s", len(too_long), len(rows), context_length, first)
        ids = torch.zeros(len(rows), context_length, dtype=torch.int64)
        for row, tokens in zip(ids, rows, strict=True):
            if len(tokens) > context_length:
                tokens = [*tokens[: context_length - 1], end]
            row[: len(tokens)] = torch.tensor(tokens)
        return ids


def _not_a_vocabulary(vocab_path: Any) -> str:
    return (
        f"{vocab_path} is not a vocabulary of {N_TOKENS} tokens: expected the gzipped list of merges that is published "
        "as bpe_simple_vocab_16e6.txt.gz"
    )
