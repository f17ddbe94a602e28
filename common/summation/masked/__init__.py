"""The masked sum: the coordinator learns the total over the owners, and nothing else, even if it cheats.

Source: Bonawitz et al., CCS 2017 (ePrint 2017/281), figure 4, the variant against an active server; above 150 owners
with the sparse graph of Bell et al., CCS 2020 (neighbours.py). Run by owners and coordinator. The owners' long-lived
keys are pinned in the agreement; threshold, roster, bounds and layout come from it too, never from a message.

    step          coordinator         owner             what the owner checks first (or it wipes its secrets: burned)
    advertise     OpenSum             KeysAdvertised    (client/owner.py: agreement, layout, round, ledger)
    share keys    KeyBook             SharesSealed      pinned signatures, own entry, distinct keys, enough owners
    masked part   KeyShares           MaskedPart 0      senders in the book, their signatures, seals, enough senders
                  PartRequest         MaskedPart k      the part is the next one, or the very bytes sent before
    survivors     SurvivorList        SurvivorsSigned   subset of the book, I am in it with my upload, enough of them
    reveal        Acknowledgements    SharesRevealed    a quorum signed the very list that I signed; asked again, by a
                                                        coordinator that was started again: the very bytes sent before

Owner i sends y_i = x_i + PRG(b_i) + sum over j > i of PRG(s_ij) - sum over j < i of PRG(s_ij), modulo 2^64 or 2^32.
The pair masks PRG(s_ij) cancel in the sum over owners. The self mask PRG(b_i) keeps y_i hidden when i is declared lost
although its upload arrived: then the neighbours help to rebuild s_i*, never b_i. For an owner that survived they help
to rebuild b_i, never s_i*. Both for one owner would open x_i, so no honest owner signs two survivor lists in one
session, and none reveals anything before a quorum t = floor((N + c) / 2) + 1 has signed its own list: two quorums share
an honest owner. Every sum is a session of its own with fresh keys; a method of several steps runs one session per step,
because keys that live on across steps would have to be kept while nobody knows yet who will survive the next one.

What this does not protect: what the sum itself reveals; an owner whose vector is a lie; an owner, or the coordinator,
refusing to go on; anything if more than c owners collude with the coordinator. See SECURITY.md.
"""
