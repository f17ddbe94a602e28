"""Tokenizers made from a few words, which frame a text with special tokens as BERT's do."""

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def framing(
    model: models.Model, normalizer: normalizers.Normalizer, special: tuple[str, str, str, str], max_tokens: int
) -> PreTrainedTokenizerFast:
    """`special`: what stands for padding and for an unknown word, and what comes before a text and after it."""
    pad, unknown, begin, end = special
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = ((token, tokenizer.token_to_id(token)) for token in (end, begin))
    tokenizer.post_processor = processors.BertProcessing(*ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unknown,
        pad_token=pad,
        cls_token=begin,
        sep_token=end,
        model_max_length=max_tokens,
    )
