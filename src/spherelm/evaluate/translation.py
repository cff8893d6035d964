"""How good written texts are beside reference texts: BLEU and chrF by sacrebleu, and error rates by edit distance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spherelm.counting import counted
from spherelm.errors import UserError

BOOTSTRAP = 1000
"""Samples of the texts, drawn with replacement, that intervals are read off."""


def translation_scores(written: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Every score of `written` texts against one or more sets of references, each as many texts in the same order.

    bleu (Papineni et al., 2002; cased, tokenized by sacrebleu's "13a"), chrf (Popovic, 2015; chrF2): each "value", in
    percent, with the half width "interval" of its 95 % interval over bootstrap samples of the texts, and sacrebleu's
    "signature", which says all that a number depends on. word_error_rate, text_error_rate: as in `error_rates`. Raises
    ValueError for no texts, different numbers of them, or where sacrebleu is missing.
    """
    check_references(written, references)
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise UserError("BLEU and chrF need sacrebleu: pip install '.[eval]' in a clone of spherelm") from error
    scores: dict[str, Any] = {"texts": len(written)}
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        found = metric.corpus_score(list(written), [list(texts) for texts in references], n_bootstrap=BOOTSTRAP)
        signature = str(metric.get_signature())
        scores[name] = {"value": float(found.score), "interval": float(found._ci), "signature": signature}
    alternatives = list(zip(*references, strict=True))
    return {**scores, **error_rates(written, alternatives)}


def check_references(written: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Raise ValueError unless there are texts and as many references in each set."""
    if not written or not references:
        raise UserError("there is nothing to score: give texts and references")
    for texts in references:
        if len(texts) != len(written):
            raise UserError(
                f"{counted(len(written), 'text')} and {counted(len(texts), 'reference')}: one line must belong to one line"
            )


def error_rates(written: Sequence[str], alternatives: Sequence[Sequence[str]]) -> dict[str, float]:
    """Of texts that are lists of words: how many words are wrong, and how many texts.

    alternatives: for each text the references that it may equal; the nearest counts. word_error_rate: insertions,
    deletions and substitutions over the words of the references (of phonemes, the phoneme error rate). text_error_rate:
    the part of the texts that equal none of theirs (of pronunciations, the word error rate).
    """
    errors = words = wrong = 0
    for text, references in zip(written, alternatives, strict=True):
        own = text.split()
        distances = [(edit_distance(own, other.split()), len(other.split())) for other in references]
        distance, length = min(distances, key=lambda pair: pair[0] / max(1, pair[1]))
        errors, words, wrong = errors + distance, words + length, wrong + (distance > 0)
    return {"word_error_rate": errors / max(1, words), "text_error_rate": wrong / len(written)}


def edit_distance(one: Sequence[str], other: Sequence[str]) -> int:
    """The fewest insertions, deletions and substitutions that make one sequence the other (Levenshtein)."""
    row = list(range(len(other) + 1))
    for i, mine in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, theirs in enumerate(other, 1):
            before, row[j] = row[j], min(before + (mine != theirs), row[j] + 1, row[j - 1] + 1)
    return row[-1]
