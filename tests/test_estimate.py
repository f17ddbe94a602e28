"""What a merge takes, computed before it is run: counts, formulas and words. Rates are not judged: machines differ."""

from dataclasses import replace

import pytest
import torch

from common.agreement import Agreement, Privacy
from common.merge_methods.regmean import RegMeanTable
from common.merge_methods.regmean_plus_plus import REGMEAN_PLUS_PLUS
from common.merge_methods.task_arithmetic import TaskArithmeticTable
from common.models.plan import MergePlan
from common.schedule import schedule_of
from deploy import estimate
from deploy.estimate import OwnerRows, Rates, System, Work, work_of
from tests.support.architectures import ARCHITECTURES, made
from tests.support.models import tiny_bert

RATES = Rates(
    forward_of_token=1.0,
    gram_pass_of_token=2.0,
    gradients_of_token=3.0,
    encoding_of_number=10.0,
    mask_of_number=1.0,
    solve_of_flop=1.0,
    spectrum_of_flop=1.0,
    hashing_of_byte=2.0,
    copying_of_byte=1.0,
    loading_of_parameter=5.0,
)


@pytest.fixture
def work(agreement: Agreement, plan: MergePlan) -> Work:
    return work_of(agreement, plan, schedule_of(agreement, plan))


def test_work_is_what_the_schedule_says(agreement: Agreement, plan: MergePlan, work: Work) -> None:
    schedule = schedule_of(agreement, plan)
    assert work.sent_bytes == sum(each.layout.num_bytes for each in schedule.rounds)
    assert work.gram_examples == agreement.tables["regmean"].measured_examples  # type: ignore[attr-defined]
    assert work.fisher_examples == 256
    assert work.solves == len(RegMeanTable().alphas)
    assert work.validated_models == len(RegMeanTable().alphas) + len(TaskArithmeticTable().scales)
    assert work.tested_models == 2 + len(agreement.methods)  # the base and each owner's own, too
    assert work.masks == 3  # two peers, and the owner's own
    assert work.parameters == sum(torch.Size(shape).numel() for shape in plan.shapes.values())


def test_every_gram_is_a_system_with_the_outputs_of_its_layers(plan: MergePlan, work: Work) -> None:
    wanted = [(shared.gram_size, sum(layer.d_out for layer in shared.layers)) for shared in plan.inputs]
    assert [(system.inputs, system.outputs) for system in work.systems] == wanted


def test_with_epsilon_examples_pass_one_at_a_time_and_a_classifier_alone_once(
    agreement: Agreement, plan: MergePlan, work: Work
) -> None:
    assert not work.are_apart
    private = agreement.model_copy(update={"privacy": Privacy(epsilon=8.0), "method": "average", "compare_with": ()})
    found = work_of(private, plan, schedule_of(private, plan))
    assert found.are_apart
    assert not found.trains_one_layer
    head = ("classifier.weight", "classifier.bias")
    fixed = tuple(name for name in plan.shapes if name not in head)
    alone = replace(plan, left_alone=fixed, averaged=head, inputs=(), blocks=plan.blocks)
    frozen = private.model_copy(update={"bounds": private.bounds.model_copy(update={"grams": ()})})
    assert work_of(frozen, alone, schedule_of(frozen, alone)).trains_one_layer
    assert estimate.times_alone(tiny_bert(), plan, 4) >= 1


def test_steps_of_a_multi_round_method_are_one_more_gram_pass(agreement: Agreement, plan: MergePlan) -> None:
    both = agreement.model_copy(update={"compare_with": (REGMEAN_PLUS_PLUS.name,)})
    assert work_of(both, plan, schedule_of(both, plan)).gram_examples == 2 * RegMeanTable().measured_examples


def test_an_owner_takes_its_examples_times_the_rates(work: Work) -> None:
    rows = OwnerRows(train=400, validation=10, test=20, epochs=2, tokens=5.0, reading_seconds=0.5)
    alone = estimate.owner_seconds(replace(work, are_apart=True), rows, replace(RATES, times_alone=3.0))
    together = estimate.owner_seconds(work, rows, replace(RATES, times_alone=3.0))
    assert alone["scoring"] == 3 * together["scoring"]
    assert alone["Gram passes"] == 3 * together["Gram passes"]
    assert alone["training"] == together["training"]
    assert estimate.owner_seconds(replace(work, trains_one_layer=True), rows, RATES)["training"] == 400 * 5
    handling = estimate.HASHES * 2 + estimate.COPIES
    assert estimate.owner_seconds(work, rows, RATES) == {
        "reading rows": estimate.READS * 430 * 0.5,
        "training": 2 * 400 * 5 * 3,
        "Gram passes": 400 * 5 * 2,  # it has fewer examples than may be measured
        "Fisher information": 256 * 5 * 3,
        "predicting the pool": 0,
        "scoring": (work.validated_models * 10 + work.tested_models * 20 + estimate.LOOKED_AT) * 5,
        "loading models": (estimate.LOADS + 8 + 6) * work.parameters * 5,
        "masking": work.sent_numbers * (10 + 3),
        "packing and verifying": work.sent_bytes * handling + sum(each.product_flops for each in work.systems),
        "messages": estimate.PACKETS * estimate.PACKET_SECONDS,
    }


def test_the_coordinator_solves_each_system_once_for_each_candidate(work: Work) -> None:
    system = System(inputs=30, outputs=2)
    assert system.solve_flops == 30**3 / 3 + 6 * 30**2 * 2
    few = replace(work, systems=(system, system), solves=4, owners=3, sent_numbers=7)
    assert estimate.coordinator_seconds(few, RATES) == {
        "training the student": 0,
        "solving": 2 * 4 * system.solve_flops + 2 * system.spectrum_flops,
        "adding up": 7 * 3 * (10 + 1),
        "loading models": estimate.COORDINATOR_LOADS * work.parameters * 5,
    }


def test_a_simulation_judges_every_owner_s_model_on_all_rows_and_trains_one_on_all() -> None:
    owners = [OwnerRows(train=100, validation=10, test=test, epochs=2, tokens=5.0) for test in (20, 40)]
    assert estimate.references_seconds(owners, RATES) == {"references": 2 * (20 + 40) * 5 + 2 * 200 * 5 * 3}
    # Two processes judge side by side, but one of them trains.
    assert estimate.references_seconds(owners, RATES, processes=2) == {"references": 2 * 200 * 5 * 3}
    brought = [replace(each, epochs=0) for each in owners]
    assert estimate.references_seconds(brought, RATES, processes=2) == {"references": (20 + 40) * 5}
    assert estimate.references_seconds(brought, RATES)["references"] == 2 * (20 + 40) * 5


def test_what_is_python_takes_longer_on_a_slower_machine(work: Work) -> None:
    slow, rows = replace(RATES, times_python=3.0), OwnerRows(train=1, validation=1, test=1)
    assert estimate.page_seconds(slow)["agreement and report"] == 3 * estimate.SIMULATION_SECONDS
    taken = estimate.owner_seconds(work, rows, slow)["messages"]
    assert taken == pytest.approx(3 * estimate.owner_seconds(work, rows, RATES)["messages"])


def test_a_pool_is_predicted_by_every_owner_and_trained_on_by_the_coordinator(work: Work) -> None:
    distilled = replace(work, pool_tokens=900, predicted_numbers=1_000_000, student_epochs=3)
    rows = OwnerRows(train=400, validation=10, test=20)
    assert estimate.owner_seconds(distilled, rows, RATES)["predicting the pool"] == 900
    assert estimate.coordinator_seconds(distilled, RATES)["training the student"] == 3 * 900 * 3
    assert estimate.owner_bytes(distilled) - estimate.owner_bytes(work) == 12_000_000


def test_every_party_holds_one_whole_model_while_it_loads(work: Work) -> None:
    large = replace(work, parameters=7_000_000_000)
    assert estimate.owner_bytes(large) > 28_000_000_000
    assert estimate.coordinator_bytes(large) > 28_000_000_000


def test_a_disk_has_room_for_the_moment_that_needs_most() -> None:
    vector, model = 11_800, 4_900
    whole = [model], model, model  # one candidate, as large as a model, which is published
    assert estimate.disk_bytes(vector, *whole, owners=1) == vector + model  # measuring, or verifying
    assert estimate.disk_bytes(vector, *whole, coordinates=True) == vector + 3 * model  # sending
    assert estimate.disk_bytes(100, *whole, coordinates=True, is_verified=False) == 100 + 2 * model  # no rest is kept
    assert estimate.disk_bytes(vector, *whole, owners=3, coordinates=True) == 4 * vector + 5 * model  # verifying
    assert estimate.disk_bytes(vector, [model] * 5, model, model, owners=1) == vector + 5 * model  # a sweep
    assert estimate.disk_bytes(100, [1], 1, 1, owners=3, coordinates=True) == 500  # summing
    assert estimate.disk_bytes(100, [1], 90, 1, owners=3, at_once=2) == 300 + 2 * 90  # two owners measure
    assert estimate.disk_bytes(10, [1], 90, 90, coordinates=True) == 101  # publishing a model merged in part
    assert estimate.disk_bytes(10, [1], 90, 90, owners=2, trained=2) == 20 + 90 + 2 * 90  # two models yet to be made


def test_an_owner_with_a_smaller_model_of_its_own_takes_less(work: Work) -> None:
    distilled = replace(work, pool_tokens=900)
    rows = OwnerRows(train=400, validation=10, test=20, epochs=2, own_cost=0.25)
    assert estimate.owner_seconds(distilled, rows, RATES)["predicting the pool"] == 225
    assert estimate.owner_seconds(distilled, rows, RATES)["training"] == 2 * 400 * 3 / 4
    assert estimate.references_seconds([rows, replace(rows, epochs=0, own_cost=1.0)], RATES)["references"] == 40 * 1.25
    model, larger = tiny_bert(), tiny_bert()
    larger.bert.embeddings.word_embeddings = torch.nn.Embedding(8000, 16)  # looked up, which costs next to nothing
    assert estimate.cost_beside(model, larger) == 1.0
    larger.bert.encoder.layer = larger.bert.encoder.layer[:1]
    assert 1.5 < estimate.cost_beside(model, larger) < 2.5


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_of_made_up_weights_runs_and_has_as_many_blocks_as_asked_for(name: str) -> None:
    outline, plan, _ = made(name)
    rates = estimate.pass_seconds(outline, plan, 4, with_gradients=True)
    assert all(0 < seconds < 1 for seconds in rates)
    one = estimate._with_blocks(outline, 1)
    assert sum(each.numel() for each in one.parameters()) <= sum(each.numel() for each in outline.parameters())
    with torch.inference_mode():
        assert one(**estimate.batch_of(one, 2, 4)).logits.isfinite().all()


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "1 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (7200, "2.0 h")]
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert estimate.duration(seconds) == words


def test_the_longest_parts_come_first_and_little_ones_are_left_out() -> None:
    parts = {"masking": 1.0, "scoring": 500.0, "Gram passes": 120.0, "training": 0.0}
    assert estimate.in_words(parts) == "about 10 min: scoring 8 min, Gram passes 2 min"


def test_a_merge_of_seconds_has_no_parts() -> None:
    assert estimate.in_words({"scoring": 59.0}) == "a minute or two"


def test_a_gigabyte_takes_80_seconds_at_100_megabits() -> None:
    assert estimate.transfer_in_words(10**9) == "80 s at 100 Mbit/s, 8 s at 1 Gbit/s"
