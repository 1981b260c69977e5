import inspect
import math
import re
import textwrap
import time
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from nano_think.evals.ngram import KneserNey

BOS, EOS = 0, 1


def stream_of(documents):
    """Concatenate documents (lists of ids without specials) to (tokens, doc_starts)."""
    whole = [[BOS, *document, EOS] for document in documents]
    starts = np.cumsum([0, *(len(document) for document in whole)])[:-1]
    return np.concatenate(whole), starts


def random_documents(count, vocab_size, seed, longest=12):
    rng = np.random.default_rng(seed)
    return [(2 + rng.zipf(1.6, rng.integers(0, longest)) % (vocab_size - 2)).tolist() for _ in range(count)]


class TextbookKneserNey:
    """The recursion spelled out with dictionaries and sets, after Chen & Goodman (1999)."""

    def __init__(self, documents, order, vocab_size):
        self.order, self.vocab_size = order, vocab_size
        whole = [[BOS, *document, EOS] for document in documents]
        self.counts = {}
        for k in range(1, order + 1):
            occurrences, left = Counter(), defaultdict(set)
            for document in whole:
                for i in range(len(document) - k + 1):
                    gram = tuple(document[i : i + k])
                    if i == 0 and k == 1:
                        continue
                    if k == order or i == 0:
                        occurrences[gram] += 1
                    else:
                        left[gram].add(document[i - 1])
            self.counts[k] = occurrences + Counter({gram: len(seen) for gram, seen in left.items()})
        self.discounts = {}
        for k, counts in self.counts.items():
            n1, n2 = (sum(count == n for count in counts.values()) for n in (1, 2))
            self.discounts[k] = n1 / (n1 + 2 * n2) if n1 else 0.5

    def probability(self, context, token):
        context = tuple(context)[-(self.order - 1) :] if self.order > 1 else ()
        k = len(context) + 1
        lower = 1 / self.vocab_size if k == 1 else self.probability(context[1:], token)
        followers = {g: c for g, c in self.counts[k].items() if g[:-1] == context}
        if not followers:
            return lower
        total, d = sum(followers.values()), self.discounts[k]
        count = followers.get((*context, token), 0)
        return max(count - d, 0) / total + d * len(followers) / total * lower


CONTEXTS = [[], [BOS], [BOS, 3], [BOS, 3, 2], [3, 2], [2, 4, 3], [5], [11, 11], [2, 2, 2, 2]]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_equals_the_textbook(order):
    documents = random_documents(25, 12, seed=order)
    slow = TextbookKneserNey(documents, order, 12)
    fast = KneserNey.fit([stream_of(documents)], order=order, vocab_size=12)
    assert fast.discounts == pytest.approx([slow.discounts[k] for k in range(1, order + 1)])
    assert fast.num_ngrams == [len(slow.counts[k]) for k in range(1, order + 1)]
    for context in CONTEXTS:
        expected = [slow.probability(context, token) for token in range(12)]
        assert fast.probabilities(context) == pytest.approx(expected, rel=1e-12), context


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_sum_to_one_and_are_positive(order):
    model = KneserNey.fit([stream_of(random_documents(200, 50, seed=1))], order=order, vocab_size=50)
    for context in [*CONTEXTS, [40, 41], [49, 49, 49]]:
        p = model.probabilities(context)
        assert p.sum() == pytest.approx(1, abs=1e-12)
        assert p.min() > 0


def test_hand_values():
    """One document `BOS a b a b EOS`, bigram, V = 4 with a = 2, b = 3."""
    model = KneserNey.fit([stream_of([[2, 3, 2, 3]])], order=2, vocab_size=4)
    # bigrams: (BOS,a) 1, (a,b) 2, (b,a) 1, (b,EOS) 1 -> n1 = 3, n2 = 1; left neighbours: a 2, b 1, EOS 1
    assert model.discounts == pytest.approx([2 / 4, 3 / 5])
    unigram = {EOS: 0.5 / 4, 2: 1.5 / 4, 3: 0.5 / 4}
    floor = 0.5 * 3 / 4 / 4
    p = model.probabilities([2])
    assert p[3] == pytest.approx((2 - 0.6) / 2 + 0.6 / 2 * (unigram[3] + floor))
    assert p[BOS] == pytest.approx(0.6 / 2 * floor)


def test_several_streams_equal_one():
    documents = random_documents(40, 20, seed=3)
    one = KneserNey.fit([stream_of(documents)], order=3, vocab_size=20)
    two = KneserNey.fit([stream_of(documents[:15]), stream_of(documents[15:])], order=3, vocab_size=20)
    for context in CONTEXTS:
        assert np.array_equal(one.probabilities(context), two.probabilities(context))


def test_contexts_do_not_cross_documents():
    """Order of the documents changes nothing; with n-grams over the borders it would."""
    documents = random_documents(30, 15, seed=4)
    one = KneserNey.fit([stream_of(documents)], order=3, vocab_size=15)
    two = KneserNey.fit([stream_of(documents[::-1])], order=3, vocab_size=15)
    assert one.num_ngrams == two.num_ngrams
    for context in CONTEXTS:
        assert np.array_equal(one.probabilities(context), two.probabilities(context))


def packed_batch():
    """Two rows: two documents and padding; one document cut at the row's start."""
    tokens = torch.tensor([[0, 5, 3, 1, 0, 4, 1, 9], [7, 3, 2, 2, 3, 2, 4, 5]])
    labels = torch.tensor([[5, 3, 1, -100, 4, 1, -100, -100], [3, 2, 2, 3, 2, 4, 5, 2]])
    segments = torch.tensor([[0, 0, 0, 0, 1, 1, 1, -1], [0] * 8])
    return {"tokens": tokens, "labels": labels, "segments": segments}


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_batch_nll_scores_labels_within_their_segment(order):
    model = KneserNey.fit([stream_of(random_documents(30, 12, seed=5))], order=order, vocab_size=12)
    batch = packed_batch()
    nll = model.batch_nll(batch)
    assert nll.shape == batch["labels"].shape
    for row in range(2):
        for t in range(8):
            label = int(batch["labels"][row, t])
            if label < 0:
                assert nll[row, t] == 0
                continue
            same = batch["segments"][row] == batch["segments"][row, t]
            context = batch["tokens"][row, : t + 1][same[: t + 1]].tolist()
            assert nll[row, t].item() == pytest.approx(-math.log(model.probabilities(context)[label]))


def test_real_text_bigram_beats_unigram_and_trigram_beats_bigram():
    text = inspect.getsource(textwrap) + inspect.getsource(re) + inspect.getsource(inspect)
    words = re.findall(r"\w+|[^\w]", text)
    common = {word: 2 + rank for rank, (word, _) in enumerate(Counter(words).most_common(997))}
    ids = [common.get(word, 999) for word in words]
    documents = [ids[i : i + 100] for i in range(0, len(ids), 100)]
    held_out, train = documents[::5], [d for i, d in enumerate(documents) if i % 5]
    losses = []
    for order in (1, 2, 3):
        model = KneserNey.fit([stream_of(train)], order=order, vocab_size=1000)
        total = tokens = 0.0
        for document in held_out:
            line = torch.tensor([[BOS, *document, EOS]])
            batch = {"tokens": line[:, :-1], "labels": line[:, 1:], "segments": torch.zeros_like(line[:, 1:])}
            total += model.batch_nll(batch).sum().item()
            tokens += line.shape[1] - 1
        losses.append(total / tokens)
    assert math.log(1000) > losses[0]
    assert losses[0] - losses[1] > 0.5
    assert losses[1] > losses[2]


def test_degenerate_corpora_stay_proper():
    for documents in ([[2]], [[]], [[2, 3]] * 2, [[2, 2, 2]]):
        model = KneserNey.fit([stream_of(documents)], order=4, vocab_size=5)
        for context in ([], [BOS], [BOS, 2], [2, 2, 2]):
            p = model.probabilities(context)
            assert p.sum() == pytest.approx(1)
            assert p.min() > 0


def test_compact_integers_and_empty_streams_are_accepted():
    tokens, starts = stream_of(random_documents(10, 20, seed=6))
    plain = KneserNey.fit([(tokens, starts)], order=3, vocab_size=20)
    small = KneserNey.fit([(tokens.astype(np.uint16), starts), ([], [])], order=3, vocab_size=20)
    assert np.array_equal(plain.probabilities([2, 3]), small.probabilities([2, 3]))


@pytest.mark.parametrize(
    ("streams", "order", "vocab_size", "message"),
    [
        ([([0, 7], [0])], 2, 5, "outside 0..4"),
        ([([0, 2], [0])], 0, 5, "choose from 1"),
        ([([0, 2], [0])], 5, 2**14, "choose from 1 to 4"),
        ([([0, 2, 3], [1])], 2, 5, "must begin with 0"),
        ([([0, 2, 3], [0, 2, 2])], 2, 5, "must begin with 0"),
        ([([0, 2, 3], [0, 3])], 1, 5, "must begin with 0"),
        ([([0, 0], [0, 1])], 2, 5, "no token to count"),
        ([], 2, 5, "no token to count"),
    ],
)
def test_bad_input_is_refused(streams, order, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        KneserNey.fit(streams, order=order, vocab_size=vocab_size)


@pytest.mark.slow
def test_eight_million_tokens_fit_in_a_minute():
    rng = np.random.default_rng(0)
    tokens = 2 + rng.zipf(1.2, 8_000_000) % 8190
    starts = np.arange(0, len(tokens), 500)
    tokens[starts] = BOS
    begin = time.process_time()
    model = KneserNey.fit([(tokens, starts)], order=3, vocab_size=8192)
    assert time.process_time() - begin < 60
    assert model.probabilities([5, 6]).sum() == pytest.approx(1)
