"""Positions at which a text may be cut without a change of the ids of a `tokenizer.json`.

A text may be cut before a space that follows a visible ASCII character, if

- no added token can contain both characters or remove the space; added tokens are found first;
- the normalizer works on single characters, or on sequences that never contain both characters:
  they do not compose in Unicode, and are not in one grapheme;
- the pre-tokenizer splits there. In all patterns listed here, a space begins a new part unless
  white space comes before it. The text is scanned from left to right, without a look back, and only
  white space looks ahead. Everything after the split works on each part alone.

Models work on each part alone. Other tokenizers encode a text as a whole.
"""

import re
from collections.abc import Iterator
from typing import Any

_NORMALIZERS = {
    "BertNormalizer",
    "Lowercase",
    "NFC",
    "NFD",
    "NFKC",
    "NFKD",
    "Precompiled",
    "StripAccents",
}
_DROPS_SPACES = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"}
_INNER = {"ByteLevel", "Digits", "Punctuation"}
"""Pre-tokenizers that keep spaces: they change nothing before the split or within its parts."""

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_PATTERNS = {
    # GPT-2, GPT-4 (also Llama 3), Qwen 2, GPT-4o
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    rf"{_CONTRACTION}|{_WORD}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
    rf"{_CONTRACTION}|{_WORD}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
    rf"{_WORD}{_UPPER}*{_LOWER}+{_CONTRACTION}?|{_WORD}{_UPPER}+{_LOWER}*{_CONTRACTION}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
}


def may_cut_before_spaces(fields: dict[str, Any]) -> bool:
    """Return whether texts may be cut before any space that follows a visible ASCII character.

    Args:
        fields: Content of `tokenizer.json`.
    """
    # Added tokens, then the normalizer, then the pre-tokenizer.
    for token in fields["added_tokens"]:
        if token.get("rstrip") or re.search("[!-~] ", token["content"]):
            return False
    normalizers = {part["type"] for part in _flatten(fields["normalizer"], "normalizers")}
    if not normalizers <= _NORMALIZERS:
        return False
    parts = list(_flatten(fields["pre_tokenizer"], "pretokenizers"))
    while parts and parts[0]["type"] in ("Digits", "Punctuation"):
        del parts[0]
    if not parts or not _splits(parts[0]):
        return False
    inner = _INNER | ({"Metaspace"} if parts[0]["type"] in _DROPS_SPACES else set())
    return all(part["type"] in inner for part in parts[1:])


def _flatten(part: dict[str, Any] | None, key: str) -> Iterator[dict[str, Any]]:
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
        return
    for inner in part[key]:
        yield from _flatten(inner, key)


def _splits(part: dict[str, Any]) -> bool:
    """Return whether a pre-tokenizer splits before a space after a visible ASCII character."""
    match part["type"]:
        case "Split":
            is_isolated = part["behavior"] == "Isolated" and not part["invert"]
            return is_isolated and part["pattern"].get("Regex") in _PATTERNS
        case "ByteLevel":
            return bool(part.get("use_regex", True))
        case "Metaspace":
            return bool(part.get("split", True))
    return part["type"] in _DROPS_SPACES
