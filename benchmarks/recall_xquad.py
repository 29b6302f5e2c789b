"""Recall on XQuAD: does a question find its paragraph? Memory heads and words together, against each alone.

    python benchmarks/recall_xquad.py --data DIR --model smollm2-135m

Every paragraph is written as a source of its own and every question is asked of the whole bank. BM25 ranks whole
paragraphs; recall ranks passages, and a paragraph counts where its first passage stands, after the passages of
other paragraphs. The share of the word score is chosen on the articles with even numbers, and reported on those with
odd numbers as well as on all. (How remembered tokens are damped, which layers are asked, the length of passages and
BM25's k1 and b were chosen on all of them, so only the share is held out.)
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import torch
from bm25s.stopwords import STOPWORDS_EN_PLUS

from longmem.backbone import Backbone
from longmem.bank import BankEntry, MemoryBank
from longmem.config import SideNetConfig
from longmem.errors import SideNetNotFoundError
from longmem.model import LongMem
from longmem.recall import WORDS, PassageIndex, recall

RESULTS = Path(__file__).parent / "results" / "recall_xquad.json"
HEADS = [(17, 1), (18, 2), (20, 2), (23, 0), (23, 1), (23, 2)]
SHARES = [round(0.05 * step, 2) for step in range(21)]


def load_questions(folder: Path) -> tuple[list[str], list[tuple[str, int, int]]]:
    """Paragraphs, and (question, its paragraph, its article)."""
    paragraphs, questions = [], []
    articles = [a for file in sorted(folder.glob("*.json")) for a in json.loads(file.read_text())["data"]]
    for number, article in enumerate(articles):
        for paragraph in article["paragraphs"]:
            questions += [(qa["question"], len(paragraphs), number) for qa in paragraph["qas"]]
            paragraphs.append(paragraph["context"])
    return paragraphs, questions


def load_model(name: str) -> tuple[LongMem, bool]:
    """A trained SideNet, or an untrained one where there is none; and whether it is trained."""
    try:
        return LongMem.from_pretrained(name), True
    except SideNetNotFoundError:
        return LongMem(Backbone.from_pretrained(name), SideNetConfig.around(HEADS, 30)).eval(), False


def remember(model: LongMem, paragraphs: list[str], kept: Path | None) -> MemoryBank:
    """A bank of the paragraphs, read from a folder if they were encoded before (keys do not depend on the SideNet)."""
    bank = model.new_bank()
    if kept is not None and kept.exists():
        for entry in torch.load(kept, weights_only=True):
            bank.append(BankEntry(**entry))
        return bank
    for number, paragraph in enumerate(paragraphs):
        model.write_text(bank, paragraph, source=str(number))
    if kept is not None:
        entries = []
        for number, paragraph in enumerate(paragraphs):
            own = bank.source_index_N == number
            entries.append(
                {
                    "source": str(number),
                    "text": paragraph,
                    "char_start": 0,
                    "token_ids_N": bank.token_ids_N[own],
                    "offsets_N2": bank.offsets_N2[own],
                    "keys_HNE": bank.keys_HNE[:, own],
                    "values_HNE": bank.values_HNE[:, own],
                }
            )
        torch.save(entries, kept)
    return bank


def bm25_ranks(paragraphs: list[str], questions: list[tuple[str, int, int]], parameters: dict[str, Any]) -> np.ndarray:
    """Rank (0 is first) of each question's paragraph by BM25 over whole paragraphs; ties are shared."""
    options: dict[str, Any] = {"stopwords": STOPWORDS_EN_PLUS, "return_ids": False, "show_progress": False}
    index = bm25s.BM25(**parameters)
    index.index(bm25s.tokenize(paragraphs, **options), show_progress=False)
    ranks = []
    asked: Any = bm25s.tokenize([text for text, _, _ in questions], **options)
    for words, (_, paragraph, _) in zip(asked, questions, strict=True):
        score = np.asarray(index.get_scores(words)) if words else np.zeros(len(paragraphs))
        ranks.append((score > score[paragraph]).sum() + ((score == score[paragraph]).sum() - 1) / 2)
    return np.array(ranks)


def rank(sources: list[str], wanted: str) -> int:
    """Hits before the first one of the wanted paragraph: several passages of another paragraph all count."""
    return sources.index(wanted) if wanted in sources else len(sources)


def figures(ranks: np.ndarray) -> dict[str, float]:
    return {
        "recall@1": round(float((ranks < 1).mean()), 4),
        "recall@5": round(float((ranks < 5).mean()), 4),
        "mrr": round(float((1 / (1 + ranks)).mean()), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Recall on XQuAD.")
    parser.add_argument("--data", type=Path, required=True, help="folder of XQuAD JSON files")
    parser.add_argument("--model", default="smollm2-135m", help="SideNet by name or folder, or a backbone")
    parser.add_argument("--bank", type=Path, help="file that keeps the encoded paragraphs between runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    paragraphs, questions = load_questions(arguments.data)
    model, trained = load_model(arguments.model)
    bank = remember(model, paragraphs, arguments.bank)
    index = PassageIndex(bank)
    started = time.perf_counter()
    ranks: dict[float, list[int]] = {share: [] for share in (*SHARES, WORDS)}
    for text, paragraph, _ in questions:
        # Every passage with both of its scores; the shares are then cheap to compare.
        hits = recall(model, bank, text, top_k=len(index.passages), words=0.5, index=index)
        memory, word = np.array([(hit.memory_score, hit.word_score) for hit in hits]).T
        for share in ranks:
            order = np.argsort(-((1 - share) * memory + share * word), kind="stable")
            ranks[share].append(rank([hits[i].source for i in order], str(paragraph)))
    seconds = (time.perf_counter() - started) / len(questions)
    by_share = {share: np.array(values) for share, values in ranks.items()}
    article = np.array([number for _, _, number in questions])
    subsets = {
        "chosen_on": article % 2 == 0,
        "held_out": article % 2 == 1,
        "all": np.ones_like(article, dtype=bool),
    }
    chosen = max(SHARES, key=lambda share: figures(by_share[share][subsets["chosen_on"]])["mrr"])
    paragraphs_only = {
        "bm25_paragraphs": bm25_ranks(paragraphs, questions, {"k1": 0.9, "b": 0.4}),
        "bm25_paragraphs_bm25s_defaults": bm25_ranks(paragraphs, questions, {}),
    }
    report = {
        "model": arguments.model,
        "sidenet": "trained" if trained else "untrained",
        "paragraphs": len(paragraphs),
        "passages": len(index.passages),
        "tokens": len(bank),
        "questions": len(questions),
        "seconds_per_question": round(seconds, 3),
        "share_of_words_default": WORDS,
        "share_of_words_best_on_chosen_on": chosen,
    }
    for subset_name, subset in subsets.items():
        report[subset_name] = {
            "questions": int(subset.sum()),
            **{name: figures(values[subset]) for name, values in paragraphs_only.items()},
            "words_alone": figures(by_share[1.0][subset]),
            "memory_heads_alone": figures(by_share[0.0][subset]),
            "fused_default": figures(by_share[WORDS][subset]),
            "fused_chosen": figures(by_share[chosen][subset]),
        }
    report["by_share"] = {str(share): figures(by_share[share]) for share in SHARES}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
