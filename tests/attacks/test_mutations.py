# ruff: noqa: E501 - a table is read by its rows
"""Every check, removed: the attack that it stops must then succeed, that is, its test must fail.

Each row of the table names a test, a file, and one change to it that takes the check away. The change is made in a
copy of the source tree. `make test-all` runs them; the unchanged copy must pass all the tests named here.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
MASKED, OWNER, WORKBENCH = "common/summation/masked.py", "client/owner.py", "client/workbench.py"
LEDGER, SCALING = "client/ledger.py", "common/scaling.py"


@dataclass(frozen=True)
class Mutation:
    """`test` is a part of the name of one or more tests, all of one file."""

    file: str
    test: str
    source: str
    find: str
    replace: str = "pass"


GUARD, GATE, INTERNALS = (f"deploy/launch/{name}.py" for name in ("guarded_superlink", "pinned_supernode", "internals"))
PACKETS, COORDINATOR = "test_packets.py", "test_coordinator.py"
LAUNCH, LOGS, OWNERS, DEPLOYMENT = "test_launch.py", "test_logs.py", "test_owner.py", "end_to_end/test_deployment.py"
KEYS, SHARES, SURVIVORS, UPLOADS, PROCESS, WIRE, SUM, LEAKS, ARCHITECTURES, STEPS, SCALES, AGREEMENT, RESUME = (
    "attacks/test_keys.py",
    "attacks/test_shares.py",
    "attacks/test_survivors.py",
    "attacks/test_uploads.py",
    "attacks/test_owner_process.py",
    "attacks/test_wire.py",
    "test_masked_sum.py",
    "attacks/test_leaks.py",
    "test_architectures.py",
    "attacks/test_steps.py",
    "attacks/test_scales.py",
    "test_agreement.py",
    "end_to_end/test_resume.py",
)

TABLE = [
    # 1-7, 12, 13, 27: the key book
    Mutation(KEYS, "test_1_", "common/summation/masked/book.py", "            check_entry(self.terms, entry)"),
    Mutation(KEYS, "test_2_", "common/summation/masked/book.py", "            check_entry(self.terms, entry)"),
    Mutation(KEYS, "test_3_", "common/summation/masked/book.py", "            check_entry(self.terms, entry)"),
    Mutation(KEYS, "test_4_an_owner_twice", "common/summation/records.py", "later.owner <= earlier.owner", "False"),
    Mutation(KEYS, "test_4_a_colluder", "common/summation/masked/book.py", "len(set(keys)) != len(keys)", "False"),
    Mutation(KEYS, "test_5_", "common/summation/masked/owner.py", "book.entries.get(self._me) == self._own_entry()", "self._me in book.entries"),
    Mutation(KEYS, "test_6_", "common/summation/masked/owner.py", "book.entries.get(self._me) == self._own_entry()", "True"),
    Mutation(KEYS, "test_7_", "common/identity.py", "session + encoded + body", "encoded + body"),
    Mutation(KEYS, "test_12_", "common/summation/protocol.py", "if place >= len(self.names):", "if False:"),
    Mutation(KEYS, "test_13_too_few", "common/summation/masked/owner.py", '        self._check_enough(len(book.entries), "key book")'),
    Mutation(KEYS, "test_13_the_quorum", "common/summation/masked/owner.py", "max(self.terms.quorum, self.terms.needed_owners)", "self.terms.needed_owners"),
    Mutation(
        KEYS,
        "test_27_",
        "common/summation/key_agreement.py",
        'raise RemoteProtocolError("a public key is a point of low order") from None',
        "return bytes(32)",
    ),
    # 8-11: rounds and agreements
    Mutation(PROCESS, "test_8_9_", LEDGER, "if round_number <= self._round:", "if False:"),
    Mutation(PROCESS, "test_9_an_old", LEDGER, "if round_number <= self._round:", "if False:"),
    Mutation(PROCESS, "test_10_any_field", OWNER, "if digest != self.agreement.digest():", "if False:"),
    Mutation(PROCESS, "test_10_an_owner_s_file", OWNER, "if digest not in self.state.consents():", "if False:"),
    Mutation(PROCESS, "test_10_another_base", "common/models/loading.py", "if digest != agreement.base_digest:", "if False:"),
    Mutation(PROCESS, "test_10_two_owners", "common/messages.py", "for field in fields(self)]", 'for field in fields(self)[:4]]'),
    Mutation(PROCESS, "test_11_", "common/agreement.py", "if self.summation.quorum not in (None, quorum(count, colluders)):", "if False:"),
    Mutation(SURVIVORS, "test_11_19_", "common/summation/masked/owner.py", "len(signed) >= self.terms.quorum", "True"),
    # 13, 14, 18: survivors
    Mutation(SHARES, "test_13_", "common/summation/masked/owner.py", "        self._check_neighbourhood(len(senders) + 1)"),
    Mutation(SURVIVORS, "test_13_", "common/summation/masked/owner.py", "not strangers and not silent", "True"),
    Mutation(SURVIVORS, "test_14_survivors_are", "common/summation/masked/owner.py", '        self._check_enough(len(survivors), "survivors")'),
    Mutation(SURVIVORS, "test_14_i_am", "common/summation/masked/owner.py", "survivors.get(self._me) == mine", "True"),
    Mutation(SURVIVORS, "test_14_my_upload", "common/summation/masked/owner.py", "survivors.get(self._me) == mine", "self._me in survivors"),
    Mutation(SURVIVORS, "test_18_", "common/thresholds.py", "return (num_owners + colluders) // 2 + 1", "return num_owners // 2"),
    Mutation(SURVIVORS, "test_36_exactly", "common/thresholds.py", "return (num_owners + colluders) // 2 + 1", "return num_owners // 2"),
    # 15-17: both secrets
    Mutation(
        SURVIVORS,
        "test_15_",
        MASKED,
        "        return RevealedShare.pack_all(shares)",
        "        shares += [RevealedShare(o, MASK, _two_shares(b)[1]) for o, b in self.held.items()]\n"
        "        return RevealedShare.pack_all(shares)",
    ),
    Mutation(SURVIVORS, "test_16_both", "common/summation/masked/owner.py", "(SIGNED, Acknowledgements): REVEALED,", "(SIGNED, Acknowledgements): SIGNED,"),
    Mutation(SURVIVORS, "test_16_a_second", "common/summation/masked/owner.py", "(UPLOADED, SurvivorList): SIGNED,", "(UPLOADED, SurvivorList): SIGNED,\n    (SIGNED, SurvivorList): SIGNED,"),
    Mutation(PROCESS, "test_17_a_second_survivor", OWNER, '        self.state.write_json("sum", {**kept, "side": side.to_json()})'),
    Mutation(PROCESS, "test_17_a_second_reveal", OWNER, '        self.state.write_json("sum", {**kept, "side": side.to_json()})'),
    Mutation(PROCESS, "test_17_a_second_reveal", "common/summation/masked/owner.py", "self.revealed or self._shares_for(survivors)", "self._shares_for(survivors)"),
    Mutation(PROCESS, "test_39_two_processes", "client/state.py", "            fcntl.flock(descriptor, fcntl.LOCK_EX)"),
    Mutation(PROCESS, "test_a_session_whose", OWNER, "            self.state.forget_sum()\n            raise", "            raise"),
    # 19: acknowledgements
    Mutation(SURVIVORS, "test_19_one_signer", "common/summation/records.py", "later.owner <= earlier.owner", "False"),
    Mutation(
        SURVIVORS,
        "test_19_a_signature_passed",
        MASKED,
        "            _verify(self.terms, each.owner, Domain.SIGN_SURVIVORS, body, each.signature)",
    ),
    Mutation(
        SURVIVORS,
        "test_19_signatures_under",
        MASKED,
        "            _verify(self.terms, each.owner, Domain.SIGN_SURVIVORS, body, each.signature)",
    ),
    Mutation(SURVIVORS, "test_19_a_signer", "common/summation/masked/owner.py", "each.owner in survivors", "True"),
    # 20, 21: shares
    Mutation(SHARES, "test_20_a_forged_share and not manifest", "common/summation/masked/owner.py", "hashlib.sha256(delivery.sealed).digest() == named", "True"),
    Mutation(SHARES, "test_20_two_senders", "common/summation/masked/owner.py", "hashlib.sha256(delivery.sealed).digest() == named", "True"),
    Mutation(SHARES, "manifest_that_fits", "common/summation/masked/owner.py", "        _verify(self.terms, sender, Domain.SIGN_SHARES, body, delivery.signature)"),
    Mutation(SHARES, "test_20_another_commitment", "common/summation/masked/owner.py", "        _verify(self.terms, sender, Domain.SIGN_SHARES, body, delivery.signature)"),
    Mutation(SHARES, "test_20_another_recipient", "common/summation/masked/owner.py", "set(senders) <= set(book.neighbours[self._me])", "True"),
    Mutation(SHARES, "test_20_manifests", "common/summation/masked/owner.py", 'rest == b""', "True"),
    Mutation(SHARES, "test_20_truncated", "common/summation/records.py", "if len(data) % cls.FORMAT.size:", "data = data[: len(data) // cls.FORMAT.size * cls.FORMAT.size]\n        if False:"),
    Mutation(SHARES, "test_20_a_share_at", MASKED, "plain[:2] == _place(self._me)", "True"),
    Mutation(SHARES, "test_20_a_share_sealed", "common/summation/masked/book.py", "return self.digest + _direction(sender, recipient)", "return self.digest"),
    Mutation(SHARES, "test_20_a_share_that_is_no", "common/summation/masked/owner.py", "        for share in _two_shares(shares):\n            secret_sharing.read_share(share)\n", ""),
    Mutation(SHARES, "test_21_one_wrong or test_21_wrong", "common/summation/masked/coordinator.py", "if fits(seed):", "if True:"),
    Mutation(SHARES, "test_21_a_share", "common/summation/masked/coordinator.py", "record.kind == (SELF if record.owner in survivors else MASK)", "True"),
    # 22-25: uploads
    Mutation(SURVIVORS, "test_22_", "common/summation/masked/owner.py", "(book.self_mask(self.self_seed), 1)]", "]"),
    Mutation(UPLOADS, "test_23_a_second", "common/summation/masked/coordinator.py", "owner in self._waiting", "True"),
    Mutation(UPLOADS, "test_23_another", "common/summation/masked/coordinator.py", "before == digest", "True"),
    Mutation(UPLOADS, "test_24_an_upload_of", "common/summation/accumulator.py", 'if part != self.part or payload.shape != (expected,) or payload.dtype != self.vector.dtype:', "if False:"),
    Mutation(UPLOADS, "test_24_an_upload_altered", MASKED, "        _verify(self._terms, place, Domain.SIGN_PART, _part_body(reply.part, digest), reply.signature)"),
    Mutation(UPLOADS, "test_24_after", "common/summation/masked/owner.py", "(UPLOADED, PartRequest): UPLOADED,", "(UPLOADED, PartRequest): UPLOADED,\n    (SIGNED, PartRequest): SIGNED,"),
    Mutation(UPLOADS, "test_25_a_value", "common/summation/fixed_point.py", "if not np.abs(chunk).max(initial=0.0) <= entry.bound:", "if False:"),
    Mutation(UPLOADS, "test_25_at_the_bound", "common/summation/fixed_point.py", "int(ratio).bit_length() - 1", "int(ratio).bit_length()"),
    Mutation(SUM, "test_a_total_beyond", "common/summation/fixed_point.py", "if int(chunk.max(initial=0)) > largest or int(chunk.min(initial=0)) < -largest:", "if False:"),
    Mutation(SUM, "test_a_vector_that_changed", "common/summation/masked/owner.py", "sent_before and self.part_digests[part] != digest", "False"),
    # 28, 29: contribute once
    Mutation(PROCESS, "test_28_", LEDGER, "if statistic in self._offered:", "if False:"),
    Mutation(PROCESS, "test_29_all", OWNER, "if side.offers:", "if side.reveals:"),
    Mutation(PROCESS, "test_29_figures", OWNER, "self._ledger.begin(message.round, message.session, message.statistic)", "self._ledger.begin(message.round, message.session, message.statistic + message.models)"),
    Mutation(PROCESS, "test_too_few_forged", "common/certificates.py", "if len(signers) < needed:", "if False:"),
    Mutation(PROCESS, "test_an_owner_that_has_revealed", LEDGER, "if session in self._revealed:", "if False:"),
    Mutation(PROCESS, "test_a_burned_session", LEDGER, "if session in self._burned:", "if False:"),
    Mutation(PROCESS, "test_a_certificate_alone", OWNER, "        ledger.burn(message.session)\n        self.state.forget_sum()\n        ledger.release", "        ledger.release"),
    Mutation(PROCESS, "test_44_", LEDGER, "        self._check_not_burned(session)"),
    Mutation(
        PROCESS,
        "test_45_",
        "client/state.py",
        "            self._run_folder.rename(forgotten)\n            shutil.rmtree(forgotten, ignore_errors=True)",
        "            shutil.rmtree(self._run_folder, ignore_errors=True)",
    ),
    Mutation(PROCESS, "test_46_", OWNER, " and (name, split) in received", ""),
    # 30, 31, 35
    Mutation(SUM, "test_no_mask_is_used", "common/summation/mask_stream.py", "combine(chunk, keystream[: len(chunk)], out=chunk)", "combine(chunk, keystream[0], out=chunk)"),
    Mutation(SUM, "test_the_same_keys", "common/summation/masked/owner.py", "key_agreement.public_key(self.mask_seed, Domain.MASK_KEY, session)", "key_agreement.public_key(self.mask_seed, Domain.MASK_KEY, bytes(32))"),
    Mutation(SUM, "test_an_all_zero", "common/summation/masked/owner.py", "        mask_stream.add_masks(payload, self.masks, position.start)"),
    Mutation(SUM, "test_secrets_do_not_show", "common/summation/masked/owner.py", 'self_seed: bytes = field(default=b"", repr=False)', 'self_seed: bytes = b""'),
    Mutation(WIRE, "test_35_files", "common/private_file.py", "0o600", "0o644"),
    Mutation(WIRE, "test_35_no_secret", "common/summation/masked/owner.py", '"survivors: my upload is missing or altered"', '"survivors" + str([k.hex() for k, _ in self.masks])'),
    # 32, 34: the wire
    Mutation(WIRE, "test_32_an_oversized", "common/messages.py", "isinstance(value, bytes) and len(value) <= MAX_LIST_BYTES", "isinstance(value, bytes)"),
    Mutation(WIRE, "test_32_garbage", "common/messages.py", "        if set(values) != expected:".strip(), "if False:"),
    Mutation(WIRE, "test_53_", "common/wire.py", "    except Exception:", "    except ValueError:"),
    Mutation(WIRE, "test_34_", "server/app.py", "while node_of and time.monotonic() < deadline:", "while node_of and time.monotonic() < deadline + 60:"),
    # 33, 37, 38: results, agreements, candidates
    Mutation(PROCESS, "test_33_different", "common/certificates.py", "if len(signers) < agreement.needed_owners:", "if False:"),
    Mutation(PROCESS, "test_33_an_owner_signs", LEDGER, 'if self._result not in ("", body):', "if False:"),
    Mutation(LEAKS, "test_a_gram_of_few_rows", WORKBENCH, "if rows < least * dimensions:", "if False:"),
    Mutation(LEAKS, "test_an_agreement_on_as_many", "common/agreement.py", "if fitted_to_labels and len(balances) > max(1, honest - 2):", "if False:"),
    Mutation(LEAKS, "test_no_delta", "server/coordinator.py", "        total.destroy()"),
    Mutation(LEAKS, "test_with_absolute", "deploy/complete.py", "held_back |= _token_inputs(base, batch)"),
    Mutation(ARCHITECTURES, "test_experts_are_merged_only", "deploy/complete.py", "if not draft.privacy.merge_routed_inputs:", "if False:"),
    Mutation(PROCESS, "test_33_receipts_under", "common/certificates.py", "        verify(roster[name], label, session, name, body, signed.signature)"),
    Mutation(PROCESS, "test_33_a_result_that", OWNER, "        check_result(self.agreement, message)"),
    Mutation(PROCESS, "test_33_a_result_signed_in", OWNER, "if not self.state.has_receipt(message.run):", "if not self._ledger._result:"),
    Mutation(PROCESS, "test_33_a_result_is_signed_again", OWNER, "if not self.state.has_receipt(message.run):", "if True:"),
    Mutation(PROCESS, "test_33_receipts_of_another", OWNER, '        self._check_run(message.run)\n        kept = self.state.read_json("result")', '        kept = self.state.read_json("result")'),
    Mutation(PROCESS, "test_48_", OWNER, "if self._ledger.has_signed:", "if False:"),
    Mutation(PROCESS, "test_52_a_model_after", OWNER, "if self._ledger.has_signed:", 'if self.state.read_json("result") is not None:'),
    Mutation(PROCESS, "test_52_a_model_whose", OWNER, "if not self._ledger.models <=", "if False and not self._ledger.models <="),
    Mutation(PROCESS, "test_52_a_model_whose", LEDGER, "if session in self._models", "if session in self._revealed"),
    # packets
    Mutation(PACKETS, "test_49_a_packet_of_nothing", "common/messages.py", "    if size > PART_BYTES:", "    if False:"),
    Mutation(PACKETS, "test_49_a_packet_of_nothing", "common/messages.py", "    if not packet:", "    if False:"),
    Mutation(PACKETS, "test_49_a_packet_with_a_gap", "common/wire.py", "if not set(record) <=", "if False and not set(record) <="),
    Mutation(PACKETS, "test_49_a_packet_is_answered", OWNER, "if message.model not in self.workbench.agreed_candidates:", "if False:"),
    Mutation(PACKETS, "test_49_a_second_model", OWNER, "if same_name not in ([], [candidate]):", "if False:"),
    Mutation(PACKETS, "test_49_an_owner_whose_answers", "server/exchange.py", "if len(answer) != len(packet):", "if False:"),
    Mutation(PACKETS, "test_49_an_owner_whose_answers", "server/coordinator.py", "if reply != expected:", "if False:"),
    Mutation(COORDINATOR, "test_a_signature_of_another", "server/coordinator.py", "        verify(key, Domain.SIGN_RECEIPT, bytes.fromhex(self.run), owner, body, reply.signature)"),
    Mutation(PROCESS, "test_33_a_result_of", OWNER, "if message.model not in self.workbench.candidates(self.agreement.method):", "if False:"),
    Mutation(PROCESS, "test_37_another", "client/state.py", '!= {"run": run, "agreement_digest": agreement_digest}', "is None"),
    Mutation(PROCESS, "test_37_a_sum", OWNER, "        self._check_step(request.run, request.agreement_digest)"),
    Mutation(PROCESS, "test_38_", OWNER, "if request.candidates_digest != candidates_digest(self._received):", "if False:"),
    Mutation(OWNERS, "test_what_was_not_agreed", OWNER, "if message.model not in self.workbench.agreed_candidates:", "if False:"),
    Mutation(OWNERS, "test_a_candidate_that_changes", OWNER, '(kept.get("model"), kept.get("split")) == (message.model, message.split)', "bool(kept)"),
    Mutation(OWNERS, "test_a_candidate_that_changes", OWNER, "(message.part, message.parts) != (expected, len(slices))", "False"),
    Mutation(OWNERS, "test_a_candidate_that_changes", OWNER, "        self._check_step(message.run, message.agreement_digest)\n        kept", "        kept"),
    # between machines
    Mutation(LAUNCH, "test_the_guard_shows_other", GUARD, 'is_local(scope.get("client"))', "True"),
    Mutation(LAUNCH, "test_the_guard_shows_other", GUARD, 'OPEN.fullmatch(path)', "OPEN.match(path)"),
    Mutation(DEPLOYMENT, "test_from_another_address", GUARD, 'is_local(scope.get("client"))', "True"),
    Mutation(LAUNCH, "test_nothing_of_the_surroundings", "deploy/launch/flower.py", 'and name != "FORWARDED_ALLOW_IPS"', ""),
    Mutation(LAUNCH, "test_another_bundle_that_declares", GATE, "if found != digest:", "if False:"),
    Mutation(LAUNCH, "test_a_run_that_declares", GATE, "if not run.fab_hash == fab.hash_str == digest:", "if False:"),
    Mutation(LAUNCH, "test_a_run_that_declares", GATE, "if (run.fab_id, run.fab_version) != get_fab_metadata(fab.content):", "if False:"),
    Mutation(LAUNCH, "test_a_run_that_declares", GATE, "if run.primary_task_type != TaskType.SERVER_APP:", "if False:"),
    Mutation(LAUNCH, "test_the_gate_lets", GATE, "return self._agreed[run_id][1]", 'return self._connection["get_fab"](fab_hash, run_id)'),
    Mutation(DEPLOYMENT, "test_a_bundle_that_reads", GATE, "if reason is None:", "if True:"),
    Mutation(DEPLOYMENT, "test_only_the_agreement_s_keys", "deploy/commands/client.py", "if read_node_key(key) != agreed.get(owner.name):", "if False:"),
    Mutation(DEPLOYMENT, "test_only_the_agreement_s_keys", "deploy/commands/server.py", '"--enable-supernode-auth", ', ""),
    Mutation(DEPLOYMENT, "test_an_owner_that_has_not", "deploy/commands/client.py", "if agreement.digest() not in owner.state.consents():", "if False:"),
    Mutation(LAUNCH, "test_another_version", INTERNALS, "if installed != version:", "if False:"),
    Mutation(LAUNCH, "test_a_changed_or_missing", INTERNALS, "hashlib.sha256(path.read_bytes()).hexdigest() != digest", "False"),
    # methods of several sums
    Mutation(STEPS, "test_a_step_before", OWNER, " or self._merged_steps(method) != step.number", ""),
    Mutation(STEPS, "test_a_step_that_was_not", "common/merge_methods/__init__.py", "method in agreement.methods and ", ""),
    Mutation(STEPS, "test_a_step_about_other", OWNER, "if request.candidates_digest != candidates_digest(self._received):", "if False:"),
    Mutation(STEPS, "test_merged_layers", OWNER, "if same_name not in ([], [candidate]):", "if False:"),
    Mutation(STEPS, "test_merged_layers", OWNER, "if not last_again and (number != str(due)", "if False and (number != str(due)"),
    Mutation(STEPS, "test_merged_layers", OWNER, "if method not in SEQUENTIAL.intersection(self.agreement.methods):", "if False:"),
    Mutation(LEAKS, "test_55_", "common/models/plan.py", "of_layer[shared_input.layers[0].whole] += ", "of_layer[shared_input.name] += "),
    # scales of 32-bit sums
    Mutation(SCALES, "test_50_", OWNER, "if request.candidates_digest != candidates_digest(self._received):", "if False:"),
    Mutation(SCALES, "test_50_", "common/messages.py", "for field in fields(self)]", 'for field in fields(self)[:4]]'),
    Mutation(SCALES, "test_51_scales_of_its_own", SCALING, "if not (mine <= sent).all():", "if False:"),
    Mutation(SCALES, "test_51_scales_of_its_own", SCALING, "if sent.sum() > worth.sum() > 0 or 2 * (sent > worth)[seen].sum() > seen.sum():", "if False:"),
    Mutation("test_scaling.py", "test_scales_that_leave", SCALING, " or 2 * (sent > worth)[seen].sum() > seen.sum()", ""),
    Mutation("test_scaling.py", "test_scales_that_leave", SCALING, "sent.sum() > worth.sum() > 0 or ", ""),
    Mutation(SCALES, "test_51_scales_of_its_own", SCALING, "if not (np.abs(exponents) <= MAX_EXPONENT).all() or (exponents != np.rint(exponents)).any():", "if False:"),
    Mutation(SCALES, "test_51_scales_of_its_own", OWNER, "if same_name not in ([], [candidate]):", "if False:"),
    Mutation(SCALES, "test_51_one_scale", SCALING, "if not (mine <= sent).all():", "if not mine.sum() <= sent.sum():"),
    Mutation(SCALES, "test_51_scales_before", OWNER, "if kept is None or not opened:", "if kept is None:"),
    Mutation(SCALES, "test_51_a_contribution", OWNER, "if request.models or [model for model, _, _ in self._received] != [SCALES]:", "if False:"),
    Mutation(SCALES, "test_51_contributions", "common/tensor_layout.py", '"amalgram layout v2\\n" + canonical', '"amalgram layout v2\\n" + canonical[4:]'),
    Mutation(SCALES, "test_51_scales_that_nobody", OWNER, "if message.model != SCALES or not self.agreement.summation.has_scales:", "if message.model != SCALES:"),
    Mutation(UPLOADS, "test_24_an_upload_in_another", "common/summation/accumulator.py", " or payload.dtype != self.vector.dtype", ""),
    Mutation(UPLOADS, "test_25_a_total_of_32", "common/summation/fixed_point.py", "if int(chunk.max(initial=0)) > largest or int(chunk.min(initial=0)) < -largest:", "if False:"),
    Mutation("test_scaling.py", "test_32_bits", "common/agreement.py", "        if self.needed_owners < count:\n            raise ValueError(\n                f\"min_owners = {self.needed_owners}: with", "        if False:\n            raise ValueError(\n                f\"min_owners = {self.needed_owners}: with"),
    Mutation(RESUME, "test_a_run_in_32_bits", OWNER, 'if side.reveals and request.statistic == "contribution":', 'if side.is_done and request.statistic == "contribution":'),
    Mutation(AGREEMENT, "test_a_method_of_several", "common/agreement.py", "if sequential and self.needed_owners < len(names):", "if False:"),
    # what an owner has on its disk
    Mutation(SCALES, "test_54_", OWNER, "if message.statistic == SCALES:", "if False:"),
    Mutation("test_gram_stream.py", "test_activations_are", "client/measurement/blocks.py", "with private_file.create(path) as file:", 'with path.open("wb") as file:'),
    Mutation(OWNERS, "test_a_full_disk", "client/state.py", 'if sys.platform == "linux":', "if False:"),
    # what a coordinator keeps of a run
    Mutation(RESUME, "test_totals_are_readable", "common/private_file.py", "0o600", "0o644"),
    Mutation(RESUME, "test_totals_are_readable", "common/private_file.py", "    folder.chmod(0o700)"),
    Mutation(RESUME, "test_an_owner_that_a_sum", "server/recovery.py", "pending - checkpoint.opened_sessions - reopening", "pending - reopening"),
    # logs, and two programs on one output
    Mutation(LOGS, "test_a_line_holds_nothing", "common/logs.py", '"message": record.getMessage(),', '"message": record.getMessage() + str(record.exc_info),'),
    Mutation(LOGS, "test_a_whole_run", WORKBENCH, 'log.info("  %s: measuring", self.name)', 'log.info("  %s: measuring %s", self.name, len(self.data.train()))'),
    Mutation(LOGS, "test_a_second_run", "server/app.py", "while not _is_locked(descriptor):", "while False:"),
    Mutation(LAUNCH, "test_whoever_was_killed", GATE, "            write_whole(self._unanswered, otherwise.SerializeToString())"),
    Mutation(LAUNCH, "test_an_answer_that_broke_off", GATE, "if not self._to_push:", "if True:"),
]  # fmt: skip


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree, in which every test of the table passes."""
    copy = tmp_path_factory.mktemp("mutations") / "tree"
    copy.mkdir()
    for name in ("common", "client", "server", "deploy", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    done = run_tests(copy, sorted({row.file for row in TABLE}), "test_")
    assert done.returncode == 0, done.stdout[-2000:]
    return copy


def run_tests(tree: Path, files: list[str], which: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", which]
    command += [f"tests/{file}" for file in files]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(tree)}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)


def test_every_row_of_the_table_names_code_and_a_test_that_are_there() -> None:
    for row in TABLE:
        assert row.find in (ROOT / row.source).read_text(), f"{row.source} no longer has: {row.find}"
        first_name = row.test.split()[0]
        assert first_name in (ROOT / "tests" / row.file).read_text(), f"{row.file} no longer has {row.test}"


@pytest.mark.slow
@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.test}-{Path(row.source).stem}")
def test_without_its_check_an_attack_succeeds(tree: Path, row: Mutation) -> None:
    path = tree / row.source
    original = path.read_text()
    assert original.count(row.find) >= 1, f"{row.source} no longer has: {row.find}"
    indent = row.find[: len(row.find) - len(row.find.lstrip())] if row.replace == "pass" else ""
    path.write_text(original.replace(row.find, indent + row.replace))
    try:
        done = run_tests(tree, [row.file], row.test)
    finally:
        path.write_text(original)
    # 1: tests were run and failed. 5 would mean that no test has this name, 2 that the mutation is no Python.
    assert done.returncode == 1, done.stdout[-2000:]
    assert " error" not in done.stdout.splitlines()[-1], done.stdout[-2000:]
