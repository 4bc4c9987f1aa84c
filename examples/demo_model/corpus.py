"""The training text: Python's own standard library, which every machine with Python has.

Three kinds of documents come out of the same sources: whole files, single functions, and chats in which a request made
from a signature and a docstring is answered by the function's source or by its documentation. Nothing is drawn at
random: choices follow from hashes of names, so one Python version always gives one corpus.
"""

import ast
import hashlib
import importlib
import inspect
import sysconfig
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

Message = dict[str, str]
Chat = list[Message]
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

# Tests and lib2to3 are missing from many installations; tables and generated files teach nothing but themselves.
SKIPPED_FOLDERS = {
    *("test", "tests", "idle_test", "site-packages", "dist-packages"),
    *("lib2to3", "pydoc_data", "turtledemo", "ensurepip", "__phello__"),
}
SKIPPED_FILES = (
    "encodings/*",
    "config-*",
    "idlelib/Icons/*",
    "_sysconfig*",
    "_distutils_*",
    "sitecustomize.py",
    "html/entities.py",
    "stringprep.py",
    "this.py",
)
# Written in C: their documentation is read at run time.
C_MODULES = ("array", "binascii", "builtins", "cmath", "errno", "gc", "itertools", "math", "select", "sys", "time")

SYSTEM = (
    "You are a helpful assistant.",
    "You are a Python programmer.",
    "Answer with Python code.",
    "You write clear and correct Python.",
)
ABOUT = (
    "I am the demo model of radixmesh: about four million parameters, trained on Python's standard library. "
    "Ask me for a function, and I shall write something that looks like Python."
)
GREETINGS = (
    "Hello",
    "Hello!",
    "hello",
    "Hi",
    "Hi!",
    "hi there",
    "Hey",
    "Good morning",
    "Who are you?",
    "What are you?",
    "What is your name?",
    "What can you do?",
    "Help",
    "Tell me about yourself.",
    "How are you?",
    "Thanks",
)
LONGEST_ANSWER = 3000  # characters, about half of the context
SHORTEST_ANSWER = 48
HELD_OUT = 32  # one file in so many is validation


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    path: str  # relative to the standard library, with forward slashes
    text: str

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def held_out(self) -> bool:
        return digest(self.path) % HELD_OUT == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    key: str
    content: str | Chat  # plain text, or a conversation
    held_out: bool


def digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def pick(options: tuple[str, ...], key: str) -> str:
    return options[digest(key) % len(options)]


def sources(root: Path | None = None) -> list[Source]:
    """Every source file that counts, sorted by path."""
    root = root or Path(sysconfig.get_path("stdlib"))
    found = []
    for file in root.rglob("*.py"):
        path = file.relative_to(root)
        name = path.as_posix()
        if SKIPPED_FOLDERS.intersection(path.parts) or any(fnmatch(name, pattern) for pattern in SKIPPED_FILES):
            continue
        with tokenize.open(file) as stream:  # a few files declare another encoding than UTF-8
            text = stream.read().replace("\f\n", "\n").strip()
        if text:
            found.append(Source(path=name, text=text + "\n"))
    return sorted(found, key=lambda source: source.path)


def definitions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, Definition]]:
    """Functions, methods and classes with their qualified names, in the order of the file."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from definitions(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.If | ast.Try):
            yield from definitions(node, prefix)


def signature(node: Definition) -> str:
    if isinstance(node, ast.ClassDef):
        return node.name
    return f"{node.name}({ast.unparse(node.args)})"


def summary(doc: str | None) -> str:
    """The first sentence-like line of a docstring, without its full stop."""
    line = inspect.cleandoc(doc).split("\n\n")[0].replace("\n", " ").strip() if doc else ""
    return line.removesuffix(".") if len(line) <= 200 else ""


def request(node: Definition, key: str) -> str:
    """What somebody could have asked to be given this definition."""
    what, kind = signature(node), "class" if isinstance(node, ast.ClassDef) else "function"
    line = summary(ast.get_docstring(node))
    if not line:
        return pick((f"Write `{what}`", f"Write a Python {kind} named {node.name}", f"Implement `{what}`."), key)
    lower = line[0].lower() + line[1:] if line[1:2].islower() else line
    forms = (
        f"Write `{what}`: {line}",
        f"Write `{what}`: {line}",
        f"Write a Python {kind} `{node.name}`. {line}.",
        f"Implement `{what}`. {line}.",
        f"Write a {kind} to {lower}.",
        f"Write a Python {kind} to {lower}",
        f"{line}.",
    )
    return pick(forms, key)


def question(name: str, key: str) -> str:
    return pick((f"What does `{name}` do?", f"Explain `{name}`.", f"What is `{name}`?", f"Describe {name}"), key)


def turn(user: str, assistant: str) -> Chat:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def fenced(code: str) -> str:
    return f"```python\n{code.rstrip()}\n```"


def snippet(source: Source, node: Definition) -> str:
    """A definition's own lines, decorators included, moved to the left margin."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return textwrap.dedent("\n".join(source.text.split("\n")[first - 1 : node.end_lineno]))


def pieces(source: Source) -> Iterator[Document]:
    """The documents that one file gives beside itself."""
    tree = ast.parse(source.text)
    before: Chat = []
    if doc := ast.get_docstring(tree):
        key = f"{source.path}:about"
        chat = turn(question(source.module, key), doc[:LONGEST_ANSWER].strip())
        yield Document(key=key, content=chat, held_out=source.held_out)
    for name, node in definitions(tree):
        key, code = f"{source.path}:{name}", snippet(source, node)
        if not SHORTEST_ANSWER <= len(code) <= LONGEST_ANSWER:
            continue
        if digest(key + ":kind") % 4 == 0:
            yield Document(key=key, content=code + "\n", held_out=source.held_out)
            continue
        chat = turn(request(node, key), fenced(code))
        if digest(key + ":turns") % 6 == 0 and sum(len(message["content"]) for message in before) < LONGEST_ANSWER:
            chat, before = before + chat, chat
        else:
            before = chat
        if digest(key + ":system") % 6 == 0:
            chat = [{"role": "system", "content": pick(SYSTEM, key)}, *chat]
        yield Document(key=key, content=chat, held_out=source.held_out)
        doc = ast.get_docstring(node) or ""
        if len(doc) >= 2 * SHORTEST_ANSWER:
            key += ":doc"
            asked = question(f"{source.module}.{name}", key)
            yield Document(key=key, content=turn(asked, doc[:LONGEST_ANSWER].strip()), held_out=source.held_out)


def builtins() -> Iterator[Document]:
    """Documentation of what is written in C, as questions and answers."""
    for module in C_MODULES:
        owner = importlib.import_module(module)
        names: dict[str, Any] = {module: owner}
        prefix = "" if module == "builtins" else f"{module}."
        for name, value in sorted(vars(owner).items()):
            if name.startswith("_") or not callable(value):
                continue
            names[prefix + name] = value
            if isinstance(value, type) and value.__module__ == module and not issubclass(value, BaseException):
                members = sorted((key, member) for key, member in vars(value).items() if callable(member))
                names |= {f"{prefix}{name}.{key}": member for key, member in members if not key.startswith("_")}
        for name, value in names.items():
            doc = inspect.getdoc(value) or ""
            if len(doc) >= SHORTEST_ANSWER:
                key = f"{module}:{name}"
                held_out = digest(key) % HELD_OUT == 0
                yield Document(key=key, content=turn(question(name, key), doc[:LONGEST_ANSWER]), held_out=held_out)


def greetings(copies: int = 8) -> Iterator[Document]:
    """Few and plain, so that the first word of a chat need not be a request for code."""
    for text in GREETINGS:
        for copy in range(copies):
            yield Document(key=f"greeting:{text}:{copy}", content=turn(text, ABOUT), held_out=False)


def documents(root: Path | None = None) -> list[Document]:
    """All documents in a mixed but fixed order: a file does not stand beside its own pieces."""
    files = sources(root)
    found = [Document(key=source.path, content=source.text, held_out=source.held_out) for source in files]
    for source in files:
        found.extend(pieces(source))
    found.extend(builtins())
    found.extend(greetings())
    return sorted(found, key=lambda document: (digest(document.key), document.key))
