"""Invalid vectors of LF-1xx: the container."""

from __future__ import annotations

import json

from broken import DATA, KEY, MISSING, SOUND, TEXT, broken, entries, laid, value


def begins() -> None:
    """LF-101 to LF-103."""
    broken("LF-101-empty-file", "no bytes at all", b"")
    broken("LF-101-seven-bytes", "the header length is cut", b"\x00" * 7)
    broken("LF-102-length-2-63", "a header of 2^63 bytes", (2**63).to_bytes(8, "little") + SOUND[8:])
    broken("LF-102-length-beyond-cap", "a header of 100,000,001 bytes", (100_000_001).to_bytes(8, "little"))
    broken("LF-102-truncated-header", "the file ends within the header", SOUND[:100])
    broken("LF-103-not-json", "the header is no JSON", laid("{'single': 'quotes'}"))
    broken("LF-103-not-utf8", "the header is Latin-1", laid('{"\xe9":1}'.encode("latin-1")))
    broken("LF-103-list", "the header is a list", laid("[]"))
    broken("LF-103-nan", "NaN is no JSON", laid(json.dumps(entries()).replace("[0, 40]", "[0, NaN]"), DATA))
    text = json.dumps(entries())
    broken("LF-103-leading-space", "a space before the brace: the reference reader refuses it", laid(" " + text, DATA))
    broken("LF-103-byte-order-mark", "a byte order mark before the brace", laid("\ufeff" + text, DATA))
    half = text.replace('"loraformat"', '"half": "\\ud800", "loraformat"')
    broken("LF-103-surrogate", "half of a surrogate pair in metadata of others", laid(half, DATA))


def doubled() -> None:
    """LF-104."""
    text = json.dumps(entries())
    again = f', "{KEY}.lora_B": {{"dtype": "F32", "shape": [3, 2], "data_offsets": [40, 64]}}}}'
    broken("LF-104-tensor-twice", "a tensor is listed twice", laid(text[:-1] + again, DATA))
    mine = json.dumps(TEXT)
    key = text.replace('"loraformat":', f'"loraformat": {mine}, "loraformat":')
    broken("LF-104-loraformat-twice", "the key of this format twice", laid(key, DATA))
    broken("LF-104-metadata-twice", "a second __metadata__", laid(text[:-1] + ', "__metadata__": {}}', DATA))
    twice = text.replace('"dtype": "F32"', '"dtype": "F16", "dtype": "F32"')
    broken("LF-104-dtype-twice", "an entry has two dtypes", laid(twice, DATA))


def described() -> None:
    """LF-105 and LF-106."""
    for name, says, change in (
        ("no-shape", "an entry without shape", {"shape": MISSING}),
        ("extra-field", "an entry with a field of its own", {"scale": 2}),
        ("negative-shape", "a negative size", {"shape": [-2, -5]}),
        ("float-shape", "a size that is no integer", {"shape": [2.0, 5]}),
        ("text-shape", "a shape of text", {"shape": "25"}),
        ("text-offset", "an offset of text", {"data_offsets": [0, "40"]}),
        ("negative-offset", "an offset below zero", {"data_offsets": [-40, 0]}),
        ("three-offsets", "three offsets", {"data_offsets": [0, 40, 64]}),
        ("shape-2-63", "a size beyond 63 bits", {"shape": [2**63, 0]}),
        ("null-dtype", "a dtype of null", {"dtype": None}),
        ("many-axes", "a tensor of 33 axes", {"shape": [2, 5] + [1] * 31}),
    ):
        broken(f"LF-105-{name}", says, laid(entries(A=change), DATA), where=f"{KEY}.lora_A")
    broken("LF-106-unknown-dtype", "F31 is no dtype", laid(entries(A={"dtype": "F31"}), DATA), where=f"{KEY}.lora_A")
    packed = {"dtype": "F4", "shape": [16, 5]}
    broken("LF-106-packed-dtype", "F4 has no whole byte", laid(entries(A=packed), DATA), where=f"{KEY}.lora_A")


def covered() -> None:
    """LF-107 to LF-109."""
    overlap = entries(B={"data_offsets": [36, 60]})
    broken("LF-107-overlap", "two tensors share bytes", laid(overlap, DATA[:60]), where=f"{KEY}.lora_B")
    hole = entries(B={"data_offsets": [44, 68]})
    broken("LF-107-hole", "four bytes belong to no tensor", laid(hole, DATA + bytes(4)), where=f"{KEY}.lora_B")
    broken("LF-107-truncated", "the last four bytes are missing", SOUND[:-4])
    broken("LF-107-polyglot-tail", "an empty zip archive follows", SOUND + b"PK\x05\x06" + bytes(18))
    short = entries(A={"shape": [2, 6]})
    broken("LF-108-short", "40 bytes for 12 float32 values", laid(short, DATA), where=f"{KEY}.lora_A")
    back = entries(A={"data_offsets": [40, 0]})
    broken("LF-108-backwards", "offsets that run backwards", laid(back, DATA), where=f"{KEY}.lora_A")
    broken("LF-109-object", "the value is an object, not text", laid(entries(meta={"loraformat": value()}), DATA))
    null = entries(meta={"loraformat": TEXT, "format": None})
    broken("LF-109-null-value", "null is not a string, nor is it absent", laid(null, DATA))
    broken("LF-109-list", "__metadata__ is a list", laid(entries(meta=[]), DATA))


SECTIONS = (begins, doubled, described, covered)
"""In the order of the rules."""
