"""The code points that gigatoken and tiktoken take for different kinds of character, and a quick search for them in a text.

Both cut text with cl100k's pattern, which knows letters, numbers, white space and the rest. Their tables of Unicode differ by a
year: what Unicode 17 added is a letter or a number to gigatoken, and nothing yet to tiktoken. Texts without these code points
get the same ids from both.

    python -m data_prep.unicode_differences    derives RANGES from the two packages as installed; a few minutes
"""

import base64
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from data_prep.indexed import Ids

VERSIONS = {"gigatoken": "0.10.0", "tiktoken": "0.14.0"}  # that RANGES hold for
RANGES = (  # first and last code point: 4,644 letters and 13 numbers
    (0x0088F, 0x0088F),
    (0x00C5C, 0x00C5C),
    (0x00CDC, 0x00CDC),
    (0x0A7CE, 0x0A7CF),
    (0x0A7D2, 0x0A7D2),
    (0x0A7D4, 0x0A7D4),
    (0x0A7F1, 0x0A7F1),
    (0x10940, 0x10959),
    (0x10EC5, 0x10EC7),
    (0x11DB0, 0x11DDB),
    (0x11DE0, 0x11DE9),
    (0x16EA0, 0x16EB8),
    (0x16EBB, 0x16ED3),
    (0x16FF2, 0x16FF6),
    (0x187F8, 0x187FF),
    (0x18D09, 0x18D1E),
    (0x18D80, 0x18DF2),
    (0x1E6C0, 0x1E6DE),
    (0x1E6E0, 0x1E6E2),
    (0x1E6E4, 0x1E6E5),
    (0x1E6E7, 0x1E6ED),
    (0x1E6F0, 0x1E6F4),
    (0x1E6FE, 0x1E6FF),
    (0x2B73A, 0x2B73F),
    (0x2CEA2, 0x2CEAD),
    (0x323B0, 0x33479),
)
ASTRAL = 0x10000  # from here on a code point takes four bytes of UTF-8
_POINTS = [point for first, last in RANGES for point in range(first, last + 1)]
_BASIC = tuple(chr(point) for point in _POINTS if point < ASTRAL)

# Contexts, each with the code point for X. The first three tell letters, numbers, white space and the rest from each other.
PROBES = (
    "aX's Xa ",
    "1X1 X1234 12X34",
    "a  X  a",
    "X",
    ".X. ..Xa.X",
    "X\n\nX\r\n\rX",
    "XX XXXXX",
    "'X 'Xa 'lX 'reX a'X'S",
    "\tX\t\u00a0X\u00a0",
    "中X中éXé",
    "e\u0301X\u0301",
    "٣X٣٣٣ ½X",
)
BLOCK = 8192  # code points tried with one text
SURROGATES = range(0xD800, 0xE000)
ALL = range(sys.maxunicode + 1)

Encode = Callable[[str], Ids]


def _either(characters: Sequence[bytes]) -> bytes:
    """A pattern for any of these, sorted and equally long, with what they start with in front: that is skipped to quickly."""
    if len(characters[0]) == 1:
        return b"[%s]" % b"".join(map(re.escape, characters))
    heads = itertools.groupby(characters, key=lambda character: character[:1])
    return b"(?:%s)" % b"|".join(re.escape(head) + _either([rest[1:] for rest in rests]) for head, rests in heads)


_ASTRAL = re.compile(_either([chr(point).encode() for point in _POINTS if point >= ASTRAL]))


def utf8_if_alike(text: str) -> bytes | None:
    """`text` in UTF-8 where both packages give it the same ids. None where they may not: a code point of RANGES is in it, or a
    lone surrogate, which gigatoken does not take."""
    if text.isascii():
        return text.encode()
    try:
        data = text.encode()
    except UnicodeEncodeError:
        return None
    return None if any(map(text.__contains__, _BASIC)) or _ASTRAL.search(data) else data


def differing(ours: Encode, theirs: Encode, *, probes: Sequence[str] = PROBES, among: Sequence[int] = ALL) -> list[int]:
    """The code points, ascending, of those in `among` that the two encoders treat differently in any of `probes`."""
    points = [point for point in among if point not in SURROGATES]
    blocks = [points[start : start + BLOCK] for start in range(0, len(points), BLOCK)]
    found = (point for probe in probes for block in blocks for point in _differing(block, ours, theirs, probe=probe))
    return sorted(set(found))


def _differing(points: list[int], ours: Encode, theirs: Encode, *, probe: str) -> Iterator[int]:
    """By halves: equal ids of the whole are equal ids of every part."""
    text = "\nq\n".join(probe.replace("X", chr(point)) for point in points)
    if np.array_equal(ours(text), theirs(text)):
        return
    if len(points) == 1:
        yield points[0]
        return
    middle = len(points) // 2
    yield from _differing(points[:middle], ours, theirs, probe=probe)
    yield from _differing(points[middle:], ours, theirs, probe=probe)


def ranges_of(points: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Ascending code points as (first, last) of each unbroken run."""
    runs = itertools.groupby(enumerate(points), key=lambda pair: pair[1] - pair[0])
    return tuple((run[0][1], run[-1][1]) for run in (list(pairs) for _, pairs in runs))


def boundary_ranks() -> bytes:
    """A vocabulary, as the content of a .tiktoken file, that shows where text is cut on either side of a character.

    Every byte is a token, and so is every pair of bytes of two characters next to each other: uncut they merge. No pair within
    a character is one, so that nothing competes. Real vocabularies merge too little across such borders to show them all.
    """
    ascii_bytes, continuing, leading = range(0x80), range(0x80, 0xC0), range(0xC2, 0xF5)
    borders = [(continuing, ascii_bytes), (ascii_bytes, leading), (continuing, leading), (ascii_bytes, ascii_bytes)]
    pairs = (bytes(pair) for left, right in borders for pair in itertools.product(left, right))
    tokens = itertools.chain((bytes([byte]) for byte in range(256)), pairs)
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


def main() -> None:
    from data_prep.tokenizers import ExactBpe

    bpe = ExactBpe(boundary_ranks(), specials={})
    found = ranges_of(differing(bpe.reference, bpe.gigatoken_alone))
    print("\n".join(f"    (0x{first:05X}, 0x{last:05X})," for first, last in found))
    print("RANGES, as they are" if found == RANGES else "not RANGES as they are: replace those with these")


if __name__ == "__main__":
    main()
