"""The held-out check: greedy answers to combinations that training never showed.

The checkpoint is read back as others will read it, by `transformers` from the exported folder.
An answer counts if it is right to the letter; JSON and the arguments of calls count if they parse
to the expected values.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tools.train_toy import corpus
from tools.train_toy.dialogues import CATEGORIES, Dialogue, Maker
from tools.train_toy.template import Message, render
from transformers import AutoModelForCausalLM

PER_CATEGORY = 60
SEED = 31_337  # of the check; training draws from other seeds, and rejects held-out combinations
_CALL = re.compile(r"<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)


def held_out_dialogues(sentences: list[str], per_category: int) -> list[Dialogue]:
    """As many dialogues of each category, none asking the same thing of the same tools twice."""
    maker = Maker(random.Random(SEED), sentences)
    found: dict[str, list[Dialogue]] = {category: [] for category in CATEGORIES}
    seen: set[str] = set()
    for _ in range(200_000):
        dialogue = maker.dialogue()
        key = render(dialogue.messages[:-1], dialogue.tools)
        if dialogue.fresh and key not in seen and len(found[dialogue.category]) < per_category:
            seen.add(key)
            found[dialogue.category].append(dialogue)
            if all(len(dialogues) == per_category for dialogues in found.values()):
                break
    return [dialogue for dialogues in found.values() for dialogue in dialogues]


def _calls(text: str) -> list[Any] | None:
    try:
        return [json.loads(body) for body in _CALL.findall(text)]
    except ValueError:
        return None


def is_right(expected: Message, answer: str) -> bool:
    if "tool_calls" in expected:
        wanted = [call["function"] for call in expected["tool_calls"]]
        return not _CALL.sub("", answer).strip() and _calls(answer) == wanted
    if expected["content"].startswith("{"):
        try:
            return json.loads(answer) == json.loads(expected["content"])
        except ValueError:
            return False
    return answer == expected["content"]


class Greedy:
    """Batched greedy decoding with an exported checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.end = self.model.generation_config.eos_token_id

    @torch.no_grad()
    def answers(self, prompts: list[str], limit: int = 128, rows: int = 16) -> list[str]:
        encoded = [self.tokenizer.encode(prompt).ids for prompt in prompts]
        order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
        answers = [""] * len(prompts)
        for start in range(0, len(order), rows):
            group = order[start : start + rows]
            longest = max(len(encoded[i]) for i in group)
            # Padding goes to the left, so that every row goes on from its own end.
            pads = [longest - len(encoded[i]) for i in group]
            tokens = [[0] * pad + encoded[i] for pad, i in zip(pads, group, strict=True)]
            mask = [[0] * pad + [1] * (longest - pad) for pad in pads]
            out = self.model.generate(
                torch.tensor(tokens),
                attention_mask=torch.tensor(mask),
                max_new_tokens=limit,
                do_sample=False,
            )
            for i, row in zip(group, out[:, longest:].tolist(), strict=True):
                stops = [at for at, token in enumerate(row) if token in self.end]
                answers[i] = self.tokenizer.decode(row[: stops[0] if stops else None])
        return answers

    @torch.no_grad()
    def prose_loss(self, books: list[str], window: int, windows: int = 40) -> tuple[float, float]:
        """Mean loss per token and bits per byte, over evenly spaced windows of the books."""
        loss, count, size = 0.0, 0, 0
        text = "\n\n".join(books)
        for i in range(windows):
            start = i * (len(text) // windows)
            tokens = self.tokenizer.encode(text[start : start + 8 * window]).ids[:window]
            ids = torch.tensor([tokens])
            loss += self.model(ids, labels=ids).loss.item() * (len(tokens) - 1)
            count += len(tokens) - 1
            size += len(self.tokenizer.decode(tokens[1:]).encode())
        return loss / count, loss / size / math.log(2)


def evaluate(
    folder: Path, corpus_path: Path, per_category: int = PER_CATEGORY, mistakes: Path | None = None
) -> dict[str, Any]:
    """Score a checkpoint and write eval.json beside it."""
    books = corpus.load_books(corpus_path, "valid")
    # What people say in the check comes from books that training has not read.
    dialogues = held_out_dialogues(corpus.sentences_of(books), per_category)
    greedy = Greedy(folder)
    prompts = [render(d.messages[:-1], d.tools, add_generation_prompt=True) for d in dialogues]
    answers = greedy.answers(prompts)
    scores: dict[str, list[bool]] = defaultdict(list)
    wrong: list[str] = []
    for dialogue, prompt, answer in zip(dialogues, prompts, answers, strict=True):
        right = is_right(dialogue.messages[-1], answer)
        scores[dialogue.category].append(right)
        if not right:
            wrong.append(
                f"[{dialogue.category}]\n{prompt}{answer}\n-- expected: {dialogue.messages[-1]}\n"
            )
    if mistakes:
        mistakes.write_text("\n".join(wrong))
    report = {
        "decoding": "greedy, exact match",
        "accuracy": round(sum(map(sum, scores.values())) / len(dialogues), 4),
        "dialogues": len(dialogues),
        "categories": {
            name: {"right": sum(found), "of": len(found)} for name, found in scores.items()
        },
        "prose": {},
    }
    for window in (512, 2048):
        loss, bits = greedy.prose_loss(books, window)
        report["prose"][str(window)] = {
            "loss": round(loss, 4),
            "perplexity": round(math.exp(loss), 2),
            "bits_per_byte": round(bits, 4),
        }
    (folder / "eval.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=Path("src/penstock/toy"))
    parser.add_argument("--per-category", type=int, default=PER_CATEGORY)
    parser.add_argument("--mistakes", type=Path, help="file for the wrong answers")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    evaluate(options.model, options.corpus, options.per_category, options.mistakes)


if __name__ == "__main__":
    main()
