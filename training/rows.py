"""Rows of a source that is read through a window table of packed documents, and the rows of several sources together.

Shapes: N rows, S sequence.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from data_prep.stream import SourceStream
from launcher.config.schema import StageSettings
from training.batch import Rows


def packed_rows(
    stream: SourceStream, *, pieces: Iterable[tuple[int, int, int]], source: NDArray[np.int32], stage: StageSettings
) -> Rows:
    """Rows [N, S] of best-fit windows. `pieces`: row, offset in the stream, and length of each piece, in order.

    Documents do not follow one another in the text, so what follows an EOD is never predicted. What a row has left over is
    EOD, a document of its own, and counts nowhere."""
    num_rows, seq_length = len(source), stage.seq_length
    tokens = np.full((num_rows, seq_length), stream.eod_id, dtype=np.int32)
    labels, counted = tokens.copy(), np.zeros(tokens.shape, dtype=np.bool_)
    document, filled = np.full(tokens.shape, -1, dtype=np.int32), [0] * num_rows
    for number, (row, offset, length) in enumerate(pieces):
        read = stream.read(offset, min(length + 1, stream.num_tokens - offset))
        place = slice(filled[row], filled[row] + length)
        tokens[row, place], document[row, place] = read[:length], number
        labels[row, place][: len(read) - 1] = read[1:]
        counted[row, place] = read[:length] != stream.eod_id
        filled[row] += length
    return Rows(tokens, labels, counted, document if stage.reset_attention_mask else None, source)


def join_rows(parts: Sequence[Rows], *, order: NDArray[np.int64]) -> Rows:
    """One Rows of several; row i of the parts laid end to end goes to place order[i]."""
    back = np.argsort(order)
    documents = [part.document for part in parts if part.document is not None]
    return Rows(
        np.concatenate([part.tokens for part in parts])[back],
        np.concatenate([part.labels for part in parts])[back],
        np.concatenate([part.counted for part in parts])[back],
        np.concatenate(documents)[back] if documents else None,
        np.concatenate([part.source for part in parts])[back],
    )
