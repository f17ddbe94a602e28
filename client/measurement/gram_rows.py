"""How many rows the Gram of an input must have, so that it hides them."""

from common.agreement import Agreement
from common.errors import DataError
from common.merge_methods import METHODS
from common.models.layers import parameter_of
from common.models.plan import MergePlan

OF_CLASSIFIER = "the classifier's input"  # the Gram that a refit measures on a merged body


def check_gram_rows(
    agreement: Agreement,
    plan: MergePlan,
    owner: str,
    gram: str,
    rows: float,
    dimensions: int,
    *,
    expected: bool = False,
) -> None:
    """Raise DataError for fewer rows than agreed. `expected`: they are about so many, and nothing was measured yet."""
    least = agreement.privacy.min_rows_per_dimension
    if rows < least * dimensions:  # check: enough-rows-for-a-gram
        has, ending = ("would have about", "") if expected else ("has", "; nothing has left")
        without = _without_gram(agreement, plan, gram)
        raise DataError(
            f"{owner}: the Gram of {gram} {has} {rows:.0f} rows for {dimensions} dimensions, the agreement demands "
            f"{least:g} per dimension{ending}",
            hint=f"bring more examples and measure them (measured_examples), or agree {without}",
        )


def _without_gram(agreement: Agreement, plan: MergePlan, gram: str) -> str:
    """What to agree on so that no owner measures this Gram."""
    need_it = [each for each in agreement.methods if METHODS[each].fits_classifier]
    if need_it and gram in (OF_CLASSIFIER, plan.inputs[-1].name):
        return f"on methods that leave the classifier as it was merged, unlike {' and '.join(need_it)}"
    return f'to merge this layer from its changes alone: [regmean] data_free_layers = ["{parameter_of(gram)}"]'
