"""Conversations -> token numbers, and labels for the tokens that the assistant wrote: nothing else carries loss.

Where an answer begins and ends is read off the chat template itself. A template that marks answers with `generation`
tags says so. For any other, an answer begins where the rendering of the messages before it with `add_generation_prompt`
ends, and it is what the next rendering adds, up to and with the token that ends the turn. That is exact for templates
that write earlier messages the same however the conversation goes on, as those of SmolLM2 and Llama 3.1 do; any other
is refused. Each answer, and the text between, is tokenized by itself: an answer follows the very tokens that
`generate` starts from.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from .data import IGNORED, PackingCount, is_held_out, pack

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def load_chat_template(tokenizer, path: str | None) -> None:
    """Give the tokenizer the chat template of `path`: a Jinja file, or a tokenizer's, in a folder or on the hub.

    Raises ValueError where the tokenizer has none in the end.
    """
    if path is not None:
        if path.endswith((".jinja", ".j2")):
            tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        else:
            tokenizer.chat_template = AutoTokenizer.from_pretrained(path).chat_template
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template: name one with chat_template_path, a .jinja file or the tokenizer of "
            "the instruct model"
        )


@dataclass(frozen=True)
class Conversation:
    """Messages (role and content), or plain text; of `given` nothing is learnt, of `learnt` what the assistant says."""

    given: list[dict] | str
    learnt: list[dict] | str
    tools: list | None = None

    @classmethod
    def from_row(cls, row: Mapping) -> "Conversation":
        """From the columns `messages`, `conversations` (from, value), or `prompt` and `completion` (messages or text).

        ValueError where a row has none of them, or a role that nobody knows.
        """
        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        if row.get("prompt") is not None and row.get("completion") is not None:
            return cls(row["prompt"], row["completion"], tools)
        if row.get("messages") is not None:
            return cls([], list(row["messages"]), tools)
        if row.get("conversations") is not None:
            unknown = sorted({m["from"] for m in row["conversations"]} - set(_ROLES))
            if unknown:
                raise ValueError(f"conversations: unknown speaker {unknown[0]!r}; known are {sorted(_ROLES)}")
            return cls([], [{"role": _ROLES[m["from"]], "content": m["value"]} for m in row["conversations"]], tools)
        raise ValueError(f"a row needs messages, conversations, or prompt and completion, but it has {sorted(row)}")

    @property
    def text(self) -> str:
        """All of it, to tell one conversation from another and to count its characters."""
        return json.dumps([self.given, self.learnt], ensure_ascii=False, sort_keys=True, default=str)


def tokenize_conversation(tokenizer, conversation: Conversation) -> tuple[list[int], list[int]]:
    """(token numbers, labels): the label is the token's number where the assistant wrote it, else −100.

    Raises ValueError where the chat template does not tell answers apart, or the tokenizer changes text that it gets
    piece by piece.
    """
    if isinstance(conversation.given, str):
        prompt = tokenizer(conversation.given)["input_ids"]
        answer = tokenizer(conversation.learnt, add_special_tokens=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            prompt = prompt[:-1] if prompt[-1:] == [tokenizer.eos_token_id] else prompt
            answer = answer if answer[-1:] == [tokenizer.eos_token_id] else [*answer, tokenizer.eos_token_id]
        return prompt + answer, [IGNORED] * len(prompt) + answer
    text, answers = find_answers(tokenizer, conversation)
    tokens, labels = [], []
    for start, end in itertools.pairwise([0, *itertools.chain.from_iterable(answers), len(text)]):
        piece = tokenizer(text[start:end], add_special_tokens=False)["input_ids"]
        tokens += piece
        labels += piece if (start, end) in answers else [IGNORED] * len(piece)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokens != whole and tokenizer.decode(tokens, clean_up_tokenization_spaces=False) != text:
        raise ValueError("this tokenizer changes text that it is given piece by piece: no exact labels can be made")
    return tokens, labels


def find_answers(tokenizer, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and (start, end) of what the assistant wrote and is learnt from, in characters."""
    messages = [*conversation.given, *conversation.learnt]

    def render(upto: int, prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(
            messages[:upto], tools=conversation.tools, tokenize=False, add_generation_prompt=prompt
        )

    if "generation" in tokenizer.chat_template.replace("add_generation_prompt", ""):
        text, marks = render_jinja_template(
            [messages], tools=conversation.tools, chat_template=tokenizer.chat_template,
            return_assistant_tokens_mask=True, **tokenizer.special_tokens_map,
        )  # fmt: skip
        first = len(render(len(conversation.given))) if conversation.given else 0
        return text[0], [mark for mark in map(tuple, marks[0]) if mark[0] >= first]
    text, answers = render(len(messages)), []
    for i in range(len(conversation.given), len(messages)):
        if messages[i]["role"] != "assistant":
            continue
        if i == 0:
            raise ValueError("a conversation must not begin with the assistant: there is nothing to answer")
        before, after = render(i, prompt=True), render(i + 1)
        if not after.startswith(before) or not text.startswith(after):
            raise ValueError(
                "the chat template writes a message differently once the conversation goes on, so it does not tell "
                "where answers are; use one with {% generation %} tags (chat_template_path)"
            )
        answers.append((len(before), max(len(before), len(after.rstrip()))))
    return text, answers


def conversation_sequences(
    conversations: Iterable[Conversation],
    tokenizer,
    *,
    sequence_length: int,
    share: float,
    held_out: bool,
    open_rows: int | None = None,
    count: PackingCount | None = None,
) -> Iterator[dict[str, list[int]]]:
    """Packed sequences (see `data.pack`) of the conversations on one side: held out, or all others.

    Conversations longer than a sequence, and those without an answer, are dropped and counted. A conversation is never
    cut.
    """
    count = PackingCount() if count is None else count

    def tokens():
        for conversation in conversations:
            if is_held_out(conversation.text, share) != held_out:
                continue
            count.documents += 1
            ids, labels = tokenize_conversation(tokenizer, conversation)
            if any(label != IGNORED for label in labels[1:]):
                yield ids, labels
            else:
                count.dropped, count.dropped_documents = count.dropped + len(ids), count.dropped_documents + 1

    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    how = dict(pad_token_id=pad or 0, long_documents="drop", open_rows=open_rows, count=count)
    return pack(tokens(), sequence_length, **how)
