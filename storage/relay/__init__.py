"""The relay: from the outbox in PostgreSQL to the log in Kafka, nothing lost, in bounded memory.

    cursor     where a lane is, and what follows from a page (pure)
    drain      reads pages of the outbox and stores the cursor
    records    what the log gets for a page (pure)
    split      a change batch that is too large, in pieces (pure)
    publish    the producer: delivers records and says when all are in the log
    lane       the life of one lane under one lease
    retire     drops outbox partitions that nobody needs any more
    service    the process: leases, lanes, measures, retirement

A batch is *committed* when its transaction is visible, *published* when Kafka has confirmed every record of it
(acks=all), and only then does the cursor move past it: a relay that dies in between publishes it again. Consumers
recognise a repeated record; docs/change-log.md tells them how.
"""
