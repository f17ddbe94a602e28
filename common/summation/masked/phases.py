"""The phases of a masked sum, named after the steps of Bonawitz et al. 2017, figure 4."""

from enum import StrEnum


class Phase(StrEnum):
    """An owner is in the phase of the step that it answered last; the coordinator, of the step it collects answers for.

    After Unmasking the coordinator is done (`protocol.DONE`).
    """

    ADVERTISE_KEYS = "AdvertiseKeys"
    SHARE_KEYS = "ShareKeys"
    DISPUTED_SHARES = "MaskedInput, disputed shares"  # a detour, only if an owner finds that it was dealt wrong shares
    MASKED_INPUT = "MaskedInput"
    WHOLE_INPUT = "MaskedInput complete"  # an owner's only: its last part has left
    CONSISTENCY_CHECK = "ConsistencyCheck"
    UNMASKING = "Unmasking"
