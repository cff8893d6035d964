"""How words are spoken: an encoder-decoder from letters to phonemes, on the CMU Pronouncing Dictionary.

    python examples/grapheme_to_phoneme.py cmudict.dict.gz runs/g2p --arm ngpt --steps 600

One word in twenty, by a hash of its spelling, is held out, so that no pronunciation of a test word is seen in training;
half of these are for validation, half for the test. Prints phoneme and word error rate; of several pronunciations
the nearest counts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from pathlib import Path

import tokenizers
from tokenizers import models, pre_tokenizers

from spherelm.data.documents import read_lines
from spherelm.data.pairs import PairFiles, PairSettings, prepare_pairs
from spherelm.data.sources import parse_data
from spherelm.evaluate.translation import error_rates
from spherelm.generation.beam import BeamSettings, beam_search
from spherelm.recipes import make_run
from spherelm.runs.loading import load_model
from spherelm.train.trainer import train

END = "<|endoftext|>"
Words = dict[str, list[str]]


def read_dictionary(path: Path) -> Words:
    """Pronunciations by word: phonemes without stress marks, by spaces.
    Words with anything but letters and ' are left out.
    """
    words: Words = {}
    for line in read_lines(path):
        word, _, phonemes = line.partition("#")[0].strip().partition(" ")
        word, phonemes = re.sub(r"\(\d+\)$", "", word), re.sub(r"\d", "", phonemes)
        if re.fullmatch(r"[a-z']+", word) and phonemes not in words.setdefault(word, []):
            words[word].append(phonemes)
    return words


def split_of(word: str) -> str:
    """ "train", "val" or "test", by the word's hash."""
    return {0: "val", 1: "test"}.get(digest(word) % 40, "train")


def digest(word: str) -> int:
    """A number that the spelling decides, so that splits and samples are the same everywhere."""
    return int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")


def make_data(words: Words, out: Path) -> Path:
    """The directory of pairs; one token a letter and a phoneme,
    every pronunciation of a training word a pair of its own.
    """
    out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        chosen = [(word, spoken) for word in words if split_of(word) == split for spoken in words[word]]
        (out / f"{split}.letters").write_text("".join(f"{' '.join(word)}\n" for word, _ in chosen))
        (out / f"{split}.phonemes").write_text("".join(f"{spoken}\n" for _, spoken in chosen))
    tokens = sorted({t for word, spoken in words.items() for text in (" ".join(word), *spoken) for t in text.split()})
    tokenizer = tokenizers.Tokenizer(models.WordLevel({token: i for i, token in enumerate([END, *tokens])}, END))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(out / "tokenizer.json"))
    train_files, val_files = (PairFiles(out / f"{s}.letters", out / f"{s}.phonemes") for s in ("train", "val"))
    if not (out / "pairs").exists():
        settings = PairSettings(tokenizer=str(out / "tokenizer.json"), max_tokens=40)
        prepare_pairs(train_files, out / "pairs", val_files, settings)
    return out / "pairs"


def main() -> None:
    parser = argparse.ArgumentParser(description="Letters to phonemes.")
    parser.add_argument("dictionary", type=Path, help="cmudict.dict, also compressed")
    parser.add_argument("out", type=Path, help="directory for the data, the run and scores.json")
    parser.add_argument("--arm", choices=("gpt", "ngpt"), default="ngpt")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test-words", type=int, default=1000)
    asked = parser.parse_args()
    words = read_dictionary(asked.dictionary)
    data = make_data(words, asked.out)
    config = make_run(
        asked.arm,
        "pairs",
        vocab_size=parse_data(str(data)).vocab_size,
        data=str(data),
        lr=asked.lr,
        steps=asked.steps,
        seed=asked.seed,
        batch_size=64,
        seq_len=40,
    )
    run = asked.out / f"{asked.arm}-{asked.seed}"
    loss = train(config, run)
    model, tokenizer = load_model(run), tokenizers.Tokenizer.from_file(str(data / "tokenizer.json"))
    test = sorted((word for word in words if split_of(word) == "test"), key=digest)[: asked.test_words]
    letters = [tokenizer.encode(" ".join(word)).ids for word in test]
    found = beam_search(model, letters, 39, 0, BeamSettings(5))
    spoken = [tokenizer.decode(hypotheses[0].tokens) for hypotheses in found]
    rates = error_rates(spoken, [words[word] for word in test])
    scores = {
        "words": len(test),
        "validation_loss": loss,
        "phoneme_error_rate": rates["word_error_rate"],
        "word_error_rate": rates["text_error_rate"],
    }
    (run / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    print(json.dumps(scores, indent=2))


if __name__ == "__main__":
    main()
