"""`python -m tools.train_toy`: make the toy model, from the books to the scores."""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DIALOGUES_FOR_TOKENIZER = 20_000


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.train_toy", description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="books.jsonl.gz")
    parser.add_argument("--out", type=Path, default=ROOT / "src/penstock/toy")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("build/train_toy"),
        help="scratch folder: state to resume from, token caches",
    )
    parser.add_argument("--minutes", type=float, default=80, help="compute time to train for")
    parser.add_argument("--wall-minutes", type=float, default=600, help="cap by the clock")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--share", type=float, default=0.6, help="of dialogues in the tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--export-every", type=float, default=5, help="minutes")
    parser.add_argument(
        "--new-tokenizer", action="store_true", help="train a tokenizer even if --out has one"
    )
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--no-evaluate", action="store_true")
    return parser.parse_args()


def tokenizer_texts(corpus_path: Path, seed: int) -> Iterator[str]:
    from tools.train_toy import corpus, dialogues, template

    books = corpus.load_books(corpus_path, "train")
    for book in books:
        yield from (book[i : i + 20_000] for i in range(0, len(book), 20_000))
    maker = dialogues.Maker(random.Random(seed + 1), corpus.sentences_of(books))
    for _ in range(DIALOGUES_FOR_TOKENIZER):
        dialogue = maker.dialogue()
        yield template.render(dialogue.messages, dialogue.tools)


def main() -> None:
    options = parse()
    # Large buffers come and go in every step: keep them, rather than have the kernel map and
    # clear them anew each time. glibc reads these once, so they need a fresh process.
    keep = {"MALLOC_MMAP_THRESHOLD_": "8589934592", "MALLOC_TRIM_THRESHOLD_": "17179869184"}
    if not all(name in os.environ for name in keep):
        os.environ.update(keep)
        os.execv(sys.executable, [sys.executable, "-m", "tools.train_toy", *sys.argv[1:]])

    import torch
    from tokenizers import Tokenizer
    from tools.train_toy import tokenizer, train

    torch.set_num_threads(options.threads)
    if options.new_tokenizer or not (options.out / "tokenizer.json").exists():
        tokenizer.save(tokenizer.train(tokenizer_texts(options.corpus, options.seed)), options.out)
    settings = train.Options(
        options.corpus,
        options.out,
        options.work,
        options.minutes,
        options.wall_minutes,
        share=options.share,
        seed=options.seed,
        export_every=options.export_every,
        compile=not options.no_compile,
    )
    trainer = train.Trainer(settings, Tokenizer.from_file(str(options.out / "tokenizer.json")))
    finished = trainer.run()
    if finished and not options.no_evaluate:
        from tools.train_toy import evaluate

        evaluate.evaluate(options.out, options.corpus)


if __name__ == "__main__":
    main()
