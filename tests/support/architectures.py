"""The architectures that merges are tested on: tiny models with random weights, and batches for them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from client.measurement.gram import find_shared_inputs
from common.models.layers import parameter_of
from common.models.parameters import parameter_shapes
from common.models.plan import MergePlan, PlannedTensors, merge_plan

Example = dict[str, Tensor]  # a model's inputs for one example, without padding and without a batch dimension
TEXT = {"vocab_size": 80, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3}
TEXT |= {"intermediate_size": 12, "max_position_embeddings": 40, "pad_token_id": 0}
ROTARY = {**TEXT, "num_key_value_heads": 1, "num_attention_heads": 2}
T5 = {"vocab_size": 80, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2, "pad_token_id": 0}
T5 |= {"eos_token_id": 1, "decoder_start_token_id": 0, "num_labels": 3, "num_decoder_layers": 2}
IMAGE = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
IMAGE |= {"image_size": 8, "patch_size": 4, "num_channels": 1}


def text(random: torch.Generator) -> Example:
    length = int(torch.randint(3, 9, (), generator=random))
    tokens = torch.randint(2, 50, (length + 1,), generator=random)
    tokens[-1] = 1  # the end of the text, which T5 looks for
    return {"input_ids": tokens}


def text_to_text(random: torch.Generator) -> Example:
    return text(random) | {"decoder_input_ids": text(random)["input_ids"]}


def image(random: torch.Generator) -> Example:
    return {"pixel_values": torch.randn(1, 8, 8, generator=random, dtype=torch.float64)}


@dataclass(frozen=True)
class Architecture:
    """A tiny model, an example of its inputs, and how many linear layers it has, fed by how many distinct inputs."""

    make: Callable[[], nn.Module]
    example: Callable[[torch.Generator], Example]
    layers: int
    inputs: int


def model_of(name: str, config: str, **settings: object) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, name)(getattr(transformers, config)(**settings))


def clip() -> nn.Module:
    config = transformers.CLIPConfig(
        vision_config=IMAGE, text_config={**TEXT, "num_hidden_layers": 1}, num_labels=3, projection_dim=8
    )
    return transformers.CLIPForImageClassification(config)


def untied_t5() -> nn.Module:
    config = transformers.T5Config(**T5, feed_forward_proj="gated-gelu")
    config.tie_word_embeddings = False  # as an argument it would be overruled
    return transformers.T5ForConditionalGeneration(config)


# Per block: attention input, attention output, feed-forward input and output. BERT adds a pooler and a head.
ARCHITECTURES = {
    "bert": Architecture(model_of("BertForSequenceClassification", "BertConfig", **TEXT), text, 14, 10),
    "roberta": Architecture(model_of("RobertaForSequenceClassification", "RobertaConfig", **TEXT), text, 14, 10),
    "distilbert": Architecture(
        model_of(
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            **{**TEXT, "dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 12},
        ),
        text,
        14,
        10,
    ),
    # Relative embeddings pass through query and key too, so value has a Gram of its own.
    "deberta": Architecture(
        model_of(
            "DebertaV2ForSequenceClassification",
            "DebertaV2Config",
            **TEXT,
            relative_attention=True,
            position_buckets=4,
            max_relative_positions=8,
            pos_att_type=["p2c", "c2p"],
            share_att_key=True,
            norm_rel_ebd="layer_norm",
            position_biased_input=False,
            pooler_hidden_size=8,
        ),
        text,
        14,
        12,
    ),
    # One block, called twice, after a projection of the embeddings.
    "albert": Architecture(
        model_of("AlbertForSequenceClassification", "AlbertConfig", **TEXT, embedding_size=6), text, 9, 7
    ),
    "vit": Architecture(model_of("ViTForImageClassification", "ViTConfig", **IMAGE, num_labels=3), image, 13, 9),
    "clip": Architecture(clip, image, 13, 9),
    "gpt2": Architecture(
        model_of(
            "GPT2ForSequenceClassification",
            "GPT2Config",
            **{**TEXT, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 40, "n_inner": 12},
        ),
        text,
        9,
        9,
    ),
    "llama": Architecture(model_of("LlamaForSequenceClassification", "LlamaConfig", **ROTARY), text, 15, 9),
    "qwen2": Architecture(model_of("Qwen2ForSequenceClassification", "Qwen2Config", **ROTARY), text, 15, 9),
    # Two encoder blocks of six layers, two decoder blocks of ten; all cross-attentions share the k and v input. A tied
    # head is the embedding's and no layer.
    "t5 tied": Architecture(model_of("T5ForConditionalGeneration", "T5Config", **T5), text_to_text, 32, 21),
    "t5 untied": Architecture(untied_t5, text_to_text, 37, 22),
    "t5 classifier": Architecture(model_of("T5ForSequenceClassification", "T5Config", **T5), text, 34, 23),
    # Of each block's layers, four are attention's; then two for each of four experts.
    "mixtral": Architecture(
        model_of(
            "MixtralForSequenceClassification",
            "MixtralConfig",
            **ROTARY,
            num_local_experts=4,
            num_experts_per_tok=2,
        ),
        text,
        25,
        21,
    ),
    # As before, and a shared expert with its gate.
    "qwen2 moe": Architecture(
        model_of(
            "Qwen2MoeForSequenceClassification",
            "Qwen2MoeConfig",
            **ROTARY,
            num_experts=4,
            num_experts_per_tok=1,
            moe_intermediate_size=12,
            shared_expert_intermediate_size=12,
        ),
        text,
        33,
        25,
    ),
}
MIXTURES = ("mixtral", "qwen2 moe")


@torch.no_grad()
def shake(model: nn.Module, by: float, seed: int) -> None:
    """Add noise to every parameter. A mixture's last expert scores the mean of the others, so it is never the best."""
    random = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter += by * torch.randn(parameter.shape, generator=random, dtype=parameter.dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            parameter[-1] = parameter[:-1].mean(dim=0)


def batch_of(examples: list[Example]) -> Example:
    """Examples padded on the right; targets by one more where they would be as long as the inputs."""
    if "pixel_values" in examples[0]:
        return {"pixel_values": torch.stack([example["pixel_values"] for example in examples])}
    batch: Example = {}
    for prefix in ("", "decoder_"):
        rows = [example[f"{prefix}input_ids"] for example in examples if f"{prefix}input_ids" in example]
        if rows:
            tokens = pad_sequence(rows, batch_first=True)
            mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
            if prefix and tokens.shape == batch["input_ids"].shape:
                tokens, mask = (nn.functional.pad(tensor, (0, 1)) for tensor in (tokens, mask))
            batch |= {f"{prefix}input_ids": tokens, f"{prefix}attention_mask": mask}
    return batch


def planned_tensors_of(model: nn.Module, batch: Example) -> PlannedTensors:
    """A plan that merges every layer that the batch reaches, and averages the rest."""
    merged = find_shared_inputs(model, batch)  # type: ignore[arg-type]
    kept = {parameter_of(weight) for group in merged for weight in group}
    averaged = tuple(name for name in parameter_shapes(model) if name not in kept)
    return PlannedTensors(merged=merged, averaged=averaged, left_alone=())


def made(name: str) -> tuple[PreTrainedModel, MergePlan, list[Example]]:
    """A model with a Gram for each of its inputs, and two batches."""
    architecture = ARCHITECTURES[name]
    model = architecture.make().eval()
    shake(model, 0.1, seed=0)
    random = torch.Generator().manual_seed(2)
    batches = [batch_of([architecture.example(random) for _ in range(count)]) for count in (4, 3)]
    batches = [{name: t.float() if t.is_floating_point() else t for name, t in batch.items()} for batch in batches]
    return model, merge_plan(model, planned_tensors_of(model, batches[0])), batches  # type: ignore[return-value]
