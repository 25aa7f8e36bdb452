"""Collect long English and Python text from what is at hand into one JSONL file: what docs/quality.md trains on.

    python scripts/collect_long_text.py runs/quality/text.jsonl --wikipedia enwik8.gz \\
        --folders /usr/lib/python3.11 linux-doc/Documentation --texts bible.txt

A dump of Wikipedia gives one document per article. Of a folder, the files of each of its folders are one document, in
the order of their names, each below its path: later files speak of earlier ones, so a context longer than a file has
something to find; `site-packages` is left out, so that /usr/lib/python3.X is the standard library. Documents longer
than 2^18 characters are cut there, those that occur twice kept once; their order is that of their digests, the same
wherever the same text is found. Files ending in .gz are unpacked. The text belongs to its authors: use it, do not
publish the file.
"""

import argparse
import gzip
import hashlib
import html
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

SUFFIXES = (".py", ".rst", ".txt", ".md")
LONGEST = 1 << 18  # characters of a document


def main(argv: list[str] | None = None) -> dict[str, int]:
    """Write the file; returns the characters taken of each source."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--wikipedia", type=Path, nargs="*", default=[], help="dumps in MediaWiki's XML, like enwik8")
    parser.add_argument("--folders", type=Path, nargs="*", default=[], help=f"searched for {', '.join(SUFFIXES)}")
    parser.add_argument("--texts", type=Path, nargs="*", default=[], help="plain text")
    options = parser.parse_args(argv)
    readers = ((options.wikipedia, articles), (options.folders, folder_documents), (options.texts, pieces_of_file))
    named = [(path, reader) for paths, reader in readers for path in paths]
    if not named:
        parser.error("nothing to collect: name --wikipedia, --folders or --texts")
    for path, _ in named:
        if not path.exists():
            parser.error(f"no such file or folder: {path}")
    documents, characters = {}, {}
    for path, reader in named:
        characters[str(path)] = 0
        for document in reader(path):
            digest = hashlib.blake2b(document.encode(), digest_size=16).hexdigest()
            if document.strip() and digest not in documents:
                documents[digest] = {"text": document, "source": path.name}
                characters[str(path)] += len(document)
        if not characters[str(path)]:
            parser.error(f"{path} holds no text")
        print(f"{characters[str(path)]:>12} characters of {path}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", encoding="utf-8") as file:
        for digest in sorted(documents):
            file.write(json.dumps(documents[digest], ensure_ascii=False) + "\n")
    print(f"{sum(characters.values()):>12} characters in {len(documents)} documents: {options.output}")
    return characters


def articles(dump: Path) -> Iterator[str]:
    """Title and text of every article of a MediaWiki dump; redirects left out."""
    for page in re.finditer(r"<title>([^<]*)</title>.*?<text[^>]*>([^<]*)</text>", read(dump), re.DOTALL):
        title, text = html.unescape(page[1]), html.unescape(page[2])
        if not text.upper().startswith("#REDIRECT"):
            yield from pieces(f"{title}\n\n{text}")


def folder_documents(folder: Path) -> Iterator[str]:
    """The text files of each folder below `folder`, joined."""
    found = (path for path in sorted(folder.rglob("*")) if "site-packages" not in path.relative_to(folder).parts)
    files = [path for path in found if path.is_file() and kind(path) in SUFFIXES]
    for _, siblings in itertools.groupby(sorted(files, key=lambda path: path.parent), key=lambda path: path.parent):
        yield from pieces("\n\n".join(f"{path.relative_to(folder)}\n\n{read(path)}" for path in siblings))


def pieces_of_file(path: Path) -> Iterator[str]:
    yield from pieces(read(path))


def pieces(text: str) -> Iterator[str]:
    return (text[start : start + LONGEST] for start in range(0, len(text), LONGEST))


def kind(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def read(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8", errors="replace")


if __name__ == "__main__":
    main()
