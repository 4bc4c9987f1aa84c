"""Opening a tokenizer, and chat templates."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from engine.errors import InvalidRequest, ModelError
from engine.text.chat import render
from engine.text.tokenizer import Tokenizer
from radixmesh.engine import DEMO
from tests.text.made import made

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
    "{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved byte-level tokenizer with a chat template."""
    path = tmp_path_factory.mktemp("model")
    inner = made("byte_level")
    inner.save_pretrained(path, chat_template=None)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def test_a_saved_tokenizer_opens_as_transformers_has_it(folder: Path) -> None:
    tokenizer, inner = Tokenizer.open(folder), made("byte_level")
    text = "the quick 🙂"
    assert tokenizer.encode(text) == inner.encode(text)
    assert tokenizer.encode(text)[0] == inner.bos_token_id
    assert tokenizer.encode(text, special=False) == inner.encode(text, add_special_tokens=False)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos == inner.eos_token_id
    assert tokenizer.size == len(inner)


def test_what_is_missing_is_said_in_one_line(tmp_path: Path) -> None:
    for path, says in ((tmp_path / "no", "no folder"), (tmp_path, "no tokenizer.json")):
        with pytest.raises(ModelError, match=says) as caught:
            Tokenizer.open(path)
        assert caught.value.field == "tokenizer"
        assert "\n" not in str(caught.value)


def test_it_is_what_autotokenizer_opens(folder: Path) -> None:
    text = "the quick dog 🙂 x\n\n  def"
    for path in (folder, DEMO):
        ours, theirs = Tokenizer.open(path).inner, AutoTokenizer.from_pretrained(path)
        assert type(ours) is type(theirs)
        assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
        assert (ours.encode(text), ours.chat_template) == (theirs.encode(text), theirs.chat_template)


def test_a_tokenizer_needs_no_torch() -> None:
    code = (
        "import sys; from engine.text.tokenizer import Tokenizer\n"
        f"assert Tokenizer.open({str(DEMO)!r}).encode('x')\n"
        "assert not {'torch', 'jax'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=DEMO.parent.parent, check=True, timeout=60)


@pytest.mark.parametrize("generic", [True, False])
@pytest.mark.parametrize("content", ["{", '{"version": "1.0"}', ""])
def test_a_broken_tokenizer_is_a_model_error(tmp_path: Path, content: str, generic: bool) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    if generic:
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="can't be read") as caught:
        Tokenizer.open(tmp_path)
    assert "\n" not in str(caught.value)


def test_code_in_a_checkpoint_is_not_run(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    config = '{"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}'
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(ModelError, match="can't be read"):
        Tokenizer.open(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_text_that_is_not_unicode(folder: Path) -> None:
    with pytest.raises(InvalidRequest, match="not valid Unicode at character 2"):
        Tokenizer.open(folder).encode("ab\ud800")


def test_chat(folder: Path) -> None:
    tokenizer = Tokenizer.open(folder)
    ids = render(tokenizer, [{"role": "user", "content": "the dog"}])
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>user: the dog\nassistant:"


@pytest.mark.parametrize(
    ("messages", "field", "says"),
    [
        ([], "messages", "is empty"),
        ([{"content": "x"}], "messages.0", "a role"),
        (["hello"], "messages.0", "a mapping"),
        ([{"role": "robot", "content": "x"}], "messages", "no robots"),
    ],
)
def test_conversations_that_are_refused(folder: Path, messages: list, field: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        render(Tokenizer.open(folder), messages)
    assert caught.value.field == field


def test_a_model_without_a_template() -> None:
    with pytest.raises(InvalidRequest, match="no chat template"):
        render(Tokenizer(made("words")), [{"role": "user", "content": "a"}])
