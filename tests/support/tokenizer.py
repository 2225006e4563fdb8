"""A tokenizer for the small models: each of their tokens is two letters."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .models import VOCABULARY


def letters() -> PreTrainedTokenizerFast:
    """Token t is the letters number t // 26 and t % 26, from a on; 0 pads and is what is unknown."""
    words = {chr(97 + token // 26) + chr(97 + token % 26): token for token in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="aa"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(".."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="aa", unk_token="aa", padding_side="left")
