"""Labels: exactly what the assistant wrote, with the token that ends its turn; nothing of the prompts, nothing else."""

from pathlib import Path

import pytest
import trl
from checkpoints import byte_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moba_hf.training.conversations import (
    Conversation,
    conversation_sequences,
    find_answers,
    load_chat_template,
    tokenize_conversation,
)
from moba_hf.training.data import IGNORED, PackingCount

PLAIN = (
    "{% if messages[0]['role'] != 'system' %}[system]Help.[end]\n{% endif %}"
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[end]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MARKED = (
    "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}[end]"
    "{% endgeneration %}{% else %}{{ m['content'] }}[end]{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
FORGETFUL = (  # the last message is written otherwise than the ones before it
    "{% for m in messages %}[{{ m['role'] }}]{{ '' if loop.last else '(old)' }}{{ m['content'] }}[end]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TURNS = [("user", "Hé?"), ("assistant", "Ho!"), ("user", "[assistant]more"), ("assistant", "\n Ho, ho. ")]
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]


def learnt(tokenizer, labels) -> str:
    return tokenizer.decode([label for label in labels if label != IGNORED])


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["plain", "marked"])
def test_answers_alone_carry_loss(template):
    tokenizer = byte_tokenizer(template)
    tokens, labels = tokenize_conversation(tokenizer, Conversation.from_row({"messages": MESSAGES}))
    assert tokens == tokenizer.apply_chat_template(MESSAGES, return_dict=False)
    assert learnt(tokenizer, labels) == "Ho![end]\n Ho, ho. [end]"
    assert all(label in (token, IGNORED) for token, label in zip(tokens, labels))


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["plain", "marked"])
def test_prompt_and_completion(template):
    tokenizer = byte_tokenizer(template)
    row = {"prompt": MESSAGES[:3], "completion": MESSAGES[3:]}
    tokens, labels = tokenize_conversation(tokenizer, Conversation.from_row(row))
    assert tokens == tokenizer.apply_chat_template(MESSAGES, return_dict=False)
    assert learnt(tokenizer, labels) == "\n Ho, ho. [end]"
    tokens, labels = tokenize_conversation(tokenizer, Conversation.from_row({"prompt": "a b", "completion": " c"}))
    assert tokenizer.decode(tokens) == "a b c<|end|>" and learnt(tokenizer, labels) == " c<|end|>"


def test_other_names_of_speakers():
    row = {"conversations": [{"from": "human", "value": "Hé?"}, {"from": "gpt", "value": "Ho!"}]}
    assert Conversation.from_row(row) == Conversation.from_row({"messages": MESSAGES[:2]})
    with pytest.raises(ValueError, match="unknown speaker 'robot'"):
        Conversation.from_row({"conversations": [{"from": "robot", "value": ""}]})
    with pytest.raises(ValueError, match=r"a row needs messages.*\['text'\]"):
        Conversation.from_row({"text": "a"})


def test_a_prompt_is_tokenized_as_generate_sees_it():
    """Real merges: "\\n\\n" is one token, but an answer that begins with a line feed begins a token of its own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {s: i for i, s in enumerate([*alphabet, "ĊĊ"])}
    model = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model)
    tokenizer.chat_template = PLAIN.replace("]{{ m", "]\n{{ m").replace("[assistant]{%", "[assistant]\n{%")
    tokens, labels = tokenize_conversation(tokenizer, Conversation.from_row({"messages": MESSAGES}))
    text, answers = find_answers(tokenizer, Conversation.from_row({"messages": MESSAGES}))
    prompt = tokenizer.apply_chat_template(MESSAGES[:3], add_generation_prompt=True, return_dict=False)
    assert tokens[: len(prompt)] == prompt
    assert tokenizer.decode(tokens) == text and text[slice(*answers[1])] == "\n Ho, ho. [end]"
    assert learnt(tokenizer, labels) == "Ho![end]\n Ho, ho. [end]"
    whole = tokenizer.apply_chat_template(MESSAGES, return_dict=False)
    assert whole != tokens  # there the prompt's last token has swallowed the answer's first


def test_templates_that_hide_answers_are_refused():
    with pytest.raises(ValueError, match="does not tell where answers are"):
        tokenize_conversation(byte_tokenizer(FORGETFUL), Conversation.from_row({"messages": MESSAGES}))
    with pytest.raises(ValueError, match="must not begin with the assistant"):
        tokenize_conversation(byte_tokenizer(PLAIN), Conversation([], MESSAGES[1:2]))


@pytest.mark.parametrize(
    ("name", "answers"),
    [("llama3_1", "Ho!<|eot_id|>Ho, ho.<|eot_id|>"), ("qwen2_5", "Ho!<|im_end|>\n Ho, ho. <|im_end|>")],
)
def test_real_templates(name, answers):
    """Llama 3.1's strips what a message begins and ends with; Qwen 2.5's is of SmolLM2's kind."""
    template = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    tokenizer = byte_tokenizer(template.read_text(encoding="utf-8"))
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokens, labels = tokenize_conversation(tokenizer, Conversation.from_row({"messages": MESSAGES}))
    assert tokens == tokenizer.apply_chat_template(MESSAGES, return_dict=False)
    assert learnt(tokenizer, labels) == answers


def test_conversations_are_never_cut_and_what_is_dropped_is_counted():
    tokenizer = byte_tokenizer(PLAIN)
    rows = [[("user", "a" * n), ("assistant", "b" * n)] for n in (3, 5, 400, 7)] + [[("user", "nobody answers")]]
    conversations = [Conversation([], [{"role": r, "content": c} for r, c in row]) for row in rows]
    count = PackingCount()
    packed = list(
        conversation_sequences(conversations, tokenizer, sequence_length=200, share=1e-9, held_out=False, count=count)
    )
    lengths = [len(tokenize_conversation(tokenizer, c)[0]) for c in conversations]
    assert lengths[2] > 200 and count.dropped == lengths[2] + lengths[4] and count.dropped_documents == 2
    assert count.tokens == lengths[0] + lengths[1] + lengths[3] and count.documents == 5
    answers = "".join(learnt(tokenizer, row["labels"]) for row in packed)
    assert sorted(answers.split("[end]")[:-1]) == ["bbb", "bbbbb", "bbbbbbb"]
    for row in packed:
        assert row["position_ids"][0] == 0
        assert all(label == IGNORED for label, p in zip(row["labels"], row["position_ids"]) if p == 0)


def test_where_a_chat_template_comes_from(tmp_path):
    (tmp_path / "chat.jinja").write_text(PLAIN, encoding="utf-8")
    byte_tokenizer(MARKED).save_pretrained(tmp_path / "instruct")
    for path, template in ((str(tmp_path / "chat.jinja"), PLAIN), (str(tmp_path / "instruct"), MARKED)):
        tokenizer = byte_tokenizer()
        load_chat_template(tokenizer, path)
        assert tokenizer.chat_template == template
    tokenizer = byte_tokenizer(PLAIN)
    load_chat_template(tokenizer, None)
    assert tokenizer.chat_template == PLAIN
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        load_chat_template(byte_tokenizer(), None)
