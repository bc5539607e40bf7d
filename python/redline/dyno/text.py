"""Real text, a byte-pair vocabulary learnt on it, and the batches that both models read."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .measure import DynoError

MAX_BYTES = 6 << 20  # more text only makes the vocabulary slower to learn
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "__pycache__", "idlelib"}


@dataclass
class Corpus:
    name: str
    tokens: Tensor  # [count] int64
    text_bytes: int
    vocabulary: int  # learnt; at most the model's


def read_text(path: Path | None) -> tuple[str, list[str]]:
    """(name, documents) of a file, of a folder's text files, or of Python's standard library."""
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        files = [
            p for p in sorted(root.rglob("*.py")) if not SKIPPED & set(p.relative_to(root).parts)
        ]
        name = f"the source of Python {sysconfig.get_python_version()}'s standard library"
        missing = f"{root} holds no Python source; name a text with --text"
    elif path.is_dir():
        files = [p for p in sorted(path.rglob("*")) if p.is_file() and not p.name.startswith(".")]
        name, missing = str(path), f"--text: {path} holds no file with text"
    elif path.exists():
        files, name, missing = [path], str(path), f"--text: {path} is empty"
    else:
        raise DynoError(f"--text: {path}: no such file or folder")
    documents = _read(files, lenient=path is None or path.is_dir())
    if not any(document.strip() for document in documents):
        raise DynoError(missing)
    return name, documents


def _read(files: list[Path], lenient: bool) -> list[str]:
    documents, total = [], 0
    for file in files:
        if total >= MAX_BYTES:
            break
        try:
            with file.open("rb") as stream:
                data = stream.read(MAX_BYTES - total)
        except OSError as error:
            if lenient:
                continue
            raise DynoError(f"--text: {file}: {error.strerror}") from None
        if b"\0" in data:
            if lenient:
                continue
            raise DynoError(f"--text: {file} is not text: it holds zero bytes")
        documents.append(data.decode("utf-8", errors="replace"))
        total += len(data)
    return documents


def learn(name: str, documents: list[str], vocabulary: int) -> Corpus:
    """Learns a byte-level byte-pair vocabulary on the documents and encodes them with it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    end = tokenizer.token_to_id("<end>")
    ids = []
    for encoding in tokenizer.encode_batch_fast(documents):
        ids.extend(encoding.ids)
        ids.append(end)
    return Corpus(
        name=name,
        tokens=torch.tensor(ids),
        text_bytes=sum(len(d.encode()) for d in documents),
        vocabulary=tokenizer.get_vocab_size(),
    )


class Batches:
    """The same random windows of the text for every model: [batch, sequence + 1] tokens a step."""

    def __init__(self, corpus: Corpus, batch: int, sequence: int, seed: int):
        if len(corpus.tokens) < sequence + 2:
            raise DynoError(
                f"--text: {corpus.name} has {len(corpus.tokens)} tokens; "
                f"one sequence needs {sequence + 2}"
            )
        self.corpus, self.batch, self.sequence, self.seed = corpus, batch, sequence, seed

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """(tokens, targets) of a step; each [batch, sequence]."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        last = len(self.corpus.tokens) - self.sequence - 1
        starts = torch.randint(last + 1, (self.batch, 1), generator=generator)
        windows = self.corpus.tokens[starts + torch.arange(self.sequence + 1)]
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
