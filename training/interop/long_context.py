"""What a model makes of long text: section `long_context` of eval/<stage>.json, measured on the exported folder.

Loss by position: of held-out documents that fill a window each, from their own beginning, so that a token at position p has
seen p tokens of its document. More context must not make it worse: a loss that rises past the length that the stage before was
trained on says that the model cannot use, or cannot bear, what lies further back.

Needle in a haystack: a fact with a number, somewhere in held-out text of some length, and at its end the same words up to the
number. `recalled`: how often the number is what the model would say (greedy, token by token); `gain`: by how many nats the fact
makes it likelier than another fact in its place does, which says something of small models too.

Shapes: D documents, S sequence.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from training.batch import Rows
from training.data import HeldOutFeed

Row = NDArray[np.int32]
Losses = Callable[[Any, Rows], torch.Tensor]

MAX_DOCUMENTS = 64  # of all sources, evenly
FIRST_BORDER, PARTS = 16, 64  # the first bucket is a 64th of the window, then they double
ERRORS = 2.0  # standard errors that a rise must exceed
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
LENGTHS = (8, 4, 2, 1)  # the window over these
TRIALS = 4
FACT = "\nThe secret number of {name} is"
NAMES = ("Lisbon", "Warsaw", "Nairobi", "Santiago", "Hanoi", "Ottawa", "Cairo", "Oslo")


@dataclass(frozen=True)
class Bucket:
    """Positions [begin, end): mean loss in nats, and by how much it lies above that of the reference, over documents, with its
    standard error; None for fewer than two documents, and up to the reference."""

    begin: int
    end: int
    loss: float
    rise: float | None
    rise_error: float | None

    @property
    def rises(self) -> bool:
        return self.rise is not None and self.rise_error is not None and self.rise > ERRORS * self.rise_error


@dataclass(frozen=True)
class Positions:
    """`reference`: where the bucket ends that later ones are compared with."""

    documents: dict[str, int]
    reference: int
    buckets: tuple[Bucket, ...]

    @property
    def rises(self) -> bool:
        return any(bucket.rises for bucket in self.buckets)

    def to_json(self) -> dict[str, Any]:
        buckets = [asdict(bucket) | {"rises": bucket.rises} for bucket in self.buckets]
        return {**asdict(self), "buckets": buckets, "rises": self.rises}


@dataclass(frozen=True)
class Needle:
    """Of so many trials with a text of `length` tokens and the fact at `depth` (0: its beginning)."""

    length: int
    depth: float
    trials: int
    recalled: int
    gain: float


@dataclass(frozen=True)
class LongContext:
    """Either is None where the run has no text for it; then `why_not` says so."""

    positions: Positions | None
    needles: tuple[Needle, ...]
    why_not: str | None = None

    def to_json(self) -> dict[str, Any]:
        positions = self.positions.to_json() if self.positions else None
        return {"positions": positions, "needles": [asdict(needle) for needle in self.needles], "why_not": self.why_not}


@torch.no_grad()
def measure_long_context(
    model: Any, tokenizer: Any, *, feed: HeldOutFeed, trained_length: int | None, losses: Losses
) -> LongContext:
    """`trained_length`: the sequence length of the stage before. `losses`: of each label [B, S], as the held-out loss is
    computed."""
    length = feed.seq_length
    if any(stream.directory is None for stream in feed.streams):
        return LongContext(None, (), why_not="documents are looked for in folders of this machine; copy the sources here")
    documents = long_documents(feed)
    if not documents:
        return LongContext(None, (), why_not=f"no held-out document has {length + 1:,} tokens")
    rows = [row for found in documents.values() for row in found]
    eod_id = feed.streams[0].eod_id
    loss_DS = np.concatenate([losses(model, as_rows(row, eod_id=eod_id)).double().cpu().numpy() for row in rows])
    counts = {name: len(found) for name, found in documents.items()}
    positions = by_position(loss_DS, documents=counts, trained_length=trained_length)
    text = np.concatenate(rows)
    return LongContext(positions, tuple(find_needles(model, tokenizer, haystack=text[text != eod_id], window=length)))


def long_documents(feed: HeldOutFeed) -> dict[str, list[Row]]:
    """The first S + 1 tokens of held-out documents that have as many, by source, in the order of the shards."""
    most, found = max(1, MAX_DOCUMENTS // len(feed.streams)), {}
    for stream in feed.streams:
        long = (document[: feed.seq_length + 1] for document in stream.documents() if len(document) > feed.seq_length)
        if rows := list(islice(long, most)):
            found[stream.name] = rows
    return found


def as_rows(document: Row, *, eod_id: int) -> Rows:
    """One row, S tokens."""
    tokens, labels = document[None, :-1], document[None, 1:]
    return Rows(tokens, labels, tokens != eod_id, None, np.zeros(1, dtype=np.int32))


def by_position(loss_DS: NDArray[np.float64], *, documents: dict[str, int], trained_length: int | None) -> Positions:
    """Means over buckets of positions. Later ones are compared with the one that ends at `trained_length`, or else at half the
    window, document by document: some text is harder than other."""
    length = loss_DS.shape[1]
    ends = borders(length)
    wanted = trained_length if trained_length and trained_length < length else length // 2
    reference = max((end for end in ends if end <= wanted), default=ends[0])
    means = {end: loss_DS[:, begin:end].mean(axis=1) for begin, end in pairwise([0, *ends])}
    buckets = []
    for begin, end in pairwise([0, *ends]):
        rise = error = None
        if end > reference and len(loss_DS) > 1:
            apart = means[end] - means[reference]
            rise, error = float(apart.mean()), float(apart.std(ddof=1) / math.sqrt(len(apart)))
        buckets.append(Bucket(begin, end, float(means[end].mean()), rise, error))
    return Positions(documents, reference, tuple(buckets))


def borders(length: int) -> list[int]:
    """Where buckets end: a 64th of the window, doubled until all of it is reached."""
    first = max(FIRST_BORDER, length // PARTS)
    ends = [first << power for power in range(length.bit_length()) if first << power < length]
    return [*ends, length]


@torch.no_grad()
def find_needles(model: Any, tokenizer: Any, *, haystack: Row, window: int) -> Iterator[Needle]:
    """At lengths that the fact and the question fit into four times, and that there is text for."""
    random, encode = Random(0), encoder(tokenizer)
    for length in [window // part for part in LENGTHS]:
        if length < 4 * len(encode(fact(NAMES[0], 1234))) or length > len(haystack):
            continue
        for depth in DEPTHS:
            begins = [random.randrange(len(haystack) - length + 1) for _ in range(TRIALS)]
            texts = [haystack[begin : begin + length].tolist() for begin in begins]
            trials = [one_needle(model, encode, text, depth=depth, random=random) for text in texts]
            yield Needle(length, depth, TRIALS, sum(found for found, _ in trials), sum(gain for _, gain in trials) / TRIALS)


def one_needle(
    model: Any, encode: Callable[[str], list[int]], hay: list[int], *, depth: float, random: Random
) -> tuple[bool, float]:
    """Whether the number is recalled, and the gain."""
    name, other = random.sample(NAMES, 2)
    number, other_number = random.sample(range(1000, 10000), 2)
    question, answer = encode(FACT.format(name=name)), encode(f" {number}")
    needles = encode(fact(name, number)), encode(fact(other, other_number))
    (cost, is_said), (cost_without, _) = (
        score(model, buried(hay, needle, depth=depth, end=question), answer=answer) for needle in needles
    )
    return is_said, cost_without - cost


def fact(name: str, number: int) -> str:
    return f"{FACT.format(name=name)} {number}.\n"


def encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    return lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"])


def buried(hay: list[int], needle: list[int], *, depth: float, end: list[int]) -> list[int]:
    """As many tokens as there is hay: of it, with the needle at `depth`, then `end`."""
    room = len(hay) - len(needle) - len(end)
    at = round(depth * room)
    return [*hay[:at], *needle, *hay[at:room], *end]


def score(model: Any, context: list[int], *, answer: list[int]) -> tuple[float, bool]:
    """Nats that the answer costs behind the context, and whether each of its tokens is the likeliest."""
    tokens = torch.tensor([[*context, *answer[:-1]]], device=model.device)
    logits = model(input_ids=tokens, use_cache=False, logits_to_keep=len(answer)).logits[0].float()
    wanted = torch.tensor(answer, device=model.device)
    cost = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
    return float(cost), bool((logits.argmax(dim=-1) == wanted).all())


def table(found: LongContext) -> str:
    """As `phidias eval` prints it."""
    if found.positions is None:
        return f"long context not measured: {found.why_not}"
    lines = [f"loss by position, {sum(found.positions.documents.values())} held-out documents"]
    for bucket in found.positions.buckets:
        apart = "" if bucket.rise is None else f"   {bucket.rise:+.3f} ± {bucket.rise_error:.3f}{'  RISES' * bucket.rises}"
        lines.append(f"  {bucket.begin:>7,} to {bucket.end:>7,}  {bucket.loss:7.4f}{apart}")
    if found.needles:
        lines.append("needle: found, and nats that the fact is worth, by length and depth")
    for length in dict.fromkeys(needle.length for needle in found.needles):
        cells = [
            f"{one.depth:.0%} {one.recalled}/{one.trials} {one.gain:+.2f}" for one in found.needles if one.length == length
        ]
        lines.append(f"  {length:>7,}  " + "   ".join(cells))
    return "\n".join(lines)
