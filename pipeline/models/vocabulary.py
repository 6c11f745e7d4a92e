"""Whether the tokens of two models mean the same."""

from pathlib import Path

from transformers import (
    PreTrainedTokenizerBase,
)

from pipeline.config.errors import UserError
from pipeline.models.prompting import Prompter


def check_vocabulary(base: PreTrainedTokenizerBase, arm: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse an ARM whose tokens mean something else than the base's.

    Either may know more tokens than the other, behind the shared ones: the ARM any, the base special ones (a pad token
    added to 32000 others).

    Raises:
        UserError: the first token that differs.
    """
    shared = min(len(base), len(arm))
    ours, theirs = (known.convert_ids_to_tokens(list(range(shared))) for known in (base, arm))
    for index, (own, other) in enumerate(zip(ours, theirs, strict=True)):
        if own != other:
            raise UserError(
                f"{name}: token {index} is {other!r}, but {own!r} in the base: use an ARM with the base's tokenizer."
            )
    lacking = set(range(shared, len(base)))
    if not lacking <= set(base.all_special_ids) or base.eos_token_id in lacking:
        raise UserError(
            f"{name}: its tokenizer has {len(arm)} tokens, the base's {len(base)}: use an ARM of this base."
        )


def check_end(base: Prompter, arm: Prompter, name: str) -> None:
    """Refuse an ARM whose responses end with another token than the base's: it could not guide when to end.

    Raises:
        UserError: the two tokens.
    """
    if base.eos != arm.eos:
        base_end, arm_end = (prompter.tokenizer.convert_ids_to_tokens(prompter.eos) for prompter in (base, arm))
        raise UserError(
            f"{name}: its responses end with {arm_end}, the base's with {base_end}: give both models templates that "
            "end turns with the same token, and train the ARM with it."
        )


def check_adapter_tokenizer(base: Prompter, folder: Path, name: str) -> None:
    """Refuse an adapter whose folder holds another tokenizer than its base's, or one whose responses end otherwise.

    Raises:
        UserError: what differs.
    """
    if (folder / "tokenizer_config.json").is_file():
        own = Prompter.load(folder, base.template)
        check_vocabulary(base.tokenizer, own.tokenizer, name)
        check_end(base, own, name)


def same_vocabulary(base: PreTrainedTokenizerBase, arm: PreTrainedTokenizerBase) -> bool:
    """Whether an ARM's tokens mean what the base's do, as `check_vocabulary` has it."""
    try:
        check_vocabulary(base, arm, "")
    except UserError:
        return False
    return True
