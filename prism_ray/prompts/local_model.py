"""An author in this process: a causal language model from a folder in Hugging Face's form. No network is used."""

from pathlib import Path
from typing import Any

import torch

from prism_ray.errors import InputError, shortened
from prism_ray.prompts.write import Author, Messages

SOURCE = "transformers"
ANSWER_TOKENS = 1024


def author_in(folder: Path, *, device: str | torch.device = "cpu") -> Author:
    """An author whose answers are a model's most likely words, so the same question gets the same answer.

    Raises:
        InputError: the folder is no causal language model with a tokenizer and weights as safetensors, or, when it is
            asked, the question is longer than the model can read.
    """
    model, tokenizer = _loaded(folder)
    model.to(device).eval()
    longest = getattr(model.config, "max_position_embeddings", None)
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def ask(messages: Messages) -> str:
        tokens = tokenizer(_as_text(tokenizer, messages), return_tensors="pt", add_special_tokens=False).to(device)
        length = tokens.input_ids.shape[1]
        room = ANSWER_TOKENS if longest is None else min(ANSWER_TOKENS, longest - length)
        if room < 1:
            raise InputError(
                f"prompts.model={str(folder)!r}: reads {longest} tokens, a question has {length}; choose another model"
            )
        with torch.inference_mode():
            made = model.generate(
                input_ids=tokens.input_ids,
                attention_mask=tokens.attention_mask,
                max_new_tokens=room,
                do_sample=False,
                num_beams=1,
                # A folder's own sampling settings would be warned of, as they are not used.
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=fill,
            )
        return tokenizer.decode(made[0, length:], skip_special_tokens=True)

    return Author(SOURCE, ask)


def _loaded(folder: Path) -> tuple[Any, Any]:
    if not (folder / "config.json").is_file():
        raise InputError(
            f"prompts.model={str(folder)!r}: has no config.json; expected the folder of a causal language model; check "
            "the path"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer  # takes seconds, and only this back end needs it

    safe = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **safe)
        model = AutoModelForCausalLM.from_pretrained(str(folder), use_safetensors=True, **safe)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"prompts.model={str(folder)!r}: cannot be loaded ({shortened(error)}); expected a causal language model "
            "with its tokenizer and model.safetensors"
        ) from error
    return model, tokenizer


def _as_text(tokenizer: Any, messages: Messages) -> str:
    """The conversation in the model's own format, or plainly where it has none."""
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return "\n\n".join([*(message["content"] for message in messages), ""])
