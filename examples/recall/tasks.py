"""The tasks: texts whose last part asks for what their first part said.

``mqar``: multi-query associative recall in Zoology's setting (arXiv 2312.04927). n keys, each followed by its value;
then 6n tokens in which every key stands once more, where its value is asked for. Gaps follow a power law, other places
hold random tokens.

``facts``: question answering. Facts about made-up entities are hidden in sources of the standard library; after them
every fact is asked for. An entity is two made-up words and so is the answer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from examples.recall.presets import TaskPreset
from examples.stdlib_lm import data


class Batch(NamedTuple):
    """Texts and what is asked in them: Q questions a text, answers of A tokens.

    Attributes:
        tokens: int64 [B, T].
        positions: int64 [B, Q, A]; the token after ``positions[b, q, a]`` is to be predicted.
        answers: int64 [B, Q, A].
    """

    tokens: Tensor
    positions: Tensor
    answers: Tensor


class Task(Protocol):
    """Makes batches on the device of the generator, without waiting for it. Equal states give equal batches."""

    def length(self, size: int) -> int:
        """Tokens of a text of this size."""

    def batch(self, size: int, count: int, held_out: bool, generator: torch.Generator) -> Batch:
        """``count`` texts of this size, of what training or, if ``held_out``, evaluation may use."""


def _permutations(rows: int, columns: int, count: int, generator: torch.Generator) -> Tensor:
    """int64 [rows, count]: the first of a random permutation of 0 … columns − 1 in every row."""
    return torch.rand(rows, columns, generator=generator, device=generator.device).argsort(1)[:, :count]


# --------------------------------------------------------------------------------------------------------------- mqar
GAP_POWER = 0.01
"""Zoology's: the density of the place at which a key stands again is a·x^(a−1)."""

TOKENS_PER_PAIR = 8


class AssociativeRecall:
    """See the module. Keys are from the lower half of the vocabulary, without 0, and values from the upper half.

    Training and evaluation draw from the same distribution; of N! · C(V/2, N)² texts they meet none twice.
    """

    def __init__(self, preset: TaskPreset) -> None:
        self.vocabulary = preset.vocabulary
        most = max(*preset.train_sizes, *preset.eval_sizes)
        if 2 * most + 1 > preset.vocabulary:
            raise ValueError(f"expected a vocabulary of more than {2 * most} for {most} pairs, got {preset.vocabulary}")

    def length(self, size: int) -> int:
        return TOKENS_PER_PAIR * size

    def batch(self, size: int, count: int, held_out: bool, generator: torch.Generator) -> Batch:
        half, device = self.vocabulary // 2, generator.device
        keys = 1 + _permutations(count, half - 1, size, generator)
        values = half + _permutations(count, self.vocabulary - half, size, generator)
        pairs = torch.stack((keys, values), 2).flatten(1)
        rest = torch.randint(self.vocabulary, (count, (TOKENS_PER_PAIR - 2) * size), generator=generator, device=device)
        places = rest.shape[1] // 2
        weights = torch.arange(1, places + 1, device=device).pow(GAP_POWER - 1).expand(count, -1)
        positions = 2 * torch.multinomial(weights, size, generator=generator)  # without replacement
        tokens = torch.cat((pairs, rest.scatter(1, positions, keys)), 1)
        return Batch(tokens, (positions + 2 * size)[..., None], values[..., None])


# -------------------------------------------------------------------------------------------------------------- facts
FACT = ("\n", "#", " code", " of", "A", "B", "C", "D", "\n")
QUESTION = ("\n", "#", " which", " code", "?", "A", "B", "C", "D")
"""A B is the entity, C D the answer, made-up words of one token each; the other parts are tokens as they stand.

Nothing stands between entity and answer: with a word there, no model of this size had learnt the task by step 1400.
"""

HELD_OUT_ENTITIES = 8
"""Of so many entities one is met in evaluation only."""

_PIECE = re.compile(r" ?\w+| ?[^\w\s]+|\s")


class Tokenizer:
    """Bytes, the most frequent pieces of the training half of the standard library, and made-up words. Lossless.

    Args:
        text: what pieces are counted in.
        vocabulary: number of tokens.
        words: made-up ones among them.
    """

    def __init__(self, text: bytes, vocabulary: int, words: int) -> None:
        template = [part for part in dict.fromkeys(FACT + QUESTION) if len(part) > 1]
        fixed = 256 + words + len(template)
        if vocabulary < fixed:
            raise ValueError(f"expected a vocabulary of at least {fixed}, got {vocabulary}")
        consonants, vowels = "bdfgklmnprstvz", "aeiou"
        syllables = [c + v for c in consonants for v in vowels]
        counts = Counter(_PIECE.findall(text.decode("utf-8", "replace")))
        candidates = (f" {a}{b}" for i, a in enumerate(syllables) for b in syllables[i + 1 :: 7])
        made_up = [word for word in candidates if word not in counts][:words]
        if len(made_up) < words:
            raise ValueError(f"expected at most {len(made_up)} made-up words, got {words}")
        frequent = (piece for piece, _ in counts.most_common() if len(piece) > 1 and piece not in template)
        pieces = [*template, *(piece for piece, _ in zip(frequent, range(vocabulary - fixed), strict=False))]
        self.vocabulary = vocabulary
        self.words = range(256, 256 + words)
        self._known = {word: 256 + i for i, word in enumerate([*made_up, *pieces])}
        self._bytes = [bytes([i]) for i in range(256)] + [word.encode() for word in [*made_up, *pieces]]

    def encode(self, text: bytes) -> Tensor:
        """int64 [tokens]."""
        tokens: list[int] = []
        for piece in _PIECE.findall(text.decode("utf-8", "surrogateescape")):
            known = self._known.get(piece)
            if known is None:
                tokens.extend(piece.encode("utf-8", "surrogateescape"))
            else:
                tokens.append(known)
        return torch.tensor(tokens)

    def decode(self, tokens: Tensor) -> bytes:
        return b"".join(self._bytes[token] for token in tokens.tolist())

    def template(self, parts: Sequence[str]) -> list[int]:
        """The tokens of ``FACT`` or ``QUESTION``; 0 for A, B, C and D."""
        return [0 if part in "ABCD" else self._known.get(part, ord(part[0])) for part in parts]


@lru_cache(maxsize=3)
def _tokens(vocabulary: int, words: int, root: Path | None) -> tuple[Tokenizer, Tensor, Tensor]:
    """The tokenizer, and the tokens of the training and of the held-out files."""
    corpus = data.load_corpus(root)
    train, held_out = (bytes(part.numpy()) for part in (corpus.train, corpus.held_out))
    tokenizer = Tokenizer(train, vocabulary, words)
    return tokenizer, tokenizer.encode(train), tokenizer.encode(held_out)


class Facts:
    """See the module. The answers are drawn apart from the entities: only the fact in the text tells them.

    Filler, and the entities that facts are about, are others in evaluation than in training.

    Args:
        root: where the filler is read from, by default the standard library.
    """

    def __init__(self, preset: TaskPreset, root: Path | None = None) -> None:
        self.items = preset.items
        least = self.items * (len(FACT) + len(QUESTION))
        for size in (*preset.train_sizes, *preset.eval_sizes):
            if size <= least:
                raise ValueError(f"expected texts of more than {least} tokens for {self.items} facts, got {size}")
        self.tokenizer, train, held_out = _tokens(preset.vocabulary, preset.words, root)
        self._filler = {False: train, True: held_out}
        self._fact, self._question = (torch.tensor(self.tokenizer.template(parts)) for parts in (FACT, QUESTION))
        # Mixed once, so that the shares of :meth:`_distinct` are random ones.
        pairs = torch.cartesian_prod(torch.arange(preset.words), torch.arange(preset.words))
        pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))]
        kept = pairs.sum(1) % HELD_OUT_ENTITIES == 0
        self.entities = {False: pairs[~kept], True: pairs[kept]}
        for held, sizes in ((False, preset.train_sizes), (True, preset.eval_sizes)):
            if self._filler[held].numel() <= max(sizes):
                raise ValueError(
                    f"expected more than {max(sizes)} tokens of filler, got {self._filler[held].numel()} of it"
                )

    def length(self, size: int) -> int:
        return size

    def batch(self, size: int, count: int, held_out: bool, generator: torch.Generator) -> Batch:
        B, n, device = count, self.items, generator.device
        first = self.tokenizer.words[0]
        entities = first + self._distinct(held_out, B, generator)
        words = len(self.tokenizer.words)
        answers = first + torch.randint(words, (B, n, 2), generator=generator, device=device)

        order = _permutations(B, n, n, generator)
        fact, question = self._fact.to(device), self._question.to(device)
        facts = _written(fact, FACT, entities, answers)
        asked, told = (x.gather(1, order[..., None].expand(-1, -1, 2)) for x in (entities, answers))
        questions = _written(question, QUESTION, asked, told)

        filler_length = size - n * (len(FACT) + len(QUESTION))
        self._filler[held_out] = filler = self._filler[held_out].to(device)
        starts = torch.randint(filler.numel() - filler_length + 1, (B, 1), generator=generator, device=device)
        place = torch.arange(filler_length, device=device)
        # Fact i stands before the filler's token `before[i]`.
        before = torch.randint(filler_length + 1, (B, n), generator=generator, device=device).sort(1).values
        begins = before + len(FACT) * torch.arange(n, device=device)
        facts_at = (begins[..., None] + torch.arange(len(FACT), device=device)).flatten(1)
        filler_at = place + len(FACT) * torch.searchsorted(before, place.expand(B, -1).contiguous(), right=True)
        body = filler.new_empty(B, size - n * len(QUESTION))
        body.scatter_(1, facts_at, facts.flatten(1)).scatter_(1, filler_at, filler[starts + place])

        at = torch.tensor([QUESTION.index("C"), QUESTION.index("D")], device=device) - 1
        positions = body.shape[1] + len(QUESTION) * torch.arange(n, device=device)[:, None] + at
        return Batch(torch.cat((body, questions.flatten(1)), 1), positions.expand(B, n, 2).contiguous(), told)

    def _distinct(self, held_out: bool, rows: int, generator: torch.Generator) -> Tensor:
        """Words of entities, from 0, [rows, items, 2], distinct in a row: one of each of ``items`` shares, mixed."""
        device = generator.device
        self.entities[held_out] = known = self.entities[held_out].to(device)
        share = known.shape[0] // self.items
        chosen = torch.randint(share, (rows, self.items), generator=generator, device=device)
        chosen = chosen + share * _permutations(rows, self.items, self.items, generator)
        return known[chosen]


def _written(template: Tensor, parts: Sequence[str], entities: Tensor, answers: Tensor) -> Tensor:
    """[B, n, len(parts)]: the template with entities and answers, [B, n, 2] each."""
    text = template.expand(*entities.shape[:2], -1).clone()
    for name, words in zip("ABCD", torch.cat((entities, answers), 2).unbind(2), strict=True):
        text[..., parts.index(name)] = words
    return text


TASKS: dict[str, Callable[[TaskPreset], Task]] = {"mqar": AssociativeRecall, "facts": Facts}


def training_batch(task: Task, preset: TaskPreset, seed: int, step: int, device: torch.device) -> Batch:
    """The batch of a step, a function of its arguments alone, so that a training can go on from any step."""
    size = preset.train_sizes[step % len(preset.train_sizes)]
    generator = torch.Generator(device).manual_seed(2 * (seed * 1_000_003 + step))
    return task.batch(size, max(1, preset.tokens_per_step // task.length(size)), False, generator)


def evaluation_batches(
    task: Task, preset: TaskPreset, size: int, most_tokens: int, device: torch.device
) -> list[Batch]:
    """The texts of ``size`` that every model of every seed is evaluated on, in batches of ``most_tokens`` or one."""
    generator = torch.Generator(device).manual_seed(2 * size + 1)  # training has even ones
    whole = task.batch(size, preset.eval_texts, True, generator)
    count = max(1, most_tokens // task.length(size))
    return [Batch(*parts) for parts in zip(*(tensor.split(count) for tensor in whole), strict=True)]
