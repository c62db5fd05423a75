"""Damage, by seed: bits, cuts, splices, and values of JSON where another was expected."""

import json

JUNK = [
    None, True, False, 0, -1, 1, 2**31, 2**53, 2**64, 1e308, 1e-320, -0.0, "", "x", "\ud800", "\u0000", "é", "(a+)+$",
    "alpha/r", "LORA", "lora", [], [0], [1, 0], [0, 0], [-1], [2**62, 0], [[]], {}, {"a": 1}, {"": {}}, [[[[[]]]]],
]  # fmt: skip


def flipped(data, draw):
    """One to eight bits, half of the time in the header alone."""
    out = bytearray(data)
    end = min(len(out), 8 + int.from_bytes(data[:8], "little")) if draw.random() < 0.5 else len(out)
    for _ in range(draw.integers(1, 9)):
        out[draw.integers(end)] ^= 1 << draw.integers(8)
    return bytes(out)


def cut(data, draw):
    """The beginning only."""
    return data[: draw.integers(len(data))]


def spliced(data, draw):
    """A piece of the file in another place of it, in the place of what was there or between."""
    start, to = draw.integers(len(data), size=2)
    piece = data[start : start + draw.integers(1, 200)]
    return data[:to] + piece + data[to + (len(piece) if draw.random() < 0.5 else 0) :]


def edited(text, draw):
    """One value somewhere in a JSON text is another value, is gone, or goes by another name."""
    value = json.loads(text)
    places = list(_places(value))
    holder, key = places[draw.integers(len(places))]
    match draw.integers(4):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[f"{key}x"] = holder.pop(key)
        case 2:
            other, name = places[draw.integers(len(places))]
            holder[key] = json.loads(json.dumps(other[name]))
        case _:
            holder[key] = JUNK[draw.integers(len(JUNK))]
    return json.dumps(value)


def _places(value):
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def with_header(data, change):
    """A safetensors file whose header is another text; the data stay where they are."""
    length = int.from_bytes(data[:8], "little")
    header = change(data[8 : 8 + length].decode()).encode("utf-8", "surrogatepass")
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def with_value(data, change):
    """A native file whose ``loraformat`` value is another text."""

    def inner(header):
        value = json.loads(header)
        value["__metadata__"]["loraformat"] = change(value["__metadata__"]["loraformat"])
        return json.dumps(value)

    return with_header(data, inner)


def damaged(data, draw):
    """One of the kinds of damage."""
    match draw.integers(6):
        case 0:
            return flipped(data, draw)
        case 1:
            return cut(data, draw)
        case 2:
            return spliced(data, draw)
        case 3:
            return with_header(data, lambda text: edited(text, draw))
        case _ if b'"loraformat"' in data:
            return with_value(data, lambda text: edited(text, draw))
        case _:
            return with_header(data, lambda text: edited(text, draw))
