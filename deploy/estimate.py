"""What a merge takes of a party, before anything is run: seconds, bytes and memory.

What is to be done follows from the agreement, its schedule and the number of rows. How fast this machine does it is
measured in a few seconds: a pass over a model of the base's shape, loading it, reading rows, hashing and copying, the
masks, and a solve. A large model stands on two of its blocks, and a large solve on a smaller one: its time grows with
the third power of its inputs. How often each is done was counted in the code, and in the profile of a merge of five
MiniLM models; `python -m benchmarks.estimate` compares the result with whole merges. Waiting for others, starting
processes and disks are not in it.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import prod

import numpy as np
import torch
from transformers import PreTrainedModel

from client.data.rows import Batch
from client.measurement.gram import measure_grams
from client.measurement.gram_rows import OF_CLASSIFIER
from common.agreement import Agreement
from common.merge_methods import measurements
from common.merge_methods.distill import DISTILL
from common.merge_methods.method import Measurement
from common.merge_methods.normal_equations import solve_symmetric, spectrum
from common.merge_methods.refit import classifier
from common.merge_methods.regmean import REGMEAN
from common.models.folders import image_shape
from common.models.layers import parameter_of
from common.models.plan import MergePlan
from common.schedule import Delivery, Schedule
from common.summation import fixed_point, mask_stream
from common.tensor_layout import PART_BYTES, TensorEntry, TensorLayout
from common.thresholds import neighbourhood
from server.checkpoint import MAX_BYTES_IN_MEMORY

WHOLE_PARAMETERS = 50_000_000  # a model with no more than these is measured whole
BATCH_TOKENS, BATCH_IMAGES = 1024, 8  # of a measurement; of blocks of a large model, half
LONG_SECONDS = 1.0  # what takes longer is measured once
MASKED_NUMBERS = 1 << 20
LARGEST_SOLVE = 768
BACKWARDS = 2.0  # forward passes that a backward pass takes
LOADS = 6  # of models, beside one for each that is scored: two each to look at them, to judge labels and to measure
COORDINATOR_LOADS = 3  # to complete the agreement, to begin, and to publish
LOOKED_AT = 400  # examples on which the order of labels is judged
READS = 8.0  # of an owner's files, in units of tokenising each row once
HASHES, COPIES = 3.0, 16.0  # of each byte of a vector: packed, sent, added up, verified
LOAD_HASHES, LOAD_COPIES = 1.0, 5.0  # of each byte of a large model that is loaded
PIECE_BYTES = 1 << 25  # that is hashed and copied to see how fast that is
PACKETS = 18  # to an owner, beside those that vectors and models fill
SIMULATION_SECONDS = 6.0  # of Python: to complete the agreement and to draw the page
PACKET_SECONDS = 0.055  # of Python, for the settings, the agreement and the state
PYTHON_TURNS, PYTHON_SECONDS = 300_000, 0.012  # of a loop, and what it took where the other seconds were found
FIXED_BYTES = 500_000_000  # a process that has imported the libraries, loaded a model and released it
NETWORKS = {"100 Mbit/s": 100e6 / 8, "1 Gbit/s": 1e9 / 8}  # bytes a second


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What this machine takes, in seconds. An image counts as one token.

    `times_alone`: how many times as long a token takes if its example is a batch of its own. `times_python`: how many
    times as long Python takes as where PACKET_SECONDS and SIMULATION_SECONDS were found.
    """

    forward_of_token: float
    gram_pass_of_token: float
    gradients_of_token: float  # of one example at a time
    encoding_of_number: float
    mask_of_number: float  # made and added, for one peer
    hashing_of_byte: float
    copying_of_byte: float  # to memory that is new
    loading_of_parameter: float
    solve_of_flop: float
    spectrum_of_flop: float
    times_alone: float = 1.0
    times_python: float = 1.0


@dataclass(frozen=True, kw_only=True)
class System:
    """A linear system that the coordinator solves, in so many right-hand sides."""

    inputs: int
    outputs: int

    @property
    def solve_flops(self) -> float:
        """Cholesky factorisation, two solves and the product between them (normal_equations.py)."""
        return self.inputs**3 / 3 + 6 * self.inputs**2 * self.outputs

    @property
    def product_flops(self) -> float:
        """An owner's Gram times its own changes."""
        return 2 * self.inputs**2 * self.outputs

    @property
    def spectrum_flops(self) -> float:
        """Eigenvalues of a symmetric matrix (Golub and Van Loan, 2013, section 8.3)."""
        return 4 / 3 * self.inputs**3


@dataclass(frozen=True, kw_only=True)
class OwnerRows:
    """The examples of one owner. `epochs`: 0 if it brings its model. `tokens`: of an example, on average.
    `reading_seconds`: what reading and tokenising an example once takes. `own_cost`: what a token takes in its own
    model, as a share of what it takes in the agreed base.
    """

    train: int
    validation: int
    test: int
    epochs: int = 0
    tokens: float = 1.0
    reading_seconds: float = 0.0
    own_cost: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a merge asks of every owner and of the coordinator, in numbers that do not depend on the machine.

    `are_apart`: with privacy.epsilon, examples are judged and measured in passes of their own. `trains_one_layer`: with
    it, each example passes through the body once, whatever the number of epochs (client/measurement/private_training).
    """

    gram_examples: int
    fisher_examples: int
    forward_examples: int
    pool_tokens: int  # that every owner predicts
    predicted_numbers: int
    student_epochs: int  # over these rows
    validated_models: int
    tested_models: int
    sent_numbers: int
    sent_bytes: int
    received_bytes: int
    masks: int
    owners: int
    systems: tuple[System, ...]
    solves: int  # how often each system is solved
    parameters: int
    largest_sum: int  # numbers
    largest_gram: int  # inputs
    are_apart: bool = False
    trains_one_layer: bool = False


def work_of(agreement: Agreement, plan: MergePlan, schedule: Schedule, pool_tokens: int = 0) -> Work:
    """The work of one merge. A multi-round method's steps count as one more pass over the model.

    `pool_tokens`: how many tokens the public pool has, if models predict one.
    """
    wanted = dict(measurements(agreement.methods, agreement.tables))
    again = [each.step for each in schedule.rounds if each.step is not None]
    grams = wanted.get(Measurement.GRAMS, 0)
    if stepped := [each.max_examples for each in again if each.measurement is Measurement.GRAMS]:
        grams += max(stepped)
    forward = wanted.get(Measurement.CLASS_SHARES, 0) + (LOOKED_AT if agreement.task.has_labels else 0)
    forward += 2 * sum(each.max_examples for each in again if each.measurement is Measurement.CLASSIFIER)
    distilled = DISTILL.name in agreement.methods
    taught = DISTILL.of(agreement.tables)
    received = sum(event.layout.size * 4 for event in schedule.events if isinstance(event, Delivery))
    owners = len(agreement.owners)
    masks = 0
    if agreement.summation.kind == "masked":
        dropouts = owners - agreement.needed_owners
        masks = neighbourhood(owners, agreement.colluders, dropouts).degree + 1  # and the owner's own
    metrics = {each.split: len(each.models) for each in schedule.rounds if each.kind == "metrics"}
    sums = [each.layout for each in schedule.rounds]
    has_noise = agreement.privacy.epsilon is not None
    trained = {name.rpartition(".")[0] for name in plan.changed}
    return Work(
        gram_examples=grams,
        fisher_examples=wanted.get(Measurement.FISHER, 0),
        forward_examples=forward,
        pool_tokens=pool_tokens,
        predicted_numbers=taught.asked * taught.outputs(len(agreement.task.labels)) if distilled else 0,
        student_epochs=taught.epochs[-1] if distilled else 0,
        validated_models=metrics.get("validation", 0),
        tested_models=metrics.get("test", 0),
        sent_numbers=sum(layout.size for layout in sums),
        sent_bytes=sum(layout.num_bytes for layout in sums),
        received_bytes=received,
        masks=masks,
        owners=owners,
        systems=tuple(chain.from_iterable(map(systems_of, sums))),
        solves=max(
            Counter(each.method for each in schedule.of_kind("candidate") if each.split == "validation").values(),
            default=1,
        ),
        parameters=sum(prod(shape) for shape in plan.shapes.values()),
        largest_sum=max(layout.size for layout in sums),
        largest_gram=max((shared.gram_size for shared in plan.inputs), default=0),
        are_apart=has_noise,
        trains_one_layer=has_noise and trained == {plan.linear_layers[-1].weight.rpartition(".")[0]},
    )


def systems_of(layout: TensorLayout) -> Iterator[System]:
    """One for each Gram of a layout."""
    outputs: Counter[str] = Counter()
    for entry in layout.entries:
        if entry.product_of and "gram_delta" in entry.name:
            outputs[entry.product_of] += entry.shape[1]
    for entry in layout.entries:
        if entry.name in outputs:
            yield System(inputs=entry.shape[0], outputs=outputs[entry.name])


# --- rates ---


def measure_rates(
    outline: PreTrainedModel, plan: MergePlan, tokens: int, work: Work, load: Callable[[], object] | None = None
) -> Rates:
    """What this machine takes, with as many threads as torch has now. `outline`: the base without weights. `tokens`: of
    an example. `load` loads the base as an owner does, and is timed unless the base is large.
    """
    forward, grams, gradients = pass_seconds(outline, plan, tokens, with_gradients=work.fisher_examples > 0)
    inputs = min(LARGEST_SOLVE, max((each.inputs for each in work.systems), default=1))
    solve, eigenvalues = solve_seconds(inputs)
    square = System(inputs=inputs, outputs=inputs)
    encoding, mask = sum_seconds(MASKED_NUMBERS)
    hashing, copying = byte_seconds(PIECE_BYTES)
    if load is not None and work.parameters <= WHOLE_PARAMETERS:
        loading = _seconds(load) / work.parameters
    else:
        loading = 4 * (LOAD_HASHES * hashing + LOAD_COPIES * copying)
    return Rates(
        forward_of_token=forward,
        gram_pass_of_token=grams,
        gradients_of_token=gradients,
        encoding_of_number=encoding,
        mask_of_number=mask,
        hashing_of_byte=hashing,
        copying_of_byte=copying,
        loading_of_parameter=loading,
        solve_of_flop=solve / square.solve_flops,
        spectrum_of_flop=eigenvalues / square.spectrum_flops,
        times_alone=times_alone(outline, plan, tokens) if work.are_apart else 1.0,
        times_python=_seconds(lambda: sum(each * each for each in range(PYTHON_TURNS))) / PYTHON_SECONDS,
    )


def times_alone(outline: PreTrainedModel, plan: MergePlan, tokens: int) -> float:
    """How many times as long a token takes in a batch of one example."""
    model = _with_blocks(outline, 2 if len(plan.blocks) > 2 else None)
    count = _examples_in(model, tokens, BATCH_TOKENS)
    several, one = batch_of(model, count, tokens), batch_of(model, 1, tokens)
    with torch.inference_mode():
        return max(1.0, count * _seconds(lambda: model(**one)) / _seconds(lambda: model(**several)))


def pass_seconds(
    outline: PreTrainedModel, plan: MergePlan, tokens: int, *, with_gradients: bool
) -> tuple[float, float, float]:
    """Seconds a token takes: in a forward pass, in a Gram pass, and in gradients of one example at a time."""
    blocks = len(plan.blocks)
    if _is_built_whole(outline, plan):
        return _pass_seconds(_with_blocks(outline, None), plan, tokens, BATCH_TOKENS, with_gradients)
    one, two = (
        _pass_seconds(_with_blocks(outline, count), plan, tokens, BATCH_TOKENS // 2, with_gradients) for count in (1, 2)
    )
    forward, grams, gradients = (a + max(b - a, 0.0) * (blocks - 1) for a, b in zip(one, two, strict=True))
    return forward, grams, gradients


def _pass_seconds(
    model: PreTrainedModel, plan: MergePlan, tokens: int, most_tokens: int, with_gradients: bool
) -> tuple[float, float, float]:
    count = _examples_in(model, tokens, most_tokens)
    batch, single = batch_of(model, count, tokens), batch_of(model, 1, tokens)
    measured = _measured(model, plan)
    with torch.inference_mode():
        forward = _seconds(lambda: model(**batch))
    grams = 0.0
    if measured.inputs:  # by a second batch, because memory for large Grams is made ready once
        once = _seconds(lambda: measure_grams(model, measured, [batch]))
        twice = _seconds(lambda: measure_grams(model, measured, [batch, batch]))
        grams = max(twice - once, forward)
    alone = _seconds(lambda: model(**single).logits.float().square().mean().backward()) if with_gradients else 0.0
    return forward / count / tokens, grams / count / tokens, alone / tokens


def rows_of_examples(outline: PreTrainedModel, plan: MergePlan, lengths: Iterable[int]) -> dict[int, dict[str, int]]:
    """For examples of each length in tokens: how many rows one has in a Gram, by its name. Of a large model, in those
    of one block and of what is outside of blocks: the others have as many. How long the targets of sequences are is not
    known, so their decoders are left out.
    """
    model = _with_blocks(outline, None if _is_built_whole(outline, plan) else 1)
    measured = _measured(model, plan)
    has_decoder = model.config.is_encoder_decoder and model.get_output_embeddings() is not None
    found = {}
    for tokens in dict.fromkeys(lengths):
        grams = measure_grams(model, measured, [batch_of(model, 1, tokens)])
        found[tokens] = {
            name: gram.rows for name, gram in grams.items() if not (has_decoder and gram.rows == tokens + 1)
        }
    return found


def expected_rows(
    agreement: Agreement, outline: PreTrainedModel, plan: MergePlan, schedule: Schedule, owners: Sequence[OwnerRows]
) -> Iterator[dict[str, tuple[float, int]]]:
    """For each owner: about how many rows its examples have in each Gram that it measures, and the Gram's dimensions,
    by name.

    Grams of experts are left out, since any number of rows may reach them, and noised ones, which refuse no owner.
    """
    of_example: dict[int, dict[str, int]] = {}
    if work_of(agreement, plan, schedule).gram_examples and not agreement.has_noised_grams:
        of_example = rows_of_examples(outline, plan, (round(each.tokens) for each in owners))
    dimensions, routed = plan.dimensions(), {each.name for each in plan.inputs if each.is_routed}
    steps = [each.step for each in schedule.rounds if each.step is not None]
    for brought in owners:
        examples = min(brought.train, REGMEAN.of(agreement.tables).measured_examples)
        counts = of_example.get(round(brought.tokens), {})
        found: dict[str, tuple[float, int]] = {
            name: (examples * count, dimensions[name]) for name, count in counts.items() if name not in routed
        }
        for step in steps:
            if step.measurement is Measurement.CLASSIFIER and not agreement.task.judges_tokens:
                layer = classifier(plan)
                found[OF_CLASSIFIER] = min(brought.train, step.max_examples), layer.d_in + (layer.bias is not None)
        yield found


def _is_built_whole(outline: PreTrainedModel, plan: MergePlan) -> bool:
    is_small = sum(prod(shape) for shape in plan.shapes.values()) <= WHOLE_PARAMETERS
    is_one_chain = hasattr(outline.config, "num_hidden_layers") and not outline.config.is_encoder_decoder
    return is_small or len(plan.blocks) < 3 or not is_one_chain


def _measured(model: PreTrainedModel, plan: MergePlan) -> MergePlan:
    """The plan with only those inputs whose layers a model with fewer blocks has."""
    names = {name for name, _ in model.named_parameters()}
    inputs = (each for each in plan.inputs if all(parameter_of(layer.weight) in names for layer in each.layers))
    return replace(plan, inputs=tuple(inputs))


@torch.no_grad()
def _with_blocks(outline: PreTrainedModel, count: int | None) -> PreTrainedModel:
    """A model of the outline's kind with so many blocks, or with all. Its weights are made up."""
    config = copy.deepcopy(outline.config)
    if count is not None:
        config.num_hidden_layers = count
    config.use_cache = False
    with torch.device("meta"):
        model: PreTrainedModel = type(outline)(config)
    model = model.to_empty(device="cpu").eval()
    for tensor in chain(model.parameters(), model.buffers()):
        tensor.fill_(0.01) if tensor.is_floating_point() else tensor.zero_()
    model.tie_weights()
    return model


def _examples_in(model: PreTrainedModel, tokens: int, most_tokens: int) -> int:
    """How many examples a measured batch has."""
    return max(1, most_tokens // tokens) if model.main_input_name != "pixel_values" else BATCH_IMAGES


def batch_of(model: PreTrainedModel, count: int, tokens: int) -> Batch:
    """Inputs of the right shape."""
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.zeros(count, *image_shape(model.config))}
    last = model.config.eos_token_id
    last = last if isinstance(last, int) and last < model.get_input_embeddings().num_embeddings else 1
    ids = torch.full((count, tokens), max(0, last - 1))
    ids[:, -1] = last  # a classifier may look for it
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder and model.get_output_embeddings() is not None:
        decoder = torch.ones(count, tokens + 1, dtype=torch.long)  # of another length (GramCollector)
        batch |= {"decoder_input_ids": decoder, "decoder_attention_mask": decoder}
    return batch


def solve_seconds(inputs: int) -> tuple[float, float]:
    """Seconds of a solve with as many outputs as inputs, and of the eigenvalues."""
    rows = torch.randn(2 * inputs, inputs, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = rows.T @ rows
    return _seconds(lambda: solve_symmetric(gram, rows[:inputs])), _seconds(lambda: spectrum(gram))


def sum_seconds(numbers: int) -> tuple[float, float]:
    """Seconds a number takes: encoded and put on and off the disk's cache, and masked for one peer."""
    layout = TensorLayout((TensorEntry(name="numbers", shape=(numbers,), bound=64.0),))
    vector, words = np.full(numbers, 0.5), np.zeros(numbers, "<u8")
    masks: list[mask_stream.Mask] = [(bytes(mask_stream.KEY_BYTES), 1)]
    encoding = _seconds(lambda: fixed_point.encode(layout, vector.copy(), 3))
    masking = _seconds(lambda: mask_stream.add_masks(words, masks, 0, threads=torch.get_num_threads()))
    return encoding / numbers, masking / numbers


def byte_seconds(num_bytes: int) -> tuple[float, float]:
    """Seconds a byte takes: to be hashed, and to be copied."""
    content = np.ones(num_bytes, np.uint8)
    hashing = _seconds(lambda: hashlib.sha256(content.data).digest())
    return hashing / num_bytes, _seconds(content.copy) / num_bytes


def _seconds(work: Callable[[], object]) -> float:
    """The best of a few turns. With one thread, other users of the machine do not count."""
    turns: list[float] = []
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    while sum(turns) < LONG_SECONDS and (len(turns) < 2 or (len(turns) < 5 and sum(turns) < 0.1)):
        started = clock()
        work()
        turns.append(clock() - started)
    return min(turns)


# --- the estimate ---


def owner_seconds(work: Work, rows: OwnerRows, rates: Rates) -> dict[str, float]:
    """What an owner computes, by part."""
    examples = {limit: min(limit, rows.train) for limit in (work.gram_examples, work.fisher_examples)}
    scored = work.validated_models * rows.validation + work.tested_models * rows.test
    looked_at = min(work.forward_examples, 2 * rows.train)
    loads = LOADS + work.validated_models + work.tested_models
    packets = PACKETS + (work.sent_bytes + work.received_bytes) // PART_BYTES
    handling = work.sent_bytes * (HASHES * rates.hashing_of_byte + COPIES * rates.copying_of_byte)
    products = sum(each.product_flops for each in work.systems) * rates.solve_of_flop
    apart = rates.times_alone if work.are_apart else 1.0
    training = rows.epochs * (1 + BACKWARDS)
    if work.trains_one_layer:
        training = apart if rows.epochs else 0.0
    return {
        "reading rows": READS * (rows.train + rows.validation + rows.test) * rows.reading_seconds,
        "training": training * rows.train * rows.tokens * rows.own_cost * rates.forward_of_token,
        "Gram passes": examples[work.gram_examples] * rows.tokens * apart * rates.gram_pass_of_token,
        "Fisher information": examples[work.fisher_examples] * rows.tokens * rates.gradients_of_token,
        "predicting the pool": work.pool_tokens * rows.own_cost * rates.forward_of_token,
        "scoring": (scored + looked_at) * rows.tokens * apart * rates.forward_of_token,
        "loading models": loads * work.parameters * rates.loading_of_parameter,
        "masking": work.sent_numbers * (rates.encoding_of_number + work.masks * rates.mask_of_number),
        "packing and verifying": handling + products,
        "messages": packets * PACKET_SECONDS * rates.times_python,
    }


def coordinator_seconds(work: Work, rates: Rates) -> dict[str, float]:
    """What the coordinator computes, by part."""
    solves = sum(each.solve_flops for each in work.systems) * work.solves * rates.solve_of_flop
    spectra = sum(each.spectrum_flops for each in work.systems) * rates.spectrum_of_flop
    unmasking = work.owners * (rates.encoding_of_number + (rates.mask_of_number if work.masks else 0.0))
    taught = work.student_epochs * work.pool_tokens * (1 + BACKWARDS)
    return {
        "training the student": taught * rates.forward_of_token,
        "solving": solves + spectra,
        "adding up": work.sent_numbers * unmasking,
        "loading models": COORDINATOR_LOADS * work.parameters * rates.loading_of_parameter,
    }


def page_seconds(rates: Rates) -> dict[str, float]:
    """What a simulation takes to complete the agreement and to draw the page."""
    return {"agreement and report": SIMULATION_SECONDS * rates.times_python}


def references_seconds(owners: Sequence[OwnerRows], rates: Rates, processes: int = 1) -> dict[str, float]:
    """What a simulation computes that only somebody who holds all models and rows can know, shared out among so many
    processes (deploy/simulation/references.py). Training on all rows is one process's.
    """
    one_pass = rates.forward_of_token
    own = sum(each.test * each.tokens for each in owners) * sum(each.own_cost for each in owners) * one_pass
    pooled = min((each.epochs for each in owners), default=0) * sum(each.train * each.tokens for each in owners)
    training = pooled * (1 + BACKWARDS) * one_pass
    return {"references": max(training, (own + training) / processes)}


def owner_bytes(work: Work) -> int:
    """The most memory that an owner needs: benchmarks/results/memory.md. Predictions are in it twice, in 8 bytes and in
    4 as the model gives them.
    """
    predicted = 12 * work.predicted_numbers
    return FIXED_BYTES + 4 * work.parameters + int(1.3 * 8 * work.largest_gram**2) + PART_BYTES + predicted


def coordinator_bytes(work: Work) -> int:
    """The most memory that the coordinator needs: while it loads the base, or while it solves. A large sum lies in a
    file, whose pages the system can reclaim, and so does what is solved.
    """
    largest = max((each.inputs * (2 * each.inputs + 3 * each.outputs) for each in work.systems), default=0)
    solving = min(8 * work.largest_sum, MAX_BYTES_IN_MEMORY) + 8 * largest + PART_BYTES
    return FIXED_BYTES + max(4 * work.parameters, solving) + PART_BYTES


def disk_bytes(
    vector: int,
    candidates: Sequence[int],
    model: int,
    published: int,
    *,
    owners: int = 0,
    trained: int = 0,
    at_once: int = 1,
    coordinates: bool = False,
    is_verified: bool = True,
) -> int:
    """The least room that these parties need on one disk, beside the models and rows that are there.

    `vector`: an owner's largest, with 8 bytes a number; `candidates`: merged models that are kept together;
    `model`: a whole one in float32; `published`: what is published, a model or an adapter. `owners`: the number
    of them, of whom `trained` have yet to make their models, and `at_once` compute at a time.
    """
    received = sum(candidates)
    measuring = (owners + coordinates) * vector + min(owners, at_once) * model
    summing = (owners + 2 * coordinates) * vector  # the masked sum, and what is unmasked
    # The coordinator keeps each candidate as sent, and until it is verified, what rounding took from it.
    sent = vector + (1 + is_verified) * received
    sending = owners * vector + coordinates * (sent + max(candidates, default=0))  # the last one also as it was solved
    verifying = owners * (vector + received) + coordinates * sent
    publishing = coordinates * (vector + max(candidates, default=0) + published)
    return trained * model + max(measuring, summing, sending, verifying, publishing)


def in_words(parts: dict[str, float]) -> str:
    """`about 12 min: scoring 9 min, Gram passes 3 min`, the longest first. What takes less than a minute is mostly what
    is not computed here.
    """
    total = sum(parts.values())
    if total < 60:
        return "a minute or two"
    shown = sorted((each for each in parts.items() if each[1] >= 0.02 * total), key=lambda each: -each[1])
    return f"about {duration(total)}: " + ", ".join(f"{name} {duration(seconds)}" for name, seconds in shown)


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def cost_beside(own: PreTrainedModel, base: PreTrainedModel) -> float:
    """What a token takes in an owner's model, as a share of what it takes in the base: by the weights that it meets."""
    return _weights_of_a_token(own) / max(1, _weights_of_a_token(base))


def _weights_of_a_token(model: PreTrainedModel) -> int:
    looked_up = sum(each.weight.numel() for each in model.modules() if isinstance(each, torch.nn.Embedding))
    everything: int = sum(each.numel() for each in model.parameters())
    return everything - looked_up


def transfer_in_words(num_bytes: int) -> str:
    """How long so many bytes travel."""
    return ", ".join(f"{duration(num_bytes / rate)} at {name}" for name, rate in NETWORKS.items())
