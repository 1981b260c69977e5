"""`phase=tokenizer`: train the tokenizer and show what it makes of each domain."""

from __future__ import annotations

from typing import Any

from nano_think.data.report import report_table, token_report
from nano_think.files import write_json
from nano_think.phases.data import corpus_maker, load_corpus, load_tokenizer, tokenizer_maker
from nano_think.phases.run import Run


def run(run: Run) -> dict[str, Any]:
    """Bytes per token, length histogram and byte fallback on text the tokenizer was not trained on."""
    maker, corpus = tokenizer_maker(run), corpus_maker(run)
    run.obtain(corpus)
    path = run.obtain(maker, named=True)
    tokenizer = load_tokenizer(run, maker)
    report = token_report(tokenizer, load_corpus(run, corpus), "validation")
    run.console.print(report_table(report))
    write_json(run.dir / "tokens.json", report)
    return {"tokenizer": str(path), "hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size}
