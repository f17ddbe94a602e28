"""What an agreement must satisfy, one named function per rule. Each raises ValueError with the value and the bound."""

from collections import Counter
from collections.abc import Callable, Iterable
from math import inf

from common.agreement.tables import CLASSIFYING, WORST_GROUP, DraftTables
from common.errors import RuleError
from common.merge_methods import METHODS, ORDERED, Hyperparameters
from common.merge_methods.distill import DISTILL, MAX_NUMBERS, STARTS
from common.merge_methods.method import Method
from common.merge_methods.search import SEARCH
from common.names import TAKEN_NAMES
from common.privacy.gaussian import epsilon_of
from common.privacy.legs import spent_beside_training
from common.text import alike
from common.thresholds import MAX_COMPLETE, quorum

LARGEST_TARGET = 1e6  # of a regression, so that products of targets and inputs fit into fixed point
LEAST_RIDGE = 1e-4  # with less, an error where no row reaches would be lost beside the others (attack 129)
LEAST_FOR_TRAINING = 0.2  # of the privacy budget: with less, its looser accounting leaves no room for training
MAX_OWNERS_IN_32_BITS = 150  # with more, a contribution smaller than the others would be rounded away


def each_owner_is_named_once(draft: DraftTables) -> None:
    for name, count in Counter(draft.owner_names).items():
        if count > 1:
            raise RuleError(f"owners: duplicate owner name {name!r}", hint="give each owner a name of its own")
        if name in TAKEN_NAMES:  # check: owners-take-no-other-file
            raise RuleError(f"owners: {name!r} is {TAKEN_NAMES[name]} name", hint="give the owner another name")


def min_owners_is_at_most_all(draft: DraftTables) -> None:
    if draft.needed_owners > len(draft.owners):
        raise RuleError(f"min_owners = {draft.min_owners}: there are {len(draft.owners)} owners")


def every_party_has_its_own_keys(draft: DraftTables) -> None:
    keys = [owner.public_key for owner in draft.owners if owner.public_key is not None]
    if draft.coordinator is not None and draft.coordinator.public_key in keys:  # check: the-coordinator-is-no-owner
        raise RuleError(
            "coordinator.public_key: it is an owner's, too; whoever holds it could read the other owners' vectors",
            hint="the coordinator makes its own: amalgram keys new coordinator. With three owners, it must be a fourth "
            "party",
        )
    if len(set(keys)) != len(keys):
        raise RuleError("owners: duplicate public key", hint="every party makes its own: amalgram keys new NAME")
    node_keys = [owner.node_key for owner in draft.owners if owner.node_key is not None]
    if len(set(node_keys)) != len(node_keys):
        raise RuleError("owners: duplicate node_key", hint="every owner makes its own: amalgram keys new NAME")


def a_masked_total_has_three_honest_owners(draft: DraftTables) -> None:
    """At least three honest inputs in every total, and a quorum that can sign at most one survivor list."""
    if draft.summation.kind != "masked":
        return
    count, needed, colluders = len(draft.owners), draft.needed_owners, draft.colluders
    if needed < 3:
        raise RuleError(
            f"owners: a masked sum needs at least 3 of them, min_owners {'is' if draft.min_owners else 'would be'} "
            f"{needed}; with two, each knows the other's part of any total",
            hint="leave min_owners out"
            if count > 2
            else 'find a third owner; or, if both accept that, agree on summation.kind = "plain"',
        )
    least = max(quorum(count, colluders), colluders + 3)
    if needed < least:
        raise RuleError(
            f"min_owners = {needed}: with {count} owners, of whom {colluders} may collude, at least {least} must take "
            f"part (the quorum of {quorum(count, colluders)}, and three honest owners)"
        )
    if draft.summation.quorum not in (None, quorum(count, colluders)):  # check: quorum-is-computed
        raise RuleError(
            f"summation.quorum = {draft.summation.quorum}: with {count} owners, of whom {colluders} may collude, it is "
            f"{quorum(count, colluders)}",
            hint="leave summation.quorum out",
        )


def the_same_rows_are_weighted_in_few_ways(draft: DraftTables) -> None:
    """Sums of the same rows with as many kinds of weights as there are honest owners tell these owners apart.

    As in any other total, which has three owners and one sum, two more owners must be unknown than there are sums.
    """
    if draft.summation.kind != "masked":
        return
    honest = draft.needed_owners - draft.colluders
    for name in draft.methods:
        weightings = len(METHODS[name].weightings_of_the_same_rows(draft.tables))
        if weightings > max(1, honest - 2):  # check: few-weightings
            raise RuleError(
                f"{name}: sums of the same rows with {weightings} kinds of weights would tell {honest} honest owners "
                f"apart ({draft.needed_owners} take part, {draft.colluders} may collude)",
                hint=f"sweep at most {max(1, honest - 2)} values (refit.balances), or lower summation.colluders",
            )


def hidden_metrics_cannot_be_subtracted_out(draft: DraftTables) -> None:
    hidden = len(draft.owners) - len(draft.shown_owners)
    may_drop_out = len(draft.owners) - draft.needed_owners
    least = may_drop_out + draft.colluders + 3
    if 0 < hidden < least:
        raise RuleError(
            f'owners: {hidden} have metrics = "summed", {may_drop_out} may drop out and {draft.colluders} may collude; '
            "the total minus the known metrics would show too much",
            hint=f'set metrics = "summed" for no owner, or for at least {least}',
        )


def predictions_can_be_summed(draft: DraftTables) -> None:
    task, table = draft.task, DISTILL.of(draft.tables)
    if DISTILL.name not in draft.methods:
        for owner in draft.owners:
            if owner.gives == "predictions" or owner.labels:
                raise RuleError(
                    f"owners: {owner.name} gives predictions alone, or has labels of its own, and no method sums "
                    "predictions",
                    hint='agree on method = "distill"',
                )
        return
    if task.kind == "sequence-to-sequence":
        raise RuleError(
            "distill: sequence-to-sequence cannot be distilled: what a model writes depends on what it wrote before",
            hint="it takes classifiers and regressions of texts, images or words, and causal-lm",
        )
    if task.head == "private":
        raise RuleError(
            'distill: task.head = "private", so predictions are of different labels', hint="leave task.head out"
        )
    if table.text_pair is not None and task.kind != "text-classification":
        raise RuleError(
            f"distill.text_pair: a model of kind {task.kind} reads no pairs of texts", hint="leave text_pair out"
        )
    if table.weights == "density" and task.kind == "causal-lm":
        raise RuleError(
            'distill.weights = "density": how close a text is says nothing about its single tokens',
            hint='agree on weights = "alike"',
        )
    has_one = task.problem_type == "single_label_classification" and task.has_labels
    if table.keep != "nothing" and not has_one:
        raise RuleError(
            f'distill.keep = "{table.keep}": it compares confidences, which need one label per row, among several',
            hint="leave distill.keep out",
        )
    outputs = table.outputs(len(task.labels))
    if table.asked * outputs > MAX_NUMBERS:  # check: predictions-are-bounded
        raise RuleError(
            f"distill: {table.asked:,} predictions of {outputs:,} numbers each are more than {MAX_NUMBERS:,}, which "
            "every owner would send",
            hint="agree on a pool of fewer rows"
            + (" or a smaller distill.positions" if task.kind == "causal-lm" else ""),
        )


def every_number_hides_its_owners(draft: DraftTables) -> None:
    """Weights and labels that only some owners have are summed over these alone, which must be enough of them.

    A sum over all owners hides a single one among three that are honest. Whoever adds zeros hides nobody.
    """
    givers = [owner for owner in draft.owners if owner.gives == "weights"]
    methods = [name for name in draft.methods if METHODS[name].gives_weights(draft.tables)]
    for owner in givers:
        if owner.labels:
            raise RuleError(
                f"owners: {owner.name} has labels of its own and gives weights, whose head is over all labels",
                hint='give it gives = "predictions", or leave labels out',
            )
    allowed = (DISTILL.name, *STARTS)
    for name in draft.methods if len(givers) < len(draft.owners) else ():
        if name not in allowed:
            raise RuleError(
                f"{name}: some owners give predictions alone, and it sums more than weight changes",
                hint=f"with them, methods may be {', '.join(allowed)}",
            )
    may_drop_out = len(draft.owners) - draft.needed_owners
    least = _fewest_that_hide_each_other(draft)
    if methods and len(givers) < least:  # check: enough-owners-give-weights
        raise RuleError(
            f"owners: {len(givers)} give weights, which {methods[0]} sums, and at least {least} must: {may_drop_out} "
            f"may drop out, {draft.colluders} may collude, and three honest ones hide each other",
            hint=(
                'agree on [distill] start = "base" and a higher learning_rate, such as 5e-4'
                if methods[0] == DISTILL.name
                else f"leave {methods[0]} out"
            )
            + (", or agree on fewer [summation] colluders" if draft.colluders else ""),
        )
    for number, label in enumerate(draft.task.labels):
        knowing = sum(number not in draft.unknown_labels.get(owner.name, ()) for owner in draft.owners)
        if DISTILL.name in draft.methods and knowing < least:  # check: enough-owners-know-a-label
            raise RuleError(
                f"owners: the models of {knowing} know the label {label!r}, and at least {least} must: whoever is "
                "nearly alone with it would be read",
                hint="leave the label out of task.labels, or agree on fewer [summation] colluders",
            )


def differences_of_labels_hide_their_owners(draft: DraftTables) -> None:
    """Sums over labels of the totals must not be about fewer owners than a total is.

    An owner's probabilities add up to 1 over the labels of its model. So if others know either all of some labels or
    none, the sum over these labels has 1 or 0 of each of them, and the rest is about the other owners alone. If every
    owner's labels are connected by label sets that enough owners share each, any sum that is not the same whatever
    models say is about all owners of one such set. What owners add to the closeness is the same for each label that
    they know: there the difference of two labels is about the owners that know one of them alone, so all label sets
    must be shared.
    """
    if DISTILL.name not in draft.methods or not draft.unknown_labels:
        return
    least, every = _fewest_that_hide_each_other(draft), frozenset(range(len(draft.task.labels)))
    label_sets = {owner.name: every - draft.unknown_labels.get(owner.name, frozenset()) for owner in draft.owners}
    shared = [each for each, count in Counter(label_sets.values()).items() if count >= least]
    connected, by_density = _connected(shared), DISTILL.of(draft.tables).weights == "density"
    for name, known in label_sets.items():
        is_hidden = known in shared if by_density else any(known <= each for each in connected)
        if not is_hidden:  # check: label-sets-hide-their-owners
            raise RuleError(
                f"owners: which labels the model of {name} knows tells its predictions apart from the others': at "
                f"least {least} owners must know the same labels",
                hint="leave out its labels or its owner, or agree on fewer [summation] colluders"
                + (', or on [distill] weights = "alike"' if by_density else ""),
            )


def _fewest_that_hide_each_other(draft: DraftTables) -> int:
    """The fewest owners that a total must be about, so that three honest ones are in it."""
    return len(draft.owners) - draft.needed_owners + draft.colluders + 3 if draft.summation.kind == "masked" else 1


def _connected(label_sets: Iterable[frozenset[int]]) -> list[frozenset[int]]:
    """The unions of those that have labels in common, directly or through others."""
    found: list[frozenset[int]] = []
    for each in label_sets:
        joined = [other for other in found if other & each]
        found = [other for other in found if not other & each] + [each.union(*joined)]
    return found


def an_owner_knows_agreed_labels(draft: DraftTables) -> None:
    for owner in draft.owners:
        for label in owner.labels:
            if draft.task.labels and label not in draft.task.labels:
                raise RuleError(
                    f"owners: {owner.name} knows the label {label!r}, which is not among {list(draft.task.labels)}",
                    hint="write it as task.labels does",
                )
        if owner.labels and (len(owner.labels) < 2 or len(set(owner.labels)) != len(owner.labels)):
            raise RuleError(f"owners: {owner.name} has labels = {list(owner.labels)}: at least two, each named once")


def multi_round_methods_need_all_owners(draft: DraftTables) -> None:
    if draft.multi_round_methods and draft.needed_owners < len(draft.owners):  # check: all-owners-in-every-round
        raise RuleError(
            f"min_owners = {draft.needed_owners}: {draft.multi_round_methods[0].name} needs several rounds, and "
            "rounds over different owners would expose the difference",
            hint=f"all {len(draft.owners)} owners must take part: leave min_owners out",
        )


def thirty_two_bits_are_enough(draft: DraftTables) -> None:
    if not draft.summation.has_scales:
        return
    count = len(draft.owners)
    fitting = [method.name for method in ORDERED if method.fits_32_bits]
    for name in draft.methods:
        if name not in fitting:
            raise RuleError(
                f"summation.ring_bits = 32: {name} needs 64",
                hint=f"32 bits are enough for {', '.join(fitting)}",
            )
    if draft.needed_owners < count:  # check: all-owners-in-32-bits
        raise RuleError(
            f"min_owners = {draft.needed_owners}: with summation.ring_bits = 32 there are two rounds, and rounds over "
            "different owners would expose the difference",
            hint=f"all {count} owners must take part: leave min_owners out",
        )
    if count > MAX_OWNERS_IN_32_BITS:
        raise RuleError(
            f"summation.ring_bits = 32: at most {MAX_OWNERS_IN_32_BITS} owners, there are {count}; with more, a "
            "contribution smaller than the others would be rounded away",
            hint="agree on summation.ring_bits = 64",
        )


def verified_merges_can_be_verified(draft: DraftTables) -> None:
    """A check needs a masked sum, equations with one solution, and a model that travels as it was solved."""
    if draft.summation.kind == "plain" and draft.verification.required:
        raise RuleError("verification.required = true: a plain sum cannot be verified", hint="leave required out")
    if len(draft.owners) > MAX_COMPLETE and draft.verification.required:
        raise RuleError(
            f"verification.required = true: at most {MAX_COMPLETE} owners can verify a merge, there are "
            f"{len(draft.owners)}",
            hint="leave required out",
        )
    if not draft.is_verified:
        return
    for name in draft.methods:
        if METHODS[name].trust == "coordinator":
            raise RuleError(
                f"{name}: no owner can verify what it merges",
                hint="if all owners trust the coordinator to send what it solved, agree on [verification] required = "
                "false",
            )
    for name, table in draft.tables.items():
        ridge = getattr(table, "ridge", LEAST_RIDGE)
        if ridge < LEAST_RIDGE:  # check: ridges-are-large-enough
            raise RuleError(
                f"{name}.ridge = {ridge:g}: must be at least {LEAST_RIDGE:g}, so that the merge has one value that "
                "owners can verify",
                hint="raise it, or agree on [verification] required = false",
            )


def what_is_bounded_has_noise(draft: DraftTables) -> None:
    """Training bounds what a model reveals of a row. A sum of statistics of rows needs noise of its own."""
    epsilon = draft.privacy.epsilon
    if epsilon is None:
        return
    for name in draft.methods:
        method = METHODS[name]
        if method.noised_sums(draft.tables):
            problem = None if draft.task.judges_tokens else draft.task.problem_type
            method.check_noised(draft.tables, draft.weighting, problem)
        elif method.reads_rows(draft.tables):  # check: bounded-merges-read-no-rows
            raise RuleError(
                f"privacy.epsilon = {epsilon:g}: {name} sums statistics of rows, to which no noise is added",
                hint="merge by " + ", ".join(each.name for each in ORDERED if _can_be_bounded(each, draft)),
            )
    if "grams" in draft.budget_shares and draft.summation.has_scales:  # check: no-scales-of-exact-grams
        raise RuleError(
            f"privacy.epsilon = {epsilon:g}: with summation.ring_bits = 32, Gram matrices have scales, which are "
            "made of them without noise",
            hint="agree on summation.ring_bits = 64",
        )
    if draft.task.has_labels and not draft.task.is_regression and draft.task.label_set == "own":
        raise RuleError(  # check: bounded-merges-look-at-no-labels
            f'privacy.epsilon = {epsilon:g}: with task.label_set = "own", metrics depend on which labels an owner\'s '
            "training rows have",
            hint='agree on task.label_set = "all"',
        )
    if draft.task.head == "private":
        raise RuleError(
            f'privacy.epsilon = {epsilon:g}: with task.head = "private", owners have no labels in common, by which '
            "metrics with noise are summed",
            hint="share the head",
        )
    if draft.evaluation.sign_above is not None:  # check: refusals-tell-nothing-of-rows
        raise RuleError(
            f"evaluation.sign_above = {draft.evaluation.sign_above:g}: an owner that does not sign shows how the model "
            "does on its own rows, to which no noise is added (privacy.epsilon)",
            hint="leave sign_above out",
        )


def _can_be_bounded(method: Method[Hyperparameters], draft: DraftTables) -> bool:
    return not method.reads_rows(draft.tables) or bool(method.noised_sums(draft.tables))


def the_legs_are_within_the_budget(draft: DraftTables) -> None:
    shares = draft.budget_shares
    is_enough = round(shares["training"], 9) >= LEAST_FOR_TRAINING
    if draft.privacy.epsilon is None or is_enough:  # check: legs-fit-the-budget
        return
    spent = ", ".join(f"{name} {share:g}" for name, share in shares.items() if name != "training")
    raise RuleError(
        f"privacy.legs: {spent}: they add up to {1 - shares['training']:g} of the budget, at most "
        f"{1 - LEAST_FOR_TRAINING:g} may be spent beside training",
        hint="lower a share in [privacy.legs]",
    )


def declared_budgets_leave_room(draft: DraftTables) -> None:
    """What is declared is added to the sums' part by basic composition, since nothing else is known of it."""
    for owner in draft.owners:
        if owner.declared is None:
            continue
        if draft.privacy.epsilon is None:
            raise RuleError(
                f"owners: {owner.name} declares epsilon = {owner.declared.epsilon:g}, and the agreement bounds nothing",
                hint="agree on privacy.epsilon, or leave declared out",
            )
        rest = draft.privacy.delta - owner.declared.delta
        beside = epsilon_of(rest, spent_beside_training(draft)) if rest > 0 else inf
        if owner.declared.epsilon + beside > draft.privacy.epsilon:  # check: declared-budgets-are-counted
            raise RuleError(
                f"owners: {owner.name} declares epsilon = {owner.declared.epsilon:g}, delta = "
                f"{owner.declared.delta:g}, which with the sums' part is more than privacy.epsilon = "
                f"{draft.privacy.epsilon:g}, delta = {draft.privacy.delta:g}",
                hint="agree on a larger privacy.epsilon or privacy.delta, or on smaller privacy.legs",
            )


def methods_fit_together(draft: DraftTables) -> None:
    if len(set(draft.methods)) != len(draft.methods):
        raise RuleError(f"compare_with = {list(draft.compare_with)}: names a method twice, or {draft.method!r} again")
    for name in draft.methods:
        METHODS[name].check(draft.tables)


def a_sweep_tries_each_value_once(draft: DraftTables) -> None:
    for method, table in draft.tables.items():
        for key, values in table:
            if isinstance(values, tuple) and len(set(values)) != len(values):
                raise RuleError(f"{method}.{key} = {list(values)}: duplicate value")


def the_task_is_consistent(draft: DraftTables) -> None:
    task = draft.task
    if task.head == "private" and not task.has_labels:
        raise RuleError(f'task.head = "private": a model of kind {task.kind} has no head over labels')
    if task.head == "private" and draft.publish.adapter_rank is not None:
        raise RuleError('publish.adapter_rank: an adapter holds a shared head, but task.head is "private"')
    for name in draft.methods if task.head == "private" else ():
        if METHODS[name].needs_classifier:
            raise RuleError(
                f'{name} changes the classifier that owners share, but task.head is "private"',
                hint=f"leave {name} out of method and compare_with",
            )
    if not task.has_labels and task.labels:
        raise RuleError(f"task.labels = {list(task.labels)}: a model of kind {task.kind} has no labels")
    if len(task.labels) == 1 and not task.is_regression:
        raise RuleError(f"task.labels = {list(task.labels)}: at least two labels are needed")
    if len(set(task.labels)) != len(task.labels):
        raise RuleError(f"task.labels = {list(task.labels)}: duplicate label")
    by_look = {alike(label): label for label in task.labels}
    for label in task.labels:
        if by_look[alike(label)] != label:  # check: labels-look-different
            raise RuleError(
                f"task.labels: {label!r} and {by_look[alike(label)]!r} differ only in case, or in characters that look "
                "the same",
                hint="rename one of them, in the files too",
            )
    if draft.choose_by not in (*task.metrics, WORST_GROUP):
        kind = "regression" if task.is_regression else task.kind
        raise RuleError(f"evaluation.choose_by = {draft.choose_by!r}: must be {' or '.join(task.metrics)} for {kind}")


def groups_are_of_classified_rows(draft: DraftTables) -> None:
    """A group's metric is the share of its rows that are right; without noise, which nothing adds to it."""
    task, groups = draft.task, draft.evaluation.groups
    if not groups:
        if draft.choose_by == WORST_GROUP:
            raise RuleError(
                "evaluation.choose_by = 'worst_group': no groups are agreed on",
                hint='name them: groups = ["north", "south"], values of the column that owners name as data.group',
            )
        return
    if task.kind not in CLASSIFYING or task.is_regression:
        raise RuleError(
            f"evaluation.groups: a row of {'a regression' if task.is_regression else task.kind} is not right or wrong",
            hint=f"groups are judged for {' and '.join(CLASSIFYING)}: leave them out",
        )
    if draft.privacy.epsilon is not None:  # check: no-group-is-counted-without-noise
        raise RuleError(
            f"privacy.epsilon = {draft.privacy.epsilon:g}: metrics of groups are counts of rows, to which no noise is "
            "added",
            hint="leave evaluation.groups out",
        )
    by_look = {alike(group): group for group in groups}
    for group in groups:
        if groups.count(group) > 1 or by_look[alike(group)] != group:
            raise RuleError(
                f"evaluation.groups: {group!r} is named twice, or differs from {by_look[alike(group)]!r} only in case "
                "or in characters that look the same",
                hint="name each once",
            )


def the_problem_is_consistent(draft: DraftTables) -> None:
    """What is several labels a row, or a number, is said for heads that have them."""
    task = draft.task
    if task.kind not in CLASSIFYING and task.problem_type != "single_label_classification":
        raise RuleError(
            f'task.problem_type = "{task.problem_type}": a model of kind {task.kind} has no such head',
            hint=f"it is for {' and '.join(CLASSIFYING)}",
        )
    if not task.is_regression:
        if task.target_range is not None:
            raise RuleError(
                'task.target_range: only task.problem_type = "regression" has targets', hint="leave target_range out"
            )
        return
    if task.target_range is None:
        raise RuleError(
            "task.target_range is missing: sums of targets and predictions need a bound",
            hint="write the lowest and the highest value that a target can have: target_range = [0, 5]",
        )
    low, high = task.target_range
    if low >= high or max(abs(low), abs(high)) > LARGEST_TARGET:
        raise RuleError(
            f"task.target_range = [{low:g}, {high:g}]: must ascend, within {LARGEST_TARGET:g} of 0",
            hint="predict targets in other units",
        )
    if task.head == "private":
        raise RuleError(
            'task.head = "private": the targets of a regression are the same for all owners', hint="leave task.head out"
        )
    if draft.evaluation.sign_above is not None and draft.choose_by == "mean_squared_error":
        raise RuleError(
            "evaluation.sign_above: a mean squared error is better if it is lower",
            hint='agree on evaluation.choose_by = "pearson_r", or leave sign_above out',
        )


def a_refit_weighs_rows_by_a_single_label(draft: DraftTables) -> None:
    """Only a row of one label belongs to a class, whose share could decide how much the row counts."""
    table = draft.tables["refit"]
    if "refit" not in draft.methods or draft.task.problem_type == "single_label_classification":
        return
    if getattr(table, "targets", None) == "labels" and getattr(table, "balances", None) != (0.0,):
        raise RuleError(
            "refit.balances: they weigh rows by the share of their one label, which these rows do not have",
            hint="let all rows count alike: [refit] balances = [0.0]",
        )


def a_search_has_its_basis(draft: DraftTables) -> None:
    """Every owner has verified what is mixed, and adds up every metric by which mixtures are chosen."""
    if not draft.searches:
        return
    basis = SEARCH.of(draft.tables).basis
    others = tuple(name for name in draft.methods if name != SEARCH.name)
    for name in basis:
        if name not in others:
            raise RuleError(
                f"search.basis = {list(basis)}: {name} is not among the other methods, {', '.join(others) or 'none'}",
                hint=f'write compare_with = ["{name}"], or another basis',
            )
    if draft.needed_owners < len(draft.owners):  # check: all-owners-in-a-search
        raise RuleError(
            f"min_owners = {draft.needed_owners}: a search asks for metrics several times, and rounds over different "
            "owners would expose the difference",
            hint=f"all {len(draft.owners)} owners must take part: leave min_owners out",
        )
    if draft.publish.adapter_rank is not None:
        raise RuleError(
            "publish.adapter_rank: a mixture of adapters has a higher rank than each of them",
            hint="leave adapter_rank out, or merge without search",
        )


RULES: tuple[Callable[[DraftTables], None], ...] = (
    each_owner_is_named_once,
    min_owners_is_at_most_all,
    every_party_has_its_own_keys,
    a_masked_total_has_three_honest_owners,
    the_same_rows_are_weighted_in_few_ways,
    hidden_metrics_cannot_be_subtracted_out,
    predictions_can_be_summed,
    an_owner_knows_agreed_labels,
    every_number_hides_its_owners,
    differences_of_labels_hide_their_owners,
    multi_round_methods_need_all_owners,
    thirty_two_bits_are_enough,
    verified_merges_can_be_verified,
    what_is_bounded_has_noise,
    the_legs_are_within_the_budget,
    declared_budgets_leave_room,
    methods_fit_together,
    the_task_is_consistent,
    the_problem_is_consistent,
    groups_are_of_classified_rows,
    a_refit_weighs_rows_by_a_single_label,
    a_sweep_tries_each_value_once,
    a_search_has_its_basis,
)
