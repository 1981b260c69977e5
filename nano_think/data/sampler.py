"""Which row comes next: a pure function of (seed, number of the draw), with chosen shares of the domains.

Draws are dealt in blocks. A block's places are divided among the domains by systematic rounding (below), so
that each share is exact in expectation and never more than one draw off inside a block; then the places are
shuffled. A domain's rows are visited in a random order, each row once before any comes again, then in a fresh
order.

All randomness is the raw output of Philox, a counter-based generator (Salmon et al. 2011), addressed by
(seed, purpose, numbers). Nothing depends on what was drawn before, so a run may be resumed, divided over
ranks or prefetched by workers. NumPy guarantees raw outputs, unlike `permutation`, to stay the same over
versions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from nano_think.errors import UserError

BLOCK = 1024

_QUOTAS, _PLACES, _ROWS = 1, 2, 3  # purposes: separate parts of the generator's counter


def mixing_shares(
    rows: Sequence[int],
    mixing: str | Sequence[float] | Mapping[str, float],
    temperature: float = 1.0,
    names: Sequence[str] | None = None,
) -> np.ndarray:
    """Share of each domain, float64 (domains,), summing to 1.

    Args:
        rows: rows of each domain.
        mixing: `equal`; `proportional` to rows; `temperature`, proportional to rows ** (1 / temperature),
            between proportional (1) and equal (infinite); weights as a list in the order of domains or by
            name.
        names: the domains' names, for weights by name and for messages.

    Raises:
        UserError: unknown mixing, weights that do not fit the domains, or a share for a domain without rows.
    """
    names = [str(index) for index in range(len(rows))] if names is None else list(names)
    sizes = np.asarray(rows, np.float64)
    if isinstance(mixing, str):
        if not temperature > 0:
            raise UserError(f"data temperature={temperature} must be above 0")
        exponents = {"equal": 0.0, "proportional": 1.0, "temperature": 1.0 / temperature}
        if mixing not in exponents:
            raise UserError(
                f"data mixing {mixing!r} is unknown: choose {', '.join(exponents)} or give weights"
            )
        weights = sizes ** exponents[mixing]
    else:
        weights = _explicit_weights(mixing, names)
    empty = [
        name for name, weight, size in zip(names, weights, sizes, strict=True) if weight > 0 and size == 0
    ]
    if empty:
        raise UserError(
            f"no text to draw from in domain {', '.join(empty)}: add documents or give it weight 0"
        )
    if not weights.sum() > 0:
        raise UserError("no domain has text to draw from: check the corpus")
    return weights / weights.sum()


def _explicit_weights(mixing: Sequence[float] | Mapping[str, float], names: Sequence[str]) -> np.ndarray:
    if isinstance(mixing, Mapping):
        if set(mixing) != set(names):
            raise UserError(
                f"mixing weights name {sorted(mixing)} but the domains are {sorted(names)}: name each once"
            )
        mixing = [mixing[name] for name in names]
    weights = np.asarray(mixing, np.float64)
    if weights.shape != (len(names),):
        raise UserError(f"{weights.size} mixing weights for {len(names)} domains: give one weight a domain")
    if not np.isfinite(weights).all() or (weights < 0).any() or weights.sum() == 0:
        raise UserError(f"mixing weights {weights.tolist()} must be at least 0, finite and not all 0")
    return weights


def row_limits(
    rows_per_domain: Mapping[str, int],
    tokens: int,
    seq_len: int,
    mixing: str | Sequence[float] | Mapping[str, float] = "equal",
    temperature: float = 1.0,
) -> list[int]:
    """Rows of each domain, at least one, that so many tokens are; see `mixing_shares`."""
    shares = mixing_shares(list(rows_per_domain.values()), mixing, temperature, list(rows_per_domain))
    return [max(1, round(tokens * share / seq_len)) for share in shares]


class DomainSampler:
    """Endless sequence of (domain, row) that any process can enter at any place.

    Args:
        rows_per_domain: number of rows of each domain, by name or in order.
        mixing, temperature: see `mixing_shares`.
        seed: 0 .. 2**64 - 1.
        limits: of each domain use only so many rows, spread evenly over all of them; None uses all.
        part: which of the disjoint selections of that size; 0 begins at the first row.

    Raises:
        UserError: as `mixing_shares`, or a part that a domain is too short for.
    """

    def __init__(
        self,
        rows_per_domain: Mapping[str, int] | Sequence[int],
        mixing: str | Sequence[float] | Mapping[str, float] = "equal",
        temperature: float = 1.0,
        seed: int = 0,
        limits: Sequence[int] | None = None,
        part: int = 0,
    ) -> None:
        if not 0 <= seed < 1 << 64:
            raise UserError(f"seed={seed} must lie between 0 and 2**64 - 1")
        names = list(rows_per_domain) if isinstance(rows_per_domain, Mapping) else None
        self.rows = list(
            rows_per_domain.values() if isinstance(rows_per_domain, Mapping) else rows_per_domain
        )
        self.shares = mixing_shares(self.rows, mixing, temperature, names)
        self.seed, self.part, self._all_rows = seed, part, self.rows
        if limits is not None:
            self.rows = [min(count, limit) for count, limit in zip(self.rows, limits, strict=True)]
        for count, kept, name in zip(self._all_rows, self.rows, names or range(len(self.rows)), strict=True):
            if kept and not 0 <= part < max(1, count // kept):
                raise UserError(
                    f"data.train_part={part} does not exist: domain {name} has {count} rows, which is "
                    f"{count // kept} parts of {kept}; lower data.train_part or data.train_tokens"
                )
        self._visits = np.zeros((1, len(self.rows)), np.int64)
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def draw(self, index: int) -> tuple[int, int]:
        """(domain, row) of draw number `index`."""
        return self.draws(np.array([index]))[0]

    def batch(self, step: int, batch_size: int, rank: int = 0, world: int = 1) -> list[tuple[int, int]]:
        """The draws of one rank's batch: numbers i * world + rank for i = step * batch_size and following."""
        own = step * batch_size + np.arange(batch_size)
        return self.draws(own * world + rank)

    def draws(self, indices: np.ndarray) -> list[tuple[int, int]]:
        """(domain, row) of each numbered draw."""
        result = []
        for index in indices.tolist():
            domains, visits = self._block(index // BLOCK)
            domain, visit = int(domains[index % BLOCK]), int(visits[index % BLOCK])
            full_pass, place = divmod(visit, self.rows[domain])
            chosen = int(self._order(domain, full_pass)[place])
            result.append((domain, chosen * self._all_rows[domain] // self.rows[domain] + self.part))
        return result

    def _random(self, purpose: int, first: int, second: int, count: int) -> np.ndarray:
        generator = np.random.Philox(key=[self.seed, 0], counter=[0, purpose, first, second])
        return generator.random_raw(count)

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Domain of each place of a block, and how often that domain was drawn before, both (BLOCK,)."""
        if block not in self._blocks:
            before, after = self._visits_before(block + 1)[block : block + 2]
            in_order = np.repeat(np.arange(len(self.rows)), after - before)
            visits = np.concatenate([np.arange(low, high) for low, high in zip(before, after, strict=True)])
            places = np.argsort(self._random(_PLACES, block, 0, BLOCK), kind="stable")
            domains, numbers = np.empty_like(in_order), np.empty_like(visits)
            # Sorting the shuffled places inside each domain keeps a domain's visits in order of the draws.
            ordered = places[np.lexsort((places, in_order))]
            domains[ordered], numbers[ordered] = in_order, visits
            _remember(self._blocks, block, (domains, numbers))
        return self._blocks[block]

    def _visits_before(self, block: int) -> np.ndarray:
        """(blocks + 1, domains) draws of each domain before each block, known at least up to `block`.

        Systematic rounding: with F the cumulative shares and u uniform on [0, 1), domain d gets
        floor(BLOCK F_d + u) - floor(BLOCK F_(d-1) + u) places: expectation BLOCK (F_d - F_(d-1)), sum BLOCK.
        """
        if block >= len(self._visits):
            count = 2 * block
            uniform = (self._random(_QUOTAS, 0, 0, count) >> np.uint64(11)) * 2.0**-53
            bounds = np.concatenate([[0.0], np.cumsum(self.shares)])
            bounds /= bounds[-1]  # exactly 1, also before a last domain of share 0
            quotas = np.diff(np.floor(BLOCK * bounds + uniform[:, None]).astype(np.int64), axis=1)
            self._visits = np.concatenate(
                [np.zeros((1, len(self.rows)), np.int64), np.cumsum(quotas, axis=0)]
            )
        return self._visits

    def _order(self, domain: int, full_pass: int) -> np.ndarray:
        """Random order of a domain's rows in its pass number `full_pass`."""
        key = (domain, full_pass)
        if key not in self._orders:
            order = np.argsort(self._random(_ROWS, domain, full_pass, self.rows[domain]), kind="stable")
            _remember(self._orders, key, order, keep=2 * len(self.rows))
        return self._orders[key]


def _remember(cache: dict, key: object, value: object, keep: int = 4) -> None:
    """Store in a cache of the most recent `keep` entries."""
    while len(cache) >= keep:
        cache.pop(next(iter(cache)))
    cache[key] = value
