"""Words as datatrove's word tokenizer splits them, for one chunk (a run without white space) at a time.

spaCy's rule tokenizer works chunk by chunk, except that afterwards its special cases (`:)`, `Mr.`) are looked for across
chunks: `: )` splits `x:) )` in another way than `x:)` alone. Such places are found, and split as a whole. Languages of other
tokenizers are left to datatrove.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from data_prep.errors import DataError

BREAKS_SPACY = "IS_ALPHA"
LONGEST_QUICK = 64  # characters
# English: these are a suffix of their own wherever they stand last; a chunk of ASCII has an infix only where one of those is.
SUFFIXES = frozenset(',;:!?()[]{}<>_#*&"')
INFIXES = frozenset(".+-*^,~:<>=/")
DIGIT = re.compile("[0-9]")
LINES = re.compile(r"\S+(?: \S+)*")


def harmless(text: str) -> str:
    """The text without `IS_ALPHA`. In a text that has it, spaCy 3.8 reads memory it has freed (its number for the word is
    its mark of a deleted key): words get lost, or an error comes, as it happens. datatrove leaves it out after an error."""
    while BREAKS_SPACY in text:
        text = text.replace(BREAKS_SPACY, "")
    return text


class ChunkTokenizer:
    """datatrove's word tokenizer of one language. `local`: chunks may be split one by one."""

    def __init__(self, language: str):
        from datatrove.utils.word_tokenizers import SpaCyTokenizer, load_word_tokenizer
        from spacy.tokenizer import Tokenizer

        try:
            original = load_word_tokenizer(language)
        except ValueError as error:
            raise DataError(
                f"datatrove has no word tokenizer for the language '{language}'; the rule is a code of three letters, such as "
                "eng; choose another"
            ) from error
        self.local = isinstance(original, SpaCyTokenizer) and type(original.tokenizer.tokenizer) is Tokenizer
        if self.local:
            self._nlp = original.tokenizer
            self._read_rules(self._nlp.tokenizer)
            self._is_english = original.language == "en" and self._spacy.token_match is None

    def split(self, chunks: Sequence[str]) -> list[tuple[list[str], bool]]:
        """The words of each chunk, as if it were the whole text; whether spaCy may have put a special case together in it."""
        quick = [self._split_quickly(chunk) if self._is_english else None for chunk in chunks]
        slow = iter(self._split_together([chunk for chunk, words in zip(chunks, quick, strict=True) if words is None]))
        found = []
        for chunk, words in zip(chunks, quick, strict=True):
            if words is None:
                words = next(slow)
                found.append((words, self._may_be_merged(chunk, words=words)))
            else:
                found.append((words, False))
        return found

    def rejoin(self, text: str, *, chunks: list[str], merged: Sequence[int]) -> list[str]:
        """The chunks; where a special case may lie across a border of a `merged` one, and so take part in the merging, what
        single spaces hold together comes as one, spaces included (other white space is a word to spaCy, and in between)."""
        if not any(self._crosses(chunks, index=index) for index in merged):
            return chunks
        found: list[str] = []
        place = 0
        for line in LINES.findall(text):
            pieces = line.split(" ")
            doubtful = range(bisect_left(merged, place), bisect_left(merged, place + len(pieces)))
            crossed = any(self._crosses(pieces, index=merged[index] - place) for index in doubtful)
            found.extend([line] if crossed else pieces)
            place += len(pieces)
        return found

    def _crosses(self, chunks: Sequence[str], *, index: int) -> bool:
        left = "".join(chunks[max(0, index - self._longest) : index])[-self._longest :]
        right = "".join(chunks[index + 1 : index + 1 + self._longest])[: self._longest]
        text = left + chunks[index] + right
        return any(self._lies_across(text, border=border) for border in (len(left), len(text) - len(right)))

    def _lies_across(self, text: str, *, border: int) -> bool:
        if text[border - 1 : border + 1] not in self._pairs or not 0 < border < len(text):
            return False
        starts = range(max(0, border - self._longest), border)
        return any(
            text[start:stop] in self._special for start in starts for stop in range(border + 1, start + self._longest + 1)
        )

    def _read_rules(self, tokenizer: Any) -> None:
        """Which special cases spaCy looks for in what it has split: those with affixes. And which of them change it."""
        from spacy.symbols import ORTH
        from spacy.tokenizer import Tokenizer

        self._spacy = tokenizer
        self._rules = {case: [token[ORTH] for token in tokens] for case, tokens in tokenizer.rules.items()}
        finders = ("prefix_search", "suffix_search", "infix_finditer", "token_match", "url_match")
        plain = Tokenizer(tokenizer.vocab, rules={}, **{name: getattr(tokenizer, name) for name in finders})
        affixes = (tokenizer.find_prefix, tokenizer.find_suffix, tokenizer.find_infix)
        self._special = {case for case in self._rules if not case.isspace() and any(find(case) for find in affixes)}
        self._longest = max(map(len, self._special), default=0)
        self._pairs = {case[start : start + 2] for case in self._special for start in range(len(case) - 1)}
        with self._nlp.memory_zone():
            split = {case: [word.text for word in plain(case)] for case in self._special}
        self._merged = {case: self._rules[case] for case in self._special if split[case] != self._rules[case]}
        self._unmerged = {case: split[case] for case in self._merged}
        self._first_words = {words[0] for words in (*self._merged.values(), *self._unmerged.values())}
        mixed = any((case.strip() != case and not case.isspace()) or len(case.split()) > 1 for case in self._rules)
        self.local = not mixed and tokenizer.faster_heuristics

    def _holds(self, words: Sequence[str], *, tokens: dict[str, list[str]]) -> bool:
        """Whether a run of the words is one of the special cases that change what was split, cut as `tokens` says."""
        for start in range(len(words)):
            if words[start] not in self._first_words:
                continue
            text = ""
            for stop in range(start, len(words)):
                text += words[stop]
                if len(text) > self._longest:
                    break
                if text in tokens and words[start : stop + 1] == tokens[text]:
                    return True
        return False

    def _may_be_merged(self, chunk: str, *, words: list[str]) -> bool:
        return chunk not in self._rules and " " not in chunk and self._holds(words, tokens=self._merged)

    def _split_together(self, chunks: Sequence[str]) -> list[list[str]]:
        """By spaCy, in one call: no special case goes across the line feeds between them."""
        if not chunks:
            return []
        text = "\n".join(chunks)
        with self._nlp.memory_zone():
            tokens = self._spacy(text).to_array(["IDX", "LENGTH"])
        found: list[list[str]] = [[]]
        for start, length in tokens.tolist():
            word = text[start : start + length]
            if word == "\n":
                found.append([])
            else:
                found[-1].append(word)
        return found

    def _split_quickly(self, chunk: str) -> list[str] | None:
        """English by the steps spaCy takes, without its Doc and most of its regular expressions; None where it must decide."""
        if chunk.isalpha() and chunk not in self._rules:
            return [chunk]
        if len(chunk) > LONGEST_QUICK or " " in chunk:
            return None
        before, core, after = self._strip_affixes(chunk)
        words = [*before, *self._split_core(core), *reversed(after)]
        return None if len(words) > 1 and chunk not in self._rules and self._holds(words, tokens=self._unmerged) else words

    def _strip_affixes(self, core: str) -> tuple[list[str], str, list[str]]:
        """Prefixes in reading order, what is left between, suffixes from the last backwards."""
        before: list[str] = []
        after: list[str] = []
        while core and core not in self._rules:
            prefix = self._prefix_length(core)
            if prefix and core[prefix:] in self._rules:
                before.append(core[:prefix])
                core = core[prefix:]
                continue
            suffix = self._suffix_length(core[prefix:])
            if not prefix and not suffix:
                break
            if prefix and not (suffix and core[:-suffix] in self._rules):
                before.append(core[:prefix])
                core, suffix = core[prefix:], suffix if prefix + suffix <= len(core) else 0
            if suffix:
                after.append(core[-suffix:])
                core = core[:-suffix]
        return before, core, after

    def _prefix_length(self, text: str) -> int:
        match = self._spacy.prefix_search(text)
        return len(match.group()) if match else 0

    def _suffix_length(self, text: str) -> int:
        last = text[-1:]
        if last in SUFFIXES and last:
            return 1
        if last.isalpha() and text[-2:-1] not in "'’" and not DIGIT.search(text):  # 's and units are the suffixes of letters
            return 0
        if last == "." and text[-2:-1].isascii() and text[-2:-1].islower():
            return 1
        match = self._spacy.suffix_search(text)
        return len(match.group()) if match else 0

    def _split_core(self, core: str) -> list[str]:
        if not core:
            return []
        if core in self._rules:
            return self._rules[core]
        if core.isalpha() or (core.isascii() and INFIXES.isdisjoint(core)) or self._spacy.url_match(core):
            return [core]
        words, start = [], 0
        for match in self._spacy.infix_finditer(core):
            if match.start():
                words += [core[start : match.start()], match.group()]
                start = match.end()
        return [word for word in [*words, core[start:]] if word]
