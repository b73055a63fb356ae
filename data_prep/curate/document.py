"""What the steps of curation pass on, and what a step is."""

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(slots=True)
class Document:
    """One document on its way through the steps: its text, its id, and what else its row says."""

    text: str
    id: str
    metadata: dict[str, Any]


class Step(Protocol):
    """One question to every document; `name` as in the config, e.g. `gopher_quality`."""

    name: str

    def __call__(self, document: Document) -> str | None:
        """The reason why the document is dropped, a short fixed word such as `gopher_short_doc`; None keeps it. May change
        document.text and add to document.metadata."""
        ...
