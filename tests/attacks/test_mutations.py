"""Every check, removed: the attack that it stops must then succeed, that is, its test must fail.

A check carries an id in a comment beside it, `# check: agreement-is-mine`. Each row of the table names a test file,
part of the names of tests in it, and an id: without that check, one of these tests must fail. The check is removed in a
copy of the source tree. `make test-all` does so for all rows; the unchanged copy must pass all the tests named here.

The comment stands on the first or last line of a statement, or on a line within it. It belongs to the innermost
statement that has this line, and that statement says how the check is removed:

- An `if` gets the condition False.
- A call, a `raise` or a `+=` becomes `pass`.
- Anything else needs `becomes`: what the line with the comment becomes, at the same indentation. It may be several
  lines, or none. So one operand of an `and` or `or` is removed if it has a line of its own.
"""

import ast
import re
import shutil
import subprocess
import textwrap
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.support.forked_tests import ForkedTests, forked_tests

ROOT = Path(__file__).parent.parent.parent
PRODUCT = ("common", "client", "server", "deploy")
TAG = re.compile(r"# check: (\S+)$")
ID = re.compile(r"[a-z0-9]+(-[a-z0-9]+)+")


@dataclass(frozen=True)
class Mutation:
    """`tests`: a part of the name of one or more tests of one file, or several parts with `and`, `or`, `not`."""

    file: str
    tests: str
    check: str
    becomes: str | None = None


KEYS, SHARES, SURVIVORS, UPLOADS = (f"attacks/test_{name}.py" for name in ("keys", "shares", "survivors", "uploads"))
PROCESS, WIRE, LEAKS, STEPS, SCALES = (
    f"attacks/test_{name}.py" for name in ("owner_process", "wire", "leaks", "steps", "scales")
)
OWNERS, SCHEDULE, PACKETS, COORDINATOR, SUM, SCALING = (
    f"test_{name}.py" for name in ("owner", "schedule", "packets", "coordinator", "masked_sum", "scaling")
)
LAUNCH, LOGS, AGREEMENT, ARCHITECTURES, GRAM_STREAM = (
    f"test_{name}.py" for name in ("launch", "logs", "agreement", "architectures", "gram_stream")
)
NOISE = "test_private_training.py"
SUM_NOISE, ON_SUMS, GRAMS = "test_noise.py", "attacks/test_noise.py", "test_noised_grams.py"
BASE_FILES, IMAGES = "attacks/test_base_files.py", "test_images.py"
LEDGER = "attacks/test_ledger.py"
AUDIT, AUDIT_COMMAND = "test_audit.py", "end_to_end/test_audit_command.py"
SUBJECTS = "test_audit_subjects.py"
PERSONAL = "end_to_end/test_personal_command.py"
TEXT, ROWS = "attacks/test_text.py", "test_private_data.py"
DISHONEST, EVIDENCE = "attacks/test_dishonest_owners.py", "attacks/test_evidence.py"
RECORDS = "attacks/test_records.py"
RECEIPTS, SIMULATE = "attacks/test_receipts.py", "end_to_end/test_simulate.py"
PUBLISHED, METRICS = "test_published_folder.py", "test_metrics.py"
SERVER, FOLDERS, LIKELIHOODS, FILES = (
    f"attacks/test_{name}.py" for name in ("server", "model_folders", "likelihoods", "files")
)
DEPLOYMENT, RESUME = "end_to_end/test_deployment.py", "end_to_end/test_resume.py"
TRANSITIONS = "OWNER_TRANSITIONS: Transitions = {"
SIGN, GIVE = "Transition(MaskedOwner._sign_survivors", "Transition(MaskedOwner._give_part"

AGREED, FUNCTIONS, LOW_RANK, VERIFICATION, OPENING, CHOSEN, VERIFYING = (
    "test_verified_agreements.py",
    "test_methods_with_functions.py",
    "test_low_rank.py",
    "test_verification.py",
    "attacks/test_opening.py",
    "attacks/test_chosen_models.py",
    "attacks/test_verifying_owner.py",
)
PAIRWISE = "attacks/test_pairwise.py"

SEARCH, SEARCHED = "test_search.py", "end_to_end/test_search.py"
SEARCH_ATTACKS = "attacks/test_search.py"

DISTILLED, POOL = "test_distill.py", "attacks/test_pool.py"
GROUPS = "attacks/test_groups.py"

TABLE = [
    # 151 to 157: predictions on a pool
    Mutation(POOL, "test_151_", "pool-is-the-agreed-one"),
    Mutation(POOL, "test_152_", "pool-rows-are-said-once"),
    Mutation(POOL, "test_152_", "unseen-characters-do-not-count", "return text"),
    Mutation(POOL, "test_156_an_own_row", "unseen-characters-do-not-count", "return text"),
    Mutation(POOL, "test_156_an_own_row", "accents-hide-no-own-row", "return text"),
    Mutation(POOL, "test_153_", "enough-owners-know-a-label"),
    Mutation(POOL, "test_153_an_owner_whose", "label-sets-hide-their-owners"),
    Mutation(POOL, "test_154_", "enough-owners-give-weights"),
    Mutation(POOL, "test_155_a_model_of_another", "other-bases-give-no-weights"),
    Mutation(POOL, "test_155_a_model_with", "labels-are-those-of-the-roster"),
    Mutation(POOL, "test_157_nor", "probabilities-add-up-to-one"),
    Mutation(DISTILLED, "test_a_total_that_no_models", "predictions-fit-the-owners"),
    # 152 to 163: words, images and next tokens
    Mutation(POOL, "test_152_an_image", "pool-rows-are-said-once"),
    Mutation(POOL, "test_152_a_row_of_words", "pool-rows-are-said-once"),
    Mutation(POOL, "test_153_nobody", "enough-owners-know-a-label"),
    Mutation(
        POOL,
        "test_156_rows_that_ask_around or test_156_who_consents_reads_how",
        "variants-of-own-rows-are-counted",
        "found = [False for text in texts]",
    ),
    Mutation(
        POOL, "test_156_an_own_row_with_blanks", "unseen-blanks-hide-no-own-row", "dropped = blank = in_one_form(texts)"
    ),
    Mutation(POOL, "test_156_an_own_row_in", "punctuation-hides-no-own-row", "return text"),
    Mutation(POOL, "test_156_rows_that_ask_around_an", "punctuation-hides-no-own-row", "return text"),
    Mutation(POOL, "test_156_long", "long-rows-push-nothing-away"),
    Mutation(POOL, "test_156_an_own_image", "brightness-hides-no-own-image", "in_one_light = 0.0"),
    Mutation(POOL, "test_156_an_own_image", "own-images-are-recognised", "nearest = np.zeros(len(theirs))"),
    Mutation(POOL, "test_157_no_", "outputs-are-clipped", "return np.where(known, shares, np.float32(0))"),
    Mutation(POOL, "test_159_", "every-word-is-read"),
    Mutation(POOL, "test_159_", "words-are-seen"),
    Mutation(
        POOL,
        "test_160_",
        "pool-images-are-inside",
        "if isinstance(value, str):\n    return ImageFile(str(path), path.parent / value)\nif not value:",
    ),
    Mutation(POOL, "test_161_images_that_unpack", "images-are-bounded", "too_large = False"),
    Mutation(POOL, "test_161_images_that_unpack", "pool-pixels-are-bounded"),
    Mutation(POOL, "test_161_images_that_a_model", "prepared-pools-are-bounded"),
    Mutation(POOL, "test_162_", "unpacked-text-is-bounded"),
    Mutation(POOL, "test_162_", "unpacked-files-are-bounded"),
    Mutation(POOL, "test_162_an_arrow", "foreign-offsets-stay-inside"),
    Mutation(POOL, "test_162_a_compressed", "foreign-batches-are-not-compressed"),
    Mutation(POOL, "test_162_what", "what-is-said-once-is-counted-each-time", "return own + array.nbytes"),
    Mutation(POOL, "test_162_what", "what-is-said-once-is-not-unpacked-often", "return BATCH_ROWS"),
    Mutation(POOL, "test_162_columns", "foreign-columns-are-plain"),
    Mutation(POOL, "test_162_arrays", "as-models-read-them-arrays-are-finite"),
    Mutation(POOL, "test_162_an_array", "arrays-have-not-too-many-rows"),
    Mutation(POOL, "test_162_a_pipe", "pools-are-files"),
    Mutation(POOL, "test_163_", "predictions-are-bounded"),
    # 221 to 223: metrics of groups of rows
    Mutation(GROUPS, "test_221_", "small-groups-stay-here", ""),
    Mutation(GROUPS, "test_222_", "the-rest-is-not-small"),
    Mutation(GROUPS, "test_223_", "groups-are-parts-of-the-rows"),
    Mutation(GROUPS, "test_223_a_group", "models-have-the-same-groups"),
    Mutation(GROUPS, "test_the_report_shows", "verify-compares-groups"),
    Mutation(GROUPS, "test_what_cannot_be_agreed_on_groups", "no-group-is-counted-without-noise"),
    # 191 to 197: a search among mixtures
    Mutation(SEARCH_ATTACKS, "test_191_", "mixtures-are-within-bounds"),
    Mutation(SEARCH_ATTACKS, "test_192_", "mixtures-are-not-repeated"),
    Mutation(SEARCH_ATTACKS, "test_193_", "mixtures-follow-the-totals"),
    Mutation(SEARCH_ATTACKS, "test_194_", "position-is-that-delivery"),
    Mutation(SEARCH_ATTACKS, "test_194_", "model-is-agreed"),
    Mutation(SEARCH_ATTACKS, "test_195_", "tested-mixture-was-scored"),
    Mutation(SEARCH_ATTACKS, "test_195_", "tested-candidate-is-the-best"),
    Mutation(SEARCH_ATTACKS, "test_195_", "only-lies-are-condemned"),
    Mutation(SEARCH_ATTACKS, "test_193_", "evidence-holds-the-lie", "delivered=owner.state.run.received,"),
    Mutation(SEARCH_ATTACKS, "test_195_", "evidence-holds-the-lie", "delivered=owner.state.run.received,"),
    Mutation(SEARCH_ATTACKS, "test_196_", "bases-are-merges"),
    Mutation(SEARCH_ATTACKS, "test_197_", "published-mixtures-are-those-tried"),
    Mutation(SEARCHED, "test_the_best_mixture", "verify-compares-mixtures"),
    Mutation(SEARCH, "test_what_a_search_cannot", "all-owners-in-a-search"),
    # 42, 43, 120 to 131: verified merges
    Mutation(CHOSEN, "test_42_layers_that_are_not", "sums-of-shares-are-zero"),
    Mutation(CHOSEN, "test_42_layers_that_are_not", "nothing-after-a-wrong-model"),
    Mutation(CHOSEN, "test_43_a_candidate_that_is_not", "sums-of-shares-are-zero"),
    Mutation(CHOSEN, "test_122_a_published", "sums-of-shares-are-zero"),
    Mutation(CHOSEN, "test_122_a_running", "client-ends-after-a-wrong-model"),
    Mutation(CHOSEN, "test_123_a_candidate_that_was", "tested-is-the-validated-candidate"),
    Mutation(CHOSEN, "test_123_a_candidate_that_was", "evidence-holds-the-lie", "delivered=owner.state.run.received,"),
    Mutation(CHOSEN, "test_123_a_candidate_that_is", "tested-candidate-is-the-best"),
    Mutation(CHOSEN, "test_123_a_candidate_whose", "known-parts-are-the-same"),
    Mutation(CHOSEN, "test_123_a_candidate_of_a_sweep", "known-parts-are-the-same"),
    Mutation(VERIFICATION, "test_122_", "sums-of-shares-are-zero"),
    Mutation(VERIFICATION, "test_122_a_mean or test_122_a_row or test_122_a_small", "rows-are-as-large", "return self"),
    Mutation(VERIFICATION, "test_129_a_bent", "corrections-are-bounded"),
    Mutation(VERIFICATION, "test_124_a_correction", "corrections-are-bounded"),
    Mutation(VERIFICATION, "test_127_", "factors-are-bounded"),
    Mutation(VERIFICATION, "test_245_", "factors-are-the-methods"),
    Mutation("test_packed.py", "test_244_", "packed-streams-are-whole"),
    Mutation("test_packed.py", "test_244_", "packed-numbers-are-as-many"),
    Mutation(
        "test_packed.py",
        "test_244_",
        "packed-numbers-are-bounded",
        "content = decompressor.decompress(words.tobytes())",
    ),
    Mutation(AGREED, "test_in_a_sparse", "verified-sums-are-complete", "is_complete = True"),
    Mutation(VERIFYING, "test_131_nothing", "scales-have-one-factor-a-run", "blind=secrets.token_hex(32),"),
    Mutation(VERIFICATION, "test_128_the_scales", "scales-are-blinded", "return scale"),
    Mutation(VERIFICATION, "test_129_nobody", "no-entry-is-too-light", "group.clip(least, out=group)"),
    Mutation(AGREED, "test_what_cannot", "ridges-are-large-enough"),
    Mutation(VERIFYING, "test_131_", "check-key-is-drawn-once", "if True:"),
    Mutation(VERIFYING, "test_131_", "check-is-made-once"),
    Mutation(VERIFYING, "test_131_nothing", "no-check-is-pending"),
    Mutation(CHOSEN, "test_130_an_adapter_that", "candidates-are-cut"),
    Mutation(CHOSEN, "test_147_what_the_method", "functions-are-applied"),
    Mutation(FUNCTIONS, "test_147_what_a_method", "functions-are-applied"),
    Mutation(CHOSEN, "test_147_what_a_function", "sums-of-shares-are-zero"),
    Mutation(DISHONEST, "test_148_", "class-shares-add-up"),
    Mutation("test_lorm.py", "share_no_factor", "owners-share-a-factor"),
    Mutation(LOW_RANK, "test_130_every_layer", "cuts-are-the-closest"),
    Mutation(LOW_RANK, "test_130_factors", "padding-of-factors-is-zero"),
    Mutation(LOW_RANK, "test_130_factors", "factors-are-orthonormal"),
    Mutation(LOW_RANK, "test_130_factors", "factors-fit-each-other"),
    Mutation(LOW_RANK, "test_130_factors", "no-cut-is-closer", "return True"),
    Mutation(AGREEMENT, "test_a_wrong_draft", "the-coordinator-is-no-owner"),
    Mutation(VERIFYING, "test_126_totals_that", "opened-sums-are-shown-to-all"),
    Mutation(VERIFYING, "test_126_totals_of", "opened-sums-are-shown-to-all"),
    Mutation(VERIFICATION, "test_the_tolerance", "sums-of-shares-are-zero"),
    Mutation(OPENING, "test_120_", "opened-uploads-are-those-signed", "is_signed = True"),
    Mutation(OPENING, "test_120_vectors_for", "opened-after-a-quorum-signed"),
    Mutation(OPENING, "test_120_vectors_in", "opened-uploads-are-whole"),
    Mutation(OPENING, "test_121_seeds", "opened-seeds-are-of-its-owners"),
    Mutation(OPENING, "test_121_", "opened-seeds-fit"),
    Mutation(VERIFYING, "test_131_", "nonce-is-drawn-once", "if True:"),
    Mutation(VERIFYING, "test_124_no_step", "nonce-is-drawn-after-the-models"),
    Mutation(VERIFYING, "test_124_no_step", "my-nonce-is-in-it"),
    Mutation(VERIFYING, "test_124_nonces", "nonces-of-all-contributors"),
    Mutation(VERIFYING, "test_124_nonces", "nonces-are-signed"),
    Mutation(VERIFYING, "test_124_nonces", "nonces-are-of-this-check", "return nonce"),
    Mutation(VERIFYING, "test_124_an_owner", "drawn-nonces-are-signed"),
    Mutation(VERIFYING, "test_124_no_step", "deliveries-are-signed"),
    Mutation(OWNERS, "test_246_", "deliveries-are-signed"),
    Mutation(VERIFYING, "test_124_no_step", "key-is-drawn-after-the-corrections"),
    Mutation(VERIFYING, "test_124_no_step", "no-check-is-made-again"),
    Mutation(VERIFYING, "test_124_no_step", "delivered-once-or-the-same"),
    Mutation(VERIFYING, "test_124_no_step", "checked-by-all-contributors"),
    Mutation(VERIFYING, "test_124_no_step", "checked-by-contributors-only"),
    Mutation(VERIFYING, "test_124_no_step", "key-comes-before-the-shares"),
    Mutation(VERIFYING, "test_124_no_step", "opened-sum-is-for-all"),
    Mutation(VERIFYING, "test_124_no_step", "opened-sum-is-the-last"),
    Mutation(PAIRWISE, "test_214_the_keys", "checked-by-all-contributors"),
    Mutation(VERIFYING, "test_211_", "check-keys-are-signed"),
    Mutation(VERIFYING, "test_211_", "my-check-key-is-in-it"),
    Mutation(VERIFYING, "test_212_", "check-shares-are-signed"),
    Mutation(PAIRWISE, "test_212_a_vector", "check-shares-are-whole"),
    Mutation(PAIRWISE, "test_212_more", "check-shares-are-of-all"),
    Mutation(VERIFYING, "test_212_shares", "check-shares-are-of-all"),
    Mutation(VERIFYING, "test_213_", "check-shares-never-change"),
    Mutation(PAIRWISE, "test_214_without or test_a_vector_leaves", "check-shares-are-masked", "pass"),
    Mutation(
        PAIRWISE,
        "test_214_one_vector",
        "masks-are-of-one-check",
        "return hashlib.sha256(Domain.CHECK_KEYS.value + self.keys).digest()",
    ),
    Mutation(VERIFYING, "test_126_totals_that", "open-rounds-are-opened", "is_complete = side.is_complete"),
    Mutation(VERIFYING, "test_124_no_step", "nothing-is-measured-unverified"),
    Mutation(VERIFYING, "test_124_no_step", "contributions-are-deleted-once-verified"),
    Mutation(VERIFYING, "test_126_", "published-totals-are-mine"),
    Mutation(VERIFYING, "test_126_a_result_that", "published-is-the-tested-model"),
    Mutation(VERIFYING, "test_241_", "totals-that-were-missed-are-not-signed"),
    Mutation(VERIFYING, "test_241_validation", "totals-that-were-missed-are-not-signed"),
    Mutation(RESUME, "test_owners_that_miss", "who-cannot-sign-is-not-counted"),
    Mutation(VERIFYING, "test_126_", "published-owners-verified"),
    # 1-7, 12, 13, 27: the key book
    Mutation(KEYS, "test_1_", "key-entries-are-signed"),
    Mutation(KEYS, "test_2_", "key-entries-are-signed"),
    Mutation(KEYS, "test_3_", "key-entries-are-signed"),
    Mutation(KEYS, "test_4_an_owner_twice", "owners-ascend"),
    Mutation(KEYS, "test_4_a_colluder", "keys-are-distinct"),
    Mutation(KEYS, "test_5_", "own-entry-is-mine", "is_mine = self._me in book.entries"),
    Mutation(KEYS, "test_6_", "own-entry-is-mine", "is_mine = True"),
    Mutation(
        KEYS,
        "test_7_",
        "session-is-signed",
        "return domain.value + bytes([len(session), len(encoded)]) + encoded + body",
    ),
    Mutation(KEYS, "test_12_", "owner-is-on-the-roster"),
    Mutation(KEYS, "test_13_too_few", "enough-owners-in-the-key-book"),
    Mutation(KEYS, "test_13_the_quorum", "quorum-counts-too", "needed = self.terms.needed_owners"),
    Mutation(KEYS, "test_27_a_low_order", "no-low-order-point", "return bytes(32)"),
    Mutation(KEYS, "test_27_a_weak_key", "advertised-key-is-of-high-order"),
    # 74: weak keys
    Mutation(KEYS, "test_27_a_weak_key", "key-has-one-encoding"),
    Mutation(KEYS, "test_74_another_owner_s", "key-has-one-encoding"),
    Mutation(KEYS, "test_74_a_weak_identity", "identity-key-is-strong"),
    # 8-11, 37: rounds and agreements
    Mutation(PROCESS, "test_secrets_of_a_round", "replaced-records-leave-memory"),
    Mutation(PROCESS, "test_secrets_of_a_round", "forgotten-rounds-leave-memory"),
    Mutation(PROCESS, "test_secrets_of_a_round", "forgotten-runs-leave-memory"),
    Mutation(PROCESS, "test_8_9_", "rounds-only-go-up"),
    Mutation(PROCESS, "test_9_an_old", "rounds-only-go-up"),
    Mutation(PROCESS, "test_10_any_field", "agreement-is-mine"),
    Mutation(PROCESS, "test_10_an_owner_s_file", "agreement-has-consent"),
    Mutation(PROCESS, "test_10_another_base", "base-is-the-agreed-one"),
    Mutation(
        PROCESS,
        "test_10_two_owners",
        "session-covers-the-request",
        "values = [getattr(self, field.name) for field in fields(self)[:4]]",
    ),
    Mutation(PROCESS, "test_11_", "quorum-is-computed"),
    Mutation(PROCESS, "test_37_another", "agreement-has-consent"),
    Mutation(PROCESS, "test_37_another", "message-is-of-this-run"),
    Mutation(PROCESS, "test_37_another", "run-keeps-its-agreement"),
    Mutation(PROCESS, "test_37_a_sum", "agreement-is-mine"),
    Mutation(OWNERS, "test_a_roll_call_of_another", "protocol-version-is-mine"),
    Mutation(OWNERS, "test_an_owner_without_consent", "agreement-has-consent"),
    Mutation(OWNERS, "test_an_owner_with_another_identity", "identity-is-agreed"),
    Mutation(OWNERS, "test_an_owner_with_another_base", "base-is-the-agreed-one"),
    Mutation(OWNERS, "test_a_state_folder_of", "state-is-of-this-version"),
    # the schedule: an owner answers the next event only
    Mutation(SCHEDULE, "test_the_next_event", "last-event-is-complete", "due = following"),
    Mutation(SCHEDULE, "test_an_owner_that_may_drop_out", "no-delivery-is-missed", "only_rounds = True"),
    Mutation(SCHEDULE, "test_what_every_owner", "opened-sums-fit-a-message"),
    Mutation(
        SCHEDULE, "test_an_owner_that_may_drop_out_misses", "no-check-is-missed", "return isinstance(event, Round)"
    ),
    Mutation(SCHEDULE, "test_owners_may_drop_out", "dropouts-are-agreed", "owners_may_drop_out=True,"),
    Mutation(OWNERS, "test_an_owner_answers_only", "round-is-the-next-event"),
    Mutation(OWNERS, "test_an_owner_answers_only", "delivery-is-the-next-event"),
    Mutation(OWNERS, "test_an_owner_answers_only", "last-event-is-complete", "due = following"),
    Mutation(OWNERS, "test_an_event_is_of_the_kind", "position-is-a-round"),
    Mutation(OWNERS, "test_an_event_is_of_the_kind", "position-is-that-delivery"),
    Mutation(OWNERS, "test_an_event_is_of_the_kind", "position-is-in-the-schedule"),
    Mutation(OWNERS, "test_metrics_of_a_candidate", "round-is-the-next-event"),
    Mutation(OWNERS, "test_what_was_not_agreed", "message-is-of-this-run"),
    Mutation(OWNERS, "test_what_was_not_agreed", "layout-is-the-agreed-one"),
    Mutation(OWNERS, "test_what_was_not_agreed", "models-are-those-sent-here"),
    Mutation(OWNERS, "test_what_was_not_agreed", "position-is-in-the-schedule"),
    Mutation(OWNERS, "test_what_was_not_agreed", "round-is-open"),
    # 13, 14, 18, 36: survivors
    Mutation(SHARES, "test_13_", "enough-senders-of-shares"),
    Mutation(SURVIVORS, "test_13_", "survivors-shared-keys"),
    Mutation(SURVIVORS, "test_14_survivors_are", "enough-survivors"),
    Mutation(SURVIVORS, "test_14_i_am", "my-upload-is-listed", "is_mine = True"),
    Mutation(SURVIVORS, "test_14_my_upload", "my-upload-is-listed", "is_mine = self._me in survivors"),
    Mutation(SURVIVORS, "test_18_", "quorums-share-an-honest-owner", "return num_owners // 2"),
    Mutation(SURVIVORS, "test_36_exactly", "quorums-share-an-honest-owner", "return num_owners // 2"),
    # 56-59: what decides how rows are read
    Mutation(BASE_FILES, "test_56_a_newer", "base-files-are-checked"),
    Mutation(BASE_FILES, "test_56_a_tokenizer_that_does", "base-files-are-checked"),
    Mutation(BASE_FILES, "test_56_a_tokenizer_that_does", "base-files-are-the-agreed-ones"),
    Mutation(BASE_FILES, "test_57_a_tokenizer_that_erases", "reading-kept-the-rows"),
    Mutation(BASE_FILES, "test_57_a_tokenizer_that_leaves", "reading-kept-the-rows"),
    Mutation("test_chat.py", "test_134_", "reading-kept-the-rows"),
    Mutation("test_chat.py", "test_a_conversation_that", "chats-are-unicode"),
    Mutation(IMAGES, "test_132_", "reading-kept-the-rows"),
    Mutation(IMAGES, "test_132_", "prepared-images-differ"),
    # 133: what an owner's images are
    Mutation(IMAGES, "test_133_a_table", "images-lie-beside"),
    Mutation(IMAGES, "test_133_what", "only-these-decoders-run", "image = Image.open(io.BytesIO(self.read()))"),
    Mutation(IMAGES, "test_133_an_image_of_too_many", "images-are-bounded", "too_large = False"),
    Mutation(IMAGES, "test_133_a_file", "image-files-are-bounded"),
    # 140-146: training with noise
    Mutation(NOISE, "test_140_no_unit", "gradients-are-bounded", "factors = torch.ones_like(norms)"),
    Mutation(NOISE, "test_140_a_unit", "gradients-are-bounded", "factors = (bound / norms).clamp(max=1.0)"),
    *(
        Mutation(NOISE, "test_140_a_classifier", "inputs-and-errors-are-bounded", becomes)
        for becomes in (
            "factors = torch.ones_like(norms)",
            "factors = (bound / norms).clamp(max=1.0)",
            "factors = torch.where(norms.isfinite(), (2 * bound / norms).clamp(max=1.0), 0.0)",
            "factors = torch.where(norms.isfinite(), (bound / 2 / norms).clamp(max=1.0), 0.0)",
        )
    ),
    Mutation(NOISE, "test_141_the_noise", "noise-has-its-size"),
    Mutation(NOISE, "test_141_the_noise", "noise-has-its-size", "whole += drawn.reshape(whole.shape) / 2"),
    Mutation(NOISE, "test_141_the_noise", "noise-has-its-size", "whole += drawn.reshape(whole.shape) * 2"),
    *(
        Mutation(
            NOISE,
            "test_the_sum_is_that",
            "gradients-are-bounded",
            f"factors = torch.where(norms.isfinite(), ({factor} * bound / norms).clamp(max=1.0), 0.0)",
        )
        for factor in (0.5, 2)
    ),
    Mutation(
        NOISE,
        "test_141_every_unit",
        "units-are-drawn-at-their-rate",
        "drawn = noise.uniform(len(members)) < sample_rate / 2",
    ),
    Mutation(NOISE, "test_141_every", "units-are-drawn-at-their-rate", "drawn = np.arange(len(members)) % 7 < 2"),
    Mutation(
        NOISE,
        "test_141_every",
        "units-are-drawn-at-their-rate",
        "drawn = noise.uniform(len(members)) < 2 * sample_rate",
    ),
    Mutation(NOISE, "test_142_", "noise-is-never-foreseen", "return bytes(mask_stream.KEY_BYTES)"),
    Mutation(NOISE, "test_143_", "rows-are-told-apart"),
    Mutation(
        NOISE,
        "test_143_no_row_rounds",
        "rows-are-multiplied-alone",
        "logits = nn.functional.linear(inputs, layer.weight, layer.bias)",
    ),
    Mutation(
        NOISE, "test_143_no_row_without", "no-row-decides-what-is-trained", "is_last = torch.equal(given, logits)"
    ),
    Mutation(NOISE, "test_149_", "no-row-draws-for-another", "module.training = True"),
    Mutation(NOISE, "test_150_", "bounded-models-are-trained-once"),
    Mutation(NOISE, "test_144_a_method", "bounded-merges-read-no-rows"),
    Mutation(NOISE, "test_144_labels", "bounded-merges-look-at-no-labels"),
    Mutation(NOISE, "test_145_an_owner", "bounded-models-are-made-here"),
    Mutation(NOISE, "test_145_a_model", "own-bases-are-not-bounded"),
    Mutation(NOISE, "test_145_its_own", "bounded-models-are-trained-with-noise"),
    Mutation(NOISE, "test_146_a_row", "units-are-named"),
    # 171-186: noise on sums
    *(
        Mutation(SUM_NOISE, "test_171_", check, becomes)
        for check, becomes in (
            ("shares-have-their-size", "return np.rint(scale * drawn / 2).astype(np.int64)"),
            ("shares-have-their-size", "return np.rint(scale * drawn * 2).astype(np.int64)"),
            ("owners-add-their-share", "return one.read(np.ldexp(exact.astype(np.float64), -bits), name)"),
        )
    ),
    Mutation(SUM_NOISE, "test_172_training", "training-leaves-room-for-the-legs"),
    Mutation(SUM_NOISE, "test_172_shares", "legs-add-up", "return 0.0"),
    Mutation(SUM_NOISE, "test_173_", "shares-add-up", "return float(leg.sigma / 2 / agreement.noise_shares**0.5)"),
    Mutation(SUM_NOISE, "test_173_", "shares-add-up", "return float(2 * leg.sigma / agreement.noise_shares**0.5)"),
    Mutation(SUM_NOISE, "test_173_", "shares-add-up", "return float(leg.sigma / agreement.noise_shares)"),
    Mutation(SUM_NOISE, "test_173_", "known-noise-hides-nothing", "return self.needed_owners - self.colluders"),
    Mutation(SUM_NOISE, "test_172_shares", "every-judged-model-counts", "return float(example_norm(agreement.task))"),
    *(
        Mutation(SUM_NOISE, "test_174_", "examples-move-metrics-by-so-much", f"return float({factor} * squares**0.5)")
        for factor in (0.5, 2)
    ),
    *(
        Mutation(
            SUM_NOISE,
            "test_175_",
            "rows-move-a-refit-by-so-much",
            f"return float({factor} * self.features * (self.features**2 + self.target**2) ** 0.5)",
        )
        for factor in (0.5, 2)
    ),
    Mutation(SUM_NOISE, "test_175_", "long-rows-weigh-less", "return torch.ones_like(moved)"),
    Mutation(SUM_NOISE, "test_metrics_of_any", "noised-shares-are-shares", "accuracy = float(sums[0] / rows)"),
    Mutation(ON_SUMS, "test_176_no_vector", "no-share-is-left-out"),
    Mutation(ON_SUMS, "test_176_a_program", "no-share-is-left-out"),
    Mutation(ON_SUMS, "test_177_other", "other-numbers-have-other-noise"),
    Mutation(ON_SUMS, "test_177_an_owner", "noise-is-drawn-once", "if True:"),
    Mutation(ON_SUMS, "test_177_an_owner", "metrics-have-noise", "added = None"),
    Mutation(ON_SUMS, "test_178_", "secrets-of-noise-are-drawn", "return bytes(KEY_BYTES)"),
    Mutation(ON_SUMS, "test_noise_that_fixed", "noise-is-fine-enough"),
    Mutation(
        ON_SUMS,
        "test_180_",
        "grams-have-noise",
        "yield TensorEntry(name=gram, shape=square, bound=bound, packing='symmetric')",
    ),
    Mutation(
        ON_SUMS, "test_180_", "products-have-noise", "yield TensorEntry(name=targets, shape=rectangle, bound=bound)"
    ),
    Mutation(
        ON_SUMS,
        "test_180_",
        "no-product-of-exact-grams-leaves",
        "yield start_name, to_array(weighted.T @ features @ terms.start)",
    ),
    Mutation(
        ON_SUMS,
        "test_180_",
        "no-product-of-exact-targets-leaves",
        "yield base_name, to_array((self._towards(settings, terms, weighted, gram) * terms.start).sum()[None])",
    ),
    Mutation(ON_SUMS, "test_181_", "persons-count-once", "return rows"),
    Mutation(ON_SUMS, "test_183_", "judged-rows-are-counted-too"),
    Mutation(ON_SUMS, "test_183_rows_that_were_trained", "plain-sums-spend-budgets-too", "if not page.offers:"),
    Mutation(NOISE, "test_150_no_second_model_is_trained_for", "plain-sums-are-noted"),
    Mutation(NOISE, "test_150_no_second_model_is_trained_for", "missing-models-are-noticed-first"),
    Mutation(ON_SUMS, "test_no_metric_is_shown", "no-metric-is-exact", "if False:"),
    Mutation(ON_SUMS, "test_184_", "refusals-tell-nothing-of-rows"),
    Mutation(ON_SUMS, "test_185_a_row", "rows-without-numbers-add-nothing", "features = terms.features"),
    Mutation(ON_SUMS, "test_189_", "plain-sums-with-noise-stay-the-same"),
    Mutation(ON_SUMS, "test_177_after", "forgotten-noise-is-not-drawn-anew"),
    Mutation(ON_SUMS, "test_188_", "noised-rows-are-alone"),
    Mutation(ON_SUMS, "test_188_with", "rows-to-judge-are-alone", ""),
    Mutation(ON_SUMS, "test_188_no_row_decides", "passes-leave-nothing-behind", ""),
    Mutation(ON_SUMS, "test_188_no_row_decides", "cached-rows-leave-nothing-behind", "with inputs_of_layer:"),
    Mutation(ON_SUMS, "test_188_no_row_decides", "training-passes-leave-nothing-behind", "if True:"),
    Mutation(ON_SUMS, "test_185_", "noised-rows-weigh-alike"),
    Mutation(ON_SUMS, "test_185_", "noised-owners-weigh-by-rows"),
    Mutation(ON_SUMS, "test_185_", "noised-examples-are-one-row"),
    Mutation(ON_SUMS, "test_185_", "legs-fit-the-budget", "if True:"),
    Mutation(ON_SUMS, "test_185_a_refit_whose", "noised-refits-know-their-length"),
    Mutation(ON_SUMS, "test_a_refit_of_too_few", "noise-leaves-something"),
    Mutation(ON_SUMS, "test_186_", "noised-rows-are-rows"),
    *(
        Mutation(GRAMS, "test_231_an_example_moves", "examples-move-a-gram-by-so-much", becomes)
        for becomes in (
            "return rows",
            "return rows * min(1.0, norm / moved / 2) ** 0.5 if moved > 0 else rows",
            "return rows * min(1.0, norm / moved * 2) ** 0.5 if moved > 0 else rows",
        )
    ),
    Mutation(GRAMS, "test_231_an_example_with", "examples-without-numbers-add-nothing"),
    Mutation(GRAMS, "test_231_examples_that", "bounded-examples-are-alone"),
    *(
        Mutation(
            GRAMS, "test_232_", "examples-move-every-gram", f"return float({factor} * (1 + ROUNDING) * grams**0.5)"
        )
        for factor in (0.5, 2)
    ),
    Mutation(GRAMS, "test_232_every", "each-owner-hides-its-own-gram", "return agreement.noise_shares"),
    Mutation(GRAMS, "test_232_a_gram", "every-sum-of-grams-counts", "return 1"),
    Mutation(GRAMS, "test_232_rounding", "noised-grams-are-rounded-finely"),
    Mutation(GRAMS, "test_233_", "noised-grams-weigh-by-rows"),
    Mutation(GRAMS, "test_233_", "no-scales-of-exact-grams"),
    Mutation(GRAMS, "test_233_grams_whose", "noised-grams-know-their-norms"),
    Mutation(GRAMS, "test_234_", "grams-of-inputs-have-noise", "noise = 0.0"),
    Mutation(GRAMS, "test_234_nothing", "noised-grams-count-no-tokens", "rows = gram.rows"),
    Mutation(
        GRAMS,
        "test_234_nothing",
        "products-follow-noise",
        'owner.noise.added(f"gram/{name}", to_array(gram.matrix))\nnoised = gram.matrix.clone()',
    ),
    Mutation(GRAMS, "test_235_", "noised-grams-have-their-ridge", "return 0.0"),
    Mutation(
        GRAMS,
        "test_235_",
        "noised-grams-have-their-ridge",
        "return float(noise / self.owners)",
    ),
    Mutation(GRAMS, "test_236_", "noised-grams-fit-the-examples"),
    Mutation(GRAMS, "test_237_", "masked-sums-with-noise-stay-the-same"),
    Mutation(GRAMS, "test_an_owner_with_too_few", "noise-leaves-grams"),
    Mutation(GRAMS, "test_an_owner_with_too_few", "noised-grams-refuse-nothing"),
    Mutation(ON_SUMS, "test_what_is_declared", "declared-budgets-are-counted"),
    Mutation(BASE_FILES, "test_58_a_configuration_that_computes", "base-files-are-the-agreed-ones"),
    Mutation(BASE_FILES, "test_58_a_configuration_that_sends", "configuration-is-the-listed-file"),
    Mutation(BASE_FILES, "test_59_a_file or test_59_an_agreed", "base-files-are-the-agreed-ones"),
    Mutation(BASE_FILES, "test_59_a_configuration", "configurations-name-no-files", ""),
    Mutation(BASE_FILES, "test_59_the_base_s", "stored-tensors-are-those-checked"),
    Mutation(BASE_FILES, "test_59_a_model_is_replaced", "a-model-is-loaded-from-one-version"),
    Mutation(BASE_FILES, "test_59_the_base_s", "changes-show", "return status.st_size, status.st_mtime_ns"),
    # 15-17, 39: both secrets
    Mutation(
        SURVIVORS,
        "test_15_",
        "one-secret-of-each-owner",
        "shares += [RevealedShare(owner, MASK, _two_shares(both)[1]) for owner, both in self.held.items()]\n"
        "return RevealedShare.pack_all(shares)",
    ),
    Mutation(
        SURVIVORS,
        "test_16_both",
        "no-other-transition",
        f"{TRANSITIONS}\n    (Phase.UNMASKING, SurvivorList): {SIGN}, Phase.UNMASKING),",
    ),
    Mutation(
        SURVIVORS, "test_16_both", "shares-are-dropped-once-revealed", "return replace(self, revealed=revealed), reply"
    ),
    Mutation(
        SURVIVORS,
        "test_16_a_second",
        "no-other-transition",
        f"{TRANSITIONS}\n    (Phase.CONSISTENCY_CHECK, SurvivorList): {SIGN}, Phase.CONSISTENCY_CHECK),",
    ),
    Mutation(PROCESS, "test_17_a_second_survivor", "latch-is-written-first"),
    Mutation(PROCESS, "test_17_a_second_reveal", "latch-is-written-first"),
    Mutation(PROCESS, "test_17_a_second_reveal", "shares-are-chosen-once", "revealed = self._shares_for(survivors)"),
    Mutation(PROCESS, "test_17_the_latch", "latch-is-written-first"),
    Mutation(PROCESS, "test_39_two_processes", "one-process-at-a-time"),
    Mutation(PROCESS, "test_a_session_whose", "broken-session-is-forgotten"),
    Mutation(OWNERS, "test_vector_and_secrets", "vector-is-deleted-once-signed"),
    # 11, 19, 75: acknowledgements
    Mutation(SURVIVORS, "test_75_", "survivors-are-of-one-book", "signed = survivors"),
    Mutation(SURVIVORS, "test_11_19_", "quorum-signed-the-survivor-list"),
    Mutation(SURVIVORS, "test_19_one_signer", "owners-ascend"),
    Mutation(SURVIVORS, "test_19_a_signature_passed", "signed-this-list"),
    Mutation(SURVIVORS, "test_19_signatures_under", "signed-this-list"),
    Mutation(SURVIVORS, "test_19_a_signer", "signer-survived"),
    # 20, 21: shares
    Mutation(SHARES, "test_20_a_forged_share and not manifest", "share-is-the-one-sent", "is_intact = True"),
    Mutation(SHARES, "test_20_two_senders", "share-is-the-one-sent", "is_intact = True"),
    Mutation(SHARES, "manifest_that_fits", "shares-are-signed"),
    Mutation(SHARES, "test_20_another_commitment", "shares-are-signed"),
    Mutation(SHARES, "test_20_another_recipient", "senders-are-neighbours"),
    Mutation(SHARES, "test_20_more_manifests", "manifests-fit-senders"),
    Mutation(
        SHARES,
        "test_20_truncated",
        "records-are-whole",
        "data = data[: len(data) // cls.FORMAT.size * cls.FORMAT.size]\nif False:",
    ),
    Mutation(SHARES, "test_20_a_share_at", "share-is-at-my-point", "return shares"),
    Mutation(SHARES, "test_20_a_share_sealed", "seals-name-their-direction", "return self.digest"),
    Mutation(SHARES, "test_20_a_share_that_is_not", "share-is-in-the-field"),
    Mutation(SHARES, "test_21_a_share", "share-is-of-its-kind", "is_right_kind = True"),
    # 70-72: who lied about a share
    Mutation(SHARES, "test_70_all", "revealed-share-is-the-dealt-one"),
    Mutation(SHARES, "test_70_after", "revealed-share-is-the-dealt-one"),
    Mutation(SHARES, "test_71_liars", "revealed-share-is-the-dealt-one"),
    Mutation(SHARES, "test_71_a_dealer_cannot", "share-fits-its-commitment", "return True"),
    Mutation(SHARES, "test_71_a_dealer_that", "opened-shares-are-the-dealt-ones"),
    Mutation(SHARES, "test_71_a_dealer_whose", "many-disputes-name-the-dealer"),
    # 110-113: disputed shares
    Mutation(SHARES, "test_111", "disputes-are-signed"),
    Mutation(SHARES, "test_111", "disputes-name-their-direction", "return self.digest"),
    Mutation(SHARES, "test_112_more", "few-shares-are-opened", "True,"),
    Mutation(SHARES, "test_112_one", "shares-are-opened-once", "is_first = True"),
    Mutation(SHARES, "test_113", "share-fits-its-commitment", "return True"),
    Mutation(SHARES, "test_113", "shares-are-disputed-once", "True,"),
    Mutation(COORDINATOR, "test_71_", "who-lied-is-remembered"),
    Mutation(COORDINATOR, "test_71_", "who-lied-stays-out"),
    Mutation(SHARES, "test_72_shares_that", "rebuilt-secret-fits", "if True:"),
    Mutation(SHARES, "test_72_shares_of", "corrected-secret-fits", "if True:"),
    Mutation(COORDINATOR, "test_72_", "who-lied-is-left-out"),
    # 22-25, 76: uploads
    Mutation(SURVIVORS, "test_22_", "self-mask-is-added", ""),
    Mutation(UPLOADS, "test_23_a_second", "one-answer-a-step"),
    Mutation(UPLOADS, "test_23_another", "same-part-again"),
    Mutation(UPLOADS, "test_24_an_upload_of", "part-fits"),
    Mutation(
        UPLOADS, "test_24_an_upload_in_another", "part-fits", "if part != self.part or payload.shape != (expected,):"
    ),
    Mutation(UPLOADS, "test_24_an_upload_altered", "part-is-signed"),
    Mutation(
        UPLOADS,
        "test_24_after",
        "no-other-transition",
        f"{TRANSITIONS}\n    (Phase.CONSISTENCY_CHECK, PartRequest): {GIVE}, Phase.WHOLE_INPUT),",
    ),
    Mutation(UPLOADS, "test_25_a_value", "values-are-within-bounds"),
    Mutation(UPLOADS, "test_25_at_the_bound", "no-sum-wraps-around", "bits = int(ratio).bit_length()"),
    Mutation(UPLOADS, "test_25_a_total_of_32", "total-is-in-bounds"),
    Mutation(SUM, "test_a_total_beyond", "total-is-in-bounds"),
    Mutation(SUM, "test_a_vector_that_changed", "sent-parts-never-change"),
    Mutation(UPLOADS, "test_76_a_random", "false-total-keeps-the-checkpoint", "except ZeroDivisionError:"),
    Mutation(UPLOADS, "test_76_a_false_share", "false-total-keeps-the-checkpoint", "except ZeroDivisionError:"),
    Mutation(UPLOADS, "test_76_a_false_share", "wrong-checks-are-not-relayed"),
    Mutation(UPLOADS, "test_76_a_false", "plain-part-is-in-bounds"),
    # 28, 29: contribute once
    Mutation(PROCESS, "test_28_", "contributed-once"),
    Mutation(PROCESS, "test_29_all", "offered-from-the-first-part", "if side.reveals:"),
    Mutation(PROCESS, "test_29_metrics", "contributed-once"),
    Mutation(PROCESS, "test_29_metrics", "layout-is-the-agreed-one"),
    Mutation(PROCESS, "test_an_offer_is_in_the_ledger", "offered-from-the-first-part", "if side.reveals:"),
    # 44-46: sessions that are over, runs that were killed
    Mutation(PROCESS, "test_too_few_forged", "burned-by-enough-owners"),
    Mutation(PROCESS, "test_too_few_forged", "certificate-is-checked"),
    Mutation(PROCESS, "test_too_few_forged", "lists-are-signed-by-name"),
    Mutation(PROCESS, "test_an_owner_that_has_revealed", "revealed-is-not-burned"),
    Mutation(PROCESS, "test_a_burned_session", "burned-stays-burned"),
    Mutation(PROCESS, "test_a_burned_session", "burned-is-not-opened"),
    Mutation(PROCESS, "test_a_certificate_alone", "certified-session-is-forgotten"),
    Mutation(PROCESS, "test_a_session_that_was", "the-last-session-is-pending", 'return pending[0] if pending else ""'),
    Mutation(PROCESS, "test_an_owner_goes_on", "only-the-burned-session-is-forgotten", "if kept is not None:"),
    Mutation(PROCESS, "test_44_", "burned-stays-burned"),
    Mutation(PROCESS, "test_44_a_burned_session_s_file_that_comes_back_gives", "burned-gives-no-part"),
    Mutation(PROCESS, "test_45_", "run-is-forgotten-whole", "shutil.rmtree(self._run_folder, ignore_errors=True)"),
    Mutation(PROCESS, "test_46_", "round-is-the-next-event"),
    # 30, 31, 35: masks and secrets
    Mutation(SUM, "test_no_mask_is_used", "masks-are-used-once", "combine(chunk, keystream[0], out=chunk)"),
    Mutation(
        SUM,
        "test_the_same_keys",
        "keys-are-of-one-session",
        "mask_key = key_agreement.public_key(self.mask_seed, Domain.MASK_KEY, bytes(32))",
    ),
    Mutation(SUM, "test_an_all_zero", "uploads-are-masked"),
    Mutation(SUM, "test_secrets_do_not_show", "secrets-do-not-show", 'self_seed: bytes = b""'),
    Mutation(WIRE, "test_35_files", "files-are-private", "def create(path: Path, mode: int = 0o644) -> BinaryIO:"),
    Mutation(
        WIRE, "test_35_no_secret", "no-secret-in-errors", "require(is_mine, str([key.hex() for key, _ in self.masks]))"
    ),
    # 32, 34, 53: the wire
    Mutation(WIRE, "test_32_an_oversized", "lists-are-bounded", "return isinstance(value, bytes)"),
    Mutation(WIRE, "test_32_garbage", "fields-are-exact"),
    Mutation(WIRE, "test_53_", "broken-arrays-are-refused", "except ValueError:"),
    Mutation(WIRE, "test_34_", "silence-has-an-end", "while node_of and time.monotonic() < deadline + 60:"),
    # 33, 38, 48, 52: models and results
    Mutation(PROCESS, "test_38_", "models-are-those-sent-here"),
    Mutation(PROCESS, "test_33_different", "receipts-of-enough-owners"),
    Mutation(PROCESS, "test_33_different", "published-is-the-tested-model"),
    Mutation(PROCESS, "test_33_different", "result-names-all-models"),
    Mutation(PROCESS, "test_33_an_owner_signs", "one-result-is-signed"),
    Mutation(PROCESS, "test_33_receipts_under", "lists-are-signed-by-name"),
    Mutation(PROCESS, "test_33_a_result_that", "coordinator-signed-the-result"),
    Mutation(PROCESS, "test_33_a_result_of", "result-is-of-the-method"),
    Mutation(PROCESS, "test_33_a_result_signed_in", "result-names-all-models"),
    Mutation(
        PROCESS, "test_33_a_result_signed_in", "result-was-tested-unless-ended", "if not owner.ledger.has_signed:"
    ),
    Mutation(PROCESS, "test_33_a_result_is_signed_again", "result-was-tested-unless-ended", "if True:"),
    Mutation(
        PROCESS,
        "test_260_a_result",
        "result-was-tested-unless-ended",
        "if not any((owner.state.folder / 'receipts').glob('*')):",
    ),
    Mutation(PROCESS, "test_260_an_agreement", "an-agreement-ends-once"),
    Mutation(PROCESS, "test_260_receipts", "receipts-keep-their-signatures", "owners = receipts.owners"),
    Mutation(PROCESS, "test_261_", "half-a-vector-is-none", 'MEASURED = "vector"'),
    Mutation(PROCESS, "test_33_receipts_of_another", "message-is-of-this-run"),
    Mutation(PROCESS, "test_48_", "nothing-after-the-result"),
    Mutation(PROCESS, "test_52_a_model_after", "nothing-after-the-result", "if run.result is not None:"),
    Mutation(PROCESS, "test_52_a_model_whose", "no-round-is-forgotten"),
    Mutation(
        PROCESS,
        "test_52_a_model_whose",
        "offers-count-from-the-first-part",
        "return {each.deliveries_digest for each in self._page.offers if each.session in self._page.revealed}",
    ),
    Mutation(OWNERS, "test_a_candidate_that_changes", "message-is-of-this-run"),
    Mutation(OWNERS, "test_a_candidate_that_changes", "parts-come-in-order", "False"),
    Mutation(OWNERS, "test_a_candidate_that_changes", "part-continues-its-model", ""),
    Mutation(OWNERS, "test_a_part_continues", "part-continues-its-model", ""),
    Mutation(OWNERS, "test_a_candidate_out_of_order", "parts-come-in-order", "False"),
    Mutation(OWNERS, "test_a_candidate_out_of_order", "part-has-its-shape", ""),
    Mutation(OWNERS, "test_a_candidate_that_is_not_finite", "models-are-finite"),
    Mutation(
        OWNERS, "test_a_candidate_that_is_not_finite", "models-are-finite", "if not is_within(array, float('inf')):"
    ),
    Mutation(OWNERS, "test_a_delivery_is_repeated", "delivered-once-or-the-same"),
    # 49: packets
    Mutation(PACKETS, "test_49_a_packet_of_nothing", "packets-are-bounded"),
    Mutation(PACKETS, "test_49_a_packet_of_nothing", "packets-hold-a-message"),
    Mutation(PACKETS, "test_49_a_packet_with_a_gap", "packets-have-no-gap"),
    Mutation(PACKETS, "test_49_a_packet_is_answered", "model-is-agreed"),
    Mutation(PACKETS, "test_49_a_second_model", "delivered-once-or-the-same"),
    Mutation(PACKETS, "test_49_an_owner_whose_answers", "answers-fit-their-packet"),
    Mutation(PACKETS, "test_49_an_owner_whose_answers", "answer-is-about-the-part"),
    Mutation(COORDINATOR, "test_73_an_owner", "rounds-are-not-used-up"),
    Mutation(COORDINATOR, "test_a_signature_of_another", "receipt-is-signed"),
    Mutation(COORDINATOR, "test_the_roll_call_refuses_a_node", "presence-is-signed"),
    Mutation(COORDINATOR, "test_the_roll_call_refuses_strangers_and_duplicates", "one-node-an-owner"),
    # multi-round methods
    Mutation(STEPS, "test_a_step_before", "round-is-the-next-event"),
    Mutation(STEPS, "test_a_step_that_was_not", "layout-is-the-agreed-one"),
    Mutation(STEPS, "test_a_step_that_was_not", "position-is-in-the-schedule"),
    Mutation(STEPS, "test_a_step_about_other", "models-are-those-sent-here"),
    Mutation(STEPS, "test_merged_layers", "delivered-once-or-the-same"),
    Mutation(STEPS, "test_merged_layers", "delivery-is-the-next-event"),
    Mutation(STEPS, "test_merged_layers", "position-is-that-delivery"),
    # 50, 51, 54: scales of 32-bit sums
    Mutation(SCALES, "test_50_", "models-are-those-sent-here"),
    Mutation(
        SCALES,
        "test_50_",
        "session-covers-the-request",
        "values = [getattr(self, field.name) for field in fields(self)[:4]]",
    ),
    Mutation(SCALES, "test_51_scales_of_its_own", "scales-cover-my-numbers"),
    Mutation(SCALES, "test_51_scales_of_its_own", "my-bits-are-kept"),
    Mutation(SCALES, "test_51_scales_of_its_own", "scales-are-powers-of-two"),
    Mutation(SCALES, "test_51_scales_of_its_own", "delivered-once-or-the-same"),
    Mutation(SCALES, "test_51_one_scale", "scales-cover-my-numbers", "if not mine.sum() <= sent.sum():"),
    Mutation(SCALES, "test_51_scales_before", "delivery-is-the-next-event"),
    Mutation(SCALES, "test_51_scales_before", "last-event-is-complete", "due = following"),
    Mutation(
        SCALES,
        "test_51_scales_before",
        "round-is-complete-once-revealed",
        "if request.position == owner.state.run.begun:",
    ),
    Mutation(SCALES, "test_51_a_contribution", "round-is-the-next-event"),
    Mutation(SCALES, "test_51_contributions", "layout-digest-covers-the-ring", "description = self.to_json()[1:]"),
    Mutation(SCALES, "test_51_contributions", "layout-is-the-agreed-one"),
    Mutation(SCALES, "test_51_contributions", "contributed-once"),
    Mutation(SCALES, "test_51_scales_that_nobody", "layout-is-the-agreed-one"),
    Mutation(SCALES, "test_51_scales_that_nobody", "position-is-that-delivery"),
    Mutation(SCALES, "test_54_", "nothing-measured-stays"),
    Mutation(SCALING, "test_scales_that_leave", "my-bits-are-kept", "if sent.sum() > worth.sum() > 0:"),
    Mutation(SCALING, "test_scales_that_leave", "my-bits-are-kept", "if 2 * (sent > worth)[seen].sum() > seen.sum():"),
    Mutation(SCALING, "test_32_bits", "all-owners-in-32-bits"),
    Mutation(
        RESUME,
        "test_a_run_in_32_bits",
        "contribution-outlives-a-burn",
        'if side.is_done and kept.kind == "contribution":',
    ),
    # 55: what a total tells
    Mutation(LEAKS, "test_a_gram_of_few_rows", "enough-rows-for-a-gram"),
    Mutation(OWNERS, "test_an_owner_with_too_few_rows", "enough-rows-for-a-gram"),
    Mutation(LEAKS, "test_an_agreement_on_as_many", "few-weightings"),
    Mutation(LEAKS, "test_no_delta", "totals-are-destroyed"),
    Mutation(LEAKS, "test_with_absolute", "token-inputs-are-averaged"),
    Mutation(LEAKS, "test_55_", "blocks-count-together", "of_layer[shared_input.name] += shared_input.gram_size"),
    Mutation(ARCHITECTURES, "test_experts_are_merged_only", "routed-inputs-are-averaged"),
    Mutation(AGREEMENT, "test_a_multi_round_method", "all-owners-in-every-round"),
    # 60-66: the same under two agreements
    Mutation(LEDGER, "test_60_the_same_rows or test_60_one_row", "rows-are-contributed-once"),
    Mutation(LEDGER, "test_60_a_repetition", "repeats-have-consent"),
    Mutation(LEDGER, "test_61_", "offered-elsewhere-since"),
    Mutation(
        LEDGER,
        "test_62_",
        "each-agreement-draws-anew",
        "order = np.random.default_rng(self.agreement.seed).permutation(len(rows))",
    ),
    Mutation(LEDGER, "test_63_", "weightings-add-up"),
    Mutation(LEDGER, "test_64_", "missing-ledger-is-not-empty"),
    Mutation(LEDGER, "test_64_consent", "consent-waits-for-the-ledger", "if True:"),
    Mutation(LEDGER, "test_64_", "ledger-is-of-this-identity"),
    Mutation(LEDGER, "test_65_", "state-is-of-this-identity"),
    Mutation(LEDGER, "test_66_", "broken-session-is-burned"),
    # 67: core dumps
    Mutation(WIRE, "test_67_", "reading-a-key-forbids-dumps"),
    Mutation(WIRE, "test_67_", "writing-a-key-forbids-dumps"),
    Mutation(WIRE, "test_67_", "no-core-files"),
    Mutation(WIRE, "test_67_", "no-collected-dumps"),
    # what an owner has on its disk, and what a coordinator keeps of a run
    Mutation(GRAM_STREAM, "test_activations_are", "activations-are-private", 'with path.open("wb") as file:'),
    Mutation(OWNERS, "test_a_full_disk", "room-is-taken-in-advance"),
    Mutation(
        OWNERS, "test_state_is_readable", "files-are-private", "def create(path: Path, mode: int = 0o644) -> BinaryIO:"
    ),
    Mutation(OWNERS, "test_state_is_readable", "folders-are-private"),
    Mutation(
        RESUME,
        "test_totals_are_readable",
        "files-are-private",
        "def create(path: Path, mode: int = 0o644) -> BinaryIO:",
    ),
    Mutation(RESUME, "test_totals_are_readable", "folders-are-private"),
    Mutation(RESUME, "test_an_owner_that_a_sum", "opened-sessions-are-over", "return sorted(pending - reopening)"),
    Mutation(RESUME, "test_the_run_goes_on_without", "only-the-burned-session-is-forgotten", "if kept is not None:"),
    Mutation(RESUME, "test_the_run_goes_on_without", "who-verifies-knows-with-whom"),
    # logs, and two programs on one output
    Mutation(
        LOGS,
        "test_a_line_holds_nothing",
        "logs-hold-no-exception",
        '"message": record.getMessage() + str(record.exc_info),',
    ),
    Mutation(
        LOGS,
        "test_a_whole_run",
        "logs-hold-no-number-of-rows",
        'log.info("  %s: measuring %s", self.name, len(self.data.train()))',
    ),
    Mutation(LOGS, "test_a_second_run", "one-process-at-a-time"),
    # 100-103: text that another party wrote
    Mutation(TEXT, "test_100_text", "text-shows"),
    Mutation(TEXT, "test_100_text", "text-is-not-padded"),
    Mutation(TEXT, "test_100_text", "text-is-normalised"),
    Mutation(TEXT, "test_100_text", "marks-do-not-pile-up"),
    Mutation(TEXT, "test_100_no_string_of_an_agreement", "text-from-others-is-one-line"),
    Mutation(TEXT, "test_100_no_string_of_a_report", "text-from-others-is-one-line"),
    Mutation(TEXT, "test_100_no_string_of_a_report", "hyperparameters-are-one-line"),
    Mutation(TEXT, "test_100_no_string_of_a_message", "model-names-are-one-line", "return isinstance(value, str)"),
    Mutation(TEXT, "test_101_a_title", "text-from-others-is-one-line"),
    Mutation(TEXT, "test_101_another_party or test_101_the_true", "other-words-are-quoted", "return text"),
    Mutation(TEXT, "test_101_consent", "consent-names-the-fingerprint"),
    Mutation(TEXT, "test_101_consent", "consent-names-the-digits"),
    Mutation(TEXT, "test_102_a_log_line", "log-lines-are-escaped", "return super().format(record)"),
    Mutation(TEXT, "test_102_a_server", "log-lines-are-escaped", "return super().format(record)"),
    Mutation(TEXT, "test_102_a_bundle", "launchers-tell-one-line", "line = message"),
    Mutation(
        TEXT,
        "test_102_an_error_of_flower",
        "only-our-words-are-repeated",
        "if refusal := REFUSED.search(line) and [line]:",
    ),
    Mutation(TEXT, "test_102_an_error_is", "errors-are-escaped", ""),
    Mutation(
        TEXT,
        "test_102_an_error_that",
        "kept-errors-are-escaped",
        'write_whole(self.folder / "error.txt", text.encode("utf-8", "replace") + b"\\n")',
    ),
    Mutation(AUDIT_COMMAND, "test_what_an_owner_does_alone", "audits-fetch-nothing", ""),
    Mutation(AUDIT_COMMAND, "test_what_an_owner_does_alone", "personal-models-fetch-nothing", ""),
    Mutation(PERSONAL, "test_a_folder_that", "personal-models-replace-nothing"),
    Mutation(
        PERSONAL, "test_a_personal_model", "personal-models-are-private", "(partial := out.parent / 'new').mkdir()"
    ),
    Mutation(AUDIT, "test_canaries_are_planted_only_where", "canaries-need-a-line", "canaries: int = 20"),
    Mutation(AUDIT, "test_rows_of_both_groups", "members-are-no-strangers", "members, free = judged, pooled"),
    Mutation(SUBJECTS, "test_a_model_that_says_nothing", "labels-are-matched-by-name"),
    Mutation(SUBJECTS, "test_a_configuration_that_describes", "no-more-layers-than-tensors"),
    Mutation(SUBJECTS, "test_a_configuration_that_describes", "no-more-numbers-than-bytes"),
    Mutation(SUBJECTS, "test_a_configuration_that_counts", "models-fit-their-files"),
    Mutation(SUBJECTS, "test_an_adapter_of_a_rank", "models-fit-their-files"),
    Mutation(SUBJECTS, "test_a_configuration_that_counts", "lists-of-sizes-are-bounded"),
    Mutation(SUBJECTS, "test_a_configuration_that_counts", "buffers-are-bounded"),
    Mutation(SUBJECTS, "test_an_image_processor", "image-sides-are-bounded"),
    Mutation(SUBJECTS, "test_an_image_processor", "image-crops-are-bounded"),
    Mutation(SUBJECTS, "test_weights_that_are_unrelated", "unrelated-models-have-no-base"),
    Mutation(TEXT, "test_102_no_string_of_a_report_is_markup_or", "page-is-escaped", "autoescape=False,"),
    Mutation(TEXT, "test_102_no_string_of_a_report_is_markup_or", "page-hides-nothing", ""),
    Mutation(TEXT, "test_102_another_party", "markdown-is-escaped", "return one_line"),
    Mutation(TEXT, "test_102_no_string_of_a_report_is_markup_on", "markdown-is-escaped", "return one_line"),
    Mutation(TEXT, "test_102_a_base_s_licence", "licence-link-is-a-web-address", '"license_link": bool,'),
    Mutation(TEXT, "test_102_a_base_whose", "hub-name-is-one", "return name if is_fetched else None"),
    Mutation(TEXT, "test_103_labels", "labels-look-different"),
    Mutation(TEXT, "test_103_no_owner", "owners-take-no-other-file"),
    Mutation(
        TEXT,
        "test_103_a_base",
        "base-labels-are-checked",
        'completed = draft.model_copy(update={"task": draft.task.model_copy(update={"labels": labels})})',
    ),
    Mutation(ROWS, "test_half_a_surrogate", "texts-are-unicode"),
    # between machines
    Mutation(LAUNCH, "test_the_guard_shows_other", "guard-is-shut", "or True"),
    Mutation(LAUNCH, "test_the_guard_shows_other", "open-paths-match-whole", "return OPEN.match(path) is not None"),
    Mutation(DEPLOYMENT, "test_from_another_address", "guard-is-shut", "or True"),
    Mutation(
        LAUNCH, "test_nothing_of_the_surroundings", "peers-do-not-say-who-they-are", 'if not name.startswith("FLWR_")'
    ),
    Mutation(LAUNCH, "test_another_bundle_that_declares", "bundle-is-agreed"),
    Mutation(LAUNCH, "test_a_run_that_declares", "bundle-declares-its-digest"),
    Mutation(LAUNCH, "test_a_run_that_declares", "bundle-declares-its-name"),
    Mutation(LAUNCH, "test_a_run_that_declares", "run-is-a-server-app"),
    Mutation(
        LAUNCH, "test_the_gate_lets", "gate-gives-what-it-saw", 'return self._connection["get_fab"](fab_hash, run_id)'
    ),
    Mutation(LAUNCH, "test_whoever_was_killed", "interruption-is-noted"),
    Mutation(LAUNCH, "test_an_answer_that_broke_off", "answer-is-whole", "if True:"),
    Mutation(LAUNCH, "test_another_version", "flower-is-of-that-version"),
    Mutation(LAUNCH, "test_a_changed_or_missing", "flower-is-as-released"),
    # 90, 91: what a stranger can make the server hold
    Mutation(SERVER, "test_90_a_stranger", "nodes-prove-their-keys-first"),
    Mutation(SERVER, "test_90_a_stranger", "nodes-are-registered", "return True"),
    Mutation(SERVER, "test_90_even_this_machine", "bodies-are-bounded"),
    Mutation(SERVER, "test_90_headers", "heads-are-bounded", '"h11_max_incomplete_event_size": 1 << 30,'),
    Mutation(SERVER, "test_91_a_request_that", "requests-arrive-in-time"),
    Mutation(SERVER, "test_91_connections", "connections-are-bounded"),
    # 96: a token in a mean likelihood
    Mutation(LIKELIHOODS, "test_96_a_candidate_without_bounds", "likelihoods-are-clipped", ""),
    Mutation(LIKELIHOODS, "test_96_two_candidates", "likelihoods-are-rounded", ""),
    Mutation(LIKELIHOODS, "test_96_whatever", "likelihoods-are-rounded", ""),
    Mutation(LIKELIHOODS, "test_135", "moments-are-rounded", "sums = terms.sum(axis=0)"),
    Mutation(METRICS, "test_predictions_that_are_no_numbers", "predictions-are-clipped", ""),
    Mutation(METRICS, "test_136_label_counts", "label-counts-fit-the-rows"),
    Mutation(METRICS, "test_136_sums", "moments-fit-the-rows"),
    Mutation(METRICS, "test_136_more_cut_texts", "cut-texts-are-texts"),
    Mutation("test_labels.py", "test_targets_that_cannot_be_used", "targets-are-in-range"),
    # 98: files
    Mutation(FILES, "test_98_a_small_file", "unpacked-files-are-bounded"),
    Mutation(FILES, "test_98_compressed_text", "unpacked-text-is-bounded"),
    Mutation(FILES, "test_98_a_key_in", "unknown-keys-are-one-line", 'key = _dotted(first["loc"])'),
    Mutation(FILES, "test_98_a_field_of", "field-names-are-one-line", "shown_names = differing"),
    Mutation(FILES, "test_98_an_owner_s_own", "layouts-are-read-exactly"),
    Mutation(FILES, "test_98_a_ledger_whose", "sketches-hold-whole-digests"),
    # 92-95: what a model's folder names
    Mutation(FOLDERS, "test_92_an_index", "an-index-names-safetensors"),
    Mutation(FOLDERS, "test_92_a_file", "model-files-are-inside"),
    Mutation(FOLDERS, "test_92_an_adapter", "model-files-are-inside"),
    Mutation(FOLDERS, "test_93_a_configuration_names", "configurations-name-no-code", "if True"),
    Mutation(FOLDERS, "test_93_a_part", "configurations-name-no-code", "if True"),
    Mutation(FOLDERS, "test_93_a_configuration_names", "configurations-describe-models", "if key != 'model_type'"),
    Mutation(FOLDERS, "test_93_a_configuration_needs", "code-is-of-transformers"),
    Mutation(FOLDERS, "test_95_a_configuration", "configurations-are-bounded"),
    Mutation(DEPLOYMENT, "test_a_bundle_that_reads", "other-bundles-are-refused", "if True:"),
    Mutation(DEPLOYMENT, "test_only_the_agreement_s_keys", "node-key-is-agreed"),
    Mutation(DEPLOYMENT, "test_no_node_changes", "nodes-register-nobody"),
    Mutation(DEPLOYMENT, "test_an_owner_that_has_not", "consent-comes-before-connecting"),
    # 80-84: what owners sign at the end, and what anybody can check
    Mutation(RECEIPTS, "test_80_a_configuration_that", "configuration-is-the-agreed-one"),
    Mutation(RECEIPTS, "test_80_a_configuration_file", "published-files-are-mine"),
    Mutation(RECEIPTS, "test_81_an_additional", "published-files-are-the-agreed-ones"),
    Mutation(RECEIPTS, "test_81_weights", "published-files-are-mine"),
    Mutation(PUBLISHED, "test_81_no_file", "configurations-name-no-code", "if True"),
    Mutation(RECEIPTS, "test_82_metrics_that_show", "own-metrics-are-published-as-measured"),
    Mutation(RECEIPTS, "test_82_metrics_that_omit", "metrics-are-of-the-agreed-models"),
    Mutation(
        RECEIPTS,
        "test_82_what_was_signed",
        "receipts-cover-the-publication",
        "values = [agreement.digest(), model, model_digest, digest]",
    ),
    Mutation(RECEIPTS, "test_82_a_publication", "publication-is-canonical"),
    Mutation(RECEIPTS, "test_83_a_published or test_83_weights", "verify-compares-files"),
    Mutation(RECEIPTS, "test_83_code", "verify-finds-additional-files"),
    Mutation(RECEIPTS, "test_248_", "verify-looks-beside-the-model"),
    Mutation(RECEIPTS, "test_84_receipts_with", "verify-checks-signatures", "signed_by = list(receipts.owners)"),
    Mutation(RECEIPTS, "test_84_receipts_of", "published-receipts-are-the-coordinator-s"),
    Mutation(SIMULATE, "report_that_was_improved", "verify-compares-metrics"),
    # 85, 86: dishonest owners
    Mutation(DISHONEST, "test_85_", "signed-model-is-good-enough"),
    Mutation(DISHONEST, "test_86_a_weight", "weights-add-up"),
    Mutation(DISHONEST, "test_86_more", "weights-add-up"),
    # 114, 115, 247: evidence of a lie
    Mutation(EVIDENCE, "test_247_a_delivery", "evidence-is-signed"),
    Mutation(EVIDENCE, "test_247_a_result", "evidence-of-a-result-is-signed"),
    # 249 to 253: what an owner's record does not show
    Mutation(
        RECORDS,
        "test_249_shares",
        "evidence-of-a-check-is-signed",
        "owners, numbers = agreement.owner_names, [1.0, 1.0]",
    ),
    Mutation(RECORDS, "test_249_an_honest", "evidence-of-a-check-adds-up"),
    Mutation(RECORDS, "test_249_an_owner", "kept-checks-are-of-enough-owners"),
    Mutation(RECORDS, "test_249_shares", "kept-checks-are-whole"),
    Mutation(RECORDS, "test_249_shares", "kept-keys-are-signed"),
    Mutation(RECORDS, "test_250_a_record", "nothing-is-not-signed"),
    Mutation(RECORDS, "test_250_what_the_coordinator", "what-was-expected-was-signed", ""),
    Mutation(RECORDS, "test_251_words", "kept-runs-are-digests", "run: str"),
    Mutation(RECORDS, "test_251_words", "kept-splits-are-two", "split: str"),
    Mutation(
        RECORDS,
        "test_251_a_file",
        "record-names-are-one-line",
        "names = [str(path) for path in paths]",
    ),
    Mutation(RECORDS, "test_253_", "records-of-all-agreements", "for path in (home / settings.agreement,):"),
    Mutation(RECORDS, "test_252_a_record", "kept-evidence-is-bounded", "content = file.read()"),
    Mutation(EVIDENCE, "test_114_evidence_against", "evidence-is-about-the-accused"),
    Mutation(EVIDENCE, "test_114_shares_that_the_dealer_did", "evidence-is-the-dealer-s"),
    Mutation(EVIDENCE, "test_114_words", "evidence-is-the-revealer-s"),
    Mutation(EVIDENCE, "test_114_words", "evidence-is-the-opener-s"),
    Mutation(EVIDENCE, "test_114_words", "evidence-is-the-disputants"),
    Mutation(EVIDENCE, "test_115_evidence", "evidence-is-of-its-agreement"),
    Mutation(EVIDENCE, "test_115_what_proves", "evidence-is-kept"),
    Mutation(DISHONEST, "test_owners_that_clip", "changes-are-clipped"),
    Mutation(DISHONEST, "test_an_owner_s_own", "owners-clip-their-changes", "return Delta(own, base)"),
    Mutation(DISHONEST, "test_an_agreement_states", "changes-have-bounds"),
    Mutation(DISHONEST, "test_87_", "changes-are-small-enough"),
    Mutation(DISHONEST, "test_88_grams_beyond", "own-grams-fit-the-weights"),
    Mutation(DISHONEST, "test_88_", "grams-fit-the-weights"),
    Mutation(DISHONEST, "test_89_", "classifier-rows-add-up"),
]


@dataclass(frozen=True)
class Tag:
    """A comment that names a check. `line` counts from 0."""

    path: Path
    line: int
    check: str


def tags_in(path: Path) -> Iterator[Tag]:
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type == tokenize.COMMENT and (found := TAG.search(token.string)):
                yield Tag(path, token.start[0] - 1, found[1])


def tags_below(root: Path) -> list[Tag]:
    paths = sorted(path for name in PRODUCT for path in (root / name).rglob("*.py"))
    return [tag for path in paths if "# check: " in path.read_text() for tag in tags_in(path)]


@cache
def statements_of(source: str) -> list[ast.stmt]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)]


def statement_at(source: str, line: int) -> ast.stmt:
    """The innermost statement that has this line."""
    around = [each for each in statements_of(source) if each.lineno - 1 <= line < (each.end_lineno or 0)]
    return min(around, key=lambda each: (each.end_lineno or 0) - each.lineno)


def without_check(source: str, tag: Tag, becomes: str | None) -> str:
    """The source with the check removed. Raises ValueError if the row must say what its line becomes."""
    lines = source.splitlines(keepends=True)
    statement = statement_at(source, tag.line)
    if becomes is not None:
        indentation = lines[tag.line][: len(lines[tag.line]) - len(lines[tag.line].lstrip())]
        lines[tag.line] = textwrap.indent(becomes + "\n", indentation)
    elif isinstance(statement, ast.If):
        _replace(lines, statement.test, "False")
    elif isinstance(statement, ast.Expr | ast.Raise | ast.AugAssign):
        _replace(lines, statement, "pass")
    else:
        raise ValueError(f"{tag.check}: a {type(statement).__name__} needs `becomes`")
    return "".join(lines)


def _replace(lines: list[str], node: ast.expr | ast.stmt, text: str) -> None:
    assert node.end_lineno is not None
    first, last = lines[node.lineno - 1].encode(), lines[node.end_lineno - 1].encode()
    before, after = first[: node.col_offset].decode(), last[node.end_col_offset :].decode()
    lines[node.lineno - 1 : node.end_lineno] = [before + text + after]


def names_match(expression: str, name: str) -> bool:
    """Whether pytest's -k would choose the test."""
    words = re.sub(
        r"\w+", lambda word: word[0] if word[0] in ("and", "or", "not") else str(word[0] in name), expression
    )
    return bool(eval(words))


def run_tests(forked: ForkedTests, tree: Path, file: str, which: str) -> subprocess.CompletedProcess[str]:
    return forked.run(tree, "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", which, f"tests/{file}")


@pytest.fixture(scope="module")
def forked() -> Iterator[ForkedTests]:
    with forked_tests() as server:
        yield server


@pytest.fixture(scope="module")
def tree(forked: ForkedTests, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree, in which every test of the table passes."""
    copy = tmp_path_factory.mktemp("mutations") / "tree"
    copy.mkdir()
    for name in (*PRODUCT, "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    for file in sorted({row.file for row in TABLE}):
        named = " or ".join(f"({tests})" for tests in sorted({row.tests for row in TABLE if row.file == file}))
        done = run_tests(forked, copy, file, named)
        assert done.returncode == 0, done.stdout[-2000:]
    return copy


def test_every_check_of_the_table_is_tagged_once_and_every_tag_is_in_the_table() -> None:
    tagged = Counter(tag.check for tag in tags_below(ROOT))
    assert not [check for check in tagged if not ID.fullmatch(check)]
    assert not [check for check, count in tagged.items() if count > 1]
    assert set(tagged) == {row.check for row in TABLE}
    assert len(set(TABLE)) == len(TABLE)


def test_every_test_of_the_table_exists() -> None:
    for file in {row.file for row in TABLE}:
        module = ast.parse((ROOT / "tests" / file).read_text())
        names = [node.name for node in module.body if isinstance(node, ast.FunctionDef) and node.name[:5] == "test_"]
        for tests in {row.tests for row in TABLE if row.file == file}:
            assert any(names_match(tests, name) for name in names), f"{file} has no test that matches {tests!r}"


def test_every_check_can_be_removed() -> None:
    """What is left is Python, and differs."""
    tags = {tag.check: tag for tag in tags_below(ROOT)}
    for row in TABLE:
        source = tags[row.check].path.read_text()
        changed = without_check(source, tags[row.check], row.becomes)
        assert changed.split() != source.replace(f"# check: {row.check}\n", "\n").split(), row
        if row.becomes is not None:
            ast.parse(changed)


@pytest.mark.slow
@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.check}-{row.tests}")
def test_without_its_check_an_attack_succeeds(forked: ForkedTests, tree: Path, row: Mutation) -> None:
    (tag,) = (tag for tag in tags_below(tree) if tag.check == row.check)
    original = tag.path.read_text()
    tag.path.write_text(without_check(original, tag, row.becomes))
    try:
        done = run_tests(forked, tree, row.file, row.tests)
    finally:
        tag.path.write_text(original)
    # 1: tests were run and failed. 5 would mean that no test has this name, 2 that the mutation is no Python.
    assert done.returncode == 1, done.stdout[-2000:]
    assert " error" not in done.stdout.splitlines()[-1], done.stdout[-2000:]
