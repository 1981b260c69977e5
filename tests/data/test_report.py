from __future__ import annotations

import json
from itertools import chain

import pytest
from rich.console import Console

from nano_think.data.report import bytes_per_token, report_table, shard_report, token_report
from nano_think.data.shards import build_shards
from nano_think.errors import UserError
from nano_think.tokenizer import train_bpe

TEXTS = {
    "expert_train": {"prose": ["the the the the", "☕ the", "", "the " * 40], "foreign": ["東京" * 5]},
    "test": {"prose": ["the"]},
}


@pytest.fixture
def tokenizer():
    return train_bpe(["the the the the the"], 262)


def test_figures_equal_a_count_by_hand(write_corpus, tokenizer) -> None:
    report = token_report(tokenizer, write_corpus(TEXTS), "expert_train")
    texts = TEXTS["expert_train"]["prose"]
    ids = [tokenizer.encode(text) for text in texts]
    flat = list(chain(*ids))
    figures = report["domains"]["prose"]
    assert figures["documents"] == 4
    assert figures["tokens"] == len(flat)
    assert figures["bytes"] == sum(len(text.encode()) for text in texts)
    assert figures["bytes_per_token"] == figures["bytes"] / len(flat)
    one_byte = [tokenizer.token_bytes(i) for i in flat if len(tokenizer.token_bytes(i)) == 1]
    assert figures["single_byte_share"] == len(one_byte) / len(flat)
    assert figures["byte_fallback_share"] == sum(byte >= b"\x80" for byte in one_byte) / len(flat) > 0
    assert figures["vocab_used"] == len(set(flat)) / 259
    assert figures["mean_length"] == len(flat) / 4
    for bound in figures["length_histogram"]:
        lower = bound["below"] // 2 if bound["below"] > 16 else 0
        assert bound["documents"] == sum(lower <= len(one) < bound["below"] for one in ids)
    assert sum(bound["documents"] for bound in figures["length_histogram"]) == 4
    assert report["domains"]["foreign"]["byte_fallback_share"] == 1.0
    assert json.loads(json.dumps(report)) == report


def test_shards_give_the_same_report(write_corpus, tokenizer, tmp_path) -> None:
    corpus = write_corpus(TEXTS)
    shards = build_shards(corpus, tokenizer, tmp_path / "shards")
    for split in ("expert_train", "test", "fusion_train"):
        assert shard_report(tokenizer, shards, split) == token_report(tokenizer, corpus, split)
    with pytest.raises(UserError, match="were made by tokenizer"):
        shard_report(train_bpe(["x"], 259), shards, "test")


def test_bytes_per_token(write_corpus, tokenizer) -> None:
    corpus = write_corpus(TEXTS)
    assert bytes_per_token(tokenizer, corpus, "test") == {"foreign": 0.0, "prose": 3.0}


def test_table_names_every_domain(write_corpus, tokenizer) -> None:
    console = Console(width=160, record=True)
    console.print(report_table(token_report(tokenizer, write_corpus(TEXTS), "expert_train")))
    text = console.export_text()
    assert "prose" in text
    assert "foreign" in text
    assert "100.00%" in text
