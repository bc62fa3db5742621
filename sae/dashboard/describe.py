"""What a latent does, in words that follow from its statistics: no model is asked.

words = Describer(stats, texts, special)
words.about(17)          # “snow”, “ice” (84 % of its activation), after “the”. Speaks for “cold”. Tells weather=snowy (AUROC 0.97).
words.warnings(17)       # what makes its evidence thin
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np

from sae.latents import LatentStats

LABEL = 60
"""Characters of a label at most."""
_NAMED = 3
"""Tokens named at most."""
_MOST = 0.8
"""Share of the activation that the named tokens should have, and of the contexts that a place should hold in."""
_CONTEXTS = 5
"""Contexts below which nothing is said of places."""
_FEW_TOKENS = 10
_DENSE = 0.2
_DISAGREE = 0.2
_SENTENCE_ENDS = (".", "!", "?", "…", "。", "！", "？")


class Describer:
    """Descriptions of the latents of `stats`. `texts[i]` is what token i looks like; `special` tokens stand for no text."""

    def __init__(
        self,
        stats: LatentStats,
        texts: Sequence[str],
        special: Collection[int] = (),
        directions: bool = False,
    ) -> None:
        self.stats, self.texts, self.special, self.directions = stats, texts, special, directions
        self.one_document = stats.one_document & (not stats.one_document[stats.count > 0].all())
        place = stats.row_start[stats.example_row] + stats.example_position
        first, last = stats.row_start[stats.example_row], stats.row_start[stats.example_row + 1] - 1
        self.before = np.where(place > first, stats.row_tokens[np.maximum(place - 1, first)], -1)
        self.after = np.where(place < last, stats.row_tokens[np.minimum(place + 1, last)], -1)

    def about(self, latent: int, concept: tuple[str, float] | None = None) -> str:
        """A few sentences on its tokens, where they stand, which tokens it speaks for, and the concept that it tells best."""
        stats = self.stats
        if not stats.count[latent]:
            return f"Silent on all {stats.n_tokens:,} tokens."
        tokens, share = self._tokens(latent)
        where = self._where(latent)
        parts = [
            f"{tokens} ({share:.0%} of its activation)".replace("%", " %")
            + (f", {where}" if where else "")
            + "."
        ]
        if stats.logit_ids is not None and not self.directions:
            parts.append(f"Speaks for {self._named(stats.logit_ids[latent, :10].tolist())}.")
        if concept is not None:
            parts.append(f"Tells {concept[0]} (AUROC {concept[1]:.2f}).")
        return " ".join(parts)

    def label(self, latent: int) -> str:
        """The same in at most 60 characters: its tokens, and where they stand if that fits."""
        if not self.stats.count[latent]:
            return "silent"
        tokens, _ = self._tokens(latent)
        where = self._where(latent)
        whole = f"{tokens}, {where}" if where else tokens
        if len(whole) <= LABEL:
            return whole
        return tokens if len(tokens) <= LABEL else tokens[: LABEL - 1] + "…"

    def warnings(self, latent: int) -> list[str]:
        """What to bear in mind before believing anything of this latent."""
        stats = self.stats
        count, density = int(stats.count[latent]), float(stats.density[latent])
        found = []
        if 0 < count < _FEW_TOKENS:
            found.append("active on one token only" if count == 1 else f"active on {count} tokens only")
        elif count and self.one_document[latent]:
            found.append("active in one document only")
        if self.directions:
            return found
        if density > _DENSE:
            found.append(f"dense: active on {density:.0%} of tokens".replace("%", " %"))
        if stats.encoder_cosine[latent] < _DISAGREE:
            found.append(
                f"encoder and decoder disagree: cosine {stats.encoder_cosine[latent]:.2f}".replace("-", "−")
            )
        return found

    def _tokens(self, latent: int) -> tuple[str, float]:
        """Its tokens, named, and their share of its activation."""
        stats = self.stats
        known = stats.token_ids[latent] >= 0
        ids, shares = stats.token_ids[latent][known].tolist(), stats.token_share[latent][known]
        needed = int(np.searchsorted(np.cumsum(shares), _MOST)) + 1
        if needed <= _NAMED:
            return self._named(ids[:needed]), float(shares[:needed].sum())
        kind = self._kind(ids)
        if kind:
            return f"{kind} such as {self._named(ids)}", float(shares.sum())
        if shares.sum() < 0.5:
            return f"many tokens, such as {self._named(ids)}", float(shares[:_NAMED].sum())
        return self._named(ids), float(shares[:_NAMED].sum())

    def _kind(self, ids: Sequence[int]) -> str | None:
        """What its tokens have in common, if they are several and it is plain to see."""
        words = [self.texts[i].strip() for i in ids]
        if len(set(words)) < 4 or not all(words):
            return None
        if all(word.isdigit() for word in words):
            return "numbers"
        if not any(character.isalnum() for word in words for character in word):
            return "punctuation"
        if all(word[0].isupper() for word in words):
            return "capitalised words"
        return None

    def _where(self, latent: int) -> str | None:
        """Where its strongest tokens stand, if most stand alike."""
        part = slice(self.stats.example_start[latent], self.stats.example_start[latent + 1])
        strongest = self.stats.example_interval[part] == 0
        before = Counter(self.before[part][strongest].tolist())
        after = Counter(self.after[part][strongest].tolist())
        n = before.total()
        if n < _CONTEXTS:
            return None

        def share(counter: Counter[int], holds: Collection[int]) -> float:
            return sum(counter[i] for i in holds) / n

        if share(before, [i for i in before if i < 0 or i in self.special]) >= _MOST:
            return "at the start of the text"
        if share(before, [i for i in before if i >= 0 and self._ends_sentence(i)]) >= _MOST:
            return "at the start of a sentence"
        if share(after, [i for i in after if i >= 0 and self._ends_sentence(i)]) >= _MOST:
            return "at the end of a sentence"
        for counter, word in ((before, "after"), (after, "before")):
            token, times = counter.most_common(1)[0]
            if times >= _MOST * n and token >= 0 and token not in self.special:
                return f"{word} {self._quoted(token)}"
        return None

    def _ends_sentence(self, token: int) -> bool:
        text = self.texts[token].strip(" ")
        return text.endswith(_SENTENCE_ENDS) or text[:1] in ("\n", "↵")

    def _named(self, ids: Sequence[int]) -> str:
        """The first three different words."""
        words: dict[str, str] = {}
        for i in ids:
            words.setdefault(self.texts[i].strip().lower(), self._quoted(i))
        first = list(words.values())[:_NAMED]
        return ", ".join(first)

    def _quoted(self, token: int) -> str:
        text = self.texts[token]
        return f"“{text.strip(' ') or text}”"
