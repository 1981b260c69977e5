"""Phase 1: the corpus with its splits, the tokenizer, and the token shards."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from nano_think.data.corpus import Corpus
from nano_think.data.prepare import prepare_corpus
from nano_think.data.report import report_table, shard_report
from nano_think.data.shards import Shards, build_shards
from nano_think.errors import UserError
from nano_think.files import write_json
from nano_think.phases.run import Maker, Run
from nano_think.phases.space import check_text
from nano_think.tokenizer import Tokenizer, gpt2_tokenizer, train_bpe

if TYPE_CHECKING:
    from nano_think.data.module import TokenDataModule

TRAIN_SPLITS = ("expert_train",)


def corpus_maker(run: Run) -> Maker:
    """Documents of the source, normalised, clustered and split."""
    source = instantiate(run.cfg.data.source, _convert_="all")
    spec = {"source": source.fingerprint(), "describe": source.describe()["name"]}

    def build(path: Path) -> dict[str, Any]:
        check_text(run, source, path)
        with _progress(run) as progress:
            task = progress.add_task("reading documents", total=None)
            corpus = prepare_corpus(
                source,
                path / "corpus",
                progress=lambda done: progress.update(task, completed=done),
                processes=run.cfg.data.processes,
            )
        return {"hash": corpus.hash, "domains": corpus.domains}

    return Maker("corpus", spec, build, command=run.command(phase="data"))


def tokenizer_maker(run: Run) -> Maker:
    """A byte-level BPE trained on the training split of the corpus, or a given vocabulary."""
    settings, corpus = run.plain(run.cfg.tokenizer), corpus_maker(run)
    if settings["kind"] not in ("bpe", "gpt2"):
        raise UserError(f"tokenizer.kind={settings['kind']} is not one of bpe, gpt2")
    needs = {"corpus": corpus} if settings["kind"] == "bpe" else {}
    if settings["kind"] == "gpt2":
        settings["hash"] = _given_tokenizer(settings["path"]).hash

    def build(path: Path) -> dict[str, Any]:
        if settings["kind"] == "bpe":
            tokenizer = train_bpe(_training_texts(run, corpus), settings["vocab_size"])
        else:
            tokenizer = _given_tokenizer(settings["path"])
        tokenizer.save(path / "tokenizer")
        return {"hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size}

    return Maker("tokenizer", settings, build, needs, run.command(phase="tokenizer"))


def shards_maker(run: Run) -> Maker:
    """The corpus as memory-mapped token ids."""
    corpus, tokenizer = corpus_maker(run), tokenizer_maker(run)

    def build(path: Path) -> dict[str, Any]:
        with _progress(run) as progress:
            task = progress.add_task("tokenising", total=None)
            shards = build_shards(
                load_corpus(run, corpus),
                load_tokenizer(run, tokenizer),
                path / "shards",
                processes=run.cfg.data.processes,
                progress=lambda done: progress.advance(task, done),
            )
        return {"tokens": {split: shards.num_tokens(split) for split in shards.manifest["splits"]}}

    needs = {"corpus": corpus, "tokenizer": tokenizer}
    return Maker("shards", {}, build, needs, run.command(phase="data"))


def load_corpus(run: Run, maker: Maker) -> Corpus:
    """An existing corpus artefact."""
    return Corpus(maker.recipe.path(run.artifacts) / "corpus")


def load_tokenizer(run: Run, maker: Maker) -> Tokenizer:
    """An existing tokenizer artefact."""
    return Tokenizer.load(maker.recipe.path(run.artifacts) / "tokenizer")


def load_shards(run: Run, maker: Maker) -> Shards:
    """An existing shards artefact."""
    return Shards(maker.recipe.path(run.artifacts) / "shards")


def loader_settings(run: Run) -> dict[str, Any]:
    """How rows are drawn and laid out: what `data.*` says besides the source."""
    settings = {key: run.plain(run.cfg.data[key]) for key in ("mixing", "temperature", "mode", "val_rows")}
    if run.cfg.data.train_tokens is not None:
        settings |= {key: run.cfg.data[key] for key in ("train_tokens", "train_part")}
    return settings


def data_module(run: Run, shards: Maker, batch_size: int, train_split: str) -> TokenDataModule:
    """The one data module of every phase, on the shards of this run."""
    # it is Lightning's: whoever reads no batches does not wait for that import
    from nano_think.data.module import TokenDataModule

    return TokenDataModule(
        shards.recipe.path(run.artifacts) / "shards",
        seq_len=run.cfg.size.seq_len,
        batch_size=batch_size,
        train_split=train_split,
        num_workers=run.cfg.data.num_workers,
        seed=run.cfg.seed,
        **loader_settings(run),
    )


def run(run: Run) -> dict[str, Any]:
    """`phase=data`: prepare everything that training reads, and report tokens and leakage."""
    maker = shards_maker(run)
    for need in maker.needs.values():
        run.obtain(need, named=True)
    path = run.obtain(maker, named=True)
    tokenizer = load_tokenizer(run, maker.needs["tokenizer"])
    report = shard_report(tokenizer, load_shards(run, maker), "expert_train")
    run.console.print(report_table(report))
    leakage = load_corpus(run, maker.needs["corpus"]).path / "leakage.md"
    run.say(f"leakage report: {leakage}")
    write_json(run.dir / "tokens.json", report)
    return {"shards": str(path), "report": str(run.dir / "tokens.json")}


@lru_cache
def _given_tokenizer(path: str) -> Tokenizer:
    """GPT-2's vocabulary: its content decides what comes of it, not where it lies."""
    return gpt2_tokenizer(path)


def _training_texts(run: Run, corpus: Maker) -> Any:
    """Texts of the training split, domain by domain."""
    documents = load_corpus(run, corpus)
    for split in TRAIN_SPLITS:
        for domain in documents.domains:
            for record in documents.documents(split, domain):
                yield record.text


def _progress(run: Run) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,}"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=run.console, transient=True)
