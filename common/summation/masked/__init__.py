"""The masked sum: the coordinator learns the total over the owners and nothing else, even if it is malicious.

Source: Bonawitz et al., CCS 2017 (ePrint 2017/281), figure 4, the variant against an active server. Above 150 owners it
uses the sparse graph of Bell et al., CCS 2020 (neighbours.py). Owners and coordinator both run it. The owners'
long-lived keys are pinned in the agreement. Threshold, roster, bounds and layout come from it too, not from messages.

    step              coordinator         owner             what the owner checks first; if a check fails, it wipes its
                                                            secrets and the session is over
    AdvertiseKeys     OpenSum             KeysAdvertised    agreement, layout, round, ledger (client/owner.py)
    ShareKeys         KeyBook             SharesSealed      pinned signatures, own entry, distinct keys, enough owners
    MaskedInput       KeyShares           MaskedPart 0      senders in the book, signatures, seals, commitments, enough
                      KeyShares           SharesDisputed    instead, once, if a neighbour signed shares of no use
                      OpenShares          SharesOpened      at most max(c, 1) neighbours signed that mine are of no use
                      PartRequest         MaskedPart k      part k is the next one, or the same bytes as sent before
    ConsistencyCheck  SurvivorList        SurvivorsSigned   a subset of the book with my upload in it, enough owners
    Unmasking         Acknowledgements    SharesRevealed    a quorum signed the same list as I did; if a restarted
                                                            coordinator asks again: the same bytes as sent before

Owner i sends y_i = x_i + PRG(b_i) + sum over j > i of PRG(s_ij) - sum over j < i of PRG(s_ij), modulo 2^64 or 2^32.
The pair masks PRG(s_ij) cancel in the sum over owners. The self mask PRG(b_i) hides y_i if the coordinator claims that
i dropped out although its upload arrived: the neighbours then help to rebuild s_i*, never b_i. For an owner that
survived they help to rebuild b_i, never s_i*. Both secrets of one owner would open x_i. So no honest owner signs two
survivor lists in one session, and none reveals anything before a quorum t = floor((N + c) / 2) + 1 has signed its own
list. Two quorums share an honest owner.

Each owner also commits to every share that it deals, under its signature. So whoever reveals another share is named,
and so is a dealer whose shares do not fit together. An owner that was sealed something else than its dealer committed
to disputes it, before it gives anything. The dealer then opens these two shares to the coordinator, which passes them
on. If it does not, it is left out of the next session, and this one is given up. No honest owner disputes an honest
owner's shares, so the coordinator learns only shares that a dishonest owner held. No honest owner can be made to look
like the liar.

Every sum is a session of its own with fresh keys. A multi-round method runs one session for each round: keys that lived
on across rounds would have to be kept while nobody knows yet who will survive the next round.

What this does not protect against: what the total itself reveals; an owner that contributes a false vector; an owner or
a coordinator that refuses to continue; more than c owners that collude with the coordinator. See SECURITY.md.
"""
