from functools import partial

import numpy as np
import pytest
import torch

from nano_think.evals.pools import SharedForward
from nano_think.evals.tokens import CLASSES, collect_tokens, sample_documents, token_classes
from nano_think.experts.transformer import TransformerExpert
from nano_think.model import NanoThink
from nano_think.ops.layout import Layout

VOCAB, D = 40, 16


def make_batches(count=3, rows=4, fragments=2, width=6, seed=0):
    """Rows of `fragments` documents each; uid % 2 is the domain of the row; a masked label ends each."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        domain = torch.randint(0, 2, (rows,), generator=generator)
        uid = 10 + domain[:, None] + 2 * torch.randint(0, 6, (rows, fragments), generator=generator)
        segments = torch.arange(fragments).repeat_interleave(width).expand(rows, -1)
        tokens = torch.randint(0, VOCAB, segments.shape, generator=generator)
        labels = tokens.roll(-1, dims=1)
        labels[:, width - 1 :: width] = -100
        batches.append({
            "tokens": tokens,
            "labels": labels,
            "segments": segments.contiguous(),
            "positions": torch.arange(width).repeat(fragments).expand(rows, -1).contiguous(),
            "doc_uid": uid.repeat_interleave(width, dim=1),
            "domain": domain,
        })  # fmt: skip
    return batches


@pytest.mark.parametrize(
    ("token", "name"),
    [
        (b" the", "word_start"),
        (b"_name", "word_start"),
        (b"(self", "word_start"),
        (b"\nThe", "word_start"),
        (b"ing", "word_rest"),
        (b"'ll", "word_rest"),
        ("été".encode(), "word_rest"),
        (b"19", "number"),
        (b" 7", "number"),
        (b"." + b"\n", "punctuation"),
        (b" \"", "punctuation"),
        ("—".encode(), "punctuation"),
        (b"):", "punctuation"),
        (b" ==", "code_symbol"),
        (b"])", "code_symbol"),
        (b"    ", "blank"),
        (b"\t", "blank"),
        (b"\n\n", "newline"),
        (b"  \r\n", "newline"),
        (b"\xc3", "byte"),
        (b"\xe2\x80", "byte"),
        (b"", "special"),
    ],
)  # fmt: skip
def test_class_of_a_token(token, name):
    assert CLASSES[token_classes([token])[0]] == name


def test_classes_of_a_vocabulary(byte_tokenizer):
    found = token_classes([byte_tokenizer.token_bytes(i) for i in range(byte_tokenizer.vocab_size)])
    assert found.shape == (259,)
    assert [CLASSES[i] for i in found[-3:]] == ["special"] * 3
    count = {name: int((found == i).sum()) for i, name in enumerate(CLASSES)}
    assert count["number"] == 10
    assert count["word_rest"] == 52
    assert count["byte"] == 128


def test_a_sample_is_made_of_whole_documents_and_drops_empty_rows():
    batches = make_batches()
    uid = torch.cat([b["doc_uid"][b["labels"] >= 0] for b in batches])
    whole = dict(zip(*(column.tolist() for column in uid.unique(return_counts=True)), strict=True))
    sample = sample_documents(batches, 30, seed=1)
    found = torch.cat([b["doc_uid"][b["labels"] >= 0] for b in sample])
    drawn = dict(zip(*(column.tolist() for column in found.unique(return_counts=True)), strict=True))
    assert drawn == {key: whole[key] for key in drawn}
    assert 30 <= len(found) < 30 + max(whole.values())
    assert all(bool((b["labels"] >= 0).any(1).all()) for b in sample)
    assert all({len(value) for value in b.values()} == {len(b["domain"])} for b in sample)
    assert sum(len(b["domain"]) for b in sample) < 12
    again = sample_documents(batches, 30, seed=2)
    assert set(drawn) != set(torch.cat([b["doc_uid"][b["labels"] >= 0] for b in again]).tolist())
    for everything in (None, 10**6):
        kept = sample_documents(batches, everything)
        assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(kept, batches, strict=True))
    assert int(sum((b["labels"] >= 0).sum() for b in batches)) == len(uid)  # the given batches are untouched


def test_of_long_documents_the_first_labels_are_taken():
    batches = make_batches(4)
    sample = sample_documents(batches, None, max_per_document=7)
    uid = torch.cat([b["doc_uid"][b["labels"] >= 0] for b in sample])
    whole = torch.cat([b["doc_uid"][b["labels"] >= 0] for b in batches])
    labels, every = (torch.cat([b["labels"][b["labels"] >= 0] for b in some]) for some in (sample, batches))
    for key in whole.unique():
        assert torch.equal(labels[uid == key], every[whole == key][:7])
    few, many = (sample_documents(batches, 30, max_per_document=cap) for cap in (None, 5))
    documents = [
        len(torch.cat([b["doc_uid"][b["labels"] >= 0] for b in some]).unique()) for some in (few, many)
    ]
    assert documents[0] < documents[1] == 6
    masked = [batch | {"labels": torch.full_like(batch["labels"], -100)} for batch in batches]
    assert sample_documents(masked, 10) == []


@pytest.mark.parametrize("fusion", ["hidden", "prob"])
def test_table_of_tokens_holds_what_forced_weights_give(fusion, randomise):
    expert = partial(TransformerExpert, num_layers=1, num_heads=2, ffn_dim=20)
    names = ["a", "b", "c"]
    model = randomise(NanoThink(dict.fromkeys(names, expert), VOCAB, D, fusion=fusion)).eval()
    for i, part in enumerate(model.experts.values()):
        randomise(part, seed=i + 1)
    batches, classes = make_batches(2), np.arange(VOCAB) % 9
    table = collect_tokens(SharedForward(model), batches, classes)
    assert len(table) == sum(int((b["labels"] >= 0).sum()) for b in batches)
    start = 0
    for batch in batches:
        arguments = (batch["tokens"], batch["labels"], Layout(batch["positions"], batch["segments"]))
        scored = batch["labels"] >= 0
        part = slice(start, start := start + int(scored.sum()))
        with torch.no_grad():
            assert table.fused[part] == pytest.approx(model.token_nll(*arguments)[scored].numpy(), abs=1e-5)
            for i, name in enumerate(names):
                alone = model.token_nll(*arguments, weights=torch.eye(3)[i])[scored].numpy()
                without = model.token_nll(*arguments, knock_out=[name])[scored].numpy()
                assert table.nll[part, i] == pytest.approx(alone, abs=1e-5)
                assert table.without[part, i] == pytest.approx(without, abs=1e-5)
        assert (table.uid[table.document[part]] == batch["doc_uid"][scored].numpy()).all()
        assert (table.position[part] == batch["positions"][scored].numpy()).all()
        assert (table.token_class[part] == batch["labels"][scored].numpy() % 9).all()
        assert (table.domain[part] == (batch["doc_uid"][scored].numpy() % 2)).all()
    assert table.weights.sum(1) == pytest.approx(np.ones(len(table)), abs=1e-5)
    losses = table.losses(table.fused, 2)
    assert losses.loss() == pytest.approx(table.fused.mean())
    assert losses.loss(1) == pytest.approx(table.fused[table.domain == 1].mean())


def test_nothing_to_compare_is_refused():
    expert = partial(TransformerExpert, num_layers=1, num_heads=2, ffn_dim=20)
    classes = np.zeros(VOCAB, np.int64)
    lone = NanoThink({"a": expert}, VOCAB, D).eval()
    with pytest.raises(ValueError, match="two or more"):
        collect_tokens(SharedForward(lone), make_batches(1), classes)
    pair = NanoThink({"a": expert, "b": expert}, VOCAB, D).eval()
    with pytest.raises(ValueError, match="no scored token"):
        collect_tokens(SharedForward(pair), [], classes)
