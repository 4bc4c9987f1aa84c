"""Write the tokenizer and the encoded text, which needs no accelerator: `python prepare.py --out DIR`."""

import argparse
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tokenizer as bpe
from corpus import documents
from model import Shape

TEXT = "text.npz"


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    train: np.ndarray  # uint16 token ids, one document after another
    valid: np.ndarray
    train_bytes: int
    valid_bytes: int
    documents: int
    python: str  # whose standard library it is

    def save(self, folder: Path) -> None:
        np.savez_compressed(folder / TEXT, **asdict(self))

    @classmethod
    def load(cls, folder: Path) -> "Text":
        with np.load(folder / TEXT) as held:
            return cls(**{name: held[name] if held[name].ndim else held[name].item() for name in held.files})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocabulary", type=int, default=Shape().vocabulary)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)

    found = documents()
    train = [bpe.render(document.content) for document in found if not document.held_out]
    valid = [bpe.render(document.content) for document in found if document.held_out]
    tokenizer = bpe.train(train, vocabulary=given.vocabulary)
    bpe.save(tokenizer, given.out, context=Shape().context)

    def encode(texts: list[str]) -> np.ndarray:
        codes = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return np.concatenate([np.asarray(code.ids, np.uint16) for code in codes])

    text = Text(
        train=encode(train),
        valid=encode(valid),
        train_bytes=sum(len(text.encode()) for text in train),
        valid_bytes=sum(len(text.encode()) for text in valid),
        documents=len(found),
        python=platform.python_version(),
    )
    text.save(given.out)
    print(f"{text.documents} documents, {text.train_bytes} bytes: {len(text.train)} tokens, {len(text.valid)} held out")


if __name__ == "__main__":
    main()
