"""The domain separation labels: each keeps one use of a key or hash apart from every other use.

A signature says "this owner, in this session, about this"; a derived key serves one purpose. Both begin with a label,
so nothing that is signed or derived for one step can be passed off as another's. Each label is used in one place only.
"""

from enum import Enum


class Domain(Enum):
    """The labels are numbered, so a new one never collides with an old one; each contains the version."""

    # What is hashed.
    SESSION = b"amalgram v1 01 session\n"
    KEY_BOOK = b"amalgram v1 02 key book\n"
    SEED_COMMITMENT = b"amalgram v1 03 commitment to a self-mask seed\n"
    UPLOAD = b"amalgram v1 04 masked upload\n"
    SURVIVORS = b"amalgram v1 05 survivor list\n"
    NEIGHBOURS = b"amalgram v1 06 neighbour graph\n"
    RESULT = b"amalgram v1 07 result of a run\n"
    FINGERPRINT = b"amalgram v1 08 fingerprint\n"
    DELIVERIES = b"amalgram v1 09 deliveries of a run\n"
    MEASURED_ROWS = b"amalgram v1 60 rows to measure\n"
    SEARCH = b"amalgram v1 63 step of a search\n"
    PROJECTION = b"amalgram v1 16 projection of a merged model\n"
    COMBINATION = b"amalgram v1 17 combination of a merged model's rows\n"
    SCALE = b"amalgram v1 18 factor of a scale\n"
    CHECK_KEYS = b"amalgram v1 19 keys of a check\n"
    SHARE_COMMITMENT = b"amalgram v1 15 commitment to a share\n"
    # What is signed.
    SIGN_PRESENT = b"amalgram v1 21 sign presence\n"
    SIGN_KEYS = b"amalgram v1 22 sign advertised keys\n"
    SIGN_SHARES = b"amalgram v1 23 sign sealed shares\n"
    SIGN_PART = b"amalgram v1 24 sign masked part\n"
    SIGN_SURVIVORS = b"amalgram v1 25 sign survivor list\n"
    SIGN_REVEAL = b"amalgram v1 26 sign revealed shares\n"
    SIGN_BURNED = b"amalgram v1 27 sign burned session\n"
    SIGN_DISPUTE = b"amalgram v1 30 sign disputed shares\n"
    SIGN_OPENED = b"amalgram v1 31 sign opened shares\n"
    SIGN_RESULT = b"amalgram v1 28 sign result\n"
    SIGN_RECEIPT = b"amalgram v1 29 sign receipt of a result\n"
    SIGN_DELIVERY = b"amalgram v1 35 sign what was delivered\n"
    SIGN_NONCE = b"amalgram v1 33 sign nonce\n"
    SIGN_CHECK_SHARES = b"amalgram v1 34 sign check shares\n"
    # What is derived.
    CHANNEL_KEY = b"amalgram v1 41 channel private key\n"
    MASK_KEY = b"amalgram v1 42 mask private key\n"
    SEAL_KEY = b"amalgram v1 43 key that seals shares\n"
    PAIR_MASK = b"amalgram v1 44 mask of a pair\n"
    SELF_MASK = b"amalgram v1 45 mask of one owner\n"
    CHECK_KEY = b"amalgram v1 46 private key of a check\n"
    CHECK_MASK = b"amalgram v1 47 mask of a pair in a check\n"
    LEDGER_KEY = b"amalgram v1 61 key of a ledger's sketches\n"
    NOISE = b"amalgram v1 62 noise on one tensor of one round\n"
