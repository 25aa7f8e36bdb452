"""Prompts → what a model goes on to say."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

_PLACE = "\u2042THE QUESTION\u2042"  # stands for the user's words while the chat template is rendered


def in_chat(tokenizer) -> tuple[str, str]:
    """What the tokenizer's chat template puts before and after a user's words; empty where it has none."""
    if not tokenizer.chat_template:
        return "", ""
    message = [{"role": "user", "content": _PLACE}]
    before, _, after = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True).partition(
        _PLACE
    )
    return before, after


def encode(tokenizer, text: str, *, start: bool) -> list[int]:
    """Token numbers of a piece of a prompt. The first piece (`start`) of a prompt without a chat template gets the
    tokenizer's own special tokens; a template brings its own."""
    return tokenizer(text, add_special_tokens=start and not tokenizer.chat_template, verbose=False)["input_ids"]


@torch.no_grad()
def continuations(
    model: PreTrainedModel,
    tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    prefill_chunk_size: int | None = None,
) -> list[str]:
    """What the model says after each prompt, greedily.

    Args:
        prompts: token numbers; of one batch, padded on the left where their lengths differ.
        max_new_tokens: tokens generated at most.
        prefill_chunk_size: tokens of the prompt run at a time: bounds the memory of a long one. All at once where None.
    """
    longest = max(map(len, prompts))
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    pad = pad or 0
    input_ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    output = model.generate(
        input_ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad,
        prefill_chunk_size=prefill_chunk_size,
    )
    return tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
